"""Scores: the values of a metric with their protocol, and the table of all scores (scores.jsonl, scores.md).

The protocol describes everything that determines a value except the scored pictures. Scores are comparable if their
protocols are the same text.
"""

import json
import math
import time
from dataclasses import dataclass, field
from pathlib import Path

from storage.journal import open_to_add
from utils import write_atomically

# Which way is better, for scores whose names are known, alone or with that of a network, as in fd_vgg16.
LOWER = ("fid", "fd", "kid", "ifid", "swd", "lpips")
HIGHER = ("precision", "recall", "density", "coverage", "is", "inception_score")
BESIDE = ("_std", "_low", "_high")      # suffixes of what is shown beside a value: standard deviation, 95 % interval
_LEGEND = (
    "Rows of one table are comparable: they share the protocol above it. Rows of different tables are not.", "",
    "In brackets: the 95 % interval for the choice of the generated pictures. floor: the same score between two random "
    "halves of the real pictures. coverage: of 5 nearest neighbours. ±: one standard deviation, over KID's subsets, "
    "the splits of the Inception Score, or pictures.")


@dataclass(frozen=True)
class Score:
    """`values`, {name: float}, measured under `protocol`; `source` describes the scored pictures, such as G_ema's.

    `by_class`, {name: {class: float}}: of a value that is a mean over classes, those that it is the mean of. Lower ones
    are better.
    """

    values: dict
    protocol: str
    source: str
    by_class: dict = field(default_factory=dict)

    def line(self):
        """Return the entries of its line in metrics.jsonl, without the step."""
        return {**self.summary(), **({"by_class": self.by_class} if self.by_class else {})}

    def summary(self):
        """Return the entries of its line in scores.jsonl: of values by class only which are the best and the worst.

        Nothing that a table of all scores shows is left out, and a thousand classes would be a thousand numbers.
        """
        ends = {f"{name}_{end}": where for name in self.by_class
                for end, where in zip(("best", "worst"), self.ends(name), strict=True)}
        return {**self.values, **ends, "protocol": self.protocol, "source": self.source}

    def ends(self, name):
        """Return the classes of the lowest and of the highest value."""
        values = self.by_class[name]
        return min(values, key=values.get), max(values, key=values.get)


def better_score(scores, best, names):
    """Return the entry of best.pth if `scores` are better than its present entry `best`, else None.

    The first of `names` that was measured decides; of these a lower value is better. An entry is {"metric": name, name:
    value, "protocol": str, "source": str}. If the metric, protocol or source of `best` differs, the two are not
    comparable, and the new one replaces it.
    """
    for name in names:
        for score in scores:
            if name in score.values:
                entry = {"metric": name, name: score.values[name], "protocol": score.protocol, "source": score.source}
                return None if best and comparable(entry, best) and best[name] <= entry[name] else entry
    return None


def comparable(entry, best):
    """Whether two entries of best.pth are of one metric, protocol and source."""
    return all(entry[part] == best[part] for part in ("metric", "protocol", "source"))


def as_entries(name, step, scores):
    """Return the lines of scores.jsonl, dicts, for scores of `name`, a run or a folder, which has no step: None."""
    return [{"name": name, "step": step, "taken": time.strftime("%Y-%m-%d %H:%M"), **score.summary()}
            for score in scores]


def record(log_path, entries):
    """Append `entries` to <log_path>/scores.jsonl and rewrite scores.md, the table of all. Raises OSError."""
    folder = Path(log_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open_to_add(folder / "scores.jsonl") as file:      # several programs may append whole lines at once
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))
    text = "\n".join(["# Scores", "", *_LEGEND, "", *tables(_read(folder / "scores.jsonl"))]) + "\n"
    # a name may be that of a folder, and that need not be UTF-8
    write_atomically(folder / "scores.md",
                     lambda path: path.write_text(text, encoding="utf-8", errors="backslashreplace"))


def rename(log_path, name, new):
    """Show the scores of the run `name` under its `new` name, as it was moved aside. Raises OSError."""
    _note(log_path, name, {"renamed": new})


def give_up_after(log_path, name, step):
    """Show no scores of the run `name` later than `step`: it goes on from there, and is another run from then on.

    scores.jsonl keeps them. Raises OSError.
    """
    _note(log_path, name, {"given_up_after": step})


def _note(log_path, name, change):
    """Record what happened to a run, if that changes the table."""
    path = Path(log_path) / "scores.jsonl"
    change = {"name": name, **change}
    if path.exists() and (entries := _read(path)) != _apply(change, entries):
        record(log_path, [change])


def _apply(change, entries):
    """Return the entries as they are after `change`, the line of a `rename` or a `give_up_after`."""
    name, new, last = (change.get(key) for key in ("name", "renamed", "given_up_after"))
    if isinstance(new, str):
        return [{**entry, "name": new} if entry["name"] == name and entry["step"] is not None else entry
                for entry in entries]               # those without a step are of a folder of this name
    if isinstance(last, int):
        return [entry for entry in entries if entry["name"] != name or entry["step"] is None or entry["step"] <= last]
    return entries


def _read(path):
    """Return the entries of scores.jsonl without damaged lines; those of one (protocol, name, step, source) as one.

    Of a score that was measured twice the last counts.
    """
    entries = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if _is_valid(entry):
            entries.append(entry)
        elif isinstance(entry, dict):
            entries = _apply(entry, entries)
    merged = {}
    for entry in entries:
        key = tuple(entry[part] for part in ("protocol", "name", "step", "source"))
        merged[key] = {**merged.pop(key, {}), **entry}
    return list(merged.values())


def _is_valid(entry):
    return (isinstance(entry, dict) and "step" in entry and isinstance(entry["step"], (int, type(None)))
            and all(isinstance(entry.get(part), str) for part in ("protocol", "name", "source", "taken")))


def tables(entries):
    """Return lines of Markdown: for each protocol its text and a table of its entries, sorted by name and step.

    Names keep the order of their first entry.
    """
    lines = []
    for protocol in dict.fromkeys(entry["protocol"] for entry in entries):
        rows = [entry for entry in entries if entry["protocol"] == protocol]
        names = list(dict.fromkeys(entry["name"] for entry in rows))
        rows.sort(key=lambda entry: (names.index(entry["name"]), entry["step"] or 0))
        columns = list(dict.fromkeys(
            key for row in rows for key, value in row.items()
            if isinstance(value, (int, float)) and key != "step" and not is_beside_another(key, row)))
        lines += [protocol + ".", ""]
        lines += _table(["", "step", *columns, "source", "date"], [
            [_cell(row["name"]), "" if row["step"] is None else f"{row['step']:,}",
             *(_number(row, column) for column in columns), _cell(row["source"]), row["taken"]] for row in rows])
        lines += ["", *_directions(columns)]
    return lines


def sign_of(name):
    """Return -1 for a score where lower is better, 1 where higher is, 0 for one of unknown meaning."""
    words = {name, *name.split("_")}
    return -1 if words & set(LOWER) else 1 if words & set(HIGHER) else 0


def _directions(columns):
    """Return lines on which way is better, for those columns of which it is known."""
    named = [column for column in columns if not column.endswith("_floor")]
    words = [f"{way} is better: {', '.join(names)}" for way, sign in (("lower", -1), ("higher", 1))
             if (names := [name for name in named if sign_of(name) == sign])]
    return [f"({'; '.join(words)})", ""] if words else []


def is_beside_another(key, values):
    """Whether this is the standard deviation or an end of the interval of another value."""
    return any(key.endswith(suffix) and key.removesuffix(suffix) in values for suffix in BESIDE)


def in_words(values):
    """Return values as one line: `fid 41.2 (39.9 to 42.6), kid 0.012`; without standard deviations and floors."""
    parts = []
    for name, value in values.items():
        if not is_beside_another(name, values) and not name.endswith("_floor"):
            low, high = values.get(f"{name}_low"), values.get(f"{name}_high")
            parts.append(f"{name} {value:.4g}" + ("" if low is None else f" ({low:.4g} to {high:.4g})"))
    return ", ".join(parts)


def _table(head, rows):
    """Return the lines of a Markdown table, padded to be readable in a terminal; numbers are right-aligned."""
    left = (0, len(head) - 2, len(head) - 1)
    widths = [max(3, *(len(row[i]) for row in [head, *rows])) for i in range(len(head))]

    def line(cells):
        return "| " + " | ".join(cell.ljust(width) if i in left else cell.rjust(width) for i, (cell, width)
                                 in enumerate(zip(cells, widths, strict=True))) + " |"

    rule = ["-" * width if i in left else "-" * (width - 1) + ":" for i, width in enumerate(widths)]
    return [line(head), line(rule), *map(line, rows)]


def _cell(text):
    """Escape text for a table cell."""
    return str(text).replace("|", "\\|").replace("\n", " ")


def _number(row, column):
    """Format a value: '41.21 (39.90 to 42.60)' with its interval, else '0.0123 ± 0.0004' with its standard deviation;
    '' if there is none.
    """
    value, std, low, high = (row.get(f"{column}{suffix}") for suffix in ("", *BESIDE))
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = max(abs(value), abs(std or 0), 0 if None in (low, high) else high - low)
    digits = max(0, min(5, 3 - math.floor(math.log10(size)))) if size else 3
    text = f"{value:,.{digits}f}"
    if None not in (low, high):
        return f"{text} ({low:,.{digits}f} to {high:,.{digits}f})"
    return text + ("" if std is None else f" ± {std:,.{digits}f}")
