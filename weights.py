"""Files of published weights: where they are looked for, how they are fetched and told from others.

A file is only used if its sha256 is the published one, and read without running what it may hold.
"""

import hashlib
import http.client
import os
import pickle
import socket
from dataclasses import dataclass
from pathlib import Path

import torch

from distributed import is_first, say
from failures import DataError, UsageError

_TIMEOUT = 30                                           # seconds without a byte before a download is given up
# What torch.load raises on files that are damaged, or no tensors at all.
_DAMAGE = (EOFError, OSError, RuntimeError, pickle.UnpicklingError,
           KeyError, ValueError, TypeError, AttributeError)


@dataclass(frozen=True)
class Published:
    """A file of weights that others published, and the flag that takes its `word`, "random" or the path of a file.

    `net` is whose state dict it is; `folder` its name in download.sh and its folder below data/; `aliases` are other
    names that the same bytes go by.
    """

    flag: str
    word: str
    net: str
    folder: str
    name: str
    url: str
    sha256: str
    bytes: int
    aliases: tuple = ()

    def places(self):
        """Where it is looked for: where download.sh puts it, then where torch's own downloads go."""
        hub = Path(torch.hub.get_dir(), "checkpoints")
        return [parent / name for parent in (Path("data", self.folder), hub) for name in (self.name, *self.aliases)]

    def is_there(self, weights):
        """Whether `weights` can be loaded without a network, as far as names and sizes tell. False for "random", which
        is worth nothing.
        """
        if weights == self.word:
            return any(os.path.isfile(path) and os.path.getsize(path) == self.bytes for path in self.places())
        return weights != "random" and os.path.isfile(weights)

    def identity(self, weights):
        """What tells these weights from others: "random", or the hex sha256 of the file (of the published one it is
        known, so that it need not be there). Raises UsageError if a path cannot be read.
        """
        if weights in (self.word, "random"):
            return self.sha256 if weights == self.word else weights
        try:
            return sha256(weights)
        except OSError as error:
            raise self._unreadable(weights, error) from None

    def load(self, weights, otherwise):
        """The state dict that `weights`, the published file's word or a path, stand for. The published one is verified,
        and downloaded where it is nowhere, by every process that comes here. `otherwise` is the flag to go on without
        it. Raises UsageError where a path cannot be read, DataError where it holds no dict.
        """
        path = self._find(otherwise) if weights == self.word else Path(weights)
        try:
            loaded = torch.load(path, map_location="cpu", weights_only=True)
        except (FileNotFoundError, IsADirectoryError, PermissionError) as error:
            raise self._unreadable(weights, error) from None
        except _DAMAGE as error:
            raise DataError(f"{self.flag} {weights}: {path} holds no state dict that can be read "
                            f"({type(error).__name__})") from None
        if not isinstance(loaded, dict):
            raise DataError(f"{self.flag} {weights}: {path} holds a {type(loaded).__name__}, no state dict")
        return loaded

    def warn_of_random(self):
        """Says that random weights are for tests; whoever uses what came of such weights says so too."""
        say(f"{self.flag} random: {self.net} has random weights; that is for tests, use {self.word} for anything else")

    def _find(self, otherwise):
        """The path of the published file, verified."""
        there = [path for path in self.places() if os.path.isfile(path)]
        path = there[0] if there else self._download(otherwise)
        try:
            found = sha256(path)
        except OSError as error:
            raise DataError(f"{self.flag} {self.word}: cannot read {path} ({error.strerror})") from None
        if found != self.sha256:
            raise DataError(f"{self.flag} {self.word}: {path} is damaged or another file (sha256 {found}, expected "
                            f"{self.sha256}).\nDelete it and give the same command again, or fetch it with "
                            f"`bash download.sh {self.folder}`.")
        return path

    def _download(self, otherwise):
        usual = self.places()[0]
        path = Path(torch.hub.get_dir(), "checkpoints", self.name)
        say(f"{self.flag} {self.word}: fetching {self.name} ({self.bytes / 1e6:.0f} MB, once) into {path.parent}")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(_TIMEOUT)              # torch.hub sets none: silence would hold us for good
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256, progress=is_first())
        except (OSError, RuntimeError, http.client.HTTPException) as error:     # RuntimeError: another hash
            raise DataError(
                f"{self.flag} {self.word}: {self.name} is neither in {usual.parent} nor in {path.parent}, and "
                f"downloading it failed ({getattr(error, 'reason', None) or error}).\n"
                f"Fetch it with `bash download.sh {self.folder}`, or go on without it: {otherwise}."
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
        return path

    def _unreadable(self, weights, error):
        return UsageError(f"{self.flag} {weights}: cannot be read ({error.strerror}); give {self.word}, or the path "
                          f"of a state dict of {self.net}")


def sha256(path):
    """Hex digest of a file. Raises OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
