"""The start of a training run: everything that can refuse it, then its folders, then its state, then the loop.

A run resumes from its newest checkpoint and locks its folders against other processes.
"""

import contextlib
import copy
import json
from collections import Counter
from functools import partial
from types import SimpleNamespace

import families
from data_loader import build_dataset, find_dataset, without_held_out
from dataset import table
from dataset.check import write_lists
from device import distributed
from device.distributed import say
from errors import CheckpointError, LockedError, UsageError, first_line, out_of_memory_on
from flags.common import DERIVED
from gallery import page
from generate import metadata
from generate.classes import Classes, describe_changes, find_classes, lines_on_classes, require_classes
from loop import Run, find_undone
from metrics.meter import Meter, of_run, refuse_few
from parameter import FLAGS, RUN_SETTINGS, as_json, source_of, to_resume
from storage import boards, checkpoint, score_table
from storage.folders import FolderLock, RunFolders, require_folders
from trainer import Trainer
from training import memory
from training.measurements import find_standing


def train(config, place, precision, interrupt):
    """Train from `--pretrained_model`, or the newest checkpoint if there is one, to the end (see loop.py).

    Return the exit code: 0, or 128 + the signal's number. Raise UsageError, DataError, NonFiniteError, CheckpointError,
    LockedError or OSError. Until nothing can be refused any more, only caches are written: a run that is refused
    leaves no folder, and `--restart true` then moves nothing.
    """
    # what is known at once
    folders = RunFolders.of(config)
    require_folders(folders.each(), _owner(config))
    saved = checkpoint.steps_in(folders.models)
    restart = _is_restart(config, folders)
    state, source = _load_beginning(config, folders, restart)
    undone, unlogged = distributed.on_first(partial(find_undone, config, folders, state))
    reason = state and not any(undone) and distributed.on_first(partial(_find_end, config, folders, state["step"]))
    if reason:
        distributed.on_first(partial(_finish_page, config, folders))
        say(f"nothing to do: '{config.version}' has {reason}. Open {folders.samples / page.NAME} in a browser")
        return 0
    found = find_dataset(config)
    _, classes = _compare(config, state, found)
    meter = _load_what_is_needed(config, place, state, classes, len(without_held_out(found, config)))

    # what takes work, whose results are cached
    dataset = build_dataset(config, found)
    data, classes = _compare(config, state, dataset, say)
    for line in lines_on_classes(config, dataset, classes):
        say(line)
    trainer = Trainer(config, place, precision, len(dataset), _find_bank(config, dataset, data, place, state),
                      classes)
    _initialize(config, trainer, classes, source)
    if meter:
        meter.prepare(of_run(config, dataset))

    lock = distributed.after_first(lambda: _claim(config, folders, saved, restart), lambda: None)
    try:
        _restore(trainer, state, folders)
        run = Run(trainer, meter, dataset, data, folders, interrupt, undone, unlogged)
        del state, source                               # frees the checkpoints' memory
        run.try_to("write the lists of pictures", lambda: write_lists(found, config))
        return _loop(run)
    finally:
        if lock:
            lock.close()


def _load_beginning(config, folders, restart):
    """Return the checkpoint to resume from, and that of `--init_from` for a run that has none; either may be None."""
    state = None if restart else checkpoint.load_step(folders.models, config.pretrained_model, say,
                                                      partial(families.find_mismatch, config))
    source = _load_source(config) if state is None and config.init_from else None
    distributed.require_same(tuple(found and found["step"] for found in (state, source)), CheckpointError(
        "the processes found different checkpoints: one cannot read the newest, or its run is still going on.\n"
        "Give the step: --pretrained_model STEP, or --init_from models/NAME/STEP.pth."))
    return state, source


def _loop(run):
    """Return `run.loop()`. Raise UsageError, with what fits, for a step that ran out of memory."""
    try:
        return run.loop()
    except (MemoryError, RuntimeError) as error:
        where = out_of_memory_on(error)
        if where is None or run.trainer.is_whole:       # not by a step, but by what is measured or shown
            raise
        raise memory.exhausted(run.config, run.place, len(run.classes or ()), _has_begun(run.config), where) from None


def require_memory(config, place, classes, found=None):
    """Raise what `memory.require` raises: a step needs more memory than there is."""
    memory.require(config, place, len(classes or ()), _has_begun(config), found)


def _has_begun(config):
    """Return whether the run has checkpoints, so that its networks are given."""
    folders = RunFolders.of(config)
    return checkpoint.has_any(folders.models) and not _is_restart(config, folders)


def compare_with_run(config, dataset):
    """Return the Classes of the data set, or None. Raise UsageError if the run of `config` was trained on other
    pictures or classes, CheckpointError if it cannot be read.
    """
    folders = RunFolders.of(config)
    state = None if _is_restart(config, folders) else checkpoint.load_step(folders.models, config.pretrained_model, say)
    return _compare(config, state, dataset, say)[1]


def _is_restart(config, folders):
    """Return whether an old run is moved aside: by `--restart true`, or by one that was killed in the midst of it.

    Raise UsageError if this run was to begin from `--pretrained_model`.
    """
    if folders.is_half_moved() and config.pretrained_model is not None:
        raise UsageError(f"--pretrained_model {config.pretrained_model}: '{config.version}' is being moved aside, as a "
                         f"--restart true was killed.\nLeave the flag out; or delete {folders.moving}.")
    return config.restart or folders.is_half_moved()


def _find_end(config, folders, step):
    """Return in words why a run that has reached `step` has ended, and how it goes on; None if it has not."""
    if step >= config.total_step:
        return f"reached step {step} of --total_step {config.total_step}; raise it to train on"
    standing = find_standing(config, folders, step) if config.stop == "auto" else None
    if standing and standing.is_done(config):
        return f"ended at step {step}, as {standing.in_words()}; --stop never trains on"
    return None


def _finish_page(config, folders):
    """Write the page of a run that may have been killed while it wrote its last one. Failures do not matter."""
    with contextlib.suppress(OSError):
        folders.remove_leftovers()
        page.write_pages(folders, config, live=page.Live(page.DONE))


def _load_what_is_needed(config, place, state, classes, pictures):
    """Return the Meter, or None. Raise DataError or UsageError if weights are missing, or memory, or pictures for the
    metrics, or the package that --wandb needs, or --classes.
    """
    if config.classes is not None:
        require_classes(classes).choose(config.classes)
    boards.require_wandb(config)
    require_memory(config, place, classes)
    if config.metric_step:
        refuse_few(config.metrics, pictures, "real")
    families.require(config)
    if state is None:
        metadata.require(config)
    return Meter(config, place) if config.metric_step else None


def _owner(config):
    return f"--version {config.version}"


def _claim(config, folders, saved, restart):
    """Create and lock the run's folders, after moving an old run aside for a `restart`. Return the lock.

    Raise LockedError if another process trains, or has trained since the steps `saved` were listed.
    """
    folders.create()
    lock = FolderLock(folders.each(), _owner(config))
    if checkpoint.steps_in(folders.models) != saved:
        lock.close()
        raise LockedError(f"{_owner(config)}: another process has trained in the meantime; run the same command again")
    folders.remove_leftovers()
    if restart and (checkpoint.has_any(folders.models) or folders.is_half_moved()):
        lock.close()                                    # its files move with the folders
        def rename_scores(name):
            with contextlib.suppress(OSError):          # a table that is wrong is no reason not to train
                score_table.rename(config.log_path, config.version, name)

        say(f"the run '{config.version}' is now called '{folders.move_aside(rename_scores)}'")
        folders.create()
        lock = FolderLock(folders.each(), _owner(config))
    if lock.unsupported:
        say(f"warning: the file system of {lock.unsupported} has no locks: nothing keeps a second process from "
            "training in the same folders")
    return lock


def _find_bank(config, dataset, data, place, state):
    """Return the metadata bank of the checkpoint `state`, or of the data set for a new run; None if unused.

    `data` is the data set's record for checkpoints.
    """
    if not config.metadata:
        return None
    if state is None:
        return metadata.find_bank(config, dataset, place.device)
    bank = metadata.Bank.from_state(state["metadata"])
    before = state.get("data")                          # older checkpoints have none
    # of a folder that was moved or copied only paths and dates are others
    same = before and table.are_same(before, data) or metadata.same_pictures(bank, config, dataset)
    if not same:
        say("note: the pictures have changed since this run's metadata were computed; it keeps the old metadata")
    return bank


def _cure(config, dataset, before, now):
    """Return in words how a run goes on whose Classes, or None, were others `before` than those of the data `now`."""
    if before and now:
        return ("Give the classes their old names and order" if before.names != now.names else
                "Give the pictures their old classes")
    if now:
        return "Give --conditional false"
    if config.conditional is False:
        return "Give --conditional true"
    return f"Give the pictures their classes back ({dataset.stray() or 'they have none now'})"


def _compare(config, state, dataset, tell=lambda line: None):
    """Return (the data set's record for checkpoints, its Classes or None); tell how it differs from that of the
    checkpoint `state`.

    Raise UsageError if all pictures differ, or the classes, or those of most pictures; DataError if labels are wrong.
    """
    classes = find_classes(config, dataset)
    data = table.summarize(dataset, config, classes is not None)
    if state is None:
        return data, classes
    before = state.get("data")                          # older checkpoints have none
    changes = before and table.describe_changes(before, data)
    other = changes and table.is_other_set(before, data) and f"other pictures ({changes})"
    old_classes = Classes.from_state(state.get("classes"))
    changed_classes = describe_changes(old_classes, classes)
    moved, compared = table.count_relabelled(before or {}, data)
    relabelled = moved and f"{moved:,} of {compared:,} pictures have another class"
    if 2 * moved > compared:
        changed_classes = changed_classes or relabelled
    if other or changed_classes:
        fix = "Use" if other else f"{_cure(config, dataset, old_classes, classes)}, or use"
        raise UsageError(f"--version {config.version}: this run was trained on "
                         f"{other or f'other classes ({changed_classes})'}.\n{fix} another --version, with "
                         f"--init_from {config.version} to begin from its weights; or --restart true, which moves this "
                         "run aside and begins again.")
    mixed = before and config.holdout and (before.get("mixed") or not table.are_same(before, data)) and (
        "which pictures --holdout keeps follows from their number: some of those kept now were trained on")
    for note in (changes, relabelled, mixed):
        if note:
            tell(f"note: {note}")
    return data | ({"mixed": True} if mixed else {}), classes


def _load_source(config):
    """Return the state of the checkpoint that `--init_from` names. Raise CheckpointError."""
    try:
        return checkpoint.load_source(source_of(config), say)
    except CheckpointError as error:
        raise CheckpointError(f"--init_from {config.init_from}: {first_line(error)}") from None


def try_source(config, G, D, classes):
    """Raise what a run would raise for its `--init_from` and `--freeze_d`, with these networks on the meta device;
    report as it.
    """
    families.frozen_of_d(D, config.freeze_d)
    if config.init_from and not _has_begun(config):
        source = _load_source(config)
        shapes = {net: {key: weight.to("meta") for key, weight in source[net].items()} for net in ("G", "D", "G_ema")}
        _initialize(config, SimpleNamespace(G=G, D=D, G_ema=copy.deepcopy(G)), classes, source | shapes)


def _initialize(config, nets, classes, source):
    """Take the weights of the state `source`, that of `--init_from`; report what did not fit. None: nothing to do.

    `nets` and `classes` as for `families.take_weights`. Raise UsageError if no weights of G fit, or not all of the
    blocks that `--freeze_d` keeps.
    """
    if source is None:
        return
    name = config.init_from
    taken, left = families.take_weights(nets, source, classes)
    shapes = {f"G.{key}": weight.ndim for key, weight in nets.G.state_dict().items()}
    if not any(shapes.get(key, 0) > 1 for key in taken):
        raise UsageError(f"--init_from {name}: no weights of its G fit this one; use its --arch, --imsize and "
                         "--g_conv_dim")
    _check_frozen(config, nets.D, left)
    say(f"initialized from '{name}', step {source['step']}: {len(taken)} of {len(taken) + len(left)} tensors")
    if left:
        # by part of a network: G.blocks, D.to_logit, ...
        parts = Counter(".".join(key.split(".")[:2]) for key in left)
        say("  new, as they do not fit: " + ", ".join(f"{count} of {part}" for part, count in parts.items()))
    if len(left) > len(taken):
        say("warning: most are new, so this is close to training from scratch; networks of another --imsize or width "
            "have other shapes almost everywhere")


def _check_frozen(config, D, left):
    """Raise UsageError if weights that `--freeze_d` keeps are among `left`, which --init_from did not fill."""
    def random(count):
        return sorted({f"D.{key}" for key in families.frozen_of_d(D, count)} & set(left))

    missing = random(config.freeze_d)
    if not missing:
        return
    fewer = sum(1 for count in range(1, config.freeze_d) if not random(count))
    raise UsageError(f"--freeze_d {config.freeze_d}: {missing[0]} does not fit, and would stay random; "
                     "use the --imsize, --d_conv_dim and --channels of that run, or "
                     + (f"--freeze_d {fewer}" if fewer else "leave it out: not even the first block fits"))


def _restore(trainer, state, folders):
    """Resume from the checkpoint `state`, or start a new run if it is None; report which, and changed settings."""
    config = trainer.config
    if distributed.is_first():
        with contextlib.suppress(OSError):              # as in `_claim`
            score_table.give_up_after(config.log_path, config.version, -1 if state is None else state["step"])
    if state is None:
        moved = 0
        if distributed.is_first():
            moved = folders.supersede_records_after(-1)
            boards.forget_wandb_run(folders.logs)
        if moved:
            say(f"{moved} records of an older run moved to {folders.samples / 'superseded'}")
        say(f"starting '{config.version}'; run {to_resume(config)} again to resume from the newest checkpoint\n"
            f"watch it in a browser, from step {min(config.sample_step, config.total_step)} on: "
            f"{folders.samples / page.NAME}")
        return
    trainer.restore(state)
    if distributed.is_first():
        moved = checkpoint.supersede_after(folders.models, trainer.step)
        if moved:
            say(f"later checkpoints ({', '.join(moved)}) moved to {folders.models / 'superseded'}")
        # of a run that was killed, too: the page would show what is given up beside what is drawn again
        folders.supersede_records_after(trainer.step)
        with contextlib.suppress(OSError):              # so that a lower --keep_checkpoints frees space now
            checkpoint.prune(folders.models, config.keep_checkpoints)
    distributed.barrier()
    say(f"resuming '{config.version}' from step {trainer.step}")
    processes, before = trainer.place.world_size, state.get("processes")       # older checkpoints lack it
    if before not in (processes, None):
        say(f"note: {processes} process{'es' * (processes > 1)}, were {before}")
    for name, value in json.loads(as_json(config)).items():
        # older checkpoints lack later flags; what their defaults are, if not derived, was done then
        was = state["config"].get(name, json.loads(json.dumps(FLAGS[name].default)))
        is_known = name in state["config"] or value is not None and was not in (DERIVED, "auto")
        if name in RUN_SETTINGS and value != was and is_known:
            say(f"  --{name} is now {value}, was {was}")
