"""The trainings of `bash benchmarks/gpu.sh OUT celeb|few|few100|small|classes|large`, and where their runs are."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: bash benchmarks/gpu.sh --help")

import sys
from dataclasses import dataclass, field, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402 - what it imports is found through the line above
from dataset.table import CELEBA_CROP  # noqa: E402
from flags.scaling import TIMES  # noqa: E402
from storage import checkpoint  # noqa: E402
from storage.folders import RunFolders  # noqa: E402

LAST = "swd"            # only in the last score: it takes the CPU longer than the GPU takes for all others
TINY = "--batch_size 4 --g_conv_dim 4 --d_conv_dim 4 --z_dim 16 --num_eval 32 --num_workers 0"


@dataclass(frozen=True)
class Experiment:
    """What a command trains: `runs` {version: flags}, each to `steps`, in turn in slices of `slice` steps (0: in one).

    The pictures are `pictures` of those in `archive`, spread evenly, 0 for all, or their center of `crop` px. A score,
    a grid and a checkpoint are written every `every` steps. `again`: a call that finds all done trains `steps` more.
    Training ends `reserve` seconds before the call does. `last`: metrics of the last score alone. `times` {version: n}:
    a step of this run counts as n, as its batches are n times as large; all steps are those of the others. `note`: what
    the report says of the scores.
    """

    title: str
    archive: str
    pack_flag: str
    runs: dict
    flags: str
    steps: int
    every: int
    reserve: int
    slice: int = 0
    again: bool = False
    pictures: int = 0
    crop: int = 0
    last: str = LAST
    times: dict = field(default_factory=dict)
    note: str = ""

    def times_of(self, name):
        """Return as how many steps one of this run counts."""
        return self.times.get(name, 1)

    def own(self, name, step):
        """Return the step of a run itself that `step` is."""
        return step // self.times_of(name)


_FEW = Experiment(
    "SLAE-FastGAN against plain FastGAN at 256 px", "paintings.zip", "--paintings",
    {report.BASELINE: "--slae false --metadata false", "both": "--slae true --metadata true"},
    "--model fastgan --imsize 256 --batch_size 8 --num_eval 2000 --keep_checkpoints 5",
    steps=6000, slice=3000, every=1500, reserve=15, again=True)
EXPERIMENTS = {
    # --compile auto would take a minute or two of every call, as much as it gains in one
    "celeb": Experiment("SAGAN on CelebA, the published settings", "celeba.zip", "--celeba", {"sagan_celeb": ""},
                        "--adv_loss hinge --compile false --num_eval 5000 --keep_checkpoints 2",
                        steps=300_000, every=10_000, reserve=60, crop=round(CELEBA_CROP / 2)),
    "few": _FEW,
    "few100": replace(_FEW, title=f"{_FEW.title}, on 100 pictures", pictures=100),
    "small": replace(_FEW, title="FastGAN by --preset small against plain FastGAN, both at 256 px, on 100 pictures",
                     runs={report.BASELINE: "--slae false --metadata false", "small": "--preset small"}, pictures=100,
                     note="D of small was trained on features of VGG-16, so scores by VGG-16 flatter it: swd and the "
                     "grids decide"),
    # every 2,000 steps, as the public log to compare with has its FID at 2,000, 4,000, 6,000, 10,000, 20,000
    "classes": Experiment("The SAGAN paper's own networks on CIFAR-10, the published recipe", "classes.zip",
                          "--classes", {"sagan_classes": ""},
                          "--arch resnet --imsize 32 --conditional true --compile false --num_eval 5000 "
                          "--keep_checkpoints 2", steps=100_000, every=2000, reserve=80, last=f"{LAST},ifid"),
    "large": Experiment("SAGAN on CelebA, batches of 256 by --preset gpu against the published 64", "celeba.zip",
                        "--celeba", {"published": "", "gpu": "--preset gpu"},
                        "--adv_loss hinge --compile false --num_eval 5000 --keep_checkpoints 2", steps=40_000,
                        every=4000, reserve=30, crop=round(CELEBA_CROP / 2), times={"gpu": TIMES}),
}


def rehearsal_of(experiment):
    """The same at a tiny size."""
    size = "--imsize 64" if "fastgan" in experiment.flags else "--imsize 32"
    if "small" in experiment.runs:
        size = "--imsize 128"               # as at 256: up to 64 the preset is another
    return replace(experiment, flags=f"{experiment.flags} {size} {TINY}", steps=24, every=6, reserve=20,
                   slice=min(experiment.slice, 12), pictures=40)


class Runs:
    """The runs of an experiment in a folder, from call to call."""

    def __init__(self, experiment, folder):
        self.experiment, self.folder = experiment, folder

    def folders(self, name):
        """The RunFolders of a run."""
        return RunFolders(*(self.folder / kind / name for kind in ("samples", "samples", "logs", "models")))

    def step_of(self, name):
        """The step of the newest checkpoint of a run, 0 without one."""
        return max(self.steps_of(name), default=0)

    def steps_of(self, name):
        """The steps of a run's checkpoints."""
        return {step * self.experiment.times_of(name) for step in checkpoint.steps_in(self.folders(name).models)}

    def common_grids(self):
        """(the newest step of which every run with grids has one, those runs); (None, []) before the first."""
        steps = {name: {int(path.name.split("_")[0]) * self.experiment.times_of(name)
                        for path in self.folders(name).samples.glob("*_fake.png")} for name in self.experiment.runs}
        begun = [name for name in steps if steps[name]]
        return max(set.intersection(*(steps[name] for name in begun)), default=None) if begun else None, begun
