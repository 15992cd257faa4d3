"""Files that are never half-written, folders for one run at a time, and JSON that is checked before it is used."""

import errno
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from sparsecode import UserError, common, replacing
from sparsecode.common import (
    COUNT,
    FLAG,
    NUMBER,
    OBJECT,
    POSITIVE,
    TEXT,
    checksum,
    is_number,
    is_whole,
    list_of,
    locked,
    object_of,
    read_json,
    remove_leftovers,
    write_tensors,
)

# ---- replacing --------------------------------------------------------------------------------------------------


def test_replacing_renames_on_success(tmp_path):
    with replacing(tmp_path / "folder" / "a.png") as temporary:
        assert temporary.suffix == ".png" and temporary.parent == tmp_path / "folder"
        temporary.write_text("new")
        assert not (tmp_path / "folder" / "a.png").exists()
    assert [(p.name, p.read_text()) for p in (tmp_path / "folder").iterdir()] == [("a.png", "new")]


def test_replacing_keeps_what_was_there_on_failure(tmp_path):
    (tmp_path / "a.txt").write_text("old")
    with pytest.raises(OSError, match="no space"), replacing(tmp_path / "a.txt") as temporary:
        temporary.write_text("half of")
        raise OSError("no space")
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("a.txt", "old")]


def test_replacing_does_not_write_through_a_planted_link(tmp_path):
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    victim.write_text("precious")
    folder.mkdir()
    (folder / f".{os.getpid()}.a.txt").symlink_to(victim)
    with replacing(folder / "a.txt") as temporary:
        temporary.write_text("new")
    assert victim.read_text() == "precious" and not (folder / "a.txt").is_symlink()
    assert (folder / "a.txt").read_text() == "new"


@pytest.mark.parametrize("umask", [0o022, 0o002, 0o077])
def test_replacing_follows_the_umask_whoever_writes(umask, tmp_path):
    """safetensors alone leaves files that only their owner can read."""
    before = os.umask(umask)
    try:
        with replacing(tmp_path / "a.txt") as temporary:
            temporary.write_text("new")
        with replacing(tmp_path / "a.safetensors") as temporary:
            save_file({"x": torch.zeros(1)}, temporary)
    finally:
        os.umask(before)
    assert {file.stat().st_mode & 0o777 for file in tmp_path.iterdir()} == {0o666 & ~umask}


def test_leftovers_of_killed_runs_are_removed_and_nothing_else(tmp_path):
    code = "import os, sys; from sparsecode import replacing\nwith replacing(sys.argv[1]): os.kill(os.getpid(), 9)"
    subprocess.run([sys.executable, "-c", code, tmp_path / "a.pt"])
    (left,) = tmp_path.iterdir()
    assert left.name.endswith(".a.pt")
    others = {f".{os.getpid()}.b.pt", "a.pt", ".5", ".x.a.pt", ".git"}
    for name in others:
        (tmp_path / name).touch()
    remove_leftovers(tmp_path)
    assert {file.name for file in tmp_path.iterdir()} == others


# ---- locked -----------------------------------------------------------------------------------------------------


def test_a_second_run_is_refused_with_the_folder_and_the_lock_leaves_nothing(tmp_path):
    folder = tmp_path / "new" / "out"
    with locked(folder):
        with pytest.raises(UserError, match=f"^another run is writing to {re.escape(str(folder))}; ") as caught:
            with locked(folder):
                pass
        assert "\n" not in str(caught.value)
        with locked(tmp_path / "other"):
            pass
    with locked(folder):
        assert not list(folder.iterdir())


def test_the_lock_is_gone_with_a_killed_process(tmp_path):
    code = "import sys, time; from sparsecode.common import locked\n"
    code += "with locked(sys.argv[1]): print(1, flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", code, tmp_path], stdout=subprocess.PIPE) as process:
        process.stdout.readline()
        with pytest.raises(UserError), locked(tmp_path):
            pass
        process.kill()
    with locked(tmp_path):
        pass


def test_a_file_system_without_locks_keeps_nobody_out(tmp_path, monkeypatch):
    def unknown(*args):
        raise OSError(errno.ENOSYS, "Function not implemented")

    monkeypatch.setattr(common.fcntl, "flock", unknown)
    with locked(tmp_path), locked(tmp_path):
        pass


def test_tensors_are_what_safetensors_reads_and_their_bytes_are_sorted(tmp_path):
    tensors = {name: torch.randn(3, 2) for name in "bca"}
    tensors |= {"on": torch.tensor([True, False, True]), "none": torch.ones(0)}
    written = set()
    for i in range(8):
        write_tensors(tmp_path / f"{i}", tensors, {"z": "☂", "b": '{"a": 1}', "a": "", "c": "3", "d": "4"})
        written.add((tmp_path / f"{i}").read_bytes())
    assert len(written) == 1
    loaded = load_file(tmp_path / "0")
    assert loaded.keys() == tensors.keys() and all(torch.equal(loaded[name], tensors[name]) for name in tensors)
    with safe_open(tmp_path / "0", framework="pt") as file:
        assert file.metadata()["z"] == "☂" and len(file.metadata()) == 5


def test_checksums_tell_values_apart_and_not_dtypes_or_layout():
    value = torch.randn(640, 256)
    other, column = value.clone(), value.clone()
    other += 1e-6
    column[:, 3] += 1
    assert len({checksum(x) for x in (value, other, column)}) == 3
    assert checksum(value) == checksum(value.double()) == checksum(value.T.contiguous().T)
    rounded = value.bfloat16()
    assert checksum(value, dtype=torch.bfloat16) == checksum(rounded, dtype=torch.bfloat16) == checksum(rounded)


def test_a_body_may_fail_in_any_way(tmp_path):
    with pytest.raises(BlockingIOError), locked(tmp_path):
        raise BlockingIOError
    with locked(tmp_path):
        pass


# ---- JSON -------------------------------------------------------------------------------------------------------

REQUIRED = {"width": COUNT, "name": TEXT}
OPTIONAL = {"share": POSITIVE, "shift": NUMBER, "on": FLAG, "sizes": list_of(COUNT), "maps": object_of(TEXT)}
OPTIONAL["any"] = OBJECT
GOOD = {"width": 3, "name": "☂"}


@pytest.mark.parametrize(
    "more",
    [
        {},
        {"share": 0.5, "shift": -1, "on": False, "sizes": [1, 2], "maps": {"a": "b"}, "any": {}},
        {"share": None, "unknown": [1, {"a": None}]},
    ],
)
def test_json_of_a_file_and_of_text_is_what_it_says(more, tmp_path):
    text = json.dumps({**GOOD, **more})
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    assert read_json(tmp_path / "a.json", REQUIRED, OPTIONAL) == {**GOOD, **more}
    assert read_json(text, REQUIRED, OPTIONAL, where="line 3") == {**GOOD, **more}


@pytest.mark.parametrize(
    "change, message",
    [
        ({"width": 0}, "width is 0; expected a whole number above 0"),
        ({"width": 1.0}, "width is 1.0; expected a whole number above 0"),
        ({"width": True}, "width is True"),
        ({"width": None}, "width is None"),
        ({"name": 5}, "name is 5; expected text"),
        ({"share": 0}, "share is 0; expected a number above 0"),
        ({"share": 10**400}, "share is 1000"),
        ({"shift": "1"}, "shift is '1'; expected a number"),
        ({"on": 1}, "on is 1; expected true or false"),
        ({"sizes": 1}, "sizes is 1; expected a list, each a whole number above 0"),
        ({"sizes": [1, "x"]}, r"sizes is \[1, 'x'\]"),
        ({"maps": {"a": 1}}, "maps is {'a': 1}; expected an object, each value text"),
        ({"any": []}, r"any is \[\]; expected an object"),
        ({"name": ["x" * 10**6]}, r"name is \['x{10,80}\.\.\.; expected"),
        ({"name": "\ud800"}, "is not JSON"),
    ],
)
def test_json_names_the_file_and_the_field(change, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_text(json.dumps({**GOOD, **change}))
    with pytest.raises(UserError, match=f"^{re.escape(str(file))}.*{message}") as caught:
        read_json(file, REQUIRED, OPTIONAL)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 400


@pytest.mark.parametrize(
    "content, message",
    [
        (b"{", "is not JSON"),
        (b"", "is not JSON"),
        (b'{"name": "\xff"}', "is not JSON .*utf-8"),
        (b"[1]", r"holds \[1\]; expected an object"),
        (b"null", "holds None; expected an object"),
        (b'{"width": 3}', "name is missing; expected text"),
        (b'{"unknown": NaN}', "NaN is not a finite number"),
        (b'{"unknown": [-Infinity]}', "-Infinity is not a finite number"),
        (b'{"unknown": 1e999}', "1e999 is not a finite number"),
        (b"9" * 5000, "is not JSON|expected an object"),
        (b"[" * 100_000, "is not JSON"),
        (b'{"a":' * 100_000, "is not JSON"),
    ],
)
def test_json_refuses_in_one_line_what_is_none(content, message, tmp_path):
    file = tmp_path / "a.json"
    file.write_bytes(content)
    with pytest.raises(UserError, match=f"^{re.escape(str(file))} ?.*{message}") as caught:
        read_json(file, REQUIRED, OPTIONAL)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["missing.json", "", "x" * 300])
def test_json_that_cannot_be_read(name, tmp_path):
    with pytest.raises(UserError, match="cannot be read"):
        read_json(Path(tmp_path / name))


def test_numbers():
    assert all(map(is_whole, (0, -3, np.int64(2), 10**30)))
    assert not any(map(is_whole, (True, np.True_, 1.0, "1", None, torch.ones(()))))
    assert all(map(is_number, (0, -3.5, np.float32(2), np.int64(1))))
    assert not any(map(is_number, (True, float("nan"), -float("inf"), np.float32("inf"), 10**400, "1", None, 1j)))
