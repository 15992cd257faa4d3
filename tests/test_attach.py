import pytest
import torch
from small_model import SmallConfig, SmallModel, shake, small_inputs

from sparsecode import UserError, adapters, attach, detach, trainable

OPTIONS = {
    "sparse": dict(atoms=16, density=0.25),
    "lora": dict(r=4, alpha=8),
    "dora": dict(r=4, alpha=8),
    "oft": dict(blocks=2),
}
methods = pytest.mark.parametrize("method", OPTIONS)


def make(seed=0, **config):
    torch.manual_seed(seed)
    return SmallModel(SmallConfig(**config))


def adapted(method="sparse", **options):
    model = make()
    shake(attach(model, method, **{**OPTIONS[method], **options}))
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return small_inputs()


@methods
def test_attach_adapts_what_matches_and_freezes_the_rest(method, inputs):
    model = make()
    before = model(*inputs)
    base = {name: parameter.clone() for name, parameter in model.named_parameters()}
    new = attach(model, method, **OPTIONS[method])
    sites = ["blocks.0.attn1", "blocks.1.attn1"]
    if method != "sparse":
        sites = [f"{site}.{part}" for site in sites for part in ("to_q", "to_k", "to_v", "to_out")]
    assert list(adapters(model)) == sites and list(adapters(model).values()) == new

    shake(new)
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    model(*inputs).square().sum().backward()
    optimizer.step()
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable(model)}
    assert {id(p) for p in model.parameters() if p.grad is not None} == {id(p) for p in trainable(model)}
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model))
    assert not torch.allclose(model(*inputs), before)
    detach(model)
    assert all(torch.equal(parameter, base[name]) for name, parameter in model.named_parameters())


def test_target_is_searched_in_the_dotted_name():
    model = make()
    attach(model, target=r"1\.attn", **OPTIONS["sparse"])
    assert list(adapters(model)) == ["blocks.1.attn1", "blocks.1.attn2"]
    assert adapters(model)["blocks.1.attn2"].W_s.shape == (12, 16)  # codes come from the context, like V


def test_global_seed_decides_the_first_w_s():
    def first(seed):
        model = make()
        torch.manual_seed(seed)
        return attach(model, **OPTIONS["sparse"])[0].W_s

    assert torch.equal(first(3), first(3)) and not torch.equal(first(3), first(4))


@methods
def test_detach_gives_the_very_same_modules_back(method, inputs):
    model = make()
    modules, before = dict(model.named_modules()), model(*inputs)
    shake(attach(model, method, **OPTIONS[method]))
    detach(model)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is modules[name] for name in modules)
    assert torch.equal(model(*inputs), before)


def test_trainable_can_be_gone_through_twice():
    parameters = trainable(adapted())
    assert len(list(parameters)) == len(list(parameters)) == 4


@pytest.mark.parametrize(
    "method, options, message",
    [
        ("sprase", {}, "method='sprase' is unknown; choose one of sparse, lora, dora, oft"),
        ("lora", dict(rank=3), "lora has no option rank; it has r, alpha"),
        ("sparse", dict(r=3), "sparse has no option r; it has atoms, density, threshold, lam, order"),
        ("sparse", dict(heads=2), "sparse has no option heads"),
        ("sparse", dict(atoms=18), "atoms=18 does not split over 4 heads"),
        ("sparse", dict(target="attn3"), "named like 'attn3'; the model has blocks.0.attn1, "),
        ("sparse", dict(target="attn["), r"target='attn\[' is no regular expression"),
        ("lora", dict(target=["to_q", "to_k"]), r"target=\['to_q', 'to_k'\] is not text"),
        ("sparse", dict(target=None), "target=None is not text"),
        ("sparse", dict(atoms="16"), "atoms='16' does not split over 4 heads"),
        ("lora", dict(r=0), "r=0 is not a rank"),
        ("oft", dict(blocks=3), "blocks=3 does not divide width 32"),
    ],
)
def test_attach_refuses_and_leaves_the_model_alone(method, options, message):
    model = make()
    modules = list(model.modules())
    with pytest.raises(UserError, match=message):
        attach(model, method, **options)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_attach_refuses_a_second_time():
    model = adapted()
    with pytest.raises(UserError, match="attached to this model already; detach"):
        attach(model, "lora", target="attn2")


@methods
def test_inference_mode_is_no_place_to_attach(method):
    model = make()
    with torch.inference_mode(), pytest.raises(UserError, match="inside torch.inference_mode cannot be trained"):
        attach(model, method, **OPTIONS[method])
    assert not adapters(model)


class WithPatches(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.patches = torch.nn.Conv2d(3, 32, 2, stride=2)
        self.small = make()

    def forward(self, pictures, context):
        return self.small(self.patches(pictures).flatten(2).transpose(1, 2), context)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_target_without_attentions_names_linears(method):
    """And a Conv2d: both are silent when fresh, trained, and gone after detach."""
    torch.manual_seed(0)
    model, x = WithPatches(), (torch.randn(2, 3, 6, 4), torch.randn(2, 5, 12))
    before = model(*x)
    new = attach(model, method, target="mlp|patches|attn2.to_q", r=3)
    expected = ["patches", *(f"small.blocks.{i}.{name}" for i in range(2) for name in ("attn2.to_q", "mlp.0"))]
    assert list(adapters(model)) == expected and torch.equal(model(*x), before)
    shake(new)
    model(*x).square().sum().backward()
    assert all(parameter.grad.abs().max() > 0 for parameter in trainable(model))
    weights = {name: model.get_submodule(name).weight for name in expected}
    adapted = model(*x)
    detach(model)
    with torch.no_grad():
        for name, weight in weights.items():
            model.get_submodule(name).weight.copy_(weight)
    torch.testing.assert_close(model(*x), adapted, atol=1e-4, rtol=1e-4)


def test_linears_are_no_place_for_sparse_adapters_nor_a_convolution_for_oft():
    model = WithPatches()
    with pytest.raises(UserError, match="no attention is named like 'mlp'; the model has small.blocks.0.attn1"):
        attach(model, "sparse", target="mlp")
    with pytest.raises(UserError, match="oft .* cannot adapt a Conv2d"):
        attach(model, "oft", target="patches")
    with pytest.raises(UserError, match="no attention or Linear is named like 'nothing'"):
        attach(model, "lora", target="nothing")
    assert not adapters(model)


@pytest.mark.parametrize("unlike", [{"groups": 2}, {"dilation": 2}, {"padding": 1, "padding_mode": "circular"}])
def test_a_convolution_that_lora_cannot_continue_is_refused(unlike):
    """peft builds A without the dilation, so a file of its own would mean something else here."""
    model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3), torch.nn.Conv2d(4, 4, 3, **unlike))
    assert len(attach(model, "lora", target="0", r=2)) == 1
    detach(model)
    with pytest.raises(UserError, match="no attention or Linear is named like '1'"):
        attach(model, "lora", target="1", r=2)
