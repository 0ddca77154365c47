"""The schedules beside Kubernetes: Airflow, cron and systemd."""

import configparser
import os
import re
import runpy
import shutil
import subprocess
import sys
from datetime import timedelta
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml
from croniter import croniter

from infra.manifest_rules import shortest_gap_seconds
from infra.validate import FOLDER

SCHEDULES = FOLDER / "schedules"


class Recorded:
    """Stands in for a class of Airflow's: keeps what it was called with."""

    made: list["Recorded"]

    def __init__(self, **arguments: Any) -> None:
        self.arguments = arguments
        type(self).made.append(self)

    def __enter__(self) -> "Recorded":
        return self

    def __exit__(self, *error: object) -> None:
        pass


@pytest.fixture
def dag(monkeypatch: pytest.MonkeyPatch) -> tuple[dict[str, Any], dict[str, Any]]:
    """What the DAG file gives to DAG and to BashOperator; Airflow itself is 300 MB and no dependency."""
    dags, operators = (type(name, (Recorded,), {"made": []}) for name in ("DAG", "BashOperator"))
    modules: dict[str, dict[str, Any]] = {
        "airflow": {},
        "airflow.sdk": {"DAG": dags},
        "airflow.providers": {},
        "airflow.providers.standard": {},
        "airflow.providers.standard.operators": {},
        "airflow.providers.standard.operators.bash": {"BashOperator": operators},
        "pendulum": {"datetime": lambda *date, tz: (*date, tz)},
    }
    for name, content in modules.items():
        module = ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)
    runpy.run_path(str(SCHEDULES / "airflow_dag.py"))
    assert [len(dags.made), len(operators.made)] == [1, 1]
    return dags.made[0].arguments, operators.made[0].arguments


def test_airflow_runs_one_build_at_a_time_and_none_for_nights_that_are_over(dag: Any) -> None:
    settings, task = dag
    assert (settings["max_active_runs"], settings["catchup"]) == (1, False)
    assert croniter.is_valid(settings["schedule"])
    assert task["execution_timeout"] < timedelta(seconds=shortest_gap_seconds(settings["schedule"]))


def test_airflow_keeps_the_cluster_s_token_to_itself(dag: Any) -> None:
    _, task = dag
    assert task["append_env"]
    assert task["env"]["RAY_AUTH_TOKEN"] == "{{ conn.refrag_ray.password }}"
    assert "TOKEN" not in task["bash_command"]


def test_airflow_and_kubernetes_run_the_same_build(dag: Any) -> None:
    _, task = dag
    entrypoint = re.search(
        r"entrypoint: >-\n((?:  .*\n)*?)  submission", (FOLDER / "kubernetes/rayjob.yaml").read_text()
    )
    assert entrypoint is not None
    assert task["bash_command"].split(" -- ")[1].split() == entrypoint[1].split()


def test_cron_names_a_time_a_user_and_a_file_with_the_secrets() -> None:
    lines = (SCHEDULES / "refrag.crontab").read_text(encoding="utf-8").splitlines()
    (job,) = (line for line in lines if re.match(r"[\d*]", line))
    *time, user, command = job.split(maxsplit=6)
    assert croniter.is_valid(" ".join(time))
    assert (user, command.split("; ")[:2]) == ("refrag", ["set -a", ". /etc/refrag/storage.env"])
    assert "%" not in command  # cron's newline


KUBECTL = """#!/bin/sh
echo "$*" >> calls
case "$*" in
  create*) echo rayjob.ray.io/refrag-build-abcde ;;
  *jobDeploymentStatus*) [ "$(wc -l < calls)" -gt 2 ] || exit 1; head -1 states; sed -i 1d states ;;
  *jobStatus*) cat result ;;
esac
"""


@pytest.mark.parametrize(
    ("states", "result", "code"),
    [
        (["Initializing", "Running", "Retrying", "Running", "Complete"], "SUCCEEDED: ", 0),
        (["Running", "Failed"], "FAILED: Job entrypoint command failed with exit code 1", 1),
        (["", "Failed"], ": the deadline has passed", 1),
    ],
)
def test_the_cron_job_waits_for_the_ray_job_and_ends_as_it_does(
    states: list[str], result: str, code: int, tmp_path: Path
) -> None:
    *_, job = yaml.safe_load_all((FOLDER / "kubernetes/cronjob.yaml").read_text(encoding="utf-8"))
    (container,) = job["spec"]["jobTemplate"]["spec"]["template"]["spec"]["containers"]
    for name, text in (("kubectl", KUBECTL), ("sleep", "#!/bin/sh\n")):
        (tmp_path / name).write_text(text)
        (tmp_path / name).chmod(0o755)
    (tmp_path / "states").write_text("".join(f"{state}\n" for state in states))
    (tmp_path / "result").write_text(result)
    finished = subprocess.run(
        [*container["command"], *container["args"]],
        cwd=tmp_path,
        env=os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert (finished.returncode, finished.stderr) == (code, "")
    assert finished.stdout == f"created rayjob.ray.io/refrag-build-abcde\nrayjob.ray.io/refrag-build-abcde {result}\n"
    calls = (tmp_path / "calls").read_text().splitlines()
    assert calls[0] == "create --filename /rayjob/rayjob.yaml --output name"
    assert len([call for call in calls if "jobDeploymentStatus" in call]) == len(states) + 1
    assert ("delete rayjob.ray.io/refrag-build-abcde" in calls) == (code == 0)


def unit(name: str) -> configparser.ConfigParser:
    parser = configparser.ConfigParser(interpolation=None)
    parser.optionxform = str  # type: ignore[assignment,method-assign]
    parser.read_string((SCHEDULES / name).read_text(encoding="utf-8"))
    return parser


def test_systemd_takes_quarantined_records_for_success_and_secrets_from_a_file() -> None:
    service = unit("refrag-nightly.service")["Service"]
    assert service["SuccessExitStatus"] == "3"
    assert service["EnvironmentFile"] == "/etc/refrag/storage.env"
    assert service["Type"] == "oneshot"
    assert unit("refrag-nightly.timer")["Timer"]["OnCalendar"] == "*-*-* 02:00:00"


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not installed")
@pytest.mark.parametrize(
    ("sound", "faulty", "code"), [("", "", 0), ("OnCalendar=*-*-* 02:00:00", "OnCalendar=nightly at two", 1)]
)
def test_systemd_s_own_check(sound: str, faulty: str, code: int, tmp_path: Path) -> None:
    service = (SCHEDULES / "refrag-nightly.service").read_text(encoding="utf-8")
    (tmp_path / "refrag-nightly.service").write_text(service.replace("/opt/refrag/bin/refrag", "/bin/true"))
    timer = (SCHEDULES / "refrag-nightly.timer").read_text(encoding="utf-8")
    (tmp_path / "refrag-nightly.timer").write_text(timer.replace(sound, faulty))
    checked = subprocess.run(
        ["systemd-analyze", "verify", *sorted(tmp_path.iterdir())], capture_output=True, text=True, check=False
    )
    assert checked.returncode == code, checked.stderr
