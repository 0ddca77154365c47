"""Arrays on their way to a device."""

import numpy as np
import pytest
import torch

from refrag_core.devices import upload


@pytest.mark.parametrize("dtype", ["int32", "int64", "float16", "float32", "bool"])
def test_an_array_arrives_as_it_is(dtype: str) -> None:
    values = np.arange(12).reshape(3, 4).astype(dtype)
    for given in (values, values.T, values[:, ::2], values[:0]):
        made = upload(given, "cpu")
        assert (made.dtype, made.shape) == (getattr(torch, dtype), given.shape)
        assert np.array_equal(made.numpy(), given)


def test_what_pytorch_has_no_dtype_for_is_refused() -> None:
    with pytest.raises(TypeError, match=r"can't convert np\.ndarray of type"):
        upload(np.array(["text"]), "cpu")
