"""The HTML gallery: a page per run, samples/<version>/index.html, and an overview of all runs, samples/index.html.

Each page is one file that opens by double click: the template `page.html` with the data inserted as JSON. Pictures are
relative links. Names that users choose (versions, files, layers, keys, settings) occur only in that JSON: the
template's script inserts them as text, and the page's Content-Security-Policy forbids any other script.

A page is written after every record. Only the lines added to metrics.jsonl since the previous page are read. That file
has two kinds of lines: training lines, in order of steps, and scores (lines with a protocol), in any order. Disk errors
are raised as OSError.

The page of a run that goes on looks for a newer self: its summary says whether the run goes on, and for how long it may
be silent (`Live`).
"""

import base64
import contextlib
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
from typing import NamedTuple

from flags.pictures import PictureShape
from parameter import FAMILIES, GROUPS, as_json, dataset_name
from storage.folders import step_name
from storage.score_table import BESIDE
from utils import write_atomically

NAME = "index.html"
RUNNING, DONE, INTERRUPTED, FAILED = STATES = ("running", "done", "interrupted", "failed")
BUCKETS = 200               # points of a curve, at most; even
# Suffixes of the keys of what is shown with a score: standard deviation, 95 % interval, value of two halves of the real
# pictures.
WITH_SCORE = (*BESIDE, "_floor")

_RECORD = re.compile(r"(\d{7,})_(fake|recon|attn_.+)\.png", re.DOTALL)
_EXTRA = re.compile(r"\d{7,}_.+\.(png|webp|gif|mp4)", re.DOTALL)
_SUMMARY = re.compile(rb'<script type="application/json" id="summary">(.*?)</script>', re.DOTALL)
_SUMMARY_WITHIN = 1 << 16   # bytes: the summary ends within the first 64 KiB of a page
_PROTOCOLS_WITHIN = 1 << 15 # bytes of the summary; one character may take twelve


class Live(NamedTuple):
    """Whether a run goes on: one of STATES, and the seconds that pass between two of its pages at most, None if that
    is not known yet. A page that says running, but was not written for much longer, is of a run that was killed.
    """

    state: str
    every: int | None = None


class PageWriter:
    """Writes the page of a run that trains, and the overview: see `write_run_page`."""

    def __init__(self, folders, config, classes=None):
        self.folders, self.config, self.classes = folders, config, classes
        self.every = self.written = None    # the longest time between two pages, in seconds; when the last one was due

    def write(self, state=RUNNING):
        """Write both pages; `state` is one of STATES."""
        now = time.monotonic()
        if self.written is not None:
            self.every = max(self.every or 1, math.ceil(now - self.written))
        self.written = now
        write_pages(self.folders, self.config, self.classes, Live(state, self.every))


def write_pages(folders, config, classes=None, live=None):
    """Write the run's page, and the overview of all runs in the parent folder: see `write_run_page`."""
    write_run_page(folders, config, classes, live)
    write_overview(folders.samples.parent)


def write_run_page(folders, config, classes=None, live=None):
    """Write samples/<version>/index.html from the pictures and metrics.jsonl in `folders` (a RunFolders).

    `config` is the run's resolved Config, `classes` the number of its classes, `live` a Live; None: what the page says
    so far. Missing files are left out.
    """
    steps, pictures, attention, extras = _find_pictures(folders)
    metrics = _metrics_of(os.path.abspath(folders.logs / "metrics.jsonl"))
    metrics.update()
    settings = json.loads(as_json(config), parse_constant=str)     # JSON has no infinity (--lambda_gp inf)
    news = settings["mode"] in ("train", "evaluate")            # what is drawn later is no news of the run
    newest = {kind: _name(steps[-1] if indices is None else steps[indices[-1]], kind)
              for kind, indices in pictures.items()}
    before = _read_summary(folders.samples / NAME) or {}
    now, step = int(time.time()), max([*steps[-1:], metrics.last_step])
    summary = {
        "version": settings["version"], "model": settings["model"],
        "dataset": dataset_name(config).removeprefix("folder ") or "folder",
        "imsize": PictureShape.of_config(config).key, "step": step,
        "total_step": settings["total_step"], "written": now if news else before.get("written", now),
        "thumb": newest.get("fake"), "figures": metrics.latest, "measured": metrics.protocols(),
        "classes": classes or before.get("classes"),
        "live": {**live._asdict(), "at": now} if live else before.get("live"),
        "since": _begun(before, now, step),
    }
    real = "real.png" if (folders.samples / "real.png").is_file() else None
    data = {
        "steps": steps, "pictures": pictures, "attention": attention, "real": real, "extras": extras,
        "sizes": {kind: png_size((folders.attention if attention and kind.startswith("attn_") else folders.samples)
                                  / name) for kind, name in {**newest, **({"real": real} if real else {})}.items()},
        "keys": metrics.keys, "rows": metrics.rows(steps),
        "curves": [curve.columns() for curve in metrics.curves], "measured": metrics.scores(),
        "by_class": metrics.by_class(),
        "others": [name for name in _runs_in(folders.samples.parent) if name != folders.samples.name],
        "config": _settings_of_run(settings, folders),
    }
    _write(folders.samples / NAME, summary, data)


def _settings_of_run(settings, folders):
    """Return the settings of the run that `folders` hold, without those of a call and of other families; `settings` are
    those of the present call.
    """
    if settings["mode"] != "train":
        with contextlib.suppress(OSError, ValueError, RecursionError, TypeError):
            settings |= json.loads((folders.models / "config.json").read_text(encoding="utf-8"), parse_constant=str)
    shown = {flag.name for title, flags in GROUPS.items() if title not in FAMILIES or title == settings["model"]
             for flag in flags if not flag.per_call}
    return {name: value for name, value in settings.items() if name in shown}


def _begun(before, now, step):
    """Return when the records that the page shows were begun: anew, if the run has gone back to an earlier step."""
    return before["since"] if before and step >= before["step"] else now


def pictures_of(folder, kind):
    """Return {step: path} of the pictures of a kind, such as fake, in a run's folder, by step."""
    paths = {step_and_kind[0]: path for path in folder.glob(f"*_{kind}.png")
             if (step_and_kind := _parse_name(path.name)) and step_and_kind[1] == kind}
    return dict(sorted(paths.items()))


def pictures_at(folders, step):
    """Return {kind: path} of the pictures of the record of a step, such as fake and attn_g16."""
    paths = [path for folder in {folders.samples, folders.attention} for path in folder.glob(step_name(step, "_*.png"))]
    found = {match[1]: path for path in paths if (match := _parse_name(path.name))}
    return {kind: found[kind] for kind in sorted(found, key=_sort_key)}


def write_overview(sample_root):
    """Write <sample_root>/index.html, which lists the runs in the subfolders that have a page.

    All it shows of a run is read from that run's page. Pages that this program did not write are skipped.
    """
    root = Path(sample_root)
    runs = []
    for name in _runs_in(root):
        summary = _read_summary(root / name / NAME)
        if summary is not None:
            runs.append({**summary, "folder": name})
    runs.sort(key=lambda run: (-run["since"], run["folder"]))
    _write(root / NAME, {"page": "overview"}, {"runs": runs})


# ---------------------------------------------------------------------------------------------------- the pictures


def _find_pictures(folders):
    """Return (steps, {kind: indices of steps or None}, path to the attention maps or None, [[name, time of writing in
    ms] of each other file]).

    A kind, such as fake or attn_g16, has None instead of indices if it has a picture at every step. The path is
    relative, in parts, and None if the maps are in the folder of the samples.
    """
    steps_of = {}                                                           # {kind: {step, ...}}
    extras = []
    for name in _file_names(folders.samples):
        match = _parse_name(name)
        if match:
            steps_of.setdefault(match[1], set()).add(match[0])
        elif _EXTRA.fullmatch(name):
            extras.append(name)
    attention = None
    if folders.attention != folders.samples:
        maps = [match for match in map(_parse_name, _file_names(folders.attention))
                if match and match[1].startswith("attn_")]
        attention = _relative_path(folders.samples, folders.attention)
        if maps and attention:
            steps_of = {kind: steps for kind, steps in steps_of.items() if not kind.startswith("attn_")}
            for step, kind in maps:
                steps_of.setdefault(kind, set()).add(step)
        else:
            attention = None
    steps = sorted(set().union(*steps_of.values()))
    pictures = {kind: None if len(steps_of[kind]) == len(steps) else
                [index for index, step in enumerate(steps) if step in steps_of[kind]]
                for kind in sorted(steps_of, key=_sort_key)}
    return steps, pictures, attention, [[name, _time_of(folders.samples / name)] for name in sorted(extras)]


def _time_of(path):
    """Return when a file was written last, in ms; 0 if it is gone."""
    try:
        return path.stat().st_mtime_ns // 10**6
    except OSError:
        return 0


def _file_names(folder):
    """Return the names in a folder that are valid Unicode; [] if the folder does not exist."""
    try:
        return [name for name in os.listdir(folder) if _is_unicode(name)]
    except FileNotFoundError:
        return []


def _is_unicode(name):
    """Whether a file name has no surrogates (undecodable bytes): a page cannot link to such a file."""
    return name.isascii() or not any("\ud800" <= character <= "\udfff" for character in name)


def _parse_name(name):
    """Return (step, kind) of the file name of a record's picture, else None."""
    match = _RECORD.fullmatch(name)
    if match and name == _name(int(match[1]), match[2]):
        return int(match[1]), match[2]
    return None


def _name(step, kind):
    return step_name(step, f"_{kind}.png")


def _sort_key(kind):
    """Sort key: layers in the order of the data flow: g8, g16, d8, d8_real, d4, d4_real, slae."""
    match = re.fullmatch(r"attn_([gd])(\d{1,9})(?:_real)?", kind)
    if not match:
        return 2, 0, kind
    size = int(match[2])
    return (0, size, kind) if match[1] == "g" else (1, -size, kind)


def _relative_path(start, end):
    """Return the relative path from one folder to another in parts; None if there is none (other drive on Windows)."""
    try:
        parts = os.path.relpath(end, start).split(os.sep)
    except ValueError:
        return None
    return parts if all(map(_is_unicode, parts)) else None


def png_size(path):
    """Return (width, height) of a PNG in px, so that the page can reserve its space; None if the file is no PNG."""
    try:
        with open(path, "rb") as file:
            header = file.read(24)
    except OSError:                         # deleted since the folder was listed, or a folder itself
        return None
    if len(header) < 24 or header[:8] != b"\x89PNG\r\n\x1a\n":
        return None
    return int.from_bytes(header[16:20], "big"), int.from_bytes(header[20:24], "big")


# ----------------------------------------------------------------------------------------------------- metrics.jsonl


class _Curve:
    """A downsampled curve of bounded size: mean, minimum and maximum of each of at most BUCKETS buckets.

    A bucket starts as one point; when there are too many, adjacent buckets are merged. So short curves are exact.
    """

    def __init__(self):
        self.buckets = []           # [[first step, last step, minimum, maximum, sum, number of points], ...]
        self.width = 1              # points per bucket, except the last

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
        """Return [middle steps, means, minima, maxima], each with one entry per bucket."""
        return [[(first + last) // 2 for first, last, *_ in self.buckets],
                [_rounded(total / points) for *_, total, points in self.buckets],
                [bucket[2] for bucket in self.buckets], [bucket[3] for bucket in self.buckets]]


class _Metrics:
    """The content of one metrics.jsonl, read incrementally."""

    def __init__(self, path):
        self.path = path
        self._reset()

    def _reset(self):
        self.offset = 0                     # bytes read
        self.last_line = b""                # the last line read
        self.steps, self.offsets = array("q"), array("q")   # of the training lines
        self.keys, self.curves = [], []     # of the training lines
        self.last_step = 0                  # the highest step of any line
        self.latest = {}                    # {key: latest value}
        self._protocols = {}                # {key: (protocol, source, step)} of those latest values that are scores
        self._by_class = {}                 # {key: [protocol, source, step, {class: value}]} of the latest scores
        self._scores = {}                   # {(key, protocol, source): {step: [value, each of WITH_SCORE or None]}}
        self._index = {}                    # {key: index in keys}
        self._rows = {}                     # {step of a picture: row}

    def update(self):
        """Read the lines added since the last call. An incomplete last line is read by a later call.

        If the file was replaced, as it is when a run resumes, the last line read is not at its offset any more: then
        the whole file is read again.
        """
        try:
            file = open(self.path, "rb")    # noqa: SIM115 - closed below; only a missing file is no error
        except FileNotFoundError:
            self._reset()
            return
        with file:
            file.seek(self.offset - len(self.last_line))
            if file.read(len(self.last_line)) != self.last_line:
                self._reset()
                file.seek(0)
            for line in file:
                if not line.endswith(b"\n"):
                    break
                self._add_line(line)
                self.last_line = line
                self.offset += len(line)

    def _add_line(self, line):
        """Add a training line if its step is larger than the last one's, a score always: it may be computed later."""
        entry = _parse_line(line)
        if entry is None:
            return
        if isinstance(entry.get("protocol"), str):
            self._add_score(entry)
        elif not self.steps or entry["step"] > self.steps[-1]:
            self._add_training(entry)

    def _add_training(self, entry):
        self.steps.append(entry["step"])
        self.offsets.append(self.offset)
        self.last_step = max(self.last_step, entry["step"])
        for key, value in _finite_values(entry).items():
            if key not in self._index:
                self._index[key] = len(self.keys)
                self.keys.append(key)
                self.curves.append(_Curve())
            self.curves[self._index[key]].add(entry["step"], value)
            self.latest[key] = value
            self._protocols.pop(key, None)

    def _add_score(self, entry):
        """Add scores, separately for each protocol and source, since others are not comparable.

        All points are kept: a score takes minutes to compute, so there are few. The dicts are ordered by latest update.
        """
        step, values = entry["step"], _finite_values(entry)
        source = entry.get("source")
        group = entry["protocol"], source if isinstance(source, str) else ""
        self.last_step = max(self.last_step, step)
        for key, value in values.items():
            if any(key.endswith(suffix) and key.removesuffix(suffix) in entry for suffix in WITH_SCORE):
                continue                    # shown in the chart of another
            points = self._scores.pop((key, *group), {})
            points[step] = [value, *(values.get(key + suffix) for suffix in WITH_SCORE)]
            self._scores[(key, *group)] = points
            self._protocols.pop(key, None)
            self._protocols[key] = (*group, step)
            self.latest[key] = value
            for suffix in BESIDE:
                self.latest.pop(key + suffix, None)
                if key + suffix in values:
                    self.latest[key + suffix] = values[key + suffix]
        by_class = entry.get("by_class")
        for key, of_classes in by_class.items() if isinstance(by_class, dict) else ():
            if isinstance(of_classes, dict):
                self._by_class[key] = [*group, step, _finite(of_classes)]

    def by_class(self):
        """Return [[key, protocol, source, step, classes, values], ...] of the latest scores: highest values first."""
        found = []
        for key, (*origin, values) in self._by_class.items():
            ordered = sorted(values.items(), key=lambda pair: (-pair[1], pair[0]))
            found.append([key, *origin, [name for name, _ in ordered], [value for _, value in ordered]])
        return found

    def scores(self):
        """Return {"groups": [(protocol, source), ...], "series": [[key, group index, steps, values, deviations, lows,
        highs, floors], ...]}; the last three are left out where all are None.

        The most recently updated come first.
        """
        groups, series = {}, []
        for (key, *group), points in reversed(self._scores.items()):
            steps = sorted(points)
            columns = list(map(list, zip(*(points[step] for step in steps), strict=True)))
            if all(value is None for column in columns[2:] for value in column):
                columns = columns[:2]
            series.append([key, groups.setdefault(tuple(group), len(groups)), steps, *columns])
        return {"groups": list(groups), "series": series}

    def protocols(self):
        """Return [[protocol, source, {key: step}], ...] of the latest scores, the most recently updated first.

        Truncated to the space in a summary: a summary beyond _SUMMARY_WITHIN would not be read by the overview.
        """
        groups, entries, space = {}, [], _PROTOCOLS_WITHIN
        for key, (protocol, source, step) in reversed(self._protocols.items()):
            groups.setdefault((_truncated(protocol, 1000), _truncated(source, 200)), {})[key] = step
        for (protocol, source), steps in groups.items():
            space -= len(_to_json([protocol, source, steps]))
            if space < 0:
                break
            entries.append([protocol, source, steps])
        return entries

    def rows(self, steps):
        """Return a row [step of the line, value of each key, ...] of a training line for each step of a picture.

        It is the first line at or after the picture's step: its means include that step, and it holds the values that
        belong to the pictures. If there is no such line yet it is the last line; the row is None if there are no lines.
        A missing value is None; missing values at the end of a row are omitted.
        """
        unread = [step for step in steps if step not in self._rows]
        if unread and self.steps:
            with open(self.path, "rb") as file:
                for step in unread:
                    line = bisect_left(self.steps, step)
                    final = line < len(self.steps)
                    line = line if final else -1
                    file.seek(self.offsets[line])
                    row = self._row(_parse_line(file.readline()))
                    if final:
                        self._rows[step] = row
                    else:                   # not logged yet: do not keep the row
                        return [self._rows.get(other, row) for other in steps]
        return [self._rows.get(step) for step in steps]

    def _row(self, entry):
        values = {self._index[key]: value for key, value in _finite_values(entry).items()}
        return [entry["step"], *(values.get(index) for index in range(max(values, default=-1) + 1))]


def _parse_line(line):
    """Return the dict in a line of metrics.jsonl; None if it is not valid JSON with an integer step."""
    try:
        entry = json.loads(line)
    except ValueError:
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None


def _finite_values(entry):
    """Return {key: float, rounded} of a line's finite numbers, without its step."""
    return _finite({key: value for key, value in entry.items() if key != "step"})


def _finite(values):
    return {key: _rounded(value) for key, value in values.items()
            if type(value) in (int, float) and math.isfinite(value)}


def _rounded(value):
    """Round to the four significant digits that the page shows."""
    return float(f"{value:.4g}")


def _truncated(text, length):
    return text if len(text) <= length else text[:length - 1] + "…"


@lru_cache(maxsize=8)
def _metrics_of(path):
    """Return the _Metrics of this file, cached so that later calls read only new lines."""
    return _Metrics(path)


# ----------------------------------------------------------------------------------------------------- all runs


def _runs_in(root):
    """Return the sorted names of the folders in `root` that contain a page."""
    return sorted(name for name in _file_names(root) if os.path.isfile(os.path.join(root, name, NAME)))


def _read_summary(path):
    """Return the summary in a run's page, or None if this program did not write the page."""
    try:
        with open(path, "rb") as file:
            match = _SUMMARY.search(file.read(_SUMMARY_WITHIN))
        summary = json.loads(match[1]) if match else None
    except (OSError, ValueError):           # deleted or unreadable: list the other runs
        return None
    if not isinstance(summary, dict) or not all(
            isinstance(summary.get(key), kind) for key, kind in _SUMMARY_TYPES.items()):
        return None
    measured = summary.get("measured")      # missing in pages of older versions
    live, since = summary.get("live"), summary.get("since")     # missing in those, too
    return {**summary, "since": since if type(since) is int else summary["written"],
            "measured": list(filter(_is_protocol, measured)) if isinstance(measured, list) else [],
            "live": live if _is_live(live) else None}


def _is_protocol(entry):
    """Whether this is [protocol, source, {key: step}]."""
    return isinstance(entry, list) and list(map(type, entry)) == [str, str, dict] and all(
        type(step) is int for step in entry[2].values())


def _is_live(entry):
    """Whether this is {"state": one of STATES, "every": whole seconds or None, "at": the time of writing}."""
    return isinstance(entry, dict) and entry.get("state") in STATES and type(entry.get("at")) is int and isinstance(
        entry.get("every"), int | None)


_SUMMARY_TYPES = {"version": str, "model": str, "dataset": str, "imsize": int | str, "step": int, "total_step": int,
                  "written": int, "thumb": str | None, "figures": dict}


# --------------------------------------------------------------------------------------------------------- the file


@lru_cache(maxsize=1)
def _template():
    """Return `page.html` in three parts, split at the two placeholders for data, with its Content-Security-Policy.

    The policy allows the page's own style and script, by their hashes, and nothing else.
    """
    text = Path(__file__).with_name("page.html").read_text(encoding="utf-8")
    style, script = (_hash(re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]) for tag in ("style", "script"))
    policy = ("default-src 'none'; base-uri 'none'; form-action 'none'; img-src 'self' file:; media-src 'self' file:; "
              "frame-src 'self' file:; "                # a newer self, see page.html
              f"style-src {style}; script-src {script}; require-trusted-types-for 'script'; trusted-types 'none'")
    head, rest = text.replace("{policy}", policy).split("{summary}")
    middle, tail = rest.split("{data}")
    return head, middle, tail


def _hash(text):
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _write(path, summary, data):
    """Write a page, but do not overwrite a foreign file of that name: --sample_path may be any folder."""
    try:
        with open(path, "rb") as file:
            if not _SUMMARY.search(file.read(_SUMMARY_WITHIN)):
                return
    except FileNotFoundError:
        pass
    head, middle, tail = _template()
    page = "".join((head, _to_json(summary), middle, _to_json(data), tail))
    write_atomically(path, lambda temporary: temporary.write_text(page, encoding="utf-8", newline="\n"))


def _to_json(data):
    """Return JSON that cannot close its <script> element or open an HTML comment in it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")
