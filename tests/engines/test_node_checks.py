"""A node that lacks something is told of by name, before anything is sent to it."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from refrag.pipelines.engines.node_checks import Needs, make_check, modules_for, refuse, tokens, unanswered
from refrag_core.errors import ClusterError

TOKEN = ".refrag-reach-test"


def test_a_node_like_this_one_is_ready(tmp_path: Path) -> None:
    needs = Needs(readable=[str(tmp_path)], shared=[str(tmp_path / "made" / "index")])
    with tokens(needs.shared, TOKEN):
        assert make_check(needs, TOKEN)("node1") == []
        assert unanswered(needs.shared, TOKEN, "node1") == []
        assert unanswered(needs.shared, TOKEN, "node2") == [
            f"writes to another {tmp_path}/made/index than this machine's"
        ]
    assert not (tmp_path / "made" / "index").exists()


def test_a_folder_that_was_there_keeps_what_it_holds(tmp_path: Path) -> None:
    (tmp_path / "kept").touch()
    with tokens([str(tmp_path)], TOKEN):
        make_check(Needs(shared=[str(tmp_path)]), TOKEN)("node1")
    assert [path.name for path in tmp_path.iterdir()] == ["kept"]


def test_all_that_is_missing_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("time.sleep", lambda seconds: None)
    needs = Needs(
        modules=("json", "no_such_module"), readable=[str(tmp_path / "corpus")], shared=[str(tmp_path / "index")]
    )
    assert make_check(needs, TOKEN)("node1") == [
        "lacks the packages no_such_module",
        f"has no {tmp_path}/corpus",
        f"does not see what this machine writes to {tmp_path}/index",
    ]


WITHOUT_REFRAG = """
import importlib.metadata, json, sys
def version(name): raise importlib.metadata.PackageNotFoundError(name)
importlib.metadata.version = version
sys.modules["refrag"] = None
import marshal, types
code, cells = marshal.loads(bytes.fromhex(sys.argv[1])), tuple(map(types.CellType, json.loads(sys.argv[2])))
check = types.FunctionType(code, {"__builtins__": __builtins__}, "check", None, cells)
print(json.dumps(check("node1")))
"""


def test_the_check_runs_where_there_is_no_refrag() -> None:
    """Only code and plain values travel: sent by reference, it could not even say what is missing."""
    import marshal

    check = make_check(Needs(modules=("json",)), TOKEN)
    code, closure = check.__code__, getattr(check, "__closure__")  # noqa: B009
    values = json.dumps([cell.cell_contents for cell in closure])
    run = [sys.executable, "-c", WITHOUT_REFRAG, marshal.dumps(code).hex(), values]
    done = subprocess.run(run, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["has no refrag"]


def test_one_error_names_the_nodes_and_what_to_do() -> None:
    refuse({"a": [], "b": []})
    with pytest.raises(ClusterError) as raised:
        refuse({"a/12": [], "b/34": ["has no refrag", "lacks the packages torch"]})
    assert str(raised.value) == (
        "1 of 2 nodes are not ready: b/34 has no refrag, lacks the packages torch. Expected on every node the same "
        "refrag with its packages (`pip install 'refrag[cpu,ray]'`, or one image for all), and the corpus and output "
        "under the same paths (a shared file system, or s3://…): nothing was started"
    )


def test_object_stores_need_their_library() -> None:
    assert "obstore" not in modules_for(["corpus", "index"])
    assert "obstore" in modules_for(["corpus", "s3://bucket/index"])
