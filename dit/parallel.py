"""Training in several processes: `torchrun --nproc-per-node N -m dit.…`. Without torchrun there is one process."""

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
        patience = timedelta(days=7)  # after `alone`, a process may wait long for the last job of another
        dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=patience)


def stop():
    if dist.is_initialized():
        dist.destroy_process_group()


_alone = False


@contextmanager
def alone():
    """Within this context, each process works alone on its own model: rank 0 of 1, and no progress bars."""
    global _alone
    _alone = True
    try:
        yield
    finally:
        _alone = False


def first_to_say(message):
    """True in the first process that asks with this message, so that an error common to all is printed once."""
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return True
    try:  # the store that torchrun keeps for its processes
        host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
        store = dist.TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10))
        return store.add(f"said {zlib.crc32(message.encode())}", 1) == 1
    except (RuntimeError, KeyError):  # the store is gone: better to print twice than never
        return True


@contextmanager
def together():
    """For a collective operation: UserError if another process has ended (that process prints why)."""
    try:
        yield
    except torch.OutOfMemoryError:
        raise
    except RuntimeError:
        raise UserError("another process of this run has ended, so this one ends too") from None


def rank():
    """The number of this process; process 0 writes and prints. Known before `start`."""
    return 0 if _alone else int(os.environ.get("RANK", 0))


def world_size():
    return 1 if _alone else int(os.environ.get("WORLD_SIZE", 1))


def wait():
    """Wait until all processes have called this."""
    if world_size() > 1:
        with together():
            dist.barrier()


def bar_off():
    """For tqdm's `disable`: no bar outside a terminal, nor in any process but the first."""
    return True if _alone or rank() else None


def average_gradients(parameters):
    """Replace every gradient by its mean over the processes, in one all-reduce."""
    average([p.grad for p in parameters if p.grad is not None])


def average(tensors):
    """Replace every tensor by its mean over the processes, in one all-reduce."""
    if world_size() == 1:
        return
    flat = torch.cat([tensor.flatten() for tensor in tensors])
    with together():
        dist.all_reduce(flat)
    for tensor, mean in zip(tensors, (flat / world_size()).split([tensor.numel() for tensor in tensors])):
        tensor.copy_(mean.view_as(tensor))
