"""What one flag costs per training step: two configurations in turn, in one process.

    python benchmarks/step_time.py --model fastgan --preset cpu --metadata false -- --slae true -- --slae false

Flags before the first -- are for both, then come those of A and of B. Each round times A's steps, then B's, in an
order that changes from round to round, so that a machine whose speed drifts favours neither. Prints the seconds per
step of both (medians) and the ratio A / B: the median over the rounds and the range of its middle half.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parameter  # noqa: E402
from data_loader import build_dataset  # noqa: E402 - found through the line above
from device import console, distributed  # noqa: E402
from device.precision import choose_algorithms  # noqa: E402
from errors import UsageError  # noqa: E402
from generate.classes import find_classes  # noqa: E402
from metrics.cost import TimedConfig, alternate, each_ratio  # noqa: E402
from processes import exit_code_of  # noqa: E402


def _side(argv):
    config = parameter.resolve(parameter.parse(["--dataset", "toy", *argv]))
    classes = find_classes(config, build_dataset(config)) if config.conditional else None
    choose_algorithms(config.deterministic)             # as main.py does
    return TimedConfig(config, distributed.start(config), classes=classes)


def compare(argv):
    """Compare the two sides of the command line and print the figures. Returns exit code 0. Raises Failure."""
    if {"-h", "--help"} & set(argv):
        print(__doc__.strip(), "The flags are those of main.py: python main.py --help", sep="\n\n")
        return 0
    if argv.count("--") != 2:
        raise UsageError("give the flags of both, --, those of A, --, those of B")
    first = argv.index("--")
    second = argv.index("--", first + 1)
    both, flags = argv[:first], (argv[first + 1:second], argv[second + 1:])
    sides = [_side([*both, *own]) for own in flags]
    steps = alternate(sides)
    low, middle, high = statistics.quantiles(each_ratio(*sides), n=4)
    for name, own, side in zip("AB", flags, sides, strict=True):
        print(f"{name}: {statistics.median(side.seconds):.4f} s per step  {' '.join(own)}")
    print(f"A / B: {middle:.3f} (middle half of {len(sides[0].seconds)} rounds of {steps} steps: {low:.3f} to "
          f"{high:.3f})")
    return 0


def main(argv):
    """Run the command line `argv` and return the exit code."""
    return exit_code_of(lambda: compare(argv))


if __name__ == "__main__":
    console.run(main)
