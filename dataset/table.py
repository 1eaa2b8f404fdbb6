"""The table of data sets: `--dataset` selects a row of `DATASETS`, a function `config -> ImageDataset`.

To add a data set, write a function and a row here, and add the name to the choices of `--dataset` in flags/common.py.
Opening a data set reads file names and sizes but decodes no picture; `data_loader` checks and caches it.
"""

import base64
import hashlib
import os
import re
from functools import cache, partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from dataset import toy
from dataset.decode import MAX_PIXELS, printable, to_tensor
from dataset.images import Files, ImageDataset, Lmdb, Lmdbs, Subset, environment, open_pictures, stat_file
from dataset.labels import Labels
from dataset.scan import own_folders
from errors import DataError
from flags.pictures import PictureShape

CELEBA_CROP = 160  # pixels: side of the center crop of an aligned 178x218 CelebA picture, as published
TOY_LENGTH = 4096  # pictures


def _limit(config) -> int:
    return getattr(config, "max_pixels", MAX_PIXELS)  # tools open a folder with less than a whole config


def open_folder(config) -> ImageDataset:
    """All pictures below the folder, or in the zip archive, `--image_path`. Raises DataError."""
    try:
        return open_pictures(Path(config.image_path), PictureShape.of_config(config), None, _limit(config),
                             own_folders(config))
    except DataError as error:
        raise DataError(f"--dataset folder: {error}; set --image_path to a folder of pictures, or to a zip archive of "
                        "them") from None


def _missing(config, problem: object, name: str) -> DataError:
    own = "; for pictures of your own add `--dataset folder`" if os.path.exists(config.image_path) else ""
    return DataError(
        f"--dataset {config.dataset} --image_path {printable(config.image_path)}: {problem}\n"
        f"get the data with `bash download.sh {name}`, or train on drawn faces with `--dataset toy`{own}"
    )


def open_celeb(config) -> ImageDataset:
    """CelebA's aligned pictures below `{image_path}/CelebA`, center-cropped to 160 px. Raises DataError."""
    try:
        dataset = Files(Path(config.image_path, "CelebA"), PictureShape.of_config(config), CELEBA_CROP, _limit(config),
                        own_folders(config))
    except DataError as error:
        raise _missing(config, error, "CelebA") from None
    dataset.find_labels = None  # however its pictures are spread over folders
    return dataset


def _lsun_folders(config) -> dict[str, Path]:
    """Return {category: folder} of the LMDBs: `--image_path` itself, or *_lmdb folders in it or in its folder LSUN.

    There is one without classes, else one of each category. Validation sets (*_val_lmdb) are used only if there is no
    other, or none of the category. Raises DataError.
    """
    root = Path(config.image_path)
    if (root / "data.mdb").is_file():
        return {root.name: root}
    folders = [file.parent for parent in (root, root / "LSUN") for file in sorted(parent.glob("*_lmdb/data.mdb"))]
    if not folders:
        expected = " or ".join(str(parent / "church_outdoor_train_lmdb") for parent in (root, root / "LSUN"))
        raise _missing(config, f"no data.mdb in {expected}", "LSUN")
    training = [folder for folder in folders if not folder.name.endswith("_val_lmdb")]
    if getattr(config, "conditional", False) is not False:
        return _by_category(config, training, [folder for folder in folders if folder not in training])
    training = training or folders
    if len(training) > 1:
        names = ", ".join(folder.name for folder in training)
        raise DataError(f"--image_path {root} holds several data sets ({names}): choose one of them, such as "
                        f"--image_path {training[0]}, or use all, each as a class, with --conditional true")
    return {training[0].name: training[0]}


def _by_category(config, training: list[Path], validation: list[Path]) -> dict[str, Path]:
    """Return {category: folder}, sorted. Raise DataError if a category has two folders for training."""
    folders = {}
    for folder in training:
        name = re.sub("(_train)?_lmdb$", "", folder.name)
        if name in folders:
            raise DataError(f"--image_path {config.image_path} holds two data sets of the category {name} "
                            f"({folders[name]}, {folder}); remove one of them")
        folders[name] = folder
    for folder in validation:
        folders.setdefault(folder.name.removesuffix("_val_lmdb"), folder)
    return dict(sorted(folders.items()))


def open_lsun(config) -> ImageDataset:
    """LMDBs in LSUN's layout: every value of `data.mdb` is an encoded picture. Several are a class each.

    Raises DataError.
    """
    folders = _lsun_folders(config)
    try:
        import lmdb  # noqa: F401
    except ImportError:
        raise DataError("--dataset lsun needs the lmdb package: pip install lmdb") from None
    parts = {name: _open_lmdb(config, folder) for name, folder in folders.items()}
    if len(parts) > 1:
        return Lmdbs(parts, Path(config.image_path))
    return next(iter(parts.values()))


def _open_lmdb(config, lmdb_folder: Path) -> Lmdb:
    import lmdb

    file, folder = lmdb_folder / "data.mdb", os.path.realpath(lmdb_folder)
    try:
        opened = environment(folder)
        if file.stat().st_size < (opened.info()["last_pgno"] + 1) * opened.stat()["psize"]:
            raise _missing(config, f"{file} is truncated", "LSUN")  # reading past its end would be a bus error
        with opened.begin() as transaction:
            keys = list(transaction.cursor().iternext(values=False))
    except (lmdb.Error, OSError) as error:
        raise _missing(config, f"cannot read {file} ({error})", "LSUN") from error
    if not keys:
        raise _missing(config, f"{file} holds no pictures", "LSUN")
    return Lmdb(folder, keys, PictureShape.of_config(config), f"{len(keys)} pictures in {printable(lmdb_folder)}",
                str(file), _limit(config))


def open_cifar10(config) -> ImageDataset:
    """The 50,000 training pictures of CIFAR-10, read by torchvision. Raises DataError."""
    root, name = Path(config.image_path), "cifar-10-batches-py"
    if not (root / name).is_dir():
        root = root / "CIFAR10"
    if not (root / name).is_dir():
        raise _missing(config, f"there is no folder {root / name}", "CIFAR10")
    from torchvision.datasets import CIFAR10  # here, because the import takes a second

    try:
        cifar10 = CIFAR10(root, train=True, download=False)
    except RuntimeError:  # torchvision raises it on a wrong checksum
        raise _missing(config, f"{root / name} is damaged or incomplete", "CIFAR10") from None
    pictures = cifar10.data  # (N, 32, 32, 3) uint8
    labels = partial(Labels, tuple(cifar10.classes), np.array(cifar10.targets, np.int64))
    read = partial(_read_array, pictures, shape=PictureShape.of_config(config))
    sources = [str(root / name / file) for file, _ in CIFAR10.train_list]
    return ImageDataset(read, len(pictures), f"{len(pictures)} pictures in {printable(root)}", sources, labels)


def _read_array(pictures: np.ndarray, index: int, shape: PictureShape) -> torch.Tensor:
    return to_tensor(Image.fromarray(pictures[index]), shape)


def open_toy(config) -> ImageDataset:
    """Faces drawn by code (dataset/toy.py): nothing to download."""
    shape = PictureShape.of_config(config)
    return ImageDataset(partial(_draw, shape=shape), TOY_LENGTH, f"{TOY_LENGTH} drawn faces at {config.imsize} px",
                        [toy.__file__], _toy_labels)


@cache
def _toy_labels() -> Labels:
    faces = map(toy.face_traits, range(TOY_LENGTH))
    return Labels(tuple(toy.CLASSES), np.fromiter(map(toy.face_class, faces), np.int64, TOY_LENGTH))


def _draw(index: int, shape: PictureShape) -> torch.Tensor:
    face = toy.draw_face(index, max(shape.height, shape.width), transparent=shape.channels == "rgba")
    return to_tensor(Image.fromarray(face), shape)


DATASETS = {  # --dataset: the function that opens it
    "celeb": open_celeb,
    "lsun": open_lsun,
    "cifar10": open_cifar10,
    "folder": open_folder,
    "toy": open_toy,
}


def fingerprint(dataset: ImageDataset, config) -> str:
    """Hex SHA-256 of everything that determines picture i: the files, their order, the crop, the size, the options.

    Files are identified by absolute path, size and modification time; their content is not read (stat alone takes
    seconds for 200,000 files). So a changed file of the same size whose modification time was reset is not noticed,
    and a moved or copied folder counts as a different data set. Raises DataError if a file is missing.
    """
    shape = PictureShape.of_config(config)
    digest = hashlib.sha256(repr((config.dataset, shape.key, CELEBA_CROP, len(dataset))).encode())
    if dataset.options:
        digest.update(repr(dataset.options).encode())
    for path in dataset.sources:
        file = stat_file(path)
        digest.update(repr((os.path.abspath(path), file.st_size, file.st_mtime_ns)).encode())
    return digest.hexdigest()


# ---- a set and a later one ----

_SIZE_BITS = 24  # of an identity: the lower ones, see ImageDataset.identities


def summarize(dataset: ImageDataset, config, labelled: bool = False) -> dict:
    """Return a record of the data set to compare a later one with, such as one that a checkpoint keeps.

    {"dataset", "folder", "pictures": their number, "identities"}: the last is text, 11 letters per picture. If
    `labelled`, with "labels", the class of each picture in the order of the identities, 6 letters per picture. Pictures
    of --holdout count too: which ones they are changes with the number of pictures. Raises DataError if a file is
    missing.
    """
    if config.holdout and isinstance(dataset, Subset):
        dataset = dataset.whole
    folder = "" if config.dataset == "toy" else os.path.abspath(config.image_path)
    order = np.argsort(dataset.identities, kind="stable")
    record = {"dataset": config.dataset, "folder": folder, "pictures": len(dataset),
              "identities": _as_text(dataset.identities[order], "<i8")}
    return {**record, "labels": _as_text(dataset.labels.numbers[order], "<i4")} if labelled else record


def _as_text(numbers: np.ndarray, kind: str) -> str:
    return base64.b64encode(numbers.astype(kind).tobytes()).decode()


def _identities(record: dict) -> np.ndarray:
    """Return the pictures of a record, int64 (pictures,), sorted."""
    return np.frombuffer(base64.b64decode(record["identities"]), "<i8")


def count_relabelled(before: dict, now: dict) -> tuple[int, int]:
    """Return (how many pictures have another class in the record `now` than in `before`, how many could be compared):
    none without labels in both, and none of those whose name and size another picture has, too.
    """
    if "labels" not in before or "labels" not in now:
        return 0, 0
    found = []
    for record in (before, now):
        identities, first, count = np.unique(_identities(record), return_index=True, return_counts=True)
        numbers = np.frombuffer(base64.b64decode(record["labels"]), "<i4")
        found.append((identities[count == 1], numbers[first][count == 1]))
    (old, old_classes), (new, new_classes) = found
    _, at_old, at_new = np.intersect1d(old, new, assume_unique=True, return_indices=True)
    return int((old_classes[at_old] != new_classes[at_new]).sum()), len(at_old)


def describe_changes(before: dict, now: dict) -> str | None:
    """Return how two records of `summarize` differ, such as `14 pictures, were 10: 5 added, 1 gone`; None if they do
    not. Pictures of the same name and size count as the same, wherever their folder is.
    """
    parts = []
    if now["dataset"] != before["dataset"]:
        parts.append(f"--dataset is {now['dataset']}, was {before['dataset']}")
    if now["folder"] != before["folder"] and now["folder"] and before["folder"]:
        parts.append(f"the folder is {printable(now['folder'])}, was {printable(before['folder'])}")
    old, new = map(_identities, (before, now))
    if not np.array_equal(old, new):
        added, gone, changed = _count_changes(old, new)
        words = [f"{count} {word}" for count, word in ((added, "added"), (gone, "gone"), (changed, "changed")) if count]
        parts.append(f"{len(new)} pictures, were {len(old)}: {', '.join(words)}")
    return "; ".join(parts) or None


def are_same(before: dict, now: dict) -> bool:
    """Return whether two records of `summarize` have the same pictures, by name and size."""
    return np.array_equal(_identities(before), _identities(now))


def is_other_set(before: dict, now: dict) -> bool:
    """Return whether two records of `summarize` have no picture in common: none of the same name and size."""
    return not np.isin(_identities(before), _identities(now)).any()


def _count_changes(old: np.ndarray, new: np.ndarray) -> tuple[int, int, int]:
    """Return how many pictures were added, are gone, and have another size under the same name."""
    only_old, only_new = np.setdiff1d(old, new, True), np.setdiff1d(new, old, True)
    changed = int(np.isin(only_new >> _SIZE_BITS, only_old >> _SIZE_BITS).sum())
    return len(only_new) - changed, len(only_old) - changed, changed
