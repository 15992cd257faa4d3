"""A small CLIP for `dit.evaluate`: does a picture show what the prompt says, and does it show the subject?"""

import json
import string
from collections import defaultdict

import numpy as np
import torch
import torch.nn.functional as F
from tqdm import tqdm

from dit.pictures import to_bytes
from dit.tiny.fit import fit, rng_of
from dit.tiny.scenes import caption, draw, sample_scene
from dit.tiny.subjects import draw_parts, sample_creature, sample_spot, subject_caption
from dit.tiny.text import WORDS
from dit.transformer import position_table


def clip_tokenizer(args):
    """Byte pairs in CLIP's format, learned from captions and WORDS."""
    import tokenizers
    from transformers import CLIPTokenizer

    rng = rng_of("clip tokenizer", args.seed, 0)
    sentences = [caption(sample_scene(rng), rng) for _ in range(4000)]
    sentences += [" ".join(rng.choice(WORDS, 6)) for _ in range(4000)] + list(string.printable.strip())
    special = ["<|startoftext|>", "<|endoftext|>"]
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=1200, special_tokens=special, end_of_word_suffix="</w>",
                                             initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
                                             show_progress=False)  # fmt: skip
    backend = CLIPTokenizer().backend_tokenizer
    backend.train_from_iterator(sentences, trainer)
    learned = json.loads(backend.to_str())["model"]
    return CLIPTokenizer(learned["vocab"], [tuple(pair) for pair in learned["merges"]], model_max_length=32)


def clip_pool(args, vae):
    """Training pictures for CLIP, and what they show: half scenes, half creatures with two views each.

    Returns images (2·half, 3, 64, 64) as uint8 and a list of scenes. Every second image went through the autoencoder.
    The views of creature i are at half + 2i and half + 2i + 1.
    """
    rng = rng_of("clip pool", args.seed, 0)
    half = args.clip_pictures // 4 * 2
    scenes = [sample_scene(rng, withheld=rng.random() < 0.15) for _ in range(half)]
    pictures = [draw(scene) for scene in scenes]
    for _ in tqdm(range(half // 2), desc="creatures", disable=None):
        parts = sample_creature(rng)
        for _ in range(2):
            scenes.append(sample_spot(rng))
            pictures.append(draw_parts(parts, *scenes[-1], 64))
    images = to_bytes(pictures).contiguous()  # (n, 3, 64, 64)
    for start in tqdm(range(0, len(images), 100), desc="through the autoencoder", disable=None):
        part = images[start : start + 100 : 2].to(args.device).float() / 127.5 - 1
        with torch.no_grad():
            part = vae.decode(vae.encode(part)).clamp(-1, 1)
        images[start : start + 100 : 2] = ((part + 1) * 127.5).round().to(torch.uint8).cpu()
    return images, scenes


def train_clip(args, vae, folder):
    """Train a small CLIP contrastively: in a batch, match pictures and captions, and match the two views of each
    creature, so that the cosine of two pictures tells whether they show the same one.
    """
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

    tokenizer = clip_tokenizer(args)
    shape = {"hidden_size": 128, "intermediate_size": 256, "num_attention_heads": 4, "projection_dim": 64}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": None}
    text = {"vocab_size": len(tokenizer), "max_position_embeddings": 32, "num_hidden_layers": 2}
    vision = {"image_size": 64, "patch_size": 8, "num_hidden_layers": 4}
    config = CLIPConfig(text_config=shape | ends | text, vision_config=shape | vision, projection_dim=64)
    torch.manual_seed(args.seed)
    model = CLIPModel(config).to(args.device)
    table = position_table(128, 8, 8, 8, 1.0)  # (64, 128); CLIP's own init, 35 times smaller, fails to learn places
    model.vision_model.embeddings.position_embedding.weight.data[1:] = table
    images, scenes = clip_pool(args, vae)
    half = len(images) // 2
    alike = defaultdict(list)  # scenes of equal background and pattern, which are hard to tell apart
    for i, scene in enumerate(scenes[:half]):
        alike[scene.background, scene.pattern].append(i)
    groups = list(alike.values())

    def loss(step):
        rng = rng_of("clip", args.seed, step + 1)
        eight = [groups[i] for i in rng.integers(len(groups), size=8)]
        pick = np.concatenate([rng.choice(group, 6, replace=len(group) < 6) for group in eight])  # (48,)
        creatures = half + 2 * rng.choice(half // 2, 16, replace=False)
        texts = [caption(scenes[i], rng) for i in pick]
        pick = np.concatenate([pick, creatures, creatures + 1])
        texts += [subject_caption(str(rng.choice(WORDS)), *scenes[i]) for i in pick[48:]]
        pixels = images[pick].to(args.device).float() / 127.5 - 1  # (80, 3, 64, 64)
        noise = torch.from_numpy(rng.standard_normal(pixels.shape, dtype=np.float32)).to(args.device)
        tokens = tokenizer(texts, padding=True, return_tensors="pt").to(args.device)
        output = model(**tokens, pixel_values=pixels + 0.1 * rng.random() * noise)
        a, b = output.image_embeds[48:].split(16)  # (16, C): the two views of each creature
        pairs = output.logits_per_image, output.logits_per_text, 20 * a @ b.T, 20 * b @ a.T
        return sum(F.cross_entropy(logits, torch.arange(len(logits), device=logits.device)) for logits in pairs)

    model = fit("clip", model, loss, steps=args.clip_steps, lr=1e-3, folder=folder)
    preprocessor = CLIPImageProcessor(size={"shortest_edge": 64}, crop_size=64, image_mean=[0.5] * 3,
                                      image_std=[0.5] * 3)  # fmt: skip
    return model, tokenizer, preprocessor
