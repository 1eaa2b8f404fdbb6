"""Real pictures: the data set table, their fingerprint, the decoded cache, resumable sampling.

A data set maps an index to one uint8 picture (3, imsize, imsize); a new one is a function and a row of
`DATASETS`. Training walks through sample numbers 0, 1, 2, ... over the whole life of a run: which picture
number n shows, and whether it is mirrored, follows from the seed and n alone. So one integer in a checkpoint
is enough to go on exactly, whatever --num_workers is.
"""

import atexit
import hashlib
import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache, partial
from itertools import count
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader, Dataset

import toy_faces
from decode import decode, find_pictures, planes, read_picture, to_tensor
from failures import DataError

CELEBA_CROP = 160  # pixels: the face in an aligned 178x218 CelebA picture, cropped as published
TOY_LENGTH = 4096  # faces
CACHE_BYTES = 2**30  # of decoded pictures; a larger data set is decoded again in every epoch


# ---- the data sets ----


class Pictures(Dataset):
    """`length` pictures, of which `read(index)` gives one as uint8 (3, imsize, imsize).

    `sources` are the paths of the files that they come from, always in the same order.
    """

    def __init__(self, read: Callable[[int], torch.Tensor], length: int, summary: str, sources: Sequence[str]):
        self.read, self.length, self.summary, self.sources = read, length, summary, sources

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(index)


def pictures_in(folder: Path, imsize: int, crop: int | None = None) -> Pictures:
    """The picture files below a folder, sorted by path. Raises DataError where there are none."""
    paths = find_pictures(folder)
    read = partial(_read_file, paths, imsize=imsize, crop=crop)
    return Pictures(read, len(paths), f"{len(paths)} pictures in {folder}", paths)


def _read_file(paths: list[str], index: int, imsize: int, crop: int | None) -> torch.Tensor:
    return read_picture(paths[index], imsize, crop)


def open_folder(config) -> Dataset:
    """Any folder of pictures, `--image_path` itself. Raises DataError."""
    try:
        return pictures_in(Path(config.image_path), config.imsize)
    except DataError as error:
        raise DataError(f"--dataset folder: {error}; let --image_path name a folder of pictures") from None


def _missing(config, problem: object, name: str) -> DataError:
    return DataError(
        f"--dataset {config.dataset} --image_path {config.image_path}: {problem}\n"
        f"get the data with `bash download.sh {name}`, or train on drawn faces with `--dataset toy`"
    )


def open_celeb(config) -> Dataset:
    """CelebA's aligned pictures below `{image_path}/CelebA`, the central 160 px of each. Raises DataError."""
    try:
        return pictures_in(Path(config.image_path, "CelebA"), config.imsize, CELEBA_CROP)
    except DataError as error:
        raise _missing(config, error, "CelebA") from None


_environments = {}  # folder: (process id, open LMDB)


def environment(folder: str):
    """The LMDB in `folder`, opened once per process (lmdb refuses a second time) and again after a fork."""
    import lmdb

    pid, opened = _environments.get(folder, (None, None))
    if pid != os.getpid():
        if opened is not None:
            opened.close()  # the parent's: not valid here, yet lmdb would take this for a second opening
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        _environments[folder] = os.getpid(), opened
    return opened


def _read_lmdb(folder: str, keys: list[bytes], index: int, imsize: int) -> torch.Tensor:
    with environment(folder).begin() as transaction:
        data = transaction.get(keys[index])
    return decode(data, f"{keys[index].decode(errors='replace')} in {folder}", imsize)


def open_lsun(config) -> Dataset:
    """LSUN's layout: a `data.mdb`, of which every value is an encoded picture."""
    root, name = Path(config.image_path), "church_outdoor_train_lmdb"
    usual = [root, root / name, root / "LSUN" / name]
    found = [folder for folder in usual if (folder / "data.mdb").is_file()][:1]
    found = found or [file.parent for file in sorted(root.glob("*_lmdb/data.mdb"))]
    if not found:
        raise _missing(config, f"no data.mdb in {usual[1]} or {usual[2]}", "LSUN")
    if len(found) > 1:
        names = ", ".join(folder.name for folder in found)
        raise DataError(f"--image_path {root} holds several data sets ({names}): let it name one of them")
    try:
        import lmdb
    except ImportError:
        raise DataError("--dataset lsun needs the lmdb package: pip install lmdb") from None
    file, folder = found[0] / "data.mdb", os.path.realpath(found[0])
    try:
        opened = environment(folder)
        if file.stat().st_size < (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]:
            raise _missing(config, f"{file} is cut short", "LSUN")  # reading on would end in a bus error
        with opened.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except (lmdb.Error, OSError) as error:
        raise _missing(config, f"cannot read {file} ({error})", "LSUN") from error
    if not keys:
        raise _missing(config, f"{file} holds no pictures", "LSUN")
    read = partial(_read_lmdb, folder, keys, imsize=config.imsize)
    return Pictures(read, len(keys), f"{len(keys)} pictures in {found[0]}", [str(file)])


def open_cifar10(config) -> Dataset:
    """The 50,000 training pictures of CIFAR-10 as torchvision reads them. Raises DataError."""
    root, name = Path(config.image_path), "cifar-10-batches-py"
    if not (root / name).is_dir():
        root = root / "CIFAR10"
    if not (root / name).is_dir():
        raise _missing(config, f"there is no folder {root / name}", "CIFAR10")
    from torchvision.datasets import CIFAR10  # takes a second to import, so only when needed

    try:
        pictures = CIFAR10(root, train=True, download=False).data  # (N, 32, 32, 3) uint8
    except RuntimeError:  # torchvision's word for a wrong checksum
        raise _missing(config, f"{root / name} is damaged or incomplete", "CIFAR10") from None
    read = partial(_read_array, pictures, imsize=config.imsize)
    sources = [str(root / name / file) for file, _ in CIFAR10.train_list]
    return Pictures(read, len(pictures), f"{len(pictures)} pictures in {root}", sources)


def _read_array(pictures: np.ndarray, index: int, imsize: int) -> torch.Tensor:
    return to_tensor(Image.fromarray(pictures[index]), imsize)


def open_toy(config) -> Dataset:
    """Faces drawn by code: nothing to download."""
    read = partial(_draw, imsize=config.imsize)
    return Pictures(read, TOY_LENGTH, f"{TOY_LENGTH} drawn faces at {config.imsize} px", [toy_faces.__file__])


def _draw(index: int, imsize: int) -> torch.Tensor:
    return planes(toy_faces.draw_face(index, imsize))


DATASETS = {  # --dataset: how to open it
    "celeb": open_celeb,
    "lsun": open_lsun,
    "cifar10": open_cifar10,
    "folder": open_folder,
    "toy": open_toy,
}


def part(dataset: Pictures, indices: Sequence[int], word: str) -> Pictures:
    """Those of the pictures, in this order; `word` says which they are."""
    sources = dataset.sources  # a file for each picture, or files of many
    if len(sources) == len(dataset):
        sources = [sources[index] for index in indices]
    read = partial(_read_part, dataset, indices)
    return Pictures(read, len(indices), f"{len(indices)} {word} of {dataset.summary}", sources)


def _read_part(dataset: Pictures, indices: Sequence[int], index: int) -> torch.Tensor:
    return dataset[indices[index]]


def split(dataset: Pictures, share: float) -> tuple[Pictures, Pictures]:
    """(to train on, held out): a random `share` of the pictures, at least one, is held out; which follows from their
    number and the share alone, not from --seed. Both keep the pictures' order.
    """
    length = len(dataset)
    order = np.random.default_rng(0).permutation(length)
    held_out = max(1, round(share * length))
    return (part(dataset, sorted(order[held_out:].tolist()), "trained on"),
            part(dataset, sorted(order[:held_out].tolist()), "held out"))


def open_dataset(config) -> Pictures:
    """The data set that `config` names, whole: `len()`, and `[index]` -> uint8 (3, imsize, imsize). Writes nothing.

    Raises DataError where it is missing or unreadable.
    """
    return DATASETS[config.dataset](config)


def build_dataset(config) -> Dataset:
    """What a run of this `config` trains on: `open_dataset` less what `--holdout` keeps back.

    Raises DataError where it is missing, unreadable, or smaller than one batch.
    """
    dataset = open_dataset(config)
    if config.holdout:
        dataset, _ = split(dataset, config.holdout)
    if len(dataset) < config.batch_size:
        raise DataError(
            f"--batch_size {config.batch_size} is more than the {dataset.summary}; "
            f"use --batch_size {len(dataset)} or less"
        )
    return cached(dataset, config.imsize, shared=config.num_workers > 0)


def describe(dataset: Dataset, config) -> str:
    """One line on what is trained on, such as `folder: 756 pictures in data/vangogh`."""
    return f"{config.dataset}: {dataset.summary}"


def fingerprint(dataset: Dataset, config) -> str:
    """Hex sha256 of what decides which picture index i shows: the files, their order, how they are cut and sized.

    Files are told apart by absolute path, size and time of change; their content is not read (200,000 files
    take seconds). So a changed file of the same size whose time was set back passes, and a moved or copied
    folder counts as another. Raises DataError if a file has gone.
    """
    digest = hashlib.sha256(repr((config.dataset, config.imsize, CELEBA_CROP, len(dataset))).encode())
    for path in dataset.sources:
        try:
            file = os.stat(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error
        digest.update(repr((os.path.abspath(path), file.st_size, file.st_mtime_ns)).encode())
    return digest.hexdigest()


# ---- the decoded cache ----


class DecodedCache(Dataset):
    """Keeps each picture from its first use on; `shared` among this process and its workers."""

    def __init__(self, dataset: Dataset, imsize: int, shared: bool):
        self.dataset, self.summary, self.sources = dataset, dataset.summary, dataset.sources
        self.pictures = torch.empty(len(dataset), 3, imsize, imsize, dtype=torch.uint8)
        self.filled = torch.zeros(len(dataset), dtype=torch.bool)
        self._full = False
        if shared:
            self.pictures.share_memory_()
            self.filled.share_memory_()

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.gather([index])[0]

    def gather(self, indices: Sequence[int]) -> torch.Tensor:
        """A copy of the pictures `indices`, uint8 (len(indices), 3, imsize, imsize)."""
        indices = torch.as_tensor(indices)
        for index in indices[~self.filled[indices]].tolist():
            # The flag last: who sees it finds the whole picture. Two workers at the same one write the same.
            self.pictures[index] = self.dataset[index]
            self.filled[index] = True
        return self.pictures[indices]

    def full(self) -> bool:
        """Whether no picture is left to decode."""
        self._full = self._full or bool(self.filled.all())
        return self._full


def cached(dataset: Dataset, imsize: int, shared: bool) -> Dataset:
    """`dataset` behind a DecodedCache, or as it is where memory does not allow that."""
    size = len(dataset) * 3 * imsize**2
    processes = int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # set by torchrun; each keeps its own cache
    room = min(CACHE_BYTES, available_memory() // 4 // processes)
    if shared and os.path.isdir("/dev/shm"):
        # A container may have 64 MB of it, and writing past that is a bus error. Batches need some too.
        room = min(room, shutil.disk_usage("/dev/shm").free // 2 // processes)
    if size > room:
        return dataset
    try:
        return DecodedCache(dataset, imsize, shared)
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


# ---- sampling ----


@lru_cache(maxsize=2)  # a batch may begin in one epoch and end in the next
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """The order in which epoch number `epoch` shows the `length` pictures, (length,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def flip_coins(seed: int, numbers: range) -> np.ndarray:
    """Whether each of these consecutive sample numbers is mirrored, (len(numbers),) bool."""
    # Philox is a function of key and counter, with four words to a counter: nothing to carry along or save.
    words = np.random.Philox(key=seed, counter=numbers.start).random_raw(4 * len(numbers))[::4]
    return (words >> np.uint64(63)).astype(bool)


class Samples(Dataset):
    """Sample numbers -> pictures; each worker process gets a copy of this."""

    def __init__(self, dataset: Dataset, seed: int, hflip: bool):
        self.dataset, self.seed, self.hflip = dataset, seed, hflip

    def fetch(self, numbers: range) -> torch.Tensor:
        """uint8 (len(numbers), 3, imsize, imsize). Raises DataError at an unreadable picture."""
        length = len(self.dataset)
        indices = [int(epoch_order(self.seed, n // length, length)[n % length]) for n in numbers]
        if isinstance(self.dataset, DecodedCache):
            pictures = self.dataset.gather(indices)
        else:
            pictures = torch.stack([self.dataset[index] for index in indices])
        if self.hflip:
            flipped = torch.from_numpy(flip_coins(self.seed, numbers))
            pictures[flipped] = pictures[flipped].flip(-1)
        return pictures

    def __getitems__(self, numbers: range) -> torch.Tensor | str:
        """`fetch` for a worker. An error leaves as text: torch would add the worker's traceback to it."""
        try:
            return self.fetch(numbers)
        except DataError as error:
            return str(error)


def _as_is(batch: torch.Tensor | str) -> torch.Tensor | str:
    return batch


def _start_worker(worker: int):
    # A signal to the process group is meant for the trainer, which needs its workers to finish the step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape and device."""
    return pictures.float().div_(127.5).sub_(1)


def worker_death(error: RuntimeError) -> DataError | None:
    """The DataError for a loader process that died, None for any other error.

    torch raises it in the main thread wherever that happens to be, not only where batches are awaited.
    """
    if str(error).startswith("DataLoader worker"):
        return DataError(f"--num_workers: {error}\nuse fewer workers, or --num_workers 0")
    return None


class RealBatches:
    """Endless iterator over batches of real pictures; `real_batches` builds it and says what they are."""

    def __init__(self, config, dataset: Dataset, first_sample: int, device: torch.device, rank, world):
        self.samples_seen = first_sample  # by the caller, over all ranks; prefetched ones do not count
        self.samples = Samples(dataset, config.seed, config.hflip)
        self.batch_size, self.device, self.rank, self.world = config.batch_size, device, rank, world
        self.pin = device.type == "cuda"
        self._from_workers = None
        if config.num_workers > 0:
            loader = DataLoader(
                self.samples,
                batch_sampler=map(self._numbers, count(first_sample, config.batch_size)),
                num_workers=config.num_workers,
                collate_fn=_as_is,
                worker_init_fn=_start_worker,
                pin_memory=self.pin,
                generator=torch.Generator(),  # or it draws from the global one, and resuming changes the run
            )
            self._from_workers = iter(loader)
            atexit.register(self.close)  # deaf to SIGTERM, they would keep a failed program from ending

    def _numbers(self, start: int) -> range:
        """This rank's share of the batch that begins with sample number `start`."""
        share = self.batch_size // self.world
        return range(start + self.rank * share, start + (self.rank + 1) * share)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        dataset = self.samples.dataset
        if self._from_workers is not None and isinstance(dataset, DecodedCache) and dataset.full():
            self.close()  # nothing is left to decode, and copying takes less than a worker's queue
        if self._from_workers is not None:
            pictures = self._receive()
        else:
            pictures = self.samples.fetch(self._numbers(self.samples_seen))
            pictures = pictures.pin_memory() if self.pin else pictures
        self.samples_seen += self.batch_size
        return normalize(pictures.to(self.device, non_blocking=True))

    def _receive(self) -> torch.Tensor:
        try:
            pictures = next(self._from_workers)
        except RuntimeError as error:
            raise worker_death(error) or error from None
        if isinstance(pictures, str):
            raise DataError(pictures)
        return pictures

    def close(self):
        """Stops the workers. A later `next` goes on in this process."""
        if self._from_workers is None:
            return
        atexit.unregister(self.close)
        workers, self._from_workers = self._from_workers, None
        try:
            # Its destructor would do, but for tracebacks that keep it alive.
            workers._shutdown_workers()
        except RuntimeError as error:
            if worker_death(error) is None:
                raise
            for process in workers._workers:  # one died in the middle of this: torch gave up on the others
                process.join(10)
                process.kill()


def real_batches(
    config, dataset: Dataset, first_sample: int, device: torch.device | str, rank: int = 0, world: int = 1
) -> RealBatches:
    """Endless iterator over float32 (batch_size / world, 3, imsize, imsize) in [-1, 1] on `device`.

    Batch t shows the sample numbers from first_sample + t * batch_size on, of which `rank` gets its
    contiguous share. What an epoch leaves over opens the next one's first batch: no picture is dropped.
    Global random states stay as they are. `samples_seen` is the first_sample to go on with; `close()` ends
    the workers, and so does the end of the program.
    """
    return RealBatches(config, dataset, first_sample, torch.device(device), rank, world)
