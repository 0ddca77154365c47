"""The report of `refrag eval qa` as text."""

from collections.abc import Mapping
from typing import Any


def table_lines(report: Mapping[str, Any]) -> list[str]:
    """Settings one a line, then what the same decoder positions hold in full text."""
    found, top_k = report["gold_retrieved"], report["top_k"]
    recall = "  ".join(f"{name} {_number(value)}" for name, value in report["retrieval"].items())
    lines = [
        f"{report['questions']} questions; the right document is among the top {top_k} passages of {found}",
        f"  {report['retriever_mode']} retriever  {recall}",
        *(f"  {name:<14} {_scores(scores)}" for name, scores in report["settings"].items()),
    ]
    for fraction, pair in report["equal_latency"].items():
        count, full = pair["full_passages"], pair["full"]
        lines.append(f"  as many positions as p={fraction}, {_number(count, 1)} passages in full: {_scores(full)}")
    return lines


def _scores(scores: Mapping[str, Any]) -> str:
    silent = scores["abstained_without_answer"]
    return (
        f"answered {scores['answered']:>3}  from the right passage {scores['answered_from_gold']:>3}  "
        f"EM {_number(scores['em'])}  F1 {_number(scores['f1'])}  abstained {_number(scores['abstained'])}"
        f"{'' if silent is None else f' (without an answer {_number(silent)})'}  "
        f"positions {scores['decoder_positions']:,.0f}  first token {_number(scores['ttft_ms'], 1)} ms"
    )


def _number(value: float | None, digits: int = 3) -> str:
    return "–" if value is None else f"{value:.{digits}f}"
