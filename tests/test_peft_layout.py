"""Adapters that go to peft and come back: on diffusers' PixArtTransformer2DModel, with random weights.

Tolerance in float32: ‖ours − theirs‖ / ‖theirs‖ ≤ 2e-5.
"""

import json
import os
import sys
from contextlib import nullcontext

import pytest
import torch
from safetensors.torch import load_file, save_file
from small_model import SmallModel, shake
from test_transformer import diffusers_transformer, inputs, relative, run_theirs

from dit.checkpoint import load_transformer
from sparsecode import UserError, adapters, attach, load_adapter, read_header, save_adapter, set_scale, trainable
from sparsecode.peft_layout import CONFIG, WEIGHTS

peft, diffusers = pytest.importorskip("peft"), pytest.importorskip("diffusers")
NOISE = 0.1  # in place of training. At 0.3 logits reach 10,000, by which diffusers' mask falls short of −∞.
OPTIONS = {"lora": dict(r=4, alpha=6), "dora": dict(r=4, alpha=6), "oft": dict(blocks=4)}
TARGETS = {
    "a regular expression": r".*attn1\.(to_[qkv]|to_out\.0)",
    "endings": ["attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0"],
    "both attentions": ["to_q", "to_k", "to_v", "to_out.0"],
    "queries and values": ["to_q", "to_v"],
}
# target_modules of PixArt's authors (train_scripts/train_pixart_lora_hf.py in their repository PixArt-alpha).
AUTHORS = ["to_k", "to_q", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2", "proj", "linear",
           "linear_1", "linear_2"]  # fmt: skip
PATTERNS = {  # the first key that fits counts
    "none": {},
    "rslora": dict(use_rslora=True),
    "ranks": dict(rank_pattern={"to_q": 2, r"^proj_out": 5, r".*\.1\.attn2\.to_[kv]": 3, r"attn2\.to_(k|v)": 7}),
    "alphas": dict(alpha_pattern={"attn1.*": 12, "to_q": 1, "proj": 0.5, r"transformer_blocks\.\d+\.ff\.net\.2": 9}),
    "all": dict(use_rslora=True, rank_pattern={"linear_1": 1, "proj": 9}, alpha_pattern={"proj": 3, "to_out.0": 2.5}),
}
methods = pytest.mark.parametrize("method", OPTIONS)
loras = pytest.mark.parametrize("method", ["lora", "dora"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """diffusers' random weights on disk."""
    path = tmp_path_factory.mktemp("transformer")
    diffusers_transformer().save_pretrained(path)
    return path


def config_of_peft(method, target_modules=TARGETS["a regular expression"], **changes):
    if method == "oft":
        settings = dict(r=4, oft_block_size=0, use_cayley_neumann=False)
        return peft.OFTConfig(**{"target_modules": target_modules, **settings, **changes})
    settings = dict(r=4, lora_alpha=6, use_dora=method == "dora")
    return peft.LoraConfig(**{"target_modules": target_modules, **settings, **changes})


def trained_by_peft(path, *args, **kwargs):
    """diffusers' model with an adapter of peft's whose values say something, written by peft to `path`."""
    model = peft.get_peft_model(diffusers_transformer(), config_of_peft(*args, **kwargs)).eval()
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name or "oft_" in name:
            parameter.data += NOISE * torch.randn_like(parameter)
    model.save_pretrained(path)
    return model


def trained_here(folder, method):
    model = load_transformer(folder)
    torch.manual_seed(3)
    shake(attach(model, method, **OPTIONS[method]))
    return model


# ---- there and back ---------------------------------------------------------------------------------------------


@methods
def test_peft_loads_what_is_saved_here(folder, method, tmp_path):
    model, x = trained_here(folder, method), inputs()
    save_adapter(model, tmp_path / "a", layout="peft")
    assert sorted(os.listdir(tmp_path / "a")) == [CONFIG, WEIGHTS]
    theirs = peft.PeftModel.from_pretrained(diffusers_transformer(), tmp_path / "a").eval()
    expected = run_theirs(theirs, *x)
    assert relative(model(*x), expected) < 2e-5
    assert relative(expected, run_theirs(diffusers_transformer(), *x)) > 0.05
    saved = sum(tensor.numel() for tensor in load_file(tmp_path / "a" / WEIGHTS).values())
    theirs = peft.get_peft_model(diffusers_transformer(), config_of_peft(method))
    assert saved == theirs.get_nb_trainable_parameters()[0]


@methods
@pytest.mark.parametrize("target", TARGETS)
def test_what_peft_saves_is_loaded_here(folder, method, target, tmp_path):
    x = inputs()
    expected = run_theirs(trained_by_peft(tmp_path / "theirs", method, TARGETS[target]), *x)
    model = load_transformer(folder)
    header = load_adapter(model, tmp_path / "theirs")
    assert relative(model(*x), expected) < 2e-5
    assert header["method"] == method and header["options"].items() >= OPTIONS[method].items()
    assert header["prompt"] is None and header["notes"] == {} and header["base"] is None
    assert {id(p) for p in model.parameters() if p.requires_grad} == {id(p) for p in trainable(model)}
    save_adapter(model, tmp_path / "ours", layout="peft")
    theirs, ours = (load_file(tmp_path / name / WEIGHTS) for name in ("theirs", "ours"))
    assert theirs.keys() == ours.keys() and all(torch.equal(ours[key], theirs[key]) for key in theirs)


@methods
def test_a_fresh_adapter_of_peft_is_silent_here(folder, method, tmp_path):
    peft.get_peft_model(diffusers_transformer(), config_of_peft(method)).save_pretrained(tmp_path)
    model, x = load_transformer(folder), inputs()
    before = model(*x)
    load_adapter(model, tmp_path)
    if method == "dora":  # its m is a norm that peft rounded in another order
        assert relative(model(*x), before) < 1e-6
    else:
        assert torch.equal(model(*x), before)


@methods
def test_the_folder_keeps_what_the_file_keeps(folder, method, tmp_path):
    model, x = trained_here(folder, method), inputs()
    save_adapter(model, tmp_path / "a", prompt="a photo of a ☂", layout="peft", seed=3)
    save_adapter(model, tmp_path / "a.safetensors", prompt="a photo of a ☂", seed=3)
    loaded = load_transformer(folder)
    header, of_file = load_adapter(loaded, tmp_path / "a"), read_header(tmp_path / "a.safetensors")
    assert header == read_header(tmp_path / "a")
    for key in ("method", "base", "notes", "prompt"):
        assert header[key] == of_file[key]
    assert relative(loaded(*x), model(*x)) < (1e-6 if method == "oft" else 1e-12)  # P is stored as Q
    save_adapter(loaded, tmp_path / "again.safetensors")
    again = load_transformer(folder)
    load_adapter(again, tmp_path / "again.safetensors")
    assert torch.equal(again(*x), loaded(*x)) and list(adapters(again)) == list(adapters(model))


@pytest.mark.parametrize("changes", [dict(r=0, oft_block_size=4), dict(r=0, oft_block_size=5), dict(r=3)])
def test_blocks_of_oft_are_told_by_the_tensors(folder, changes, tmp_path):
    """peft makes 4 blocks of 4 of them all, with a warning where the number does not divide 16."""
    with pytest.warns(UserWarning, match="Adjusted") if changes.get("oft_block_size") != 4 else nullcontext():
        theirs = trained_by_peft(tmp_path, "oft", **changes)
    model, x = load_transformer(folder), inputs()
    blocks = load_adapter(model, tmp_path)["options"]["blocks"]
    assert relative(model(*x), run_theirs(theirs, *x)) < 2e-5
    assert {adapter.blocks for adapter in adapters(model).values()} == {blocks}


def test_a_short_config_means_what_it_means_to_peft(folder, tmp_path):
    trained_by_peft(tmp_path, "lora", r=8)
    (tmp_path / CONFIG).write_text(json.dumps({"peft_type": "LORA", "target_modules": TARGETS["endings"]}))
    theirs = peft.PeftModel.from_pretrained(diffusers_transformer(), tmp_path).eval()
    model, x = load_transformer(folder), inputs()
    assert load_adapter(model, tmp_path)["options"].items() >= {"r": 8, "alpha": 8}.items()
    assert relative(model(*x), run_theirs(theirs, *x)) < 2e-5


def test_bfloat16_of_peft_is_read_into_float32(folder, tmp_path):
    trained_by_peft(tmp_path, "lora")
    tensors = {key: tensor.bfloat16() for key, tensor in load_file(tmp_path / WEIGHTS).items()}
    save_file(tensors, tmp_path / WEIGHTS)
    load_adapter(model := load_transformer(folder), tmp_path)
    A = adapters(model)["transformer_blocks.1.attn1.to_out"].A
    expected = tensors["base_model.model.transformer_blocks.1.attn1.to_out.0.lora_A.weight"]
    assert A.dtype == torch.float32 and torch.equal(A, expected.float())


# ---- every layer, and ranks and alphas by pattern ---------------------------------------------------------------


def both_models(folder):
    """(a model, how it is called) for this library's and diffusers' own."""
    yield (ours := load_transformer(folder)), ours
    theirs = diffusers_transformer()
    yield theirs, lambda *x: run_theirs(theirs, *x)


@loras
@pytest.mark.parametrize("patterns", PATTERNS)
def test_a_folder_as_the_authors_of_pixart_train_it(folder, method, patterns, tmp_path):
    """On both models; scaled by 0 and -1, where peft adds no DoRA; and back: peft loads what is saved here."""
    theirs, x = trained_by_peft(tmp_path / "theirs", method, AUTHORS, **PATTERNS[patterns]), inputs()
    base, expected = run_theirs(diffusers_transformer(), *x), run_theirs(theirs, *x)
    assert relative(expected, base) > 0.05
    for i, (model, run) in enumerate(both_models(folder)):
        load_adapter(model, tmp_path / "theirs")
        assert len(adapters(model)) == 2 * 10 + 2 + 1 + 2 + 1 + 1  # blocks, timestep, adaLN, caption, patches, output
        assert relative(run(*x), expected) < 1e-5
        save_adapter(model, tmp_path / f"{i}", layout="peft")
        again = peft.PeftModel.from_pretrained(diffusers_transformer(), tmp_path / f"{i}").eval()
        assert relative(run_theirs(again, *x), expected) < 1e-5
        save_adapter(model, tmp_path / "a.safetensors")
        for other, run_other in both_models(folder):
            load_adapter(other, tmp_path / "a.safetensors")
            assert relative(run_other(*x), expected) < 1e-5
        set_scale(model, 0)
        assert relative(run(*x), base) < 1e-5
        if method == "lora":
            set_scale(model, -1)
            with peft.helpers.rescale_adapter_scale(theirs, -1):
                assert relative(run(*x), run_theirs(theirs, *x)) < 1e-5


def test_ranks_and_alphas_are_those_of_each_layer(folder, tmp_path):
    theirs = trained_by_peft(tmp_path, "lora", AUTHORS, **PATTERNS["all"])
    load_adapter(model := diffusers_transformer(), tmp_path)
    for name, adapter in adapters(model).items():
        layer = theirs.base_model.model.get_submodule(name)
        assert adapter.r == layer.r["default"] and adapter.alpha / adapter.r == pytest.approx(layer.scaling["default"])


# ---- one file, as diffusers' trainers write it ------------------------------------------------------------------


class WithPeft(diffusers.PixArtTransformer2DModel, diffusers.loaders.PeftAdapterMixin):
    """What diffusers gives the transformers of its other pipelines."""


def with_peft():
    model = WithPeft.from_config(diffusers_transformer().config)
    model.load_state_dict(diffusers_transformer().state_dict())
    return model.eval()


def trained_in_diffusers(target_modules=AUTHORS, method="lora", **changes):
    model = with_peft()
    model.add_adapter(config_of_peft(method, target_modules, **changes))
    torch.manual_seed(2)
    for name, parameter in model.named_parameters():
        if "lora_" in name:
            parameter.data += NOISE * torch.randn_like(parameter)
    return model


def save_for_pipeline(model, folder, with_config):
    config = model.peft_config["default"].to_dict() if with_config else None
    tensors = peft.get_peft_model_state_dict(model)
    diffusers.FluxPipeline.save_lora_weights(folder, tensors, transformer_lora_adapter_metadata=config)
    return folder / "pytorch_lora_weights.safetensors"


@loras
@pytest.mark.parametrize("patterns", PATTERNS)
@pytest.mark.parametrize("of_pipeline", [True, False])
def test_a_file_of_diffusers_with_its_config(folder, method, patterns, of_pipeline, tmp_path):
    theirs, x = trained_in_diffusers(method=method, **PATTERNS[patterns]), inputs()
    if of_pipeline:
        file = save_for_pipeline(theirs, tmp_path, with_config=True)
    else:
        theirs.save_lora_adapter(tmp_path)
        file = tmp_path / "pytorch_lora_weights.safetensors"
    expected = run_theirs(theirs, *x)
    for model, run in both_models(folder):
        assert load_adapter(model, file)["method"] == method
        assert relative(run(*x), expected) < 1e-5


@loras
def test_a_file_of_diffusers_without_config_has_alpha_r(folder, method, tmp_path):
    """As diffusers loads it, whatever it was trained with; ranks come from the tensors."""
    file = save_for_pipeline(trained_in_diffusers(method=method, **PATTERNS["ranks"]), tmp_path, with_config=False)
    theirs, x = with_peft(), inputs()
    theirs.load_lora_adapter(load_file(file))
    for model, run in both_models(folder):
        assert load_adapter(model, file)["format"] == "diffusers"
        assert {adapter.alpha / adapter.r for adapter in adapters(model).values()} == {1}
        assert relative(run(*x), run_theirs(theirs, *x)) < 1e-5
    save_adapter(model, tmp_path / "peft", layout="peft")
    again = peft.PeftModel.from_pretrained(diffusers_transformer(), tmp_path / "peft").eval()
    assert relative(run_theirs(again, *x), run_theirs(theirs, *x)) < 1e-5


def with_alphas(file, alphas):
    """alphas(i) for the i-th layer; those that are None are left out."""
    tensors = load_file(file)
    layers = sorted(key.removesuffix(".lora_A.weight") for key in tensors if key.endswith("lora_A.weight"))
    given = {f"{layer}.alpha": alphas(i) for i, layer in enumerate(layers)}
    save_file(tensors | {key: torch.tensor(value) for key, value in given.items() if value is not None}, file)
    return given


def test_a_file_of_diffusers_with_alphas(folder, tmp_path):
    file = save_for_pipeline(trained_in_diffusers(["to_q", "proj"]), tmp_path, with_config=False)
    tensors, x = load_file(file), inputs()
    alphas = with_alphas(file, lambda i: 0.5 + i)
    theirs = with_peft()
    theirs.load_lora_adapter(tensors, network_alphas=alphas)
    expected = diffusers_transformer()  # diffusers may read the names of alphas in another way; the formula does not
    with torch.no_grad():
        for key, alpha in alphas.items():
            name = key.removeprefix("transformer.").removesuffix(".alpha")
            A, B = (tensors[key.replace("alpha", f"lora_{each}.weight")] for each in "AB")
            weight = expected.get_submodule(name).weight
            weight += alpha / 4 * (B.flatten(1) @ A.flatten(1)).view_as(weight)
    for model, run in both_models(folder):
        load_adapter(model, file)
        assert relative(run(*x), run_theirs(expected, *x)) < 1e-5


@pytest.mark.parametrize(
    "alphas, message",
    [
        (
            lambda i: None if i == 3 else 4.0,
            r"\.alpha of every layer .* or of none",
        ),
        (lambda i: [4.0, 4.0], r"an \.alpha of .*attn1.to_q that is not one number"),
        (lambda i: torch.nan, "alpha=nan is not a number"),
        (lambda i: 4, "alpha in I64; expected floating"),
    ],
)
def test_a_file_of_diffusers_with_strange_alphas_is_refused(alphas, message, folder, tmp_path):
    file = save_for_pipeline(trained_in_diffusers(["to_q"]), tmp_path, with_config=False)
    with_alphas(file, alphas)
    assert_refused(message, file, load_transformer(folder))


def test_a_file_whose_alpha_is_elsewhere_is_refused(folder, tmp_path):
    """peft's tensors without its config; the script of PixArt's authors writes them under another name too."""
    trained_by_peft(tmp_path / "theirs", "lora")
    assert_refused("does not say its alpha; name the folder", tmp_path / "theirs" / WEIGHTS, load_transformer(folder))
    tensors = {f"unet.{key}": value for key, value in load_file(tmp_path / "theirs" / WEIGHTS).items()}
    save_file(tensors, tmp_path / "a.safetensors")
    assert_refused("has unet.base_model.*, which is for no layer", tmp_path / "a.safetensors", load_transformer(folder))
    file = save_for_pipeline(trained_in_diffusers(["to_q"]), tmp_path, with_config=True)
    save_file({**load_file(file), "text_encoder.q.lora_A.weight": torch.zeros(4, 16)}, file)
    assert_refused("has text_encoder.q.lora_A.weight .*, which is for no layer", file, load_transformer(folder))


# ---- mistakes ---------------------------------------------------------------------------------------------------


def edit(**settings):
    def change(folder):
        config = json.loads((folder / CONFIG).read_text())
        (folder / CONFIG).write_text(json.dumps({**config, **settings}))

    return change


def header(text):
    return lambda folder: save_file(load_file(folder / WEIGHTS), folder / WEIGHTS, metadata={"sparsecode": text})


def change_tensors(change):
    def rewrite(folder):
        tensors = load_file(folder / WEIGHTS)
        change(tensors)
        save_file(tensors, folder / WEIGHTS)

    return rewrite


KEY = "base_model.model.transformer_blocks.1.attn1.to_q.lora_B.weight"
BROKEN = {
    "holds no adapter_config.json; name an adapter file": lambda folder: (folder / CONFIG).unlink(),
    "is not JSON": lambda folder: (folder / CONFIG).write_text("{"),
    r"holds \[\]; expected an object": lambda folder: (folder / CONFIG).write_text("[]"),
    "there is no adapter file .*adapter_model": lambda folder: (folder / WEIGHTS).unlink(),
    "cannot be read as safetensors": lambda folder: (folder / WEIGHTS).write_bytes(b"half"),
    "is for VERA; only LORA": edit(peft_type="VERA"),
    'bias is "lora_only"; only adapters without it': edit(bias="lora_only"),
    r"to_q.lora_A.weight of shape \[4, 16\] where \[2, 16\]": edit(rank_pattern={"to_q": 2}),
    "rank_pattern is .*; expected an object, each value a whole number": edit(rank_pattern={"to_q": "2"}),
    "alpha_pattern is .*; expected an object, each value a number": edit(alpha_pattern={"to_q": True}),
    r"alpha_pattern has 'to_\[', no regular expression": edit(alpha_pattern={"to_[": 2}),
    r"alpha_pattern has '\(a\*\)\*', which may take too long": edit(alpha_pattern={"(a*)*": 2}),
    r"rank_pattern has '.*X', which may take too long": edit(rank_pattern={".*.*.*.*X": 2}),
    "use_rslora is 1; expected true or false": edit(use_rslora=1),
    r'modules_to_save is \["proj_out"\]; only': edit(modules_to_save=["proj_out"]),
    'exclude_modules is "to_k"; only': edit(exclude_modules="to_k"),
    'init_lora_weights is "pissa"; only': edit(init_lora_weights="pissa"),
    "layers_to_transform is 0; only": edit(layers_to_transform=0),
    "a_setting_of_the_future is 1; only": edit(a_setting_of_the_future=1),
    "r is '4'; expected a whole number": edit(r="4"),
    "lora_alpha is True; expected a number": edit(lora_alpha=True),
    "target_modules is None; expected text, or a list": edit(target_modules=None),
    r"target_modules is \[1\]; expected text, or a list": edit(target_modules=[1]),
    "which is for no layer of": edit(target_modules=["tn1.to_q"]),
    "lacks .*to_q.lora_A.weight and 3 more": edit(target_modules=[*TARGETS["endings"], "attn2.to_q"]),
    "has .*lora_A.weight and 3 more, which": edit(target_modules=["attn1.to_q", "attn1.to_k", "attn1.to_out.0"]),
    "config.json is not JSON .*NaN": edit(lora_alpha=float("nan")),
    "peft_type is .'LORA'.; expected text": edit(peft_type=["LORA"]),
    "use_dora is 1; expected true or false": edit(use_dora=1),
    r"of shape \[4, 16\] where \[40000000, 16\] belongs": edit(r=40_000_000),
    "header is not JSON": header("[" * 50_000),
    "header holds 5; expected an object": header("5"),
    "header: notes is .*; expected an object": header('{"notes": [1]}'),
    "header: prompt is 5; expected text": header('{"prompt": 5}'),
    "has nothing, which is for no layer": change_tensors(lambda tensors: tensors.clear()),
    f"NaN or infinite values in {KEY}": change_tensors(lambda tensors: tensors[KEY].fill_(torch.inf)),
    f"has {KEY} in I64; expected": change_tensors(lambda tensors: tensors.update({KEY: tensors[KEY].long()})),
    "r=0 is not a rank": edit(r=0),
    f"lacks {KEY}$": change_tensors(lambda tensors: tensors.pop(KEY)),
    r"lacks .*ff.net.2.lora_B.weight$": change_tensors(
        lambda tensors: tensors.update({KEY.replace("attn1.to_q.lora_B", "ff.net.2.lora_A"): torch.zeros(4, 64)})
    ),
    r"has .*ff.lora_A.weight, which": change_tensors(
        lambda tensors: tensors.update({KEY.replace("attn1.to_q.lora_B", "ff.lora_A"): torch.zeros(4, 16)})
    ),
    rf"has {KEY} of shape \[16, 3\] where \[16, 4\]": change_tensors(
        lambda tensors: tensors.update({KEY: torch.zeros(16, 3)})
    ),
}


def assert_refused(message, path, model):
    modules, grads = list(model.modules()), [p.requires_grad for p in model.parameters()]
    with pytest.raises(UserError, match=message) as error:
        load_adapter(model, path)
    assert "\n" not in str(error.value)
    assert list(model.modules()) == modules and [p.requires_grad for p in model.parameters()] == grads


@pytest.fixture(scope="module")
def written_by_peft(tmp_path_factory):
    path = tmp_path_factory.mktemp("peft")
    trained_by_peft(path, "lora")
    return {file.name: file.read_bytes() for file in path.iterdir()}


@pytest.mark.parametrize("message", BROKEN)
def test_load_refuses_and_leaves_the_model_alone(message, folder, written_by_peft, tmp_path):
    for name, content in written_by_peft.items():
        (tmp_path / name).write_bytes(content)
    BROKEN[message](tmp_path)
    assert_refused(message, tmp_path, load_transformer(folder))


@pytest.mark.parametrize(
    "changes, message",
    [
        (dict(use_cayley_neumann=True), "use_cayley_neumann is true; only"),
        (dict(coft=True), "coft is true; only"),
        (dict(block_share=True), "block_share is true; only"),
    ],
)
def test_load_refuses_other_rotations(changes, message, folder, tmp_path):
    trained_by_peft(tmp_path, "oft", **changes)
    assert_refused(message, tmp_path, load_transformer(folder))
    edit(**{name: False for name in changes})(tmp_path)
    if "block_share" in changes:  # one block where four are
        assert_refused("of shape", tmp_path, load_transformer(folder))


def test_an_old_oft_without_the_setting_is_refused(folder, tmp_path):
    """peft takes the approximation where a config does not say."""
    trained_by_peft(tmp_path, "oft")
    config = json.loads((tmp_path / CONFIG).read_text())
    del config["use_cayley_neumann"]
    (tmp_path / CONFIG).write_text(json.dumps(config))
    assert_refused("use_cayley_neumann is true", tmp_path, load_transformer(folder))


def test_another_base_is_refused(folder, tmp_path):
    """By its config, if the folder was written here; by its layers and widths, if by peft."""
    save_adapter(trained_here(folder, "lora"), tmp_path / "ours", layout="peft")
    trained_by_peft(tmp_path / "theirs", "lora", TARGETS["endings"])
    for name, change in dict(deeper=dict(num_layers=3), wider=dict(num_attention_heads=3)).items():
        diffusers_transformer(**change).save_pretrained(tmp_path / name)
        model = load_transformer(tmp_path / name)
        assert_refused("another base model: .* there and 3 here", tmp_path / "ours", model)
        assert_refused("lacks" if name == "deeper" else "of shape", tmp_path / "theirs", model)
    diffusers_transformer(interpolation_scale=2).save_pretrained(tmp_path / "other")
    assert_refused("interpolation_scale", tmp_path / "ours", load_transformer(tmp_path / "other"))


def test_single_projections_in_a_file_of_ours(folder, tmp_path):
    trained_by_peft(tmp_path / "a", "lora", ["to_q", "to_v"])
    load_adapter(model := load_transformer(folder), tmp_path / "a")
    save_adapter(model, tmp_path / "a.safetensors")
    load_adapter(other := load_transformer(folder), tmp_path / "a.safetensors")
    x = inputs()
    assert torch.equal(other(*x), model(*x)) and list(adapters(other)) == list(adapters(model))


@pytest.mark.parametrize("pattern", ["(.*)*(.*)*(.*)*X", "("])
def test_a_pattern_in_a_folder_is_never_run(pattern, folder, written_by_peft, tmp_path):
    """The first takes longer than a life; the names of the tensors say what is adapted."""
    for name, content in written_by_peft.items():
        (tmp_path / name).write_bytes(content)
    load_adapter(expected := load_transformer(folder), tmp_path)
    edit(target_modules=pattern)(tmp_path)
    load_adapter(model := load_transformer(folder), tmp_path)
    assert list(adapters(model)) == list(adapters(expected))


@methods
def test_the_same_adapter_gives_the_same_bytes(folder, method, tmp_path):
    written = []
    for i in range(8):
        save_adapter(trained_here(folder, method), tmp_path / f"{i}", layout="peft", prompt="a ☂", seed=3)
        written.append([file.read_bytes() for file in sorted((tmp_path / f"{i}").iterdir())])
    assert all(files == written[0] for files in written)


def test_save_refuses(tmp_path):
    attach(model := SmallModel(), "sparse", atoms=16)
    with pytest.raises(UserError, match="peft has no sparse adapter"):
        save_adapter(model, tmp_path / "a", layout="peft")
    with pytest.raises(UserError, match="layout='diffusers' is unknown; choose sparsecode or peft"):
        save_adapter(model, tmp_path / "a", layout="diffusers")
    assert not list(tmp_path.iterdir())


def test_a_failed_save_keeps_both_old_files(folder, tmp_path, monkeypatch):
    model = trained_here(folder, "lora")
    save_adapter(model, tmp_path, layout="peft")
    old = {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    def full_disk(target, tensors, metadata):
        target.write_bytes(b"half of it")
        raise OSError("no space left")

    monkeypatch.setattr(sys.modules["sparsecode.peft_layout"], "write_tensors", full_disk)
    shake(adapters(model).values())
    with pytest.raises(OSError, match="no space left"):
        save_adapter(model, tmp_path, layout="peft")
    assert {file.name: file.read_bytes() for file in tmp_path.iterdir()} == old
