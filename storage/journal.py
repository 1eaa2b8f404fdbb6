"""The log of a run: metrics.jsonl, one JSON object per line, and TensorBoard events beside it."""

import contextlib
import json
import math
import os
import time
from pathlib import Path

import torch

import utils
from device import distributed
from device.distributed import say
from storage.boards import TensorBoard

BY_HAND = {"by": "--mode evaluate"}     # in a line of scores that the training did not measure itself


def open_to_add(path):
    """Open `path` to append lines. A last line truncated by a crash gets its newline first, so as not to merge."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


def _lines(folder):
    """Return the lines of metrics.jsonl in bytes; [] if it cannot be read."""
    try:
        return (Path(folder) / "metrics.jsonl").read_bytes().splitlines()
    except OSError:
        return []


def names_at(folder, step):
    """Return the names of the values that metrics.jsonl holds of `step`, by the training itself, a set."""
    names = set()
    for line in _lines(folder):
        if line.startswith(b'{"step": %d,' % step):     # as `MetricsLog.write` begins a line: no other is parsed
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                names |= set() if BY_HAND.items() <= entry.items() else entry.keys()
    return names


def count_between(folder, after, until, name):
    """Return at how many steps in (after, until] the training measured a value of this name, by metrics.jsonl."""
    steps = set()
    for line in _lines(folder):
        if b'"%s": ' % name.encode() in line:           # no other is parsed
            with contextlib.suppress(ValueError, RecursionError):
                entry = json.loads(line)
                steps |= set() if BY_HAND.items() <= entry.items() else {entry["step"]}
    return sum(after < step <= until for step in steps)


class MetricsLog:
    """Writes the metrics of one run into its log folder; on rank 0 only. Call `close` at the end.

    `resume_from` is the step that a training resumes from: later lines are moved to superseded.jsonl, as they will be
    written again. With None, lines are only appended. `settings` are for TensorBoard.
    """

    def __init__(self, folder, use_tensorboard, resume_from=None, settings=None):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from is not None:
            self._supersede_after(resume_from)
        self.file = open_to_add(self.path)              # stays open until `close`
        purge_step = None if resume_from is None else resume_from + 1
        self.board = TensorBoard(self.path.parent, purge_step, settings) if use_tensorboard else None

    def _supersede_after(self, step):
        """Move lines later than `step` to superseded.jsonl; drop lines that are no JSON objects with a step."""
        if not self.path.exists():
            return
        kept, later, dropped = [], [], 0
        for line in self.path.read_bytes().splitlines(keepends=True):
            try:
                (kept if json.loads(line)["step"] <= step else later).append(line)
            except (ValueError, KeyError, TypeError, RecursionError):      # ValueError: not UTF-8, too
                dropped += 1
        superseded = self.path.with_name("superseded.jsonl")
        before = superseded.stat().st_size if superseded.exists() else 0
        try:
            if later:
                with open(superseded, "ab") as file:
                    file.writelines(later)
            utils.write_atomically(self.path, lambda temporary: temporary.write_bytes(b"".join(kept)))
        except OSError:                                 # a full disk: the next resume moves the same lines
            if superseded.exists():
                os.truncate(superseded, before)
            raise
        if dropped:
            say(f"note: {self.path}: {dropped} damaged line{'s' * (dropped > 1)} dropped")

    def write(self, step, values):
        """Append a line {"step": step, **values}. Raise OSError; what could not be written is written the next time."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()

    def write_events(self, step, values):
        """Give the numbers to TensorBoard, if that was asked for; see boards.py for errors."""
        if self.board:
            self.board.write(step, values)

    def write_pictures(self, step, pictures):
        """The same of pictures, {name: path}."""
        if self.board:
            self.board.write_pictures(step, pictures)

    def close(self):
        """Close both; what the disk does not take is lost."""
        for file in (self.file, self.board):
            with contextlib.suppress(OSError):
                if file:
                    file.close()


class Window:
    """Sums of the step statistics since the last log line, on the device, and the seconds spent in steps.

    `saved` is what `read_state` returned for a run that is resumed, so that its next line covers all steps since its
    last one; `device` is that of the statistics.
    """

    def __init__(self, saved=None, device="cpu"):
        self.clear()
        if saved:
            self.sums = {name: torch.tensor(value, device=device) for name, value in saved["sums"].items()}
            self.steps, self.seconds = saved["steps"], saved["seconds"]
            self._began -= self.seconds

    def clear(self):
        """Start a new window."""
        self.sums, self.steps, self.seconds, self._began = {}, 0, 0.0, time.perf_counter()

    def state(self):
        """Return what a checkpoint keeps of it. Call `stop_clock` or `means` before."""
        return {"sums": {name: float(value) for name, value in self.sums.items()}, "steps": self.steps,
                "seconds": self.seconds}

    @staticmethod
    def read_state(saved):
        """Return what `state` returned; None if it covers no step, or is not what it returns."""
        if not isinstance(saved, dict) or saved.keys() != {"sums", "steps", "seconds"}:
            return None
        sums, steps, seconds = saved["sums"], saved["steps"], saved["seconds"]
        whole = isinstance(sums, dict) and {"d_loss", "g_loss"} <= sums.keys() and isinstance(steps, int) and steps > 0
        return saved if whole and all(isinstance(value, float) and math.isfinite(value)
                                      for value in (seconds, *sums.values())) else None

    def stop_clock(self):
        """Take the time since the window began for that of its steps."""
        self.seconds = time.perf_counter() - self._began

    def add(self, stats):
        """Add the statistics of one step, {name: 0-d tensor}."""
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def means(self):
        """Return {name: mean over the window and all ranks}. Synchronizes with the device; all ranks must call it."""
        values = distributed.mean_over_processes(torch.stack([total.float() for total in self.sums.values()]))
        self.sums = dict(zip(self.sums, values, strict=True))   # the same on all ranks
        means = dict(zip(self.sums, (values / self.steps).tolist(), strict=True))
        self.stop_clock()                               # after the synchronization: all steps have ended
        return means

    @contextlib.contextmanager
    def paused(self):
        """Leave the time inside out of `seconds`, except that `means` waits for the steps to end."""
        yield
        self._began = time.perf_counter() - self.seconds
