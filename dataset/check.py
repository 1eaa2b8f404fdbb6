"""Find unusable and duplicate pictures before training (`--check_data`).

All cores check the pictures. The results are cached below `--cache_path`, so that the next run checks only new and
changed files.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch

from dataset import decode, workers
from dataset.images import EncodedDataset, ImageDataset, Subset
from device.distributed import after_first, gather, is_first, say
from errors import DataError
from storage.cache import Cache

LEVELS = {"header": 1, "full": 2}
FULL = 10_000  # --check_data auto decodes every picture of data sets up to this size; of larger ones, header and end
SHARE = 0.01  # largest fraction of unusable pictures that is skipped instead of refused
NAMED = 10  # pictures listed in a message, at most
CHUNK = {"header": 512, "full": 16}  # pictures per task of a worker
EDGE = 2**15  # bytes hashed at either end of a file; files of up to twice this size are hashed whole


@dataclass(frozen=True)
class Findings:
    """`bad`: {index: reason} of unusable pictures. `copies`: [[indices of byte-identical files], ...] of the others."""

    bad: dict
    copies: list


def usable(dataset: ImageDataset, cached: ImageDataset, config) -> ImageDataset:
    """Return `cached` (`dataset` or a cache of it) without the unusable pictures, and print what was found.

    A training run also writes the lists to its logs. Rank 0 checks; all ranks must call this. Raises DataError if more
    than SHARE of the pictures are unusable.
    """
    if config.check_data == "off" or not isinstance(dataset, EncodedDataset):
        return cached
    findings = gather(after_first(lambda: examine(dataset, cached, config), lambda: None))[0]
    lists = _write_lists(dataset, findings, config)
    _say_copies(dataset, findings, lists)
    if not findings.bad:
        return cached
    bad = [f"{dataset.name(index)}: {reason}" for index, reason in findings.bad.items()]
    shown = "\n  ".join(bad[:NAMED]) + (f"\n  and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    full_list = f", all listed in {lists['bad_images']}" if "bad_images" in lists else ""
    if len(bad) > SHARE * len(dataset):
        raise DataError(f"{len(bad)} of the {dataset.summary} cannot be used{full_list}:\n  {shown}\n"
                        f"Delete or replace them; only up to {SHARE:.0%} of the pictures would be skipped.")
    say(f"pictures: {len(bad)} of {len(dataset)} cannot be used and are skipped{full_list}:\n  {shown}")
    return Subset(cached, [index for index in range(len(dataset)) if index not in findings.bad], "usable")


def _write_lists(dataset: EncodedDataset, findings: Findings, config) -> dict:
    """Write the lists of findings to the run's logs, remove outdated ones. Return {name: path} of those written."""
    if config.mode != "train" or config.dry_run or not is_first():
        return {}
    folder = Path(config.log_path, config.version)
    texts = {"bad_images": "\n".join(f"{dataset.name(index)}\t{reason}" for index, reason in findings.bad.items()),
             "duplicates": "\n\n".join("\n".join(map(dataset.name, group)) for group in findings.copies)}
    lists = {}
    for name, text in texts.items():
        path = folder / f"{name}.txt"
        if text:
            folder.mkdir(parents=True, exist_ok=True)
            path.write_text(text + "\n", encoding="utf-8", errors="surrogateescape")
            lists[name] = path
        else:
            path.unlink(missing_ok=True)
    return lists


def _say_copies(dataset: EncodedDataset, findings: Findings, lists: dict):
    count = sum(len(group) - 1 for group in findings.copies)
    if count:
        original, copy, *_ = map(dataset.name, findings.copies[0])
        where = f"all listed in {lists['duplicates']}" if "duplicates" in lists else f"such as {copy} of {original}"
        say(f"pictures: {count} {'is a copy' if count == 1 else 'are copies'} of others (byte-identical), {where}; "
            "training uses them anyway")


def examine(dataset: EncodedDataset, cached: ImageDataset, config) -> Findings:
    """Check all pictures without a cached result, and cache the results. Level `full` also fills `cached`."""
    level = config.check_data if config.check_data in LEVELS else "full" if len(dataset) <= FULL else "header"
    origin = {"home": os.path.abspath(dataset.home), "procedure": decode.CACHE_VERSION}
    store = Cache(config.cache_path, "index", origin)
    index = _Index.of(dataset, store)
    unchecked = np.flatnonzero(index.level < LEVELS[level])
    check = partial(_check_pictures, dataset, cached if level == "full" else None)
    for picture, (digest, edges, reason, permanent) in zip(
            unchecked.tolist(), workers.spread(check, unchecked.tolist(), CHUNK[level], "checking"), strict=True):
        index.digest[picture], index.edges[picture] = digest, edges
        # A damaged file is not checked again; after a read error the picture is checked again in the next run.
        index.level[picture] = LEVELS["full"] if reason and permanent else 0 if reason else LEVELS[level]
        if reason:
            index.reasons[picture] = reason
    # Large files of equal size and ends: only the hash of the whole file tells whether they are copies.
    ambiguous = [picture for group in index.groups("digest") for picture in group
                 if index.edges[picture] and not index.whole[picture]]
    digests = workers.spread(partial(_whole_digests, dataset), ambiguous, CHUNK["full"], "comparing")
    for picture, digest in zip(ambiguous, digests, strict=True):
        index.whole[picture] = digest
    if (len(unchecked) or ambiguous) and not config.dry_run:
        store.write(index.state(dataset))
    return Findings(dict(sorted(index.reasons.items())), index.groups("digest", "whole"))


class _Index:
    """The check results of each picture.

    `level`: the value of LEVELS at which it was checked, 0 for unchecked. `digest`: hash of the file, or, where `edges`
    is True (large files), of its two ends only. `whole`: hash of the whole of a large file, 0 unless another one has
    the same `digest`. `reasons`: {index: reason} of the unusable pictures.
    """

    def __init__(self, count: int):
        self.level = np.zeros(count, np.uint8)
        self.digest = np.zeros(count, np.int64)
        self.whole = np.zeros(count, np.int64)
        self.edges = np.zeros(count, bool)
        self.reasons = {}

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


_COLUMNS = ("level", "digest", "whole", "edges")


def _is_valid(state: dict) -> bool:
    columns = [state.get(name) for name in ("stamps", *_COLUMNS)]
    return (all(isinstance(column, torch.Tensor) and column.ndim == 1 for column in columns)
            and len({len(column) for column in columns}) == 1 and isinstance(state.get("reasons"), dict))


def _check_pictures(dataset: EncodedDataset, cached: ImageDataset | None, pictures: Sequence[int]) -> list[tuple]:
    """[(digest, True if only the file's ends are hashed, reason or None, True if the reason is permanent), ...].

    `reason` says why the picture is unusable. With `cached` each picture is decoded through it; without, only the
    file's header and end are checked.
    """
    results = []
    for picture in pictures:
        digest, edges, reason, permanent = 0, False, None, True
        try:
            file, size = dataset.open(picture)
            with file:
                digest, edges = _digest(file, size), size > 2 * EDGE
                if cached is None:
                    file.seek(0)
                    reason = decode.find_defect(file, size)
                else:
                    cached.load_batch([picture])
        except decode.UnusablePicture as error:
            reason = error.reason
        except (DataError, OSError) as error:
            reason, permanent = str(error), False
        results.append((digest, edges, reason, permanent))
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
