"""`--mode evaluate`: a checkpoint's samples, or anybody's folder, against real pictures.

What is found goes to metrics.jsonl and the page of the run, and to scores.md, the table of everything that was ever
scored. Each metric is written down as soon as it is there: ending the program loses the unfinished one alone.
"""

import json
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch

import checkpoint
import cost
import data_loader
import datasets
import distributed
import gallery
import metrics
import page
import perceptual
import sampler
import scores
import vgg
from decode import find_pictures, picture_size
from distributed import say
from failures import DataError
from flags import DURING_TRAINING, OF_FOLDERS
from journal import Journal
from parameter import Config
from scores import Score
from utils import write_atomically

HELD_OUT = 0.1          # share of the pictures that back-tracking takes of a run that held none out
BACKTRACKED = 100       # pictures that are back-tracked at the most
PAIRS = 16              # closest pairs that are shown
PER_ROW = 8
OTHERWISE = "--metrics without nearest and lpips"


def evaluate(config, place):
    """Take `--metrics` and write them down. Returns exit code 0. Raises CheckpointError, DataError, UsageError."""
    code = _evaluate_folder(config, place) if config.fake_dir else _evaluate_run(config, place)
    distributed.barrier()           # one that leaves while another still receives can abort it
    return code


# ----------------------------------------------------------------------------------------------------------- a run


def _evaluate_run(config, place):
    source = sampler.open_source(config, place)
    source.G.requires_grad_(False)
    report = _Report(config, config.version, source.step, source)
    if set(config.metrics) & set(OF_FOLDERS):
        reference = _reference(config, config.imsize)
    say(f"evaluating '{config.version}' at step {source.step}")
    if set(config.metrics) & set(DURING_TRAINING):
        found = scores.Meter(config, reference, place).measure(
            _samples(config, source, place), source.latents.source(config.seed))
        report.add(found)
        if not config.real_dir and distributed.is_first():
            _keep_best(config, source, found)
    if "nearest" in config.metrics:
        lpips, usual = _lpips(config, place), None
        for how in ("bank", "gauss") if config.metadata else (None,):
            # with one training picture's metadata samples might be copies where others are not
            drawing = sampler.open_source(Config.of({**vars(config), "metadata_sample": how}), place) if how else source
            picture = source.folders.samples / f"{source.step:07d}_nearest{f'_{how}' if how else ''}.png"
            score, usual = _nearest(config, reference, _samples(config, drawing, place), lpips, place,
                                    drawing.latents.source(config.seed), picture, source.step, usual)
            report.add([score])
    if "lpips" in config.metrics:
        report.add([_backtrack(config, source, _lpips(config, place), place)])
    if "cost" in config.metrics and distributed.is_first():
        report.add(cost.measure(config, source.latents.bank, place))
    report.end()
    return 0


def _samples(config, source, place):
    return metrics.Drawn(source.G, source.latents, config.num_eval, config.seed, source.precision, config.imsize)


class _Report:
    """Where scores go. Only the first process writes."""

    def __init__(self, config, name, step, source=None):
        self.config, self.name, self.step, self.source = config, name, step, source

    def add(self, found):
        """Write these scores down and print them."""
        if not distributed.is_first():
            return
        lines = scores.record(self.config.log_path, self.name, self.step, found)
        if self.source:
            journal = Journal(self.source.folders.logs, self.config.use_tensorboard)
            for score in found:
                journal.write(self.step, score.line())
            journal.close()
            page.write_pages(self.source.folders, self.config)
        say("\n" + "\n".join(lines))

    def end(self):
        """Say where all of it is."""
        if self.source:
            say(f"curves and pictures: open {self.source.folders.samples / page.NAME} in a browser")
        say(f"all scores so far: {Path(self.config.log_path, 'scores.md')}")


def _keep_best(config, source, found):
    """Make the evaluated checkpoint best.pth if its fid is the best by this protocol."""
    best = checkpoint.best_score(source.folders.models)
    better = scores.better_fid(found, best)
    comparable = best is None or any(scores.same_kind(score, best) for score in found)
    path = checkpoint.path_of(source.folders.models, source.step)
    if better and comparable and config.pretrained_model != "best" and path.is_file():  # a training may have pruned it
        state = checkpoint.load(path)
        checkpoint.save_best({**state, "best": better}, source.folders.models)
        say(f"step {source.step} has the best fid so far, {better['fid']:.2f}: kept as "
            f"{checkpoint.best_path(source.folders.models)}")


# -------------------------------------------------------------------------------------------------------- a folder


def _evaluate_folder(config, place):
    imsize = config.imsize or _one_size(config)
    reference = _reference(config, imsize)
    fake = scores.of_folder(config.fake_dir, imsize, "--fake_dir")
    _note_others(config.fake_dir, "--fake_dir", imsize)
    report = _Report(config, config.fake_dir, None)
    drawn = metrics.Decoded(fake.dataset)
    if set(config.metrics) & set(DURING_TRAINING):
        if "swd" in config.metrics and imsize & (imsize - 1):
            raise DataError(f"--metrics swd: needs pictures of 16, 32, 64, ... px, these have {imsize}; "
                            "add --imsize 64, or another power of two")
        report.add(scores.Meter(config, reference, place).measure(drawn, "the folder"))
    if "nearest" in config.metrics:
        name = Path(config.fake_dir).resolve().name
        path = Path(config.log_path, f"{name}_nearest.png")
        score, _ = _nearest(config, reference, drawn, _lpips(config, place), place, "the folder", path, None)
        report.add([score])
        say(f"the closest pairs: {path}")
    report.end()
    return 0


def _reference(config, imsize):
    """The real pictures: those of --real_dir, or what the run was trained on. Raises DataError."""
    if config.real_dir:
        reference = scores.of_folder(config.real_dir, imsize, "--real_dir")
        _note_others(config.real_dir, "--real_dir", imsize)
        return reference
    sized = Config.of({**vars(config), "imsize": imsize})
    try:
        return scores.of_run(sized, data_loader.build_dataset(sized))
    except DataError as error:
        if not config.fake_dir:
            raise
        problem = str(error).splitlines()[0]
        raise DataError(f"{problem}\nname the real pictures with --real_dir DIR, or a run that has them with "
                        "--version") from None


def _sizes(folder):
    """{(width, height): pictures} of a folder's picture files, the most frequent first; without unreadable ones."""
    with ThreadPoolExecutor() as pool:
        sizes = Counter(pool.map(picture_size, find_pictures(Path(folder))))
    sizes.pop(None, None)
    return dict(sizes.most_common())


def _in_words(sizes):
    words = [f"{count:,} of {width}x{height}" for (width, height), count in list(sizes.items())[:3]]
    return ", ".join(words) + (f", and {len(sizes) - 3} more sizes" if len(sizes) > 3 else "")


def _one_size(config):
    """The side of the pictures in --fake_dir. Raises DataError where they are not squares of one size."""
    try:
        sizes = _sizes(config.fake_dir)
    except DataError as error:
        raise DataError(f"--fake_dir: {error}; name a folder of pictures") from None
    if len(sizes) != 1 or len(set(next(iter(sizes)))) != 1:
        problem = (f"the pictures are not squares of one size ({_in_words(sizes)})" if sizes
                   else "no picture can be read")
        raise DataError(f"--fake_dir {config.fake_dir}: {problem};\nadd --imsize N to take the central square of each, "
                        "resized to N px")
    return next(iter(sizes))[0]


def _note_others(folder, flag, imsize):
    """Say how many pictures of a folder will be cut and resized."""
    sizes = _sizes(folder)
    others = sum(count for size, count in sizes.items() if size != (imsize, imsize))
    if others:
        say(f"note: {flag}: {others:,} of {sum(sizes.values()):,} pictures are not {imsize}x{imsize} and are cut to "
            "their central square and resized to it, as in training")


# ---------------------------------------------------------------------------------------------------------- LPIPS


def _lpips(config, place):
    def build():
        return vgg.lpips(config.vgg_weights, OTHERWISE)

    return distributed.after_first(build, build).to(place.device)       # the first may have to download the weights


def _weights_in_words(config):
    found = vgg.FILE.identity(config.vgg_weights)
    return {vgg.FILE.sha256: "LPIPS on VGG-16", "random": "LPIPS on VGG-16 with RANDOM weights (for tests)"}.get(
        found, f"LPIPS on a VGG-16 of other weights (sha256 {found[:8]})")


def _nearest(config, reference, drawn, lpips, place, source, path, step, usual=None):
    """(Score of how near samples are to training pictures, how near these are to each other), and a picture of the
    closest pairs. Raises DataError.
    """
    real = metrics.Decoded(reference.dataset)
    if len(real) < 2:
        raise DataError(f"--metrics nearest: {len(real)} real picture has no other to compare with; give more")
    neighbours = perceptual.nearest(lpips, real, drawn, place, usual)
    count, S = len(neighbours.distance), drawn[0:1].shape[-1]
    if distributed.is_first():
        _show_pairs(real, drawn, neighbours, path, step)
    return Score(neighbours.scores(), (
        f"{_weights_in_words(config)} at {min(S, perceptual.SIDE)} px from each of {count:,} samples to the nearest of "
        f"{reference.words}, over that of {len(neighbours.real):,} training pictures to the nearest other; "
        "nearest: ratio of the medians, far under 1 is copying; nearest_copies: share of samples nearer than 99 % of "
        "the training pictures are, or than a hundredth of what is usual"), source), neighbours.real


def _show_pairs(real, drawn, neighbours, path, step):
    """Write the closest pairs, PER_ROW to a row, with each pair's distance over the usual one between real pictures."""
    usual = neighbours.real.median().clamp(min=1e-12)
    closest = neighbours.distance.argsort()[:PAIRS].tolist()
    rows, captions = {}, {}
    for start in range(0, len(closest), PER_ROW):
        pairs = closest[start:start + PER_ROW]
        named = f"samples {start + 1} to {start + len(pairs)}"
        rows[named] = data_loader.normalize(perceptual.pictures_at(drawn, pairs))
        below = f"the training pictures nearest to {named}"
        rows[below] = data_loader.normalize(perceptual.pictures_at(real, neighbours.index[pairs].tolist()))
        captions[below] = [f"{(neighbours.distance[i] / usual).item():.2f}" for i in pairs]
        if len(pairs) < PER_ROW and start:              # all rows are of one length
            for row in (named, below):
                blank = rows[row].new_full((PER_ROW - len(pairs), *rows[row].shape[1:]), -1)
                rows[row] = torch.cat([rows[row], blank])
    gallery.save_reconstructions(rows, path, "samples nearest to a training picture", step, captions,
                                 "numbers: LPIPS of the pair over the usual one between training pictures")


def _backtrack(config, source, lpips, place):
    """The Score of how well G draws held-out pictures, a picture of some and a file of all."""
    whole = data_loader.open_dataset(config)
    _, held_out = datasets.split(whole, config.holdout or HELD_OUT)
    if not config.holdout:
        say(f"note: this run was trained on all pictures, these {len(held_out)} too (--holdout 0.1 keeps some back): "
            "what follows is how well it draws what it knows")
    if len(held_out) > BACKTRACKED:
        held_out = datasets.Part(held_out, [i * len(held_out) // BACKTRACKED for i in range(BACKTRACKED)], "")
    pictures = metrics.Decoded(held_out)
    free = config.z_dim if not config.backtrack_metadata else source.latents.width
    found = perceptual.backtrack(source.G, source.latents, pictures, lpips, config.backtrack_steps, free, config.seed,
                                 place)
    if distributed.is_first():
        _write_each(config, source, held_out, found)
        _show_backtracked(source, pictures, found)
    never = "never trained on" if config.holdout else "TRAINED ON"
    return Score(found.scores(), (
        f"{_weights_in_words(config)} at {config.imsize} px between {len(held_out):,} pictures of "
        f"{scores.data_set(config)} ({never}) and what G draws "
        f"after {config.backtrack_steps} steps of Adam ({perceptual.RATE}) on "
        f"{'z and metadata' if config.backtrack_metadata else 'z'}, on LPIPS + {perceptual.MSE_WEIGHT} MSE, from the "
        f"nearest of {perceptual.STARTS} samples; mean ± standard deviation over the pictures"),
        source.latents.source(config.seed))


def _write_each(config, source, held_out, found):
    """logs/<version>/<step>_lpips.json: the numbers of every picture."""
    names = held_out.sources if len(held_out.sources) == len(held_out) else range(len(held_out))
    each = [{"picture": name, "lpips": distance, "mse": error} for name, distance, error in zip(
        names, found.lpips.tolist(), found.mse.tolist(), strict=True)]
    path = source.folders.logs / f"{source.step:07d}_lpips.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(each, indent=1) + "\n", encoding="utf-8"))
    say(f"the LPIPS of each picture: {path}")


def _show_backtracked(source, pictures, found):
    """Held-out pictures above what G came closest with, from the best to the worst, evenly."""
    order = found.lpips.argsort()
    shown = order[torch.linspace(0, len(order) - 1, min(PER_ROW, len(order))).round().long()].tolist()
    drawn = "the closest that G can draw, from the best to the worst"
    gallery.save_reconstructions(
        {"held-out pictures": data_loader.normalize(perceptual.pictures_at(pictures, shown)),
         drawn: found.images[shown]},
        source.folders.samples / f"{source.step:07d}_backtrack.png", "back-tracking", source.step,
        {drawn: [f"LPIPS {found.lpips[i].item():.3f}" for i in shown]})
