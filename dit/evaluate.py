"""Train every method on every subject, draw each prompt, score the pictures: Tables 1 and 2, Fig. 7 (§4.3, §4.4).

    python -m dit.evaluate --subjects lessons/data/subjects --quick
    torchrun --nproc-per-node 2 -m dit.evaluate --subjects lessons/data/subjects --densities 0.02 0.04

`--subjects` has DreamBooth's layout: prompts_and_classes.txt beside a folder of pictures for each subject. Sparse
adapters are trained at each density with the first number of atoms, and at each number of atoms with the first density.
With several --lrs, each method uses the one with the highest alignment + fidelity on the subjects of --tune-on; the
table leaves these subjects out. Writes table.md, table.csv, results.csv and plots into --out, and a result and an
adapter for each training. Finished trainings are skipped; `torchrun` divides the rest among its processes.
"""

import json
from contextlib import nullcontext
from dataclasses import fields, replace
from pathlib import Path

from dit import parallel
from dit.cli import Parser, add_model_arguments, check_place, load_pipeline, number, positive, run, seed, whole
from dit.dreambooth import read_subjects
from dit.metrics import CLIP, DINOv2, ImageReward
from dit.report import write_report
from dit.study import Study, StudyConfig
from dit.train import TrainConfig, files_checksum
from sparsecode.attach import METHODS
from sparsecode.common import UserError, locked, read_json, replacing

QUICK = {"epochs": 1, "pictures": 1, "steps": 4}


def parse(argv=None):
    parser = Parser(prog="python -m dit.evaluate", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--subjects", type=Path, required=True, help="folder of subjects, with DreamBooth's prompts_and_classes.txt")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS), help="methods to compare (default: all)")
    add("--densities", type=float, nargs="+", default=[0.02, 0.04], help="ρ of sparse adapters (default: 0.02 0.04)")
    add("--atoms", type=whole, nargs="+", default=[256], help="M of sparse adapters (default: 256)")
    add("--lrs", type=positive, nargs="+", help="learning rates to choose from (default: the model's own)")
    add("--tune-on", nargs="+", default=[], metavar="NAME", help="subjects to choose the learning rate on")
    add("--seeds", type=seed, nargs="+", default=[0], help="one training for each seed (default: 0)")
    add("--epochs", type=whole, default=15, help="epochs of each training (default: 15, as in the paper)")
    add("--pictures", type=whole, default=5, help="pictures of each prompt (default: 5)")
    add("--steps", type=whole, default=20, help="steps of the sampler (default: 20)")
    add("--guidance", type=number, help="guidance scale (default: the model's own)")
    add("--gradient-checkpointing", action="store_true", help="save memory; takes about a third more time")
    add("--clip", type=Path, help="folder of a CLIP in transformers' layout (default: WEIGHTS/clip)")
    add("--dino", type=Path, help="folder of a DINOv2, for diversity (default: use CLIP)")
    add("--image-reward", type=Path, help="folder of ImageReward; adds its column (default: none)")
    add("--out", type=Path, default=Path("runs/evaluate"), help="folder for the results (default: runs/evaluate)")
    add("--quick", action="store_true", help="two subjects, two prompts, and by default 1 epoch, 1 picture, 4 steps")
    args = parser.parse_args(argv)
    if args.quick:
        parser.set_defaults(**QUICK)
        args = parser.parse_args(argv)
    check_place(args.out)
    args.clip = args.clip or args.weights / "clip"
    return args


def study_config(args, pipe):
    given = {f.name: getattr(args, f.name) for f in fields(StudyConfig)}
    given["lrs"] = args.lrs or [TrainConfig.of(pipe).lr]
    return StudyConfig(**{name: tuple(value) if isinstance(value, list) else value for name, value in given.items()})


def check_tuning(args, subjects):
    names = [subject.name for subject in subjects]
    if unknown := [name for name in args.tune_on if name not in names]:
        raise UserError(f"--tune-on {unknown[0]}: there is no such subject; choose from {', '.join(names)}")
    if (len(args.lrs or [0]) > 1) != bool(args.tune_on):
        raise UserError("--tune-on and several --lrs belong together; give both or neither")
    if len(args.tune_on) == len(names):
        raise UserError("--tune-on names every subject; leave some for the table")


def make_small(subjects, tune_on):
    """Two subjects besides those of --tune-on, and two prompts."""
    counted = [subject.name for subject in subjects if subject.name not in tune_on]
    subjects = [subject for subject in subjects if subject.name in counted[:2] + tune_on]
    return [replace(subject, prompts=subject.prompts[:2], texts=subject.texts[:2]) for subject in subjects]


def check_out(study, args):
    """UserError unless earlier results in the folder are from the same models (by checksum) and settings."""
    folders = {"weights": args.weights / "transformer", "clip": args.clip, "dino": args.dino,
               "image_reward": args.image_reward}  # fmt: skip
    now = {name: f"of checksum {files_checksum(folder)}" if folder else "None" for name, folder in folders.items()}
    now |= {name: str(getattr(study.config, name)) for name in ("epochs", "pictures", "steps", "guidance")}
    now["quick"] = str(args.quick)
    file = study.folder / "settings.json"
    old = [path for path in study.folder.iterdir() if not path.name.startswith(".")]
    if old and not file.exists():
        raise UserError(f"--out {study.folder} holds other files ({old[0].name}); name a new or empty folder")
    then = read_json(file) if old else now
    if then.keys() != now.keys():
        raise UserError(f"--out {study.folder} holds other files ({file.name}); name a new or empty folder")
    for name, value in now.items():
        added = name == "image_reward" and "None" in (then[name], value)  # an optional column
        if then[name] != value and not added:
            option = f"--{name.replace('_', '-')}"
            raise UserError(f"{study.folder} holds results with {option} {then[name]}, not {value}; use another --out")
    parallel.wait()  # until all have checked
    if parallel.rank() == 0:
        study.sweep()
        with replacing(file) as temporary:
            kept = {"image_reward": then["image_reward"]} if now["image_reward"] == "None" else {}
            temporary.write_text(json.dumps(now | kept, indent=1) + "\n")


def main(argv=None):
    args = parse(argv)
    subjects = read_subjects(args.subjects)
    check_tuning(args, subjects)
    parallel.start()
    pipe = load_pipeline(args)
    clip = CLIP(args.clip, pipe.device)
    dino = DINOv2(args.dino, pipe.device) if args.dino else None
    reward = ImageReward(args.image_reward, pipe.device) if args.image_reward else None
    if args.quick:
        subjects = make_small(subjects, args.tune_on)
    study = Study(pipe, subjects, study_config(args, pipe), args.out, clip=clip, dino=dino, image_reward=reward)
    study.check()
    with locked(args.out) if parallel.rank() == 0 else nullcontext():
        parallel.wait()  # until the folder is there
        check_out(study, args)
        pipe.free("transformer", "vae")  # T5 needs the memory
        pipe.remember(["", *(text for s in subjects for text in s.captions + s.prompts)])
        jobs = study.jobs(study.tune())
        study.run(jobs)
        if parallel.rank() == 0:
            print(write_report(study, jobs), end="")


if __name__ == "__main__":
    run(main)
