"""The flags that all families share; `Flag`: converter, default, range, help.

flags/values.py converts what is typed, flags/scores.py lists the metrics, flags/pictures.py says what pictures are,
flags/scaling.py what --preset gpu scales; every other file in this folder holds the flags, presets, image sizes and
checks of one family. `parameter.py` parses the command line by these tables. Nothing here imports torch, so that --help
and most mistakes answer at once.
"""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flags.pictures import CHANNELS, FITS, as_imsize
from flags.scores import FEATURE_NETS, FEW, METRICS
from flags.values import (
    boolean,
    boolean_or_auto,
    metrics,
    names,
    one_of,
    points,
    policies,
    run_or_file,
    seeds,
    sizes,
    step_or_best,
    whole_or_auto,
    written,
)

# The names of the families: one file of this folder each.
MODELS = tuple(sorted(path.stem for path in Path(__file__).parent.glob("[a-z]*.py")
                      if path.stem not in ("common", "pictures", "scaling", "scores", "values")))

# --adv_loss, each with its defaults of --d_iters and --sn.
LOSSES = {
    "hinge":   {"d_iters": 1, "sn": "both"},
    "wgan-gp": {"d_iters": 5, "sn": "none"},
}


# --------------------------------------------------------------------------------------------------------- flags

WIDEST = 2**16      # of latents and layers: far more than any memory holds


def always(values):
    """For `Flag.fixed`: this setting can never change within a run."""
    return True


def of_runs(values):
    """For `Flag.fixed`: this setting can never change within a run; scoring a folder needs none."""
    return not values["fake_dir"]


@dataclass(frozen=True)
class Flag:
    """One flag: its converter, default and help; for a number the closed range [low, high], or [low, below).

    `fixed(values)` returns whether this setting cannot change within a run, as its checkpoints depend on it.
    `per_call`: the flag describes one call, not the run, and is never read from a saved config. `several`: it takes one
    or more values. `unused(values)` returns the setting with which the flag has no effect, such as `--adv_loss hinge`,
    or a false value. In `help`, `{families}` is replaced by the text of each family's `HELP`.
    """

    name: str
    type: Callable
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    below: float | None = None
    fixed: Callable | None = None
    per_call: bool = False
    several: bool = False
    unused: Callable | None = None

    @property
    def metavar(self):
        """The placeholder of its value in --help."""
        kinds = {boolean: "BOOL", boolean_or_auto: "BOOL", int: "N", whole_or_auto: "N", float: "X", str: "TEXT",
                 sizes: "SIZES", policies: "NAMES", metrics: "NAMES", names: "NAMES", points: "POINTS",
                 step_or_best: "STEP", seeds: "SEEDS", run_or_file: "TEXT", as_imsize: "SIZE"}
        return kinds.get(self.type, "NAME")


def only_with_loss(name):
    """For `Flag.unused`: a flag of this loss alone."""
    return lambda values: values["adv_loss"] != name and f"--adv_loss {values['adv_loss']}"


def _without_d_features(values):
    """For `Flag.unused`: D judges no features of a frozen network."""
    return values["d_features"] == "none" and "--d_features none"


def _not_measuring(values):
    """For `Flag.unused`: no metric is computed, in training or of a checkpoint."""
    if values["mode"] == "train":
        return not values["metric_step"] and "--metric_step 0 (with N training measures every N steps)"
    return values["mode"] != "evaluate" and f"--mode {values['mode']}"


def _only_in(*modes):
    """For `Flag.unused`: a flag of these modes alone."""
    return lambda values: values["mode"] not in modes and f"--mode {values['mode']}"


def _without_features(values):
    """For `Flag.unused`: none of the metrics is computed from the features of a network."""
    if setting := _not_measuring(values):
        return setting
    chosen = values["metrics"]
    return not any(METRICS[name].file in ("features", "ifid") for name in chosen) and f"--metrics {written(chosen)}"


def _without_best(values):
    """For `Flag.unused`: no checkpoint is called the best, as no score is measured in training that decides it."""
    if not values["metric_step"]:
        return "--metric_step 0"
    return not {"fid", "kid"} & set(values["metrics"]) and f"--metrics {written(values['metrics'])}"


def _not_sampling(values):
    """For `Flag.unused`: no single pictures are drawn."""
    return values["mode"] != "sample" and f"--mode {values['mode']} (--mode sample draws pictures)"


def _without_maps(values):
    """For `Flag.unused`: networks without attention, whose records have no maps."""
    return not any(values[name] for name in ("g_attn", "d_attn", "slae", "slae_d")) and "networks without attention"


def _with_latents(values):
    """For `Flag.unused`: the latents come from files."""
    return values["latents"] and f"--latents {written(values['latents'])}"


def no_classes(values):
    """For `Flag.unused`: a run without classes."""
    return values["conditional"] is False and "--conditional false (true trains with classes)"


def _shows_no_classes(values):
    """For `Flag.unused`: what does not choose among classes."""
    if values["mode"] not in ("train", "sample", "interpolate", "project"):
        return f"--mode {values['mode']}"
    return no_classes(values)


def _by_loss(setting):
    return ", ".join(f"{row[setting]} for {loss}" for loss, row in LOSSES.items())


def _list_metrics(of_sets):
    return ", ".join(name + (f" ({row.words})" if row.words else "") for name, row in METRICS.items()
                     if row.of_sets == of_sets)


DERIVED = None      # the default of a flag whose value depends on other flags: see `fill_in`

FLAGS = {
    "run": (
        Flag("model", one_of(*MODELS), DERIVED, "{families}", fixed=always),
        Flag("preset", one_of("published", "cpu", "gpu", "small"), "published",
             "values of the flags left unset: published settings; cpu, those that learn fastest on two CPU cores; gpu, "
             "the published ones scaled to a new run's --batch_size, by default four times as large; or small, for "
             "some hundred pictures: {families}", fixed=always),
        Flag("config", str, None, "JSON file of settings, such as a run's config.json; the command line wins",
             per_call=True),
        Flag("version", str, DERIVED, "name of the run and of its folders (default: MODEL_DATASET)", per_call=True),
        Flag("mode", one_of("train", "sample", "interpolate", "style_mix", "project", "export", "evolution", "evaluate",
                            "serve", "clean_data"), "train",
             "train, or from a checkpoint: sample (pictures) | interpolate (a video) | style_mix (a grid; where G has "
             "skip layers) | project (the closest to --target that G draws) | export (G for other programs: ONNX, "
             "safetensors, TorchScript) | evaluate (--metrics); or evolution: a video of a run's grids over the steps; "
             "or serve: show the galleries of all runs to a browser on another machine, see --port; or clean_data: "
             "delete the pictures that the last check of this version found damaged", per_call=True),
        Flag("port", int, 8000, "--mode serve: the port, of this machine's loopback address 127.0.0.1 alone; 0: a free "
             "one", 0, 65535, per_call=True,
             unused=_only_in("serve")),
        Flag("train", boolean, True, "false is the same as --mode sample", per_call=True),
        Flag("device", str, "auto", "auto | cpu | cuda | cuda:N | mps (Apple's GPUs, never tried on a Mac); "
             "auto: CUDA if available, else MPS", per_call=True),
        Flag("parallel", boolean, False, "train, or evaluate, on every visible GPU, one process each; batch_size is "
             "divided among them", per_call=True, unused=_only_in("train", "evaluate")),
        Flag("sync_bn", boolean_or_auto, "auto", "batch norm's statistics over the images of all processes, so that "
             "several train as one does; false: over those of each; auto: true"),
        Flag("check_replicas", int, 1000, "steps between checks that all processes hold the same weights; exit code 4 "
             "if not; 0: never", 0),
        Flag("seed", int, 0, "random seed of weights, batch order, z and flips", 0, 2**31 - 1,
             unused=lambda values: values["seeds"] and f"--seeds {written(values['seeds'])}"),
        Flag("precision", one_of("auto", "fp32", "tf32", "bf16", "fp16"), "auto", "of convolutions and matrix "
             "products, in training and in sampling: fp32 | tf32 | bf16 | fp16 (mixed precision; fp16 with loss "
             "scaling); auto: bf16 where the hardware has units for it (GPUs since 2020, CPUs with AMX or AVX-512 "
             "BF16), fp16 on GPUs of 2017 to 2019 (V100, T4, RTX 20), else fp32"),
        Flag("compile", boolean_or_auto, "auto", "compile the networks for training (torch.compile), which takes a "
             "minute or two; auto: {families}"),
        Flag("cuda_graph", boolean_or_auto, "auto", "capture the training step as a CUDA graph and replay it; "
             "auto: on a GPU"),
        Flag("deterministic", boolean, False, "use deterministic algorithms: bitwise reproducible on CUDA too, but "
             "slower"),
        Flag("dry_run", boolean, False, "print the resolved config, parameter counts, data and device, then exit",
             per_call=True),
    ),
    "data": (
        Flag("dataset", one_of("celeb", "lsun", "cifar10", "folder", "toy"), "celeb",
             "celeb | lsun | cifar10 | folder (any pictures in --image_path) | toy (faces drawn by code)"),
        Flag("image_path", str, "./data", "root of the data sets; for --dataset folder the folder of pictures, or a "
             "zip archive of them", unused=lambda values: values["dataset"] == "toy"
             and "--dataset toy (--dataset folder takes the pictures of a folder)"),
        Flag("imsize", as_imsize, 64, "side of the pictures in pixels, a power of two: {families}; or HEIGHTxWIDTH, "
             "such as 64x128, the longer side a multiple of a quarter of the shorter one",
             fixed=of_runs),
        Flag("channels", one_of(*CHANNELS), "rgb", "rgb | grey | rgba (with transparency, which the others show on "
             "white)", fixed=of_runs),
        Flag("fit", one_of(*FITS), "crop", "pictures of another shape than --imsize: crop (the largest part from the "
             "middle) | pad (with white, of rgba transparent) | stretch", fixed=of_runs),
        Flag("batch_size", int, 64, "pictures per update, over all processes together", 1),
        Flag("num_workers", whole_or_auto, "auto", "loader processes, until all pictures are in the cache; 0 loads in "
             "the training process; auto: one per core, at most 8", 0, 256),
        Flag("balance", boolean, False, "with classes: train on pictures of all classes equally often",
             unused=no_classes),
        Flag("hflip", boolean, False, "flip pictures horizontally, each with probability 1/2"),
        Flag("holdout", float, 0.0, "fraction of the pictures that is never trained on, for --metrics lpips; 0.1 is "
             "usual", 0.0, 0.5, fixed=always),
        Flag("check_data", one_of("auto", "full", "header", "off"), "auto", "before training, find the pictures "
             "that cannot be used, on all cores: full (decode each) | header (read start and end of each file) | off; "
             "auto: full up to 10,000 pictures, else header"),
        Flag("max_pixels", int, 178_956_970, "pictures of more pixels are read at a reduced size (JPEG) or left out; "
             "0: no limit", 0),
        Flag("clean_copies", boolean, False, "--mode clean_data: delete byte-identical copies, too, but the first of "
             "each", per_call=True, unused=_only_in("clean_data")),
        Flag("yes", boolean, False, "--mode clean_data: delete without asking", per_call=True,
             unused=_only_in("clean_data")),
        Flag("cache", one_of("auto", "on", "off"), "auto", "cache decoded pictures in a file, for all runs: auto (if "
             "it takes at most a quarter of the free disk space and the run has more than one epoch) | on | off"),
        Flag("cache_dir", str, None, "folder of that file (default: .decoded in the data's folder or, where that "
             "cannot be written, cache_path)", per_call=True,
             unused=lambda values: values["cache"] == "off" and "--cache off"),
        Flag("cache_path", str, "./cache", "folder of what is computed once for all runs: the check of the pictures, a "
             "data set's metadata, its statistics for --metrics", per_call=True),
    ),
    "network": (
        Flag("z_dim", int, 128, "length of the noise vector", 1, WIDEST, fixed=always),
        Flag("g_conv_dim", int, 64, "width of G in channels: {families}", 1, WIDEST, fixed=always),
        Flag("d_conv_dim", int, 64, "width of D in channels: {families}", 1, WIDEST, fixed=always),
        Flag("conditional", boolean_or_auto, "auto", "train with the classes of the pictures: a subfolder each, a "
             "dataset.json, or the data set's own; auto: {families}"),
        Flag("d_features", one_of("none", "vgg16", "vgg16_fine"), "none", "D judges features of a frozen network, "
             "too, which helps on varied pictures such as paintings, and harms faces, less with a small weight: none "
             "| vgg16 (relu3_3 and relu4_3 of images at half size, of 128 px at most, see --vgg_weights) | vgg16_fine "
             "(relu2_2 and relu3_3 of images as they are, of 256 px at most: sees single pixels, in four times the "
             "time, see --d_features_share)", fixed=always),
        Flag("sn", one_of("auto", "both", "g", "d", "none"), "auto",
             "spectral norm in: both | g | d | none; auto: " + _by_loss("sn"), fixed=always),
    ),
    "optimization": (
        Flag("adv_loss", one_of(*LOSSES), "hinge", f"adversarial loss: {' | '.join(LOSSES)}", fixed=always),
        Flag("label_noise", float, 0.0, "hinge: the margin of each logit is 1 - this * U(0, 1)",
             0.0, 1.0, unused=lambda values: values["d_features"] == "none" and only_with_loss("hinge")(values)),
        Flag("d_features_weight", float, 1.0, "weight of the losses of D's heads on those features; on a hundred "
             "paintings 0.1 was better than 1; with spectral norm in D 0.3 alone was tried", 0.001,
             unused=_without_d_features),
        Flag("d_features_share", float, 1.0, "share of each batch that those heads see, to save time; of each "
             "process's images and each --accumulate part at least one", 0.01, 1.0, unused=_without_d_features),
        Flag("lambda_gp", float, 10.0, "weight of the gradient penalty (wgan-gp)", 0.0,
             unused=only_with_loss("wgan-gp")),
        Flag("augment", policies, (), "DiffAugment on real and fake images, for small data sets: any of "
             "color,translation,mirror,cutout, or none; mirror: translation that fills with mirrored edges in place of "
             "grey, which G may learn to draw as a frame"),
        Flag("total_step", int, 1_000_000, "steps of the whole run; one step is one update of G", 1),
        Flag("d_iters", int, DERIVED, f"updates of D per step (default: {_by_loss('d_iters')})", 1, 1000),
        Flag("accumulate", int, 1, "gradient accumulation: compute a batch in this many parts, which takes less "
             "memory; the same updates, except that batch norm's statistics are those of a part", 1),
        Flag("checkpointing", boolean, False, "compute activations again in the backward pass instead of keeping them: "
             "the same numbers with less memory, in 1.2 to 1.3 times the time"),
        Flag("g_lr", float, 1e-4, "learning rate of G (Adam)", 1e-12, 1.0),
        Flag("d_lr", float, 4e-4, "learning rate of D (Adam); TTUR: larger than G's", 1e-12, 1.0),
        Flag("freeze_d", int, 0, "with --init_from: the first so many blocks of D keep their weights (FreezeD)", 0,
             unused=lambda values: not values["init_from"] and "a run without --init_from"),
        Flag("lr_decay", float, 1.0, "factor on both learning rates after each epoch", 1e-6, 1.0),
        Flag("beta1", float, 0.0, "Adam's decay of the first moment, in [0, 1)", low=0.0, below=1.0),
        Flag("beta2", float, 0.9, "Adam's decay of the second moment, in [0, 1)", low=0.0, below=1.0),
        Flag("ema_decay", float, 0.999, "decay of G_ema, the averaged generator that draws all samples, in [0, 1)",
             low=0.0, below=1.0),
        Flag("ema_start", int, 0, "step from which G_ema is an average; before, it is G", 0),
    ),
    "records": (
        Flag("log_step", int, 10, "steps between lines in metrics.jsonl; a record has one, too", 1),
        Flag("sample_step", int, 100, "steps between sample grids and attention maps", 1),
        Flag("classes", names, None, "with classes: those that grids show, one a row, and --mode interpolate walks "
             "between, by name or number, such as 3,tabby, or all (default: a spread); --mode sample draws of each",
             per_call=True, unused=_shows_no_classes),
        Flag("model_save_step", int, 1000, "steps between checkpoints", 1),
        Flag("keep_checkpoints", int, 5, "newest checkpoints kept on disk; 0 keeps all", 0),
        Flag("use_tensorboard", boolean, False, "also write TensorBoard events beside metrics.jsonl: numbers, "
             "pictures, settings"),
        Flag("wandb", boolean, False, "training: also log them to Weights & Biases (needs wandb); with "
             "WANDB_MODE=offline to the disk", unused=_only_in("train")),
        Flag("log_path", str, "./logs", "folder of the logs", per_call=True),
        Flag("model_save_path", str, "./models", "folder of the checkpoints", per_call=True),
        Flag("sample_path", str, "./samples", "folder of the pictures", per_call=True),
        Flag("attn_raw", boolean, False, "also write the attention maps as arrays, one .npz per record",
             unused=_without_maps),
        Flag("attn_path", str, None, "folder of the attention maps (default: beside the samples)", per_call=True),
    ),
    "evaluation": (
        Flag("metrics", metrics, ("fid", "kid", "pr", "is"),
             f"any of {_list_metrics(True)}; in --mode evaluate also {_list_metrics(False)}", unused=_not_measuring),
        Flag("metric_step", int, 0, "steps between computations of the metrics in training; the checkpoint of the best "
             f"fid, or with fewer than {FEW:,} real pictures of the best kid, is kept as best.pth; 0: never", 0),
        Flag("patience", int, 10, "measurements in a row without a better score after which a run is done; a line says "
             "so", 1, unused=_without_best),
        Flag("stop", one_of("never", "auto"), "never", "never | auto (end a run that is done by --patience)",
             unused=_without_best),
        Flag("num_eval", int, 5000, "samples that metrics are computed on", 2, unused=_not_measuring),
        Flag("feature_net", one_of(*FEATURE_NETS), "inception", "network whose features fid, kid, pr and ifid compare; "
             "the scores of others than inception are named after it, such as fd_dinov2: inception | vgg16 (of "
             "--vgg_weights) | dinov2 (ViT-L/14, 1.2 GB) | clip (ViT-B/32, 354 MB)", unused=_without_features),
        Flag("inception_weights", str, "standard", "weights of --feature_net inception: standard (TensorFlow's of "
             "2015-12-05) | random (for tests) | PATH", unused=lambda values: values["feature_net"] != "inception"
             and f"--feature_net {values['feature_net']}"),
        Flag("vgg_weights", str, "imagenet", "weights of VGG-16 for --feature_net vgg16, nearest and lpips, metadata, "
             "reconstructions and --d_features: imagenet (torchvision's file) | random (for tests) | PATH",
             fixed=lambda values: (values["metadata"] or values["d_features"] != "none") and values["mode"] == "train"),
        Flag("fake_dir", str, None, "score the pictures in this folder, from any generator, instead of a run's samples",
             per_call=True),
        Flag("real_dir", str, None, "score against the pictures in this folder instead of the data set (but lpips, "
             "which takes those that the run has held out)", per_call=True),
        Flag("backtrack_steps", int, 300, "--mode project and lpips: steps of Adam on the latent of each picture", 1,
             per_call=True, unused=_only_in("project", "evaluate")),
    ),
    "from a checkpoint": (
        Flag("pretrained_model", step_or_best, None, "resume from, sample or evaluate the checkpoint of this step; "
             "best: best.pth, see --metric_step", 1, per_call=True),
        Flag("init_from", run_or_file, None, "fine-tune: begin a new run with the weights of another one, by its name "
             "(its newest checkpoint) or by a FILE.pth; what is not typed is as in that run", fixed=always),
        Flag("restart", boolean, False, "train from scratch: the run of this version is moved aside, to VERSION.old1",
             per_call=True),
        Flag("num_samples", int, 64, "pictures that --mode sample writes; with --classes of each", 1, per_call=True,
             unused=lambda values: _not_sampling(values) or _with_latents(values)
             or values["seeds"] and f"--seeds {written(values['seeds'])}"),
        Flag("seeds", seeds, None, "--mode sample: one picture for each of these seeds, such as 3,5,9-20, whatever "
             "else is drawn", per_call=True, unused=lambda values: _not_sampling(values) or _with_latents(values)),
        Flag("like", str, None, "draw a picture of --mode sample again, by the checkpoint that drew it (see "
             "--keep_checkpoints): a PNG file, which says how it was drawn; typed flags change that: --truncation, "
             "--classes, --pretrained_model, --version", per_call=True,
             unused=_not_sampling),
        Flag("target", str, None, "--mode project: the pictures to come close to, any size and shape, one or more",
             per_call=True, several=True,
             unused=_only_in("project")),
        Flag("latents", str, None, "draw these instead of random ones, .npz files that --mode project wrote: --mode "
             "sample, or interpolate between them", per_call=True, several=True,
             unused=_only_in("sample", "interpolate")),
        Flag("truncation", float, None, "truncation trick: components of z beyond this are resampled, for better "
             "quality and less diversity; 0.5 to 2 (default: none)", low=0.01, per_call=True,
             unused=lambda values: values["mode"] in ("train", "project", "evolution") and f"--mode {values['mode']}"),
        Flag("num_frames", int, 120, "frames of the video that --mode interpolate writes; grids in that of --mode "
             "evolution, at most", 2, per_call=True, unused=_only_in("interpolate", "evolution")),
        Flag("film", one_of("webp", "gif", "mp4"), "webp", "format of that video, and of the search of --mode project: "
             "webp | gif | mp4 (needs imageio-ffmpeg)", per_call=True,
             unused=_only_in("interpolate", "evolution", "project")),
    ),
}
