"""Ten-turn conversations whose last question hangs on the first turn: what its answer survives.

    python -m benchmarks.conversations INDEX [--allow-untrained] [--output FILE]

Each conversation is made by this file: a fact in the first turn, eight turns about other things with their answers,
and a last question for the fact. Only the last question is answered; the turns before it are given as they were
scripted, so that every setting goes on from the same ones. An answer counts when the fact's value stands in it as
whole words. Settings:

    raw         all turns as the chat template renders them, retrieved passages in full
    expanded    the first turn as a passage with every chunk expanded: what its new place alone costs
    dropped     no earlier turn at all: what can be guessed
    compressed  at each fraction p, for a trained checkpoint: the first turn as a passage under the learned policy
    raw, p      beside it, retrieved passages compressed alike and all turns raw

The questions of the eight turns are those of `questions/evaluation-leads.jsonl`; an index over the demo's leads fits.
"""

import argparse
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random
from statistics import mean, median
from typing import Any

from benchmarks.measurement import add_output, finish, say
from refrag_core.errors import RefragError
from refrag_core.evaluation.qa import contains_answer
from refrag_core.evaluation.questions import Question, read_questions
from refrag_core.history import HistoryOptions
from refrag_core.policy import PolicyName
from refrag_core.runtime import Answer, AskOptions, Runtime
from refrag_core.session import Turn, new_session
from refrag_core.template import with_turns

SEED = 7
TURNS = 10
QUESTIONS = Path(__file__).parent / "questions" / "evaluation-leads.jsonl"
ROOM = 1 << 20
"""History positions that no conversation fills."""

ACKNOWLEDGED = "I will remember that."
NAMES = ("Nora", "Tobias", "Amara", "Viktor", "Leonie", "Ishaan", "Paloma", "Kwame", "Sunniva", "Matteo")
VALUES = {
    "city": ("Lisbon", "Tampere", "Valparaíso", "Galway", "Ljubljana", "Sapporo", "Tucson", "Antwerp"),
    "pet": ("Pumpernickel", "Biscuit", "Ziggy", "Waffles", "Bandit", "Clover", "Mochi", "Rocket"),
    "job": ("beekeeper", "locksmith", "glazier", "midwife", "surveyor", "bookbinder", "welder", "optician"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "colour": ("turquoise", "crimson", "mustard", "violet", "beige", "scarlet", "indigo", "maroon"),
    "food": ("walnuts", "shellfish", "celery", "strawberries", "mustard", "sesame", "peaches", "lupin"),
    "project": ("Bluebird", "Halcyon", "Quartz", "Meridian", "Saffron", "Cobalt", "Juniper", "Tundra"),
    "relative": ("sister", "brother", "cousin", "aunt", "uncle", "neighbour", "niece", "nephew"),
}
NUMBERS = {"code": (1000, 9999), "year": (1931, 2004), "platform": (3, 29)}

FACTS = (
    ("My {relative} {name} lives in {city}.", "In which city does my {relative} {name} live?", "city"),
    ("My dog is called {pet}.", "What is my dog called?", "pet"),
    ("The code of my locker is {code}.", "What is the code of my locker?", "code"),
    ("My {relative} {name} works as a {job}.", "What does my {relative} {name} work as?", "job"),
    ("Our meeting with {name} is on {day}.", "On which day is our meeting with {name}?", "day"),
    ("The favourite colour of {name} is {colour}.", "What is the favourite colour of {name}?", "colour"),
    ("My {relative} was born in {year}.", "In which year was my {relative} born?", "year"),
    ("My train leaves from platform {platform}.", "From which platform does my train leave?", "platform"),
    ("I am allergic to {food}.", "What am I allergic to?", "food"),
    ("The project {project} is led by {name}.", "Who leads the project {project}?", "name"),
)
"""A statement, the question for it, and which of its values is the answer."""


@dataclass(frozen=True, slots=True)
class Script:
    """One conversation."""

    turns: tuple[Turn, ...]
    """All but the last."""
    question: str
    """The last."""
    answers: tuple[str, ...]
    """What it accepts."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A way to give the earlier turns."""

    name: str
    policy: PolicyName
    expansion_fraction: float
    room: float
    """History positions, as a share of what all turns take when raw."""


@dataclass(frozen=True, slots=True)
class Said:
    """What came of one conversation in one setting."""

    text: str
    right: bool
    first_turn: str
    """What the first turn was in the prompt: raw, passage or dropped."""
    answer: Answer


def make_scripts(count: int, questions: Sequence[Question], *, seed: int = SEED) -> list[Script]:
    """`count` conversations of TURNS turns, equal for equal arguments."""
    random = Random(seed)
    asked = [question for question in questions if question.answers]
    return [_script(random, number, asked) for number in range(count)]


def _script(random: Random, number: int, questions: Sequence[Question]) -> Script:
    statement, question, wanted = FACTS[number % len(FACTS)]
    values = {name: random.choice(choices) for name, choices in VALUES.items()}
    values |= {name: str(random.randint(*bounds)) for name, bounds in NUMBERS.items()}
    values["name"] = random.choice(NAMES)
    told = Turn(f"Please remember this: {statement.format_map(values)}", ACKNOWLEDGED)
    between = [Turn(one.question, f"{one.answers[0]}.") for one in random.sample(questions, TURNS - 2)]
    return Script((told, *between), question.format_map(values), (values[wanted],))


def settings(fractions: Sequence[float], *, compressed: bool) -> list[Setting]:
    """What is compared."""
    made = [
        Setting("raw", "all", 1.0, ROOM),
        Setting("expanded", "random", 0.999, 0.99),
        Setting("dropped", "all", 1.0, 0),
    ]
    if compressed:
        made += [Setting(f"raw, p={p:g}", "learned", p, ROOM) for p in fractions]
        made += [Setting(f"compressed, p={p:g}", "learned", p, 0.6) for p in fractions]
    return made


def answer(runtime: Runtime, script: Script, setting: Setting, options: AskOptions) -> Said:
    """Ask the last question."""
    asked = replace(options, policy=setting.policy, expansion_fraction=setting.expansion_fraction)
    history = HistoryOptions(positions=_positions(runtime, script, setting), reuse=False)
    session = replace(new_session(runtime), turns=script.turns)
    made = runtime.chat(asked, history=history, session=session).ask(script.question)
    assert made.history is not None
    state = "dropped" if made.history.dropped else "passage" if made.history.passages else "raw"
    return Said(made.answer, bool(contains_answer(made.answer, script.answers)), state, made)


def _positions(runtime: Runtime, script: Script, setting: Setting) -> int:
    """Room for the history: a share of what the raw turns take, so that the first turn has to move."""
    template = with_turns(runtime.template, runtime.decoder_folder)
    encode = runtime.decoder.tokenizer.encode
    turns = [
        template.turn(*(encode(text, add_special_tokens=False).ids for text in (turn.question, turn.answer)))
        for turn in script.turns
    ]
    return int(setting.room * sum(map(len, turns)))


def measure(
    runtime: Runtime, scripts: Sequence[Script], compared: Sequence[Setting], options: AskOptions
) -> dict[str, Any]:
    """All settings by name."""
    results = {}
    for setting in compared:
        said = []
        for number, script in enumerate(scripts, 1):
            said.append(answer(runtime, script, setting, options))
            say(f"{setting.name} {number}/{len(scripts)} {'right' if said[-1].right else 'wrong'}: {said[-1].text!r}")
        results[setting.name] = _summary(setting, said)
    return results


def _summary(setting: Setting, said: Sequence[Said]) -> dict[str, Any]:
    histories = [one.answer.history for one in said if one.answer.history is not None]
    stats = [one.answer.stats for one in said]
    return {
        "policy": setting.policy,
        "expansion_fraction": setting.expansion_fraction,
        "answered": sum(one.right for one in said),
        "answered_share": round(mean(one.right for one in said), 3),
        "first_turn": {state: sum(one.first_turn == state for one in said) for state in ("raw", "passage", "dropped")},
        "mean_history_positions": round(mean(history.positions for history in histories), 1),
        "mean_decoder_positions": round(mean(one.decoder_positions for one in stats), 1),
        "median_ttft_ms": round(median(one.ttft_ms for one in stats), 1),
        "answers": [one.text for one in said],
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the benchmark; 0 when done."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("index", type=Path, nargs="?", help="index to answer from; none with --scripts")
    parser.add_argument("--conversations", type=int, default=50)
    parser.add_argument("--fractions", type=float, nargs="+", default=[0.0, 0.1, 0.25])
    parser.add_argument("--settings", nargs="+", help="names of those to run; default: all that make sense")
    parser.add_argument("--allow-untrained", action="store_true", help="compress with an untrained projection too")
    parser.add_argument("--checkpoint")
    parser.add_argument("--top-k", type=int, default=3)
    parser.add_argument("--max-new-tokens", type=int, default=24)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--scripts", action="store_true", help="print the conversations as JSON lines, and end")
    add_output(parser)
    options = parser.parse_args(arguments)
    scripts = make_scripts(options.conversations, read_questions(QUESTIONS))
    if options.scripts:
        _print_scripts(scripts)
        return 0
    if options.index is None:
        parser.error("an index is needed, unless --scripts is given")
    runtime = Runtime.open(options.index, checkpoint=options.checkpoint, device=options.device)
    compared = settings(options.fractions, compressed=runtime.trained or options.allow_untrained)
    if options.settings:
        compared = [setting for setting in compared if setting.name in options.settings]
    asked = AskOptions(top_k=options.top_k, max_new_tokens=options.max_new_tokens)
    results = measure(runtime, scripts, compared, asked)
    finish("conversations", _told(options), _described(runtime) | {"turns": TURNS, "settings": results}, options.output)
    return 0


def _told(options: argparse.Namespace) -> dict[str, Any]:
    """The arguments that say something on another machine."""
    return {
        name: value for name, value in vars(options).items() if name not in ("index", "output", "checkpoint", "scripts")
    }


def _described(runtime: Runtime) -> dict[str, Any]:
    counts, checkpoint = runtime.reader.manifest.counts, runtime.checkpoint
    return {
        "index": {"documents": counts.documents, "passages": counts.passages},
        "checkpoint": {"fingerprint": checkpoint.fingerprint, "trained": runtime.trained},
        "decoder": {"reference": checkpoint.config.decoder.reference, "device": str(runtime.decoder.device)},
    }


def _print_scripts(scripts: Sequence[Script]) -> None:
    for script in scripts:
        turns = [{"question": turn.question, "answer": turn.answer} for turn in script.turns]
        print(json.dumps({"turns": turns, "question": script.question, "answers": script.answers}, ensure_ascii=False))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except RefragError as error:
        sys.exit(f"error: {error}")
