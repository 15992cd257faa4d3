"""A complete pipeline with random weights, in the layout that users have theirs in."""

import json
import string

import torch
from small_model import shake

from dit.checkpoint import save_index, save_part
from dit.config import T5Config, TransformerConfig, VAEConfig
from dit.pipeline import Pipeline
from dit.t5 import T5Encoder
from dit.transformer import PixArtTransformer
from dit.vae import AutoencoderKL
from sparsecode import attach, record_usage, save_adapter

TRANSFORMER = TransformerConfig(
    num_layers=2,
    num_attention_heads=2,
    attention_head_dim=8,
    sample_size=8,
    caption_channels=32,
    cross_attention_dim=16,
    interpolation_scale=1.0,
)
DEFAULTS = {"epochs": 1, "repeats": 2, "batch_size": 1, "lr": 0.01, "atoms": 8, "density": 0.25}


def write_pipeline(folder, transformer=TRANSFORMER):
    import sentencepiece

    (folder / "tokenizer").mkdir(parents=True)
    words = "a red blue green star robot owl on the left right".split()
    with open(folder / "tokenizer" / "spiece.model", "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter([*words, " ".join(words), *string.printable.strip()]),
            model_writer=file,
            model_type="unigram",
            vocab_size=200,
            hard_vocab_limit=False,
            character_coverage=1.0,
            pad_id=0,
            eos_id=1,
            unk_id=2,
            bos_id=-1,
            minloglevel=2,
        )
    torch.manual_seed(0)
    t5 = T5Config(vocab_size=400, d_model=32, d_kv=8, d_ff=32, num_layers=1, num_heads=2)
    vae = VAEConfig(block_out_channels=(8, 8), layers_per_block=1, norm_num_groups=4, sample_size=16)
    save_part(T5Encoder(t5), folder / "text_encoder")
    save_part(AutoencoderKL(vae), folder / "vae")
    save_part(PixArtTransformer(transformer), folder / "transformer")
    save_index(folder)
    (folder / "defaults.json").write_text(json.dumps({"guidance": 2.0, "finetune": DEFAULTS}))
    return folder


def write_adapter(weights, file, method="sparse", *, measured=None, prompt='a robot & "star"', layout=None, **options):
    """A file of trained-looking adapters; of sparse ones the use is measured, unless told otherwise."""
    pipe = Pipeline.from_folder(weights, device="cpu")
    torch.manual_seed(0)
    shake(attach(pipe.transformer, method, **options))
    if method == "sparse" if measured is None else measured:
        with record_usage(pipe.transformer):
            pipe.generate(["a robot"], steps=2)
    save_adapter(pipe.transformer, file, prompt=prompt, layout=layout or "sparsecode")
    return file
