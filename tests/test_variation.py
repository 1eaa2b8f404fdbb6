"""The share of the images' variance that comes from each input of G."""

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from stand_ins import SmallLpips

from fastgan_models import Generator
from gallery import records, variation
from generate.latents import Inputs
from metrics.variation import ratio
from pretrained import lpips


class Sums:
    """A G whose images are sums of its inputs with these weights."""

    has_noise = True

    def __init__(self, *weights):
        self.weights, self.parts = weights, {"z": slice(4), "metadata": slice(4, 8)}

    def draw(self, inputs):
        noise = inputs.z if inputs.noise is None else inputs.noise
        sums = inputs.z[:, :4].sum(1), inputs.z[:, 4:8].sum(1), 2 * noise[:, 8]
        image = sum(weight * each for weight, each in zip(self.weights, sums, strict=True))
        return image[:, None, None, None].expand(-1, 3, 2, 2)


@pytest.mark.parametrize(("weights", "expected"), [
    ((1, 0, 0), {"z": 1, "metadata": 0, "noise": 0}),           # metadata are ignored
    ((0, 2, 0), {"z": 0, "metadata": 1, "noise": 0}),           # metadata drown z
    ((1, 1, 0), {"z": 0.5, "metadata": 0.5, "noise": 0}),
    ((1, 3, 0), {"z": 0.1, "metadata": 0.9, "noise": 0}),
    ((1, 0, 2), {"z": 0.2, "metadata": 0, "noise": 0.8}),
])
def test_shares_of_a_known_generator(weights, expected):
    torch.manual_seed(0)
    G, inputs = Sums(*weights), Inputs(torch.randn(20_000, 9))
    found = variation.shares(G, inputs, G.draw(inputs), G.draw, variation.in_pixels)
    assert found == pytest.approx(expected, abs=0.03)


def test_shares_of_the_real_generator():
    torch.manual_seed(0)
    G, inputs = Generator(64, 16, 4).eval(), Inputs(torch.randn(8, 16 + 512))

    def share():
        return variation.shares(G, inputs, draw(inputs), draw, variation.in_pixels)

    def draw(inputs):
        return G(**inputs.as_arguments())[0].detach()

    found = share()
    assert 0.2 < found["z"] < 1 and 0.2 < found["metadata"] < 1 and found["noise"] == 0, "the noise starts at 0"
    G.blocks["8"].get_submodule("2").weight.data.fill_(1)
    assert share()["noise"] > 0.01
    assert Generator(64, 16, 4, metadata=False).parts == {"z": slice(16)}


def test_a_label_is_one_of_the_inputs():
    G, labels = Sums(1, 0, 0), torch.randint(2, (20_000,))
    inputs = Inputs(torch.randn(20_000, 9), labels)

    def draw(inputs):
        return G.draw(inputs) + 4 * inputs.labels[:, None, None, None]

    found = variation.shares(G, inputs, draw(inputs), draw, variation.in_pixels)
    assert found == pytest.approx({"z": 0.5, "metadata": 0, "label": 0.5, "noise": 0}, abs=0.03)


def test_of_a_record_in_the_order_of_its_classes_pairs_are_of_any_two(monkeypatch):
    class Labelled(Sums):
        def __call__(self, labels=None, **inputs):
            return [self.draw(Inputs(**inputs)) + 4 * labels[:, None, None, None]]

    monkeypatch.setattr(records, "SHARED_BY", 10_000)
    G, inputs = Labelled(1, 0, 0), Inputs(torch.randn(20_000, 9), torch.arange(20_000) % 2)
    found = records.measure_inputs(G, None, SimpleNamespace(inputs=inputs, images=G(**inputs.as_arguments())[0]))
    assert found["share/label"] == pytest.approx(0.5, abs=0.03) and found["share/z"] == pytest.approx(0.5, abs=0.03)


def test_the_interval_of_a_ratio_holds_the_truth_as_often_as_it_says():
    """Of samples that are compared with their neighbours, as those of a run are."""
    generator = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(300):
        z, other = torch.randn(2, 256, generator=generator).double()
        apart = (z - z.roll(1)).square() + (other - other.roll(1)).square()
        _, low, high = ratio((z - z.roll(1)).square(), apart)
        held += low <= 0.5 <= high
    assert 0.91 < held / 300 < 0.98


def test_the_shares_of_a_run_are_scores(run, monkeypatch):
    monkeypatch.setattr(lpips, "load_lpips", lambda weights, hint: SmallLpips())
    monkeypatch.setattr(lpips, "require", lambda weights, hint: None)
    monkeypatch.setattr("metrics.variation.SAMPLES", 64)
    run("--version", "a", "--total_step", 1, "--g_attn", "none")
    code, out, err = run("--version", "a", "--mode", "evaluate", "--metrics", "share", tiny=False)
    assert code == 0, err
    score = json.loads(Path("logs/a/metrics.jsonl").read_text().splitlines()[-1])
    assert {name: score[name] for name in score if name.startswith("share")} == pytest.approx({
        f"{measure}/z{end}": 1 for measure in ("share", "share_lpips") for end in ("", "_low", "_high")})
    assert "share of the variance of G's images" in out and "share/z" in Path("logs/scores.md").read_text()
