"""Files of published weights: several file names, and files that contain code; more in test_vgg.py."""

import hashlib
import os
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from errors import DataError
from pretrained import inception, weights

NAME, ALIAS = "weights-inception-2015-12-05-6726825d.pth", "pt_inception-2015-12-05-6726825d.pth"
PLACES = ("data/Inception", "torch/hub/checkpoints")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working folder and an empty torch hub, and no way to the network."""
    def no_network(*arguments, **options):
        raise OSError("Name or service not known")

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    return tmp_path


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


@pytest.fixture
def published(tmp_path):
    """A Published like Inception's, but that its bytes are few, and these bytes."""
    torch.save({"weight": torch.arange(3.0)}, tmp_path / "original")
    content = (tmp_path / "original").read_bytes()
    return replace(inception.FILE, sha256=hashlib.sha256(content).hexdigest(), bytes=len(content)), content


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("name", [NAME, ALIAS])
def test_the_file_is_found_in_both_places_under_either_name(published, place, name):
    file, content = published
    assert not file.is_available("standard")
    path = write(Path(place, name), content)
    assert file.is_available("standard")
    assert torch.equal(file.load("standard", "")["weight"], torch.arange(3.0))
    path.write_bytes(content[:-1])                      # half a download
    assert not file.is_available("standard")
    with pytest.raises(DataError, match=f"{path} is damaged or another file"):
        file.load("standard", "")


def test_where_download_sh_puts_it_comes_first_and_its_own_name_before_others(published):
    file, content = published
    order = [Path(place, name) for place in PLACES for name in (NAME, ALIAS)]
    assert [Path(os.path.relpath(path)) for path in file.places()] == order
    for later, earlier in reversed(list(zip(order[1:], order[:-1], strict=True))):
        write(later, content)
        assert file.load("standard", "")
        write(earlier, b"damaged: the message must name it, not the good one behind it")
        with pytest.raises(DataError, match=str(earlier)):
            file.load("standard", "")


def test_it_is_downloaded_under_its_own_name(published, monkeypatch):
    file, content = published
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: write(path, content))
    assert file.load("standard", "") and [path.name for path in Path(PLACES[1]).iterdir()] == [NAME]


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_code_in_a_file_is_not_run_not_even_in_one_of_the_published_hash(published):
    file, _ = published
    code = pickle.dumps({"weight": Harm()}, protocol=2)
    write("mine.pth", code)
    torch.save({"weight": Harm()}, "saved.pth")
    for path in ("mine.pth", "saved.pth"):
        with pytest.raises(DataError, match=f"--inception_weights {path}: {path} holds no state dict"):
            file.load(path, "")
    trusted = write(Path(PLACES[0], NAME), code)
    with pytest.raises(DataError, match="holds no state dict"):
        replace(file, sha256=weights.sha256(trusted)).load("standard", "")
    assert not Path("harmed").exists()


def test_an_identity_is_of_the_bytes_whatever_their_name(published):
    file, content = published
    one, other = write("one.pth", content), write("other.pth", content)
    assert file.identity(str(one)) == file.identity(str(other)) == file.identity("standard") == file.sha256
    assert file.identity("random") == "random"


def test_a_large_file_is_hashed_whole():
    write("large", bytes(3 << 20) + b"end")
    assert weights.sha256("large") == hashlib.sha256(bytes(3 << 20) + b"end").hexdigest()
