"""The decoder's update as it is stored: factors, and signs of what they leave out."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from refrag_core.adapter import Adapter, LayerUpdate, SignMatrix, closest_signs
from refrag_core.errors import ConfigError
from refrag_core.stored_weights import read_weights, write_weights


def test_signs_are_bits_from_the_lowest_on() -> None:
    """By hand: + - - + + + - - | - + is 00111001 and 10 from the right, 0x39 and 0x02."""
    row = torch.tensor([1.0, -1.0, -1.0, 1.0, 1.0, 1.0, -1.0, -1.0, -1.0, 1.0])
    found = closest_signs(torch.stack([2.0 * row, -0.5 * row]))
    assert found.bits.tolist() == [[0x39, 0x02], [0xC6, 0x01]]
    assert torch.allclose(found.rows, torch.tensor([2.0, 0.5]))
    assert torch.allclose(found.columns, torch.ones(10))
    assert torch.allclose(found.dense(), torch.stack([2.0 * row, -0.5 * row]))


def test_scales_of_rows_and_columns_multiply() -> None:
    rows, columns = torch.tensor([1.0, 3.0, 0.25]), torch.tensor([0.5, 1.0, 1.5, 1.0])
    signs = torch.tensor([[1.0, -1, 1, -1], [-1, -1, 1, 1], [1, 1, 1, -1]])
    found = closest_signs(signs * rows[:, None] * columns)
    assert torch.allclose(found.rows, rows)
    assert torch.allclose(found.columns, columns)


def test_a_matrix_of_nothing_has_signs_of_nothing() -> None:
    assert not closest_signs(torch.zeros((3, 5))).dense().any()


def test_an_update_is_factors_and_signs() -> None:
    """By hand: 2 · 1 · 3 everywhere, and ± 1."""
    signs = SignMatrix(torch.tensor([[0b01], [0b10]], dtype=torch.uint8), torch.ones(2), torch.ones(2))
    update = LayerUpdate(torch.full((1, 2), 3.0), torch.ones((2, 1)), signs)
    assert update.dense(2.0).tolist() == [[7.0, 5.0], [5.0, 7.0]]


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int5"])
def test_signs_are_stored_bit_for_bit(tmp_path: Path, dtype: str) -> None:
    generator = torch.Generator().manual_seed(1)
    signs = closest_signs(torch.randn((6, 21), generator=generator))
    down, up = torch.randn((2, 21), generator=generator), torch.randn((6, 2), generator=generator)
    state = LayerUpdate(down, up, signs).state("layers.0.q_proj")
    files = write_weights(tmp_path, "adapter", state, dtype=dtype)  # type: ignore[arg-type]
    found = Adapter(read_weights([tmp_path / file.name for file in files]), 1.0)
    assert found.layers == ["layers.0.q_proj"]
    assert found.rank == 2
    update = found.update("layers.0.q_proj")
    assert update.signs is not None
    assert torch.equal(update.signs.bits, signs.bits)
    assert torch.allclose(update.signs.dense(), signs.dense(), rtol=2e-3)


def test_bits_are_no_other_type(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="expected bits as uint8"):
        write_weights(tmp_path, "adapter", {"layer.signs": torch.ones((2, 2))}, dtype="float16")


def test_numbers_that_are_not_finite_are_refused(tmp_path: Path) -> None:
    save_file({"layer.rows": torch.tensor([1.0, float("nan")])}, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match="of which some are not finite"):
        read_weights([tmp_path / "w.safetensors"])


def test_scales_are_fitted_to_each_other() -> None:
    """Rows and columns that are not evenly filled: means of rows and columns would leave more."""
    sizes = torch.tensor([[4.0, 1.0, 1.0], [1.0, 1.0, 1.0], [1.0, 1.0, 8.0]])
    found = closest_signs(sizes).dense()
    rows = sizes.mean(dim=1, keepdim=True)
    means = rows * (sizes.mean(dim=0) / sizes.mean())
    assert (found - sizes).norm() < 0.95 * (means - sizes).norm()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("signs", torch.zeros((4, 2), dtype=torch.uint8)),
        ("signs", torch.zeros((4, 1))),
        ("rows", torch.ones(3)),
        ("columns", torch.ones((1, 5))),
        ("up", torch.ones((4, 3))),
        ("rows", None),
    ],
)
def test_parts_that_make_no_update_are_refused(name: str, value: torch.Tensor | None) -> None:
    signs = closest_signs(torch.ones((4, 5)))
    state = LayerUpdate(torch.ones((2, 5)), torch.ones((4, 2)), signs).state("layer")
    assert Adapter(state, 1.0).update("layer").shape == (4, 5)
    state.pop(f"layer.{name}")
    if value is not None:
        state[f"layer.{name}"] = value
    with pytest.raises(ConfigError, match=r"layer 'layer' has .*; expected down"):
        Adapter(state, 1.0).update("layer")
