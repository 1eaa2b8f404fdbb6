"""SLAE-FastGAN's flags, presets, sizes and checks (`--model fastgan`)."""

from errors import UsageError
from flags.common import DERIVED, Flag, always
from flags.pictures import short_side
from flags.scaling import for_batch
from flags.values import boolean, one_of

IS_DEFAULT = False      # of --model

HELP = {
    "model": "SLAE-FastGAN, for small sets of pictures",
    "preset": "(the better choice) a D with features of VGG-16 and, up to 64 px, narrow networks",
    "imsize": "64 to 1024",
    "g_conv_dim": "at 128 px",
    "d_conv_dim": "at 64 px",
    "compile": "never, as its gain was not measured",
    "conditional": "false",
}


def asks_for_classes(values):
    """Return whether `--conditional auto` uses the classes of the pictures, if they have any."""
    return False


def _without_metadata(values):
    return not values["metadata"] and "--metadata false"


FLAGS = (
    Flag("slae", boolean, True, "spatial attention in G's skip-layer excitations; false: plain FastGAN",
         fixed=always),
    Flag("slae_kernel", int, 7, "kernel size of the spatial attention: 7 or 3", fixed=always,
         unused=lambda values: not (values["slae"] or values["slae_d"]) and "--slae false"),
    Flag("slae_d", boolean, False, "spatial attention in D's skip-layer excitations too", fixed=always),
    Flag("metadata", boolean, True, "feed G VGG-16 features of the training pictures beside the noise; harms where "
         "pictures are much alike, such as faces", fixed=always),
    Flag("metadata_layer", one_of("relu5_3", "relu4_3"), "relu5_3", "layer of VGG-16 for the metadata: "
         "relu5_3 | relu4_3 (shallower, for small pictures)", fixed=always, unused=_without_metadata),
    Flag("metadata_weight", float, 0.5, "share of the latent's variance that metadata get, the rest is z's; with fewer "
         "pictures than z_dim 0.25 may keep metadata from drowning z, and harms faces less", low=0.0, below=1.0,
         fixed=always, unused=_without_metadata),
    Flag("metadata_sample", one_of("mix", "bank", "gauss"), "mix", "metadata of a sample: mix (of 2 or 3 "
         "pictures) | bank (of one picture) | gauss (normal, with the same covariance)", unused=_without_metadata),
    Flag("recon", one_of("lpips", "l1"), DERIVED, "reconstruction loss of D's decoders: "
         "lpips | l1 (default: lpips if VGG-16's weights are available, else l1)"),
    Flag("recon_weight", float, 1.0, "weight of the reconstructions in D's loss; 0: none are made, in a tenth "
         "less time", 0.0),
    Flag("backtrack_metadata", boolean, False, "with --metrics lpips: optimize the metadata too, not z alone",
         per_call=True),
    Flag("against", one_of("baseline"), None, "with --metrics cost: compare with baseline (FastGAN without SLAE "
         "and metadata), measured in alternation", per_call=True),
)

_PUBLISHED = {"imsize": 256, "z_dim": 256, "batch_size": 8, "hflip": True, "augment": ("color", "translation"),
              "label_noise": 0.2, "total_step": 50_000, "g_lr": 2e-4, "d_lr": 2e-4, "beta1": 0.5, "beta2": 0.999}
_CPU = {**_PUBLISHED, "imsize": 64, "g_conv_dim": 16, "d_conv_dim": 16, "d_lr": 8e-4, "recon": "l1", "num_workers": 0}
# for few pictures, up to 64 px and above; what each of these gives: docs/small_sets.md
_FEW = {"slae": False, "metadata": False, "augment": ("color", "mirror"), "d_features": "vgg16_fine",
        "d_features_weight": 0.3, "d_features_share": 0.125}
PRESETS = {     # {preset: {flag: value}}, for flags left unset
    "published": _PUBLISHED,
    "cpu": _CPU,
    "gpu": for_batch(_PUBLISHED),
    "small": {**_CPU, **_FEW, "g_conv_dim": 8, "d_conv_dim": 8, "recon_weight": 0.0, "sn": "d", "g_lr": 4e-4},
}
LARGER = {      # the same above 64 px, where narrow networks and their settings were not measured
    "small": {**_PUBLISHED, **_FEW, "g_conv_dim": 64, "d_conv_dim": 64, "recon_weight": 1.0, "sn": "auto",
              "recon": DERIVED, "num_workers": "auto"},
}

PRESETS_DEPEND_ON = ({}, {"imsize": 256})       # for docs/flags.md


def find_preset(name, values):
    """Return {flag: value} of a preset; `values` holds what the user set, and defaults, but of imsize and batch_size
    None where the user set none.
    """
    if name == "gpu":
        return for_batch(_PUBLISHED, values["batch_size"])
    is_larger = values["imsize"] is not None and short_side(values["imsize"]) > 64
    return LARGER.get(name, PRESETS[name]) if is_larger else PRESETS[name]


IMSIZES = (64, 128, 256, 512, 1024)

EXTRA_MODES = ("style_mix",)        # those of --mode that not every family has

# {--against: (its name in tables, the settings in which it differs from the run)}
BASELINES = {"baseline": ("baseline: FastGAN without SLAE and metadata", {"slae": False, "metadata": False})}


def fill_in(values, weights_there):
    """Replace the defaults that depend on other flags, in place."""
    if values["recon"] is None:
        # what else needs the ImageNet weights downloads them first, or ends the run
        needed = values["metadata"] or values["d_features"] != "none"
        available = needed and values["vgg_weights"] == "imagenet" or weights_there(values["vgg_weights"])
        values["recon"] = "lpips" if available else "l1"


def check(values):
    """Raise UsageError for the first setting that this family does not support."""
    if values["slae_kernel"] not in (3, 7):
        raise UsageError(f"--slae_kernel {values['slae_kernel']}: must be 3 or 7")
    if values["adv_loss"] != "hinge":
        raise UsageError(f"--adv_loss {values['adv_loss']}: fastgan has its own objective, on hinge; use hinge")
    if values["against"] and "cost" not in values["metrics"]:
        raise UsageError(f"--against {values['against']}: needs --metrics cost")
    if values["against"] and BASELINES[values["against"]][1].items() <= values.items():
        raise UsageError(f"--against {values['against']}: this run is without SLAE and metadata already; leave it out")
    if values["backtrack_metadata"] and not values["metadata"]:
        raise UsageError("--backtrack_metadata true: this run has no metadata; leave it out")
