"""A build of 1 billion and of 1 trillion tokens on 1 to 1,000 machines, simulated from measured costs.

    python -m benchmarks.scaling [--costs benchmarks/results/scaling-costs.json] [--plot FILE] [--output FILE]

A machine is 16 cores and one H100. The stages are simulated shard by shard: a driver that hands shards out one
after another, machines that tokenize ahead on their cores while their card encodes and embeds, uploads, and machines
that are taken away (spot) and come back empty. The phases around them follow from their costs. `ASSUMED` names what
was not measured here. SCALING.md says what was found.
"""

import argparse
import heapq
import json
import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from benchmarks.measurement import add_output, finish, say
from refrag.pipelines.id_ranges import RANGE_ROWS
from refrag.pipelines.indexing import SEGMENT_ROWS
from refrag.pipelines.measured_rates import GPUS
from refrag.pipelines.plan import default_shard_bytes
from refrag_core.vector_index import TRAINING_ROWS_PER_LIST, choose_index

CORES = 16
DIM = 384
CHUNK_SIZE = 16
BYTES_A_TOKEN = 4
TOKENS_A_DOCUMENT = 1000
TOKENS_A_PASSAGE = 200
SCAN_UNIT_BYTES = 64 << 20

ASSUMED: Mapping[str, float] = {
    "dispatch_seconds": 0.001,  # of the driver for a shard: a remote call, and its receipts booked
    "request_seconds": 0.03,  # of an object store, to the first byte
    "machine_bytes_a_second": 1.25e9,  # 10 Gbit/s
    "store_bytes_a_second": 1e11,  # of all machines together
    "store_puts_a_second": 3500,  # a prefix of S3, as its documentation says
    "card_against_core": 700,  # an H100's float32 products against one of these cores'
    "restart_seconds": 180,  # until a machine that was taken away is replaced, models loaded
}

PUTS_A_SHARD = 9


@dataclass(frozen=True, slots=True)
class Setting:
    """One build to simulate."""

    tokens: float
    machines: int
    shard_bytes: int
    losses_an_hour: float = 0.0
    """Of each machine: how often it is taken away."""
    train_on_card: bool = True


@dataclass(frozen=True, slots=True)
class Shape:
    """How much work a setting is."""

    documents: float
    passages: float
    shards: int
    tokens_a_shard: float

    @property
    def lists(self) -> int:
        """Lists of the vector index."""
        return choose_index(int(self.passages), DIM).nlist


def shape_of(setting: Setting) -> Shape:
    """Documents, passages and shards of a setting."""
    shards = max(1, round(setting.tokens * BYTES_A_TOKEN / setting.shard_bytes))
    return Shape(setting.tokens / TOKENS_A_DOCUMENT, setting.tokens / TOKENS_A_PASSAGE, shards, setting.tokens / shards)


# --- the stages, shard by shard ---------------------------------------------------------------------


@dataclass(slots=True)
class Machine:
    """What one machine is at."""

    epoch: int = 0
    """Counts its lives: events of an earlier one mean nothing."""
    up: bool = True
    tokenizing: set[int] = field(default_factory=set)
    ready: list[int] = field(default_factory=list)
    on_card: int | None = None
    lost_seconds: float = 0.0


@dataclass(frozen=True, slots=True)
class StageTimes:
    """Seconds of one shard."""

    tokenize: float
    """Of one core."""
    card: float
    """Encode and embed."""
    publish: float
    """Uploads, which the next shard does not wait for, but the end does."""


@dataclass(frozen=True, slots=True)
class StagesOutcome:
    """What the simulation of the stages came to."""

    seconds: float
    losses: int
    repeated_shards: int
    card_use: float
    """Share of the machines' time that their cards were at work."""


class StageSimulation:
    """Discrete events: a shard is handed out, tokenized, on the card, done; a machine goes, a machine comes."""

    def __init__(self, setting: Setting, shards: int, times: StageTimes, seed: int = 0) -> None:
        self.setting, self.times = setting, times
        self.waiting = list(range(shards - 1, -1, -1))
        self.left = shards
        self.machines = [Machine() for _ in range(setting.machines)]
        self.events: list[tuple[float, int, str, int, int, int]] = []
        self.random = random.Random(seed)
        self.now = self.driver_free = self.busy = 0.0
        self.count = self.losses = self.repeated = 0
        # Whoever takes more than its share ahead leaves other machines without work.
        self.ahead = min(CORES, -(-shards // setting.machines))

    def _at(self, when: float, kind: str, machine: int, shard: int = -1) -> None:
        self.count += 1
        heapq.heappush(self.events, (when, self.count, kind, machine, self.machines[machine].epoch, shard))

    def run(self) -> StagesOutcome:
        """Play until every shard is done."""
        for number in range(len(self.machines)):
            self._plan_loss(number)
            self._take(number)
        while self.left:
            self.now, _, kind, number, epoch, shard = heapq.heappop(self.events)
            if kind == "back" or epoch == self.machines[number].epoch:
                getattr(self, f"_{kind}")(number, shard)
        total = self.now + self.times.publish
        return StagesOutcome(total, self.losses, self.repeated, self.busy / total / len(self.machines))

    def _plan_loss(self, number: int) -> None:
        if self.setting.losses_an_hour:
            self._at(self.now + self.random.expovariate(self.setting.losses_an_hour / 3600), "lost", number)

    def _take(self, number: int) -> None:
        """Hand out shards while the machine has cores and not too many shards ahead of its card."""
        machine = self.machines[number]
        while self.waiting and machine.up and len(machine.tokenizing) + len(machine.ready) < self.ahead:
            shard = self.waiting.pop()
            self.driver_free = max(self.now, self.driver_free) + ASSUMED["dispatch_seconds"]
            machine.tokenizing.add(shard)
            self._at(self.driver_free + self.times.tokenize, "tokenized", number, shard)

    def _tokenized(self, number: int, shard: int) -> None:
        machine = self.machines[number]
        machine.tokenizing.discard(shard)
        machine.ready.append(shard)
        self._feed(number)

    def _feed(self, number: int) -> None:
        machine = self.machines[number]
        if machine.on_card is None and machine.ready:
            machine.on_card = machine.ready.pop(0)
            self._at(self.now + self.times.card, "done", number, machine.on_card)
        self._take(number)

    def _done(self, number: int, _: int) -> None:
        self.machines[number].on_card = None
        self.busy += self.times.card
        self.left -= 1
        self._feed(number)

    def _lost(self, number: int, _: int) -> None:
        machine = self.machines[number]
        held = [*machine.tokenizing, *machine.ready, *([] if machine.on_card is None else [machine.on_card])]
        self.losses += 1
        self.repeated += len(held)
        self.waiting += held
        self.machines[number] = Machine(machine.epoch + 1, up=False)
        self._at(self.now + ASSUMED["restart_seconds"], "back", number)
        for other in range(len(self.machines)) if len(self.waiting) == len(held) else ():
            self._take(other)  # whoever had run out of work

    def _back(self, number: int, _: int) -> None:
        self.machines[number].up = True
        self._plan_loss(number)
        self._take(number)


def stage_times(setting: Setting, costs: Mapping[str, float]) -> StageTimes:
    """Seconds of one shard of this setting."""
    shape, card = shape_of(setting), GPUS["h100"]
    chunks, passages = shape.tokens_a_shard / CHUNK_SIZE, shape.tokens_a_shard / TOKENS_A_PASSAGE
    uploaded = chunks * 2 * DIM + passages * 2 * DIM + shape.tokens_a_shard * (4 + BYTES_A_TOKEN / 3)
    share = min(ASSUMED["machine_bytes_a_second"], ASSUMED["store_bytes_a_second"] / setting.machines)
    return StageTimes(
        tokenize=shape.tokens_a_shard * costs["tokenize_seconds_a_token"],
        card=chunks / card.chunks_a_second[CHUNK_SIZE] + passages / card.passages_a_second,
        publish=uploaded / share + PUTS_A_SHARD * ASSUMED["request_seconds"],
    )


# --- the phases around them ---------------------------------------------------------------------------


def phases_of(setting: Setting, costs: Mapping[str, float], *, seed: int = 0) -> dict[str, Any]:
    """Seconds of every phase, what the stages met with, and what had to be held in one place."""
    shape, cores = shape_of(setting), CORES * setting.machines
    text = setting.tokens * BYTES_A_TOKEN
    units = max(1, math.ceil(text / SCAN_UNIT_BYTES))
    ranges = max(1, math.ceil(shape.documents / RANGE_ROWS))
    stages = StageSimulation(setting, shape.shards, stage_times(setting, costs), seed).run()
    add_by_list = costs["add_seconds_a_row"] / 1024
    segments = max(1, math.ceil(shape.passages / SEGMENT_ROWS))
    train = TRAINING_ROWS_PER_LIST * shape.lists**2 * costs["train_seconds_a_row_and_list"]
    adding = shape.passages * add_by_list * max(shape.lists, 1)
    gate = shape.passages * (costs["exact_seconds_a_row"] + costs["gate_seconds_a_row"])
    faster = ASSUMED["card_against_core"] / CORES if setting.train_on_card else 1.0
    receipts = 3 * shape.shards
    seconds = {
        "scan": _spread(text * costs["scan_seconds_a_byte"], units, cores),
        "plan": _spread(shape.documents * costs["plan_seconds_a_record"], ranges, cores),
        "stages": stages.seconds,
        "train": train / CORES / faster,
        "segments": _spread(adding / CORES / faster + gate / CORES, segments, setting.machines),
        "content id": shape.documents * costs["content_seconds_a_document"],
        "manifest": shape.shards * costs["driver_seconds_a_shard"],
        "listing": (receipts / 1000) * 2 * ASSUMED["request_seconds"],
    }
    return {
        "seconds": {name: round(value, 1) for name, value in seconds.items()},
        "hours": round(sum(seconds.values()) / 3600, 3),
        "largest": max(seconds, key=lambda name: seconds[name]),
        "shards": shape.shards,
        "lists": shape.lists,
        "segments": segments,
        "losses": stages.losses,
        "repeated_shards": stages.repeated_shards,
        "card_use": round(stages.card_use, 3),
        "training_sample_gb": round(TRAINING_ROWS_PER_LIST * shape.lists * DIM * 4 / 1e9, 2),
        "manifest_mb": round(shape.shards * costs["manifest_bytes_a_shard"] / 1e6, 1),
        "puts_a_second": round(PUTS_A_SHARD * shape.shards / stages.seconds, 1),
        "card_memory_of_a_shard_gb": round(shape.tokens_a_shard / CHUNK_SIZE * DIM * 2 / 1e9, 2),
    }


def _spread(core_seconds: float, items: int, places: int) -> float:
    """Seconds of equal items on so many places: whole rounds."""
    return core_seconds / items * math.ceil(items / places)


# --- what is asked ------------------------------------------------------------------------------------

MACHINES = (1, 3, 10, 30, 100, 300, 1000)
SIZES = {"1B tokens": 1e9, "1T tokens": 1e12}


def sweep(costs: Mapping[str, float]) -> list[dict[str, Any]]:
    """Machines at the default shard size, spot losses, shard sizes, and training without a card."""
    found = []
    for tokens in SIZES.values():
        base = Setting(tokens, 1, default_shard_bytes(int(tokens * BYTES_A_TOKEN)))
        settings = [replace(base, machines=machines) for machines in MACHINES]
        settings += [replace(base, machines=100, losses_an_hour=rate) for rate in (0.05, 0.2, 1.0)]
        settings += [replace(base, machines=300, shard_bytes=mib << 20) for mib in (4, 16, 64, 256, 1024)]
        settings += [replace(base, machines=300, shard_bytes=mib << 20, losses_an_hour=0.2) for mib in (16, 64, 256)]
        settings += [replace(base, machines=100, train_on_card=False)]
        for setting in settings:
            outcome = phases_of(setting, costs)
            say(f"{setting}: {outcome['hours']} h, most of it {outcome['largest']}")
            asked = {name: getattr(setting, name) for name in setting.__slots__}
            found.append({"setting": asked, **outcome})
    return found


def plot(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Hours by phase over the number of machines, one panel a corpus."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, panels = plt.subplots(1, 2, figsize=(11, 4.2))
    for panel, (title, tokens) in zip(panels, SIZES.items(), strict=True):
        shard_bytes = default_shard_bytes(int(tokens * BYTES_A_TOKEN))
        plain = {"tokens": tokens, "shard_bytes": shard_bytes, "losses_an_hour": 0.0, "train_on_card": True}
        runs = {
            entry["setting"]["machines"]: entry
            for entry in found
            if plain.items() <= entry["setting"].items() and entry["setting"]["machines"] in MACHINES
        }
        for phase in next(iter(runs.values()))["seconds"]:
            panel.plot(runs.keys(), [entry["seconds"][phase] / 3600 for entry in runs.values()], label=phase)
        panel.plot(runs.keys(), [entry["hours"] for entry in runs.values()], "k--", label="all")
        panel.set(xscale="log", yscale="log", title=f"{title}, shards of {shard_bytes >> 20} MiB", xlabel="machines")
        panel.set_ylabel("hours")
        panel.grid(alpha=0.3)
    panels[1].legend(fontsize=8, loc="center left", bbox_to_anchor=(1, 0.5))
    figure.tight_layout()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Parse, simulate, print."""
    here = Path(__file__).resolve().parent
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--costs", type=Path, default=here / "results" / "scaling-costs.json")
    parser.add_argument("--plot", type=Path, help="draw hours by phase into this PNG")
    add_output(parser)
    given = parser.parse_args()
    costs = json.loads(given.costs.read_text())["costs"]
    found = sweep(costs)
    if given.plot is not None:
        plot(found, given.plot)
    finish("scaling", {"costs": given.costs.name}, {"assumed": dict(ASSUMED), "simulated": found}, given.output)


if __name__ == "__main__":
    main()
