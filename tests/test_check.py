"""Unusable and duplicate pictures are found before training, then listed, left out or refused; results are cached."""

import contextlib
import errno
import io
import json
import os
import random
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import data_config, encode, environment_of_two, fill, fill_lmdb, forks, gradient, take
from PIL import Image

from data_loader import build_dataset, describe, open_dataset, real_batches
from dataset import check, decode, images
from dataset.check import Check, Findings
from dataset.table import DATASETS
from device import distributed
from errors import DataError


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(check, "CHUNK", {"header": 1000, "full": 1000})    # in this process, so that tests can count
    return tmp_path


@pytest.fixture
def looked(monkeypatch):
    """A list of the pictures that were opened to be looked at; decoding opens them by another way."""
    names, open_one = [], images.Files.open

    def counted(self, index):
        names.append(os.path.basename(self.sources[index]))
        return open_one(self, index)

    monkeypatch.setattr(images.Files, "open", counted)
    return names


def noisy(seed=0, kind="PNG", size=60, **options) -> bytes:
    return encode(Image.fromarray(np.random.default_rng(seed).integers(0, 256, (size, size, 3), np.uint8)), kind,
                  **options)


def damaged() -> bytes:
    """A PNG with a sound head and end."""
    data = bytearray(noisy())
    data[len(data) // 2] ^= 255
    return bytes(data)


def opened(folder, **changes):
    """The data set as a training opens it, which then writes the lists."""
    config = data_config(folder, **{"check_data": "auto", **changes})
    found = DATASETS[config.dataset](config)
    dataset = open_dataset(config, found)
    check.write_lists(found, config)
    return dataset


def found(folder, level="full", **changes) -> Findings:
    dataset = images.Files(Path(folder), 16)
    check_of_it = Check(dataset, data_config(folder, check_data=level, **changes))
    findings = check_of_it.look()
    if level == "full" or level == "auto" and len(dataset) <= check.FULL:
        findings = check_of_it.decode(dataset)
    return findings


def rows(name) -> list[dict]:
    """What a list in the run's logs says."""
    return [json.loads(line) for line in Path("logs/test", f"{name}.jsonl").read_text().splitlines()]


def shown(dataset) -> list[str]:
    return [os.path.basename(path) for path in dataset.sources]


# ---- bad pictures ----

BAD = {"half.jpg": noisy(1, "JPEG")[:-300], "page.jpg": b"<html>quota exceeded</html>", "empty.png": b"",
       "half.png": noisy(2)[:-300], "movie.png": b"\0\0\0\x18ftypmp42"}


def spoil(folder, *names) -> Path:
    for name in names or BAD:
        (folder / name).write_bytes(BAD[name])
    return folder


@pytest.mark.parametrize(("level", "name"), [*(("header", name) for name in BAD), ("full", "half.png"),
                                             ("auto", "page.jpg")])
def test_a_few_bad_pictures_are_left_out_listed_and_said(home, capsys, level, name):
    folder = spoil(fill(home / "pictures", 12), name)
    dataset = opened(folder, check_data=level)
    assert len(dataset) == 12 and name not in shown(dataset)
    good = images.Files(fill(home / "good", 12), 16)
    assert torch.equal(dataset.load_batch(range(12)), good.load_batch(range(12)))
    assert describe(dataset, data_config(folder)) == f"folder: 12 usable of 13 pictures in {folder}"
    (row,) = rows("bad_images")
    path, reason = row["path"], row["reason"]
    assert path == str(folder / name) and reason and "delete or replace" not in reason
    out = capsys.readouterr().out
    assert "1 of 13 cannot be used" in out and f"{path}: {reason}" in out and "logs/test/bad_images.jsonl" in out


@pytest.mark.parametrize("level", ["header", "full"])
def test_many_bad_pictures_end_the_program_with_the_first_ten(home, level):
    folder = fill(home / "pictures", 20)
    for number in range(12):
        (folder / f"bad{number:02}.jpg").write_bytes(BAD["page.jpg"])
    with pytest.raises(DataError) as caught:
        opened(folder, check_data=level)
    text = str(caught.value)
    assert caught.value.code == 3 and text.startswith(f"12 of the 32 pictures in {folder} cannot be used")
    assert text.count("not a JPEG, PNG, WebP or any") == 10 and "bad09.jpg" in text and "bad10.jpg" not in text
    assert "and 2 more" in text and "Delete or replace them" in text
    assert len(rows("bad_images")) == 12
    (folder / "bad00.jpg").unlink(), (folder / "bad11.jpg").unlink()
    with pytest.raises(DataError, match="10 of the 30 pictures") as caught:
        opened(folder, check_data=level)
    assert "bad10.jpg" in str(caught.value) and "more" not in str(caught.value)


def test_the_list_holds_names_of_any_bytes(home):
    folder = os.fsencode(fill(home / "pictures", 4))
    names = [folder + name for name in (b"/caf\xe9.jpg", b"/tab\t.jpg", b"/two\nlines.jpg")]
    for name in names:
        with open(name, "wb") as file:
            file.write(BAD["page.jpg"])
    with pytest.raises(DataError) as caught:
        opened("pictures")
    assert [os.fsencode(row["path"]) for row in rows("bad_images")] == names
    text = str(caught.value)
    text.encode("ascii")
    for shown in (r"pictures/caf\xe9.jpg: ", r"pictures/tab\t.jpg: ", r"pictures/two\nlines.jpg: "):
        assert f"\n  {shown}" in text


@pytest.mark.parametrize(("good", "bad", "accepted"), [(3, 1, True), (8, 2, False), (198, 2, True), (197, 2, False)])
def test_one_picture_or_one_percent_is_the_limit(home, good, bad, accepted):
    folder = fill(home / "pictures", good)
    for number in range(bad):
        (folder / f"bad{number}.png").write_bytes(b"")
    if accepted:
        assert len(opened(folder)) == good
    else:
        with pytest.raises(DataError, match="only one, or up to 1%, of the pictures would be skipped"):
            opened(folder)


def test_full_finds_what_header_cannot(home):
    folder = fill(home / "pictures", 100)
    (folder / "damaged.png").write_bytes(damaged())
    assert not found(folder, "header").bad
    assert list(found(folder, "full").bad) == [100]
    assert found(folder, "header").bad, "what is known is not forgotten"


def test_auto_decodes_small_sets_and_looks_at_the_ends_of_large_ones(home, monkeypatch):
    folder = fill(home / "pictures", 100)
    (folder / "damaged.png").write_bytes(damaged())
    monkeypatch.setattr(check, "FULL", 100)
    assert not found(folder, "auto").bad
    monkeypatch.setattr(check, "FULL", 101)
    assert found(folder, "auto").bad


def test_off_leaves_nothing_out_and_looks_at_some_for_their_range_only(home, looked, monkeypatch):
    monkeypatch.setattr(check, "SAMPLE", 3)
    folder = spoil(fill(home / "pictures", 3))
    assert len(opened(folder, check_data="off")) == 8 and len(looked) == 3 and not Path("cache").exists()


def test_the_list_goes_when_the_pictures_are_mended(home):
    folder = fill(home / "pictures", 12)
    shutil.copy(folder / "000.png", folder / "copy.png")
    spoil(folder, "page.jpg")
    opened(folder)
    assert sorted(os.listdir("logs/test")) == ["bad_images.jsonl", "duplicates.jsonl"]
    (folder / "page.jpg").unlink()
    (folder / "copy.png").unlink()
    assert len(opened(folder)) == 12 and not os.listdir("logs/test")


@pytest.mark.parametrize("changes", [dict(dry_run=True), dict(mode="evaluate")])
def test_a_dry_run_and_an_evaluation_say_it_and_list_nothing(home, capsys, changes):
    folder = fill(home / "pictures", 12)
    shutil.copy(folder / "000.png", folder / "copy.png")
    assert len(opened(spoil(folder, "half.jpg"), **changes)) == 13
    out = capsys.readouterr().out
    assert "1 of 14 cannot be used" in out and "half.jpg" in out
    assert f"1 is a copy of others (byte-identical), such as {folder / 'copy.png'} of {folder / '000.png'};" in out
    assert not Path("logs").exists() and Path("cache").exists() == ("dry_run" not in changes)


def test_a_picture_in_an_lmdb_is_named_by_its_key(home, monkeypatch):
    import lmdb

    monkeypatch.setattr(check, "SHARE", 1)
    folder = fill_lmdb(home / "cats_lmdb", 12)
    with lmdb.open(str(folder)) as database, database.begin(write=True) as transaction:
        transaction.put(b"00000007", BAD["half.jpg"])
        transaction.put(b"caf\xe9", BAD["page.jpg"])
    for level in ("header", "full"):
        dataset = opened(home, dataset="lsun", check_data=level)
        assert len(dataset) == 11
        assert torch.equal(dataset[7], decode.decode(encode(gradient(seed=8), "PNG"), "", 16))
        first, second = rows("bad_images")
        assert first["lmdb"] == second["lmdb"] == str(folder) and first["key"] == "00000007"
        assert second["key"].encode(errors="surrogateescape") == b"caf\xe9"


@pytest.mark.parametrize("level", ["header", "full"])
def test_pictures_smaller_than_half_of_imsize_are_counted(home, capsys, monkeypatch, level):
    monkeypatch.setattr(check, "SHARE", 1)
    folder = spoil(fill(home / "pictures", 5), "page.jpg")  # 40 x 30
    gradient((200, 31)).save(folder / "band.png")
    for imsize, count in ((16, 0), (60, 0), (62, 5), (63, 6)):
        opened(folder, imsize=imsize, check_data=level)
        out = capsys.readouterr().out
        assert (f"{count} of 7 are smaller than half of --imsize {imsize}" in out) == (count > 0)
        assert ("smaller than half" in out) == (count > 0)


def test_scans_over_the_limit_count_as_unusable_and_are_good_again_without_it(home, capsys):
    folder = fill(home / "pictures", 10)
    gradient((300, 200)).save(folder / "scan.png")
    gradient((300, 200)).save(folder / "scan.jpg")
    for _ in range(2):
        assert len(opened(folder, max_pixels=20_000)) == 11
        assert rows("bad_images")[0]["damaged"] is False
        assert "scan.png: it has more than 20,000 pixels; --max_pixels 0 lifts this limit" in capsys.readouterr().out
    for limit, good in ((0, 12), (60_000, 12), (20_000, 11)):
        assert len(opened(folder, max_pixels=limit)) == good, "also after a check under another limit"


def test_what_cannot_be_damaged_needs_no_look(home, monkeypatch):
    monkeypatch.setattr(check, "Check", lambda *_: pytest.fail("faces drawn by code were checked"))
    assert len(opened(home, dataset="toy")) == 4096 and not Path("cache").exists()


def test_bad_pictures_are_left_out_before_any_are_held_out(home):
    folder = spoil(fill(home / "pictures", 120), "page.jpg")
    dataset = build_dataset(data_config(folder, check_data="auto", holdout=0.1))
    assert len(dataset) == 108 and dataset.summary == f"108 trained on of 120 usable of 121 pictures in {folder}"


# ---- what is remembered ----


@pytest.mark.parametrize("level", ["header", "full"])
def test_only_new_and_changed_pictures_are_looked_at_again(home, looked, level):
    folder = fill(home / "pictures", 20)
    assert not found(folder, level).bad and len(looked) == 20
    del looked[:]
    assert not found(folder, level).bad and not looked
    gradient(seed=99).save(folder / "a new one.png")
    (folder / "003.png").write_bytes(b"")
    assert list(found(folder, level).bad) == [3]
    assert sorted(looked) == ["003.png", "a new one.png"]
    del looked[:]
    assert list(found(folder, level).bad) == [3] and not looked, "bad ones are remembered, too"
    gradient(seed=3).save(folder / "003.png")
    assert not found(folder, level).bad and looked == ["003.png"]
    del looked[:]
    (folder / "000.png").unlink()
    assert not found(folder, level).bad and not looked
    for name in ("010.png", "001.png"):
        (folder / name).write_bytes(b"")
        bad = [shown(images.Files(folder, 16))[picture] for picture in found(folder, level).bad]
    assert bad == ["001.png", "010.png"], "new ones in their places among those that are known"


def test_full_decodes_what_header_saw_and_not_the_other_way_round(home, looked, monkeypatch):
    reads, read = [], images.read_picture
    monkeypatch.setattr(images, "read_picture", lambda *more: [reads.append(more[0]), read(*more)][1])
    folder = spoil(fill(home / "pictures", 5), "half.jpg", "page.jpg")
    bad = found(folder, "header").bad
    assert list(bad) == [5, 6] and bad[5] != bad[6]
    for level, decoded in (("header", 0), ("full", 5), ("header", 5), ("full", 5)):
        assert found(folder, level).bad == bad
        assert len(looked) == 7 and len(reads) == decoded, "what is bad needs no second look"


def cut(path):
    path.write_bytes(path.read_bytes()[:-50])


def changed(**values):
    """An index as another program might write it; without what is None."""
    def change(path):
        kept = {**torch.load(path, weights_only=True), **values}
        torch.save({name: value for name, value in kept.items() if value is not None}, path)

    return change


@pytest.mark.parametrize("damage", [cut, changed(reasons=None), changed(level=torch.zeros(4))],
                         ids=["cut", "no-reasons", "short-column"])
def test_a_damaged_index_costs_another_look_only(home, looked, capsys, damage):
    folder = fill(home / "pictures", 5)
    found(folder)
    (index,) = Path("cache/index").iterdir()
    damage(index)
    assert not found(folder).bad and len(looked) == 10
    assert "recomputing it" in capsys.readouterr().out


def test_another_way_to_decode_needs_another_look(home, looked, monkeypatch):
    folder = fill(home / "pictures", 5)
    for count in (5, 5, 10):
        monkeypatch.setattr(decode, "CACHE_VERSION", 1 + count // 10)
        assert not found(folder).bad and len(looked) == count


def test_each_folder_is_remembered_by_itself_whatever_it_is_called(home, looked, monkeypatch):
    first, second = fill(home / "a/pictures", 5), fill(home / "b/pictures", 3)
    found(first), found(second)
    assert len(looked) == 8
    found(first), found("a/pictures"), found(second)
    monkeypatch.chdir(home / "b")
    found("pictures", cache_path="../cache")
    assert len(looked) == 8


def test_no_picture_of_which_all_is_known_is_opened(home, looked):
    folder = fill(home / "pictures", 4)
    shutil.copy(folder / "001.png", folder / "copy.png")
    for number, centre in enumerate((1, 2, 2)):
        large_bmp(folder / f"{number}.bmp", centre)
    assert found(folder, "header").copies == [[2, 7], [5, 6]]
    large = ["0.bmp", "1.bmp", "2.bmp"]
    assert sorted(looked) == sorted([*os.listdir(folder), *large]), "large ones are compared whole"
    del looked[:]
    assert found(folder, "header").copies == [[2, 7], [5, 6]] and not looked


def refuse(*_, **__):
    raise OSError(errno.EIO, "Input/output error")


class Refusing(io.BytesIO):
    """Of its reads only the first `good` ones succeed."""

    def __init__(self, data=b"", good=0):
        super().__init__(data)
        self.good = good

    def read(self, *size):
        self.good -= 1
        return super().read(*size) if self.good >= 0 else refuse()


@pytest.mark.parametrize("level", ["header", "full"])
@pytest.mark.parametrize("at", ["open", 0, 1, 3])       # 1: the digest was read; 3: and the first bytes, twice
def test_what_the_disk_refused_is_tried_again(home, monkeypatch, looked, level, at):
    folder = fill(home / "pictures", 5)
    path = str(folder / "002.png")

    def refused(name, *more, **options):
        if name == path:
            return refuse() if at == "open" else Refusing(Path(path).read_bytes(), at)
        return open(name, *more, **options)

    with monkeypatch.context() as broken:
        broken.setattr(images, "open", refused, raising=False)
        (bad,) = found(folder, level).bad.items()
    assert bad == (2, f"cannot read {path}: Input/output error" if at == "open" else "[Errno 5] Input/output error")
    del looked[:]
    assert not found(folder, level).bad and looked == ["002.png"]
    del looked[:]
    assert not found(folder, level).bad and not looked


def test_a_header_that_leads_out_of_the_file_is_damage_and_no_refusal_of_the_disk(home):
    folder = fill(home / "pictures", 1)
    (folder / "far.tif").write_bytes(b"II+\0\x08\0\0\0" + (2**62).to_bytes(8, "little") + bytes(40))
    findings = found(folder)
    assert "Invalid argument" in findings.bad[1] and not findings.intact


def test_a_disk_that_refuses_everything_spoils_no_index(home, monkeypatch):
    folder = fill(home / "pictures", 5)
    with monkeypatch.context() as broken:
        broken.setattr(images, "open", refuse, raising=False)
        assert len(found(folder).bad) == len(found(folder).bad) == 5
    assert not found(folder).bad


def test_a_picture_that_cannot_be_read_whole_is_tried_again(home, monkeypatch, looked):
    folder = fill(home / "pictures", 5)
    path, read = folder / "002.png", Path.read_bytes
    with monkeypatch.context() as broken:
        broken.setattr(Path, "read_bytes", lambda self: refuse() if self == path else read(self))
        assert found(folder).bad == {2: f"cannot read {path}: Input/output error"}
    del looked[:]
    assert not found(folder).bad and looked == ["002.png"]


def test_other_processes_leave_out_what_the_first_found(home, monkeypatch, looked):
    folder = fill(home / "pictures", 120)
    monkeypatch.setattr(check, "on_first", lambda compute: Findings({3: "it is torn"}, []))
    dataset = opened(folder)
    assert len(dataset) == 119 and "003.png" not in shown(dataset) and not looked


def test_a_full_check_fills_the_decoded_cache(home, monkeypatch):
    folder = spoil(fill(home / "pictures", 120), "page.jpg")
    dataset = opened(folder, cache="auto")
    assert dataset.is_decoded() and not dataset.whole.is_decoded(), "the bad one's place stays empty"
    other = opened(folder, cache="auto", check_data="header", imsize=32)
    assert not other.is_decoded() and len(other) == 120


def test_checking_leaves_random_states_alone(home, monkeypatch):
    monkeypatch.setattr(check, "CHUNK", {"header": 2, "full": 2})

    def states():
        return torch.get_rng_state().tolist(), random.getstate(), str(np.random.get_state())

    before = states()
    opened(fill(home / "pictures", 8))
    assert states() == before


# ---- copies ----


@pytest.mark.parametrize("level", ["header", "full"])
def test_copies_are_listed_in_groups(home, capsys, level):
    folder = fill(home / "pictures", 10)
    (folder / "more").mkdir()
    for name, source in (("a.png", "003.png"), ("more/b.png", "003.png"), ("more/c.png", "007.png")):
        shutil.copy(folder / source, folder / name)
    for _ in range(2):
        dataset = opened(folder, check_data=level)
        assert len(dataset) == 13, "they are trained on all the same"
        pairs = [tuple(os.path.relpath(entry["path"], folder) for entry in (row["copy_of"], row))
                 for row in rows("duplicates")]
        assert pairs == [("003.png", "a.png"), ("003.png", "more/b.png"), ("007.png", "more/c.png")]
        out = capsys.readouterr().out
        assert "3 are copies of others" in out and "logs/test/duplicates.jsonl" in out


def large_bmp(path, centre, side=200, row=100):
    image = np.zeros((side, side, 3), np.uint8)             # 120 KB: ends that are equal, as white margins are
    image[row, side // 2] = centre
    Image.fromarray(image).save(path)


@pytest.mark.parametrize(("side", "row"), [(200, 100), (130, 6)], ids=["120 KB", "50 KB"])
def test_files_that_differ_far_from_their_beginning_are_no_copies(home, side, row):
    folder = home / "pictures"
    folder.mkdir()
    for number, centre in enumerate((1, 2, 2)):
        large_bmp(folder / f"{number}.bmp", centre, side, row)
    for _ in range(2):
        assert found(folder, "header").copies == [[1, 2]]
    os.utime(folder / "1.bmp", ns=(10**18, 10**18))
    assert found(folder, "header").copies == [[1, 2]], "also of one read whole and one looked at anew"


def test_bad_pictures_are_no_copies_of_each_other(home):
    folder = fill(home / "pictures", 4)
    for name in ("x.png", "y.png"):
        (folder / name).write_bytes(b"")
    assert found(folder).copies == [] and len(found(folder).bad) == 2


# ---- the command ----


def many(home):
    folder = spoil(fill(home / "pictures", 30), "half.jpg")
    shutil.copy(folder / "001.png", folder / "copy.png")
    return folder


FLAGS = ("--dataset", "folder", "--image_path", "pictures", "--batch_size", 4, "--total_step", 2, "--cache", "on",
         "--g_attn", "none")


def test_the_command_trains_on_the_rest_and_the_next_start_checks_none_again(home, run, looked):
    many(home)
    code, out, _ = run(*FLAGS, "--version", "a")
    assert code == 0 and "1 of 32 cannot be used" in out and "1 is a copy" in out
    assert Path("logs/a/bad_images.jsonl").exists() and Path("logs/a/duplicates.jsonl").exists()
    assert {*looked} >= {"half.jpg", "copy.png", "000.png"}
    del looked[:]
    code, out, _ = run(*FLAGS, "--version", "b", "--num_workers", 2)
    assert code == 0 and "31 of 32 pictures in pictures/.decoded" in out
    assert "1 of 32 cannot be used" in out and not looked, "nothing is opened again"
    first, second = (torch.load(f"models/{version}/0000002.pth", weights_only=True)["G"] for version in ("a", "b"))
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_number_of_pictures_is_said_at_every_start(home, run):
    fill(home / "pictures", 8)
    (home / "pictures/film.mp4").touch()
    for steps in (1, 2):                                    # the second resumes
        code, out, _ = run(*FLAGS, "--total_step", steps, "--version", "a")
        assert code == 0 and out.count("data: folder: 8 pictures in pictures\n") == 1
        assert out.count("1 file ignored: 1 .mp4\n") == 1
    assert run(*FLAGS, "--dry_run")[1].count("data: folder: 8 pictures in pictures\n") == 1


def test_the_command_ends_with_3_where_too_many_are_bad(home, run):
    spoil(fill(home / "pictures", 20))
    code, out, err = run(*FLAGS, "--version", "a")
    assert code == 3 and "5 of the 25 pictures" in err and "Traceback" not in err
    assert not Path("models").exists()


def test_a_dry_run_tells_it_all_and_writes_nothing(home, run):
    many(home)
    before = sorted(home.rglob("*"))
    code, out, err = run(*FLAGS, "--dry_run")
    assert code == 0 and sorted(home.rglob("*")) == before
    for words in ("31 usable of 32 pictures in pictures", "half.jpg: ", "1 is a copy of others",
                  "would be written to pictures/.decoded"):
        assert words in out


def test_two_processes_check_once_and_share_every_batch(home, looked):
    folder, environment = many(home), environment_of_two()
    config = data_config(folder, check_data="auto", cache="on", hflip=True)

    def rank(number):
        os.environ.update(environment, RANK=str(number), LOCAL_RANK=str(number))
        with contextlib.redirect_stdout(io.StringIO()) as out:
            place = distributed.start(SimpleNamespace(device="cpu"))
            batches = real_batches(config, build_dataset(config), 0, "cpu", place.rank, place.world_size)
            images = take(batches, 16).view(16, 2, 3, 16, 16).numpy()               # two epochs
            distributed.stop()
        return out.getvalue(), len(looked), images

    (out, first_looked, first), (other_out, other_looked, second) = forks(rank, 2)
    assert out.count("1 of 32 cannot be used") == 1 and out.count("decoded cache") == 1 and not other_out
    assert (first_looked, other_looked) == (32 + check.SHAPES, 0), "each for damage, some for their shape"
    assert len(list(Path("pictures/.decoded").iterdir())) == 1
    alone = take(real_batches(config, build_dataset(config), 0, "cpu"), 16).view(16, 4, 3, 16, 16)
    assert np.array_equal(np.concatenate([first, second], 1), alone)
