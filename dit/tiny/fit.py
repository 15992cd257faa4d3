"""One training loop for every stage of the tiny model: resumable, and shared by the processes of torchrun."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dit import parallel
from sparsecode.common import replacing


def fit(name, module, loss, *, steps, lr, folder, muon=(), ema=0.999, decay=0.3, every=500):
    """Minimise `loss(step) -> scalar` and return `module` with the averaged (EMA) weights.

    AdamW trains all parameters but the matrices in `muon`, which torch.optim.Muon trains (Jordan et al., 2024) at twice
    the learning rate. The rate warms up over 100 steps, stays, and falls to zero over the last `decay` of the steps.
    The batch of a step depends on the step alone, so a checkpoint (every `every` steps, in `folder`) needs no random
    state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.pt"
    others = [p for p in module.parameters() if p.requires_grad and not any(p is matrix for matrix in muon)]
    groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]
    if muon:
        optimizers.append(torch.optim.Muon(muon, lr=2 * lr, adjust_lr_fn="match_rms_adamw", weight_decay=0.0))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak"] = group["lr"]
    average = {k: v.detach().clone() for k, v in module.state_dict().items()}
    start = 0
    if file.exists():
        state = torch.load(file, map_location="cpu", weights_only=True)
        module.load_state_dict(state["module"])
        for optimizer, moments in zip(optimizers, state["optimizers"]):
            optimizer.load_state_dict(moments)
        average = {k: state["average"][k].to(v) for k, v in average.items()}
        start = state["step"]
    bar = tqdm(range(start, steps), desc=name, initial=start, total=steps, disable=parallel.bar_off(), mininterval=1)
    log = open(folder / f"{name}.csv", "a", buffering=1) if parallel.rank() == 0 else None
    for step in bar:
        factor = min(1.0, (step + 1) / 100, (steps - step) / (decay * steps))
        for group in (group for optimizer in optimizers for group in optimizer.param_groups):
            group["lr"] = group["peak"] * factor
        value = loss(step)
        module.zero_grad(set_to_none=True)
        value.backward()
        parallel.average_gradients(module.parameters())
        nn.utils.clip_grad_norm_(module.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
        rate = min(ema, (step + 1) / (step + 10))
        with torch.no_grad():
            torch._foreach_lerp_(list(average.values()), list(module.state_dict().values()), 1 - rate)
        if parallel.rank() == 0 and step % 50 == 0:
            bar.set_postfix(loss=f"{value.item():.4f}")
            log.write(f"{step},{value.item():.6f}\n")
        if parallel.rank() == 0 and ((step + 1) % every == 0 or step + 1 == steps):
            moments = [optimizer.state_dict() for optimizer in optimizers]
            state = {"module": module.state_dict(), "optimizers": moments, "average": average, "step": step + 1}
            with replacing(file) as temporary:
                torch.save(state, temporary)
    module.load_state_dict(average)
    return module.eval()


def rng_of(stage, seed, step):
    """A generator for one step of one stage, another one in each process."""
    return np.random.default_rng([sum(map(ord, stage)), seed, step, parallel.rank()])
