"""Write docs/flags.md: all flags, presets and exit codes, from the tables that the program itself reads.

    python docs/write_flags.py        the same as `make docs`; a test fails while the page is out of date
"""

import sys
import textwrap
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))           # before this folder

import errors  # noqa: E402 - found through the line above
import parameter  # noqa: E402
from flags.common import always  # noqa: E402
from flags.values import written  # noqa: E402

PAGE = ROOT / "docs" / "flags.md"
INTRO = """\
# Flags

Written by `make docs` from the tables in [flags/](../flags); do not edit. `python main.py --help` shows the same.

- A flag that you leave out is taken from `--config FILE`, else from the run's saved config (but `--metrics` of
  `--mode evaluate`), else from `--preset`, else from the default below. What follows from `--preset`, `--imsize`,
  `--arch`, `--adv_loss` or `--dataset` in the file is not taken if you type another one.
- Booleans take true, false, 1, 0, yes, no; a bare `--dry_run` means true.
- A default such as `64; fastgan: 256` differs for that model. – means none, or that the text gives it.
"""
_DEFAULTS = {flag.name: flag.default for flag in parameter.FLAGS.values()}
PRESETS = """\
## Presets

`published` is the published recipe, and the default. `cpu` is what learned fastest on two CPU cores. `gpu` is the
published recipe for batches of `--batch_size`, by default four times as large: k times the batch, 1 / k of the steps, k
times the learning rates (beyond 4, sqrt(4 k) times), Adam's averages shortened k times, `ema_decay` to the power of k,
for k from 1 to 64 ([how it was tested](speed.md)). `small` is for some hundred pictures: fastgan's was
[measured](small_sets.md) at 64 px on a CPU, and is the published recipe with light heads on features and mirrored
edges above 64 px; sagan's is `cpu` with augmentation. Flags that are not listed are the same with every preset; –
follows from others.
"""


def markdown():
    """The whole page."""
    parts = [INTRO]
    for title, flags in parameter.GROUPS.items():
        heading = f"Only `--model {title}`" if title in parameter.FAMILIES else title.capitalize()
        rows = [(f"`--{flag.name}`", _code(parameter.defaults(flag)), cell(flag.help)) for flag in flags]
        parts.append(f"## {heading}\n\n" + "\n".join(table(("flag", "default", "meaning"), rows)) + "\n")
    parts += [_kept(), _presets(), _exit_codes()]
    return "\n".join(parts)


def cell(text):
    """Help text as a cell of a table, where | would end it."""
    return text.replace(" | ", ", ")


def table(head, rows, padded=False):
    """Lines of a Markdown table; `padded` aligns its source, too."""
    widths = [max(len(row[i]) for row in [head, *rows]) if padded else 0 for i in range(len(head))]
    lines = [head, ["-" * max(3, width) for width in widths], *rows]
    return ["| " + " | ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)) + " |"
            for line in lines]


def _code(text):
    return f"`{text}`" if text else "–"


def _names(flags):
    return ", ".join(f"`--{flag.name}`" for flag in flags)


def _kept():
    """Which flags a run keeps for good, and which it never takes from a file."""
    flags = list(parameter.FLAGS.values())
    fixed = [flag for flag in flags if flag.fixed is always]
    some = [flag for flag in flags if flag.fixed not in (None, always)]
    per_call = [flag for flag in flags if flag.per_call]
    return "\n\n".join(["## What a run keeps", *(textwrap.fill(text, 120, break_on_hyphens=False) for text in (
        f"Checkpoints depend on these flags, so a resumed run refuses other values: {_names(fixed)}; and, where the "
        f"checkpoints depend on them, {_names(some)}. All others may change when a run is resumed; it lists what "
        "changed of those that training depends on. A run keeps its classes, too: whether there are any, their names "
        "and their order.",
        "These belong to one call, and are never taken from a saved config or from `--config`: "
        f"{_names(per_call)}."))]) + "\n"


def _presets():
    """All presets of all families side by side: what each flag is with them."""
    columns = _columns()
    of_others = {model: {flag.name for other, family in parameter.FAMILIES.items() if other != model
                         for flag in family.FLAGS} for model in parameter.FAMILIES}
    rows = []
    for flag in parameter.FLAGS.values():
        if not any(flag.name in preset for _, _, preset in columns):
            continue
        cells = []
        for model, _, preset in columns:
            value = preset.get(flag.name, flag.default)
            cells.append("" if flag.name in of_others[model] else "–" if value is None else written(value))
        rows.append((f"`--{flag.name}`", *cells))
    lines = table(("flag", *(title for _, title, _ in columns)), rows, padded=True)
    return PRESETS + "\n" + "\n".join(lines) + "\n"


def _columns():
    """[(model, title, {flag: value}), ...]: each preset of each family, and of the flags that change it."""
    columns = []
    for model, family in parameter.FAMILIES.items():
        seen = []
        for typed in family.PRESETS_DEPEND_ON:
            words = " ".join(f"--{flag} {written(value)}" for flag, value in typed.items())
            for name in family.PRESETS:
                preset = family.find_preset(name, {**_DEFAULTS, "batch_size": None, **typed})
                if preset not in seen:
                    columns.append((model, f"{model} {words}".strip() + f", {name}", {**typed, **preset}))
                    seen.append(preset)
    return columns


def _exit_codes():
    """What `main.py` returns; the docstrings of errors.py say why."""
    codes = {failure.code: failure.__doc__.splitlines()[0] for failure in vars(errors).values()
             if isinstance(failure, type) and issubclass(failure, errors.Failure) and failure is not errors.Failure}
    rows = [("0", "Done."), (str(errors.Failure.code), "Anything unexpected, and out of memory except in a step."),
            *((str(code), codes[code]) for code in sorted(codes)),
            ("130, 143", "Interrupted by SIGINT (Ctrl-C) or SIGTERM, after the step was finished and saved.")]
    lines = table(("code", "meaning"), rows, padded=True)
    return "\n".join(["## Exit codes", "", *lines, "", "torchrun itself returns 1 whatever its processes return.", ""])


def main():
    PAGE.write_text(markdown(), encoding="utf-8")
    print(f"written: {PAGE.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
