"""What makes ISTA and FISTA fast: converged signals drop out, blocks fit the cache, FISTA starts greedily.

A signal has converged when its optimality gap (see `lasso.optimality_gap`) is at most `tol`, or at most the smallest
gap that rounding allows (near 1e-6 in float32).
"""

import itertools
import math
import warnings
from functools import cached_property

import torch

from .common import UserError, is_whole
from .thresholds import soft_threshold

CHECK = 10  # steps between two checks of the gap
GREEDY = 30  # steps of FISTA's greedy start
WIDEST = 8192  # atoms; a larger dictionary skips the greedy start, which keeps an (M, M) matrix in memory
BLOCK = 2**17  # coefficients solved for at a time, so that they fit the cache of a CPU core (a GPU gets more)


def solve(signals, dictionary, lam, start, step, greedy, max_iter, tol, callback):
    """Repeat `step` block by block; return the codes (N, M). With a callback, all signals are one block."""
    if not is_whole(max_iter) or max_iter < 1 or not tol >= 0:
        raise UserError(f"max_iter={max_iter}, tol={tol}: give at least one step and a tol of 0 or more")
    if not is_whole(greedy) or greedy < 0:
        raise UserError(f"greedy={greedy}: give a whole number of steps, 0 for none")
    x, d, lam, unit = checked(signals, dictionary, lam)
    codes = x.new_zeros(len(x), len(d))  # (N, M)
    if not codes.numel() or not x.numel():  # nothing to solve; with C = 0 the best codes are 0
        return codes.to(signals.dtype)
    limit = BLOCK if x.device.type == "cpu" else 128 * BLOCK
    size = len(x) if callback else max(1, limit // len(d))  # signals in a block
    watch = callback and (lambda k, s: callback(k, (s * unit).to(signals.dtype)))
    with torch.no_grad():
        problem = _Lasso(d, lam)
        blocks = zip(x.split(size), codes.split(size))  # views: each block fills its part of the codes
        gaps = torch.cat([_run(problem, *block, start, step, greedy, max_iter, tol, watch) for block in blocks])
    if len(gaps):
        warnings.warn(
            f"stopped at max_iter={max_iter} with an optimality gap of {gaps.max().item():.1e}, above tol={tol}, "
            f"in {len(gaps)} of {len(x)} signals",
            stacklevel=3,
        )
    return codes.mul_(unit).to(signals.dtype)


def _run(problem, signals, codes, start, step, greedy, max_iter, tol, callback):
    """Fill `codes` (n, M), zeros at first; return the gaps of the signals that did not converge.

    Converged signals drop out of the arrays; `rows` holds the indices of the rest. `start` and `step` return a tuple:
    the codes first, then other tensors, with one row for each signal.
    """
    first, products = 0, signals @ problem.dictionary.T  # (n, M)
    if greedy and len(problem.norms) <= WIDEST:
        first = _greedy(problem, products, codes, min(greedy, max_iter), tol, callback)
    rows, known = torch.arange(len(signals), device=signals.device), problem.prepare(signals, products)
    state = start(codes.clone())  # (n, …) each
    for k in itertools.count(first):
        if (k - first) % CHECK == 0 or k == max_iter:
            codes[rows] = state[0]
            gaps, floor = problem.gaps(state[0], *known)
            todo = gaps > floor.clamp(min=tol)  # (n,)
            if k == max_iter or not todo.any():
                return gaps[todo]
            rows, known = rows[todo], [row[todo] for row in known]
            state = [row[todo] for row in state]
        state = step(lambda y: problem.step(y, known[0]), *state)
        if callback:
            codes[rows] = state[0]
            callback(k + 1, codes)


def _greedy(problem, products, codes, steps, tol, callback):
    """Fill `codes` by greedy coordinate descent; return the number of steps.

    In each step, each signal changes its coefficient with the largest update. With unit-norm atoms and the other
    coefficients fixed, the best s_m is σ_{λ/2}(z_m), where z = (X − S D) Dᵀ + S. A change of s_m by δ subtracts
    δ (D Dᵀ)_m, without its diagonal, from z. This is matching pursuit with a threshold, for all signals at once.
    """
    norms = problem.norms.clamp(min=problem.tiny)  # (M,); with unit-norm atoms the codes are S · norms
    z, threshold = products / norms, problem.lam / (2 * norms)  # (n, M), (M,)
    rows, s, enough = torch.arange(len(z), device=z.device), torch.zeros_like(z), tol * z.abs().amax(dim=1)
    for k in range(1, steps + 1):
        moves = soft_threshold(z, threshold) - s  # (n, M)
        size, best = moves.abs().max(dim=1, keepdim=True)  # (n, 1), (n, 1)
        move = moves.gather(1, best)  # (n, 1)
        s.scatter_add_(1, best, move)
        z.addcmul_(problem.coupling.index_select(0, best[:, 0]), -move)  # (n, M)
        if k % CHECK == 0 or k == steps or callback:
            codes[rows] = s / norms
        if callback:
            callback(k, codes)
        if k % CHECK == 0:
            todo = size[:, 0] > enough  # (n,)
            if not todo.any():
                break
            rows, s, z, enough = (row[todo] for row in (rows, s, z, enough))
    return k


class _Lasso:
    """Eq. 5 for one dictionary. What every step needs is computed once."""

    def __init__(self, dictionary, lam):
        (atoms, width), self.tiny = dictionary.shape, torch.finfo(dictionary.dtype).tiny  # M, C
        self.dictionary, self.lam = dictionary, lam
        self.gram = dictionary @ dictionary.T if atoms < 2 * width else None  # (M, M), where it saves work
        self.lipschitz = lipschitz(dictionary)
        self.norms = dictionary.norm(dim=1)  # (M,)

    @cached_property
    def coupling(self):
        """D Dᵀ (M, M) of the normalised atoms, with a zero diagonal."""
        atoms = self.dictionary / self.norms.clamp(min=self.tiny)[:, None]  # (M, C)
        return (atoms @ atoms.T).fill_diagonal_(0)

    def prepare(self, signals, products):
        """What `step` and `gaps` need: X (n, C) or X Dᵀ (n, M); max|2 X Dᵀ| and ‖X‖ of each signal, (n,)."""
        data = signals if self.gram is None else products  # (n, C) or (n, M)
        return data, 2 * products.abs().amax(dim=1), signals.norm(dim=1)

    def step(self, codes, data):
        """σ_{λ/L}(S − ∇/L)"""
        if self.gram is None:
            half = (codes @ self.dictionary - data) @ self.dictionary.T  # (n, M) -> (n, C) -> (n, M)
        else:
            half = codes @ self.gram - data  # (n, M)
        return soft_threshold(codes - half * (2 / self.lipschitz), self.lam / self.lipschitz)  # (n, M)

    def gaps(self, codes, data, largest, length):
        """The gap of each signal (n,), and the smallest gap that rounding allows (n,)."""
        residual = self.lipschitz * (codes - self.step(codes, data)).abs().amax(dim=1)  # (n,)
        terms = length + codes.abs() @ self.norms  # (n,): ‖x‖ + Σ |s_m| ‖d_m‖, the size of the terms in the gradient
        rounding = 2 * torch.finfo(codes.dtype).eps * terms * self.norms.max()  # (n,)
        return torch.where(residual > 0, residual / largest, 0.0), rounding / largest


def lipschitz(dictionary):
    """L = 2‖D Dᵀ‖₂, the Lipschitz constant of the gradient; 1 for a dictionary of zeros, where any step size works."""
    atoms, width = dictionary.shape  # M, C
    small = dictionary @ dictionary.T if atoms < width else dictionary.T @ dictionary  # both have the same norm
    return 2 * torch.linalg.eigvalsh(small)[-1].item() if dictionary.any() else 1.0


def checked(signals, dictionary, lam):
    """Rescaled signals, dictionary (float32 or float64) and λ, and the unit of the codes; UserError if they do not fit.

    The largest entries are scaled to between 1 and 2, so that squares cannot overflow. The scales are powers of two,
    which add no rounding error.
    """
    x, d = finite_matrix("signals", signals), finite_matrix("dictionary", dictionary)
    if signals.shape[1] != dictionary.shape[1]:
        raise UserError(f"signals have {signals.shape[1]} dimensions, atoms {dictionary.shape[1]}; they must agree")
    if (signals.dtype, signals.device) != (dictionary.dtype, dictionary.device):
        kinds = " and ".join(f"{value.dtype} on {value.device}" for value in (signals, dictionary))
        raise UserError(f"signals and dictionary are {kinds}; make them the same")
    if not 0 <= lam < math.inf:
        raise UserError(f"lam={lam}; give a finite number of 0 or more")
    a, b = unit_of(x), unit_of(d)
    return x / a, d / b, min(float(lam) / a / b, torch.finfo(x.dtype).max), a / b


def unit_of(value):
    """The power of two by which to divide a matrix, so that its largest |entry| is between 1 and 2."""
    return 2.0 ** (math.frexp(value.abs().max().item())[1] - 1) if value.any() else 1.0


def finite_matrix(name, value):
    """`value` in float32 or float64, detached; UserError unless it is a matrix of finite floating point numbers."""
    if not torch.is_tensor(value) or not value.is_floating_point() or value.dim() != 2:
        what = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise UserError(f"{name}: {what} given; give a 2-dimensional tensor of floating point numbers")
    if not value.isfinite().all():
        raise UserError(f"{name}: there are NaN or infinite values; remove them")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
