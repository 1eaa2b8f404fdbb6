"""The metrics of `--metric_step`: measured in training, the best checkpoint kept, and whether a run is done."""

from typing import NamedTuple

import utils
from device import distributed, watch
from device.distributed import say
from errors import first_line
from generate.draw import DrawnSamples
from storage import checkpoint, score_table
from storage.journal import count_between


class Standing(NamedTuple):
    """The step of best.pth, -1 without one, and how many measurements since then gave no better score."""

    step: int
    worse: int

    def is_done(self, config):
        """Return whether no score has been better for `--patience` measurements."""
        return self.worse >= config.patience

    def in_words(self):
        """Return what a run that is done says."""
        return f"no score is better than that of step {self.step}, which best.pth has, for {self.worse} measurements"


def find_standing(config, folders, step):
    """Return the Standing at `step` of a run that measures by what is on the disk; (-1, 0) if it does not.

    What was measured after that step does not count: it is given up, or was never saved.
    """
    best, of_step = checkpoint.load_best(folders.models) if config.metric_step else (None, -1)
    return Standing(of_step, count_between(folders.logs, of_step, step, best["metric"])) if best else Standing(-1, 0)


class Measurements:
    """Those of one run: `meter` scores samples of the `trainer`'s G_ema, or is None.

    `standing` is the run's, on all ranks.
    """

    def __init__(self, trainer, meter, folders):
        self.trainer, self.meter, self.folders, self.config = trainer, meter, folders, trainer.config
        self.standing = distributed.on_first(lambda: find_standing(self.config, folders, trainer.step))

    def take(self, state, stopped):
        """Return a list of Scores, or None if `stopped()` came true; if they are the best so far, save `state()` as
        best.pth. All ranks must call this.
        """
        trainer, config = self.trainer, self.config
        samples = DrawnSamples(trainer.G_ema, trainer.latents, config.num_eval, config.seed, trainer.precision,
                               config.imsize)
        with utils.forked_random_state(trainer.place.device):
            scores = self.meter.measure(samples, trainer.latents.source(config.seed), stopped)
        if scores is None:
            return None
        better, self.standing = distributed.gather(self._rate(scores) if distributed.is_first() else None)[0]
        if better:
            saved = {**state(), "best": better}
            if distributed.is_first():
                with watch.not_ended():
                    checkpoint.save_best(saved, self.folders.models)
        return scores

    def _rate(self, scores):
        """Return (the entry of a new best.pth, None if the scores are no better; the Standing with these scores)."""
        try:
            best, step = checkpoint.load_best(self.folders.models)
        except checkpoint.UnreadableCheckpoint as error:
            say(f"warning: {first_line(error)} Whether these scores are better is not known")
            return None, self.standing
        better = score_table.better_score(scores, best, self.meter.scores_by_rank())
        if better or best is None:
            return better, Standing(self.trainer.step if better else -1, 0)
        now = self.trainer.step
        if step == now:                                 # measured again, as the run was killed before its line
            return None, Standing(step, 0)
        # the line of these scores is not written yet
        return None, Standing(step, count_between(self.folders.logs, step, now - 1, best["metric"]) + 1)
