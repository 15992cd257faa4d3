"""Several processes that train one model: `torchrun --nproc-per-node N -m dit.…`; one process without torchrun."""

import os
import zlib
from contextlib import contextmanager
from datetime import timedelta

import torch
import torch.distributed as dist

from sparsecode.common import UserError


def start():
    """Join the group that torchrun made, if there is one: gloo between CPUs, nccl between GPUs."""
    if "RANK" in os.environ and not dist.is_initialized():
        cuda = torch.cuda.is_available()
        if cuda:
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        patience = timedelta(days=7)  # where processes work alone, one may wait for another's last job
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone():
    """Within it every process works for itself, on a model of its own: rank 0 of 1, and without bars."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def first_to_say(message):
    """Whether no other process has said this yet: an error that all meet is to be printed once."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:  # the store that torchrun keeps for its processes
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"said {zlib.crc32(message.encode())}", 1) == 1
    except (RuntimeError, KeyError):  # it is gone: better twice than never
        return True


@contextmanager
def together():
    """What all processes do at once; UserError where another one has ended. That one says why."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        raise UserError("another process of this run has ended, so this one ends too") from None


def rank():
    """The number of this process, 0 for the one that writes and prints; known before `start`."""
    return 0 if _alone else int(os.environ.get("RANK", 0))


def world_size():
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def wait():
    """Until all processes are here."""
    if world_size() > 1:
        with together():
            dist.barrier()


def bar_off():
    """For tqdm's `disable`: quiet when not on a terminal, and in all processes but the first."""
    return True if _alone or rank() else None


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one message."""
    average([p.grad for p in parameters if p.grad is not None])


def average(tensors):
    """Replace every tensor by its mean over the processes, in one message."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with together():
        dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / world_size()).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))
