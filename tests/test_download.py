"""The download command asks for the right files, and says in one line what went wrong; the hub is not reached."""

import subprocess
import sys
from types import SimpleNamespace

import pytest

from dit import download
from dit.pipeline import PARTS
from sparsecode.common import UserError


@pytest.fixture
def hub(monkeypatch):
    """A hub that notes (repository, file patterns, folder) of each request and can be told to fail."""
    hub = SimpleNamespace(asked=[], error=None)

    def snapshot_download(repository, allow_patterns, local_dir):
        hub.asked.append((repository, allow_patterns, local_dir))
        if hub.error:
            raise hub.error

    errors = SimpleNamespace(HfHubHTTPError=type("HfHubHTTPError", (Exception,), {}))
    monkeypatch.setitem(sys.modules, "huggingface_hub", SimpleNamespace(snapshot_download=snapshot_download))
    monkeypatch.setitem(sys.modules, "huggingface_hub.errors", errors)
    return hub


@pytest.mark.parametrize("size, name", [(256, "256x256"), (512, "512-MS"), (1024, "1024-MS")])
def test_every_part_of_a_pipeline_is_asked_for(hub, tmp_path, capsys, size, name):
    download.main(["--size", str(size), "--out", str(tmp_path)])
    (first, rest, _), (second, transformer, _) = hub.asked
    assert first == "PixArt-alpha/pixart_sigma_sdxlvae_T5_diffusers"
    assert second == f"PixArt-alpha/PixArt-Sigma-XL-2-{name}"
    assert {pattern.split("/")[0] for pattern in rest + transformer} == {*PARTS, "model_index.json"}
    assert {folder for _, _, folder in hub.asked} == {tmp_path}
    assert f"--weights {tmp_path}" in capsys.readouterr().out


def test_a_broken_download_is_one_line(hub, tmp_path):
    hub.error = OSError("no route to host\nand much more")
    with pytest.raises(UserError, match="stopped .no route to host.; run it again to go on"):
        download.main(["--out", str(tmp_path)])


def test_without_the_extra_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(UserError, match="hub"):
        download.main([])


def test_an_unknown_size_is_refused():
    refused = subprocess.run([sys.executable, "-m", "dit.download", "--size", "7"], capture_output=True, text=True)
    assert refused.returncode == 2 and "--size" in refused.stderr and len(refused.stderr.splitlines()) == 1
