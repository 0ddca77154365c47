"""The server as its clients meet it: over real sockets, with OpenAI's own client."""

import gc
import json
import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, replace
from typing import Any

import httpx2 as httpx
import openai
import pytest

from refrag_core.answer_text import AnswerText
from refrag_core.conversation import prepare_turn
from refrag_core.decoder_engine import TokenStream
from refrag_core.errors import UsageError
from refrag_core.history import HistoryOptions
from refrag_core.retrieval import RetrievalOptions
from refrag_core.runtime import AskOptions, Prepared, Runtime
from refrag_core.serving.openai_schema import ChatRequest, Message
from refrag_core.serving.question import chat_question, earlier_turns
from refrag_core.serving.scheduler import SMALLEST_REUSE, EmbeddedEngine
from refrag_core.serving.settings import ServeSettings
from refrag_core.session import Turn
from refrag_core.slot_decoder import SlotDecoder
from tests.served import MODEL, Brake, Running, served, served_with_brakes

QUESTION = "Which river is the capital of the northern island?"
POSITIONS = 512
NEW_TOKENS = 16


@pytest.fixture(scope="module")
def brakes() -> list[Brake]:
    return []


@pytest.fixture(scope="module")
def server(runtime: Runtime, brakes: list[Brake]) -> Iterator[Running]:
    limits: dict[str, Any] = {"queue_limit": 64, "body_bytes": 100_000, "body_seconds": 1.0, "allow_untrained": True}
    with served_with_brakes(runtime, brakes, slots=4, max_positions=POSITIONS, **limits) as running:
        yield running


@pytest.fixture
def brake(server: Running, brakes: list[Brake]) -> Iterator[Brake]:
    """Of the server's decoder; off again afterwards."""
    yield brakes[-1]
    brakes[-1].off()
    server.until(lambda: server.answering.in_flight == 0)


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
        yield client


def ask(client: openai.OpenAI, question: str = QUESTION, **changes: Any) -> Any:
    """A chat request; what OpenAI does not have goes into the extra body."""
    own = {name: changes.pop(name) for name in tuple(changes) if name in OWN}
    fields = {"max_tokens": NEW_TOKENS, "messages": [{"role": "user", "content": question}], **changes}
    return client.chat.completions.create(model=MODEL, extra_body={"top_k": 3} | own, **fields)


OWN = {
    "policy",
    "expansion_fraction",
    "top_k",
    "filter",
    "hybrid",
    "include_passages",
    "strict",
    "history_positions",
}


def expected(runtime: Runtime, question: str = QUESTION, **changes: Any) -> Any:
    return runtime.ask(question, AskOptions(**{"top_k": 3, "max_new_tokens": NEW_TOKENS, "policy": "all", **changes}))


# --- what the official client gets --------------------------------------------------------------------


def test_an_answer(client: openai.OpenAI, runtime: Runtime) -> None:
    answer, whole = expected(runtime), ask(client)
    (choice,) = whole.choices
    assert (choice.message.role, choice.message.content.strip()) == ("assistant", answer.answer)
    assert choice.finish_reason == answer.finish_reason
    assert len(answer.answer) > 10
    usage = whole.usage.model_dump()
    assert usage["prompt_tokens"] == usage["decoder_positions"] == answer.stats.decoder_positions
    assert usage["context_tokens"] == answer.stats.context_tokens
    assert usage["completion_tokens"] == answer.stats.new_tokens
    assert usage["total_tokens"] == answer.stats.decoder_positions + answer.stats.new_tokens
    assert "refrag" not in whole.model_extra
    assert whole.model == MODEL
    assert whole.system_fingerprint.startswith(f"generation-2-{runtime.reader.manifest.build_id[:12]}")


def test_a_stream_gives_the_same_in_pieces(client: openai.OpenAI) -> None:
    whole = ask(client)
    chunks = list(ask(client, stream=True, stream_options={"include_usage": True}))
    assert chunks[0].choices[0].delta.role == "assistant"
    pieces = [chunk.choices[0].delta.content for chunk in chunks[1:-2]]
    assert "".join(pieces) == whole.choices[0].message.content
    assert len(pieces) > 2
    assert chunks[-2].choices[0].finish_reason == whole.choices[0].finish_reason
    assert chunks[-1].choices == []
    counts = [used.model_dump(exclude={"prompt_tokens_details"}) for used in (chunks[-1].usage, whole.usage)]
    assert counts[0] == counts[1]
    assert len({chunk.id for chunk in chunks}) == 1


def test_completions_answer_the_prompt(client: openai.OpenAI, runtime: Runtime) -> None:
    fields: dict[str, Any] = {"model": MODEL, "max_tokens": NEW_TOKENS, "extra_body": {"top_k": 3}}
    whole = client.completions.create(prompt=QUESTION, **fields)
    assert whole.choices[0].text.strip() == expected(runtime).answer
    pieces = [chunk.choices[0].text for chunk in client.completions.create(prompt=[QUESTION], stream=True, **fields)]
    assert "".join(pieces) == whole.choices[0].text


def test_a_stop_text_ends_an_answer_before_it(client: openai.OpenAI, runtime: Runtime) -> None:
    plain = ask(client).choices[0].message.content
    stop = plain[len(plain) // 2 :][:3]
    left = plain[: plain.index(stop)]
    for stops in (stop, [stop, "never"]):
        stopped = ask(client, stop=stops)
        assert (stopped.choices[0].message.content, stopped.choices[0].finish_reason) == (left, "stop")
    streamed = [chunk.choices[0].delta.content or "" for chunk in ask(client, stream=True, stop=stop)]
    assert "".join(streamed) == left
    assert runtime.ask(QUESTION, AskOptions(top_k=3, policy="all", stop=(stop,))).answer == left.strip()


def test_a_seed_decides_what_is_drawn(client: openai.OpenAI, runtime: Runtime) -> None:
    drawn = [ask(client, temperature=1.0, top_p=0.9, seed=7).choices[0].message.content for _ in range(2)]
    assert drawn[0] == drawn[1] != ask(client).choices[0].message.content
    assert drawn[0].strip() == expected(runtime, temperature=1.0, top_p=0.9, seed=7).answer
    assert len({ask(client, temperature=2.0).choices[0].message.content for _ in range(3)}) > 1


def test_own_settings_decide_what_the_decoder_reads(client: openai.OpenAI, runtime: Runtime) -> None:
    own: dict[str, Any] = {"policy": "perplexity", "expansion_fraction": 0.5, "top_k": 2}
    answer = expected(runtime, policy="perplexity", expansion_fraction=0.5, top_k=2)
    whole = ask(client, include_passages=True, **own)
    shown = whole.model_extra["refrag"]
    assert whole.choices[0].message.content.strip() == answer.answer
    assert (
        whole.usage.prompt_tokens == answer.stats.decoder_positions < expected(runtime, top_k=2).stats.decoder_positions
    )
    assert [passage["passage"] for passage in shown["passages"]] == [passage.passage for passage in answer.passages]
    assert (shown["version"], shown["policy"], shown["stats"]["num_expanded"]) == (
        2,
        "perplexity",
        answer.stats.num_expanded,
    )
    first = next(iter(ask(client, include_passages=True, stream=True, **own)))
    assert first.model_extra["refrag"]["passages"] == shown["passages"]


def test_the_chunks_of_a_passage_are_its_text_and_its_scores(runtime: Runtime) -> None:
    for policy in ("perplexity", "learned", "random"):
        answer = expected(runtime, policy=policy, expansion_fraction=0.3, explain=True)
        ranked = []
        for passage in answer.passages:
            assert "".join(chunk.text for chunk in passage.chunks).strip() == passage.text.strip()
            assert [i for i, chunk in enumerate(passage.chunks) if chunk.expanded] == list(passage.expanded)
            assert all(chunk.num_tokens == passage.chunk_size for chunk in passage.chunks[:-1])
            ranked += [(chunk.score, chunk.expanded) for chunk in passage.chunks]
        assert sum(chunk.num_tokens for p in answer.passages for chunk in p.chunks) == answer.stats.context_tokens
        if policy == "random":
            assert {score for score, _ in ranked} == {None}
        else:
            assert min(s for s, expanded in ranked if expanded) >= max(s for s, expanded in ranked if not expanded)


def test_where_no_passage_passes_the_filter_there_is_no_answer(client: openai.OpenAI) -> None:
    whole = ask(client, filter="year > 3000", include_passages=True)
    assert (whole.choices[0].message.content, whole.choices[0].finish_reason) == ("", "stop")
    assert (whole.usage.total_tokens, whole.model_extra["refrag"]["passing"]) == (0, 0)


def test_retrieval_alone(server: Running, runtime: Runtime) -> None:
    body = {"query": QUESTION, "top_k": 4, "filter": "year < 1920", "hybrid": True}
    found = httpx.post(f"{server.url}/v1/retrieve", json=body).json()
    hits = runtime.searcher.search(QUESTION, 4, RetrievalOptions(where="year < 1920", hybrid=True))
    assert [(hit["passage"], hit["score"], hit["text"]) for hit in found["data"]] == [
        (hit.passage, hit.score, hit.text) for hit in hits
    ]
    assert len(hits) == 4
    assert found["version"] == 2


def test_models(client: openai.OpenAI) -> None:
    (model,) = client.models.list()
    assert (model.id, model.owned_by, model.model_extra["refrag"]["version"]) == (MODEL, "refrag", 2)
    assert client.models.retrieve(MODEL) == model
    with pytest.raises(openai.NotFoundError, match="there is no such model; expected 'tiny'"):
        client.models.retrieve("gpt")


# --- conversations ------------------------------------------------------------------------------------

FOLLOWING = [
    QUESTION,
    "And the copper king?",
    "Who wrote the letter about the silent bridge?",
    "Is the garden of carbon light?",
    "What did you say about the river?",
]


def converse(client: openai.OpenAI, **own: Any) -> list[Any]:
    """All questions of FOLLOWING, each with the messages before it, as OpenAI's clients do."""
    messages: list[dict[str, Any]] = []
    answers = []
    for question in FOLLOWING:
        messages.append({"role": "user", "content": question})
        answers.append(ask(client, messages=messages, **own))
        messages.append({"role": "assistant", "content": answers[-1].choices[0].message.content})
    return answers


@pytest.mark.parametrize(
    ("policy", "positions"), [("all", None), ("all", 60), ("learned", 100), ("none", 100), ("perplexity", 80)]
)
def test_a_conversation_is_that_of_refrag_chat(
    client: openai.OpenAI, runtime: Runtime, policy: Any, positions: int | None
) -> None:
    """The same history, the same answers, although no state but the decoder's cache is kept between requests."""
    own: dict[str, Any] = {"policy": policy, "expansion_fraction": 0.3}
    answers = converse(client, **own, **({} if positions is None else {"history_positions": positions}))
    options = AskOptions(top_k=3, max_new_tokens=NEW_TOKENS, max_positions=POSITIONS, **own)
    chat = runtime.chat(options, history=HistoryOptions(positions=1024 if positions is None else positions))
    expected = [chat.ask(question) for question in FOLLOWING]
    assert [whole.choices[0].message.content.strip() for whole in answers] == [answer.answer for answer in expected]
    assert [whole.usage.prompt_tokens for whole in answers] == [a.stats.decoder_positions for a in expected]
    told = [whole.model_extra.get("refrag", {}).get("history") for whole in answers]
    assert told == [None, *(asdict(answer.history) for answer in expected[1:] if answer.history is not None)]
    assert told[-1]["dropped"] + told[-1]["passages"] + told[-1]["raw"] == len(FOLLOWING) - 1
    assert told[-1]["positions"] <= told[-1]["budget"]
    if positions is None:
        assert (told[2]["raw"], told[3]["dropped"]) == (2, 1)
        cached = answers[2].usage.prompt_tokens_details.cached_tokens
        assert cached >= expected[2].stats.reused_positions > SMALLEST_REUSE
    else:
        assert told[-1]["dropped" if policy == "all" else "passages"] > 0


def test_instructions_stand_before_the_question(client: openai.OpenAI, runtime: Runtime) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "What is the river made of?"},
        {"role": "assistant", "content": [{"type": "text", "text": "Of water and copper."}]},
        {"role": "user", "content": QUESTION},
    ]
    whole = ask(client, messages=messages, include_passages=True)
    options = AskOptions(top_k=3, max_new_tokens=NEW_TOKENS, policy="all", max_positions=POSITIONS)
    turns = (Turn("What is the river made of?", "Of water and copper."),)
    pinned = runtime.pinned()
    turn = prepare_turn(pinned, QUESTION, turns, options, HistoryOptions(), instructions="Be brief.")
    answer = pinned.answer_prepared(turn.prepared)
    assert whole.choices[0].message.content.strip() == answer.answer
    assert whole.usage.prompt_tokens == answer.stats.decoder_positions
    without = prepare_turn(pinned, QUESTION, turns, options, HistoryOptions()).prepared.composed
    assert without is not None
    assert answer.stats.decoder_positions > len(without.arrangement.ids)
    assert whole.model_extra["refrag"]["history"]["raw"] == 1


def test_turns_that_do_not_fit_are_told_or_refused(client: openai.OpenAI) -> None:
    messages: list[dict[str, Any]] = [
        {"role": "user", "content": "river " * 200},
        {"role": "assistant", "content": "Yes."},
        {"role": "user", "content": QUESTION},
    ]
    for policy in ("all", "none"):
        own: dict[str, Any] = {"messages": messages, "policy": policy, "history_positions": 5}
        assert ask(client, **own).model_extra["refrag"]["history"]["dropped"] == 1
        streamed = [c.model_extra["refrag"] for c in ask(client, **own, stream=True) if "refrag" in c.model_extra]
        assert [told["history"]["dropped"] for told in streamed] == [1]
        with pytest.raises(openai.BadRequestError, match="the oldest 1 of 1 turns do not fit the 5 positions"):
            ask(client, **own, strict=True)


def test_messages_become_turns() -> None:
    def turns(*messages: tuple[Any, str]) -> list[tuple[str, str]]:
        made = earlier_turns([Message(role=role, content=text) for role, text in messages])
        return [(turn.question, turn.answer) for turn in made]

    u, a = "user", "assistant"
    assert turns() == []
    assert turns((u, "Who?"), (a, " Ann.\n"), (u, "Why?"), (a, "So.")) == [("Who?", "Ann."), ("Why?", "So.")]
    assert turns((a, "Hello."), (u, "Who?"), (a, "Ann.")) == [("", "Hello."), ("Who?", "Ann.")]
    assert turns((u, "A text."), (u, " "), (u, "Who?"), (a, "Ann."), (a, "Or Bo.")) == [
        ("A text.\n\nWho?", "Ann.\n\nOr Bo.")
    ]
    assert turns((u, "Who?"), (a, "  "), (u, "Why?")) == [("Who?\n\nWhy?", "")]


def test_a_request_s_positions_come_before_the_server_s() -> None:
    settings = ServeSettings(model_name=MODEL, history=HistoryOptions(positions=50, turn_weight=0.2))
    body: dict[str, Any] = {"messages": [Message(role="user", content="Who?")]}
    assert chat_question(ChatRequest(**body), settings, trained=False).history == settings.history
    asked = chat_question(ChatRequest(**body, history_positions=7), settings, trained=False)
    assert asked.history == HistoryOptions(positions=7, turn_weight=0.2)
    with pytest.raises(UsageError, match="the last message is the system's"):
        chat_question(ChatRequest(messages=[Message(role="system", content="x")]), settings, trained=False)


def test_without_reuse_answers_are_the_same(runtime: Runtime, client: openai.OpenAI) -> None:
    def engine(of: Runtime) -> EmbeddedEngine:
        rows = SlotDecoder(of.decoder, slots=2, max_positions=POSITIONS)
        return EmbeddedEngine(rows, slots=2, max_positions=POSITIONS, eos_ids=of.decoder.eos_ids, reuse=False)

    with (
        served(runtime, make_engine=engine, max_positions=POSITIONS) as plain,
        openai.OpenAI(base_url=f"{plain.url}/v1", api_key="none", max_retries=0, timeout=60) as other,
    ):
        without = converse(other)
        assert all(whole.usage.prompt_tokens_details.cached_tokens == 0 for whole in without)
    found = [whole.choices[0].message.content for whole in converse(client)]
    assert found == [whole.choices[0].message.content for whole in without]


# --- many at a time -----------------------------------------------------------------------------------


def questions(count: int) -> list[tuple[str, dict[str, Any]]]:
    policies = ["all", "none", "perplexity", "learned"]
    return [
        (f"Which {word} is number {number}?", {"policy": policies[number % 4], "expansion_fraction": 0.3})
        for number, word in zip(range(count), ["river", "engine", "king", "theory", "ship"] * count, strict=False)
    ]


@pytest.mark.parametrize("count", [16, pytest.param(64, marks=pytest.mark.slow)])
def test_no_answer_differs_from_the_one_given_alone(
    client: openai.OpenAI, runtime: Runtime, brake: Brake, count: int
) -> None:
    asked = questions(count)
    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(ask, client, question, **own) for question, own in asked]
        found = [future.result().choices[0].message.content.strip() for future in futures]
    assert found == [expected(runtime, question, **own).answer for question, own in asked]
    assert len(set(found)) > count // 2
    assert brake.largest_batch == 4


def test_a_client_that_leaves_frees_its_slot(
    server: Running, client: openai.OpenAI, brake: Brake, runtime: Runtime, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Three of four that are being answered, one that waits, and at last the fourth, which the brake holds."""
    queued = calls(server.engine, "submit", monkeypatch)
    counted = server.answering.metrics.cancelled._value
    before = counted.get()
    brake.on()
    streams = [ask(client, stream=True, max_tokens=100) for _ in range(4)]
    server.until(lambda: len(queued) == 4)
    brake.let_one_pass()  # it may have begun before all four were there
    server.until(lambda: server.engine.active == 4)
    waiting = ask(client, stream=True)
    server.until(lambda: len(queued) == 5)
    for stream in (waiting, *streams[:3]):
        stream.response.close()
    server.until(lambda: server.answering.in_flight == 1 and counted.get() == before + 4)
    with ThreadPoolExecutor(1) as pool:
        asked = pool.submit(ask, client)
        server.until(lambda: len(queued) == 6)
        brake.on(below=2)  # steps go on until the fourth stream is alone
        assert asked.result().choices[0].message.content.strip() == expected(runtime).answer
    assert server.answering.in_flight == 1
    steps = brake.steps
    streams[3].response.close()
    server.until(lambda: server.answering.in_flight == 0 and counted.get() == before + 5)
    brake.off()
    server.until(lambda: server.engine.active == 0)
    assert brake.steps <= steps + 1


def calls(thing: Any, method: str, monkeypatch: pytest.MonkeyPatch) -> list[None]:
    """One more item whenever a call of the method has returned."""
    returned: list[None] = []
    call = getattr(thing, method)

    def told(*arguments: Any) -> Any:
        made = call(*arguments)
        returned.append(None)
        return made

    monkeypatch.setattr(thing, method, told)
    return returned


def test_clients_that_leave_leave_nothing_behind(server: Running, client: openai.OpenAI) -> None:
    """No stream, prompt or text of theirs is alive; a slot has its last prompt's embeddings and no more."""

    def alive() -> dict[str, int]:
        gc.collect()
        kinds = [type(thing) for thing in gc.get_objects()]
        return {kind.__name__: kinds.count(kind) for kind in (TokenStream, Prepared, AnswerText)}

    for number in range(12):
        stream = ask(client, f"Which ship is number {number}?", stream=True, max_tokens=200)
        next(iter(stream))
        stream.response.close()
    server.until(lambda: server.answering.in_flight == 0 and server.engine.active == 0)
    server.until(lambda: not any(alive().values()))
    kept = server.engine._kept
    assert 0 < len(kept) <= 4
    assert max(map(len, kept.values())) < POSITIONS


def test_one_that_leaves_without_streaming_as_well(server: Running, brake: Brake) -> None:
    brake.on()
    with server.connect() as connection:
        connection.sendall(raw(server, {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 100}))
        server.until(lambda: server.engine.active == 1)
    server.until(lambda: server.answering.in_flight == 0)
    brake.off()
    server.until(lambda: server.engine.active == 0)


def test_when_the_queue_is_full_others_are_told_to_come_back(
    server: Running, client: openai.OpenAI, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.answering, "settings", replace(server.answering.settings, queue_limit=1))
    brake.on()
    with ThreadPoolExecutor(5) as pool:
        futures = [pool.submit(ask, client) for _ in range(5)]
        server.until(lambda: server.answering.in_flight == 5)
        with pytest.raises(openai.RateLimitError) as refused:
            ask(client)
        assert int(refused.value.response.headers["retry-after"]) >= 1
        assert refused.value.code == "queue_full"
        brake.off()
        assert len({future.result().choices[0].message.content for future in futures}) == 1


def test_a_request_has_its_time(
    server: Running, client: openai.OpenAI, brake: Brake, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server.answering, "settings", replace(server.answering.settings, request_seconds=0.5))
    brake.on()
    with pytest.raises(openai.InternalServerError) as late:
        ask(client)
    assert (late.value.status_code, late.value.code) == (504, "request_timeout")
    with pytest.raises(openai.APIError, match="took longer than this server gives"):
        list(ask(client, stream=True))
    server.until(lambda: server.answering.in_flight == 0)
    brake.off()
    server.until(lambda: server.engine.active == 0)


# --- what is refused ----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"messages": []}, "messages: List should have at least 1 item"),
        (
            {"messages": [{"role": "assistant", "content": "x"}]},
            "the last message is the assistant's; expected the user's",
        ),
        ({"messages": [{"role": "user", "content": " \n"}]}, "the question is blank"),
        ({"messages": [{"role": "tool", "content": "x"}]}, "messages.0.role: Input should be 'system'"),
        ({"max_tokens": 5000}, "max_tokens is 5000; expected less than this server's 512"),
        ({"max_tokens": 510}, "template, question and max_new_tokens take"),
        ({"temperature": 3}, "temperature: Input should be less than or equal to 2"),
        ({"n": 2}, "n: Input should be 1"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools: Extra inputs are not permitted"),
        ({"policy": "best"}, "policy: Input should be 'learned'"),
        ({"top_k": 51}, "top_k is 51; expected at most 50"),
        ({"filter": "nothing = 1"}, "nothing"),
        ({"filter": "1; drop table x"}, ""),
        ({"expansion_fraction": 1.5}, "expansion_fraction: Input should be less than or equal to 1"),
        ({"stop": ""}, "stop"),
        ({"extra_body": {"expansion_fracton": 0.1}}, "expansion_fracton: Extra inputs are not permitted"),
        ({"messages": [{"role": "user", "content": "long " * 2000}]}, "positions and the decoder has 512"),
    ],
)
def test_what_cannot_be_done_is_said(client: openai.OpenAI, changes: dict[str, Any], message: str) -> None:
    extra = changes.pop("extra_body", {})
    with pytest.raises(openai.BadRequestError) as refused:
        ask(client, **changes) if not extra else client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": "x"}], extra_body=extra
        )
    error = refused.value
    assert error.type == "invalid_request_error"
    assert message in error.message
    assert "Traceback" not in error.message
    assert "/" not in error.message.replace("/v1", "")


def test_an_unknown_model_and_an_unknown_path(server: Running, client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as unknown:
        client.chat.completions.create(model="gpt-4o", messages=[{"role": "user", "content": "x"}])
    assert unknown.value.code == "model_not_found"
    for method, path, status in (("GET", "/v2", 404), ("GET", "/v1/completions", 405), ("GET", "/../etc/passwd", 404)):
        found = httpx.request(method, server.url + path)
        assert (found.status_code, set(found.json()["error"])) == (status, {"message", "type", "param", "code"})


def test_compression_needs_training_unless_allowed(server: Running, client: openai.OpenAI, monkeypatch: Any) -> None:
    monkeypatch.setattr(server.answering, "settings", replace(server.answering.settings, allow_untrained=False))
    with pytest.raises(openai.BadRequestError, match="projection of this server's index was never trained"):
        ask(client, policy="none")
    assert ask(client, expansion_fraction=1.0).usage.prompt_tokens == ask(client).usage.prompt_tokens


def test_an_error_of_our_own_says_nothing(
    server: Running, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("at /secret/place")

    monkeypatch.setattr("refrag_core.serving.answering.prepare_turn", broken)
    body = {"messages": [{"role": "user", "content": QUESTION}]}
    for more in ({}, {"stream": True}):
        found = httpx.post(f"{server.url}/v1/chat/completions", json=body | more)
        assert (found.status_code, found.json()["error"]["code"]) == (500, "internal_error")
        assert "secret" not in found.text
    assert "/secret/place" in caplog.text


def raw(server: Running, body: Any, *, length: int | None = None, path: str = "/v1/chat/completions") -> bytes:
    """A request as bytes."""
    data = json.dumps(body).encode()
    head = f"POST {path} HTTP/1.1\r\nHost: 127.0.0.1:{server.port}\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data) if length is None else length}\r\n\r\n".encode() + data


def reply(connection: socket.socket) -> bytes:
    """What comes until the server closes, or a whole small answer."""
    found = b""
    while not (b"\r\n\r\n" in found and found.endswith(b"}")) and (part := connection.recv(65536)):
        found += part
    return found


GOOD = {"messages": [{"role": "user", "content": QUESTION}], "max_tokens": 4}


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        ("oversized", b"413"),
        ("oversized-chunked", b"413"),
        ("not-json", b"400"),
        ("not-utf8", b"400"),
        ("nested", b"400"),
        ("surrogate", b"400"),
        ("huge-number", b"400"),
        ("nan", b"400"),
        ("garbage", b"400"),
        ("slow", b"408"),
        ("huge-header", b"4"),
    ],
)
def test_malformed_requests_leave_the_others_unharmed(
    server: Running, client: openai.OpenAI, brake: Brake, sent: str, status: bytes
) -> None:
    brake.on()
    other = ask(client, stream=True)
    next(iter(other))
    head = raw(server, GOOD).split(b"Content-Length")[0]
    with server.connect() as connection:
        connection.sendall(_bad_request(sent, head, server))
        found = reply(connection)
        assert found.split(b" ", 2)[1].startswith(status), found
        assert b"Traceback" not in found
    brake.off()
    assert [chunk.choices[0].finish_reason for chunk in other][-1] in ("stop", "length")
    assert httpx.get(f"{server.url}/healthz").status_code == 200


def _bad_request(name: str, head: bytes, server: Running) -> bytes:
    def body(data: bytes) -> bytes:
        return head + f"Content-Length: {len(data)}\r\n\r\n".encode() + data

    nested = b'{"messages": [{"role": "user", "content": "x"}], "metadata": ' + b"[" * 40_000 + b"]" * 40_000 + b"}"
    return {
        "oversized": raw(server, GOOD, length=10_000_000),
        "oversized-chunked": head + b"Transfer-Encoding: chunked\r\n\r\n" + 4 * (b"8000\r\n" + b"x" * 0x8000 + b"\r\n"),
        "not-json": body(b"{"),
        "not-utf8": body(b'{"messages": [{"role": "user", "content": "\xff"}]}'),
        "nested": body(nested),
        "surrogate": body(b'{"messages": [{"role": "user", "content": "\\ud800"}]}'),
        "huge-number": body(b'{"messages": [{"role": "user", "content": "x"}], "seed": 1' + b"0" * 5000 + b"}"),
        "nan": body(b'{"messages": [{"role": "user", "content": "x"}], "temperature": NaN}'),
        "garbage": b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\r\n\r\n",
        "slow": raw(server, GOOD, length=5000),
        "huge-header": head + b"X: " + b"x" * 100_000 + b"\r\n\r\n",
    }[name]


def test_half_closed_connections_are_let_go(server: Running, client: openai.OpenAI, brake: Brake) -> None:
    brake.on()
    connections = [server.connect() for _ in range(6)]
    for connection in connections[:3]:
        connection.sendall(raw(server, GOOD | {"max_tokens": 100}))
    for connection in connections[3:]:
        connection.sendall(raw(server, GOOD)[:60])
    server.until(lambda: server.answering.in_flight == 3)
    for connection in connections:
        connection.shutdown(socket.SHUT_WR)
    server.until(lambda: server.answering.in_flight == 0)
    for connection in connections:
        connection.close()
    brake.off()
    assert ask(client).choices


# --- state --------------------------------------------------------------------------------------------


def sample(page: str, name: str) -> float:
    return next(float(line.rpartition(" ")[2]) for line in page.splitlines() if line.rpartition(" ")[0] == name)


def test_metrics_count_what_happened(server: Running, client: openai.OpenAI, runtime: Runtime) -> None:
    def page() -> str:
        return httpx.get(f"{server.url}/metrics").text

    before = page()
    answer = expected(runtime, policy="perplexity", expansion_fraction=0.5).stats
    ask(client, policy="perplexity", expansion_fraction=0.5)
    with pytest.raises(openai.BadRequestError):
        ask(client, top_k=51)
    after = page()

    def grown(name: str) -> float:
        return sample(after, name) - sample(before, name)

    assert grown("refrag_ttft_seconds_count") == grown("refrag_ttit_seconds_count") == 1
    assert grown('refrag_step_seconds_count{step="prefill"}') == grown("refrag_expanded_share_count") == 1
    assert grown('refrag_chunks_total{form="expanded"}') == answer.num_expanded > 0
    assert grown('refrag_chunks_total{form="compressed"}') == answer.num_chunks - answer.num_expanded > 0
    assert grown("refrag_context_tokens_total") == answer.context_tokens
    assert grown("refrag_decoder_positions_total") == answer.decoder_positions
    assert grown("refrag_new_tokens_total") == answer.new_tokens
    assert grown('refrag_requests_total{route="/v1/chat/completions",status="200"}') == 1
    assert sample(after, "refrag_generation_version") == 2
    assert f'build_id="{runtime.reader.manifest.build_id}"' in after
    assert sample(after, "refrag_slots") == 4
    assert sample(after, "process_resident_memory_bytes") > 1e6
    assert QUESTION not in after


def test_turns_already_encoded_are_cache_hits(server: Running, client: openai.OpenAI) -> None:
    turns = [
        {"role": "user", "content": "A turn of its own, about northern copper. " * 4},
        {"role": "user", "content": "And?"},
    ]
    asked: dict[str, Any] = {"messages": [turns[0], {"role": "assistant", "content": "I see."}, turns[1]]}
    own = {"policy": "none", "history_positions": 40}
    ask(client, **asked, **own)
    before = httpx.get(f"{server.url}/metrics").text
    assert ask(client, **asked, **own).model_extra["refrag"]["history"]["passages"] == 1
    after = httpx.get(f"{server.url}/metrics").text
    hits, misses = "refrag_chunk_cache_hits_total", "refrag_chunk_cache_misses_total"
    assert sample(after, hits) > sample(before, hits)
    assert sample(after, misses) == sample(before, misses) > 0
    passages, reused = 'refrag_history_turns_total{form="passages"}', "refrag_reused_positions_total"
    assert sample(after, passages) == sample(before, passages) + 1
    assert sample(after, reused) > sample(before, reused)  # the same request again


def test_probes(server: Running) -> None:
    assert httpx.get(f"{server.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{server.url}/readyz").json() == {"status": "ready", "version": 2}


def test_a_key_never_shows() -> None:
    assert "sesame" not in repr(ServeSettings(model_name=MODEL, api_key="sesame"))


def test_a_drain_answers_what_was_let_in_and_nothing_else(runtime: Runtime) -> None:
    brake = Brake(SlotDecoder(runtime.decoder, slots=1, max_positions=POSITIONS))

    def engine(of: Runtime) -> EmbeddedEngine:
        return EmbeddedEngine(brake, slots=1, max_positions=POSITIONS, eos_ids=of.decoder.eos_ids)

    with served(runtime, make_engine=engine, max_positions=POSITIONS) as running, ThreadPoolExecutor(4) as pool:
        brake.on()
        kept = httpx.Client(base_url=running.url, timeout=60)
        with openai.OpenAI(base_url=f"{running.url}/v1", api_key="none", max_retries=0) as client:
            futures = [pool.submit(ask, client) for _ in range(3)]
            stream = ask(client, stream=True)
            running.until(lambda: running.answering.in_flight == 4)
            assert kept.get("/readyz").status_code == 200
            running.answering.draining = True
            assert kept.get("/readyz").status_code == 503
            refused = kept.post("/v1/chat/completions", json=GOOD)
            assert (refused.status_code, refused.json()["error"]["code"]) == (503, "draining")
            assert "retry-after" in refused.headers
            running.server.drain()
            threading.Timer(0.3, brake.off).start()
            answers = {future.result().choices[0].message.content for future in futures}
            answers.add("".join(chunk.choices[0].delta.content or "" for chunk in stream))
            assert {answer.strip() for answer in answers} == {expected(runtime).answer}
        deadline = time.monotonic() + 30
        while time.monotonic() < deadline:
            try:
                running.connect().close()
            except ConnectionRefusedError:
                break
        kept.close()
