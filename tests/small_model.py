"""A transformer of two blocks with the names of the real one, for tests."""

from dataclasses import dataclass

import torch
from torch import nn

from sparsecode import Attention


@dataclass(frozen=True)
class SmallConfig:
    width: int = 32
    heads: int = 4
    context_width: int = 12
    layers: int = 2


class SmallModel(nn.Module):
    def __init__(self, config=SmallConfig()):
        super().__init__()
        self.config = config
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attn1": Attention(config.width, config.heads),
                    "attn2": Attention(config.width, config.heads, config.context_width),
                    "mlp": nn.Sequential(nn.Linear(config.width, config.width), nn.GELU()),
                }
            )
            for _ in range(config.layers)
        )

    def forward(self, x, context, mask=None):
        for block in self.blocks:
            x = x + block["attn1"](x)  # (B, N, C)
            x = x + block["attn2"](x, context, mask)  # (B, N, C)
            x = x + block["mlp"](x)  # (B, N, C)
        return x


def small_inputs(batch=2, tokens=9, config=SmallConfig()):
    return torch.randn(batch, tokens, config.width), torch.randn(batch, 5, config.context_width)


def shake(adapters):
    """Give every adapter's parameters values that say something, as training would."""
    for adapter in adapters:
        for parameter in adapter.parameters():
            with torch.no_grad():
                parameter += 0.3 * torch.randn_like(parameter)
