"""Records: which attention and mask sheets are written, and which values go to the metrics line."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch

from gallery import sheets
from gallery.records import DEFAULT_QUERIES, Record, attention_sheet, mask_sheet, save_raw, write_attention, write_masks
from generate.latents import Inputs


class Attending:
    """Stands in for G and D: layers g... attend uniformly, layers d... to a single position."""

    def __init__(self, *layers):
        self.attention = {layer: SimpleNamespace(gamma=torch.tensor([0.5])) for layer in layers}
        self.asked = []

    def attention_maps(self, x, queries, labels=None):
        self.asked.append((x, queries))
        maps = torch.zeros(len(x), len(queries), 4, 4)
        maps[..., 1, 2] = 1
        return {layer: maps if layer.startswith("d") else torch.full_like(maps, 1 / 16) for layer in self.attention}


class Masking:
    """Stands in for G and D: a spatial mask from 0.25 to 0.75, and perfect reconstructions."""

    reconstructs = True

    def attention_maps(self, x, labels=None):
        mask = torch.linspace(0.25, 0.75, 16).view(1, 1, 4, 4)
        return {"d8" if x.dim() == 4 else "slae8": mask.expand(len(x), -1, -1, -1)}

    def reconstructions(self, images):
        return {"real": images, "again": images}


def record_in(folder, **changes):
    images = torch.zeros(6, 3, 32, 32)
    return Record(**{"inputs": Inputs(torch.zeros(6, 8)), "images": images, "real": images + 0.5, "step": 20,
                     "samples": folder / "s", "attention": folder / "a", **changes})


def names(folder):
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*.*"))


def test_the_default_queries_are_five_different_points_of_the_image():
    queries = torch.tensor(DEFAULT_QUERIES)
    assert queries.shape == (5, 2) and queries.min() >= 0 and queries.max() <= 1
    assert len({tuple(q) for q in queries.tolist()}) == 5
    left_eye, right_eye, mouth, hair, corner = queries.tolist()
    assert left_eye[1] < 0.5 < right_eye[1] and left_eye[0] == right_eye[0]
    assert hair[0] < left_eye[0] < mouth[0] and max(corner) < 0.2


def test_each_attention_layer_has_a_sheet_and_an_entropy_those_of_d_on_real_images_too(tmp_path):
    G, D = Attending("g8", "g16"), Attending("d8")
    figures = write_attention(G, D, record_in(tmp_path))
    assert figures == {"entropy/g8": pytest.approx(1), "entropy/g16": pytest.approx(1), "entropy/d8": 0,
                       "entropy/d8_real": 0}
    assert names(tmp_path) == [f"a/0000020_attn_{layer}.png" for layer in ("d8", "d8_real", "g16", "g8")]
    assert [len(images) for images, _ in G.asked + D.asked] == [4, 4, 4], "four images are shown"
    assert torch.equal(G.asked[0][1], torch.tensor(DEFAULT_QUERIES))


def test_without_attention_nothing_is_written(tmp_path):
    assert write_attention(Attending(), Attending(), record_in(tmp_path, raw=True)) == {} and names(tmp_path) == []
    assert attention_sheet(Attending(), Inputs(torch.zeros(1, 8)), torch.zeros(1, 3, 32, 32), None, 1) is None


def test_maps_are_written_as_numbers_where_they_are_wanted(tmp_path):
    write_attention(Attending("g8"), Attending("d8"), record_in(tmp_path, raw=True, queries=((0.25, 0.5),)))
    with np.load(tmp_path / "a" / "0000020_attn.npz") as kept:
        assert set(kept) == {"g8", "d8", "d8_real", "queries"} and kept["queries"].tolist() == [[0.25, 0.5]]
        assert kept["g8"].shape == (4, 1, 4, 4) and (kept["g8"] == 1 / 16).all() and kept["d8"].sum() == 4


def test_masks_and_reconstructions_have_their_sheets_and_figures(tmp_path):
    figures = write_masks(Masking(), Masking(), record_in(tmp_path, raw=True))
    assert figures == {f"{what}/{layer}": pytest.approx(0.5) for what in ("mask", "mask_range")
                       for layer in ("slae8", "d8")}
    assert names(tmp_path) == ["a/0000020_attn.npz", "a/0000020_attn_slae.png", "a/0000020_attn_slae_real.png",
                               "s/0000020_recon.png"]
    with np.load(tmp_path / "a" / "0000020_attn.npz") as kept:
        assert set(kept) == {"slae8", "d8", "d8_real"} and kept["slae8"].shape == (4, 1, 4, 4)


def test_a_video_frame_is_the_sheet_of_gs_largest_layer_for_the_asked_points():
    G, inputs, images = Attending("g8", "g16"), Inputs(torch.zeros(1, 8)), torch.zeros(1, 3, 32, 32)
    for queries in (((0.5, 0.5),), DEFAULT_QUERIES):
        maps = torch.full((1, len(queries), 4, 4), 1 / 16)
        expected = sheets.attention_sheet(images, maps, queries, "g16", 7, 0.5, 1.0)
        shown = attention_sheet(G, inputs, images, None if queries == DEFAULT_QUERIES else queries, 7)
        assert shown.tobytes() == expected.tobytes()


def test_a_video_frame_of_masks_has_a_column_for_each():
    inputs, images = Inputs(torch.zeros(1, 8)), torch.zeros(1, 3, 32, 32)
    masks = Masking().attention_maps(inputs.z)
    expected = sheets.mask_sheet(images, masks, "spatial attention", 7)
    assert mask_sheet(Masking(), inputs, images, None, 7).tobytes() == expected.tobytes()


def test_numbers_that_cannot_be_written_leave_the_old_ones(tmp_path, monkeypatch):
    save_raw({"g8": torch.arange(3)}, tmp_path / "a.npz")

    def fail(file, **arrays):
        file.write(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="No space left"):
        save_raw({"g8": torch.zeros(3)}, tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as kept:
        assert kept["g8"].tolist() == [0, 1, 2] and names(tmp_path) == ["a.npz"]
