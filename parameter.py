"""The command line read, the presets filled in, the whole checked.

    typed  = parse(argv)              what the user wrote, nothing else
    config = resolve(typed, find)     command line > --config > the run's own saved config > preset > default

A `Config` is read-only from then on. `flags.py` holds the flags.
"""

import argparse
import difflib
import json
import os
import re
from pathlib import Path

from failures import UsageError
from flags import (
    BY_NAME,
    DURING_TRAINING,
    FIXED,
    FLAGS,
    IMSIZES,
    OF_FOLDERS,
    PER_CALL,
    PRESETS,
    boolean,
    boolean_or_auto,
)


def g_feature_sizes(imsize):
    """Heights of G's feature maps, in the order that they are computed: 4, 8, ..., imsize / 2."""
    return [2**power for power in range(2, imsize.bit_length() - 1)]


def d_feature_sizes(imsize):
    """Heights of D's feature maps: imsize / 2, ..., 8, 4."""
    return g_feature_sizes(imsize)[::-1]


class Config(argparse.Namespace):
    """The resolved settings, one attribute per flag; read-only."""

    def __setattr__(self, name, value):
        raise AttributeError(f"the config is read-only: {name}")

    def __delattr__(self, name):
        raise AttributeError(f"the config is read-only: {name}")

    @classmethod
    def of(cls, values):
        config = cls()
        config.__dict__.update(values)
        return config


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UsageError(re.sub(r"^argument (--\w+): ", r"\1: ", message))


def parse(argv):
    """{flag: value} of what `argv` holds and nothing else. Raises UsageError."""
    parser = _Parser(
        prog="python main.py", usage="python main.py [--flag VALUE ...]",
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train SAGAN or SLAE-FastGAN and look at what it attends to. The same command again goes on with "
                    "the run.",
        epilog="exit codes: 0 done, 1 unexpected, 2 usage, 3 data, 4 non-finite loss, 5 checkpoint or disk, "
               "6 run folder in use, 130/143 interrupted after saving",
    )
    for title, flags in FLAGS.items():
        group = parser.add_argument_group(f"--model {title} only" if title in PRESETS else title)
        for flag in flags:
            # a bare `--dry_run` means true, as people type it
            bare = {"nargs": "?", "const": True} if flag.type in (boolean, boolean_or_auto) else {}
            shown = f" (default: {defaults(flag)})" if defaults(flag) else ""
            group.add_argument(f"--{flag.name}", type=flag.type, metavar=flag.metavar,
                               help=(flag.help + shown).replace("%", "%%"), **bare)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        nearest = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), BY_NAME, n=1, cutoff=0.5)
        hint = f"did you mean --{nearest[0]}?" if nearest else "see python main.py --help"
        raise UsageError(f"unknown flag {name}: {hint}")
    return vars(namespace)


def defaults(flag):
    """What a flag is when nothing sets it, in words: `64`, or `64; fastgan: 8`; empty where the help says it."""
    words = [] if flag.default is None else [written(flag.default)]
    words += [f"{model}: {written(preset['published'][flag.name])}" for model, preset in PRESETS.items()
              if flag.name in preset["published"]]
    return "; ".join(words)


def written(value):
    """A setting as the command line writes it."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, (tuple, list)):
        nested = value and isinstance(value[0], (tuple, list))
        return (";" if nested else ",").join(map(written, value)) or "none"
    return str(value)


def resolve(typed, find_saved=lambda folder: None, weights_there=lambda weights: False):
    """The full, checked Config of what the user typed.

    `find_saved(folder)` returns the config of the run whose checkpoints lie in `folder`, or None; its settings
    fill what was not typed, so that a run goes on, or is sampled, without repeating its flags.
    `weights_there(weights)` says whether these `--vgg_weights` can be had without a network.
    Raises UsageError.
    """
    typed = dict(typed)
    if "train" in typed and "mode" not in typed:
        typed["mode"] = "train" if typed["train"] else "sample"
    elif "train" in typed and typed["train"] != (typed["mode"] == "train"):
        raise UsageError(f"--train {written(typed['train'])} and --mode {typed['mode']} contradict each other")
    given = {**_read_file(typed["config"]), **typed} if typed.get("config") else typed

    values = {flag.name: flag.default for flag in BY_NAME.values()} | given
    version = values["version"] or f"{values['model']}_{values['dataset']}"
    _check_version(version)
    of_run = not (values["fake_dir"] and values["real_dir"])
    saved = find_saved(Path(values["model_save_path"]) / version) if of_run else None
    known = {name: _as_flag(name, value, "the run's saved config") for name, value in (saved or {}).items()
             if name in BY_NAME and name not in PER_CALL
             and not (name == "metrics" and values["mode"] == "evaluate")} | given
    model, preset = (known.get(name, values[name]) for name in ("model", "preset"))
    values.update(PRESETS[model][preset] | known)
    values["version"] = version
    if values["fake_dir"]:
        values["imsize"] = known.get("imsize")          # None: that of the folder's pictures
    _keep_to_model(values, typed)
    _fill_in(values, weights_there)
    validate(values)
    if values["dataset"] == "folder" and "image_path" not in {**(saved or {}), **given} and not values["real_dir"]:
        raise UsageError("--dataset folder: say where the pictures are with --image_path DIR")
    if saved:
        _check_fixed(values, saved, values["version"])
    return Config.of(values)


def _read_file(path):
    """The settings in a JSON file, converted as if typed, less those that describe one call."""
    try:
        with open(path, encoding="utf-8") as file:
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: holds no JSON object of settings")
    unknown = [name for name in settings if name not in BY_NAME]
    if unknown:
        raise UsageError(f"--config {path}: unknown setting '{unknown[0]}'")
    return {name: _as_flag(name, value, f"--config {path}") for name, value in settings.items()
            if name not in PER_CALL and value is not None}


def _as_flag(name, value, source):
    """A setting read from JSON in the type that its flag has."""
    flag = BY_NAME[name]
    if value is None:
        return None
    try:
        return flag.type(written(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{source}: {name} {value!r} is no value for --{name} ({error})") from None


def _keep_to_model(values, typed):
    """Set what means nothing to this model to None; raise UsageError if it was typed. Changes `values`."""
    for flag in BY_NAME.values():
        if flag.model in (None, values["model"]):
            continue
        if flag.name in typed:
            raise UsageError(f"--{flag.name} is for --model {flag.model}, this is {values['model']}; leave it out")
        values[flag.name] = None


def _fill_in(values, weights_there):
    """Replace every default that depends on other flags. Changes `values`."""
    wgan = values["adv_loss"] == "wgan-gp"
    if values["d_iters"] is None:
        values["d_iters"] = 5 if wgan else 1
    if values["sn"] == "auto":
        values["sn"] = "none" if wgan else "both"
    if values["vgg_weights"] is None:                   # in the saved config of a SAGAN of before it had the flag
        values["vgg_weights"] = "imagenet"
    imsize = values["imsize"] or 64                     # None for folders alone, which ask for no network
    if values["model"] == "sagan" and values["g_attn"] is None:
        values["g_attn"] = (imsize // 4, imsize // 2)
    if values["model"] == "sagan" and values["d_attn"] is None:
        values["d_attn"] = (max(4, imsize // 16), max(8, imsize // 8))
    if values["model"] == "fastgan" and values["recon"] is None:
        # metadata from ImageNet's weights will fetch them, or the run ends there
        there = values["metadata"] and values["vgg_weights"] == "imagenet" or weights_there(values["vgg_weights"])
        values["recon"] = "lpips" if there else "l1"
    values["train"] = values["mode"] == "train"


def validate(values):
    """Raise UsageError for the first setting that cannot work. `values` is a full {flag: value}."""
    for flag in BY_NAME.values():
        value = values[flag.name]
        if isinstance(value, float) and value != value:
            raise UsageError(f"--{flag.name} nan: give a number")
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            if flag.low is not None and value < flag.low:
                raise UsageError(f"--{flag.name} {value}: must be at least {flag.low}")
            if flag.high is not None and value > flag.high:
                raise UsageError(f"--{flag.name} {value}: must be at most {flag.high}")
    for name in ("beta1", "beta2", "ema_decay"):
        if not 0 <= values[name] < 1:
            raise UsageError(f"--{name} {values[name]}: must be in [0, 1)")
    _check_evaluation(values)
    imsize, model = values["imsize"] or 64, values["model"]
    if imsize not in IMSIZES[model] and not values["fake_dir"]:
        *others, last = IMSIZES[model]
        raise UsageError(f"--imsize {imsize}: must be {', '.join(map(str, others))} or {last} with --model {model}")
    if values["mode"] == "style_mix" and model != "fastgan":
        raise UsageError(f"--mode style_mix: swaps the maps that drive skip layers, and {model} has none")
    if values["slae_kernel"] not in (None, 3, 7):
        raise UsageError(f"--slae_kernel {values['slae_kernel']}: must be 3 or 7")
    if model == "fastgan" and values["adv_loss"] == "wgan-gp":
        raise UsageError("--adv_loss wgan-gp: a penalty per sample, and fastgan's D has batch norm; use hinge")
    for name, there in (("g_attn", g_feature_sizes(imsize)), ("d_attn", d_feature_sizes(imsize))):
        wrong = [size for size in values[name] or () if size not in there]
        if wrong and not values["fake_dir"]:
            raise UsageError(f"--{name} {written(values[name])}: at --imsize {imsize} the feature sizes are "
                             f"{written(there)}; there is no {wrong[0]}")
    world = _processes()
    if world > 1 and values["mode"] == "evaluate" and "cost" in values["metrics"]:
        raise UsageError("--metrics cost: is measured on one device; start it without torchrun and --parallel")
    parts = world * values["accumulate"]
    if values["batch_size"] % parts and values["mode"] == "train":
        of = " times ".join([f"the {world} processes"] * (world > 1) + [f"--accumulate {values['accumulate']}"] *
                            (values["accumulate"] > 1))
        raise UsageError(f"--batch_size {values['batch_size']} must be a multiple of {of}")
    _check_device(values)


def _check_evaluation(values):
    """Raise UsageError where the metrics do not fit what they shall be taken of."""
    mode, chosen = values["mode"], values["metrics"]
    for name in ("fake_dir", "real_dir"):
        if values[name] and mode != "evaluate":
            raise UsageError(f"--{name} {values[name]}: is for --mode evaluate")
    for allowed, applies, where in (
            (DURING_TRAINING, mode == "train" and values["metric_step"], "cannot be taken during training, only "
             "by --mode evaluate"),
            (OF_FOLDERS, values["fake_dir"], "cannot be taken of --fake_dir, only of a run")):
        wrong = [name for name in chosen if name not in allowed]
        if applies and wrong:
            raise UsageError(f"--metrics {written(chosen)}: {' and '.join(wrong)} {where}")
    if values["against"] and "cost" not in chosen:
        raise UsageError(f"--against {values['against']}: compares what runs cost; add --metrics cost")
    if values["backtrack_metadata"] and not values["metadata"]:
        raise UsageError("--backtrack_metadata true: this run has no metadata; leave it out")
    imsize = values["imsize"]
    if values["fake_dir"] and imsize is not None and not 16 <= imsize <= 4096:
        raise UsageError(f"--imsize {imsize}: must be from 16 to 4096 with --fake_dir")


def _check_version(version):
    if not version or len(version) > 100 or version[0] in ".-" or re.search(r"[/\\:\x00-\x1f]", version):
        raise UsageError(f"--version {version!r}: use a plain name of up to 100 characters, without / \\ : "
                         "and not beginning with . or -")


def _processes():
    """How many processes torchrun started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_device(values):
    device = values["device"]
    if not re.fullmatch(r"auto|cpu|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: use auto, cpu, cuda or cuda:N")
    if device in ("auto", "cpu") and not values["parallel"]:
        return
    import torch  # here alone, so that --help and most mistakes answer at once

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            there = f"CUDA devices here: {count}" if count else "no CUDA device here"
            raise UsageError(f"--device {device}: {there}; use --device auto or cpu")
    if values["parallel"] and _processes() == 1 and (count < 2 or device == "cpu"):
        raise UsageError(f"--parallel true: needs two or more CUDA devices, found {count}; leave it out, or start "
                         "processes yourself with torchrun --nproc_per_node=2 main.py ...")


def _check_fixed(values, saved, version):
    for name in FIXED:
        if name == "vgg_weights" and not (values["metadata"] and values["mode"] == "train"):
            continue                                    # here they are for metrics and reconstructions
        if name == "imsize" and values["fake_dir"]:
            continue
        if name in saved and written(values[name]) != written(saved[name]):
            raise UsageError(f"--{name} {written(values[name])}: run '{version}' was started with "
                             f"{written(saved[name])}; use that, or another --version")


def as_json(config):
    """The config as text that `--config` reads back."""
    return json.dumps(vars(config), indent=2, sort_keys=True) + "\n"
