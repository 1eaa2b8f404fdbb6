"""The ablation of SLAE-FastGAN as one command: FastGAN, with SLAE, with metadata, with both.

    python benchmarks/ablation.py --image_path DIR --imsize 64 --steps 20000 --seeds 8
    ... --minutes 15 instead of --steps                 equal time, for variants whose steps take unequally long
    ... --until kid --most 16                           more seeds, until the intervals of kid exclude 0
    ... --score "python score.py {real} {fake}"         more columns, from a program that prints a JSON object
    ... --evaluate "kid --feature_net vgg16"            columns of --mode evaluate, at the last step
    ... --variant "narrow=--z_dim 64"                   one more arm: SLAE-FastGAN with these flags
    ... --model sagan --variant "plain=--g_attn none --d_attn none"     arms of another model
    ... -- --preset cpu --batch_size 16                 what follows -- goes to every run of main.py

Trains every variant at equal steps (or time) and seeds, each as its own `python main.py`, scores what it draws at
--points steps (or times) of each run, and writes to --out: ablation.md (tables of means and spreads and of every seed,
paired differences with their 95 % intervals, and what they say of the paper's claims), differences.png, curves.png,
ablation.png (the variants' grids side by side), and the runs' samples/, logs/, models/. Runs of one seed are pairs:
what they have in common starts with the same weights and sees the same batches of real pictures. It goes seed by seed,
so that one that ends early has every variant of the first seeds. The same command again goes on: nothing is trained,
drawn or scored twice. Exit codes are main.py's; a run that fails hands on its own.
"""

import contextlib
import json
import os
import re
import shlex
import shutil
import signal
import sys
import threading
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import data_loader  # noqa: E402
import parameter  # noqa: E402
import report  # noqa: E402 - what it imports is found through the line above
from ablation_options import DRAWS, Variant, parse  # noqa: E402
from dataset import table  # noqa: E402
from device import console  # noqa: E402
from device.distributed import Place  # noqa: E402
from errors import DataError, Failure, UsageError  # noqa: E402
from metrics import evaluate, swd  # noqa: E402
from processes import FOREVER, Children, Stopped, exit_code_of  # noqa: E402
from record import Record  # noqa: E402
from storage import checkpoint  # noqa: E402
from storage.folders import FolderLock  # noqa: E402
from utils import as_rgb, write_atomically  # noqa: E402

MAIN = ROOT / "main.py"
MODEL = ("--model", "fastgan")
RECORDS = 10        # grids per run


@dataclass(frozen=True)
class Run:
    """One training: a variant with a seed."""

    variant: Variant
    seed: int

    @property
    def name(self):
        return f"{self.variant.slug}_seed{self.seed}"


class Ablation:
    """Everything from the options to the report."""

    def __init__(self, options, extra, argv):
        self.options, self.extra, self.argv = options, extra, argv
        self.model = ("--model", options.model) if options.model else MODEL
        self.out, self.defaults = Path(options.out), ()
        # as the runs see the pictures: --fit, --max_pixels, what is left out, values of more than 8 bits
        config = self._config("--version", f"{options.variants[0].slug}_seed0")        # whose lists they will be
        self.dataset = data_loader.open_dataset(config)
        fingerprint = table.fingerprint(self.dataset, config)[:12]
        self.unit, self.points = points_of(options)                 # steps or minutes at which runs are scored
        self.end = self.points[-1]
        self.runs = []
        path = self.out / "ablation.json"
        if options.minutes and (self.out / "models").exists() and not path.exists():
            raise DataError(f"{path} is gone, which says when the runs there began; move {self.out} away")
        hint = f"move {self.out} away" if options.minutes else "delete it to score the runs again"
        self.record = Record(path, {
            "imsize": options.imsize, "flags after --": shlex.join([*(self.model if options.model else ()), *extra]),
            "pictures in --image_path": f"{len(self.dataset)} pictures, {fingerprint}",
            "minutes": f"{self.end} in {len(self.points)} points" if options.minutes else ""},
            "an ablation", hint, parameters={}, scores={})
        self.children = Children(options.jobs)
        self._report_lock = threading.Lock()

    def do(self):
        """The whole of it. Returns the exit code. Raises Failure."""
        try:
            with self.children.signals_handled():
                self._check_flags()
                self._write_real_pictures()
                self._fill_caches()
                self._complete_seeds()
        except Stopped:
            print(f"interrupted; the same command goes on with what is in {self.out}", file=sys.stderr)
            return 128 + (self.children.signal or signal.SIGTERM)
        say("\n" + "\n".join(self.report()))
        return 0

    def _complete_seeds(self):
        """Complete the runs of all --seeds, and with --until of more."""
        variants, options = self.options.variants, self.options
        self._complete_all([Run(variant, seed) for seed in range(options.seeds) for variant in variants])
        for seed in range(options.seeds, options.most if options.until else 0):
            open_ones = self._undecided(variants)
            if not open_ones:
                break
            say(f"seed {seed}: the interval of {options.until} includes 0 for "
                f"{', '.join(variant.name for variant in open_ones)}")
            self._complete_all([Run(variant, seed) for variant in variants
                                if variant.name == report.BASELINE or variant in open_ones])

    def _complete_all(self, runs):
        """Complete these runs, `--jobs` at once. Raises the first error."""
        self.runs += runs
        with ThreadPoolExecutor(self.options.jobs) as pool:
            futures = [pool.submit(self._complete, run) for run in runs]
            wait(futures, return_when=FIRST_EXCEPTION)
            errors = [future.exception() for future in futures if future.done() and future.exception()]
            if errors:
                self.children.stop()
        for error in errors:
            if not isinstance(error, Stopped):
                raise error
        self.children.check()

    def _undecided(self, variants):
        """The variants whose paired difference of --until from the baseline may be 0, as its interval includes it."""
        results, column = self._results(self.end), self.options.until
        baseline = results[report.BASELINE]
        intervals = {variant: report.paired_interval(baseline, results[self._label(variant, self._draws(variant)[0])],
                                                     column) for variant in variants if variant.name != report.BASELINE}
        return [variant for variant, interval in intervals.items() if not interval or interval[1] <= 0 <= interval[2]]

    # ------------------------------------------------------------------------------------------- preparations

    def _main(self, variant, *flags):
        """A command line of main.py. What the user passes on comes last and wins over what is only a default."""
        options = self.options
        return [sys.executable, MAIN, *self.model, "--dataset", "folder", "--image_path", options.image_path,
                "--imsize", options.imsize, "--log_path", self.out / "logs", "--model_save_path", self.out / "models",
                *flags, *(() if "--preset" in variant.flags else self.defaults), *self.extra, *variant.flags]

    def _config(self, *flags, variant=Variant("", ())):     # noqa: B008 - a frozen one
        """The config that main.py has with these flags, in a run of no variant or of this one."""
        return parameter.resolve(parameter.parse([str(word) for word in self._main(variant, *flags)[2:]]))

    def _log(self, name):
        return self.out / "output" / f"{name}.txt"

    def _check_flags(self):
        """Check before hours of training that the flags work in all that follows it, and count the parameters.

        The record has the flags only then: what was refused may be mended.
        """
        if self.options.evaluate:
            config = self._config("--mode", "evaluate", *self._metrics)
            evaluate.load(config, Place(torch.device("cpu")))           # raises if weights are missing
        recons = set()
        for variant in self.options.variants:
            known, now = self.record.data.get("variants", {}), shlex.join(variant.flags)
            self.record.refuse_other(f"flags of {variant.name}", known.get(variant.slug, now), now)
            self._config("--train", "false", "--num_samples", self.options.samples, variant=variant)
            recons.add(getattr(self._config(variant=variant), "recon", None))
        if len(recons) > 1 and "recon" not in self._varied():
            self.defaults = "--recon", "lpips"          # the variants with metadata download VGG-16 for that, too
        counts = {variant: self._count_parameters(variant) for variant in self.options.variants
                  if variant.slug not in self.record.data["parameters"]}
        for variant in self.options.variants:
            self.record.put(shlex.join(variant.flags), "variants", variant.slug)
        for variant, parameters in counts.items():
            self.record.put(parameters, "parameters", variant.slug)

    def _count_parameters(self, variant):
        """{"G parameters": number, ...} from --dry_run, which refuses what training would."""
        say(f"checking the flags of {variant.name}")
        printed = self.children.run(variant.name, self._main(
            variant, "--version", f"{variant.slug}_seed0", "--dry_run", "true"), self._log("dry_run"), capture=True)
        counts = re.findall(r"^([GD]) parameters: (\d+)", printed, re.MULTILINE)
        return {f"{net} parameters": int(n) for net, n in counts}

    def _fill_caches(self):
        """With --minutes, a step of each variant that is kept nowhere: its metadata, for one, are computed once for all
        runs, and the first would pay for them with its time.
        """
        data = self.record.data
        begun = {*data.get("caches", {}), *(run.rpartition("_seed")[0] for run in data.get("reached", {}))}
        for variant in self.options.variants if self.options.minutes else ():
            if variant.slug not in begun:
                say(f"filling the caches for {variant.name}")
                self.children.run(variant.name, self._main(
                    variant, "--version", "caches", "--total_step", 1, "--compile", "false", "--sample_path",
                    self.out / "samples"), self._log("caches"))
                for kind in ("models", "logs", "samples"):
                    shutil.rmtree(self.out / kind / "caches", ignore_errors=True)
                self.record.put(True, "caches", variant.slug)

    def _write_real_pictures(self):
        """out/real/: the pictures as training sees them, cropped and resized by the program's own loader."""
        folder, unfinished = self.out / "real", self.out / "real.unfinished"
        if not folder.is_dir():
            unfinished.mkdir(exist_ok=True)
            for index in range(len(self.dataset)):
                self.children.check()
                picture = Image.fromarray(as_rgb(self.dataset[index][None])[0].permute(1, 2, 0).numpy())
                picture.save(unfinished / f"{index:06d}.png", compress_level=1)
            os.replace(unfinished, folder)
        self.real = swd.PictureFiles.below(folder)
        if len(self.real) < 2:
            raise DataError(f"--image_path {self.options.image_path}: one picture; at least 2 are needed")
        if "floor" not in self.record.data:
            self.record.put(swd.floor(self.real), "floor")

    # ------------------------------------------------------------------------------------------------ one run

    def _complete(self, run):
        """Train, draw, score: whatever of it is not done yet. Called in a thread of its own."""
        self.children.check()
        place = f"{self.runs.index(run) + 1} of {len(self.runs)}"
        draws = self._draws(run.variant)
        if all(self._numbers(run, draw, point) for point in self.points for draw in draws):
            say(f"{place}: {run.name} has been scored")
        elif self._checkpoint(run, self.end).exists():
            say(f"{place}: {run.name} has been trained")
        else:
            self._refuse_to_lose(run, draws)
            say(f"{place}: training {run.name} to {self.unit} {self.end}, see {self._log(run.name)}")
            if self.options.minutes:
                self._train_for_minutes(run)
            else:
                self._train(run, "--total_step", self.end, "--sample_step", max(1, -(-self.end // RECORDS)),
                            "--model_save_step", self.points[0], "--log_step", max(1, min(10, self.end // RECORDS)))
        for point in self.points:
            for draw in draws:
                self._score(run, draw, point)
        for point in self.points[:-1]:
            self._checkpoint(run, point).unlink(missing_ok=True)        # its pictures have been drawn
        numbers = self._numbers(run, draws[0], self.end)
        say(f"{place}: {run.name}: {', '.join(report.in_words(numbers))}")
        self.report()
        if self.options.until and run.variant.name == report.BASELINE and self.options.until not in numbers:
            raise UsageError(f"--until {self.options.until}: no such column; there are {', '.join(numbers)}")

    def _refuse_to_lose(self, run, draws):
        """Raise DataError if training on would not pass a point that is to be scored; drop the scores of a
        run that begins again.
        """
        newest = max(checkpoint.steps_in(self.out / "models" / run.name), default=0)
        if not newest and not (self.options.minutes and self._step(run, self.end)):
            self.record.forget("scores", f"{run.name}, ")
            for place in (self.out / "drawn").glob(f"*/{run.name}"):
                shutil.rmtree(place)
        for point in self.points if not self.options.minutes else ():
            for draw in draws if point < newest and not self._checkpoint(run, point).exists() else ():
                if not self._numbers(run, draw, point):
                    self._require_pictures(run, draw, point)

    def _train(self, run, *flags, seconds=None):
        """Train to the run's own end, or for so many seconds."""
        self.children.run(run.name, self._main(
            run.variant, "--seed", run.seed, "--version", run.name, "--sample_path", self.out / "samples",
            "--keep_checkpoints", 0, *flags), self._log(run.name), seconds=seconds)

    def _train_for_minutes(self, run):
        """Train up to each point in turn, and keep in the record which step was reached there.

        What an interrupted call trained beyond a point is left out: it has had time already.
        """
        if self._step(run, self.points[0]) is None:
            for kind in ("models", "logs", "samples"):
                shutil.rmtree(self.out / kind / run.name, ignore_errors=True)
        before, step = 0, 0
        for point in self.points:
            if self._step(run, point) is None:
                self._train(run, "--total_step", FOREVER, "--model_save_step", FOREVER, "--sample_step", 250,
                            "--compile", "false", *(("--pretrained_model", step) if step else ()),
                            seconds=60 * (point - before))
                reached = max(checkpoint.steps_in(self.out / "models" / run.name), default=0)
                if reached <= step:
                    raise Failure(f"{run.name} trained no step from minute {before} to {point}; give more --minutes")
                self.record.put(reached, "reached", run.name, str(point))
            before, step = point, self._step(run, point)

    def _step(self, run, point):
        """The step of a run at a point, None if it is not known yet."""
        return self.record.data.get("reached", {}).get(run.name, {}).get(str(point)) if self.options.minutes else point

    def _checkpoint(self, run, point):
        return self.out / "models" / run.name / f"{self._step(run, point) or 0:07d}.pth"

    def _draws(self, variant):
        """The values of --metadata_sample that a variant is drawn with; (None,) without metadata."""
        return variant.draws if self.options.all_draws else variant.draws[:1]

    def _label(self, variant, draw):
        return f"{variant.name}, {draw}" if draw and self.options.all_draws else variant.name

    def _key(self, run, draw, point):
        key = f"{run.name}, {self.unit} {point}, {self.options.samples} pictures"
        return f"{key}, {draw}" if draw else key

    def _score(self, run, draw, point):
        """Fill in what the record lacks of one row's scores for one seed and point."""
        kept = self.record.data["scores"].get(self._key(run, draw, point), {})
        missing = [scorer for scorer in self._scorers(point) if scorer not in kept]
        fake = self._draw(run, draw, point) if set(missing) - {self._evaluated} else None
        for scorer in missing:
            self.children.check()
            if scorer == self._evaluated:
                scores = self._evaluate(run, draw)
            elif scorer == "swd":
                scores = {"swd": swd.sliced_wasserstein(self.real, swd.PictureFiles.below(fake))}
            else:
                scores = report.scores_by(scorer, self.out / "real", fake, lambda words: self.children.run(
                    f"--score for {run.name}", words, self._log(run.name), capture=True))
            self.record.put(scores, "scores", self._key(run, draw, point), scorer)

    def _scorers(self, point):
        """What computes columns at this point: swd, the --score commands, at the last one --evaluate."""
        last = point == self.end and self.options.evaluate
        return ["swd", *self.options.score, *([self._evaluated] if last else [])]

    @property
    def _metrics(self):
        """--evaluate as flags of main.py."""
        return "--metrics", *shlex.split(self.options.evaluate)

    @property
    def _evaluated(self):
        """The name of --evaluate's scores in the record."""
        return f"--evaluate {self.options.evaluate}"

    def _evaluate(self, run, draw):
        """{column: number}: what --mode evaluate --metrics ... finds for a run at the last point."""
        log = self.out / "logs" / run.name / "metrics.jsonl"
        before = len(log.read_text(encoding="utf-8").splitlines())
        self.children.run(run.name, self._main(
            run.variant, "--seed", run.seed, "--version", run.name, "--mode", "evaluate", *self._metrics,
            "--pretrained_model", self._step(run, self.end), "--sample_path",
            self.out / "samples", *(("--metadata_sample", draw) if draw else ())), self._log(run.name))
        return report.scores_in(log.read_text(encoding="utf-8").splitlines()[before:])

    def _draw(self, run, draw, point):
        """The folder of --samples pictures by G_ema of a run at `point`; drawn now unless they are there."""
        place, folder = self._drawn(run, draw, point)
        if not self._checkpoint(run, point).exists():
            self._require_pictures(run, draw, point)
        elif len(swd.PictureFiles.below(folder)) != self.options.samples:
            self.children.run(run.name, self._main(
                run.variant, "--version", run.name, "--train", "false", "--pretrained_model", self._step(run, point),
                "--seed", 0, "--num_samples", self.options.samples, "--sample_path", place,
                *(("--metadata_sample", draw) if draw else ())), self._log(run.name))
        return folder

    def _drawn(self, run, draw, point):
        """(--sample_path of the pictures drawn from a run at `point`, their folder below it)."""
        samples, step = self.options.samples, self._step(run, point)
        place = self.out / "drawn" / (f"{draw}_{samples}" if draw else str(samples))
        other = "" if draw in (None, DRAWS[0]) else f"_metadata-{draw}"     # the first is the runs' own
        return place, place / run.name / f"{step:07d}_generated_seed0{other}"

    def _require_pictures(self, run, draw, point):
        """Raise DataError unless the pictures of a point were drawn; its checkpoint is gone."""
        _, folder = self._drawn(run, draw, point)
        if len(swd.PictureFiles.below(folder)) != self.options.samples:
            again = f"delete {self._checkpoint(run, point).parent}" if self.unit == "step" else "use another --out"
            raise DataError(f"{folder}: the pictures of step {self._step(run, point)} are gone, and so is its "
                            f"checkpoint; to train {run.name} again, {again}")

    # --------------------------------------------------------------------------------------------- the report

    def _numbers(self, run, draw, point):
        """{column: number} of one row, seed and point, {} while anything of it is missing."""
        kept = self.record.data["scores"].get(self._key(run, draw, point), {})
        if any(scorer not in kept for scorer in self._scorers(point)):
            return {}
        step = self._step(run, point)
        numbers = {"steps": step} if self.options.minutes else {}
        for scorer in self._scorers(point):
            clash = sorted(numbers.keys() & kept[scorer].keys() | kept[scorer].keys() & set(report.COST))
            if clash:
                raise UsageError(f"{scorer}: '{clash[0]}' is the name of another column already")
            numbers.update(kept[scorer])
        cost = report.cost_of(self.out / "logs" / run.name / "metrics.jsonl", step)
        return {**numbers, **cost, **self.record.data["parameters"][run.variant.slug]}

    def _results(self, point):
        """{row's label: {seed: {column: number}}} of what there is so far, at this point."""
        results = {}
        for variant in self.options.variants:
            for draw in self._draws(variant):
                runs = {run.seed: self._numbers(run, draw, point) for run in self.runs if run.variant is variant}
                results[self._label(variant, draw)] = {seed: run for seed, run in runs.items() if run}
        return {label: seeds for label, seeds in results.items() if seeds}

    def report(self):
        """Write ablation.md, ablation.png and curves.png of what there is so far. Returns the lines of the numbers."""
        with self._report_lock:
            by_point = {point: results for point in self.points if (results := self._results(point))}
            results = by_point.get(self.end)
            if not results:
                return []
            numbers = report.summary(results, self.record.data["floor"], not self.options.model)
            numbers += report.convergence(by_point, self.unit)
            shown = self._write_picture(results)
            if report.differences(results, self.out / "differences.png"):
                shown += ["", "![paired differences](differences.png)", "",
                          "Paired differences from the baseline in percent of its mean, with their 95 % intervals; "
                          "thick lines exclude 0."]
            if report.curves(by_point, self.out / "curves.png", self.unit):
                shown += ["", f"![scores by {self.unit}](curves.png)", "",
                          "Means over the seeds, with their 95 % intervals."]
            text = "\n".join([*self._head(results), *numbers, *shown]) + "\n"
            write_atomically(self.out / "ablation.md", lambda path: path.write_text(text, encoding="utf-8"))
            return [*numbers, f"Written to {self.out / 'ablation.md'}, pictures beside it."]

    def _head(self, results):
        """What was run, on what."""
        options = self.options
        scored = sum(map(len, results.values()))
        total = sum(len(self._draws(run.variant)) for run in self.runs)
        lines = [
            f"# Ablation of {options.model or 'SLAE-FastGAN'}", "",
            f"    {shlex.join(['python', 'benchmarks/ablation.py', *self.argv])}", "",
            f"- imsize {options.imsize}, {self.end} {self.unit}s, seeds "
            f"{', '.join(map(str, sorted({run.seed for run in self.runs})))}",
            f"- {len(self.real)} real pictures, {options.samples} drawn from G_ema of each run",
            f"- {report.hardware()}" + (f"; {options.jobs} trainings at once" if options.jobs > 1 else ""),
            *report.on_settings(self._configs(), self._varied()),
        ]
        if scored < total:
            lines.append(f"- **unfinished: {scored} of {total} scored**; the same command goes on")
        return [
            *lines, "",
            "`swd`: sliced Wasserstein distance (7x7 patches of a Laplacian pyramid, mean over its levels, times "
            "1000); lower is better, and its floor is that of two random halves of the real pictures. `s/step`: "
            "median of a run's log lines; one run followed the other, so the machine's own drift is in it. ± is "
            "the sample standard deviation over the seeds. Differences are paired: of runs of one seed, whose common "
            "weights start the same and which see the same batches; their intervals are Student's, of 95 %."
            + (f" Seeds were added while an interval of {options.until} included 0: by chance they exclude it more "
               "often than once in twenty times." if max(run.seed for run in self.runs) >= options.seeds else ""), "",
        ]

    def _varied(self):
        """The settings in which the runs are meant to differ: those that some variant sets."""
        words = [word.partition("=")[0] for variant in self.options.variants for word in variant.flags]
        return {*report.OF_A_RUN, *(word.removeprefix("--") for word in words if word.startswith("--"))}

    def _configs(self):
        """The saved configs of the runs that there are."""
        paths = (self.out / "models" / run.name / "config.json" for run in self.runs)
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths if path.exists()]

    def _write_picture(self, results):
        """Write ablation.png of the first seed. Returns the lines of ablation.md that show it."""
        grids = []
        for variant in self.options.variants:
            written = sorted((self.out / "samples" / f"{variant.slug}_seed0").glob("[0-9]*_fake.png"))
            scores = results.get(self._label(variant, self._draws(variant)[0]), {}).get(0)
            if scores and written:
                grids.append((variant.name, written[-1], report.in_words(scores)))
        if not grids:
            return []
        report.picture(grids, self.out / "ablation.png")
        return [f"![grids of {', '.join(name for name, _, _ in grids)}, seed 0](ablation.png)", "",
                f"Seed 0, the last grids up to {self.unit} {self.end}, always of the same z."]


def points_of(options):
    """("step" or "minute", the points at which runs are scored), evenly spread, the last one their end."""
    if options.minutes:
        return "minute", [_whole(round(options.minutes * (i + 1) / options.points, 3)) for i in range(options.points)]
    every = -(-options.steps // options.points)
    return "step", [*range(every, options.steps, every), options.steps]


def _whole(number):
    return int(number) if number == int(number) else number


def say(text):
    """Print at once, and a line as a whole: several threads speak."""
    print(text + "\n", end="", flush=True)


# --------------------------------------------------------------------------------------------------- command line


def main(argv):
    """Run the command line `argv` and return the exit code."""
    def do():
        options, extra = parse(argv)
        Path(options.out).mkdir(parents=True, exist_ok=True)
        with contextlib.closing(FolderLock([options.out], f"--out {options.out}")):
            return Ablation(options, extra, argv).do()

    return exit_code_of(do, "--out: ")


if __name__ == "__main__":
    console.run(main)
