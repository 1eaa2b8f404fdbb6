"""Parse the command line, fill in presets and defaults, check the result.

    typed  = parse(argv)              only the flags that the user typed
    config = resolve(typed, find)     command line > --config > the run's own saved config > preset > default

A `Config` is read-only from then on. The flags themselves are in flags/.
"""

import argparse
import difflib
import json
import math
import os
import re
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace

from errors import CheckpointError, UsageError
from flags import common
from flags.common import MODELS
from flags.pictures import check_size, sides
from flags.scores import METRICS
from flags.values import boolean, boolean_or_auto, one_of, written

# {--model: its module in flags/}, the default model first
FAMILIES = {model: import_module(f"flags.{model}") for model in MODELS}
FAMILIES = dict(sorted(FAMILIES.items(), key=lambda row: not row[1].IS_DEFAULT))


def _with_families(flag):
    """Return the flag with `{families}` in its help replaced by each family's text; --model gets its choices too."""
    if flag.name == "model":
        text = " | ".join(f"{model} ({family.HELP['model']})" for model, family in FAMILIES.items())
        return replace(flag, type=one_of(*FAMILIES), default=next(iter(FAMILIES)), help=text)
    text = ", ".join(f"{model} {family.HELP[flag.name]}" for model, family in FAMILIES.items()
                     if flag.name in family.HELP)
    return replace(flag, help=flag.help.replace("{families}", text))


GROUPS = {}         # {title: flags}, in the order of --help; a family's title is its name
for _title, _flags in common.FLAGS.items():
    GROUPS[_title] = tuple(map(_with_families, _flags))
    if _title == "network":
        GROUPS |= {model: family.FLAGS for model, family in FAMILIES.items()}
FLAGS = {flag.name: flag for group in GROUPS.values() for flag in group}
# The settings that training depends on: a resumed run reports which of them changed.
RUN_SETTINGS = tuple(flag.name for title, group in GROUPS.items() for flag in group
                     if title not in ("records", "evaluation", "from a checkpoint") and not flag.per_call)


NAMED = 10                  # runs listed in a message, at most
LARGEST = 2**31 - 1         # of a whole number whose flag names no limit
RESERVED = ("index.html", "scores.jsonl", "scores.md")      # files of ours beside the folders of the runs


EXTRA_MODES = {mode for family in FAMILIES.values() for mode in family.EXTRA_MODES}


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


_KINDS = {"int": "whole number", "float": "number"}


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        message = re.sub(r"invalid (int|float) value: (.+)$", lambda wrong: f"{wrong[2]} is no {_KINDS[wrong[1]]}",
                         message)
        without = re.match(r"argument (--\w+): expected one argument$", message)
        if without and without[1] in self.argv:
            following = self.argv[self.argv.index(without[1]) + 1:][:1]
            if following and following[0].lstrip("-").partition("=")[0] not in FLAGS:
                message += f"; write {without[1]}={following[0]} for a value that begins with -"
        raise UsageError(_escaped(re.sub(r"^argument (--\w+): ", r"\1: ", message)))


def _escaped(text):
    """The text on one line: line breaks and other control characters that a user typed as escapes such as \\n."""
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def parse(argv):
    """Return {flag: value} of the flags in `argv` only. Raise UsageError."""
    parser = _Parser(
        prog="python main.py", usage="python main.py [--flag VALUE ...]",
        allow_abbrev=False, argument_default=argparse.SUPPRESS,
        description="Train a GAN on your pictures and show what its networks attend to. To resume a run, give the same "
                    "command again.",
        epilog="exit codes: 0 done, 1 unexpected, 2 usage, 3 data, 4 not finite, or ranks that differ, 5 checkpoint or "
               "disk, 6 run folder in use, 7 another rank was lost, 128 + signal: interrupted, after saving",
    )
    for title, flags in GROUPS.items():
        group = parser.add_argument_group(f"--model {title} only" if title in FAMILIES else title)
        for flag in flags:
            # a boolean flag without a value, such as a bare `--dry_run`, means true
            values = {"nargs": "?", "const": True} if flag.type in (boolean, boolean_or_auto) else {}
            if flag.several:
                values = {"nargs": "+", "action": "extend"}
            default = f" (default: {defaults(flag)})" if defaults(flag) else ""
            group.add_argument(f"--{flag.name}", type=flag.type, metavar=flag.metavar,
                               help=(flag.help + default).replace("%", "%%"), **values)
    parser.argv = list(argv)
    namespace, unknown = parser.parse_known_args(argv)
    if unknown:
        name = unknown[0].split("=")[0]
        if not name.startswith("-"):
            raise UsageError(_escaped(f"'{name}' belongs to no flag: a list has commas, such as --classes cat,dog, and "
                                      "--image_path takes one folder"))
        nearest = difflib.get_close_matches(name.lstrip("-").replace("-", "_"), FLAGS, n=1, cutoff=0.7)
        hint = f"did you mean --{nearest[0]}?" if nearest else "see python main.py --help"
        raise UsageError(_escaped(f"unknown flag {name}: {hint}"))
    return vars(namespace)


def defaults(flag):
    """Return the flag's default as text: `64`, or `64; fastgan: 8`; empty where its help states it."""
    texts = [] if flag.default is None else [written(flag.default)]
    texts += [f"{model}: {written(family.PRESETS['published'][flag.name])}" for model, family in FAMILIES.items()
              if flag.name in family.PRESETS["published"]]
    return "; ".join(texts)


def resolve(typed, find_saved=None, weights_there=lambda weights: False):
    """Return the full, checked Config of what the user typed. Raise UsageError.

    `find_saved(folder)` returns the config of the run whose checkpoints are in `folder`, or None. Its settings fill
    in what was not typed, so that a run can be resumed or sampled without repeating its flags. Without `find_saved` no
    run is looked for.
    `weights_there(weights)` returns whether these `--vgg_weights` are available without a download.
    """
    typed = dict(typed)
    if "train" in typed and "mode" not in typed:
        typed["mode"] = "train" if typed["train"] else "sample"
    elif "train" in typed and typed["train"] != (typed["mode"] == "train"):
        raise UsageError(f"--train {written(typed['train'])} and --mode {typed['mode']} contradict each other")
    given = typed
    if typed.get("config") is not None:
        settings = _read_file(typed["config"])
        given = {**_not_overruled(settings, typed, weights_there), **typed}

    values = {flag.name: flag.default for flag in FLAGS.values()} | given
    version = f"{values['model']}_{values['dataset']}" if values["version"] is None else values["version"]
    _check_version(version)
    saved = _find_run(values, given, version, find_saved) if find_saved else None
    source = _find_source(values, given, find_saved) if find_saved and saved is None else None
    known = {name: _convert(name, value, "the run's saved config") for name, value in (saved or source or {}).items()
             if name in FLAGS and value is not None and not FLAGS[name].per_call    # None: of another family
             and not (name == "metrics" and values["mode"] == "evaluate")} | given
    values = _complete(known, typed, weights_there) | {"version": version}
    if saved:                                           # first: what is typed may contradict what follows from the run
        _check_fixed(values, saved, values["version"])
    validate(values)
    _check_effect(values, typed)
    told = {**(saved or source or {}), **given}
    if values["dataset"] == "folder" and "image_path" not in told and not values["real_dir"]:
        raise UsageError("--dataset folder: say where the pictures are with --image_path DIR")
    return Config.of(values)


def _find_run(values, given, version, find_saved):
    """Return the saved config of the run `version`, or None. Raise UsageError where one must be there, but is not."""
    if values["restart"] or (values["fake_dir"] and values["real_dir"]):
        return None
    runs = Path(values["model_save_path"])
    saved = find_saved(runs / version)
    reads_a_checkpoint = values["mode"] not in ("train", "clean_data", "evolution") and not values["fake_dir"]
    # of a folder that is scored: the run whose pictures it is compared with
    reads_its_data = values["fake_dir"] and "version" in given and not {"dataset", "image_path"} & given.keys()
    if saved is None and (reads_a_checkpoint or reads_its_data) and not (runs / version).exists():
        raise _no_such_run("version", version, runs)
    return saved


def _no_such_run(flag, name, runs):
    """Return the UsageError for a name that no run in the folder `runs` has, with the nearest ones."""
    there = sorted({path.parent.name for path in runs.glob("*/*.pth")})
    near = difflib.get_close_matches(name, there, n=3) or [run for run in there if run == Path(name).name]
    if near:
        hint = f"did you mean {' or '.join(near)}?"
    elif there:
        hint = f"there are {', '.join(there[:NAMED])}" + f" and {len(there) - NAMED} more" * (len(there) > NAMED)
    else:
        hint = "there is none at all; train one first, or name their folder with --model_save_path"
    return UsageError(f"--{flag} {name}: there is no such run in {runs}; {hint}")


def to_resume(config):
    """Return in words the command that goes on with this run: `--restart` would begin it again, `--pretrained_model`
    go back.
    """
    given = "--restart" if config.restart else "--pretrained_model" if config.pretrained_model is not None else ""
    return "the same command" + f" without {given}" * bool(given)


def source_of(config):
    """Return the path of what `--init_from` names: a checkpoint FILE.pth, or a run's folder."""
    name = config.init_from
    return Path(name) if name.endswith(".pth") else Path(config.model_save_path, name)


_UNSET = {"imsize": None, "batch_size": None}       # for `find_preset`: not their defaults

# The settings from which those of a preset, and what follows from others, follow.
_DECIDE = {"model", "preset", "arch", "imsize", "batch_size", "adv_loss", "dataset"}

# What is not taken over from the run of --init_from if this flag is typed and differs: it follows from it.
FOLLOWS = {"imsize": ("g_attn", "d_attn"), "arch": ("g_attn", "d_attn", "attn_pool", "conditional"),
           "adv_loss": ("d_iters", "sn"), "dataset": ("image_path", "conditional")}


def _find_source(values, given, find_saved):
    """Return the settings of the run that `--init_from` names, as far as they apply to a new one; None without it.

    A typed `--preset` wins over them. Raise UsageError, CheckpointError.
    """
    name = values["init_from"]
    if not name or values["mode"] != "train":
        return None
    if values["version"] is None:
        raise UsageError(f"--init_from {name}: name the new run with --version")
    settings = _settings_of_source(values, name, find_saved)
    model = settings.get("model")
    if given.get("model", model) != model or model not in FAMILIES:
        raise UsageError(f"--init_from {name}: is a run of --model {model}, this is {given.get('model')}")
    before = settings.get("dataset")
    if "image_path" in given and "dataset" not in given and before != "folder":
        raise UsageError(f"--image_path {given['image_path']}: run '{name}' was trained on --dataset {before}; say "
                         "--dataset folder for a folder of pictures")
    own = {"init_from", "freeze_d"}
    if "preset" in given:
        sizes = {size: _convert(size, settings[size], "the saved config of --init_from") for size in _UNSET
                 if settings.get(size) is not None}
        known = {**values, **_UNSET, **settings, **sizes, **given}
        own |= {key for preset in (given["preset"], settings.get("preset", "published"))
                for key in FAMILIES[model].find_preset(preset, known)}
    own |= _following(settings, given)
    return {key: value for key, value in settings.items() if key not in own}


def _following(settings, given):
    """Return the names of settings that follow from flags which are `given` and differ from these `settings`."""
    return {name for flag, following in FOLLOWS.items() if flag in given and given[flag] != settings.get(flag)
            for name in following}


def _not_overruled(settings, typed, weights_there):
    """Return the settings of a `--config` file without those that nobody chose: they follow from others in it, and from
    what is typed now, if that is something else. A run's config.json holds all of its settings.
    """
    own = _following(settings, {flag: value for flag, value in typed.items() if settings.get(flag, value) != value})
    if "preset" in settings and typed.get("model", settings.get("model")) == settings.get("model"):
        chosen = {name: value for name, value in settings.items() if name in _DECIDE}
        for names in ({"batch_size"}, {"imsize"}, settings.keys() - _DECIDE):       # a preset may give sizes, too
            given = _complete({name: value for name, value in chosen.items() if name not in names}, {}, weights_there)
            own |= {name for name in names if name in settings and settings[name] == given[name]}
    return {name: value for name, value in settings.items() if name not in own}


def _complete(known, typed, weights_there):
    """Return {flag: value} of all flags: `known`, else what the preset or the default gives, or follows from others.

    Raise UsageError if a flag of another model was `typed`.
    """
    values = {flag.name: flag.default for flag in FLAGS.values()} | known
    values.update(FAMILIES[values["model"]].find_preset(values["preset"], {**values, **_UNSET, **known}) | known)
    if values["fake_dir"]:
        values["imsize"] = known.get("imsize")          # None: the size of the folder's pictures
    _clear_other_families(values, typed)
    _fill_in(values, weights_there)
    return values


def _settings_of_source(values, name, find_saved):
    """Return the saved settings of what `--init_from` names. Raise UsageError, CheckpointError."""
    source = source_of(SimpleNamespace(**values))
    try:
        if name.endswith(".pth") and not source.is_file():
            raise CheckpointError(f"there is no file {source}")
        settings = find_saved(source)
    except CheckpointError as error:
        raise CheckpointError(f"--init_from {name}: {error}") from None
    except OSError as error:
        raise UsageError(f"--init_from {name[:40]}: {error.strerror}") from None
    if settings is None:
        raise _no_such_run("init_from", name, Path(values["model_save_path"]))
    return settings


def _read_file(path):
    """Return a JSON file's settings, converted as if typed, without per-call flags and nulls. Raise UsageError."""
    try:
        with open(path, encoding="utf-8-sig") as file:      # as editors on Windows write it, too
            settings = json.load(file)
    except (OSError, ValueError) as error:
        raise UsageError(f"--config {path}: cannot be read as JSON ({error})") from None
    if not isinstance(settings, dict):
        raise UsageError(f"--config {path}: is not a JSON object of settings")
    unknown = [name for name in settings if name not in FLAGS]
    if unknown:
        raise UsageError(f"--config {path}: unknown setting '{unknown[0]}'")
    return {name: _convert(name, value, f"--config {path}") for name, value in settings.items()
            if not FLAGS[name].per_call and value is not None}


def _convert(name, value, source):
    """Convert a setting read from JSON to its flag's type. Raise UsageError."""
    flag = FLAGS[name]
    if value is None:
        return None
    try:
        return flag.type(written(value))
    except (argparse.ArgumentTypeError, ValueError) as error:
        raise UsageError(f"{source}: {name} {value!r} is not a value for --{name} ({error})") from None


def _clear_other_families(values, typed):
    """Set the flags of other families to None; raise UsageError if one was typed."""
    for model, family in FAMILIES.items():
        for flag in family.FLAGS if model != values["model"] else ():
            if flag.name in typed:
                raise UsageError(f"--{flag.name} is for --model {model}, this is {values['model']}; leave it out")
            values[flag.name] = None


def _fill_in(values, weights_there):
    """Replace the defaults that depend on other flags, in place."""
    loss = common.LOSSES[values["adv_loss"]]
    if values["d_iters"] is None:
        values["d_iters"] = loss["d_iters"]
    if values["sn"] == "auto":
        values["sn"] = loss["sn"]
    family = FAMILIES[values["model"]]
    if values["conditional"] == "auto" and not family.asks_for_classes(values):
        values["conditional"] = False
    family.fill_in(values, weights_there)
    values["train"] = values["mode"] == "train"


def validate(values):
    """Raise UsageError for the first setting that cannot work. `values` is a full {flag: value}."""
    for flag in FLAGS.values():
        _check_range(flag, values[flag.name])
    _check_evaluation(values)
    _check_restart(values)
    model = values["model"]
    if not values["fake_dir"]:
        check_size(values["imsize"], FAMILIES[model].IMSIZES, model)
    if values["mode"] in EXTRA_MODES and values["mode"] not in FAMILIES[model].EXTRA_MODES:
        raise UsageError(f"--mode {values['mode']}: swaps the maps that drive skip layers, and {model} has none")
    FAMILIES[model].check(values)
    world_size = _world_size()
    if world_size > 1 and values["mode"] == "evaluate" and "cost" in values["metrics"]:
        raise UsageError("--metrics cost: is measured on one device; start it without torchrun and --parallel")
    parts = world_size * values["accumulate"]
    if values["batch_size"] % parts and values["mode"] == "train":
        of = " times ".join([f"the {world_size} processes"] * (world_size > 1) +
                            [f"--accumulate {values['accumulate']}"] * (values["accumulate"] > 1))
        raise UsageError(f"--batch_size {values['batch_size']} must be a multiple of {of}")
    _check_device(values)


def _check_range(flag, value):
    if isinstance(value, str):
        _check_text(flag, value)
    if not isinstance(value, (int, float)) or isinstance(value, bool):
        return
    if isinstance(value, float) and not math.isfinite(value):
        raise UsageError(f"--{flag.name} {value}: give a finite number")
    if flag.below is not None and not flag.low <= value < flag.below:
        raise UsageError(f"--{flag.name} {value}: must be in [{flag.low:g}, {flag.below:g})")
    if flag.low is not None and value < flag.low:
        raise UsageError(f"--{flag.name} {value}: must be at least {flag.low}")
    high = LARGEST if flag.high is None and isinstance(value, int) else flag.high
    if high is not None and value > high:
        raise UsageError(f"--{flag.name} {value}: must be at most {high}")


def _check_text(flag, text):
    """Raise UsageError for text that can be no path, word or name."""
    if not text:
        raise UsageError(f"--{flag.name}: is empty; give a value, or leave the flag out")
    if "\0" in text:
        raise UsageError(f"--{flag.name}: has a NUL character")
    if any(len(os.fsencode(part)) > 255 for part in re.split(r"[/\\]", text)):
        raise UsageError(f"--{flag.name}: has a name of more than 255 bytes")


def _check_evaluation(values):
    """Raise UsageError if the metrics cannot be computed in this mode or on these pictures."""
    mode, chosen = values["mode"], values["metrics"]
    for name in ("fake_dir", "real_dir"):
        if values[name] and mode != "evaluate":
            raise UsageError(f"--{name} {values[name]}: is for --mode evaluate")
    for applies, allowed, where in (
            (mode == "train" and values["metric_step"], lambda metric: metric.of_sets,
             "cannot be computed during training, only by --mode evaluate"),
            (values["fake_dir"], lambda metric: metric.of_folders,
             "cannot be computed for --fake_dir, only for a run")):
        wrong = [name for name in chosen if not allowed(METRICS[name])]
        if applies and wrong:
            raise UsageError(f"--metrics {written(chosen)}: {' and '.join(wrong)} {where}")
    samples = mode == "evaluate" and not values["fake_dir"] or mode == "train" and values["metric_step"]
    for name in chosen if samples else ():
        least = METRICS[name].least if METRICS[name].of_sets else 1
        if values["num_eval"] < least:
            raise UsageError(f"--num_eval {values['num_eval']}: --metrics {name} needs at least {least}")
    imsize = values["imsize"]
    if values["fake_dir"] and imsize is not None and not all(16 <= side <= 4096 for side in sides(imsize)):
        raise UsageError(f"--imsize {imsize}: must be from 16 to 4096 with --fake_dir")


def _check_restart(values):
    """Raise UsageError if `--restart true` contradicts another flag."""
    if values["restart"] and values["mode"] != "train":
        raise UsageError(f"--restart true: is for training, not for --mode {values['mode']}; leave it out")
    if values["restart"] and values["pretrained_model"] is not None:
        raise UsageError(f"--restart true begins from scratch, --pretrained_model {values['pretrained_model']} goes on "
                         "from a checkpoint: leave one out")


def _check_effect(values, typed):
    """Raise UsageError for a typed setting, other than the default, that has no effect with the others."""
    net, chosen = values["feature_net"], values["metrics"]
    if net != "inception" and "is" in chosen and ("metrics" in typed or chosen == ("is",)):
        raise UsageError(f"--metrics {written(chosen)}: the Inception Score needs --feature_net inception, this "
                         f"is {net}; leave is out")
    for name in typed:
        setting = FLAGS[name].unused and FLAGS[name].unused(values)
        if setting and values[name] != FLAGS[name].default:
            raise UsageError(f"--{name} {written(values[name])}: has no effect with {setting}; leave it out")


def _check_version(version):
    try:
        length = len(os.fsencode(version))
    except UnicodeEncodeError:                          # half a character, from a file of JSON
        length = 0
    if not 0 < length <= 100 or version[0] in ".-" or re.search(r"[/\\:\x00-\x1f]", version):
        plain = re.split(r"[/\\]", version.rstrip("/\\"))[-1][:100].lstrip(".-")
        hint = f", such as {plain}" if plain and plain != version else ""
        raise UsageError(f"--version {version!r}: use a plain name of up to 100 bytes, without / \\ : "
                         f"and not beginning with . or -{hint}")
    if version in RESERVED:
        raise UsageError(f"--version {version}: is the name of a file beside the runs' folders; use another")


def _world_size():
    """Return the number of processes that torchrun started; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def _check_device(values):
    device, world_size = values["device"], _world_size()
    if not re.fullmatch(r"auto|cpu|mps|cuda(:\d+)?", device):
        raise UsageError(f"--device {device}: use auto, cpu, cuda, cuda:N or mps")
    if not values["parallel"] and (device == "cpu" or device == "auto" and world_size == 1):
        return
    import torch  # slow to import: only where needed, so that --help and most mistakes answer at once

    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.startswith("cuda"):
        number = int(device.partition(":")[2] or 0)
        if number >= count:
            available = f"CUDA devices here: {count}" if count else "no CUDA device here"
            raise UsageError(f"--device {device}: {available}; use --device auto or cpu")
    if device.startswith("cuda:") and (world_size > 1 or values["parallel"]):
        raise UsageError(f"--device {device}: is one GPU, and each process has its own; use --device cuda")
    here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    if device in ("auto", "cuda") and 0 < count < here:
        raise UsageError(f"{here} processes on this machine, which has {count} GPU{'s' * (count > 1)}; use "
                         f"--nproc_per_node={count}, or --device cpu")
    if device == "mps" and world_size > 1:
        raise UsageError("--device mps: is for one process; use --device cpu with torchrun")
    if device == "mps" and not torch.backends.mps.is_available():
        raise UsageError("--device mps: no GPU of Apple's here, or a PyTorch without MPS; use --device auto or cpu")
    if values["parallel"] and world_size == 1 and (count < 2 or device in ("cpu", "mps")):
        raise UsageError(f"--parallel true: needs two or more CUDA devices, found {count}; leave it out, or start "
                         "processes yourself with torchrun --nproc_per_node=2 main.py ...")


def _check_fixed(values, saved, version):
    """Raise UsageError if a setting that a run keeps for good differs from its saved config."""
    if values["init_from"] not in (None, saved.get("init_from")) and not saved.get("init_from"):
        raise UsageError(f"--init_from {values['init_from']}: run '{version}' has checkpoints of its own and goes on "
                         "from them; leave the flag out, or use another --version, or --restart true")
    for name, flag in FLAGS.items():
        if (flag.fixed is not None and flag.fixed(values) and name in saved
                and written(values[name]) != written(saved[name])):
            raise UsageError(f"--{name} {written(values[name])}: run '{version}' was started with "
                             f"{written(saved[name])}; use that, or another --version")


def as_json(config):
    """Return the config as JSON text that `--config` can read."""
    return json.dumps(vars(config), indent=2, sort_keys=True) + "\n"


def dataset_name(config):
    """Return the data set's name as protocols state it."""
    return f"folder {Path(config.image_path).name}" if config.dataset == "folder" else config.dataset
