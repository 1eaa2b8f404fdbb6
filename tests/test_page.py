"""The gallery pages: the data embedded in them, and how they behave in a real browser."""

import base64
import hashlib
import html
import io
import json
import math
import os
import re
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from gallery import page
from storage.folders import RunFolders

HOSTILE = '"><img src=x onerror=alert(1)>'
HOSTILE_PROTOCOL = "</script><img src=x onerror=alert(1)>"
HOSTILE_VERSION = "<script>alert(2)<%script><!-- &amp; '\"%20#?"       # a version cannot contain /


def picture(path, colour=(90, 120, 150), size=(40, 30)):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", size, colour).save(path)
    return path


def shade(index):
    """A different colour for each recorded step, to recognize it in the browser."""
    return (10 + index * 37 % 240, 10 + index * 91 % 240, 60)


class Run:
    """A run's folders in `root`, filled with small pictures and a metrics.jsonl."""

    def __init__(self, root, version="v", attention=None):
        self.root = root
        self.folders = RunFolders(root / "samples" / version, attention or root / "samples" / version,
                                  root / "logs" / version, root / "models" / version)
        self.config = SimpleNamespace(version=version, model="sagan", mode="train", dataset="toy", image_path="./data",
                                      imsize=32, total_step=1000, g_attn=(8, 16), metadata=None, hflip=False,
                                      init_from=None)
        self.folders.create()

    def record(self, step, kinds=("fake", "attn_g8", "attn_g16"), colour=(90, 120, 150)):
        for kind in kinds:
            folder = self.folders.attention if kind.startswith("attn_") else self.folders.samples
            picture(folder / f"{step:07d}_{kind}.png", colour)

    def log(self, *lines, end="\n"):
        with open(self.folders.logs / "metrics.jsonl", "a", encoding="utf-8") as file:
            file.write("\n".join(line if isinstance(line, str) else json.dumps(line) for line in lines) + end)

    def write(self, state=None, every=None):
        """Write the page; with a state, as the run itself does."""
        page.write_run_page(self.folders, self.config, live=state and page.Live(state, every))
        return self.path

    @property
    def path(self):
        return self.folders.samples / "index.html"

    def data(self):
        return embedded(self.write(), "data")

    def data_of_a_copy(self):
        """The data of a copy of this run, whose metrics.jsonl is read from the start."""
        root = self.root.with_name(f"copy of {self.root.name}")
        shutil.copytree(self.root, root)
        return Run(root, self.folders.samples.name).data()


def embedded(path, name):
    """The content of a page's JSON block, parsed as a browser does: up to the first </script."""
    text = path.read_text(encoding="utf-8")
    return json.loads(re.search(rf'<script type="application/json" id="{name}">(.*?)</script', text, re.DOTALL)[1])


def measure(step, protocol="P", source="G_ema, seed 0", **figures):
    """A metrics line of a measurement."""
    return {"step": step, **figures, "protocol": protocol, "source": source}


def points(data, key):
    """{(protocol, source): [[step, value, deviation, and where there are any low, high, floor], ...]} of a key."""
    return {tuple(data["measured"]["groups"][group]): list(map(list, zip(*columns, strict=True)))
            for name, group, *columns in data["measured"]["series"] if name == key}


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path)


# ----------------------------------------------------------------------------------------------------- the pictures


def test_steps_and_layers_are_those_on_disk(run):
    for step in (100, 200, 12345678):
        run.record(step, ("fake", "attn_d4", "attn_g16", "attn_g8", "attn_d8"))
    run.record(200, ("recon",))
    for other in ("0000100_generated_seed0.png", "100_fake.png", "0000300_fake.png.tmp", "00000100_fake.png", "x.png"):
        picture(run.folders.samples / "t.png").rename(run.folders.samples / other)
    (run.folders.samples / "0000100_generated_seed1").mkdir()
    picture(run.folders.samples / "real.png", size=(70, 50))
    data = run.data()
    assert data["steps"] == [100, 200, 12345678]
    assert list(data["pictures"]) == ["attn_g8", "attn_g16", "attn_d8", "attn_d4", "fake", "recon"]
    assert data["pictures"]["fake"] is None and data["pictures"]["recon"] == [1]
    assert [name for name, _ in data["extras"]] == ["00000100_fake.png", "0000100_generated_seed0.png"]
    assert data["real"] == "real.png" and data["sizes"]["real"] == [70, 50] and data["sizes"]["fake"] == [40, 30]
    assert embedded(run.path, "summary")["thumb"] == "12345678_fake.png"


def test_attention_elsewhere_is_linked_relatively(tmp_path):
    run = Run(tmp_path, attention=tmp_path / "maps" / "v")
    run.record(100)
    data = run.data()
    assert data["attention"] == ["..", "..", "maps", "v"]
    assert data["steps"] == [100] and "attn_g8" in data["pictures"] and data["sizes"]["attn_g8"] == [40, 30]


def test_nothing_there_yet_is_a_page_all_the_same(run):
    run.config.lambda_gp = float("inf")                                 # not a JSON number
    data = run.data()
    assert data["config"]["lambda_gp"] == "Infinity"
    assert data["steps"] == data["rows"] == data["keys"] == data["others"] == [] and data["real"] is None
    assert embedded(run.path, "summary")["step"] == 0


def test_drawing_from_a_run_changes_neither_its_settings_nor_its_date(run, monkeypatch):
    run.record(100)
    (run.folders.models / "config.json").write_text('{"seed": 7, "lambda_gp": Infinity, "port": 1}')
    monkeypatch.setattr(page.time, "time", lambda: 1000)
    assert run.data()["config"]["hflip"] is False
    monkeypatch.setattr(page.time, "time", lambda: 2000)
    run.config.mode, run.config.seed, run.config.port = "evolution", 3, 8000
    (run.folders.samples / "0000100_evolution.mp4").write_bytes(b"")
    data = run.data()
    assert data["config"]["seed"] == 7 and data["config"]["lambda_gp"] == "Infinity"
    assert not {"mode", "port", "metadata"} & data["config"].keys(), "of a call, or of the other family"
    assert data["extras"][0][0] == "0000100_evolution.mp4" and embedded(run.path, "summary")["written"] == 1000


def test_names_that_are_no_text_are_left_out(run):
    run.record(100)
    try:
        (run.folders.samples / os.fsdecode(b"0000200_attn_\xff.png")).write_bytes(b"")
    except OSError:
        pytest.skip("this file system takes no such names")
    assert run.data()["steps"] == [100]


def test_a_picture_that_is_none_stops_nothing(run):
    (run.folders.samples / "0000100_fake.png").mkdir()
    (run.folders.samples / "0000100_recon.png").write_bytes(b"GIF89a")
    assert run.data()["sizes"] == {"fake": None, "recon": None}


# ------------------------------------------------------------------------------------------------------ the numbers


def test_numbers_of_a_step_are_of_the_first_line_that_reaches_it(run):
    for step in (100, 150, 205, 300):
        run.record(step)
    run.log({"step": 100, "d_loss": 1.23456}, {"step": 200, "d_loss": 2}, {"step": 210, "d_loss": 3, "entropy/g8": 0.5})
    data = run.data()
    assert data["keys"] == ["d_loss", "entropy/g8"]
    # 300 has no line yet: the last line is shown until its own is written
    assert data["rows"] == [[100, 1.235], [200, 2], [210, 3, 0.5], [210, 3, 0.5]]
    run.log({"step": 300, "d_loss": 4})
    assert run.data()["rows"][3] == [300, 4]


def test_a_half_written_line_waits_for_its_other_half(run):
    run.log({"step": 10, "d_loss": 1})
    run.log('{"step": 20, "d_lo', end="")
    assert run.data()["curves"] == [[[10], [1], [1], [1]]]
    run.log('ss": 2}')
    assert run.data()["curves"] == [[[10, 20], [1, 2], [1, 2], [1, 2]]]


def test_lines_that_are_none_are_passed_over(run):
    run.log("", "nonsense", "[1]", '{"d_loss": 1}', '{"step": "10", "d_loss": 1}', '{"step": true, "d_loss": 1}',
            {"step": 10, "d_loss": float("nan"), "g_loss": float("inf"), "ok": 1, "note": "x", "flag": True, "n": None},
            {"step": 10, "ok": 7}, {"step": 20, "ok": 2})
    data = run.data()
    assert data["keys"] == ["ok"] and data["curves"] == [[[10, 20], [1, 2], [1, 2], [1, 2]]]


def test_a_run_that_goes_back_forgets_the_later_lines(run):
    run.record(100)
    run.log(*({"step": step, "d_loss": step} for step in range(10, 310, 10)))
    assert run.data()["curves"][0][0][-1] == 300
    metrics = run.folders.logs / "metrics.jsonl"
    kept = metrics.read_text().splitlines()[:9]
    metrics.write_text("")
    run.log(*kept, *({"step": step, "d_loss": -step} for step in range(100, 510, 10)))      # longer than before
    data = run.data()
    assert data["curves"][0][0][-1] == 500 and data["curves"][0][1][-1] == -500 and data["rows"] == [[100, -100]]
    metrics.unlink()
    assert run.data()["curves"] == []


def test_long_curves_keep_their_peaks_and_few_points(run):
    values = np.random.default_rng(0).normal(size=5001)
    values[1234], values[4321] = 50, -50
    run.log(*({"step": step, "d_loss": value} for step, value in enumerate(values, start=1)))
    x, mean, low, high = run.data()["curves"][0]
    assert 100 < len(x) == len(mean) == len(low) == len(high) <= 200 and x == sorted(set(x))
    peak, pit = high.index(50), low.index(-50)
    assert abs(x[peak] - 1235) <= 16 and abs(x[pit] - 4322) <= 16       # 32 points each
    assert mean[5] == pytest.approx(values[5 * 32:6 * 32].mean(), abs=1e-4) and x[-1] > 4960


def test_read_on_or_read_at_once_is_the_same(run):
    for step in range(1, 2000):
        run.log({"step": step, "d_loss": step % 7, "g_loss": -step})
        if step % 250 == 0:
            run.record(step, ("fake",))
            run.write()
    assert run.data() == run.data_of_a_copy()


def test_measurements_come_in_any_order_and_disturb_no_other_line(run, tmp_path):
    usual = [{"step": step, "d_loss": step} for step in (100, 200, 300)]
    plain = Run(tmp_path / "plain")
    for step in (100, 150, 300, 400):
        run.record(step)
        plain.record(step)
    plain.log(*usual)
    expected = plain.data()
    run.log(measure(100, fid=90), usual[0], measure(100, swd=31.5), usual[1], measure(200, fid=50), usual[2],
            measure(50, fid=120), measure(100, fid=80.5), {"step": 100, "d_loss": 9}, measure(250, fid=45, flag=True),
            measure(350, fid=math.nan, kid="?"))
    data = run.data()
    assert {name: data[name] for name in ("keys", "rows", "curves")} == {
        name: expected[name] for name in ("keys", "rows", "curves")}
    same = ("P", "G_ema, seed 0")
    assert points(data, "fid") == {same: [[50, 120, None], [100, 80.5, None], [200, 50, None], [250, 45, None]]}
    assert points(data, "swd") == {same: [[100, 31.5, None]]}
    assert {name for name, *_ in data["measured"]["series"]} == {"fid", "swd"}


def test_measurements_stay_apart_by_protocol_and_source_the_newest_first(run):
    run.log(measure(100, fid=90, kid=0.5), measure(200, "Q", fid=50), measure(100, "Q", fid=60),
            measure(200, source="G, seed 1", fid=70), measure(200, fid=80), {"step": 300, "fid": 1, "protocol": "R"})
    data = run.data()
    assert list(points(data, "fid").items()) == [
        (("R", ""), [[300, 1, None]]),
        (("P", "G_ema, seed 0"), [[100, 90, None], [200, 80, None]]),
        (("P", "G, seed 1"), [[200, 70, None]]),
        (("Q", "G_ema, seed 0"), [[100, 60, None], [200, 50, None]])]
    assert points(data, "kid") == {("P", "G_ema, seed 0"): [[100, 0.5, None]]}
    assert len(data["measured"]["groups"]) == 4


def test_deviations_are_bands_and_no_curves(run):
    run.log(measure(100, kid=0.5, kid_std=0.01, lonely_std=3), measure(200, kid=0.4),
            measure(300, kid=0.3, kid_std=math.inf), measure(400, kid=math.nan, kid_std=0.02))
    data = run.data()
    same = ("P", "G_ema, seed 0")
    assert points(data, "kid") == {same: [[100, 0.5, 0.01], [200, 0.4, None], [300, 0.3, None]]}
    assert points(data, "lonely_std") == {same: [[100, 3, None]]}
    assert len(data["measured"]["series"]) == 2
    assert embedded(run.path, "summary")["figures"] == {"kid": 0.3, "lonely_std": 3}    # no older deviation


def test_measurements_are_read_once_and_anew_where_the_file_was_replaced(run, monkeypatch):
    run.log(measure(100, fid=90), {"step": 100, "d_loss": 1}, measure(200, fid=50))
    run.data()
    read = []                                           # lines of metrics.jsonl, and what pages hold: bytes
    monkeypatch.setattr(json, "loads", lambda text, loads=json.loads, **options: read.append(text) or loads(
        text, **options))
    run.log('{"step": 150, "fid": 60, "proto', end="")
    assert points(run.data(), "fid") == {("P", "G_ema, seed 0"): [[100, 90, None], [200, 50, None]]}
    read.clear()
    run.log('col": "P", "source": "G_ema, seed 0"}')
    data = run.data()
    assert points(data, "fid") == {("P", "G_ema, seed 0"): [[100, 90, None], [150, 60, None], [200, 50, None]]}
    assert len([line for line in read if isinstance(line, bytes) and line.startswith(b'{"step"')]) == 1
    assert run.data_of_a_copy() == data                                 # the same as reading the file in one go
    (run.folders.logs / "metrics.jsonl").write_text("")
    run.log(measure(100, "another protocol, of more words than before: " + "w" * 500, fid=7))
    assert list(points(run.data(), "fid").values()) == [[[100, 7, None]]]
    assert embedded(run.path, "summary")["figures"] == {"fid": 7} and embedded(run.path, "summary")["step"] == 100


def test_a_step_that_only_a_measurement_knows_is_reached(run):
    run.log(measure(700, fid=9), measure(300, fid=10))
    assert run.data()["keys"] == [] and embedded(run.path, "summary")["step"] == 700


def test_intervals_and_floors_belong_to_their_score(run):
    run.log(measure(100, fid=90, kid=1, kid_std=0.1),
            measure(200, fid=50, fid_low=45, fid_high=55, fid_floor=20, kid=0.5, kid_std=0.1, kid_low=0.4,
                    kid_high=0.6),
            measure(200, "Q", odd_low=3, odd_floor=4))
    data = run.data()
    same = ("P", "G_ema, seed 0")
    assert points(data, "fid") == {same: [[100, 90, None, None, None, None], [200, 50, None, 45, 55, 20]]}
    assert points(data, "kid") == {same: [[100, 1, 0.1, None, None, None], [200, 0.5, 0.1, 0.4, 0.6, None]]}
    assert {name for name, *_ in data["measured"]["series"]} == {"fid", "kid", "odd_low", "odd_floor"}
    assert embedded(run.path, "summary")["figures"] == {
        "fid": 50, "fid_low": 45, "fid_high": 55, "kid": 0.5, "kid_std": 0.1, "kid_low": 0.4, "kid_high": 0.6,
        "odd_low": 3, "odd_floor": 4}


def test_scores_by_class_are_those_of_the_newest_evaluation_the_worst_first(run):
    run.log(measure(200, ifid=9, by_class={"ifid": {"cat": 7, "dog": 11}}),
            measure(100, "Q", ifid=5, ifid_worst="step", by_class={
                "ifid": {"b": 1.23456, "step": 8, "a_low": 1.23456, "a": 6, "none": math.nan}, "odd": 3}),
            measure(300, fid=1, by_class="?"), measure(300, ifid_vgg16=2, by_class={"ifid_vgg16": {"cat": 2}}))
    data = run.data()
    source = "G_ema, seed 0"
    assert data["by_class"] == [["ifid", "Q", source, 100, ["step", "a", "a_low", "b"], [8, 6, 1.235, 1.235]],
                                ["ifid_vgg16", "P", source, 300, ["cat"], [2]]]
    assert {name for name, *_ in data["measured"]["series"]} == {"ifid", "fid", "ifid_vgg16"}
    assert data == run.data_of_a_copy()


def test_the_number_of_classes_is_known_from_then_on(run):
    run.write()
    assert embedded(run.path, "summary")["classes"] is None
    page.write_pages(run.folders, run.config, 12)
    run.write()
    assert embedded(run.path, "summary")["classes"] == 12
    page.write_overview(run.root / "samples")
    assert embedded(run.root / "samples" / "index.html", "data")["runs"][0]["classes"] == 12


def test_the_overview_knows_how_the_newest_figures_were_measured(run):
    run.log(measure(100, "old", fid=90, swd=3), measure(200, fid=50, kid=0.5, d_loss=1), {"step": 300, "d_loss": 2},
            measure(100, "Q", swd=4))
    run.write()
    page.write_overview(run.path.parent.parent)
    listed, = embedded(run.root / "samples" / "index.html", "data")["runs"]
    assert listed["figures"] == {"fid": 50, "kid": 0.5, "d_loss": 2, "swd": 4}
    source = "G_ema, seed 0"
    assert listed["measured"] == [["Q", source, {"swd": 100}], ["P", source, {"kid": 200, "fid": 200}]]


def test_long_protocols_leave_a_summary_its_room(run):
    run.log(*(measure(number, f"{number}" + "\U0001f600" * 5000, "<" * 5000, **{f"k{number}": number})
              for number in range(100)))
    data = run.data()
    assert len(data["measured"]["groups"][0][0]) > 5000                 # in full on the run's own page
    measured = embedded(run.path, "summary")["measured"]
    assert 1 <= len(measured) < 100 and measured[0][2] == {"k99": 99}
    assert len(measured[0][0]) == 1000 and measured[0][0].endswith("…") and len(measured[0][1]) == 200
    page.write_overview(run.path.parent.parent)
    assert len(embedded(run.root / "samples" / "index.html", "data")["runs"]) == 1
    run.log({"step": 500, "d_loss": 1})
    run.write()                                                         # the page is still recognized as our own
    assert embedded(run.path, "summary")["step"] == 500


def test_summaries_without_measurements_or_with_odd_ones_are_listed(run):
    run.log(measure(100, fid=50))
    text = run.write().read_text(encoding="utf-8")
    summary = embedded(run.path, "summary")
    good = ["P", "", {"fid": 100}]
    for odd, expected in ((None, []), (3, []), ([good, 3, ["P", "", {"fid": "x"}], ["P", ""], ["P", 1, {}]], [good])):
        summary["measured"] = odd
        if odd is None:
            del summary["measured"]                                     # as in pages of older versions
        block = json.dumps(summary) + "</script>"
        run.path.write_text(re.sub('(id="summary">).*?</script>', lambda match, to=block: match[1] + to, text, count=1))
        page.write_overview(run.path.parent.parent)
        listed, = embedded(run.root / "samples" / "index.html", "data")["runs"]
        assert listed["measured"] == expected and listed["figures"] == {"fid": 50}


def test_a_thousand_records_and_a_long_log_are_written_fast_and_small(run):
    for step in range(100, 100_100, 100):
        for kind in ("fake", "attn_g8", "attn_g16", "attn_d8", "attn_d4"):
            (run.folders.samples / f"{step:07d}_{kind}.png").touch()
    keys = ("d_loss", "g_loss", "d_real", "d_fake", "gamma/g8", "gamma/g16", "entropy/g8", "epoch", "sec_per_step")
    rng = np.random.default_rng(0)
    run.log(*({"step": step, **dict(zip(keys, rng.normal(size=9), strict=True))} for step in range(10, 100_010, 10)),
            *(measure(step, "p" * 500, fid=step, kid=step, swd=step) for step in range(1000, 101_000, 1000)))
    times = []
    for step in range(100_010, 100_060, 10):
        run.log({"step": step, "d_loss": 1})
        began = time.process_time()
        run.write()
        times.append(time.process_time() - began)
    assert min(times[1:]) < times[0] / 4, "the first one reads the whole log, the others what is new"
    assert run.path.stat().st_size < 400_000


# --------------------------------------------------------------------------------------------------------- the page


def test_names_cannot_leave_the_data(tmp_path):
    run = Run(tmp_path, HOSTILE_VERSION)
    run.record(100, ("fake", f"attn_{HOSTILE}"))
    run.log({"step": 100, "</script><script>alert(3)</script>": 1},
            measure(100, HOSTILE_PROTOCOL, "</script>", fid=1))
    text = run.write().read_text(encoding="utf-8")
    assert text.count("<script") == 3 == text.count("</script")         # summary, data, the script
    assert "onerror" not in re.sub(r'<script type="application/json".*?</script>', "", text, flags=re.DOTALL).replace(
        "img.onerror", "")
    data = embedded(run.path, "data")
    assert data["measured"]["groups"] == [[HOSTILE_PROTOCOL, "</script>"]]
    assert f"attn_{HOSTILE}" in data["pictures"] and data["keys"] == ["</script><script>alert(3)</script>"]
    assert embedded(run.path, "summary")["version"] == HOSTILE_VERSION


def test_the_policy_allows_this_style_and_script_alone(run):
    text = run.write().read_text(encoding="utf-8")
    policy = re.search(r'http-equiv="Content-Security-Policy" content="(.*?)"', text)[1]
    assert "unsafe" not in policy and policy.startswith("default-src 'none'") and "http" not in policy
    for tag in ("style", "script"):
        inline = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)[1]
        digest = base64.b64encode(hashlib.sha256(inline.encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}';" in policy
    markup = re.sub(r"<(script|style).*?</\1>", "", text, flags=re.DOTALL)
    assert not re.search(r"\s(style|on\w+)\s*=", markup) and "http" not in markup.replace("http-equiv", "")


def test_pages_appear_whole_or_not_at_all(run, monkeypatch):
    before = run.write().read_bytes()
    monkeypatch.setattr(page.Path, "write_text", lambda self, *_, **__: (_ for _ in ()).throw(OSError("disk full")))
    with pytest.raises(OSError, match="disk full"):
        run.write()
    assert run.path.read_bytes() == before and list(run.folders.samples.iterdir()) == [run.path]


def test_overview_lists_the_runs_below_and_nothing_else(tmp_path):
    samples = tmp_path / "samples"
    for version, step in (("one", 100), (HOSTILE_VERSION, 200)):
        run = Run(tmp_path, version)
        run.record(step)
        run.log({"step": step, "d_loss": 0.5, "fid": 12.25})
        run.write()
    run = Run(tmp_path, "empty")
    run.config.dataset, run.config.image_path = "folder", "/pictures/of cats/"
    assert run.data()["others"] == [HOSTILE_VERSION, "one"]
    foreign = {"a": "<p>mine</p>", "b": '<script type="application/json" id="summary">{"version": 3}</script>',
               "c": '<script type="application/json" id="summary">{{{</script>'}
    for name, text in foreign.items():
        (samples / name).mkdir()
        (samples / name / "index.html").write_text(text)
    (samples / "no page").mkdir()
    page.write_overview(samples)
    runs = {run["folder"]: run for run in embedded(samples / "index.html", "data")["runs"]}
    assert set(runs) == {"one", HOSTILE_VERSION, "empty"}
    assert runs["one"]["thumb"] == "0000100_fake.png" and runs["one"]["step"] == 100
    assert runs["one"]["figures"] == {"d_loss": 0.5, "fid": 12.25}
    assert runs["empty"]["thumb"] is None and runs["empty"]["dataset"] == "of cats"


# ------------------------------------------------------------------------------------------------------- the browser


class Browser:
    """Chromium on one page at a time."""

    def __init__(self, driver):
        self.driver = driver

    def open(self, path, width=1200, scheme="light", motion="no-preference"):
        self.driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", {
            "width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600})
        self.driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [
            {"name": "prefers-color-scheme", "value": scheme}, {"name": "prefers-reduced-motion", "value": motion}]})
        for log in ("browser", "performance"):
            self.driver.get_log(log)
        self.driver.get(Path(path).as_uri())
        return self

    def js(self, script, *arguments):
        return self.driver.execute_script(f"return {script}", *arguments)

    def wait(self, script, *arguments):
        """Wait until the expression is true, at most 5 seconds."""
        end = time.monotonic() + 5
        while not self.js(script, *arguments):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)

    def keys(self, *keys):
        from selenium.webdriver.common.action_chains import ActionChains

        ActionChains(self.driver, duration=0).send_keys(*keys).perform()

    def click(self, selector):
        self.js("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", selector)
        self.driver.find_element("css selector", selector).click()

    def all_loaded(self):
        """Wait until all visible images are loaded."""
        self.wait("[...document.images].filter(i => i.checkVisibility()).every(i => i.complete && i.naturalWidth > 0)")

    def colour(self, panel):
        """(r, g, b) shown in the middle of a panel, from a screenshot."""
        self.all_loaded()
        image = self.driver.find_elements("css selector", ".stage .picture img")[panel]
        self.js("arguments[0].scrollIntoView({block: 'center'})", image)
        with Image.open(io.BytesIO(image.screenshot_as_png)) as pixels:
            return pixels.convert("RGB").getpixel((pixels.width // 2, pixels.height // 2))

    def requested(self):
        """Names of the PNGs requested since the page was opened."""
        events = (json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance"))
        urls = (event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent")
        return {url.rpartition("/")[2] for url in urls if url.endswith(".png")}

    def errors(self):
        return [entry["message"] for entry in self.driver.get_log("browser")]


_browsers = []


@pytest.fixture
def chromium(tmp_path_factory, request):
    """One browser for all tests of this process, whichever module they are in: it takes seconds to start."""
    if not _browsers:
        _browsers.append(started_browser(tmp_path_factory.mktemp("profile")))
        request.config.add_cleanup(_browsers[0].driver.quit)
    return _browsers[0]


def started_browser(profile):
    webdriver = pytest.importorskip("selenium.webdriver", reason="selenium is not installed")
    browser = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    driver = shutil.which("chromedriver")
    if not browser or not driver:
        pytest.skip("no chromium and chromedriver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = browser
    for switch in ("headless", "no-sandbox", "disable-gpu", "disable-quic", "no-first-run",
                   "disable-background-networking", "disable-component-update", "disable-sync",
                   f"user-data-dir={profile}"):
        options.add_argument(f"--{switch}")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    return Browser(webdriver.Chrome(options=options, service=webdriver.ChromeService(driver)))


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    """A finished run with attention elsewhere, reconstructions, curves, a hostile layer and a hostile version."""
    root = tmp_path_factory.mktemp("look")
    run = Run(root, HOSTILE_VERSION, attention=root / "ma #ps" / "v? (1)!'*")
    for index in range(6):
        step = 100 * (index + 1)
        run.record(step, ("fake", "attn_g8", "attn_g16", f"attn_{HOSTILE.replace('/', '')}", "recon"), shade(index))
    picture(run.folders.samples / "real.png")
    picture(run.folders.samples / "0000600_generated_seed0.png")
    run.log(*({"step": step, "d_loss": step / 100, "g_loss": -0.5, "gamma/g8": 0.1, "gamma/g16": -0.02,
               f"x{HOSTILE}": 1.0, "epoch": step / 50} for step in range(10, 610, 10)))
    other = Run(root, "other")
    other.record(100)
    for one in (run, other, run):
        one.write()
    page.write_overview(root / "samples")
    return run


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """A run with measurements: two protocols of fid, one of them hostile, deviations, a single lpips, and costs."""
    run = Run(tmp_path_factory.mktemp("measured"))
    for step in range(100, 601, 100):
        run.record(step, ("fake",))
    for name in ("nearest", "nearest_gauss", "backtrack"):
        picture(run.folders.samples / f"0000600_{name}.png", size=(300, 100))
    run.log(*({"step": step, "d_loss": 1, "g_loss": 2} for step in range(10, 610, 10)),
            measure(500, "timed", peak_memory_mib=700),
            measure(600, "timed", peak_memory_mib=800, g_parameters=12340),
            measure(600, "VGG", "D", lpips=0.31, lpips_std=0.05),
            measure(300, "cosine", nearest=0.75, nearest_copies=0.01), measure(300, "sliced", swd=31.25),
            *(measure(step, inception_score=step / 100, inception_score_std=0.1, precision=step / 1000, recall=0.2,
                      kid=kid, kid_std=0.001, fid=fid)
              for step, kid, fid in ((500, 0.02, 45), (100, 0.06, 180.5), (300, 0.01, 41.2))),
            measure(300, HOSTILE_PROTOCOL, "other", fid=60), measure(500, HOSTILE_PROTOCOL, "other", fid=50))
    run.write()
    page.write_overview(run.root / "samples")
    return run


SOURCE = "document.querySelector('.stage .picture img').getAttribute('src')"
STEP = "document.querySelector('#step').textContent"


@pytest.mark.browser
def test_opens_by_double_click_and_shows_the_newest(chromium, shown):
    chromium.open(shown.path)
    chromium.all_loaded()
    assert chromium.js(SOURCE) == "0000600_fake.png" and chromium.js(STEP) == "step 600"
    assert chromium.colour(0) == shade(5) == chromium.colour(1)         # the grid and the first map
    assert chromium.js("document.querySelectorAll('.curve svg path').length") == 6
    assert "d_loss\n6" in chromium.js("document.querySelector('.values').innerText")
    assert chromium.js("document.title") == HOSTILE_VERSION
    assert chromium.errors() == []


def test_a_page_in_one_file_keeps_the_newest_records_that_fit(run):
    for index in range(8):
        run.record(100 * (index + 1), ("fake", "attn_g8") if index % 2 else ("fake",), shade(index))
    run.log(*({"step": step, "d_loss": step / 100} for step in range(10, 810, 10)))
    run.write()
    size = (run.folders.samples / "0000100_fake.png").stat().st_size
    (run.root / "one.html").write_text(page.as_one_file(run.path, 9 * size), encoding="utf-8")
    data = embedded(run.root / "one.html", "data")
    assert data["steps"] == [200, 400, 600, 800] and [row[0] for row in data["rows"]] == data["steps"]
    assert data["pictures"] == {"attn_g8": [0, 1, 2, 3], "fake": [0, 1, 2, 3]} and len(data["inside"]) == 8
    with pytest.raises(ValueError):  # noqa: PT011 - whatever JSON says of the template
        page.as_one_file(page.Path(page.__file__).with_name("page.html"))


@pytest.mark.browser
def test_a_page_in_one_file_needs_no_other(chromium, shown, tmp_path):
    """Within another page, too, as in a notebook."""
    alone = tmp_path / "alone.html"
    alone.write_text(page.as_one_file(shown.path), encoding="utf-8")
    chromium.open(alone)
    chromium.all_loaded()
    assert chromium.js(STEP) == "step 600" and chromium.colour(0) == shade(5) == chromium.colour(1)
    assert not chromium.js("document.querySelector('nav').checkVisibility()") and chromium.errors() == []
    assert chromium.js("document.title") == HOSTILE_VERSION, "not the folder that it was saved in"
    chromium.js("document.dispatchEvent(new Event('visibilitychange'))")
    assert chromium.js("document.querySelectorAll('iframe').length") == 0, "nor is there a newer one beside it"
    framed = f'<iframe srcdoc="{html.escape(alone.read_text(encoding="utf-8"))}" width="1000" height="900"></iframe>'
    (tmp_path / "notebook.html").write_text(framed, encoding="utf-8")
    chromium.open(tmp_path / "notebook.html")
    chromium.wait("frames[0].document.querySelector('.picture img').naturalWidth")
    assert chromium.errors() == []


@pytest.mark.browser
def test_slider_and_keys_change_the_pictures(chromium, shown):
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    chromium.keys(Keys.ARROW_LEFT)
    assert chromium.js(SOURCE) == "0000500_fake.png" and chromium.js(STEP) == "step 500"
    assert chromium.colour(0) == shade(4) == chromium.colour(1)
    chromium.keys(Keys.HOME)
    assert chromium.js(SOURCE) == "0000100_fake.png"
    chromium.keys(Keys.ARROW_LEFT)                                      # the first step has no predecessor
    chromium.keys(Keys.ARROW_RIGHT)
    assert chromium.js(STEP) == "step 200"
    assert "d_loss\n2" in chromium.js("document.querySelector('.values').innerText")
    chromium.keys(Keys.END)
    assert chromium.js(STEP) == "step 600"
    slider = chromium.driver.find_element("css selector", "#slider")
    slider.click()                                                      # in its middle
    assert chromium.js(STEP) in ("step 300", "step 400")
    at = chromium.js(STEP)
    slider.send_keys(Keys.ARROW_RIGHT)                                  # one step, not two, where the slider has focus
    assert int(chromium.js(STEP)[5:]) == int(at[5:]) + 100
    assert chromium.js("document.querySelector('#slider').getAttribute('aria-valuetext')") == chromium.js(STEP)
    assert chromium.errors() == []


@pytest.mark.browser
def test_layers_are_chosen_and_hidden_ones_not_asked_for(chromium, shown):
    chromium.open(shown.path)
    chromium.all_loaded()
    asked = chromium.requested()
    assert {"0000600_fake.png", "0000600_attn_g8.png", "0000500_fake.png"} <= asked          # with a neighbour
    assert not {"0000100_fake.png", "0000600_attn_g16.png"} & asked
    chromium.click(".layers button:nth-child(2)")
    assert chromium.colour(1) == shade(5)
    assert "attn_g16" in chromium.js("document.querySelectorAll('.stage .picture img')[1].src")
    assert chromium.js("[...document.querySelectorAll('.layers button')].map(b => b.ariaPressed)") == [
        "false", "true", "false"]


@pytest.mark.browser
def test_play_runs_to_the_end_and_space_stops_it(chromium, shown):
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    pressed = "document.querySelector('#play').ariaPressed"
    time.sleep(0.7)
    assert chromium.js(STEP) == "step 600" and chromium.js(pressed) == "false"      # no autoplay
    chromium.keys(" ")
    assert chromium.js(STEP) == "step 100" and chromium.js(pressed) == "true"
    chromium.wait(f"{STEP} === 'step 200'")
    chromium.keys(" ")
    assert chromium.js(pressed) == "false"
    chromium.keys(Keys.END, Keys.ARROW_LEFT)
    assert chromium.js(STEP) == "step 500"
    chromium.click("#play")
    chromium.wait(f"{STEP} === 'step 600' && {pressed} === 'false'")


@pytest.mark.browser
def test_reduced_motion_is_kept(chromium, shown):
    chromium.open(shown.path)
    moves = "getComputedStyle(document.querySelector('.picture')).transitionDuration"
    assert chromium.js(moves) != "0s"
    chromium.open(shown.path, motion="reduce")
    assert chromium.js(moves) == "0s"
    chromium.js("""(() => {
        window.shownAt = {};
        const step = document.querySelector('#step');
        new MutationObserver(() => { shownAt[step.textContent] ??= performance.now(); }).observe(
            step, {childList: true, characterData: true, subtree: true});
    })()""")
    chromium.keys(" ")
    chromium.wait("'step 200' in shownAt")
    assert chromium.js("shownAt['step 200'] - shownAt['step 100']") > 900           # 500 ms at full speed


@pytest.mark.browser
def test_a_picture_opens_in_full_size_and_focus_returns(chromium, shown):
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    is_open, full = "document.querySelector('dialog').open", "document.querySelector('dialog img')"
    for number in range(4):
        chromium.js("document.querySelectorAll('.stage .picture')[arguments[0]].focus()", number)
        chromium.keys(Keys.ENTER)
        chromium.wait(f"{is_open} && {full}.naturalWidth > 0 && {full}.width >= {full}.naturalWidth")
        chromium.keys(Keys.ESCAPE)
        chromium.wait(f"!{is_open}")
        focused = "[...document.querySelectorAll('.stage .picture')].indexOf(document.activeElement)"
        assert chromium.js(focused) == number
    chromium.click(".stage .picture")
    chromium.keys(Keys.ARROW_LEFT)                                      # the keys work there too
    assert chromium.js(f"{full}.src").endswith("0000500_fake.png")
    chromium.click("dialog button")
    assert not chromium.js(is_open)
    chromium.click("#more .picture")
    chromium.wait(f"{is_open} && {full}.src.includes('generated_seed0.png?')")
    chromium.keys(Keys.ESCAPE)


@pytest.mark.browser
def test_curves_tell_their_values_to_a_pointer_and_to_a_reader(chromium, shown):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    chromium.open(shown.path)
    chart = chromium.driver.find_element("css selector", ".curve svg")
    assert chart.get_attribute("aria-label") == "losses at step 600: d_loss 6, g_loss −0.5"
    chromium.js("arguments[0].focus()", chart)
    chromium.keys(Keys.HOME)
    assert chart.get_attribute("aria-label") == "losses at step 100: d_loss 1, g_loss −0.5"
    chromium.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(chromium.driver, duration=0).move_to_element(chart).perform()
    said = re.fullmatch(r"losses at step (\d+): d_loss ([\d.]+), g_loss −0.5", chart.get_attribute("aria-label"))
    assert 200 < int(said[1]) < 400 and float(said[2]) == int(said[1]) / 100
    chart.click()
    assert chromium.js(STEP) in ("step 300", "step 400")


TITLES = "[...document.querySelectorAll('.curve h2')].map(h => h.textContent)"
CHART = "[...document.querySelectorAll('.curve')].find(c => c.querySelector('h2').textContent === arguments[0])"
PLACE = f"(c => [c.getAttribute('cx'), c.getAttribute('cy')])({CHART}.querySelectorAll(arguments[1])[arguments[2]])"


@pytest.mark.browser
def test_measures_of_quality_come_first(chromium, measured):
    chromium.open(measured.path)
    assert chromium.js(TITLES) == ["fid", "kid", "precision and recall", "inception_score", "swd", "nearest",
                                   "nearest_copies", "lpips", "peak_memory_mib", "losses"]
    top = chromium.js("[...document.querySelectorAll('.curve')].map(c => c.getBoundingClientRect().top)")
    assert top == sorted(top)
    assert chromium.js("[...document.querySelectorAll('.more li')].map(li => li.innerText)") == [
        "0000600_backtrack.png", "0000600_nearest.png", "0000600_nearest_gauss.png"]
    chromium.js("document.querySelector('#more').scrollIntoView()")
    chromium.wait("[...document.querySelectorAll('.more img')].every(i => i.naturalWidth === 300 && i.width > 200)")
    assert chromium.errors() == []


@pytest.mark.browser
def test_each_measurement_is_a_dot_and_only_like_ones_are_joined(chromium, measured):
    chromium.open(measured.path)

    def drawn(title, what):
        return chromium.js(f"{CHART}.querySelectorAll(arguments[1]).length", title, what)

    dots = {title: drawn(title, ".point") for title in chromium.js(TITLES)}
    assert dots == {"fid": 5, "kid": 3, "precision and recall": 6, "inception_score": 3, "swd": 1, "nearest": 1,
                    "nearest_copies": 1, "lpips": 1, "peak_memory_mib": 2, "losses": 0}
    size = chromium.js(f"(r => [r.width, r.height])({CHART}.querySelector('.point').getBoundingClientRect())", "lpips")
    assert min(size) >= 4
    fill = chromium.js(f"getComputedStyle({CHART}.querySelector('.point')).fill", "lpips")
    assert fill == chromium.js(f"getComputedStyle({CHART}.querySelector('.line')).stroke", "lpips") != "none"
    assert chromium.js(f"[...{CHART}.querySelectorAll('.line')].map(p => p.getAttribute('d').split('L').length)",
                       "fid") == [2, 3]
    assert {title: drawn(title, ".band") for title in ("fid", "kid", "inception_score", "lpips")} == {
        "fid": 0, "kid": 1, "inception_score": 1, "lpips": 1}
    band = chromium.js(f"(r => [r.width, r.height])({CHART}.querySelector('.band').getBoundingClientRect())", "lpips")
    assert band[0] > 5 and band[1] > 50                                 # visible, though it has a single point
    assert chromium.js("document.querySelector('#deviations').checkVisibility()")


@pytest.mark.browser
def test_a_band_reaches_one_deviation_up_and_down(chromium, measured):
    chromium.open(measured.path)
    outline = chromium.js(f"{CHART}.querySelector('.band').getAttribute('d')", "inception_score")
    heights = [float(number) for number in re.findall(r"[\d.]+", outline)[1::2]]
    lower, upper = heights[:3], heights[:2:-1]                          # at steps 100, 300, 500
    centre = [float(chromium.js(PLACE, "inception_score", ".point", number)[1]) for number in range(3)]
    per_unit = (centre[0] - centre[1]) / 2                              # 1 at step 100, 3 at step 300
    for low, middle, high in zip(lower, centre, upper, strict=True):
        assert low - middle == pytest.approx(0.1 * per_unit, abs=0.1)
        assert middle - high == pytest.approx(0.1 * per_unit, abs=0.1)


@pytest.mark.browser
def test_intervals_are_bands_and_brackets_and_floors_dashed_lines(chromium, tmp_path):
    run = Run(tmp_path)
    run.log(*(measure(step, fd_vgg16=fd, fd_vgg16_low=fd - 5, fd_vgg16_high=fd + 5, fd_vgg16_floor=20,
                      precision_vgg16=0.5, precision_vgg16_low=0.4, precision_vgg16_high=0.6, recall_vgg16=0.25,
                      coverage_vgg16=0.75)
              for step, fd in ((100, 90), (200, 60), (300, 70))), measure(300, "Q", kid=1, kid_std=0.5))
    chromium.open(run.write())
    assert chromium.js(TITLES) == ["fd_vgg16", "kid", "precision, recall and coverage, vgg16"]
    legend = f"[...{CHART}.querySelectorAll('li')].map(li => li.textContent.trim())"
    assert chromium.js(legend, "fd_vgg16") == ["70 (65 to 75)  floor 20"]
    assert chromium.js(legend, "precision, recall and coverage, vgg16") == [
        "precision_vgg16 0.5 (0.4 to 0.6)", "recall_vgg16 0.25", "coverage_vgg16 0.75"]
    line = f"(l => [l.getAttribute('y1'), getComputedStyle(l).strokeDasharray])({CHART}.querySelector('.floor'))"
    height, dashes = chromium.js(line, "fd_vgg16")
    points = [float(chromium.js(PLACE, "fd_vgg16", ".point", number)[1]) for number in range(2)]
    per_unit = (points[1] - points[0]) / 30
    assert float(height) == pytest.approx(points[1] + 40 * per_unit, abs=0.1) and dashes != "none"
    outline = chromium.js(f"{CHART}.querySelector('.band').getAttribute('d')", "fd_vgg16")
    heights = [float(number) for number in re.findall(r"[\d.]+", outline)[1::2]]
    assert heights[0] - points[0] == pytest.approx(5 * per_unit, abs=0.2)
    assert chromium.js(f"[...{CHART}.querySelectorAll('.best')].map(b => b.textContent)", "fd_vgg16") == [
        "best 60 at step 200"]
    visible = "['#intervals', '#deviations', '#floors'].map(id => document.querySelector(id).checkVisibility())"
    assert chromium.js(visible) == [True, True, True]
    page.write_overview(tmp_path / "samples")
    chromium.open(tmp_path / "samples" / "index.html")
    card = re.sub(r"\s+", " ", chromium.js("document.querySelector('.runs li').innerText"))
    assert "fd_vgg16 70 (65 to 75) kid 1 ± 0.5 precision_vgg16 0.5 (0.4 to 0.6) recall_vgg16 0.25" in card
    assert chromium.errors() == []


BARS = "[...document.querySelectorAll('.bars')].map(list => [...list.querySelectorAll('li')].map(li => li.innerText))"
ENDS = "document.querySelector('.by-class .ends').textContent"


@pytest.mark.browser
def test_each_class_has_its_bar(chromium, tmp_path):
    run = Run(tmp_path)
    values = {"dog": 25, "<img src=x>": 100, "eel " * 30: 50}
    run.log(measure(300, ifid=58, ifid_floor=20, by_class={"ifid": values}))
    page.write_pages(run.folders, run.config, 3)
    chromium.open(run.path)
    assert chromium.js(ENDS) == "worst <img src=x> (100), best dog (25), of 3 classes"
    (bars,) = chromium.js(BARS)
    assert [bar.split("\n")[-1] for bar in bars] == ["100", "50", "25"] and bars[2] == "dog\n25"
    widths = chromium.js("[...document.querySelectorAll('.bars rect')].map(r => r.getBoundingClientRect().width)")
    assert widths[0] > 40 and widths == pytest.approx([widths[0], widths[0] / 2, widths[0] / 4], rel=0.05)
    assert chromium.js("document.querySelector('.by-class .protocol').textContent") == (
        "G_ema, seed 0, at step 300, protocol 1")
    assert " · 3 classes · " in chromium.js("document.querySelector('#about').textContent")
    assert chromium.js("document.querySelector('#sizes').checkVisibility()") and not chromium.js(
        "document.querySelectorAll('.all-classes').length")
    chromium.open(run.path, width=400)
    assert chromium.js("document.documentElement.scrollWidth") == 400 and chromium.errors() == []


@pytest.mark.browser
def test_of_a_thousand_classes_both_ends_are_listed_and_the_pointer_names_the_others(chromium, tmp_path):
    from selenium.webdriver.common.action_chains import ActionChains

    run = Run(tmp_path)
    run.log(measure(300, ifid=1, by_class={"ifid": {f"class {number}": 1000 - number for number in range(1000)}}))
    chromium.open(run.write())
    worst, best = chromium.js(BARS)
    assert (len(worst), len(best)) == (20, 20) and worst[:2] == ["class 0\n1,000", "class 1\n999"]
    assert best[:2] == ["class 999\n1", "class 998\n2"]
    chart = chromium.driver.find_element("css selector", ".all-classes svg")
    chromium.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    ActionChains(chromium.driver, duration=0).move_to_element(chart).perform()
    told = chromium.js("document.querySelector('.all-classes .number').textContent")
    number, value = map(int, re.fullmatch(r"class (\d+) (\d+)", told).groups())
    assert 350 < number < 550 and value == 1000 - number
    assert chromium.errors() == []
    chromium.open(run.path, width=400)
    assert chromium.js("document.documentElement.scrollWidth") == 400


@pytest.mark.browser
def test_how_figures_were_measured_is_numbered_below_them_and_a_cost_of_one_step_is_a_number_without_axes(
        chromium, measured):
    chromium.open(measured.path)
    told = f"[...{CHART}.querySelectorAll('.protocol')].map(p => p.textContent)"
    protocols = chromium.js("[...document.querySelectorAll('#protocols li')].map(p => p.textContent)")
    assert len(protocols) == len(set(protocols)), "each once, however many charts share it"
    one, other, third = (protocols.index(protocol) + 1 for protocol in (HOSTILE_PROTOCOL, "P", "VGG"))
    assert one == 1, "in the order of the charts"
    assert chromium.js(told, "fid") == [f"other, protocol {one}", f"G_ema, seed 0, protocol {other}"]
    assert chromium.js(told, "kid") == [f"G_ema, seed 0, protocol {other}"]
    assert chromium.js(told, "lpips") == [f"D, protocol {third}"]
    assert chromium.js(f"{CHART}.querySelector('.protocol').title", "fid") == HOSTILE_PROTOCOL
    marks = chromium.js(f"[...{CHART}.querySelectorAll('ul')].map(u => "
                        "getComputedStyle(u.querySelector('li'), '::before').backgroundColor)", "fid")
    lines = chromium.js(f"[...{CHART}.querySelectorAll('.line')].map(p => getComputedStyle(p).stroke)", "fid")
    assert marks == lines and len(set(lines)) == 2
    order = chromium.js(f"[...{CHART}.querySelectorAll('ul, .protocol')].map(e => e.tagName)", "fid")
    assert order == ["UL", "P", "UL", "P"]                              # each below its mark
    single = chromium.js("[...document.querySelectorAll('#single div')].map("
                         "d => [...d.children].map(c => c.textContent))")
    timed = protocols.index("timed") + 1
    assert single == [["g_parameters", "12,340", f"G_ema, seed 0, at step 600, protocol {timed}"]]
    assert chromium.js("document.querySelectorAll('img[onerror], img[src=x]').length") == 0
    assert chromium.errors() == []


@pytest.mark.browser
def test_the_best_is_marked_and_told(chromium, measured):
    chromium.open(measured.path)
    best = f"[...{CHART}.querySelectorAll('.best')].map(b => b.textContent)"
    assert {title: chromium.js(best, title) for title in chromium.js(TITLES)} == {
        "fid": ["best 50 at step 500", "best 41.2 at step 300"], "kid": ["best 0.01 at step 300"],
        "precision and recall": ["best precision 0.5 at step 500, best recall 0.2 at step 100"],
        "inception_score": ["best 5 at step 500"], "swd": ["best 31.25 at step 300"],
        "nearest": [], "nearest_copies": [], "lpips": ["best 0.31 at step 600"],
        "peak_memory_mib": [], "losses": []}
    assert chromium.js(f"{CHART}.querySelector('.bar').textContent", "kid") == "kidbest 0.01 at step 300"
    for title, number in (("kid", 1), ("inception_score", 2)):          # the rings are around their points
        assert chromium.js(PLACE, title, ".ring", 0) == chromium.js(PLACE, title, ".point", number)
    assert chromium.js(f"{CHART}.querySelectorAll('.ring').length", "fid") == 2
    assert chromium.js(f"{CHART}.querySelectorAll('.ring').length", "peak_memory_mib") == 0


@pytest.mark.browser
def test_measurements_tell_the_nearest_point_and_its_step(chromium, measured):
    from selenium.webdriver.common.action_chains import ActionChains
    from selenium.webdriver.common.keys import Keys

    def pointer_to(element):
        ActionChains(chromium.driver, duration=0).move_to_element(element).perform()

    chromium.open(measured.path)
    legend = f"[...{CHART}.querySelectorAll('li')].map(li => li.textContent.trim())"
    assert chromium.js(legend, "kid") == ["0.02 ± 0.001 at step 500"]
    assert chromium.js(legend, "fid") == ["50 at step 500", "45 at step 500"]
    chromium.keys(Keys.HOME)
    assert chromium.js(legend, "kid") == ["0.06 ± 0.001"]               # measured at the slider's very step
    assert chromium.js(legend, "fid") == ["60 at step 300", "180.5"]
    assert chromium.js(legend, "losses") == ["d_loss 1", "g_loss 2"]
    chart = chromium.js(f"{CHART}.querySelector('svg')", "fid")
    assert chart.get_attribute("aria-label") == "fid at step 100: 60 at step 300 (other), 180.5 (G_ema, seed 0)"
    chromium.js("arguments[0].scrollIntoView({block: 'center'})", chart)
    pointer_to(chart)
    assert chromium.js(legend, "fid") == ["60 at step 300", "41.2 at step 300"]
    assert chromium.js(PLACE, "fid", ".dot:not(.point)", 1) == chromium.js(PLACE, "fid", ".ring", 1)
    pointer_to(chromium.driver.find_element("css selector", "#quality h2"))
    assert chromium.js(legend, "fid") == ["60 at step 300", "180.5"]
    chart.click()
    assert chromium.js(STEP) in ("step 300", "step 400")


@pytest.mark.browser
def test_measurements_alone_make_a_page(chromium, tmp_path):
    run = Run(tmp_path)
    run.log(measure(500, fid=41.2))
    chromium.open(run.write())
    assert chromium.js(TITLES) == ["fid"] and chromium.js(STEP) == "no pictures yet"
    assert chromium.js(f"{CHART}.querySelector('li').textContent.trim()", "fid") == "41.2"
    assert chromium.js(f"{CHART}.checkVisibility()", "fid")
    assert not chromium.js("document.querySelector('#numbers').checkVisibility()")
    assert not chromium.js("document.querySelector('#deviations').checkVisibility()")
    assert not chromium.js("document.querySelector('#sizes').checkVisibility()")        # as there are no classes
    assert "classes" not in chromium.js("document.querySelector('#run').innerText")
    assert chromium.errors() == []


@pytest.mark.browser
def test_the_overview_tells_how_figures_were_measured(chromium, measured):
    other = Run(measured.root, "losses only")
    other.log({"step": 10, "d_loss": 1})
    other.write()
    page.write_overview(measured.root / "samples")
    chromium.open(measured.root / "samples" / "index.html")
    cards = chromium.js("[...document.querySelectorAll('.runs li')].map(li => li.innerText)")
    card, = (card for card in cards if "losses only" not in card)
    plain, = (card for card in cards if "losses only" in card)
    assert ("fid 50 kid 0.01 ± 0.001 precision 0.3 recall 0.2 inception_score 3 ± 0.1 swd 31.25 nearest 0.75 "
            "lpips 0.31 ± 0.05 protocols") in re.sub(r"\s+", " ", card)
    assert "protocols" not in plain and "d_loss" in plain
    words = "[...document.querySelectorAll('.runs details p')].map(p => p.textContent)"
    assert chromium.js(words) == [
        f"fid at step 500: other; {HOSTILE_PROTOCOL}",
        "kid, precision, recall, inception_score at step 300: G_ema, seed 0; P",
        "swd at step 300: G_ema, seed 0; sliced", "nearest at step 300: G_ema, seed 0; cosine",
        "lpips at step 600: D; VGG"]
    assert not chromium.js("document.querySelector('.runs details p').checkVisibility()")
    chromium.click(".runs details summary")
    assert chromium.js("document.querySelector('.runs details p').checkVisibility()")
    assert chromium.js("document.querySelectorAll('img[onerror], img[src=x]').length") == 0
    assert chromium.errors() == []


@pytest.mark.browser
def test_the_overview_keeps_the_order_of_quality(chromium, run):
    run.log({"step": 10, "d_loss": 1}, measure(10, "cubic", kid=0.5, kid_std=0.1), measure(20, "sliced", swd=3))
    run.write()
    page.write_overview(run.root / "samples")
    chromium.open(run.root / "samples" / "index.html")
    assert chromium.js("document.querySelector('.runs dl').innerText").split() == [
        "kid", "0.5", "±", "0.1", "swd", "3", "d_loss", "1"]
    assert chromium.js("[...document.querySelectorAll('.runs details p')].map(p => p.textContent)") == [
        "kid at step 10: G_ema, seed 0; cubic", "swd at step 20: G_ema, seed 0; sliced"]


@pytest.mark.browser
def test_light_and_dark(chromium, shown):
    def lightness(scheme):
        chromium.open(shown.path, scheme=scheme)
        return [np.mean([int(part) for part in re.findall(r"\d+", chromium.js(
            f"getComputedStyle(document.body).{what}"))[:3]]) for what in ("backgroundColor", "color")]

    paper, ink = lightness("light")
    assert paper > 230 and ink < 60
    paper, ink = lightness("dark")
    assert paper < 40 and ink > 200


@pytest.mark.browser
def test_a_phone_needs_no_sideways_scrolling(chromium, tmp_path):
    wide = Run(tmp_path, "w" * 100)
    wide.record(10_000_000, ("fake", f"attn_{'m' * 80}", f"attn_{'n' * 80}"))
    wide.log({"step": 10_000_000, "k" * 80: 1, **{f"gamma/{'g' * 60}{n}": -1.234e-12 for n in range(9)}})
    wide.log(*(measure(10_000_000, "p" * 500, "s" * 90, **{"k" * 90: -1.234e-12, "inception_score": 1.234, "fid": fid})
               for fid in (1, 2)), measure(9_999_999, "q" * 500, fid=12345.6, fid_std=1.234e-5, precision=1, recall=1))
    wide.write()
    page.write_overview(tmp_path / "samples")
    for path in (wide.path, tmp_path / "samples" / "index.html"):
        chromium.open(path, width=400)
        chromium.js("document.querySelectorAll('details').forEach(d => { d.open = true; })")
        assert chromium.js("document.documentElement.clientWidth") == 400
        assert chromium.js("document.documentElement.scrollWidth") == 400


@pytest.mark.browser
def test_hostile_names_do_nothing(chromium, shown):
    chromium.open(shown.path)
    assert chromium.js("document.querySelector('#version').textContent") == HOSTILE_VERSION
    layers = chromium.js("[...document.querySelectorAll('.layers button')].map(b => b.textContent)")
    assert layers == ["g8", "g16", HOSTILE]
    chromium.click(".layers button:nth-child(3)")
    assert chromium.colour(1) == shade(5)                               # its picture is still shown
    assert chromium.js("document.querySelectorAll('img[onerror], img[src=x], script:not([id])').length") == 1
    chromium.open(shown.root / "samples" / "index.html")
    chromium.all_loaded()
    assert HOSTILE_VERSION in chromium.js("[...document.querySelectorAll('h2')].map(h => h.textContent)")
    assert chromium.errors() == []                                      # an alert would have raised an exception


@pytest.mark.browser
def test_the_policy_holds_in_the_browser(chromium, shown):
    chromium.open(shown.path)
    refused = chromium.js("""(() => {
        try { document.body.innerHTML = '<b>'; return false; } catch (error) { return error instanceof TypeError; }
    })()""")
    assert refused
    chromium.js("document.body.setAttribute('style', 'color: red')")
    assert chromium.js("getComputedStyle(document.body).color") != "rgb(255, 0, 0)"


@pytest.mark.browser
def test_runs_are_linked_with_each_other(chromium, shown):
    chromium.open(shown.path)
    chromium.click("nav > a")
    chromium.wait("document.querySelectorAll('.runs li').length === 2")
    chromium.all_loaded()
    other = chromium.js("[...document.querySelectorAll('.runs h2')].findIndex(h => h.textContent === 'other')")
    chromium.click(f".runs li:nth-child({other + 1}) a")
    chromium.wait("document.title === 'other'")
    chromium.click("#others summary")
    chromium.click("#others a")
    chromium.wait("document.title === arguments[0]", HOSTILE_VERSION)
    chromium.all_loaded()


@pytest.mark.browser
def test_works_where_it_is_copied_to_and_says_what_is_missing(chromium, shown, tmp_path):
    copied = shutil.copytree(shown.folders.samples, tmp_path / "elsewhere" / "a b")
    chromium.open(copied / "index.html")
    chromium.wait("document.querySelector('.stage .picture img').naturalWidth > 0")
    chromium.wait("document.querySelectorAll('.absent:not([hidden])').length === 1")    # the maps were not copied
    assert "Attention g8, step 600" in chromium.js("document.querySelector('.absent:not([hidden])').textContent")
    chromium.js("document.onkeydown({key: 'End', target: document.body, preventDefault() {}})")
    assert chromium.js("document.querySelectorAll('.absent:not([hidden])').length") == 1, "it goes on saying so"


@pytest.mark.browser
def test_before_the_first_record_there_are_values_and_axes_whose_numbers_differ(chromium, tmp_path):
    run = Run(tmp_path, "new")
    chromium.open(run.write())
    assert chromium.js(STEP) == "no pictures yet" and chromium.errors() == []
    run.log(*({"step": step, "d_loss": .9991 + step / 4e5, "g_scale": 1e7 * step} for step in range(10, 90, 10)))
    chromium.open(run.write())
    assert chromium.js(STEP) == "no pictures yet"
    assert "g_scale\n800,000,000" in chromium.js("document.querySelector('.values').innerText")
    assert chromium.js("document.querySelector('#of').textContent") == "step 80"
    for numbers in chromium.js("[...document.querySelectorAll('.curve svg')].map(svg => "
                               "[...svg.querySelectorAll('text[text-anchor=end]')].map(text => text.textContent))"):
        assert len(numbers) == len(set(numbers)) > 1 and max(map(len, numbers)) <= 6


@pytest.mark.browser
def test_a_run_that_was_moved_aside_shows_its_own_maps(chromium, tmp_path):
    run = Run(tmp_path, "v", attention=tmp_path / "maps" / "v")
    run.record(100, colour=shade(1))
    run.write()
    for folder in (run.folders.samples, run.folders.attention):
        folder.rename(folder.with_name("v.old1"))
    run.record(100, ("attn_g8", "attn_g16"), colour=shade(2))            # the new one
    chromium.open(tmp_path / "samples" / "v.old1" / "index.html")
    chromium.all_loaded()
    assert chromium.colour(1) == shade(1) and chromium.js("document.title") == "v.old1"


@pytest.mark.browser
def test_a_thousand_records_open_within_two_seconds(chromium, tmp_path):
    run = Run(tmp_path)
    run.record(100, colour=shade(0))
    for step in range(200, 100_100, 100):
        for kind in ("fake", "attn_g8", "attn_g16"):
            os.link(run.folders.samples / f"0000100_{kind}.png", run.folders.samples / f"{step:07d}_{kind}.png")
    rng = np.random.default_rng(0)
    run.log(*({"step": step, **{f"k{n}": value for n, value in enumerate(rng.normal(size=18))}}
              for step in range(100, 100_100, 100)))
    run.write()
    began = time.monotonic()
    chromium.open(run.path)
    chromium.all_loaded()
    assert time.monotonic() - began < 2
    assert 2 <= len(chromium.requested()) < 10
    assert chromium.errors() == []


def test_somebody_elses_index_html_is_left_alone(tmp_path):
    (tmp_path / "index.html").write_text("<p>my own page</p>")
    page.write_overview(tmp_path)
    assert (tmp_path / "index.html").read_text() == "<p>my own page</p>"
