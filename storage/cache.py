"""Caches below `--cache_path`: results computed once for all runs, one file for each origin.

Losing a cache only costs time: a damaged or stale one is recomputed, and a failed write is only reported.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch

from device.distributed import is_alone, say
from errors import CheckpointError, DataError, first_line
from storage import checkpoint
from utils import write_atomically


@dataclass(frozen=True)
class Cache:
    """One cache file, `root`/`kind`/<hash of origin>.pt.

    `origin`, of str and numbers, is everything that the contents depend on: the file is read only if its origin is the
    same. `kind` also names the cache in messages.
    """

    root: str
    kind: str
    origin: dict

    @property
    def path(self):
        key = hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode()).hexdigest()
        return Path(self.root, self.kind, f"{key[:16]}.pt")

    def read(self, fits):
        """Return the dict that was written. Return None, after saying why, if the file is damaged or stale (another
        origin, or not `fits(dict)`). Return None silently if there is no file.
        """
        if not self.path.exists():
            return None
        try:
            cached = checkpoint.load(self.path)         # verifies checksums
        except CheckpointError as error:
            say(f"{self.kind}: the cache {error}; recomputing it")
            return None
        if not isinstance(cached, dict) or cached.get("origin") != self.origin or not fits(cached):
            say(f"{self.kind}: the cache {self.path} is stale (other pictures, weights or program version); "
                "recomputing it")
            return None
        return cached

    def write(self, values, needed=False):
        """Write the dict `values`. If that fails, say so; raise DataError if `needed` by the other ranks."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda temporary: torch.save({"origin": self.origin, **values}, temporary))
        except (OSError, RuntimeError) as error:        # torch.save raises RuntimeError when the disk is full
            problem = f"cannot write {self.path} ({first_line(error)})"
            if needed and not is_alone():
                raise DataError(f"--cache_path: {problem}, which the other processes have to read; free some space, "
                                "or choose another folder") from None
            say(f"{self.kind}: {problem}; the next run will compute it again (--cache_path chooses another folder)")
