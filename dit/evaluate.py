"""Teach every subject by every method, draw each prompt, and score the pictures: Tables 1 and 2, Fig. 7 (§4.3, §4.4).

    python -m dit.evaluate --subjects lessons/data/subjects --quick
    torchrun --nproc-per-node 2 -m dit.evaluate --subjects lessons/data/subjects --densities 0.02 0.04

`--subjects` is a folder as DreamBooth's: prompts_and_classes.txt beside a folder of pictures for each subject. Sparse
adapters are trained at each density with the first number of atoms, and at each number of atoms with the first density.
With several --lrs each method takes the one whose alignment + fidelity is highest on the subjects of --tune-on, which
then do not count. Writes table.md, table.csv, results.csv and plots into --out, and a result and an adapter for each
training: what is there is not done again, and `torchrun` shares out what is left.
"""

import csv
import json
import math
import re
import statistics
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image
from tqdm import tqdm

from dit import parallel
from dit.cli import Parser, add_model_arguments, load_pipeline, positive, run, seed, whole
from dit.data import find_captions, find_pictures
from dit.diffusion import sampling_timesteps
from dit.metrics import CLIP, DINOv2, alignment, fidelity, vendi_score
from dit.pictures import draw_table, open_picture, save_figure, save_picture, square
from dit.train import Diverged, TrainConfig, teach
from sparsecode import adapters, attach, detach, load_adapter, trainable
from sparsecode.attach import METHODS
from sparsecode.common import UserError, replacing

SCORES = ("alignment", "diversity", "fidelity")
PROMPTS = "prompts_and_classes.txt"
TOKEN = "sks"  # names a subject whose pictures have no captions
LIVE = ("cat", "dog")  # classes of DreamBooth's live subjects, which have prompts of their own
QUICK = {"epochs": 1, "pictures": 1, "steps": 4}
SHOWN = 7  # pictures of a setting in pictures.png

# Alignment, diversity, fidelity of Tables 1 and 2; Table 2 is at ρ = 0.01.
PAPER = {
    ("lora", None, None): (0.218, 4.707, 0.711),
    ("dora", None, None): (0.213, 4.540, 0.712),
    ("oft", None, None): (0.190, 3.926, 0.663),
    ("sparse", 256, 0.02): (0.235, 5.205, 0.702),
    ("sparse", 256, 0.04): (0.231, 5.172, 0.713),
    ("sparse", 16, 0.01): (0.248, 5.867, 0.547),
    ("sparse", 256, 0.01): (0.249, 4.341, 0.650),
    ("sparse", 1024, 0.01): (0.241, 3.733, 0.672),
    ("sparse", 2048, 0.01): (0.238, 3.525, 0.692),
}


# ---- subjects ---------------------------------------------------------------------------------------------------


@dataclass
class Subject:
    """Pictures of one thing, their captions, the prompts to draw, and these without its token, as CLIP is to read."""

    name: str
    files: list
    captions: list
    prompts: list
    texts: list


def sentence(template, token, kind):
    """DreamBooth's template with {0} and {1} filled in; an empty token leaves no gap, and "a owl" becomes "an owl"."""
    words = " ".join(template.replace("{0}", token).replace("{1}", kind).split())
    return re.sub(r"\ba (?=[aeiou])", "an ", words)


def read_prompts(path):
    """DreamBooth's prompts_and_classes.txt: {subject: class}, templates for objects, templates for live subjects."""
    try:
        text = path.read_text(encoding="utf-8")
    except (FileNotFoundError, UnicodeDecodeError):
        raise UserError(f"{path} is no text file; DreamBooth's list of classes and prompts belongs there") from None
    classes = dict(re.findall(r"^([\w-]+),([\w -]+?)\s*$", text.partition("Prompts")[0], re.MULTILINE))
    classes.pop("subject_name", None)
    lists = re.findall(r"(Object|Live Subject) Prompts\s+prompt_list = \[(.*?)\]", text, re.DOTALL)
    templates = {name: re.findall(r"""(["'])(.*?)\1\.format\(""", body) for name, body in lists}
    templates = {name: [words for _, words in found] for name, found in templates.items()}
    if not classes or not templates.get("Object"):
        raise UserError(f"{path} lists no classes or no prompts; write them as DreamBooth's file does")
    return classes, templates["Object"], templates.get("Live Subject") or templates["Object"]


def read_subjects(folder):
    """Every subject that has pictures in `folder`. Pictures without captions of their own are "a sks <class>"."""
    classes, objects, live = read_prompts(folder / PROMPTS)
    subjects = []
    for path in sorted(p for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")):
        if path.name not in classes:
            raise UserError(f"{folder / PROMPTS} names no class for {path.name}; add a line {path.name},<class>")
        kind, files = classes[path.name], find_pictures([path])
        own = any(file.with_suffix(".txt").exists() for file in files) or (path / "metadata.jsonl").exists()
        token = "" if own else TOKEN
        captions = find_captions(files, None if own else sentence("a {0} {1}", token, kind))
        templates = live if kind in LIVE else objects
        prompts, texts = ([sentence(t, word, kind) for t in templates] for word in (token, ""))
        subjects.append(Subject(path.name, files, captions, prompts, texts))
    if not subjects:
        raise UserError(f"{folder} holds no folders of pictures; make one for each subject")
    return subjects


# ---- settings and jobs ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Setting:
    """A method with what is varied of it; "base" is the model as it is."""

    method: str
    atoms: int | None = None
    density: float | None = None

    @property
    def options(self):
        return {"atoms": self.atoms, "density": self.density} if self.method == "sparse" else {}

    @property
    def paper(self):
        return PAPER.get((self.method, self.atoms, self.density))

    def __str__(self):
        return f"sparse, M {self.atoms}, ρ {self.density:g}" if self.method == "sparse" else self.method


@dataclass
class Job:
    """One training, all its pictures, and their scores."""

    setting: Setting
    subject: Subject
    lr: float | None
    seed: int | None

    @property
    def name(self):
        s = self.setting
        parts = [self.subject.name, s.method, *(f"{value:g}" for value in s.options.values())]
        return "-".join(parts if s.method == "base" else [*parts, f"lr{self.lr:g}", f"seed{self.seed}"])


def all_settings(args):
    sparse = [(args.atoms[0], density) for density in args.densities]
    sparse += [(atoms, args.densities[0]) for atoms in args.atoms[1:]]
    found = [Setting("base")]
    for method in args.methods:
        found += [Setting(method, *pair) for pair in sparse] if method == "sparse" else [Setting(method)]
    return list(dict.fromkeys(found))


def tune(study, args):
    """The learning rate of each method: {method: lr}, tried at its first setting on the subjects of --tune-on."""
    firsts = {}
    for setting in all_settings(args)[1:]:
        firsts.setdefault(setting.method, setting)
    if len(args.lrs) == 1:
        return dict.fromkeys(firsts, args.lrs[0])
    held_out = [subject for subject in study.subjects if subject.name in args.tune_on]
    tries = {(method, lr): [Job(setting, subject, lr, args.seeds[0]) for subject in held_out]
             for method, setting in firsts.items() for lr in args.lrs}  # fmt: skip
    study.run([job for jobs in tries.values() for job in jobs], "tuning", may_diverge=True)
    scores = {key: statistics.mean(map(study.worth, jobs)) for key, jobs in tries.items()}
    rates = {method: max(args.lrs, key=lambda lr: scores[method, lr]) for method in firsts}
    if parallel.rank() == 0:
        for method, best in rates.items():
            tried = ", ".join(f"{lr:g}: {scores[method, lr]:.3f}" for lr in args.lrs)
            print(f"{method}: learning rate {best:g} (alignment + fidelity on {', '.join(args.tune_on)}: {tried})")
    return rates


class Study:
    """A folder of results, and what it takes to add to it."""

    def __init__(self, pipe, clip, dino, subjects, args):
        self.pipe, self.clip, self.dino, self.subjects, self.args = pipe, clip, dino, subjects, args
        self.folder = args.out / "results"

    def file(self, job, suffix="json"):
        return self.folder / f"{job.name}.{suffix}"

    def record(self, job):
        return json.loads(self.file(job).read_text())

    def worth(self, job):
        """What a learning rate is chosen by. One that diverged is worth nothing."""
        record = self.record(job)
        return -math.inf if record["alignment"] is None else record["alignment"] + record["fidelity"]

    def is_done(self, job, may_diverge):
        return self.file(job).exists() and (may_diverge or self.record(job)["alignment"] is not None)

    def run(self, jobs, title, may_diverge=False):
        """Do those that are not done, every process its share."""
        todo = [job for job in jobs if not self.is_done(job, may_diverge)]
        parallel.wait()  # until all have looked, since the first to begin will soon be done with one
        share = todo[parallel.rank() :: parallel.world_size()]
        bar = tqdm(share, title, disable=parallel.bar_off())
        with parallel.alone():
            for job in bar:
                self.do(job, may_diverge)
        parallel.wait()

    def do(self, job, may_diverge):
        subject, args, model = job.subject, self.args, self.pipe.transformer
        record = {"subject": subject.name, "method": job.setting.method, "atoms": job.setting.atoms,
                  "density": job.setting.density, "lr": job.lr, "seed": job.seed}  # fmt: skip
        try:
            if job.setting.method != "base":
                file = args.out / "adapters" / f"{job.name}.safetensors"
                config = TrainConfig.of(self.pipe, method=job.setting.method, **job.setting.options, lr=job.lr,
                                        seed=job.seed, epochs=args.epochs,
                                        gradient_checkpointing=args.gradient_checkpointing)  # fmt: skip
                teach(self.pipe, subject.files, subject.captions, file, config)
                load_adapter(model, file)
            record["parameters"] = sum(p.numel() for p in trainable(model)) if adapters(model) else 0
            pictures = self.draw(subject.prompts)
            detach(model)
            self.save_strip(job, pictures)
            record |= self.score(subject, pictures)
        except Diverged:
            if not may_diverge:
                raise
            detach(model)
            record |= dict.fromkeys(SCORES)
        with replacing(self.file(job)) as temporary:
            temporary.write_text(json.dumps(record) + "\n")

    def draw(self, prompts):
        """`--pictures` pictures of each prompt, from noise that is the same for every job."""
        every = [prompt for prompt in prompts for _ in range(self.args.pictures)]
        noise = self.pipe.noise(range(len(every)))  # (n, 4, h, w)
        return self.pipe.generate(every, latents=noise, steps=self.args.steps, guidance=self.args.guidance)

    def score(self, subject, pictures):
        vectors = self.clip.images(pictures)  # (n, C)
        texts = self.clip.texts(subject.texts).repeat_interleave(self.args.pictures, 0)  # (n, C)
        originals = self.clip.images([square(open_picture(f), self.pipe.resolution) for f in subject.files])  # (m, C)
        different = self.dino.images(pictures) if self.dino else vectors
        scores = alignment(vectors, texts), vendi_score(different), fidelity(vectors, originals)
        return dict(zip(SCORES, scores))

    def save_strip(self, job, pictures):
        """One picture for each of some prompts, side by side, for pictures.png."""
        strip = np.concatenate([np.asarray(picture) for picture in spread(pictures[:: self.args.pictures])], axis=1)
        save_picture(Image.fromarray(strip), self.file(job, "png"))


# ---- tables and plots -------------------------------------------------------------------------------------------


def setting_of(record):
    return Setting(record["method"], record["atoms"], record["density"])


def summarise(records):
    """A row for each setting: every score's mean over subjects, then mean and deviation over the training seeds."""
    groups = {}
    for record in records:
        groups.setdefault(setting_of(record), {}).setdefault(record["seed"], []).append(record)
    rows = []
    for setting, seeds in groups.items():
        first = next(iter(seeds.values()))[0]
        row = {"setting": setting, "lr": first["lr"], "parameters": first["parameters"]}
        for score in SCORES:
            means = [statistics.mean(record[score] for record in group) for group in seeds.values()]  # (seeds,)
            row[score] = statistics.mean(means)
            row[f"{score}_std"] = statistics.stdev(means) if len(means) > 1 else None
        rows.append(row)
    return rows


def compare(records, score, one, other):
    """Mean of score(one) − score(other) over the trainings that differ in nothing else, and its standard error."""
    values = {(setting_of(r), r["subject"], r["seed"]): r[score] for r in records}
    gaps = [value - values[(other, *key[1:])] for key, value in values.items() if key[0] == one]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def to_markdown(rows):
    head = ["", "lr", "parameters", *SCORES, *(f"paper: {score}" for score in SCORES)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["setting"]), "" if row["lr"] is None else f"{row['lr']:g}", f"{row['parameters']:,}"]
        for score in SCORES:
            deviation = row[f"{score}_std"]
            cells.append(f"{row[score]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}"))
        cells += [f"{value:.3f}" for value in row["setting"].paper or ()] or ["", "", ""]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def write_rows(rows, path):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_results(path):
    """The records that `write_rows` wrote into results.csv."""
    kinds = {"subject": str, "method": str, "atoms": int, "seed": int, "parameters": int}
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: kinds.get(name, float)(text) if text else None for name, text in row.items()}
                for row in csv.DictReader(file)]  # fmt: skip


def plot_methods(rows, path):
    """Alignment against fidelity, a point for each setting; the upper right is best."""
    from matplotlib import colormaps
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axes = figure.subplots()
    for i, row in enumerate(rows):
        wide, high = (row[f"{score}_std"] or 0 for score in ("fidelity", "alignment"))
        look = {"fmt": "o" if row["setting"].method == "sparse" else "s", "color": colormaps["tab20"](i % 20)}
        axes.errorbar(row["fidelity"], row["alignment"], high, wide, capsize=2, label=row["setting"], **look)
    axes.set(xlabel="fidelity: cosine with the pictures of the subject", ylabel="alignment: cosine with the prompt",
             title="what is learned of the subject, and what the prompt has to say")  # fmt: skip
    figure.legend(loc="outside right center", fontsize=8)
    save_figure(figure, path)


def plot_sweep(rows, name, path, title):
    """The three scores against "density" or "atoms": ours (left axis), and the paper's where it has them (right)."""
    from matplotlib.figure import Figure

    rows = sorted(rows, key=lambda row: getattr(row["setting"], name))
    x = [getattr(row["setting"], name) for row in rows]
    figure = Figure(figsize=(10, 3.2), layout="constrained")
    for i, (axes, score) in enumerate(zip(figure.subplots(1, 3), SCORES)):
        y, deviations = [row[score] for row in rows], [row[f"{score}_std"] or 0 for row in rows]
        axes.errorbar(x, y, deviations, marker="o", capsize=2)
        axes.set(xscale="log", xlabel={"density": "density ρ", "atoms": "atoms M"}[name], title=score)
        axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(axis="y", colors="tab:blue")
        paper = [(value, row["setting"].paper[i]) for value, row in zip(x, rows) if row["setting"].paper]
        if paper:
            right = axes.twinx()
            right.plot(*zip(*paper), "s--", color="tab:gray", label="the paper's")
            right.tick_params(axis="y", colors="tab:gray")
    figure.suptitle(title)
    save_figure(figure, path)


def picture_rows(study, jobs):
    """What the jobs of one subject drew, for `draw_table`."""
    subject, side = jobs[0].subject, study.pipe.resolution
    prompts = spread(subject.prompts)
    originals = [[square(open_picture(file), side)] for file in subject.files]
    rows = [("training pictures (not of these prompts)", dict(zip(prompts, originals)))]
    for job in jobs:
        strip = open_picture(study.file(job, "png"))
        pictures = [[strip.crop((x, 0, x + side, side))] for x in range(0, strip.width, side)]
        rows.append((str(job.setting), dict(zip(prompts, pictures))))
    return rows


def spread(items):
    """Up to SHOWN of them, evenly from all."""
    return items[:: math.ceil(len(items) / SHOWN)]


def write_tables(study, jobs, args):
    records = [study.record(job) for job in jobs]
    rows = summarise(records)
    write_rows([flat(row) for row in rows], args.out / "table.csv")
    write_rows(records, args.out / "results.csv")
    text = to_markdown(rows)
    with replacing(args.out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    plot_methods(rows, args.out / "methods.png")
    sparse = [row for row in rows if row["setting"].method == "sparse"]
    if len(args.densities) > 1 and sparse:
        swept = [row for row in sparse if row["setting"].atoms == args.atoms[0]]
        plot_sweep(swept, "density", args.out / "density.png", f"the density ρ, M = {args.atoms[0]} (Fig. 7)")
    if len(args.atoms) > 1 and sparse:
        swept = [row for row in sparse if row["setting"].density == args.densities[0]]
        plot_sweep(swept, "atoms", args.out / "atoms.png", f"the number of atoms, ρ = {args.densities[0]:g} (Table 2)")
    first = [job for job in jobs if job.subject is jobs[0].subject and job.seed in (args.seeds[0], None)]
    shown = list({job.setting: job for job in first}.values())  # each once, also where --seeds names one twice
    draw_table(picture_rows(study, shown), args.out / "pictures.png", "the same noise, each setting")
    print(text, end="")


def flat(row):
    s = row["setting"]
    rest = {name: value for name, value in row.items() if name != "setting"}
    return {"method": s.method, "atoms": s.atoms, "density": s.density} | rest


# ---- the command ------------------------------------------------------------------------------------------------


def parse(argv=None):
    parser = Parser(prog="python -m dit.evaluate", description=__doc__.splitlines()[0])
    add_model_arguments(parser)
    add = parser.add_argument
    add("--subjects", type=Path, required=True, help="folder of subjects, with DreamBooth's prompts_and_classes.txt")
    add("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    add("--densities", type=float, nargs="+", default=[0.02, 0.04], help="ρ of sparse adapters")
    add("--atoms", type=whole, nargs="+", default=[256], help="M of sparse adapters")
    add("--lrs", type=positive, nargs="+", help="learning rates to choose from (the model's own)")
    add("--tune-on", nargs="+", default=[], metavar="NAME", help="subjects that the learning rate is chosen on")
    add("--seeds", type=seed, nargs="+", default=[0], help="of training: one each")
    add("--epochs", type=whole, default=15, help="(the paper's 15)")
    add("--pictures", type=whole, default=5, help="of each prompt")
    add("--steps", type=whole, default=20, help="of the sampler")
    add("--guidance", type=float, help="strength of the prompt (the model's default)")
    add("--gradient-checkpointing", action="store_true", help="less memory for about a third more time")
    add("--clip", type=Path, help="folder of a CLIP in transformers' layout (the tiny model's own)")
    add("--dino", type=Path, help="folder of a DINOv2, for diversity (CLIP itself)")
    add("--out", type=Path, default=Path("runs/evaluate"))
    add("--quick", action="store_true", help="two subjects, two prompts, one epoch: does it run?")
    args = parser.parse_args(argv)
    if args.quick:
        for name, value in QUICK.items():
            setattr(args, name, value)
    args.clip = args.clip or args.weights / "clip"
    return args


def check(args, subjects, pipe):
    """Refuse what would fail after hours; fill in the learning rate."""
    names = [subject.name for subject in subjects]
    if unknown := [name for name in args.tune_on if name not in names]:
        raise UserError(f"--tune-on {unknown[0]}: there is no such subject; choose of {', '.join(names)}")
    if (len(args.lrs or [0]) > 1) != bool(args.tune_on):
        raise UserError("--tune-on and several --lrs belong together; give both or neither")
    if len(args.tune_on) == len(names):
        raise UserError("--tune-on names every subject; leave some for the table")
    args.lrs = args.lrs or [TrainConfig.of(pipe).lr]
    for setting in all_settings(args)[1:]:
        attach(pipe.transformer, setting.method, **setting.options)
        detach(pipe.transformer)


def check_out(args):
    """What all results of a folder have in common must stay the same."""
    names = ("weights", "subjects", "epochs", "pictures", "steps", "guidance", "clip", "dino", "quick")
    now = {name: str(getattr(args, name)) for name in names}
    file = args.out / "settings.json"
    then = read_settings(file) if args.out.exists() and any(args.out.iterdir()) else now
    if then.keys() != now.keys():
        raise UserError(f"{args.out} holds other files; name a new or empty folder with --out")
    for name, value in now.items():
        if then[name] != value:
            raise UserError(f"{args.out} holds results with --{name} {then[name]}, not {value}; use another --out")
    parallel.wait()  # until all have looked
    if parallel.rank() == 0:
        with replacing(file) as temporary:
            temporary.write_text(json.dumps(now, indent=1) + "\n")


def read_settings(file):
    try:
        return dict(json.loads(file.read_text()))
    except (OSError, ValueError, TypeError):
        return {}


def main(argv=None):
    args = parse(argv)
    subjects = read_subjects(args.subjects)
    parallel.start()
    pipe = load_pipeline(args)
    sampling_timesteps(args.steps, pipe.schedule)  # refuses too many
    clip = CLIP(args.clip, pipe.device)
    dino = DINOv2(args.dino, pipe.device) if args.dino else None
    if args.quick:
        counted = [subject.name for subject in subjects if subject.name not in args.tune_on]
        subjects = [subject for subject in subjects if subject.name in counted[:2] + args.tune_on]
        for subject in subjects:
            subject.prompts, subject.texts = subject.prompts[:2], subject.texts[:2]
    check(args, subjects, pipe)
    check_out(args)
    pipe.encode_prompt(["", *(text for s in subjects for text in s.captions + s.prompts)])  # then T5 can go
    study = Study(pipe, clip, dino, subjects, args)
    rates = tune(study, args)
    counted = [subject for subject in subjects if subject.name not in args.tune_on]
    base, *adapted = all_settings(args)
    jobs = [Job(base, subject, None, None) for subject in counted]
    jobs += [Job(setting, subject, rates[setting.method], s)
             for s in args.seeds for subject in counted for setting in adapted]  # fmt: skip
    study.run(jobs, "customization")
    if parallel.rank() == 0:
        write_tables(study, jobs, args)


if __name__ == "__main__":
    run(main)
