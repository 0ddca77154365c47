"""The path of captured calls, run as it stands on a CPU: the same answers as the plain one."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from refrag_core.composition import pad_batch
from refrag_core.decoder import Decoder
from refrag_core.embedding_storage import quantise_rows
from refrag_core.errors import ConfigError
from refrag_core.fast_path import FastPath, HotPassages
from refrag_core.policy import PointerPolicy, initialise_policy, policy_logits
from refrag_core.projection import initialise_projection
from refrag_core.runtime import AskOptions, Runtime
from tests.small_index import SmallIndex
from tests.tiny_models import D_DEC, D_ENC, decoder, decoder_tokenizer

QUESTION = "Which river is the capital of the northern island?"


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Opening remembers the models' fingerprints."""


def query_policy() -> PointerPolicy:
    """With a match term that has learned something."""
    policy = initialise_policy(D_ENC, query_dim=6, match_dim=4, width=32, seed=0)
    assert policy.match is not None
    torch.nn.init.normal_(policy.match.chunk.weight, generator=torch.Generator().manual_seed(1))
    return policy


@pytest.fixture(scope="module")
def path() -> FastPath:
    plain = Decoder(decoder("llama"), decoder_tokenizer(), eos_ids=())
    projection = initialise_projection(D_ENC, D_DEC, output_rms=0.3, seed=0).requires_grad_(False)
    return FastPath(plain, projection, query_policy().requires_grad_(False), max_positions=96, padded=True)


def prompt(path: FastPath, length: int) -> torch.Tensor:
    ids = torch.randint(4, 400, (length,), generator=torch.Generator().manual_seed(length))
    return path.decoder.decoder.embed(ids)


def rows(count: int) -> np.ndarray[tuple[int, int], np.dtype[np.float16]]:
    return np.random.default_rng(count).standard_normal((count, D_ENC)).astype(np.float16)


OPTIONS = [
    AskOptions(top_k=3, policy="none", max_new_tokens=9),
    AskOptions(top_k=3, policy="all", max_new_tokens=9),
    AskOptions(top_k=4, policy="learned", expansion_fraction=0.25, max_new_tokens=1),
    AskOptions(top_k=2, policy="learned", expansion_fraction=0.0, max_new_tokens=5),
    AskOptions(top_k=3, policy="random", expansion_fraction=0.5, max_new_tokens=9, temperature=0.8, seed=3),
]


@pytest.mark.parametrize("options", OPTIONS)
def test_answers_are_those_of_the_plain_path(library: SmallIndex, options: AskOptions) -> None:
    plain = Runtime.open(library.path, device="cpu")
    fast = Runtime.open(library.path, device="cpu", captured=True)
    expected = plain.ask(QUESTION, options)
    for _ in range(2):  # passages that travel, and passages that are there
        answer = fast.ask(QUESTION, options)
        assert replace(answer, stats=expected.stats) == expected
        assert answer.stats.new_tokens == expected.stats.new_tokens
        assert answer.stats.num_expanded == expected.stats.num_expanded


def test_replayed_answers_are_those_of_the_plain_path(library: SmallIndex, replayed: None) -> None:
    plain, fast = (Runtime.open(library.path, device="cpu", captured=captured) for captured in (False, True))
    assert fast._generation.fast is not None
    fast._generation.fast.decoder._rows._padded = True  # type: ignore[attr-defined]
    for options in OPTIONS:
        expected = plain.ask(QUESTION, options)
        answer = fast.ask(QUESTION, options)
        assert replace(answer, stats=expected.stats) == expected


def test_warming_prepares_the_question_s_embedding_too(library: SmallIndex, monkeypatch: pytest.MonkeyPatch) -> None:
    plain, fast = (Runtime.open(library.path, device="cpu", captured=captured) for captured in (False, True))
    embedded: list[str] = []
    for runtime in (plain, fast):
        retriever = runtime.searcher.retriever
        embed = retriever.embed_queries
        monkeypatch.setattr(
            retriever, "embed_queries", lambda texts, embed=embed: embedded.extend(texts) or embed(texts)
        )
    plain.warm([20])
    assert embedded == []
    fast.warm([20, 40])
    assert len(embedded) == 1


def test_given_texts_take_the_path_too(library: SmallIndex) -> None:
    options = AskOptions(top_k=2, policy="none", max_new_tokens=5)
    given = {"note": "The river runs to the sea. " * 9}
    expected = Runtime.open(library.path, device="cpu").ask(QUESTION, options, given=given)
    answer = Runtime.open(library.path, device="cpu", captured=True).ask(QUESTION, options, given=given)
    assert replace(answer, stats=expected.stats) == expected


def test_generations_have_hot_passages_of_their_own(library: SmallIndex) -> None:
    runtime = Runtime.open(library.path, device="cpu", captured=True)
    found = runtime.retrieve(QUESTION, 3)
    fetched = runtime.fetch(found)
    sent = runtime.upload([ref for ref, _ in found], fetched)
    assert sent is not None
    assert np.array_equal(sent.numpy(), np.concatenate([passage.embeddings for passage in fetched]))


def test_tokens_are_the_decoder_s(path: FastPath) -> None:
    plain = path.decoder.decoder
    for length in (1, 40, 80):
        expected = list(plain.generate(pad_batch([prompt(path, length)]), max_new_tokens=12))
        assert list(path.generate(prompt(path, length), max_new_tokens=12)) == expected


def test_an_answer_ends_with_its_end(path: FastPath, monkeypatch: pytest.MonkeyPatch) -> None:
    free = [step[0] for step in path.generate(prompt(path, 9), max_new_tokens=12)]
    monkeypatch.setattr(path.decoder.decoder, "eos_ids", frozenset({free[4]}))
    ended = [step[0] for step in path.generate(prompt(path, 9), max_new_tokens=12)]
    assert ended == free[: free.index(free[4]) + 1]
    assert path.decoder.length(0) == 0


def test_sampling_is_the_decoder_s(path: FastPath) -> None:
    sampling = {"max_new_tokens": 8, "temperature": 1.5, "top_p": 0.9, "seed": 4}
    expected = list(path.decoder.decoder.generate(pad_batch([prompt(path, 9)]), **sampling))  # type: ignore[arg-type]
    assert list(path.generate(prompt(path, 9), **sampling)) == expected  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match="top_p must be more than 0"):
        path.generate(prompt(path, 9), max_new_tokens=1, top_p=0.0)


def test_a_second_request_meanwhile_and_a_long_prompt_take_the_plain_way(
    path: FastPath, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = list(path.generate(prompt(path, 20), max_new_tokens=6))
    other = list(path.generate(prompt(path, 7), max_new_tokens=6))
    first = path.generate(prompt(path, 20), max_new_tokens=6)
    begun = [next(first)]
    monkeypatch.setattr(path.decoder, "prefill", lambda *_: pytest.fail("took the slot"))
    assert list(path.generate(prompt(path, 7), max_new_tokens=6)) == other
    assert begun + list(first) == expected
    assert len(list(path.generate(prompt(path, 95), max_new_tokens=6))) == 6


def test_an_answer_that_nobody_wants_leaves_the_slot_free(path: FastPath) -> None:
    steps = path.generate(prompt(path, 20), max_new_tokens=6)
    next(steps)
    del steps
    path.warm([30])
    assert path.decoder.length(0) == 0


@pytest.mark.parametrize("count", [1, 64, 70])
def test_padding_changes_neither_projection_nor_policy(path: FastPath, count: int) -> None:
    chunks = torch.from_numpy(rows(count))
    plain = initialise_projection(D_ENC, D_DEC, output_rms=0.3, seed=0)
    torch.testing.assert_close(path.project(chunks), plain(chunks).detach(), rtol=1e-5, atol=1e-6)
    query = np.random.default_rng(0).standard_normal(6).astype(np.float32)
    expected = policy_logits(query_policy(), rows(count), query)
    np.testing.assert_allclose(path.policy_logits(chunks, query), expected, rtol=1e-4, atol=1e-5)


def test_what_a_longer_prompt_left_behind_does_not_matter(path: FastPath, replayed: None) -> None:
    for count in (64, 1, 128, 70):
        test_padding_changes_neither_projection_nor_policy(path, count)


NOT_FINITE = pytest.mark.parametrize("bad", [float("nan"), float("inf")])


@NOT_FINITE
def test_a_prompt_that_is_not_finite_does_not_reach_the_next_answer(path: FastPath, replayed: None, bad: float) -> None:
    expected = path.decoder.prefill([0], [prompt(path, 9)])
    after = path.decoder.step([0], expected.argmax(dim=-1))
    path.decoder.prefill([0], [torch.full_like(prompt(path, 90), bad)])  # further than the next prompt's padding
    path.decoder.prefill([0], [torch.full_like(prompt(path, 60), bad)])  # and of the next prompt's shape
    torch.testing.assert_close(path.decoder.prefill([0], [prompt(path, 9)]), expected)
    torch.testing.assert_close(path.decoder.step([0], expected.argmax(dim=-1)), after)
    path.decoder.release(0)


@NOT_FINITE
def test_embeddings_that_are_not_finite_do_not_reach_the_next_choice(
    path: FastPath, replayed: None, bad: float
) -> None:
    path.policy_logits(torch.full((60, D_ENC), bad, dtype=torch.float16), np.full(6, bad, np.float32))
    test_padding_changes_neither_projection_nor_policy(path, 9)


def test_hot_passages_stay_and_the_coldest_go() -> None:
    hot = HotPassages(torch.device("cpu"), max_bytes=3 * 10 * D_ENC * 2)
    passages = {key: rows(count) for key, count in {"a": 10, "b": 10, "c": 11, "huge": 50}.items()}

    def ask(*keys: str) -> None:
        made = hot.rows(keys, [passages[key] for key in keys])
        assert np.array_equal(made.numpy(), np.concatenate([passages[key] for key in keys]))

    ask("a", "b", "a")
    assert (len(hot), hot.held_bytes) == (2, 20 * D_ENC * 2)
    ask("c")
    assert (len(hot), hot.held_bytes) == (2, 21 * D_ENC * 2)
    passages["b"] = rows(3)  # nobody asks for what went as if it were there
    ask("b")
    ask("huge")
    assert (len(hot), hot.held_bytes) == (1, 50 * D_ENC * 2)


def test_codes_are_floats_once_they_are_there() -> None:
    stored = quantise_rows(rows(5).astype(np.float32))
    made = HotPassages(torch.device("cpu")).rows(["a"], [stored])
    assert made.dtype == torch.float32
    np.testing.assert_allclose(made.numpy(), stored.codes * stored.scales[:, None], rtol=1e-6)
