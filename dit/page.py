"""A page about the most important atoms of an adapter: when each acts, where, and what the picture is without it.

    python -m dit.page --adapter runs/robot/adapter.safetensors --out atoms.html

The page needs nothing but itself: pictures are inside it, and there are no scripts. The adapter must be a sparse one.
"""

import base64
import io
from html import escape
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from dit.cli import Parser, add_model_arguments, check_place, load_pipeline, run, seed, unicode, whole
from dit.diffusion import sampling_timesteps
from dit.pictures import to_tensor
from sparsecode import adapters, importance, keep_atoms, load_adapter, read_header, record_maps, top_atoms
from sparsecode.common import UserError, replacing
from sparsecode.influence import scale_atoms

SIDE = 192  # of a picture on the page, in pixels


# ---- looking ----------------------------------------------------------------------------------------------------


def watch(pipe, prompt, noise, atoms, **options):
    """Draw the prompt from noise (1, 4, h, w), and see what the atoms do meanwhile.

    `atoms` is a list of (layer, m). Returns the picture, and S (atoms, steps, h, w): what each coefficient was at each
    patch of the picture, at each step of the sampler. Of the two passes of guidance it is the one with the prompt.
    """
    model = pipe.transformer
    chosen = {name: [m for layer, m in atoms if layer == name] for name, _ in atoms}
    with record_maps(model, chosen) as maps:
        (picture,) = pipe.generate([prompt], latents=noise, **options)
    rows, columns = (side // model.config.patch_size for side in noise.shape[2:])
    seen = {}
    for name, calls in maps.items():
        s = torch.stack([call[-1] for call in calls])  # steps × (B, N, chosen) -> (steps, N, chosen)
        s = s.permute(2, 0, 1).unflatten(2, (rows, columns))  # (chosen, steps, h, w)
        seen |= {(name, m): values for m, values in zip(chosen[name], s)}
    return picture, torch.stack([seen[atom] for atom in atoms])  # (atoms, steps, h, w)


def without(pipe, prompt, noise, atom, **options):
    """The same picture when one atom (layer, m) is missing."""
    layer, m = atom
    with scale_atoms(pipe.transformer, {layer: [m]}, 0.0):
        return pipe.generate([prompt], latents=noise, **options)[0]


def overlay(picture, values, scale=None):
    """The picture in pale grey, and over it in red where values (h, w) are above zero, in blue where they are below.

    The colour is full where |values| reach `scale`, their largest unless given.
    """
    scale = max(values.abs().max().item() if scale is None else scale, 1e-12)
    small = Image.fromarray((values / scale).clamp(-1, 1).numpy())  # (h, w) float
    strength = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR))[..., None]  # (H, W, 1)
    grey = 128 + np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 2  # (H, W, 1), pale
    colour = np.where(strength > 0, (214, 40, 40), (38, 84, 196))  # (H, W, 3)
    alpha = 0.85 * np.abs(strength)  # (H, W, 1)
    return Image.fromarray(((1 - alpha) * grey + alpha * colour).clip(0, 255).astype(np.uint8))


def difference(picture, other, gain=4):
    """What the first picture has more than the other, `gain` times as strong, on grey."""
    a, b = to_tensor([picture, other])  # (3, H, W) each
    return Image.fromarray(((a - b) * 127.5 * gain + 128).clamp(0, 255).byte().permute(1, 2, 0).numpy())


# ---- the page ---------------------------------------------------------------------------------------------------

PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{title}</title>
<style>
body {{ font: 15px/1.45 sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
h2 {{ font-size: 1rem; margin: 2rem 0 .4rem; border-top: 1px solid #ccc; padding-top: 1rem }}
.row {{ display: flex; flex-wrap: wrap; gap: .8rem }}
figure {{ margin: 0; width: 12rem }} figcaption {{ font-size: .8rem; color: #555 }}
img, svg {{ display: block; width: 12rem; height: 12rem; object-fit: contain; image-rendering: pixelated }}
svg {{ background: #f3f3f3 }} rect {{ fill: #2654c4 }}
</style>
</head>
<body>
<h1>{title}</h1>
<p>An atom D_m of a layer is added S_m times to each patch of the picture; its importance is mean |S_m| · ‖D_m‖. The
bars show it at each step of the sampler, from noise on the left to the picture on the right. The map shows S_m, the
mean over the steps: red where the atom is added, blue where it is subtracted. Then the picture when this one atom is
missing, and what the atom changes: the difference of the two pictures, four times as strong, on grey.</p>
{sections}
</body>
</html>
"""


def boxed(content, caption):
    return f"<figure>{content}<figcaption>{escape(caption)}</figcaption></figure>"


def inline(picture, caption):
    """A picture inside the page, no larger than it is shown."""
    file, picture = io.BytesIO(), picture.copy()
    picture.thumbnail((SIDE, SIDE))
    picture.save(file, "PNG")
    data = base64.b64encode(file.getvalue()).decode()
    return boxed(f'<img src="data:image/png;base64,{data}" alt="">', caption)


def bars(heights, caption):
    """A small plot inside the page, one bar for each number; the tallest fills it."""
    step, scale = 100 / len(heights), 95 / max(*heights, 1e-12)
    each = [f'x="{i * step:.2f}" y="{100 - h * scale:.2f}" height="{h * scale:.2f}"' for i, h in enumerate(heights)]
    rectangles = "".join(f'<rect width="{0.8 * step:.2f}" {where}/>' for where in each)
    return boxed(f'<svg viewBox="0 0 100 100" preserveAspectRatio="none">{rectangles}</svg>', caption)


def section(title, *figures):
    return f'<h2>{escape(title)}</h2>\n<div class="row">{"".join(figures)}</div>'


def overview(pipe, prompt, noise, picture, n, total, **options):
    """The picture with all atoms, with the best n, and with none."""
    figures = [inline(picture, f"with all {total} atoms")]
    for count, words in ((n, f"with the best {n} alone"), (0, "without any: the base model")):
        keep_atoms(pipe.transformer, count)
        figures.append(inline(pipe.generate([prompt], latents=noise, **options)[0], words))
    keep_atoms(pipe.transformer, "all")
    return section(f"“{prompt}”", *figures)


def about_atom(title, picture, missing, s, length):
    """One atom: s (steps, h, w) are its coefficients, `length` is ‖D_m‖, and `missing` the picture without it."""
    heights = s.abs().mean(dim=(1, 2)) * length  # (steps, h, w) -> (steps,)
    return section(
        title,
        bars(heights.tolist(), "when: importance, step by step"),
        inline(overlay(picture, s.mean(0)), "where: its map"),
        inline(picture, "with it"),
        inline(missing, "without it"),
        inline(difference(picture, missing), "what it changes, ×4"),
    )


def page(pipe, prompt, noise, n, **options):
    """HTML about the n most important atoms, seen while the prompt is drawn from noise (1, 4, h, w)."""
    model = pipe.transformer
    ranked, layers, scores = top_atoms(model, n), adapters(model), torch.cat(list(importance(model).values()))
    picture, maps = watch(pipe, prompt, noise, [(layer, m) for layer, m, _ in ranked], **options)
    sections = [overview(pipe, prompt, noise, picture, n, len(scores), **options)]
    for i, (layer, m, value) in enumerate(tqdm(ranked, "atoms", disable=None)):
        title = f"{i + 1}. {layer}, atom {m}: {value / scores.sum().item():.1%} of all importance"
        missing = without(pipe, prompt, noise, (layer, m), **options)
        sections.append(about_atom(title, picture, missing, maps[i], layers[layer].D[m].norm().item()))
    return PAGE.format(title=f"The {n} most important of {len(scores)} atoms", sections="\n".join(sections))


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="python -m dit.page", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--adapter", type=Path, required=True, help="sparse adapter.safetensors of dit.finetune")
    add("--prompt", type=unicode, help="what to draw (what the adapter was trained on)")
    add("--top", type=whole, default=12, help="how many atoms to show")
    add("--seed", type=seed, default=0, help="of the picture drawn")
    add("--steps", type=whole, default=20)
    add("--guidance", type=float, help="strength of the prompt (the model's default)")
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
    load_adapter(pipe.transformer, args.adapter)
    noise = pipe.noise([args.seed], args.height, args.width)  # (1, 4, h, w)
    text = page(pipe, prompt, noise, args.top, steps=args.steps, guidance=args.guidance)
    with replacing(args.out) as temporary:
        temporary.write_text(text, encoding="utf-8")
    print(f"the {args.top} most important atoms in {args.out}: open it in a browser")


if __name__ == "__main__":
    run(main)
