"""VGG-16: its layers, where its weights are found, and the errors when they are missing."""

import hashlib
import http.client
import io
import socket
import urllib.error
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from conftest import MAIN
from torch import nn

from errors import DataError, UsageError
from pretrained import vgg

draw_weights = vgg._random_state
drawn_once = cache(draw_weights)


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    """An empty working folder and torch hub, without network access."""
    def no_network(url, *args, **kwargs):
        raise urllib.error.URLError(socket.gaierror(-2, "Name or service not known"))

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    monkeypatch.setattr(vgg, "_random_state", drawn_once)
    return tmp_path


@pytest.fixture(scope="module")
def state():
    """A state dict with torchvision's names, including one tensor of the classifier."""
    features = {f"features.{name}": tensor for name, tensor in vgg.load_vgg("random", "").state_dict().items()}
    return features | {"classifier.6.bias": torch.zeros(1000)}


@pytest.fixture(scope="module")
def torchvisions_file(state):
    """The content of a stand-in for it, in the same format: that of torch.save before 1.6."""
    file = io.BytesIO()
    torch.save(state, file, _use_new_zipfile_serialization=False)
    return file.getvalue()


@pytest.fixture
def published(torchvisions_file, monkeypatch):
    """That content, as what torchvision publishes."""
    digest = hashlib.sha256(torchvisions_file).hexdigest()
    monkeypatch.setattr(vgg, "FILE", replace(vgg.FILE, sha256=digest, bytes=len(torchvisions_file)))
    return torchvisions_file


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def same(net, state):
    return all(torch.equal(tensor, state[f"features.{name}"]) for name, tensor in net.state_dict().items())


def refused(kind, weights, hint="--metadata false"):
    with pytest.raises(kind) as caught:
        vgg.load_vgg(weights, hint)
    lines = str(caught.value).splitlines()
    assert len(lines) <= 2 and f"--vgg_weights {weights}" in lines[0]
    return str(caught.value)


# ---- the network ----


def test_it_is_torchvisions_network():
    from torchvision.models import vgg16

    with torch.device("meta"):                          # skips the initialization of 138 million weights
        theirs = vgg16().features.eval()
    ours = vgg.load_vgg("random", "")
    theirs.load_state_dict(ours.state_dict(), assign=True)
    assert [type(module) for module in ours] == [type(module) for module in theirs]
    images = torch.randn(2, 3, 48, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(ours(images), theirs(images))


def test_it_is_frozen_and_on_the_cpu():
    net = vgg.load_vgg("random", "")
    assert not net.training
    assert not any(parameter.requires_grad for parameter in net.parameters())
    assert {(p.device.type, p.dtype) for p in net.parameters()} == {("cpu", torch.float32)}


@pytest.mark.parametrize(("layer", "reduction", "pools", "convolutions"),
                         [("relu5_3", 16, 4, 13), ("relu4_3", 8, 3, 10)])
def test_layers_are_what_they_are_called(layer, reduction, pools, convolutions):
    part = vgg.load_vgg("random", "")[: vgg.LAYERS[layer]]
    assert isinstance(part[-1], nn.ReLU)                # the third ReLU of block 5, of block 4
    assert sum(isinstance(module, nn.MaxPool2d) for module in part) == pools
    assert sum(isinstance(module, nn.Conv2d) for module in part) == convolutions
    assert part(torch.zeros(1, 3, 64, 32)).shape == (1, vgg.WIDTH, 64 // reduction, 32 // reduction)


def test_random_weights_are_always_the_same_and_keep_the_scale():
    net, again = vgg.load_vgg("random", ""), draw_weights()
    assert all(torch.equal(weight, again[name]) for name, weight in net.state_dict().items())
    images = torch.randn(4, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    assert 0.2 < net[:30](images).pow(2).mean().sqrt() < 5


def test_random_weights_say_so_at_every_use(capsys):
    for _ in range(2):
        vgg.load_vgg("random", "")
        (line,) = capsys.readouterr().out.splitlines()
        assert "--vgg_weights random" in line and "for tests" in line


def test_normalize_is_imagenets():
    from torchvision.transforms.functional import normalize

    images = torch.rand(2, 3, 5, 4)
    expected = normalize(images, [0.485, 0.456, 0.406], [0.229, 0.224, 0.225])
    assert torch.allclose(vgg.imagenet_normalize(images * 2 - 1), expected, atol=1e-6)


def test_global_random_state_stays(state, tmp_path):
    torch.save(state, tmp_path / "w.pth")
    before = torch.get_rng_state()
    draw_weights()
    vgg.load_vgg(str(tmp_path / "w.pth"), "")
    assert torch.equal(torch.get_rng_state(), before)


# ---- torchvision's file ----


@pytest.mark.parametrize("place", ["data/VGG16", "torch/hub/checkpoints"])
def test_imagenet_is_found_in_both_places(home, published, state, place):
    assert not vgg.FILE.is_available("imagenet")
    path = write(home / place / "vgg16-397923af.pth", published)
    assert vgg.FILE.is_available("imagenet")
    assert same(vgg.load_vgg("imagenet", ""), state)
    path.write_bytes(published[:-1])                    # a truncated download
    assert not vgg.FILE.is_available("imagenet")


def test_the_shipped_hash_and_address_are_torchvisions():
    from torchvision.models import VGG16_Weights

    assert VGG16_Weights.IMAGENET1K_V1.url == vgg.FILE.url
    assert vgg.FILE.sha256.startswith(vgg.FILE.name[len("vgg16-"):-len(".pth")]) and len(vgg.FILE.sha256) == 64
    script = Path(MAIN).with_name("download.sh").read_text()
    row = next(line for line in script.splitlines() if line.startswith("VGG16|")).split("|")
    assert Path("data", row[2], row[3]) == vgg.FILE.places()[0]
    assert (int(row[4]), row[6], row[8]) == (vgg.FILE.bytes, f"sha256:{vgg.FILE.sha256}", vgg.FILE.url)


def test_a_wrong_hash_is_named_and_nothing_of_the_file_is_used(home, published):
    path = write(home / "data/VGG16/vgg16-397923af.pth", published[:-1] + bytes([published[-1] ^ 1]))
    text = refused(DataError, "imagenet")
    assert str(path.relative_to(home)) in text and "Delete it" in text and "bash download.sh VGG16" in text
    assert vgg.FILE.sha256 in text and hashlib.sha256(path.read_bytes()).hexdigest() in text


@pytest.mark.parametrize("error", [
    urllib.error.URLError(socket.gaierror(-2, "Name or service not known")),
    urllib.error.HTTPError("http://x", 403, "Forbidden", None, None),
    TimeoutError("timed out"),
    ConnectionResetError(104, "Connection reset by peer"),
    http.client.IncompleteRead(b""),
    RuntimeError('invalid hash value (expected "397923af", got "00")'),
], ids=lambda error: type(error).__name__)
def test_without_file_and_network_the_two_ways_on_are_named(monkeypatch, capsys, error):
    def fail(*args, **kwargs):
        assert socket.getdefaulttimeout()               # else a stalled connection blocks forever
        raise error

    monkeypatch.setattr(torch.hub, "download_url_to_file", fail)
    text = refused(DataError, "imagenet", "--recon l1")
    assert "bash download.sh VGG16" in text and "--recon l1" in text and "data/VGG16" in text
    assert "fetching" in capsys.readouterr().out
    assert socket.getdefaulttimeout() is None


def test_a_hub_that_cannot_be_written_is_told(home):
    (home / "torch").write_text("a file")
    assert "bash download.sh VGG16" in refused(DataError, "imagenet")


def test_it_is_downloaded_once_into_torchs_folder(home, published, state, monkeypatch, capsys):
    asked = []

    def serve(url, path, hash_prefix, progress):
        asked.append((url, hash_prefix))
        Path(path).write_bytes(published)

    monkeypatch.setattr(torch.hub, "download_url_to_file", serve)
    assert same(vgg.load_vgg("imagenet", ""), state)
    place = home / "torch/hub/checkpoints"
    assert str(place) in capsys.readouterr().out and (place / "vgg16-397923af.pth").exists()
    vgg.load_vgg("imagenet", "")
    assert asked == [("https://download.pytorch.org/models/vgg16-397923af.pth", vgg.FILE.sha256)]


def test_a_download_that_is_not_the_file_is_refused(published, monkeypatch):
    monkeypatch.setattr(torch.hub, "download_url_to_file", lambda url, path, **_: write(path, b"<html>"))
    assert "Delete it" in refused(DataError, "imagenet")


# ---- a user's file ----


def bare(state):
    return {name.removeprefix("features."): tensor for name, tensor in state.items()}


@pytest.mark.parametrize("change", [dict, bare])
def test_a_state_dict_with_or_without_prefix_is_read(tmp_path, state, change):
    torch.save(change(state), tmp_path / "w.pth")
    assert same(vgg.load_vgg(str(tmp_path / "w.pth"), ""), state)


def test_half_precision_becomes_float32(tmp_path, state):
    torch.save({name: tensor.half() for name, tensor in state.items()}, tmp_path / "w.pth")
    assert all(p.dtype == torch.float32 for p in vgg.load_vgg(str(tmp_path / "w.pth"), "").parameters())


def without_one(state):
    return {name: tensor for name, tensor in state.items() if name != "features.28.bias"}


@pytest.mark.parametrize(("content", "words"), [
    (without_one, "features.28.bias (512,)"),
    (lambda state: state | {"features.0.weight": torch.zeros(64, 3, 7, 7)}, "features.0.weight (64, 3, 3, 3)"),
    (lambda state: state | {"features.0.weight": "text"}, "features.0.weight"),
    (lambda state: [1, 2], "holds a list"),
])
def test_a_file_of_something_else_is_refused(tmp_path, state, content, words):
    torch.save(content(state), tmp_path / "w.pth")
    assert words in refused(DataError, str(tmp_path / "w.pth"))


@pytest.mark.parametrize("content", [b"", b"<html>quota</html>", b"PK\3\4 half a zip"])
def test_a_file_that_is_no_state_dict_is_refused(tmp_path, content):
    assert "holds no state dict" in refused(DataError, str(write(tmp_path / "w.pth", content)))


def test_code_in_a_file_is_not_run(tmp_path):
    torch.save({"features.0.weight": Path("x")}, tmp_path / "w.pth")
    assert "UnpicklingError" in refused(DataError, str(tmp_path / "w.pth"))


def test_a_missing_file_is_a_wrong_flag(tmp_path):
    for path in (tmp_path / "nowhere.pth", tmp_path):
        assert "cannot be read" in refused(UsageError, str(path))
        with pytest.raises(UsageError, match="--vgg_weights"):
            vgg.FILE.identity(str(path))
        assert not vgg.FILE.is_available(str(path))


def test_identities_tell_weights_apart(tmp_path):
    path = write(tmp_path / "w.pth", b"one")
    assert vgg.FILE.is_available(str(path)) and not vgg.FILE.is_available("random")
    first = vgg.FILE.identity(str(path))
    assert first == hashlib.sha256(b"one").hexdigest()
    write(path, b"two")
    assert len({first, vgg.FILE.identity(str(path)), vgg.FILE.identity("random"), vgg.FILE.identity("imagenet")}) == 4
    assert vgg.FILE.identity("imagenet") == vgg.FILE.sha256       # known without the file
