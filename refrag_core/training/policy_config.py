"""The settings of a policy's training: one TOML file with the fields of `PolicyTrainingConfig`, with overrides.

Overrides as in `refrag_core.training.config`: `--set key=value`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from refrag_core.digests import JSON
from refrag_core.errors import ConfigError
from refrag_core.models import DEFAULT_RETRIEVER
from refrag_core.training.config import TaskConfig, TrainingConfig, checked_settings, read_settings, without_added

_NOT_RESUMED = (
    "output",
    "data",
    "instructions",
    "held_out_instructions",
    "stop_after_seconds",
    "device",
    "compile",
    "log_every",
    "save_every",
    "tensorboard",
)


@dataclass(frozen=True, slots=True)
class PolicyTrainingConfig:
    """A whole run: a warm start from chunk importance, then policy gradients with a group baseline."""

    data: str
    """Folder of token shards."""
    output: str
    """Folder of the run: checkpoint/, state/, metrics.jsonl, evaluation.json."""
    checkpoint: str
    """Checkpoint with trained encoder, projection and decoder, which stay as they are."""
    chunk_sizes: tuple[int, ...] = (8, 16)
    """One of them is drawn for each step."""
    context_tokens: int = 512
    """Tokens of the context (s), which chunks are made of."""
    output_tokens: int = 128
    """Tokens of the continuation that rewards are taken from (o)."""
    expansion_fractions: tuple[float, ...] = (0.05, 0.1, 0.25)
    """p; one of them is drawn for each step of policy gradients."""
    batch_windows: int = 32
    """Contexts a step."""
    group_size: int = 8
    """G, the sampled expansion masks of a context."""
    shuffled_share: float = 0.3
    """Share of the contexts made of passages of several documents, of which one precedes the output."""
    passages: int = 4
    """How many."""
    query_conditioned: bool = False
    """Whether the policy reads the retriever's query vector; in training that of the first output tokens."""
    match_dim: int = 0
    """Width in which that policy compares the query with every chunk, a term of its logits; 0 for none but one that
    the checkpoint's trained policy has. A trained policy without the term goes on with it, at first with the logits
    that it had."""
    query_tokens: int = 32
    """Those tokens, which a policy with a query is not rewarded for."""
    query_dropout: float = 0.1
    """Share of the contexts whose query is zeros, so that the policy can do without."""
    retriever: str = DEFAULT_RETRIEVER
    """Whose query vectors those are: folder, hub id or package."""
    instructions: str | None = None
    """JSON Lines file of questions with passages (`refrag_core.training.instruct_data`), of which a policy with a query
    learns to choose the chunks that hold the answers."""
    instruction_share: float = 0.5
    """Share of the steps, in both stages, that are on those; without effect without such a file."""
    held_out_instructions: str | None = None
    """Such a file, all of which the evaluation reads."""
    steps: int = 1000
    """Optimizer steps after which the run ends; 0 to evaluate and store the policy that there is."""
    seconds: float | None = None
    """Training time after which the run ends, resumed parts counted together; the schedule follows what is nearer."""
    stop_after_seconds: float | None = None
    """Time after which this process saves its state and stops, to be resumed."""
    seed: int = 0
    """Of initial weights, the order of the data and all that is drawn."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:1 …."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """Of the passes; what is trained stays in float32."""
    compile: bool = False
    """Compile the layers of body and decoder, some seconds for each chunk size and fraction."""
    warm_start_share: float = 0.5
    """Share of the training that is supervised by chunk importance; 0 for policy gradients alone."""
    warm_start_masks: int = 16
    """Random expansion masks a context that importance is estimated from."""
    warm_start_fraction: float = 0.25
    """Their p."""
    ridge: float = 1.0
    """Of the estimate."""
    label_temperature: float = 1.0
    """Of the soft labels, in standard deviations of the importance."""
    warm_start_learning_rate: float = 1e-3
    """Peak, of the warm start."""
    learning_rate: float = 3e-4
    """Of policy gradients."""
    updates_per_sample: int = 2
    """Optimizer steps on each step's samples."""
    clip: float = 0.2
    """PPO's."""
    entropy_weight: float = 1e-3
    """Of the first pick's entropy, a bonus."""
    divergence_weight: float = 0.0
    """Of the KL divergence from the policy after the warm start, a penalty."""
    warmup: float = 0.05
    """Share of each stage."""
    learning_rate_floor: float = 0.05
    """Of the peak, at a stage's end."""
    weight_decay: float = 0.01
    """AdamW's."""
    max_gradient_norm: float = 1.0
    """Gradients are scaled down to this norm."""
    width: int = 256
    """Of the policy network; a checkpoint with a trained policy of this shape is gone on from."""
    num_heads: int = 4
    """Attention heads of its layers."""
    num_layers: int = 2
    """Its layers."""
    log_every: int = 20
    """Steps between two lines of metrics.jsonl."""
    save_every: int = 500
    """Steps between two saves of the state."""
    evaluate_every: int = 0
    """Steps between two evaluations, short on held-out documents and whole on held-out questions; 0 for none but the
    last."""
    evaluation_windows: int = 256
    """Windows of held-out documents that the last evaluation reads."""
    evaluation_fraction: float = 0.1
    """p of the evaluations."""
    tensorboard: bool | None = None
    """Write TensorBoard's event files beside metrics.jsonl; left out: where the package is installed."""

    def to_json(self) -> dict[str, JSON]:
        """All fields."""
        return asdict(self)

    @property
    def resume_settings(self) -> dict[str, JSON]:
        """What must not change between a run and its continuation."""
        return without_added({key: value for key, value in self.to_json().items() if key not in _NOT_RESUMED})

    @property
    def first_scored(self) -> int:
        """Number of the first output token that counts: no context could predict the first at an even footing."""
        return self.query_tokens if self.query_conditioned else 1

    def training_config(self, embedding: Any, pooling: Any) -> TrainingConfig:
        """What `load_training_model` needs to load the checkpoint's parts for this run."""
        return TrainingConfig(
            data=self.data,
            output=self.output,
            tasks=(TaskConfig("next-paragraph"),),
            checkpoint=self.checkpoint,
            encoder_embedding=embedding,
            encoder_pooling=pooling,
            chunk_sizes=self.chunk_sizes,
            context_tokens=self.context_tokens,
            output_tokens=self.output_tokens,
            seed=self.seed,
            precision=self.precision,
            decoder_training="frozen",
        )


def load_policy_config(path: Path, overrides: Sequence[str] = ()) -> PolicyTrainingConfig:
    """The config in a TOML file. Raises ConfigError for what is unreadable, unknown, ill-typed or out of range."""
    return parse_policy_config(read_settings(path, overrides))


def parse_policy_config(values: Mapping[str, Any]) -> PolicyTrainingConfig:
    """The config of plain values. Raises ConfigError."""
    checked = checked_settings(PolicyTrainingConfig, values, "policy training config")
    if "checkpoint" not in checked:
        raise ConfigError("policy training config has no checkpoint; expected one with a trained encoder and decoder")
    config = PolicyTrainingConfig(**checked)
    _check_lengths(config)
    _check_shares(config)
    return config


def _check_lengths(config: PolicyTrainingConfig) -> None:
    pieces = config.passages if config.shuffled_share else 1
    for size in config.chunk_sizes:
        if config.context_tokens % (size * pieces):
            raise ConfigError(
                f"context_tokens {config.context_tokens} is no multiple of {pieces} passages of chunks of {size} "
                f"tokens; expected one, such as 512 for 4 passages and chunks of 8 and 16"
            )
    if config.output_tokens <= config.first_scored:
        raise ConfigError(
            f"output_tokens is {config.output_tokens}, of which the first {config.first_scored} are not scored; "
            f"expected more"
        )
    if min(config.group_size, config.warm_start_masks, config.passages) < 2:
        raise ConfigError("group_size, warm_start_masks and passages must be 2 or more; expected some to compare")
    if config.width % 2 or config.width % config.num_heads:
        raise ConfigError(f"width {config.width} must be even and divisible by num_heads {config.num_heads}")


def _check_shares(config: PolicyTrainingConfig) -> None:
    if (config.instructions or config.held_out_instructions) and not config.query_conditioned:
        raise ConfigError(
            "instructions teach which chunks answer a question, and a policy that is not query_conditioned does not "
            "see the question; expected query_conditioned = true, or no instructions"
        )
    if config.match_dim and not config.query_conditioned:
        raise ConfigError(
            f"match_dim is {config.match_dim}, and a policy that is not query_conditioned has no query to compare "
            f"with; expected query_conditioned = true, or match_dim = 0"
        )
    for name in ("shuffled_share", "query_dropout", "warm_start_share", "instruction_share"):
        if getattr(config, name) > 1.0:
            raise ConfigError(f"setting {name} is {getattr(config, name)}; expected a share, 0 to 1")
    fractions = (*config.expansion_fractions, config.warm_start_fraction, config.evaluation_fraction)
    if not all(0.0 < fraction < 1.0 for fraction in fractions):
        raise ConfigError(
            f"expansion fractions are {fractions}; expected numbers between 0 and 1, which leave a choice"
        )
    if config.clip >= 1.0 or config.warmup >= 1.0:
        raise ConfigError(f"clip is {config.clip} and warmup {config.warmup}; expected both below 1")
