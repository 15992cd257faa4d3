"""PixArt-Σ by hand: `from dit import Pipeline`, or one part of it, each from the folder that holds its files.

The names are imported when they are first used, so that `import dit` takes no time.
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


if sys.argv[0] == "-m":  # a command, whose imports take seconds: until `cli.run`, Ctrl-C ends it without a traceback
    sys.excepthook = lambda kind, *rest: sys.exit(130) if kind is KeyboardInterrupt else sys.__excepthook__(kind, *rest)
