"""The runtime: a question against a prebuilt index → an answer, with what it cost.

retrieve → fetch → select → compose → prefill → decode, each a small step over plain values. The chunk encoder
is not loaded: chunk embeddings come from the index's memory map.
"""

import contextlib
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np
import numpy.typing as npt
from tokenizers import Tokenizer
from torch import Tensor

from refrag_core.adapter import Adapter
from refrag_core.answer_text import AnswerText, FinishReason
from refrag_core.bundle import check_files, check_signed
from refrag_core.checkpoint import Checkpoint, load_checkpoint
from refrag_core.chunk_cache import CachedChunkEncoder, ChunkCache, DiskChunkCache, MemoryChunkCache
from refrag_core.chunking import ChunkingOptions, chunk_rows, cut_passages, passage_id, tokenize_documents
from refrag_core.composition import Composed, ContextPassage, compose, pad_batch
from refrag_core.decoder import FINISHED, Decoder, lowest
from refrag_core.devices import resolve_device
from refrag_core.embedding_storage import concatenate_rows, store_rows
from refrag_core.encoder import ChunkEncoder
from refrag_core.errors import ConfigError, FingerprintMismatchError, UntrainedProjectionError, UsageError
from refrag_core.fast_path import FastPath, HotPassages
from refrag_core.history import HistoryOptions, HistoryUse
from refrag_core.index_reader import FetchedPassage, IndexReader, PassageRef
from refrag_core.manifest import read_manifest
from refrag_core.models import fingerprint_tokenizer, resolve_model
from refrag_core.policy import PointerPolicy, PolicyName, num_expanded, policy_logits, select
from refrag_core.projection import Projection
from refrag_core.retrieval import BY_VECTORS, RetrievalOptions, Searcher, matching_retriever
from refrag_core.retriever import Retriever
from refrag_core.storage import IndexLocation
from refrag_core.tables import TableFormat
from refrag_core.template import PromptTemplate

if TYPE_CHECKING:
    from refrag_core.conversation import Conversation
    from refrag_core.session import Session

Mask = npt.NDArray[np.bool_]
Scores = npt.NDArray[np.floating]


_SHORT_QUESTION = "Who was born there?"
STEPS = ("retrieval", "fetch", "encode", "upload", "policy", "compose", "queue", "prefill")
"""What comes before the first token, in order; each has its milliseconds in `Stats`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AskOptions:
    """How one question is answered."""

    top_k: int = 5
    policy: PolicyName = "learned"
    expansion_fraction: float = 0.1
    max_new_tokens: int = 64
    temperature: float = 0.0
    top_p: float = 1.0
    seed: int = 0
    stop: tuple[str, ...] = ()
    """Texts before which an answer ends."""
    strict: bool = False
    """Fail instead of dropping passages that do not fit the decoder."""
    max_positions: int | None = None
    """Slots + new tokens at most, where that is less than the decoder's own limit."""
    explain: bool = False
    """Give the chunks of each passage, with their text and what the policy ranked them by."""
    retrieval: RetrievalOptions = BY_VECTORS
    """Which passages may be found, and how they are ranked."""


Generate: TypeAlias = Callable[[Tensor, AskOptions], Iterator[list[int]]]
"""From input embeddings `[s, d_dec]` to the tokens of one answer, as `Decoder.generate` gives them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Stats:
    """Where the time went (milliseconds) and what the decoder saw; nothing but retrieval by default."""

    retrieval_ms: float
    """Query embedding and search."""
    fetch_ms: float = 0.0
    upload_ms: float = 0.0
    """Chunk embeddings to the device, where hot ones are kept there; else part of composing."""
    encode_ms: float = 0.0
    """Encoding of text that is not in the index; 0 without any."""
    policy_ms: float = 0.0
    compose_ms: float = 0.0
    queue_ms: float = 0.0
    """Wait for a free slot of the decoder; 0 where nobody else asks."""
    prefill_ms: float = 0.0
    """Prefill and the choice of the first token."""
    ttft_ms: float = 0.0
    """Request in → first token out."""
    ttit_ms: float = 0.0
    """Mean time between tokens; 0 for a single one."""
    new_tokens: int = 0
    num_chunks: int = 0
    num_expanded: int = 0
    context_tokens: int = 0
    """Tokens of the passages used."""
    decoder_positions: int = 0
    """Slots of the whole prompt."""
    reused_positions: int = 0
    """Of them, those that a conversation's prompt before had left in the key-value cache."""
    compression: float = 1.0
    """Context tokens over the slots that they took."""


@dataclass(frozen=True, slots=True)
class UsedChunk:
    """One chunk of a passage in the prompt."""

    text: str
    """A character that two chunks share is the later one's."""
    num_tokens: int
    expanded: bool
    score: float | None
    """What the policy ranked it by: its logit, or nats a token; None for policies that rank nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UsedPassage:
    """A passage in the prompt and what became of its chunks."""

    rank: int
    score: float | None
    """As in `Hit`; None for a passage that did not come from retrieval."""
    doc_id: str
    passage: str
    text: str
    metadata: Mapping[str, Any]
    chunk_size: int
    num_chunks: int
    expanded: tuple[int, ...]
    """Ordinals of the chunks given as full tokens."""
    chunks: tuple[UsedChunk, ...] = ()
    """All of them, where the options ask to `explain`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """An answer, the passages behind it, and its cost."""

    question: str
    answer: str
    passages: tuple[UsedPassage, ...]
    dropped: tuple[str, ...]
    """Documents of the lowest-ranked passages that did not fit the decoder."""
    stats: Stats
    policy: str
    expansion_fraction: float
    trained: bool
    """Whether the projection behind compressed chunks was trained."""
    version: int
    """Generation of the index."""
    passing: int | None
    """Live passages that the filter let through; None without one."""
    finish_reason: FinishReason = "stop"
    """`stop`: at an end-of-sequence id or a stop text; `length`: at max_new_tokens."""
    history: HistoryUse | None = None
    """What became of earlier turns; None outside of conversations. Turns given as passages are among `passages`."""


def check_untrained(trained: bool, policy: str | None, expansion_fraction: float | None, allow: bool) -> None:
    """Raise UntrainedProjectionError when an untrained projection would have to carry meaning.

    Args:
        policy, expansion_fraction: as the user gave them; None where not given.
    """
    if trained or allow or not needs_training(policy, expansion_fraction):
        return
    raise UntrainedProjectionError(
        "compressed chunks were asked for, but the projection of this index's checkpoint was never trained and would "
        "feed the decoder noise; expected a trained checkpoint (`refrag index build --checkpoint FOLDER`): leave "
        "--policy and --expansion-fraction out to expand every chunk, or pass --allow-untrained to see the noise"
    )


def needs_training(policy: str | None, expansion_fraction: float | None) -> bool:
    """Whether these settings, None where not given, ask for compressed chunks."""
    all_expanded = policy == "all" or (expansion_fraction == 1.0 and policy != "none")
    return not all_expanded and not (policy is None and expansion_fraction is None)


@dataclass(frozen=True, slots=True)
class GivenPassage:
    """A passage that came with the request, not from the index."""

    name: str
    text: str
    passage: str
    """Passage id, hexadecimal."""


@dataclass(frozen=True, slots=True)
class Selection:
    """The passages of one prompt, best first, with their columns and the chunks to expand."""

    sources: Sequence[tuple[PassageRef | GivenPassage, float | None]]
    """Where each passage is from, and its score in retrieval."""
    fetched: Sequence[FetchedPassage]
    expansion_mask: Mask
    """bool over all chunks of all passages, in order."""
    scores: Scores | None = None
    """float over the same chunks: what the policy ranked them by."""
    rows: Tensor | None = None
    """All passages' chunk embeddings on the device, where they are kept there."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """A question with its prompt, ready for a decoder."""

    question: str
    options: AskOptions
    chosen: Selection
    composed: Composed | None
    """None where a filter leaves no passage and none is given: then there is nothing to decode."""
    clock: "Clock"


@dataclass(frozen=True, slots=True, kw_only=True)
class RuntimeOptions:
    """What a runtime was opened with, and opens every later generation with."""

    location: IndexLocation
    decoder: str | None = None
    retriever: str | None = None
    checkpoint: str | None = None
    chunk_cache: Path | None = None
    tables: TableFormat = "parquet"
    device: str = "auto"
    verify_keys: tuple[Path, ...] = ()
    captured: bool = False
    device_map: str | None = None
    composes_only: bool = False


@dataclass(frozen=True, slots=True)
class _Generation:
    """One generation with the models that answer from it: what a reload replaces, all at once."""

    searcher: Searcher
    checkpoint: Checkpoint
    decoder: Decoder
    decoder_folder: Path
    projection: Projection
    policy: PointerPolicy
    text_encoder: "_TextEncoder"
    fast: FastPath | None
    hot: HotPassages | None


class Runtime:
    """An open index or bundle with retriever, policy, projection and decoder. Build it with `open`.

    Threads may share it. A request answers from the generation that was current when it came in, whatever a
    `reload` does meanwhile.
    """

    def __init__(self, generation: _Generation, options: RuntimeOptions) -> None:
        self._generation = generation
        self._options = options
        self._reloading = threading.Lock()

    @classmethod
    def open(
        cls,
        location: IndexLocation,
        *,
        version: int | None = None,
        decoder: str | None = None,
        retriever: str | None = None,
        checkpoint: str | None = None,
        chunk_cache: Path | None = None,
        tables: TableFormat = "parquet",
        device: str = "auto",
        verify_keys: Sequence[Path] = (),
        captured: bool | None = None,
        device_map: str | None = None,
        composes_only: bool = False,
    ) -> "Runtime":
        """Open a generation of the index or bundle at `location`: verify its manifest, map its tables, load the models.

        Args:
            decoder, retriever, checkpoint: references in place of those that the index names.
            chunk_cache: file that keeps the chunk embeddings of text outside the index between runs.
            tables: read the mapped Parquet shards, or the LanceDB tables (the same answers, slower).
            verify_keys: public keys; with them nothing is opened that is not signed with one, to the last byte.
            captured: answer by captured graphs, which first requests pay for (see `warm`) and later ones gain by.
                On a CPU it is the same path without graphs. None does on CUDA alone; for a single question it does not
                pay.
            device_map: spread the decoder's layers over all GPUs, see `Decoder.load`; such a decoder runs uncaptured.
            composes_only: load the decoder's input embeddings alone: prompts are composed here, and an engine that is
                given with each question decodes them.

        Raises CorruptIndexError, SignatureError, ModelNotFoundError, and FingerprintMismatchError when a model is not
        the one that the index was made for.
        """
        if captured and composes_only:
            raise ConfigError("captured graphs need the whole decoder; expected captured or composes_only, not both")
        device = resolve_device(device)
        options = RuntimeOptions(
            location=location,
            decoder=decoder,
            retriever=retriever,
            checkpoint=checkpoint,
            tables=tables,
            chunk_cache=chunk_cache,
            device=device,
            verify_keys=tuple(verify_keys),
            captured=device != "cpu" and device_map is None and not composes_only if captured is None else captured,
            device_map=device_map,
            composes_only=composes_only,
        )
        return cls(_open_generation(options, version, None), options)

    @classmethod
    def assemble(
        cls,
        *,
        searcher: Searcher,
        checkpoint: Checkpoint,
        decoder: Decoder,
        fast: FastPath | None = None,
    ) -> "Runtime":
        """A runtime over parts that are open already, as a benchmark has them; it has nothing to reload from.

        Args:
            checkpoint: its projection and policy are moved to the decoder's device.
            fast: made over the same decoder, projection and policy; None answers by the plain path.
        """
        generation = _Generation(
            searcher=searcher,
            checkpoint=checkpoint,
            decoder=decoder,
            decoder_folder=Path(),
            projection=checkpoint.projection.to(decoder.device).requires_grad_(False),
            policy=checkpoint.policy.to(decoder.device).requires_grad_(False),
            text_encoder=_TextEncoder(checkpoint, str(decoder.device), None),
            fast=fast,
            hot=None if fast is None else HotPassages(decoder.device),
        )
        return cls(generation, RuntimeOptions(location=Path(), device=str(decoder.device), captured=fast is not None))

    def reload(self, version: int | None = None) -> int:
        """Answer from generation `version` from now on, by default the newest; returns its number.

        Requests that are under way end on the generation that they began with; models that stay the same are not
        loaded again. An older number rolls back. When opening it fails, the error is raised and the runtime
        goes on with the generation that it has.
        """
        with self._reloading:
            current = self._generation
            store = current.searcher.reader.store
            wanted = read_manifest(store, version)
            if wanted != current.searcher.reader.manifest:
                opened = _open_generation(self._options, wanted.version, current)
                opened.searcher.reader.map_all()
                if "lexical" in vars(current.searcher):  # hybrid questions are asked here: none is to wait for it
                    with contextlib.suppress(UsageError):  # no words: told to whoever asks for them
                        _ = opened.searcher.lexical
                self._generation = opened
            return wanted.version

    def pinned(self) -> "Runtime":
        """This runtime with the generation that it has now, for good: a reload of this one does not change it."""
        return Runtime(self._generation, self._options)

    def warm(self, positions: Sequence[int]) -> None:
        """Capture what prompts of these many decoder positions and a short question need, where answers come so."""
        generation = self._generation
        if generation.fast is not None:
            generation.searcher.embed(_SHORT_QUESTION)
            generation.fast.warm(positions)

    @property
    def version(self) -> int:
        """Generation that the next request is answered from."""
        return self.reader.manifest.version

    @property
    def composes_only(self) -> bool:
        """Whether its decoder has input embeddings and nothing else."""
        return self._options.composes_only

    @property
    def searcher(self) -> Searcher:
        """Retriever and index."""
        return self._generation.searcher

    @property
    def reader(self) -> IndexReader:
        """The index's tables."""
        return self._generation.searcher.reader

    @property
    def checkpoint(self) -> Checkpoint:
        """The trained REFRAG model, or an untrained one."""
        return self._generation.checkpoint

    @property
    def decoder(self) -> Decoder:
        """What generates."""
        return self._generation.decoder

    @property
    def decoder_folder(self) -> Path:
        """Where the decoder was loaded from."""
        return self._generation.decoder_folder

    @property
    def projection(self) -> Projection:
        """φ on the decoder's device."""
        return self._generation.projection

    @property
    def policy(self) -> PointerPolicy:
        """Who chooses the chunks to expand, on the decoder's device."""
        return self._generation.policy

    @property
    def template(self) -> PromptTemplate:
        """The parts of a prompt, as token ids."""
        return self._generation.checkpoint.config.template

    @property
    def trained(self) -> bool:
        """Whether compressed chunks mean anything to the decoder."""
        return self._generation.checkpoint.config.trained

    @property
    def chunk_encoder(self) -> CachedChunkEncoder:
        """The checkpoint's encoder behind the chunk cache: loaded only for chunks that neither index nor cache has."""
        return self._generation.text_encoder.chunks

    # --- text outside the index

    def encode_text(self, name: str, text: str) -> list[tuple["GivenPassage", FetchedPassage]]:
        """A text cut into passages and encoded now, as the index would have done it; the cache spares repetition."""
        parameters, made = self.reader.manifest.parameters, []
        for given, ids in self.cut_text(name, text):
            encoded = self.chunk_encoder.encode(*chunk_rows(ids, parameters.chunk_size))
            embeddings = store_rows(encoded, parameters.embedding_dtype)
            made.append((given, FetchedPassage(ids, parameters.chunk_size, embeddings, None)))
        return made

    def cut_text(self, name: str, text: str) -> list[tuple["GivenPassage", npt.NDArray[np.int32]]]:
        """A text cut into passages, with their token ids, as the index would have done it."""
        parameters = self.reader.manifest.parameters
        options = ChunkingOptions(parameters.chunk_size, parameters.max_passage_tokens)
        (tokens,) = tokenize_documents([text], self.decoder.tokenizer)
        made, occurrences = [], Counter[str]()
        for passage in cut_passages(text, tokens, options):
            given = GivenPassage(name, passage.text, passage_id(name, passage.text, occurrences[passage.text]).hex())
            occurrences[passage.text] += 1
            made.append((given, tokens.ids[passage.token_start : passage.token_end]))
        return made

    # --- the steps

    def retrieve(
        self, question: str, top_k: int, options: RetrievalOptions = BY_VECTORS
    ) -> list[tuple[PassageRef, float]]:
        """Where the best passages are, best first, with their scores."""
        return self.searcher.retrieve(question, top_k, options)

    def fetch(self, refs: Sequence[tuple[PassageRef, float]]) -> list[FetchedPassage]:
        """Tokens, chunk embeddings and scores of passages, from the memory map."""
        return self.reader.fetch([ref for ref, _ in refs])

    def upload(self, sources: Sequence[PassageRef | GivenPassage], fetched: Sequence[FetchedPassage]) -> Tensor | None:
        """Chunk embeddings `[L, d_enc]` of all passages on the device, where hot ones are kept there; else None."""
        if self._generation.hot is None or not fetched:
            return None
        keys = [source.passage if isinstance(source, GivenPassage) else source for source in sources]
        return self._generation.hot.rows(keys, [passage.embeddings for passage in fetched])

    def select(
        self,
        fetched: Sequence[FetchedPassage],
        options: AskOptions,
        query: npt.NDArray[np.float32] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Mask:
        """expansion_mask over all chunks of all passages. Raises MissingScoresError for `perplexity` without scores.

        Args:
            rows: the chunk embeddings from `upload`.
        """
        return self._select(fetched, options, self.score_chunks(fetched, options, query, rows=rows))

    def score_chunks(
        self,
        fetched: Sequence[FetchedPassage],
        options: AskOptions,
        query: npt.NDArray[np.float32] | None = None,
        *,
        rows: Tensor | None = None,
    ) -> Scores | None:
        """What the policy ranks the chunks by, float32 over all of them: logits or nats a token; None for the others.

        Also None for `perplexity` where the index has no scores, and for `learned` where nothing is to be expanded: the
        device is spared a wait.
        """
        num_chunks = sum(len(passage.embeddings) for passage in fetched)
        if options.policy == "learned":
            if not num_expanded(num_chunks, options.expansion_fraction):
                return None
            return self._policy_logits(fetched, query if self.policy.query_dim else None, rows)
        nll = [passage.scores for passage in fetched if passage.scores is not None]
        return np.concatenate(nll) if options.policy == "perplexity" and fetched and len(nll) == len(fetched) else None

    @staticmethod
    def _select(fetched: Sequence[FetchedPassage], options: AskOptions, scores: Scores | None) -> Mask:
        num_chunks = sum(len(passage.embeddings) for passage in fetched)
        chosen = "none" if options.policy == "learned" and scores is None else options.policy
        if not num_chunks:
            return np.zeros(0, bool)
        return select(
            chosen,
            num_chunks=num_chunks,
            expansion_fraction=options.expansion_fraction,
            logits=scores if options.policy == "learned" else None,
            nll=scores if options.policy == "perplexity" else None,
            seed=options.seed,
        )

    def _policy_logits(
        self, fetched: Sequence[FetchedPassage], query: npt.NDArray[np.float32] | None, rows: Tensor | None
    ) -> npt.NDArray[np.float32]:
        if self._generation.fast is not None and rows is not None:
            return self._generation.fast.policy_logits(rows, query)
        return policy_logits(self.policy, concatenate_rows([passage.embeddings for passage in fetched]), query)

    def compose(
        self,
        question: str,
        fetched: Sequence[FetchedPassage],
        expansion_mask: Mask,
        options: AskOptions,
        history: Sequence[int] = (),
        *,
        rows: Tensor | None = None,
    ) -> Composed:
        """The decoder's mixed input: one slot for a compressed chunk, its tokens for an expanded one.

        Args:
            history: ids of a conversation's raw turns.
            rows: the chunk embeddings from `upload`.
        """
        fast = self._generation.fast
        return compose(
            self.template,
            [ContextPassage(p.tokens, p.chunk_size, p.embeddings) for p in fetched],
            expansion_mask,
            self.decoder.tokenizer.encode(question, add_special_tokens=False).ids,
            embed=self.decoder.embed,
            project=self.projection if fast is None or rows is None else fast.project,
            device=self.decoder.device,
            history=history,
            max_positions=lowest(self.decoder.max_positions, options.max_positions),
            max_new_tokens=options.max_new_tokens,
            strict=options.strict,
            rows=rows,
        )

    # --- all together

    def ask(
        self,
        question: str,
        options: AskOptions | None = None,
        *,
        given: Mapping[str, str] | None = None,
        on_text: Callable[[str], object] | None = None,
        generate: Generate | None = None,
    ) -> Answer:
        """Answer a question from the index; with nothing at all where a filter leaves no passage and none is given.

        Args:
            given: texts by name that stand before the retrieved passages; encoded now, through the chunk cache.
            on_text: gets each piece of the answer's text as soon as it is certain.
            generate: what decodes in place of this runtime's own decoder; see `decoder_engine.generate_by`.
        """
        runtime = self.pinned()
        prepared = runtime.prepare(question, options or AskOptions(), given=given)
        return runtime.answer_prepared(prepared, on_text, generate=generate)

    def prepare(
        self,
        question: str,
        options: AskOptions,
        *,
        given: Mapping[str, str] | None = None,
    ) -> Prepared:
        """All that comes before the decoder: retrieve → fetch → select → compose. For a `pinned` runtime."""
        clock = Clock()
        query = self.searcher.embed(question)
        refs = self.searcher.nearest(question, query, options.top_k, options.retrieval)
        clock.lap("retrieval")
        if options.retrieval.where is not None and not refs and not given:
            return Prepared(question, options, Selection([], [], np.zeros(0, bool)), None, clock)
        fetched = self.fetch(refs)
        clock.lap("fetch")
        extra = [made for name, text in (given or {}).items() for made in self.encode_text(name, text)]
        clock.lap("encode")
        columns = [*(columns for _, columns in extra), *fetched]
        sources: list[tuple[PassageRef | GivenPassage, float | None]] = [(passage, None) for passage, _ in extra]
        sources += refs
        chosen = self.choose(sources, columns, options, query, clock)
        return self.prepare_chosen(question, options, chosen, clock)

    def choose(
        self,
        sources: Sequence[tuple[PassageRef | GivenPassage, float | None]],
        columns: Sequence[FetchedPassage],
        options: AskOptions,
        query: npt.NDArray[np.float32] | None,
        clock: "Clock",
    ) -> Selection:
        """The passages of a prompt, best first, with what the policy makes of their chunks."""
        rows = self.upload([source for source, _ in sources], columns)
        clock.lap("upload")
        scores = self.score_chunks(columns, options, query, rows=rows)
        mask = self._select(columns, options, scores)
        clock.lap("policy")
        return Selection(sources, columns, mask, scores, rows)

    def prepare_chosen(
        self,
        question: str,
        options: AskOptions,
        chosen: Selection,
        clock: "Clock",
        *,
        instructions: str = "",
        history: Sequence[int] = (),
    ) -> Prepared:
        """`prepare` behind `choose`: compose.

        Args:
            instructions: text that stands before the question in the prompt.
            history: ids of a conversation's raw turns.
        """
        asked = f"{instructions}\n\n{question}" if instructions else question
        composed = self.compose(asked, chosen.fetched, chosen.expansion_mask, options, history, rows=chosen.rows)
        clock.lap("compose")
        return Prepared(question, options, chosen, composed, clock)

    def chat(
        self,
        options: AskOptions | None = None,
        *,
        history: HistoryOptions | None = None,
        session: "Session | None" = None,
        adopt: bool = False,
    ) -> "Conversation":
        """A conversation with this runtime: questions that know those before them.

        Args:
            session: an earlier conversation to go on with.
            adopt: go on also with one of another index or checkpoint.

        Raises SessionError for such a session otherwise, and ConfigError when the decoder's chat template renders no
        conversations.
        """
        from refrag_core.conversation import Conversation
        from refrag_core.session import check_session, new_session

        if session is not None and not adopt:
            check_session(session, self)
        return Conversation(self, options or AskOptions(), history or HistoryOptions(), session or new_session(self))

    def answer_from(self, question: str, passages: Sequence[PassageRef], options: AskOptions) -> Answer:
        """Answer from these passages instead of retrieved ones; none at all is the closed-book answer.

        A passage is a place in one generation: where another thread may reload, take both from one `pinned` runtime.
        """
        return self.pinned()._answer_from(question, passages, options)

    def _answer_from(self, question: str, passages: Sequence[PassageRef], options: AskOptions) -> Answer:
        clock = Clock()
        fetched = self.reader.fetch(passages)
        clock.lap("fetch")
        query = self.searcher.embed(question) if options.policy == "learned" and self.policy.query_dim else None
        chosen = self.choose([(ref, None) for ref in passages], fetched, options, query, clock)
        return self.answer_prepared(self.prepare_chosen(question, options, chosen, clock))

    def answer_prepared(
        self,
        prepared: Prepared,
        on_text: Callable[[str], object] | None = None,
        *,
        generate: Generate | None = None,
    ) -> Answer:
        """Decode a prepared question.

        Args:
            generate: what reads the prompt and goes on from it; None for `Decoder.generate`.
        """
        text, options = self.answer_text(prepared.options), prepared.options
        if prepared.composed is None:
            return self.finish(prepared, text)
        steps = (generate or self._generate)(prepared.composed.inputs_embeds, options)
        for piece in self._pieces(steps, text, prepared.clock):
            if on_text is not None and piece:
                on_text(piece)
        return self.finish(prepared, text)

    def _generate(self, inputs_embeds: Tensor, options: AskOptions) -> Iterator[list[int]]:
        fast = self._generation.fast
        if fast is None:
            return self.decoder.generate(
                pad_batch([inputs_embeds]),
                max_new_tokens=options.max_new_tokens,
                temperature=options.temperature,
                top_p=options.top_p,
                seed=options.seed,
            )
        return fast.generate(
            inputs_embeds,
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            top_p=options.top_p,
            seed=options.seed,
        )

    @staticmethod
    def _pieces(steps: Iterator[list[int]], text: AnswerText, clock: "Clock") -> Iterator[str]:
        for (token,) in steps:
            if text.new_tokens == 0:
                clock.lap("prefill")
            if token != FINISHED:
                yield text.push(token)
            if text.ended:
                break
        clock.lap("decode")
        yield text.finish()

    def answer_text(self, options: AskOptions) -> AnswerText:
        """What turns an answer's tokens into its text."""
        return AnswerText(self.decoder.tokenizer, self.decoder.eos_ids, options.stop)

    def finish(self, prepared: Prepared, text: AnswerText) -> Answer:
        """The answer that the decoder made of a prepared question."""
        options, chosen, where = prepared.options, prepared.chosen, prepared.options.retrieval.where
        return Answer(
            question=prepared.question,
            answer=text.text.strip(),
            passages=self.used(prepared),
            dropped=() if prepared.composed is None else self._dropped(chosen, prepared.composed),
            stats=_stats(prepared, text.new_tokens),
            policy=options.policy,
            expansion_fraction=options.expansion_fraction,
            trained=self.trained,
            version=self.reader.manifest.version,
            passing=None if where is None else self.reader.passing(where).rows,
            finish_reason=text.finish_reason,
        )

    def used(self, prepared: Prepared) -> tuple[UsedPassage, ...]:
        """The passages in a prepared prompt, best first, with what becomes of their chunks."""
        return () if prepared.composed is None else self._used(prepared.chosen, prepared.composed, prepared.options)

    def _used(self, chosen: Selection, composed: Composed, options: AskOptions) -> tuple[UsedPassage, ...]:
        used, start = [], 0
        kept = composed.arrangement.num_passages
        for rank, ((source, score), fetched) in enumerate(zip(chosen.sources[:kept], chosen.fetched, strict=False), 1):
            own = slice(start, start + len(fetched.embeddings))
            expanded = chosen.expansion_mask[own]
            passage = self._used_passage(rank, source, score, fetched, expanded)
            if options.explain:
                scores = None if chosen.scores is None else chosen.scores[own]
                passage = replace(passage, chunks=_used_chunks(self.decoder.tokenizer, fetched, expanded, scores))
            used.append(passage)
            start = own.stop
        return tuple(used)

    def _used_passage(
        self, rank: int, source: PassageRef | GivenPassage, score: float | None, fetched: FetchedPassage, expanded: Mask
    ) -> UsedPassage:
        if isinstance(source, GivenPassage):
            doc_id, passage, text, metadata = source.name, source.passage, source.text, {}
        else:
            shown = self.reader.describe(source)
            doc_id, passage, text, metadata = shown.document_id, shown.passage_id, shown.text, dict(shown.metadata)
        return UsedPassage(
            rank=rank,
            score=None if score is None else round(score, 4),
            doc_id=doc_id,
            passage=passage,
            text=text,
            metadata=metadata,
            chunk_size=fetched.chunk_size,
            num_chunks=len(fetched.embeddings),
            expanded=tuple(int(i) for i in np.flatnonzero(expanded)),
        )

    def _dropped(self, chosen: Selection, composed: Composed) -> tuple[str, ...]:
        sources = [source for source, _ in chosen.sources[composed.arrangement.num_passages :]]
        return tuple(
            source.name if isinstance(source, GivenPassage) else self.reader.describe(source).document_id
            for source in sources
        )


def _open_generation(options: RuntimeOptions, version: int | None, current: _Generation | None) -> _Generation:
    """Open one generation; models that `current` has already loaded are shared with it."""
    reader = IndexReader(options.location, version, tables=options.tables)
    opened, folder = _models(options, reader)
    searcher = Searcher(reader, _retriever(options, reader, current))
    if current is not None and _same_models(current, opened, folder):
        hot = None if current.hot is None else HotPassages(current.decoder.device)
        return replace(current, searcher=searcher, hot=hot)
    decoder = _load_decoder(options, folder, opened.load_adapter())
    _check_width(decoder, opened)
    projection = opened.projection.to(decoder.device).requires_grad_(False)
    policy = opened.policy.to(decoder.device).requires_grad_(False)
    return _Generation(
        searcher=searcher,
        checkpoint=opened,
        decoder=decoder,
        decoder_folder=folder,
        projection=projection,
        policy=policy,
        text_encoder=_TextEncoder(opened, str(decoder.device), options.chunk_cache),
        fast=FastPath(decoder, projection, policy) if options.captured else None,
        hot=HotPassages(decoder.device) if options.captured else None,
    )


def models_of(options: RuntimeOptions) -> tuple[Checkpoint, Path]:
    """The checkpoint and the decoder's folder that a runtime over the newest generation would take, checked as there.

    Nothing but the checkpoint is loaded; errors are those of `Runtime.open`.
    """
    return _models(options, IndexReader(options.location, tables=options.tables))


def _models(options: RuntimeOptions, reader: IndexReader) -> tuple[Checkpoint, Path]:
    if options.verify_keys:
        check_signed(reader.store, reader.manifest, options.verify_keys)
        check_files(reader.store, reader.manifest)
    opened = load_checkpoint(options.checkpoint or str(reader.store.folder(reader.manifest.checkpoint.folder)))
    _check_encode_fingerprint(opened, reader)
    folder = _decoder_folder(options, opened, reader)
    _check_tokenizer(folder, reader)
    _check_decoder(folder, opened, reader)
    if options.verify_keys and options.decoder is None:
        opened.verify_decoder(folder)  # the signed checkpoint says which weights it was made for
    return opened, folder


def _load_decoder(options: RuntimeOptions, folder: Path, adapter: Adapter | None) -> Decoder:
    if options.composes_only:
        return Decoder.load_inputs(folder, device=options.device, adapter=adapter)
    return Decoder.load(folder, device=options.device, adapter=adapter, device_map=options.device_map)


def _same_models(current: _Generation, checkpoint: Checkpoint, decoder_folder: Path) -> bool:
    return current.checkpoint.fingerprint == checkpoint.fingerprint and current.decoder_folder == decoder_folder


def _decoder_folder(options: RuntimeOptions, checkpoint: Checkpoint, reader: IndexReader) -> Path:
    if options.decoder:
        return resolve_model(options.decoder)
    return reader.included("decoder") or checkpoint.decoder_folder()


def _retriever(options: RuntimeOptions, reader: IndexReader, current: _Generation | None) -> Retriever:
    needed = reader.manifest.components.retriever.fingerprint
    if current is not None and current.searcher.retriever.fingerprint == needed:
        return current.searcher.retriever
    return matching_retriever(reader, options.retriever, options.device)


class _TextEncoder:
    """What encodes text outside the index, made when there is some; generations with the same models share it."""

    def __init__(self, checkpoint: Checkpoint, device: str, chunk_cache: Path | None) -> None:
        self._encoder = _DeferredEncoder(checkpoint, device)
        self._chunk_cache = chunk_cache

    @cached_property
    def chunks(self) -> CachedChunkEncoder:
        """The encoder behind its caches."""
        caches: list[ChunkCache] = [MemoryChunkCache(self._encoder.dim)]
        if self._chunk_cache is not None:
            caches.append(DiskChunkCache(self._chunk_cache, self._encoder.dim))
        return CachedChunkEncoder(self._encoder, caches)


class _DeferredEncoder:
    """The checkpoint's chunk encoder, loaded when it has to encode."""

    def __init__(self, checkpoint: Checkpoint, device: str) -> None:
        self._checkpoint = checkpoint
        self._device = device
        self.dim = checkpoint.config.encoder.dim
        self.fingerprint = checkpoint.encode_fingerprint

    @cached_property
    def _encoder(self) -> ChunkEncoder:
        return self._checkpoint.load_encoder(device=self._device)

    def encode(
        self, token_ids: npt.NDArray[np.int32], num_tokens: npt.NDArray[np.integer[Any]]
    ) -> npt.NDArray[np.float16]:
        """Chunk embeddings float16 `[n, d_enc]` of tokens int32 `[n, k]`."""
        return self._encoder.encode(token_ids, num_tokens)


class Clock:
    """Lap times in milliseconds from the moment the request came in."""

    def __init__(self) -> None:
        self.started = self._last = time.perf_counter()
        self.laps: dict[str, float] = {}
        self.ends: dict[str, float] = {}

    @property
    def seconds(self) -> float:
        """Since the request came in."""
        return time.perf_counter() - self.started

    def lap(self, step: str, now: float | None = None) -> None:
        """End a step, or a part of one that comes in several, now or at a moment of `time.perf_counter`."""
        now = time.perf_counter() if now is None else max(now, self._last)
        self.laps[step] = self.laps.get(step, 0.0) + 1000 * (now - self._last)
        self.ends[step] = 1000 * (now - self.started)
        self._last = now


def _used_chunks(
    tokenizer: Tokenizer, fetched: FetchedPassage, expanded: Mask, scores: Scores | None
) -> tuple[UsedChunk, ...]:
    tokens = fetched.tokens.tolist()
    ends = [min(start + fetched.chunk_size, len(tokens)) for start in range(0, len(tokens), fetched.chunk_size)]
    # A character may straddle two chunks: what is decoded up to a chunk's end then ends with a replacement character.
    whole = [tokenizer.decode(tokens[:end], skip_special_tokens=False) for end in ends]
    reach = [0, *(len(text.rstrip("\N{REPLACEMENT CHARACTER}")) for text in whole[:-1]), *map(len, whole[-1:])]
    return tuple(
        UsedChunk(
            text=whole[-1][reach[number] : reach[number + 1]],
            num_tokens=end - number * fetched.chunk_size,
            expanded=bool(expanded[number]),
            score=None if scores is None else round(float(scores[number]), 4),
        )
        for number, end in enumerate(ends)
    )


def _stats(prepared: Prepared, new_tokens: int) -> Stats:
    clock, composed, chosen = prepared.clock, prepared.composed, prepared.chosen
    laps: dict[str, Any] = {f"{step}_ms": round(clock.laps.get(step, 0.0), 3) for step in STEPS}
    spent = Stats(**laps)
    if composed is None:
        return spent
    kept = chosen.fetched[: composed.arrangement.num_passages]
    context_tokens = sum(len(passage.tokens) for passage in kept)
    slots = context_slots(kept, chosen.expansion_mask)
    return replace(
        spent,
        ttft_ms=round(clock.ends.get("prefill", 0.0), 3),
        ttit_ms=round(clock.laps["decode"] / (new_tokens - 1), 3) if new_tokens > 1 else 0.0,
        new_tokens=new_tokens,
        num_chunks=sum(len(passage.embeddings) for passage in kept),
        num_expanded=composed.arrangement.num_expanded,
        context_tokens=context_tokens,
        decoder_positions=len(composed.arrangement.ids),
        compression=round(context_tokens / slots, 3) if slots else 1.0,
    )


def context_slots(passages: Sequence[FetchedPassage], expansion_mask: Mask) -> int:
    """Slots that the passages themselves take, under a mask that begins with their chunks."""
    slots = start = 0
    for passage in passages:
        stop = start + len(passage.embeddings)
        lengths = np.full(stop - start, passage.chunk_size)
        lengths[-1:] = len(passage.tokens) - passage.chunk_size * (stop - start - 1)
        slots += int(np.where(expansion_mask[start:stop], lengths, 1).sum())
        start = stop
    return slots


def _check_encode_fingerprint(checkpoint: Checkpoint, reader: IndexReader) -> None:
    needed = reader.manifest.components.encoder
    if checkpoint.encode_fingerprint != needed.fingerprint:
        raise FingerprintMismatchError(
            f"the checkpoint's encoder has fingerprint {checkpoint.encode_fingerprint[:12]}, the index was encoded "
            f"with {needed.fingerprint[:12]} ({needed.reference}): open it with the checkpoint that it was built with, "
            "or rebuild it with `refrag index build CORPUS --rebuild --checkpoint …`"
        )


def _check_tokenizer(folder: Path, reader: IndexReader) -> None:
    needed, found = reader.manifest.components.tokenizer, fingerprint_tokenizer(folder)
    if found != needed.fingerprint:
        raise FingerprintMismatchError(
            f"the decoder in {folder} has a tokenizer with fingerprint {found[:12]}, the index holds tokens of "
            f"{needed.fingerprint[:12]} ({needed.reference}): take that decoder, or rebuild the index for this one"
        )


def _check_decoder(folder: Path, checkpoint: Checkpoint, reader: IndexReader) -> None:
    """A trained projection and adapter mean something to one decoder alone; an untrained one fits any of its width."""
    if not checkpoint.config.trained:
        return
    checkpoint.verify_decoder(folder)
    size = reader.manifest.parameters.chunk_size
    if size not in checkpoint.config.chunk_sizes:
        raise FingerprintMismatchError(
            f"the index has chunks of {size} tokens, and the checkpoint was trained for "
            f"{', '.join(map(str, checkpoint.config.chunk_sizes))}; expected one of those: open the index with the "
            f"checkpoint that it was built with, or rebuild it with `refrag index build CORPUS --rebuild`"
        )


def _check_width(decoder: Decoder, checkpoint: Checkpoint) -> None:
    if decoder.dim != checkpoint.config.d_dec:
        raise FingerprintMismatchError(
            f"the decoder takes embeddings of width {decoder.dim}, the checkpoint's projection gives "
            f"{checkpoint.config.d_dec} (made for {checkpoint.config.decoder.reference}): leave --decoder out, or "
            "give a checkpoint made for this decoder with --checkpoint"
        )
