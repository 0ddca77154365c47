import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError
from refrag_core.stored_weights import StoredDtype, read_weights, verified_paths, write_weights

WEIGHTS = {"a": torch.tensor([[1.0, -127.0], [0.5, 0.25]]), "b": torch.tensor([1.0, 2.0, 3.0])}


def test_int8_keeps_a_scale_a_row(tmp_path: Path) -> None:
    files = write_weights(tmp_path, "w", WEIGHTS, dtype="int8")
    found = read_weights(verified_paths(tmp_path, files))
    assert found["a"][0].tolist() == pytest.approx([1.0, -127.0])
    assert found["a"][1].tolist() == pytest.approx([0.5, 64 * 0.5 / 127])
    assert torch.equal(found["b"], WEIGHTS["b"])


@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_files_are_bounded_and_give_all_weights_back(tmp_path: Path, dtype: str) -> None:
    files = write_weights(tmp_path, "w", WEIGHTS, dtype=dtype, max_bytes=9)  # type: ignore[arg-type]
    assert [file.name for file in files] == ["w-00001.safetensors", "w-00002.safetensors"]
    found = read_weights(verified_paths(tmp_path, files))
    assert all(torch.equal(found[name], WEIGHTS[name]) for name in WEIGHTS)


def test_missing_and_altered_files(tmp_path: Path) -> None:
    files = write_weights(tmp_path, "w", WEIGHTS, dtype="float16")
    path = tmp_path / files[0].name
    path.write_bytes(path.read_bytes()[:-1] + b"x")
    with pytest.raises(FingerprintMismatchError, match="get the checkpoint again"):
        verified_paths(tmp_path, files)
    path.unlink()
    with pytest.raises(ModelNotFoundError, match="get it complete"):
        verified_paths(tmp_path, files)


def test_int8_rows_of_zeros_and_of_tiny_numbers(tmp_path: Path) -> None:
    given = torch.tensor([[0.0, 0.0], [1e-44, -1e-44], [3e-30, 1e-30]])
    found = read_weights(verified_paths(tmp_path, write_weights(tmp_path, "w", {"a": given}, dtype="int8")))
    assert found["a"][0].tolist() == [0.0, 0.0]
    assert bool(((found["a"] - given).abs() <= given.abs().amax(dim=1, keepdim=True)).all())
    assert found["a"][2].tolist() == pytest.approx([3e-30, 1e-30], rel=0.02)


def test_matrices_that_are_named_stay_exact(tmp_path: Path) -> None:
    given = {"gates": torch.tensor([[1.0, 0.75], [0.5, 1.25]])}
    files = write_weights(tmp_path, "w", given, dtype="int8", exact=("gates",))
    assert load_file(tmp_path / files[0].name)["gates"].dtype == torch.float16
    assert torch.equal(read_weights([tmp_path / files[0].name])["gates"], given["gates"])


@pytest.mark.parametrize("dtype", ["float16", "int8"])
def test_what_is_not_finite_is_not_stored(tmp_path: Path, dtype: StoredDtype) -> None:
    with pytest.raises(ConfigError, match=rf"weight 'a' is not finite as {dtype}; expected finite numbers"):
        write_weights(tmp_path, "w", {"a": torch.tensor([[1e39, 1.0]])}, dtype=dtype)


CODES, SCALES = torch.tensor([[127, -3]], dtype=torch.int8), torch.tensor([0.5])


@pytest.mark.parametrize(
    ("stored", "message"),
    [
        ({"a": CODES}, "'a' of int8 [1, 2] without scales"),
        ({"a::scale": SCALES}, "'a::scale' of float32 [1] without codes"),
        ({"a": CODES.float(), "a::scale": SCALES}, "'a::scale' of float32 [1] without codes"),
        ({"a": CODES, "a::scale": SCALES.half()}, "'a::scale' of float16 [1] beside codes [1, 2]"),
        ({"a": CODES, "a::scale": torch.ones(2)}, "'a::scale' of float32 [2] beside codes [1, 2]"),
        ({"a": CODES, "a::scale": -SCALES}, "'a::scale' of float32 [1] of which some are negative or not finite"),
        ({"a": CODES, "a::scale": SCALES / 0}, "'a::scale' of float32 [1] of which some are negative or not finite"),
        (
            {"a": torch.full((1, 2), -128, dtype=torch.int8), "a::scale": SCALES},
            "'a' of int8 [1, 2] with codes below -127",
        ),
        ({"a": SCALES.double()}, "'a' of float64 [1] entries"),
    ],
)
def test_tensors_that_are_no_stored_weights(tmp_path: Path, stored: dict[str, torch.Tensor], message: str) -> None:
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=rf"{re.escape(message)}; expected float32, float16, or int8 with a float32"):
        read_weights([tmp_path / "w.safetensors"])
