"""Shared by all tests: a folder of small pictures, and the real command at a tiny size."""

import numpy as np
import pytest
import torch
from PIL import Image

import main

TINY = ("--dataset", "toy", "--imsize", "32", "--batch_size", "4", "--g_conv_dim", "4", "--d_conv_dim", "4",
        "--z_dim", "8", "--num_workers", "0", "--device", "cpu", "--preset", "published")


def pytest_collection_modifyitems(items):
    """Tests marked gpu are skipped, with the reason, where there is no CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """run(*flags) -> (exit code, stdout, stderr) of `python main.py --flags` at a tiny size in an empty folder."""
    monkeypatch.chdir(tmp_path)

    def command(*flags, tiny=True):
        code = main.main([*(TINY if tiny else ()), *map(str, flags)])
        out = capsys.readouterr()
        return code, out.out, out.err

    return command


@pytest.fixture
def pictures(tmp_path):
    """A folder of 12 random 40 x 50 PNGs."""
    folder = tmp_path / "pictures"
    folder.mkdir()
    rng = np.random.default_rng(0)
    for number in range(12):
        Image.fromarray(rng.integers(0, 256, (40, 50, 3), np.uint8)).save(folder / f"{number}.png")
    return folder
