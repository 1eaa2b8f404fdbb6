"""The plain published way and this program after equal wall time, on the same pictures and machine, in one picture.

    python benchmarks/side_by_side.py --minutes 10 --image_path DIR [--model sagan] [--seed 0] [--out side_by_side]
                                      [--score "python score.py {real} {fake}"] [-- FLAGS OF main.py FOR THIS PROGRAM]

Left: the published settings, trained by `reference.py` (eager, fp32, nothing shared or fused), drawn by G as it trains,
as published. Right: `python main.py` with the flags after -- (on a CPU: --preset cpu), its start included. Each gets
the whole machine for --minutes, one after the other. Writes side_by_side.png, side_by_side.json and both sets of
--samples pictures into --out. The same command again goes on with what is missing.
"""

import argparse
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402
from PIL import Image  # noqa: E402

import parameter  # noqa: E402 - found through the line above
import report  # noqa: E402
from ablation_options import Parser, at_least, score_command  # noqa: E402
from data_loader import build_dataset, real_batches  # noqa: E402
from device import console, distributed  # noqa: E402
from errors import Failure  # noqa: E402
from gallery.grid import grid_side, save_grid, to_uint8  # noqa: E402
from processes import FOREVER, Children, exit_code_of, wait_for  # noqa: E402
from reference import PlainTrainer  # noqa: E402
from utils import write_atomically  # noqa: E402

NAMES = {"plain": "the plain published way", "ours": "this program"}


def train_plain(options, config, began):
    """Train the published settings the plain way until --minutes after `began`. Return {"steps": number}.

    Writes plain.png and the pictures in plain/.
    """
    place = distributed.start(config)
    trainer = PlainTrainer(config, place.device)
    fixed = torch.randn(options.samples, trainer.width, device=place.device)
    batches, steps = real_batches(config, build_dataset(config), 0, place.device), 0
    while time.time() - began < 60 * options.minutes:
        trainer.train_step(batches)
        steps += 1
    batches.close()
    with torch.no_grad():                               # G in training mode, as published
        images = torch.cat([trainer.G(z)[0] for z in fixed.split(64)])
    save_grid(images[:grid_side(config.imsize) ** 2], options.out / "plain.png")
    folder = options.out / "plain"
    folder.mkdir(exist_ok=True)
    for number, picture in enumerate(to_uint8(images)):
        Image.fromarray(picture).save(folder / f"{number:06d}.png")
    return {"steps": steps}


def train_ours(options, flags, began, log):
    """Train this program until --minutes after `began`, then draw. Return {"steps": number}."""
    folders = [word for kind in ("log", "model_save", "sample") for word in (f"--{kind}_path", options.out / kind)]
    for folder in folders[1::2]:                        # of a call that was interrupted: it had time already
        shutil.rmtree(folder, ignore_errors=True)
    command = [sys.executable, ROOT / "main.py", *flags, "--version", "ours", *folders]
    with open(log, "ab") as output:
        process = subprocess.Popen([*map(str, command), "--total_step", str(FOREVER)], stdout=output, stderr=output)
        wait_for(process, max(0, began + 60 * options.minutes - time.time()),
                 lambda process: process.send_signal(signal.SIGINT))            # it saves and ends
    if process.returncode != 130:
        raise Failure(f"main.py ended with exit code {process.returncode}; its output is in {log}")
    Children(1).run("main.py", [*command, "--train", "false", "--num_samples", options.samples, "--seed", 0], log)
    (drawn,) = (options.out / "sample" / "ours").glob("*_generated_seed0")
    drawn.with_suffix(".png").rename(options.out / "ours.png")
    drawn.rename(options.out / "ours")
    return {"steps": int(drawn.name.partition("_")[0])}


def score(options, side):
    """{column: number} of one side's pictures by the --score command, {} without one."""
    if not options.score:
        return {}
    return report.scores_by(options.score, options.real or options.image_path, options.out / side,
                            lambda words: Children(1).run("--score", words, options.out / "score.txt", capture=True))


def compare(options, extra):
    """Train, draw and score what is missing; write the record and the picture. Raises Failure, OSError."""
    options.out.mkdir(parents=True, exist_ok=True)
    record_path = options.out / "side_by_side.json"
    record = json.loads(record_path.read_text()) if record_path.exists() else {"hardware": report.hardware()}
    common = ["--dataset", "folder", "--image_path", options.image_path, "--model", options.model, "--seed",
              str(options.seed)]
    config = parameter.resolve(parameter.parse([*common, "--precision", "fp32"]))
    for side in NAMES:
        if side not in record:
            print(f"{NAMES[side]}: training for {options.minutes:g} min", flush=True)
            began = time.time()
            found = (train_plain(options, config, began) if side == "plain"
                     else train_ours(options, [*common, *extra], began, options.out / "ours.txt"))
            record[side] = {"minutes": options.minutes, **found, **score(options, side)}
            write_atomically(record_path, lambda path: path.write_text(json.dumps(record, indent=2) + "\n"))
        print(f"{NAMES[side]}: {', '.join(f'{name} {value}' for name, value in record[side].items())}", flush=True)
    lines = {side: [f"{record[side]['steps']:,} steps in {record[side]['minutes']:g} min",
                    *(f"{name} {report.number(record[side][name])}" for name in ("kid", "fd", "coverage")
                      if name in record[side])] for side in NAMES}
    report.picture([(NAMES[side], options.out / f"{side}.png", lines[side]) for side in NAMES],
                   options.out / "side_by_side.png")


def main(argv):
    """Run the command line `argv` and return the exit code."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(prog="python benchmarks/side_by_side.py", description=__doc__, allow_abbrev=False,
                    formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--minutes", type=float, required=True, metavar="N", help="wall time of each side")
    add("--image_path", required=True, metavar="DIR", help="folder of training pictures")
    add("--model", default="sagan", metavar="NAME", help="family (default: sagan)")
    add("--seed", type=at_least(0), default=0, metavar="N", help="seed of both (default: 0)")
    add("--samples", type=at_least(64), default=300, metavar="N", help="pictures drawn by each (default: 300)")
    add("--real", metavar="DIR", help="pictures to score against (default: the training pictures)")
    add("--score", type=score_command, metavar="COMMAND", help="as benchmarks/ablation.py's")
    add("--out", type=Path, default=Path("side_by_side"), metavar="DIR", help="folder of all that this writes")

    def do():
        compare(parser.parse_args(argv[:split]), argv[split + 1:])
        return 0

    return exit_code_of(do)


if __name__ == "__main__":
    console.run(main)
