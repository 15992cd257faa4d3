"""The methods the paper compares with, each on one Linear: LoRA, DoRA and OFT (§4.3).

`attach` puts them on the q, k, v and output projections of an attention, or on any Linear. LoRA and DoRA
adapt a Conv2d too: it is W x for each patch x of C_i k k numbers. All compute in the width of x, keep their
parameters in float32, and change nothing when fresh.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .adapter import Adapter
from .common import UserError, is_number, is_whole
from .kinds import Wrapper


class AdaptedLinear(Wrapper):
    """A frozen Linear or Conv2d whose adapter computes the output in its place. Several add what each changes."""

    def __init__(self, base, adapter):
        super().__init__(base)
        self.adapter, self.more = adapter, nn.ModuleList()

    @property
    def active(self):
        return [adapter for adapter in (self.adapter, *self.more) if adapter.scale != 0]

    def forward(self, x):
        if [adapter.scale for adapter in self.active] == [1]:
            return self.active[0](x, self.base)  # (..., C_i) -> (..., C_o)
        y = self.base(x)  # (..., C_i) -> (..., C_o)
        return y + sum(adapter.scale * (adapter(x, self.base) - y) for adapter in self.active)

    @property
    def weight(self):
        """W' (C_o, C_i), with W' x + b the output: nn.MultiheadAttention takes weights, and calls no Linear."""
        W = self.base.weight  # (C_o, C_i)
        changes = [adapter.scale * (adapter.weight(self.base) - W.float()) for adapter in self.active]
        return W + sum(changes).to(W.dtype) if changes else W

    @property
    def bias(self):
        return self.base.bias


class LoRA(Adapter):
    """y = W x + b + (α/r) B A x,  A (r, C_i) Kaiming-uniform, B (C_o, r) zero

    Of a Conv2d A is a convolution too, (r, C_i, k, k), with the stride and padding of W.
    """

    method = "lora"

    def __init__(self, linear, *, r=16, alpha=16):
        super().__init__()
        if not is_whole(r) or r < 1:
            raise UserError(f"r={r!r} is not a rank; choose 1 or more")
        if not is_number(alpha):
            raise UserError(f"alpha={alpha!r} is not a number; choose one like 16")
        self.r, self.alpha = int(r), int(alpha) if is_whole(alpha) else float(alpha)
        self.A = nn.Parameter(torch.empty(r, *linear.weight.shape[1:]))  # (r, C_i), or (r, C_i, k, k)
        self.B = nn.Parameter(torch.zeros(len(linear.weight), r))  # (C_o, r)
        nn.init.kaiming_uniform_(self.A, a=math.sqrt(5))

    @property
    def options(self):
        return {"r": self.r, "alpha": self.alpha}

    def update(self, x, linear):
        """(α/r) B A x"""
        A, B = self.A.to(x.dtype), self.B.to(x.dtype)
        if A.ndim == 4:
            low = F.conv2d(x, A, None, linear.stride, linear.padding, linear.dilation)  # (B, C_i, H, W) -> (B, r, h, w)
            return F.conv2d(low, B[..., None, None]) * (self.alpha / self.r)  # (B, r, h, w) -> (B, C_o, h, w)
        low = x @ A.T  # (..., C_i) x (C_i, r) -> (..., r)
        return low @ B.T * (self.alpha / self.r)  # (..., r) x (r, C_o) -> (..., C_o)

    def forward(self, x, linear):
        return linear(x) + self.update(x, linear)  # (..., C_o)

    def weight(self, linear):
        change = self.B @ self.A.flatten(1) * (self.alpha / self.r)  # (C_o, C_i), or (C_o, C_i k k)
        return linear.weight.float() + change.view_as(linear.weight)  # (C_o, C_i), or (C_o, C_i, k, k)


class DoRA(LoRA):
    """y = g ⊙ (W + (α/r) B A) x + b  with  g = m / ‖W + (α/r) B A‖ for each row

    The norm is held constant in the backward pass, as in DoRA's §4.3, and m starts at ‖W‖. Written as
    W x + b plus a change, which is exactly zero while g = 1 and B = 0. A row of zeros has no direction: g is 1 there.
    """

    method = "dora"

    def __init__(self, linear, *, r=16, alpha=16):
        super().__init__(linear, r=r, alpha=alpha)
        self.m = nn.Parameter(linear.weight.detach().float().flatten(1).norm(dim=1))  # (C_o,)

    @torch.no_grad()
    def row_norms(self, linear):
        return super().weight(linear).flatten(1).norm(dim=1)  # (C_o, C_i) -> (C_o,)

    def gain(self, linear):
        norm = self.while_frozen(lambda: self.row_norms(linear), linear.weight, self.A, self.B)  # (C_o,)
        return torch.where(norm > 0, self.m / torch.where(norm > 0, norm, 1.0), 1.0)  # (C_o,)

    def forward(self, x, linear):
        y = linear(x)  # (..., C_i) -> (..., C_o)
        shape = (-1,) if self.A.ndim == 2 else (-1, 1, 1)  # channels come last, or before h and w
        g = self.gain(linear).view(shape)  # (C_o,), or (C_o, 1, 1)
        without_bias = y if linear.bias is None else y - linear.bias.view(shape)  # (..., C_o)
        return y + (g - 1).to(x.dtype) * without_bias + g.to(x.dtype) * self.update(x, linear)  # (..., C_o)

    def weight(self, linear):
        W = super().weight(linear)  # (C_o, C_i), or (C_o, C_i, k, k)
        return self.gain(linear).view(-1, *[1] * (W.ndim - 1)) * W  # the same


class OFT(Adapter):
    """y = W (x R) + b,  R block-diagonal and orthogonal: R = (I − Q)(I + Q)⁻¹,  Q = (P − Pᵀ)/2

    P (blocks, b, b) is stored in full, as in the paper's count of 37M, and starts at zero. (peft stores
    what is above the diagonal of Q: 18.5M.) The Cayley transform is exact: a linear solve in float32
    for each block.
    """

    method = "oft"

    def __init__(self, linear, *, blocks=4):
        super().__init__()
        if isinstance(linear, nn.Conv2d):
            raise UserError("oft rotates what a Linear reads and cannot adapt a Conv2d; choose lora or dora")
        if not is_whole(blocks) or blocks < 1 or linear.in_features % blocks:
            raise UserError(f"blocks={blocks!r} does not divide width {linear.in_features}; choose a divisor")
        self.blocks = int(blocks)
        width = linear.in_features // blocks
        self.P = nn.Parameter(torch.zeros(blocks, width, width))  # (blocks, b, b)

    @property
    def options(self):
        return {"blocks": self.blocks}

    def rotation(self):
        q = (self.P - self.P.transpose(1, 2)) / 2  # (blocks, b, b)
        eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)  # (b, b)
        return torch.linalg.solve(eye + q, eye - q)  # (blocks, b, b); the two factors commute

    def forward(self, x, linear):
        x_blocks = x.unflatten(-1, (self.blocks, -1))  # (..., C_i) -> (..., blocks, b)
        rotation = self.while_frozen(self.rotation, self.P)  # (blocks, b, b)
        rotated = torch.einsum("...kb,kbc->...kc", x_blocks, rotation.to(x.dtype))  # (..., blocks, b)
        return linear(rotated.flatten(-2))  # (..., blocks, b) -> (..., C_i) -> (..., C_o)

    def weight(self, linear):
        blocks = linear.weight.float().unflatten(1, (self.blocks, -1))  # (C_o, C_i) -> (C_o, blocks, b)
        return torch.einsum("okc,kbc->okb", blocks, self.rotation()).flatten(1)  # W Rᵀ, (C_o, C_i)
