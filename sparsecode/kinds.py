"""How each kind of attention is taken apart: project, attend, output; and which cannot be.

`Ours` is this library's `Attention`, `Torch` is torch.nn.MultiheadAttention, also inside nn.TransformerEncoderLayer and
nn.TransformerDecoderLayer, and `Diffusers` is diffusers' `Attention` with its default processors. diffusers is never
imported: its class is recognised by name.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .attention import Attention, merge_heads, split_heads
from .common import UserError


@dataclass
class Parts:
    """One call of an attention, taken apart."""

    q: Tensor  # (B, H, N, C/H)
    k: Tensor  # (B, H, L, C/H)
    v: Tensor  # (B, H, L, C/H)
    tokens: Tensor  # (B, L, C_i): what V is made of
    mask: Tensor | None  # broadcasts to (B, H, N, L): true where attention is allowed, or numbers to add to the logits
    scale: float  # multiplies Q Kᵀ
    output: Callable  # A V (B, H, N, C/H) -> what the attention returns
    add: Callable  # what the attention returns, ΔO (B, N, C_o) -> the same with ΔO added
    dropout: float = 0.0  # of A

    def attend(self, q, k, v):
        """A V, for v and zero-padded q and k of any width"""
        return F.scaled_dot_product_attention(q, k, v, self.mask, self.dropout, scale=self.scale)  # (B, H, N, ·)

    def attention_map(self):
        """A itself, rows summing to one."""
        logits = self.q @ self.k.transpose(-2, -1) * self.scale  # (B, H, N, L)
        if self.mask is not None and self.mask.dtype == torch.bool:
            logits = logits.masked_fill(~self.mask, float("-inf"))  # (B, H, N, L)
        elif self.mask is not None:
            logits = logits + self.mask  # (B, H, N, L)
        return logits.softmax(-1)  # (B, H, N, L)


class Ours:
    projections = ("to_q", "to_k", "to_v", "to_out")

    @staticmethod
    def fits(module):
        return isinstance(module, Attention)

    @staticmethod
    def obstacle(attention):
        """Why it cannot be taken apart faithfully, or None."""

    @staticmethod
    def sizes(attention):
        """C_i of the tokens that V is made of, C_o, heads"""
        return attention.to_v.in_features, attention.to_out.out_features, attention.heads

    @staticmethod
    def take_apart(attention, x, context=None, mask=None):
        q, k, v = attention.project(x, context)  # (B, H, N, C/H), (B, H, L, C/H), (B, H, L, C/H)
        mask = None if mask is None else mask.bool()[:, None, None, :]  # (B, L) -> (B, 1, 1, L)
        tokens = x if context is None else context  # (B, L, C_i)
        return Parts(q, k, v, tokens, mask, q.shape[-1] ** -0.5, attention.output, torch.add)


class Rows(nn.Module):
    """The q, k or v projection of an nn.MultiheadAttention as a Linear; its weight and bias stay where they are."""

    def __init__(self, attention, part):
        super().__init__()
        self.attention, self.part = attention, part
        self.out_features, self.in_features = self.weight.shape

    @property
    def weight(self):
        packed, name = self.attention.in_proj_weight, f"{'qkv'[self.part]}_proj_weight"
        return getattr(self.attention, name) if packed is None else packed.chunk(3)[self.part]  # (3 C, C) -> (C, C)

    @property
    def bias(self):
        packed = self.attention.in_proj_bias
        return None if packed is None else packed.chunk(3)[self.part]  # (3 C,) -> (C,)

    def forward(self, x):
        return F.linear(x, self.weight, self.bias)


class Wrapper(nn.Module):
    """Stands in for the module `base`, and has its attributes, for code that reads them."""

    def __init__(self, base):
        super().__init__()
        self.base = base

    def __getattr__(self, name):
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base":
                raise
        return self.lend(name, getattr(self.base, name))

    def lend(self, name, value):
        """What to give instead of the base's attribute."""
        return value


class Unpacked(Wrapper):
    """An nn.MultiheadAttention whose four projections are modules, so that adapters can be put on them.

    PyTorch's own code then runs with the weights that these modules have, and its fast paths read them here.
    """

    def __init__(self, base):
        super().__init__(base)
        self.q_proj, self.k_proj, self.v_proj = (Rows(base, part) for part in range(3))
        self.out_proj = base.out_proj

    def lend(self, name, value):
        return self.weights().get(name, value) if name.endswith("_proj_weight") else value

    def weights(self):
        found = {f"{name}_weight": getattr(self, name).weight for name in Torch.projections[:3]}
        return found if self.base.in_proj_weight is None else {"in_proj_weight": torch.cat(list(found.values()))}

    def forward(self, *args, **kwargs):
        weights = {**self.weights(), "out_proj.weight": self.out_proj.weight}
        return torch.func.functional_call(self.base, weights, args, kwargs)


class Torch:
    """Returns (output, attention map or None). Tokens come first unless `batch_first`; a batch is optional."""

    projections = ("q_proj", "k_proj", "v_proj", "out_proj")  # of an `Unpacked` one

    @staticmethod
    def fits(module):
        return isinstance(module, (nn.MultiheadAttention, Unpacked))

    @staticmethod
    def obstacle(attention):
        attention = attention.base if isinstance(attention, Unpacked) else attention
        if type(attention).forward is not nn.MultiheadAttention.forward:
            return f"{type(attention).__name__} computes in a way of its own"
        if attention.bias_k is not None or attention.add_zero_attn:
            return "add_bias_kv and add_zero_attn add keys that belong to no token"

    @staticmethod
    def sizes(attention):
        return attention.vdim, attention.embed_dim, attention.num_heads

    @staticmethod
    def take_apart(attention, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
                   average_attn_weights=True, is_causal=False):  # fmt: skip
        if query.is_nested:  # from nn.TransformerEncoder, which asks its first layer alone
            raise UserError("nested tensors are not supported; give nn.TransformerEncoder enable_nested_tensor=False")
        heads, batched = attention.num_heads, query.ndim == 3

        def batch_first(x):
            return (x if attention.batch_first else x.transpose(0, 1)) if batched else x[None]  # (B, T, C)

        def as_given(x):
            return (x if attention.batch_first else x.transpose(0, 1)) if batched else x[0]

        weights = (attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight)
        if attention.in_proj_weight is not None:
            weights = attention.in_proj_weight.chunk(3)  # (3 C, C) -> 3 × (C, C)
        biases = [None] * 3 if attention.in_proj_bias is None else attention.in_proj_bias.chunk(3)  # 3 × (C,)
        inputs = [batch_first(x) for x in (query, key, value)]  # (B, N, C), (B, L, C_k), (B, L, C_v)
        q, k, v = (split_heads(F.linear(*each), heads) for each in zip(inputs, weights, biases))  # (B, H, ·, C/H)
        masks = []
        if attn_mask is not None:  # (N, L), or (B*H, N, L)
            masks.append(attn_mask if attn_mask.ndim == 2 else attn_mask.unflatten(0, (-1, heads)))
        if key_padding_mask is not None:
            masks.append(key_padding_mask.reshape(-1, 1, 1, k.shape[2]))  # (B, L) -> (B, 1, 1, L)
        mask = sum(_additive(mask, q.dtype) for mask in masks) if masks else None

        def output(o):
            a = parts.attention_map() if need_weights else None  # (B, H, N, L)
            if need_weights:
                a = a.mean(1) if average_attn_weights else a  # (B, N, L)
                a = a if batched else a[0]
            return as_given(attention.out_proj(merge_heads(o))), a  # (B, H, N, C/H) -> (B, N, C)

        def add(result, delta):
            return result[0] + as_given(delta), result[1]

        dropout = attention.dropout if attention.training else 0.0
        parts = Parts(q, k, v, inputs[2], mask, q.shape[-1] ** -0.5, output, add, dropout)
        return parts


class Diffusers:
    projections = ("to_q", "to_k", "to_v", "to_out.0")
    OFF = ("group_norm", "spatial_norm", "norm_cross", "norm_q", "norm_k", "added_kv_proj_dim", "residual_connection",
           "fused_projections", "only_cross_attention", "pre_only", "is_causal")  # fmt: skip

    @staticmethod
    def fits(module):
        modules = ("diffusers.models.attention_processor", "diffusers.models.attention")
        return (type(module).__module__, type(module).__name__) in [(name, "Attention") for name in modules]

    @staticmethod
    def obstacle(attention):
        processor = type(attention.processor)
        known = ("AttnProcessor", "AttnProcessor2_0")
        if not processor.__module__.startswith("diffusers.") or processor.__name__ not in known:
            return f"its processor is {processor.__name__}; set one of diffusers' default, {' or '.join(known)}"
        if on := [name for name in Diffusers.OFF if getattr(attention, name, None)]:
            return f"it has {', '.join(on)}"
        if attention.rescale_output_factor != 1 or attention.inner_kv_dim != attention.inner_dim:
            return "it rescales its output, or has fewer heads for keys than for queries"

    @staticmethod
    def sizes(attention):
        return attention.to_v.in_features, attention.to_out[0].out_features, attention.heads

    @staticmethod
    def take_apart(attention, hidden_states, encoder_hidden_states=None, attention_mask=None, **_):
        grid = hidden_states.shape[2:] if hidden_states.ndim == 4 else None
        x = hidden_states if grid is None else hidden_states.flatten(2).transpose(1, 2)  # (B, C, h, w) -> (B, N, C)
        context = x if encoder_hidden_states is None else encoder_hidden_states  # (B, L, C_i)
        q = split_heads(attention.to_q(x), attention.heads)  # (B, N, C) -> (B, H, N, C/H)
        k = split_heads(attention.to_k(context), attention.heads)  # (B, L, C_i) -> (B, H, L, C/H)
        v = split_heads(attention.to_v(context), attention.heads)  # (B, L, C_i) -> (B, H, L, C/H)
        mask = attention.prepare_attention_mask(attention_mask, context.shape[1], len(context))  # (B*H, 1 or N, L)
        if mask is not None:
            mask = mask.unflatten(0, (-1, attention.heads))  # (B, H, 1 or N, L)

        def as_given(y):
            return y if grid is None else y.transpose(1, 2).unflatten(2, grid)  # (B, N, C) -> (B, C, h, w)

        def output(o):
            y = attention.to_out[0](merge_heads(o))  # (B, H, N, C/H) -> (B, N, C_o)
            return as_given(attention.to_out[1](y))  # dropout

        # The scale is what AttnProcessor multiplies by; AttnProcessor2_0 is the default only where it is 1/√(C/H).
        scale = attention.scale if type(attention.processor).__name__ == "AttnProcessor" else q.shape[-1] ** -0.5
        return Parts(q, k, v, context, mask, scale, output, lambda y, delta: y + as_given(delta))


KINDS = (Ours, Torch, Diffusers)


def kind_of(module):
    """The kind of attention that a module is, or None."""
    return next((kind for kind in KINDS if kind.fits(module)), None)


def _additive(mask, dtype):
    """nn.MultiheadAttention's masks: true where attention is not allowed, or numbers to add to the logits."""
    if mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=dtype).masked_fill(mask, float("-inf"))
    return mask.to(dtype)
