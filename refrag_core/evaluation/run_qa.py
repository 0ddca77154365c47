"""`refrag eval qa`: the same questions with no context, with full text, and compressed at several fractions.

Beside them, for each fraction, as many of the same passages in full text as take the decoder positions that are
closest to the compressed ones': what the same latency buys without compression.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from refrag_core.digests import digest_json
from refrag_core.evaluation.qa import contains_answer, exact_match, f1, is_abstention
from refrag_core.evaluation.qa_answers import (
    AnswerFile,
    Output,
    Variant,
    closest_passages,
    first_token_ms,
    generate,
    make_prompt,
)
from refrag_core.evaluation.qa_passages import WEAK_REPLACED, PassageSource, RetrieverMode
from refrag_core.evaluation.questions import Question, read_questions
from refrag_core.evaluation.retrieval import recall_at, reciprocal_rank
from refrag_core.index_reader import PassageRef
from refrag_core.policy import PolicyName
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions
from refrag_core.runtime import Runtime

NO_CONTEXT, FULL = "no context", "full context"

_BLOCK = 8


@dataclass(frozen=True, slots=True, kw_only=True)
class QaOptions:
    """What is evaluated."""

    top_k: int = 3
    fractions: Sequence[float] = (0.0, 0.1, 0.25)
    policy: PolicyName = "learned"
    max_new_tokens: int = 32
    retriever_mode: RetrieverMode = "strong"
    retrieval: RetrievalOptions = BY_VECTORS
    """How the strong and the weak mode find passages."""
    seed: int = 0
    limit: int | None = None
    """Questions, from the first; None for all."""
    batch_rows: int = 16
    """Prompts that are decoded side by side."""
    timed_questions: int = 8
    """Questions, from the first, whose first tokens are timed."""


@dataclass(frozen=True, slots=True)
class _Asked:
    """A question with its passages."""

    question: Question
    refs: list[PassageRef]
    documents: list[str]
    answer_shown: bool
    """Whether an accepted answer stands in the passages."""

    @property
    def gold_given(self) -> bool:
        """Whether a gold document's passage is among them."""
        return not set(self.question.gold).isdisjoint(self.documents)


def evaluate_qa(
    runtime: Runtime,
    questions: Path,
    options: QaOptions,
    *,
    saved: Path | None = None,
    on_answer: Callable[[str], object] | None = None,
) -> dict[str, Any]:
    """Answer every question in every setting and score it; retrieval is done once a question.

    Args:
        saved: file that keeps the answers as they come and from which a killed evaluation goes on.
        on_answer: gets a line for every question, with what was answered from the full context.

    Returns `checkpoint`, its fingerprint; `settings`, by name: `answered` (an accepted answer stands in the output as
    whole words), `answered_from_gold` (and a gold document is among the passages), exact match and F1 (also over the
    questions with a gold document alone), abstentions, mean decoder positions, and the median time from passages to
    first token (`ttft_ms`); `equal_latency`, by fraction: the scores of fewer passages in full and how many;
    `retrieval`: recall, reciprocal rank, and how often the passages hold an accepted answer. Means are over the
    questions with answers.

    Raises UsageError for an unusable questions file, or saved answers to something else.
    """
    asked = _asked(runtime, read_questions(questions)[: options.limit], options)
    answers = AnswerFile(saved, _settings_of(runtime, asked, options))
    waiting = [number for number, one in enumerate(asked) if one.question.id not in answers.known]
    for start in range(0, len(waiting), _BLOCK):
        block = waiting[start : start + _BLOCK]
        answers.add(_answer(runtime, [asked[number] for number in block], options))
        if on_answer is not None:
            for number in block:
                question = asked[number].question
                said = answers.known[question.id][FULL].text
                on_answer(f"{number + 1}/{len(asked)} {question.question} {FULL}: {said!r}")
    outputs = [answers.known[one.question.id] for one in asked]
    timed = _timed(runtime, asked[: options.timed_questions], outputs, options)
    return {"checkpoint": runtime.checkpoint.fingerprint} | _report(asked, outputs, timed, options)


def _asked(runtime: Runtime, questions: Sequence[Question], options: QaOptions) -> list[_Asked]:
    source = PassageSource(
        runtime,
        questions,
        mode=options.retriever_mode,
        top_k=options.top_k,
        seed=options.seed,
        retrieval=options.retrieval,
    )
    asked = []
    for number, question in enumerate(questions):
        refs = source.given(number)
        shown = source.described(refs)
        holds = any(contains_answer(passage.text, question.answers) for passage in shown)
        asked.append(_Asked(question, refs, [passage.document_id for passage in shown], holds))
    return asked


def _settings_of(runtime: Runtime, asked: Sequence[_Asked], options: QaOptions) -> dict[str, Any]:
    """All that answers depend on."""
    return {
        "index": runtime.reader.manifest.content_id,
        "checkpoint": runtime.checkpoint.fingerprint,
        "questions": digest_json([[one.question.id, one.question.question, one.documents] for one in asked]),
        "top_k": options.top_k,
        "fractions": list(options.fractions),
        "policy": options.policy,
        "max_new_tokens": options.max_new_tokens,
        "retriever_mode": options.retriever_mode,
        "retrieval": asdict(options.retrieval),
        "seed": options.seed,
    }


# --- answering


def _variants(options: QaOptions) -> list[Variant]:
    made = [Variant(NO_CONTEXT, "all", 1.0, 0)]
    made += [Variant(_name(options.policy, p), options.policy, p, options.top_k) for p in options.fractions]
    return [*made, Variant(FULL, "all", 1.0, options.top_k)]


def _name(policy: str, fraction: float) -> str:
    return f"{policy} p={fraction:g}"


def _in_full(fraction: float, num_passages: int) -> Variant:
    """As many full passages as take the positions of those compressed at `fraction`."""
    return Variant(f"full text beside p={fraction:g}", "all", 1.0, num_passages)


def _answer(runtime: Runtime, asked: Sequence[_Asked], options: QaOptions) -> dict[str, dict[str, Output]]:
    """Outputs by question id and variant; prompts that several variants share are answered once."""
    prompts: dict[tuple[int, PolicyName, float, int], Any] = {}
    wanted: list[tuple[int, str, tuple[int, PolicyName, float, int]]] = []

    def add(number: int, variant: Variant) -> int:
        one = asked[number]
        count = min(variant.num_passages, len(one.refs))
        key = (number, variant.policy, variant.expansion_fraction, count)
        if key not in prompts:
            prompts[key] = make_prompt(runtime, one.question.question, one.refs, variant, options.max_new_tokens)
        wanted.append((number, variant.name, key))
        return int(prompts[key].positions)

    for number, one in enumerate(asked):
        positions = {variant.name: add(number, variant) for variant in _variants(options)}
        sizes = _sizes(runtime, one.refs)
        for p in options.fractions:
            count = closest_passages(positions[_name(options.policy, p)], positions[NO_CONTEXT], sizes)
            add(number, _in_full(p, count))
    made = generate(
        runtime, list(prompts.values()), max_new_tokens=options.max_new_tokens, batch_rows=options.batch_rows
    )
    by_key = dict(zip(prompts, made, strict=True))
    answers: dict[str, dict[str, Output]] = {one.question.id: {} for one in asked}
    for number, name, key in wanted:
        answers[asked[number].question.id][name] = by_key[key]
    return answers


def _sizes(runtime: Runtime, refs: Sequence[PassageRef]) -> list[int]:
    """Positions of each passage in full."""
    around = len(runtime.template.passage_header) + len(runtime.template.passage_footer)
    return [len(passage.tokens) + around for passage in runtime.reader.fetch(refs)]


def _timed(
    runtime: Runtime, asked: Sequence[_Asked], outputs: Sequence[Mapping[str, Output]], options: QaOptions
) -> dict[str, float]:
    """Median time to first token of every setting."""
    requests = []
    for one, said in zip(asked, outputs, strict=False):
        variants = {variant.name: variant for variant in _variants(options)}
        for p in options.fractions:
            name = _in_full(p, 0).name
            variants[name] = _in_full(p, said[name].passages)
        requests.append((one.question.question, one.refs, variants))
    return first_token_ms(runtime, requests)


# --- scoring


def _report(
    asked: Sequence[_Asked], outputs: Sequence[Mapping[str, Output]], timed: Mapping[str, float], options: QaOptions
) -> dict[str, Any]:
    def scored(name: str, *, with_passages: bool = True) -> dict[str, Any]:
        return _scored(asked, [said[name] for said in outputs], with_passages) | {"ttft_ms": timed.get(name)}

    settings = {v.name: scored(v.name, with_passages=v.name != NO_CONTEXT) for v in _variants(options)}
    judged = [one for one in asked if one.question.gold]
    return {
        "questions": len(asked),
        "top_k": options.top_k,
        "retriever_mode": options.retriever_mode,
        "options": asdict(options.retrieval),
        "weak_replaced": WEAK_REPLACED if options.retriever_mode == "weak" else None,
        "gold_retrieved": sum(one.gold_given for one in asked),
        "retrieval": {
            f"recall@{depth}": _mean([recall_at(one.documents, one.question.gold, depth) for one in judged])
            for depth in sorted({1, options.top_k})
        }
        | {
            "mrr": _mean([reciprocal_rank(one.documents, one.question.gold) for one in judged]),
            "answer_in_passages": _mean([float(one.answer_shown) for one in asked if one.question.answers]),
        },
        "settings": settings,
        "equal_latency": {
            f"{p:g}": {
                "compressed": settings[_name(options.policy, p)],
                "full": scored(_in_full(p, 0).name),
                "full_passages": _mean([float(said[_in_full(p, 0).name].passages) for said in outputs]),
            }
            for p in options.fractions
        },
        "answers": [
            {"id": one.question.id, "question": one.question.question, "gold_retrieved": one.gold_given}
            | {"outputs": {name: output.text for name, output in said.items() if name in settings}}
            for one, said in zip(asked, outputs, strict=True)
        ],
    }


def _scored(asked: Sequence[_Asked], outputs: Sequence[Output], with_passages: bool) -> dict[str, Any]:
    judged = [(one, output.text) for one, output in zip(asked, outputs, strict=True) if one.question.answers]
    silent = [output.text for one, output in zip(asked, outputs, strict=True) if not one.question.answers]
    right = [bool(contains_answer(text, one.question.answers)) for one, text in judged]
    matches = [exact_match(text, one.question.answers) for one, text in judged]
    overlaps = [f1(text, one.question.answers) for one, text in judged]
    gold = [one.gold_given and with_passages for one, _ in judged]
    return {
        "answered": sum(right),
        "answered_from_gold": sum(hit and given for hit, given in zip(right, gold, strict=True)),
        "em": _mean(matches),
        "f1": _mean(overlaps),
        "em_with_gold": _mean([value for value, given in zip(matches, gold, strict=True) if given]),
        "f1_with_gold": _mean([value for value, given in zip(overlaps, gold, strict=True) if given]),
        "abstained": _mean([float(is_abstention(text)) for _, text in judged]),
        "abstained_without_answer": _mean([float(is_abstention(text)) for text in silent]),
        "decoder_positions": round(sum(output.positions for output in outputs) / len(outputs), 1),
    }


def _mean(values: Sequence[float]) -> float | None:
    """Rounded; None of nothing."""
    return round(sum(values) / len(values), 4) if values else None
