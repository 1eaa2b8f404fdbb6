"""benchmarks/speed.py: its tables, its counts of operations; and the script that runs it on a GPU."""

import copy
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL

import reference
import speed
from device import distributed
from families import build_networks
from layers import attention
from metrics import cost
from parameter import parse, resolve


@pytest.mark.soak
def test_the_table_says_how_many_times_the_reference(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.3)
    monkeypatch.setattr(cost, "TURN", 0.01)
    memory = {cost.TimedConfig: 3 * 2**20, speed.PlainConfig: 12 * 2**20}
    monkeypatch.setattr(speed, "peak_memory", lambda config, bank, place, kind: memory[kind])
    monkeypatch.setitem(speed.VARIANTS, "sagan", ("--attn_pool true",))
    results = tmp_path / "results.md"
    assert speed.main(["--results", str(results), *SMALL]) == 0
    text = results.read_text()
    assert "## Speed of a step: sagan, 32 px, batch 8" in text and "python benchmarks/speed.py --results" in text
    rows = re.findall(r"^\| (.+?) \| ([\d.]+) \| (?:\*\*)?([\d.]+).*? \| ([\d,]+) \| ([\d.]+) \|$", text, re.M)
    assert [row[0] for row in rows] == ["reference", "this program --attn_pool true"]
    assert float(rows[1][2]) > 1, "the plain way is slower"
    assert [row[3:] for row in rows] == [("12", "1.00"), ("3", "0.25")]
    assert "| reference |" in capsys.readouterr().out


@pytest.mark.parametrize("flags", [(), ("--attn_pool", "true"), ("--arch", "resnet")])
def test_the_reference_computes_the_same_images_and_logits(flags):
    torch.manual_seed(0)
    nets = [net.eval() for net in build_networks(resolve(parse((*SMALL, "--sn", "none", *flags))), torch.device("cpu"))]
    for net, x in zip(nets, (torch.randn(2, 16), torch.randn(2, 3, 32, 32)), strict=True):
        for layer in net.attention.values():
            torch.nn.init.ones_(layer.gamma)
        with torch.no_grad():
            plain = reference.published(copy.deepcopy(net))
            assert {type(layer) for layer in plain.attention.values()} == {reference.PlainAttention}
            assert torch.allclose(torch.stack([*plain(x)]), torch.stack([*net(x)]), rtol=1e-4, atol=1e-5)


def test_a_table_takes_the_place_of_its_predecessor(tmp_path):
    path = tmp_path / "results.md"
    path.write_text("# Results\n\n## Before\n\nkept\n\n## A (b+c)\n\nold\n\n## After\n\nkept too\n")
    speed.put(path, "A (b+c)", ["new"])
    speed.put(path, "D", ["one more"])
    assert path.read_text() == ("# Results\n\n## Before\n\nkept\n\n## A (b+c)\n\nnew\n\n## After\n\nkept too\n\n"
                                "## D\n\none more\n")


def test_growth_tells_how_far_the_ideal_is(monkeypatch, capsys, tmp_path):
    monkeypatch.setitem(speed.GROWTH, "sagan", ((32,), (8,)))
    monkeypatch.setattr(speed, "MATRIX", 512)
    monkeypatch.setattr(speed, "TIMED", 0.1)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 2**20)
    assert speed.main(["--growth", "--results", str(tmp_path / "r.md"), *SMALL]) == 0
    row = r"^\| 32 \| (\d+) \| ([\d.]+) \| ([\d.]+) \| [\d.]+ \| (\d+)% \| 1 \|$"
    (found,) = re.findall(row, capsys.readouterr().out, re.M)
    assert 0 < int(found[3]) < 100 and float(found[1]) * float(found[2]) == pytest.approx(8, rel=0.02)
    flags = ("--growth", "--batches", "8,4,3", "--accumulate", "2", "--results", str(tmp_path / "kept.md"))
    assert speed.main([*flags, *SMALL]) == 2, "3 cannot be divided"
    kept = (tmp_path / "kept.md").read_text()
    assert [batch for batch, *_ in re.findall(row, kept, re.M)] == ["8", "4"], "what was measured is kept"


def test_the_other_way_of_changing_sizes_is_a_row_where_there_is_one(monkeypatch):
    """It takes the more operations on a CPU, where the program's own takes the fewer."""
    timed = []

    def alternate(sides, seconds):
        timed.extend(sides[1:])
        for side in sides:
            side.seconds = [1.0, 1.0]

    monkeypatch.setattr(speed, "Apart", lambda *_: SimpleNamespace())
    monkeypatch.setattr(speed, "alternate", alternate)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 2**20)
    flags = (*SMALL, "--arch", "resnet", "--g_conv_dim", "4", "--d_conv_dim", "4")
    assert any("| this program, sizes changed the other way | " in line for line in speed.compare(flags, variants=[""]))
    flops = []
    for side in timed:
        with speed.counting() as counter:
            side.run(1)
        flops.append(counter.get_total_flops())
    assert flops[0] < 0.9 * flops[1]
    assert not any("other way" in line for line in speed.compare(SMALL, variants=[""]))


def test_loading_is_compared_with_pictures_that_are_there(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.1)
    monkeypatch.setattr(cost, "LEAST", 3)
    monkeypatch.setattr(cost, "TURN", 0.01)
    monkeypatch.setattr(speed, "PICTURES", 12)
    timed = []
    monkeypatch.setattr(speed, "alternate", lambda sides, *words: timed.extend(sides) or cost.alternate(sides, *words))
    assert speed.main(["--loading", "--results", str(tmp_path / "r.md"), *SMALL, "--num_workers", "0"]) == 0
    rows = re.findall(r"^\| ([^|]+) \| [\d.]+ \| (?:\*\*)?([\d.]+).* \|$", (tmp_path / "r.md").read_text(), re.M)
    assert [name for name, _ in rows] == [
        "none: always the same pictures", "JPEGs of 178x218, by the training itself", "from the cache"]
    assert rows[0][1] == "1" and all(0.1 < float(ratio) < 100 for _, ratio in rows)
    assert [type(side.batches).__name__ for side in timed] == ["ConstantBatch", "RealBatches", "RealBatches"]
    assert all(side.trainer.samples_seen == side.batches.samples_seen > 0 for side in timed[1:]), "they were trained on"
    assert "32 px, batch 8, loading" in (tmp_path / "r.md").read_text()


def test_variants_on_the_command_line_take_the_usual_ones_place(monkeypatch, tmp_path):
    asked = []
    monkeypatch.setattr(speed, "compare", lambda flags, seconds, variants: asked.append(variants) or ["row"])
    for more in ((), ("--variant", "--attn_pool true", "--variant", "--accumulate 2")):
        assert speed.main(["--results", str(tmp_path / "r.md"), *more, *SMALL]) == 0
    assert asked == [None, ["--attn_pool true", "--accumulate 2"]]
    assert "32 px, batch 8, --attn_pool true, --accumulate 2, " in (tmp_path / "r.md").read_text()


def test_the_ideal_counts_the_products_that_attention_needs(monkeypatch):
    """Whichever kernel computes it: not those with the zeros that one of them wants, nor those done twice."""
    found = []
    for fused_from in (0, 10**6):
        monkeypatch.setattr(attention, "FUSED_FROM_POSITIONS", fused_from)
        config = resolve(parse(SMALL))
        place = distributed.start(config)
        with speed.counting() as counter:
            cost.TimedConfig(config, place).run(1)
        found.append(counter.get_total_flops())
    assert found[0] == found[1] > 10**6


USUAL_STEPS = ("speed_sagan", "speed_fastgan", "memory", "loading", "train_sagan", "train_fastgan",
               "speed_compiled")
SPEED_STEPS = ("fastgan", "resnet", "sagan", "sagan_batches", "fastgan_batches", "resnet_batches", "sagan_compiled")


@pytest.mark.parametrize(("asked", "names"), [((), USUAL_STEPS), (("speed",), SPEED_STEPS), (("tests",), ("tests",))],
                         ids=["usual", "speed", "tests"])
def test_the_gpu_script_reports_every_step_and_how_it_ended(tmp_path, asked, names):
    """With a Python that does nothing but say what it was asked for, and fails at one step."""
    python = tmp_path / "python"
    python.write_text("#!/bin/sh\necho \"asked: $*\"\n"
                      "case \"$*\" in *fastgan*imsize*256* | -m\\ pytest*) exit 4 ;; esac\n")
    python.chmod(0o755)
    script = Path(speed.__file__).parent / "gpu.sh"
    done = subprocess.run(["bash", script, tmp_path / "out", *asked], capture_output=True, text=True, timeout=60,
                          env={**os.environ, "PYTHON": str(python)})
    assert done.returncode == 1 and "asked: " in done.stdout, "what failed is shown"
    assert sorted(os.listdir(tmp_path / "out")) == ["outputs.txt", "report.md"] and "| step |" in done.stdout
    assert (tmp_path / "out/outputs.txt").read_text().count("asked: ") == len(names)
    report = (tmp_path / "out/report.md").read_text()
    rows = re.findall(r"^\| (\w+) \| `(.*)` \| \d+ s \| (\d) \|$", report, re.M)
    fails = re.compile("fastgan.*256|-m pytest")
    assert [(name, code) for name, _, code in rows] == [
        (name, "4" if fails.search(command) else "0") for name, (_, command, _) in zip(names, rows, strict=True)]
    for _, command, _ in rows:
        if "speed.py" in command:
            flags = re.sub(r"^.*--results \S+|--(growth|loading)|--batches \S+|--variant (--\w+ \w+)?", "", command)
            assert speed.config_of(flags.split())
    limits = [int(limit) for name, limit in re.findall(r"^ *step (\w+) (\d+) ", script.read_text(), re.M)
              if name in names]
    assert len(limits) == len(names) and sum(limits) <= 9 * 60
    for flags in re.findall(r"^step train.*?--version (.*)$", script.read_text(), re.M):
        assert resolve(parse(("--dataset", "toy", "--version", *flags.split())))
    assert subprocess.run(["bash", script], capture_output=True).returncode == 2


def test_a_mistake_is_told_in_a_line(capsys, tmp_path):
    assert speed.main(["--results", str(tmp_path / "r.md"), "--imsize", "65"]) == 2
    assert "--imsize 65" in capsys.readouterr().err and not Path(tmp_path / "r.md").exists()
