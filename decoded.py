"""The decoded cache: every picture is decoded, cut and resized once, and from then on read as plain bytes.

It fills as pictures are first shown, so training starts at once. It is one file that all runs and processes map into
their memory, beside the data unless `--cache_dir` names another place; where the disk cannot take it, memory that ends
with the program. A picture's checksum beside it says that it is there and whole: what a power cut tore, or another
program overwrote, is decoded again.
"""

import hashlib
import json
import os
import shutil
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch

import decode
import utils
import workers
from datasets import Encoded, Pictures
from distributed import after_first, on_this_machine, say
from failures import CheckpointError

FOLDER = ".decoded"  # hidden, so that it is not searched for pictures
MEMORY = 2**30  # bytes that pictures may take in memory where they have no file
_PAGE = 4096  # the pictures begin at a multiple of this


class DecodedCache(Pictures):
    """A data set that keeps each of its pictures from its first use on.

    `pictures` uint8 (N, 3, imsize, imsize) and `sums` int32 (N,), 0 where there is no picture yet, are shared by all
    processes that have them, through `file` if there is one. Without `writable` nothing is added.
    """

    def __init__(self, dataset: Pictures, pictures: torch.Tensor, sums: torch.Tensor, file: "_File | None" = None,
                 writable: bool = True):
        super().__init__(self._one, len(dataset), dataset.summary, dataset.sources)
        self.dataset, self.pictures, self.file, self.writable = dataset, pictures, file, writable
        self._shared_sums, self.sums = sums, sums.numpy().view(np.uint32)
        self._seen = np.zeros(len(dataset), bool)  # by this process, and found whole

    @classmethod
    def in_memory(cls, dataset: Pictures, imsize: int, shared: bool) -> "DecodedCache":
        """One that ends with this process; `shared` with its workers. Raises OSError, RuntimeError."""
        pictures = torch.empty(len(dataset), 3, imsize, imsize, dtype=torch.uint8)
        sums = torch.zeros(len(dataset), dtype=torch.int32)
        if shared:
            pictures.share_memory_()
            sums.share_memory_()
        return cls(dataset, pictures, sums)

    def __reduce__(self):
        """For spawned workers: a file is mapped again, not copied."""
        if self.file:
            return _File.map_again, (self.file, self.dataset)
        return DecodedCache, (self.dataset, self.pictures, self._shared_sums)

    def _one(self, index: int) -> torch.Tensor:
        return self.gather([index])[0]

    def gather(self, indices):
        indices = np.asarray(indices, np.int64)
        found = self.pictures[torch.from_numpy(indices)]
        for place in np.flatnonzero(~self._seen[indices]):
            index = int(indices[place])
            if self._seen[index]:  # asked for twice
                found[place] = self.pictures[index]
                continue
            there = self.sums[index] != 0 and _checksum(found[place]) == self.sums[index]
            if not there:
                found[place] = self.dataset[index]
                if self.writable:
                    # The sum last: who sees it finds the whole picture. Two processes at the same one write the same.
                    self.pictures[index] = found[place]
                    self.sums[index] = _checksum(found[place])
            self._seen[index] = there or self.writable
        return found

    def decoded(self, indices=None):
        return bool((self.sums if indices is None else self.sums[indices]).all())


def _checksum(picture: torch.Tensor) -> int:
    return zlib.crc32(picture.numpy()) or 1  # 0 means that there is none


# ---- the file ----


@dataclass(frozen=True)
class _File:
    """Where the pictures of a data set are kept at a size: a head of JSON, the sums, the pictures."""

    path: Path
    head: bytes
    count: int
    imsize: int

    @classmethod
    def of(cls, dataset: Encoded, config, folder: Path) -> "_File":
        head = {"pictures": hashlib.sha256(dataset.stamps.tobytes()).hexdigest(), "imsize": config.imsize,
                "crop": dataset.crop, "procedure": decode.PROCEDURE, "Pillow": PIL.__version__}
        text = json.dumps(head).encode()
        kind = f"{config.imsize}px" + (f"_crop{dataset.crop}" if dataset.crop else "")
        name = f"{kind}_{hashlib.sha256(text).hexdigest()[:16]}.u8"
        return cls(folder / name, text.ljust(_PAGE), len(dataset), config.imsize)

    @property
    def begin(self) -> int:
        """Of the pictures, in bytes."""
        return _PAGE + -(-4 * self.count // _PAGE) * _PAGE

    @property
    def size(self) -> int:
        """In bytes."""
        return self.begin + self.count * 3 * self.imsize**2

    def create(self):
        """Make it, empty but with all its space taken, and remove those of older states of the data. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        utils.write_atomically(self.path, self._write)
        kind = self.path.name.rpartition("_")[0]
        for other in self.path.parent.glob(f"{kind}_*.u8"):
            if other != self.path:
                other.unlink(missing_ok=True)  # a process that has it mapped keeps it

    def _write(self, path: Path):
        with open(path, "wb") as file:
            file.write(self.head)
            file.flush()
            # Not a hole: writing into one through a map, on a full disk, would be a bus error.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            else:
                for start in range(_PAGE, self.size, 2**20):
                    file.write(bytes(min(2**20, self.size - start)))

    def map(self, dataset: Pictures) -> DecodedCache | None:
        """The cache in it, None where there is none that fits. Raises OSError."""
        try:
            with open(self.path, "rb") as file:
                if file.read(_PAGE) != self.head or os.fstat(file.fileno()).st_size != self.size:
                    return None
        except FileNotFoundError:
            return None
        writable = os.access(self.path, os.W_OK)
        # "c", where what is written goes nowhere: torch wants to be able to write
        whole = np.memmap(self.path, np.uint8, "r+" if writable else "c")
        sums = torch.from_numpy(whole[_PAGE:_PAGE + 4 * self.count].view(np.int32))
        pictures = torch.from_numpy(whole[self.begin:]).view(self.count, 3, self.imsize, self.imsize)
        return DecodedCache(dataset, pictures, sums, self, writable)

    def map_again(self, dataset: Pictures) -> Pictures:
        """The cache in it or, if it has gone meanwhile, the data set as it is."""
        return self.map(dataset) or dataset


# ---- which of them ----


def cached(dataset: Pictures, config) -> Pictures:
    """`dataset` behind the cache that `--cache` asks for, or as it is. Says which.

    Of several processes the first makes the file and the others map it: all come here. Raises CheckpointError where
    `--cache on` meets a disk that refuses, DataError if a file of the data has gone.
    """
    if config.cache == "off":
        return dataset
    if not isinstance(dataset, Encoded):
        return _in_memory(dataset, config)
    files = [_File.of(dataset, config, folder) for folder in _folders(dataset, config)]
    return after_first(lambda: _found(files, dataset) or _made(files, dataset, config),
                       lambda: _found(files, dataset) or _in_memory(dataset, config))


def _folders(dataset: Encoded, config) -> list[Path]:
    """Where its files may lie, the best place first."""
    place = os.path.abspath(dataset.home)
    name = f"{os.path.basename(place)}-{hashlib.sha256(place.encode()).hexdigest()[:8]}"
    if config.cache_dir:
        return [Path(config.cache_dir, name)]
    return [Path(dataset.home, FOLDER), Path(config.cache_path, "decoded", name)]


def _found(files: list[_File], dataset: Encoded) -> DecodedCache | None:
    for file in files:
        try:
            cache = file.map(dataset)
        except OSError:  # a folder that may not be read
            continue
        if cache is not None:
            there = np.count_nonzero(cache.sums)
            say(f"decoded cache: {there} of {len(cache)} pictures in {file.path}")
            return cache
    return None


def _made(files: list[_File], dataset: Encoded, config) -> Pictures:
    size = files[0].size
    if config.cache == "auto":
        if config.mode != "train":
            return _in_memory(dataset, config)
        if config.total_step * config.d_iters * config.batch_size <= len(dataset):
            return dataset  # no picture comes twice
    problems = []
    for file in files:
        try:
            free = shutil.disk_usage(_existing(file.path.parent)).free
            if config.cache == "auto" and size > free // 4:
                problems.append(f"{file.path.parent} has {_gb(free)} free, of which a quarter may be taken")
                continue
            if config.dry_run:
                say(f"decoded cache: {_gb(size)} would go into {file.path.parent}")
                return dataset
            file.create()
            cache = file.map(dataset)
        except OSError as error:
            problems.append(f"cannot write {file.path.parent} ({error.strerror})")
            continue
        say(f"decoded cache: {_gb(size)} in {file.path}, filled as pictures are first shown")
        return cache
    problem = f"{_gb(size)} of decoded pictures: {problems[-1]}"
    if config.cache == "on":
        raise CheckpointError(f"--cache on: {problem}.\nFree some space, or name another folder with --cache_dir.")
    kept = _in_memory(dataset, config)
    how = "kept in memory" if kept is not dataset else "every picture is decoded anew each time"
    say(f"decoded cache: none, {how}; {problem} (--cache_dir DIR)")
    return kept


def _existing(folder: Path) -> Path:
    """The folder, or the nearest above it that is there."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _in_memory(dataset: Pictures, config) -> Pictures:
    """`dataset` behind a cache that ends with the program, or as it is where memory does not allow that."""
    size, shared = len(dataset) * 3 * config.imsize**2, config.num_workers != 0
    processes = on_this_machine()  # each keeps its own
    room = min(MEMORY, available_memory() // 4 // processes)
    if shared:
        room = min(room, workers.shared_memory() // 2 // processes)     # batches need some too
    if size > room:
        return dataset
    try:
        return DecodedCache.in_memory(dataset, config.imsize, shared)
    except (OSError, RuntimeError):  # no shared memory on this system
        return dataset


def available_memory() -> int:
    """Bytes that this machine can spare, 0 where it does not tell."""
    try:
        with open("/proc/meminfo") as table:  # unlike sysconf, it counts the file cache as available
            return next(int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return 0
