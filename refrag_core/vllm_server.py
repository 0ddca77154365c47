"""A running vLLM server as a decoder engine: composed prompts go there as `prompt_embeds`, tokens come back streamed.

What of vLLM's HTTP interface is used: `GET /v1/models`, and `POST /v1/completions` with `prompt_embeds` (a tensor as
`torch.save` writes it, in base64), `return_token_ids` and `stream`. One thread a running answer reads the server's
events; leaving an answer closes its connection, upon which vLLM frees what it holds.
"""

import base64
import http.client
import io
import json
import logging
import socket
import ssl
import threading
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from refrag_core.decoder_engine import Sampling, TokenStream, check_prompt, closed_error
from refrag_core.errors import ConfigError, EngineError, FingerprintMismatchError, UsageError

KEY_VARIABLE = "VLLM_API_KEY"
"""Environment variable with the key that the server asks for, as vLLM itself names it."""
CONNECT_SECONDS = 10.0
SILENT_SECONDS = 600.0
"""Without a byte of an answer, its wait for the server's other requests included."""
PROBE_NATS = 0.1
"""By which the first token's log probability may differ between a prompt as ids and as their embeddings."""

_log = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, kw_only=True)
class Address:
    """Where a vLLM server is, and what it wants to see."""

    secure: bool
    host: str
    port: int
    path: str
    """Before `/v1`, without a slash at its end."""
    api_key: str | None = None

    @classmethod
    def parse(cls, url: str, api_key: str | None = None) -> "Address":
        """From `http://host:port`, with or without `/v1`. Raises UsageError."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.username:
            raise UsageError(f"the vLLM server's address is {url!r}; expected one like http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(secure=secure, host=parts.hostname, port=port or (443 if secure else 80), path=path, api_key=api_key)

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        return f"{'https' if self.secure else 'http'}://{host}:{self.port}{self.path}"


@dataclass(frozen=True, slots=True)
class ServedModel:
    """One model that a server has."""

    name: str
    max_positions: int | None
    """Prompt + new tokens; None where the server does not say."""


class _Exchange:
    """One request and its response. Another thread may `abandon` it at any moment."""

    def __init__(self, address: Address) -> None:
        self._address = address
        self._abandoned = False
        self._socket: socket.socket | None = None
        self._connection: http.client.HTTPConnection | None = None
        self._response: http.client.HTTPResponse | None = None

    def open(self, method: str, path: str, body: Mapping[str, Any] | None = None) -> http.client.HTTPResponse:
        """Send, and wait for the head of the response. Raises EngineError for any status but 200."""
        address = self._address
        if address.secure:
            context = ssl.create_default_context()
            connection: http.client.HTTPConnection = http.client.HTTPSConnection(
                address.host, address.port, timeout=CONNECT_SECONDS, context=context
            )
        else:
            connection = http.client.HTTPConnection(address.host, address.port, timeout=CONNECT_SECONDS)
        self._connection = connection
        headers = {"Accept": "application/json, text/event-stream", "Connection": "close"}
        if address.api_key:
            headers["Authorization"] = f"Bearer {address.api_key}"
        data = None
        if body is not None:
            data, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        connection.connect()
        self._socket = connection.sock
        self._socket.settimeout(SILENT_SECONDS)
        if self._abandoned:  # while there was no socket yet
            raise ConnectionAbortedError("nobody wants the answer any more")
        connection.request(method, address.path + path, data, headers)
        response = self._response = connection.getresponse()
        if response.status != 200:
            raise _refusal(address, response.status, response.read(1 << 16))
        return response

    def abandon(self) -> None:
        """End the connection, and with it whatever reads from it."""
        self._abandoned = True
        if self._socket is not None:
            with suppress(OSError):
                self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        """Let go of the connection; one that is not kept belongs to its response."""
        for part in (self._response, self._connection):
            if part is not None:
                part.close()


class VllmServerEngine:
    """A `DecoderEngine` over a running `vllm serve`. Make it with `connect`.

    Args:
        dim: width of the decoder's input embeddings.
        slots: answers that the server is asked for at the same time; more of them wait here.
        eos_ids: ids that end an answer.
    """

    def __init__(self, address: Address, model: ServedModel, *, dim: int, slots: int, eos_ids: frozenset[int]) -> None:
        self.slots = slots
        self.max_positions = model.max_positions
        self._address = address
        self._model = model.name
        self._dim = dim
        self._eos_ids = sorted(eos_ids)
        self._lock = threading.Lock()
        self._active = 0
        self._closed = False
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="vllm-server")

    @classmethod
    def connect(
        cls,
        address: Address,
        *,
        probe: tuple[Sequence[int], Tensor],
        eos_ids: frozenset[int],
        slots: int,
        model: str | None = None,
        needed: str | None = None,
    ) -> "VllmServerEngine":
        """Find the server and its model, and check that it reads embeddings as this side makes them.

        Args:
            probe: a short prompt as ids and as their input embeddings `[s, d_dec]`; the server must go on alike.
            model: the name that the server has for the model; None takes `needed`, or the only one.
            needed: name of a model that no other stands for; None where the decoder is as it was published.

        Raises EngineError when the server cannot be reached or refuses, and FingerprintMismatchError when it has
        another model.
        """
        found = _choose(address, served_models(address), model, needed)
        ids, inputs_embeds = probe
        engine = cls(address, found, dim=inputs_embeds.shape[1], slots=slots, eos_ids=eos_ids)
        engine._check_model(ids, inputs_embeds)
        return engine

    @property
    def active(self) -> int:
        """See DecoderEngine."""
        return self._active

    def submit(self, inputs_embeds: Tensor, sampling: Sampling) -> TokenStream:
        """See DecoderEngine. Raises ConfigError for a prompt that is too long or of another width."""
        check_prompt(inputs_embeds, sampling, dim=self._dim, max_positions=self.max_positions)
        stream = TokenStream()
        with self._lock:
            if self._closed:
                raise closed_error()
            self._pool.submit(self._answer, inputs_embeds, sampling, stream)
        return stream

    def close(self) -> None:
        """See DecoderEngine."""
        with self._lock:
            self._closed = True
        self._pool.shutdown(wait=True)

    # --- one answer, in a thread of its own

    def _answer(self, inputs_embeds: Tensor, sampling: Sampling, stream: TokenStream) -> None:
        if stream.cancelled:
            stream.end()
            return
        error: Exception | None = None
        with self._counted():
            stream.begin()
            try:
                with reported(self._address):
                    self._stream(inputs_embeds, sampling, stream)
            except EngineError as failed:
                error = failed
            except Exception as failed:
                _log.exception("an answer of the vLLM server failed")
                error = EngineError(f"the decoder failed ({type(failed).__name__}): ask again")
        stream.end(None if stream.cancelled else error)

    @contextmanager
    def _counted(self) -> Iterator[None]:
        with self._lock:
            self._active += 1
        try:
            yield
        finally:
            with self._lock:
                self._active -= 1

    def _stream(self, inputs_embeds: Tensor, sampling: Sampling, stream: TokenStream) -> None:
        body = self._completion(sampling) | {"prompt_embeds": encoded(inputs_embeds), "stream": True}
        exchange = _Exchange(self._address)
        stream.on_cancel(exchange.abandon)
        if stream.cancelled:  # before there was anybody to tell
            exchange.abandon()
        try:
            response = exchange.open("POST", "/v1/completions", body)
            for event in _events(response):
                if stream.cancelled:
                    return
                for token in _token_ids(self._address, event):
                    stream.put(token)
        finally:
            exchange.close()

    def _completion(self, sampling: Sampling) -> dict[str, Any]:
        """What every request says; settings left out would be the server's own."""
        return {
            "model": self._model,
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "seed": sampling.seed,
            "stop_token_ids": self._eos_ids,
            "ignore_eos": True,  # the model's own: ours are all there are
            "return_token_ids": True,
        }

    # --- is it the same decoder?

    def _check_model(self, ids: Sequence[int], inputs_embeds: Tensor) -> None:
        by_ids = self._first_token({"prompt": list(ids)})
        by_embeddings = self._first_token({"prompt_embeds": encoded(inputs_embeds)})
        if by_ids[0] != by_embeddings[0] or abs(by_ids[1] - by_embeddings[1]) > PROBE_NATS:
            raise FingerprintMismatchError(
                f"{self._model!r} of the vLLM server at {self._address} goes on differently from the same words as "
                f"ids and as this index's input embeddings; expected the decoder of the index: serve what `refrag "
                f"bundle decoder` writes"
            )

    def _first_token(self, prompt: Mapping[str, Any]) -> tuple[int, float]:
        """The likeliest first token and its log probability."""
        body = self._completion(Sampling(max_new_tokens=1)) | {"logprobs": 1} | dict(prompt)
        answer = read_json(self._address, "POST", "/v1/completions", body)
        with reported(self._address):
            (choice,) = answer["choices"]
            return int(choice["token_ids"][0]), float(choice["logprobs"]["token_logprobs"][0])


def served_models(address: Address) -> list[ServedModel]:
    """The models of the server. Raises EngineError when it cannot be reached or is no such server."""
    answer = read_json(address, "GET", "/v1/models")
    with reported(address):
        return [ServedModel(str(model["id"]), model.get("max_model_len")) for model in answer["data"]]


def encoded(inputs_embeds: Tensor) -> str:
    """A prompt `[s, d_dec]` in the form that vLLM reads: base64 of what `torch.save` writes."""
    buffer = io.BytesIO()
    torch.save(inputs_embeds.detach().cpu().clone(memory_format=torch.contiguous_format), buffer)
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def read_json(address: Address, method: str, path: str, body: Mapping[str, Any] | None = None) -> Any:
    """The JSON that a request is answered with. Raises EngineError."""
    exchange = _Exchange(address)
    try:
        with reported(address):
            return json.loads(exchange.open(method, path, body).read())
    finally:
        exchange.close()


@contextmanager
def reported(address: Address) -> Iterator[None]:
    """Turn what goes wrong with a server into an EngineError that says which, and what to do."""
    try:
        yield
    except (ConnectionRefusedError, socket.gaierror, TimeoutError) as error:
        raise EngineError(
            f"the vLLM server at {address} does not answer ({error}); expected a running `vllm serve MODEL "
            f"--enable-prompt-embeds`: start it, or give its address with --vllm-url"
        ) from error
    except (OSError, http.client.HTTPException) as error:
        raise EngineError(
            f"the connection to the vLLM server at {address} broke off ({str(error) or type(error).__name__}): ask "
            f"again, and look into its log"
        ) from error
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        raise EngineError(
            f"what answers at {address} does not speak as a vLLM server does; expected a `vllm serve` of version 0.32 "
            f"or newer, with `return_token_ids`: give its address with --vllm-url"
        ) from error


def _choose(address: Address, served: Sequence[ServedModel], model: str | None, needed: str | None) -> ServedModel:
    wanted = model or needed
    names = ", ".join(repr(one.name) for one in served) or "none"
    if wanted is None:
        if len(served) == 1:
            return served[0]
        raise ConfigError(f"the vLLM server at {address} has the models {names}: name one with --vllm-model")
    for one in served:
        if one.name == wanted:
            return one
    remedy = "give one of these with --vllm-model"
    if model is None:
        remedy = (
            "the checkpoint has an adapter, with which its decoder must be served: serve what `refrag bundle decoder` "
            "writes, under that name, or name it with --vllm-model"
        )
    raise FingerprintMismatchError(
        f"the vLLM server at {address} has the models {names}; expected {wanted!r}: {remedy}"
    )


def _refusal(address: Address, status: int, body: bytes) -> EngineError:
    """What a status other than 200 means."""
    said = _message(body)
    if "enable-prompt-embeds" in said:
        return EngineError(f"the vLLM server at {address} takes no embeddings: start it with --enable-prompt-embeds")
    if "hidden_size" in said:
        return EngineError(
            f"the vLLM server at {address} has a decoder of another width ({said}); expected the decoder of the "
            f"index: serve what `refrag bundle decoder` writes"
        )
    if status in (401, 403):
        return EngineError(f"the vLLM server at {address} wants a key: put it into ${KEY_VARIABLE}")
    return EngineError(f"the vLLM server at {address} refused with status {status}: {said or 'no reason given'}")


def _message(body: bytes) -> str:
    """The reason in a refusal, on one line; "" where there is none."""
    try:
        value = json.loads(body)
    except ValueError:
        return ""
    found = value.get("error", value) if isinstance(value, dict) else value
    text = found.get("message", "") if isinstance(found, dict) else found
    return " ".join(str(text).split())[:300]


def _events(response: http.client.HTTPResponse) -> Iterator[dict[str, Any]]:
    """The JSON of each server-sent event up to the last. Raises IncompleteRead where the stream ends before."""
    while line := response.readline():
        name, _, data = line.decode("utf-8").strip().partition(":")
        if name != "data":
            continue
        if data.strip() == "[DONE]":
            return
        yield json.loads(data)
    raise http.client.IncompleteRead(b"")


def _token_ids(address: Address, event: Mapping[str, Any]) -> list[int]:
    """The new tokens of an event, none in those that only tell. Raises EngineError for one that tells of an error."""
    if "error" in event:
        said = _message(json.dumps(event).encode())
        raise EngineError(f"the vLLM server at {address} failed: {said or 'no reason given'}")
    choices = event["choices"]
    return [int(token) for token in choices[0]["token_ids"]] if choices else []
