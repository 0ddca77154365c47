import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from refrag_core.checkpoint import initialise_checkpoint
from refrag_core.composition import COMPRESSED, ContextPassage, arrange
from refrag_core.errors import ConfigError, CorpusError
from refrag_core.evaluation.qa import ABSTENTION
from refrag_core.models import load_tokenizer
from refrag_core.template import PromptTemplate
from refrag_core.training.batches import NO_TOKEN
from refrag_core.training.config import parse_config
from refrag_core.training.instruct_data import (
    BatchShape,
    Instruction,
    InstructionSet,
    TokenizedExample,
    answers_by_kind,
    compose_example,
    drawn_mask,
    end_of_turn,
    exchanged,
    instruction_batch,
    padded_chunks,
    parse_instruction,
    read_instructions,
)
from refrag_core.training.loop import Trainer
from refrag_core.training.losses import IGNORED, token_nll
from refrag_core.training.micro_batches import make_example, plan_step
from tests.refrag_core.training.conftest import settings

TEMPLATE = PromptTemplate(
    bos=(90,),
    prefix=(91,),
    before_passages=(92,),
    passage_header=(),
    passage_footer=(93,),
    before_question=(94,),
    after_question=(),
    suffix=(95,),
    question_first=False,
)

RECORDS: list[dict[str, Any]] = [
    {
        "id": "a",
        "question": "What is the capital of France?",
        "answer": "Paris",
        "answers": ["Paris"],
        "passages": ["Rome is the capital of Italy.", "Paris is the capital of France. " * 2],
        "gold": [1],
        "kind": "fact",
    },
    {"id": "b", "question": "Who wrote it?", "answer": "", "passages": ["The river runs down to the sea."]},
    {
        "id": "c",
        "question": "What jumps?",
        "answer": "The fox",
        "passages": ["The quick brown fox jumps."],
        "gold": [0],
    },
]


def written(path: Path, records: list[Any]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")
    return path


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return written(tmp_path / "instructions.jsonl", [*RECORDS, ""])


def opened(file: Path, models: tuple[Path, Path], **changes: Any) -> InstructionSet:
    base = initialise_checkpoint(encoder_reference=str(models[0]), decoder_reference=str(models[1]))
    values: dict[str, Any] = {
        "template": base.config.template,
        "tokenizer": load_tokenizer(models[1]),
        "eos_ids": [1],
        "expansion_fractions": [0.0, 0.25, 0.99],
        "context_tokens": 64,
    }
    return InstructionSet.open(file, **values | changes)


def test_the_file_is_read(file: Path) -> None:
    first, second, third = read_instructions(file)
    assert first.gold == (1,)
    assert (second.answer, second.gold, second.kind) == ("", (), "")
    assert third.passages == ("The quick brown fox jumps.",)


def test_tokens_that_spell_the_answer_are_marked_as_whole_words_in_gold_passages(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    record = {
        "id": "a",
        "question": "How many?",
        "answer": "The fox",
        "passages": ["The fox runs.", "See the foxes. The quick brown the FOX jumps."],
        "gold": [1],
    }
    (made,) = opened(written(tmp_path / "one.jsonl", [record]), models).examples
    outside, inside = made.spells_answer
    assert not outside.any()
    tokenizer = load_tokenizer(models[1])
    assert tokenizer.decode(list(made.passages[1][inside])).strip() == "the FOX"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"question": " "}, "line 2: question is ' '; expected a text not blank"),
        ({"answer": None}, "line 2: answer is None; expected a text"),
        ({"passages": ["x", ""]}, "line 2: passages is not a list of texts"),
        ({"passages": [], "gold": []}, "line 2: an answer without passages"),
        ({"gold": [1]}, "line 2: gold is \\[1\\]; expected a list of numbers from 0 to 0"),
        ({"extra": 1}, "line 2: missing \\[\\], unknown \\['extra'\\]"),
        ({"id": "a"}, "line 2: id 'a' occurs twice"),
    ],
)
def test_a_bad_line_is_named(tmp_path: Path, change: dict[str, Any], message: str) -> None:
    record = {"id": "z", "question": "Which?", "answer": "this", "passages": ["text"], "gold": [0]} | change
    with pytest.raises(CorpusError, match=message):
        read_instructions(written(tmp_path / "bad.jsonl", [RECORDS[0], record]))


@pytest.mark.parametrize(("line", "message"), [("{", "here: not JSON"), ("[]", "here: a JSON list")])
def test_what_is_no_object_is_named(line: str, message: str) -> None:
    with pytest.raises(CorpusError, match=message):
        parse_instruction(line, where="here")


def test_an_empty_or_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match="has no examples"):
        read_instructions(written(tmp_path / "empty.jsonl", []))
    with pytest.raises(CorpusError, match="cannot be read"):
        read_instructions(tmp_path / "absent.jsonl")


def example() -> TokenizedExample:
    """Passages of 5 and 3 tokens: at k = 2 chunks of 2, 2, 1 and 2, 1."""
    passages = (np.arange(10, 15, dtype=np.int32), np.arange(20, 23, dtype=np.int32))
    answer, question = np.asarray([7, 8, 1], dtype=np.int32), np.asarray([30, 31], dtype=np.int32)
    spells = (np.zeros(5, dtype=np.bool_), np.asarray([False, True, True]))
    return TokenizedExample(
        question=question, answer=answer, passages=passages, gold=(False, True), spells_answer=spells
    )


def test_a_batch_by_hand() -> None:
    made = example()
    mask = np.asarray([False, True, False, False, True])
    arrangement = compose_example(TEMPLATE, made, 2, mask)
    c = COMPRESSED
    prompt = [90, 91, 92, c, 12, 13, c, 93, c, 22, 93, 94, 30, 31, 95]
    assert arrangement.ids.tolist() == prompt
    batch = instruction_batch([(arrangement, made)], chunk_size=2, shape=BatchShape(slots=20, chunks=4, targets=4))
    assert batch.ids.tolist() == [[*prompt, 7, 8, *[NO_TOKEN] * 3]]
    assert batch.chunk_ids.tolist() == [[[10, 11], [14, NO_TOKEN], [20, 21], [0, NO_TOKEN]]]
    assert batch.places.tolist() == [[3, 6, 8, 19]]
    assert batch.predict_at.tolist() == [[14, 15, 16, 19]]
    assert batch.targets.tolist() == [[7, 8, 1, IGNORED]]
    assert batch.ragged


def test_chunks_never_cross_passages() -> None:
    assert padded_chunks(example(), 4).tolist() == [[10, 11, 12, 13], [14, -1, -1, -1], [20, 21, 22, -1]]


def test_the_prompt_is_what_the_runtime_composes(file: Path, models: tuple[Path, Path]) -> None:
    """Token for token, from the tables that an index would hold of these passages."""
    base = initialise_checkpoint(encoder_reference=str(models[0]), decoder_reference=str(models[1]))
    instructions = opened(file, models)
    tokenizer = load_tokenizer(models[1])
    record, (made,) = RECORDS[0], [e for e in instructions.examples if len(e.passages) == 2]
    passages = [
        np.asarray(tokenizer.encode(text, add_special_tokens=False).ids, np.int32) for text in record["passages"]
    ]
    stored = [ContextPassage(ids, 8, np.zeros((-(-len(ids) // 8), 48), np.float16)) for ids in passages]
    mask = np.arange(sum(passage.num_chunks for passage in stored)) % 3 == 1
    question = tokenizer.encode(record["question"], add_special_tokens=False).ids
    expected = arrange(base.config.template, stored, mask, question, max_positions=512, max_new_tokens=8)
    arrangement = compose_example(instructions.template, made, 8, mask)
    assert arrangement.ids.tolist() == expected.ids.tolist()
    assert arrangement.compressed.tolist() == expected.compressed.tolist()
    batch = instruction_batch([(arrangement, made)], chunk_size=8, shape=instructions.shape(8, 0.99))
    count = len(expected.ids)
    assert batch.ids[0, :count].tolist() == expected.ids.tolist()
    assert tokenizer.decode(made.answer[:-1].tolist()) == "Paris"
    assert made.answer[-1] == 1


def test_a_question_without_an_answer_teaches_to_abstain(file: Path, models: tuple[Path, Path]) -> None:
    instructions = opened(file, models)
    texts = {load_tokenizer(models[1]).decode(made.answer[:-1].tolist()) for made in instructions.examples}
    assert texts == {"Paris", "The fox", ABSTENTION}


def test_control_tokens_in_text_stay_text(tmp_path: Path, models: tuple[Path, Path]) -> None:
    record = RECORDS[2] | {"question": "<|im_end|>?", "passages": ["<|eos|> is text."], "answer": "<|im_end|>"}
    (made,) = opened(written(tmp_path / "odd.jsonl", [record]), models).examples
    assert not {1, 3} & {*made.question.tolist(), *made.answer[:-1].tolist(), *made.passages[0].tolist()}


def test_distractors_that_are_too_much_are_left_out(file: Path, models: tuple[Path, Path]) -> None:
    whole = opened(file, models)
    gold = max(
        len(ids) for made in whole.examples for ids, is_gold in zip(made.passages, made.gold, strict=True) if is_gold
    )
    tight = opened(file, models, context_tokens=gold)
    assert tight.num_left_out == 0
    assert all(sum(map(len, made.passages)) <= gold for made in tight.examples)
    assert any(made.gold == (True,) and len(made.passages[0]) == gold for made in tight.examples)
    assert opened(file, models, context_tokens=gold - 1).num_left_out == 1
    abstaining = max(len(made.answer) for made in whole.examples)
    assert opened(file, models, max_answer_tokens=abstaining - 1).num_left_out == 1
    with pytest.raises(CorpusError, match="all 3 examples need more than 1 context tokens or 48"):
        opened(written(file, [RECORDS[2] | {"id": str(n)} for n in range(3)]), models, context_tokens=1)


def test_every_example_is_taken_once_an_epoch(file: Path, models: tuple[Path, Path]) -> None:
    instructions = opened(file, models)
    epochs = [[id(made) for made in instructions.take(start, 3)] for start in range(0, 60, 3)]
    assert all(len(set(epoch)) == 3 for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1
    assert [id(made) for made in opened(file, models).examples] != epochs[0]
    assert [made.answer.tolist() for made in opened(file, models).take(5, 4)] == [
        made.answer.tolist() for made in instructions.take(5, 4)
    ]


@pytest.mark.parametrize(("fraction", "count"), [(0.0, 0), (0.1, 1), (0.5, 3), (0.99, 5)])
def test_masks_expand_the_fraction(fraction: float, count: int) -> None:
    mask = drawn_mask(example(), 2, fraction, 1.0, np.random.default_rng(0))
    assert (len(mask), mask.sum()) == (5, count)


def test_chunks_of_gold_passages_are_drawn_by_their_weight() -> None:
    """Two of five chunks are gold: drawn first with probability 2w / (2w + 3), 2/5 at w = 1 and 4/5 at w = 6."""
    random = np.random.default_rng(0)
    for weight, expected in ((1.0, 0.4), (6.0, 0.8)):
        drawn = [drawn_mask(example(), 2, 0.2, weight, random)[3:].any() for _ in range(4000)]
        assert np.mean(drawn) == pytest.approx(expected, abs=0.03)


def test_the_turn_ends_as_in_the_template() -> None:
    assert end_of_turn(TEMPLATE, [5, 95, 91]) == 95
    assert end_of_turn(TEMPLATE, [5, 6]) == 5
    with pytest.raises(ConfigError, match="names no token that ends an answer"):
        end_of_turn(TEMPLATE, [])


def test_batches_of_a_chunk_size_and_fraction_have_one_shape(file: Path, models: tuple[Path, Path]) -> None:
    fractions = [0.0, 0.25, 0.99, 1.0]
    instructions = opened(file, models, expansion_fractions=fractions)
    for size in (2, 4, 8):
        random = np.random.default_rng(0)
        chunks = []
        for fraction in fractions:
            shapes = set()
            for position in range(3):
                batch = instructions.batch(
                    position, 2, chunk_size=size, expansion_fraction=fraction, gold_weight=2.0, random=random
                )
                shapes.add((batch.ids.shape, batch.chunk_ids.shape, batch.places.shape, batch.predict_at.shape))
                assert batch.ragged
                assert (batch.ids[:, -1] == NO_TOKEN).all()
                assert (batch.places[:, -1] == batch.ids.shape[1] - 1).all()
            assert len(shapes) == 1
            chunks.append(batch.chunk_ids.shape[1])
        assert chunks == sorted(chunks, reverse=True)
        assert chunks[-1] == 8  # none but padding
        assert size > 2 or chunks[0] > 8
    with pytest.raises(ConfigError, match=r"expansion_fraction 0\.5 is none of"):
        instructions.batch(0, 1, chunk_size=2, expansion_fraction=0.5, gold_weight=1.0, random=random)


def test_with_all_chunks_expanded_a_prompt_is_the_full_text(file: Path, models: tuple[Path, Path]) -> None:
    instructions = opened(file, models, expansion_fractions=[1.0])
    batch = instructions.batch(
        0, 3, chunk_size=4, expansion_fraction=1.0, gold_weight=1.0, random=np.random.default_rng(0)
    )
    assert (batch.places == batch.ids.shape[1] - 1).all()
    for row, made in zip(batch.ids.tolist(), instructions.take(0, 3), strict=True):
        text = " ".join(map(str, row))
        assert all(" ".join(map(str, ids.tolist())) in text for ids in made.passages)


def instruction(**changes: Any) -> Instruction:
    values: dict[str, Any] = {
        "id": "a",
        "question": "What is the capital of France?",
        "answer": "Paris",
        "passages": ("Rome is not Paris.", "PARIS, in France, is not Parisian: Paris is large."),
        "gold": (1,),
        "kind": "capital",
    }
    return Instruction(**values | changes)


def test_an_answer_is_exchanged_as_whole_words_in_gold_passages_alone() -> None:
    other = exchanged(instruction(), r"Lyon \1")  # nothing in it is a pattern
    assert other is not None
    assert other.answer == r"Lyon \1"
    assert other.passages == ("Rome is not Paris.", "PARIS, in France, is not Parisian: " + r"Lyon \1 is large.")
    assert (other.id, other.question, other.gold, other.kind) == ("a", instruction().question, (1,), "capital")


@pytest.mark.parametrize(
    ("changes", "answer"),
    [
        ({"answer": ""}, "Lyon"),  # there is nothing to exchange
        ({"gold": (0,), "passages": ("Rome is here.", "Paris")}, "Lyon"),  # not in a gold passage
        ({"question": "Is Paris large?"}, "Lyon"),
        ({}, "paris"),  # its own
        ({}, "Rome"),  # a distractor has it
        ({}, "France"),  # the question has it
        ({"passages": ("Rome.", "paris is large.")}, "Lyon"),  # in another case alone: it may be another word
        ({"answers": ("Paris", "Parisian")}, "Lyon"),  # another accepted form would stay
        ({"answer": "5%", "passages": ("Rome.", "It is 2.5%.")}, "7%"),  # a part of another number
    ],
)
def test_what_cannot_be_exchanged_stays(changes: dict[str, Any], answer: str) -> None:
    assert exchanged(instruction(**changes), answer) is None


@pytest.mark.parametrize(
    ("text", "expected"),
    [("12 of 2.12, 12,500 and 312", "90 of 2.12, 12,500 and 312"), ("12. 12, and 12", "90. 90, and 90")],
)
def test_a_number_is_exchanged_where_it_stands_by_itself(text: str, expected: str) -> None:
    other = exchanged(instruction(question="How many?", answer="12", passages=("None.", text)), "90")
    assert other is not None
    assert other.passages[1] == expected


def test_accepted_forms_are_read_and_a_fingerprint_has_them_where_answers_are_exchanged(
    tmp_path: Path, models: tuple[Path, Path]
) -> None:
    first = written(tmp_path / "first.jsonl", [RECORDS[0]])
    second = written(tmp_path / "second.jsonl", [RECORDS[0] | {"answers": ["Paris", "Paname"], "kind": "other"}])
    assert read_instructions(second)[0].answers == ("Paris", "Paname")
    before, after = ([opened(file, models, exchange=e).fingerprint for file in (first, second)] for e in (False, True))
    assert before[0] == before[1]
    assert len({*before, *after}) == 3
    with pytest.raises(CorpusError, match="line 1: answers is 'Paris'; expected a list of texts"):
        read_instructions(written(first, [RECORDS[0] | {"answers": "Paris"}]))


def test_what_would_not_fit_the_shape_stays(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """The other answer of its kind is longer than all rows: neither example is exchanged where that would not fit."""
    words = ["river", "the long and winding road"]
    records = [
        {"id": f"{n}", "question": "Which?", "answer": word, "passages": [text], "gold": [0], "kind": "w"}
        for n, (word, text) in enumerate(zip(words, ["It is river. " * 20, f"{words[1]}."], strict=True))
    ]
    file = written(tmp_path / "long.jsonl", records)
    instructions = opened(file, models, expansion_fractions=[0.0], context_tokens=1024)
    random = np.random.default_rng(0)
    (example,) = instructions._exchanged([0], 1.0, random).values()
    assert not instructions._fits(example, 8, 0.0, instructions.shape(8, 0.0))
    arguments: dict[str, Any] = {"chunk_size": 8, "expansion_fraction": 0.0, "gold_weight": 1.0}
    own = instructions.batch(0, 2, random=np.random.default_rng(1), **arguments)
    same = instructions.batch(0, 2, random=np.random.default_rng(1), exchanged_share=1.0, **arguments)
    row = [made.passages[0].tolist() for made in instructions.take(0, 2)].index(
        instructions.examples[0].passages[0].tolist()
    )
    assert same.ids[row].tolist() == own.ids[row].tolist()
    assert same.targets[row].tolist() == own.targets[row].tolist()
    tight = opened(
        file, models, expansion_fractions=[0.0], context_tokens=sum(map(len, instructions.examples[0].passages))
    )
    assert tight._exchanged([0], 1.0, random) == {}


def test_answers_are_gathered_by_kind() -> None:
    rows = [("Paris", "capital"), ("Rome", "capital"), ("Paris", "capital"), ("blue", "colour"), ("", "capital")]
    given = [instruction(id=str(n), answer=answer, kind=kind) for n, (answer, kind) in enumerate(rows)]
    assert answers_by_kind(given) == {"capital": ["Paris", "Rome"]}


def test_a_share_of_the_examples_has_another_answer(tmp_path: Path, models: tuple[Path, Path]) -> None:
    """Over many draws: each row either as it is, or with an answer of its kind in its passage too."""
    records = [
        {"id": f"{n}", "question": "Which?", "answer": word, "passages": [f"It is {word}."], "gold": [0], "kind": "w"}
        for n, word in enumerate(["river", "mountain", "stone"])
    ] + [{"id": "x", "question": "Which?", "answer": "alone", "passages": ["It is alone."], "gold": [0], "kind": "x"}]
    instructions = opened(written(tmp_path / "words.jsonl", records), models, expansion_fractions=[0.0])
    tokenizer = load_tokenizer(models[1])

    def rows(share: float, seed: int) -> list[tuple[str, str]]:
        batch = instructions.batch(
            0,
            4,
            chunk_size=64,
            expansion_fraction=0.0,
            gold_weight=1.0,
            random=np.random.default_rng(seed),
            exchanged_share=share,
        )
        answers = [
            tokenizer.decode([t for t in row if t not in (1, IGNORED)]).strip() for row in batch.targets.tolist()
        ]
        first = batch.chunk_ids[:, 0].tolist()
        return [
            (answer, tokenizer.decode([token for token in ids if token != NO_TOKEN]).strip())
            for answer, ids in zip(answers, first, strict=True)
        ]

    own = rows(0.0, 0)
    changed = 0
    for seed in range(60):
        for (answer, passage), (before, _) in zip(rows(0.5, seed), own, strict=True):
            assert passage == f"It is {answer}."
            assert before != "alone" or answer == "alone"  # no other answer of its kind
            changed += answer != before
        assert rows(0.5, seed) == rows(0.5, seed)
    assert changed / 60 == pytest.approx(1.5, abs=0.3)  # of the three rows that can change, each with probability 1/2


def with_instructions(data: Path, models: tuple[Path, Path], output: Path, file: Path, **changes: Any) -> Any:
    tasks = [
        {"kind": "instruct", "batch_rows": 4, "expansion_fractions": [0.0, 0.25], "gold_expansion_weight": 2.0},
        {"kind": "text", "batch_rows": 2, "weight": 0.5},
    ]
    values: dict[str, Any] = {"context_tokens": 64, "output_tokens": 8, "tasks": tasks, "instructions": str(file)}
    return settings(data, models, output, **values | changes)


def test_padding_changes_nothing(tmp_path: Path, data: Path, models: tuple[Path, Path], file: Path) -> None:
    """The same losses of the same answers, alone and without padding or among filled-up rows; finite gradients."""
    trainer = Trainer(with_instructions(data, models, tmp_path / "run", file))
    assert trainer.instructions is not None
    random = np.random.default_rng(0)
    made = [(e, drawn_mask(e, 4, 0.25, 1.0, random)) for e in trainer.instructions.examples]
    prompts = [(compose_example(trainer.instructions.template, e, 4, mask), e) for e, mask in made]

    def losses(chosen: list[Any], shape: BatchShape) -> list[list[float]]:
        batch = instruction_batch(chosen, chunk_size=4, shape=shape)
        arrays = [torch.from_numpy(a) for a in batch.arrays[:-1]]
        hidden = trainer.model(*arrays, ragged=batch.ragged)
        targets = torch.from_numpy(batch.targets).reshape(-1)
        nll = token_nll(hidden, trainer.model.head, targets).reshape(batch.targets.shape)
        return [row[: len(e.answer)].tolist() for row, (_, e) in zip(nll, chosen, strict=True)]

    together = losses(prompts, BatchShape(slots=512, chunks=80, targets=40))
    for (arrangement, e), found in zip(prompts, together, strict=True):
        slots, chunks = len(arrangement.ids) + len(e.answer), len(arrangement.compressed) + 1
        (alone,) = losses([(arrangement, e)], BatchShape(slots, chunks, len(e.answer)))
        assert alone == pytest.approx(found, abs=1e-4)
    assert trainer.run()
    assert all(weight.isfinite().all() for _, weight in trainer.model.named_parameters())


def test_answers_are_learnt(tmp_path: Path, data: Path, models: tuple[Path, Path], file: Path) -> None:
    config = with_instructions(
        data,
        models,
        tmp_path / "run",
        file,
        steps=40,
        adapter_rank=16,
        decoder_learning_rate=2e-2,
        tasks=[{"kind": "instruct", "batch_rows": 3}],
    )
    assert Trainer(config).run()
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    means = [np.mean(list(line["losses"].values())) for line in lines]
    assert all(name.startswith("instruct/k") for line in lines for name in line["losses"])
    assert np.mean(means[-5:]) < 0.5 * means[0]


def test_a_resumed_run_has_the_same_losses(tmp_path: Path, data: Path, models: tuple[Path, Path], file: Path) -> None:
    changes: dict[str, Any] = {"steps": 6, "save_every": 3, "micro_batches": 2}
    assert Trainer(with_instructions(data, models, tmp_path / "whole", file, **changes)).run()
    first = Trainer(with_instructions(data, models, tmp_path / "parts", file, **changes))
    finish = first.save

    def save_and_die() -> None:
        finish()
        raise KeyboardInterrupt

    first.save = save_and_die  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        first.run()
    assert Trainer(with_instructions(data, models, tmp_path / "parts", file, **changes)).run()
    metrics = [
        [json.loads(line)["losses"] for line in (tmp_path / run / "metrics.jsonl").read_text().splitlines()]
        for run in ("whole", "parts")
    ]
    assert metrics[0] == metrics[1]
    written(file, RECORDS[:2])
    with pytest.raises(ConfigError, match="other token shards or instructions"):
        Trainer(with_instructions(data, models, tmp_path / "parts", file, **changes))


def test_the_setting_and_the_task_go_together(
    tmp_path: Path, data: Path, models: tuple[Path, Path], file: Path
) -> None:
    with pytest.raises(ConfigError, match="exactly where there is such a task"):
        with_instructions(data, models, tmp_path, file, tasks=[{"kind": "text"}])
    with pytest.raises(ConfigError, match="instructions is None"):
        parse_config({"data": "d", "output": "o", "tasks": [{"kind": "instruct"}]})
    config = with_instructions(data, models, tmp_path, file, tasks=[{"kind": "instruct"}])
    (planned,) = plan_step(config, position=0, step=0, progress=0.0)
    with pytest.raises(ConfigError, match="an instruct task has no examples"):
        make_example(config, Trainer(config).windows, planned, progress=0.0)


def test_gold_is_marked_through_the_cut(tmp_path: Path, models: tuple[Path, Path]) -> None:
    long = "The river runs down to the sea. " * 12
    record = Instruction("a", "Where?", "the sea", ("Rome is the capital.", long), (1,), "")
    file = written(
        tmp_path / "long.jsonl",
        [{f: getattr(record, f) for f in ("id", "question", "answer", "passages")} | {"gold": [1]}],
    )
    (made,) = opened(file, models, max_passage_tokens=64, context_tokens=4096).examples
    assert len(made.passages) > 2
    assert made.gold == (False, *[True] * (len(made.passages) - 1))
    assert all(len(ids) <= 64 for ids in made.passages)
