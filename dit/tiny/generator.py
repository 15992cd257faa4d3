"""The stage of the transformer: trained on latents and text embeddings of the frozen autoencoder and text encoder."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dit import parallel
from dit.config import SchedulerConfig, TransformerConfig
from dit.diffusion import add_noise, alphas_sigmas
from dit.pictures import to_tensor
from dit.tiny.fit import fit, rng_of
from dit.tiny.scenes import caption, draw, sample_scene
from dit.transformer import PixArtTransformer
from sparsecode.common import replacing

HEADS = 4
THING_WEIGHT = 3.0  # weight of the error at things; most of a picture is background, which is learned quickly


@torch.no_grad()
def cached_scenes(args, vae, tokenizer, encoder, folder):
    """Latents of `--pictures` scenes, masks of their things, embeddings of two captions each; cached in `folder`."""
    file = folder / "scenes.pt"
    if parallel.rank() == 0 and not file.exists():
        rng, factor = rng_of("scenes", args.seed, 0), vae.config.factor
        latents, texts, things = [], [], torch.zeros(args.pictures, 64 // factor, 64 // factor, dtype=torch.bool)
        for start in tqdm(range(0, args.pictures, 100), desc="scenes", disable=None):
            scenes = [sample_scene(rng, two_things=0.5) for _ in range(start, min(start + 100, args.pictures))]
            images = to_tensor([draw(scene) for scene in scenes]).to(args.device)
            latents.append(vae.encode(images).half().cpu())
            texts += [caption(scene, rng) for scene in scenes for _ in range(2)]  # picture i has captions 2i, 2i + 1
            for i, scene in enumerate(scenes, start):
                for left, top, right, bottom in (thing.box for thing in scene.things):
                    left, top = max(0, left), max(0, top)  # the rim may lie outside
                    things[i, top // factor : -(-bottom // factor), left // factor : -(-right // factor)] = True
        unique = [""] + sorted(set(texts))
        row = {text: i for i, text in enumerate(unique)}
        ids, mask = tokenizer(unique, 32)
        text = torch.cat([encoder(i.to(args.device), m.to(args.device)).half().cpu()
                          for i, m in zip(ids.split(500), mask.split(500))])  # fmt: skip
        captions = torch.tensor([row[t] for t in texts])
        data = {"latents": torch.cat(latents), "things": things, "caption": captions, "text": text, "mask": mask}
        with replacing(file) as temporary:
            torch.save(data, temporary)
    parallel.wait()
    return torch.load(file, weights_only=True)


def train_transformer(args, vae, tokenizer, encoder, folder):
    data = cached_scenes(args, vae, tokenizer, encoder, folder)
    config = TransformerConfig(num_layers=args.layers, num_attention_heads=HEADS,
                               attention_head_dim=args.width // HEADS, sample_size=64 // vae.config.factor,
                               caption_channels=encoder.config.d_model, cross_attention_dim=args.width,
                               interpolation_scale=1.0)  # fmt: skip
    torch.manual_seed(args.seed)
    model = PixArtTransformer(config).to(args.device)
    for block in model.transformer_blocks:
        nn.init.zeros_(block.attn2.to_out.weight)  # at first the text has no influence
    nn.init.normal_(model.timestep_modulation.weight, std=0.02)
    nn.init.zeros_(model.proj_out.weight)
    schedule = SchedulerConfig()
    alpha, _ = alphas_sigmas(schedule)

    def loss(step):
        rng = rng_of("transformer", args.seed, step + 1)
        pick = torch.from_numpy(rng.integers(0, len(data["latents"]), args.batch_size))
        row = data["caption"][2 * pick + torch.from_numpy(rng.integers(0, 2, args.batch_size))]
        row[torch.from_numpy(rng.random(args.batch_size) < 0.1)] = 0  # the empty caption, for guidance
        mask = data["mask"][row]
        mask = mask[:, : mask.sum(1).max()]
        text = data["text"][row, : mask.shape[1]].float()
        latents = data["latents"][pick].float()
        # Half of the timesteps are from the middle, where things take shape; late in training, from where edges do.
        early = step < 0.6 * args.steps
        low, high = (200, 800) if early else (50, 600)
        t = np.where(rng.random(args.batch_size) < 0.5, rng.integers(0, schedule.num_train_timesteps, args.batch_size),
                     rng.integers(low, high, args.batch_size))  # fmt: skip
        noise = torch.from_numpy(rng.standard_normal(latents.shape, dtype=np.float32))
        weight = 1 + (THING_WEIGHT - 1) * data["things"][pick].float()  # (B, h, w)
        t, noise, latents, text, mask, weight = (
            x.to(args.device) for x in (torch.from_numpy(t), noise, latents, text, mask, weight)
        )
        # Weights for the error of x_0 instead of ε, clamped: captions fix most of a picture, so large t can be learned.
        weight = weight * (1 / alpha.to(args.device)[t] ** 2).clamp(max=40.0 if early else 8.0)[:, None, None]
        predicted = model(add_noise(latents, noise, t, schedule), t, text, mask)[:, : latents.shape[1]]
        return (weight * (predicted - noise).square().mean(1)).mean()

    matrices = [p for p in model.transformer_blocks.parameters() if p.ndim == 2 and min(p.shape) > 6]  # not the tables
    return fit("transformer", model, loss, steps=args.steps, lr=args.lr, folder=folder, muon=matrices)
