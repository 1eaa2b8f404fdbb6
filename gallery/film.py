"""Videos from a list of pictures: animated WebP or GIF by Pillow, MP4 by imageio-ffmpeg."""

import importlib.util

import numpy as np

from errors import UsageError
from utils import write_atomically

FRAMES_PER_SECOND = 20


def require(kind):
    """Raise UsageError if a video of this kind, a value of `--film`, cannot be written."""
    if kind == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("--film mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or use --film webp")


def save(frames, path, kind):
    """Write Pillow images as a video of format `kind`; all are cropped or padded to the size of the first.

    The write is atomic. Raise OSError.
    """
    frames = [frame if frame.size == frames[0].size else frame.crop((0, 0, *frames[0].size)) for frame in frames]
    write_atomically(path, lambda temporary: _write(frames, temporary, kind))


def _write(frames, path, kind):
    if kind == "mp4":
        import imageio_ffmpeg

        width, height = (side + side % 2 for side in frames[0].size)    # H.264 needs even sides
        writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=1,
                                             output_params=["-f", "mp4"])
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(np.asarray(frame.crop((0, 0, width, height)))))
        writer.close()
    else:
        options = {"quality": 80, "method": 4} if kind == "webp" else {}
        frames[0].save(path, kind, save_all=True, append_images=frames[1:], duration=1000 // FRAMES_PER_SECOND, loop=0,
                       **options)
