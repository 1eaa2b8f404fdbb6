"""Notices a rank that was killed, stopped, or lost with its machine: the run then ends with one message that names it.

By itself a collective would wait for that rank for half an hour, or fail on every other rank with a traceback that
names none. Each rank counts once a second in the store through which torchrun's processes meet, from a thread, so that
long work of one rank is no silence, and follows the counts of the others.
"""

import hashlib
import json
import os
import signal
import socket
import sys
import threading
import time
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from pathlib import Path

import torch.distributed as dist

from device import console
from device.distributed import launched, world_size
from device.signals import Interrupted
from errors import TO_RESUME, Failure, LostRankError

BEAT = 1.0              # seconds between two counts
GRACE = 4.0             # seconds that a rank has to report by itself what it noticed, before the thread ends it
SILENT = 20.0           # seconds without a count after which a rank is lost
STARTING = 180.0        # the same before its first count: machines import at different speeds
AWAY = 5.0              # a beat that is late by so many seconds: this process itself was paused

_BROKEN = ("gloo", "NCCL", "Connection closed", "Connection reset")     # in torch's words for a broken connection
_running = None         # the Watch of this process


@dataclass
class _Peer:
    """What is known of another rank. `left` is None while it runs, then whether it ended well."""

    heard: float                        # when its count last changed
    count: int = -1
    pid: int | None = None
    host: str = "?"
    machine: str = ""
    left: bool | None = None
    died: float | None = None           # when it was first seen that its process is gone

    def name(self, rank):
        return f"rank {rank}" + (f" (process {self.pid} on {self.host})" if self.pid else "")


class Watch:
    """Follows the other ranks while its `with` block runs. Without torchrun, or with one process, it does nothing."""

    def __init__(self):
        self.rank, self.size = int(os.environ.get("RANK", "0")), world_size()
        now = time.monotonic()
        self.peers = {rank: _Peer(now) for rank in range(self.size) if rank != self.rank}
        self.answered = now             # when the store last answered
        self.store, self.parent = None, os.getppid() if launched() else None
        self.left = None                # whether this rank ended well, once it has
        self.leaving, self.ended, self.acting = threading.Event(), threading.Event(), threading.Lock()
        self.met = threading.Event()    # once the store was found, or not
        self.threads = [threading.Thread(target=work, daemon=True) for work in (self._beat, self._look)]

    def __enter__(self):
        global _running
        if self.size > 1:
            _running = self
            for thread in self.threads:
                thread.start()
        return self

    def __exit__(self, kind, error, _):
        global _running
        if self.size > 1:
            if isinstance(error, (Failure, OSError)) and not isinstance(error, LostRankError):
                error.silent = not self.claim(str(error))       # what all ranks meet is printed once
            _running = None
            self.left = kind is None
            self.leaving.set()
            if self.rank == 0 and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
                self._wait_for_others()         # the store, which tells them how this rank ended, ends with it
            self.ended.set()
            for thread in self.threads:
                thread.join(GRACE)

    def _wait_for_others(self):
        end = time.monotonic() + GRACE
        while time.monotonic() < end and any(peer.left is None and not peer.died for peer in self.peers.values()):
            time.sleep(BEAT / 20)

    # ---------------------------------------------------------------------------------------------- the counts

    def _beat(self):
        """Count, and read the others' counts, until the end."""
        names = {rank: f"watch/{_attempt()}/{rank}" for rank in range(self.size)}
        started = False                 # whether all ranks have counted
        try:
            self.store = dist.TCPStore(os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), is_master=False,
                                       wait_for_workers=False, timeout=timedelta(seconds=STARTING))
            self.met.set()
            for number in count():
                is_last = self.ended.is_set()
                me = [number, os.getpid(), socket.gethostname(), _machine(), self.left]
                self.store.set(names[self.rank], json.dumps(me))
                if is_last:
                    return
                # a process that is gone before its last words are read
                gone = self._gone()
                started = started or self.store.check(list(names.values()))
                present = [rank for rank in self.peers if started or self.store.check([names[rank]])]
                words = self.store.multi_get([names[rank] for rank in present]) if present else []
                for rank, text in zip(present, words, strict=True):
                    self._hear(self.peers[rank], *json.loads(text), rank in gone)
                self.answered = time.monotonic()
                if self.leaving.wait(BEAT):
                    self.ended.wait(BEAT / 20)
        except RuntimeError:
            self.store = None           # it is gone: `_look` ends the run, unless this process ends anyway
        finally:
            self.met.set()

    def _gone(self):
        """Return the ranks of this machine whose processes have ended."""
        return [rank for rank, peer in self.peers.items()
                if peer.machine == _machine() and peer.left is None and _is_gone(peer.pid)]

    @staticmethod
    def _hear(peer, number, pid, host, machine, left, is_gone):
        now = time.monotonic()
        if number != peer.count:
            peer.heard = now
        peer.count, peer.pid, peer.host, peer.machine, peer.left = number, pid, host, machine, left
        if is_gone and left is None and peer.died is None:
            peer.died = now

    # ------------------------------------------------------------------------------------------- what follows

    def lost(self):
        """Return the ranks that are lost."""
        now = time.monotonic()
        if self.store is None:
            for rank in self._gone():
                self.peers[rank].died = self.peers[rank].died or now    # and the store ended with it
        died = [rank for rank, peer in self.peers.items() if peer.died]
        if not died and now - self.answered > SILENT:
            return [0] if self.rank else []     # the store is on the machine of rank 0
        return [rank for rank, peer in self.peers.items() if peer.left is None and (
            peer.died or now - peer.heard > (SILENT if peer.pid else STARTING))]

    def failed(self):
        """Return the ranks that ended by an error of their own, which they have printed."""
        return [rank for rank, peer in self.peers.items() if peer.left is False]

    def _look(self):
        """End this process if another rank is lost and its main thread, inside a collective, does not notice."""
        last, noticed = time.monotonic(), None
        while not self.leaving.wait(BEAT):
            last, before = time.monotonic(), last
            if last - before > BEAT + AWAY:
                self._forget_silence(last)
            if self.parent is not None and os.getppid() != self.parent:
                self._stop_without_launcher()
                return
            lost = self.lost()
            noticed = (noticed or last) if lost or self.failed() else None
            silent = any(last - self.peers[rank].heard > SILENT for rank in lost)
            if noticed and (silent or last - noticed > GRACE) and self.acting.acquire(blocking=False):
                if lost and self.claim("a lost rank"):
                    print(file=sys.stderr)      # below the progress bar
                    console.report(self._message(lost))
                sys.stderr.flush()
                os._exit(LostRankError.code)    # the main thread hangs in a collective and can end nothing

    def _forget_silence(self, now):
        """Restart all timers: whoever paused this process may have paused the others, too."""
        self.answered = now
        for peer in self.peers.values():
            peer.heard = now

    def _stop_without_launcher(self):
        """Save and end as after `kill`: without torchrun nobody would know of a run that holds GPUs and folders."""
        if not self.rank:
            print("\nnote: torchrun is gone: the run saves and ends", file=sys.stderr, flush=True)
        signal.raise_signal(signal.SIGTERM)

    def _message(self, lost):
        names = [self.peers[rank].name(rank) for rank in lost]
        peers = [self.peers[rank] for rank in lost]
        if any(peer.died for peer in peers):
            what = "was killed, perhaps for want of memory (see dmesg)"
        elif any(peer.machine == _machine() for peer in peers):
            what = f"is stopped or hangs: no sign of it for {SILENT:.0f} s"
        else:
            what = f"was killed or stopped, or its machine is gone: no sign of it for {SILENT:.0f} s"
        return f"{', '.join(names)} {what}.\nRun {TO_RESUME}."

    def explain(self, seconds):
        """Return the LostRankError for what happened just now, as soon as it is known; None after so many seconds."""
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            if failed := self.failed():
                error = LostRankError(f"rank {failed[0]} has ended")
                error.silent = True     # that rank has said why
                return error
            if lost := self.lost():
                error = LostRankError(self._message(lost))
                error.silent = not self.claim("a lost rank")
                return error
            time.sleep(BEAT / 5)
        return None

    def claim(self, what):
        """Return whether this rank is the first to claim `what`; True if the store does not answer."""
        self.met.wait(AWAY)
        if self.store is None or time.monotonic() - self.answered > AWAY:
            return True
        try:
            return self.store.add(f"claim/{_attempt()}/{hashlib.sha256(what.encode()).hexdigest()}", 1) == 1
        except RuntimeError:
            return True


def take_over():
    """Leave it to the main thread to end this process, which may take a while."""
    if _running is not None:
        _running.acting.acquire(blocking=False)


@contextmanager
def not_ended():
    """In this block the loss of another rank does not end this process: a checkpoint would be cut off."""
    acting = _running and _running.acting
    held = acting is not None and acting.acquire(blocking=False)
    try:
        yield
    finally:
        if held:
            acting.release()


def claim(what):
    """Return whether this rank is the first to claim the text `what`; always True with one process."""
    return _running is None or _running.claim(what)


def lost_rank(error):
    """Return the LostRankError behind a broken collective or torchrun's request to end; None for other errors.

    It may take SILENT seconds to know.
    """
    is_request = isinstance(error, Interrupted)
    is_broken = isinstance(error, dist.DistError) or any(word in str(error) for word in _BROKEN)
    if _running is None or not (is_request or is_broken):
        return None
    take_over()
    seconds = 2 * BEAT if is_request else SILENT + GRACE
    try:
        return _running.explain(seconds)
    except Interrupted:                 # torchrun asks the other ranks to end when one is lost
        return _running.explain(seconds)


def _attempt():
    """Return the number of torchrun's restarts, through which its store stays."""
    return os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")


def _machine():
    """Return a text that is the same for processes that see each other's process numbers."""
    try:
        return f"{socket.gethostname()} {os.stat('/proc/self/ns/pid').st_ino}"
    except OSError:
        return f"unknown to {os.environ.get('RANK')}"


def _is_gone(pid):
    """Return whether this process of this machine has ended."""
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except FileNotFoundError:
        return True
    return state in "ZX"
