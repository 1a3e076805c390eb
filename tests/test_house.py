"""The house as docs/architecture.md draws it: rooms that import only rooms below them, and what is installed."""

from __future__ import annotations

import ast
import tomllib
from functools import cache
from pathlib import Path

import pytest
from support import ROOT

# What a room may import beside itself and cache/. Rooms of the pipeline may import every room of the stages.
MAY_IMPORT = {
    "stages.settings": "",
    "stages.models": "settings",
    "stages.questions": "models settings",
    "stages.engines": "models settings",
    "stages.metrics": "models questions settings",
    "stages.teacher": "engines models questions settings",
    "stages.student": "models questions settings",
    "stages.exam": "engines metrics models questions settings",
    "stages.attacks": "exam engines metrics models questions settings",
    "stages.evaluate": "attacks exam metrics models questions settings",
    "stages.audit": "evaluate exam metrics questions settings",
    "stages.compare": "evaluate exam metrics student models questions settings",
    "stages.cost": "teacher student models settings",
    "pipeline.config": "",
    "pipeline.run": "config",
    "pipeline.pages": "run config",
    "pipeline.commands": "pages run config",
    "pipeline.cli": "commands run config",
}
SOURCES = sorted(path for package in ("cache", "stages", "pipeline") for path in (ROOT / package).rglob("*.py"))
# Heavy libraries that a room never imports, not even within a function.
NEVER = {
    "cache": {"torch", "vllm", "transformers"},
    "stages": {"click", "rich"},
    "stages.settings": {"torch", "vllm", "transformers"},
    "pipeline.config": {"torch", "vllm", "transformers"},
}


def module_of(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def room_of(module: str) -> str:
    """`stages.metrics` for `stages.metrics.text`, `cache` for `cache.codec`."""
    parts = module.split(".")
    return "cache" if parts[0] == "cache" else ".".join(parts[:2])


@cache
def imports(path: Path) -> dict[str, bool]:
    """Imported modules, ours without `duet.`, and whether that happens when the file is imported."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    found: dict[str, bool] = {}
    for node in ast.walk(tree):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom):
            assert not node.level, f"{path} has a relative import"
            module = node.module or ""
            is_package = module.startswith("duet") and (ROOT / module.removeprefix("duet.").replace(".", "/")).is_dir()
            names += [f"{module}.{alias.name}" for alias in node.names] if is_package else [module]
        for name in (name.removeprefix("duet.") for name in names):
            found[name] = found.get(name, False) or node in tree.body
    return found


def ours(path: Path) -> set[str]:
    return {name for name in imports(path) if name.split(".")[0] in ("cache", "stages", "pipeline")}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_a_room_imports_only_rooms_below_it(path):
    here = room_of(module_of(path))
    if here == "cache":
        allowed = {"cache"}
    elif path.name == "__init__.py":
        allowed = set()
    else:
        below = {here.split(".")[0] + "." + name for name in MAY_IMPORT[here].split()}
        allowed = {"cache", here, *below}
        if here.startswith("pipeline."):
            allowed |= {room for room in MAY_IMPORT if room.startswith("stages.")}
    for name in ours(path):
        assert room_of(name) in allowed, f"{module_of(path)} imports {name}"


def test_no_two_files_of_a_room_import_each_other():
    """Not even through others, and not within functions."""
    graph = {module_of(path): ours(path) for path in SOURCES}
    done: set[str] = set()

    def visit(module: str, way: tuple[str, ...]) -> None:
        assert module not in way, f"a circle: {' -> '.join((*way, module))}"
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*way, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def reached(room: str) -> set[str]:
    """All rooms that a room's files import, through others too."""
    found: set[str] = set()
    ahead = [room]
    while ahead:
        here = ahead.pop()
        for path in SOURCES:
            if room_of(module_of(path)) == here:
                new = {room_of(name) for name in ours(path)} - found - {here}
                found |= new
                ahead += new
    return found


def test_teacher_and_student_never_meet():
    assert not reached("stages.teacher") & {"stages.student", "stages.exam", "stages.compare"}
    assert not reached("stages.student") & {"stages.teacher", "stages.engines", "stages.exam"}


@pytest.mark.parametrize("path", SOURCES, ids=module_of)
def test_heavy_libraries_stay_where_they_are_needed(path):
    module, found = module_of(path), {name.split(".")[0] for name in imports(path)}
    for room, never in NEVER.items():
        if module.startswith(room):
            assert not found & never, module
    assert not found & {"pickle", "dill", "joblib", "cloudpickle"}
    at_import = {name.split(".")[0] for name, early in imports(path).items() if early}
    by_vllm = path.name == "vllm_worker.py"  # loaded by its name in vLLM's own processes: nothing of Duet imports it
    assert not at_import & {"datasets", *(() if by_vllm else ("vllm",))}
    assert "stages.engines.vllm_worker" not in imports(path)
    if "vllm" in found:
        assert room_of(module) == "stages.engines", module


def test_what_is_installed_is_complete():
    """Every folder with code is one of pyproject.toml's packages: a wheel would lack it otherwise."""
    table = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]
    folders = {"duet." + ".".join(path.parent.relative_to(ROOT).parts) for path in SOURCES}
    assert set(table["packages"]) == {"duet", *folders}
    assert all((path.parent / "__init__.py").is_file() for path in SOURCES)


def test_every_test_lies_in_the_room_that_it_tests():
    rooms = {path.parent.relative_to(ROOT) for path in SOURCES}
    for path in (ROOT / "tests").rglob("test_*.py"):
        folder = path.parent.relative_to(ROOT / "tests")
        assert folder == Path() or folder in rooms, path
