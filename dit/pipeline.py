"""All parts together: prompt -> text embedding, picture <-> latent, and generation with guidance.

pipe = Pipeline.from_folder("weights/tiny")
pipe.generate(["a fox on a striped blue background"])[0].save("fox.png")
"""

from functools import cached_property
from pathlib import Path

import torch
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from dit.checkpoint import load_text_encoder, load_tokenizer, load_transformer, load_vae, transformer_config
from dit.config import SchedulerConfig, T5Config, VAEConfig
from dit.diffusion import dpm_solver
from dit.pictures import to_pil
from dit.t5 import clean_caption
from sparsecode.common import NUMBER, OBJECT, UserError, read_json

PARTS = ("transformer", "text_encoder", "tokenizer", "vae", "scheduler")
LARGEST = 16384  # pixels along a side


def find_device(name=None, option="device"):
    """The torch.device `name`, by default the first available of cuda, mps, cpu. UserError if it cannot be used."""
    if name is None:
        mps = torch.backends.mps.is_available()
        return torch.device("cuda" if torch.cuda.is_available() else "mps" if mps else "cpu")
    if isinstance(name, torch.device):
        return name
    try:
        torch.zeros(1, device=name).item()
        return torch.device(name)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).split(". ")[0].splitlines()[0][:150]
        raise UserError(f"{option} {name} cannot be used ({reason}); try cpu") from None


class Pipeline:
    """PixArt-Σ from a folder in the layout of diffusers. A part is loaded when it is first used.

    `defaults` holds the model's settings (guidance, fine-tuning) from the folder's defaults.json, if it has one: a
    tiny model needs other settings than the released one. UserError if the folder does not hold a pipeline.
    """

    def __init__(self, folder, dtype=None, device=None, text_device=None):
        self.folder = Path(folder)
        self.device = find_device(device)
        self.text_device = self.device if text_device is None else find_device(text_device)
        self.dtype = dtype or (torch.bfloat16 if self.device.type == "cuda" else torch.float32)
        if not self.folder.is_dir():
            raise UserError(f"{folder} is not a folder; weights/README.md says how to get the weights")
        absent = [part for part in PARTS if not (self.folder / part).is_dir()]
        if absent:
            raise UserError(f"{folder} has no folder {absent[0]}/; a PixArt-Σ pipeline needs {', '.join(PARTS)}")
        self.schedule = SchedulerConfig.from_json(self.folder / "scheduler" / "scheduler_config.json")
        self._embeddings = {}  # prompt -> text (L, C)
        file = self.folder / "defaults.json"
        self.defaults = read_json(file, optional={"guidance": NUMBER, "finetune": OBJECT}) if file.exists() else {}

    @classmethod
    def from_folder(cls, folder, dtype=None, device=None, text_device=None):
        """device: by default cuda, else mps, else cpu. dtype: by default bfloat16 on cuda, float32 elsewhere.

        text_device: a separate device for T5, where it stays loaded, such as "cpu" beside a small GPU. By default T5 is
        on `device` and freed after use.
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
        tokenizer = load_tokenizer(self.folder / "tokenizer")
        known = T5Config.from_json(self.folder / "text_encoder" / "config.json").vocab_size
        if tokenizer.size > known:
            raise UserError(f"{self.folder}: tokenizer/ has {tokenizer.size} tokens, but text_encoder/ knows {known}")
        return tokenizer

    @cached_property
    def vae(self):
        dtype = torch.float32 if self.dtype == torch.float16 else self.dtype  # float16 would overflow
        return load_vae(self.folder / "vae", dtype, self.device)

    def free(self, *parts):
        """Unload parts to free their memory. A part is loaded again on its next use."""
        for part in parts:
            self.__dict__.pop(part, None)
        if "cuda" in (self.device.type, self.text_device.type):
            torch.cuda.empty_cache()

    @cached_property
    def transformer_config(self):
        return transformer_config(self.folder / "transformer")

    @cached_property
    def vae_config(self):
        return VAEConfig.from_json(self.folder / "vae" / "config.json")

    @property
    def multiple(self):
        """Sides of pictures must be a multiple of this, in pixels: the side of one patch."""
        return self.vae_config.factor * self.transformer_config.patch_size

    @property
    def resolution(self):
        """The side of the pictures that the model was trained on, in pixels."""
        return self.vae_config.factor * self.transformer_config.sample_size

    @torch.no_grad()
    def encode_prompt(self, prompts):
        """B prompts -> text (B, L, C) and text_mask (B, L), where L is the number of tokens of the longest prompt.

        Embeddings are cached, so that T5 can be freed before sampling.
        """
        prompts = [clean_caption(prompt) for prompt in prompts]
        for prompt in sorted(set(prompts) - self._embeddings.keys()):
            ids, mask = self.tokenizer([prompt])
            ids, mask = (x[:, : int(mask.sum())].to(self.text_device) for x in (ids, mask))  # (1, 300) -> (1, L)
            text = self.text_encoder(ids, mask)[0]  # (L, C)
            self._embeddings[prompt] = finite(text, f"T5's embedding of {prompt[:40]!r}").to(self.device)
        return pad_rows([self._embeddings[prompt] for prompt in prompts])

    def remember(self, prompts):
        """Encode and cache prompts for later use, then free T5, before the other parts need the memory."""
        self.encode_prompt(prompts)
        self.free("text_encoder")

    @torch.no_grad()
    def encode_images(self, images):
        """Images (B, 3, H, W) in [-1, 1] -> scaled latent means (B, 4, H/f, W/f)."""
        images = images.to(self.device, self.vae.dtype)
        return finite(self.vae.encode(images), "the latents of a picture").to(self.dtype)

    @torch.no_grad()
    def decode(self, latents):
        """Scaled latents (B, 4, h, w) -> images (B, 3, h·f, w·f) in [-1, 1], float32."""
        latents = finite(latents, "the latents").to(self.device, self.vae.dtype)
        return finite(self.vae.decode(latents).float(), "the decoded picture").clamp(-1, 1)

    def noise(self, seeds, height=None, width=None):
        """Initial noise (len(seeds), 4, h, w), one seed per picture; drawn on the CPU, so the same for every device."""
        height = self.resolution if height is None else height
        width = self.resolution if width is None else width
        if any(not 0 < side <= LARGEST or side % self.multiple for side in (height, width)):
            raise UserError(
                f"{width}×{height} pixels: both sides must be a multiple of {self.multiple}, up to {LARGEST}"
            )
        factor = self.vae_config.factor
        shape = (self.transformer_config.in_channels, height // factor, width // factor)
        return torch.stack([torch.randn(shape, generator=torch.Generator().manual_seed(int(s))) for s in seeds])

    @torch.no_grad()
    def sample(self, latents, text, text_mask, *, steps=20, guidance=4.5, negative_prompt=""):
        """Yield (timestep, latents, estimate of the clean latents) after each step, starting from noise (B, 4, h, w).

        Classifier-free guidance (Ho & Salimans, 2022): ε = ε(empty) + guidance · (ε(prompt) − ε(empty)). A negative
        prompt (what not to draw) replaces the empty prompt.
        """
        if len(latents) != len(text):
            raise UserError(f"{len(latents)} latents for {len(text)} prompts; give one for each")
        if guidance != 1:
            (empty,), _ = self.encode_prompt([negative_prompt])
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
    def generate(self, prompts, *, steps=20, guidance=None, height=None, width=None, seed=0, latents=None,
                 negative_prompt=""):  # fmt: skip
        """One PIL image for each prompt. Prompt i starts from the noise of seed + i, or from latents[i] (4, h, w).

        guidance: by default that of defaults.json, else 4.5. height, width: in pixels, by default `resolution`.
        """
        if isinstance(prompts, str) or not prompts:
            raise UserError(f"prompts must be a list of one str or more, not {prompts!r}")
        guidance = self.defaults.get("guidance", 4.5) if guidance is None else guidance
        if latents is None:
            latents = self.noise(range(seed, seed + len(prompts)), height, width)
        if len(latents) != len(prompts):
            raise UserError(f"{len(latents)} latents for {len(prompts)} prompts; give one for each")
        if self.text_device == self.device:
            self.remember([negative_prompt, *prompts])
        images, batch = [], max(1, 4 * 128 * 128 // latents[0].numel())  # one at a time at 1024×1024, 64 at 64×64
        for start in range(0, len(prompts), batch):
            part = slice(start, start + batch)
            options = dict(steps=steps, guidance=guidance, negative_prompt=negative_prompt)
            steps_done = self.sample(latents[part], *self.encode_prompt(prompts[part]), **options)
            for _, x, _ in tqdm(steps_done, desc="sampling", total=steps, leave=False, disable=None):
                pass
            images += to_pil(self.decode(x))
        return images


def finite(x, what):
    """Return x; UserError if it holds NaN or infinity."""
    if not x.isfinite().all():
        kind = str(x.dtype).removeprefix("torch.")
        raise UserError(f"{what} became NaN or infinite in {kind}; use bfloat16 or float32, or check the weights")
    return x


def pad_rows(rows):
    """Pad texts (L_i, C) of different lengths to one batch (B, L, C) with its mask (B, L)."""
    mask = [row.new_ones(len(row), dtype=torch.int64) for row in rows]
    return pad_sequence(rows, batch_first=True), pad_sequence(mask, batch_first=True)
