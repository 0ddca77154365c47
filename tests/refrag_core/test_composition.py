import numpy as np
import pytest
import torch

from refrag_core.composition import COMPRESSED, ContextPassage, arrange, compose, pad_batch
from refrag_core.errors import ConfigError
from refrag_core.template import PromptTemplate

X = COMPRESSED
TEMPLATE = PromptTemplate(
    bos=(900,),
    prefix=(901,),
    before_passages=(902,),
    passage_header=(903,),
    passage_footer=(904, 905),
    before_question=(906,),
    after_question=(907,),
    suffix=(908,),
    question_first=False,
)
QUESTION_FIRST = PromptTemplate(
    **{name: getattr(TEMPLATE, name) for name in TEMPLATE.__slots__} | {"question_first": True}
)


def passage(first: int, num_tokens: int, chunk_size: int = 4, d_enc: int = 2) -> ContextPassage:
    """Tokens `first`, `first` + 1, …; chunk i's vector is (first + i, …)."""
    num_chunks = -(-num_tokens // chunk_size)
    vectors = np.repeat(np.arange(first, first + num_chunks, dtype=np.float16)[:, None], d_enc, axis=1)
    return ContextPassage(np.arange(first, first + num_tokens, dtype=np.int32), chunk_size, vectors)


def mask(*expanded: int) -> np.ndarray:
    return np.array(expanded, dtype=np.bool_)


def test_slots_by_hand() -> None:
    arrangement = arrange(TEMPLATE, [passage(10, 10), passage(50, 5)], mask(0, 1, 1, 1, 0), [70, 71])
    head, first, second = (
        [900, 901, 902],
        [903, X, 14, 15, 16, 17, 18, 19, 904, 905],
        [903, 50, 51, 52, 53, X, 904, 905],
    )
    assert arrangement.ids.tolist() == [*head, *first, *second, 906, 70, 71, 907, 908]
    assert arrangement.compressed.tolist() == [0, 4]
    assert arrangement.num_expanded == 3
    assert arrangement.num_dropped == 0


@pytest.mark.parametrize("template", [TEMPLATE, QUESTION_FIRST])
def test_earlier_turns_stand_behind_the_prefix_and_take_room(template: PromptTemplate) -> None:
    alone = arrange(template, [passage(10, 4)], mask(0), [70])
    given = arrange(template, [passage(10, 4)], mask(0), [70], history=[60, 61, 62], max_positions=len(alone.ids) + 3)
    assert given.ids.tolist() == [900, 901, 60, 61, 62, *alone.ids[2:].tolist()]
    assert (
        arrange(template, [passage(10, 4)], mask(0), [70], history=[60], max_positions=len(alone.ids)).num_dropped == 1
    )


def test_the_question_can_stand_first() -> None:
    arrangement = arrange(QUESTION_FIRST, [passage(10, 4)], mask(0), [70])
    assert arrangement.ids.tolist() == [900, 901, 906, 70, 907, 902, 903, X, 904, 905, 908]


@pytest.mark.parametrize("num_tokens", [1, 3, 4, 5, 8, 17])
def test_nothing_expanded_takes_one_position_a_chunk(num_tokens: int) -> None:
    given = passage(10, num_tokens)
    arrangement = arrange(TEMPLATE, [given], np.zeros(given.num_chunks, np.bool_), [70])
    assert len(arrangement.ids) == TEMPLATE.num_fixed(1) + 1 + -(-num_tokens // 4)


def test_no_passages_at_all() -> None:
    assert arrange(TEMPLATE, [], mask(), [70]).ids.tolist() == [900, 901, 902, 906, 70, 907, 908]


def test_passages_may_have_chunk_sizes_of_their_own() -> None:
    arrangement = arrange(TEMPLATE, [passage(10, 8, 4), passage(50, 8, 8)], mask(0, 0, 0), [])
    assert (arrangement.ids == X).sum() == 3


def test_what_does_not_fit_is_dropped_from_the_last_passage_on() -> None:
    passages = [passage(10, 8), passage(50, 8), passage(80, 8)]  # 3 + 8 slots each when expanded
    expanded = np.ones(6, np.bool_)
    fixed = TEMPLATE.num_fixed(0) + 1 + 5
    for room, kept in [(33, 3), (32, 2), (22, 2), (21, 1), (10, 0)]:
        arrangement = arrange(TEMPLATE, passages, expanded, [70], max_positions=fixed + room, max_new_tokens=5)
        assert (arrangement.num_passages, arrangement.num_dropped) == (kept, 3 - kept)
        assert len(arrangement.ids) + 5 == fixed + 11 * kept
    assert arrangement.compressed.tolist() == []


def test_dropping_also_drops_the_passage_s_chunks_from_the_vectors() -> None:
    arrangement = arrange(
        TEMPLATE, [passage(10, 8), passage(50, 8)], mask(0, 1, 0, 0), [], max_positions=TEMPLATE.num_fixed(1) + 5
    )
    assert arrangement.compressed.tolist() == [0]
    assert arrangement.num_expanded == 1


def test_strict_refuses_to_drop() -> None:
    with pytest.raises(ConfigError, match=r"the prompt needs 18 positions and the decoder has 17; .*strict"):
        arrange(TEMPLATE, [passage(10, 8)], mask(1, 1), [70], max_positions=17, strict=True)


def test_a_question_beyond_the_decoder_is_refused() -> None:
    with pytest.raises(ConfigError, match="take 106 positions and the decoder has 50"):
        arrange(TEMPLATE, [], mask(), [70] * 100, max_positions=50)


@pytest.mark.parametrize("wrong", [mask(1), np.ones(2, np.int8)])
def test_a_mask_that_does_not_fit_is_refused(wrong: np.ndarray) -> None:
    with pytest.raises(ConfigError, match=r"expected bool \(2,\)"):
        arrange(TEMPLATE, [passage(10, 8)], wrong, [])


def test_embeddings_of_another_chunk_size_are_refused() -> None:
    given = ContextPassage(np.arange(8, dtype=np.int32), 4, np.zeros((1, 2), np.float16))
    with pytest.raises(ConfigError, match="has 1 chunk embeddings; expected 2 at chunk_size 4"):
        arrange(TEMPLATE, [given], mask(0, 0), [])


def test_compose_embeds_ids_and_projects_vectors_once() -> None:
    table = torch.arange(1000, dtype=torch.float32)[:, None].repeat(1, 3)
    calls: list[str] = []

    def embed(ids: torch.Tensor) -> torch.Tensor:
        calls.append("embed")
        return table[ids]

    def project(vectors: torch.Tensor) -> torch.Tensor:
        calls.append("project")
        assert vectors.dtype == torch.float16
        return -vectors[:, :1].float().repeat(1, 3)

    composed = compose(TEMPLATE, [passage(10, 8), passage(50, 5)], mask(0, 1, 1, 0), [70], embed=embed, project=project)
    expected = [
        900,
        901,
        902,
        903,
        -10,
        14,
        15,
        16,
        17,
        904,
        905,
        903,
        50,
        51,
        52,
        53,
        -51,
        904,
        905,
        906,
        70,
        907,
        908,
    ]
    assert composed.inputs_embeds[:, 1].tolist() == expected
    assert sorted(calls) == ["embed", "project"]


def test_padding_is_on_the_left_and_positions_start_at_the_prompt() -> None:
    batch = pad_batch([torch.full((2, 3), 1.0), torch.full((4, 3), 2.0)])
    assert batch.inputs_embeds[:, :, 0].tolist() == [[0, 0, 1, 1], [2, 2, 2, 2]]
    assert batch.attention_mask is not None
    assert batch.attention_mask.tolist() == [[0, 0, 1, 1], [1, 1, 1, 1]]
    assert batch.position_ids.tolist() == [[0, 0, 0, 1], [0, 1, 2, 3]]


def test_equal_lengths_need_no_mask() -> None:
    batch = pad_batch([torch.zeros((2, 3)), torch.zeros((2, 3))])
    assert batch.attention_mask is None
    assert batch.position_ids.tolist() == [[0, 1], [0, 1]]
