"""What the commands share: arguments that pick a model, and mistakes of the user's as one line with status 2."""

import sys
from pathlib import Path

import torch

from sparsecode.common import UserError

TINY = Path(__file__).parent.parent / "weights" / "tiny"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def add_model_arguments(parser):
    parser.add_argument("--weights", default=TINY, type=Path, help="folder of a PixArt-Σ pipeline (the tiny one)")
    parser.add_argument("--device", help="cpu, cuda, cuda:1, … (a GPU if there is one)")
    parser.add_argument("--dtype", choices=DTYPES, help="of the frozen model (bfloat16 on a GPU, float32 on a CPU)")


def load_pipeline(args):
    """The Pipeline that --weights, --device and --dtype ask for."""
    from dit.pipeline import Pipeline

    try:
        device = torch.device(args.device or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"--device {args.device} cannot be used ({reason}); try --device cpu") from None
    return Pipeline.from_folder(args.weights, DTYPES.get(args.dtype), device)


def run(main):
    """Call `main()`; print a mistake of the user's as one line and exit with status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)
