"""Measuring a set of pictures: scores, protocols, and the cache of the reference's features."""

import os
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import SmallInception, fill
from PIL import Image
from stand_ins import CPU, small_swd

import data_loader
from errors import DataError
from metrics import features, meter, swd
from metrics.meter import Meter
from parameter import resolve


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)


@pytest.fixture
def real(pictures, small_inception):
    """configure(**changes) -> the config of a run on the folder of 12 pictures."""
    def configure(**changes):
        return resolve({"dataset": "folder", "image_path": str(pictures), "imsize": 32, "batch_size": 4,
                        "num_workers": 0, "device": "cpu", "metric_step": 5, **changes})

    return configure


def samples(count=8, seed=1):
    return torch.randint(256, (count, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(seed))


def meter_of(config):
    ready = Meter(config, CPU)
    ready.prepare(meter.of_run(config, data_loader.build_dataset(config)))
    return ready


def measured(config, pictures=None, **how):
    return meter_of(config).measure(samples() if pictures is None else pictures, "noise", **how)


def test_the_reference_passes_once_and_is_read_the_next_time(real, small_inception, capsys):
    first = measured(real())
    assert "reference: all 12 pictures of folder pictures, computing features once" in capsys.readouterr().out
    assert small_inception[0].seen == 12 + 8
    second = measured(real())
    (path,) = Path("cache/reference").iterdir()
    assert f"features read from {path}" in capsys.readouterr().out
    assert small_inception[1].seen == 8, "only the samples are embedded"
    assert first == second and set(first[0].values) == {
        "fid", "fid_floor", "kid", "kid_std", "kid_floor", "precision", "recall", "coverage", "inception_score",
        "inception_score_std"}


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


def other_version(real, pictures, monkeypatch):
    monkeypatch.setattr(features, "CACHE_VERSION", features.CACHE_VERSION + 1)
    return real()


def fewer_rows(real, pictures, monkeypatch):
    monkeypatch.setattr(features, "MAX_ROWS", 5)
    return real()


def other_net(real, pictures, monkeypatch):
    monkeypatch.setitem(features.FEATURE_NETS, "clip", features.FEATURE_NETS["inception"])
    return real(feature_net="clip", metrics=("fid", "kid"))


def other_library(real, pictures, monkeypatch):
    monkeypatch.setattr(features, "version", lambda package: "99")
    return real()


@pytest.mark.parametrize("change", [repaint, remove, hold_out, other_size, other_weights, other_version, fewer_rows,
                                    other_library, other_net])
def test_whatever_changes_the_reference_has_it_recomputed(real, small_inception, pictures, monkeypatch, capsys, change):
    meter_of(real())
    config = change(real, pictures, monkeypatch)
    meter_of(config)
    assert capsys.readouterr().out.count("computing features once") == 2
    assert small_inception[1].seen == len(data_loader.build_dataset(config))


def test_another_file_of_weights_under_the_same_name_is_another(real, small_inception):
    for content in (b"one", b"two", b"two"):
        Path("my.pth").write_bytes(content)
        meter_of(real(inception_weights="my.pth"))
    assert [net.seen for net in small_inception] == [12, 12, 0]


def test_few_pictures_for_the_features_are_warned_of_once(real, pictures, capsys):
    """The small network has 16 features; the folder has 12 pictures."""
    ready = meter_of(real(metrics=("fid", "pr")))
    ready.measure(samples(40), "noise")
    ready.measure(samples(40), "noise")
    (warned,) = [line for line in capsys.readouterr().out.splitlines() if line.startswith("warning: ")]
    assert warned == ("warning: 12 pictures are fewer than the 16 features, so fid mostly measures how many they are; "
                      "go by kid (add kid to --metrics)")
    measured(real(metrics=("kid", "pr")), samples(8))
    measured(real(image_path=str(fill(pictures.parent / "more", 16))), samples(16))
    assert "warning" not in capsys.readouterr().out


def test_another_network_has_no_inception_score_and_says_so(real, monkeypatch, capsys):
    monkeypatch.setitem(features.FEATURE_NETS, "clip", features.FEATURE_NETS["inception"])
    (found,) = measured(real(feature_net="clip"))
    assert "note: the Inception Score is left out, as --feature_net is clip" in capsys.readouterr().out
    assert {"fd_clip", "kid_clip", "precision_clip", "recall_clip", "coverage_clip"} < found.values.keys()
    assert not any(name.startswith(("fid", "inception")) for name in found.values)
    assert "KID: all pairs" in found.protocol and "Inception Score" not in found.protocol


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def other_shapes(path):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "covariance": kept["covariance"][:-1]}, path)


def without_rows(path):
    kept = torch.load(path, weights_only=True)
    torch.save({name: value for name, value in kept.items() if name != "rows"}, path)


def of_others(path):
    kept = torch.load(path, weights_only=True)
    torch.save({**kept, "origin": {**kept["origin"], "pictures": "others"}}, path)


@pytest.mark.parametrize("damage", [flip, other_shapes, without_rows, of_others])
def test_a_damaged_or_foreign_cache_is_recomputed(real, small_inception, capsys, damage):
    expected = measured(real())
    (path,) = Path("cache/reference").iterdir()
    damage(path)
    assert measured(real()) == expected
    assert "recomputing it" in capsys.readouterr().out and small_inception[1].seen == 12 + 8
    measured(real())
    assert small_inception[2].seen == 8, "the cache was rewritten"


def test_a_protocol_is_the_same_whichever_metrics_were_asked(real):
    found = {chosen: measured(real(metrics=chosen)) for chosen in (
        ("fid",), ("kid",), ("is", "pr"), ("fid", "kid", "pr", "is"), ("fid", "swd"))}
    assert len({scored[0].protocol for scored in found.values()}) == 1
    assert found["fid",][0].values["fid"] == found["fid", "kid", "pr", "is"][0].values["fid"]
    assert set(found["is", "pr"][0].values) == {"precision", "recall", "coverage", "inception_score",
                                               "inception_score_std"}
    assert [set(scored.values) for scored in found["fid", "swd"]] == [{"fid", "fid_floor"}, {"swd"}]
    assert found["fid", "swd"][1].protocol.startswith("sliced Wasserstein")


def test_a_protocol_says_what_decides_the_number(real, pictures):
    (found,) = measured(real())
    assert found.source == "noise"
    for words in ("TF-Inception 2015-12-05 (sha256 6726825d)", "8 samples at 32 px", "KID: 100 subsets of 8;",
                  "against all 12 pictures of folder pictures, unflipped", "Inception Score: 8 splits",
                  "3 nearest neighbours", "torch-fidelity", "fewer than 16 pictures"):
        assert words in found.protocol, words
    Path("my.pth").write_bytes(b"others")
    (pictures.parent / "few").mkdir()
    for number in range(6):
        os.link(pictures / f"{number}.png", pictures.parent / "few" / f"{number}.png")
    others = [measured(real(), samples(9)), measured(real(imsize=64), torch.zeros(8, 3, 64, 64, dtype=torch.uint8)),
              measured(real(holdout=0.25)), measured(real(image_path=str(pictures.parent / "few"))),
              measured(real(inception_weights="random")), measured(real(inception_weights="my.pth"))]
    protocols = [scored[0].protocol for scored in others]
    assert len({found.protocol, *protocols}) == 1 + len(others)
    assert "less the 0.25 held out" in protocols[2] and "RANDOM" in protocols[4]
    assert "Inception of other weights than the standard ones (sha256 " in protocols[5]


def test_a_protocol_says_that_some_of_the_metrics_see_a_part_of_a_set(real, pictures, monkeypatch):
    monkeypatch.setattr(features, "MAX_ROWS", 10)
    few, many = (measured(real(), samples(count))[0].protocol for count in (10, 12))
    assert "KID, precision, recall: 10 of the real pictures" in few and "of the samples" not in few
    assert "KID, precision, recall, coverage: 10 of the samples" in many
    assert "fewer than" in few
    enough = str(fill(pictures.parent / "more", 16))
    assert "fewer than" not in measured(real(image_path=enough), samples(16))[0].protocol


def test_of_a_folder_the_reference_is_what_training_would_see(real, pictures):
    reference = meter.of_folder(pictures, 32, "--real_dir")
    assert len(reference) == 12 and reference.words == "all 12 pictures of folder pictures"
    assert torch.equal(reference.dataset[5], data_loader.open_dataset(real())[5])
    assert reference.fingerprint == meter.of_run(real(), data_loader.build_dataset(real())).fingerprint
    with pytest.raises(DataError, match="^--real_dir: .*nowhere.*; name a folder of pictures"):
        meter.of_folder("nowhere", 32, "--real_dir")


@pytest.mark.parametrize(("chosen", "count", "words"), [
    (("fid", "pr"), 5, "5 generated pictures: --metrics pr needs at least 6"),
    (("fid", "kid"), 1, "1 generated picture: --metrics fid,kid need at least 2"),
])
def test_too_few_samples_are_refused(real, chosen, count, words):
    with pytest.raises(DataError, match=words) as refused:
        measured(real(metrics=chosen), samples(count))
    assert refused.value.code == 3
    assert measured(real(metrics=chosen), samples(6))


def test_too_few_real_pictures_are_refused(real, pictures, small_inception):
    for number in range(3, 12):
        (pictures / f"{number}.png").unlink()
    with pytest.raises(DataError, match="3 real pictures: --metrics pr needs at least 6"):
        meter_of(real(batch_size=1))
    assert not small_inception[0].seen
    assert measured(real(batch_size=1, metrics=("fid", "kid")))


def test_weights_that_give_no_numbers_are_refused_before_anything_is_scored(real, monkeypatch):
    forward = SmallInception.forward
    monkeypatch.setattr(SmallInception, "forward", lambda self, pictures: [
        part * torch.nan for part in forward(self, pictures)])
    with pytest.raises(DataError, match="the features of the real pictures are not finite"):
        meter_of(real())


def test_swd_alone_needs_no_network_and_no_cache(real, small_inception):
    (found,) = measured(real(metrics=("swd",)))
    assert found.values["swd"] > 0 and not small_inception and not Path("cache/reference").exists()
    assert measured(real(metrics=("swd",)))[0] == found


def test_whoever_wants_it_to_end_gets_no_score_and_waits_for_a_chunk_at_the_most(real, small_inception, monkeypatch):
    monkeypatch.setattr(features, "CHUNK", 4)
    asked = []

    def stopped():
        asked.append(len(asked))
        return len(asked) > 2

    assert measured(real(), samples(40), stopped=stopped) is None
    assert small_inception[0].seen == 12 + 2 * 4
