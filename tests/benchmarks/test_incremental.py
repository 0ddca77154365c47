import pytest

from benchmarks.incremental import changed, documents


def test_documents_are_a_function_of_their_number_and_edition() -> None:
    assert list(documents(5)) == list(documents(9))[:5]
    assert [a["text"] != b["text"] for a, b in zip(documents(3), documents(3, edition=1), strict=True)] == [True] * 3


@pytest.mark.parametrize("count", [500, 1000])
def test_the_change_is_as_large_as_it_says(count: int) -> None:
    before = {record["id"]: record["text"] for record in documents(count)}
    after = {record["id"]: record["text"] for record in changed(count, 0.02)}
    edited = [name for name in before.keys() & after.keys() if before[name] != after[name]]
    removed, new = before.keys() - after.keys(), after.keys() - before.keys()
    assert len(edited) == count // 50
    assert len(removed) == len(new) == count // 500
