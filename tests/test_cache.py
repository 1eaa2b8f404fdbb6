"""Cached results: a file per origin, read only if it is whole and of the same origin; more in test_metadata.py."""

import os
from pathlib import Path

import pytest
import torch

from storage.cache import Cache

ORIGIN = {"pictures": "abc", "procedure": 1}


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def cache_of(origin, kind="reference"):
    return Cache("cache", kind, origin)


def fits(kept):
    return "mean" in kept


def test_what_was_written_is_read():
    cache = cache_of(ORIGIN)
    assert cache.read(fits) is None
    cache.write({"mean": torch.arange(3.0), "words": "text"})
    kept = cache_of(dict(reversed(ORIGIN.items()))).read(fits)
    assert torch.equal(kept["mean"], torch.arange(3.0)) and kept["words"] == "text"
    assert os.listdir("cache/reference") == [cache.path.name], "nothing temporary is left"


@pytest.mark.parametrize("other", [
    cache_of({**ORIGIN, "procedure": 2}), cache_of({**ORIGIN, "procedure": "1"}), cache_of({**ORIGIN, "rows": 1}),
    cache_of({"pictures": "abc"}), cache_of(ORIGIN, kind="metadata"), Cache("elsewhere", "reference", ORIGIN),
])
def test_another_origin_kind_or_folder_is_another_file(other):
    cache_of(ORIGIN).write({"mean": 1.0})
    assert other.read(fits) is None
    other.write({"mean": 2.0})
    assert cache_of(ORIGIN).read(fits)["mean"] == 1.0 and other.read(fits)["mean"] == 2.0


class Harm:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


@pytest.mark.parametrize(("content", "words"), [
    ({"origin": {**ORIGIN, "procedure": 2}, "mean": 1.0}, "is stale (other pictures, weights or program version)"),
    ({"mean": 1.0}, "is stale (other pictures, weights or program version)"),
    ({"origin": ORIGIN, "median": 1.0}, "is stale (other pictures, weights or program version)"),
    ([1, 2], "is stale (other pictures, weights or program version)"),
    ({"origin": ORIGIN, "mean": Harm()}, "holds other objects than tensors"),
    (b"", "is damaged"),
    (b"<html>quota</html>", "is damaged"),
], ids=range(7))
def test_a_file_that_is_not_what_was_written_is_said_and_passed_over(content, words, capsys):
    cache = cache_of(ORIGIN)
    cache.path.parent.mkdir(parents=True)
    if isinstance(content, bytes):
        cache.path.write_bytes(content)
    else:
        torch.save(content, cache.path)
    assert cache.read(fits) is None
    out = capsys.readouterr().out
    assert out.startswith(f"reference: the cache {cache.path} {words}") and out.endswith("recomputing it\n")
    assert not Path("harmed").exists(), "a file of code is not run"
    cache.write({"mean": 3.0})
    assert cache.read(fits)["mean"] == 3.0


def test_a_disk_that_refuses_is_a_word_and_no_end(capsys):
    Path("cache").write_text("a file")
    cache_of(ORIGIN).write({"mean": 1.0}, needed=True)
    out = capsys.readouterr().out
    assert out.startswith("reference: cannot write cache/reference/") and "--cache_path" in out and out.count("\n") == 1
    assert cache_of(ORIGIN).read(fits) is None and Path("cache").read_text() == "a file"
