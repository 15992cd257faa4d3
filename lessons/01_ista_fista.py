"""Sparse coding from the beginning: four lines of ISTA, what momentum buys, what λ does, atoms learned from pictures.

Claim    A signal can be written with few atoms of a large dictionary, and to find which is a convex problem. ISTA is
         O(1/k) above its minimum after k steps; FISTA, ISTA with momentum, O(1/k²). Restart and a greedy start make it
         far quicker where codes are sparse, and slower where atoms are nearly the same. λ trades error for sparsity.
         Atoms learned from patches of pictures are edges, corners and spots, and a patch needs few of them.
Paper    X ≈ S D, Eq. 4; min ‖X − S D‖² + λ‖S‖₁, Eq. 5; soft threshold, Eq. 6; ISTA and FISTA, §3.1
Modules  sparsecode/lasso.py, sparsecode/dictionary.py
Costs    25 seconds on two CPU cores; 6 with --quick.

    python lessons/01_ista_fista.py

How its `fista` compares in time with scikit-learn's and SPAMS's coordinate descent: figures/01_speed.png, of
tests/benchmarks/lasso_speed.py (two idle cores).
"""

import argparse
import warnings
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from torch.nn.functional import normalize, pad

from dit.tiny.scenes import natural_image
from sparsecode import fista, ista, lasso_objective, learn_dictionary, optimality_gap, soft_threshold

FIGURES = Path(__file__).parent / "figures"
WIDTH = 5  # of the blur
SIDE, ATOMS, SHARE = 10, 144, 0.1  # patches of 10 × 10 pixels; λ as a share of the largest that matters
METHODS = {
    "ISTA": (ista, {}),
    "FISTA": (fista, dict(restart=False, greedy=0)),
    "FISTA with restart": (fista, dict(greedy=0)),
    "… and a greedy start": (fista, {}),
}


def main(quick=False, figures=FIGURES):
    figures = Path(figures)
    figures.mkdir(parents=True, exist_ok=True)
    generator = torch.Generator().manual_seed(0)

    def randn(*shape):
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    # %% 1. Four lines of ISTA, and the library. Each signal is made of 5 of 256 atoms, and of noise at 20 dB
    truth = normalize(randn(256, 64))  # (M, C)
    chosen = torch.rand(200, 256, generator=generator).topk(5).indices  # (N, 5)
    planted = torch.zeros(200, 256, dtype=torch.float64).scatter(1, chosen, randn(200, 5))  # (N, M)
    signals, noise = planted @ truth, randn(200, 64)  # (N, C)
    signals += 0.1 * noise * signals.norm() / noise.norm()
    largest = 2 * (signals @ truth.T).abs().amax(dim=1)  # (N,): from this λ on, the code is zero
    lam = 0.1 * largest.median().item()

    step = 1 / (2 * torch.linalg.matrix_norm(truth @ truth.T, 2))
    codes = torch.zeros(200, 256, dtype=torch.float64)
    for _ in range(1000):
        codes = soft_threshold(codes - step * 2 * (codes @ truth - signals) @ truth.T, lam * step)  # (N, M)

    library = fista(signals, truth, lam)  # (N, M)
    naive, fast = (lasso_objective(signals, s, truth, lam).item() for s in (codes, library))
    gap = optimality_gap(signals, library, truth, lam)
    print(f"four lines of ISTA reach {naive:.6f}, the library {fast:.6f} (expect 226.510576 twice)")
    print(f"gap {gap:.0e}; {count(library):.1f} of 256 coefficients are not zero (expect 1e-06, 4.8)")

    # %% 2. O(1/k) against O(1/k²). Spikes behind a blur are hard, since neighbouring atoms hardly differ
    place = torch.arange(100, dtype=torch.float64)
    bumps = normalize(torch.exp(-0.5 * ((place - place[:, None]) / WIDTH) ** 2))  # (M, C), one at each place
    spikes = torch.zeros(1, 100, dtype=torch.float64)
    spikes[0, [12, 30, 37, 60, 66, 85]] = torch.tensor([1.0, 1.5, -1.0, 1.2, 1.0, -1.5], dtype=torch.float64)
    blurred = spikes @ bumps + 0.01 * randn(1, 100)  # (1, C)
    hard, theorems = race(blurred, bumps, 0.01 * 2 * (blurred @ bumps.T).abs().max().item(), 300 if quick else 3000)
    easy, _ = race(signals, truth, lam, 100)
    for name, expected in zip(METHODS, ("1e-02, 6e-02", "9e-07, 1e-04", "1e-04, 3e-07", "3e-04, 4e-08")):
        print(f"{name}: {hard[name][-1]:.0e} above the minimum after {len(hard[name])} steps, relative;", end=" ")
        print(f"{easy[name][39]:.0e} for the signals above after 40 (expect {expected})")
    within = all((curve <= bound + 1e-9).all().item() for curve, bound in zip(hard.values(), theorems))
    print(f"ISTA and FISTA stay within what the theorems allow: {within} (expect True)")

    # %% 3. λ, from where the first codes appear: the error falls, and ever more atoms are taken to explain the noise
    shares = torch.logspace(0, -3, 7 if quick else 31).tolist()  # of the largest λ that matters
    path = [fista(signals, truth, share * largest.max().item()) for share in shares]  # (N, M) each
    counts = [count(s) for s in path]
    errors = [((signals - s @ truth).square().sum() / signals.square().sum()).item() for s in path]
    hits = [((s != 0) & (planted != 0)).sum().item() / max(1, s.count_nonzero().item()) for s in path]
    for i, expected in zip((len(path) // 3, -1), ("3.9, 98 %, 9.32 %", "60.0, 8 %, 0.01 %")):
        numbers = f"{counts[i]:.1f} coefficients, {hits[i]:.0%} of them planted, error {errors[i]:.2%}"
        print(f"λ at {shares[i]:.3f} of the largest: {numbers} (expect {expected})")
    falls = all(a >= b for a, b in zip(errors, errors[1:]))
    print(f"a smaller λ never has the larger error: {falls} (expect True)")

    # %% 4. Learned atoms. Patches of pictures, less their mean; then a picture that was not learned from
    rng = np.random.default_rng(0)
    pictures = [grey(natural_image(rng, 128)) for _ in range(24)]  # (128, 128) each
    windows = torch.cat([p.unfold(0, SIDE, 1).unfold(1, SIDE, 1).reshape(-1, SIDE**2) for p in pictures])  # (…, C)
    windows = windows[torch.randperm(len(windows), generator=generator)[: 3000 if quick else 16000]]
    windows = windows - windows.mean(dim=1, keepdim=True)
    patches = windows[windows.norm(dim=1) > windows.norm(dim=1).median()]  # (N, C), the half with something in it
    lam = SHARE * 2 * patches.norm(dim=1).median().item()
    atoms, s = learn_dictionary(patches, ATOMS, lam, max_iter=10 if quick else 40)  # (M, C), (N, M)
    atoms = atoms[s.abs().sum(dim=0).argsort(descending=True)]  # the most used first

    picture = grey(natural_image(np.random.default_rng(7), 128))[:120, :120]
    tiles = picture.unfold(0, SIDE, SIDE).unfold(1, SIDE, SIDE).reshape(-1, SIDE**2)  # (144, C)
    means = tiles.mean(dim=1, keepdim=True)  # (144, 1)
    needed, missed = {}, {}
    for name, d in (("random", normalize(torch.randn(ATOMS, SIDE**2, generator=generator))), ("learned", atoms)):
        s = fista(tiles - means, d, lam)  # (144, M)
        needed[name], error = count(s), tiles - means - s @ d  # (144, C)
        missed[name] = (error.square().sum() / (tiles - means).square().sum()).item()
        print(f"{name} atoms: {needed[name]:.1f} of {ATOMS} for each patch, {missed[name]:.0%} missed", end="; ")
    print("(expect 14.1, 47 %; 6.5, 7 %)")  # of the variance of the 10 × 10 patches

    draw_race(hard, theorems, easy, figures / "01_convergence.png")
    draw_path(shares, path, planted, counts, errors, hits, figures / "01_lambda.png")
    draw_atoms(atoms, picture, tiles, means, s, figures / "01_atoms.png")
    curves = {"hard": hard, "easy": easy, "within": within, "falls": falls}
    return {"naive": naive, "fast": fast, "gap": gap, **curves, "needed": needed, "missed": missed}


def race(signals, dictionary, lam, steps):
    """How far each method is above the minimum after each step, relative to it; and L‖S*‖²/2k, 2L‖S*‖²/(k+1)²."""
    best = fista(signals, dictionary, lam, tol=1e-13, max_iter=100_000)  # (N, M)
    lowest = lasso_objective(signals, best, dictionary, lam)
    curves = {name: [] for name in METHODS}
    for name, (solve, options) in METHODS.items():
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # that it is not there yet is what we want to see
            solve(signals, dictionary, lam, max_iter=steps, tol=0, **options,
                  callback=lambda k, s: curves[name].append(lasso_objective(signals, s, dictionary, lam)))  # fmt: skip
        curves[name] = torch.stack(curves[name]) / lowest - 1  # (steps,)
    k, size = torch.arange(1, steps + 1), torch.linalg.matrix_norm(dictionary, 2) ** 2 * best.square().sum() / lowest
    return curves, (size / k, 4 * size / (k + 1) ** 2)  # (steps,) each; L = 2‖D‖²


def count(codes):
    return codes.count_nonzero().item() / len(codes)


def grey(image):
    return torch.from_numpy(np.asarray(image.convert("L"), dtype=np.float32) / 255)  # (H, W)


# %% The figures


def draw_race(hard, theorems, easy, path):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    for bound, label, color in zip(theorems, ("L‖S*‖² / 2k", "2 L‖S*‖² / (k+1)²"), ("tab:blue", "tab:orange")):
        left.plot(range(1, len(bound) + 1), bound, "--", color=color, lw=1, label=f"theorem: at most {label}")
    for ax, curves in ((left, hard), (right, easy)):
        for name, curve in curves.items():
            ax.plot(range(1, len(curve) + 1), curve.clamp(min=1e-12), label=name)
        ax.set(xlabel="step k", yscale="log", ylabel="objective above its minimum, relative")
    left.set(xscale="log", ylim=(1e-8, 1e3), title="spikes behind a blur: 1/k and 1/k²")
    right.set(ylim=(1e-8, 10), title="5 of 256 random atoms: restart and greed pay")
    left.legend(fontsize=8, loc="lower left")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def draw_path(shares, path, planted, counts, errors, hits, file):
    figure, (left, right) = plt.subplots(1, 2, figsize=(9.6, 4), layout="constrained")
    row = int(planted.abs().topk(5).values[:, 4].argmax())  # a signal in which all five atoms count
    for m, values in enumerate(torch.stack([s[row] for s in path]).T):
        if planted[row, m]:
            (line,) = left.plot(shares, values, lw=2, zorder=2)
            left.axhline(planted[row, m], color=line.get_color(), ls=":", lw=1)
        elif values.any():
            left.plot(shares, values, color="0.7", lw=0.8, zorder=1)
    left.set(xscale="log", xlim=(1, 1e-3), xlabel="λ, as a share of the largest that matters", ylabel="coefficient")
    left.set_title("one signal: the 5 planted atoms (coloured; dotted: as planted)\nand the others (grey)", fontsize=10)
    right.plot(counts, errors, ".-", color="tab:blue")
    right.axhline(0.01 / 1.01, color="0.5", ls=":", lw=1)
    right.set(xscale="log", yscale="log", xlim=(0.5, 80), xlabel="coefficients that are not zero, of 256")
    right.set_xticks([1, 2, 5, 10, 20, 64], [1, 2, 5, 10, 20, 64])
    right.set_title("error (dotted: the noise)", color="tab:blue", fontsize=10, loc="left")
    twin = right.twinx()
    twin.plot(counts, [100 * h for h in hits], ".-", color="tab:orange")
    twin.set_title("% that were planted", color="tab:orange", fontsize=10, loc="right")
    figure.savefig(file, dpi=120)
    plt.close(figure)


def draw_atoms(atoms, picture, tiles, means, codes, path):
    figure = plt.figure(figsize=(11, 6), layout="constrained")
    left, right = figure.subfigures(1, 2, width_ratios=(6, 5))
    top, bottom = right.subfigures(2, 1)
    wall = (atoms / atoms.abs().amax(dim=1, keepdim=True)).view(12, 12, SIDE, SIDE)  # row, column, y, x
    wall = pad(wall, (1, 1, 1, 1), value=1).transpose(1, 2).reshape(12 * (SIDE + 2), -1)
    coded = (codes @ atoms + means).view(12, 12, SIDE, SIDE).transpose(1, 2).reshape(120, 120)
    show(left.subplots(), wall, f"{ATOMS} atoms learned from patches, the most used first")
    one, two = top.subplots(1, 2)
    show(one, picture - 0.5, "a picture not learned from", 0.5)
    show(two, coded - 0.5, f"{count(codes):.1f} atoms for each patch", 0.5)
    strength = (tiles - means).norm(dim=1) * ((codes != 0).sum(dim=1) == 5)  # (144,)
    for axes, row in zip(bottom.subplots(3, 7), strength.topk(3).indices):  # the strongest patches of five atoms
        show(axes[0], (tiles - means)[row].view(SIDE, SIDE), "patch ≈")
        for ax, m, sign in zip(axes[1:6], codes[row].abs().topk(5).indices, "++++="):
            show(ax, atoms[m].view(SIDE, SIDE), f"{codes[row, m]:.2f} × {sign}")
        show(axes[6], (codes[row] @ atoms).view(SIDE, SIDE), "sum")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def show(ax, image, title, size=None):
    size = size or image.abs().max()
    ax.imshow(image, cmap="gray", vmin=-size, vmax=size)
    ax.set_title(title, fontsize=9 if len(title) < 20 else 11)
    ax.axis("off")


# Try
# - WIDTH = 2: atoms differ more; with restart the last digit is right after 860 steps, without not even after 3000.
# - SHARE = 0.4: 1.3 atoms for each patch, but 28 % missed; an atom is then nearly a patch of its own.
# - 0.5 * noise: λ at 0.1 takes 11.5 coefficients, 31 % of them planted; for the smallest, 1000 steps are not enough.

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="fewer steps and patches, for a check")
    parser.add_argument("--figures", type=Path, default=FIGURES, help="folder for the pictures")
    arguments = parser.parse_args()
    main(arguments.quick, arguments.figures)
