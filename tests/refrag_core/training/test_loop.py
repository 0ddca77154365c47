import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag_core.checkpoint import Checkpoint, initialise_checkpoint
from refrag_core.composition import ContextPassage, compose, pad_batch
from refrag_core.errors import ConfigError, ModelNotFoundError, TrainingDivergedError
from refrag_core.template import PromptTemplate
from refrag_core.training.batches import next_paragraph_batch
from refrag_core.training.loop import Trainer
from refrag_core.training.token_shards import TokenShards
from tests.refrag_core.training.conftest import settings

EMPTY = PromptTemplate(
    bos=(),
    prefix=(),
    before_passages=(),
    passage_header=(),
    passage_footer=(),
    before_question=(),
    after_question=(),
    suffix=(),
    question_first=False,
)


def losses(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line["losses"] for line in lines]


def test_reconstruction_is_learnt(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    config = settings(
        data,
        models,
        tmp_path,
        steps=250,
        chunk_sizes=[2],
        context_tokens=4,
        output_tokens=4,
        adapter_rank=16,
        decoder_learning_rate=2e-2,
        encoder_learning_rate=3e-3,
        projection_learning_rate=1e-2,
        log_every=10,
        tasks=[{"kind": "reconstruct", "batch_rows": 48}],
    )
    assert Trainer(config).run()
    made = [line["reconstruct/k2"] for line in losses(tmp_path)]
    uniform = math.log(400)
    assert made[-1] < 0.7 * uniform < made[0]


@pytest.mark.parametrize(("decoder_training", "optimizer"), [("lora", "adamw"), ("frozen", "adamw"), ("full", "muon")])
def test_a_resumed_run_has_the_same_losses_bit_for_bit(
    tmp_path: Path, data: Path, models: tuple[Path, Path], decoder_training: str, optimizer: str
) -> None:
    tasks = [{"kind": "reconstruct", "batch_rows": 4}, {"kind": "next-paragraph", "batch_rows": 4}]
    changes = {"steps": 6, "save_every": 3, "tasks": tasks}
    changes |= {"decoder_training": decoder_training, "encoder_optimizer": optimizer, "decoder_optimizer": optimizer}
    assert Trainer(settings(data, models, tmp_path / "whole", **changes)).run()
    killed = Trainer(settings(data, models, tmp_path / "parts", **changes))
    finish = killed.save

    def save_and_die() -> None:
        finish()
        raise KeyboardInterrupt

    killed.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        killed.run()
    resumed = Trainer(settings(data, models, tmp_path / "parts", **changes))
    assert resumed.step == 3
    assert resumed.run()
    assert losses(tmp_path / "parts") == losses(tmp_path / "whole")
    for name in ("encoder-00001.safetensors", "projection.safetensors"):
        parts, whole_run = (tmp_path / run / "checkpoint" / name for run in ("parts", "whole"))
        assert parts.read_bytes() == whole_run.read_bytes()


def test_other_settings_are_not_resumed(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    Trainer(settings(data, models, tmp_path, steps=1)).save()
    with pytest.raises(ConfigError, match="other settings"):
        Trainer(settings(data, models, tmp_path, steps=1, seed=1))


def test_a_loss_that_is_no_number_is_one_error(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    trainer = Trainer(settings(data, models, tmp_path))
    with torch.no_grad():
        trainer.model.projection.output.bias.fill_(math.nan)  # type: ignore[union-attr, operator]
    with pytest.raises(TrainingDivergedError, match="lower the learning rates"):
        trainer.run()


def test_the_checkpoint_computes_what_the_trained_model_did(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    """Encoded, composed and prefilled as a host does it, from the files: the same next-token logits."""
    trainer = Trainer(settings(data, models, tmp_path, steps=8, encoder_dtype="float32", adapter_dtype="float32"))
    assert trainer.run()
    made = trainer.model.eval()
    window = TokenShards.open(data).split("held_out").document(0)[:24].astype("int64")[None]
    mask = torch.tensor([[False, True, False, False]]).numpy()
    batch = next_paragraph_batch(window[:, :16], window[:, 16:], chunk_size=4, expansion_mask=mask)
    arrays: list[Any] = [torch.from_numpy(a) for a in (batch.ids, batch.chunk_ids, batch.places, batch.predict_at)]
    with torch.no_grad():
        expected = made(*arrays)[-1] @ made.head.T

    checkpoint = Checkpoint.load(tmp_path / "checkpoint")
    assert checkpoint.config.trained
    assert checkpoint.encode_fingerprint != trainer.base.encode_fingerprint
    chunks = window[0, :16].reshape(4, 4).astype("int32")
    embeddings = checkpoint.load_encoder().encode(chunks, torch.full((4,), 4).numpy())
    decoder = checkpoint.load_decoder()
    passage = ContextPassage(window[0, :16].astype("int32"), 4, embeddings)
    composed = compose(
        EMPTY, [passage], mask[0], window[0, 16:-1].tolist(), embed=decoder.embed, project=checkpoint.projection
    )
    found = decoder.prefill(pad_batch([composed.inputs_embeds])).logits[0]
    assert torch.allclose(found, expected, atol=2e-2)
    untrained = trainer.base.load_decoder().prefill(pad_batch([composed.inputs_embeds])).logits[0]
    assert not torch.allclose(found, untrained, atol=2e-2)


def test_training_goes_on_from_a_checkpoint(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    assert Trainer(settings(data, models, tmp_path / "one", encoder_dtype="float32", adapter_dtype="float32")).run()
    again = Trainer(settings(data, models, tmp_path / "two", checkpoint=str(tmp_path / "one" / "checkpoint")))
    stored = Checkpoint.load(tmp_path / "one" / "checkpoint")
    layers = stored.load_trained_layers()
    assert layers is not None
    name = next(name for name in layers if name.endswith("query.weight"))
    assert torch.equal(again.model.encoder.body.get_parameter(name), layers[name])  # type: ignore[union-attr]
    changes = {"checkpoint": str(tmp_path / "one" / "checkpoint"), "adapter_targets": ["q_proj"]}
    with pytest.raises(ConfigError, match="same adapter_targets"):
        Trainer(settings(data, models, tmp_path / "three", **changes))


def test_without_steps_a_run_stores_what_it_starts_from_in_its_own_form(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    """Of a rank that is enough nothing is lost, of a lower one something is, which the evaluation shows."""
    exact = {"encoder_dtype": "float32", "adapter_dtype": "float32", "decoder_training": "full"}
    assert Trainer(settings(data, models, tmp_path / "one", adapter_rank=32, steps=20, **exact)).run()
    start = {"checkpoint": str(tmp_path / "one" / "checkpoint"), "steps": 0}
    evaluations = {}
    for name, rank in (("same", 32), ("cut", 2)):
        trainer = Trainer(settings(data, models, tmp_path / name, adapter_rank=rank, **exact, **start))
        assert trainer.run()
        assert trainer.step == 0
        evaluations[name] = json.loads((tmp_path / name / "evaluation.json").read_text())
    first, same = (Checkpoint.load(tmp_path / name / "checkpoint").load_adapter() for name in ("one", "same"))
    assert first is not None
    assert same is not None
    for layer in first.layers:
        assert torch.allclose(first.update(layer).dense(first.scale), same.update(layer).dense(same.scale), atol=1e-4)
    before, after = (evaluations["cut"][key]["full"] for key in ("held_out_uncut", "held_out"))
    assert before == pytest.approx(evaluations["same"]["held_out"]["full"], abs=1e-3)
    assert abs(after - before) > 1e-3


def test_a_run_of_no_steps_stores_nothing_untrained(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    with pytest.raises(
        ConfigError, match=r"^steps is 0 and checkpoint is None, so that nothing trained would be stored"
    ):
        Trainer(settings(data, models, tmp_path / "none", steps=0))
    initialise_checkpoint(encoder_reference=str(models[0]), decoder_reference=str(models[1]), seed=0).save(
        tmp_path / "untrained"
    )
    with pytest.raises(ConfigError, match=r"untrained', so that .* name one, or train some steps$"):
        Trainer(settings(data, models, tmp_path / "fresh", steps=0, checkpoint=str(tmp_path / "untrained")))


def test_a_stage_whose_checkpoint_is_not_there_says_what_comes_first(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    message = (
        r"^the config's checkpoint cannot be loaded: .*stage-1.*\. Where it is .* train that first, or name another"
    )
    with pytest.raises(ModelNotFoundError, match=message):
        Trainer(settings(data, models, tmp_path / "run", checkpoint="runs/stage-1"))


def test_evaluation_has_every_condition(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    assert Trainer(settings(data, models, tmp_path, steps=2)).run()
    result = json.loads((tmp_path / "evaluation.json").read_text())
    assert set(result) == {"held_out", "train", "reported"}
    rows = result["held_out"]["chunk_size_4"]
    assert set(rows["refrag"]) == {"0", "0.1", "0.25"}
    assert rows["last"]["0"]["positions"] == 4
    assert rows["last"]["0.25"]["positions"] == 3 + 4
    assert set(rows["reconstruction"]) == {"4"}
    assert rows["recall"] > 0.0


def test_plain_text_can_be_held_to_the_decoder_before_training(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    tasks = [
        {"kind": "text", "batch_rows": 4, "distillation": 0.5, "teacher": "base"},
        {"kind": "recall", "batch_rows": 4, "span_tokens": 4, "given_tokens": 1, "expansion_fractions": [0.25]},
    ]
    changes = {"tasks": tasks, "decoder_training": "full", "steps": 12, "micro_batches": 2}
    assert Trainer(settings(data, models, tmp_path, **changes)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    divergences = [line["divergences"]["text"] for line in lines if "text" in line.get("divergences", ())]
    assert divergences[0] == pytest.approx(0.0, abs=1e-6)
    assert divergences[-1] > 1e-4
    assert {name for line in lines for name in line["losses"]} >= {"text", "recall/k2/p0.25", "recall/k4/p0.25"}


def test_many_continuations_of_a_text_are_learnt_at_once(tmp_path: Path, data: Path, models: tuple[Path, Path]) -> None:
    tasks = [{"kind": "continuations", "batch_rows": 4, "span_tokens": 4, "branches": 3, "distillation": 0.5}]
    trainer = Trainer(settings(data, models, tmp_path, tasks=tasks, steps=60, decoder_training="full", log_every=20))
    assert trainer.run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert {name for line in lines for name in line["losses"]} == {"continuations/k2", "continuations/k4"}
    assert min(value for line in lines for value in line["divergences"].values()) > 0.0
    assert lines[-1]["losses"]["continuations/k2"] < lines[0]["losses"]["continuations/k2"] - 0.1


def test_interleaved_text_is_learnt_from_the_decoder_that_reads_all_of_it(
    tmp_path: Path, data: Path, models: tuple[Path, Path]
) -> None:
    tasks = [
        {"kind": "interleaved", "batch_rows": 4, "span_tokens": 4, "expansion_fractions": [0.25], "distillation": 0.5}
    ]
    assert Trainer(settings(data, models, tmp_path, tasks=tasks, steps=6)).run()
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    divergences = [value for line in lines for value in line.get("divergences", {}).values()]
    assert {name for line in lines for name in line["losses"]} <= {"interleaved/k2/p0.25", "interleaved/k4/p0.25"}
    assert divergences
    assert min(divergences) > 0.0
