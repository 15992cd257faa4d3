"""What the commands share: arguments that pick a model, checks of numbers, mistakes as one line with status 2."""

import argparse
import math
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from dit import parallel
from sparsecode.common import UserError

TINY = Path(__file__).parent.parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument as all other mistakes are reported: without the usage in front of it."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def whole(text):
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text):
    """For argparse: what random numbers start from, 0 or more."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text):
    """For argparse: a number above 0, and not infinite."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def unicode(text):
    """For argparse: text that can be written as UTF-8."""
    text.encode()
    return text


def add_model_arguments(parser):
    parser.add_argument("--weights", default=TINY, type=Path, help="folder of a PixArt-Σ pipeline (the tiny one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen model (bfloat16 on a GPU, float32 on a CPU)")


def load_pipeline(args):
    """The Pipeline that --weights, --device and --dtype ask for."""
    from dit.pipeline import Pipeline

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.zeros(1, device=device).item()
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device} cannot be used ({reason}); try --device cpu") from None
    return Pipeline.from_folder(args.weights, DTYPES.get(args.dtype), device)


def run(main):
    """Call `main()`; print a mistake, or a file that cannot be read or written, as one line and exit with status 2."""
    for stream in filter(None, (sys.stdout, sys.stderr)):  # None: closed
        stream.reconfigure(errors="replace")  # where ρ cannot be shown, "?" is
    try:
        main()
        parallel.stop()
    except (UserError, OSError, SafetensorError) as error:
        if parallel.rank() == 0 or getattr(error, "alone", False):
            print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
