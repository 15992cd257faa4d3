# %% [markdown]
# # 9. What does one atom do to the picture?
#
# **The question.** An atom is added to a token in one layer. What does it do to the output, many layers later? Appendix
# A of the paper gives two answers. First, orthogonal atoms act independently of each other. Second, atoms of early
# layers make the structure of a picture, and atoms of late layers its details. Do these answers hold?
#
# ![A picture, and what is missing from it without the atoms of one block](figures/09_depth.png)
#
# *A robot that the tiny model has learned (left), and how it changes without the atoms of one block. One colour scale
# for all: red is brighter with the atoms, blue is darker.*
#
# You need lessons [2](02_attention_as_dictionary.md) and [6](06_finetune.md). This lesson takes about 50 seconds on two
# CPU cores, 17 with `--quick`.
#
# ## The words
#
# - $x$ is a token, and $f$ is the layer that follows. $d_m$ is an atom, $s_m$ its coefficient.
# - The **effect** of an atom is the output with it minus the output without it. The paper calls it $B(d_m)$.
# - Effects are **additive** if the effect of all atoms together is the sum of the effects of each alone (Eq. 11):
#
#   $$f(x + \sum_m s_m d_m) = f(x) + \sum_m B(d_m)$$
#
# - A **channel** $c$ is one of the $C$ numbers of a token or an atom.
# - Two atoms are **orthogonal** if their dot product is zero: $d_i · d_j = \sum_c d_{ic} d_{jc} = 0$.
# - The paper writes $f$ as a polynomial of each channel on its own: $f(x) = \sum_{k=1}^K c_k x^k$ (Eq. 10). The $c_k$
#   are numbers, and $K$ is the **degree**.
#
# ## Four lines
#
# In one step of the proof of Eq. 11 all mixed terms vanish: $(d_1 + d_2)^2 = d_1^2 + d_2^2$ (Eq. 16). The only reason
# given is that the atoms are orthogonal.
#
# **Predict:** is Eq. 16 true of these two atoms?

# %%
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import draw
import numpy as np
import torch
from lesson import Lesson
from numpy.polynomial import Chebyshev
from torch.nn.functional import normalize

from dit import Pipeline
from dit.data import encode, load_images
from dit.diffusion import add_noise
from dit.dreambooth import read_subjects
from dit.pictures import to_tensor
from dit.train import TrainConfig, teach
from sparsecode import detach, importance, influence, load_adapter, orthogonality

lesson = Lesson()
root = Path(draw.__file__).parent.parent

# %%
d_1 = torch.tensor([1.0, 1.0])
d_2 = torch.tensor([1.0, -1.0])
print("d₁·d₂ =", (d_1 @ d_2).item())
print("(d₁ + d₂)² − d₁² − d₂² =", ((d_1 + d_2) ** 2 - d_1**2 - d_2**2).tolist())
lesson.check("what is left in channel 1", ((d_1 + d_2) ** 2 - d_1**2 - d_2**2)[0].item(), (2, 2), paper="0")

# %% [markdown]
# It is not. The powers are taken channel by channel, and in each channel the mixed term $2 d_{1c} d_{2c}$ remains: here
# 2 and −2. Orthogonality says only that the *sum* of these terms over the channels is zero. But the layer never forms
# this sum. Eq. 16 needs more: in every channel, at most one atom is not zero.
#
# ## One layer
#
# How large is the error? We take 16 atoms of 64 channels, all orthogonal and of length 1. There are two kinds. In the
# first, each atom has four channels for itself. In the second, all atoms share all channels. The layers are random
# polynomials of degree 1 to 6.
#
# First we compute $B(d_m)$ in two ways. By its definition it is $f(x + s_m d_m) - f(x)$. Eq. 18 writes the same as a
# sum of powers of $d_m$, and `influence.expansion` computes that.

# %%
generator = torch.Generator().manual_seed(0)
randn = partial(torch.randn, generator=generator, dtype=torch.float64)
x, s = randn(64, 64), randn(64, 16)  # tokens (N, C), their codes (N, M)
c = randn(6)  # coefficients of the layer
c_next = randn(3)  # of a second layer, used further below
dictionaries = {
    "no channel shared": torch.block_diag(*normalize(randn(16, 4))),  # (M, C)
    "all channels shared": torch.linalg.qr(randn(64, 16))[0].T,  # (M, C)
}
for name, D in dictionaries.items():
    lesson.check(f"{name}: largest product of two atoms", (D @ D.T - torch.eye(16)).abs().max().item(), (0, 1e-12))

# %%
D = dictionaries["all channels shared"]
alone = torch.zeros(64, 64, dtype=torch.float64)  # Σ_m B(d_m) (N, C)
for m in range(16):
    alone += influence.polynomial(c, x + s[:, m : m + 1] * D[m]) - influence.polynomial(c, x)
difference = (alone - influence.expansion(c, x, s, D).sum(dim=(0, 2))).norm() / alone.norm()  # (K, N, M, C) -> (N, C)
lesson.check("these lines and Eq. 18 differ by", difference.item(), (0, 1e-12))

# %% [markdown]
# Real layers do one thing more. They multiply the tokens by a matrix $W$ first: $f(x W)$. So we add a third kind: atoms
# that share no channel, and then a random rotation $W$. A rotation keeps atoms orthogonal.
#
# **Predict:** for which of the three kinds does Eq. 11 hold at degree 1? And at degree 2?

# %%
W = torch.linalg.qr(randn(64, 64))[0]  # (C, C)
own, shared = dictionaries["no channel shared"], dictionaries["all channels shared"]
kinds = {
    "all channels shared": (x, shared),
    "no channel shared": (x, own),
    "no channel shared, then W": (x @ W, own @ W),
}
missed = {}
for name, (tokens, D) in kinds.items():
    errors = []
    for K in range(1, 7):
        together = influence.polynomial(c[:K], tokens + s @ D) - influence.polynomial(c[:K], tokens)  # (N, C)
        added = influence.expansion(c[:K], tokens, s, D).sum(dim=(0, 2))  # (N, C)
        errors.append(((together - added).norm() / together.norm()).item())
    missed[name] = errors
lesson.table(("error of Eq. 11", *(f"K = {K}" for K in range(1, 7))), [(name, *e) for name, e in missed.items()])
lesson.check("no channel shared: largest error", max(missed["no channel shared"]), (0, 1e-12), paper="0")
lesson.check("all channels shared, K = 2: error", missed["all channels shared"][1], (0.1, 0.6), paper="0")
lesson.check("then W, K = 2: error", missed["no channel shared, then W"][1], (0.1, 0.6), paper="0")

# %%
lesson.show(draw.additivity(missed), "09_additivity", "Error of Eq. 11 by degree: zero only if no channel is shared")

# %% [markdown]
# Atoms that share no channel obey Eq. 11 to the last digit. A matrix brings the error back, because it mixes the
# channels: behind it, all atoms share all of them. At degree 1 everything is additive, because a line has no mixed
# terms. So in a real network effects add up only as far as the network is linear around them.
#
# ## Two layers
#
# Which powers of $d_m$ occur in the output of a second layer? The paper adds the degrees of both layers (Eq. 13). But a
# polynomial *of* a polynomial multiplies them: $(x^3)^3 = x^9$. We add one atom, times a size from −1 to 1, to a token
# and send it through two layers of degree 3. Then we fit a polynomial in the size to the output.
#
# **Predict:** the paper's degree is 3 + 3 = 6. Is a polynomial of degree 6 enough?

# %%
sizes = np.linspace(-1, 1, 41)
d = 8 * shared[0]  # (C,)
after = [influence.polynomial(c_next, influence.polynomial(c[:3], x[0] + size * d)) for size in sizes]  # (C,) each
moved = torch.stack(after).numpy()  # (41, C)
for degree, expected in ((6, (1e-5, 1e-1)), (9, (0, 1e-12))):
    fit = [Chebyshev.fit(sizes, channel, degree)(sizes) for channel in moved.T]
    error = np.linalg.norm(moved - np.stack(fit, axis=1)) / np.linalg.norm(moved)
    lesson.check(f"what a polynomial of degree {degree} misses", error, expected, form=".1g")

# %% [markdown]
# Degree 6 misses a little, degree 9 misses nothing. This makes the paper's next point stronger, not weaker: the atoms
# of an early layer pass through more layers, so higher powers of them reach the output. Their effects should be *less
# linear* than those of atoms in a late layer.
#
# ## The tiny model, block by block
#
# Now the real thing. We teach the tiny model one picture, in three ways:
#
# - **sparse**: 128 atoms in each of its eight blocks, and each token picks 4 % of them (density 0.04);
# - **orthogonal**: the same, but the training loss has a penalty for atoms that are alike: the mean of
#   $\cos^2(d_i, d_j)$ over all pairs. The paper proposes "a simple regularization term" for this;
# - **dense**: each token uses *all* 128 atoms (density 1). Nothing is picked. This is the **control**. All three pass
#   through the same layers. So what we see in "sparse" but not in "dense" comes from picking atoms, not from depth.
#
# The output is the noise that the model predicts for a noisy picture (lesson [5](05_pixart.md)), at three timesteps.

# %%
variants = {
    "sparse": {"density": 0.04},
    "orthogonal": {"density": 0.04, "orthogonality": 1.0},
    "dense": {"density": 1.0},
}
robot = next(s for s in read_subjects(root / "lessons" / "data" / "subjects") if s.name == "robot")
picture, caption = robot.files[:1], robot.captions[:1]  # "a robot in the middle on an orange background"
pipe = Pipeline.from_folder(root / "weights" / "tiny", device="cpu")
model = pipe.transformer
folder = TemporaryDirectory()
files = {variant: Path(folder.name) / f"{variant}.safetensors" for variant in variants}
for variant, given in variants.items():
    epochs = 8 if lesson.quick else 60  # 20 or 150 steps
    config = TrainConfig.of(pipe, atoms=128, lr=0.003, lr_schedule="constant", epochs=epochs, **given)
    teach(pipe, picture, caption, files[variant], config)

# %%
times = torch.tensor([800, 500, 200])
pixels = load_images(picture, pipe.resolution)  # (1, 3, H, W)
data = encode(pipe, pixels, caption)
latents, text, mask = (part.expand(3, *part.shape[1:]) for part in (data.latents, data.text, data.text_mask))
noisy = add_noise(latents, torch.randn(latents.shape, generator=generator), times, pipe.schedule)  # (T, 4, h, w)


def predict():
    return model(noisy, times, text, mask)[:, :4]  # the noise that the model sees, (T, 4, h, w)


def generate():
    return to_tensor(pipe.generate(caption * 3, steps=4 if lesson.quick else 10))  # (3, 3, H, W): three noises


# %% [markdown]
# For each block we measure two errors, both relative to the size of the true effect:
#
# - The **error of Eq. 11** compares the effect of the 16 most important atoms of the block together with the sum of the
#   effects of each alone. It is zero if effects are additive. All other atoms, in all blocks, are switched off.
# - The **error of the first order** compares the effect of one atom with a straight line: the slope of the output, for
#   an infinitely small part of this atom, times the whole atom. It is zero if everything after the atom is linear. All
#   other atoms stay as they are.
#
# We measure the second error for a tenth of an atom too. A smooth curve looks ten times straighter there, so its error
# would be a tenth.
#
# Beside the errors we print the mean $\cos^2$ of two atoms, and the PSNR of the drawn picture (lesson 5): it says how
# well the picture was learned.
#
# **Predict:** will the penalty make effects additive? Will early blocks be less linear? And the dense control?

# %%
alike, psnr = {}, {}  # variant -> mean cos², dB
additive, whole, tenth = {}, {}, {}  # variant -> error of Eq. 11, of the first order, of a tenth of an atom, (blocks,)
for variant, file in files.items():
    load_adapter(model, file)
    alike[variant] = orthogonality(model).item()
    psnr[variant] = -10 * torch.log10(((generate() - pixels) / 2).square().mean()).item()
    best = {layer: score.topk(2 if lesson.quick else 16).indices.tolist() for layer, score in importance(model).items()}
    errors = [influence.additivity_error(model, predict, {layer: atoms}).mean() for layer, atoms in best.items()]
    additive[variant] = torch.stack(errors)  # (blocks,), each the mean over timesteps
    for size, found in ((1.0, whole), (0.1, tenth)):
        errors = []
        for layer, atoms in best.items():
            each = [influence.linearity_error(model, predict, {layer: [m]}, size) for m in atoms[:4]]
            errors.append(torch.stack(each).nanmedian())  # over atoms and timesteps
        found[variant] = torch.stack(errors)  # (blocks,)
    detach(model)

# %%
headings = "errors: mean over blocks", "cos²", "PSNR, dB", "Eq. 11", "first order", "a tenth of an atom"
rows = []
for variant in variants:
    errors = [f"{error[variant].mean():.1%}" for error in (additive, whole, tenth)]
    rows.append((variant, f"{alike[variant]:.4f}", f"{psnr[variant]:.1f}", *errors))
lesson.table(headings, rows)
figure = draw.by_block(additive, whole)
lesson.show(figure, "09_linearity", "Error of Eq. 11 and of the first order by block, three trainings")

# %%
lesson.check("penalty: cos² with it / without", alike["orthogonal"] / alike["sparse"], (0, 0.2), quick=(0, 1))
ratio = (additive["orthogonal"].mean() / additive["sparse"].mean()).item()
lesson.check("penalty: error of Eq. 11 with it / without", ratio, (0.5, 2))
early = {name: error[:4].mean().item() for name, error in whole.items()}
lesson.check("first order, sparse, blocks 0 to 3: error", early["sparse"], (0.25, 1), quick=(0, 1.5), form=".0%")
lesson.check("first order, sparse, last block: error", whole["sparse"][-1].item(), (0, 0.1), form=".0%")
early_tenth = tenth["sparse"][:4].mean().item()
lesson.check("a tenth of it, sparse, blocks 0 to 3: error", early_tenth, (0.15, 2), quick=(0, 3), form=".0%")
lesson.check("first order, dense, blocks 0 to 3: error", early["dense"], (0, 0.1), form=".0%")

# %% [markdown]
# - **The penalty makes atoms orthogonal, but effects become no more additive** (first two checks). The four lines said
#   so: orthogonality is not what Eq. 11 needs.
# - **Early blocks are far less linear than the last one** (next two checks), as the paper's argument says.
# - **But the control says that the reason is another one** (last check). Dense atoms are nearly linear even in early
#   blocks. If high powers were the reason, dense atoms would show them too, because they pass through the same layers.
# - **The size of the atoms is not the reason either.** Dense atoms may be smaller, and small changes are more linear.
#   But with smooth layers a tenth of a sparse atom would have a tenth of the error. It has far more (last column, row
#   "sparse").
#
# So the reason is the picking. When an atom is taken out, later layers see a slightly different input. Where two of
# their atoms have nearly equal scores for a token, the other one may now be picked, and the output jumps. A slope knows
# nothing of jumps. Behind an early block there are many layers that pick. Behind the last block there is none. (The
# error of Eq. 11 shows no jumps, because there the later atoms are off.)
#
# ## Structure or detail?
#
# The paper concludes that atoms of early layers make structure, and atoms of late layers make details. To test this we
# draw the robot with all atoms, and again without the atoms of one block. The difference is what this block does to the
# picture.
#
# Structure means broad areas, details are fine. How broad is a difference? A picture is a sum of waves, as the signals
# of lesson [3](03_fourier_toy.md) are. We call a wave **broad** if it has fewer than 4 periods along a side of the
# picture. We measure which share of the difference, in energy (its squared size), is in broad waves.
#
# **Predict:** does the share of broad waves fall from block to block?

# %%
cycles = torch.fft.fftfreq(64) * 64  # periods along a side
broad = cycles[:, None] ** 2 + cycles**2 < 4**2  # (H, W)
changes, shares = {}, {}
for variant in ("sparse", "dense"):
    load_adapter(model, files[variant])
    drawn = generate()
    changes[variant], shares[variant] = [], []
    for layer in importance(model):
        with influence.scale_atoms(model, {layer: range(128)}, 0.0):
            change = drawn - generate()  # (3, 3, H, W)
        energy = torch.fft.fft2(change).abs().square().sum(1)  # (3, H, W): in each wave
        changes[variant].append(change[0])
        shares[variant].append(((energy * broad).sum((1, 2)) / energy.sum((1, 2))).mean().item())
    figure = draw.depth(drawn[0], changes[variant])
    name = "09_depth" if variant == "sparse" else "09_depth_dense"
    lesson.show(figure, name, f"The picture, and how it changes without the atoms of each block: {variant}")
    detach(model)

# %% [markdown]
# *How each block changes the picture, first with sparse atoms, then with dense ones.*

# %%
rows = [(variant, *(f"{share:.0%}" for share in values)) for variant, values in shares.items()]
lesson.table(("broad waves, by block", *range(8)), rows)
for variant, values in shares.items():
    gain = np.mean(values[4:]) - np.mean(values[:4])
    lesson.check(f"{variant}: blocks 4 to 7 − blocks 0 to 3", gain, (-0.05, 0.3), quick=(-0.5, 0.5), paper="below 0")

# %% [markdown]
# It does not fall from block to block. In later blocks the mean share is a little larger for sparse atoms, and a little
# smaller for dense ones. The pictures say the same: both early and late blocks draw outlines. So on this model **depth
# decides how linear a sparse atom is, but not whether it makes structure or details**.
#
# ## Where it stops being true
#
# - **A power is not a wave.** The paper connects high powers of $d_m$ with structure and low powers with details. It
#   gives no reason for this, and none follows from the polynomials: they act on channels, not on places.
# - **One small model.** It has eight blocks and learned one picture. The paper's model has 28 blocks.
# - **Blocks react.** Without the atoms of one block, all later blocks see another input and pick other atoms. The
#   pictures show both together.
#
# ## Exercises
#
# 1. Give two atoms of three channels that are orthogonal and obey Eq. 11 for every polynomial. Give two that are
#    orthogonal and do not.
# 2. How many atoms of $C$ channels can obey Eq. 11 together? How many can be orthogonal? The paper's dictionary has
#    $M = 256$ atoms.
# 3. Eight layers of degree 3 follow an atom. Which degree does Eq. 13 give, and which is right?
#
# <details>
# <summary>Answers</summary>
#
# 1. $(1, 0, 0)$ and $(0, 1, 1)$ share no channel. $(1, 1, 0)$ and $(1, -1, 0)$ are orthogonal, but they share two.
# 2. At most $C$ in both cases. But if $C$ atoms obey Eq. 11, each of them is a single channel. In the tiny model
#    $C = 128$, so 256 atoms cannot even be orthogonal. In PixArt-Σ $C = 1152$, so they can.
# 3. Eq. 13 adds the degrees and gives 24. Degrees multiply, so $3^8 = 6561$ is right.
#
# </details>

# %%
folder.cleanup()
lesson.end()
