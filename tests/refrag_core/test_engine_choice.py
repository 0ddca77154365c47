"""`refrag ask` and `refrag serve` with vLLM in the embedded engine's place, and the decoder written for it."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from openai import OpenAI

from refrag_core.decoder import Decoder
from refrag_core.engine_choice import EngineOptions, open_engine, parse_settings
from refrag_core.errors import ConfigError, UsageError
from refrag_core.merged_decoder import merged_name
from refrag_core.runtime import Runtime
from refrag_core.serving.answering import Answering
from refrag_core.vllm_server import VllmServerEngine
from tests import tiny_models
from tests.command_line import Finished, call
from tests.fake_vllm import Behaviour, fake_package, fake_server
from tests.served import MODEL, served
from tests.small_index import SmallIndex, documents
from tests.vllm_engines import QUESTIONS, adapted_index


@pytest.fixture(scope="module")
def index(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SmallIndex]:
    """With an adapter."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield adapted_index(tmp_path_factory.mktemp("adapted"))


@pytest.fixture(scope="module")
def whole(index: SmallIndex) -> Runtime:
    return Runtime.open(index.path, device="cpu")


@pytest.fixture
def server(whole: Runtime) -> Iterator[tuple[str, Behaviour]]:
    """It has the decoder under the name that the checkpoint needs."""
    with fake_server(whole.decoder) as (url, behaviour):
        name = merged_name(whole.checkpoint, whole.decoder_folder)
        behaviour.models = [{"id": "base", "max_model_len": 512}, {"id": name, "max_model_len": 300}]
        yield url, behaviour


def ask(index: SmallIndex, *more: object) -> Finished:
    words = ["--top-k", 3, "--max-new-tokens", 16, "--policy", "random", "--expansion-fraction", ".25"]
    return call("ask", index.path, QUESTIONS[0], *words, "--device", "cpu", "--json", *more)


def without_times(answer: dict[str, Any]) -> dict[str, Any]:
    stats = {key: value for key, value in answer["stats"].items() if not key.endswith("_ms")}
    return answer | {"stats": stats}


def test_ask_a_server(index: SmallIndex, server: tuple[str, Behaviour]) -> None:
    """The same answer as the embedded engine's; a larger prompt than the server takes loses passages."""
    url, behaviour = server
    done = ask(index, "--engine", "vllm-server", "--vllm-url", url)
    assert done.code == 0, done.err
    expected = ask(index)
    assert without_times(done.json) == without_times(expected.json)
    assert done.json["stats"]["prefill_ms"] > 0
    behaviour.models[1]["max_model_len"] = done.json["stats"]["decoder_positions"]
    shorter = ask(index, "--engine", "vllm-server", "--vllm-url", f"{url}/v1", "--policy", "all")
    assert shorter.json["dropped"]


def test_ask_vllm_in_this_program(index: SmallIndex, whole: Runtime) -> None:
    with fake_package(whole.decoder) as made:
        done = ask(index, "--engine", "vllm", "--vllm-option", "swap_space=0", "--vllm-option", "quantization=fp8")
    assert done.code == 0, done.err
    assert without_times(done.json) == without_times(ask(index).json)
    (settings,) = made
    assert (settings["swap_space"], settings["quantization"]) == (0, "fp8")
    assert (settings["max_num_seqs"], settings["max_model_len"]) == (1, tiny_models.MAX_POSITIONS)
    merged = Decoder.load(Path(settings["model"]))
    layer = "model.layers.0.self_attn.q_proj.weight"
    assert merged.model.state_dict()[layer].equal(whole.decoder.model.state_dict()[layer])


def test_serve_from_a_server(index: SmallIndex, server: tuple[str, Behaviour], whole: Runtime) -> None:
    """Streamed answers of several clients' requests are the embedded engine's."""
    options = EngineOptions(name="vllm-server", url=server[0])
    composing = Runtime.open(index.path, device="cpu", composes_only=True)

    def opened(runtime: Runtime) -> Any:
        return open_engine(runtime, options, slots=4, max_positions=512)

    with served(whole, max_positions=300) as here, served(composing, make_engine=opened, max_positions=300) as there:
        found = [[_streamed(running.url, question) for question in QUESTIONS] for running in (here, there)]
    assert found[0] == found[1]


def test_the_command_serves_from_a_server(
    index: SmallIndex, server: tuple[str, Behaviour], monkeypatch: pytest.MonkeyPatch
) -> None:
    """With no more positions than the server has, so that prompts are composed to fit it."""
    from refrag_core.serving import server as serving

    started: list[Answering] = []
    monkeypatch.setattr(serving, "serve", lambda answering, *_, **__: started.append(answering))
    done = call("serve", index.path, "--port", 0, "--engine", "vllm-server", "--vllm-url", server[0], "--slots", 5)
    assert done.code == 0, done.err
    (answering,) = started
    current = answering.generations.current
    assert isinstance(current.engine, VllmServerEngine)
    assert (current.engine.slots, current.engine.max_positions, answering.settings.max_positions) == (5, 300, 300)
    assert current.runtime.decoder.model.lm_head.weight.device.type == "meta"
    answering.close()


def _streamed(url: str, question: str) -> str:
    with OpenAI(base_url=f"{url}/v1", api_key="none", max_retries=0) as client:
        pieces = client.chat.completions.create(
            model=MODEL, messages=[{"role": "user", "content": question}], max_tokens=12, stream=True
        )
        return "".join(piece.choices[0].delta.content or "" for piece in pieces if piece.choices)


def test_a_decoder_for_vllm(index: SmallIndex, whole: Runtime, tmp_path: Path) -> None:
    folder = tmp_path / "merged decoder"
    done = call("bundle", "decoder", index.path, folder, "--json")
    assert done.code == 0, done.err
    name = merged_name(whole.checkpoint, whole.decoder_folder)
    serve = f"vllm serve '{folder}' --served-model-name {name} --enable-prompt-embeds"
    assert done.json == {"folder": str(folder), "name": name, "serve": serve}
    assert json.loads((folder / "refrag_decoder.json").read_text())["name"] == name
    again = call("bundle", "decoder", index.path, folder, "--dtype", "bfloat16")
    assert f"serve it  {serve}" in again.out
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"


def test_a_server_without_the_adapter(index: SmallIndex, server: tuple[str, Behaviour]) -> None:
    url, behaviour = server
    del behaviour.models[1]
    refused = ask(index, "--engine", "vllm-server", "--vllm-url", url)
    assert refused.code == 1
    assert "has the models 'base'; expected 'refrag-" in refused.err
    assert "serve what `refrag bundle decoder` writes, under that name, or name it with --vllm-model" in refused.err
    assert ask(index, "--engine", "vllm-server", "--vllm-url", url, "--vllm-model", "base").code == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--engine", "vllm-server"], "needs the server's address: give it with --vllm-url"),
        (["--vllm-url", "http://x"], "--vllm-url was given with --engine embedded; expected vllm-server"),
        (["--engine", "vllm", "--vllm-model", "x"], "--vllm-model was given with --engine vllm; expected vllm-server"),
        (["--vllm-option", "a=1"], "--vllm-option was given with --engine embedded; expected --engine vllm"),
        (["--engine", "vllm", "--vllm-option", "a"], "--vllm-option is 'a'; expected NAME=VALUE"),
        (["--engine", "vllm", "--device-map", "auto"], "--device-map was given with --engine vllm, which has the deco"),
        (["--engine", "vllm-server", "--vllm-url", "x"], "address is 'x'; expected one like http://127.0.0.1:8000"),
    ],
)
def test_options_that_do_not_belong_together(index: SmallIndex, options: list[str], message: str) -> None:
    for done in (ask(index, *options), call("serve", index.path, "--port", 0, *options)):
        assert (done.code, message in done.err) == (2, True), done.err


def test_without_vllm(index: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "vllm", None)
    done = ask(index, "--engine", "vllm")
    assert done.code == 2
    assert "the engine vllm needs vllm, which is not installed: run `pip install 'refrag[vllm]'`" in done.err


def test_settings_are_json_where_they_can_be() -> None:
    assert parse_settings(["a=0.5", "b=true", "c=fp8", 'd={"x": 1}', "e="]) == {
        "a": 0.5,
        "b": True,
        "c": "fp8",
        "d": {"x": 1},
        "e": "",
    }
    with pytest.raises(UsageError, match="expected NAME=VALUE"):
        parse_settings(["a-b=1"])


def test_captured_graphs_need_the_whole_decoder(index: SmallIndex) -> None:
    with pytest.raises(ConfigError, match="expected captured or composes_only, not both"):
        Runtime.open(index.path, device="cpu", captured=True, composes_only=True)


def test_a_reload_takes_the_embeddings_alone_again(tmp_path: Path, own_cache: Path) -> None:
    small = SmallIndex(tmp_path, documents(12))
    small.build()
    runtime = Runtime.open(small.path, device="cpu", composes_only=True)
    decoder = runtime.decoder
    assert decoder.model.lm_head.weight.device.type == "meta"
    small.write(documents(14))
    small.build()
    assert runtime.reload() == 2
    assert runtime.decoder is decoder
