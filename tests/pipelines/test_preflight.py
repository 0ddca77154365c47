"""What workers lack is found before anything is submitted, and said in one message."""

import pickle
import sys
from dataclasses import replace
from importlib.metadata import metadata, version
from pathlib import Path

import pytest

from refrag.pipelines.preflight import (
    _OF_EXTRA,
    Machine,
    ModelNeed,
    Needs,
    check_workers,
    look,
    needs_of,
    source_digest,
)
from refrag.pipelines.stages import EmbedStage, EncodeStage, ScoreStage, Stages, TokenizeStage
from refrag_core.errors import ClusterError
from refrag_core.models import fingerprint_model, fingerprint_tokenizer
from refrag_core.retriever import retriever_fingerprint
from tests.tiny_models import decoder_folder, encoder_folder

RETRIEVER = ModelNeed("retriever", "/models/retriever", "org/model@1", "b" * 64)
NEEDS = Needs(extras=("ray", "s3"), models=(RETRIEVER,), gpus=1)
PACKAGES = {
    "numpy": "2.4.6",
    "pyarrow": "25.0.1",
    "safetensors": "0.8.0",
    "tokenizers": "0.23.3",
    "torch": "2.13.0",
    "transformers": "5.23.0",
    "ray": "2.60.0",
    "obstore": "0.12.1",
}
GOOD = Machine(
    name="10.0.0.2",
    python="3.11.7",
    source="a" * 64,
    packages=PACKAGES,
    models=("b" * 64,),
    gpus=1,
)
DRIVER = replace(GOOD, name="10.0.0.1", gpus=0)
INSTALL = f"pip install 'refrag[ray,s3]=={version('refrag')}' there"
ONE_IMAGE = "start every node from one image"


def found_on(worker: Machine, *others: Machine, needs: Needs = NEEDS) -> str:
    with pytest.raises(ClusterError) as caught:
        check_workers(needs, DRIVER, [worker, *others])
    return str(caught.value)


def message(found: str, remedy: str, who: str = "1 of 1 workers") -> str:
    return f"{who} cannot run this build: {found}; expected on each what the driver has. To mend it: {remedy}"


def test_equal_machines_pass_whatever_the_patch_of_python_and_the_driver_s_gpus() -> None:
    check_workers(NEEDS, DRIVER, [GOOD, replace(GOOD, name="10.0.0.3", python="3.11.14", gpus=8)])


def test_no_workers_lack_nothing() -> None:
    check_workers(NEEDS, DRIVER, [])


@pytest.mark.parametrize(
    ("worker", "expected"),
    [
        (
            replace(
                GOOD,
                packages={k: v for k, v in PACKAGES.items() if k != "obstore"},
                failures={"obstore": "not installed"},
            ),
            message("obstore is not installed on 10.0.0.2", INSTALL),
        ),
        (
            replace(GOOD, packages=PACKAGES | {"ray": "2.59.1"}),
            message(
                "ray is 2.59.1, expected 2.60.0 on 10.0.0.2", f"{ONE_IMAGE}, or pip install the same versions there"
            ),
        ),
        (replace(GOOD, python="3.12.4"), message("Python is 3.12, expected 3.11 on 10.0.0.2", ONE_IMAGE)),
        (
            replace(GOOD, source="0" * 64),
            message("refrag's own code is another than the driver's on 10.0.0.2", INSTALL),
        ),
        (
            replace(GOOD, models=(None,)),
            message(
                "the retriever 'org/model@1' is not found on 10.0.0.2",
                "give models by a reference that every node resolves: a folder on shared storage, a package, a hub id",
            ),
        ),
        (
            replace(GOOD, models=("0" * 64,)),
            message(
                "the retriever 'org/model@1' has fingerprint 000000000000, expected bbbbbbbbbbbb on 10.0.0.2",
                "copy the driver's model there, or pin its hub revision",
            ),
        ),
        (
            replace(GOOD, gpus=0),
            message(
                "0 CUDA devices are seen, expected 1 on 10.0.0.2",
                "use an image with CUDA on nodes with a GPU and its driver, or build with --device cpu",
            ),
        ),
    ],
)
def test_each_difference_is_one_error(worker: Machine, expected: str) -> None:
    assert found_on(worker) == expected


def test_one_message_names_every_problem_once_and_a_few_of_the_machines() -> None:
    old = replace(GOOD, python="3.10.1", source="0" * 64)
    said = found_on(GOOD, *(replace(old, name=f"10.0.1.{n}") for n in range(5)))
    assert said == message(
        "Python is 3.10, expected 3.11 on 10.0.1.0, 10.0.1.1, 10.0.1.2 and 2 more; refrag's own code is another than "
        "the driver's on 10.0.1.0, 10.0.1.1, 10.0.1.2 and 2 more",
        f"{ONE_IMAGE}; {INSTALL}",
        who="5 of 6 workers",
    )


def test_the_driver_need_not_have_what_only_workers_use() -> None:
    driver = replace(
        DRIVER, packages={k: v for k, v in PACKAGES.items() if k != "ray"}, failures={"ray": "not installed"}
    )
    check_workers(NEEDS, driver, [GOOD])


def test_what_is_seen_here(tmp_path: Path, own_cache: Path) -> None:
    decoder, retriever = decoder_folder(tmp_path / "decoder"), encoder_folder(tmp_path / "retriever")
    fingerprints = (fingerprint_tokenizer(decoder), retriever_fingerprint(retriever), fingerprint_model(decoder))
    models = (
        ModelNeed("tokenizer", str(decoder), "elsewhere", fingerprints[0]),
        ModelNeed("retriever", "/on/the/driver/alone", str(retriever), fingerprints[1]),
        ModelNeed("decoder", str(decoder), str(decoder), fingerprints[2]),
    )
    needs = Needs(extras=("cpu", "s3"), models=models)
    seen = look(needs)
    assert {"torch", "tokenizers", "faiss", "obstore"} <= set(seen.packages)
    assert seen.packages["torch"] == version("torch").partition("+")[0]
    assert (seen.failures, seen.models) == ({}, fingerprints)
    check_workers(needs, seen, [seen])


def test_a_model_that_is_nowhere_is_not_found(tmp_path: Path, own_cache: Path) -> None:
    needs = Needs(models=(ModelNeed("decoder", str(tmp_path / "none"), "package:none", "f"),))
    with pytest.raises(ClusterError, match="the decoder 'package:none' is not found on "):
        check_workers(needs, look(needs), [look(needs)])


def test_missing_and_broken_packages_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "obstore", None)
    (tmp_path / "apache_beam.py").write_text("raise OSError('libcuda.so.1: cannot open shared object file')")
    (tmp_path / "ray.py").write_text("import a_dependency_of_ray")
    monkeypatch.syspath_prepend(str(tmp_path))
    for name in ("ray", "apache_beam"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert look(Needs(extras=("s3", "beam", "ray"))).failures == {
        "obstore": "not installed",
        "apache_beam": "broken (libcuda.so.1: cannot open shared object file)",
        "ray": "broken (No module named 'a_dependency_of_ray')",
    }


def test_the_source_s_digest_follows_the_source(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import refrag_core

    before = source_digest()
    (tmp_path / "storage.py").write_text("x = 1")
    monkeypatch.setattr(refrag_core, "__path__", [str(tmp_path)])
    changed = source_digest()
    (tmp_path / "storage.py").write_text("x = 2")
    assert len({before, changed, source_digest()}) == 3


def test_a_build_s_needs_are_what_its_stages_open() -> None:
    stages = Stages(
        TokenizeStage("/models/decoder", "t", 256),
        (
            EncodeStage("/index/checkpoint", "f", "cuda"),
            EmbedStage("/models/retriever", "r", "cuda"),
            ScoreStage("/models/weights", "d", "cuda"),
        ),
    )
    assert needs_of(stages, extras=["ray"], gpus=1) == Needs(
        extras=("ray",),
        models=(
            ModelNeed("tokenizer", "/models/decoder", "/models/decoder", "t"),
            ModelNeed("retriever", "/models/retriever", "/models/retriever", "r"),
            ModelNeed("decoder", "/models/weights", "/models/weights", "d"),
        ),
        gpus=1,
    )


def test_needs_and_what_was_seen_travel_between_machines() -> None:
    assert pickle.loads(pickle.dumps((NEEDS, GOOD))) == (NEEDS, GOOD)  # noqa: S301


def test_the_extras_that_a_stage_may_use_are_extras_of_the_project() -> None:
    assert set(_OF_EXTRA) <= set(metadata("refrag").get_all("Provides-Extra") or ())
