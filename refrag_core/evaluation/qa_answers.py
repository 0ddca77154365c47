"""Answers to many prompts: generated in batches of similar length, kept in a file, and timed one by one."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np

from refrag_core.composition import Arrangement, ContextPassage, arrange, embed_arrangement, pad_batch
from refrag_core.decoder import TextStream, generated_ids
from refrag_core.errors import UsageError
from refrag_core.index_reader import PassageRef
from refrag_core.policy import PolicyName
from refrag_core.runtime import AskOptions, Runtime


@dataclass(frozen=True, slots=True)
class Variant:
    """One way to give a question's passages to the decoder."""

    name: str
    policy: PolicyName
    expansion_fraction: float
    num_passages: int
    """From the best on."""

    def options(self, max_new_tokens: int) -> AskOptions:
        """What a host would be asked with."""
        return AskOptions(policy=self.policy, expansion_fraction=self.expansion_fraction, max_new_tokens=max_new_tokens)


@dataclass(frozen=True, slots=True)
class Prompt:
    """A question's arranged prompt."""

    passages: Sequence[ContextPassage]
    arrangement: Arrangement

    @property
    def positions(self) -> int:
        """Decoder positions before the answer."""
        return len(self.arrangement.ids)


@dataclass(frozen=True, slots=True)
class Output:
    """What the decoder said."""

    text: str
    positions: int
    passages: int
    """In the prompt: those that fitted."""


def make_prompt(
    runtime: Runtime, question: str, refs: Sequence[PassageRef], variant: Variant, max_new_tokens: int
) -> Prompt:
    """The prompt that the runtime would compose of these passages, without its embeddings."""
    options = variant.options(max_new_tokens)
    fetched = runtime.reader.fetch(refs[: variant.num_passages])
    asks_query = options.policy == "learned" and runtime.policy.query_dim > 0
    mask = runtime.select(fetched, options, runtime.searcher.embed(question) if asks_query else None)
    passages = [ContextPassage(passage.tokens, passage.chunk_size, passage.embeddings) for passage in fetched]
    arrangement = arrange(
        runtime.template,
        passages,
        mask,
        runtime.decoder.tokenizer.encode(question, add_special_tokens=False).ids,
        max_positions=runtime.decoder.max_positions,
        max_new_tokens=max_new_tokens,
    )
    return Prompt(passages, arrangement)


def generate(runtime: Runtime, prompts: Sequence[Prompt], *, max_new_tokens: int, batch_rows: int) -> list[Output]:
    """Greedy answers in the order of the prompts, which are computed side by side in the order of their lengths."""
    outputs: dict[int, Output] = {}
    order = sorted(range(len(prompts)), key=lambda number: prompts[number].positions)
    for start in range(0, len(order), batch_rows):
        chosen = order[start : start + batch_rows]
        texts = _texts(runtime, [prompts[number] for number in chosen], max_new_tokens)
        for number, text in zip(chosen, texts, strict=True):
            arrangement = prompts[number].arrangement
            outputs[number] = Output(text, prompts[number].positions, arrangement.num_passages)
    return [outputs[number] for number in range(len(prompts))]


def _texts(runtime: Runtime, prompts: Sequence[Prompt], max_new_tokens: int) -> list[str]:
    decoder = runtime.decoder
    embeds = [
        embed_arrangement(
            prompt.arrangement,
            prompt.passages,
            embed=decoder.embed,
            project=runtime.projection,
            device=decoder.device,
        )
        for prompt in prompts
    ]
    steps = decoder.generate(pad_batch(embeds), max_new_tokens=max_new_tokens)
    return [_text(runtime, ids.tolist()) for ids in generated_ids(steps, decoder.eos_ids)]


def _text(runtime: Runtime, ids: Sequence[int]) -> str:
    stream = TextStream(runtime.decoder.tokenizer)
    return "".join([*(stream.push(index) for index in ids), stream.finish()]).strip()


def first_token_ms(
    runtime: Runtime, asked: Sequence[tuple[str, Sequence[PassageRef], Mapping[str, Variant]]]
) -> dict[str, float]:
    """Median time from passages to first token, of each variant, one request at a time and retrieval left out.

    The variants take turns, so that whatever slows the machine down slows all of them.
    """
    taken: dict[str, list[float]] = {}
    for warm, (question, refs, variants) in enumerate([asked[0], *asked] if asked else []):
        for name, variant in variants.items():
            answer = runtime.answer_from(question, refs[: variant.num_passages], variant.options(1))
            if warm:
                taken.setdefault(name, []).append(answer.stats.ttft_ms)
    return {name: round(median(values), 2) for name, values in taken.items()}


class AnswerFile:
    """Answers as JSON lines, the first of which says what they are answers to.

    Args:
        path: None keeps nothing.
        settings: all that answers depend on.

    Raises UsageError for a file with answers to something else.
    """

    def __init__(self, path: Path | None, settings: Mapping[str, Any]) -> None:
        self._path = path
        self.known: dict[str, dict[str, Output]] = {}
        if path is None:
            return
        if path.exists():
            self._read(path, settings)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(settings) + "\n", encoding="utf-8")

    def _read(self, path: Path, settings: Mapping[str, Any]) -> None:
        text = path.read_text(encoding="utf-8")
        # A kill may have cut the last line off: it is asked again.
        whole = text[: text.rfind("\n") + 1]
        try:
            first, *lines = [json.loads(line) for line in whole.splitlines()]
            answers = {line["id"]: {k: Output(**v) for k, v in line["outputs"].items()} for line in lines}
        except (ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{path} holds no saved answers ({error}); give another --save, or delete it") from error
        if first != json.loads(json.dumps(settings)):
            odd = sorted(key for key in {*first, *settings} if first.get(key) != settings.get(key))
            raise UsageError(
                f"{path} holds answers of another evaluation ({', '.join(odd)} differ); expected this one's: give "
                f"another --save, or delete it"
            )
        self.known = answers
        path.write_text(whole, encoding="utf-8")

    def add(self, answers: Mapping[str, Mapping[str, Output]]) -> None:
        """Keep the outputs of questions, by question id and variant."""
        self.known.update({question: dict(outputs) for question, outputs in answers.items()})
        if self._path is None:
            return
        with self._path.open("a", encoding="utf-8") as stream:
            for question, outputs in answers.items():
                plain = {name: _plain(output) for name, output in outputs.items()}
                stream.write(json.dumps({"id": question, "outputs": plain}, ensure_ascii=False) + "\n")


def _plain(output: Output) -> dict[str, Any]:
    return {"text": output.text, "positions": output.positions, "passages": output.passages}


def closest_passages(compressed: int, around: int, sizes: Sequence[int]) -> int:
    """How many full passages, at least one, take a number of positions closest to that of compressed ones.

    Args:
        compressed: positions of the compressed prompt.
        around: positions of the prompt without passages.
        sizes: of each full passage, best first.

    Of two that are equally close, the larger; 0 without passages.
    """
    if not sizes:
        return 0
    distance = np.abs(around + np.cumsum(sizes) - compressed)
    return len(sizes) - int(distance[::-1].argmin())
