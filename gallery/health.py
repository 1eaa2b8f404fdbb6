"""Warnings of training that has gone wrong: a D that tells nothing, a collapsed G, a D that memorizes."""

import torch

from device.distributed import say


class Health:
    """Warns, once each, of training that has gone wrong, and says what to try."""

    FROM = 500              # steps: before, networks are not expected to differ from their initialization
    SPREAD = 0.05           # of the real images' spread that G's may fall to
    OVER = 1000             # steps over which D's logits are averaged
    GAP = 0.05              # of real and fake ones, at least; runs that learned had 0.16 and more, a stuck one 0.02
    _TEXTS = {
        "D": "D gives the same logit to all images, so that G learns nothing: try a lower --d_lr, or --sn both",
        "chance": "D has not told real from fake images for {} steps, so that it shows G no way: try a lower --g_lr, a "
                  "higher --d_lr, or --d_iters 2",
        "G": "G draws nearly the same image for every z (mode collapse): try --augment color,translation, a lower "
             "--g_lr, or go back with --pretrained_model",
        "memorized": "D rates held-out pictures as it rates fakes, so it has memorized the training pictures: try "
                     "--augment color,translation, --hflip true, or more pictures",
    }

    def __init__(self):
        self.warned = set()
        self.gaps = []          # [(step, D's mean logit of real images - that of fakes)] since the last average

    def watch(self, step, means):
        """Check the mean logits of the last steps, means["d_real"] and means["d_fake"]."""
        self.gaps.append((step, means["d_real"] - means["d_fake"]))
        over = step - self.gaps[0][0]
        if over >= self.OVER:
            gap = sum(gap for _, gap in self.gaps) / len(self.gaps)
            self._warn("chance", step, gap < self.GAP, over)
            self.gaps.clear()

    def check(self, step, fakes, reals, logits):
        """Check a record: images of G and real ones (N, C, H, W), D's `logits` {"real", "fake"[, "heldout"]: (N,)}.

        Return {name: float} for the metrics line.
        """
        means = {name: values.mean().item() for name, values in logits.items()}
        everything = torch.cat(list(logits.values()))
        spreads = [images.float().std(0).mean().item() for images in (fakes, reals) if len(images) > 1]
        self._warn("D", step, bool(everything.max() - everything.min() < 1e-4 * (1 + everything.abs().max())))
        self._warn("G", step, len(spreads) == 2 and spreads[0] < self.SPREAD * spreads[1])
        if "heldout" in means:
            middle = (means["real"] + means["fake"]) / 2
            self._warn("memorized", step, means["heldout"] < middle and means["real"] - means["fake"] > 0.5)
        return {"d_heldout": means["heldout"], "d_trained": means["real"]} if "heldout" in means else {}

    def _warn(self, kind, step, is_wrong, *details):
        if is_wrong and step >= self.FROM and kind not in self.warned:
            self.warned.add(kind)
            say(f"warning: step {step}: {self._TEXTS[kind].format(*details)}")
