"""What refrag uses of vLLM, over a tiny decoder: its HTTP interface, and the few calls of `vllm.LLMEngine`."""

import base64
import io
import json
import sys
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from unittest import mock

import torch

from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder

POSITIONS = 128


@dataclass
class Behaviour:
    """How the fake server answers; tests change it."""

    models: list[dict[str, Any]] = field(
        default_factory=lambda: [{"id": "tiny", "object": "model", "max_model_len": POSITIONS}]
    )
    takes_embeddings: bool = True
    key: str | None = None
    hidden_size: int | None = None
    """That the server says its model has, where that is not the decoder's."""
    shift: float = 0.0
    """Added to embeddings that came in: a server with another table."""
    fault: str = ""
    """`break`: the stream ends after two tokens; `error`: it tells of one; `odd`: no server of this kind."""
    held: threading.Event = field(default_factory=threading.Event)
    """Answers wait for it behind their second token while `hold` is on."""
    hold: bool = False
    bodies: list[dict[str, Any]] = field(default_factory=list)
    left: threading.Event = field(default_factory=threading.Event)
    """Set when a client left before the end."""


@contextmanager
def fake_server(decoder: Decoder) -> Iterator[tuple[str, Behaviour]]:
    """Its address, and how it behaves."""
    behaviour = Behaviour()
    handler = type("Handler", (_Handler,), {"decoder": decoder, "behaviour": behaviour})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, name="fake-vllm", daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", behaviour
    finally:
        behaviour.held.set()
        server.shutdown()
        server.server_close()
        thread.join()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    decoder: Decoder
    behaviour: Behaviour

    def log_message(self, *_: Any) -> None:
        """Quiet."""

    def do_GET(self) -> None:
        if self.behaviour.fault == "odd":
            self._reply(200, "<html>hello</html>")
        elif self._allowed():
            assert self.path == "/v1/models"
            self._reply(200, {"object": "list", "data": self.behaviour.models})

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        assert self.path == "/v1/completions"
        self.behaviour.bodies.append(body)
        if self._allowed() and (prompt := self._prompt(body)) is not None:
            self._stream(prompt, body) if body.get("stream") else self._whole(prompt, body)

    def _allowed(self) -> bool:
        key = self.behaviour.key
        if key is None or self.headers["Authorization"] == f"Bearer {key}":
            return True
        self._reply(401, {"error": "Unauthorized"})
        return False

    def _prompt(self, body: dict[str, Any]) -> torch.Tensor | None:
        if "prompt" in body:
            return self.decoder.embed(torch.tensor(body["prompt"]))
        if not self.behaviour.takes_embeddings:
            self._refuse("You must set `--enable-prompt-embeds` to input `prompt_embeds`.")
            return None
        tensor = torch.load(io.BytesIO(base64.b64decode(body["prompt_embeds"], validate=True)), weights_only=True)
        assert tensor.ndim == 2
        assert tensor.untyped_storage().nbytes() == tensor.nbytes
        size = self.behaviour.hidden_size or self.decoder.dim
        if tensor.shape[1] != size:
            self._refuse(
                f"`prompt_embeds` hidden_size {tensor.shape[1]} does not match the model's hidden_size {size}."
            )
            return None
        return tensor + self.behaviour.shift

    def _refuse(self, message: str) -> None:
        self._reply(400, {"error": {"message": message, "type": "BadRequestError", "param": None, "code": 400}})

    def _reply(self, status: int, value: Any) -> None:
        data = (value if isinstance(value, str) else json.dumps(value)).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _whole(self, prompt: torch.Tensor, body: dict[str, Any]) -> None:
        logits = self.decoder.prefill(pad_batch([prompt])).logits[0]
        token = int(logits.argmax())
        logprob = float(torch.log_softmax(logits, -1)[token])
        choice = {"index": 0, "text": "", "token_ids": [token], "logprobs": {"token_logprobs": [logprob]}}
        self._reply(200, {"object": "text_completion", "choices": [choice]})

    def _stream(self, prompt: torch.Tensor, body: dict[str, Any]) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Transfer-Encoding", "chunked")
        self.end_headers()
        try:
            for number, tokens in enumerate(_generated(self.decoder, prompt, body["max_tokens"])):
                if number == 2 and not self._goes_on():
                    return
                self._event({"choices": [{"index": 0, "text": "…", "token_ids": tokens, "finish_reason": None}]})
            self._event({"choices": [], "usage": {"prompt_tokens": len(prompt)}})
            self._chunk(b"data: [DONE]\n\n")
            self._chunk(b"")
        except OSError:
            self.behaviour.left.set()

    def _goes_on(self) -> bool:
        if self.behaviour.hold:
            assert self.behaviour.held.wait(30)
        if self.behaviour.fault == "error":
            self._event({"error": {"message": "EngineCore died", "type": "InternalServerError", "code": 500}})
        if self.behaviour.fault:
            self.close_connection = True
        return not self.behaviour.fault

    def _event(self, value: Any) -> None:
        self._chunk(f": a comment\n\ndata: {json.dumps(value)}\n\n".encode())

    def _chunk(self, data: bytes) -> None:
        self.wfile.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
        self.wfile.flush()


def _generated(decoder: Decoder, prompt: torch.Tensor, max_tokens: int) -> Iterator[list[int]]:
    return decoder.generate(pad_batch([prompt]), max_new_tokens=max_tokens)


# --- vllm.LLMEngine -----------------------------------------------------------------------------------------


@dataclass
class FakeParams:
    """`vllm.SamplingParams`, as it was made."""

    values: dict[str, Any]


class FakeEngine:
    """`vllm.LLMEngine`: one token of every request a step."""

    def __init__(self, decoder: Decoder) -> None:
        self.engine_core = mock.Mock()
        self.requests: dict[str, Iterator[list[int]]] = {}
        self.given: list[FakeParams] = []
        self.aborted: list[str] = []
        self.most = 0
        self.failure: Exception | None = None
        self.free = threading.Event()
        self.free.set()
        self._decoder = decoder

    def add_request(self, number: str, prompt: dict[str, Any], params: FakeParams) -> str:
        """A prompt joins the batch."""
        assert prompt["type"] == "embeds"
        if bool(prompt["prompt_embeds"].isnan().any()):
            raise ValueError("not a number\nmore about it")
        self.given.append(params)
        self.requests[number] = _generated(self._decoder, prompt["prompt_embeds"], params.values["max_tokens"])
        self.most = max(self.most, len(self.requests))
        return f"{number}-internal"

    def abort_request(self, numbers: list[str]) -> None:
        """Requests leave the batch."""
        self.aborted += numbers
        for number in numbers:
            del self.requests[number]

    def step(self) -> list[Any]:
        """What every request got."""
        assert self.free.wait(30)
        if self.failure is not None:
            raise self.failure
        outputs = []
        for number, steps in list(self.requests.items()):
            tokens = next(steps, None)
            if tokens is None:
                del self.requests[number]
            completion = types.SimpleNamespace(token_ids=tokens or [])
            outputs.append(types.SimpleNamespace(request_id=number, outputs=[completion], finished=tokens is None))
        return outputs


@contextmanager
def fake_package(decoder: Decoder, failure: Exception | None = None) -> Iterator[list[dict[str, Any]]]:
    """`import vllm` gives a package whose engine decodes with `decoder`, or fails; the arguments it was made with."""
    made: list[dict[str, Any]] = []

    def from_engine_args(settings: dict[str, Any]) -> FakeEngine:
        made.append(settings)
        if failure is not None:
            raise failure
        return FakeEngine(decoder)

    package = types.ModuleType("vllm")
    params = types.ModuleType("vllm.sampling_params")
    package.EngineArgs = dict  # type: ignore[attr-defined]
    package.LLMEngine = types.SimpleNamespace(from_engine_args=from_engine_args)  # type: ignore[attr-defined]
    params.SamplingParams = lambda **values: FakeParams(values)  # type: ignore[attr-defined]
    params.RequestOutputKind = types.SimpleNamespace(DELTA="delta")  # type: ignore[attr-defined]
    with mock.patch.dict(sys.modules, {"vllm": package, "vllm.sampling_params": params}):
        yield made
