"""The PixArt-Σ diffusion transformer: noisy latents, timesteps and text -> the noise in the latents.

(B, 4, h, w) -> patches (B, N, C) -> num_layers × [self-attention, cross-attention to the text, MLP] -> (B, 8, h, w).
The timestep shifts, scales and gates every block (adaLN-single; Chen et al., 2023). Channels 0–3 of the output are the
noise, 4–7 a learned variance, which the sampler ignores. Most names are those of diffusers' PixArtTransformer2DModel.
"""

import functools
import math

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from dit.config import TransformerConfig
from sparsecode.attention import Attention


class MLP(nn.Module):
    def __init__(self, c_in, c_hidden, c_out):
        super().__init__()
        self.linear_1 = nn.Linear(c_in, c_hidden)
        self.linear_2 = nn.Linear(c_hidden, c_out)

    def forward(self, x):
        return self.linear_2(F.gelu(self.linear_1(x), approximate="tanh"))  # (..., C_in) -> (..., C_out)


class TimestepEmbedder(nn.Module):
    """Timesteps (B,) in [0, 1000) -> 128 cosines and 128 sines of each -> (B, C)."""

    def __init__(self, width):
        super().__init__()
        self.linear_1 = nn.Linear(256, width)
        self.linear_2 = nn.Linear(width, width)

    def forward(self, timesteps):
        frequencies = torch.exp(-math.log(10000) * torch.arange(128, device=timesteps.device) / 128)  # (128,)
        angles = timesteps.float()[:, None] * frequencies  # (B, 128)
        waves = torch.cat([angles.cos(), angles.sin()], dim=1).to(self.linear_1.weight.dtype)  # (B, 256)
        return self.linear_2(F.silu(self.linear_1(waves)))  # (B, C)


class Block(nn.Module):
    def __init__(self, config: TransformerConfig):
        super().__init__()
        width, heads = config.width, config.num_attention_heads
        self.attn1 = Attention(width, heads)
        self.attn2 = Attention(width, heads, context_dim=width)
        self.ff = MLP(width, 4 * width, width)
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(6, width), std=width**-0.5))

    def forward(self, x, modulation, text, text_mask):
        """x (B, N, C), modulation (B, 6, C) from the timestep, text (B, L, C), text_mask (B, L) -> (B, N, C)."""
        tables = (self.scale_shift_table + modulation).chunk(6, dim=1)  # 6 × (B, 1, C)
        shift_1, scale_1, gate_1, shift_2, scale_2, gate_2 = tables
        x = x + gate_1 * self.attn1(normalise(x) * (1 + scale_1) + shift_1)  # (B, N, C)
        x = x + self.attn2(x, text, text_mask)  # (B, N, C); no norm and no gate
        return x + gate_2 * self.ff(normalise(x) * (1 + scale_2) + shift_2)  # (B, N, C)


class PixArtTransformer(nn.Module):
    diffusers_names = [  # (ours, theirs) for `rename`: files of weights and of adapters hold theirs
        ("patch_embed.", "pos_embed.proj."),
        ("timestep_embedder.", "adaln_single.emb.timestep_embedder."),
        ("timestep_modulation.", "adaln_single.linear."),
        (".to_out.", ".to_out.0."),
        (".ff.linear_1.", ".ff.net.0.proj."),
        (".ff.linear_2.", ".ff.net.2."),
    ]

    def __init__(self, config: TransformerConfig):
        super().__init__()
        self.config = config
        self.gradient_checkpointing = False
        width, patch = config.width, config.patch_size
        self.patch_embed = nn.Conv2d(config.in_channels, width, patch, stride=patch)
        self.timestep_embedder = TimestepEmbedder(width)
        self.timestep_modulation = nn.Linear(width, 6 * width)
        self.caption_projection = MLP(config.caption_channels, width, width)
        self.transformer_blocks = nn.ModuleList(Block(config) for _ in range(config.num_layers))
        self.scale_shift_table = nn.Parameter(nn.init.normal_(torch.empty(2, width), std=width**-0.5))
        self.proj_out = nn.Linear(width, patch * patch * config.out_channels)

    def forward(self, latents, timesteps, text, text_mask):
        """Latents (B, 4, h, w), timesteps (B,), text (B, L, caption_channels), text_mask (B, L) -> (B, 8, h, w)."""
        rows, columns = (side // self.config.patch_size for side in latents.shape[-2:])  # h/2, w/2
        x = self.patch_embed(latents).flatten(2).transpose(1, 2)  # (B, 4, h, w) -> (B, C, h/2, w/2) -> (B, N, C)
        x = (x + self.positions(rows, columns, x.device)).to(x.dtype)  # (B, N, C)
        text = self.caption_projection(text)  # (B, L, caption_channels) -> (B, L, C)
        time = self.timestep_embedder(timesteps)  # (B, C)
        modulation = self.timestep_modulation(F.silu(time)).unflatten(1, (6, -1))  # (B, 6, C)
        for block in self.transformer_blocks:
            if self.gradient_checkpointing and torch.is_grad_enabled():
                rest = {"use_reentrant": False, "preserve_rng_state": False}  # nothing here is random
                x = checkpoint(block, x, modulation, text, text_mask, **rest)  # (B, N, C)
            else:
                x = block(x, modulation, text, text_mask)  # (B, N, C)
        shift, scale = (self.scale_shift_table + time[:, None]).chunk(2, dim=1)  # (B, 1, C) each
        x = self.proj_out(normalise(x) * (1 + scale) + shift)  # (B, N, C) -> (B, N, 2·2·8)
        return self.unpatchify(x, rows, columns)  # (B, 8, h, w)

    def positions(self, h, w, device):
        """Sine and cosine table (N, C) for a grid of h × w patches, in units of the training grid."""
        base = self.config.sample_size // self.config.patch_size
        return position_table(self.config.width, h, w, base, self.config.position_scale, torch.device(device))

    def unpatchify(self, x, h, w):
        p = self.config.patch_size
        x = x.unflatten(2, (p, p, -1)).unflatten(1, (h, w))  # (B, N, p·p·8) -> (B, h, w, p, p, 8)
        return torch.einsum("nhwpqc->nchpwq", x).flatten(4).flatten(2, 3)  # (B, 8, h·p, w·p)


def normalise(x):
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


@torch.compiler.assume_constant_result  # so that a compiled model does not rebuild it
def position_table(width, h, w, base, scale, device=torch.device("cpu")):
    return _position_table(width, h, w, base, scale, device)


@functools.lru_cache(maxsize=4)
@torch.inference_mode(False)  # cached tensors must work in training too
def _position_table(width, h, w, base, scale, device):
    """(h·w, width): half of the channels for x, half for y, each [sin | cos] (diffusers' get_2d_sincos_pos_embed)."""
    numbers = functools.partial(torch.arange, dtype=torch.float64, device="cpu")
    y = numbers(h) / (h / base) / scale  # (h,)
    x = numbers(w) / (w / base) / scale  # (w,)
    omega = 10000 ** -(numbers(width // 4) / (width / 4))  # (width/4,)

    def waves(coordinate):
        angles = coordinate[:, None] * omega  # (n, width/4)
        return torch.cat([angles.sin(), angles.cos()], dim=1)  # (n, width/2)

    rows, columns = waves(y)[:, None].expand(-1, w, -1), waves(x)[None].expand(h, -1, -1)  # (h, w, width/2) each
    return torch.cat([columns, rows], dim=2).flatten(0, 1).float().to(device)  # (h·w, width)
