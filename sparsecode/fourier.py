"""The Fourier toy: one attention layer restores masked signals and adapts to a new band (§3.3, C.1; Fig. 2, 8, 9).

The paper does not say how its "5 random Fourier bases" are drawn. There are three readings here: `five_of_five` has 5
fixed bases; `five_of_ten` draws 5 for each signal from a pool of 10, `five_of_all` from the whole band. Signals and
atoms are functions of time: rows of (…, T).
"""

import copy
import math
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn
from tqdm import trange

from .common import UserError
from .thresholds import soft_threshold, top_k

SIGMAS = ("top_k", "soft", "none")
PARTS = {"all": ("W_q", "W_k", "W_s", "D"), "atoms": ("D",), "coefficients": ("W_q", "W_k", "W_s")}
STREAMS = ("data", "model", "pretrain", "fine_tune", "test")  # uses of random numbers, each with its own generator


@dataclass(frozen=True)
class Settings:
    length: int = 64  # T, samples of a signal
    observed: int = 16  # samples that the mask keeps
    low: tuple = (0, 24)  # the frequency band of pre-training, in periods per signal
    high: tuple = (25, 32)  # the band of fine-tuning
    bases: int = 5  # in each signal
    pool: int | None = 5  # bases of a band that signals are made of; None: all of them
    fixed_mask: bool = True  # one mask for all signals

    channels: int = 64  # N, tokens that a signal is lifted to
    width: int = 128  # C, of queries and keys
    atoms: int = 100  # M
    sigma: str = "top_k"  # or "soft", or "none": the dense control
    k: int = 9  # coefficients that top-k keeps
    lam: float = 0.1  # λ of "soft": its threshold, and the weight of ‖S‖₁ in the loss
    atom_std: float = 1e-3  # standard deviation of the initial D; a larger one would leave noise in the high band

    steps: int = 2000
    batch: int = 64
    lr: float = 3e-3
    clip: float = 5.0
    seed: int = 0


def five_of_five(**changes):
    """Settings with 5 fixed bases for each band and one mask: 5 unknowns, 16 samples. `changes` replace fields.

    The layer restores the signals, and fine-tuning the atoms adapts it to the high band. But every signal uses all 5
    bases, so nothing makes an atom become a single basis.
    """
    return Settings(**changes)


def five_of_ten(**changes):
    """Settings with a pool of 10 bases for each band, 5 of them in each signal, and one mask: 10 unknowns, 16 samples.

    The layer can restore the signals, and they are sparse enough for atoms to become single bases.
    """
    return Settings(**{"pool": 10, "sigma": "soft", **changes})


def five_of_all(**changes):
    """Settings with 5 bases of the whole band and a separate mask for each signal: 49 unknowns, 16 samples.

    Atoms become single bases, but one layer cannot restore these signals.
    """
    return Settings(**{"pool": None, "fixed_mask": False, "k": 5, **changes})


def seeded(settings, stream):
    """A generator for one of STREAMS. Other streams and other seeds give other random numbers."""
    return torch.Generator().manual_seed(len(STREAMS) * settings.seed + STREAMS.index(stream))


# Data


def fourier_bases(low, high, length=64):
    """The real Fourier bases with f = low … high periods: orthonormal rows (P, T), by frequency.

    cos(2πft/T) and sin(2πft/T) are two bases, and a wave of another phase is a mixture of them. f = 0
    and f = T/2 have no sine. UserError unless 0 <= low <= high <= T/2.
    """
    if not 0 <= low <= high <= length / 2:
        raise UserError(f"there is no band {low} to {high} in {length} samples; stay within 0 and {length // 2}")
    time = torch.arange(length, dtype=torch.float64) / length  # (T,)
    bases = []
    for f in range(low, high + 1):
        bases.append(torch.cos(2 * math.pi * f * time))  # (T,)
        if f not in (0, length / 2):
            bases.append(torch.sin(2 * math.pi * f * time))  # (T,)
    return F.normalize(torch.stack(bases), dim=1).float()  # (P, T)


class Signals:
    """Random mixtures of 5 bases of one band, with mean power 1, and a mask that sets all but 16 samples to 0."""

    def __init__(self, settings, band):
        self.settings = settings
        generator = seeded(settings, "data")
        self.mask = random_masks(1, settings, generator)  # (1, T), the same for both bands
        bases = fourier_bases(*band, settings.length)  # (all, T)
        pool = len(bases) if settings.pool is None else settings.pool  # P
        if not settings.bases <= pool <= len(bases):
            raise UserError(
                f"pool={pool}: choose a number from {settings.bases} (bases of a signal) to {len(bases)} (of the band)"
            )
        chosen = torch.randperm(len(bases), generator=generator)[:pool].sort().values  # (P,)
        self.bases = bases[chosen]  # (P, T)

    def draw(self, n, generator):
        """n signals and their masked versions, (n, T) each"""
        s = self.settings
        which = torch.rand(n, len(self.bases), generator=generator).topk(s.bases).indices  # (n, P) -> (n, bases)
        amplitude = torch.randn(n, s.bases, generator=generator) * (s.length / s.bases) ** 0.5  # (n, bases)
        codes = torch.zeros(n, len(self.bases)).scatter(1, which, amplitude)  # (n, P)
        signals = codes @ self.bases  # (n, P) x (P, T) -> (n, T)
        return signals, signals * (self.mask if s.fixed_mask else random_masks(n, s, generator))  # (n, T), (n, T)

    def test_set(self, n=500):
        """n signals that training never sees, and their masked versions, (n, T) each"""
        return self.draw(n, seeded(self.settings, "test"))


def random_masks(n, settings, generator):
    """n masks (n, T) with 16 ones in each"""
    seen = torch.rand(n, settings.length, generator=generator).topk(settings.observed).indices  # (n, observed)
    return torch.zeros(n, settings.length).scatter(1, seen, 1.0)  # (n, T)


# Model


class FourierAttention(nn.Module):
    """Σ over tokens of σ(A X W_s) D / √N    (Eq. 8 on X = p xᵀ)

    The masked signal x (T,) is lifted to N tokens X = p xᵀ (N, T) by a frozen random p (N,). So every
    query and key is a multiple of one vector, Q Kᵀ = (xᵀW_q · xᵀW_k) p pᵀ, and A X = (A p) xᵀ has rank
    one too: token n holds the signal times a gain (A p)_n. `forward` uses this; `forward_naive` computes
    the formula directly.
    """

    def __init__(self, settings):
        super().__init__()
        if settings.sigma not in SIGMAS:
            raise UserError(f"sigma={settings.sigma!r} is unknown; choose one of {', '.join(SIGMAS)}")
        self.settings = s = settings
        generator = seeded(s, "model")

        def random(*shape, std):
            return nn.Parameter(torch.randn(*shape, generator=generator) * std)

        self.register_buffer("p", torch.randn(s.channels, generator=generator))  # (N,)
        self.W_q = random(s.length, s.width, std=s.length**-0.5)  # (T, C)
        self.W_k = random(s.length, s.width, std=s.length**-0.5)  # (T, C)
        self.W_s = random(s.length, s.atoms, std=s.length**-0.5)  # (T, M)
        self.D = random(s.atoms, s.length, std=s.atom_std)  # (M, T)

    def sigma(self, z):
        if self.settings.sigma == "soft":
            return soft_threshold(z, self.settings.lam)  # (..., M)
        return top_k(z, self.settings.k) if self.settings.sigma == "top_k" else z  # (..., M)

    def gains(self, x):
        """A p, the gain of each token: x (B, T) -> (B, N)"""
        sharpness = ((x @ self.W_q) * (x @ self.W_k)).sum(1) / self.settings.width**0.5  # (B, T) -> (B,)
        attention = (sharpness[:, None, None] * torch.outer(self.p, self.p)).softmax(-1)  # (B, N, N)
        return attention @ self.p  # (B, N, N) x (N,) -> (B, N)

    def coefficients(self, x):
        """Σ over tokens of S / √N, the weight of each atom in the output: x (B, T) -> (B, M)"""
        gains, z = self.gains(x), x @ self.W_s  # (B, N), (B, T) -> (B, M)
        if self.settings.sigma == "soft":
            s = self.sigma(gains[:, :, None] * z[:, None, :]).sum(1)  # (B, N, M) -> (B, M)
        else:
            s = gains.sum(1, keepdim=True) * self.sigma(z)  # σ(gain · z) = gain · σ(z): all tokens agree; (B, M)
        return s / self.settings.channels**0.5  # (B, M)

    def forward(self, x):
        return self.coefficients(x) @ self.D  # (B, M) x (M, T) -> (B, T)

    def forward_naive(self, x):
        s = self.settings
        x = self.p[:, None] * x[:, None, :]  # (B, T) -> X (B, N, T)
        q, k = x @ self.W_q, x @ self.W_k  # (B, N, C), (B, N, C)
        a = (q @ k.transpose(1, 2) / s.width**0.5).softmax(-1)  # (B, N, N)
        return (self.sigma(a @ x @ self.W_s) @ self.D).sum(1) / s.channels**0.5  # (B, N, T) -> (B, T)


# Training


def pretrain(settings):
    """Train a new model on the low band, coefficients and atoms together."""
    return train(FourierAttention(settings), Signals(settings, settings.low), "all", "pretrain")


def fine_tune(model, part):
    """A copy of the model, trained on the high band: only its "atoms" D, or only its "coefficients" W_q, W_k, W_s."""
    settings = model.settings
    return train(copy.deepcopy(model), Signals(settings, settings.high), part, "fine_tune")


@contextmanager
def one_thread():
    """Use one core: enough for a small layer, the same results on every machine, and no waiting for a busy core."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


@one_thread()
def train(model, signals, part, stream):
    """Least squares on new signals in each step, plus λ‖S‖₁ for "soft" (Eq. 5). Trains in place; returns the model."""
    if part not in PARTS:
        raise UserError(f"part={part!r} is unknown; choose one of {', '.join(PARTS)}")
    s, generator = model.settings, seeded(model.settings, stream)
    model.requires_grad_(False)
    chosen = [getattr(model, name).requires_grad_() for name in PARTS[part]]
    optimizer = torch.optim.Adam(chosen, lr=s.lr, fused=True)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, s.steps)
    for _ in trange(s.steps, desc=f"training {part}", disable=None):
        truth, masked = signals.draw(s.batch, generator)  # (B, T), (B, T)
        codes = model.coefficients(masked)  # (B, M)
        loss = (truth - codes @ model.D).square().sum(1).mean()
        if s.sigma == "soft":
            loss = loss + s.lam * codes.abs().sum(1).mean()
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(chosen, s.clip)
        optimizer.step()
        schedule.step()
    return model.requires_grad_(False)


# Measures


def nmse(estimates, signals):
    """Σ‖x̂ − x‖² / Σ‖x‖²: 0 is perfect, 1 is the error of all zeros."""
    return ((estimates - signals).square().sum() / signals.square().sum()).item()


def partial_sums(codes, dictionary):
    """Sums of the n largest contributions s_m D_m, n = 1 … M: codes (N, M), dictionary (M, T) -> (N, M, T)."""
    order = (codes.abs() * dictionary.norm(dim=1)).argsort(dim=1, descending=True)  # (N, M)
    return (codes.gather(1, order)[:, :, None] * dictionary[order]).cumsum(1)  # (N, M, T)


def atoms_needed(codes, dictionary, share=0.99):
    """How many of its largest contributions each signal (N,) needs to reach `share` of Σ‖s_m D_m‖²."""
    energy = (codes * dictionary.norm(dim=1)).square().sort(dim=1, descending=True).values  # (N, M)
    return (energy.cumsum(1) < share * energy.sum(1, keepdim=True)).sum(1) + 1  # (N,)


def importance(codes, dictionary):
    """mean |s_m| · ‖D_m‖ for each atom (M,), as in `sparsecode.importance`"""
    return codes.abs().mean(0) * dictionary.norm(dim=1)  # (M,)


def spectra(dictionary):
    """The share of each atom's energy at 0, 1, … T/2 periods: (M, T/2 + 1), rows sum to one."""
    energy = torch.fft.rfft(dictionary).abs().square()  # (M, T) -> (M, T/2 + 1)
    energy[:, 1 : (dictionary.shape[1] + 1) // 2] *= 2  # these stand for the negative frequencies too
    return energy / energy.sum(1, keepdim=True)  # (M, T/2 + 1)


def cosine_with_bases(dictionary, bases):
    """|cos| of each atom with its nearest basis, (M,). Sine and cosine are two bases, so the phase matters."""
    return (F.normalize(dictionary, dim=1) @ F.normalize(bases, dim=1).T).abs().max(1).values  # (M, P) -> (M,)
