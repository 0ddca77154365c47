"""The wheel as others get it: what it claims, what it carries, and that it runs away from the source tree."""

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PARTS = ["pyproject.toml", "README.md", "cli.py", "schemas", "checkpoints", "refrag_core", "pipelines", "benchmarks"]


def pip(*arguments: object) -> None:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "--isolated", *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    tree, made = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in PARTS:
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, tree / name, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, tree / name)
    pip("wheel", "--no-deps", "--no-build-isolation", "--no-index", "--wheel-dir", made, tree)
    (path,) = made.glob("*.whl")
    return path


def test_it_claims_no_generic_module(wheel: Path) -> None:
    names = zipfile.ZipFile(wheel).namelist()
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"refrag", "refrag_core"}
    assert not [name for name in names if "test" in name or "__pycache__" in name]


def test_it_carries_every_source_file_and_the_format_s_specification(wheel: Path) -> None:
    names = set(zipfile.ZipFile(wheel).namelist())
    installed = {"cli.py": "refrag/cli.py"}
    for folder, package in (
        ("schemas", "refrag/schemas"),
        ("checkpoints", "refrag/checkpoints"),
        ("pipelines", "refrag/pipelines"),
        ("refrag_core", "refrag_core"),
    ):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in (".py", ".json", ".md", ".safetensors", ".toml", ".jinja", ".html", ".css", ".js"):
                installed[str(path)] = f"{package}/{path.relative_to(ROOT / folder).as_posix()}"
    specification, config = "refrag/schemas/BUNDLE.md", "refrag_core/training/configs/policy.toml"
    assert {"refrag/schemas/manifest.schema.json", specification, config} <= set(installed.values())
    assert sorted(set(installed.values()) - names) == []


def test_it_runs_from_another_directory(wheel: Path, tmp_path: Path) -> None:
    target, elsewhere = tmp_path / "target", tmp_path / "elsewhere"
    elsewhere.mkdir()
    pip("install", "--no-deps", "--no-index", "--target", target, wheel)

    def run(*arguments: str) -> "subprocess.CompletedProcess[str]":
        environment = os.environ | {"PYTHONPATH": str(target)}
        return subprocess.run(
            [sys.executable, *arguments], cwd=elsewhere, env=environment, capture_output=True, text=True, check=False
        )

    shown = run("-m", "refrag.cli", "--help")
    assert (shown.returncode, "Usage: " in shown.stdout) == (0, True), shown.stderr
    where = "import refrag.cli, refrag_core, refrag.schemas as s; s.manifest_schema(); "
    found = run("-c", where + "print(refrag.cli.__file__, refrag_core.__file__, s.__file__)").stdout.split()
    assert all(Path(path).is_relative_to(target) for path in found)
    assert len(found) == 3
    script = target / "bin" / "refrag"
    failed = run(str(script), "index", "verify", "nowhere")
    assert (failed.returncode, failed.stdout) == (1, "")
    assert failed.stderr.startswith("error: nowhere holds no index: expected versions/1.json")
