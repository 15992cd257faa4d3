"""Sparse coding: min_S ‖X − S D‖² + λ‖S‖₁ (Eq. 5) by proximal gradient steps S ← σ_{λ/L}(S − ∇/L) (Eq. 6).

X (N, C) are N signals, D (M, C) is a dictionary with atoms as rows, S (N, M) are the codes. Each signal is a problem of
its own. There is no ½ before the square: λ is twice the alpha of scikit-learn's `sparse_encode(X, D, alpha=λ/2)`, and
2C times the alpha of its `Lasso`, which also divides the square by C.

    naive                                                            until it has converged
    L = 2 * torch.linalg.matrix_norm(D @ D.T, 2)                     S = ista(X, D, lam)
    S = torch.zeros(N, M)                                            S = fista(X, D, lam)   # the same, much sooner
    for _ in range(1000):
        S = soft_threshold(S - 2 * (S @ D - X) @ D.T / L, lam / L)

A signal is done when its optimality gap is at most `tol`. The gap is the fixed-point residual, what one more ISTA step
would change, in units of the gradient ∇ = 2 (S D − X) Dᵀ and relative to the largest gradient at zero:

    gap = L max|S − σ_{λ/L}(S − ∇/L)| / max|2 X Dᵀ|

Hence `tol` means the same whatever the units of X and D. Rounding sets a floor under the gap (near 1e-6 in float32); a
signal that has come down to its floor is done as well, however small `tol` is.
"""

import itertools
import math
import warnings
from functools import cached_property

import torch

from .common import UserError
from .thresholds import soft_threshold

CHECK = 10  # steps between two looks at the gap
GREEDY = 30  # steps of FISTA's greedy start
WIDEST = 8192  # atoms: the greedy start keeps an (M, M) matrix in memory, so a wider dictionary goes without it
BLOCK = 2**17  # coefficients solved for at a time: they stay in the cache of a CPU core (a GPU takes more)


def lasso_objective(signals, codes, dictionary, lam):
    """‖X − S D‖² + λ‖S‖₁, summed over signals    (Eq. 5)"""
    return (signals - codes @ dictionary).square().sum() + lam * codes.abs().sum()


def ista(signals, dictionary, lam, *, max_iter=1000, tol=1e-6, callback=None):
    """The codes (N, M) that minimise Eq. 5, by S ← σ_{λ/L}(S − ∇/L) with L = 2‖D Dᵀ‖₂    (Eq. 6)

    The objective never rises, and is O(1/k) above its minimum after k steps. A run that `max_iter` ends warns with the
    gap. `callback(k, codes)` is called after each step. Half precision is computed in float32.
    """
    return _solve(signals, dictionary, lam, max_iter, tol, callback, momentum=False, restart=False, greedy=0)


def fista(signals, dictionary, lam, *, max_iter=1000, tol=1e-6, restart=True, greedy=GREEDY, callback=None):
    """As `ista`, with every step taken from a point Y ahead (Beck & Teboulle, 2009): O(1/k²) above the minimum

        S_k = σ_{λ/L}(Y_k − ∇(Y_k)/L)
        t_{k+1} = (1 + √(1 + 4 t_k²)) / 2
        Y_{k+1} = S_k + (t_k − 1)/t_{k+1} (S_k − S_{k−1})

    With `restart`, a signal whose step turns against its momentum starts again from t = 1 (O'Donoghue & Candès, 2015).
    The first `greedy` steps move one coefficient of each signal, the one that gains most: enough, or nearly, where few
    are not zero. `greedy=0, restart=False` is the method as published.
    """
    return _solve(signals, dictionary, lam, max_iter, tol, callback, momentum=True, restart=restart, greedy=greedy)


@torch.no_grad()
def optimality_gap(signals, codes, dictionary, lam):
    """The gap of the worst signal: 0 at the minimum of Eq. 5, near 1 for codes that are all zero."""
    x, d, lam, unit = _checked(signals, dictionary, lam)
    s = finite_matrix("codes", codes)
    if s.shape != (len(x), len(d)):
        raise UserError(f"codes {tuple(s.shape)} do not fit {len(x)} signals and {len(d)} atoms")
    if not s.numel():
        return 0.0
    problem = _Lasso(d, lam)
    gaps, _ = problem.gaps(s.to(x.dtype) / unit, *problem.prepare(x, x @ d.T))
    return gaps.max().item()


class _Lasso:
    """Eq. 5 for one dictionary, with what every step needs computed once."""

    def __init__(self, dictionary, lam):
        (atoms, width), self.tiny = dictionary.shape, torch.finfo(dictionary.dtype).tiny  # M, C
        self.dictionary, self.lam = dictionary, lam
        self.gram = dictionary @ dictionary.T if atoms < 2 * width else None  # (M, M), where it saves work
        small = self.gram if atoms < width else dictionary.T @ dictionary  # both have the same norm
        self.lipschitz = max(2 * torch.linalg.eigvalsh(small)[-1].item(), self.tiny)
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


def _solve(signals, dictionary, lam, max_iter, tol, callback, **method):
    """Block by block, unless a callback wants to see all codes after every step."""
    if max_iter < 1 or not tol >= 0:
        raise UserError(f"max_iter={max_iter}, tol={tol}: give at least one step and a tol of 0 or more")
    x, d, lam, unit = _checked(signals, dictionary, lam)
    codes = x.new_zeros(len(x), len(d))  # (N, M)
    if not codes.numel():
        return codes.to(signals.dtype)
    limit = BLOCK if x.device.type == "cpu" else 128 * BLOCK
    size = len(x) if callback else max(1, limit // len(d))  # signals in a block
    watch = callback and (lambda k, s: callback(k, (s * unit).to(signals.dtype)))
    with torch.no_grad():
        problem = _Lasso(d, lam)
        blocks = zip(x.split(size), codes.split(size))  # views: each block fills its part of the codes
        gaps = torch.cat([_descend(problem, *block, max_iter, tol, watch, **method) for block in blocks])
    if len(gaps):
        warnings.warn(
            f"stopped at max_iter={max_iter} with an optimality gap of {gaps.max().item():.1e}, above tol={tol}, "
            f"in {len(gaps)} of {len(x)} signals",
            stacklevel=3,
        )
    return codes.mul_(unit).to(signals.dtype)


def _descend(problem, signals, codes, max_iter, tol, callback, momentum, restart, greedy):
    """Fill `codes` (n, M), which arrive as zeros; return the gaps of the signals that are not done.

    Signals that are done drop out of the arrays; `rows` says which are left.
    """
    start, products = 0, signals @ problem.dictionary.T  # (n, M)
    if greedy and len(problem.norms) <= WIDEST:
        start = _greedy(problem, products, codes, min(greedy, max_iter), tol, callback)
    rows, known = torch.arange(len(signals), device=signals.device), problem.prepare(signals, products)
    s, t = codes.clone(), codes.new_ones(len(signals), 1)  # (n, M), (n, 1)
    y = s  # (n, M)
    for k in itertools.count(start):
        if (k - start) % CHECK == 0 or k == max_iter:
            codes[rows] = s
            gaps, floor = problem.gaps(s, *known)
            todo = gaps > floor.clamp(min=tol)  # (n,)
            if k == max_iter or not todo.any():
                return gaps[todo]
            rows, s, y, t, *known = (row[todo] for row in (rows, s, y, t, *known))
        following = problem.step(y, known[0])  # (n, M)
        if momentum:
            move = following - s  # (n, M)
            if restart:
                against = ((y - following) * move).sum(dim=1, keepdim=True) > 0  # (n, 1)
                t = torch.where(against, 1.0, t)
            faster = (1 + (1 + 4 * t.square()).sqrt()) / 2  # (n, 1)
            y, t = following + (t - 1) / faster * move, faster
        else:
            y = following
        s = following
        if callback:
            codes[rows] = s
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


def _checked(signals, dictionary, lam):
    """Signals, dictionary (float32 at least) and λ, with the unit that makes codes of theirs; or one line on a mistake.

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
    a, b = (2.0 ** (math.frexp(value.abs().max().item())[1] - 1) if value.any() else 1.0 for value in (x, d))
    return x / a, d / b, float(lam) / a / b, a / b


def finite_matrix(name, value):
    """A matrix of finite numbers, in float32 at least, or one line on what is wrong."""
    if not torch.is_tensor(value) or not value.is_floating_point() or value.dim() != 2:
        what = f"{value.dtype} {tuple(value.shape)}" if torch.is_tensor(value) else type(value).__name__
        raise UserError(f"{name}: {what} given; give a 2-dimensional tensor of floating point numbers")
    if not value.isfinite().all():
        raise UserError(f"{name}: there are NaN or infinite values among them")
    return value.detach().to(torch.promote_types(value.dtype, torch.float32))
