"""A study's records -> table.md, table.csv, results.csv, and plots of them (Tables 1 and 2, Fig. 7)."""

import csv
import math
import statistics

from dit.pictures import draw_table, open_picture, save_figure, square
from dit.study import SCORES, Setting, spread
from sparsecode.common import replacing

LEFT_OUT = "ImageReward is left out: add --image-reward FOLDER (weights/README.md says what it holds)."


def scores_in(records):
    """The names of the scores that all records have."""
    return [score for score in SCORES if all(record.get(score) is not None for record in records)]


def summarise(records):
    """A dict for each setting: scores averaged over subjects, then mean and standard deviation over training seeds."""
    groups = {}
    for record in records:
        groups.setdefault(Setting.of(record), {}).setdefault(record["seed"], []).append(record)
    rows = []
    for setting, seeds in groups.items():
        first = next(iter(seeds.values()))[0]
        row = {"setting": setting, "lr": first["lr"], "parameters": first["parameters"]}
        for score in scores_in(records):
            means = [statistics.mean(record[score] for record in group) for group in seeds.values()]  # (seeds,)
            row[score] = statistics.mean(means)
            row[f"{score}_std"] = statistics.stdev(means) if len(means) > 1 else None
        rows.append(row)
    return rows


def compare(records, score, one, other):
    """Mean and standard error of score(one) − score(other) over pairs of trainings with equal subject and seed."""
    values = {(Setting.of(r), r["subject"], r["seed"]): r[score] for r in records}
    gaps = [value - values[(other, *key[1:])] for key, value in values.items() if key[0] == one]
    return statistics.mean(gaps), statistics.stdev(gaps) / math.sqrt(len(gaps))


def to_markdown(rows):
    scores = scores_in(rows)
    head = ["", "lr", "parameters", *scores, *(f"paper: {score}" for score in scores)]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [str(row["setting"]), "" if row["lr"] is None else f"{row['lr']:g}", f"{row['parameters']:,}"]
        for score in scores:
            deviation = row[f"{score}_std"]
            cells.append(f"{row[score]:.3f}" + ("" if deviation is None else f" ± {deviation:.3f}"))
        paper = dict(zip(SCORES, row["setting"].paper or ()))
        cells += [f"{paper[score]:.3f}" if score in paper else "" for score in scores]
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines if "image_reward" in scores else [*lines, "", LEFT_OUT]) + "\n"


def write_rows(rows, path):
    with replacing(path) as temporary, open(temporary, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, rows[0].keys())
        writer.writeheader()
        writer.writerows(rows)


def read_results(path):
    """The records that `write_rows` wrote into results.csv."""
    kinds = {"subject": str, "method": str, "atoms": int, "seed": int, "parameters": int, "checksum": int}
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
    """The scores against "density" or "atoms": ours (left axis), and the paper's where it has them (right)."""
    from matplotlib.figure import Figure

    scores = scores_in(rows)
    rows = sorted(rows, key=lambda row: getattr(row["setting"], name))
    x = [getattr(row["setting"], name) for row in rows]
    figure = Figure(figsize=(10 / 3 * len(scores), 3.2), layout="constrained")
    for axes, score in zip(figure.subplots(1, len(scores)), scores):
        i = SCORES.index(score)
        y, deviations = [row[score] for row in rows], [row[f"{score}_std"] or 0 for row in rows]
        axes.errorbar(x, y, deviations, marker="o", capsize=2)
        axes.set(xscale="log", xlabel={"density": "density ρ", "atoms": "atoms M"}[name], title=score)
        axes.set_xticks(x, [f"{value:g}" for value in x], fontsize=8)
        axes.minorticks_off()
        axes.tick_params(axis="y", colors="tab:blue")
        paper = [(value, row["setting"].paper[i]) for value, row in zip(x, rows) if i < len(row["setting"].paper or ())]
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


def write_report(study, jobs):
    """Write tables and plots into the study's folder; return the table as Markdown."""
    config, out = study.config, study.folder
    records = [study.record(job) for job in jobs]
    rows = summarise(records)
    write_rows([flat(row) for row in rows], out / "table.csv")
    write_rows(records, out / "results.csv")
    text = to_markdown(rows)
    with replacing(out / "table.md") as temporary:
        temporary.write_text(text, encoding="utf-8")
    plot_methods(rows, out / "methods.png")
    sparse = [row for row in rows if row["setting"].method == "sparse"]
    if len(config.densities) > 1 and sparse:
        swept = [row for row in sparse if row["setting"].atoms == config.atoms[0]]
        plot_sweep(swept, "density", out / "density.png", f"the density ρ, M = {config.atoms[0]} (Fig. 7)")
    if len(config.atoms) > 1 and sparse:
        swept = [row for row in sparse if row["setting"].density == config.densities[0]]
        plot_sweep(swept, "atoms", out / "atoms.png", f"the number of atoms, ρ = {config.densities[0]:g} (Table 2)")
    first = [job for job in jobs if job.subject is jobs[0].subject and job.seed in (config.seeds[0], None)]
    shown = list({job.setting: job for job in first}.values())  # without duplicates, even if --seeds has some
    draw_table(picture_rows(study, shown), out / "pictures.png", "the same noise, each setting")
    return text


def flat(row):
    s = row["setting"]
    rest = {name: value for name, value in row.items() if name != "setting"}
    return {"method": s.method, "atoms": s.atoms, "density": s.density} | rest
