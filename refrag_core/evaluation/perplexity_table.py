"""A report of `refrag eval perplexity` as lines of text, one table for each context, output and chunk size."""

from collections.abc import Iterator, Mapping
from typing import Any


def tables_of(report: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Every table of a report: those of its list, or the report itself."""
    return list(report["tables"]) if "tables" in report else [report]


def table_lines(report: Mapping[str, Any]) -> Iterator[str]:
    """The report for people: log-perplexity, gap closed and compression; differences are nats saved, with intervals."""
    settings, corpus = report["settings"], report["corpus"]
    kind = "shuffled passages" if settings["shuffled"] else "next tokens"
    yield (
        f"{corpus['windows']} windows of {corpus['documents']} documents, {kind}; log-perplexity in nats a token of "
        f"the output from its token {settings['first_scored_output_token']} on"
    )
    for table in tables_of(report):
        yield ""
        yield from _table(table)


def _table(table: Mapping[str, Any]) -> Iterator[str]:
    yield f"context {table['context_tokens']}, output {table['output_tokens']}, chunk size {table['chunk_size']}"
    yield f"  {'':<24}{'positions':>9}  {'compression':>11}  {'log-ppl':>7}  {'gap closed':>10} [95%]"
    for name, positions in (("none", 0), ("full", table["context_tokens"])):
        closed = 0.0 if name == "none" else 1.0
        yield _row(f"{name} context", positions, table["context_tokens"], table[name], closed)
    yield f"  {'wrong context':<24}{'':>9}  {'':>11}  {table['wrong']:>7.4f}"
    if "reference" in table:
        yield f"  {'reference, full':<24}{'':>9}  {'':>11}  {table['reference']['full']:>7.4f}"
    for fraction in table["refrag"]:
        yield from _fraction(table, fraction)
    yield from _storage(table["embedding_storage"])


def _fraction(table: Mapping[str, Any], fraction: str) -> Iterator[str]:
    size = table["context_tokens"]
    last = table["last_at_equal_positions"][fraction]
    yield _row(f"last {last['tokens']} tokens", last["tokens"], size, last["loss"], last["gap_closed"])
    losses = table["refrag"][fraction]
    positions = table["compression"][fraction]["positions"]
    shown = losses if table["compression"][fraction]["expanded_chunks"] else list(losses)[:1]
    for policy in shown:
        low, high = table["intervals"]["gap_closed"][fraction][policy]
        name = f"p={fraction} {policy}" if len(shown) > 1 or fraction != "0" else "p=0"
        line = _row(f"refrag {name}", positions, size, losses[policy], table["gap_closed"][fraction][policy])
        fixed = table.get("gap_closed_reference", {}).get(fraction, {}).get(policy)
        beside = "" if fixed is None else f"  by reference {fixed:.3f}"
        yield f"{line} [{low:.3f}, {high:.3f}]{beside}{_beside_last(table, fraction, policy)}"
    if len(shown) > 1:
        yield from _learned(table, fraction)


def _learned(table: Mapping[str, Any], fraction: str) -> Iterator[str]:
    for policy, better in table["intervals"].get("learned_better_than", {}).get(fraction, {}).items():
        low, high = better["interval"]
        yield f"    learned against {policy}: {better['nats']:+.4f} [{low:+.4f}, {high:+.4f}]"


def _beside_last(table: Mapping[str, Any], fraction: str, policy: str) -> str:
    better = table["intervals"]["better_than_last_tokens"][fraction][policy]
    low, high = better["interval"]
    return f"  {better['nats']:+.4f} [{low:+.4f}, {high:+.4f}] against last tokens"


def _row(name: str, positions: int, size: int, loss: float, closed: float) -> str:
    rate = f"{size / positions:.2f}x" if positions else ""
    return f"  {name:<24}{positions:>9,}  {rate:>11}  {loss:>7.4f}  {closed:>10.3f}"


def _storage(storage: Mapping[str, Any]) -> Iterator[str]:
    yield f"  embeddings as {storage['dtype']}: {storage['bytes_per_source_token']:.1f} bytes a source token"
    if "gap_closed_change" in storage:
        changes = [abs(value) for row in storage["gap_closed_change"].values() for value in row.values()]
        yield (
            f"  beside {storage['compared_with']} ({storage['its_bytes_per_source_token']:.1f} bytes) the gap closed "
            f"changes by {max(changes):.4f} at most"
        )
