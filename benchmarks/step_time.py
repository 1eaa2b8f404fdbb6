"""What one flag costs per training step: two configurations in turn, in one process.

    python benchmarks/step_time.py --model fastgan --preset cpu --metadata false -- --slae true -- --slae false

Flags before the first -- are for both, then come those of A and of B. Each round times A's steps, then B's, in an
order that changes from round to round, so that a machine whose speed drifts favours neither. Prints the seconds per
step of both (medians) and the ratio A / B: the median over the rounds and the range of its middle half. Pictures are
not loaded, so FastGAN needs --metadata false; --deterministic holds for the process, and is for both.
"""

import statistics
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import parameter  # noqa: E402
from data_loader import find_dataset  # noqa: E402 - found through the line above
from device import console, distributed  # noqa: E402
from device.precision import choose_algorithms  # noqa: E402
from errors import UsageError  # noqa: E402
from generate.classes import find_classes  # noqa: E402
from metrics.cost import TimedConfig, alternate, each_ratio  # noqa: E402
from processes import exit_code_of  # noqa: E402


def classes_of(config):
    """Return the Classes that a training of `config` has, or None. Raises DataError."""
    return find_classes(config, find_dataset(config)) if config.conditional else None


def refuse_metadata(config):
    """Raise UsageError for a G that takes features of pictures, of which there are none here."""
    if config.metadata:
        raise UsageError("--metadata true: needs features of pictures, and here are none; give --metadata false, as "
                         "they are one small product a step")


def refuse_deterministic(typed, where):
    """Raise UsageError for `--deterministic` among the flags typed for one of several sides."""
    if "deterministic" in typed:
        raise UsageError(f"--deterministic: holds for the whole process; give it {where}")


def _side(argv, own):
    refuse_deterministic(parameter.parse(own), "before the first --, for both")
    config = parameter.resolve(parameter.parse(["--dataset", "toy", *argv, *own]))
    refuse_metadata(config)
    choose_algorithms(config.deterministic)             # as main.py does
    return TimedConfig(config, distributed.start(config), classes=classes_of(config))


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
    sides = [_side(both, own) for own in flags]
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
