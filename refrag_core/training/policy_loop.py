"""`python -m refrag_core.training.policy_loop CONFIG.toml [--set key=value …]`: train a checkpoint's policy, or resume.

A run's folder holds
    checkpoint/      the base checkpoint with the trained policy; all else is copied
    state/           weights and AdamW's moments (safetensors) and position, to resume from
    metrics.jsonl    one line a logged step
    evaluation.json  learned beside random and last chunks on held-out documents and questions, at the end

Stage one, the warm start: random expansion masks of every context are rewarded, a chunk's importance is
estimated from these, and the policy learns it as soft labels. Stage two: masks are sampled from the policy
itself, and PPO with a group baseline raises the rewarded ones. In both, a share of the steps may be on questions, whose
answers say which chunks to choose. What a step computes depends on the config and the
step's number alone (besides the clock, where the config limits seconds), bit for bit on a CPU.
"""

import argparse
import json
import math
import os
import shutil
import sys
import time
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from refrag_core.checkpoint import Checkpoint, PolicyConfig
from refrag_core.devices import resolve_device
from refrag_core.errors import ConfigError, RefragError, UsageError
from refrag_core.models import load_tokenizer, resolve_model
from refrag_core.policy import (
    PointerPolicy,
    draw_picks,
    initialise_policy,
    num_expanded,
    pick_log_probs,
    with_match,
)
from refrag_core.retriever import load_retriever
from refrag_core.training.evaluate import evaluate_splits
from refrag_core.training.loop import autocast_of, check_chunk_sizes, load_config_checkpoint, open_instructions
from refrag_core.training.model import compile_layers
from refrag_core.training.policy_answers import AnsweredQuestions
from refrag_core.training.policy_config import PolicyTrainingConfig, load_policy_config
from refrag_core.training.policy_data import (
    EmbedQueries,
    EncodedContexts,
    ExpansionScorer,
    Ids,
    MakeQueries,
    PolicyExample,
    Queries,
    make_example,
    picks_to_masks,
)
from refrag_core.training.policy_evaluate import evaluate_answers, evaluate_policy
from refrag_core.training.policy_losses import (
    chunk_importance,
    clipped_loss,
    first_pick_divergence,
    first_pick_entropy,
    group_advantages,
    importance_targets,
    warm_start_loss,
)
from refrag_core.training.run_log import RunLog
from refrag_core.training.run_state import (
    EVALUATION_FILE,
    TRAINING_FILE,
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
from refrag_core.training.token_shards import Split, TokenShards, TokenSplit, Windows
from refrag_core.training.trained_checkpoint import load_training_model

_BETAS = (0.9, 0.95)
_SHORT_EVALUATION_WINDOWS = 64
_PREPARED_STEPS = 16


class PolicyTrainer:
    """One run of policy training, from its start or from its saved state, in one process."""

    def __init__(self, config: PolicyTrainingConfig) -> None:
        torch.manual_seed(config.seed)
        self.config = config
        self.folder = Path(config.output)
        self.log = RunLog(self.folder, tensorboard=config.tensorboard)
        self.device = torch.device(resolve_device(config.device))
        self.base = load_config_checkpoint(config.checkpoint)
        _check_base(self.base, config)
        tokenizer_fingerprint = self.base.config.decoder.tokenizer_fingerprint
        self.shards = TokenShards.open(Path(config.data), tokenizer_fingerprint=tokenizer_fingerprint)
        length = config.context_tokens + config.output_tokens
        self.windows = Windows(self.shards.split("train"), length=length, seed=config.seed)
        self.scorer = self._load_scorer()
        self.embed_queries, query_dim = self._load_queries()
        self.make_queries = None if self.embed_queries is None else self._queries_of_tokens(self.embed_queries)
        self.questions = self._load_questions(config.instructions)
        self.held_out_questions = self._load_questions(config.held_out_instructions)
        self.policy = self._initial_policy(query_dim).to(self.device).train().requires_grad_(True)
        self.reference: PointerPolicy | None = None
        """The policy after the warm start, once that is over."""
        self.optimizer = torch.optim.AdamW(
            self.policy.parameters(),
            betas=_BETAS,
            weight_decay=config.weight_decay,
            fused=self.device.type == "cuda",
        )
        self.step, self.elapsed = 0, 0.0
        self.last_report: dict[str, float] = {}
        self._prepared: dict[int, PolicyExample] = {}
        if self._resume():
            self.say(f"resumed at step {self.step}, after {self.elapsed:.0f} s of training")

    def say(self, message: str) -> None:
        """A line for the log."""
        print(message, file=sys.stderr, flush=True)

    # --- parts

    def _load_scorer(self) -> ExpansionScorer:
        encoder = self.base.config.encoder
        settings = self.config.training_config(encoder.embedding, encoder.pooling)
        model = load_training_model(self.base, settings).to(self.device).eval().requires_grad_(False)
        # Looked up and not mapped again for every chunk: nothing of it is trained here.
        model.encoder.fold()
        if self.config.compile:
            compile_layers(model)
        autocast = autocast_of(self.device, self.config.precision)
        return ExpansionScorer(model, autocast, first=self.config.first_scored)

    def _load_queries(self) -> tuple[EmbedQueries | None, int]:
        """What makes query vectors, and their width; none for a policy that reads none."""
        if not self.config.query_conditioned:
            return None, 0
        retriever = load_retriever(resolve_model(self.config.retriever), str(self.device))
        return retriever.embed_queries, retriever.dim

    def _queries_of_tokens(self, embed: EmbedQueries) -> MakeQueries:
        tokenizer = load_tokenizer(self.base.decoder_folder())

        def make_queries(token_ids: Ids) -> Queries:
            return embed(tokenizer.decode_batch(token_ids.tolist(), skip_special_tokens=False))

        return make_queries

    def _load_questions(self, path: str | None) -> AnsweredQuestions | None:
        if path is None:
            return None
        config = self.config
        instructions = open_instructions(
            path,
            self.base,
            self.scorer.decoder,
            expansion_fractions=(config.evaluation_fraction,),
            context_tokens=config.context_tokens,
        )
        return AnsweredQuestions(instructions, load_tokenizer(self.base.decoder_folder()), seed=config.seed)

    def _initial_policy(self, query_dim: int) -> PointerPolicy:
        """The base's where it is trained and of this shape, or of it but for a term to add; else a new one.

        How the base stores its policy is no part of the shape.
        """
        config, own = self.config, replace(self.base.config.policy, dtype=None)
        if own == self._policy_shape(query_dim, config.match_dim or own.match_dim):
            self.say("goes on from the checkpoint's trained policy")
            return self.base.load_policy()
        if own == self._policy_shape(query_dim, 0):
            self.say(f"goes on from the checkpoint's trained policy, with a new term of match_dim {config.match_dim}")
            return with_match(self.base.load_policy(), config.match_dim, seed=config.seed + 1)
        if own.trained:
            self.say("begins a new policy: the checkpoint's trained one has another shape or reads no query")
        if config.steps == 0:
            raise ConfigError(
                f"steps is 0 and checkpoint {config.checkpoint} has no trained policy of this shape, so that a new one "
                f"would be stored as it is; expected a policy to evaluate: take another checkpoint, or train some steps"
            )
        return initialise_policy(
            self.base.config.d_enc,
            query_dim=query_dim,
            match_dim=config.match_dim,
            width=config.width,
            num_heads=config.num_heads,
            num_layers=config.num_layers,
            seed=config.seed + 1,
        )

    def _policy_shape(self, query_dim: int, match_dim: int) -> PolicyConfig:
        config = self.config
        return PolicyConfig(
            query_dim, config.width, config.num_heads, config.num_layers, trained=True, match_dim=match_dim
        )

    # --- training

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
        with claimed(self.folder):
            if self.progress >= 1.0 and was_finished(self.folder, part="policy"):
                self.say("finished before; nothing is left to do")
                return True
            self.log.begin(self.step)
            return self._run()

    def _run(self) -> bool:
        limit = self.config.stop_after_seconds or math.inf
        began = time.perf_counter()
        metrics: list[dict[str, Tensor]] = []
        while self.progress < 1.0 and time.perf_counter() - began < limit:
            started = time.perf_counter()
            metrics.append(self._train_step())
            if self.step % self.config.log_every == 0 or self.step % self.config.save_every == 0:
                self._log(metrics)
                metrics = []
            self.elapsed += time.perf_counter() - started
            self._at_intervals()
        if metrics:
            self._log(metrics)
        self.log.close()
        self.save()
        if self.progress < 1.0:
            self.say(f"stopped at step {self.step} ({self.progress:.0%}); run again to resume")
            return False
        self._finish()
        return True

    def _train_step(self) -> dict[str, Tensor]:
        """One step of the stage that the progress is in; what it returns still is on the device."""
        share, progress = self.config.warm_start_share, self.progress
        if progress < share:
            self._set_learning_rate(self.config.warm_start_learning_rate, progress / share)
        else:
            if self.reference is None:
                self.reference = deepcopy(self.policy).eval().requires_grad_(False)
            self._set_learning_rate(self.config.learning_rate, (progress - share) / (1.0 - share))
        if self.questions is not None and self._random(4).random() < self.config.instruction_share:
            metrics = self._answers(self.questions)
        else:
            example = self._example()
            contexts = self.scorer.encode(example)
            if self.reference is None:
                metrics = self._warm_start(example, contexts)
            else:
                metrics = self._policy_gradient(self.reference, example, contexts)
        self.step += 1
        return metrics

    def _answers(self, questions: AnsweredQuestions) -> dict[str, Tensor]:
        """A step on questions: the chunks that hold the answer are the labels."""
        assert self.embed_queries is not None
        size = int(self._random(3).choice(self.config.chunk_sizes))
        contexts = questions.batch(self.step, self.config.batch_windows, chunk_size=size)
        queries = self.embed_queries(contexts.questions)
        embeddings, present, vectors, targets = self.scorer.encode_questions(contexts, queries)
        logits = self.policy(embeddings, present, vectors)
        loss = warm_start_loss(logits, targets)
        self._update(loss)
        return {"answer_loss": loss.detach(), "answer_entropy": first_pick_entropy(logits.detach())}

    def _example(self) -> PolicyExample:
        """This step's contexts; several steps' are made at once, since their queries wait for the device."""
        if self.step not in self._prepared:
            coming = range(self.step, self.step + (_PREPARED_STEPS if self.make_queries else 1))
            self._prepared = {
                step: make_example(self.config, self.windows, step, make_queries=self.make_queries) for step in coming
            }
        return self._prepared[self.step]

    def _warm_start(self, example: PolicyExample, contexts: EncodedContexts) -> dict[str, Tensor]:
        config = self.config
        count = num_expanded(example.num_chunks, config.warm_start_fraction)
        even = torch.zeros(contexts.present.shape, device=self.device)
        picks = draw_picks(even, count, self._generator(), num_samples=config.warm_start_masks)
        masks = picks_to_masks(picks, example.num_chunks)
        rewards = self.scorer.rewards(contexts, masks, count)
        importance = chunk_importance(masks, rewards, ridge=config.ridge)
        targets = importance_targets(importance, temperature=config.label_temperature)
        logits = self.policy(contexts.embeddings, contexts.present, contexts.queries)
        loss = warm_start_loss(logits, targets)
        self._update(loss)
        return {
            "warm_start_loss": loss.detach(),
            "reward": rewards.mean(),
            "reward_std": rewards.std(dim=1, correction=0).mean(),
            "entropy": first_pick_entropy(logits.detach()),
        }

    def _policy_gradient(
        self, reference: PointerPolicy, example: PolicyExample, contexts: EncodedContexts
    ) -> dict[str, Tensor]:
        config, inputs = self.config, (contexts.embeddings, contexts.present, contexts.queries)
        with torch.no_grad():
            sampling, kept = self.policy(*inputs), reference(*inputs)
            picks = draw_picks(sampling, example.count, self._generator(), num_samples=config.group_size)
            old = pick_log_probs(sampling, picks)
        rewards = self.scorer.rewards(contexts, picks_to_masks(picks, example.num_chunks), example.count)
        advantages = group_advantages(rewards)
        for _ in range(config.updates_per_sample):
            logits = self.policy(*inputs)
            clipped = clipped_loss(pick_log_probs(logits, picks), old, advantages, clip=config.clip)
            entropy, divergence = first_pick_entropy(logits), first_pick_divergence(logits, kept)
            loss = clipped.loss - config.entropy_weight * entropy + config.divergence_weight * divergence
            self._update(loss)
        return {
            "policy_loss": loss.detach(),
            "reward": rewards.mean(),
            "reward_std": rewards.std(dim=1, correction=0).mean(),
            "advantage_std": advantages.std(correction=0),
            "clip_fraction": clipped.clip_fraction,
            "entropy": entropy.detach(),
            "divergence": divergence.detach(),
        }

    def _update(self, loss: Tensor) -> None:
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.config.max_gradient_norm)
        self.optimizer.step()

    def _set_learning_rate(self, peak: float, progress: float) -> None:
        factor = learning_rate_factor(progress, warmup=self.config.warmup, floor=self.config.learning_rate_floor)
        for group in self.optimizer.param_groups:
            # The first step would have a factor of 0.
            group["lr"] = peak * max(factor, 1e-3)

    def _generator(self) -> torch.Generator:
        """The step's own, on the device."""
        seed = int(self._random(1).integers(1 << 62))
        return torch.Generator(self.device).manual_seed(seed)

    def _random(self, purpose: int) -> np.random.Generator:
        return np.random.default_rng([self.config.seed, self.step, purpose])

    def _log(self, metrics: Sequence[dict[str, Tensor]]) -> None:
        """Means since the last logged step, of what steps report. Waits for the device."""
        names = list(dict.fromkeys(name for step in metrics for name in step))
        report = {name: float(torch.stack([step[name] for step in metrics if name in step]).mean()) for name in names}
        bad = sorted(name for name, value in report.items() if not math.isfinite(value))
        if bad:
            raise diverged(self.folder, f"{', '.join(bad)} of the policy's training is", self.step)
        self.last_report = report
        line = {"step": self.step, "progress": self.progress, "seconds": self.elapsed, **report}
        line["learning_rate"] = self.optimizer.param_groups[0]["lr"]
        self.log.write(line)
        shown = "  ".join(f"{name} {value:.4f}" for name, value in report.items())
        self.say(f"step {self.step} {self.progress:.1%} {self.elapsed:.0f} s  {shown}")

    def _at_intervals(self) -> None:
        every = self.config.evaluate_every
        if every and self.step % every == 0 and self.progress < 1.0:
            found = self._evaluate_questions() | self._evaluate_splits(("held_out",), _SHORT_EVALUATION_WINDOWS)
            self.log.write({"step": self.step, "seconds": self.elapsed} | found)
        if self.step % self.config.save_every == 0:
            self.save()

    # --- the end

    def evaluate(self, split: TokenSplit, *, windows: int) -> dict[str, Any]:
        """`evaluate_policy` on a split, with the policy as it is stored."""
        policy = _as_stored(self.policy)
        return evaluate_policy(policy, self.scorer, split, self.config, make_queries=self.make_queries, windows=windows)

    def _evaluate_questions(self) -> dict[str, Any]:
        """`evaluate_answers` on the held-out questions; empty without any."""
        questions, embed = self.held_out_questions, self.embed_queries
        if questions is None or embed is None:
            return {}
        found = evaluate_answers(_as_stored(self.policy), self.scorer, questions, self.config, embed_queries=embed)
        self.say(f"held-out questions: {found}")
        return {"held_out_questions": found}

    def _evaluate_splits(self, names: Sequence[Split], windows: int) -> dict[str, Any]:
        run = partial(self.evaluate, windows=windows)
        return dict(evaluate_splits(self.shards, names, run, summary=summary, say=self.say))

    def _finish(self) -> None:
        self.say("writing the checkpoint")
        self.save_checkpoint({})
        splits = self._evaluate_splits(("held_out", "reported"), self.config.evaluation_windows)
        result = self._evaluate_questions() | splits
        (self.folder / EVALUATION_FILE).write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
        self.save_checkpoint(result)

    def save_checkpoint(self, evaluation: dict[str, Any]) -> Checkpoint:
        """Write `checkpoint/`: the base with this policy, and what it was trained on in its training.json."""
        final = self.folder / "checkpoint"
        temporary = final.with_name(f"{final.name}.{os.getpid()}.tmp")
        shutil.rmtree(temporary, ignore_errors=True)
        shutil.copytree(self.base.folder or Path(), temporary)
        made = replace(
            self.base,
            config=replace(self.base.config, policy=self._policy_shape(self.policy.query_dim, self.policy.match_dim)),
            policy=_as_stored(self.policy).cpu(),
        )
        made.save(temporary)
        _write_record(temporary / TRAINING_FILE, self._record(evaluation))
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        return Checkpoint.load(final)

    def _record(self, evaluation: dict[str, Any]) -> dict[str, Any]:
        return {
            "config": self.config.to_json(),
            "base": self.base.fingerprint,
            "data_fingerprint": self.shards.fingerprint,
            "instructions_fingerprint": None if self.questions is None else self.questions.fingerprint,
            "step": self.step,
            "seconds": self.elapsed,
            "device": torch.cuda.get_device_name() if self.device.type == "cuda" else "cpu",
            "torch": torch.__version__,
            "metrics": self.last_report,
            "evaluation": evaluation,
        }

    # --- state

    @property
    def _bindings(self) -> Bindings:
        fingerprints = {
            "data": ("token shards", self.shards.fingerprint),
            "base": ("checkpoint", self.base.fingerprint),
            "instructions": ("instructions", None if self.questions is None else self.questions.fingerprint),
        }
        return Bindings(self.config.resume_settings, fingerprints)

    def save(self) -> None:
        """Write `state/`, the whole or nothing of it."""
        save_state(
            self.folder,
            bindings=self._bindings,
            counters={"step": self.step, "elapsed": self.elapsed},
            weights=self._weights(),
            moments=self._moments(),
        )

    def _weights(self) -> dict[str, Tensor]:
        parts = {"policy": self.policy} | ({} if self.reference is None else {"reference": self.reference})
        return {
            f"{part}.{name}": weight.detach().clone()
            for part, module in parts.items()
            for name, weight in module.state_dict().items()
        }

    def _moments(self) -> dict[tuple[str, str], Tensor]:
        return {
            (name, kind): value
            for name, weight in self.policy.named_parameters()
            for kind, value in self.optimizer.state[weight].items()
        }

    def _resume(self) -> bool:
        """Continue from `state/` where there is one."""
        state = load_state(self.folder, self._bindings)
        if state is None:
            return False
        weights = state.weights(self.device)
        _load_part(self.policy, weights, "policy", state.folder)
        if any(name.startswith("reference.") for name in weights):
            self.reference = deepcopy(self.policy).eval().requires_grad_(False)
            _load_part(self.reference, weights, "reference", state.folder)
        own = dict(self.policy.named_parameters())
        for name, kind, value in state.moments(self.device):
            # AdamW counts steps in a float32 tensor that stays on the CPU unless it is fused.
            self.optimizer.state[own[name]][kind] = value
        self.step, self.elapsed = state.counters["step"], state.counters["elapsed"]
        return True


def _load_part(module: PointerPolicy, weights: dict[str, Tensor], part: str, folder: Path) -> None:
    own = {name.removeprefix(f"{part}."): value for name, value in weights.items() if name.startswith(f"{part}.")}
    try:
        module.load_state_dict(own)
    except RuntimeError as error:
        raise unusable(folder / WEIGHTS_FILE, f"it has other weights than the policy: {error}") from error


def _check_base(base: Checkpoint, config: PolicyTrainingConfig) -> None:
    if not base.config.trained:
        raise ConfigError(
            f"checkpoint {config.checkpoint} is not trained, and a policy for chunk vectors that mean nothing would "
            f"learn nothing; expected one after reconstruction and next-paragraph training"
        )
    check_chunk_sizes(base, config.chunk_sizes, config.checkpoint)


@torch.no_grad()
def _as_stored(policy: PointerPolicy) -> PointerPolicy:
    """A copy with weights rounded to float16, as a checkpoint stores them, for inference."""
    return deepcopy(policy).half().float().eval().requires_grad_(False)


def _write_record(path: Path, record: dict[str, Any]) -> None:
    """Add the policy's training to the base's own record."""
    known = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    text = json.dumps({**known, "policy_trained": True, "policy": record}, indent=2)
    path.write_text(text + "\n", encoding="utf-8")


def summary(result: dict[str, Any]) -> str:
    """An evaluation in one line."""
    parts = []
    for layout in ("next_paragraph", "shuffled"):
        for key, row in result.get(layout, {}).items():
            losses = " ".join(f"{name} {loss:.4f}" for name, loss in row["losses"].items())
            gains = " ".join(
                f"{name} {gain['nats']:+.4f} [{gain['interval'][0]:+.4f}, {gain['interval'][1]:+.4f}]"
                for name, gain in row["gains"].items()
            )
            parts.append(f"{layout} k={key.removeprefix('chunk_size_')} {losses} {gains}")
    return " | ".join(parts)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0 done, 1 failed, 2 wrong usage, 4 stopped before its end and to be resumed."""
    parser = argparse.ArgumentParser(prog="python -m refrag_core.training.policy_loop", description=__doc__)
    parser.add_argument("config", type=Path)
    parser.add_argument("--set", action="append", default=[], metavar="KEY=VALUE", help="override one setting")
    given = parser.parse_args(arguments)
    try:
        config = load_policy_config(given.config, given.set)
        torch.set_float32_matmul_precision("high")
        return 0 if PolicyTrainer(config).run() else 4
    except RefragError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, UsageError) else 1


if __name__ == "__main__":
    sys.exit(main())
