"""A small transformer VAE of handwritten digits, and what a few atoms in its decoder do (Fig. 1, §3.3, Appendix B)."""

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import nn
from tqdm import tqdm

from .atoms import keep_atoms
from .attach import adapters, attach
from .attention import Attention
from .common import UserError, replacing
from .fourier import one_thread

HELD_OUT = 5  # every fifth digit is held out from training
NOISE = 0.5  # standard deviation of the noise on the input of the encoder


@dataclass(frozen=True)
class VAEConfig:
    """The sizes of Appendix B, except `feedforward`, which the paper does not give."""

    side: int = 28
    patch: int = 7
    width: int = 128
    heads: int = 4
    feedforward: int = 256
    layers: int = 2  # of the encoder, and of the decoder
    latent: int = 32

    @property
    def tokens(self):
        return (self.side // self.patch) ** 2


# ---- digits -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Digits:
    images: torch.Tensor  # (B, H, W) in [0, 1]
    labels: torch.Tensor  # (B,)

    def only(self, *wanted):
        """The images (B', H, W) of these digits."""
        return self.images[torch.isin(self.labels, torch.tensor(wanted))]


def load_digits(file):
    """The Digits of an .npz file in two parts: for training, and every fifth, held out. UserError if it is missing."""
    try:
        with np.load(file, allow_pickle=False) as stored:
            digits = _digits(torch.from_numpy(stored["images"]), torch.from_numpy(stored["labels"]))
    except FileNotFoundError:
        raise UserError(f"there is no file of digits {file}; check the path") from None
    held_out = torch.arange(len(digits.labels)) % HELD_OUT == HELD_OUT - 1  # (B,)
    return tuple(Digits(digits.images[part], digits.labels[part]) for part in (~held_out, held_out))


def full_training_set(folder):
    """MNIST's 60,000 training digits, which torchvision finds in `folder` or downloads into it."""
    from torchvision.datasets import MNIST

    try:
        stored = MNIST(folder, train=True, download=True)
    except (OSError, RuntimeError) as error:
        raise UserError(f"MNIST is not in {folder} and could not be downloaded into it ({error})") from None
    return _digits(stored.data, stored.targets)


def _digits(images, labels):
    return Digits(images.float() / 255, labels.long())  # bytes (B, H, W), (B,)


# ---- the model --------------------------------------------------------------------------------------------------


def patchify(images, patch):
    """(B, H, W) -> (B, N, patch²), row by row"""
    x = images.unflatten(2, (-1, patch)).unflatten(1, (-1, patch))  # (B, H, W) -> (B, H/p, p, W/p, p)
    return x.transpose(2, 3).flatten(3).flatten(1, 2)  # -> (B, H/p, W/p, p, p) -> (B, N, p²)


def unpatchify(patches, side):
    """(B, N, patch²) -> (B, H, W)"""
    patch = math.isqrt(patches.shape[-1])
    x = patches.unflatten(2, (patch, patch)).unflatten(1, (side // patch, -1))  # (B, N, p²) -> (B, H/p, W/p, p, p)
    return x.transpose(2, 3).flatten(3).flatten(1, 2)  # -> (B, H/p, p, W/p, p) -> (B, H, W)


class Block(nn.Module):
    """x + attention(norm(x)), then x + feed-forward(norm(x))"""

    def __init__(self, config):
        super().__init__()
        self.norm_1, self.norm_2 = nn.LayerNorm(config.width), nn.LayerNorm(config.width)
        self.attention = Attention(config.width, config.heads)
        self.linear_1 = nn.Linear(config.width, config.feedforward)
        self.linear_2 = nn.Linear(config.feedforward, config.width)

    def forward(self, x):
        x = x + self.attention(self.norm_1(x))  # (B, N, C)
        hidden = F.gelu(self.linear_1(self.norm_2(x)))  # (B, N, C) -> (B, N, feedforward)
        return x + self.linear_2(hidden)  # (B, N, feedforward) -> (B, N, C)


class Encoder(nn.Module):
    """Pictures (B, H, W) -> mean and log-variance of q(z | picture), (B, latent) each"""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        self.embed = nn.Linear(config.patch**2, config.width)
        self.position = nn.Parameter(0.02 * torch.randn(config.tokens, config.width))  # (N, C)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.to_latent = nn.Linear(config.tokens * config.width, 2 * config.latent)

    def forward(self, images):
        x = self.embed(patchify(images, self.patch)) + self.position  # (B, H, W) -> (B, N, p²) -> (B, N, C)
        for block in self.blocks:
            x = block(x)  # (B, N, C)
        return self.to_latent(self.norm(x).flatten(1)).chunk(2, dim=1)  # (B, N·C) -> (B, 2·latent) -> two (B, latent)


class Decoder(nn.Module):
    """Latents (B, latent) -> logits of the pixels (B, H, W). The bias of `from_latent` is the position of a token."""

    def __init__(self, config):
        super().__init__()
        self.tokens, self.side = config.tokens, config.side
        self.from_latent = nn.Linear(config.latent, config.tokens * config.width)
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.layers))
        self.norm = nn.LayerNorm(config.width)
        self.to_pixels = nn.Linear(config.width, config.patch**2)

    def forward(self, z):
        x = self.from_latent(z).unflatten(1, (self.tokens, -1))  # (B, latent) -> (B, N·C) -> (B, N, C)
        for block in self.blocks:
            x = block(x)  # (B, N, C)
        return unpatchify(self.to_pixels(self.norm(x)), self.side)  # (B, N, C) -> (B, N, p²) -> (B, H, W)


class VAE(nn.Module):
    def __init__(self, config=VAEConfig()):
        super().__init__()
        self.config = config
        self.encoder, self.decoder = Encoder(config), Decoder(config)

    def forward(self, images, generator=None):
        """Logits of the pixels for a sampled latent, and the mean and log-variance of its distribution"""
        mean, log_variance = self.encoder(images)  # (B, latent) each
        z = mean + (log_variance / 2).exp() * torch.randn(mean.shape, generator=generator)  # (B, latent)
        return self.decoder(z), mean, log_variance  # (B, H, W), (B, latent), (B, latent)


class Classifier(nn.Module):
    """Pictures (B, 28, 28) in [0, 1] -> logits of the ten digits (B, 10). It reads what a decoded picture shows."""

    def __init__(self):
        super().__init__()
        self.conv_1, self.conv_2 = nn.Conv2d(1, 32, 3, padding=1), nn.Conv2d(32, 64, 3, padding=1)
        self.linear = nn.Linear(64 * 7 * 7, 10)

    def forward(self, images):
        x = F.max_pool2d(F.relu(self.conv_1(images[:, None])), 2)  # (B, 28, 28) -> (B, 1, 28, 28) -> (B, 32, 14, 14)
        x = F.max_pool2d(F.relu(self.conv_2(x)), 2)  # (B, 32, 14, 14) -> (B, 64, 7, 7)
        return self.linear(x.flatten(1))  # (B, 64, 7, 7) -> (B, 3136) -> (B, 10)


# ---- the loss ---------------------------------------------------------------------------------------------------


def reconstruction(logits, images):
    """-log p(picture | z) with Bernoulli pixels, summed over a picture, mean over the batch"""
    return F.binary_cross_entropy_with_logits(logits, images, reduction="sum") / len(images)


def divergence(mean, log_variance):
    """KL(q(z | picture) ‖ N(0, 1)), summed over the latent, mean over the batch"""
    return 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(1).mean()  # (B, latent) -> (B,) -> scalar


def add_noise(images, generator):
    return images + NOISE * torch.randn(images.shape, generator=generator)  # (B, H, W)


# ---- training: the VAE, the classifier, an adapter --------------------------------------------------------------


def pretrain(images, *, seed=0, epochs=20):
    """Train a VAE to reconstruct clean images (n, 28, 28) from noisy ones."""
    torch.manual_seed(seed)
    model = VAE()

    def loss(chosen, generator):
        logits, mean, log_variance = model(add_noise(images[chosen], generator), generator)
        return reconstruction(logits, images[chosen]) + divergence(mean, log_variance)

    fit("VAE", model, loss, len(images), epochs * math.ceil(len(images) / 128), batch=128, seed=seed)
    return model.eval()


def train_classifier(images, labels, *, seed=0, epochs=10):
    torch.manual_seed(seed)
    model = Classifier()

    def loss(chosen, generator):
        return F.cross_entropy(model(images[chosen]), labels[chosen])

    fit("classifier", model, loss, len(images), epochs * math.ceil(len(images) / 128), batch=128, seed=seed)
    return model.eval()


def train_adapter(model, images, *, density, order="after", std=0.02, target=r"decoder\.", seed=0, steps=800):
    """Attach 100 atoms to each attention of the decoder, and train them on noisy `images` (n, 28, 28) of the new digit.

    With order="after", σ(A X W_s) D of Eq. 8, each token uses at most k atoms. `std` is the standard deviation of the
    initial D, which `attach` sets to zero. The rest is frozen, including the encoder, so the divergence is constant and
    left out. Returns the loss of each step.
    """
    torch.manual_seed(seed)
    for adapter in attach(model, "sparse", target=target, atoms=100, density=density, order=order):
        nn.init.normal_(adapter.D, std=std)

    def loss(chosen, generator):
        logits, _, _ = model(add_noise(images[chosen], generator), generator)
        return reconstruction(logits, images[chosen])

    return fit("adapter", model, loss, len(images), steps, batch=64, lr=3e-3, seed=seed)


@one_thread()
def fit(name, model, loss, n_images, steps, *, batch, seed, lr=1e-3):
    """Minimise loss(chosen, generator) with Adam; each epoch visits all pictures in a new order. Returns the losses."""
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam([p for p in model.parameters() if p.requires_grad], lr=lr)
    left, losses = [], []
    for _ in tqdm(range(steps), desc=name, disable=None):
        left = left or list(torch.randperm(n_images, generator=generator).split(batch))
        value = loss(left.pop(0), generator)
        optimizer.zero_grad()
        value.backward()
        optimizer.step()
        losses.append(value.item())
    return losses


# ---- files ------------------------------------------------------------------------------------------------------


def save_models(folder, *models):
    """Save each model in float16, in a file named after its class."""
    for model in models:
        tensors = {name: value.half().contiguous() for name, value in model.state_dict().items()}
        with replacing(_file(folder, model)) as temporary:
            save_file(tensors, temporary)


def load_models(folder):
    """The VAE and the classifier in a folder, in float32. UserError if a file is missing or does not fit."""
    models = VAE(), Classifier()
    for model in models:
        file = _file(folder, model)
        try:
            model.load_state_dict(load_file(file))
        except FileNotFoundError:
            raise UserError(f"there is no file {file}; check the folder") from None
        except (SafetensorError, RuntimeError) as error:
            raise UserError(f"{file} does not hold this model: {' '.join(str(error).split())}") from None
    return tuple(model.eval() for model in models)


def _file(folder, model):
    return Path(folder) / f"{type(model).__name__.lower()}.safetensors"


# ---- what the atoms do ------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(model, images):
    """The mean of q(z | picture), called the latent of a picture below"""
    return model.encoder(images)[0]  # (B, H, W) -> (B, latent)


@torch.no_grad()
def decode(model, z):
    return model.decoder(z).sigmoid()  # (B, latent) -> (B, H, W)


@torch.no_grad()
def read(model, classifier, z):
    """The digits that the classifier reads in the decoded latents"""
    return classifier(decode(model, z)).argmax(1)  # (B, latent) -> (B, H, W) -> (B, 10) -> (B,)


def share_read_as(digit, model, classifier, z):
    return (read(model, classifier, z) == digit).float().mean().item()  # (B,) -> scalar


def share_by_atoms(digit, model, classifier, z, counts):
    """{n: share of latents read as `digit` with only the n most important atoms}. Afterwards all atoms are on again."""
    shares = {}
    for n in counts:
        keep_atoms(model, n)
        shares[n] = share_read_as(digit, model, classifier, z)
    keep_atoms(model, "all")
    return shares


def keep_only(model, atoms):
    """Switch on the atoms with these numbers, counted over all layers, and switch the others off."""
    layers = adapters(model).values()
    kept = torch.zeros(sum(adapter.atoms for adapter in layers), dtype=torch.bool)  # (all atoms,)
    kept[atoms] = True
    for adapter, part in zip(layers, kept.split([adapter.atoms for adapter in layers])):
        adapter.keep.copy_(part)  # (M,)


def contribution(model, z, atoms):
    """What some of the kept atoms add: the decoded picture with them minus the picture without them, (B, H, W)."""
    kept = torch.cat([adapter.keep for adapter in adapters(model).values()]).nonzero()[:, 0]  # (kept atoms,)
    with_them = decode(model, z)  # (B, H, W)
    keep_only(model, kept[~torch.isin(kept, atoms)])
    difference = with_them - decode(model, z)  # (B, H, W)
    keep_only(model, kept)
    return difference
