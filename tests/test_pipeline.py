"""The shipped pipeline: the pictures of diffusers, and pictures that show what the captions say."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from dit.pictures import to_tensor
from dit.pipeline import Pipeline
from dit.tiny.judge import CLASSES, Judge, captions_to_judge, load_judge, right, score
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
    scenes, _ = captions_to_judge(200, withheld=True, two_things=0.3, seed=1)
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
    assert Image.open(tmp_path / "grid.png").size == (10 + 6 * 138, 10 + 174)


def test_a_pipeline_without_a_judge_is_refused(tiny):
    with pytest.raises(UserError, match="no judge"):
        judge_command(["--weights", str(tiny)])


def test_t5_on_a_device_of_its_own(tiny):
    pipe = Pipeline.from_folder(tiny, device="meta", text_device="cpu")
    text, mask = pipe.encode_prompt(["a red star"])
    assert {p.device.type for p in pipe.text_encoder.parameters()} == {"cpu"}
    assert text.device.type == mask.device.type == "meta"
