"""A training run: the loop of steps, and what it logs, shows, measures and saves on the way.

It goes on from its newest checkpoint, keeps every other process out of its folder, and ends at `--total_step`, at a
signal after the step at hand, or where a number is no longer finite.
"""

import json
import math
import signal
import time

import torch

import checkpoint
import distributed
import gallery
import metadata
import page
import scores
import utils
from data_loader import real_batches
from distributed import say
from failures import LockedError, NonFiniteError
from flags import RUN_SETTINGS
from journal import Journal
from parameter import as_json
from trainer import Trainer

RECORD_IMAGES = 64          # that batch statistics are measured on for a look; a checkpoint takes them all


class _Interrupt:
    """SIGINT and SIGTERM ask for an end after the current step; a second one ends at once."""

    def __init__(self):
        self.signal = None
        self._before = {}

    def _handle(self, number, frame):
        if self.signal is not None:
            raise KeyboardInterrupt
        self.signal = number

    def of_one(self, place):
        """() -> whether there was a signal; never, where of several processes one would stop and the others wait."""
        return lambda: place.world == 1 and self.signal is not None

    def __enter__(self):
        for number in (signal.SIGINT, signal.SIGTERM):
            self._before[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception):
        for number, handler in self._before.items():
            signal.signal(number, handler)


def train(config, dataset, place):
    """Train until `--total_step`, going on from the newest checkpoint. Returns the exit code: 0, 130 or 143.

    Raises LockedError, CheckpointError, NonFiniteError, DataError.
    """
    folders = utils.RunFolders.of(config)
    if config.pretrained_model is not None:
        checkpoint.require_step(folders.models, config.pretrained_model)    # before anything is written
    folders.create()
    lock = None
    if distributed.is_first():
        lock = utils.lock_folder(folders.models)
        if lock is None:
            raise LockedError(f"--version {config.version}: another process is training in {folders.models}; "
                              "wait for it, or use another --version")
    try:
        with _Interrupt() as interrupt:
            return _train(config, dataset, place, folders, interrupt)
    finally:
        if lock:
            lock.close()


def _train(config, dataset, place, folders, interrupt):
    state = checkpoint.load_asked(folders.models, config.pretrained_model, warn=say)
    trainer = Trainer(config, dataset, place, _find_bank(config, dataset, place, state))
    _go_on(trainer, state, folders)
    del state                                           # a checkpoint in memory, no longer needed
    if trainer.step >= config.total_step:
        say(f"nothing to do: '{config.version}' has reached step {trainer.step} of --total_step {config.total_step}; "
            f"a larger one goes on. Open {folders.samples / page.NAME} in a browser")
        return 0
    first = distributed.is_first()
    # before the first step: missing weights must not show after hours
    meter = scores.Meter(config, scores.of_run(config, dataset), place,
                         interrupt.of_one(place)) if config.metric_step else None
    if interrupt.of_one(place)():
        say(f"interrupted before step {trainer.step + 1}; the same command starts again there")
        return 128 + interrupt.signal
    real_images = real_batches(config, dataset, trainer.samples_seen, place.device, place.rank, place.world)
    journal = Journal(folders.logs, config.use_tensorboard, going_on_from=trainer.step) if first else None
    progress = distributed.progress(config.total_step, "step", initial=trainer.step)
    try:
        if first:
            utils.write_atomically(folders.models / "config.json", lambda path: path.write_text(as_json(config)))
            gallery.save_grid(trainer.real_pictures, folders.samples / "real.png")
        return _loop(trainer, real_images, meter, journal, progress, interrupt)
    finally:
        progress.close()
        real_images.close()
        if journal:
            journal.close()


def _find_bank(config, dataset, place, state):
    """The run's metadata: those that it was started with, in the checkpoint `state`, or those of the data set."""
    if not config.metadata:
        return None
    if state is None:
        return metadata.find_bank(config, dataset, place.device)
    bank = metadata.Bank.from_state(state["metadata"])
    if not metadata.same_pictures(bank, config, dataset):
        say("note: the pictures have changed since this run's metadata were taken; it keeps those")
    return bank


def _go_on(trainer, state, folders):
    """Restore `state`, the checkpoint to go on from, if there is one, and say so."""
    config = trainer.config
    if state is None:
        say(f"starting '{config.version}'; the same command again goes on from its newest checkpoint")
        return
    trainer.restore(state)
    if distributed.is_first():
        moved = checkpoint.set_aside_after(folders.models, trainer.step)
        if moved:
            say(f"later checkpoints ({', '.join(moved)}) moved to {folders.models / 'superseded'}")
            folders.set_aside_records_after(trainer.step)
    distributed.barrier()
    say(f"going on with '{config.version}' from step {trainer.step}")
    for name, value in json.loads(as_json(config)).items():
        if name in RUN_SETTINGS and name in state["config"] and state["config"][name] != value:
            say(f"  --{name} is now {value}, was {state['config'][name]}")


class _Window:
    """Sums of the statistics since the last log line, on the device, and the time spent in steps."""

    def __init__(self):
        self.sums, self.steps, self.began = {}, 0, time.perf_counter()

    def add(self, stats):
        for name, value in stats.items():
            self.sums[name] = self.sums[name] + value if name in self.sums else value
        self.steps += 1

    def means(self):
        """{name: float} over the window and all processes. This waits for the device; all processes must call it."""
        values = distributed.mean_over_processes(torch.stack([total.float() for total in self.sums.values()]))
        return dict(zip(self.sums, (values / self.steps).tolist(), strict=True))

    def leave_out(self, began):
        """Take the time since `began` (records, checkpoints) out of the window's."""
        self.began += time.perf_counter() - began


def _loop(trainer, real_images, meter, journal, progress, interrupt):
    """Steps, records and measures until the end or a signal. Returns the exit code."""
    config, place, folders = trainer.config, trainer.place, trainer.folders
    figures = {}
    good_until = trainer.step
    window = _Window()
    while trainer.step < config.total_step:
        window.add(trainer.train_step(real_images))
        progress.update()
        step = trainer.step
        last = step == config.total_step
        log, show, save = (last or step % every == 0
                           for every in (config.log_step, config.sample_step, config.model_save_step))
        measure = meter is not None and (last or step % config.metric_step == 0)
        # processes must agree on the step to end at; they talk about it when they wait for each other anyway
        stop = interrupt.signal is not None if place.world == 1 else log and distributed.any_process(
            interrupt.signal is not None, place.device)
        if not (log or show or save or measure or stop):
            continue

        means = window.means()
        wrong = [name for name, value in means.items() if not math.isfinite(value)]
        if (save or measure or stop) and not wrong and not trainer.is_finite():
            wrong = ["a weight"]                        # the losses of this step were computed before its update
        if wrong:
            raise NonFiniteError(_not_finite(wrong, good_until, step, folders.models))
        good_until = step
        elapsed = time.perf_counter() - window.began
        aside = time.perf_counter()
        if save or measure or stop:
            trainer.settle()
        elif show:
            trainer.settle(RECORD_IMAGES)
        if show and journal:
            figures = trainer.write_pictures()
        if log:
            gammas = trainer.family.gammas(trainer.G, trainer.D)
            values = torch.cat(list(gammas.values())).tolist() if gammas else []        # waits once for all of them
            scalars = {
                **means, **{f"gamma/{layer}": value for layer, value in zip(gammas, values, strict=True)}, **figures,
                "epoch": trainer.samples_seen / len(trainer.dataset),
                "sec_per_step": elapsed / window.steps,
                "images_per_sec": config.batch_size * config.d_iters * window.steps / elapsed,
            }
            if place.device.type == "cuda":
                scalars["gpu_memory_gib"] = torch.cuda.max_memory_allocated(place.device) / 2**30
            if journal:
                journal.write(step, scalars)
            progress.set_postfix_str(_summary(scalars), refresh=False)
            figures = {}
        if save or stop:
            state = trainer.state()
            if journal:
                checkpoint.save(state, folders.models)
                checkpoint.prune(folders.models, config.keep_checkpoints)
        if measure and not stop:
            _measure(trainer, meter, journal, progress, interrupt)
        if (show or measure) and journal:
            page.write_pages(folders, config)
        if log:
            window = _Window()
        else:
            window.leave_out(aside)
        if stop and not last:
            progress.close()
            say(f"interrupted: step {step} is saved in {folders.models}; the same command goes on from there")
            return 128 + (interrupt.signal or signal.SIGTERM)
    progress.close()
    say(f"done: {config.total_step} steps. Open {folders.samples / page.NAME} in a browser")
    return 0


def _measure(trainer, meter, journal, progress, interrupt):
    """Take the metrics, write them down, and keep the checkpoint as best.pth if its fid is the best so far."""
    config, folders = trainer.config, trainer.folders
    found = trainer.measure(meter, interrupt.of_one(trainer.place))
    if found is None:
        return
    if journal:
        for score in found:
            journal.write(trainer.step, score.line())
        scores.record(config.log_path, config.version, trainer.step, found)
        values = {name: value for score in found for name, value in score.values.items()}
        progress.write(f"step {trainer.step}: " + ", ".join(f"{name} {value:.4g}" for name, value in values.items()))
    better = distributed.gather(scores.better_fid(found, checkpoint.best_score(folders.models))
                                if distributed.is_first() else None)[0]
    if better:
        state = {**trainer.state(), "best": better}
        if journal:
            checkpoint.save_best(state, folders.models)


def _summary(scalars):
    """The tail of the progress line: losses, gammas, memory."""
    parts = [f"D {scalars['d_loss']:.3f} G {scalars['g_loss']:+.3f}"]
    if "gp" in scalars:
        parts.append(f"gp {scalars['gp']:.3f}")
    gammas = [f"{name[6:]} {value:+.3f}" for name, value in scalars.items() if name.startswith("gamma/")]
    if gammas:
        parts.append("gamma " + " ".join(gammas))
    if "gpu_memory_gib" in scalars:
        parts.append(f"{scalars['gpu_memory_gib']:.1f} GiB")
    return " | ".join(parts)


def _not_finite(wrong, good_until, step, models):
    names = ", ".join(wrong)
    saved = checkpoint.steps_in(models)
    newest = f"the checkpoint of step {saved[-1]} is good" if saved else "no checkpoint was written yet"
    return (f"{names} became NaN or infinite between steps {good_until} and {step}; {newest}.\n"
            "Try a lower --g_lr and --d_lr, or --sn both.")
