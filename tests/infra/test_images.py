"""The Dockerfile and what it takes with it; nothing is built here."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from fnmatch import fnmatch
from pathlib import Path

import pytest

from infra.requirements import PROJECT, requirements
from infra.validate import FOLDER

ROOT = FOLDER.parent
DOCKERFILE = FOLDER / "Dockerfile"


def hadolint(path: Path) -> "subprocess.CompletedProcess[str]":
    program = Path(sys.executable).parent / "hadolint"
    return subprocess.run([program, "--no-color", path], capture_output=True, text=True, check=False)


def test_the_linter_has_nothing_to_say() -> None:
    linted = hadolint(DOCKERFILE)
    assert (linted.returncode, linted.stdout) == (0, "")


@pytest.mark.parametrize(
    ("sound", "faulty", "code"),
    [
        ("FROM base AS packages-cpu", "FROM python AS packages-cpu", "DL3006"),
        ("--no-install-recommends ", "", "DL3015"),
        ("USER 1000:1000\nWORKDIR /home/refrag", "USER root\nWORKDIR /home/refrag", "DL3002"),
        ("pip install --no-cache-dir --no-deps /tmp", "pip install --no-deps /tmp", "DL3042"),
    ],
)
def test_the_linter_finds_a_planted_fault(sound: str, faulty: str, code: str, tmp_path: Path) -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert sound in text
    faulty_file = tmp_path / "Dockerfile"
    faulty_file.write_text(text.replace(sound, faulty).replace("PIP_NO_CACHE_DIR=1", "A=1"), encoding="utf-8")
    assert code in hadolint(faulty_file).stdout


def test_every_image_ends_as_nobody_special() -> None:
    last = {}
    stage = ""
    for line in DOCKERFILE.read_text(encoding="utf-8").splitlines():
        if match := re.match(r"FROM \S+ AS (\S+)", line):
            stage = match[1]
        elif line.startswith("USER "):
            last[stage] = line
    assert last == {"cpu": "USER 1000:1000", "cuda": "USER 1000:1000"}


def copied() -> set[str]:
    lines = re.findall(r"^COPY (?:--chmod=\d+ )?(?!--from)(.*)$", DOCKERFILE.read_text(encoding="utf-8"), re.MULTILINE)
    return {source for line in lines for source in line.split()[:-1]}


def test_what_is_copied_is_there_and_sent_to_the_builder_with_little_else() -> None:
    ignore = (ROOT / ".dockerignore").read_text(encoding="utf-8").splitlines()
    assert "*" in ignore
    sent = {line.removeprefix("!") for line in ignore if line.startswith("!")}
    assert sent == copied()
    assert [name for name in sorted(sent) if not (ROOT / name).exists()] == []
    assert any(fnmatch("refrag_core/__pycache__", pattern) for pattern in ignore if "pycache" in pattern)


def test_the_wheel_s_sources_are_all_copied() -> None:
    folders = tomllib.loads(PROJECT.read_text(encoding="utf-8"))["tool"]["setuptools"]["package-dir"].values()
    assert {folder.split("/")[0] for folder in folders} - {"."} <= copied()
    assert {"cli.py", "pyproject.toml", "README.md", "LICENSE"} <= copied()


def test_images_start_from_one_that_is_fixed_to_the_patch() -> None:
    text = DOCKERFILE.read_text(encoding="utf-8")
    assert re.search(r"^ARG PYTHON_IMAGE=python:3\.\d+\.\d+-slim-bookworm$", text, re.MULTILINE)
    bases = set(re.findall(r"^FROM (\S+)", text, re.MULTILINE)) - set(re.findall(r" AS (\S+)$", text, re.MULTILINE))
    assert bases == {"${PYTHON_IMAGE}"}


def test_requirements_are_those_of_the_project_with_its_extras(tmp_path: Path) -> None:
    project = tmp_path / "pyproject.toml"
    project.write_text(
        '[project]\ndependencies = ["b>=1", "a"]\n[project.optional-dependencies]\n'
        'x = ["c<3"]\ny = ["refrag[x,z]", "d"]\nz = ["b>=1"]\n'
    )
    assert requirements([], project) == ["a", "b>=1"]
    assert requirements(["y"], project) == ["a", "b>=1", "c<3", "d"]
    with pytest.raises(SystemExit, match=r"^pyproject.toml has no extra w; expected some of x, y, z$"):
        requirements(["x", "w"], project)


def test_each_image_has_what_a_worker_needs_and_one_faiss() -> None:
    extras = re.findall(r"requirements\.py ([\w ]+) >", DOCKERFILE.read_text(encoding="utf-8"))
    assert [line.split()[0] for line in extras] == ["cpu", "gpu"]
    for line in extras:
        names = {re.split(r"[\[<>=]", requirement)[0] for requirement in requirements(line.split())}
        assert {"torch", "ray", "obstore", "pyarrow"} <= names
        assert len(names & {"faiss-cpu", "faiss-gpu"}) == 1


def test_every_package_that_an_image_names_is_pinned() -> None:
    pinned = {line.partition("==")[0].lower() for line in (ROOT / "constraints.txt").read_text().splitlines()[1:]}
    wanted = {re.split(r"[\[<>=]", line)[0] for line in requirements(["cpu", "gpu", "ray", "s3", "lance", "gguf"])}
    unpinned = {name.replace("-", "_") for name in wanted | {"boto3"}} - {name.replace("-", "_") for name in pinned}
    assert unpinned == {"jinja2"}  # whichever the others take


@pytest.mark.parametrize(("code", "expected"), [(0, 0), (1, 1), (2, 2), (3, 0), (130, 130)])
def test_a_scheduler_sees_quarantined_records_as_done(code: int, expected: int, tmp_path: Path) -> None:
    program = tmp_path / "refrag"
    program.write_text(f'#!/bin/sh\necho "$#:$*"\nexit {code}\n')
    program.chmod(0o755)
    finished = subprocess.run(
        [FOLDER / "refrag-job", "index", "build", "a b"],
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (finished.returncode, finished.stdout) == (expected, "3:index build a b\n")
    assert ("quarantined" in finished.stderr) == (code == 3)


@pytest.mark.skipif(shutil.which("git") is None or not (ROOT / ".git").exists(), reason="no checkout")
def test_the_job_s_script_may_be_executed() -> None:
    assert os.access(FOLDER / "refrag-job", os.X_OK)
