"""Adapter files: what is saved is what is loaded, and what is broken is refused before the model is touched."""

import json
import re
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import shake, small_inputs
from test_attach import OPTIONS, adapted, make, methods

from sparsecode import (
    Attention,
    UserError,
    adapters,
    attach,
    load_adapter,
    read_header,
    save_adapter,
    set_density,
    trainable,
)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return small_inputs()


@methods
def test_load_gives_what_was_saved(method, inputs, tmp_path):
    model = adapted(method)
    for buffer in (b for name, b in model.named_buffers() if name.endswith("usage")):
        buffer.uniform_()
    save_adapter(model, tmp_path / "new" / "a.safetensors", prompt="a photo of a ☂", seed=3, steps=[1, 2])
    other = make()
    header = load_adapter(other, tmp_path / "new" / "a.safetensors")
    assert torch.equal(other(*inputs), model(*inputs))
    assert all(not p.requires_grad for p in set(other.parameters()) - set(trainable(other)))
    for name, adapter in adapters(model).items():
        loaded = adapters(other)[name]
        assert loaded.options == adapter.options
        for key, value in adapter.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], value)
    assert header == read_header(tmp_path / "new" / "a.safetensors")
    assert header["method"] == method and header["prompt"] == "a photo of a ☂"
    assert header["options"].items() >= {"target": "attn1", **OPTIONS[method]}.items()
    assert header["base"] == {"width": 32, "heads": 4, "context_width": 12, "layers": 2}
    assert header["notes"] == {"seed": 3, "steps": [1, 2]}


def test_thresholds_and_order_survive_the_file(tmp_path, inputs):
    model = make()
    shake(attach(model, atoms=16, threshold="soft", lam=0.25, order="after"))
    save_adapter(model, tmp_path / "a.safetensors")
    other = make()
    assert load_adapter(other, tmp_path / "a.safetensors")["prompt"] is None
    assert torch.equal(other(*inputs), model(*inputs))
    (options,) = {json.dumps(adapter.options) for adapter in adapters(other).values()}
    assert json.loads(options) == dict(atoms=16, threshold="soft", lam=0.25, order="after")


def test_a_changed_density_is_the_one_saved(tmp_path):
    model = adapted()
    set_density(model, 0.5)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other := make(), tmp_path / "a.safetensors")
    assert {adapter.k for adapter in adapters(other).values()} == {8}


def test_file_holds_the_trained_values_in_float32_and_the_usage(tmp_path):
    model = adapted().to(torch.bfloat16)
    save_adapter(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    sites = ("blocks.0.attn1", "blocks.1.attn1")
    assert set(tensors) == {f"{site}.{key}" for site in sites for key in ("W_s", "D", "usage")}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.float32}


class WithoutConfig(torch.nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.attn1 = Attention(width, heads)


def test_without_a_config_the_widths_tell_bases_apart(tmp_path):
    model = WithoutConfig(8)
    attach(model, "lora", r=2)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(WithoutConfig(8), tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="attn1 is width 8, 2 heads there and width 8, 4 heads here"):
        load_adapter(WithoutConfig(8, heads=4), tmp_path / "a.safetensors")


def rewrite(path, metadata=(), drop=(), **tensors):
    """The file with some of its header or tensors changed."""
    header = read_header(path)
    plain = {key: value if isinstance(value, str) else json.dumps(value) for key, value in header.items()}
    kept = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**kept, **tensors}, path, metadata={**plain, **dict(metadata)})


BROKEN = {
    "there is no adapter file": lambda path: path.unlink(),
    "cannot be read as safetensors": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "cannot be read as": lambda path: path.write_text("hello"),
    "was not written by save_adapter": lambda path: save_file({"x": torch.zeros(1)}, path),
    "format version 99, this code reads version 1": lambda path: rewrite(path, {"format": "99"}),
    "damaged header": lambda path: rewrite(path, {"base": "{"}),
    "method='hydra' is unknown": lambda path: rewrite(path, {"method": "hydra"}),
    "sparse has no option hue": lambda path: rewrite(path, {"options": '{"target": "attn1", "hue": 3}'}),
    "lacks blocks.1.attn1.D": lambda path: rewrite(path, drop=["blocks.1.attn1.D"]),
    "has blocks.0.attn2.D, which": lambda path: rewrite(path, **{"blocks.0.attn2.D": torch.zeros(16, 32)}),
    r"has blocks.0.attn1.D of shape \[1, 32\] where \[16, 32\] belongs": lambda path: rewrite(
        path, **{"blocks.0.attn1.D": torch.zeros(1, 32)}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_load_refuses_a_broken_file_and_leaves_the_model_alone(message, inputs, tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    BROKEN[message](path)
    model = make()
    modules = list(model.modules())
    with pytest.raises(UserError, match=message):
        load_adapter(model, path)
    assert list(model.modules()) == modules
    assert all(parameter.requires_grad for parameter in model.parameters())


def test_load_refuses_another_base_and_says_what_differs(tmp_path):
    path = tmp_path / "a.safetensors"
    save_adapter(adapted(), path)
    model = make(heads=8, layers=3)
    with pytest.raises(UserError, match="heads is 4 there and 8 here; layers is 2 there and 3 here$"):
        load_adapter(model, path)
    assert not adapters(model) and all(parameter.requires_grad for parameter in model.parameters())
    model.config = replace(model.config, heads=4, layers=2)
    with pytest.raises(UserError, match=re.escape("no attention is named like 'attn1'")):
        del model.blocks[:]
        load_adapter(model, path)


def test_load_refuses_on_top_of_another_adapter(tmp_path):
    model = adapted()
    save_adapter(model, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="attached to this model already"):
        load_adapter(model, tmp_path / "a.safetensors")


def test_save_refuses_without_an_adapter(tmp_path):
    with pytest.raises(UserError, match="nothing to save"):
        save_adapter(make(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = adapted()
    save_adapter(model, path)
    old = path.read_bytes()

    def full_disk(tensors, target, metadata):
        target.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(sys.modules["sparsecode.files"], "save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
