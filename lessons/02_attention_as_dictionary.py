# %% [markdown]
# # 2. Attention, read as a dictionary
#
# **The question.** Sparse coding writes a signal as coefficients × atoms. Attention writes a token as a mixture of
# other tokens. Is that the same thing? Nearly: attention has coefficients and atoms, but its atoms change with every
# input and no coefficient is zero.
#
# ![A digit cut into 16 tokens, and the coefficients of one of them in four heads](figures/02_dictionary.png)
#
# *A digit cut into 16 squares, the tokens. Attention makes the new value of the framed token from 64 atoms, one per
# head and token. The numbers are their coefficients, in percent.*
#
# You need [lesson 1](01_ista_fista.md), and attention as PyTorch has it. It takes about 15 seconds on two CPU cores, 6
# with `--quick`.
#
# ## The words
#
# - A **token** is a row of $C$ numbers that stands for one piece of the input, here a square of 7 × 7 pixels. All $N$
#   tokens together are $X$, $N × C$.
# - **Attention** lets each token gather from the others. $Q = X W_q$, $K = X W_k$, $V = X W_v$; the **attention map**
#   $A = \mathrm{softmax}(Q K^T / \sqrt{C/H})$ has one row per token, positive and with sum 1 (Eq. 1); the result is
#   $A V$ (Eq. 2).
# - A **head** is one of $H$ such attentions side by side, each with its own map $A^{(h)}$ and $C/H$ columns of the
#   projections. $W_o$ brings the heads back to $C$ numbers.
#
# We use the first attention of a small network that cleans noisy digits: $N = 16$, $C = 128$, $H = 4$. Lesson 4 is
# about this network; here it is only a trained attention whose tokens one can see.

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
# Look at one head. Its part of the output is $A^{(h)} X W_v^{(h)} W_o^{(h)T}$. The two last matrices belong together:
# $V$ is only a stop on the way. Call their product
#
# $$W_{vo}^{(h)} = W_v^{(h)} W_o^{(h)T}, \qquad C × C$$
#
# Then output token $i$ is a sum over heads $h$ and tokens $j$:
#
# $$O_i = \sum_h \sum_j A^{(h)}_{ij} (X_j W_{vo}^{(h)}) \qquad \text{(Eq. 7)}$$
#
# That is coefficients × atoms. The **coefficient** is $A^{(h)}_{ij}$, a number. The **atom** is $X_j W_{vo}^{(h)}$, a
# row of $C$ numbers: what token $j$ has to offer through head $h$. There are $N · H = 64$ atoms. In plain loops:

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
# The biases fit in as well: a row of $A$ has sum 1, so a constant that is added to each atom is added once to the
# output. The library gives both matrices at once: coefficients $N × NH$ and atoms $NH × C$.
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
lesson.check("another digit's atoms differ by", change, (0.4, 0.6), form=".0%", paper="data-dependent")

# %%
FRAMED = 9  # row 2, column 1
maps = coefficients[FRAMED].view(H, 4, 4)  # (H, 4, 4)
figure = draw.coefficients(pictures[0], FRAMED, maps)
lesson.show(figure, "02_dictionary", "A digit cut into 16 tokens, and the coefficients of one of them in four heads")

# %% [markdown]
# So attention is a dictionary whose atoms are made anew for each input, and all of them are used. Softmax is never
# exactly zero. For a dictionary in the sense of lesson 1 the paper changes both:
#
# $$O = S D = σ_λ(A X W_s) D \qquad \text{(Eq. 8)}$$
#
# - $D$ holds $M$ **learned atoms**, the same for every input.
# - $X W_s$ is a first guess at how much of each atom a token needs: $W_s$ is a learned $C × M$ matrix.
# - $σ_λ$ sets most of these coefficients to zero.
#
# ## Three ways to set coefficients to zero
#
# - **Soft threshold:** $\mathrm{sign}(z) \max(|z| - λ, 0)$, from lesson 1.
# - **ReLU:** $\max(z - λ, 0)$. The same for positive $z$; negative ones become zero.
# - **Top-k:** keep the $k$ largest $|z|$ of each token, set the others to zero.
#
# With a fixed $λ$, how many survive? A coefficient is a product: $z_m = x · w_m$ = (length of $x$) × (length of $w_m$)
# × (cosine between them). So it grows and shrinks with the token, and with how well the token matches $w_m$. $λ$ does
# not. Top-k compares coefficients of the same token only, so a common factor drops out.
#
# We count on clean digits and on noisy ones. $W_s$ is fresh (random) first, then trained: an adapter learns to clean
# noisy 3s. $λ$ is set so that on clean digits two atoms in 100 survive on average; $k$ is 2.

# %%
ATOMS, K = 100, 2
w_s = {"fresh": torch.randn(C, ATOMS, generator=torch.Generator().manual_seed(0)) / C**0.5}  # (C, M)
steps = 60 if lesson.quick else 300
mnist_vae.train_adapter(vae, train.only(3), density=K / ATOMS, order="before", target=r"encoder\.", steps=steps)
w_s["trained"] = encoder.blocks[0].attention.adapter.W_s.detach()  # (C, M)
detach(vae)

# %% [markdown]
# **Predict:** in which of the four cases does a fixed $λ$ fail worst?

# %%
noisy = mnist_vae.add_noise(pictures, torch.Generator().manual_seed(1))  # (B, H, W)
inputs = {"clean": tokens(pictures), "noisy": tokens(noisy)}  # (B, N, C) each
rows, mean, per_token = [], {}, {}
for kind, weights in w_s.items():
    z = inputs["clean"] @ weights  # (B, N, M)
    two = K * z[..., 0].numel()  # so many coefficients shall survive in all
    soft, relu = (values.flatten().topk(two + 1).values[-1] for values in (z.abs(), z))  # λ of each
    sigmas = {"top-2": partial(top_k, k=K)}
    sigmas |= {"soft": partial(soft_threshold, lam=soft), "ReLU": partial(relu_threshold, lam=relu)}
    for quality, some in inputs.items():
        for name, sigma in sigmas.items():
            count = (sigma(some @ weights) != 0).sum(-1).float()  # (B, N)
            mean[kind, quality, name], per_token[kind, quality, name] = count.mean().item(), count
        spans = ["{:.1f} ({:.0f}–{:.0f})".format(n.mean(), *n.aminmax()) for n in list(per_token.values())[-3:]]
        rows.append((f"{kind}, {quality}", *spans))
lesson.table(("atoms per token: mean (range)", *sigmas), rows)
top_2 = torch.stack([n for (_, _, name), n in per_token.items() if name == "top-2"])  # (4, B, N)
lesson.check("top-2: fewest", top_2.min().item(), (2, 2))
lesson.check("top-2: most", top_2.max().item(), (2, 2), paper="constant")
lesson.check("soft, fresh, noisy: mean", mean["fresh", "noisy", "soft"], (1.8, 2.5), paper="varies")
lesson.check("soft, trained, noisy: mean", mean["trained", "noisy", "soft"], (0.3, 1.2), paper="varies")
lesson.check("ReLU, trained, noisy: mean", mean["trained", "noisy", "ReLU"], (0.3, 1.2), paper="varies")

# %%
numbers = {f"{name}, {quality}": per_token["trained", quality, name][3].view(4, 4)
           for name in ("top-2", "soft") for quality in ("clean", "noisy")}  # fmt: skip
shown = {title: (noisy if "noisy" in title else pictures)[3] for title in numbers}
figure = draw.counts(shown, numbers)
lesson.show(figure, "02_thresholds", "Atoms per token with top-2 and with a fixed λ, clean and noisy")

# %% [markdown]
# *Atoms per token with the trained $W_s$. With noise, a fixed λ leaves many tokens without any atom (0).*
#
# Here a layer norm comes just before, so every token has the same length. That is why a *fresh* $W_s$ keeps its
# average: its columns point nowhere in particular, and noise changes nothing for them. A *trained* column points at
# something; a noisy token matches it less, and fewer coefficients pass $λ$. Without the layer norm the lengths differ
# as well:

# %%
lengths = (encoder.embed(mnist_vae.patchify(pictures, encoder.patch)) + encoder.position).norm(dim=-1)  # (B, N)
lesson.check("longest / shortest token before the layer norm", (lengths.max() / lengths.min()).item(), (6, 10))

# %% [markdown]
# ## Before or after A?
#
# Eq. 8 mixes first and then chooses: $σ(A X W_s)$. For speed the paper runs the other order, $A σ(X W_s)$, and says
# that the result is still sparse if $σ(X W_s)$ is very sparse (§3.4). When is that so?
#
# - If each row of $A$ picks exactly one token (it is one-hot), the two orders are equal.
# - Otherwise $S_{im} = \sum_j A_{ij} σ(X_j W_s)_m$ is a sum of positive weights times the choices of *all* tokens. It
#   is zero only if *no* token chose atom $m$. So after mixing, the atoms in use are those that any token chose.
#
# **Predict:** 16 tokens choose 2 of 100 atoms each. After mixing, what part of $S$ is not zero, between which bounds?

# %%
q, k, _ = attention.project(inputs["clean"])
A = attention.attention_map(q, k)  # (B, H, N, N)
one_hot = torch.eye(N)[A.argmax(-1)]  # (B, H, N, N)
mixed, density, carry, same = {}, {}, {}, True
for kind, weights in w_s.items():
    z = (inputs["clean"] @ weights).unflatten(-1, (H, -1)).transpose(1, 2)  # (B, N, M) -> (B, H, N, M/H)
    s = top_k(inputs["clean"] @ weights, K).unflatten(-1, (H, -1)).transpose(1, 2)  # (B, H, N, M/H)
    same = same and torch.equal(one_hot @ soft_threshold(z, 0.1), soft_threshold(one_hot @ z, 0.1))
    for title, value in ((f"{kind}: σ(X W_s)", s), (f"{kind}: A σ(X W_s)", A @ s)):
        mixed[title] = value.transpose(1, 2).flatten(2)  # (B, N, M)
        size = mixed[title].abs().sort(dim=-1, descending=True).values  # (B, N, M)
        density[title] = (size > 0).float().mean().item()
        carry[title] = (size.cumsum(-1) - size < 0.9 * size.sum(-1, keepdim=True)).float().mean().item()

# %%
lesson.table(("", "not zero", "hold 90 %"), [(t, f"{density[t]:.0%}", f"{carry[t]:.0%}") for t in mixed])
lesson.check("orders that differ with a one-hot A:", int(not same), (0, 0), form="d")
lesson.check("fresh, after A: not zero", density["fresh: A σ(X W_s)"], (0.1, 0.16), form=".0%", paper="sparse")
after = density["trained: A σ(X W_s)"]
lesson.check("trained, after A: not zero", after, (0.07, 0.13), quick=(0.07, 0.18), form=".0%", paper="sparse")
figure = draw.mixing({title: s[0] for title, s in mixed.items()})
lesson.show(figure, "02_mixing", "Coefficients before and after A mixes them: scattered dots become columns")

# %% [markdown]
# *One digit: coefficients that are not zero, before and after mixing. Dots become columns: what one token chose, all
# tokens now have.*
#
# The bounds are 2 % (all tokens agree) and 32 % (16 × 2 different atoms). A fresh $W_s$ gives about 13 %; a trained one
# about 10 %, because similar tokens learn to choose alike. Both are five to six times denser than before mixing, and
# still sparse. With more tokens it gets worse, since each further token can choose a new atom. What helps is that many
# entries are tiny: half of the non-zero ones hold 90 % of the sum of all $|S|$. (That is the column "hold 90 %".)
#
# ## What it costs
#
# The paper's example (§3.5): $C = 1024$, $M = 256$, $N = 1024$ tokens, a density of 1 %, beside LoRA of rank 16. LoRA
# is the usual way to fine-tune: it adds a product of two thin matrices to each of the four projections.

# %%
ours = sparse_cost(1024, 1024, tokens=1024, atoms=256, density=0.01)
lora = lora_cost(1024, 1024, tokens=1024, r=16)
print("sparse:", ours)
print("LoRA:  ", lora)
lesson.check("sparse, stored numbers / 1000:", ours.storage / 1e3, (264, 265), paper="264")
flops = (ours.forward["X W_s"] + ours.forward["S D"]) / 1e9
lesson.check("sparse, GFLOP of X W_s and S D:", flops, (0.54, 0.545), paper="0.54")
lesson.check("LoRA, stored numbers / 1000:", lora.storage / 1e3, (131, 132), paper="131")
lesson.check("LoRA, GFLOP once:", lora.merge / 1e9, (0.13, 0.135), paper="0.13")

# %% [markdown]
# ## Where it stops being true
#
# | the paper | here | |
# |---|---|---|
# | attention is coefficients × atoms (Eq. 7) | equal up to rounding | ✓ |
# | its coefficients are not sparse | none is zero | ✓ |
# | only top-k keeps the number of atoms (§3.4) | always 2; a fixed λ gives 0 to 6 | ✓ |
# | $A σ(X W_s)$ stays sparse (§3.4) | 2 % become 10 to 13 %, with 16 tokens | ✓ but denser |
# | 264k numbers and 0.54 GFLOP (§3.5) | the same, but without the cost of mixing | ✓ partly |
#
# - The paper's 0.54 GFLOP leaves out that $A$ has to mix $S$: as much again in this example, and more with more tokens.
# - LoRA's 0.13 GFLOP is paid once, to merge it into the weights. A threshold cannot be merged.
# - Top-k keeps the number, not the size: it keeps two coefficients of a token even where none is needed.
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
# 1. After it: every $z$ doubles, and more pass λ. Before it, the norm divides most of the change away.
# 2. Any without zeros, and softmax has none. The shape of $A$ decides how *large* entries are, not how many.
# 3. About half with a fresh $W_s$. There are 160 choices for 100 atoms, but many tokens choose the same ones.
#
# </details>
#
# Next: [new atoms or new coefficients](03_fourier_toy.md).

# %%
lesson.end()
