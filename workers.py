"""Loader processes: how they start, how they die, and a task spread over as many as there are cores."""

import os
import shutil
import signal
import sys
from collections.abc import Callable, Iterator, Sequence

import torch
from torch.utils.data import DataLoader, Dataset

from distributed import on_this_machine, progress
from failures import DataError

MOST = 8        # loader processes by default
BATCHES = 3     # that each holds at the most: two made ahead, one on its way


def cores() -> int:
    """How many processors this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # Linux alone tells
        return os.cpu_count() or 1


def shared_memory() -> int:
    """Bytes free for what processes share: a container may have 64 MB, and writing past that is a bus error."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize


def readers(config) -> int:
    """How many loader processes each process of this run has.

    `--num_workers auto`: one for each core, at most MOST, and no more than shared memory has room for.
    """
    if config.num_workers != "auto":
        return config.num_workers
    processes = on_this_machine()
    batch = config.batch_size // processes * 3 * config.imsize**2       # bytes, at the most
    room = shared_memory() // 2 // processes // (BATCHES * batch)
    return max(1, min(MOST, cores() // processes, room))


def start(worker: int):
    """What each process does first, as a DataLoader's `worker_init_fn`."""
    # A signal to the process group is meant for the main process, which needs its workers to finish the step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def as_it_is(batch):
    """A DataLoader's `collate_fn` that leaves what came from the data set alone."""
    return batch


def death(error: RuntimeError) -> DataError | None:
    """The DataError for a loader process that died, None for any other error.

    torch raises it in the main thread wherever that happens to be, not only where batches are awaited.
    """
    if str(error).startswith("DataLoader worker"):
        return DataError(f"--num_workers: {error}\nuse fewer workers, or --num_workers 0")
    return None


def stop(batches):
    """End the processes of a DataLoader's iterator.

    Its destructor would do, but for tracebacks that keep it alive; and processes that are deaf to SIGTERM would keep a
    failed program from ending.
    """
    try:
        batches._shutdown_workers()
    except RuntimeError as error:
        if death(error) is None:
            raise
        for process in batches._workers:  # one died in the middle of this: torch gave up on the others
            process.join(10)
            process.kill()
            process.join()


class _Task(Dataset):
    def __init__(self, work: Callable[[Sequence[int]], list]):
        self.work = work

    def __getitems__(self, indices: Sequence[int]) -> list:
        return self.work(indices)


def spread(work: Callable[[Sequence[int]], list], indices: Sequence[int], chunk: int, what: str) -> Iterator:
    """What `work(some of the indices)` -> list gives for all of them, one by one and in order, from a process for each
    core; `chunk` indices at a time, with a progress bar called `what`. `work` must pickle.

    A single chunk is done in this process. Raises what `work` raises, and DataError where a process dies.
    """
    chunks = [indices[start:start + chunk] for start in range(0, len(indices), chunk)]
    if len(chunks) <= 1:
        for part in chunks:
            yield from work(part)
        return
    loader = DataLoader(
        _Task(work), batch_sampler=chunks, num_workers=min(cores(), len(chunks)), collate_fn=as_it_is,
        worker_init_fn=start, prefetch_factor=4,
        generator=torch.Generator(),  # or it draws from the global one, and checking changes the run
    )
    batches = iter(loader)
    with progress(len(indices), "picture", what) as done:
        try:
            for results in batches:
                yield from results
                done.update(len(results))
        except RuntimeError as error:
            raise death(error) or error from None
        finally:
            stop(batches)
