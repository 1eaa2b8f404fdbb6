"""`--mode evaluate`: score a checkpoint's samples, or any folder of pictures, against real pictures.

Scores go to metrics.jsonl and the page of the run, and to scores.md, the table of all scores. Each is written as soon
as it is computed, so that interrupting the program loses only the unfinished one.

`METRICS` in flags/scores.py names the file of this folder that computes a metric. `Meter` computes the metrics that
compare two sets of pictures; each other file has `evaluate(evaluation)`, a generator of lists of Scores, and
`require(config)`, which raises if something that it needs is missing. All that can be missing is asked for before the
first score is computed.
"""

from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path

import data_loader
from dataset.images import ThreadedReader, open_pictures
from device import distributed
from device.distributed import Place, say
from errors import CheckpointError, DataError, UsageError, first_line
from flags.pictures import PictureShape, as_imsize, sides
from flags.scores import METRICS
from gallery import page
from generate.draw import DrawnSamples
from generate.trained import TrainedGenerator, folder_as_file_part, generator_of, load_state
from metrics.meter import Meter, Reference, of_folder, of_run, refuse_few
from parameter import Config
from storage import checkpoint, score_table
from storage.folders import RunFolders, require_folders
from storage.journal import BY_HAND, MetricsLog


@dataclass(frozen=True)
class Evaluation:
    """The inputs and output paths of the metrics in one evaluation.

    `reference`: the real pictures, None if no metric needs them. `sample_sets()` is an iterable of (suffix of file
    names, set of uint8 pictures, source). `picture_path(name, sampler)` is the Path of an output picture; `sampler`:
    whether it depends on --metadata_sample. `trained` and `step` are None if a folder (--fake_dir) is evaluated.
    """

    config: Config
    place: Place
    reference: Reference | None
    sample_sets: Callable
    picture_path: Callable
    trained: TrainedGenerator | None = None
    step: int | None = None


def evaluate(config, place, precision):
    """Compute and record `--metrics`. Return exit code 0. Raises CheckpointError, DataError, UsageError, OSError."""
    folders = RunFolders.of(config)
    require_folders([Path(config.log_path)] if config.fake_dir else [folders.logs, folders.samples])
    code = _evaluate_folder(config, place) if config.fake_dir else _evaluate_run(config, place, precision)
    distributed.barrier()           # a rank that exits while another still receives from it can abort the other
    return code


def load(config, place):
    """Return (the Meter, or None; the modules of the other metrics). Raise if something that they need is missing."""
    chosen = [row for name, row in METRICS.items() if name in config.metrics]
    others = [import_module(f"metrics.{file}") for file in dict.fromkeys(row.file for row in chosen if not row.of_sets)]
    for module in others:
        module.require(config)
    return Meter(config, place) if any(row.of_sets for row in chosen) else None, others


def _evaluate(evaluation, meter, others, samples, source, report, keep_best=lambda scores, names: None):
    """Compute the metrics that `load` returned: `meter` on `samples`, then the others; report each."""
    if evaluation.reference:
        refuse_few(evaluation.config.metrics, len(evaluation.reference), "real")
    if meter:
        meter.prepare(evaluation.reference)
        scores = meter.measure(samples, source)
        report.add(scores)
        keep_best(scores, meter.scores_by_rank())
    for module in others:
        for scores in module.evaluate(evaluation):
            report.add(scores)
    report.end()
    return 0


# ----------------------------------------------------------------------------------------------------------- a run


def _evaluate_run(config, place, precision):
    state = load_state(config)                          # once: a run that goes on writes newer ones meanwhile
    trained = generator_of(state, config, place, precision)
    distributed.require_same((trained.step, trained.weights), CheckpointError(
        f"--version {config.version}: the processes found different checkpoints, as the run goes on.\n"
        "Give one of them: --pretrained_model STEP."))
    trained.G.requires_grad_(False)
    _refuse_without_classes(config, trained)
    needs_pictures = any(METRICS[name].of_folders or METRICS[name].of_classes for name in config.metrics)
    read_reference = _find_reference(config) if needs_pictures else lambda: None
    meter, others = load(config, place)
    reference = read_reference()
    _refuse_without_classes(config, trained, reference)
    say(f"evaluating '{config.version}' at step {trained.step}")

    def samples_of(generator):
        return DrawnSamples(generator.G, generator.latents, config.num_eval, config.seed, precision, config.imsize)

    def sample_sets():
        # separately for each sampler: samples with the metadata of one training picture are more likely to be copies
        for sampler in ("bank", "gauss") if config.metadata else (None,):
            changed = Config.of({**vars(config), "metadata_sample": sampler})
            generator = generator_of(state, changed, place, precision) if sampler else trained
            yield f"_{sampler}" if sampler else "", samples_of(generator), generator.latents.source(config.seed)

    def picture_path(name, sampler):
        seed = "" if config.seed == trained.own.get("seed", config.seed) else f"_seed{config.seed}"
        return trained.path(name + seed, ".png", sampler)

    def keep_best(scores, names):
        if not config.real_dir and config.truncation is None and distributed.is_first():
            _keep_best(config, trained, scores, names)

    evaluation = Evaluation(config, place, reference, sample_sets, picture_path, trained, trained.step)
    report = _Report(config, config.version, trained)
    return _evaluate(evaluation, meter, others, samples_of(trained), trained.latents.source(config.seed), report,
                     keep_best)


def _refuse_without_classes(config, trained, reference=None):
    """Raise UsageError if a metric needs classes and the run has none, DataError if the Reference has none."""
    needy = ",".join(name for name in config.metrics if METRICS[name].of_classes)
    if needy and trained.latents.classes is None:
        raise UsageError(f"--metrics {needy}: this run has no classes; leave {needy} out, or evaluate a run that was "
                         "trained with --conditional true")
    if needy and reference and reference.dataset.labels is None:
        raise DataError(f"--metrics {needy}: {reference.words} have no classes; put those of each class into a "
                        f"subfolder of its name, or leave {needy} out")


def _keep_best(config, trained, scores, names):
    """Copy the evaluated checkpoint to best.pth if its score is the best so far under this protocol.

    The first of `names` that was measured decides.
    """
    folder = trained.folders.models
    path = checkpoint.path_of(folder, trained.step)
    try:
        best = checkpoint.best_score(folder)
        better = score_table.better_score(scores, best, names)
        comparable = better and (best is None or score_table.comparable(better, best))
        if comparable and config.pretrained_model != "best" and path.is_file():     # training may have deleted it
            checkpoint.save_best({**checkpoint.load(path), "best": better}, folder)
            name = better["metric"]
            say(f"step {trained.step} has the best {name} so far, {better[name]:.4g}: saved as "
                f"{checkpoint.best_path(folder)}")
    except CheckpointError as error:                    # the scores count, this is done by the way
        say(f"warning: the best checkpoint is not kept: {first_line(error)}")


class _Report:
    """Records scores. Only rank 0 writes."""

    def __init__(self, config, name, trained=None):
        self.config, self.name, self.trained = config, name, trained
        self.step = trained.step if trained else None

    def add(self, scores):
        """Print and record these scores."""
        if not distributed.is_first():
            return
        entries = score_table.as_entries(self.name, self.step, scores)
        say("\n" + "\n".join(score_table.tables(entries)))        # first: a full disk must not cost the figures
        score_table.record(self.config.log_path, entries)
        if self.trained:
            log = MetricsLog(self.trained.folders.logs, self.config.use_tensorboard)
            for score in scores:
                log.write(self.step, {**score.line(), **BY_HAND})
                try:
                    log.write_events(self.step, score.values)
                except Exception as error:              # whatever a library or a full disk may raise
                    say(f"warning: cannot write TensorBoard events ({type(error).__name__}: {first_line(error)})")
            log.close()
            self.trained.folders.samples.mkdir(parents=True, exist_ok=True)
            classes = self.trained.latents.classes
            page.write_pages(self.trained.folders, self.config, classes and len(classes))

    def end(self):
        """Print the paths of the outputs."""
        if self.trained:
            say(f"curves and pictures: open {self.trained.folders.samples / page.NAME} in a browser")
        say(f"all scores so far: {Path(self.config.log_path, 'scores.md')}")


# -------------------------------------------------------------------------------------------------------- a folder


def _evaluate_folder(config, place):
    if config.imsize is None:
        config = Config.of({**vars(config), "imsize": _common_size(config)})
    samples = ThreadedReader(of_folder(
        config.fake_dir, PictureShape.of_config(config), "--fake_dir", config.max_pixels).dataset)
    read_reference = _find_reference(config)
    meter, others = load(config, place)
    reference = read_reference()
    _note_resized(config.fake_dir, "--fake_dir", config)

    def picture_path(name, sampler):
        path = Path(config.log_path, f"{folder_as_file_part(config.fake_dir)}_{name}.png")
        say(f"closest pairs: {path}")
        return path

    evaluation = Evaluation(config, place, reference, lambda: [("", samples, "the folder")], picture_path)
    return _evaluate(evaluation, meter, others, samples, "the folder", _Report(config, config.fake_dir))


def _find_reference(config):
    """Return `read() -> Reference`, of the pictures of --real_dir or of the run's training pictures.

    `read` checks the latter, which takes time and writes caches. Raise DataError if there are none.
    """
    if config.real_dir:
        reference = of_folder(config.real_dir, PictureShape.of_config(config), "--real_dir", config.max_pixels)
        _note_resized(config.real_dir, "--real_dir", config)
        return lambda: reference
    try:
        found = data_loader.find_dataset(config)
    except DataError as error:
        if not config.fake_dir:
            raise
        problem = first_line(error)
        raise DataError(f"{problem}\nname the real pictures with --real_dir DIR, or a run that has them with "
                        "--version") from None
    return lambda: of_run(config, data_loader.build_dataset(config, found))


def _sizes(folder):
    """Count the readable pictures of a folder, or archive, by size: {(width, height): number}, the commonest first."""
    dataset = open_pictures(Path(folder), 1)            # at whatever size: only headers are read
    with ThreadPoolExecutor() as pool:
        sizes = Counter(pool.map(dataset.size, range(len(dataset))))
    sizes.pop(None, None)
    return dict(sizes.most_common())


def _describe(sizes):
    parts = [f"{count:,} of {height}x{width}" for (width, height), count in list(sizes.items())[:3]]
    return ", ".join(parts) + (f", and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")


def _common_size(config):
    """Return the imsize of the pictures in --fake_dir. Raise DataError if they are not of one size."""
    try:
        sizes = _sizes(config.fake_dir)
    except DataError as error:
        raise DataError(f"--fake_dir: {error}; name a folder of pictures") from None
    if len(sizes) != 1:
        problem = (f"the pictures are not of one size ({_describe(sizes)})" if sizes
                   else "no picture can be read")
        raise DataError(f"--fake_dir {config.fake_dir}: {problem};\nadd --imsize N to center-crop each to a square and "
                        "resize it to N px, or --imsize HEIGHTxWIDTH")
    ((width, height),) = sizes
    return as_imsize(f"{height}x{width}")


def _note_resized(folder, flag, config):
    """Print how many pictures of a folder will be brought to the size of `config`."""
    sizes, (height, width) = _sizes(folder), sides(config.imsize)
    count = sum(n for size, n in sizes.items() if size != (width, height))
    if count:
        how = {"crop": "center-cropped to these proportions", "pad": "padded", "stretch": "stretched"}[config.fit]
        say(f"note: {flag}: {count:,} of {sum(sizes.values()):,} pictures are not {height}x{width}: they are {how} and "
            "resized, as in training")
