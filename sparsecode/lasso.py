"""Sparse coding: min_S ‖X − S D‖² + λ‖S‖₁ (Eq. 5) by proximal gradient steps S ← σ_{λ/L}(S − ∇/L) (Eq. 6).

X (N, C) are N signals, D (M, C) is a dictionary with atoms as rows, S (N, M) are the codes. Each signal is a separate
problem. There is no ½ before the square, so λ corresponds to alpha = λ/2 in scikit-learn's `sparse_encode(X, D)`, and
to alpha = λ/(2C) in its `Lasso`, which also divides the square by C.

This file defines one step of each method. `lasso_solver.py` repeats it, fast, until the optimality gap of each signal
is at most `tol`. A step gets only the n of N signals that have not converged.
"""

import torch

from .common import UserError
from .lasso_solver import GREEDY, checked, finite_matrix, lipschitz, solve
from .thresholds import soft_threshold


def lasso_objective(signals, codes, dictionary, lam):
    """‖X − S D‖² + λ‖S‖₁, summed over signals: a scalar tensor    (Eq. 5)"""
    return (signals - codes @ dictionary).square().sum() + lam * codes.abs().sum()


def proximal_step(codes, signals, dictionary, lam, L):
    """σ_{λ/L}(S − ∇/L)  with  ∇ = 2 (S D − X) Dᵀ    (Eq. 6)"""
    gradient = 2 * (codes @ dictionary - signals) @ dictionary.T  # (N, M) -> (N, C) -> (N, M)
    return soft_threshold(codes - gradient / L, lam / L)  # (N, M)


def ista(signals, dictionary, lam, *, max_iter=1000, tol=1e-6, callback=None):
    """Signals (N, C), dictionary (M, C) -> codes (N, M) that minimise Eq. 5, by S ← σ_{λ/L}(S − ∇/L) with L = 2‖D Dᵀ‖₂

    The objective never rises, and is O(1/k) above its minimum after k steps. If `max_iter` steps do not reach `tol`, a
    warning states the gap. `callback(k, codes)` is called after each step. Half precision is computed in float32.
    UserError for values that are not finite, or shapes, dtypes or devices that do not match.
    """

    def start(s):
        return (s,)

    def step(descend, s):
        return (descend(s),)  # (n, M)

    return solve(signals, dictionary, lam, start, step, 0, max_iter, tol, callback)


def fista(signals, dictionary, lam, *, max_iter=1000, tol=1e-6, restart=True, greedy=GREEDY, callback=None):
    """Like `ista`, but each step starts from an extrapolated point Y (Beck & Teboulle, 2009): O(1/k²) above the minimum

        S_k = σ_{λ/L}(Y_k − ∇(Y_k)/L)
        t_{k+1} = (1 + √(1 + 4 t_k²)) / 2
        Y_{k+1} = S_k + (t_k − 1)/t_{k+1} (S_k − S_{k−1})

    With `restart`, a signal whose step points against its momentum restarts at t = 1 (O'Donoghue & Candès, 2015).
    The first `greedy` steps are greedy coordinate descent: each signal changes only its coefficient with the largest
    update. For very sparse codes this is almost enough. `greedy=0, restart=False` is the published method.
    """

    def start(s):
        return s, s, s.new_ones(len(s), 1)  # S (n, M), Y (n, M), t (n, 1)

    def step(descend, s, y, t):
        following = descend(y)  # (n, M)
        move = following - s  # (n, M)
        if restart:
            against = ((y - following) * move).sum(dim=1, keepdim=True) > 0  # (n, 1)
            t = torch.where(against, 1.0, t)
        faster = (1 + (1 + 4 * t.square()).sqrt()) / 2  # (n, 1)
        return following, following + (t - 1) / faster * move, faster

    return solve(signals, dictionary, lam, start, step, greedy, max_iter, tol, callback)


@torch.no_grad()
def optimality_gap(signals, codes, dictionary, lam):
    """L max|S − σ_{λ/L}(S − ∇/L)| / max|2 X Dᵀ| of the worst signal: 0 at the minimum of Eq. 5, near 1 for zeros

    The numerator is L times the change that one more step of ISTA would make. The denominator is the largest gradient
    at S = 0. So the ratio does not depend on the units of X and D. UserError if the codes do not fit.
    """
    x, d, lam, unit = checked(signals, dictionary, lam)
    s = finite_matrix("codes", codes).to(x.dtype) / unit  # (N, M)
    if s.shape != (len(x), len(d)):
        raise UserError(f"codes {tuple(s.shape)} do not fit {len(x)} signals and {len(d)} atoms")
    if not s.numel():
        return 0.0
    L = lipschitz(d)
    residual = L * (s - proximal_step(s, x, d, lam, L)).abs().amax(dim=1)  # (N,)
    largest = 2 * (x @ d.T).abs().amax(dim=1)  # (N,)
    return torch.where(residual > 0, residual / largest, 0.0).max().item()
