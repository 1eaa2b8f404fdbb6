"""Find unusable and duplicate pictures before training (`--check_data`).

First all cores look at each file's header and end, for what cannot be used, copies, sizes, values of more than 8 bits.
Then, at level `full`, they decode each picture, into the decoded cache if there is one. The results are cached below
`--cache_path`, so that the next run checks only new and changed files.
"""

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dataset import decode, workers
from dataset.decode import Levels, Traits, measure_levels
from dataset.images import EncodedDataset, ImageDataset, Lmdb, Lmdbs, Subset
from dataset.scan import NAMED
from device.distributed import is_first, on_first, say
from errors import DataError
from flags.pictures import PictureShape, short_side
from storage.cache import Cache
from utils import spread_indices, write_atomically

LEVELS = {"header": 1, "full": 2}
FULL = 10_000  # --check_data auto decodes every picture of data sets up to this size; of larger ones, header and end
SHARE = 0.01  # largest fraction of unusable pictures that is skipped instead of refused; of any set, one is
SAMPLE = 64  # pictures that are looked at for values of more than 8 bits with --check_data off
SHAPES = 16  # pictures whose shapes are looked at
KEPT = 0.5  # share of a usual picture that cropping should leave, at least
CHUNK = {"header": 512, "full": 16}  # pictures per task of a worker
EDGE = 2**15  # bytes hashed at either end of a file; files of up to twice this size are hashed whole
BAD, COPIES = "bad_images.jsonl", "duplicates.jsonl"  # the lists in the run's logs


@dataclass(frozen=True)
class Findings:
    """`bad`: {index: reason} of unusable pictures, of which those in `intact` may still be good files. `copies`:
    [[indices of byte-identical files], ...] of the others. `levels`: those of a set of which some pictures, `deep` in
    number, have values of more than 8 bits, in these `ranges`. `small`: the number of pictures smaller than half of
    --imsize.
    """

    bad: dict
    copies: list
    intact: frozenset = frozenset()
    levels: Levels | None = None
    deep: int = 0
    ranges: tuple = ()
    small: int = 0


def usable(dataset: ImageDataset, open_cache: Callable[[], ImageDataset], config) -> ImageDataset:
    """Return `open_cache()` (`dataset` or a cache of it) without the unusable pictures, and print what was found.

    It is kept in `dataset.findings`, for `write_lists`. Rank 0 checks; all ranks must call this. Raises DataError if
    more than one and than SHARE of the pictures are unusable, after writing the lists, which tell which ones to mend.
    """
    if not isinstance(dataset, EncodedDataset):
        return open_cache()
    if dataset.found:
        for line in dataset.found.lines():
            say(line)
    if config.check_data == "off":
        dataset.use_levels(on_first(lambda: sample_levels(dataset)))
        return open_cache()
    checks = []  # on rank 0

    def look() -> Findings:
        checks.append(Check(dataset, config))
        return checks[0].look()

    findings = on_first(look)
    dataset.use_levels(findings.levels)
    cached = open_cache()
    # a cache in memory is each rank's own, so this question is rank 0's, too
    seen = on_first(lambda: _without(findings.bad, cached).is_decoded())
    if _level(dataset, config) == "full":
        findings = on_first(lambda: checks[0].decode(cached))
    dataset.findings = findings
    _say_traits(dataset, findings, config)
    if not seen:                    # else it has been said
        on_first(lambda: _say_shape(dataset, config))
    _say_copies(dataset, findings, config)
    if findings.bad:
        _say_bad(dataset, findings, config)
    return _without(findings.bad, cached)


def _without(bad: Mapping[int, str], cached: ImageDataset) -> ImageDataset:
    return Subset(cached, [index for index in range(len(cached)) if index not in bad], "usable") if bad else cached


def _say_bad(dataset: EncodedDataset, findings: Findings, config):
    """Say which pictures are left out. Raise DataError if they are too many."""
    bad = [f"{dataset.name(index)}: {reason}" for index, reason in findings.bad.items()]
    shown = "\n  ".join(bad[:NAMED]) + (f"\n  and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    where = f", all listed in {decode.printable(_path(BAD, config))}" if _has_logs(config) else ""
    if len(bad) > max(1, SHARE * len(dataset)):
        damaged = len(findings.bad) - len(findings.intact)
        write_lists(dataset, config)
        delete = dataset.advice if damaged else "Mend that"
        raise DataError(f"{len(bad)} of the {dataset.summary} cannot be used{where}:\n  {shown}\n"
                        f"{delete}; only one, or up to {SHARE:.0%}, of the pictures would be skipped.")
    later = f"{where} once training starts" if where else ""
    say(f"pictures: {len(bad)} of {len(dataset)} cannot be used and are skipped{later}:\n  {shown}")


def _level(dataset: ImageDataset, config) -> str:
    return config.check_data if config.check_data in LEVELS else "full" if len(dataset) <= FULL else "header"


def _has_logs(config) -> bool:
    return config.mode == "train" and not config.dry_run


def _path(name: str, config) -> Path:
    return Path(config.log_path, config.version, name)


def write_lists(dataset: ImageDataset, config):
    """Write the lists of what `usable` found to the run's logs and remove outdated ones; on rank 0, in training only.

    JSON lines: a name of any bytes can be read back from them. `--mode clean_data` reads them.
    """
    findings = dataset.findings if isinstance(dataset, EncodedDataset) else None
    if findings is None or not _has_logs(config) or not is_first():
        return
    left_out = dataset.found.left_out if dataset.found else {}
    rows = {BAD: [{**dataset.entry(index), "reason": reason, "damaged": index not in findings.intact}
                  for index, reason in findings.bad.items()] +
                 [{"path": os.path.abspath(path), "reason": reason, "damaged": False}
                  for path, reason in left_out.items()],
            COPIES: [{**dataset.entry(copy), "copy_of": dataset.entry(first)}
                     for first, *copies in findings.copies for copy in copies]}
    for name, lines in rows.items():
        path = _path(name, config)
        path.with_suffix(".txt").unlink(missing_ok=True)  # of an older version
        if lines:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_list(path, lines)
        else:
            path.unlink(missing_ok=True)


def write_list(path: Path, rows: list[dict]):
    """Write one JSON object a line, in ASCII."""
    text = "".join(json.dumps(row) + "\n" for row in rows)
    write_atomically(path, lambda temporary: temporary.write_text(text, encoding="ascii"))


def _say_traits(dataset: EncodedDataset, findings: Findings, config):
    if findings.small:
        say(f"pictures: {findings.small} of {len(dataset)} {'is' if findings.small == 1 else 'are'} smaller than half "
            f"of --imsize {config.imsize} and will be blurred by enlarging; a smaller --imsize fits them")
    if findings.levels:
        ranges = " and ".join(f"{low:g}..{high:g}" for low, high in findings.ranges)
        say(f"pictures: {findings.deep} of {len(dataset)} {'has' if findings.deep == 1 else 'have'} values of more "
            f"than 8 bits; {ranges}, the range of the whole set, becomes 0..255")


def _say_shape(dataset: EncodedDataset, config):
    """Say it if more than half of a usual picture is cut away: most often, height and width have been mixed up."""
    shape = PictureShape.of_config(config)
    if shape.fit != "crop" or dataset.crop:
        return
    sizes = map(dataset.size, spread_indices(SHAPES, len(dataset)))
    kept = sorted((_share_kept(size, shape), size) for size in sizes if size)
    if kept and kept[len(kept) // 2][0] < KEPT:
        share, (width, height) = kept[len(kept) // 2]
        say(f"pictures: --imsize {config.imsize} cuts away {1 - share:.0%} of a usual picture, such as one of "
            f"{height}x{width} (height x width); choose a size nearer to that, or --fit pad")


def _share_kept(size: tuple[int, int], shape: PictureShape) -> float:
    """Return how much of a picture of `size` (width, height) is left when it is cropped to the shape's proportions."""
    ratio = size[0] * shape.height / (size[1] * shape.width)
    return min(ratio, 1 / ratio)


def _say_copies(dataset: EncodedDataset, findings: Findings, config):
    count = sum(len(group) - 1 for group in findings.copies)
    if count:
        original, copy, *_ = map(dataset.name, findings.copies[0])
        where = (f"all listed in {decode.printable(_path(COPIES, config))} once training starts" if _has_logs(config)
                 else f"such as {copy} of {original}")
        say(f"pictures: {count} {'is a copy' if count == 1 else 'are copies'} of others (byte-identical), {where}; "
            "training uses them anyway")


def sample_levels(dataset: EncodedDataset) -> Levels | None:
    """Return the Levels of a data set from some of its pictures: SAMPLE of those that may have more than 8 bits."""
    deep = [index for index in range(len(dataset)) if dataset.name(index).lower().endswith(_DEEP)
            or isinstance(dataset, (Lmdb, Lmdbs))]
    looks = _look_at(dataset, [deep[index] for index in spread_indices(SAMPLE, len(deep))])
    return measure_levels([look.traits for look in looks])


_DEEP = tuple(ending for format in ("PNG", "TIFF", "JPEG2000", "PPM") for ending in decode.FORMATS.get(format, ()))


class Check:
    """The check of one data set: `look`, then at level `full` also `decode`. Both return Findings."""

    def __init__(self, dataset: EncodedDataset, config):
        self.dataset, self.config, self.changed = dataset, config, False
        origin = {"home": os.path.abspath(dataset.home), "procedure": decode.CACHE_VERSION, "index": 2}
        if dataset.crop:
            origin["crop"] = dataset.crop
        if dataset.max_pixels != decode.MAX_PIXELS:     # left out where it is usual, for the caches that there are
            origin["max_pixels"] = dataset.max_pixels
        self.store = Cache(config.cache_path, "index", origin)
        self.index = _Index.of(dataset, self.store)

    def look(self) -> Findings:
        """Look at the header and the end of all pictures without a cached result; compare what may be copies."""
        dataset, index = self.dataset, self.index
        unchecked = np.flatnonzero(index.level == 0).tolist()
        looks = workers.spread(partial(_look_at, dataset), unchecked, CHUNK["header"], "checking")
        for picture, look in zip(unchecked, looks, strict=True):
            index.add(picture, look)
        # Large files of equal size and ends: only the hash of the whole file tells whether they are copies.
        ambiguous = [picture for group in index.groups("digest") for picture in group
                     if index.edges[picture] and not index.whole[picture]]
        digests = workers.spread(partial(_whole_digests, dataset), ambiguous, CHUNK["full"], "comparing")
        for picture, digest in zip(ambiguous, digests, strict=True):
            index.whole[picture] = digest
        return self._done(unchecked or ambiguous)

    def decode(self, cached: ImageDataset) -> Findings:
        """Decode all pictures that have not been decoded before, through `cached`, which fills it."""
        index = self.index
        unchecked = np.flatnonzero(index.level == LEVELS["header"]).tolist()
        results = workers.spread(partial(_decode, cached), unchecked, CHUNK["full"], "decoding")
        for picture, (reason, damaged) in zip(unchecked, results, strict=True):
            index.level[picture] = LEVELS["full"]
            if reason:
                index.refuse(picture, reason, damaged)
        return self._done(unchecked)

    def _done(self, changed) -> Findings:
        index = self.index
        if changed and not self.config.dry_run:
            self.store.write(index.state(self.dataset))
        reasons = dict(sorted(index.reasons.items()))
        good = np.setdiff1d(np.arange(len(self.dataset)), list(reasons))
        deep = good[index.kind[good] > 0]
        traits = [Traits(0, *row) for row in zip(*(getattr(index, name)[deep].tolist()
                                                   for name in ("kind", "low", "high")), strict=True)]
        crop, side = self.dataset.crop, index.side[good]
        side = np.minimum(side, crop) if crop else side
        levels = measure_levels(traits)
        ranges = tuple(levels[kind - 1] for kind in sorted({t.kind for t in traits})) if levels else ()
        intact = frozenset(picture for picture in reasons if not index.level[picture])
        return Findings(reasons, index.groups("digest", "whole"), intact, levels, len(deep), ranges,
                        int((2 * side < short_side(self.config.imsize)).sum()))


class _Index:
    """The check results of each picture.

    `level`: the value of LEVELS at which it was checked, 0 for unchecked. `digest`: hash of the file, or, where `edges`
    is True (large files), of its two ends only. `whole`: hash of the whole of a large file, 0 unless another one has
    the same `digest`. `side`, `kind`, `low`, `high`: its Traits. `reasons`: {index: reason} of the unusable pictures.
    """

    def __init__(self, count: int):
        for name, dtype in _COLUMNS.items():
            setattr(self, name, np.zeros(count, dtype))
        self.reasons = {}

    def add(self, picture: int, look: "_Look"):
        """Add the findings of one picture."""
        self.digest[picture], self.edges[picture], self.level[picture] = look.digest, look.edges, LEVELS["header"]
        traits = look.traits
        self.side[picture], self.kind[picture] = traits.side, traits.kind
        self.low[picture], self.high[picture] = traits.low, traits.high
        if look.reason:
            self.refuse(picture, look.reason, look.damaged)

    def refuse(self, picture: int, reason: str, damaged: bool):
        """Mark a picture as unusable. A damaged file is not checked again; others, as after a read error, are."""
        self.level[picture], self.reasons[picture] = LEVELS["full"] if damaged else 0, reason

    @classmethod
    def of(cls, dataset: EncodedDataset, store: Cache) -> "_Index":
        """The index with the cached results of those pictures whose stamps are unchanged."""
        index, state = cls(len(dataset)), store.read(_is_valid)
        if state is None or not len(state["stamps"]):
            return index
        stamps = state["stamps"].numpy()
        rows = np.searchsorted(stamps, dataset.stamps).clip(max=len(stamps) - 1)
        known = stamps[rows] == dataset.stamps
        for name in _COLUMNS:
            getattr(index, name)[known] = state[name].numpy()[rows[known]]
        bad = {int(stamp): reason for stamp, reason in state["reasons"].items()}
        for picture in np.flatnonzero(np.isin(dataset.stamps, list(bad))).tolist():
            index.reasons[picture] = bad[int(dataset.stamps[picture])]
        return index

    def state(self, dataset: EncodedDataset) -> dict:
        """The dict that `of` reads, sorted by stamp, without pictures that could not be read."""
        order = np.argsort(dataset.stamps)
        order = order[self.level[order] > 0]
        columns = {"stamps": dataset.stamps, **{name: getattr(self, name) for name in _COLUMNS}}
        return {**{name: torch.from_numpy(column[order]) for name, column in columns.items()},
                "reasons": {str(int(dataset.stamps[picture])): reason for picture, reason in self.reasons.items()
                            if self.level[picture]}}

    def groups(self, *names: str) -> list[list[int]]:
        """[[indices], ...] of the usable pictures that have equal values in all these columns; sorted."""
        good = np.setdiff1d(np.flatnonzero(self.level), list(self.reasons))
        columns = np.stack([getattr(self, name)[good] for name in names])
        order = np.lexsort(columns)
        ends = np.flatnonzero(np.diff(columns[:, order]).any(0)) + 1
        order = good[order]
        return sorted(group.tolist() for group in np.split(order, ends) if len(group) > 1)


_COLUMNS = {"level": np.uint8, "digest": np.int64, "whole": np.int64, "edges": bool, "side": np.int32,
            "kind": np.uint8, "low": np.float64, "high": np.float64}


def _is_valid(state: dict) -> bool:
    columns = [state.get(name) for name in ("stamps", *_COLUMNS)]
    return (all(isinstance(column, torch.Tensor) and column.ndim == 1 for column in columns)
            and len({len(column) for column in columns}) == 1 and isinstance(state.get("reasons"), dict))


@dataclass
class _Look:
    """What was found in a file. `edges`: only the ends are in `digest`. `reason`: why it is unusable, or None."""

    digest: int = 0
    edges: bool = False
    traits: Traits = Traits(0)
    reason: str | None = None
    damaged: bool = False


def _look_at(dataset: EncodedDataset, pictures: Sequence[int]) -> list[_Look]:
    looks = []
    for picture in pictures:
        look = _Look()
        looks.append(look)
        try:
            file, size = dataset.open(picture)
            with file:
                look.digest, look.edges = _digest(file, size), size > 2 * EDGE
                file.seek(0)
                look.traits = decode.look(file, size, dataset.crop, dataset.max_pixels)
        except decode.UnusablePicture as error:
            look.reason, look.damaged = error.reason, error.damaged
        except (DataError, OSError) as error:
            look.reason = decode.printable(error)
    return looks


def _decode(cached: ImageDataset, pictures: Sequence[int]) -> list[tuple]:
    """[(why the picture is unusable or None, True if its file is damaged), ...]"""
    results = []
    for picture in pictures:
        reason, damaged = None, False
        try:
            cached.load_batch([picture])
        except decode.UnusablePicture as error:
            reason, damaged = error.reason, error.damaged
        except (DataError, OSError) as error:
            reason = decode.printable(error)
        results.append((reason, damaged))
    return results


def _whole_digests(dataset: EncodedDataset, pictures: Sequence[int]) -> list[int]:
    digests = []
    for picture in pictures:
        file, size = dataset.open(picture)
        with file:
            digests.append(_digest(file, size, edge=size))
    return digests


def _digest(file: BinaryIO, size: int, edge: int = EDGE) -> int:
    """64-bit hash of the file's size and of the first and last `edge` bytes (of all bytes up to size 2 * `edge`)."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    digest.update(file.read(min(2 * edge, size) if size <= 2 * edge else edge))
    if size > 2 * edge:
        file.seek(size - edge)
        digest.update(file.read(edge))
    return int.from_bytes(digest.digest(), "little", signed=True)
