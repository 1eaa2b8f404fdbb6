"""FID, KID, precision, recall and the Inception Score agree with torch-fidelity's own command, on one or more ranks."""

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
from stand_ins import CPU
from torch import nn

import main
from errors import DataError, UsageError
from metrics import inception
from pretrained.inception import FILE, load_inception

METRICS = ("fid", "kid", "pr", "is")


# ---- torch-fidelity ----


def paint(folder, count, seed, size=48):
    """A folder of `count` smooth random pictures."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (4, 4, 3), np.uint8))
        coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{number:03d}.png")
    return folder


def two_folders(home, fakes, reals):
    """(fake, real). 7 of 12 fake pictures are darkened, so that KID is well above its noise."""
    fake, real = paint(home / "fake", fakes, 1), paint(home / "real", reals, 2)
    for path in sorted(fake.iterdir())[:fakes * 7 // 12]:
        Image.open(path).point(lambda level: level // 3).save(path)
    return fake, real


def their_words(fake, real, extractor, *flags):
    """Command-line arguments of torch-fidelity for two folders."""
    words = ["--input1", fake, "--input2", real, "-f", "-k", "-i", "-r", "--cpu", "--json", "--silent", "--no-cache",
             "--kid-subset-size", len(list(fake.iterdir())), "--feature-extractor", extractor, *flags]
    return [str(word) for word in words]


def ours(fake, real, folder, *flags):
    code = main.main(["--mode", "evaluate", "--fake_dir", str(fake), "--real_dir", str(real), "--device", "cpu",
                      "--log_path", str(folder / "logs"), "--cache_path", str(folder / "cache"), *flags])
    assert code == 0
    return json.loads((folder / "logs" / "scores.jsonl").read_text().splitlines()[-1])


def assert_agreement(mine, yours):
    pairs = {"fid": "frechet_inception_distance", "kid": "kernel_inception_distance_mean",
             "kid_std": "kernel_inception_distance_std", "precision": "precision", "recall": "recall",
             "inception_score": "inception_score_mean", "inception_score_std": "inception_score_std"}
    for name, other in pairs.items():
        assert mine[name] == pytest.approx(yours[other], rel=1e-3), name
    assert mine["inception_score"] - 1 == pytest.approx(yours["inception_score_mean"] - 1, rel=1e-3)


def assert_telling(yours):
    """The values are far from those of two equal sets."""
    assert yours["inception_score_mean"] > 1.005 and yours["kernel_inception_distance_mean"] > 1e-3
    assert 0 < yours["precision"] < 1 and yours["precision"] != yours["recall"]


def test_two_folders_score_as_torch_fidelitys_command_scores_them(tmp_path, small_inception, monkeypatch, capsys):
    """With a small network: reading files, chunks, statistics, KID subsets, splits, and the order of the two sets."""
    from torch_fidelity import fidelity
    from torch_fidelity.feature_extractor_base import FeatureExtractorBase

    class Small(FeatureExtractorBase):
        def __init__(self, name, features_list, **options):
            super().__init__(name, features_list)
            self.net = SmallInception()

        @staticmethod
        def get_provided_features_list():
            return "features", "logits"

        @staticmethod
        def get_default_feature_layer_for_metric(metric):
            return "logits" if metric == "isc" else "features"

        def forward(self, pictures):
            found = dict(zip(("features", "logits"), self.net(pictures), strict=True))
            return tuple(found[name] for name in self.features_list)

    fake, real = two_folders(tmp_path, 70, 75)
    monkeypatch.setitem(fidelity.FEATURE_EXTRACTORS_REGISTRY, "small", Small)
    monkeypatch.setattr(sys, "argv", ["fidelity", *their_words(fake, real, "small", "--save-cpu-ram")])
    fidelity.main()
    yours = json.loads(capsys.readouterr().out)
    assert_telling(yours)
    assert_agreement(ours(fake, real, tmp_path), yours)


@pytest.fixture(scope="module")
def stand_in(tmp_path_factory):
    """(file of random weights in the published format, torch-fidelity's network with these weights)."""
    from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3

    class Unloaded(FeatureExtractorInceptionV3):
        def load_state_dict(self, *arguments, **options):
            pass

    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save({}, path)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        net = Unloaded("inception-v3-compat", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(path))
        for layer in net.modules():
            if isinstance(layer, nn.Conv2d):
                nn.init.kaiming_normal_(layer.weight, nonlinearity="relu")
            if isinstance(layer, nn.BatchNorm2d):
                layer.running_mean.normal_(0, 0.1)
                layer.running_var.uniform_(0.8, 1.2)
    torch.save(net.state_dict(), path)
    return path, net


def test_the_network_is_torch_fidelitys(stand_in):
    path, theirs = stand_in
    batch = pictures(3)[..., :13]
    for mine, yours in zip(load_inception(str(path))(batch), theirs(batch), strict=True):
        assert mine.shape == yours.shape and torch.allclose(mine, yours, atol=1e-5 * yours.abs().max())
        apart, expected = mine - mine.mean(0), yours - yours.mean(0)    # the part that differs between pictures
        assert torch.allclose(apart, expected, atol=1e-4 * expected.abs().max())


@pytest.mark.soak
@pytest.mark.parametrize("weights", ["random", pytest.param("standard", marks=pytest.mark.skipif(
    not FILE.is_available("standard"), reason="the published weights are not here"))])
def test_inceptions_scores_are_those_of_torch_fidelitys_command(tmp_path, stand_in, weights):
    path, net = stand_in
    if weights == "random":         # its features hardly differ: remove their mean from the logits
        with torch.no_grad():
            common = net(pictures(4))[0].mean(0, keepdim=True)                                  # (1, 2048)
            net.fc.weight -= net.fc.weight @ common.T @ common / common.square().sum()
            net.fc.weight /= net(pictures(4, 1))[1].std()
        path = tmp_path / "inception.pth"
        torch.save(net.state_dict(), path)
    else:
        path = next(place for place in FILE.places() if place.is_file())
    fake, real = two_folders(tmp_path, 12, 15)
    command = [sys.executable, "-W", "ignore", "-c", "from torch_fidelity.fidelity import main; main()", *their_words(
        fake, real, "inception-v3-compat", "--feature-extractor-weights-path", path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    yours = json.loads(result.stdout)
    assert_telling(yours)
    assert_agreement(ours(fake, real, tmp_path, "--inception_weights", str(path)), yours)


# ---- features and formulas ----


def pictures(count, seed=0):
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randint(0, 256, (count, 3, 4, 4), generator=generator).float()
    return torch.nn.functional.interpolate(coarse, size=16).to(torch.uint8)


def features(count, seed=0, logits=True):
    return inception.compute_features(SmallInception(), pictures(count, seed), CPU, "pictures", logits)


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
    perfect = inception.distances(real, same, METRICS)
    assert abs(perfect["fid"]) < 1e-4 and (perfect["precision"], perfect["recall"]) == (1, 1)
    near = inception.distances(real, other, METRICS)
    dark = inception.compute_features(SmallInception(), pictures(300, 1) // 4, CPU, "dark", logits=True)
    far = inception.distances(real, dark, METRICS)
    assert 0 < near["fid"] < far["fid"] / 3 and abs(near["kid"]) < far["kid"] / 3
    apart = inception.distances(real, replace(other, rows=other.rows + 9), ("pr",))
    assert near["precision"] > 0.5 and (apart["precision"], apart["recall"]) == (0, 0)
    assert list(near) == ["fid", "kid", "kid_std", "precision", "recall", "inception_score", "inception_score_std"]
    assert near == inception.distances(real, other, METRICS), "deterministic"


def test_only_what_is_asked_is_computed():
    real, fake = features(20), features(20, 1, logits=False)
    assert set(inception.distances(real, fake, ("pr", "fid"))) == {"fid", "precision", "recall"}


def test_precision_is_of_the_generated_pictures():
    """Mode collapse onto a few real pictures gives high precision and low recall."""
    real = features(200)
    few = inception.compute_features(SmallInception(), pictures(200)[:10].repeat_interleave(20, 0), CPU, "few")
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
    found = inception.compute_features(SmallInception(), pictures(200), CPU, "pictures", stopped=lambda: next(answers))
    assert found is None


@pytest.mark.slow
def test_two_processes_see_what_one_sees(tmp_path):
    script = tmp_path / "two.py"
    script.write_text(f"""
import sys
sys.path.insert(0, {str(Path(__file__).parent)!r})
import torch
from conftest import SmallInception
from device import distributed
from metrics import inception
from parameter import resolve
from test_inception import pictures
place = distributed.start(resolve({{"device": "cpu"}}))
shared = inception.compute_features(SmallInception(), pictures(200), place, "pictures", True)
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
    first = load_inception("random").state_dict()
    assert torch.equal(torch.get_rng_state(), before)
    torch.rand(1)
    second = load_inception("random").state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert "for tests" in capsys.readouterr().out


def test_the_address_is_torch_fidelitys_and_download_sh_fetches_the_same():
    from torch_fidelity.feature_extractor_inceptionv3 import URL_INCEPTION_V3

    assert FILE.url == URL_INCEPTION_V3 and FILE.sha256[:8] in FILE.name
    script = Path(MAIN).with_name("download.sh").read_text()
    row = next(line for line in script.splitlines() if line.startswith("Inception|")).split("|")
    assert Path("data", row[2], row[3]) == FILE.places()[0]
    assert (int(row[4]), row[6]) == (FILE.bytes, f"sha256:{FILE.sha256}")
    assert FILE.url in row[8].split()


@pytest.mark.parametrize(("content", "words"), [
    ({"fc.bias": torch.zeros(3)}, "is not torch-fidelity's Inception"),
    ([1], "holds a list"),
    ({"fc.bias": Path("x")}, "UnpicklingError"),
])
def test_a_file_of_something_else_is_refused(tmp_path, content, words):
    torch.save(content, tmp_path / "w.pth")
    with pytest.raises(DataError, match=words) as caught:
        load_inception(str(tmp_path / "w.pth"))
    assert "--inception_weights" in str(caught.value) and len(str(caught.value).splitlines()) <= 2


def test_without_torch_fidelity_the_way_on_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "torch_fidelity.feature_extractor_inceptionv3", None)
    with pytest.raises(UsageError, match="pip install torch-fidelity.*--metrics swd"):
        load_inception("random")


@pytest.mark.gpu
def test_a_gpu_gives_the_same_numbers(tmp_path):
    pytest.importorskip("torch_fidelity")
    net, batch = load_inception("random"), pictures(8)
    on_cpu = net(batch)
    on_gpu = net.to("cuda")(batch.cuda())
    for one, other in zip(on_cpu, on_gpu, strict=True):
        assert torch.allclose(one, other.cpu(), rtol=1e-3, atol=1e-4 * one.abs().max())
