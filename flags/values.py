"""Converters of what is typed for a flag: text -> value, or argparse.ArgumentTypeError; and back, `written`."""

import argparse
import difflib
import os
import re

from flags.scores import METRICS

MOST_SEEDS = 1_000_000      # of --seeds


def boolean(text):
    """Convert true/false/1/0/yes/no, in any case, to bool; raise ArgumentTypeError for anything else."""
    word = str(text).lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def boolean_or_auto(text):
    """'auto' -> "auto"; else as `boolean`."""
    if str(text).lower() == "auto":
        return "auto"
    try:
        return boolean(text)
    except argparse.ArgumentTypeError as error:
        raise argparse.ArgumentTypeError(f"{error} nor auto") from None


def number_or(word, kind):
    """Return a converter that accepts `word` and whole numbers; `kind` names the numbers in its error message."""

    def convert(text):
        if text == word:
            return text
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is neither a {kind} nor {word}") from None

    return convert


def sizes(text):
    """'16,32' -> (16, 32), sorted, each once; 'none' -> ()."""
    if str(text).lower() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a list of sizes such as 16,32 nor none") from None


def points(text):
    """'0.45,0.36;0.2,0.5' -> ((0.45, 0.36), (0.2, 0.5)): one to eight (y, x) as fractions of the image."""
    try:
        pairs = tuple(tuple(float(part) for part in point.split(",")) for point in text.split(";"))
    except ValueError:
        pairs = ()
    if not 1 <= len(pairs) <= 8 or not all(len(point) == 2 and all(0 <= x <= 1 for x in point) for point in pairs):
        raise argparse.ArgumentTypeError(f"'{text}' is not one to eight points y,x;y,x in fractions of the image, "
                                         "such as '0.45,0.36;0.2,0.5'")
    return pairs


def policies(text):
    """'color,translation' -> ("color", "translation"); 'none' -> ()."""
    if str(text).lower() == "none":
        return ()
    return tuple(_AUGMENTATION(part) for part in text.split(","))


def run_or_file(text):
    """'models/a/' -> "models/a": the name of a run or the path of a file, written in one way."""
    return os.path.normpath(text) if text else text


def seeds(text):
    """'3,9-11' -> (3, 9, 10, 11), each once."""
    found = []
    for part in str(text).split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part, re.ASCII)
        first, last = (int(match[1]), int(match[2] or match[1])) if match else (1, 0)
        if not first <= last < 2**63:
            raise argparse.ArgumentTypeError(f"'{text}' is not a list of seeds such as 3,5,9-20")
        if len(found) + last - first >= MOST_SEEDS:
            raise argparse.ArgumentTypeError(f"'{text}' are more than {MOST_SEEDS:,} seeds")
        found += range(first, last + 1)
    return tuple(dict.fromkeys(found))


def names(text):
    """'3,tabby' -> ("3", "tabby")."""
    return tuple(dict.fromkeys(part.strip() for part in text.split(",")))


def metrics(text):
    """'fid,kid' -> ("fid", "kid"), each once."""
    return tuple(dict.fromkeys(_METRIC(part) for part in text.split(",")))


def one_of(*names):
    """Return a converter that accepts these names only; its error message suggests the nearest one."""

    def convert(text):
        if text in names:
            return text
        # of short names a swap of two letters is 0.67
        nearest = difflib.get_close_matches(text, names, n=1, cutoff=0.7 if len(text) > 4 else 0.6)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    return convert


whole_or_auto, step_or_best = number_or("auto", "whole number"), number_or("best", "step")
_AUGMENTATION = one_of("color", "translation", "mirror", "cutout")
_METRIC = one_of(*METRICS)


def written(value):
    """Return a setting's value as text in command-line syntax."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        nested = value and isinstance(value[0], (tuple, list))
        return (";" if nested else ",").join(map(written, value)) or "none"
    return str(value)
