"""How well a concept was learned (§4.3): alignment and fidelity with CLIP, diversity with the Vendi score, ImageReward.

CLIP, DINOv2 and ImageReward's BLIP are read from local folders with transformers: pip install -e ".[eval]".
"""

from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn
from torchvision import transforms

from sparsecode.common import COUNT, POSITIVE, TEXT, UserError, read_json, rename

BATCH = 50  # pictures or texts at a time

# Our names of ImageReward's parts -> those in ImageReward.pt.
IMAGE_REWARD_NAMES = [
    ("vision.embeddings.class_embedding", "blip.visual_encoder.cls_token"),
    ("vision.embeddings.position_embedding", "blip.visual_encoder.pos_embed"),
    ("vision.embeddings.patch_embedding.", "blip.visual_encoder.patch_embed.proj."),
    ("vision.encoder.layers.", "blip.visual_encoder.blocks."),
    ("vision.post_layernorm.", "blip.visual_encoder.norm."),
    (".layer_norm1.", ".norm1."),
    (".self_attn.qkv.", ".attn.qkv."),
    (".self_attn.projection.", ".attn.proj."),
    (".layer_norm2.", ".norm2."),
    ("text.", "blip.text_encoder."),
    *((f"head.{ours}.", f"mlp.layers.{theirs}.") for ours, theirs in enumerate((0, 2, 4, 6, 7))),  # dropout between
]
# Tensors of ImageReward.pt that are not needed: position ids, and projections of BLIP's pre-training.
UNUSED = ("blip.text_encoder.embeddings.position_ids", "blip.vision_proj.", "blip.text_proj.")
MED_CONFIG = dict.fromkeys(("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers",
                            "num_attention_heads", "max_position_embeddings"), COUNT)  # fmt: skip
MED_CONFIG |= {"hidden_act": TEXT, "layer_norm_eps": POSITIVE}


def need_transformers():
    try:
        import transformers
    except ImportError:
        raise UserError('transformers is not installed, and CLIP needs it; run: pip install -e ".[eval]"') from None
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return transformers


class CLIP:
    """CLIP from a folder in transformers' layout, tokenizer and preprocessor included (Radford et al., 2021).

    texts(list of str) and images(list of PIL images) -> unit vectors (n, C) on the CPU. Their products are cosines.
    """

    def __init__(self, folder, device="cpu"):
        library = need_transformers()
        self.device = device
        self.model = _load_model(library.CLIPModel, folder).to(device).eval()
        self.tokenizer = _load(library.CLIPTokenizer, folder)
        if len(self.tokenizer) != self.model.config.text_config.vocab_size:  # transformers invents a missing tokenizer
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


class ImageReward(nn.Module):
    """Predicts how much people like a picture for its text: BLIP and five linear layers (Xu et al., 2023).

    The folder holds the released ImageReward.pt and med_config.json, and vocab.txt of bert-base-uncased.
    scores(list of str, list of PIL images) -> (n,), one score per pair, of mean about 0 and deviation about 1.
    """

    MEAN, DEVIATION = 0.16717362830052426, 1.0333394966054072  # of the authors' rewards
    TOKENS = 35
    PIXELS = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)  # mean and deviation, RGB

    def __init__(self, folder, device="cpu"):
        super().__init__()
        library = need_transformers()
        self.device = device
        self.tokenizer = _load(library.BertTokenizer, folder)
        self.tokenizer.add_special_tokens({"additional_special_tokens": ["[DEC]", "[ENC]"]})  # BLIP's
        config = read_json(Path(folder) / "med_config.json", MED_CONFIG)
        file = Path(folder) / "ImageReward.pt"
        try:
            stored = torch.load(file, map_location="cpu", weights_only=True)
            side = self._build(library, config, stored)
            used = {name: stored.pop(rename(name, IMAGE_REWARD_NAMES)) for name in self.state_dict()}
            self.load_state_dict(used)
        except Exception as error:  # a missing file or tensor, a wrong shape, any error of torch
            reason = " ".join(str(error).split())[:200]
            raise UserError(f"{file} cannot be read as ImageReward ({type(error).__name__}: {reason})") from None
        if left := [name for name in stored if not name.startswith(UNUSED)]:
            raise UserError(f"{file} holds {left[0]}, which is not part of ImageReward; download it again")
        if len(self.tokenizer) != config["vocab_size"]:  # transformers invents a missing tokenizer
            raise UserError(f"{folder} has no vocab.txt of the {config['vocab_size'] - 2} tokens of bert-base-uncased")
        self.to(device).eval()
        self.preprocess = transforms.Compose([
            transforms.Resize(side, transforms.InterpolationMode.BICUBIC), transforms.CenterCrop(side),
            transforms.ToTensor(), transforms.Normalize(*self.PIXELS),
        ])  # fmt: skip

    def _build(self, library, config, stored):
        """Build the modules for the shapes in `stored`; return the side of the input pictures in pixels."""
        positions = stored["blip.visual_encoder.pos_embed"]  # (1, 1 + patches, C)
        patch = stored["blip.visual_encoder.patch_embed.proj.weight"].shape[-1]
        width, side = positions.shape[2], patch * round((positions.shape[1] - 1) ** 0.5)
        vision = library.BlipVisionConfig(
            hidden_size=width, intermediate_size=4 * width, num_attention_heads=width // 64, image_size=side,
            num_hidden_layers=sum(name.endswith("attn.qkv.weight") for name in stored), patch_size=patch,
            layer_norm_eps=1e-6,
        )  # fmt: skip
        text = library.BlipTextConfig(encoder_hidden_size=width, **{name: config[name] for name in MED_CONFIG})
        self.vision = library.BlipVisionModel(vision)
        self.text = library.BlipTextModel(text, add_pooling_layer=False)
        sizes = (text.hidden_size, 1024, 128, 64, 16, 1)
        self.head = nn.Sequential(*(nn.Linear(*pair) for pair in zip(sizes, sizes[1:])))
        return side

    def scores(self, texts, images):
        return in_batches(self._scores, list(zip(texts, images, strict=True)))

    def _scores(self, pairs):
        texts, images = zip(*pairs)
        tokens = self.tokenizer(list(texts), padding="max_length", truncation=True, max_length=self.TOKENS,
                                return_tensors="pt").to(self.device)  # fmt: skip
        pixels = torch.stack([self.preprocess(image) for image in images]).to(self.device)  # (n, 3, side, side)
        seen = self.vision(pixels).last_hidden_state  # (n, 1 + patches, C)
        read = self.text(tokens.input_ids, tokens.attention_mask, encoder_hidden_states=seen).last_hidden_state
        rewards = self.head(read[:, 0]).squeeze(1)  # (n, L, C_text) -> (n,)
        return ((rewards - self.MEAN) / self.DEVIATION).cpu()


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
        return kind.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False, **options)
    except Exception as error:  # transformers raises errors of many kinds
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{folder} cannot be read as a {kind.__name__} ({reason})") from None


def alignment(pictures, texts):
    """Mean cosine of each picture and its own text: pictures (n, C), texts (n, C), unit vectors."""
    return (pictures * texts).sum(-1).mean().item()


def fidelity(pictures, originals):
    """Mean cosine of all pairs of n pictures and m pictures of the concept: (n, C), (m, C), unit vectors."""
    return (pictures @ originals.T).mean().item()


def vendi_score(vectors):
    """exp of the entropy of the eigenvalues of K/n, K = V Vᵀ: the effective number of pictures, 1 to n.

    vectors (n, C), unit vectors. Friedman & Dieng, The Vendi Score, 2023, Definition 3.1.
    """
    v = vectors.double()
    small = v @ v.T if len(v) < v.shape[1] else v.T @ v  # both have the same eigenvalues, except zeros
    p = torch.linalg.eigvalsh(small / len(v)).clamp(min=0)
    return torch.exp(torch.special.entr(p).sum()).item()
