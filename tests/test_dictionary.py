"""Dictionary learning on signals whose dictionary is known, and its two steps against brute force."""

import pytest
import torch
from torch.nn.functional import normalize

from sparsecode import UserError, dictionary, fista, lasso_objective, learn_dictionary, optimality_gap

N, DIMS, ATOMS, ACTIVE, LAM = 1000, 16, 24, 3, 0.2


def planted(seed, n=N, dims=DIMS, atoms=ATOMS, active=ACTIVE, snr_db=20, dtype=torch.float32):
    """Signals of a few unit atoms each, with Gaussian coefficients and noise; and the atoms."""
    generator = torch.Generator().manual_seed(seed)
    truth = normalize(torch.randn(atoms, dims, generator=generator, dtype=dtype))  # (M, C)
    chosen = torch.rand(n, atoms, generator=generator).topk(active).indices  # (N, active)
    values = torch.randn(n, active, generator=generator, dtype=dtype)
    clean = torch.zeros(n, atoms, dtype=dtype).scatter(1, chosen, values) @ truth  # (N, C)
    noise = torch.randn(n, dims, generator=generator, dtype=dtype)
    return clean + noise * clean.norm() / noise.norm() * 10 ** (-snr_db / 20), truth


def found(truth, learned, cosine=0.98):
    """Share of the true atoms that a learned one matches, up to sign."""
    return ((truth @ learned.T).abs().amax(dim=1) >= cosine).float().mean().item()


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_finds_a_planted_dictionary(seed):
    signals, truth = planted(seed)
    learned, codes = learn_dictionary(signals, ATOMS, LAM, seed=seed)
    assert found(truth, learned) >= 0.95 > 0.2 > found(truth, normalize(signals[:ATOMS]))
    torch.testing.assert_close(learned.norm(dim=1), torch.ones(ATOMS))
    assert optimality_gap(signals, codes, learned, LAM) < 5e-6
    at_truth = lasso_objective(signals, fista(signals, truth, LAM), truth, LAM)
    assert lasso_objective(signals, codes, learned, LAM) < 1.01 * at_truth


def test_objective_falls_until_a_round_gains_too_little_and_the_best_is_returned():
    """It rises where dead atoms were replaced, after a round that gained less than tol, and nowhere else."""
    signals, _ = planted(0)
    seen = []
    learned, codes = learn_dictionary(
        signals, ATOMS, LAM, callback=lambda k, d, s: seen.append(lasso_objective(signals, s, d, LAM).item())
    )
    gains = [(before - after) / before for before, after in zip(seen, seen[1:])]
    rises = [i for i, gain in enumerate(gains) if gain < -1e-6]
    assert rises and all(0 <= gains[i - 1] < 1e-5 for i in rises)
    assert gains[-1] < 1e-5  # the rule by which it stopped
    assert lasso_objective(signals, codes, learned, LAM) < min(seen) * (1 + 1e-5)
    stop = rises[0] + 2  # the round after a replacement, which has not paid yet
    learned, codes = learn_dictionary(signals, ATOMS, LAM, max_iter=stop)
    assert seen[stop - 1] > seen[stop - 2] >= lasso_objective(signals, codes, learned, LAM)


def test_an_updated_atom_is_the_best_of_unit_norm():
    """Against 2000 random directions, and 2000 near the atom, for each atom in turn."""
    signals, _ = planted(0, n=50, dims=5, atoms=7, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    codes = torch.randn(50, 7, generator=generator, dtype=torch.float64)
    atoms = normalize(torch.randn(7, 5, generator=generator, dtype=torch.float64))
    for m in range(7):
        only = torch.zeros_like(codes)
        only[:, m] = codes[:, m]
        rest = signals - (codes - only) @ atoms  # what atom m has to explain
        before = (rest - only @ atoms).square().sum()
        dictionary.update_atoms(rest, only, updated := atoms.clone())
        assert torch.equal(updated[torch.arange(7) != m], atoms[torch.arange(7) != m])  # codes of zero: untouched
        rivals = torch.randn(4000, 5, generator=generator, dtype=torch.float64)
        rivals = normalize(torch.cat([rivals[:2000], updated[m] + 0.01 * rivals[2000:]]))
        errors = (rest[None] - codes[None, :, m, None] * rivals[:, None]).square().sum(dim=(1, 2))
        assert (rest - only @ updated).square().sum() <= errors.min()
        assert (rest - only @ updated).square().sum() < before


def test_updates_take_turns():
    """All at once: the objective falls at each of 20 sweeps and settles, though atoms depend on one another."""
    signals, truth = planted(0, dtype=torch.float64)
    codes, atoms = fista(signals, truth, LAM), normalize(signals[:ATOMS])
    errors = []
    for _ in range(20):
        dictionary.update_atoms(signals, codes, atoms)
        errors.append((signals - codes @ atoms).square().sum().item())
    assert all(after <= before * (1 + 1e-12) for before, after in zip(errors, errors[1:]))
    assert found(truth, atoms) == 1 and errors[-1] < 1.001 * errors[-10]


def test_dead_atoms_and_copies_make_room_for_what_is_missing():
    """Signals along four directions; of five atoms one is unused, one is a copy, and two directions have none."""
    directions = torch.eye(4)
    signals = directions.repeat_interleave(torch.tensor([9, 9, 3, 3]), 0) * torch.linspace(1, 2, 24)[:, None]
    atoms = torch.stack([directions[0], directions[1], -directions[0], normalize(torch.ones(4), dim=0), directions[1]])
    codes = torch.zeros(24, 5)
    codes[:9, 0], codes[9:18, 1], codes[:9, 2] = 0.9 * signals[:9, 0], signals[9:18, 1], -0.1 * signals[:9, 0]
    codes[9:18, 4] = 0.01
    dictionary.replace_dead(signals, codes, atoms)  # -d0 and the second d1 are copies, the fourth is not used
    assert torch.equal(atoms[:2], directions[:2])
    assert found(directions[2:3], atoms[2:], 1 - 1e-6) == found(directions[3:], atoms[2:], 1 - 1e-6) == 1
    torch.testing.assert_close(atoms.norm(dim=1), torch.ones(5))


def test_without_dead_atoms_the_weakest_goes():
    signals = torch.eye(3)[[0, 0, 1, 2]]
    atoms, codes = torch.eye(3)[:2].clone(), torch.tensor([[0.9, 0], [0.9, 0], [0, 0.5], [0, 0]])
    dictionary.replace_dead(signals, codes, atoms)
    assert torch.equal(atoms, torch.eye(3)[[0, 2]])  # what the last signal is missing, in place of the second atom


def test_a_bad_start_is_overcome():
    """Nearly all atoms start as copies of one, which a few strong signals consist of."""
    signals, truth = planted(0)
    signals[:5] = 200 * truth[0]
    learned, _ = learn_dictionary(signals, ATOMS, LAM)
    assert found(truth, learned) >= 0.95


def test_seed_decides():
    signals, _ = planted(0, n=200)
    first, again = (learn_dictionary(signals, ATOMS, LAM, max_iter=3, seed=5) for _ in range(2))
    assert torch.equal(first[0], again[0]) and torch.equal(first[1], again[1])
    other = learn_dictionary(signals, ATOMS, LAM, max_iter=3, seed=6)
    assert not torch.equal(first[0], other[0])
    before = torch.random.get_rng_state()
    learn_dictionary(signals, ATOMS, LAM, max_iter=1)
    assert torch.equal(before, torch.random.get_rng_state())  # the caller's random numbers are left alone


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_returns_the_dtype_of_the_signals(dtype):
    signals, _ = planted(0, n=200)
    learned, codes = learn_dictionary(signals.to(dtype), ATOMS, LAM, max_iter=3)
    assert learned.dtype == codes.dtype == dtype
    assert (learned.shape, codes.shape) == ((ATOMS, DIMS), (200, ATOMS))


def test_fewer_signals_than_atoms_and_signals_of_zero():
    signals, _ = planted(0, n=10)
    signals[3:] = 0
    learned, codes = learn_dictionary(signals, ATOMS, 0.01, max_iter=5)
    torch.testing.assert_close(learned.norm(dim=1), torch.ones(ATOMS))
    assert not codes[3:].any()
    torch.testing.assert_close(codes @ learned, signals, atol=0.01, rtol=0)  # λ/2 shrinks each signal by as much


@pytest.mark.parametrize(
    "change, message",
    [
        (dict(n_atoms=0), "n_atoms=0"),
        (dict(max_iter=0), "max_iter=0"),
        (dict(lam=-1), "lam=-1"),
        (dict(lam=float("nan")), "lam=nan"),
        (dict(lam=20.0), "lam=20.0: give 0 or more, and well below 10, where all codes are 0$"),
        (dict(lam=1e300), r"lam=1e\+300: .* below 10,"),
        (dict(n_atoms=2.5), "n_atoms=2.5"),
        (dict(signals=torch.zeros(4, 2)), "well below 0,"),
        (dict(signals=torch.zeros(0, 2)), "well below 0,"),
        (dict(signals=torch.zeros(4, 0)), "well below 0,"),
        (dict(signals=torch.ones(3)), "signals: .* give a 2-dimensional tensor"),
        (dict(signals=torch.full((4, 2), torch.nan)), "signals: there are NaN"),
    ],
)
def test_refuses_what_makes_no_sense(change, message):
    arguments = dict(signals=torch.tensor([[3.0, 4.0], [1.0, 0.0]]), n_atoms=2, lam=0.1) | change
    with pytest.raises(UserError, match=message) as caught:
        learn_dictionary(**arguments)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("unit", [2.0**-83, 2.0**63, 2.0**100])
def test_any_unit_gives_the_same_atoms(unit):
    """1e-25 to 1e30 in float32, whose squares are 0 or infinite. Powers of two scale without rounding."""
    signals, _ = planted(0, n=200)
    expected, codes = learn_dictionary(signals, ATOMS, LAM, max_iter=3)
    learned, scaled = learn_dictionary(unit * signals, ATOMS, unit * LAM, max_iter=3)
    assert torch.equal(learned, expected) and torch.equal(scaled, unit * codes)


def test_more_signals_than_torch_can_draw_from(monkeypatch):
    with pytest.raises(RuntimeError, match="2\\^24"):
        torch.multinomial(torch.ones(1).expand(dictionary.DRAWN + 1), 1)
    monkeypatch.setattr(dictionary, "DRAWN", 150)
    signals, truth = planted(0)
    learned, _ = learn_dictionary(signals, ATOMS, LAM)
    assert found(truth, learned) >= 0.95
