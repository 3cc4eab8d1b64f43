"""Imports point down only, as data: what each module may see is read off the sources, nothing is imported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = "twinpilots"

# The longest matching prefix gives a module's level. 1 holds the values that levels 2 and 3 both speak in.
LEVELS = {
    "errors": 0, "config": 0, "units": 0, "request": 0, "progress": 0, "stray_output": 0, "background_worker": 0,
    "model.spec": 1, "model.weight_format": 1, "model.quantization": 1, "model.families": 1, "model.config_reader": 1, "model.rope": 1, "model.dummy": 3,
    "hardware.profile": 1, "hardware.presets": 1, "hardware.scaled": 1, "plan.plan": 1, "plan.tasks": 1,
    "openai": 1, "openai.prompts": 4,
    "plan": 2, "stats": 2,
    "kernels": 3, "model": 3, "device": 3, "hardware": 3, "runtime.interpreter": 3, "runtime.machine": 3, "runtime.torch_ops": 3, "runtime.torch_quant": 3,
    "runtime.triton_ops": 3, "runtime.graphs": 3,
    "runtime": 4, "distributed": 4,
    "api": 5, "session": 5, "planner": 5, "online": 5, "adaptation": 5, "background": 5, "history": 5, "machine": 5, "profiling": 5, "trace": 5, "doctor": 5,
    "kv_pricing": 5, "outcomes": 5, "predictions": 5, "fixed_costs": 5, "rehearsal": 5, "expected_work": 5, "rounds": 5,
    "batch": 5, "server": 5, "commands": 5, "benchmarks": 5, "demo": 5, "live": 5, "cli": 5, "__main__": 5,
}  # fmt: skip
# How plans are found and reported: the running half takes a finished Plan, and a `replan` callable from above.
FINDS_PLANS = (
    "plan.solver", "plan.auto", "plan.policies", "plan.program", "plan.report", "plan.draft", "plan.bounds", "plan.pricing", "plan.problem", "plan.terms",
    "plan.polish", "plan.spill", "plan.explain", "plan.what_if", "plan.sensitivity", "plan.figures", "plan.picture",
)  # fmt: skip
PURE = (
    "model.spec", "model.weight_format", "model.quantization", "model.families", "model.config_reader", "model.rope", "hardware.profile", "plan", "stats",
    "openai",
)  # fmt: skip
IMPURE = {"torch", "transformers", "time", "datetime", "subprocess", "threading", "multiprocessing", "socket"}
# Heavy packages may be imported inside functions only, so that starting is quick; torch at the top of the modules that are torch.
HEAVY = {"torch", "triton", "transformers", "scipy", "gguf", "huggingface_hub", "matplotlib", "fastapi", "pydantic", "uvicorn"}
SERVER_MODULES = ("server.app", "server.run")  # nobody imports these but the serve command, when it runs
TORCH_MODULES = (
    "runtime.interpreter",
    "runtime.machine",
    "runtime.torch_ops",
    "runtime.torch_quant",
    "runtime.triton_ops",
    "device.cuda",
    "device.cuda_graphs",
    "device.cuda_sync",
)
TRITON_MODULES = ("kernels.triton.attention", "kernels.triton.linear", "kernels.triton.rowwise")
ALLOWED = {
    **dict.fromkeys(TORCH_MODULES, frozenset({"torch"})),
    **dict.fromkeys(SERVER_MODULES, frozenset({"fastapi", "uvicorn"})),
    **dict.fromkeys(TRITON_MODULES, frozenset({"torch", "triton"})),
}


@cache
def modules() -> dict[str, ast.Module]:
    """Dotted name without the package -> syntax tree."""
    found = {}
    for path in sorted((ROOT / PACKAGE).rglob("*.py")):
        parts = path.relative_to(ROOT / PACKAGE).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = ast.parse(path.read_text(), str(path))
    return found


def is_within(module: str, prefix: str) -> bool:
    return module == prefix or module.startswith(prefix + ".")


def level(module: str) -> int | None:
    """A package's own __init__ counts as its highest module; the root __init__ loads lazily and has none."""
    matches = [prefix for prefix in LEVELS if is_within(module, prefix)]
    return LEVELS[max(matches, key=len)] if matches else None


def type_checking_only(tree: ast.Module) -> set[ast.AST]:
    blocks = [node for node in ast.walk(tree) if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING"]
    return {inner for block in blocks for statement in block.body for inner in ast.walk(statement)}


def in_functions(tree: ast.Module) -> set[ast.AST]:
    functions = [node for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)]
    return {inner for function in functions for inner in ast.walk(function)}


def imports(tree: ast.Module, *, top_level_only: bool = False) -> Iterator[str]:
    """Full dotted names; ``from package import name`` gives package.name, which is the module when there is one of that name."""
    skipped = type_checking_only(tree) | (in_functions(tree) if top_level_only else set())
    for node in ast.walk(tree):
        if node in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute here"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


def own_imports(module: str, *, top_level_only: bool = False) -> set[str]:
    """The modules of this package that ``module`` imports, without the package's name."""
    found = set()
    for name in imports(modules()[module], top_level_only=top_level_only):
        if is_within(name, PACKAGE):
            short = name.removeprefix(PACKAGE).removeprefix(".")
            found.add(short if short in modules() else short.rpartition(".")[0])
    return found - {"", module}


def allowed(importer: int, imported: int) -> bool:
    """Down, or sideways; the planning half (2) and the devices (3) do not see each other."""
    return imported <= importer and (importer, imported) != (3, 2)


def test_every_module_has_a_level() -> None:
    packages = {"", "model", "hardware", "plan", "runtime"}  # their __init__ may only re-export lazily: checked below
    assert [name for name in modules() if level(name) is None and name not in packages] == []


@pytest.mark.parametrize("name", [name for name in modules() if name])
def test_imports_point_down(name: str) -> None:
    own = level(name)
    for imported in own_imports(name):
        other = level(imported)
        if own is not None and other is not None:
            assert allowed(own, other), f"{name} (level {own}) must not import {imported} (level {other})"


@pytest.mark.parametrize("name", [name for name in modules() if is_within(name, "runtime")])
def test_the_runtime_does_not_find_plans(name: str) -> None:
    found = {imported for imported in own_imports(name) if any(is_within(imported, prefix) for prefix in FINDS_PLANS)}
    assert found == set()


@pytest.mark.parametrize("name", [name for name in modules() if any(is_within(name, prefix) for prefix in PURE)])
def test_the_pure_half_has_no_torch_and_no_clock(name: str) -> None:
    assert {imported.partition(".")[0] for imported in imports(modules()[name])} & IMPURE == set()
    prints = [node for node in ast.walk(modules()[name]) if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "print"]
    assert prints == []


@pytest.mark.parametrize("name", list(modules()))
def test_heavy_packages_are_not_imported_at_start(name: str) -> None:
    found = {imported.partition(".")[0] for imported in imports(modules()[name], top_level_only=True)} & HEAVY
    assert found <= ALLOWED.get(name, set())


def test_triton_is_loaded_where_it_is_used() -> None:
    """On a machine without it, or without a CUDA device, everything else runs."""
    needed = {name: own_imports(name, top_level_only=True) & set(TRITON_MODULES) for name in modules() if name not in TRITON_MODULES}
    assert {name for name, found in needed.items() if found} == {"runtime.triton_ops"}
    assert [name for name in modules() if "runtime.triton_ops" in own_imports(name, top_level_only=True)] == []


def test_there_are_no_import_cycles() -> None:
    graph = {name: own_imports(name, top_level_only=True) for name in modules()}
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, f"import cycle: {' -> '.join((*path[path.index(name) :], name))}"
        if name not in done:
            for imported in graph.get(name, ()):
                visit(imported, (*path, name))
            done.add(name)

    for name in graph:
        visit(name, ())


def test_the_rule_itself() -> None:
    assert allowed(4, 2) and allowed(4, 3) and allowed(2, 1) and not allowed(3, 2) and not allowed(2, 3) and not allowed(3, 4)
    assert level("plan.solver") == 2 and level("plan.plan") == 1 and level("runtime.engine") == 4
    tree = ast.parse("import torch\nfrom typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    import scipy\ndef f():\n    import gguf\n")
    assert set(imports(tree)) == {"torch", "typing.TYPE_CHECKING", "gguf"}
    assert set(imports(tree, top_level_only=True)) == {"torch", "typing.TYPE_CHECKING"}
