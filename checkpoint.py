"""Checkpoints: written whole or not at all, checked before use, pruned, found again.

A checkpoint is one dict of tensors, str, int, float, list, dict: it loads with `weights_only=True`. Files are named
by step, `0001000.pth`, beside `config.json`.
"""

import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from failures import CheckpointError
from utils import write_atomically

# What torch.load and zipfile raise on damaged files (truncated, overwritten, a page of HTML, ...).
_DAMAGE = (EOFError, OSError, RuntimeError, pickle.UnpicklingError, zipfile.BadZipFile, KeyError, ValueError)


def path_of(folder, step):
    """Where the checkpoint of `step` is kept."""
    return Path(folder) / f"{step:07d}.pth"


def steps_in(folder):
    """Steps of the checkpoints in `folder`, ascending; [] if there is no such folder."""
    folder = Path(folder)
    names = os.listdir(folder) if folder.is_dir() else []
    return sorted(int(name[:-4]) for name in names if re.fullmatch(r"\d{7,}\.pth", name))


def save(state, folder):
    """Write `state` under its "step". Raises CheckpointError when the disk refuses; older files stay as they are."""
    path = path_of(folder, state["step"])
    _write(state, path)
    return path


def _write(state, path):
    try:
        write_atomically(path, lambda temporary: torch.save(state, temporary))
    except (OSError, RuntimeError) as error:     # a full disk comes as RuntimeError out of torch.save
        raise CheckpointError(
            f"cannot write {path} ({_first_line(error)}); earlier checkpoints are untouched.\n"
            "Free some space (or lower --keep_checkpoints), then give the same command again."
        ) from None


def save_best(state, folder):
    """Write `state`, whose "best" says by which score, as best.pth: it is never pruned. Raises CheckpointError."""
    _write(state, best_path(folder))


def best_path(folder):
    """Where the checkpoint of the best fid is kept."""
    return Path(folder) / "best.pth"


def best_score(folder):
    """{"fid": float, "protocol": str, "source": str} of best.pth, or None where there is none that is whole."""
    try:
        return load(best_path(folder)).get("best")
    except CheckpointError:
        return None


def load(path):
    """The state in `path`, on the CPU. Raises CheckpointError if it is missing or damaged.

    torch.load does not look at checksums, so a flipped bit would pass: the archive's own CRCs are checked first.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()
        if damaged:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f"there is no checkpoint {path}") from None
    except _DAMAGE as error:
        raise CheckpointError(f"{path} is damaged ({_first_line(error)})") from None


def load_newest(folder, warn=print):
    """The newest state in `folder` that is whole, or None where there is no checkpoint.

    Damaged ones are passed over, with a word to `warn`. Raises CheckpointError if all are damaged.
    """
    paths = [path_of(folder, step) for step in reversed(steps_in(folder))]
    if best_path(folder).is_file():                     # the last there is, after pruning and going back to it
        paths.append(best_path(folder))
    for path in paths:
        try:
            return load(path)
        except CheckpointError as error:
            warn(f"warning: {error}; going back to the one before")
    if paths:
        raise CheckpointError(f"every checkpoint in {folder} is damaged.\n"
                              "Move that folder away to start anew, or use another --version.")
    return None


def require_step(folder, step):
    """Raise CheckpointError, naming those there are, unless `folder` has a checkpoint of `step` (or of "best")."""
    if step == "best":
        if not best_path(folder).is_file():
            raise CheckpointError(f"--pretrained_model best: there is no {best_path(folder)}; --metric_step N in "
                                  "training, or --mode evaluate, keeps it")
        return
    steps = steps_in(folder)
    if step not in steps:
        there = f"there are {', '.join(map(str, steps))}" if steps else "there is none at all"
        raise CheckpointError(f"--pretrained_model {step}: no such checkpoint in {folder}; {there}")


def load_asked(folder, step, warn=print):
    """The state of `step`, "best" among them, or, where that is None, the newest whole one (None if there is none).

    Raises CheckpointError: somebody who asks for one step does not want another.
    """
    if step is None:
        return load_newest(folder, warn)
    require_step(folder, step)
    return load(best_path(folder) if step == "best" else path_of(folder, step))


def saved_config(folder):
    """The config that the run in `folder` was started with, or None where there is no checkpoint to go on from."""
    if not steps_in(folder) and not best_path(folder).is_file():
        return None
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        config = load_newest(folder)["config"]
    return config


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints; 0 keeps all."""
    if keep:
        for step in steps_in(folder)[:-keep]:
            path_of(folder, step).unlink(missing_ok=True)


def set_aside_after(folder, step):
    """Move checkpoints later than `step` into `superseded/`: the run goes on from `step`, and they are no longer its
    newest. Only a file of that name already there, of an earlier future, is replaced. Returns the moved files' names.
    """
    moved = [path_of(folder, later) for later in steps_in(folder) if later > step]
    if _step_of_best(folder) > step:
        moved.append(best_path(folder))
    aside = Path(folder) / "superseded"
    for path in moved:
        aside.mkdir(exist_ok=True)
        os.replace(path, aside / path.name)
    return [path.name for path in moved]


def _step_of_best(folder):
    """The step of best.pth; -1 where there is none that is whole."""
    try:
        return load(best_path(folder))["step"] if best_path(folder).is_file() else -1
    except CheckpointError:
        return -1


def _first_line(error):
    return (str(error).splitlines() or [type(error).__name__])[0][:200]
