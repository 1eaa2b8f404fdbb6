"""Trainings on a GPU that is there for minutes at a time: one command a call, results after every call.

    bash benchmarks/gpu.sh pack FOLDER --celeba ZIP --paintings DIR --classes ZIP --vgg_weights PATH
                                            once, where the data is
    bash benchmarks/gpu.sh OUT celeb        SAGAN on 10,000 pictures of CelebA, the published settings
    bash benchmarks/gpu.sh OUT few          SLAE-FastGAN at 256 px on paintings, against plain FastGAN at equal steps
    bash benchmarks/gpu.sh OUT few100       the same on 100 of the paintings
    bash benchmarks/gpu.sh OUT small        `--preset small` against plain FastGAN at 256 px, on 100 of the paintings
    bash benchmarks/gpu.sh OUT classes      the SAGAN paper's own networks on CIFAR-10, the published recipe
    bash benchmarks/gpu.sh OUT large        SAGAN on CelebA, `--preset gpu` against the published settings
    ... --rehearsal                         the same commands at a tiny size, for a CPU

`pack` writes what must travel to the machine: archives of pictures, VGG-16 in fp16. The other commands train with it,
end after --seconds, and leave in OUT the report, score curves, grids, attention (small has none), the logs, and the
pages in a zip. All but the zip are there soon after the first record, and updated until the end. The runs stay in
--runs: the same command again goes on from their newest checkpoints. Exit codes are main.py's.

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
import os
import re
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from ablation_options import at_least  # noqa: E402 - what it imports is found through the line above
from device import console  # noqa: E402
from device.signals import Interrupt  # noqa: E402
from errors import CheckpointError, DataError, UsageError  # noqa: E402
from gpu_experiments import EXPERIMENTS, LAST, Runs, rehearsal_of  # noqa: E402
from gpu_pack import WEIGHTS, pack, shown, unpack  # noqa: E402
from gpu_results import Results  # noqa: E402
from processes import exit_code_of  # noqa: E402

SCORES = "--feature_net vgg16 --metrics fid,kid,pr"     # while training
LEAST = 10              # seconds that are worth to begin a run in
GRACE = 30              # seconds to save in, after SIGINT


class Call:
    """One call: it trains in turns until all is done or the time is over, scores, and keeps OUT up to date."""

    def __init__(self, options):
        self.end = time.monotonic() + options.seconds
        self.options = options
        self.experiment = EXPERIMENTS[options.experiment]
        if options.rehearsal:
            self.experiment = rehearsal_of(self.experiment)
        if options.steps:
            self.experiment = replace(self.experiment, steps=options.steps, again=False)
        self.folder = options.runs / (options.experiment + "_rehearsal" * options.rehearsal)
        self.runs = Runs(self.experiment, self.folder)
        self.results = Results(self.runs, options.out, options.seconds, options.rehearsal)
        self.notes = self.results.notes
        self.weights = options.pack / WEIGHTS
        self.scores = options.scores                    # None once they have failed
        self.interrupt = Interrupt()
        self.extra, self.code = [], 0

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
        self.results.shared = self.shared_flags()
        self.results.refresh()
        if not (self.options.out / "report.md").is_file():
            raise CheckpointError(f"{self.options.out} cannot be written; name another folder for the results")
        with self.interrupt, self.interrupt.deferred():
            if self.train():
                self.score()
            self.results.refresh(last=True)
        print(f"report: {self.options.out / 'report.md'}", flush=True)
        return 128 + self.interrupt.signal if self.interrupt.signal else self.code

    def look_around(self):
        """Find the optional packages, and what an earlier call left."""
        versions = {name: _version(name) for name in ("torchmetrics", "matplotlib")}
        if not versions["torchmetrics"] and "fastgan" in self.experiment.flags:
            self.extra = ["--recon", "l1"]
            self.notes.append("without torchmetrics there is no LPIPS: `--recon l1` in all runs")
        self.notes += [self.experiment.note] * bool(self.experiment.note)
        self.notes.append(", ".join(f"{name} {version or 'missing'}" for name, version in versions.items()))
        found = self.results.found
        if any(found.values()):
            self.notes.append("from an earlier call: " + ", ".join(
                f"{name} at step {step:,}" for name, step in found.items()))
        else:
            self.notes.append("nothing is left of an earlier call: the runs begin at step 0")

    # -------------------------------------------------------------------------------------------------- the runs

    def shared_flags(self):
        """The flags of main.py that all commands of this call have."""
        where = {"log_path": "logs", "model_save_path": "models", "sample_path": "samples", "cache_path": "cache"}
        paths = [word for flag, kind in where.items() for word in (f"--{flag}", shown(self.folder / kind))]
        return [*paths, "--vgg_weights", shown(self.weights), "--dataset", "folder",
                "--image_path", shown(self.folder / "pictures"), *shlex.split(self.experiment.flags), *self.extra]

    def train(self):
        """Train all runs in slices of equal steps. Return whether none failed and nobody ended the call."""
        experiment = self.experiment
        rounds = min(map(self.runs.step_of, experiment.runs)) // experiment.steps if experiment.again else 0
        goal = experiment.steps * (rounds + 1)
        for until in [*range(experiment.slice, goal, experiment.slice or goal), goal]:
            for name in experiment.runs:
                if self.runs.step_of(name) < until and (code := self.train_slice(name, until)):
                    return code == 130 and not self.interrupt.signal
        return True

    def train_slice(self, name, until):
        """Train a run to a step. Return its exit code."""
        before = self.runs.step_of(name)
        every, total = (self.experiment.own(name, step) for step in (self.experiment.every, until))
        flags = (f"{self.experiment.runs[name]} --total_step {total} --log_step {max(1, every // 100)} "
                 f"--sample_step {every} --model_save_step {every}")
        end = self.end - self.experiment.reserve
        code = self.run(name, f"{flags} {self.scores} --metric_step {every}" if self.scores else flags, end)
        failed = code not in (0, 130) and time.monotonic() < end and not self.interrupt.signal
        if failed and self.scores and self.runs.step_of(name) == before:
            # such as weights that do not fit: a run without scores is worth more than none
            self.notes.append("it is tried without scores")
            self.scores = None
            code = self.run(name, flags, end)
        return code

    def score(self):
        """Score the newest checkpoint, of several runs the newest of equal steps, with `swd` too."""
        steps = set.intersection(*map(self.runs.steps_of, self.experiment.runs))
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
        self.results.rows.append(row)
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
            if asked is None and self.results.is_old():
                self.results.refresh()


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
        parser.add_argument("--paintings", metavar="DIR", help="pictures for few, few100 and small, at 256 px")
        parser.add_argument("--classes", metavar="ZIP", help="CIFAR-10's pictures, a folder for each class")
        parser.add_argument("--vgg_weights", metavar="PATH", help="VGG-16, written in fp16")
        return parser.parse_args(argv[1:])
    split = argv.index("--") if "--" in argv else len(argv)
    parser = _Parser(usage="bash benchmarks/gpu.sh OUT celeb|few|few100|small|classes|large [--flag VALUE ...] "
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
                        help="train to this step (default: celeb 300000, classes 100000, few, few100 and small 6000 "
                             "more than there are)")
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
