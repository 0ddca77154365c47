from pathlib import Path

import pytest

from refrag_core.errors import ConfigError
from refrag_core.training.config import load_config, parse_config
from refrag_core.training.policy_config import load_policy_config

TEXT = 'data = "d"\noutput = "o"\n[[tasks]]\nkind = "text"\n'


def write(folder: Path, text: str) -> Path:
    path = folder / "config.toml"
    path.write_text(text)
    return path


def test_overrides_reach_fields_and_tasks(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, TEXT), ["seed=7", "tasks.0.weight=0.5", "data=other", "chunk_sizes=[16]"])
    assert (config.seed, config.tasks[0].weight, config.data, config.chunk_sizes) == (7, 0.5, "other", (16,))


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("sed=1", "unknown sed"),
        ("seed", "no '='"),
        ("seed=x", "expected int"),
        ("steps=-1", "out of range"),
        ("micro_batches=0", "out of range"),
        ("compile=1", "expected bool"),
        ("precision=fp8", "one of bf16, fp32"),
        ("context_tokens=500", "power of two"),
        ("tasks.3.weight=1", "reaches nothing"),
        ("tasks.0.weight=0", "weight 0 at the start or at the end"),
        ("tasks.0.final_weight=0", "weight 0 at the start or at the end"),
        ("tasks.0.final_weight=-1", "out of range"),
        ('decoder_training="frozen"', "which is frozen"),
        ("adapter_signs=true", "signs are made of whole"),
        ("tasks.0.kind=sing", "one of reconstruct"),
        ("tasks.0.expansion_fractions=[1.5]", "out of range"),
        ("tasks=[{kind='interleaved', expansion_fractions=[0.0, 0.25]}]", "fractions that expand at least one"),
        ("tasks=[{kind='interleaved', expansion_fractions=[0.995]}]", "and leave one"),
        ("tasks=[{kind='recall', span_tokens=48}]", "divisor of output_tokens"),
        ("tasks=[{kind='recall', given_tokens=32}]", "fewer given than a span has"),
        ("tasks=[{kind='continuations', branches=47}]", r"size 16 there are 32 more .* behind 46 chunks; expected one"),
        ("tasks=[{kind='continuations', span_tokens=768}]", "behind 0 chunks; .* a shorter span"),
        ("tasks=[{kind='continuations', branches=0}]", "out of range"),
        ("tasks=[{kind='text', distillation=0.5}]", "teacher"),
        ("tasks=[{kind='next-paragraph', last_share=1.5}]", "last_share must be 0 to 1"),
        ("tasks=[{kind='next-paragraph', expansion_fractions=[1.0]}]", "which instruct alone may have"),
        ("tasks=[{kind='next-paragraph', exchanged_share=0.5}]", "next-paragraph has an exchanged_share"),
    ],
)
def test_what_is_wrong_is_named(tmp_path: Path, override: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        load_config(write(tmp_path, TEXT), [override])


def test_a_state_from_before_a_setting_existed_resumes_where_it_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path, TEXT)
    (before, *_), (after, *_) = (
        load_config(path, [f"tasks.0.last_share={share}"]).resume_settings["tasks"] for share in (0.0, 0.5)
    )
    assert "last_share" not in before
    assert after == before | {"last_share": 0.5}


def test_missing_settings_are_named() -> None:
    with pytest.raises(ConfigError, match="no data, output"):
        parse_config({"tasks": [{"kind": "text"}]})
    with pytest.raises(ConfigError, match="no tasks"):
        parse_config({"data": "d", "output": "o"})


def test_the_projects_configs_are_valid() -> None:
    paths = sorted((Path(__file__).parents[3] / "benchmarks" / "training").glob("*.toml"))
    assert paths
    for path in paths:
        (load_policy_config if path.stem.startswith("policy") else load_config)(path)


def test_a_task_gives_way_to_another_evenly() -> None:
    tasks = [{"kind": "reconstruct", "weight": 0.8, "final_weight": 0.2}, {"kind": "text", "weight": 0.1}]
    first, second = parse_config({"data": "d", "output": "o", "tasks": tasks}).tasks
    assert [first.weight_at(progress) for progress in (0.0, 0.5, 1.0)] == pytest.approx([0.8, 0.5, 0.2])
    assert [second.weight_at(progress) for progress in (0.0, 1.0)] == [0.1, 0.1]
