"""The largest batch that fits on cards of 4 to 24 GB, by the program's own estimate of memory; needs no card.

    python benchmarks/largest.py [FLAGS of main.py]

Prints a table for each family, as docs/speed.md has it: rows are image sizes, cells the largest power of 2 that fits as
a batch, in bf16 or fp16 / in fp32. A batch of twice that fits with `--accumulate 2`, and so on. The flags go to every
cell of every table: those that all families have, and not what the tables go through.
"""

import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parameter  # noqa: E402 - found through the line above
from device import console  # noqa: E402
from device.distributed import Place  # noqa: E402
from device.precision import Precision  # noqa: E402
from errors import UsageError  # noqa: E402
from processes import exit_code_of  # noqa: E402
from training.memory import MARGIN, estimate  # noqa: E402

CARDS = (4, 6, 8, 12, 16, 24)       # GB
IN_USE = 0.7                        # GiB of a card that driver, CUDA's libraries and a desktop take
ALONE = Place(torch.device("cpu"))
KINDS = {"SAGAN": ("sagan",), "SAGAN, `--arch resnet`": ("sagan", "--arch", "resnet"),
         "SLAE-FastGAN": ("fastgan", "--recon", "lpips")}

OWN = ("model", "imsize", "batch_size", "precision", "dataset")         # what the tables set themselves


def refuse_own(flags):
    """Raise UsageError for flags that the tables set themselves, and for those of one family."""
    for name in parameter.parse(flags):
        families = [model for model, family in parameter.FAMILIES.items() if name in {own.name for own in family.FLAGS}]
        if name in OWN:
            raise UsageError(f"--{name}: the tables set it themselves; leave it out")
        if families:
            raise UsageError(f"--{name}: is for --model {families[0]}, the tables are of all families; leave it out")


def needed(flags, imsize, batch, name):
    """Return the bytes of a step."""
    typed = ("--model", *flags, "--dataset", "toy", "--imsize", str(imsize), "--batch_size", str(batch))
    config = parameter.resolve(parameter.parse(typed), weights_there=lambda *_: True)
    precision = Precision("fp32", ALONE.device)
    precision.name = name
    return estimate(config, ALONE, precision=precision).total


def largest(flags, imsize, name):
    """Return [largest power of 2 or 0, ...], one for each of CARDS."""
    two, four = (needed(flags, imsize, batch, name) for batch in (2, 4))
    slope = (four - two) / 2            # a step's memory grows linearly with its batch
    found = []
    for card in CARDS:
        room = (card * 1e9 - IN_USE * 2**30) / MARGIN
        fits = [2**power for power in range(11) if two + slope * (2**power - 2) <= room]
        found.append(max(fits, default=0))
    return found


def tables(flags):
    """Print a table for each of KINDS. Raises UsageError. Returns exit code 0."""
    refuse_own(flags)
    for title, kind in KINDS.items():
        print(f"\n| {title} | " + " | ".join(f"{card} GB" for card in CARDS) + " |\n|---|" + "---|" * len(CARDS))
        for imsize in parameter.FAMILIES[kind[0]].IMSIZES:
            both = zip(*(largest((*kind, *flags), imsize, name) for name in ("bf16", "fp32")), strict=True)
            cells = [" / ".join(str(batch or "-") for batch in pair) for pair in both]
            print(f"| {imsize} px | " + " | ".join(cells) + " |", flush=True)
    return 0


def main(argv):
    """Run the command line `argv` and return the exit code."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip())
        return 0
    return exit_code_of(lambda: tables(argv))


if __name__ == "__main__":
    console.run(main)
