"""How much of a planted dictionary is found: sparsecode beside scikit-learn on the same signals.

    python tests/benchmarks/dictionary_recovery.py      (many minutes, nearly all of them scikit-learn's)

5,000 signals of 64 dimensions, each of 5 out of 128 random unit atoms with Gaussian coefficients, noise at 20 dB; λ a
tenth of the median of max|2 X Dᵀ|. An atom is found when some learned atom has |cos| ≥ 0.98 with it. The objective is
Eq. 5 at the learned atoms and their best codes, relative to the same at the planted atoms.
"""

import argparse
import time
import warnings

import torch
from lasso_speed import make_problem
from sklearn.decomposition import DictionaryLearning, MiniBatchDictionaryLearning

from sparsecode import fista, lasso_objective, learn_dictionary

ATOMS = 128


def make_learners(lam, rounds):
    """name -> function of (signals, seed) that returns a dictionary (M, C); scikit-learn's alpha is λ/2."""
    common = dict(n_components=ATOMS, alpha=lam / 2, transform_algorithm="lasso_cd", fit_algorithm="cd")

    def batch(signals, seed):
        model = DictionaryLearning(**common, max_iter=rounds, random_state=seed, n_jobs=2)
        return torch.from_numpy(model.fit(signals.numpy()).components_)

    def mini_batch(signals, seed):
        to_the_end = dict(max_no_improvement=None, tol=0)
        model = MiniBatchDictionaryLearning(**common, **to_the_end, max_iter=rounds, random_state=seed)
        return torch.from_numpy(model.fit(signals.numpy()).components_)

    return {
        "sparsecode": lambda signals, seed: learn_dictionary(signals, ATOMS, lam, seed=seed)[0],
        "MiniBatchDictionaryLearning": mini_batch,
        "DictionaryLearning": batch,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--rounds", type=int, default=50, help="passes over the signals that scikit-learn may take")
    args = parser.parse_args()
    warnings.simplefilter("ignore")  # scikit-learn's, of inner solves that are not exact
    for seed in range(args.seeds):
        signals, truth, lam = make_problem(5000, 64, ATOMS, share=0.1, seed=seed)
        signals, truth = torch.from_numpy(signals), torch.from_numpy(truth)  # (N, C), (M, C)
        at_truth = lasso_objective(signals, fista(signals, truth, lam), truth, lam).item()
        for name, learn in make_learners(lam, args.rounds).items():
            begin = time.perf_counter()
            learned = learn(signals, seed)  # (M, C)
            seconds = time.perf_counter() - begin
            found = ((truth @ learned.T).abs().amax(dim=1) >= 0.98).float().mean().item()
            objective = lasso_objective(signals, fista(signals, learned, lam), learned, lam).item() / at_truth
            print(f"seed {seed}  {name:28} {found:6.1%} in {seconds:6.1f} s, objective {objective:.4f}", flush=True)


if __name__ == "__main__":
    main()
