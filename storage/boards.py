"""Where a run shows its numbers and pictures beside the gallery: TensorBoard (events in the log folder) and wandb.

Both are slow to import, and wandb may not be installed: so only where needed. Neither gets more than small pictures,
and of a long run not all records, as they keep every one of them.
"""

import contextlib
import importlib.util
import io
import os
import secrets
import threading
from pathlib import Path

from PIL import Image

from device import distributed
from device.distributed import say
from errors import UsageError, first_line
from utils import write_atomically

LONGEST = 640               # px of the longer side of a picture
EACH = 50                   # records of which all are shown; of as many again every second one, and so on
WANDB_ID = "wandb_id"       # the file that keeps the id of the run, in its log folder
INIT_TIMEOUT, FINISH_TIMEOUT = 30, 60       # seconds


def is_shown(record):
    """Return whether the record of this number, counted from 1, is shown: of 10,000 some 240."""
    stride = 1
    while record > EACH * stride:
        stride *= 2
    return record % stride == 0


def _shrink(path):
    """Return the picture in this file as RGB, transparent parts on white, at most LONGEST px long. Raise OSError."""
    with Image.open(path) as opened:
        picture = opened.convert("RGBA")
    picture = Image.alpha_composite(Image.new("RGBA", picture.size, "white"), picture).convert("RGB")
    picture.thumbnail((LONGEST, LONGEST))
    return picture


class TensorBoard:
    """Events in `folder`. `purge_step`: events from this step on are given up, as a run writes them again; `settings`,
    {name: number, text or bool}: what the tab HPARAMS compares runs by.
    """

    def __init__(self, folder, purge_step=None, settings=None):
        self.folder, self.settings, self.purge_step = folder, settings, purge_step
        self.writer = None                              # opened to write: what may fail is only that

    def write(self, step, values):
        """Write the numbers among `values`. After an error the next call opens a new file."""
        with self._opened() as writer:
            for name, value in values.items():
                if not isinstance(value, str):
                    writer.add_scalar(name, value, step)

    def write_pictures(self, step, pictures):
        """Write pictures, {name: path}, as JPEG of at most LONGEST px. Raise OSError, and see `write`."""
        from tensorboard.compat.proto.summary_pb2 import Summary

        with self._opened() as writer:
            for name, path in pictures.items():
                picture, encoded = _shrink(path), io.BytesIO()
                picture.save(encoded, "JPEG", quality=85)
                image = Summary.Image(width=picture.width, height=picture.height, colorspace=3,
                                      encoded_image_string=encoded.getvalue())
                writer.file_writer.add_summary(Summary(value=[Summary.Value(tag=name, image=image)]), step)

    @contextlib.contextmanager
    def _opened(self):
        writer, self.writer = self.writer or self._open(), None
        yield writer
        writer.flush()
        self.writer = writer                            # kept unless something was raised

    def _open(self):
        from torch.utils.tensorboard import SummaryWriter

        writer = SummaryWriter(self.folder, purge_step=self.purge_step)
        self.purge_step = None                          # only once: what follows is of this run
        if self.settings is not None:
            from torch.utils.tensorboard.summary import hparams

            # only the second of the three parts: of the first, which lists metrics, TensorBoard reads that of one run
            # for all of them; without it it offers all scalars, with their newest values
            writer.file_writer.add_summary(hparams(self.settings, {})[1], 0)
        return writer

    def close(self):
        """Close the file. Raise OSError."""
        if self.writer:
            self.writer.close()


def require_wandb(config):
    """Raise UsageError if `--wandb true` cannot work, as it is not installed. All ranks must call this."""
    if config.wandb and not distributed.on_first(_is_installed):
        raise UsageError("--wandb true needs wandb: pip install wandb, or leave the flag out")


def forget_wandb_run(folder):
    """Delete the id in a log folder, so that wandb shows a new training as a new run. Raises OSError."""
    (Path(folder) / WANDB_ID).unlink(missing_ok=True)


def _is_installed():
    found = importlib.util.find_spec("wandb")
    return found is not None and found.origin is not None       # None: a folder of that name, as its own logs have


class Wandb:
    """The run at Weights & Biases; with WANDB_MODE=offline in `folder`/wandb alone. On rank 0 only.

    `settings` are its config. A run that resumes goes on there: `folder` keeps its id. Nothing is raised: the first
    failure is announced, and ends this, not the training. Without a connection at the start it goes on offline.
    """

    def __init__(self, folder, name, settings):
        self.folder, self.run = Path(folder), None
        with self._tolerant():
            self.run = self._begin(name, settings)
            # wandb drops what is logged for a step of its own that is past, as after a kill, or going back
            self.run.define_metric("step")
            self.run.define_metric("*", step_metric="step")
            if not self.run.disabled:
                offline = f"{self.folder / 'wandb'}, offline; `wandb sync` sends it"
                say(f"wandb: {offline if self.run.offline else self.run.url}")

    def _begin(self, name, settings):
        import wandb

        arguments = dict(                               # an absolute path: its service may work in another folder
            project=os.environ.get("WANDB_PROJECT", settings["model"]), name=name, id=self._find_id(), resume="allow",
            dir=self.folder.absolute(), config=settings)
        # the console is the progress bar's
        quiet = wandb.Settings(console="off", silent=True, init_timeout=INIT_TIMEOUT, login_timeout=INIT_TIMEOUT)
        if os.environ.get("WANDB_MODE", "online") == "online":
            # who is not logged in would be asked for a key, on a terminal, which would hold the training up
            if wandb.login(prompt=False, verify=False):
                try:
                    return wandb.init(**arguments, settings=quiet)
                except wandb.Error as error:
                    say(f"warning: wandb: {first_line(error)}")
                    wandb.teardown()                    # its service still has a run of this id
            else:
                say("warning: wandb: not logged in, see `wandb login`")
            quiet.mode = "offline"
        return wandb.init(**arguments, settings=quiet)

    def _find_id(self):
        path = self.folder / WANDB_ID
        with contextlib.suppress(OSError, UnicodeDecodeError):
            if known := path.read_text(encoding="ascii").strip():
                return known
        new = secrets.token_hex(4)
        write_atomically(path, lambda temporary: temporary.write_text(new, encoding="ascii"))
        return new

    def write(self, step, values):
        """Log the numbers among `values`."""
        self._log(step, lambda: {name: value for name, value in values.items() if isinstance(value, (int, float))})

    def write_pictures(self, step, pictures):
        """Log pictures, {name: path}, as JPEG of at most LONGEST px."""
        import wandb

        self._log(step, lambda: {name: wandb.Image(_shrink(path), file_type="jpg") for name, path in pictures.items()})

    def _log(self, step, find):
        if self.run:
            with self._tolerant():
                self.run.log({"step": step, **find()})

    @contextlib.contextmanager
    def _tolerant(self):
        try:
            yield
        except Exception as error:                      # whatever a library and its network may raise
            reason = " ".join(str(error).split())[:300] or first_line(error)
            say(f"warning: wandb: {type(error).__name__}: {reason}; training continues without it")
            self.run = None

    def close(self, failed):
        """End the run, as failed or not; what is not uploaded within FINISH_TIMEOUT seconds is left to `wandb sync`."""
        if not self.run:
            return
        run = self.run

        def finish():
            with self._tolerant():
                run.finish(exit_code=int(failed))

        thread = threading.Thread(target=finish, daemon=True)
        thread.start()
        thread.join(FINISH_TIMEOUT)
        if thread.is_alive():
            say(f"warning: wandb: not all is uploaded yet; `wandb sync` sends it from {self.folder / 'wandb'}")
