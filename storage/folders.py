"""The folders of a run, the names of its files, and the lock against other processes."""

import contextlib
import errno
import json
import os
import re
import socket
from dataclasses import dataclass, fields
from pathlib import Path

from device.distributed import on_first
from errors import LockedError
from utils import new_folders, remove_leftovers, write_atomically

try:
    import fcntl
except ImportError:             # Windows: no lock
    fcntl = None

LOCK = ".lock"                  # the file in each folder that a running process locks
_HELD = (errno.EACCES, errno.EAGAIN)    # by another process; any other error: the file system has no locks


def step_name(step, suffix):
    """Return the file name for a step, such as `0000100_fake.png` for suffix `_fake.png`; names sort by step."""
    return f"{step:07d}{suffix}"


@dataclass(frozen=True)
class RunFolders:
    """The folders of one run: pictures, attention maps, logs, checkpoints."""

    samples: Path
    attention: Path
    logs: Path
    models: Path

    @classmethod
    def of(cls, config):
        samples = Path(config.sample_path) / config.version
        return cls(
            samples=samples,
            attention=Path(config.attn_path) / config.version if config.attn_path else samples,
            logs=Path(config.log_path) / config.version,
            models=Path(config.model_save_path) / config.version,
        )

    def each(self):
        """Return the different folders among them."""
        return list(dict.fromkeys(getattr(self, field.name) for field in fields(self)))

    def create(self):
        """Create the folders, or none of them. Raise OSError."""
        with new_folders(*self.each()):
            pass

    def supersede_records_after(self, step):
        """Move records later than `step` to `superseded/`, because the run resumes from `step`. Return their number."""
        moved = 0
        for folder in {self.samples, self.attention}:
            for path in list(folder.iterdir()):
                number, _, rest = path.name.partition("_")
                if rest and number.isdecimal() and int(number) > step:
                    (folder / "superseded").mkdir(exist_ok=True)
                    with contextlib.suppress(OSError):          # a folder of that name is there already
                        os.replace(path, folder / "superseded" / path.name)
                        moved += 1
        return moved

    def remove_leftovers(self):
        """Delete temporary files that killed processes left here, or beside them in folders of all runs."""
        for folder in self.each():
            remove_leftovers(folder)
        remove_leftovers(self.samples.parent, "index.html")
        remove_leftovers(self.logs.parent, "scores.md")
        remove_leftovers(self.models.parent, self.moving.name)

    def move_aside(self, tell=lambda name: None):
        """Rename the folders of an old run, all with the same suffix. Return the old run's new name, None without one.

        Call `tell` with the name when it is done. A call that was killed in between is gone on with by the next, which
        may `tell` it again. Raise OSError.
        """
        number = self._number_of_move()
        if number is None:
            if not any(folder.exists() for folder in self.each()):
                return None
            number = next(n for n in range(1, 10_000) if not any(map(os.path.lexists, self._aside(n).values())))
            write_atomically(self.moving, lambda path: path.write_text(str(number), encoding="ascii"))
        for folder, aside in self._aside(number).items():
            if not os.path.lexists(aside) and folder.exists():
                os.replace(folder, aside)
        name = f"{self.models.name}.old{number}"
        tell(name)
        self.moving.unlink()
        return name

    def is_half_moved(self):
        """Return whether a process was killed during `move_aside`."""
        return self._number_of_move() is not None

    def _aside(self, number):
        """Return {folder: where `move_aside` moves it}; models first: half a run is none."""
        return {folder: folder.with_name(f"{folder.name}.old{number}") for folder in reversed(self.each())}

    @property
    def moving(self):
        """The file that holds the number of the suffix while the folders are moved."""
        return self.models.with_name(f".{self.models.name}.moving")

    def _number_of_move(self):
        """Return the number in the file `moving`; None without one, and if a run would be moved over another."""
        try:
            text = self.moving.read_text(encoding="ascii")
        except (OSError, ValueError):
            return None
        if not re.fullmatch(r"[1-9]\d{0,3}", text):
            return None
        taken = (folder for folder, aside in self._aside(int(text)).items() if os.path.lexists(aside))
        return None if any(_has_files(folder) for folder in taken) else int(text)


def _has_files(folder):
    """Return whether a folder has more in it than its lock."""
    return folder.is_dir() and any(name != LOCK for name in os.listdir(folder))


def require_folders(folders, owner=None):
    """Raise what creating these folders, and locking them for `owner` (see FolderLock), would raise, on every rank.

    Write nothing. All ranks must call this.
    """
    obstacle = on_first(lambda: _find_obstacle(folders, owner))
    if obstacle:
        raise obstacle


def _find_obstacle(folders, owner):
    """Return a LockedError, an OSError, or None."""
    try:
        for folder in map(Path, folders):
            _require_writable(folder)
            if owner:
                _require_unlocked(folder, owner)
    except (LockedError, OSError) as error:
        return error
    return None


def _require_writable(folder):
    existing = folder
    while not os.path.isdir(existing):
        try:
            os.lstat(existing)                          # raises, too, where a parent is a file or a name is too long
        except FileNotFoundError:
            existing = existing.parent
            continue
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))
    if not os.access(existing, os.W_OK | os.X_OK):
        raise PermissionError(errno.EACCES, "cannot be written", str(folder))


def _require_unlocked(folder, owner):
    try:
        with open(folder / LOCK, "r+", encoding="utf-8") as file:
            _lock(file, folder, owner)
    except FileNotFoundError:
        pass                                            # no run was here


def _lock(file, folder, owner):
    """Lock an open lock file. Return False if its file system has no locks. Raise LockedError."""
    if fcntl is None:                                   # Windows
        return False
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno not in _HELD:
            return False
        flag = owner.split()[0]
        raise LockedError(f"{owner}: {_describe(file.read())} writes into {folder}; wait for it, or use another "
                          f"{flag}") from None
    return True


class FolderLock:
    """Holds a lock file in each of `folders`, until `close` or the end of the process, kill -9 included.

    `owner` is the flag and value that name the folders. A POSIX record lock, not flock: loader workers forked later do
    not inherit it. `unsupported` is a folder whose file system has no locks, or None. Raise LockedError, naming host
    and process, if another process holds a lock; OSError if a folder cannot be written.
    """

    def __init__(self, folders, owner):
        self.files, self.unsupported = [], None
        try:
            for folder in folders:
                self._add(Path(folder), owner)
        except BaseException:
            self.close()
            raise

    def _add(self, folder, owner):
        file = open(folder / LOCK, "a+", encoding="utf-8")  # noqa: SIM115 - stays open while the run lasts
        self.files.append(file)
        file.seek(0)
        if not _lock(file, folder, owner):
            self.unsupported = folder
            return
        with contextlib.suppress(OSError):              # a full disk: the lock holds without its holder's name
            file.truncate(0)
            file.write(json.dumps({"host": socket.gethostname(), "pid": os.getpid()}) + "\n")
            file.flush()

    def close(self):
        """Release the locks."""
        for file in self.files:
            with contextlib.suppress(OSError):
                file.close()


def _describe(text):
    """Return who holds a lock, from the text of its file."""
    try:
        holder = json.loads(text)
        return f"process {holder['pid']} on {holder['host']}"
    except (ValueError, KeyError, TypeError):
        return "another process"
