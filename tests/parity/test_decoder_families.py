"""Every supported decoder family: composed input decodes exactly as the same ids do in transformers."""

import numpy as np
import pytest
import torch

from refrag_core.composition import Composed, ContextPassage, compose, pad_batch
from refrag_core.decoder import FINISHED, Decoder
from refrag_core.projection import initialise_projection
from refrag_core.template import PromptTemplate
from tests.tiny_models import DECODER_FAMILIES, decoder, decoder_tokenizer

D_ENC = 12
NEW_TOKENS = 16
QUESTION_LENGTHS = (3, 9, 5)
PASSAGE_LENGTHS = ([20, 7], [16], [33, 4, 1])
TEMPLATE = PromptTemplate((0,), (5, 6), (7,), (8,), (9, 10), (11,), (12,), (13, 14), question_first=False)


@pytest.fixture(params=DECODER_FAMILIES)
def family(request: pytest.FixtureRequest) -> Decoder:
    return Decoder(decoder(request.param), decoder_tokenizer(), eos_ids=())


def make_passages(lengths: list[int], chunk_size: int, seed: int) -> list[ContextPassage]:
    random = np.random.default_rng(seed)
    return [
        ContextPassage(
            random.integers(4, 400, length, dtype=np.int32),
            chunk_size,
            random.standard_normal((-(-length // chunk_size), D_ENC)).astype(np.float16),
        )
        for length in lengths
    ]


def make_prompt(family: Decoder, number: int, *, expanded: bool, chunk_size: int = 8) -> Composed:
    passages = make_passages(PASSAGE_LENGTHS[number], chunk_size, seed=number)
    question = np.random.default_rng(100 + number).integers(4, 400, QUESTION_LENGTHS[number]).tolist()
    return compose(
        TEMPLATE,
        passages,
        np.full(sum(passage.num_chunks for passage in passages), expanded),
        question,
        embed=family.embed,
        project=initialise_projection(D_ENC, family.dim, output_rms=family.embedding_rms(), seed=0),
    )


def reference(family: Decoder, prompt: Composed) -> list[int]:
    """Greedy tokens of plain `generate` on the prompt's ids alone, without padding."""
    ids = torch.from_numpy(prompt.arrangement.ids.astype(np.int64))[None]
    made = family.model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=NEW_TOKENS,
        min_new_tokens=NEW_TOKENS,
        do_sample=False,
        eos_token_id=None,
        pad_token_id=1,
    )
    tokens: list[int] = made[0, ids.shape[1] :].tolist()
    return tokens


def generated(family: Decoder, prompts: list[Composed]) -> list[list[int]]:
    steps = family.generate(pad_batch([prompt.inputs_embeds for prompt in prompts]), max_new_tokens=NEW_TOKENS)
    return np.array(list(steps)).T.tolist()


def test_one_prompt_expanded_is_plain_decoding(family: Decoder) -> None:
    prompt = make_prompt(family, 0, expanded=True)
    expected = reference(family, prompt)
    assert len(set(expected)) > 4  # a model that repeats itself would prove nothing
    assert generated(family, [prompt]) == [expected]


def test_a_batch_of_different_lengths_expanded_is_plain_decoding(family: Decoder) -> None:
    prompts = [make_prompt(family, number, expanded=True) for number in range(3)]
    expected = [reference(family, prompt) for prompt in prompts]
    assert len({tuple(tokens) for tokens in expected}) == 3
    assert generated(family, prompts) == expected


def test_compressed_prompts_decode_alike_alone_and_in_a_batch(family: Decoder) -> None:
    prompts = [make_prompt(family, number, expanded=False) for number in range(3)]
    alone = [generated(family, [prompt])[0] for prompt in prompts]
    assert generated(family, prompts) == alone
    assert FINISHED not in alone[0]


@pytest.mark.parametrize("chunk_size", [4, 8, 16])
def test_compressed_prompts_have_one_position_a_chunk(family: Decoder, chunk_size: int) -> None:
    for number in range(3):
        prompt = make_prompt(family, number, expanded=False, chunk_size=chunk_size)
        lengths = PASSAGE_LENGTHS[number]
        slots = sum(-(-length // chunk_size) for length in lengths)
        fixed = TEMPLATE.num_fixed(len(lengths)) + QUESTION_LENGTHS[number]
        assert prompt.inputs_embeds.shape == (fixed + slots, family.dim)
