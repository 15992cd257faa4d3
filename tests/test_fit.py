"""The optimizers of the tiny model's training."""

import pytest
import torch

from dit.tiny.fit import Muon


@pytest.mark.parametrize("shape", [(16, 16), (32, 8), (8, 32)])
def test_muon_is_torchs_in_float32(shape, monkeypatch):
    monkeypatch.setattr(torch.Tensor, "bfloat16", lambda tensor: tensor.clone())  # torch.optim.Muon would round to it
    torch.manual_seed(0)
    ours = torch.nn.Parameter(torch.randn(shape))
    theirs = torch.nn.Parameter(ours.detach().clone())
    optimizers = [Muon([ours], lr=0.1),
                  torch.optim.Muon([theirs], lr=0.1, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")]  # fmt: skip
    for _ in range(4):
        gradient = torch.randn(shape)
        for parameter, optimizer in zip((ours, theirs), optimizers):
            parameter.grad = gradient.clone()
            optimizer.step()
    torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)
