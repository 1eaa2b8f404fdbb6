"""The metrics that --metrics names, the networks whose features they compare, and the names of their scores."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Metric:
    """One metric: its `file` in metrics/; its description `words` for --help; `of_sets`: it compares two sets of
    pictures, so --metric_step can compute it in training; `of_folders`: it can be computed for --fake_dir;
    `of_classes`: only for a run with classes, against its real pictures. A set needs at least `least` pictures.
    """

    file: str
    words: str = ""
    of_sets: bool = False
    of_folders: bool = False
    of_classes: bool = False
    least: int = 1


METRICS = {     # --metrics, in the order in which --mode evaluate computes them
    "fid":     Metric("features", of_sets=True, of_folders=True, least=2),
    "kid":     Metric("features", of_sets=True, of_folders=True, least=2),
    # of a picture and its five nearest neighbours
    "pr":      Metric("features", "precision, recall, coverage", of_sets=True, of_folders=True, least=6),
    "is":      Metric("features", "Inception Score: only with --feature_net inception", of_sets=True, of_folders=True,
                      least=2),
    "swd":     Metric("swd", "sliced Wasserstein distance: needs no weights", of_sets=True, of_folders=True),
    "ifid":    Metric("ifid", "fid within each class, of a run with classes", of_classes=True, least=2),
    "nearest": Metric("nearest", "are samples copies?", of_folders=True, least=2),
    "lpips":   Metric("backtrack", "back-tracking of held-out pictures"),
    "share":   Metric("variation", "of the images' variance, from each input of G"),
    "cost":    Metric("cost", "time, memory"),
}

FEATURE_NETS = ("inception", "vgg16", "dinov2", "clip")     # --feature_net
FEW = 1000          # real pictures: with fewer, best.pth goes by kid, as a fid mostly measures how many there are


def score_name(score, feature_net):
    """Return the name of a score of this network's features: fid and kid of Inception's, fd_vgg16 and kid_vgg16, ..."""
    if feature_net == "inception" or score.startswith("inception_score"):
        return score
    return f"{'fd' if score == 'fid' else score}_{feature_net}"


def scores_by_rank(feature_net, real):
    """Return the names of the scores that decide which checkpoint is best, the first that was measured counts.

    `real` is the number of real pictures.
    """
    fid, kid = (score_name(score, feature_net) for score in ("fid", "kid"))
    return (kid, fid) if real < FEW else (fid, kid)
