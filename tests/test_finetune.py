"""The command that fine-tunes: what it writes, resuming to the bit, equal ways to one batch, and mistakes."""

import csv
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from safetensors.torch import load_file, save_file
from tiny_pipeline import write_adapter

from dit import finetune
from dit import train as training
from dit.cli import load_pipeline
from dit.data import encode, load_images
from dit.pipeline import Pipeline
from sparsecode import keep_atoms, load_adapter, read_header, save_adapter
from sparsecode.common import UserError

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pictures")
    for i, colour in enumerate(("red", "green", "blue")):
        image = Image.new("RGB", (20 + i, 20), colour)
        image.paste("white", (3 * i, 4, 3 * i + 6, 12))
        image.save(folder / f"{i}.png")
        (folder / f"{i}.txt").write_text(f"a {colour} robot")
    return folder


@pytest.fixture
def options(tiny, pictures):
    return ["--weights", tiny, "--images", pictures, "--device", "cpu"]


def command(*arguments, runner=(sys.executable,)):
    """The command line, and where and how to run it."""
    line = [*runner, "-m", "dit.finetune", *map(str, arguments)]
    return {"args": line, "cwd": ROOT, "env": {**os.environ, "OMP_NUM_THREADS": "1"}}


def train(options, out, *more):
    finetune.main([*map(str, options), "--out", str(out), *map(str, more)])
    return load_file(out / "adapter.safetensors")


@pytest.fixture
def quick(monkeypatch):
    """No pictures and plots, for tests of the training alone."""
    monkeypatch.setattr(finetune, "plot_losses", lambda *_: None)
    monkeypatch.setattr(finetune, "draw_prompts", lambda pipe, prompts, *_: [[Image.new("RGB", (4, 4))]] * len(prompts))


def read_losses(out):
    return np.array([float(row["loss"]) for row in csv.DictReader(open(out / "training.csv"))])


def assert_close(one, other):
    """Equal up to the rounding of sums in another order, which AdamW's division enlarges where a gradient is near 0."""
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], rtol=1e-3, atol=1e-4, msg=name)


# ---- a whole run ------------------------------------------------------------------------------------------------


def test_the_command(options, tmp_path):
    result = subprocess.run(**command(*options, "--out", tmp_path / "run"), capture_output=True, text=True)
    assert (result.returncode, result.stderr) == (0, "")
    out = tmp_path / "run"
    assert result.stdout.startswith("3 pictures, the middle square leaves out 9% of 2.png\n")
    last = result.stdout.splitlines()[-1]
    assert last.startswith("trained 512 parameters beside ") and f"{out}/before_after.png" in last
    files = ["adapter.safetensors", "before_after.png", "loss.png", "pictures", "training.csv"]
    assert sorted(os.listdir(out)) == files
    header = read_header(out / "adapter.safetensors")
    assert header["prompt"] == "a red robot" and header["method"] == "sparse"
    assert header["options"] == {"target": "attn1", "atoms": 8, "threshold": "top_k", "density": 0.25,
                                 "order": "before"}  # fmt: skip
    assert header["notes"]["seed"] == 0 and header["notes"]["steps"] == 6 and header["notes"]["lr"] == 0.01
    assert header["notes"]["optimizer"] == "adamw"
    tensors = load_file(out / "adapter.safetensors")
    assert all(tensor.isfinite().all() and tensor.any() for tensor in tensors.values())  # W_s, D and usage
    rows = list(csv.reader(open(out / "training.csv")))
    assert rows[0] == ["step", "loss"] and [int(row[0]) for row in rows[1:]] == list(range(6))
    assert all(float(row[1]) > 0 for row in rows[1:])
    with Image.open(out / "loss.png") as plot, Image.open(out / "before_after.png") as pictures:
        assert plot.width > 300
        assert pictures.height > 7 * 128  # training pictures, and two rows for each of three captions
    assert len(os.listdir(out / "pictures")) == 6 * 5
    with Image.open(out / "pictures" / "6-5.png") as picture:
        assert picture.size == (16, 16)


def test_t5_and_the_autoencoder_are_gone_while_training(options, tmp_path, monkeypatch, quick):
    parts, real = [], training.train

    def load(args):
        pipe = load_pipeline(args)
        parts[:] = [weakref.ref(pipe.text_encoder), weakref.ref(pipe.vae)]
        return pipe

    def train_alone(*args):
        assert [part() for part in parts] == [None, None]
        return real(*args)

    monkeypatch.setattr(finetune, "load_pipeline", load)
    monkeypatch.setattr(training, "train", train_alone)
    train(options, tmp_path / "run")
    assert parts


def test_t5_is_alone_in_memory(options, tmp_path, loaded, quick):
    train(options, tmp_path / "run")
    assert loaded.pop(0) == {"text_encoder"} and loaded
    assert all("text_encoder" not in parts for parts in loaded)


@pytest.mark.parametrize("change", [{"beta_end": 0.012}, {"num_train_timesteps": 500}])
def test_training_follows_the_schedule_of_the_weights(tiny, pictures, options, tmp_path, quick, change):
    train(options, tmp_path / "run")
    other = shutil.copytree(tiny, tmp_path / "weights")
    file = other / "scheduler" / "scheduler_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    train(["--weights", other, "--images", pictures, "--device", "cpu"], tmp_path / "other")
    assert (read_losses(tmp_path / "run") != read_losses(tmp_path / "other")).all()


@pytest.mark.parametrize("optimizer", training.OPTIMIZERS)
def test_training_lowers_the_loss(options, tmp_path, quick, optimizer):
    options = [*options, "--optimizer", optimizer, "--lr", "0.01", "--epochs", "20"]
    train(options, tmp_path / "still", "--lr", 1e-12)
    train(options, tmp_path / "run")
    still, trained = read_losses(tmp_path / "still"), read_losses(tmp_path / "run")
    assert trained[0] == still[0]  # a fresh adapter is silent
    assert trained[-60:].mean() < 0.95 * still[-60:].mean()  # of the same visits


@pytest.mark.parametrize("more", [
    "--threshold soft --lam 0.1", "--threshold relu --lam 0", "--order after", "--target blocks.0.attn.",
    "--random-flip", "--optimizer came", "--method lora", "--method dora", "--method oft", "--prompt x --resolution 24",
    "--seed 3", "--dtype bfloat16", "--orthogonality 1",
])  # fmt: skip
def test_other_ways_to_train(options, tmp_path, quick, more):
    default = train(options, tmp_path / "default")
    other = train(options, tmp_path / "other", *more.split())
    assert all(tensor.isfinite().all() for tensor in other.values())
    same = other.keys() == default.keys() and all(torch.equal(other[name], default[name]) for name in other)
    assert not same


@pytest.mark.parametrize("schedule", [None, "constant", "inverse-square"])
def test_the_learning_rate(options, tmp_path, quick, monkeypatch, schedule):
    """Constant, as the paper's, where nothing is said; or held, and then as 1/step. The header says which."""
    rates = []

    class Recorder(torch.optim.AdamW):
        def step(self):
            rates.append(self.param_groups[0]["lr"])
            super().step()

    monkeypatch.setitem(training.OPTIMIZERS, "adamw", Recorder)
    monkeypatch.setattr(training, "HOLD", 26)
    more = ["--lr-schedule", schedule] if schedule else []
    train(options, tmp_path / "run", "--lr", 0.03, "--epochs", 5, "--repeats", 2, *more)  # 30 steps
    falling = [0.03 * (26 / step) ** 2 for step in (27, 28, 29, 30)] if schedule == "inverse-square" else [0.03] * 4
    assert rates == pytest.approx([0.03] * 26 + falling)
    notes = read_header(tmp_path / "run" / "adapter.safetensors")["notes"]
    assert notes["lr_schedule"] == (schedule or "constant")


def test_the_orthogonality_penalty(options, tmp_path, quick):
    """Atoms that are less alike; the loss that is logged is without the penalty; a weight of 0 is none, to the bit."""
    runs = {w: train([*options, "--epochs", 5], tmp_path / w, "--orthogonality", w) for w in ("0", "1")}
    plain = train([*options, "--epochs", 5], tmp_path / "plain")
    assert all(torch.equal(runs["0"][name], plain[name]) for name in plain)
    assert read_losses(tmp_path / "1")[0] == read_losses(tmp_path / "plain")[0]
    assert read_losses(tmp_path / "1")[1] == pytest.approx(read_losses(tmp_path / "plain")[1], rel=0.05)

    def alike(tensors):
        units = [F.normalize(D, dim=1) for name, D in tensors.items() if name.endswith(".D")]
        return sum(((D @ D.T) ** 2).sum() - len(D) for D in units).item()

    assert alike(runs["1"]) < 0.5 * alike(plain)


def test_lr_of_each_optimizer(options, tmp_path, quick):
    """The model's own is AdamW's: on the shipped model CAME would only do harm with it. CAME takes the paper's."""
    for optimizer, lr in {"adamw": 0.01, "came": 1e-4}.items():
        train(options, tmp_path / optimizer, "--optimizer", optimizer)
        notes = read_header(tmp_path / optimizer / "adapter.safetensors")["notes"]
        assert (notes["optimizer"], notes["lr"]) == (optimizer, lr)


def test_an_epoch_visits_each_picture_as_often_as_the_others():
    order = training.visiting_order(3, epochs=4, repeats=5, seed=0)
    for epoch in order.reshape(4, 15):
        assert np.bincount(epoch).tolist() == [5, 5, 5]
    assert len({tuple(epoch) for epoch in order.reshape(4, 15)}) == 4


# ---- the same batch in other ways -------------------------------------------------------------------------------


@pytest.fixture
def reference(options, tmp_path, quick):
    """Six steps of two visits, as the others here take them."""
    options += ["--random-flip", "--epochs", "2", "--prompt", "a robot"]
    return train(options, tmp_path / "reference", "--batch-size", 2)


@pytest.mark.parametrize(
    "more", ["--batch-size 1 --gradient-accumulation 2", "--batch-size 2 --gradient-checkpointing"]
)
def test_less_memory_gives_the_same(options, tmp_path, quick, reference, more):
    assert_close(train(options, tmp_path / "run", *more.split()), reference)


def test_two_processes_give_the_same(options, tmp_path, reference):
    out = tmp_path / "run"
    runner = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2")
    result = subprocess.run(**command(*options, "--out", out, runner=runner), capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("trained 512 parameters") == 1 and result.stdout.count("\n") == 2
    assert_close(load_file(out / "adapter.safetensors"), reference)
    np.testing.assert_allclose(read_losses(out), read_losses(tmp_path / "reference"), rtol=1e-4)


# ---- training that begins with a file ----------------------------------------------------------------------------


@pytest.fixture
def robot(tiny, tmp_path):
    return write_adapter(tiny, tmp_path / "robot.safetensors", atoms=4, density=0.5)


def first_loss(tiny, pictures, adapter, seed=0):
    """Of the first step: the noise of one picture, predicted by the model with the adapter of the file."""
    pipe = Pipeline.from_folder(tiny, device="cpu")
    files = sorted(pictures.glob("*.png"))
    data = encode(pipe, load_images(files, 16), [file.with_suffix(".txt").read_text() for file in files])
    load_adapter(pipe.transformer, adapter)
    order = training.visiting_order(len(files), 1, 2, seed)
    with torch.no_grad():
        return training.training_loss(pipe, data, order, [0], seed).item()


def test_training_begins_with_the_adapters_of_a_file(tiny, pictures, options, tmp_path, quick, robot):
    """With steps too short to change a float32 the file comes out as it went in, but for the use of the atoms."""
    still = train(options, tmp_path / "still", "--from", robot, "--lr", 1e-12)
    start = load_file(robot)
    assert still.keys() == start.keys()
    assert all(torch.equal(still[name], start[name]) for name in start if not name.endswith(".usage"))
    moved = train(options, tmp_path / "run", "--from", robot)
    assert all(0 < (moved[name] - start[name]).abs().max() < 0.1 for name in start if not name.endswith(".usage"))
    expected = first_loss(tiny, pictures, robot)
    assert read_losses(tmp_path / "run")[0] == read_losses(tmp_path / "still")[0] == pytest.approx(expected, abs=1e-6)
    train(options, tmp_path / "fresh")
    assert read_losses(tmp_path / "fresh")[0] != read_losses(tmp_path / "run")[0]
    header = read_header(tmp_path / "run" / "adapter.safetensors")
    assert header["options"] == read_header(robot)["options"] and header["prompt"] == "a red robot"
    assert header["notes"]["start"] == str(robot) and header["notes"]["seed"] == 0


@pytest.mark.parametrize("method, layout", [("lora", "sparsecode"), ("dora", "peft"), ("oft", "peft")])
def test_training_begins_with_other_methods_and_peft(tiny, pictures, options, tmp_path, quick, method, layout):
    file = write_adapter(tiny, tmp_path / "start", method, layout=layout, **({} if method == "oft" else {"r": 2}))
    train(options, tmp_path / "run", "--from", file)
    assert read_losses(tmp_path / "run")[0] == pytest.approx(first_loss(tiny, pictures, file), abs=1e-6)
    assert read_header(tmp_path / "run" / "adapter.safetensors")["method"] == method
    assert finetune.parse(["--images", "x/robot", "--from", str(file)]).out == Path(f"runs/robot-{method}")


def test_only_the_atoms_that_a_file_kept_are_trained_on(tiny, options, tmp_path, quick, robot):
    pipe = Pipeline.from_folder(tiny, device="cpu")
    load_adapter(pipe.transformer, robot)
    keep_atoms(pipe.transformer, 3)
    save_adapter(pipe.transformer, few := tmp_path / "few.safetensors")
    trained, start = train(options, tmp_path / "run", "--from", few), load_file(few)
    for name in start:
        assert trained[name].shape == start[name].shape
        assert torch.equal(trained[name], start[name]) == name.endswith(".keep") or not start[name].numel()


def test_before_and_after_of_a_run_that_began_with_a_file(tiny, options, tmp_path, robot):
    """Before are the pictures of that file, not those of the base model."""
    train(options, tmp_path / "run", "--from", robot, "--lr", 1e-12)
    rows = [sorted((tmp_path / "run" / "pictures").glob(f"{row}-*.png")) for row in (1, 2)]
    assert all(before.read_bytes() == after.read_bytes() for before, after in zip(*rows)) and len(rows[0]) == 5
    pipe = Pipeline.from_folder(tiny, device="cpu")
    load_adapter(pipe.transformer, robot)
    picture = pipe.generate(["a red robot"], seed=0)[0]
    with Image.open(rows[0][0]) as drawn:
        assert drawn.tobytes() == picture.tobytes()


def test_a_run_that_began_with_a_file_goes_on_with_it_alone(options, tmp_path, monkeypatch, quick, robot):
    options = [*options, "--checkpoint-every", "2"]
    undisturbed = train(options, tmp_path / "undisturbed", "--from", robot)
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_adapter", die)
        with pytest.raises(Killed):
            train(options, tmp_path / "run", "--from", robot)
    with pytest.raises(UserError, match="belongs to a run with "):
        train(options, tmp_path / "run", "--resume")
    with pytest.raises(UserError, match="belongs to a run with --from checksum [0-9]+, not checksum"):
        train(options, tmp_path / "run", "--resume", "--from", tmp_path / "undisturbed" / "adapter.safetensors")
    moved = shutil.move(robot, tmp_path / "moved.safetensors")
    resumed = train(options, tmp_path / "run", "--resume", "--from", moved)
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


@pytest.mark.parametrize("more, message", [
    ("--method lora", "decides method already; leave it out"), ("--method sparse", "decides method"),
    ("--atoms 4 --density 0.5", "decides atoms, density"), ("--target attn1", "decides target"),
    ("--from absent.safetensors", "there is no adapter file absent"), ("--from=", "holds no adapter_config.json"),
])  # fmt: skip
def test_what_a_file_to_start_from_decides(options, tmp_path, mistake, robot, more, message):
    assert message in mistake(finetune, *options, "--out", tmp_path / "run", "--from", robot, *more.split())
    assert not (tmp_path / "run").exists()


# ---- stopped and resumed ----------------------------------------------------------------------------------------


class Killed(BaseException):
    pass


def die(*_, **__):
    raise Killed


@pytest.mark.parametrize("moment, optimizer", [
    ("no checkpoint", "adamw"), ("a checkpoint", "adamw"), ("between checkpoints", "adamw"), ("plot_losses", "adamw"),
    ("draw_prompts", "adamw"), ("between checkpoints", "came"),
])  # fmt: skip
def test_a_killed_run_goes_on_to_the_same_adapter(options, tmp_path, monkeypatch, quick, moment, optimizer):
    options = [*options, "--optimizer", optimizer, "--checkpoint-every", "2"]  # of 6 steps
    undisturbed = train(options, tmp_path / "undisturbed")
    out, real = tmp_path / "run", training.training_loss
    steps = {"no checkpoint": 1, "a checkpoint": 3, "between checkpoints": 4}

    def dying_loss(pipe, data, order, visits, seed):
        return die() if visits[0] == steps[moment] else real(pipe, data, order, visits, seed)

    with monkeypatch.context() as patch:
        patch.setattr(*((training, "training_loss", dying_loss) if moment in steps else (finetune, moment, die)))
        with pytest.raises(Killed):
            train(options, out)
    if (out / "checkpoint.pt").exists():
        (out / ".99999999.checkpoint.pt").write_bytes(b"half")  # as a kill while writing leaves it
        with pytest.raises(UserError, match="add --resume"):
            train(options, out)
    resumed = train(options, out, "--resume")
    assert resumed.keys() == undisturbed.keys()
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)
    assert read_header(out / "adapter.safetensors") == read_header(tmp_path / "undisturbed" / "adapter.safetensors")
    assert (out / "training.csv").read_text() == (tmp_path / "undisturbed" / "training.csv").read_text()
    assert sorted(os.listdir(out)) == ["adapter.safetensors", "before_after.png", "pictures", "training.csv"]
    with pytest.raises(UserError, match="finished run"):
        train(options, out, "--resume")


def test_sigkill(options, tmp_path, quick):
    options = [*options, "--epochs", "20", "--checkpoint-every", "7"]
    undisturbed = train(options, tmp_path / "undisturbed")
    out = tmp_path / "run"
    process = subprocess.Popen(**command(*options, "--out", out))
    while not (out / "checkpoint.pt").exists() and process.poll() is None:
        time.sleep(0.01)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    resumed = train(options, out, "--resume")
    assert all(torch.equal(resumed[name], undisturbed[name]) for name in undisturbed)


@pytest.fixture
def stopped(options, tmp_path, monkeypatch, quick):
    with monkeypatch.context() as patch:
        patch.setattr(training, "save_adapter", die)
        with pytest.raises(Killed):
            train(options, tmp_path / "stopped")
    return tmp_path / "stopped"


@pytest.mark.parametrize("more, name", [("--lr 0.02", "--lr"), ("--density 0.5", "--density"), ("--seed 1", "--seed"),
                                        ("--optimizer came", "--optimizer"),
                                        ("--method lora", "--method"), ("--prompt x", "--images")])  # fmt: skip
def test_changed_settings_are_not_resumed(options, stopped, more, name):
    with pytest.raises(UserError, match=f"belongs to a run with {name} "):
        train(options, stopped, "--resume", *more.split())
    assert os.listdir(stopped) == ["checkpoint.pt"]


def test_what_may_change_when_a_run_goes_on(options, stopped):
    train(options, stopped, "--resume", "--atoms", 8, "--checkpoint-every", 1, "--validation-prompt", "a star")


def losses_cut(state):
    state["losses"].pop()


def losses_not_numbers(state):
    state["losses"][0] = float("nan")


def an_adapter_lost(state):
    state["adapters"].popitem()


@pytest.mark.parametrize("damage", [None, losses_cut, losses_not_numbers, an_adapter_lost])
def test_a_damaged_checkpoint(options, stopped, damage):
    file = stopped / "checkpoint.pt"
    state = torch.load(file, weights_only=True)
    if damage:
        damage(state)
        torch.save(state, file)
    else:
        file.write_bytes(b"nothing")
    with pytest.raises(UserError, match="cannot be read as a checkpoint|does not fit the adapters"):
        train(options, stopped, "--resume")
    assert os.listdir(stopped) == ["checkpoint.pt"]


def test_moved_weights_are_known_and_changed_ones_too(tiny, pictures, options, stopped, tmp_path):
    """A run knows its weights by their content, not by their path."""
    moved = shutil.copytree(tiny, tmp_path / "moved")
    changed = shutil.copytree(tiny, tmp_path / "changed")
    file = changed / "transformer" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["proj_out.bias"][0] += 0.01
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(UserError, match="belongs to a run with --weights "):
        train([*options, "--weights", changed], stopped, "--resume")
    train([*options, "--weights", moved], stopped, "--resume")


# ---- two runs, a full disk, the GPU ------------------------------------------------------------------------------


def test_two_runs_in_one_folder(options, tmp_path, quick, monkeypatch, mistake):
    out, real = tmp_path / "run", training.fit

    def meanwhile(*args):
        result = subprocess.run(**command(*options, "--out", out, "--resume"), capture_output=True, text=True)
        assert result.returncode == 2 and f"another run is writing to {out}" in result.stderr, result.stderr
        return real(*args)

    monkeypatch.setattr(finetune, "fit", meanwhile)
    train(options, out)


def test_the_default_out_says_the_method():
    assert finetune.parse(["--images", "x/robot"]).out == Path("runs/robot")
    assert finetune.parse(["--images", "x/robot", "--method", "oft"]).out == Path("runs/robot-oft")


@pytest.mark.parametrize("error", [RuntimeError("[enforce fail at inline_container.cc]"), OSError(28, "No space left")])
def test_a_checkpoint_that_does_not_fit_on_the_disk(options, tmp_path, quick, monkeypatch, mistake, error):
    """The line names the file, and the earlier checkpoint stays as it was."""
    out, real, saved = tmp_path / "run", torch.save, []

    def save(state, file):
        if saved:
            file.write(b"half")
            raise error
        saved.append(state["step"])
        real(state, file)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", save)
        line = mistake(finetune, *options, "--out", out, "--checkpoint-every", 2)
    assert f"{out}/checkpoint.pt cannot be written" in line
    assert os.listdir(out) == ["checkpoint.pt"]
    assert torch.load(out / "checkpoint.pt", weights_only=True)["step"] == saved[0] == 2


def test_a_full_gpu_is_one_line(options, tmp_path, quick, monkeypatch, mistake):
    def full(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 24 GiB")

    monkeypatch.setattr(training, "training_loss", full)
    line = mistake(finetune, *options, "--out", tmp_path / "run")
    assert "Tried to allocate 2.00 GiB" in line and "--gradient-checkpointing" in line and "--batch-size" in line


def test_no_samples(options, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Pipeline, "generate", lambda *_, **__: pytest.fail("drawn"))
    train(options, tmp_path / "run", "--samples", 0)
    assert sorted(os.listdir(tmp_path / "run")) == ["adapter.safetensors", "loss.png", "training.csv"]
    assert capsys.readouterr().out.endswith("loss.png\n")


def test_an_error_of_one_process_is_told_once(options, tmp_path):
    """Rank 1 alone meets it: torchrun's own words aside, one line says what it was."""
    script = tmp_path / "run.py"
    script.write_text("""
from dit import finetune, parallel, train
from dit.cli import run
from sparsecode.common import UserError
real = train.training_loss
def broken(*args):
    if parallel.rank() == 1:
        raise UserError("the second process is unwell")
    return real(*args)
train.training_loss = broken
run(finetune.main)
""")
    runner = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", script]
    line = command(*options, "--out", tmp_path / "out")
    line["args"] = [*map(str, runner), *line["args"][3:]]
    line["env"]["PYTHONPATH"] = str(ROOT)
    result = subprocess.run(**line, capture_output=True, text=True)
    assert result.returncode != 0
    assert result.stderr.count("error: the second process is unwell") == 1
    assert result.stderr.count("Traceback") == 1  # torchrun's own


# ---- mistakes ---------------------------------------------------------------------------------------------------

# Arguments (after good ones, which they override) and words of the line that they must give.
MISTAKES = {
    "--images {tmp}": "holds no pictures",
    "--images {tmp}/absent": "there is no picture or folder",
    "--images {tmp}/text.png --prompt x": "cannot be read as a picture",
    "--images {tmp}/dot.png --prompt x": "1×1 pixels",
    "--images {tmp}/bare.png": "has no caption",
    "--images {tmp}/latin.png": "is not UTF-8",
    "--prompt=": "is empty",
    "--prompt \udcff": "invalid unicode value",
    "--weights {tmp}/absent": "is not a folder",
    "--weights {tmp}": "has no folder transformer/",
    "--device cuda:99": "cannot be used",
    "--device meta": "cannot be used",
    "--device sofa": "cannot be used",
    "--text-device sofa": "--text-device sofa cannot be used",
    "--dtype int8": "invalid choice",
    "--method magic": "invalid choice",
    "--optimizer sgd": "invalid choice",
    "--atoms 7": "does not split over 2 heads",
    "--atoms 0": "does not split over 2 heads",
    "--density 0": "density=0.0",
    "--density 1.5": "density=1.5",
    "--atoms 1000000000000000": "fewer --atoms",
    "--density nan": "density=nan",
    "--target nothing": "no attention is named like",
    "--target (": "is no regular expression",
    "--threshold soft": "give a lam",
    "--lam 0.1": "lam=0.1 has no meaning for top_k",
    "--threshold soft --lam 0.1 --density 0.1": "does not use a density but lam",
    "--method lora --atoms 8": "lora has no option atoms; it has r, alpha",
    "--method oft --threshold top_k": "oft has no option threshold",
    "--resolution 18": "not a multiple of 4",
    "--resolution 0": "above 0",
    "--epochs 0": "above 0",
    "--batch-size -1": "above 0",
    "--lr 0": "above 0",
    "--lr inf": "above 0",
    "--seed -1": "0 or more",
    "--orthogonality -1": "0 or more",
    "--orthogonality inf": "0 or more",
    "--method lora --orthogonality 1": "lora has no atoms",
    "--unknown": "unrecognized",
    "--samples -1": "a number from 0 to 100",
    "--out {tmp}/" + "x" * 250: "longer than 200 bytes",
}


@pytest.fixture
def bad_pictures(tmp_path):
    folder = tmp_path / "bad"
    folder.mkdir()
    Image.new("RGB", (20, 20)).save(folder / "bare.png")
    Image.new("RGB", (20, 20)).save(folder / "latin.png")
    (folder / "latin.txt").write_bytes(b"K\xe4fer")
    Image.new("RGB", (1, 1)).save(folder / "dot.png")
    (folder / "text.png").write_text("no picture")
    return folder


@pytest.mark.parametrize("arguments", MISTAKES)
def test_mistakes(options, bad_pictures, tmp_path, monkeypatch, arguments, mistake):
    monkeypatch.chdir(tmp_path)
    folder = tmp_path if arguments in ("--images {tmp}", "--weights {tmp}") else bad_pictures
    more = [word.format(tmp=folder) for word in arguments.split()]
    before = sorted(tmp_path.rglob("*.*"))
    assert MISTAKES[arguments] in mistake(finetune, *options, "--out", tmp_path / "run", *more)
    assert sorted(tmp_path.rglob("*.*")) == before


def test_a_mistake_in_the_real_command(options, tmp_path):
    result = subprocess.run(
        **command(*options, "--out", tmp_path / "run", "--atoms", 7), capture_output=True, text=True
    )
    assert (result.returncode, result.stdout) == (2, "")
    assert result.stderr == "error: atoms=7 does not split over 2 heads; choose a multiple of 2\n"
    assert not (tmp_path / "run").exists()


def test_an_out_that_is_not_free(options, tmp_path, mistake):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.doc").write_text("mine")
    assert "not a folder" in mistake(finetune, *options, "--out", tmp_path / "file")
    assert "not a folder" in mistake(finetune, *options, "--out", tmp_path / "file" / "run")
    assert "thesis.doc" in mistake(finetune, *options, "--out", tmp_path / "full")
    assert "thesis.doc" in mistake(finetune, *options, "--out", tmp_path / "full", "--resume")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"] and os.listdir(tmp_path / "full") == ["thesis.doc"]


def test_a_full_disk(options, tmp_path, quick, mistake):
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, limits[1]))  # no file may grow above 4 kB
    try:
        mistake(finetune, *options, "--out", tmp_path / "run")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert os.listdir(tmp_path / "run") == []


def test_a_loss_that_is_no_number_keeps_the_last_good_checkpoint(options, tmp_path, monkeypatch, quick):
    out, real = tmp_path / "run", training.training_loss

    def broken(pipe, data, order, visits, seed):
        return real(pipe, data, order, visits, seed) * (float("nan") if visits[0] == 5 else 1)

    options = [*options, "--checkpoint-every", "2"]
    with monkeypatch.context() as patch:
        patch.setattr(training, "training_loss", broken)
        with pytest.raises(UserError, match="the loss became nan at step 5; .*checkpoint.pt keeps an earlier step"):
            train(options, out)
    assert os.listdir(out) == ["checkpoint.pt"]
    state = torch.load(out / "checkpoint.pt", weights_only=True)
    assert len(state["losses"]) == 4
    train(options, out, "--resume")
