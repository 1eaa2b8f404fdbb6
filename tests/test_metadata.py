"""Metadata: how it is computed from pictures, when it is cached, and the statistics of the bank."""

import itertools
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import data_config, two_processes
from PIL import Image

from data_loader import build_dataset, to_images
from dataset.images import ImageDataset
from dataset.table import fingerprint
from errors import DataError
from generate import metadata
from generate.latents import Latents
from generate.metadata import SAMPLERS, Bank, find_bank, same_pictures
from pretrained import vgg

random_vgg = cache(vgg._random_state)       # drawing its weights takes longer than what most tests do with them


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(vgg, "_random_state", random_vgg)
    return tmp_path


def paint(path, seed, size=40):
    noise = np.random.default_rng(seed).integers(0, 256, (3, 4, 3), dtype=np.uint8)
    Image.fromarray(noise).resize((size, size), Image.Resampling.BICUBIC).save(path)


@pytest.fixture
def folder(home):
    (home / "pictures").mkdir()
    for number in range(5):
        paint(home / "pictures" / f"{number}.png", number)
    return home / "pictures"


def make_config(folder, **changes):
    return data_config(folder, **{"batch_size": 2, "vgg_weights": "random", "metadata_layer": "relu5_3", **changes})


def find(folder, **changes):
    config = make_config(folder, **changes)
    return find_bank(config, build_dataset(config), "cpu")


def same(one, other):
    return torch.equal(one.rows, other.rows) and one.state().keys() == other.state().keys() and all(
        one.state()[key] == other.state()[key] for key in ("layer", "weights", "pictures"))


@pytest.fixture
def extractions(monkeypatch):
    """A list that grows by one whenever VGG-16 is loaded, i.e. whenever metadata is computed."""
    loaded, load = [], vgg.load_vgg
    monkeypatch.setattr(vgg, "load_vgg", lambda *words: loaded.append(words) or load(*words))
    return loaded


def cache_file():
    (path,) = Path("cache/metadata").iterdir()
    return path


class Averages:
    """Stands in for VGG-16: returns the next of `rows` (N, 512) as a layer's output of 1x1 px."""

    def __init__(self, rows):
        self.rows, self.seen = rows, 0

    def __getitem__(self, layers):
        return self

    def to(self, device):
        return self

    def __call__(self, images):
        self.seen += len(images)
        return self.rows[self.seen - len(images):self.seen, :, None, None]


def bank_of(averages, cache_path="cache"):
    """The bank of pictures whose features, averaged over space, are `averages` (N, 512)."""
    config = make_config(".", cache_path=cache_path)
    dataset = ImageDataset(lambda index: torch.zeros(3, 16, 16, dtype=torch.uint8), len(averages), "", [])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vgg, "load_vgg", lambda *words: Averages(averages))
        return find_bank(config, dataset, "cpu")


# ---- computing it ----


def decorrelated(averages):
    """The formula by SVD: standardize, whiten with a ridge of 1, scale to mean variance 1."""
    x = averages.double()
    spread = x.std(0, correction=0)
    apart = spread > x.mean(0).abs() * 1e-3
    x = torch.where(apart, (x - x.mean(0)) / spread, 0.0)
    left, singular, right = torch.linalg.svd(x, full_matrices=False)
    whitened = left * (singular / (singular**2 / len(x) + 1) ** 0.5) @ right
    return whitened * (512 / whitened.square().mean(0).sum()) ** 0.5, apart


@pytest.mark.parametrize("layer", ["relu5_3", "relu4_3"])
def test_rows_are_the_decorrelated_averages_of_the_layer(folder, layer):
    config = make_config(folder, metadata_layer=layer)
    dataset = build_dataset(config)
    bank = find_bank(config, dataset, "cpu")
    images = to_images(torch.stack([dataset[index] for index in range(5)]))
    features = vgg.load_vgg("random", "")[: vgg.LAYERS[layer]](vgg.imagenet_normalize(images))
    expected, apart = decorrelated(features.mean((2, 3)).half())    # cached in half precision
    assert 300 < apart.sum() < 512                      # the other channels are constant here
    assert bank.rows.dtype == torch.float16 and bank.rows.shape == (5, 512)
    assert torch.allclose(bank.rows.double(), expected, atol=4e-3)
    assert not bank.rows[:, ~apart].any()
    assert (bank.layer, bank.weights) == (layer, "random")
    assert bank.pictures == fingerprint(dataset, config)


def test_more_pictures_than_a_batch_keep_their_order(folder):
    for number in range(5, 20):
        paint(folder / f"{number}.png", number)
    rows = find(folder).rows.float()
    config = make_config(folder)
    dataset = build_dataset(config)
    images = vgg.imagenet_normalize(to_images(torch.stack([dataset[index] for index in range(20)])))
    averages = vgg.load_vgg("random", "")[: vgg.LAYERS["relu5_3"]](images).mean((2, 3))
    expected, _ = decorrelated(averages)
    nearest = torch.cdist(rows.double(), expected).argmin(1)
    assert nearest.tolist() == list(range(20))


def test_large_pictures_are_reduced_before_vgg(folder, monkeypatch):
    seen = []

    def look(images):
        seen.append(images)
        return torch.zeros(len(images), 3, 16, 16)

    monkeypatch.setattr(vgg, "imagenet_normalize", look)
    monkeypatch.setattr(metadata, "LARGEST", 32)
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::4] = 255                               # a quarter white: -0.5 on average, -1 without anti-aliasing
    Image.fromarray(stripes).save(folder / "0.png")
    find(folder, imsize=128)
    assert seen[0].shape == (5, 3, 32, 32)
    assert torch.allclose(seen[0][0, :, :, 2:-2], torch.tensor(-0.5), atol=0.1)
    find(folder, imsize=32)
    assert seen[1].shape == (5, 3, 32, 32)


def test_a_bar_counts_the_pictures_and_a_line_says_what_is_done(folder, capsys):
    find(folder)
    captured = capsys.readouterr()
    assert "relu5_3" in captured.out and "5 pictures" in captured.out
    assert "5/5" in captured.err and "picture" in captured.err


def test_equal_pictures_give_zeros(home, folder):
    for path in folder.iterdir():
        paint(path, 0)
    assert not find(folder).rows.any()


def test_what_float16_cannot_tell_from_rounding_is_no_spread():
    averages = torch.full((50, 512), 3.0).half()
    averages[::2, 0] += 2**-9                           # the next float16 number
    averages[::2, 1] += 2**-5
    averages[:, 2] = 0
    rows = bank_of(averages).rows
    assert rows[:, 1].float().abs().mean() == pytest.approx(512**0.5, abs=0.01), "all of the variance"
    assert not rows[:, 0].any() and not rows[:, 2:].any()


def test_no_direction_drowns_the_others():
    generator = torch.Generator().manual_seed(0)
    brightness = 3 * torch.randn(900, 1, generator=generator)                   # common to all channels
    averages = brightness * torch.rand(1, 512, generator=generator) + torch.randn(900, 512, generator=generator)

    def variances(rows):
        return torch.linalg.eigvalsh(((rows - rows.mean(0)).T @ (rows - rows.mean(0))).double() / len(rows))

    plain = variances(averages / averages.std(0))
    decorrelated = variances(bank_of(averages).rows.float())
    assert plain.max() > 200 * plain.mean(), "one direction of 512 holds nearly half of all"
    assert decorrelated.max() < 5 * decorrelated.mean() and decorrelated.mean().item() == pytest.approx(1, rel=0.01)


def test_the_bank_is_capped_and_spread_evenly_but_all_pictures_count(monkeypatch):
    monkeypatch.setattr(metadata, "MAX_ROWS", 10)
    averages = torch.rand(95, 512, generator=torch.Generator().manual_seed(0)).half()
    rows = bank_of(averages).rows
    expected, _ = decorrelated(averages)
    chosen = [int(i) for i in (expected[:, None] - rows.double()).abs().sum(2).argmin(0)]
    assert torch.allclose(rows.double(), expected[chosen], atol=2e-3)
    assert chosen[0] == 0 and {b - a for a, b in zip(chosen, chosen[1:], strict=False)} == {9, 10}


def test_global_random_states_stay(folder):
    before = torch.get_rng_state()
    find(folder)
    find(folder)
    assert torch.equal(torch.get_rng_state(), before)


# ---- the cache ----


def test_a_second_run_reads_the_cache_and_says_so(folder, capsys, monkeypatch):
    fresh = find(folder)
    monkeypatch.setattr(vgg, "load_vgg", lambda *words: pytest.fail("VGG was loaded"))
    capsys.readouterr()
    again = find(folder)
    out = capsys.readouterr().out
    assert "5 pictures" in out and f"read from {cache_file()}" in out
    assert same(fresh, again)


def repaint(folder):
    paint(folder / "3.png", 77)


def test_whatever_changes_it_is_recomputed_and_nothing_else_changes_it(folder, extractions):
    banks = [find(folder), find(folder, metadata_layer="relu4_3"), find(folder, imsize=32)]
    find(folder, batch_size=4, num_workers=2)
    assert len(extractions) == 3
    repaint(folder)
    banks.append(find(folder))
    assert len(extractions) == 4 == len(list(Path("cache/metadata").iterdir()))
    assert not any(same(one, other) for one, other in itertools.combinations(banks, 2))


def test_another_file_of_weights_under_the_same_name_is_another(folder, extractions):
    state = vgg.load_vgg("random", "").state_dict()
    for factor in (1, 2):
        torch.save({name: tensor * factor for name, tensor in state.items()}, "w.pth")
        del extractions[:]
        find(folder, vgg_weights="w.pth")
        find(folder, vgg_weights="w.pth")
        assert len(extractions) == 1


def flip(path):
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 64                    # in the tensor data: torch.load does not notice
    path.write_bytes(content)


@pytest.mark.parametrize("damage", [
    flip, lambda path: path.write_bytes(path.read_bytes()[:1000])], ids=["flipped", "short"])
def test_a_damaged_cache_is_recomputed(folder, extractions, capsys, damage):
    fresh = find(folder)
    damage(cache_file())
    capsys.readouterr()
    assert same(find(folder), fresh) and len(extractions) == 2
    assert f"{cache_file()} is damaged" in capsys.readouterr().out
    assert same(find(folder), fresh) and len(extractions) == 2


@pytest.mark.parametrize("foreign", [
    lambda cache: {**cache, "averages": cache["averages"][:4]},
    lambda cache: {**cache, "averages": cache["averages"].float()},
    lambda cache: {"origin": cache["origin"]},
])
def test_a_foreign_cache_is_recomputed(folder, extractions, capsys, foreign):
    fresh = find(folder)
    torch.save(foreign(torch.load(cache_file(), weights_only=True)), cache_file())
    capsys.readouterr()
    assert same(find(folder), fresh) and len(extractions) == 2
    assert f"{cache_file()} is stale" in capsys.readouterr().out


def test_a_disk_that_refuses_costs_the_cache_alone(folder, capsys):
    expected = find(folder)
    capsys.readouterr()
    Path("blocked").write_text("a file")
    assert same(find(folder, cache_path="blocked"), expected)
    (line,) = [line for line in capsys.readouterr().out.splitlines() if "cannot write" in line]
    assert "--cache_path" in line
    assert Path("blocked").read_text() == "a file"


def test_a_full_disk_leaves_nothing_half(folder, monkeypatch):
    def fill(thing, path):
        Path(path).write_bytes(b"half")
        raise RuntimeError("[enforce fail at inline_container.cc:664] . unexpected pos 64 vs 0")

    monkeypatch.setattr(torch, "save", fill)
    assert find(folder).rows.shape == (5, 512)
    assert list(Path("cache/metadata").iterdir()) == []


# ---- errors ----


def test_a_cache_made_with_imagenets_weights_needs_no_weights(folder, monkeypatch):
    load = vgg.load_vgg
    monkeypatch.setattr(vgg, "load_vgg", lambda weights, hint: load("random", hint))
    fresh = find(folder, vgg_weights="imagenet")
    monkeypatch.setattr(vgg, "load_vgg", lambda *words: pytest.fail("VGG was loaded"))
    assert same(find(folder, vgg_weights="imagenet"), fresh)
    assert fresh.weights == vgg.FILE.sha256


def test_a_bad_picture_is_named_and_nothing_is_cached(folder):
    (folder / "2.png").write_bytes(b"<html>")
    with pytest.raises(DataError, match="2.png"):
        find(folder)
    assert not Path("cache").exists()


def test_weights_that_give_no_numbers_are_refused(folder):
    state = vgg.load_vgg("random", "").state_dict()
    torch.save({name: tensor * 1e4 for name, tensor in state.items()}, "w.pth")
    with pytest.raises(DataError, match="--vgg_weights w.pth"):
        find(folder, vgg_weights="w.pth")
    assert not Path("cache").exists()


def test_changed_pictures_are_noticed(folder):
    bank = find(folder)

    def now(**changes):
        config = make_config(folder, **changes)
        return same_pictures(bank, config, build_dataset(config))

    assert now() and now(batch_size=3)
    assert not now(imsize=32)
    repaint(folder)
    assert not now()


# ---- several processes ----

PROCESS = """
import os, sys, time
from datetime import timedelta
import torch.distributed as dist
tests, cache_path, seconds = sys.argv[1:]
sys.path.insert(0, tests)
import test_metadata
from data_loader import build_dataset
from errors import DataError
from generate.metadata import find_bank
from pretrained import vgg

dist.init_process_group("gloo", init_method="file://" + os.path.abspath("meeting"), rank=int(os.environ["RANK"]),
                        world_size=2, timeout=timedelta(seconds=1))
load = vgg.load_vgg
def slow(*words):
    assert os.environ["RANK"] == "0", "only rank 0 computes them"
    time.sleep(float(seconds))
    return load(*words)
vgg.load_vgg = slow
config = test_metadata.make_config("pictures", cache_path=cache_path)
try:
    bank = find_bank(config, build_dataset(config), "cpu")
    print(bank.rows.float().sum().item(), bank.rows.float().std().item())
except DataError as error:
    print(error)
dist.destroy_process_group()
"""


def answers(cache_path, seconds=0):
    """The lines that each of two ranks prints; computing takes rank 0 `seconds` longer."""
    script = Path("process.py")
    script.write_text(PROCESS)
    done = two_processes(script.absolute(), Path(__file__).parent, cache_path, seconds)
    assert done.returncode == 0, done.stderr
    return [out.splitlines() for out in done.each]


@pytest.mark.slow
def test_rank_0_computes_them_and_the_others_wait_beyond_any_timeout(folder):
    first, second = answers("cache", 1.5)
    assert first[-1] == second[-1] and len(second) == 1
    bank = find(folder)
    assert float(first[-1].split()[1]) == bank.rows.float().std().item()


@pytest.mark.slow
def test_several_processes_need_a_cache(folder):
    Path("blocked").write_text("a file")
    first, second = answers("blocked")
    assert "--cache_path: cannot write" in first[-1]
    assert "--cache_path blocked: rank 0 did not write" in second[0]


# ---- the bank ----


@pytest.fixture(scope="module")
def bank(tmp_path_factory):
    """A bank of 500 rows that are correlated and not Gaussian: mixtures of cubed normals."""
    generator = torch.Generator().manual_seed(0)
    few = torch.randn(500, 6, generator=generator) ** 3
    averages = few @ torch.randn(6, 512, generator=generator) + 0.1 * torch.randn(500, 512, generator=generator)
    return bank_of(averages, tmp_path_factory.mktemp("bank"))


@pytest.mark.parametrize("how", SAMPLERS)
def test_draws_have_the_rows_mean_variance_and_covariance(bank, how):
    rows = bank.rows.double()
    drawn = bank.sample(20_000, how, torch.Generator().manual_seed(1))
    assert drawn.dtype == torch.float32 and drawn.shape == (20_000, 512)
    covariance, expected = drawn.double().T.cov(), rows.T.cov(correction=0)
    assert drawn.mean(0).abs().max() < 0.05
    assert covariance.diag().mean() == pytest.approx(1, abs=0.03)
    assert (covariance.diag() / expected.diag() - 1).abs().max() < 0.15
    assert (covariance - expected).abs().mean() < 0.02 < 0.2 < expected.abs().mean()


def test_gauss_takes_no_mean_for_spread(bank):
    shifted = bank.rows + 1                             # the mean of a subsampled bank is not exactly 0 either
    drawn = Bank(shifted, "", "", "").sample(5000, "gauss", torch.Generator().manual_seed(1))
    assert drawn.var(0).mean() == pytest.approx(1, abs=0.05)


def test_bank_gives_rows_and_all_of_them(bank):
    drawn = bank.sample(10_000, "bank", torch.Generator().manual_seed(0))
    rows = {row.numpy().tobytes() for row in bank.rows.float()}
    assert {row.numpy().tobytes() for row in drawn} == rows


def test_mix_is_of_two_or_three_rows_with_weights_of_norm_one():
    bank = Bank(torch.eye(512).half(), "", "", "")      # the mixture weights are visible
    drawn = bank.sample(2000, "mix", torch.Generator().manual_seed(0))
    weights = drawn.sort(1, descending=True).values
    apart = (weights > 0).sum(1)                        # sometimes one row is chosen twice
    assert apart.max() == 3 and (weights >= 0).all()
    assert 0.4 < (apart == 2).float().mean() < 0.6 < 0.95 < (apart >= 2).float().mean()
    assert torch.allclose(drawn[apart == 3].norm(dim=1), torch.ones(int((apart == 3).sum())), atol=1e-3)
    shares = weights[apart == 2] / weights[apart == 2].sum(1, keepdim=True)
    assert 0.7 < shares[:, 0].mean() < 0.8              # uniform weights of two: the larger is 3/4 on average


@pytest.mark.parametrize("how", SAMPLERS)
def test_a_generator_decides_and_the_global_state_stays(bank, how):
    before = torch.get_rng_state()
    first, second, other = (bank.sample(7, how, torch.Generator().manual_seed(seed)) for seed in (3, 3, 4))
    assert torch.equal(first, second) and not torch.equal(first, other)
    assert torch.equal(torch.get_rng_state(), before)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        assert torch.equal(bank.sample(7, how), first)


def test_the_bank_travels_in_a_checkpoint(bank, tmp_path):
    torch.save({"metadata": bank.state(), "none": Latents(8).state()}, tmp_path / "c.pth")
    state = torch.load(tmp_path / "c.pth", weights_only=True)
    assert same(Bank.from_state(state["metadata"]), bank)
    assert state["metadata"]["rows"].dtype == torch.float16
    assert Bank.from_state(state["none"]) is None


@pytest.mark.gpu
def test_a_gpu_sees_what_the_cpu_sees(folder):
    config = make_config(folder)
    dataset = build_dataset(config)
    expected = find_bank(config, dataset, "cpu").rows.float()
    config.cache_path = "another"
    rows = find_bank(config, dataset, "cuda").rows
    assert rows.is_cuda and (rows.cpu().float() - expected).abs().median() < 0.02
