import pytest
import torch

from sparsecode import relu_threshold, soft_threshold, top_k


@pytest.fixture
def x():
    return torch.randn(50, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


def test_soft_threshold_minimises_what_it_is_the_prox_of(x):
    """s minimises (s − x)²/2 + λ|s|: its subgradient contains zero."""
    lam = 0.7
    s = soft_threshold(x, lam)
    on = s != 0
    assert 0 < on.sum() < on.numel()
    torch.testing.assert_close((s - x + lam * s.sign())[on], torch.zeros_like(s[on]), atol=1e-15, rtol=0)
    assert (x[~on].abs() <= lam).all()


def test_relu_threshold_by_hand():
    x = torch.tensor([-2.0, 0.25, 0.5, 1.75])
    assert relu_threshold(x, 0.5).tolist() == [0, 0, 0, 1.25]


@pytest.mark.parametrize("k", [1, 5, 16])
def test_top_k_keeps_the_largest_and_nothing_else(x, k):
    kept = top_k(x, k)
    smallest_kept = x.abs().sort(dim=-1, descending=True).values[:, k - 1 : k]
    assert torch.equal(kept, torch.where(x.abs() >= smallest_kept, x, 0.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_top_k_keeps_exactly_k_among_equals(dtype):
    x = torch.tensor([[1, -1, 1, -1, 1, 0.5], [2, 2, 2, 2, 2, 2]], dtype=dtype)
    assert (top_k(x, 3) != 0).sum(-1).tolist() == [3, 3]


def test_top_k_passes_gradients_through_what_it_keeps(x):
    x.requires_grad_()
    kept = top_k(x, 4)
    (3 * kept).sum().backward()
    assert torch.equal(x.grad, 3.0 * (kept != 0))
