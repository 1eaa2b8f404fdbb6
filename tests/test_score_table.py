"""Scores: the table of all recorded scores, and which of them are comparable."""

import json
import multiprocessing
import os
from pathlib import Path

import pytest

from flags.scores import scores_by_rank
from storage import score_table
from storage.score_table import Score, as_entries, better_score, comparable, in_words, tables


def score(protocol="A", source="G_ema, seed 0", **values):
    return Score(values or {"fid": 10.0}, protocol, source)


def record(folder, name, step, scores):
    score_table.record(folder, as_entries(name, step, scores))


def entries(folder="logs"):
    # without empty lines: concurrent programs may leave some
    return [json.loads(line) for line in Path(folder, "scores.jsonl").read_text(encoding="utf-8").split("\n") if line]


def read_tables(folder="logs"):
    """{protocol: [[cell, ...] of the header, of each row]}, parsed from scores.md as Markdown."""
    tables, protocol = {}, None
    for line in Path(folder, "scores.md").read_text(encoding="utf-8").splitlines():
        if not line.startswith("|"):
            protocol = line.rstrip(".") or protocol
        elif set(line) - set("|-: "):
            cells = line.replace("\\|", "\0").strip("|").split("|")
            tables.setdefault(protocol, []).append([cell.strip().replace("\0", "|") for cell in cells])
    return tables


@pytest.fixture
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


# ---- the table ----


def test_scores_are_kept_as_lines_and_shown_as_a_table(home):
    record("logs", "faces", 2000, [score(fid=41.2134, precision=0.61)])
    (entry,) = entries()
    assert {**entry, "taken": ""} == {"name": "faces", "step": 2000, "taken": "", "fid": 41.2134, "precision": 0.61,
                                      "protocol": "A", "source": "G_ema, seed 0"}
    ((head, row),) = read_tables().values()
    assert head == ["", "step", "fid", "precision", "source", "date"]
    assert row == ["faces", "2,000", "41.21", "0.6100", "G_ema, seed 0", entry["taken"]]


def test_each_protocol_has_a_table_of_its_own_under_its_text(home):
    record("logs", "a", 1, [score("TF-Inception; 8 samples", fid=5.0), score("sliced Wasserstein", swd=80.0)])
    record("logs", "b", 1, [score("TF-Inception; 8 samples", fid=6.0)])
    tables = read_tables()
    assert list(tables) == ["TF-Inception; 8 samples", "sliced Wasserstein"]
    assert [row[0] for row in tables["TF-Inception; 8 samples"][1:]] == ["a", "b"]
    assert [row[:3] for row in tables["sliced Wasserstein"]] == [["", "step", "swd"], ["a", "1", "80.00"]]


def test_rows_of_a_run_stand_together_in_order_of_their_steps(home):
    for name, step in (("b", 300), ("a", 20), ("b", 9), ("a", 100), ("b", 30)):
        record("logs", name, step, [score()])
    ((_, *rows),) = read_tables().values()
    assert [row[:2] for row in rows] == [["b", "9"], ["b", "30"], ["b", "300"], ["a", "20"], ["a", "100"]]


def test_of_two_equal_entries_the_later_one_is_shown_and_both_are_kept(home):
    record("logs", "a", 1, [score(fid=7.0)])
    record("logs", "a", 1, [score(fid=8.0, kid=1.0)])
    record("logs", "a", 1, [score(source="the folder", fid=9.0)])
    record("logs", "a", 1, [score(kid=2.0)])
    ((_, *rows),) = read_tables().values()
    assert [row[2:4] for row in rows] == [["9.000", ""], ["8.000", "2.000"]], "a score that is not measured again stays"
    assert [entry.get("fid") for entry in entries()] == [7, 8, 9, None]


def test_a_name_cannot_break_the_table(home):
    record("logs", "a|b\n| c", 1, [score(source="x|y")])
    ((head, row),) = read_tables().values()
    assert len(row) == len(head) and row[0] == "a|b | c" and row[3] == "x|y"


def test_a_folder_has_no_step(home):
    record("logs", "a", 5, [score()])
    record("logs", "their/pictures", None, [score(source="the folder")])
    ((_, *rows),) = read_tables().values()
    assert [row[:2] for row in rows] == [["a", "5"], ["their/pictures", ""]]
    assert entries()[1]["step"] is None


DAMAGE = ('{"name": "cut sho', "[1, 2]", '"text"', "7", "", "\xff\xfe", '{"name": "b", "step": 1, "fid": 3}',
          '{"name": "b", "step": 1, "fid": 3, "protocol": "A", "source": "s"}',
          '{"name": "b", "step": "x", "fid": 3, "protocol": "A", "source": "s", "taken": "now"}',
          '{"name": ["b"], "step": 1, "fid": 3, "protocol": "A", "source": "s", "taken": "now"}')


@pytest.mark.parametrize("line", DAMAGE)
def test_a_damaged_line_is_passed_over(home, line):
    record("logs", "a", 1, [score()])
    with open("logs/scores.jsonl", "a", encoding="latin-1") as file:
        file.write(line + "\n")
    record("logs", "c", 1, [score()])
    ((_, *rows),) = read_tables().values()
    assert [row[0] for row in rows] == ["a", "c"]


def test_a_line_that_a_crash_cut_short_swallows_none_that_follow(home):
    record("logs", "a", 1, [score()])
    with open("logs/scores.jsonl", "a") as file:
        file.write('{"name": "b", "st')
    record("logs", "c", 1, [score()])
    ((_, *rows),) = read_tables().values()
    assert [row[0] for row in rows] == ["a", "c"]


def test_a_spread_stands_beside_its_number(home):
    record("logs", "a", 1, [score(kid=0.012347, kid_std=0.00041, inception_score=2.5)])
    record("logs", "b", 1, [score(inception_score=3.0, inception_score_std=0.25)])
    ((head, *rows),) = read_tables().values()
    assert head[2:4] == ["kid", "inception_score"], "no column of its own"
    assert [row[2:4] for row in rows] == [["0.01235 ± 0.00041", "2.500"], ["", "3.000 ± 0.250"]]


@pytest.mark.parametrize(("value", "shown"), [
    (0.0, "0.000"), (1234.56, "1,235"), (99.99, "99.99"), (-0.0001234, "-0.00012"), (float("nan"), "nan"),
    (float("inf"), "inf"), (12345, "12,345"), (0.999, "0.9990"),
])
def test_numbers_have_four_digits_and_five_decimals_at_the_most(home, value, shown):
    record("logs", "a", 1, [score(swd=value)])
    assert read_tables()["A"][1][2] == shown


def test_tables_align_and_numbers_stand_to_the_right(home):
    record("logs", "a run of a long name", 1_000_000, [score(fid=3.0)])
    record("logs", "b", 1, [score(fid=123.0, kid=1.0, kid_std=0.25)])
    lines = [line for line in Path("logs/scores.md").read_text(encoding="utf-8").splitlines() if line.startswith("|")]
    assert len({len(line) for line in lines}) == 1 and len(lines) == 4
    bars = [[i for i, letter in enumerate(line) if letter == "|"] for line in lines]
    assert all(places == bars[0] for places in bars)
    head, rule, first, second = lines
    ends = {word: head.index(f" {word} |") + len(word) for word in ("step", "fid", "kid")}
    assert first[:ends["step"] + 1].endswith(" 1,000,000") and second[:ends["step"] + 1].endswith("  1")
    assert first[:ends["fid"] + 1].endswith(" 3.000") and second[:ends["fid"] + 1].endswith(" 123.0")
    assert first.startswith("| a run of a long name |") and second.startswith("| b  ")
    assert [cell.endswith(": ") for cell in rule.strip("|").split("|")] == [False, True, True, True, False, False]


def test_scores_are_a_table_before_they_are_recorded():
    text = "\n".join(tables(as_entries("b", 2, [score("B")])))
    assert "| b " in text and "B." in text


def test_scores_of_a_run_that_is_moved_aside_go_with_it_and_mix_with_none_of_the_new_one(home):
    record("logs", "a", 5, [score(fid=7.0, kid=1.0)])
    score_table.rename("logs", "a", "a.old1")
    record("logs", "a", 5, [score(fid=8.0)])
    ((_, *rows),) = read_tables().values()
    assert [row[:4] for row in rows] == [["a.old1", "5", "7.000", "1.000"], ["a", "5", "8.000", ""]]


def test_scores_of_steps_that_a_run_gives_up_are_shown_no_more_but_kept(home):
    for name, step in (("a", 2), ("a", 4), ("b", 4), ("a", None)):
        record("logs", name, step, [score(fid=7.0, kid=1.0)])
    for _ in range(2):
        score_table.give_up_after("logs", "a", 2)
    assert [row[:2] for row in read_tables()["A"][1:]] == [["a", ""], ["a", "2"], ["b", "4"]]
    record("logs", "a", 4, [score(fid=8.0)])
    assert ["a", "4", "8.000", ""] in [row[:4] for row in read_tables()["A"][1:]]
    assert len(entries()) == 6, "what changes nothing is not written"
    score_table.give_up_after("elsewhere", "a", 2)
    assert not Path("elsewhere").exists()
    score_table.give_up_after("logs", "a", -1)
    score_table.rename("logs", "a", "c")
    record("logs", "b", 5, [score()])
    rows = [row[:2] for row in read_tables()["A"][1:]]
    assert rows == [["b", "4"], ["b", "5"], ["a", ""]], "a folder of this name is no run"


def test_a_folder_whose_name_is_not_utf_8_breaks_no_table(home):
    record("logs", os.fsdecode(b"bilder_\xe9"), None, [score()])
    record("logs", "a", 1, [score()])
    assert [row[0] for row in read_tables()["A"][1:]] == ["bilder_\\udce9", "a"]


def _record_many(name):
    for step in range(20):
        record("logs", name, step, [score(), score("B" * 5000, swd=1.0)])


def test_programs_that_record_at_once_lose_no_line(home):
    processes = [multiprocessing.get_context("fork").Process(target=_record_many, args=(name,)) for name in "abc"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    assert all(process.exitcode == 0 for process in processes)
    assert sorted((entry["name"], entry["step"], entry["protocol"][0]) for entry in entries()) == [
        (name, step, protocol) for name in "abc" for step in range(20) for protocol in "AB"]
    record("logs", "d", 0, [score()])
    assert len(read_tables()["A"]) == 1 + 3 * 20 + 1
    assert sorted(os.listdir("logs")) == ["scores.jsonl", "scores.md"]


# ---- comparable scores ----


FID = {"metric": "fid", "fid": 10.0, "protocol": "A", "source": "G_ema, seed 0"}


def test_the_best_is_the_lowest_of_its_kind():
    found = [score(swd=1.0), score(fid=10.0, kid=1.0)]
    assert better_score(found, None, ("fid", "kid")) == FID
    assert better_score(found, {**FID, "fid": 10.5}, ("fid", "kid")) == FID
    assert better_score(found, {**FID, "fid": 10.0}, ("fid", "kid")) is None, "the earlier of two equal ones stays"
    assert better_score(found, {**FID, "fid": 9.0}, ("fid", "kid")) is None


@pytest.mark.parametrize("changes", [{"protocol": "B"}, {"source": "G_ema, seed 1"}, {"metric": "kid", "kid": 1.0}])
def test_a_best_of_another_kind_gives_way(changes):
    best = {**FID, "fid": 1.0, **changes}
    assert not comparable(FID, best)
    assert better_score([score()], best, ("fid", "kid")) == FID


def test_the_first_score_that_was_measured_decides():
    found = [score(swd=1.0), score(fid=10.0, kid=2.0)]
    assert better_score(found, FID, ("kid", "fid")) == {**{k: v for k, v in FID.items() if k != "fid"}, "metric": "kid",
                                                       "kid": 2.0}
    assert better_score([score(fid=10.0)], None, ("kid", "fid")) == FID
    assert better_score([score(swd=1.0)], None, ("kid", "fid")) is None and better_score([], None, ("fid",)) is None
    assert scores_by_rank("inception", 999) == ("kid", "fid") and scores_by_rank("vgg16", 1000) == ("fd_vgg16",
                                                                                                    "kid_vgg16")


# ---- intervals ----


def test_an_interval_stands_in_brackets_beside_its_number(home):
    record("logs", "a", 1, [score(fid=41.21, fid_low=39.9, fid_high=42.6, fid_floor=12.5, kid=0.0123, kid_std=0.0004,
                                  kid_low=0.0119, kid_high=0.0127)])
    record("logs", "b", 1, [score(fid=40.0, kid=0.013, kid_std=0.0003)])
    record("logs", "c", 1, [score("C", kid=0.0131, kid_low=-1.25, kid_high=1.27)])
    assert read_tables().pop("C")[1][2] == "0.013 (-1.250 to 1.270)", "as many digits as the interval has"
    head, *rows = read_tables()["A"]
    assert head[2:5] == ["fid", "fid_floor", "kid"]
    assert [row[2:5] for row in rows] == [["41.21 (39.90 to 42.60)", "12.50", "0.01230 (0.01190 to 0.01270)"],
                                          ["40.00", "", "0.01300 ± 0.00030"]], "lines of older versions, too"
    assert "95 % interval" in Path("logs/scores.md").read_text(encoding="utf-8")
    assert in_words(score(fid=41.21, fid_low=39.9, fid_high=42.6, fid_floor=12.5, kid=0.5, kid_std=1.0).values) == (
        "fid 41.21 (39.9 to 42.6), kid 0.5")


def test_a_line_below_a_table_says_which_way_is_better(home):
    lines = tables(as_entries("a", 1, [score(fid=3.0, fid_floor=1.0, kid_dinov2=1.0, precision=0.5, share_z=0.2)]))
    assert "(lower is better: fid, kid_dinov2; higher is better: precision)" in lines
    assert not any("better" in line for line in tables(as_entries("a", 1, [score("B", share_z=0.2)])))
