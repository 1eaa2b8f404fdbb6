"""--mode sample: pictures 0, 1, 2, ... of `--seed`, or one for each of `--seeds`; each file says how it was drawn.

What it says is the JSON object in its tEXt chunk `parameters`: {"version", "step", "seed"}, and where they apply
"number" and "count" (it is picture `number` of `count` of its seed), "class", "truncation", "metadata_sample". With it
`--like` draws the picture again.
"""

import itertools
import json
import os
from dataclasses import replace

import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from dataset.decode import printable
from device.distributed import progress
from errors import CheckpointError, UsageError, first_line
from flags.pictures import sides
from gallery import grid
from generate.classes import require_classes
from generate.latents import digest_of, read_latents
from generate.trained import load_generator
from utils import remove_leftovers, spread_indices, write_atomically

KEY = "parameters"
CONTRADICT = ("seed", "seeds", "num_samples")       # flags that --like replaces
ROWS, TALLEST = 40, 5120        # of a grid with a class a row: rows, and pixels in height, at most


def sample(config, place, precision):
    """Write `--num_samples` pictures, those of `--seeds` or that of `--like`, and a grid of the first ones; with
    `--classes` so many of each, into a folder a class. Return exit code 0.

    Picture i depends on the seed, i, its class and the checkpoint alone, up to rounding. Raises CheckpointError,
    UsageError.
    """
    recipe = config.like and read_recipe(config.like)
    try:
        trained = load_generator(config, place, precision)
    except CheckpointError as error:
        if not recipe:
            raise
        raise CheckpointError(f"--like {config.like}: {first_line(error)}") from None
    if recipe:
        return _sample_like(config, trained, recipe)
    chosen = read_latents(config.latents, trained.latents, config.classes) if config.latents else None
    side, count = grid.grid_side(config.imsize), len(chosen or config.seeds or range(config.num_samples))
    kind = (f"latents_{digest_of(chosen)}" if chosen else "seeds" if config.seeds else f"generated_seed{config.seed}")
    folder = trained.path(kind)
    if config.classes is not None:
        return _sample_classes(config, trained, folder, side, count, chosen)
    trained.create_folder()
    folder.mkdir(exist_ok=True)
    remove_leftovers(folder)
    with progress(count, "picture") as done:
        shown = _write(trained, _batches(config, trained, chosen), folder, side**2, done)
    columns = grid.columns_of(len(shown), *shown.shape[2:])
    rows = [config.seeds[start:start + columns] for start in range(0, len(shown), columns)] if config.seeds else ()
    grid.save_grid(shown, f"{folder}.png", columns, list(map(grid.in_ranges, rows)))
    trained.finish(config, f"{_pictures(count)} of step {trained.step} in {folder}{os.sep}, "
                   f"{_first(side**2, count)} as a grid in {folder}.png{_older(folder, count)}")
    return 0


def _sample_classes(config, trained, folder, side, count, latents):
    """`sample` for `--classes`; the grid shows one class a row. Picture i of each class has the same z."""
    classes = require_classes(trained.latents.classes)
    chosen, rows = classes.choose(config.classes), []
    shown_in = f"{folder}{classes.suffix(config.classes)}.png"          # so that other classes have a grid of their own
    trained.create_folder()
    most = max(side, min(ROWS, TALLEST // sides(config.imsize)[0]))
    shown = [chosen[index] for index in spread_indices(most, len(chosen))]
    with progress(count * len(chosen), "picture") as done:
        for label, name in zip(chosen, classes.folder_names(chosen), strict=True):
            (folder / name).mkdir(parents=True, exist_ok=True)
            remove_leftovers(folder / name)
            row = _write(trained, _batches(config, trained, latents, label), folder / name, side, done)
            rows += [row] if label in shown else []
    grid.save_grid(torch.cat(rows), shown_in, min(side, count), classes.captions(torch.tensor(shown)))
    which = f"of each of {len(chosen)} classes" if chosen[1:] else f"of class {printable(classes.names[chosen[0]])}"
    some = f" of each of {len(shown)} of the {len(chosen)} classes" if len(shown) < len(chosen) else ""
    trained.finish(config, f"{_pictures(count)} of step {trained.step} {which} in {folder}{os.sep}, "
                   f"{_first(side, count)}{some} as a grid in {shown_in}{_older(folder, count * len(chosen))}")
    return 0


def _pictures(count):
    return f"{count} picture{'s' * (count > 1)}"


def _first(shown, count):
    return "all" if shown >= count else f"the first {shown}"


def _older(folder, count):
    """Return a remark on pictures of earlier calls in the folder, where `count` were written now."""
    older = sum(1 for _ in folder.rglob("*.png")) - count
    return f"; {older} of earlier calls are still there" if older > 0 else ""


# -------------------------------------------------------------------------------------------------- what is drawn


def _batches(config, trained, latents, label=None):
    """Yield (Inputs, [{"seed", ...} of each picture]) of all pictures, all of class `label` if there is one;
    `latents` are the Inputs of `--latents`, or None.

    Each of `--seeds` is a batch of its own: its picture has the same bytes whatever is drawn beside it.
    """
    if latents:
        for row in range(len(latents)):
            yield _of_class(latents[row:row + 1], label), [{"row": row}]
        return
    if config.seeds:
        for seed in config.seeds:
            yield _of_class(trained.latents.of_seed(seed), label), [{"seed": seed}]
        return
    batches = trained.latents.seeded_batches(config.seed)
    for start in range(0, config.num_samples, 64):
        inputs = next(batches)[:config.num_samples - start]
        yield _of_class(inputs, label), [{"seed": config.seed, "number": start + i, "count": config.num_samples}
                                         for i in range(len(inputs))]


def _of_class(inputs, label):
    return inputs if label is None else replace(inputs, labels=torch.full((len(inputs),), label))


def _write(trained, batches, folder, shown, done):
    """Draw and write each of `batches`; advance `done`. Return the first `shown` images."""
    first, count = [], 0
    for inputs, origins in batches:
        images = trained.draw(inputs)
        for index, origin in enumerate(origins):
            _save(trained, images[index], inputs[index:index + 1], origin, folder / f"{_file_name(origin)}.png")
        if count < shown:
            first.append(images[:shown - count].clone())        # a view would keep its whole batch in memory
        count += len(images)
        done.update(len(images))
    return torch.cat(first)


def _file_name(origin):
    """Return the name of a picture's file, without its ending."""
    if "row" in origin:
        return f"{origin['row']:06d}"
    return f"{origin['number']:06d}" if "number" in origin else f"seed{origin['seed']:06d}"


def _save(trained, image, inputs, origin, path):
    """Write one image (C, H, W) with its recipe."""
    recipe = {"version": trained.folders.models.name, "step": trained.step, "weights": trained.weights, **origin,
              **trained.latents.settings()}
    if inputs.labels is not None:
        recipe["class"] = trained.latents.classes.names[inputs.labels.item()]
    text = PngInfo()
    text.add_text(KEY, json.dumps(recipe))
    picture = grid.to_picture(grid.to_uint8(image[None])[0])
    write_atomically(path, lambda temporary: picture.save(temporary, "PNG", compress_level=1, pnginfo=text),
                     lasting=False)


# --------------------------------------------------------------------------------------------------------- --like


def read_recipe(path):
    """Return what a picture of `--mode sample` says of how it was drawn. Raise UsageError if it says nothing."""
    try:
        with Image.open(path) as picture:
            recipe = json.loads(picture.info.get(KEY, "null"))
    except (OSError, RuntimeError, ValueError, TypeError) as error:     # RuntimeError: AVIF; JSON nested without end
        reason = getattr(error, "strerror", None) or "is no picture, or a damaged one"
        raise UsageError(f"--like {path}: {reason}") from None
    if isinstance(recipe, dict) and "row" in recipe:
        raise UsageError(f"--like {path}: was drawn from latents, which it does not hold; give their file again: "
                         "--mode sample --latents FILE.npz")
    if not isinstance(recipe, dict) or not _is_whole(recipe):
        raise UsageError(f"--like {path}: does not say how it was drawn; pictures that --mode sample writes do, unless "
                         "another program has saved them again")
    return recipe


def _is_whole(recipe):
    """Return whether a recipe has what it must have, each of its kind."""
    kinds = {"version": str, "step": int, "seed": int, "number": int, "count": int, "class": str, "truncation": float,
             "metadata_sample": str, "weights": str}
    must = {"version", "step", "seed"} | ({"number", "count"} if "number" in recipe else set())
    return must <= set(recipe) and all(type(recipe[name]) is kind for name, kind in kinds.items() if name in recipe) \
        and 0 <= recipe.get("number", 0) < recipe.get("count", 1) and 0 <= recipe["seed"] < 2**63 \
        and 0 <= recipe["step"] < 2**31


def settings_of(typed):
    """Return {flag: value} of the flags `typed`, with those of the picture `--like` in the place of what is not typed.

    Raise UsageError.
    """
    if typed.get("like") is None:
        return typed
    wrong = [name for name in CONTRADICT if name in typed]
    if wrong:
        raise UsageError(f"--{wrong[0]}: --like draws the one picture of its file; leave one of the two out")
    recipe = read_recipe(typed["like"])
    settings = {} if "train" in typed else {"mode": "sample"}
    settings |= {name: recipe[name] for name in ("version", "truncation") if name in recipe}
    settings |= {"seed": recipe["seed"]} if "number" in recipe else {"seeds": (recipe["seed"],)}
    if typed.get("version", recipe["version"]) == recipe["version"]:        # else the same z, drawn by another run
        settings["pretrained_model"] = recipe["step"]
        settings |= {name: recipe[name] for name in ("metadata_sample",) if name in recipe}
    return {**settings, **typed}


def _sample_like(config, trained, recipe):
    """`sample` for `--like`: the picture of this recipe, in its own class or in those of `--classes`."""
    named = (config.version, trained.step) == (recipe["version"], recipe["step"])
    if named and recipe.get("weights", trained.weights) != trained.weights:         # of older pictures it is not known
        raise UsageError(f"--like {config.like}: was drawn by another run that was named '{config.version}', too; name "
                         f"the one that has its weights with --version, such as {config.version}.old1")
    classes = trained.latents.classes
    if config.classes is not None:
        labels = require_classes(classes).choose(config.classes)
    elif classes is None:
        labels = [None]
    elif recipe.get("class") in classes.names:
        labels = [classes.names.index(recipe["class"])]
    else:
        raise UsageError(f"--like {config.like}: its class is none of '{config.version}'; choose with --classes")
    names = classes.folder_names(labels) if classes else [None]
    trained.create_folder()
    paths = [_draw_again(config, trained, recipe, *pair) for pair in zip(labels, names, strict=True)]
    trained.finish(config, f"{_pictures(len(paths))} of step {trained.step} like {config.like}: "
                   f"{paths[0]}{f' and {len(paths) - 1} more' * (len(paths) > 1)}")
    return 0


def _draw_again(config, trained, recipe, label, name):
    """Draw in the batch that the picture was drawn in, so that it has the same bytes. Return the path."""
    if config.seeds:
        index, inputs, origin = 0, trained.latents.of_seed(*config.seeds), {"seed": recipe["seed"]}
        path = f"seed{recipe['seed']:06d}"
    else:
        number, count = recipe["number"], recipe["count"]
        batch, index = divmod(number, 64)
        inputs = next(itertools.islice(trained.latents.seeded_batches(config.seed), batch, None))[:count - 64 * batch]
        origin = {"seed": config.seed, "number": number, "count": count}
        path = f"seed{config.seed}_picture{number:06d}"
    inputs = _of_class(inputs, label)
    path = trained.path(path if name is None else f"{path}_{name}", ".png")
    _save(trained, trained.draw(inputs)[index], inputs[index:index + 1], origin, path)
    return path
