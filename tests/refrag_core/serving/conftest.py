"""One open index for all servers of these tests."""

import pytest

from refrag_core.runtime import Runtime
from tests.small_index import SmallIndex


@pytest.fixture(scope="session")
def runtime(library: SmallIndex, tmp_path_factory: pytest.TempPathFactory) -> Runtime:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        return Runtime.open(library.path, device="cpu")
