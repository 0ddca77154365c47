import pytest
import torch

from refrag_core.projection import Projection, initialise_projection


@pytest.mark.parametrize("scale", [0.01, 1.0, 100.0])
def test_outputs_start_at_the_decoder_s_rms_whatever_the_input_s_scale(scale: float) -> None:
    projection = initialise_projection(64, 96, output_rms=0.13, seed=0)
    given = scale * torch.randn((500, 64), generator=torch.Generator().manual_seed(5))
    rms = float(projection(given).detach().square().mean().sqrt())
    assert rms == pytest.approx(0.13, rel=0.05)


def test_equal_seeds_give_equal_weights() -> None:
    first = initialise_projection(8, 16, output_rms=1.0, seed=3).state_dict()
    again = initialise_projection(8, 16, output_rms=1.0, seed=3).state_dict()
    other = initialise_projection(8, 16, output_rms=1.0, seed=4).state_dict()
    assert all(torch.equal(first[name], again[name]) for name in first)
    assert not torch.equal(first["hidden.weight"], other["hidden.weight"])


def test_two_layers_as_wide_as_the_decoder() -> None:
    shapes = {name: tuple(tensor.shape) for name, tensor in Projection(8, 16).state_dict().items()}
    assert shapes == {
        "hidden.weight": (16, 8),
        "hidden.bias": (16,),
        "output.weight": (16, 16),
        "output.bias": (16,),
    }


def test_stored_float16_comes_out_in_the_weights_dtype() -> None:
    projection = initialise_projection(8, 16, output_rms=1.0, seed=0).to(torch.bfloat16)
    projected = projection(torch.full((3, 8), 60_000.0, dtype=torch.float16))
    assert projected.dtype == torch.bfloat16
    assert torch.isfinite(projected).all()


def test_by_hand() -> None:
    projection = Projection(2, 1)
    with torch.no_grad():
        projection.hidden.weight.copy_(torch.tensor([[1.0, 1.0]]))
        projection.hidden.bias.fill_(0.0)
        projection.output.weight.fill_(2.0)
        projection.output.bias.fill_(0.5)
    # (3, 4) has RMS sqrt(12.5); their sum over it is 1.97990; gelu(1.97990) = 1.93267
    assert projection(torch.tensor([3.0, 4.0])).item() == pytest.approx(2 * 1.93267 + 0.5, abs=1e-4)
