"""Trainings on a GPU that is there for minutes at a time: one command a call, results after every call.

    bash benchmarks/gpu.sh pack FOLDER --celeba ZIP --paintings DIR --classes ZIP --vgg_weights PATH
                                            once, where the data is
    bash benchmarks/gpu.sh OUT celeb        SAGAN on 10,000 pictures of CelebA, the published settings
    bash benchmarks/gpu.sh OUT few          SLAE-FastGAN at 256 px on paintings, against plain FastGAN at equal steps
    bash benchmarks/gpu.sh OUT few100       the same on 100 of the paintings
    bash benchmarks/gpu.sh OUT classes      the SAGAN paper's own networks on CIFAR-10, the published recipe
    bash benchmarks/gpu.sh OUT large        SAGAN on CelebA, `--preset gpu` against the published settings
    ... --rehearsal                         the same commands at a tiny size, for a CPU

`pack` writes what must travel to the machine: archives of pictures, VGG-16 in fp16. The other commands train with it,
end after --seconds, and leave in OUT the report, score curves, grids, attention, the logs, and the pages in a zip. All
but the zip are there soon after the first record, and updated until the end. The runs stay in --runs: the same command
again goes on from their newest checkpoints. Exit codes are main.py's.

How the 515 s of a call are meant to be spent, at 2.3 to 3.1 ms (celeb) and 28 ms (few) a step:

    celeb    35 s to start, unpack, decode; 420 s for 100,000 steps and more, with a score of some 5 s every 10,000;
             60 s for the last score, with swd, which is computed on the CPU
    classes  as celeb; a step has 5 updates of D
    large    35 s to start; 40,000 steps of 64 and 10,000 of 256, equally many pictures, each scored at ten points
    few      35 s to start; 4 slices of 3,000 steps, each some 110 s with its start and 2 scores; swd if time is left
"""

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import re
import shlex
import shutil
import signal
import statistics
import subprocess
import sys
import time
import zipfile
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import report  # noqa: E402 - what it imports is found through the line above
from ablation_options import at_least  # noqa: E402
from dataset.table import CELEBA_CROP  # noqa: E402
from device import console  # noqa: E402
from device.signals import Interrupt  # noqa: E402
from errors import CheckpointError, DataError, UsageError, first_line  # noqa: E402
from flags.scaling import TIMES  # noqa: E402
from gallery import page  # noqa: E402
from gpu_pack import WEIGHTS, pack, shown, unpack  # noqa: E402
from parameter import Config  # noqa: E402
from processes import exit_code_of  # noqa: E402
from storage import checkpoint, score_table  # noqa: E402
from storage.folders import RunFolders, step_name  # noqa: E402
from utils import spread_indices, write_atomically  # noqa: E402

SCORES = "--feature_net vgg16 --metrics fid,kid,pr"     # while training
LAST = "swd"            # only in the last score: it takes the CPU longer than the GPU takes for all others
LEAST = 10              # seconds that are worth to begin a run in
GRACE = 30              # seconds to save in, after SIGINT
REFRESH = 20            # seconds between updates of OUT
PAGES = 14 * 2**20      # bytes of the zip of pages, at most
LARGEST = 2048          # pixels: side of a picture in OUT, at most
TINY = "--batch_size 4 --g_conv_dim 4 --d_conv_dim 4 --z_dim 16 --num_eval 32 --num_workers 0"


@dataclass(frozen=True)
class Experiment:
    """What a command trains: `runs` {version: flags}, each to `steps`, in turn in slices of `slice` steps (0: in one).

    The pictures are `pictures` of those in `archive`, spread evenly, 0 for all, or their center of `crop` px. A score,
    a grid and a checkpoint are written every `every` steps. `again`: a call that finds all done trains `steps` more.
    Training ends `reserve` seconds before the call does. `last`: metrics of the last score alone. `times` {version: n}:
    a step of this run counts as n, as its batches are n times as large; all steps are those of the others.
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
    return replace(experiment, flags=f"{experiment.flags} {size} {TINY}", steps=24, every=6, reserve=20,
                   slice=min(experiment.slice, 12), pictures=40)


# ------------------------------------------------------------------------------------------------------------ train


class Call:
    """One call: it trains in turns until all is done or the time is over, scores, and keeps OUT up to date."""

    def __init__(self, options):
        self.began = time.monotonic()
        self.options = options
        self.experiment = EXPERIMENTS[options.experiment]
        if options.rehearsal:
            self.experiment = rehearsal_of(self.experiment)
        if options.steps:
            self.experiment = replace(self.experiment, steps=options.steps, again=False)
        self.end = self.began + options.seconds
        name = options.experiment + "_rehearsal" * options.rehearsal
        self.folder = options.runs / name
        self.weights = options.pack / WEIGHTS
        self.scores = options.scores                    # None once they have failed
        self.interrupt = Interrupt()
        self.rows, self.notes, self.code = [], [], 0
        self.refreshed = self.began
        self.extra = []
        self.found = {}
        self.ended = False

    def do(self):
        """Train, score, copy. Return the exit code. Raise DataError, OSError."""
        archive = self.options.pack / self.experiment.archive
        for path, flag in ((archive, self.experiment.pack_flag), (self.weights, "--vgg_weights")):
            if not path.is_file():
                raise DataError(f"there is no {shown(path)}: write it with `bash benchmarks/gpu.sh pack "
                                f"{shown(self.options.pack)} {flag} PATH`, or name its folder with --pack")
        self.options.out.mkdir(parents=True, exist_ok=True)
        self.look_around()
        count = unpack(archive, self.folder / "pictures", self.experiment)
        self.notes.append(f"{count:,} pictures of {self.experiment.archive}"
                          + f", center of {self.experiment.crop} px" * bool(self.experiment.crop))
        self.refresh()
        if not (self.options.out / "report.md").is_file():
            raise CheckpointError(f"{self.options.out} cannot be written; name another folder for the results")
        with self.interrupt, self.interrupt.deferred():
            if self.train():
                self.score()
            self.ended = True
            self.refresh(last=True)
        print(f"report: {self.options.out / 'report.md'}", flush=True)
        return 128 + self.interrupt.signal if self.interrupt.signal else self.code

    def look_around(self):
        """Find the optional packages, and what an earlier call left."""
        found = {name: _version(name) for name in ("torchmetrics", "matplotlib")}
        if not found["torchmetrics"] and "fastgan" in self.experiment.flags:
            self.extra = ["--recon", "l1"]
            self.notes.append("without torchmetrics there is no LPIPS: `--recon l1` in all runs")
        self.notes.append(", ".join(f"{name} {version or 'missing'}" for name, version in found.items()))
        self.found = {name: self.step_of(name) for name in self.experiment.runs}
        if any(self.found.values()):
            self.notes.append("from an earlier call: " + ", ".join(
                f"{name} at step {step:,}" for name, step in self.found.items()))
        else:
            self.notes.append("nothing is left of an earlier call: the runs begin at step 0")

    # -------------------------------------------------------------------------------------------------- the runs

    def folders(self, name):
        """The RunFolders of a run."""
        return RunFolders(*(self.folder / kind / name for kind in ("samples", "samples", "logs", "models")))

    def step_of(self, name):
        """The step of the newest checkpoint of a run, 0 without one."""
        return max(self.steps_of(name), default=0)

    def steps_of(self, name):
        """The steps of a run's checkpoints."""
        return {step * self.experiment.times_of(name) for step in checkpoint.steps_in(self.folders(name).models)}

    def shared_flags(self):
        """The flags of main.py that all commands of this call have."""
        where = {"log_path": "logs", "model_save_path": "models", "sample_path": "samples", "cache_path": "cache"}
        paths = [word for flag, kind in where.items() for word in (f"--{flag}", shown(self.folder / kind))]
        return [*paths, "--vgg_weights", shown(self.weights), "--dataset", "folder",
                "--image_path", shown(self.folder / "pictures"), *shlex.split(self.experiment.flags), *self.extra]

    def train(self):
        """Train all runs in slices of equal steps. Return whether none failed and nobody ended the call."""
        experiment = self.experiment
        rounds = min(map(self.step_of, experiment.runs)) // experiment.steps if experiment.again else 0
        goal = experiment.steps * (rounds + 1)
        for until in [*range(experiment.slice, goal, experiment.slice or goal), goal]:
            for name in experiment.runs:
                if self.step_of(name) < until and (code := self.train_slice(name, until)):
                    return code == 130 and not self.interrupt.signal
        return True

    def train_slice(self, name, until):
        """Train a run to a step. Return its exit code."""
        before = self.step_of(name)
        every, total = (self.experiment.own(name, step) for step in (self.experiment.every, until))
        flags = (f"{self.experiment.runs[name]} --total_step {total} --log_step {max(1, every // 100)} "
                 f"--sample_step {every} --model_save_step {every}")
        end = self.end - self.experiment.reserve
        code = self.run(name, f"{flags} {self.scores} --metric_step {every}" if self.scores else flags, end)
        failed = code not in (0, 130) and time.monotonic() < end and not self.interrupt.signal
        if failed and self.scores and self.step_of(name) == before:
            # such as weights that do not fit: a run without scores is worth more than none
            self.notes.append("it is tried without scores")
            self.scores = None
            code = self.run(name, flags, end)
        return code

    def common_grids(self):
        """(the newest step of which every run with grids has one, those runs); (None, []) before the first."""
        steps = {name: {int(path.name.split("_")[0]) * self.experiment.times_of(name)
                        for path in self.folders(name).samples.glob("*_fake.png")} for name in self.experiment.runs}
        begun = [name for name in steps if steps[name]]
        return max(set.intersection(*(steps[name] for name in begun)), default=None) if begun else None, begun

    def score(self):
        """Score the newest checkpoint, of several runs the newest of equal steps, with `swd` too."""
        steps = set.intersection(*map(self.steps_of, self.experiment.runs))
        scores, last = self.scores or f"--metrics {LAST}", self.experiment.last
        if LAST not in scores:
            scores = re.sub(r"(--metrics \S+)", rf"\1,{last}", scores)
        for name in self.experiment.runs if steps else ():
            step = self.experiment.own(name, max(steps))
            self.run(name, f"--mode evaluate --pretrained_model {step} {scores}", self.end - 10)

    def run(self, name, flags, end):
        """Run main.py for a run, told to end at `end`, with OUT kept up to date. Return its exit code."""
        flags = ["--version", name, *shlex.split(flags), *self.options.main_flags]
        command = [sys.executable, "main.py", *self.shared_flags(), *flags]
        began, row = time.monotonic(), [f"`{shlex.join(flags)}`", "–", "runs"]
        self.rows.append(row)
        if self.interrupt.signal or end - began < LEAST:
            row[-1] = "no time was left"
            return 130
        print(shlex.join(command[1:]), flush=True)
        with open(self.folder / "output.txt", "ab+") as output:
            start = output.seek(0, os.SEEK_END)
            # not in a session of its own: there it could outlive a call that is killed, and hold the run's lock
            process = subprocess.Popen(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=output, stderr=output)
            try:
                code = self.watch(process, end)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
            output.seek(start)
            printed = output.read().decode(errors="replace")
        row[1:] = f"{time.monotonic() - began:.0f} s", str(code)
        if code not in (0, 130):
            self.code = self.code or code
            tail = [line for line in re.split(r"[\r\n]+", printed) if line.strip()][-8:]
            self.notes.append(f"**{name} ended with exit code {code}**: `{' / '.join(tail)}`")
            print("\n".join(tail), file=sys.stderr, flush=True)
        return code

    def watch(self, process, end):
        """Wait for a process; after `end`, or a signal, tell it to save and end. Return its exit code."""
        asked = None
        while True:
            try:
                code = process.wait(timeout=0.2)
                return 128 - code if code < 0 else code
            except subprocess.TimeoutExpired:
                pass
            now = time.monotonic()
            if asked is None and (self.interrupt.signal or now > end):
                process.send_signal(signal.SIGINT)
                asked = now
            elif asked is not None and now > asked + GRACE:
                process.kill()
            if asked is None and now > self.refreshed + REFRESH:
                self.refresh()

    # ------------------------------------------------------------------------------------------------- the results

    def refresh(self, last=False):
        """Write into OUT what there is; the zip of the pages with the last. A failure is told in the report."""
        results = (self.copy_pictures, self.draw_curves, self.copy_logs, *[self.zip_pages] * last, self.write_report)
        logs = None
        for write in results:
            try:
                logs = logs or {name: Log(self.folders(name).logs / "metrics.jsonl",
                                          self.experiment.times_of(name)) for name in self.experiment.runs}
                write(logs)
            except Exception as error:                  # the training is worth more than a picture of it
                note = f"**{write.__name__} failed**: {type(error).__name__}: {first_line(error)}"
                self.notes += [note] * (note not in self.notes)
                print(note, file=sys.stderr, flush=True)
        self.refreshed = time.monotonic()

    def copy_logs(self, logs):
        """Copy each run's metrics.jsonl."""
        for name, log in logs.items():
            if log.path.is_file():
                _copy(log.path, self.options.out / f"metrics_{name}.jsonl")

    def draw_curves(self, logs):
        """Write the picture of each score by step, if there are two steps and matplotlib."""
        curves = by_step({name: log.scores for name, log in logs.items()})
        if curves:
            report.curves(curves, self.options.out / "curves.png")

    def copy_pictures(self, logs):
        """Copy the newest grid, of several runs side by side, and attention maps."""
        (step, begun), out = self.common_grids(), self.options.out
        if step is None:
            return

        def of_step(name, pattern):
            return self.folders(name).samples.glob(step_name(self.experiment.own(name, step), pattern))

        grids = [(name, next(of_step(name, "_fake.png")),
                  [f"step {step:,}", *(f"{key} {report.number(value)}" for key, value in
                                       logs[name].scores.get(step, {}).items() if report.sign_of(key))])
                 for name in begun]
        report.picture(grids, out / "grids.png")
        maps = [path for name in begun for path in of_step(name, "_attn_[gs]*.png")]
        if maps:
            _copy(max(maps, key=lambda path: [int(part) for part in re.findall(r"\d+", path.stem)]),
                  out / "attention.png")

    def zip_pages(self, logs):
        """Write a zip of the runs' pages, with as many of their pictures as fit: the newest record, then grids."""
        budget = PAGES // len(self.experiment.runs)
        stage = self.folder / "pages"
        shutil.rmtree(stage, ignore_errors=True)
        for name in logs:
            folders = self.folders(name)
            if not (folders.models / "config.json").is_file():
                continue
            (stage / name).mkdir(parents=True)
            room = budget
            for path in _most_wanted(folders.samples):
                _copy(path, stage / name / path.name)
                room -= (stage / name / path.name).stat().st_size
                if room < 0:
                    (stage / name / path.name).unlink()
                    break
            config = Config.of(json.loads((folders.models / "config.json").read_text(encoding="utf-8")))
            page.write_run_page(replace(folders, samples=stage / name, attention=stage / name), config)
        if not stage.is_dir():
            return
        page.write_overview(stage)

        def write(temporary):
            with zipfile.ZipFile(temporary, "w", zipfile.ZIP_DEFLATED) as archive:
                for path in sorted(file for file in stage.rglob("*") if file.is_file()):
                    archive.write(path, path.relative_to(stage))

        write_atomically(self.options.out / "pages.zip", write)

    def write_report(self, logs):
        """Write report.md."""
        experiment, options = self.experiment, self.options
        seconds = time.monotonic() - self.began
        state = f"ended after {seconds:.0f} s" if self.ended else f"goes on, {seconds:.0f} s have passed"
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        lines = [f"# {experiment.title}, {time.strftime('%F')}", ""]
        if options.rehearsal:
            lines += ["**A rehearsal at a tiny size: its numbers say nothing.**", ""]
        lines += [f"- {card}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores",
                  *(f"- {note}" for note in self.notes), f"- the call of at most {options.seconds} s {state}", "",
                  f"`main.py {shlex.join(self.shared_flags())}` with", "",
                  *report.markdown_table(["flags", "time", "exit code"], self.rows), "",
                  "130: told to end, as the time was over, and saved.", ""]
        lines += [f"A step of {name} counts as {times}, as its batches are so many times as large, but for the seconds "
                  "a step and its logs: these tell which run reaches a score first.\n"
                  for name, times in experiment.times.items()]
        lines += report.markdown_table(["run", "found at step", "now at step", "s/step", "GPU GiB"], [
            [name, f"{self.found[name]:,}", f"{self.step_of(name):,}",
             log.median("sec_per_step"), log.median("gpu_memory_gib")] for name, log in logs.items()])
        lines += ["", *_score_table({name: log.scores for name, log in logs.items()})]
        lines += [f"- {text}" for text in dict.fromkeys(text for log in logs.values() for text in log.protocols)]
        floors = {key: report.number(value) for log in logs.values() for key, value in log.floors.items()}
        if floors:
            lines.append("- of two halves of the real pictures: " + ", ".join(map(" ".join, floors.items())))
        for name in ("curves", "grids", "attention"):
            if (options.out / f"{name}.png").is_file():
                lines += ["", f"![{name}]({name}.png)"]
        text = "\n".join(lines) + "\n"
        write_atomically(options.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


class Log:
    """What a metrics.jsonl holds: `scores` {step: {score: value}}, their `floors`, their `protocols`, other lines.

    One of its steps counts as so many `times`.
    """

    def __init__(self, path, times=1):
        self.path, self.scores, self.floors, self.protocols, self.lines = path, {}, {}, {}, []
        for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else ():
            entry = json.loads(line) if line.endswith("\n") else {}       # the last one may be in the making
            if "protocol" in entry:
                numbers = {key: value for key, value in entry.items() if isinstance(value, (int, float))
                           and key != "step" and not key.endswith(score_table.BESIDE)}
                self.floors |= {key: numbers.pop(key) for key in list(numbers) if key.endswith("_floor")}
                self.scores.setdefault(entry["step"] * times, {}).update(numbers)
                self.protocols[entry["protocol"]] = None
            else:
                self.lines.append(entry)

    def median(self, key):
        """The median of a number of the training lines as text; the first line holds the warm-up."""
        values = [entry[key] for entry in self.lines[1:] if key in entry]
        return report.number(statistics.median(values)) if values else "–"


def by_step(runs):
    """{step: {run: {seed: {score: value}}}} as report.curves takes it, of scores with a curve: of two steps or more."""
    steps = sorted({step for scores in runs.values() for step in scores})
    drawn = {key for scores in runs.values() for key in set().union(*scores.values())
             if sum(key in numbers for numbers in scores.values()) > 1}
    return drawn and {step: {name: {0: {key: value for key, value in scores[step].items() if key in drawn}}
                   for name, scores in runs.items() if step in scores} for step in steps}


def _score_table(runs):
    """Lines of a table of all scores by step and run."""
    keys = list(dict.fromkeys(key for scores in runs.values() for numbers in scores.values() for key in numbers))
    rows = [[f"{step:,}", name, *(report.number(scores[step][key]) if key in scores[step] else "–" for key in keys)]
            for step in sorted({step for scores in runs.values() for step in scores})
            for name, scores in runs.items() if step in scores]
    return [*report.markdown_table(["step", "run", *keys], rows), ""] if rows else ["There is no score yet.", ""]


def _most_wanted(folder):
    """The pictures of a run in the order in which its page needs them."""
    records = sorted(folder.glob("[0-9]*.png"))
    newest = records[-1].name.split("_")[0] if records else ""
    grids = [path for path in records if path.name.endswith("_fake.png")]
    ranked = [folder / "real.png", *(path for path in records if path.name.startswith(newest)),
              *(grids[i] for count in (2, 4, 8, len(grids)) for i in spread_indices(count, len(grids))),
              *reversed(records)]
    return [path for path in dict.fromkeys(ranked) if path.is_file()]


def _copy(source, target):
    """Copy a file, a picture of more than LARGEST pixels at a reduced size."""
    def write(temporary):
        if source.suffix == ".png":
            with Image.open(source) as image:
                if max(image.size) > LARGEST:
                    image = image.convert("RGB")
                    image.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
                    image.save(temporary, "PNG")
                    return
        shutil.copyfile(source, temporary)

    write_atomically(target, write)


def _version(package):
    """The version of an installed package, None if it cannot be imported."""
    try:
        return importlib.util.find_spec(package) and importlib.metadata.version(package)
    except (ImportError, ValueError):
        return None


# ---------------------------------------------------------------------------------------------------- command line


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = re.sub(r"^argument (--[a-z_]+)", r"\1", message)
        raise UsageError(f"{message}; {self.usage}")


def _folder(text):
    return Path(text).resolve()


def parse(argv):
    """The options of a call. Raise UsageError."""
    if argv[:1] == ["pack"]:
        parser = _Parser(usage="bash benchmarks/gpu.sh pack FOLDER --celeba ZIP --paintings DIR --classes ZIP "
                               "--vgg_weights PATH",
                         allow_abbrev=False, description="Write what must travel to a machine without network.")
        parser.add_argument("folder", type=_folder, help="what will travel; gpu_pack is ignored by git")
        parser.add_argument("--celeba", metavar="ZIP", help="CelebA's aligned pictures: 10,000 of them, at half size")
        parser.add_argument("--paintings", metavar="DIR", help="pictures for few and few100, at 256 px")
        parser.add_argument("--classes", metavar="ZIP", help="CIFAR-10's pictures, a folder for each class")
        parser.add_argument("--vgg_weights", metavar="PATH", help="VGG-16, written in fp16")
        return parser.parse_args(argv[1:])
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser(usage="bash benchmarks/gpu.sh OUT celeb|few|few100|classes|large [--flag VALUE ...] "
                           "[-- FLAGS OF main.py]",
                     allow_abbrev=False, description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("out", type=_folder, help="folder of the results, at most 7 files")
    parser.add_argument("experiment", choices=[*EXPERIMENTS], help="what is trained")
    parser.add_argument("--pack", type=_folder, default=ROOT / "gpu_pack", metavar="DIR", help="what pack has written")
    parser.add_argument("--runs", type=_folder, default=ROOT / "gpu_runs", metavar="DIR",
                        help="the runs, from call to call (default: gpu_runs, which git ignores)")
    parser.add_argument("--seconds", type=at_least(1), default=515, metavar="N",
                        help="length of the call (default: 515)")
    parser.add_argument("--steps", type=at_least(1), metavar="N",
                        help="train to this step (default: celeb 300000, classes 100000, few and few100 6000 more than "
                             "there are)")
    parser.add_argument("--scores", default=SCORES, metavar="FLAGS", help=f"flags of the scores (default: '{SCORES}')")
    parser.add_argument("--rehearsal", action="store_true", help="the same at a tiny size")
    options = parser.parse_args(argv[:split])
    try:
        shlex.split(options.scores)
    except ValueError as error:
        raise UsageError(f"--scores {options.scores!r}: {error}") from None
    options.main_flags = argv[split + 1:]
    return options


def main(argv):
    """Run the command line `argv` and return the exit code."""
    def do():
        options = parse(argv)
        return pack(options) if argv[0] == "pack" else Call(options).do()

    return exit_code_of(do)


if __name__ == "__main__":
    console.run(main)
