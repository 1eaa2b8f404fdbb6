"""benchmarks/speed.py: its tables, its counts of operations; and the script that runs it on a GPU."""

import copy
import os
import re
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import SMALL, SMALL_FASTGAN

import loading
import reference
import speed
from device import distributed
from errors import Failure
from families import build_networks
from generate.classes import Classes
from layers import attention
from metrics import cost
from parameter import parse, resolve


@pytest.mark.soak
def test_the_table_says_how_many_times_the_reference(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(cost, "SECONDS", 0.3)
    monkeypatch.setattr(cost, "TURN", 0.01)
    memory = {cost.TimedConfig: 3 * 2**20, speed.PlainConfig: 12 * 2**20}
    monkeypatch.setattr(speed, "peak_memory", lambda config, bank, place, kind, classes: memory[kind])
    monkeypatch.setattr(speed, "usual_variants", lambda *_: ["--attn_pool true"])
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
    monkeypatch.setattr(speed, "peak_memory", lambda *_, **__: 2**20)
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

    monkeypatch.setattr(speed, "Apart", lambda kind, config, *_: SimpleNamespace(config=config))
    monkeypatch.setattr(speed, "alternate", alternate)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 2**20)
    flags = (*SMALL, "--arch", "resnet", "--g_conv_dim", "4", "--d_conv_dim", "4")
    assert any("| this program, sizes changed the other way | " in line for line in speed.compare(flags, variants=[""]))
    flops = []
    for side in timed:
        with speed.counting(side.trainer.G, side.trainer.D) as counter:
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
    assert ", --attn_pool true, --accumulate 2, " in (tmp_path / "r.md").read_text()


@pytest.mark.parametrize("arch", ["dcgan", "resnet"])
def test_the_ideal_counts_the_products_that_attention_needs(monkeypatch, arch):
    """Whichever kernel computes it: not those with the zeros that one of them wants, nor those done twice."""
    found = []
    for fused_from in (0, 10**6):
        monkeypatch.setattr(attention, "FUSED_FROM_POSITIONS", fused_from)
        config = resolve(parse((*SMALL, "--arch", arch)))
        side = cost.TimedConfig(config, distributed.start(config))
        with speed.counting(side.trainer.G, side.trainer.D) as counter:
            side.run(1)
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


@pytest.mark.parametrize(("flags", "message"), [
    (("--imsize", "65"), "--imsize 65"),
    (("--model", "fastgan", "--metadata", "true"), "--metadata false"),
    (("--variant", "--deterministic true"), "--deterministic: holds for the whole process"),
    (("--loading", "--conditional", "true"), "--conditional true"),
])
def test_a_mistake_is_told_in_a_line(capsys, tmp_path, flags, message):
    assert speed.main(["--results", str(tmp_path / "r.md"), *flags]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and not Path(tmp_path / "r.md").exists()


@pytest.mark.parametrize("seconds", ["0", "-1", "nan", "inf", "some"])
def test_no_time_is_no_time_to_measure_for(capsys, seconds):
    with pytest.raises(SystemExit, match="2"):
        speed.main(["--seconds", seconds])
    assert "no number of seconds over 0" in capsys.readouterr().err


def test_where_no_table_can_be_written_nothing_is_measured(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(speed, "compare", lambda *_: pytest.fail("measured"))
    (tmp_path / "file").touch()
    assert speed.main(["--results", str(tmp_path / "file" / "r.md"), *SMALL]) == 5
    assert speed.main(["--results", str(tmp_path), *SMALL]) == 2
    assert capsys.readouterr().err.count("\n") == 2
    monkeypatch.setattr(speed, "compare", lambda *_: ["row"])
    assert speed.main(["--results", str(tmp_path / "new" / "r.md"), *SMALL]) == 0
    assert (tmp_path / "new" / "r.md").exists()


def test_tables_of_other_flags_stand_beside_each_other(monkeypatch, tmp_path):
    results = tmp_path / "r.md"
    monkeypatch.setattr(speed, "compare", lambda *_: ["row"])
    monkeypatch.setattr(speed, "grow", lambda *_: ["row"])
    calls = [(), ("--sn", "none"), ("--conditional", "true"), ("--growth",), ("--growth", "--sn", "none"),
             ("--growth", "--batches", "8,16"), ("--growth", "--batches", "8")]
    for flags in (*calls, *calls):
        assert speed.main(["--results", str(results), "--seconds", "1", "--device", "cpu", *flags]) == 0
    titles = re.findall("^## .*", results.read_text(), re.M)
    assert len(titles) == len(calls) and "64 px, batch 16, --device cpu, " in titles[0]
    assert "--device cpu, --sn none, " in titles[1]


def test_usual_variants_that_the_flags_rule_out_are_left_out(monkeypatch):
    cpu = torch.device("cpu")
    assert {"", "--attn_pool true", "--accumulate 4"} <= {*speed.usual_variants(SMALL, cpu)}
    ruled_out = speed.usual_variants((*SMALL, "--arch", "resnet", "--batch_size", "6"), cpu)
    assert "" in ruled_out and not any(word in more for more in ruled_out for word in ("attn_pool", "accumulate"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    assert speed.config_of(("--device", "cpu")).batch_size == 16, "the GPU that is there is not asked for"
    assert "--cuda_graph false" not in speed.usual_variants(("--device", "cpu"), cpu)


@pytest.fixture
def untimed(monkeypatch):
    """`compare` without training: every step takes a second. Returns [(config, classes) of each side]."""
    made = []

    def side(config, place, bank, classes):
        made.append((config, classes))
        return SimpleNamespace(config=config, seconds=[1.0, 1.0])

    monkeypatch.setattr(speed, "Apart", lambda kind, *words: side(*words))
    monkeypatch.setattr(speed, "TimedConfig", side)
    monkeypatch.setattr(speed, "alternate", lambda sides, seconds: None)
    monkeypatch.setattr(speed, "peak_memory", lambda *_: 2**20)
    return made


def test_speeds_are_per_image_and_sides_have_classes(monkeypatch, untimed):
    monkeypatch.setattr(speed, "classes_of", lambda config: config.conditional and Classes(("a", "b"), (4, 4)))
    flags = (*SMALL, "--conditional", "true")
    lines = [*speed.compare(flags, variants=["", "--batch_size 4", "--conditional false"])]
    assert [line.split(" | ")[:3] for line in lines[2:]] == [
        ["| reference", "8.0", "1"], ["| this program", "8.0", "**1.00** (1.00 to 1.00)"],
        ["| this program --batch_size 4", "4.0", "**0.50** (0.50 to 0.50)"],
        ["| this program --conditional false", "8.0", "**1.00** (1.00 to 1.00)"]]
    assert [bool(classes) for _, classes in untimed] == [True, True, True, False]


def test_a_variant_without_memory_costs_its_own_row_alone(monkeypatch, untimed):
    def peak(config, *_):
        if config.accumulate > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")
        return 2**20

    monkeypatch.setattr(speed, "peak_memory", peak)
    lines = [*speed.compare(SMALL, variants=["", "--accumulate 2"])]
    assert lines[3].startswith("| this program | 8.0 | **1.00**")
    assert lines[4] == "| this program --accumulate 2 | out of memory on the GPU | | | |" and len(untimed) == 2
    monkeypatch.setattr(speed, "alternate", lambda *_: torch.empty(2**60))
    with pytest.raises(Failure, match="all variants at once: out of memory on this machine"):
        list(speed.compare(SMALL, variants=[""]))


@pytest.mark.parametrize(("end", "code"), [(KeyboardInterrupt(), 130), (Failure("it died"), 1)])
def test_rows_of_growth_outlive_what_has_no_memory_and_how_it_ends(monkeypatch, capsys, tmp_path, end, code):
    def cell(config, place, precision, timed):
        assert timed == 3
        if config.batch_size == 16:
            raise MemoryError
        if config.batch_size == 64:
            raise end
        return 2**20, 1.0, 1e9, 2e9

    monkeypatch.setattr(speed, "measure_cell", cell)
    results = tmp_path / "r.md"
    flags = ["--growth", "--batches", "8,16,32,64,128", "--seconds", "3", "--results", str(results), *SMALL]
    assert speed.main(flags) == code
    assert re.findall(r"^\| 32 \| (\d+) \| (.*?) \|", results.read_text(), re.M) == [
        ("8", "1.0000"), ("16", "out of memory on this machine"), ("32", "1.0000")]
    assert capsys.readouterr().err in ("interrupted\n", "error: 32 px, batch 64: it died\n")


def test_what_was_prefetched_while_others_were_timed_is_not_trained_on(monkeypatch):
    monkeypatch.setattr(loading, "PAUSE", 0)
    config = resolve(parse(SMALL))
    place = distributed.start(config)
    for readers, discarded in ((0, 0), (2, 5)):
        side = speed.FromFiles(config, place, cost.ConstantBatch(config, place.device), readers)
        taken = []
        monkeypatch.setattr(cost.ConstantBatch, "__next__", lambda self, taken=taken: taken.append(self))
        monkeypatch.setattr(side.trainer, "train_step", next)
        side.run(3)
        assert len(taken) == discarded + 3


@pytest.mark.parametrize("flags", [(*SMALL, "--conditional", "true"), (*SMALL, "--adv_loss", "wgan-gp"),
                                   (*SMALL_FASTGAN, "--conditional", "true"), (*SMALL, "--arch", "resnet")])
def test_the_reference_trains_as_often_and_on_the_classes_that_are_asked_for(monkeypatch, flags):
    config = resolve(parse((*flags, "--d_iters", "2")))
    place = distributed.start(config)
    classes = Classes(("a", "b"), (4, 4)) if config.conditional is True else None
    side = reference.PlainConfig(config, place, classes=classes)
    updated = []
    monkeypatch.setattr(side.trainer, "update", lambda loss, optimizer: (loss.backward(), updated.append(optimizer)))
    side.run(1)
    trainer = side.trainer
    assert updated == [trainer.d_optimizer, trainer.d_optimizer, trainer.g_optimizer]
    layers = [*trainer.G.modules(), *trainer.D.modules()]
    tables = [layer for layer in layers if isinstance(layer, torch.nn.Embedding)]
    assert bool(tables) == bool(classes) and all(
        weight.grad is not None for table in tables for weight in table.parameters())
