"""The training of the tiny model, a few steps of every stage, interrupted and resumed."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from dit.metrics import CLIP
from dit.pipeline import Pipeline

ROOT = Path(__file__).parent.parent


def pretrain(tmp_path, *options):
    sizes = ["--pictures", "100", "--width", "32", "--layers", "1", "--batch-size", "4", "--vae-pictures", "40"]
    steps = ["--steps", "3", "--vae-steps", "3", "--text-steps", "3", "--judge-steps", "3", "--device", "cpu"]
    steps += ["--clip-steps", "3", "--clip-pictures", "100"]
    folders = ["--out", tmp_path / "out", "--work", tmp_path / "work"]
    command = [sys.executable, "-m", "dit.pretrain", *sizes, *steps, *folders, *options]
    return subprocess.run(list(map(str, command)), cwd=ROOT, capture_output=True, text=True)


def test_every_stage_ends_in_a_pipeline_that_draws(tmp_path):
    done = pretrain(tmp_path)
    assert done.returncode == 0, done.stderr
    pipe = Pipeline.from_folder(tmp_path / "out", torch.float32, "cpu")
    assert pipe.generate(["a red star"], steps=2)[0].size == (64, 64)
    assert pipe.defaults.keys() == {"guidance", "finetune"}
    clip, star = CLIP(tmp_path / "out" / "clip"), Image.new("RGB", (80, 64), "red")
    assert clip.texts(["a red star", "a"]).shape == clip.images([star, star]).shape == (2, 64)
    again = pretrain(tmp_path)
    assert again.returncode == 2 and "--resume" in again.stderr and len(again.stderr.splitlines()) == 1
    before = (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes()
    (tmp_path / "out" / "transformer" / "config.json").unlink()  # as if killed before the last part was saved
    other = pretrain(tmp_path, "--resume", "--width", "64")
    assert other.returncode == 2 and "--width 32, not 64" in other.stderr and len(other.stderr.splitlines()) == 1
    resumed = pretrain(tmp_path, "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert (tmp_path / "out" / "transformer" / "diffusion_pytorch_model.safetensors").read_bytes() == before


@pytest.mark.parametrize("wrong", [("--width", "30"), ("--steps", "0"), ("--world", "round"), ("--lr", "-1")])
def test_a_wrong_option_is_refused_in_one_line(tmp_path, wrong):
    refused = pretrain(tmp_path, *wrong)
    assert refused.returncode == 2 and wrong[0] in refused.stderr and len(refused.stderr.splitlines()) == 1
    assert not list(tmp_path.iterdir())
