"""The text side of PixArt-Σ: T5's tokenizer (sentencepiece) and the encoder half of T5 v1.1 (Raffel et al., 2020)."""

import math
import re
import warnings

import torch
import torch.nn.functional as F
from torch import nn

from dit.config import T5Config
from sparsecode.attention import merge_heads, split_heads
from sparsecode.common import UserError

PAD, EOS, UNK = 0, 1, 2
LONGEST = 10_000  # characters of a prompt; sentencepiece takes minutes for a hundred times as many


def clean_caption(text):
    """Normalise a caption, for training and sampling. The stronger cleaning of diffusers (bs4) would remove `<v>`."""
    return text.lower().strip()


class Tokenizer:
    """T5's sentencepiece tokenizer. As in transformers' T5Tokenizer, a prompt may contain special tokens as text.

    `extra_ids` tokens <extra_id_0>, <extra_id_1>, … follow the vocabulary in reverse order (the released T5 has 100).
    """

    def __init__(self, model_file, extra_ids=0):
        import sentencepiece  # here, so that the model can be used without it

        try:
            self.pieces = sentencepiece.SentencePieceProcessor(model_file=str(model_file))
        except (OSError, RuntimeError):
            raise UserError(f"{model_file} is not a sentencepiece model; download it again") from None
        if (self.pieces.pad_id(), self.pieces.eos_id(), self.pieces.unk_id()) != (PAD, EOS, UNK):
            raise UserError(f"{model_file} is not a tokenizer of T5: pad, end and unknown must be tokens 0, 1 and 2")
        self.size = len(self.pieces) + extra_ids
        self.special = {"<pad>": PAD, "</s>": EOS, "<unk>": UNK}
        self.special |= {f"<extra_id_{i}>": self.size - 1 - i for i in range(extra_ids)}
        self.special_text = re.compile(f"({'|'.join(self.special)})")

    def encode(self, prompt):
        """The token ids of one prompt, without an end token."""
        tokens = []
        for part in self.special_text.split(prompt.replace("\x85", " ")):  # the only space that sentencepiece keeps
            tokens += [self.special[part]] if part in self.special else self.pieces.encode(part)
        return tokens

    def __call__(self, prompts, max_length=300):
        """A list of B prompts -> ids (B, max_length) and mask (B, max_length), both int64.

        A longer prompt is cut, with a warning that shows the lost text. UserError above 10,000 characters.
        """
        if isinstance(prompts, str):
            raise UserError(f"prompts must be a list of str, not the single str {prompts!r}")
        ids = torch.full((len(prompts), max_length), PAD)
        mask = torch.zeros_like(ids)
        for row, prompt in enumerate(prompts):
            if len(prompt) > LONGEST:
                raise UserError(f"the prompt {prompt[:40]!r}… has {len(prompt):,} characters; cut it to {LONGEST:,}")
            tokens = self.encode(prompt)
            if len(tokens) >= max_length:
                lost = self.pieces.decode([token for token in tokens[max_length - 1 :] if token < len(self.pieces)])
                warnings.warn(f"a prompt of {len(tokens) + 1} tokens is cut to {max_length}; lost: {lost!r}")
            tokens = tokens[: max_length - 1] + [EOS]
            ids[row, : len(tokens)] = torch.tensor(tokens)
            mask[row, : len(tokens)] = 1
        return ids, mask


class RMSNorm(nn.Module):
    def __init__(self, width, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x):
        variance = x.float().pow(2).mean(-1, keepdim=True)  # (..., 1), in float32 whatever x is
        return self.weight * (x * torch.rsqrt(variance + self.eps)).to(self.weight.dtype)  # (..., C)


class T5Block(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        width, inner = config.d_model, config.d_kv * config.num_heads  # inner need not equal width
        self.heads = config.num_heads
        self.norm_1 = RMSNorm(width, config.layer_norm_epsilon)
        self.q = nn.Linear(width, inner, bias=False)
        self.k = nn.Linear(width, inner, bias=False)
        self.v = nn.Linear(width, inner, bias=False)
        self.o = nn.Linear(inner, width, bias=False)
        self.norm_2 = RMSNorm(width, config.layer_norm_epsilon)
        self.wi_0 = nn.Linear(width, config.d_ff, bias=False)
        self.wi_1 = nn.Linear(width, config.d_ff, bias=False)
        self.wo = nn.Linear(config.d_ff, width, bias=False)

    def forward(self, x, bias):
        """x (B, L, C), bias (B, H, L, L) added to the attention logits -> (B, L, C)."""
        h = self.norm_1(x)  # (B, L, C)
        q, k, v = (split_heads(project(h), self.heads) for project in (self.q, self.k, self.v))  # (B, H, L, d_kv)
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, scale=1.0)  # T5 does not divide by √d
        x = x + self.o(merge_heads(out))  # (B, H, L, d_kv) -> (B, L, C)
        h = self.norm_2(x)  # (B, L, C)
        h = F.gelu(self.wi_0(h), approximate="tanh") * self.wi_1(h)  # (B, L, d_ff)
        return x + self.wo(h.to(self.wo.weight.dtype))  # (B, L, C); wo is float32 where the rest is float16


class T5Encoder(nn.Module):
    def __init__(self, config: T5Config):
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.relative_attention_bias = nn.Embedding(config.relative_attention_num_buckets, config.num_heads)
        self.blocks = nn.ModuleList(T5Block(config) for _ in range(config.num_layers))
        self.final_norm = RMSNorm(config.d_model, config.layer_norm_epsilon)

    def forward(self, ids, mask):
        """Token ids (B, L) and mask (B, L), 1 at real tokens -> text embedding (B, L, C)."""
        x = self.embed(ids)  # (B, L) -> (B, L, C)
        bias = self.position_bias(ids.shape[1]).to(x.dtype)  # (H, L, L), shared by all blocks
        bias = bias.masked_fill(~mask.bool()[:, None, None, :], torch.finfo(x.dtype).min)  # (B, H, L, L)
        for block in self.blocks:
            x = block(x, bias)  # (B, L, C)
        return self.final_norm(x)  # (B, L, C)

    def position_bias(self, length):
        """(H, L, L): a learned number per head and distance bucket; buckets are exact near by, logarithmic far away."""
        buckets, longest = self.config.relative_attention_num_buckets, self.config.relative_attention_max_distance
        position = torch.arange(length, device=self.embed.weight.device)
        distance = position[None, :] - position[:, None]  # (L, L): key minus query
        half, exact = buckets // 2, buckets // 4
        far = torch.log(distance.abs().clamp(min=1) / exact) / math.log(longest / exact) * (half - exact)
        far = (exact + far.long()).clamp(max=half - 1)  # (L, L)
        bucket = torch.where(distance.abs() < exact, distance.abs(), far) + half * (distance > 0)  # (L, L)
        return self.relative_attention_bias(bucket).permute(2, 0, 1)  # (L, L, H) -> (H, L, L)
