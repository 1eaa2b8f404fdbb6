"""What is computed once for all runs and kept below `--cache_path`, a file per origin.

A cache costs time when it is gone and nothing else, so a damaged one is made anew, and a disk that refuses is a word.
"""

import hashlib
import json
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist

import checkpoint
from distributed import say
from failures import CheckpointError, DataError
from utils import write_atomically


@dataclass(frozen=True)
class Cache:
    """One file: `kind`/<hash of origin>.pt in the folder `root`. `origin`, of str and numbers, is all that decides what
    the file holds: it is read only if it is of the same. `kind` is its name in what is said.
    """

    root: str
    kind: str
    origin: dict

    @property
    def path(self):
        key = hashlib.sha256(json.dumps(self.origin, sort_keys=True).encode()).hexdigest()
        return Path(self.root, self.kind, f"{key[:16]}.pt")

    def read(self, fits):
        """The dict that was written, or None if there is none that is whole, of this origin and `fits(dict)`; says why.
        """
        if not self.path.exists():
            return None
        try:
            kept = checkpoint.load(self.path)           # checks the file's checksums, too
        except CheckpointError as error:
            say(f"{self.kind}: the cache {error}; taking it anew")
            return None
        if not isinstance(kept, dict) or kept.get("origin") != self.origin or not fits(kept):
            say(f"{self.kind}: the cache {self.path} is of other pictures, weights or another program; "
                "taking it anew")
            return None
        return kept

    def write(self, values, needed=False):
        """Keep the dict `values`. Where the disk refuses, says so, or raises DataError if other processes need it."""
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(self.path, lambda temporary: torch.save({"origin": self.origin, **values}, temporary))
        except (OSError, RuntimeError) as error:        # a full disk comes as RuntimeError out of torch.save
            problem = f"cannot write {self.path} ({(str(error).splitlines() or [type(error).__name__])[0]})"
            if needed and dist.is_initialized():
                raise DataError(f"--cache_path: {problem}, from where the other processes read it; free some space, "
                                "or name another folder") from None
            say(f"{self.kind}: {problem}; going on without, and taking it again next time (--cache_path moves it)")
