"""Put adapters on any model's attentions by name, take them off again, and keep them in a file."""

import dataclasses
import inspect
import json
import re

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from .adapter import SparseAdapter, SparseAttention
from .attention import Attention
from .baselines import OFT, AdaptedLinear, DoRA, LoRA
from .common import UserError, replacing

METHODS = {adapter.method: adapter for adapter in (SparseAdapter, LoRA, DoRA, OFT)}
PROJECTIONS = ("to_q", "to_k", "to_v", "to_out")
FORMAT = "1"  # of the adapter file; raise it whenever the meaning of a file changes


def attach(model, method="sparse", target="attn1", **options):
    """Freeze `model` and put an adapter on each `Attention` whose dotted name matches `target`.

        "sparse"          atoms=256, density=0.02, threshold="top_k"
                          threshold="soft" | "relu" with lam;  order="before" | "after"
        "lora", "dora"    r=16, alpha=16, on each of to_q, to_k, to_v, to_out
        "oft"             blocks=4, on the same four

    `target` is a regular expression, searched for anywhere in the name. Returns the new adapters.
    """
    wrappers = _wrappers(model, method, target, options)
    _install(model, wrappers)
    return [wrapper.adapter for wrapper in wrappers.values()]


def detach(model):
    """Put the very modules back that `attach` wrapped. They stay frozen."""
    for name, wrapper in _attached(model).items():
        model.set_submodule(name, wrapper.base)


def adapters(model):
    """The attached adapters by the name of the module each is wrapped around."""
    return {name: wrapper.adapter for name, wrapper in _attached(model).items()}


def trainable(model):
    """The parameters of all adapters: a list, so that it can be gone through twice."""
    return [parameter for adapter in adapters(model).values() for parameter in adapter.parameters()]


def save_adapter(model, path, prompt=None, **notes):
    """Write the adapters to one safetensors file, in float32.

    The header says all that `load_adapter` needs to attach them again and to refuse another base
    model, the `prompt` they were trained on, and `notes`: whatever else is worth keeping (the seed…).
    """
    attached = _attached(model)
    if not attached:
        raise UserError("no adapter is attached to this model, so there is nothing to save; attach one first")
    adapter = next(iter(attached.values())).adapter
    header = {
        "format": FORMAT,
        "method": adapter.method,
        "options": json.dumps({"target": adapter.target, **adapter.options}),
        "base": json.dumps(_fingerprint(model, adapter.target)),
        "notes": json.dumps(notes),
    }
    if prompt is not None:
        header["prompt"] = prompt
    tensors = {key: value.detach().float().cpu().contiguous() for key, value in _state(attached).items()}
    with replacing(path) as temporary:
        save_file(tensors, temporary, metadata=header)


def read_header(path):
    """An adapter file's header as a dict: format, method, options, base, notes, prompt (or None)."""
    try:
        with safe_open(path, framework="pt") as file:
            header = file.metadata() or {}
    except FileNotFoundError:
        raise UserError(f"there is no adapter file {path}; check the path") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); save or copy it again") from None
    if not {"format", "method", "options", "base", "notes"} <= header.keys():
        raise UserError(f"{path} was not written by save_adapter: its header lacks the adapter's description")
    if header["format"] != FORMAT:
        raise UserError(f"{path} has format version {header['format']}, this code reads version {FORMAT}")
    try:
        parsed = {key: json.loads(header[key]) for key in ("options", "base", "notes")}
    except json.JSONDecodeError as error:
        raise UserError(f"{path} has a damaged header ({error}); save or copy it again") from None
    return {"prompt": None, **header, **parsed}


def load_adapter(model, path):
    """Attach the adapters of a file to `model` and return the file's header.

    Everything is checked before the model is touched: another base model, or a missing, unknown or
    misshapen tensor, is refused and leaves the model as it was.
    """
    header = read_header(path)
    options = dict(header["options"])
    target = options.pop("target")
    _check_base(path, header["base"], _fingerprint(model, target))
    wrappers = _wrappers(model, header["method"], target, options)
    _fill(path, _state(wrappers))
    _install(model, wrappers)
    return header


def _wrappers(model, method, target, options):
    """The wrappers that `attach` would install, by name; the model is not touched."""
    if _attached(model):
        raise UserError("adapters are attached to this model already; detach them first")
    if method not in METHODS:
        raise UserError(f"method={method!r} is unknown; choose one of {', '.join(METHODS)}")
    known = inspect.getfullargspec(METHODS[method].__init__).kwonlyargs
    if unknown := options.keys() - set(known):
        raise UserError(f"{method} has no option {', '.join(sorted(unknown))}; it has {', '.join(known)}")
    matches = _attentions(model, target)
    if not matches:
        names = ", ".join(_attentions(model)) or "none"
        raise UserError(f"no attention is named like {target!r}; the model has {names}")
    wrappers = {}
    for name, attention in matches.items():
        if method == "sparse":
            adapter = SparseAdapter(attention.to_k.in_features, attention.dim, attention.heads, **options)
            wrappers[name] = SparseAttention(attention, adapter)
        else:
            for part in PROJECTIONS:
                linear = getattr(attention, part)
                wrappers[f"{name}.{part}"] = AdaptedLinear(linear, METHODS[method](linear, **options))
    for wrapper in wrappers.values():
        wrapper.adapter.to(next(wrapper.base.parameters()).device)
        wrapper.adapter.target = target  # for save_adapter
    return wrappers


def _install(model, wrappers):
    model.requires_grad_(False)
    for name, wrapper in wrappers.items():
        model.set_submodule(name, wrapper)


def _attentions(model, target=""):
    """The attentions whose name matches, by the name they have without adapters."""
    try:
        pattern = re.compile(target)
    except re.error as error:
        raise UserError(f"target={target!r} is no regular expression ({error}); mend it") from None
    plain = {wrapper.base: name for name, wrapper in _attached(model).items()}
    found = {plain.get(m, name): m for name, m in model.named_modules() if name and isinstance(m, Attention)}
    return {name: attention for name, attention in found.items() if pattern.search(name)}


def _attached(model):
    return {name: m for name, m in model.named_modules() if isinstance(m, (SparseAttention, AdaptedLinear))}


def _state(wrappers):
    """What a file holds: every adapter's parameters and persistent buffers by full name."""
    return {
        f"{name}.{key}": value
        for name, wrapper in wrappers.items()
        for key, value in wrapper.adapter.state_dict().items()
    }


def _fingerprint(model, target):
    """What tells one base model from another: its config, or else the widths of what is adapted."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        return json.loads(json.dumps(dataclasses.asdict(config)))  # as a file gives it back
    return {name: f"width {a.dim}, {a.heads} heads" for name, a in _attentions(model, target).items()}


def _check_base(path, theirs, ours):
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    differing = [
        f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
        for key in keys
        if theirs.get(key, "absent") != ours.get(key, "absent")
    ]
    if differing:
        raise UserError(f"{path} was trained on another base model: {'; '.join(differing)}")


def _fill(path, state):
    """Copy a file's tensors into `state`, which must have the same keys and shapes."""
    with safe_open(path, framework="pt") as file:
        stored = set(file.keys())
        if missing := sorted(state.keys() - stored):
            raise UserError(f"{path} lacks {', '.join(missing)}")
        if extra := sorted(stored - state.keys()):
            raise UserError(f"{path} has {', '.join(extra)}, which the adapter does not know")
        for key, value in state.items():
            shape = file.get_slice(key).get_shape()
            if shape != list(value.shape):
                raise UserError(f"{path} has {key} of shape {shape} where {list(value.shape)} belongs")
        for key, value in state.items():
            value.copy_(file.get_tensor(key))  # state_dict's tensors share memory with the adapters
