"""Find the picture files below a folder, and what else is there: ignored files, odd files, folders of runs."""

import errno
import os
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path

from dataset.decode import SUFFIXES, printable
from errors import DataError

NAMED = 10  # files listed in a message, at most
_PAGE = b'<script type="application/json" id="summary">'  # near the beginning of every page of the gallery


@dataclass
class Found:
    """What is below `folder`: the sorted `paths` of the pictures; the number of `ignored` files of each ending;
    {path: reason} of what was `left_out`, such as links to nothing; folders that runs write to, in `own`.
    """

    folder: str
    paths: list = field(default_factory=list)
    ignored: Counter = field(default_factory=Counter)
    left_out: dict = field(default_factory=dict)
    own: list = field(default_factory=list)

    def lines(self) -> list[str]:
        """Return what a user should know about this folder besides the number of pictures, one line each."""
        lines = []
        if self.ignored:
            lines.append(f"pictures: {self.kinds()}")
        if self.left_out:
            odd = [f"{printable(path)}: {reason}" for path, reason in self.left_out.items()]
            more = f"\n  and {len(odd) - NAMED} more" if len(odd) > NAMED else ""
            lines.append(f"pictures: {len(odd)} left out:\n  " + "\n  ".join(odd[:NAMED]) + more)
        if self.own:
            own = [printable(os.path.relpath(path, self.folder)) for path in self.own]
            more = f" and {len(own) - NAMED} more" if len(own) > NAMED else ""
            lines.append(f"pictures: folders that runs write to are not read: {', '.join(own[:NAMED])}{more}")
        return lines

    def kinds(self) -> str:
        """Return the ignored files in words: `40 files ignored: 30 .heic, 10 .mp4`."""
        count, shown = self.ignored.total(), sorted(self.ignored.items(), key=lambda kind: (-kind[1], kind[0]))
        kinds = [f"{number} {printable(ending) or 'without an ending'}" for ending, number in shown[:NAMED]]
        rest = sum(number for _, number in shown[NAMED:])
        kinds += [f"{rest} of other endings"] * bool(rest)
        return f"{count} file{'s' * (count > 1)} ignored: {', '.join(kinds)}"


def find_pictures(folder: Path, own: dict | None = None) -> Found:
    """Return what is below `folder`, links to folders included; hidden files and folders are skipped.

    `own` {real path: anything} are folders that the run writes to: they are not searched, nor are the folders of other
    runs. `folder` itself always is. Raise DataError if there are no pictures.
    """
    if not os.path.isdir(folder):
        raise DataError(f"{printable(folder)} is a file" if os.path.exists(folder) else
                        f"there is no folder {printable(folder)}")
    found, own = Found(str(folder)), own or {}
    seen, folders = {os.path.realpath(folder)}, [found.folder]
    while folders:
        inside = _list(folders.pop(), found, bool(own))  # {real path: path} of the folders in this one
        found.own += [path for real, path in inside.items() if real in own]
        # no folder twice, and so no loops of links
        folders += reversed([path for real, path in inside.items() if real not in seen and real not in own])
        seen.update(inside)
    if not found.paths:
        problem = (f"holds {found.ignored.total()} files, but no picture ({found.kinds()})" if found.ignored else
                   "holds no picture" if found.left_out or found.own else "is empty")
        raise DataError("\n".join([f"{printable(folder)} {problem}", *found.lines()[bool(found.ignored):]]))
    found.paths.sort()
    return found


def _list(folder: str, found: Found, training: bool) -> dict:
    """Add the files of one folder to `found`. Return {real path: path} of its subfolders.

    Raise DataError if it is the folder of the whole search and cannot be read.
    """
    try:
        with os.scandir(folder) as entries:
            entries = sorted((entry for entry in entries if entry.name[0] != "."), key=lambda entry: entry.name)
    except OSError as error:
        if folder == found.folder:
            raise DataError(f"cannot read {printable(folder)} ({error.strerror})") from None
        found.left_out[folder] = error.strerror
        return {}
    if training and folder != found.folder and _is_of_a_run(entries):
        found.own.append(folder)
        return {}
    inside = {}
    for entry in entries:
        path, kind = os.path.join(folder, entry.name), _kind(entry)
        ending = os.path.splitext(entry.name)[1].lower()
        if kind == "folder":
            inside[os.path.realpath(path)] = path
        elif kind != "file":
            found.left_out[path] = kind
        elif ending in SUFFIXES:
            found.paths.append(path)
        else:
            found.ignored[ending] += 1
    return inside


def _kind(entry: os.DirEntry) -> str:
    """Return "folder", "file", or why the entry is neither."""
    try:
        if entry.is_dir():
            return "folder"
        if entry.is_file():
            return "file"
        os.stat(entry.path)
    except OSError as error:
        if entry.is_symlink():
            kinds = {errno.ENOENT: "a link to nothing", errno.ELOOP: "a link that leads back to itself"}
            return kinds.get(error.errno, f"a link that cannot be followed ({error.strerror})")
        return error.strerror
    return "not a file (a pipe, a socket or a device)"


def _is_of_a_run(entries: list) -> bool:
    """Return whether a run of this program has written this folder: it has our page, or attention maps."""
    for entry in entries:
        if entry.name == "index.html":
            try:
                with open(entry.path, "rb") as file:
                    if _PAGE in file.read(4096):
                        return True
            except OSError:
                continue
        elif entry.name[7:13] == "_attn_" and entry.name[:7].isdecimal() and entry.name.endswith(".png"):
            return True
    return False


def own_folders(config) -> dict:
    """Return {real path: flag} of the folders that a run of this config writes to.

    Of one that is --image_path itself only the subfolder --version counts.
    """
    top, own = os.path.realpath(config.image_path), {}
    for flag in ("sample_path", "model_save_path", "log_path", "cache_path", "attn_path", "cache_dir"):
        path = getattr(config, flag, None)
        if path:
            real = os.path.realpath(path)
            own[os.path.join(real, config.version) if real == top else real] = flag
    return own
