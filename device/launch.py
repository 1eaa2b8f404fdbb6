"""`--parallel true`: what torchrun does on one machine, without its report of 40 lines for every failure."""

import logging
import os
import sys
import uuid

import torch


def on_every_gpu(script, argv):
    """Run `script` with these arguments in one process per visible GPU. Return the exit code."""
    return run(torch.cuda.device_count(), script, argv)


def run(count, script, argv):
    """Run `script` with these arguments in `count` processes of one run. Return the exit code of the first to fail."""
    # late: they take half a second
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    logging.getLogger("torch.distributed").setLevel(logging.CRITICAL)   # the processes say themselves what is wrong
    os.environ.setdefault("OMP_NUM_THREADS", "1")                       # as torchrun does
    config = LaunchConfig(1, 1, count, run_id=uuid.uuid4().hex, rdzv_backend="c10d", rdzv_endpoint="localhost:0",
                          max_restarts=0)
    sys.stdout.flush()
    try:
        elastic_launch(config, sys.executable)("-u", script, *argv)
    except SignalException as error:
        return 128 + error.sigval
    except ChildFailedError as error:
        return exit_code(error.failures.values())
    return 0


def exit_code(failures):
    """Return the first exit code that a process gave itself; without one, 128 + the first signal that killed one."""
    codes = [failure.exitcode for failure in sorted(failures, key=lambda failure: failure.timestamp)]
    return next((code for code in codes if code > 0), 128 - codes[0])
