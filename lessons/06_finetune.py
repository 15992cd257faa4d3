# %% [markdown]
# # 6. Teach a frozen model a robot
#
# **The question.** Can a model learn to draw something new if all its weights stay as they are, and only a few learned
# atoms are added beside them? And how many atoms carry what it has learned? In the paper 40 are enough, and 4 give the
# rough shape. On this small model it takes more than 100:
#
# ![A robot drawn with 0, 4, 40, 120, 400 and all atoms](figures/06_atoms.png)
#
# *Left: the only training picture. Then the same prompt with the 0, 4, 40, … most important atoms. Each row starts from
# another noise.*
#
# You need lessons [2](02_attention_as_dictionary.md) and [5](05_pixart.md). This lesson takes about 17 seconds on two
# CPU cores, 8 with `--quick`.
#
# ## The words
#
# - To **fine-tune** is to train a finished model a little further, on something special.
# - **Frozen** weights are never changed. We train an **adapter** instead, which is small and sits beside them.
# - $X$ is the input of a self-attention and $O$ its output. Both are $N$ tokens of $C$ numbers each. The adapter adds
#   $ΔO$ to $O$ (Eq. 9):
#
# $$O + ΔO = O + S D, \qquad S = A σ(X W_s)$$
#
# - $D$ holds the **atoms**, $M$ rows of $C$ numbers. An atom is a direction in which a token can be moved.
# - $W_s$ ($C × M$) gives each token of $X$ a score for each atom.
# - $σ$ keeps the $k$ scores of a token that are largest in absolute value, and sets the others to zero (**top-k**). The
#   token **picks** these $k$ atoms. The share $k / M$ is the **density** $ρ$. With $M = 256$ and $ρ = 0.02$, $k = 5$.
# - $A$ is the attention's own map. It mixes the picks of all tokens. The result $S$ holds the **coefficients**.
#
# The model has eight self-attentions. We train $W_s$ and $D$ of each: $2 C M$ numbers (§3.5).

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
# Autoencoder and text encoder turn the picture and its caption into a latent and vectors. They do this once, before the
# training. The tiny model has never seen a robot: its text encoder has a vector for the word, but no picture ever came
# with it.

# %%
robot = SubjectPicture(root / "lessons" / "data" / "subjects", "robot", 1, pipe.resolution)
data = encode(pipe, load_images([robot.file], pipe.resolution), [robot.caption])
print(robot.caption, "->", *(tuple(part.shape) for part in (data.latents, data.text)))

# %% [markdown]
# ## Why $D$ starts at zero, and $W_s$ does not
#
# Training should start from the model as it is. So $ΔO = S D$ must be zero at first: the adapter is **silent**. For
# this, $S$ or $D$ must be zero. Which of them? Look at the gradients. Let $∂O$ be the gradient of the loss at the
# attention's output ($N × C$). The chain rule gives
#
# $$∂D = S^T ∂O, \qquad ∂S = ∂O D^T$$
#
# and $∂W_s$ is computed from $∂S$: where $∂S$ is zero, $∂W_s$ is zero.
#
# - **$D = 0$, $W_s$ random:** $S$ is not zero, so $∂D$ is not zero, and $D$ learns in the first step. $∂S$ contains
#   $D$, so $∂W_s$ is zero in the first step. In the second step $D$ has moved, and $W_s$ learns too.
# - **$D = 0$, $W_s = 0$:** $S$ is zero, so $∂D$ is zero. $D$ is zero, so $∂W_s$ is zero. Nothing ever moves.
#
# **Predict:** we print the sizes of $∂D$ and $∂W_s$ for both starts, and again after one step. Which are zero?

# %%
batch = 8  # copies of the picture, each with a timestep and noise of its own
x0 = data.latents.expand(batch, -1, -1, -1)  # (B, 4, 16, 16)
text, mask = data.text.expand(batch, -1, -1), data.text_mask.expand(batch, -1)  # (B, L, C_text), (B, L)
generator = torch.Generator().manual_seed(0)
timesteps = torch.randint(1000, (batch,), generator=generator)
noise = torch.randn(x0.shape, generator=generator)  # (B, 4, 16, 16)
name, caught = "transformer_blocks.3.attn1", {}


def catch(adapter, inputs, output):
    output.retain_grad()
    caught.update(S=inputs[0], out=output)  # (B, N, M), (B, N, C)


def gradients(adapter):
    """Sizes of ∂D and ∂W_s, the largest entry of ∂D − Sᵀ∂O, and whether the loss is that of the bare model"""
    loss = noise_error(model, x0, timesteps, noise, text, mask, pipe.schedule).mean()
    model.zero_grad()
    loss.backward()
    S, dO = caught["S"].flatten(0, 1), caught["out"].grad.flatten(0, 1)  # (B·N, M), (B·N, C)
    difference = (S.T @ dO - adapter.D.grad).abs().max().item()
    return adapter.D.grad.norm().item(), adapter.W_s.grad.norm().item(), difference, loss.item() == bare.item()


# %%
bare = noise_error(model, x0, timesteps, noise, text, mask, pipe.schedule).mean()
torch.manual_seed(0)
rows = []
for start in ("W_s random", "W_s zero"):
    attach(model, "sparse", atoms=256, density=0.02)
    adapter = adapters(model)[name]
    adapter.register_forward_hook(catch)
    if start == "W_s zero":
        torch.nn.init.zeros_(adapter.W_s)
    rows.append((f"{start}, D zero", *gradients(adapter)))
    torch.optim.AdamW([adapter.W_s, adapter.D], lr=0.003).step()
    rows.append(("… one step later", *gradients(adapter)))
    detach(model)

# %%
lesson.table(("start", "size of ∂D", "size of ∂W_s", "∂D − Sᵀ∂O", "silent"), rows)
lesson.check("W_s random: size of ∂D", rows[0][1], (1e-6, 10))
lesson.check("W_s random: size of ∂W_s", rows[0][2], (0, 0))
lesson.check("W_s random, one step later: size of ∂W_s", rows[1][2], (1e-6, 10))
lesson.check("W_s zero, one step later: sizes of ∂D and ∂W_s together", rows[3][1] + rows[3][2], (0, 0))
lesson.check("∂D − Sᵀ∂O, largest entry as a share of ∂D", rows[0][3] / rows[0][1], (0, 1e-4))
lesson.check("a fresh adapter changes nothing (1: yes, to the bit)", rows[0][4], (1, 1))

# %% [markdown]
# ## The training loop
#
# It is the training of lesson 5: draw timesteps and noise, guess the noise, take a step. Only the optimizer differs: it
# holds the parameters of the adapters and no others.
#
# **Predict:** the model must remember only *one* picture. How far will the loss fall? (A model that knows $x_0$ exactly
# can compute the noise, $ε = (x_t - α_t x_0) / σ_t$. So 0 is possible.)

# %%
config = TrainConfig.of(pipe, method="sparse", epochs=10 if lesson.quick else 50, lr=0.003, lr_schedule="constant")
n_steps = config.epochs * config.repeats // config.batch_size
B = config.batch_size
torch.manual_seed(0)
attach(model, "sparse", **config.options)
optimizer = torch.optim.AdamW(trainable(model), lr=config.lr, weight_decay=0)
for step in range(n_steps):
    t = torch.randint(1000, (B,))
    noises = torch.randn(B, 4, 16, 16)
    loss = noise_error(model, x0[:B], t, noises, text[:B], mask[:B], pipe.schedule).mean()
    optimizer.zero_grad()
    loss.backward()
    clip_grad_norm_(trainable(model), 1.0)  # a step never follows a gradient longer than 1
    optimizer.step()

# %% [markdown]
# The library's `train` does the same in one call. It can also spread the work over processes, and continue after a
# stop. We compare both. The loss of a step depends much on its timesteps and noise, so we measure all models with the
# same 64 timesteps and noises.


# %%
@torch.no_grad()
def error():
    """Mean error over 64 fixed timesteps and noises"""
    generator = torch.Generator().manual_seed(1)
    total = 0.0
    for _ in range(8):
        t = torch.randint(1000, (batch,), generator=generator)
        noises = torch.randn(x0.shape, generator=generator)  # (B, 4, 16, 16)
        total += noise_error(model, x0, t, noises, text, mask, pipe.schedule).mean().item() / 8
    return total


by_hand = error()
detach(model)
base = error()
train(pipe, data, config)
library = error()
parameters = sum(p.numel() for p in trainable(model))

# %%
rows = [("before", base), (f"{n_steps} steps of the loop above", by_hand), ("as many of the library's", library)]
lesson.table(("model", "error of the noise"), rows)
lesson.check("by hand: error, as a share of that before", by_hand / base, (0.08, 0.22), quick=(0.1, 0.95), form=".0%")
lesson.check("library / by hand, error", library / by_hand, (0.85, 1.15), form=".2f")
lesson.check("trained parameters, 8 · 2 · 128 · 256", parameters, (524288, 524288), form=",d")

# %% [markdown]
# The loss falls far, but not to 0: the model does not know the picture to the last pixel.
#
# ## Eq. 9, line by line
#
# What happens inside one adapted attention? We catch its input, and compute its output as the equation says. The
# attention has several heads, each with its own $A$. So the atoms are split evenly over the heads, and each head mixes
# its own part.
#
# **Predict:** each token picks 5 of 256 atoms, 2 %. After $A$ has mixed, what share of the entries of $S$ is not zero?

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
    S = merge_heads(A @ split_heads(picks, attention.heads))  # (1, N, M) -> (1, H, N, M/H) -> (1, N, M)
    output = attention(x) + S @ adapter.D  # (1, N, C), Eq. 9
lesson.check("by hand and by the library, largest difference", (output - seen["out"]).abs().max().item(), (0, 1e-4))
lesson.check("entries of σ(X W_s) that are not zero", picks.ne(0).float().mean().item(), (0.0195, 0.0196), form=".2%")
lesson.check("entries of S that are not zero", S.ne(0).float().mean().item(), (0.2, 0.4), paper="sparse", form=".0%")

# %% [markdown]
# The picks are sparse, but $S$ is much less so. A softmax is never exactly zero, so each token gets the picks of *all*
# tokens. An entry of $S$ is zero only if no token picks its atom. So "a few atoms for each token" is true only *before*
# mixing (more in lesson [2](02_attention_as_dictionary.md)).
#
# ## How many atoms carry the robot?
#
# There are 8 · 256 = 2,048 atoms. An atom matters if it is used a lot and is long. So its **importance** is the mean of
# $|S_m|$ over tokens, times the length of the atom. We keep the $n$ most important atoms, switch off the others, and
# draw again from the same noise. Nothing is trained again.
#
# How much of the robot is in a picture? We take the pixels where the robot should be and compute their correlation with
# those of the training picture. 1 means the same robot, 0 means nothing in common. Is the ranking worth anything? As a
# control we also draw with 400 atoms chosen at random.
#
# **Predict:** how many of the 2,048 atoms does a robot need? And what will the random 400 draw?

# %%
measure_usage(pipe, data, seed=0)  # the mean of |S_m|, at ten timesteps
scores = torch.cat(list(importance(model).values()))  # (2048,)
counts = (0, 40, 400, "all") if lesson.quick else (0, 4, 40, 120, 400, "all")
seeds, sampler = range(2), {"steps": 6 if lesson.quick else 10}


def look():
    """The picture from each seed, how much of the robot is in them, and the share of importance that is left on"""
    images = to_tensor(pipe.generate([robot.caption] * len(seeds), latents=pipe.noise(seeds), **sampler))
    on = torch.cat([adapter.keep for adapter in adapters(model).values()])  # (2048,)
    return images, robot.kept(images, robot.place).mean().item(), (scores[on].sum() / scores.sum()).item()


drawn, kept, share = {}, {}, {}
for n in counts:
    keep_atoms(model, n)
    drawn[n], kept[n], share[n] = look()

# %%
some = torch.zeros(2048, dtype=torch.bool)
some[torch.randperm(2048, generator=generator)[:400]] = True
for adapter, part in zip(adapters(model).values(), some.split(256)):
    adapter.keep.copy_(part)
_, kept["400 at random"], share["400 at random"] = look()
keep_atoms(model, "all")
rows = [(n, f"{share[n]:.0%}", kept[n]) for n in kept]
lesson.table(("atoms", "their share of all importance", "of the robot"), rows)
lesson.check("all atoms: of the robot", kept["all"], (0.85, 0.98), quick=(-0.2, 1), form=".2f")
lesson.check("40 atoms: of the robot", kept[40], (-0.15, 0.35), quick=(-0.2, 0.5), paper="enough", form=".2f")
lesson.check("400 atoms: of the robot", kept[400], (0.8, 0.98), quick=(-0.2, 1), form=".2f")
lesson.check("400 at random: of the robot", kept["400 at random"], (-0.15, 0.45), quick=(-0.2, 0.6), form=".2f")

# %%
rows = {f"seed {seed}": [*to_pil(robot.picture[None]), *(to_pil(drawn[n])[seed] for n in counts)] for seed in seeds}
figure = draw.picture_rows(rows, ["training\npicture", *(f"{n} atoms\n{kept[n]:.2f}" for n in counts)])
lesson.show(figure, "06_atoms", "A robot drawn with 0, 4, 40, 120, 400 and all atoms")

# %% [markdown]
# *Under the number of atoms: how much of the robot is in the pictures.*
#
# The table answers the question. 400 atoms, a fifth of all, draw the robot nearly as well as all 2,048 do. 400 atoms
# at random draw little or nothing of it. So what was learned *is* concentrated in a part of the atoms, and the ranking
# finds them. But this part is more than 100 atoms, not 40, and 4 atoms change almost nothing.
#
# ## Where do atoms act?
#
# $S$ has a number for each atom at each patch, in each step of the sampler. The mean over the steps is a map of the
# atom: red where the atom is added, blue where it is subtracted. How narrow are these maps? We add up $|S|$ over the
# quarter of the patches where it is largest. An atom that acts everywhere alike would have 25 % of its sum there.
#
# **Predict:** does an atom act at one spot, such as an eye, or everywhere?

# %%
best = [(layer, m) for layer, m, _ in top_atoms(model, 5)]
picture, maps = watch(pipe, robot.caption, pipe.noise([0]), best, **sampler)  # maps (5, steps, 8, 8)
maps = maps.mean(dim=1)  # (5, 8, 8)
sizes = maps.flatten(1).abs().sort(descending=True).values  # (5, 64), the largest first
quarter = (sizes[:, :16].sum() / sizes.sum()).item()
lesson.check("share of an atom's sum in a quarter of the patches", quarter, (0.35, 0.6), quick=(0.25, 0.6), form=".0%")
titles = [f"block {layer.split('.')[1]}, atom {m}" for layer, m in best]
figure = draw.picture_rows({"": [overlay(picture, s) for s in maps]}, titles)
lesson.show(figure, "06_where", "Where on the picture the five most important atoms are added and subtracted")

# %% [markdown]
# Neither: an atom has a place, but a wide one. The mixing by $A$ spreads it over the picture.
#
# ## Where it stops being true
#
# - **"40 atoms carry a concept"** is the paper's finding on a large model. That model has seen many toys and cars, so
#   perhaps it needs only a hint. The tiny model knows 200 things, and must build a robot from almost nothing.
# - **Only the picks are sparse.** $σ(X W_s)$ is sparse, $S$ is not. So $ΔO$ of a token is a sum of more than 5 atoms.
# - **Importance is a guess.** It ranks atoms one by one. Two atoms that cancel each other both look important.
# - **We looked at the trained prompt only.** Does the robot obey other prompts? What has the model forgotten? That is
#   the next lesson.
#
# ## Exercises
#
# 1. $W_s = 0$ and $D$ random is silent as well. Does it train? What happens in the first step?
# 2. Give `TrainConfig.of` the options `atoms=64, density=0.08`. How many atoms does a token pick, and how many are
#    there in all? Train, keep 40 and 400 atoms, and compare with the table above.
# 3. Why does switching off all atoms give the base model to the bit, whatever was trained?
#
# <details>
# <summary>Answers</summary>
#
# 1. Yes, it trains. $S = 0$, so $∂D = 0$. But $∂S = ∂O D^T$ is not zero, and it reaches $W_s$ through the atoms that
#    top-k picks. At first all scores are zero, so top-k picks arbitrary atoms, and only these learn in the first step.
# 2. It still picks 5 atoms, of 8 · 64 = 512 in all. So 400 atoms are now most of them. Each atom is used by more tokens
#    than before, so expect that 40 atoms carry more of the robot than above.
# 3. The base model's weights were frozen, so $O$ is as before. With $ΔO = 0$ nothing is added to it.
#
# </details>
#
# Next: [change the picture by words, and compare with LoRA](07_editing.md).

# %%
lesson.end()
