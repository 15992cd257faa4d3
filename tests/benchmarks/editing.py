"""Editing, measured (Fig. 4–6): does the edit happen, is the subject kept, is the rest of the model unharmed?

    python tests/benchmarks/editing.py --out runs/editing       (about 2 minutes of a CPU core for each subject)

Trains on picture 02 of each subject, which leaves room to move and for a second thing, and draws every kind of edit
with every adapter. Writes editing.csv and the adapters into --out; what is there already is not done again. Lesson 7
reads lessons/data/editing.csv.
"""

import argparse
import csv
from pathlib import Path

from dit.cli import TINY
from dit.edit import draw
from dit.pictures import to_tensor
from dit.pipeline import Pipeline
from dit.tiny.editing import SubjectPicture, follows
from dit.tiny.judge import captions_to_judge, load_judge, right
from dit.tiny.subjects import SUBJECTS
from dit.train import TrainConfig, teach
from sparsecode.common import replacing

FOLDER = Path(__file__).parent.parent.parent / "lessons" / "data" / "subjects"
COLUMNS = ("picture", "adapter", "lr", "epochs", "edit", "pictures", "follows", "kept")
SEEDS, STEPS = (0,), 10  # of the sampler
OTHERS = 16  # captions of other things

# In parameters, 64 sparse atoms equal LoRA with r = 16. Both are trained with several learning rates and lengths, so
# that they can be compared at equal fidelity too.
RUNS = [(0.003, 15), (0.003, 50), (0.01, 15)]  # (lr, epochs)
ADAPTERS = {
    "LoRA, r 16": ({"method": "lora"}, [{}], RUNS),
    "sparse, M 64": ({"atoms": 64, "density": 0.08}, [{}], RUNS),
    "sparse": ({"atoms": 256, "density": 0.02}, [{}, {"density": [0.01, 0.04]}, {"keep_atoms": [40]}], [(0.003, 50)]),
}


def rows_of(pipe, judge, subject, name, lr, epochs, out):
    """All rows about one subject and one training, in all ways to draw with it."""
    how, ways, _ = ADAPTERS.get(name, (None, [{}], None))
    file = None
    if how is not None:
        words = f"{subject.name}-{name}-{lr}-{epochs}".replace(",", "").replace(" ", "-")
        file = out / f"{words}.safetensors"
        config = TrainConfig.of(pipe, lr=lr, lr_schedule="constant", epochs=epochs, **how)
        teach(pipe, [subject.file], [subject.caption], file, config)
    edits = [edit for i, edit in enumerate(subject.edits()) if i % 2 == 0 or edit.kind == "size"]  # half the time
    scenes, captions = captions_to_judge(OTHERS, withheld=False)
    prompts = [subject.caption, *(edit.prompt for edit in edits), *captions]
    for way in ways:
        for label, drawn in draw(pipe, prompts, pipe.noise(SEEDS), name, file, steps=STEPS, **way):
            rows = [measure(judge, subject, to_tensor(drawn[edit.prompt]), edit) for edit in (subject.same, *edits)]
            hits = [right(judge, drawn[text], [scene] * len(SEEDS)) for text, scene in zip(captions, scenes)]
            share = sum(each["joint"].float().mean().item() for each in hits) / OTHERS
            rows += [{"edit": "other", "pictures": len(SEEDS) * OTHERS, "follows": f"{share:.3f}", "kept": ""}]
            yield from ({"adapter": label, "lr": lr, "epochs": epochs, **row} for row in rows)


def measure(judge, subject, images, edit):
    """One row of the table: an edit, its share of pictures that follow it, and how much of the subject they keep."""
    hits, kept = follows(judge, images, edit), subject.kept(images, edit.place, edit.size)  # (B,) each
    share, mean = hits.float().mean().item(), kept.mean().item()
    return {"edit": edit.kind, "pictures": len(images), "follows": f"{share:.3f}", "kept": f"{mean:.3f}"}


def run(pipe, judge, out, subjects):
    table = out / "editing.csv"
    rows = list(csv.DictReader(open(table, encoding="utf-8"))) if table.exists() else []
    work = [("base model", "", "")] + [(name, *r) for name, (_, _, runs) in ADAPTERS.items() for r in runs]
    for name in subjects:
        subject = SubjectPicture(FOLDER, name, 2, pipe.resolution)
        done = {(row["adapter"], row["lr"], row["epochs"]) for row in rows if row["picture"] == name}
        for task in [task for task in work if tuple(map(str, task)) not in done]:
            rows += [{"picture": name, **row} for row in rows_of(pipe, judge, subject, *task, out)]
            write(table, rows)
            print(name, *task, flush=True)
    return rows


def write(path, rows):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, COLUMNS)
        table.writeheader()
        table.writerows(rows)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="folder for the adapters and editing.csv")
    parser.add_argument("--weights", type=Path, default=TINY)
    parser.add_argument("--subjects", nargs="+", choices=SUBJECTS, default=["robot", "owl", "cat"])
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_folder(args.weights)
    run(pipe, load_judge(args.weights / "judge"), args.out, args.subjects)


if __name__ == "__main__":
    main()
