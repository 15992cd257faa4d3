"""Dictionary learning: find atoms D for which signals X ≈ S D have sparse codes S (Eqs. 4, 5)."""

import math

import torch
from tqdm import tqdm

from .common import UserError, is_whole
from .lasso import fista, lasso_objective
from .lasso_solver import finite_matrix, unit_of

COPY = 0.9  # two atoms with a larger |cos| count as copies
DRAWN = 2**24  # the most signals that torch.multinomial can draw from


@torch.no_grad()
def learn_dictionary(signals, n_atoms, lam, *, max_iter=200, tol=1e-5, seed=0, callback=None):
    """Unit-norm atoms D (M, C) and codes S (N, M) of signals X (N, C), by alternating minimisation of Eq. 5

        min_{S, D} ‖X − S D‖² + λ‖S‖₁    with ‖d_m‖ = 1

    The first atoms are random signals, drawn in proportion to ‖x‖². When a round lowers the objective by less than the
    share `tol`, dead atoms are replaced (see `replace_dead`). The rounds end when this does not help, or after
    `max_iter` rounds; the best dictionary is returned. `callback(k, D, S)` is called in each round. UserError if a
    number is out of range, or if signals are not a matrix of finite numbers.
    """
    if not (is_whole(n_atoms) and is_whole(max_iter) and n_atoms > 0 and max_iter > 0):
        raise UserError(f"n_atoms={n_atoms}, max_iter={max_iter}: give at least one atom and one round")
    x = finite_matrix("signals", signals)  # (N, C)
    unit = unit_of(x)
    x = x / unit  # squares stay in the range of float32
    strength = x.square().sum(dim=1)  # (N,)
    largest = 2 * unit * strength.max().sqrt().item() if len(x) else 0.0  # bounds max|2 X Dᵀ| for unit-norm atoms
    if not 0 <= lam < largest:
        raise UserError(f"lam={lam}: give 0 or more, and well below {largest:.3g}, where all codes are 0")
    lam = lam / unit
    every = max(1, math.ceil(len(x) / DRAWN))
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.multinomial(strength[::every], n_atoms, replacement=True, generator=generator)  # (M,)
    dictionary = torch.nn.functional.normalize(x[::every][drawn])  # (M, C)

    best, before = float("inf"), float("inf")
    for k in (bar := tqdm(range(1, max_iter + 1), "dictionary", unit="round", disable=None, leave=False)):
        codes = fista(x, dictionary, lam, tol=1e-3)  # (N, M); rough codes are enough while the atoms still change
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
    """Replace each atom in turn, in place, by the best unit-norm atom for the given codes. The objective never rises.

    For a unit-norm d_m, ‖X − S D‖² is −2 d_m·u plus a constant, with u = Σ_n s_nm (x_n − Σ_{j≠m} s_nj d_j). So the best
    is d_m = u / ‖u‖ (compare Mairal et al., 2009, Algorithm 2).
    """
    a, b = codes.T @ codes, codes.T @ signals  # (M, M), (M, C)
    for m in range(len(dictionary)):
        u = b[m] - a[m] @ dictionary + a[m, m] * dictionary[m]  # (C,)
        size = u.norm()
        if size > 0:
            dictionary[m] = u / size


def replace_dead(signals, codes, dictionary):
    """Replace dead atoms, in place, by the normalised residuals of the worst fitted signals.

    An atom is dead if no signal uses it or if it copies an earlier atom. If there is none, the atom with the smallest
    Σ_n s_nm² is replaced. Each new atom reduces the residuals for the next one.
    """
    energy = codes.square().sum(dim=0)  # (M,)
    energy[((dictionary @ dictionary.T).abs().triu(diagonal=1) > COPY).any(dim=0)] = 0
    missing = signals - codes @ dictionary  # (N, C)
    for m in (energy == energy.min()).nonzero()[:, 0]:
        size, worst = missing.norm(dim=1).max(dim=0)
        if size > 0:
            dictionary[m] = missing[worst] / size  # (C,)
            missing = missing - (missing @ dictionary[m])[:, None] * dictionary[m]  # (N, C)
