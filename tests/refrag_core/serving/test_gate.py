"""With a key set: 401 and nothing else. At loopback: no names but this machine's. And the description fuzzed."""

import base64
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import openai
import pytest
import schemathesis
from hypothesis import HealthCheck, Phase, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

from refrag_core.errors import UsageError
from refrag_core.runtime import Runtime
from refrag_core.serving.command import ServeCommand, allowed_hosts, is_loopback, read_key
from refrag_core.serving.server import listen
from tests.served import MODEL, Running, served

KEY = "open sesame"
CHECKS = [not_a_server_error, status_code_conformance, content_type_conformance, response_schema_conformance]
HYPOTHESIS: dict[str, Any] = {
    "deadline": None,
    "database": None,
    "derandomize": True,
    "phases": [Phase.explicit, Phase.generate],
    "suppress_health_check": list(HealthCheck),
}
REFUSED = {
    "error": {
        "message": "the API key is missing or wrong; expected it as `Authorization: Bearer KEY`",
        "type": "authentication_error",
        "param": None,
        "code": "invalid_api_key",
    }
}


@pytest.fixture(scope="module")
def locked(runtime: Runtime) -> Iterator[Running]:
    """A server with a key, at loopback; what is reloaded here stays so for itself."""
    hosts = allowed_hosts("127.0.0.1", ("proxy.example",))
    with served(
        runtime.pinned(), api_key=f"{KEY}\n", allowed_hosts=hosts, max_positions=512, max_new_tokens=8
    ) as running:
        yield running


def basic(password: str) -> str:
    return "Basic " + base64.b64encode(f"anyone:{password}".encode()).decode()


WRONG = [
    None,
    "",
    "Bearer",
    "Bearer open",
    f"Bearer {KEY}x",
    f"bearer{KEY}",
    f"Token {KEY}",
    KEY,
    basic("no"),
    "Basic ?",
]


@pytest.mark.parametrize("path", ["/", "/v1/models", "/v1/chat/completions", "/metrics", "/openapi.json", "/nowhere"])
def test_without_the_key_nothing_is_told(locked: Running, path: str) -> None:
    with httpx.Client(base_url=locked.url) as client:
        for shown in WRONG:
            for method in ("GET", "POST"):
                found = client.request(method, path, headers={} if shown is None else {"authorization": shown})
                assert (shown, found.status_code, found.json()) == (shown, 401, REFUSED)
                assert found.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize("shown", [f"Bearer {KEY}", f"bearer  {KEY}", basic(KEY)])
def test_with_it_everything_is(locked: Running, shown: str) -> None:
    assert httpx.get(f"{locked.url}/v1/models", headers={"authorization": shown}).status_code == 200


def test_the_official_client_shows_it(locked: Running, caplog: pytest.LogCaptureFixture) -> None:
    message: Any = [{"role": "user", "content": "Which river?"}]
    with openai.OpenAI(base_url=f"{locked.url}/v1", api_key=KEY, max_retries=0) as client:
        assert client.chat.completions.create(model=MODEL, messages=message).choices[0].message.content
    with (
        openai.OpenAI(base_url=f"{locked.url}/v1", api_key="x", max_retries=0) as client,
        pytest.raises(openai.AuthenticationError),
    ):
        client.chat.completions.create(model=MODEL, messages=message)
    assert KEY not in caplog.text


def test_probes_need_no_key(locked: Running) -> None:
    assert httpx.get(f"{locked.url}/healthz").json() == {"status": "ok"}
    assert httpx.get(f"{locked.url}/readyz").status_code == 200


@pytest.mark.parametrize(
    ("host", "status"),
    [("localhost", 200), ("LOCALHOST:99", 200), ("[::1]:80", 200), ("proxy.example", 200), ("evil.example", 403)],
)
def test_other_names_of_this_machine_are_refused(locked: Running, host: str, status: int) -> None:
    assert httpx.get(f"{locked.url}/healthz", headers={"host": host}).status_code == status


def test_beyond_loopback_any_name_goes_unless_some_are_given() -> None:
    assert allowed_hosts("0.0.0.0", ()) == ()
    assert allowed_hosts("0.0.0.0", ("A.example",)) == ("a.example",)
    assert [is_loopback(host) for host in ("127.0.0.2", "::1", "localhost", "10.0.0.1", "example.org")] == [
        *(True, True, True),
        *(False, False),
    ]


def test_where_a_key_comes_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("REFRAG_API_KEY", raising=False)
    assert read_key(None) is None
    monkeypatch.setenv("REFRAG_API_KEY", "from the environment")
    assert read_key(None) == "from the environment"
    (tmp_path / "key").write_text("from a file\n")
    assert ServeCommand(api_key_file=tmp_path / "key").settings("some/index").api_key == "from a file\n"
    assert ServeCommand().settings("some/index/").model_name == "index"
    with pytest.raises(UsageError, match="the API key cannot be read from"):
        read_key(tmp_path / "none")
    (tmp_path / "key").write_text(" \n")
    with pytest.raises(UsageError, match="the API key is empty"):
        ServeCommand(api_key_file=tmp_path / "key").settings("index")


def test_a_port_that_is_taken(locked: Running) -> None:
    with pytest.raises(UsageError, match=f"cannot listen at 127.0.0.1 port {locked.port}: .*--port"):
        listen("127.0.0.1", locked.port)


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize("examples", [3, pytest.param(200, marks=[pytest.mark.slow, pytest.mark.timeout(3600)])])
def test_nothing_that_the_description_allows_or_forbids_breaks_it(
    locked: Running, examples: int, mode: GenerationMode
) -> None:
    """Generated requests, good and bad, for every route: no 5xx, and no status or form that the description lacks."""
    headers = {"Authorization": f"Bearer {KEY}"}
    schema = schemathesis.openapi.from_url(f"{locked.url}/openapi.json", headers=headers)
    tried = []
    for found in schema.get_all_operations():
        operation = found.ok()

        def fuzz(case: schemathesis.Case) -> None:
            case.call_and_validate(headers=headers, checks=CHECKS)

        if mode is GenerationMode.POSITIVE or operation.body:  # no path is wrong in itself
            tried.append(operation.label)
            settings(**HYPOTHESIS, max_examples=examples)(given(case=operation.as_strategy(mode))(fuzz))()
    assert {"POST /v1/chat/completions", "POST /v1/completions", "POST /v1/retrieve", "POST /v1/reload"} <= set(tried)
