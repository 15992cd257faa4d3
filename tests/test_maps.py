"""Maps of atoms: those of the pass with the prompt, in the right place and colour."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipeline import write_adapter

from dit.maps import overlay, watch
from dit.pipeline import Pipeline
from sparsecode import load_adapter, top_atoms


@pytest.fixture
def pipe(tiny, tmp_path):
    pipe = Pipeline.from_folder(tiny, device="cpu")
    load_adapter(pipe.transformer, write_adapter(tiny, tmp_path / "adapter.safetensors", atoms=8, density=0.25))
    return pipe


def test_maps_are_those_of_the_pass_with_the_prompt(pipe):
    """Seen once more without guidance, where there is no other pass: the first step sees the same noise."""
    noise = pipe.noise([3], 16, 24)  # (1, 4, 8, 12)
    best = [(layer, m) for layer, m, _ in top_atoms(pipe.transformer, 5)]
    assert len({layer for layer, _ in best}) == 2
    picture, maps = watch(pipe, "a red robot", noise, best, steps=3)
    _, alone = watch(pipe, "a red robot", noise, best, steps=3, guidance=1)
    assert picture.size == (24, 16) and maps.shape == (5, 3, 4, 6)  # a patch is 2 × 2 latents
    torch.testing.assert_close(maps[:, 0], alone[:, 0], atol=1e-5, rtol=1e-4)
    assert not torch.allclose(maps[:, 2], alone[:, 2], atol=1e-3)
    _, backwards = watch(pipe, "a red robot", noise, best[::-1], steps=3)
    assert torch.equal(backwards.flip(0), maps)


def test_an_overlay_is_red_where_the_atom_is_added_and_blue_where_it_is_subtracted():
    values = torch.zeros(4, 4)
    values[0, 0], values[3, 3] = 2.0, -1.0
    drawn = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), values), dtype=int)
    red, blue, none = drawn[2, 2], drawn[61, 61], drawn[2, 61]
    assert red[0] > red[2] + 100 and blue[2] > blue[0] + 50 and none.tolist() == [255, 255, 255]
    paler = np.asarray(overlay(Image.new("RGB", (64, 64), "white"), values, scale=4.0), dtype=int)
    assert drawn[2, 2, 2] < paler[2, 2, 2] < 255
    nothing = overlay(Image.new("RGB", (64, 64), "black"), torch.zeros(4, 4))
    assert nothing.tobytes() == Image.new("RGB", (64, 64), (128, 128, 128)).tobytes()
