"""The command that draws: rows for prompts, densities and numbers of atoms; no atoms draw the base model's pictures."""

import pytest
from PIL import Image
from tiny_pipeline import TRANSFORMER, write_adapter, write_pipeline

from dit import sample
from dit.pipeline import Pipeline
from sparsecode.common import UserError


@pytest.fixture(scope="module")
def adapter(tiny, tmp_path_factory):
    return write_adapter(tiny, tmp_path_factory.mktemp("run") / "adapter.safetensors", atoms=8, density=0.25)


def rows(tiny, *arguments):
    args = sample.parse([*map(str, arguments), "--weights", str(tiny), "--device", "cpu", "--steps", "3"])
    return sample.sample(sample.load_pipeline(args), args)


def pixels(images):
    return [image.tobytes() for image in images]


def test_a_row_for_each_prompt_and_a_column_for_each_seed(tiny):
    drawn = rows(tiny, "a red star", "", "xyzzy ☃", "--seed", 5, 6)
    assert [label for label, _ in drawn] == ["a red star", "", "xyzzy ☃"]
    assert all(len(images) == 2 and len(set(pixels(images))) == 2 for _, images in drawn)
    pipe = Pipeline.from_folder(tiny, device="cpu")
    assert pixels(drawn[0][1]) == pixels(pipe.generate(["a red star"] * 2, steps=3, seed=5))


def test_other_sizes_and_guidance(tiny):
    ((_, wide),) = rows(tiny, "a star", "--height", 16, "--width", 24, "--seed", 0)
    assert wide[0].size == (24, 16)
    (_, weak), (_, strong) = (rows(tiny, "a star", "--seed", 0, "--guidance", g)[0] for g in (1, 8))
    assert pixels(weak) != pixels(strong)


def test_numbers_of_atoms(tiny, adapter):
    drawn = dict(rows(tiny, "a star", "--adapter", adapter, "--keep-atoms", 0, 4, "all"))
    assert list(drawn) == ["a star (0 atoms)", "a star (4 atoms)", "a star (all atoms)"]
    none, some, all_atoms = map(pixels, drawn.values())
    assert none == pixels(rows(tiny, "a star")[0][1])
    assert all_atoms == pixels(rows(tiny, "a star", "--adapter", adapter)[0][1])
    assert none != some != all_atoms != none


def test_scale_and_negative_prompt(tiny, adapter):
    (base,), (full,) = rows(tiny, "a star"), rows(tiny, "a star", "--adapter", adapter)
    none, half = (rows(tiny, "a star", "--adapter", adapter, "--scale", s)[0][1] for s in (0, 0.5))
    assert pixels(none) == pixels(base[1]) and len(set(map(tuple, map(pixels, (base[1], half, full[1]))))) == 3
    ((_, drawn),) = rows(tiny, "a star", "--negative-prompt", "a red robot")
    pipe = Pipeline.from_folder(tiny, device="cpu")
    assert pixels(drawn) == pixels(pipe.generate(["a star"] * 4, steps=3, negative_prompt="a red robot"))
    assert pixels(drawn) != pixels(base[1])


def test_several_adapters(tiny, adapter, tmp_path):
    other = write_adapter(tiny, tmp_path / "lora.safetensors", "lora", r=2)
    options = ("a star", "--seed", 0, "--adapter", adapter, other)
    both, less = (pixels(rows(tiny, *options, *more)[0][1]) for more in ((), ("--scale", 1, 0.6)))
    for scale, alone in (("1 0", adapter), ("0 1", other)):
        drawn = rows(tiny, *options, "--scale", *scale.split())
        assert drawn[0][0] == "a star (adapted)"
        assert pixels(drawn[0][1]) == pixels(rows(tiny, "a star", "--seed", 0, "--adapter", alone)[0][1])
        assert len({*pixels(drawn[0][1]), *both, *less}) == 3
    assert pixels(rows(tiny, *options, "--scale", 0)[0][1]) == pixels(rows(tiny, "a star", "--seed", 0)[0][1])


def test_densities(tiny, adapter):
    drawn = rows(tiny, "a", "b", "--adapter", adapter, "--density", 0.25, 1, "--keep-atoms", 4, "all", "--seed", 0)
    assert [label for label, _ in drawn] == [
        f"{prompt} (density {density}, {atoms} atoms)"
        for prompt in "ab"
        for density in (0.25, 1.0)
        for atoms in (4, "all")
    ]
    trained = rows(tiny, "a", "--adapter", adapter, "--seed", 0)
    assert trained[0][0] == "a (adapted)"
    assert pixels(trained[0][1]) == pixels(drawn[1][1]) != pixels(drawn[3][1])


@pytest.mark.parametrize("layout", ["sparsecode", "peft"])
def test_an_adapter_of_another_method(tiny, tmp_path, layout):
    file = write_adapter(tiny, tmp_path / "lora", "lora", layout=layout, r=2)
    drawn = rows(tiny, "a", "--adapter", file, "--seed", 0)
    assert drawn[0][0] == "a (adapted)" and pixels(drawn[0][1]) != pixels(rows(tiny, "a", "--seed", 0)[0][1])
    with pytest.raises(UserError, match="only for the sparse method"):
        rows(tiny, "a", "--adapter", file, "--keep-atoms", 1)


def test_the_command(tiny, adapter, tmp_path, capsys):
    out = tmp_path / "new" / "grid.jpg"
    sample.main(["a star", "a robot", "--weights", str(tiny), "--device", "cpu", "--adapter", str(adapter),
                 "--seed", "0", "1", "--steps", "2", "--out", str(out)])  # fmt: skip
    printed = capsys.readouterr()
    assert printed.out == f"2 rows of 2 pictures in {out}; each at full size in grid/\n" and printed.err == ""
    with Image.open(out) as grid:
        assert grid.format == "JPEG" and grid.width > 2 * 128 and grid.height > 2 * 128
    assert sorted(file.name for file in out.with_suffix("").iterdir()) == ["1-1.png", "1-2.png", "2-1.png", "2-2.png"]
    with Image.open(out.with_suffix("") / "2-2.png") as picture:
        assert picture.size == (16, 16)


def test_one_picture_has_its_own_size(tiny, tmp_path, capsys):
    out = tmp_path / "star.png"
    sample.main(["a star", "--weights", str(tiny), "--device", "cpu", "--seed", "3", "--steps", "2",
                 "--height", "64", "--width", "48", "--out", str(out)])  # fmt: skip
    assert capsys.readouterr().out == f"the picture is {out}\n"
    (expected,) = Pipeline.from_folder(tiny, device="cpu").generate(["a star"], steps=2, seed=3, height=64, width=48)
    with Image.open(out) as picture:
        assert picture.size == (48, 64) and picture.tobytes() == expected.tobytes()
    assert list(tmp_path.iterdir()) == [out]


# Arguments and words of the line that they must give.
MISTAKES = {
    "": "required: PROMPT",
    "a --out grid": "does not end like a picture",
    "a --out grid.txt": "does not end like a picture",
    "a --keep-atoms 3": "name one with --adapter",
    "a --density 0.1": "name one with --adapter",
    "a --scale 0.5": "name one with --adapter",
    "a --adapter {adapter} --scale nan": "scale=nan is not a number",
    "a --adapter {adapter} --keep-atoms 3 17": "choose a number from 0 to 16",
    "a --adapter {adapter} --keep-atoms -1": "choose a number from 0 to 16",
    "a --adapter {adapter} --keep-atoms many": "'many' is not a whole number or all",
    "a --adapter {adapter} --density 0.1 0": "density=0.0",
    "a --adapter absent.safetensors": "there is no adapter file",
    "a --adapter {adapter} {adapter} --scale 1 2 3": "there are 3 scales for 2 adapters",
    "a --adapter {adapter} --scale 1 2": "there are 2 scales for 1 adapters",
    "a --adapter {adapter} {adapter} --keep-atoms 3": "2 adapters are attached; detach them and load the one",
    "a --adapter {adapter} {adapter} --density 0.1": "2 adapters are attached",
    "a --guidance nan": "'nan' is not a finite number",
    "a --seed -1": "0 or more",
    "a --steps 0": "above 0",
    "a --steps 1000": "expected 1 to 999",
    "a --height 18": "multiple of 4",
    "a --device cuda:99": "cannot be used",
    "a --weights absent": "is not a folder",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(tiny, adapter, tmp_path, monkeypatch, arguments, mistake):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("work was done"))
    words = [word.format(adapter=adapter) for word in arguments.split()]
    assert MISTAKES[arguments] in mistake(sample, "--weights", tiny, "--device", "cpu", *words)
    assert list(tmp_path.iterdir()) == []


def test_an_adapter_of_another_base_model(adapter, tmp_path):
    import dataclasses

    other = write_pipeline(tmp_path / "other", dataclasses.replace(TRANSFORMER, num_layers=3))
    with pytest.raises(UserError, match="trained on another base model: num_layers is 2 there and 3 here"):
        rows(other, "a", "--adapter", adapter)


def test_t5_is_alone_in_memory(tiny, adapter, tmp_path, loaded):
    rows(tiny, "a robot", "--adapter", adapter, "--seed", 0, "--out", tmp_path / "sample.png")
    assert loaded.pop(0) == {"text_encoder"} and loaded
    assert all("text_encoder" not in parts for parts in loaded)
