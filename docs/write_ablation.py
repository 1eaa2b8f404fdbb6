"""Write the tables and the picture of the ablation in docs/results.md from the scores in docs/ablation/.

    python docs/write_ablation.py     needs matplotlib and scipy; a test fails while the tables are out of date

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
PICTURE = ROOT / "docs" / "results_ablation.png"
BEGIN, END = "<!-- written by docs/write_ablation.py: do not edit -->", "<!-- end of what it writes -->"
SETS = {"paintings100": "100 paintings", "paintings756": "756 paintings", "faces100": "100 faces",
        "faces1000": "1,000 faces"}
ARMS = {"baseline": "FastGAN", "slae": "SLAE", "metadata": "metadata", "both": "both"}
COLUMNS = {"kid": "kid", "fd": "fd", "coverage": "coverage", "nearest": "nearest", "vgg_kid": "kid, VGG-16"}
SHOWN = ("kid", "fd", "coverage")       # in the picture
STEPS = (400, 800, 1200)
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
        for arm, label in ARMS.items():
            cells = [f"{means[column]:.{decimals[column]}f}" if arm == report.BASELINE else
                     cell(report.paired_interval(baseline, results[arm], column), decimals[column])
                     for column in COLUMNS]
            rows.append((title if arm == report.BASELINE else "", label, str(len(results[arm])), *cells))
    return table(("", "", "seeds", *COLUMNS.values()), rows)


def convergence():
    """Return the lines of the table of kid by step."""
    rows = []
    for name, title in SETS.items():
        by_step = [read(name, step) for step in STEPS]
        means = [report.mean_and_spread([run["kid"] for run in results[report.BASELINE].values()])[0]
                 for results in by_step]
        rows.append((title, "FastGAN", *(f"{mean:.2f}" for mean in means)))
        for arm in list(ARMS)[1:]:
            cells = [cell(report.paired_interval(results[report.BASELINE], results[arm], "kid"), 2)
                     for results in by_step]
            rows.append(("", ARMS[arm], *cells))
    return table(("kid at step", "", *map(str, STEPS)), rows)


def section():
    """Return what stands between BEGIN and END."""
    return "\n".join([BEGIN, "", *last_step(), "", *convergence(), "", END])


def draw():
    """Write PICTURE: for each set and column of SHOWN the paired differences in percent of FastGAN's mean."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(10, 6.4), dpi=100, layout="constrained")
    for row, (name, title) in enumerate(SETS.items()):
        results = read(name, STEPS[-1])
        for place, column in enumerate(SHOWN):
            axes = figure.add_subplot(len(SETS), len(SHOWN), row * len(SHOWN) + place + 1)
            intervals = report.relative_differences(results, results[report.BASELINE], column)
            report.draw_intervals(axes, {ARMS[arm]: found for arm, found in intervals.items()},
                                  list(ARMS.values())[:0:-1], place == 0)
            better = "lower" if report.sign_of(column) < 0 else "higher"
            axes.set_title(f"{title}: {column} ({better} is better)", fontsize=9)
    figure.savefig(PICTURE, format="png")


def page():
    """Return docs/results.md with the section of today's scores."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    return before + section() + rest.split(END)[1]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    draw()
    print(f"written: {PAGE.relative_to(ROOT)}, {PICTURE.relative_to(ROOT)}")
