"""Adapters in a file: one in safetensors, or a folder in peft's layout."""

import dataclasses
import json
import re
from pathlib import Path

from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from . import peft_layout
from .attach import attached, attentions, install, sites_of, wrap
from .common import UserError, replacing

FORMAT = "1"  # of the adapter file; raise it whenever the meaning of a file changes


def save_adapter(model, path, prompt=None, *, layout="sparsecode", **notes):
    """Write the adapters in float32: to one safetensors file, or with layout="peft" to a folder that peft can load.

    The header says all that `load_adapter` needs to attach them again and to refuse another base
    model, the `prompt` they were trained on, and `notes`: whatever else is worth keeping (the seed…).
    """
    wrappers = attached(model)
    if not wrappers:
        raise UserError("no adapter is attached to this model, so there is nothing to save; attach one first")
    if layout not in ("sparsecode", "peft"):
        raise UserError(f"layout={layout!r} is unknown; choose sparsecode or peft")
    adapter = next(iter(wrappers.values())).adapter
    base = _fingerprint(model, adapter.target)
    state = _state(wrappers)
    if layout == "peft":
        if adapter.method == "sparse":
            raise UserError("peft has no sparse adapter; save it without layout='peft'")
        header = {"base": base, "notes": notes, "prompt": prompt}
        peft_layout.write(path, adapter, list(wrappers), _for_file(peft_layout.pack(state)), header)
        return
    if wrappers.keys() != set(sites_of(model, adapter.method, adapter.target)):
        raise UserError("these adapters do not cover all projections of an attention; save them with layout='peft'")
    header = {
        "format": FORMAT,
        "method": adapter.method,
        "options": json.dumps({"target": adapter.target, **adapter.options}),
        "base": json.dumps(base),
        "notes": json.dumps(notes),
    }
    if prompt is not None:
        header["prompt"] = prompt
    with replacing(path) as temporary:
        save_file(_for_file(state), temporary, metadata=header)


def read_header(path):
    """What an adapter file or a folder in peft's layout says: format, method, options, base, notes, prompt (or None).

    A folder that peft wrote has no notes, and its base is None: any model that its tensors fit.
    """
    if Path(path).is_dir():
        return _read_peft_header(Path(path))
    with _open(path) as file:
        header = file.metadata() or {}
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
    """Attach the adapters of a file, or of a folder in peft's layout, to `model` and return their header.

    Everything is checked before the model is touched: another base model, or a missing, unknown or
    misshapen tensor, is refused and leaves the model as it was.
    """
    header = read_header(path)
    in_peft_layout = header["format"] == "peft"
    options = dict(header["options"])
    if in_peft_layout:
        sites, target = _peft_sites(model, options.pop("target_modules"), path)
        path = Path(path) / peft_layout.WEIGHTS
    else:
        target = options.pop("target")
        sites = sites_of(model, header["method"], target)
    if header["base"] is not None:
        _check_base(path, header["base"], _fingerprint(model, target))
    wrappers = wrap(model, header["method"], sites, target, options)
    state = _state(wrappers)  # shares memory with the adapters
    if in_peft_layout:
        peft_layout.unpack(_read(path, peft_layout.pack(state)), state)
    else:
        for key, tensor in _read(path, state).items():
            state[key].copy_(tensor)
    install(model, wrappers)
    return header


def _read_peft_header(folder):
    method, options, target_modules = peft_layout.read_config(folder)
    with _open(folder / peft_layout.WEIGHTS) as file:
        written_here = (file.metadata() or {}).get("sparsecode", '{"base": null, "notes": {}, "prompt": null}')
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]
    if method == "oft" and shapes and shapes[0]:  # (blocks, …): peft rounds an r or oft_block_size to what divides
        options = {"blocks": shapes[0][0]}
    try:
        header = json.loads(written_here)
    except json.JSONDecodeError as error:
        raise UserError(f"{folder} has a damaged header ({error}); save or copy it again") from None
    return {"format": "peft", "method": method, "options": {"target_modules": target_modules, **options}, **header}


def _peft_sites(model, target_modules, folder):
    """The projections that peft would adapt, and a `target` for exactly their attentions."""
    sites = [site for site in sites_of(model, "lora", "") if peft_layout.is_target(target_modules, site)]
    if not sites:
        raise UserError(f"{folder}: target_modules {target_modules!r} names no projection of an attention here")
    attentions = dict.fromkeys(site.rpartition(".")[0] for site in sites)
    return sites, "|".join(f"^{re.escape(name)}$" for name in attentions)


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
    return {name: f"width {a.dim}, {a.heads} heads" for name, a in attentions(model, target).items()}


def _check_base(path, theirs, ours):
    keys = [*theirs, *(key for key in ours if key not in theirs)]
    differing = [
        f"{key} is {theirs.get(key, 'absent')} there and {ours.get(key, 'absent')} here"
        for key in keys
        if theirs.get(key, "absent") != ours.get(key, "absent")
    ]
    if differing:
        raise UserError(f"{path} was trained on another base model: {'; '.join(differing)}")


def _for_file(state):
    return {key: value.detach().float().cpu().contiguous() for key, value in state.items()}


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"there is no adapter file {path}; check the path") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); save or copy it again") from None


def _read(path, expected):
    """The tensors of a file, which must have the keys and shapes of `expected`."""
    with _open(path) as file:
        stored = set(file.keys())
        if missing := sorted(expected.keys() - stored):
            raise UserError(f"{path} lacks {_some(missing)}")
        if extra := sorted(stored - expected.keys()):
            raise UserError(f"{path} has {_some(extra)}, which the adapters on its attentions do not know")
        for key, value in expected.items():
            shape = file.get_slice(key).get_shape()
            if shape != list(value.shape):
                raise UserError(f"{path} has {key} of shape {shape} where {list(value.shape)} belongs")
        return {key: file.get_tensor(key) for key in expected}


def _some(names):
    return names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else "")
