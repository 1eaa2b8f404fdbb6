"""Settings for another batch size: `--preset gpu` is the published recipe with batches that fill a large GPU.

With batches k times as large there are 1 / k of the steps. Adam's updates are about as long as its learning rate, so it
gets as far if that grows by k, while the gradients of successive batches agree; where their noise rules it grows by
sqrt(k) (Malladi et al. 2022, arXiv 2205.10287, definition 5.1). On faces, for k = 4, k was far better (docs/speed.md):
up to there rates grow by k, beyond by its square root. By the same definition Adam's averages forget k times as much a
step; an average of weights has its decay to the power of k (Busbridge et al. 2023, arXiv 2307.13813).
"""

from flags.common import FLAGS

TIMES = 4       # the published batch, if none is typed; and so far learning rates grow in proportion
MOST = 64       # times the published batch: settings of larger ones are those of this, of smaller ones the published

_DEFAULTS = {flag.name: flag.default for group in FLAGS.values() for flag in group}


def for_batch(preset, batch_size=None):
    """Return {flag: value} of a preset for batches of this size, by default TIMES its own."""
    before = _DEFAULTS | preset
    published = before["batch_size"]
    k = min(max(batch_size, published), MOST * published) / published if batch_size else TIMES
    rate = min(k, (k * TIMES)**0.5)
    # beta2 not under 0.5: nearer to 0, Adam's updates are signs of single gradients
    decay = {name: max(least, round(1 - k * (1 - before[name]), 6)) for name, least in (("beta1", 0.0), ("beta2", 0.5))}
    return preset | decay | {
        "batch_size": batch_size or TIMES * published,
        "g_lr": _three_digits(rate * before["g_lr"]), "d_lr": _three_digits(rate * before["d_lr"]),
        "ema_decay": round(before["ema_decay"]**k, 6), "ema_start": round(before["ema_start"] / k),
        "total_step": max(1, round(before["total_step"] / k)),
    }


def _three_digits(number):
    return float(f"{number:.3g}")
