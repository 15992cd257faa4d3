"""Draw prompts, with or without an adapter, as a labelled grid: how few atoms carry a concept (Fig. 3).

python -m dit.sample "a red star on a blue background" --seed 0 1 2 3
python -m dit.sample "a robot on a red background" --adapter runs/robot/adapter.safetensors --keep-atoms 0 4 40 all
"""

import argparse
from pathlib import Path

from dit.cli import add_model_arguments, load_pipeline, run
from dit.pictures import check_picture_path, grid, save_picture
from sparsecode import keep_atoms, load_adapter, set_density
from sparsecode.common import UserError


def atom_count(text):
    """For argparse: a number of atoms, or "all"."""
    return text if text == "all" else int(text)


def parse(argv=None):
    parser = argparse.ArgumentParser(prog="python -m dit.sample", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("prompts", nargs="+", metavar="PROMPT")
    add("--adapter", type=Path, help="adapter.safetensors of dit.finetune")
    add("--density", type=float, nargs="+", help="draw with each of these densities ρ instead of the trained one")
    add("--keep-atoms", type=atom_count, nargs="+", help="draw with only so many of the most important atoms, or all")
    add("--seed", type=int, nargs="+", default=[0, 1, 2, 3], help="one column of pictures each")
    add("--steps", type=int, default=20)
    add("--guidance", type=float, help="strength of the prompt (the model's default)")
    add("--height", type=int)
    add("--width", type=int)
    add("--out", type=Path, default=Path("sample.png"))
    return parser.parse_args(argv)


def variants(args, model):
    """Yield a label for each setting of the adapter, after having made it."""
    if args.adapter is None:
        yield ""
        return
    for density in args.density or [None]:
        for atoms in args.keep_atoms or ["all"]:
            if density is not None:
                set_density(model, density)
            keep_atoms(model, atoms)
            words = [f"density {density}"] if density is not None else []
            words += [f"{atoms} atoms"] if args.keep_atoms else []
            yield f" ({', '.join(words)})" if words else " (adapted)"


def main():
    args = parse()
    check_picture_path(args.out)
    if args.adapter is None and (args.density or args.keep_atoms):
        raise UserError("--density and --keep-atoms choose atoms of an adapter; name one with --adapter")
    pipe = load_pipeline(args)
    noise = pipe.noise(args.seed, args.height, args.width)
    pipe.encode_prompt(["", *args.prompts])
    pipe.free("text_encoder")
    if args.adapter:
        load_adapter(pipe.transformer, args.adapter)
    rows = []
    for label in variants(args, pipe.transformer):
        for prompt in args.prompts:
            repeated = [prompt] * len(args.seed)
            images = pipe.generate(repeated, steps=args.steps, guidance=args.guidance, latents=noise)
            rows.append((prompt + label, images))
    save_picture(grid(rows, side=min(256, max(128, max(rows[0][1][0].size)))), args.out)
    print(f"{len(rows)} rows of {len(args.seed)} pictures in {args.out}")


if __name__ == "__main__":
    run(main)
