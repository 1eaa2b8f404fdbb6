"""Bad pictures, checkpoints, logs and command lines: a good run, or three lines at most and an exit code that says why.

One test is one try. No good checkpoint is lost by it.
"""

import os
import random
import re
import shutil
import string
import struct
from functools import cache
from pathlib import Path

import pytest
from bad_pictures import WRITERS
from conftest import TINY, Launched, assert_same_state, fill, fill_lmdb, lines, state
from kills import kept_folder, never_killed, run_to_the_end, tries
from test_command_line import HOSTILE

from parameter import FLAGS
from storage import checkpoint

BEGUN = (*TINY, "--version", "a", "--log_step", 1, "--model_save_step", 1, "--sample_step", 100)
AT_ITS_END = (*BEGUN, "--total_step", 4)


pytestmark = pytest.mark.usefixtures("an_empty_folder")


def end_of(*flags, codes=(0, 2, 3, 5)):
    """The exit code of a command; stderr must be empty for 0, else at most three lines without a traceback."""
    running = Launched(*flags)
    code = running.wait(60)
    err, out = running.err.read_text(errors="replace"), running.out.read_text(errors="replace")
    said = [line for line in re.split(r"[\r\n]+", err) if line.strip() and "%|" not in line]
    assert code in codes and "Traceback" not in out + err, (code, out, err)
    assert not said if code == 0 else said[0].startswith("error: ") and len(said) <= 3, (code, err)
    os.remove(running.out)
    os.remove(running.err)
    return code


def good_checkpoints():
    """The bytes of all checkpoints, also of those that were moved aside."""
    return {path.read_bytes() for path in Path("models").rglob("*.pth")}


@cache
def begun(*flags):
    """A folder in which a run came to its last step; the tries have copies of it."""
    folder = kept_folder()
    with pytest.MonkeyPatch.context() as there:
        there.chdir(folder)
        if "folder" in flags:
            fill(Path("pictures"), int(flags[-1]))
            flags = flags[:-1]
        run_to_the_end(*flags)
    return folder


def copy_of(folder):
    shutil.copytree(folder, ".", dirs_exist_ok=True)
    return good_checkpoints()


# ------------------------------------------------------------------------------------------------------- pictures


@pytest.mark.parametrize(("seed", "kind"), tries("bad input: a picture in a folder", list(WRITERS)))
@pytest.mark.parametrize("good", [12, 120])
def test_a_bad_picture(seed, kind, good):
    """In a run that goes on: it uses it, skips it, or ends; then the same command goes on without it."""
    flags = (*BEGUN, "--dataset", "folder", "--image_path", "pictures")
    before = copy_of(begun(*flags, "--total_step", 2, good))
    WRITERS[kind](Path("pictures"))
    code = end_of(*flags, "--total_step", 3)
    assert code == 0 or code == 3 and good == 12
    assert before <= good_checkpoints()
    if code:
        shutil.rmtree("pictures")
        fill(Path("pictures"), good)
        assert end_of(*flags, "--total_step", 3) == 0
    assert checkpoint.steps_in("models/a") == [1, 2, 3]


@pytest.mark.parametrize("seed", tries("bad input: an LMDB cut in half", 4))
def test_an_lmdb_that_is_cut(seed):
    file = fill_lmdb(Path("data", "cats_lmdb"), 200) / "data.mdb"
    whole, flags = file.read_bytes(), (*BEGUN, "--dataset", "lsun", "--image_path", "data")
    run_to_the_end(*flags, "--total_step", 2)
    before = good_checkpoints()
    file.write_bytes(whole[: random.Random(seed).randrange(len(whole))])
    assert end_of(*flags, "--total_step", 3) == 3 and before == good_checkpoints()
    file.write_bytes(whole)
    assert end_of(*flags, "--total_step", 3) == 0


@pytest.mark.parametrize("seed", tries("bad input: a list of missing or other files", 4))
def test_a_list_whose_files_are_missing(seed):
    """What --mode clean_data reads: it deletes no good picture."""
    fill(Path("pictures"), 120)
    Path("pictures/bad.png").write_bytes(b"no picture")
    flags = (*BEGUN, "--dataset", "folder", "--image_path", "pictures")
    run_to_the_end(*flags, "--total_step", 1)
    found, drawn = Path("logs/a/bad_images.jsonl"), random.Random(seed)
    text = found.read_text()
    others = [text + text.replace("bad.png", "gone.png"), text.replace("bad.png", "000.png"),
              text[: drawn.randrange(len(text))], '{"path": 3}\nnull\n[]\n' + text]
    found.write_text(others[seed])
    end_of(*flags, "--mode", "clean_data", "--yes", "true")
    assert {path.name for path in Path("pictures").glob("*.png")} >= {f"{number:03}.png" for number in range(120)}


# ----------------------------------------------------------------------------------------- checkpoints and records


def cut(data, drawn):
    return data[: drawn.randrange(len(data))]


def flip(data, drawn):
    place = drawn.randrange(len(data))
    return data[:place] + bytes([data[place] ^ 1 << drawn.randrange(8)]) + data[place + 1:]


def flip_at_its_end(data, drawn):
    """In the table of contents."""
    head = data.find(b"PK\x01\x02")
    return data[:head] + flip(data[head:], drawn)


def overwrite(data, drawn):
    place = drawn.randrange(len(data))
    return data[:place] + drawn.randbytes(min(4096, len(data) - place)) + data[place + 4096:]


def change_entries(data, offset, value):
    """Change a field of all tensors in the table of contents."""
    changed = bytearray(data)
    for match in re.finditer(b"PK\x01\x02", data):
        if b"/data/" in data[match.start():][:100]:
            struct.pack_into("<H", changed, match.start() + offset, value)
    return bytes(changed)


def compressed(data, drawn):
    """One bit of each says that it is compressed."""
    return change_entries(data, 10, 8)


def folders(data, drawn):
    """One bit of each says that it is a folder: torch then reads nothing, without a word."""
    return change_entries(data, 38, 0x10)


DAMAGES = [cut] * 6 + [flip] * 8 + [flip_at_its_end] * 4 + [overwrite] * 4 + [compressed, folders]


@pytest.mark.parametrize(("seed", "damage"), tries("bad input: a damaged checkpoint", DAMAGES))
def test_a_damaged_checkpoint(seed, damage):
    """The newest one: the run goes on from the one before, to the same end."""
    copy_of(begun(*AT_ITS_END, "--total_step", 3))
    newest = Path("models/a/0000003.pth")
    newest.write_bytes(damage(newest.read_bytes(), random.Random(seed)))
    before = {Path("models/a", name).read_bytes() for name in ("0000001.pth", "0000002.pth")}
    assert end_of(*AT_ITS_END) == 0
    assert_same_state(never_killed(run_to_the_end, *AT_ITS_END)[4], state("a", 4))
    assert before <= good_checkpoints()


def not_utf8(data, drawn):
    return b"\xff\xfe\0" + data


def of_another_kind(data, drawn):
    return drawn.choice([b"[1]", b"null", b"3", b"{}", b'{"step": "x"}\n', b"[" * 100_000])


TEXTS = [cut, cut, flip, flip, overwrite, not_utf8, of_another_kind, of_another_kind]


@pytest.mark.parametrize(("seed", "damage"), tries("bad input: a damaged metrics.jsonl", TEXTS))
def test_a_damaged_log(seed, damage):
    before = copy_of(begun(*AT_ITS_END, "--total_step", 3))
    log = Path("logs/a/metrics.jsonl")
    log.write_bytes(damage(log.read_bytes(), random.Random(seed)))
    assert end_of(*AT_ITS_END) == 0
    assert_same_state(never_killed(run_to_the_end, *AT_ITS_END)[4], state("a", 4))
    steps = [line["step"] for line in lines("a")]
    assert steps == sorted(set(steps)) and steps[-1] == 4 and before <= good_checkpoints()


@pytest.mark.parametrize(("seed", "damage"), tries("bad input: a damaged config.json", TEXTS))
def test_a_damaged_config(seed, damage):
    """The command line repeats the flags, or names the run alone."""
    before = copy_of(begun(*AT_ITS_END, "--total_step", 3))
    saved = Path("models/a/config.json")
    saved.write_bytes(damage(saved.read_bytes(), random.Random(seed)))
    for flags in (AT_ITS_END, ("--version", "a", "--total_step", 5)):
        end_of(*flags)
        assert before <= good_checkpoints()


# ------------------------------------------------------------------------------------------------- command lines


def hostile(drawn):
    """Up to four flags, known and unknown, with hostile values or none."""
    words = []
    for _ in range(drawn.randrange(1, 5)):
        name = drawn.choice([*FLAGS, "".join(drawn.choices(string.ascii_lowercase, k=5))])
        value = drawn.choice([*HOSTILE, str(drawn.randrange(-9, 99)), str(drawn.gauss(0, 9))])
        words += drawn.choice([[f"--{name}={value}"], [f"--{name}", value], [f"--{name}"], [value]])
    return words


@pytest.mark.parametrize("seed", tries("bad input: a hostile command line", 30))
def test_a_hostile_command_line(seed):
    """After a good one. A learning rate may end the run with 4: a loss became infinite."""
    before = copy_of(begun(*AT_ITS_END, "--total_step", 3))
    end_of(*AT_ITS_END, *hostile(random.Random(seed)), codes=(0, 2, 3, 4, 5))
    assert before <= good_checkpoints()
