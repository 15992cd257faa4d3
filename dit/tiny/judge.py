"""A small classifier that judges whether a picture shows what its caption says, trained on rendered scenes.

    python -m dit.tiny.judge                                  the tiny model, on seen and withheld combinations
    python -m dit.tiny.judge --adapter runs/robot/adapter.safetensors
"""

import math
import textwrap
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from safetensors.torch import load_file, save_file
from torch import nn

from dit.cli import Parser, add_model_arguments, load_pipeline, number, run, seed, whole
from dit.diffusion import sampling_timesteps
from dit.pictures import check_picture_path, save_picture, to_tensor
from dit.tiny.fit import fit, rng_of
from dit.tiny.scenes import BACKGROUNDS, PATTERNS, PLACES, THINGS, caption, draw, sample_scene
from sparsecode import load_adapter
from sparsecode.common import UserError, replacing

CLASSES = {"thing": THINGS, "background": tuple(BACKGROUNDS), "pattern": PATTERNS, "place": tuple(PLACES)}


class Judge(nn.Module):
    """64×64 pictures (B, 3, 64, 64) in [-1, 1] -> logits for each question about a scene.

    If a picture has two things, two logits of "thing" and two of "place" may be high.
    """

    def __init__(self, width=32):
        super().__init__()
        widths = (3, width, 2 * width, 4 * width, 6 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.hidden = nn.Linear(6 * width * 4 * 4, 8 * width)
        self.heads = nn.ModuleDict({name: nn.Linear(8 * width, len(values)) for name, values in CLASSES.items()})

    def forward(self, images):
        x = images
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)  # (B, C, H, W) -> (B, C', H/2, W/2)
        x = F.relu(self.hidden(x.flatten(1)))  # (B, C', 4, 4) -> (B, 8·width)
        return {name: head(x) for name, head in self.heads.items()}  # (B, number of classes) each


def labels(scenes):
    """The right answers: {question: (B, number of classes)}, 1 at what is there and 0 elsewhere."""
    there = {name: torch.zeros(len(scenes), len(values)) for name, values in CLASSES.items()}
    for i, scene in enumerate(scenes):
        for thing in scene.things:
            there["thing"][i, THINGS.index(thing.name)] = 1
            there["place"][i, CLASSES["place"].index(thing.place)] = 1
        there["background"][i, CLASSES["background"].index(scene.background)] = 1
        there["pattern"][i, PATTERNS.index(scene.pattern)] = 1
    return there


@torch.no_grad()
def right(judge, images, scenes):
    """{question: (B,) bool}: whether the judge sees in each picture what its scene says; "joint" means all of it.

    For a scene of n things, the n most likely things must be the right ones, and so for the places.
    """
    answers, correct = judge(to_tensor(images)), {}
    for name, wanted in labels(scenes).items():
        ranks = (-answers[name]).argsort(1).argsort(1)  # (B, classes): 0 is the likeliest
        correct[name] = ((ranks < wanted.sum(1, keepdim=True)) == wanted.bool()).all(1)  # (B,)
    return {**correct, "joint": torch.stack(list(correct.values())).all(0)}


def captions_to_judge(n, withheld, two_things=0.0, seed=0):
    """n scenes of combinations that are (or are not) withheld from training, and a complete caption of each."""
    rng = np.random.default_rng([seed, withheld])
    scenes = [sample_scene(rng, withheld, two_things) for _ in range(n)]
    return scenes, [caption(scene, rng, say_place=True) for scene in scenes]


def score(pipe, judge, scenes, captions, seed=0, **options):
    """Generate the captions; return {question: share of right pictures}, with "joint" for all, and the pictures."""
    images = pipe.generate(captions, seed=seed, **options)
    return {name: hits.float().mean().item() for name, hits in right(judge, images, scenes).items()}, images


def train_judge(args, vae, folder):
    """Train on new renderings with noise, half of them through the autoencoder, since it judges generated pictures."""
    torch.manual_seed(args.seed)
    judge = Judge().to(args.device)

    def loss(step):
        rng = rng_of("judge", args.seed, step + 1)
        scenes = [sample_scene(rng, withheld=True, two_things=0.0) for _ in range(4)]
        scenes += [sample_scene(rng, two_things=0.6) for _ in range(28)]
        images = to_tensor([draw(scene) for scene in scenes]).to(args.device)
        with torch.no_grad():
            images[::2] = vae.decode(vae.encode(images[::2]))
        noise = torch.from_numpy(rng.standard_normal(images.shape, dtype=np.float32)).to(args.device)
        shift = [int(pixels) for pixels in rng.integers(-1, 2, 2)]
        answers = judge((images + 0.15 * rng.random() * noise).roll(shift, (2, 3)))
        total = 0.0
        for name, wanted in labels(scenes).items():
            wanted = wanted.to(args.device)
            total = total - (wanted * answers[name].log_softmax(1)).sum(1).mean()
        return total

    return fit("judge", judge, loss, steps=args.judge_steps, lr=1e-3, folder=folder)


def save_judge(judge, folder):
    state = {name: tensor.half() for name, tensor in judge.state_dict().items()}
    with replacing(Path(folder) / "model.safetensors") as temporary:
        save_file(state, temporary)


def load_judge(folder):
    """The Judge in a folder of a tiny pipeline, such as weights/tiny/judge. UserError if there is none."""
    file = Path(folder) / "model.safetensors"
    if not file.exists():
        raise UserError(f"{folder} has no judge; only the tiny model that dit.tiny.pretrain makes has one")
    judge, state = Judge(), load_file(file)
    if state["heads.thing.bias"].shape != judge.heads["thing"].bias.shape:
        raise UserError(f"{file} knows {len(state['heads.thing.bias'])} things, not {len(THINGS)}; train a new judge")
    judge.load_state_dict(state)
    return judge.eval()


def main(argv=None):
    parser = Parser(prog="python -m dit.tiny.judge", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="judge the model with this adapter")
    parser.add_argument("--pictures", type=whole, default=400, help="of each kind of caption (default: 400)")
    parser.add_argument("--guidance", type=number, nargs="+", help="one or more scales (default: the model's own)")
    parser.add_argument("--steps", type=whole, default=20, help="steps of the sampler (default: 20)")
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=Path, help="save 48 pictures of withheld combinations, captioned")
    args = parser.parse_args(argv)
    if args.out:
        check_picture_path(args.out)
    pipe = load_pipeline(args)
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    judge = load_judge(args.weights / "judge")
    if args.adapter:
        load_adapter(pipe.transformer, args.adapter)
    print("guidance combinations  " + "  ".join(f"{name:>10}" for name in (*CLASSES, "joint")))
    for guidance in args.guidance or [pipe.defaults.get("guidance", 4.5)]:
        for name, withheld, two in (("two things", False, 1.0), ("seen", False, 0.0), ("withheld", True, 0.0)):
            scenes, captions = captions_to_judge(args.pictures, withheld, two, args.seed)
            shares, images = score(pipe, judge, scenes, captions, args.seed, steps=args.steps, guidance=guidance)
            print(f"{guidance:8.2f} {name:12}  " + "  ".join(f"{share:10.3f}" for share in shares.values()), flush=True)
    if args.out:
        shown = [captions_to_judge(n, True, two, args.seed)[1] for n, two in ((32, 0.0), (16, 1.0))]
        captions = shown[0] + shown[1]
        images = pipe.generate(captions, seed=args.seed, steps=args.steps, guidance=guidance)
        save_picture(captioned(images, captions), args.out)


def captioned(images, captions, side=128, columns=8):
    """One PIL image of all pictures in `columns` columns, each above its caption."""
    gap, font = 12, ImageFont.load_default(12)
    captions = [textwrap.fill(text, 21) for text in captions]
    text_height = 14 * max(text.count("\n") + 1 for text in captions) + gap
    rows = math.ceil(len(images) / columns)
    canvas = Image.new("RGB", (gap + columns * (side + gap), gap + rows * (side + text_height)), "white")
    pen = ImageDraw.Draw(canvas)
    for i, (image, text) in enumerate(zip(images, captions)):
        x, y = gap + i % columns * (side + gap), gap + i // columns * (side + text_height)
        canvas.paste(image.resize((side, side), Image.Resampling.LANCZOS), (x, y))
        pen.multiline_text((x, y + side + 2), text, fill="black", font=font, spacing=1)
    return canvas


if __name__ == "__main__":
    run(main)
