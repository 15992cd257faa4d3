"""Shared by all code that reads or writes files: UserError, atomic writes, folder locks, checked JSON."""

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
except ImportError:  # Windows: folders are not locked there
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
    """Yield an empty temporary file beside `path`; rename it to `path` on success, remove it on failure.

    Its name, .PID.name, keeps the suffix, because many writers choose the format by it. Missing folders are created.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    temporary.unlink(missing_ok=True)
    temporary.touch(exist_ok=False)  # a new file: never follows a link that was there before
    mode = temporary.stat().st_mode  # what the user's umask allows
    try:
        yield temporary
        temporary.chmod(mode)  # safetensors replaces the file by one that only its owner can read
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_tensors(path, tensors, metadata):
    """Write a safetensors file with a sorted header, so that its bytes depend only on its content."""
    data = memoryview(save(tensors, metadata))
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.dumps(json.loads(bytes(data[8:start])), sort_keys=True, separators=(",", ":")).encode()
    header += b" " * (-len(header) % 8)
    with open(path, "wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.write(data[start:])


def remove_leftovers(folder):
    """Remove temporary files of `replacing` from a folder if the process that wrote them was killed."""
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
        pass  # the process of another user
    return True


@contextmanager
def locked(folder):
    """Lock a folder against other runs; create it if it is missing. UserError if another run holds the lock.

    The lock ends with the process, even if it is killed, and leaves no file behind.
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
    """Whether `value` is a whole number (Python or NumPy). True and False are not."""
    return isinstance(value, numbers.Integral) and not isinstance(value, bool)


def is_number(value):
    """Whether `value` is a finite number (Python or NumPy). True and False are not."""
    try:
        return isinstance(value, numbers.Real) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:  # an int too large for a float
        return False


class Kind(NamedTuple):
    """What a field of a JSON object may hold: `name` describes it in messages, `fits` checks a value."""

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
    """Read a JSON object as a dict, from a file (a Path) or from text (a str, called `where` in messages).

    `required` and `optional` are {field: Kind}. An optional field may be absent or null; other fields are kept
    unchecked. UserError names the file and the field. NaN and infinity are not JSON.
    """
    where = where or source
    try:
        text = source.read_text(encoding="utf-8") if isinstance(source, Path) else source
        values = json.loads(text, parse_constant=_finite, parse_float=_finite)
        json.dumps(values, ensure_ascii=False).encode()  # half of a surrogate pair, "\ud800", cannot be printed
    except OSError as error:
        raise UserError(f"{where} cannot be read ({error.strerror}); check the path") from None
    except (ValueError, RecursionError) as error:  # ValueError: not JSON, or not UTF-8
        raise UserError(f"{where} is not JSON ({error}); copy or download it again") from None
    return check_fields(values, required, optional, where)


def check_fields(values, required={}, optional={}, where=""):
    """Return `values` if it is a dict whose fields fit `required` and `optional`, as in `read_json`; else UserError."""
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
    """Eight hexadecimal digits of a hash over about 64 numbers of each tensor, rounded to `dtype`."""
    samples = []
    for value in tensors:
        step = max(1, value.numel() // 64) | 1  # odd, so that the samples are not all from one column
        samples.append(value.detach().flatten()[::step].to(dtype).float())
    return hashlib.sha256(torch.cat(samples).cpu().numpy().tobytes()).hexdigest()[:8]
