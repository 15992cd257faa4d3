"""What makes ISTA and FISTA fast: signals that are done drop out, blocks fit the cache, FISTA starts greedily.

A signal is done when its optimality gap (see `lasso.optimality_gap`) is at most `tol`. Rounding sets a floor under the
gap (near 1e-6 in float32); a signal that has come down to its floor is done as well, however small `tol` is.
"""

import itertools
import math
import warnings
from functools import cached_property

import torch

from .common import UserError, is_whole
from .thresholds import soft_threshold

CHECK = 10  # steps between two looks at the gap
GREEDY = 30  # steps of FISTA's greedy start
WIDEST = 8192  # atoms: the greedy start keeps an (M, M) matrix in memory, so a wider dictionary goes without it
BLOCK = 2**17  # coefficients solved for at a time: they stay in the cache of a CPU core (a GPU takes more)


def solve(signals, dictionary, lam, start, step, greedy, max_iter, tol, callback):
    """The codes (N, M) where `step` ends: block by block, unless a callback wants to see all codes after every step."""
    if not is_whole(max_iter) or max_iter < 1 or not tol >= 0:
        raise UserError(f"max_iter={max_iter}, tol={tol}: give at least one step and a tol of 0 or more")
    if not is_whole(greedy) or greedy < 0:
        raise UserError(f"greedy={greedy}: give a whole number of steps, 0 for none")
    x, d, lam, unit = checked(signals, dictionary, lam)
    codes = x.new_zeros(len(x), len(d))  # (N, M)
    if not codes.numel() or not x.numel():  # signals of no dimensions: any code costs, and none explains
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
    """Fill `codes` (n, M), which arrive as zeros; return the gaps of the signals that are not done.

    Signals that are done drop out of the arrays; `rows` says which are left. All that `start` and `step` return has
    one row for each signal, and the codes first.
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
    """Fill `codes` by coordinate descent in which each signal moves the coefficient that gains most; return the steps.

    For unit atoms s_m = σ_{λ/2}(z_m) is best while the others rest, z = (X − S D) Dᵀ + S. Moving s_m by δ takes
    δ (D Dᵀ)_m, without its diagonal, off z. It is matching pursuit with a threshold, for all signals at once.
    """
    norms = problem.norms.clamp(min=problem.tiny)  # (M,): for atoms of unit norm codes are S · norms
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
    """Eq. 5 for one dictionary, with what every step needs computed once."""

    def __init__(self, dictionary, lam):
        (atoms, width), self.tiny = dictionary.shape, torch.finfo(dictionary.dtype).tiny  # M, C
        self.dictionary, self.lam = dictionary, lam
        self.gram = dictionary @ dictionary.T if atoms < 2 * width else None  # (M, M), where it saves work
        self.lipschitz = lipschitz(dictionary)
        self.norms = dictionary.norm(dim=1)  # (M,)

    @cached_property
    def coupling(self):
        """D Dᵀ of the atoms at unit norm, without its diagonal (M, M)."""
        atoms = self.dictionary / self.norms.clamp(min=self.tiny)[:, None]  # (M, C)
        return (atoms @ atoms.T).fill_diagonal_(0)

    def prepare(self, signals, products):
        """What steps and gaps need of the signals: X or X Dᵀ, max|2 X Dᵀ|, ‖X‖."""
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
        """The gap of each signal (n,), and the floor that rounding puts under it (n,)."""
        residual = self.lipschitz * (codes - self.step(codes, data)).abs().amax(dim=1)  # (n,)
        terms = length + codes.abs() @ self.norms  # (n,): ‖x‖ + Σ |s_m| ‖d_m‖, what the gradient is the difference of
        rounding = 2 * torch.finfo(codes.dtype).eps * terms * self.norms.max()  # (n,)
        return torch.where(residual > 0, residual / largest, 0.0), rounding / largest


def lipschitz(dictionary):
    """L = 2‖D Dᵀ‖₂; 1 for a dictionary of zeros, where any step does."""
    atoms, width = dictionary.shape  # M, C
    small = dictionary @ dictionary.T if atoms < width else dictionary.T @ dictionary  # both have the same norm
    return 2 * torch.linalg.eigvalsh(small)[-1].item() if dictionary.any() else 1.0


def checked(signals, dictionary, lam):
    """Signals and dictionary in float32 at least, λ, and the unit of the codes; or one line on what is wrong.

    Both come near 1 in size, so that no square leaves the range of the dtype. Powers of two round nothing.
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
    """The power of two that brings the largest number of a matrix to between 1 and 2."""
    return 2.0 ** (math.frexp(value.abs().max().item())[1] - 1) if value.any() else 1.0


def finite_matrix(name, value):
    """A matrix of finite numbers, in float32 at least, or one line on what is wrong."""
    if not torch.is_tensor(value) or not value.is_floating_point() or value.dim() != 2:
        what = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise UserError(f"{name}: {what} given; give a 2-dimensional tensor of floating point numbers")
    if not value.isfinite().all():
        raise UserError(f"{name}: there are NaN or infinite values among them")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
