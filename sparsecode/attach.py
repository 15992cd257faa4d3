"""Put adapters on a model's attentions by name, and take them off again."""

import inspect
import re

import torch
from torch import nn

from .adapter import SparseAdapter, SparseAttention
from .baselines import OFT, AdaptedLinear, DoRA, LoRA
from .common import UserError, is_number
from .kinds import kind_of

METHODS = {adapter.method: adapter for adapter in (SparseAdapter, LoRA, DoRA, OFT)}


def attach(model, method="sparse", target="attn1", **options):
    """Freeze `model` and put an adapter on each attention whose dotted name matches `target`.

        "sparse"          atoms=256, density=0.02, threshold="top_k"
                          threshold="soft" | "relu" with lam;  order="before" | "after"
        "lora", "dora"    r=16, alpha=16, on each of to_q, to_k, to_v, to_out
        "oft"             blocks=4, on the same four

    `target` is a regular expression, searched for anywhere in the name. For all but "sparse", a target that no
    attention matches names Linears by their own dotted names, "attn1.to_q|ff", and for LoRA and DoRA a Conv2d without
    groups. Returns the new adapters.
    """
    wrappers = wrap(model, method, dict.fromkeys(sites_of(model, method, target), options), target)
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
    """Names of the modules that `attach` wraps: attentions, the four projections of each, or Linears."""
    matches = attentions(model, target)
    if not matches and method != "sparse" and (found := linears(model, target)):
        return list(found)
    if not matches:
        kind, names = "attention" if method == "sparse" else "attention or Linear", ", ".join(attentions(model))
        raise UserError(f"no {kind} is named like {target!r}; the model has {names or 'none'}")
    for name, attention in matches.items():
        if method != "sparse" and not kind_of(attention).projections:
            raise UserError(f"{name} keeps q, k and v in one weight; {method} needs Linears, 'sparse' does not")
    if method == "sparse":
        return list(matches)
    return [f"{name}.{part}" for name, attention in matches.items() for part in kind_of(attention).projections]


def wrap(model, method, sites, target):
    """Wrappers around modules, by name; `sites` gives the options of each, {name: dict}. The model is not touched."""
    if attached(model):
        raise UserError("adapters are attached to this model already; detach them first")
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    known = inspect.getfullargspec(METHODS[method].__init__).kwonlyargs
    if unknown := {name for options in sites.values() for name in options} - set(known):
        raise UserError(f"{method} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    if torch.is_inference_mode_enabled():
        raise UserError("adapters made inside torch.inference_mode cannot be trained; attach or load them outside it")
    for name, attention in attentions(model).items():
        adapted = any(f"{site}.".startswith(f"{name}.") for site in sites)
        if adapted and (obstacle := kind_of(attention).obstacle(attention)):
            raise UserError(f"{name} cannot be taken apart: {obstacle}")
    wrappers = {}
    for site, options in sites.items():
        base = model.get_submodule(site)
        if method == "sparse":
            adapter = SparseAdapter(*kind_of(base).sizes(base), **options)
            wrappers[site] = SparseAttention(base, adapter)
        else:
            wrappers[site] = AdaptedLinear(base, METHODS[method](base, **options))
    for wrapper in wrappers.values():
        if not any(value.is_meta for value in wrapper.adapter.parameters()):  # load_adapter gives those their place
            wrapper.adapter.to(next(wrapper.base.parameters()).device)
        wrapper.adapter.target = target  # for save_adapter
    return wrappers


def set_scale(model, scale):
    """O + s ΔO from now on, for what each adapter adds to its attention or Linear: 1 as trained, 0 the base to the bit.

    For DoRA and OFT it blends the outputs of the frozen and the adapted Linear. The scale is not saved.
    """
    if not attached(model):
        raise UserError("no adapter is attached to this model; attach or load one first")
    if not is_number(scale):
        raise UserError(f"scale={scale!r} is not a number; choose one like 0.7")
    for wrapper in attached(model).values():
        wrapper.adapter.scale = float(scale)


def install(model, wrappers):
    model.requires_grad_(False)
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper)
        wrapper.together = tuple(other.adapter for other in wrappers.values())


def attentions(model, target=""):
    """The attentions whose name matches, by the name they have without adapters."""
    return named(model, kind_of, target)


def linears(model, target=""):
    """The Linears, and the Conv2ds that LoRA can adapt, whose name matches."""
    return named(model, _is_linear, target)


def _is_linear(module):
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.padding_mode == "zeros"
    inside = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention, which takes its weight away
    return isinstance(module, nn.Linear) and not isinstance(module, inside)


def named(model, fits, target):
    """The modules that fit and whose name matches, by the name they have without adapters."""
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UserError(f"target={target!r} is no regular expression ({error}); fix it") from None
    plain = {wrapper.base: name for name, wrapper in attached(model).items()}
    found = {plain.get(m, name): m for name, m in model.named_modules() if name and fits(m)}
    return {name: module for name, module in found.items() if pattern.search(name)}


def attached(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (SparseAttention, AdaptedLinear))}
