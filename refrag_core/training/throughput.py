"""What training does a second: losses and rates between two logged steps, and the model FLOPs utilisation."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from refrag_core.training.backward import Losses
from refrag_core.training.batches import TrainingBatch
from refrag_core.training.micro_batches import Example
from refrag_core.training.model import TrainingModel
from refrag_core.training.processes import Processes


@dataclass(frozen=True, slots=True)
class FlopModel:
    """Floating point operations of training, for the model FLOPs utilisation.

    Forward passes count 2 a weight and position, attention 4·d_dec a layer, position and attended slot (on average
    half of the row where all before is seen), and backward passes twice the forward; a frozen decoder and the output
    layer, whose weights get no gradient, once. Nothing that is computed again counts.
    """

    decoder_weights: int
    encoder_weights: int
    head_weights: int
    layers: int
    width: int
    decoder_factor: int

    @classmethod
    def of(cls, model: TrainingModel, decoder_training: str) -> "FlopModel":
        """The numbers of a model."""
        config = model.decoder.config.get_text_config()
        table = model.decoder.get_input_embeddings().weight
        return cls(
            decoder_weights=_matrix_weights(model.decoder.base_model, table),
            encoder_weights=_matrix_weights(model.encoder.body, model.encoder.body.get_input_embeddings().weight),  # type: ignore[operator]
            head_weights=model.head.numel(),
            layers=int(config.num_hidden_layers),
            width=int(config.hidden_size),
            decoder_factor=4 if decoder_training == "frozen" else 6,
        )

    def of_example(self, example: "Example") -> float:
        """Operations of one micro-batch, forward and backward."""
        made = (
            self._of_batch(example.batch, self.decoder_factor, 4)
            + 6.0 * self.encoder_weights * example.batch.chunk_ids.size
        )
        return made + (self._of_batch(example.full, 2, 2) if example.full is not None else 0.0)

    def _of_batch(self, batch: TrainingBatch, factor: int, head_factor: int) -> float:
        attention = factor * self.layers * self.width * 2.0 * batch.mean_attended
        return batch.num_positions * (factor * self.decoder_weights + attention) + (
            head_factor * self.head_weights * int(batch.targets.size)
        )


def _matrix_weights(module: nn.Module, table: Tensor) -> int:
    """Weights in matrices, without the embedding table and adapters, which are merged into the matrices."""
    adapters = (".down", ".up", ".update")
    return sum(
        weight.numel()
        for name, weight in module.named_parameters()
        if weight.ndim == 2 and weight is not table and not name.endswith(adapters) and "embeddings" not in name
    )


@dataclass(slots=True)
class Meter:
    """What was done since the last logged step."""

    losses: dict[str, list[Tensor]] = field(default_factory=dict)
    divergences: dict[str, list[Tensor]] = field(default_factory=dict)
    readouts: dict[str, list[Tensor]] = field(default_factory=dict)
    positions: int = 0
    tokens: int = 0
    flops: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def add(self, example: Example, losses: Losses, flops: float) -> None:
        """Count one micro-batch; nothing waits for the device."""
        self.losses.setdefault(example.name, []).append(losses[0])
        if example.full is not None:
            self.divergences.setdefault(example.name, []).append(losses[1])
        if example.task.kind == "reconstruct":
            self.readouts.setdefault(example.name, []).append(losses[2])
        self.positions += example.batch.num_positions
        self.tokens += example.batch.chunk_ids.size + int((example.batch.ids >= 0).sum())
        self.flops += flops

    def report(self, peak_tflops: float, processes: Processes) -> dict[str, Any]:
        """Losses, rates and utilisation of all processes together. Waits for the device."""
        found = processes.gather(
            (
                _numbers(self.losses),
                _numbers(self.divergences),
                _numbers(self.readouts),
                self.positions,
                self.tokens,
                self.flops,
            )
        )
        losses, divergences, readouts, positions, tokens, flops = zip(*found, strict=True)
        seconds = time.perf_counter() - self.started
        return {
            "losses": _means(losses),
            **({"divergences": _means(divergences)} if any(divergences) else {}),
            **({"readouts": made} if any((made := _means(readouts)).values()) else {}),
            "decoder_positions_per_s": sum(positions) / seconds,
            "tokens_per_s": sum(tokens) / seconds,
            "mfu": sum(flops) / seconds / (processes.count * peak_tflops * 1e12),
        }


def _numbers(values: Mapping[str, list[Tensor]]) -> dict[str, list[float]]:
    return {name: torch.stack(tensors).tolist() for name, tensors in values.items()}


def _means(found: Sequence[Mapping[str, list[float]]]) -> dict[str, float]:
    """Of each name, over all processes."""
    names = sorted({name for values in found for name in values})
    everywhere = {name: [value for values in found for value in values.get(name, [])] for name in names}
    return {name: sum(values) / len(values) for name, values in everywhere.items()}
