# %% [markdown]
# # 8. How well was a subject learned? Three scores
#
# **The question.** A model learns a robot from five pictures. Then it must draw this robot in new scenes. How can one
# measure whether it does? And do the paper's claims hold here: does a sparse dictionary follow prompts better than
# LoRA, and what do more atoms bring?
#
# ![A robot at five places, as it should be and as four models draw it](figures/08_pictures.png)
#
# *Top: how the robot should look. Below: the model before it has learned the robot, and after, by LoRA and
# two sparse dictionaries.*
#
# You need lesson [6](06_finetune.md). This lesson takes about a minute on two CPU cores, 20 seconds with `--quick`.
#
# ## The words
#
# - A **subject** is one particular thing, given by a few pictures. To learn to draw it in new scenes is
#   **customisation**.
# - Our subject is a robot. In the training of the tiny model no picture ever came with this word.
# - We ask for it in 25 scenes: five places times five colours of the background. At most five of them are in the
#   training pictures.
#
# The scores compare vectors, not pixels. The vectors come from **CLIP**: two networks, one for pictures and one for
# texts. Each gives a vector of length 1. Both were trained together on pictures with captions, so that the vector of a
# picture lies close to the vector of its own caption. For vectors of length 1, the dot product is the **cosine** of the
# angle between them: 1 means the same direction, 0 means that they have nothing in common, −1 means opposite.
#
# What makes a good result? Three things, and the paper has a score for each:
#
# | score | what it asks | how it is computed |
# |---|---|---|
# | **alignment** | Is it what the prompt says? | mean cosine of each picture with its own prompt |
# | **fidelity** | Is it the subject? | mean cosine of each picture with the subject's own pictures |
# | **diversity** | Do the pictures differ? | the Vendi score, below |
#
# The tiny model ships with a CLIP of its own, trained on the same small world. Does it work? We draw 100 new scenes.
# For each picture we look for the nearest of the 100 captions: the one with the highest cosine.
#
# **Predict:** how often is this the picture's own caption? (By chance: once in 100 pictures.)

# %%
from pathlib import Path

import draw
import numpy as np
import torch
from lesson import Lesson

from dit import Pipeline
from dit.data import encode, load_images
from dit.dreambooth import read_subjects
from dit.metrics import CLIP, alignment, fidelity, vendi_score
from dit.pictures import open_picture
from dit.report import compare, read_results, summarise
from dit.study import Setting
from dit.tiny import scenes, subjects
from dit.train import TrainConfig, train
from sparsecode import detach

lesson = Lesson()
root = Path(draw.__file__).parent.parent
clip = CLIP(root / "weights" / "tiny" / "clip")

# %%
rng = np.random.default_rng(8)
new = list({scenes.sample_scene(rng): None for _ in range(120)})[:100]  # 100 different ones
pictures = [scenes.draw(scene) for scene in new]
captions = [scenes.caption(scene, rng, say_place=True) for scene in new]
seen = clip.images(pictures)  # (100, C)
cosines = seen @ clip.texts(captions).T  # (100, 100)
found = (cosines.argmax(dim=1) == torch.arange(100)).float().mean().item()
lesson.check("pictures nearest to their own caption", found, (0.9, 1), form=".0%")
figure = draw.cosines(pictures[:5], captions[:5], cosines[:5, :5])
lesson.show(figure, "08_clip", "Five pictures, five captions, and the cosine of each pair")

# %% [markdown]
# *The cosine of each picture with each caption. A picture's own caption is in bold.*
#
# The bold numbers also give the scale of alignment: even a picture and its own caption are far from a cosine of 1.
#
# ## Diversity: how many different pictures?
#
# Let $V$ be the vectors of $n$ pictures, one for each row, and $K = V V^T$ the cosines of all pairs. The eigenvalues of
# $K/n$ are never negative and add up to 1, so they are like shares. Two extreme cases:
#
# - All pictures are equal: one eigenvalue is 1, all others are 0.
# - No two pictures have anything in common: each of the $n$ eigenvalues is $1/n$.
#
# The **Vendi score** is $\exp(-\sum_i p_i \log p_i)$, where $p_i$ are these shares. It is 1 in the first case and $n$
# in the second. So it counts pictures, and pictures that resemble each other count less. (The exponent is the *entropy*
# of the shares.) For this score the paper takes the vectors of another network, DINOv2. We take CLIP's.
#
# **Predict:** four different pictures, each 25 times, make 100 pictures. What is their score?

# %%
four = seen[:4].repeat(25, 1)  # (100, C): four pictures, each 25 times
p = torch.linalg.eigvalsh((four @ four.T).double() / 100).clamp(min=1e-15)  # (100,)
by_hand = torch.exp(-(p * p.log()).sum()).item()
lesson.check("four pictures, each 25 times: Vendi score", by_hand, (2, 4))
lesson.check("its difference from the library's", abs(by_hand - vendi_score(four)), (0, 1e-3))
lesson.check("one picture, 100 times: Vendi score", vendi_score(seen[:1].repeat(100, 1)), (0.999, 1.001))

# %% [markdown]
# ## Train and score
#
# The model learns the robot by the four methods of the paper, each from the same base and for 125 steps:
#
# - a **sparse** dictionary (lesson 6), with $M$ atoms and **density** $ρ$, the share of atoms that a token may use;
# - **LoRA**, the usual method: to each weight matrix it adds the product of two thin ones, here of rank 16;
# - **DoRA**: LoRA that learns length and direction of the weights separately;
# - **OFT**: it multiplies the weights by a learned rotation and adds nothing.
#
# Then each model draws the 25 prompts from the same noise. The learning rate is 0.003 for all.

# %%
pipe = Pipeline.from_folder(root / "weights" / "tiny", device="cpu")
robot = next(s for s in read_subjects(root / "lessons" / "data" / "subjects") if s.name == "robot")
data = encode(pipe, load_images(robot.files, pipe.resolution), robot.captions)
runs = {
    "LoRA": {"method": "lora"},
    "DoRA": {"method": "dora"},
    "OFT": {"method": "oft"},
    "M 256, ρ 0.02": {"density": 0.02},
    "M 256, ρ 0.2": {"density": 0.2},
}
sampling = {"latents": pipe.noise(range(25)), "steps": 4 if lesson.quick else 10}

# %%
drawn = {"not trained": pipe.generate(robot.prompts, **sampling)}
for name, given in runs.items():
    config = TrainConfig.of(pipe, epochs=1 if lesson.quick else 10, lr=0.003, **given)
    train(pipe, data, config)
    drawn[name] = pipe.generate(robot.prompts, **sampling)
    detach(pipe.transformer)

# %% [markdown]
# Which scores would a perfect model get? We can know: the robot is made of polygons, so we can draw it exactly as each
# prompt says. As a second comparison we draw an owl in the robot's place: right scene, wrong subject.
#
# **Predict:** the model that is not trained draws something else for "robot". Will its alignment be high or low? And
# which pictures will have the higher diversity, the perfect ones or those of a model that has half learned the robot?

# %%
backgrounds = "red", "green", "blue", "yellow", "purple"
places = "centre", "top left", "top right", "bottom left", "bottom right"
wanted = [(background, "large", place) for place in places for background in backgrounds]
assert robot.prompts == [subjects.subject_caption("robot", *each) for each in wanted]
perfect = [subjects.draw_subject("robot", *each, side=64) for each in wanted]
owls = [subjects.draw_subject("owl", *each, side=64) for each in wanted]
drawn = {"as it should be": perfect, "an owl instead": owls} | drawn

# %%
texts = clip.texts(robot.prompts)  # (25, C)
originals = clip.images([open_picture(file).resize((64, 64)) for file in robot.files])  # (5, C)
scores = {}
for name, images in drawn.items():
    seen = clip.images(images)  # (25, C)
    by_hand = (seen * texts).sum(dim=1).mean().item(), (seen @ originals.T).mean().item()
    scores[name] = alignment(seen, texts), fidelity(seen, originals), vendi_score(seen)
    assert np.allclose(by_hand, scores[name][:2])
lesson.table(("pictures", "alignment", "fidelity", "diversity"), [(name, *row) for name, row in scores.items()])

# %%
columns = [0, 7, 11, 18, 24]  # one of each place and colour
shown = "as it should be", "not trained", "LoRA", "M 256, ρ 0.02", "M 256, ρ 0.2"
rows = {name.replace(", ", ",\n"): [drawn[name][i] for i in columns] for name in shown}
titles = [f"{place},\n{background}" for background, _, place in (wanted[i] for i in columns)]
figure = draw.picture_rows(rows, titles)
lesson.show(figure, "08_pictures", "A robot at five places, as it should be and as four models draw it")

# %% [markdown]
# How to read the table:
#
# - **Fidelity** has a scale of its own. Even the perfect pictures do not reach 1, because the five training pictures
#   differ in place and background. The owl shows a low value: right scene, wrong subject.
# - **Alignment** hardly looks at the subject. The owl gets almost as much as the robot. When this CLIP was trained, a
#   word like "robot" named a new random creature each time. So it reads mainly the place and the background.
# - **More diversity is not better.** The perfect pictures have less of it than those of any trained model, because they
#   all show the same robot. Robots that are spoiled in different ways count as different pictures. So look at diversity
#   beside fidelity.

# %%
perfect, owl = scores["as it should be"], scores["an owl instead"]
lesson.check("as it should be: fidelity", perfect[1], (0.8, 0.95))
lesson.check("an owl instead: fidelity", owl[1], (0.1, 0.5))
lesson.check("an owl instead: alignment / the robot's", owl[0] / perfect[0], (0.7, 1), form=".0%")
lesson.check("as it should be: diversity", perfect[2], (1.5, 2))
least = min(scores[name][2] for name in runs)  # of those that were trained
lesson.check("as it should be: diversity, times the least of the trained", perfect[2] / least, (0.5, 1), quick=(0.3, 2))
for name in ("LoRA", "M 256, ρ 0.02", "M 256, ρ 0.2"):
    share = scores[name][1] / perfect[1]
    lesson.check(f"{name}: fidelity, of the perfect pictures'", share, (0.8, 1.05), quick=(-0.3, 1.05), form=".0%")

# %% [markdown]
# ## The study: four subjects, three seeds
#
# One subject and one seed decide little: with another subject, or with other noise, two methods may change places. So
# this command trains every setting on four subjects, with three seeds each. It chooses the learning rate of each method
# on the fifth subject, by alignment + fidelity:
#
#     OMP_NUM_THREADS=1 torchrun --nproc-per-node 2 -m dit.evaluate --subjects lessons/data/subjects --tune-on snail \
#       --lrs 0.001 0.003 0.01 0.03 --densities 0.01 0.02 0.2 --atoms 256 16 1024 --seeds 0 1 2 \
#       --epochs 10 --pictures 1 --steps 10
#
# It took 22 minutes on two CPU cores that did other work too. Its results are in `lessons/data/study.csv`. Here is the
# mean of each setting over subjects and seeds, beside the paper's Tables 1 and 2.

# %%
records = read_results(root / "lessons" / "data" / "study.csv")
headings = "lr", "alignment", "the paper", "fidelity", "the paper", "diversity", "the paper"
means, rows = {}, []
for row in summarise(records):
    setting = row["setting"]
    means[setting] = row["alignment"], row["fidelity"], row["diversity"]
    aligned, diverse, faithful = setting.paper[:3] if setting.paper else ("", "", "")  # the paper's order
    beside = zip(means[setting], (aligned, faithful, diverse))
    rows.append((setting, row["lr"] or "", *(f"{value:.3f}" if value else "" for pair in beside for value in pair)))
lesson.table(("", *headings), rows)
lesson.check("trainings", len(records) - 4, (96, 96), form="d")

# %%
paper = {setting: (setting.paper[2], setting.paper[1]) for setting in means if setting.paper}
trained = {setting: mean[1:] for setting, mean in means.items() if setting.method != "base"}
figure = draw.trade(trained, paper)
lesson.show(figure, "08_trade", "Diversity against fidelity for each method, here and in the paper")

# %% [markdown]
# ## Which of the paper's orderings are true here?
#
# The numbers belong to two different worlds, so they cannot be compared. Orderings can. For each pair of settings we
# take the 12 differences between trainings of the same subject and seed, and print their mean. ✓ means the same sign as
# in the paper, ✗ the opposite sign. A ? means that the mean is less than two standard errors from zero, so it decides
# nothing.
#
# The first three pairs compare methods (Table 1). The fourth raises the density: the paper shows this as a curve
# without numbers (Fig. 7). The last two raise the number of atoms (Table 2).
#
# **Predict:** which of the paper's orderings will you find again?

# %%
FIG_7 = {"alignment": -1, "fidelity": +1, "diversity": -1}  # with the density
small, default, dense = (Setting("sparse", 256, density) for density in (0.01, 0.02, 0.2))
few, many = (Setting("sparse", atoms, 0.01) for atoms in (16, 1024))
pairs = [(default, Setting(method)) for method in ("lora", "dora", "oft")]
pairs += [(dense, small), (small, few), (many, small)]
verdicts, gaps = {}, {}
for measure, column in {"alignment": 0, "fidelity": 2, "diversity": 1}.items():  # the paper's order
    rows, gaps[measure] = [], []
    for one, other in pairs:
        ours, error = compare(records, measure, one, other)
        if one.paper:
            theirs = one.paper[column] - other.paper[column]
            told = f"{theirs:+.3f}"
        else:
            theirs = FIG_7[measure]
            told = "rises" if theirs > 0 else "falls"
        mark = "✓" if ours * theirs > 0 else "✗"
        if abs(ours) < 2 * error:
            mark = "?"
        gaps[measure].append(ours)
        rows.append((f"{one} − {other}", told, f"{ours:+.3f} ± {error:.3f}", mark))
    verdicts[measure] = [row[-1] for row in rows]
    lesson.table((measure, "the paper", "here", ""), rows)
    print()

# %%
rows = [(measure, "".join(marks[:3]), marks[3], "".join(marks[4:])) for measure, marks in verdicts.items()]
lesson.table(("all verdicts", "methods (Table 1)", "density (Fig. 7)", "atoms (Table 2)"), rows)
for (measure, marks), expected in zip(verdicts.items(), (0, 2, 1)):
    lesson.check(f"{measure}: pairs ordered as in the paper, of 6", marks.count("✓"), (expected, expected), form="d")
opposite = sum(a * b < 0 for a, b in zip(gaps["fidelity"], gaps["diversity"]))
lesson.check("pairs where diversity falls as fidelity rises, or rises as it falls", opposite, (6, 6), form="d")

# %%
curves = {
    "density ρ": {density: means[Setting("sparse", 256, density)] for density in (0.01, 0.02, 0.2)},
    "atoms M": {atoms: means[Setting("sparse", atoms, 0.01)] for atoms in (16, 256, 1024)},
}
lesson.show(draw.sweeps(curves), "08_sweeps", "Each score by density and by number of atoms")

# %% [markdown]
# Read the table of verdicts row by row:
#
# - **Alignment decides nothing here.** In the paper the sparse dictionary follows prompts better than LoRA, DoRA and
#   OFT, and a higher density or many atoms cost alignment. Here all settings align about as well as the perfect
#   pictures above, so nothing is left to gain.
# - **Fidelity, first column.** In the paper the dictionary is about as faithful as LoRA and DoRA, and more than OFT.
#   Here it is a little more faithful than all three.
# - **Fidelity, last two columns.** In the paper a higher density or more atoms raise fidelity. Here only the step from
#   16 to 256 atoms does. A higher density and 1024 atoms even lower it. One reason may be the learning rate: the study
#   chooses it once for each method, with 256 atoms and $ρ = 0.01$, and the others may need a smaller one.
# - **Diversity falls wherever fidelity rises**, in all six pairs (last check). This is the trade of the paper's Fig. 7
#   and Table 2. But we have seen the reason: robots that are spoiled in different ways count as different pictures. So
#   here a higher diversity is a fault, not a merit.
#
# ## Where it stops being true
#
# - **Four subjects are few.** They are this project's own drawings. The standard errors above treat the 12 trainings as
#   independent, but three at a time share a subject, so the errors are too small.
# - **No score sees everything.** The Vendi score counts a spoiled picture as one more. Alignment sees the place and the
#   background, not the robot. Look at pictures as well.
# - **The methods are not equal in size.** As in the paper, each has its usual settings: LoRA has rank 16, and the
#   dictionary has 256 atoms. Lesson [7](07_editing.md) compares the two at equal size.
# - **A density is not exact.** A token uses $\max(1, \mathrm{round}(ρ M))$ atoms. See exercise 3.
#
# ## Exercises
#
# 1. Half of 100 pictures are equal to $a$, the other half to $b$, and the cosine of $a$ and $b$ is $c$. What is the
#    Vendi score for $c = 0$, and for $c = 1$?
# 2. A model ignores every prompt and always draws the first picture that it was trained on. Guess its three scores,
#    then compute them: `drawn["a copy"] = [open_picture(robot.files[0]).resize((64, 64))] * 25`.
# 3. Table 2 varies $M$ at $ρ = 0.01$. How many atoms does a token use with $M = 16$, and with $M = 1024$? Which share
#    of all atoms is this?
#
# <details>
# <summary>Answers</summary>
#
# 1. The eigenvalues of $K/n$ are $(1 + c)/2$ and $(1 - c)/2$. For $c = 0$ they are ½ and ½, and the score is 2. For
#    $c = 1$ they are 1 and 0, and the score is 1.
# 2. Diversity is exactly 1. Fidelity is about as high as that of the perfect pictures. Alignment is low, because place
#    and background are wrong nearly everywhere. So fidelity alone would praise a copy.
# 3. One of 16, and 10 of 1024: 6 % and 1 %. The smallest dictionary is the densest.
#
# </details>
#
# Next: [what one atom does to the picture](09_influence.md).

# %%
lesson.end()
