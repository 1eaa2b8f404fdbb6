"""What one flag costs per training step: two configurations in turn, in one process.

    python benchmarks/step_time.py --model fastgan --preset cpu --metadata false -- --slae true -- --slae false

Flags before the first -- are for both, then come those of A and of B. Each round times A's steps, then B's, in an
order that changes from round to round, so that a machine whose speed drifts favours neither. Prints the seconds per
step of both (medians) and the ratio A / B: the median over the rounds and the range of its middle half.
"""

import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import distributed  # noqa: E402 - found through the line above
import parameter  # noqa: E402
from data_loader import build_dataset, real_batches  # noqa: E402
from trainer import Trainer  # noqa: E402

SECONDS = 120       # that the comparison lasts, and LEAST rounds at the least
LEAST = 8
TURN = 0.5          # seconds that each side takes in a round, and one step at the least
WARM_UP = 3         # steps


class Side:
    """One configuration: its trainer and its pictures."""

    def __init__(self, argv):
        self.config = parameter.resolve(parameter.parse(["--dataset", "toy", "--num_workers", "0", *argv]))
        self.place = distributed.start(self.config)
        dataset = build_dataset(self.config)
        self.trainer = Trainer(self.config, dataset, self.place)
        self.pictures = real_batches(self.config, dataset, 0, self.place.device)
        self.seconds = []
        self.run(WARM_UP)

    def run(self, steps):
        """Seconds per step over `steps` steps, the device's work included."""
        began = time.perf_counter()
        for _ in range(steps):
            self.trainer.train_step(self.pictures)
        if self.place.device.type == "cuda":
            torch.cuda.synchronize(self.place.device)
        return (time.perf_counter() - began) / steps


def main(argv):
    """Compare the two sides of the command line and print the figures. Returns exit code 0 or a Failure's."""
    try:
        if argv.count("--") != 2:
            raise parameter.UsageError("give the flags of both, --, those of A, --, those of B")
        first = argv.index("--")
        second = argv.index("--", first + 1)
        both, flags = argv[:first], (argv[first + 1:second], argv[second + 1:])
        sides = [Side([*both, *own]) for own in flags]
    except parameter.Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    steps = max(1, round(TURN / sides[0].run(WARM_UP)))
    began, progress = time.perf_counter(), tqdm(unit="round")
    while progress.n < LEAST or time.perf_counter() - began < SECONDS:
        for side in sides if progress.n % 2 else sides[::-1]:
            side.seconds.append(side.run(steps))
        progress.update()
    progress.close()
    a, b = (side.seconds for side in sides)
    ratios = [one / other for one, other in zip(a, b, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4)
    for name, own, seconds in zip("AB", flags, (a, b), strict=True):
        print(f"{name}: {statistics.median(seconds):.4f} s per step  {' '.join(own)}")
    print(f"A / B: {middle:.3f} (middle half of {len(ratios)} rounds of {steps} steps: {low:.3f} to {high:.3f})")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
