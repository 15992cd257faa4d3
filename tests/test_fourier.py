"""The Fourier toy: bases and measures against closed forms, the layer against loops, and what training leaves alone."""

import dataclasses
import math

import pytest
import torch

from sparsecode import UserError
from sparsecode.fourier import (
    STREAMS,
    FourierAttention,
    Signals,
    atoms_needed,
    cosine_with_bases,
    fine_tune,
    five_of_all,
    five_of_five,
    five_of_ten,
    fourier_bases,
    importance,
    nmse,
    partial_sums,
    pretrain,
    random_masks,
    seeded,
    spectra,
)

READINGS = {"five": five_of_five, "ten": five_of_ten, "all": five_of_all}
SMALL = dict(steps=4, batch=8, channels=6, width=5, atoms=12)


@pytest.fixture(params=READINGS)
def reading(request):
    return READINGS[request.param]


# Bases and signals


def frequencies(low, high):
    """What the bases of a band are made of: a cosine for each, and a sine but for 0 and 32"""
    return torch.tensor([f for f in range(low, high + 1) for _ in range(1 if f in (0, 32) else 2)])


def test_bases_of_the_whole_band_are_an_orthonormal_basis():
    bases = fourier_bases(0, 32)
    torch.testing.assert_close(bases @ bases.T, torch.eye(64), atol=1e-6, rtol=0)


@pytest.mark.parametrize("low, high, count", [(0, 24, 49), (25, 32, 15), (7, 7, 2)])
def test_a_basis_solves_the_difference_equation_of_its_frequency(low, high, count):
    """b(t+1) + b(t−1) = 2 cos(2πf/T) b(t), round the circle, holds for f periods and for nothing else."""
    bases = fourier_bases(low, high)
    assert len(bases) == count
    factor = 2 * torch.cos(2 * math.pi * frequencies(low, high) / 64)[:, None]
    torch.testing.assert_close(bases.roll(1, 1) + bases.roll(-1, 1), factor * bases, atol=1e-6, rtol=0)


def test_an_odd_length_has_a_sine_at_every_frequency():
    bases = fourier_bases(0, 7, length=15)
    torch.testing.assert_close(bases @ bases.T, torch.eye(15), atol=1e-6, rtol=0)


@pytest.mark.parametrize("band", ["low", "high"])
def test_signals_are_five_bases_of_the_pool(reading, band):
    settings = reading()
    signals = Signals(settings, getattr(settings, band))
    assert len(signals.bases) == {5: 5, 10: 10, None: {"low": 49, "high": 15}[band]}[settings.pool]
    truth, _ = signals.test_set(2000)
    codes = truth @ signals.bases.T
    torch.testing.assert_close(codes @ signals.bases, truth, atol=1e-5, rtol=0)
    assert ((codes.abs() > 1e-5).sum(1) <= 5).all()
    used = (codes.abs() > 1e-5).float().mean(0)
    spread = 5 * (0.25 / 2000) ** 0.5  # five standard errors of a share of 2000
    torch.testing.assert_close(used, torch.full_like(used, 5 / len(used)), atol=spread, rtol=0)
    assert truth.square().mean().item() == pytest.approx(1, abs=5 * (2 / 10000) ** 0.5)  # of χ² over 10,000 amplitudes


def test_one_mask_for_all_signals_and_both_bands():
    settings = five_of_ten()
    low, high = Signals(settings, settings.low), Signals(settings, settings.high)
    assert torch.equal(low.mask, high.mask) and low.mask.sum() == 16 and set(low.mask.unique().tolist()) == {0, 1}
    for signals in (low, high):
        truth, masked = signals.test_set()
        assert torch.equal(masked, truth * low.mask)


def test_a_mask_of_its_own_for_each_signal():
    settings = five_of_all()
    masks = random_masks(4000, settings, seeded(settings, "test"))
    assert (masks.sum(1) == 16).all() and ((masks == 0) | (masks == 1)).all()
    spread = 5 * (0.25 * 0.75 / 4000) ** 0.5  # five standard errors of a share of 4000
    torch.testing.assert_close(masks.mean(0), torch.full((64,), 0.25), atol=spread, rtol=0)
    truth, masked = Signals(settings, settings.low).test_set()
    assert ((masked == truth) | (masked == 0)).all()
    assert (masked != 0).sum(1).max() == 16 and (masked != 0).any(0).all()


def test_seeds_and_purposes_have_random_numbers_of_their_own():
    settings = [five_of_five(seed=seed) for seed in range(4)]
    firsts = {torch.rand(1, generator=seeded(s, stream)).item() for s in settings for stream in STREAMS}
    assert len(firsts) == 4 * len(STREAMS)


# The layer


def sigma(values, settings):
    if settings.sigma == "top_k":
        largest = sorted(range(len(values)), key=lambda m: -abs(values[m]))[: settings.k]
        return [value if m in largest else 0.0 for m, value in enumerate(values)]
    if settings.sigma == "soft":
        return [math.copysign(max(abs(value) - settings.lam, 0.0), value) for value in values]
    return values


def by_the_book(model, x):
    """Σ_n σ(A X W_s)_n D / √N for one signal (T,), in loops"""
    s, p = model.settings, model.p.tolist()
    tokens = [p_n * x for p_n in p]
    output = torch.zeros_like(x)
    for query in tokens:
        logits = [(query @ model.W_q) @ (key @ model.W_k) / math.sqrt(s.width) for key in tokens]
        weights = [math.exp(logit - max(logits)) for logit in logits]
        mixed = sum(w / sum(weights) * token for w, token in zip(weights, tokens))  # a row of A X
        for value, atom in zip(sigma((mixed @ model.W_s).tolist(), s), model.D):
            output = output + value * atom / math.sqrt(s.channels)
    return output


@pytest.mark.parametrize("name", ["top_k", "soft", "none"])
def test_layer_is_its_formula(name):
    """In float64: 1e-12 on numbers near 1."""
    settings = five_of_ten(**SMALL, sigma=name, k=3, atom_std=1.0)
    model = FourierAttention(settings).double().requires_grad_(False)
    _, masked = Signals(settings, settings.low).test_set(5)
    masked = masked.double()
    expected = torch.stack([by_the_book(model, x) for x in masked])
    assert expected.abs().mean() > 0.1
    torch.testing.assert_close(model(masked), expected, atol=1e-12, rtol=0)
    torch.testing.assert_close(model.forward_naive(masked), expected, atol=1e-12, rtol=0)


def test_sparse_coefficients():
    settings = five_of_five()
    model = FourierAttention(settings)
    _, masked = Signals(settings, settings.low).test_set()
    assert ((model.coefficients(masked) != 0).sum(1) == 9).all()


def test_coefficients_alone_cannot_reach_a_band_that_the_atoms_do_not_span():
    """The bands are orthogonal, so whatever the coefficients: NMSE = 1 + Σ‖output‖² / Σ‖signal‖²."""
    settings = five_of_ten(atom_std=1.0)
    model = FourierAttention(settings).requires_grad_(False)
    bases = fourier_bases(*settings.low)
    model.D.copy_(model.D @ bases.T @ bases)
    truth, masked = Signals(settings, settings.high).test_set()
    output = model(masked)
    assert output.abs().mean() > 0.1
    expected = 1 + (output.square().sum() / truth.square().sum()).item()
    assert nmse(output, truth) == pytest.approx(expected, rel=1e-5)


# Training


@pytest.mark.parametrize("part, moves", [("atoms", {"D"}), ("coefficients", {"W_q", "W_k", "W_s"})])
def test_fine_tuning_moves_what_it_says_and_nothing_else(reading, part, moves):
    model = pretrain(reading(**SMALL))
    before = {name: value.clone() for name, value in model.state_dict().items()}
    tuned = fine_tune(model, part).state_dict()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    for name, value in tuned.items():
        assert torch.equal(value, before[name]) != (name in moves), name


def test_training_repeats_to_the_bit_and_differs_by_seed(reading):
    first, again, other = (pretrain(reading(**SMALL, seed=seed)).state_dict() for seed in (3, 3, 4))
    for name, value in first.items():
        assert torch.equal(value, again[name]) and not torch.equal(value, other[name]), name


def test_training_repeats_to_the_bit_with_more_threads_and_gives_them_back():
    settings, threads = five_of_ten(**SMALL | {"channels": 64, "batch": 64}), torch.get_num_threads()
    models = []
    try:
        for count in (1, 2):
            torch.set_num_threads(count)
            models.append(pretrain(settings).state_dict())
            assert torch.get_num_threads() == count
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())


def test_pretraining_leaves_the_lift_alone():
    settings = five_of_five(**SMALL)
    assert torch.equal(pretrain(settings).p, FourierAttention(settings).p)


def test_atoms_alone_learn_what_least_squares_finds():
    """With frozen coefficients the best D is a linear regression: fine-tuning comes within 1 % NMSE of it."""
    model = pretrain(five_of_five(steps=200))
    signals = Signals(model.settings, model.settings.high)
    truth, masked = signals.draw(5000, torch.Generator().manual_seed(1))
    best = torch.linalg.lstsq(model.coefficients(masked).double(), truth.double(), driver="gelsd").solution
    truth, masked = signals.test_set()
    bound = nmse(model.coefficients(masked).double() @ best, truth.double())
    assert bound < 0.5
    assert nmse(fine_tune(model, "atoms")(masked), truth) < bound + 0.01


# Measures


def test_nmse_by_hand():
    signals = torch.tensor([[3.0, 4.0], [0.0, 5.0]])
    assert nmse(signals, signals) == 0
    assert nmse(torch.zeros(2, 2), signals) == 1
    assert nmse(torch.tensor([[3.0, 4.0], [5.0, 5.0]]), signals) == 0.5


def test_partial_sums_add_the_largest_contributions_first():
    codes = torch.tensor([[2.0, -1.0, 0.0], [0.0, 1.0, 9.0]])
    dictionary = torch.tensor([[1.0, 0.0], [0.0, 10.0], [1.0, 0.0]])  # the second atom has norm 10
    expected = [[[0, -10], [2, -10], [2, -10]], [[0, 10], [9, 10], [9, 10]]]
    assert partial_sums(codes, dictionary).tolist() == expected
    torch.testing.assert_close(partial_sums(codes, dictionary)[:, -1], codes @ dictionary)


def test_atoms_needed_by_hand():
    codes = torch.tensor([[3.0, -4.0, 0.0], [0.0, 0.0, 7.0], [1.0, 1.0, 1.0]])
    dictionary = torch.eye(3)
    assert atoms_needed(codes, dictionary, 0.99).tolist() == [2, 1, 3]
    assert atoms_needed(codes, dictionary, 0.63).tolist() == [1, 1, 2]  # 16/25 = 0.64; 2/3
    assert atoms_needed(codes, dictionary * torch.tensor([[100.0], [1.0], [1.0]]), 0.99).tolist() == [1, 1, 1]


def test_importance_is_mean_size_times_norm():
    codes, dictionary = torch.tensor([[1.0, -2.0], [3.0, 0.0]]), torch.tensor([[3.0, 4.0], [0.5, 0.0]])
    assert importance(codes, dictionary).tolist() == [10, 0.5]


def test_spectra_of_known_atoms():
    bases = fourier_bases(0, 32)
    one_line = torch.nn.functional.one_hot(frequencies(0, 32), 33).float()
    torch.testing.assert_close(spectra(7 * bases), one_line, atol=1e-6, rtol=0)
    mixture = (2 * fourier_bases(0, 0) + fourier_bases(5, 5).sum(0)) / 6**0.5  # 4 parts and 1 + 1
    assert spectra(mixture)[0, [0, 5]].tolist() == pytest.approx([4 / 6, 2 / 6], abs=1e-6)
    impulse = torch.eye(64)[:1]
    torch.testing.assert_close(spectra(impulse)[0], torch.tensor([1 / 64] + [1 / 32] * 31 + [1 / 64]))


def test_cosine_with_bases_counts_phase():
    bases = fourier_bases(0, 24)
    time = torch.arange(64) / 64
    phases = torch.tensor([0, math.pi / 4, math.pi / 2, math.pi])
    shifted = torch.cos(2 * math.pi * 6 * time + phases[:, None])
    expected = torch.tensor([1, 0.5**0.5, 1, 1])
    torch.testing.assert_close(cosine_with_bases(-3 * shifted, 5 * bases), expected, atol=1e-6, rtol=0)
    assert cosine_with_bases(fourier_bases(25, 32), bases).max() < 1e-6


# Refusals


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: fourier_bases(3, 33), "no band 3 to 33 in 64 samples; stay within 0 and 32"),
        (lambda: fourier_bases(9, 8), "no band 9 to 8"),
        (lambda: Signals(five_of_five(pool=4), (0, 24)), "pool=4: choose a number from 5"),
        (lambda: Signals(five_of_five(pool=16), (25, 32)), "pool=16: choose a number .* to 15"),
        (lambda: FourierAttention(five_of_five(sigma="relu")), "sigma='relu' is unknown; choose one of top_k"),
        (lambda: fine_tune(FourierAttention(five_of_five()), "D"), "part='D' is unknown; choose one of all, atoms"),
    ],
)
def test_refuses_what_makes_no_sense(call, message):
    with pytest.raises(UserError, match=message):
        call()


def test_settings_are_frozen():
    with pytest.raises(dataclasses.FrozenInstanceError):
        five_of_five().seed = 1
