"""What all commands share: streams that cannot show everything, or are closed, and weights that are not there."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from dit import cli, sample

ROOT = Path(__file__).parent.parent


def call(command, **environment):
    """A shell command with $python, from a folder where the packages can be imported."""
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "python": sys.executable, **environment}
    return subprocess.run(command, shell=True, capture_output=True, env=env)


@pytest.mark.parametrize("encoding", ["ascii", "cp1252"])
def test_what_the_terminal_cannot_show(encoding):
    result = call("$python -m dit.finetune --help", PYTHONIOENCODING=encoding)
    assert (result.returncode, result.stderr) == (0, b"") and b"the share of atoms" in result.stdout


@pytest.mark.parametrize("closed", [">&-", "2>&-", ">&- 2>&-"])
def test_closed_streams(tiny, tmp_path, closed):
    out = tmp_path / "star.png"
    result = call(f"$python -m dit.sample star --weights {tiny} --device cpu --steps 1 --seed 0 --out {out} {closed}")
    assert result.returncode == 0 and out.exists(), result.stderr


def test_the_tiny_model_is_not_installed_with_a_wheel(tmp_path, monkeypatch, mistake):
    monkeypatch.setattr(cli, "TINY", tmp_path / "weights" / "tiny")
    assert "clone the repository and run pip install" in mistake(sample, "a star", "--out", tmp_path / "x.png")


def test_an_interrupt_during_the_imports(tmp_path):
    lines = "import os, signal", "signal.signal(signal.SIGINT, signal.default_int_handler)"  # a background job's is off
    interrupt = "os.kill(os.getpid(), signal.SIGINT)", "print('went on')"
    (tmp_path / "torch.py").write_text("\n".join((*lines, *interrupt)))
    result = call("$python -m dit.sample star", PYTHONPATH=f"{tmp_path}{os.pathsep}{ROOT}")
    assert (result.returncode, result.stdout, result.stderr) == (130, b"", b"")


def test_an_interrupt(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    with pytest.raises(SystemExit) as exit:
        cli.run(interrupted)
    assert exit.value.code == 130 and capsys.readouterr().err == "interrupted\n"
