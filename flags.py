"""Every flag of the program: what it takes, its default, its help; the presets; which settings a run keeps.

`parameter.py` reads the command line by this table.
"""

import argparse
import difflib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

# ---------------------------------------------------------------------------------------------------- converters


def boolean(text):
    """true/false/1/0/yes/no in any case; anything else is refused."""
    word = str(text).lower()
    if word in ("true", "1", "yes"):
        return True
    if word in ("false", "0", "no"):
        return False
    raise argparse.ArgumentTypeError(f"'{text}' is neither true nor false")


def boolean_or_auto(text):
    """'auto' -> "auto"; else as `boolean`."""
    return "auto" if str(text).lower() == "auto" else boolean(text)


def number_or(word, kind):
    """A converter that accepts `word` and whole numbers; `kind` says in its refusal what those are."""

    def convert(text):
        if text == word:
            return text
        try:
            return int(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"'{text}' is neither a {kind} nor {word}") from None

    return convert


def sizes(text):
    """'16,32' -> (16, 32), sorted, each once; 'none' -> ()."""
    if str(text).lower() == "none":
        return ()
    try:
        return tuple(sorted({int(part) for part in text.split(",")}))
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is no list of sizes such as 16,32, nor none") from None


def points(text):
    """'0.45,0.36;0.2,0.5' -> ((0.45, 0.36), (0.2, 0.5)): one to eight (y, x) as fractions of the image."""
    try:
        found = tuple(tuple(float(part) for part in point.split(",")) for point in text.split(";"))
    except ValueError:
        found = ()
    if not 1 <= len(found) <= 8 or not all(len(point) == 2 and all(0 <= x <= 1 for x in point) for point in found):
        raise argparse.ArgumentTypeError(f"'{text}' is not one to eight points y,x;y,x in fractions of the image, "
                                         "such as '0.45,0.36;0.2,0.5'")
    return found


def policies(text):
    """'color,translation' -> ("color", "translation"); 'none' -> ()."""
    if str(text).lower() == "none":
        return ()
    return tuple(_POLICY(part) for part in text.split(","))


def metrics(text):
    """'fid,kid' -> ("fid", "kid"), each once."""
    return tuple(dict.fromkeys(_METRIC(part) for part in text.split(",")))


def one_of(*names):
    """A converter that accepts these names and suggests the nearest one for others."""

    def convert(text):
        if text in names:
            return text
        nearest = difflib.get_close_matches(text, names, n=1)
        hint = f"; did you mean {nearest[0]}?" if nearest else ""
        raise argparse.ArgumentTypeError(f"'{text}' is not one of {', '.join(names)}{hint}")

    return convert


whole_or_auto, step_or_best = number_or("auto", "whole number"), number_or("best", "step")
_POLICY = one_of("color", "translation", "cutout")
DURING_TRAINING = ("fid", "kid", "pr", "is", "swd")     # metrics of two sets of pictures that --metric_step can take
OF_FOLDERS = (*DURING_TRAINING, "nearest")              # and --fake_dir
_METRIC = one_of(*OF_FOLDERS, "lpips", "cost")

# --------------------------------------------------------------------------------------------------------- flags


@dataclass(frozen=True)
class Flag:
    """One flag: its converter, default, help, the closed range [low, high] of a number, and the only `model` that
    it means something to, where that is not every one: for others its setting is None.
    """

    name: str
    type: Callable
    default: Any
    help: str
    low: float | None = None
    high: float | None = None
    model: str | None = None

    @property
    def metavar(self):
        """What stands for its value in --help."""
        kinds = {boolean: "BOOL", boolean_or_auto: "BOOL", int: "N", whole_or_auto: "N", float: "X", str: "TEXT",
                 sizes: "SIZES", policies: "NAMES", metrics: "NAMES", points: "POINTS", step_or_best: "STEP"}
        return kinds.get(self.type, "NAME")


_AUTO = None        # the default depends on other flags: `_fill_in` finds it

FLAGS = {
    "run": (
        Flag("model", one_of("sagan", "fastgan"), "sagan",
             "sagan (self-attention) | fastgan (SLAE-FastGAN, for small sets of pictures)"),
        Flag("preset", one_of("published", "cpu"), "published",
             "settings for what is left unset: the published ones, or those that learn fastest on two CPU cores"),
        Flag("config", str, None, "JSON file of settings, such as a run's config.json; the command line wins"),
        Flag("version", str, _AUTO, "name of the run and of its folders (default: MODEL_DATASET)"),
        Flag("mode", one_of("train", "sample", "interpolate", "style_mix", "evaluate"), "train",
             "train, or from a checkpoint: sample (pictures) | interpolate (a film) | style_mix (fastgan: a grid) | "
             "evaluate (--metrics)"),
        Flag("train", boolean, True, "false is the same as --mode sample"),
        Flag("device", str, "auto", "auto | cpu | cuda | cuda:N; auto takes CUDA where there is one"),
        Flag("parallel", boolean, False, "train, or evaluate, on every visible GPU, one process each; batch_size is "
             "shared out"),
        Flag("seed", int, 0, "of weights, batch order, z and flips", 0, 2**31 - 1),
        Flag("precision", one_of("auto", "fp32", "tf32", "bf16"), "auto", "of the networks' convolutions and products, "
             "in training and in drawing: fp32 | tf32 | bf16 (mixed); auto: bf16 where there are units for it (GPUs "
             "since 2020, CPUs with AMX), else fp32"),
        Flag("compile", boolean_or_auto, "auto", "compile the networks of a training (torch.compile), which takes a "
             "minute or two; auto: on a GPU if 100,000 steps are ahead, and kept if it is faster there"),
        Flag("cuda_graph", boolean_or_auto, "auto", "record a training step once as a CUDA graph and repeat that; "
             "auto: on a GPU if it is faster there"),
        Flag("deterministic", boolean, False, "same bits again on CUDA too, at some cost in speed"),
        Flag("dry_run", boolean, False, "print the resolved config, sizes and device, then end"),
    ),
    "data": (
        Flag("dataset", one_of("celeb", "lsun", "cifar10", "folder", "toy"), "celeb",
             "celeb | lsun | cifar10 | folder (any pictures in --image_path) | toy (faces drawn by code)"),
        Flag("image_path", str, "./data", "root of the data sets; for --dataset folder the folder of pictures"),
        Flag("imsize", int, 64, "side of the pictures in pixels, a power of two: sagan 32 to 256, fastgan 64 to 1024"),
        Flag("batch_size", int, 64, "pictures per update, over all processes together", 1),
        Flag("num_workers", whole_or_auto, "auto", "loader processes until every picture is in the cache; 0 loads in "
             "the training process; auto: one for each core, 8 at most", 0, 256),
        Flag("hflip", boolean, False, "mirror every other picture at random"),
        Flag("holdout", float, 0.0, "share of the pictures that is never trained on, for --metrics lpips; 0.1 is "
             "usual", 0.0, 0.5),
        Flag("check_data", one_of("auto", "full", "header", "off"), "auto", "look before training for pictures that "
             "cannot be used, with all cores: full (decode each) | header (heads and ends of files) | off; auto: full "
             "up to 10,000 pictures, else header"),
        Flag("cache", one_of("auto", "on", "off"), "auto", "keep decoded pictures in a file, for all runs: auto (if "
             "it takes at most a quarter of the free disk, and the run shows pictures more than once) | on | off"),
        Flag("cache_dir", str, None, "folder of that file (default: .decoded in the data's folder or, where that "
             "cannot be written, cache_path)"),
        Flag("cache_path", str, "./cache", "folder of what is computed once for all runs: which pictures can be used, "
             "a data set's metadata, its statistics for --metrics"),
    ),
    "network": (
        Flag("z_dim", int, 128, "length of the noise vector", 1),
        Flag("g_conv_dim", int, 64, "width of G in channels: sagan at half the image size, fastgan at 128 px", 1),
        Flag("d_conv_dim", int, 64, "width of D in channels: sagan at half the image size, fastgan at 64 px", 1),
        Flag("sn", one_of("auto", "both", "g", "d", "none"), "auto",
             "spectral norm in: both | g | d | none; auto: both for hinge, none for wgan-gp"),
    ),
    "sagan": (
        Flag("g_attn", sizes, _AUTO, "feature sizes with attention in G, such as 16,32, or none "
             "(default: the last two before the image)", model="sagan"),
        Flag("d_attn", sizes, _AUTO, "feature sizes with attention in D, such as 8,4, or none "
             "(default: 8,4 at 64 px, growing with imsize)", model="sagan"),
        Flag("attn_pool", boolean, False, "2x2 max-pooling of the keys and values of attention: a quarter of its work",
             model="sagan"),
        Flag("attn_queries", points, None, "points of the image that attention is shown for, 'y,x;y,x' as fractions of "
             "it, from its top left (default: on a face the eyes, mouth, hair and a corner)", model="sagan"),
    ),
    "fastgan": (
        Flag("slae", boolean, True, "spatial attention before G's skip-layer excitations; false is FastGAN's own",
             model="fastgan"),
        Flag("slae_kernel", int, 7, "side of the spatial attention's convolution: 7 or 3", model="fastgan"),
        Flag("slae_d", boolean, False, "spatial attention in D's skip-layer excitations too", model="fastgan"),
        Flag("metadata", boolean, True, "feed G VGG-16 features of the training pictures beside the noise",
             model="fastgan"),
        Flag("metadata_layer", one_of("relu5_3", "relu4_3"), "relu5_3", "layer of VGG-16 that they come from: "
             "relu5_3 | relu4_3 (shallower, for small pictures)", model="fastgan"),
        Flag("metadata_sample", one_of("mix", "bank", "gauss"), "mix", "metadata of a sample: mix (of 2 or 3 "
             "pictures') | bank (one picture's) | gauss (normal, of the same covariance)", model="fastgan"),
        Flag("recon", one_of("lpips", "l1"), _AUTO, "distance of real pictures from what D's decoders make of them: "
             "lpips | l1 (default: lpips if VGG-16's weights are there, else l1)", model="fastgan"),
        Flag("recon_weight", float, 1.0, "weight of the reconstructions in D's loss", 0.0, model="fastgan"),
    ),
    "optimization": (
        Flag("adv_loss", one_of("hinge", "wgan-gp"), "hinge", "adversarial loss: hinge | wgan-gp"),
        Flag("label_noise", float, 0.0, "hinge: each logit's margin is 1 less a random part of this, uniform from 0",
             0.0, 1.0),
        Flag("lambda_gp", float, 10.0, "weight of the gradient penalty (wgan-gp)", 0.0),
        Flag("augment", policies, (), "DiffAugment on all that D sees, for small data sets: any of "
             "color,translation,cutout, or none"),
        Flag("total_step", int, 1_000_000, "steps of the whole run; one step is one update of G", 1),
        Flag("d_iters", int, _AUTO, "updates of D per step (default: 1 for hinge, 5 for wgan-gp)", 1),
        Flag("accumulate", int, 1, "parts that a batch is computed in, one after the other: less memory, the same "
             "updates but for batch norm's statistics, which are a part's", 1),
        Flag("g_lr", float, 1e-4, "learning rate of G (Adam)", 1e-12, 1.0),
        Flag("d_lr", float, 4e-4, "learning rate of D (Adam); TTUR: larger than G's", 1e-12, 1.0),
        Flag("lr_decay", float, 1.0, "factor on both learning rates after each epoch", 1e-6, 1.0),
        Flag("beta1", float, 0.0, "Adam's first moment, in [0, 1)"),
        Flag("beta2", float, 0.9, "Adam's second moment, in [0, 1)"),
        Flag("ema_decay", float, 0.999, "of the averaged generator G_ema that draws every sample, in [0, 1)"),
    ),
    "records": (
        Flag("log_step", int, 10, "steps between lines in metrics.jsonl", 1),
        Flag("sample_step", int, 100, "steps between sample grids and attention maps", 1),
        Flag("model_save_step", int, 1000, "steps between checkpoints", 1),
        Flag("keep_checkpoints", int, 5, "newest checkpoints kept on disk; 0 keeps all", 0),
        Flag("use_tensorboard", boolean, False, "also write TensorBoard events beside metrics.jsonl"),
        Flag("log_path", str, "./logs", "folder of the logs"),
        Flag("model_save_path", str, "./models", "folder of the checkpoints"),
        Flag("sample_path", str, "./samples", "folder of the pictures"),
        Flag("attn_raw", boolean, False, "also write the attention maps as numbers, in one .npz per record"),
        Flag("attn_path", str, None, "folder of the attention maps (default: beside the samples)"),
    ),
    "evaluation": (
        Flag("metrics", metrics, ("fid", "kid", "pr", "is"), "any of fid, kid, pr (precision and recall), is "
             "(Inception Score), swd (sliced Wasserstein distance: needs no weights); in --mode evaluate also nearest "
             "(are samples copies?), lpips (back-tracking of held-out pictures), cost (time, memory)"),
        Flag("metric_step", int, 0, "steps between measurements in training, the best fid's checkpoint being kept as "
             "best.pth; 0: none", 0),
        Flag("num_eval", int, 5000, "samples that metrics are taken of", 2),
        Flag("inception_weights", str, "standard", "weights of the Inception of fid, kid, pr and is: standard "
             "(TensorFlow's of 2015-12-05) | random (for tests) | PATH"),
        Flag("vgg_weights", str, "imagenet", "weights of VGG-16 for nearest and lpips, and fastgan's metadata and "
             "reconstructions: imagenet (torchvision's file) | random (for tests) | PATH"),
        Flag("fake_dir", str, None, "score the pictures of this folder, whoever made them, instead of a run's samples"),
        Flag("real_dir", str, None, "score against the pictures of this folder instead of the data set"),
        Flag("backtrack_steps", int, 300, "lpips: steps of Adam on the latent of each held-out picture", 1),
        Flag("backtrack_metadata", boolean, False, "lpips: let Adam find the metadata too, not z alone",
             model="fastgan"),
        Flag("against", one_of("baseline"), None, "cost: measure baseline (FastGAN without SLAE and metadata) in turn "
             "with the run's model", model="fastgan"),
    ),
    "from a checkpoint": (
        Flag("pretrained_model", step_or_best, None, "start from, sample or evaluate the checkpoint of this step, or "
             "best: of the best fid", 1),
        Flag("num_samples", int, 64, "pictures that --mode sample writes", 1),
        Flag("num_frames", int, 120, "frames of the film that --mode interpolate writes", 2),
        Flag("film", one_of("webp", "gif", "mp4"), "webp", "its format: webp | gif | mp4 (needs imageio-ffmpeg)"),
    ),
}
BY_NAME = {flag.name: flag for group in FLAGS.values() for flag in group}

# What a preset sets; it fills only what the user left unset. SAGAN's published settings are the flags' defaults.
_FASTGAN = {"imsize": 256, "z_dim": 256, "batch_size": 8, "hflip": True, "augment": ("color", "translation"),
            "label_noise": 0.2, "total_step": 50_000, "g_lr": 2e-4, "d_lr": 2e-4, "beta1": 0.5, "beta2": 0.999}
PRESETS = {
    "sagan": {
        "published": {},
        "cpu": {"g_conv_dim": 32, "d_conv_dim": 32, "g_attn": (8, 16), "batch_size": 16, "g_lr": 4e-4, "d_lr": 4e-4,
                "num_workers": 0},
    },
    "fastgan": {
        "published": _FASTGAN,
        "cpu": {**_FASTGAN, "imsize": 64, "g_conv_dim": 16, "d_conv_dim": 16, "d_lr": 8e-4, "recon": "l1",
                "num_workers": 0},
    },
}
IMSIZES = {"sagan": (32, 64, 128, 256), "fastgan": (64, 128, 256, 512, 1024)}

# What a run was started with for good: its checkpoints' tensors belong to these (a preset fills in several).
FIXED = ("model", "preset", "imsize", "holdout", "z_dim", "g_conv_dim", "d_conv_dim", "sn", "adv_loss", "g_attn",
         "d_attn", "attn_pool", "slae", "slae_kernel", "slae_d", "metadata", "metadata_layer",
         "vgg_weights")     # of the metadata alone
# What describes one call, not the run: never taken over from a saved config.
PER_CALL = ("config", "version", "mode", "train", "dry_run", "pretrained_model", "num_samples", "num_frames", "film",
             "fake_dir", "real_dir", "backtrack_steps", "backtrack_metadata", "against",
             "cache_dir", "cache_path", "log_path", "model_save_path", "sample_path", "attn_path", "device", "parallel")
# What a checkpoint's run was made with: worth a word when it changes from one call to the next.
RUN_SETTINGS = tuple(flag.name for title in ("run", "data", "network", "sagan", "fastgan", "optimization")
                     for flag in FLAGS[title] if flag.name not in PER_CALL)
