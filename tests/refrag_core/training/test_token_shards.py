import json
from pathlib import Path

import numpy as np
import pytest

from refrag_core.errors import ConfigError, CorpusError, FingerprintMismatchError
from refrag_core.training.token_shards import (
    PrepareOptions,
    TextDocument,
    TokenShards,
    TokenSplit,
    Windows,
    fixed_windows,
    prepare_token_shards,
    read_text_documents,
    shingle_hashes,
    split_of,
)


def split_of_lengths(*lengths: int) -> TokenSplit:
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    return TokenSplit(np.arange(offsets[-1], dtype=np.uint16), offsets, np.zeros(len(lengths), np.int16))


def test_documents_are_split_whole_and_reported_corpora_kept_out(data: Path) -> None:
    shards = TokenShards.open(data)
    splits = shards.index["splits"]
    assert sum(split["documents"] for split in splits.values()) == 60
    assert splits["reported"]["documents"] == 12
    kept_out = shards.corpora.index("kept-out")
    assert set(shards.split("reported").corpora.tolist()) == {kept_out}
    assert kept_out not in shards.split("train").corpora
    assert 0 < splits["held_out"]["documents"] < splits["train"]["documents"]


def test_nothing_is_held_out_from_a_corpus_that_is_only_trained_on() -> None:
    documents = [TextDocument(name, str(number), "") for name in ("core", "more") for number in range(200)]
    splits = [split_of(document, PrepareOptions(train_only=("more",))) for document in documents]
    assert 0 < splits[:200].count("held_out") < 30
    assert set(splits[200:]) == {"train"}


def test_near_duplicates_are_left_out(tmp_path: Path, models: tuple[Path, Path]) -> None:
    text = " ".join(f"word{number * 7919 % 1000}" for number in range(300))
    documents = [
        TextDocument("a", "1", text),
        TextDocument("a", "2", text + " and a little more"),
        TextDocument("a", "3", " ".join(reversed(text.split()))),
    ]
    index = prepare_token_shards(documents, models[1], tmp_path, PrepareOptions(held_out_fraction=0.0))
    assert index["corpora"][0]["near_duplicates"] == 1
    assert index["splits"]["train"]["documents"] == 2


def test_an_n_gram_has_the_same_hash_wherever_it_stands() -> None:
    one = shingle_hashes(np.asarray([9, 1, 2, 3, 8], np.uint16), shingle_tokens=3, sample_every=1)
    other = shingle_hashes(np.asarray([1, 2, 3], np.uint16), shingle_tokens=3, sample_every=1)
    assert set(other.tolist()) < set(one.tolist())


def test_shards_are_the_same_bytes_again(tmp_path: Path, models: tuple[Path, Path]) -> None:
    documents = [TextDocument("a", str(number), f"document number {number} of a few") for number in range(5)]
    for name in ("one", "two"):
        prepare_token_shards(documents, models[1], tmp_path / name)
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "two" / path.name).read_bytes()


def test_a_kill_between_two_files_leaves_no_shards_rather_than_mixed_ones(
    tmp_path: Path, models: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    old, new = ([TextDocument("toy", str(n), f"{n} {word} is here and there")] for n, word in enumerate(("old", "new")))
    prepare_token_shards(old, models[1], tmp_path)
    replace = Path.replace

    def replace_and_die(path: Path, target: Path) -> Path:
        if path.name == "train.offsets.npy":
            raise KeyboardInterrupt
        return replace(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "replace", replace_and_die)
        with pytest.raises(KeyboardInterrupt):
            prepare_token_shards(new, models[1], tmp_path)
    with pytest.raises(CorpusError, match="no token shards in"):
        TokenShards.open(tmp_path)
    (tmp_path / "left-by-a-kill.tmp").mkdir()
    index = prepare_token_shards(new, models[1], tmp_path)
    assert TokenShards.open(tmp_path).index == index
    assert not list(tmp_path.glob("*.tmp"))


def test_another_tokenizer_is_refused(data: Path) -> None:
    with pytest.raises(
        FingerprintMismatchError, match="prepare them with `refrag train prepare --decoder` and this decoder"
    ):
        TokenShards.open(data, tokenizer_fingerprint="0" * 64)


def test_missing_and_foreign_folders(tmp_path: Path) -> None:
    with pytest.raises(CorpusError, match=r"`refrag train prepare CORPUS -o .*` writes: run that first"):
        TokenShards.open(tmp_path)
    (tmp_path / "token_shards.json").write_text(json.dumps({"format": "other"}))
    with pytest.raises(ConfigError, match="prepare the shards again"):
        TokenShards.open(tmp_path)


def test_a_torn_line_names_its_place(tmp_path: Path) -> None:
    (tmp_path / "c.jsonl").write_text('{"id": "1", "text": "a"}\n{"id": \n')
    with pytest.raises(CorpusError, match=r"line 2"):
        list(read_text_documents(tmp_path / "c.jsonl"))


def test_windows_stay_inside_documents_and_do_not_overlap() -> None:
    split = split_of_lengths(10, 3, 25)
    windows = Windows(split, length=4, seed=0)
    first = next(n for n in range(100) if windows.epoch_of(n) == 1)
    taken = windows.take(0, first)
    assert (np.diff(taken, axis=1) == 1).all()
    assert len(set(taken.reshape(-1).tolist())) == taken.size
    documents = np.searchsorted(split.offsets, taken, side="right")
    assert (documents == documents[:, :1]).all()
    assert 2 not in documents  # document of 3 tokens
    assert windows.usable_tokens == 35


def test_windows_from_any_position_are_those_of_one_pass() -> None:
    whole = Windows(split_of_lengths(40, 40), length=5, seed=3).take(0, 60)
    resumed = Windows(split_of_lengths(40, 40), length=5, seed=3).take(37, 23)
    assert np.array_equal(whole[37:], resumed)
    assert not np.array_equal(whole, Windows(split_of_lengths(40, 40), length=5, seed=4).take(0, 60))


def test_fixed_windows_take_every_document_before_any_twice() -> None:
    windows, documents = fixed_windows(split_of_lengths(9, 2, 4, 4), length=4, limit=4)
    assert documents.tolist() == [0, 2, 3, 0]
    assert windows[3].tolist() == [4, 5, 6, 7]


def test_no_document_long_enough() -> None:
    with pytest.raises(ConfigError, match="smaller context"):
        Windows(split_of_lengths(3), length=4, seed=0)
