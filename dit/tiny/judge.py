"""Does a picture show what its caption says? A small classifier of scenes, trained on fresh renderings, judges.

    python -m dit.tiny.judge                                  the tiny model, on seen and withheld combinations
    python -m dit.tiny.judge --adapter runs/robot/adapter.safetensors
"""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import nn

from dit.cli import Parser, add_model_arguments, load_pipeline, run, seed, whole
from dit.diffusion import sampling_timesteps
from dit.pictures import check_picture_path, grid, save_picture, to_tensor
from dit.tiny.scenes import BACKGROUNDS, COLOURS, PLACES, WORLDS, caption, sample_scene
from sparsecode import load_adapter
from sparsecode.common import UserError, replacing

CLASSES = {
    "kind": WORLDS["full"].kinds,
    "colour": tuple(COLOURS),
    "background": tuple(BACKGROUNDS),
    "place": tuple(PLACES),
}


class Judge(nn.Module):
    """64×64 pictures (B, 3, 64, 64) in [-1, 1] -> logits for each question about a scene with one object."""

    def __init__(self, width=32):
        super().__init__()
        widths = (3, width, 2 * width, 3 * width, 3 * width)
        self.convs = nn.ModuleList(nn.Conv2d(a, b, 3, padding=1) for a, b in zip(widths, widths[1:]))
        self.hidden = nn.Linear(3 * width * 4 * 4, 4 * width)
        self.heads = nn.ModuleDict({name: nn.Linear(4 * width, len(values)) for name, values in CLASSES.items()})

    def forward(self, images):
        x = images
        for conv in self.convs:
            x = F.max_pool2d(F.relu(conv(x)), 2)  # (B, C, H, W) -> (B, C', H/2, W/2)
        x = F.relu(self.hidden(x.flatten(1)))  # (B, C', 4, 4) -> (B, 4·width)
        return {name: head(x) for name, head in self.heads.items()}  # (B, number of classes) each


def labels(scenes):
    """The right answers for scenes with one object: question -> (B,) class numbers."""
    words = {
        "kind": [s.things[0].kind for s in scenes],
        "colour": [s.things[0].colour for s in scenes],
        "background": [s.background for s in scenes],
        "place": [s.things[0].place for s in scenes],
    }
    return {name: torch.tensor([CLASSES[name].index(w) for w in words[name]]) for name in CLASSES}


@torch.no_grad()
def right(judge, images, scenes):
    """question -> (B,) bool, whether the judge sees in each picture what its scene says, and "joint": all of it."""
    answers = judge(to_tensor(images))
    correct = {name: answers[name].argmax(1) == wanted for name, wanted in labels(scenes).items()}
    return {**correct, "joint": torch.stack(list(correct.values())).all(0)}


def captions_to_judge(world, n, withheld, seed=0):
    """n scenes with one object whose combination is (or is not) withheld from training, and a caption of each."""
    rng = np.random.default_rng([seed, withheld])
    world = replace(world, two_objects=0.0)
    scenes = [sample_scene(world, rng, withheld=withheld) for _ in range(n)]
    return scenes, [caption(scene, rng, say_place=True) for scene in scenes]


def score(pipe, judge, scenes, captions, seed=0, **options):
    """Shares of the generated pictures that show the right kind, colour, background, place, and all of it (joint)."""
    images = pipe.generate(captions, seed=seed, **options)
    return {name: hits.float().mean().item() for name, hits in right(judge, images, scenes).items()}, images


def save_judge(judge, folder, world):
    with replacing(Path(folder) / "model.safetensors") as temporary:
        save_file(judge.state_dict(), temporary)
    with replacing(Path(folder) / "config.json") as temporary:
        temporary.write_text(json.dumps({"world": world}) + "\n")


def load_judge(folder):
    """The judge that ships with a tiny pipeline, and the name of its world."""
    folder = Path(folder)
    if not (folder / "model.safetensors").exists():
        raise UserError(f"{folder} has no judge; only the tiny model that dit.tiny.pretrain makes has one")
    judge = Judge()
    judge.load_state_dict(load_file(folder / "model.safetensors"))
    return judge.eval(), json.loads((folder / "config.json").read_text())["world"]


def main(argv=None):
    parser = Parser(prog="python -m dit.tiny.judge", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    parser.add_argument("--adapter", type=Path, help="judge the model with this adapter")
    parser.add_argument("--pictures", type=whole, default=400, help="of seen, and of withheld combinations")
    parser.add_argument("--guidance", type=float, nargs="+", help="the model's default, or several to compare")
    parser.add_argument("--steps", type=whole, default=20)
    parser.add_argument("--seed", type=seed, default=0)
    parser.add_argument("--out", type=Path, help="save up to 64 pictures of withheld combinations as a grid")
    args = parser.parse_args(argv)
    if args.out:
        check_picture_path(args.out)
    pipe = load_pipeline(args)
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    judge, world = load_judge(args.weights / "judge")
    if args.adapter:
        load_adapter(pipe.transformer, args.adapter)
    print("guidance combinations  " + "  ".join(f"{name:>10}" for name in (*CLASSES, "joint")))
    for guidance in args.guidance or [pipe.defaults.get("guidance", 4.5)]:
        for withheld in (False, True):
            scenes, captions = captions_to_judge(WORLDS[world], args.pictures, withheld, args.seed)
            shares, images = score(pipe, judge, scenes, captions, args.seed, steps=args.steps, guidance=guidance)
            name = "withheld" if withheld else "seen"
            print(f"{guidance:8.2f} {name:12}  " + "  ".join(f"{share:10.3f}" for share in shares.values()), flush=True)
    if args.out:
        save_picture(grid([("", images[i : i + 8]) for i in range(0, min(64, len(images)), 8)], side=64), args.out)


if __name__ == "__main__":
    run(main)
