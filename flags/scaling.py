"""Settings for another batch size: `--preset gpu` is the published recipe with batches that fill a large GPU.

With batches k times as large, Adam follows the same path in 1 / k of the steps if its learning rate grows by sqrt(k)
and its averages of gradients forget k times as much per step (Malladi et al. 2022, arXiv 2205.10287, definition 5.1),
and so does an average of weights whose decay is taken to the power of k (Busbridge et al. 2023, arXiv 2307.13813). The
rule holds where the noise of a batch rules the path, so not for any k.
"""

from flags.common import FLAGS

TIMES = 4       # the published batch, if none is typed

_DEFAULTS = {flag.name: flag.default for group in FLAGS.values() for flag in group}


def for_batch(preset, batch_size=None):
    """Return {flag: value} of a preset for batches of this size, by default TIMES its own."""
    before = _DEFAULTS | preset
    k = batch_size / before["batch_size"] if batch_size else TIMES
    # beta2 not under 0.5: nearer to 0, Adam's updates are signs of single gradients
    decay = {name: max(least, round(1 - k * (1 - before[name]), 6)) for name, least in (("beta1", 0.0), ("beta2", 0.5))}
    return preset | decay | {
        "batch_size": batch_size or TIMES * before["batch_size"],
        "g_lr": _three_digits(k**0.5 * before["g_lr"]), "d_lr": _three_digits(k**0.5 * before["d_lr"]),
        "ema_decay": round(before["ema_decay"]**k, 6), "ema_start": round(before["ema_start"] / k),
        "total_step": max(1, round(before["total_step"] / k)),
    }


def _three_digits(number):
    return float(f"{number:.3g}")
