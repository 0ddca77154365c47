import pytest
import torch
from torch import nn

from refrag_core.adapter import closest_signs
from refrag_core.training.low_rank import balanced_factors, closest_factors, closest_update, input_moments


def random(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("shape", [(5, 9), (9, 5)])
def test_by_its_inputs_it_is_the_closest_in_its_outputs(shape: tuple[int, int]) -> None:
    """The output's error is that of the singular values which are left out of update · √moment."""
    update = random(*shape, seed=0)
    inputs = random(400, shape[1], seed=1) * torch.logspace(0, -1.5, shape[1])
    moment = inputs.T @ inputs
    down, up = closest_factors(update, 2, 2.0, moment)
    left_out = torch.linalg.svdvals(inputs @ update.T)[2:].square().sum()
    error = (inputs @ (update - 2.0 * up @ down).T).square().sum()
    assert error == pytest.approx(float(left_out), rel=0.02)
    plain_down, plain_up = closest_factors(update, 2, 2.0)
    assert error < 0.9 * (inputs @ (update - 2.0 * plain_up @ plain_down).T).square().sum()
    assert (update - 2.0 * plain_up @ plain_down).norm() < (update - 2.0 * up @ down).norm()


def test_an_update_of_lower_rank_is_kept_whole() -> None:
    update = random(6, 1, seed=2) @ random(1, 8, seed=3)
    for moment in (None, torch.eye(8) * 3.0, torch.zeros((8, 8))):
        down, up = closest_factors(update, 4, 0.5, moment)
        assert torch.allclose(0.5 * up @ down, update, atol=1e-4)


def test_moments_of_inputs_are_gathered_while_open() -> None:
    layer, other = nn.Linear(2, 3), nn.Linear(2, 3)
    with input_moments({"a": layer, "b": other}) as moments:
        layer(torch.tensor([[[1.0, 2.0]], [[3.0, -1.0]]]))
        layer(torch.tensor([[0.0, 1.0]]))
    layer(torch.ones((5, 2)))
    assert moments.keys() == {"a"}
    assert moments["a"].tolist() == [[10.0, -1.0], [-1.0, 6.0]]


def test_moments_are_exact_within_autocast() -> None:
    """Features of very different size, as decoders have them: sums in bfloat16 are not positive definite."""
    layer = nn.Linear(64, 4, bias=False)
    rows = random(300, 64, seed=4) * torch.logspace(3, -1, 64)
    with input_moments({"layer": layer}) as moments, torch.autocast("cpu", torch.bfloat16):
        layer(rows)
    expected = rows.double().T @ rows.double()
    assert torch.allclose(moments["layer"], expected, rtol=1e-9)
    down, up = closest_factors(random(4, 64, seed=5), 2, 1.0, moments["layer"])
    assert down.isfinite().all()
    assert up.isfinite().all()


def test_balanced_factors_are_the_same_update_in_pairs_of_one_length() -> None:
    generator = torch.Generator().manual_seed(0)
    down, up = torch.randn((3, 5), generator=generator) * 0.01, torch.randn((4, 3), generator=generator) * 10.0
    up[:, 2] = 0.0
    made_down, made_up = balanced_factors(down, up)
    assert torch.allclose(made_up @ made_down, up @ down, rtol=1e-5)
    assert torch.allclose(made_down.norm(dim=1)[:2], made_up.norm(dim=0)[:2], rtol=1e-5)
    assert torch.equal(made_down[2], down[2])


@pytest.mark.parametrize("weighted", [True, False])
def test_factors_and_signs_are_fitted_to_each_other_in_turns(weighted: bool) -> None:
    """Less is left than after one turn of each."""
    update = random(24, 32, seed=6) @ torch.diag(torch.logspace(0, -1, 32))
    inputs = random(400, 32, seed=7) * torch.logspace(0, -1.5, 32)
    moment = inputs.T @ inputs if weighted else None

    def left(made: torch.Tensor) -> float:
        return float(((inputs if weighted else torch.eye(32)) @ (update - made).T).square().sum())

    down, up = closest_factors(update, 4, 2.0, moment)
    signs = closest_signs(update - 2.0 * up @ down).dense()
    down, up = closest_factors(update - signs, 4, 2.0, moment)
    one_turn = 2.0 * up @ down + closest_signs(update - 2.0 * up @ down).dense()
    assert left(closest_update(update, 4, 2.0, moment, signs=True).dense(2.0)) < 0.97 * left(one_turn)
