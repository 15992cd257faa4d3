"""The page of atoms: it stands alone, says what the adapter says, and shows pictures that can be made otherwise."""

import base64
import io
import re
from html.parser import HTMLParser
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from tiny_pipeline import write_adapter

from dit import page
from dit.maps import overlay, watch
from dit.pipeline import Pipeline
from sparsecode import (
    adapters,
    detach,
    keep_atoms,
    load_adapter,
    set_density,
    set_scale,
    top_atoms,
)


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return write_adapter(tiny, tmp_path_factory.mktemp("run") / "adapter.safetensors", atoms=8, density=0.25)


@pytest.fixture
def pipe(tiny, adapter):
    pipe = Pipeline.from_folder(tiny, device="cpu")
    load_adapter(pipe.transformer, adapter)
    return pipe


class Page(HTMLParser):
    """What a browser finds in the page: texts by tag, pictures with their attributes, sliders, bars, and links."""

    def __init__(self, text):
        super().__init__()
        self.texts, self.pictures, self.sliders, self.bars, self.links, self.ids, self.fors = {}, [], {}, [], [], [], []
        self.tags, self.open = [], []
        self.feed(text)
        assert not self.open  # every tag was closed
        assert len(set(self.ids)) == len(self.ids) and set(self.fors) <= set(self.ids)

    def handle_starttag(self, tag, attributes):
        names, attributes = [name for name, _ in attributes], dict(attributes)
        assert len(attributes) == len(names)
        assert not any(name.startswith("on") for name in names)
        self.tags.append(tag)
        self.links += [attributes[name] for name in ("src", "href", "srcset", "data", "action") if name in attributes]
        self.ids += [attributes["id"]] if "id" in attributes else []
        self.fors += [attributes["for"]] if "for" in attributes else []
        if tag not in ("meta", "img", "input"):
            self.open.append(tag)
        if tag == "img":
            kind, data = attributes["src"].split(",")
            assert kind == "data:image/jpeg;base64" and attributes["alt"]
            self.pictures.append((attributes, Image.open(io.BytesIO(base64.b64decode(data)))))
        if tag == "input" and attributes["type"] == "range":
            self.sliders[attributes["id"]] = attributes["data-words"].split("|"), attributes["value"]
        if tag == "svg":
            self.bars.append([])

    def handle_startendtag(self, tag, attributes):
        self.bars[-1].append(float(dict(attributes)["height"]))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open:
            self.texts.setdefault(self.open[-1], []).append(data.strip())

    def stops(self):
        """The pictures of the sliders: {(atoms, density, seed): picture}, each by its stop."""
        names = [f"data-{name}" for name in ("atoms", "density", "seed")]
        found = [(tuple(int(a[name]) for name in names), p) for a, p in self.pictures if "data-atoms" in a]
        assert len(dict(found)) == len(found)
        return dict(found)

    def cards(self, words, seed):
        """The pictures of the cards that have these words, from first to last."""
        shown = [(a, p) for a, p in self.pictures if "data-atoms" not in a and a["data-seed"] == str(seed)]
        return [picture for attributes, picture in shown if attributes["alt"] == words]


def call(tiny, adapter, out, *more):
    words = ["--weights", tiny, "--device", "cpu", "--adapter", adapter, "--steps", "3", "--out", out, *more]
    page.main([str(word) for word in words])
    text = out.read_text(encoding="utf-8")
    return Page(text), text


def pixels(image):
    return np.asarray(image).tolist()


def jpeg(image):
    """What is left of a picture once it is on the page."""
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, subsampling=0)
    return pixels(Image.open(file))


def test_the_page(tiny, adapter, pipe, tmp_path, capsys):
    more = ["--top", 4, "--seed", 5, 6, 9, "--keep-atoms", 0, 4, 12]
    found, _ = call(tiny, adapter, tmp_path / "new" / "atoms.html", *more)
    printed = capsys.readouterr()
    out = tmp_path / "new" / "atoms.html"
    assert printed.out == f"the 4 most important atoms in {out}: open it in a browser\n" and printed.err == ""
    assert found.sliders == {
        "atoms": (["0 of 16", "4 of 16", "12 of 16", "16 of 16"], "100"),  # a browser stops at the last
        "density": (["6.25 %", "12.5 %", "25 % (as trained)", "50 %"], "2"),
        "seed": (["5", "6", "9"], "0"),
    }
    assert set(found.stops()) == set(product(range(4), range(4), range(3)))
    ranked = top_atoms(pipe.transformer, 4)
    everything = sum(value for *_, value in top_atoms(pipe.transformer, 16))
    assert found.texts["h3"] == [f"{i}. {layer}, atom {m}" for i, (layer, m, _) in enumerate(ranked, start=1)]
    shares = [f"{100 * value / everything:.1f} % of all importance" for *_, value in ranked]
    assert [words.split(";")[0] for words in found.texts["p"] if "all importance;" in words] == shares
    for seed, words in product(range(3), ("with this atom", "without this atom", "its map")):
        assert len(found.cards(words, seed)) == 4
    assert len(found.pictures) == 4 * 4 * 3 + 4 * 3 * 3
    assert [len(bars) for bars in found.bars] == [3] * 4 and all(max(bars) == 95 for bars in found.bars)


def test_the_page_needs_no_network_and_names_no_path(tiny, adapter, tmp_path):
    found, text = call(tiny, adapter, tmp_path / "atoms.html", "--top", 1, "--seed", 0, "--keep-atoms", 0, "all")
    assert all(link.startswith("data:") for link in found.links)
    assert not re.search(r"https?:|url\(|@import|fetch|import\(|XMLHttp|WebSocket", text)
    assert str(tmp_path) not in text and str(adapter) not in text and str(tiny) not in text


def test_the_page_that_the_readme_links_to():
    """It is whole, small, and made with the template of today."""
    root = Path(page.__file__).parent.parent
    text = (root / "lessons" / "figures" / "atoms.html").read_text(encoding="utf-8")
    assert "(lessons/figures/atoms.html)" in (root / "README.md").read_text(encoding="utf-8")
    assert len(text) < 1_500_000 and len(Page(text).stops()) == 6 * 4 * 2
    template = Path(page.__file__).with_suffix(".html").read_text(encoding="utf-8")
    assert text.split("<script>")[1] == template.split("<script>")[1]
    assert text.split("</style>")[0].split("body {")[1].replace("pixelated", "$rendering") in template


def test_a_prompt_stays_text(tiny, adapter, tmp_path):
    prompt = "</title></p><script>alert(1)</script> \"'><img src=x onerror=alert(1)> $cards & &amp; é"
    found, _ = call(tiny, adapter, tmp_path / "a.html", "--top", 1, "--seed", 0, "--density", 1, "--prompt", prompt)
    assert f"“{prompt}”" in found.texts["p"] and found.texts["title"] == [f"The atoms of “{prompt}”"]
    assert found.tags.count("script") == 1 and found.tags.count("img") == 2 * 2 + 3


def test_the_pictures_of_the_sliders(tiny, adapter, pipe, tmp_path):
    """Each stop is the model with so many atoms, ranked at the trained density, and that density and scale."""
    more = ["--seed", 7, 8, "--prompt", "a star", "--keep-atoms", 0, 5, "--density", 0.5, "--top", 1, "--scale", 0.5]
    set_scale(pipe.transformer, 0.5)
    found, _ = call(tiny, adapter, tmp_path / "atoms.html", *more)
    noise, seen = pipe.noise([7, 8]), []
    for (i, count), (j, density) in product(enumerate([0, 5, 16]), enumerate([0.25, 0.5])):
        set_density(pipe.transformer, 0.25)
        keep_atoms(pipe.transformer, count)
        set_density(pipe.transformer, density)
        for k, picture in enumerate(pipe.generate(["a star"] * 2, steps=3, latents=noise)):
            assert pixels(found.stops()[i, j, k]) == jpeg(picture)
            seen.append(jpeg(picture))
    assert len({str(picture) for picture in seen}) == 12 - 2  # with no atoms the density makes no difference
    detach(pipe.transformer)
    assert pixels(found.stops()[0, 1, 0]) == jpeg(pipe.generate(["a star"], steps=3, seed=7)[0])


def test_the_pictures_of_the_cards(tiny, adapter, pipe, tmp_path):
    """Without an atom is with a D_m of zero."""
    more = ["--top", 2, "--seed", 7, 8, "--prompt", "a star", "--keep-atoms", 0, "--density", 0.25]
    found, _ = call(tiny, adapter, tmp_path / "atoms.html", *more)
    full = [pipe.generate(["a star"], steps=3, seed=seed)[0] for seed in (7, 8)]
    for i, (layer, m, _) in enumerate(top_atoms(pipe.transformer, 2)):
        maps = [watch(pipe, "a star", pipe.noise([seed]), [(layer, m)], steps=3)[1][0].mean(0) for seed in (7, 8)]
        atom = adapters(pipe.transformer)[layer].D.data[m]
        kept, atom[:] = atom.clone(), 0
        missing = pipe.generate(["a star"] * 2, steps=3, seed=7)
        atom[:] = kept
        for k in range(2):
            assert pixels(found.cards("with this atom", k)[i]) == jpeg(full[k])
            assert pixels(found.cards("without this atom", k)[i]) == jpeg(missing[k]) != jpeg(full[k])
            assert pixels(found.cards("its map", k)[i]) == jpeg(overlay(full[k], maps[k]))
        change = np.abs(np.array(full, dtype=float) - np.array(missing, dtype=float)).mean()
        assert [f"changes by {change:.1f} of 255" in words for words in found.texts["p"]].count(True) > 0


def test_large_pictures_are_made_smaller(pipe):
    (element,) = Page(page.inline(Image.new("RGB", (1024, 512)), 'a "picture"', 'id="x"')).pictures
    assert element[1].size == (256, 128) and element[0]["alt"] == 'a "picture"'


def test_an_adapter_without_a_density(tiny, tmp_path):
    file = write_adapter(tiny, tmp_path / "soft.safetensors", atoms=8, threshold="soft", lam=0.1)
    found, _ = call(tiny, file, tmp_path / "atoms.html", "--top", 1, "--seed", 0)
    assert found.sliders["density"] == (["as trained"], "0")
    assert set(found.stops()) == set(product(range(2), [0], [0]))


# Arguments (after good ones, which they override) and words of the line that they must give.
MISTAKES = {
    "--adapter {lora}": "is a lora adapter; only the sparse method has atoms",
    "--adapter {bare}": "does not say what it was trained on; give a --prompt",
    "--adapter {unmeasured}": "was never measured",
    "--adapter absent.safetensors": "there is no adapter file",
    "--top 17": "choose a number from 1 to 16",
    "--top 0": "above 0",
    "--keep-atoms 4 17": "choose a number from 0 to 16",
    "--keep-atoms -1": "choose a number from 0 to 16",
    "--keep-atoms some": "'some' is not a whole number or all",
    "--guidance nan": "'nan' is not a finite number",
    "--density 0.1 2": "density=2.0 is not a share",
    "--adapter {soft} --density 0.1": "only top_k has a density to set",
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
        "lora": write_adapter(tiny, folder / "lora.safetensors", "lora", measured=False, r=2),
        "bare": write_adapter(tiny, folder / "bare.safetensors", prompt=None, atoms=8),
        "soft": write_adapter(tiny, folder / "soft.safetensors", atoms=8, threshold="soft", lam=0.1),
        "unmeasured": write_adapter(tiny, folder / "unmeasured.safetensors", measured=False, atoms=8),
    }


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(tiny, adapter, files, tmp_path, monkeypatch, arguments, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("work was done"))
    words = [word.format(**files) for word in arguments.split()]
    assert MISTAKES[arguments] in mistake(page, "--weights", tiny, "--device", "cpu", "--adapter", adapter, *words)
    assert list(tmp_path.iterdir()) == []


def test_t5_is_alone_in_memory(tiny, adapter, tmp_path, loaded):
    call(tiny, adapter, tmp_path / "atoms.html", "--seed", 0, "--top", 1)
    assert loaded.pop(0) == {"text_encoder"} and loaded
    assert all("text_encoder" not in parts for parts in loaded)
