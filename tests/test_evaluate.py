"""`--mode evaluate` on a run's checkpoint and on two folders: what it writes, what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_SHEETS, TINY, TINY_OF_ANY, lines, two_processes
from PIL import Image
from stand_ins import SmallLpips, small_swd

import main
from metrics import backtrack, features, swd, variation
from pretrained import lpips
from storage import checkpoint

FOLDERS = ("--fake_dir", "fake", "--real_dir", "real")
FASTGAN = (*TINY_OF_ANY, "--model", "fastgan", "--imsize", 64, "--vgg_weights", "random", "--recon",
           "l1")
INCEPTIONS = ("fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std")


@pytest.fixture(scope="module")
def before(tmp_path_factory):
    """A folder with 12 pictures and two runs on them: "a" of three steps, and "h" of one that holds three out."""
    home = tmp_path_factory.mktemp("before")
    rng = np.random.default_rng(0)
    (home / "pictures").mkdir()
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(home / f"pictures/{number}.png")
    flags = (*TINY, "--g_attn", "none", "--dataset", "folder", "--image_path", "pictures", "--sample_step", "3")
    with pytest.MonkeyPatch.context() as there:
        there.chdir(home)
        assert main.main([*flags, "--version", "a", "--total_step", "3", "--model_save_step", "1"]) == 0
        assert main.main([*flags, "--version", "h", "--total_step", "1", "--holdout", "0.25"]) == 0
    return home


@pytest.fixture
def trained(run, before, tmp_path):
    """Copy that folder to where `run` works."""
    shutil.copytree(before, tmp_path, dirs_exist_ok=True)


@pytest.fixture
def folders(tmp_path):
    """fake/ and real/: 12 and 14 smooth pictures of 32 px."""
    for name, count, seed in (("fake", 12, 1), ("real", 14, 2)):
        (tmp_path / name).mkdir()
        rng = np.random.default_rng(seed)
        for number in range(count):
            coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
            coarse.resize((32, 32), Image.Resampling.BICUBIC).save(tmp_path / name / f"{number:02d}.png")
    return tmp_path


@pytest.fixture
def small_lpips(monkeypatch):
    """Replace LPIPS by a small network, and let each search choose its start among 64 samples."""
    monkeypatch.setattr(lpips, "load_lpips", lambda weights, hint: SmallLpips())
    monkeypatch.setattr(lpips, "require", lambda weights, hint: None)
    monkeypatch.setattr(backtrack, "STARTS", 64)


@pytest.fixture(autouse=True)
def fast_swd(monkeypatch):
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)


def scored(log_path="logs"):
    return [json.loads(line) for line in Path(log_path, "scores.jsonl").read_text().splitlines()]


# ---- a run ----


def test_a_run_is_evaluated_without_repeating_its_flags_and_tensorboard_gets_the_numbers(run, trained, small_inception):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    code, out, _ = run("--version", "a", "--mode", "evaluate", "--num_eval", 8, "--metrics", "fid,kid,pr,is,swd",
                       "--use_tensorboard", "true", tiny=False)
    assert code == 0
    inception_line, swd_line = lines("a")[-2:]
    assert (inception_line["step"], swd_line["step"]) == (3, 3)
    assert set(INCEPTIONS) < inception_line.keys() and swd_line["swd"] > 0
    for line in (inception_line, swd_line):
        assert "8 samples at 32 px" in line["protocol"] and "all 12 pictures of folder pictures" in line["protocol"]
        assert line["source"] == "G_ema, seed 0" and line["protocol"] in out
    for where in (out, Path("logs/scores.md").read_text()):
        assert re.search(r"\| a +\| +3 \| .*\| G_ema, seed 0 +\|", where)
    assert '"fid"' in Path("samples/a/index.html").read_text() and "samples/a/index.html" in out
    events = EventAccumulator("logs/a").Reload()
    assert [event.value for event in events.Scalars("swd")] == pytest.approx([swd_line["swd"]])


def test_the_same_seed_gives_the_same_numbers_and_the_folder_of_samples_does_too(run, trained, small_inception):
    evaluated = ("--version", "a", "--mode", "evaluate", "--num_eval", 70)
    for flags in ((), (), ("--seed", 1)):
        run(*evaluated, *flags, tiny=False)
    first, again, other = ({name: line[name] for name in INCEPTIONS} for line in lines("a")[-3:])
    assert first == again and first["fid"] != other["fid"]
    run("--version", "a", "--train", "false", "--num_samples", 70, tiny=False)
    run("--mode", "evaluate", "--fake_dir", "samples/a/0000003_generated_seed0", "--real_dir", "pictures", tiny=False)
    of_files = scored()[-1]
    assert {name: of_files[name] for name in INCEPTIONS} == first, "PNG-exact"
    assert of_files["protocol"] == scored()[0]["protocol"], "so they stand in one table"


def test_the_best_of_the_evaluated_steps_is_kept_by_one_protocol_and_the_runs_own_pictures(
        run, trained, folders, small_inception, monkeypatch):
    fids = iter([1.0, 5.0, 7.0, 3.0, 2.0])
    monkeypatch.setattr(features, "distances", lambda *_: {"fid": next(fids)})

    def evaluate(step, *flags, count=8):
        code, _, err = run("--version", "a", "--mode", "evaluate", "--pretrained_model", step, "--metrics", "fid",
                           "--num_eval", count, *flags, tiny=False)
        assert code == 0, err

    def best():
        return checkpoint.load("models/a/best.pth")["step"], checkpoint.best_score("models/a")["fid"]

    evaluate(2, "--real_dir", "real")
    assert not Path("models/a/best.pth").exists() and "all 14 pictures of folder real" in lines("a")[-1]["protocol"]
    for step, expected in ((2, (2, 5.0)), (3, (2, 5.0)), (1, (1, 3.0))):
        evaluate(step)
        assert best() == expected
    evaluate(2, count=9)
    assert best() == (1, 3.0), "9 samples do not compare with 8"
    assert [line["step"] for line in lines("a") if "fid" in line] == [2, 2, 3, 1, 2]


def test_copies_are_found_and_shown(run, folders, small_lpips):
    code, out, _ = run("--mode", "evaluate", *FOLDERS, "--metrics", "nearest", tiny=False)
    assert code == 0 and "logs/fake_nearest_real-real.png" in out
    before = scored()[-1]
    assert 0.3 < before["nearest"] < 3 and before["nearest_copies"] == pytest.approx(2 / 12), "smooth pictures"
    assert Image.open("logs/fake_nearest_real-real.png").size[0] > 8 * SMALL_SHEETS
    Path("b").mkdir()
    Path("fake").rename("b/fake")
    shutil.copy("real/03.png", "b/fake/03.png")
    _, out, _ = run("--mode", "evaluate", "--fake_dir", "b/fake", "--real_dir", "real", "--metrics", "nearest",
                    tiny=False)
    assert "logs/b_fake_nearest_real-real.png" in out, "folders of one name overwrite no picture of each other"
    assert scored()[-1]["nearest_copies"] == pytest.approx(3 / 12)


def test_metadata_are_drawn_in_both_ways_have_a_share_and_are_searched_for_if_asked(run, pictures, small_lpips,
                                                                                    monkeypatch):
    moved, found, loads, load = [], backtrack.backtrack, [], checkpoint.load_step
    run(*FASTGAN, "--version", "f", "--total_step", 1, "--dataset", "folder", "--image_path", pictures, tiny=False)
    monkeypatch.setattr(checkpoint, "load_step", lambda *words: loads.append(1) or load(*words))
    monkeypatch.setattr(backtrack, "backtrack", lambda G, latents, pictures, net, steps, free, *rest: moved.append(
        free) or found(G, latents, pictures, net, steps, free, *rest))
    monkeypatch.setattr(variation, "SAMPLES", 64)
    others = ("--backtrack_metadata", "true", "--seed", 3, "--truncation", 2, "--metadata_sample", "gauss")
    for flags in (("--metrics", "nearest,lpips,share"), ("--metrics", "lpips", *others)):
        code, _, err = run("--version", "f", "--mode", "evaluate", "--num_eval", 8, "--backtrack_steps", 1, *flags,
                           tiny=False)
        assert code == 0, err
    assert len(loads) == 2, "one each: a run that goes on has newer ones meanwhile"
    bank, gauss = (line for line in lines("f") if "nearest" in line)
    assert (bank["source"], gauss["source"]) == tuple(f"G_ema, seed 0, metadata {how}" for how in ("bank", "gauss"))
    assert "of its class" not in bank["protocol"] == gauss["protocol"] and bank["nearest"] != gauss["nearest"]
    written = {path.name for path in Path("samples/f").iterdir()}
    assert {"0000001_nearest_bank.png", "0000001_nearest_gauss.png", "0000001_backtrack.png",
            "0000001_backtrack_seed3_metadata-gauss_truncation2.png"} <= written, "the old ones stay"
    assert {path.name for path in Path("logs/f").glob("*_lpips*.json")} == {
        "0000001_lpips.json", "0000001_lpips_seed3_metadata-gauss_truncation2.json"}
    share, = (line for line in lines("f") if "share/z_low" in line)        # those of records have no interval
    for measure in ("share", "share_lpips"):
        assert {name for name in share if name.startswith(f"{measure}/")} == {
            f"{measure}/{name}{end}" for name in ("z", "metadata", "noise") for end in ("", "_low", "_high")}
        assert share[f"{measure}/z_low"] < share[f"{measure}/z"] < share[f"{measure}/z_high"]
    assert moved == [8, 8 + 512]
    searched = [line["protocol"] for line in lines("f") if "lpips" in line]
    assert [re.search(r"on (z[a-z ]*),", protocol)[1] for protocol in searched] == ["z", "z and metadata"]


def test_held_out_pictures_are_back_tracked_one_by_one_and_more_steps_come_closer(run, trained, small_lpips):
    for steps in (1, 20):
        code, out, _ = run("--version", "h", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", steps,
                           tiny=False)
        assert code == 0 and "note: this run was trained on all" not in out
    each = json.loads(Path("logs/h/0000001_lpips.json").read_text())
    few, line = lines("h")[-2:]
    assert len(each) == 3 and all(Path(one["picture"]).parent.name == "pictures" for one in each)
    assert line["lpips"] == pytest.approx(np.mean([one["lpips"] for one in each])) and line["lpips"] < few["lpips"]
    assert line["lpips_std"] == pytest.approx(np.std([one["lpips"] for one in each]))
    assert "3 pictures of folder pictures (never trained on)" in line["protocol"] and "20 steps" in line["protocol"]
    assert Path("samples/h/0000001_backtrack.png").exists()
    shown = Path("samples/h/index.html").read_text()
    assert "0000001_backtrack.png" in shown and '"lpips"' in shown


def test_that_pictures_were_trained_on_is_said_also_of_a_set_that_has_changed(run, trained, small_lpips):
    shutil.copy("pictures/0.png", "pictures/00.png")
    for version, told, protocol in (("a", "trained on all pictures, including these 1", "(TRAINED ON)"),
                                    ("h", "some of those held out now were trained on", "PARTLY TRAINED ON")):
        _, out, _ = run("--version", version, "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 1,
                        tiny=False)
        assert told in out and protocol in lines(version)[-1]["protocol"]
    # not forgotten once the run has gone on with these
    for step in (2, 3):
        code, out, err = run("--version", "h", "--total_step", step, tiny=False)
        assert code == 0 and ("some of those kept now were trained on" in out), err
    run("--version", "h", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 1, tiny=False)
    assert "PARTLY TRAINED ON" in lines("h")[-1]["protocol"]


# ---- folders ----


def test_two_folders_need_no_run_and_write_nothing_but_logs_and_the_cache(run, folders, small_inception):
    code, out, _ = run("--mode", "evaluate", *FOLDERS, tiny=False)
    assert code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["cache", "fake", "logs", "real"]
    assert sorted(path.name for path in Path("logs").iterdir()) == ["scores.jsonl", "scores.md"]
    assert scored()[0]["name"] == "fake" and "12 samples at 32 px" in out


def test_a_folder_is_scored_against_a_runs_data_set(run, folders, trained, small_inception):
    code, _, _ = run("--version", "a", "--mode", "evaluate", "--fake_dir", "fake", "--metrics", "fid", tiny=False)
    assert code == 0 and "all 12 pictures of folder pictures" in scored()[-1]["protocol"]


def test_a_folder_without_anything_to_compare_with_is_told_how_to_name_it(run, folders):
    code, _, err = run("--mode", "evaluate", "--fake_dir", "fake", tiny=False)
    assert code == 3 and "data/CelebA" in err and "--real_dir DIR" in err and len(err.strip().splitlines()) == 2


def test_real_pictures_of_other_sizes_are_cut_as_in_training_and_counted(run, folders, small_inception):
    Image.new("RGB", (80, 50), "red").save("real/wide.png")
    code, out, _ = run("--mode", "evaluate", *FOLDERS, "--metrics", "fid", tiny=False)
    assert code == 0 and "note: --real_dir: 1 of 15 pictures are not 32x32" in out


@pytest.mark.parametrize(("spoil", "flags", "words"), [
    (lambda: Image.new("RGB", (64, 64)).save("fake/big.png"), (), ("--fake_dir fake", "12 of 32x32, 1 of 64x64",
                                                                   "--imsize N")),
    (lambda: [Path(f"fake/{i:02d}.png").write_bytes(b"\x89PNG cut") for i in range(3)], (),
     ("3 of 12 pictures cannot be used", "fake/00.png")),
    (lambda: Path("real/05.png").write_bytes(Path("real/05.png").read_bytes()[:90]), (), ("real/05.png",)),
    (lambda: [Path(f"fake/{i:02d}.png").unlink() for i in range(9)], (), ("3 generated pictures", "at least 6")),
    (lambda: shutil.rmtree("fake"), (), ("--fake_dir", "there is no folder fake")),
    (lambda: shutil.rmtree("real"), (), ("--real_dir", "there is no folder real")),
    (lambda: None, ("--imsize", "48", "--metrics", "swd"), ("--metrics swd", "--imsize 64")),
    (lambda: None, ("--max_pixels", "1000"), ("more than 1,000 pixels; --max_pixels 0 lifts this limit",)),
    (lambda: Image.new("RGB", (64, 64)).save("real/big.png"), ("--max_pixels", "2000"), ("real/big.png",
                                                                                         "--max_pixels 0")),
])
def test_unusable_folders_end_with_3_in_two_lines_and_nothing_half_written(run, folders, small_inception, spoil, flags,
                                                                           words):
    spoil()
    code, _, err = run("--mode", "evaluate", *FOLDERS, *flags, tiny=False)
    told = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "picture/s" not in line]
    assert code == 3 and all(word in err for word in words), err
    assert len(told) <= 2 and "Traceback" not in err
    assert not Path("logs").exists()


def test_pictures_of_other_sizes_are_taken_at_the_asked_one(run, folders, small_inception):
    Image.new("RGB", (64, 90)).save("fake/big.png")
    code, out, _ = run("--mode", "evaluate", *FOLDERS, "--metrics", "fid", "--imsize", 48, tiny=False)
    assert code == 0 and "13 samples at 48 px" in out and "note: --fake_dir: 13 of 13 pictures are not 48x48" in out


def test_missing_weights_name_both_ways_on(run, folders, monkeypatch):
    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setenv("TORCH_HOME", str(folders / "hub"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    for metric, script, way in (("fid", "Inception", "--metrics swd"), ("nearest", "VGG16", "--metrics without")):
        code, _, err = run("--mode", "evaluate", *FOLDERS, "--metrics", metric, tiny=False)
        assert code == 3 and f"bash download.sh {script}" in err and way in err
        assert len(err.strip().splitlines()) == 2
    assert not Path("logs").exists()


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, run, trained, small_inception, small_lpips, monkeypatch):
    """The ranks share the work, and rank 0 writes the results once."""
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import conftest, main, stand_ins
from metrics import backtrack, swd, variation
from pretrained import inception, lpips
inception.load_inception = lambda weights: conftest.SmallInception()
lpips.load_lpips = lambda weights, hint: stand_ins.SmallLpips()
lpips.require = lambda weights, hint: None
backtrack.STARTS = 64
variation.SAMPLES = 128
swd.sliced_wasserstein = stand_ins.small_swd
sys.exit(main.main(sys.argv[1:]))
""")
    flags = ("--version", "h", "--mode", "evaluate", "--num_eval", 70, "--metrics",
             "fid,kid,pr,is,swd,nearest,lpips,share", "--backtrack_steps", 1, "--device", "cpu", "--precision", "fp32")
    monkeypatch.setattr(variation, "SAMPLES", 128)
    two = two_processes(script, *flags)
    assert two.returncode == 0, two.stderr
    assert run(*flags, tiny=False)[0] == 0
    measured = [line for line in lines("h") if "protocol" in line]
    assert len(measured) == 10, "five lines each"
    for shared, alone in zip(measured[:5], measured[5:], strict=True):
        assert shared["protocol"] == alone["protocol"]
        for name in alone:
            if isinstance(alone[name], float):
                assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-9), name
