from pathlib import Path

import pytest
import torch

from refrag_core.errors import FingerprintMismatchError, ModelNotFoundError
from refrag_core.stored_weights import read_weights, verified_paths, write_weights

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
