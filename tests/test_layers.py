"""A room imports only from layers below its own (the table of the design)."""

import ast
from pathlib import Path

ROOT = Path(__file__).parent.parent
LAYERS = {
    "parameter": 0, "utils": 0, "distributed": 0, "spectral": 0, "diffaug": 0, "toy_faces": 0,
    "sagan_models": 1, "fastgan_models": 1, "checkpoint": 1, "gallery": 1, "decode": 1, "weights": 1, "journal": 1,
    "vgg": 2, "cache": 2, "data_loader": 2, "metrics": 2, "page": 2, "inception": 2,
    "losses": 3, "perceptual": 3, "metadata": 3, "families": 4, "scores": 4, "trainer": 5, "sampler": 5,
    "cost": 6, "evaluate": 7, "main": 8,
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
