"""The training of the tiny model: a few steps of every stage, by two processes, interrupted and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit.metrics import CLIP
from dit.pipeline import Pipeline
from dit.tiny import pretrain

ROOT = Path(__file__).parent.parent
SIZES = "--pictures 100 --width 32 --layers 1 --batch-size 4 --vae-pictures 40 --clip-pictures 100 --device cpu".split()
STEPS = ["--steps", "--vae-steps", "--text-steps", "--judge-steps", "--clip-steps"]


@pytest.fixture
def options(tmp_path):
    steps = [word for name in STEPS for word in (name, "3")]
    return [*SIZES, *steps, "--out", str(tmp_path / "out"), "--work", str(tmp_path / "work")]


def test_every_stage_ends_in_a_pipeline_that_draws_with_two_processes(options, tmp_path, capsys, mistake):
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m"]
    subprocess.run([*two, "dit.tiny.pretrain", *options], check=True, cwd=ROOT, capture_output=True, timeout=300)
    pipe = Pipeline.from_folder(tmp_path / "out", torch.float32, "cpu")
    assert pipe.generate(["a fox"], steps=2)[0].size == (64, 64)
    assert pipe.defaults.keys() == {"guidance", "finetune"}
    clip, star = CLIP(tmp_path / "out" / "clip"), Image.new("RGB", (80, 64), "red")
    assert clip.texts(["a red star", "a"]).shape == clip.images([star, star]).shape == (2, 64)
    capsys.readouterr()
    assert "--resume" in mistake(pretrain, *options)
    before = (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "out" / "transformer" / "config.json").unlink()  # as if killed before the last part was saved
    other = mistake(pretrain, *options, "--resume", "--width", "64")
    assert "--width 32, not 64" in other
    pretrain.main([*options, "--resume"])
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("wrong", [("--width", "30"), ("--steps", "0"), ("--layers", "round"), ("--lr", "-1")])
def test_a_wrong_option_is_refused_in_one_line(options, tmp_path, wrong, mistake):
    assert wrong[0] in mistake(pretrain, *options, *wrong)
    assert not list(tmp_path.iterdir())
