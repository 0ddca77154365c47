"""`refrag bundle` and the HTML page as their users meet them."""

import shutil
from pathlib import Path

import pytest

from refrag_core.manifest import list_versions
from refrag_core.storage import FolderStore
from tests.command_line import call
from tests.small_index import SmallIndex

QUESTION = "Which river is the capital of the northern island?"


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Commands remember the models' fingerprints."""


def answered(root: Path, *more: object) -> str:
    asked = call("ask", root, QUESTION, "--max-new-tokens", 4, "--device", "cpu", "--json", *more)
    assert asked.code == 0, asked.err
    return str(asked.json["answer"])


def test_from_an_index_to_a_host(library: SmallIndex, tmp_path: Path) -> None:
    bundle, shelf, host = tmp_path / "bundle", tmp_path / "shelf", tmp_path / "host"
    first = call("bundle", "export", library.path, bundle, "--version", 1)
    assert first.code == 0, first.err
    assert "placed" in first.out
    assert "not signed" in first.out
    exported = call("bundle", "export", library.path, bundle, "--json").json
    assert exported["moved_bytes"] < exported["bytes"]
    assert call("bundle", "push", bundle, shelf, "--json").json["version"] == 2
    pulled = call("bundle", "pull", shelf, host, "--json")
    assert (pulled.json["moved_bytes"], pulled.json["spared_bytes"]) == (pulled.json["bytes"], 0)
    assert "pull: done" in pulled.err
    again = call("bundle", "pull", shelf, host).out
    assert "moved       0 files, 0 B" in again
    opened = call("bundle", "open", host, "--json").json
    assert opened["bytes"] == sum(opened["bytes_by_kind"].values())
    assert "all good" in call("bundle", "open", host).out
    assert answered(host) == answered(library.path)
    assert call("index", "verify", host).code == 0


def test_collecting(library: SmallIndex, tmp_path: Path) -> None:
    for version in (1, 2):
        assert call("bundle", "export", library.path, tmp_path / "host", "--version", version).code == 0
    done = call("bundle", "gc", tmp_path / "host", "--keep", 1, "--grace-seconds", 0)
    assert "removed   generations 1; " in done.out
    assert list_versions(FolderStore(tmp_path / "host")) == [2]
    assert call("bundle", "gc", tmp_path / "host", "--json").json["removed"] == []


def test_signing(library: SmallIndex, tmp_path: Path) -> None:
    pytest.importorskip("cryptography")
    key = tmp_path / "signing.key"
    made = call("bundle", "keygen", key)
    public = f"{key}.pub"
    assert public in made.out
    secret = "".join(key.read_text().splitlines()[1:-1])
    signed = call("bundle", "export", library.path, tmp_path / "bundle", "--sign", key)
    for seen in (made, signed):
        assert secret not in seen.out + seen.err
    assert call("bundle", "pull", tmp_path / "bundle", tmp_path / "host", "--verify-key", public).code == 0
    assert "checked with" in call("bundle", "open", tmp_path / "host", "--verify-key", public).out
    assert answered(tmp_path / "host", "--verify-key", public) == answered(library.path)
    (tmp_path / "host" / "versions" / "2.json.sig").unlink()
    refused = call("ask", tmp_path / "host", QUESTION, "--verify-key", public)
    assert refused.code == 1
    assert "is not signed, expected a signature with" in refused.err
    assert refused.err.count("\n") == 1


def test_failures_are_one_line(library: SmallIndex, tmp_path: Path) -> None:
    for arguments, code, said in (
        (("open", library.path), 2, "is an index, expected a bundle"),
        (("pull", tmp_path / "nothing", tmp_path / "host"), 1, "holds no bundle: expected a manifest"),
        (("push", tmp_path / "nothing", tmp_path / "host"), 1, "holds no"),
        (("gc", tmp_path / "nothing"), 1, "holds no"),
        (("pull", "ftp://somewhere/else", tmp_path / "host"), 2, "expected a folder, or a bucket"),
        (("export", library.path, "s3://bucket/bundle"), 2, "s3://bucket/bundle is a URI, expected a folder of this"),
        (("open", "s3://bucket/bundle"), 2, "is a URI, expected a folder of this machine"),
        (("gc", "s3://bucket/bundle"), 2, "is a URI, expected a folder of this machine"),
        (("pull", tmp_path / "nothing", "s3://bucket/bundle"), 2, "is a URI, expected a folder of this machine"),
    ):
        done = call("bundle", *arguments)
        assert done.code == code, (arguments, done.err)
        assert said in done.err
        assert done.err.startswith("error: ")
    assert not (tmp_path / "host").exists()


def test_places_that_are_no_folders(library: SmallIndex, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    call("bundle", "export", library.path, "bundle")
    refused = call("bundle", "push", "bundle", "ftp://somewhere/else")
    assert (refused.code, "expected a folder, or a bucket" in refused.err) == (2, True)
    secret = call("bundle", "push", "bundle", "s3://key:very-secret@bucket/else")
    assert (secret.code, "very-secret" in secret.err) == (2, False)
    assert "expected none: put credentials into the environment" in secret.err
    assert {path.name for path in tmp_path.iterdir()} <= {"bundle", "cache"}
    uri = (tmp_path / "there").as_uri()
    assert call("bundle", "push", "bundle", uri).code == 0
    assert call("bundle", "pull", uri, "host").code == 0
    assert call("bundle", "open", "host").code == 0


def test_a_bundle_is_no_index_to_build_into(library: SmallIndex, tmp_path: Path) -> None:
    call("bundle", "export", library.path, tmp_path / "bundle")
    for words in (["build", library.corpus, "-o"], ["repair"]):
        done = call("index", *words, tmp_path / "bundle")
        assert done.code == 2
        assert "is a bundle, expected an index" in done.err


def test_the_page(library: SmallIndex, tmp_path: Path) -> None:
    shutil.copytree(library.path, tmp_path / "index")
    page = tmp_path / "report.html"
    assert call("index", "inspect", tmp_path / "index", "--html", page).out == f"wrote {page}\n"
    assert page.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert not page.with_name("report.html.tmp").exists()
