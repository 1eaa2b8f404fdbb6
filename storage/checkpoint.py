"""Checkpoints: atomic writes, verified loads, pruning, finding the newest.

A checkpoint is one dict of tensors, str, int, float, list, dict, and loads with `weights_only=True`. Files are named
by step, `0001000.pth`, beside `config.json`.
"""

import errno
import json
import os
import pickle
import re
import zipfile
from pathlib import Path

import torch

from errors import TO_RESUME, CheckpointError, first_line, out_of_memory_on
from storage.folders import step_name
from utils import write_atomically

# What every checkpoint holds, and of which type.
_KEYS = {"step": int, "samples_seen": int, "config": dict, "G": dict, "D": dict, "G_ema": dict, "g_optimizer": dict,
         "d_optimizer": dict, "fixed_z": torch.Tensor, "random": list}
# What newer ones hold, too.
_NEWER_KEYS = {"data": dict, "processes": int, "unlogged": dict}
_AWAY = (errno.EACCES, errno.EPERM, errno.ESTALE, errno.ETIMEDOUT)     # errors that say nothing of the file itself
_FOLDER = 0x10              # in the attributes of an entry of a zip archive


class MissingCheckpoint(CheckpointError):
    """A checkpoint file that is not there: never written, or pruned since it was listed."""


class UnreadableCheckpoint(CheckpointError):
    """A checkpoint file that may be good, but cannot be read now: of another user, or of a server that is away, or for
    want of memory.
    """


def path_of(folder, step):
    """Return the path of the checkpoint of `step`."""
    return Path(folder) / step_name(step, ".pth")


def steps_in(folder):
    """Return the steps of the checkpoints in `folder`, ascending; [] if the folder does not exist."""
    folder = Path(folder)
    names = set(os.listdir(folder)) if folder.is_dir() else ()
    steps = (int(name[:-4]) for name in names if re.fullmatch(r"\d{7,}\.pth", name))
    return sorted(step for step in steps if step_name(step, ".pth") in names)


def has_any(folder):
    """Return whether there is a checkpoint in `folder`, best.pth included."""
    return bool(steps_in(folder)) or best_path(folder).is_file()


def save(state, folder):
    """Write `state`, named by its "step", and return the path. Raise CheckpointError if the write fails."""
    path = path_of(folder, state["step"])
    _write(state, path)
    return path


def _write(state, path):
    try:
        write_atomically(path, lambda temporary: torch.save(state, temporary))
    except (OSError, RuntimeError) as error:     # torch.save raises RuntimeError when the disk is full
        raise CheckpointError(
            f"cannot write {path} ({first_line(error)}); earlier checkpoints are untouched.\n"
            f"Free some space (or lower --keep_checkpoints), then run {TO_RESUME}."
        ) from None


def save_best(state, folder):
    """Write `state`, with its score in "best", as best.pth, which is never pruned. Raise CheckpointError."""
    _write(state, best_path(folder))


def best_path(folder):
    """Return the path of the checkpoint of the best score."""
    return Path(folder) / "best.pth"


def load_best(folder):
    """Return ({"metric": name, name: float, "protocol": str, "source": str}, the step) of best.pth; (None, -1) if it is
    missing or damaged. Raise UnreadableCheckpoint.

    The name is that of the score, such as fid; entries of older versions have no "metric", as all were fid.
    """
    try:
        state = load_state(best_path(folder))
    except UnreadableCheckpoint:                        # a worse one must not take its place
        raise
    except CheckpointError:
        return None, -1
    best = state.get("best")
    return best and {"metric": "fid", **best}, state["step"]


def best_score(folder):
    """Return the entry of best.pth, None if there is none. Raise what `load_best` raises."""
    return load_best(folder)[0]


def load(path):
    """Return what `path` holds, on the CPU. Raise MissingCheckpoint, UnreadableCheckpoint, or CheckpointError if the
    file is damaged.

    torch.load verifies no checksums and would miss a flipped bit: the CRCs of the zip archive are checked first.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            # torch reads nothing from an entry that its attributes call a folder; no checksum covers these
            damaged = archive.testzip() or next((entry.filename for entry in archive.infolist()
                                                 if entry.external_attr & _FOLDER), None)
        if damaged:
            raise CheckpointError(f"{path} is damaged (checksum of {damaged})")
        return torch.load(path, map_location="cpu", weights_only=True)
    except CheckpointError:
        raise
    except FileNotFoundError:
        raise MissingCheckpoint(f"there is no checkpoint {path}") from None
    except pickle.UnpicklingError:          # its text advises to load without weights_only: never do that
        raise CheckpointError(f"{path} holds other objects than tensors and plain data; it is not read") from None
    except Exception as error:              # zipfile, zlib, pickle and torch raise some fifteen kinds
        if out_of_memory_on(error):
            raise UnreadableCheckpoint(f"not enough memory to read {path}: wait for what else uses it") from None
        if isinstance(error, OSError) and error.errno in _AWAY:
            raise UnreadableCheckpoint(f"cannot read {path} ({error.strerror}).\nTo use an older checkpoint: "
                                       "--pretrained_model STEP") from None
        raise CheckpointError(f"{path} is damaged ({first_line(error)})") from None


def load_state(path, find_mismatch=lambda state: None, whose="this run"):
    """Return the state of a run in `path`. Raise MissingCheckpoint; CheckpointError if it is damaged or another's.

    `find_mismatch(state)` says in words why a state does not fit this run's networks, or returns None.
    """
    state = load(path)
    problem = _find_defect(state) or find_mismatch(state)
    if problem:
        raise CheckpointError(f"{path} is no checkpoint of {whose} ({problem})")
    return state


def _glance(path, key):
    """Return an entry of a checkpoint without reading its tensors; None if that fails."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)[key]
    except Exception:                       # of some fifteen kinds
        return None


def _find_defect(state):
    """Return in words what a state lacks to be one of ours, or None."""
    if not isinstance(state, dict):
        return f"it holds a {type(state).__name__}, not a dict"
    for key, kind in (_KEYS | _NEWER_KEYS).items():
        if key not in state and key in _KEYS:
            return f"it has no '{key}'"
        if key in state and not isinstance(state[key], kind):
            return f"'{key}' is a {type(state[key]).__name__}, not a {kind.__name__}"
    return None


def load_newest(folder, warn=print, find_mismatch=lambda state: None, tries=3):
    """Return the newest state in `folder` that is whole and fits, or None if there is no checkpoint.

    Others are skipped with a warning to `warn`; one that another process prunes meanwhile is skipped in silence, and if
    that is so of all, newer ones are looked for, `tries` times in all. Raise CheckpointError if there are checkpoints,
    but none can be used, and UnreadableCheckpoint.
    """
    steps = {path_of(folder, step): step for step in steps_in(folder)}
    if best_path(folder).is_file():                     # it may be the newest, or the only one left
        best = _glance(best_path(folder), "step")
        steps[best_path(folder)] = best - 0.5 if isinstance(best, int) else -1      # of one step the other
    paths, unusable = sorted(steps, key=steps.get, reverse=True), 0
    for path in paths:
        try:
            return load_state(path, find_mismatch)
        except MissingCheckpoint:
            continue
        except UnreadableCheckpoint:                    # the newest counts: an older one would give up its steps
            raise
        except CheckpointError as error:
            unusable += 1
            warn(f"warning: {error}" + "; trying the one before" * (path != paths[-1]))
    if unusable:
        raise CheckpointError(f"no checkpoint in {folder} can be used.\n"
                              "--restart true moves that run aside and starts from scratch; or use another --version.")
    if not paths or not steps_in(folder):
        return None
    if tries > 1:
        return load_newest(folder, warn, find_mismatch, tries - 1)
    raise CheckpointError(f"{paths[0]} is listed, but not there: a link to a disk that is not mounted?")


def _find_step(folder, step):
    """Return the path of the checkpoint of `step` (int or "best"); best.pth has a step, too, and may be all that is
    left of it. Raise CheckpointError, listing the existing ones, if there is none.
    """
    best, steps = best_path(folder), steps_in(folder)
    if step == "best" and not best.is_file():
        raise CheckpointError(f"--pretrained_model best: there is no {best}; training with --metric_step N, or --mode "
                              "evaluate, writes it")
    if step == "best" or step not in steps and load_best(folder)[1] == step:
        return best
    if step not in steps:
        existing = f"there are {', '.join(map(str, steps))}" if steps else "there is none at all"
        raise CheckpointError(f"--pretrained_model {step}: no such checkpoint in {folder}; {existing}")
    return path_of(folder, step)


def load_step(folder, step, warn=print, find_mismatch=lambda state: None):
    """Return the state of `step` (int or "best"); if `step` is None, as `load_newest`.

    Raise CheckpointError if that step is missing or damaged, instead of loading another.
    """
    if step is None:
        return load_newest(folder, warn, find_mismatch)
    return load_state(_find_step(folder, step), find_mismatch)


def load_source(folder, warn=print):
    """Return the state that a new run begins from: the newest in `folder`, or the one in a file, `FILE.pth`.

    Raise CheckpointError.
    """
    if Path(folder).is_file():
        return load_state(folder, whose="this program")
    state = load_newest(folder, warn)
    if state is None:
        raise CheckpointError(f"there is no checkpoint in {folder}")
    return state


def saved_config(folder):
    """Return the saved config of the run in `folder`, None if it has no checkpoint; that of a checkpoint FILE.pth."""
    if Path(folder).is_file():
        config = _glance(folder, "config")              # what else is wrong with it is said when it is loaded
        return config if isinstance(config, dict) else load_source(folder)["config"]
    if not has_any(folder):
        return None
    try:
        config = json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):       # missing, a folder, damaged, nested without end
        config = None
    if isinstance(config, dict):
        return config
    state = load_newest(folder, warn=lambda text: None)         # warned of again when the state is loaded
    return state and state["config"]


def prune(folder, keep):
    """Delete all but the newest `keep` checkpoints; `keep` 0 deletes none.

    Raise OSError if some cannot be deleted, such as one that is protected, or open on Windows, after the others.
    """
    failure = None
    for step in steps_in(folder)[:-keep] if keep else ():
        try:
            path_of(folder, step).unlink(missing_ok=True)
        except OSError as error:
            failure = error
    if failure:
        raise failure


def supersede_after(folder, step):
    """Move checkpoints later than `step` to `superseded/`, because the run resumes from `step`. Return their names.

    A file of the same name in there, from an earlier call, is replaced.
    """
    paths = [path_of(folder, later) for later in steps_in(folder) if later > step]
    if load_best(folder)[1] > step:
        paths.append(best_path(folder))
    superseded = Path(folder) / "superseded"
    for path in paths:
        superseded.mkdir(exist_ok=True)
        os.replace(path, superseded / path.name)
    return [path.name for path in paths]
