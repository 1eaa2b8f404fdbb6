"""Data set classes: `dataset[index]` is one uint8 picture (C, H, W).

`Files`, `Archive`, `Lmdb` and `Lmdbs` decode pictures from disk; `Subset` is a part of another data set;
`ThreadedReader` decodes a slice of a data set with several threads. `dataset/table.py` builds them.
"""

import hashlib
import io
import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch.utils.data import Dataset

from dataset import labels
from dataset.decode import (
    MAX_PIXELS,
    NO_LEVELS,
    Levels,
    UnusablePicture,
    decode,
    picture_size,
    printable,
    read_picture,
)
from dataset.labels import Labels
from dataset.scan import Found, Member, find_in_archive, find_pictures, unpack
from errors import DataError
from flags.pictures import PictureShape


class ImageDataset(Dataset):
    """`length` pictures; `read(index)` returns one as uint8 (C, H, W).

    `sources` are the paths of the files that hold the pictures, in a fixed order. `summary` describes the data set in
    messages. `options` {name: value} are settings of the decoder that differ from the usual ones. `find_labels()`
    returns the Labels; None if there are none.
    """

    options: dict = {}

    def __init__(self, read: Callable[[int], torch.Tensor], length: int, summary: str, sources: Sequence[str],
                 find_labels: Callable[[], Labels | None] | None = None):
        self.read, self.length, self.summary, self.sources = read, length, summary, sources
        self.find_labels = find_labels

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(index)

    def load_batch(self, indices: Sequence[int]) -> torch.Tensor:
        """Return several pictures in a new tensor: uint8 (len(indices), C, H, W)."""
        return torch.stack([self[index] for index in indices])

    def is_decoded(self, indices: Sequence[int] | None = None) -> bool:
        """Whether these pictures (None: all) can be read without decoding."""
        return False

    @cached_property
    def labels(self) -> Labels | None:
        """The class of each picture, None if the data set has no classes. Raises DataError."""
        return self.find_labels() if self.find_labels else None

    def stray(self) -> str | None:
        """Return in words what keeps subfolders from being classes, if something does."""
        return None

    def advice_on_labels(self) -> str:
        """Return how labels are given, in one line, for a data set that has none."""
        stray = self.stray()
        return f"{labels.HOW}; {stray}" if stray else labels.HOW

    def __getstate__(self):
        """Pickle without the labels: loader workers do not need them."""
        return {name: value for name, value in vars(self).items() if name != "labels"}

    @cached_property
    def identities(self) -> np.ndarray:
        """int64 (length,): what tells picture i from others, to compare the set with a later one (dataset/table.py).

        The upper 40 bits are a hash of its name, the lower 24 bits one of its size in bytes, or 0.
        """
        return np.fromiter((_identity((os.path.basename(self.sources[0]), index)) for index in range(len(self))),
                           np.int64, len(self))


class EncodedDataset(ImageDataset):
    """Pictures decoded from files in the folder `home`, or from the file `home`. They may be damaged, and caching them
    saves time.

    `cache_name` tells their decoded cache from that of other data sets in the same folder. `max_pixels` is the limit of
    --max_pixels, `found` what else is in the folder, in lines for the user, `findings` what the check of the pictures
    found, or None (dataset/check.py).
    """

    home: Path
    cache_name: str = ""
    advice: str = "Delete or replace them"  # what to do with damaged pictures
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

    def size(self, index: int) -> tuple[int, int] | None:
        """(width, height) of picture `index` as its file has it, from its header; None if that cannot be read."""
        try:
            with self.open(index)[0] as file:
                return picture_size(file)
        except DataError:
            return None

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

    advice = f"{EncodedDataset.advice} (--mode clean_data deletes the damaged ones)"

    def __init__(self, folder: Path, shape: PictureShape | int, crop: int | None = None, max_pixels: int = MAX_PIXELS,
                 own: dict | None = None):
        self.found = find_pictures(folder, own)
        paths = self.found.paths
        super().__init__(partial(self._read, paths, shape=shape, crop=crop, max_pixels=max_pixels), len(paths),
                         f"{len(paths)} pictures in {printable(folder)}", paths,
                         partial(self._find_labels, folder, paths))
        self.home, self.crop, self.max_pixels, self.options = folder, crop, max_pixels, _options(max_pixels)

    @staticmethod
    def _read(paths: list[str], index: int, shape: PictureShape | int, crop: int | None, max_pixels: int,
              levels: Levels = NO_LEVELS) -> torch.Tensor:
        return read_picture(paths[index], shape, crop, max_pixels, levels)

    @staticmethod
    def _below(folder: Path, paths: list[str]) -> list[str]:
        return [os.path.relpath(path, folder).replace(os.sep, "/") for path in paths]

    def stray(self):
        return labels.find_stray(self._below(self.home, self.sources))

    @classmethod
    def _find_labels(cls, folder: Path, paths: list[str]) -> Labels | None:
        def read(path):
            try:
                return Path(folder, path).read_bytes()
            except FileNotFoundError:
                return None
            except OSError as error:
                raise labels.unusable(f"{folder}/{path}", f"cannot be read: {error.strerror}") from error

        def is_file(path):
            return os.path.isfile(os.path.join(folder, path))

        return labels.find(cls._below(folder, paths), read, is_file, folder)

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


_archives = {}  # {(path, _version_of it): open file}
_position = threading.Lock()  # of their positions, where these are used


def _read_at(descriptor: int, count: int, offset: int) -> bytes:
    """`os.pread`, which Windows lacks."""
    if hasattr(os, "pread"):
        return os.pread(descriptor, count, offset)
    with _position:
        os.lseek(descriptor, offset, os.SEEK_SET)
        return os.read(descriptor, count)


def _version_of(file: os.stat_result) -> tuple:
    return file.st_dev, file.st_ino, file.st_size, file.st_mtime_ns


class Archive(EncodedDataset):
    """The pictures in a zip archive, sorted by name as those of the unpacked folder are. Raises DataError.

    The archive is opened once per process, its directory is read once for all.
    """

    advice = f"Unpack the archive and clean the folder: {Files.advice[0].lower()}{Files.advice[1:]}"

    def __init__(self, path: Path, shape: PictureShape | int, crop: int | None = None, max_pixels: int = MAX_PIXELS):
        self._version = _version_of(stat_file(path))
        self.found, members = find_in_archive(path)
        self.names = self.found.paths
        self.members = np.array([members.pop(name) for name in self.names], np.int64)  # (N, 5), see Member
        read = partial(self._read, shape=shape, crop=crop, max_pixels=max_pixels)
        super().__init__(read, len(self.names), f"{len(self.names)} pictures in {printable(path)}", [str(path)],
                         partial(self._find_labels, members))
        self.home, self.crop, self.max_pixels, self.options = path, crop, max_pixels, _options(max_pixels)
        self.cache_name, self._path = path.name, os.path.realpath(path)

    def _descriptor(self) -> int:
        """Return the descriptor of the open archive. A fork shares it: reads by `pread` do not move its position."""
        file = _archives.get((self._path, self._version))
        if file is None:
            opened = open(self._path, "rb", buffering=0)  # noqa: SIM115  it stays open
            if _version_of(os.fstat(opened.fileno())) != self._version:
                raise DataError(f"{printable(self.home)} has changed since it was opened: start again")
            file = _archives.setdefault((self._path, self._version), opened)  # of several threads the first one's
        return file.fileno()

    def _unpack(self, member: Member) -> bytes:
        """Raises ValueError if the file is damaged, DataError if the archive cannot be read."""
        try:
            return unpack(member, partial(_read_at, self._descriptor()))
        except OSError as error:
            raise DataError(f"cannot read {printable(self.home)}: {error.strerror}") from error

    def _picture(self, index: int) -> bytes:
        try:
            return self._unpack(Member(*self.members[index].tolist()))
        except ValueError as error:
            # Not remembered as damaged: it has the same stamp once the archive has been mended.
            raise UnusablePicture(self.name(index), str(error), damaged=False) from None

    def _read(self, index: int, shape: PictureShape | int, crop: int | None, max_pixels: int,
              levels: Levels = NO_LEVELS) -> torch.Tensor:
        return decode(self._picture(index), self.name(index), shape, crop, max_pixels, levels)

    def stray(self):
        return labels.find_stray(self.names)

    def _find_labels(self, others: dict) -> Labels | None:
        def read(path):
            try:
                return self._unpack(others[path]) if path in others else None
            except ValueError as error:
                raise labels.unusable(f"{self.home}/{path}", f"cannot be read ({error}); zip it again") from None

        return labels.find(self.names, read, others.__contains__, self.home)

    def open(self, index):
        data = self._picture(index)
        return io.BytesIO(data), len(data)

    def name(self, index):
        return printable(f"{self.home}/{self.names[index]}")

    def entry(self, index):
        return {"archive": os.path.abspath(self.home), "name": self.names[index]}

    @cached_property
    def stamps(self):
        return np.fromiter((_hash((name, size, crc)) for name, size, crc in
                            zip(self.names, *self._columns("size", "crc"), strict=True)), np.int64, len(self))

    @cached_property
    def identities(self):
        """Those of the unpacked folder."""
        return np.fromiter((_identity(f"/{name}", size) for name, size in
                            zip(self.names, *self._columns("size"), strict=True)), np.int64, len(self))

    def _columns(self, *names: str) -> list[list[int]]:
        return [self.members[:, Member._fields.index(name)].tolist() for name in names]


def open_pictures(path: Path, shape: PictureShape | int, crop: int | None = None, max_pixels: int = MAX_PIXELS,
                  own: dict | None = None) -> EncodedDataset:
    """Return the pictures below a folder or in a zip archive. Raises DataError if there are none.

    `own` are subfolders to leave out, as of `scan.own_folders`.
    """
    return Archive(path, shape, crop, max_pixels) if os.path.isfile(path) else \
        Files(path, shape, crop, max_pixels, own)


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

    def __init__(self, folder: str, keys: list[bytes], shape: PictureShape | int, summary: str, file: str,
                 max_pixels: int = MAX_PIXELS):
        super().__init__(partial(self._read, folder, keys, shape=shape, max_pixels=max_pixels), len(keys), summary,
                         [file])
        self.home, self.keys, self.max_pixels, self.options = Path(folder), keys, max_pixels, _options(max_pixels)

    @staticmethod
    def _value(folder: str, key: bytes) -> bytes:
        with environment(folder).begin() as transaction:
            return transaction.get(key)

    @classmethod
    def _read(cls, folder: str, keys: list[bytes], index: int, shape: PictureShape | int, max_pixels: int,
              levels: Levels = NO_LEVELS) -> torch.Tensor:
        return decode(cls._value(folder, keys[index]), cls._name(folder, keys[index]), shape, None, max_pixels, levels)

    @staticmethod
    def _name(folder: str, key: bytes) -> str:
        return printable(f"{key.decode(errors='surrogateescape')} in {folder}")

    def entry(self, index):
        return {"lmdb": str(self.home), "key": self.keys[index].decode(errors="surrogateescape")}

    def advice_on_labels(self):
        return "Put the *_lmdb folders of several categories into one folder: each is a class"

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


class Lmdbs(EncodedDataset):
    """Several LMDBs as one data set, {name: Lmdb}: each is a class of this name. `home` is the folder that has them."""

    cache_name = "lmdb"

    def __init__(self, parts: dict[str, Lmdb], home: Path):
        self.names, self.parts = tuple(parts), list(parts.values())
        self.ends = np.cumsum([len(part) for part in self.parts])
        length = int(self.ends[-1])
        super().__init__(self._of_part, length, f"{length} pictures of {len(parts)} categories in {printable(home)}",
                         [source for part in self.parts for source in part.sources], self._find_labels)
        first = self.parts[0]
        self.home, self.max_pixels, self.options = home, first.max_pixels, first.options

    def _find(self, index: int) -> tuple[Lmdb, int]:
        """Return (the LMDB that has picture `index`, its index there)."""
        number = int(np.searchsorted(self.ends, index, "right"))
        return self.parts[number], index - int(self.ends[number]) + len(self.parts[number])

    def _of_part(self, index: int) -> torch.Tensor:
        part, index = self._find(index)
        return part[index]

    def _find_labels(self) -> Labels:
        return Labels(self.names, np.repeat(np.arange(len(self.parts)), [len(part) for part in self.parts]))

    def use_levels(self, levels):
        for part in self.parts:
            part.use_levels(levels)
        self.options = self.parts[0].options

    def open(self, index):
        part, index = self._find(index)
        return part.open(index)

    def name(self, index):
        part, index = self._find(index)
        return part.name(index)

    def entry(self, index):
        part, index = self._find(index)
        return part.entry(index)

    @cached_property
    def stamps(self):
        return np.concatenate([_hash(name) ^ part.stamps for name, part in zip(self.names, self.parts, strict=True)])

    @cached_property
    def identities(self):
        """Of category and key: two categories may have the same key."""
        pairs = ((name, key) for name, part in zip(self.names, self.parts, strict=True) for key in part.keys)
        return np.fromiter(map(_identity, pairs), np.int64, len(self))


class DerivedDataset(ImageDataset):
    """A data set made of another one, `whole`, which answers what this one does not answer itself."""

    def __init__(self, whole: ImageDataset, read: Callable[[int], torch.Tensor], length: int, summary: str,
                 sources: Sequence[str]):
        super().__init__(read, length, summary, sources, self._find_labels)
        self.whole, self.options = whole, whole.options

    def _find_labels(self) -> Labels | None:
        return self.whole.labels

    def stray(self):
        return self.whole.stray()

    def advice_on_labels(self):
        return self.whole.advice_on_labels()


class Subset(DerivedDataset):
    """The pictures of a data set at `indices`, in this order; `word` describes them in the summary."""

    def __init__(self, whole: ImageDataset, indices: Sequence[int], word: str):
        sources = whole.sources  # one file per picture, or files of many pictures each, which are all kept
        if len(sources) == len(whole):
            sources = [sources[index] for index in indices]
        super().__init__(whole, self._of_whole, len(indices), f"{len(indices)} {word} of {whole.summary}", sources)
        self.indices = np.asarray(indices, np.int64)

    def _of_whole(self, index: int) -> torch.Tensor:
        return self.whole[int(self.indices[index])]

    def _find_labels(self):
        return self.whole.labels and self.whole.labels.subset(self.indices)

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
    """Slices of a data set (whose `[index]` is uint8 (C, H, W)) as uint8 (N, C, H, W), decoded by several threads.

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
