"""The pages that a run is looked at with: samples/<version>/index.html, and samples/index.html over all runs.

Each is one file that opens by double click: `page.html` beside this file, with what it shows put in as JSON. The
pictures stay where they are, as relative links. Whatever users name (versions, files, layers, keys, settings) is data
in that JSON and nothing else: the template's script writes it as text, and the page's policy runs no other script.

A page is written after every record, so nothing is read twice: of metrics.jsonl only the lines since the last page.
Two kinds of lines stand there: those of training, in order of steps, and measurements of quality, in any order.
What goes wrong with the disk leaves as OSError.
"""

import base64
import hashlib
import json
import math
import os
import re
import time
from array import array
from bisect import bisect_left
from functools import lru_cache
from pathlib import Path

from parameter import as_json
from utils import write_atomically

NAME = "index.html"
BUCKETS = 200               # at most, of a curve; even
DEVIATION = "_std"          # what a key ends in that says how far a measured figure varies

_RECORD = re.compile(r"(\d{7,})_(fake|recon|attn_.+)\.png", re.DOTALL)
_EXTRA = re.compile(r"\d{7,}_.+\.(png|webp|gif)", re.DOTALL)
_SUMMARY = re.compile(rb'<script type="application/json" id="summary">(.*?)</script>', re.DOTALL)
_SUMMARY_WITHIN = 1 << 16   # bytes from a page's beginning; it stands before everything large
_PROTOCOLS_WITHIN = 1 << 15 # bytes of the summary: a letter may take twelve of them


def write_pages(folders, config):
    """Write the run's page, and the overview of all the runs beside it."""
    write_run_page(folders, config)
    write_overview(folders.samples.parent)


def write_run_page(folders, config):
    """Write samples/<version>/index.html of what lies in `folders` (utils.RunFolders): pictures, metrics.jsonl.

    `config` is the run's resolved one. Anything may be missing: the page shows what is there.
    """
    steps, pictures, attention, extras = _find_pictures(folders)
    metrics = _metrics_of(os.path.abspath(folders.logs / "metrics.jsonl"))
    metrics.read_on()
    settings = json.loads(as_json(config), parse_constant=str)     # --lambda_gp inf is a word to JSON
    newest = {kind: _name(steps[-1] if there is None else steps[there[-1]], kind) for kind, there in pictures.items()}
    summary = {
        "version": settings["version"], "model": settings["model"], "dataset": _data_set(settings),
        "imsize": settings["imsize"], "step": max([*steps[-1:], metrics.reached]),
        "total_step": settings["total_step"], "written": int(time.time()), "thumb": newest.get("fake"),
        "figures": metrics.newest, "measured": metrics.how_measured(),
    }
    real = "real.png" if (folders.samples / "real.png").is_file() else None
    data = {
        "steps": steps, "pictures": pictures, "attention": attention, "real": real, "extras": extras,
        "sizes": {kind: _png_size((folders.attention if attention and kind.startswith("attn_") else folders.samples)
                                  / name) for kind, name in {**newest, **({"real": real} if real else {})}.items()},
        "keys": metrics.keys, "rows": metrics.rows(steps),
        "curves": [curve.columns() for curve in metrics.curves], "measured": metrics.measurements(),
        "others": [name for name in _runs_in(folders.samples.parent) if name != folders.samples.name],
        "config": settings,
    }
    _write(folders.samples / NAME, summary, data)


def write_overview(sample_root):
    """Write <sample_root>/index.html, which lists the runs in the folders below that have a page of their own.

    What it says of a run stands in that run's page. A page that is not ours is left out.
    """
    root = Path(sample_root)
    runs = []
    for name in _runs_in(root):
        summary = _read_summary(root / name / NAME)
        if summary is not None:
            runs.append({**summary, "folder": name})
    runs.sort(key=lambda run: (-run["written"], run["folder"]))
    _write(root / NAME, {"page": "overview"}, {"runs": runs})


# ---------------------------------------------------------------------------------------------------- the pictures


def _find_pictures(folders):
    """(steps, {kind: None or indices of steps}, parts of the way to the attention maps or None, other file names).

    A kind, such as fake or attn_g16, has None where every step has its picture. The way is None where the maps lie
    among the samples.
    """
    found = {}                                                              # {kind: {step, ...}}
    extras = []
    for name in _names(folders.samples):
        match = _record(name)
        if match:
            found.setdefault(match[1], set()).add(match[0])
        elif _EXTRA.fullmatch(name):
            extras.append(name)
    attention = None
    if folders.attention != folders.samples:
        apart = [match for match in map(_record, _names(folders.attention)) if match and match[1].startswith("attn_")]
        attention = _way(folders.samples, folders.attention)
        if apart and attention:
            found = {kind: there for kind, there in found.items() if not kind.startswith("attn_")}
            for step, kind in apart:
                found.setdefault(kind, set()).add(step)
        else:
            attention = None
    steps = sorted(set().union(*found.values()))
    pictures = {kind: None if len(found[kind]) == len(steps) else
                [index for index, step in enumerate(steps) if step in found[kind]]
                for kind in sorted(found, key=_in_order)}
    return steps, pictures, attention, sorted(extras)


def _names(folder):
    """The file names in a folder that are text; [] where there is none."""
    try:
        return [name for name in os.listdir(folder) if _is_text(name)]
    except FileNotFoundError:
        return []


def _is_text(name):
    """Whether a file name is whole Unicode: no link leads to the others."""
    return name.isascii() or not any("\ud800" <= letter <= "\udfff" for letter in name)


def _record(name):
    """(step, kind) of the name of a record's picture, else None."""
    match = _RECORD.fullmatch(name)
    if match and name == _name(int(match[1]), match[2]):
        return int(match[1]), match[2]
    return None


def _name(step, kind):
    return f"{step:07d}_{kind}.png"


def _in_order(kind):
    """Sorts layers as data flow: g8, g16, d8, d8_real, d4, d4_real, slae."""
    match = re.fullmatch(r"attn_([gd])(\d{1,9})(?:_real)?", kind)
    if not match:
        return 2, 0, kind
    size = int(match[2])
    return (0, size, kind) if match[1] == "g" else (1, -size, kind)


def _way(start, end):
    """The path from one folder to another in parts, or None where no relative one leads there (Windows' drives)."""
    try:
        parts = os.path.relpath(end, start).split(os.sep)
    except ValueError:
        return None
    return parts if all(map(_is_text, parts)) else None


def _png_size(path):
    """[width, height] of a PNG in pixels, so that the page can leave the room before it loads; None if it is none."""
    try:
        with open(path, "rb") as file:
            head = file.read(24)
    except OSError:                         # removed since the folder was listed, or a folder itself
        return None
    if len(head) < 24 or head[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    return [int.from_bytes(head[16:20], "big"), int.from_bytes(head[20:24], "big")]


def _data_set(settings):
    """The data set's name; for --dataset folder that of the folder."""
    if settings["dataset"] == "folder":
        return Path(settings["image_path"]).name or "folder"
    return settings["dataset"]


# ----------------------------------------------------------------------------------------------------- the numbers


class _Curve:
    """A curve that stays small however long the run: mean, lowest and highest of each of at most BUCKETS stretches.

    When there are more, neighbours merge. Stretches begin as one point each, so that a short curve is drawn whole.
    """

    def __init__(self):
        self.buckets = []           # [first step, last step, lowest, highest, sum, points] each
        self.width = 1              # points per bucket, but in the last

    def add(self, step, value):
        if self.buckets and self.buckets[-1][5] < self.width:
            bucket = self.buckets[-1]
            bucket[1:] = step, min(bucket[2], value), max(bucket[3], value), bucket[4] + value, bucket[5] + 1
            return
        if len(self.buckets) == BUCKETS:
            self.buckets = [[a[0], b[1], min(a[2], b[2]), max(a[3], b[3]), a[4] + b[4], a[5] + b[5]]
                            for a, b in zip(self.buckets[::2], self.buckets[1::2], strict=True)]
            self.width *= 2
        self.buckets.append([step, step, value, value, value, 1])

    def columns(self):
        """[middle steps, means, lowest, highest], each as long as there are buckets."""
        return [[(first + last) // 2 for first, last, *_ in self.buckets],
                [_short(total / points) for *_, total, points in self.buckets],
                [bucket[2] for bucket in self.buckets], [bucket[3] for bucket in self.buckets]]


class _Metrics:
    """What a page shows of one metrics.jsonl, read on from where it was read to."""

    def __init__(self, path):
        self.path = path
        self._begin()

    def _begin(self):
        self.end = 0                        # bytes taken in
        self.tail = b""                     # the last line taken in
        self.steps, self.offsets = array("q"), array("q")
        self.keys, self.curves = [], []
        self.reached = 0                    # the furthest step of any line
        self.newest = {}                    # {key: its last value}
        self._how = {}                      # {key: (protocol, source, step) of its last value} of those measured
        self._measured = {}                 # {(key, protocol, source): {step: (value, deviation or None)}}
        self._index = {}                    # {key: index in keys}
        self._rows = {}                     # {step of a picture: row}

    def read_on(self):
        """Take in the lines added since the last call. A line that is half written waits for its other half.

        A file that was replaced, as it is when a run goes on, is read anew: its last line stands elsewhere.
        """
        try:
            file = open(self.path, "rb")    # noqa: SIM115 - closed below; only the opening may fail quietly
        except FileNotFoundError:
            self._begin()
            return
        with file:
            file.seek(self.end - len(self.tail))
            if file.read(len(self.tail)) != self.tail:
                self._begin()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._take(line)
                self.tail = line
                self.end += len(line)

    def _take(self, line):
        """A line of training counts if its step is larger than the last; a measurement always, for it may come late."""
        found = _load(line)
        if found is None:
            return
        if isinstance(found.get("protocol"), str):
            self._take_measured(found)
        elif not self.steps or found["step"] > self.steps[-1]:
            self._take_trained(found)

    def _take_trained(self, found):
        self.steps.append(found["step"])
        self.offsets.append(self.end)
        self.reached = max(self.reached, found["step"])
        for key, value in _numbers(found).items():
            if key not in self._index:
                self._index[key] = len(self.keys)
                self.keys.append(key)
                self.curves.append(_Curve())
            self.curves[self._index[key]].add(found["step"], value)
            self.newest[key] = value
            self._how.pop(key, None)

    def _take_measured(self, found):
        """Keeps each figure apart by how it was taken, since only those of one protocol and source compare.

        All the points stay: one takes minutes to measure, so there are few. What came last stands last.
        """
        step, numbers = found["step"], _numbers(found)
        source = found.get("source")
        how = found["protocol"], source if isinstance(source, str) else ""
        self.reached = max(self.reached, step)
        for key, value in numbers.items():
            if key.endswith(DEVIATION) and key.removesuffix(DEVIATION) in found:
                continue                    # a band, not a curve
            deviation = numbers.get(key + DEVIATION)
            points = self._measured.pop((key, *how), {})
            points[step] = value, deviation
            self._measured[(key, *how)] = points
            self._how.pop(key, None)
            self._how[key] = (*how, step)
            self.newest[key] = value
            self.newest.pop(key + DEVIATION, None)
            if deviation is not None:
                self.newest[key + DEVIATION] = deviation

    def measurements(self):
        """{"groups": [(protocol, source), ...], "series": [[key, its group's index, steps, values, deviations], ...]}.

        What was measured last comes first.
        """
        groups, series = {}, []
        for (key, *how), points in reversed(self._measured.items()):
            steps = sorted(points)
            series.append([key, groups.setdefault(tuple(how), len(groups)), steps,
                           [points[step][0] for step in steps], [points[step][1] for step in steps]])
        return {"groups": list(groups), "series": series}

    def how_measured(self):
        """[[protocol, source, {key: step}], ...] of the newest figures, what was measured last first.

        Cut to the room of a summary: one that is too long would not be found again.
        """
        groups, found, room = {}, [], _PROTOCOLS_WITHIN
        for key, (protocol, source, step) in reversed(self._how.items()):
            groups.setdefault((_cut(protocol, 1000), _cut(source, 200)), {})[key] = step
        for (protocol, source), steps in groups.items():
            room -= len(_embed([protocol, source, steps]))
            if room < 0:
                break
            found.append([protocol, source, steps])
        return found

    def rows(self, steps):
        """For each of the steps of pictures [step of the line, values by keys] of the first line at or after it: that
        line's means reach over the step, and the figures on its pictures are there. Of the last line while there is
        none yet, None without lines. A value that the line lacks is None; those at a row's end are left out.
        """
        unread = [step for step in steps if step not in self._rows]
        if unread and self.steps:
            with open(self.path, "rb") as file:
                for step in unread:
                    line = bisect_left(self.steps, step)
                    final = line < len(self.steps)
                    line = line if final else -1
                    file.seek(self.offsets[line])
                    row = self._row(_load(file.readline()))
                    if final:
                        self._rows[step] = row
                    else:                   # the line of this step will come
                        return [self._rows.get(other, row) for other in steps]
        return [self._rows.get(step) for step in steps]

    def _row(self, found):
        values = {self._index[key]: value for key, value in _numbers(found).items()}
        return [found["step"], *(values.get(index) for index in range(max(values, default=-1) + 1))]


def _load(line):
    """The object of a line of metrics.jsonl, with a whole number for its step; None where it is none."""
    try:
        found = json.loads(line)
    except ValueError:
        return None
    return found if isinstance(found, dict) and type(found.get("step")) is int else None


def _numbers(found):
    """{key: float to four digits} of a line, without its step. What is not a finite number is left out."""
    return {key: _short(value) for key, value in found.items()
            if key != "step" and type(value) in (int, float) and math.isfinite(value)}


def _short(value):
    """Rounded to the four digits that the page shows."""
    return float(f"{value:.4g}")


def _cut(text, length):
    return text if len(text) <= length else text[:length - 1] + "…"


@lru_cache(maxsize=8)
def _metrics_of(path):
    """The reader of this file, which remembers what it has read as long as the process lives."""
    return _Metrics(path)


# ----------------------------------------------------------------------------------------------------- all the runs


def _runs_in(root):
    """Names of the folders in `root` with a page, sorted."""
    return sorted(name for name in _names(root) if os.path.isfile(os.path.join(root, name, NAME)))


def _read_summary(path):
    """What a run's page says of the run for the overview, or None if the page is not ours."""
    try:
        with open(path, "rb") as file:
            match = _SUMMARY.search(file.read(_SUMMARY_WITHIN))
        summary = json.loads(match[1]) if match else None
    except (OSError, ValueError):           # removed or unreadable meanwhile: the other runs still want their list
        return None
    if not isinstance(summary, dict) or not all(
            isinstance(summary.get(key), kind) for key, kind in _SUMMARY_TYPES.items()):
        return None
    measured = summary.get("measured")      # not in the pages of older versions
    return {**summary, "measured": list(filter(_is_how, measured)) if isinstance(measured, list) else []}


def _is_how(entry):
    """Whether this is [protocol, source, {key: step}]."""
    return isinstance(entry, list) and list(map(type, entry)) == [str, str, dict] and all(
        type(step) is int for step in entry[2].values())


_SUMMARY_TYPES = {"version": str, "model": str, "dataset": str, "imsize": int, "step": int, "total_step": int,
                  "written": int, "thumb": str | None, "figures": dict}


# --------------------------------------------------------------------------------------------------------- the file


@lru_cache(maxsize=1)
def _template():
    """`page.html` in three parts, around the two places for data, with the policy that allows its own style and script
    and nothing else.
    """
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (_hash(re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]) for tag in ("style", "script"))
    policy = ("default-src 'none'; base-uri 'none'; form-action 'none'; img-src 'self' file:; "
              f"style-src {style}; script-src {script}; require-trusted-types-for 'script'; trusted-types 'none'")
    head, rest = text.replace("{policy}", policy).split("{summary}")
    middle, tail = rest.split("{data}")
    return head, middle, tail


def _hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path, summary, data):
    """Write a page, unless somebody else's file of that name is there: --sample_path may name any folder."""
    try:
        with open(path, "rb") as file:
            if not _SUMMARY.search(file.read(_SUMMARY_WITHIN)):
                return
    except FileNotFoundError:
        pass
    head, middle, tail = _template()
    page = "".join((head, _embed(summary), middle, _embed(data), tail))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8", newline="\n"))


def _embed(data):
    """JSON in which nothing can end the script element that holds it, or open a comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
