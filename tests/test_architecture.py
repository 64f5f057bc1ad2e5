"""The house keeps its shape: sizes, layers, names, and what is loaded when."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest

from grpoforge.plugins import load_plugins
from grpoforge.yaml_source import recipe_names

ROOT = Path(__file__).parents[1]
PACKAGES = ("grpoforge", "plugins", "kernels")
BUDGETED = ("grpoforge", "plugins")
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 60

PUBLIC_API = {
    *("types", "errors", "declarations", "sanitize", "tracking", "collate", "policy", "precision", "distributed"),
    *("data", "sources", "seeds", "llama_kind"),
}
"""Modules of grpoforge that a plugin may import, besides `from grpoforge import hookimpl`."""

FunctionDef = ast.FunctionDef | ast.AsyncFunctionDef


def sources(*folders: str) -> Iterator[tuple[Path, ast.Module]]:
    for folder in folders:
        for path in sorted((ROOT / folder).rglob("*.py")):
            yield path.relative_to(ROOT), ast.parse(path.read_text(encoding="utf-8"))


def imports(tree: ast.Module, *, runtime_only: bool = False) -> Iterator[tuple[str, int]]:
    """Every module that is imported, in functions too: `(name, line)`; `from a import b` gives `a` and `a.b`."""
    skipped = {
        id(inner)
        for node in ast.walk(tree)
        if runtime_only and isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")
        for inner in ast.walk(node)
    }
    for node in ast.walk(tree):
        if id(node) in skipped:
            continue
        if isinstance(node, ast.Import):
            yield from ((alias.name, node.lineno) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            module = node.module or ""
            yield module, node.lineno
            yield from ((f"{module}.{alias.name}", node.lineno) for alias in node.names)


def run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def script(name: str) -> str:
    """A program installed beside this interpreter."""
    return str(Path(sysconfig.get_path("scripts")) / name)


def test_files_are_short() -> None:
    long = {
        str(path): num_lines
        for folder in BUDGETED
        for path in sorted((ROOT / folder).rglob("*.py"))
        if (num_lines := len(path.read_text(encoding="utf-8").splitlines())) > MAX_FILE_LINES
    }
    assert not long


def test_functions_are_short() -> None:
    long = {
        f"{path}:{node.lineno} {node.name}": node.end_lineno - node.lineno + 1
        for path, tree in sources(*BUDGETED)
        for node in ast.walk(tree)
        if isinstance(node, FunctionDef) and node.end_lineno and node.end_lineno - node.lineno >= MAX_FUNCTION_LINES
    }
    assert not long


def test_public_functions_and_classes_say_what_they_do() -> None:
    silent = [
        f"{path}:{node.lineno} {node.name}"
        for path, tree in sources(*PACKAGES)
        for node in tree.body
        if isinstance(node, FunctionDef | ast.ClassDef)
        and not node.name.startswith("_")
        # What a hook does is written once, in hookspecs.
        and not any(ast.unparse(decorator).startswith("hookimpl") for decorator in node.decorator_list)
        and not ast.get_docstring(node)
    ]
    assert not silent


def test_no_file_is_a_drawer() -> None:
    drawers = {"utils", "util", "helpers", "helper", "common", "misc", "tools"}
    assert [path for path, _ in sources(*PACKAGES, "tests", "examples") if path.stem in drawers] == []


def test_nothing_is_left_to_do() -> None:
    words = ("TO" + "DO", "FIX" + "ME", "XX" + "X")
    left = [
        f"{path.relative_to(ROOT)}: {word}"
        for folder in (*PACKAGES, "tests", "examples", "docs")
        for path in sorted((ROOT / folder).rglob("*"))
        if path.suffix in {".py", ".md", ".yaml", ".toml"}
        for word in words
        if word in path.read_text(encoding="utf-8")
    ]
    assert not left


@pytest.mark.parametrize("engine", ["engine.py", "trainer.py", "evaluation.py"])
def test_the_engine_calls_no_algorithm_by_name(engine: str) -> None:
    components = load_plugins().registry.list()
    names = {component.name for component in components} | {component.id for component in components}
    names |= set(recipe_names())
    assert {"math", "brevity", "clip", "k3", "group", "tiny-math"} <= names
    tree = ast.parse((ROOT / "grpoforge" / engine).read_text(encoding="utf-8"))
    strings = {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    assert not strings & names


def test_layers() -> None:
    """The contracts, as sentences, are in .importlinter."""
    checked = run(script("lint-imports"), "--config", ".importlinter", "--no-cache")
    assert checked.returncode == 0, checked.stdout[-3000:]


def test_first_party_plugins_import_only_the_public_api() -> None:
    foreign = [
        f"{path}:{line} {name}"
        for path, tree in sources("plugins")
        for name, line in imports(tree, runtime_only=True)
        if name.startswith("grpoforge.") and name.split(".")[1] not in PUBLIC_API | {"hookimpl"}
    ]
    assert not foreign


def test_nothing_that_is_installed_imports_what_is_not() -> None:
    outside = {"tests", "benchmarks", "examples"}
    assert [
        f"{path}:{line} {name}"
        for path, tree in sources(*PACKAGES)
        for name, line in imports(tree)
        if name.split(".")[0] in outside
    ] == []


def test_nothing_is_unpickled() -> None:
    hidden = {"broadcast_object_list", "all_gather_object", "gather_object", "scatter_object_list"}
    picklers = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal", "cloudpickle", "_pickle"}
    found = [
        f"{path}:{line} {name}"
        for path, tree in sources(*PACKAGES)
        for name, line in imports(tree)
        if name.split(".")[0] in picklers or name == "torch.load"
    ]
    found += [
        f"{path}:{node.lineno} {ast.unparse(node)}"
        for path, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute)
        and (node.attr in hidden or ast.unparse(node) in {"torch.load", "torch.save"})
    ]
    assert not found


def test_text_of_models_is_never_run() -> None:
    runners = {"eval", "exec", "compile", "literal_eval", "ast.literal_eval", "sympify", "parse_expr", "lambdify"}
    assert [
        f"{path}:{node.lineno} {ast.unparse(node.func)}"
        for path, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) in runners
    ] == []


def test_remote_code_is_never_trusted() -> None:
    values = [
        (f"{path}:{node.value.lineno}", ast.unparse(node.value))
        for path, tree in sources(*PACKAGES)
        for node in ast.walk(tree)
        if isinstance(node, ast.keyword) and node.arg == "trust_remote_code"
    ]
    assert values and {value for _, value in values} == {"False"}, values


def test_the_program_answers_before_torch_is_loaded() -> None:
    heavy = "torch", "transformers", "datasets", "pydantic", "pyarrow", "numpy", "pluggy"
    shown = run(
        sys.executable,
        "-c",
        f"import sys, grpoforge.cli.main; print([name for name in {heavy!r} if name in sys.modules])",
    )
    loaded = ast.literal_eval(shown.stdout) if shown.returncode == 0 else shown.stderr
    # `from grpoforge import hookimpl` is what every plugin starts with, and pluggy is small.
    assert loaded == ["pluggy"]


def test_ruff_has_nothing_to_say() -> None:
    """Complexity is in it: at most 8 for each function."""
    folders = [folder for folder in (*PACKAGES, "tests", "benchmarks", "examples") if (ROOT / folder).is_dir()]
    for arguments in (("check",), ("format", "--check")):
        checked = run(sys.executable, "-m", "ruff", *arguments, "--no-cache", *folders)
        assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-1000:]


@pytest.mark.slow
def test_mypy_has_nothing_to_say(tmp_path: Path) -> None:
    checked = run(sys.executable, "-m", "mypy", f"--cache-dir={tmp_path}")
    assert checked.returncode == 0, checked.stdout[-3000:] + checked.stderr[-1000:]


@pytest.mark.slow
def test_help_is_quick(capsys: pytest.CaptureFixture[str]) -> None:
    """Printed, not asserted: a shared machine has moods. 0.3 s is what a quiet one takes at most."""
    before = os.times()
    shown = run(sys.executable, "-m", "grpoforge", "--help")
    after = os.times()
    with capsys.disabled():
        print(f"\ngrpoforge --help: {after.elapsed - before.elapsed:.2f} s")
    assert shown.returncode == 0 and "train" in shown.stdout
