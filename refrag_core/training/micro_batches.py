"""The micro-batches of a step: which task each is of, and what is in it, by the config and the step's number alone."""

from dataclasses import dataclass

import numpy as np

from refrag_core.errors import ConfigError
from refrag_core.policy import num_expanded
from refrag_core.training.batches import (
    Ids,
    Mask,
    TrainingBatch,
    continuations_batch,
    interleaved_batch,
    last_or_random_masks,
    next_paragraph_batch,
    recall_batch,
    reconstruction_batch,
    run_masks,
    text_batch,
)
from refrag_core.training.config import EXPANDING, TaskConfig, TrainingConfig, branch_places
from refrag_core.training.instruct_data import InstructionSet
from refrag_core.training.schedule import chunk_counts, length_weights, normalised
from refrag_core.training.token_shards import Windows


@dataclass(frozen=True, slots=True)
class Example:
    """One micro-batch and what it is for."""

    name: str
    """Of the metric, such as reconstruct/k8."""
    task: TaskConfig
    batch: TrainingBatch
    full: TrainingBatch | None
    """The same predictions from the full context, for distillation."""


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """A planned micro-batch: all that decides what is in it."""

    task: TaskConfig
    position: int
    """Number of its first window."""
    chunk_size: int
    expansion_fraction: float
    """0 in tasks that expand nothing."""
    random: np.random.Generator


def plan_step(config: TrainingConfig, *, position: int, step: int, progress: float) -> list[MicroBatch]:
    """The micro-batches of a step, which follow from these numbers and the seed; cheap, so every process plans all."""
    planned: list[MicroBatch] = []
    for micro in range(config.micro_batches):
        random = np.random.default_rng([config.seed, step, micro])
        if micro % config.alike == 0:
            task, size, fraction = _drawn(config, progress, random)
        planned.append(MicroBatch(task, position, size, fraction, random))
        position += task.batch_rows
    return planned


def _drawn(config: TrainingConfig, progress: float, random: np.random.Generator) -> tuple[TaskConfig, int, float]:
    """Task, chunk size and expansion fraction."""
    shares = normalised([task.weight_at(progress) for task in config.tasks])
    task = config.tasks[int(random.choice(len(config.tasks), p=shares))]
    size = int(random.choice(config.chunk_sizes))
    return task, size, float(random.choice(task.expansion_fractions)) if task.kind in EXPANDING else 0.0


def make_example(
    config: TrainingConfig,
    windows: Windows,
    planned: MicroBatch,
    *,
    progress: float,
    instructions: InstructionSet | None = None,
) -> Example:
    """A planned micro-batch; lengths and masks are drawn by its generator."""
    task, random, size = planned.task, planned.random, planned.chunk_size
    if task.kind == "instruct":
        return instruct_example(instructions, planned)
    tokens = windows.take(planned.position, task.batch_rows)
    context, output = tokens[:, : config.context_tokens], tokens[:, config.context_tokens :]
    if task.kind == "text":
        batch = text_batch(tokens)
        return Example("text", task, batch, batch if task.distillation else None)
    if task.kind == "reconstruct":
        counts = chunk_counts(config.context_tokens, size)
        count = int(random.choice(counts, p=length_weights(task.curriculum, progress, len(counts))))
        # Examples of a row must not continue one another, or the text before would give their tokens away.
        pieces = random.permutation(context.reshape(-1, count * size)).reshape(context.shape)
        batch = reconstruction_batch(pieces, chunk_size=size, num_chunks=count)
        return Example(f"reconstruct/k{size}", task, batch, None)
    if task.kind == "interleaved":
        return _interleaved(planned, tokens)
    if task.kind == "continuations":
        return _continuations(planned, tokens)
    fraction, chunks = planned.expansion_fraction, config.context_tokens // size
    masks = last_or_random_masks(len(context), chunks, num_expanded(chunks, fraction), task.last_share, random)
    if task.kind == "recall":
        return Example(f"recall/k{size}/p{fraction:g}", task, _recall(config, planned, context, masks), None)
    batch = next_paragraph_batch(context, output, chunk_size=size, expansion_mask=masks)
    full = text_batch(tokens, first=config.context_tokens) if task.distillation else None
    return Example(f"next-paragraph/k{size}/p{fraction:g}", task, batch, full)


def _interleaved(planned: MicroBatch, tokens: Ids) -> Example:
    task, size, fraction = planned.task, planned.chunk_size, planned.expansion_fraction
    chunks = tokens.shape[1] // size
    count = num_expanded(chunks, fraction)
    runs = max(1, min(count, chunks - count, round(count * size / task.span_tokens)))
    masks = run_masks(len(tokens), chunks, count, runs, planned.random)
    batch, full = interleaved_batch(tokens, chunk_size=size, expansion_mask=masks)
    return Example(f"interleaved/k{size}/p{fraction:g}", task, batch, full if task.distillation else None)


def _continuations(planned: MicroBatch, tokens: Ids) -> Example:
    task, size = planned.task, planned.chunk_size
    places = branch_places(tokens.shape[1], size, task.span_tokens)
    starts = np.sort(planned.random.permutation(places)[: task.branches]) + 1
    batch, full = continuations_batch(tokens, starts, chunk_size=size, span_tokens=task.span_tokens)
    return Example(f"continuations/k{size}", task, batch, full if task.distillation else None)


def _recall(config: TrainingConfig, planned: MicroBatch, context: Ids, masks: Mask) -> TrainingBatch:
    task = planned.task
    pieces = (len(context), config.output_tokens // task.span_tokens)
    return recall_batch(
        context,
        planned.random.integers(0, context.shape[1] - task.span_tokens + 1, pieces),
        span_tokens=task.span_tokens,
        given_tokens=task.given_tokens,
        chunk_size=planned.chunk_size,
        expansion_mask=masks,
    )


def instruct_example(instructions: InstructionSet | None, planned: MicroBatch) -> Example:
    """A micro-batch of questions with passages. Raises ConfigError without an instruction file."""
    if instructions is None:
        raise ConfigError("an instruct task has no examples; expected the setting instructions to name their file")
    batch = instructions.batch(
        planned.position,
        planned.task.batch_rows,
        chunk_size=planned.chunk_size,
        expansion_fraction=planned.expansion_fraction,
        gold_weight=planned.task.gold_expansion_weight,
        exchanged_share=planned.task.exchanged_share,
        random=planned.random,
    )
    name = f"instruct/k{planned.chunk_size}/p{planned.expansion_fraction:g}"
    return Example(name, planned.task, batch, None)
