"""How well a concept was learned (§4.3): text alignment and fidelity with CLIP, diversity with the Vendi score.

CLIP and DINOv2 are read by transformers from local folders: pip install -e ".[eval]". The paper's ImageReward is left
out: its checkpoint wraps BLIP in a layout of its own, and without it a port cannot be shown to give its scores.
"""

from pathlib import Path

import torch
import torch.nn.functional as F

from sparsecode.common import UserError

BATCH = 50  # pictures or texts at a time


def need_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError('CLIP is read by transformers, which is not installed: pip install -e ".[eval]"') from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class CLIP:
    """CLIP from a folder in transformers' layout, tokenizer and preprocessor included (Radford et al., 2021).

    texts(list of str) and images(list of PIL images) -> unit vectors (n, C), whose products are the cosines.
    """

    def __init__(self, folder, device="cpu"):
        library = need_transformers()
        self.device = device
        self.model = _load_model(library.CLIPModel, folder).to(device).eval()
        self.tokenizer = _load(library.CLIPTokenizer, folder)
        if len(self.tokenizer) != self.model.config.text_config.vocab_size:  # transformers makes up what it lacks
            raise UserError(f"{folder} has no tokenizer of the {self.model.config.text_config.vocab_size} tokens")
        self.preprocessor = _load(library.AutoImageProcessor, folder)

    def texts(self, texts):
        return in_batches(self._texts, texts)

    def _texts(self, texts):
        inputs = self.tokenizer(texts, padding=True, truncation=True, return_tensors="pt").to(self.device)
        hidden = self.model.text_model(**inputs).pooler_output  # (n, C_text)
        return F.normalize(self.model.text_projection(hidden).float(), dim=-1).cpu()  # (n, C)

    def images(self, images):
        return in_batches(self._images, images)

    def _images(self, images):
        pixels = self.preprocessor(images, return_tensors="pt")["pixel_values"].to(self.device)  # (n, 3, H, W)
        hidden = self.model.vision_model(pixels).pooler_output  # (n, C_vision)
        return F.normalize(self.model.visual_projection(hidden).float(), dim=-1).cpu()  # (n, C)


class DINOv2:
    """DINOv2 from a folder in transformers' layout: images(list of PIL images) -> unit vectors (n, C)."""

    def __init__(self, folder, device="cpu"):
        library = need_transformers()
        self.device = device
        self.model = _load_model(library.Dinov2Model, folder).to(device).eval()
        self.preprocessor = _load(library.AutoImageProcessor, folder)

    def images(self, images):
        return in_batches(self._images, images)

    def _images(self, images):
        pixels = self.preprocessor(images, return_tensors="pt")["pixel_values"].to(self.device)  # (n, 3, H, W)
        return F.normalize(self.model(pixels).pooler_output.float(), dim=-1).cpu()  # (n, C): the class token


@torch.no_grad()
def in_batches(encode, items):
    """`encode` of a long list, BATCH at a time: (n, C)."""
    return torch.cat([encode(items[i : i + BATCH]) for i in range(0, len(items), BATCH)])


def _load_model(kind, folder):
    model, info = _load(kind, folder, output_loading_info=True)
    if info["missing_keys"]:  # transformers would leave random numbers there
        raise UserError(f"{folder} holds no whole {kind.__name__}: {sorted(info['missing_keys'])[0]} is not there")
    return model


def _load(kind, folder, **options):
    if not Path(folder).is_dir():
        raise UserError(f"{folder} is not a folder; weights/README.md says what belongs there")
    try:
        return kind.from_pretrained(str(folder), local_files_only=True, **options)
    except Exception as error:  # transformers raises whatever a file makes it
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be read as a {kind.__name__} ({reason})") from None


def alignment(pictures, texts):
    """Mean cosine of each picture with its own text: pictures (n, C), texts (n, C), unit vectors."""
    return (pictures * texts).sum(-1).mean().item()


def fidelity(pictures, originals):
    """Mean cosine of n pictures with m pictures of the concept: (n, C), (m, C), unit vectors."""
    return (pictures @ originals.T).mean().item()


def vendi_score(vectors):
    """exp of the entropy of the eigenvalues of K/n, K = V Vᵀ: how many different pictures there seem to be, 1 to n.

    vectors (n, C), unit vectors. Friedman & Dieng, The Vendi Score, 2023, Definition 3.1.
    """
    v = vectors.double()
    small = v @ v.T if len(v) < v.shape[1] else v.T @ v  # both have the same eigenvalues, but for zeros
    p = torch.linalg.eigvalsh(small / len(v)).clamp(min=0)
    return torch.exp(torch.special.entr(p).sum()).item()
