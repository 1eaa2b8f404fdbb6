"""The toy faces: reproducible, the same person at every size, with long-range dependencies across the face."""

import os
import subprocess
import sys
import zlib
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from dataset.table import open_toy
from dataset.toy import BACKDROPS, HAIRS, IRISES, SKINS, draw_face, face_traits

ROOT = Path(__file__).resolve().parent.parent
BIG = 256


def pixels_of(picture, colour):
    return (picture == np.array(colour)).all(axis=2)


def axis_of(face):
    """The column of the face's middle in a picture of BIG pixels."""
    return BIG * (500 + face.shift[0]) / 1000


def band(face, top, bottom):
    """The rows between two heights in head units, in a picture of BIG pixels."""
    def row(y):
        return round(BIG * (510 + (y - 510) * face.scale + face.shift[1]) / 1000)

    return slice(row(top), row(bottom))


@pytest.mark.parametrize("imsize", [16, 32, 64, 100, 256])
def test_a_face_is_a_writeable_square_of_bytes(imsize):
    picture = draw_face(3, imsize)
    assert picture.shape == (imsize, imsize, 3)
    assert picture.dtype == np.uint8
    assert picture.flags.writeable


def test_another_process_draws_the_same_bytes():
    program = ("import zlib; from dataset.toy import draw_face;"
               "print([zlib.crc32(draw_face(i, s).tobytes()) for i in (0, 7, 2**40) for s in (32, 64, 256)])")
    environment = {**os.environ, "PYTHONHASHSEED": "77"}
    here = [zlib.crc32(draw_face(i, s).tobytes()) for i in (0, 7, 2**40) for s in (32, 64, 256)]
    answer = subprocess.run([sys.executable, "-c", program], cwd=ROOT, env=environment, check=True,
                            capture_output=True, text=True).stdout.strip()
    assert answer == str(here)


def test_drawing_leaves_the_global_random_state_alone_and_ignores_it():
    np.random.seed(1)
    before = np.random.get_state()[1].copy()
    first = draw_face(5, 32)
    assert (np.random.get_state()[1] == before).all()
    np.random.seed(2)
    assert (draw_face(5, 32) == first).all()


def test_index_may_be_a_numpy_integer():
    assert face_traits(np.int64(12)) == face_traits(12)


@pytest.mark.parametrize("index, imsize, error",
                         [(0, 8, ValueError), (-1, 32, ValueError), (1.5, 32, TypeError)])
def test_senseless_arguments_raise(index, imsize, error):
    with pytest.raises(error):
        draw_face(index, imsize)


@pytest.mark.parametrize("small", [32, 128])
def test_one_index_is_one_person_at_every_size(small):
    fold = BIG // small
    blocks = (small, fold, small, fold, 3)
    shrunk = np.stack([draw_face(i, BIG).reshape(blocks).mean(axis=(1, 3)) for i in range(12)])
    drawn = np.stack([draw_face(i, small) for i in range(12)]).astype(float)
    distances = np.abs(shrunk[:, None] - drawn[None]).mean(axis=(2, 3, 4))
    assert distances.diagonal().max() < 5  # of 255
    strangers = distances[~np.eye(12, dtype=bool)]
    assert strangers.min() > 4 * distances.diagonal().max()


def test_both_eyes_have_one_iris_colour_and_look_the_same_way():
    for index in range(20):
        face = face_traits(index)
        rows = draw_face(index, BIG)[band(face, 440, 580)]
        middle = round(axis_of(face))
        for colour in set(IRISES):
            shown = pixels_of(rows, colour)
            left, right = shown[:, :middle].sum(), shown[:, middle:].sum()
            if colour != face.iris:
                assert left == right == 0, f"face {index} has a stray iris colour"
                continue
            assert left > 100 and abs(left - right) < 0.15 * left, f"face {index}: {left} and {right} pixels"
            columns = np.nonzero(shown)[1]
            apart = columns[columns >= middle].mean() - columns[columns < middle].mean()
            expected = 2 * face.spacing / 1000 * BIG * face.scale * face.width
            assert apart == pytest.approx(expected, abs=1.5), f"the pupils of face {index} look apart"


def test_lenses_are_equal_and_only_where_traits_say_so():
    seen = set()
    for index in range(40):
        face = face_traits(index)
        seen.add(face.glasses)
        rims = pixels_of(draw_face(index, BIG)[band(face, 520, 620)], face.frame)
        middle, reach = round(axis_of(face)), round(0.22 * BIG)
        left, right = rims[:, middle - reach:middle][:, ::-1], rims[:, middle:middle + reach]
        if face.glasses == "none":
            assert not rims.any()
            continue
        assert left.sum() > 200
        assert (left & right).sum() > 0.7 * (left | right).sum(), f"the lenses of face {index} differ"
    assert seen == {"none", "round", "square"}


def test_eyebrows_mirror_each_other_in_the_colour_of_the_hair():
    bald = [i for i in range(600) if face_traits(i).style == "bald" and face_traits(i).glasses == "none"]
    assert len(bald) > 5
    for index in bald:
        face = face_traits(index)
        rows = draw_face(index, BIG)[band(face, 375, 425)].astype(int)
        middle = round(axis_of(face))
        reach = round(0.2 * BIG)
        tones, shapes = [], []
        for half in (rows[:, middle - reach:middle][:, ::-1], rows[:, middle:middle + reach]):
            brow = np.abs(half - np.array(face.skin)).sum(axis=2) > 30
            tones.append(half[brow].mean(axis=0))
            shapes.append(brow)
        assert np.abs(tones[0] - tones[1]).max() < 8
        assert np.abs(tones[0] - face.hair).sum() < np.abs(tones[0] - face.skin).sum()
        assert (shapes[0] & shapes[1]).sum() > 0.8 * (shapes[0] | shapes[1]).sum(), f"face {index}"


def test_the_crowd_is_varied():
    crowd = [face_traits(i) for i in range(200)]
    glasses = sum(face.glasses != "none" for face in crowd) / len(crowd)
    assert 0.25 < glasses < 0.45
    assert len({face.skin for face in crowd}) == len(SKINS)
    assert len({face.hair for face in crowd}) >= len(set(HAIRS)) - 3
    assert len({face.backdrop for face in crowd}) == len(BACKDROPS)
    assert len({face.iris for face in crowd}) == len(set(IRISES))
    assert len({face.style for face in crowd}) == 10
    assert {face.mouth for face in crowd} == {"smile", "open", "grin", "lips", "neutral"}
    assert len({draw_face(i, 32).tobytes() for i in range(200)}) == 200


def test_classes_are_what_a_face_wears_and_all_are_frequent():
    labels = open_toy(SimpleNamespace(imsize=32)).labels
    assert labels.names == ("glasses", "beard", "curls", "hair up", "long hair", "bob", "short hair")
    assert labels.counts.min() >= 0.08 * 4096 and labels.counts.sum() == 4096
    worn = {"glasses": lambda face: face.glasses != "none", "beard": lambda face: face.beard}
    hair = {"curls": {"afro", "curly"}, "hair up": {"bun", "buns"}, "long hair": {"long"}, "bob": {"bob"},
            "short hair": {"short", "quiff", "buzz", "bald"}}
    for index, number in enumerate(labels.numbers):
        face, name = face_traits(index), labels.names[number]
        assert all(applies(face) == (name == thing) for thing, applies in worn.items()
                   if thing != "beard" or name != "glasses"), f"face {index} is no {name}"
        assert name in worn or face.style in hair[name], f"face {index} is no {name}"


def test_a_face_stands_out_from_its_surroundings():
    def apart(a, b):
        return sum(abs(p - q) for p, q in zip(a, b, strict=True))

    for index in range(400):
        face = face_traits(index)
        assert apart(face.skin, face.hair) >= 75
        assert min(apart(face.backdrop, face.skin), apart(face.backdrop, face.hair)) >= 75
        assert apart(face.frame, face.skin) >= 110


def test_features_sit_in_the_same_place_in_every_picture():
    """A small network learns aligned faces in minutes: eyes stay within a few percent of one spot."""
    places = []
    for index in range(20):
        picture = draw_face(index, BIG)
        places.append([axis.mean() / BIG for axis in np.nonzero(pixels_of(picture, face_traits(index).iris))])
    heights, middles = np.array(places).T
    assert np.ptp(heights) < 0.06 and np.ptp(middles) < 0.08
