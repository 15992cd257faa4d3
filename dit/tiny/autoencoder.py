"""The first stage of the tiny model: an autoencoder that turns 64×64 pictures into 16×16 latents of 4 channels."""

import dataclasses

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit.config import VAEConfig
from dit.pictures import to_bytes
from dit.tiny.fit import fit, rng_of
from dit.tiny.scenes import Thing, draw, natural_image, sample_scene
from dit.tiny.subjects import draw_parts, sample_creature, sample_spot
from dit.vae import AutoencoderKL


def middle(thing):
    left, top, right, bottom = thing.box
    return (left + right) // 2, (top + bottom) // 2


def train_vae(args, folder):
    """Train on half scenes, a quarter creatures, a quarter synthetic photographs, so that other pictures work too."""
    rng = rng_of("vae", args.seed, 0)
    half, quarter = args.vae_pictures // 2, args.vae_pictures // 4
    scenes = [sample_scene(rng) for _ in range(half)]
    pool, middles = [draw(scene) for scene in scenes], [middle(scene.things[-1]) for scene in scenes]
    for _ in tqdm(range(quarter), desc="creatures", disable=None):
        spot = sample_spot(rng)
        pool.append(draw_parts(sample_creature(rng), *spot, 64))
        middles.append(middle(Thing("creature", *spot[1:])))
    pool += [natural_image(rng) for _ in tqdm(range(quarter), desc="photographs", disable=None)]
    middles = np.array(middles + [(32, 32)] * quarter)  # (n, 2): the centres of the crops
    pool = to_bytes(pool)  # (n, 3, 64, 64)

    torch.manual_seed(args.seed)
    config = VAEConfig(block_out_channels=(16, 32, 64), layers_per_block=1, norm_num_groups=8, sample_size=64,
                       scaling_factor=1.0, mid_block_add_attention=False)  # fmt: skip
    vae = AutoencoderKL(config).to(args.device, memory_format=torch.channels_last)
    with torch.no_grad():
        vae.quant_conv.bias[config.latent_channels :] = -5.0  # start with little noise in the latents

    def loss(step):
        rng = rng_of("vae", args.seed, step + 1)
        side = 32 if step < 0.75 * args.vae_steps else 64  # small crops are cheaper and teach the same filters
        pick = rng.integers(0, len(pool), 16 if side == 32 else 6)
        corners = (middles[pick] - side // 2 + rng.integers(-8, 9, (len(pick), 2))).clip(0, 64 - side)  # (B, 2)
        images = torch.stack([pool[i, :, y : y + side, x : x + side] for i, (x, y) in zip(pick, corners)])
        images = images.to(args.device).float() / 127.5 - 1  # (B, 3, side, side)
        images = images.flip(3) if rng.random() < 0.5 else images
        if rng.random() < 0.3:
            images = images[:, torch.from_numpy(rng.permutation(3))]  # colours that scenes do not have
        images = images.contiguous(memory_format=torch.channels_last)
        mean, logvar = vae.posterior(images)
        noise = torch.from_numpy(rng.standard_normal(mean.shape, dtype=np.float32)).to(args.device)
        output = vae.decode(mean + (0.5 * logvar).exp() * noise)
        kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
        return F.mse_loss(output, images) + 0.1 * F.l1_loss(output, images) + 1e-4 * kl

    vae = fit("vae", vae, loss, steps=args.vae_steps, lr=2e-3, folder=folder)
    with torch.no_grad():  # latents of unit variance for the transformer
        scale = 1 / vae.encode(pool[: half : max(1, half // 500)].to(args.device) / 127.5 - 1).std().item()
    vae.config = dataclasses.replace(config, scaling_factor=round(scale, 5))
    return vae
