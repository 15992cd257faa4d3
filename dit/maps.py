"""Where an atom acts: its coefficient at each patch while a picture is drawn, and an overlay on the picture."""

import numpy as np
import torch
from PIL import Image

from sparsecode import record_maps


def watch(pipe, prompt, noise, atoms, **options):
    """Draw the prompt from noise (1, 4, h, w), and record the coefficients of some atoms.

    `atoms` is a list of (layer, m); `options` go to `pipe.generate`. Returns the PIL image, and S (atoms, steps, rows,
    columns): each coefficient at each sampler step and patch. With guidance, it is from the pass with the prompt.
    """
    model = pipe.transformer
    chosen = {name: [m for layer, m in atoms if layer == name] for name, _ in atoms}
    with record_maps(model, chosen) as maps:
        (picture,) = pipe.generate([prompt], latents=noise, **options)
    rows, columns = (side // model.config.patch_size for side in noise.shape[2:])
    seen = {}
    for name, calls in maps.items():
        s = torch.stack([call[-1] for call in calls])  # steps × (B, N, chosen) -> (steps, N, chosen)
        s = s.permute(2, 0, 1).unflatten(2, (rows, columns))  # (chosen, steps, rows, columns)
        seen |= {(name, m): values for m, values in zip(chosen[name], s)}
    return picture, torch.stack([seen[atom] for atom in atoms])  # (atoms, steps, rows, columns)


def overlay(picture, values, scale=None):
    """A PIL image in pale grey, coloured red where values (h, w) are positive and blue where they are negative.

    The colour is strongest where |values| reach `scale`, by default their maximum.
    """
    scale = max(values.abs().max().item() if scale is None else scale, 1e-12)
    small = Image.fromarray((values / scale).clamp(-1, 1).numpy())  # (h, w) float
    strength = np.asarray(small.resize(picture.size, Image.Resampling.BILINEAR))[..., None]  # (H, W, 1)
    grey = 128 + np.asarray(picture.convert("L"), dtype=np.float32)[..., None] / 2  # (H, W, 1), pale
    colour = np.where(strength > 0, (214, 40, 40), (38, 84, 196))  # (H, W, 3)
    alpha = 0.85 * np.abs(strength)  # (H, W, 1)
    return Image.fromarray(((1 - alpha) * grey + alpha * colour).clip(0, 255).astype(np.uint8))
