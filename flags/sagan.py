"""SAGAN's flags, presets, sizes and checks (`--model sagan`)."""

from errors import UsageError
from flags.common import DERIVED, Flag, always
from flags.pictures import FIRST, short_side
from flags.scaling import for_batch
from flags.values import boolean, one_of, points, sizes, written

IS_DEFAULT = True       # of --model

HELP = {
    "model": "self-attention",
    "preset": "as cpu, with augmentation",
    "imsize": "32 to 256",
    "g_conv_dim": "at half the image size",
    "d_conv_dim": "at half the image size",
    "compile": "on a GPU if 100,000 or more steps are ahead",
    "conditional": "true with --arch resnet where the pictures have classes, else false",
}


def asks_for_classes(values):
    """Return whether `--conditional auto` uses the classes of the pictures, if they have any."""
    return values["arch"] == "resnet"


def _without_attention(values):
    return not (values["g_attn"] or values["d_attn"]) and "--g_attn none --d_attn none"


def _resnet(values):
    return values["arch"] == "resnet" and "--arch resnet"


FLAGS = (
    Flag("arch", one_of("dcgan", "resnet"), "dcgan", "networks: dcgan (the 64-px model) | resnet (the paper's own, "
         "residual and with classes)", fixed=always),
    Flag("g_attn", sizes, DERIVED, "feature sizes with attention in G, such as 16,32, or none "
         "(default: the last two before the image; resnet: 32, at 32 px 16)", fixed=always),
    Flag("d_attn", sizes, DERIVED, "feature sizes with attention in D, such as 8,4, or none "
         "(default: 8,4 at 64 px, growing with imsize; resnet: as G)", fixed=always),
    Flag("attn_pool", boolean, False, "2x2 max-pooling of keys and values: a quarter of attention's work; resnet "
         "always does", fixed=always, unused=lambda values: _resnet(values) or _without_attention(values)),
    Flag("attn_queries", points, None, "query points whose attention maps are shown, 'y,x;y,x' as fractions of the "
         "image, from its top left (default: on a face the eyes, mouth, hair and a corner)", unused=_without_attention),
)

_CPU = {"g_conv_dim": 32, "d_conv_dim": 32, "g_attn": (8, 16), "batch_size": 16, "g_lr": 4e-4, "d_lr": 4e-4,
        "num_workers": 0}
_AUGMENTED = {"augment": ("translation",), "hflip": True}           # against a D that learns its pictures by heart
PRESETS = {     # {preset: {flag: value}}, for flags left unset; the published settings are the flags' defaults
    "published": {},
    "cpu": _CPU,
    "gpu": for_batch({}),
    "small": {**_CPU, **_AUGMENTED},
}
_RESNET_CPU = {"imsize": 32, "g_conv_dim": 16, "d_conv_dim": 32, "batch_size": 16, "num_workers": 0}
RESNET = {      # the same with --arch resnet, by image size; None: all others
    # section 4 of the paper; G_ema as in the best public recipe, mmgeneration's "BigGAN schedule"
    ("published", None): {"imsize": 128, "batch_size": 256, "ema_start": 2000},
    # CIFAR-10 as StudioGAN and mmgeneration train it
    ("published", 32): {"d_iters": 5, "g_lr": 2e-4, "d_lr": 2e-4, "beta1": 0.5, "beta2": 0.999, "total_step": 100_000,
                        "ema_decay": 0.0},
    # the paper's rates: with 4e-4 for both D falls to chance on CIFAR-10, and G to one picture a class
    ("cpu", None): _RESNET_CPU,
    ("small", None): {**_RESNET_CPU, **_AUGMENTED},
}


PRESETS_DEPEND_ON = ({}, {"arch": "resnet"}, {"arch": "resnet", "imsize": 32})     # for docs/flags.md


def find_preset(name, values):
    """Return {flag: value} of a preset; `values` holds what the user set, and defaults, but of imsize and batch_size
    None where the user set none.
    """
    if name == "gpu":
        return for_batch(find_preset("published", values), values["batch_size"])
    if values["arch"] != "resnet":
        return PRESETS[name]
    side = values["imsize"] and short_side(values["imsize"])
    return RESNET.get((name, side)) or RESNET[name, None]


IMSIZES = (32, 64, 128, 256)

EXTRA_MODES = ()        # those of --mode that not every family has


def g_feature_sizes(imsize):
    """Return the sizes of G's feature maps in order, their shorter sides: 4, 8, ..., imsize / 2."""
    return [FIRST * 2**power for power in range((short_side(imsize) // FIRST).bit_length() - 1)]


def d_feature_sizes(imsize):
    """Return the sizes of D's feature maps in order, their shorter sides: imsize / 2, ..., 8, 4."""
    return g_feature_sizes(imsize)[::-1]


def fill_in(values, weights_there):
    """Replace the defaults that depend on other flags, in place."""
    # None when only folders are scored, without networks
    side = 64 if values["imsize"] is None else short_side(values["imsize"])
    if values["arch"] == "resnet":
        g_attn = d_attn = (min(32, side // 2),)
    else:
        g_attn, d_attn = (side // 4, side // 2), (max(4, side // 16), max(8, side // 8))
    for name, default in (("g_attn", g_attn), ("d_attn", d_attn)):
        if values[name] is None:
            values[name] = default


def check(values):
    """Raise UsageError for the first setting that this family does not support."""
    imsize = 64 if values["imsize"] is None else values["imsize"]
    sizes_of_g, sizes_of_d = g_feature_sizes(imsize), d_feature_sizes(imsize)
    if values["arch"] == "resnet":                      # G's first block ends at 8; D's last blocks keep their size
        side = short_side(imsize)
        sizes_of_g, sizes_of_d = [*sizes_of_g[1:], side], sizes_of_d[:-1] if side == 32 else sizes_of_d
    for name, available in (("g_attn", sizes_of_g), ("d_attn", sizes_of_d)):
        wrong = [size for size in values[name] if size not in available]
        if wrong and not values["fake_dir"]:
            raise UsageError(f"--{name} {written(values[name])}: at --imsize {imsize} the feature sizes are "
                             f"{written(available)}; there is no {wrong[0]}")
