"""Train SAGAN or SLAE-FastGAN, look at what it attends to, draw from it.

    python main.py --adv_loss hinge --version sagan_celeb       CelebA in ./data/CelebA, the published settings
    python main.py --dataset folder --image_path DIR            any folder of pictures
    python main.py --model fastgan --dataset folder --image_path DIR        the same, for some hundred pictures
    python main.py --dataset toy --preset cpu                   no data, no GPU: faces drawn by code
    python main.py --version NAME --train false                 pictures from a finished or running run
    python main.py --version NAME --mode evaluate               its FID, KID, precision, recall and Inception Score
    torchrun --nproc_per_node=2 main.py ...                     several processes, one run

To resume, give the same command again. Pictures appear in samples/, curves in logs/, checkpoints in models/.
"""

import errno
import sys

import parameter
from failures import CheckpointError, Failure


def main(argv):
    """Run the command line `argv` (without the program's name) and return the exit code."""
    try:
        return run(argv)
    except Failure as failure:
        print(f"error: {failure}", file=sys.stderr)
        return failure.code
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno not in _DISK:
            raise
        where = f" {error.filename}" if error.filename else ""
        print(f"error: cannot write{where} ({error.strerror}).\n"
              "Free some space, or choose --sample_path, --log_path and --model_save_path anew.", file=sys.stderr)
        return CheckpointError.code


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def run(argv):
    """Parse, build, dispatch. Raises Failure for what the user can mend."""
    typed = parameter.parse(argv)
    # torch takes seconds to import: not before the command line is known to parse
    import torch

    import checkpoint
    import data_loader
    import distributed
    import evaluate
    import precision
    import sampler
    import training
    import utils
    import vgg
    import workers

    config = parameter.resolve(typed, checkpoint.saved_config, vgg.FILE.is_there)
    if config.parallel and config.mode in ("train", "evaluate") and not distributed.launched():
        distributed.relaunch(__file__, argv)
    place = distributed.start(config)
    try:
        utils.choose_algorithms(config.deterministic)
        dataset = data_loader.build_dataset(config) if config.mode == "train" else None
        if config.dry_run:
            describe(config, dataset, place)
            return 0
        precision.Precision(config.precision, place.device).tell()
        if config.mode == "evaluate":
            return evaluate.evaluate(config, place)
        if config.mode != "train":
            return sampler.MODES[config.mode](config, place) if distributed.is_first() else 0
        if place.device.type == "cpu" and config.preset == "published":
            distributed.say("note: the published settings are slow on a CPU; --preset cpu is made for one")
        return training.train(config, dataset, place)
    except torch.OutOfMemoryError:
        raise Failure(f"out of memory on {place.device}: lower --batch_size, --imsize, or the widths "
                      "--g_conv_dim and --d_conv_dim") from None
    except RuntimeError as error:
        raise workers.death(error) or error from None
    finally:
        distributed.stop()


def describe(config, dataset, place):
    """What a run with this config would be, on stdout (`--dry_run`)."""
    import data_loader
    from distributed import say
    from families import FAMILIES

    say(parameter.as_json(config), end="")
    if not config.fake_dir:                             # which asks for no network
        for name, net in zip("GD", FAMILIES[config.model].build(config), strict=True):
            say(f"{name} parameters: {sum(weight.numel() for weight in net.parameters())}")
    if dataset is not None:
        say(f"data: {data_loader.describe(dataset, config)}")
    say(f"device: {place.device}" + (f", {place.world} processes" if place.world > 1 else ""))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
