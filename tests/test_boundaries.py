"""Imports point one way: sparsecode knows nothing of dit, lessons define nothing, and no library needs a test tool."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
TEST_TOOLS = {"diffusers", "transformers", "peft", "pytest", "sklearn", "vendi_score"}


def imported(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        if isinstance(node, ast.ImportFrom) and not node.level:
            yield node.module.split(".")[0]


def names(file):
    for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom):
            yield from (alias.name for alias in node.names)


@pytest.mark.parametrize("file", sorted(ROOT.glob("sparsecode/*.py")), ids=lambda f: f.name)
def test_sparsecode_knows_nothing_of_pictures(file):
    assert not set(imported(file)) & ({"dit", "PIL", "matplotlib"} | TEST_TOOLS)


@pytest.mark.parametrize("file", sorted(ROOT.glob("dit/**/*.py")), ids=lambda f: f.name)
def test_dit_needs_no_reference_library(file):
    """CLIP alone, which measures and is no part of the model, is transformers'."""
    allowed = {"transformers"} if file.name in ("metrics.py", "clip.py") else set()
    assert not set(imported(file)) & ({"lessons"} | TEST_TOOLS) - allowed


@pytest.mark.parametrize("file", sorted(ROOT.glob("dit/*.py")), ids=lambda f: f.name)
def test_only_the_tiny_model_knows_its_world(file):
    assert "dit.tiny" not in file.read_text(encoding="utf-8").replace("python -m dit.tiny", "")


def test_only_checkpoint_opens_weights_of_models():
    """The judge, of our own making, and training checkpoints are no released weights."""
    readers = {f.name for f in ROOT.glob("dit/**/*.py") if {"safe_open", "load_file"} & set(names(f))}
    assert readers == {"checkpoint.py", "judge.py"}


def test_importing_dit_is_quick():
    code = "import sys, dit; assert 'torch' not in sys.modules; from dit import *; print(load_vae, Pipeline)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0 and "load_vae" in done.stdout, done.stderr
