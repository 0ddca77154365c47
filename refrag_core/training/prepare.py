"""From corpora as an index is built of them to token shards: the same readers, the same faults set aside.

Every corpus that is named is one in the shards, by the last part of its path, or by more parts where two end alike.
"""

import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from refrag_core.corpus.document import Reject
from refrag_core.corpus.filesystem import is_url
from refrag_core.corpus.readers import read_unit
from refrag_core.corpus.sources import CorpusOptions, Piece, ScanUnit, scan_units
from refrag_core.errors import ConfigError
from refrag_core.models import resolve_model
from refrag_core.training.token_shards import PrepareOptions, TextDocument, prepare_token_shards

_TOLD_REJECTS = 10
_WILDCARD = re.compile(r"[*?\[]")


@dataclass(frozen=True, slots=True)
class TrainingCorpora:
    """Corpora by what they are for, each a folder, glob or file."""

    split: tuple[str, ...]
    """A share of their documents is held out."""
    train_only: tuple[str, ...] = ()
    reported: tuple[str, ...] = ()
    """Never trained on."""

    def names(self) -> dict[str, str]:
        """The name of each corpus by its path. Raises ConfigError for one that is given twice."""
        roots = [*self.split, *self.train_only, *self.reported]
        twice = sorted(root for root, count in Counter(roots).items() if count > 1)
        if twice:
            raise ConfigError(f"corpus {twice[0]} is given twice; expected each once: name it for one use alone")
        return dict(zip(roots, _names(roots), strict=True))


def _names(roots: Sequence[str]) -> list[str]:
    """The last parts of the paths, as few as tell them apart; without wildcards and suffixes."""
    parts = [_parts(root) for root in roots]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(part[-count:]) for part in parts]
        if len(set(names)) == len(names):
            return names
    return list(roots)


def _parts(root: str) -> tuple[str, ...]:
    path = root if is_url(root) else os.path.abspath(os.path.expanduser(root))
    parts = tuple(part for part in path.split("/") if part)
    first = next((number for number, part in enumerate(parts) if _WILDCARD.search(part)), len(parts))
    *folders, last = parts[: max(first, 1)] or ("corpus",)
    return (*folders, last.partition(".")[0] or last)


@dataclass(slots=True)
class Reading:
    """What was read so far."""

    advance: Callable[[int], object]
    """Told of every so many bytes of files."""
    say: Callable[[str], object]
    rejected: Counter[str] = field(default_factory=Counter)
    """Records that are no documents, by reason."""
    quarantined: int = 0
    """Those of them that are faults."""

    def reject(self, corpus: str, reject: Reject) -> None:
        """Count one, and tell of the first few."""
        self.rejected[reject.reason.value] += 1
        if reject.disposition != "quarantined":
            return
        self.quarantined += 1
        if self.quarantined <= _TOLD_REJECTS:
            self.say(f"left out {corpus}/{reject.source}:{reject.position}: {reject.reason.value}: {reject.detail}")


def prepare_corpora(
    corpora: TrainingCorpora,
    decoder: str,
    output: Path,
    *,
    reading: CorpusOptions,
    options: PrepareOptions | None = None,
    start: Callable[[int], object],
    advance: Callable[[int], object],
    say: Callable[[str], object],
) -> dict[str, Any]:
    """Write token shards of `corpora` for the tokenizer of `decoder` to `output`, and return what is in them.

    Args:
        reading: fields and limits; its roots stand for nothing.
        options: how near-duplicates are found and documents held out.
        start, advance: told of all bytes there are to read, and of those read.

    Raises CorpusError, ConfigError and ModelNotFoundError, with what was in `output` left as it was.
    """
    names = corpora.names()
    tokenizer = resolve_model(decoder)
    pieces = {name: list(_pieces(replace(reading, roots=(root,)))) for root, name in names.items()}
    start(sum(piece.num_bytes for found in pieces.values() for piece in found))
    state = Reading(advance, say)
    documents = (document for name in pieces for document in _documents(name, pieces[name], reading, state))
    chosen = replace(
        options or PrepareOptions(),
        reported=tuple(names[root] for root in corpora.reported),
        train_only=tuple(names[root] for root in corpora.train_only),
    )
    index = prepare_token_shards(documents, tokenizer, output, chosen)
    if chosen.held_out_fraction and not index["splits"]["held_out"]["documents"]:
        say("no document is held out, so nothing will be evaluated; expected more documents or a larger share")
    return {
        "output": str(output),
        "decoder": decoder,
        **index,
        "options": asdict(chosen),
        "rejected": dict(state.rejected),
        "quarantined": state.quarantined,
    }


def _pieces(options: CorpusOptions) -> Iterator[Piece]:
    for unit in scan_units(options):
        yield from unit.pieces


def _documents(corpus: str, pieces: Sequence[Piece], options: CorpusOptions, state: Reading) -> Iterator[TextDocument]:
    for piece in pieces:
        told = 0
        for found in read_unit(ScanUnit((piece,)), options):
            if isinstance(found, Reject):
                state.reject(corpus, found)
                continue
            document = found.document
            # A file is longer or shorter than its texts: what is told never passes its bytes.
            step = min(len(document.text), piece.num_bytes - told)
            told += step
            state.advance(step)
            yield TextDocument(corpus, document.document_id, document.text)
        state.advance(piece.num_bytes - told)
