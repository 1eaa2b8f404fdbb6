"""SAGAN's flags, presets, sizes and checks (`--model sagan`)."""

from errors import UsageError
from flags.common import DERIVED, Flag, always, boolean, points, sizes, written

IS_DEFAULT = True       # of --model

HELP = {
    "model": "self-attention",
    "imsize": "32 to 256",
    "g_conv_dim": "at half the image size",
    "d_conv_dim": "at half the image size",
    "compile": "on a GPU if 100,000 or more steps are ahead",
}


def _without_attention(values):
    return not (values["g_attn"] or values["d_attn"]) and "--g_attn none --d_attn none"


FLAGS = (
    Flag("g_attn", sizes, DERIVED, "feature sizes with attention in G, such as 16,32, or none "
         "(default: the last two before the image)", fixed=always),
    Flag("d_attn", sizes, DERIVED, "feature sizes with attention in D, such as 8,4, or none "
         "(default: 8,4 at 64 px, growing with imsize)", fixed=always),
    Flag("attn_pool", boolean, False, "2x2 max-pooling of keys and values: a quarter of attention's work",
         fixed=always, unused=_without_attention),
    Flag("attn_queries", points, None, "query points whose attention maps are shown, 'y,x;y,x' as fractions of the "
         "image, from its top left (default: on a face the eyes, mouth, hair and a corner)", unused=_without_attention),
)

PRESETS = {     # {preset: {flag: value}}, for flags left unset; the published settings are the flags' defaults
    "published": {},
    "cpu": {"g_conv_dim": 32, "d_conv_dim": 32, "g_attn": (8, 16), "batch_size": 16, "g_lr": 4e-4, "d_lr": 4e-4,
            "num_workers": 0},
}

IMSIZES = (32, 64, 128, 256)

EXTRA_MODES = ()        # those of --mode that not every family has


def g_feature_sizes(imsize):
    """Return the heights of G's feature maps in order: 4, 8, ..., imsize / 2."""
    return [2**power for power in range(2, imsize.bit_length() - 1)]


def d_feature_sizes(imsize):
    """Return the heights of D's feature maps in order: imsize / 2, ..., 8, 4."""
    return g_feature_sizes(imsize)[::-1]


def fill_in(values, weights_there):
    """Replace the defaults that depend on other flags, in place."""
    # None when only folders are scored, without networks
    imsize = 64 if values["imsize"] is None else values["imsize"]
    if values["g_attn"] is None:
        values["g_attn"] = (imsize // 4, imsize // 2)
    if values["d_attn"] is None:
        values["d_attn"] = (max(4, imsize // 16), max(8, imsize // 8))


def check(values):
    """Raise UsageError for the first setting that this family does not support."""
    imsize = 64 if values["imsize"] is None else values["imsize"]
    for name, available in (("g_attn", g_feature_sizes(imsize)), ("d_attn", d_feature_sizes(imsize))):
        wrong = [size for size in values[name] if size not in available]
        if wrong and not values["fake_dir"]:
            raise UsageError(f"--{name} {written(values[name])}: at --imsize {imsize} the feature sizes are "
                             f"{written(available)}; there is no {wrong[0]}")
