"""metrics.jsonl, one object per line, and TensorBoard events beside it."""

import json
import os
from pathlib import Path

import utils


def open_to_add(path):
    """The file `path`, open to add lines. A last line that a crash cut short is ended: it must swallow none of them."""
    with open(path, "ab+") as file:
        if file.seek(0, os.SEEK_END):
            file.seek(-1, os.SEEK_END)
            if file.read(1) != b"\n":
                file.write(b"\n")
    return open(path, "a", encoding="utf-8")


class Journal:
    """The numbers of one run in the folder of its logs; for one process of several. Close it.

    `going_on_from`: the step that a training goes on from; lines later than it are set aside, as they will be written
    anew. None only adds.
    """

    def __init__(self, folder, use_tensorboard, going_on_from=None):
        self.path = Path(folder) / "metrics.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if going_on_from is not None:
            self._forget_after(going_on_from)
        self.file = open_to_add(self.path)              # held for the life of the run
        self.board = None
        if use_tensorboard:
            from torch.utils.tensorboard import SummaryWriter  # slow to import, and only then needed

            self.board = SummaryWriter(folder, purge_step=None if going_on_from is None else going_on_from + 1)

    def _forget_after(self, step):
        """Move lines later than the step that the run goes on from to superseded.jsonl.

        A line that a crash cut short is dropped.
        """
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
        """One line {"step": step, **values}; TensorBoard gets the numbers alone."""
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
