# %% [markdown]
# # 2. Attention, read as a dictionary
#
# **The question.** Sparse coding writes a signal as coefficients × atoms. Attention writes a token as a mixture of all
# tokens. Is that the same thing? Nearly: attention has coefficients and atoms, but its atoms change with every input,
# and no coefficient is zero.
#
# ![A digit cut into 16 tokens, and the coefficients of one of them in four heads](figures/02_dictionary.png)
#
# *A digit cut into 16 squares, the tokens. Attention makes the new value of the framed token from 64 atoms, one per
# head and token. The numbers are their coefficients, in percent.*
#
# You need [lesson 1](01_ista_fista.md), and attention as PyTorch has it. The lesson runs in about 15 seconds on two CPU
# cores, in 6 with `--quick`.
#
# ## The words
#
# - A **token** is a row of $C$ numbers that stands for one piece of the input, here a square of 7 × 7 pixels. All $N$
#   tokens together are $X$, $N × C$.
# - **Attention** lets each token gather from all tokens. $Q = X W_q$, $K = X W_k$ and $V = X W_v$ are three
#   projections. The **attention map** $A = \mathrm{softmax}(Q K^T)$ has one row per token, with positive entries and
#   sum 1 (Eq. 1). The result is $A V$ (Eq. 2).
# - A **head** is one of $H$ such attentions side by side. Each has its own map $A^{(h)}$ and $C/H$ columns of each
#   projection, and divides $Q K^T$ by $\sqrt{C/H}$. The matrix $W_o$ brings the heads back to $C$ numbers.
#
# We use the first attention of a small network that cleans noisy digits: $N = 16$, $C = 128$, $H = 4$. Lesson 4
# explains the network. Here we only need a trained attention whose tokens we can see.

# %%
from functools import partial
from pathlib import Path

import draw
import torch
from lesson import Lesson

from sparsecode import attention_as_dictionary, detach, mnist_vae, relu_threshold, soft_threshold, top_k
from sparsecode.cost import lora_cost, sparse_cost

lesson = Lesson()
root = Path(draw.__file__).parent.parent
train, held_out = mnist_vae.load_digits(root / "lessons" / "data" / "mnist" / "t10k.npz")
vae, _ = mnist_vae.load_models(root / "weights" / "mnist_vae")
vae.requires_grad_(False)
encoder, attention = vae.encoder, vae.encoder.blocks[0].attention


def tokens(pictures):
    """What the first attention gets: X (B, N, C)"""
    squares = mnist_vae.patchify(pictures, encoder.patch)  # (B, H, W) -> (B, N, 49)
    return encoder.blocks[0].norm_1(encoder.embed(squares) + encoder.position)  # (B, N, 49) -> (B, N, C)


pictures = held_out.only(5, 6, 7, 8, 9)[:64]  # (B, H, W)
x, other = tokens(pictures)[:2]  # (N, C) each: tokens of two digits

# %% [markdown]
# ## From Eq. 2 to Eq. 7
#
# Look at one head. Its part of the output is $A^{(h)} X W_v^{(h)} W_o^{(h)T}$ (Eq. 3). The last two matrices, $C × C/H$
# and $C/H × C$, do not depend on the input. So we multiply them once:
#
# $$W_{vo}^{(h)} = W_v^{(h)} W_o^{(h)T}, \qquad C × C$$
#
# Then output token $i$ is a sum over heads $h$ and tokens $j$:
#
# $$O_i = \sum_h \sum_j A^{(h)}_{ij} (X_j W_{vo}^{(h)}) \qquad \text{(Eq. 7)}$$
#
# That is coefficients × atoms. The **coefficient** is $A^{(h)}_{ij}$, a number. The **atom** is $X_j W_{vo}^{(h)}$, a
# row of $C$ numbers: what token $j$ adds through head $h$. There are $N · H = 64$ atoms. In plain loops:

# %%
N, C, H = len(x), attention.dim, attention.heads
W_q, W_k, W_v, W_o = (p.weight for p in (attention.to_q, attention.to_k, attention.to_v, attention.to_out))  # (C, C)
q, k = attention.to_q(x), attention.to_k(x)  # (N, C) each
output = torch.zeros(N, C)
for h in range(H):
    part = slice(h * C // H, (h + 1) * C // H)  # the columns of this head
    A = (q[:, part] @ k[:, part].T / (C // H) ** 0.5).softmax(-1)  # (N, N)
    W_vo = W_v[part].T @ W_o[:, part].T  # (C, C/H) x (C/H, C) -> (C, C); PyTorch stores weights transposed
    offset = attention.to_v.bias[part] @ W_o[:, part].T + attention.to_out.bias / H  # (C,): the biases, see below
    for i in range(N):
        for j in range(N):
            output[i] += A[i, j] * (x[j] @ W_vo + offset)  # coefficient × atom

# %% [markdown]
# The paper's formula has no biases, but they fit in. A row of $A$ has sum 1, so a constant that is added to each atom
# of a head is added once to the output. The library gives both matrices: coefficients $N × NH$ and atoms $NH × C$.
#
# **Predict:** how many of the coefficients are zero? Do two digits share their atoms?

# %%
coefficients, atoms = attention_as_dictionary(attention, x)  # (N, N·H), (N·H, C)
exact = attention(x[None])[0]  # (N, C)
lesson.check("loops and attention differ by", (output - exact).abs().max().item(), (0, 1e-4))
lesson.check("library and attention differ by", (coefficients @ atoms - exact).abs().max().item(), (0, 1e-4))
zeros = (coefficients == 0).float().mean().item()
lesson.check("coefficients that are zero:", zeros, (0, 0), form=".0%", paper="not sparse")
change = ((attention_as_dictionary(attention, other)[1] - atoms).norm() / atoms.norm()).item()
lesson.check("another digit's atoms differ by, relative", change, (0.4, 0.6), form=".0%", paper="data-dependent")

# %%
FRAMED = 9  # row 2, column 1
maps = coefficients[FRAMED].view(H, 4, 4)  # (H, 4, 4)
figure = draw.coefficients(pictures[0], FRAMED, maps)
lesson.show(figure, "02_dictionary", "A digit cut into 16 tokens, and the coefficients of one of them in four heads")

# %% [markdown]
# So attention is a dictionary whose atoms are made anew for each input, and all of them are used: softmax is never
# exactly zero. The paper changes both. Its sparse form of attention is
#
# $$O = S D = σ_λ(A X W_s) D \qquad \text{(Eq. 8)}$$
#
# - $D$ holds $M$ **learned atoms**, the same for every input.
# - $X W_s$ is a first guess at how much of each atom a token needs. $W_s$ is a learned $C × M$ matrix.
# - $A$ mixes these guesses over the tokens, as in attention.
# - The **threshold** $σ_λ$ sets most of the coefficients to zero.
#
# To fine-tune a model, the paper freezes its attention and adds such a term, $O + ΔO = O + S D$ (Eq. 9). The term with
# its $W_s$ and $D$ is called an **adapter**. Only the adapter is trained.
#
# ## Three ways to set coefficients to zero
#
# - **Soft threshold:** $\mathrm{sign}(z) \max(|z| - λ, 0)$, from lesson 1.
# - **ReLU:** $\max(z - λ, 0)$. It does the same for positive $z$. Negative $z$ become zero.
# - **Top-k:** keep the $k$ coefficients of each token with the largest $|z|$, and set the others to zero.
#
# With a fixed $λ$, how many coefficients survive? We look at $σ(X W_s)$. The next section comes back to $A$. Let $x$ be
# a token and $w_m$ a column of $W_s$. Before the threshold, the coefficient is $z_m = x · w_m$ = (length of $x$) ×
# (length of $w_m$) × (cosine between them). It grows with the length of the token, and with how well the token matches
# $w_m$. But $λ$ stays the same, so the number of survivors changes. Top-k only compares the coefficients of one token
# with each other. A common factor does not matter to it.
#
# We count on clean digits and on noisy ones, with a fresh (random) $W_s$ and with a trained one: four cases. The
# trained $W_s$ is that of an adapter that has learned to clean noisy 3s. There are 100 atoms. $k$ is 2, and we set $λ$
# so that on clean digits two atoms survive on average too.

# %%
ATOMS, K = 100, 2
w_s = {"fresh": torch.randn(C, ATOMS, generator=torch.Generator().manual_seed(0)) / C**0.5}  # (C, M)
steps = 60 if lesson.quick else 300
mnist_vae.train_adapter(vae, train.only(3), density=K / ATOMS, order="before", target=r"encoder\.", steps=steps)
w_s["trained"] = encoder.blocks[0].attention.adapter.W_s.detach()  # (C, M)
detach(vae)

# %% [markdown]
# **Predict:** in which of the four cases is the number of atoms with a fixed $λ$ farthest from 2?

# %%
noisy = mnist_vae.add_noise(pictures, torch.Generator().manual_seed(1))  # (B, H, W)
inputs = {"clean": tokens(pictures), "noisy": tokens(noisy)}  # (B, N, C) each
counts, keep = {}, K * pictures.shape[0] * N  # so many coefficients shall survive in all
for kind, weights in w_s.items():
    z = (inputs["clean"] @ weights).flatten()  # (B·N·M,)
    soft, relu = z.abs().kthvalue(len(z) - keep).values, z.kthvalue(len(z) - keep).values  # λ of each
    sigmas = {"top-2": partial(top_k, k=K), "soft": partial(soft_threshold, lam=soft)}
    sigmas["ReLU"] = partial(relu_threshold, lam=relu)
    for quality, some in inputs.items():
        for name, sigma in sigmas.items():
            counts[kind, quality, name] = (sigma(some @ weights) != 0).sum(-1).float()  # (B, N)

# %%
rows = []
for kind, quality in (("fresh", "clean"), ("fresh", "noisy"), ("trained", "clean"), ("trained", "noisy")):
    three = [counts[kind, quality, name] for name in sigmas]  # (B, N) each
    rows.append((f"{kind}, {quality}", *(f"{n.mean():.1f} ({n.min():.0f} to {n.max():.0f})" for n in three)))
lesson.table(("atoms per token: mean (range)", *sigmas), rows)
top_2 = torch.stack([n for (_, _, name), n in counts.items() if name == "top-2"])  # (4, B, N)
lesson.check("top-2: fewest", top_2.min().item(), (2, 2))
lesson.check("top-2: most", top_2.max().item(), (2, 2), paper="constant")
mean = {case: n.mean().item() for case, n in counts.items()}
lesson.check("soft, fresh, noisy: mean", mean["fresh", "noisy", "soft"], (1.8, 2.5), paper="varies")
lesson.check("soft, trained, noisy: mean", mean["trained", "noisy", "soft"], (0.2, 1.6), paper="varies")
lesson.check("ReLU, trained, noisy: mean", mean["trained", "noisy", "ReLU"], (0.4, 1.8), paper="varies")

# %%
numbers = {f"{name}, {quality}": counts["trained", quality, name][3].view(4, 4)
           for name in ("top-2", "soft") for quality in ("clean", "noisy")}  # fmt: skip
shown = {title: (noisy if "noisy" in title else pictures)[3] for title in numbers}
figure = draw.counts(shown, numbers)
lesson.show(figure, "02_thresholds", "Atoms per token with top-2 and with a fixed λ, clean and noisy")

# %% [markdown]
# *Atoms per token with the trained $W_s$. With noise, a fixed λ leaves many tokens without any atom (0).*
#
# The trained $W_s$ on noisy digits is farthest from 2. Why? Here a layer norm comes just before the adapter, so all
# tokens have about the same length. Only the match can change. A *fresh* column of $W_s$ is random, so it matches noisy
# tokens as well as clean ones, and the average stays near 2. A *trained* column has learned a pattern. A noisy token
# matches the pattern less, and fewer coefficients pass $λ$. Without the layer norm the lengths would differ as well:

# %%
lengths = (encoder.embed(mnist_vae.patchify(pictures, encoder.patch)) + encoder.position).norm(dim=-1)  # (B, N)
lesson.check("longest / shortest token before the layer norm", (lengths.max() / lengths.min()).item(), (6, 10))
lengths = inputs["clean"].norm(dim=-1)  # (B, N)
lesson.check("and after it", (lengths.max() / lengths.min()).item(), (1, 2))

# %% [markdown]
# ## Before or after A?
#
# Eq. 8 mixes first and then chooses: $σ(A X W_s)$. In practice the paper first chooses and then mixes, $A σ(X W_s)$,
# because that is simpler to implement. The paper says that the result is still sparse if $σ(X W_s)$ is very sparse
# (§3.4). When is that so?
#
# - If each row of $A$ is **one-hot** (a single 1, the rest 0), it picks one token, and the two orders are equal.
# - Otherwise $S_{im} = \sum_j A_{ij} σ(X_j W_s)_m$ adds up the choices of *all* tokens, with positive weights. So after
#   mixing, every token uses all the atoms that any token chose.
#
# The adapter splits its atoms evenly over the heads: the $A^{(h)}$ of each head mixes 25 of the 100 atoms.
#
# **Predict:** 16 tokens choose 2 atoms each. After mixing, what share of $S$ is not zero, at least and at most?

# %%
q, k, _ = attention.project(inputs["clean"])
A = attention.attention_map(q, k)  # (B, H, N, N)


def by_head(s):
    """(B, N, M) -> (B, H, N, M/H)"""
    return s.unflatten(-1, (H, -1)).transpose(1, 2)


mixed = {}
for kind, weights in w_s.items():
    s = top_k(inputs["clean"] @ weights, K)  # (B, N, M)
    mixed[f"{kind}: σ(X W_s)"] = s
    mixed[f"{kind}: A σ(X W_s)"] = (A @ by_head(s)).transpose(1, 2).flatten(2)  # (B, H, N, M/H) -> (B, N, M)

# %%
one_hot = torch.eye(N)[A.argmax(-1)]  # (B, H, N, N)
z = by_head(inputs["clean"] @ w_s["fresh"])  # (B, H, N, M/H)
between = (one_hot @ soft_threshold(z, 0.1) - soft_threshold(one_hot @ z, 0.1)).abs().max().item()
lesson.check("one-hot A: the two orders differ by", between, (0, 0))

# %%
density, carry = {}, {}
for title, s in mixed.items():
    size = s.abs().sort(dim=-1, descending=True).values  # (B, N, M)
    density[title] = (size > 0).float().mean().item()
    before = size.cumsum(-1) - size  # (B, N, M): the sum of all larger ones
    carry[title] = (before < 0.9 * size.sum(-1, keepdim=True)).float().mean().item()
shares = [(title, f"{density[title]:.1%}", f"{carry[title]:.1%}") for title in mixed]
lesson.table(("share of coefficients", "not zero", "hold 90 %"), shares)
lesson.check("fresh, after A: not zero", density["fresh: A σ(X W_s)"], (0.1, 0.16), form=".0%", paper="sparse")
after = density["trained: A σ(X W_s)"]
lesson.check("trained, after A: not zero", after, (0.07, 0.15), quick=(0.07, 0.18), form=".0%", paper="sparse")
figure = draw.mixing({title: s[0] for title, s in mixed.items()})
lesson.show(figure, "02_mixing", "Coefficients before and after A mixes them: scattered dots become columns")

# %% [markdown]
# *One digit: coefficients that are not zero, before and after mixing. Dots become columns: what one token chose, all
# tokens now have.*
#
# At least 2 % are not zero (all tokens choose the same atoms), at most 32 % (16 × 2 different atoms). A fresh $W_s$
# gives 13 %. A trained one gives 12 %: its tokens choose the same atoms a little more often. So mixing makes $S$ about
# six times denser, and $S$ is still sparse. More tokens make it denser, since each further token can choose a new atom.
# But many entries are tiny. The column "hold 90 %" counts the largest ones that together make 90 % of the sum of a
# token's $|S_m|$: about half of those that are not zero.
#
# ## What it costs
#
# The paper's example (§3.5) has $C = 1024$ and $M = 256$. It has $N = 1024$ tokens and a density of 1 %: one
# coefficient in 100 is not zero. It is compared with **LoRA**, the usual way to fine-tune, which adds a product of two
# thin matrices to each of the four projections. Here they have rank 16.
#
# We count the numbers that are trained, and those that must be stored: all of $W_s$, and the 1 % of $D$ in use. A
# **GFLOP** is $10^9$ multiplications and additions. The three terms of "sparse" are $X W_s$, then $A$ times its result,
# and $S D$. LoRA can also be **merged**: its product is added to the weights once, and costs nothing from then on.

# %%
ours = sparse_cost(1024, 1024, tokens=1024, atoms=256, density=0.01)
lora = lora_cost(1024, 1024, tokens=1024, r=16)
rows = []
for name, cost in (("sparse", ours), ("LoRA", lora)):
    each = " + ".join(f"{flops / 1e9:.2g}" for flops in cost.forward.values())
    once = f"{cost.merge / 1e9:.2f}" if cost.merge else "cannot"
    rows.append((name, f"{cost.parameters:,}", f"{cost.storage:,.0f}", each, once))
lesson.table(("", "trained", "stored", "GFLOP in each pass", "GFLOP to merge"), rows)
lesson.check("sparse, stored numbers / 1000:", ours.storage / 1e3, (264, 265), paper="264")
flops = (ours.forward["X W_s"] + ours.forward["S D"]) / 1e9
lesson.check("sparse, GFLOP of X W_s and S D:", flops, (0.54, 0.545), paper="0.54")
lesson.check("LoRA, stored numbers / 1000:", lora.storage / 1e3, (131, 132), paper="131")
lesson.check("LoRA, GFLOP to merge:", lora.merge / 1e9, (0.13, 0.135), paper="0.13")

# %% [markdown]
# ## Where it stops being true
#
# | the paper | here | |
# |---|---|---|
# | attention is coefficients × atoms (Eq. 7) | equal up to rounding | ✓ |
# | its coefficients are not sparse | none is zero | ✓ |
# | only top-k keeps the number of atoms (§3.4) | always 2; a fixed λ gives 0 to 9 | ✓ |
# | $A σ(X W_s)$ stays sparse (§3.4) | 2 % become 12 to 13 %, with 16 tokens | ✓ but denser |
# | 264k numbers and 0.54 GFLOP (§3.5) | the same, but without the cost of mixing | ✓ partly |
#
# - The paper's 0.54 GFLOP leaves out that $A$ has to mix the coefficients. In this example mixing costs as much again,
#   and more with more tokens.
# - The paper's 0.13 GFLOP for LoRA is paid once, to merge it. A threshold cannot be merged.
# - Top-k fixes the number of coefficients, not their size. It keeps two for a token that needs none.
#
# ## Exercises
#
# 1. Double the contrast of the input *before* the layer norm, then after it. Which changes the count of a fixed λ?
# 2. Which $A$ makes $A σ(X W_s)$ as dense as possible?
# 3. Set `K = 10`. What part of $S$ is not zero after mixing?
#
# <details>
# <summary>Answers</summary>
#
# 1. After it: every $z$ doubles, and more pass λ. Before it: the norm divides by the length, so little changes.
# 2. Any $A$ without zeros, and softmax has none. The shape of $A$ decides how *large* the entries are, not how many.
# 3. About half with a fresh $W_s$. There are 160 choices for 100 atoms, but many tokens choose the same ones.
#
# </details>
#
# Next: [new atoms or new coefficients](03_fourier_toy.md).

# %%
lesson.end()
