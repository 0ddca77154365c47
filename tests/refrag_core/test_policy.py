import itertools
import math

import numpy as np
import pytest
import torch

from refrag_core.errors import ConfigError, MissingScoresError
from refrag_core.policy import (
    PointerPolicy,
    initialise_policy,
    num_expanded,
    pick_log_probs,
    policy_logits,
    sample_without_replacement,
    select,
    top_mask,
    with_match,
)


@pytest.mark.parametrize(
    ("num_chunks", "fraction", "expected"),
    [
        (0, 0.5, 0),
        (10, 0.0, 0),
        (10, 1.0, 10),
        (1, 0.01, 1),
        (10, 0.1, 1),
        (5, 0.1, 1),  # .5 rounds up
        (25, 0.1, 3),  # 2.5 rounds up, not to even
        (24, 0.1, 2),
        (50, 0.29, 15),  # 14.5, and less than that as a binary fraction
        (16, 0.25, 4),
    ],
)
def test_num_expanded(num_chunks: int, fraction: float, expected: int) -> None:
    assert num_expanded(num_chunks, fraction) == expected


@pytest.mark.parametrize("fraction", [-0.1, 1.1, math.nan])
def test_a_fraction_out_of_range_is_refused(fraction: float) -> None:
    with pytest.raises(ConfigError, match="expansion_fraction must be 0 to 1"):
        num_expanded(10, fraction)


def chosen(mask: np.ndarray) -> list[int]:
    return np.flatnonzero(mask).tolist()


def test_learned_takes_the_top_logits_and_the_earlier_of_equals() -> None:
    logits = np.array([0.0, 2.0, 1.0, 2.0, 1.0], np.float32)
    assert chosen(select("learned", num_chunks=5, expansion_fraction=0.6, logits=logits)) == [1, 2, 3]


def test_perplexity_takes_the_most_surprising() -> None:
    nll = np.array([3.0, 1.0, np.nan, 5.0], np.float32)
    assert chosen(select("perplexity", num_chunks=4, expansion_fraction=0.5, nll=nll)) == [0, 3]
    assert chosen(top_mask(nll, 3)) == [0, 1, 3]


def test_perplexity_without_scores_names_the_command() -> None:
    with pytest.raises(MissingScoresError, match="refrag index build CORPUS -o INDEX --score"):
        select("perplexity", num_chunks=4, expansion_fraction=0.5)


def test_random_depends_on_its_seed_alone() -> None:
    def draw(seed: int) -> list[int]:
        return chosen(select("random", num_chunks=100, expansion_fraction=0.1, seed=seed))

    assert draw(0) == draw(0) != draw(1)
    assert len(draw(0)) == 10


def test_all_and_none_ignore_the_fraction() -> None:
    assert chosen(select("all", num_chunks=3, expansion_fraction=0.0)) == [0, 1, 2]
    assert chosen(select("none", num_chunks=3, expansion_fraction=1.0)) == []


def test_scores_of_another_prompt_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"shape \(3,\); found shape \(2,\)"):
        select("learned", num_chunks=3, expansion_fraction=0.5, logits=np.zeros(2, np.float32))


def test_log_probs_by_hand() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0]).log()
    log_probs = pick_log_probs(logits, torch.tensor([[2, 0], [0, 1]]))
    # of weights 1, 2, 3: third 3/6, then first 1/3; first 1/6, then second 2/5
    torch.testing.assert_close(log_probs.exp(), torch.tensor([[1 / 2, 1 / 3], [1 / 6, 2 / 5]]))


def test_log_probs_of_all_sequences_sum_to_one() -> None:
    logits = torch.tensor([0.3, -1.0, 2.0, 0.0], dtype=torch.float64)
    sequences = torch.tensor(list(itertools.permutations(range(4), 3)))
    assert float(pick_log_probs(logits, sequences).sum(dim=1).exp().sum()) == pytest.approx(1.0)


def test_samples_follow_their_log_probs() -> None:
    logits = torch.tensor([1.0, 2.0, 3.0]).log()
    generator = torch.Generator().manual_seed(0)
    picks, log_probs = sample_without_replacement(logits, 2, generator, num_samples=20_000)
    assert all(len(set(row)) == 2 for row in picks[:100].tolist())
    torch.testing.assert_close(log_probs, pick_log_probs(logits, picks))
    share = float((picks == torch.tensor([2, 0])).all(dim=1).float().mean())
    assert share == pytest.approx(1 / 6, abs=0.01)


def test_log_probs_have_gradients_where_masked() -> None:
    logits = torch.tensor([0.0, 1.0, -math.inf, 2.0], requires_grad=True)
    picks, log_probs = sample_without_replacement(logits, 3, torch.Generator().manual_seed(0), num_samples=4)
    assert 2 not in picks
    log_probs.sum().backward()
    assert logits.grad is not None
    assert torch.isfinite(logits.grad).all()


def test_more_picks_than_chunks_are_refused() -> None:
    logits = torch.tensor([0.0, -math.inf])
    with pytest.raises(ConfigError, match="cannot pick 2 chunks without replacement out of 1"):
        sample_without_replacement(logits, 2, torch.Generator())


def test_padding_changes_no_logit() -> None:
    policy = initialise_policy(8, seed=0)
    chunks = torch.randn((1, 5, 8), generator=torch.Generator().manual_seed(0))
    alone = policy(chunks, torch.ones((1, 5), dtype=torch.bool))
    padded = torch.cat([chunks, torch.full((1, 3, 8), 9.0)], dim=1)
    present = torch.tensor([[True] * 5 + [False] * 3, [False] * 8])
    together = policy(torch.cat([padded, padded]), present)
    torch.testing.assert_close(together[:1, :5], alone)
    assert (together[0, 5:] == -math.inf).all()
    assert (together[1] == -math.inf).all()


def test_logits_depend_on_every_chunk_its_place_and_the_query() -> None:
    policy = initialise_policy(8, query_dim=4, seed=0)
    random = np.random.default_rng(0)
    chunks = random.standard_normal((6, 8)).astype(np.float16)
    query = random.standard_normal(4).astype(np.float32)
    logits = policy_logits(policy, chunks, query)
    assert logits.shape == (6,)
    assert not np.allclose(logits, policy_logits(policy, chunks, -query))
    assert not np.allclose(logits[::-1], policy_logits(policy, chunks[::-1], query))
    assert np.array_equal(logits, policy_logits(policy, chunks, query))
    with pytest.raises(ConfigError, match="query_dim 4 and was given no query vector"):
        policy_logits(policy, chunks)


def test_equal_seeds_give_equal_policies() -> None:
    first, again, other = (initialise_policy(8, seed=seed).state_dict() for seed in (0, 0, 1))
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["logit.weight"], other["logit.weight"])


def test_a_width_that_heads_do_not_divide_is_refused() -> None:
    with pytest.raises(ConfigError, match="divisible by its 4 heads"):
        PointerPolicy(8, width=10)


def match_policy(*, seed: int = 0) -> PointerPolicy:
    return initialise_policy(4, query_dim=2, match_dim=4, width=8, num_heads=1, num_layers=1, seed=seed)


def test_the_match_term_by_hand() -> None:
    policy = match_policy()
    chunks = torch.tensor([[[1.0, 1.0, -1.0, -1.0], [3.0, -3.0, 3.0, -3.0], [0.0, 0.0, 0.0, 0.0]]])
    query, present = torch.tensor([[5.0, 1.0]]), torch.tensor([[True, True, True]])
    before = policy(chunks, present, query)
    assert policy.match is not None
    with torch.no_grad():
        policy.match.query.weight.copy_(torch.tensor([[1.0, 0.0], [0.0, 1.0], [1.0, 1.0], [0.0, 0.0]]))
        policy.match.chunk.weight.copy_(torch.diag(torch.tensor([2.0, 3.0, 4.0, 5.0])))
    # Normed, the query is (1, -1), projected (1, -1, 0, 0); the chunks (1, 1, -1, -1), (1, -1, 1, -1) and 0, projected
    # (2, 3, -4, -5), (2, -3, 4, -5) and 0. Their products over 2, the root of m:
    term = policy(chunks, present, query) - before
    torch.testing.assert_close(term, torch.tensor([[-0.5, 2.5, 0.0]]), atol=1e-4, rtol=0)
    nothing = torch.zeros_like(query)
    plain = initialise_policy(4, query_dim=2, width=8, num_heads=1, num_layers=1, seed=0)
    assert torch.equal(policy(chunks, present, nothing), plain(chunks, present, nothing))


def test_a_match_term_begins_without_effect_and_with_a_gradient() -> None:
    plain = initialise_policy(8, query_dim=4, width=8, num_heads=1, seed=0)
    added = with_match(initialise_policy(8, query_dim=4, width=8, num_heads=1, seed=0), 3, seed=5)
    made = initialise_policy(8, query_dim=4, match_dim=3, width=8, num_heads=1, seed=0)
    generator = torch.Generator().manual_seed(0)
    chunks, query = torch.randn((2, 5, 8), generator=generator), torch.randn((2, 4), generator=generator)
    present = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    expected = plain(chunks, present, query)
    assert torch.equal(added(chunks, present, query), expected)
    assert torch.equal(made(chunks, present, query), expected)
    added(chunks, present, query)[:, 0].sum().backward()
    assert added.match is not None
    gradient = added.match.chunk.weight.grad
    assert gradient is not None
    assert float(gradient.abs().max()) > 0
    assert added.match_dim == made.match_dim == 3


def test_a_match_term_needs_a_query_and_is_added_once() -> None:
    with pytest.raises(ConfigError, match="match_dim 4 and no query to compare with"):
        PointerPolicy(8, match_dim=4)
    with pytest.raises(ConfigError, match="query_dim 0 and match_dim 0; expected one with a query"):
        with_match(initialise_policy(8, seed=0), 4, seed=0)
    with pytest.raises(ConfigError, match="query_dim 2 and match_dim 4; expected one with a query"):
        with_match(match_policy(), 4, seed=0)
