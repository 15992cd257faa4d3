# %% [markdown]
# # 6. Teach a frozen model a robot
#
# **The question.** Can a model learn to draw something new if all its weights stay as they are, and only a few learned
# atoms are added beside them? And how many atoms carry what it has learned? The paper says 40, and 4 give the rough
# shape. On this small model it takes 400:
#
# ![A robot drawn with 0, 4, 40, 120, 400 and all atoms](figures/06_atoms.png)
#
# *Left: the only training picture. Then the same prompt with the 0, 4, 40, … most important atoms, from two seeds.*
#
# You need lessons [2](02_attention_as_dictionary.md) and [5](05_pixart.md). It takes about 17 seconds on two CPU cores,
# 8 with `--quick`.
#
# ## The words
#
# - To **fine-tune** is to train a finished model a little further, on something special.
# - **Frozen** weights are not changed by it. What is trained instead is small and sits beside them: an **adapter**.
# - $O$ is the output of a self-attention, $N$ tokens of $C$ numbers each. The adapter adds $ΔO$ to it (Eq. 9):
#
# $$O + ΔO = O + S D, \qquad S = A \, σ(X W_s)$$
#
# - $D$ holds the **atoms**, $M$ rows of $C$ numbers. An atom is a direction in which a token can be moved.
# - $W_s$ ($C × M$) gives each token of $X$ a score for each atom.
# - $σ$ keeps the $k$ largest scores of a token by size and sets the others to zero (**top-k**). The share that is kept,
#   $k / M$, is the **density** $ρ$. With $M = 256$ and $ρ = 0.02$, a token picks 5 atoms.
# - $A$ is the attention's own map: it mixes the picks of all tokens. The result $S$ holds the **coefficients**.
#
# Trained are $W_s$ and $D$ of each of the eight self-attentions, $2 C M$ numbers each (§3.5).

# %%
from pathlib import Path

import draw
import torch
from lesson import Lesson
from torch.nn.utils import clip_grad_norm_

from dit import Pipeline
from dit.data import encode, load_images
from dit.diffusion import noise_error
from dit.maps import overlay, watch
from dit.pictures import to_pil, to_tensor
from dit.tiny.editing import SubjectPicture
from dit.train import TrainConfig, measure_usage, train
from sparsecode import adapters, attach, detach, importance, keep_atoms, top_atoms, top_k, trainable
from sparsecode.attention import merge_heads, split_heads

lesson = Lesson()
root = Path(draw.__file__).parent.parent
weights = root / "weights" / "tiny"
pipe = Pipeline.from_folder(weights, device="cpu")
model = pipe.transformer

# %% [markdown]
# ## One picture
#
# The picture and its caption go once through the autoencoder and the text encoder; then neither is needed any more. The
# tiny model has never seen a robot, and the word is unknown to it.

# %%
robot = SubjectPicture(root / "lessons" / "data" / "subjects", "robot", 1, pipe.resolution)
data = encode(pipe, load_images([robot.file], pipe.resolution), [robot.caption])
print(robot.caption, "->", *(tuple(part.shape) for part in (data.latents, data.text)))

# %% [markdown]
# ## Why $D$ starts at zero, and $W_s$ does not
#
# Training should start from the model as it is, so $ΔO = S D$ must be zero at first. So $S$ or $D$ must be zero. Which?
# Look at the gradients. Let $∂O$ be the gradient of the loss at the attention's output ($N × C$). Then
#
# $$∂D = S^T ∂O, \qquad ∂S = ∂O \, D^T, \quad \text{and } ∂W_s \text{ is made from } ∂S$$
#
# - **$D = 0$, $W_s$ random:** $∂D$ is not zero, because $S$ is not. So $D$ learns in the first step. $∂W_s$ is zero at
#   first, because $∂S$ contains $D$; it wakes up in the second step, when $D$ has moved.
# - **Both zero:** $S = 0$, so $∂D = 0$; $D = 0$, so $∂W_s = 0$. Nothing ever moves.
#
# We attach adapters, run the loss backward, and look.

# %%
batch, generator = 8, torch.Generator().manual_seed(0)
x0, text = data.latents.expand(batch, -1, -1, -1), data.text.expand(batch, -1, -1)
mask = data.text_mask.expand(batch, -1)
timesteps = torch.randint(1000, (batch,), generator=generator)
noise = torch.randn(x0.shape, generator=generator)  # (B, 4, 16, 16)
name, caught, rows = "transformer_blocks.3.attn1", {}, []


def catch(adapter, inputs, output):
    output.retain_grad()
    caught.update(S=inputs[0], out=output)  # (B, N, M), (B, N, C)


torch.manual_seed(0)
before = noise_error(model, x0, timesteps, noise, text, mask, pipe.schedule).mean()
for start, factor in {"random": 1, "zero": 0}.items():
    attach(model, "sparse", atoms=256, density=0.02)
    adapter = adapters(model)[name]
    with torch.no_grad():
        adapter.W_s.mul_(factor)
    adapter.register_forward_hook(catch)
    loss = noise_error(model, x0, timesteps, noise, text, mask, pipe.schedule).mean()
    loss.backward()
    S, dO = caught["S"].flatten(0, 1), caught["out"].grad.flatten(0, 1)  # (B·N, M), (B·N, C)
    difference = (S.T @ dO - adapter.D.grad).abs().max().item()
    size_D, size_W = adapter.D.grad.norm().item(), adapter.W_s.grad.norm().item()
    rows.append((f"W_s {start}, D zero", size_D, size_W, difference, loss.item() == before.item()))
    detach(model)

# %%
lesson.table(("start", "size of ∂D", "size of ∂W_s", "∂D − Sᵀ∂O", "silent"), rows)
lesson.check("W_s random: size of ∂D", rows[0][1], (1e-6, 10))
lesson.check("W_s random: size of ∂W_s", rows[0][2], (0, 0))
lesson.check("W_s zero: size of ∂D", rows[1][1], (0, 0))
lesson.check("∂D − Sᵀ∂O, largest entry as a share of ∂D", rows[0][3] / rows[0][1], (0, 1e-4))
lesson.check("a fresh adapter changes nothing (1: yes, to the bit)", rows[0][4], (1, 1))

# %% [markdown]
# ## The training loop
#
# It is that of lesson 5: draw timesteps and noise, guess the noise, take a step. Only the optimizer differs: it holds
# the parameters of the adapters and no others. One picture is few, so the learning rate is three times the tiny model's
# own.
#
# **Predict:** how far will the loss fall, if the model must only remember *one* picture?

# %%
config = TrainConfig.of(pipe, method="sparse", epochs=10 if lesson.quick else 50, lr=0.003)
n_steps = config.epochs * config.repeats // config.batch_size
torch.manual_seed(0)
attach(model, "sparse", **config.options)
optimizer = torch.optim.AdamW(trainable(model), lr=config.lr, weight_decay=0)
for step in range(n_steps):
    t = torch.randint(1000, (config.batch_size,))
    noises = torch.randn(config.batch_size, *data.latents.shape[1:])  # (B, 4, 16, 16)
    picked = [part.expand(config.batch_size, *part.shape[1:]) for part in (data.latents, data.text, data.text_mask)]
    loss = noise_error(model, picked[0], t, noises, *picked[1:], pipe.schedule).mean()
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(trainable(model), 1.0)  # a step never follows a gradient longer than 1
    optimizer.step()

# %% [markdown]
# The library's `train` does the same. Its result does not depend on how the work is spread over processes, and it can
# continue after a stop. One picture at random timesteps gives a very uneven loss, so we compare on the same noises.


# %%
@torch.no_grad()
def error():
    """Mean error over 64 fixed timesteps and noises"""
    generator, total = torch.Generator().manual_seed(1), 0.0
    for _ in range(8):
        t, noises = torch.randint(1000, (batch,), generator=generator), torch.randn(x0.shape, generator=generator)
        total += noise_error(model, x0, t, noises, text, mask, pipe.schedule).mean().item() / 8
    return total


by_hand = error()
detach(model)
base = error()
train(pipe, data, config)
library = error()
parameters, everything = sum(p.numel() for p in trainable(model)), sum(p.numel() for p in model.parameters())

# %%
rows = [("before", base), (f"{n_steps} steps of the loop above", by_hand), ("as many of the library's", library)]
lesson.table(("model", "error of the noise"), rows)
lesson.check("by hand: error, as a share of that before", by_hand / base, (0.15, 0.3), quick=(0.2, 0.95), form=".0%")
lesson.check("library / by hand, error", library / by_hand, (0.85, 1.15), form=".2f")
lesson.check("trained parameters, 8 · 2 · 128 · 256", parameters, (524288, 524288), form=",d")

# %% [markdown]
# ## Eq. 9, line by line
#
# What happens inside one adapted attention? We catch its input, and compute its output as the equation says. Two
# numbers on the way matter: how many entries of $σ(X W_s)$ are not zero, and how many of $S$.
#
# **Predict:** each token picks 5 of 256 atoms, 2 %. How many entries of $S$ are not zero, after $A$ has mixed?

# %%
wrapped, seen = model.get_submodule(name), {}
hook = wrapped.register_forward_hook(lambda _, inputs, output: seen.update(x=inputs[0], out=output))
with torch.no_grad():
    model(noise[:1], torch.tensor([500]), data.text, data.text_mask)
    hook.remove()
    x, attention, adapter = seen["x"], wrapped.base, wrapped.adapter  # (1, N, C)
    q, k, _ = attention.project(x)  # (1, H, N, C/H) each
    A = attention.attention_map(q, k)  # (1, H, N, N)
    picks = top_k(x @ adapter.W_s, adapter.k)  # (1, N, M)
    S = merge_heads(A @ split_heads(picks, attention.heads))  # (1, N, M): the atoms are split over the heads
    output = attention(x) + S @ adapter.D  # (1, N, C), Eq. 9
lesson.check("by hand and by the library, largest difference", (output - seen["out"]).abs().max().item(), (0, 1e-4))
lesson.check("entries of σ(X W_s) that are not zero", picks.ne(0).float().mean().item(), (0.0195, 0.0196), form=".2%")
lesson.check("entries of S that are not zero", S.ne(0).float().mean().item(), (0.2, 0.4), paper="sparse", form=".0%")

# %% [markdown]
# The picks are sparse; $S$ is much less so. A token gets the picks of every token that it looks at, and attention never
# gives exactly zero. So "a few atoms for each token" is true *before* mixing only (lesson 2 says more).
#
# ## How many atoms carry the robot?
#
# There are 8 · 256 = 2,048 atoms. An atom matters if it is used a lot and is long, so its **importance** is the mean of
# $|S_m|$ over tokens, times the length of the atom. We keep the $n$ most important ones, switch off the others, and
# draw again from the same noise. Nothing is trained again.
#
# We measure the robot's own pixels: their correlation with those of the training picture. 1 means the same robot, 0 has
# nothing in common. A control says whether the ranking is worth anything: 400 atoms chosen at random.

# %%
measure_usage(pipe, data, seed=0)  # the mean of |S_m|, at ten timesteps
scores = importance(model)  # name of the layer -> (M,)
ranked = torch.cat(list(scores.values())).sort(descending=True).values  # (2048,)
counts = (0, 40, 400, "all") if lesson.quick else (0, 4, 40, 120, 400, "all")
seeds, sampler = range(2), {"steps": 6 if lesson.quick else 10}


def look():
    """The picture from each seed, and how much of the robot is in them"""
    images = to_tensor(pipe.generate([robot.caption] * len(seeds), latents=pipe.noise(seeds), **sampler))
    return images, robot.kept(images, robot.place).mean().item()


drawn, kept = {}, {}
for n in counts:
    keep_atoms(model, n)
    drawn[n], kept[n] = look()
some = torch.zeros(2048, dtype=torch.bool)
some[torch.randperm(2048, generator=generator)[:400]] = True
for adapter, part in zip(adapters(model).values(), some.split(256)):
    adapter.keep.copy_(part)
kept["400 at random"] = look()[1]
keep_atoms(model, "all")

# %%
share = {n: ranked[:n].sum().item() / ranked.sum().item() for n in (4, 40, 120, 400)}
lesson.table(("atoms", "their share of all importance", "of the robot"), [
    (n, f"{share.get(n, 0 if n == 0 else 1):.0%}" if n != "400 at random" else "", value) for n, value in kept.items()
])  # fmt: skip
lesson.check("all atoms: of the robot", kept["all"], (0.85, 0.98), quick=(0.1, 1), form=".2f")
lesson.check("40 atoms: of the robot", kept[40], (0, 0.35), quick=(-0.2, 0.5), paper="enough", form=".2f")
lesson.check("400 atoms: of the robot", kept[400], (0.8, 0.98), quick=(0.05, 1), form=".2f")
lesson.check("400 at random: of the robot", kept["400 at random"], (0, 0.45), quick=(-0.2, 0.6), form=".2f")

# %%
rows = {f"seed {seed}": [*to_pil(robot.picture[None]), *(to_pil(drawn[n])[seed] for n in counts)] for seed in seeds}
figure = draw.picture_rows(rows, ["training\npicture", *(f"{n} atoms\n{kept[n]:.2f}" for n in counts)])
lesson.show(figure, "06_atoms", "A robot drawn with 0, 4, 40, 120, 400 and all atoms")

# %% [markdown]
# *Under the number of atoms: how much of the robot is in the pictures.*
#
# Four atoms change nothing that one can see. With 40 a trace of the robot's colours appears, with 120 its outline,
# and with 400 it is complete: a fifth of all atoms. The other 1,648 add almost nothing. So what was learned *is*
# concentrated in few atoms, and the ranking finds them: 400 atoms at random draw no robot. But "few" means hundreds
# here, not 40.
#
# ## Where do atoms act?
#
# $S$ has a number for each atom at each patch, in each step of the sampler. Averaged over the steps it is a map: red
# where the atom is added, blue where it is subtracted.

# %%
best = [(layer, m) for layer, m, _ in top_atoms(model, 5)]
picture, maps = watch(pipe, robot.caption, pipe.noise([0]), best, **sampler)  # maps (5, steps, 8, 8)
maps = maps.mean(dim=1)  # (5, 8, 8)
near = maps.flatten(1).abs().sort(descending=True).values  # (5, 64)
quarter = (near[:, :16].sum() / near.sum()).item()
lesson.check("a quarter of the patches has this share of what an atom does", quarter, (0.35, 0.6), form=".0%")
titles = [f"block {layer.split('.')[1]}, atom {m}" for layer, m in best]
figure = draw.picture_rows({"": [overlay(picture, s) for s in maps]}, titles)
lesson.show(figure, "06_where", "Where on the picture the five most important atoms are added and subtracted")

# %% [markdown]
# If an atom acted everywhere alike, a quarter of the patches would have 25 %. Atoms have places, but wide ones: again
# the mixing by $A$ spreads them.
#
# ## Where it stops being true
#
# - **"40 atoms carry a concept"** is the paper's finding on the large model, which has seen thousands of toys and cars
#   and needs only a hint. The tiny model knows 100 things, and must build a robot from almost nothing.
# - **Sparse** is $σ(X W_s)$, not $S$. A token's output is a sum of far more than 5 atoms.
# - **Importance is a guess.** It ranks atoms one by one; two that cancel each other both look important.
# - **One picture teaches one picture.** What else has changed in the model? That is the next lesson.
#
# ## Exercises
#
# 1. $W_s = 0$ and $D$ random is silent as well. Does it train? What happens in the first step?
# 2. Train with `atoms=64, density=0.08`: a token still picks 5 atoms. Do fewer atoms carry the robot now?
# 3. Why does switching off all atoms give the base model to the bit, whatever was trained?
#
# <details>
# <summary>Answers</summary>
#
# 1. $S = 0$, so $∂D = 0$. But $∂S = ∂O \, D^T$ is not zero, so $W_s$ gets a gradient, through the atoms that top-k lets
#    pass. It trains. But when all scores are equal, top-k has no reason to choose any atom: the first choice is
#    arbitrary.
# 2. There are only 512 atoms then, and each is needed by more tokens. A larger share of them is needed.
# 3. The base model's weights were frozen, and with $ΔO = 0$ there is nothing to add.
#
# </details>
#
# Next: [change the picture by words, and compare with LoRA](07_editing.md).

# %%
lesson.end()
