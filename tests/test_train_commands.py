"""`refrag train` as its users meet it: from a corpus to a checkpoint, with resuming, plots and one-line errors."""

import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from refrag_core import models
from refrag_core.checkpoint import Checkpoint
from refrag_core.training.config_reference import TABLES, settings_of
from refrag_core.training.run_state import claimed
from refrag_core.training.runs import load_stage, shipped_configs
from tests import command_line, tiny_models
from tests.command_line import Finished, call, without_traceback
from tests.small_index import documents, models_folder, write_jsonl

STAGES = ("reconstruct", "next-paragraph", "policy", "instruct")
SMALL = {
    "chunk_sizes": "[2, 4]",
    "context_tokens": 32,
    "output_tokens": 8,
    "steps": 4,
    "seconds": 1e6,
    "device": "cpu",
    "precision": "fp32",
    "compile": "false",
    "log_every": 1,
    "evaluation_windows": 8,
}
OWN: dict[str, dict[str, Any]] = {
    "policy": {"batch_windows": 8, "group_size": 4, "warm_start_masks": 4, "width": 16},
    "reconstruct": {"adapter_rank": 4, **{f"tasks.{number}.batch_rows": 4 for number in range(3)}},
    "next-paragraph": {"adapter_rank": 4, **{f"tasks.{number}.batch_rows": 4 for number in range(3)}},
    "instruct": {"adapter_rank": 4, **{f"tasks.{number}.batch_rows": 4 for number in range(4)}},
}


@pytest.fixture(autouse=True)
def _cache(own_cache: Path) -> None:
    """Commands remember the models' fingerprints."""


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """As many as the commands that run in processes of their own have."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@dataclass(frozen=True, slots=True)
class Workshop:
    """A folder with a corpus, its token shards, instructions and the runs of the stages."""

    root: Path

    @property
    def models(self) -> Path:
        return models_folder()

    def overrides(self, stage: str, **changes: Any) -> list[str]:
        """The shipped config of a stage made small enough for a test."""
        values = {**SMALL, **OWN[stage], "data": self.root / "tokens"}
        if stage == "reconstruct":
            values |= {"encoder": self.models / "encoder", "decoder": self.models / "decoder"}
        else:
            before = STAGES[STAGES.index(stage) - 1]
            values["checkpoint"] = self.root / before / "checkpoint"
        if stage == "instruct":
            values["instructions"] = self.root / "instructions.jsonl"
        return [f"{key}={value}" for key, value in (values | changes).items()]

    def arguments(self, stage: str, run: Path, **changes: Any) -> list[object]:
        settings = [word for override in self.overrides(stage, **changes) for word in ("--set", override)]
        return ["train", stage, stage, "--output", run, *settings]

    def train(self, stage: str, run: Path | None = None, *more: object, **changes: Any) -> Finished:
        return call(*self.arguments(stage, run or self.root / stage, **changes), "--json", *more)


def prepare(root: Path, *more: object, decoder: Path | None = None) -> Finished:
    return call(
        *("train", "prepare", root / "corpus", "--decoder", decoder or models_folder() / "decoder"),
        *("-o", root / "tokens", "--held-out-fraction", "0.2", *more),
    )


@pytest.fixture(scope="module")
def workshop(tmp_path_factory: pytest.TempPathFactory) -> Workshop:
    """Every stage trained for a few steps, one after another."""
    root = tmp_path_factory.mktemp("train")
    write_jsonl(root / "corpus" / "records.jsonl", documents(40))
    (root / "corpus" / "page.md").write_text("A page of its own. " + "The river runs to the sea. " * 20)
    examples = [
        {
            "id": str(n),
            "question": f"Who is {n}?",
            "answer": f"Number {n}.",
            "passages": [f"{n} is a number."],
            "gold": [0],
        }
        for n in range(6)
    ]
    write_jsonl(root / "instructions.jsonl", examples)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        made = Workshop(root)
        assert prepare(root).code == 0
        for stage in STAGES:
            done = made.train(stage)
            assert done.code == 0, done.err
            (root / f"{stage}.json").write_text(done.out)
    return made


def losses(run: Path) -> list[dict[str, Any]]:
    """All that was logged but the clock's."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    clock = ("seconds", "progress", "decoder_positions_per_s", "tokens_per_s", "mfu")
    return [{key: value for key, value in line.items() if key not in clock} for line in lines]


# --- refrag train prepare -----------------------------------------------------------------------------


def test_prepare_reads_what_an_index_is_built_of(tmp_path: Path) -> None:
    records = documents(30)
    write_jsonl(tmp_path / "corpus" / "a.jsonl", ["{broken", {"id": "x", "text": " "}, *records[:20]])
    write_jsonl(tmp_path / "corpus" / "sub" / "b.jsonl", [records[3], *records[20:]])
    (tmp_path / "novel.txt").write_text("A novel that is never trained on. " * 30)
    extra = ["--reported", tmp_path / "novel.txt", "--train-only", tmp_path / "more"]
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "page.html").write_text("<p>" + "A page about something else entirely. " * 20)
    done = prepare(tmp_path, *extra, "--json")
    assert done.code == 3
    assert "left out corpus/a.jsonl:0: malformed_json: " in done.err
    assert done.err.splitlines()[-1] == "1 records were left out as faulty"
    assert "tokenize: done" in done.err
    report = done.json
    assert (report["rejected"], report["quarantined"]) == ({"malformed_json": 1, "empty": 1}, 1)
    assert {corpus["name"]: corpus["documents"] for corpus in report["corpora"]} == {
        "corpus": 30,
        "more": 1,
        "novel": 1,
    }
    assert report["corpora"][0]["near_duplicates"] == 1
    assert report["splits"]["reported"]["documents"] == 1
    assert 0 < report["splits"]["held_out"]["documents"] < 20
    again = prepare(tmp_path, *extra)
    assert again.code == 3
    assert re.search(r"^held_out +\d+ documents, [\d,]+ tokens$", again.out, re.MULTILINE)
    index = json.loads((tmp_path / "tokens" / "token_shards.json").read_text())
    assert index["splits"] == report["splits"]
    assert sorted(path.suffix for path in (tmp_path / "tokens").iterdir()) == [".json", *[".npy"] * 9]


def test_a_failed_prepare_leaves_what_was_there(workshop: Workshop, tmp_path: Path) -> None:
    before = (workshop.root / "tokens" / "token_shards.json").read_bytes()
    (tmp_path / "corpus").mkdir()
    (tmp_path / "corpus" / "empty.txt").write_text(" ")
    failed = call(
        *("train", "prepare", tmp_path / "corpus", "-o", workshop.root / "tokens"),
        *("--decoder", models_folder() / "decoder"),
    )
    assert (failed.code, "no document is left to train on" in without_traceback(failed)) == (1, True)
    assert (workshop.root / "tokens" / "token_shards.json").read_bytes() == before


def test_corpora_are_named_by_what_tells_them_apart(tmp_path: Path) -> None:
    for name in ("one/docs", "two/docs"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "a.txt").write_text(
            f"{name} " + " ".join(str(random.Random(name).random()) for _ in range(50))
        )
    arguments = [
        *("train", "prepare", tmp_path / "one" / "docs", tmp_path / "two" / "docs" / "*.txt", "--json"),
        *("-o", tmp_path / "tokens", "--decoder", models_folder() / "decoder", "--held-out-fraction", 0),
    ]
    report = call(*arguments).json
    assert [corpus["name"] for corpus in report["corpora"]] == ["one/docs", "two/docs"]
    twice = call(*arguments, "--reported", tmp_path / "one" / "docs")
    assert twice.code == 2
    assert f"corpus {tmp_path / 'one' / 'docs'} is given twice" in without_traceback(twice)


# --- the stages ---------------------------------------------------------------------------------------


def test_every_stage_gives_a_checkpoint_that_the_next_goes_on_from(workshop: Workshop) -> None:
    for stage in STAGES:
        result = json.loads((workshop.root / f"{stage}.json").read_text())
        assert list(result) == [
            *("run", "finished", "step", "progress", "seconds", "checkpoint", "metrics", "evaluation"),
        ]
        assert (result["finished"], result["step"], result["progress"]) == (True, 4, 1.0)
        assert "held_out" in result["evaluation"]
        config = Checkpoint.load(Path(result["checkpoint"])).config
        assert config.trained
        assert config.policy.trained == (stage in ("policy", "instruct"))
        assert config.chunk_sizes == (2, 4)


@pytest.mark.parametrize("stage", ["reconstruct", "policy"])
def test_a_run_that_is_over_says_so_again(workshop: Workshop, stage: str) -> None:
    done = call(*workshop.arguments(stage, workshop.root / stage))
    assert (done.code, "finished before; nothing is left to do" in done.err) == (0, True)
    assert workshop.train(stage).json["metrics"].keys() > set()
    assert done.out.startswith("run  ")
    assert f"{workshop.root / stage}, finished" in done.out
    assert re.search(r"^held_out .*k=4 ", done.out, re.MULTILINE)
    assert done.out.splitlines()[-1].split() == ["checkpoint", str(workshop.root / stage / "checkpoint")]


@pytest.mark.parametrize("stage", ["reconstruct", "policy"])
def test_a_run_whose_time_is_up_exits_4_and_goes_on(workshop: Workshop, tmp_path: Path, stage: str) -> None:
    stopped = workshop.train(stage, tmp_path, stop_after_seconds=1e-6)
    assert stopped.code == 4
    assert (stopped.json["finished"], stopped.json["checkpoint"], stopped.json["evaluation"]) == (False, None, {})
    assert "run again to resume" in stopped.err
    done = workshop.train(stage, tmp_path)
    assert (done.code, done.json["step"]) == (0, 4)
    assert losses(tmp_path) == losses(workshop.root / stage)


def test_the_shipped_configs_are_of_their_stages() -> None:
    assert set(STAGES) < set(shipped_configs())
    for name in shipped_configs():
        stage: Any = next(stage for stage in STAGES if name.startswith(stage))
        assert load_stage(stage, name).output == f"runs/{name}"
    joint = str(command_line.REPOSITORY / "benchmarks" / "training" / "joint.toml")
    for mixed in ("reconstruct", "next-paragraph", "instruct"):
        assert load_stage(mixed, joint) == load_stage("instruct", joint)  # type: ignore[arg-type]
    listed = call("train", "config")
    assert [line.split()[0] for line in listed.out.splitlines()] == list(shipped_configs())
    assert set(call("train", "config", "--json").json) == set(shipped_configs())
    assert call("train", "config", "policy").out == shipped_configs()["policy"].read_text()
    assert call("train", "config", "policy", "--json").json["toml"] == shipped_configs()["policy"].read_text()


def test_every_setting_is_described() -> None:
    shown = call("train", "config", "--describe").out
    for kind in TABLES.values():
        for setting in settings_of(kind):
            assert setting.meaning, setting.name
            assert f"  {setting.name} = {setting.default}    ({setting.type})\n" in shown
    assert '  precision = "bf16"    (one of "bf16", "fp32")\n' in shown
    assert "  tensorboard = none    (bool)\n" in shown
    described = call("train", "config", "--describe", "--json").json
    assert list(described) == list(TABLES)
    assert described["policy"][0] == {
        "name": "data",
        "type": "text",
        "default": "required",
        "meaning": "Folder of token shards.",
    }


# --- logs ---------------------------------------------------------------------------------------------


def test_tensorboard_reads_the_events(workshop: Workshop, tmp_path: Path) -> None:
    event_accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    assert (
        workshop.train("reconstruct", tmp_path, stop_after_seconds=1e-6, tensorboard="true", evaluate_every=2).code == 4
    )
    assert workshop.train("reconstruct", tmp_path, evaluate_every=2).code == 0
    events = event_accumulator.EventAccumulator(str(tmp_path))
    events.Reload()
    logged = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    expected: dict[str, list[tuple[int, float]]] = {}
    for line in logged:
        for name, value in line.get("losses", {}).items():
            expected.setdefault(f"losses/{name}", []).append((line["step"], value))
    for tag, points in expected.items():
        found = events.Scalars(tag)
        assert [event.step for event in found] == [step for step, _ in points]
        assert [event.value for event in found] == pytest.approx([value for _, value in points])
    assert "held_out/chunk_size_4/gap_closed/0.25/random" in events.Tags()["scalars"]
    assert workshop.train("policy", tmp_path / "policy", tensorboard="false").code == 0
    assert list((tmp_path / "policy").glob("events*")) == []


def test_plot(workshop: Workshop, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    done = call("train", "plot", workshop.root / "reconstruct", "-o", tmp_path / "made" / "log.png", "--json")
    assert (tmp_path / "made" / "log.png").read_bytes().startswith(b"\x89PNG")
    gaps = "held out: gap closed, random expansion"
    losses_of = {task: f"{task}: loss, nats a token" for task in ("reconstruct", "next-paragraph")}
    others = {gaps, "learning rate", "decoder positions a second"}
    assert set(losses_of.values()) | others == set(done.json["panels"])
    assert set(done.json["panels"][gaps]) == {f"k={size}, p={p}" for size in (2, 4) for p in ("0", "0.1", "0.25")}
    assert {"k2", "k4"} >= set(done.json["panels"][losses_of["reconstruct"]]) > set()
    assert all(name.startswith("k") and "/p" in name for name in done.json["panels"][losses_of["next-paragraph"]])
    mixed = call("train", "plot", workshop.root / "next-paragraph", "-o", tmp_path / "mixed.png", "--json").json
    taught = "next-paragraph: divergence from the teacher, nats a token"
    assert {taught, losses_of["next-paragraph"]} < set(mixed["panels"])
    policy = call("train", "plot", workshop.root / "policy", "-o", tmp_path / "policy.svg", "--json").json["panels"]
    assert policy["loss of the policy"] == ["policy_loss", "warm_start_loss"]
    assert {"reward, reward std", "held out: nats gained by the policy", "learning rate"} <= set(policy)
    shown = call("train", "plot", workshop.root / "policy")
    assert shown.out.strip() == str(workshop.root / "policy" / "metrics.png")
    assert (workshop.root / "policy" / "metrics.png").read_bytes().startswith(b"\x89PNG")
    nothing = call("train", "plot", tmp_path)
    assert (nothing.code, "metrics.jsonl with logged steps" in without_traceback(nothing)) == (2, True)
    odd = call("train", "plot", workshop.root / "policy", "-o", tmp_path / "log.xyz")
    assert (odd.code, "log.xyz has suffix '.xyz'; expected an image's: " in without_traceback(odd)) == (2, True)


# --- killed at any moment -----------------------------------------------------------------------------

KILLED = {"steps": 24, "save_every": 5, "evaluation_windows": 2}


def resumed_after_kill(workshop: Workshop, stage: str, run: Path, *, kills: int, seed: int) -> None:
    """Kill a run at random moments after its first save, and let it end."""
    moments = sorted(random.Random(seed).sample(range(6, 22), kills))
    log = run / "metrics.jsonl"

    def logged(lines: int) -> bool:
        return log.is_file() and log.read_bytes().count(b"\n") >= lines

    for lines in moments:
        process = command_line.start(*workshop.arguments(stage, run, **KILLED), "--json")
        command_line.wait_until(partial(logged, lines), process)
        command_line.kill_group(process)
    done = workshop.train(stage, run, **KILLED)
    assert done.code == 0, done.err
    assert "resumed at step" in done.err


@pytest.mark.parametrize(
    "stage",
    ["reconstruct", *(pytest.param(s, marks=pytest.mark.slow) for s in ("next-paragraph", "policy", "instruct"))],
)
def test_a_killed_run_has_the_losses_of_an_undisturbed_one(workshop: Workshop, tmp_path: Path, stage: str) -> None:
    assert workshop.train(stage, tmp_path / "calm", **KILLED).code == 0
    resumed_after_kill(
        workshop, stage, tmp_path / "killed", kills=1 if stage == "reconstruct" else 3, seed=STAGES.index(stage)
    )
    assert losses(tmp_path / "killed") == losses(tmp_path / "calm")
    calm, killed = (tmp_path / name / "checkpoint" for name in ("calm", "killed"))
    for path in calm.glob("*.safetensors"):
        assert (killed / path.name).read_bytes() == path.read_bytes()


# --- errors -------------------------------------------------------------------------------------------


def other_decoder(folder: Path, *, seed: int = 0, tokenizer: bool = False) -> Path:
    """A decoder of the same shape with other weights, or with a tokenizer that cuts otherwise."""
    tiny_models.decoder_folder(folder, seed=seed)
    if tokenizer:
        path = folder / "tokenizer.json"
        content = json.loads(path.read_text())
        content["pre_tokenizer"]["add_prefix_space"] = True
        path.write_text(json.dumps(content))
    return folder


def fingerprints(folder: Path) -> tuple[str, str]:
    """Short fingerprints of a decoder and of its tokenizer."""
    return models.fingerprint_model(folder)[:12], models.fingerprint_tokenizer(folder)[:12]


def bad_configs(shop: Workshop, tmp: Path) -> Iterator[tuple[list[object], int, str]]:
    """Configs that cannot be trained by."""
    names, root = ", ".join(shipped_configs()), shop.root
    yield (
        ["train", "reconstruct", tmp / "none.toml"],
        2,
        rf"no training config '{tmp}/none.toml'; expected a TOML file, or one of those that come with refrag "
        rf"\({names}\): `refrag train config NAME` prints one to start from",
    )
    (tmp / "bad.toml").write_text("data = ")
    yield (
        ["train", "policy", tmp / "bad.toml"],
        2,
        rf"{tmp}/bad.toml cannot be read as TOML \(Invalid value \(at end of document\)\); expected a training config",
    )
    yield (
        shop.arguments("reconstruct", tmp / "run", steps="many"),
        2,
        "setting steps is 'many'; expected int",
    )
    yield (
        shop.arguments("reconstruct", tmp / "run", context_tokens=20),
        2,
        "context_tokens 20 is no power of two times chunk size 2; expected one, such as 512 for 8 and 16",
    )
    yield (
        shop.arguments("policy", tmp / "run", colour="red"),
        2,
        r"policy training config has unknown colour; expected settings among batch_windows, [a-z_, ]+",
    )
    policy, instruct = shipped_configs()["policy"], shipped_configs()["reconstruct"]
    yield (
        ["train", "reconstruct", "policy"],
        2,
        rf"{policy} is a policy's training config \(it has [a-z_]+ and no \[\[tasks\]\]\); expected one with a "
        r"reconstruct task: run `refrag train policy policy`",
    )
    yield (
        ["train", "policy", "reconstruct"],
        2,
        rf"{instruct} has \[\[tasks\]\], and a policy's training has none; expected a config such as `refrag train "
        r"config policy` prints: run another `refrag train` command for this one",
    )
    yield (
        ["train", "instruct", "reconstruct"],
        2,
        f"{instruct} has the tasks next-paragraph, reconstruct, text; expected instruct among them: run another "
        r"`refrag train` command, or add \[\[tasks\]\] with kind = 'instruct'",
    )
    yield (
        [
            *("train", "instruct", "reconstruct", "--set", "tasks.2.kind='instruct'", "--set", "tasks.2.weight=0"),
            *("--set", "instructions=x"),
        ],
        2,
        f"{instruct} has the tasks next-paragraph, reconstruct; expected instruct among them: .+",
    )
    yield (
        shop.arguments("reconstruct", tmp / "run", device="cuda"),
        2,
        "device is 'cuda', and PyTorch finds no CUDA device; expected cpu or auto on this machine",
    )
    yield (
        shop.arguments("reconstruct", root / "reconstruct", encoder_learning_rate=1e-9),
        2,
        rf"{root}/reconstruct/state was saved by a run with other settings \(encoder_learning_rate 0.0005, now "
        r"1e-09\); expected the same to resume: take another output folder, and give that run's checkpoint as "
        r"`checkpoint` to go on from its weights",
    )


def bad_data(shop: Workshop, tmp: Path) -> Iterator[tuple[list[object], int, str]]:
    """Data, checkpoints and models that do not belong together."""
    root, decoder, run = shop.root, shop.models / "decoder", tmp / "run"
    yield (
        shop.arguments("reconstruct", run, data=tmp / "nowhere"),
        1,
        f"no token shards in {tmp}/nowhere: token_shards.json is missing; expected what `refrag train prepare CORPUS "
        f"-o {tmp}/nowhere` writes: run that first",
    )
    other = other_decoder(tmp / "other-tokenizer", tokenizer=True)
    own, found = fingerprints(decoder), fingerprints(other)
    yield (
        shop.arguments("reconstruct", run, decoder=other),
        1,
        f"token shards in {root}/tokens were made with tokenizer {own[1]} and the decoder has {found[1]}; expected the "
        f"same: prepare them with `refrag train prepare --decoder` and this decoder",
    )
    yield (
        shop.arguments("reconstruct", run, decoder_learning_rate=1e30, projection_learning_rate=1e30),
        1,
        r"the loss of [a-z0-9./, -]+ is not a number at step \d; expected finite ones: lower the learning rates and "
        rf"start again in another output folder; what {run} holds of the steps before is kept",
    )
    untrained = shop.models / "checkpoint"
    yield (
        shop.arguments("policy", run, checkpoint=untrained),
        2,
        f"checkpoint {untrained} is not trained, and a policy for chunk vectors that mean nothing would learn nothing; "
        f"expected one after reconstruction and next-paragraph training",
    )
    trained = root / "reconstruct" / "checkpoint"
    for stage in ("policy", "next-paragraph"):
        yield (
            shop.arguments(stage, run, checkpoint=trained, chunk_sizes="[4, 8]"),
            2,
            f"chunk_sizes has 8, and checkpoint {trained} was trained for 2, 4; expected some of those: take them, or "
            f"train from the start for others",
        )
    other = other_decoder(tmp / "other-weights", seed=1)
    yield (
        shop.arguments("next-paragraph", run, checkpoint=trained, decoder=other),
        2,
        f"decoder is '{other}', and checkpoint {trained} was made with '{decoder}'; expected the same: leave decoder "
        f"out, or train a checkpoint for it from the start",
    )
    (tmp / "damaged").mkdir()
    (tmp / "damaged" / "token_shards.json").write_text("{")
    yield (
        shop.arguments("reconstruct", run, data=tmp / "damaged"),
        1,
        rf"{tmp}/damaged/token_shards.json is not JSON \(.+\); expected token shards: prepare them again",
    )
    yield (
        shop.arguments("next-paragraph", run, checkpoint=tmp / "gone"),
        1,
        rf"the config's checkpoint cannot be loaded: model '{tmp}/gone' not found: .*train that first, or name another "
        "with --set checkpoint=…",
    )
    yield (
        shop.arguments("instruct", run, instructions=tmp / "gone.jsonl"),
        1,
        rf"{tmp}/gone.jsonl cannot be read as UTF-8 text \(\[Errno 2\] No such file or directory: "
        rf"'{tmp}/gone.jsonl'\); expected JSON lines of examples",
    )
    moved = Checkpoint.load(trained)
    config = replace(moved.config, decoder=replace(moved.config.decoder, reference=str(other)))
    replace(moved, config=config).save(tmp / "moved")
    yield (
        shop.arguments("policy", run, checkpoint=tmp / "moved"),
        1,
        f"the decoder in {other} has fingerprint {fingerprints(other)[0]}, and the checkpoint was made with {own[0]}; "
        f"expected the same model: get the one that the checkpoint names",
    )


@pytest.mark.parametrize("number", range(11))
@pytest.mark.parametrize("kind", [bad_configs, bad_data])
def test_an_error_is_one_line_and_an_exit_code(workshop: Workshop, tmp_path: Path, kind: Any, number: int) -> None:
    arguments, code, message = [*kind(workshop, tmp_path)][number]
    failed = call(*arguments)
    assert failed.code == code, failed.err
    assert re.fullmatch(f"error: {message}", without_traceback(failed)), failed.err
    assert not (tmp_path / "run" / "state").exists()


def test_every_failure_is_tried(workshop: Workshop, tmp_path: Path) -> None:
    assert [len(list(kind(workshop, tmp_path))) for kind in (bad_configs, bad_data)] == [11, 11]


@pytest.mark.parametrize("name", ["state.json", "weights.safetensors", "optimizer.safetensors"])
def test_a_damaged_state_is_one_error(workshop: Workshop, tmp_path: Path, name: str) -> None:
    assert workshop.train("policy", tmp_path, stop_after_seconds=1e-6).code == 4
    path = tmp_path / "state" / name
    path.write_bytes(path.read_bytes()[:4])
    failed = workshop.train("policy", tmp_path)
    assert failed.code == 1
    assert re.fullmatch(
        rf"error: {path} cannot be resumed from \(.+\); expected what the run saved: delete {path.parent} "
        r"to start again",
        without_traceback(failed),
    )


def test_two_runs_do_not_share_a_folder(workshop: Workshop, tmp_path: Path) -> None:
    with claimed(tmp_path):
        refused = workshop.train("policy", tmp_path)
    assert refused.code == 1
    assert without_traceback(refused) == (
        f"error: another process trains in {tmp_path}; expected it to be free: wait for its end, or give another "
        f"output folder"
    )


def test_from_a_process_of_its_own(workshop: Workshop, tmp_path: Path) -> None:
    failed = command_line.run(*workshop.arguments("policy", tmp_path, checkpoint=workshop.models / "checkpoint"))
    assert (failed.code, "is not trained" in without_traceback(failed)) == (2, True)


# --- an index of the trained checkpoint ---------------------------------------------------------------


@pytest.fixture(scope="module")
def index(workshop: Workshop, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An index of the corpus that the last stage's checkpoint encoded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFRAG_CACHE", str(tmp_path_factory.mktemp("cache")))
        done = call(
            *("index", "build", workshop.root / "corpus", "-o", workshop.root / "index", "--workers", 0),
            *("--checkpoint", workshop.root / "instruct" / "checkpoint", "--retriever", workshop.models / "encoder"),
            *("--max-passage-tokens", 64, "--min-recall", 0.5, "--device", "cpu"),
        )
    assert done.code == 0, done.err
    return workshop.root / "index"


def ask(index: Path, *more: object) -> Finished:
    return call("ask", index, "Which river?", "--top-k", 2, "--max-new-tokens", 4, "--device", "cpu", *more)


def test_the_trained_checkpoint_serves_an_index(workshop: Workshop, index: Path) -> None:
    done = ask(index, "--json")
    assert (done.code, done.json["trained"], done.json["policy"]) == (0, True, "learned")
    assert done.json["stats"]["compression"] > 1
    own = ask(index, "--decoder", workshop.models / "decoder", "--json")
    assert own.json["answer"] == done.json["answer"]


def test_a_trained_checkpoint_refuses_another_decoder(workshop: Workshop, index: Path, tmp_path: Path) -> None:
    other, own = other_decoder(tmp_path / "other", seed=1), workshop.models / "decoder"
    failed = ask(index, "--decoder", other)
    assert failed.code == 1
    assert without_traceback(failed) == (
        f"error: the decoder in {other} has fingerprint {fingerprints(other)[0]}, and the checkpoint was made with "
        f"{fingerprints(own)[0]}; expected the same model: get the one that the checkpoint names"
    )


def test_a_build_refuses_a_checkpoint_over_another_decoder(workshop: Workshop, tmp_path: Path) -> None:
    """Its encoder reads the decoder's embeddings."""
    own = Checkpoint.load(workshop.root / "instruct" / "checkpoint")
    other = other_decoder(tmp_path / "other", seed=1)
    assert own.config.encoder.embedding == "subtoken-mean-decoder-map-1"
    moved = replace(own.config, decoder=replace(own.config.decoder, reference=str(other)))
    replace(own, config=moved).save(tmp_path / "moved")
    failed = call(
        *("index", "build", workshop.root / "corpus", "-o", tmp_path / "index", "--workers", 0, "--device", "cpu"),
        *("--checkpoint", tmp_path / "moved", "--retriever", workshop.models / "encoder"),
    )
    assert failed.code == 1
    assert f"the decoder in {other} has fingerprint {fingerprints(other)[0]}" in without_traceback(failed)
    assert not (tmp_path / "index" / "versions").exists()


def test_an_index_refuses_a_checkpoint_of_another_training(workshop: Workshop, index: Path) -> None:
    other = workshop.root / "reconstruct" / "checkpoint"
    failed = ask(index, "--checkpoint", other)
    found, needed = (
        Checkpoint.load(workshop.root / stage / "checkpoint").encode_fingerprint[:12]
        for stage in ("reconstruct", "instruct")
    )
    assert failed.code == 1
    assert re.fullmatch(
        rf"error: the checkpoint's encoder has fingerprint {found}, the index was encoded with {needed} \(.+\): open "
        r"it with the checkpoint that it was built with, or rebuild it with `refrag index build CORPUS --rebuild "
        r"--checkpoint …`",
        without_traceback(failed),
    )


def test_an_index_of_other_chunks_is_refused(workshop: Workshop, index: Path, tmp_path: Path) -> None:
    own = Checkpoint.load(workshop.root / "instruct" / "checkpoint")
    replace(own, config=replace(own.config, chunk_size=2, chunk_sizes=(2,))).save(tmp_path / "other")
    failed = ask(index, "--checkpoint", tmp_path / "other")
    assert failed.code == 1
    assert without_traceback(failed) == (
        "error: the index has chunks of 4 tokens, and the checkpoint was trained for 2; expected one of those: open "
        "the index with the checkpoint that it was built with, or rebuild it with `refrag index build CORPUS --rebuild`"
    )
