"""The comparison of two configurations' time per step."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

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


def test_a_side_with_classes_trains_with_them():
    sides = [step_time._side(TINY, ("--conditional", word)).trainer for word in ("true", "false")]
    assert [trainer.latents.classes and len(trainer.latents.classes) for trainer in sides] == [7, None]


def test_mistakes_are_told_in_a_line(capsys):
    assert step_time.main(["--model", "fastgan"]) == 2
    assert step_time.main([*TINY, "--", "--slae", "true", "--"]) == 2
    assert step_time.main(["--model", "fastgan", "--", "--", "--slae", "false"]) == 2
    assert step_time.main([*TINY, "--", "--deterministic", "true", "--"]) == 2
    err = capsys.readouterr().err.splitlines()
    assert len(err) == 4 and "--slae is for --model fastgan" in err[1]
    assert "--metadata false" in err[2] and "for the whole process" in err[3]


def test_help_says_how_it_is_called(capsys):
    assert step_time.main(["--help"]) == 0
    out, err = capsys.readouterr()
    assert "python benchmarks/step_time.py" in out and "python main.py --help" in out and not err


@pytest.mark.parametrize(("file", "program"), [("processes", "ablation"), ("report", "ablation"),
                                               ("reference", "speed")])
def test_a_file_that_is_no_program_names_the_one_it_belongs_to(file, program):
    script = Path(step_time.__file__).with_name(f"{file}.py")
    done = subprocess.run([sys.executable, script, "--help"], capture_output=True, text=True)
    assert done.stderr == f"this file is a part of another program: python benchmarks/{program}.py --help\n"
