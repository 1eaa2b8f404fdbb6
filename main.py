"""Train SAGAN or SLAE-FastGAN, show what the networks attend to, generate samples.

    python main.py --adv_loss hinge --version sagan_celeb       CelebA in ./data/CelebA, the published settings
    python main.py --dataset folder --image_path DIR            any folder of pictures
    python main.py --model fastgan --dataset folder --image_path DIR        the same, for some hundred pictures
    python main.py --dataset toy --preset cpu                   no data, no GPU: faces drawn by code
    python main.py --version NAME --train false                 samples from a finished or running run
    python main.py --version NAME --mode evaluate               its FID, KID, precision, recall and Inception Score
    python main.py --mode serve                                 the galleries, for a browser on another machine
    torchrun --nproc_per_node=2 main.py ...                     several processes, one run

To resume, run the same command again. Pictures are written to samples/, metrics to logs/, checkpoints to models/.
"""

import errno
import os
import sys

import parameter
from device import console
from device.signals import Interrupt, Interrupted
from errors import CheckpointError, Failure, UsageError, out_of_memory_on
from flags.values import written


def main(argv):
    """Run the command line `argv` (without the program's name) and return the exit code."""
    try:
        with Interrupt() as interrupt:
            return run(argv, interrupt)
    except Failure as failure:
        if not failure.silent:
            console.report(failure)
        return failure.code
    except Interrupted as request:
        if os.environ.get("RANK", "0") == "0":
            print("interrupted", file=sys.stderr)
        return 128 + request.number
    except KeyboardInterrupt as second:
        print("interrupted" + f"; {second}" * bool(str(second)), file=sys.stderr)
        return 130
    except OSError as error:
        free = "Move it away" if error.errno in (errno.ENOTDIR, errno.EEXIST) else "Free some space"
        advice = f"\n{free}, or set other --sample_path, --log_path and --model_save_path."
        if not getattr(error, "silent", False):
            console.report(f"{error.filename or 'the disk'}: {error.strerror or error}"
                           f"{advice if error.errno in _DISK_ERRORS else ''}")
        return CheckpointError.code


_DISK_ERRORS = (errno.ENOSPC, errno.EDQUOT, errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST)


def run(argv, interrupt):
    """Parse the command line, dispatch on --mode, return the exit code. Raise Failure for what the user can fix."""
    typed = parameter.parse(argv)
    if typed.get("mode") == "serve" and not typed.get("dry_run"):
        from gallery import serve

        return serve.serve(parameter.resolve(typed))    # without torch
    # of several ranks, the end of one lets the others print 20 lines of C++ frames for each connection to it
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
    os.environ.setdefault("PYTORCH_ENABLE_MPS_FALLBACK", "1")      # on Macs, the CPU does what their GPUs cannot
    # importing torch takes seconds, so parse first: mistakes are reported at once
    from device import distributed, watch
    from gallery import film
    from generate import clean, samples
    from pretrained import vgg
    from storage import checkpoint

    interrupt.check()                                   # torch's import catches what is raised in numpy's
    config = parameter.resolve(samples.settings_of(typed), checkpoint.saved_config, vgg.FILE.is_available)
    if config.mode == "train" and typed.get("config") is not None and "version" not in typed:
        distributed.say(f"note: --config takes no name: this run is '{config.version}'; --version names it")
    if config.mode == "clean_data":
        return clean.clean_data(config) if distributed.is_first() else 0
    if config.mode == "evolution" and not config.dry_run:
        return film.evolution(config) if distributed.is_first() else 0
    if config.parallel and config.mode in ("train", "evaluate") and not distributed.launched():
        return distributed.on_every_gpu(__file__, argv)
    try:
        with watch.Watch():
            return watched(config, interrupt)
    finally:
        distributed.stop()


def watched(config, interrupt):
    """`dispatch`, which names the cause if memory, a loader process or another rank is lost."""
    from dataset import workers
    from device import distributed, watch

    try:
        return dispatch(config, distributed.start(config), interrupt)
    except (MemoryError, RuntimeError, Interrupted) as error:
        where = out_of_memory_on(error)
        if where:
            raise Failure(f"out of memory on {where}: {_remedy(config.mode, where)}") from None
        raise watch.lost_rank(error) or workers.death(error) or error from None


def _remedy(mode, where):
    """Return what helps a command of this `--mode` that has no memory left on the GPU, or on this machine."""
    if mode == "train":
        return "lower --batch_size, --imsize, --z_dim, or the widths --g_conv_dim and --d_conv_dim"
    way = f"{'use --device cpu, or ' if where == 'the GPU' else ''}wait for what else uses it"
    return way + ", or give fewer --metrics, or another --feature_net" * (mode == "evaluate")


def dispatch(config, place, interrupt):
    """Do what `config` asks for on this `place`. Return the exit code."""
    import data_loader
    import start
    from device import distributed
    from device.distributed import is_first, say
    from device.precision import Precision, choose_algorithms
    from generate import modes
    from metrics import evaluate

    _require_one_config(config)
    choose_algorithms(config.deterministic)
    if config.dry_run:
        describe(config, data_loader.build_dataset(config) if config.mode == "train" else None, place)
        return 0
    precision = Precision(config.precision, place.device)
    precision.announce()
    if config.mode == "evaluate":
        return evaluate.evaluate(config, place, precision)
    if config.mode != "train":
        return modes.MODES[config.mode](config, place, precision) if is_first() else 0
    if place.device.type == "cpu" and (why := distributed.why_no_gpu(config)):
        say(f"note: training on the CPU: {why}")
    if place.device.type == "cpu" and (note := _note_on_slow_settings(config)):
        say(f"note: {note}")
    return start.train(config, place, precision, interrupt)


def _note_on_slow_settings(config):
    """Return what to say on a CPU of a preset with networks of full width; None of one with narrower ones."""
    family, full = parameter.FAMILIES[config.model], parameter.FLAGS["g_conv_dim"].default
    widths = [family.find_preset(config.preset, {**vars(config), "imsize": imsize}).get("g_conv_dim", full)
              for imsize in (config.imsize, None)]
    if widths[0] < full:
        return None
    if widths[1] < full:
        return (f"at --imsize {written(config.imsize)} the settings of --preset {config.preset} are slow on a CPU; "
                "without --imsize they are tuned for it")
    whose = "published settings" if config.preset == "published" else f"settings of --preset {config.preset}"
    return f"the {whose} are slow on a CPU; --preset cpu is tuned for it"


def _require_one_config(config):
    """Raise UsageError if the ranks' settings differ, as by flags or by weights that one machine lacks. Paths may."""
    from device import distributed

    settings = distributed.gather({name: getattr(config, name) for name, flag in parameter.FLAGS.items()
                                   if flag.type is not str})
    for name in settings[0]:
        values = [one[name] for one in settings]
        if any(value != values[0] for value in values):
            raise UsageError(f"--{name}: the processes have different values "
                             f"({', '.join(map(parameter.written, values[:8]))}); type it, or give all machines the "
                             "same flags and files")


def describe(config, dataset, place):
    """Print the resolved config, parameter counts, data and device (`--dry_run`)."""
    import data_loader
    import families
    import start
    from device.distributed import say
    from device.precision import Precision
    from generate.classes import Classes, lines_on_classes, require_classes
    from storage import checkpoint
    from storage.folders import RunFolders
    from training import memory

    say(parameter.as_json(config), end="")
    classes = None
    if dataset is not None:
        classes = start.compare_with_run(config, dataset)
    elif not config.fake_dir:                           # those of the run, if there is one
        state = checkpoint.load_step(RunFolders.of(config).models, config.pretrained_model, say)
        classes = Classes.from_state(state and state.get("classes"))
    if config.classes is not None:
        require_classes(classes).choose(config.classes)
    if not config.fake_dir:                             # scoring a folder needs no networks
        G, D = families.build_shapes(config, len(classes or ()))
        for name, net in (("G", G), ("D", D)):
            say(f"{name} parameters: {sum(weight.numel() for weight in net.parameters())}")
        if config.mode == "train":
            start.try_source(config, G, D, classes)
    if dataset is not None:
        say(f"data: {data_loader.describe(dataset, config)}")
    for line in (*lines_on_classes(config, dataset, classes), *families.lines_on_weights(config)) if dataset else ():
        say(line)
    say(f"device: {place.device}" + (f", {place.world_size} processes" if place.world_size > 1 else ""))
    say(f"precision: {Precision(config.precision, place.device).name}")
    if dataset is not None:
        found = memory.estimate(config, place, len(classes or ()))
        say(memory.describe(found, place))
        start.require_memory(config, place, classes, found)


if __name__ == "__main__":
    console.run(main)
