"""Cost of a training step: time, peak memory, parameters (Table 1 of SLAE-FastGAN), of one or several configurations.

Several configurations are timed alternately in one process, so that drifting machine speed favours none of them. GPU
memory is the peak allocation minus what was allocated before the networks were built. Peak main memory can only be
measured per process, so each configuration gets its own.
"""

import gc
import multiprocessing
import platform
import re
import statistics
import time
from functools import partial
from pathlib import Path

import torch

import families
from data_loader import Batch
from device import distributed, fast_step
from device.precision import Precision
from errors import Failure
from flags.pictures import PictureShape
from parameter import Config
from storage.score_table import Score
from trainer import Trainer

SECONDS = 60        # of timing per configuration, in at least LEAST rounds
LEAST = 8
TURN = 0.5          # seconds per configuration in a round, at least one step
WARM_UP = fast_step.WARM_UP + 1         # steps: with the last one the faster step variants start
OWN = "the run's model"


def require(config):
    """Raise DataError or UsageError if weights are missing; Failure if the system does not tell a process's memory."""
    families.require(config)
    _peak_resident()


def evaluate(evaluation):
    """Yield [Score, ...]: the cost of training the evaluation's run. Measured on rank 0 only."""
    if distributed.is_first():
        latents = evaluation.trained.latents
        yield measure(evaluation.config, latents.bank, evaluation.place, latents.classes)


class ConstantBatch:
    """Stands in for the data loader: the same batch of noise every time. The content does not affect the timing."""

    def __init__(self, config, device, classes=None):
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_size, *PictureShape.of_config(config).size)
        self.images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
        self.labels = None if classes is None else classes.draw(config.batch_size, generator).to(device)
        self.samples_seen = 0

    def __len__(self):
        return len(self.images)

    def __next__(self):
        return Batch(self.images, self.labels)


class TimedConfig:
    """One configuration in training; `seconds` holds the time per step of each round."""

    def __init__(self, config, place, bank=None, classes=None):
        self.config, self.place = config, place
        self.batches = ConstantBatch(config, place.device, classes)
        precision = Precision(config.precision, place.device)
        self.trainer = Trainer(config, place, precision, len(self.batches), bank, classes)
        self.seconds = []

    def run(self, steps):
        """Train for `steps` steps; return the seconds per step, including the device's work."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.batches)
        if self.place.device.type != "cpu":
            torch.accelerator.synchronize()
        return (time.perf_counter() - began) / steps

    def parameters(self):
        """Return [number of G's parameters, number of D's parameters]."""
        return [sum(weight.numel() for weight in net.parameters()) for net in (self.trainer.G, self.trainer.D)]


def alternate(sides, seconds=None):
    """Time the TimedConfigs `sides` alternately, `seconds` each (None: SECONDS), reversing the order every round.

    Append to their `seconds`; return the steps per round.
    """
    for side in sides:
        side.run(WARM_UP)
    steps = max(1, round(TURN / sides[0].run(WARM_UP)))
    began = time.perf_counter()
    with distributed.progress(None, "round", "timing steps") as progress:
        while progress.n < LEAST or time.perf_counter() - began < (seconds or SECONDS) * len(sides):
            for side in sides if progress.n % 2 else sides[::-1]:
                side.seconds.append(side.run(steps))
            progress.update()
    return steps


def each_ratio(side, other):
    """Return [time of `side` / time of `other`, ...] for each round."""
    return [a / b for a, b in zip(side.seconds, other.seconds, strict=True)]


def measure(config, bank, place, classes=None):
    """Return [Score, ...]: the cost of the run's model and, with `--against`, of the baseline. Raises Failure."""
    sides = {OWN: (config, bank)}
    if config.against:
        name, changes = families.FAMILIES[config.model].baselines[config.against]
        sides[name] = (Config.of({**vars(config), **changes}), None)
    memory = {name: peak_memory(its, bank, place, classes=classes) for name, (its, bank) in sides.items()}
    timed = {name: TimedConfig(its, place, bank, classes) for name, (its, bank) in sides.items()}
    alternate(list(timed.values()))
    unit = "allocated on the GPU" if place.device.type == "cuda" else "resident, over an idle process"
    in_turn = " in turn (time_ratio ± its standard deviation over them)" if config.against else ""
    protocol = (f"cost of training: {config.imsize} px, batch {config.batch_size}, {config.d_iters} D to 1 G, "
                f"{hardware(place.device)}; median over rounds{in_turn}, loading left out; memory: peak {unit}")
    scores = []
    for name, side in timed.items():
        g_parameters, d_parameters = side.parameters()
        values = {"sec_per_1000_steps": 1000 * statistics.median(side.seconds), "peak_memory_mib": memory[name] / 2**20,
                  "g_parameters": g_parameters, "d_parameters": d_parameters}
        scores.append(Score(values, protocol, name))
    if config.against:
        ratios = each_ratio(*timed.values())
        scores[0].values.update(time_ratio=statistics.median(ratios), time_ratio_std=statistics.stdev(ratios))
    return scores


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(config, bank, place, kind=TimedConfig, classes=None):
    """Return the peak memory of training `config`, in bytes; `kind` is the class that trains.

    Raises Failure if the process that measures it dies or the system does not report a process's peak memory.
    """
    if place.device.type == "cuda":
        return _peak_of_gpu(partial(kind, config, place, bank, classes), place)
    context = multiprocessing.get_context("spawn")      # a forked process would start with this one's memory
    receiver, sender = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak_memory, args=(vars(config), bank, place, kind, classes, sender))
    child.start()
    sender.close()
    try:
        result = receiver.recv()
    except EOFError:
        raise Failure("--metrics cost: the process that measures memory ended without a result "
                      "(out of memory?)") from None
    finally:
        child.join()
    if isinstance(result, Failure):
        raise result
    return result


def _peak_of_gpu(build, place):
    gc.collect()                    # reference cycles of an earlier configuration
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    build().run(WARM_UP)
    return torch.cuda.max_memory_allocated(place.device) - before


def _send_peak_memory(values, bank, place, kind, classes, sender):
    try:
        before = _peak_resident()
        kind(Config.of(values), place, bank, classes).run(WARM_UP)
        sender.send(_peak_resident() - before)
    except Failure as failure:
        sender.send(failure)


def _peak_resident():
    """Return this process's peak resident memory in bytes. Raises Failure if the system does not report it."""
    try:                    # preferred, because on Linux ru_maxrss includes the memory of the parent before the exec
        table = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", table, re.MULTILINE).group(1)) * 1024
    except (OSError, AttributeError):
        pass
    try:
        import resource
    except ImportError:                                 # Windows
        raise Failure("--metrics cost: this system does not report a process's peak memory") from None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if platform.system() == "Darwin" else peak * 1024   # bytes on macOS, KiB elsewhere


def hardware(device):
    """Describe the processor, the number of threads or the GPU, and the version of PyTorch.

    With a GPU too the processor is named, because it determines the time of kernel launches.
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} on {processor()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor():
    """Return the name of this machine's processor, as far as the system reports it."""
    try:
        table = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"^model name\s*:\s*(.+)$", table, re.MULTILINE).group(1)
    except (OSError, AttributeError):                   # not Linux, or no "model name"
        return platform.processor() or platform.machine()
