import json
from pathlib import Path

import pytest

from refrag_core.errors import ConfigError
from refrag_core.models import load_tokenizer
from refrag_core.template import INSTRUCTION, PromptTemplate, TurnTemplate, make_template, with_turns
from tests.tiny_models import decoder_folder


def text_of(folder: Path, *parts: tuple[int, ...]) -> str:
    ids = [index for part in parts for index in part]
    text: str = load_tokenizer(folder).decode(ids, skip_special_tokens=False)
    return text


def test_a_chat_template_is_rendered_once_and_split_at_the_content(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    template = make_template(folder)
    assert template.bos == (0,)
    assert text_of(folder, template.prefix) == f"<|im_start|>user\n{INSTRUCTION}\n\n"
    assert text_of(folder, template.suffix) == "<|im_end|>\n<|im_start|>assistant\n"
    specials = load_tokenizer(folder)
    assert template.suffix[0] == specials.token_to_id("<|im_end|>")


def test_the_parts_spell_the_rendered_prompt(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    t = make_template(folder)
    parts = (t.bos, t.prefix, t.before_passages, t.passage_footer, t.before_question, t.after_question, t.suffix)
    assert text_of(folder, *parts) == (
        f"<|bos|><|im_start|>user\n{INSTRUCTION}\n\nPassages:\n\n\nQuestion:\n<|im_end|>\n<|im_start|>assistant\n"
    )


def test_without_a_chat_template_it_is_plain_text(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path, chat=False)
    template = make_template(folder)
    assert template.bos == ()  # this tokenizer puts none before a text
    assert text_of(folder, template.prefix) == f"{INSTRUCTION}\n\n"
    assert text_of(folder, template.after_question, template.suffix) == "\n\nAnswer:"


@pytest.mark.parametrize("question_first", [False, True])
def test_json_round_trip(tmp_path: Path, question_first: bool) -> None:
    template = make_template(decoder_folder(tmp_path), question_first=question_first)
    assert PromptTemplate.from_json(json.loads(json.dumps(template.to_json()))) == template


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"prefix": [1, -2]}, "prefix must be a list of token ids"),
        ({"prefix": "ab"}, "prefix must be a list of token ids"),
        ({"prefix": [True]}, "prefix must be a list of token ids"),
        ({"question_first": 1}, "question_first must be true or false"),
        ({"extra": []}, "extra are missing or unknown"),
        ({"turns": [1]}, "turns must be an object"),
        ({"turns": {"before_answer": [1]}}, "after_answer are missing or unknown"),
        ({"turns": {"before_answer": [1], "after_answer": [-1]}}, "after_answer must be a list of token ids"),
    ],
)
def test_another_json_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    value = make_template(decoder_folder(tmp_path)).to_json() | change
    with pytest.raises(ConfigError, match=message):
        PromptTemplate.from_json(value)


def test_a_chat_template_that_repeats_its_content_is_refused(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    set_chat_template(folder, "{{ messages[0]['content'] }}{{ messages[0]['content'] }}")
    with pytest.raises(ConfigError, match="2 times in it"):
        make_template(folder)


def test_num_fixed_by_hand() -> None:
    template = PromptTemplate((1,), (2, 3), (4,), (5, 6), (7,), (8,), (), (9,), question_first=False)
    assert template.num_fixed(0) == 6
    assert template.num_fixed(2) == 12


# --- conversations


def set_chat_template(folder: Path, chat_template: str) -> None:
    path = folder / "tokenizer_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"chat_template": chat_template}))


def test_earlier_turns_spell_what_the_chat_template_renders(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    folder = decoder_folder(tmp_path)
    template, tokenizer = make_template(folder), load_tokenizer(folder)
    ids = [
        tokenizer.encode(text, add_special_tokens=False).ids for text in ("Who?", "A fox.", "Where?", "By the river.")
    ]
    earlier = (*template.turn(ids[0], ids[1]), *template.turn(ids[2], ids[3]))
    parts = (template.bos, template.prefix, earlier, template.before_question, ids[0], template.suffix)
    messages = [
        {"role": "user", "content": f"{INSTRUCTION}\n\nQuestion:\nWho?"},
        {"role": "assistant", "content": "A fox."},
        {"role": "user", "content": "Question:\nWhere?"},
        {"role": "assistant", "content": "By the river."},
        {"role": "user", "content": "Question:\nWho?"},
    ]
    chat = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    assert text_of(folder, *parts) == chat.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)


def test_without_a_chat_template_turns_are_plain_text(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path, chat=False)
    template, encode = make_template(folder), load_tokenizer(folder).encode
    turn = template.turn(encode("Who?").ids, encode("A fox.").ids)
    assert text_of(folder, turn) == "Question:\nWho?\n\nAnswer: A fox.\n\n"


def test_a_checkpoint_from_before_conversations_takes_the_decoder_s_turns(tmp_path: Path) -> None:
    template = make_template(decoder_folder(tmp_path))
    old = PromptTemplate.from_json({name: ids for name, ids in template.to_json().items() if name != "turns"})
    assert old.turns is None
    assert "turns" not in old.to_json()  # its fingerprint stays what it was
    assert with_turns(old, tmp_path) == template
    with pytest.raises(ConfigError, match="the prompt template has no turns"):
        old.turn([1], [2])


def test_turns_of_a_checkpoint_are_not_made_again(tmp_path: Path) -> None:
    template = make_template(decoder_folder(tmp_path))
    assert with_turns(template, tmp_path / "nothing") is template


@pytest.mark.parametrize(
    "chat_template",
    [
        "{% if messages | length > 1 %}{{ raise_exception('no') }}{% endif %}{{ messages[0]['content'] }}",
        "{{ messages[-1]['content'] }}",  # forgets what was before
        "{% for m in messages %}{{ loop.index }}{{ m['content'] }}{% endfor %}",  # numbers them
    ],
)
def test_a_chat_template_without_conversations_answers_single_questions(tmp_path: Path, chat_template: str) -> None:
    folder = decoder_folder(tmp_path)
    set_chat_template(folder, chat_template)
    template = make_template(folder)
    assert template.turns is None
    with pytest.raises(ConfigError, match="ask single questions, or give"):
        with_turns(template, folder)


def test_a_turn_by_hand() -> None:
    turns = TurnTemplate((11,), (12,))
    template = PromptTemplate((1,), (2, 3), (4,), (5, 6), (7,), (8,), (10,), (9,), question_first=True, turns=turns)
    assert template.turn([70, 71], [80]) == (8, 70, 71, 10, 11, 80, 12)
    assert PromptTemplate.from_json(json.loads(json.dumps(template.to_json()))) == template
