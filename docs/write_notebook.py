"""Writes docs/colab.ipynb, the notebook for Colab, Kaggle and Jupyter: `python docs/write_notebook.py`."""

import json
import textwrap
from pathlib import Path

NOTEBOOK = Path(__file__).with_name("colab.ipynb")

# (kind of cell, its text), from top to bottom
CELLS = [("markdown", """
    # SAGAN and SLAE-FastGAN in a notebook

    Trains on your pictures, shows the page of the run, goes on after a disconnect, samples and exports. Choose a GPU
    first (Colab: *Runtime, Change runtime type*; Kaggle: *Settings, Accelerator*), set the next cell, then run all
    cells from top to bottom.
"""), ("code", """
    # The pictures: a folder (one subfolder a class, if there are classes), a .zip, or "toy", faces drawn by code.
    # Colab: upload a zip in the folder view at the left: "/content/pictures.zip"; or "/content/drive/MyDrive/x.zip".
    # Kaggle: "/kaggle/input/NAME".
    PICTURES = "toy"
    # The flags of main.py, see docs/flags.md. Some hundred pictures: "--model fastgan --imsize 256"; thousands:
    # "--imsize 64" or "--imsize 128"; with classes: "--arch resnet --imsize 64". Without a GPU add "--preset cpu".
    FLAGS = "--imsize 64"
    STEPS = 20000
    VERSION = "mine"
    # Where the run is kept. On Colab "/content/drive/MyDrive/gan" outlasts a disconnect; Kaggle: "/kaggle/working".
    KEEP = "."
    # The address for `git clone`; "" if this notebook lies in a copy of the program.
    REPOSITORY = ""
"""), ("markdown", """
    ## Set up
"""), ("code", """
    import html
    import os
    import shlex
    import signal
    import subprocess
    import sys
    import time
    from pathlib import Path

    from IPython.display import HTML, Image, display

    if any(folder.startswith("/content/drive") for folder in (PICTURES, KEEP)) and not Path("/content/drive").exists():
        from google.colab import drive
        drive.mount("/content/drive")
    START = globals().get("START", os.getcwd())     # the same when the cells run again
    os.chdir(START)
    if PICTURES != "toy":
        PICTURES = os.path.abspath(PICTURES)
    if not Path("main.py").exists():
        if REPOSITORY and not Path("gan").exists():
            subprocess.run(["git", "clone", "--depth", "1", REPOSITORY, "gan"], check=True)
        os.chdir("gan" if REPOSITORY else "..")
    if not Path("main.py").exists():
        sys.exit("There is no program here: give REPOSITORY in the first cell, and run all cells again.")
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", "-r", "requirements.txt"], check=True)

    DATA = ["--dataset", "toy"] if PICTURES == "toy" else ["--dataset", "folder", "--image_path", PICTURES]
    RUN = ["--version", VERSION]
    for flag, folder in (("sample", "samples"), ("model_save", "models"), ("log", "logs")):
        RUN += [f"--{flag}_path", str(Path(KEEP, folder))]
    PAGE = Path(KEEP, "samples", VERSION, "index.html")

    def run(*flags):
        \"\"\"Run main.py and show what it prints.\"\"\"
        done = subprocess.run([sys.executable, "main.py", *RUN, *map(str, flags)], text=True, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT)
        print(done.stdout)
        if done.returncode:
            raise SystemExit(f"exit code {done.returncode}")

    TRAINING = [*DATA, *shlex.split(FLAGS), "--total_step", STEPS]
    run(*TRAINING, "--dry_run")         # parameters, pictures, device, and the memory of a step
"""), ("markdown", """
    ## Train

    Training runs in the background, so that the cells below can be used meanwhile. **After a disconnect run all cells
    again**: with `KEEP` on a disk that lasts, the run goes on from its newest checkpoint.
"""), ("code", """
    with open("training.txt", "w") as output:
        training = subprocess.Popen([sys.executable, "main.py", *RUN, *map(str, TRAINING)], stdout=output,
                                    stderr=subprocess.STDOUT)
    for _ in range(60):
        time.sleep(1)
        if training.poll() is not None:
            break
    print(Path("training.txt").read_text()[-2000:])
"""), ("markdown", """
    ## Look

    The page of the run with its newest records, once the first is there. Run this cell again for newer ones.
"""), ("code", """
    from gallery.page import as_one_file

    print(Path("training.txt").read_text()[-200:])
    if PAGE.exists():
        page = html.escape(as_one_file(PAGE))
        display(HTML(f'<iframe srcdoc="{page}" width="100%" height="900" style="border: 0"></iframe>'))
    else:
        print("no record yet: run this cell again in a minute")
"""), ("markdown", """
    ## Wait for the end, or stop

    The next cell waits. To stop earlier, interrupt it (the square button): the run then saves, and goes on when all
    cells are run again.
"""), ("code", """
    try:
        training.wait()
    except KeyboardInterrupt:
        training.send_signal(signal.SIGINT)
        training.wait()
    print(Path("training.txt").read_text()[-2000:])
"""), ("markdown", """
    ## Sample
"""), ("code", """
    run("--mode", "sample", "--num_samples", 64)
    display(Image(max(PAGE.parent.glob("*_generated_seed0.png"))))
"""), ("code", """
    run("--mode", "interpolate")
    display(Image(max(PAGE.parent.glob("*_interpolation_seed0.webp")).read_bytes(), format="webp"))
"""), ("markdown", """
    ## Take it away

    The generator as ONNX, safetensors and TorchScript, with a README on their use; then everything as one zip.
"""), ("code", """
    packages = ["onnx", "onnxscript", "onnxruntime", "safetensors"]
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", *packages], check=True)
    run("--mode", "export")
"""), ("code", """
    import shutil

    archive = shutil.make_archive(VERSION, "zip", PAGE.parent)
    print(archive)
    try:
        from google.colab import files
        files.download(archive)
    except ImportError:
        pass                            # Kaggle: the Output panel; Jupyter: beside this program
""")]


def text():
    """Return the notebook as JSON."""
    cells = []
    for number, (kind, source) in enumerate(CELLS):
        cell = {"cell_type": kind, "id": f"cell-{number}", "metadata": {},
                "source": textwrap.dedent(source).strip().splitlines(keepends=True)}
        cells.append(cell | ({"execution_count": None, "outputs": []} if kind == "code" else {}))
    kernel = {"display_name": "Python 3", "language": "python", "name": "python3"}
    metadata = {"accelerator": "GPU", "kernelspec": kernel, "language_info": {"name": "python"}}
    return json.dumps({"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}, indent=1) + "\n"


if __name__ == "__main__":
    NOTEBOOK.write_text(text(), encoding="utf-8")
    print(f"written: docs/{NOTEBOOK.name}")
