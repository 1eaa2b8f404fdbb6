"""docs/colab.ipynb, the notebook for Colab and Kaggle, at a tiny size.

Its first cells run in this process, where starts of a kernel and of programs would take most of the time; the tests of
soak execute it from its first to its last cell as it is.
"""

import re
import runpy
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from conftest import MAIN, lines, small_disk_at

from storage import checkpoint

ROOT = Path(MAIN).parent
TINY = ("--imsize 32 --batch_size 4 --g_conv_dim 4 --d_conv_dim 4 --z_dim 8 --sample_step 2 --model_save_step 2 "
        "--num_workers 0 --device cpu")
LEFT_OUT = shutil.ignore_patterns(".*", "*.png", "tests", "samples", "models", "logs", "cache", "attn", "__pycache__")


def outputs_of(cell):
    """{mime type: what the cell shows}, printed text included."""
    shown = {}
    for output in cell.outputs:
        for kind, data in ({"text/plain": output.text} if output.output_type == "stream" else output.data).items():
            shown[kind] = shown.get(kind, "") + data
    return shown


def notebook_with(source, settings):
    """A notebook with these settings in its first code cell."""
    notebook = pytest.importorskip("nbformat").read(source, as_version=4)
    first = next(cell for cell in notebook.cells if cell.cell_type == "code")
    for name, value in settings.items():
        first.source, count = re.subn(rf"^{name} = .*$", lambda _, line=f"{name} = {value!r}": line, first.source,
                                      flags=re.MULTILINE)
        assert count == 1, name
    return notebook


def executed(source, folder, cells=None, **settings):
    """What each code cell shows after the notebook, or its first `cells` cells, ran with these settings."""
    notebook = notebook_with(source, settings)
    notebook.cells = notebook.cells[:cells]
    nbclient = pytest.importorskip("nbclient")
    nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(folder)}}).execute()
    return [outputs_of(cell) for cell in notebook.cells if cell.cell_type == "code"]


def code_of(**settings):
    """The text of each code cell, with these settings."""
    notebook = notebook_with(ROOT / "docs/colab.ipynb", settings)
    return [cell.source for cell in notebook.cells if cell.cell_type == "code"]


def test_the_notebook_is_the_written_one():
    written = runpy.run_path(str(ROOT / "docs/write_notebook.py"))["text"]()
    assert (ROOT / "docs/colab.ipynb").read_text(encoding="utf-8") == written, "python docs/write_notebook.py"


def test_without_the_program_it_says_what_to_give(tmp_path, monkeypatch):
    (tmp_path / "empty").mkdir()
    monkeypatch.chdir(tmp_path / "empty")
    first, setup, *_ = code_of()
    names = {}
    exec(first, names)
    with pytest.raises(SystemExit, match="give REPOSITORY in the first cell"):
        exec(setup, names)


def test_it_trains_on_a_zip(run, pictures, tmp_path, monkeypatch, capsys):
    """Settings, setup, training."""
    (tmp_path / "docs").mkdir()
    (tmp_path / "main.py").touch()
    monkeypatch.chdir(tmp_path / "docs")
    called, given = [], []

    def call(command, stdout=None, **_):
        called.append(command[1])
        code, out, err = run(*command[2:], tiny=False) if command[1] == "main.py" else (0, "", "")
        if stdout:                                      # a file
            stdout.write(out + err)
        return SimpleNamespace(stdout=out + err, returncode=code, poll=lambda: code)

    names = {"subprocess": SimpleNamespace(run=call, Popen=call, PIPE=None, STDOUT=None)}
    archive = shutil.make_archive(tmp_path / "mine", "zip", pictures)
    for cell in code_of(PICTURES=archive, FLAGS=TINY, KEEP=str(tmp_path / "kept"), STEPS=4)[:3]:
        exec(cell.replace("import subprocess\n", ""), names)
        given.append(capsys.readouterr().out)
    _, setup, training = given
    assert called == ["-m", "main.py", "main.py"], "pip, a dry run, the training"
    assert "12 pictures in" in setup and "done: 4 steps" in training
    assert checkpoint.steps_in(tmp_path / "kept/models/mine") == [2, 4]


@pytest.fixture
def program(pictures, tmp_path):
    """(The folder of a copy of the program, the notebook's settings for it.)"""
    folder = tmp_path / "program"
    shutil.copytree(ROOT, folder, ignore=LEFT_OUT)
    archive = shutil.make_archive(tmp_path / "mine", "zip", pictures)
    return folder, {"PICTURES": archive, "FLAGS": TINY, "KEEP": str(tmp_path / "kept")}


@pytest.mark.soak
def test_it_trains_shows_samples_and_exports(program, tmp_path, monkeypatch):
    folder, settings = program
    shown = executed(folder / "docs/colab.ipynb", folder / "docs", STEPS=4, **settings)
    _, setup, training, page, end, samples, video, export, taken = shown
    assert "memory of a step: about" in setup["text/plain"] and "12 pictures in" in setup["text/plain"]
    assert "done: 4 steps" in training["text/plain"] and "done: 4 steps" in end["text/plain"]
    assert page["text/html"].startswith("<iframe srcdoc=") and "data:image/png;base64" in page["text/html"]
    assert "image/png" in samples and "image/webp" in video
    assert checkpoint.steps_in(tmp_path / "kept/models/mine") == [2, 4]
    names = {path.name for path in tmp_path.glob("kept/samples/mine/*_export/*")}
    assert names >= {"G.onnx", "G.safetensors", "G.ts.pt"}
    assert "index.html" in zipfile.ZipFile(taken["text/plain"].split()[0]).namelist()
    monkeypatch.chdir(tmp_path / "kept")
    assert lines("mine")[-1]["step"] == 4


@pytest.mark.soak
def test_after_a_disconnect_it_goes_on(program):
    folder, settings = program
    for steps, said in ((4, "done: 4 steps"), (6, "resuming 'mine' from step 4")):
        *_, training = executed(folder / "docs/colab.ipynb", folder / "docs", cells=6, STEPS=steps, **settings)
        assert said in training["text/plain"]
    assert "done: 6 steps" in training["text/plain"]


KAGGLE = """
mount -t tmpfs -o size=2m tmpfs /dev/shm && mount -o remount,ro input && cd working || exit 77
"$0" "$1" --dataset folder --image_path ../input/pictures --version a --total_step 4 $2 || exit 1
"$0" "$1" --version a --mode sample --num_samples 4 || exit 2
"$0" "$1" --version a --total_step 200 --model_save_step 1 --keep_checkpoints 99
"""


@pytest.mark.soak
def test_a_read_only_input_little_shared_memory_and_a_small_disk_as_on_kaggle(pictures, tmp_path):
    """The run trains, samples, and when the disk is full ends with 5 and whole checkpoints."""
    with small_disk_at(tmp_path / "input", "8m") as given, small_disk_at(tmp_path / "working", "12m") as disk:
        shutil.copytree(pictures, given / "pictures")
        flags = TINY.replace("--num_workers 0", "--num_workers 2")
        done = subprocess.run(["unshare", "-m", "bash", "-c", KAGGLE, sys.executable, MAIN, flags], cwd=tmp_path,
                              capture_output=True, text=True)
        if done.returncode == 77:
            pytest.skip("cannot mount here")
        assert done.returncode == 5 and "Free some space" in done.stderr, done.stdout + done.stderr
        assert "decoded cache" in done.stdout and not (given / "pictures/.decoded").exists()
        assert len(list(disk.glob("samples/a/*_seed0/*.png"))) == 4
        newest = checkpoint.steps_in(disk / "models/a")[-1]
        assert newest > 4 and checkpoint.load(checkpoint.path_of(disk / "models/a", newest))["step"] == newest
