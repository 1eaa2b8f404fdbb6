"""`--mode clean_data` deletes what the last check found damaged, and nothing else."""

import errno
import json
import os
import shutil
import sys
from pathlib import Path

import pytest
from conftest import encode, fill, fill_lmdb, forks, gradient

from dataset import images
from storage.folders import FolderLock

DATA = ("--dataset", "folder", "--image_path", "pictures", "--version", "a")
TRAIN = (*DATA, "--total_step", 1, "--cache", "off")
CLEAN = (*DATA, "--mode", "clean_data")
ODD = b"pictures/new\nline \xe9.jpg"


@pytest.fixture
def folder(tmp_path):
    return fill(tmp_path / "pictures", 6)


def files(place="pictures") -> set:
    return {os.path.join(parent, name) for parent, _, names in os.walk(os.fsencode(place)) for name in names}


def spoil(run):
    """A set with five damaged pictures, checked by a run that ends with 3."""
    for name in ("half.png", "page.jpg", "empty.png"):
        Path("pictures", name).write_bytes(encode(gradient((90, 90)), "PNG")[:-30] if name == "half.png" else
                                           b"<html>" if name == "page.jpg" else b"")
    Path("pictures/deep").mkdir()
    Path("pictures/deep/page.gif").write_bytes(b"<html>")
    Path(os.fsdecode(ODD)).write_bytes(b"<html>")
    code, _, err = run(*TRAIN)
    assert code == 3 and "--mode clean_data" in err
    return {b"pictures/half.png", b"pictures/page.jpg", b"pictures/empty.png", b"pictures/deep/page.gif", ODD}


def test_exactly_the_damaged_ones_are_listed_and_deleted(folder, run):
    os.symlink("nowhere.jpg", folder / "dangling.jpg")
    (folder / "line ").write_text("a neighbour of a name that is split at its newline")
    (folder / "kind.jpg").write_bytes(b"\xff\x0a" + bytes(50))       # a JPEG XL, which cannot be read
    bad = spoil(run)
    before = files()
    code, out, err = run(*CLEAN)
    assert code == 2 and "5 files would be deleted; add --yes true" in err and files() == before
    assert out.count("to delete: ") == 5 and r"new\nline \xe9.jpg" in out and "dangling" not in out
    code, out, err = run(*CLEAN, "--dry_run")
    assert code == 0 and "5 files would be deleted" in out and files() == before
    code, out, err = run(*CLEAN, "--yes", "true")
    assert code == 0 and "5 files deleted" in out and files() == before - bad
    left = Path("logs/a/bad_images.jsonl").read_text().splitlines()
    assert len(left) == 2 and "kind.jpg" in left[0] and "dangling.jpg" in left[1], "are on the list, and stay"
    code, out, err = run(*CLEAN, "--yes", "true")
    assert code == 0 and "nothing to delete" in out and files() == before - bad
    assert run(*TRAIN)[0] == 0


def test_the_user_is_asked_at_a_terminal(folder, run, monkeypatch):
    bad, before = spoil(run), files()
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    asked = []
    for answer, left in (("", before), ("n", before), ("yes please", before), ("y", before - bad)):
        monkeypatch.setattr("builtins.input", lambda question, answer=answer: [asked.append(question), answer][1])
        code, out, _ = run(*CLEAN)
        assert code == 0 and files() == left and ("nothing was deleted" in out) == (left == before)
    assert len(asked) == 4 and "5 files" in asked[0] and "pictures" in asked[0]


def replace(folder):
    (folder / "page.jpg").unlink()
    gradient().save(folder / "page.jpg")


def link_out(folder):
    (folder / "page.jpg").unlink()
    (folder / "page.jpg").symlink_to(folder.parent / "precious.jpg")


def link_folder_out(folder):
    shutil.move(folder / "deep", folder.parent / "elsewhere")
    (folder / "deep").symlink_to(folder.parent / "elsewhere", target_is_directory=True)


@pytest.mark.parametrize(("change", "kept", "why"), [
    (replace, "pictures/page.jpg", "has changed since the check"),
    (link_out, "pictures/page.jpg", "is not a plain file"),
    (link_folder_out, "elsewhere/page.gif", "is not in "),
    (lambda folder: (folder / "page.jpg").unlink(), None, "is gone"),
])
def test_what_is_no_longer_what_was_checked_stays(folder, run, change, kept, why):
    spoil(run)
    gradient().save("precious.jpg")
    change(folder)
    code, out, _ = run(*CLEAN, "--yes", "true")
    assert code == 0 and "4 files deleted" in out and out.count("stays: ") == 1 and why in out
    assert Path("precious.jpg").exists() and (kept is None or Path(kept).exists())


def test_a_change_between_the_question_and_the_answer_is_noticed(folder, run, monkeypatch):
    spoil(run)
    monkeypatch.setattr(sys.stdin, "isatty", lambda: True, raising=False)
    monkeypatch.setattr("builtins.input", lambda question: [replace(folder), "y"][1])
    code, out, _ = run(*CLEAN)
    assert code == 0 and "4 files deleted" in out and (folder / "page.jpg").exists()


def test_another_folder_loses_nothing(folder, run):
    spoil(run)
    fill(folder.parent / "others", 6)
    before = files() | files("others")
    code, out, _ = run(*CLEAN, "--yes", "true", "--image_path", "others")
    assert code == 0 and "nothing to delete" in out and out.count("is not in ") == 5
    assert files() | files("others") == before


def test_copies_are_deleted_only_if_asked_for_and_never_the_first(folder, run):
    (folder / "more").mkdir()
    for name, source in (("a.png", "003.png"), ("more/b.png", "003.png"), ("c.png", "004.png"), ("e.png", "005.png")):
        shutil.copy(folder / source, folder / name)
    os.symlink(folder / "zz.png", folder / "d.png")
    gradient(seed=77).save(folder / "zz.png")
    assert run(*TRAIN)[0] == 0
    gradient(seed=4).save(folder / "004.png", compress_level=1)     # the first has changed: its copy is not one now
    data = (folder / "005.png").read_bytes()
    stamp = (folder / "005.png").stat().st_mtime_ns
    (folder / "005.png").write_bytes(data[:-1] + b"x")              # of the same size and time
    os.utime(folder / "005.png", ns=(stamp, stamp))
    before = files()
    code, out, _ = run(*CLEAN, "--yes", "true")
    assert code == 0 and files() == before and "nothing to delete" in out
    code, out, _ = run(*CLEAN, "--yes", "true", "--clean_copies", "true")
    assert code == 0 and before - files() == {b"pictures/a.png", b"pictures/more/b.png"} and "2 files deleted" in out
    assert "zz.png the first of its copies" in out and "c.png the first of its copies" in out
    assert "e.png is no longer a copy of" in out


def test_what_the_disk_refuses_ends_with_5_after_the_others(folder, run, monkeypatch):
    spoil(run)
    unlink = os.unlink

    def refuse(path, **more):
        if str(path).endswith("page.jpg"):
            raise PermissionError(13, "Permission denied", str(path))
        unlink(path, **more)

    monkeypatch.setattr(os, "unlink", refuse)
    code, out, err = run(*CLEAN, "--yes", "true")
    assert code == 5 and "4 files deleted" in out and "page.jpg (Permission denied)" in err
    assert "page.jpg" in Path("logs/a/bad_images.jsonl").read_text()


def test_scans_over_the_limit_and_read_errors_are_no_damage(folder, run, monkeypatch):
    """Of one file the disk refuses the header, of another the whole; without the errors both are good again."""
    def refuse(name, read):
        def reading(path, *words, **more):
            if str(path).endswith(name):
                raise OSError(errno.EIO, "Input/output error", str(path))
            return read(path, *words, **more)

        return reading

    gradient((300, 200)).save(folder / "scan.png")
    before = files()
    with monkeypatch.context() as disk:
        disk.setattr(images, "open", refuse("000.png", open), raising=False)
        disk.setattr(Path, "read_bytes", refuse("001.png", Path.read_bytes))
        code, _, err = run(*TRAIN, "--max_pixels", 50_000)
    assert code == 3 and "3 of the 7 pictures" in err and err.count("Input/output error") == 2
    rows = [json.loads(line) for line in Path("logs/a/bad_images.jsonl").read_text().splitlines()]
    assert [(Path(row["path"]).name, row["damaged"]) for row in rows] == [
        ("000.png", False), ("001.png", False), ("scan.png", False)]
    code, out, _ = run(*CLEAN, "--yes", "true")
    assert code == 0 and "nothing to delete" in out and files() == before
    code, out, _ = run(*TRAIN, "--max_pixels", 50_000)
    assert code == 0 and "1 of 7 cannot be used and are skipped" in out


def test_other_data_sets_a_missing_list_and_a_damaged_one(folder, run):
    fill_lmdb(Path("cats_lmdb"), 4)
    for dataset, *flags in (("lsun", "--image_path", "."), ("toy",), ("cifar10", "--image_path", ".")):
        code, _, err = run("--mode", "clean_data", "--dataset", dataset, *flags)
        assert code == 2 and "--mode clean_data" in err
    code, out, _ = run(*CLEAN, "--yes", "true")
    assert code == 0 and "nothing to delete" in out
    Path("logs/a").mkdir(parents=True)
    for text in ("not json\n", "[1]\n"):
        Path("logs/a/bad_images.jsonl").write_text(text)
        code, _, err = run(*CLEAN, "--yes", "true")
        assert code == 3 and "bad_images.jsonl" in err and len(files()) == 6


def test_not_while_the_run_trains(folder, run):
    spoil(run)
    Path("models/a").mkdir(parents=True, exist_ok=True)
    lock = FolderLock([Path("models/a")], "--version a")

    def other(_):                                   # the lock is the process's own
        return run(*CLEAN, "--yes", "true")[0]

    before = files()
    assert forks(other, 1) == [6] and files() == before
    lock.close()
