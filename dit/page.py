"""A page to play with an adapter: how many of its atoms, how dense, and what the picture is without each top atom.

    python -m dit.page --adapter runs/robot/adapter.safetensors --out atoms.html

The page is one file that needs no network: each picture is drawn beforehand and lies inside it. The adapter must be a
sparse one.
"""

import base64
import io
from html import escape
from itertools import product
from pathlib import Path
from string import Template

import numpy as np
import torch
from tqdm import tqdm

from dit.cli import Parser, add_model_arguments, check_place, load_pipeline, number, run, seed, unicode, whole
from dit.diffusion import sampling_timesteps
from dit.maps import overlay, watch
from dit.sample import atom_count, variants
from sparsecode import adapters, importance, load_adapter, read_header, set_scale, top_atoms
from sparsecode.common import UserError, replacing
from sparsecode.influence import scale_atoms

SIDE = 256  # of a picture on the page, in pixels
COUNTS = (0, 40, 100, 200, 500)  # of atoms to keep; all of them is one more
FACTORS = (0.25, 0.5, 1, 2)  # of the density that the adapter was trained with


# ---- pieces of the page -----------------------------------------------------------------------------------------


def inline(picture, words, attributes):
    """An image element that holds the picture itself, at most SIDE pixels wide and high."""
    file, picture = io.BytesIO(), picture.copy()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "JPEG", quality=90, subsampling=0)
    data = base64.b64encode(file.getvalue()).decode()
    return f'<img {attributes} alt="{escape(words)}" src="data:image/jpeg;base64,{data}">'


def bars(heights):
    """A small plot, one bar for each number; the tallest fills it."""
    step, scale = 100 / len(heights), 95 / max(*heights, 1e-12)
    each = [f'x="{i * step:.2f}" y="{100 - h * scale:.2f}" height="{h * scale:.2f}"' for i, h in enumerate(heights)]
    rectangles = "".join(f'<rect width="{0.8 * step:.2f}" {where}/>' for where in each)
    return f'<svg viewBox="0 0 100 100" preserveAspectRatio="none" aria-hidden="true">{rectangles}</svg>'


def card(title, share, pictures, missing, s, length):
    """One atom: its share of importance, the pictures with it and without it, s (seeds, steps, h, w) and ‖D_m‖."""
    switched, maps = "", ""
    for k, (full, other) in enumerate(zip(pictures, missing)):
        switched += inline(full, "with this atom", f'class="with" data-seed="{k}"')
        switched += inline(other, "without this atom", f'class="without" data-seed="{k}"')
        maps += inline(overlay(full, s[k].mean(0)), "its map", f'data-seed="{k}"')
    heights = s.abs().mean(dim=(0, 2, 3)) * length  # (seeds, steps, h, w) -> (steps,)
    change = np.mean([np.abs(np.subtract(a, b, dtype=int)) for a, b in zip(pictures, missing)])  # of 255
    return (
        f"<article>\n<h3>{escape(title)}</h3>\n"
        f"<p>{100 * share:.1f} % of all importance; without it, a pixel changes by {change:.1f} of 255</p>\n"
        f'<label><input type="checkbox" checked>with this atom{switched}</label>\n'
        f"<div>{bars(heights.tolist())}{maps}</div>\n</article>"
    )


# ---- the page ---------------------------------------------------------------------------------------------------


def stops(model, counts=None, densities=None):
    """Where the sliders stop: numbers of atoms up to all, and densities with the trained one (None without top-k).

    UserError, before any work, for a number of atoms or a density that cannot be.
    """
    layers = adapters(model).values()
    total, own = sum(adapter.atoms for adapter in layers), next(iter(layers)).options.get("density")
    counts = counts or [n for n in COUNTS if n < total]
    counts = sorted({total if n == "all" else n for n in [*counts, total]})
    if own:
        densities = sorted({own, *(densities or [min(1.0, own * factor) for factor in FACTORS])})
    list(variants(model, densities, counts))
    return counts, densities, own


def draw_stops(pipe, prompt, noise, counts, densities, **options):
    """Yield an image element for each stop of the sliders and each row of noise (S, 4, h, w)."""
    places = list(product(range(len(densities or [None])), range(len(counts))))
    for words, (j, i) in zip(variants(pipe.transformer, densities, counts), tqdm(places, "sliders", disable=None)):
        for k, picture in enumerate(pipe.generate([prompt] * len(noise), latents=noise, **options)):
            yield inline(picture, words, f'data-atoms="{i}" data-density="{j}" data-seed="{k}"')


def draw_cards(pipe, prompt, noise, ranked, **options):
    """Yield a card for each of the ranked atoms, seen while the prompt is drawn from noise (S, 4, h, w)."""
    model, atoms = pipe.transformer, [(layer, m) for layer, m, _ in ranked]
    everything = sum(score.sum().item() for score in importance(model).values())
    pictures, maps = zip(*(watch(pipe, prompt, start[None], atoms, **options) for start in noise))
    for i, (layer, m, value) in enumerate(tqdm(ranked, "atoms", disable=None)):
        with scale_atoms(model, {layer: [m]}, 0.0):
            missing = pipe.generate([prompt] * len(noise), latents=noise, **options)
        title, length = f"{i + 1}. {layer}, atom {m}", adapters(model)[layer].D[m].norm().item()
        s = torch.stack([seen[i] for seen in maps])  # (S, steps, h, w)
        yield card(title, value / everything, pictures, missing, s, length)


def page(pipe, prompt, seeds, noise, n, counts=None, densities=None, **options):
    """HTML: the prompt drawn from noise (S, 4, h, w), a row for each seed, at each stop, and without each top atom."""
    ranked = top_atoms(pipe.transformer, n)
    counts, densities, own = stops(pipe.transformer, counts, densities)
    shares = [f"{100 * rho:g} %{' (as trained)' * (rho == own)}" for rho in densities or []]
    template = Template(Path(__file__).with_suffix(".html").read_text(encoding="utf-8"))
    return template.substitute(
        prompt=escape(prompt),
        title=f"The {n} most important of {counts[-1]:,} atoms",
        counts="|".join(f"{count:,} of {counts[-1]:,}" for count in counts),
        densities="|".join(shares) or "as trained",
        own=densities.index(own) if own else 0,
        seeds="|".join(map(str, seeds)),
        rendering="auto" if min(noise.shape[2:]) * pipe.vae.config.factor >= SIDE else "pixelated",
        cards="\n".join(draw_cards(pipe, prompt, noise, ranked, **options)),
        pictures="\n".join(draw_stops(pipe, prompt, noise, counts, densities, **options)),
    )


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="python -m dit.page", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="sparse adapter.safetensors of dit.finetune")
    add("--prompt", type=unicode, help="what to draw (what the adapter was trained on)")
    add("--top", type=whole, default=12, help="how many atoms get a switch")
    add("--keep-atoms", type=atom_count, nargs="+", help=f"numbers of atoms to choose from ({str(COUNTS)[1:-1]})")
    add("--density", type=float, nargs="+", help="densities to choose from (¼, ½, 1 and 2 times the trained one)")
    add("--scale", type=float, default=1.0, help="s in O + s·ΔO: 0 for the base model, 1 as trained")
    add("--seed", type=seed, nargs="+", default=[0, 1], help="of the noise, to choose from")
    add("--steps", type=whole, default=20)
    add("--guidance", type=number, help="strength of the prompt (the model's default)")
    add("--height", type=whole)
    add("--width", type=whole)
    add("--out", type=Path, default=Path("atoms.html"))
    args = parser.parse_args(argv)
    if args.out.suffix.lower() not in (".html", ".htm"):
        raise UserError(f"{args.out} does not end like a page; name it something.html")
    if args.out.is_dir():
        raise UserError(f"{args.out} is a folder; name a file")
    check_place(args.out.absolute().parent)
    return args


def main(argv=None):
    args = parse(argv)
    header = read_header(args.adapter)
    if header["method"] != "sparse":
        raise UserError(f"{args.adapter} is a {header['method']} adapter; only the sparse method has atoms")
    prompt = header["prompt"] if args.prompt is None else args.prompt
    if prompt is None:
        raise UserError(f"{args.adapter} does not say what it was trained on; give a --prompt")
    pipe = load_pipeline(args)
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    noise = pipe.noise(args.seed, args.height, args.width)  # (S, 4, h, w)
    pipe.remember(["", prompt])
    load_adapter(pipe.transformer, args.adapter)
    set_scale(pipe.transformer, args.scale)
    dials = {"counts": args.keep_atoms, "densities": args.density}
    text = page(pipe, prompt, args.seed, noise, args.top, **dials, steps=args.steps, guidance=args.guidance)
    with replacing(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"the {args.top} most important atoms in {args.out}: open it in a browser")


if __name__ == "__main__":
    run(main)
