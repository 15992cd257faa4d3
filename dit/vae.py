"""The picture autoencoder of SDXL, which PixArt-Σ uses: pictures (B, 3, H, W) <-> latents (B, 4, H/f, W/f).

The encoder is a stack of residual blocks that halves height and width at each level but the last (f = 8 with four
levels). The decoder mirrors it. Most names are those of diffusers' AutoencoderKL.
"""

import torch.nn.functional as F
from torch import nn

from dit.config import VAEConfig


class ResidualBlock(nn.Module):
    def __init__(self, c_in, c_out, groups):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x):
        h = self.conv1(F.silu(self.norm1(x)))  # (B, C_in, H, W) -> (B, C_out, H, W)
        h = self.conv2(F.silu(self.norm2(h)))  # (B, C_out, H, W)
        return self.conv_shortcut(x) + h


class PixelAttention(nn.Module):
    """One attention head over all positions (B, C, H, W), in the middle of encoder and decoder."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = nn.GroupNorm(groups, channels, eps=1e-6)
        self.to_q = nn.Linear(channels, channels)
        self.to_k = nn.Linear(channels, channels)
        self.to_v = nn.Linear(channels, channels)
        self.to_out = nn.Linear(channels, channels)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # (B, C, H, W) -> (B, HW, C)
        q, k, v = self.to_q(tokens), self.to_k(tokens), self.to_v(tokens)  # (B, HW, C)
        out = F.scaled_dot_product_attention(q[:, None], k[:, None], v[:, None])[:, 0]  # (B, HW, C)
        return x + self.to_out(out).transpose(1, 2).view_as(x)


class Middle(nn.Module):
    def __init__(self, channels, groups, attention):
        super().__init__()
        self.resnets = nn.ModuleList(ResidualBlock(channels, channels, groups) for _ in range(2))
        self.attention = PixelAttention(channels, groups) if attention else nn.Identity()

    def forward(self, x):
        return self.resnets[1](self.attention(self.resnets[0](x)))  # (B, C, H, W)


class Downsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x):
        return self.conv(F.pad(x, (0, 1, 0, 1)))  # (B, C, H, W) -> (B, C, H/2, W/2); pads right and bottom only


class Upsample(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x):
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))  # (B, C, H, W) -> (B, C, 2H, 2W)


class Level(nn.Module):
    """Residual blocks at one resolution, then at all levels but the last a change of resolution."""

    def __init__(self, c_in, c_out, n_blocks, groups, down=False, up=False):
        super().__init__()
        widths = [c_in] + [c_out] * n_blocks
        self.resnets = nn.ModuleList(ResidualBlock(a, b, groups) for a, b in zip(widths, widths[1:]))
        self.downsample = Downsample(c_out) if down else nn.Identity()
        self.upsample = Upsample(c_out) if up else nn.Identity()

    def forward(self, x):
        for block in self.resnets:
            x = block(x)  # (B, C_in, H, W) -> (B, C_out, H, W)
        return self.upsample(self.downsample(x))  # (B, C_out, H, W), halved or doubled


class Encoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, n = config.block_out_channels, config.norm_num_groups, config.layers_per_block
        levels = zip((widths[0], *widths), widths, [True] * (len(widths) - 1) + [False])
        self.conv_in = nn.Conv2d(config.in_channels, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList(Level(a, b, n, groups, down=down) for a, b, down in levels)
        self.mid_block = Middle(widths[-1], groups, config.mid_block_add_attention)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], 2 * config.latent_channels, 3, padding=1)

    def forward(self, images):
        x = self.conv_in(images)  # (B, 3, H, W) -> (B, C, H, W)
        for level in self.down_blocks:
            x = level(x)  # halves H and W, except at the last level
        x = self.mid_block(x)  # (B, C', H/f, W/f)
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 8, H/f, W/f): mean and log-variance


class Decoder(nn.Module):
    def __init__(self, config: VAEConfig):
        super().__init__()
        widths, groups, n = config.block_out_channels[::-1], config.norm_num_groups, config.layers_per_block + 1
        levels = zip((widths[0], *widths), widths, [True] * (len(widths) - 1) + [False])
        self.conv_in = nn.Conv2d(config.latent_channels, widths[0], 3, padding=1)
        self.mid_block = Middle(widths[0], groups, config.mid_block_add_attention)
        self.up_blocks = nn.ModuleList(Level(a, b, n, groups, up=up) for a, b, up in levels)
        self.conv_norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], config.out_channels, 3, padding=1)

    def forward(self, latents):
        x = self.mid_block(self.conv_in(latents))  # (B, 4, H/f, W/f) -> (B, C', H/f, W/f)
        for level in self.up_blocks:
            x = level(x)  # doubles H and W, except at the last level
        return self.conv_out(F.silu(self.conv_norm_out(x)))  # (B, 3, H, W)


class AutoencoderKL(nn.Module):
    """`encode` returns and `decode` takes *scaled* latents, of about unit variance, as the transformer uses them."""

    def __init__(self, config: VAEConfig):
        super().__init__()
        self.config = config
        self.encoder = Encoder(config)
        self.decoder = Decoder(config)
        c = config.latent_channels
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if config.use_quant_conv else nn.Identity()
        self.post_quant_conv = nn.Conv2d(c, c, 1) if config.use_post_quant_conv else nn.Identity()

    @property
    def dtype(self):
        return self.encoder.conv_in.weight.dtype

    def posterior(self, images):
        """Mean and log-variance of the (unscaled) latents of images (B, 3, H, W) in [-1, 1], each (B, 4, H/f, W/f)."""
        mean, logvar = self.quant_conv(self.encoder(images)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latent means (B, 4, H/f, W/f)."""
        return self.posterior(images)[0] * self.config.scaling_factor

    def decode(self, latents):
        """Scaled latents (B, 4, H/f, W/f) -> images (B, 3, H, W), about in [-1, 1]."""
        return self.decoder(self.post_quant_conv(latents / self.config.scaling_factor))
