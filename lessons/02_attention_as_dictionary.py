"""Attention read as a dictionary, and what it takes for its coefficients to be sparse.

Claim    What attention gives a token is a combination of N·H atoms X W_vo, one for each head and token; A holds the
         coefficients. But these atoms change with every picture, and no coefficient is zero. Eq. 8 takes M atoms that
         are learned once, few at a time. Of three ways to choose, top-k alone keeps their number, as the paper says.
         It also says that A mixes very sparse picks into something sparse. That holds where A looks at few tokens; most
         here look at 20 to 60 of the 64, and 2 % become 35 % to 53 %, a third to two thirds of which carry 90 %.
Paper    Eqs. 1–3, 7 and 8, §3.4, §3.5
Modules  sparsecode/attention.py, sparsecode/thresholds.py, sparsecode/cost.py
Costs    5 seconds on two CPU cores, most of them for drawing; --quick saves little.

    python lessons/02_attention_as_dictionary.py
"""

import argparse
from functools import partial
from pathlib import Path

import matplotlib.pyplot as plt
import torch

from dit.pictures import to_pil
from dit.pipeline import Pipeline
from sparsecode import attention_as_dictionary, relu_threshold, soft_threshold, top_k
from sparsecode.cost import attention_flops, dora_cost, lora_cost, oft_cost, sparse_cost

WEIGHTS = Path(__file__).parent.parent / "weights" / "tiny"
FIGURES = Path(__file__).parent / "figures"
PROMPTS = ("a green ring at the bottom right on a white background", "a red star at the top left on a blue background")
BLOCK, ATOMS, K = 3, 256, 5  # 5 of 256 atoms are the paper's density of 0.02
SIDE, PATCH = 8, 5 * 8 + 4  # a picture is 8 × 8 patches; the one to look at, row 5 and column 4, lies on the ring


@torch.no_grad()
def main(quick=False, figures=FIGURES, weights=WEIGHTS):
    figures = Path(figures)
    figures.mkdir(parents=True, exist_ok=True)

    # %% 1. Draw two pictures, and note the X of each self-attention
    pipe = Pipeline.from_folder(weights, device="cpu")
    seen = {block.attn1: [] for block in pipe.transformer.transformer_blocks}
    hooks = [attention.register_forward_hook(lambda a, args, _: seen[a].append(args[0][-2:])) for attention in seen]
    steps = list(pipe.sample(pipe.noise([0, 1]), *pipe.encode_prompt(PROMPTS), steps=20, guidance=3.0))
    for hook in hooks:
        hook.remove()
    times, ring = [t for t, _, _ in steps], to_pil(pipe.decode(steps[-1][1]))[0]  # 999, 949, …, 50
    half = times.index(500)
    xs = [torch.stack(x) for x in seen.values()]  # (20, 2, N, C) each: step, picture, token, channel

    # %% 2. Multi-head attention as it stands in Eqs. 1–3, head by head
    attention, (x, other) = list(seen)[BLOCK], xs[BLOCK][half]  # X (N, C) of two pictures
    heads, width = attention.heads, attention.dim // attention.heads
    q, k, v = attention.to_q(x), attention.to_k(x), attention.to_v(x)  # (N, C) each
    output = attention.to_out.bias  # (C,)
    for q_h, k_h, v_h, w_h in zip(*(part.split(width, dim=1) for part in (q, k, v, attention.to_out.weight))):
        a = (q_h @ k_h.T / width**0.5).softmax(-1)  # (N, C/H) x (C/H, N) -> A⁽ʰ⁾ (N, N)
        output = output + a @ v_h @ w_h.T  # A⁽ʰ⁾ V⁽ʰ⁾ W_o⁽ʰ⁾ᵀ: (N, N) x (N, C/H) x (C/H, C) -> (N, C)

    # %% 3. The same as a dictionary, Eq. 7: coefficients (N, N·H) × atoms (N·H, C)
    coefficients, atoms = attention_as_dictionary(attention, x)
    difference = ((coefficients @ atoms - output).abs().max() / output.abs().max()).item()
    nonzero = (coefficients != 0).float().mean().item()
    change = ((attention_as_dictionary(attention, other)[1] - atoms).norm() / atoms.norm()).item()
    print(f"{list(coefficients.shape)} × {list(atoms.shape)} = Eq. 3 but for {difference:.0e} (expect below 1e-6)")
    print(f"not zero: {nonzero:.0%} (expect 100 %); another picture's atoms are {change:.0%} away (expect 126 %)")

    # %% 4. Eq. 8 wants few. σ keeps K of M for each token, or what passes λ, set here for a mean of K at t = 500.
    # W_s is fresh. Lesson 06 trains it, and then counts 29 % in this block where step 5 counts 38 %.
    w_s = torch.randn(attention.dim, ATOMS, generator=torch.Generator().manual_seed(0)) / attention.dim**0.5  # (C, M)
    z = xs[BLOCK] @ w_s  # (20, 2, N, C) x (C, M) -> (20, 2, N, M)
    soft, relu = (v.flatten().topk(K * v[..., 0].numel() + 1).values[-1].item() for v in (z[half].abs(), z[half]))
    sigmas = {f"top-{n}": partial(top_k, k=n) for n in (1, 5, 26)}
    sigmas |= {"soft": partial(soft_threshold, lam=soft), "ReLU": partial(relu_threshold, lam=relu)}
    kept = {name: (sigmas[name](z) != 0).sum(-1).float() for name in ("top-5", "soft", "ReLU")}  # (20, 2, N) each
    for name, n in kept.items():
        print(f"{name:5} atoms a token: {n[0].mean():.1f} at t = 999, {n[half].mean():.1f} at t = 500,", end=" ")
        print("from {:.0f} to {:.0f}".format(*n[half].aminmax()))
    print("(expect top-5 always 5; soft 0.2, 5, 0 to 48; ReLU 0.2, 5, 0 to 28)")

    # %% 5. The paper runs A σ(X W_s), not σ(A X W_s) of Eq. 8. They are the same where each row of A is one-hot.
    z, a = z[half, 0], coefficients.unflatten(1, (heads, -1))  # (N, M), (N, H·N) -> (N, H, N)
    one_hot = torch.eye(len(x))[a[:, 0].argmax(-1)]  # (N, N), of one head
    same = all(torch.equal(one_hot @ sigma(z), sigma(one_hot @ z)) for sigma in sigmas.values())
    print(f"σ before A equals σ after A, to the bit, if A is one-hot: {same} (expect True)")
    # Softmax gives no zeros (short of underflow), so S_im is zero only if no token at all picked atom m. How much of S
    # matters hangs on how many tokens a row looks at: A made more peaked (temperature < 1) or flatter (> 1) shows it.
    temperatures = torch.logspace(-2, 2, 5 if quick else 17).tolist()  # the middle one is 1
    own = len(temperatures) // 2
    tempered = [(a.log() / t).softmax(-1) for t in temperatures]  # softmax(logits / t), (N, H, N) each
    sweep = {name: torch.stack([spread(a, f(z)).mean(1) for a in tempered], 1) for name, f in sigmas.items()}  # (4, T)
    for name, i in (("top-5", 0), ("top-5", own), ("top-5", -1), ("top-1", own), ("top-26", own)):
        print(f"{name:6}", "A looks at {:4.1f} tokens; of S {:.0%} is not zero,".format(*sweep[name][:2, i]), end=" ")
        print("{:.0%} carries 99 % of Σ|S|, {:.0%} carries 90 %".format(*sweep[name][2:, i]))
    print("(expect 1.1: 13, 3, 2 %; 33.4: 38, 23, 13 %; 64: 38, 36, 25 %; top-1 9, 5, 3 %; top-26 86, 57, 32 %)")
    maps = [attention_as_dictionary(a, x[half, 0])[0].unflatten(1, (heads, -1)) for a, x in zip(seen, xs)]
    blocks = [spread(a, top_k(x[half, 0] @ w_s, K)) for a, x in zip(maps, xs)]  # (4, N) each
    print("not zero, block by block:", *(f"{rows[1].mean():.0%}" for rows in blocks), "(expect 35 % to 53 %)")

    # %% 6. What it costs, for one layer (§3.5): the paper's example, and PixArt-Σ at 1024 pixels
    for width, tokens, rho in ((1024, 1024, 0.01), (1152, 4096, 0.02)):
        print(f"C = {width}, N = {tokens}: attention {attention_flops(width, tokens=tokens) / 1e9:.1f} GFLOP")
        costs = {"sparse": partial(sparse_cost, density=rho), "LoRA": lora_cost, "DoRA": dora_cost, "OFT": oft_cost}
        for name, cost in costs.items():
            print(f"  {name:6} {cost(width, width, tokens=tokens)}")
    print("(expect the paper's 264k and 0.54, which leaves out A σ, and LoRA's 131k and 0.13, which has no N: merging)")

    draw_dictionary(ring, [maps[b][PATCH] for b in (0, 1, 4)], figures / "02_dictionary.png")
    draw_thresholds(kept, times, figures / "02_thresholds.png")
    draw_mixing(sweep, blocks, own, figures / "02_mixing.png")
    return {"difference": difference, "nonzero": nonzero, "change": change, "same": same, "kept": kept, "sweep": sweep}


def spread(a, codes):
    """Four numbers a token, (4, N): at how many tokens A looks, exp of its entropy; the share of coefficients, after
    A (N, H, N) has mixed the codes (N, M), that is not zero, that carries 99 % and that carries 90 % of Σ|S|."""
    looked = torch.special.entr(a).sum(-1).exp().mean(1)  # (N, H, N) -> (N,)
    s = torch.einsum("nhl,lhm->nhm", a, codes.unflatten(1, (a.shape[1], -1))).flatten(1)  # A⁽ʰ⁾ S⁽ʰ⁾ (N, M)
    size = s.abs().sort(dim=-1, descending=True).values  # (N, M)
    total = size.cumsum(-1)  # (N, M)
    carry = [total - size < share * total[:, -1:] for share in (0.99, 0.9)]  # (N, M) each
    return torch.stack([looked, *(part.float().mean(-1) for part in (size > 0, *carry))])  # (4, N)


# %% The figures


def draw_dictionary(picture, maps, path):
    figure, axes = plt.subplots(len(maps), 5, figsize=(8.6, 5.5), layout="constrained")
    whole, corner = (0, SIDE, SIDE, 0), (PATCH % SIDE, PATCH // SIDE)  # in patches
    words = "block 0:\nfar and wide", "block 1:\nits neighbours", "block 4:\nthe ring"
    for row, word, heads in zip(axes, words, maps):  # heads (H, N)
        row[0].imshow(picture, extent=whole)
        row[0].set_ylabel(word, fontsize=10)
        for h, (ax, c) in enumerate(zip(row[1:], heads.unflatten(1, (SIDE, SIDE)))):  # c (side, side)
            ax.imshow(picture.convert("L"), cmap="gray", alpha=0.35, vmin=0, vmax=255, extent=whole)
            ax.imshow(c * 0 + 0.8, cmap="Reds", vmin=0, vmax=1, alpha=(c / c.max()).numpy(), extent=whole)
            ax.set_title(f"head {h}: up to {c.max():.2f}", fontsize=9)
        for ax in row:
            ax.add_patch(plt.Rectangle(corner, 1, 1, fill=False, linewidth=1.5))
    finish(figure, axes, "Coefficients of the framed patch in Eq. 7 at t = 500: which patches it combines", path)


def draw_thresholds(kept, times, path):
    figure, axes = plt.subplots(2, 3, figsize=(8.6, 6.0), layout="constrained")
    for column, (name, n) in zip(axes.T, kept.items()):
        column[0].set_title(name, fontsize=11)
        for ax, t in zip(column, (749, 200)):
            counts = n[times.index(t), 0]  # (N,)
            ax.imshow(counts.unflatten(0, (SIDE, SIDE)), cmap="Blues", vmin=0, vmax=30)
            for i, count in enumerate(counts.int().tolist()):
                ax.text(i % SIDE, i // SIDE, count, ha="center", va="center", color="white" if count > 18 else "black")
            ax.set_ylabel(f"t = {t}" if name == "top-5" else "", fontsize=10)
    finish(figure, axes, "How many of 256 atoms each patch of the ring gets, early (mostly noise) and late", path)


def draw_mixing(sweep, blocks, own, path):
    figure, axes = plt.subplots(1, 3, figsize=(8.6, 3.7), layout="constrained", sharex=True, sharey=True)
    ticks = 1, 2, 5, 10, 20, 50
    for label, curve in zip(("not zero", "carries 99 %", "carries 90 %"), sweep["top-5"][1:]):
        axes[0].plot(sweep["top-5"][0], 100 * curve, "o-", markevery=[own], label=label)
    for name, curve in sweep.items():
        axes[1].plot(curve[0], 100 * curve[3], "o-", markevery=[own], label=name)
    for b, rows in enumerate(blocks):
        axes[2].scatter(rows[0], 100 * rows[3], s=6, alpha=0.6, label=f"block {b}")
    for ax, title in zip(axes, ("block 3, top-5", "block 3, carries 90 %", "token by token, top-5, 90 %")):
        ax.axhline(100 * K / ATOMS, color="k", linestyle=":", linewidth=1)
        ax.set(xscale="log", yscale="log", ylim=(0.3, 100), xlabel="tokens a row of A looks at")
        ax.set(xticks=ticks, xticklabels=ticks, yticks=ticks, yticklabels=ticks, title=title)
        ax.legend(fontsize=8)
    finish(figure, [], "% of coefficients after A; top-5 before A: 2 % (dotted). Big dots: the model's own A", path)


def finish(figure, axes, title, path):
    plt.setp(axes, xticks=[], yticks=[])
    figure.suptitle(title, fontsize=11)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# Try
# - BLOCK = 1: its heads look at neighbours, 18 tokens; 53 % of S is not zero, 16 % carries 90 %.
# - half = times.index(50), the finished picture: flat tokens pick alike; 33 % is not zero, 9 % carries 90 %.
# - order="after" in lesson 06's attach: 5 atoms a token to the end; 120 atoms give 17.3 dB instead of 16.2.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer temperatures, for a check")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the pictures")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.figures)
