"""What an atom does downstream: the expansion of Appendix A, and the measured effect in any model (Eqs. 10–19)."""

import warnings
from contextlib import contextmanager
from math import comb

import torch
from numpy.polynomial import Polynomial
from torch.nn.attention import SDPBackend, sdpa_kernel

from .atoms import check_atoms, sparse_adapters

# ---- layers that are polynomials --------------------------------------------------------------------------------
# c (K,) holds c_1 … c_K (a constant drops out of every difference); signals x (N, C), codes s (N, M), atoms D (M, C)


def polynomial(c, x):
    """f(x) = Σ_{k=1..K} c_k x^k, element by element    (Eq. 10)"""
    y = torch.zeros_like(x)
    for c_k in c.flip(0):
        y = (y + c_k) * x
    return y


def expansion(c, x, s, D):
    """B_K(d_m) = Σ_{k=1..K} c_k Σ_{j=1..k} C(k, j) x^{k−j} (s_m d_m)^j, split by the degree j in d_m    (Eq. 18)

    Returns the K terms, (K, N, M, C). Their sum is B_K = f(x + s_m d_m) − f(x), the effect of atom m alone. The term
    j = 1 is the first-order prediction f'(x) s_m d_m.
    """
    moved = s[:, :, None] * D  # (N, M, 1) x (M, C) -> (N, M, C)
    terms = []
    for j in range(1, len(c) + 1):
        beta = sum(c[k - 1] * comb(k, j) * x ** (k - j) for k in range(j, len(c) + 1))  # (N, C)
        terms.append(beta[:, None] * moved**j)  # (N, 1, C) x (N, M, C) -> (N, M, C)
    return torch.stack(terms)  # (K, N, M, C)


def compose(outer, inner):
    """The c (K·K',) of outer(inner(x)) for c (K,) and (K',): degrees multiply, they do not add    (Eqs. 13, 19)"""
    f, g = Polynomial([0, *outer.tolist()]), Polynomial([0, *inner.tolist()])
    return torch.from_numpy(f(g).coef[1:]).to(outer)  # (K·K',)


# ---- any model with sparse adapters -----------------------------------------------------------------------------


def scale_atoms(model, atoms, factor):
    """Within this context, the coefficients S_m of some atoms are multiplied by `factor`; 0 removes the atoms.

    `atoms` is {layer: [m, …]}. UserError for a layer or an index that does not exist.
    """
    return _scaled(model, _masks(model, atoms), factor)


def only_atoms(model, atoms):
    """Within this context, all atoms except `atoms`, {layer: [m, …]}, are removed."""
    return _scaled(model, {name: ~mask for name, mask in _masks(model, atoms).items()}, 0.0)


def _masks(model, atoms):
    """{layer: bool (M,), True at the given atoms} for every layer"""
    layers = sparse_adapters(model)
    check_atoms(layers, atoms)
    masks = {name: torch.zeros_like(adapter.keep) for name, adapter in layers.items()}
    for name, indices in atoms.items():
        for m in indices:
            masks[name][m] = True
    return masks


@contextmanager
def _scaled(model, masks, factor):
    def scaler(mask):
        def hook(adapter, inputs):
            (s,) = inputs  # (B, N, M)
            return (torch.where(mask, s * factor, s),)  # (B, N, M)

        return hook

    layers = sparse_adapters(model)
    hooks = [layers[name].register_forward_pre_hook(scaler(mask)) for name, mask in masks.items() if mask.any()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@torch.no_grad()
def effect(model, forward, atoms):
    """forward() with some atoms minus forward() without them; the other atoms do not change.

    `forward` takes no arguments, runs the model and returns a tensor. Inside only_atoms(model, atoms) the result is
    B(d_m) of Eq. 11, for the real model.
    """
    present = forward()
    with scale_atoms(model, atoms, 0.0):
        return present - forward()


@torch.no_grad()
def first_order(model, forward, atoms):
    """What `effect` would be if all later layers were linear: d/dε forward() with the atoms scaled by ε, at ε = 0.

    This is the term j = 1 of Eq. 18, for the real model. It uses forward-mode differentiation, which torch.no_grad()
    inside `forward` does not turn off.
    """

    def along(epsilon):
        with scale_atoms(model, atoms, epsilon), sdpa_kernel(SDPBackend.MATH):  # fused kernels have no forward mode
            return forward()

    zero = torch.zeros((), device=next(model.parameters()).device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch's own, about its torch.jit.script
        return torch.func.jvp(along, (zero,), (torch.ones_like(zero),))[1]


@torch.no_grad()
def linearity_error(model, forward, atoms, scale=1.0):
    """‖effect − first order‖ / ‖effect‖ of some atoms scaled by `scale`, for each row of forward(), (B,)

    If the later layers are smooth, it shrinks with `scale`. It is nan for a row that the atoms do not change.
    """
    with scale_atoms(model, atoms, 0.0):
        without = forward()  # (B, …)
    with scale_atoms(model, atoms, scale):
        change = forward() - without  # (B, …)
    return _relative(change - scale * first_order(model, forward, atoms), change)  # (B,)


@torch.no_grad()
def additivity_error(model, forward, atoms):
    """‖effect of all − Σ_m effect of m alone‖ / ‖effect of all‖ for each row of forward(), (B,): 0 if Eq. 11 holds

    "Alone" means added to the base model. Atoms other than these are removed throughout.
    """
    with only_atoms(model, {}):
        base = forward()  # (B, …)
    with only_atoms(model, atoms):
        change = forward() - base  # (B, …)
    rest = change.clone()  # (B, …)
    for name, indices in atoms.items():
        for m in indices:
            with only_atoms(model, {name: [m]}):
                rest -= forward() - base  # (B, …)
    return _relative(rest, change)  # (B,)


def _relative(error, truth):
    return error.flatten(1).norm(dim=1) / truth.flatten(1).norm(dim=1)  # (B, …) -> (B,)
