"""Pictures that cannot be used, or that come twice, found before training (`--check_data`).

All cores look at the pictures; what they found is kept below `--cache_path`, so that the next start looks at new and
changed files alone.
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

import decode
import workers
from cache import Cache
from datasets import Encoded, Part, Pictures
from distributed import after_first, gather, is_first, say
from failures import DataError

LEVELS = {"header": 1, "full": 2}
FULL = 10_000  # pictures that --check_data auto decodes, all of them; of more it looks at heads and ends
SHARE = 0.01  # of the pictures that may be left out
NAMED = 10  # pictures that a message names
CHUNK = {"header": 512, "full": 16}  # pictures that a process takes at a time
EDGE = 2**15  # bytes at either end of a file that tell it from others at first; smaller files are read whole


@dataclass(frozen=True)
class Findings:
    """What was found: `bad` {index: why}, `copies` [[indices of equal files], ...] among the others."""

    bad: dict
    copies: list


def usable(dataset: Pictures, cached: Pictures, config) -> Pictures:
    """`cached`, which is `dataset` or a cache of it, less the pictures that cannot be used. Says what was found; a
    training run also lists it in its logs. Of several processes the first looks: all come here.

    Raises DataError where more than SHARE cannot be used.
    """
    if config.check_data == "off" or not isinstance(dataset, Encoded):
        return cached
    found = gather(after_first(lambda: examine(dataset, cached, config), lambda: None))[0]
    lists = _lists(dataset, found, config)
    _say_copies(dataset, found, lists)
    if not found.bad:
        return cached
    bad = [f"{dataset.name(index)}: {reason}" for index, reason in found.bad.items()]
    first = "\n  ".join(bad[:NAMED]) + (f"\n  and {len(bad) - NAMED} more" if len(bad) > NAMED else "")
    everywhere = f", all listed in {lists['bad_images']}" if "bad_images" in lists else ""
    if len(bad) > SHARE * len(dataset):
        raise DataError(f"{len(bad)} of the {dataset.summary} cannot be used{everywhere}:\n  {first}\n"
                        f"Delete or replace them; up to {SHARE:.0%} would be left out.")
    say(f"pictures: {len(bad)} of {len(dataset)} cannot be used and are left out{everywhere}:\n  {first}")
    return Part(cached, [index for index in range(len(dataset)) if index not in found.bad], "usable")


def _lists(dataset: Encoded, found: Findings, config) -> dict:
    """{name: path} of the lists written below the run's logs; those of an earlier start are removed."""
    if config.mode != "train" or config.dry_run or not is_first():
        return {}
    folder = Path(config.log_path, config.version)
    texts = {"bad_images": "\n".join(f"{dataset.name(index)}\t{reason}" for index, reason in found.bad.items()),
             "duplicates": "\n\n".join("\n".join(map(dataset.name, group)) for group in found.copies)}
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


def _say_copies(dataset: Encoded, found: Findings, lists: dict):
    more = sum(len(group) - 1 for group in found.copies)
    if more:
        one, other, *_ = map(dataset.name, found.copies[0])
        where = f"all listed in {lists['duplicates']}" if "duplicates" in lists else f"such as {other} of {one}"
        say(f"pictures: {more} {'is a copy' if more == 1 else 'are copies'} of others, to the byte, {where}; they are "
            "trained on all the same")


def examine(dataset: Encoded, cached: Pictures, config) -> Findings:
    """Look at all that is not known from an earlier look, and remember it. `full` fills the cache on its way."""
    level = config.check_data if config.check_data in LEVELS else "full" if len(dataset) <= FULL else "header"
    store = Cache(config.cache_path, "index", {"home": os.path.abspath(dataset.home), "procedure": decode.PROCEDURE})
    index = _Index.of(dataset, store)
    new = np.flatnonzero(index.level < LEVELS[level])
    look = partial(_look, dataset, cached if level == "full" else None)
    for picture, (digest, edges, reason, lasting) in zip(
            new.tolist(), workers.spread(look, new.tolist(), CHUNK[level], "checking"), strict=True):
        index.digest[picture], index.edges[picture] = digest, edges
        # what failed for good needs no second look, what the disk refused gets one
        index.level[picture] = LEVELS["full"] if reason and lasting else 0 if reason else LEVELS[level]
        if reason:
            index.reasons[picture] = reason
    unsure = [picture for group in index.groups("digest") for picture in group
              if index.edges[picture] and not index.whole[picture]]
    wholly = workers.spread(partial(_whole_digests, dataset), unsure, CHUNK["full"], "comparing")
    for picture, digest in zip(unsure, wholly, strict=True):
        index.whole[picture] = digest
    if (len(new) or unsure) and not config.dry_run:
        store.write(index.state(dataset))
    return Findings(dict(sorted(index.reasons.items())), index.groups("digest", "whole"))


class _Index:
    """What is known of each picture: `level` of LEVELS that it was looked at, 0 for not at all; `digest`, of its two
    `edges` alone where it is large, and then, if others had the same, of the `whole`; {index: why} of bad ones.
    """

    def __init__(self, count: int):
        self.level = np.zeros(count, np.uint8)
        self.digest = np.zeros(count, np.int64)
        self.whole = np.zeros(count, np.int64)
        self.edges = np.zeros(count, bool)
        self.reasons = {}

    @classmethod
    def of(cls, dataset: Encoded, store: Cache) -> "_Index":
        """What the store knows of these pictures, by their stamps."""
        index, kept = cls(len(dataset)), store.read(_fits)
        if kept is None or not len(kept["stamps"]):
            return index
        stamps = kept["stamps"].numpy()
        rows = np.searchsorted(stamps, dataset.stamps).clip(max=len(stamps) - 1)
        known = stamps[rows] == dataset.stamps
        for name in _COLUMNS:
            getattr(index, name)[known] = kept[name].numpy()[rows[known]]
        bad = {int(stamp): reason for stamp, reason in kept["reasons"].items()}
        for picture in np.flatnonzero(np.isin(dataset.stamps, list(bad))).tolist():
            index.reasons[picture] = bad[int(dataset.stamps[picture])]
        return index

    def state(self, dataset: Encoded) -> dict:
        """What `of` reads, sorted by stamp. What the disk refused is left out."""
        order = np.argsort(dataset.stamps)
        order = order[self.level[order] > 0]
        columns = {"stamps": dataset.stamps, **{name: getattr(self, name) for name in _COLUMNS}}
        return {**{name: torch.from_numpy(column[order]) for name, column in columns.items()},
                "reasons": {str(int(dataset.stamps[picture])): reason for picture, reason in self.reasons.items()
                            if self.level[picture]}}

    def groups(self, *names: str) -> list[list[int]]:
        """The good pictures that are equal in these columns, where there are several, in order."""
        good = np.setdiff1d(np.flatnonzero(self.level), list(self.reasons))
        columns = np.stack([getattr(self, name)[good] for name in names])
        order = np.lexsort(columns)
        ends = np.flatnonzero(np.diff(columns[:, order]).any(0)) + 1
        order = good[order]
        return sorted(group.tolist() for group in np.split(order, ends) if len(group) > 1)


_COLUMNS = ("level", "digest", "whole", "edges")


def _fits(kept: dict) -> bool:
    columns = [kept.get(name) for name in ("stamps", *_COLUMNS)]
    return (all(isinstance(column, torch.Tensor) and column.ndim == 1 for column in columns)
            and len({len(column) for column in columns}) == 1 and isinstance(kept.get("reasons"), dict))


def _look(dataset: Encoded, cached: Pictures | None, pictures: Sequence[int]) -> list[tuple]:
    """(digest, whether it is of the edges alone, why it cannot be used or None, whether that will last) of each.

    With `cached` every picture is decoded through it, else its head and end must do.
    """
    found = []
    for picture in pictures:
        digest, edges, reason, lasting = 0, False, None, True
        try:
            file, size = dataset.open(picture)
            with file:
                digest, edges = _digest(file, size), size > 2 * EDGE
                if cached is None:
                    file.seek(0)
                    reason = decode.flaw(file, size)
                else:
                    cached.gather([picture])
        except decode.UnusablePicture as error:
            reason = error.reason
        except (DataError, OSError) as error:
            reason, lasting = str(error), False
        found.append((digest, edges, reason, lasting))
    return found


def _whole_digests(dataset: Encoded, pictures: Sequence[int]) -> list[int]:
    found = []
    for picture in pictures:
        file, size = dataset.open(picture)
        with file:
            found.append(_digest(file, size, edge=size))
    return found


def _digest(file: BinaryIO, size: int, edge: int = EDGE) -> int:
    """A number that differs between files of other lengths or other bytes within `edge` of either end."""
    digest = hashlib.blake2b(str(size).encode(), digest_size=8)
    digest.update(file.read(min(2 * edge, size) if size <= 2 * edge else edge))
    if size > 2 * edge:
        file.seek(size - edge)
        digest.update(file.read(edge))
    return int.from_bytes(digest.digest(), "little", signed=True)
