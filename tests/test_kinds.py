"""Adapters on torch.nn.MultiheadAttention, PyTorch's transformer layers, and diffusers' attention.

The truth is the module itself, for O and for what it returns, and its own attention map, for S = A σ(X W_s).
"""

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file
from small_model import shake
from torch import nn

from sparsecode import (
    UserError,
    adapters,
    attach,
    detach,
    importance,
    keep_atoms,
    load_adapter,
    record_usage,
    save_adapter,
    set_density,
    set_scale,
    trainable,
)

ROOT = Path(__file__).parent.parent
OPTIONS = dict(atoms=16, density=0.25)
CLOSE = dict(atol=1e-5, rtol=1e-5)
PADDING = torch.tensor([[False, False, False, False, True], [False, False, True, True, True]])


class Holder(nn.Module):
    def __init__(self, attention):
        super().__init__()
        self.attention = attention

    def forward(self, *args, **kwargs):
        return self.attention(*args, **kwargs)


def randomize(model, seed=0):
    torch.manual_seed(seed)
    for parameter in model.parameters():
        parameter.data = torch.randn_like(parameter) * 0.3
    return model.eval().requires_grad_(False)  # PyTorch may choose another kernel where weights want gradients


def multihead(batch_first=True, **config):
    return randomize(Holder(nn.MultiheadAttention(8, 4, batch_first=batch_first, **config)))


def torch_cases():
    torch.manual_seed(1)
    x, context = torch.randn(2, 5, 8), torch.randn(2, 5, 8)
    causal = nn.Transformer.generate_square_subsequent_mask(5)
    numbers = torch.randn(8, 5, 5)  # for each of 2 rows and 4 heads
    return {
        "self": ({}, (x, x, x), {}),
        "padding": ({}, (x, x, x), dict(key_padding_mask=PADDING)),
        "causal": ({}, (x, x, x), dict(attn_mask=causal, is_causal=True, need_weights=False)),
        "numbers and padding": ({}, (x, context, context), dict(attn_mask=numbers, key_padding_mask=PADDING)),
        "maps of heads": ({}, (x, x, x), dict(average_attn_weights=False)),
        "other widths": (dict(kdim=6, vdim=3), (x, torch.randn(2, 7, 6), torch.randn(2, 7, 3)), {}),
        "no bias": (dict(bias=False), (x, x, context), dict(need_weights=False)),
    }


def written_formula(model, inputs, options):
    """O + A σ(V's tokens W_s) D, with A as the module itself returns it."""
    base, adapter = model.attention.base, model.attention.adapter
    first = base.batch_first or inputs[0].ndim == 2
    maps = base(*inputs, **{**options, "need_weights": True, "average_attn_weights": False})[1]  # (B, H, N, L)
    tokens = inputs[2] if first else inputs[2].transpose(0, 1)
    z = adapter.encode(tokens)  # (B, L, M)
    z = z.unflatten(-1, (4, -1)).transpose(-3, -2)  # (B, H, L, M/H)
    delta = (maps @ z).transpose(-3, -2).flatten(-2) @ adapter.D  # (B, N, C)
    return base(*inputs, **options)[0] + (delta if first else delta.transpose(0, 1))


@pytest.mark.parametrize("batch_first", [True, False])
@pytest.mark.parametrize("case", torch_cases())
def test_multihead_attention_is_silent_and_then_the_written_formula(case, batch_first):
    config, inputs, options = torch_cases()[case]
    if not batch_first:
        inputs = tuple(x.transpose(0, 1) for x in inputs)
    if inputs[0] is inputs[1]:
        inputs = (inputs[0],) * 3
    model = multihead(batch_first, **config)
    base, before = model.attention, model(*inputs, **options)
    attach(model, target="attention", **OPTIONS)
    for got, want in zip(model(*inputs, **options), before):
        assert torch.equal(got, want) if want is not None else got is None
    shake(adapters(model).values())
    output, maps = model(*inputs, **options)
    torch.testing.assert_close(output, written_formula(model, inputs, options), **CLOSE)
    torch.testing.assert_close(output, model.attention.forward_naive(*inputs, **options)[0], **CLOSE)
    assert (output - before[0]).abs().max() > 0.01
    if maps is not None:
        torch.testing.assert_close(maps, before[1], **CLOSE)
    detach(model)
    assert model.attention is base


def test_multihead_attention_without_a_batch():
    model, x = multihead(batch_first=False), torch.randn(5, 8)
    before = model(x, x, x, key_padding_mask=PADDING[0])
    shake(attach(model, target="attention", **OPTIONS))
    after = model(x, x, x, key_padding_mask=PADDING[0])
    torch.testing.assert_close(after[0], written_formula(model, (x, x, x), dict(key_padding_mask=PADDING[0])), **CLOSE)
    torch.testing.assert_close(after[1], before[1], **CLOSE)


class Coder(nn.Module):
    def __init__(self, batch_first=True):
        super().__init__()
        layer = dict(d_model=8, nhead=4, dim_feedforward=16, batch_first=batch_first, dropout=0.0)
        self.encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(**layer), 2)
        self.decoder = nn.TransformerDecoder(nn.TransformerDecoderLayer(**layer), 2)

    def forward(self, x, y, padding=PADDING):
        memory = self.encoder(x, src_key_padding_mask=padding)
        return self.decoder(y, memory, memory_key_padding_mask=padding)


def inputs():
    torch.manual_seed(1)
    return torch.randn(2, 5, 8), torch.randn(2, 3, 8)


def test_nested_tensors_are_refused():
    """nn.TransformerEncoder makes them if its first layer has no adapter and the padding is at the end."""
    encoder = randomize(Coder()).encoder
    shake(attach(encoder, target="1.self_attn", **OPTIONS))
    x, padding = torch.randn(2, 5, 8), torch.arange(5).expand(2, 5) > 3
    with torch.no_grad(), pytest.raises(UserError, match="enable_nested_tensor=False"):
        encoder(x, src_key_padding_mask=padding)
    encoder.use_nested_tensor = False  # what that option sets
    with torch.no_grad():
        fast = encoder(x, src_key_padding_mask=padding)
    torch.testing.assert_close(fast, encoder.train()(x, src_key_padding_mask=padding), **CLOSE)


@pytest.mark.parametrize("training", [True, False])
def test_no_fast_path_goes_past_an_adapter_of_a_transformer_layer(training):
    """Without gradients nn.TransformerEncoder computes everything itself, on nested tensors."""
    model = randomize(Coder()).train(training)
    with torch.set_grad_enabled(training):
        before = model(*inputs())
        attach(model, target="attn", **OPTIONS)
        assert len(adapters(model)) == 6 and torch.equal(model(*inputs()), before)
        some = list(adapters(model).values())[1:]  # the first layer's stays silent
        shake(some)
        eager = model(*inputs())
    model.train()  # never a fast path
    torch.testing.assert_close(eager, model(*inputs()), **CLOSE)
    assert (eager - before).abs().max() > 0.01


def test_batch_first_or_not_in_transformer_layers():
    x, y = inputs()
    one, other = randomize(Coder(True)), randomize(Coder(False))
    other.load_state_dict(one.state_dict())
    for model in (one, other):
        torch.manual_seed(2)
        shake(attach(model, target="attn", **OPTIONS))
    torch.testing.assert_close(one(x, y), other(x.transpose(0, 1), y.transpose(0, 1)).transpose(0, 1), **CLOSE)


def test_training_reaches_the_atoms_alone_and_the_dials_work(tmp_path):
    model = randomize(Coder())
    attach(model, target="attn", **OPTIONS)
    base = {name: value.clone() for name, value in model.named_parameters() if not value.requires_grad}
    optimizer = torch.optim.SGD(trainable(model), lr=0.1)
    for _ in range(2):
        model(*inputs()).square().mean().backward()
        assert all(adapter.D.grad.abs().max() > 0 for adapter in adapters(model).values())
        optimizer.step()
    assert all(torch.equal(value, base[name]) for name, value in model.named_parameters() if not value.requires_grad)
    with torch.no_grad():
        with record_usage(model):
            full = model(*inputs())
        assert all(score.max() > 0 for score in importance(model).values())
        save_adapter(model, tmp_path / "a.safetensors")
        load_adapter(other := randomize(Coder()), tmp_path / "a.safetensors")
        assert torch.equal(other(*inputs()), full)
        keep_atoms(model, 3)
        few = model(*inputs())
        keep_atoms(model, 0)
        assert torch.equal(model(*inputs()), randomize(Coder())(*inputs()))  # the fast path
        keep_atoms(model, "all")
        assert torch.equal(model(*inputs()), full) and not torch.equal(few, full)
        set_density(model, 1.0)
        assert not torch.equal(model(*inputs()), full)
        assert torch.equal(copy.deepcopy(model)(*inputs()), model(*inputs()))


@pytest.mark.parametrize("config", [dict(add_bias_kv=True), dict(add_zero_attn=True)])
def test_keys_of_no_token_are_refused(config):
    model = multihead(**config)
    with pytest.raises(UserError, match="^attention cannot be taken apart: add_bias_kv and add_zero_attn add keys"):
        attach(model, target="attention", **OPTIONS)
    assert isinstance(model.attention, nn.MultiheadAttention)


# ---- diffusers ----------------------------------------------------------------------------------------------------


def block(**config):
    """The transformer block of Stable Diffusion's UNet: self- and cross-attention."""
    pytest.importorskip("diffusers")
    from diffusers.models.attention import BasicTransformerBlock

    return randomize(BasicTransformerBlock(8, 2, 4, cross_attention_dim=6, **config))


def diffusers_attention(**config):
    pytest.importorskip("diffusers")
    from diffusers.models.attention_processor import Attention

    return randomize(Holder(Attention(8, heads=2, dim_head=4, **config)))


def test_blocks_of_a_unet():
    model = block()
    x, text = torch.randn(2, 5, 8), torch.randn(2, 3, 6)
    mask = torch.tensor([[[0.0, 0.0, -10000.0]], [[0.0, -10000.0, -10000.0]]])  # (B, 1, L), added to the logits

    def run():
        return model(x, encoder_hidden_states=text, encoder_attention_mask=mask)

    modules, before = dict(model.named_modules()), run()
    attach(model, target="attn", **OPTIONS)
    assert list(adapters(model)) == ["attn1", "attn2"] and torch.equal(run(), before)
    assert adapters(model)["attn2"].W_s.shape == (6, 16)
    shake(adapters(model).values())
    assert (run() - before).abs().max() > 0.01
    detach(model)
    assert all(dict(model.named_modules())[name] is module for name, module in modules.items())
    assert torch.equal(run(), before)


@pytest.mark.parametrize("processor", ["AttnProcessor", "AttnProcessor2_0"])
@pytest.mark.parametrize("case", ["self", "cross", "picture", "its own scale"])
def test_diffusers_attention_is_silent_and_then_the_written_formula(case, processor):
    config = dict(cross_attention_dim=6) if case == "cross" else {}
    if case == "its own scale":
        config, processor = dict(scale_qk=False), "AttnProcessor"
    model = diffusers_attention(**config)
    import diffusers.models.attention_processor as processors

    model.attention.set_processor(getattr(processors, processor)())
    x = torch.randn(2, 8, 2, 3) if case == "picture" else torch.randn(2, 5, 8)
    context = torch.randn(2, 3, 6) if case == "cross" else None
    mask = torch.randn(2, 1, 3) if case == "cross" else None
    before = model(x, context, mask)
    attach(model, target="attention", **OPTIONS)
    assert torch.equal(model(x, context, mask), before)
    shake(adapters(model).values())
    base, adapter = model.attention.base, model.attention.adapter
    tokens = x.flatten(2).transpose(1, 2) if case == "picture" else x
    source = tokens if context is None else context
    q, k = base.head_to_batch_dim(base.to_q(tokens)), base.head_to_batch_dim(base.to_k(source))
    bias = None if mask is None else mask.repeat_interleave(2, dim=0)
    maps = base.get_attention_scores(q, k, bias).unflatten(0, (2, 2))  # (B, H, N, L)
    z = adapter.encode(source).unflatten(-1, (2, -1)).transpose(1, 2)  # (B, H, L, M/H)
    delta = (maps @ z).transpose(1, 2).flatten(2) @ adapter.D  # (B, N, C)
    delta = delta.transpose(1, 2).view_as(x) if case == "picture" else delta
    torch.testing.assert_close(model(x, context, mask), before + delta, **CLOSE)
    torch.testing.assert_close(model.attention.forward_naive(x, context, mask), before + delta, **CLOSE)


@pytest.mark.parametrize(
    "config, message",
    [
        (dict(qk_norm="layer_norm"), "it has norm_q, norm_k"),
        (dict(norm_num_groups=2), "it has group_norm"),
        (dict(residual_connection=True), "it has residual_connection"),
        (dict(added_kv_proj_dim=8), "it has added_kv_proj_dim"),
        (dict(rescale_output_factor=2.0), "it rescales its output"),
    ],
)
def test_attentions_of_diffusers_that_do_more_are_refused(config, message):
    model = diffusers_attention(**config)
    with pytest.raises(UserError, match=f"^attention cannot be taken apart: {message}"):
        attach(model, target="attention", **OPTIONS)


def test_another_processor_is_refused_then_and_later():
    model, x = diffusers_attention(), torch.randn(2, 5, 8)
    from diffusers.models.attention_processor import FluxAttnProcessor2_0

    default, other = model.attention.processor, FluxAttnProcessor2_0()
    model.attention.set_processor(other)
    with pytest.raises(UserError, match="its processor is Flux"):
        attach(model, target="attention", **OPTIONS)
    model.attention.set_processor(default)
    attach(model, target="attention", **OPTIONS)
    model.attention.base.set_processor(other)
    with pytest.raises(UserError, match="its processor is Flux"):
        model(x)


@pytest.mark.parametrize("method, options", [("sparse", OPTIONS), ("lora", dict(r=2)), ("oft", dict(blocks=2))])
def test_adapters_go_to_diffusers_and_back(method, options, tmp_path):
    """PixArt here and in diffusers, of the same random weights: one file, one noise prediction, within 2e-5."""
    pytest.importorskip("diffusers")
    import warnings

    from test_transformer import diffusers_transformer, inputs, relative, run_theirs

    from dit.checkpoint import load_transformer

    theirs = diffusers_transformer()
    theirs.save_pretrained(tmp_path / "transformer")
    ours = load_transformer(tmp_path / "transformer")
    before = run_theirs(theirs, *inputs())
    attach(ours, method, **options)
    shake(adapters(ours).values())
    save_adapter(ours, tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # other weights would be a warning
        load_adapter(theirs, tmp_path / "a.safetensors")
        got = run_theirs(theirs, *inputs())
        assert relative(ours(*inputs()), got) < 2e-5 and relative(before, got) > 0.01
        save_adapter(theirs, tmp_path / "b.safetensors")
        load_adapter(again := load_transformer(tmp_path / "transformer"), tmp_path / "b.safetensors")
    assert torch.equal(again(*inputs()), ours(*inputs()))
    from diffusers import PixArtTransformer2DModel

    other = PixArtTransformer2DModel(**{**theirs.config, "num_layers": 3})
    with pytest.raises(UserError, match="num_layers is 2 there and 3 here"):
        load_adapter(other, tmp_path / "b.safetensors")


def test_the_readmes_lines_draw_what_sample_draws(tmp_path, monkeypatch):
    pytest.importorskip("diffusers")
    from dit import sample
    from dit.checkpoint import load_transformer

    torch.manual_seed(0)
    model = load_transformer(ROOT / "weights" / "tiny" / "transformer")
    shake(attach(model, **OPTIONS))
    monkeypatch.chdir(tmp_path)
    Path("weights").symlink_to(ROOT / "weights")
    Path("runs/robot").mkdir(parents=True)
    save_adapter(model, "runs/robot/adapter.safetensors")
    section = (ROOT / "README.md").read_text(encoding="utf-8").split("## Your own diffusers pipeline")[1]
    lines = section.split("\n## ")[0].splitlines()
    exec("\n".join(line[4:] for line in lines if line.startswith("    ")), {})
    command = ["a robot on a red background", "--weights=weights/tiny", "--seed=0", "--guidance=4.5", "--device=cpu"]
    sample.main([*command, "--adapter=runs/robot/adapter.safetensors", "--scale=0.7", "--out=ours.png"])
    sample.main([*command, "--out=base.png"])
    theirs, ours, base = (np.asarray(Image.open(f"{name}.png"), dtype=int) for name in ("robot", "ours", "base"))
    assert np.abs(ours - theirs).max() <= 2 and np.abs(ours - base).max() > 20
    before, after = load_file("runs/robot/adapter.safetensors"), load_file("robot.safetensors")
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)


@pytest.mark.parametrize("method, options", [("sparse", OPTIONS), ("lora", dict(r=2)), ("dora", dict(r=2))])
def test_scale_multiplies_what_an_adapter_adds(method, options):
    from small_model import SmallModel

    model = randomize(Holder(SmallModel().blocks[0]["attn1"]))
    x = torch.randn(2, 5, 32)
    base = model(x)
    attach(model, method, target="attention", **options)
    for name, adapter in adapters(model).items():
        if method == "sparse" or name.endswith("to_out"):
            shake([adapter])
    full = model(x) - base
    assert full.abs().max() > 0.01
    for scale in (0.7, -1, 0, 1):
        set_scale(model, scale)
        torch.testing.assert_close(model(x) - base, scale * full, **CLOSE)
        assert scale or torch.equal(model(x), base)
    with pytest.raises(UserError, match="scale='0.7' is not a number"):
        set_scale(model, "0.7")
