"""What is published: one pure wheel with everything that the default run needs, and a source archive that builds."""

from __future__ import annotations

import os
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
MODEL = "grpoforge_plugins/tiny_math/model"
MAX_MODEL_BYTES = 4_000_000
TOP_LEVEL = {"grpoforge", "grpoforge_plugins", "grpoforge_kernels", "grpoforge-0.1.0.dist-info"}

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the wheel and the source archive, built without an index."""
    out = tmp_path_factory.mktemp("dist")
    subprocess.run(
        [sys.executable, "-m", "build", "--no-isolation", "--outdir", out, ROOT], check=True, capture_output=True
    )
    return out


def test_the_wheel_is_pure_and_holds_what_the_default_run_needs(built: Path) -> None:
    (wheel,) = built.glob("*.whl")
    assert wheel.name == "grpoforge-0.1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel) as archive:
        files = {entry.filename: entry.file_size for entry in archive.infolist()}
        entry_points = archive.read("grpoforge-0.1.0.dist-info/entry_points.txt").decode()
    assert {name.split("/")[0] for name in files} == TOP_LEVEL
    for needed in (
        "grpoforge/recipes/tiny-math.yaml",
        "grpoforge/py.typed",
        "grpoforge_plugins/py.typed",
        "grpoforge_kernels/py.typed",
        f"{MODEL}/model.safetensors",
        f"{MODEL}/tokenizer.json",
        f"{MODEL}/config.json",
        "grpoforge-0.1.0.dist-info/licenses/LICENSE",
    ):
        assert needed in files
    assert sum(size for name, size in files.items() if name.startswith(MODEL)) <= MAX_MODEL_BYTES
    assert not [name for name in files if "test" in Path(name).name or "__pycache__" in name]
    assert "[console_scripts]\ngrpoforge = grpoforge.cli.main:main" in entry_points
    assert "[grpoforge]\nbuiltin = grpoforge_plugins" in entry_points


def test_the_source_archive_has_the_tests_and_no_leftovers(built: Path) -> None:
    (source,) = built.glob("*.tar.gz")
    with tarfile.open(source) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {"pyproject.toml", "README.md", "LICENSE", "tests/test_packaging.py", ".importlinter", ".ci/run"} <= names
    leftovers = ("runs", ".venv", "dist", ".mypy_cache", ".pytest_cache", ".git")
    assert not [name for name in names if name.split("/")[0] in leftovers or name.endswith(".pyc")]


def test_the_installed_wheel_runs_from_another_folder(built: Path, tmp_path: Path) -> None:
    """In a clean environment that borrows this interpreter's dependencies, so that nothing is downloaded."""
    (wheel,) = built.glob("*.whl")
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", venv], check=True)
    borrowed = [path for path in sys.path if path.endswith("site-packages")]
    (site,) = venv.glob("lib/python*/site-packages")
    subprocess.run(
        [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--no-index", "--target", site, wheel],
        check=True,
    )
    # Behind the wheel's own folder, and without the editable install's finders, which live in .pth files.
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [
            venv / "bin/python", "-m", "grpoforge", "train", "--reward", "math", "--reward", "brevity",
            "--max-steps", "2", "--output", "run", "--set", "data.num_eval=4", "--set", "batch.prompts_per_step=2",
            "--set", "batch.minibatch_size=16", "--set", "batch.micro_batch_size=16",
        ],
        cwd=tmp_path, env={**environment, "OMP_NUM_THREADS": "1"}, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "run/checkpoints/step-000002/model.safetensors").is_file()
    where = subprocess.run(
        [venv / "bin/python", "-c", "import grpoforge, grpoforge_plugins as p; print(grpoforge.__file__, p.__file__)"],
        cwd=tmp_path, env=environment, capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert where.stdout.split() == [str(site / "grpoforge/__init__.py"), str(site / "grpoforge_plugins/__init__.py")]
