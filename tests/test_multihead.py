"""LoRA, DoRA and OFT on the projections of nn.MultiheadAttention, against the module itself with changed weights."""

import copy
import warnings

import pytest
import torch
from small_model import shake
from test_kinds import CLOSE, OPTIONS, PADDING, Coder, Holder, inputs, multihead, randomize, torch_cases

from sparsecode import (
    Attention,
    UserError,
    adapters,
    attach,
    detach,
    load_adapter,
    save_adapter,
    set_scale,
    trainable,
)

METHODS = {"lora": dict(r=2, alpha=3), "dora": dict(r=2, alpha=3), "oft": dict(blocks=1)}
methods = pytest.mark.parametrize("method", METHODS)
PARTS = [f"attention.{part}_proj" for part in ("q", "k", "v", "out")]


def adapted(model, method, target="attention"):
    """Changed in all four places, but not so much that attention is all on one token."""
    attach(model, method, target, **METHODS[method])
    torch.manual_seed(3)
    shake(adapters(model).values())
    return model


def changed_weight(weight, adapter):
    """The adapted W as §4.3's papers write it."""
    if adapter.method == "oft":
        q = torch.block_diag(*(adapter.P - adapter.P.transpose(1, 2)) / 2)
        eye = torch.eye(len(q))
        return weight @ ((eye - q) @ torch.linalg.inv(eye + q)).T
    change = weight + 3 / 2 * adapter.B @ adapter.A
    return change if adapter.method == "lora" else adapter.m[:, None] * change / change.norm(dim=1, keepdim=True)


@torch.no_grad()
def with_changed_weights(attention, found):
    """A copy of an nn.MultiheadAttention with all four weights adapted."""
    other, weights = (
        copy.deepcopy(attention),
        [attention.q_proj_weight, attention.k_proj_weight, attention.v_proj_weight],
    )
    if attention.in_proj_weight is not None:
        weights = attention.in_proj_weight.chunk(3)
    new = [changed_weight(weight, found[name]) for weight, name in zip(weights, PARTS)]
    if attention.in_proj_weight is not None:
        other.in_proj_weight.copy_(torch.cat(new))
    else:
        for name, weight in zip("qkv", new):
            getattr(other, f"{name}_proj_weight").copy_(weight)
    other.out_proj.weight.copy_(changed_weight(attention.out_proj.weight, found[PARTS[3]]))
    return other


@methods
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("case", torch_cases())
def test_silent_and_then_the_module_with_changed_weights(case, training, method):
    config, tokens, options = torch_cases()[case]
    model = multihead(batch_first=True, **config).train(training)
    base = model.attention
    frozen = model(*tokens, **options)[0]
    model.requires_grad_(training)  # as before `attach`: PyTorch takes another kernel where no weight wants gradients
    with torch.set_grad_enabled(training):
        before = model(*tokens, **options)
        attach(model, method, target="attention", **METHODS[method])
        for got, want in zip(model(*tokens, **options), before):
            assert torch.equal(got, want) if want is not None else got is None
        shake(adapters(model).values())
        assert sorted(adapters(model)) == sorted(PARTS)
        after = model(*tokens, **options)
        for got, want in zip(after, with_changed_weights(base, adapters(model))(*tokens, **options)):
            assert got is want or torch.testing.assert_close(got, want, **CLOSE) is None
        assert (after[0] - before[0]).abs().max() > 0.01
        set_scale(model, 0)
        assert torch.equal(model(*tokens, **options)[0], frozen)
        detach(model)
        assert model.attention is base and torch.equal(model(*tokens, **options)[0], frozen)


@methods
def test_equals_the_same_adapter_on_an_attention_of_four_linears(method):
    model = multihead()
    ours, torchs = Holder(Attention(8, 4)), model.attention
    for name, weight, bias in zip("qkv", torchs.in_proj_weight.chunk(3), torchs.in_proj_bias.chunk(3)):
        getattr(ours.attention, f"to_{name}").load_state_dict({"weight": weight, "bias": bias})
    ours.attention.to_out.load_state_dict(torchs.out_proj.state_dict())
    x, mask = torch.randn(2, 5, 8), ~PADDING
    torch.testing.assert_close(ours(x, mask=mask), model(x, x, x, key_padding_mask=PADDING)[0], **CLOSE)
    adapted(model, method), attach(ours, method, "attention", **METHODS[method])
    for part in ("q", "k", "v", "out"):
        values = adapters(model)[f"attention.{part}_proj"].state_dict()
        adapters(ours)[f"attention.to_{part}"].load_state_dict(values)
    for scale in (1, 0.6):
        set_scale(model, scale), set_scale(ours, scale)
        if method == "lora" or scale == 1:  # DoRA and OFT in PyTorch's attention blend weights
            theirs = model(x, x, x, key_padding_mask=PADDING)[0]
            torch.testing.assert_close(theirs, ours(x, mask=mask), **CLOSE)


@methods
def test_training_reaches_the_adapters_alone_and_a_file_gives_them_back(method, tmp_path):
    model = randomize(Coder())
    modules = dict(model.named_modules())
    attach(model, method, target="attn", **METHODS[method])
    assert len(adapters(model)) == 6 * 4 and len({id(p) for p in trainable(model)}) == len(trainable(model))
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(2):
        model(*inputs()).square().mean().backward()
        optimizer.step()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model))
    assert all(torch.equal(value, base[name]) for name, value in model.named_parameters() if not value.requires_grad)
    save_adapter(model, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other weights would be a warning
        warnings.filterwarnings("ignore", "The PyTorch API of nested tensors")
        load_adapter(other := randomize(Coder()), tmp_path / "a.safetensors")
        with torch.no_grad():
            expected = model(*inputs())
            assert torch.equal(other(*inputs()), expected)
            assert torch.equal(copy.deepcopy(other)(*inputs()), expected)
    detach(model)
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())


@methods
def test_no_fast_path_goes_past_them(method):
    """In eval mode without gradients PyTorch's layers compute everything themselves, with the adapted weights."""
    model = randomize(Coder())
    with torch.no_grad():
        before = model(*inputs())
        attach(model, method, target="attn", **METHODS[method])
        assert torch.equal(model(*inputs()), before)
        torch.manual_seed(3)
        shake(list(adapters(model).values())[4:])  # the first layer's stay silent
        fast = model(*inputs())
    torch.testing.assert_close(fast, model(*inputs()), **CLOSE)  # with gradients
    torch.testing.assert_close(fast, model.train()(*inputs()), **CLOSE)  # never a fast path
    assert (fast - before).abs().max() > 0.01


@pytest.mark.parametrize("order", [1, -1])
def test_beside_a_sparse_one(order, tmp_path):
    """O and A are those of the module with LoRA's weights, whichever was loaded first."""
    x = torch.randn(2, 5, 8)
    save_adapter(lora := adapted(multihead(), "lora"), tmp_path / "lora")
    torch.manual_seed(4)
    shake(attach(sparse := multihead(), target="attention", **OPTIONS))
    save_adapter(sparse, tmp_path / "sparse")
    model = multihead()
    base = model.attention
    for name in ["lora", "sparse"][::order]:
        load_adapter(model, tmp_path / name)
    found = adapters(model)
    sparse = found.pop("attention")
    changed = with_changed_weights(base, found)
    o, maps = changed(x, x, x, average_attn_weights=False)
    z = sparse.encode(x).unflatten(-1, (4, -1)).transpose(1, 2)  # (B, H, L, M/H)
    delta = (maps @ z).transpose(1, 2).flatten(2) @ sparse.D
    torch.testing.assert_close(model(x, x, x)[0], o + delta, **CLOSE)
    with torch.no_grad():
        set_scale(model, [1, 0][::order])
        assert torch.equal(model(x, x, x)[0], lora(x, x, x)[0])
    detach(model)
    assert model.attention is base


def test_two_on_one(tmp_path):
    model, x = multihead(), torch.randn(2, 5, 8)
    save_adapter(adapted(multihead(), "lora"), tmp_path / "a")
    for _ in range(2):
        load_adapter(model, tmp_path / "a")
    set_scale(model, 0.5)  # half of each
    load_adapter(one := multihead(), tmp_path / "a")
    torch.testing.assert_close(model(x, x, x)[0], one(x, x, x)[0], **CLOSE)


def test_peft_is_refused(tmp_path):
    with pytest.raises(UserError, match="peft adapts nn.MultiheadAttention in a way of its own"):
        save_adapter(adapted(multihead(), "lora"), tmp_path / "a", layout="peft")
    assert not list(tmp_path.iterdir())
