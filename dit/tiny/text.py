"""The second stage: a tokenizer, and a T5 encoder that is trained on captions alone and then frozen, as in PixArt."""

import re
import string

import torch
import torch.nn.functional as F
from torch import nn

from dit.config import T5Config
from dit.t5 import T5Encoder
from dit.tiny.fit import fit, rng_of
from dit.tiny.scenes import BACKGROUNDS, PATTERNS, PLACES, SIZES, THINGS, UNSEEN, caption, sample_scene
from sparsecode.common import replacing

# OTHERS are nouns that are not things of scenes, so that prompts can use them too. WORDS are all words of captions.
OTHERS = (
    """
robot boat plane bird monster wizard king queen child man woman face head eye toy bowl can vase sneaker plushie cartoon
sloth sky rain snow river lake sea beach sand forest jungle desert field garden street city road bridge tower barn shop
room kitchen table floor wall ball plate grass flower food drink animal fruit tool deer sheep bat shoe cube
""".split()
    + [*UNSEEN]
)
WORDS = (
    """
a an the and with of in on at to is it its this that from by for near under over beside behind between into there
picture photo image drawing painting sketch sculpture icon shiny dark light bright soft small large big tiny huge old
new grey brown pink cyan gold silver wooden metal glass plastic paper stone wet dry striped checked spotted plain
orange shaped floating top bottom left right middle centre red green blue yellow purple white black background
""".split()
    + [*THINGS, *OTHERS]
)


def train_tokenizer(args, folder):
    """Train a unigram sentencepiece model with T5's special tokens: pad 0, end of sentence 1, unknown 2."""
    import sentencepiece

    rng = rng_of("tokenizer", args.seed, 0)
    sentences = [caption(sample_scene(rng), rng) for _ in range(6000)]
    sentences += [" ".join(rng.choice(WORDS, 6)) for _ in range(6000)] + list(string.printable.strip())
    with replacing(folder / "spiece.model") as temporary, open(temporary, "wb") as file:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(sentences), model_writer=file, model_type="unigram", vocab_size=1000,
            hard_vocab_limit=False, character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1,
            num_threads=1, minloglevel=2,
        )  # fmt: skip


ANSWERS = {"name": THINGS, "size": tuple(SIZES), "place": tuple(PLACES)}  # of each of the two things
SPLITS = [len(values) + 1 for values in ANSWERS.values()] * 2 + [len(BACKGROUNDS) + 1, len(PATTERNS) + 1]  # +1: unsaid


class TextReader(nn.Module):
    """The encoder with its training heads, which are discarded later. Each token must tell what the whole caption says
    (two things, background, pattern) and which token it is; the mean over tokens must tell which words occur."""

    def __init__(self, config):
        super().__init__()
        self.encoder = T5Encoder(config)
        self.attributes = nn.Linear(config.d_model, sum(SPLITS))
        self.words = nn.Linear(config.d_model, config.vocab_size)
        self.identity = nn.Linear(config.d_model, config.vocab_size)


def labelled_caption(rng):
    """A caption and its labels, 0 if not said. With probability 0.2 another noun replaces the name of a thing."""
    scene = sample_scene(rng)
    text = caption(scene, rng)
    labels = []
    for slot in range(2):
        thing = scene.things[slot] if slot < len(scene.things) else None
        said = {
            "name": thing is not None,
            "size": thing is not None and (len(scene.things) == 1 or f"{thing.size} {thing.name}" in text),
            "place": thing is not None and (" in the " in text or " at the " in text),
        }
        if thing and rng.random() < 0.2:
            text = re.sub(rf"\b{thing.name}\b", str(rng.choice(OTHERS)), text, count=1)
            said["name"] = False
        labels += [ANSWERS[n].index(getattr(thing, n)) + 1 if said[n] else 0 for n in ANSWERS]
    labels += [list(BACKGROUNDS).index(scene.background) + 1, PATTERNS.index(scene.pattern) + 1]
    return text, labels


def train_text(args, tokenizer, folder):
    torch.manual_seed(args.seed)
    config = T5Config(vocab_size=tokenizer.pieces.get_piece_size(), d_model=128, d_kv=32, d_ff=256, num_layers=3,
                      num_heads=4)  # fmt: skip
    reader = TextReader(config).to(args.device)
    for name, p in reader.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=0.5 if "embed" in name else p.shape[1] ** -0.5)
        if name.endswith(".q.weight"):  # T5 has no 1/√d in its attention, so its queries start smaller
            p.data /= config.d_kv**0.5

    def loss(step):
        rng = rng_of("text", args.seed, step + 1)
        texts, labels = zip(*(labelled_caption(rng) for _ in range(48)))
        texts += tuple(" ".join(rng.choice(WORDS, rng.integers(1, 10))) for _ in range(16))
        ids, mask = tokenizer(texts, 32)
        longest = int(mask.sum(1).max())
        ids, mask = (t[:, :longest].to(args.device) for t in (ids, mask))
        hidden = reader.encoder(ids, mask)  # (B, L, C)
        labels = torch.tensor(labels, device=args.device)  # (48, questions)
        real = mask[:48].bool()
        total = 0.0
        for i, logits in enumerate(reader.attributes(hidden[:48]).split(SPLITS, dim=2)):
            target = labels[:, i, None].expand_as(real)  # (48, L): the same for every token
            total = total + F.cross_entropy(logits[real], target[real])
        present = F.one_hot(ids, config.vocab_size).amax(1).float()  # (B, vocabulary)
        known = (mask[..., None] * hidden).sum(1) / mask.sum(1, keepdim=True)  # (B, C): mean over real tokens
        words = F.binary_cross_entropy_with_logits(reader.words(known), present) * config.vocab_size / 20
        identity = F.cross_entropy(reader.identity(hidden)[mask.bool()], ids[mask.bool()])
        return total + words + identity

    return fit("text", reader, loss, steps=args.text_steps, lr=2e-3, folder=folder).encoder
