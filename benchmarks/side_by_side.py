"""The plain published way and this program after equal wall time, on the same pictures and machine, in one picture.

    python benchmarks/side_by_side.py --minutes 10 --image_path DIR [--model sagan] [--seed 0] [--out side_by_side]
                                      [--score "python score.py {real} {fake}"] [-- FLAGS OF main.py FOR THIS PROGRAM]

Left: the published settings, trained by `reference.py` (eager, fp32, nothing shared or fused; FastGAN without
metadata), drawn by G as it trains, as published. Right: `python main.py` with the flags after -- (on a CPU: --preset
cpu), its start included; they go to the drawing, too. Each gets the whole machine for --minutes, one after the other.
Writes side_by_side.png, side_by_side.json and both sets of --samples pictures into --out. The same command again goes
on with what is missing, and --score and --real may be added or changed; of other settings --out is refused.
"""

import argparse
import contextlib
import shlex
import shutil
import signal
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import parameter  # noqa: E402 - found through the line above
import report  # noqa: E402
from ablation_options import Parser, at_least, score_command, some  # noqa: E402
from data_loader import build_dataset, find_dataset, real_batches  # noqa: E402
from dataset import table  # noqa: E402
from device import console, distributed  # noqa: E402
from device.precision import choose_algorithms  # noqa: E402
from errors import DataError, UsageError  # noqa: E402
from gallery.grid import grid_side, save_grid, to_uint8  # noqa: E402
from processes import FOREVER, Children, Stopped, exit_code_of  # noqa: E402
from record import Record  # noqa: E402
from reference import PlainTrainer  # noqa: E402
from storage.folders import FolderLock  # noqa: E402

NAMES = {"plain": "the plain published way", "ours": "this program"}
# of the plain side, by model: it has no features of pictures, from which follows another --recon than the published
PLAIN = {"fastgan": ("--metadata", "false", "--recon", "lpips")}
FOLDERS = (*NAMES, "log", "model_save", "sample")           # in --out; what is unfinished in them is deleted
SHOWN = ("kid", "fd", "coverage")       # of the scores, beneath the grids


class Comparison:
    """Both sides, from the options to the picture. Raises Failure for flags or pictures that cannot work."""

    def __init__(self, options, extra):
        self.options, self.out, self.children = options, options.out, Children(1)
        if Path(options.image_path).resolve() in [path := self.out.resolve(), *path.parents]:
            raise UsageError(f"--out {self.out}: lies in --image_path, and would become training pictures")
        common = ["--dataset", "folder", "--image_path", options.image_path, "--model", options.model, "--seed",
                  str(options.seed)]
        self.config = self._plain_config([*common, "--precision", "fp32"], extra)
        words = [*common, *extra, "--version", "ours"]
        for kind in FOLDERS[2:]:
            words += [f"--{kind}_path", str(self.out / kind)]
        self.training = [*words, "--total_step", str(FOREVER)]
        self.drawing = [*words, "--train", "false", "--num_samples", str(options.samples), "--seed", "0"]
        for command in (self.training, self.drawing):
            try:
                parameter.resolve(parameter.parse(command))
            except UsageError as error:
                raise UsageError(f"{error}\nWhat follows -- goes to main.py's training and to its drawing.") from None
        found = len(table.open_folder(self.config))
        if found < self.config.batch_size:      # find_dataset's advice is for another --batch_size
            raise DataError(f"{found} pictures: the plain side needs {self.config.batch_size}, its batch")
        dataset = find_dataset(self.config)
        self.settings = {
            "minutes": options.minutes, "model": options.model, "seed": options.seed, "samples": options.samples,
            "flags after --": shlex.join(extra), "pictures in --image_path":
            f"{len(dataset)} pictures, {table.fingerprint(dataset, self.config)[:12]}"}

    def _plain_config(self, words, extra):
        """The config of the plain side: published, but for where it finds VGG-16."""
        if self.options.model in PLAIN:
            typed = parameter.parse(extra)
            words = [*words, *PLAIN[self.options.model], "--vgg_weights", typed.get("vgg_weights", "imagenet")]
        return parameter.resolve(parameter.parse([*words, "--log_path", str(self.out / "log")]))

    def do(self):
        """Train, draw and score what is missing; write the record and the picture. Return the exit code."""
        path = self.out / "side_by_side.json"
        taken = [name for name in FOLDERS if (self.out / name).exists()]
        if taken and not path.exists():
            raise UsageError(f"--out {self.out}: holds {taken[0]}/ of something else; use another --out")
        self.record = Record(path, self.settings, "a comparison", "use another --out", hardware=report.hardware())
        self.record.write()             # before there is anything else, which would then be of something else
        try:
            with self.children.signals_handled():
                lines = {side: self._complete(side) for side in NAMES}
        except Stopped:
            print(f"interrupted; the same command goes on with what is missing in {self.out}", file=sys.stderr)
            return 128 + (self.children.signal or signal.SIGTERM)
        report.picture([(NAMES[side], self.out / f"{side}.png", lines[side]) for side in NAMES],
                       self.out / "side_by_side.png")
        return 0

    def _complete(self, side):
        """Do what is missing of a side. Return the lines beneath its grid."""
        if side not in self.record.data:
            print(f"{NAMES[side]}: training for {self.options.minutes:g} min", flush=True)
            shutil.rmtree(self.out / side, ignore_errors=True)          # of a call that was interrupted
            steps = {"plain": self._train_plain, "ours": self._train_ours}[side](time.time())
            self.record.put({"steps": steps, "scores": {}}, side)
        kept = self.record.data[side]
        scores = self._score(side, kept["scores"]) if self.options.score else {}
        found = {"steps": kept["steps"], **scores}
        print(f"{NAMES[side]}: {', '.join(f'{name} {value}' for name, value in found.items())}", flush=True)
        return [f"{kept['steps']:,} steps in {self.options.minutes:g} min",
                *(f"{name} {report.number(scores[name])}" for name in SHOWN if name in scores)]

    def _train_plain(self, began):
        """Train the published settings until --minutes after `began`, then draw. Return the number of steps."""
        config = self.config
        choose_algorithms(config.deterministic)             # as main.py does
        place = distributed.start(config)
        trainer, steps = PlainTrainer(config, place.device), 0
        fixed = torch.randn(self.options.samples, config.z_dim, device=place.device)
        with contextlib.closing(real_batches(config, build_dataset(config), 0, place.device)) as batches:
            while time.time() - began < 60 * self.options.minutes:
                self.children.check()
                trainer.train_step(batches)
                steps += 1
        with torch.no_grad():                               # G in training mode, as published
            images = torch.cat([trainer.G(z)[0] for z in fixed.split(64)])
        save_grid(images[:grid_side(config.imsize) ** 2], self.out / "plain.png")
        folder = self.out / "plain"
        folder.mkdir()
        for number, picture in enumerate(to_uint8(images)):
            Image.fromarray(picture).save(folder / f"{number:06d}.png")
        return steps

    def _train_ours(self, began):
        """Train this program until --minutes after `began`, then draw. Return the number of steps."""
        for kind in FOLDERS[2:]:                            # of a call that was interrupted: it had time already
            shutil.rmtree(self.out / kind, ignore_errors=True)
        log = self.out / "ours.txt"
        self._main(self.training, log, max(0, began + 60 * self.options.minutes - time.time()))
        self._main(self.drawing, log)
        (drawn,) = (self.out / "sample" / "ours").glob("*_generated_seed0")
        drawn.with_suffix(".png").replace(self.out / "ours.png")
        drawn.rename(self.out / "ours")
        return int(drawn.name.partition("_")[0])

    def _main(self, words, log, seconds=None):
        self.children.run("main.py", [sys.executable, ROOT / "main.py", *words], log, seconds=seconds)

    def _score(self, side, kept):
        """{column: number} of a side's pictures by the --score command; `kept` holds those of earlier calls."""
        command, real = self.options.score, self.options.real or self.options.image_path
        key = f"{command} with {real}"
        if key not in kept:
            scores = report.scores_by(command, real, self.out / side, lambda words: self.children.run(
                "--score", words, self.out / "score.txt", capture=True))
            self.record.put(scores, side, "scores", key)
        return kept[key]


def main(argv):
    """Run the command line `argv` and return the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="python benchmarks/side_by_side.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=some("minutes"), required=True, metavar="N", help="wall time of each side")
    add("--image_path", required=True, metavar="DIR", help="folder of training pictures")
    add("--model", default="sagan", metavar="NAME", help="family (default: sagan)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of both (default: 0)")
    add("--samples", type=at_least(64), default=300, metavar="N",
        help="pictures drawn by each, at least 64, which are shown (default: 300)")
    add("--real", metavar="DIR", help="pictures to score against (default: the training pictures)")
    add("--score", type=score_command, metavar="COMMAND", help="as benchmarks/ablation.py's")
    add("--out", type=Path, default=Path("side_by_side"), metavar="DIR", help="folder of all that this writes")

    def do():
        options = parser.parse_args(argv[:split])
        comparison = Comparison(options, argv[split + 1:])
        options.out.mkdir(parents=True, exist_ok=True)
        with contextlib.closing(FolderLock([options.out], f"--out {options.out}")):
            return comparison.do()

    return exit_code_of(do, "--out: ")


if __name__ == "__main__":
    console.run(main)
