"""The command that edits: it trains as dit.finetune does and draws as dit.sample does."""

import os

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from dit import edit, finetune, sample
from dit import train as training
from dit.pipeline import Pipeline
from dit.train import TrainConfig, teach
from sparsecode import adapters, read_header
from sparsecode.common import UserError


@pytest.fixture(scope="module")
def photo(tmp_path_factory):
    file = tmp_path_factory.mktemp("photo") / "robot.png"
    image = Image.new("RGB", (20, 20), "orange")
    image.paste("blue", (3, 4, 9, 12))
    image.save(file)
    file.with_suffix(".txt").write_text("a robot")
    return file


@pytest.fixture
def options(tiny, photo):
    return ["--weights", tiny, "--device", "cpu", "--image", photo, "--steps", 2, "--seed", 0, 5, "--epochs", 1,
            "--edit", "a red robot", "a star", "--density", 0.5, "--keep-atoms", 3, 9]  # fmt: skip


@pytest.fixture(scope="module")
def pipe(tiny):
    return Pipeline.from_folder(tiny, device="cpu")


def call(options, *more):
    edit.main([*map(str, options), *map(str, more)])


# ---- the command ------------------------------------------------------------------------------------------------


def test_the_command(options, tmp_path, capsys, monkeypatch):
    out = tmp_path / "new" / "run"
    call(options, "--out", out)
    printed = capsys.readouterr()
    assert printed.out.startswith(f"6 rows in {out}/edit.png: ") and printed.out.count("\n") == 1 and not printed.err
    assert sorted(os.listdir(out)) == ["edit.png", "lora.safetensors", "pictures", "sparse.safetensors"]
    for method in ("lora", "sparse"):
        header = read_header(out / f"{method}.safetensors")
        assert (header["method"], header["prompt"], header["notes"]["steps"]) == (method, "a robot", 2)
    with Image.open(out / "edit.png") as first:
        assert first.width > 6 * 100 and first.height > 7 * 100  # two seeds of three prompts, seven rows
        before = first.tobytes()

    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("trained again"))
    call(options, "--out", out)
    with Image.open(out / "edit.png") as again:
        assert again.tobytes() == before
    call(options, "--out", out, "--edit", "on a red background", "--density", "--keep-atoms")
    assert capsys.readouterr().out.splitlines()[-1].startswith("3 rows")


def test_t5_is_alone_in_memory(options, tmp_path, loaded):
    call(options, "--out", tmp_path, "--density", "--keep-atoms")
    assert loaded.pop(0) == {"text_encoder"} and loaded
    assert all("text_encoder" not in parts for parts in loaded)


def test_an_out_that_holds_something_else(options, tmp_path):
    call(options, "--out", tmp_path, "--density", "--keep-atoms")
    for other in (["--epochs", 2], ["--prompt", "a heart"]):
        with pytest.raises(UserError, match="lora.safetensors was trained on other pictures or with other settings"):
            call(options, "--out", tmp_path, *other)
    (tmp_path / "thesis.doc").write_text("mine")
    with pytest.raises(UserError, match="thesis.doc"):
        call(options, "--out", tmp_path)


@pytest.mark.parametrize("method", edit.METHODS)
def test_teaches_what_finetune_teaches(pipe, tiny, photo, tmp_path, monkeypatch, method):
    monkeypatch.setattr(finetune, "plot_losses", lambda *_: None)
    monkeypatch.setattr(finetune, "draw_prompts", lambda *_: [[Image.new("RGB", (4, 4))]])
    config = TrainConfig.of(pipe, method=method, epochs=3)
    teach(pipe, [photo], ["a robot"], tmp_path / "ours.safetensors", config)
    finetune.main(["--weights", str(tiny), "--device", "cpu", "--images", str(photo), "--method", method,
                   "--epochs", "3", "--out", str(tmp_path / "run")])  # fmt: skip
    ours, theirs = (load_file(tmp_path / file) for file in ("ours.safetensors", "run/adapter.safetensors"))
    assert ours.keys() == theirs.keys() and all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert not adapters(pipe.transformer)


def test_options_of_the_method_and_the_learning_rate_arrive(pipe, photo, tmp_path):
    config = TrainConfig.of(pipe, method="lora", epochs=1, lr=0.5, r=1, alpha=1)
    teach(pipe, [photo], ["a robot"], tmp_path / "a.safetensors", config)
    header = read_header(tmp_path / "a.safetensors")
    assert header["options"] == {"target": "attn1", "r": 1, "alpha": 1} and header["notes"]["lr"] == 0.5


def test_the_papers_sixty_epochs_unless_the_model_says_otherwise(pipe, photo, monkeypatch):
    args = edit.parse(["--image", str(photo), "--edit", "x", "--keep-atoms", "0"])
    assert edit.configs(pipe, args)["sparse"].epochs == 1  # its defaults.json
    monkeypatch.setattr(pipe, "defaults", {})
    config = edit.configs(pipe, args)["sparse"]
    assert (config.epochs, config.lr, config.options) == (60, 1e-4, {"atoms": 256, "density": 0.02})


def test_a_killed_training_goes_on_to_the_same_adapter(pipe, photo, tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def die(*_, **__):
        raise Killed

    undisturbed, file = tmp_path / "undisturbed.safetensors", tmp_path / "run.safetensors"
    config = TrainConfig.of(pipe, epochs=3)
    teach(pipe, [photo], ["a robot"], undisturbed, config)
    with monkeypatch.context() as patch:
        patch.setattr(training, "measure_usage", die)
        with pytest.raises(Killed):
            teach(Pipeline.from_folder(pipe.folder, device="cpu"), [photo], ["a robot"], file, config)
    assert file.with_suffix(".pt").exists() and not file.exists()
    monkeypatch.setattr(training, "training_loss", die)  # all steps were done
    teach(pipe, [photo], ["a robot"], file, config)
    one, other = load_file(undisturbed), load_file(file)
    assert all(torch.equal(one[name], other[name]) for name in one) and not file.with_suffix(".pt").exists()


def test_draws_what_sample_draws(pipe, tiny, photo, tmp_path):
    file, prompts = tmp_path / "a.safetensors", ["a robot", "a star"]
    teach(pipe, [photo], ["a robot"], file, TrainConfig.of(pipe, epochs=5))
    noise = pipe.noise([0, 5])
    choice = {"density": [0.5, 1.0], "keep_atoms": [0, 4]}
    drawn = dict(edit.draw(pipe, prompts, noise, "x", file, **choice, steps=2))
    drawn |= dict(edit.draw(pipe, prompts, noise, "sparse", file, steps=2))
    drawn |= dict(edit.draw(pipe, prompts, noise, "scaled", file, scale=0.5, steps=2))
    drawn |= dict(edit.draw(pipe, prompts, noise, "base", steps=2))
    labels = [f"x, density {d}, {n} atoms" for d in (0.5, 1.0) for n in (0, 4)]
    assert list(drawn) == [*labels, "sparse", "scaled", "base"]
    assert not adapters(pipe.transformer)

    def reference(*words):
        args = sample.parse([*prompts, "--weights", str(tiny), "--device", "cpu", "--steps", "2", "--seed", "0", "5",
                             *map(str, words)])  # fmt: skip
        return [[image.tobytes() for image in images] for _, images in sample.sample(sample.load_pipeline(args), args)]

    def pixels(label):
        return [[image.tobytes() for image in drawn[label][prompt]] for prompt in prompts]

    assert pixels("x, density 1.0, 4 atoms") == reference("--adapter", file, "--density", 1, "--keep-atoms", 4)
    assert pixels("sparse") == reference("--adapter", file)
    assert pixels("scaled") == reference("--adapter", file, "--scale", 0.5) != pixels("sparse")
    assert pixels("base") == reference() == pixels("x, density 0.5, 0 atoms") != pixels("sparse")


# Arguments (after good ones, which they override) and words of the line that they must give.
MISTAKES = {
    "--image {tmp}/absent.png": "absent.png cannot be read as a picture (there is no such file)",
    "--image {tmp}": "cannot be read as a picture (there is no such file)",
    "--image {tmp}/bare.png": "has no caption",
    "--prompt=": "is empty",
    "--density 0.1 2": "density=2.0",
    "--keep-atoms 17": "choose a number from 0 to 16",
    "--keep-atoms some": "'some' is not a whole number or all",
    "--scale inf": "scale=inf is not a number",
    "--guidance inf": "'inf' is not a finite number",
    "--seed -1": "0 or more",
    "--steps 1000": "expected 1 to 999",
    "--epochs 0": "above 0",
    "--weights {tmp}": "has no folder transformer/",
    "--out {tmp}": "holds other files (bare.png)",
    "--out {tmp}/bare.png": "is not a folder you can write to",
}


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(options, tmp_path, monkeypatch, arguments, mistake):
    Image.new("RGB", (20, 20)).save(tmp_path / "bare.png")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(training, "train", lambda *_: pytest.fail("work was done"))
    words = [word.format(tmp=tmp_path) for word in arguments.split()]
    out = [] if "--out" in arguments else ["--out", tmp_path / "run"]
    assert MISTAKES[arguments] in mistake(edit, *options, *out, *words)
    assert os.listdir(tmp_path) == ["bare.png"]


def test_a_picture_named_like_an_option(options, photo, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for suffix in (".png", ".txt"):
        (tmp_path / f"-dog{suffix}").write_bytes(photo.with_suffix(suffix).read_bytes())
    more = ["--density", "--keep-atoms"]
    for i, image in enumerate((["--image=-dog.png"], ["--image", "./-dog.png"])):
        call([*options, *more], *image, "--out", tmp_path / f"{i}")
        assert (tmp_path / f"{i}" / "edit.png").exists()


def test_prompts_are_no_formulas(options, tmp_path):
    call(options, "--out", tmp_path, "--prompt", r"a $\foo$ robot", "--edit", "$_$", "--density", "--keep-atoms")
    assert (tmp_path / "edit.png").exists()


def test_leftovers_of_a_killed_run_are_swept(options, tmp_path):
    (tmp_path / ".99999999.lora.pt").write_bytes(b"half")
    call(options, "--out", tmp_path, "--density", "--keep-atoms")
    assert not list(tmp_path.glob(".*"))
