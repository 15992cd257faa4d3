"""Against transformers: T5EncoderModel on random weights that it wrote, and T5Tokenizer on the same spiece.model.

Tolerance in float32: ‖ours − theirs‖ / ‖theirs‖ ≤ 2e-5. Token ids are equal.
"""

import json
import random

import pytest
import sentencepiece
import torch
import transformers
from test_transformer import randomize, relative
from transformers import T5EncoderModel, T5Tokenizer

from dit.checkpoint import load_text_encoder, load_tokenizer, save_index
from dit.config import T5Config
from dit.t5 import T5Encoder, Tokenizer, clean_caption
from sparsecode import UserError

WORDS = """a cat sits on the red mat in front of green hills while two blue birds fly over small yellow house with snow
photo dog <v> watercolor painting café naïve über garçon 猫 日本 кот, . ! ? ' " - – … 1 2 3 1024 16:9 (detailed) 50%
#art 🎨 👩‍🎨 ½ ﬁne ① Å é ° © </w> \\n {x} [y] a_b""".split()

# ---- encoder ----------------------------------------------------------------------------------------------------

TINY = dict(vocab_size=50, d_model=32, d_kv=8, num_heads=3, d_ff=48, num_layers=2, feed_forward_proj="gated-gelu")


def transformers_encoder(**config):
    model = T5EncoderModel(transformers.T5Config(**TINY | config))
    randomize(model)
    model.encoder.block[0].layer[0].SelfAttention.relative_attention_bias.weight.data.mul_(3)
    return model


def prompts(length=300, lengths=(300, 1, 17), vocabulary=50, seed=0):
    mask = (torch.arange(length) < torch.tensor(lengths)[:, None]).long()
    ids = torch.randint(3, vocabulary, mask.shape, generator=torch.Generator().manual_seed(seed))
    return ids * mask, mask


@pytest.mark.parametrize(
    "config",
    [
        {},  # 3 heads × 8 = 24 beside a width of 32
        dict(d_kv=16, num_heads=4, num_layers=3),  # 64 beside 32
        dict(d_kv=8, num_heads=4, d_ff=20),
        dict(relative_attention_num_buckets=8, relative_attention_max_distance=20, layer_norm_epsilon=1e-3),
    ],
)
def test_encoder_equals_transformers(tmp_path, config):
    theirs = transformers_encoder(**config)
    theirs.save_pretrained(tmp_path)
    ids, mask = prompts()
    expected = theirs(ids, attention_mask=mask).last_hidden_state
    assert relative(load_text_encoder(tmp_path)(ids, mask), expected) < 2e-5


def test_position_bias_equals_transformers_at_every_distance():
    from transformers.models.t5.modeling_t5 import T5Attention

    encoder = T5Encoder(T5Config(vocab_size=5, d_model=4, num_layers=1, num_heads=1, d_ff=4))
    encoder.relative_attention_bias.weight.data = torch.arange(32.0)[:, None]  # shows the bucket itself
    distance = torch.arange(600)[None, :] - torch.arange(600)[:, None]
    assert torch.equal(encoder.position_bias(600)[0].long(), T5Attention._relative_position_bucket(distance))


def test_masked_tokens_can_be_cut_off(tmp_path):
    transformers_encoder().save_pretrained(tmp_path)
    encoder, (ids, mask) = load_text_encoder(tmp_path), prompts(lengths=(40, 1, 17))
    whole = encoder(ids, mask)[2, :17]
    assert relative(encoder(ids[:, :40], mask[:, :40])[2, :17], whole) < 1e-6
    assert torch.equal(encoder(ids + 9 * (1 - mask), mask)[2, :17], whole)


def test_bfloat16_stays_close(tmp_path):
    """bfloat16 rounds to 2⁻⁹ = 0.2 %; two layers multiply that by some ten, in transformers as well."""
    theirs = transformers_encoder()
    theirs.save_pretrained(tmp_path)
    ids, mask = prompts()
    exact = theirs(ids, attention_mask=mask).last_hidden_state
    output = load_text_encoder(tmp_path, torch.bfloat16)(ids, mask)
    assert output.dtype == torch.bfloat16
    ours = relative(output, exact)
    reference = relative(theirs.bfloat16()(ids, attention_mask=mask).last_hidden_state, exact)
    assert ours < 0.03 and ours < 1.5 * reference


def test_size_of_the_real_one():
    with torch.device("meta"):
        model = T5Encoder(T5Config())
    assert sum(p.numel() for p in model.parameters()) == 4_762_310_656


# ---- tokenizer --------------------------------------------------------------------------------------------------


def train_spiece(folder):
    """A small sentencepiece model of T5's kind."""
    rng = random.Random(0)
    lines = [" ".join(rng.choices(WORDS, k=12)) for _ in range(1000)]
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(lines), model_prefix=str(folder / "spiece"), vocab_size=260, hard_vocab_limit=False,
        character_coverage=1.0, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)  # fmt: skip
    return folder / "spiece.model"


@pytest.fixture(scope="module")
def spiece(tmp_path_factory):
    return train_spiece(tmp_path_factory.mktemp("spiece"))


def tokenizer_folder(path, spiece, settings):
    """A tokenizer/ folder: with what save_index writes, or with other settings, or (None) with spiece.model alone."""
    if settings == "ours":
        save_index(path)
    (path / "tokenizer").mkdir(exist_ok=True)
    (path / "tokenizer" / "spiece.model").write_bytes(spiece.read_bytes())
    if isinstance(settings, dict):
        (path / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(settings))
    return path / "tokenizer"


def varied_prompts(n=500):
    rng = random.Random(1)
    spaces = [" ", " ", " ", "  ", "   ", "\n", "\t", "\r\n", "\u00a0", "\u3000", "\x85", "\u2028", ""]
    special = ["<v>", "</s>", "<pad>", "<unk>", "<extra_id_0>", "<extra_id_99>", "<extra_id_100>", "<s>", "</", "▁"]
    # Marks follow a letter: after a space other than " ", transformers 5 drops them and sentencepiece does not.
    letters = list("abcxyzABZ09.,:;!?'\"()[]{}<>/\\|@#$%^&*-_=+~`éüßñøÆœ中文字日本киλ한글ไทยनमس🎉🙂\u200b\ufeff\u00ad")
    letters += ["e\u0301", "a\u0308", "o\u0323\u0302", "👩\u200d🎨", "❤\ufe0f", "🇫🇷"]
    fixed = ["", " ", "\n\t ", "a cat", "A CAT", "cat" * 400, "a cat " * 400, "é" * 700, "<extra_id_5> cat", "x</s>y",
             "</s>" * 320, "🎨" * 310, "\x00\x01", "a\u2581cat", "cafe\u0301", "ﷺ"]  # fmt: skip

    def word():
        kind = rng.random()
        if kind < 0.7:
            return rng.choice(WORDS)
        return rng.choice(special) if kind < 0.8 else "".join(rng.choices(letters, k=rng.randint(1, 8)))

    texts = ["".join(word() + rng.choice(spaces) for _ in range(rng.choice([1, 3, 8, 20, 120]))) for _ in range(n)]
    return (fixed + texts)[:n]


@pytest.mark.parametrize("settings", ["ours", None, {}, {"extra_ids": 3}])
def test_tokens_equal_transformers(tmp_path, spiece, settings):
    folder = tokenizer_folder(tmp_path, spiece, settings)
    texts = varied_prompts()
    theirs = T5Tokenizer.from_pretrained(folder)(
        texts, padding="max_length", max_length=300, truncation=True, return_tensors="pt"
    )
    ids, mask = load_tokenizer(folder)(texts)
    assert ids.dtype == mask.dtype == torch.int64 and ids.shape == mask.shape == (500, 300)
    different = [text for text, a, b in zip(texts, ids, theirs.input_ids) if not torch.equal(a, b)]
    assert not different
    assert torch.equal(mask, theirs.attention_mask)
    assert mask.sum(1).min() == 1 and (mask.sum(1) == 300).sum() > 10  # the set has empty and overlong prompts


def test_shorter_lengths_equal_transformers(tmp_path, spiece):
    folder = tokenizer_folder(tmp_path, spiece, "ours")
    theirs = T5Tokenizer.from_pretrained(folder)
    for length in (1, 2, 7):
        expected = theirs(varied_prompts(60), padding="max_length", max_length=length, truncation=True)["input_ids"]
        assert load_tokenizer(folder)(varied_prompts(60), length)[0].tolist() == expected


def test_a_caption_keeps_its_words():
    assert clean_caption("  A photo of <V> Robot\n") == "a photo of <v> robot"


def test_refusals(tmp_path, spiece):
    with pytest.raises(UserError, match="spiece.model is missing"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="list of str"):
        Tokenizer(spiece)("a cat")
    (tmp_path / "spiece.model").write_bytes(b"no such thing")
    with pytest.raises(UserError, match="not a sentencepiece model"):
        load_tokenizer(tmp_path)
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    (tmp_path / "tokenizer_config.json").write_text('{"extra_ids": "many"}')
    with pytest.raises(UserError, match="extra_ids is 'many'"):
        load_tokenizer(tmp_path)


def test_what_is_cut_off_a_prompt_is_said(spiece):
    with pytest.warns(UserWarning, match="prompt of 4.. tokens is cut to 300; lost: '.*blue birds'"):
        Tokenizer(spiece, extra_ids=3)(["cat " * 200 + "snow </s> <extra_id_1> cat " * 60 + "blue birds"])
    with pytest.raises(UserError, match="has 400,000 characters; cut it to 10,000"):
        Tokenizer(spiece)(["a cat, " * 57142 + "a cat."])


def test_extra_ids_beyond_reason(tmp_path, spiece):
    (tmp_path / "spiece.model").write_bytes(spiece.read_bytes())
    for value in (1000000000, -1, True, '"many"', 1.5):
        text = value if isinstance(value, str) else json.dumps(value)
        (tmp_path / "tokenizer_config.json").write_text(f'{{"extra_ids": {text}}}')
        with pytest.raises(UserError, match="extra_ids is .*; expected a whole number from 0 to 1000"):
            load_tokenizer(tmp_path)


def test_a_tokenizer_of_another_model_is_refused(tmp_path):
    lines = iter([" ".join(WORDS)] * 50)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=lines, model_prefix=str(tmp_path / "spiece"),
                                             vocab_size=100, hard_vocab_limit=False, minloglevel=2)  # fmt: skip
    with pytest.raises(UserError, match="tokens 0, 1 and 2"):
        load_tokenizer(tmp_path)
