"""What a call of gpu_runs.py leaves in OUT: report, score curves, grids, attention, logs, and pages in a zip."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: bash benchmarks/gpu.sh --help")

import json
import os
import platform
import re
import shlex
import shutil
import statistics
import sys
import time
import zipfile
from dataclasses import replace
from pathlib import Path

import torch
from PIL import Image

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import report  # noqa: E402 - what it imports is found through the line above
from errors import first_line  # noqa: E402
from gallery import page  # noqa: E402
from parameter import Config  # noqa: E402
from storage import score_table  # noqa: E402
from storage.folders import step_name  # noqa: E402
from utils import spread_indices, write_atomically  # noqa: E402

REFRESH = 20            # seconds between updates of OUT
PAGES = 14 * 2**20      # bytes of the zip of pages, at most
LARGEST = 2048          # pixels: side of a picture in OUT, at most


class Results:
    """The folder `out` with what Runs have made, and a report on the call that trains them for at most `seconds`.

    `rows` are the flags, time and exit code of the call's commands, `notes` further lines of the report, `shared` the
    flags of all commands, `found` the step of each run when the call began.
    """

    def __init__(self, runs, out, seconds, is_rehearsal):
        self.runs, self.out, self.seconds, self.is_rehearsal = runs, out, seconds, is_rehearsal
        self.experiment = runs.experiment
        self.rows, self.notes, self.shared = [], [], []
        self.found = {name: runs.step_of(name) for name in self.experiment.runs}
        self.began = self.refreshed = time.monotonic()
        self.ended = False

    def is_old(self):
        """Return whether it is time for a `refresh`."""
        return time.monotonic() > self.refreshed + REFRESH

    def refresh(self, last=False):
        """Write into `out` what there is; the zip of the pages with the last. A failure is told in the report."""
        self.ended = last
        results = (self.copy_pictures, self.draw_curves, self.copy_logs, *[self.zip_pages] * last, self.write_report)
        logs = None
        for write in results:
            try:
                logs = logs or {name: Log(self.runs.folders(name).logs / "metrics.jsonl",
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
                _copy(log.path, self.out / f"metrics_{name}.jsonl")

    def draw_curves(self, logs):
        """Write the picture of each score by step, if there are two steps and matplotlib."""
        curves = by_step({name: log.scores for name, log in logs.items()})
        if curves:
            report.curves(curves, self.out / "curves.png")

    def copy_pictures(self, logs):
        """Copy the newest grid, of several runs side by side, and attention maps."""
        (step, begun), out = self.runs.common_grids(), self.out
        if step is None:
            return

        def of_step(name, pattern):
            return self.runs.folders(name).samples.glob(step_name(self.experiment.own(name, step), pattern))

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
        stage = self.runs.folder / "pages"
        shutil.rmtree(stage, ignore_errors=True)
        for name in logs:
            folders = self.runs.folders(name)
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

        write_atomically(self.out / "pages.zip", write)

    def write_report(self, logs):
        """Write report.md."""
        experiment = self.experiment
        seconds = time.monotonic() - self.began
        state = f"ended after {seconds:.0f} s" if self.ended else f"goes on, {seconds:.0f} s have passed"
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "no GPU"
        lines = [f"# {experiment.title}, {time.strftime('%F')}", ""]
        if self.is_rehearsal:
            lines += ["**A rehearsal at a tiny size: its numbers say nothing.**", ""]
        lines += [f"- {card}, torch {torch.__version__}, Python {platform.python_version()}, {os.cpu_count()} cores",
                  *(f"- {note}" for note in self.notes), f"- the call of at most {self.seconds} s {state}", "",
                  f"`main.py {shlex.join(self.shared)}` with", "",
                  *report.markdown_table(["flags", "time", "exit code"], self.rows), "",
                  "130: told to end, as the time was over, and saved.", ""]
        lines += [f"A step of {name} counts as {times}, as its batches are so many times as large, but for the seconds "
                  "a step and its logs: these tell which run reaches a score first.\n"
                  for name, times in experiment.times.items()]
        lines += report.markdown_table(["run", "found at step", "now at step", "s/step", "GPU GiB"], [
            [name, f"{self.found[name]:,}", f"{self.runs.step_of(name):,}",
             log.median("sec_per_step"), log.median("gpu_memory_gib")] for name, log in logs.items()])
        lines += ["", *_score_table({name: log.scores for name, log in logs.items()})]
        lines += [f"- {text}" for text in dict.fromkeys(text for log in logs.values() for text in log.protocols)]
        floors = {key: report.number(value) for log in logs.values() for key, value in log.floors.items()}
        if floors:
            lines.append("- of two halves of the real pictures: " + ", ".join(map(" ".join, floors.items())))
        for name in ("curves", "grids", "attention"):
            if (self.out / f"{name}.png").is_file():
                lines += ["", f"![{name}]({name}.png)"]
        text = "\n".join(lines) + "\n"
        write_atomically(self.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))


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
