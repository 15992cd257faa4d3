"""Several processes that train one model: `torchrun --nproc-per-node N -m dit.…`; one process without torchrun."""

import os

import torch
import torch.distributed as dist


def start():
    """Join the group that torchrun made, if there is one: gloo between CPUs, nccl between GPUs."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        dist.init_process_group("nccl" if cuda else "gloo")


def rank():
    return dist.get_rank() if dist.is_initialized() else 0


def world_size():
    return dist.get_world_size() if dist.is_initialized() else 1


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one message."""
    if world_size() == 1:
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    for gradient, mean in zip(gradients, (flat / world_size()).split([g.numel() for g in gradients])):
        gradient.copy_(mean.view_as(gradient))
