# %% [markdown]
# # 1. A signal as a sum of few pieces
#
# **The question.** Take a large collection of patterns. Can a signal be written as a sum of only a few of them? How do
# we find these few? It can, and a loop of four lines finds them:
#
# ![Three patches of a picture, each equal to a sum of a few patterns](figures/01_patches.png)
#
# *Three patches of a picture. Each is nearly a sum of five patterns, each times a number. The patterns are learned.*
#
# You need to know what a gradient is. The lesson runs in about 17 seconds on two CPU cores, in 5 with `--quick`.
#
# ## The words
#
# - A **signal** is a row of $C$ numbers, $x$. A patch of 10 × 10 pixels is a signal with $C = 100$.
# - An **atom** $d$ is a pattern of the same $C$ numbers. Its norm $\lVert d \rVert$ is 1, so patterns compare fairly.
# - A **dictionary** $D$ is a table of $M$ atoms, one per row: $M × C$.
# - The **code** of a signal is a row of $M$ numbers, $s$, one **coefficient** per atom: $x ≈ s D$, that is
#   $x ≈ s_1 d_1 + s_2 d_2 + …$ For $N$ signals at once, $X ≈ S D$ (Eq. 4 of the paper).
# - A code is **sparse** if most of its coefficients are exactly zero.
#
# If $M > C$, many codes fit a signal perfectly. Sparse coding asks for one that fits well *and* is sparse. It minimises
# the **objective**
#
# $$F(S) = \lVert X - S D \rVert^2 + λ \lVert S \rVert_1 \qquad \text{(Eq. 5)}$$
#
# The first part is the squared error. The second is $λ$ times the sum of all $|s|$, a price for every coefficient: an
# atom is used only if it lowers the error by enough. $λ$ sets the price. This problem is called the **lasso**.

# %%
import warnings

import draw
import numpy as np
import torch
from lesson import Lesson
from torch.nn.functional import normalize

from dit.tiny.scenes import natural_image
from sparsecode import fista, ista, lasso_objective, learn_dictionary, optimality_gap, soft_threshold

lesson = Lesson()
generator = torch.Generator().manual_seed(0)


def randn(*shape):
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


# %% [markdown]
# ## One coefficient: where exact zeros come from
#
# Why does the price $λ|s|$ give zeros, and not just small numbers? Look at one coefficient. Let $z$ be its value
# without a price, and minimise $\frac12 (s - z)^2 + λ|s|$. (The ½ cancels the 2 of the derivative.)
#
# $|s|$ has a kink at 0, and no derivative there. But a line through the kink is never above $|s|$ if its slope is from
# −1 to 1. Each of these slopes is called a **subgradient**, and takes the place of the derivative. At the minimum, the
# derivative of the square plus $λ$ times a slope of $|s|$ is zero:
#
# 1. If $s > 0$, the slope is 1: $s - z + λ = 0$, so $s = z - λ$. This needs $z > λ$.
# 2. If $s \lt 0$, the slope is −1: $s - z - λ = 0$, so $s = z + λ$. This needs $z \lt -λ$.
# 3. If $s = 0$, the slope is any $g$ from −1 to 1: $0 - z + λ g = 0$. This is possible whenever $|z| ≤ λ$.
#
# Together: move $z$ by $λ$ towards zero, and stop at zero. This is the **soft threshold** (Eq. 6), written $σ_λ$:
#
# $$σ_λ(z) = \mathrm{sign}(z) \max(|z| - λ, 0)$$
#
# The check tries every $s$ on a fine grid and compares the best one with the formula.

# %%
grid = torch.linspace(-3, 3, 601)  # (G,), 0.01 apart
costs = {z: 0.5 * (grid - z) ** 2 + grid.abs() for z in (0.6, 2.0)}  # λ = 1
minima = {z: grid[cost.argmin()].item() for z, cost in costs.items()}
formula = {z: soft_threshold(torch.tensor(z), 1.0).item() for z in costs}
difference = max(abs(minima[z] - formula[z]) for z in costs)
lesson.check("largest difference of the formula from the grid", difference, (0, 0.01))
figure = draw.threshold(grid, costs, minima, soft_threshold(grid, 1.0))
lesson.show(figure, "01_threshold", "Two objectives of one coefficient, and the soft threshold as a curve")

# %% [markdown]
# ## All coefficients: ISTA
#
# In Eq. 5 the atoms overlap, so the best value of one coefficient depends on all others. We cannot solve for each one
# alone. **ISTA**, the iterative shrinkage-thresholding algorithm, repeats two small moves instead. It takes a step down
# the gradient of the squared error, $∇ = 2 (S D - X) D^T$. Then it applies the soft threshold:
#
# $$S ← σ_{λ/L}(S - ∇ / L)$$
#
# Why these two? Replace the squared error by a round bowl: a parabola that touches the error at the present code, and
# is equally curved in all directions. Its curvature is the largest that the error has, $L = 2 \lVert D D^T \rVert_2$,
# twice the largest eigenvalue of $D D^T$. So the bowl is nowhere below the error. In the bowl the coefficients do not
# depend on each other. The minimum of bowl plus price is the soft threshold of the last section, with $z = s - ∇/L$ and
# with $λ/L$ for $λ$. One step of ISTA goes to this minimum, so the objective can never rise.
#
# We make 200 signals whose codes we know: 5 of 256 random atoms each, plus noise with 1 % of their energy (the sum of
# squares). Four lines of ISTA run beside the library's `fista`, which is explained below.

# %%
atoms = normalize(randn(256, 64))  # D (M, C)
chosen = torch.rand(200, 256, generator=generator).topk(5).indices  # (N, 5)
planted = torch.zeros(200, 256, dtype=torch.float64).scatter(1, chosen, randn(200, 5))  # (N, M)
signals, noise = planted @ atoms, randn(200, 64)  # (N, C)
signals += 0.1 * noise * signals.norm() / noise.norm()  # noise with 1 % of the squared length
largest = 2 * (signals @ atoms.T).abs().amax(dim=1)  # (N,): the largest λ that matters, explained below
lam = 0.1 * largest.median().item()

# %%
L = 2 * torch.linalg.matrix_norm(atoms @ atoms.T, 2)
codes = torch.zeros(200, 256, dtype=torch.float64)
for _ in range(1000):
    gradient = 2 * (codes @ atoms - signals) @ atoms.T  # (N, C) x (C, M) -> (N, M)
    codes = soft_threshold(codes - gradient / L, lam / L)  # (N, M)

# %% [markdown]
# **Predict:** each signal was made of 5 atoms and some noise. How many of its 256 coefficients will not be zero?

# %%
library = fista(signals, atoms, lam)  # (N, M)
naive, fast = (lasso_objective(signals, s, atoms, lam).item() for s in (codes, library))
lesson.check("objective, four lines of ISTA:", naive, (226.5105, 226.5107), form=".4f")
lesson.check("objective, the library:", fast, (226.5105, 226.5107), form=".4f")
used = library.count_nonzero().item() / len(library)
lesson.check("atoms used per signal:", used, (4.5, 5.1), paper="only a few non-zero")

# %% [markdown]
# ## How to know that one has arrived
#
# Take the gradient of the squared error, and let $g_m$ be its entry for the coefficient $s_m$. At the minimum, the
# argument for one coefficient holds for each of them:
#
# - An atom is **used** ($s_m ≠ 0$): error and price balance exactly. $g_m = -λ \mathrm{sign}(s_m)$, so $|g_m| = λ$.
# - An atom is **not used** ($s_m = 0$): the error pulls too weakly to pay the price. $|g_m| ≤ λ$.
#
# This is the **optimality condition**. A code that meets it is a minimum, because the objective is convex: it has no
# second valley to be trapped in. We plot $g_m$ against $s_m$ for all 51,200 coefficients. By the condition, they form a
# step:

# %%
gradient = 2 * (library @ atoms - signals) @ atoms.T  # (N, M)
active = library != 0
pull = gradient.abs() / lam  # (N, M)
lesson.check("used: |gradient| / λ, smallest", pull[active].min().item(), (0.9999, 1.0001), form=".5f")
lesson.check("used: |gradient| / λ, largest", pull[active].max().item(), (0.9999, 1.0001), form=".5f")
lesson.check("not used: |gradient| / λ, largest", pull[~active].max().item(), (0.9, 1.0001), form=".5f")
figure = draw.condition(library, gradient, lam)
lesson.show(figure, "01_condition", "Gradient against coefficient: a step down from +λ to −λ, vertical at zero")

# %% [markdown]
# The condition also gives the largest $λ$ that matters. At $S = 0$ the gradient is $-2 X D^T$. If all of it is within
# $±λ$, zero *is* the minimum. So from $λ = \max|2 X D^T|$ on, every coefficient is zero.
#
# How far is a code from the condition? One more step of ISTA tells, because at the minimum a step changes nothing. The
# **optimality gap** is made of three parts:
#
# $$\mathrm{gap} = L \max|s - σ_{λ/L}(s - ∇/L)| \,/\, \max|2 x D^T|$$
#
# - the largest change of a coefficient in this step;
# - times $L$, which turns the change of a coefficient into a gradient;
# - divided by the largest gradient at zero, so that the units cancel.
#
# The gap is 0 at the minimum. For the code zero it is nearly 1 when $λ$ is small. For many signals we take the largest
# gap. The library stops when it is at most `tol`, 1e-6 unless told otherwise.

# %%
step = soft_threshold(library - gradient / L, lam / L)  # (N, M): one more step of ISTA
by_hand = (L * (library - step).abs().amax(dim=1) / largest).max().item()
gap = optimality_gap(signals, library, atoms, lam)
lesson.check("optimality gap:", gap, (0, 2e-6))
lesson.check("its difference from the three lines above:", abs(gap - by_hand), (0, 1e-9))

# %% [markdown]
# ## Why a step along the last move helps: the narrow valley
#
# ISTA's step size is $1/L$, and $L$ is the *largest* curvature. When two atoms are nearly the same, this hurts. Take
# two atoms with a cosine (here their scalar product) of 0.98, and a signal that is twice the first atom:
#
# - Adding to both coefficients changes the error fast. This direction is steep, and it sets $L$.
# - Moving weight from one to the other hardly changes the error: the atoms are nearly equal. In this direction the
#   curvature is $(1 - 0.98) / (1 + 0.98)$ of the steep one, about 1/100.
#
# So the first step drops onto the valley's floor, where both atoms share the signal. From there each step covers only
# about 1/100 of the way that is left. But all these short steps point in the *same* direction. **Momentum** uses that:
# start each step from a point $Y$, which lies ahead of the code in the direction of the last move. Moves that agree add
# up. Moves across the valley change sign and cancel. ISTA with this change is **FISTA** (the F is for fast):
#
# $$S_k = σ_{λ/L}(Y_k - ∇(Y_k)/L), \qquad Y_{k+1} = S_k + β_k (S_k - S_{k-1})$$
#
# $β_k$ grows from 0 towards 1, about $(k - 1)/(k + 2)$, so later steps keep more of the last move.
#
# **Predict:** ISTA and FISTA take 36 steps each. How much of the way along the floor has each of them gone?

# %%
c = 0.98
twins = torch.tensor([[1.0, 0.0], [c, (1 - c**2) ** 0.5]], dtype=torch.float64)  # (2, 2), cosine c
target = 2 * twins[:1]  # (1, 2), twice the first atom
walks = {}
methods = ("ISTA", ista, {}), ("FISTA", fista, {"restart": False, "greedy": 0})  # FISTA as it was published
warnings.filterwarnings("ignore", "stopped at max_iter")  # 36 steps are too few, and that is what we want to see
for name, solve, options in methods:
    visited = [torch.zeros(2, dtype=torch.float64)]
    solve(target, twins, 0.1, max_iter=36, tol=0, callback=lambda k, s: visited.append(s[0].clone()), **options)
    walks[name] = torch.stack(visited)  # (37, 2)

# %%
minimum = (1.95, 0)  # atom 1 alone, times 2 − λ/2
done = {name: ((walk[-1, 0] - walk[1, 0]) / (minimum[0] - walk[1, 0])).item() for name, walk in walks.items()}
lesson.check("ISTA: part of the way along the floor", done["ISTA"], (0.2, 0.4), form=".0%")
lesson.check("FISTA: part of the way along the floor", done["FISTA"], (0.95, 1.05), form=".0%")

# %%
side = torch.linspace(-0.35, 2.45, 120, dtype=torch.float64)
points = torch.cartesian_prod(side, side).flip(1)  # (120 * 120, 2): every pair of coefficients
errors = (target - points @ twins).square().sum(dim=1) + 0.1 * points.abs().sum(dim=1)  # Eq. 5
figure = draw.valley(errors.view(120, 120), (-0.35, 2.45, -0.35, 2.45), walks, minimum)
lesson.show(figure, "01_valley", "The objective is a narrow valley; ISTA crawls along its floor, FISTA runs")

# %% [markdown]
# *Left: 36 steps of ISTA. Right: 36 steps of FISTA, which has just passed the minimum (101 %). On each grey line the
# objective is constant.*
#
# ## What is proved: two bounds
#
# How far can the objective be above its minimum after $k$ steps?
#
# | | never more than | for a bound 100 times lower |
# |---|---|---|
# | ISTA | $L \lVert S^⋆ \rVert^2 / 2k$, called $O(1/k)$ | 100 times as many steps |
# | FISTA | $2 L \lVert S^⋆ \rVert^2 / (k + 1)^2$, called $O(1/k^2)$ | 10 times as many steps |
#
# $S^⋆$ is the code at the minimum, and both methods start from zero. The table holds **bounds**, which are proved for
# *every* problem. On a given problem a method may be far quicker. We draw each bound as a region that the curve may not
# enter, and measure what happens on a hard problem: spikes behind a blur. Each atom is a bump that overlaps with its
# neighbours.

# %%
places = torch.arange(100, dtype=torch.float64)
bumps = normalize(torch.exp(-0.5 * ((places - places[:, None]) / 5) ** 2))  # (M, C), one at each place
spikes = torch.zeros(1, 100, dtype=torch.float64)
spikes[0, [12, 30, 37, 60, 66, 85]] = torch.tensor([1.0, 1.5, -1.0, 1.2, 1.0, -1.5], dtype=torch.float64)
blurred = spikes @ bumps + 0.01 * randn(1, 100)  # (1, C)
weight = 0.02 * (blurred @ bumps.T).abs().max().item()
best = fista(blurred, bumps, weight, tol=1e-13, max_iter=100_000)  # (1, M)
lowest = lasso_objective(blurred, best, bumps, weight)

# %%
steps, curves = (300 if lesson.quick else 3000), {}
for name, solve, options in methods:
    values = []
    solve(blurred, bumps, weight, max_iter=steps, tol=0, **options,
          callback=lambda k, s: values.append(lasso_objective(blurred, s, bumps, weight)))  # fmt: skip
    curves[name] = torch.stack(values) / lowest - 1  # (steps,)

# %%
k = torch.arange(1, steps + 1)
scale = torch.linalg.matrix_norm(bumps, 2) ** 2 * best.square().sum() / lowest  # L ‖S*‖² / 2, relative
limits = {"ISTA": scale / k, "FISTA": 4 * scale / (k + 1) ** 2}  # (steps,) each
for name in curves:
    share = (curves[name] / limits[name]).max().item()
    lesson.check(f"{name}: largest share of its bound that it reaches", share, (0, 1), paper="bounded")
ratio = (curves["ISTA"][-1] / curves["FISTA"][-1]).item()
lesson.check("ISTA / FISTA, distance after the last step:", ratio, (2e3, 5e4), quick=(5, 50))
figure = draw.bounds(curves, limits)
lesson.show(figure, "01_bounds", "Distance to the minimum for ISTA and FISTA, and the region that the theorems exclude")

# %% [markdown]
# On these logarithmic axes a bound of $1/k$ is a straight line, and $1/k^2$ falls twice as steeply. ISTA never reaches
# a tenth of its bound. FISTA reaches almost a third of its own, and is far below it at the end. It also wiggles: the
# momentum carries it past the minimum, and it comes back. A bound allows all this.
#
# *A remark.* The library's `fista` adds two ideas that are not in the original. It drops its momentum when that points
# uphill (restart). Its first 30 steps move only one coefficient of each signal, the one that gains most (greedy start).
# Both help a lot on sparse problems, such as the 200 signals above; on this blur they do not. The minimum is the same.
#
# ## What λ does
#
# A high price gives few atoms and a large error. A low price gives many atoms and a small error, down to where atoms
# explain the noise. The 200 signals are 1 % noise.
#
# **Predict:** we lower $λ$ until the error is 1 % too. Are the atoms in use then the right ones?

# %%
shares = torch.logspace(0, -3, 7 if lesson.quick else 31).tolist()  # of the largest λ that matters
path = [fista(signals, atoms, share * largest.max().item()) for share in shares]  # (N, M) each
counts = [s.count_nonzero().item() / len(s) for s in path]
errors = [((signals - s @ atoms).square().sum() / signals.square().sum()).item() for s in path]
hits = [((s != 0) & (planted != 0)).sum().item() / max(1, s.count_nonzero().item()) for s in path]

# %%
rows = [part * (len(path) // 6) for part in (2, 3, 4, 6)]  # λ at 0.1, 0.03, 0.01 and 0.001 of the largest
table = [(f"{shares[i]:.3f}", f"{counts[i]:.1f}", f"{hits[i]:.0%}", f"{errors[i]:.2%}") for i in rows]
lesson.table(("λ / largest λ", "atoms per signal", "of them right", "error"), table)
reached = next(i for i, error in enumerate(errors) if error < 0.01 / 1.01)  # 0.01 of 1 + 0.01 is noise
lesson.check("error just below the noise: right atoms", hits[reached], (0.2, 0.35), quick=(0.1, 0.35), form=".0%")
lesson.check("smallest λ: right atoms", hits[-1], (0.07, 0.09), form=".0%")
rise = max(later - earlier for earlier, later in zip(errors, errors[1:]))
lesson.check("largest rise of the error as λ falls:", rise, (-1, 0))

# %%
row = int(planted.abs().topk(5).values[:, 4].argmax())  # a signal in which all five atoms count
marks = {i: f"{hits[i]:.0%} right" for i in rows[:3]}
figure = draw.path(shares, torch.stack([s[row] for s in path]), planted[row], counts, errors, 0.01 / 1.01, marks)
lesson.show(figure, "01_lambda", "Coefficients of one signal as λ falls, and the error against the number of atoms")

# %% [markdown]
# Most are not. The right atoms come first, at a high price. But the price keeps their coefficients below the truth (◂):
# the soft threshold shrinks what it keeps. So the right atoms alone leave a larger error than the noise. When a lower
# price has brought the error down to 1 %, most atoms in use were never in the signal. Stop earlier, at a larger error.
#
# Other programs scale the price differently, and call it α. Eq. 5 has no ½ and does not divide by $C$. For the same
# minimum (`Lasso` with `fit_intercept=False`):
#
# | | minimises | set |
# |---|---|---|
# | here | $\lVert x - s D \rVert^2 + λ \lVert s \rVert_1$ | $λ$ |
# | scikit-learn's `sparse_encode` | $\frac12 \lVert x - s D \rVert^2 + α \lVert s \rVert_1$ | $α = λ / 2$ |
# | scikit-learn's `Lasso` | $\frac{1}{2C} \lVert x - s D \rVert^2 + α \lVert s \rVert_1$ | $α = λ / 2C$ |
#
# ## Learned atoms
#
# So far the dictionary was given. It can be learned too: solve for the codes, then move each atom to where it lowers
# the error most, and repeat. `learn_dictionary` does this. Here its signals are patches of 10 × 10 pixels. They come
# from computer drawings whose edges and shading resemble photographs. We subtract the mean of each patch.

# %%
SIDE, ATOMS, SHARE = 10, 144, 0.1  # pixels of a patch; M; λ as a share of the largest
rng = np.random.default_rng(0)
pictures = [torch.tensor(np.asarray(natural_image(rng, 128).convert("L")) / 255).float() for _ in range(24)]
windows = torch.cat([p.unfold(0, SIDE, 1).unfold(1, SIDE, 1).reshape(-1, SIDE**2) for p in pictures])  # (…, C)
windows = windows[torch.randperm(len(windows), generator=generator)[: 3000 if lesson.quick else 16000]]
windows = windows - windows.mean(dim=1, keepdim=True)
patches = windows[windows.norm(dim=1) > windows.norm(dim=1).median()]  # (N, C), the half with something in it

# %%
weight = SHARE * 2 * patches.norm(dim=1).median().item()
learned, s = learn_dictionary(patches, ATOMS, weight, max_iter=10 if lesson.quick else 40)  # (M, C), (N, M)
learned = learned[s.abs().sum(dim=0).argsort(descending=True)]  # the most used first
lesson.show(draw.wall(learned[:84], SIDE, 14), "01_atoms", "84 learned atoms: edges, corners, bars and spots")

# %% [markdown]
# *The 84 most used atoms. Nobody told the method about edges; patches of pictures are sparse in edges.*
#
# **Predict:** we code a new picture with these atoms and with random ones, at the same λ. Which atoms have the smaller
# error? Which need fewer per patch?

# %%
new = torch.tensor(np.asarray(natural_image(np.random.default_rng(7), 128).convert("L")) / 255).float()[:120, :120]
tiles = new.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).reshape(-1, SIDE**2)  # (144, C), 12 × 12 patches
means = tiles.mean(dim=1, keepdim=True)  # (144, 1)
rivals = {"random": normalize(torch.randn(ATOMS, SIDE**2, generator=generator)), "learned": learned}
coded = {name: fista(tiles - means, rival, weight) for name, rival in rivals.items()}  # (144, M) each
needed = {name: s.count_nonzero().item() / len(s) for name, s in coded.items()}
rest = {name: tiles - means - s @ rivals[name] for name, s in coded.items()}  # (144, C) each
missed = {name: (r.square().sum() / (tiles - means).square().sum()).item() for name, r in rest.items()}

# %%
lesson.table(("atoms", "per patch", "error"), [(name, needed[name], f"{missed[name]:.0%}") for name in rivals])
lesson.check("learned: atoms per patch", needed["learned"], (5, 8), paper="few")
lesson.check("learned: error", missed["learned"], (0.03, 0.1), form=".0%")
lesson.check("random: error", missed["random"], (0.35, 0.6), form=".0%")
whole = {f"{needed[name]:.1f} {name} atoms per patch": tiles - rest[name] for name in rivals}  # (144, C) each
lesson.show(draw.coded(new, whole, SIDE), "01_picture", "A picture, and what random and learned atoms make of it")

# %%
five = coded["learned"].count_nonzero(dim=1) == 5  # (144,): patches that use five atoms
three = (five * tiles.std(dim=1)).topk(3).indices  # the strongest of them
figure = draw.patches(new, (tiles - means)[three], coded["learned"][three], learned, SIDE, three.tolist())
lesson.show(figure, "01_patches", "Three patches of a picture, each equal to a sum of five learned atoms")

# %% [markdown]
# ## Where it stops being true
#
# - **The code is not the truth.** At the smallest λ above, more than nine of ten atoms in use were never in the signal.
# - **Coefficients are too small**, because the soft threshold shrinks them. If sizes matter, fit the chosen atoms once
#   more without the price.
# - **Momentum does not always help much.** Nearly equal atoms make the valley. The 200 signals have random atoms, which
#   are not alike, and there ISTA is quick as well.
# - **Learned atoms belong to their pictures.** Atoms learned from drawings code text or faces less well.
#
# ## Exercises
#
# 1. In the valley, set $c = 0$ (the atoms share nothing). How many steps does ISTA need? Why?
# 2. At λ = 0 the problem is plain least squares. What does the optimality condition say then?
# 3. Set `SHARE = 0.4` for the learned atoms. What happens to the number of atoms per patch, and to the atoms?
#
# <details>
# <summary>Answers</summary>
#
# 1. One. Then $D D^T$ is the identity: all curvatures are $L$, and the first step hits the minimum. The two checks fail
#    (NaN), because no way along the floor is left.
# 2. The band from −λ to λ closes: every gradient must be zero, whether the atom is used or not. Nothing asks for zeros.
# 3. A patch then takes between one and two atoms, with an error of about a quarter. Each atom must fit a patch almost
#    alone, so atoms look like whole patches.
#
# </details>
#
# Next: [attention, read as such a dictionary](02_attention_as_dictionary.md).

# %%
lesson.end()
