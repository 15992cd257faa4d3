"""The page about atoms: it stands alone, says what the adapter says, and shows pictures that can be made otherwise."""

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
import torch
from PIL import Image
from small_model import shake

from dit import page
from dit.pipeline import Pipeline
from sparsecode import adapters, attach, detach, load_adapter, record_usage, save_adapter, top_atoms


def make_adapter(weights, file, method="sparse", prompt='a robot & "star"', measured=True, **options):
    pipe = Pipeline.from_folder(weights, device="cpu")
    torch.manual_seed(0)
    shake(attach(pipe.transformer, method, **options))
    if measured:
        with record_usage(pipe.transformer):
            pipe.generate(["a robot"], steps=2)
    save_adapter(pipe.transformer, file, prompt=prompt)
    return file


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return make_adapter(tiny, tmp_path_factory.mktemp("run") / "adapter.safetensors", atoms=8, density=0.25)


@pytest.fixture
def pipe(tiny, adapter):
    pipe = Pipeline.from_folder(tiny, device="cpu")
    load_adapter(pipe.transformer, adapter)
    return pipe


class Page(HTMLParser):
    """What is in the page: titles, pictures, bars for each plot, and every tag and attribute."""

    def __init__(self, text):
        super().__init__()
        self.titles, self.pictures, self.bars, self.tags, self.links, self.open = [], [], [], [], [], []
        self.feed(text)
        assert not self.open  # every tag was closed

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        attributes = dict(attributes)
        self.links += [value for key, value in attributes.items() if key in ("src", "href", "srcset", "data")]
        if tag not in ("meta", "img"):
            self.open.append(tag)
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/png;base64"
            self.pictures.append(Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB"))
        if tag == "svg":
            self.bars.append([])

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        if tag == "rect":
            self.bars[-1].append(float(dict(attributes)["height"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] == "h2":
            self.titles.append(data)


def call(tiny, adapter, *more):
    page.main(["--weights", str(tiny), "--device", "cpu", "--adapter", str(adapter), "--steps", "3", *map(str, more)])


def pixels(image):
    return np.asarray(image).tolist()


def test_the_page(tiny, adapter, pipe, tmp_path, capsys):
    out = tmp_path / "new" / "atoms.html"
    call(tiny, adapter, "--top", 4, "--out", out)
    printed = capsys.readouterr()
    assert printed.out == f"the 4 most important atoms in {out}: open it in a browser\n" and printed.err == ""
    text = out.read_text(encoding="utf-8")
    page, ranked = Page(text), top_atoms(pipe.transformer, 4)
    assert page.titles[0] == '“a robot & "star"”'
    assert [title.split(":")[0] for title in page.titles[1:]] == [
        f"{i}. {layer}, atom {m}" for i, (layer, m, _) in enumerate(ranked, start=1)
    ]
    everything = sum(value for *_, value in top_atoms(pipe.transformer, 16))
    assert page.titles[1].endswith(f"{ranked[0][2] / everything:.1%} of all importance")
    assert len(page.pictures) == 3 + 4 * 4 and {picture.size for picture in page.pictures} == {(16, 16)}
    assert [len(bars) for bars in page.bars] == [3] * 4 and all(max(bars) == 95 for bars in page.bars)
    assert "script" not in page.tags and all(link.startswith("data:") for link in page.links)
    assert not re.search(r"https?:|url\(|@import", text)


def test_the_pictures_of_the_page(tiny, adapter, pipe, tmp_path):
    """Without an atom is with a D_m of zero; without all is the base model."""
    call(tiny, adapter, "--top", 2, "--out", tmp_path / "atoms.html", "--seed", 7, "--prompt", "a star")
    pictures = Page((tmp_path / "atoms.html").read_text(encoding="utf-8")).pictures
    (full,) = pipe.generate(["a star"], steps=3, seed=7)
    assert pixels(pictures[0]) == pixels(full)
    for i, (layer, m, _) in enumerate(top_atoms(pipe.transformer, 2)):
        atom = adapters(pipe.transformer)[layer].D.data[m]
        kept, atom[:] = atom.clone(), 0
        (missing,) = pipe.generate(["a star"], steps=3, seed=7)
        atom[:] = kept
        _, with_it, without_it, change = pictures[3 + 4 * i : 7 + 4 * i]
        assert pixels(with_it) == pixels(full) and pixels(without_it) == pixels(missing)
        expected = np.clip(128 + 4 * (np.asarray(full, int) - np.asarray(missing, int)), 0, 255)
        assert np.abs(np.asarray(change, int) - expected).max() <= 1 and np.ptp(expected) > 0
    detach(pipe.transformer)
    assert pixels(pictures[2]) == pixels(pipe.generate(["a star"], steps=3, seed=7)[0])


def test_maps_are_those_of_the_pass_with_the_prompt(pipe):
    """Seen once more without guidance, where there is no other pass: the first step sees the same noise."""
    noise = pipe.noise([3], 16, 24)  # (1, 4, 8, 12)
    best = [(layer, m) for layer, m, _ in top_atoms(pipe.transformer, 5)]
    assert len({layer for layer, _ in best}) == 2
    picture, maps = page.watch(pipe, "a red robot", noise, best, steps=3)
    _, alone = page.watch(pipe, "a red robot", noise, best, steps=3, guidance=1)
    assert picture.size == (24, 16) and maps.shape == (5, 3, 4, 6)  # a patch is 2 × 2 latents
    torch.testing.assert_close(maps[:, 0], alone[:, 0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps[:, 2], alone[:, 2], atol=1e-3)
    _, backwards = page.watch(pipe, "a red robot", noise, best[::-1], steps=3)
    assert torch.equal(backwards.flip(0), maps)


def test_an_overlay_is_red_where_the_atom_is_added_and_blue_where_it_is_subtracted():
    values = torch.zeros(4, 4)
    values[0, 0], values[3, 3] = 2.0, -1.0
    drawn = np.asarray(page.overlay(Image.new("RGB", (64, 64), "white"), values), dtype=int)
    red, blue, none = drawn[2, 2], drawn[61, 61], drawn[2, 61]
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 50 and none.tolist() == [255, 255, 255]
    paler = np.asarray(page.overlay(Image.new("RGB", (64, 64), "white"), values, scale=4.0), dtype=int)
    assert drawn[2, 2, 2] < paler[2, 2, 2] < 255
    nothing = page.overlay(Image.new("RGB", (64, 64), "black"), torch.zeros(4, 4))
    assert pixels(nothing) == pixels(Image.new("RGB", (64, 64), (128, 128, 128)))


# Arguments (after good ones, which they override) and words of the line that they must give.
MISTAKES = {
    "--adapter {lora}": "is a lora adapter; only the sparse method has atoms",
    "--adapter {bare}": "does not say what it was trained on; give a --prompt",
    "--adapter {unmeasured}": "was never measured",
    "--adapter absent.safetensors": "there is no adapter file",
    "--top 17": "choose a number from 1 to 16",
    "--top 0": "above 0",
    "--out atoms.png": "does not end like a page",
    "--out {folder}": "is a folder; name a file",
    "--steps 1000": "expected 1 to 999",
    "--height 18": "multiple of 4",
    "--weights absent": "is not a folder",
}


@pytest.fixture(scope="module")
def files(tiny, tmp_path_factory):
    folder = tmp_path_factory.mktemp("files")
    (folder / "folder.html").mkdir()
    return {
        "folder": folder / "folder.html",
        "lora": make_adapter(tiny, folder / "lora.safetensors", "lora", measured=False, r=2),
        "bare": make_adapter(tiny, folder / "bare.safetensors", prompt=None, atoms=8),
        "unmeasured": make_adapter(tiny, folder / "unmeasured.safetensors", measured=False, atoms=8),
    }


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(tiny, adapter, files, tmp_path, monkeypatch, arguments, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("work was done"))
    words = [word.format(**files) for word in arguments.split()]
    assert MISTAKES[arguments] in mistake(page, "--weights", tiny, "--device", "cpu", "--adapter", adapter, *words)
    assert list(tmp_path.iterdir()) == []
