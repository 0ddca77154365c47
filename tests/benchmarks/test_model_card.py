"""A model card says what its files say and nothing else."""

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import model_card
from refrag_core.checkpoint import Checkpoint
from tests.tiny_models import checkpoint
from tests.trained_checkpoints import trained_looking

RUN = {
    "config": {"tasks": [{"kind": "next-paragraph", "weight": 0.55}], "chunk_sizes": [8, 16], "context_tokens": 512},
    "data_fingerprint": "d" * 64,
    "data": {
        "corpora": [{"name": "leads", "documents": 10_033, "tokens": 1_044_000, "near_duplicates": 3}],
        "splits": {"train": {"tokens": 1_000_000}, "held_out": {"tokens": 44_000}},
    },
    "step": 11_424,
    "epoch": 2,
    "seconds": 410.2,
    "device": "NVIDIA H100",
    "evaluation": {
        split: {"chunk_size_8": {"refrag": {"0": {"random": loss}}}}
        for split, loss in (("train", 2.1), ("held_out", 2.3))
    },
    "policy": {"step": 300, "seconds": 60.0, "device": "NVIDIA H100"},
}


def perplexity(fingerprint: str) -> dict[str, Any]:
    def better(nats: float) -> dict[str, Any]:
        return {"nats": nats, "interval": [nats - 0.05, nats + 0.05]}

    return {
        "settings": {
            "checkpoint_fingerprint": fingerprint,
            "shuffled": False,
            "device": "cpu",
            "decoder_dtype": "float32",
        },
        "corpus": {"source": "data/tokens", "split": "held_out", "windows": 256, "documents": 200},
        "context_tokens": 512,
        "output_tokens": 256,
        "chunk_size": 8,
        "none": 2.6,
        "full": 2.2,
        "wrong": 2.65,
        "refrag": {"0": {"random": 2.4, "learned": 2.4}, "0.1": {"random": 2.36, "learned": 2.31}},
        "gap_closed": {"0": {"random": 0.5, "learned": 0.5}, "0.1": {"random": 0.6, "learned": 0.725}},
        "compression": {"0": {"expanded_chunks": 0, "positions": 64}, "0.1": {"expanded_chunks": 6, "positions": 106}},
        "last_at_equal_positions": {
            "0": {"tokens": 64, "loss": 2.38, "gap_closed": 0.55},
            "0.1": {"tokens": 106, "loss": 2.35, "gap_closed": 0.625},
        },
        "intervals": {
            "gap_closed": {p: {policy: [0.4, 0.8] for policy in ("random", "learned")} for p in ("0", "0.1")},
            "better_than_last_tokens": {
                "0": {"random": better(-0.02), "learned": better(-0.02)},
                "0.1": {"random": better(0.08), "learned": better(0.06)},
            },
        },
        "embedding_storage": {
            "dtype": "int8",
            "bytes_per_source_token": 48.5,
            "compared_with": "float16",
            "its_bytes_per_source_token": 96.0,
            "gap_closed_change": {"0": {"random": -0.0012}},
        },
    }


def qa(fingerprint: str) -> dict[str, Any]:
    scores = {"answered": 12, "em": 0.25, "f1": None, "decoder_positions": 123.4}
    return {
        "checkpoint": fingerprint,
        "questions": 20,
        "top_k": 3,
        "retriever_mode": "strong",
        "gold_retrieved": 19,
        "settings": {"no context": scores, "learned p=0": scores},
        "equal_latency": {"0": {"full": scores, "full_passages": 0.5}},
    }


@pytest.fixture
def made(tmp_path: Path, own_cache: Path) -> Checkpoint:
    found = trained_looking(checkpoint(tmp_path / "models"), tmp_path / "refrag-toy")
    (tmp_path / "refrag-toy" / "training.json").unlink()
    return found


def card(made: Checkpoint, tmp_path: Path, **files: Any) -> str:
    assert made.folder is not None
    arguments = [str(made.folder)]
    for name, content in files.items():
        path = tmp_path / f"{name}.json"
        path.write_text(content if isinstance(content, str) else json.dumps(content))
        arguments += [f"--{name}", str(path)]
    assert model_card.main(arguments) == 0
    return (made.folder / "README.md").read_text(encoding="utf-8")


def test_a_card_of_everything(made: Checkpoint, tmp_path: Path) -> None:
    given = made.fingerprint
    text = card(made, tmp_path, runs=RUN, perplexity=perplexity(given), qa=qa(given), notes="- Knows no French.")
    lines = text.splitlines()
    assert lines[0] == "# refrag-toy"
    assert f"`{given}`" in text
    assert "| decoder's update, rank 4 | float16 | 0.0 |" in lines
    assert "| 1 | 11,424 | 410 | 3 | 8, 16 | NVIDIA H100 | next-paragraph 0.55 |" in lines
    assert "| 1, policy | 300 | 60 |  | 8, 16 | NVIDIA H100 | policy |" in lines
    assert "| leads | 10,033 | 1,044,000 | 3 |" in lines
    assert "Tokens by split: train 1,000,000, held_out 44,000." in lines
    assert "| 8 | 0 | 2.100 | 2.300 | +0.200 |" in lines
    assert "| p = 0 | 64 | 2.400 | 0.500 [0.400, 0.800] | -0.020 [-0.070, 0.030] |" in lines
    assert "| p = 0.1, learned | 106 | 2.310 | 0.725 [0.400, 0.800] | +0.060 [0.010, 0.110] |" in lines
    assert "| last 106 tokens | 106 | 2.350 | 0.625 |  |" in lines
    assert any(line.endswith("G changes by 0.0012 at most.") for line in lines)
    assert any(line.startswith("**qa**: 20 questions, top 3 passages, strong retriever") for line in lines)
    assert "| learned p=0 | 12 | 0.250 |  | 123 |" in lines
    assert "| 0.5 passages in full, the positions of p = 0 | 12 | 0.250 |  | 123 |" in lines
    assert "- Not better than the last tokens of the context at equal positions: tokens next tokens k=8 p=0." in lines
    assert lines[-1] == "- Knows no French."


def test_a_table_without_one_better_condition_is_named_whole(made: Checkpoint, tmp_path: Path) -> None:
    report = perplexity(made.fingerprint)
    report["intervals"]["better_than_last_tokens"]["0.1"] = report["intervals"]["better_than_last_tokens"]["0"]
    assert "equal positions: tokens next tokens k=8 whatever p and policy." in card(made, tmp_path, perplexity=report)


def test_what_was_not_given_is_not_told(made: Checkpoint, tmp_path: Path) -> None:
    text = card(made, tmp_path)
    assert [line for line in text.splitlines() if line.startswith("## ")] == ["## Parts", "## Limits"]
    bare = card(made, tmp_path, runs={"step": 7})
    assert "| 1 | 7 |  |  |  |  |  |" in bare
    assert "Token shards" not in bare


def test_the_largest_corpora_are_named_and_the_others_counted(made: Checkpoint, tmp_path: Path) -> None:
    corpora = [
        {"name": f"corpus-{number}", "documents": number, "tokens": 10 * number, "near_duplicates": 1}
        for number in range(1, 16)
    ]
    lines = card(made, tmp_path, runs=RUN | {"data": {"corpora": corpora}}).splitlines()
    assert "| corpus-15 | 15 | 150 | 1 |" in lines
    assert "| corpus-4 | 4 | 40 | 1 |" in lines
    assert "| 3 others, named in training.json | 6 | 60 | 3 |" in lines


def test_a_run_on_several_devices_says_so(made: Checkpoint, tmp_path: Path) -> None:
    text = card(made, tmp_path, runs=RUN | {"processes": 2})
    assert "| 1 | 11,424 | 410 | 3 | 8, 16 | 2 × NVIDIA H100 | next-paragraph 0.55 |" in text


def test_licences_are_those_of_known_base_models(made: Checkpoint) -> None:
    assert model_card.LICENCES["smollm2-135m-instruct"][1] == model_card.LICENCES["all-minilm-l6-v2"][1] == "Apache-2.0"
    assert any(
        f"| decoder | {made.config.decoder.reference} | its own |" == line for line in model_card.card_lines(made)
    )


@pytest.mark.parametrize(("kind", "source"), [("perplexity", "refrag eval perplexity"), ("qa", "refrag eval qa")])
def test_figures_of_another_checkpoint_are_refused(
    made: Checkpoint, tmp_path: Path, kind: str, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "result.json"
    path.write_text(json.dumps({"perplexity": perplexity, "qa": qa}[kind]("0" * 64)))
    assert model_card.main([str(made.folder), f"--{kind}", str(path)]) == 1
    assert f"error: a result of `{source}` is of checkpoint 000000000000" in capsys.readouterr().err
    assert made.folder is not None
    assert not (made.folder / "README.md").exists()


def test_a_file_that_is_no_result(made: Checkpoint, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert model_card.main([str(made.folder), "--qa", str(tmp_path / "none.json")]) == 2
    assert "expected the JSON of a command's --json" in capsys.readouterr().err


def test_a_policy_that_was_trained_twice_is_two_rows_of_one_run() -> None:
    again = RUN | {"policy": {"step": 200, "seconds": 700.0, "device": "cpu"}}
    rows = list(model_card._all_rows([RUN, again, RUN | {"step": 5}]))
    assert [row[0] for row in rows] == [1, "1, policy", "1, policy", 2, "2, policy"]
    assert [row[5] for row in rows] == ["NVIDIA H100", "NVIDIA H100", "cpu", "NVIDIA H100", "NVIDIA H100"]


def test_losses_on_training_documents_are_those_of_the_last_run_that_has_them() -> None:
    lines = list(model_card._gap_to_training([RUN, RUN | {"step": 9}, RUN | {"step": 10, "evaluation": {}}]))
    assert lines[1] == "Nats a token of compressed context, random chunks expanded, after run 2:"
    assert lines[-1] == "| 8 | 0 | 2.100 | 2.300 | +0.200 |"
    assert list(model_card._gap_to_training([{"step": 1, "evaluation": None}])) == []


def test_a_mean_says_of_what(made: Checkpoint, tmp_path: Path) -> None:
    averaged = [{"fingerprint": letter * 64, "weight": 0.5, "training": None} for letter in "ab"]
    lines = card(made, tmp_path, runs={"averaged": averaged}).splitlines()
    assert f"| 1 |  |  |  |  |  | mean of 0.5 × {'a' * 12}, 0.5 × {'b' * 12} |" in lines
