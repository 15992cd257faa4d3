"""One training loop for every stage of the tiny model: resumable, and shared by the processes of torchrun."""

import numpy as np
import torch
from torch import nn
from tqdm import tqdm

from dit import parallel
from sparsecode.common import replacing


def fit(name, module, loss, *, steps, lr, folder, muon=(), ema=0.999, decay=0.3, every=500):
    """Minimise `loss(step) -> scalar` and return `module` with the averaged (EMA) weights.

    `Muon` trains the matrices in `muon` at twice the learning rate, AdamW the other parameters. The rate warms up over
    100 steps, stays constant, and falls to zero over the last share `decay` of the steps. The batch depends only on the
    step, so a checkpoint (every `every` steps, in `folder`) needs no random state.
    """
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / f"{name}.pt"
    others = [p for p in module.parameters() if p.requires_grad and not any(p is matrix for matrix in muon)]
    groups = [{"params": [p for p in others if p.ndim > 1], "weight_decay": 0.01},
              {"params": [p for p in others if p.ndim <= 1], "weight_decay": 0.0}]  # fmt: skip
    optimizers = [torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.98))]
    if muon:
        optimizers.append(Muon(muon, lr=2 * lr))
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


class Muon(torch.optim.Optimizer):
    """Momentum whose matrices are made orthogonal (Jordan et al., 2024), scaled to the size of AdamW's steps.

    torch.optim.Muon with adjust_lr_fn="match_rms_adamw" does the same in bfloat16, which takes 20 times as long on a
    CPU that has no instructions for it.
    """

    def __init__(self, matrices, lr):
        super().__init__(matrices, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for matrix in group["params"]:  # (a, b)
                momentum = self.state[matrix].setdefault("momentum", torch.zeros_like(matrix))  # (a, b)
                momentum.lerp_(matrix.grad, 0.05)
                step = orthogonal(matrix.grad.lerp(momentum, 0.95))  # (a, b), Nesterov's
                matrix.sub_(step, alpha=0.2 * group["lr"] * max(matrix.shape) ** 0.5)


def orthogonal(matrix):
    """About U Vᵀ for a matrix U S Vᵀ (a, b), by five steps of Newton and Schulz: its singular values come near 1."""
    x = matrix.T if matrix.shape[0] > matrix.shape[1] else matrix  # (short, long)
    x = x / x.norm().clamp(min=1e-7)
    for _ in range(5):
        gram = x @ x.T  # (short, short)
        x = 3.4445 * x + (-4.775 * gram + 2.0315 * gram @ gram) @ x
    return x.T if matrix.shape[0] > matrix.shape[1] else x


def rng_of(stage, seed, step):
    """A NumPy generator for one step of one stage, different in each process."""
    return np.random.default_rng([sum(map(ord, stage)), seed, step, parallel.rank()])
