# %% [markdown]
# # 9. What does one atom do to the picture?
#
# **The question.** An atom is added to a token in one layer. What does it do to the output, many layers later? Appendix
# A of the paper gives two answers. Orthogonal atoms act independently of each other. And atoms of early layers make the
# structure of a picture, those of late layers its details. Do these answers hold?
#
# ![A picture, and what is missing from it without the atoms of one block](figures/09_depth.png)
#
# *A robot that the tiny model has learned (left), and how it changes without the atoms of one block. One colour scale
# for all: red is brighter with the atoms, blue is darker.*
#
# You need lessons [2](02_attention_as_dictionary.md) and [6](06_finetune.md). It takes about 50 seconds on two CPU
# cores, 17 with `--quick`.
#
# ## The words
#
# - The **effect** of an atom is the output with it minus the output without it. The paper calls it $B(d_m)$.
# - Effects are **additive** if the effect of all atoms together is the sum of the effects of each alone (Eq. 11):
#
#   $$f(x + \sum_m s_m d_m) = f(x) + \sum_m B(d_m)$$
#
# - Two atoms are **orthogonal** if their product is zero: $d_i · d_j = 0$, the sum over all channels of
#   $d_{ic} d_{jc}$. A **channel** $c$ is one of the $C$ numbers of a token.
# - $f$ is the layer that follows. The paper writes it as a polynomial, taken of each channel on its own:
#   $f(x) = \sum_{k=1}^K c_k x^k$ (Eq. 10). $K$ is its **degree**.
#
# ## Four lines
#
# The proof of Eq. 11 takes one step with no reason but orthogonality: mixed terms vanish, so
# $(d_1 + d_2)^2 = d_1^2 + d_2^2$ (Eq. 16). **Predict:** is it true of these two atoms?

# %%
from functools import partial
from pathlib import Path
from tempfile import mkdtemp

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
# 2 and −2. Orthogonality says only that these terms add up to zero *over the channels*. Nothing adds them up. What Eq.
# 16 needs is stronger: in every channel, at most one atom is not zero.
#
# ## One layer
#
# How large is the error? We take 16 atoms of 64 channels, all orthogonal and of length 1, in two kinds: each atom has
# four channels for itself, or all atoms share all channels. The layers are random polynomials of degree 1 to 6.
#
# First $B(d_m)$ itself. By its meaning it is $f(x + s_m d_m) - f(x)$. Eq. 18 writes the same as a sum of powers of
# $d_m$, and `influence.expansion` computes that.

# %%
generator = torch.Generator().manual_seed(0)
randn = partial(torch.randn, generator=generator, dtype=torch.float64)
x, s = randn(64, 64), randn(64, 16)  # tokens (N, C), their codes (N, M)
c, c_next = randn(6), randn(3)  # coefficients of the polynomials, for later a second one
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
# Real layers do one thing more: before anything that is not linear they multiply tokens by a matrix, $f(x W)$. So we
# add a third kind: atoms that share no channel, behind a random rotation $W$. A rotation keeps them orthogonal.
#
# **Predict:** for which of the three does Eq. 11 hold at degree 1? And at degree 2?

# %%
W = torch.linalg.qr(randn(64, 64))[0]  # (C, C)
own, shared = dictionaries.values()
kinds = {"all channels shared": (x, shared), "no channel shared": (x, own), "…, behind a matrix W": (x @ W, own @ W)}
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
lesson.check("behind a matrix, K = 2: error", missed["…, behind a matrix W"][1], (0.1, 0.6), paper="0")

# %%
lesson.show(draw.additivity(missed), "09_additivity", "Error of Eq. 11 by degree: zero only if no channel is shared")

# %% [markdown]
# Without a matrix, atoms with channels of their own obey Eq. 11 to the last digit. Any matrix brings the error back,
# because it makes all atoms share all channels. At degree 1 everything is additive: a line has no mixed terms. So in a
# real network, effects add up as far as the network is linear around them.
#
# ## Two layers
#
# In the output of a second layer, which powers of $d_m$ occur? The paper adds the degrees of both layers (Eq. 13). But
# a polynomial *of* a polynomial multiplies them: $(x^3)^3 = x^9$. We send one atom, times a size from −1 to 1, through
# two layers of degree 3, and ask which polynomial in the size describes the output.

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
# So a polynomial of degree 9 is needed. This makes the paper's next point stronger, not weaker: an atom of a shallow
# layer passes through more layers, so higher powers of it reach the output. Its effect should be *less linear* than
# that of an atom in a deep layer.
#
# ## The tiny model
#
# Now the real thing. We teach the tiny model one picture, in three ways:
#
# - **sparse**: 128 atoms in each of its eight blocks, and each token uses 4 % of them (density 0.04);
# - **orthogonal**: the same, and training is penalised for atoms that are alike. The penalty is the mean of
#   $\cos^2(d_i, d_j)$ over all pairs. The paper proposes "a simple regularization term" of this kind;
# - **dense**: each token uses *all* 128 atoms (density 1). Nothing is picked. This is the **control**: what we see with
#   density 0.04 but not here comes from picking atoms, not from the depth of the network.
#
# The output is the predicted noise in a noisy picture, at three timesteps (lesson 5).

# %%
variants = {
    "sparse": {"density": 0.04},
    "orthogonal": {"density": 0.04, "orthogonality": 1.0},
    "dense": {"density": 1.0},
}
robot = next(s for s in read_subjects(root / "lessons" / "data" / "subjects") if s.name == "robot")
picture, caption = robot.files[:1], robot.captions[:1]  # "a robot in the middle on an orange background"
pipe = Pipeline.from_folder(root / "weights" / "tiny", device="cpu")
model, folder = pipe.transformer, Path(mkdtemp())
files = {variant: folder / f"{variant}.safetensors" for variant in variants}
for variant, given in variants.items():
    config = TrainConfig.of(pipe, atoms=128, lr=0.003, epochs=8 if lesson.quick else 60, **given)  # 20 or 150 steps
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
# - the **error of Eq. 11**: the 16 most important atoms of the block together, against the sum of each alone;
# - the **error of the first order**: what an atom does, against the slope of the output along that atom. It is zero if
#   everything after the atom is linear. Here one atom is taken out while all others stay. We also take a tenth of an
#   atom: a smooth curve looks ten times straighter there, so its error would be a tenth.
#
# Beside them we print the mean $\cos^2$ of two atoms, and how well the picture was learned: **PSNR**, the peak
# signal-to-noise ratio. At 20 dB the drawing differs from the picture by a tenth of the range from black to white.
#
# **Predict:** will the penalty make effects additive? Will early blocks be less linear? And the dense control?

# %%
summary = {}  # variant -> mean cos², PSNR, three errors for each block (blocks,)
for variant, file in files.items():
    load_adapter(model, file)
    psnr = -10 * torch.log10(((generate() - pixels) / 2).square().mean()).item()
    additive, linear, tenth = [], [], []
    for layer, score in importance(model).items():
        best = score.topk(2 if lesson.quick else 16).indices.tolist()
        additive.append(influence.additivity_error(model, predict, {layer: best}).mean())  # over timesteps
        for size, found in ((1.0, linear), (0.1, tenth)):
            errors = [influence.linearity_error(model, predict, {layer: [m]}, size) for m in best[:4]]
            found.append(torch.stack(errors).nanmedian())  # over atoms and timesteps
    errors = [torch.stack(values) for values in (additive, linear, tenth)]  # (blocks,) each
    summary[variant] = orthogonality(model).item(), psnr, *errors
    detach(model)

# %%
lesson.table(
    ("errors: mean over blocks", "cos²", "PSNR, dB", "Eq. 11", "first order", "a tenth of an atom"),
    [(v, f"{c:.4f}", f"{p:.1f}", *(f"{e.mean():.1%}" for e in errors)) for v, (c, p, *errors) in summary.items()],
)
lesson.show(draw.by_block(summary), "09_linearity", "Error of Eq. 11 and of the first order by block, three trainings")

# %%
(_, _, sparse, first, tenth), orthogonal, dense = summary["sparse"], summary["orthogonal"], summary["dense"]
less = orthogonal[0] / summary["sparse"][0]
lesson.check("penalty: cos² with it / without", less, (0, 0.2), quick=(0, 1))
lesson.check("penalty: error of Eq. 11 with it / without", (orthogonal[2].mean() / sparse.mean()).item(), (0.5, 2))
early, late, early_tenth, early_dense = first[:4].mean(), first[-1], tenth[:4].mean(), dense[3][:4].mean()
lesson.check("first order, sparse, blocks 0 to 3: error", early.item(), (0.25, 1), quick=(0, 1.5), form=".0%")
lesson.check("first order, sparse, last block: error", late.item(), (0, 0.1), form=".0%")
lesson.check("a tenth of it, sparse, blocks 0 to 3: error", early_tenth.item(), (0.15, 2), quick=(0, 3), form=".0%")
lesson.check("first order, dense, blocks 0 to 3: error", early_dense.item(), (0, 0.1), form=".0%")

# %% [markdown]
# - **The penalty makes atoms orthogonal and costs nothing. But effects become no more additive.** The four lines said
#   so: orthogonality is not what Eq. 11 needs.
# - **Early blocks are far less linear than late ones**, just as the paper's argument says.
# - **But the control disagrees about the reason.** Dense atoms are nearly linear in *every* block. Were high powers the
#   reason, dense atoms would show them too: they pass through the same layers. And a tenth of an atom would have a
#   tenth of the error, but it has more than half of it.
#
# The reason is the picking. Taking an atom out changes, a little, what later layers see. Where two of their atoms are
# nearly equal for a token, the other one is now picked, and the output jumps. A slope knows nothing of jumps. Behind an
# early block there are many layers that pick; behind the last block there is none.
#
# ## Structure or detail?
#
# The paper concludes: atoms of shallow layers make structure, those of deep layers detail. To test it we draw the robot
# with all atoms, and again without the atoms of one block. The difference is what this block does to the picture.
#
# Structure means broad areas, detail means fine ones. A picture is a sum of waves. We call a wave **broad** if it has
# fewer than 4 periods along a side of the picture, and measure which share of the difference is broad.
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
    lesson.show(figure, "09_depth" if variant == "sparse" else "09_depth_dense", f"Changes by block, {variant}")
    detach(model)

# %%
lesson.table(
    ("broad waves, by block", *range(len(shares["sparse"]))),
    [(variant, *(f"{share:.0%}" for share in values)) for variant, values in shares.items()],
)

for variant, (*first_half, a, b, c, d) in shares.items():
    gain = np.mean([a, b, c, d]) - np.mean(first_half)
    lesson.check(f"{variant}: blocks 4 to 7 − blocks 0 to 3", gain, (-0.05, 0.3), quick=(-0.5, 0.5), paper="below 0")

# %% [markdown]
# *The change of the picture by each block, first with sparse atoms, then with dense ones.*
#
# It does not fall. Blocks in the middle change the broadest areas, and every block draws outlines. So on this model
# **depth decides how linear a sparse atom is, but not whether it makes structure or detail**.
#
# ## Where it stops being true
#
# - **A power is not a wave.** The paper connects high powers of $d_m$ with structure and low powers with detail. It
#   gives no reason for this, and none follows from the polynomials: they act on channels, not on places.
# - **One small model.** It has eight blocks and learned one picture. The paper shows pictures of a model of 28 blocks.
# - **Blocks react.** Without the atoms of one block, all later blocks see something else and pick other atoms. The
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
# 1. $(1, 0, 0)$ and $(0, 1, 1)$ share no channel. $(1, 1, 0)$ and $(1, -1, 0)$ are orthogonal and share two.
# 2. At most $C$ in both cases, but with Eq. 11 and $M = C$ each atom is a single channel. In the tiny model $C = 128$,
#    so 256 atoms cannot even be orthogonal. In PixArt-Σ $C = 1152$, so they can.
# 3. Eq. 13 adds: 24. Right is $3^8 = 6561$.
#
# </details>

# %%
lesson.end()
