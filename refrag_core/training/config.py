"""The settings of a training run: one TOML file, validated, with overrides.

    [[tasks]]
    kind = "reconstruct"       # reconstruct | recall | interleaved | continuations | next-paragraph | text | instruct
    weight = 0.5               # share of the micro-batches
    batch_rows = 64            # windows a micro-batch

and the fields of `TrainingConfig` on the top level. `--set key=value` overrides one field; the value is TOML,
or text where it is no TOML; `tasks.0.weight=0.3` reaches into a table.
"""

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, get_args

from refrag_core.digests import JSON
from refrag_core.encoder import EmbeddingForm, Pooling
from refrag_core.errors import ConfigError
from refrag_core.models import DEFAULT_DECODER, DEFAULT_ENCODER
from refrag_core.policy import num_expanded
from refrag_core.stored_weights import StoredDtype

TaskKind = Literal["reconstruct", "recall", "interleaved", "continuations", "next-paragraph", "text", "instruct"]

EXPANDING: tuple[TaskKind, ...] = ("recall", "interleaved", "next-paragraph", "instruct")
"""Tasks in which some chunks may be given as tokens."""
Teacher = Literal["self", "base"]

_CHOICES: dict[str, tuple[str, ...]] = {
    "kind": get_args(TaskKind),
    "curriculum": ("mixture", "geometric"),
    "teacher": get_args(Teacher),
    "precision": ("bf16", "fp32"),
    "decoder_training": ("frozen", "lora", "full"),
    "encoder_embedding": get_args(EmbeddingForm),
    "encoder_pooling": get_args(Pooling),
    "encoder_optimizer": ("adamw", "muon"),
    "decoder_optimizer": ("adamw", "muon"),
    "encoder_dtype": get_args(StoredDtype),
    "adapter_dtype": get_args(StoredDtype),
}
_MAY_BE_ZERO = (
    "seed",
    "steps",
    "evaluate_every",
    "weight_decay",
    "warmup",
    "learning_rate_floor",
    "distillation",
    "readout",
    "weight",
    "final_weight",
    "last_share",
    "exchanged_share",
    "shuffled_share",
    "warm_start_share",
    "entropy_weight",
    "divergence_weight",
    "query_dropout",
    "match_dim",
)

ADDED_SETTINGS: dict[str, JSON] = {
    "last_share": 0.0,
    "match_dim": 0,
    "adapter_signs": False,
    "exchanged_share": 0.0,
    "branches": 16,
}
"""Settings that came later, with what runs did before them: a state that was saved then can still be resumed."""

_NOT_RESUMED = (
    "output",
    "data",
    "instructions",
    "stop_after_seconds",
    "device",
    "compile",
    "static_shapes",
    "capture",
    "log_every",
    "save_every",
    "tensorboard",
)


@dataclass(frozen=True, slots=True)
class TaskConfig:
    """One kind of training example."""

    kind: TaskKind
    """What is learnt."""
    weight: float = 1.0
    """Share of the micro-batches, relative to the other tasks'."""
    final_weight: float | None = None
    """The share at the end of the training, reached evenly; None for the same all along."""
    batch_rows: int = 32
    """Windows a micro-batch."""
    curriculum: Literal["mixture", "geometric"] = "mixture"
    """Of the lengths of reconstructions: `refrag_core.training.schedule.length_weights`."""
    expansion_fractions: tuple[float, ...] = (0.0, 0.1, 0.25)
    """p of the contexts of recall, next-paragraph and instruct, each equally likely, with expanded chunks drawn at
    random (1, in instruct alone: all of them); of the whole windows of interleaved, where they stand in runs and are
    what is predicted."""
    gold_expansion_weight: float = 1.0
    """How many times as readily chunks of passages that hold the answer are drawn, in instruct."""
    exchanged_share: float = 0.0
    """Share, at most, of instruct's examples in which the answer, and its places in gold passages, are exchanged for a
    random answer to a question of the same kind: it can only be read then, however often the question came."""
    last_share: float = 0.0
    """Share of the contexts of recall and next-paragraph whose last chunks are expanded, and not random ones."""
    span_tokens: int = 32
    """Tokens of a piece of the context that recall continues, and output_tokens is a multiple; of a run of expanded
    chunks in interleaved, on average; of a branch in continuations."""
    given_tokens: int = 4
    """The first of the tokens of a piece, which are given, in recall."""
    branches: int = 16
    """Places in a window behind which continuations predicts the next tokens, with all before compressed."""
    distillation: float = 0.0
    """Weight of the KL divergence from the decoder that reads the full context, in the loss of next-paragraph,
    continuations and interleaved; in that of text, from the teacher on the same text."""
    teacher: Teacher = "self"
    """That decoder: as it is being trained, or `base`, without its adapter."""

    def weight_at(self, progress: float) -> float:
        """The share when this much (0 to 1) of the training is done."""
        return self.weight if self.final_weight is None else self.weight + progress * (self.final_weight - self.weight)


@dataclass(frozen=True, slots=True)
class TrainingConfig:
    """A whole training run."""

    data: str
    """Folder of token shards."""
    output: str
    """Folder of the run: checkpoint/, state/, metrics.jsonl, evaluation.json."""
    tasks: tuple[TaskConfig, ...]
    checkpoint: str | None = None
    """Checkpoint to go on from, with a re-warmed optimizer; None starts from encoder and decoder as they are."""
    instructions: str | None = None
    """JSON Lines file of instruct's examples (`refrag_core.training.instruct_data`)."""
    encoder: str = DEFAULT_ENCODER
    """Encoder body of a run without checkpoint: folder, hub id or package."""
    decoder: str = DEFAULT_DECODER
    """Decoder of a run without checkpoint: folder, hub id or package."""
    encoder_embedding: EmbeddingForm = "subtoken-mean-decoder-map-1"
    """What an encoder that was not trained before reads of a token; a trained one stays as it is."""
    encoder_pooling: Pooling = "gated-mean-1"
    """How its chunk embedding is made of the body's outputs; likewise."""
    chunk_sizes: tuple[int, ...] = (8, 16)
    """One of them is drawn for each micro-batch; the last is the checkpoint's default."""
    context_tokens: int = 512
    """Tokens of the context (s), which chunks are made of."""
    output_tokens: int = 256
    """Tokens of the continuation that is predicted (o)."""
    steps: int = 1000
    """Optimizer steps after which the run ends; 0 to store what it starts from anew, in the form that is set here."""
    seconds: float | None = None
    """Training time after which the run ends, resumed parts counted together and steps in which a shape is captured
    left out; the schedule follows what is nearer."""
    stop_after_seconds: float | None = None
    """Time after which this process saves its state and stops, to be resumed."""
    seed: int = 0
    """Of initial weights, the order of the data and all that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the passes; what is trained stays in float32."""
    compile: bool = True
    """Compile the layers and, on a GPU, the loss; costs half a minute or more and pays in a long run."""
    static_shapes: bool = False
    """Compile the layers for each shape of a micro-batch by itself, not once for all: some seconds a shape more, and
    perhaps quicker kernels."""
    capture: bool = True
    """Replay each shape's forward and backward pass as a CUDA graph; without effect on a CPU."""
    gradient_checkpointing: bool = False
    """Compute the decoder's layers again in the backward pass: less memory, more time."""
    decoder_training: Literal["frozen", "lora", "full"] = "lora"
    """`full` trains whole matrices, which the checkpoint holds as an adapter of `adapter_rank` that is closest."""
    adapter_rank: int = 32
    """Rank of the low-rank update of the decoder (LoRA)."""
    adapter_signs: bool = False
    """With `full`: the checkpoint holds what that rank leaves out as well, one bit an entry with a scale a row and a
    column (`refrag_core.adapter`). `lora` goes on beside signs that are there, and leaves them as they are."""
    adapter_scale: float = 2.0
    """What the update is multiplied by."""
    adapter_targets: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
    """Names of the layers that get one."""
    encoder_optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the encoder body's matrices; AdamW has all else."""
    decoder_optimizer: Literal["adamw", "muon"] = "adamw"
    """Of the updates of the decoder's matrices."""
    encoder_learning_rate: float = 2e-4
    """Peak, of the encoder body."""
    projection_learning_rate: float = 1e-3
    """Peak, of the projection."""
    decoder_learning_rate: float = 5e-4
    """Peak, of the decoder or its update."""
    warmup: float = 0.04
    """Share of the training."""
    learning_rate_floor: float = 0.02
    """Of the peak, at the end."""
    weight_decay: float = 0.01
    """AdamW's."""
    readout: float = 0.0
    """Weight, in reconstruct, of the loss of each token read from its chunk's vector alone, by a linear map for its
    place that only teaches: vectors then keep their tokens apart before the decoder has learnt to look."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    micro_batches: int = 1
    """Micro-batches a step, their gradients averaged."""
    alike: int = 1
    """Neighbouring micro-batches that share task, chunk size and expansion fraction: as many as there are GPUs, so that
    none of them waits for another."""
    log_every: int = 10
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two saves of the state."""
    evaluate_every: int = 0
    """Steps between two short evaluations on held-out documents; 0 for none but the last."""
    evaluation_windows: int = 256
    """Windows of held-out documents that the last evaluation reads."""
    encoder_dtype: StoredDtype = "float16"
    """How the checkpoint stores the encoder body."""
    adapter_dtype: StoredDtype = "float16"
    """How it stores the decoder's update."""
    peak_tflops: float = 989.0
    """Of the device in bf16 without sparsity, for the model FLOPs utilisation; 989 for an H100."""
    tensorboard: bool | None = None
    """Write TensorBoard's event files beside metrics.jsonl; left out: where the package is installed."""

    def to_json(self) -> dict[str, JSON]:
        """All fields."""
        return asdict(self)

    def captures(self, device_type: str) -> bool:
        """Whether passes are captured. Not with gradient checkpointing, which keeps random states on the CPU."""
        return self.capture and device_type == "cuda" and not self.gradient_checkpointing

    @property
    def resume_settings(self) -> dict[str, JSON]:
        """What must not change between a run and its continuation."""
        tasks: list[JSON] = [without_added(asdict(task)) for task in self.tasks]
        return {key: value for key, value in self.to_json().items() if key not in _NOT_RESUMED} | {"tasks": tasks}


def without_added(settings: Mapping[str, JSON]) -> dict[str, JSON]:
    """The settings but for `ADDED_SETTINGS` that change nothing."""
    return {key: value for key, value in settings.items() if key not in ADDED_SETTINGS or value != ADDED_SETTINGS[key]}


def load_config(path: Path, overrides: Sequence[str] = ()) -> TrainingConfig:
    """The config in a TOML file. Raises ConfigError for what is unreadable, unknown, ill-typed or out of range."""
    return parse_config(read_settings(path, overrides))


def read_settings(path: Path, overrides: Sequence[str] = ()) -> dict[str, Any]:
    """The values in a TOML file with `overrides` (`key=value`), not checked yet. Raises ConfigError."""
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{path} cannot be read as TOML ({error}); expected a training config") from error
    for override in overrides:
        _override(values, override)
    return values


def _override(values: dict[str, Any], override: str) -> None:
    key, separator, text = override.partition("=")
    if not separator:
        raise ConfigError(f"override {override!r} has no '='; expected key=value")
    target: Any = values
    *path, last = key.strip().split(".")
    try:
        for part in path:
            target = target[int(part)] if isinstance(target, list) else target[part]
        target[int(last) if isinstance(target, list) else last] = _value(text.strip())
    except (KeyError, IndexError, ValueError, TypeError) as error:
        raise ConfigError(
            f"override {override!r} reaches nothing in the config; expected a path such as seed"
        ) from error


def _value(text: str) -> Any:
    try:
        return tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        return text


def parse_config(values: Mapping[str, Any]) -> TrainingConfig:
    """The config of plain values. Raises ConfigError."""
    tasks = values.get("tasks")
    if not isinstance(tasks, Sequence) or isinstance(tasks, str) or not tasks:
        raise ConfigError("the training config has no tasks; expected one or more [[tasks]] tables")
    parsed = tuple(TaskConfig(**checked_settings(TaskConfig, task, "task")) for task in tasks)
    rest = {key: value for key, value in values.items() if key != "tasks"}
    config = TrainingConfig(tasks=parsed, **checked_settings(TrainingConfig, rest, "training config", given=("tasks",)))
    _check_fit(config)
    return config


def checked_settings(kind: type[Any], values: Any, name: str, given: Sequence[str] = ()) -> dict[str, Any]:
    """The values of the fields of dataclass `kind`, each of its type and in range. Raises ConfigError."""
    if not isinstance(values, Mapping):
        raise ConfigError(f"a {name} is {values!r}; expected a table of settings")
    known = {field.name: field for field in fields(kind)}
    unknown = sorted(values.keys() - known.keys())
    required = {key for key in ("data", "output", "kind") if key in known}
    missing = sorted(required - values.keys() - set(given))
    if unknown or missing:
        found = f"unknown {', '.join(unknown)}" if unknown else f"no {', '.join(missing)}"
        raise ConfigError(f"{name} has {found}; expected settings among {', '.join(sorted(known))}")
    return {key: _checked_value(key, value, _type_name(known[key].type)) for key, value in values.items()}


def _type_name(annotation: Any) -> str:
    return annotation.__name__ if isinstance(annotation, type) else str(annotation)


def _checked_value(key: str, value: Any, annotation: str) -> Any:
    if key in _CHOICES:
        if value not in _CHOICES[key]:
            raise ConfigError(f"setting {key} is {value!r}; expected one of {', '.join(_CHOICES[key])}")
        return value
    if "tuple" in annotation:
        if not isinstance(value, (list, tuple)) or not value:
            raise ConfigError(f"setting {key} is {value!r}; expected a list")
        return tuple(_scalar(key, item, annotation) for item in value)
    return _scalar(key, value, annotation)


def _scalar(key: str, value: Any, annotation: str) -> Any:
    number: Any = value
    if value is None and "None" in annotation:
        return None
    wanted: tuple[type, ...] = (str,)
    if "bool" in annotation:
        wanted = (bool,)
    elif "int" in annotation:
        wanted = (int,)
    elif "float" in annotation:
        wanted = (float, int)
    if not isinstance(value, wanted) or (isinstance(value, bool) and bool not in wanted):
        raise ConfigError(f"setting {key} is {value!r}; expected {annotation}")
    if key == "expansion_fractions":
        in_range = 0.0 <= number <= 1.0
    elif isinstance(value, (int, float)) and not isinstance(value, bool):
        in_range = number > 0 or (number == 0 and key in _MAY_BE_ZERO)
    else:
        in_range = True
    if not in_range:
        raise ConfigError(f"setting {key} is {value!r}, which is out of range; expected a positive number")
    return float(number) if "float" in annotation else value


def _check_fit(config: TrainingConfig) -> None:
    for size in config.chunk_sizes:
        count = config.context_tokens // size
        if config.context_tokens % size or count & (count - 1):
            raise ConfigError(
                f"context_tokens {config.context_tokens} is no power of two times chunk size {size}; expected one, "
                f"such as 512 for 8 and 16"
            )
    if not all(any(task.weight_at(progress) for task in config.tasks) for progress in (0.0, 1.0)):
        raise ConfigError("all tasks have weight 0 at the start or at the end; expected a positive one")
    for task in config.tasks:
        if task.kind == "recall" and (config.output_tokens % task.span_tokens or task.given_tokens >= task.span_tokens):
            raise ConfigError(
                f"recall has span_tokens {task.span_tokens} and given_tokens {task.given_tokens}; expected a divisor "
                f"of output_tokens {config.output_tokens}, and fewer given than a span has"
            )
        if task.kind != "instruct" and 1.0 in task.expansion_fractions:
            raise ConfigError(
                f"{task.kind} has expansion_fractions with 1, all chunks, which instruct alone may have; expected "
                f"fractions below 1: a text task reads all of it as tokens"
            )
        if task.kind != "instruct" and task.exchanged_share:
            raise ConfigError(f"{task.kind} has an exchanged_share, but no answers; expected it in instruct alone")
        if task.kind == "interleaved":
            _check_interleaved(config, task)
        if task.kind == "continuations":
            _check_continuations(config, task)
        if task.kind == "text" and task.distillation and task.teacher != "base":
            raise ConfigError(
                "text has distillation from the decoder that is being trained, which says what the decoder says "
                'itself; expected teacher = "base"'
            )
    if any(task.distillation > 1.0 for task in config.tasks):
        raise ConfigError("distillation must be 0 to 1, the divergence's share of the loss")
    for name in ("last_share", "exchanged_share"):
        if any(getattr(task, name) > 1.0 for task in config.tasks):
            raise ConfigError(f"{name} must be 0 to 1, a share of the rows")
    if config.adapter_signs and config.decoder_training != "full":
        raise ConfigError(
            f"adapter_signs is true with decoder_training {config.decoder_training!r}; expected full: signs are made "
            f"of whole matrices; with lora a checkpoint's own stay without the setting"
        )
    if config.decoder_training == "frozen" and any(task.kind == "text" for task in config.tasks):
        raise ConfigError(
            "a text task trains nothing but the decoder, which is frozen; leave the task out, or use lora or full"
        )
    if (config.instructions is None) == any(task.kind == "instruct" for task in config.tasks):
        raise ConfigError(
            f"instructions is {config.instructions!r}; expected the file of an instruct task's examples exactly where "
            f"there is such a task"
        )
    if config.micro_batches % config.alike:
        raise ConfigError(f"micro_batches is {config.micro_batches}; expected a multiple of alike, {config.alike}")
    if config.warmup >= 1.0:
        raise ConfigError(f"warmup is {config.warmup}; expected a share of the training below 1")


def _check_interleaved(config: TrainingConfig, task: TaskConfig) -> None:
    window = config.context_tokens + config.output_tokens
    for size in config.chunk_sizes:
        expanded = [num_expanded(window // size, fraction) for fraction in task.expansion_fractions]
        if window % size or min(expanded) == 0 or max(expanded) == window // size:
            raise ConfigError(
                f"interleaved has windows of {window} tokens (context_tokens and output_tokens), chunk size {size} and "
                f"expansion_fractions {', '.join(f'{fraction:g}' for fraction in task.expansion_fractions)}; expected "
                f"whole chunks, and fractions that expand at least one of them, which are predicted, and leave one"
            )


def _check_continuations(config: TrainingConfig, task: TaskConfig) -> None:
    window = config.context_tokens + config.output_tokens
    for size in config.chunk_sizes:
        if window % size:
            raise ConfigError(
                f"continuations has windows of {window} tokens (context_tokens and output_tokens) and chunk size "
                f"{size}; expected whole chunks"
            )
        places = max(0, branch_places(window, size, task.span_tokens))
        if task.branches > places:
            raise ConfigError(
                f"continuations has {task.branches} branches in windows of {window} tokens, and with chunk size {size} "
                f"there are {task.span_tokens} more (span_tokens) behind {places} chunks; expected one behind each at "
                f"most: fewer branches, a shorter span, or longer windows"
            )


def branch_places(window: int, chunk_size: int, span_tokens: int) -> int:
    """Chunks of a window of so many tokens behind which there are `span_tokens` more."""
    return (window - span_tokens) // chunk_size
