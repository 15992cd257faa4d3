"""Scores of the `image-reward` package on a small model with random weights: what metrics.ImageReward must give too.

The package pins timm 0.6.13, fairscale 0.4.13 and an old transformers, so it lives in an environment of its own. To
make image_reward.json again:

    python3.11 -m venv ir && . ir/bin/activate
    pip install torch torchvision "transformers==4.30.2" && pip install --no-deps image-reward==1.5 timm==0.6.13 fairscale==0.4.13
    python tests/reference/image_reward.py

The file holds the name and shape of each tensor as the package names them, and the scores. The numbers in the tensors
and the pictures come from NumPy's seeds, so that both sides rebuild them.
"""  # noqa: E501

import importlib.util
import json
import string
import sys
import tempfile
import types
from pathlib import Path

import numpy as np
import torch
from PIL import Image

REFERENCE = Path(__file__).with_suffix(".json")
VOCABULARY = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "red", "blue", "star", "robot", *string.punctuation]
VOCABULARY += [start + letter for start in ("", "##") for letter in string.ascii_lowercase]
MED_CONFIG = {"hidden_act": "gelu", "hidden_size": 48, "intermediate_size": 80, "layer_norm_eps": 1e-12,
              "model_type": "bert", "max_position_embeddings": 40, "num_attention_heads": 3, "num_hidden_layers": 2,
              "pad_token_id": 0, "type_vocab_size": 2, "vocab_size": len(VOCABULARY) + 2, "encoder_width": 48,
              "add_cross_attention": True, "hidden_dropout_prob": 0.1, "attention_probs_dropout_prob": 0.1}  # fmt: skip
VISION = {"img_size": 32, "patch_size": 8, "embed_dim": 128, "depth": 2, "num_heads": 2}
TEXTS = ["a red star", "", "Blue robots, a star!", "robot " * 50, "a red star"]
SIZES = [(40, 30), (32, 32), (16, 50), (64, 64), (30, 31)]  # of the pictures: width, height


def make_pictures():
    rng = np.random.default_rng(0)
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in SIZES]


def make_weights(shapes):
    """{name: tensor} of the size that keeps signals alive, so that scores depend on the text and the picture."""
    weights = {}
    for i, (name, shape) in enumerate(sorted(shapes.items())):
        if name.endswith("position_ids"):
            weights[name] = torch.arange(shape[1]).expand(shape)
            continue
        numbers = np.random.default_rng(i).standard_normal(shape)
        scale = 0.1 if len(shape) == 1 else np.prod(shape[1:]) ** -0.5
        is_norm = "norm" in name.lower() and name.endswith("weight")
        weights[name] = torch.tensor(numbers * scale + is_norm, dtype=torch.float32)
    return weights


def build_small():
    """The package's ImageReward with a small picture encoder, text encoder and vocabulary."""
    path = Path(importlib.util.find_spec("ImageReward").submodule_search_locations[0])
    for name in ("ImageReward", "ImageReward.models"):  # whose own __init__ would import trainers and OpenAI's CLIP
        sys.modules[name] = types.ModuleType(name)
        sys.modules[name].__path__ = [str(path / name.partition(".")[2])]
    from ImageReward import ImageReward as package
    from ImageReward.models.BLIP import blip, blip_pretrain, vit
    from transformers import BertTokenizer

    with tempfile.TemporaryDirectory() as folder:
        vocabulary, config = Path(folder) / "vocab.txt", Path(folder) / "med_config.json"
        vocabulary.write_text("\n".join(VOCABULARY))
        config.write_text(json.dumps(MED_CONFIG))
        blip.BertTokenizer = types.SimpleNamespace(from_pretrained=lambda _: BertTokenizer(vocabulary))
        blip_pretrain.create_vit = lambda *_: (vit.VisionTransformer(**VISION), VISION["embed_dim"])
        model = package.ImageReward(config)
    model.mlp = package.MLP(MED_CONFIG["hidden_size"])
    model.preprocess = package._transform(VISION["img_size"])
    return model.eval()


def main():
    model = build_small()
    shapes = {name: list(tensor.shape) for name, tensor in model.state_dict().items()}
    model.load_state_dict(make_weights(shapes))
    with torch.no_grad():
        scores = [model.score(text, picture) for text, picture in zip(TEXTS, make_pictures())]
    REFERENCE.write_text(json.dumps({"scores": scores, "shapes": shapes}) + "\n")
    print(scores)


if __name__ == "__main__":
    main()
