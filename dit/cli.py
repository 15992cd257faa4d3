"""Shared by all commands: arguments that choose a model, checks of numbers, errors as one line with status 2."""

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
    """Reports a wrong argument like any other error: one line, without the usage text."""

    def error(self, message):
        raise UserError(f"{message}; see {self.prog} --help")


def whole(text):
    """For argparse: a whole number above 0."""
    if not text.isdecimal() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def seed(text):
    """For argparse: a random seed, 0 or more."""
    if not text.isdecimal() or int(text) >= 2**63:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number of 0 or more")
    return int(text)


def positive(text):
    """For argparse: a finite number above 0."""
    if not 0 < float(text) < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r} is not a number above 0")
    return float(text)


def number(text):
    """For argparse: a number that is finite."""
    if not math.isfinite(float(text)):
        raise argparse.ArgumentTypeError(f"{text!r} is not a finite number")
    return float(text)


def unicode(text):
    """For argparse: text that can be written as UTF-8."""
    text.encode()
    return text


def check_place(folder):
    """UserError, before any work, unless a folder is writable or can be created."""
    if any(len(os.fsencode(part)) > 200 for part in folder.parts):  # of 255; temporary files add the process id
        raise UserError(f"{folder.name[:40]}… in --out is longer than 200 bytes; choose a shorter name")
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir() or not os.access(there, os.W_OK):
        raise UserError(f"--out {folder} cannot be created: {there} is not a folder you can write to; choose another")


def check_folder(out, outputs):
    """The set of file names in a folder; UserError if it is not writable or holds files other than `outputs`."""
    check_place(out)
    present = {file.name for file in out.iterdir() if not file.name.startswith(".")} if out.exists() else set()
    if foreign := sorted(present - set(outputs)):
        raise UserError(f"--out {out} holds other files ({foreign[0]}); name a new or empty folder")
    return present


def add_model_arguments(parser):
    parser.add_argument("--weights", default=TINY, type=Path, help="folder of a PixArt-Σ pipeline (default: tiny)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (default: a GPU if there is one)")
    parser.add_argument("--text-device", help="device of T5; cpu saves GPU memory (default: --device)")
    parser.add_argument("--dtype", choices=DTYPES, help="of frozen weights (default: bfloat16 on a GPU, else float32)")


def load_pipeline(args):
    """The Pipeline that the arguments of `add_model_arguments` ask for."""
    from dit.pipeline import Pipeline, find_device

    device = find_device(args.device, "--device")
    text_device = find_device(args.text_device, "--text-device") if args.text_device else device
    if args.weights == TINY and not TINY.is_dir():
        raise UserError(f"the tiny model is not at {TINY}; clone the repository and run pip install -e . in it, "
                        "or give another model with --weights")  # fmt: skip
    return Pipeline.from_folder(args.weights, DTYPES.get(args.dtype), device, text_device)


# Options that save memory; the first are for training, the last for sampling.
RELIEF = "--gradient-checkpointing, a smaller --batch-size, --resolution, --height or --width, or --text-device cpu"


def run(main):
    """Call `main()`; print an error that the user can fix as one line and exit with status 2."""
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed
            setattr(sys, name, open(os.devnull, "w"))
        getattr(sys, name).reconfigure(errors="replace")  # characters that its encoding lacks
    try:
        main()
        parallel.stop()
    except torch.OutOfMemoryError as error:
        asked = " ".join(str(error).split())[:200]
        fail(f"the GPU is out of memory ({asked}); options that help, if the command has them: {RELIEF}")
    except RuntimeError as error:
        if "DefaultCPUAllocator" not in str(error):  # torch has no class of its own for a full memory of the CPU
            raise
        asked = " ".join(str(error).split()).partition("DefaultCPUAllocator: ")[2][:200]
        fail(f"out of memory ({asked}); options that help, if the command has them: fewer --atoms, {RELIEF}")
    except (UserError, OSError, SafetensorError) as error:
        fail(" ".join(str(error).split()))
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


def fail(message):
    if parallel.first_to_say(message):
        print(f"error: {message}", file=sys.stderr)
    sys.exit(2)
