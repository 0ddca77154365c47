import json
from pathlib import Path

import pytest

from refrag_core.errors import ConfigError
from refrag_core.models import load_tokenizer
from refrag_core.template import INSTRUCTION, PromptTemplate, make_template
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
    ],
)
def test_another_json_is_refused(tmp_path: Path, change: dict[str, object], message: str) -> None:
    value = make_template(decoder_folder(tmp_path)).to_json() | change
    with pytest.raises(ConfigError, match=message):
        PromptTemplate.from_json(value)


def test_a_chat_template_that_repeats_its_content_is_refused(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    twice = "{{ messages[0]['content'] }}{{ messages[0]['content'] }}"
    (folder / "tokenizer_config.json").write_text(json.dumps(settings | {"chat_template": twice}))
    with pytest.raises(ConfigError, match="2 times in it"):
        make_template(folder)


def test_num_fixed_by_hand() -> None:
    template = PromptTemplate((1,), (2, 3), (4,), (5, 6), (7,), (8,), (), (9,), question_first=False)
    assert template.num_fixed(0) == 6
    assert template.num_fixed(2) == 12
