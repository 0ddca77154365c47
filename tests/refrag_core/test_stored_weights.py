import re
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file

from refrag_core.errors import ConfigError, FingerprintMismatchError, ModelNotFoundError
from refrag_core.stored_weights import (
    StoredDtype,
    quantise_runs,
    read_weights,
    stored_forms,
    verified_paths,
    weights_file,
    write_weights,
)

WEIGHTS = {"a": torch.tensor([[1.0, -127.0], [0.5, 0.25]]), "b": torch.tensor([1.0, 2.0, 3.0])}


def test_int8_keeps_a_scale_a_row(tmp_path: Path) -> None:
    files = write_weights(tmp_path, "w", WEIGHTS, dtype="int8")
    found = read_weights(verified_paths(tmp_path, files))
    assert found["a"][0].tolist() == [1.0, -127.0]
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


@pytest.mark.parametrize("dtype", ["int8", "int5"])
def test_matrices_that_are_named_stay_exact(tmp_path: Path, dtype: StoredDtype) -> None:
    given = {"gates": torch.tensor([[1.0, 0.75], [0.5, 1.25]])}
    files = write_weights(tmp_path, "w", given, dtype=dtype, exact=("gates",))
    assert load_file(tmp_path / files[0].name)["gates"].dtype == torch.float16
    assert torch.equal(read_weights([tmp_path / files[0].name])["gates"], given["gates"])


@pytest.mark.parametrize("dtype", ["float16", "int8", "int5"])
def test_what_is_not_finite_is_not_stored(tmp_path: Path, dtype: StoredDtype) -> None:
    for bad in (1e39, float("nan"), float("-inf")):
        with pytest.raises(ConfigError, match=rf"weight 'a' is not finite as {dtype}; expected finite numbers"):
            write_weights(tmp_path, "w", {"a": torch.tensor([[bad, 1.0]])}, dtype=dtype)


# --- int5 ---------------------------------------------------------------------------------------------


def stored_and_read(weights: dict[str, torch.Tensor], dtype: StoredDtype, folder: Path) -> dict[str, torch.Tensor]:
    path = folder / "w.safetensors"
    path.write_bytes(weights_file(weights, dtype))
    return read_weights([path], dtype)


def random_matrix(rows: int, columns: int, size: float = 1.0) -> torch.Tensor:
    return torch.randn((rows, columns), generator=torch.Generator().manual_seed(columns)) * size


def test_the_bytes_of_int5(tmp_path: Path) -> None:
    given = 0.5 * torch.tensor([[1.0, -1.0, 15.0, 0.0, -15.0, 2.0, -2.0, 7.0, 3.0]])
    stored = load(weights_file({"a": given, "b": torch.tensor([0.1])}, "int5"))
    assert stored.keys() == {"a", "a::scale", "b"}
    assert bytes(stored["a"].tolist()).hex() == "d0f90762b3" + "f2ffffffff"
    assert (stored["a"].dtype, stored["a::scale"].dtype, stored["b"].dtype) == (
        *(torch.uint8, torch.float16),
        torch.float16,
    )
    assert stored["a::scale"].tolist() == [[0.5]]
    assert torch.equal(stored_and_read({"a": given}, "int5", tmp_path)["a"], given)


def test_bytes_of_two_rows_follow_without_a_gap() -> None:
    stored = load(weights_file({"a": torch.tensor([[15.0, -15.0, 3.0], [30.0, 0.0, -2.0]])}, "int5"))
    codes = [30, 0, 18, 30, 15, 14, 31, 31]  # of 15, -15, 3; 15, 0, -1
    number = sum(code << 5 * place for place, code in enumerate(codes))
    assert bytes(stored["a"].tolist()) == number.to_bytes(5, "little")
    assert stored["a::scale"].tolist() == [[1.0], [2.0]]


@pytest.mark.parametrize("columns", [1, 2, 7, 8, 31, 32, 33, 54, 64, 100])
@pytest.mark.parametrize("size", [1e-7, 1e-3, 1.0, 1e4])
def test_an_int5_entry_is_within_half_a_scale_unless_it_is_clipped(columns: int, size: float, tmp_path: Path) -> None:
    given = random_matrix(5, columns, size)
    codes, scale = quantise_runs(given)
    assert scale.shape == (5, -(-columns // 32))
    wide = scale.float().repeat_interleave(32, dim=1)[:, :columns]
    error = (codes * wide - given).abs()
    clipped = codes.abs() == 15
    assert bool((error <= wide * 0.5 + 2.0**-25)[~clipped].all())
    largest = torch.stack([run.abs().amax(dim=1) for run in given.split(32, dim=1)], dim=1)
    assert bool((scale.float() <= (largest / 15).clamp(min=2.0**-24)).all())
    assert bool((scale.float() >= 0.919 * largest / 15 - 2.0**-24).all())
    assert torch.equal(stored_and_read({"a": given}, "int5", tmp_path)["a"], codes * wide)


def test_the_scale_of_a_run_is_the_one_of_the_least_error() -> None:
    parts = torch.arange(93, 101) / 100
    codes = torch.randint(9, 15, (8, 32), generator=torch.Generator().manual_seed(0))
    codes[:, ::2] *= -1
    given = codes * parts[:, None] / 15  # each run fits one of the scales but for its largest entry
    given[:, 0] = 1.0
    found, scale = quantise_runs(given)
    assert scale[:, 0].tolist() == pytest.approx((parts / 15).tolist(), rel=2e-3)
    assert torch.equal(found[:, 1:], codes[:, 1:])
    assert found[:, 0].tolist() == [15] * 8


def test_normal_entries_move_by_few_percent_in_int5() -> None:
    given = random_matrix(64, 576)
    codes, scale = quantise_runs(given)
    error = codes * scale.float().repeat_interleave(32, dim=1) - given
    assert 0.02 < float(error.norm() / given.norm()) < 0.05


def test_int5_runs_of_zeros_and_of_tiny_numbers(tmp_path: Path) -> None:
    given = torch.zeros((4, 40))
    given[1, :2] = torch.tensor([1e-44, -1e-44])
    given[2, 0], given[2, 39] = 2.0**-24, -3.4 * 2.0**-24
    given[3, 35] = 1e-6
    codes, scale = quantise_runs(given)
    assert scale.tolist() == [[0.0, 0.0], [0.0, 0.0], [2.0**-24, 2.0**-24], [0.0, 2.0**-24]]
    assert codes.abs().sum(dim=1).tolist() == [0, 0, 4, 15]
    found = stored_and_read({"a": given}, "int5", tmp_path)["a"]
    assert found[2, [0, 39]].tolist() == [2.0**-24, -3 * 2.0**-24]
    assert bool((found[:2] == 0).all())


def test_int5_has_the_largest_numbers_that_float16_scales_reach(tmp_path: Path) -> None:
    given = torch.tensor([[15 * 65504.0, 65504.0]])
    assert torch.equal(stored_and_read({"a": given}, "int5", tmp_path)["a"], given)
    with pytest.raises(ConfigError, match="weight 'a' is not finite as int5"):
        weights_file({"a": torch.tensor([[16 * 65504.0, 1.0]])}, "int5")


def test_int8_scales_come_back_for_every_float32_mantissa() -> None:
    largest = (torch.arange(1 << 23, dtype=torch.int32) + (127 << 23)).view(torch.float32)  # all of [1, 2)
    scale = largest / 127
    assert torch.equal(127 * scale / 127, scale)


@pytest.mark.parametrize("dtype", ["float32", "float16", "int8", "int5"])
@pytest.mark.parametrize("size", [1e-7, 2e-6, 0.03, 50.0])
def test_storing_what_was_read_gives_the_same_bytes(tmp_path: Path, dtype: StoredDtype, size: float) -> None:
    given = {f"a{columns}": random_matrix(40, columns, size) for columns in (1, 20, 54, 96)}
    given["many scales"] = random_matrix(20_000, 2, size)
    given |= {"b": random_matrix(1, 9, size)[0], "none": torch.zeros((0, 4)), "narrow": torch.zeros((4, 0))}
    found = stored_and_read(given, dtype, tmp_path)
    assert {name: found[name].shape for name in given} == {name: weight.shape for name, weight in given.items()}
    assert weights_file(found, dtype) == (tmp_path / "w.safetensors").read_bytes()


def test_weights_in_another_form_than_the_config_says(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    path.write_bytes(weights_file(WEIGHTS, "int5"))
    assert stored_forms(load_file(path)) == {"a": "int5", "b": "float16"}
    assert read_weights([path]).keys() == read_weights([path], "int5").keys() == WEIGHTS.keys()
    with pytest.raises(
        ConfigError, match=r"w\.safetensors holds 'a' as int5; expected int8, for the .* says int8: get"
    ):
        read_weights([path], "int8")
    path.write_bytes(weights_file(WEIGHTS, "float32"))
    with pytest.raises(ConfigError, match="holds 'a' as float32; expected int5"):
        read_weights([path], "int5")
    save_file({"a": CODES, "a::scale": SCALES, "b": torch.ones(3)}, path)
    with pytest.raises(
        ConfigError, match="holds 'b' as float32; expected float16, for the checkpoint's config says int8"
    ):
        read_weights([path], "int8")


FIVES = torch.tensor([0, 0, 0, 0, 0xF8], dtype=torch.uint8)  # seven codes of -15 and one place without a code
RUNS = torch.tensor([[0.5]], dtype=torch.float16)
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
        ({"a": FIVES}, "'a' of uint8 [5] without scales"),
        ({"a::scale": RUNS}, "'a::scale' of float16 [1, 1] without codes"),
        ({"a": FIVES.float(), "a::scale": RUNS}, "'a::scale' of float16 [1, 1] without codes"),
        ({"a": FIVES, "a::scale": RUNS.float()}, "'a::scale' of float32 [1, 1] beside codes [5]"),
        ({"a": FIVES, "a::scale": RUNS[0]}, "'a::scale' of float16 [1] beside codes [5]"),
        ({"a": FIVES, "a::scale": RUNS[:, :0]}, "'a::scale' of float16 [1, 0] beside codes [5]"),
        ({"a": FIVES, "a::scale": RUNS.repeat(1, 2)}, "'a::scale' of float16 [1, 2] beside codes [5]"),
        ({"a": FIVES, "a::scale": RUNS.repeat(4, 1)}, "'a::scale' of float16 [4, 1] beside codes [5]"),
        ({"a": FIVES, "a::scale": -RUNS}, "'a::scale' of float16 [1, 1] of which some are negative or not finite"),
        ({"a": FIVES, "a::scale": RUNS / 0}, "'a::scale' of float16 [1, 1] of which some are negative or not finite"),
        ({"a": FIVES[:4], "a::scale": RUNS}, "'a' of uint8 [4] that are no fives of bytes"),
        ({"a": FIVES[:0], "a::scale": RUNS}, "'a' of uint8 [0] that are no fives of bytes"),
        ({"a": FIVES[None], "a::scale": RUNS}, "'a' of uint8 [1, 5] that are no fives of bytes"),
        ({"a.signs": FIVES, "a.signs::scale": RUNS}, "'a.signs' of uint8 [5] for bits"),
        ({"a": FIVES | 31, "a::scale": RUNS}, "'a' of uint8 [5] with codes of 31 before the end"),
        ({"a": FIVES | 255, "a::scale": RUNS}, "'a' of uint8 [5] with codes of 31 before the end"),
    ],
)
def test_tensors_that_are_no_stored_weights(tmp_path: Path, stored: dict[str, torch.Tensor], message: str) -> None:
    save_file(stored, tmp_path / "w.safetensors")
    with pytest.raises(ConfigError, match=rf"{re.escape(message)}; expected float32, float16, int8 with a float32"):
        read_weights([tmp_path / "w.safetensors"])
