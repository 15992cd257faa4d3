"""Dictionary learning: the atoms D that let the signals X ≈ S D be sparse (Eq. 4, 5)."""

import math

import torch
from tqdm import tqdm

from .common import UserError, is_whole
from .lasso import fista, lasso_objective
from .lasso_solver import finite_matrix, unit_of

COPY = 0.9  # |cos| above which one atom is a copy of another
DRAWN = 2**24  # the most signals that torch.multinomial can draw from


@torch.no_grad()
def learn_dictionary(signals, n_atoms, lam, *, max_iter=200, tol=1e-5, seed=0, callback=None):
    """Unit-norm atoms D (M, C) and codes S (N, M) that minimise Eq. 5 together, each for the other by turns

        min_{S, D} ‖X − S D‖² + λ‖S‖₁    with ‖d_m‖ = 1

    Atoms start as signals, drawn at random, the strong ones more often. When a round lowers the objective by less than
    `tol` of it, dead atoms are replaced (see `replace_dead`) and the rounds go on. The end is reached when that has not
    paid, and what was best is returned, or after `max_iter` rounds. `callback(k, D, S)` is called in each.
    """
    if not (is_whole(n_atoms) and is_whole(max_iter) and n_atoms > 0 and max_iter > 0):
        raise UserError(f"n_atoms={n_atoms}, max_iter={max_iter}: give at least one atom and one round")
    x = finite_matrix("signals", signals)  # (N, C)
    unit = unit_of(x)
    x = x / unit  # squares stay in the range of float32
    strength = x.square().sum(dim=1)  # (N,)
    largest = 2 * unit * strength.max().sqrt().item() if len(x) else 0.0  # of max|2 X Dᵀ| for any atoms of unit norm
    if not 0 <= lam < largest:
        raise UserError(f"lam={lam}: give 0 or more, and well below {largest:.3g}, where all codes are 0")
    lam = lam / unit
    every = max(1, math.ceil(len(x) / DRAWN))
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.multinomial(strength[::every], n_atoms, replacement=True, generator=generator)  # (M,)
    dictionary = torch.nn.functional.normalize(x[::every][drawn])  # (M, C)

    best, before = float("inf"), float("inf")
    for k in (bar := tqdm(range(1, max_iter + 1), "dictionary", unit="round", disable=None, leave=False)):
        codes = fista(x, dictionary, lam, tol=1e-3)  # (N, M): rough is enough while the atoms still move
        update_atoms(x, codes, dictionary)
        after = lasso_objective(x, codes, dictionary, lam).item()
        bar.set_postfix(objective=f"{after * unit**2:.5g}")
        if callback:
            callback(k, dictionary, codes * unit)
        if before - after < tol * before:
            if best - after < tol * best:
                break
            best, kept = after, dictionary.clone()
            replace_dead(x, codes, dictionary)
            after = float("inf")
        before = after
    bar.close()
    if best < after:
        dictionary = kept
    codes = fista(x, dictionary, lam)  # (N, M)
    return dictionary.to(signals.dtype), (codes * unit).to(signals.dtype)


def update_atoms(signals, codes, dictionary):
    """Make each atom in turn the best one of unit norm for the codes as they are; the objective never rises.

    ‖X − S D‖² depends on d_m through −2 d_m·u alone, u = Σ_n s_nm (x_n − Σ_{j≠m} s_nj d_j), so d_m = u / ‖u‖.
    """
    a, b = codes.T @ codes, codes.T @ signals  # (M, M), (M, C)
    for m in range(len(dictionary)):
        u = b[m] - a[m] @ dictionary + a[m, m] * dictionary[m]  # (C,)
        size = u.norm()
        if size > 0:
            dictionary[m] = u / size


def replace_dead(signals, codes, dictionary):
    """Put what the worst fitted signals are missing in place of atoms that no signal uses or that copy an earlier one.

    Where there are none, the atom of least Σ_n s_nm² is taken for dead. What a new atom explains is no longer missing.
    """
    energy = codes.square().sum(dim=0)  # (M,)
    energy[((dictionary @ dictionary.T).abs().triu(diagonal=1) > COPY).any(dim=0)] = 0
    missing = signals - codes @ dictionary  # (N, C)
    for m in (energy == energy.min()).nonzero()[:, 0]:
        size, worst = missing.norm(dim=1).max(dim=0)
        if size > 0:
            dictionary[m] = missing[worst] / size  # (C,)
            missing = missing - (missing @ dictionary[m])[:, None] * dictionary[m]  # (N, C)
