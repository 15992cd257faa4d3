"""Put adapters on a model's attentions by name, and take them off again."""

import inspect
import re

import torch
from torch import nn

from .adapter import SparseAdapter, SparseAttention
from .baselines import OFT, AdaptedLinear, DoRA, LoRA
from .common import UserError, is_number
from .kinds import Unpacked, Wrapper, kind_of

WRAPPERS = (SparseAttention, AdaptedLinear)
METHODS = {adapter.method: adapter for adapter in (SparseAdapter, LoRA, DoRA, OFT)}


def attach(model, method="sparse", target="attn1", **options):
    """Freeze `model` and put an adapter on each attention whose dotted name matches `target`.

        "sparse"          atoms=256, density=0.02, threshold="top_k"
                          threshold="soft" | "relu" with lam;  order="before" | "after"
        "lora", "dora"    r=16, alpha=16, on each of the projections for q, k, v and the output
        "oft"             blocks=4, on the same four

    `target` is a regular expression, searched for anywhere in the name. For all but "sparse", a target that no
    attention matches names Linears by their own dotted names, "attn1.to_q|ff", and for LoRA and DoRA a Conv2d without
    groups or dilation. Returns the new adapters.
    """
    if attached(model):
        raise UserError(
            "adapters are attached to this model already; detach them first, since one is trained at a time"
        )
    wrappers = wrap(model, method, dict.fromkeys(sites_of(model, method, target), options), target)
    install(model, wrappers)
    return [wrapper.adapter for wrapper in wrappers.values()]


def detach(model):
    """Put the very modules back that `attach` wrapped. They stay frozen."""
    for name, module in reversed(inserted(model).items()):  # one inside another comes first
        model.set_submodule(name, module.base)


def adapters(model):
    """The attached adapters by the name of the module each is wrapped around: of several "name", "name#2", …"""
    found, ours = {}, inserted(model)
    for name, wrapper in attached(model).items():
        name = plain(name, ours)
        found |= {name: wrapper.adapter, **{f"{name}#{i}": more for i, more in enumerate(wrapper.more, 2)}}
    return found


def loaded(model):
    """The adapters that each call of `attach` or `load_adapter` brought, a list of lists, the first call first."""
    return next((wrapper.together for wrapper in attached(model).values()), [])


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
    return list(matches) if method == "sparse" else projections(matches)


def projections(attentions):
    return [f"{name}.{part}" for name, attention in attentions.items() for part in kind_of(attention).projections]


def wrap(model, method, sites, target):
    """Wrappers around modules, by name; `sites` gives the options of each, {name: dict}. The model is not touched."""
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
        parent, _, name = site.rpartition(".")
        holder = unwrapped(model.get_submodule(parent))
        base = unwrapped(getattr(Unpacked(holder) if isinstance(holder, nn.MultiheadAttention) else holder, name))
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

    For DoRA and OFT it blends the outputs of the frozen and the adapted Linear. The scale is not saved. With several
    adapters, O + s₁ ΔO₁ + s₂ ΔO₂ + …, one number holds for all; a list has one for each, in the order of loading.
    """
    if not attached(model):
        raise UserError("no adapter is attached to this model; attach or load one first")
    groups, scales = loaded(model), list(scale) if isinstance(scale, (list, tuple)) else [scale]
    if len(scales) not in (1, len(groups)):
        raise UserError(f"there are {len(scales)} scales for {len(groups)} adapters; give one for all, or one for each")
    for value in scales:
        if not is_number(value):
            raise UserError(f"scale={value!r} is not a number; choose one like 0.7")
    for group, value in zip(groups, scales * len(groups)):
        for adapter in group:
            adapter.scale = float(value)


def install(model, wrappers):
    """Put wrappers in their places; where one is already, it takes the new adapter in."""
    groups = [*loaded(model), [wrapper.adapter for wrapper in wrappers.values()]]
    if len(groups) == 1:
        model.requires_grad_(False)
    for site, wrapper in wrappers.items():
        parent, _, name = site.rpartition(".")
        outer = model.get_submodule(parent)
        holder = unwrapped(outer)
        if isinstance(holder, nn.MultiheadAttention):
            holder = Unpacked(holder)
            model.set_submodule(parent if outer is holder.base else f"{parent}.base", holder)
        present = getattr(holder, name)
        if isinstance(present, type(wrapper)):
            present.more.append(wrapper.adapter)
        else:
            setattr(holder, name, wrapper)
    for wrapper in attached(model).values():
        wrapper.together = groups


def attentions(model, target=""):
    """The attentions whose name matches, by the name they have without adapters."""
    return named(model, kind_of, target)


def linears(model, target=""):
    """The Linears, and the Conv2ds that LoRA can adapt, whose name matches."""
    return named(model, _is_linear, target)


def _is_linear(module):
    if isinstance(module, nn.Conv2d):
        return module.groups == 1 and module.dilation == (1, 1) and module.padding_mode == "zeros"
    inside = nn.modules.linear.NonDynamicallyQuantizableLinear  # of nn.MultiheadAttention, which takes its weight away
    return isinstance(module, nn.Linear) and not isinstance(module, inside)


def named(model, fits, target):
    """The modules that fit and whose name matches, by the name they have without adapters."""
    if not isinstance(target, str):
        raise UserError(f"target={target!r} is not text; give a regular expression, like 'attn1|attn2'")
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UserError(f"target={target!r} is no regular expression ({error}); fix it") from None
    ours = inserted(model)
    found = {plain(name, ours): m for name, m in modules(model) if name and fits(m)}
    return {name: module for name, module in found.items() if pattern.search(name)}


def attached(model):
    return {name: m for name, m in modules(model) if isinstance(m, WRAPPERS)}


def inserted(model):
    return {name: m for name, m in modules(model) if isinstance(m, Wrapper)}


def modules(model):
    """`model.named_modules()`; UserError for a pipeline in place of its model."""
    if not isinstance(model, nn.Module):
        raise UserError(f"{type(model).__name__} is not an nn.Module; give the model itself, like pipe.transformer")
    return model.named_modules()


def unwrapped(module):
    return module.base if isinstance(module, WRAPPERS) else module


def plain(name, ours):
    """The name that a module has without adapters, from the one it has with them; `ours` are the `inserted`."""
    for outer in reversed(ours):  # a wrapper inside another comes first
        if f"{name}.".startswith(f"{outer}.base."):
            name = outer + name.removeprefix(f"{outer}.base")
    return name
