"""Worker processes of DataLoaders: their number, start and termination; a function mapped over all cores."""

import contextlib
import multiprocessing.connection
import os
import shutil
import signal
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from torch.utils.data import DataLoader, Dataset

from device.distributed import on_this_machine, progress, say, world_size
from errors import DataError, first_line
from flags.pictures import PictureShape

MOST = 8        # workers per process with --num_workers auto, at most
BATCHES = 3     # that a worker holds in shared memory, at most: two prefetched, one in transit
NO_MEMORY = ("use --num_workers 0, a smaller --batch_size, or more shared memory (/dev/shm; of a container: docker run "
             "--shm-size=1g)")
CONTAINER = Path("/sys/fs/cgroup")  # where a container has its limits (cgroup v2); elsewhere there are no such files


def cores() -> int:
    """Return the number of CPU cores that this process may use."""
    try:
        count = len(os.sched_getaffinity(0))
    except AttributeError:  # exists on Linux only
        count = os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):  # ValueError: it is "max", no limit
        quota, period = map(int, (CONTAINER / "cpu.max").read_text().split())
        count = min(count, max(1, -(-quota // period)))
    return count


def shared_memory() -> int:
    """Return the free bytes of shared memory. A container may have 64 MB; writing beyond that is a bus error."""
    return shutil.disk_usage("/dev/shm").free if os.path.isdir("/dev/shm") else sys.maxsize


def readers(config) -> int:
    """Return the number of DataLoader workers per rank, 0 for none; say so if shared memory holds too few batches.

    `--num_workers auto`: one per core, at most MOST, and no more than fit into half of the shared memory, but one if it
    fits at all.
    """
    processes = on_this_machine()
    batch = config.batch_size // world_size() * PictureShape.of_config(config).values      # bytes
    free = shared_memory() // processes
    fitting = free // (BATCHES * batch)
    if config.num_workers == "auto":
        wanted = max(1, min(MOST, cores() // processes, free // 2 // (BATCHES * batch)))
    else:
        wanted = config.num_workers
    if wanted <= fitting:
        return wanted
    where = f"by {fitting} loader process{'es' * (fitting > 1)}" if fitting else "in the training process"
    say(f"note: pictures are loaded {where}: the {free * processes / 2**20:.0f} MiB of shared memory (/dev/shm) are "
        f"too little for {wanted}; of a container: docker run --shm-size=1g")
    return fitting


def start(worker: int):
    """`worker_init_fn` of our DataLoaders: ignore SIGTERM and SIGINT, use one thread."""
    # The process group's signals are for the main process, which needs its workers to finish the current step.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    torch.set_num_threads(1)


def as_it_is(batch):
    """`collate_fn` that returns the data set's batch unchanged."""
    return batch


def keep_deaths_for_next():
    """Let only the next batch raise that a worker died, up to five seconds later.

    CRUCIAL: PyTorch would raise it from its handler of SIGCHLD, and so in the middle of a step, which cannot be saved.
    """
    if hasattr(signal, "SIGCHLD") and threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)


# What `next` raises when a worker died: PyTorch's own error, or, where a batch was on its way, one of the connection.
DEATHS = (RuntimeError, OSError, EOFError)


def death(error: Exception, batches=None) -> DataError | None:
    """Return a DataError if `error` is due to the death of a DataLoader worker, else None. `batches`: its iterator.

    PyTorch can raise its error in the main thread from a signal handler, so it can occur anywhere in the program.
    """
    if _is_death(error, batches):
        no_memory = "bus error" in str(error).lower() or any(
            process.exitcode == -getattr(signal, "SIGBUS", 0) for process in getattr(batches, "_workers", ()))
        hint = NO_MEMORY if no_memory else "use fewer workers, or --num_workers 0"
        return DataError(f"--num_workers: {first_line(error)}\n{hint}")
    return None


def _is_death(error: Exception, batches) -> bool:
    broken = batches is not None and isinstance(error, (OSError, EOFError))
    return str(error).startswith("DataLoader worker") or (broken and _one_died(batches))


def _one_died(batches) -> bool:
    """Return whether a worker of a DataLoader's iterator dies within a second."""
    ended = multiprocessing.connection.wait([process.sentinel for process in batches._workers], 1)
    for process in batches._workers:
        if process.sentinel in ended:
            process.join()
    return any(process.exitcode for process in batches._workers)


def stop(batches):
    """Stop the workers of a DataLoader's iterator.

    Its destructor does so too, but a traceback may keep the iterator alive; and since workers ignore SIGTERM, they
    would keep a failed program from ending.
    """
    try:
        batches._shutdown_workers()
    except RuntimeError as error:
        if death(error) is None:
            raise
        for process in batches._workers:  # a worker died during the shutdown: PyTorch did not stop the others
            process.join(10)
            process.kill()
            process.join()


class _Task(Dataset):
    def __init__(self, work: Callable[[Sequence[int]], list]):
        self.work = work

    def __getitems__(self, indices: Sequence[int]) -> list:
        return self.work(indices)


def spread(work: Callable[[Sequence[int]], list], indices: Sequence[int], chunk: int, what: str) -> Iterator:
    """Map `work` over chunks of `indices` with one process per core; yield the results one by one, in order.

    `work(indices of a chunk)` returns a list with one result per index, and must be picklable. `chunk` is the number of
    indices per call, `what` the label of the progress bar. A single chunk is computed in this process, and so is the
    rest if a worker is killed. Raises what `work` raises, and DataError if a worker crashes.
    """
    chunks = [indices[start:start + chunk] for start in range(0, len(indices), chunk)]
    if len(chunks) <= 1:
        for part in chunks:
            yield from work(part)
        return
    loader = DataLoader(
        _Task(work), batch_sampler=chunks, num_workers=min(cores(), len(chunks)), collate_fn=as_it_is,
        worker_init_fn=start, prefetch_factor=4,
        generator=torch.Generator(),  # else the DataLoader draws from the global one, and the check would alter the run
    )
    try:
        batches = iter(loader)
        keep_deaths_for_next()
    except OSError:  # no shared memory at all, or no more processes
        for part in chunks:
            yield from work(part)
        return
    finished = 0
    with progress(len(indices), "picture", what) as done:
        try:
            for results in batches:
                yield from results
                done.update(len(results))
                finished += 1
        except DEATHS as error:
            if not _is_death(error, batches):
                raise
            _say_killed(batches, what)
        finally:
            stop(batches)
        for part in chunks[finished:]:
            results = work(part)
            yield from results
            done.update(len(results))


def _say_killed(batches, what: str):
    """Say that this process does the rest of a `spread`. Raise DataError if a worker was not killed, but crashed: this
    process would crash at the same picture.
    """
    codes = {process.exitcode for process in batches._workers} - {None, 0}
    if -getattr(signal, "SIGBUS", 0) in codes:
        raise DataError(f"a process had no shared memory left while {what} pictures\n{NO_MEMORY}")
    if not codes <= {-getattr(signal, "SIGKILL", 0)}:
        raise DataError(f"--check_data: a process crashed while {what} pictures (exit code {min(codes)}), most likely "
                        "over one of them\nuse --check_data off, or update pillow")
    say(f"note: a process was killed while {what} pictures, most often for lack of memory: this one does the rest "
        "alone; if it is killed, too, use a smaller --max_pixels")
