"""Which atoms matter, and two settings that need no retraining: how many atoms, and the density (§3.3, §4.1–4.2)."""

from contextlib import contextmanager

import torch
import torch.nn.functional as F

from .adapter import SparseAdapter
from .attach import adapters, loaded
from .common import UserError, is_whole


def set_density(model, rho):
    """Let top-k keep max(1, round(ρ M)) coefficients of each token from now on (Fig. 6).

    The usage of the atoms was measured at the old density: record it again before you rank them. UserError unless
    0 < rho <= 1 and all adapters use top_k.
    """
    for adapter in sparse_adapters(model).values():
        if adapter.threshold != "top_k":
            raise UserError(f"only top_k has a density to set; the threshold here is {adapter.threshold!r}")
        adapter.set_density(rho)


@contextmanager
def record_usage(model):
    """Within this context, measure usage_m = mean |S_m| over all tokens that pass through the model.

    Around a few generations, the mean is over their tokens, timesteps and prompts. If the model is not called, the
    usage does not change.
    """
    tally = {}

    def add(adapter, inputs, output):
        size = inputs[0].detach().float().abs().flatten(0, -2)  # (B, N, M) -> (B*N, M)
        total, tokens = tally.get(adapter, (0, 0))
        tally[adapter] = total + size.sum(0), tokens + len(size)  # (M,), number of tokens

    hooks = [adapter.register_forward_hook(add) for adapter in sparse_adapters(model).values()]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
    for adapter, (total, tokens) in tally.items():
        adapter.usage.copy_(total / tokens)  # (M,)
        adapter.measured_with = adapter.usage_depends_on()


@torch.no_grad()
def importance(model):
    """{layer: usage_m · ‖D_m‖ of each atom, (M,)}: how far an atom moves a token on average.

    The factor ‖D_m‖ makes atoms of different norms comparable. UserError if the usage was not measured, or was measured
    before the density or W_s changed.
    """
    layers = sparse_adapters(model)
    measured = any(adapter.usage.any() for adapter in layers.values())
    if not measured and any(adapter.D.any() for adapter in layers.values()):
        raise UserError("the usage of these atoms was never measured; run the model inside record_usage(model)")
    if any(adapter.measured_with not in (None, adapter.usage_depends_on()) for adapter in layers.values()):
        raise UserError(
            "the usage of these atoms was measured before their density or W_s changed; "
            "run the model inside record_usage(model) again"
        )
    return {name: adapter.usage * adapter.D.norm(dim=1) for name, adapter in layers.items()}  # (M,) each


@torch.no_grad()
def top_atoms(model, n):
    """The n most important atoms of the whole model, most important first: a list of (layer, m, importance)."""
    scores = importance(model)
    atoms = [(name, m) for name, score in scores.items() for m in range(len(score))]
    if not is_whole(n) or not 1 <= n <= len(atoms):
        raise UserError(f"cannot name the top {n!r} atoms; choose a number from 1 to {len(atoms)}")
    best = torch.cat([score.cpu() for score in scores.values()]).topk(n)  # (all atoms,) -> (n,)
    return [(*atoms[i], value) for i, value in zip(best.indices.tolist(), best.values.tolist())]


@contextmanager
def record_maps(model, atoms):
    """Within this context, record S_m of some atoms for each token, at each call of the model.

    `atoms` is {layer: [m, …]}. Yields {layer: list of one tensor (B, N, len(atoms[layer])) per call}, on the CPU.
    UserError for a layer or an index that does not exist.
    """
    layers, maps = sparse_adapters(model), {name: [] for name in atoms}
    check_atoms(layers, atoms)

    def collector(name):
        def collect(adapter, inputs, output):
            maps[name].append(inputs[0][..., atoms[name]].detach().float().cpu())  # (B, N, M) -> (B, N, atoms)

        return collect

    hooks = [layers[name].register_forward_hook(collector(name)) for name in atoms]
    try:
        yield maps
    finally:
        for hook in hooks:
            hook.remove()


def check_atoms(layers, atoms):
    """UserError unless all `atoms`, {layer: [m, …]}, exist in these layers."""
    for name, indices in atoms.items():
        if name not in layers:
            raise UserError(f"no layer {name!r} has atoms; choose from {', '.join(layers)}")
        for m in indices:
            if not 0 <= m < layers[name].atoms:
                raise UserError(f"{name} has no atom {m}; it has 0 to {layers[name].atoms - 1}")


def keep_atoms(model, n):
    """Keep the n most important atoms of the whole model and switch the others off (Fig. 3).

    None or "all" keeps every atom; 0 gives the base model, to the bit. UserError for any other n that is not from 0 to
    the number of atoms, or if `importance` raises one.
    """
    layers = sparse_adapters(model)
    total = sum(adapter.atoms for adapter in layers.values())
    n = total if n is None or isinstance(n, str) and n == "all" else n
    if not is_whole(n) or not 0 <= n <= total:
        raise UserError(f"cannot keep {n!r} atoms; choose a number from 0 to {total}, or 'all'")
    kept = torch.zeros(total, dtype=torch.bool)  # (all atoms,)
    if n == total:
        kept[:] = True
    elif n > 0:
        scores = torch.cat([score.cpu() for score in importance(model).values()])  # (all atoms,)
        kept[scores.topk(n).indices] = True
    sizes = [adapter.atoms for adapter in layers.values()]
    for adapter, part in zip(layers.values(), kept.split(sizes)):
        adapter.keep.copy_(part)  # (M,)


def orthogonality(model):
    """Mean cos²(D_i, D_j) over pairs of different atoms, averaged over layers: a training penalty (Appendix A)

    The paper asks for "a simple regularization term" without a formula. This is the usual ‖D̂ D̂ᵀ − I‖² / (M (M − 1)).
    The atoms of D̂ have unit norm, so the penalty does not shrink D. Returns a scalar tensor: 0 for orthogonal atoms,
    and for M > C never below (M − C) / (C (M − 1)), the Welch bound.
    """
    values = []
    for adapter in sparse_adapters(model).values():
        unit = F.normalize(adapter.D, dim=1)  # (M, C)
        cosines = (unit @ unit.T).fill_diagonal_(0)  # (M, C) x (C, M) -> (M, M)
        values.append(cosines.square().sum() / max(1, adapter.atoms * (adapter.atoms - 1)))
    return torch.stack(values).mean()


def sparse_adapters(model):
    """{layer: attached adapter}; UserError if there is none, or if one is not of the sparse method."""
    layers = adapters(model)
    if not layers:
        raise UserError("no adapter is attached to this model; attach or load one first")
    if len(loaded(model)) > 1:
        raise UserError(
            f"{len(loaded(model))} adapters are attached; detach them and load the one whose atoms are meant"
        )
    if not all(isinstance(adapter, SparseAdapter) for adapter in layers.values()):
        raise UserError("atoms exist only for the sparse method; this model has another adapter")
    return layers
