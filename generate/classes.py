"""The classes of a conditional run: names, how frequent they are, which of them a grid shows."""

import hashlib
import os
import re
from dataclasses import dataclass

import torch

from dataset.decode import printable
from errors import DataError, UsageError
from utils import spread_indices

LISTED = 12                 # classes that are named in a line, at most
UNEVEN = 3          # times as many pictures in the largest class as in the smallest: worth a note
FOLDER_BYTES = 150          # of a folder's name, to which file names add some; file systems allow 255
LONGEST_SUFFIX = 40         # letters


@dataclass(frozen=True)
class Classes:
    """`names` of the classes, in the order of their numbers, and `counts`, the training pictures of each."""

    names: tuple
    counts: tuple

    def __len__(self):
        return len(self.names)

    @classmethod
    def of(cls, labels):
        """The classes of a data set's Labels; None if it has none."""
        return labels and cls(tuple(labels.names), tuple(int(count) for count in labels.counts))

    def state(self):
        """Return what a checkpoint keeps."""
        return {"names": list(self.names), "counts": list(self.counts)}

    @classmethod
    def from_state(cls, state):
        """The classes of a checkpoint; None for a run without classes, such as those of older versions."""
        return state and cls(tuple(state["names"]), tuple(state["counts"]))

    def lines(self):
        """Return what a user should know of the classes, one line each."""
        ordered = sorted(zip(self.counts, self.names, strict=True), key=lambda pair: pair[0])
        (least, small), (most, large) = ordered[0], ordered[-1]
        sizes = f"of {least} pictures each" if least == most else (
            f"of {least} ({printable(small)}) to {most} ({printable(large)}) pictures")
        lines = [f"classes: {len(self)}, {sizes}: {_joined(self.names[:LISTED])}{', ...' * (len(self) > LISTED)}"]
        few = [name for count, name in ordered if count == 1]
        if few:
            lines.append(f"warning: {_listed(few)} {'has' if len(few) == 1 else 'have'} one picture, which G will "
                         "memorize")
        none = [name for count, name in ordered if count == 0]
        if none:
            lines.append(f"warning: {_listed(none)} {'has' if len(none) == 1 else 'have'} no picture and will not be "
                         "learned")
        return lines

    @property
    def present(self):
        """The numbers of the classes that have pictures, int64 (·,)."""
        return torch.tensor(self.counts).nonzero().flatten()

    def draw(self, count, generator):
        """Draw labels (count,) as frequent as in the data, with a CPU `generator`."""
        return torch.multinomial(torch.tensor(self.counts, dtype=torch.float64), count, True, generator=generator)

    def choose(self, names, limit=None):
        """Return the numbers of the classes that `--classes` asks for, names or numbers, each once; None and "all"
        mean all.

        With a `limit`, a spread of at most so many. Raises UsageError, also for a class without pictures.
        """
        numbers = self.present.tolist() if names in (None, ("all",)) else list(dict.fromkeys(map(self._number, names)))
        for number in numbers:
            if not self.counts[number]:
                raise UsageError(f"--classes {printable(self.names[number])}: has no pictures, so G cannot learn it; "
                                 "leave it out")
        return numbers if limit is None else [numbers[index] for index in spread_indices(limit, len(numbers))]

    def suffix(self, names):
        """Return what `--classes` adds to the name of a file: the classes' numbers; of many, how many and a digest."""
        numbers = "-".join(map(str, self.choose(names)))
        if len(numbers) > LONGEST_SUFFIX:
            numbers = f"{numbers.count('-') + 1}_{hashlib.sha256(numbers.encode()).hexdigest()[:8]}"
        return f"_classes{numbers}"

    def _number(self, name):
        if name in self.names:                          # a name first: classes may be called 7 and 3
            return self.names.index(name)
        if name.isdecimal() and int(name) < len(self):
            return int(name)
        if name in ("", "all"):
            raise UsageError(f"--classes: {'an empty name' if not name else 'all goes alone'}; give names or numbers, "
                             "parted by commas, or all")
        more = f" and {len(self) - 20} more" if len(self) > 20 else ""
        raise UsageError(f"--classes {printable(name)}: there is no such class; this run has "
                         f"{_joined(self.names[:20])}{more}, or numbers from 0 to {len(self) - 1}"
                         + "; each is given by itself, without ranges" * bool(re.fullmatch(r"\d+-\d+", name))
                         + "; commas part names, so give the number of one with a comma" * any(
                             "," in name for name in self.names))

    def folder_names(self, numbers):
        """Return a name for the folder of each of these classes: its own, where a file system allows it."""
        plain = [_as_folder(name) for name in self.names]
        lower = [name.lower() for name in plain]        # some file systems ignore case
        taken = {name for name in lower if name and lower.count(name) == 1}
        names = {}
        for number, name in enumerate(plain):
            if name.lower() not in taken:
                name = f"{number}_{name}".rstrip("_")
                while name.lower() in taken:
                    name = f"{name}_"
                taken.add(name.lower())
            names[number] = name
        return [names[number] for number in numbers]

    def captions(self, labels):
        """Return the name of each of the labels (N,); of shares of the classes (N, classes) the two largest.

        A name beyond ASCII comes after its number, as pictures cannot show all letters.
        """
        if not labels.is_floating_point():
            return tuple(map(self._caption, labels.tolist()))
        shares, numbers = labels.cpu().topk(min(2, len(self)))
        return tuple(", ".join(f"{share:.0%} {self._caption(number)}"
                               for share, number in zip(*row, strict=True) if share >= 0.005)
                     for row in zip(shares.tolist(), numbers.tolist(), strict=True))

    def _caption(self, number):
        name = self.names[number]
        return printable(name) if name.isascii() else f"{number}: {printable(name)}"

    def rows(self, side, names=None):
        """Return labels (side * side,) of a grid with one class a row; with few classes, several rows a class."""
        chosen = torch.tensor(self.choose(names, side))
        return chosen[torch.arange(side) * len(chosen) // side].repeat_interleave(side)


def require_classes(classes):
    """Return the Classes of a run. Raise UsageError if it has none."""
    if classes is None:
        raise UsageError("--classes: this run has no classes; leave it out")
    return classes


def _as_folder(name):
    """Return a class's name as the name of a folder, without what some file system does not allow; it may be empty."""
    name = re.sub(r'[<>:"/\\|?*\x00-\x1f]', "_", name)
    try:
        encoded = os.fsencode(name)
    except UnicodeEncodeError:                          # half of a surrogate pair, which JSON can hold
        encoded = name.encode(errors="replace").replace(b"?", b"_")
    if len(encoded) > FOLDER_BYTES:
        encoded = encoded[:FOLDER_BYTES].decode(errors="ignore").encode()
    return os.fsdecode(encoded).strip(". ")


def find_classes(config, dataset):
    """Return the Classes of the data set as `--conditional` asks for them, or None.

    Raise DataError if there are none and must be, or if labels are wrong.
    """
    labels = dataset.labels if config.conditional is not False else None
    asking = "--conditional true" if config.conditional is True else "--balance true" if config.balance else None
    if labels is None and asking:
        where = config.dataset if config.dataset in ("toy", "celeb") else printable(config.image_path)
        raise DataError(f"{asking}: {where} has no labels.\n{dataset.advice_on_labels()}")
    return Classes.of(labels)


def lines_on_classes(config, dataset, classes):
    """Return what a user should know of the Classes, or of why there are none, one line each."""
    if classes:
        return classes.lines() + _lines_on_training(config, classes)
    stray = dataset.stray() if config.conditional == "auto" else None
    return [f"note: training without classes, as {stray}"] if stray else []


def _lines_on_training(config, classes):
    """Return what in the flags does not suit these Classes, one line each."""
    lines, counts = [], [count for count in classes.counts if count]
    if max(counts) > UNEVEN * min(counts) and not config.balance:
        lines.append("note: G draws all classes equally often, D sees them as often as there are pictures, and can "
                     "tell by that; --balance true trains D on all equally often, too")
    if config.metadata:
        lines.append("note: the metadata of an image are those of a picture of any class; with classes all was "
                     "measured with --metadata false")
    return lines


def describe_changes(before, now):
    """Return how the classes `now` differ from those `before`, in names or order; None if they do not."""
    old, new = (() if classes is None else classes.names for classes in (before, now))
    if old == new:
        return None
    if not old or not new:
        return f"{len(new) or 'no'} classes, were {len(old) or 'none'}"
    parts = [f"{word} {_joined(names[:5])}{' ...' * (len(names) > 5)}" for word, names in (
        ("new:", [name for name in new if name not in old]), ("gone:", [name for name in old if name not in new]))
        if names]
    numbers = [f"{len(new)} classes, were {len(old)}"] if len(new) != len(old) else []
    if not parts:
        moved = [f"{printable(name)} is now {number}, was {old.index(name)}" for number, name in enumerate(new)
                 if old[number] != name]
        parts = [f"in another order: {', '.join(moved[:3])}{', ...' * (len(moved) > 3)}"]
    return "; ".join(numbers + parts)


def _listed(names):
    more = f" and {len(names) - 5} more" * (len(names) > 5)
    return f"{'class' if len(names) == 1 else 'classes'} {_joined(names[:5])}{more}"


def _joined(names):
    return ", ".join(map(printable, names))             # folders may have line breaks in their names
