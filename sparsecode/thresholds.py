"""σ_λ: three ways to make coefficients sparse (Eq. 6, §3.4). The result has the shape of `x`."""

import torch


def soft_threshold(x, lam):
    """sign(x) · max(|x| − λ, 0), elementwise: the proximal operator of λ‖·‖₁    (Eq. 6)"""
    return x - x.clamp(-lam, lam)


def relu_threshold(x, lam):
    """max(x − λ, 0), elementwise    (§3.4, ii)"""
    return (x - lam).relu()


def top_k(x, k):
    """Keep the k largest |x| of the last axis and set the others to 0    (§3.4, iii)

    Exactly k values are kept, even if some are equal. Gradients flow through the kept values.
    """
    index = x.abs().topk(k, dim=-1).indices  # (..., M) -> (..., k)
    return torch.zeros_like(x).scatter_(-1, index, x.gather(-1, index))  # (..., M)
