"""The ablation's command line: its variants, its flags, and what may follow the -- for main.py."""

if __name__ == "__main__":
    raise SystemExit("this file is a part of another program: python benchmarks/ablation.py --help")

import argparse
import importlib.util
import re
import shlex
import shutil
from dataclasses import dataclass
from pathlib import Path

import parameter
import report
from errors import UsageError
from flags.values import boolean, metrics, one_of
from metrics import swd


@dataclass(frozen=True)
class Variant:
    """One arm of the ablation: its name in tables, its flags, the ways to draw its metadata."""

    name: str
    flags: tuple
    draws: tuple = (None,)

    @property
    def slug(self):
        """Its name in paths."""
        return self.name.removeprefix("+").lower()


DRAWS = ("mix", "bank", "gauss")        # values of --metadata_sample; the first is the program's own default
VARIANTS = (
    Variant(report.BASELINE, ("--slae", "false", "--metadata", "false")),
    Variant("+SLAE", ("--slae", "true", "--metadata", "false")),
    Variant("+metadata", ("--slae", "false", "--metadata", "true"), DRAWS),
    Variant("both", ("--slae", "true", "--metadata", "true"), DRAWS),
)

# Flags of main.py that make the ablation what it is: not to be passed on after --.
OWN = ("model", "dataset", "image_path", "imsize", "seed", "total_step", "version", "mode", "train", "dry_run",
       "slae", "metadata", "metadata_sample", "num_samples", "pretrained_model", "log_path", "model_save_path",
       "sample_path", "metrics", "fake_dir", "real_dir", "restart", "model_save_step", "keep_checkpoints", "stop")
_TAKEN_AWAY = ("--slae", "--metadata", "--metadata_sample")     # of these, what a --variant may set


class Parser(argparse.ArgumentParser):
    """Hands mistakes on as UsageError."""

    def error(self, message):
        raise UsageError(re.sub(r"^argument (--\w+): ", r"\1: ", message))


def at_least(low):
    """A converter of whole numbers from `low` on."""

    def convert(text):
        if not re.fullmatch(r"\d+", text) or int(text) < low:
            raise argparse.ArgumentTypeError(f"'{text}' is no whole number of at least {low}")
        return int(text)

    return convert


def some(unit):
    """A converter of times: '2.5' -> 2.5 of this unit."""

    def convert(text):
        try:
            time = float(text)
        except ValueError:
            time = 0
        if not 0 < time < float("inf"):
            raise argparse.ArgumentTypeError(f"'{text}' is no number of {unit} over 0, such as 2.5")
        return time

    return convert


OTHERS = (Variant(report.BASELINE, ()),)        # of another model: as it is


def some_variants(text):
    """'baseline,+SLAE' -> those Variants, in the table's order."""
    name = one_of(*(variant.name for variant in VARIANTS))
    asked = [name(part) for part in text.split(",")]
    return tuple(variant for variant in VARIANTS if variant.name in asked)


def split_words(text):
    """Return the words of a command line. Raises ArgumentTypeError for an open quote."""
    try:
        return shlex.split(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r}: {error}") from None


def own_variant(text):
    """'half=--metadata_weight 0.5' -> a Variant: the model as it is by default, with these flags."""
    name, equals, flags = text.partition("=")
    if not equals or not re.fullmatch(r"[A-Za-z0-9][\w.-]*", name):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=FLAGS, such as small=--z_dim 64")
    words = tuple(split_words(flags))
    _refuse_own([word for word in words if word.partition("=")[0] not in _TAKEN_AWAY], f"in --variant {name}")
    if name.lower() in {variant.slug for variant in VARIANTS}:
        raise argparse.ArgumentTypeError(f"'{name}' is a variant of its own already; take another name")
    return Variant(name, words)


def _refuse_own(words, where, hint=lambda name: ""):
    """Raise UsageError for the first flag among `words` that the ablation sets itself."""
    for word in words:
        name = word.lstrip("-").partition("=")[0]
        if word.startswith("--") and name in OWN:
            raise UsageError(f"--{name} {where}: the ablation sets it for each run{hint(name)}")


def own_metrics(text):
    """'lpips,share --backtrack_steps 100' as it is: some of main.py's --metrics, then flags. swd is a column anyway."""
    names, *flags = split_words(text) or [""]
    if "swd" in metrics(names):
        raise argparse.ArgumentTypeError(f"'{text}': swd is a column of every ablation; leave it out")
    _refuse_own(flags, "in --evaluate")
    return shlex.join([",".join(metrics(names)), *flags])


def score_command(text):
    """A --score command as it is, refused where it could not work after hours of training."""
    words = split_words(text)
    if not all(any(word in part for part in words) for word in ("{real}", "{fake}")):
        raise argparse.ArgumentTypeError(f"{text!r} must name both folders, {{real}} and {{fake}}")
    if shutil.which(words[0]) is None:
        raise argparse.ArgumentTypeError(f"there is no program {words[0]}")
    program = words[1] if Path(words[0]).name.startswith("python") else ""
    if program.endswith(".py") and not Path(program).is_file():
        raise argparse.ArgumentTypeError(f"there is no file {program}")
    return text


def parse(argv):
    """(options, what follows --). Raises UsageError."""
    split = argv.index("--") if "--" in argv else len(argv)
    parser = Parser(
        prog="python benchmarks/ablation.py", allow_abbrev=False,
        usage="python benchmarks/ablation.py --image_path DIR --steps N [--flag VALUE ...] [-- FLAGS OF main.py]",
        description="Train FastGAN, +SLAE, +metadata and both, or variants of your own, at equal steps (or time) and "
                    "seeds, and compare them. The same command again goes on.")
    add = parser.add_argument
    add("--image_path", required=True, metavar="DIR", help="folder of training pictures")
    add("--model", type=one_of(*sorted(parameter.FAMILIES.keys() - {"fastgan"})), metavar="NAME",
        help="another model, whose baseline is it as it is, with the flags after --; compare it with --variant")
    add("--imsize", type=at_least(swd.SMALLEST), default=64, metavar="N",
        help="side of the pictures (default: 64 px)")
    length = parser.add_mutually_exclusive_group(required=True)
    length.add_argument("--steps", type=at_least(1), metavar="N", help="updates of G in each run")
    length.add_argument("--minutes", type=some("minutes"), metavar="N",
                        help="instead of --steps: wall time of each run's training, program start included; for "
                        "variants whose steps take unequally long")
    add("--seeds", type=at_least(1), default=3, metavar="N", help="seeds of each variant, from 0 on (default: 3)")
    add("--points", type=at_least(1), default=4, metavar="N",
        help="steps or times at which each run is scored, evenly spread, the last included (default: 4)")
    add("--until", metavar="COLUMN", help="more seeds, until the 95 %% interval of each variant's difference from the "
        "baseline in this column excludes 0, or --most seeds were trained")
    add("--most", type=at_least(1), default=16, metavar="N", help="seeds of each variant with --until (default: 16)")
    add("--variants", type=some_variants, metavar="NAMES",
        help="some of baseline,+SLAE,+metadata,both (default: all)")
    add("--variant", type=own_variant, action="append", default=[], metavar="NAME=FLAGS",
        help="one more variant: the model with these flags of main.py; may be given several times")
    add("--samples", type=at_least(2), default=1000, metavar="N",
        help="pictures drawn from each run for the scores (default: 1000)")
    add("--all_draws", type=boolean, nargs="?", const=True, default=False, metavar="BOOL",
        help="a row for each way to draw metadata: mix, bank, gauss (default: mix alone)")
    add("--score", type=score_command, action="append", default=[], metavar="COMMAND",
        help="a program with {real} and {fake} in its arguments, whose last line is a JSON object: "
             "its numbers become columns; may be given several times")
    add("--evaluate", type=own_metrics, metavar="METRICS",
        help="columns from main.py's --mode evaluate at the last step, such as lpips,share; flags may follow: "
             "'kid --feature_net vgg16 --num_eval 1000'")
    add("--jobs", type=at_least(1), default=1, metavar="N", help="trainings at once (default: 1)")
    add("--out", default="ablation", metavar="DIR", help="folder of all that this writes (default: ablation)")
    options = parser.parse_args(argv[:split])
    if not importlib.util.find_spec("scipy"):           # for the intervals, at the end of hours
        raise UsageError("the intervals need scipy: pip install -r benchmarks/requirements.txt")
    if Path(options.image_path).resolve() in [path := Path(options.out).resolve(), *path.parents]:
        raise UsageError(f"--out {options.out}: lies in --image_path, and would become training pictures")
    if options.model and options.variants:
        raise UsageError(f"--variants: are those of fastgan; with --model {options.model} name others with --variant")
    options.variants = options.variants or (OTHERS if options.model else VARIANTS)
    if options.until and report.BASELINE not in {variant.name for variant in options.variants}:
        raise UsageError(f"--until {options.until}: compares with the baseline; name it in --variants, too")
    if options.until not in (None, "swd", "steps", *report.COST) and not options.score and not options.evaluate:
        raise UsageError(f"--until {options.until}: needs a --score or --evaluate that has this column; without, there "
                         "is swd")
    extra = argv[split + 1:]
    options.variants += tuple(options.variant)
    if len({variant.slug for variant in options.variants}) < len(options.variants):
        raise UsageError("--variant: two of one name")
    _refuse_own(extra, "after --", lambda name: f"; give --{name} before the --" if name in ("image_path", "imsize")
                 else "; give --evaluate before the --" if name == "metrics" else "")
    return options, extra
