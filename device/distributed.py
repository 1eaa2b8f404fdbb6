"""Several processes in one run: start, alone, under torchrun or by `--parallel true`; collectives; output on rank 0."""

import datetime
import logging
import os
import shutil
import sys
import time
import uuid
from dataclasses import dataclass

import torch
import torch.distributed as dist
from tqdm import tqdm

from device import mps
from errors import UsageError


@dataclass(frozen=True)
class Place:
    """The device and rank of this process, among `world_size` processes."""

    device: torch.device
    rank: int = 0
    world_size: int = 1

    def share(self, count, chunk=1):
        """Return this rank's share of range(count): the first number of each of its chunks of `chunk` numbers."""
        return range(self.rank * chunk, count, self.world_size * chunk)


def start(config):
    """Join the process group if torchrun started this process. Return its Place."""
    if world_size() == 1:
        return place_alone(config)
    on_cuda = _on_cuda(config)
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_cuda else torch.device("cpu")
    if on_cuda:
        _require_kernels(device)
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_cuda else "gloo")
    return Place(device, dist.get_rank(), world_size())


def place_alone(config):
    """Return the Place of one process on `--device`, whoever started it."""
    best = "cuda" if _on_cuda(config) else "mps" if mps.is_available() else "cpu"
    device = torch.device(best if config.device == "auto" else config.device)
    if device.type == "cuda":
        _require_kernels(device)
    if device.type == "cuda" and device.index is not None:
        torch.cuda.set_device(device)                   # CUDA graphs are captured on the current device
    return Place(device)


def _require_kernels(device):
    """Raise UsageError if this PyTorch was built for newer GPUs: it finds an older one, and fails at its first use."""
    numbers = [arch.removeprefix("sm_") for arch in torch.cuda.get_arch_list()]         # sm_75, sm_80, ...
    least = min((int(number) for number in numbers if number.isdecimal()), default=0)
    major, minor = torch.cuda.get_device_capability(device)
    if 10 * major + minor < least:
        raise UsageError(f"--device {device}: this PyTorch ({torch.__version__}) cannot use GPUs of capability "
                         f"{major}.{minor}, such as {torch.cuda.get_device_name(device)}\ninstall one for CUDA 12.6 "
                         "(see pytorch.org/get-started), or use --device cpu")


def why_no_gpu(config):
    """Return in words why `--device auto` takes the CPU on a machine with an NVIDIA GPU; else an empty text."""
    if config.device != "auto" or torch.cuda.is_available() or shutil.which("nvidia-smi") is None:
        return ""
    built = f"this PyTorch ({torch.__version__})"
    if torch.version.cuda is None:
        return f"{built} was built without CUDA; see pytorch.org/get-started"
    return f"{built}, for CUDA {torch.version.cuda}, finds no GPU; perhaps the driver is too old for it"


def _on_cuda(config):
    return config.device.startswith("cuda") or (config.device == "auto" and torch.cuda.is_available())


def on_every_gpu(script, argv):
    """Run `script` with these arguments in one process per visible GPU (`--parallel true`). Return the exit code."""
    return launch(torch.cuda.device_count(), script, argv)


def launch(count, script, argv):
    """Run `script` with these arguments in `count` processes of one run. Return the exit code of the first to fail.

    It is what torchrun does on one machine, without its report of 40 lines for every failure.
    """
    # late: they take half a second
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)   # the processes say themselves what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", "1")                       # as torchrun does
    config = LaunchConfig(1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=0)
    sys.stdout.flush()
    try:
        elastic_launch(config, sys.executable)("-u", script, *argv)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return exit_code(error.failures.values())
    return 0


def exit_code(failures):
    """Return the first exit code that a process gave itself; without one, 128 + the first signal that killed one."""
    codes = [failure.exitcode for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    return next((code for code in codes if code > 0), 128 - codes[0])


def launched():
    """Return whether torchrun started this process, with any world size."""
    return "TORCHELASTIC_RUN_ID" in os.environ


def stop():
    """Leave the process group, if there is one."""
    if dist.is_initialized():
        dist.destroy_process_group()


def broadcast(*modules):
    """Broadcast the parameters and buffers of the modules from rank 0 to all ranks."""
    if dist.is_initialized():
        for module in modules:
            for tensor in module.state_dict().values():
                dist.broadcast(tensor, 0)


@torch.no_grad()
def mean_over_processes(values):
    """Return the mean of a tensor over the ranks, on every rank; the tensor itself without a process group."""
    if dist.is_initialized():
        values = values.clone()
        dist.all_reduce(values)
        values.div_(dist.get_world_size())
    return values


class StopVote:
    """Lets all ranks stop at the same step, about a second after a request reached one of them.

    Call it at every step on every rank. They talk on the CPU (gloo), so that nothing waits for a GPU, and only as often
    as once in `SECONDS`; how many steps that are follows from numbers that all ranks have.
    """

    SECONDS = 1.0

    def __init__(self):
        self.group = dist.new_group(backend="gloo") if dist.is_initialized() else None
        self.steps, self.every, self.began = 0, 1, time.monotonic()

    def __call__(self, wanted):
        """Return whether any rank `wanted` to stop; False at the steps between two votes."""
        if self.group is None:
            return wanted
        self.steps += 1
        if self.steps < self.every:
            return False
        now = time.monotonic()
        vote = torch.tensor([float(wanted), (now - self.began) / self.steps])
        dist.all_reduce(vote, dist.ReduceOp.MAX, self.group)
        self.steps, self.every, self.began = 0, max(1, int(self.SECONDS / max(vote[1].item(), 1e-6))), now
        return vote[0].item() > 0


def gather(value):
    """Return [value of rank 0, value of rank 1, ...] on every rank. Values are pickled."""
    if not dist.is_initialized():
        return [value]
    values = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def gather_in_order(by_number):
    """Return [value, ...] in the order of the numbers, from the {number: value} of all ranks, on every rank."""
    values = {number: value for share in gather(by_number) for number, value in share.items()}
    return [values[number] for number in sorted(values)]


def require_same(value, error):
    """Raise the exception `error` on all ranks if their values differ. All ranks must call this."""
    if len(set(gather(value))) > 1:
        raise error


def is_alone():
    """Return whether there is no process group."""
    return not dist.is_initialized()


def barrier():
    """Wait for the other ranks."""
    if dist.is_initialized():
        dist.barrier()


def after_first(first, others):
    """Run `first()` on rank 0 while the other ranks wait, however long it takes, then `others()` on them.

    The other ranks continue even if `first()` raises.
    """
    if not dist.is_initialized():
        return first()
    # a separate group: in the default one the other ranks time out after ten minutes
    group = dist.new_group(backend="gloo", timeout=datetime.timedelta(days=7))
    try:
        result = first() if is_first() else None
    finally:
        dist.barrier(group)
        dist.destroy_process_group(group)
    return result if is_first() else others()


def on_first(compute):
    """Run compute() on rank 0 and return its result on every rank."""
    return gather(after_first(compute, lambda: None))[0]


def world_size():
    """Return the number of the run's processes (torchrun sets it); 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def on_this_machine():
    """Return the number of the run's processes on this machine (torchrun sets it); 1 without torchrun."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def is_first():
    """Return whether this is rank 0 or the only process: the one that prints and writes files."""
    return int(os.environ.get("RANK", "0")) == 0


def progress(total, unit, what=None, **more):
    """Return a tqdm progress bar, shown on rank 0; if stderr is no terminal, it is updated every ten seconds."""
    return tqdm(total=total, unit=unit, desc=what, dynamic_ncols=True, disable=not is_first(),
                mininterval=0.5 if sys.stderr.isatty() else 10, **more)


def say(*words, end="\n", any_rank=False):
    """Print on rank 0, or on `any_rank`, flushed, without breaking a progress bar."""
    if any_rank or is_first():
        tqdm.write(" ".join(map(str, words)), end=end)
        sys.stdout.flush()
