"""Scores: the values of a metric with their protocol, and the table of all scores (scores.jsonl, scores.md).

The protocol describes everything that determines a value except the scored pictures. Scores are comparable if their
protocols are the same text.
"""

import json
import math
import time
from dataclasses import dataclass
from pathlib import Path

from storage.journal import open_to_add
from utils import write_atomically


@dataclass(frozen=True)
class Score:
    """`values`, {name: float}, measured under `protocol`; `source` describes the scored pictures, such as G_ema's."""

    values: dict
    protocol: str
    source: str

    def line(self):
        """Return the entries of its line in metrics.jsonl, without the step."""
        return {**self.values, "protocol": self.protocol, "source": self.source}


def better_fid(scores, best):
    """Return the entry of best.pth, {"fid", "protocol", "source"}, if `scores` have a lower FID than `best`, else None.

    `best` is the present entry or None. If its protocol or source differs, the two are not comparable, and the new FID
    replaces it.
    """
    for score in scores:
        if "fid" in score.values and not (best and best["fid"] <= score.values["fid"] and same_kind(score, best)):
            return {"fid": score.values["fid"], "protocol": score.protocol, "source": score.source}
    return None


def same_kind(score, best):
    """Whether a Score and the entry of best.pth are comparable."""
    return (score.protocol, score.source) == (best["protocol"], best["source"])


def record(log_path, name, step, scores):
    """Append scores of `name` (a run or a folder) to <log_path>/scores.jsonl and rewrite scores.md, the table of all.

    Return these scores as lines of Markdown. Raises OSError.
    """
    entries = [{"name": name, "step": step, "taken": time.strftime("%Y-%m-%d %H:%M"), **score.line()}
               for score in scores]
    folder = Path(log_path)
    folder.mkdir(parents=True, exist_ok=True)
    with open_to_add(folder / "scores.jsonl") as file:      # several programs may append whole lines at once
        file.write("".join(json.dumps(entry) + "\n" for entry in entries))
    text = "\n".join([
        "# Scores", "", "Rows of one table are comparable: they share the protocol above it. Rows of different tables "
        "are not.", "", *tables(_read(folder / "scores.jsonl"))]) + "\n"
    write_atomically(folder / "scores.md", lambda path: path.write_text(text, encoding="utf-8"))
    return tables(entries)


def _read(path):
    """Return the entries of scores.jsonl without damaged lines; only the last per (protocol, name, step, source)."""
    entries = {}
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            entry = json.loads(line)
        except ValueError:
            continue
        if _is_valid(entry):
            key = tuple(entry[part] for part in ("protocol", "name", "step", "source"))
            entries.pop(key, None)
            entries[key] = entry
    return list(entries.values())


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
            if isinstance(value, (int, float)) and key != "step" and not key.endswith("_std")))
        lines += [protocol + ".", ""]
        lines += _table(["", "step", *columns, "source", "date"], [
            [_cell(row["name"]), "" if row["step"] is None else f"{row['step']:,}",
             *(_number(row, column) for column in columns), _cell(row["source"]), row["taken"]] for row in rows])
        lines.append("")
    return lines


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
    """Format a value: '41.21', '0.0123 ± 0.0004' with its standard deviation, or '' if there is none."""
    value, std = row.get(column), row.get(f"{column}_std")
    if value is None:
        return ""
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return str(value)
    size = max(abs(value), abs(std or 0))
    digits = max(0, min(5, 3 - math.floor(math.log10(size)))) if size else 3
    return f"{value:,.{digits}f}" + ("" if std is None else f" ± {std:,.{digits}f}")
