"""Seconds until Eq. 5 is solved to a relative gap of 1e-5 in the objective: sparsecode beside scikit-learn and SPAMS.

    python tests/benchmarks/lasso_speed.py      (two idle CPU cores; SPAMS takes part after pip install spams-bin)

Random Gaussian unit atoms; signals of 5 atoms with Gaussian coefficients and noise at 20 dB; λ a tenth of the median
over signals of max|2 X Dᵀ|, from which on a code is zero. Each method is stopped after 1, 2, 3, 5, … iterations, from
the start each time, and each stop is timed three times, all methods in turn; the least counts. The gap is to the lowest
objective that any of them reaches. scikit-learn's rows include its choice between one process and two, and what it
does when left at its defaults.
"""

import argparse
import math
import time
import warnings
from functools import partial
from pathlib import Path

import matplotlib
import numpy as np
import torch
from sklearn.decomposition import sparse_encode

from sparsecode import fista, ista, lasso_objective
from sparsecode.common import replacing

matplotlib.use("agg")
import matplotlib.pyplot as plt  # noqa: E402

try:
    import spams
except ImportError:
    spams = None

FIGURE = Path(__file__).parent.parent.parent / "lessons" / "figures" / "01_speed.png"
SIZES = ((2000, 64, 256), (500, 100, 400), (3000, 32, 40))  # signals, dimensions, atoms
STOPS = (1, 2, 3, 5, 7, 10, 15, 20, 25, 30, 40, 60, 80, 120, 200, 500, 1000)
GOAL, FLOOR = 1e-5, 1e-11
OURS, THEIRS = "fista", "scikit-learn, n_jobs=2"


def make_problem(n, dims, atoms, share, seed=0):
    """Signals (N, C), dictionary (M, C) as float64 arrays, and λ."""
    rng = np.random.default_rng(seed)
    dictionary = rng.normal(size=(atoms, dims))
    dictionary /= np.linalg.norm(dictionary, axis=1, keepdims=True)
    codes = np.zeros((n, atoms))
    for row in codes:
        row[rng.choice(atoms, 5, replace=False)] = rng.normal(size=5)
    signals, noise = codes @ dictionary, rng.normal(size=(n, dims))
    signals += 0.1 * noise * np.linalg.norm(signals) / np.linalg.norm(noise)
    return signals, dictionary, share * float(np.median(2 * np.abs(signals @ dictionary.T).max(axis=1)))


def make_methods(signals, dictionary, lam, threads):
    """name -> function of the number of iterations that returns codes (N, M); SPAMS has but one answer."""
    x, d = torch.from_numpy(signals), torch.from_numpy(dictionary)

    def theirs(stop, jobs):
        return sparse_encode(signals, dictionary, algorithm="lasso_cd", alpha=lam / 2, n_jobs=jobs, max_iter=stop)

    methods = {
        "ISTA": lambda stop: ista(x, d, lam, max_iter=stop),
        "FISTA as published": lambda stop: fista(x, d, lam, max_iter=stop, greedy=0, restart=False),
        "FISTA with restart": lambda stop: fista(x, d, lam, max_iter=stop, greedy=0),
        OURS: lambda stop: fista(x, d, lam, max_iter=stop),
        THEIRS: partial(theirs, jobs=2),
        "scikit-learn, n_jobs=1": partial(theirs, jobs=1),
    }
    if spams:
        columns, atoms = np.asfortranarray(signals.T), np.asfortranarray(dictionary.T)
        options = dict(lambda1=lam / 2, mode=2, numThreads=threads)
        methods["SPAMS"] = lambda stop: spams.lasso(columns, D=atoms, **options).T.toarray()
    return methods


def measure(problem, dtype, threads, repeats=3):
    """name -> list of (seconds, relative gap), one for each stop; and the mean number of coefficients not zero."""
    signals, dictionary, lam = problem
    methods = make_methods(signals.astype(dtype), dictionary.astype(dtype), lam, threads)
    x, d = torch.from_numpy(signals), torch.from_numpy(dictionary)
    exact = fista(x, d, lam, tol=1e-10)
    runs = {name: [[math.inf, 0.0] for _ in (STOPS if name != "SPAMS" else STOPS[-1:])] for name in methods}
    for method in methods.values():
        method(2)  # start the processes, warm the caches
    for _ in range(repeats):
        for name, method in methods.items():
            for run, stop in zip(runs[name], STOPS):
                begin = time.perf_counter()
                codes = method(stop)
                run[0] = min(run[0], time.perf_counter() - begin)
                run[1] = lasso_objective(x, torch.as_tensor(codes).double(), d, lam).item()
    least = min(lasso_objective(x, exact, d, lam).item(), *(value for line in runs.values() for _, value in line))
    curves = {name: [(seconds, value / least - 1) for seconds, value in line] for name, line in runs.items()}
    return curves, exact.count_nonzero().item() / len(x)


def seconds_to(goal, curve):
    return min((seconds for seconds, gap in curve if gap <= goal), default=math.inf)


def report(curves):
    """One line for each method: how long to the goal, how often as long as ours, and what its defaults come to."""
    ours = seconds_to(GOAL, curves[OURS])
    for name, curve in curves.items():
        reached, (seconds, gap) = seconds_to(GOAL, curve), curve[-1]
        print(f"  {name:24} {1000 * reached:8.1f} ms {reached / ours:7.1f} x", end="")
        print(f"      at the defaults {1000 * seconds:8.1f} ms, gap {gap:.0e}")


def draw(results, path):
    figure, axes = plt.subplots(1, len(results), figsize=(11, 4), layout="constrained", sharey=True)
    for ax, (size, curves) in zip(axes, results.items()):
        for name, curve in curves.items():
            bold = name in (OURS, THEIRS)
            seconds, gaps = zip(*((1000 * seconds, max(gap, FLOOR)) for seconds, gap in curve))
            style = "*" if name == "SPAMS" else "o-" if bold else ".-"
            ax.plot(seconds, gaps, style, label=name, markersize=12 if name == "SPAMS" else None, lw=2 if bold else 1)
        ax.axhline(GOAL, color="gray", ls=":")
        ax.set(xscale="log", yscale="log", xlabel="milliseconds", title="{} signals of {}, {} atoms".format(*size))
    axes[0].set_ylabel("objective above its minimum, relative")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4)
    figure.suptitle("Solving the lasso for a batch of signals: time against gap, float32, two CPU cores")
    with replacing(path) as temporary:
        figure.savefig(temporary, dpi=120)
    plt.close(figure)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--share", type=float, default=0.1, help="λ, as a share of the median of max|2 X Dᵀ|")
    parser.add_argument("--figure", type=Path, default=FIGURE, help="where to save the plot")
    parser.add_argument("--threads", type=int, default=2, help="of torch and SPAMS")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    warnings.simplefilter("ignore")  # runs that are stopped early say so
    results = {}
    for dtype in ("float64", "float32"):
        for size in SIZES:
            problem = make_problem(*size, args.share)
            curves, nonzero = measure(problem, dtype, args.threads)
            name = "{} signals of {} dimensions, {} atoms".format(*size)
            print(f"\n{name}, {dtype}, λ = {problem[2]:.3f}, {nonzero:.1f} coefficients: time to a gap of {GOAL:.0e}")
            report(curves)
            results[size] = curves  # the figure is of the last, float32
    draw(results, args.figure)
    print(f"\nplot in {args.figure}")


if __name__ == "__main__":
    main()
