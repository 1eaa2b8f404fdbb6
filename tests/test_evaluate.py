"""`--mode evaluate` on a run's checkpoint and on two folders: what it writes, what it refuses."""

import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SMALL_SHEETS, lines, two_processes
from PIL import Image
from stand_ins import SmallLpips, small_swd

from metrics import backtrack, features, swd, variation
from pretrained import lpips
from storage import checkpoint

FOLDERS = ("--fake_dir", "fake", "--real_dir", "real")
INCEPTIONS = ("fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std")


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


def test_a_run_is_evaluated_without_repeating_its_flags(run, pictures, small_inception):
    run("--version", "a", "--total_step", 2, "--dataset", "folder", "--image_path", pictures)
    code, out, _ = run("--version", "a", "--mode", "evaluate", "--num_eval", 8, "--metrics", "fid,kid,pr,is,swd",
                       tiny=False)
    assert code == 0
    inception_line, swd_line = lines("a")[-2:]
    assert (inception_line["step"], swd_line["step"]) == (2, 2)
    assert set(INCEPTIONS) < inception_line.keys() and swd_line["swd"] > 0
    for line in (inception_line, swd_line):
        assert "8 samples at 32 px" in line["protocol"] and "all 12 pictures of folder pictures" in line["protocol"]
        assert line["source"] == "G_ema, seed 0" and line["protocol"] in out
    for where in (out, Path("logs/scores.md").read_text()):
        assert re.search(r"\| a +\| +2 \| .*\| G_ema, seed 0 +\|", where)
    assert '"fid"' in Path("samples/a/index.html").read_text() and "samples/a/index.html" in out


def test_the_same_seed_gives_the_same_numbers_and_the_folder_of_samples_does_too(run, pictures, small_inception):
    run("--version", "a", "--total_step", 2, "--dataset", "folder", "--image_path", pictures)
    evaluated = ("--version", "a", "--mode", "evaluate", "--num_eval", 70)
    for flags in ((), (), ("--seed", 1)):
        run(*evaluated, *flags, tiny=False)
    first, again, other = ({name: line[name] for name in INCEPTIONS} for line in lines("a")[-3:])
    assert first == again and first["fid"] != other["fid"]
    run("--version", "a", "--train", "false", "--num_samples", 70, tiny=False)
    run("--mode", "evaluate", "--fake_dir", "samples/a/0000002_generated_seed0", "--real_dir", pictures, tiny=False)
    of_files = scored()[-1]
    assert {name: of_files[name] for name in INCEPTIONS} == first, "PNG-exact"
    assert of_files["protocol"] == scored()[0]["protocol"], "so they stand in one table"


def test_an_earlier_checkpoint_is_evaluated_and_the_best_is_kept(run, pictures, small_inception, monkeypatch):
    fids = iter([5.0, 7.0, 3.0])
    monkeypatch.setattr(features, "distances", lambda *_: {"fid": next(fids)})
    run("--version", "a", "--total_step", 3, "--model_save_step", 1, "--dataset", "folder", "--image_path", pictures)
    seen = []
    for step in (2, 3, 1):
        run("--version", "a", "--mode", "evaluate", "--pretrained_model", step, "--metrics", "fid", "--num_eval", 8,
            tiny=False)
        seen.append((checkpoint.load("models/a/best.pth")["step"], checkpoint.best_score("models/a")["fid"]))
    assert seen == [(2, 5.0), (2, 5.0), (1, 3.0)]
    assert [line["step"] for line in lines("a") if "fid" in line] == [2, 3, 1]


def test_a_fid_by_another_protocol_does_not_replace_the_best(run, pictures, small_inception, monkeypatch):
    fids = iter([5.0, 3.0])
    monkeypatch.setattr(features, "distances", lambda *_: {"fid": next(fids)})
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    for count in (8, 9):
        run("--version", "a", "--mode", "evaluate", "--metrics", "fid", "--num_eval", count, tiny=False)
    assert checkpoint.best_score("models/a")["fid"] == 5, "9 samples do not compare with 8"


def test_another_reference_does_not_decide_which_checkpoint_is_best(run, pictures, folders, small_inception):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    code, _, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "fid", "--num_eval", 8, "--real_dir", "real",
                     tiny=False)
    assert code == 0 and not Path("models/a/best.pth").exists()
    assert "all 14 pictures of folder real" in lines("a")[-1]["protocol"]


def test_tensorboard_gets_the_numbers(run, pictures, small_inception):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run("--version", "a", "--total_step", 1, "--use_tensorboard", "true", "--dataset", "folder", "--image_path",
        pictures)
    run("--version", "a", "--mode", "evaluate", "--metrics", "swd", "--num_eval", 8, tiny=False)
    events = EventAccumulator("logs/a").Reload()
    assert [event.value for event in events.Scalars("swd")] == pytest.approx([lines("a")[-1]["swd"]])


def test_copies_are_found_and_shown(run, folders, small_lpips):
    shutil.copy("real/03.png", "fake/00.png")
    code, out, _ = run("--mode", "evaluate", *FOLDERS, "--metrics", "nearest", tiny=False)
    assert code == 0 and "fake_nearest.png" in out
    entry = scored()[-1]
    assert 0.3 < entry["nearest"] < 3 and entry["nearest_copies"] >= 1 / 12
    assert Image.open("logs/fake_nearest.png").size[0] > 8 * SMALL_SHEETS


def test_samples_with_metadata_of_one_picture_and_of_none_are_scored_apart(run, pictures, small_lpips, monkeypatch):
    run("--model", "fastgan", "--version", "f", "--total_step", 1, "--dataset", "folder", "--image_path", pictures,
        "--imsize", 64, "--vgg_weights", "random", "--recon", "l1")
    loads, load = [], checkpoint.load_step
    monkeypatch.setattr(checkpoint, "load_step", lambda *words: loads.append(1) or load(*words))
    code, _, err = run("--version", "f", "--mode", "evaluate", "--metrics", "nearest", "--num_eval", 8, tiny=False)
    assert code == 0, err
    assert len(loads) == 1, "a run that goes on has newer ones meanwhile"
    bank, gauss = lines("f")[-2:]
    assert (bank["source"], gauss["source"]) == tuple(f"G_ema, seed 0, metadata {how}" for how in ("bank", "gauss"))
    assert bank["protocol"] == gauss["protocol"] and bank["nearest"] != gauss["nearest"]
    written = {path.name for path in Path("samples/f").iterdir()}
    assert {"0000001_nearest_bank.png", "0000001_nearest_gauss.png"} <= written


def test_held_out_pictures_are_back_tracked_one_by_one(run, pictures, small_lpips):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures, "--holdout", "0.25")
    code, out, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 3, tiny=False)
    assert code == 0 and "note: this run was trained on all" not in out
    each = json.loads(Path("logs/a/0000001_lpips.json").read_text())
    line = lines("a")[-1]
    assert len(each) == 3 and all(Path(one["picture"]).parent == pictures for one in each)
    assert line["lpips"] == pytest.approx(np.mean([one["lpips"] for one in each]))
    assert line["lpips_std"] == pytest.approx(np.std([one["lpips"] for one in each]))
    assert "3 pictures of folder pictures (never trained on)" in line["protocol"] and "3 steps" in line["protocol"]
    assert Path("samples/a/0000001_backtrack.png").exists()
    shown = Path("samples/a/index.html").read_text()
    assert "0000001_backtrack.png" in shown and '"lpips"' in shown


def test_a_set_that_has_changed_holds_out_pictures_that_were_trained_on_and_says_so(run, pictures, small_lpips):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures, "--holdout", 0.25)
    shutil.copy(pictures / "0.png", pictures / "00.png")
    _, out, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 1, tiny=False)
    assert "some of those held out now were trained on" in out and "PARTLY TRAINED ON" in lines("a")[-1]["protocol"]


def test_a_run_that_held_nothing_out_is_told_so(run, pictures, small_lpips):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    _, out, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 1, tiny=False)
    assert "trained on all pictures, including these 1" in out and "TRAINED ON" in lines("a")[-1]["protocol"]


def test_more_steps_come_closer(run, pictures, small_lpips):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures, "--holdout", "0.5")
    for steps in (1, 20):
        run("--version", "a", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", steps, tiny=False)
    few, many = lines("a")[-2:]
    assert many["lpips"] < few["lpips"]


def test_metadata_are_searched_for_if_asked(run, pictures, small_lpips, monkeypatch):
    moved, found = [], backtrack.backtrack
    monkeypatch.setattr(backtrack, "backtrack", lambda G, latents, pictures, net, steps, free, *rest: moved.append(
        free) or found(G, latents, pictures, net, steps, free, *rest))
    run("--model", "fastgan", "--version", "f", "--total_step", 1, "--dataset", "folder", "--image_path", pictures,
        "--imsize", 64, "--vgg_weights", "random", "--recon", "l1")
    for flags in ((), ("--backtrack_metadata", "true")):
        run("--version", "f", "--mode", "evaluate", "--metrics", "lpips", "--backtrack_steps", 2, *flags, tiny=False)
    assert moved == [8, 8 + 512]
    assert [re.search(r"on (z[a-z ]*),", line["protocol"])[1] for line in lines("f")[-2:]] == ["z", "z and metadata"]


# ---- folders ----


def test_two_folders_need_no_run_and_write_nothing_but_logs_and_the_cache(run, folders, small_inception):
    code, out, _ = run("--mode", "evaluate", *FOLDERS, tiny=False)
    assert code == 0
    assert sorted(path.name for path in Path().iterdir()) == ["cache", "fake", "logs", "real"]
    assert sorted(path.name for path in Path("logs").iterdir()) == ["scores.jsonl", "scores.md"]
    assert scored()[0]["name"] == "fake" and "12 samples at 32 px" in out


def test_a_folder_is_scored_against_a_runs_data_set(run, folders, pictures, small_inception):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
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


def test_a_run_without_its_pictures_is_told_what_is_missing(run, pictures, small_inception):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    shutil.rmtree(pictures)
    code, _, err = run("--version", "a", "--mode", "evaluate", tiny=False)
    assert code == 3 and "--image_path" in err


@pytest.mark.slow
def test_two_processes_give_the_numbers_of_one(tmp_path, run, pictures, small_inception, small_lpips, monkeypatch):
    """The ranks share the work, and rank 0 writes the results once."""
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures, "--holdout", "0.25")
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
    flags = ("--version", "a", "--mode", "evaluate", "--num_eval", 150, "--metrics",
             "fid,kid,pr,is,swd,nearest,lpips,share", "--backtrack_steps", 2, "--device", "cpu", "--precision", "fp32")
    monkeypatch.setattr(variation, "SAMPLES", 128)
    two = two_processes(script, *flags)
    assert two.returncode == 0, two.stderr
    assert run(*flags, tiny=False)[0] == 0
    measured = [line for line in lines("a") if "protocol" in line]
    assert len(measured) == 10, "five lines each"
    for shared, alone in zip(measured[:5], measured[5:], strict=True):
        assert shared["protocol"] == alone["protocol"]
        for name in alone:
            if isinstance(alone[name], float):
                assert shared[name] == pytest.approx(alone[name], rel=1e-4, abs=1e-9), name
