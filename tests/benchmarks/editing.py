"""Editing, measured (Fig. 4–6): does the edit happen, is the subject kept, is the rest of the model unharmed?

    python tests/benchmarks/editing.py --out runs/editing       (about 30 minutes of a CPU core)

Trains on pictures 01 and 02 of each shipped subject and draws every edit with every adapter: other backgrounds on 01,
a large portrait in the middle, and other places on 02, which leaves room to move. Writes editing.csv and the adapters
into --out; what is there already is not done again. Lesson 7 draws the figures from lessons/data/editing.csv.
"""

import argparse
import csv
from pathlib import Path

import torch

from dit.cli import TINY
from dit.edit import draw
from dit.pictures import to_tensor
from dit.pipeline import Pipeline
from dit.tiny.editing import SubjectPicture, follows
from dit.tiny.judge import captions_to_judge, load_judge, right
from dit.tiny.scenes import BACKGROUNDS
from dit.tiny.subjects import SUBJECTS
from dit.train import TrainConfig, teach
from sparsecode.common import replacing

FOLDER = Path(__file__).parent.parent.parent / "lessons" / "data" / "subjects"
COLUMNS = ("picture", "adapter", "edit", "prompt", "pictures", "follows", "kept")

# name -> how to train it, in which ways to draw with it, how many seeds. In parameters, 64 sparse atoms equal LoRA with
# r = 16, and 4 equal r = 1. Of the learning rates 0.003, 0.01 and 0.03 the loss is lowest at 0.01 for one atom, and
# within 5 % of its lowest for LoRA with r = 1 (robot/02 and owl/02).
ADAPTERS = {
    "drawn by hand": (None, [], 0),
    "base model": (None, [{}], 5),
    "LoRA, r 16": ({"method": "lora"}, [{}], 3),
    "sparse": ({}, [{}, {"density": [0.01, 0.04]}, {"keep_atoms": [40, 120, 400]}], 3),
    "sparse, trained at density 0.004": ({"density": 0.004}, [{}], 3),
    "sparse, trained at density 0.1": ({"density": 0.1}, [{}], 3),
    "sparse, M 64": ({"atoms": 64, "density": 0.08}, [{}], 3),
    "one atom": ({"density": 0.004, "lr": 0.01}, [{}], 5),
    "one atom, M 4": ({"atoms": 4, "density": 0.25, "lr": 0.01}, [{}], 5),
    "LoRA, r 1": ({"method": "lora", "r": 1, "alpha": 1, "lr": 0.01}, [{}], 5),
}


def scenes(subject, number):
    """The caption that was trained, and the edits of this picture: list of (edit, prompt, background, place)."""
    same = [("same", subject.caption, subject.background, subject.place)]
    if number == 1:
        return same + [("background", *scene) for scene in subject.edits() if scene[2] == subject.place]
    return same + [("place", *scene) for scene in subject.edits() if scene[2] != subject.place]


def measure(judge, subject, images, scene):
    """One row of the table: an edit, its share of pictures that follow it, and how much of the subject they keep."""
    edit, prompt, background, place = scene
    hits, kept = follows(judge, images, background, place), subject.kept(images, place)  # (B,) each
    share, mean = hits.float().mean().item(), kept.mean().item()
    return {"edit": edit, "prompt": prompt, "pictures": len(images), "follows": f"{share:.3f}", "kept": f"{mean:.3f}"}


def rows_of(pipe, judge, subject, number, name, out):
    """All rows about one picture and one adapter, in all its ways."""
    how, ways, n_seeds = ADAPTERS[name]
    if name == "drawn by hand":
        yield from ideal(pipe, judge, subject, number)
        return
    file = None
    if how is not None:
        file = out / f"{subject.name}-{number:02}-{name.replace(',', '').replace(' ', '-')}.safetensors"
        teach(pipe, [subject.file], [subject.caption], file, TrainConfig.of(pipe, **how))
    wanted = scenes(subject, number)
    noise = pipe.noise(range(n_seeds))  # (seeds, 4, h, w)
    for way in ways:
        for label, pictures in draw(pipe, [scene[1] for scene in wanted], noise, name, file, **way):
            for scene in wanted:
                yield {"adapter": label, **measure(judge, subject, to_tensor(pictures[scene[1]]), scene)}
    others, captions = captions_to_judge(8, withheld=False)
    ((_, pictures),) = draw(pipe, captions, noise[:1], name, file)
    hits = right(judge, [pictures[caption][0] for caption in captions], others)["joint"]  # (8,) bool
    share = f"{hits.float().mean():.3f}"
    yield {"adapter": name, "edit": "other", "prompt": "", "pictures": 8, "follows": share, "kept": ""}


def ideal(pipe, judge, subject, number):
    """What the measures say about true drawings of the edits that went once through the autoencoder."""
    for scene in scenes(subject, number):
        image = pipe.decode(pipe.encode_images(subject.draw(*scene[2:])[None]))  # (1, 3, H, W)
        yield {"adapter": "drawn by hand", **measure(judge, subject, image, scene)}


def outside(pipe):
    """Size and a second object, which the tiny model never saw in training: does it understand the words at all?"""
    things = ("red star", "white heart", "black cross", "yellow square")
    large = [f"a {thing} in the middle on a blue background" for thing in things]
    small = [f"a small {thing} in the middle on a blue background" for thing in things]
    corners = "a {} at the top left and a {} at the bottom right on a blue background"
    two = [corners.format(one, other) for one, other in zip(things, things[1:] + things[:1])]
    ((_, pictures),) = draw(pipe, large + small + two, pipe.noise(range(5)), "base model")

    def objects(prompts):
        images = to_tensor([image for prompt in prompts for image in pictures[prompt]])  # (20, 3, 64, 64)
        blue = torch.tensor(BACKGROUNDS["blue"]).view(3, 1, 1) / 127.5 - 1
        return ((images - blue).abs().amax(1) > 0.4).float()  # (20, 64, 64)

    times = objects(small).mean() / objects(large).mean()
    there = objects(two)  # (20, 64, 64)
    both = (there[:, :32, :32].mean((1, 2)) > 0.1) & (there[:, 32:, 32:].mean((1, 2)) > 0.1)  # (20,)
    print(f"base model: with “small”, {times:.2f} times the pixels of the object (0.39 if it knew the word); ", end="")
    print(f"both of two objects in {both.float().mean():.0%} of the pictures")


def run(pipe, judge, out, subjects):
    table = out / "editing.csv"
    rows = list(csv.DictReader(open(table, encoding="utf-8"))) if table.exists() else []
    for name in subjects:
        for number in (1, 2):
            subject = SubjectPicture(FOLDER, name, number, pipe.resolution)
            picture = f"{name}/{number:02}"
            done = {row["adapter"] for row in rows if row["picture"] == picture}
            for adapter in [adapter for adapter in ADAPTERS if adapter not in done]:
                new = rows_of(pipe, judge, subject, number, adapter, out)
                rows += [{"picture": picture, **row} for row in new]
                write(table, rows)
                print(picture, adapter, flush=True)
    return rows


def write(path, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def report(rows):
    """Means over the subjects' pictures, each with its standard deviation from subject to subject."""
    print(f"{'':36}" + "".join(f"{edit:^24}" for edit in ("same", "background", "place")) + " other")
    for adapter in dict.fromkeys(row["adapter"] for row in rows):
        line = f"{adapter:36}"
        for edit in ("same", "background", "place", "other"):
            own = [row for row in rows if (row["adapter"], row["edit"]) == (adapter, edit)]
            line += "  ".join(spread(own, column) for column in ("follows", "kept")) + "  "
        print(line)


def spread(rows, column):
    of = {row["picture"]: [] for row in rows}
    for row in rows:
        of[row["picture"]] += [float(row[column])] if row[column] else []
    means = torch.tensor([sum(values) / len(values) for values in of.values() if values])  # (pictures,)
    return f"{means.mean():.2f} ± {means.std():.2f}" if len(means) else ""


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters and editing.csv")
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=list(SUBJECTS))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_folder(args.weights)
    judge = load_judge(args.weights / "judge")
    report(run(pipe, judge, args.out, args.subjects))
    outside(pipe)


if __name__ == "__main__":
    main()
