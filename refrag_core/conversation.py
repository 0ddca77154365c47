"""Conversations: each question is answered from the index and from the turns before it.

retrieve → fetch → place the history → select → compose → prefill → decode. `history.py` says where earlier turns
stand; those that become passages are encoded now, through the runtime's chunk cache, each once. `Conversation` is one
that goes on in this process; `prepare_turn` makes the next prompt of one whose turns come with every request.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache

import numpy as np
import numpy.typing as npt

from refrag_core.decoder import lowest
from refrag_core.errors import ConfigError
from refrag_core.history import HistoryOptions, HistoryUse, Window, last_first_raw, query_vector, windows
from refrag_core.index_reader import FetchedPassage, PassageRef
from refrag_core.prefix_reuse import PrefixReuse
from refrag_core.runtime import Answer, AskOptions, Clock, GivenPassage, Prepared, Runtime, Selection, context_slots
from refrag_core.scoring import ChunkScorer
from refrag_core.session import Session, Turn, new_session
from refrag_core.template import PromptTemplate, with_turns

Ids = tuple[int, ...]
Found = Sequence[tuple[PassageRef, float]]
OldTurn = list[tuple[GivenPassage, FetchedPassage]]
"""The passages of one turn."""


def turn_text(turn: Turn) -> str:
    """A turn as the text of a passage."""
    return f"User: {turn.question}\nAssistant: {turn.answer}"


@dataclass(frozen=True, slots=True)
class PreparedTurn:
    """The next question of a conversation with its prompt, ready for a decoder."""

    prepared: Prepared
    window: Window
    """Where the earlier turns stand in it."""
    use: HistoryUse


def prepare_turn(
    runtime: Runtime,
    question: str,
    turns: Sequence[Turn],
    options: AskOptions,
    history: HistoryOptions,
    *,
    instructions: str = "",
    clock: Clock | None = None,
) -> PreparedTurn:
    """The prompt of a question that follows `turns`, as a conversation of these turns would have it. For a `pinned`
    runtime.

    Args:
        instructions: text that stands before the question in the prompt, and is not searched for.
        clock: runs since the request came in; None starts one now.

    Raises ConfigError when options are strict and a turn or passage would have to be dropped, and when there are turns
    and the decoder's chat template renders no conversations.
    """
    following = _Following(runtime, _PastTurns(runtime), turns, options, history)
    return following.prepare(question, None, clock or Clock(), instructions)


class Conversation:
    """Questions to one runtime that know those before them. Make it with `Runtime.chat`.

    A question is answered from the generation that the runtime has when it comes. A turn counts when its answer is
    complete: after an error or an interruption the conversation is as it was. For one thread at a time.
    """

    def __init__(self, runtime: Runtime, options: AskOptions, history: HistoryOptions, session: Session) -> None:
        self._runtime = runtime
        self._options = options
        self._history = history
        self._session = session
        self._past = _PastTurns(runtime.pinned())
        _ = self._past.template  # a decoder without conversations is told of now
        self._reuse = PrefixReuse(runtime.decoder) if history.reuse else None

    @property
    def turns(self) -> tuple[Turn, ...]:
        """All turns, also those that are in no prompt any more."""
        return self._session.turns

    @property
    def session(self) -> Session:
        """What to save of the conversation."""
        return self._session

    def reset(self) -> None:
        """Forget all turns."""
        self._session = new_session(self._runtime)
        self._past = _PastTurns(self._runtime.pinned())

    def ask(self, question: str, *, on_text: Callable[[str], object] | None = None) -> Answer:
        """Answer the next question; `Answer.history` says what became of the turns before it.

        Where a filter leaves no passage and there is no turn yet, the answer is empty and makes no turn.

        Args:
            on_text: gets each piece of the answer's text as soon as it is certain.

        Raises ConfigError when options are strict and a turn or passage would have to be dropped.
        """
        runtime = self._current()
        following = _Following(runtime, self._past, self.turns, self._options, self._history)
        made = following.prepare(question, self._session.first_raw, Clock())
        answer = replace(self._answer(runtime, made.prepared, on_text), history=made.use)
        if made.prepared.composed is not None:
            self._remember(runtime, answer, made.window)
        return answer

    def _current(self) -> Runtime:
        """The runtime's generation of now; what was made with other models is made anew."""
        runtime = self._runtime.pinned()
        if not self._past.fits(runtime):
            self._past = _PastTurns(runtime)
        if self._reuse is not None and self._reuse.decoder is not runtime.decoder:
            self._reuse = PrefixReuse(runtime.decoder)
        return runtime

    def _answer(self, runtime: Runtime, prepared: Prepared, on_text: Callable[[str], object] | None) -> Answer:
        if self._reuse is None or prepared.composed is None:
            return runtime.answer_prepared(prepared, on_text)
        answer = runtime.answer_prepared(prepared, on_text, generate=self._reuse.generate)
        return replace(answer, stats=replace(answer.stats, reused_positions=self._reuse.reused))

    def _remember(self, runtime: Runtime, answer: Answer, window: Window) -> None:
        retrieved = [passage.doc_id for passage in answer.passages if passage.score is not None]
        turn = Turn(answer.question, answer.answer, tuple(dict.fromkeys(retrieved)))
        now = new_session(runtime)
        self._session = replace(now, first_raw=window.first_raw, turns=(*self.turns, turn))


@dataclass(frozen=True, slots=True)
class _Placed:
    """A way to place the history, with all that stands in the prompt then."""

    window: Window
    positions: int
    selection: Selection


class _Following:
    """A question that follows earlier turns, on its way to a prompt."""

    def __init__(
        self,
        runtime: Runtime,
        past: "_PastTurns",
        turns: Sequence[Turn],
        options: AskOptions,
        history: HistoryOptions,
    ) -> None:
        self._runtime = runtime
        self._past = past
        self._turns = turns
        self._options = options
        self._history = history

    def prepare(self, question: str, first_raw: int | None, clock: Clock, instructions: str = "") -> PreparedTurn:
        """See prepare_turn.

        Args:
            first_raw: the first raw turn of the prompt before; None for the one that there would have been.
        """
        runtime, options = self._runtime, self._options
        vector = self._query(question)
        refs = runtime.searcher.nearest(question, vector, options.top_k, options.retrieval)
        clock.lap("retrieval")
        budget = self._budget(f"{instructions}\n\n{question}" if instructions else question)
        if options.retrieval.where is not None and not refs and not self._turns:
            nothing = Selection([], [], np.zeros(0, bool))
            return self._made(Prepared(question, options, nothing, None, clock), Window(0, 0), 0, budget)
        placed = self._place(refs, vector, budget, first_raw, clock)
        raw = [index for turn in self._turns[placed.window.first_raw :] for index in self._past.raw(turn)]
        prepared = runtime.prepare_chosen(
            question, options, placed.selection, clock, instructions=instructions, history=raw
        )
        return self._made(prepared, placed.window, placed.positions, budget)

    def _made(self, prepared: Prepared, window: Window, positions: int, budget: int) -> PreparedTurn:
        return PreparedTurn(prepared, window, _use(window, len(self._turns), positions, budget))

    def _query(self, question: str) -> npt.NDArray[np.float32]:
        """What to search for, float32 `[d_ret]`. Ranking by words takes the question's words alone."""
        weight = self._history.turn_weight
        texts = [question, *(f"{turn.question}\n{turn.answer}" for turn in self._turns[-1:] if weight)]
        own, *before = self._runtime.searcher.retriever.embed_queries(texts)
        return query_vector(own, before[0] if before else None, weight)

    def _budget(self, asked: str) -> int:
        """Positions for the history: at most half of what the decoder has beside the question and its answer."""
        limit = lowest(self._runtime.decoder.max_positions, self._options.max_positions)
        if limit is None:
            return self._history.positions
        fixed = self._runtime.template.num_fixed(0) + len(self._past.ids(asked)) + self._options.max_new_tokens
        return max(0, min(self._history.positions, (limit - fixed) // 2))

    def _place(
        self, refs: Found, vector: npt.NDArray[np.float32], budget: int, first_raw: int | None, clock: Clock
    ) -> _Placed:
        fetched = self._runtime.fetch(refs)
        clock.lap("fetch")
        sizes = [len(self._past.raw(turn)) for turn in self._turns]
        unscored = self._options.policy == "perplexity" and self._runtime.composes_only  # turns have no scores then
        compressible = _compresses(self._options) and not unscored
        if first_raw is None and sum(sizes) > budget:
            share = 0.0 if self._options.policy == "none" else self._options.expansion_fraction
            likely = [self._past.passages_size(turn, share) for turn in self._turns] if compressible else sizes
            first_raw = last_first_raw(sizes, likely, budget, compressible=compressible)
        for window in windows(sizes, budget, first_raw or 0, compressible=compressible):
            room = budget - sum(sizes[window.first_raw :])
            old = self._turns[window.first_passage : window.first_raw]
            if sum(self._past.passages_size(turn, 0.0) for turn in old) > room:
                continue  # nothing of it needs to be encoded
            placed = self._placed(window, refs, fetched, vector, clock)
            if placed.positions <= room:
                self._check_strict(window, budget)
                return replace(placed, positions=placed.positions + budget - room)
        raise AssertionError("the last window has no turn, and takes no position")

    def _placed(
        self,
        window: Window,
        refs: Found,
        fetched: Sequence[FetchedPassage],
        vector: npt.NDArray[np.float32],
        clock: Clock,
    ) -> _Placed:
        """The window with the positions of its passages alone."""
        old = self._old_turns(window)
        clock.lap("encode")
        sources: list[tuple[PassageRef | GivenPassage, float | None]] = [(passage, None) for passage, _ in old]
        columns = [*(columns for _, columns in old), *fetched]
        chosen = self._runtime.choose([*sources, *refs], columns, self._options, vector, clock)
        return _Placed(window, self._positions(old, chosen), chosen)

    def _check_strict(self, window: Window, budget: int) -> None:
        if window.first_passage and self._options.strict:
            raise ConfigError(
                f"the oldest {window.first_passage} of {len(self._turns)} turns do not fit the {budget} positions of "
                f"the history; expected all to fit (strict): raise --history-positions or begin a new conversation"
            )

    def _old_turns(self, window: Window) -> OldTurn:
        """The passages of all turns that are passages in this window; with every chunk expanded there are none."""
        numbers = range(window.first_passage, window.first_raw)
        score = self._options.policy == "perplexity"
        turns = [self._past.passages(number, self._turns[number], score=score) for number in numbers]
        return [passage for turn in turns for passage in turn]

    def _positions(self, old: OldTurn, chosen: Selection) -> int:
        """What the passages of old turns, the first of the chosen ones, take."""
        around = len(self._runtime.template.passage_header) + len(self._runtime.template.passage_footer)
        return context_slots([columns for _, columns in old], chosen.expansion_mask) + around * len(old)


def _use(window: Window, turns: int, positions: int, budget: int) -> HistoryUse:
    return HistoryUse(
        dropped=window.first_passage,
        passages=window.first_raw - window.first_passage,
        raw=turns - window.first_raw,
        positions=positions,
        budget=budget,
    )


def _compresses(options: AskOptions) -> bool:
    """Whether chunks may stay compressed: passages are shorter than their tokens only then."""
    return options.policy == "none" or (options.policy != "all" and options.expansion_fraction < 1.0)


_template_with_turns = lru_cache(maxsize=8)(with_turns)
"""Where the checkpoint has no turns, a tokenizer is loaded for them: not at every request."""


class _PastTurns:
    """Earlier turns in the forms that prompts of one generation take them in, each made once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._raw: dict[Turn, Ids] = {}
        self._cut: dict[Turn, Ids] = {}
        """Tokens of each passage that a turn is cut into."""
        self._passages: dict[tuple[int, bool], OldTurn] = {}

    @cached_property
    def template(self) -> PromptTemplate:
        """The runtime's, with turns. Raises ConfigError when the decoder's chat template renders no conversations."""
        return _template_with_turns(self._runtime.template, self._runtime.decoder_folder)

    def fits(self, runtime: Runtime) -> bool:
        """Whether it is for the generation that the runtime has now."""
        return self._runtime.reader is runtime.reader and self._runtime.decoder is runtime.decoder

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of its own."""
        ids: list[int] = self._runtime.decoder.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def raw(self, turn: Turn) -> Ids:
        """The turn as the decoder's chat template renders it; without one as plain text."""
        if turn not in self._raw:
            self._raw[turn] = self.template.turn(self.ids(turn.question), self.ids(turn.answer))
        return self._raw[turn]

    def passages_size(self, turn: Turn, share: float) -> int:
        """Positions of the turn as passages when a share of its chunks is expanded; 0 gives the fewest possible."""
        size = self._runtime.reader.manifest.parameters.chunk_size
        template = self._runtime.template
        around = len(template.passage_header) + len(template.passage_footer)
        if turn not in self._cut:
            self._cut[turn] = tuple(len(ids) for _, ids in self._runtime.cut_text("turn", turn_text(turn)))
        chunks = sum(-(-length // size) for length in self._cut[turn])
        return around * len(self._cut[turn]) + round(chunks * (1 + share * (size - 1)))

    def passages(self, number: int, turn: Turn, *, score: bool) -> OldTurn:
        """The turn as encoded passages, scored where the policy needs it."""
        key = (number, score)
        if key not in self._passages:
            made = self._runtime.encode_text(f"turn {number + 1}", turn_text(turn))
            self._passages[key] = self._scored(made) if score else made
        return self._passages[key]

    def _scored(self, made: OldTurn) -> OldTurn:
        scorer = ChunkScorer(self._runtime.decoder)
        scores = [scorer.score([columns.tokens], columns.chunk_size)[0] for _, columns in made]
        return [(passage, replace(columns, scores=own)) for (passage, columns), own in zip(made, scores, strict=True)]
