"""SIGKILL at any moment of a run: the same command goes on, and at its end nothing shows that it was killed.

One test is one try. Its seed decides the moment.
"""

import time
from pathlib import Path

import pytest
from conftest import Launched, assert_same_state, lines, state
from kills import (
    CHANGES,
    OF_THE_RUN,
    RECORDS,
    SHORT,
    STEPS,
    Cold,
    assert_goes_on,
    assert_same_records,
    is_there,
    kill,
    launch_that_kills_itself,
    moments,
    never_killed,
    pictures,
    run_to_the_end,
    stop_while,
    tries,
)

from storage import checkpoint

pytestmark = pytest.mark.usefixtures("an_empty_folder")


def of_pictures(count, *flags):
    """A run on pictures in a folder, with its decoded cache in this folder, so that no try finds that of another."""
    return (*SHORT, "--dataset", "folder", "--image_path", pictures(count), "--cache_dir", "decoded", *flags)


# ------------------------------------------------------------------------------------------- before the first step


@pytest.mark.parametrize("seed", tries("SIGKILL: while it imports", 6))
def test_while_it_imports(seed):
    """Of a new run, and of one that goes on from step 4."""
    if seed % 2:
        run_to_the_end(*SHORT, "--total_step", 4)
    running = Cold(*SHORT)
    time.sleep(moments("imports", seed).uniform(0, 1.5))
    assert_goes_on(SHORT, kill(running), ended=4 if seed % 2 else None)


@pytest.mark.parametrize("seed", tries("SIGKILL: while pictures are checked", 8))
def test_while_pictures_are_checked(seed):
    """While it looks at each, while loader processes decode them, and before any file is written into a cache."""
    flags, drawn = of_pictures(300, "--cache", "on"), moments("check", seed)
    if seed % 4 == 0:
        saved = launch_that_kills_itself(CHANGES + r"\b(cache|decoded)\b", drawn.randrange(9), *flags)
    elif seed % 4 == 1:
        saved = launch_that_kills_itself("^open r.*/pictures/", drawn.randrange(300), *flags)
    else:
        running = Launched(*flags)
        running.wait_for("decoded")
        time.sleep(drawn.uniform(0, 0.2))
        saved = kill(running)
    assert_goes_on(flags, saved)


UNCHECKED = ("--check_data", "off", "--cache", "off")
METADATA = (*UNCHECKED, "--model", "fastgan", "--imsize", 64, "--vgg_weights", "random", "--recon", "l1", "--preset",
            "cpu")
REFERENCE = (*UNCHECKED, "--inception_weights", "random", "--metric_step", STEPS, "--num_eval", 4, "--metrics", "fid")


@pytest.mark.parametrize(("flags", "kind"), [(METADATA, "metadata"), (REFERENCE, "reference")],
                         ids=["metadata", "reference"])
@pytest.mark.parametrize("seed", tries("SIGKILL: while metadata or reference statistics are computed", 4))
def test_while_features_are_computed(seed, flags, kind):
    """The pictures are opened for their range first, then for their features. Half of the kills are at its end."""
    flags, number = of_pictures(12, *flags), 12 + moments(kind, seed).randrange(12)
    if kind == "metadata":                              # of FastGAN, which has no flags of attention
        at = flags.index("--g_attn")
        flags = flags[:at] + flags[at + 4:]
    at_its_end = rf"^os.rename .*cache/{kind}/"
    when = ("^open r.*/pictures/", number) if seed % 2 else (at_its_end, 0)
    saved = launch_that_kills_itself(*when, *flags)
    assert saved == [] and not list(Path("cache", kind).glob("*.pt"))
    assert_goes_on(flags, saved)


# -------------------------------------------------------------------------------------------------- in training


@pytest.mark.parametrize("seed", tries("SIGKILL: in a step", 12))
def test_in_a_step(seed):
    """Of a run without loader processes, and with one."""
    flags = of_pictures(40, "--cache", "off", "--num_workers", 1) if seed % 2 else SHORT
    running = Launched(*flags)
    running.wait_for("logs/a/metrics.jsonl")
    time.sleep(moments("step", seed).uniform(0, 0.6))
    assert_goes_on(flags, kill(running))


@pytest.mark.parametrize("seed", tries("SIGKILL: a record is being written", 8))
def test_while_a_record_is_written(seed):
    """At any of the 28 pictures of four records, or between the last picture and its log line."""
    drawn = moments("record", seed)
    what, number = (r"^os\.rename .*samples/a/\.\d+_.*png", 28) if seed % 4 else (r"^os\.rename .*/\.\d+_fake\.png", 4)
    assert_goes_on(RECORDS, launch_that_kills_itself(what, drawn.randrange(number), *RECORDS))


@pytest.mark.parametrize("seed", tries("SIGKILL: a checkpoint is being written", 10, quick=1))
def test_while_a_checkpoint_is_written(seed):
    running = Launched(*SHORT)
    stop_while(running, is_there("models/a/.*.pth.*.tmp"), moments("checkpoint", seed))
    assert_goes_on(SHORT, kill(running))


@pytest.mark.parametrize("seed", tries("SIGKILL: the page is being written", 6))
def test_while_the_page_is_written(seed):
    """Before one of the eight pages is opened, or before it gets its name."""
    drawn = moments("page", seed)
    what = drawn.choice((r"^open w.*\.index\.html\.", r"^os\.rename .*\.index\.html\."))
    assert_goes_on(RECORDS, launch_that_kills_itself(what, drawn.randrange(8), *RECORDS))


@pytest.mark.parametrize("seed", tries("SIGKILL: old checkpoints are being pruned", 6))
def test_while_old_checkpoints_are_pruned(seed):
    """Twelve checkpoints of a run that kept all; then the same run that keeps two."""
    flags = (*SHORT, "--model_save_step", 1, "--keep_checkpoints", 2)
    run_to_the_end(*flags, "--keep_checkpoints", 0, "--total_step", 8)
    saved = launch_that_kills_itself(r"os.remove .*\.pth$", moments("prune", seed).randrange(10), *flags)
    assert 2 <= len(saved) <= 9 and saved[-1] >= 9
    assert_goes_on(flags, saved, ended=8)


# -------------------------------------------------------------------------------------------------- at a start


def killed_in_the_middle():
    """A run that was killed after step 5, when its metrics were ahead of its newest checkpoint. The checkpoints."""
    launch_that_kills_itself(r"os.rename .*0000006\.pth", 0, *RECORDS)
    assert lines("a")[-1]["step"] == 5
    return checkpoint.steps_in("models/a")


@pytest.mark.parametrize("seed", tries("SIGKILL: while it resumes", 10))
def test_while_it_resumes(seed):
    """Before any of the first changes of the disk that a start makes, or at any time."""
    before, drawn = killed_in_the_middle(), moments("resume", seed)
    if seed % 2:
        saved = launch_that_kills_itself(OF_THE_RUN, drawn.randrange(16), *RECORDS)
    else:
        running = Launched(*RECORDS)
        time.sleep(drawn.uniform(0, 0.8))
        saved = kill(running)
    assert saved[: len(before)] == before
    assert_goes_on(RECORDS, saved)


def everything_in(version):
    """{path in its folder: bytes} of what a run wrote, except its locks."""
    return {(root, path.name): path.read_bytes() for root in ("models", "logs", "samples")
            for path in Path(root, version).glob("[!.]*")}


@pytest.mark.parametrize("seed", tries("SIGKILL: during --restart", 10))
def test_during_a_restart(seed):
    """The old run is whole, under one name, and the new one begins from the start."""
    run_to_the_end(*RECORDS, "--total_step", 4, "--seed", 1)
    old, flags = everything_in("a"), (*RECORDS, "--restart", "true")
    launch_that_kills_itself(OF_THE_RUN, moments("restart", seed).randrange(30), *flags)
    run_to_the_end(*flags)
    names = [path.name for path in Path("models").glob("a.old*")]
    assert old in [everything_in(name) for name in names], {name: sorted(everything_in(name)) for name in names}
    assert_same_state(never_killed(run_to_the_end, *RECORDS)[STEPS], state("a", STEPS))
    assert_same_records(never_killed(run_to_the_end, *RECORDS)["records"])
    assert not [str(path) for path in Path().rglob("*.tmp")]
