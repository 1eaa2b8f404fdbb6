"""metrics.jsonl: lines are appended, those after the step that a run resumes from are set aside; TensorBoard events."""

import errno
import json
import time
from pathlib import Path

import pytest
import torch

import utils
from storage.journal import BY_HAND, MetricsLog, Window, count_between, names_at

PATH = Path("logs/metrics.jsonl")


@pytest.fixture(autouse=True)
def home(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def steps(path=PATH):
    return [json.loads(line)["step"] for line in path.read_text(encoding="utf-8").splitlines()]


def write(*numbers, resume_from=None):
    log = MetricsLog("logs", use_tensorboard=False, resume_from=resume_from)
    for number in numbers:
        log.write(number, {"d_loss": number / 2})
    log.close()


def test_a_line_holds_its_step_and_values_and_can_be_read_at_once():
    log = MetricsLog("logs", use_tensorboard=False)
    log.write(7, {"fid": 3.5, "protocol": "größer"})
    assert [json.loads(line) for line in PATH.read_text(encoding="utf-8").splitlines()] == [
        {"step": 7, "fid": 3.5, "protocol": "größer"}]
    log.close()


def test_a_run_that_goes_back_sets_later_lines_aside_and_loses_none():
    write(1, 2, 3, 4)
    write(3, 4, resume_from=2)
    assert steps() == [1, 2, 3, 4] and steps(Path("logs/superseded.jsonl")) == [3, 4]
    write(resume_from=3)
    assert steps() == [1, 2, 3] and steps(Path("logs/superseded.jsonl")) == [3, 4, 4]
    write(5, resume_from=3)
    assert steps() == [1, 2, 3, 5] and steps(Path("logs/superseded.jsonl")) == [3, 4, 4]


def test_lines_that_a_full_disk_keeps_in_their_place_are_set_aside_once(monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")

    write(1, 2, 3, 4)
    write(4, resume_from=3)
    with monkeypatch.context() as patch:
        patch.setattr(utils, "write_atomically", full)
        for _ in range(2):
            with pytest.raises(OSError, match="No space left"):
                write(resume_from=2)
    assert steps() == [1, 2, 3, 4] and steps(Path("logs/superseded.jsonl")) == [4]
    write(resume_from=2)
    assert steps() == [1, 2] and steps(Path("logs/superseded.jsonl")) == [4, 3, 4]


def test_what_is_measured_by_hand_is_no_measurement_of_the_training():
    log = MetricsLog("logs", use_tensorboard=False)
    for step, by in ((2, {}), (4, BY_HAND), (6, {})):
        log.write(step, {"fid": 3.0, "protocol": "p", **by})
    log.close()
    assert count_between("logs", 0, 6, "fid") == 2
    assert names_at("logs", 4) == set() and "protocol" in names_at("logs", 6)


def test_starting_anew_sets_all_aside():
    write(1, 2)
    write(1, resume_from=0)
    assert steps() == [1] and steps(Path("logs/superseded.jsonl")) == [1, 2]


def test_whoever_only_adds_keeps_later_lines():
    write(1, 2, 3)
    write(2)
    assert steps() == [1, 2, 3, 2] and not Path("logs/superseded.jsonl").exists()


@pytest.mark.parametrize("damage", ['{"step": 2, "d_lo', "[1]", '{"d_loss": 1}', '{"step": "x"}', "\n"])
def test_a_line_that_a_crash_damaged_is_dropped_when_the_run_goes_on(damage):
    write(1)
    with open(PATH, "a") as file:
        file.write(damage)
    write(2, resume_from=1)
    assert steps() == [1, 2]


def test_a_line_that_a_crash_cut_short_swallows_none_that_is_added():
    write(1)
    with open(PATH, "a") as file:
        file.write('{"step": 2, "d_lo')
    write(3)
    whole, cut, added = PATH.read_text().splitlines()
    assert json.loads(whole)["step"] == 1 and cut == '{"step": 2, "d_lo' and json.loads(added)["step"] == 3


@pytest.mark.parametrize(("resume_from", "expected"), [(2, [1, 2, 30]), (None, [1, 2, 3, 30])])
def test_tensorboard_gets_the_numbers_alone_and_forgets_what_is_given_up(resume_from, expected, monkeypatch):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    log = MetricsLog("logs", use_tensorboard=True)
    for step in (1, 2, 3):
        log.write_events(step, {"fid": step / 2, "protocol": "words"})
    log.close()
    # of files of one second the order is that of their numbers as text, 10 before 9
    monkeypatch.setattr(time, "time", lambda: time.time_ns() / 1e9 + 2)
    log = MetricsLog("logs", use_tensorboard=True, resume_from=resume_from)
    log.write_events(30, {"fid": 1})
    log.close()
    events = EventAccumulator("logs").Reload()
    assert events.Tags()["scalars"] == ["fid"] and not events.Tags()["tensors"]
    assert [event.step for event in events.Scalars("fid")] == expected


def test_a_window_that_is_saved_between_two_log_lines_keeps_its_time():
    """As when a loader process dies: the line after resuming divides by the seconds of all its steps."""
    window = Window()
    for _ in range(3):
        window.add({"d_loss": torch.tensor(1.0), "g_loss": torch.tensor(2.0)})
    time.sleep(0.05)
    window.stop_clock()
    resumed = Window(Window.read_state(json.loads(json.dumps(window.state()))))
    resumed.add({"d_loss": torch.tensor(5.0), "g_loss": torch.tensor(2.0)})
    assert resumed.means() == {"d_loss": 2.0, "g_loss": 2.0} and resumed.steps == 4 and resumed.seconds >= 0.05
