"""peft's layout for LoRA, DoRA and OFT: a folder with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained` loads what is written here onto a model of diffusers, and what peft writes is read; so is
the one file of LoRA that diffusers writes, with or without peft's config in its header. The names are those of
diffusers' modules. Settings of peft's that change what an adapter computes, and that LoRA, DoRA and OFT here do not
have, are refused by name.
"""

import json
import re
from collections import Counter
from pathlib import Path

import torch

from .common import (
    COUNT,
    FLAG,
    NUMBER,
    TEXT,
    Kind,
    UserError,
    check_fields,
    is_whole,
    list_of,
    object_of,
    read_json,
    replacing,
    write_tensors,
)

WHOLE = Kind("a whole number of 0 or more", lambda v: is_whole(v) and 0 <= v < 2**31)
NAMED = list_of(TEXT)
TARGETS = Kind("text, or a list of text", lambda v: TEXT.fits(v) or NAMED.fits(v))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIXES = ("base_model.model.", "transformer.", "")  # of every name: peft's, then diffusers' of a pipeline, of a model
ALPHA = ".alpha"  # of a layer, in diffusers' file
IN_HEADER = "lora_adapter_metadata"  # peft's config in the header of diffusers' file
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "P": "oft_R.weight"}
DEFAULTS = {"LORA": {"r": 8, "lora_alpha": 8, "use_dora": False}, "OFT": {"use_cayley_neumann": True}}  # peft's own
# What the output of a trained adapter does not depend on, or what is read elsewhere. All other settings must be off.
PATTERNS = {"r": "rank_pattern", "alpha": "alpha_pattern"}  # where layers differ: {regular expression: value}
HARMLESS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
            "inference_mode", "runtime_config", "target_modules", "r", "lora_alpha", "use_dora", "lora_dropout",
            "init_weights", "megatron_core", "qalora_group_size", "oft_block_size", "module_dropout", "eps",
            "num_cayley_neumann_terms"}  # fmt: skip


def prefix_of(keys):
    return next(prefix for prefix in PREFIXES if all(key.startswith(prefix) for key in keys))


def targets(names, target_modules, keys, prefix):
    """The layers among `names` that peft adapts: by target_modules, a list of endings, or else by the tensors' keys.

    target_modules may also be a regular expression. It comes with the file and can take forever, so it is not run.
    """
    if isinstance(target_modules, list):
        return {name for name in names if any(f".{name}".endswith(f".{ending}") for ending in target_modules)}
    return {name for name in names if any(f"{prefix}{name}.{end}" in keys for end in NAMES.values())}


# ---- options ----------------------------------------------------------------------------------------------------


def gather(options):
    """{layer: options} -> the commonest r and alpha, and the layers that differ in rank_pattern and alpha_pattern."""
    gathered = dict(next(iter(options.values())))
    for key in PATTERNS.keys() & gathered.keys():
        values = {name: each[key] for name, each in options.items()}
        gathered[key] = Counter(values.values()).most_common(1)[0][0]
        if others := {f"^{re.escape(name)}": value for name, value in values.items() if value != gathered[key]}:
            gathered[PATTERNS[key]] = others
    return gathered


def spread(gathered, names):
    """The reverse of `gather`: {layer: options} for these names. use_rslora makes of α/r an α/√r, so α grows by √r."""
    plain = {key: value for key, value in gathered.items() if key not in (*PATTERNS.values(), "use_rslora")}
    options = {name: dict(plain) for name in names}
    for key, pattern in PATTERNS.items():
        for expression, value in reversed(gathered.get(pattern, {}).items()):  # the first that fits counts
            fits = _compile(pattern, expression).match
            for name in filter(fits, names):
                options[name][key] = value
    if gathered.get("use_rslora"):
        for each in options.values():
            each["alpha"] *= each["r"] ** 0.5
    return options


def _compile(pattern, expression):
    """As peft reads a key of rank_pattern: it fits a name or what follows a dot in it. What takes long is refused."""
    repeats, choices = re.findall(r"[*+{]", expression), re.findall(r"\(|(?<!\()\?", expression)
    if re.search(r"\)[*+{]", expression) or len(repeats) > 3 or len(choices) > 4:
        raise UserError(f"{pattern} has {expression!r}, which may take too long to search for; write the names out")
    try:
        return re.compile(rf"(.*\.)?({expression})$")
    except (re.error, OverflowError) as error:
        raise UserError(f"{pattern} has {expression!r}, no regular expression ({error}); fix it") from None


# ---- tensors ----------------------------------------------------------------------------------------------------


def pack(state, prefix):
    """Our tensors by name, "blocks.0.attn1.to_q.A", -> peft's by key, "base_model.model.blocks.0.attn1.to_q.lora_A…".

    Of OFT's P peft keeps the part above the diagonal of the skew-symmetric Q: at PixArt's size 18.51M numbers. On a
    Conv2d its B is a convolution too.
    """
    packed = {}
    for name, value in state.items():
        layer, _, parameter = name.rpartition(".")
        if parameter == "P":
            value = _upper(value)
        elif state[f"{layer}.A"].ndim == 4 and parameter != "A":
            value = (value if parameter == "B" else value[None])[..., None, None]  # (C_o, r, 1, 1), (1, C_o, 1, 1)
        packed[_key(name, prefix)] = value
    return packed


def unpack(tensors, state, prefix):
    """Copy peft's tensors into ours: P becomes Q itself, the only part of it that R depends on."""
    for name, value in state.items():
        tensor = tensors[_key(name, prefix)]
        value.copy_(_skew(tensor, value.shape[-1]) if name.endswith(".P") else tensor.view_as(value))


def _key(name, prefix):
    layer, _, parameter = name.rpartition(".")
    return f"{prefix}{layer}.{NAMES[parameter]}"


def _upper(P):
    rows, columns = torch.triu_indices(P.shape[-1], P.shape[-1], 1)
    return ((P - P.transpose(1, 2)) / 2)[:, rows, columns]  # (blocks, b, b) -> (blocks, b (b - 1) / 2)


def _skew(upper, width):
    rows, columns = torch.triu_indices(width, width, 1)
    q = upper.new_zeros(len(upper), width, width)  # (blocks, b, b)
    q[:, rows, columns] = upper  # (blocks, b (b - 1) / 2) -> (blocks, b, b)
    return q - q.transpose(1, 2)  # (blocks, b, b)


# ---- the two files ----------------------------------------------------------------------------------------------


def write(folder, method, options, tensors, header):
    """Both files; what peft's layout has no place for, `header`, goes into the metadata of the tensors.

    `options` are those of each layer by its name.
    """
    config = gather(options)
    if method == "oft":
        config = {"peft_type": "OFT", "r": config["blocks"], "oft_block_size": 0, "use_cayley_neumann": False}
    else:
        config |= {"peft_type": "LORA", "lora_alpha": config.pop("alpha"), "use_dora": method == "dora"}
    config |= {"target_modules": list(options), "bias": "none", "inference_mode": True}
    text = json.dumps(config, indent=2) + "\n"
    with replacing(Path(folder) / CONFIG) as config_file, replacing(Path(folder) / WEIGHTS) as weights_file:
        write_tensors(weights_file, tensors, {"format": "pt", "sparsecode": json.dumps(header, allow_nan=False)})
        config_file.write_text(text, encoding="utf-8")


def read_config(folder):
    """The method of a folder and its options, with target_modules; the blocks of OFT are told by its tensors."""
    file = Path(folder) / CONFIG
    if not file.exists():
        raise UserError(f"{folder} holds no {CONFIG}; name an adapter file, or a folder that peft wrote")
    return _check_config(read_json(file), file)


def _check_config(config, where):
    optional = {"r": WHOLE, "lora_alpha": NUMBER, "use_dora": FLAG}
    check_fields(config, {"peft_type": TEXT, "target_modules": TARGETS}, optional, where)
    kind = config["peft_type"]
    if kind not in DEFAULTS:
        raise UserError(f"{where} is for {kind}; only LORA (with or without DoRA) and OFT are supported")
    config = DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None}
    options = {"target_modules": config["target_modules"]}
    if kind == "LORA":
        fields = {"rank_pattern": object_of(COUNT), "alpha_pattern": object_of(NUMBER), "use_rslora": FLAG}
        check_fields(config, {}, fields, where)
        options |= {name: value for name in fields if (value := config.pop(name, None))}
        options |= {"r": config["r"], "alpha": config["lora_alpha"]}
    for name, value in config.items():
        if name not in HARMLESS and not _is_off(name, value):
            raise UserError(f"{where}: {name} is {json.dumps(value)}; only adapters without it are supported")
    return "oft" if kind == "OFT" else "dora" if config["use_dora"] else "lora", options


def read_file_of_diffusers(file, path):
    """The method of an open file and its options: as its header says, or else by its tensors, and α = r.

    A tensor NAME.alpha, one number, is the α of that layer. Either all layers have it or none.
    """
    keys = set(file.keys())
    prefix = prefix_of(keys)
    if text := (file.metadata() or {}).get(IN_HEADER):
        config = {name.removeprefix(prefix): value for name, value in read_json(text, where=path).items()}
        return _check_config(config, f"{path}: {IN_HEADER}")
    if prefix == PREFIXES[0]:
        raise UserError(f"{path} does not say its alpha; name the folder that peft wrote, with {CONFIG}")
    ranks = {layer: file.get_slice(key).get_shape()[0] for layer, key in _ending(f".{NAMES['A']}", keys, prefix)}
    alphas = {layer: file.get_tensor(key) for layer, key in _ending(ALPHA, keys, prefix)}
    if strange := [layer for layer, tensor in alphas.items() if tensor.numel() != 1]:
        raise UserError(f"{path} has an {ALPHA} of {strange[0]} that is not one number; save or copy it again")
    alphas = {layer: tensor.float().item() for layer, tensor in alphas.items()} or ranks
    if odd := sorted(ranks.keys() ^ alphas.keys()):
        raise UserError(f"{path} should say {ALPHA} of every layer that it adapts or of none, and does not of {odd[0]}")
    options = {layer: {"r": r, "alpha": alphas[layer]} for layer, r in ranks.items()}
    method = "dora" if any(key.endswith(NAMES["m"]) for key in keys) else "lora"
    return method, {"target_modules": "", **gather(options)}


def _ending(end, keys, prefix):
    return [(key.removesuffix(end).removeprefix(prefix), key) for key in sorted(keys) if key.endswith(end)]


def _is_off(name, value):
    """Off, or for LoRA's start: one of those that leave the frozen weights as they are."""
    if name == "init_lora_weights":
        return value in (True, False, "gaussian")
    return value is None or value is False or value in ("none", [], {})
