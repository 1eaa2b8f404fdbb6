"""What TensorBoard and wandb get of a run; wandb is the real one, offline, where it is installed."""

import importlib.util
import io
import json
import struct
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import MAIN, TINY, lines, torchrun
from PIL import Image
from stand_ins import small_swd

from metrics import swd
from storage import boards

RUN = ("--version", "a", "--log_step", 1, "--sample_step", 2, "--model_save_step", 2)
KINDS = {"fake", "attn_g8"}


@pytest.mark.parametrize(("records", "shown"), [(10, 10), (50, 50), (100, 75), (200, 100), (10_000, 239)])
def test_of_a_long_run_fewer_and_fewer_records_are_shown(records, shown):
    assert sum(map(boards.is_shown, range(1, records + 1))) == shown


def test_a_picture_is_made_small_and_its_transparent_parts_white(tmp_path):
    Image.new("RGBA", (2000, 500), (0, 0, 0, 0)).save(tmp_path / "x.png")
    small = boards._shrink(tmp_path / "x.png")
    assert small.size == (boards.LONGEST, boards.LONGEST // 4) and small.getpixel((5, 5)) == (255, 255, 255)


# ----------------------------------------------------------------------------------------------------- TensorBoard


def events(folder="logs/a"):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    return EventAccumulator(folder, size_guidance={"images": 0}).Reload()


def hparams(root="logs"):
    """(names of the metrics, {run: ({setting: value}, {metric: (step, value)})}): TensorBoard's tab HPARAMS."""
    from google.protobuf import json_format
    from tensorboard.backend.event_processing import data_provider, plugin_event_multiplexer
    from tensorboard.context import RequestContext
    from tensorboard.plugins import base_plugin
    from tensorboard.plugins.hparams import api_pb2, backend_context, get_experiment, list_session_groups

    multiplexer = plugin_event_multiplexer.EventMultiplexer().AddRunsFromDirectory(root).Reload()
    context = base_plugin.TBContext(logdir=root, multiplexer=multiplexer,
                                    data_provider=data_provider.MultiplexerDataProvider(multiplexer, root))
    context = backend_context.Context(context)
    experiment = get_experiment.Handler(RequestContext(), context, "", api_pb2.GetExperimentRequest()).run()
    metrics = [info.name for info in experiment.metric_infos]
    request = api_pb2.ListSessionGroupsRequest(
        start_index=0, slice_size=10, allowed_statuses=list(api_pb2.Status.values()),
        col_params=[api_pb2.ColParams(metric=name, include_in_result=True) for name in metrics] +
                   [api_pb2.ColParams(hparam=info.name, include_in_result=True) for info in experiment.hparam_infos])
    groups = list_session_groups.Handler(RequestContext(), context, "", request).run().session_groups
    return {name.tag for name in metrics}, {group.name: (
        json_format.MessageToDict(group)["hparams"],
        {value.name.tag: (value.training_step, value.value) for value in group.metric_values}) for group in groups}


@pytest.mark.soak
def test_tensorboard_compares_runs_by_their_settings_and_newest_scores(run):
    for version, lr in (("a", 0.001), ("b", 0.002)):
        assert run(*RUN, "--version", version, "--g_lr", lr, "--total_step", 2, "--use_tensorboard", "true")[0] == 0
    metrics, runs = hparams()
    assert {"d_loss", "g_loss"} <= metrics and set(runs) == {"a", "b"}
    settings, scores = runs["b"]
    assert settings["g_lr"] == 0.002 and settings["batch_size"] == 4 and settings["adv_loss"] == "hinge"
    assert settings["hflip"] == "false" and "g_attn" in settings and "sample_path" not in settings
    assert scores["d_loss"] == (2, pytest.approx(lines("b")[-1]["d_loss"]))


def test_a_run_that_resumes_is_one_run_to_tensorboard_with_each_picture_once(run):
    run(*RUN, "--total_step", 4, "--use_tensorboard", "true")
    before = lines("a")
    Path("models/a/0000004.pth").unlink()               # as if it had been killed: steps 3 and 4 are done again
    code, out, _ = run(*RUN, "--total_step", 6, "--use_tensorboard", "true")
    assert code == 0 and "from step 2" in out
    found = events()
    assert [event.step for event in found.Scalars("d_loss")] == [1, 2, 3, 4, 5, 6]
    assert [event.value for event in found.Scalars("d_loss")][:4] == pytest.approx([line["d_loss"] for line in before])
    _, runs = hparams()
    assert set(runs) == {"a"} and runs["a"][1]["d_loss"] == (6, pytest.approx(lines("a")[-1]["d_loss"]))

    assert set(found.Tags()["images"]) == KINDS
    for kind in KINDS:
        assert [event.step for event in found.Images(kind)] == [2, 4, 6]
    shown = found.Images("fake")[1]
    file = Image.open("samples/a/0000004_fake.png")
    with Image.open(io.BytesIO(shown.encoded_image_string)) as picture:
        assert picture.format == "JPEG" and picture.size == (shown.width, shown.height)
        assert max(picture.size) == min(boards.LONGEST, max(file.size))
        small, its = (np.asarray(image.convert("RGB").resize((8, 8), Image.Resampling.BOX), int)
                      for image in (file, picture))
        assert abs(small - its).max() < 25
    assert max(path.stat().st_size for path in Path("logs/a").glob("events*")) < 1_500_000


def test_a_picture_that_cannot_be_read_costs_no_training(run, monkeypatch):
    monkeypatch.setattr(boards, "_shrink", lambda path: (_ for _ in ()).throw(OSError("no")))
    code, out, _ = run(*RUN, "--total_step", 4, "--use_tensorboard", "true")
    assert code == 0 and out.count("cannot write TensorBoard pictures") == 1
    assert [event.step for event in events().Scalars("d_loss")] == [1, 2, 3, 4]


def test_a_tensorboard_that_cannot_be_opened_costs_only_its_events(run, monkeypatch):
    def missing(self):
        raise ModuleNotFoundError("No module named 'tensorboard'")

    monkeypatch.setattr(boards.TensorBoard, "_open", missing)
    monkeypatch.setattr(swd, "sliced_wasserstein", small_swd)
    code, out, _ = run(*RUN, "--total_step", 4, "--use_tensorboard", "true")
    assert code == 0 and out.count("cannot write TensorBoard events") == 1 and "metrics.jsonl" not in out
    assert [line["step"] for line in lines("a")] == [1, 2, 3, 4]
    code, out, _ = run("--version", "a", "--mode", "evaluate", "--metrics", "swd", "--num_eval", 8)
    assert code == 0 and "cannot write TensorBoard events" in out and "swd" in lines("a")[-1]


# ----------------------------------------------------------------------------------------------------------- wandb


def records(path):
    """The records of a .wandb file: a log of LevelDB's format, blocks of 32 KiB, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part = path.read_bytes(), 7, b""
    while position + 7 <= len(data):
        left = 32768 - position % 32768
        if left < 7:
            position += left
            continue
        _, length, kind = struct.unpack_from("<IHB", data, position)
        if kind == 0:
            break
        part += data[position + 7:position + 7 + length]
        position += 7 + length
        if kind in (1, 4):                              # whole, or the last part
            yield Record.FromString(part)
            part = b""


def sessions(version="a"):
    """[(id, name, config, {step of the run: {key: value}}), ...] of a run's offline wandb folders, the oldest first."""
    importlib.import_module("wandb").teardown()         # as at the end of a program: waits until all is written
    found = []
    for path in sorted(Path("logs", version, "wandb").glob("offline-run-*/*.wandb")):
        begun, history = None, {}
        for record in records(path):
            if record.HasField("run"):
                begun = record.run
            values = {item.key or "/".join(item.nested_key): json.loads(item.value_json)
                      for item in record.history.item}
            if values:
                history.setdefault(values["step"], {}).update(values)
        config = {entry.key: json.loads(entry.value_json) for entry in begun.config.update}
        found.append((begun.run_id, begun.display_name, config, history))
    return found


@pytest.fixture
def offline(monkeypatch):
    pytest.importorskip("wandb", reason="wandb is not installed")
    monkeypatch.setenv("WANDB_MODE", "offline")
    for name in ("WANDB_PROJECT", "WANDB_RUN_ID", "WANDB_DIR", "WANDB_API_KEY", "WANDB_SERVICE"):
        monkeypatch.delenv(name, raising=False)


def test_wandb_gets_numbers_pictures_and_settings_and_a_resumed_run_goes_on(run, offline):
    code, out, err = run(*RUN, "--total_step", 2, "--wandb", "true")
    assert code == 0 and "wandb: logs/a/wandb, offline" in out and "wandb" not in err
    assert run(*RUN, "--total_step", 4, "--wandb", "true")[0] == 0
    (first, name, config, before), (second, _, _, after) = sessions()
    assert first == second == Path("logs/a/wandb_id").read_text() and name == "a"
    assert config["g_lr"] == 0.0001 and config["dataset"] == "toy" and config["imsize"] == 32
    history = before | after
    assert {step for step, values in history.items() if "d_loss" in values} == {1, 2, 3, 4}
    assert [history[line["step"]]["d_loss"] for line in lines("a")] == pytest.approx([line["d_loss"]
                                                                                      for line in lines("a")])
    assert {step for step, values in history.items() if "fake/_type" in values} == {2, 4}
    assert history[4].keys() >= {f"{kind}/path" for kind in KINDS} and history[4]["fake/_type"] == "image-file"
    (picture,) = Path("logs/a/wandb").glob(f"offline-run-*/files/{history[4]['fake/path']}")
    with Image.open(picture) as shown:
        assert max(shown.size) <= boards.LONGEST and shown.format == "JPEG"
    code, out, _ = run(*RUN, "--total_step", 2, "--wandb", "true", "--restart", "true")
    assert code == 0 and len(sessions()) == 1 and sessions()[0][0] != first, "another run"


def test_who_is_not_logged_in_is_not_asked_but_logged_offline(run, offline, monkeypatch):
    monkeypatch.delenv("WANDB_MODE")
    monkeypatch.setenv("HOME", str(Path.cwd()))
    monkeypatch.setattr("sys.stdin.isatty", lambda: True, raising=False)
    code, out, _ = run(*RUN, "--total_step", 2, "--wandb", "true")
    assert code == 0 and "not logged in" in out and "wandb: logs/a/wandb, offline" in out and len(sessions()) == 1


def test_without_wandb_a_run_is_refused_before_it_begins(run, monkeypatch):
    find = importlib.util.find_spec
    for there in (None, SimpleNamespace(origin=None)):  # none, and a folder of that name
        monkeypatch.setattr(importlib.util, "find_spec",
                            lambda name, there=there: there if name == "wandb" else find(name))
        code, out, err = run(*RUN, "--total_step", 2, "--wandb", "true")
        assert (code, err) == (2, "error: --wandb true needs wandb: pip install wandb, or leave the flag out\n")
        assert not Path("models").exists() and not Path("logs").exists() and not Path("samples").exists()


def test_who_samples_needs_no_wandb(run, offline, monkeypatch):
    run(*RUN, "--total_step", 2, "--wandb", "true")
    monkeypatch.setattr(boards, "_is_installed", lambda: False)
    assert run("--version", "a", "--train", "false", "--num_samples", 1)[0] == 0


class Broken:
    """A wandb whose run raises at this call of `log`, or whose `init` does."""

    Error = type("Error", (Exception,), {})
    Settings = staticmethod(lambda **options: SimpleNamespace(**options))
    Image = staticmethod(lambda *_, **options: options)
    disabled = False

    def __init__(self, at):
        self.at, self.calls, self.ended, self.url, self.offline = at, 0, None, "https://example.org/run", False

    def login(self, prompt, verify):
        return not prompt and not verify

    def teardown(self):
        pass

    def init(self, **_):
        if self.at == 0:
            raise self.Error("no network")
        return self

    def define_metric(self, name, step_metric=None):
        pass

    def log(self, values):
        self.calls += 1
        if self.calls == self.at:
            raise ConnectionError("lost")

    def finish(self, exit_code):
        self.ended = exit_code


@pytest.mark.parametrize(("at", "words"), [(0, "Error: no network"), (2, "ConnectionError: lost")])
def test_a_wandb_that_fails_is_announced_and_ends_no_training(run, monkeypatch, at, words):
    broken = Broken(at)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setattr(boards, "_is_installed", lambda: True)
    code, out, _ = run(*RUN, "--total_step", 3, "--wandb", "true")
    assert code == 0 and out.count(f"warning: wandb: {words}; training continues without it") == 1
    assert broken.calls == at and len(lines("a")) == 3


def test_an_upload_without_end_does_not_hold_the_program_up(run, monkeypatch):
    import threading

    held, broken = threading.Event(), Broken(None)
    broken.finish = lambda exit_code: held.wait(30)
    monkeypatch.setitem(sys.modules, "wandb", broken)
    monkeypatch.setattr(boards, "_is_installed", lambda: True)
    monkeypatch.setattr(boards, "FINISH_TIMEOUT", 0.2)
    code, out, _ = run("--version", "a", "--total_step", 1, "--wandb", "true")
    held.set()
    assert code == 0 and "not all is uploaded yet" in out


@pytest.mark.soak
def test_only_the_first_of_several_processes_logs(tmp_path, monkeypatch, offline):
    monkeypatch.chdir(tmp_path)
    done = torchrun(MAIN, *TINY, *RUN, "--total_step", 2, "--wandb", "true")
    assert done.returncode == 0, done.stderr
    assert len(sessions()) == 1 and done.stdout.count("wandb:") == 1
