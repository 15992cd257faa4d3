"""An error for users, and files that are never half-written."""

import os
from contextlib import contextmanager
from pathlib import Path


class UserError(ValueError):
    """A mistake of the user's that one line explains: what is wrong, the value, how to mend it.

    The commands print the line without a traceback and exit with status 2.
    """


@contextmanager
def replacing(path):
    """Yield a temporary path beside `path`; rename it over `path` on success, remove it on failure.

    The temporary name keeps the suffix, since many writers choose their format by it. Missing
    folders are made.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{os.getpid()}.{path.name}")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)
