"""Several processes on one run: start-up under torchrun, gradient averaging, rank 0's voice.

One visible all-reduce of the flattened gradients per update, rather than DDP's wrapper: a gradient penalty needs a
second backward, which that wrapper does not allow.
"""

import datetime
import os
import sys
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm


@dataclass(frozen=True)
class Place:
    """Where this process computes: its device, its rank among `world` processes."""

    device: torch.device
    rank: int = 0
    world: int = 1


def start(config):
    """Join the other processes, if torchrun started us, and return our Place."""
    world = int(os.environ.get("WORLD_SIZE", "1"))
    on_cuda = config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())
    if world == 1:
        name = ("cuda" if on_cuda else "cpu") if config.device == "auto" else config.device
        device = torch.device(name)
        if device.type == "cuda" and device.index is not None:
            torch.cuda.set_device(device)               # CUDA graphs are recorded on the current one
        return Place(device)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    return Place(device, dist.get_rank(), world)


def launched():
    """True in a process that torchrun started, however many there are."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop():
    """Leave the group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def relaunch(script, argv):
    """Replace this process by torchrun with one process per visible GPU (`--parallel true`)."""
    count = torch.cuda.device_count()
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc_per_node={count}"]
    sys.stdout.flush()
    os.execv(sys.executable, [*command, script, *argv])


def broadcast(*modules):
    """Give every process rank 0's parameters and buffers."""
    if dist.is_initialized():
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


@torch.no_grad()
def average_gradients(parameters):
    """Replace each gradient by its mean over the processes: one all-reduce of all of them, flattened."""
    if not dist.is_initialized():
        return
    gradients = [p.grad for p in parameters if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients])
    dist.all_reduce(flat)
    flat.div_(dist.get_world_size())
    for gradient, part in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


@torch.no_grad()
def mean_over_processes(values):
    """The mean of a tensor over the processes, on every one of them; the tensor itself when alone."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values.div_(dist.get_world_size())
    return values


def any_process(flag, device):
    """True on every process if `flag` is true on one of them. Synchronizes."""
    if not dist.is_initialized():
        return flag
    vote = torch.tensor(float(flag), device=device)
    dist.all_reduce(vote)
    return vote.item() > 0


def gather(thing):
    """[thing of rank 0, thing of rank 1, ...] on every process; plain containers of tensors."""
    if not dist.is_initialized():
        return [thing]
    things = [None] * dist.get_world_size()
    dist.all_gather_object(things, thing)
    return things


def barrier():
    """Wait for the others."""
    if dist.is_initialized():
        dist.barrier()


def after_first(first, others):
    """first() on rank 0; on every other process others() once that has ended, however long it takes, or failed."""
    if not dist.is_initialized():
        return first()
    # a group of its own: in the usual one the others give up after ten minutes
    waiting = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    try:
        result = first() if is_first() else None
    finally:
        dist.barrier(waiting)
        dist.destroy_process_group(waiting)
    return result if is_first() else others()


def on_this_machine():
    """How many of the run's processes share this machine, as torchrun says; 1 without it."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first():
    """True in a process that runs alone or has rank 0: the one that prints and writes."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(total, unit, what=None, **more):
    """A progress bar (tqdm) on rank 0; where its output is no terminal, a line every ten seconds."""
    return tqdm(total=total, unit=unit, desc=what, dynamic_ncols=True, disable=not is_first(),
                mininterval=0.5 if sys.stderr.isatty() else 10, **more)


def say(*words, end="\n"):
    """print, on rank 0 only, at once and beside a progress bar's line, not into it."""
    if is_first():
        tqdm.write(" ".join(map(str, words)), end=end)
        sys.stdout.flush()
