"""The folders of a run, the names of its files, and the lock against other processes."""

import os
from dataclasses import dataclass
from pathlib import Path

try:
    import fcntl
except ImportError:             # Windows: no lock
    fcntl = None


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

    def create(self):
        """Create the folders. Raise OSError."""
        for folder in (self.samples, self.attention, self.logs, self.models):
            folder.mkdir(parents=True, exist_ok=True)

    def supersede_records_after(self, step):
        """Move the files of records later than `step` to `superseded/`, because the run resumes from `step`."""
        for folder in {self.samples, self.attention}:
            for path in folder.iterdir():
                number, _, rest = path.name.partition("_")
                if rest and number.isdecimal() and int(number) > step and path.is_file():
                    (folder / "superseded").mkdir(exist_ok=True)
                    os.replace(path, folder / "superseded" / path.name)


def lock_folder(folder):
    """Lock `folder` for training: return the open lock file, or None if another process holds the lock.

    A POSIX record lock, not flock: loader workers forked later do not inherit it, so it ends with this process.
    """
    file = open(Path(folder) / ".lock", "w")  # noqa: SIM115 - stays open while the run lasts
    if fcntl is None:
        return file
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        file.close()
        return None
    file.write(f"{os.getpid()}\n")
    file.flush()
    return file
