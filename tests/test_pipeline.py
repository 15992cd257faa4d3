"""The shipped pipeline: the pictures of diffusers, and pictures that show what the captions say."""

import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit import pipeline
from dit.pictures import to_tensor
from dit.pipeline import Pipeline
from dit.tiny.judge import CLASSES, Judge, captions_to_judge, load_judge, right, save_judge, score
from dit.tiny.judge import main as judge_command
from dit.tiny.scenes import draw, natural_image
from sparsecode import attach, save_adapter
from sparsecode.common import UserError

TINY = Path(__file__).parent.parent / "weights" / "tiny"


@pytest.fixture(scope="module")
def pipe():
    return Pipeline.from_folder(TINY, torch.float32, "cpu")


def test_ships_small():
    assert sum(f.stat().st_size for f in TINY.rglob("*")) <= 25e6


@pytest.mark.parametrize("guidance", [1.0, 4.5])
def test_same_pictures_as_diffusers(pipe, guidance):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PixArtSigmaPipeline.from_pretrained(TINY, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    prompts = ["a fox at the top left on a blue background", "a moon"]
    latents = pipe.noise([3, 4])
    ours = pipe.generate(prompts, latents=latents, guidance=guidance, steps=20)
    pictures = theirs(
        prompts, latents=latents.clone(), guidance_scale=guidance, num_inference_steps=20, height=64, width=64,
        use_resolution_binning=False, clean_caption=False,
    ).images  # fmt: skip
    for a, b in zip(ours, pictures):
        # One level is what rounding float32 results to bytes can differ by; two leave room for 20 guided steps.
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2


def test_negative_prompt_equals_diffusers(pipe):
    diffusers = pytest.importorskip("diffusers")
    theirs = diffusers.PixArtSigmaPipeline.from_pretrained(TINY, local_files_only=True)
    theirs.set_progress_bar_config(disable=True)
    prompts, negative = ["a red star on a blue background", "a moon"], "A star at the top left"
    latents = pipe.noise([3, 4])
    ours = pipe.generate(prompts, latents=latents, guidance=3, steps=8, negative_prompt=negative)
    pictures = theirs(
        prompts, latents=latents.clone(), guidance_scale=3, num_inference_steps=8, height=64, width=64,
        negative_prompt=negative, use_resolution_binning=False, clean_caption=False,
    ).images  # fmt: skip
    plain = pipe.generate(prompts, latents=latents, guidance=3, steps=8)
    for a, b, c in zip(ours, pictures, plain):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 2
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(c, dtype=int)).max() > 20


def test_one_latent_for_each_prompt(pipe):
    for count in (0, 1, 3):
        with pytest.raises(UserError, match=f"{count} latents for 2 prompts"):
            pipe.generate(["a star", "a moon"], latents=torch.zeros(count, 4, 16, 16))
    with pytest.raises(UserError, match=r"a list of one str or more, not \[\]"):
        pipe.generate([])
    with pytest.raises(UserError, match="3 latents for 1 prompts"):
        next(pipe.sample(torch.zeros(3, 4, 16, 16), *pipe.encode_prompt(["a star"])))


def test_t5_goes_before_the_other_parts_come(tiny, monkeypatch):
    seen, alive = [], []
    for name in ("load_text_encoder", "load_transformer", "load_vae"):
        load = getattr(pipeline, name)

        def loading(*args, name=name, load=load):
            seen.append((name, [kind for kind, part in alive if part() is not None]))
            part = load(*args)
            alive.append((name, weakref.ref(part)))
            return part

        monkeypatch.setattr(pipeline, name, loading)
    fresh = Pipeline.from_folder(tiny, device="cpu")
    assert fresh.resolution == 16 and fresh.multiple == 4 and seen == []  # the configs tell
    fresh.generate(["a star", "a robot"], steps=2)
    assert seen == [("load_text_encoder", []), ("load_transformer", []), ("load_vae", ["load_transformer"])]


def test_nan_is_never_a_picture(pipe):
    with pytest.raises(UserError, match="the latents became NaN or infinite in float32"):
        pipe.decode(torch.full((1, 4, 8, 8), torch.nan))
    with pytest.raises(UserError, match="the latents became NaN"):
        pipe.generate(["a star"], latents=torch.full((1, 4, 8, 8), 1e38), steps=2)
    with pytest.raises(UserError, match="the latents of a picture"):
        pipe.encode_images(torch.full((1, 3, 16, 16), torch.inf))


def test_float16_draws_the_same_picture(pipe):
    half = Pipeline.from_folder(TINY, torch.float16, "cpu")
    assert half.vae.dtype == torch.float32
    a, b = (to_tensor(p.generate(["a red star on a blue background"], steps=4)) for p in (pipe, half))
    assert -10 * ((a - b) / 2).square().mean().log10() > 30


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not JSON"), ("[1]", "expected an object"), ('{"guidance": "strong"}', "guidance"),
     ("[" * 100000, "not JSON"), ('{"finetune": 3}', "finetune"), ('{"guidance": NaN}', "not JSON")],
)  # fmt: skip
def test_damaged_defaults(tiny, tmp_path, text, words):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    (folder / "defaults.json").write_text(text)
    with pytest.raises(UserError, match=f"defaults.json.*{words}"):
        Pipeline.from_folder(folder)


def test_more_tokens_than_the_text_encoder_knows(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "tiny")
    (folder / "tokenizer" / "tokenizer_config.json").write_text('{"extra_ids": 1000}')
    with pytest.raises(UserError, match="text_encoder/ knows 400"):
        Pipeline.from_folder(folder).encode_prompt(["a star"])


def test_devices(monkeypatch):
    with pytest.raises(UserError, match="device mps cannot be used") as error:
        pipeline.find_device("mps")
    assert len(str(error.value)) < 250
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    for there in (False, True):
        monkeypatch.setattr(torch.backends.mps, "is_available", lambda: there)
        assert pipeline.find_device().type == ("mps" if there else "cpu")


def test_generate_does_not_depend_on_the_batch(pipe):
    prompts = ["a fox on a striped blue background", "there is a small pizza in the middle on a green background"]
    together = pipe.generate(prompts, seed=5, steps=4)
    alone = [pipe.generate([p], seed=5 + i, steps=4)[0] for i, p in enumerate(prompts)]
    for a, b in zip(together, alone):
        assert np.abs(np.asarray(a, dtype=int) - np.asarray(b, dtype=int)).max() <= 1


def test_sizes_must_fit_the_patches(pipe):
    assert pipe.generate(["a star"], height=32, width=96, steps=1)[0].size == (96, 32)
    for height, width in [(63, 64), (64, 4), (0, 64), (-64, 64)]:
        with pytest.raises(UserError, match="multiple of 8"):
            pipe.generate(["a star"], height=height, width=width, steps=1)


def test_one_str_is_not_a_list_of_prompts(pipe):
    with pytest.raises(UserError, match="list"):
        pipe.generate("a star")


def test_freed_parts_come_back(pipe):
    text, _ = pipe.encode_prompt(["a star"])
    pipe.free("text_encoder")
    assert "text_encoder" not in vars(pipe)
    assert torch.equal(pipe.encode_prompt(["A Star "])[0], text)  # remembered, and cleaned like captions
    assert "text_encoder" not in vars(pipe)
    assert pipe.encode_prompt(["a ring"])[0].shape[2] == pipe.text_encoder.config.d_model


def test_autoencoder_keeps_pictures(pipe):
    rng = np.random.default_rng(0)
    scenes, _ = captions_to_judge(16, withheld=False)
    for images, floor in (([draw(s) for s in scenes], 30), ([natural_image(rng) for _ in range(16)], 22)):
        images = to_tensor(images)
        error = (pipe.decode(pipe.encode_images(images)) - images).div(2).square().mean(dim=(1, 2, 3))
        assert -10 * error.log10().mean() >= floor


@pytest.mark.parametrize("withheld", [False, True])
def test_pictures_show_their_captions(pipe, withheld):
    judge = load_judge(TINY / "judge")
    scenes, captions = captions_to_judge(24, withheld)
    shares, _ = score(pipe, judge, scenes, captions)
    assert shares["joint"] >= 0.8, shares


def test_judge_reads_fresh_renderings_and_can_say_no():
    judge = load_judge(TINY / "judge")
    scenes, _ = captions_to_judge(200, withheld=True, seed=1)
    images = [draw(scene) for scene in scenes]
    assert right(judge, images, scenes)["joint"].float().mean() >= 0.99
    assert right(judge, images, scenes[1:] + scenes[:1])["joint"].float().mean() < 0.05
    assert right(Judge(), images, scenes).keys() == {*CLASSES, "joint"}


def test_a_folder_without_a_part_is_refused(tmp_path):
    with pytest.raises(UserError, match="is not a folder"):
        Pipeline.from_folder(tmp_path / "absent")
    (tmp_path / "transformer").mkdir()
    with pytest.raises(UserError, match="text_encoder"):
        Pipeline.from_folder(tmp_path)


def test_the_command_judges_with_an_adapter_and_saves_a_grid(tmp_path, capsys):
    pipe = Pipeline.from_folder(TINY, torch.float32, "cpu")
    attach(pipe.transformer, "sparse", atoms=8)
    save_adapter(pipe.transformer, tmp_path / "adapter.safetensors")
    options = ["--pictures", "4", "--steps", "6", "--device", "cpu"]
    judge_command(options)
    plain = capsys.readouterr().out
    judge_command([*options, "--adapter", str(tmp_path / "adapter.safetensors"), "--out", str(tmp_path / "grid.png")])
    assert capsys.readouterr().out == plain  # a fresh adapter is silent
    assert [line.split()[:2] for line in plain.splitlines()[1:]] == [["2.00", n] for n in ("two", "seen", "withheld")]
    width, height = Image.open(tmp_path / "grid.png").size  # 48 pictures, 8 in a row, and below each its caption
    assert width == 12 + 8 * 140 and 6 * 128 < height < 6 * 256


def test_a_pipeline_without_a_judge_is_refused(tiny):
    with pytest.raises(UserError, match="no judge"):
        judge_command(["--weights", str(tiny)])


def test_a_judge_of_other_things_is_refused(tmp_path, monkeypatch):
    monkeypatch.setitem(CLASSES, "thing", CLASSES["thing"][:50])
    save_judge(Judge(), tmp_path)
    monkeypatch.undo()
    with pytest.raises(UserError, match="knows 50 things, not 200"):
        load_judge(tmp_path)


def test_t5_on_a_device_of_its_own(tiny):
    pipe = Pipeline.from_folder(tiny, device=torch.device("meta"), text_device="cpu")
    text, mask = pipe.encode_prompt(["a red star"])
    assert {p.device.type for p in pipe.text_encoder.parameters()} == {"cpu"}
    assert text.device.type == mask.device.type == "meta"
