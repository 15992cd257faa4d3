"""Load and save the weights of PixArt-Σ's parts.

Reads a folder in the layout of diffusers (config.json beside safetensors, single or sharded with an index) or one of
the authors' own `.pth` files. The model is built on the meta device. All names and shapes are checked before any data
is read. Then tensors are read one at a time and cast.
"""

import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn
from torch.overrides import TorchFunctionMode

from dit.config import SchedulerConfig, T5Config, TransformerConfig, VAEConfig
from dit.t5 import T5Encoder, Tokenizer
from dit.transformer import PixArtTransformer
from dit.vae import AutoencoderKL
from sparsecode.common import TEXT, Kind, UserError, is_whole, object_of, read_json, rename, replacing, some

# ---- names: (ours, theirs) --------------------------------------------------------------------------------------
# Pairs apply in order. A pair that begins with a dot matches anywhere in a name, other pairs only at its start. Where
# several of our tensors get one name, the file holds them fused: stacked along the rows, in the model's order.
# diffusers' names of the transformer's parts are in PixArtTransformer itself.

# The authors' own files.
ORIGINAL_NAMES = [
    ("patch_embed.", "x_embedder.proj."),
    ("timestep_embedder.linear_1.", "t_embedder.mlp.0."),
    ("timestep_embedder.linear_2.", "t_embedder.mlp.2."),
    ("timestep_modulation.", "t_block.1."),
    ("caption_projection.linear_1.", "y_embedder.y_proj.fc1."),
    ("caption_projection.linear_2.", "y_embedder.y_proj.fc2."),
    ("scale_shift_table", "final_layer.scale_shift_table"),
    ("proj_out.", "final_layer.linear."),
    ("transformer_blocks.", "blocks."),
    (".attn1.to_q.", ".attn.qkv."),
    (".attn1.to_k.", ".attn.qkv."),
    (".attn1.to_v.", ".attn.qkv."),
    (".attn1.to_out.", ".attn.proj."),
    (".attn2.to_q.", ".cross_attn.q_linear."),
    (".attn2.to_k.", ".cross_attn.kv_linear."),
    (".attn2.to_v.", ".cross_attn.kv_linear."),
    (".attn2.to_out.", ".cross_attn.proj."),
    (".ff.linear_1.", ".mlp.fc1."),
    (".ff.linear_2.", ".mlp.fc2."),
]
T5_NAMES = [
    ("embed.", "shared."),
    ("relative_attention_bias.", "encoder.block.0.layer.0.SelfAttention.relative_attention_bias."),
    ("final_norm.", "encoder.final_layer_norm."),
    ("blocks.", "encoder.block."),
    *((f".{name}.", f".layer.0.SelfAttention.{name}.") for name in "qkvo"),
    (".norm_1.", ".layer.0.layer_norm."),
    *((f".{name}.", f".layer.1.DenseReluDense.{name}.") for name in ("wi_0", "wi_1", "wo")),
    (".norm_2.", ".layer.1.layer_norm."),
]
VAE_NAMES = [
    (".downsample.", ".downsamplers.0."),
    (".upsample.", ".upsamplers.0."),
    (".attention.", ".attentions.0."),
    (".to_out.", ".to_out.0."),
]
# Files written by diffusers before 0.17. These pairs go before VAE_NAMES, whose last pair then matches nothing.
OLD_VAE_NAMES = [(".to_q.", ".query."), (".to_k.", ".key."), (".to_v.", ".value."), (".to_out.", ".proj_attn.")]

# Tensors in files that the model does not need: T5's embedding under a second name, the position table (computed here),
# and the embedding that replaced dropped captions in the authors' training.
IGNORED = {"encoder.embed_tokens.weight", "pos_embed.pos_embed", "pos_embed", "y_embedder.y_embedding"}
PIXART_ALPHA = ("resolution_embedder.", "aspect_ratio_embedder.", "csize_embedder.", "ar_embedder.")
USUAL_FILES = [name + kind for name in ("diffusion_pytorch_model", "model")
               for kind in (".safetensors", ".safetensors.index.json")]  # fmt: skip
SHARD = re.compile(r"-\d{5}-of-\d{5}\b")  # in the name of a file that holds part of the weights
KEEP_FLOAT32 = (".wo",)  # T5's layers that overflow in float16; transformers keeps them in float32 too
EXTRA_IDS = Kind("a whole number from 0 to 1000", lambda v: is_whole(v) and 0 <= v <= 1000)
FLOATS = {"F64", "F32", "F16", "BF16", "float64", "float32", "float16", "bfloat16"}


# ---- what a file holds ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stored:
    """A tensor in a file: its shape and dtype from the header; `read()` returns its data."""

    file: Path
    shape: tuple
    dtype: str
    read: Callable


def stored_tensors(path):
    """{name: Stored} for the weights at `path`, a file or the folder of a model. No data is read."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; weights/README.md says how to get the weights")
    file = _weights_file(path) if path.is_dir() else path
    if file.suffix == ".pth":
        return _in_pth(file)
    return _in_shards(file) if file.suffix == ".json" else _in_safetensors(file)


def _weights_file(folder):
    """The safetensors file, index of shards or `.pth` in a folder. The usual names come before variants (fp16)."""
    choice = [folder / name for name in USUAL_FILES if (folder / name).exists()]
    shards = [file.name for file in sorted(folder.glob("*.safetensors")) if SHARD.search(file.name)]
    for kind in ("*.safetensors.index*.json", "*.safetensors", "*.pth"):
        choice = choice or sorted(file for file in folder.glob(kind) if file.name not in shards)
    if not choice and shards:
        raise UserError(f"{folder} holds {shards[0]} but no index of the shards; download *.safetensors.index.json too")
    if not choice:
        raise UserError(f"{folder} holds no weights: expected *.safetensors, alone or with an index, or *.pth")
    if len(choice) > 1:
        both = f"{choice[0].name} and {choice[1].name}"
        raise UserError(f"{folder} holds two sets of weights, {both}; move one to another folder")
    return choice[0]


def _in_safetensors(file):
    with _open(file) as tensors:
        slices = {name: tensors.get_slice(name) for name in tensors.keys()}
        return {
            name: Stored(file, tuple(piece.get_shape()), piece.get_dtype(), partial(_read, file, name))
            for name, piece in slices.items()
        }


def _open(file):
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise UserError(f"{file} is not a whole safetensors file ({reason}); download it again") from None


def _read(file, name):
    # Reopened for each tensor: an open file stays mapped, and the parts already read count as used memory.
    with _open(file) as tensors:
        return tensors.get_tensor(name)


def _in_shards(index):
    weight_map = read_json(index, {"weight_map": object_of(TEXT)})["weight_map"]  # tensor -> file
    stored = {}
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).is_file():
            raise UserError(f"{index} names {name}, which is not there; download it into {index.parent}")
        shard = _in_safetensors(index.parent / name)
        if twice := sorted(stored.keys() & shard.keys()):
            raise UserError(f"{stored[twice[0]].file} and {name} both hold {twice[0]}; download both again")
        stored |= shard
    for key, name in weight_map.items():
        if key not in stored or stored[key].file.name != name:
            raise UserError(f"{index.parent / name} lacks {key}, which {index.name} lists; download both again")
    return stored


def _in_pth(file):
    try:
        state = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    except Exception as error:  # torch raises many kinds
        if held := re.search(r"GLOBAL (\S+)", str(error)):
            raise UserError(
                f"{file} holds {held[1]} besides tensors; loading that could run code, so it is refused; "
                "save only the state_dict to a new file"
            ) from None
        raise UserError(f"{file} is not a PyTorch checkpoint ({type(error).__name__}); download it again") from None
    state = state.get("state_dict", state) if isinstance(state, dict) else None
    if not isinstance(state, dict) or not all(isinstance(value, torch.Tensor) for value in state.values()):
        raise UserError(f"{file} is not a dict of named tensors; give one of PixArt-Σ's checkpoints")
    return {
        str(name): Stored(file, tuple(t.shape), str(t.dtype).removeprefix("torch."), partial(state.get, name))
        for name, t in state.items()
    }


# ---- loading ----------------------------------------------------------------------------------------------------
# `path` is the folder of a part of a pipeline, or a weights file in it. `dtype` is that of the weights in memory, by
# default bfloat16 on a GPU (CUDA) and float32 elsewhere; `device` is the CPU by default. UserError for a bad file.


def load_transformer(path, dtype=None, device=None):
    """PixArt-Σ's transformer from its folder, or from one of the authors' `.pth` files, which need no config."""
    stored = stored_tensors(path)
    names = ORIGINAL_NAMES if "x_embedder.proj.weight" in stored else PixArtTransformer.diffusers_names
    return _load(PixArtTransformer, transformer_config(path, stored), path, stored, names, dtype, device)


def transformer_config(path, stored=None):
    """The TransformerConfig from config.json beside the weights at `path`, or from the shapes in an authors' `.pth`."""
    file = _config_file(path)
    if not file.exists():
        stored = stored or stored_tensors(path)
        if "x_embedder.proj.weight" in stored:
            return _config_of(stored)
    return TransformerConfig.from_json(file)


def load_text_encoder(path, dtype=None, device=None):
    """T5's encoder: `load_text_encoder(folder)(ids (B, L), mask (B, L)) -> text (B, L, C)`."""
    stored = stored_tensors(path)
    if "shared.weight" not in stored and "encoder.embed_tokens.weight" in stored:
        stored["shared.weight"] = stored["encoder.embed_tokens.weight"]  # two names for one tensor
    config = T5Config.from_json(_config_file(path))
    return _load(T5Encoder, config, path, stored, T5_NAMES, dtype, device)


def load_vae(path, dtype=None, device=None):
    """The autoencoder: `.encode(images (B, 3, H, W)) -> scaled latent means (B, 4, H/f, W/f)`; `.decode` goes back."""
    stored = stored_tensors(path)
    old = any(".query." in name for name in stored)
    config = VAEConfig.from_json(_config_file(path))
    return _load(AutoencoderKL, config, path, stored, (OLD_VAE_NAMES if old else []) + VAE_NAMES, dtype, device)


def load_tokenizer(folder):
    """T5's tokenizer: `load_tokenizer(folder)(B prompts, max_length=300) -> ids, mask`, (B, max_length) each."""
    file, settings = Path(folder) / "spiece.model", Path(folder) / "tokenizer_config.json"
    if not file.is_file():
        raise UserError(f"{file} is missing; take it from the release (transformers 5 does not write it)")
    values = read_json(settings, optional={"extra_ids": EXTRA_IDS}) if settings.exists() else {}
    return Tokenizer(file, values.get("extra_ids", 100))  # 100 as in transformers


def _config_file(path):
    path = Path(path)
    return (path if path.is_dir() else path.parent) / "config.json"


def _config_of(stored):
    """The config of an authors' file, which has none: sizes from shapes, heads of width 72, grid from `pos_embed`."""
    file = stored["x_embedder.proj.weight"].file
    try:
        width, channels, _, patch = stored["x_embedder.proj.weight"].shape
        _, positions, _ = stored["pos_embed"].shape  # (1, grid · grid, C)
        c_out, _ = stored["final_layer.linear.weight"].shape
        _, c_text = stored["y_embedder.y_proj.fc1.weight"].shape
    except (KeyError, ValueError) as error:
        raise UserError(f"{file} does not tell its sizes ({error}); put its config.json beside it") from None
    if width % 72:
        raise UserError(f"{file} has width {width}, not a multiple of 72; put its config.json beside it")
    sample_size = patch * math.isqrt(positions)
    return TransformerConfig(
        num_layers=sum(name.startswith("blocks.") and name.endswith(".scale_shift_table") for name in stored),
        num_attention_heads=width // 72,
        in_channels=channels,
        out_channels=c_out // patch**2,
        patch_size=patch,
        sample_size=sample_size,
        caption_channels=c_text,
        cross_attention_dim=width,
        interpolation_scale=sample_size / 64,
    )


def _load(model_class, config, path, stored, names, dtype, device):
    device = torch.device(device or "cpu")
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    blocks = getattr(config, "num_layers", None) or config.layers_per_block * len(config.block_out_channels)
    if blocks > len(stored):  # checked before they are built
        raise UserError(f"{path} holds {len(stored)} tensors, too few for the {blocks:,} blocks of its config")
    try:
        model = _skeleton(model_class, config)
    except RuntimeError as error:  # a size beyond 64 bits
        raise UserError(f"the config of {path} asks for impossible sizes ({str(error).splitlines()[0]})") from None
    groups = {}  # name in the file -> our names
    for ours, _ in model.named_parameters():
        groups.setdefault(rename(ours, names), []).append(ours)
    _check(model, groups, stored, path)
    for theirs, group in groups.items():
        _fill(model, group, stored[theirs], dtype, device)
    left = [name for name, tensor in (*model.named_parameters(), *model.named_buffers()) if tensor.is_meta]
    assert not left, left
    return model.eval()


class _NotRandom(TorchFunctionMode):
    """Skips the random init of new weights: on the meta device it would import torch's compiler, 3 s and 150 MB."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if function in (nn.init.normal_, torch.Tensor.normal_):
            return args[0] if args else kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def _skeleton(model_class, config):
    """A model whose tensors have shapes but no memory."""
    with torch.device("meta"), _NotRandom():
        return model_class(config)


def _check(model, groups, stored, path):
    """UserError, before any data is read, unless names, shapes and dtypes are exactly those of the model."""
    for name, tensor in stored.items():
        if name.startswith(PIXART_ALPHA) or any(f".{word}" in name for word in PIXART_ALPHA):
            raise UserError(f"{tensor.file} holds {name}: this is PixArt-α; give a PixArt-Σ checkpoint")
    kind = type(model).__name__
    if missing := [name for name in groups if name not in stored]:
        raise UserError(f"{path} lacks {some(missing)} of the {kind} in its config; download both again")
    if extra := [name for name in stored if name not in groups and name not in IGNORED]:
        raise UserError(f"{stored[extra[0]].file} holds {some(extra)}, unknown to the {kind} in its config")
    parameters = dict(model.named_parameters())
    for theirs, group in groups.items():
        tensor, shapes = stored[theirs], [parameters[ours].shape for ours in group]
        wanted = [sum(shape[0] for shape in shapes), *shapes[0][1:]]
        if list(tensor.shape) != wanted:
            raise UserError(
                f"{tensor.file}: {theirs} has shape {list(tensor.shape)}, but its config asks for {wanted}; "
                "do the two belong together?"
            )
        if tensor.dtype not in FLOATS:
            raise UserError(f"{tensor.file}: {theirs} is stored as {tensor.dtype}; give weights in fp32, fp16 or bf16")


def _fill(model, group, tensor, dtype, device):
    """Read one tensor of a file into our parameter, or parameters if it is fused. UserError if it is not finite."""
    rows = [model.get_parameter(ours).shape[0] for ours in group]
    for ours, part in zip(group, tensor.read().split(rows)):
        owner, _, name = ours.rpartition(".")
        kept = torch.float32 if dtype == torch.float16 and owner.endswith(KEEP_FLOAT32) else dtype
        value = part.to(device, kept, copy=True)  # always a copy: `part` may be the mapped file itself
        if not all(edge.isfinite() for edge in value.aminmax()):  # in one pass and without a copy
            raise UserError(f"{tensor.file}: {ours} holds NaN or infinity as {str(kept)[6:]}; download it again")
        setattr(model.get_submodule(owner), name, nn.Parameter(value, requires_grad=False))


# ---- writing ----------------------------------------------------------------------------------------------------


def save_part(model, folder):
    """Write a model in float32 in the layout of diffusers and transformers: config.json and a safetensors file."""
    names, file = {
        PixArtTransformer: (PixArtTransformer.diffusers_names, "diffusion_pytorch_model.safetensors"),
        T5Encoder: (T5_NAMES, "model.safetensors"),
        AutoencoderKL: (VAE_NAMES, "diffusion_pytorch_model.safetensors"),
    }[type(model)]
    if strange := model.state_dict().keys() ^ _skeleton(type(model), model.config).state_dict().keys():
        raise UserError(f"the {type(model).__name__} differs from its config in {min(strange)}; detach adapters first")
    tensors = {rename(k, names): v.detach().float().cpu().contiguous() for k, v in model.state_dict().items()}
    with replacing(Path(folder) / file) as temporary:
        save_file(tensors, temporary, metadata={"format": "pt"})
    with replacing(Path(folder) / "config.json") as temporary:
        temporary.write_text(model.config.to_json(), encoding="utf-8")


MODEL_INDEX = {
    "_class_name": "PixArtSigmaPipeline",
    "scheduler": ["diffusers", "DPMSolverMultistepScheduler"],
    "text_encoder": ["transformers", "T5EncoderModel"],
    "tokenizer": ["transformers", "T5Tokenizer"],
    "transformer": ["diffusers", "PixArtTransformer2DModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}


def save_index(folder):
    """The small files that make a folder of parts a pipeline: model_index.json, scheduler and tokenizer settings.

    It does not write the tokenizer: put a spiece.model without T5's 100 extra ids into tokenizer/.
    """
    tokenizer = {"tokenizer_class": "T5Tokenizer", "extra_ids": 0, "additional_special_tokens": [],
                 "pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>", "model_max_length": 300}  # fmt: skip
    files = {
        "model_index.json": json.dumps(MODEL_INDEX, indent=2) + "\n",
        "tokenizer/tokenizer_config.json": json.dumps(tokenizer, indent=2) + "\n",
        "scheduler/scheduler_config.json": SchedulerConfig().to_json(),
    }
    for name, text in files.items():
        with replacing(Path(folder) / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
