"""The configs of PixArt-Σ's parts, read from the JSON files that come with the weights (the layout of diffusers).

Each class holds the fields that this code uses; `from_json` refuses values of any other model.
"""

import dataclasses
import json
from dataclasses import dataclass
from pathlib import Path

from sparsecode.common import FLAG, POSITIVE, Kind, UserError, check_fields, is_whole, list_of, read_json

# What a field of each type may hold. LARGEST keeps products such as width × width within 64 bits.
LARGEST = 2**20
SIZE = Kind(f"a whole number from 1 to {LARGEST:,}", lambda v: is_whole(v) and 1 <= v <= LARGEST)
SIZES = Kind(f"a list, each {SIZE.name}", lambda v: v != [] and list_of(SIZE).fits(v))
KINDS = {int: SIZE, float: POSITIVE, float | None: POSITIVE, bool: FLAG, tuple[int, ...]: SIZES}


class Config:
    # Fields of the file with the only values that this code supports; a file with another value is refused.
    required: dict = {}

    @classmethod
    def from_json(cls, path):
        """Read a config file. An absent or null field gets the class's default. UserError for unsupported values."""
        return cls.from_dict(read_json(Path(path)), where=str(path))

    @classmethod
    def from_dict(cls, values, where="config"):
        values = {name: value for name, value in values.items() if value is not None}
        for name, allowed in cls.required.items():
            if name in values and values[name] not in allowed:
                raise UserError(f"{where}: {name} is {values[name]!r}, but this code supports only {allowed[0]!r}")
        kinds = {field.name: KINDS[field.type] for field in dataclasses.fields(cls)}
        check_fields(values, optional=kinds, where=where)
        kept = {name: value for name, value in values.items() if name in kinds}
        config = cls(**{name: tuple(value) if isinstance(value, list) else value for name, value in kept.items()})
        if problem := config.problem():
            raise UserError(f"{where}: {problem}")
        return config

    def problem(self):
        """Why these values do not fit together, as text, or None."""

    def to_json(self):
        """The text of a config file that diffusers or transformers can read too."""
        fixed = {name: allowed[0] for name, allowed in self.required.items()}
        return json.dumps({**fixed, **dataclasses.asdict(self)}, indent=2) + "\n"


@dataclass(frozen=True)
class TransformerConfig(Config):
    """transformer/config.json; the defaults are PixArt-Σ at 1024×1024."""

    num_layers: int = 28
    num_attention_heads: int = 16
    attention_head_dim: int = 72
    in_channels: int = 4
    out_channels: int = 8
    patch_size: int = 2
    sample_size: int = 128
    caption_channels: int = 4096
    cross_attention_dim: int = 1152
    interpolation_scale: float | None = None

    required = {
        "_class_name": ["PixArtTransformer2DModel", "Transformer2DModel"],
        "use_additional_conditions": [False],
        "norm_type": ["ada_norm_single"],
        "activation_fn": ["gelu-approximate"],
        "attention_bias": [True],
        "norm_elementwise_affine": [False],
        "norm_eps": [1e-6],
    }

    @property
    def width(self):
        return self.num_attention_heads * self.attention_head_dim

    @property
    def position_scale(self):
        """`interpolation_scale`, or if null max(sample_size // 64, 1), as in diffusers' PixArtTransformer2DModel."""
        return self.interpolation_scale or max(self.sample_size // 64, 1)

    @classmethod
    def from_dict(cls, values, where="config"):
        # In diffusers, null means true at sample_size 128. Here it means PixArt-Σ; loading refuses PixArt-α's tensors.
        if values.get("use_additional_conditions"):
            raise UserError(
                f"{where}: use_additional_conditions is {values['use_additional_conditions']!r}, which makes this a "
                "PixArt-α checkpoint (resolution and aspect-ratio embeddings); give a PixArt-Σ checkpoint"
            )
        return super().from_dict(values, where)

    def problem(self):
        if self.cross_attention_dim != self.width:
            return f"cross_attention_dim is {self.cross_attention_dim}; expected heads × head size = {self.width}"
        if self.width % 4:
            return f"heads × head size is {self.width}; expected a multiple of 4, for the position table"
        if not self.patch_size <= self.sample_size <= 2048:
            return f"sample_size is {self.sample_size}; expected patch_size, {self.patch_size}, to 2048 latent pixels"


@dataclass(frozen=True)
class T5Config(Config):
    """text_encoder/config.json; the defaults are T5 v1.1-XXL."""

    vocab_size: int = 32128
    d_model: int = 4096
    d_kv: int = 64
    d_ff: int = 10240
    num_layers: int = 24
    num_heads: int = 64
    relative_attention_num_buckets: int = 32
    relative_attention_max_distance: int = 128
    layer_norm_epsilon: float = 1e-6

    required = {
        "architectures": [["T5EncoderModel"]],
        "model_type": ["t5"],
        "feed_forward_proj": ["gated-gelu"],
        "pad_token_id": [0],
        "eos_token_id": [1],
    }

    def problem(self):
        exact = self.relative_attention_num_buckets // 4  # distances that have their own bucket, on each side
        if not 0 < exact < self.relative_attention_max_distance:
            return (
                f"relative_attention_num_buckets is {self.relative_attention_num_buckets}; expected at least 4, and "
                f"a quarter of it below relative_attention_max_distance, {self.relative_attention_max_distance}"
            )


@dataclass(frozen=True)
class VAEConfig(Config):
    """vae/config.json; the defaults are SDXL's."""

    in_channels: int = 3
    out_channels: int = 3
    block_out_channels: tuple[int, ...] = (128, 256, 512, 512)
    layers_per_block: int = 2
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int = 1024
    scaling_factor: float = 0.13025
    mid_block_add_attention: bool = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True

    required = {
        "_class_name": ["AutoencoderKL"],
        "act_fn": ["silu"],
        "shift_factor": [None],
        "latents_mean": [None],
        "latents_std": [None],
    }

    @classmethod
    def from_dict(cls, values, where="config"):
        config = super().from_dict(values, where)
        for name, blocks in config.block_types().items():
            if values.get(name) not in (None, blocks):
                raise UserError(f"{where}: {name} is {values[name]!r}, but this code supports only {blocks}")
        return config

    def problem(self):
        if odd := [width for width in self.block_out_channels if width % self.norm_num_groups]:
            return f"block_out_channels holds {odd[0]}; expected multiples of norm_num_groups, {self.norm_num_groups}"

    def block_types(self):
        levels = len(self.block_out_channels)
        return {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}

    def to_json(self):
        return json.dumps({**json.loads(super().to_json()), **self.block_types()}, indent=2) + "\n"

    @property
    def factor(self):
        """Picture pixels for each latent pixel, along each side."""
        return 2 ** (len(self.block_out_channels) - 1)


@dataclass(frozen=True)
class SchedulerConfig(Config):
    """scheduler/scheduler_config.json; the defaults are PixArt-Σ's."""

    num_train_timesteps: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02

    required = {
        "_class_name": ["DPMSolverMultistepScheduler"],
        "beta_schedule": ["linear"],
        "algorithm_type": ["dpmsolver++"],
        "solver_order": [2],
        "solver_type": ["midpoint"],
        "prediction_type": ["epsilon"],
        "timestep_spacing": ["linspace"],
        "final_sigmas_type": ["zero"],
        "lower_order_final": [True],
        "thresholding": [False],
        "use_karras_sigmas": [False],
        "use_exponential_sigmas": [False],
        "use_beta_sigmas": [False],
        "use_lu_lambdas": [False],
        "use_flow_sigmas": [False],
        "rescale_betas_zero_snr": [False],
        "trained_betas": [None],
    }

    def problem(self):
        if not self.beta_start <= self.beta_end < 1:
            return f"beta_start is {self.beta_start} and beta_end {self.beta_end}; expected beta_start ≤ beta_end < 1"
        if self.num_train_timesteps < 2:
            return f"num_train_timesteps is {self.num_train_timesteps}; expected 2 or more"
