"""What infra/ ships is valid, and a fault planted into any file of it is found."""

import lzma
import re
from pathlib import Path

import jsonschema
import pytest
import yaml

from infra import validate
from infra.commands import command_errors, simple_commands
from infra.manifest_rules import project_versions, shortest_gap_seconds
from infra.manifest_schemas import Schemas, load_crds, schema_errors, strict

INFRA = validate.FOLDER
CLUSTER_PATHS = {"raycluster": "", "rayjob": "rayClusterSpec.", "raycronjob": "jobTemplate.rayClusterSpec."}


@pytest.fixture(scope="module")
def crds() -> Schemas:
    return load_crds(validate.CRDS)


def errors_in(path: Path, crds: Schemas) -> list[str]:
    return list(validate.file_errors(path, crds, project_versions()))


@pytest.mark.parametrize("path", validate.shipped_files(), ids=lambda path: path.name)
def test_what_is_shipped_is_valid(path: Path, crds: Schemas) -> None:
    assert errors_in(path, crds) == []


def test_nothing_that_is_shipped_is_left_out() -> None:
    shipped = {str(path.relative_to(INFRA)) for path in validate.shipped_files()}
    manifests = {str(path.relative_to(INFRA)) for path in INFRA.rglob("*.yaml")}
    assert manifests <= shipped
    assert {"Dockerfile", "README.md", "schedules/airflow_dag.py", "schedules/refrag.crontab"} <= shipped


FAULTS = [
    (
        "kubernetes/raycluster.yaml",
        "maxReplicas: 4",
        "maxReplica: 4",
        r"spec.workerGroupSpecs\[1\]: Additional properties are not allowed \('maxReplica' was unexpected\)",
    ),
    (
        "kubernetes/raycluster.yaml",
        'rayVersion: "2.60.0"',
        'rayVersion: "2.59.0"',
        r"spec.rayVersion: found 2.59.0, expected 2.60.0 as in constraints.txt",
    ),
    (
        "kubernetes/raycluster.yaml",
        "          - {key: nvidia.com/gpu, operator: Exists, effect: NoSchedule}",
        "          - {key: spot, operator: Exists, effect: NoSchedule}",
        r"ray-worker: asks for nvidia.com/gpu; expected a toleration of the taint nvidia.com/gpu on its pod",
    ),
    (
        "kubernetes/raycluster.yaml",
        "ray2.60.0-cuda",
        "ray2.60.0-cpu",
        r"refrag:0.1.0-ray2.60.0-cpu expected where nvidia.com/gpu is asked for, and there alone",
    ),
    (
        "kubernetes/raycluster.yaml",
        "{name: REFRAG_CACHE, value: /cache}",
        "{name: AWS_SECRET_ACCESS_KEY, value: abc}",
        r"ray-head: AWS_SECRET_ACCESS_KEY has a value here; expected valueFrom or envFrom with a Secret's name",
    ),
    (
        "kubernetes/raycluster.yaml",
        "runAsNonRoot: true",
        "runAsNonRoot: false",
        r"headGroupSpec.template.spec.securityContext.runAsNonRoot: expected true",
    ),
    (
        "kubernetes/raycluster.yaml",
        "labels: {app.kubernetes.io/name: refrag}",
        "label: {app.kubernetes.io/name: refrag}",
        r"metadata: Additional properties are not allowed \('label' was unexpected\)",
    ),
    (
        "kubernetes/raycluster.yaml",
        "# Images: UNBUILT.",
        "# Images:",
        r"its images were not built; expected the first line to begin with '# Images: UNBUILT\.'",
    ),
    (
        "kubernetes/rayjob.yaml",
        "ttlSecondsAfterFinished: 600",
        "ttlSecondsAfterFinished: 10min",
        r"spec.ttlSecondsAfterFinished: '10min' is not of type 'integer'",
    ),
    (
        "kubernetes/rayjob.yaml",
        "--checkpoint",
        "--chekpoint",
        r"refrag-job index build: No such option\W+--chekpoint",
    ),
    (
        "kubernetes/rayjob.yaml",
        "index build",
        "index create",
        r"refrag-job index: found \['create'\], expected one of build, compact",
    ),
    (
        "kubernetes/rayjob.yaml",
        "refrag-job index build",
        "python build.py",
        r"spec.entrypoint: found 'python build.py s3:.*', expected a command of refrag",
    ),
    (
        "kubernetes/rayjob.yaml",
        "limits: {cpu: \"1\", memory: 1Gi}",
        "limits: {cpu: \"1\"}",
        r"submitter: resources.limits has no memory",
    ),
    (
        "kubernetes/raycronjob.yaml",
        "timeZone: Etc/UTC",
        "concurrencyPolicy: Forbid",
        r"spec: Additional properties are not allowed \('concurrencyPolicy' was unexpected\)",
    ),
    (
        "kubernetes/raycronjob.yaml",
        "activeDeadlineSeconds: 82800",
        "activeDeadlineSeconds: 90000",
        r"spec.jobTemplate.activeDeadlineSeconds: expected less than the time between two runs, lest they overlap",
    ),
    (
        "kubernetes/raycronjob.yaml",
        '"0 2 * * *"',
        '"0 25 * * *"',
        r"spec.schedule: '0 25 \* \* \*' is no cron expression of five fields",
    ),
    (
        "kubernetes/cronjob.yaml",
        "configMap: {name: refrag-rayjob}",
        "configmap: {name: refrag-rayjob}",
        r"spec.jobTemplate.spec.template.spec.volumes\[0\]: Additional properties are not allowed \('configmap' was",
    ),
    (
        "kubernetes/cronjob.yaml",
        "concurrencyPolicy: Forbid",
        "concurrencyPolicy: Allow",
        r"spec.concurrencyPolicy: found Allow, expected Forbid",
    ),
    (
        "kubernetes/cronjob.yaml",
        "failedJobsHistoryLimit: 3",
        "suspend: false",
        r"spec.failedJobsHistoryLimit: expected a number, lest finished jobs pile up",
    ),
    (
        "kubernetes/cronjob.yaml",
        "alpine/kubectl:1.35.4",
        "alpine/kubectl",
        r"create-and-wait: image alpine/kubectl has no fixed version; expected a tag",
    ),
    ("kubernetes/cronjob.yaml", "kind: ServiceAccount", "kind: ServiceAcount", r"found v1 ServiceAcount, expected"),
    (
        "kubernetes/storage.yaml",
        "storage: 100Gi",
        "storage: [100Gi]",
        r"spec.resources.requests.storage: \['100Gi'\] is not (valid under|of type)",
    ),
    (
        "kubernetes/cronjob.yaml",
        "kind: ServiceAccount\nmetadata:",
        "kind: Secret\nmetadata:",
        r"found a Secret with its values; expected only references",
    ),
    (
        "ray-cluster.yaml",
        "idle_timeout_minutes: 10",
        "idle_timeout_minute: 10",
        r"\$: Additional properties are not allowed \('idle_timeout_minute' was unexpected\)",
    ),
    ("ray-cluster.yaml", "--port=6379", "--prt=6379", r"ray start: No such option\W+--prt"),
    ("ray-cluster.yaml", "refrag:0.1.0-ray2.60.0-cuda", "refrag:0.0.9-ray2.60.0-cuda", r"image tag refrag:0.0.9-ray2"),
    ("Dockerfile", "refrag:0.1.0-ray2.60.0-cpu", "refrag:latest", r"image tag refrag:latest is of other versions"),
    ("schedules/airflow_dag.py", "--retriever", "--retreiver", r"refrag-job index build: No such option\W+--retr"),
    ("schedules/airflow_dag.py", "ray job submit --", "ray job sumbit --", r"ray job: found \['sumbit'\], expected"),
    ("schedules/refrag.crontab", "index build", "index bild", r"refrag index: found \['bild'\], expected one of"),
    ("schedules/refrag-nightly.service", "--output", "--ouput", r"refrag index build: No such option\W+--ouput"),
    ("README.md", "refrag index plan documents/", "refrag index plan", r"refrag index plan: Missing argument 'corpus'"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "sound", "faulty", "expected"), FAULTS)
def test_a_planted_fault_is_found(
    name: str, sound: str, faulty: str, expected: str, crds: Schemas, tmp_path: Path
) -> None:
    text = (INFRA / name).read_text(encoding="utf-8")
    assert sound in text
    path = tmp_path / Path(name).name
    path.write_text(text.replace(sound, faulty), encoding="utf-8")
    found = [error for error in errors_in(path, crds) if re.search(expected, error)]
    assert found, errors_in(path, crds)


def test_every_shipped_file_with_something_to_check_has_a_planted_fault() -> None:
    planted = {name for name, *_ in FAULTS}
    unchecked = {"schedules/refrag-nightly.timer"}  # systemd's own syntax
    assert {str(path.relative_to(INFRA)) for path in validate.shipped_files()} - planted == unchecked


def test_a_key_of_a_store_is_found_in_any_file(tmp_path: Path, crds: Schemas) -> None:
    path = tmp_path / "refrag.crontab"
    path.write_text("AWS_ACCESS_KEY_ID=" + "AKIA" + "ABCDEFGHIJKLMNOP\n")
    assert errors_in(path, crds) == [
        "found what looks like a secret's value; expected a reference to a Secret or an environment file"
    ]


def test_what_is_no_yaml_is_one_error(tmp_path: Path, crds: Schemas) -> None:
    path = tmp_path / "broken.yaml"
    path.write_text("spec: {")
    assert len(errors_in(path, crds)) == 1
    assert errors_in(path, crds)[0].startswith("found no YAML (while parsing")
    path.write_text("- item")
    assert errors_in(path, crds) == ["found list, expected a mapping"]


def test_the_three_clusters_are_one_and_the_two_jobs_too() -> None:
    cluster, job, nightly = (
        yaml.safe_load((INFRA / "kubernetes" / f"{name}.yaml").read_text())["spec"]
        for name in ("raycluster", "rayjob", "raycronjob")
    )
    assert job["rayClusterSpec"] == cluster
    assert nightly["jobTemplate"] == job


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    crd = lzma.decompress((validate.CRDS / "ray.io_raycronjobs.yaml.xz").read_bytes())
    (tmp_path / "crd.yaml").write_bytes(crd)
    (tmp_path / "empty").mkdir()
    storage, nightly = INFRA / "kubernetes" / "storage.yaml", tmp_path / "nightly.yaml"
    nightly.write_text((INFRA / "kubernetes" / "raycronjob.yaml").read_text().replace("  schedule:", "  schedul:"))
    assert validate.main(["--crds", str(tmp_path), str(storage)]) == 0
    assert capsys.readouterr().out == "1 files: all good\n"
    assert validate.main(["--crds", str(tmp_path), str(storage), str(nightly)]) == 1
    assert capsys.readouterr().out.splitlines() == [
        f"{nightly}: spec: 'schedule' is a required property",
        f"{nightly}: spec: Additional properties are not allowed ('schedul' was unexpected)",
    ]
    with pytest.raises(SystemExit, match="has no CRD; expected"):
        validate.main(["--crds", str(tmp_path / "empty")])


def test_unknown_fields_are_refused_but_where_a_crd_keeps_them() -> None:
    schema = {
        "type": "object",
        "properties": {
            "metadata": {"type": "object"},
            "kept": {"type": "object", "properties": {}, "x-kubernetes-preserve-unknown-fields": True},
            "map": {"type": "object", "additionalProperties": {"type": "object", "properties": {"a": {}}}},
            "list": {"type": "array", "items": {"type": "object", "properties": {"properties": {"type": "string"}}}},
        },
    }
    for sound in (
        {"metadata": {"x": 1}},
        {"kept": {"x": 1}},
        {"map": {"x": {"a": 1}}},
        {"list": [{"properties": "a"}]},
    ):
        jsonschema.validate(sound, strict(schema))
    for faulty in ({"x": 1}, {"map": {"x": {"b": 1}}}, {"list": [{"b": 1}]}):
        with pytest.raises(jsonschema.ValidationError, match="Additional properties are not allowed"):
            jsonschema.validate(faulty, strict(schema))


def test_a_kind_that_nobody_knows_is_an_error(crds: Schemas) -> None:
    assert schema_errors({"apiVersion": "ray.io/v2", "kind": "RayJob"}, crds) == [
        "found ray.io/v2 RayJob, expected a kind of Kubernetes 1.33 or of the CRDs given with --crds"
    ]


@pytest.mark.parametrize(
    ("line", "commands"),
    [
        ("refrag index build a -o b", [["refrag", "index", "build", "a", "-o", "b"]]),
        ("set -a; . env; A=1 B='x y' refrag a > f", [["set", "-a"], [".", "env"], ["refrag", "a"], ["f"]]),
        ("a && b || c 'd;e' # f", [["a"], ["b"], ["c", "d;e"]]),
    ],
)  # fmt: skip
def test_shell_lines_are_taken_apart(line: str, commands: list[list[str]]) -> None:
    assert list(simple_commands(line)) == commands


@pytest.mark.parametrize("line", ["echo refrag nonsense", "kubectl apply -f x", "ray job submit -- refrag --help"])
def test_other_commands_are_nobody_s_business(line: str) -> None:
    assert command_errors(line) == []


def test_the_gap_between_runs_is_that_of_the_closest_two() -> None:
    assert shortest_gap_seconds("0 2 * * *") == 24 * 3600
    assert shortest_gap_seconds("0 2,5 * * 1-5") == 3 * 3600
