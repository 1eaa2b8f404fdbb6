"""The log of a run: metrics.jsonl, one JSON object per line, and TensorBoard events beside it."""

import json
import os
from pathlib import Path

import utils


def open_to_add(path):
    """Open `path` to append lines. A last line truncated by a crash gets its newline first, so as not to merge."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


class MetricsLog:
    """Writes the metrics of one run into its log folder; on rank 0 only. Call `close` at the end.

    `resume_from` is the step that a training resumes from: later lines are moved to superseded.jsonl, as they will be
    written again. With None, lines are only appended.
    """

    def __init__(self, folder, use_tensorboard, resume_from=None):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if resume_from is not None:
            self._supersede_after(resume_from)
        self.file = open_to_add(self.path)              # stays open until `close`
        self.board = None
        if use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, so only where needed

            self.board = SummaryWriter(folder, purge_step=None if resume_from is None else resume_from + 1)

    def _supersede_after(self, step):
        """Move lines later than `step` to superseded.jsonl; drop lines that are no JSON objects with a step."""
        if not self.path.exists():
            return
        kept, later = [], []
        for line in self.path.read_text(encoding="utf-8").splitlines(keepends=True):
            try:
                (kept if json.loads(line)["step"] <= step else later).append(line)
            except (ValueError, KeyError, TypeError):
                continue
        if later:
            with open(self.path.with_name("superseded.jsonl"), "a", encoding="utf-8") as file:
                file.writelines(later)
        utils.write_atomically(self.path, lambda temporary: temporary.write_text("".join(kept), encoding="utf-8"))

    def write(self, step, values):
        """Write a line {"step": step, **values}; TensorBoard gets the numbers only."""
        self.file.write(json.dumps({"step": step, **values}) + "\n")
        self.file.flush()
        if self.board:
            for name, value in values.items():
                if not isinstance(value, str):
                    self.board.add_scalar(name, value, step)
            self.board.flush()

    def close(self):
        self.file.close()
        if self.board:
            self.board.close()
