"""CAME, the optimizer of the paper's experiments with PixArt-Σ (Appendix B; Luo et al., 2023, Algorithm 2)."""

import torch


class CAME(torch.optim.Optimizer):
    """For a matrix θ with gradient g, where mean squares are kept per row and per column only:

        V = β₂-average of g² + ε₁            as (row means)(column means)ᵀ / their mean
        u = g / √V,  u ← u / max(1, RMS(u) / clip_threshold)
        m = β₁-average of u
        S = β₃-average of (u − m)² + ε₂      as V: where updates vary, confidence is low
        θ ← θ − lr · m / √S

    A vector keeps V itself and moves by lr · m. In a tensor with more axes, each matrix of the last two is factored
    separately. The averages start at 0 without bias correction. So S is too small by the factor 1 − β₃ᵗ, and step t too
    long by about 100 / √t until t is near 10,000: the same lr moves further than with Adam.
    """

    def __init__(self, params, *, lr=1e-4, betas=(0.9, 0.999, 0.9999), eps=(1e-30, 1e-16), clip_threshold=1.0):
        super().__init__(params, dict(lr=lr, betas=betas, eps=eps, clip_threshold=clip_threshold))

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad.float(), self.state[parameter], group)

    def _update(self, parameter, g, state, group):
        (beta_1, beta_2, beta_3), (eps_1, eps_2) = group["betas"], group["eps"]
        if g.ndim > 1:
            u = g * inverse_root(state, "square", g**2 + eps_1, beta_2)  # (..., R, C)
        else:
            u = g * average(state, "square", g**2 + eps_1, beta_2).rsqrt()  # (C,)
        u /= (u.square().mean().sqrt() / group["clip_threshold"]).clamp(min=1)
        m = average(state, "update", u, beta_1)  # the shape of g
        if g.ndim > 1:
            m = m * inverse_root(state, "instability", (u - m) ** 2 + eps_2, beta_3)  # (..., R, C)
        parameter -= group["lr"] * m


def average(state, name, value, beta):
    """Update and return the moving average of `value` in state[name], which starts at zero."""
    if name not in state:
        state[name] = torch.zeros_like(value)
    return state[name].mul_(beta).add_(value, alpha=1 - beta)


def inverse_root(state, name, squares, beta):
    """1 / √(r cᵀ / mean(r)), where r and c are moving averages of the row and column means of `squares` (..., R, C).
    The roots are taken separately: where a row or column has no gradient, r c would underflow float32."""
    r = average(state, f"{name}_rows", squares.mean(dim=-1), beta)  # (..., R)
    c = average(state, f"{name}_columns", squares.mean(dim=-2), beta)  # (..., C)
    roots = (r / r.mean(dim=-1, keepdim=True)).rsqrt()  # (..., R)
    return roots[..., :, None] * c.rsqrt()[..., None, :]  # (..., R, 1) x (..., 1, C) -> (..., R, C)
