"""The data set table: which pictures there are, where they lie, and how one is read.

A data set maps an index to one uint8 picture (3, imsize, imsize); a new one is a function and a row of `DATASETS`.
Opening one reads names and sizes of files, nothing of what is in them; `data_loader` checks and caches it.
"""

import hashlib
import io
import os
from collections.abc import Callable, Sequence
from functools import cached_property, partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

import toy_faces
from decode import decode, find_pictures, planes, read_picture, to_tensor
from failures import DataError

CELEBA_CROP = 160  # pixels: the face in an aligned 178x218 CelebA picture, cropped as published
TOY_LENGTH = 4096  # faces


class Pictures(Dataset):
    """`length` pictures, of which `read(index)` gives one as uint8 (3, imsize, imsize).

    `sources` are the paths of the files that they come from, always in the same order.
    """

    def __init__(self, read: Callable[[int], torch.Tensor], length: int, summary: str, sources: Sequence[str]):
        self.read, self.length, self.summary, self.sources = read, length, summary, sources

    def __len__(self) -> int:
        return self.length

    def __getitem__(self, index: int) -> torch.Tensor:
        return self.read(index)

    def gather(self, indices: Sequence[int]) -> torch.Tensor:
        """Several at once: uint8 (len(indices), 3, imsize, imsize), memory of their own."""
        return torch.stack([self[index] for index in indices])

    def decoded(self, indices: Sequence[int] | None = None) -> bool:
        """Whether these pictures (None: all) take no decoding any more."""
        return False


class Encoded(Pictures):
    """Pictures that are decoded from bytes in the folder `home`, so that they may be damaged, and worth caching."""

    home: Path
    crop: int | None = None

    def open(self, index: int) -> tuple[BinaryIO, int]:
        """(the encoded bytes as an open file, their number). Raises DataError."""
        raise NotImplementedError

    def name(self, index: int) -> str:
        """What messages call picture `index`."""
        raise NotImplementedError

    @cached_property
    def stamps(self) -> np.ndarray:
        """A number for each picture, int64 (length,), that changes with its name in `home` or its bytes.

        Bytes are not read: a file has changed if its size or time of change has. Raises DataError if one has gone.
        """
        raise NotImplementedError


def _stat(path: str) -> os.stat_result:
    try:
        return os.stat(path)
    except OSError as error:
        raise DataError(f"cannot read {path}: {error.strerror}") from error


def _number(words: object) -> int:
    return int.from_bytes(hashlib.blake2b(repr(words).encode(), digest_size=8).digest(), "little", signed=True)


class Files(Encoded):
    """The picture files below a folder, sorted by path. Raises DataError where there are none."""

    def __init__(self, folder: Path, imsize: int, crop: int | None = None):
        paths = find_pictures(folder)
        super().__init__(partial(self._read, paths, imsize=imsize, crop=crop), len(paths),
                         f"{len(paths)} pictures in {folder}", paths)
        self.home, self.crop = folder, crop

    @staticmethod
    def _read(paths: list[str], index: int, imsize: int, crop: int | None) -> torch.Tensor:
        return read_picture(paths[index], imsize, crop)

    def open(self, index):
        path = self.sources[index]
        try:
            return open(path, "rb", buffering=2**16), os.path.getsize(path)
        except OSError as error:
            raise DataError(f"cannot read {path}: {error.strerror}") from error

    def name(self, index):
        return self.sources[index]

    @cached_property
    def stamps(self):
        skip = len(str(self.home))  # so that a folder that moves with its cache keeps it
        found = ((path[skip:], _stat(path)) for path in self.sources)
        return np.fromiter((_number((name, file.st_size, file.st_mtime_ns)) for name, file in found),
                           np.int64, len(self))


_environments = {}  # folder: (process id, open LMDB)


def environment(folder: str):
    """The LMDB in `folder`, opened once per process (lmdb refuses a second time) and again after a fork."""
    import lmdb

    pid, opened = _environments.get(folder, (None, None))
    if pid != os.getpid():
        if opened is not None:
            opened.close()  # the parent's: not valid here, yet lmdb would take this for a second opening
        opened = lmdb.open(folder, readonly=True, lock=False, readahead=False)
        _environments[folder] = os.getpid(), opened
    return opened


class Lmdb(Encoded):
    """The values of an LMDB `folder`, each an encoded picture, sorted by key."""

    def __init__(self, folder: str, keys: list[bytes], imsize: int, summary: str, file: str):
        super().__init__(partial(self._read, folder, keys, imsize=imsize), len(keys), summary, [file])
        self.home, self.keys = Path(folder), keys

    @staticmethod
    def _value(folder: str, key: bytes) -> bytes:
        with environment(folder).begin() as transaction:
            return transaction.get(key)

    @classmethod
    def _read(cls, folder: str, keys: list[bytes], index: int, imsize: int) -> torch.Tensor:
        return decode(cls._value(folder, keys[index]), cls._name(folder, keys[index]), imsize)

    @staticmethod
    def _name(folder: str, key: bytes) -> str:
        return f"{key.decode(errors='replace')} in {folder}"

    def open(self, index):
        data = self._value(str(self.home), self.keys[index])
        return io.BytesIO(data), len(data)

    def name(self, index):
        return self._name(str(self.home), self.keys[index])

    @cached_property
    def stamps(self):
        file = _stat(self.sources[0])
        return _number((file.st_size, file.st_mtime_ns)) ^ np.arange(len(self))  # one file: its keys change with it


# ---- the table ----


def open_folder(config) -> Pictures:
    """Any folder of pictures, `--image_path` itself. Raises DataError."""
    try:
        return Files(Path(config.image_path), config.imsize)
    except DataError as error:
        raise DataError(f"--dataset folder: {error}; let --image_path name a folder of pictures") from None


def _missing(config, problem: object, name: str) -> DataError:
    return DataError(
        f"--dataset {config.dataset} --image_path {config.image_path}: {problem}\n"
        f"get the data with `bash download.sh {name}`, or train on drawn faces with `--dataset toy`"
    )


def open_celeb(config) -> Pictures:
    """CelebA's aligned pictures below `{image_path}/CelebA`, the central 160 px of each. Raises DataError."""
    try:
        return Files(Path(config.image_path, "CelebA"), config.imsize, CELEBA_CROP)
    except DataError as error:
        raise _missing(config, error, "CelebA") from None


def _lsun_folder(config) -> Path:
    """Where the LMDB is: in `--image_path` itself, in a folder *_lmdb there, or in one in its folder LSUN."""
    root = Path(config.image_path)
    if (root / "data.mdb").is_file():
        return root
    found = [file.parent for place in (root, root / "LSUN") for file in sorted(place.glob("*_lmdb/data.mdb"))]
    to_train_on = [folder for folder in found if not folder.name.endswith("_val_lmdb")] or found
    if not to_train_on:
        places = " or ".join(str(place / "church_outdoor_train_lmdb") for place in (root, root / "LSUN"))
        raise _missing(config, f"no data.mdb in {places}", "LSUN")
    if len(to_train_on) > 1:
        names = ", ".join(folder.name for folder in to_train_on)
        raise DataError(f"--image_path {root} holds several data sets ({names}): let it name one of them, such as "
                        f"--image_path {to_train_on[0]}")
    return to_train_on[0]


def open_lsun(config) -> Pictures:
    """LSUN's layout: a `data.mdb`, of which every value is an encoded picture. Raises DataError."""
    found = _lsun_folder(config)
    try:
        import lmdb
    except ImportError:
        raise DataError("--dataset lsun needs the lmdb package: pip install lmdb") from None
    file, folder = found / "data.mdb", os.path.realpath(found)
    try:
        opened = environment(folder)
        if file.stat().st_size < (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]:
            raise _missing(config, f"{file} is cut short", "LSUN")  # reading on would end in a bus error
        with opened.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except (lmdb.Error, OSError) as error:
        raise _missing(config, f"cannot read {file} ({error})", "LSUN") from error
    if not keys:
        raise _missing(config, f"{file} holds no pictures", "LSUN")
    return Lmdb(folder, keys, config.imsize, f"{len(keys)} pictures in {found}", str(file))


def open_cifar10(config) -> Pictures:
    """The 50,000 training pictures of CIFAR-10 as torchvision reads them. Raises DataError."""
    root, name = Path(config.image_path), "cifar-10-batches-py"
    if not (root / name).is_dir():
        root = root / "CIFAR10"
    if not (root / name).is_dir():
        raise _missing(config, f"there is no folder {root / name}", "CIFAR10")
    from torchvision.datasets import CIFAR10  # takes a second to import, so only when needed

    try:
        pictures = CIFAR10(root, train=True, download=False).data  # (N, 32, 32, 3) uint8
    except RuntimeError:  # torchvision's word for a wrong checksum
        raise _missing(config, f"{root / name} is damaged or incomplete", "CIFAR10") from None
    read = partial(_read_array, pictures, imsize=config.imsize)
    sources = [str(root / name / file) for file, _ in CIFAR10.train_list]
    return Pictures(read, len(pictures), f"{len(pictures)} pictures in {root}", sources)


def _read_array(pictures: np.ndarray, index: int, imsize: int) -> torch.Tensor:
    return to_tensor(Image.fromarray(pictures[index]), imsize)


def open_toy(config) -> Pictures:
    """Faces drawn by code: nothing to download."""
    read = partial(_draw, imsize=config.imsize)
    return Pictures(read, TOY_LENGTH, f"{TOY_LENGTH} drawn faces at {config.imsize} px", [toy_faces.__file__])


def _draw(index: int, imsize: int) -> torch.Tensor:
    return planes(toy_faces.draw_face(index, imsize))


DATASETS = {  # --dataset: how to open it
    "celeb": open_celeb,
    "lsun": open_lsun,
    "cifar10": open_cifar10,
    "folder": open_folder,
    "toy": open_toy,
}


# ---- parts of them ----


class Part(Pictures):
    """Those pictures of a data set, in this order; `word` says which they are."""

    def __init__(self, whole: Pictures, indices: Sequence[int], word: str):
        sources = whole.sources  # a file for each picture, or files of many
        if len(sources) == len(whole):
            sources = [sources[index] for index in indices]
        super().__init__(self._of_whole, len(indices), f"{len(indices)} {word} of {whole.summary}", sources)
        self.whole, self.indices = whole, np.asarray(indices, np.int64)

    def _of_whole(self, index: int) -> torch.Tensor:
        return self.whole[int(self.indices[index])]

    def gather(self, indices):
        return self.whole.gather(self.indices[indices])

    def decoded(self, indices=None):
        return self.whole.decoded(self.indices if indices is None else self.indices[indices])


def split(dataset: Pictures, share: float) -> tuple[Part, Part]:
    """(to train on, held out): a random `share` of the pictures, at least one, is held out; which follows from their
    number and the share alone, not from --seed. Both keep the pictures' order.
    """
    length = len(dataset)
    order = np.random.default_rng(0).permutation(length)
    held_out = max(1, round(share * length))
    return (Part(dataset, sorted(order[held_out:].tolist()), "trained on"),
            Part(dataset, sorted(order[:held_out].tolist()), "held out"))


def fingerprint(dataset: Pictures, config) -> str:
    """Hex sha256 of what decides which picture index i shows: the files, their order, how they are cut and sized.

    Files are told apart by absolute path, size and time of change; their content is not read (200,000 files
    take seconds). So a changed file of the same size whose time was set back passes, and a moved or copied
    folder counts as another. Raises DataError if a file has gone.
    """
    digest = hashlib.sha256(repr((config.dataset, config.imsize, CELEBA_CROP, len(dataset))).encode())
    for path in dataset.sources:
        file = _stat(path)
        digest.update(repr((os.path.abspath(path), file.st_size, file.st_mtime_ns)).encode())
    return digest.hexdigest()
