"""The comparison of two configurations' time per step."""

import re

import step_time
from metrics import cost

TINY = ("--imsize", "32", "--batch_size", "2", "--g_conv_dim", "4", "--d_conv_dim", "4", "--device", "cpu")


def test_the_dearer_side_is_told_from_the_cheaper_one(monkeypatch, capsys):
    monkeypatch.setattr(cost, "SECONDS", 0.25)
    monkeypatch.setattr(cost, "TURN", 0.01)
    assert step_time.main([*TINY, "--", "--d_iters", "4", "--", "--d_iters", "1"]) == 0
    out = capsys.readouterr().out
    a, b = (float(seconds) for seconds in re.findall(r"^[AB]: (\S+) s per step", out, re.M))
    ratio = float(re.search(r"^A / B: (\S+) ", out, re.M).group(1))
    assert "--d_iters 4" in out and a > b and ratio > 1.5


def test_mistakes_are_told_in_a_line(capsys):
    assert step_time.main(["--model", "fastgan"]) == 2
    assert step_time.main([*TINY, "--", "--slae", "true", "--"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 2 and "--slae is for --model fastgan" in err[1]
