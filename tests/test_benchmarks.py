"""benchmarks/loading.py and benchmarks/largest.py: what they refuse, and the caches of the first epoch."""

from types import SimpleNamespace

import pytest
import torch
from conftest import fill

import largest
import loading


def test_fewer_pictures_than_a_batch_are_refused(capsys, tmp_path):
    """torchvision's loader would give no batch, without end."""
    fill(tmp_path / "pictures", 3)
    assert loading.main(["--image_path", str(tmp_path), "--batch_size", "8", "--num_workers", "0"]) == 3
    assert "--batch_size 8 is more than the 3 pictures" in capsys.readouterr().err


def test_the_caches_of_the_first_epoch_do_not_pile_up(monkeypatch, tmp_path):
    opened = []

    def ours(options, root, device, place, cached):
        (place / "cache").touch()
        opened.append(place)

    monkeypatch.setattr(loading, "ours", ours)
    options = SimpleNamespace(num_workers=0)
    (fresh,) = [side.open for side in loading.sides_of(options, tmp_path, tmp_path, torch.device("cpu")) if side.reopen]
    for _ in range(3):
        fresh()
    assert len(set(opened)) == 3 and [*tmp_path.iterdir()] == opened[-1:]


@pytest.mark.parametrize(("flags", "message"), [
    (("--slae", "false"), "--slae: is for --model fastgan"), (("--g_attn", "8"), "--g_attn: is for --model sagan"),
    (("--model", "sagan"), "--model: "), (("--imsize", "64"), "--imsize: "), (("--batch_size", "8"), "--batch_size: "),
    (("--precision", "fp32"), "--precision: "), (("--nothing", "1"), "--nothing")])
def test_the_largest_batches_are_of_flags_that_all_cells_can_have(monkeypatch, capsys, flags, message):
    monkeypatch.setattr(largest, "largest", lambda *_: pytest.fail("estimated"))
    assert largest.main([*flags]) == 2
    out, err = capsys.readouterr()
    assert message in err and not out
