"""Diffusion: the noise schedule, the training loss and the sampler DPM-Solver++(2M) (Lu et al., 2022).

A noisy latent is  x_t = α_t x_0 + σ_t ε  with  α_t² + σ_t² = 1.  The model predicts ε.
"""

import functools

import torch
import torch.nn.functional as F

from dit.config import SchedulerConfig
from sparsecode.common import UserError


@functools.lru_cache(maxsize=8)
@torch.inference_mode(False)  # cached tensors must work in training too
def alphas_sigmas(schedule: SchedulerConfig, device="cpu"):
    """α_t and σ_t of every training timestep t, (T,) each, in float32 on `device`; the betas rise linearly."""
    steps = schedule.num_train_timesteps
    betas = torch.linspace(schedule.beta_start, schedule.beta_end, steps, dtype=torch.float32, device="cpu")  # β_t
    alpha_bar = torch.cumprod(1 - betas, dim=0)  # α_t²
    return alpha_bar.sqrt().to(device), (1 - alpha_bar).sqrt().to(device)


def add_noise(latents, noise, timesteps, schedule):
    """x_t = α_t x_0 + σ_t ε for latents and noise (B, 4, h, w) and timesteps (B,), int64."""
    tables = alphas_sigmas(schedule, latents.device)
    alpha, sigma = (table[timesteps].to(latents.dtype).view(-1, 1, 1, 1) for table in tables)  # (B, 1, 1, 1) each
    return alpha * latents + sigma * noise


def noise_error(model, latents, timesteps, noise, text, text_mask, schedule):
    """Mean squared error of the predicted noise for each picture, (B,): its mean is the training loss."""
    noisy = add_noise(latents, noise, timesteps, schedule)  # (B, 4, h, w)
    predicted = model(noisy, timesteps, text, text_mask)[:, : latents.shape[1]]  # drop the variance channels
    return F.mse_loss(predicted.float(), noise.float(), reduction="none").mean(dim=(1, 2, 3))  # (B,)


def sampling_timesteps(steps, schedule):
    """`steps` evenly spaced timesteps (steps,) from T − 1 down, rounded; for 20 steps of T = 1000: 999, 949, …, 50."""
    last = schedule.num_train_timesteps - 1
    if not 1 <= steps <= last:
        raise UserError(f"{steps} sampling steps; expected 1 to {last}")
    spaced = torch.arange(steps + 1, dtype=torch.float64) * (last / steps)
    return spaced.round().long().flip(0)[:-1]  # (steps,)


def dpm_solver(predict_noise, latents, steps, schedule):
    """Yield (timestep, x, x_0) after each step, starting from pure noise `latents` (B, 4, h, w).

    DPM-Solver++(2M): in λ = log(α/σ), with h = λ_t − λ_s for a step from s to t and r = h_previous / h,

        D   = x_0(s) + (x_0(s) − x_0(s_previous)) / 2r
        x_t = (σ_t/σ_s) x_s − α_t (e^{−h} − 1) D

    x_0 is the model's estimate of the clean latents. The first and the last step use D = x_0(s) (first order); the last
    goes to σ = 0, where x = x_0.

    predict_noise(x (B, 4, h, w), timestep int) -> ε (B, 4, h, w)
    """
    alphas, sigmas = alphas_sigmas(schedule, latents.device)
    timesteps = sampling_timesteps(steps, schedule).tolist()
    x, x0_previous, lambda_previous = latents.float(), None, None
    for i, t in enumerate(timesteps):
        alpha, sigma = alphas[t], sigmas[t]
        x0 = (x - sigma * predict_noise(x.to(latents.dtype), t).float()) / alpha
        if i + 1 == len(timesteps):
            yield t, x0, x0
            return
        alpha_next, sigma_next = alphas[timesteps[i + 1]], sigmas[timesteps[i + 1]]
        lam, lambda_next = torch.log(alpha / sigma), torch.log(alpha_next / sigma_next)
        h = lambda_next - lam
        direction = x0
        if x0_previous is not None:
            direction = x0 + (x0 - x0_previous) * h / (2 * (lam - lambda_previous))
        x = sigma_next / sigma * x - alpha_next * torch.expm1(-h) * direction
        x0_previous, lambda_previous = x0, lam
        yield t, x, x0
