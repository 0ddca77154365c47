"""The training loop: weighted tasks, one optimizer step after another, resumable at any saved step.

A run's folder holds
    checkpoint/      the trained checkpoint (`refrag_core.checkpoint`) and training.json
    state/           weights, AdamW's moments (safetensors) and position, to resume from
    metrics.jsonl    one line a logged step
    evaluation.json  losses on held-out documents, at the end; `held_out_uncut` are those of whole matrices before the
                     checkpoint's form of them

What a step computes depends on the config and the step's number alone (besides the clock, where the config
limits seconds), so that a resumed run gives the same losses, bit for bit on a CPU.
"""

import json
import math
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from refrag_core.checkpoint import (
    Checkpoint,
    DecoderConfig,
    EncoderConfig,
    initialise_checkpoint,
    load_checkpoint,
)
from refrag_core.decoder import own_eos_ids
from refrag_core.devices import resolve_device
from refrag_core.digests import digest_json
from refrag_core.errors import ConfigError, ModelNotFoundError, UnsupportedDecoderError
from refrag_core.models import DEFAULT_DECODER, DEFAULT_ENCODER, fingerprint_model, load_tokenizer, resolve_model
from refrag_core.training.backward import Backward, CapturedBackward, Gradients, Inputs, Losses, upload
from refrag_core.training.config import TaskConfig, TrainingConfig
from refrag_core.training.evaluate import EvaluationOptions, evaluate, evaluate_splits
from refrag_core.training.example_stream import ExampleStream, PreparedExample
from refrag_core.training.instruct_data import InstructionSet
from refrag_core.training.losses import vocabulary_loss
from refrag_core.training.low_rank import input_moments
from refrag_core.training.model import (
    ChunkReadout,
    TrainingModel,
    adapter_layers,
    compile_layers,
    start_adapter,
    without_adapter,
)
from refrag_core.training.optimizer import make_optimizer
from refrag_core.training.processes import join_processes
from refrag_core.training.run_log import RunLog
from refrag_core.training.run_state import (
    EVALUATION_FILE,
    WEIGHTS_FILE,
    Bindings,
    claimed,
    diverged,
    load_state,
    save_state,
    unusable,
    was_finished,
)
from refrag_core.training.schedule import learning_rate_factor, progress_of
from refrag_core.training.throughput import FlopModel, Meter
from refrag_core.training.token_shards import Split, TokenShards, TokenSplit, Windows
from refrag_core.training.trained_checkpoint import load_training_model, save_trained_checkpoint, write_record

_SHORT_EVALUATION_WINDOWS = 64
_MOMENT_STEPS = 16
_READOUT_STRIDE = 4
"""Of so many chunks one is read out, which tells vectors as much and takes a fourth of the time."""


def autocast_of(device: torch.device, precision: str) -> Callable[[], AbstractContextManager[Any]]:
    """What makes the context that a model of that precision computes in."""
    return lambda: torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


class Trainer:
    """One training run, from its start or from its saved state."""

    def __init__(self, config: TrainingConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.folder = Path(config.output)
        self.processes = join_processes(config.device)
        if config.micro_batches % self.processes.count:
            raise ConfigError(
                f"{self.processes.count} processes cannot share {config.micro_batches} micro_batches a step; expected "
                f"a multiple of {self.processes.count}"
            )
        self.log = RunLog(self.folder, tensorboard=config.tensorboard, active=self.processes.is_first)
        self.device = self.processes.device or torch.device(resolve_device(config.device))
        self.base = base_checkpoint(config)
        _refuse_storing_untrained(self.base, config)
        self.shards = TokenShards.open(
            Path(config.data), tokenizer_fingerprint=self.base.config.decoder.tokenizer_fingerprint
        )
        length = config.context_tokens + config.output_tokens
        self.windows = Windows(self.shards.split("train"), length=length, seed=config.seed)
        self.model = load_training_model(self.base, config).to(self.device)
        self._refuse_unreadable_tasks()
        self.instructions = load_instructions(config, self.base, self.model)
        self.data_fingerprint = self.shards.fingerprint
        if self.instructions is not None:
            self.data_fingerprint = digest_json([self.shards.fingerprint, self.instructions.fingerprint])
            self.say(self.instructions.summary())
        self.autocast = autocast_of(self.device, config.precision)
        self.optimizer = make_optimizer(self.model, config)
        self.gradients = Gradients(self.optimizer.weights)
        make_backward = CapturedBackward if config.captures(self.device.type) else Backward
        self.backward = make_backward(self.gradients, 1.0 / config.micro_batches)
        self.examples = ExampleStream(config, self.windows, self.instructions, self.processes, self.device)
        self.flops = FlopModel.of(self.model, config.decoder_training)
        self.step, self.position, self.elapsed = 0, 0, 0.0
        self.last_report: dict[str, Any] = {}
        if self._resume():
            self.say(f"resumed at step {self.step}, after {self.elapsed:.0f} s of training")
        elif config.checkpoint is not None:
            self.say(f"goes on from {config.checkpoint}; its optimizer starts anew, with a warm-up")
        if config.compile:
            compile_layers(self.model, static_shapes=config.static_shapes)

    def say(self, message: str) -> None:
        """A line for the log, once."""
        if self.processes.is_first:
            print(message, file=sys.stderr, flush=True)

    def _refuse_unreadable_tasks(self) -> None:
        if self.model.reads_branches or all(task.kind != "continuations" for task in self.config.tasks):
            return
        config = self.model.decoder.config.get_text_config()
        raise UnsupportedDecoderError(
            f"a continuations task gives attention a mask of its own, and decoder type {config.model_type!r} with "
            f"attention {config._attn_implementation!r} takes none, or has layers that see a part of the row; expected "
            f"full attention by sdpa: leave the task out, next-paragraph learns the same from one place a row"
        )

    @property
    def progress(self) -> float:
        """From 0 to 1: of the steps, or of the seconds where these are nearer to their end."""
        config = self.config
        return progress_of(self.step, config.steps, self.elapsed, config.seconds)

    def run(self) -> bool:
        """Train until the run is complete, then write its checkpoint and evaluation.

        Returns False when `stop_after_seconds` came first. Raises TrainingDivergedError, and RunLockedError while
        another process trains in the folder.
        """
        with claimed(self.folder, active=self.processes.is_first):
            if self.progress >= 1.0 and was_finished(self.folder):
                self.say("finished before; nothing is left to do")
                return True
            self.log.begin(self.step)
            return self._run()

    def _run(self) -> bool:
        limit = self.config.stop_after_seconds or math.inf
        began = time.perf_counter()
        meter = Meter()
        # All processes follow the first one's clock, or they would take different steps.
        while self.progress < 1.0 and self.processes.from_first(time.perf_counter() - began) < limit:
            started = time.perf_counter()
            shapes = self.backward.shapes
            self._train_step(meter)
            if self.step % self.config.log_every == 0 or self.step % self.config.save_every == 0:
                self._log(meter)
                meter = Meter()
            # Schedules would be far on before anything is learnt if the time of compiling counted.
            taken = time.perf_counter() - started if self.backward.shapes == shapes else 0.0
            self.elapsed = self.processes.from_first(self.elapsed + taken)
            self._at_intervals()
            meter.started = meter.started if meter.losses else time.perf_counter()
        if meter.losses:
            self._log(meter)
        self.log.close()
        self.save()
        if self.progress < 1.0:
            self.say(f"stopped at step {self.step} ({self.progress:.0%}); run again to resume")
            return False
        if self.processes.is_first:
            self._finish()
        self.processes.wait()
        return True

    def _train_step(self, meter: Meter) -> None:
        factor = learning_rate_factor(self.progress, warmup=self.config.warmup, floor=self.config.learning_rate_floor)
        # The first step would have a factor of 0: nothing learnt, and a first moment of stale gradients.
        factor = max(factor, 1e-3)
        self.optimizer.set_factor(factor)
        prepared = self.examples.take(step=self.step, position=self.position, elapsed=self.elapsed)
        self.gradients.clear()
        for made in prepared.examples:
            meter.add(made.example, self._backward(made), self.flops.of_example(made.example))
        self.position = prepared.next_position
        self.processes.sum(self.gradients.flat)
        self.gradients.clip(self.config.max_gradient_norm)
        self.optimizer.step()
        self.step += 1

    def _backward(self, made: PreparedExample) -> Losses:
        """Losses of an example, whose gradients are added to the others' of the step."""
        task, ragged = made.example.task, made.example.batch.ragged
        own, full = made.own, made.full

        def compute(inputs: Inputs) -> tuple[Tensor, Losses]:
            ids, chunk_ids, places, predict_at, *branches, targets = inputs[: len(own)]
            with self.autocast():
                teacher = self._teacher(task, inputs[len(own) :])
                vectors = self.model.vectors(chunk_ids, ragged)
                hidden = self.model.read(ids, vectors, places, predict_at, *branches)
            loss = vocabulary_loss(
                hidden,
                self.model.head,
                targets.reshape(-1),
                teacher=teacher,
                teacher_weight=0.0 if teacher is None else task.distillation,
                compiled=self._compiles_loss,
            )
            reported = (loss.cross_entropy.detach(), loss.divergence.detach())
            if task.kind != "reconstruct" or vectors is None or self.model.readout is None:
                return loss.total, (*reported, torch.zeros_like(reported[0]))
            readout = self._readout(self.model.readout, vectors, chunk_ids)
            return loss.total + self.config.readout * readout, (*reported, readout.detach())

        return self.backward(compute, upload((*own, *full), self.device), (task, ragged))

    @property
    def _compiles_loss(self) -> bool:
        return self.config.compile and self.device.type == "cuda"

    def _readout(self, readout: ChunkReadout, vectors: Tensor, chunk_ids: Tensor) -> Tensor:
        """Cross-entropy of the tokens of some chunks, read from their vectors alone."""
        some = slice(None, None, _READOUT_STRIDE)
        with self.autocast():
            hidden = readout(vectors.flatten(0, 1)[some], chunk_ids.shape[2])
        targets = chunk_ids.flatten(0, 1)[some].reshape(-1)
        table = self.model.head
        return vocabulary_loss(hidden.to(table.dtype), table, targets, compiled=self._compiles_loss).total

    @torch.no_grad()
    def _teacher(self, task: TaskConfig, inputs: Sequence[Tensor]) -> Tensor | None:
        if not inputs:
            return None
        hidden: Tensor
        if task.teacher == "self":
            hidden = self.model(*inputs[:-1])
        else:
            with without_adapter(self.model.decoder):
                hidden = self.model(*inputs[:-1])
        return hidden

    def _log(self, meter: Meter) -> None:
        report = meter.report(self.config.peak_tflops, self.processes)
        bad = [name for name, loss in report["losses"].items() if not math.isfinite(loss)]
        if bad:
            raise diverged(self.folder, f"the loss of {', '.join(bad)} is", self.step)
        self.last_report = report
        line = {
            "step": self.step,
            "progress": self.progress,
            "epoch": self.windows.epoch_of(max(0, self.position - 1)),
            "seconds": self.elapsed,
            "learning_rate_factor": self.optimizer.param_groups[0]["lr"] / self.optimizer.param_groups[0]["peak"],
            **report,
        }
        self.log.write(line)
        losses = "  ".join(f"{name} {loss:.3f}" for name, loss in report["losses"].items())
        self.say(
            f"step {self.step} {self.progress:.1%} {self.elapsed:.0f} s  {losses}  "
            f"{report['decoder_positions_per_s']:,.0f} positions/s  MFU {report['mfu']:.1%}"
        )

    def _at_intervals(self) -> None:
        every = self.config.evaluate_every
        if self.processes.is_first and every and self.step % every == 0 and self.progress < 1.0:
            found = dict(self._evaluated(("held_out",), _SHORT_EVALUATION_WINDOWS))
            self.log.write({"step": self.step, "seconds": self.elapsed} | found)
        if self.step % self.config.save_every == 0:
            self.save()

    # --- the end

    def evaluate(self, split: TokenSplit, *, windows: int) -> dict[str, Any]:
        """`refrag_core.training.evaluate` on a split."""
        options = EvaluationOptions(
            context_tokens=self.config.context_tokens,
            output_tokens=self.config.output_tokens,
            chunk_sizes=self.config.chunk_sizes,
            windows=windows,
            seed=self.config.seed,
        )
        return evaluate(self.model, split, options, autocast=self.autocast)

    def _evaluated(self, splits: Sequence[Split], windows: int) -> Iterator[tuple[str, dict[str, Any]]]:
        run = partial(self.evaluate, windows=windows)
        return evaluate_splits(self.shards, splits, run, summary=summary, say=self.say)

    def _finish(self) -> None:
        result = self._evaluate_uncut() if self.config.decoder_training == "full" else {}
        self.say("writing the checkpoint")
        adapter = self.save_checkpoint().load_adapter()
        if adapter is not None and self.config.decoder_training == "full":
            start_adapter(self.model.decoder, adapter)  # what is evaluated is what the checkpoint holds
        for split, found in self._evaluated(("held_out", "train", "reported"), self.config.evaluation_windows):
            result[split] = found
            (self.folder / EVALUATION_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        write_record(self.folder / "checkpoint", self._record(result))

    def _evaluate_uncut(self) -> dict[str, Any]:
        """What the trained matrices do as they are: what held-out windows cost more afterwards, the checkpoint's form
        of them does."""
        self.say("whole matrices, before the checkpoint's form of them:")
        windows = self.config.evaluation_windows
        return {f"{split}_uncut": found for split, found in self._evaluated(("held_out",), windows)}

    @torch.no_grad()
    def _input_moments(self) -> dict[str, Tensor] | None:
        """Of the layers whose whole matrices were trained, over the examples that would come next."""
        if self.config.decoder_training != "full":
            return None
        step, position = self.step, self.position
        with input_moments(dict(adapter_layers(self.model.decoder))) as moments:
            for number in range(_MOMENT_STEPS):
                made = self.examples.take(step=step + number, position=position, elapsed=self.elapsed)
                position = made.next_position
                with torch.compiler.set_stance("force_eager"), self.autocast():
                    for prepared in made.examples:
                        self.model(*upload(prepared.own[:-1], self.device), ragged=prepared.example.batch.ragged)
        return moments

    def save_checkpoint(self) -> Checkpoint:
        """Write `checkpoint/` and what it was trained on."""
        folder, moments = self.folder / "checkpoint", self._input_moments()
        return save_trained_checkpoint(folder, self.base, self.model, self.config, self._record({}), moments)

    def _record(self, evaluation: Mapping[str, Any]) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "data_fingerprint": self.data_fingerprint,
            "data": self.shards.index,
            "usable_tokens": self.windows.usable_tokens,
            "step": self.step,
            "windows": self.position,
            "epoch": self.windows.epoch_of(max(0, self.position - 1)),
            "seconds": self.elapsed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "processes": self.processes.count,
            "torch": torch.__version__,
            "metrics": self.last_report,
            "evaluation": evaluation,
            "policy_trained": self.base.config.policy.trained,
        }

    # --- state

    @cached_property
    def _bindings(self) -> Bindings:
        # Signs are no part of the state: they come from the checkpoint again.
        adapter = self.base.load_adapter()
        base = self.base.fingerprint if adapter is not None and adapter.has_signs else None
        fingerprints = {"data": ("token shards or instructions", self.data_fingerprint), "base": ("checkpoint", base)}
        return Bindings(self.config.resume_settings, fingerprints)

    def save(self) -> None:
        """Write `state/`, the whole or nothing of it."""
        if not self.processes.is_first:
            return
        save_state(
            self.folder,
            bindings=self._bindings,
            counters={"step": self.step, "position": self.position, "elapsed": self.elapsed},
            weights=dict(self._weights()),
            moments=self._moments(),
        )

    def _weights(self) -> list[tuple[str, nn.Parameter]]:
        return [(f"{part}.{name}", weight) for part, weights in self.model.groups().items() for name, weight in weights]

    def _moments(self) -> dict[tuple[str, str], Tensor]:
        return {
            (name, kind): value
            for name, weight in self._weights()
            for kind, value in self.optimizer.moments(weight).items()
        }

    def _resume(self) -> bool:
        """Continue from `state/` where there is one."""
        state = load_state(self.folder, self._bindings)
        if state is None:
            return False
        weights, own = state.weights(self.device), dict(self._weights())
        if own.keys() != weights.keys():
            raise unusable(state.folder / WEIGHTS_FILE, "it has other weights than the model")
        with torch.no_grad():
            for name, weight in own.items():
                weight.copy_(weights[name])
        for name, kind, value in state.moments(self.device):
            # AdamW counts steps in a float32 tensor that stays on the CPU unless it is fused or captured.
            self.optimizer.restore(own[name], kind, value if self.device.type == "cuda" else value.cpu())
        self.step, self.position, self.elapsed = (state.counters[key] for key in ("step", "position", "elapsed"))
        return True


def load_instructions(config: TrainingConfig, base: Checkpoint, model: TrainingModel) -> InstructionSet | None:
    """The examples of the config's instruction file, None where it names none."""
    if config.instructions is None:
        return None
    fractions = [p for task in config.tasks if task.kind == "instruct" for p in task.expansion_fractions]
    return open_instructions(
        config.instructions,
        base,
        model.decoder,
        expansion_fractions=fractions,
        context_tokens=config.context_tokens,
        exchange=any(task.exchanged_share for task in config.tasks),
        seed=config.seed,
    )


def open_instructions(path: str, base: Checkpoint, decoder: Any, **settings: Any) -> InstructionSet:
    """The examples of a file for a checkpoint and its decoder; `settings` as for `InstructionSet`."""
    return InstructionSet.open(
        Path(path),
        template=base.config.template,
        tokenizer=load_tokenizer(base.decoder_folder()),
        eos_ids=own_eos_ids(decoder),
        **settings,
    )


def base_checkpoint(config: TrainingConfig) -> Checkpoint:
    """What training starts from: the config's checkpoint, else a fresh one over its encoder and decoder.

    Raises ConfigError for a checkpoint of other models, or trained for other chunk sizes, than the config names.
    """
    if config.checkpoint is None:
        return initialise_checkpoint(
            encoder_reference=config.encoder, decoder_reference=config.decoder, seed=config.seed
        )
    base = load_config_checkpoint(config.checkpoint)
    _check_named_model("encoder", config.encoder, DEFAULT_ENCODER, base.config.encoder, config.checkpoint)
    _check_named_model("decoder", config.decoder, DEFAULT_DECODER, base.config.decoder, config.checkpoint)
    check_chunk_sizes(base, config.chunk_sizes, config.checkpoint)
    return base


def load_config_checkpoint(reference: str) -> Checkpoint:
    """The checkpoint that a config goes on from. Raises ModelNotFoundError, with what to do in a run of stages."""
    try:
        return load_checkpoint(reference)
    except ModelNotFoundError as error:
        raise ModelNotFoundError(
            f"the config's checkpoint cannot be loaded: {error}. Where it is the checkpoint of the stage before, train "
            f"that first, or name another with --set checkpoint=…"
        ) from error


def _refuse_storing_untrained(base: Checkpoint, config: TrainingConfig) -> None:
    """What a run writes counts as trained."""
    if config.steps == 0 and not base.config.trained:
        raise ConfigError(
            f"steps is 0 and checkpoint is {config.checkpoint!r}, so that nothing trained would be stored; expected a "
            f"trained checkpoint to store anew: name one, or train some steps"
        )


def _check_named_model(
    part: str, named: str, default: str, own: EncoderConfig | DecoderConfig, checkpoint: str
) -> None:
    """A config need not name the models of its checkpoint; where it does, they are these."""
    if named not in (default, own.reference) and fingerprint_model(resolve_model(named)) != own.fingerprint:
        raise ConfigError(
            f"{part} is {named!r}, and checkpoint {checkpoint} was made with {own.reference!r}; expected the same: "
            f"leave {part} out, or train a checkpoint for it from the start"
        )


def check_chunk_sizes(base: Checkpoint, chunk_sizes: Sequence[int], checkpoint: str) -> None:
    """Raise ConfigError for chunk sizes that a trained checkpoint was not trained for."""
    other = sorted(set(chunk_sizes) - set(base.config.chunk_sizes))
    if base.config.trained and other:
        raise ConfigError(
            f"chunk_sizes has {', '.join(map(str, other))}, and checkpoint {checkpoint} was trained for "
            f"{', '.join(map(str, base.config.chunk_sizes))}; expected some of those: take them, or train from the "
            f"start for others"
        )


def summary(result: Mapping[str, Any]) -> str:
    """An evaluation in one line."""
    parts = [f"none {result['none']:.3f} full {result['full']:.3f} base full {result['base']['full']:.3f}"]
    for key, rows in result.items():
        if key.startswith("chunk_size_"):
            gaps = " ".join(f"G({p})={by['random']:.3f}" for p, by in rows["gap_closed"].items())
            last = " ".join(f"{p}:{value['gap_closed']:.3f}" for p, value in rows["last"].items())
            made = " ".join(f"{count}:{loss:.3f}" for count, loss in rows["reconstruction"].items())
            parts.append(f"k={key[11:]} {gaps} last {last} wrong {rows['wrong']:.3f} reconstruction {made}")
    return " | ".join(parts)
