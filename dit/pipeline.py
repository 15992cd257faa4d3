"""All parts together: prompt -> text embedding, picture <-> latent, and generation with guidance.

pipe = Pipeline.from_folder("weights/tiny")
pipe.generate(["a red star on a blue background"])[0].save("star.png")
"""

import json
from functools import cached_property
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dit.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae
from dit.config import SchedulerConfig
from dit.diffusion import dpm_solver
from dit.pictures import to_pil
from dit.t5 import clean_caption
from sparsecode.common import UserError

PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")


class Pipeline:
    """PixArt-Σ from a folder in the layout of diffusers. A part is loaded when it is first used.

    `defaults` holds the settings that suit the model (guidance, training steps, …), from the folder's defaults.json
    if there is one: a tiny model wants others than the released one.
    """

    def __init__(self, folder, dtype=None, device=None, text_device=None):
        self.folder = Path(folder)
        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        self.text_device = torch.device(text_device or self.device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder; weights/README.md says how to get the weights")
        absent = [part for part in PARTS if not (self.folder / part).is_dir()]
        if absent:
            raise UserError(f"{folder} has no folder {absent[0]}/; a PixArt-Σ pipeline needs {', '.join(PARTS)}")
        self.schedule = SchedulerConfig.from_json(self.folder / "scheduler" / "scheduler_config.json")
        self._embeddings = {}  # prompt -> text (L, C)
        file = self.folder / "defaults.json"
        self.defaults = json.loads(file.read_text()) if file.exists() else {}

    @classmethod
    def from_folder(cls, folder, dtype=None, device=None, text_device=None):
        """dtype and device: bfloat16 on a GPU where there is one, float32 on a CPU, unless told.

        text_device: where T5 is, "cpu" to keep its 9.5 GB off a small GPU.
        """
        return cls(folder, dtype, device, text_device)

    @cached_property
    def transformer(self):
        return load_transformer(self.folder / "transformer", self.dtype, self.device)

    @cached_property
    def text_encoder(self):
        return load_text_encoder(self.folder / "text_encoder", self.dtype, self.text_device)

    @cached_property
    def tokenizer(self):
        return load_tokenizer(self.folder / "tokenizer")

    @cached_property
    def vae(self):
        return load_vae(self.folder / "vae", self.dtype, self.device)

    def free(self, *parts):
        """Forget loaded parts, so that their memory can be used; they are loaded again when needed."""
        for part in parts:
            self.__dict__.pop(part, None)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()

    @property
    def multiple(self):
        """Sides of pictures must be a multiple of this many pixels: one patch of latents."""
        return self.vae.config.factor * self.transformer.config.patch_size

    @property
    def resolution(self):
        """The side of the pictures that the model was trained on, in pixels."""
        return self.vae.config.factor * self.transformer.config.sample_size

    @torch.no_grad()
    def encode_prompt(self, prompts):
        """B prompts -> text (B, L, C) and text_mask (B, L), cut to the longest prompt: the rest would be masked.

        Prompts seen before are remembered, so that T5 can be freed before they are drawn again.
        """
        prompts = [clean_caption(prompt) for prompt in prompts]
        new = sorted(set(prompts) - self._embeddings.keys())
        for prompt in new:
            ids, mask = self.tokenizer([prompt])
            ids, mask = (x[:, : int(mask.sum())].to(self.text_device) for x in (ids, mask))  # (1, 300) -> (1, L)
            self._embeddings[prompt] = self.text_encoder(ids, mask)[0].to(self.device)  # (L, C)
        return pad_rows([self._embeddings[prompt] for prompt in prompts])

    @torch.no_grad()
    def encode_images(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latent means (B, 4, H/f, W/f)."""
        return self.vae.encode(images.to(self.device, self.dtype))

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, h·f, w·f) in [-1, 1], float32."""
        return self.vae.decode(latents.to(self.device, self.dtype)).float().clamp(-1, 1)

    def noise(self, seeds, height=None, width=None):
        """Starting noise (len(seeds), 4, h, w), one seed for each picture: drawn on the CPU, so the same everywhere."""
        height = self.resolution if height is None else height
        width = self.resolution if width is None else width
        if height <= 0 or width <= 0 or height % self.multiple or width % self.multiple:
            raise UserError(f"{width}×{height} pixels: both sides must be a multiple of {self.multiple}")
        shape = (self.transformer.config.in_channels, height // self.vae.config.factor, width // self.vae.config.factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])

    @torch.no_grad()
    def sample(self, latents, text, text_mask, *, steps=20, guidance=4.5):
        """Yield (timestep, latents, guess of the clean latents) after each step from noise (B, 4, h, w).

        Classifier-free guidance (Ho & Salimans, 2022): ε = ε(empty) + guidance · (ε(prompt) − ε(empty)).
        """
        if guidance != 1:
            (empty,), _ = self.encode_prompt([""])
            rows = [empty] * len(text) + [row[: int(mask.sum())] for row, mask in zip(text, text_mask)]
            text, text_mask = pad_rows(rows)  # (2B, L, C), (2B, L), the unconditional half first

        def predict_noise(x, t):
            x = torch.cat([x] * (len(text) // len(x))).to(self.dtype)  # (2B, 4, h, w)
            output = self.transformer(x, torch.full((len(x),), t, device=x.device), text, text_mask)  # (2B, 8, h, w)
            output = output.float()
            if guidance != 1:
                unconditional, conditional = output.chunk(2)
                output = unconditional + guidance * (conditional - unconditional)
            return output[:, : latents.shape[1]]  # (B, 4, h, w): without the learned variance

        yield from dpm_solver(predict_noise, latents.to(self.device).float(), steps, self.schedule)

    @torch.no_grad()
    def generate(self, prompts, *, steps=20, guidance=None, height=None, width=None, seed=0, latents=None):
        """One PIL image for each prompt. Prompt i starts from seed + i, or from `latents` (B, 4, h, w).

        guidance: the model's own default (4.5 unless its folder says otherwise) if not given.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of str, not the single str {prompts!r}")
        guidance = self.defaults.get("guidance", 4.5) if guidance is None else guidance
        if latents is None:
            latents = self.noise(range(seed, seed + len(prompts)), height, width)
        images, batch = [], max(1, 4 * 128 * 128 // latents[0].numel())  # one at a time at 1024×1024, 64 at 64×64
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            text, mask = self.encode_prompt(prompts[part])
            steps_done = self.sample(latents[part], text, mask, steps=steps, guidance=guidance)
            for _, x, _ in tqdm(steps_done, desc="sampling", total=steps, leave=False, disable=None):
                pass
            images += to_pil(self.decode(x))
        return images


def pad_rows(rows):
    """Texts of different lengths, each (L_i, C), as one batch (B, L, C) with its mask (B, L)."""
    mask = [row.new_ones(len(row), dtype=torch.int64) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)
