"""How fast real pictures come: torchvision's ImageFolder against this program's loader, cached and not.

    python benchmarks/loading.py [--image_path DIR] [--imsize 64] [--batch_size 64] [--num_workers 2]

Without --image_path 20,000 JPEGs of 178x218, CelebA's size, are drawn into a temporary folder first. All sides end in
float batches in [-1, 1], mirrored at random, on the GPU if there is one; they take turns, in an order that changes
from round to round. Prints a table: pictures per second (median over the rounds) and the ratio to ImageFolder (median
and the range of its middle half).
"""

import argparse
import shutil
import statistics
import sys
import tempfile
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import data_loader  # noqa: E402 - found through the line above
import parameter  # noqa: E402
from dataset.workers import cores  # noqa: E402
from device import console  # noqa: E402
from errors import DataError  # noqa: E402
from metrics.cost import alternate, each_ratio, hardware  # noqa: E402
from processes import exit_code_of  # noqa: E402

DRAWN = 20_000  # pictures
SIZE = (178, 218)
PAUSE = 0.5  # seconds, in which the workers of the side before fill their queues and then rest


def _draw(job):
    folder, first, count = job
    for number in range(first, first + count):
        rng = np.random.default_rng(number)
        shapes = Image.fromarray(rng.integers(0, 256, (6, 6, 3), np.uint8)).resize(SIZE, Image.Resampling.BICUBIC)
        grain = rng.normal(0, 6, (SIZE[1], SIZE[0], 1))         # or the JPEGs would be far smaller than photographs
        picture = np.clip(np.asarray(shapes) + grain, 0, 255).astype(np.uint8)
        Image.fromarray(picture).save(folder / f"{number:06}.jpg", quality=90)


def draw(folder, count=DRAWN):
    """Write `count` JPEGs into a folder below `folder`."""
    folder = folder / "drawn"
    folder.mkdir()
    step = 500
    with Pool(cores()) as pool:
        pool.map(_draw, [(folder, first, min(step, count - first)) for first in range(0, count, step)], chunksize=1)


class TimedLoader:
    """One way to load: `open()` gives an endless iterator over batches; `seconds` per batch, a number for each round.

    `reopen`: it is opened again for every round.
    """

    def __init__(self, name, open, options, device, reopen=False):
        self.name, self.open, self.options, self.device, self.reopen = name, open, options, device, reopen
        self.batches, self.seconds = None, []

    def run(self, steps):
        """Seconds per batch over `steps` batches, after those that were prefetched."""
        if self.batches is None or self.reopen:
            self.close()
            self.batches = self.open()
        time.sleep(PAUSE)
        for _ in range(2 * self.options.num_workers + 1):
            next(self.batches)
        self._wait()
        began = time.perf_counter()
        for _ in range(steps):
            next(self.batches)
        self._wait()
        return (time.perf_counter() - began) / steps

    def _wait(self):
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def close(self):
        """End its workers."""
        if hasattr(self.batches, "close"):
            self.batches.close()
        self.batches = None


def image_folder(options, root, device):
    """Endless batches by torchvision and a plain DataLoader."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    steps = transforms.Compose([
        transforms.Resize(options.imsize), transforms.CenterCrop(options.imsize), transforms.RandomHorizontalFlip(),
        transforms.ToTensor(), transforms.Normalize([0.5] * 3, [0.5] * 3)])
    folder = ImageFolder(root, steps)
    if len(folder) < options.batch_size:                # it would give no batch, without end
        raise DataError(f"--batch_size {options.batch_size} is more than the {len(folder)} pictures in {root}; use "
                        f"--batch_size {len(folder)} or less")
    loader = torch.utils.data.DataLoader(
        folder, options.batch_size, shuffle=True, drop_last=True, num_workers=options.num_workers,
        pin_memory=device.type == "cuda", persistent_workers=options.num_workers > 0)
    while True:
        for images, _ in loader:
            yield images.to(device, non_blocking=True)


def ours(options, root, device, place, cached):
    """Endless batches by this program, with or without a cache of decoded pictures, in the folder `place`."""
    cache = ("--cache", "on", "--cache_dir", str(place)) if cached else ("--cache", "off")
    config = parameter.resolve(parameter.parse([
        "--dataset", "folder", "--image_path", str(root), "--hflip", "true", "--check_data", "header",
        "--cache_path", str(place), *cache,
        *(f"--{name}={getattr(options, name)}" for name in ("imsize", "batch_size", "num_workers"))]))
    return data_loader.real_batches(config, data_loader.build_dataset(config), 0, device)


def filled(options, root, device, place):
    """The same with the cache complete: every picture is asked for once first."""
    ours_at = ours(options, root, device, place, cached=True)
    dataset = ours_at.samples.dataset
    for part in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
        dataset.load_batch(part)
    ours_at.close()
    return ours(options, root, device, place, cached=True)


def sides_of(options, root, scratch, device):
    """The ways to load, the reference first."""
    def fresh():
        for former in scratch.glob("first*"):           # a cache of all pictures each, one a round
            shutil.rmtree(former, ignore_errors=True)
        return ours(options, root, device, Path(tempfile.mkdtemp(prefix="first", dir=scratch)), cached=True)

    workers = f"{options.num_workers} workers"
    here = " on the GPU" if device.type == "cuda" else ""
    ways = {
        f"torchvision ImageFolder, DataLoader, {workers}": lambda: image_folder(options, root, device),
        f"no cache, {workers}": lambda: ours(options, root, device, scratch, cached=False),
        f"first epoch, filling the cache, {workers}": fresh,
        f"later epochs and runs, from the cache{here}": lambda: filled(options, root, device, scratch),
    }
    return [TimedLoader(name, open, options, device, reopen=open is fresh) for name, open in ways.items()]


def compare(argv):
    """Compare the ways to load and print the table. Returns exit code 0. Raises Failure, OSError."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--image_path", type=Path, help="folder of folders of pictures, as ImageFolder wants it")
    for name, default in (("imsize", 64), ("batch_size", 64), ("num_workers", 2)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(argv)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    with tempfile.TemporaryDirectory() as scratch:
        scratch = Path(scratch)
        root = options.image_path or scratch / "pictures"
        if not options.image_path:
            print(f"drawing {DRAWN:,} JPEGs of {SIZE[0]}x{SIZE[1]}")
            root.mkdir()
            draw(root)
        sides = sides_of(options, root, scratch, device)
        try:
            alternate(sides)
        finally:
            for side in sides:
                side.close()
    print(f"\n{options.imsize} px, batch {options.batch_size}, {hardware(device)}\n")
    print("| loader | pictures/s | times ImageFolder (middle half of the rounds) |\n|---|---|---|")
    for side in sides:
        low, middle, high = (statistics.quantiles(each_ratio(sides[0], side), n=4) if side is not sides[0]
                             else (1, 1, 1))
        print(f"| {side.name} | {options.batch_size / statistics.median(side.seconds):,.0f} | "
              f"{middle:.2f} ({low:.2f} to {high:.2f}) |")
    return 0


def main(argv):
    """Run the command line `argv` and return the exit code."""
    return exit_code_of(lambda: compare(argv))


if __name__ == "__main__":
    console.run(main)
