"""peft's layout for LoRA, DoRA and OFT: a folder with adapter_config.json and adapter_model.safetensors.

`PeftModel.from_pretrained` loads what is written here onto a model of diffusers, and what peft writes is read. The
projections of `Attention` have the names of diffusers' attention, but for the output's `.0`. Settings of peft's that
change what an adapter computes, and that LoRA, DoRA and OFT here do not have, are refused by name.
"""

import json
import re
from pathlib import Path

import torch
from safetensors.torch import save_file

from .common import UserError, replacing

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


def is_target(target_modules, name):
    """Whether peft would adapt the projection `name`: a regular expression of the whole name, or a list of endings."""
    name = diffusers_name(name)
    if isinstance(target_modules, str):
        return re.fullmatch(target_modules, name) is not None
    return any(f".{name}".endswith(f".{ending}") for ending in target_modules)


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
        save_file(tensors, weights_file, metadata={"format": "pt", "sparsecode": json.dumps(header)})
        config_file.write_text(text, encoding="utf-8")


def read_config(folder):
    """The method, its options and target_modules of a folder; the blocks of OFT are told by its tensors."""
    file = Path(folder) / CONFIG
    config = _read_json(file)
    kind = config.get("peft_type")
    if kind not in DEFAULTS:
        raise UserError(f"{file} is for {kind}; only LORA (with or without DoRA) and OFT are supported")
    config = {**DEFAULTS[kind], **config}
    for name, value in config.items():
        if name not in HARMLESS and not _is_off(name, value):
            raise UserError(f"{file}: {name} is {json.dumps(value)}; only adapters without it are supported")
    target_modules = _target_modules(file, config.get("target_modules"))
    if kind == "OFT":
        return "oft", {}, target_modules
    r, alpha = config["r"], config["lora_alpha"]
    if type(r) is not int or type(alpha) not in (int, float):
        raise UserError(f"{file}: r is {r!r} and lora_alpha is {alpha!r}; both must be numbers")
    return ("dora" if config["use_dora"] else "lora"), {"r": r, "alpha": alpha}, target_modules


def _read_json(file):
    try:
        config = json.loads(file.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{file.parent} holds no {CONFIG}; name an adapter file, or a folder that peft wrote") from None
    except ValueError as error:
        raise UserError(f"{file} is not JSON ({error}); save or copy it again") from None
    if not isinstance(config, dict):
        raise UserError(f"{file} is not a table of settings; save or copy it again")
    return config


def _is_off(name, value):
    """Off, or for LoRA's start: one of those that leave the frozen weights as they are."""
    if name == "init_lora_weights":
        return value in (True, False, "gaussian")
    return value is None or value is False or value in ("none", [], {})


def _target_modules(file, value):
    try:
        if isinstance(value, str):
            re.compile(value)
            return value
        if isinstance(value, list) and all(isinstance(ending, str) for ending in value):
            return value
    except re.error as error:
        raise UserError(f"{file}: target_modules {value!r} is no regular expression ({error})") from None
    raise UserError(f"{file}: target_modules is {value!r}; expected a regular expression or a list of names")
