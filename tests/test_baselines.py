"""LoRA, DoRA and OFT against peft with the same values, against their formulas, and counted at real size."""

import pytest
import torch
from torch import nn

from sparsecode import Attention, UserError, attach, detach, trainable
from sparsecode.baselines import OFT, AdaptedLinear, DoRA, LoRA

WIDTH_IN, WIDTH_OUT = 24, 32


def build(method, bias=True, trained=True, **options):
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH_IN, WIDTH_OUT, bias=bias)
    module = AdaptedLinear(linear.requires_grad_(False), method(linear, **options))
    if trained:
        for parameter in module.adapter.parameters():
            parameter.data += 0.2 * torch.randn_like(parameter)
    return module


def relative(ours, theirs):
    return ((ours - theirs).norm() / theirs.norm()).item()


class Holder(nn.Module):
    """peft wants a model with a named Linear in it."""

    def __init__(self, linear):
        super().__init__()
        self.to_q = nn.Linear(linear.in_features, linear.out_features, bias=linear.bias is not None)
        self.to_q.load_state_dict(linear.state_dict())

    def forward(self, x):
        return self.to_q(x)


def lora_in_peft(peft, module, dora):
    adapter = module.adapter
    config = peft.LoraConfig(
        r=adapter.r, lora_alpha=adapter.alpha, use_dora=dora, target_modules="to_q", lora_dropout=0.0
    )
    theirs = peft.get_peft_model(Holder(module.base), config)
    layer = theirs.base_model.model.to_q
    layer.lora_A["default"].weight.data.copy_(adapter.A)
    layer.lora_B["default"].weight.data.copy_(adapter.B)
    pairs = [(adapter.A, layer.lora_A["default"].weight), (adapter.B, layer.lora_B["default"].weight)]
    if dora:
        magnitude = layer.lora_magnitude_vector["default"].weight
        magnitude.data.copy_(adapter.m)
        pairs.append((adapter.m, magnitude))
    return theirs, pairs


@pytest.mark.parametrize("method", [LoRA, DoRA])
@pytest.mark.parametrize("bias", [True, False])
def test_lora_and_dora_equal_peft(method, bias):
    """Outputs and gradients, which for DoRA depend on the norm being held constant: 2e-5 relative."""
    peft = pytest.importorskip("peft")
    module = build(method, bias, r=4, alpha=6)
    theirs, pairs = lora_in_peft(peft, module, dora=method is DoRA)
    x = torch.randn(5, 7, WIDTH_IN)
    ours_y, theirs_y = module(x), theirs(x)
    assert relative(ours_y, theirs_y) < 2e-5
    assert relative(ours_y, module.base(x)) > 0.1
    weight = torch.randn_like(ours_y)
    (ours_y * weight).sum().backward()
    (theirs_y * weight).sum().backward()
    for ours, reference in pairs:
        assert relative(ours.grad, reference.grad) < 2e-5


@pytest.mark.parametrize("bias", [True, False])
def test_oft_equals_peft(bias):
    """peft stores the upper triangle of Q; asked for the exact Cayley transform it gives the same: 2e-5."""
    peft = pytest.importorskip("peft")
    module = build(OFT, bias, blocks=4)
    config = peft.OFTConfig(r=4, oft_block_size=0, target_modules="to_q", use_cayley_neumann=False)
    theirs = peft.get_peft_model(Holder(module.base), config)
    P = module.adapter.P.detach()
    width = P.shape[-1]
    rows, columns = torch.triu_indices(width, width, 1)
    upper = ((P - P.transpose(1, 2)) / 2)[:, rows, columns]
    theirs.base_model.model.to_q.oft_R["default"].weight.data.copy_(upper)
    x = torch.randn(5, 7, WIDTH_IN)
    assert relative(module(x), theirs(x)) < 2e-5
    assert relative(module(x), module.base(x)) > 0.1


def test_lora_is_an_added_product():
    module = build(LoRA, r=4, alpha=6)
    x = torch.randn(5, WIDTH_IN)
    a, b, linear = module.adapter.A, module.adapter.B, module.base
    expected = x @ (linear.weight + 6 / 4 * b @ a).T + linear.bias
    torch.testing.assert_close(module(x), expected, atol=1e-5, rtol=0)


def test_dora_scales_every_row_to_its_magnitude():
    """The effective weight's rows have the norms m, and the bias is not scaled."""
    module = build(DoRA, r=4, alpha=6)
    bias = module(torch.zeros(1, WIDTH_IN))  # y at 0
    torch.testing.assert_close(bias[0], module.base.bias, atol=1e-6, rtol=0)
    weight = (module(torch.eye(WIDTH_IN)) - bias).T  # (C_o, C_i)
    torch.testing.assert_close(weight.norm(dim=1), module.adapter.m.abs(), atol=1e-5, rtol=0)


def test_oft_rotates():
    """R is orthogonal with determinant 1, so each input block keeps its length: 1e-5 in float32."""
    adapter = build(OFT, blocks=3).adapter
    rotation = adapter.rotation()
    eye = torch.eye(WIDTH_IN // 3).expand(3, -1, -1)
    torch.testing.assert_close(rotation @ rotation.transpose(1, 2), eye, atol=1e-5, rtol=0)
    torch.testing.assert_close(rotation.det(), torch.ones(3), atol=1e-5, rtol=0)
    assert (rotation - eye).norm() > 1


@pytest.mark.parametrize("method", [LoRA, DoRA, OFT])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fresh_is_silent_to_the_bit(method, bias, dtype):
    """LoRA adds an exact 0. DoRA's m is the very norm it divides by, and x/x is exactly 1. OFT's R is
    exactly I, and products with 1 and sums with 0 do not round."""
    module = build(method, bias, trained=False)
    module.base.to(dtype)
    if method is DoRA:  # the model is cast before the adapter is made, as `attach` finds it
        module.adapter = DoRA(module.base)
    for tokens in (1, 7, 64):
        x = torch.randn(2, tokens, WIDTH_IN).to(dtype)
        assert torch.equal(module(x), module.base(x))


def test_a_row_of_zeros_is_silent_in_dora_and_can_be_trained():
    torch.manual_seed(0)
    linear = nn.Linear(WIDTH_IN, WIDTH_OUT).requires_grad_(False)
    linear.weight[3] = 0
    module, x = AdaptedLinear(linear, DoRA(linear, r=4)), torch.randn(5, WIDTH_IN)
    assert torch.equal(module(x), linear(x))
    module(x).sum().backward()
    assert all(parameter.grad.isfinite().all() for parameter in module.adapter.parameters())
    assert module.adapter.B.grad[3].any()


@pytest.mark.parametrize("method", [DoRA, OFT])
def test_what_is_computed_once_follows_every_change(method, monkeypatch):
    """As often as parameters change, and always the value of a fresh computation."""
    name = {DoRA: "row_norms", OFT: "rotation"}[method]
    calls, compute = [], getattr(method, name)
    monkeypatch.setattr(method, name, lambda self, *args: calls.append(1) or compute(self, *args))
    module, other, x = build(method), build(method, trained=False), torch.randn(5, WIDTH_IN)

    def check(n):
        calls.clear()
        with torch.no_grad():
            ours = [module(x.to(module.base.weight.dtype)) for _ in range(3)]
        assert len(calls) == n
        plain = module(x.to(module.base.weight.dtype))  # with gradients it is computed
        assert len(calls) == n + 1 and all(torch.equal(y, plain) for y in ours)
        return plain

    first = check(1)
    check(0)
    module.adapter.load_state_dict(other.adapter.state_dict())
    assert not torch.equal(check(1), first)
    optimizer = torch.optim.SGD(module.adapter.parameters(), lr=0.1)
    check(0).sum().backward()
    optimizer.step()
    check(1)
    module.double()
    check(1)
    if method is DoRA:
        with torch.no_grad():
            module.base.weight.mul_(2)
        check(1)
        module.base.float()
        check(1)
        module.base.double()
    with torch.inference_mode():
        module(x.double())
    module(x.double()).sum().backward()


@pytest.mark.parametrize("method", [LoRA, DoRA, OFT])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_cast_of_the_model_leaves_the_adapter_in_float32(method, dtype):
    module, x = build(method), torch.randn(5, WIDTH_IN)
    expected = module(x)
    module.to(dtype)
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}
    assert relative(module(x.to(dtype)).float(), expected) < 0.02


@pytest.mark.parametrize("method", [LoRA, DoRA, OFT])
def test_bfloat16_model_keeps_float32_parameters(method):
    """A few roundings to bf16's 8 bits: below two percent of the output."""
    module = build(method)
    x = torch.randn(5, 7, WIDTH_IN)
    expected = module(x)
    module.base.to(torch.bfloat16)
    out = module(x.to(torch.bfloat16))
    assert out.dtype == torch.bfloat16 and relative(out.float(), expected) < 0.02
    assert {p.dtype for p in module.adapter.parameters()} == {torch.float32}


@pytest.mark.parametrize("method", [LoRA, DoRA, OFT])
def test_gradients_reach_the_adapter_and_nothing_else(method):
    module = build(method)
    module(torch.randn(5, WIDTH_IN)).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in module.adapter.parameters())
    assert all(parameter.grad is None for parameter in module.base.parameters())


def test_parameter_counts_at_the_size_of_pixart():
    """28 self-attentions of width 1152, on the meta device; §4.3 says about 4M, 4M, 37M and 17M."""
    with torch.device("meta"):
        model = nn.ModuleList(nn.ModuleDict({"attn1": Attention(1152, 16)}) for _ in range(28))
        counts = {}
        for method in ("lora", "dora", "oft", "sparse"):
            attach(model, method)
            counts[method] = sum(parameter.numel() for parameter in trainable(model))
            detach(model)
    r, width, linears = 16, 1152, 28 * 4
    assert counts["lora"] == linears * 2 * width * r == 4_128_768
    assert counts["dora"] == counts["lora"] + linears * width == 4_257_792
    assert counts["oft"] == linears * 4 * (width // 4) ** 2 == 37_158_912
    assert counts["sparse"] == 28 * 2 * width * 256 == 16_515_072


def test_parameter_counts_of_peft_at_the_size_of_pixart():
    """The same for LoRA and DoRA; for OFT it stores the part above the diagonal of each skew-symmetric Q: half."""
    peft = pytest.importorskip("peft")
    projections = ["to_q", "to_k", "to_v", "to_out"]
    configs = {
        "lora": peft.LoraConfig(r=16, target_modules=projections),
        "dora": peft.LoraConfig(r=16, use_dora=True, target_modules=projections),
        "oft": peft.OFTConfig(r=4, oft_block_size=0, target_modules=projections),
    }
    counts = {}
    for method, config in configs.items():
        with torch.device("meta"):
            model = nn.ModuleList(nn.ModuleDict({"attn1": Attention(1152, 16)}) for _ in range(28))
            counts[method] = peft.get_peft_model(model, config).get_nb_trainable_parameters()[0]
    b = 1152 // 4
    assert counts == {"lora": 4_128_768, "dora": 4_257_792, "oft": 28 * 4 * 4 * b * (b - 1) // 2}
    assert counts["oft"] == 18_514_944


REFUSED = [(LoRA, dict(r=0)), (DoRA, dict(r=-1)), (OFT, dict(blocks=5)), (LoRA, dict(r=True)), (LoRA, dict(r=1.5))]
REFUSED += [(OFT, dict(blocks=2.0)), (LoRA, dict(alpha=float("nan"))), (DoRA, dict(alpha=float("inf")))]


@pytest.mark.parametrize("method, options", REFUSED)
def test_refuses_what_makes_no_sense(method, options):
    (name, value), linear = *options.items(), nn.Linear(WIDTH_IN, WIDTH_OUT)
    with pytest.raises(UserError, match=f"{name}={value}"):
        method(linear, **options)
