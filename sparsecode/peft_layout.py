"""peft's layout for LoRA, DoRA and OFT: a folder with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained` loads what is written here onto a model of diffusers, and what peft writes is read. The
projections of `Attention` have the names of diffusers' attention, but for the output's `.0`. Settings of peft's that
change what an adapter computes, and that LoRA, DoRA and OFT here do not have, are refused by name.
"""

import json
from pathlib import Path

import torch

from .common import FLAG, NUMBER, TEXT, Kind, UserError, is_whole, list_of, read_json, replacing, write_tensors

WHOLE = Kind("a whole number of 0 or more", lambda v: is_whole(v) and 0 <= v < 2**31)
NAMED = list_of(TEXT)
TARGETS = Kind("text, or a list of text", lambda v: TEXT.fits(v) or NAMED.fits(v))
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "m": "lora_magnitude_vector", "P": "oft_R.weight"}
DEFAULTS = {"LORA": {"r": 8, "lora_alpha": 8, "use_dora": False}, "OFT": {"use_cayley_neumann": True}}  # peft's own
# What the output of a trained adapter does not depend on, or what is read elsewhere. All other settings must be off.
HARMLESS = {"peft_type", "peft_version", "task_type", "auto_mapping", "base_model_name_or_path", "revision",
            "inference_mode", "runtime_config", "target_modules", "r", "lora_alpha", "use_dora", "lora_dropout",
            "init_weights", "megatron_core", "qalora_group_size", "oft_block_size", "module_dropout", "eps",
            "num_cayley_neumann_terms"}  # fmt: skip


def diffusers_name(name):
    return f"{name}.0" if name.endswith("to_out") else name


def is_target(name, target_modules, keys):
    """Whether peft adapts the projection `name`: by target_modules, a list of endings, or else by the tensors' names.

    target_modules may also be a regular expression. It comes with the file and can take forever, so it is not run.
    """
    name = diffusers_name(name)
    if isinstance(target_modules, list):
        return any(f".{name}".endswith(f".{ending}") for ending in target_modules)
    return any(f"base_model.model.{name}.{end}" in keys for end in NAMES.values())


# ---- tensors ----------------------------------------------------------------------------------------------------


def pack(state):
    """Our tensors by name, "blocks.0.attn1.to_q.A", -> peft's by key, "base_model.model.blocks.0.attn1.to_q.lora_A…".

    Of OFT's P peft keeps the part above the diagonal of the skew-symmetric Q: at PixArt's size 18.51M numbers.
    """
    return {_key(name): _upper(value) if name.endswith(".P") else value for name, value in state.items()}


def unpack(tensors, state):
    """Copy peft's tensors into ours: P becomes Q itself, the only part of it that R depends on."""
    for name, value in state.items():
        tensor = tensors[_key(name)]
        value.copy_(_skew(tensor, value.shape[-1]) if name.endswith(".P") else tensor)


def _key(name):
    site, _, parameter = name.rpartition(".")
    return f"base_model.model.{diffusers_name(site)}.{NAMES[parameter]}"


def _upper(P):
    rows, columns = torch.triu_indices(P.shape[-1], P.shape[-1], 1)
    return ((P - P.transpose(1, 2)) / 2)[:, rows, columns]  # (blocks, b, b) -> (blocks, b (b - 1) / 2)


def _skew(upper, width):
    rows, columns = torch.triu_indices(width, width, 1)
    q = upper.new_zeros(len(upper), width, width)  # (blocks, b, b)
    q[:, rows, columns] = upper  # (blocks, b (b - 1) / 2) -> (blocks, b, b)
    return q - q.transpose(1, 2)  # (blocks, b, b)


# ---- the two files ----------------------------------------------------------------------------------------------


def write(folder, adapter, sites, tensors, header):
    """Both files; what peft's layout has no place for, `header`, goes into the metadata of the tensors."""
    if adapter.method == "oft":
        config = {"peft_type": "OFT", "r": adapter.blocks, "oft_block_size": 0, "use_cayley_neumann": False}
    else:
        config = {"peft_type": "LORA", "r": adapter.r, "lora_alpha": adapter.alpha,
                  "use_dora": adapter.method == "dora"}  # fmt: skip
    config |= {"target_modules": [diffusers_name(site) for site in sites], "bias": "none", "inference_mode": True}
    text = json.dumps(config, indent=2) + "\n"
    with replacing(Path(folder) / CONFIG) as config_file, replacing(Path(folder) / WEIGHTS) as weights_file:
        write_tensors(weights_file, tensors, {"format": "pt", "sparsecode": json.dumps(header, allow_nan=False)})
        config_file.write_text(text, encoding="utf-8")


def read_config(folder):
    """The method, its options and target_modules; the blocks of OFT are told by its tensors."""
    file = Path(folder) / CONFIG
    if not file.exists():
        raise UserError(f"{folder} holds no {CONFIG}; name an adapter file, or a folder that peft wrote")
    optional = {"r": WHOLE, "lora_alpha": NUMBER, "use_dora": FLAG}
    config = read_json(file, {"peft_type": TEXT, "target_modules": TARGETS}, optional)
    kind = config["peft_type"]
    if kind not in DEFAULTS:
        raise UserError(f"{file} is for {kind}; only LORA (with or without DoRA) and OFT are supported")
    config = DEFAULTS[kind] | {name: value for name, value in config.items() if value is not None}
    for name, value in config.items():
        if name not in HARMLESS and not _is_off(name, value):
            raise UserError(f"{file}: {name} is {json.dumps(value)}; only adapters without it are supported")
    if kind == "OFT":
        return "oft", {}, config["target_modules"]
    options = {"r": config["r"], "alpha": config["lora_alpha"]}
    return ("dora" if config["use_dora"] else "lora"), options, config["target_modules"]


def _is_off(name, value):
    """Off, or for LoRA's start: one of those that leave the frozen weights as they are."""
    if name == "init_lora_weights":
        return value in (True, False, "gaussian")
    return value is None or value is False or value in ("none", [], {})
