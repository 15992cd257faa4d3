"""Adapter files: what is saved is what is loaded, and what is broken is refused before the model is touched."""

import hashlib
import json
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from small_model import shake, small_inputs
from test_attach import OPTIONS, adapted, make, methods

from sparsecode import (
    Attention,
    UserError,
    adapters,
    attach,
    detach,
    importance,
    keep_atoms,
    load_adapter,
    read_header,
    record_usage,
    save_adapter,
    set_density,
    set_scale,
    trainable,
    weights_checksums,
)


@pytest.fixture
def inputs():
    torch.manual_seed(1)
    return small_inputs()


@methods
def test_load_gives_what_was_saved(method, inputs, tmp_path):
    model = adapted(method)
    if method == "sparse":
        with record_usage(model):
            model(*inputs)
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


@pytest.mark.parametrize("n", [0, 1, 11])
@pytest.mark.parametrize("options", [{}, dict(threshold="soft", lam=0.25, order="after")])
def test_a_file_holds_only_the_atoms_that_are_kept(n, options, inputs, tmp_path):
    """C_i M + ρ C_o M numbers (§3.5): W_s stays whole, since top-k picks among all M coefficients."""
    model = make()
    shake(attach(model, **({"atoms": 16, **options} if options else OPTIONS["sparse"])))
    with record_usage(model):
        model(*inputs)
    keep_atoms(model, n)
    save_adapter(model, tmp_path / "a.safetensors")
    tensors = load_file(tmp_path / "a.safetensors")
    assert sum(value.numel() for key, value in tensors.items() if key.endswith(".D")) == 32 * n
    assert all(value.shape == (32, 16) for key, value in tensors.items() if key.endswith(".W_s"))
    load_adapter(other := make(), tmp_path / "a.safetensors")
    assert torch.equal(other(*inputs), model(*inputs))
    save_adapter(other, tmp_path / "b.safetensors")
    assert (tmp_path / "a.safetensors").read_bytes() == (tmp_path / "b.safetensors").read_bytes()
    if n == 11:
        keep_atoms(other, 5), keep_atoms(model, 5)  # fewer of them
        assert torch.equal(other(*inputs), model(*inputs))


def test_usage_that_is_out_of_date_is_not_kept(inputs, tmp_path):
    model = adapted()
    with record_usage(model):
        model(*inputs)
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other := make(), tmp_path / "a.safetensors")
    assert all(torch.equal(score, importance(model)[name]) for name, score in importance(other).items())
    set_density(other, 0.5)
    with pytest.raises(UserError, match="before their density"):
        importance(other)
    save_adapter(other, tmp_path / "b.safetensors")
    load_adapter(third := make(), tmp_path / "b.safetensors")
    with pytest.raises(UserError, match="never measured"):
        importance(third)


@methods
def test_the_same_adapter_gives_the_same_bytes(method, tmp_path):
    """safetensors alone writes its header in another order each time: 8 files are alike by chance once in 10^15."""
    for i in range(8):
        save_adapter(adapted(method), tmp_path / f"{i}.safetensors", prompt="a ☂", seed=3, lr=1e-3)
    assert len({hashlib.sha256(file.read_bytes()).hexdigest() for file in tmp_path.iterdir()}) == 1


def test_other_weights_are_a_warning_that_says_which(inputs, tmp_path):
    save_adapter(adapted(), tmp_path / "a.safetensors")
    other = make()
    with torch.no_grad():
        other.blocks[1]["mlp"][0].weight *= 1.5
    with pytest.warns(UserWarning, match=r"other weights of this model: blocks\.1 differ$") as caught:
        load_adapter(other, tmp_path / "a.safetensors")
    assert caught[0].filename == __file__
    with pytest.warns(UserWarning, match=r"blocks\.0 and 1 more differ$"):
        load_adapter(make(seed=1), tmp_path / "a.safetensors")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        load_adapter(make(), tmp_path / "a.safetensors")
        load_adapter(make().bfloat16(), tmp_path / "a.safetensors")


@methods
def test_checksums_are_those_of_the_base_model(method):
    expected = weights_checksums(make())
    assert list(expected) == ["blocks.0", "blocks.1"] and len(set(expected.values())) == 2
    assert weights_checksums(adapted(method)) == expected == weights_checksums(make().bfloat16())
    assert not set(weights_checksums(make(seed=1)).values()) & set(expected.values())


def test_a_file_of_the_past_loads(inputs, tmp_path):
    """Without the number of adapters and the checksums of the weights."""
    save_adapter(model := adapted(), tmp_path / "a.safetensors")
    with safe_open(tmp_path / "a.safetensors", framework="pt") as file:
        header = {key: value for key, value in file.metadata().items() if key not in ("adapters", "weights")}
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", metadata=header)
    assert load_adapter(other := make(), tmp_path / "a.safetensors")["weights"] is None
    assert torch.equal(other(*inputs), model(*inputs))


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*X", "(", "nothing"])
def test_a_pattern_in_a_file_is_never_run(pattern, inputs, tmp_path):
    """The first takes longer than a life; the names of the tensors say what is adapted."""
    save_adapter(model := adapted(), tmp_path / "a.safetensors")
    options_of(target=pattern)(tmp_path / "a.safetensors")
    load_adapter(other := make(), tmp_path / "a.safetensors")
    assert torch.equal(other(*inputs), model(*inputs))
    save_adapter(other, tmp_path / "b.safetensors")
    assert read_header(tmp_path / "b.safetensors")["options"]["target"] == pattern


class WithoutConfig(torch.nn.Module):
    def __init__(self, width, heads=2):
        super().__init__()
        self.attn1 = Attention(width, heads)


def test_without_a_config_the_widths_tell_bases_apart(tmp_path):
    model = WithoutConfig(8)
    attach(model, "lora", r=2)
    save_adapter(model, tmp_path / "a.safetensors")
    other = WithoutConfig(8)
    other.load_state_dict({key.replace(".base", ""): value for key, value in model.state_dict().items()}, strict=False)
    load_adapter(other, tmp_path / "a.safetensors")
    with pytest.raises(UserError, match="attn1 is width 8, 2 heads there and width 8, 4 heads here"):
        load_adapter(WithoutConfig(8, heads=4), tmp_path / "a.safetensors")


def rewrite(path, metadata=(), drop=(), **tensors):
    """The file with some of its header or tensors changed."""
    header = read_header(path)
    plain = {k: v if isinstance(v, str) else json.dumps(v) for k, v in header.items() if v is not None}
    kept = {key: value for key, value in load_file(path).items() if key not in drop}
    save_file({**kept, **tensors}, path, metadata={**plain, **dict(metadata)})


def options_of(**changes):
    return lambda path: rewrite(path, {"options": json.dumps({**read_header(path)["options"], **changes})})


BROKEN = {
    "there is no adapter file": lambda path: path.unlink(),
    "cannot be read as safetensors": lambda path: path.write_bytes(path.read_bytes()[:-50]),
    "cannot be read as": lambda path: path.write_text("hello"),
    "was not written by save_adapter": lambda path: save_file({"x": torch.zeros(1)}, path),
    "format version 99, this code reads version 1": lambda path: rewrite(path, {"format": "99"}),
    "base is not JSON": lambda path: rewrite(path, {"base": "{"}),
    "method='hydra' is unknown": lambda path: rewrite(path, {"method": "hydra"}),
    "sparse has no option hue": lambda path: rewrite(path, {"options": '{"target": "attn1", "hue": 3}'}),
    "lacks blocks.1.attn1.D": lambda path: rewrite(path, drop=["blocks.1.attn1.D"]),
    "says adapters=2, but has tensors for 1 of them": lambda path: rewrite(
        path, drop=[f"blocks.1.attn1.{key}" for key in ("W_s", "D", "usage")]
    ),
    "says adapters=2, but has tensors for 3 of them": lambda path: rewrite(
        path, **{"blocks.0.attn2.D": torch.zeros(16, 32)}
    ),
    "has blocks.0.attn1.hue, which": lambda path: rewrite(path, **{"blocks.0.attn1.hue": torch.zeros(16, 32)}),
    "has elsewhere.D, which": lambda path: rewrite(path, **{"elsewhere.D": torch.zeros(16, 32)}),
    "NaN or infinite values in blocks.0.attn1.D": lambda path: rewrite(
        path, **{"blocks.0.attn1.D": torch.full((16, 32), torch.nan)}
    ),
    "NaN or infinite values in blocks.0.attn1.W_s": lambda path: rewrite(
        path, **{"blocks.0.attn1.W_s": torch.full((32, 16), 1e300, dtype=torch.float64)}
    ),
    "attn1.D in C64; expected": lambda path: rewrite(path, **{"blocks.0.attn1.D": torch.ones(16, 32) + 0j}),
    "attn1.D in I32; expected": lambda path: rewrite(path, **{"blocks.0.attn1.D": torch.ones(16, 32).int()}),
    "attn1.keep in F32; expected": lambda path: rewrite(path, **{"blocks.0.attn1.keep": torch.ones(16)}),
    r"attn1.(keep of shape \[17\]|D of shape \[16, 32\] where \[17, 32\])": lambda path: rewrite(
        path, **{"blocks.0.attn1.keep": torch.ones(17, dtype=torch.bool)}
    ),
    r"attn1.D of shape \[16, 32\] where \[3, 32\] belongs": lambda path: rewrite(
        path, **{"blocks.0.attn1.keep": torch.arange(16) < 3}
    ),
    r"of shape \[32, 16\] where \[32, 40000000\] belongs": options_of(atoms=40_000_000),
    "atoms is 100000000000; expected a whole number": options_of(atoms=10**11),
    "atoms is '16'; expected a whole number": options_of(atoms="16"),
    "atoms is True; expected": options_of(atoms=True),
    "density=2.0 is not a share": options_of(density=2.0),
    "options is not JSON": lambda path: rewrite(path, {"options": '{"target": "attn1", "lam": NaN}'}),
    "options: target is 3; expected text": options_of(target=3),
    r"base holds \[1\]; expected an object": lambda path: rewrite(path, {"base": "[1]"}),
    "notes is not JSON": lambda path: rewrite(path, {"notes": "[" * 50_000}),
    "weights holds 5; expected an object": lambda path: rewrite(path, {"weights": "5"}),
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
    with pytest.raises(UserError, match="has blocks.0.attn1.D and 5 more, which is for no layer of this model"):
        del model.blocks[:]
        load_adapter(model, path)


def test_save_refuses_without_an_adapter(tmp_path):
    with pytest.raises(UserError, match="nothing to save"):
        save_adapter(make(), tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("words, more", [
    ("the note loss, a Tensor, cannot be saved", dict(loss=torch.tensor(0.5))),
    ("the note loss, a float, cannot be saved", dict(loss=float("nan"))),
    ("the note folder, a .*Path, cannot be saved", dict(folder=Path("runs"))),
    (r"prompt=\['a robot'\] is not text", dict(prompt=["a robot"])),
])  # fmt: skip
@pytest.mark.parametrize("layout", ["sparsecode", "peft"])
def test_save_names_what_a_file_cannot_hold(tmp_path, layout, words, more):
    with pytest.raises(UserError, match=words):
        save_adapter(adapted("lora"), tmp_path / "a", layout=layout, **more)
    assert not list(tmp_path.iterdir())


class Pipe:
    """Like diffusers' pipelines: no module, and it has a config."""

    config = {"_class_name": "PixArtSigmaPipeline"}


def test_a_pipeline_in_place_of_its_model(tmp_path):
    save_adapter(adapted(), tmp_path / "a")
    calls = attach, detach, adapters, trainable, importance
    calls += lambda pipe: load_adapter(pipe, tmp_path / "a"), lambda pipe: save_adapter(pipe, tmp_path / "b")
    calls += lambda pipe: keep_atoms(pipe, 1), lambda pipe: set_density(pipe, 0.5), lambda pipe: set_scale(pipe, 1)
    for call in calls:
        with pytest.raises(UserError, match="Pipe is not an nn.Module; give the model itself, like pipe.transformer"):
            call(Pipe())


def test_a_failed_save_keeps_the_old_file_and_leaves_no_other(tmp_path, monkeypatch):
    path = tmp_path / "a.safetensors"
    model = adapted()
    save_adapter(model, path)
    old = path.read_bytes()

    def full_disk(target, tensors, metadata):
        target.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(sys.modules["sparsecode.files"], "write_tensors", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, path)
    assert path.read_bytes() == old and list(tmp_path.iterdir()) == [path]
