"""Appendix A in double precision against the polynomials themselves, and effects against models that are known."""

import pytest
import torch
from small_model import SmallModel, shake, small_inputs

from sparsecode import UserError, adapters, attach, effect, first_order, keep_atoms, scale_atoms
from sparsecode.influence import compose, influence, polynomial

N, M, C = 3, 4, 12
LAYER = "blocks.0.attn1"
LAST = "blocks.1.attn1"


def numbers(*shape, seed=0):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def disjoint(seed=0):
    """M atoms (M, C), each with C/M channels of its own."""
    return numbers(M, C, seed=seed) * torch.block_diag(*[torch.ones(1, C // M, dtype=torch.float64)] * M)


def orthonormal(seed=0):
    return torch.linalg.qr(numbers(C, M, seed=seed))[0].T  # (M, C)


def error_of_eq_11(c, x, s, D):
    """‖f(x + s D) − f(x) − Σ_m B_K(d_m)‖ / ‖f(x + s D) − f(x)‖"""
    change = polynomial(c, x + s @ D) - polynomial(c, x)
    return ((change - influence(c, x, s, D).sum((0, 2))).norm() / change.norm()).item()


# ---- polynomial layers ------------------------------------------------------------------------------------------


def test_polynomial_has_no_constant():
    c, x = numbers(4), numbers(N, C, seed=1)
    expected = c[0] * x + c[1] * x**2 + c[2] * x**3 + c[3] * x**4
    torch.testing.assert_close(polynomial(c, x), expected)
    assert not polynomial(c, torch.zeros(C)).any()


@pytest.mark.parametrize("K", [1, 2, 5])
def test_b_k_is_what_the_atom_does_alone(K):
    c, x, s, D = numbers(K), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    by_degree = influence(c, x, s, D)
    assert by_degree.shape == (K, N, M, C)
    for m in range(M):
        alone = polynomial(c, x + s[:, m, None] * D[m]) - polynomial(c, x)
        torch.testing.assert_close(by_degree.sum(0)[:, m], alone)


def test_degree_j_grows_like_the_jth_power_of_the_atom():
    c, x, s, D = numbers(4), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    for j, (one, two) in enumerate(zip(influence(c, x, s, D), influence(c, x, s, 2 * D)), start=1):
        torch.testing.assert_close(two, 2**j * one)


def test_degree_1_is_the_derivative():
    c, x, s, D = numbers(4), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    (slope,) = torch.autograd.grad(polynomial(c, x.requires_grad_()).sum(), x)  # (N, C)
    torch.testing.assert_close(influence(c, x, s, D)[0], slope[:, None] * s[:, :, None] * D)


def test_eq_11_needs_disjoint_atoms_orthogonal_is_not_enough():
    """Eq. 16 takes powers of each channel: its mixed terms vanish only where no two atoms share a channel."""
    x, s = numbers(N, C, seed=1), numbers(N, M, seed=2)
    apart, dense = disjoint(), orthonormal()
    for D in (apart, dense):
        gram = D @ D.T
        assert (gram - gram.diagonal().diag()).abs().max() < 1e-14  # Appendix A's assumption holds for both
    assert error_of_eq_11(numbers(4), x, s, apart) < 1e-14
    assert error_of_eq_11(numbers(4), x, s, dense) > 0.1
    assert error_of_eq_11(numbers(1), x, s, dense) < 1e-14  # a linear layer has no mixed terms


@pytest.mark.parametrize("outer, inner", [(1, 3), (2, 2), (3, 2), (3, 3)])
def test_degrees_multiply_in_a_composition(outer, inner):
    c, c_after, x = numbers(inner), numbers(outer, seed=1), numbers(N, C, seed=2)
    both = compose(c_after, c)
    assert both.shape == (outer * inner,) and both[-1] != 0
    torch.testing.assert_close(polynomial(both, x), polynomial(c_after, polynomial(c, x)))


def through_two_layers(c, c_after, x, s, D, s_after, D_after):
    """The change at the end of two layers with atoms before each, and what Eq. 13 says, with product for sum."""
    middle = polynomial(c, x)  # (N, C)
    change = polynomial(c_after, polynomial(c, x + s @ D) + s_after @ D_after) - polynomial(c_after, middle)
    first = influence(compose(c_after, c), x, s, D).sum((0, 2))  # (N, C)
    second = influence(c_after, middle, s_after, D_after).sum((0, 2))  # (N, C)
    return change, first + second


def test_eq_13_holds_if_no_channel_is_shared_by_any_two_atoms():
    c, c_after, x, s = numbers(3), numbers(2, seed=1), numbers(N, C, seed=2), numbers(N, M, seed=3)
    D = disjoint()
    half = torch.arange(M) < M // 2
    change, formula = through_two_layers(c, c_after, x, s * half, D, s * ~half, D)
    torch.testing.assert_close(change, formula)
    change, formula = through_two_layers(c, c_after, x, s, D, s, D)  # disjoint in each layer, not between them
    assert (change - formula).norm() > 0.02 * change.norm()


# ---- models -----------------------------------------------------------------------------------------------------


def make(**options):
    torch.manual_seed(0)
    model = SmallModel().double()
    attach(model, **{"atoms": 8, "density": 1.0, **options})
    shake(adapters(model).values())
    model.double()
    x, context = (part.double() for part in small_inputs())
    return model, lambda: model(x, context)


def test_effect_is_the_difference_that_zeroed_atoms_make():
    model, forward = make(density=0.25)
    measured = effect(model, forward, {LAYER: [1, 5], LAST: [0]})
    whole = forward()
    for name, m in ((LAYER, 1), (LAYER, 5), (LAST, 0)):
        adapters(model)[name].D.data[m] = 0
    torch.testing.assert_close(measured, (whole - forward()).detach())
    assert measured.norm() > 0.1


def test_effect_of_an_atom_that_is_not_kept_is_nothing():
    model, forward = make()
    assert effect(model, forward, {LAYER: [2]}).any()
    keep_atoms(model, 0)
    assert not effect(model, forward, {LAYER: [2]}).any()
    assert not first_order(model, forward, {LAYER: [2]}).any()


def test_nothing_is_left_behind():
    model, forward = make()
    before = forward()
    with pytest.raises(ZeroDivisionError), scale_atoms(model, {LAYER: [0]}, 0.0):
        1 / 0
    effect(model, forward, {LAYER: [0]})
    first_order(model, forward, {LAYER: [0], LAST: [1]})
    assert torch.equal(forward(), before)


def test_first_order_is_the_slope_of_small_effects():
    """Central differences of a smooth model (density 1) in double precision: error ~ h²."""
    model, forward = make()
    for atoms in ({LAYER: [3]}, {LAYER: [0, 4], LAST: [7]}):
        h, ends = 1e-6, []
        for factor in (h, -h):
            with scale_atoms(model, atoms, factor), torch.no_grad():
                ends.append(forward())
        slope = (ends[0] - ends[1]) / (2 * h)
        torch.testing.assert_close(first_order(model, forward, atoms), slope, rtol=1e-6, atol=1e-6)


def test_first_order_is_exact_where_all_that_follows_is_linear():
    class Linear(SmallModel):
        def forward(self, x, context):
            return x @ self.blocks[0]["mlp"][0].weight + self.blocks[0]["attn1"](x)

    torch.manual_seed(0)
    model = Linear()
    shake(attach(model, target=LAYER, atoms=8, density=0.25))
    inputs = small_inputs()
    atoms, forward = {LAYER: [0, 6]}, lambda: model(*inputs)
    torch.testing.assert_close(effect(model, forward, atoms), first_order(model, forward, atoms), rtol=1e-4, atol=1e-5)


def test_first_order_of_a_polynomial_layer_is_degree_1_of_eq_18():
    """An atom before f, measured in a model, against the formula: no adapter's mathematics is shared."""
    c = numbers(3)

    class Polynomial(SmallModel):
        def forward(self, x):
            return polynomial(c, self.blocks[0]["attn1"](x))

    torch.manual_seed(0)
    model = Polynomial()
    shake(attach(model, target=LAYER, atoms=8, density=1.0))
    model.double()
    x, seen = numbers(1, 5, 32, seed=1), []
    adapter = adapters(model)[LAYER]
    with adapter.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0])), torch.no_grad():
        model(x)
    s = seen[0]  # (N, M)
    with scale_atoms(model, {LAYER: range(8)}, 0.0), torch.no_grad():
        without = model.blocks[0]["attn1"](x)[0]  # (N, C)
    others = {LAYER: [m for m in range(8) if m != 2]}
    with scale_atoms(model, others, 0.0):
        alone, slope = (f(model, lambda: model(x), {LAYER: [2]})[0] for f in (effect, first_order))  # (N, C) each
    by_degree = influence(c, without, s[:, [2]], adapter.D[[2]].detach())[:, :, 0]  # (K, N, C)
    torch.testing.assert_close(alone, by_degree.sum(0))
    torch.testing.assert_close(slope, by_degree[0])


def test_effects_through_no_grad_count_too():
    """Sampling loops run under torch.no_grad; forward mode sees through it."""
    model, forward = make()
    expected = first_order(model, forward, {LAYER: [3]})
    assert torch.equal(first_order(model, torch.no_grad()(forward), {LAYER: [3]}), expected)
    assert expected.any() and not expected.requires_grad


@pytest.mark.parametrize("atoms, words", [
    ({"blocks.7.attn1": [0]}, "no atoms at 'blocks.7.attn1'; there are at blocks.0.attn1, blocks.1.attn1"),
    ({LAYER: [0, 8]}, r"has atoms 0 to 7, not \[0, 8\]"),
    ({LAYER: [-1]}, r"has atoms 0 to 7, not \[-1\]"),
])  # fmt: skip
def test_atoms_that_there_are_not(atoms, words):
    model, forward = make()
    for function in (effect, first_order):
        with pytest.raises(UserError, match=words):
            function(model, forward, atoms)


def test_models_without_atoms():
    model = SmallModel()
    with pytest.raises(UserError, match="no adapter is attached"):
        effect(model, lambda: torch.zeros(1), {LAYER: [0]})
    attach(model, "lora", r=2)
    with pytest.raises(UserError, match="atoms exist only for the sparse method"):
        effect(model, lambda: torch.zeros(1), {LAYER: [0]})
