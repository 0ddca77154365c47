import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from refrag_core import packing
from refrag_core.checkpoint import Checkpoint
from refrag_core.errors import ConfigError, TrainingDivergedError
from refrag_core.packing import pack_checkpoint, pack_options
from refrag_core.policy import policy_logits, select
from refrag_core.training import policy_loop
from refrag_core.training.batches import next_paragraph_batch, random_masks
from refrag_core.training.loop import Trainer
from refrag_core.training.losses import token_nll
from refrag_core.training.policy_config import PolicyTrainingConfig, load_policy_config, parse_policy_config
from refrag_core.training.policy_data import (
    EncodedContexts,
    PolicyExample,
    composed_slots,
    make_example,
    shuffled_contexts,
)
from refrag_core.training.policy_evaluate import chance_of_a_hit, learned_masks
from refrag_core.training.policy_loop import PolicyTrainer
from refrag_core.training.token_shards import TokenShards, Windows
from tests.refrag_core.training.conftest import WORDS, settings


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory, data: Path, models: tuple[Path, Path]) -> Path:
    """A checkpoint after two steps of training."""
    folder = tmp_path_factory.mktemp("base")
    assert Trainer(settings(data, models, folder, steps=2)).run()
    return folder / "checkpoint"


def values(data: Path, trained: Path, output: Path, **changes: Any) -> dict[str, Any]:
    """A run of seconds on a CPU."""
    return {
        "data": str(data),
        "output": str(output),
        "checkpoint": str(trained),
        "chunk_sizes": [2, 4],
        "context_tokens": 32,
        "output_tokens": 8,
        "expansion_fractions": [0.1, 0.25],
        "batch_windows": 8,
        "group_size": 4,
        "warm_start_masks": 4,
        "steps": 6,
        "device": "cpu",
        "precision": "fp32",
        "width": 16,
        "log_every": 1,
        "evaluation_windows": 8,
        "evaluation_fraction": 0.25,
    } | changes


def policy_settings(data: Path, trained: Path, output: Path, **changes: Any) -> PolicyTrainingConfig:
    return parse_policy_config(values(data, trained, output, **changes))


def lines(folder: Path) -> list[dict[str, Any]]:
    made = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{key: value for key, value in line.items() if key != "seconds"} for line in made]


class PlantedScorer:
    """Rewards a mask for the one chunk whose embedding is marked in its first number."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def encode(self, example: PolicyExample) -> EncodedContexts:
        contexts: EncodedContexts = self._real.encode(example)
        first = contexts.embeddings[:, :, 0]
        marks = torch.nn.functional.one_hot(first.argmax(dim=-1), first.shape[1])
        contexts.embeddings[:, :, 0] = 5.0 * marks
        return contexts

    def rewards(self, contexts: EncodedContexts, masks: Tensor, count: int) -> Tensor:
        marked = contexts.embeddings[:, :, 0].argmax(dim=-1)
        return masks.gather(-1, marked[:, None, None].expand(-1, masks.shape[1], 1)).squeeze(-1).float()


@pytest.mark.parametrize("warm_start_share", [0.0, 1.0])
def test_each_stage_learns_to_find_the_marked_chunk(
    tmp_path: Path, data: Path, trained: Path, warm_start_share: float
) -> None:
    config = policy_settings(
        data,
        trained,
        tmp_path,
        steps=60,
        chunk_sizes=[4],
        expansion_fractions=[0.125],
        warm_start_fraction=0.125,
        warm_start_share=warm_start_share,
        warm_start_masks=32,
        group_size=8,
        batch_windows=16,
        width=32,
        learning_rate=3e-3,
        warm_start_learning_rate=3e-3,
        log_every=1000,
    )
    trainer = PolicyTrainer(config)
    trainer.scorer = PlantedScorer(trainer.scorer)  # type: ignore[assignment]

    def found() -> float:
        """Share of the marked chunks that the policy picks first, in contexts of its own."""
        example = make_example(config, trainer.windows, 100_000, make_queries=None)
        contexts = trainer.scorer.encode(example)
        masks = learned_masks(trainer.policy, contexts, 1)[:, None]
        return float(trainer.scorer.rewards(contexts, masks, 1).mean())

    for _ in range(config.steps):
        trainer._train_step()
    assert found() >= 0.8  # chance is 1/8


def test_a_resumed_run_has_the_same_metrics_bit_for_bit(tmp_path: Path, data: Path, trained: Path) -> None:
    changes: dict[str, Any] = {"steps": 8, "save_every": 5}
    assert PolicyTrainer(policy_settings(data, trained, tmp_path / "whole", **changes)).run()
    killed = PolicyTrainer(policy_settings(data, trained, tmp_path / "parts", **changes))
    finish = killed.save

    def save_and_die() -> None:
        finish()
        raise KeyboardInterrupt

    killed.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = PolicyTrainer(policy_settings(data, trained, tmp_path / "parts", **changes))
    assert resumed.step == 5
    assert resumed.reference is not None
    assert resumed.run()
    assert lines(tmp_path / "parts") == lines(tmp_path / "whole")
    parts, whole = (tmp_path / run / "checkpoint" / "policy.safetensors" for run in ("parts", "whole"))
    assert parts.read_bytes() == whole.read_bytes()


def test_both_stages_are_logged_and_evaluated(tmp_path: Path, data: Path, trained: Path) -> None:
    assert PolicyTrainer(policy_settings(data, trained, tmp_path, evaluate_every=3)).run()
    logged = lines(tmp_path)
    assert {"warm_start_loss", "reward", "reward_std", "entropy"} <= logged[0].keys()
    assert {"policy_loss", "reward", "advantage_std", "clip_fraction", "entropy", "divergence"} <= logged[-1].keys()
    assert any("held_out" in line for line in logged)
    result = json.loads((tmp_path / "evaluation.json").read_text())
    row = result["held_out"]["shuffled"]["chunk_size_4"]
    assert set(row["losses"]) == {"learned", "random", "last"}
    gain = row["gains"]["over_last"]
    assert gain["nats"] == pytest.approx(row["losses"]["last"] - row["losses"]["learned"])
    assert gain["interval"][0] <= gain["nats"] <= gain["interval"][1]


def test_documents_that_are_too_short_to_evaluate_stop_no_run(
    tmp_path: Path, data: Path, trained: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def too_short(*_: Any, **__: Any) -> None:
        raise ConfigError("no document has 40 tokens")

    monkeypatch.setattr(PolicyTrainer, "evaluate", too_short)
    assert PolicyTrainer(policy_settings(data, trained, tmp_path, evaluate_every=3)).run()
    skipped = {"skipped": "no document has 40 tokens"}
    assert [line["held_out"] for line in lines(tmp_path) if "held_out" in line] == [skipped]
    assert json.loads((tmp_path / "evaluation.json").read_text())["held_out"] == skipped


def test_a_state_from_before_a_setting_existed_resumes_where_it_changes_nothing(data: Path, trained: Path) -> None:
    settings = {
        match_dim: policy_settings(
            data, trained, data, query_conditioned=True, query_tokens=3, match_dim=match_dim
        ).resume_settings
        for match_dim in (0, 8)
    }
    assert "match_dim" not in settings[0]
    assert settings[8] == settings[0] | {"match_dim": 8}


def test_the_checkpoint_is_the_base_with_another_policy(tmp_path: Path, data: Path, trained: Path) -> None:
    trainer = PolicyTrainer(policy_settings(data, trained, tmp_path, steps=3))
    assert trainer.run()
    base, made = Checkpoint.load(trained), Checkpoint.load(tmp_path / "checkpoint")
    assert not base.config.policy.trained
    assert made.config.policy.trained
    assert made.encode_fingerprint == base.encode_fingerprint
    assert made.fingerprint != base.fingerprint
    for file in base.config.weight_files:
        assert (tmp_path / "checkpoint" / file.name).read_bytes() == (trained / file.name).read_bytes()
    stored = load_file(tmp_path / "checkpoint" / "policy.safetensors")
    assert all(weight.dtype == torch.float16 for weight in stored.values())
    record = json.loads((tmp_path / "checkpoint" / "training.json").read_text())
    assert record["policy_trained"]
    assert record["policy"]["step"] == 3
    assert record["step"] == 2

    # What a host selects is what training evaluated.
    example = make_example(trainer.config, trainer.windows, 50, make_queries=None)
    contexts = trainer.scorer.encode(example)
    embeddings = contexts.embeddings.half().numpy()
    expected = learned_masks(policy_loop._as_stored(trainer.policy), contexts, example.count).numpy()
    for row, mask in zip(embeddings, expected, strict=True):
        logits = policy_logits(made.policy, row)
        fraction = example.expansion_fraction
        chosen = select("learned", num_chunks=len(row), expansion_fraction=fraction, logits=logits)
        assert np.array_equal(chosen, mask)


def test_a_policy_with_queries_is_trained_and_goes_on(
    tmp_path: Path, data: Path, trained: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(packing, "SHORT_NAMES", {})  # no real model is looked at
    changes = {"query_conditioned": True, "query_tokens": 3, "retriever": str(models[0]), "steps": 3}
    assert PolicyTrainer(policy_settings(data, trained, tmp_path / "one", **changes)).run()
    made = Checkpoint.load(tmp_path / "one" / "checkpoint")
    assert made.config.policy.query_dim == 48
    again = PolicyTrainer(policy_settings(data, tmp_path / "one" / "checkpoint", tmp_path / "two", **changes))
    for name, weight in made.policy.state_dict().items():
        assert torch.equal(again.policy.state_dict()[name], weight)
    pack_checkpoint(made, tmp_path / "packed", pack_options("int8"))
    packed = PolicyTrainer(policy_settings(data, tmp_path / "packed", tmp_path / "three", **changes))
    for name, weight in Checkpoint.load(tmp_path / "packed").policy.state_dict().items():
        assert torch.equal(packed.policy.state_dict()[name], weight)
    example = make_example(again.config, again.windows, 0, make_queries=again.make_queries)
    assert example.queries is not None
    assert example.queries.shape == (8, 48)


def test_a_trained_policy_goes_on_with_a_match_term(
    tmp_path: Path, data: Path, trained: Path, models: tuple[Path, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    changes = {"query_conditioned": True, "query_tokens": 3, "retriever": str(models[0]), "steps": 3}
    assert PolicyTrainer(policy_settings(data, trained, tmp_path / "one", **changes)).run()
    base = Checkpoint.load(tmp_path / "one" / "checkpoint")
    changes["match_dim"] = 5
    trainer = PolicyTrainer(policy_settings(data, tmp_path / "one" / "checkpoint", tmp_path / "two", **changes))
    assert "goes on from the checkpoint's trained policy, with a new term of match_dim 5" in capsys.readouterr().err
    start = trainer.policy.state_dict()
    assert all(torch.equal(start[name], weight) for name, weight in base.policy.state_dict().items())
    assert not start["match.chunk.weight"].any()
    assert trainer.run()
    made = Checkpoint.load(tmp_path / "two" / "checkpoint")
    assert made.config.policy == replace(base.config.policy, match_dim=5)
    assert made.policy.state_dict()["match.chunk.weight"].any()

    # It goes on as it is, also where the config asks for no term; one of another width begins anew.
    for name, match_dim in (("three", 5), ("four", 0)):
        config = policy_settings(
            data, tmp_path / "two" / "checkpoint", tmp_path / name, **changes | {"match_dim": match_dim}
        )
        again = PolicyTrainer(config)
        weights = again.policy.state_dict()
        assert torch.equal(weights["match.chunk.weight"], made.policy.state_dict()["match.chunk.weight"])
    assert again.run()
    assert Checkpoint.load(tmp_path / "four" / "checkpoint").config.policy == made.config.policy
    other = policy_settings(data, tmp_path / "two" / "checkpoint", tmp_path / "five", **changes | {"match_dim": 6})
    capsys.readouterr()
    assert PolicyTrainer(other).policy.match_dim == 6
    assert "begins a new policy" in capsys.readouterr().err


def questions_file(path: Path) -> Path:
    """Questions about the same passage, each with an answer in another place."""
    passage = " ".join(WORDS[:14])
    records = [
        {"id": word, "question": word * 3, "answer": word, "passages": [passage], "gold": [0]} for word in WORDS[:14:4]
    ]
    path.write_text("".join(f"{json.dumps(record)}\n" for record in records), encoding="utf-8")
    return path


def test_a_policy_learns_which_chunks_answer_a_question(
    tmp_path: Path, data: Path, trained: Path, models: tuple[Path, Path]
) -> None:
    file = str(questions_file(tmp_path / "questions.jsonl"))
    changes = {
        "query_conditioned": True,
        "query_tokens": 3,
        "retriever": str(models[0]),
        "instructions": file,
        "held_out_instructions": file,
        "instruction_share": 1.0,
        "warm_start_share": 1.0,
        "context_tokens": 128,
        "evaluation_fraction": 0.1,
        "steps": 150,
        "evaluate_every": 100,
        "width": 32,
        "warm_start_learning_rate": 5e-3,
    }
    trainer = PolicyTrainer(policy_settings(data, trained, tmp_path / "run", **changes))
    before = trainer._evaluate_questions()["held_out_questions"]
    assert trainer.run()
    after = json.loads((tmp_path / "run" / "evaluation.json").read_text())["held_out_questions"]
    assert before["questions"] == after["questions"] == 4
    assert after["chunk_size_4"]["learned"] == 1.0
    meanwhile = [line["held_out_questions"] for line in lines(tmp_path / "run") if "held_out" in line]
    assert [found["questions"] for found in meanwhile] == [4]
    assert before["chunk_size_4"]["random"] < 0.3
    assert before["chunk_size_4"]["learned"] < 1.0


def test_the_chance_of_a_hit_by_hand() -> None:
    assert chance_of_a_hit(4, 1, 1) == pytest.approx(0.25)
    assert chance_of_a_hit(4, 2, 2) == pytest.approx(1 - 1 / 6)
    assert chance_of_a_hit(3, 2, 2) == 1.0


def test_steps_on_questions_and_on_text_alternate_and_resume(
    tmp_path: Path, data: Path, trained: Path, models: tuple[Path, Path]
) -> None:
    changes = {
        "query_conditioned": True,
        "query_tokens": 3,
        "retriever": str(models[0]),
        "instructions": str(questions_file(tmp_path / "questions.jsonl")),
        "instruction_share": 0.5,
        "steps": 12,
        "save_every": 5,
    }
    whole = PolicyTrainer(policy_settings(data, trained, tmp_path / "whole", **changes))
    assert whole.run()
    kinds = [
        next(key for key in line if key.endswith("_loss"))
        for line in lines(tmp_path / "whole")
        if "reward" in line or "answer_loss" in line
    ]
    assert set(kinds) == {"answer_loss", "warm_start_loss", "policy_loss"}
    interrupted = PolicyTrainer(policy_settings(data, trained, tmp_path / "parts", **changes))
    for _ in range(7):
        interrupted._train_step()
    interrupted.save()
    with pytest.raises(ConfigError, match="other instructions"):
        PolicyTrainer(policy_settings(data, trained, tmp_path / "parts", **changes | {"instructions": None}))
    resumed = PolicyTrainer(policy_settings(data, trained, tmp_path / "parts", **changes))
    assert resumed.step == 7
    assert resumed.run()
    for name, weight in whole.policy.state_dict().items():
        assert torch.equal(resumed.policy.state_dict()[name], weight)


def test_rewards_are_those_of_the_training_batches(tmp_path: Path, data: Path, trained: Path) -> None:
    trainer = PolicyTrainer(policy_settings(data, trained, tmp_path))
    config = trainer.config
    windows = Windows(TokenShards.open(data).split("train"), length=40, seed=3).take(0, 3)
    example = PolicyExample(windows[:, :32], windows[:, 32:], 4, 0.25, None)
    contexts = trainer.scorer.encode(example)
    masks = np.stack([random_masks(3, 8, 2, np.random.default_rng(seed)) for seed in range(2)], axis=1)
    found = trainer.scorer.rewards(contexts, torch.from_numpy(masks), 2)
    model = trainer.scorer._model
    for group in range(2):
        batch = next_paragraph_batch(example.context, example.output, chunk_size=4, expansion_mask=masks[:, group])
        arrays = [torch.from_numpy(a) for a in (batch.ids, batch.chunk_ids, batch.places, batch.predict_at)]
        with torch.no_grad():
            nll = token_nll(model(*arrays), model.head, torch.from_numpy(batch.targets).flatten())
        expected = -nll.view(3, 8)[:, config.first_scored :].mean(dim=1)
        torch.testing.assert_close(found[:, group], expected, atol=2e-3, rtol=0)


def test_slots_by_hand() -> None:
    chunks = torch.tensor([[[10, 11], [20, 21], [30, 31]]])
    masks = torch.tensor([[[False, True, False], [True, False, False]]])
    slots, expanded, tokens = composed_slots(chunks, masks, 1)
    assert slots.tolist() == [[[0, 1, 1, 2], [0, 0, 1, 2]]]
    assert expanded.tolist() == [[[False, True, True, False], [True, True, False, False]]]
    assert tokens[expanded].tolist() == [20, 21, 10, 11]


def test_shuffled_contexts_keep_what_precedes_the_output_once() -> None:
    context = np.arange(6)[:, None] * 100 + np.arange(8)
    documents = np.array([0, 0, 1, 2, 3, 3])
    made = shuffled_contexts(context, documents, passages=4, random=np.random.default_rng(0)).reshape(6, 4, 2)
    of = documents[made[:, :, 0] // 100]
    for row in range(6):
        own = np.flatnonzero(of[row] == documents[row])
        assert len(own) == 1
        assert made[row, own[0]].tolist() == context[row, 6:].tolist()
        assert sorted(of[row]) == [0, 1, 2, 3]
    assert len({int(np.flatnonzero(of[row] == documents[row])[0]) for row in range(6)}) > 1
    with pytest.raises(ConfigError, match="of 2 documents; expected at least 4"):
        shuffled_contexts(context, documents // 2, passages=4, random=np.random.default_rng(0))


def test_an_untrained_base_and_other_chunk_sizes_are_refused(tmp_path: Path, data: Path, trained: Path) -> None:
    with pytest.raises(ConfigError, match="chunk_sizes has 8, and checkpoint"):
        PolicyTrainer(policy_settings(data, trained, tmp_path, chunk_sizes=[8]))
    base = Checkpoint.load(trained)
    replace(base, config=replace(base.config, trained=False)).save(tmp_path / "untrained")
    with pytest.raises(ConfigError, match="is not trained"):
        PolicyTrainer(policy_settings(data, tmp_path / "untrained", tmp_path))


def test_other_settings_are_not_resumed(tmp_path: Path, data: Path, trained: Path) -> None:
    trainer = PolicyTrainer(policy_settings(data, trained, tmp_path))
    trainer.folder.mkdir(exist_ok=True)
    trainer.save()
    with pytest.raises(ConfigError, match="other settings"):
        PolicyTrainer(policy_settings(data, trained, tmp_path, seed=1))


def test_values_that_are_no_numbers_are_one_error(tmp_path: Path, data: Path, trained: Path) -> None:
    trainer = PolicyTrainer(policy_settings(data, trained, tmp_path))
    with torch.no_grad():
        trainer.policy.logit.bias.fill_(math.nan)
    with pytest.raises(TrainingDivergedError, match="lower the learning rates"):
        trainer.run()


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"colour": 1}, "unknown colour"),
        ({"expansion_fractions": [0.0, 0.1]}, "expected numbers between 0 and 1"),
        ({"shuffled_share": 1.5}, "expected a share"),
        ({"query_conditioned": True, "query_tokens": 8}, "are not scored"),
        ({"instructions": "questions.jsonl"}, "does not see the question"),
        ({"match_dim": 4}, "has no query to compare with"),
        ({"instruction_share": 1.5}, "expected a share"),
        ({"context_tokens": 24}, "no multiple of 4 passages"),
        ({"group_size": 1}, "2 or more"),
        ({"width": 18}, "divisible by num_heads"),
        ({"clip": 1.0}, "below 1"),
        ({"precision": "fp8"}, "expected one of bf16, fp32"),
    ],
)
def test_bad_settings_are_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        policy_settings(tmp_path, tmp_path, tmp_path, **changes)


def test_a_config_without_checkpoint_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="no checkpoint"):
        parse_policy_config({"data": "data", "output": "run"})


def test_the_command_line(
    tmp_path: Path,
    data: Path,
    trained: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch, "set_float32_matmul_precision", lambda _: None)
    plain = values(data, trained, tmp_path / "run", steps=50)
    text = "\n".join(f"{key} = {json.dumps(value)}" for key, value in plain.items())
    (tmp_path / "policy.toml").write_text(text)
    assert policy_loop.main([str(tmp_path / "policy.toml"), "--set", "stop_after_seconds=0.01"]) == 4
    assert policy_loop.main([str(tmp_path / "policy.toml"), "--set", "steps=one"]) == 2
    assert "steps" in capsys.readouterr().err
    assert load_policy_config(Path("benchmarks/training/policy.toml")).seconds == 80.0


def test_without_steps_a_policy_is_evaluated_and_stored(data: Path, trained: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"^steps is 0 and checkpoint .* has no trained policy of this shape"):
        PolicyTrainer(policy_settings(data, trained, tmp_path / "none", steps=0))
    assert PolicyTrainer(policy_settings(data, trained, tmp_path / "one")).run()
    start = tmp_path / "one" / "checkpoint"
    again = PolicyTrainer(policy_settings(data, start, tmp_path / "two", steps=0))
    assert again.run()
    assert again.step == 0
    one, two = (Checkpoint.load(folder).load_policy() for folder in (start, tmp_path / "two" / "checkpoint"))
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))
    assert "held_out" in json.loads((tmp_path / "two" / "evaluation.json").read_text())
