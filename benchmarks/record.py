"""What a benchmark has done so far, in a JSON file in its --out, for the next call with the same command."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of ablation.py and side_by_side.py, which have --help")

import json
import sys
import threading
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from errors import DataError, UsageError  # noqa: E402 - found through the line above
from utils import write_atomically  # noqa: E402


class Record:
    """`data`, kept in the file `path`: the settings, and all that was `put`, from any thread."""

    def __init__(self, path, settings, kind, hint, **empty):
        """Read the file, or begin with `empty`. `kind` is what its folder then holds, such as "an ablation".

        Raise UsageError if an earlier call had other settings, DataError, which ends with `hint`, if it cannot be read.
        """
        self.path, self._kind, self._lock = path, kind, threading.Lock()
        self.data = {"settings": settings, **empty}
        if path.exists():
            try:
                kept = json.loads(path.read_text(encoding="utf-8"))
                before = dict(kept["settings"])
            except (OSError, ValueError, TypeError, KeyError) as error:
                raise DataError(f"{path} cannot be read ({type(error).__name__}: {error}); {hint}") from None
            self.data |= kept
            for name, now in settings.items():
                self.refuse_other(name, before.get(name), now)

    def refuse_other(self, name, before, now):
        """Raise UsageError if a setting was another one in an earlier call; older records lack some."""
        before, now = ("(none)" if value in (None, "") else value for value in (before, now))
        if before != now:
            raise UsageError(f"--out {self.path.parent} holds {self._kind} with other {name}: {before}, now {now}.\n"
                             "Use another --out, or move that folder away.")

    def put(self, value, *keys):
        """Set data[key][key]... = value, and write the file."""
        with self._lock:
            place = self.data
            for key in keys[:-1]:
                place = place.setdefault(key, {})
            place[keys[-1]] = value
            self._write()

    def forget(self, key, prefix):
        """Drop what is in data[key] under a name that begins with `prefix`, and write the file."""
        with self._lock:
            self.data[key] = {name: value for name, value in self.data[key].items() if not name.startswith(prefix)}
            self._write()

    def write(self):
        """Write the file, which `put` and `forget` do, too."""
        with self._lock:
            self._write()

    def _write(self):
        text = json.dumps(self.data, indent=2) + "\n"
        write_atomically(self.path, lambda temporary: temporary.write_text(text, encoding="utf-8"))
