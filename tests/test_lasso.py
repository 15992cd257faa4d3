"""ISTA and FISTA against scikit-learn, the optimality condition written out, closed forms, and their rates."""

import warnings

import pytest
import torch
from sklearn.decomposition import sparse_encode
from sklearn.linear_model import Lasso

from sparsecode import UserError, fista, ista, lasso_objective, lasso_solver, optimality_gap
from sparsecode.lasso import proximal_step

pytestmark = pytest.mark.filterwarnings("error:stopped at max_iter")  # a run must end by its rule unless told otherwise
SOLVERS = {
    "ista": ista,
    "fista": fista,
    "published": lambda *args, **options: fista(*args, restart=False, greedy=0, **options),
    "no greedy": lambda *args, **options: fista(*args, greedy=0, **options),
    "no restart": lambda *args, **options: fista(*args, restart=False, **options),
}
SHAPES = {  # signals, dimensions, atoms, norm of the shortest and of the longest atom
    "overcomplete": (40, 16, 48, 1, 1),
    "little over": (40, 24, 30, 1, 1),
    "undercomplete": (40, 30, 12, 1, 1),
    "not normalised": (40, 16, 48, 0.3, 3),
    "many atoms": (20, 64, 256, 1, 1),
    "one signal": (1, 16, 48, 1, 1),
    "one atom": (40, 16, 1, 2, 2),
}


def problem(shape="overcomplete", dtype=torch.float64, seed=0):
    """Signals of a few atoms each and noise; λ at a fifth of the largest gradient at zero, so that a few stay."""
    n, dims, atoms, shortest, longest = SHAPES[shape]
    generator = torch.Generator().manual_seed(seed)
    dictionary = torch.randn(atoms, dims, generator=generator, dtype=torch.float64)
    dictionary = torch.nn.functional.normalize(dictionary) * torch.linspace(shortest, longest, atoms)[:, None]
    codes = torch.randn(n, atoms, generator=generator, dtype=torch.float64)
    codes = codes * (torch.rand(n, atoms, generator=generator) < 4 / atoms)
    signals = codes @ dictionary + 0.05 * torch.randn(n, dims, generator=generator, dtype=torch.float64)
    lam = 0.2 * 2 * (signals @ dictionary.T).abs().max().item()
    return signals.to(dtype), dictionary.to(dtype), lam


def minimum(signals, dictionary, lam):
    """scikit-learn's codes, in float64 and to a tight tolerance."""
    model = Lasso(alpha=lam / (2 * signals.shape[1]), fit_intercept=False, tol=1e-13, max_iter=100_000)
    rows = [model.fit(dictionary.double().numpy().T, x).coef_ for x in signals.double().numpy()]
    return torch.stack([torch.from_numpy(row.copy()) for row in rows])  # (N, M)


def objective(signals, codes, dictionary, lam):
    return lasso_objective(signals.double(), codes.double(), dictionary.double(), lam).item()


def test_objective_by_hand():
    """Rows [1 − 2·1 + 1·3, 2 − 2·0 + 1·1] = [2, 3] and [0, 1]: 4 + 9 + 0 + 1, plus 10 times |2| + |−1|."""
    signals, dictionary = torch.tensor([[1.0, 2.0], [0.0, 1.0]]), torch.tensor([[1.0, 0.0], [3.0, 1.0]])
    codes = torch.tensor([[2.0, -1.0], [0.0, 0.0]])
    assert lasso_objective(signals, codes, dictionary, 10).item() == 4 + 9 + 0 + 1 + 10 * 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_minimum_is_that_of_scikit_learn(solver, shape, dtype):
    """The objective to 1e-5 is asked for; the square root of rounding would be 1e-8 in float64, and it is met."""
    signals, dictionary, lam = problem(shape, dtype)
    codes = SOLVERS[solver](signals, dictionary, lam, max_iter=5000)
    assert codes.dtype == dtype and codes.any()
    expected = objective(signals, minimum(signals, dictionary, lam), dictionary, lam)
    reached = objective(signals, codes, dictionary, lam)
    assert abs(reached - expected) < (1e-8 if dtype == torch.float64 else 1e-6) * expected


def test_lambda_is_twice_the_alpha_of_sparse_encode():
    signals, dictionary, lam = problem()
    theirs = sparse_encode(signals.numpy(), dictionary.numpy(), algorithm="lasso_cd", alpha=lam / 2, max_iter=10_000)
    ours = fista(signals, dictionary, lam)
    torch.testing.assert_close(ours, torch.from_numpy(theirs), atol=1e-3, rtol=0)  # its default tolerance is 1e-4
    reached = [objective(signals, codes, dictionary, lam) for codes in (ours, torch.from_numpy(theirs))]
    assert reached[0] == pytest.approx(reached[1], rel=1e-7)


@pytest.mark.parametrize("shape", SHAPES)
def test_what_makes_it_fast_gives_the_codes_of_the_plain_steps(shape):
    """S ← σ_{λ/L}(S − ∇/L) 3,000 times over all signals; both end within about 1e-9 of the minimum."""
    signals, dictionary, lam = problem(shape)
    L, plain = 2 * torch.linalg.matrix_norm(dictionary, 2) ** 2, signals.new_zeros(len(signals), len(dictionary))
    for _ in range(3000):
        plain = proximal_step(plain, signals, dictionary, lam, L)
    for solver in SOLVERS.values():
        codes = solver(signals, dictionary, lam, tol=1e-9, max_iter=20_000)
        torch.testing.assert_close(codes, plain, atol=1e-5, rtol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("solver", SOLVERS)
def test_optimality_condition(solver, shape, dtype):
    """∇_m = −λ sign(s_m) where s_m is not zero, |∇_m| ≤ λ elsewhere, each to 1e-4 of λ; the gap agrees."""
    signals, dictionary, lam = problem(shape, dtype)
    codes = SOLVERS[solver](signals, dictionary, lam, max_iter=5000)
    assert optimality_gap(signals, codes, dictionary, lam) < 5e-6  # tol is 1e-6, the floor of float32 a little more
    x, s, d = signals.double(), codes.double(), dictionary.double()
    gradient = 2 * (s @ d - x) @ d.T
    on = s != 0
    assert (gradient + lam * s.sign())[on].abs().max() < 1e-4 * lam
    assert gradient[~on].abs().max() < (1 + 1e-4) * lam if (~on).any() else True


def test_gap_is_the_fixed_point_residual_written_out():
    signals, dictionary, lam = problem("not normalised")
    codes = torch.randn(40, 48, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    codes[:, ::2] = 0
    lipschitz = 2 * torch.linalg.matrix_norm(dictionary, 2).item() ** 2
    worst = 0.0
    for x, s in zip(signals, codes):
        gradient, at_zero = 2 * dictionary @ (s @ dictionary - x), -2 * dictionary @ x
        z = s - gradient / lipschitz
        ahead = torch.tensor([v.sign() * max(abs(v) - lam / lipschitz, 0) for v in z])
        worst = max(worst, (lipschitz * (s - ahead).abs().max() / at_zero.abs().max()).item())
    assert optimality_gap(signals, codes, dictionary, lam) == pytest.approx(worst, rel=1e-12)


def test_gap_of_zeros():
    """At S = 0 the largest gradient is λ_max, and what exceeds λ is λ_max − λ: the gap is 1 − λ/λ_max."""
    signals, dictionary, _ = problem("one signal")
    largest = 2 * (signals @ dictionary.T).abs().max().item()
    zeros = torch.zeros(1, 48, dtype=torch.float64)
    assert optimality_gap(signals, zeros, dictionary, 0.25 * largest) == pytest.approx(0.75)
    assert optimality_gap(signals, zeros, dictionary, largest) == pytest.approx(0, abs=1e-15)
    assert not fista(signals, dictionary, largest * (1 + 1e-12)).any()
    assert fista(signals, dictionary, largest * (1 - 1e-6)).count_nonzero() == 1


@pytest.mark.parametrize("solver", SOLVERS)
@pytest.mark.parametrize("scale", [1, 3])
def test_closed_form_for_orthogonal_atoms(solver, scale):
    """With D Dᵀ = c² I the coefficients do not meet: S = σ_{λ/2}(X Dᵀ) / c². FISTA's first step is there."""
    signals, _, _ = problem()
    dictionary = scale * torch.linalg.qr(torch.randn(16, 16, dtype=torch.float64)).Q[:10]  # (10, 16)
    lam = 0.5 * scale
    products = signals @ dictionary.T
    expected = products.sign() * (products.abs() - lam / 2).clamp(min=0) / scale**2
    assert 0 < (expected == 0).sum() < expected.numel()
    codes = SOLVERS[solver](signals, dictionary, lam)
    torch.testing.assert_close(codes, expected, atol=1e-12, rtol=0)
    assert optimality_gap(signals, expected, dictionary, lam) < 1e-14


def history(solver, signals, dictionary, lam, steps, **options):
    values = []
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        solver(signals, dictionary, lam, max_iter=steps, tol=0, **options,
               callback=lambda k, codes: values.append(objective(signals, codes, dictionary, lam)))  # fmt: skip
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("shape", ["overcomplete", "undercomplete", "not normalised"])
def test_ista_never_rises_and_both_keep_their_rates(shape):
    """F_k − F* ≤ L‖S*‖²/(2k) for ISTA and ≤ 2L‖S*‖²/(k+1)² for FISTA as published (Beck & Teboulle, 2009)."""
    signals, dictionary, lam = problem(shape)
    solution = minimum(signals, dictionary, lam)
    lowest = objective(signals, solution, dictionary, lam)
    lipschitz = 2 * torch.linalg.matrix_norm(dictionary, 2).item() ** 2
    size, k = lipschitz * solution.square().sum().item(), torch.arange(1, 101)
    slow = history(ista, signals, dictionary, lam, 100)
    fast = history(fista, signals, dictionary, lam, 100, greedy=0, restart=False)
    assert (slow.diff() <= 1e-14 * slow[0]).all() and slow[0] > slow[-1]
    assert (slow - lowest <= size / (2 * k) + 1e-12 * lowest).all()
    assert (fast - lowest <= 2 * size / (k + 1) ** 2 + 1e-12 * lowest).all()


def test_momentum_restart_and_greedy_start_pay():
    """After 30 steps, with few coefficients among many atoms, each of the three is at least ten times nearer."""
    signals, dictionary, lam = problem("many atoms")
    lowest = objective(signals, minimum(signals, dictionary, lam), dictionary, lam)
    methods = (ista, {}), (fista, dict(greedy=0, restart=False)), (fista, dict(greedy=0)), (fista, {})
    above = [(history(solver, signals, dictionary, lam, 30, **how)[-1] - lowest).item() for solver, how in methods]
    assert above[3] < 0.1 * above[2] < 0.01 * above[1] < 0.001 * above[0]


def test_solvers_agree_on_the_codes():
    """Fewer atoms than dimensions: one minimum, strictly convex. Gap 1e-10 over the smallest eigenvalue: 1e-8."""
    signals, dictionary, lam = problem("undercomplete")
    expected = ista(signals, dictionary, lam, tol=1e-10)
    for solver in SOLVERS.values():
        torch.testing.assert_close(solver(signals, dictionary, lam, tol=1e-10), expected, atol=1e-8, rtol=0)


@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_each_signal_is_a_problem_of_its_own(solver, monkeypatch):
    """Alone, in a batch, in blocks, with or without the greedy start's memory limit: rounding apart, the same."""
    signals, dictionary, lam = problem()
    together = SOLVERS[solver](signals, dictionary, lam, tol=1e-12, max_iter=5000)
    alone = [SOLVERS[solver](x[None], dictionary, lam, tol=1e-12, max_iter=5000) for x in signals]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-9, rtol=0)
    monkeypatch.setattr(lasso_solver, "BLOCK", 48 * 7)
    monkeypatch.setattr(lasso_solver, "WIDEST", 47)
    apart = SOLVERS[solver](signals, dictionary, lam, tol=1e-12, max_iter=5000)
    torch.testing.assert_close(apart, together, atol=1e-9, rtol=0)


@pytest.mark.parametrize("solver", ["ista", "fista", "no greedy"])
def test_signals_that_are_done_are_worked_on_no_more(solver, monkeypatch):
    signals, dictionary, lam = problem()
    signals[:30] *= 0.01  # λ exceeds their largest gradient: zero from the start
    sizes, step = [], lasso_solver._Lasso.step
    monkeypatch.setattr(lasso_solver._Lasso, "step", lambda self, s, data: sizes.append(len(s)) or step(self, s, data))
    codes = SOLVERS[solver](signals, dictionary, lam, max_iter=5000)
    assert not codes[:30].any() and codes[30:].any()
    assert sizes[0] == 40 and sizes[1] <= 10 and sizes[-1] < 5
    assert all(after <= before for before, after in zip(sizes, sizes[1:]))


@pytest.mark.parametrize("solver", ["ista", "fista"])
@pytest.mark.parametrize("tol", [1e-2, 1e-5, 1e-9])
def test_stops_when_tol_is_met_and_not_much_later(solver, tol):
    signals, dictionary, lam = problem()
    seen = []
    options = dict(tol=tol, max_iter=5000, callback=lambda k, s: seen.append(s.clone()))
    codes = SOLVERS[solver](signals, dictionary, lam, **options)
    gaps = [optimality_gap(signals, s, dictionary, lam) for s in seen]
    assert torch.equal(codes, seen[-1])
    assert gaps[-1] <= tol
    assert min(gaps[: -lasso_solver.CHECK - 1], default=1) > tol  # no step earlier than the last look would have done


@pytest.mark.parametrize("solver", ["ista", "fista"])
@pytest.mark.parametrize("a, b", [(2.0**40, 2.0**-20), (2.0**90, 2.0**20), (2.0**-90, 2.0**-20), (1, 2.0**-90)])
def test_tol_means_the_same_in_any_unit(solver, a, b):
    """Powers of two scale without rounding: X by a and D by b makes S a/b times as large, for λ a·b times as large.

    Also where squares would leave the range of float32, which is 2^±126.
    """
    signals, dictionary, lam = problem("not normalised", torch.float32)
    codes = SOLVERS[solver](signals, dictionary, lam, tol=1e-4, max_iter=5000)
    seen = []
    arguments = a * signals, b * dictionary, a * b * lam
    scaled = SOLVERS[solver](*arguments, tol=1e-4, max_iter=5000, callback=lambda k, s: seen.append(s))
    assert torch.equal(scaled, codes * (a / b)) and torch.equal(scaled, seen[-1])
    assert optimality_gap(a * signals, scaled, b * dictionary, a * b * lam) < 1e-4


@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_max_iter_warns_with_the_gap(solver):
    signals, dictionary, lam = problem()
    with pytest.warns(UserWarning, match=r"stopped at max_iter=5 with an optimality gap of \d\.\de-0\d") as caught:
        codes = SOLVERS[solver](signals, dictionary, lam, max_iter=5)
    assert caught[0].filename == __file__
    gaps = [optimality_gap(x[None], s[None], dictionary, lam) for x, s in zip(signals, codes)]
    unfinished = sum(gap > 1e-6 for gap in gaps)
    assert f"gap of {max(gaps):.1e}, above tol=1e-06, in {unfinished} of 40 signals" in str(caught[0].message)


@pytest.mark.parametrize("shape", SHAPES)
def test_rounding_ends_a_run_that_tol_would_not(shape):
    """tol=0 cannot be met: the run ends without a warning at its dtype's floor, which is a few eps."""
    for dtype in (torch.float32, torch.float64):
        signals, dictionary, lam = problem(shape, dtype)
        codes = fista(signals, dictionary, lam, tol=0, max_iter=5000)
        assert optimality_gap(signals, codes, dictionary, lam) < 50 * torch.finfo(dtype).eps


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("solver", ["ista", "fista"])
def test_half_precision_is_computed_in_float32(solver, dtype):
    signals, dictionary, lam = problem("undercomplete", dtype)
    codes = SOLVERS[solver](signals, dictionary, lam)
    assert torch.equal(codes, SOLVERS[solver](signals.float(), dictionary.float(), lam).to(dtype))
    rounding = optimality_gap(signals, codes, dictionary, lam)
    assert 1e-6 < rounding < 10 * torch.finfo(dtype).eps


@pytest.mark.parametrize("solver", SOLVERS)
def test_nothing_to_do(solver):
    signals, dictionary, lam = problem()
    solve = SOLVERS[solver]
    assert solve(signals[:0], dictionary, lam).shape == (0, 48)
    assert solve(signals, dictionary[:0], lam).shape == (40, 0)
    assert optimality_gap(signals[:0], signals.new_zeros(0, 48), dictionary, lam) == 0
    for weight in (lam, 0):
        assert not solve(signals, 0 * dictionary, weight).any()
        assert not solve(0 * signals, dictionary, weight).any()
        assert optimality_gap(0 * signals, signals.new_zeros(40, 48), dictionary, weight) == 0
    assert not solve(signals[:, :0], dictionary[:, :0], lam).any()  # no dimensions
    assert optimality_gap(signals[:, :0], signals.new_zeros(40, 48), dictionary[:, :0], lam) == 0
    some_dead = torch.where(torch.arange(48)[:, None] % 3 == 0, 0, dictionary)
    codes = solve(signals, some_dead, lam)
    assert codes.any() and not codes[:, ::3].any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("unit", [1e-25, 1, 1e19])
@pytest.mark.parametrize("solver", SOLVERS)
def test_a_lambda_of_any_size_gives_zeros(solver, unit, dtype):
    signals, dictionary, _ = problem("not normalised", dtype)
    for lam in (1e300, 1e39):
        assert not SOLVERS[solver](unit * signals, dictionary, lam).any()
        assert optimality_gap(unit * signals, signals.new_zeros(40, 48), dictionary, lam) == 0
        assert optimality_gap(signals, signals.new_ones(40, 48), dictionary, lam) > 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_without_lambda_it_is_least_squares(solver):
    signals, dictionary, _ = problem("undercomplete")
    expected = torch.linalg.lstsq(dictionary.T, signals.T).solution.T
    torch.testing.assert_close(SOLVERS[solver](signals, dictionary, 0, tol=1e-10), expected, atol=1e-8, rtol=0)


def test_gradients_stay_out_of_the_solvers():
    signals, dictionary, lam = problem()
    dictionary.requires_grad_()
    codes = fista(signals, dictionary, lam)
    assert not codes.requires_grad
    lasso_objective(signals, codes, dictionary, lam).backward()  # but learning a dictionary needs this one
    torch.testing.assert_close(dictionary.grad, 2 * codes.T @ (codes @ dictionary.detach() - signals))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("solver", SOLVERS)
def test_gpu_gives_the_codes_of_the_cpu(solver):
    signals, dictionary, lam = problem("undercomplete")
    expected = SOLVERS[solver](signals, dictionary, lam, tol=1e-10)
    codes = SOLVERS[solver](signals.cuda(), dictionary.cuda(), lam, tol=1e-10)
    assert codes.is_cuda
    torch.testing.assert_close(codes.cpu(), expected, atol=1e-8, rtol=0)


X, D = torch.ones(3, 4), torch.ones(5, 4)


@pytest.mark.parametrize(
    "arguments, options, message",
    [
        ((X, D.T, 1), {}, "signals have 4 dimensions, atoms 5"),
        ((X[0], D, 1), {}, r"signals: torch.float32 \(4,\) given; give a 2-dimensional tensor"),
        ((X, D.long(), 1), {}, "dictionary: torch.int64"),
        ((X.numpy(), D, 1), {}, "signals: ndarray given"),
        ((X.double(), D, 1), {}, "signals and dictionary are torch.float64 on cpu and torch.float32 on cpu"),
        ((X / 0, D, 1), {}, "signals: there are NaN or infinite values"),
        ((X, D * float("nan"), 1), {}, "dictionary: there are NaN"),
        ((X, D, -1), {}, "lam=-1; give a finite number of 0 or more"),
        ((X, D, float("nan")), {}, "lam=nan"),
        ((X, D, float("inf")), {}, "lam=inf"),
        ((X, D, 1), dict(max_iter=0), "max_iter=0"),
        ((X, D, 1), dict(tol=-1e-3), "tol=-0.001"),
        ((X, D, 1), dict(tol=float("nan")), "tol=nan"),
    ],
)
@pytest.mark.parametrize("solver", [ista, fista])
def test_refuses_what_makes_no_sense(solver, arguments, options, message):
    with pytest.raises(UserError, match=message) as caught:
        solver(*arguments, **options)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("greedy", [-1, 1.5, None, True])
def test_greedy_is_a_number_of_steps(greedy):
    with pytest.raises(UserError, match=f"greedy={greedy}: give a whole number of steps, 0 for none"):
        fista(X, D, 1, greedy=greedy)


def test_gap_refuses_codes_that_do_not_fit():
    with pytest.raises(UserError, match=r"codes \(5, 3\) do not fit 3 signals and 5 atoms"):
        optimality_gap(X, torch.zeros(5, 3), D, 1)
    with pytest.raises(UserError, match="codes: there are NaN"):
        optimality_gap(X, torch.full((3, 5), torch.nan), D, 1)
