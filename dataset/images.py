"""Data set classes: `dataset[index]` is one uint8 picture (3, imsize, imsize).

`Files` and `Lmdb` decode pictures from disk; `Subset` is a part of another data set; `ThreadedReader` decodes a slice
of a data set with several threads. `dataset/table.py` builds them.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset.decode import MAX_PIXELS, NO_LEVELS, Levels, decode, printable, read_picture
from dataset.scan import Found, find_pictures
from errors import DataError


class ImageDataset(Dataset):
    """`length` pictures; `read(index)` returns one as uint8 (3, imsize, imsize).

    `sources` are the paths of the files that hold the pictures, in a fixed order. `summary` describes the data set in
    messages. `options` {name: value} are settings of the decoder that differ from the usual ones.
    """

    options: dict = {}

    def __init__(self, read: Callable[[int], torch.Tensor], length: int, summary: str, sources: Sequence[str]):
        self.read, self.length, self.summary, self.sources = read, length, summary, sources

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(index)

    def load_batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Return several pictures in a new tensor: uint8 (len(indices), 3, imsize, imsize)."""
        return torch.stack([self[index] for index in indices])

    def is_decoded(self, indices: Sequence[int] | None = None) -> bool:
        """Whether these pictures (None: all) can be read without decoding."""
        return False

    @cached_property
    def identities(self) -> np.ndarray:
        """int64 (length,): what tells picture i from others, to compare the set with a later one (dataset/table.py).

        The upper 40 bits are a hash of its name, the lower 24 bits one of its size in bytes, or 0.
        """
        return np.fromiter((_identity((os.path.basename(self.sources[0]), index)) for index in range(len(self))),
                           np.int64, len(self))


class EncodedDataset(ImageDataset):
    """Pictures decoded from files in the folder `home`. They may be damaged, and caching them saves time.

    `max_pixels` is the limit of --max_pixels, `found` what else is in the folder, in lines for the user, `findings`
    what the check of the pictures found, or None (dataset/check.py).
    """

    home: Path
    crop: int | None = None
    max_pixels: int = MAX_PIXELS
    found: Found | None = None
    findings: object = None

    def use_levels(self, levels: Levels | None):
        """Map values of more than 8 bits to 0..255 by these levels from now on; None if there are none."""
        if levels is not None:
            self.read = partial(self.read, levels=levels)
            self.options = {**self.options, "levels": [list(pair) for pair in levels]}

    def entry(self, index: int) -> dict:
        """What a list of pictures says of picture `index`: JSON from which it can be found again."""
        raise NotImplementedError

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """Return (the encoded bytes as an open file, their number). Raises DataError."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """Name of picture `index` in messages."""
        raise NotImplementedError

    @cached_property
    def stamps(self) -> np.ndarray:
        """int64 (length,): one hash per picture, which changes with the picture's path below `home` or its content.

        Content is not read: a file counts as changed if its size or modification time has changed. Raises DataError if
        a file is missing.
        """
        raise NotImplementedError


def stat_file(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {printable(path)}: {error.strerror}") from error


def _hash(value: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(value).encode(), digest_size=8).digest(), "little", signed=True)


def _identity(name: object, size: int | None = None) -> int:
    return _hash(name) & ~0xFFFFFF | (0 if size is None else _hash(size) & 0xFFFFFF)


def _options(max_pixels: int) -> dict:
    return {} if max_pixels == MAX_PIXELS else {"max_pixels": max_pixels}


class Files(EncodedDataset):
    """The picture files below a folder, sorted by path. Raises DataError if there are none.

    Subfolders in `own`, as of `scan.own_folders`, are left out; None searches all.
    """

    def __init__(self, folder: Path, imsize: int, crop: int | None = None, max_pixels: int = MAX_PIXELS,
                 own: dict | None = None):
        self.found = find_pictures(folder, own)
        paths = self.found.paths
        super().__init__(partial(self._read, paths, imsize=imsize, crop=crop, max_pixels=max_pixels), len(paths),
                         f"{len(paths)} pictures in {printable(folder)}", paths)
        self.home, self.crop, self.max_pixels, self.options = folder, crop, max_pixels, _options(max_pixels)

    @staticmethod
    def _read(paths: list[str], index: int, imsize: int, crop: int | None, max_pixels: int,
              levels: Levels = NO_LEVELS) -> torch.Tensor:
        return read_picture(paths[index], imsize, crop, max_pixels, levels)

    def open(self, index):
        path = self.sources[index]
        try:
            return open(path, "rb", buffering=2**16), os.path.getsize(path)
        except OSError as error:
            raise DataError(f"cannot read {printable(path)}: {error.strerror}") from error

    def name(self, index):
        return printable(self.sources[index])

    def entry(self, index):
        path = os.path.abspath(self.sources[index])
        try:
            file = os.stat(path)
        except OSError:  # gone in the meantime
            return {"path": path}
        return {"path": path, "size": file.st_size, "mtime_ns": file.st_mtime_ns}

    @cached_property
    def _hashes(self) -> np.ndarray:
        """int64 (2, length): stamps and identities, of paths below `home`: they stay valid when the folder is moved."""
        skip = len(str(self.home))
        hashes = np.empty((2, len(self)), np.int64)
        for index, path in enumerate(self.sources):
            name, file = path[skip:], stat_file(path)
            hashes[:, index] = _hash((name, file.st_size, file.st_mtime_ns)), _identity(name, file.st_size)
        return hashes

    @property
    def stamps(self):
        return self._hashes[0]

    @property
    def identities(self):
        return self._hashes[1]


_environments = {}  # folder: (process id, open LMDB)


def environment(folder: str):
    """Return the LMDB in `folder`, opened once per process (lmdb forbids a second time) and reopened after a fork."""
    import lmdb

    pid, opened = _environments.get(folder, (None, None))
    if pid != os.getpid():
        if opened is not None:
            opened.close()  # the parent's handle: invalid after a fork, but lmdb would still count it as open
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        _environments[folder] = os.getpid(), opened
    return opened


class Lmdb(EncodedDataset):
    """The values of an LMDB `folder`, each an encoded picture, sorted by key."""

    def __init__(self, folder: str, keys: list[bytes], imsize: int, summary: str, file: str,
                 max_pixels: int = MAX_PIXELS):
        super().__init__(partial(self._read, folder, keys, imsize=imsize, max_pixels=max_pixels), len(keys), summary,
                         [file])
        self.home, self.keys, self.max_pixels, self.options = Path(folder), keys, max_pixels, _options(max_pixels)

    @staticmethod
    def _value(folder: str, key: bytes) -> bytes:
        with environment(folder).begin() as transaction:
            return transaction.get(key)

    @classmethod
    def _read(cls, folder: str, keys: list[bytes], index: int, imsize: int, max_pixels: int,
              levels: Levels = NO_LEVELS) -> torch.Tensor:
        return decode(cls._value(folder, keys[index]), cls._name(folder, keys[index]), imsize, None, max_pixels, levels)

    @staticmethod
    def _name(folder: str, key: bytes) -> str:
        return printable(f"{key.decode(errors='surrogateescape')} in {folder}")

    def entry(self, index):
        return {"lmdb": str(self.home), "key": self.keys[index].decode(errors="surrogateescape")}

    @cached_property
    def identities(self):
        return np.fromiter(map(_identity, self.keys), np.int64, len(self))

    def open(self, index):
        data = self._value(str(self.home), self.keys[index])
        return io.BytesIO(data), len(data)

    def name(self, index):
        return self._name(str(self.home), self.keys[index])

    @cached_property
    def stamps(self):
        file = stat_file(self.sources[0])
        return _hash((file.st_size, file.st_mtime_ns)) ^ np.arange(len(self))  # one file: all stamps change together


class Subset(ImageDataset):
    """The pictures of a data set at `indices`, in this order; `word` describes them in the summary."""

    def __init__(self, whole: ImageDataset, indices: Sequence[int], word: str):
        sources = whole.sources  # one file per picture, or files of many pictures each, which are all kept
        if len(sources) == len(whole):
            sources = [sources[index] for index in indices]
        super().__init__(self._of_whole, len(indices), f"{len(indices)} {word} of {whole.summary}", sources)
        self.whole, self.indices, self.options = whole, np.asarray(indices, np.int64), whole.options

    def _of_whole(self, index: int) -> torch.Tensor:
        return self.whole[int(self.indices[index])]

    def load_batch(self, indices):
        return self.whole.load_batch(self.indices[indices])

    def is_decoded(self, indices=None):
        return self.whole.is_decoded(self.indices if indices is None else self.indices[indices])

    @cached_property
    def identities(self):
        return self.whole.identities[self.indices]


def split(dataset: ImageDataset, share: float) -> tuple[Subset, Subset]:
    """Return (training set, held-out set). A random `share` of the pictures, at least one, is held out.

    The choice depends only on the number of pictures and on `share`, not on --seed. Both sets keep the order.
    """
    length = len(dataset)
    order = np.random.default_rng(0).permutation(length)
    held_out = max(1, round(share * length))
    return (Subset(dataset, sorted(order[held_out:].tolist()), "trained on"),
            Subset(dataset, sorted(order[:held_out].tolist()), "held out"))


DECODERS = 4                # threads; Pillow releases the GIL while it decodes


class ThreadedReader:
    """Slices of a data set (whose `[index]` is uint8 (3, S, S)) as uint8 (N, 3, S, S), decoded by several threads.

    Raises DataError if pictures are unreadable; the message counts all of them and names the first.
    """

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, part):
        with ThreadPoolExecutor(DECODERS) as pool:
            try:
                return torch.stack(list(pool.map(self.dataset.__getitem__, range(len(self))[part])))
            except DataError as error:
                raise self._all_unreadable(pool) or error from None

    def _all_unreadable(self, pool):
        problems = [problem for problem in pool.map(self._problem, range(len(self))) if problem]
        if not problems:                                # the read error was temporary
            return None
        if len(problems) == 1:
            return DataError(problems[0])
        return DataError(f"{len(problems)} of {len(self)} pictures cannot be used; the first:\n{problems[0]}")

    def _problem(self, index):
        try:
            self.dataset[index]
        except DataError as error:
            return str(error)
        return None
