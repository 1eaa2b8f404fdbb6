"""Inception and what comes of it: the numbers of torch-fidelity's own command, on any number of processes."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import MAIN, SmallInception, two_processes
from PIL import Image

import inception
import main
from distributed import Place
from failures import DataError, UsageError

ALONE = Place(torch.device("cpu"))


def paint(folder, count, seed, size=32):
    """A folder of `count` smooth random pictures."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return folder


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """A file in the published one's format: random weights, with logits that tell pictures apart.

    A random network answers every picture with nearly the same features: that common part gets no say in the logits.
    """
    with pytest.MonkeyPatch.context() as unfolded:
        unfolded.setattr(inception, "_folded", lambda net: net)
        net = inception.load("random").net
    with torch.no_grad():
        common = net(pictures(4))[0].mean(0, keepdim=True)                                      # (1, 2048)
        net.fc.weight -= net.fc.weight @ common.T @ common / common.square().sum()
        net.fc.weight /= net(pictures(4, 1))[1].std()
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(net.state_dict(), path)
    return path


def theirs(fake, real, weights, *flags):
    """What torch-fidelity's own command prints for two folders."""
    command = [sys.executable, "-W", "ignore", "-c", "from torch_fidelity.fidelity import main; main()",
               "--input1", fake, "--input2", real, "-f", "-k", "-i", "-r", "--cpu", "--json", "--silent", "--no-cache",
               "--feature-extractor", "inception-v3-compat", "--feature-extractor-weights-path", weights, *flags]
    result = subprocess.run([str(word) for word in command], capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


def ours(fake, real, weights, folder):
    code = main.main(["--mode", "evaluate", "--fake_dir", str(fake), "--real_dir", str(real), "--device", "cpu",
                      "--inception_weights", str(weights), "--log_path", str(folder / "logs"),
                      "--cache_path", str(folder / "cache")])
    assert code == 0
    return json.loads((folder / "logs" / "scores.jsonl").read_text().splitlines()[-1])


def assert_agreement(mine, yours):
    pairs = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
             "kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
             "inception_score": "inception_score_mean", "inception_score_std": "inception_score_std"}
    for name, other in pairs.items():
        assert mine[name] == pytest.approx(yours[other], rel=1e-3), name
    assert mine["inception_score"] - 1 == pytest.approx(yours["inception_score_mean"] - 1, rel=1e-3)


@pytest.mark.slow
def test_two_folders_score_as_torch_fidelitys_command_scores_them(tmp_path, stand_in):
    fake, real = paint(tmp_path / "fake", 12, 1, size=48), paint(tmp_path / "real", 15, 2, size=48)
    for path in sorted(fake.iterdir())[:7]:             # darker ones: the sets must differ for KID to mean something
        Image.open(path).point(lambda level: level // 3).save(path)
    yours = theirs(fake, real, stand_in, "--kid-subset-size", "12")
    assert yours["inception_score_mean"] > 1.005 and yours["kernel_inception_distance_mean"] > 1e-3
    assert 0 < yours["precision"] < 1
    assert_agreement(ours(fake, real, stand_in, tmp_path), yours)


@pytest.mark.slow
@pytest.mark.skipif(not inception.FILE.is_there("standard"), reason="the published weights are not here")
def test_the_published_weights_score_as_torch_fidelitys_command_does(tmp_path):
    fake, real = paint(tmp_path / "fake", 20, 1), paint(tmp_path / "real", 26, 2)
    yours = theirs(fake, real, inception.FILE.find("--metrics swd"), "--kid-subset-size", "20")
    assert_agreement(ours(fake, real, "standard", tmp_path), yours)


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=16).to(torch.uint8)


def features(count, seed=0, logits=True):
    return inception.take(SmallInception(), pictures(count, seed), ALONE, "pictures", logits)


def test_sums_over_chunks_are_the_mean_and_covariance_of_all():
    found = features(150)
    rows, logits = SmallInception()(pictures(150))
    assert found.count == 150 and torch.allclose(found.rows, rows) and torch.allclose(found.logits, logits)
    assert np.allclose(found.mean, rows.double().mean(0), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert features(150, logits=False).logits is None


def test_of_a_large_set_rows_are_spread_evenly_and_all_count_for_the_mean(monkeypatch):
    monkeypatch.setattr(inception, "MAX_ROWS", 50)
    found, rows = features(200), SmallInception()(pictures(200))[0]
    assert torch.allclose(found.rows, rows[::4])
    assert np.allclose(found.mean, rows.double().mean(0)) and len(found.logits) == 200


def test_a_set_scores_perfectly_against_itself_and_worse_the_further_it_is():
    real, same, other = features(300), features(300), features(300, 1)
    perfect = inception.distances(real, same, inception.METRICS)
    assert abs(perfect["fid"]) < 1e-4 and (perfect["precision"], perfect["recall"]) == (1, 1)
    near = inception.distances(real, other, inception.METRICS)
    dark = inception.take(SmallInception(), pictures(300, 1) // 4, ALONE, "dark", logits=True)
    far = inception.distances(real, dark, inception.METRICS)
    assert 0 < near["fid"] < far["fid"] / 3 and abs(near["kid"]) < far["kid"] / 3
    apart = inception.distances(real, replace(other, rows=other.rows + 9), ("pr",))
    assert near["precision"] > 0.5 and (apart["precision"], apart["recall"]) == (0, 0)
    assert list(near) == ["fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"]
    assert near == inception.distances(real, other, inception.METRICS), "identical numbers for identical pictures"


def test_only_what_is_asked_is_computed():
    real, fake = features(20), features(20, 1, logits=False)
    assert set(inception.distances(real, fake, ("pr", "fid"))) == {"fid", "precision", "recall"}


def test_precision_is_of_the_generated_pictures():
    """Of many real kinds a single one, well drawn: precise, with little recall."""
    real = features(200)
    few = inception.take(SmallInception(), pictures(200)[:10].repeat_interleave(20, 0), ALONE, "few")
    found = inception.distances(real, few, ("pr",))
    assert found["precision"] == 1 and found["recall"] < 0.2


def test_kid_takes_smaller_subsets_of_smaller_sets():
    assert inception.kid_size(features(30), features(20)) == 20
    big = replace(features(2), rows=torch.zeros(5000, 16))
    assert inception.kid_size(big, big) == 1000
    whole = inception.distances(features(20), features(20, 1), ("kid",))
    assert whole["kid_std"] < 1e-5, "every subset is the whole set"


def test_features_that_are_no_numbers_are_refused():
    broken = replace(features(20), covariance=torch.full((16, 16), torch.nan).double())
    with pytest.raises(DataError, match="real pictures are not finite"):
        inception.distances(broken, features(20), ("fid",))


def test_it_stops_between_chunks_when_told():
    answers = iter([False, True])
    assert inception.take(SmallInception(), pictures(200), ALONE, "pictures", stopped=lambda: next(answers)) is None


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch, distributed, inception
from parameter import resolve
from conftest import SmallInception
from test_inception import pictures
place = distributed.start(resolve({{"device": "cpu"}}))
shared = inception.take(SmallInception(), pictures(200), place, "pictures", True)
alone = inception.Features(**torch.load(sys.argv[1]))
assert torch.equal(shared.rows, alone.rows) and torch.equal(shared.logits, alone.logits)
assert torch.allclose(shared.covariance, alone.covariance, rtol=1e-10, atol=1e-12) and shared.count == 200
distributed.say("checked")
distributed.stop()
""")
    torch.save(vars(features(200)), tmp_path / "alone.pt")
    result = two_processes(script, tmp_path / "alone.pt")
    assert result.returncode == 0, result.stderr
    assert "checked" in result.stdout


# ---- the file of weights ----


def test_random_weights_are_always_the_same_and_leave_the_random_state(capsys):
    before = torch.get_rng_state()
    first = inception.load("random").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    second = inception.load("random").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "for tests" in capsys.readouterr().out


def test_the_address_is_torch_fidelitys_and_download_sh_fetches_the_same():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert inception.FILE.url == URL_INCEPTION_V3 and inception.FILE.sha256[:8] in inception.FILE.name
    script = Path(MAIN).with_name("download.sh").read_text()
    row = next(line for line in script.splitlines() if line.startswith("Inception|")).split("|")
    assert Path("data", row[2], row[3]) == inception.FILE.places()[0]
    assert (int(row[4]), row[6]) == (inception.FILE.bytes, f"sha256:{inception.FILE.sha256}")
    assert inception.FILE.url in row[8].split()


@pytest.mark.parametrize(("content", "words"), [
    ({"fc.bias": torch.zeros(3)}, "is not torch-fidelity's Inception"),
    ([1], "holds a list"),
    ({"fc.bias": Path("x")}, "UnpicklingError"),
])
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=words) as caught:
        inception.load(str(tmp_path / "w.pth"))
    assert "--inception_weights" in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_without_torch_fidelity_the_way_on_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match="pip install torch-fidelity.*--metrics swd"):
        inception.load("random")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers(tmp_path):
    pytest.importorskip("torch_fidelity")
    net, batch = inception.load("random"), pictures(8)
    on_cpu = net(batch)
    on_gpu = net.to("cuda")(batch.cuda())
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.allclose(one, other.cpu(), rtol=1e-3, atol=1e-4 * one.abs().max())
