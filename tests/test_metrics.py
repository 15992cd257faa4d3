"""Vendi score and ImageReward against their authors' packages, CLIP and DINOv2 against transformers' own."""

import json
import shutil
import string

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from reference import image_reward
from safetensors.torch import load_file, save_file
from vendi_score import vendi

from dit import metrics
from dit.cli import TINY
from dit.metrics import CLIP, DINOv2, ImageReward, alignment, fidelity, vendi_score
from dit.tiny.scenes import caption, draw, sample_scene
from sparsecode.common import UserError

TEXTS = ["a red star", "owl", "", "a red star on the left of a blue robot", "star " * 40]


def write_clip(folder):
    """A CLIP with random weights, in transformers' layout; pictures are cut to 24×24, texts to 16 tokens."""
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

    merges = [("r", "e"), ("re", "d</w>"), ("o", "w"), ("ow", "l</w>")]
    letters = [letter + end for letter in string.ascii_lowercase for end in ("", "</w>")]
    vocabulary = [*letters, *map("".join, merges), "<|startoftext|>", "<|endoftext|>"]
    tokenizer = CLIPTokenizer({word: i for i, word in enumerate(vocabulary)}, merges, model_max_length=16)
    shape = {"hidden_size": 16, "intermediate_size": 32, "num_attention_heads": 2, "num_hidden_layers": 2}
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    text = shape | ends | {"vocab_size": len(vocabulary), "max_position_embeddings": 16}
    vision = shape | {"hidden_size": 24, "image_size": 24, "patch_size": 8}
    torch.manual_seed(0)
    model = CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=12))
    preprocessor = CLIPImageProcessor(size={"shortest_edge": 24}, crop_size=24)
    for part in (model, tokenizer, preprocessor):
        part.save_pretrained(folder)
    return folder


def write_dino(folder):
    from transformers import BitImageProcessor, Dinov2Config, Dinov2Model

    torch.manual_seed(0)
    shape = {"hidden_size": 16, "num_attention_heads": 2, "num_hidden_layers": 2, "image_size": 28, "patch_size": 14}
    Dinov2Model(Dinov2Config(**shape)).save_pretrained(folder)
    BitImageProcessor(size={"shortest_edge": 32}, crop_size=28).save_pretrained(folder)
    return folder


def write_image_reward(folder, leave_out=(), **more):
    """ImageReward with random weights, as its package names them, in the files that are released."""
    shapes = json.loads(image_reward.REFERENCE.read_text())["shapes"]
    weights = image_reward.make_weights({name: shapes[name] for name in shapes if name not in leave_out}) | more
    folder.mkdir()
    torch.save(weights, folder / "ImageReward.pt")
    (folder / "med_config.json").write_text(json.dumps(image_reward.MED_CONFIG))
    (folder / "vocab.txt").write_text("\n".join(image_reward.VOCABULARY))
    return folder


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return write_image_reward(tmp_path_factory.mktemp("rewards") / "image_reward")


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    return write_clip(tmp_path_factory.mktemp("clip"))


@pytest.fixture(scope="module")
def dino(tmp_path_factory):
    return write_dino(tmp_path_factory.mktemp("dino"))


@pytest.fixture(scope="module")
def pictures():
    rng = np.random.default_rng(0)
    sizes = [(40, 30), (24, 24), (16, 50), (64, 64), (30, 31)]
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]


def units(n, channels, seed=0):
    """Unit vectors (n, channels) that are somewhat alike, as those of one subject's pictures are."""
    x = torch.randn(n, channels, generator=torch.Generator().manual_seed(seed))  # (n, C)
    return F.normalize(x + 1.5, dim=-1)


# ---- scores -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n, channels", [(7, 30), (30, 7), (12, 12), (1, 4)])
def test_vendi_score_is_its_authors(n, channels):
    """From the n × n matrix of similarities and, the same, from the C × C one."""
    v = units(n, channels)
    for theirs in (vendi.score_X, vendi.score_dual):
        assert vendi_score(v) == pytest.approx(theirs(v.double().numpy(), normalize=False), abs=1e-6)


def test_vendi_score_counts_pictures_that_differ():
    basis = torch.linalg.qr(torch.randn(12, 12, generator=torch.Generator().manual_seed(0)))[0]  # (12, 12)
    for n in (1, 5, 12):
        assert vendi_score(basis[:n]) == pytest.approx(n, rel=1e-5)
        assert vendi_score(basis[:n].repeat(4, 1)) == pytest.approx(n, rel=1e-5)  # of 4n pictures
        assert vendi_score(basis[:1].repeat(n, 1)) == pytest.approx(1, abs=1e-5)
    # One of four is another: eigenvalues 3/4 and 1/4.
    uneven = basis[[0, 0, 0, 1]]
    assert vendi_score(uneven) == pytest.approx(4 / 3**0.75, rel=1e-5)


def test_alignment_is_of_each_picture_with_its_own_text():
    pictures, texts = units(5, 8), units(5, 8, seed=1)
    cosines = F.cosine_similarity(pictures, texts)  # (5,)
    assert alignment(pictures, texts) == pytest.approx(cosines.mean().item(), abs=1e-6)
    assert alignment(pictures, pictures) == pytest.approx(1, abs=1e-6)
    basis = torch.eye(4)
    assert alignment(basis, basis.roll(1, 0)) == 0 and alignment(basis, basis[[0, 1, 3, 2]]) == 0.5


def test_fidelity_is_of_each_picture_with_each_original():
    pictures, originals = units(5, 8), units(3, 8, seed=1)
    cosines = F.cosine_similarity(pictures[:, None], originals, dim=-1)  # (5, 3)
    assert fidelity(pictures, originals) == pytest.approx(cosines.mean().item(), abs=1e-6)
    basis = torch.eye(4)
    assert fidelity(basis[:1], basis[:1]) == 1 and fidelity(basis[:1], basis) == 0.25 == fidelity(basis, basis)


# ---- models -----------------------------------------------------------------------------------------------------


def assert_unit_vectors_equal(ours, theirs):
    assert ours.dtype == torch.float32 and ours.shape == theirs.shape
    torch.testing.assert_close(ours, F.normalize(theirs, dim=-1), rtol=0, atol=2e-6)


@pytest.mark.parametrize("batch", [2, 50])
def test_clip_is_transformers_clip(clip, pictures, monkeypatch, batch):
    """Whatever is beside a text or a picture in its batch: theirs get them one by one."""
    from transformers import CLIPImageProcessor, CLIPModel, CLIPTokenizer

    monkeypatch.setattr(metrics, "BATCH", batch)
    ours = CLIP(clip)
    model, tokenizer = CLIPModel.from_pretrained(clip).eval(), CLIPTokenizer.from_pretrained(clip)
    preprocessor = CLIPImageProcessor.from_pretrained(clip)
    theirs = []
    for text, picture in zip(TEXTS, pictures):
        inputs = tokenizer(text, truncation=True, return_tensors="pt") | preprocessor(picture, return_tensors="pt")
        with torch.no_grad():
            theirs.append(model(**inputs))
    assert_unit_vectors_equal(ours.texts(TEXTS), torch.cat([output.text_embeds for output in theirs]))
    assert_unit_vectors_equal(ours.images(pictures), torch.cat([output.image_embeds for output in theirs]))


@pytest.mark.parametrize("batch", [2, 50])
def test_dinov2_is_transformers_dinov2(dino, pictures, monkeypatch, batch):
    from transformers import BitImageProcessor, Dinov2Model

    monkeypatch.setattr(metrics, "BATCH", batch)
    model, preprocessor = Dinov2Model.from_pretrained(dino).eval(), BitImageProcessor.from_pretrained(dino)
    with torch.no_grad():
        theirs = [model(**preprocessor(picture, return_tensors="pt")).pooler_output for picture in pictures]
    assert_unit_vectors_equal(DINOv2(dino).images(pictures), torch.cat(theirs))


@pytest.mark.parametrize("batch", [2, 50])
def test_image_reward_is_its_packages(rewards, monkeypatch, batch):
    """Texts cut and padded, pictures of every shape, in batches and one by one."""
    monkeypatch.setattr(metrics, "BATCH", batch)
    scores = ImageReward(rewards).scores(image_reward.TEXTS, image_reward.make_pictures())
    theirs = json.loads(image_reward.REFERENCE.read_text())["scores"]
    assert scores.tolist() == pytest.approx(theirs, abs=1e-5) and len(set(theirs)) == 5


def test_vectors_tell_texts_and_pictures_apart(clip, dino, pictures):
    """Or the tests above would pass with a model that ignores what it is given."""
    vectors = [CLIP(clip).texts(TEXTS), CLIP(clip).images(pictures), DINOv2(dino).images(pictures)]
    assert all((v @ v.T).fill_diagonal_(0).max() < 0.9999 for v in vectors)


# ---- mistakes ---------------------------------------------------------------------------------------------------


def mistake(reader, folder, capfd):
    with pytest.raises(UserError) as error:
        reader(folder)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "") and "\n" not in str(error.value)
    assert str(error.value).startswith(str(folder))
    return str(error.value)


@pytest.mark.parametrize("reader", [CLIP, DINOv2, ImageReward])
def test_folders_that_are_none(reader, tmp_path, capfd):
    (tmp_path / "file").write_text("no folder")
    for name in ("absent", "file"):
        assert "is not a folder" in mistake(reader, tmp_path / name, capfd)
    (tmp_path / "empty").mkdir()
    assert "cannot be read" in mistake(reader, tmp_path / "empty", capfd)


DAMAGES = ("broken config.json", "absent model.safetensors", "broken model.safetensors",
           "absent preprocessor_config.json", "broken preprocessor_config.json")  # fmt: skip
CASES = [(reader, damage) for reader in (CLIP, DINOv2) for damage in DAMAGES]
CASES += [(CLIP, "absent tokenizer.json"), (CLIP, "broken tokenizer.json")]


@pytest.mark.parametrize("reader, damage", CASES)
def test_damaged_folders(request, tmp_path, capfd, reader, damage):
    folder = shutil.copytree(request.getfixturevalue("clip" if reader is CLIP else "dino"), tmp_path / "damaged")
    how, name = damage.split()
    (folder / name).unlink() if how == "absent" else (folder / name).write_bytes(b"nothing")
    mistake(reader, folder, capfd)


def test_weights_that_are_not_all_there(clip, dino, tmp_path, capfd):
    """transformers would put random numbers in their place."""
    for reader, whole in ((CLIP, clip), (DINOv2, dino)):
        folder = shutil.copytree(whole, tmp_path / reader.__name__)
        tensors = load_file(folder / "model.safetensors")
        tensors.popitem()
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
        mistake(reader, folder, capfd)


@pytest.mark.parametrize("damage, words", [
    ({"leave_out": ["mlp.layers.7.bias"]}, "mlp.layers.7.bias"),
    ({"leave_out": ["blip.visual_encoder.pos_embed"]}, "blip.visual_encoder.pos_embed"),
    ({"blip.visual_encoder.extra": torch.zeros(1)}, "blip.visual_encoder.extra, which is not part of ImageReward"),
    ({"mlp.layers.7.bias": torch.zeros(2)}, "size mismatch"),
    ({"blip.text_encoder.embeddings.LayerNorm.bias": Image.new("RGB", (1, 1))}, "UnpicklingError"),
])  # fmt: skip
def test_image_reward_is_read_strictly(tmp_path, capfd, damage, words):
    """Neither a hole nor a leftover is passed over, and no code runs."""
    folder = write_image_reward(tmp_path / "damaged", **damage)
    assert words in mistake(ImageReward, folder, capfd)


def test_image_reward_wants_the_vocabulary_of_its_config(tmp_path, capfd):
    folder = write_image_reward(tmp_path / "damaged")
    (folder / "vocab.txt").write_text("\n".join(image_reward.VOCABULARY[:-1]))
    assert "no vocab.txt of the 93 tokens" in mistake(ImageReward, folder, capfd)
    (folder / "med_config.json").write_text(json.dumps(image_reward.MED_CONFIG | {"hidden_size": "48"}))
    assert "med_config.json: hidden_size is '48'" in mistake(ImageReward, folder, capfd)


def test_a_folders_own_code_is_not_run(clip, dino, tmp_path, capfd, monkeypatch):
    """Nor is anybody asked to let it run."""
    monkeypatch.setattr("builtins.input", lambda *_: pytest.fail("asked"))
    for reader, whole in ((CLIP, clip), (DINOv2, dino)):
        folder = shutil.copytree(whole, tmp_path / reader.__name__)
        config = {"auto_map": {"AutoImageProcessor": "theirs.Theirs"}, "image_processor_type": "Theirs"}
        (folder / "preprocessor_config.json").write_text(json.dumps(config))
        (folder / "theirs.py").write_text("raise SystemExit('ran')")
        assert "contains custom code" in mistake(reader, folder, capfd)


def test_quiet(clip, dino, capfd):
    CLIP(clip), DINOv2(dino)
    printed = capfd.readouterr()
    assert (printed.out, printed.err) == ("", "")


# ---- the tiny model's own CLIP ----------------------------------------------------------------------------------


@pytest.mark.skipif(not (TINY / "clip").is_dir(), reason="weights/tiny/clip is not there")
def test_the_shipped_clip_finds_captions_and_pictures():
    """At least 90 of 100 scenes that it was not trained on, each way; and it is small."""
    assert sum(file.stat().st_size for file in (TINY / "clip").rglob("*") if file.is_file()) <= 5_000_000
    rng, scenes = np.random.default_rng(20260704), set()
    while len(scenes) < 100:
        scenes.add(sample_scene(rng))
    scenes, clip = sorted(scenes, key=repr), CLIP(TINY / "clip")
    pictures = clip.images([draw(scene) for scene in scenes])  # (100, C)
    texts = clip.texts([caption(scene, rng, say_place=True) for scene in scenes])  # (100, C)
    cosines, own = pictures @ texts.T, torch.arange(100)  # (100, 100), (100,)
    assert (cosines.argmax(1) == own).sum() >= 90
    assert (cosines.argmax(0) == own).sum() >= 90
