"""Dictionary learning: the atoms D that let the signals X ≈ S D be sparse (Eq. 4, 5)."""

import torch
from tqdm import tqdm

from .common import UserError
from .lasso import finite_matrix, fista, lasso_objective

SAME = 0.9  # |cos| above which one atom is a copy of another


@torch.no_grad()
def learn_dictionary(signals, n_atoms, lam, *, max_iter=100, tol=1e-5, seed=0, callback=None):
    """Unit-norm atoms D (M, C) and codes S (N, M), by turns the best S for D and a better D for S:

        min_{S, D} ‖X − S D‖² + λ‖S‖₁    with ‖d_m‖ = 1

    Starts from signals drawn at random, the strong ones more often. After each round, an atom that no signal uses, or
    that copies another, is replaced by what is missing from one of the worst fitted signals. Ends when a round lowers
    the objective by less than `tol` of it, or after `max_iter` rounds. `callback(k, D, S)` is called in each.
    """
    if n_atoms < 1 or max_iter < 1:
        raise UserError(f"n_atoms={n_atoms}, max_iter={max_iter}: give at least one atom and one round")
    x = finite_matrix("signals", signals)  # (N, C)
    strength = x.square().sum(dim=1)  # (N,)
    largest = 2 * strength.max().sqrt().item() if len(x) else 0.0  # of max|2 X Dᵀ| for any atoms of unit norm
    if not lam < largest:
        raise UserError(f"lam={lam} leaves every code at zero; with these signals give one well below {largest:.3g}")
    generator = torch.Generator(x.device).manual_seed(seed)
    drawn = torch.multinomial(strength, n_atoms, replacement=True, generator=generator)  # (M,)
    dictionary = torch.nn.functional.normalize(x[drawn])  # (M, C)
    before = float("inf")
    for k in (bar := tqdm(range(1, max_iter + 1), "dictionary", disable=None, leave=False)):
        codes = fista(x, dictionary, lam, tol=1e-3)  # (N, M): rough is enough until the atoms are right
        update_atoms(x, codes, dictionary)
        after = lasso_objective(x, codes, dictionary, lam).item()
        bar.set_postfix(objective=f"{after:.4g}")
        if callback:
            callback(k, dictionary, codes)
        replaced = replace_atoms(x, codes, dictionary)
        if not replaced and before - after < tol * before:
            break
        before = after
    codes = fista(x, dictionary, lam)  # (N, M)
    return dictionary.to(signals.dtype), codes.to(signals.dtype)


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


def replace_atoms(signals, codes, dictionary):
    """Put residuals of the worst fitted signals in place of atoms that no signal uses or that copy an earlier one."""
    copies = ((dictionary @ dictionary.T).abs().triu(diagonal=1) > SAME).any(dim=0)  # (M,)
    dead = (copies | ~codes.any(dim=0)).nonzero()[:, 0]  # (number of dead atoms,)
    residual = signals - codes @ dictionary  # (N, C)
    size = residual.norm(dim=1)  # (N,)
    worst = size.topk(min(len(dead), int((size > 0).sum()))).indices
    dictionary[dead[: len(worst)]] = residual[worst] / size[worst, None]  # (C,) each
    return len(worst)
