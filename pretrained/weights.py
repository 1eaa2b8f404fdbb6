"""Files of published weights: search paths, download, verification.

A published file is used only if its sha256 is the expected one. All files are loaded with `weights_only=True`, so that
no code in them is run.
"""

import hashlib
import http.client
import os
import pickle
import socket
import struct
import zlib
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch

from device.distributed import after_first, is_first, say
from errors import DataError, UsageError
from utils import new_folders

TIMEOUT = 30                                            # seconds without data after which a download is aborted
# What torch.load raises on files that are damaged or hold no tensors.
_DAMAGE_ERRORS = (EOFError, OSError, RuntimeError, pickle.UnpicklingError, LookupError, ValueError, TypeError,
                  AttributeError, struct.error, zlib.error)


@dataclass(frozen=True)
class Published:
    """A published file of weights, and the flag that selects it.

    `flag` takes `word` (this file), "random" or a path. `net` names the network of the state dict; `folder` is its name
    in download.sh and its folder in data/, None if download.sh does not fetch it; `aliases` are other file names of the
    same file.
    """

    flag: str
    word: str
    net: str
    folder: str | None
    name: str
    url: str
    sha256: str
    bytes: int
    aliases: tuple = ()

    def places(self):
        """Return the paths to search: where download.sh puts the file, then torch.hub's checkpoints folder."""
        hub = Path(torch.hub.get_dir(), "checkpoints")
        parents = (Path("data", self.folder), hub) if self.folder else (hub,)
        return [parent / name for parent in parents for name in (self.name, *self.aliases)]

    def how_to_fetch(self):
        """Return in words how to fetch the file by hand."""
        if self.folder:
            return f"fetch it with `bash download.sh {self.folder}`"
        return f"save {self.url} there under that name"

    def is_available(self, weights):
        """Return whether `weights` can be loaded without a download, judged by file name and, for the published file,
        size. False for "random", whose features are meaningless.
        """
        if weights == self.word:
            return any(os.path.isfile(path) and os.path.getsize(path) == self.bytes for path in self.places())
        return weights != "random" and os.path.isfile(weights)

    def identity(self, weights):
        """Return what identifies these weights: "random", or the hex sha256 of the file (for the published file the
        known one, without reading it). Raise UsageError if a path cannot be read.
        """
        if weights in (self.word, "random"):
            return self.sha256 if weights == self.word else weights
        try:
            return sha256(weights)
        except OSError as error:
            raise self._unreadable(weights, error) from None

    def in_words(self, weights, published, random, other):
        """Return the text that applies to `weights`, with `{}` replaced by the first 8 digits of the sha256."""
        identity = self.identity(weights)
        return {self.sha256: published, "random": random}.get(identity, other).format(identity[:8])

    def require(self, weights, fallback_hint):
        """Raise what `load` raises for a file that is missing, cannot be read or, if published, is damaged.

        A missing published file is downloaded. All ranks must call this: rank 0 downloads it for its machine.
        """
        def find():
            if weights == self.word:
                self.find(fallback_hint)
            elif weights != "random":
                self._open(weights).close()

        after_first(find, find)

    def load(self, weights, fallback_hint):
        """Return the state dict of `weights`: `word` or a path. The published file is verified; if missing, it is
        downloaded, by every process that calls this. `fallback_hint` is the flag to do without it, for error messages.

        Raise UsageError if a path cannot be read; DataError if the file holds no state dict, or if the published file
        is damaged or cannot be downloaded.
        """
        path = self.find(fallback_hint) if weights == self.word else Path(weights)
        with self._open(path) as file:
            try:
                loaded = torch.load(file, map_location="cpu", weights_only=True)
            except _DAMAGE_ERRORS as error:
                raise DataError(f"{self.flag} {weights}: {path} holds no state dict that can be read "
                                f"({type(error).__name__})") from None
        if not isinstance(loaded, dict):
            raise DataError(f"{self.flag} {weights}: {path} holds a {type(loaded).__name__}, not a state dict")
        return loaded

    def warn_of_random(self):
        """Warn that random weights are for tests only."""
        say(f"{self.flag} random: {self.net} has random weights, for tests only; use {self.word} for anything else")

    def find(self, fallback_hint):
        """Return the path of the published file, verified; every process that calls this downloads it if it is missing.
        Raise DataError.
        """
        existing = [path for path in self.places() if os.path.isfile(path)]
        path = existing[0] if existing else self._download(fallback_hint)
        try:
            file = os.stat(path)
            actual = _known_sha256(os.path.abspath(path), file.st_ino, file.st_size, file.st_mtime_ns)
        except OSError as error:
            raise DataError(f"{self.flag} {self.word}: cannot read {path} ({error.strerror})") from None
        if actual != self.sha256:
            raise DataError(f"{self.flag} {self.word}: {path} is damaged or another file (sha256 {actual}, expected "
                            f"{self.sha256}).\nDelete it and run the same command again, or {self.how_to_fetch()}.")
        return path

    def _download(self, fallback_hint):
        path = Path(torch.hub.get_dir(), "checkpoints", self.name)
        say(f"{self.flag} {self.word}: fetching {self.name} ({self.bytes / 1e6:.0f} MB, once) into {path.parent}")
        timeout = socket.getdefaulttimeout()
        socket.setdefaulttimeout(TIMEOUT)              # torch.hub sets none: a stalled connection would hang forever
        try:
            with new_folders(path.parent):
                torch.hub.download_url_to_file(self.url, str(path), hash_prefix=self.sha256, progress=is_first())
        except (OSError, RuntimeError, http.client.HTTPException) as error:     # RuntimeError: wrong hash
            raise DataError(
                f"{self.flag} {self.word}: {self.name} is neither in "
                f"{' nor in '.join(dict.fromkeys(str(place.parent) for place in self.places()))}, and downloading it "
                f"failed ({getattr(error, 'reason', None) or error}).\n"
                f"Either {self.how_to_fetch()}, or do without it: {fallback_hint}."
            ) from None
        finally:
            socket.setdefaulttimeout(timeout)
        return path

    def _open(self, weights):
        try:
            return open(weights, "rb")
        except OSError as error:
            raise self._unreadable(weights, error) from None

    def _unreadable(self, weights, error):
        return UsageError(f"{self.flag} {weights}: cannot be read ({error.strerror}); give {self.word}, or the path "
                          f"of a state dict of {self.net}")


@lru_cache
def _known_sha256(path, *version):
    """`sha256`, computed once for each version of a file: VGG-16's takes a second, and several parts load it."""
    return sha256(path)


def sha256(path):
    """Return the hex sha256 digest of a file. Raise OSError."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
