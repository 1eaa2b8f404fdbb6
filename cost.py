"""What a training step costs: seconds, memory, parameters (Table 1 of SLAE-FastGAN), of one or several configurations.

Several are timed in turn, in one process, so that a machine whose speed drifts favours none. Memory is what the GPU
held at the most over what it held before the networks were built; of main memory nothing tells that but a process of
its own for each.
"""

import gc
import multiprocessing
import platform
import re
import statistics
import time
from pathlib import Path

import torch

import distributed
import fast_step
from failures import Failure
from parameter import Config
from scores import Score
from trainer import Trainer

SECONDS = 60        # that each side is timed for, in LEAST rounds at the least
LEAST = 8
TURN = 0.5          # seconds that each side takes in a round, and one step at the least
WARM_UP = fast_step.WARM_UP + 1         # steps: the last one tries the faster ways
OTHERS = {"baseline": {"slae": False, "metadata": False}}       # what --against adds, by what it changes
OWN = "the run's model"
IN_WORDS = {"baseline": "baseline: FastGAN without SLAE and metadata"}


class OneBatch:
    """Real pictures that need no loading: noise, the same every time. What they show changes no time."""

    def __init__(self, config, device):
        generator = torch.Generator().manual_seed(0)
        shape = (config.batch_size, 3, config.imsize, config.imsize)
        self.images = (torch.rand(shape, generator=generator) * 2 - 1).to(device)
        self.samples_seen = 0

    def __len__(self):
        return len(self.images)

    def __next__(self):
        return self.images


class Side:
    """One configuration in training: `seconds` per step, a number for each round."""

    def __init__(self, config, place, bank=None):
        self.config, self.place = config, place
        self.pictures = OneBatch(config, place.device)
        self.trainer = Trainer(config, self.pictures, place, bank)
        self.seconds = []

    def run(self, steps):
        """Seconds per step over `steps` steps, the device's work included."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.pictures)
        if self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)
        return (time.perf_counter() - began) / steps

    def parameters(self):
        """Of G and of D."""
        return [sum(weight.numel() for weight in net.parameters()) for net in (self.trainer.G, self.trainer.D)]


def alternate(sides, seconds=None):
    """Time the sides in turn, `seconds` each (None: SECONDS), in an order that changes from round to round.

    Fills the sides' `seconds`; returns the steps that one takes in a round.
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
    """How many times as long `side` took as `other`, in each round."""
    return [a / b for a, b in zip(side.seconds, other.seconds, strict=True)]


def measure(config, bank, place):
    """[Score, ...] of what the run's model costs and, with `--against`, the baseline beside it. Raises DataError."""
    sides = {OWN: (config, bank)}
    if config.against:
        sides[IN_WORDS[config.against]] = (Config.of({**vars(config), **OTHERS[config.against]}), None)
    memory = {name: peak_memory(settings, its_bank, place) for name, (settings, its_bank) in sides.items()}
    timed = {name: Side(settings, place, its_bank) for name, (settings, its_bank) in sides.items()}
    alternate(list(timed.values()))
    unit = "allocated on the GPU" if place.device.type == "cuda" else "resident, over an idle process"
    in_turn = " in turn (time_ratio ± its standard deviation over them)" if config.against else ""
    protocol = (f"cost of training: {config.imsize} px, batch {config.batch_size}, {config.d_iters} D to 1 G, "
                f"{hardware(place.device)}; median over rounds{in_turn}, loading left out; memory: peak {unit}")
    found = []
    for name, side in timed.items():
        g_parameters, d_parameters = side.parameters()
        values = {"sec_per_1000_steps": 1000 * statistics.median(side.seconds), "peak_memory_mib": memory[name] / 2**20,
                  "g_parameters": g_parameters, "d_parameters": d_parameters}
        found.append(Score(values, protocol, name))
    if config.against:
        each = each_ratio(*timed.values())
        found[0].values.update(time_ratio=statistics.median(each), time_ratio_std=statistics.stdev(each))
    return found


# ------------------------------------------------------------------------------------------------------------ memory


def peak_memory(config, bank, place, kind=Side):
    """Bytes that a training of this config takes at its peak; `kind` is what trains.

    Raises Failure where the process that measures it ends without an answer.
    """
    if place.device.type == "cuda":
        return _peak_of_gpu(config, bank, place, kind)
    context = multiprocessing.get_context("spawn")      # a fork would begin with this process's memory
    answers, answer = context.Pipe(duplex=False)
    child = context.Process(target=_peak_memory, args=(vars(config), bank, place, kind, answer))
    child.start()
    answer.close()
    try:
        found = answers.recv()
    except EOFError:
        raise Failure("--metrics cost: the process that measures memory ended without an answer "
                      "(out of memory?)") from None
    finally:
        child.join()
    if isinstance(found, Failure):
        raise found
    return found


def _peak_of_gpu(config, bank, place, kind):
    gc.collect()                    # what an earlier side left in cycles
    before = torch.cuda.memory_allocated(place.device)
    torch.cuda.reset_peak_memory_stats(place.device)
    kind(config, place, bank).run(WARM_UP)
    return torch.cuda.max_memory_allocated(place.device) - before


def _peak_memory(values, bank, place, kind, answer):
    try:
        before = _most_resident()
        kind(Config.of(values), place, bank).run(WARM_UP)
        answer.send(_most_resident() - before)
    except Failure as failure:
        answer.send(failure)


def _most_resident():
    """The most bytes that this process ever held in memory. Raises Failure where the system does not tell."""
    try:                    # first, as Linux counts into ru_maxrss what the parent held before this process began
        table = Path("/proc/self/status").read_text(encoding="utf-8")
        return int(re.search(r"^VmHWM:\s*(\d+) kB$", table, re.MULTILINE).group(1)) * 1024
    except (OSError, AttributeError):
        pass
    try:
        import resource
    except ImportError:                                 # Windows
        raise Failure("--metrics cost: this system does not tell a process's peak memory") from None
    most = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return most if platform.system() == "Darwin" else most * 1024


def hardware(device):
    """The processor, the cores or the GPU, and the version of torch.

    With a GPU the processor too: it decides how long what is started kernel by kernel takes.
    """
    if device.type == "cuda":
        return f"{torch.cuda.get_device_name(device)} on {processor()}, torch {torch.__version__}"
    return f"{processor()}, {torch.get_num_threads()} threads, torch {torch.__version__}"


def processor():
    """The name of this machine's processor, as far as the system tells."""
    try:
        table = Path("/proc/cpuinfo").read_text(encoding="utf-8")
        return re.search(r"^model name\s*:\s*(.+)$", table, re.MULTILINE).group(1)
    except (OSError, AttributeError):                   # not Linux, or a processor without a name
        return platform.processor() or platform.machine()
