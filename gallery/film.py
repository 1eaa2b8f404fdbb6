"""Videos from a list of pictures: animated WebP or GIF by Pillow, MP4 by imageio-ffmpeg; --mode evolution."""

import errno
import importlib.util
from collections import Counter

import numpy as np
from PIL import Image, ImageDraw

from device.distributed import say
from errors import DataError, UsageError
from gallery import grid, page
from storage import checkpoint
from storage.folders import RunFolders, step_name
from utils import spread_indices, write_atomically

FRAMES_PER_SECOND = 20
EVOLUTION, LAST = 12, 2     # seconds that --mode evolution takes, of up to 240 grids, and shows the last grid
LONGEST = 10                # frames that it shows any other grid, at most
LARGEST = 1080              # pixels: grids of larger sides are shrunk


def require(kind):
    """Raise UsageError if a video of this kind, a value of `--film`, cannot be written."""
    if kind == "mp4" and importlib.util.find_spec("imageio_ffmpeg") is None:
        raise UsageError("--film mp4 needs imageio-ffmpeg: pip install imageio-ffmpeg, or use --film webp")


def save(frames, path, kind, shown=None):
    """Write Pillow images as a looping video of format `kind`; smaller ones are padded to the size of the largest.

    `shown`: for how many 20ths of a second each is shown; None: one. The write is atomic. Raise OSError.
    """
    shown = shown or [1] * len(frames)
    size = tuple(max(sides) for sides in zip(*(frame.size for frame in frames), strict=True))
    frames = [frame if frame.size == size else _padded(frame, size) for frame in frames]
    write_atomically(path, lambda temporary: _write(frames, temporary, kind, shown))


def _padded(frame, size):
    """Return the frame with background right of it and below, of `size`."""
    canvas = Image.new("RGB", size, grid.BACKGROUND)
    canvas.paste(frame)
    return canvas


def _write(frames, path, kind, shown):
    if kind == "mp4":
        return _write_mp4([frame for frame, count in zip(frames, shown, strict=True) for _ in range(count)], path)
    options = {"quality": 80, "method": 4} if kind == "webp" else {}
    frames[0].save(path, kind, save_all=True, append_images=frames[1:], loop=0,
                   duration=[count * 1000 // FRAMES_PER_SECOND for count in shown], **options)


def _write_mp4(frames, path):
    import imageio_ffmpeg

    width, height = (side + side % 2 for side in frames[0].size)        # H.264 needs even sides
    writer = imageio_ffmpeg.write_frames(str(path), (width, height), fps=FRAMES_PER_SECOND, macro_block_size=1,
                                         ffmpeg_log_level="quiet", output_params=["-f", "mp4"])
    try:
        writer.send(None)
        for frame in frames:
            writer.send(np.ascontiguousarray(np.asarray(frame.crop((0, 0, width, height)))))
        writer.close()
        written, _ = imageio_ffmpeg.count_frames_and_secs(str(path))    # whatever became of it, close() raises nothing
    except (OSError, RuntimeError):
        written = 0
    if written != len(frames):
        raise OSError(errno.ENOSPC, "ffmpeg could not write it whole; the disk may be full")


# --------------------------------------------------------------------------------------------------- --mode evolution


def evolution(config):
    """Write one video of the sample grids of a run over its steps, of up to `--num_frames` of them. Return exit code 0.

    `--pretrained_model STEP` ends it there. Raise UsageError, DataError, OSError.
    """
    require(config.film)
    if config.pretrained_model == "best":
        raise UsageError("--pretrained_model best: --mode evolution shows all grids up to a step; name one")
    folders = RunFolders.of(config)
    until = config.pretrained_model
    found = page.pictures_of(folders.samples, "fake")
    grids = {step: path for step, path in found.items() if until is None or step <= until}
    if found and not grids:
        raise UsageError(f"--pretrained_model {until}: the first sample grid is that of step {min(found)}")
    if not grids:
        raise DataError(f"--mode evolution: there is no sample grid (0000100_fake.png, ...) in {folders.samples}; "
                        "training writes one every --sample_step")
    sizes = {step: page.png_size(path) for step, path in grids.items()}     # None: damaged
    usual = Counter(size for size in sizes.values() if size).most_common(1)
    fitting = [step for step, size in sizes.items() if usual and size == usual[0][0]]
    chosen = {*(fitting[index] for index in spread_indices(config.num_frames - 1, len(fitting))), *fitting[-1:]}
    shown = {step: picture for step in sorted(chosen) if (picture := _read(grids[step]))}
    if not shown:
        raise DataError(f"--mode evolution: none of the {len(grids)} grids in {folders.samples} can be read")
    last, skipped = max(shown), sorted(chosen - shown.keys() | sizes.keys() - set(fitting))
    frames = [_with_caption(picture, step) for step, picture in shown.items()]
    each = max(1, min(LONGEST, EVOLUTION * FRAMES_PER_SECOND // len(frames)))
    path = folders.samples / step_name(last, f"_evolution.{config.film}")
    save(frames, path, config.film, [each] * (len(frames) - 1) + [LAST * FRAMES_PER_SECOND])
    if checkpoint.steps_in(folders.models):             # else the run's settings are not known, and its page has them
        page.write_pages(folders, config)
    if skipped:
        say(f"note: left out, as they are damaged or of another size than most: {len(skipped)} grids, the first "
            f"that of step {skipped[0]}")
    say(f"a video of {len(frames)} of {len(grids)} grids, up to step {last}, in {path}")
    return 0


def _read(path):
    """Return a grid as an RGB picture of sides up to LARGEST, or None if it is damaged or gone."""
    try:
        with Image.open(path) as picture:
            picture = picture.convert("RGB")
    except (OSError, SyntaxError, ValueError):
        return None
    picture.thumbnail((LARGEST, LARGEST), Image.Resampling.LANCZOS)
    return picture


def _with_caption(picture, step):
    """Return the grid with its step below it."""
    font, height = grid.find_font(17), 30
    frame = Image.new("RGB", (picture.width, picture.height + height), grid.BACKGROUND)
    frame.paste(picture)
    ImageDraw.Draw(frame).text((grid.GAP + 6, picture.height + height // 2), f"step {step:,}", grid.INK, font, "lm")
    return frame
