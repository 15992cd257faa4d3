"""Against diffusers' PixArtTransformer2DModel on random weights that it wrote itself.

Tolerance in float32: ‖ours − theirs‖ / ‖theirs‖ ≤ 2e-5.
"""

import pytest
import torch

from dit.checkpoint import load_transformer
from dit.config import TransformerConfig
from dit.transformer import PixArtTransformer, _position_table, position_table

PixArtTransformer2DModel = pytest.importorskip("diffusers").PixArtTransformer2DModel
TINY = dict(num_attention_heads=2, attention_head_dim=8, num_layers=2, sample_size=16, caption_channels=12,
            use_additional_conditions=False)  # fmt: skip


def relative(ours, theirs):
    assert ours.shape == theirs.shape
    return ((ours.double() - theirs.double()).norm() / theirs.double().norm()).item()


@torch.no_grad()
def randomize(model, seed=0):
    """Weights that keep the size of their input, and biases, norms and tables that are far from zero and one."""
    generator = torch.Generator().manual_seed(seed)
    for name, p in model.named_parameters():
        noise = torch.randn(p.shape, generator=generator)
        scale = p[0].numel() ** -0.5 if p.ndim > 1 and "table" not in name else 0.3
        p.copy_(scale * noise + (1.0 if p.ndim == 1 and "norm" in name and "weight" in name else 0.0))
    return model.eval().requires_grad_(False)


def diffusers_transformer(**config):
    config = TINY | config
    config.setdefault("cross_attention_dim", config["num_attention_heads"] * config["attention_head_dim"])
    return randomize(PixArtTransformer2DModel(**config))


def inputs(h=8, w=8, channels=4, caption_channels=12, lengths=(7, 1, 4), seed=1):
    generator = torch.Generator().manual_seed(seed)
    latents = torch.randn(len(lengths), channels, h, w, generator=generator)
    text = torch.randn(len(lengths), 7, caption_channels, generator=generator)
    mask = (torch.arange(7) < torch.tensor(lengths)[:, None]).long()
    return latents, torch.tensor([0, 431, 999])[: len(lengths)], text, mask


def run_theirs(model, latents, timesteps, text, mask):
    return model(latents, text, timesteps, encoder_attention_mask=mask, return_dict=False)[0]


@pytest.mark.parametrize(
    ("config", "h", "w"),
    [
        (dict(interpolation_scale=0.5, sample_size=32), 8, 8),
        (dict(interpolation_scale=None, sample_size=128), 6, 10),  # null: scale 2; an odd grid of 3 × 5 tokens
        (dict(interpolation_scale=2, sample_size=128), 4, 14),
        (dict(interpolation_scale=None, sample_size=32), 26, 10),  # null: scale 1
        (dict(interpolation_scale=2, num_attention_heads=3, attention_head_dim=12, num_layers=3), 10, 6),
        (dict(num_attention_heads=4, attention_head_dim=72, num_layers=1, caption_channels=40), 16, 16),
        (dict(num_attention_heads=1, attention_head_dim=20, patch_size=4, in_channels=3, out_channels=5), 8, 20),
    ],
)
def test_equals_diffusers(tmp_path, config, h, w):
    theirs = diffusers_transformer(**config)
    theirs.save_pretrained(tmp_path)
    x = inputs(h, w, config.get("in_channels", 4), config.get("caption_channels", 12))
    assert relative(load_transformer(tmp_path)(*x), run_theirs(theirs, *x)) < 2e-5


@pytest.mark.parametrize(("h", "w", "base", "scale"), [(64, 64, 64, 2), (45, 83, 64, 2), (7, 3, 16, 0.5)])
def test_position_table_equals_diffusers(h, w, base, scale):
    from diffusers.models.embeddings import get_2d_sincos_pos_embed

    theirs = get_2d_sincos_pos_embed(24, (h, w), base_size=base, interpolation_scale=scale)
    # The tolerance is the rounding of float32 to coordinates of up to 64 / scale.
    torch.testing.assert_close(position_table(24, h, w, base, scale).double(), theirs.double(), atol=1e-5, rtol=0)


def test_every_input_matters(tmp_path):
    """What equality with diffusers would not show if the random weights were too tame."""
    diffusers_transformer().save_pretrained(tmp_path)
    model, x = load_transformer(tmp_path), inputs()
    before = model(*x)
    for i in range(3):
        changed = list(x)
        changed[i] = (x[i] + 100) % 1000 if i == 1 else x[i].flip(1)
        assert relative(model(*changed), before) > 0.05
    x[3][:, 6:] = 0
    assert relative(model(*x)[:1], before[:1]) > 0.01


def test_masked_text_can_be_cut_off(tmp_path):
    diffusers_transformer().save_pretrained(tmp_path)
    model, (latents, t, text, mask) = load_transformer(tmp_path), inputs(lengths=(4, 1, 3))
    whole, cut = model(latents, t, text, mask), model(latents, t, text[:, :4], mask[:, :4])
    assert relative(cut, whole) < 1e-6


def test_bfloat16_stays_close(tmp_path):
    """bfloat16 rounds to 2⁻⁹ = 0.2 %; a forward may multiply that by ten, and diffusers' own is no better."""
    theirs = diffusers_transformer()
    theirs.save_pretrained(tmp_path)
    x = inputs()
    exact = run_theirs(theirs, *x)
    half = [v.bfloat16() if v.is_floating_point() else v for v in x]
    output = load_transformer(tmp_path, torch.bfloat16)(*half)
    assert output.dtype == torch.bfloat16
    ours, reference = relative(output, exact), relative(run_theirs(theirs.bfloat16(), *half), exact)
    assert ours < 0.02 and ours < 1.5 * reference


def test_gradient_checkpointing_changes_nothing(tmp_path):
    diffusers_transformer().save_pretrained(tmp_path)
    model = load_transformer(tmp_path).requires_grad_(True)
    x, grads = inputs(), []
    for model.gradient_checkpointing in (False, True):
        model.zero_grad()
        model(*x).square().mean().backward()
        grads.append([p.grad.clone() for p in model.parameters()])
    assert all(torch.equal(a, b) for a, b in zip(*grads)) and any(g.any() for g in grads[0])


def test_a_table_made_in_inference_mode_serves_training(tmp_path):
    diffusers_transformer().save_pretrained(tmp_path)
    model = load_transformer(tmp_path)
    _position_table.cache_clear()
    with torch.inference_mode():
        model(*inputs())
    model.requires_grad_(True)(*inputs()).mean().backward()
    assert not model.positions(4, 4, "cpu").is_inference()


def test_size_of_the_real_one():
    with torch.device("meta"):
        model = PixArtTransformer(TransformerConfig())
    assert len(list(model.parameters())) == len(model.state_dict()) == 603
    assert sum(p.numel() for p in model.parameters()) == 610_856_096
