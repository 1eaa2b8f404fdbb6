"""Real pictures for training: opened, checked, cached, and sampled so that a run can go on exactly.

Training walks through sample numbers 0, 1, 2, ... over the whole life of a run: which picture number n shows, and
whether it is mirrored, follows from the seed and n alone. So one integer in a checkpoint is enough to go on exactly,
whatever --num_workers is, and wherever the pictures come from.
"""

import atexit
from collections.abc import Iterator
from functools import lru_cache
from itertools import count

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

import workers
from check_data import usable
from datasets import DATASETS, Pictures, split
from decode import UnusablePicture
from decoded import available_memory, cached
from failures import DataError

RESIDENT = 1 / 8  # of a GPU's free memory that the pictures may take


def open_dataset(config) -> Pictures:
    """The data set that `config` names, whole, less what cannot be used: `len()`, and `[index]` -> uint8
    (3, imsize, imsize). All processes must call this.

    Raises DataError where it is missing or unreadable, CheckpointError where `--cache on` meets a disk that refuses.
    """
    dataset = DATASETS[config.dataset](config)
    return usable(dataset, cached(dataset, config), config)


def build_dataset(config) -> Pictures:
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
    return dataset


def describe(dataset: Pictures, config) -> str:
    """One line on what is trained on, such as `folder: 756 pictures in data/vangogh`."""
    return f"{config.dataset}: {dataset.summary}"


def normalize(pictures: torch.Tensor) -> torch.Tensor:
    """uint8 0..255 -> float32 in [-1, 1], same shape and device."""
    return pictures.float().div_(127.5).sub_(1)


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
    """Sample numbers -> pictures, not yet mirrored; each worker process gets a copy of this."""

    def __init__(self, dataset: Pictures, seed: int):
        self.dataset, self.seed = dataset, seed

    def indices(self, numbers: range) -> list[int]:
        """Which picture each of these sample numbers shows."""
        length = len(self.dataset)
        return [int(epoch_order(self.seed, n // length, length)[n % length]) for n in numbers]

    def fetch(self, numbers: range) -> torch.Tensor:
        """uint8 (len(numbers), 3, imsize, imsize). Raises DataError at an unreadable picture."""
        try:
            return self.dataset.gather(self.indices(numbers))
        except UnusablePicture as error:
            raise DataError(f"{error}\n`--check_data full` finds all such pictures before training") from None

    def __getitems__(self, numbers: range) -> torch.Tensor | str:
        """`fetch` for a worker. An error leaves as text: torch would add the worker's traceback to it."""
        try:
            return self.fetch(numbers)
        except DataError as error:
            return str(error)


class RealBatches:
    """Endless iterator over batches of real pictures; `real_batches` builds it and says what they are.

    Pictures that need no decoding any more come without workers: from the device, if it is a GPU that can hold all of
    them, else from memory or the cache's file.
    """

    def __init__(self, config, dataset: Pictures, first_sample: int, device: torch.device, rank, world):
        self.samples_seen = first_sample  # by the caller, over all ranks; prefetched ones do not count
        self.samples = Samples(dataset, config.seed)
        self.seed, self.hflip, self.imsize = config.seed, config.hflip, config.imsize
        self.batch_size, self.device, self.rank, self.world = config.batch_size, device, rank, world
        self.pin = device.type == "cuda"
        self._resident = None  # all pictures, on the device
        self._from_workers = None
        self._decoded = False
        self._look_again()
        readers = workers.readers(config)
        if readers > 0 and not self._decoded:
            loader = DataLoader(
                self.samples,
                batch_sampler=map(self._numbers, count(first_sample, config.batch_size)),
                num_workers=readers,
                collate_fn=workers.as_it_is,
                worker_init_fn=workers.start,
                pin_memory=self.pin,
                generator=torch.Generator(),  # or it draws from the global one, and resuming changes the run
            )
            self._from_workers = iter(loader)
            atexit.register(self.close)  # deaf to SIGTERM, they would keep a failed program from ending

    def _numbers(self, start: int) -> range:
        """This rank's share of the batch that begins with sample number `start`."""
        share = self.batch_size // self.world
        return range(start + self.rank * share, start + (self.rank + 1) * share)

    def _look_again(self):
        """Whether the pictures are all decoded by now, and then where to take them from."""
        dataset = self.samples.dataset
        size = len(dataset) * 3 * self.imsize**2
        # a file that does not fit into memory is read by workers, ahead of time
        if not dataset.decoded() or size > available_memory() // 2:
            return
        self._decoded = True
        self.close()
        if self.device.type == "cuda" and size < RESIDENT * torch.cuda.mem_get_info(self.device)[0]:
            self._resident = resident(dataset, self.imsize, self.device)

    def __iter__(self) -> Iterator[torch.Tensor]:
        return self

    def __next__(self) -> torch.Tensor:
        before, length = self.samples_seen, len(self.samples.dataset)
        numbers = self._numbers(before)
        if self._resident is not None:
            pictures = self._resident[self._on_device(torch.tensor(self.samples.indices(numbers)))]
        elif self._from_workers is not None:
            pictures = self._on_device(self._receive())
        else:
            pictures = self._on_device(self.samples.fetch(numbers))
        if self.hflip:
            flipped = self._on_device(torch.from_numpy(flip_coins(self.seed, numbers)))
            pictures = torch.where(flipped[:, None, None, None], pictures.flip(-1), pictures)
        self.samples_seen += self.batch_size
        if not self._decoded and before // length != self.samples_seen // length:
            self._look_again()  # an epoch has ended
        return normalize(pictures)

    def _on_device(self, tensor: torch.Tensor) -> torch.Tensor:
        """`tensor` on the device, without waiting for it."""
        if self.pin and not tensor.is_pinned():
            tensor = tensor.pin_memory()
        return tensor.to(self.device, non_blocking=True)

    def _receive(self) -> torch.Tensor:
        try:
            pictures = next(self._from_workers)
        except RuntimeError as error:
            raise workers.death(error) or error from None
        if isinstance(pictures, str):
            raise DataError(pictures)
        return pictures

    def close(self):
        """Stops the workers. A later `next` goes on in this process."""
        if self._from_workers is None:
            return
        atexit.unregister(self.close)
        batches, self._from_workers = self._from_workers, None
        workers.stop(batches)


def resident(dataset: Pictures, imsize: int, device: torch.device) -> torch.Tensor:
    """All pictures on the device, uint8 (N, 3, imsize, imsize), copied in parts: no second copy in main memory."""
    pictures = torch.empty(len(dataset), 3, imsize, imsize, dtype=torch.uint8, device=device)
    for part in np.array_split(np.arange(len(dataset)), -(-len(dataset) // 1024)):
        pictures[part[0]:part[-1] + 1] = dataset.gather(part).to(device)
    return pictures


def real_batches(
    config, dataset: Pictures, first_sample: int, device: torch.device | str, rank: int = 0, world: int = 1
) -> RealBatches:
    """Endless iterator over float32 (batch_size / world, 3, imsize, imsize) in [-1, 1] on `device`.

    Batch t shows the sample numbers from first_sample + t * batch_size on, of which `rank` gets its
    contiguous share. What an epoch leaves over opens the next one's first batch: no picture is dropped.
    Global random states stay as they are. `samples_seen` is the first_sample to go on with; `close()` ends
    the workers, and so does the end of the program.
    """
    return RealBatches(config, dataset, first_sample, torch.device(device), rank, world)
