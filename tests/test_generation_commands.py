"""`refrag index log, diff, rollback, gc, compact` as their users meet them: results, exit codes, one-line errors."""

from pathlib import Path

import pytest

from tests import command_line
from tests.small_index import SmallIndex, documents

RECORDS = documents(6, sentences=3)


@pytest.fixture
def index(tmp_path: Path, own_cache: Path) -> SmallIndex:
    """Two generations: one document edited, one new, one removed."""
    made = SmallIndex(tmp_path, RECORDS)
    made.build()
    made.write([*RECORDS[1:5], RECORDS[5] | {"text": "Edited."}, {"id": "doc-0009", "text": "New."}])
    made.build(delete_missing=True)
    return made


def test_every_command_in_words_and_in_json(index: SmallIndex) -> None:
    shown = command_line.call("index", "log", index.path)
    assert shown.code == 0
    assert "version 2 (newest, " in shown.out
    assert "build: 1 new, 1 changed, 1 deleted" in shown.out
    assert "2 documents tombstoned" in shown.out
    assert [entry["version"] for entry in command_line.call("index", "log", index.path, "--json").json] == [2, 1]
    assert len(command_line.call("index", "log", index.path, "--limit", "1", "--json").json) == 1

    listed = command_line.call("index", "diff", index.path, "1", "2", "--ids")
    assert listed.out.splitlines()[:3] == ["- doc-0000", "~ doc-0005", "+ doc-0009"]
    assert "1 added, 1 removed, 1 changed, 4 unchanged" in listed.out
    found = command_line.call("index", "diff", index.path, "1", "2", "--ids", "--json").json
    assert found["documents"][0] == {"change": "removed", "document_id": "doc-0000"}
    assert found["documents_changed"] == 1
    same = command_line.call("index", "diff", index.path, "2", "2", "--ids", "--json").json
    assert (same["documents"], same["documents_unchanged"]) == ([], 6)
    assert command_line.call("index", "diff", index.path, "1", "2", "--json").json["documents_added"] == 1

    assert (
        "version 3, with the content of version 1: committed" in command_line.call("index", "rollback", index.path).out
    )
    assert command_line.call("index", "rollback", index.path, "2", "--json").json["version"] == 4
    assert "rollback to version 2" in command_line.call("index", "log", index.path).out

    compacted = command_line.call("index", "compact", index.path, "--shard-bytes", "100000", "--workers", "0")
    assert "version 5, committed" in compacted.out
    assert "(none encoded)" in compacted.out
    again = command_line.call("index", "compact", index.path, "--shard-bytes", "100000", "--workers", "0", "--json")
    assert (again.json["committed"], again.json["shards_after"]) == (False, 1)

    young = command_line.call("index", "gc", index.path, "--keep", "1")
    assert "version 1 stays: it was the newest within the grace period" in young.out
    planned = command_line.call("index", "gc", index.path, "--keep", "1", "--grace-hours", "0", "--dry-run")
    assert "4 would be removed: 1, 2, 3, 4" in planned.out
    done = command_line.call("index", "gc", index.path, "--keep", "1", "--grace-hours", "0", "--json")
    assert (done.json["kept"], done.json["removed"]) == ([5], [1, 2, 3, 4])
    assert command_line.call("index", "verify", index.path).code == 0
    assert "version 1 (removed, " in command_line.call("index", "log", index.path).out


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("log", "{none}"), 1, "holds no committed generation"),
        (("diff", "{index}", "1", "7"), 1, "holds no generation 7"),
        (("rollback", "{index}", "7"), 1, "where the newest is 2; `refrag index log"),
        (("rollback", "{none}"), 1, "holds no committed generation"),
        (("gc", "{none}", "--keep", "1"), 1, "holds no committed generation"),
        (("compact", "{none}"), 1, "holds no committed generation"),
        (("gc", "{index}"), 2, "Missing option '--keep'"),
    ],
)
def test_errors_are_one_line(index: SmallIndex, arguments: tuple[str, ...], code: int, message: str) -> None:
    none = index.root / "none"
    given = [argument.format(index=index.path, none=none) for argument in arguments]
    failed = command_line.call("index", *given)
    assert (failed.code, failed.out) == (code, "")
    assert message in failed.err
    assert not none.exists()


def test_a_search_of_equal_passages(index: SmallIndex) -> None:
    same = [{"id": name, "text": "The very same words."} for name in ("x", "y")]
    index.write([*RECORDS, *same])
    models = index.options.models
    arguments = ["--checkpoint", models.checkpoint, "--retriever", models.retriever, "--max-passage-tokens", 64]
    arguments += ["--device", "cpu", "--workers", 0, "--min-recall", 0.5, "--dedup-passages"]
    built = command_line.call("index", "build", index.corpus, "-o", index.path, *arguments)
    assert built.code == 0
    assert "1 passages equal an earlier one and stay out of search" in built.out
    assert command_line.call("index", "inspect", index.path, "--json").json["counts"]["hidden_duplicates"] == 1
    index.write(same)
    kept = command_line.call("index", "plan", index.corpus, "-o", index.path, *arguments[:10])
    assert "0 new, 0 changed, 2 unchanged, 0 deleted" in kept.out
    assert "7 documents are no longer in the corpus and stay" in kept.out
    planned = command_line.call("index", "plan", index.corpus, "-o", index.path, *arguments[:10], "--delete-missing")
    assert "0 changed, 2 unchanged, 7 deleted" in planned.out
