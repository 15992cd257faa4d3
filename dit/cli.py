"""What the commands share: arguments that pick a model, checks of numbers, errors as one line with status 2."""

import argparse
import math
import os
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError

from dit import parallel
from sparsecode.common import UserError

TINY = Path(__file__).parent.parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


class Parser(argparse.ArgumentParser):
    """Reports a wrong argument like any other error: one line, without the usage in front of it."""

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


def check_place(folder):
    """UserError now rather than after the work, unless a folder can be written to, or made."""
    if any(len(os.fsencode(part)) > 200 for part in folder.parts):  # of 255; temporary files add the process's number
        raise UserError(f"{folder.name[:40]}… in --out is longer than 200 bytes; choose a shorter name")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder} cannot be made: {there} is no folder that you may write to")


def check_folder(out, outputs):
    """The names of the files in a folder; refused if it cannot be written or holds others than `outputs`."""
    check_place(out)
    present = {file.name for file in out.iterdir() if not file.name.startswith(".")} if out.exists() else set()
    if foreign := sorted(present - set(outputs)):
        raise UserError(f"--out {out} holds other files ({foreign[0]}); name a new or empty folder")
    return present


def add_model_arguments(parser):
    parser.add_argument("--weights", default=TINY, type=Path, help="folder of a PixArt-Σ pipeline (the tiny one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument("--text-device", help="of T5 alone: cpu keeps it off a small GPU (as --device)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen model (bfloat16 on a GPU, float32 on a CPU)")


def load_pipeline(args):
    """The Pipeline that the arguments of `add_model_arguments` ask for."""
    from dit.pipeline import Pipeline, find_device

    device = find_device(args.device, "--device")
    text_device = find_device(args.text_device, "--text-device") if args.text_device else device
    if args.weights == TINY and not TINY.is_dir():
        raise UserError(f"the tiny model is not at {TINY}: it comes with a clone of the repository, installed by "
                        "pip install -e . there; or name another model with --weights")  # fmt: skip
    return Pipeline.from_folder(args.weights, DTYPES.get(args.dtype), device, text_device)


# What takes less memory; the first belong to training, the last to drawing.
RELIEF = "--gradient-checkpointing, a smaller --batch-size, --resolution, --height or --width, or --text-device cpu"


def run(main):
    """Call `main()`; print an error that the user can fix as one line and exit with status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # what its encoding cannot show
    try:
        main()
        parallel.stop()
    except torch.OutOfMemoryError as error:
        asked = " ".join(str(error).split())[:200]
        fail(f"the GPU's memory is full ({asked}); what helps where the command has it: {RELIEF}")
    except (UserError, OSError, SafetensorError) as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message):
    if parallel.first_to_say(message):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
