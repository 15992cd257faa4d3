"""Edit one picture (§4.2): fine-tune on it, sparse and with LoRA, and draw changed prompts from the same seeds.

    python -m dit.edit --image lessons/data/subjects/robot/01.png --edit "a robot in the middle on a green background"

Writes sparse.safetensors, lora.safetensors and edit.png into --out: a row for the base model, for LoRA, for the sparse
adapter as trained, and for each --density and each number of atoms (Fig. 3, 5, 6); a column for each prompt. What --out
holds of an earlier call is not trained again, so other edits, densities and atoms cost their drawing alone.
"""

import itertools
import textwrap
import zlib
from argparse import Namespace
from pathlib import Path

import numpy as np
import torch

from dit import finetune, sample
from dit.cli import Parser, add_model_arguments, load_pipeline, run, seed, unicode, whole
from dit.data import encode, find_captions, load_images
from dit.diffusion import sampling_timesteps
from dit.pictures import save_figure, square, to_pil, to_tensor
from dit.tiny.judge import CLASSES
from dit.tiny.scenes import BACKGROUNDS, PLACES, WORLDS
from dit.tiny.subjects import PICTURES, draw_subject, subject_caption
from sparsecode import attach, detach, load_adapter, read_header, save_adapter
from sparsecode.common import UserError

EPOCHS = 60  # the paper's, on one picture (§4.1); a model's own come from its defaults.json
METHODS = ("lora", "sparse")
EXPECTED = "expect less of the subject, and more of what the base model draws, with fewer or sparser atoms"
OUTPUTS = {"lora.safetensors", "sparse.safetensors", "lora.pt", "sparse.pt", "edit.png"}


# ---- training ---------------------------------------------------------------------------------------------------


def settings(pipe, images, method, epochs=None, lr=None, seed=0):
    """dit.finetune's arguments for these files, and the options of `attach`: the model's own, or else the paper's."""
    args = finetune.parse(["--images", *map(str, images), f"--method={method}", f"--seed={seed}"])
    args.lr, args.epochs = lr, epochs or pipe.defaults.get("finetune", {}).get("epochs", EPOCHS)
    return args, finetune.complete(args, pipe)


def teach(pipe, images, captions, file, *, method="sparse", epochs=None, lr=None, seed=0, gradient_checkpointing=False,
          **options):  # fmt: skip
    """Fine-tune on picture files as dit.finetune does, into an adapter file; the model is left as it was.

    A file that holds this very run is left alone, and a run that was killed goes on from its checkpoint beside it.
    """
    args, defaults = settings(pipe, images, method, epochs, lr, seed)
    options = defaults | options
    images = load_images(images, args.resolution)  # (n, 3, H, W)
    args.settings = finetune.describe(args, options, pipe, images, captions)
    checksum = zlib.crc32(repr(sorted(args.settings.items())).encode())
    if file.exists():
        if read_header(file)["notes"].get("settings") != checksum:
            raise UserError(f"{file} was trained on other pictures or with other settings; use another --out")
        return
    checkpoint = file.with_suffix(".pt")
    state = finetune.read_checkpoint(checkpoint, args.settings) if checkpoint.exists() else None
    data = encode(pipe, images, captions)
    pipe.free("text_encoder", "vae")

    model = pipe.transformer
    torch.manual_seed(args.seed)
    attach(model, method, **options)
    model.gradient_checkpointing = gradient_checkpointing
    losses = finetune.train(model, data, args, state, checkpoint, pipe.schedule)
    if method == "sparse":
        finetune.measure_usage(model, data, args.seed, pipe.schedule)
    save_adapter(model, file, prompt=captions[0], settings=checksum, steps=len(losses), lr=args.lr, seed=args.seed)
    detach(model)
    checkpoint.unlink()  # now the run is finished


# ---- drawing ----------------------------------------------------------------------------------------------------


def variants(model, adapter=None, density=None, keep_atoms=None):
    """Set an attached adapter in each of the ways that dit.sample knows, and yield the words for it."""
    choice = Namespace(adapter=adapter, density=density, keep_atoms=keep_atoms)
    return (words.strip(" ()") for words in sample.variants(choice, model))


def draw(pipe, prompts, noise, name, adapter=None, density=None, keep_atoms=None, **options):
    """Yield (label, {prompt: one picture for each row of noise (S, 4, h, w)}) for each variant of an adapter file."""
    model = pipe.transformer
    if adapter:
        load_adapter(model, adapter)
    for words in variants(model, adapter, density, keep_atoms):
        every = [prompt for prompt in prompts for _ in noise]
        images = pipe.generate(every, latents=noise.repeat(len(prompts), 1, 1, 1), **options)
        parts = [images[start : start + len(noise)] for start in range(0, len(images), len(noise))]
        yield name if words in ("", "adapted") else f"{name}, {words}", dict(zip(prompts, parts))
    if adapter:
        detach(model)


def draw_table(rows, path, title, dpi=150):
    """A figure with a row for each (label, {prompt: pictures}) and a column for each prompt of the last row."""
    from matplotlib.figure import Figure

    prompts = list(rows[-1][1])
    counts = [len(rows[-1][1][prompt]) for prompt in prompts]
    width, height = 1.3 + 0.9 * sum(counts), 1.0 + 0.9 * len(rows)  # inches; a picture takes 0.9
    figure = Figure(figsize=(width, height), layout="constrained")
    table = figure.subplots(len(rows), len(prompts), squeeze=False, width_ratios=counts)
    for cells, (label, pictures) in zip(table, rows):
        for axes, prompt in zip(cells, prompts):
            axes.set(xticks=[], yticks=[], anchor="W")
            axes.spines[:].set_visible(False)
            if prompt in pictures:
                axes.imshow(side_by_side(pictures[prompt]))
        cells[0].set_ylabel(textwrap.fill(label, 18), rotation=0, ha="right", va="center", fontsize=8)
    for axes, prompt, count in zip(table[0], prompts, counts):
        axes.set_title(textwrap.fill(prompt, 13 * count), fontsize=8, loc="left")
    figure.suptitle(textwrap.fill(title, round(11 * width)), fontsize=10)
    save_figure(figure, path, dpi)


def side_by_side(pictures):
    """PIL images of one size -> one array (H, W, 3), with white between them."""
    pixels = [np.asarray(picture) for picture in pictures]
    gap = np.full_like(pixels[0][:, : len(pixels[0]) // 24], 255)  # (H, H/24, 3)
    parts = [part for picture in pixels for part in (picture, gap)]
    return np.concatenate(parts[:-1], axis=1)  # (H, W, 3)


# ---- measuring, on the subjects that ship -----------------------------------------------------------------------


class Subject:
    """A shipped picture of a subject, and what is known of it: its place, its background, which pixels are its own."""

    def __init__(self, folder, name, number, side):
        self.name, self.file = name, Path(folder) / name / f"{number:02}.png"
        self.background, self.place, self.radius = PICTURES[name][number - 1]
        self.caption = subject_caption(name, self.background, self.place)
        self.picture = load_images([self.file], side)[0]  # (3, side, side)
        # What is the same on two backgrounds is subject alone.
        white, black = (self.draw(background, self.place) for background in ("white", "black"))  # (3, side, side) each
        self.mask = (white - black).abs().amax(0) < 0.1  # (side, side)

    def draw(self, background, place):
        """What a perfect edit would show, (3, side, side)."""
        drawn = draw_subject(self.name, background, place, self.radius)
        return to_tensor([square(drawn, self.picture.shape[1])])[0]

    def edits(self):
        """Every other background, and every other place of the small world: list of (prompt, background, place)."""
        scenes = [(other, self.place) for other in BACKGROUNDS if other != self.background]
        scenes += [(self.background, other) for other in WORLDS["small"].places if other != self.place]
        return [(subject_caption(self.name, *scene), *scene) for scene in scenes]

    def kept(self, images, place, reach=3):
        """How much of the subject is left at a place: the correlation of its pixels with those there, 1 for all of it.

        images (B, 3, side, side) -> (B,). The best of all shifts by up to `reach` pixels counts.
        """
        subject = standardise(self.picture[:, self.mask].flatten())  # (3·pixels,)
        down, right = self.displacement(place)
        scores = []
        for shift in itertools.product(range(-reach, reach + 1), repeat=2):
            back = images.roll((shift[0] - down, shift[1] - right), (2, 3))  # (B, 3, side, side)
            scores.append(standardise(back[:, :, self.mask].flatten(1)) @ subject)  # (B, 3·pixels) -> (B,)
        return torch.stack(scores).amax(0)  # (shifts, B) -> (B,)

    def displacement(self, place):
        """How far away a place is, in pixels (down, right). The subject stays inside the picture."""
        ends = [np.clip(PLACES[end], self.radius + 0.02, 0.98 - self.radius) for end in (self.place, place)]
        right, down = np.round((ends[1] - ends[0]) * self.picture.shape[1]).astype(int).tolist()
        return down, right


def standardise(x):
    x = x - x.mean(-1, keepdim=True)
    return x / x.norm(dim=-1, keepdim=True).clamp_min(1e-6)


@torch.no_grad()
def follows(judge, images, background, place):
    """images (B, 3, 64, 64) -> (B,) bool: whether the judge sees this background, and the object at this place."""
    answers, wanted = judge(images), {"background": background, "place": place}
    seen = [answers[question].argmax(1) == CLASSES[question].index(word) for question, word in wanted.items()]
    return seen[0] & seen[1]


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="python -m dit.edit", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--image", type=Path, required=True, help="the picture to edit")
    add("--prompt", type=unicode, help="what it shows, unless name.txt beside it says so")
    add("--edit", type=unicode, nargs="+", required=True, metavar="PROMPT", help="what it should show instead")
    add("--density", type=float, nargs="*", default=[0.01, 0.04], help="draw the sparse edit with each of these ρ")
    add("--keep-atoms", type=sample.atom_count, nargs="*", default=[40, 400], help="and with so many of its atoms")
    add("--seed", type=seed, nargs="+", default=[0, 1, 2], help="of the pictures drawn: one each")
    add("--epochs", type=whole, help=f"of 10 steps or so (the model's default, or {EPOCHS})")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--steps", type=whole, default=20, help="of the sampler")
    add("--guidance", type=float, help="strength of the prompt (the model's default)")
    add("--out", type=Path, help="folder for the adapters and edit.png (runs/edit-NAME)")
    args = parser.parse_args(argv)
    args.out = args.out or Path("runs") / f"edit-{args.image.stem}"
    return args


def check_choice(pipe, args):
    """Refuse densities and numbers of atoms that cannot be, before any work."""
    attach(pipe.transformer, "sparse", **settings(pipe, [args.image], "sparse")[1])
    for choice in ({"density": args.density}, {"keep_atoms": args.keep_atoms}):
        list(variants(pipe.transformer, "fresh", **choice))
    detach(pipe.transformer)


def edit(pipe, args):
    """Train both adapters, unless --out has them, and return the rows of edit.png."""
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    picture = load_images([args.image], pipe.resolution)  # (1, 3, H, W)
    (caption,) = find_captions([args.image], args.prompt)
    check_choice(pipe, args)
    prompts = list(dict.fromkeys([caption, *args.edit]))
    pipe.encode_prompt(["", *prompts])  # remembered, so that T5 can go
    noise = pipe.noise(args.seed)  # (seeds, 4, h, w)
    files = {method: args.out / f"{method}.safetensors" for method in METHODS}
    for method, file in files.items():
        extra = {"epochs": args.epochs, "gradient_checkpointing": args.gradient_checkpointing}
        teach(pipe, [args.image], [caption], file, method=method, **extra)

    ways = [{"name": "base model"}, {"name": "LoRA", "adapter": files["lora"]}]
    ways += [{"name": "sparse", "adapter": files["sparse"]}]
    ways += [{**ways[-1], "density": args.density}] if args.density else []
    ways += [{**ways[2], "keep_atoms": args.keep_atoms}] if args.keep_atoms else []
    rows = [("training picture", {caption: to_pil(picture)})]
    for way in ways:
        rows += draw(pipe, prompts, noise, steps=args.steps, guidance=args.guidance, **way)
    return rows


def main(argv=None):
    args = parse(argv)
    finetune.check_folder(args.out, OUTPUTS)
    rows = edit(load_pipeline(args), args)
    draw_table(rows, args.out / "edit.png", "fine-tuned on one picture, then drawn from changed prompts")
    print(f"{len(rows) - 1} rows in {args.out}/edit.png: {EXPECTED}")


if __name__ == "__main__":
    run(main)
