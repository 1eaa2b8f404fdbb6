"""The classes of a data set's pictures: from subfolders, or from a dataset.json."""

import json
import os
import posixpath
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from dataset.decode import printable
from device.distributed import say
from errors import DataError

FILE = "dataset.json"  # beside the pictures or above them, see find()
MOST_CLASSES = 100_000  # a larger number is no class, but an identity or a mistake


@dataclass(frozen=True, eq=False)
class Labels:
    """`names` of the classes in the order of their numbers, and `numbers`, int64 (N,): the class of each picture."""

    names: tuple[str, ...]
    numbers: np.ndarray

    @property
    def counts(self) -> np.ndarray:
        """The pictures of each class, int64 (len(names),)."""
        return np.bincount(self.numbers, minlength=len(self.names))

    def subset(self, indices: Sequence[int] | np.ndarray) -> "Labels":
        """Return the labels of the pictures at `indices`, with the names of all classes."""
        return Labels(self.names, self.numbers[indices])

    def among(self, names: Sequence[str]) -> np.ndarray:
        """Return the class of each picture, int64 (N,): the place of its name in `names`, -1 if it is not there."""
        place = {name: number for number, name in enumerate(names)}
        return np.array([place.get(name, -1) for name in self.names], np.int64)[self.numbers]


def tops(paths: Sequence[str]) -> list[str]:
    """Return the folders that count as the top folder of the pictures at `paths`: "", then the subfolder that has all
    of them, as "a/", then the one in it, as "a/b/".
    """
    common = os.path.commonprefix([min(paths), max(paths)])
    return [""] + [common[:place + 1] for place, letter in enumerate(common) if letter == "/"]


def _below_the_top(paths: Sequence[str]) -> list[str]:
    """Return the paths from the innermost of their `tops` on."""
    skip = len(tops(paths)[-1])
    return [path[skip:] for path in paths]


def find(paths: Sequence[str], read: Callable[[str], bytes | None], is_file: Callable[[str], bool],
         home: str | os.PathLike) -> Labels | None:
    """Return the labels of the pictures at `paths` below `home`: those of a dataset.json in one of their `tops`, the
    outermost first, else one class per subfolder; None if there is neither.

    `paths` have forward slashes. `read(path)` returns the content of a file, None if it is not there. Raises DataError.
    """
    for top in tops(paths):
        data = read(f"{top}{FILE}")
        if data is not None:
            return from_json(data, [path[len(top):] for path in paths], lambda path, top=top: is_file(f"{top}{path}"),
                             f"{home}/{top}{FILE}")
    return from_folders(paths)


def from_folders(paths: Sequence[str]) -> Labels | None:
    """Return one class per subfolder of the top folder; None if a picture is in none, or there is only one.

    `paths` are as in `find`; the innermost of their `tops` is the top folder. What is nested deeper belongs to its
    subfolder. The classes are sorted by name, by value if all names are numbers.
    """
    folders = [path.partition("/")[0] if "/" in path else None for path in _below_the_top(paths)]
    names = set(folders)
    if None in names or len(names) < 2:
        return None
    ordered = sorted(names)
    if all(name.isdecimal() for name in ordered):
        ordered.sort(key=int)  # 2 before 10
    number = {name: place for place, name in enumerate(ordered)}
    return Labels(tuple(ordered), np.fromiter((number[name] for name in folders), np.int64, len(paths)))


HOW = ('Put the pictures of each class into a subfolder of its own, or add a dataset.json: {"labels": [["a/1.jpg", 0], '
       "...]}")


def find_stray(paths: Sequence[str]) -> str | None:
    """Return in words what keeps several subfolders from being classes: pictures in none of them; else None."""
    paths = _below_the_top(paths)
    stray = [path for path in paths if "/" not in path]
    folders = {path.partition("/")[0] for path in paths if "/" in path}
    if len(folders) < 2 or not stray:
        return None
    return (f"{len(stray)} of {len(paths)} pictures {'is' if len(stray) == 1 else 'are'} in none of the {len(folders)} "
            f"subfolders, such as {printable(stray[0])}")


def from_json(data: bytes, paths: Sequence[str], is_file: Callable[[str], bool], name: str) -> Labels | None:
    """Return what a dataset.json says of the pictures at `paths`, in their order; None if its labels are null.

    `{"labels": [["folder/1.jpg", 0], ...]}`, the convention of StyleGAN2-ADA: paths below the top folder, whole
    numbers. The classes are 0 to the largest number, and those numbers are their names, unless the file also has their
    names in order: `"classes": ["cat", "dog"]`. An entry may name a file that is not read as a picture, if
    `is_file(path)`. Entries of files that are not there, such as deleted ones, are counted in a note. Raises
    DataError, which calls the file `name`.
    """
    try:
        content = json.loads(data)
    except (ValueError, RecursionError) as error:
        raise unusable(name, f"is not JSON ({printable(error)})") from None
    if not isinstance(content, dict) or "labels" not in content:
        raise unusable(name, 'has no "labels"; it must be {"labels": [["a/1.jpg", 0], ...]}')
    if content["labels"] is None:
        return None
    number = _numbers(content["labels"], name)  # {path: class}
    pictures = set(paths)
    left_out = [path for path in paths if path not in number]
    if left_out:
        raise unusable(name, f"leaves out {_some(left_out, len(paths), 'there')}")
    gone = [path for path in number if path not in pictures and not is_file(path)]
    if gone:
        say(f"note: {printable(name)} names {_some(gone, len(number), 'not there')}")
    numbers = np.fromiter((number[path] for path in paths), np.int64, len(paths))
    return Labels(_names(content.get("classes"), int(max(number.values())) + 1, name), numbers)


def _numbers(entries: object, name: str) -> dict[str, int]:
    if not isinstance(entries, list):
        raise unusable(name, 'has "labels" that are not a list; it must be {"labels": [["a/1.jpg", 0], ...]}')
    wrong = [(entry, problem) for entry in entries if (problem := _problem(entry))]
    if wrong:
        entry, problem = wrong[0]
        raise unusable(name, f"has {len(wrong)} of {len(entries)} entries that cannot be used, the first: "
                             f"{printable(json.dumps(entry)[:100])} {problem}")
    number, twice = {}, {}
    for path, label in entries:
        path = posixpath.normpath(path)  # ./a/1.jpg is a/1.jpg
        if number.setdefault(path, label) != label:
            twice.setdefault(path, label)
    if twice:
        path, label = next(iter(twice.items()))
        raise unusable(name, f"gives {len(twice)} of {len(number)} files more than one class, such as "
                             f"{printable(path)}: {number[path]} and {label}")
    return number


def _problem(entry: object) -> str | None:
    """Return what is wrong with an entry of "labels", or None."""
    if not isinstance(entry, list) or len(entry) != 2 or not isinstance(entry[0], str):
        return 'is not ["path", class]'
    if posixpath.normpath(entry[0]).startswith(("../", "/")):
        return "lies outside the folder of the pictures"
    label = entry[1]
    if isinstance(label, list):
        return "has several labels; a picture has one, a whole number"
    if not isinstance(label, int) or isinstance(label, bool) or label < 0:
        return "has a label that is no whole number from 0 on"
    return f"has a label of {MOST_CLASSES:,} or more; classes are numbered 0, 1, 2, ..." if label >= MOST_CLASSES else \
        None


def _names(names: object, least: int, name: str) -> tuple[str, ...]:
    """Return the names of all classes. `least`: one more than the largest number."""
    if names is None:
        return tuple(map(str, range(least)))
    if not isinstance(names, list) or not all(isinstance(one, str) and one for one in names):
        raise unusable(name, 'has "classes" that are not a list of names')
    if len(names) < least:
        raise unusable(name, f'has {len(names)} "classes", but labels up to {least - 1}, which need {least}')
    if len(set(names)) < len(names):
        twice = next(one for place, one in enumerate(names) if one in names[:place])
        raise unusable(name, f'has the name {printable(twice)} twice in "classes"')
    return tuple(names)


def _some(paths: list[str], count: int, where: str) -> str:
    """Return in words how many of `count` pictures these are, where they are, and the first of them."""
    return (f"{len(paths)} of {count} pictures that {'is' if len(paths) == 1 else 'are'} {where}: "
            f"{printable(paths[0])}{', ...' * (len(paths) > 1)}")


def unusable(name: str, problem: str) -> DataError:
    """Return the error for a dataset.json `name` with this problem."""
    return DataError(f"{printable(name)} {problem}\ncorrect it, or train without classes: --conditional false")
