"""Real pictures for training: opened, checked, cached, and sampled so that a run resumes exactly.

Training counts sample numbers 0, 1, 2, ... over the whole run. Which picture sample n is, and whether it is flipped,
depends on the seed and n alone. So one integer in a checkpoint is enough to resume exactly, at any --num_workers and
from any source of the pictures.
"""

import atexit
import zlib
from collections.abc import Iterator, Sequence
from functools import lru_cache
from itertools import count
from typing import NamedTuple

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from dataset import workers
from dataset.check import usable
from dataset.decode import UnusablePicture
from dataset.decoded_cache import available_memory, cached
from dataset.images import ImageDataset, split
from dataset.table import DATASETS
from device.distributed import gather, is_alone, say
from errors import DataError, first_line
from flags.pictures import PictureShape

ON_DEVICE = 1 / 8  # the share of a GPU's free memory that the pictures may take


def find_dataset(config) -> ImageDataset:
    """Return the data set of `config` before its pictures are looked at, which writes nothing.

    Raise DataError if it is missing, or too small to train on. All ranks must call this.
    """
    dataset = _find(config)
    if len(without_held_out(dataset, config)) < config.batch_size:
        # it will be refused: for its unusable pictures, if it has too many, else with the number of the usable ones
        dataset = usable(dataset, lambda: dataset, config)
    _refuse_few(without_held_out(dataset, config), config)
    return dataset


def open_dataset(config, found: ImageDataset | None = None) -> ImageDataset:
    """Return the data set of `config` without its unusable pictures: `len()`, and `[index]` -> uint8
    (C, H, W). `found` is it as `find_dataset` returned it. All ranks must call this.

    Raise DataError if it is missing or unreadable, CheckpointError if `--cache on` cannot write to disk.
    """
    dataset = _find(config) if found is None else found
    return usable(dataset, lambda: cached(dataset, config), config)


def _find(config) -> ImageDataset:
    """Return the data set that `--dataset` names. Raise DataError if the ranks see different pictures: each takes its
    share of a batch from its own list, and waits for the others where the number decides what is to be done.
    """
    dataset = DATASETS[config.dataset](config)
    if not is_alone():
        seen = gather((len(dataset), zlib.crc32(dataset.identities.tobytes())))
        if len(set(seen)) > 1:
            raise DataError(f"--dataset {config.dataset}: the processes see different pictures ("
                            f"{', '.join(f'{count:,}' for count, _ in seen[:8])})\nwait until the folder is complete; "
                            "on several machines, install the same packages")
    return dataset


def build_dataset(config, found: ImageDataset | None = None) -> ImageDataset:
    """Return what a run of this `config` trains on: `open_dataset` without the pictures of `--holdout`. Say it.

    Raise what `open_dataset` does, and DataError if it is smaller than one batch.
    """
    dataset = without_held_out(open_dataset(config, found), config)
    _refuse_few(dataset, config)
    if not config.dry_run:  # which prints this line itself
        say(f"data: {describe(dataset, config)}")
    return dataset


def without_held_out(dataset: ImageDataset, config) -> ImageDataset:
    """Return the data set without the pictures of `--holdout`."""
    return split(dataset, config.holdout)[0] if config.holdout else dataset


def _refuse_few(dataset: ImageDataset, config):
    """Raise DataError if the data set is smaller than one batch."""
    if not len(dataset):
        raise DataError(f"--holdout {config.holdout:g} leaves no picture to train on ({dataset.summary}); leave it out")
    if len(dataset) < config.batch_size:
        raise DataError(
            f"--batch_size {config.batch_size} is more than the {dataset.summary}; "
            f"use --batch_size {len(dataset)} or less"
        )


def describe(dataset: ImageDataset, config) -> str:
    """Return a line about the training data, such as `folder: 756 pictures in data/vangogh`."""
    return f"{config.dataset}: {dataset.summary}"


def to_images(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures, uint8 0..255 -> images, float32 in [-1, 1]; same shape and device."""
    return pictures.float().div_(127.5).sub_(1)


class Batch(NamedTuple):
    """The input of a step: `images` float32 (B, C, H, W) in [-1, 1]; `labels` (B,) or None."""

    images: torch.Tensor
    labels: torch.Tensor | None = None


# ---- sampling ----


@lru_cache(maxsize=2)  # a batch may span two epochs
def epoch_order(seed: int, epoch: int, length: int) -> np.ndarray:
    """Return the picture indices of epoch `epoch` in order: a permutation, (length,) int64."""
    return np.random.default_rng((seed, epoch)).permutation(length)


def flip_coins(seed: int, first: int, count: int) -> np.ndarray:
    """Return whether each of the `count` sample numbers from `first` on is flipped, (count,) bool."""
    # Philox is counter-based: a function of key and counter (four words each), so there is no state to save.
    words = np.random.Philox(key=seed, counter=first).random_raw(4 * count)[::4]
    return (words >> np.uint64(63)).astype(bool)


class ByEpoch:
    """Picture indices by sample number: each epoch is a permutation of all pictures."""

    def __init__(self, length: int, seed: int):
        self.length, self.seed = length, seed

    def __getitem__(self, n: int) -> int:
        return int(epoch_order(self.seed, n // self.length, self.length)[n % self.length])


class ByClass:
    """Picture indices by sample number, all classes equally often (`--balance`).

    A round is a permutation of the classes that have pictures. The pictures of a class come in epochs of their own.
    """

    def __init__(self, numbers: np.ndarray, seed: int):
        self.seed = seed
        order = np.argsort(numbers, kind="stable")
        self.members = np.split(order, np.flatnonzero(np.diff(numbers[order])) + 1)  # the pictures of each class
        self._orders = [{} for _ in self.members]  # of each class {epoch: permutation}, the last two

    def __getitem__(self, n: int) -> int:
        turn, place = divmod(n, len(self.members))
        which = int(epoch_order(self.seed, turn, len(self.members))[place])
        members = self.members[which]
        epoch, place = divmod(turn, len(members))
        orders = self._orders[which]
        if epoch not in orders:
            if len(orders) > 1:
                del orders[next(iter(orders))]  # the older one
            orders[epoch] = np.random.default_rng((self.seed, epoch, which + 1)).permutation(len(members))
        return int(members[orders[epoch][place]])


class Samples(Dataset):
    """Maps sample numbers to pictures, before the flip; each worker process gets a copy."""

    def __init__(self, dataset: ImageDataset, seed: int, balance: bool = False):
        self.dataset = dataset
        self.order = ByClass(dataset.labels.numbers, seed) if balance else ByEpoch(len(dataset), seed)

    def indices(self, numbers: Sequence[int]) -> list[int]:
        """Return the picture index of each of these sample numbers."""
        return [self.order[n] for n in numbers]

    def fetch(self, indices: Sequence[int]) -> torch.Tensor:
        """Return uint8 (len(indices), C, H, W). Raise DataError if a picture cannot be read."""
        try:
            return self.dataset.load_batch(indices)
        except UnusablePicture as error:
            raise DataError(f"{error}\n`--check_data full` finds all such pictures before training") from None

    def __getitems__(self, numbers: Sequence[int]) -> torch.Tensor | str:
        """`fetch` by sample numbers for a worker, in shared memory. Return an error as text: torch would add the
        worker's traceback to an exception.
        """
        try:
            pictures = self.fetch(self.indices(numbers))
        except DataError as error:
            return str(error)
        try:
            # CRUCIAL: here, and not when torch sends the batch. There a failure would lose the batch without a word,
            # and the training process would wait for it forever.
            return pictures.share_memory_()
        except (OSError, RuntimeError) as error:
            return f"--num_workers: a loader process got no shared memory ({first_line(error)})\n{workers.NO_MEMORY}"


class RealBatches:
    """Endless iterator over batches of real images; see `real_batches`.

    Once all pictures are decoded, no workers are used: the pictures come from the device, if it is a GPU with enough
    memory for all of them, else from main memory or the cache file.
    """

    def __init__(self, config, dataset: ImageDataset, first_sample: int, device: torch.device, rank, world_size,
                 labelled):
        self.samples_seen = first_sample  # over all ranks; prefetched samples do not count until the caller has them
        self.samples = Samples(dataset, config.seed, labelled and config.balance)
        self.labels = torch.from_numpy(dataset.labels.numbers) if labelled else None    # (N,), or None
        self.seed, self.hflip, self.shape = config.seed, config.hflip, PictureShape.of_config(config)
        self.batch_size, self.device = config.batch_size, device
        # CRUCIAL: this rank's rows of each part, not a part of its rows. So the parts of all ranks together are those
        # of one process, and meet the same random numbers and batch statistics.
        self.rows = np.arange(self.batch_size).reshape(config.accumulate, world_size, -1)[:, rank].reshape(-1)
        self.pin = device.type == "cuda"
        self._loaded = None  # all pictures, once they are on the device
        self._from_workers = None
        self._decoded = False
        self._use_decoded()
        readers = workers.readers(config)
        if readers > 0 and not self._decoded:
            loader = DataLoader(
                self.samples,
                batch_sampler=map(self._numbers, count(first_sample, config.batch_size)),
                num_workers=readers,
                collate_fn=workers.as_it_is,
                worker_init_fn=workers.start,
                pin_memory=self.pin,
                generator=torch.Generator(),  # the default draws from the global state: resuming would change the run
            )
            try:
                self._from_workers = iter(loader)
                workers.keep_deaths_for_next()
            except OSError as error:
                say(f"note: loader processes cannot be started ({error.strerror}): pictures are loaded in the training "
                    "process")
                return
            atexit.register(self.close)  # workers ignore SIGTERM and would keep a failed program from exiting

    def _numbers(self, start: int) -> list[int]:
        """Return this rank's sample numbers in the batch that starts at sample number `start`."""
        return (start + self.rows).tolist()

    def _use_decoded(self):
        """Once all pictures are decoded: stop the workers, and copy the pictures to the GPU if they fit."""
        dataset = self.samples.dataset
        size, memory = len(dataset) * self.shape.values, available_memory()     # 0: unknown
        # workers prefetch from a cache file that does not fit into memory
        if not dataset.is_decoded() or memory and size > memory // 2:
            return
        self._decoded = True
        self.close()
        if self.device.type == "cuda" and size < ON_DEVICE * torch.cuda.mem_get_info(self.device)[0]:
            self._loaded = load_to_device(dataset, self.device)

    def __iter__(self) -> Iterator[Batch]:
        return self

    def __next__(self) -> Batch:
        before, length = self.samples_seen, len(self.samples.dataset)
        if self._from_workers is None or self.labels is not None:       # workers look them up themselves
            indices = self.samples.indices(self._numbers(before))
        if self._loaded is not None:
            pictures = self._loaded[self._on_device(torch.tensor(indices))]
        elif self._from_workers is not None:
            pictures = self._on_device(self._receive())
        else:
            pictures = self._on_device(self.samples.fetch(indices))
        if self.hflip:
            coins = flip_coins(self.seed, before, self.batch_size)[self.rows]
            flipped = self._on_device(torch.from_numpy(coins))
            pictures = torch.where(flipped[:, None, None, None], pictures.flip(-1), pictures)
        self.samples_seen += self.batch_size
        if not self._decoded and before // length != self.samples_seen // length:
            self._use_decoded()  # an epoch has ended
        return Batch(to_images(pictures), None if self.labels is None else self._on_device(self.labels[indices]))

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """Copy `tensor` to the device asynchronously."""
        if self.pin and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _receive(self) -> torch.Tensor:
        try:
            pictures = next(self._from_workers)
        except workers.DEATHS as error:
            raise workers.death(error, self._from_workers) or error from None
        if isinstance(pictures, str):
            raise DataError(pictures)
        return pictures

    def close(self):
        """Stop the workers. A later `next` loads in this process."""
        if self._from_workers is None:
            return
        atexit.unregister(self.close)
        batches, self._from_workers = self._from_workers, None
        workers.stop(batches)


def load_to_device(dataset: ImageDataset, device: torch.device) -> torch.Tensor:
    """Return all pictures on the device, uint8 (N, C, H, W); copied in parts to save main memory."""
    pictures = torch.empty(len(dataset), *dataset[0].shape, dtype=torch.uint8, device=device)
    for part in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
        pictures[part[0]:part[-1] + 1] = dataset.load_batch(part).to(device)
    return pictures


def real_batches(
    config, dataset: ImageDataset, first_sample: int, device: torch.device | str, rank: int = 0,
    world_size: int = 1, labelled: bool = False
) -> RealBatches:
    """Return an endless iterator over Batches of batch_size / world_size images on `device`, `labelled` or not.

    Batch t holds the batch_size sample numbers from first_sample + t * batch_size on, in `--accumulate` parts; `rank`
    gets its contiguous share of each part. The last pictures of an epoch share a batch with the first of the next: no
    picture is dropped. Global random states stay as they are. `samples_seen` is the first_sample to resume with;
    `close()`, or the end of the program, stops the workers.
    """
    return RealBatches(config, dataset, first_sample, torch.device(device), rank, world_size, labelled)
