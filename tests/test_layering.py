"""Who may import what, and what must never be in the code: read from the source, not from running it."""

import ast
import json
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
LAYERS = ("refrag.schemas", "refrag.checkpoints", "refrag_core", "refrag.pipelines", "refrag.cli")
FOLDERS = {
    "schemas": "refrag.schemas",
    "checkpoints": "refrag.checkpoints",
    "refrag_core": "refrag_core",
    "pipelines": "refrag.pipelines",
}
HEAVY = {
    "torch",
    "transformers",
    "faiss",
    "ray",
    "apache_beam",
    "pyarrow.dataset",
    "tokenizers",
    "lance",
    "lancedb",
    "duckdb",
    "sqlglot",
    "obstore",
    "fastapi",
    "uvicorn",
    "prometheus_client",
    "vllm",
}
ONLY_IN = {
    "lance": {"refrag_core/lance_tables.py"},
    "lancedb": {"refrag_core/lance_tables.py"},
    "faiss": {"refrag_core/vector_index.py"},
    "duckdb": {"refrag_core/metadata_columns.py"},
    "sqlglot": {"refrag_core/predicate.py"},
    "bm25s": {"refrag_core/lexical.py"},
    "typer": {"cli.py"},
    "obstore": {"refrag_core/object_store.py"},
    "vllm": {"refrag_core/vllm_engine.py"},
    "ray": {"pipelines/engines/ray.py"},
    "apache_beam": {"pipelines/engines/beam.py"},
}
WRITTEN_FOR_OTHERS = {"refrag_core/vllm_server.py": ["torch.save"]}
"""A vLLM server reads prompts in no other form; nothing of ours reads one."""
PICKLES = {"pickle", "_pickle", "cPickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}


def sources() -> list[Path]:
    folders = [path for folder in FOLDERS for path in (ROOT / folder).rglob("*.py")]
    return sorted([ROOT / "cli.py", *folders])


def name_of(path: Path) -> str:
    """Dotted name of a source file as it is installed."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    prefix = FOLDERS.get(parts[0], f"refrag.{parts[0]}")
    return ".".join([prefix, *(part for part in parts[1:] if part != "__init__")])


def imported(tree: ast.Module, module: str, *, package: bool = False) -> Iterator[str]:
    """Dotted names of all modules (and of what is taken from them) that any line of a file imports."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            parents = module.split(".")[: len(module.split(".")) - node.level + package] if node.level else []
            base = ".".join([*parents, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Call) and _called(node) in ("import_module", "__import__"):
            yield from (a.value for a in node.args if isinstance(a, ast.Constant) and isinstance(a.value, str))


def _called(node: ast.Call) -> str:
    function = node.func
    return function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")


def layer_of(module: str) -> int | None:
    for rank, layer in enumerate(LAYERS):
        if module == layer or module.startswith(layer + "."):
            return rank
    return None


def upward_imports(tree: ast.Module, module: str) -> list[str]:
    own = layer_of(module)
    assert own is not None, module
    return [name for name in imported(tree, module) if (rank := layer_of(name)) is not None and rank > own]


def unsafe_calls(tree: ast.Module, module: str) -> list[str]:
    """Whatever would execute or unpickle data, fetch code, or skip weights that do not fit."""
    found = [name for name in imported(tree, module) if name.split(".")[0] in PICKLES or name == "numpy.load"]
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = ast.unparse(node.func)
        if name in ("torch.load", "torch.save", "eval", "exec", "torch.hub.load", "pd.read_pickle"):
            found.append(name)
        for keyword in node.keywords:
            value = ast.unparse(keyword.value)
            if keyword.arg in ("allow_pickle", "trust_remote_code") and value != "False":
                found.append(f"{keyword.arg}={value}")
            if keyword.arg == "strict" and name.endswith("load_state_dict"):
                found.append(f"strict={value}")
    return found


def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def test_the_layers_are_where_they_should_be() -> None:
    names = {name_of(path) for path in sources()}
    assert {"refrag.cli", "refrag.schemas", "refrag_core.runtime", "refrag.pipelines.engines.local"} <= names


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_go_one_way(path: Path) -> None:
    assert upward_imports(parse(path), name_of(path)) == []


@pytest.mark.parametrize("path", sources(), ids=lambda path: str(path.relative_to(ROOT)))
def test_each_heavy_library_has_one_door(path: Path) -> None:
    relative = path.relative_to(ROOT).as_posix()
    roots = {name.split(".")[0] for name in imported(parse(path), name_of(path))}
    assert [root for root in roots & set(ONLY_IN) if relative not in ONLY_IN[root]] == []


@pytest.mark.parametrize(
    "path", [*sources(), *sorted((ROOT / "benchmarks").rglob("*.py"))], ids=lambda path: str(path.relative_to(ROOT))
)
def test_nothing_is_pickled_or_executed(path: Path) -> None:
    allowed = WRITTEN_FOR_OTHERS.get(path.relative_to(ROOT).as_posix(), [])
    assert unsafe_calls(parse(path), name_of(path)) == allowed


@pytest.mark.parametrize(
    ("module", "source", "found"),
    [
        (
            "refrag_core.runtime",
            "from refrag.pipelines.build import build_index",
            ["refrag.pipelines.build.build_index"],
        ),
        ("refrag_core.runtime", "def f():\n    import refrag.cli", ["refrag.cli"]),
        ("refrag.schemas", "import refrag_core", ["refrag_core"]),
        ("refrag.pipelines.build", "from refrag import cli", ["refrag.cli"]),
        ("refrag.pipelines.build", "from ..cli import main", ["refrag.cli.main"]),
        ("refrag.pipelines.build", "from importlib import import_module\nimport_module('refrag.cli')", ["refrag.cli"]),
        ("refrag.pipelines.build", "from refrag_core import errors\nfrom refrag.schemas import arrow", []),
    ],
)
def test_a_planted_import_is_found(module: str, source: str, found: list[str]) -> None:
    assert upward_imports(ast.parse(source), module) == found


@pytest.mark.parametrize(
    ("source", "found"),
    [
        ("def f():\n    import pickle", ["pickle"]),
        ("import torch\ntorch.load('x')", ["torch.load"]),
        ("np.load('x', allow_pickle=True)", ["allow_pickle=True"]),
        ("np.load('x', allow_pickle=False)", []),
        ("model.load_state_dict(state, strict=False)", ["strict=False"]),
        ("AutoModel.from_pretrained('x', trust_remote_code=True)", ["trust_remote_code=True"]),
        ("zip(a, b, strict=False)", []),
    ],
)
def test_a_planted_pickle_is_found(source: str, found: list[str]) -> None:
    assert unsafe_calls(ast.parse(source), "refrag_core.x") == found


# --- what running loads -----------------------------------------------------------------------------


def python(code: str, *arguments: str) -> str:
    """What `code` prints in a fresh interpreter."""
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


HELP = """
import contextlib, io, json, sys
from refrag import cli
loaded = {}
for words in json.loads(sys.argv[1]):
    sys.argv = ["refrag", *words, "--help"]
    with contextlib.redirect_stdout(io.StringIO()) as shown, contextlib.suppress(SystemExit):
        cli.main()
    assert "Usage" in shown.getvalue(), words
    loaded[" ".join(words)] = sorted(sys.modules)
print(json.dumps(loaded))
"""


def commands() -> list[list[str]]:
    """Every command and group of commands, by its words."""
    import typer

    from refrag.cli import app

    def walk(command: object, words: list[str]) -> Iterator[list[str]]:
        yield words
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*words, name])

    return list(walk(typer.main.get_command(app), []))


def test_help_loads_nothing_heavy() -> None:
    assert [] in commands()
    assert ["index", "build"] in commands()
    loaded = json.loads(python(HELP, json.dumps(commands())))
    assert {words: sorted(HEAVY & set(modules)) for words, modules in loaded.items()} == {words: [] for words in loaded}


TOKENIZE = """
import json, sys
from refrag.pipelines.engines.local import LocalEngine
from refrag.pipelines.scan import merge_runs, scan_corpus
from refrag.pipelines.plan import cut_shards
from refrag.pipelines.stages import TokenizeStage
from refrag_core.corpus.sources import CorpusOptions
from refrag_core.models import fingerprint_tokenizer
from refrag_core.storage import FolderStore
from refrag_core.work_folder import WorkFolder
from pathlib import Path

corpus, tokenizer, work = map(Path, sys.argv[1:])
folder = WorkFolder(str(work))
scan = scan_corpus(CorpusOptions((str(corpus),)), folder, chunk_sizes=(16,), default_chunk_size=16)
(spec,) = cut_shards(merge_runs(scan.runs, work=folder), folder, 1 << 40)
receipt = TokenizeStage(str(tokenizer), fingerprint_tokenizer(tokenizer), 64)(FolderStore(work / "index"), spec)
assert receipt.rows["documents"] == 5 and receipt.rows["chunks"] > 5
print(json.dumps(sorted(sys.modules)))
"""


def test_tokenizing_workers_load_no_model_library(tmp_path: Path) -> None:
    from tests.small_index import documents, models_folder, write_jsonl

    corpus = write_jsonl(tmp_path / "corpus" / "records.jsonl", documents(5))
    loaded = set(json.loads(python(TOKENIZE, str(corpus), str(models_folder() / "decoder"), str(tmp_path / "work"))))
    assert "tokenizers" in loaded
    assert loaded & {"torch", "transformers", "faiss", "typer", "rich"} == set()


def test_worker_modules_import_no_model_library() -> None:
    names = ["refrag_core.chunking", "refrag.pipelines.scan", "refrag_core.errors", "refrag_core.digests"]
    names += [name_of(path) for path in sources() if "refrag_core/corpus/" in path.as_posix()]
    code = "import importlib, sys\nfor n in sys.argv[1:]: importlib.import_module(n)\nprint(*sys.modules)"
    assert set(python(code, *names).split()) & {"torch", "transformers", "faiss"} == set()
