"""Adapters in a file: one in safetensors, ours or diffusers', or a folder in peft's layout."""

import dataclasses
import json
import re
import warnings
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from . import peft_layout
from .attach import METHODS, attached, attentions, install, linears, loaded, modules, projections, trainable, wrap
from .common import (
    COUNT,
    NUMBER,
    OBJECT,
    TEXT,
    UserError,
    checksum,
    object_of,
    read_json,
    rename,
    replacing,
    some,
    write_tensors,
)
from .kinds import Unpacked, kind_of

FORMAT = "1"  # of the adapter file; raise it whenever the meaning of a file changes
OPTIONS = {"atoms": COUNT, "density": NUMBER, "threshold": TEXT, "lam": NUMBER, "order": TEXT}
OPTIONS |= {"r": COUNT, "alpha": NUMBER, "blocks": COUNT}
OPTIONS |= {"rank_pattern": object_of(COUNT), "alpha_pattern": object_of(NUMBER)}
FLOATS = ("F64", "F32", "F16", "BF16")  # what tensors of a file may be


def save_adapter(model, path, prompt=None, *, layout="sparsecode", **notes):
    """Write the adapters in float32: to one safetensors file, or with layout="peft" to a folder that peft can load.

    The header says all that `load_adapter` needs to attach them again and to tell base models apart, the `prompt` they
    were trained on, and `notes`: whatever else is worth keeping (the seed…). Of the atoms D only those that
    `keep_atoms` has left on are written, C_i M + ρ C_o M numbers (§3.5): the others are gone from the file. The same
    adapters give the same bytes.
    """
    attachments = attached(model)
    if not attachments:
        raise UserError("no adapter is attached to this model, so there is nothing to save; attach one first")
    if len(loaded(model)) > 1:
        raise UserError(f"{len(loaded(model))} adapters are attached, a file holds one; detach them and load that one")
    if layout not in ("sparsecode", "peft"):
        raise UserError(f"layout={layout!r} is unknown; choose sparsecode or peft")
    if prompt is not None and not TEXT.fits(prompt):
        raise UserError(f"prompt={prompt!r} is not text; give one caption")
    for name, value in notes.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError):
            kind = type(value).__name__
            raise UserError(f"the note {name}, a {kind}, cannot be saved; give text or a finite number") from None
    adapter = next(iter(attachments.values())).adapter
    base, weights = _base(model, _owners(model, attachments)), weights_checksums(model)
    names = _names_in_files(model, attachments, in_peft_layout=layout == "peft")
    wrappers = {names[site]: wrapper for site, wrapper in attachments.items()}
    options, state = {name: wrapper.adapter.options for name, wrapper in wrappers.items()}, _state(wrappers)
    if layout == "peft":
        if adapter.method == "sparse":
            raise UserError("peft has no sparse adapter; save it without layout='peft'")
        if any(isinstance(module, Unpacked) for module in model.modules()):
            raise UserError("peft adapts nn.MultiheadAttention in a way of its own; save it without layout='peft'")
        header = {"base": base, "weights": weights, "notes": notes, "prompt": prompt}
        tensors = _for_file(peft_layout.pack(state, peft_layout.PREFIXES[0]))
        peft_layout.write(path, adapter.method, options, tensors, header)
        return
    header = {
        "format": FORMAT,
        "method": adapter.method,
        "adapters": str(len(wrappers)),
        "options": json.dumps({"target": adapter.target, **peft_layout.gather(options)}),
        "base": json.dumps(base),
        "weights": json.dumps(weights),
        "notes": json.dumps(notes, allow_nan=False),
    }
    if prompt is not None:
        header["prompt"] = prompt
    with replacing(path) as temporary:
        write_tensors(temporary, _for_file(_without_dropped(state, wrappers)), header)


def read_header(path):
    """What an adapter file, a folder in peft's layout or a file of LoRA that diffusers wrote says.

    format, method, options, base, weights, notes, prompt. What peft or diffusers wrote has no notes, and its base is
    None: any model that its tensors fit. Weights may be None, and prompt.
    """
    if Path(path).is_dir():
        return _read_peft_header(Path(path))
    with _open(path) as file:
        header = file.metadata() or {}
        if any(key.endswith(peft_layout.NAMES["A"]) for key in file.keys()):
            return _foreign("diffusers", *peft_layout.read_file_of_diffusers(file, path))
    if not {"format", "method", "options", "base", "notes"} <= header.keys():
        raise UserError(f"{path} was not written by save_adapter: its header lacks the adapter's description")
    if header["format"] != FORMAT:
        raise UserError(f"{path} has format version {header['format']}, this code reads version {FORMAT}")
    if header["method"] not in METHODS:
        raise UserError(f"{path}: method={header['method']!r} is unknown; choose one of {', '.join(METHODS)}")
    parsed = {key: read_json(header[key], where=f"{path}: {key}") for key in ("base", "notes")}
    parsed["options"] = read_json(header["options"], {"target": TEXT}, OPTIONS, f"{path}: options")
    weights = read_json(header["weights"], where=f"{path}: weights") if "weights" in header else None
    return {"prompt": None, **header, **parsed, "weights": weights}


def load_adapter(model, path):
    """Attach the adapters of what `read_header` can read to `model` and return that header.

    Everything is checked before the model is touched: another base model, or a missing, unknown or misshapen tensor,
    is refused and leaves the model as it was. Other weights of the same base are a warning. Which modules are adapted
    is told by the names of the tensors; the header's own pattern is not run.
    """
    modules(model)  # refuses a pipeline
    header = read_header(path)
    options = dict(header["options"])
    if header["base"] is not None:
        _check_base(path, header["base"], _base(model, header["base"]))
    file = Path(path) / peft_layout.WEIGHTS if header["format"] == "peft" else path
    with _open(file) as stored:
        keys = set(stored.keys())
        prefix = peft_layout.prefix_of(keys) if header["format"] in ("peft", "diffusers") else None
        sites = attentions(model)
        if header["method"] != "sparse":
            sites = dict.fromkeys([*projections(sites), *linears(model)])
        names = _names_in_files(model, sites, in_peft_layout=prefix is not None)
        if prefix is None:
            named = {key.rpartition(".")[0] for key in keys}
        else:
            named = peft_layout.targets(names.values(), options.pop("target_modules"), keys, prefix)
        names = {site: name for site, name in names.items() if name in named}
        if not names:
            raise UserError(f"{file} has {some(sorted(keys) or ['nothing'])}, which is for no layer of this model")
        if header.get("adapters", str(len(names))) != str(len(names)):  # files of the past do not say how many
            raise UserError(f"{file} says adapters={header['adapters']}, but has tensors for {len(names)} of them here")
        target = options.pop("target", "|".join(f"^{re.escape(site)}$" for site in names))  # for the next file, not run
        options = peft_layout.spread(options, names.values())
        with torch.device("meta"):  # no memory until the file has shown that it holds as much
            wrappers = wrap(model, header["method"], {site: options[name] for site, name in names.items()}, target)
        by_name = {names[site]: wrapper for site, wrapper in wrappers.items()}
        state = _state(by_name)
        expected = state if prefix is None else peft_layout.pack(state, prefix)
        shapes = {key: list(value.shape) for key, value in expected.items()}
        if header["format"] == "diffusers" and peft_layout.IN_HEADER not in (stored.metadata() or {}):
            alphas = [key for key in keys if key.endswith(peft_layout.ALPHA)]  # in the header's options already
            shapes |= {key: stored.get_slice(key).get_shape() for key in alphas}
        for name in by_name:
            if f"{name}.keep" in keys and f"{name}.D" in shapes:
                shapes[f"{name}.keep"] = shapes[f"{name}.usage"]
                shapes[f"{name}.D"][0] = int(stored.get_tensor(f"{name}.keep").count_nonzero())
        tensors = _read(file, stored, shapes)
    _fill(by_name, tensors, prefix)
    install(model, wrappers)
    if header["weights"] is not None:
        _compare_weights(path, header["weights"], weights_checksums(model))
    return header


def weights_checksums(model):
    """What tells weights of one config apart: a checksum for each part of the model, {"blocks.0": "1f3a…", …}

    It takes 64 numbers of each parameter, rounded to bfloat16, so that a float32 and a bfloat16 load of one file agree.
    Adapters are left out.
    """
    ours = {id(value) for value in trainable(model)}
    parts = {}
    for name, value in model.named_parameters():
        if id(value) not in ours:
            part = ".".join([word for word in name.split(".") if word != "base"][:2])  # as without adapters
            parts.setdefault(part, []).append(value)
    return {part: checksum(*_sorted(values), dtype=torch.bfloat16) for part, values in parts.items()}


def _sorted(values):
    """In an order that does not depend on how a library names and orders them."""
    return sorted(values, key=lambda value: (tuple(value.shape), checksum(value, dtype=torch.bfloat16)))


def _read_peft_header(folder):
    method, options = peft_layout.read_config(folder)
    with _open(folder / peft_layout.WEIGHTS) as file:
        written_here = (file.metadata() or {}).get("sparsecode", "{}")
        shapes = [file.get_slice(key).get_shape() for key in file.keys()]
    if method == "oft" and shapes and shapes[0]:  # (blocks, …): peft rounds an r or oft_block_size to what divides
        options["blocks"] = shapes[0][0]
    fields = {"base": OBJECT, "weights": object_of(TEXT), "notes": OBJECT, "prompt": TEXT}
    header = read_json(written_here, {}, fields, f"{folder}: header")
    header = {name: header.get(name) for name in fields if header.get(name) is not None}
    return {**_foreign("peft", method, options), **header}


def _foreign(layout, method, options):
    """A header of what others wrote."""
    return {"format": layout, "method": method, "options": options, "base": None, "weights": None, "notes": {},
            "prompt": None}  # fmt: skip


def _owners(model, sites):
    """Names of the attentions that are adapted, or whose projections are, and of other Linears."""
    known = attentions(model)
    owners = {site: site.removesuffix(".0").rpartition(".")[0] for site in sites}
    return list(dict.fromkeys(owner if owner in known else site for site, owner in owners.items()))


def _names_in_files(model, sites, in_peft_layout):
    """{module: its name in a file}: diffusers', if the model has a table of them. In our own files to_out has no .0."""
    names = {site: rename(f"{site}.", getattr(model, "diffusers_names", [])).removesuffix(".") for site in sites}
    if in_peft_layout:
        return names
    return {s: name.removesuffix(".0") if name.endswith(".to_out.0") else name for s, name in names.items()}


def _state(wrappers):
    """Every adapter's parameters and persistent buffers by full name, sharing memory with it."""
    return {
        f"{name}.{key}": value
        for name, wrapper in wrappers.items()
        for key, value in wrapper.adapter.state_dict().items()
    }


def _without_dropped(state, wrappers):
    """What a file holds of `state`: of D the rows that are kept, and of `usage` what is not out of date."""
    state = dict(state)
    for name, wrapper in wrappers.items():
        adapter = wrapper.adapter
        if adapter.method == "sparse" and not adapter.keep.all():
            state[f"{name}.keep"], state[f"{name}.D"] = adapter.keep, adapter.D[adapter.keep]
        if adapter.method == "sparse" and adapter.measured_with not in (None, adapter.usage_depends_on()):
            state[f"{name}.usage"] = torch.zeros_like(adapter.usage)
    return state


@torch.no_grad()
def _fill(wrappers, tensors, prefix):
    """Give adapters without memory theirs, and the numbers of a file: of peft's keys with a prefix, or ours (None)."""
    for wrapper in wrappers.values():
        wrapper.adapter.to_empty(device=next(wrapper.base.parameters()).device)
    if prefix is not None:
        peft_layout.unpack(tensors, _state(wrappers), prefix)
        return
    for name, wrapper in wrappers.items():
        adapter = wrapper.adapter
        if adapter.method == "sparse":
            adapter.keep.copy_(tensors.pop(f"{name}.keep", torch.tensor(True)))
            rows = tensors.pop(f"{name}.D").to(adapter.D.device)
            adapter.D.zero_()[adapter.keep] = rows
    state = _state(wrappers)
    for key, tensor in tensors.items():
        state[key].copy_(tensor)
    for adapter in (wrapper.adapter for wrapper in wrappers.values() if wrapper.adapter.method == "sparse"):
        adapter.measured_with = adapter.usage_depends_on()


def _base(model, names):
    """What tells one base model from another: its config, or else the widths of what is adapted."""
    config = getattr(model, "config", None)
    if dataclasses.is_dataclass(config):
        return json.loads(json.dumps(dataclasses.asdict(config)))  # as a file gives it back
    if isinstance(config, Mapping):  # diffusers' models have one
        return {key: value for key, value in config.items() if isinstance(value, (str, int, float)) and key[0] != "_"}
    found = {**attentions(model), **linears(model)}
    return {name: _size(found[name]) for name in names if name in found}


def _size(module):
    if not kind_of(module):
        return f"a weight of {list(module.weight.shape)}"
    _, width, heads = kind_of(module).sizes(module)
    return f"width {width}, {heads} heads"


def _check_base(path, theirs, ours):
    shared = [key for key in theirs if key in ours]  # a config of diffusers' says more than ours
    differing = [f"{key} is {theirs[key]} there and {ours[key]} here" for key in shared if theirs[key] != ours[key]]
    if differing or not shared:
        raise UserError(f"{path} was trained on another base model: {'; '.join(differing) or 'no config is like it'}")


def _compare_weights(path, theirs, ours):
    if differing := [part for part in theirs if part in ours and theirs[part] != ours[part]]:
        warnings.warn(f"{path} was trained on other weights of this model: {some(differing)} differ", stacklevel=3)


def _for_file(state):
    """On the CPU and in float32, but for what says yes or no."""
    moved = {key: value.detach().cpu().contiguous() for key, value in state.items()}
    return {key: value if value.dtype == torch.bool else value.float() for key, value in moved.items()}


def _open(path):
    try:
        return safe_open(path, framework="pt")
    except FileNotFoundError:
        raise UserError(f"there is no adapter file {path}; check the path") from None
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors ({error}); save or copy it again") from None


def _read(path, file, shapes):
    """The tensors of an open file, which must have these keys and shapes, and finite numbers."""
    stored = set(file.keys())
    if missing := sorted(shapes.keys() - stored):
        raise UserError(f"{path} lacks {some(missing)}")
    if extra := sorted(stored - shapes.keys()):
        raise UserError(f"{path} has {some(extra)}, which the adapters on its layers do not know")
    for key, shape in shapes.items():
        found = file.get_slice(key)
        if found.get_shape() != shape:
            raise UserError(f"{path} has {key} of shape {found.get_shape()} where {shape} belongs")
        if found.get_dtype() not in (("BOOL",) if key.endswith(".keep") else FLOATS):
            raise UserError(f"{path} has {key} in {found.get_dtype()}; expected floating point numbers")
    tensors = {key: file.get_tensor(key) for key in shapes}
    for key, tensor in tensors.items():
        if not tensor.float().isfinite().all():
            raise UserError(f"{path} has NaN or infinite values in {key}; save or copy it again")
    return tensors
