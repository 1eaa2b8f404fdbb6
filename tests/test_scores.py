"""Scores: the table of all that was ever taken, what compares with what, and how a set of pictures is measured."""

import json
import multiprocessing
import os
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import data_loader
from device.distributed import Place
from errors import DataError
from metrics import inception, meter
from metrics.meter import Meter
from metrics.table import Score, better_fid, record, same_kind
from parameter import resolve

CPU = Place(torch.device("cpu"))


def score(protocol="A", source="G_ema, seed 0", **values):
    return Score(values or {"fid": 10.0}, protocol, source)


def entries(folder="logs"):
    # empty lines are none: two programs at once may leave some
    return [json.loads(line) for line in Path(folder, "scores.jsonl").read_text(encoding="utf-8").split("\n") if line]


def read_tables(folder="logs"):
    """{protocol: [[cell, ...] of the head, of each row]} of scores.md, as a reader of Markdown sees it."""
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


# -------------------------------------------------------------------------------------------------------- the table


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
    record("logs", "a", 1, [score(fid=8.0)])
    record("logs", "a", 1, [score(source="the folder", fid=9.0)])
    ((_, *rows),) = read_tables().values()
    assert [row[2] for row in rows] == ["8.000", "9.000"]
    assert [entry["fid"] for entry in entries()] == [7, 8, 9]


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


def test_what_was_recorded_comes_back_alone(home):
    record("logs", "a", 1, [score()])
    text = "\n".join(record("logs", "b", 2, [score("B")]))
    assert "| b " in text and "B." in text and "| a " not in text


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


# --------------------------------------------------------------------------------------------- what compares with what


def test_the_best_fid_is_the_lowest_of_its_kind():
    found = [score(swd=1.0), score(fid=10.0, kid=1.0)]
    kept = {"fid": 10.0, "protocol": "A", "source": "G_ema, seed 0"}
    assert better_fid(found, None) == kept
    assert better_fid(found, {**kept, "fid": 10.5}) == kept
    assert better_fid(found, {**kept, "fid": 10.0}) is None, "the earlier of two equal ones stays"
    assert better_fid(found, {**kept, "fid": 9.0}) is None


@pytest.mark.parametrize("changes", [{"protocol": "B"}, {"source": "G_ema, seed 1"}])
def test_a_best_of_another_kind_gives_way(changes):
    best = {"fid": 1.0, "protocol": "A", "source": "G_ema, seed 0", **changes}
    assert not same_kind(score(), best)
    assert better_fid([score()], best) == {"fid": 10.0, "protocol": "A", "source": "G_ema, seed 0"}


def test_without_a_fid_there_is_no_best():
    assert better_fid([score(swd=1.0, kid=2.0)], None) is None and better_fid([], None) is None
    assert same_kind(score(), {"fid": 3.0, "protocol": "A", "source": "G_ema, seed 0"})


# ------------------------------------------------------------------------------------------------------------ Meter


@pytest.fixture
def real(home, pictures, small_inception):
    """configure(**changes) -> the config of a run on the folder of 12 pictures."""
    def configure(**changes):
        return resolve({"dataset": "folder", "image_path": str(pictures), "imsize": 32, "batch_size": 4,
                        "num_workers": 0, "device": "cpu", **changes})

    return configure


def samples(count=8, seed=1):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def meter_of(config):
    return Meter(config, meter.of_run(config, data_loader.build_dataset(config)), CPU)


def measured(config, pictures=None, **how):
    return meter_of(config).measure(samples() if pictures is None else pictures, "noise", **how)


def test_the_reference_passes_once_and_is_read_the_next_time(real, small_inception, capsys):
    first = measured(real())
    assert "reference: all 12 pictures of folder pictures, seen by Inception this once" in capsys.readouterr().out
    assert small_inception[0].seen == 12 + 8
    second = measured(real())
    (path,) = Path("cache/reference").iterdir()
    assert f"seen by Inception before, read from {path}" in capsys.readouterr().out
    assert small_inception[1].seen == 8, "the samples alone"
    assert first == second and set(first[0].values) == {
        "fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"}


def repaint(real, pictures, monkeypatch):
    Image.fromarray(np.zeros((40, 50, 3), np.uint8)).save(pictures / "3.png")
    return real()


def remove(real, pictures, monkeypatch):
    (pictures / "3.png").unlink()
    return real()


def hold_out(real, pictures, monkeypatch):
    return real(holdout=0.25)


def other_size(real, pictures, monkeypatch):
    return real(imsize=64)


def other_weights(real, pictures, monkeypatch):
    return real(inception_weights="random")


def other_procedure(real, pictures, monkeypatch):
    monkeypatch.setattr(meter, "CACHE_VERSION", meter.CACHE_VERSION + 1)
    return real()


def fewer_rows(real, pictures, monkeypatch):
    monkeypatch.setattr(inception, "MAX_ROWS", 5)
    return real()


def other_library(real, pictures, monkeypatch):
    monkeypatch.setattr(meter, "version", lambda package: "99")
    return real()


@pytest.mark.parametrize("change", [repaint, remove, hold_out, other_size, other_weights, other_procedure, fewer_rows,
                                    other_library])
def test_whatever_changes_the_reference_has_it_taken_anew(real, small_inception, pictures, monkeypatch, capsys, change):
    meter_of(real())
    config = change(real, pictures, monkeypatch)
    meter_of(config)
    assert capsys.readouterr().out.count("seen by Inception this once") == 2
    assert small_inception[1].seen == len(data_loader.build_dataset(config))


def test_another_file_of_weights_under_the_same_name_is_another(real, small_inception):
    for content in (b"one", b"two", b"two"):
        Path("my.pth").write_bytes(content)
        meter_of(real(inception_weights="my.pth"))
    assert [net.seen for net in small_inception] == [12, 12, 0]


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:100])


def other_shapes(path):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "covariance": kept["covariance"][:-1]}, path)


def other_width_of_rows(path):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "rows": kept["rows"][:, :-1]}, path)


def without_rows(path):
    kept = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in kept.items() if name != "rows"}, path)


def of_others(path):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "origin": {**kept["origin"], "pictures": "others"}}, path)


@pytest.mark.parametrize("damage", [flip, cut, other_shapes, other_width_of_rows, without_rows, of_others])
def test_a_damaged_or_foreign_cache_is_taken_anew(real, small_inception, capsys, damage):
    expected = measured(real())
    (path,) = Path("cache/reference").iterdir()
    damage(path)
    assert measured(real()) == expected
    assert "recomputing it" in capsys.readouterr().out and small_inception[1].seen == 12 + 8
    measured(real())
    assert small_inception[2].seen == 8, "it was mended"


def test_a_protocol_is_the_same_whichever_metrics_were_asked(real):
    found = {chosen: measured(real(metrics=chosen)) for chosen in (
        ("fid",), ("kid",), ("is", "pr"), ("fid", "kid", "pr", "is"), ("fid", "swd"))}
    assert len({scored[0].protocol for scored in found.values()}) == 1
    assert found["fid",][0].values["fid"] == found["fid", "kid", "pr", "is"][0].values["fid"]
    assert set(found["is", "pr"][0].values) == {"precision", "recall", "inception_score", "inception_score_std"}
    assert [set(scored.values) for scored in found["fid", "swd"]] == [{"fid"}, {"swd"}]
    assert found["fid", "swd"][1].protocol.startswith("sliced Wasserstein")


def test_a_protocol_says_what_decides_the_number(real, pictures):
    (found,) = measured(real())
    assert found.source == "noise"
    for words in ("TF-Inception 2015-12-05 (sha256 6726825d)", "8 samples at 32 px", "KID: 100 subsets of 8;",
                  "against all 12 pictures of folder pictures, unflipped", "Inception Score: 8 splits",
                  "3 nearest neighbours", "torch-fidelity", "fewer than 2,048 pictures"):
        assert words in found.protocol, words
    Path("my.pth").write_bytes(b"others")
    (pictures.parent / "few").mkdir()
    for number in range(5):
        os.link(pictures / f"{number}.png", pictures.parent / "few" / f"{number}.png")
    others = [measured(real(), samples(9)), measured(real(imsize=64), torch.zeros(8, 3, 64, 64, dtype=torch.uint8)),
              measured(real(holdout=0.25)), measured(real(image_path=str(pictures.parent / "few"))),
              measured(real(inception_weights="random")), measured(real(inception_weights="my.pth"))]
    protocols = [scored[0].protocol for scored in others]
    assert len({found.protocol, *protocols}) == 1 + len(others)
    assert "less the 0.25 held out" in protocols[2] and "RANDOM" in protocols[4]
    assert "Inception of other weights than the standard ones (sha256 " in protocols[5]


def test_a_protocol_says_that_some_of_the_metrics_see_a_part_of_the_reference(real, monkeypatch):
    monkeypatch.setattr(inception, "MAX_ROWS", 10)
    assert "KID, precision, recall: 10 of the real pictures" in measured(real())[0].protocol
    assert "fewer than" in measured(real())[0].protocol
    monkeypatch.setattr(meter, "SMALL", 8)
    assert "fewer than" not in measured(real())[0].protocol


def test_of_a_folder_the_reference_is_what_training_would_see(real, pictures):
    reference = meter.of_folder(pictures, 32, "--real_dir")
    assert len(reference) == 12 and reference.words == "all 12 pictures of folder pictures"
    assert torch.equal(reference.dataset[5], data_loader.open_dataset(real())[5])
    assert reference.fingerprint == meter.of_run(real(), data_loader.build_dataset(real())).fingerprint
    with pytest.raises(DataError, match="^--real_dir: .*nowhere.*; name a folder of pictures"):
        meter.of_folder("nowhere", 32, "--real_dir")


@pytest.mark.parametrize(("chosen", "count", "words"), [
    (("fid", "pr"), 3, "3 generated pictures: --metrics fid,pr need at least 4"),
    (("fid", "kid"), 1, "1 generated picture: --metrics fid,kid need at least 2"),
])
def test_too_few_samples_are_refused(real, chosen, count, words):
    with pytest.raises(DataError, match=words) as refused:
        measured(real(metrics=chosen), samples(count))
    assert refused.value.code == 3
    assert measured(real(metrics=chosen), samples(4))


def test_too_few_real_pictures_are_refused_before_anything_is_loaded(real, pictures, small_inception):
    for number in range(3, 12):
        (pictures / f"{number}.png").unlink()
    with pytest.raises(DataError, match="3 real pictures: --metrics fid,kid,pr,is need at least 4"):
        meter_of(real(batch_size=1))
    assert not small_inception
    assert measured(real(batch_size=1, metrics=("fid", "kid")))


def test_swd_alone_needs_no_network_and_no_cache(real, small_inception):
    (found,) = measured(real(metrics=("swd",)))
    assert found.values["swd"] > 0 and not small_inception and not Path("cache/reference").exists()
    assert measured(real(metrics=("swd",)))[0] == found


def test_whoever_wants_it_to_end_gets_no_score_and_waits_for_a_chunk_at_the_most(real, small_inception, monkeypatch):
    monkeypatch.setattr(inception, "CHUNK", 4)
    asked = []

    def stopped():
        asked.append(len(asked))
        return len(asked) > 2

    assert measured(real(), samples(40), stopped=stopped) is None
    assert small_inception[0].seen == 12 + 2 * 4
