"""Against diffusers' AutoencoderKL on random weights that it wrote itself.

Tolerance in float32: ‖ours − theirs‖ / ‖theirs‖ ≤ 5e-5.
"""

import pytest
import torch
from diffusers import AutoencoderKL as DiffusersAutoencoder
from test_transformer import randomize, relative

from dit.checkpoint import load_vae
from dit.config import VAEConfig
from dit.vae import AutoencoderKL

TINY = dict(block_out_channels=(8, 16, 24), layers_per_block=1, norm_num_groups=4, scaling_factor=0.3, sample_size=32)


def diffusers_vae(**config):
    config = TINY | config
    levels = len(config["block_out_channels"])
    config |= {"down_block_types": ["DownEncoderBlock2D"] * levels, "up_block_types": ["UpDecoderBlock2D"] * levels}
    return randomize(DiffusersAutoencoder(latent_channels=4, **config))


def pictures(height=24, width=40, seed=1):
    return torch.rand(2, 3, height, width, generator=torch.Generator().manual_seed(seed)) * 2 - 1


CONFIGS = [
    {},
    dict(mid_block_add_attention=False),
    dict(use_quant_conv=False, use_post_quant_conv=False),
    dict(block_out_channels=(8, 8, 16, 16), layers_per_block=2, norm_num_groups=8, scaling_factor=0.13025),
    dict(block_out_channels=(12,), norm_num_groups=3),  # one level: latents as large as the picture
]


@pytest.mark.parametrize("config", CONFIGS)
@pytest.mark.parametrize(("height", "width"), [(24, 40), (32, 16)])
def test_equals_diffusers(tmp_path, config, height, width):
    theirs = diffusers_vae(**config)
    theirs.save_pretrained(tmp_path)
    ours, images, scale = load_vae(tmp_path), pictures(height, width), theirs.config.scaling_factor
    expected = theirs.encode(images).latent_dist
    latents = ours.encode(images)
    assert ours.config.factor == height // latents.shape[2] == width // latents.shape[3]
    assert relative(latents, scale * expected.mean) < 5e-5
    mean, logvar = ours.posterior(images)
    assert relative(mean, expected.mean) < 5e-5 and relative(logvar, expected.logvar) < 5e-5
    assert relative(ours.decode(latents), theirs.decode(latents / scale, return_dict=False)[0]) < 5e-5


def test_the_log_variance_is_clamped(tmp_path):
    theirs = diffusers_vae()
    theirs.quant_conv.bias[4:6], theirs.quant_conv.bias[6:8] = 100.0, -100.0
    theirs.save_pretrained(tmp_path)
    logvar = load_vae(tmp_path).posterior(pictures())[1]
    assert logvar[:, :2].eq(20).all() and logvar[:, 2:].eq(-30).all()


def test_bfloat16_stays_close(tmp_path):
    """bfloat16 rounds to 2⁻⁹ = 0.2 %; a dozen layers multiply that by some ten, in diffusers as well."""
    theirs, images = diffusers_vae(), pictures()
    theirs.save_pretrained(tmp_path)
    ours, scale = load_vae(tmp_path, torch.bfloat16), theirs.config.scaling_factor
    mean = theirs.encode(images).latent_dist.mean
    picture = theirs.decode(mean, return_dict=False)[0]
    output = ours.encode(images.bfloat16()), ours.decode((scale * mean).bfloat16())
    assert output[0].dtype == output[1].dtype == torch.bfloat16
    theirs = theirs.bfloat16()
    encoded = relative(theirs.encode(images.bfloat16()).latent_dist.mean, mean)
    decoded = relative(theirs.decode(mean.bfloat16(), return_dict=False)[0], picture)
    assert relative(output[0], scale * mean) < min(0.03, 1.5 * encoded)
    assert relative(output[1], picture) < min(0.03, 1.5 * decoded)


def test_size_of_the_real_one():
    with torch.device("meta"):
        vae = AutoencoderKL(VAEConfig())
    assert sum(p.numel() for p in vae.parameters()) == 83_653_863
    assert vae.config.factor == 8
