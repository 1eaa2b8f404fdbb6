"""A room imports only from layers below its own (the table of the design)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = {
    "failures": 0, "flags": 0,
    "parameter": 1, "utils": 1, "distributed": 1, "diffaug": 1, "toy_faces": 1, "convolutions": 1,
    "precision": 2, "checkpoint": 2, "gallery": 2, "decode": 2, "weights": 2, "journal": 2, "workers": 2,
    "spectral": 3, "fast_step": 3, "vgg": 3, "cache": 3, "datasets": 3, "page": 3, "inception": 3,
    "sagan_models": 4, "fastgan_models": 4, "check_data": 4, "decoded": 4, "drawing": 4,
    "losses": 5, "data_loader": 5, "metrics": 5,
    "perceptual": 6, "metadata": 6,
    "families": 7, "scores": 7,
    "trainer": 8, "sampler": 8,
    "training": 9, "cost": 9,
    "evaluate": 10,
    "main": 11,
}


def imports_of(source):
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield (node.module or "").split(".")[0]


def test_imports_go_downwards_only():
    rooms = {path.stem: path for path in ROOT.glob("*.py")}
    assert set(rooms) <= set(LAYERS), "a new room needs a layer"
    upwards = [
        f"{room} (layer {LAYERS[room]}) imports {other} (layer {LAYERS[other]})"
        for room, path in rooms.items()
        for other in imports_of(path.read_text(encoding="utf-8"))
        if other in rooms and LAYERS[other] >= LAYERS[room]
    ]
    assert not upwards
