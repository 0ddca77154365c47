"""Small corpora and indexes over tiny random models, for the tests of everything that reads or makes an index."""

import atexit
import json
import random
import shutil
import tempfile
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

from refrag.pipelines.build import BuildOptions, BuildReport, build_index
from refrag.pipelines.components import ModelOptions
from refrag.pipelines.engines.local import LocalEngine
from refrag_core.corpus.sources import CorpusOptions
from tests import tiny_models

WORDS = [
    "river",
    "mountain",
    "engine",
    "chunk",
    "passage",
    "decoder",
    "encoder",
    "vector",
    "capital",
    "France",
    "winter",
    "copper",
    "theory",
    "music",
    "orbit",
    "carbon",
    "ship",
    "island",
    "garden",
    "king",
    "letter",
    "number",
    "water",
    "light",
    "stone",
    "paper",
    "glass",
    "river",
    "road",
    "bridge",
    "silent",
    "northern",
]


def sentence(generator: random.Random) -> str:
    """A capitalised sentence of 5 to 15 words."""
    words = generator.choices(WORDS, k=generator.randint(5, 15))
    return " ".join(words).capitalize() + "."


def documents(count: int, *, seed: int = 0, sentences: int = 12) -> list[dict[str, Any]]:
    """Records with id, text and two metadata fields."""
    generator = random.Random(seed)
    return [
        {
            "id": f"doc-{number:04d}",
            "text": " ".join(sentence(generator) for _ in range(generator.randint(1, sentences))),
            "year": 1900 + number % 100,
            "importance": (number % 10) / 10,
        }
        for number in range(count)
    ]


def write_jsonl(path: Path, records: list[Any]) -> Path:
    """One JSON object, or raw line (str), a line."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    path.write_text("".join(line + "\n" for line in lines), encoding="utf-8")
    return path


@cache
def models_folder() -> Path:
    """Tiny decoder, encoder (and retriever) and checkpoint, written once a session."""
    folder = Path(tempfile.mkdtemp(prefix="refrag-tiny-models-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    tiny_models.checkpoint_folder(folder)
    return folder


class SmallIndex:
    """A corpus folder and an index folder below one root, over the tiny models of the session."""

    def __init__(
        self, root: Path, records: list[Any] | None = None, *, corpus: Path | None = None, **options: Any
    ) -> None:
        self.root = root
        self.models = models_folder()
        self.corpus = corpus or root / "corpus"
        self.path = root / "index"
        if corpus is None:  # else it is there already
            self.write(documents(60) if records is None else records)
        self.options = BuildOptions(
            corpus=CorpusOptions(roots=(str(self.corpus),)),
            output=self.path,
            models=ModelOptions(
                checkpoint=str(self.models / "checkpoint"),
                retriever=str(self.models / "encoder"),
                max_passage_tokens=64,
                device="cpu",
            ),
            min_recall=0.5,
            shard_bytes=2000,
        )
        if options:
            self.options = replace(self.options, **options)

    def write(self, records: list[Any], name: str = "records.jsonl") -> None:
        """Replace one file of the corpus."""
        write_jsonl(self.corpus / name, records)

    def build(self, workers: int = 0, **changes: Any) -> BuildReport:
        """Run the job."""
        with LocalEngine(workers) as engine:
            return build_index(replace(self.options, **changes), engine)

    def with_models(self, **changes: Any) -> BuildOptions:
        """The options with other model settings."""
        return replace(self.options, models=replace(self.options.models, **changes))
