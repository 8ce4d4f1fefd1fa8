# SPDX-FileCopyrightText: Brain LDM contributors
# SPDX-License-Identifier: Apache-2.0
"""The rooms of the package: what may import what, how large they are, and the names that modules had before."""

from __future__ import annotations

import ast
import importlib
import re
import sys
import warnings
from pathlib import Path
from pydoc import locate
from types import ModuleType

import pytest
from monai.bundle import ConfigParser
from processes import run_python

from scripts.core.errors import BundleError
from scripts.core.old_names import OLD_NAMES, RENAMED, REPLACED, ROOMS

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = ROOT / "scripts"
ARCHITECTURE = ROOT / "docs" / "architecture.md"
ORDER = [
    "core",
    "compute",
    "conditions",
    "volumes",
    "networks",
    "training",
    "diffusion",
    "autoencoder",
    "gan",
    "measuring",
    "phantoms",
    "preparation",
    "sampling",
    "editing",
    "evaluation",
    "serving",
    "collection",
    "tools",
]
"""A room imports from itself and from those before it."""
LARGEST = 20
TARGETS = (ROOT / "tests" / "data" / "targets_2_0_0.txt").read_text().split()


def modules() -> dict[str, Path]:
    """Dotted name -> file of every module and package in `scripts/`."""
    files = sorted(SCRIPTS.rglob("*.py"))
    parts = {file: [p for p in file.relative_to(ROOT).with_suffix("").parts if p != "__init__"] for file in files}
    return {".".join(names): file for file, names in parts.items()}


def imported(name: str, file: Path, known: dict[str, Path]) -> set[str]:
    """The project's modules that a module imports, at its top or in a function."""
    found: set[str] = set()
    package = name if file.name == "__init__.py" else name.rpartition(".")[0]
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            above = package.rsplit(".", node.level - 1)[0] if node.level else ""
            base = ".".join(part for part in (above, node.module) if part)
            found |= {one if (one := f"{base}.{alias.name}") in known else base for alias in node.names}
    return {one for one in found if one in known and one != "scripts"}


def imports_between_rooms() -> dict[str, dict[str, list[str]]]:
    """Room -> rooms that it imports -> the imports, in words."""
    known = modules()
    found: dict[str, dict[str, list[str]]] = {room: {} for room in rooms()}
    for name, file in known.items():
        for other in imported(name, file, known):
            here, there = room_of(name), room_of(other)
            if here and there and here != there:
                found[here].setdefault(there, []).append(f"{name} imports {other}")
    return found


def room_of(module: str) -> str | None:
    """The room of a module; None for the package itself and for what lies in no room."""
    parts = module.split(".")
    return parts[1] if len(parts) > 1 and (SCRIPTS / parts[1]).is_dir() else None


def rooms() -> list[str]:
    """The rooms that there are."""
    return sorted(path.parent.name for path in SCRIPTS.glob("*/__init__.py"))


def documented_rooms(page: str) -> list[str]:
    """The rooms of a page of documentation, in order: the first word of a table's row or of an item, as `core/`."""
    found = re.findall(r"^(?:\|\s*|[-*]\s+|\d+\.\s+)(?:\*\*)?`(?:scripts/)?(\w+)/?`", page, re.MULTILINE)
    return list(dict.fromkeys(name for name in found if name in ORDER))


def test_every_room_has_its_place_in_the_order() -> None:
    assert rooms() == sorted(ORDER)


def test_no_arrow_points_upwards() -> None:
    upwards = [
        line
        for room, others in imports_between_rooms().items()
        for other, lines in others.items()
        if ORDER.index(other) > ORDER.index(room)
        for line in lines
    ]
    assert upwards == []


def test_no_module_imports_itself_by_a_circle() -> None:
    known = modules()
    graph = {name: imported(name, file, known) - {name} for name, file in known.items()}
    while leaves := [name for name, others in graph.items() if not others & graph.keys()]:
        for name in leaves:
            del graph[name]
    assert {name: sorted(others & graph.keys()) for name, others in graph.items()} == {}


def test_the_documentation_names_the_rooms_in_their_order() -> None:
    if ARCHITECTURE.is_file():
        assert documented_rooms(ARCHITECTURE.read_text()) == ORDER


def test_rooms_as_a_page_may_name_them() -> None:
    table = "| room | what |\n|---|---|\n| `core/` | errors |\n| `scripts/compute/` | devices |\n| `nothing/` | |\n"
    assert documented_rooms(table) == ["core", "compute"]
    assert documented_rooms("1. **`core/`**: errors\n2. `compute`: devices, as `volumes/`\n") == ["core", "compute"]


def test_rooms_are_small_and_nothing_lies_outside() -> None:
    flat = {path.name for path in SCRIPTS.iterdir() if path.is_file()}
    assert flat <= {"__init__.py", "__main__.py"}
    sizes: dict[str, int] = {}
    for file in modules().values():
        if file.name != "__init__.py":
            sizes[str(file.parent)] = sizes.get(str(file.parent), 0) + 1
    assert {folder: size for folder, size in sizes.items() if size > LARGEST} == {}


def test_no_two_classes_share_a_name() -> None:
    trees = {name: ast.parse(file.read_text()) for name, file in modules().items()}
    homes: dict[str, list[str]] = {}
    for module, tree in trees.items():
        for node in ast.walk(tree):
            if isinstance(node, ast.ClassDef):
                homes.setdefault(node.name, []).append(module)
    assert {name: places for name, places in homes.items() if len(places) > 1} == {}


def test_rooms_say_what_lives_in_them() -> None:
    for room in SCRIPTS.rglob("__init__.py"):
        assert ast.get_docstring(ast.parse(room.read_text())), room


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("target", [target for target in TARGETS if target.removeprefix("scripts.") not in REPLACED])
def test_targets_of_version_2_0_0(target: str) -> None:
    found = locate(target)
    module, _, name = RENAMED.get(target.removeprefix("scripts."), target).rpartition(".")
    names = OLD_NAMES.get(module.removeprefix("scripts."), (module,))
    homes = [importlib.import_module(f"scripts.{new}") for new in names]
    assert found is not None and not isinstance(found, ModuleType)
    assert any(getattr(home, name, None) is found for home in homes)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("old, new", RENAMED.items())
def test_what_has_another_name_is_the_same_object(old: str, new: str) -> None:
    found = locate(f"scripts.{old}")
    assert found is not None and found is locate(f"scripts.{new}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
@pytest.mark.parametrize("target, new", REPLACED.items())
def test_what_is_no_more_names_what_does_its_work(target: str, new: str) -> None:
    assert f"scripts.{target}" in TARGETS and locate(f"scripts.{new}") is not None
    with pytest.raises(BundleError, match=re.escape(f"scripts.{new}")):
        locate(f"scripts.{target}")


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_old_module_can_be_imported() -> None:
    for old, homes in OLD_NAMES.items():
        module, successor = (importlib.import_module(f"scripts.{name}") for name in (old, homes[0]))
        public = [n for n, value in vars(successor).items() if getattr(value, "__module__", "") == successor.__name__]
        public = [
            name for name in public if not name.startswith("__")
        ]  # PyTorch's compiler leaves functions of its own
        assert all(getattr(module, name) is getattr(successor, name) for name in public), old


def test_no_old_attribute_hides_behind_a_module() -> None:
    for old in OLD_NAMES.keys() & ROOMS:
        for home in OLD_NAMES[old]:
            names = vars(importlib.import_module(f"scripts.{home}")).keys()
            assert not names & {path.stem for path in (SCRIPTS / old).iterdir()}, old


def test_a_configuration_with_old_names() -> None:
    from scripts.volumes.grid import Grid

    grid = {"_target_": "scripts.grid.Grid", "shape": [2, 2, 2], "spacing": [1.0, 1.0, 1.0], "origin": [0.0, 0.0, 0.0]}
    parser = ConfigParser({"imports": ["$import scripts"], "grid": grid, "same": "$scripts.grid.Grid"})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        assert isinstance(parser.get_parsed_content("grid"), Grid)


def test_old_names_warn_and_name_the_new() -> None:
    code = (
        "import warnings\n"
        "warnings.filterwarnings('always', category=DeprecationWarning, module='__main__')\n"
        "import scripts.volume_folders\n"
        "from scripts.volumes import read_volume\n"
        "from scripts.samplers import nothing_at_all\n"
    )
    done = run_python("-c", code)
    assert "scripts.volume_folders is now scripts.volumes.folders" in done.stderr
    assert "scripts.volumes.read_volume is now scripts.volumes.nifti.read_volume" in done.stderr
    assert "cannot import name 'nothing_at_all' from 'scripts.samplers'" in done.stderr


@pytest.mark.parametrize("program", ["demo_training", "example_data"])
def test_programs_run_under_their_old_names(program: str) -> None:
    done = run_python("-m", f"scripts.{program}", "--help")
    assert done.returncode == 0 and "usage:" in done.stdout, done.stderr


def test_fire_finds_what_was_in_an_old_module() -> None:
    with pytest.warns(DeprecationWarning, match="scripts.networks.weights"):
        sys.modules.pop("scripts.checkpoints", None)
        module = importlib.import_module("scripts.checkpoints")
    assert "write_safetensors" in dir(module)
