"""The table of network families. To add one: its models, its file in flags/, and a row here. Also what one run's
networks take from another's: fine-tuning.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn
from torch.overrides import TorchFunctionMode

import fastgan_models
import flags.fastgan
import losses
import resnet_models
import sagan_models
from device import mps
from device.distributed import say
from errors import UsageError
from gallery import records
from layers.attention import gammas
from layers.blocks import FeatureHeads
from layers.norms import ConditionalBatchNorm
from pretrained import lpips, vgg
from spectral import maybe_spectral_norm

WITHOUT_FEATURES = "--d_features none"      # what does without VGG-16, for error messages


@dataclass(frozen=True)
class Family:
    """One network family.

    `build(config, classes) -> (G, D)`, on the CPU, for so many classes, 0 for none; `objective(config, device)` returns
    an objective of losses.py, and `require(config)` raises what it would raise if weights are missing; all ranks must
    call both;
    `gammas(G, D) -> {layer: (1,) tensor}`, the learned weight of each attention layer's output;
    `records`, each (G, D, record) -> {name: float}, and `sheet(G, inputs, images, queries, step, names)` show what the
    networks attend to, see gallery/records.py; `baselines` is {--against: (its name in tables, the settings in which it
    differs)}; `compile_from`: on a GPU, `--compile auto` compiles if at least so many steps are ahead.
    """

    build: Callable
    objective: Callable
    require: Callable
    gammas: Callable
    records: tuple
    sheet: Callable
    baselines: dict
    compile_from: float


ARCHITECTURES = {"dcgan": sagan_models, "resnet": resnet_models}        # --arch


def _sagan(config, classes=0):
    return ARCHITECTURES[config.arch].build(config, classes)


def _adversarial(config, device):
    return losses.OBJECTIVES[config.adv_loss](config)


RECONSTRUCTIONS = {     # --recon: the distance between images and their reconstructions
    "l1": lambda config, device: losses.l1,
    "lpips": lambda config, device: lpips.load_on_every_rank(config.vgg_weights, device),
}


def _require_lpips(config):
    if config.recon == "lpips" and config.recon_weight:
        lpips.require(config.vgg_weights)


def _self_supervised(config, device):
    if not config.recon_weight:
        return losses.SelfSupervisedHinge(None, 0, config.label_noise)
    if device.type != "meta":                           # where nothing is trained
        say(f"reconstruction loss of D: {config.recon}")
    distance = RECONSTRUCTIONS[config.recon](config, device)        # DataError if its weights are missing
    return losses.SelfSupervisedHinge(distance, config.recon_weight, config.label_noise)


FAMILIES = {    # --model
    "sagan": Family(_sagan, _adversarial, lambda config: None, gammas,
                    (records.write_attention,), records.attention_sheet, {},
                    compile_from=100_000),      # compiling takes a minute or two and saves some 0.7 ms a step
    "fastgan": Family(fastgan_models.build, _self_supervised, _require_lpips, lambda G, D: {},
                      (records.write_masks, records.measure_inputs), records.mask_sheet, flags.fastgan.BASELINES,
                      compile_from=float("inf")),
}


def build(config, classes=0):
    """Return (G, D) of the config for so many classes, newly initialized, on the CPU."""
    G, D = FAMILIES[config.model].build(config, classes)
    if config.d_features != "none":
        wrap = maybe_spectral_norm(config.sn in ("both", "d"))
        D.feature_heads = FeatureHeads(vgg.features_shapes(config.d_features, config.imsize), wrap)
    return G, D


def build_objective(config, device):
    """Return what D and G minimize, an objective of losses.py. All ranks must call this. Raise what `require` does."""
    objective = FAMILIES[config.model].objective(config, device)
    if config.d_features == "none":
        return objective
    maps = vgg.load_maps_on_every_rank(config.vgg_weights, config.d_features, device, WITHOUT_FEATURES)
    return losses.OnFeatures(objective, maps, config.label_noise, config.d_features_weight, config.d_features_share)


def require(config):
    """Raise DataError or UsageError if weights that the objective needs are missing. All ranks must call this."""
    FAMILIES[config.model].require(config)
    if config.d_features != "none":
        vgg.FILE.require(config.vgg_weights, WITHOUT_FEATURES)


def lines_on_weights(config):
    """Return a line on what training fetches first, if it needs VGG-16's weights and they are not here yet."""
    always = config.d_features != "none" or config.recon == "lpips" and config.recon_weight
    here = config.vgg_weights != vgg.FILE.word or vgg.FILE.is_available(config.vgg_weights)
    if here or not (always or config.metadata):
        return []
    return [f"VGG-16: its weights are not here yet; training begins by fetching them ({vgg.FILE.bytes / 1e6:,.0f} MB)"
            + ("" if always else ", unless the metadata are cached")]


def build_networks(config, device, classes=None):
    """Return [G, D] for the Classes, newly initialized, on the device, in its memory format."""
    built = build(config, len(classes or ()))
    return [mps.with_contiguous_maps(net.to(device, memory_format=mps.memory_format(device)), device) for net in built]


def build_shapes(config, classes=0):
    """`build` on the meta device: networks of shapes alone, of any width in no time, without random numbers."""
    with torch.device("meta"), _Uninitialized():
        return build(config, classes)


class _Uninitialized(TorchFunctionMode):
    """Leave out torch.nn.init: on the meta device it imports torch._dynamo, which takes a second."""

    def __torch_function__(self, function, types, args=(), kwargs=None):
        if getattr(function, "__module__", None) == nn.init.__name__:
            return kwargs["tensor"]
        return function(*args, **(kwargs or {}))


def find_mismatch(config, state):
    """Return in words why the networks of a checkpoint's `state` are not those of `config`; None if they are."""
    classes = len((state.get("classes") or {"names": ()})["names"])     # older checkpoints have none
    expected = dict(zip("GD", (net.state_dict() for net in build_shapes(config, classes)), strict=True))
    for name, weights in (*expected.items(), ("G_ema", expected["G"])):
        if state[name].keys() != weights.keys():
            other = sorted(state[name].keys() ^ weights.keys(), key=str)[0]
            return f"{name}: {other} is {'missing' if other in weights else 'of another network'}"
        for key, weight in weights.items():
            shape = getattr(state[name][key], "shape", None)
            if shape != weight.shape:
                return f"{name}: {key} has the shape {shape and tuple(shape)}, not {tuple(weight.shape)}"
    return None


# --------------------------------------------------------------------------------------------------------- fine-tuning


def take_weights(nets, state, classes):
    """Load into `nets`, an object with G, D and G_ema, the weights of another run's `state` that fit, tensor by tensor.

    `classes` are the Classes of the nets, or None. In G's batch norms a class of the same name keeps its scale and
    shift, another one begins with their mean; D's table of classes fits if the classes are the same. Return ([name,
    ...] of what was taken, those of what was not).
    """
    mine, theirs = classes and classes.state()["names"], (state.get("classes") or {"names": None})["names"]
    taken, left = [], []
    for name in ("G", "D", "G_ema"):
        net = getattr(nets, name)
        own, source = net.state_dict(), _with_batch_norms_of(net, state[name], mine, theirs)
        tables = tuple(f"{key}." for key, module in net.named_modules()
                       if isinstance(module, torch.nn.Embedding) and name == "D" and theirs not in (mine, None))
        fitting = [key for key, weight in own.items() if getattr(source.get(key), "shape", None) == weight.shape
                   and not key.startswith(tables)]
        net.load_state_dict(own | {key: source[key] for key in fitting})
        taken += [f"{name}.{key}" for key in fitting]
        left += [f"{name}.{key}" for key in own if key not in fitting]
    return taken, left


def _with_batch_norms_of(net, source, mine, theirs):
    """Return the state dict `source` with batch norms as `net` has them, plain or class-conditional: every class gets
    the scale and shift of a plain one, a plain one the mean over the classes. `mine` and `theirs` are the names of the
    classes of `net` and of `source`, or None.
    """
    source = dict(source)
    plain = {"weight": "scale.weight", "bias": "shift.weight"}
    for name, module in net.named_modules():
        inner = f"{name}.norm."
        if isinstance(module, ConditionalBatchNorm):
            for key in [key for key in source if key.startswith(f"{name}.") and key.count(".") == name.count(".") + 1]:
                source.setdefault(inner + key.removeprefix(f"{name}."), source[key])
            for key, table in plain.items():
                if module.scale is not None and inner + key in source:
                    source[f"{name}.{table}"] = source[inner + key].expand(len(module.scale.weight), -1)
                elif f"{name}.{table}" in source and module.scale is not None and theirs not in (mine, None):
                    rows = source[f"{name}.{table}"]
                    source[f"{name}.{table}"] = torch.stack([
                        rows[theirs.index(one)] if one in theirs else rows.mean(0) for one in mine])
                elif f"{name}.{table}" in source:
                    source.setdefault(inner + key, source[f"{name}.{table}"].mean(0))
        elif isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            for key in [key for key in source if key.startswith(inner)]:
                source.setdefault(f"{name}.{key.removeprefix(inner)}", source[key])
            for key, table in plain.items():
                if f"{name}.{table}" in source:
                    source.setdefault(f"{name}.{key}", source[f"{name}.{table}"].mean(0))
    return source


def frozen_of_d(D, count):
    """Return {name: weight} of D's first `count` blocks, which `--freeze_d` keeps (FreezeD, Mo et al. 2020,
    arXiv 2002.10964). Raise UsageError if D has fewer.
    """
    stages = D.stages()
    if count > len(stages):
        raise UsageError(f"--freeze_d {count}: this D has {len(stages)} blocks")
    frozen = {weight for stage in stages[:count] for module in stage for weight in module.parameters()}
    return {name: weight for name, weight in D.named_parameters() if weight in frozen}
