"""--mode export by the real command: what onnxruntime, TorchScript and safetensors make of its files."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import families
import parameter
from errors import Failure
from storage import export
from utils import write_atomically

FASTGAN = ("--model", "fastgan", "--preset", "cpu", "--batch_size", "4", "--g_conv_dim", "4", "--d_conv_dim", "4",
           "--z_dim", "8", "--device", "cpu", "--dataset", "folder", "--image_path", "pictures",
           "--vgg_weights", "random")
FOLDER = Path("samples/a/0000002_export")


def pixels_of(images):
    return ((images + 1) * 127.5).round().clip(0, 255).transpose(0, 2, 3, 1)


@pytest.mark.parametrize(("flags", "tiny"), [
    (("--conditional", "true"), True), pytest.param((), True, marks=pytest.mark.soak),
    pytest.param(("--arch", "resnet", "--conditional", "true"), True, marks=pytest.mark.soak),
    pytest.param(FASTGAN, False, marks=pytest.mark.soak)])
def test_other_programs_draw_the_pictures_of_the_command(run, pictures, flags, tiny, monkeypatch):
    import onnxruntime
    from safetensors import safe_open

    run("--version", "a", "--total_step", 2, "--g_lr", 0.01, *flags, tiny=tiny)
    code, out, err = run("--version", "a", "--mode", "export", tiny=False)
    assert code == 0 and "README.md says how to use it" in out and "note" not in out, err
    run("--version", "a", "--mode", "sample", "--num_samples", 5, tiny=False)
    drawn = np.stack([np.asarray(Image.open(path)) for path in sorted(
        Path("samples/a/0000002_generated_seed0").glob("*.png"))])

    arrays = np.load(FOLDER / "latents.npz")
    feeds = {"z": arrays["z"][:5]}
    text = (FOLDER / "README.md").read_text()
    if "classes" in arrays:
        names = text.split("numbers of the classes: ")[1].splitlines()[0].split(", ")
        feeds["labels"] = np.array([names.index(name) for name in arrays["classes"][:5]])
    session = onnxruntime.InferenceSession(FOLDER / "G.onnx")
    (by_onnx,) = session.run(None, feeds)
    by_torch = torch.jit.load(FOLDER / "G.ts.pt")(*map(torch.from_numpy, feeds.values())).numpy()
    for images in (by_onnx, by_torch):
        assert abs(pixels_of(images) - drawn).max() <= 1
    assert f"float32 (N, {arrays['z'].shape[1]})" in text
    with monkeypatch.context() as inside:
        inside.chdir(FOLDER)
        exec("".join(line[4:] for line in text[text.index("    import"):].splitlines(keepends=True)), {})
    shown = np.stack([np.asarray(Image.open(FOLDER / f"{number}.png")) for number in range(4)])
    first = {"z": feeds["z"][:4]} | ({"labels": np.zeros(4, int)} if "labels" in feeds else {})
    (expected,) = session.run(None, first)              # with classes, those lines draw the first one
    assert abs(shown - pixels_of(expected)).max() <= 1, "the README's own lines"

    with safe_open(FOLDER / "G.safetensors", "pt") as file:
        config = parameter.Config.of(json.loads(file.metadata()["config"]))
        G, _ = families.build(config, len(json.loads(file.metadata()["classes"])))
        G.load_state_dict({name: file.get_tensor(name) for name in file.keys()})  # noqa: SIM118
    with torch.no_grad():
        ours = G.eval()(**{name: torch.from_numpy(rows) for name, rows in feeds.items()})[0]
    assert torch.allclose(ours, torch.from_numpy(by_onnx), atol=1e-4)
    code, _, err = run("--version", "a", "--mode", "sample", "--latents", FOLDER / "latents.npz", tiny=False)
    assert code == 0, err


def test_a_file_that_draws_other_images_than_the_program_is_not_left_behind(tmp_path):
    inputs = {"z": torch.ones(2, 2)}
    with pytest.raises(Failure, match="G.onnx is not written"):
        write_atomically(tmp_path / "G.onnx", lambda path: export._save_onnx(
            torch.nn.Identity().eval(), inputs, inputs, torch.zeros(2, 2), path))
    assert not list(tmp_path.iterdir())


def test_missing_packages_are_named_before_anything_is_written(run, monkeypatch):
    run("--version", "a", "--total_step", 2)
    real = importlib.util.find_spec
    monkeypatch.setattr(export.importlib.util, "find_spec", lambda name: None if "onnx" in name else real(name))
    code, _, err = run("--version", "a", "--mode", "export", tiny=False)
    assert code == 2 and "pip install onnx onnxscript onnxruntime" in err and "safetensors" not in err
    assert not FOLDER.exists()
