"""Write the table and the pictures of the ablation in docs/results.md from the scores in docs/ablation/, and the curves
of the two long runs there from their tables.

    python docs/write_ablation.py     needs matplotlib and scipy; a test fails while the table is out of date

docs/ablation/ holds the ablation.json of each set of pictures, as benchmarks/ablation.py wrote it.
"""

import json
import re
import sys
from collections import defaultdict
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "docs")]

import report  # noqa: E402 - found through the line above
from write_flags import table  # noqa: E402

PAGE = ROOT / "docs" / "results.md"
DIFFERENCES = ROOT / "docs" / "results_ablation.png"
CONVERGENCE = ROOT / "docs" / "results_convergence.png"
HOURS = ROOT / "docs" / "results_hours.png"
BEGIN, END = "<!-- written by docs/write_ablation.py: do not edit -->", "<!-- end of what it writes -->"
SETS = {"paintings100": "100 paintings", "paintings756": "756 paintings", "faces100": "100 faces",
        "faces1000": "1,000 faces"}
# some sets lack the last
ARMS = {"baseline": "FastGAN", "slae": "SLAE", "metadata": "metadata", "both": "both", "w25": "metadata, 0.25"}
COLUMNS = {"kid": "kid", "fd": "fd", "precision": "precision", "coverage": "coverage", "nearest": "nearest",
           "vgg_kid": "kid, VGG-16", "vgg_fd": "fd, VGG-16"}
SHOWN = ("kid", "fd", "coverage")       # in the picture of differences
STEPS = (400, 800, 1200)
# minutes, steps, kid, fd, precision, recall, coverage
HOUR = re.compile(r"^\| (\d+) \| [\d,]+ \| ([\d.*]+) \| ([\d.*]+) \| [\d.*]+ \| [\d.*]+ \| ([\d.*]+) \|", re.MULTILINE)
KEY = re.compile(r"(\w+)_seed(\d+), step (\d+), \d+ pictures(, mix)?")


@cache
def read(name, step):
    """Return {arm: {seed: {column: number}}} of a set of pictures at a step."""
    scores = json.loads((ROOT / "docs" / "ablation" / f"{name}.json").read_text(encoding="utf-8"))["scores"]
    found = defaultdict(dict)
    for key, by_scorer in scores.items():
        arm, seed, at, _ = KEY.fullmatch(key).groups()
        numbers = {column: value for scorer in by_scorer.values() for column, value in scorer.items()}
        if int(at) == step and "kid" in numbers:
            found[arm][int(seed)] = numbers
    return found


def arms_of(results):
    """Return {arm: its name in tables} of the arms that a set of pictures has."""
    return {arm: label for arm, label in ARMS.items() if arm in results}


def cell(found, decimals):
    """Return a paired difference with its interval as a cell of a table, bold where the interval excludes 0."""
    mean, low, high = (f"{value:.{decimals}f}" for value in found)
    text = f"{'+' * (found[0] >= 0)}{mean} ({low} to {high})"
    return text if found[1] <= 0 <= found[2] else f"**{text}**"


def last_step():
    """Return the lines of the table of all sets after the last step."""
    rows = []
    for name, title in SETS.items():
        results = read(name, STEPS[-1])
        baseline = results[report.BASELINE]
        means = {column: report.mean_and_spread([run[column] for run in baseline.values()])[0] for column in COLUMNS}
        decimals = {column: 0 if mean >= 100 else 2 for column, mean in means.items()}     # of fd; of the others
        for arm, label in arms_of(results).items():
            cells = [f"{means[column]:.{decimals[column]}f}" if arm == report.BASELINE else
                     cell(report.paired_interval(baseline, results[arm], column), decimals[column])
                     for column in COLUMNS]
            rows.append((title if arm == report.BASELINE else "", label, str(len(results[arm])), *cells))
    return table(("", "", "seeds", *COLUMNS.values()), rows)


def section():
    """Return what stands between BEGIN and END."""
    return "\n".join([BEGIN, "", *last_step(), "", END])


def draw_differences():
    """Write DIFFERENCES: for each set and column of SHOWN the paired differences in percent of FastGAN's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=100, layout="constrained")
    for row, (name, title) in enumerate(SETS.items()):
        results = read(name, STEPS[-1])
        labels = list(arms_of(results).values())
        for place, column in enumerate(SHOWN):
            axes = figure.add_subplot(len(SETS), len(SHOWN), row * len(SHOWN) + place + 1)
            intervals = report.relative_differences(results, results[report.BASELINE], column)
            report.draw_intervals(axes, {ARMS[arm]: found for arm, found in intervals.items()}, labels[:0:-1],
                                  place == 0)
            better = "lower" if report.sign_of(column) < 0 else "higher"
            axes.set_title(f"{title}: {column} ({better} is better)", fontsize=9)
    figure.savefig(DIFFERENCES, format="png")


def draw_convergence():
    """Write CONVERGENCE: for each set kid by step, a line for each arm with the 95 % interval of its mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 3.4), dpi=100, layout="constrained")
    for place, (name, title) in enumerate(SETS.items()):
        axes = figure.add_subplot(1, len(SETS), place + 1)
        by_step = [read(name, step) for step in STEPS]
        for arm, label in arms_of(by_step[-1]).items():
            means, lows, highs = zip(*(report.interval([run["kid"] for run in results[arm].values()])
                                       for results in by_step), strict=True)
            line, = axes.plot(STEPS, means, marker="o", markersize=4, label=label)
            axes.fill_between(STEPS, lows, highs, color=line.get_color(), alpha=0.12, linewidth=0)
        axes.set(title=f"{title}: kid by step", xticks=STEPS, yscale="log")
        axes.yaxis.set_major_formatter("{x:g}")
        axes.yaxis.set_minor_formatter("{x:g}")
        axes.tick_params(labelsize=8, which="both")
        axes.grid(alpha=0.3, which="both")
        axes.legend(fontsize=8)
    figure.savefig(CONVERGENCE, format="png")


def draw_hours():
    """Write HOURS: the scores of the two runs of two hours by minute, from their tables in PAGE."""
    from matplotlib.figure import Figure

    tables = PAGE.read_text(encoding="utf-8").split("### Two hours of two cores")[1].split("**The same on scenes**")
    figure = Figure(figsize=(10, 2.8), dpi=100, layout="constrained")
    names = {1: "kid (lower is better)", 2: "fd (lower is better)", 3: "coverage (higher is better)"}
    for number, name in names.items():
        axes = figure.add_subplot(1, len(names), number)
        for text, title in zip(tables, ("9,000 faces", "756 paintings"), strict=True):
            rows = [[float(cell.strip("*")) for cell in row] for row in HOUR.findall(text)]
            axes.plot([row[0] for row in rows], [row[number] for row in rows], marker="o", markersize=4, label=title)
        axes.set_title(name, fontsize=9)
        axes.set_xlabel("minutes", fontsize=8)
        axes.set_ylim(bottom=0)
        axes.tick_params(labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8)
    figure.savefig(HOURS, format="png")


def page():
    """Return docs/results.md with the section of today's scores."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + section() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw_differences()
    draw_convergence()
    draw_hours()
    print("written:", *(path.relative_to(ROOT) for path in (PAGE, DIFFERENCES, CONVERGENCE, HOURS)))
