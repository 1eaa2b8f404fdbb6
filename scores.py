"""Scores of sets of pictures against a reference: how they are taken, in words, and the table of all of them.

A score never goes without its protocol: what decides the number, but for the pictures that are scored. Two scores
compare if their protocols are the same text.
"""

import json
import math
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch

import datasets
import distributed
import inception
import metrics
from cache import Cache
from distributed import say
from failures import DataError
from journal import open_to_add
from parameter import Config
from utils import write_atomically

PROCEDURE = 1           # to be raised when how reference features are taken changes: caches are made anew
SMALL = 2048            # pictures: with fewer a FID's covariance has not full rank


@dataclass(frozen=True)
class Score:
    """`values`, {name: float}, taken under `protocol`; `source` says what pictures were scored, such as G_ema's."""

    values: dict
    protocol: str
    source: str

    def line(self):
        """What metrics.jsonl holds of it, beside the step."""
        return {**self.values, "protocol": self.protocol, "source": self.source}


@dataclass(frozen=True)
class Reference:
    """The real pictures: a data set of uint8 (3, S, S), its name in protocols, its fingerprint."""

    dataset: object
    words: str
    fingerprint: str

    def __len__(self):
        return len(self.dataset)


def data_set(config):
    """What protocols call a run's data set."""
    return f"folder {Path(config.image_path).name}" if config.dataset == "folder" else config.dataset


def of_run(config, dataset):
    """What a run is scored against by default: all that it trains on. Raises DataError if a file has gone."""
    less = f", less the {config.holdout:g} held out" if config.holdout else ""
    return Reference(dataset, f"all {len(dataset):,} pictures of {data_set(config)}{less}",
                     datasets.fingerprint(dataset, config))


def of_folder(path, imsize, flag):
    """The pictures of a folder, which `flag` named, cut and resized as training would. Raises DataError."""
    config = Config.of({"dataset": "folder", "image_path": str(path), "imsize": imsize})
    try:
        dataset = datasets.Files(Path(path), imsize)
    except DataError as error:
        raise DataError(f"{flag}: {error}; name a folder of pictures") from None
    return Reference(dataset, f"all {len(dataset):,} pictures of folder {Path(path).name}",
                     datasets.fingerprint(dataset, config))


# --------------------------------------------------------------------------------------------------- taking scores


class Meter:
    """Measures sets of pictures against one reference, with those of `config.metrics` that compare two sets.

    What the reference needs is taken when it is built, or read from the cache: all processes must build it and call
    `measure`. If `stopped()` came true meanwhile it is not there, and nothing can be measured. Raises DataError,
    UsageError.
    """

    def __init__(self, config, reference, place, stopped=lambda: False):
        self.config, self.reference, self.place = config, reference, place
        self.seen_by_inception = [name for name in inception.METRICS if name in config.metrics]
        if not self.seen_by_inception:
            return
        _refuse_few(len(reference), "real", self.seen_by_inception)
        if not config.fake_dir:                         # nor this after hours, in training
            _refuse_few(config.num_eval, "generated", self.seen_by_inception)

        def load():
            return inception.load(config.inception_weights)

        # the first may have to download the weights
        self.net = distributed.after_first(load, load).to(place.device)
        self.real = self._reference_features(stopped)

    def measure(self, pictures, source, stopped=lambda: False):
        """[Score, ...] of a set of uint8 pictures, the same on every process; None if `stopped()` came true meanwhile.

        Raises DataError.
        """
        found = []
        if self.seen_by_inception:
            _refuse_few(len(pictures), "generated", self.seen_by_inception)
            fake = inception.take(self.net, pictures, self.place, "scoring", "is" in self.seen_by_inception, stopped)
            if fake is None:
                return None
            found.append(self._on_first(lambda: Score(
                inception.distances(self.real, fake, self.seen_by_inception, self.place.device),
                self._inception_protocol(pictures, fake), source)))
        if "swd" in self.config.metrics:
            found.append(self._on_first(lambda: self._sliced_wasserstein(pictures, source)))
        return found

    @staticmethod
    def _on_first(compute):
        """What compute() returns on the first process, on every one."""
        return distributed.gather(distributed.after_first(compute, lambda: None))[0]

    def _reference_features(self, stopped):
        config, reference = self.config, self.reference
        cache = Cache(config.cache_path, "reference", {
            "pictures": reference.fingerprint, "weights": inception.FILE.identity(config.inception_weights),
            "procedure": PROCEDURE, "rows": inception.MAX_ROWS, "torch-fidelity": version("torch-fidelity")})
        kept = distributed.gather(cache.read(_fits) if distributed.is_first() else None)[0]
        if kept is not None:
            say(f"reference: {reference.words}, seen by Inception before, read from {cache.path}")
            return inception.Features(len(reference), kept["mean"], kept["covariance"], kept["rows"])
        say(f"reference: {reference.words}, seen by Inception this once")
        features = inception.take(self.net, metrics.Decoded(reference.dataset), self.place, "reference",
                                  stopped=stopped)
        if distributed.is_first() and features is not None:
            cache.write({"mean": features.mean, "covariance": features.covariance, "rows": features.rows})
        return features

    def _sliced_wasserstein(self, pictures, source):
        return Score({"swd": metrics.sliced_wasserstein(metrics.Decoded(self.reference.dataset), pictures)},
                     f"sliced Wasserstein distance x 1000 (7x7 patches of a Laplacian pyramid); {self._sets(pictures)}",
                     source)

    def _sets(self, pictures):
        """The end of every protocol: what was compared."""
        S = pictures[0:1].shape[-1]
        return f"{len(pictures):,} samples at {S} px as 8-bit PNGs hold them, against {self.reference.words}, unflipped"

    def _inception_protocol(self, pictures, fake):
        """The same whichever of the metrics were asked for, so that a FID compares with a FID beside others."""
        words = [f"{weights_in_words(self.config.inception_weights)}, torch-fidelity {version('torch-fidelity')}, "
                 "one resize to 299 px", self._sets(pictures),
                 f"KID: {inception.KID_SUBSETS} subsets of {inception.kid_size(self.real, fake):,}",
                 f"precision, recall: {inception.NEIGHBOURS} nearest neighbours",
                 f"Inception Score: {min(inception.IS_SPLITS, fake.count)} splits"]
        if len(self.real.rows) < self.real.count:
            words.append(f"KID, precision, recall: {len(self.real.rows):,} of the real pictures")
        if min(len(self.reference), len(pictures)) < SMALL:
            words.append(f"fewer than {SMALL:,} pictures, their number moves the FID")
        return "; ".join(words)


def _fits(kept):
    shapes = [tuple(kept[name].shape) if isinstance(kept.get(name), torch.Tensor) else () for name in
              ("mean", "covariance", "rows")]
    return all(shapes) and shapes[1] == shapes[0] * 2 and shapes[2][1:] == shapes[0]


def _refuse_few(count, who, chosen):
    """Raise DataError if these metrics cannot be taken of `count` pictures."""
    least = inception.NEIGHBOURS + 1 if "pr" in chosen else 2
    if count < least:
        raise DataError(f"{count} {who} picture{'s' * (count != 1)}: --metrics {','.join(chosen)} need {least} at the "
                        "least, and some thousand to mean something")


def weights_in_words(weights):
    """What a protocol calls these `--inception_weights`."""
    found = inception.FILE.identity(weights)
    if found == inception.FILE.sha256:
        return f"TF-Inception 2015-12-05 (sha256 {found[:8]})"
    if found == "random":
        return "Inception with RANDOM weights (for tests, compares with nothing)"
    return f"Inception of other weights than the standard ones (sha256 {found[:8]})"


def better_fid(found, best):
    """What best.pth keeps of the fid in `found`, or None if there is none or `best`, its like, is as good.

    A best one that was taken by another protocol does not compare: it gives way.
    """
    for score in found:
        if "fid" in score.values and not (best and best["fid"] <= score.values["fid"] and same_kind(score, best)):
            return {"fid": score.values["fid"], "protocol": score.protocol, "source": score.source}
    return None


def same_kind(score, best):
    """Whether a Score and what best.pth keeps of one compare."""
    return (score.protocol, score.source) == (best["protocol"], best["source"])


# -------------------------------------------------------------------------------------------------------- the table


def record(log_path, name, step, found):
    """Add scores of `name` (a run, or a folder) to <log_path>/scores.jsonl, and write the table of all that are there
    as scores.md beside it. Returns the lines of these scores as Markdown. Raises OSError.
    """
    entries = [{"name": name, "step": step, "taken": time.strftime("%Y-%m-%d %H:%M"), **score.line()}
               for score in found]
    folder = Path(log_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open_to_add(folder / "scores.jsonl") as file:      # whole lines, from several programs at once
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))
    text = "\n".join([
        "# Scores", "", "Rows of one table compare: they were taken as the line above it says. Rows of different "
        "tables do not.", "", *tables(_read(folder / "scores.jsonl"))]) + "\n"
    write_atomically(folder / "scores.md", lambda path: path.write_text(text, encoding="utf-8"))
    return tables(entries)


def _read(path):
    """The entries in scores.jsonl, of those of one name, step, source and protocol the last; no damaged ones."""
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if _is_whole(entry):
            key = tuple(entry[part] for part in ("protocol", "name", "step", "source"))
            entries.pop(key, None)
            entries[key] = entry
    return list(entries.values())


def _is_whole(entry):
    return (isinstance(entry, dict) and "step" in entry and isinstance(entry["step"], (int, type(None)))
            and all(isinstance(entry.get(part), str) for part in ("protocol", "name", "source", "taken")))


def tables(entries):
    """Lines of Markdown: for each protocol its text and a table of the entries taken by it, those of one name in order
    of their steps.
    """
    lines = []
    for protocol in dict.fromkeys(entry["protocol"] for entry in entries):
        rows = [entry for entry in entries if entry["protocol"] == protocol]
        names = list(dict.fromkeys(entry["name"] for entry in rows))
        rows.sort(key=lambda entry: (names.index(entry["name"]), entry["step"] or 0))
        columns = list(dict.fromkeys(
            key for row in rows for key, value in row.items()
            if isinstance(value, (int, float)) and key != "step" and not key.endswith("_std")))
        lines += [protocol + ".", ""]
        lines += _table(["", "step", *columns, "pictures of", "taken"], [
            [_cell(row["name"]), "" if row["step"] is None else f"{row['step']:,}",
             *(_number(row, column) for column in columns), _cell(row["source"]), row["taken"]] for row in rows])
        lines.append("")
    return lines


def _table(head, rows):
    """Lines of a Markdown table, padded so that it can be read in a terminal; numbers stand to the right."""
    left = (0, len(head) - 2, len(head) - 1)
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width)
                                 in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def _cell(text):
    """Text that cannot end a cell of a table."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _number(row, column):
    """'41.21', or '0.0123 ± 0.0004' where there is a spread; '' where there is no number."""
    value, spread = row.get(column), row.get(f"{column}_std")
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = max(abs(value), abs(spread or 0))
    digits = max(0, min(5, 3 - math.floor(math.log10(size)))) if size else 3
    return f"{value:,.{digits}f}" + ("" if spread is None else f" ± {spread:,.{digits}f}")
