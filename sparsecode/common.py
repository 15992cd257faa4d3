"""What everything that reads or writes files shares: an error for users, whole files, locked folders, checked JSON."""

import hashlib
import json
import math
import numbers
import os
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors.torch import save

try:
    import fcntl
except ImportError:  # Windows: two runs in one folder go unnoticed there
    fcntl = None


class UserError(ValueError):
    """A user error that one line explains: what is wrong, the value, how to fix it.

    The commands print the line without a traceback and exit with status 2.
    """


def some(names):
    """The first of a list of names, and how many more there are."""
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")


def rename(name, pairs):
    """`name` after the pairs (ours, theirs), in turn: one that begins with a dot anywhere, another at the start."""
    for ours, theirs in pairs:
        if ours.startswith("."):
            name = name.replace(ours, theirs)
        elif name.startswith(ours):
            name = theirs + name.removeprefix(ours)
    return name


# ---- writing ----------------------------------------------------------------------------------------------------


@contextmanager
def replacing(path):
    """Yield a new, empty file beside `path` to write to; rename it over `path` on success, remove it on failure.

    Its name, .PID.name, keeps the suffix, since many writers choose their format by it. Missing folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.touch(exist_ok=False)  # created by us, so never through a link that somebody left there
    mode = temporary.stat().st_mode  # what the user's umask allows
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors puts a file of its own there, which only its owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata):
    """A safetensors file with a sorted header, so that its bytes depend only on what it holds."""
    data = memoryview(save(tensors, metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(data[start:])


def remove_leftovers(folder):
    """Remove the temporary files of `replacing` in a folder whose process is gone: it was killed while it wrote."""
    for file in Path(folder).glob(".[0-9]*.*"):
        pid = file.name.split(".")[1]
        if fcntl and pid.isdecimal() and not _alive(int(pid)):
            file.unlink(missing_ok=True)


def _alive(pid):
    try:
        os.kill(pid, 0)  # sends nothing
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # somebody else's
    return True


@contextmanager
def locked(folder):
    """Keep other runs out of a folder, which is made if it is missing; UserError if another run holds it.

    The lock belongs to the process and is gone with it, however it ends. It leaves no file behind.
    """
    Path(folder).mkdir(parents=True, exist_ok=True)
    if fcntl is None:
        yield
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise UserError(f"another run is writing to {folder}; wait until it ends, or name another folder") from None
        except OSError:
            pass  # a file system without locks
        yield
    finally:
        os.close(handle)


# ---- reading ----------------------------------------------------------------------------------------------------


def is_whole(value):
    """Whether `value` is a whole number, NumPy's too. True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Whether `value` is a finite number, NumPy's too. True and False are not."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # a whole number of 400 digits
        return False


class Kind(NamedTuple):
    """What a field of a JSON object may hold: `name` says it to the user, `fits` checks a value."""

    name: str
    fits: Callable


TEXT = Kind("text", lambda v: isinstance(v, str))
FLAG = Kind("true or false", lambda v: isinstance(v, bool))
COUNT = Kind("a whole number above 0", lambda v: is_whole(v) and 0 < v < 2**31)
NUMBER = Kind("a number", is_number)
POSITIVE = Kind("a number above 0", lambda v: is_number(v) and v > 0)
OBJECT = Kind("an object {…}", lambda v: isinstance(v, dict))


def list_of(kind):
    return Kind(f"a list, each {kind.name}", lambda v: isinstance(v, list) and all(map(kind.fits, v)))


def object_of(kind):
    return Kind(f"an object, each value {kind.name}", lambda v: OBJECT.fits(v) and all(map(kind.fits, v.values())))


def read_json(source, required={}, optional={}, where=None):
    """The object in a JSON file (a Path) or text (a str, which `where` names for the user), as a dict.

    `required` and `optional` describe fields: {name: Kind}. An optional field may be absent or null; fields without a
    description are kept as they are. UserError names the file and the field. NaN and infinity are not JSON.
    """
    where = where or source
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        values = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()  # half of a character, "\ud800", is text that nobody can print
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{where} is not JSON ({error}); copy or download it again") from None
    return check_fields(values, required, optional, where)


def check_fields(values, required={}, optional={}, where=""):
    """`values`, if it is a dict whose fields fit their descriptions, as in `read_json`."""
    if not isinstance(values, dict):
        raise UserError(f"{where} holds {_short(values)}; expected an object {{…}}")
    for name, kind in {**optional, **required}.items():
        value = values.get(name)
        if value is None and name not in required:
            continue
        if not kind.fits(value):
            found = f"{name} is {_short(value)}" if name in values else f"{name} is missing"
            raise UserError(f"{where}: {found}; expected {kind.name}")
    return values


def _finite(text):
    value = float(text)
    if not is_number(value):
        raise ValueError(f"{text} is not a finite number")
    return value


def _short(value):
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def checksum(*tensors, dtype=torch.float32):
    """Eight hexadecimal digits that tell tensors apart by about 64 numbers of each, rounded to `dtype`."""
    samples = []
    for value in tensors:
        step = max(1, value.numel() // 64) | 1  # odd, so that it does not stay in one column
        samples.append(value.detach().flatten()[::step].to(dtype).float())
    return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:8]
