"""Draw prompts, with or without an adapter, as a labelled grid: how few atoms carry a concept (Fig. 3).

python -m dit.sample "a fox on a striped blue background" --seed 0 1 2 3
python -m dit.sample "a robot on a red background" --adapter runs/robot/adapter.safetensors --keep-atoms 0 4 40 all
"""

import argparse
from pathlib import Path

from dit.cli import Parser, add_model_arguments, check_place, load_pipeline, number, run, seed, unicode, whole
from dit.diffusion import sampling_timesteps
from dit.pictures import check_picture_path, grid, save_each, save_picture
from sparsecode import adapters, keep_atoms, load_adapter, read_header, set_density, set_scale
from sparsecode.common import UserError


def atom_count(text):
    """For argparse: a number of atoms, or "all"."""
    try:
        return text if text == "all" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number or all") from None


def parse(argv=None):
    parser = Parser(prog="python -m dit.sample", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("prompts", type=unicode, nargs="+", metavar="PROMPT")
    add("--negative-prompt", type=unicode, default="", help="what not to draw, in place of the empty prompt")
    add("--adapter", type=Path, nargs="+", help="files of dit.finetune or diffusers, or folders of peft")
    add("--density", type=float, nargs="+", help="draw with each of these densities ρ instead of the trained one")
    add("--keep-atoms", type=atom_count, nargs="+", help="draw with only so many of the most important atoms, or all")
    add("--scale", type=float, nargs="+", help="s in O + s·ΔO: 0 for the base model, 1 as trained; or one per adapter")
    add("--seed", type=seed, nargs="+", default=[0, 1, 2, 3], help="one column of pictures each")
    add("--steps", type=whole, default=20)
    add("--guidance", type=number, help="strength of the prompt (the model's default)")
    add("--height", type=whole)
    add("--width", type=whole)
    add("--compile", action="store_true", help="compile the model: minutes at the start, faster on a GPU")
    add("--out", type=Path, default=Path("sample.png"), help="one picture; or a grid, and a folder of its pictures")
    args = parser.parse_args(argv)
    if args.adapter is None and (args.density or args.keep_atoms or args.scale):
        raise UserError("--density, --keep-atoms and --scale change an adapter; name one with --adapter")
    check_picture_path(args.out)
    check_place(args.out.parent / args.out.stem)
    return args


def variants(model, densities=None, counts=None):
    """Set the adapter of `model` in each way, by density and by number of atoms, and yield words for it."""
    own = densities and next(iter(adapters(model).values())).options.get("density")
    for density in densities or [None]:
        for atoms in counts or [None]:
            words = []
            if atoms is not None:
                if density is not None:
                    set_density(model, own)  # with which the use of the atoms was measured
                keep_atoms(model, atoms)
                words.append(f"{atoms} atoms")
            if density is not None:
                set_density(model, density)
                words.insert(0, f"density {density}")
            yield ", ".join(words)
    if densities:
        set_density(model, own)


def sample(pipe, args):
    """Rows of (label, pictures): each prompt with each variant of the adapter, one picture for each seed."""
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    noise = pipe.noise(args.seed, args.height, args.width)  # (seeds, 4, h, w)
    for adapter in args.adapter or []:
        read_header(adapter)  # refuses what is no adapter, before T5 comes
    pipe.remember([args.negative_prompt, *args.prompts])
    model, ways = pipe.transformer, (args.density, args.keep_atoms)
    for adapter in args.adapter or []:
        load_adapter(model, adapter)
    if args.scale:
        set_scale(model, args.scale)
    if args.compile:
        model.compile()
    list(variants(model, *ways))  # a density or number of atoms that cannot be is refused before anything is drawn
    options = dict(steps=args.steps, guidance=args.guidance, negative_prompt=args.negative_prompt)
    rows = []
    for prompt in args.prompts:
        for words in variants(model, *ways):
            label = f"{prompt} ({words or 'adapted'})" if args.adapter else prompt
            repeated = [prompt] * len(args.seed)
            images = pipe.generate(repeated, latents=noise, **options)
            rows.append((label, images))
    return rows


def main(argv=None):
    args = parse(argv)
    rows = sample(load_pipeline(args), args)
    if len(rows) == len(args.seed) == 1:
        save_picture(rows[0][1][0], args.out)
        print(f"the picture is {args.out}")
        return
    save_each(rows, args.out.parent / args.out.stem)
    save_picture(grid(rows, min(512, max(128, *rows[0][1][0].size))), args.out)
    print(f"{len(rows)} rows of {len(args.seed)} pictures in {args.out}; each at full size in {args.out.stem}/")


if __name__ == "__main__":
    run(main)
