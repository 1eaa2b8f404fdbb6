"""From what an ablation's runs left behind to words: tables of means and of seeds, verdicts, the picture.

    results = {row's label: {seed: {column: number}}}       in the order of the table
"""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: python benchmarks/ablation.py --help")

import json
import math
import platform
import shlex
import statistics

import torch
from PIL import Image, ImageDraw, ImageFont

from dataset.workers import cores
from errors import Failure
from gallery.grid import BACKGROUND, INK, MARGIN, QUIET
from metrics import cost
from storage import score_table
from utils import write_atomically

BASELINE = "baseline"       # label of the row that the others are compared with

OF_A_RUN = {"version", "seed", "pretrained_model"}      # settings that differ between the runs of a variant, too

COST = ("s/step", "GPU GiB", "G parameters", "D parameters")      # lower is better


def sign_of(name):
    """-1 for a column where lower is better, 1 where higher is, 0 for one of unknown meaning."""
    return -1 if name in COST else score_table.sign_of(name)


def interval(values):
    """(mean, low, high): the 95 % interval of the mean by Student's t; None for fewer than two values."""
    if len(values) < 2:
        return None
    from scipy.stats import t  # an ablation's own requirement

    mean, spread = mean_and_spread(values)
    half = float(t.ppf(0.975, len(values) - 1)) * spread / len(values) ** 0.5
    return mean, mean - half, mean + half


def paired_interval(baseline, runs, name):
    """`interval` of a column's differences of {seed: numbers} from the baseline's, over the seeds that both have."""
    return interval([runs[seed][name] - baseline[seed][name] for seed in sorted(runs)
                     if name in runs[seed] and name in baseline.get(seed, ())])


def interval_in_words(found, like):
    """'+9.0, 95 % interval -3.2 to 21.2', with as many decimals as `like` gets."""
    mean, low, high = found
    return f"{'+' * (mean >= 0)}{number(mean, like)}, 95 % interval {number(low, like)} to {number(high, like)}"


def mean_and_spread(values):
    """(mean, sample standard deviation); the second is None for a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def number(value, like=None):
    """A number as tables show it: about four digits, or as many decimals as `like` gets; integers in full."""
    if isinstance(value, int) or not (like or value):
        return f"{value:,.0f}"
    size = abs(value if like is None else like)
    if not math.isfinite(size):
        return str(value)
    digits = max(0, min(3, 3 - math.floor(math.log10(size)))) if size >= 0.1 else 4
    return f"{value:,.{digits}f}"


def percent(before, after):
    """' (+3.1 %)' of a change, '' where `before` is 0."""
    if not before:
        return ""
    change = 100 * (after - before) / abs(before)
    digits = 0 if abs(change) >= 10 else 1 if abs(change) >= 1 else 2
    return f" ({change:+.{digits}f} %)"


def columns_of(results):
    """(columns of the table, {column: the one number that all runs share}).

    A score of unknown meaning that never varies, such as the number of pictures, is not worth a column, nor are
    parameters that no variant adds to.
    """
    runs = [run for seeds in results.values() for run in seeds.values()]
    names = list(dict.fromkeys(name for run in runs for name in run))
    names = [name for name in names if name not in COST] + [name for name in COST if name in names]
    constant = {name: runs[0][name] for name in names
                if (not sign_of(name) or name.endswith(("parameters", "floor"))) and len(runs) > 1
                and len({run.get(name) for run in runs}) == 1}
    return [name for name in names if name not in constant], constant


def markdown_table(head, rows):
    """Lines of a Markdown table; all columns but the first are aligned to the right."""
    lines = [head, ["---", *["---:"] * (len(head) - 1)], *rows]
    return ["| " + " | ".join(line) + " |" for line in lines]


def mean_table(results, floor=None):
    """Lines of means over seeds, ± spread. `floor`: swd of the real pictures' halves, the last row."""
    columns, _ = columns_of(results)
    rows = []
    for label, seeds in results.items():
        cells = [label]
        for name in columns:
            values = [run[name] for run in seeds.values() if name in run]
            mean, spread = mean_and_spread(values) if values else (None, None)
            cells.append("–" if mean is None else number(mean))
            if spread is not None and not name.endswith("parameters"):
                cells[-1] += f" ± {number(spread, like=max(abs(mean), spread))}"
        rows.append([*cells, str(len(seeds))])
    if floor is not None:
        cells = (number(floor) if name == "swd" else "–" for name in columns)
        rows.append(["floor: real against real", *cells, "–"])
    return markdown_table(["", *columns, "seeds"], rows)


def seed_table(results):
    """Lines of the table of every single run."""
    columns = [name for name in columns_of(results)[0] if not name.endswith("parameters")]
    rows = [[label, str(seed), *(number(run[name]) if name in run else "–" for name in columns)]
            for label, seeds in results.items() for seed, run in sorted(seeds.items())]
    return markdown_table(["", "seed", *columns], rows)


def verdicts(results):
    """One line per column and row against the baseline, over the seeds that both have; [] without a baseline.

    What a variant costs is told once, however many ways there are to draw from it.
    """
    baseline = results.get(BASELINE, {})
    lines = {}
    for name in columns_of(results)[0]:
        for label, runs in results.items():
            seeds = [seed for seed in runs if seed in baseline and name in runs[seed] and name in baseline[seed]]
            if label != BASELINE and seeds:
                who = label.partition(", ")[0] if name in COST else label
                lines.setdefault((who, name), f"{who} against {BASELINE}: {name} " + _change(
                    name, [baseline[seed][name] for seed in seeds], [runs[seed][name] for seed in seeds]))
    return list(lines.values())


def _change(name, before, after):
    """'301.0 -> 310.0 (+3.0 %), worse; better in 1 of 3 seeds; paired difference +9.0, 95 % interval -3.2 to 21.2'"""
    a, b = statistics.mean(before), statistics.mean(after)
    text = f"{number(a)} -> {number(b)}{percent(a, b)}"
    if name.endswith("parameters"):
        return text
    if before == after:
        return f"{number(a)}, equal in every seed"
    steps = [y - x for x, y in zip(before, after, strict=True)]
    sign = sign_of(name) or 1
    up, down = ("better", "worse") if sign_of(name) else ("higher", "lower")
    text += ", " + (up if sign * (b - a) > 0 else down if sign * (b - a) < 0 else "equal")
    text += f"; {up} in {sum(sign * step > 0 for step in steps)} of {len(steps)} seed{'s' * (len(steps) > 1)}"
    found = interval(steps)
    if found is not None:
        text += f"; paired difference {interval_in_words(found, max(abs(a), abs(b)))}"
        text += "" if found[1] <= 0 <= found[2] else " (**excludes 0**)"
    return text


def convergence(by_point, unit):
    """Lines of Markdown: for each score a table of its means and paired differences by `unit`, step or minute.

    `by_point`: {number of steps or minutes: results}; [] for a single point.
    """
    lines = []
    for name in _scores(by_point) if len(by_point) > 1 else ():
        labels = list(dict.fromkeys(label for results in by_point.values() for label in results))
        rows = []
        for point, results in by_point.items():
            cells = [f"{point:,}"]
            baseline = results.get(BASELINE, {})
            for label in labels:
                values = [run[name] for run in results.get(label, {}).values() if name in run]
                cell = number(statistics.mean(values)) if values else "–"
                found = label != BASELINE and values and paired_interval(baseline, results[label], name)
                if found:
                    _, low, high = found
                    cell += f" [{number(low, statistics.mean(values))}, {number(high, statistics.mean(values))}]"
                    cell = cell if low <= 0 <= high else f"**{cell}**"
                cells.append(cell)
            rows.append(cells)
        lines += [f"`{name}` by {unit}:", "", *markdown_table([unit, *labels], rows), ""]
    if lines:
        lines.append("In brackets: 95 % interval of the paired difference from the baseline; bold where it excludes 0.")
        lines.append("")
    return lines


def _scores(by_point):
    """The columns of scores whose meaning is known, of at least two points."""
    columns = columns_of(list(by_point.values())[-1])[0]
    points = {name: sum(any(name in run for seeds in results.values() for run in seeds.values())
                        for results in by_point.values()) for name in columns}
    return [name for name in columns if name not in COST and points[name] > 1
            and (sign_of(name) or name.endswith("nearest"))]


def _figure(panels, most, width, height):
    """Return (a figure for so many panels, `most` in a row, of this size in inches; its rows; its columns).

    The figure is None without matplotlib, an ablation's own requirement.
    """
    columns = min(most, panels)
    rows = -(-panels // columns)
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return None, rows, columns
    return Figure(figsize=(width * columns, height * rows), dpi=110, layout="constrained"), rows, columns


def curves(by_point, path, unit="step"):
    """Write a picture of each score by `unit`, a line for each variant with its 95 % interval. Return whether it did.

    Raises OSError. With a single point, or without matplotlib, it does nothing.
    """
    names = _scores(by_point)
    if len(by_point) < 2 or not names:
        return False
    figure, rows, columns = _figure(len(names), 3, 5, 3.6)
    if figure is None:
        return False
    labels = list(dict.fromkeys(label for results in by_point.values() for label in results))
    for place, name in enumerate(names):
        axes = figure.add_subplot(rows, columns, place + 1)
        for label in labels:
            found = {point: interval(values) or (values[0],) * 3 for point, results in by_point.items()
                     if (values := [run[name] for run in results.get(label, {}).values() if name in run])}
            if not found:                               # a --score program may lack a column for one
                continue
            mean, low, high = zip(*found.values(), strict=True)
            line, = axes.plot(list(found), mean, marker="o", markersize=4, label=label)
            axes.fill_between(list(found), low, high, color=line.get_color(), alpha=0.12, linewidth=0)
        better = {-1: " (lower is better)", 1: " (higher is better)", 0: ""}[sign_of(name)]
        axes.set(title=f"{name}{better}", xlabel=unit)
        axes.grid(alpha=0.3)
        if not place:
            axes.legend()
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True


def differences(results, path):
    """Write a picture of each score's paired difference from the baseline, in percent of it, with its 95 % interval.
    Return whether it did.

    Raises OSError. With fewer than two seeds, or without matplotlib, it does nothing.
    """
    baseline = results.get(BASELINE, {})
    found = {name: relative_differences(results, baseline, name) for name in columns_of(results)[0]
             if sign_of(name) and name not in COST}
    found = {name: intervals for name, intervals in found.items() if intervals}
    if not found:
        return False
    labels = [label for label in results if label != BASELINE][::-1]    # the first one on top
    figure, rows, columns = _figure(len(found), 4, 3.2, 0.9 + 0.25 * len(labels))
    if figure is None:
        return False
    for place, (name, intervals) in enumerate(found.items()):
        axes = figure.add_subplot(rows, columns, place + 1)
        draw_intervals(axes, intervals, labels, place % columns == 0)
        axes.set_title(f"{name} ({'lower' if sign_of(name) < 0 else 'higher'} is better)", fontsize=9)
    write_atomically(path, lambda temporary: figure.savefig(temporary, format="png"))
    return True


def draw_intervals(axes, intervals, labels, named):
    """Draw {label: (mean, low, high)} in percent, one line a label from below, thick where it excludes 0; with the
    labels if `named`.
    """
    for height, label in enumerate(labels):
        if label in intervals:
            mean, low, high = intervals[label]
            decided = not low <= 0 <= high
            axes.plot([low, high], [height] * 2, color=f"C{len(labels) - height}", linewidth=3 if decided else 1.5)
            axes.plot(mean, height, "o", color=f"C{len(labels) - height}", markersize=5)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(ylim=(-0.6, len(labels) - 0.4), yticks=range(len(labels)),
             yticklabels=labels if named else [""] * len(labels))
    axes.locator_params(axis="x", nbins=5)
    axes.xaxis.set_major_formatter("{x:+.0f} %")
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)


def relative_differences(results, baseline, name):
    """Return {label: (mean, low, high)} in percent of the baseline's mean; {} if that is 0 or a label has one seed."""
    values = [run[name] for run in baseline.values() if name in run]
    if not values or not statistics.mean(values):
        return {}
    intervals = {label: paired_interval(baseline, runs, name)
                 for label, runs in results.items() if label != BASELINE}
    return {label: [100 * each / abs(statistics.mean(values)) for each in found]
            for label, found in intervals.items() if found}


def summary(results, floor=None, of_paper=True):
    """Lines of Markdown: both tables, what all runs share, the verdicts. `floor`: see `mean_table`. `of_paper`: whether
    they are on the claims of SLAE-FastGAN's paper.
    """
    lines = mean_table(results, floor)
    constant = columns_of(results)[1]
    if constant:
        lines += ["", "The same in every run: "
                  + ", ".join(f"{name} {number(value)}" for name, value in constant.items()) + "."]
    lines += ["", *seed_table(results), ""]
    against = verdicts(results)
    if not against:
        return [*lines, f"No other variant was scored to compare the {BASELINE} with." if BASELINE in results else
                f"There is no {BASELINE} to compare with.", ""]
    claims = ("The paper claims that the additions to FastGAN better the pictures on small sets, and cost hardly any "
              "more time, memory or parameters. ") if of_paper else ""
    lines += [f"{claims}These runs say:", "", *(f"- {line}" for line in against), ""]
    if len(results[BASELINE]) < 2:
        lines += ["One seed has no spread: take its differences for hints.", ""]
    return lines


def in_words(run):
    """['swd 31.20', 's/step 0.150', ...]: the numbers of one run whose meaning is known, but for its sizes."""
    return [f"{name} {number(value)}" for name, value in run.items()
            if sign_of(name) and not name.endswith("parameters")]


def on_settings(configs, varied):
    """Lines on the runs' settings, {flag: value} each: VGG-16's weights, differences but in `varied` flags."""
    lines = []
    weights = sorted({str(config.get("vgg_weights")) for config in configs if config.get("metadata")})
    if weights:
        lines.append(f"- VGG-16 weights of the metadata: {', '.join(weights)}"
                     + (" (untrained: for tests, says nothing of the paper)" if "random" in weights else ""))
    # a flag that an older run lacks did not exist then
    shared = set.intersection(*map(set, configs)) - set(varied) if configs else set()
    differing = sorted(name for name in shared if any(config[name] != configs[0][name] for config in configs))
    if differing:
        return [*lines, f"- **the runs differ in more than they should: {', '.join(differing)}**"]
    named = ", ".join(f"`{name}`" for name in sorted(set(varied) - OF_A_RUN))
    return [*lines, f"- but for {named} all settings are equal between the runs"]


def picture(grids, path):
    """Write (name, path of a grid, lines) of each variant side by side: name above, grid, lines beneath.

    All grids are shown at one size, the first one's, of at most 1024 px. Raises OSError.
    """
    title, small, line = ImageFont.load_default(size=30), ImageFont.load_default(size=22), 32
    images = []
    for _, source, _ in grids:
        with Image.open(source) as image:
            images.append(image.convert("RGB"))
    width, height = images[0].size
    shrink = min(1, 1024 / max(width, height))
    width, height = round(width * shrink), round(height * shrink)
    images = [image.resize((width, height), Image.Resampling.LANCZOS) for image in images]
    top = MARGIN + 44
    foot = 20 + line * max(len(lines) for _, _, lines in grids)
    page = Image.new("RGB", (MARGIN + len(grids) * (width + MARGIN), top + height + foot + MARGIN), BACKGROUND)
    draw = ImageDraw.Draw(page)
    for i, ((name, _, lines), image) in enumerate(zip(grids, images, strict=True)):
        left = MARGIN + i * (width + MARGIN)
        draw.text((left, MARGIN), name, INK, title)
        page.paste(image, (left, top))
        for row, text in enumerate(lines):
            draw.text((left, top + height + 14 + row * line), text, QUIET, small)
    write_atomically(path, lambda temporary: page.save(temporary, format="PNG"))


def scores_by(command, real, fake, run):
    """{column: number} that a --score command prints for two folders; `run(words)` returns what a command printed."""
    words = [word.replace("{real}", str(real)).replace("{fake}", str(fake)) for word in shlex.split(command)]
    return read_scores(run(words), command)


def read_scores(printed, command):
    """{column: number} from the JSON object on the last line that a --score command printed. Raises Failure."""
    lines = printed.strip().splitlines()
    try:
        scores = json.loads(lines[-1]) if lines else None
    except ValueError:
        scores = None
    if not isinstance(scores, dict):
        last = lines[-1][:80] if lines else ""
        raise Failure(f"--score {command!r}: its last line must be a JSON object, but is {last!r}")
    return {name: value for name, value in scores.items()
            if isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)}


def scores_in(lines):
    """{column: number} of the scores in these lines of a metrics.jsonl, without their spreads and intervals.

    `nearest` is measured with metadata drawn in each way: the first, bank, has its name alone, gauss is named.
    """
    numbers, sources = {}, {}
    for entry in map(json.loads, lines):
        if "protocol" not in entry:
            continue
        for name, value in entry.items():
            if isinstance(value, float) and not name.endswith((*score_table.BESIDE, "_floor")):
                is_first = sources.setdefault(name, entry["source"]) == entry["source"]
                draw = entry["source"].rpartition("metadata ")[2].partition(",")[0]
                numbers[name if is_first else f"{name}_{draw}"] = value
    return numbers


def cost_of(log, steps):
    """{"s/step": median, "GPU GiB": peak} from the lines of a metrics.jsonl up to `steps`; {} without one.

    The first line holds the warm-up, and is left out where there are others.
    """
    if not log.exists():
        return {}
    lines = [json.loads(line) for line in log.read_text(encoding="utf-8").splitlines()]
    lines = [line for line in lines if line["step"] <= steps and "sec_per_step" in line]
    if not lines:
        return {}
    found = {"s/step": statistics.median(line["sec_per_step"] for line in lines[1:] or lines)}
    if "gpu_memory_gib" in lines[-1]:
        found["GPU GiB"] = max(line["gpu_memory_gib"] for line in lines)
    return found


def hardware():
    """The processor, the cores in use, the GPU, the versions, in one line."""
    gpu = torch.cuda.get_device_name(0) if torch.cuda.is_available() else "no GPU"
    return f"{cost.processor()}, {cores()} cores; {gpu}; torch {torch.__version__}, Python {platform.python_version()}"
