"""A metrics.jsonl as curves, rows and scores: what the page of a run shows of it."""

import json
import math
from array import array
from bisect import bisect_left
from functools import lru_cache

from storage.score_table import BESIDE

BUCKETS = 200               # points of a curve, at most; even
# Suffixes of the keys of what is shown with a score: standard deviation, 95 % interval, value of two halves of the real
# pictures.
WITH_SCORE = (*BESIDE, "_floor")


class Curve:
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


class Metrics:
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
                self.curves.append(Curve())
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
        """Return [[protocol, source, {key: step}], ...] of the latest scores, the most recently updated first."""
        groups = {}
        for key, (protocol, source, step) in reversed(self._protocols.items()):
            groups.setdefault((protocol, source), {})[key] = step
        return [[*group, steps] for group, steps in groups.items()]

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


@lru_cache(maxsize=8)
def metrics_of(path):
    """Return the Metrics of this file, cached so that later calls read only new lines."""
    return Metrics(path)
