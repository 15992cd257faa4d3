import copy

import numpy as np
import pytest
import torch
from small_model import SmallModel, shake, small_inputs

from sparsecode import (
    UserError,
    adapters,
    attach,
    detach,
    importance,
    keep_atoms,
    orthogonality,
    record_maps,
    record_usage,
    set_density,
    top_atoms,
    trainable,
)

ATOMS = 16  # in each of two layers


def make(measured=True, **options):
    """A trained-looking model; the seed also fixes the adapters, whatever their options."""
    torch.manual_seed(0)
    model = SmallModel()
    shake(attach(model, **{"atoms": ATOMS, "density": 0.25, **options}))
    if measured:
        with record_usage(model), torch.no_grad():
            model(*small_inputs())
    return model


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return small_inputs()


def coefficients(adapter, attention, x):
    """S of one layer from its definition (order "before")."""
    q, k, _ = attention.project(x)
    codes = adapter.encode(x).unflatten(-1, (attention.heads, -1)).transpose(1, 2)  # (B, H, N, M/H)
    return (attention.attention_map(q, k) @ codes).transpose(1, 2).flatten(2)  # (B, N, M)


def test_usage_is_the_mean_size_of_s_over_all_tokens():
    """Over tokens, not over batches: three calls of unequal size. Sums of 60 numbers: 1e-6 relative."""
    model = make(measured=False)
    calls = [small_inputs(2, 9), small_inputs(1, 30), small_inputs(1, 4)]
    layer = model.blocks[0]["attn1"]
    sizes = [coefficients(layer.adapter, layer.base, x).abs().flatten(0, 1) for x, _ in calls]
    with record_usage(model):
        for call in calls:
            model(*call)
    expected = torch.cat(sizes).mean(0)
    torch.testing.assert_close(layer.adapter.usage, expected, atol=1e-7, rtol=1e-6)
    assert layer.adapter.usage.grad_fn is None and (layer.adapter.usage > 0).any()


def test_recording_ends_with_the_context_and_nothing_seen_changes_nothing(inputs):
    model = make()
    usage = adapters(model)["blocks.0.attn1"].usage.clone()
    model(*inputs)
    with record_usage(model):
        pass
    assert torch.equal(adapters(model)["blocks.0.attn1"].usage, usage)
    with pytest.raises(ZeroDivisionError), record_usage(model):
        1 / 0
    assert not adapters(model)["blocks.0.attn1"]._forward_hooks


def test_recording_does_not_change_the_output(inputs):
    model = make()
    expected = model(*inputs)
    with record_usage(model):
        assert torch.equal(model(*inputs), expected)


def test_importance_is_usage_times_norm():
    model = make()
    for name, score in importance(model).items():
        adapter = adapters(model)[name]
        by_hand = [adapter.usage[m] * adapter.D[m].square().sum().sqrt() for m in range(ATOMS)]
        torch.testing.assert_close(score, torch.stack(by_hand), rtol=1e-6, atol=0)


def test_importance_does_not_depend_on_how_an_atom_is_scaled(inputs):
    """Atom twice as long, its coefficient half: the same ΔO, the same importance."""
    model, other = (make(measured=False, density=1.0) for _ in range(2))
    adapter = other.blocks[0]["attn1"].adapter
    adapter.D.data[3] *= 2
    adapter.W_s.data[:, 3] /= 2
    for m in (model, other):
        with record_usage(m):
            m(*inputs)
    for ours, theirs in zip(importance(model).values(), importance(other).values()):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-6)


def test_importance_asks_to_record_first():
    with pytest.raises(UserError, match="never measured; run the model inside record_usage"):
        importance(make(measured=False))
    torch.manual_seed(0)
    fresh = SmallModel()
    attach(fresh, atoms=ATOMS)
    assert all((score == 0).all() for score in importance(fresh).values())


def test_keeping_no_atom_is_the_base_model_and_all_the_adapted_one(inputs):
    model = make(measured=False)
    full = model(*inputs)
    keep_atoms(model, 0)
    none = model(*inputs)
    for everything in (None, "all", 2 * ATOMS):
        keep_atoms(model, 0)
        keep_atoms(model, everything)
        assert torch.equal(model(*inputs), full)
    detach(model)
    assert torch.equal(model(*inputs), none)
    assert not torch.allclose(none, full)


@pytest.mark.parametrize("n", [1, 5, 20])
def test_keeps_the_n_most_important_of_the_whole_model(n, inputs):
    model, other = make(), make()
    model.blocks[1]["attn1"].adapter.D.data *= 3  # the layers should not share the n evenly
    other.blocks[1]["attn1"].adapter.D.data *= 3
    scores = importance(other)
    ranked = sorted((-scores[name][m].item(), name, m) for name in scores for m in range(ATOMS))
    with torch.no_grad():
        for _, name, m in ranked[n:]:
            adapters(other)[name].D[m] = 0
    keep_atoms(model, n)
    kept = {name: adapter.keep.sum().item() for name, adapter in adapters(model).items()}
    assert sum(kept.values()) == n and len(set(kept.values())) == 2
    assert torch.equal(model(*inputs), other(*inputs))


@pytest.mark.parametrize("n", [1, 5, 2 * ATOMS])
def test_top_atoms_are_those_that_are_kept(n):
    model = make()
    scores = importance(model)
    by_hand = sorted(((scores[name][m].item(), name, m) for name in scores for m in range(ATOMS)), reverse=True)
    best = top_atoms(model, n)
    assert best == [(name, m, score) for score, name, m in by_hand[:n]]
    keep_atoms(model, n)
    kept = {(name, m) for name, adapter in adapters(model).items() for m in range(ATOMS) if adapter.keep[m]}
    assert kept == {(name, m) for name, m, _ in best}


def test_counts_may_be_numpys():
    model, other = make(), make()
    assert top_atoms(model, np.int64(3)) == top_atoms(model, 3)
    keep_atoms(model, np.int64(3))
    keep_atoms(other, 3)
    assert all(torch.equal(a.keep, b.keep) for a, b in zip(adapters(model).values(), adapters(other).values()))


@pytest.mark.parametrize("n", [0, 2 * ATOMS + 1, "all", True])
def test_top_atoms_refuses_what_is_no_number_of_atoms(n):
    with pytest.raises(UserError, match="choose a number from 1 to 32"):
        top_atoms(make(), n)


def test_maps_are_the_coefficients_of_each_call():
    """S from its definition, which attends apart from the library's one pass: 1e-5 for sums of 30 numbers near 1."""
    model = make()
    calls = [small_inputs(2, 9), small_inputs(1, 30)]
    layer = model.blocks[0]["attn1"]
    with record_maps(model, {"blocks.0.attn1": [7, 2], "blocks.1.attn1": [0]}) as maps:
        for call in calls:
            model(*call)
    assert {name: [tuple(s.shape) for s in seen] for name, seen in maps.items()} == {
        "blocks.0.attn1": [(2, 9, 2), (1, 30, 2)],
        "blocks.1.attn1": [(2, 9, 1), (1, 30, 1)],
    }
    for (x, _), seen in zip(calls, maps["blocks.0.attn1"]):
        expected = coefficients(layer.adapter, layer.base, x)[..., [7, 2]]
        torch.testing.assert_close(seen, expected, atol=1e-5, rtol=1e-5)
        assert seen.grad_fn is None and seen.any()
    assert not any(adapter._forward_hooks for adapter in adapters(model).values())


def test_keep_can_grow_again(inputs):
    model, other = make(), make()
    keep_atoms(model, 2)
    keep_atoms(model, 9)
    keep_atoms(other, 9)
    assert torch.equal(model(*inputs), other(*inputs))


def test_use_is_measured_again_after_a_change_of_density_or_of_w_s(inputs):
    """Never ranked by old numbers; a cast and a copy change nothing of it."""
    model = make()
    for changed in (model, copy.deepcopy(model), make().to(torch.bfloat16)):
        expected = importance(changed)
        set_density(changed, 0.75)
        for ask in (importance, lambda m: keep_atoms(m, 3), lambda m: top_atoms(m, 3)):
            with pytest.raises(UserError, match="measured before their density or W_s changed; run .* again$"):
                ask(changed)
        keep_atoms(changed, "all")  # needs no ranking
        set_density(changed, 0.25)
        assert all(torch.equal(score, expected[name]) for name, score in importance(changed).items())
    optimizer = torch.optim.AdamW(trainable(model), lr=1e-6)
    model(*inputs).sum().backward()
    optimizer.step()
    with pytest.raises(UserError, match="again$"):
        importance(model)
    with record_usage(model), torch.no_grad():
        model(*inputs)
    assert importance(model)


@pytest.mark.parametrize("n", [-1, 2 * ATOMS + 1, "some", 1.5, True, np.float64(2)])
def test_keep_refuses_what_is_no_number_of_atoms(n):
    with pytest.raises(UserError, match="choose a number from 0 to 32, or 'all'"):
        keep_atoms(make(), n)


def test_set_density_is_the_model_attached_with_that_density(inputs):
    model, other = make(density=0.25), make(density=0.75)
    assert not torch.equal(model(*inputs), other(*inputs))
    set_density(model, 0.75)
    assert torch.equal(model(*inputs), other(*inputs))


def test_set_density_refuses_what_has_none():
    with pytest.raises(UserError, match="only top_k has a density to set; the threshold here is 'soft'"):
        set_density(make(threshold="soft", lam=0.1), 0.1)
    with pytest.raises(UserError, match="density=2 is not a share"):
        set_density(make(), 2)


def test_orthogonality_is_the_mean_squared_cosine():
    model = make(measured=False)
    cosines = [
        torch.cosine_similarity(adapter.D[i], adapter.D[j], dim=0).item() ** 2
        for adapter in adapters(model).values()
        for i in range(ATOMS)
        for j in range(ATOMS)
        if i != j
    ]
    assert orthogonality(model).item() == pytest.approx(sum(cosines) / len(cosines), rel=1e-5)


def test_orthogonality_is_0_for_orthogonal_and_1_for_parallel_atoms_of_any_length():
    model = make(measured=False)
    lengths = torch.rand(ATOMS, 1) + 0.1
    for adapter in adapters(model).values():
        adapter.D.data = torch.linalg.qr(torch.randn(32, ATOMS))[0].T * lengths
    assert orthogonality(model).item() < 1e-12
    for adapter in adapters(model).values():
        adapter.D.data = torch.randn(1, 32) * lengths
    assert orthogonality(model).item() == pytest.approx(1, rel=1e-5)


def test_orthogonality_can_be_trained_from_a_fresh_adapter_down_to_welchs_bound():
    """Twice as many atoms as channels: no unit vectors go below (M − C) / (C (M − 1)), tight frames reach it."""
    torch.manual_seed(0)
    model = SmallModel()
    attach(model, atoms=64)
    orthogonality(model).backward()
    for adapter in adapters(model).values():
        assert adapter.D.grad.isfinite().all()  # though the atoms have no direction yet
        adapter.D.data.normal_()
    optimizer = torch.optim.Adam([adapter.D for adapter in adapters(model).values()], lr=0.03)
    for _ in range(150):
        optimizer.zero_grad()
        loss = orthogonality(model)
        loss.backward()
        optimizer.step()
    assert loss.item() == pytest.approx((64 - 32) / (32 * 63), rel=1e-3)


@pytest.mark.parametrize(
    "call",
    [
        importance,
        orthogonality,
        lambda model: set_density(model, 0.1),
        lambda model: keep_atoms(model, 0),
        lambda model: record_usage(model).__enter__(),
        lambda model: record_maps(model, {}).__enter__(),
        lambda model: top_atoms(model, 1),
    ],
)
def test_atoms_exist_only_for_the_sparse_method(call):
    model = SmallModel()
    with pytest.raises(UserError, match="no adapter is attached"):
        call(model)
    attach(model, "lora", r=2)
    with pytest.raises(UserError, match="atoms exist only for the sparse method"):
        call(model)
