"""What travels to a GPU machine without network: pictures as zips, VGG-16 in fp16."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: bash benchmarks/gpu.sh --help")

import io
import os
import shutil
import subprocess
import zipfile
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import torch
from PIL import Image

from dataset.decode import DAMAGE, SUFFIXES, decode
from dataset.scan import find_pictures
from errors import DataError, UsageError
from pretrained import vgg
from utils import spread_indices, write_atomically

ROOT = Path(__file__).resolve().parent.parent
WEIGHTS = "vgg16_fp16.pth"  # in the pack, beside the archives
MOST = 26 * 2**20       # bytes of an archive: beside it travel the checkout and the weights, in 64 MiB together
HALF_SIZE = (89, 109)   # of CelebA's aligned pictures, which have 178 x 218


def pack(options):
    """Write what must travel into the folder; print the sizes. Return the exit code."""
    if not (options.celeba or options.paintings or options.classes or options.vgg_weights):
        raise UsageError("pack: name what is to be packed: --celeba ZIP, --paintings DIR, --classes ZIP, --vgg_weights "
                         "PATH")
    folder = options.folder
    _refuse_tracked(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if options.vgg_weights:
        state = vgg.load_vgg(options.vgg_weights, "--vgg_weights PATH").state_dict()
        half = {f"features.{name}": tensor.half() for name, tensor in state.items()}
        write_atomically(folder / WEIGHTS, lambda path: torch.save(half, path))
    if options.celeba:
        _archive(folder / "celeba.zip", _small_faces(options.celeba))
    if options.paintings:
        try:
            _archive(folder / "paintings.zip", _squares(find_pictures(Path(options.paintings)).paths))
        except DataError as error:
            raise DataError(f"--paintings: {error}; name a folder of pictures") from None
    if options.classes:
        _archive(folder / "classes.zip", _as_they_are(options.classes))
    for path in sorted(folder.iterdir()):
        print(f"{path.stat().st_size / 2**20:6.1f} MiB  {shown(path)}")
    return 0


def _refuse_tracked(folder):
    """Raise UsageError if git would take pictures in this folder for a part of the repository."""
    if folder.is_relative_to(ROOT) and shutil.which("git") and subprocess.run(
            ["git", "check-ignore", "-q", folder / "a"], cwd=ROOT, stderr=subprocess.DEVNULL).returncode == 1:
        raise UsageError(f"pack {shown(folder)}: git does not ignore this folder, and pictures must not be committed; "
                         "take gpu_pack, or add it to .gitignore")


def _archive(path, pictures):
    """Write (name, bytes) of encoded pictures as a zip, uncompressed: the pictures are compressed already."""
    def write(temporary):
        with zipfile.ZipFile(temporary, "w") as archive:
            for name, data in pictures:
                archive.writestr(zipfile.ZipInfo(name), data)

    write_atomically(path, write)


def _small_faces(path, count=10_000):
    """Yield (name, JPEG) of aligned CelebA pictures of half size from a zip: as they are, or larger ones scaled."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = _pictures_in(archive)
            if not names:
                raise DataError(f"--celeba {path}: it holds no picture; name the zip of CelebA's aligned pictures")
            for index in spread_indices(count, len(names)):
                data = archive.read(names[index])
                with Image.open(io.BytesIO(data)) as image:
                    if image.size != HALF_SIZE:
                        data = _jpeg(image.convert("RGB").resize(HALF_SIZE, Image.Resampling.LANCZOS), 90)
                yield f"{index:06d}.jpg", data
    except (*DAMAGE, zipfile.BadZipFile) as error:
        raise DataError(f"--celeba {path}: {getattr(error, 'strerror', None) or error}; name the zip of CelebA's "
                        "aligned pictures") from None


def _as_they_are(path):
    """Yield (name, bytes) of the pictures in a zip with a folder for each class."""
    try:
        with zipfile.ZipFile(path) as archive:
            names = _pictures_in(archive)
            if not names or not all("/" in name for name in names):
                raise DataError(f"--classes {path}: there must be pictures in it, in a folder for each class")
            sizes = [archive.getinfo(name).compress_size for name in names]
            count = min(len(names), int(len(names) * MOST / sum(sizes)))        # of each class as large a share
            yield from ((names[index], archive.read(names[index])) for index in spread_indices(count, len(names)))
    except (*DAMAGE, zipfile.BadZipFile) as error:
        raise DataError(f"--classes {path}: {getattr(error, 'strerror', None) or error}") from None


def _squares(paths, side=256, limit=MOST):
    """[(name, JPEG)] of these pictures as training takes them, of the best quality that `limit` bytes allow."""
    with ThreadPoolExecutor() as pool:
        squares = list(pool.map(lambda path: _image(decode(Path(path).read_bytes(), str(path), side)), paths))
        for quality in (95, 90, 85, 75):
            encoded = list(pool.map(lambda image, quality=quality: _jpeg(image, quality), squares))
            if sum(map(len, encoded)) <= limit:
                break
    return [(f"{number:04d}.jpg", data) for number, data in enumerate(encoded)]


def _image(picture):
    return Image.fromarray(picture.permute(1, 2, 0).numpy())


def _jpeg(image, quality):
    """Encode with colours of full resolution."""
    data = io.BytesIO()
    image.save(data, "JPEG", quality=quality, subsampling=0)
    return data.getvalue()


def _pictures_in(archive):
    return sorted(name for name in archive.namelist() if Path(name).suffix.lower() in SUFFIXES)


def _crc(path):
    return f"{zlib.crc32(path.read_bytes()):08x}"


def unpack(path, folder, experiment):
    """Write an experiment's pictures from the archive as files, unless an earlier call did. Return their number."""
    origin, now = folder.with_name(f"{folder.name}.txt"), f"{path.name}: {path.stat().st_size} bytes, {_crc(path)}\n"
    if not (folder.is_dir() and origin.is_file() and origin.read_text() == now):
        shutil.rmtree(folder, ignore_errors=True)
        partial = folder.with_name(f"{folder.name}.part")
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            with zipfile.ZipFile(path) as archive, ThreadPoolExecutor() as pool:
                names = _pictures_in(archive)
                chosen = [names[i] for i in spread_indices(experiment.pictures or len(names), len(names))]
                list(pool.map(lambda name: _unpack(archive.read(name), partial / name, experiment.crop), chosen))
        except (*DAMAGE, zipfile.BadZipFile) as error:
            raise DataError(f"{shown(path)} is damaged ({error}); pack it again with {experiment.pack_flag}") from None
        if not names:
            raise DataError(f"{shown(path)} holds no picture; pack it again with {experiment.pack_flag}")
        os.replace(partial, folder)
        origin.write_text(now)
    return sum(1 for file in folder.rglob("*") if file.suffix.lower() in SUFFIXES)


def _unpack(data, path, crop):
    """Write a picture as it is, or losslessly its center: the published crop of CelebA, which is not the largest."""
    path.parent.mkdir(parents=True, exist_ok=True)      # of a class
    if not crop:
        path.write_bytes(data)
        return
    with Image.open(io.BytesIO(data)) as image:
        left, top = (image.width - crop) // 2, (image.height - crop) // 2
        image.crop((left, top, left + crop, top + crop)).save(path.with_suffix(".png"), compress_level=1)


def shown(path):
    """A path as commands name it, which run in the checkout."""
    return str(path.relative_to(ROOT) if path.is_relative_to(ROOT) else path)
