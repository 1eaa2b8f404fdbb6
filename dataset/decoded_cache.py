"""Cache of decoded pictures: each is decoded, cropped and resized once, then read back as raw uint8.

It fills as pictures are first used, so training starts at once. It is one memory-mapped file shared by all runs and
processes, in the data folder or in `--cache_dir`; if the disk has no space for it, it is kept in (shared) memory until
the program ends. A checksum per picture tells whether the picture is in the cache and intact: one damaged by a power
failure or by another program is decoded again.
"""

import contextlib
import hashlib
import json
import os
import shutil
import sys
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import PIL
import torch

import utils
from dataset import decode, workers
from dataset.decode import printable
from dataset.images import DerivedDataset, EncodedDataset, ImageDataset
from device.distributed import after_first, on_this_machine, say
from errors import CheckpointError
from flags.pictures import PictureShape

FOLDER = ".decoded"  # hidden, so that the search for pictures skips it
MEMORY = 2**30  # bytes that an in-memory cache may take, at most
_PAGE = 4096  # bytes: length of the header; the pictures begin at a multiple of it


class DecodedCache(DerivedDataset):
    """A data set that decodes each picture on its first use and caches it.

    `pictures` uint8 (N, C, H, W) and their checksums `sums` int32 (N,), 0 for not cached, are shared between
    processes: memory-mapped from `file`, or in shared memory. If not `writable`, nothing is added.
    """

    def __init__(self, dataset: ImageDataset, pictures: torch.Tensor, sums: torch.Tensor, file: "_File | None" = None,
                 writable: bool = True):
        super().__init__(dataset, self._one, len(dataset), dataset.summary, dataset.sources)
        self.pictures, self.file, self.writable = pictures, file, writable
        self._shared_sums, self.sums = sums, sums.numpy().view(np.uint32)
        self._verified = np.zeros(len(dataset), bool)  # this process knows these to be cached and intact

    @classmethod
    def in_memory(cls, dataset: ImageDataset, shape: PictureShape, shared: bool) -> "DecodedCache":
        """A cache in memory; `shared`: in memory shared with the workers. Raises OSError, RuntimeError."""
        pictures = torch.empty(len(dataset), *shape.size, dtype=torch.uint8)
        sums = torch.zeros(len(dataset), dtype=torch.int32)
        if shared:
            pictures.share_memory_()
            sums.share_memory_()
        return cls(dataset, pictures, sums)

    def __reduce__(self):
        """Pickle for spawned workers: they map the file themselves, its content is not copied."""
        if self.file:
            return _File.map_again, (self.file, self.whole)
        return DecodedCache, (self.whole, self.pictures, self._shared_sums)

    def _one(self, index: int) -> torch.Tensor:
        return self.load_batch([index])[0]

    def load_batch(self, indices):
        indices = np.asarray(indices, np.int64)
        batch = self.pictures[torch.from_numpy(indices)]
        for i in np.flatnonzero(~self._verified[indices]):
            index = int(indices[i])
            if self._verified[index]:  # `indices` has it twice: the first one was verified or decoded just now
                batch[i] = self.pictures[index]
                continue
            hit = self.sums[index] != 0 and _checksum(batch[i]) == self.sums[index]
            if not hit:
                batch[i] = self.whole[index]
                if self.writable:
                    # The checksum last: a process that sees it finds the whole picture. Processes that decode the same
                    # picture write the same bytes.
                    self.pictures[index] = batch[i]
                    self.sums[index] = _checksum(batch[i])
            self._verified[index] = hit or self.writable
        return batch

    @property
    def identities(self):
        return self.whole.identities

    def is_decoded(self, indices=None):
        return bool((self.sums if indices is None else self.sums[indices]).all())


def _checksum(picture: torch.Tensor) -> int:
    return zlib.crc32(picture.numpy()) or 1  # 0 means "not cached"


# ---- the file ----


@dataclass(frozen=True)
class _File:
    """The cache file of a data set at one size: a JSON header of _PAGE bytes, the checksums, the pictures.

    The header holds everything that determines the pixels. Its hash is part of the file name.
    """

    path: Path
    header: bytes
    count: int
    shape: PictureShape

    @classmethod
    def of(cls, dataset: EncodedDataset, config, folder: Path) -> "_File":
        shape = PictureShape.of_config(config)
        fields = {"pictures": hashlib.sha256(dataset.stamps.tobytes()).hexdigest(), "imsize": shape.key,
                  "crop": dataset.crop, "procedure": decode.CACHE_VERSION, "Pillow": PIL.__version__,
                  **dataset.options}
        text = json.dumps(fields).encode()
        size, *words = str(shape.key).split()
        kind = "_".join([f"{size}px", *words, *([f"crop{dataset.crop}"] if dataset.crop else [])])
        name = f"{kind}_{hashlib.sha256(text).hexdigest()[:16]}.u8"
        return cls(folder / name, text.ljust(_PAGE), len(dataset), shape)

    @property
    def offset(self) -> int:
        """Offset of the pictures in the file, in bytes."""
        return _PAGE + -(-4 * self.count // _PAGE) * _PAGE

    @property
    def size(self) -> int:
        """Size of the file, in bytes."""
        return self.offset + self.count * self.shape.values

    def create(self):
        """Create the file, empty but fully allocated, and delete stale versions of it. Raises OSError."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        utils.write_atomically(self.path, self._write)
        kind, _, digest = self.path.stem.rpartition("_")        # of this very shape: others are no versions of it
        for other in self.path.parent.glob(f"{kind}_{'[0-9a-f]' * len(digest)}.u8"):
            if other != self.path:
                with contextlib.suppress(PermissionError):  # of Windows, where it stays if a process has mapped it
                    other.unlink(missing_ok=True)  # elsewhere such a process can still use it

    def _write(self, path: Path):
        with open(path, "wb") as file:
            file.write(self.header)
            file.flush()
            # Allocate, do not leave a sparse file: writing to a hole through the mapping is a bus error on a full disk.
            if hasattr(os, "posix_fallocate"):
                os.posix_fallocate(file.fileno(), 0, self.size)
            else:
                for start in range(_PAGE, self.size, 2**20):
                    file.write(bytes(min(2**20, self.size - start)))

    def map(self, dataset: ImageDataset) -> DecodedCache | None:
        """Memory-map the file; return None if it does not exist or has another header or size. Raises OSError."""
        try:
            with open(self.path, "rb") as file:
                if file.read(_PAGE) != self.header or os.fstat(file.fileno()).st_size != self.size:
                    return None
        except FileNotFoundError:
            return None
        writable = os.access(self.path, os.W_OK)
        # "c" (copy-on-write) instead of "r": PyTorch warns of read-only arrays
        mapped = np.memmap(self.path, np.uint8, "r+" if writable else "c")
        sums = torch.from_numpy(mapped[_PAGE:_PAGE + 4 * self.count].view(np.int32))
        pictures = torch.from_numpy(mapped[self.offset:]).view(self.count, *self.shape.size)
        return DecodedCache(dataset, pictures, sums, self, writable)

    def map_again(self, dataset: ImageDataset) -> ImageDataset:
        """Map the file in a spawned worker; return `dataset` without a cache if the file has been deleted."""
        return self.map(dataset) or dataset


# ---- file, memory or no cache ----


def cached(dataset: ImageDataset, config) -> ImageDataset:
    """Return `dataset` behind the cache that `--cache` asks for, or `dataset` itself; print which file is used.

    Rank 0 creates the file, the other ranks map it: all ranks must call this. Raises CheckpointError if `--cache on`
    and the file cannot be written, DataError if a file of the data set is missing.
    """
    if config.cache == "off":
        return dataset
    if not isinstance(dataset, EncodedDataset):
        return _in_memory(dataset, config)
    files = [_File.of(dataset, config, folder) for folder in _folders(dataset, config)]
    return after_first(lambda: _map_existing(files, dataset) or _create(files, dataset, config),
                       lambda: _map_existing(files, dataset) or _in_memory(dataset, config))


def _folders(dataset: EncodedDataset, config) -> list[Path]:
    """Folders for the cache file, the preferred one first."""
    home = os.path.abspath(dataset.home)
    name = f"{os.path.basename(home)}-{hashlib.sha256(os.fsencode(home)).hexdigest()[:8]}"
    if config.cache_dir:
        return [Path(config.cache_dir, name)]
    folder = os.path.dirname(dataset.home) if os.path.isfile(dataset.home) else dataset.home
    return [Path(folder, FOLDER, dataset.cache_name), Path(config.cache_path, "decoded", name)]


def _map_existing(files: list[_File], dataset: EncodedDataset) -> DecodedCache | None:
    for file in files:
        try:
            cache = file.map(dataset)
        except OSError:  # no permission to read
            continue
        if cache is not None:
            say(f"decoded cache: {np.count_nonzero(cache.sums)} of {len(cache)} pictures in {printable(file.path)}")
            return cache
    return None


def _create(files: list[_File], dataset: EncodedDataset, config) -> ImageDataset:
    size = files[0].size
    if config.cache == "auto":
        if config.mode != "train":
            return _in_memory(dataset, config)
        if config.total_step * config.d_iters * config.batch_size <= len(dataset):
            return dataset  # at most one epoch: no picture is used twice
    problems = []
    for file in files:
        try:
            if not config.dry_run:
                utils.remove_leftovers(file.path.parent)
            free = shutil.disk_usage(_existing(file.path.parent)).free
            if config.cache == "auto" and size > free // 4:
                problems.append(f"{printable(file.path.parent)} has {_gb(free)} free, and --cache auto uses at "
                                "most a quarter")
                continue
            if config.dry_run:
                say(f"decoded cache: {_gb(size)} would be written to {printable(file.path.parent)}")
                return dataset
            file.create()
            cache = file.map(dataset)
        except OSError as error:
            problems.append(f"cannot write {printable(file.path.parent)} ({error.strerror})")
            continue
        say(f"decoded cache: {_gb(size)} in {printable(file.path)}, filled as pictures are first used")
        return cache
    problem = f"{_gb(size)} of decoded pictures: {problems[-1]}"
    if config.cache == "on":
        raise CheckpointError(f"--cache on: {problem}.\nFree some space, or name another folder with --cache_dir.")
    cache = _in_memory(dataset, config)
    instead = "pictures are kept in memory" if cache is not dataset else "pictures are decoded in every epoch"
    say(f"decoded cache: no file, {instead}; {problem} (--cache_dir DIR)")
    return cache


def _existing(folder: Path) -> Path:
    """The folder, or its nearest parent that exists."""
    return next(path for path in (folder, *folder.absolute().parents) if path.is_dir())


def _gb(size: int) -> str:
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def _in_memory(dataset: ImageDataset, config) -> ImageDataset:
    """Return `dataset` behind a cache in memory, or `dataset` itself if it does not fit."""
    shape, shared = PictureShape.of_config(config), config.num_workers != 0
    size = len(dataset) * shape.values
    processes = on_this_machine()  # each has its own copy
    limit = min(MEMORY, (available_memory() or sys.maxsize) // 4 // processes)
    if shared:
        limit = min(limit, workers.shared_memory() // 2 // processes)   # the other half is for the workers' batches
    if size > limit:
        return dataset
    try:
        return DecodedCache.in_memory(dataset, shape, shared)
    except (OSError, RuntimeError):  # no shared memory on this system
        return dataset


def available_memory() -> int:
    """Return the bytes of main memory that this process can get, 0 if unknown."""
    return min(filter(None, (_memory_of_machine(), _memory_of_container())), default=0)


def _memory_of_container() -> int:
    """Return the bytes that are left of a container's limit; 0 if there is none, or it is unknown."""
    try:
        limit, used = (int((workers.CONTAINER / name).read_text()) for name in ("memory.max", "memory.current"))
        table = dict(line.split() for line in (workers.CONTAINER / "memory.stat").read_text().splitlines())
        names = ("active_file", "inactive_file", "slab_reclaimable")     # caches, which give way
        files = sum(int(table[name]) for name in names)
    except (OSError, ValueError, KeyError):  # ValueError: it is "max", no limit
        return 0
    return max(1, limit - used + files)


def _memory_of_machine() -> int:
    """Return the bytes that are available, 0 if unknown; half of the total where only the total is known."""
    try:
        with open("/proc/meminfo") as table:  # unlike sysconf, it counts the page cache as available
            return next(int(line.split()[1]) * 1024 for line in table if line.startswith("MemAvailable:"))
    except (OSError, StopIteration):
        pass
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // 2
    except (AttributeError, ValueError, OSError):  # no sysconf on Windows
        return 0
