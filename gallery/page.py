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
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple
from urllib.parse import quote

from flags.pictures import PictureShape
from parameter import FAMILIES, GROUPS, as_json, dataset_name
from storage.curves import metrics_of
from storage.folders import step_name
from utils import spread_indices, write_atomically

NAME = "index.html"
RUNNING, DONE, INTERRUPTED, FAILED = STATES = ("running", "done", "interrupted", "failed")

_RECORD = re.compile(r"(\d{7,})_(fake|recon|attn_.+)\.png", re.DOTALL)
_EXTRA = re.compile(r"\d{7,}_.+\.(png|webp|gif|mp4)", re.DOTALL)
_JSON = re.compile(r'<script type="application/json" id="(?:summary|data)">(.*?)</script>', re.DOTALL)
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
    metrics = metrics_of(os.path.abspath(folders.logs / "metrics.jsonl"))
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
        "thumb": newest.get("fake"), "figures": metrics.latest, "measured": _fitting(metrics.protocols()),
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
            saved = (folders.models / "config.json").read_text(encoding="utf-8")
            settings = settings | json.loads(saved, parse_constant=str)
    shown = {flag.name for title, flags in GROUPS.items() if title not in FAMILIES or title == settings["model"]
             for flag in flags if not flag.per_call}
    return {name: value for name, value in settings.items() if name in shown}


def _fitting(protocols):
    """Return the first of these [protocol, source, {key: step}], as many as a summary has space for: one beyond
    _SUMMARY_WITHIN would not be read by the overview.
    """
    entries, space = [], _PROTOCOLS_WITHIN
    for protocol, source, steps in protocols:
        entries.append([_truncated(protocol, 1000), _truncated(source, 200), steps])
        space -= len(_to_json(entries[-1]))
        if space < 0:
            return entries[:-1]
    return entries


def _truncated(text, length):
    return text if len(text) <= length else text[:length - 1] + "…"


def _begun(before, now, step):
    """Return the time of the run's first page, in seconds; `now`, if it has gone back to an earlier step since."""
    return before["since"] if before and step >= before["step"] else now


def as_one_file(path, most_bytes=2**23):
    """Return the HTML of the run's page at `path` with its pictures inside, for notebooks and mails.

    As many records as `most_bytes` of pictures allow, the newest among them, evenly spread; without links to other
    files, and without pictures that are gone. Raise OSError, ValueError if this is no such page.
    """
    text, folder = path.read_text(encoding="utf-8"), path.parent
    summary, data = (json.loads(match) for match in _JSON.findall(text))
    if "steps" not in data:
        raise ValueError(f"{path} is not the page of a run")
    steps, data["real"] = data["steps"], data["real"] if data["real"] and (folder / data["real"]).is_file() else None
    addresses = {(index, kind): "/".join((*(data["attention"] or () if kind.startswith("attn_") else ()),
                                          _name(steps[index], kind)))
                 for kind, indices in data["pictures"].items()
                 for index in (range(len(steps)) if indices is None else indices)}
    addresses = {key: address for key, address in addresses.items() if (folder / address).is_file()}
    count = len(steps)
    while True:
        # counted from the end, as the newest record is always shown
        kept = sorted(len(steps) - 1 - index for index in spread_indices(count, len(steps)))
        files = [address for (index, _), address in addresses.items() if index in kept]
        files += [data["real"]] if data["real"] else []
        if count <= 1 or sum(os.path.getsize(folder / file) for file in files) <= most_bytes:
            break
        count //= 2
    data |= {
        "steps": [steps[index] for index in kept], "rows": [data["rows"][index] for index in kept],
        "pictures": {kind: [new for new, index in enumerate(kept) if (index, kind) in addresses]
                     for kind in data["pictures"]},
        "inside": {quote(file, safe="/!'()*"): _data_address(folder / file) for file in files},
        "extras": [], "others": [],
    }
    head, middle, tail = _template()
    head = head.replace("img-src 'self' file:", "img-src data:")
    return "".join((head, _to_json(summary | {"live": None}), middle, _to_json(data), tail))


def _data_address(path):
    return f"data:image/png;base64,{base64.b64encode(path.read_bytes()).decode()}"


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
