"""Several adapters on one model: what each adds is added up, and one alone is what it was, to the bit."""

import copy

import pytest
import torch
from small_model import shake, small_inputs
from test_attach import make
from test_kinds import CLOSE, Coder, diffusers_attention, inputs, multihead, randomize
from torch import nn

from sparsecode import (
    Attention,
    UserError,
    adapters,
    attach,
    detach,
    importance,
    keep_atoms,
    load_adapter,
    only_atoms,
    record_usage,
    save_adapter,
    set_density,
    set_scale,
    top_atoms,
    trainable,
)

WAYS = {
    "sparse": dict(atoms=16, density=0.25),
    "other sparse": dict(atoms=32, threshold="soft", lam=0.2, order="after"),
    "lora": dict(r=4, alpha=8),
    "other lora": dict(r=2),
    "dora": dict(r=2),
    "oft": dict(blocks=2),
}
PAIRS = [("sparse", "other sparse"), ("sparse", "lora"), ("lora", "sparse"), ("lora", "other lora"), ("dora", "oft")]


@pytest.fixture
def files(tmp_path):
    """Adapter files for a model: files(build, names, target) makes a file of each name in WAYS."""

    def write(build, names, target):
        paths = []
        for seed, name in enumerate(names):
            torch.manual_seed(seed)
            shake(attach(model := build(), name.split()[-1], target, **WAYS[name]))
            save_adapter(model, tmp_path / f"{name}.safetensors")
            paths.append(tmp_path / f"{name}.safetensors")
        return paths

    return write


class Ours(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = Attention(8, 4)

    def forward(self, x):
        return self.attention(x)


class Multihead(nn.Module):
    def __init__(self):
        super().__init__()
        self.attention = multihead().attention

    def forward(self, x):
        return self.attention(x, x, x)[0]


# The three kinds of attention; what is sparse goes on each, the others on the projections of two of them.
KINDS = {"ours": lambda: randomize(Ours()), "torch": lambda: randomize(Multihead()), "diffusers": diffusers_attention}
CASES = [(kind, pair) for kind in KINDS for pair in PAIRS if kind != "torch" or pair == PAIRS[0]]


def one_attention(kind):
    return KINDS[kind]()


@pytest.mark.parametrize("kind, pair", CASES)
def test_at_scale_0_the_other_is_alone_to_the_bit(kind, pair, files):
    paths = files(lambda: one_attention(kind), pair, "attention")
    torch.manual_seed(9)
    x = torch.randn(2, 5, 8)
    before, alone = one_attention(kind)(x), []
    for path in paths:
        load_adapter(model := one_attention(kind), path)
        alone.append(model(x))
    modules = dict((model := one_attention(kind)).named_modules())
    for path in paths:
        load_adapter(model, path)
    both = model(x)
    assert all((both - one).abs().max() > 0.01 for one in (before, *alone))
    assert torch.equal(copy.deepcopy(model)(x), both)
    for scales, expected in (([1, 0], alone[0]), ([0, 1], alone[1]), (0, before), ([0], before), (1, both)):
        set_scale(model, scales)
        assert torch.equal(model(x), expected)
    detach(model)
    after = dict(model.named_modules())
    assert list(after) == list(modules) and all(after[name] is module for name, module in modules.items())
    assert torch.equal(model(x), before)


@pytest.mark.parametrize("kind", KINDS)
def test_two_sparse_ones_add_what_each_adds(kind, files):
    """output(a, b) − O = s_a ΔO_a + s_b ΔO_b of one input, with as many atoms as each has."""
    paths = files(lambda: one_attention(kind), PAIRS[0], "attention")
    x = torch.randn(2, 5, 8)
    base, deltas = one_attention(kind)(x), []
    for path in paths:
        load_adapter(model := one_attention(kind), path)
        deltas.append(model(x) - base)
    load_adapter(model, paths[0])  # the second is there already
    set_scale(model, [0.6, -2])
    expected = base + 0.6 * deltas[1] - 2 * deltas[0]
    torch.testing.assert_close(model(x), expected, **CLOSE)
    naive = model.attention.forward_naive(*[x] * (3 if kind == "torch" else 1))
    torch.testing.assert_close(naive[0] if kind == "torch" else naive, expected, **CLOSE)


@pytest.mark.parametrize("kind", ["ours", "diffusers"])
@pytest.mark.parametrize("order", [1, -1])
def test_a_sparse_one_and_lora_are_the_written_formula(kind, order, files):
    """W + s (α/r) B A in all four places, and A σ(X W_s) D with the attention map of that, whichever comes first."""
    paths = files(lambda: one_attention(kind), ["sparse", "lora"], "attention")
    x = torch.randn(2, 5, 8)
    model, scales = one_attention(kind), {"sparse": 0.7, "lora": 1.5}
    for path in paths[::order]:
        load_adapter(model, path)
    set_scale(model, list(scales.values())[::order])
    found = adapters(model)
    sparse = found.pop("attention")
    changed = one_attention(kind)
    for name, lora in found.items():
        changed.get_submodule(name).weight += 1.5 * 8 / 4 * (lora.B @ lora.A).detach()
    q, k = changed.attention.to_q(x), changed.attention.to_k(x)  # (B, N, C)
    heads = changed.attention.heads
    q, k, z = (y.unflatten(-1, (heads, -1)).transpose(1, 2) for y in (q, k, sparse.encode(x)))  # (B, H, N, ·)
    maps = (q @ k.transpose(2, 3) / q.shape[-1] ** 0.5).softmax(-1)  # (B, H, N, N)
    delta = (maps @ z).transpose(1, 2).flatten(2) @ sparse.D  # (B, N, C)
    torch.testing.assert_close(model(x), changed(x) + 0.7 * delta, **CLOSE)


def test_two_loras_add_their_products(files):
    paths = files(lambda: one_attention("ours"), ["lora", "other lora"], "attention")
    model = one_attention("ours")
    for path in paths:
        load_adapter(model, path)
    set_scale(model, [1, 0.6])
    linear, x = model.attention.to_q, torch.randn(5, 8)
    first, second = adapters(model)["attention.to_q"], adapters(model)["attention.to_q#2"]
    weight = linear.base.weight + 8 / 4 * first.B @ first.A + 0.6 * 16 / 2 * second.B @ second.A
    torch.testing.assert_close(linear(x), x @ weight.T + linear.base.bias, **CLOSE)


@pytest.mark.parametrize("pair", PAIRS, ids=" + ".join)
def test_the_order_of_loading_does_not_matter(pair, files):
    """The first on all attentions, the second on one of four."""
    paths = [*files(make, pair[:1], "attn"), *files(make, pair[1:], "1.attn1")]
    results = []
    for order in (1, -1):
        model = make()
        for path in paths[::order]:
            load_adapter(model, path)
        set_scale(model, [1, 0.6][::order])
        torch.manual_seed(0)
        results.append(model(*small_inputs()))
    torch.testing.assert_close(*results, **CLOSE)


@pytest.mark.parametrize("scales", [[1, 1], [0, 1]])
def test_no_fast_path_goes_past_the_second(scales, files):
    paths = files(lambda: randomize(Coder()), PAIRS[0], "attn")
    model = randomize(Coder())
    before = model(*inputs())
    for path in paths:
        load_adapter(model, path)
    set_scale(model, scales)
    with torch.no_grad():
        fast = model(*inputs())
    torch.testing.assert_close(fast, model.train()(*inputs()), **CLOSE)
    assert (fast - before).abs().max() > 0.01


@pytest.mark.parametrize("target", ["attn", "linear"])
def test_a_fast_path_is_free_beside_a_sparse_one_of_scale_0(target, files):
    """LoRA is in the weights that it reads, so it gives the very numbers that it gives for LoRA alone."""
    (sparse,), (lora,) = (
        files(lambda: randomize(Coder()), [name], where) for name, where in (("sparse", "attn"), ("lora", target))
    )
    alone, model = randomize(Coder()), randomize(Coder())
    load_adapter(alone, lora), load_adapter(model, sparse), load_adapter(model, lora)
    set_scale(model, [0, 1])
    with torch.no_grad():
        assert torch.equal(model(*inputs()), alone(*inputs()))


def test_what_is_meant_for_one_is_refused(files, tmp_path):
    model = make()
    for path in files(make, PAIRS[0], "attn1"):
        load_adapter(model, path)
    parameters = list(model.parameters())
    assert len(trainable(model)) == 8 and all(p.requires_grad for p in trainable(model))
    refused = [lambda: set_density(model, 0.5), lambda: keep_atoms(model, 3), lambda: importance(model)]
    refused += [lambda: top_atoms(model, 3), lambda: only_atoms(model, {}), lambda: record_usage(model).__enter__()]
    for call in refused:
        with pytest.raises(UserError, match="^2 adapters are attached; detach them and load the one whose atoms"):
            call()
    with pytest.raises(UserError, match="^2 adapters are attached, a file holds one"):
        save_adapter(model, tmp_path / "both.safetensors")
    with pytest.raises(UserError, match="already; detach them first"):
        attach(model, target="attn2")
    for scales, message in (
        [[1, 2, 3], "there are 3 scales for 2 adapters"],
        [[], "0 scales"],
        [[1, "2"], "'2' is not"],
    ):
        with pytest.raises(UserError, match=message):
            set_scale(model, scales)
    assert all(adapter.scale == 1 for adapter in adapters(model).values())
    assert all(one is other for one, other in zip(parameters, model.parameters(), strict=True))
    assert not (tmp_path / "both.safetensors").exists()
    detach(model)
    assert not adapters(model) and not trainable(model)


def test_a_second_that_is_refused_leaves_the_first(files, tmp_path):
    (path,) = files(make, ["sparse"], "attn1")
    load_adapter(model := make(), path)
    (broken := tmp_path / "broken.safetensors").write_bytes(path.read_bytes()[:-50])
    expected = model(*(x := small_inputs()))
    with pytest.raises(UserError, match="cannot be read"):
        load_adapter(model, broken)
    assert torch.equal(model(*x), expected)
