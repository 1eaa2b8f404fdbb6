"""FID, KID, precision, recall and the Inception Score agree with torch-fidelity's own command;
the other networks, coverage, intervals, floors.
"""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from urllib.error import URLError

import numpy as np
import pytest
import torch
import torchvision
from conftest import MAIN, SmallInception
from PIL import Image
from stand_ins import CPU
from torch import nn

import main
from errors import DataError, Failure, UsageError
from metrics import features as measures
from pretrained import feature_nets
from pretrained.feature_nets import FEATURE_NETS
from pretrained.inception import FILE, load_inception
from pretrained.weights import sha256

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
    batch = pictures(2)[..., :13]
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
    return measures.compute_features(SmallInception(), pictures(count, seed), CPU, "pictures", logits)


def of_rows(rows):
    """The Features of these rows, float32 (N, D)."""
    return measures.Features(len(rows), rows.double().mean(0), torch.cov(rows.double().T), rows)


def gaussian(count, width=16, seed=0, **of):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(count, width, generator=generator) * of.get("scale", 1.0) + of.get("shift", 0.0)


def test_sums_over_chunks_are_the_mean_and_covariance_of_all():
    found = features(150)
    rows, logits = SmallInception()(pictures(150))
    assert found.count == 150 and torch.allclose(found.rows, rows) and torch.allclose(found.logits, logits)
    assert np.allclose(found.mean, rows.double().mean(0), rtol=1e-12)
    assert np.allclose(found.covariance, np.cov(rows.double().numpy(), rowvar=False), rtol=1e-9, atol=1e-12)
    assert features(150, logits=False).logits is None


def test_of_a_large_set_rows_are_spread_evenly_and_all_count_for_the_mean(monkeypatch):
    monkeypatch.setattr(measures, "MAX_ROWS", 50)
    found, rows = features(200), SmallInception()(pictures(200))[0]
    assert torch.allclose(found.rows, rows[::4])
    assert np.allclose(found.mean, rows.double().mean(0)) and len(found.logits) == 200


def test_a_set_scores_perfectly_against_itself_and_worse_the_further_it_is():
    real, same, other = measures.prepare_real(features(300)), features(300), features(300, 1)
    perfect = measures.distances(real, same, METRICS)
    assert 0 <= perfect["fid_low"] <= perfect["fid"] <= perfect["fid_high"] and perfect["fid"] < 1e-4
    assert (perfect["precision"], perfect["recall"]) == (1, 1)
    near = measures.distances(real, other, METRICS)
    dark = measures.compute_features(SmallInception(), pictures(300, 1) // 4, CPU, "dark", logits=True)
    far = measures.distances(real, dark, METRICS)
    assert 0 < near["fid"] < far["fid"] / 3 and abs(near["kid"]) < far["kid"] / 3
    apart = measures.distances(real, replace(other, rows=other.rows + 9), ("pr",))
    assert near["precision"] > 0.5 and (apart["precision"], apart["recall"]) == (0, 0)
    names = ("fid", "kid", "precision", "recall", "coverage", "inception_score")
    assert [name for name in near if name in names] == list(names)
    assert near.keys() - names <= {f"{name}_{end}" for name in names for end in ("std", "low", "high", "floor")}


def test_real_pictures_that_hardly_differ_rule_no_score_and_equal_ones_are_refused():
    rows = gaussian(60)
    rows[:, :12] = 1                                    # of 16 features
    prepared = measures.prepare_real(of_rows(rows), standardize=True)
    shifted = rows.clone()
    shifted[0, 0] += 1e-3
    found = measures.distances(prepared, of_rows(shifted).divided_by(prepared.scale), ("fid",))
    assert 0 <= found["fid"] < 0.01
    with pytest.raises(DataError, match="all the same"):
        measures.prepare_real(of_rows(torch.ones(20, 16)), standardize=True)


def test_only_what_is_asked_is_computed():
    real, fake = measures.prepare_real(features(20)), features(12, 1, logits=False)
    assert set(measures.distances(real, fake, ("pr", "fid"))) == {"fid", "fid_floor", "precision", "recall", "coverage"}


def test_precision_is_of_the_generated_pictures():
    """Mode collapse onto a few real pictures gives high precision and low recall."""
    real = measures.prepare_real(features(200))
    few = measures.compute_features(SmallInception(), pictures(200)[:10].repeat_interleave(20, 0), CPU, "few")
    found = measures.distances(real, few, ("pr",))
    assert found["precision"] == 1 and found["recall"] < 0.2


def test_kid_takes_smaller_subsets_of_smaller_sets():
    assert measures.kid_size(features(30), features(20)) == 20
    big = replace(features(2), rows=torch.zeros(5000, 16))
    assert measures.kid_size(big, big) == 1000
    whole = measures.distances(measures.prepare_real(features(20)), features(20, 1), ("kid",))
    assert whole["kid_std"] < 1e-5, "every subset is the whole set"


def straightforward(real, fake):
    """The scores by their definitions, in float64; `real` (M, D), `fake` (N, D)."""
    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    def within(a):
        return (kernel(a, a).sum() - kernel(a, a).trace()) / (len(a) * (len(a) - 1))

    def radii(a, k):
        return torch.cdist(a, a).sort(1).values[:, k]

    real, fake = real.double(), fake.double()
    product = np.linalg.eigvals((torch.cov(real.T) @ torch.cov(fake.T)).numpy()).astype(complex)
    across = torch.cdist(real, fake)
    return {
        "fid": float((real.mean(0) - fake.mean(0)).square().sum() + torch.cov(real.T).trace()
                     + torch.cov(fake.T).trace()) - 2 * float(np.sqrt(product).real.sum()),
        "kid": float(within(real) + within(fake) - 2 * kernel(real, fake).mean()),
        "precision": float((across <= radii(real, 3)[:, None]).any(0).double().mean()),
        "recall": float((across <= radii(fake, 3)).any(1).double().mean()),
        "coverage": float((across.min(1).values <= radii(real, 5)).double().mean()),
    }


def test_scores_are_those_of_their_definitions_and_named_after_the_network(monkeypatch):
    monkeypatch.setattr(measures, "BLOCK", 7)           # all pairs are computed in blocks
    real, fake = gaussian(60), gaussian(45, seed=1, scale=1.2, shift=0.2)
    found = measures.distances(measures.prepare_real(of_rows(real)), of_rows(fake), METRICS[:3], "cpu", "vgg16")
    for name, value in straightforward(real, fake).items():
        assert found[f"{'fd' if name == 'fid' else name}_vgg16"] == pytest.approx(value, rel=1e-5), name
    assert not {"fid", "kid", "fid_vgg16", "kid_vgg16_std"} & found.keys(), "all pairs, no subsets"


def test_a_standardized_feature_weighs_the_same_at_any_scale():
    """But one that the real pictures hardly show counts for less."""
    stretch = torch.logspace(-1, 1, 16)[torch.randperm(16, generator=torch.Generator().manual_seed(0))]
    real, fake = gaussian(60) * stretch, gaussian(45, seed=1) * stretch
    prepared = measures.prepare_real(of_rows(real), standardize=True)
    deviation = real.double().std(0)
    floor = deviation.sort().values[7] / 2              # the lower of the two middle ones, as torch.median
    assert torch.allclose(prepared.scale, deviation.clamp(min=floor), rtol=1e-5)
    found = measures.distances(prepared, of_rows(fake).divided_by(prepared.scale), METRICS[:3], "cpu", "vgg16")
    expected = straightforward(real / prepared.scale, fake / prepared.scale)
    assert found["fd_vgg16"] == pytest.approx(expected["fid"], rel=1e-4)
    assert found["kid_vgg16"] == pytest.approx(expected["kid"], rel=1e-4)


def test_intervals_hold_the_usual_value_about_as_often_as_they_say():
    """Of 25 sets of one generator against the same real pictures, nearly all intervals hold the mean of the scores."""
    real = measures.prepare_real(of_rows(gaussian(100)))
    found = [measures.distances(real, of_rows(gaussian(60, seed=seed, scale=1.3, shift=0.2)), METRICS[:3])
             for seed in range(1, 26)]
    for name in ("fid", "kid", "precision", "recall", "coverage"):
        values = np.array([each[name] for each in found])
        held = [each[f"{name}_low"] <= values.mean() <= each[f"{name}_high"] for each in found
                if f"{name}_low" in each]
        assert len(held) > 18 and np.mean(held) >= 0.85, name
        half = np.mean([each[f"{name}_high"] - each[f"{name}_low"] for each in found if f"{name}_low" in each]) / 2
        assert values.std() < half < 6 * values.std(), f"{name}: neither too short nor too long to tell anything"


def test_leaving_a_group_out_is_what_computing_without_it_would_be():
    rows, real = gaussian(50, seed=1, scale=1.2), gaussian(40)
    prepared = measures.prepare_real(of_rows(real))
    found = measures.distances(prepared, of_rows(rows), METRICS[:3], "cpu", "clip")
    without = [straightforward(real, rows[torch.arange(50) % 20 != group]) for group in range(20)]
    for name in ("kid", "precision", "recall", "coverage"):
        values = np.array([each[name] for each in without])
        half = 2.093 * np.sqrt(((values - values.mean()) ** 2).sum() * 19 / 20)
        value, low, high = (found[f"{name}_clip{end}"] for end in ("", "_low", "_high"))
        least, most = (-np.inf, np.inf) if name == "kid" else (0, 1)
        assert low == pytest.approx(max(value - half, least), rel=1e-3), name
        assert high == pytest.approx(min(value + half, most), rel=1e-3), name


def test_few_pictures_and_groups_that_agree_have_no_interval():
    real = measures.prepare_real(of_rows(gaussian(40)))
    few = measures.distances(real, of_rows(gaussian(19, seed=1)), METRICS[:3], "cpu", "vgg16")
    assert not any(name.endswith(("_low", "_high")) for name in few)
    apart = measures.distances(real, of_rows(gaussian(40, seed=1, shift=99)), METRICS[:3], "cpu", "vgg16")
    assert apart["precision_vgg16"] == 0 and "precision_vgg16_low" not in apart and apart["fd_vgg16_low"] > 0


def test_a_floor_is_the_score_of_two_halves_of_the_real_pictures():
    rows = gaussian(300)
    floors = measures.prepare_real(of_rows(rows)).floors
    alike = straightforward(rows[:150], rows[150:])
    assert floors["fid"] == pytest.approx(alike["fid"], rel=0.2) and abs(floors["kid"]) < 0.05
    found = measures.distances(measures.prepare_real(of_rows(rows)), of_rows(gaussian(300, seed=1)), METRICS[:3])
    assert (found["fid_floor"], found["kid_floor"]) == (floors["fid"], floors["kid"])
    assert not {"precision_floor", "recall_floor", "coverage_floor"} & found.keys()
    assert measures.prepare_real(of_rows(rows)).floors == floors, "the same halves every time"


def test_it_stops_between_chunks_when_told():
    answers = iter([False, True])
    found = measures.compute_features(SmallInception(), pictures(200), CPU, "pictures", stopped=lambda: next(answers))
    assert found is None


# ---- the other networks ----


def test_vgg16_gives_the_mean_of_its_last_map_of_pictures_of_twice_their_size():
    config = SimpleNamespace(vgg_weights="random")
    net = FEATURE_NETS["vgg16"].load(config)
    theirs = torchvision.models.vgg.make_layers(torchvision.models.vgg.cfgs["D"])[:30].eval()
    theirs.load_state_dict({name.removeprefix("net."): value for name, value in net.state_dict().items()})
    assert [feature_nets.vgg_side(size) for size in (16, 48, 64, 80, 112, 256)] == [96, 96, 128, 160, 224, 224]
    channel = torch.tensor([0.485, 0.456, 0.406]).view(3, 1, 1), torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)
    with torch.no_grad():
        images = nn.functional.interpolate((pictures(2).float() / 255 - channel[0]) / channel[1], size=(96, 96),
                                           mode="bilinear", antialias=True)
        expected = theirs(images).mean((2, 3))
        found, logits = net(pictures(2))
    assert logits is None and torch.allclose(found, expected, rtol=1e-3, atol=1e-4 * expected.max())


class TinyClip(torch.nn.Module):
    """The weights of a CLIP of two layers and 64 channels, named as in OpenAI's file, for torch.jit.script."""

    def __init__(self):
        from torch_fidelity.feature_extractor_clip import CLIPVisual

        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.visual = CLIPVisual(16, 64, 2, 64, 32).visual
            self.text_projection = nn.Parameter(torch.zeros(4, 16))

    def forward(self, x):
        return x


@pytest.fixture
def published_clip(tmp_path, monkeypatch):
    """Let a file of the TinyClip be the published one, where torch.hub keeps files."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))
    path = tmp_path / "hub/hub/checkpoints/clip.pt"
    path.parent.mkdir(parents=True)
    net = TinyClip()
    torch.jit.trace(net, torch.zeros(1), check_trace=False).save(str(path))
    monkeypatch.setattr(feature_nets, "CLIP_FILE", replace(
        feature_nets.CLIP_FILE, name="clip.pt", sha256=sha256(path), bytes=path.stat().st_size))
    return net, path


@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_clip_is_built_from_its_verified_file(published_clip):
    from torch_fidelity.feature_extractor_clip import FeatureExtractorCLIP

    kept, path = published_clip
    found, logits = FEATURE_NETS["clip"].load(SimpleNamespace())(pictures(3))
    assert found.shape == (3, 16) and found.isfinite().all() and logits is None
    theirs = FeatureExtractorCLIP("clip-vit-b-32", ["clip"], feature_extractor_weights_path=str(path))
    assert torch.equal(found, theirs(pictures(3))[0])
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(DataError, match="damaged or another file.*\n.*Delete it"):
        FEATURE_NETS["clip"].load(SimpleNamespace())


def test_clips_address_is_torch_fidelitys():
    from torch_fidelity.feature_extractor_clip import MODEL_METADATA, MODEL_URLS

    assert feature_nets.CLIP_FILE.url == MODEL_URLS[feature_nets.CLIP]
    assert feature_nets.CLIP_FILE.sha256 == MODEL_METADATA[feature_nets.CLIP]["hash"]
    assert feature_nets.CLIP_FILE.places()[0].name == f"clip-vit-b-32-{feature_nets.CLIP_FILE.sha256}.pt", "its cache"


@pytest.fixture
def hub(tmp_path, monkeypatch):
    """hub(code) puts a repository of torch.hub with this hubconf.py where facebookresearch/dinov2 would be."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "hub"))

    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "urlopen", no_network)
    folder = tmp_path / "hub/hub/facebookresearch_dinov2_main"

    def write(code):
        folder.mkdir(parents=True)
        (folder / "hubconf.py").write_text(code)

    return write


DINO = """
import torch
def dinov2_vitl14():
    state = torch.hub.load_state_dict_from_url({url!r}, map_location="cpu")
    net = torch.nn.Sequential(torch.nn.AdaptiveAvgPool2d(2), torch.nn.Flatten(), torch.nn.Linear(12, 8))
    net.load_state_dict(state)
    return net
"""


class MakesAFolder:
    """Its unpickling runs code."""

    def __reduce__(self):
        return os.mkdir, ("made",)


def test_dinov2_comes_through_torch_hub_and_nothing_but_tensors_is_unpickled(hub, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hub/hub/checkpoints/dino.pth"
    hub(DINO.format(url="https://nowhere.invalid/dino.pth"))
    path.parent.mkdir(parents=True)
    torch.save({"2.weight": torch.ones(8, 12), "2.bias": torch.zeros(8)}, path)
    before = torch.get_rng_state()
    found, logits = FEATURE_NETS["dinov2"].load(SimpleNamespace())(pictures(3))
    assert found.shape == (3, 8) and logits is None and torch.equal(torch.get_rng_state(), before)
    assert "facebookresearch/dinov2" in capsys.readouterr().out
    torch.save({"2.weight": MakesAFolder()}, path)
    with pytest.raises(DataError, match="--feature_net dinov2"):
        FEATURE_NETS["dinov2"].load(SimpleNamespace())
    assert not Path("made").exists()
    assert "TORCH_FORCE_WEIGHTS_ONLY_LOAD" not in os.environ


@pytest.mark.parametrize("name", ["dinov2", "clip"])
def test_a_download_that_fails_names_the_flag_and_the_way_on(name, hub, monkeypatch, capsys):
    def no_network(*_, **__):
        raise URLError("no network")

    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    code = main.main(["--mode", "evaluate", "--fake_dir", str(paint(Path(os.environ["TORCH_HOME"] + "f"), 8, 1)),
                      "--real_dir", str(paint(Path(os.environ["TORCH_HOME"] + "r"), 8, 2)), "--device", "cpu",
                      "--feature_net", name])
    told = capsys.readouterr().err.strip()
    assert code == 3 and len(told.splitlines()) == 2 and told.startswith(f"error: --feature_net {name}")
    assert "--feature_net vgg16 --vgg_weights PATH" in told


@pytest.mark.parametrize(("name", "module"), [("dinov2", "dinov2"), ("clip", "clip")])
def test_without_torch_fidelity_only_its_networks_are_refused(name, module, monkeypatch):
    monkeypatch.setitem(sys.modules, f"torch_fidelity.feature_extractor_{module}", None)
    with pytest.raises(Failure, match=f"--feature_net {name} needs torch-fidelity.*--feature_net vgg16") as refused:
        FEATURE_NETS[name].load(SimpleNamespace())
    assert refused.value.code == 2


def test_vgg16_needs_no_torch_fidelity(tmp_path, monkeypatch):
    for module in [name for name in sys.modules if name.split(".")[0] == "torch_fidelity"] + ["torch_fidelity"]:
        monkeypatch.setitem(sys.modules, module, None)
    monkeypatch.setattr(measures, "version", lambda package: pytest.fail(f"asked for the version of {package}"))
    fake, real = paint(tmp_path / "fake", 4, 1), paint(tmp_path / "real", 4, 2)
    entry = ours(fake, real, tmp_path, "--feature_net", "vgg16", "--vgg_weights", "random", "--metrics", "fid,kid")
    assert {"fd_vgg16", "kid_vgg16"} < entry.keys()
    assert not any(name.startswith(("fid", "inception")) for name in entry)


@pytest.mark.parametrize(("trained_on", "flatters"), [("vgg16", True), ("vgg16_fine", True), ("none", False)])
def test_scores_by_the_network_that_d_was_trained_on_are_said_to_flatter(capsys, trained_on, flatters):
    measures.SetMeter(SimpleNamespace(feature_net="vgg16", vgg_weights="random", metrics=("fid",), fake_dir=None,
                                      d_features=trained_on), CPU)
    assert ("D was trained on features of vgg16, so these scores flatter" in capsys.readouterr().out) == flatters


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
