"""Put adapters on a model's attentions by name, and take them off again."""

import inspect
import re

import torch

from .adapter import SparseAdapter, SparseAttention
from .attention import Attention
from .baselines import OFT, AdaptedLinear, DoRA, LoRA
from .common import UserError

METHODS = {adapter.method: adapter for adapter in (SparseAdapter, LoRA, DoRA, OFT)}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")


def attach(model, method="sparse", target="attn1", **options):
    """Freeze `model` and put an adapter on each `Attention` whose dotted name matches `target`.

        "sparse"          atoms=256, density=0.02, threshold="top_k"
                          threshold="soft" | "relu" with lam;  order="before" | "after"
        "lora", "dora"    r=16, alpha=16, on each of to_q, to_k, to_v, to_out
        "oft"             blocks=4, on the same four

    `target` is a regular expression, searched for anywhere in the name. Returns the new adapters.
    """
    wrappers = wrap(model, method, sites_of(model, method, target), target, options)
    install(model, wrappers)
    return [wrapper.adapter for wrapper in wrappers.values()]


def detach(model):
    """Put the very modules back that `attach` wrapped. They stay frozen."""
    for name, wrapper in attached(model).items():
        model.set_submodule(name, wrapper.base)


def adapters(model):
    """The attached adapters by the name of the module each is wrapped around."""
    return {name: wrapper.adapter for name, wrapper in attached(model).items()}


def trainable(model):
    """The parameters of all adapters: a list, so that it can be gone through twice."""
    return [parameter for adapter in adapters(model).values() for parameter in adapter.parameters()]


def sites_of(model, method, target):
    """Names of the modules that `attach` wraps: attentions, or the four projections of each."""
    matches = attentions(model, target)
    if not matches:
        names = ", ".join(attentions(model)) or "none"
        raise UserError(f"no attention is named like {target!r}; the model has {names}")
    return list(matches) if method == "sparse" else [f"{name}.{part}" for name in matches for part in PROJECTIONS]


def wrap(model, method, sites, target, options):
    """Wrappers around the modules named `sites`, by name; the model is not touched."""
    if attached(model):
        raise UserError("adapters are attached to this model already; detach them first")
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    known = inspect.getfullargspec(METHODS[method].__init__).kwonlyargs
    if unknown := options.keys() - set(known):
        raise UserError(f"{method} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if torch.is_inference_mode_enabled():
        raise UserError("adapters made inside torch.inference_mode cannot be trained; attach or load them outside it")
    wrappers = {}
    for site in sites:
        base = model.get_submodule(site)
        if method == "sparse":
            adapter = SparseAdapter(base.to_k.in_features, base.dim, base.heads, **options)
            wrappers[site] = SparseAttention(base, adapter)
        else:
            wrappers[site] = AdaptedLinear(base, METHODS[method](base, **options))
    for wrapper in wrappers.values():
        if not any(value.is_meta for value in wrapper.adapter.parameters()):  # load_adapter gives those their place
            wrapper.adapter.to(next(wrapper.base.parameters()).device)
        wrapper.adapter.target = target  # for save_adapter
    return wrappers


def install(model, wrappers):
    model.requires_grad_(False)
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper)


def attentions(model, target=""):
    """The attentions whose name matches, by the name they have without adapters."""
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UserError(f"target={target!r} is no regular expression ({error}); fix it") from None
    plain = {wrapper.base: name for name, wrapper in attached(model).items()}
    found = {plain.get(m, name): m for name, m in model.named_modules() if name and isinstance(m, Attention)}
    return {name: attention for name, attention in found.items() if pattern.search(name)}


def attached(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (SparseAttention, AdaptedLinear))}
