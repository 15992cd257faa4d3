"""Tolerance: 1e-6 absolute on outputs near 1, some ten roundings of float32."""

import pytest
import torch
from torch import nn

from sparsecode import Attention, UserError, attention_as_dictionary

WIDTH, HEADS = 24, 3
CLOSE = dict(atol=1e-6, rtol=0)


def make(context_dim=None, bias=True, seed=0):
    torch.manual_seed(seed)
    attention = Attention(WIDTH, HEADS, context_dim, bias=bias)
    for name, parameter in attention.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter)
    return attention.requires_grad_(False)


def torch_twin(attention):
    """torch's own attention with the same weights."""
    context_dim, bias = attention.to_k.in_features, attention.to_q.bias is not None
    twin = nn.MultiheadAttention(
        WIDTH, HEADS, bias=bias, kdim=context_dim, vdim=context_dim, batch_first=True
    ).requires_grad_(False)
    qkv = attention.to_q, attention.to_k, attention.to_v
    if context_dim == WIDTH:
        twin.in_proj_weight.copy_(torch.cat([linear.weight for linear in qkv]))
    else:
        twin.q_proj_weight.copy_(qkv[0].weight)
        twin.k_proj_weight.copy_(qkv[1].weight)
        twin.v_proj_weight.copy_(qkv[2].weight)
    if bias:
        twin.in_proj_bias.copy_(torch.cat([linear.bias for linear in qkv]))
    twin.out_proj.load_state_dict(attention.to_out.state_dict())
    return twin


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context_dim", [None, 10])
@pytest.mark.parametrize("masked", [True, False])
def test_equals_torch_multihead_attention(bias, context_dim, masked):
    attention = make(context_dim, bias)
    x = torch.randn(2, 7, WIDTH)
    context = x if context_dim is None else torch.randn(2, 5, context_dim)
    mask = torch.rand(context.shape[:2]) < 0.6 if masked else None
    if masked:
        mask[:, 0] = True
    padding = None if mask is None else ~mask
    theirs, _ = torch_twin(attention)(x, context, context, key_padding_mask=padding, need_weights=False)
    ours = attention(x, None if context_dim is None else context, mask)
    torch.testing.assert_close(ours, theirs, **CLOSE)


def test_a_masked_token_contributes_exactly_nothing():
    attention = make(context_dim=10)
    x, context = torch.randn(2, 7, WIDTH), torch.randn(2, 5, 10)
    mask = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 0, 0]])  # 0/1 does as well as bool
    other = context.clone()
    other[:, 3:] = 1e4 * torch.randn(2, 2, 10)
    out = attention(x, context, mask)
    assert torch.equal(out, attention(x, other, mask))
    torch.testing.assert_close(out, attention(x, context[:, :3]), **CLOSE)
    assert not torch.allclose(out, attention(x, context))


@pytest.mark.parametrize("masked", [True, False])
def test_attention_map_is_what_attend_applies(masked):
    attention = make()
    q, k, v = attention.project(torch.randn(2, 7, WIDTH))
    mask = torch.arange(7).expand(2, 7) < 4 if masked else None
    a = attention.attention_map(q, k, mask)
    torch.testing.assert_close(a.sum(-1), torch.ones(2, HEADS, 7), **CLOSE)
    torch.testing.assert_close(a @ v, attention.attend(q, k, v, mask), **CLOSE)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("context_dim", [None, 10])
def test_dictionary_view_is_the_attention(bias, context_dim):
    """Eq. 7, and a head's coefficients sum to one, which lets atoms carry the biases."""
    attention = make(context_dim, bias)
    x = torch.randn(7, WIDTH)
    context = None if context_dim is None else torch.randn(5, context_dim)
    tokens = 7 if context is None else 5
    coefficients, dictionary = attention_as_dictionary(attention, x, context)
    assert coefficients.shape == (7, tokens * HEADS) and dictionary.shape == (tokens * HEADS, WIDTH)
    out = attention(x[None], None if context is None else context[None])[0]
    torch.testing.assert_close(coefficients @ dictionary, out, **CLOSE)
    sums = coefficients.unflatten(1, (HEADS, tokens)).sum(-1)
    torch.testing.assert_close(sums, torch.ones(7, HEADS), **CLOSE)


def test_dictionary_atoms_are_x_w_vo():
    """W_vo⁽ʰ⁾ = W_v⁽ʰ⁾ W_o⁽ʰ⁾ᵀ written with the paper's slices, no biases."""
    attention = make(bias=False)
    x = torch.randn(7, WIDTH)
    _, dictionary = attention_as_dictionary(attention, x)
    w_v, w_o = attention.to_v.weight.T, attention.to_out.weight  # (C_i, C_o), (C_o, C_o)
    d = WIDTH // HEADS
    for h in range(HEADS):
        w_vo = w_v[:, h * d : (h + 1) * d] @ w_o[:, h * d : (h + 1) * d].T  # (C_i, C_o)
        torch.testing.assert_close(dictionary[h * 7 : (h + 1) * 7], x @ w_vo, **CLOSE)


def test_refuses_a_width_that_heads_do_not_divide():
    with pytest.raises(UserError, match="width 10 does not split over 4 heads"):
        Attention(10, 4)
