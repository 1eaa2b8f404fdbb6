"""The report's tables and verdicts against manually computed ones."""

import json
import runpy
from pathlib import Path

import pytest

import report

HAND_MADE = {
    "baseline": {0: {"fd": 300.0, "precision": 0.5, "real": 12, "G parameters": 1000},
                 1: {"fd": 290.0, "precision": 0.6, "real": 12, "G parameters": 1000},
                 2: {"fd": 313.0, "precision": 0.7, "real": 12, "G parameters": 1000}},
    "+SLAE": {0: {"fd": 320.0, "precision": 0.6, "real": 12, "G parameters": 1001},
              1: {"fd": 280.0, "precision": 0.7, "real": 12, "G parameters": 1001},
              2: {"fd": 330.0, "precision": 0.8, "real": 12, "G parameters": 1001}},
}


def test_mean_and_spread_by_hand():
    assert report.mean_and_spread([1.0, 2.0, 6.0]) == (3.0, pytest.approx(7**0.5))    # (4 + 1 + 9) / 2
    assert report.mean_and_spread([4.0]) == (4.0, None)


def test_the_table_of_means():
    lines = report.mean_table(HAND_MADE)
    assert lines[0] == "|  | fd | precision | G parameters | seeds |"
    assert lines[2] == "| baseline | 301.0 ± 11.5 | 0.600 ± 0.100 | 1,000 | 3 |"
    assert lines[3] == "| +SLAE | 310.0 ± 26.5 | 0.700 ± 0.100 | 1,001 | 3 |"


def test_a_score_that_never_varies_is_told_once_and_not_in_the_table():
    assert report.columns_of(HAND_MADE) == (["fd", "precision", "G parameters"], {"real": 12})


def test_the_table_of_seeds_has_every_run():
    lines = report.seed_table(HAND_MADE)
    assert len(lines) == 2 + 6 and "| +SLAE | 1 | 280.0 | 0.700 |" in lines


def test_the_floor_is_a_row_of_its_own():
    swd = {"baseline": {0: {"swd": 40.0, "s/step": 0.1}, 1: {"swd": 44.0}}}
    assert report.mean_table(swd, floor=20.0)[2] == "| baseline | 42.00 ± 2.83 | 0.100 | 2 |"
    assert report.mean_table(swd, floor=20.0)[-1] == "| floor: real against real | 20.00 | – | – |"


def test_verdicts_for_worse_and_for_better():
    fd, precision, size = report.verdicts(HAND_MADE)
    assert fd == ("+SLAE against baseline: fd 301.0 -> 310.0 (+3.0 %), worse; better in 1 of 3 seeds; "
                  "paired difference +9.0, 95 % interval -32.0 to 50.0")        # +20, -10, +17: 9 ± 4.303 * 16.5 / √3
    assert precision == ("+SLAE against baseline: precision 0.600 -> 0.700 (+17 %), better; "
                         "better in 3 of 3 seeds; paired difference +0.100, 95 % interval 0.100 to 0.100 "
                         "(**excludes 0**)")
    assert size == "+SLAE against baseline: G parameters 1,000 -> 1,001 (+0.10 %)"


def test_a_verdict_compares_only_the_seeds_that_both_have():
    results = {"baseline": {0: {"fd": 300.0}, 1: {"fd": 900.0}}, "both": {0: {"fd": 270.0}}}
    assert report.verdicts(results) == [
        "both against baseline: fd 300.0 -> 270.0 (-10 %), better; better in 1 of 1 seed"]


def test_a_verdict_on_a_column_of_unknown_direction_calls_nothing_better():
    results = {"baseline": {0: {"nearest": 0.5}, 1: {"nearest": 0.5}},
               "both": {0: {"nearest": 0.75}, 1: {"nearest": 0.25}}}
    line, = report.verdicts(results)
    assert "equal; higher in 1 of 2 seeds" in line and "better" not in line and "worse" not in line


def test_a_verdict_on_equal_numbers_and_on_a_baseline_of_zero():
    results = {"baseline": {0: {"recall": 0.0, "fd": 3.5}, 1: {"recall": 0.0, "fd": 4.5}},
               "both": {0: {"recall": 0.02, "fd": 3.5}, 1: {"recall": 0.04, "fd": 4.5}}}
    assert report.verdicts(results) == [
        "both against baseline: recall 0 -> 0.0300, better; better in 2 of 2 seeds; "
        "paired difference +0.0300, 95 % interval -0.0971 to 0.1571",
        "both against baseline: fd 4.000, equal in every seed"]


def test_cost_is_told_once_for_all_draws():
    results = {"baseline": {0: {"swd": 4.0, "s/step": 1.0}}, "both, mix": {0: {"swd": 5.0, "s/step": 1.01}},
               "both, bank": {0: {"swd": 5.0, "s/step": 1.01}}}
    assert [line.split(" ->")[0] for line in report.verdicts(results)] == [
        "both, mix against baseline: swd 4.000", "both, bank against baseline: swd 4.000",
        "both against baseline: s/step 1.000"]


def test_no_baseline_no_verdict():
    assert report.verdicts({"+SLAE": {0: {"fd": 1.0}}}) == []


def test_seconds_per_step_are_the_median_without_the_warm_up(tmp_path):
    log = tmp_path / "metrics.jsonl"
    log.write_text("".join(
        json.dumps({"step": step, "sec_per_step": seconds, "gpu_memory_gib": 1 + step}) + "\n"
        for step, seconds in ((1, 9.0), (2, 0.1), (3, 0.3), (4, 0.2), (5, 7.0))))
    assert report.cost_of(log, 4) == {"s/step": 0.2, "GPU GiB": 5}
    assert report.cost_of(tmp_path / "none", 4) == {}


def test_the_tables_of_results_are_those_of_the_scores():
    written = runpy.run_path(str(Path(__file__).parent.parent / "docs/write_ablation.py"))
    assert written["PAGE"].read_text(encoding="utf-8") == written["page"](), "python docs/write_ablation.py"
    row = "| 100 paintings | FastGAN | 8 | 2.76 | 519 | 0.74 | 0.63 | 0.75 | 1.11 | 509 |"      # means by hand
    assert row in written["last_step"]()
