"""The picture of the plain way and this program after equal wall time."""

import json

import pytest
from PIL import Image
from stand_ins import smooth

import side_by_side


def test_mistakes_are_named(pictures, tmp_path, capsys):
    for flags, message in (((), "--minutes"), (("--minutes", "1", "--score", "echo {real}"), "must name both folders")):
        assert side_by_side.main(["--image_path", str(pictures), "--out", str(tmp_path / "out"), *flags]) == 2
        assert message in capsys.readouterr().err and not (tmp_path / "out").exists()


@pytest.mark.soak
def test_both_sides_train_and_are_shown_and_nothing_is_trained_twice(tmp_path, capsys):
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for number, picture in enumerate(smooth(64, 64)):
        Image.fromarray(picture.permute(1, 2, 0).numpy()).save(pictures / f"{number}.png")
    flags = ["--minutes", "0.2", "--image_path", str(pictures), "--samples", "64", "--out", str(tmp_path / "out"),
             "--", "--preset", "cpu", "--num_workers", "0", "--cache_path", str(tmp_path / "cache")]
    assert side_by_side.main(flags) == 0
    record = json.loads((tmp_path / "out/side_by_side.json").read_text())
    assert record["plain"]["steps"] > 0 and record["ours"]["steps"] > 0
    for side in ("plain", "ours"):
        assert len(list((tmp_path / "out" / side).iterdir())) == 64
    assert Image.open(tmp_path / "out/side_by_side.png").width > 1000
    capsys.readouterr()
    assert side_by_side.main(flags) == 0
    assert "training" not in capsys.readouterr().out
