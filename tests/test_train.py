"""The training loop as a library: a config for a model, and the same result when it is compiled."""

import functools

import pytest
import torch

from dit.data import encode
from dit.pipeline import Pipeline
from dit.train import TrainConfig, train
from sparsecode import detach
from sparsecode.common import UserError


@pytest.fixture
def pipe(tiny):
    return Pipeline.from_folder(tiny, device="cpu")


def test_a_config_is_what_is_given_then_the_models_then_the_papers(pipe):
    config = TrainConfig.of(pipe, atoms=4, lr=None, seed=3)
    assert config.options == {"atoms": 4, "density": 0.25} and config.seed == 3  # density, lr, epochs: defaults.json
    assert (config.lr, config.epochs, config.resolution, config.lr_schedule) == (0.01, 1, 16, "constant")
    pipe.defaults = {}
    config = TrainConfig.of(pipe)
    assert (config.lr, config.epochs, config.options) == (1e-4, 15, {"atoms": 256, "density": 0.02})
    assert TrainConfig.of(pipe, method="lora", r=4, alpha=4).options == {"r": 4, "alpha": 4}
    with pytest.raises(UserError, match="resolution 18 is not a multiple of 4"):
        TrainConfig.of(pipe, resolution=18)


@pytest.mark.parametrize("name, value", [("epochs", "many"), ("lr", -1), ("batch_size", 0), ("lr_schedule", [1])])
def test_what_a_models_defaults_may_say(pipe, name, value):
    pipe.defaults = {"finetune": {name: value}}
    with pytest.raises(UserError, match=f"defaults.json: finetune: {name} is "):
        TrainConfig.of(pipe)


def test_compiled_training_and_sampling_give_the_same(pipe, monkeypatch):
    """With the backend that runs the compiled graphs, but generates no code for them, which takes minutes."""
    compile = functools.partialmethod(torch.nn.Module.compile, backend="aot_eager")
    data = encode(pipe, torch.linspace(-1, 1, 3 * 16 * 16).view(1, 3, 16, 16), ["a robot"])
    results = []
    for compiled in (False, True):
        monkeypatch.setattr(torch.nn.Module, "compile", compile)
        losses = train(pipe, data, TrainConfig.of(pipe, compile=compiled, repeats=3))
        assert (pipe.transformer._compiled_call_impl is not None) == compiled
        detach(pipe.transformer)  # trained weights carry Adam's enlarged rounding
        text, mask = pipe.encode_prompt(["a star"])
        *_, (_, latents, _) = pipe.sample(pipe.noise([0]), text, mask, steps=2)
        results.append([torch.tensor(losses), latents])
    for plain, compiled in zip(*results):
        torch.testing.assert_close(compiled, plain, atol=1e-5, rtol=1e-5)
