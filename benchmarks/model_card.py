"""The model card of a checkpoint, as Markdown, from files alone: a figure that no file holds is not in it.

    python -m benchmarks.model_card CHECKPOINT [--runs training.json …] [--perplexity RESULT.json …]
        [--qa RESULT.json …] [--notes NOTES.md] [--output CHECKPOINT/README.md]

From the checkpoint come its parts, forms and bytes, and from its training.json data, steps, time and hardware of the
last run; `--runs` adds the records of those before it. `--perplexity` and `--qa` take the JSON of `refrag eval
perplexity` and `refrag eval qa`, and refuse figures of another checkpoint. `--notes` is text for the end of "Limits".
"""

import argparse
import json
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

from refrag_core.checkpoint import POLICY_FILE, PROJECTION_FILE, Checkpoint
from refrag_core.errors import FingerprintMismatchError, RefragError, UsageError
from refrag_core.evaluation.perplexity_table import tables_of
from refrag_core.stored_weights import stored_forms
from refrag_core.training.run_state import TRAINING_FILE

LICENCES = {
    "smollm2-135m-instruct": ("SmolLM2-135M-Instruct", "Apache-2.0"),
    "all-minilm-l6-v2": ("all-MiniLM-L6-v2", "Apache-2.0"),
}
"""Name and licence of the base models, by reference."""

_SCALE_STEPS = {"int8": "a row", "int5": "each 32 entries"}
_MEBI = 1 << 20
_CORPORA = 12
"""The largest are named, the others counted."""


def card_lines(
    checkpoint: Checkpoint,
    *,
    runs: Sequence[Mapping[str, Any]] = (),
    perplexity: Sequence[Mapping[str, Any]] = (),
    qa: Mapping[str, Mapping[str, Any]] | None = None,
    notes: str = "",
) -> Iterator[str]:
    """The card, line by line.

    Args:
        runs: training records, the first run first.
        qa: by the questions' name.

    Raises FingerprintMismatchError for figures of another checkpoint.
    """
    yield f"# {(checkpoint.folder or Path('checkpoint')).resolve().name}"
    yield ""
    yield from _what(checkpoint)
    yield from _parts(checkpoint)
    yield from _training(runs)
    for report in perplexity:
        _refuse_other(checkpoint, report["settings"]["checkpoint_fingerprint"], "refrag eval perplexity")
    if perplexity:
        yield from _heading("What compression costs")
        yield _LEGEND
        for report in perplexity:
            yield from _perplexity(report)
    if qa:
        yield from _heading("Answers to questions")
        for name, report in qa.items():
            _refuse_other(checkpoint, report["checkpoint"], "refrag eval qa")
            yield from _qa(name, report)
    yield from _limits(checkpoint, runs, perplexity, notes)


def _heading(title: str) -> Iterator[str]:
    yield from ("", f"## {title}", "")


def _table(head: Sequence[str], rows: Sequence[Sequence[object]]) -> Iterator[str]:
    yield f"| {' | '.join(head)} |"
    yield f"|{'---|' * len(head)}"
    for row in rows:
        yield f"| {' | '.join(map(str, row))} |"


def _refuse_other(checkpoint: Checkpoint, found: str, source: str) -> None:
    if found != checkpoint.fingerprint:
        raise FingerprintMismatchError(
            f"a result of `{source}` is of checkpoint {found[:12]}, and the card of {checkpoint.fingerprint[:12]}; "
            f"expected figures of this one: measure it"
        )


# --- what it is


def _what(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    sizes = ", ".join(map(str, config.chunk_sizes))
    yield (
        f"A REFRAG checkpoint: a chunk of {sizes} tokens of {_name(config.decoder.reference)} becomes one vector, "
        f"which that decoder reads in the place of the tokens. Encoder body: {_name(config.encoder.reference)}."
    )
    yield from (
        "",
        f"Fingerprint `{checkpoint.fingerprint}`, encode fingerprint `{checkpoint.encode_fingerprint}`.",
        "",
    )
    models = [("decoder", config.decoder), ("encoder body", config.encoder)]
    rows = [(part, *LICENCES.get(model.reference, (model.reference, "its own"))) for part, model in models]
    yield from _table(("base model", "name", "licence"), rows)
    yield ""
    yield "The trained weights in this folder are under Apache-2.0, as refrag is."


def _name(reference: str) -> str:
    return LICENCES.get(reference, (reference, ""))[0]


def _parts(checkpoint: Checkpoint) -> Iterator[str]:
    config = checkpoint.config
    adapter = config.adapter.files if config.adapter else ()
    parts = {
        f"encoder body, {config.encoder.embedding}, {config.encoder.pooling}": [f.name for f in config.encoder_files],
        f"decoder's update, {_rank(checkpoint)}": [file.name for file in adapter],
        f"projection, {config.d_enc} to {config.d_dec}": [PROJECTION_FILE],
        _policy_name(checkpoint): [POLICY_FILE],
    }
    rows = [_part(checkpoint, part, names) for part, names in parts.items() if names]
    total = sum(size for _, _, size in rows)
    yield from _heading("Parts")
    yield from _table(
        ("part", "stored as", "MiB"),
        [*((part, form, f"{size / _MEBI:.1f}") for part, form, size in rows), ("all", "", f"{total / _MEBI:.1f}")],
    )


def _part(checkpoint: Checkpoint, part: str, names: Sequence[str]) -> tuple[str, str, int]:
    paths = [Path(checkpoint.folder or ".", name) for name in names]
    forms = {form for path in paths for form in stored_forms(load_file(path)).values()} - {"uint8"}  # signs
    coded = [f"{form} with a scale {step}, vectors float16" for form, step in _SCALE_STEPS.items() if form in forms]
    return part, ", ".join(coded or sorted(forms)), sum(path.stat().st_size for path in paths)


def _rank(checkpoint: Checkpoint) -> str:
    adapter = checkpoint.load_adapter()
    if adapter is None:
        return "none"
    return f"rank {adapter.rank}" + (" and signs" if adapter.has_signs else "")


def _policy_name(checkpoint: Checkpoint) -> str:
    shape = checkpoint.config.policy
    reads = "reads the retriever's query" if shape.query_dim else "reads no query"
    reads += f", compares it with chunks in {shape.match_dim} dimensions" if shape.match_dim else ""
    state = "" if shape.trained else "; not trained, chooses by chance"
    return f"policy, {shape.num_layers} layers of {shape.width}, {reads}{state}"


# --- how it was trained


def _training(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    if not runs:
        return
    yield from _heading("Training")
    rows = list(_all_rows(runs))
    yield from _table(("run", "steps", "seconds", "epochs begun", "k", "hardware", "tasks"), rows)
    data = runs[-1].get("data")
    if data:
        yield from ("", f"Token shards, fingerprint `{runs[-1].get('data_fingerprint', '')[:12]}`:", "")
        yield from _table(
            ("corpus", "documents", "tokens", "near-duplicates left out"), list(_corpora(data.get("corpora", [])))
        )
        splits = (f"{name} {split['tokens']:,}" for name, split in data.get("splits", {}).items() if "tokens" in split)
        yield from ("", f"Tokens by split: {', '.join(splits)}.")
    yield from _gap_to_training(runs)


def _corpora(corpora: Sequence[Mapping[str, Any]]) -> Iterator[tuple[str, ...]]:
    """The largest by tokens, and one row for all others, which training.json has in full."""
    counts = ("documents", "tokens", "near_duplicates")
    ranked = sorted(corpora, key=lambda corpus: -int(corpus["tokens"]))
    for corpus in ranked[:_CORPORA]:
        yield (str(corpus["name"]), *(f"{corpus[key]:,}" for key in counts))
    others = ranked[_CORPORA:]
    if others:
        name = f"{len(others)} others, named in {TRAINING_FILE}"
        yield (name, *(f"{sum(corpus[key] for corpus in others):,}" for key in counts))


def _all_rows(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[object, ...]]:
    """Rows of all runs; a run whose policy was trained twice has two records and one row of its own."""
    before = 0
    for number, run in _numbered(runs):
        yield from list(_run_rows(number, run))[number == before :]
        before = number


def _numbered(runs: Sequence[Mapping[str, Any]]) -> Iterator[tuple[int, Mapping[str, Any]]]:
    """From 1 on; records of one run whose policies differ have one number."""
    number, before = 0, None
    for run in runs:
        same = {key: run.get(key) for key in ("config", "step", "seconds")}
        number += same != before
        before = same
        yield number, run


def _run_rows(number: int, run: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    if "averaged" in run:
        origins = (f"{origin['weight']:.3g} × {origin['fingerprint'][:12]}" for origin in run["averaged"])
        yield (number, "", "", "", "", "", f"mean of {', '.join(origins)}")
        return
    config = run.get("config") or {}
    tasks = ", ".join(f"{task['kind']} {task.get('weight', 1.0):g}" for task in config.get("tasks", []))
    sizes = ", ".join(map(str, config.get("chunk_sizes", [])))
    epochs = run["epoch"] + 1 if "epoch" in run else ""
    if run.get("step") == 0:
        tasks, epochs = "none: stores what it begins from anew", ""
    processes = run.get("processes", 1)
    hardware = f"{processes} × {run['device']}" if processes > 1 else run.get("device", "")
    yield (number, *_time(run), epochs, sizes, hardware, tasks)
    policy = run.get("policy")
    if policy:
        yield (f"{number}, policy", *_time(policy), "", sizes, policy.get("device", ""), "policy")


def _time(run: Mapping[str, Any]) -> tuple[str, str]:
    return (f"{run['step']:,}" if "step" in run else "", f"{run['seconds']:,.0f}" if "seconds" in run else "")


def _gap_to_training(runs: Sequence[Mapping[str, Any]]) -> Iterator[str]:
    """Losses on what was trained on beside those on held-out documents, as the last run that has both has them."""
    both = [
        (n, run["evaluation"])
        for n, run in _numbered(runs)
        if {"train", "held_out"} <= {*(run.get("evaluation") or ())}
    ]
    if not both:
        return
    number, evaluation = both[-1]
    rows = []
    for key in (name for name in evaluation["held_out"] if name.startswith("chunk_size_")):
        for p, by_policy in evaluation["held_out"][key]["refrag"].items():
            trained, held = evaluation["train"][key]["refrag"][p]["random"], by_policy["random"]
            rows.append((key.removeprefix("chunk_size_"), p, f"{trained:.3f}", f"{held:.3f}", f"{held - trained:+.3f}"))
    yield from ("", f"Nats a token of compressed context, random chunks expanded, after run {number}:", "")
    yield from _table(("k", "p", "training documents", "held-out documents", "difference"), rows)


# --- what it costs

_LEGEND = (
    "Log-perplexity in nats a token of the output. G is the share of the gap between no and full context that is "
    "closed, with 95% intervals over documents; by a fixed reference where one was given. The last column is how many "
    "nats better than the context's last tokens at as many decoder positions."
)


def _perplexity(report: Mapping[str, Any]) -> Iterator[str]:
    settings, corpus = report["settings"], report["corpus"]
    kind = "shuffled passages" if settings["shuffled"] else "the next tokens"
    split = f", split {corpus['split']}" if corpus["split"] else ""
    for table in tables_of(report):
        yield (
            f"\n**{Path(corpus['source']).name}{split}: {kind}**, context {table['context_tokens']}, output "
            f"{table['output_tokens']}, k = {table['chunk_size']}; {corpus['windows']} windows of "
            f"{corpus['documents']} documents; embeddings {table['embedding_storage']['dtype']}; {settings['device']}, "
            f"{settings['decoder_dtype']}; scored from the output's token "
            f"{settings.get('first_scored_output_token', 2)} on.\n"
        )
        yield from _table(("context", "positions", "nats", "G", "beside last tokens"), list(_conditions(table)))
        yield from _storage(table["embedding_storage"])


def _conditions(table: Mapping[str, Any]) -> Iterator[tuple[object, ...]]:
    yield ("none", 0, f"{table['none']:.3f}", "0", "")
    yield ("full", table["context_tokens"], f"{table['full']:.3f}", "1", "")
    if "reference" in table:
        yield ("full, reference", table["context_tokens"], f"{table['reference']['full']:.3f}", "", "")
    yield ("another document's, compressed", "", f"{table['wrong']:.3f}", "", "")
    for p, losses in table["refrag"].items():
        last, positions = table["last_at_equal_positions"][p], table["compression"][p]["positions"]
        yield (f"last {last['tokens']} tokens", last["tokens"], f"{last['loss']:.3f}", f"{last['gap_closed']:.3f}", "")
        expands = table["compression"][p]["expanded_chunks"]
        for policy in losses if expands else list(losses)[:1]:
            name = f"p = {p}, {policy}" if expands else f"p = {p}"
            better = table["intervals"]["better_than_last_tokens"][p][policy]
            beside = f"{better['nats']:+.3f} {_interval(better['interval'])}"
            yield (name, positions, f"{losses[policy]:.3f}", _gap(table, p, policy), beside)


def _gap(table: Mapping[str, Any], p: str, policy: str) -> str:
    own = f"{table['gap_closed'][p][policy]:.3f} {_interval(table['intervals']['gap_closed'][p][policy])}"
    fixed = table.get("gap_closed_reference", {}).get(p, {}).get(policy)
    return own if fixed is None else f"{own}, by reference {fixed:.3f}"


def _interval(ends: Sequence[float]) -> str:
    return f"[{ends[0]:.3f}, {ends[1]:.3f}]"


def _storage(storage: Mapping[str, Any]) -> Iterator[str]:
    if "gap_closed_change" in storage:
        changes = [abs(value) for row in storage["gap_closed_change"].values() for value in row.values()]
        yield (
            f"\nEmbeddings in {storage['dtype']} take {storage['bytes_per_source_token']:.1f} bytes a source token, in "
            f"{storage['compared_with']} {storage['its_bytes_per_source_token']:.1f}; G changes by "
            f"{max(changes):.4f} at most."
        )


def _qa(name: str, report: Mapping[str, Any]) -> Iterator[str]:
    yield (
        f"\n**{name}**: {report['questions']} questions, top {report['top_k']} passages, {report['retriever_mode']} "
        f"retriever: a right document is among the passages of {report['gold_retrieved']}.\n"
    )
    rows = [(name, *_scores(scores)) for name, scores in report["settings"].items()]
    for p, pair in report["equal_latency"].items():
        passages = f"{pair['full_passages']:.1f} passages in full, the positions of p = {p}"
        rows.append((passages, *_scores(pair["full"])))
    yield from _table(("context", "answered", "EM", "F1", "positions"), rows)


def _scores(scores: Mapping[str, Any]) -> tuple[str, ...]:
    means = ("" if scores[key] is None else f"{scores[key]:.3f}" for key in ("em", "f1"))
    return (str(scores["answered"]), *means, f"{scores['decoder_positions']:,.0f}")


# --- what it cannot do


def _limits(
    checkpoint: Checkpoint, runs: Sequence[Mapping[str, Any]], perplexity: Sequence[Mapping[str, Any]], notes: str
) -> Iterator[str]:
    sizes = " or ".join(map(str, checkpoint.config.chunk_sizes))
    yield from _heading("Limits")
    yield f"- For this decoder's weights and tokenizer alone, and chunks of {sizes} tokens: anything else is refused."
    lengths = sorted({run["config"]["context_tokens"] for run in runs if "context_tokens" in run.get("config", {})})
    if lengths:
        yield f"- Trained on contexts of {' and '.join(map(str, lengths))} tokens."
    if not checkpoint.config.policy.trained:
        yield "- Its policy is not trained."
    worse = [name for report in perplexity for name in _not_better(report)]
    if worse:
        yield f"- Not better than the last tokens of the context at equal positions: {'; '.join(worse)}."
    if notes:
        yield notes.rstrip()


def _not_better(report: Mapping[str, Any]) -> Iterator[str]:
    """Conditions whose advantage over the last tokens is not beyond its interval; a whole table by its name alone."""
    kind = "shuffled" if report["settings"]["shuffled"] else "next tokens"
    for table in tables_of(report):
        table_name = f"{Path(report['corpus']['source']).name} {kind} k={table['chunk_size']}"
        better = {
            f"p={p} {policy}" if table["compression"][p]["expanded_chunks"] else f"p={p}": interval["interval"][0] > 0.0
            for p, row in table["intervals"]["better_than_last_tokens"].items()
            for policy, interval in row.items()
        }
        if not any(better.values()):
            yield f"{table_name} whatever p and policy"
        else:
            yield from (f"{table_name} {name}" for name, is_better in better.items() if not is_better)


# --- command line


def _read(paths: Sequence[Path]) -> list[Any]:
    try:
        return [json.loads(path.read_text(encoding="utf-8")) for path in paths]
    except (OSError, ValueError) as error:
        raise UsageError(f"a result cannot be read ({error}); expected the JSON of a command's --json") from error


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.model_card", description=__doc__)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--runs", type=Path, nargs="*", default=[], help="training.json of the runs before the last")
    parser.add_argument("--perplexity", type=Path, nargs="*", default=[])
    parser.add_argument("--qa", type=Path, nargs="*", default=[], help="named by their files")
    parser.add_argument("--notes", type=Path, help="Markdown for the end of the limits")
    parser.add_argument("--output", type=Path, help="default: README.md of the checkpoint's folder")
    given = parser.parse_args(arguments)
    try:
        own = given.checkpoint / TRAINING_FILE
        lines = card_lines(
            Checkpoint.load(given.checkpoint),
            runs=_read([*given.runs, *([own] if own.is_file() else [])]),
            perplexity=_read(given.perplexity),
            qa=dict(zip((path.stem for path in given.qa), _read(given.qa), strict=True)),
            notes=given.notes.read_text(encoding="utf-8") if given.notes else "",
        )
        output = given.output or given.checkpoint / "README.md"
        output.write_text("\n".join(lines) + "\n", encoding="utf-8")
    except RefragError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1
    print(output)
    return 0


if __name__ == "__main__":
    sys.exit(main())
