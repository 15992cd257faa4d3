"""Multi-head attention in separate steps, so that an adapter can join it, and attention as a dictionary (§3.1–3.2)."""

import torch.nn.functional as F
from torch import nn

from .common import UserError


def split_heads(x, heads):
    return x.unflatten(-1, (heads, -1)).transpose(1, 2)  # (B, T, C) -> (B, H, T, C/H)


def merge_heads(x):
    return x.transpose(1, 2).flatten(2)  # (B, H, T, C/H) -> (B, T, C)


class Attention(nn.Module):
    """Z = Σ_h A⁽ʰ⁾ X W_v⁽ʰ⁾ W_o⁽ʰ⁾ᵀ  with  A⁽ʰ⁾ = softmax(Q⁽ʰ⁾ K⁽ʰ⁾ᵀ / √(C/H))    (Eqs. 1–3)

    Queries come from `x` (B, N, C). Keys and values come from `context` (B, L, context_dim) if `context_dim`
    is given, else from `x`. `mask` (B, L) is True or 1 at real tokens; masked tokens contribute exactly zero.
    UserError if `dim` does not split evenly over the heads.
    """

    def __init__(self, dim, heads, context_dim=None, bias=True):
        super().__init__()
        if dim % heads:
            raise UserError(f"width {dim} does not split over {heads} heads; choose a multiple of {heads}")
        self.dim, self.heads = dim, heads
        self.to_q = nn.Linear(dim, dim, bias=bias)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=bias)
        self.to_out = nn.Linear(dim, dim, bias=bias)

    def project(self, x, context=None):
        context = x if context is None else context  # (B, L, C_context)
        q = split_heads(self.to_q(x), self.heads)  # (B, N, C) -> (B, H, N, C/H)
        k = split_heads(self.to_k(context), self.heads)  # (B, L, C_context) -> (B, H, L, C/H)
        v = split_heads(self.to_v(context), self.heads)  # (B, L, C_context) -> (B, H, L, C/H)
        return q, k, v

    def attend(self, q, k, v, mask=None, scale=None):
        """A V of each head (Eq. 2). `scale` multiplies Q Kᵀ; the default is 1/√(width of q)."""
        if mask is not None:
            mask = mask.bool()[:, None, None, :]  # (B, L) -> (B, 1, 1, L)
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)  # (B, H, N, width of v)

    def attention_map(self, q, k, mask=None):
        """A (B, H, N, L), whose rows sum to one (Eq. 1). `attend` does not form it; this is for inspection."""
        logits = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5  # (B, H, N, L)
        if mask is not None:
            logits = logits.masked_fill(~mask.bool()[:, None, None, :], float("-inf"))  # (B, H, N, L)
        return logits.softmax(-1)  # (B, H, N, L)

    def output(self, o):
        return self.to_out(merge_heads(o))  # (B, H, N, C/H) -> (B, N, C)

    def forward(self, x, context=None, mask=None):
        q, k, v = self.project(x, context)  # (B, H, N, C/H), (B, H, L, C/H), (B, H, L, C/H)
        return self.output(self.attend(q, k, v, mask))  # (B, N, C)


def attention_as_dictionary(attention, x, context=None):
    """[A⁽¹⁾ … A⁽ᴴ⁾] and [X W_vo⁽¹⁾; …; X W_vo⁽ᴴ⁾], whose product is the attention's output    (Eq. 7)

    One sequence x (N, C) -> coefficients (N, H·L) and dictionary (H·L, C), one atom for each head and token
    (L = N without context). The dictionary depends on the data. The biases of q and k are part of A. The
    coefficients of a head sum to one over its tokens, so the bias of v is added to every atom of its head,
    and the bias of the output, divided by H, to every atom.
    """
    context = None if context is None else context[None]
    q, k, v = attention.project(x[None], context)  # (1, H, N, C/H), (1, H, L, C/H), (1, H, L, C/H)
    coefficients = attention.attention_map(q, k)[0].transpose(0, 1).flatten(1)  # (1, H, N, L) -> (N, H*L)
    w_o = attention.to_out.weight.T.unflatten(0, (attention.heads, -1))  # (C, C) -> (H, C/H, C)
    atoms = v[0] @ w_o  # (H, L, C/H) x (H, C/H, C) -> (H, L, C)
    if attention.to_out.bias is not None:
        atoms = atoms + attention.to_out.bias / attention.heads  # (H, L, C)
    return coefficients, atoms.flatten(0, 1)  # (N, H*L), (H*L, C)
