"""The repository's structure: allowed imports, where a family may be named, which files are at the top level."""

import ast
import importlib.util
import subprocess
import sys
from functools import cache
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
# A top-level file or a whole folder is one unit; it imports only units of earlier lines.
LAYERS = """
errors utils diffaug
flags device
parameter pretrained storage spectral
dataset layers
*_models
data_loader
losses gallery
families
generate
trainer
metrics training
loop
start
main
"""
LAYER = {path.stem if path.suffix else path.name: number for number, line in enumerate(LAYERS.split("\n"))
         for unit in line.split() for path in (*ROOT.glob(f"{unit}.py"), *ROOT.glob(unit))}
FILES = sorted(path for path in ROOT.glob("*.py")) + sorted(
    path for folder in LAYER for path in (ROOT / folder).glob("*.py"))


@cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


def imports_of(path, nodes=None):
    """Whole names, such as dataset.decode, of the modules that a file imports anywhere, or in these nodes."""
    for node in nodes if nodes is not None else ast.walk(tree_of(path)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            yield node.module
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def unit_of(path):
    return path.stem if path.parent == ROOT else path.parent.name


def test_units_import_only_units_of_earlier_lines():
    assert {unit_of(path) for path in FILES} == set(LAYER), "each unit has its line"
    wrong = {f"{path.relative_to(ROOT)} imports {name}" for path in FILES for name in imports_of(path)
             if (other := name.split(".")[0]) in LAYER and other != unit_of(path)
             and LAYER[other] >= LAYER[unit_of(path)]}
    assert not wrong


def test_what_scripts_import_is_there():
    """Tests import most of benchmarks/, not all, so that a module that has moved would be missed by its users."""
    scripts = [*(ROOT / "benchmarks").glob("*.py"), *(ROOT / "docs").glob("*.py")]
    modules = {(path.name, name) for path in scripts for node in ast.walk(tree_of(path))
               for name in ([node.module] if isinstance(node, ast.ImportFrom) else
                            [alias.name for alias in node.names] if isinstance(node, ast.Import) else [])}
    assert modules and not {found for found in modules if importlib.util.find_spec(found[1]) is None}


def test_no_circle_inside_a_folder():
    for folder in (unit for unit in LAYER if (ROOT / unit).is_dir()):
        inside = {f"{folder}.{path.stem}": path for path in (ROOT / folder).glob("*.py")}
        graph = {name: {other for other in imports_of(path) if other in inside} for name, path in inside.items()}
        try:
            list(TopologicalSorter(graph).static_order())
        except CycleError as error:
            pytest.fail(f"a circle: {' -> '.join(error.args[1])}")


def test_the_top_shows_the_paper_and_folders_stay_small():
    assert len(list(ROOT.glob("*.py"))) <= 16
    for folder in (ROOT / unit for unit in LAYER if (ROOT / unit).is_dir()):
        files = [path for path in folder.iterdir() if path.is_file()]
        (docstring,) = (folder / "__init__.py").read_text().splitlines()
        assert len(files) <= 10 and docstring.startswith('"""') and docstring.endswith('."""'), folder


def test_no_function_is_longer_than_45_lines():
    long = {f"{path.relative_to(ROOT)}: {node.name}" for path in FILES for node in ast.walk(tree_of(path))
            if isinstance(node, ast.FunctionDef) and node.end_lineno - node.lineno >= 45}
    assert not long


def test_no_torch_before_the_command_line_is_known_to_parse():
    command = "import errors, parameter, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", command], cwd=ROOT).returncode == 0


OF_A_FAMILY = {"families.py", "sagan_models.py", "fastgan_models.py", "flags/sagan.py", "flags/fastgan.py"}


def named(path):
    """The families that a file's code names: in imports, names and strings, docstrings left out."""
    docstrings = {id(node.body[0].value) for node in ast.walk(tree_of(path))
                  if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)) and node.body
                  and isinstance(node.body[0], ast.Expr)}
    words = list(imports_of(path))
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            words.append(node.value)
        elif isinstance(node, ast.Name):
            words.append(node.id)
        elif isinstance(node, ast.Attribute):
            words.append(node.attr)
    return {family for word in words for family in ("sagan", "fastgan") if family in word.lower()}


def test_no_family_is_named_outside_its_own_files():
    names = {str(path.relative_to(ROOT)): named(path) for path in FILES}
    assert not {path: families for path, families in names.items() if families and path not in OF_A_FAMILY}


@pytest.mark.soak
def test_modules_of_a_user_and_of_hugging_face_stay_themselves(tmp_path):
    """Ours shadow no installed package called datasets or evaluate, and are not shadowed by a user's folders."""
    installed, work = tmp_path / "site-packages", tmp_path / "work"
    for name in ("datasets", "evaluate"):
        (installed / name).mkdir(parents=True)
        (installed / name / "__init__.py").write_text("WHOSE = 'theirs'\n")
    for name in ("datasets", "evaluate", "metrics", "utils", "flags", "device"):
        (work / name).mkdir(parents=True)
        (work / name / "__init__.py").write_text("raise SystemExit('a folder of the user was imported')\n")
    start = ("import runpy, sys; sys.path[0] = sys.argv[1]; sys.path.append(sys.argv[2]); import datasets, evaluate; "
             "assert datasets.WHOSE == evaluate.WHOSE == 'theirs'; sys.argv = ['main.py', *sys.argv[3:]]; "
             "runpy.run_path(sys.path[0] + '/main.py', run_name='__main__')")
    flags = ["--dataset", "toy", "--imsize", "32", "--g_conv_dim", "4", "--d_conv_dim", "4", "--device", "cpu",
             "--dry_run"]
    for command in ([str(ROOT / "main.py"), *flags], ["-c", start, str(ROOT), str(installed), *flags]):
        done = subprocess.run([sys.executable, *command], cwd=work, capture_output=True, text=True)
        assert done.returncode == 0 and "G parameters" in done.stdout, done.stderr
