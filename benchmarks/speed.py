"""How fast a training step is: this program against the same model trained the plain published way.

    python benchmarks/speed.py [--growth [--batches N,N]] [--loading] [--variant FLAGS ...] [--seconds S]
                               [--results FILE] [FLAGS of main.py]

Without flags: SAGAN, 64 px, batch 16 (64 on a GPU). All variants take turns, in an order that changes from round to
round; `reference` is `reference.py`, on CPUs in a process of its own. Prints a table (variant, images per second, their
ratio to the reference's with the range of its middle half, peak memory) and puts it into docs/measurements.md, or what
--results names, in place of the table of the same hardware and flags if there is one. Loading and metadata are left
out, and so is `--compile auto`; `--variant "--precision bf16 --compile true"` measures that instead of the usual
variants, and can be repeated. Usual variants that the flags rule out are left out, too; on a GPU one for which there is
no memory has a row that says so. Of networks that change sizes by `Resampling`, a row has it in the way that this
device does not take.

--growth instead: one step's time and memory over image and batch sizes, or over --batches alone, and its speed beside
the ideal, which is that of a large matrix product on the same device. Its rows are kept if it is interrupted.

--loading instead: how much longer steps take when their pictures are loaded from files.
"""

import argparse
import contextlib
import datetime
import importlib.util
import multiprocessing
import platform
import re
import shlex
import signal
import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import families  # noqa: E402 - found through the line above
import loading  # noqa: E402
import parameter  # noqa: E402
from ablation_options import some  # noqa: E402
from dataset import workers  # noqa: E402
from device import console, distributed  # noqa: E402
from device.precision import Precision, choose_algorithms  # noqa: E402
from device.signals import Interrupt, Interrupted  # noqa: E402
from errors import Failure, UsageError, out_of_memory_on  # noqa: E402
from flags.values import written  # noqa: E402
from layers.attention import SelfAttention  # noqa: E402
from layers.convolutions import Resampling  # noqa: E402
from metrics.cost import TimedConfig, alternate, each_ratio, hardware, peak_memory  # noqa: E402
from processes import exit_code_of  # noqa: E402
from reference import PlainConfig  # noqa: E402
from step_time import classes_of, refuse_deterministic, refuse_metadata  # noqa: E402
from storage.folders import require_folders  # noqa: E402
from utils import write_atomically  # noqa: E402

RESULTS = Path(__file__).parent.parent / "docs" / "measurements.md"
# LPIPS's cost does not depend on its weights; metadata is one small product
_RECON = ("lpips", "--vgg_weights", "random") if importlib.util.find_spec("torchmetrics") else ("l1",)
USUAL = {"sagan": (), "fastgan": ("--metadata", "false", "--recon", *_RECON)}
GROWTH = {  # image sizes at the usual batch, batches at the usual image size
    "sagan": ((32, 64, 128, 256), (8, 16, 32, 64)),
    "fastgan": ((64, 128, 256, 512, 1024), (2, 4, 8, 16)),
}
TITLED = {"model", "arch", "imsize", "batch_size"}      # flags that a table's title has without their names
MATRIX = 4096       # side of the product that measures the device's speed
PICTURES = 2000     # that --loading draws
TIMED = 2           # seconds of steps of which the growth table takes the time, three times over, without --seconds


def config_of(flags, more=()):
    """The Config of these flags of main.py, without data."""
    typed = parameter.parse(["--dataset", "toy", *flags])
    model = typed.get("model", "sagan")
    on_gpu = torch.cuda.is_available() and typed.get("device") != "cpu"
    batch = {} if "batch_size" in typed or model != "sagan" or on_gpu else {"batch_size": 16}
    usual, added = parameter.parse(("--compile", "false", *USUAL[model])), parameter.parse(more)
    refuse_deterministic(added, "beside --variant, for all")
    config = parameter.resolve({**usual, **typed, **batch, **added})
    refuse_metadata(config)
    return config


def usual_variants(flags, device):
    """What the usual variants add to the flags on this device, but for those that the flags rule out."""
    # those that the device has, but that `auto` does not take
    precisions = tuple(f"--precision {name}" for name in ("fp32", "tf32", "bf16", "fp16")
                       if Precision(name, device).name == name != Precision("auto", device).name)
    pooled = tuple(f"{one} --attn_pool true" for one in precisions if device.type == "cpu")
    found = []
    for more in ("", *precisions, "--attn_pool true", *pooled, "--accumulate 4",
                 *("--cuda_graph false",) * (device.type == "cuda")):
        with contextlib.suppress(UsageError):
            config_of(flags, more.split())
            found.append(more)
    return found


def start(config):
    """Return the Place of this process, with the algorithms that main.py chooses."""
    choose_algorithms(config.deterministic)
    return distributed.start(config)


class OtherResampling(TimedConfig):
    """With sizes changed in the way that this device does not take: merged with a convolution, or in a step before it.
    """

    def __init__(self, config, place, *more):
        super().__init__(config, place, *more)
        device = place.device.type
        for net in (self.trainer.G, self.trainer.D):
            for layer in resampling(net):
                layer.merged_on = () if device in layer.merged_on else (device,)


def resampling(net):
    """Return the layers of a network that change sizes."""
    return [layer for layer in net.modules() if isinstance(layer, Resampling)]


class Apart:
    """A TimedConfig of the class `kind` in a process of its own, for what the rest of this program changes in its own:
    on CPUs it keeps freed memory. Raises Failure if that process ends.
    """

    def __init__(self, kind, config, place, bank=None, classes=None):
        self.config, self.seconds = config, []
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=_serve, args=(kind, vars(config), place, bank, classes, other), daemon=True).start()
        other.close()

    def run(self, steps):
        """Train for `steps` steps; return the seconds per step."""
        try:
            self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise Failure("the process that trains the plain way ended (out of memory?)") from None


def _serve(kind, values, place, bank, classes, pipe):
    signal.signal(signal.SIGINT, signal.SIG_IGN)        # of a terminal: the program ends this process
    side = kind(parameter.Config.of(values), place, bank, classes)
    with contextlib.suppress(EOFError):                 # the other end has been closed
        while True:
            pipe.send(side.run(pipe.recv()))


def fitted(what, measure):
    """Return (measure(), ""), or (None, what has no memory left for it); other Failures name `what`."""
    try:
        return measure(), ""
    except Failure as failure:
        failure.args = (f"{what}: {failure}",)
        raise
    except (MemoryError, RuntimeError) as error:
        where = out_of_memory_on(error)
        if where is None:
            raise
    return None, f"out of memory on {where}"            # here: the exception holds what was allocated


def compare(flags, seconds=None, variants=None):
    """Lines of the table of this program's `variants` (None: the usual ones) and the reference."""
    config = config_of(flags)
    place = start(config)
    kinds = {"reference": (PlainConfig, config_of(flags, ("--precision", "fp32")))}
    if place.device.type == "cuda":     # torch's own setting is between the two: tf32 in convolutions alone
        kinds["reference in tf32"] = PlainConfig, config_of(flags, ("--precision", "tf32"))
    kinds |= {f"this program {more}".strip(): (TimedConfig, config_of(flags, more.split()))
              for more in variants or usual_variants(flags, place.device)}
    if any(map(resampling, families.build(config))):
        kinds["this program, sizes changed the other way"] = OtherResampling, config
    classes = {name: classes_of(its) for name, (_, its) in kinds.items()}
    memory = {name: fitted(name, partial(peak_memory, its, None, place, kind, classes[name]))
              for name, (kind, its) in kinds.items()}
    if lack := memory["reference"][1]:
        raise Failure(f"reference: {lack}; lower --batch_size or --imsize")

    def timed():
        sides = {name: (partial(Apart, kind) if kind is PlainConfig and place.device.type == "cpu" else kind)(
            its, place, None, classes[name]) for name, (kind, its) in kinds.items() if not memory[name][1]}
        alternate(list(sides.values()), seconds)
        return sides

    sides, lack = fitted("all variants at once", timed)
    if lack:
        raise Failure(f"all variants at once: {lack}; name fewer with --variant")
    yield from rows(sides, memory)


def rows(sides, memory):
    """Lines of the table of {name: side}; `memory` has its peak for each name, or why there is no side of that name."""
    yield "| variant | images/s | times the reference's (middle half) | peak memory, MiB | of the reference's |"
    yield "|---|---|---|---|---|"
    reference = sides["reference"]
    for name, (peak, lack) in memory.items():
        if lack:
            yield f"| {name} | {lack} | | | |"
            continue
        side, ratio = sides[name], "1"
        batch = side.config.batch_size
        if side is not reference:
            low, middle, high = (each * batch / reference.config.batch_size
                                 for each in statistics.quantiles(each_ratio(reference, side), n=4))
            ratio = f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
        yield (f"| {name} | {batch / statistics.median(side.seconds):.1f} | {ratio} | {peak / 2**20:,.0f} | "
               f"{peak / memory['reference'][0]:.2f} |")


class FromFiles(TimedConfig):
    """Trains on batches of pictures that are loaded, by so many loader processes."""

    def __init__(self, config, place, batches, readers):
        super().__init__(config, place)
        self.batches, self.readers = batches, readers

    def run(self, steps):
        """As TimedConfig's, without the batches that were prefetched while other sides were timed."""
        for _ in range(2 * self.readers + 1 if self.readers else 0):
            next(self.batches)
        seconds = super().run(steps)
        if self.readers:
            time.sleep(loading.PAUSE)                   # they fill their queues, and then rest
        return seconds


def load(flags, seconds=None):
    """Lines of the table of steps whose pictures are there, and of steps whose pictures are loaded."""
    config = config_of(flags)
    if config.conditional is True:
        raise UsageError("--conditional true: the pictures of --loading have no classes; leave it out")
    place = start(config)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        loading.draw(folder, PICTURES)
        count = workers.readers(config)
        readers = f"by {count} processes" if count else "by the training itself"
        with contextlib.closing(loading.ours(config, folder, place.device, folder, cached=False)) as files, \
                contextlib.closing(loading.filled(config, folder, place.device, folder)) as decoded:
            first = TimedConfig(config, place)
            sides = {"none: always the same pictures": first,
                     f"JPEGs of 178x218, {readers}": FromFiles(config, place, files, count),
                     "from the cache": FromFiles(config, place, decoded, 0)}
            alternate(list(sides.values()), seconds)
    yield "| loading | images/s | time of a step over that without (middle half) |\n|---|---|---|"
    for name, side in sides.items():
        low, middle, high = statistics.quantiles(each_ratio(side, first), n=4)
        ratio = "1" if side is first else f"**{middle:.3f}** ({low:.3f} to {high:.3f})"
        yield f"| {name} | {config.batch_size / statistics.median(side.seconds):.1f} | {ratio} |"


def counting(*nets):
    """A context that counts floating-point operations of products in steps of these networks, without those of the
    zeros that the CPU's kernel of attention wants beside q and k; `get_total_flops()` tells them.
    """
    widths = {layer.value.out_channels: layer.query.out_channels for net in nets for layer in net.modules()
              if isinstance(layer, SelfAttention)}

    def attention(q, k, v, *_, **__):
        return 2 * q[:-1].numel() * k[-2] * (widths[v[-1]] + v[-1])     # q k^T, and softmax(q k^T) v

    def backward(gradient, q, k, v, *_, **__):
        return 2 * attention(q, k, v)

    on_cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu     # torch counts the GPU's kernels by itself
    of_gradients = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    return FlopCounterMode(display=False, custom_mapping={on_cpu: attention, of_gradients: backward})


def speed_of_products(precision):
    """Floating-point operations per second of the device in a large matrix product: the best of several."""
    device = precision.device
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision.name)
    a, b = torch.randn(2, MATRIX, MATRIX, device=device, dtype=dtype)
    times = 20 if device.type == "cuda" else 1          # on a fast GPU one takes as long as its launch
    best = 0.0
    for _ in range(5):
        began = time.perf_counter()
        with precision.switched():
            for _ in range(times):
                a @ b
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = max(best, times * 2 * MATRIX**3 / (time.perf_counter() - began))
    return best


def grow(flags, batches=None, seconds=None):
    """Lines of the table over image and batch sizes, or over these batches alone."""
    usual = config_of(flags)
    place = start(usual)
    imsizes, usual_batches = GROWTH[usual.model]
    cells = [(imsize, usual.batch_size) for imsize in imsizes]
    cells += [(usual.imsize, batch) for batch in usual_batches if batch != usual.batch_size]
    if batches:
        cells = [(usual.imsize, batch) for batch in batches]
    precision, peaks = Precision(usual.precision, place.device), []
    yield (f"Ideal: a step's products at the speed of a {MATRIX} x {MATRIX} one in {precision.name}, measured before "
           "and after each row.\n")
    yield "| image size, px | batch | s per step | images/s | Tflop/s | of the ideal speed | peak memory, MiB |"
    yield "|---|---|---|---|---|---|---|"
    for imsize, batch in cells:
        config = config_of(flags, ("--imsize", str(imsize), "--batch_size", str(batch)))
        found, lack = fitted(f"{imsize} px, batch {batch}",
                             partial(measure_cell, config, place, precision, seconds or TIMED))
        if lack:
            yield f"| {imsize} | {batch} | {lack} | | | | |"
            continue
        memory, time_of_step, flops, peak = found
        peaks.append(peak)
        yield (f"| {imsize} | {batch} | {time_of_step:.4f} | {batch / time_of_step:,.1f} | {flops / 1e12:.2f} | "
               f"{flops / peak:.0%} | {memory / 2**20:,.0f} |")
    if peaks:
        yield f"\nThat product: {min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f} Gflop/s."


def measure_cell(config, place, precision, timed):
    """Return (peak memory in bytes, seconds per step, flops per second of a step, of a large product)."""
    classes = classes_of(config)
    memory = peak_memory(config, None, place, classes=classes)
    side = TimedConfig(config, place, classes=classes)
    with counting(side.trainer.G, side.trainer.D) as counter:
        side.run(1)
    steps = max(1, round(timed / side.run(2)))
    peak = speed_of_products(precision)
    seconds = min(side.run(steps) for _ in range(3))
    peak = max(peak, speed_of_products(precision))
    return memory, seconds, counter.get_total_flops() / seconds, peak


def some_batches(text):
    """'64,256' -> [64, 256]."""
    if not re.fullmatch(r"[1-9]\d*(,[1-9]\d*)*", text):
        raise argparse.ArgumentTypeError(f"'{text}' is no list of batch sizes such as 64,256")
    return [int(word) for word in text.split(",")]


def put(path, title, lines):
    """Write a section into a Markdown file: in place of the one of the same title, or at the end."""
    section = f"## {title}\n\n" + "\n".join(lines) + "\n"
    text = path.read_text(encoding="utf-8") if path.exists() else "# Results\n"
    old = re.compile(rf"^## {re.escape(title)}\n.*?(?=^## |\Z)", re.MULTILINE | re.DOTALL)
    text = old.sub(lambda _: section + "\n", text) if old.search(text) else text.rstrip() + "\n\n" + section
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(text.rstrip() + "\n", encoding="utf-8"))


def title_of(options, flags, device):
    """The title of a table: what was measured, with which flags, on what. Tables of one title replace each other."""
    config, typed = config_of(flags), parameter.parse(flags)
    size, titled = f"{config.imsize} px, batch {config.batch_size}", TITLED
    if options.batches:
        size = f"{config.imsize} px, batches {','.join(map(str, options.batches))}"
    elif options.growth:
        size, titled = "growth", TITLED - {"imsize", "batch_size"}
    others = [f"--{name} {written(typed[name])}" for name in sorted(typed.keys() - titled)]
    parts = [size, *["loading"] * options.loading, *others, *filter(None, options.variant or ())]
    model = config.model if config.arch in (None, "dcgan") else f"{config.model} --arch {config.arch}"
    return f"Speed of a step: {model}, {', '.join(parts)}, {hardware(device)}"


def measure(options, flags, argv):
    """Measure, print, write. Return exit code 0. Raises Failure, OSError."""
    config = config_of(flags)
    if options.results.is_dir():
        raise UsageError(f"--results {options.results}: is a folder; name a Markdown file")
    require_folders([options.results.parent])           # before the time is spent
    if options.growth:
        found = grow(flags, options.batches, options.seconds)
    elif options.loading:
        found = load(flags, options.seconds)
    else:
        found = compare(flags, options.seconds, options.variant)
    lines, ended = [], False
    try:
        for line in found:
            print(line, flush=True)
            lines.append(line)
        ended = True
    finally:
        if ended or any(re.match(r"\| \d", line) for line in lines):    # rows of --growth: others come all at once
            device = distributed.start(config).device
            command = shlex.join(["python", "benchmarks/speed.py", *argv])
            put(options.results, title_of(options, flags, device) + (", unfinished" if not ended else ""), [
                f"`{command}`, {datetime.date.today()}, Python {platform.python_version()}.\n", *lines])
            print(f"\n{hardware(device)}: written into {options.results}")
    return 0


def main(argv):
    """Run the command line `argv` and return the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--growth", action="store_true", help="time and memory over image and batch sizes")
    parser.add_argument("--batches", type=some_batches, metavar="N,N",
                        help="with --growth: these batch sizes at one image size")
    instead.add_argument("--loading", action="store_true", help="what loading pictures adds to a step's time")
    instead.add_argument("--variant", action="append", help="flags of main.py, a row of the table; can be repeated")
    parser.add_argument("--seconds", type=some("seconds"), metavar="S", help="that each variant is timed for (default: "
                        f"60); with --growth each row, three times over (default: {TIMED})")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file that the table goes into")
    options, flags = parser.parse_known_args(argv)
    if options.batches and not options.growth:
        parser.error("--batches: is for --growth")
    try:
        with Interrupt():
            return exit_code_of(lambda: measure(options, flags, argv), "--results: ")
    except Interrupted as request:
        print("interrupted", file=sys.stderr)
        return 128 + request.number


if __name__ == "__main__":
    console.run(main)
