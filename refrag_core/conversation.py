"""Conversations: each question is answered from the index and from the turns before it.

retrieve → fetch → place the history → select → compose → prefill → decode. `history.py` says where earlier turns
stand; those that become passages are encoded now, through the runtime's chunk cache, each once.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

from refrag_core.errors import ConfigError
from refrag_core.history import HistoryOptions, HistoryUse, Window, query_vector, windows
from refrag_core.index_reader import FetchedPassage, PassageRef
from refrag_core.prefix_reuse import PrefixReuse
from refrag_core.runtime import Answer, AskOptions, Clock, GivenPassage, Runtime, Selection, context_slots
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
class _Placed:
    """A way to place the history, with all that stands in the prompt then."""

    window: Window
    positions: int
    selection: Selection


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
        clock = Clock()
        vector = self._query(runtime, question)
        refs = runtime.searcher.nearest(question, vector, self._options.top_k, self._options.retrieval)
        clock.lap("retrieval")
        budget = self._budget(runtime, question)
        if self._options.retrieval.where is not None and not refs and not self.turns:
            return replace(runtime.ask(question, self._options), history=_use(Window(0, 0), 0, 0, budget))
        placed = self._place(runtime, refs, vector, budget, clock)
        answer = self._answer(runtime, question, placed, clock, on_text)
        use = _use(placed.window, len(self.turns), placed.positions, budget)
        self._remember(runtime, answer, placed.window)
        return replace(answer, history=use)

    def _current(self) -> Runtime:
        """The runtime's generation of now; what was made with other models is made anew."""
        runtime = self._runtime.pinned()
        if not self._past.fits(runtime):
            self._past = _PastTurns(runtime)
        if self._reuse is not None and self._reuse.decoder is not runtime.decoder:
            self._reuse = PrefixReuse(runtime.decoder)
        return runtime

    def _query(self, runtime: Runtime, question: str) -> npt.NDArray[np.float32]:
        """What to search for, float32 `[d_ret]`. Ranking by words takes the question's words alone."""
        weight = self._history.turn_weight
        texts = [question, *(f"{turn.question}\n{turn.answer}" for turn in self.turns[-1:] if weight)]
        own, *before = runtime.searcher.retriever.embed_queries(texts)
        return query_vector(own, before[0] if before else None, weight)

    def _budget(self, runtime: Runtime, question: str) -> int:
        """Positions for the history: at most half of what the decoder has beside the question and its answer."""
        limit = runtime.decoder.max_positions
        if limit is None:
            return self._history.positions
        fixed = runtime.template.num_fixed(0) + len(self._past.ids(question)) + self._options.max_new_tokens
        return max(0, min(self._history.positions, (limit - fixed) // 2))

    # --- where the turns stand

    def _place(
        self, runtime: Runtime, refs: Found, vector: npt.NDArray[np.float32], budget: int, clock: Clock
    ) -> _Placed:
        fetched = runtime.fetch(refs)
        clock.lap("fetch")
        sizes = [len(self._past.raw(turn)) for turn in self.turns]
        compressible = _compresses(self._options)
        for window in windows(sizes, budget, self._session.first_raw, compressible=compressible):
            old = self._old_turns(window)
            clock.lap("encode")
            sources: list[tuple[PassageRef | GivenPassage, float | None]] = [(passage, None) for passage, _ in old]
            columns = [*(columns for _, columns in old), *fetched]
            chosen = runtime.choose([*sources, *refs], columns, self._options, vector, clock)
            positions = sum(sizes[window.first_raw :]) + self._positions(runtime, old, chosen)
            if positions <= budget:
                self._check_strict(window, budget)
                return _Placed(window, positions, chosen)
        raise AssertionError("the last window has no turn, and takes no position")

    def _check_strict(self, window: Window, budget: int) -> None:
        if window.first_passage and self._options.strict:
            raise ConfigError(
                f"the oldest {window.first_passage} of {len(self.turns)} turns do not fit the {budget} positions of "
                f"the history; expected all to fit (strict): raise --history-positions or begin a new conversation"
            )

    def _old_turns(self, window: Window) -> OldTurn:
        """The passages of all turns that are passages in this window; with every chunk expanded there are none."""
        numbers = range(window.first_passage, window.first_raw)
        score = self._options.policy == "perplexity"
        turns = [self._past.passages(number, self.turns[number], score=score) for number in numbers]
        return [passage for turn in turns for passage in turn]

    @staticmethod
    def _positions(runtime: Runtime, old: OldTurn, chosen: Selection) -> int:
        """What the passages of old turns, the first of the chosen ones, take."""
        around = len(runtime.template.passage_header) + len(runtime.template.passage_footer)
        return context_slots([columns for _, columns in old], chosen.expansion_mask) + around * len(old)

    # --- the answer

    def _answer(
        self,
        runtime: Runtime,
        question: str,
        placed: _Placed,
        clock: Clock,
        on_text: Callable[[str], object] | None,
    ) -> Answer:
        raw = [index for turn in self.turns[placed.window.first_raw :] for index in self._past.raw(turn)]
        prepared = runtime.prepare_chosen(question, self._options, placed.selection, clock, history=raw)
        generate = None if self._reuse is None else self._reuse.generate
        answer = runtime.answer_prepared(prepared, on_text, generate=generate)
        reused = 0 if self._reuse is None else self._reuse.reused
        return replace(answer, stats=replace(answer.stats, reused_positions=reused))

    def _remember(self, runtime: Runtime, answer: Answer, window: Window) -> None:
        retrieved = [passage.doc_id for passage in answer.passages if passage.score is not None]
        turn = Turn(answer.question, answer.answer, tuple(dict.fromkeys(retrieved)))
        now = new_session(runtime)
        self._session = replace(now, first_raw=window.first_raw, turns=(*self.turns, turn))


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


class _PastTurns:
    """Earlier turns in the forms that prompts of one generation take them in, each made once."""

    def __init__(self, runtime: Runtime) -> None:
        self._runtime = runtime
        self._template: PromptTemplate = with_turns(runtime.template, runtime.decoder_folder)
        self._raw: dict[Turn, Ids] = {}
        self._passages: dict[tuple[int, bool], OldTurn] = {}

    def fits(self, runtime: Runtime) -> bool:
        """Whether it is for the generation that the runtime has now."""
        return self._runtime.reader is runtime.reader and self._runtime.decoder is runtime.decoder

    def ids(self, text: str) -> list[int]:
        """Token ids of a text of its own."""
        ids: list[int] = self._runtime.decoder.tokenizer.encode(text, add_special_tokens=False).ids
        return ids

    def raw(self, turn: Turn) -> Ids:
        """The turn as the decoder's chat template renders it."""
        if turn not in self._raw:
            self._raw[turn] = self._template.turn(self.ids(turn.question), self.ids(turn.answer))
        return self._raw[turn]

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
