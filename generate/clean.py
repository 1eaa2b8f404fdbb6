"""`--mode clean_data`: delete the picture files that the last check of a run found damaged.

With `--clean_copies true` also the byte-identical copies, except the first of each. Only files that are the same as at
the check, in the data set's own folder and reached without a link are deleted, after all have been listed and
confirmed.
"""

import filecmp
import json
import os
import stat
import sys
from collections.abc import Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

from dataset.check import BAD, COPIES, write_list
from dataset.decode import printable
from device.distributed import say
from errors import CheckpointError, DataError, UsageError
from storage.folders import FolderLock, RunFolders

FOLDERS = {"folder": "", "celeb": "CelebA"}  # --dataset: where its picture files are, below --image_path


@dataclass(frozen=True)
class _Doomed:
    """A file to delete: its `path`, a `row` of the list `name`, and why."""

    path: str
    row: dict
    name: str
    reason: str

    def obstacle(self, folder: str) -> str | None:
        """Return why the file must stay, or None. Looks at the disk."""
        problem = _change(self.row, folder)
        if problem or "copy_of" not in self.row:
            return problem
        original = self.row["copy_of"]
        problem = _change(original, folder)
        if problem:
            return f"the first of its copies, {printable(original['path'])}, {problem}"
        if not filecmp.cmp(self.path, original["path"], shallow=False):
            return f"is no longer a copy of {printable(original['path'])}"
        return None


def clean_data(config) -> int:
    """List and delete the files. Return exit code 0.

    Raise UsageError without confirmation, or for a data set of other files or in an archive, DataError without a
    check's list, LockedError while the run trains, CheckpointError if a file cannot be deleted.
    """
    if config.dataset not in FOLDERS:
        raise UsageError(f"--mode clean_data --dataset {config.dataset}: only picture files of "
                         f"--dataset {' or '.join(FOLDERS)} can be deleted")
    folder = os.path.realpath(os.path.join(config.image_path, FOLDERS[config.dataset]))
    if os.path.isfile(folder):
        raise UsageError(f"--mode clean_data: no picture is deleted from an archive; unpack {printable(folder)}, train "
                         "once with --image_path on its folder, and clean that")
    with closing(FolderLock([place for place in RunFolders.of(config).each() if place.is_dir()],
                            f"--version {config.version}")):    # a run that trains now would miss its pictures
        logs = Path(config.log_path, config.version)
        rows = {name: _read(logs / name) for name in (BAD, COPIES)}
        if rows[BAD] is None and rows[COPIES] is None:
            say(f"nothing to delete: there are no {BAD} and {COPIES} in {printable(logs)}{os.sep}; a training run's "
                "check of the pictures writes them there if it finds any (not --dry_run)")
            return 0
        doomed = list(_doomed(rows, config.clean_copies))
        kept = {id(file): obstacle for file in doomed if (obstacle := file.obstacle(folder))}
        for file in doomed:
            if id(file) in kept:
                say(f"stays: {printable(file.path)} {kept[id(file)]}")
        doomed = [file for file in doomed if id(file) not in kept]
        for file in doomed:
            say(f"to delete: {printable(file.path)}: {file.reason}")
        if not doomed:
            say("nothing to delete")
        elif config.dry_run:
            say(f"{_files(len(doomed))} would be deleted")
        elif _confirmed(len(doomed), folder, config.yes):
            _delete(doomed, folder, logs, rows)
        else:
            say("nothing was deleted")
    return 0


def _files(count: int) -> str:
    return f"{count} file{'s' * (count != 1)}"


def _read(path: Path) -> list[dict] | None:
    """Return the rows of a list, None if there is none. Raise DataError if it is damaged."""
    try:
        rows = [json.loads(line) for line in path.read_text(encoding="ascii").splitlines()]
        if all(isinstance(row, dict) for row in rows):
            return rows
        raise ValueError("not all of its lines are objects")
    except FileNotFoundError:
        return None
    except (OSError, ValueError) as error:
        raise DataError(f"--mode clean_data: cannot read {printable(path)} ({error}); train again, which writes it "
                        "again") from None


def _doomed(rows: dict, copies: bool) -> Iterator[_Doomed]:
    for row in rows[BAD] or ():
        if row.get("damaged") is True and "path" in row:
            yield _Doomed(row["path"], row, BAD, printable(row.get("reason", "")))
    for row in (rows[COPIES] or ()) if copies else ():
        if "path" in row and "path" in row.get("copy_of", {}):
            yield _Doomed(row["path"], row, COPIES, f"a copy of {printable(row['copy_of']['path'])}")


def _change(entry: dict, folder: str) -> str | None:
    """Return why this is not the plain file in `folder` that was checked, or None."""
    path = entry["path"]
    try:
        file = os.lstat(path)
    except OSError as error:
        return "is gone" if isinstance(error, FileNotFoundError) else f"cannot be read ({error.strerror})"
    if not stat.S_ISREG(file.st_mode):
        return "is not a plain file, but a link or the like"
    real = os.path.realpath(path)
    if os.path.commonpath([real, folder]) != folder:
        return f"is not in {printable(folder)}; give the run's own --dataset and --image_path"
    if (file.st_size, file.st_mtime_ns) != (entry.get("size"), entry.get("mtime_ns")):
        return "has changed since the check"
    return None


def _confirmed(count: int, folder: str, yes: bool) -> bool:
    """Return whether the user agrees. Raise UsageError if there is nobody to ask."""
    if yes:
        return True
    if not sys.stdin or not sys.stdin.isatty():
        raise UsageError(f"--mode clean_data: {_files(count)} would be deleted; add --yes true to delete them")
    try:
        return input(f"Delete {_files(count)} in {printable(folder)}? [y/N] ").strip().lower() in ("y", "yes")
    except EOFError:
        return False


def _delete(doomed: list[_Doomed], folder: str, logs: Path, rows: dict):
    """Delete the files, each after another look at it, and take them off the lists. Raise CheckpointError."""
    deleted, problems = [], []
    for file in doomed:
        obstacle = file.obstacle(folder)
        try:
            if obstacle:
                say(f"stays: {printable(file.path)} {obstacle}")
                continue
            os.unlink(file.path)
        except OSError as error:
            problems.append(f"{printable(file.path)} ({error.strerror})")
            continue
        deleted.append(file)
    for name in {file.name for file in deleted}:
        gone = {id(file.row) for file in deleted}
        left = [row for row in rows[name] if id(row) not in gone]
        if left:
            write_list(logs / name, left)
        else:
            (logs / name).unlink()
    say(f"{_files(len(deleted))} deleted")
    if problems:
        raise CheckpointError(f"--mode clean_data: {_files(len(problems))} cannot be deleted, such as {problems[0]}")
