"""Appendix A in double precision against the polynomials themselves, and effects against models that are known."""

import pytest
import torch
from small_model import SmallModel, shake, small_inputs

from sparsecode import UserError, adapters, attach, keep_atoms, record_maps
from sparsecode.influence import (
    additivity_error,
    compose,
    effect,
    expansion,
    first_order,
    linearity_error,
    only_atoms,
    polynomial,
    scale_atoms,
)

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
    return ((change - expansion(c, x, s, D).sum((0, 2))).norm() / change.norm()).item()


# ---- polynomial layers ------------------------------------------------------------------------------------------


def test_polynomial_has_no_constant():
    c, x = numbers(4), numbers(N, C, seed=1)
    expected = c[0] * x + c[1] * x**2 + c[2] * x**3 + c[3] * x**4
    torch.testing.assert_close(polynomial(c, x), expected)
    assert not polynomial(c, torch.zeros(C)).any()


@pytest.mark.parametrize("K", [1, 2, 5])
def test_b_k_is_what_the_atom_does_alone(K):
    c, x, s, D = numbers(K), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    by_degree = expansion(c, x, s, D)
    assert by_degree.shape == (K, N, M, C)
    for m in range(M):
        alone = polynomial(c, x + s[:, m, None] * D[m]) - polynomial(c, x)
        torch.testing.assert_close(by_degree.sum(0)[:, m], alone)


def test_degree_j_grows_like_the_jth_power_of_the_atom():
    c, x, s, D = numbers(4), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    for j, (one, two) in enumerate(zip(expansion(c, x, s, D), expansion(c, x, s, 2 * D)), start=1):
        torch.testing.assert_close(two, 2**j * one)


def test_degree_1_is_the_derivative():
    c, x, s, D = numbers(4), numbers(N, C, seed=1), numbers(N, M, seed=2), numbers(M, C, seed=3)
    (slope,) = torch.autograd.grad(polynomial(c, x.requires_grad_()).sum(), x)  # (N, C)
    torch.testing.assert_close(expansion(c, x, s, D)[0], slope[:, None] * s[:, :, None] * D)


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
    first = expansion(compose(c_after, c), x, s, D).sum((0, 2))  # (N, C)
    second = expansion(c_after, middle, s_after, D_after).sum((0, 2))  # (N, C)
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


def test_only_atoms_is_the_base_model_and_these():
    model, forward = make(density=0.25)
    with only_atoms(model, {LAYER: [1, 5]}):
        measured = effect(model, forward, {LAYER: [1, 5]})
    keep_atoms(model, 0)
    base = forward()
    adapters(model)[LAYER].keep[[1, 5]] = True
    torch.testing.assert_close(measured, (forward() - base).detach())
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


def polynomial_model():
    """Atoms before a layer f of degree 3: model, input, c, and what reaches f: (N, C) without atoms, their S and D."""
    c = numbers(3)

    class Polynomial(SmallModel):
        def forward(self, x):
            return polynomial(c, self.blocks[0]["attn1"](x))

    torch.manual_seed(0)
    model, seen = Polynomial(), []
    shake(attach(model, target=LAYER, atoms=8, density=1.0))
    model.double()
    x, adapter = numbers(1, 5, 32, seed=1), adapters(model)[LAYER]
    with adapter.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0][0])), torch.no_grad():
        model(x)
        with only_atoms(model, {}):
            base = model.blocks[0]["attn1"](x)[0]  # (N, C)
    return model, x, c, base, seen[0], adapter.D.detach()


def test_effect_and_first_order_before_a_polynomial_layer_are_eq_18():
    model, x, c, base, s, D = polynomial_model()
    with only_atoms(model, {LAYER: [2]}):
        alone, slope = (f(model, lambda: model(x), {LAYER: [2]})[0] for f in (effect, first_order))  # (N, C) each
    by_degree = expansion(c, base, s, D)[:, :, 2]  # (K, N, C)
    torch.testing.assert_close(alone, by_degree.sum(0))
    torch.testing.assert_close(slope, by_degree[0])


@pytest.mark.parametrize("scale", [1.0, 0.1])
def test_linearity_error_before_a_polynomial_layer(scale):
    model, x, c, base, s, D = polynomial_model()
    change = polynomial(c, base + scale * s @ D) - polynomial(c, base)  # (N, C)
    line = scale * expansion(c, base, s, D)[0].sum(1)  # (N, C)
    error = linearity_error(model, lambda: model(x), {LAYER: range(8)}, scale)
    torch.testing.assert_close(error, ((change - line).norm() / change.norm())[None])


def test_additivity_error_before_a_polynomial_layer():
    model, x, c, base, s, D = polynomial_model()
    atoms = [0, 3, 6]
    s, D = s[:, atoms], D[atoms]  # (N, 3), (3, C)
    error = additivity_error(model, lambda: model(x), {LAYER: atoms})
    torch.testing.assert_close(error, torch.tensor([error_of_eq_11(c, base, s, D)], dtype=torch.float64))
    assert error > 0.1


def test_disjoint_atoms_add_up_in_a_model_too_until_a_matrix_mixes_channels():
    model, x, c, base, s, D = polynomial_model()
    atoms = {LAYER: range(8)}
    adapters(model)[LAYER].D.data = numbers(8, 32) * torch.block_diag(*[torch.ones(1, 4, dtype=torch.float64)] * 8)
    assert additivity_error(model, lambda: model(x), atoms) < 1e-14
    turn = torch.linalg.qr(numbers(32, 32))[0]
    assert additivity_error(model, lambda: polynomial(c, model(x) @ turn), atoms) > 0.1


def test_effects_through_no_grad_count_too():
    """Sampling loops run under torch.no_grad; forward mode sees through it."""
    model, forward = make()
    expected = first_order(model, forward, {LAYER: [3]})
    assert torch.equal(first_order(model, torch.no_grad()(forward), {LAYER: [3]}), expected)
    assert expected.any() and not expected.requires_grad


@pytest.mark.parametrize("atoms, words", [
    ({"blocks.7.attn1": [0]}, "no layer 'blocks.7.attn1' has atoms; choose from blocks.0.attn1, blocks.1.attn1"),
    ({LAYER: [0, 8]}, "has no atom 8; it has 0 to 7"),
    ({LAYER: [-1]}, "has no atom -1; it has 0 to 7"),
])  # fmt: skip
def test_atoms_that_there_are_not(atoms, words):
    model, forward = make()
    for function in (effect, first_order):
        with pytest.raises(UserError, match=words):
            function(model, forward, atoms)
    for context in (only_atoms, record_maps):
        with pytest.raises(UserError, match=words), context(model, atoms):
            pass


def test_models_without_atoms():
    model = SmallModel()
    with pytest.raises(UserError, match="no adapter is attached"):
        effect(model, lambda: torch.zeros(1), {LAYER: [0]})
    attach(model, "lora", r=2)
    with pytest.raises(UserError, match="atoms exist only for the sparse method"):
        effect(model, lambda: torch.zeros(1), {LAYER: [0]})
