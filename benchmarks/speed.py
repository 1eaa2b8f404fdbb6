"""How fast a training step is: this program against the same model trained the plain published way.

    python benchmarks/speed.py [--growth [--batches N,N]] [--loading] [--variant FLAGS ...] [--seconds S]
                               [--results FILE] [FLAGS of main.py]

Without flags: SAGAN, 64 px, batch 16 (64 on a GPU). All variants take turns, in an order that changes from round to
round; `reference` is `reference.py`, on CPUs in a process of its own. Prints a table (variant, images per second, ratio
to the reference with the range of its middle half, peak memory) and puts it into docs/measurements.md, or what
--results names, in place of the table of the same hardware and flags if there is one. Loading is left out, and so is
`--compile auto`; `--variant "--precision bf16 --compile true"` measures that instead of the usual variants, and can be
repeated. Of networks that change sizes by `Resampling`, a row has it in the way that this device does not take.

--growth instead: one step's time and memory over image and batch sizes, or over --batches alone, and its speed beside
the ideal, which is that of a large matrix product on the same device.

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
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch
from torch.utils.flop_counter import FlopCounterMode

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import families  # noqa: E402
import loading  # noqa: E402
import parameter  # noqa: E402
from dataset import workers  # noqa: E402
from device import console, distributed  # noqa: E402 - found through the line above
from device.precision import Precision, choose_algorithms  # noqa: E402
from errors import Failure  # noqa: E402
from layers.convolutions import Resampling  # noqa: E402
from metrics.cost import TimedConfig, alternate, each_ratio, hardware, peak_memory  # noqa: E402
from reference import PlainConfig  # noqa: E402
from utils import write_atomically  # noqa: E402

RESULTS = Path(__file__).parent.parent / "docs" / "measurements.md"
# what the variants add to the flags, by model
_DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
# those that the device has, but that `auto` does not take
_PRECISIONS = tuple(f"--precision {name}" for name in ("fp32", "tf32", "bf16", "fp16")
                    if Precision(name, _DEVICE).name == name != Precision("auto", _DEVICE).name)
_POOLED = tuple(f"{one} --attn_pool true" for one in _PRECISIONS if _DEVICE.type == "cpu")
_REST = ("--accumulate 4", *("--cuda_graph false",) * (_DEVICE.type == "cuda"))
VARIANTS = {
    "sagan": ("", *_PRECISIONS, "--attn_pool true", *_POOLED, *_REST),
    "fastgan": ("", *_PRECISIONS, *_REST),
}
# LPIPS's cost does not depend on its weights; metadata is one small product
_RECON = ("lpips", "--vgg_weights", "random") if importlib.util.find_spec("torchmetrics") else ("l1",)
USUAL = {"sagan": (), "fastgan": ("--metadata", "false", "--recon", *_RECON)}
GROWTH = {  # image sizes at the usual batch, batches at the usual image size
    "sagan": ((32, 64, 128, 256), (8, 16, 32, 64)),
    "fastgan": ((64, 128, 256, 512, 1024), (2, 4, 8, 16)),
}
MATRIX = 4096       # side of the product that measures the device's speed
PICTURES = 2000     # that --loading draws
TIMED = 2           # seconds of steps of which the growth table takes the time, three times over


def config_of(flags, more=()):
    """The Config of these flags of main.py, without data."""
    typed = parameter.parse(["--dataset", "toy", *flags])
    model = typed.get("model", "sagan")
    batch = {} if "batch_size" in typed or model != "sagan" or torch.cuda.is_available() else {"batch_size": 16}
    usual = parameter.parse(("--compile", "false", *USUAL[model]))
    return parameter.resolve({**usual, **typed, **batch, **parameter.parse(more)})


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

    def __init__(self, kind, config, place):
        self.seconds = []
        context = multiprocessing.get_context("spawn")
        self.pipe, other = context.Pipe()
        context.Process(target=_serve, args=(kind, vars(config), place, other), daemon=True).start()
        other.close()

    def run(self, steps):
        """Train for `steps` steps; return the seconds per step."""
        try:
            self.pipe.send(steps)
            return self.pipe.recv()
        except (EOFError, OSError):
            raise Failure("the process that trains the plain way ended (out of memory?)") from None


def _serve(kind, values, place, pipe):
    side = kind(parameter.Config.of(values), place)
    with contextlib.suppress(EOFError):                 # the other end has been closed
        while True:
            pipe.send(side.run(pipe.recv()))


def compare(flags, seconds=None, variants=None):
    """Lines of the table of this program's `variants` (None: the usual ones) and the reference."""
    config = config_of(flags)
    place = start(config)
    kinds = {"reference": (PlainConfig, config_of(flags, ("--precision", "fp32")))}
    if place.device.type == "cuda":     # torch's own setting is between the two: tf32 in convolutions alone
        kinds["reference in tf32"] = PlainConfig, config_of(flags, ("--precision", "tf32"))
    kinds |= {f"this program {more}".strip(): (TimedConfig, config_of(flags, more.split()))
              for more in variants or VARIANTS[config.model]}
    if any(map(resampling, families.build(config))):
        kinds["this program, sizes changed the other way"] = OtherResampling, config
    memory = {name: peak_memory(its, None, place, kind) for name, (kind, its) in kinds.items()}
    sides = {name: Apart(kind, its, place) if kind is PlainConfig and place.device.type == "cpu" else kind(its, place)
             for name, (kind, its) in kinds.items()}
    alternate(list(sides.values()), seconds)
    yield "| variant | images/s | times the reference (middle half) | peak memory, MiB | of the reference's |"
    yield "|---|---|---|---|---|"
    for name, side in sides.items():
        ratio = "1"
        if name != "reference":
            low, middle, high = statistics.quantiles(each_ratio(sides["reference"], side), n=4)
            ratio = f"**{middle:.2f}** ({low:.2f} to {high:.2f})"
        yield (f"| {name} | {config.batch_size / statistics.median(side.seconds):.1f} | {ratio} | "
               f"{memory[name] / 2**20:,.0f} | {memory[name] / memory['reference']:.2f} |")


def load(flags, seconds=None):
    """Lines of the table of steps whose pictures are there, and of steps whose pictures are loaded."""
    config = config_of(flags)
    place = start(config)
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        loading.draw(folder, PICTURES)
        count = workers.readers(config)
        readers = f"by {count} processes" if count else "by the training itself"
        loaded = {f"JPEGs of 178x218, {readers}": loading.ours(config, folder, place.device, folder, cached=False),
                  "from the cache": loading.filled(config, folder, place.device, folder)}
        sides = {name: TimedConfig(config, place) for name in ("none: always the same pictures", *loaded)}
        for name, batches in loaded.items():
            sides[name].batches = batches
        try:
            alternate(list(sides.values()), seconds)
        finally:
            for batches in loaded.values():
                batches.close()
    first, *_ = sides.values()
    yield "| loading | images/s | time of a step over that without (middle half) |\n|---|---|---|"
    for name, side in sides.items():
        low, middle, high = statistics.quantiles(each_ratio(side, first), n=4)
        ratio = "1" if side is first else f"**{middle:.3f}** ({low:.3f} to {high:.3f})"
        yield f"| {name} | {config.batch_size / statistics.median(side.seconds):.1f} | {ratio} |"


def _attention(q, k, v, *_, **__):
    """Products of softmax(q k^T) v on these shapes: q and k have an eighth of v's width, the rest is padding."""
    return 2 * q[:-1].numel() * k[-2] * (v[-1] // 8 + v[-1])


def _attention_backward(gradient, q, k, v, *_, **__):
    return 2 * _attention(q, k, v)


# torch counts the GPU's kernels by itself
_ON_CPU = {torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: _attention,
           torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward}


def counting():
    """A context that counts floating-point operations of products; `get_total_flops()` tells them."""
    return FlopCounterMode(display=False, custom_mapping=_ON_CPU)


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


def grow(flags, batches=None):
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
        memory = peak_memory(config, None, place)
        side = TimedConfig(config, place)
        with counting() as counter:
            side.run(1)
        steps = max(1, round(TIMED / side.run(2)))
        peak = speed_of_products(precision)
        seconds = min(side.run(steps) for _ in range(3))
        peak = max(peak, speed_of_products(precision))
        peaks.append(peak)
        flops = counter.get_total_flops() / seconds
        yield (f"| {imsize} | {batch} | {seconds:.4f} | {batch / seconds:,.1f} | {flops / 1e12:.2f} | "
               f"{flops / peak:.0%} | {memory / 2**20:,.0f} |")
    yield f"\nThat product: {min(peaks) / 1e9:,.0f} to {max(peaks) / 1e9:,.0f} Gflop/s."


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
    write_atomically(path, lambda temporary: temporary.write_text(text.rstrip() + "\n", encoding="utf-8"))


def main(argv):
    """Measure, print, write. Returns exit code 0 or a Failure's."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    instead = parser.add_mutually_exclusive_group()
    instead.add_argument("--growth", action="store_true", help="time and memory over image and batch sizes")
    parser.add_argument("--batches", type=some_batches, metavar="N,N",
                        help="with --growth: these batch sizes at one image size")
    instead.add_argument("--loading", action="store_true", help="what loading pictures adds to a step's time")
    instead.add_argument("--variant", action="append", help="flags of main.py, a row of the table; can be repeated")
    parser.add_argument("--seconds", type=float, help="that each variant is timed for (default: 60)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="Markdown file that the table goes into")
    options, flags = parser.parse_known_args(argv)
    if options.batches and not options.growth:
        parser.error("--batches: is for --growth")
    lines, code = [], 0
    try:
        config = config_of(flags)
        if options.growth:
            found = grow(flags, options.batches)
        elif options.loading:
            found = load(flags, options.seconds)
        else:
            found = compare(flags, options.seconds, options.variant)
        for line in found:
            print(line, flush=True)
            lines.append(line)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        code = failure.code
        if not any(re.match(r"\| \d", line) for line in lines):         # rows of --growth: others come all at once
            return code
    device = distributed.start(config).device
    size = "growth" if options.growth else f"{config.imsize} px, batch {config.batch_size}"
    if options.batches:
        size = f"{config.imsize} px, growing batches"
    size += ", loading" * options.loading + "".join(f", {variant}" for variant in options.variant or () if variant)
    model = config.model if config.arch in (None, "dcgan") else f"{config.model} --arch {config.arch}"
    command = shlex.join(["python", "benchmarks/speed.py", *argv])
    put(options.results, f"Speed of a step: {model}, {size}, {hardware(device)}", [
        f"`{command}`, {datetime.date.today()}, Python {platform.python_version()}.\n", *lines])
    print(f"\n{hardware(device)}: written into {options.results}")
    return code


if __name__ == "__main__":
    console.run(main)
