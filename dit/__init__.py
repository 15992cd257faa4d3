"""PixArt-Σ written by hand: `from dit import Pipeline`, or a loader of one part, each of which takes a folder.

Names are imported on first use, so that `import dit` is fast.
"""

import sys
from importlib import import_module

_WHERE = {"Pipeline": "dit.pipeline"} | dict.fromkeys(
    ("load_transformer", "load_text_encoder", "load_tokenizer", "load_vae"), "dit.checkpoint"
)
__all__ = list(_WHERE)


def __getattr__(name):
    if name not in _WHERE:
        raise AttributeError(f"module 'dit' has no attribute {name!r}")
    return getattr(import_module(_WHERE[name]), name)


if sys.argv[0] == "-m":  # a command: Ctrl-C during its slow imports gives no traceback
    sys.excepthook = lambda kind, *rest: sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
