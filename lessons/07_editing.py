"""Learn one picture, then ask for a changed one: does the model obey, and is the subject still there?

Claim    The paper: sparse atoms follow an edit and keep the subject better than LoRA (Fig. 5); a smaller density leaves
         the prompt more say (Fig. 6); one atom a token stays stable where LoRA of rank 1 breaks (Fig. 4). Here, over
         five subjects: the density does that. Sparse and LoRA are even where the background is to change. One atom of
         256 beats rank 1 by far, but with 64 times the parameters; with as many, LoRA is ahead. And where the subject
         is to move, all obey, but hardly any of it arrives: what was learned belongs to the place it was learned at.
Paper    §4.2, Fig. 5 and 6 (editing, density); §3.5, Fig. 4 (one atom against LoRA of rank 1); §4.1 (atoms)
Modules  dit/edit.py, dit/tiny/editing.py, dit/page.py, sparsecode/atoms.py
Costs    50 seconds on two CPU cores; 15 with --quick.

    python lessons/07_editing.py
"""

import argparse
import csv
from collections import defaultdict
from pathlib import Path
from tempfile import TemporaryDirectory

import matplotlib.pyplot as plt
import numpy as np

from dit.edit import draw
from dit.page import overlay, watch
from dit.pictures import draw_table, to_pil, to_tensor
from dit.pipeline import Pipeline
from dit.tiny.editing import SubjectPicture, follows
from dit.tiny.judge import load_judge
from dit.train import TrainConfig, teach
from sparsecode import adapters, detach, load_adapter, top_atoms

WEIGHTS = Path(__file__).parent.parent / "weights" / "tiny"
FIGURES = Path(__file__).parent / "figures"
SUBJECTS = Path(__file__).parent / "data" / "subjects"
TABLE = Path(__file__).parent / "data" / "editing.csv"  # of tests/benchmarks/editing.py
THIN = ("LoRA, r 1", "one atom of 4", "one atom of 256")
EXPECTED = {"base model": "0.06, 100 %, 0.12", "LoRA": "0.71, 89 %, 0.36", "sparse": "0.76, 78 %, 0.45",
            "sparse, density 0.01": "0.61, 89 %, 0.36", "sparse, density 0.04": "0.60, 89 %, 0.51",
            "sparse, 40 atoms": "0.19, 78 %, 0.17", "sparse, 120 atoms": "0.52, 89 %, 0.30",
            "sparse, 400 atoms": "0.75, 78 %, 0.43", "LoRA, r 1": "0.49, 100 %, 0.28",
            "one atom of 4": "0.39, 100 %, 0.21", "one atom of 256": "0.73, 78 %, 0.45"}  # fmt: skip
STAR = "a red star in the middle on a blue background"


def main(quick=False, figures=FIGURES, weights=WEIGHTS):
    figures = Path(figures)
    figures.mkdir(parents=True, exist_ok=True)
    pipe = Pipeline.from_folder(weights, device="cpu")
    judge = load_judge(Path(weights) / "judge")
    robot = SubjectPicture(SUBJECTS, "robot", 1, pipe.resolution)
    backgrounds = ("green",) if quick else ("green", "yellow", "blue")
    scenes = [(robot.caption, robot.background, robot.place)]
    scenes += [scene for scene in robot.edits() if scene[1] in backgrounds and scene[2] == robot.place]
    noise = pipe.noise(range(1 if quick else 3))  # (seeds, 4, h, w)

    with TemporaryDirectory() as folder:
        # %% 1. Five adapters on one picture: sparse and LoRA as usual, and both as thin as they can be (Fig. 4)
        training = {"LoRA": {"method": "lora"}, "sparse": {}}
        training["LoRA, r 1"] = {"method": "lora", "r": 1, "alpha": 1, "lr": 0.01}
        training["one atom of 4"] = {"atoms": 4, "density": 0.25, "lr": 0.01}  # as many parameters as LoRA, r 1
        training["one atom of 256"] = {"density": 0.004, "lr": 0.01}  # round(0.004 · 256) = 1 for each token
        files = {name: Path(folder) / f"{name}.safetensors" for name in training}
        for name, how in training.items():
            config = TrainConfig.of(pipe, epochs=10 if quick else None, **how)
            teach(pipe, [robot.file], [robot.caption], files[name], config)

        # %% 2. The same seeds with every adapter: the trained prompt, then changed ones (Fig. 5, 6)
        densities, counts = ([0.01], [40]) if quick else ([0.01, 0.04], [40, 120, 400])
        ways = [("base model", {}), ("LoRA", {"adapter": files["LoRA"]}), ("sparse", {"adapter": files["sparse"]})]
        ways += [("sparse", {"adapter": files["sparse"], "density": densities})]
        ways += [("sparse", {"adapter": files["sparse"], "keep_atoms": counts})]
        ways += [(name, {"adapter": files[name]}) for name in THIN]
        prompts = [prompt for prompt, *_ in scenes]
        drawn = {label: pictures for name, way in ways for label, pictures in draw(pipe, prompts, noise, name, **way)}

        # %% 3. Is the subject kept? Its pixels, correlated with those of the drawing. Does the picture obey the prompt?
        # The judge that ships with the tiny model sees backgrounds and places.
        picture = to_tensor(drawn["sparse"][robot.caption][:1])  # (1, 3, H, W)
        by_hand = np.corrcoef(robot.picture[:, robot.mask].flatten(), picture[0][:, robot.mask].flatten())[0, 1]
        library = robot.kept(picture, robot.place, reach=0).item()
        print(f"correlation by hand {by_hand:.4f}, library {library:.4f}; shifted to fit: ", end="")
        print(f"{robot.kept(picture, robot.place).item():.4f} (expect the first two equal)")
        scores = {}  # label -> [follows, kept] of the trained prompt, [follows, kept] of the changed ones
        for label, pictures in drawn.items():
            measured = []
            for prompt, *scene in scenes:
                images = to_tensor(pictures[prompt])  # (seeds, 3, H, W)
                hits, kept = follows(judge, images, *scene), robot.kept(images, scene[1])  # (seeds,) each
                measured.append([hits.float().mean().item(), kept.mean().item()])
            scores[label] = measured[0], np.mean(measured[1:], axis=0).tolist()
            (_, same), (obeys, changed) = scores[label]
            row = f"trained prompt: kept {same:.2f}; changed ones: followed {obeys:.0%}, kept {changed:.2f}"
            print(f"{label:20} {row} (expect {EXPECTED[label]})")

        # %% 4. Where the atoms act: S over the picture, for the trained prompt, a changed one and another subject
        load_adapter(pipe.transformer, files["sparse"])
        best = [(layer, m) for layer, m, _ in top_atoms(pipe.transformer, 40)]
        lengths = [adapters(pipe.transformer)[layer].D[m].norm().item() for layer, m in best]
        maps = {prompt: watch(pipe, prompt, noise[:1], best) for prompt in (*prompts[:2], STAR)}
        detach(pipe.transformer)

    size = {p: sum(s.abs().mean().item() * d for s, d in zip(S, lengths)) for p, (_, S) in maps.items()}
    ratio = {prompt: size[prompt] / size[robot.caption] for prompt in size}
    print(f"the 40 best atoms, against the trained prompt: {ratio[prompts[1]]:.0%} for the changed one", end=", ")
    print(f"{ratio[STAR]:.0%} for {STAR!r} (expect 85 %, 67 %)")

    # %% 5. Five subjects, all other backgrounds and places: the table of tests/benchmarks/editing.py, half an hour
    table = read_table(TABLE)
    print("five subjects, share of edits that happened and of the subject kept; and of what the model could before:")
    for label in ("base model", "LoRA, r 16", "sparse, M 64", "sparse, trained at density 0.004", "sparse",
                  "sparse, trained at density 0.1", "LoRA, r 1", "one atom, M 4", "one atom"):  # fmt: skip
        cells = [f"{edit} {np.mean(table[label, edit, 'follows']):.0%} {np.mean(table[label, edit, 'kept']):.2f}"
                 for edit in ("same", "background", "place")]  # fmt: skip
        print(f"  {label:32} {'  '.join(cells)}  before {np.mean(table[label, 'other', 'follows']):.0%}")

    draw_all(drawn, robot, figures)
    draw_maps(maps, best, figures / "07_where.png")
    draw_measured(table, figures / "07_measured.png")
    return {"by_hand": by_hand, "library": library, "scores": scores, "ratio": ratio, "table": table}


def read_table(path):
    """{(adapter, edit, "follows" or "kept"): one mean for each picture}"""
    values = defaultdict(list)
    for row in csv.DictReader(open(path, encoding="utf-8")):
        for column in ("follows", "kept"):
            if row[column]:
                values[row["adapter"], row["edit"], column, row["picture"]].append(float(row[column]))
    table = defaultdict(list)
    for (*key, _), each in values.items():
        table[tuple(key)].append(np.mean(each))
    return dict(table)


# %% The figures


def draw_all(drawn, robot, figures):
    top = [("training picture", {robot.caption: to_pil(robot.picture[None])})]
    rows = top + [(label, pictures) for label, pictures in drawn.items() if label not in THIN]
    draw_table(rows, figures / "07_editing.png", "learned from one picture, told of another (Fig. 5, 6)", dpi=80)
    rows = top + [(label, drawn[label]) for label in ("base model", *THIN)]
    draw_table(rows, figures / "07_rank_one.png", "LoRA of rank 1, and one atom for each token (Fig. 4)", dpi=80)


def draw_maps(maps, best, path, columns=7):
    figure, axes = plt.subplots(len(maps), columns + 1, figsize=(9.6, 1.25 * len(maps) + 0.8), layout="constrained")
    scales = [max(s[i].mean(0).abs().max().item() for _, s in maps.values()) for i in range(columns)]
    for row, (prompt, (picture, s)) in zip(axes, maps.items()):
        row[0].imshow(picture)
        row[0].set_ylabel(prompt.replace(" on ", "\non ").replace(" in ", "\nin "), fontsize=7.5)
        for i, ax in enumerate(row[1:]):
            ax.imshow(overlay(picture, s[i].mean(0), scales[i]))  # (steps, h, w) -> (h, w)
    for ax, (layer, m) in zip(axes[0, 1:], best):
        ax.set_title(f"block {layer.split('.')[1]}\natom {m}", fontsize=8)
    plt.setp(axes, xticks=[], yticks=[])
    figure.suptitle("where the most important atoms are added (red) and subtracted (blue)", fontsize=11)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def draw_measured(table, path):
    labels = list(dict.fromkeys(label for label, *_ in table))[::-1]
    heights = np.arange(len(labels))
    figure, axes = plt.subplots(1, 2, figsize=(8.6, 4.6), layout="constrained", sharey=True)
    titles = {"follows": "does the edit happen? (share of pictures)", "kept": "is the subject kept? (correlation)"}
    look = {"markersize": 4, "linewidth": 0.8}
    styles = {"same": ("o", "0.6"), "background": ("s", "tab:blue"), "place": ("D", "tab:orange")}
    for ax, (column, title) in zip(axes, titles.items()):
        for offset, (edit, (marker, colour)) in zip((0.2, 0, -0.2), styles.items()):
            cells = [table[label, edit, column] for label in labels]
            means, spreads = zip(*[(np.mean(cell), np.std(cell, ddof=1)) for cell in cells])
            name = "the trained prompt" if edit == "same" else f"another {edit}"
            y = np.arange(len(labels)) + offset
            ax.errorbar(means, y, xerr=spreads, fmt=marker, color=colour, label=name, **look)
        ax.set_title(title, fontsize=10)
        ax.grid(axis="x", linewidth=0.3)
    axes[0].set_xlim(0.3, 1.12)
    axes[1].set_xlim(-0.12, 1.02)
    axes[0].set_yticks(heights, labels, fontsize=8)
    axes[0].legend(fontsize=8, loc="lower left")
    figure.suptitle("five subjects, mean and standard deviation from subject to subject", fontsize=11)
    figure.savefig(path, dpi=130)
    plt.close(figure)


# Try
# - epochs=200 in TrainConfig.of: more of the robot, 0.81 with the trained prompt, 0.55 with changed ones, all followed.
# - guidance=6 in draw: the sparse adapter follows all prompts (78 % with 3), but coarser, 0.65 with the trained one.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="less training and fewer pictures, for a check")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the pictures")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.figures)
