"""`cost`: two models are timed alternately, and peak memory is measured in a separate process."""

import json
import multiprocessing
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import lines

from device.distributed import Place
from errors import DataError
from metrics import cost
from parameter import parse, resolve

ALONE = Place(torch.device("cpu"))
SMALL = ("--imsize", "32", "--batch_size", "2", "--g_conv_dim", "4", "--d_conv_dim", "4", "--device", "cpu")


@pytest.fixture
def quick(monkeypatch):
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    monkeypatch.setattr(cost, "TURN", 0.01)
    monkeypatch.setattr(cost, "LEAST", 4)


def test_a_run_is_measured_against_the_baseline_in_one_table(run, pictures, quick, monkeypatch):
    monkeypatch.setattr(cost, "peak_memory", lambda config, bank, place, classes: 2**21 + 2**20 * config.slae)
    run("--model", "fastgan", "--version", "f", "--total_step", 1, "--dataset", "folder", "--image_path", pictures,
        "--imsize", 64, "--vgg_weights", "random", "--recon", "l1")
    code, out, err = run("--version", "f", "--mode", "evaluate", "--metrics", "cost", "--against", "baseline",
                         tiny=False)
    assert code == 0, err
    own, baseline = lines("f")[-2:]
    more = own["g_parameters"] - baseline["g_parameters"]
    assert more == 3 * 98 + 512 * 8, "three masks of 2 x 7 x 7, and W of 512 x 8"
    assert own["d_parameters"] == baseline["d_parameters"] and baseline["sec_per_1000_steps"] > 0
    assert own["sec_per_1000_steps"] > 0 and (own["peak_memory_mib"], baseline["peak_memory_mib"]) == (3, 2)
    assert own["time_ratio"] > 0.2 and own["time_ratio_std"] > 0
    assert (own["source"], baseline["source"][:8]) == ("the run's model", "baseline") and "time_ratio" not in baseline
    assert own["protocol"] == baseline["protocol"] and "64 px, batch 4" in own["protocol"]
    assert "sec_per_1000_steps" in Path("logs/scores.md").read_text() and "time_ratio" in out
    saved = json.loads(Path("models/f/config.json").read_text())
    assert saved["slae"] and saved["metadata"], "measuring changes no run"


def config_of_batch(batch):
    return resolve(parse([*SMALL, "--imsize", "64", "--batch_size", str(batch)]))


def train_a_small_batch():
    cost.TimedConfig(config_of_batch(2), ALONE).run(1)
    return cost.TimedConfig


class AfterASmallBatch:
    """TimedConfig, once it arrives in another process: which has then trained, so that libraries are in its memory."""

    def __reduce__(self):
        return train_a_small_batch, ()


def test_memory_is_that_of_the_training_and_not_of_this_process():
    ballast = torch.ones(64 * 2**20)                    # 256 MiB, which are none of it
    images = 32 * 3 * 64 * 64 * 4
    assert 4 * images < cost.peak_memory(config_of_batch(32), None, ALONE, AfterASmallBatch()) < 2**27
    assert ballast[0] == 1


def without_weights(config, place, bank, classes):
    raise DataError("weights that are missing")


def test_a_mistake_in_the_other_process_is_told_here(monkeypatch):
    fork = SimpleNamespace(get_context=lambda method: multiprocessing.get_context("fork"))
    monkeypatch.setattr(cost, "multiprocessing", fork)  # starts at once: nothing is measured here
    with pytest.raises(DataError, match="weights that are missing"):
        cost.peak_memory(config_of_batch(1), None, ALONE, without_weights)


def test_sides_take_turns_and_the_order_changes(quick, monkeypatch):
    order = []

    class Side:
        def __init__(self, name, seconds):
            self.name, self.each, self.seconds = name, seconds, []

        def run(self, steps):
            order.append(self.name)
            return self.each

    sides = [Side("a", 0.3), Side("b", 0.1)]
    monkeypatch.setattr(cost, "SECONDS", 0)
    assert cost.alternate(sides) == 1
    assert order[:3] == ["a", "b", "a"], "warm-up of both, then how long a turn is"
    turns = order[3:]
    assert len(turns) == 2 * cost.LEAST and turns[:4] == ["b", "a", "a", "b"]
    assert cost.each_ratio(*sides) == pytest.approx([3] * cost.LEAST)


def test_cost_needs_no_pictures(run, pictures, quick, monkeypatch):
    run("--version", "a", "--total_step", 1, "--dataset", "folder", "--image_path", pictures)
    shutil.rmtree(pictures)
    monkeypatch.setattr(cost, "peak_memory", lambda *_, **__: 2**20)
    code, _, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "cost", tiny=False)
    assert code == 0 and lines("a")[-1]["peak_memory_mib"] == 1
