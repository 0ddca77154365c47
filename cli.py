"""The command line: parse → options → one call → print. Results go to stdout, the log to stderr.

Exit codes: 0 done, 1 failed, 2 wrong usage, 3 done but records were quarantined, 4 training stopped before its end
since its time was up (run again to resume), 130 interrupted.
"""

import contextlib
import json
import shlex
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, is_dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import typer

from refrag_core.errors import ConfigError, RefragError, UsageError

if TYPE_CHECKING:
    from refrag.pipelines.build import BuildOptions, BuildReport
    from refrag.pipelines.cluster_plan import ClusterOptions, ClusterPlan
    from refrag.pipelines.engines import OpenEngine
    from refrag.pipelines.progress import Progress
    from refrag_core.bundle import BundleReport
    from refrag_core.conversation import Conversation
    from refrag_core.engine_choice import EngineOptions
    from refrag_core.generations import Generation, GenerationDiff
    from refrag_core.retrieval import RetrievalOptions, Searcher
    from refrag_core.runtime import Answer, AskOptions, Runtime
    from refrag_core.session import SessionFile
    from refrag_core.training.runs import Stage

ASK_POSITIONS = 8192
"""That `ask` has vLLM reserve for its one answer, where the decoder has as many."""

FAILED, WRONG_USAGE, QUARANTINED, STOPPED, INTERRUPTED = 1, 2, 3, 4, 130

app = typer.Typer(
    name="refrag",
    help="REFRAG for real corpora: precompute chunk embeddings offline, answer with an early first token.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
index_app = typer.Typer(help="Build, check and read indexes.", no_args_is_help=True)
eval_app = typer.Typer(help="Measure retrieval, answers, and what compression costs.", no_args_is_help=True)
bundle_app = typer.Typer(help="Ship generations of an index to serving hosts.", no_args_is_help=True)
app.add_typer(index_app, name="index")
train_app = typer.Typer(help="Prepare text and train a checkpoint, stage by stage.", no_args_is_help=True)
app.add_typer(bundle_app, name="bundle")
app.add_typer(eval_app, name="eval")
app.add_typer(train_app, name="train")
checkpoint_app = typer.Typer(help="Make a trained checkpoint ready to be shipped.", no_args_is_help=True)
app.add_typer(checkpoint_app, name="checkpoint")
bench_app = typer.Typer(
    help="Measure speed on this machine: first token, encoding, a whole build.", no_args_is_help=True
)
app.add_typer(bench_app, name="bench")


class EngineName(StrEnum):
    """Engines that drive a build."""

    LOCAL = "local"
    RAY = "ray"
    BEAM = "beam"


class DecoderEngineName(StrEnum):
    """Engines that decode answers."""

    EMBEDDED = "embedded"
    VLLM = "vllm"
    VLLM_SERVER = "vllm-server"


class WeightsDtypeName(StrEnum):
    """Forms that weights are written in."""

    FLOAT32 = "float32"
    BFLOAT16 = "bfloat16"
    FLOAT16 = "float16"


class EmbeddingDtypeName(StrEnum):
    """Forms that an index holds chunk embeddings in."""

    FLOAT16 = "float16"
    INT8 = "int8"


class TablesName(StrEnum):
    """Tables that an index has, or that are read."""

    PARQUET = "parquet"
    LANCE = "lance"


class RetrieverMode(StrEnum):
    """Where the passages of an evaluation's questions come from."""

    STRONG = "strong"
    WEAK = "weak"
    GOLD = "gold"


class PolicyName(StrEnum):
    """Selections of chunks to expand."""

    LEARNED = "learned"
    PERPLEXITY = "perplexity"
    RANDOM = "random"
    ALL = "all"
    NONE = "none"


# --- options that several commands share -------------------------------------------------------------

IndexArgument = Annotated[str, typer.Argument(help="Folder of the index, or its URI: s3://…", show_default=False)]
Output = Annotated[str, typer.Option("--output", "-o", help="Folder of the index, or its URI: s3://…")]
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Corpus = Annotated[
    list[str],
    typer.Argument(
        help="Folders, globs or files: .txt .md .html .jsonl .parquet, .gz and .zst of them.", show_default=False
    ),
]
IdField = Annotated[str, typer.Option(help="Field of a record that holds its id; '' makes ids from the content.")]
TextField = Annotated[str, typer.Option(help="Field of a record that holds its text.")]
MetadataFields = Annotated[
    str | None, typer.Option(help="Fields to keep as metadata, separated by commas; default: every scalar field.")
]
MaxLineBytes = Annotated[int, typer.Option(help="Longest line of a .jsonl file; longer ones are quarantined.")]
MaxDocumentBytes = Annotated[int, typer.Option(help="Longest document; longer ones are quarantined.")]
Checkpoint = Annotated[
    str | None,
    typer.Option(
        help="Folder of a trained checkpoint. Default: the one shipped for the decoder, else an untrained one."
    ),
]
OpenedCheckpoint = Annotated[
    str | None, typer.Option("--checkpoint", help="Folder of a trained checkpoint. Default: the index's own.")
]
Encoder = Annotated[
    str | None, typer.Option(help="Encoder body of an untrained checkpoint, even where one is shipped.")
]
Decoder = Annotated[str | None, typer.Option(help="Decoder: folder, hub id (with @revision) or package.")]
Retriever = Annotated[str | None, typer.Option(help="Retriever: folder, hub id or package. Default: all-minilm-l6-v2.")]
ChunkSize = Annotated[int | None, typer.Option(help="Tokens a chunk (k); default: the checkpoint's.")]
ChunkSizeField = Annotated[
    str | None, typer.Option(help="Field with a document's importance in [0, 1]: important ones get smaller chunks.")
]
MaxPassageTokens = Annotated[int, typer.Option(help="Tokens a passage at most.", min=1)]
EmbeddingDtypeOption = Annotated[
    EmbeddingDtypeName, typer.Option("--embedding-dtype", help="Storage of chunk embeddings; int8 has a scale a row.")
]
BuiltTables = Annotated[
    TablesName | None,
    typer.Option("--tables", help="lance: LanceDB tables beside the Parquet shards. Default: what the index has."),
]
ReadTables = Annotated[TablesName, typer.Option("--tables", help="Which tables passages are read from.")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1 …")]
DeviceMap = Annotated[
    str | None,
    typer.Option("--device-map", help="Spread the decoder over all GPUs: auto, balanced, balanced_low_0, sequential."),
]
EngineOption = Annotated[
    EngineName, typer.Option(help="What drives the work: this machine, a Ray cluster, or a Beam runner.")
]
Workers = Annotated[
    int | None,
    typer.Option(
        help="Processes for CPU work; 0 runs in this process. Default: CPUs - 1; with Ray all, with Beam 0.", min=0
    ),
]
RayAddress = Annotated[
    str | None,
    typer.Option(help="Ray cluster: auto, host:port or ray://host:port; default: $RAY_ADDRESS, else a Ray of its own."),
]
DeviceWorkers = Annotated[
    str | None, typer.Option(help="Ray: workers that encode, as MIN:MAX or a number; default: 1 and what there is.")
]
GpusPerWorker = Annotated[
    float | None, typer.Option(help="Ray: GPUs of a worker that encodes, 0.5 say; default: 1 where there are any.")
]
ShardTimeout = Annotated[
    float | None,
    typer.Option(
        help="Seconds after which work on a shard is ended and run again. Default: 3600 with Ray; none on this "
        "machine, where it bounds tokenizing.",
        min=1,
    ),
]
WaitForNodes = Annotated[
    float, typer.Option(help="Ray: seconds to wait at the start for nodes that an autoscaler is asked for.", min=0)
]
Work = Annotated[
    str | None,
    typer.Option(
        help="Folder or URI for a run's intermediate files, which all workers reach; removed at the end. Default: "
        "with the index."
    ),
]
PlannedWorkers = Annotated[
    int | None,
    typer.Option(
        help="Local: tokenizing processes. Ray and Beam: machines, with one GPU each where --gpu names one.", min=0
    ),
]
Gpu = Annotated[
    str | None, typer.Option(help="The workers' cards, h100: rates measured on one. Default: this machine's own rates.")
]
CoresAWorker = Annotated[
    int | None, typer.Option("--cores", help="CPU cores of a machine of the cluster. Default: 16.", min=1)
]
BeamOptions = Annotated[
    list[str] | None,
    typer.Option(
        "--beam-option",
        help="With --engine beam: one of Beam's PipelineOptions, as in --beam-option=--runner=FlinkRunner; repeatable.",
    ),
]
Score = Annotated[bool, typer.Option("--score", help="Add per-chunk perplexity, which the perplexity policy needs.")]
MinRecall = Annotated[
    float, typer.Option(help="Recall@10 of the vector index under which nothing is published.", min=0, max=1)
]
IndexMemoryBytes = Annotated[
    int | None, typer.Option(help="Memory for the vector index on a host; above it vectors become 8-bit codes.", min=1)
]
ShardBytes = Annotated[int | None, typer.Option(help="Text bytes a shard; default: by the size of the corpus.", min=1)]
Rebuild = Annotated[bool, typer.Option("--rebuild", help="Encode all anew where models or settings have changed.")]
DeleteMissing = Annotated[
    bool, typer.Option("--delete-missing", help="Remove documents that the corpus no longer has.")
]
DedupPassages = Annotated[
    bool | None,
    typer.Option(
        "--dedup-passages/--no-dedup-passages",
        help="Let a search return equal passages once. Default: as the index has it.",
    ),
]
RetryQuarantined = Annotated[
    bool, typer.Option("--retry-quarantined", help="Try documents again that a stage has quarantined before.")
]
TopK = Annotated[int, typer.Option("--top-k", help="Passages to retrieve.", min=1)]
Where = Annotated[
    str | None,
    typer.Option(
        help="Only documents whose metadata fulfil this, like \"lang = 'en' and year > 2020\".", metavar="SQL"
    ),
]
Hybrid = Annotated[bool, typer.Option("--hybrid", help="Rank by words (BM25) too and fuse the two rankings.")]
DenseWeight = Annotated[float, typer.Option(help="With --hybrid: weight of the ranks by vectors.", min=0)]
LexicalWeight = Annotated[float, typer.Option(help="With --hybrid: weight of the ranks by words.", min=0)]
ExpansionFraction = Annotated[
    float | None,
    typer.Option(help="Share of chunks given as full tokens (p). Default: .1; all where untrained.", min=0, max=1),
]
Policy = Annotated[PolicyName | None, typer.Option(help="Who chooses the chunks to expand. Default: learned.")]
AllowUntrained = Annotated[
    bool, typer.Option("--allow-untrained", help="Compress with an untrained projection all the same (noise).")
]
MaxNewTokens = Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)]
Temperature = Annotated[float, typer.Option(help="0 is greedy.", min=0)]
TopP = Annotated[float, typer.Option(help="Nucleus of the sampling.", min=0, max=1)]
Seed = Annotated[int, typer.Option(help="Of sampling and of the random policy.")]
DecoderEngine = Annotated[
    DecoderEngineName,
    typer.Option("--engine", help="What decodes: this program, vLLM in it (extra vllm), or a running vLLM server."),
]
VllmUrl = Annotated[
    str | None,
    typer.Option(
        help="With --engine vllm-server: its address, like http://127.0.0.1:8000. Its key is read from $VLLM_API_KEY.",
        show_default=False,
    ),
]
VllmModel = Annotated[
    str | None,
    typer.Option(
        help="With --engine vllm-server: its name for the decoder. Default: its only one, or with an adapter the name "
        "that `bundle decoder` tells.",
        show_default=False,
    ),
]
VllmOption = Annotated[
    list[str] | None,
    typer.Option(
        "--vllm-option",
        help="With --engine vllm: an engine argument of vLLM, as in gpu_memory_utilization=0.5; repeatable.",
        metavar="NAME=VALUE",
    ),
]
Strict = Annotated[bool, typer.Option("--strict", help="Fail instead of dropping what does not fit.")]
HistoryPositions = Annotated[
    int,
    typer.Option(
        help="Decoder positions for earlier turns: newest ones raw, older ones compressed, the oldest dropped.", min=0
    ),
]
TurnWeight = Annotated[
    float, typer.Option(help="Share of the turn before in what is searched for; 0: the question alone.", min=0)
]
Reuse = Annotated[
    bool, typer.Option("--reuse/--no-reuse", help="Read only what is new of a prompt, as far as it begins alike.")
]
Questions = Annotated[
    Path,
    typer.Option(help='JSON lines: {"id", "question", "answers": […], "gold": [document ids]}.', show_default=False),
]


def _folder(text: str) -> Path:
    if "://" in text:
        raise UsageError(
            f"{text} is a URI, expected a folder of this machine: bring a bundle there with `refrag bundle push`, and "
            "here with `refrag bundle pull`"
        )
    return Path(text)


BundleArgument = Annotated[
    Path, typer.Argument(help="Folder of the bundle.", show_default=False, parser=_folder, metavar="FOLDER")
]
BundleVersion = Annotated[int | None, typer.Option("--version", help="Generation; default: the newest.", min=1)]
VerifyKey = Annotated[
    list[Path] | None,
    typer.Option("--verify-key", help="Public key that must have signed the bundle. May be repeated: one of them."),
]
Jobs = Annotated[int, typer.Option(help="Files that are read or sent side by side.", min=1)]


# --- output -------------------------------------------------------------------------------------------


def _plain(value: Any) -> Any:
    return asdict(value) if is_dataclass(value) and not isinstance(value, type) else value


def _print_json(value: Any) -> None:
    print(json.dumps(_plain(value), ensure_ascii=False, indent=2, default=_plain))


def _print_rows(rows: Iterable[tuple[str, object]]) -> None:
    entries = [(name, f"{value:,}" if isinstance(value, int) else str(value)) for name, value in rows]
    width = max(len(name) for name, _ in entries)
    for name, value in entries:
        print(f"{name:<{width}}  {value}")


def _warn(message: str) -> None:
    print(message, file=sys.stderr)


def _bytes(count: int) -> str:
    size, unit = float(count), "B"
    for unit in ("B", "KiB", "MiB", "GiB", "TiB"):
        if size < 1024 or unit == "TiB":
            break
        size /= 1024
    return f"{size:.0f} {unit}" if unit == "B" else f"{size:.1f} {unit}"


def _progress() -> "Progress":
    from refrag.pipelines.terminal import progress_for, stderr_console

    return progress_for(stderr_console())


def _build_options(
    *,
    corpus: list[str],
    output: str,
    id_field: str,
    text_field: str,
    metadata_fields: str | None,
    max_line_bytes: int,
    max_document_bytes: int,
    checkpoint: str | None,
    encoder: str | None,
    decoder: str | None,
    retriever: str | None,
    chunk_size: int | None,
    chunk_size_field: str | None,
    max_passage_tokens: int,
    embedding_dtype: EmbeddingDtypeName,
    device: str,
    **rest: Any,
) -> "BuildOptions":
    from refrag.pipelines.build import BuildOptions
    from refrag.pipelines.components import ModelOptions
    from refrag_core.corpus.sources import CorpusOptions
    from refrag_core.models import DEFAULT_RETRIEVER
    from refrag_core.storage import absolute

    return BuildOptions(
        corpus=CorpusOptions(
            roots=tuple(corpus),
            id_field=id_field,
            text_field=text_field,
            metadata_fields=None if metadata_fields is None else tuple(filter(None, metadata_fields.split(","))),
            chunk_size_field=chunk_size_field,
            excluded_folder=absolute(output),
            max_line_bytes=max_line_bytes,
            max_document_bytes=max_document_bytes,
        ),
        output=output,
        models=ModelOptions(
            checkpoint=checkpoint,
            encoder=encoder,
            decoder=decoder,
            chunk_size=chunk_size,
            chunk_size_field=chunk_size_field,
            max_passage_tokens=max_passage_tokens,
            embedding_dtype=embedding_dtype.value,
            device=device,
            retriever=DEFAULT_RETRIEVER if retriever is None else retriever,
        ),
        **rest,
    )


def _engine(
    name: EngineName,
    workers: int | None,
    *,
    progress: "Progress | None" = None,
    output: str | None = None,
    locations: Sequence[str] = (),
    device: str = "auto",
    ray_address: str | None = None,
    device_workers: str | None = None,
    gpus_per_worker: float | None = None,
    shard_timeout: float | None = None,
    wait_for_nodes: float = 0,
    beam_options: Sequence[str] | None = None,
) -> "OpenEngine":
    """The engine of a command, to be used as a context manager. Raises MissingExtraError, ConfigError.

    Args:
        output: the index that is written.
        locations: what is read, as it was given.
    """
    if beam_options and name is not EngineName.BEAM:
        raise UsageError(f"--beam-option was given with --engine {name}; expected --engine beam, or no such option")
    if name is EngineName.RAY:
        from refrag.pipelines.engines.ray import RayEngine, RayOptions

        options = RayOptions(
            address=ray_address,
            workers=workers,
            device_workers=None if device_workers is None else _range("--device-workers", device_workers),
            gpus_per_worker=gpus_per_worker,
            device=device,
            shard_timeout=3600.0 if shard_timeout is None else shard_timeout,
            wait_for_nodes=wait_for_nodes,
            locations=locations,
            output=output,
        )
        return RayEngine(options, progress)
    given = {
        "--ray-address": ray_address,
        "--device-workers": device_workers,
        "--gpus-per-worker": gpus_per_worker,
        "--shard-timeout": shard_timeout if name is EngineName.BEAM else None,
        "--wait-for-nodes": wait_for_nodes or None,
    }
    if foreign := [option for option, value in given.items() if value is not None]:
        raise ConfigError(f"{', '.join(foreign)} was given with --engine {name}; expected it with --engine ray")
    if name is EngineName.BEAM:
        from refrag.pipelines.engines.beam import BeamEngine

        return BeamEngine(beam_options or (), exchange=output or "", workers=workers)
    from refrag.pipelines.engines.local import LocalEngine

    return LocalEngine(workers, shard_timeout)


def _range(option: str, text: str) -> tuple[int, int]:
    """`MIN:MAX`, or one number for both. Raises ConfigError."""
    low, _, high = text.partition(":")
    if not low.isdecimal() or (":" in text and not high.isdecimal()) or not 1 <= int(low) <= int(high or low):
        raise ConfigError(f"{option} is {text!r}; expected MIN:MAX with 1 ≤ MIN ≤ MAX, or one number")
    return int(low), int(high or low)


def _driver_device(engine: EngineName, device: str) -> str:
    """The device of the process that drives a build: Ray gives each worker its own, maybe on another machine."""
    return "auto" if engine is EngineName.RAY and device != "cpu" else device


# --- refrag index -------------------------------------------------------------------------------------


@index_app.command("build")
def index_build(
    corpus: Corpus,
    output: Output = "refrag-index",
    engine: EngineOption = EngineName.LOCAL,
    beam_option: BeamOptions = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    decoder: Decoder = None,
    retriever: Retriever = None,
    chunk_size: ChunkSize = None,
    chunk_size_field: ChunkSizeField = None,
    max_passage_tokens: MaxPassageTokens = 256,
    embedding_dtype: EmbeddingDtypeOption = EmbeddingDtypeName.FLOAT16,
    id_field: IdField = "id",
    text_field: TextField = "text",
    metadata_fields: MetadataFields = None,
    max_line_bytes: MaxLineBytes = 64 << 20,
    max_document_bytes: MaxDocumentBytes = 64 << 20,
    device: Device = "auto",
    workers: Workers = None,
    ray_address: RayAddress = None,
    device_workers: DeviceWorkers = None,
    gpus_per_worker: GpusPerWorker = None,
    shard_timeout: ShardTimeout = None,
    wait_for_nodes: WaitForNodes = 0,
    score: Score = False,
    tables: BuiltTables = None,
    min_recall: MinRecall = 0.95,
    index_memory_bytes: IndexMemoryBytes = None,
    shard_bytes: ShardBytes = None,
    rebuild: Rebuild = False,
    delete_missing: DeleteMissing = False,
    dedup_passages: DedupPassages = None,
    retry_quarantined: RetryQuarantined = False,
    work: Work = None,
    as_json: JsonFlag = False,
) -> None:
    """Build the index of a corpus, or bring it up to date; run again to go on after an interruption."""
    from refrag.pipelines.build import build_index

    options = _build_options(
        corpus=corpus,
        output=output,
        id_field=id_field,
        text_field=text_field,
        metadata_fields=metadata_fields,
        max_line_bytes=max_line_bytes,
        max_document_bytes=max_document_bytes,
        checkpoint=checkpoint,
        encoder=encoder,
        decoder=decoder,
        retriever=retriever,
        chunk_size=chunk_size,
        chunk_size_field=chunk_size_field,
        max_passage_tokens=max_passage_tokens,
        embedding_dtype=embedding_dtype,
        device=_driver_device(engine, device),
        score=score,
        tables=tables and tables.value,
        min_recall=min_recall,
        index_memory_bytes=index_memory_bytes,
        shard_bytes=shard_bytes,
        rebuild=rebuild,
        delete_missing=delete_missing,
        dedup_passages=dedup_passages,
        retry_quarantined=retry_quarantined,
        work=work,
    )
    progress = _progress()
    with _engine(
        engine,
        workers,
        progress=progress,
        output=output,
        locations=[*corpus, *([work] if work else [])],
        device=device,
        ray_address=ray_address,
        device_workers=device_workers,
        gpus_per_worker=gpus_per_worker,
        shard_timeout=shard_timeout,
        wait_for_nodes=wait_for_nodes,
        beam_options=beam_option,
    ) as running:
        report = build_index(options, running, progress)
    if as_json:
        _print_json(report)
    else:
        _print_build(report, output)
    if report.quarantined:
        _warn(f"{report.quarantined} records were quarantined; see `refrag index inspect {output} --quarantine`")
        raise typer.Exit(QUARANTINED)


def _print_build(report: "BuildReport", output: str) -> None:
    state = "committed" if report.committed else "already up to date"
    changes = (
        f"{report.new:,} new, {report.changed:,} changed, {report.unchanged:,} unchanged, {report.deleted:,} deleted"
    )
    _print_rows(
        [
            ("index", f"{output} version {report.version}, {state}"),
            ("documents in", report.documents_in),
            ("indexed", f"{report.indexed:,} ({changes})"),
            ("filtered", report.filtered),
            ("quarantined", report.quarantined),
            ("passages", report.passages),
            ("chunks", f"{report.chunks:,} ({report.encoded_chunks:,} encoded in this run)"),
            ("tokens", report.tokens),
            ("checkpoint", "trained" if report.trained else "untrained: answers read every chunk as text"),
            ("recall@10", f"{report.recall_at_10:.3f} of the vector index against exact search"),
            ("content id", report.content_id),
            ("build id", report.build_id),
            ("seconds", f"{report.seconds:,.1f} ({', '.join(f'{k} {v:,.1f}' for k, v in report.steps.items())})"),
        ]
    )
    for reason, count in report.reasons.items():
        print(f"  {reason}: {count:,}")
    if report.ignored:
        print(f"left out files of unknown formats: {', '.join(f'{v:,} {k}' for k, v in report.ignored.items())}")
    if report.missing:
        print(f"{report.missing:,} documents are no longer in the corpus and were kept; --delete-missing removes them")
    if report.duplicate_passages:
        print(f"{report.duplicate_passages:,} passages equal an earlier one and stay out of search")
    if report.truncated_passages:
        print(f"{report.truncated_passages:,} passages are longer than the retriever reads; it saw their beginning")


@index_app.command("plan")
def index_plan(
    corpus: Corpus,
    output: Output = "refrag-index",
    engine: Annotated[EngineName, typer.Option(help="What is to drive the build.")] = EngineName.LOCAL,
    gpu: Gpu = None,
    cores: CoresAWorker = None,
    checkpoint: Checkpoint = None,
    encoder: Encoder = None,
    decoder: Decoder = None,
    retriever: Retriever = None,
    chunk_size: ChunkSize = None,
    chunk_size_field: ChunkSizeField = None,
    max_passage_tokens: MaxPassageTokens = 256,
    embedding_dtype: EmbeddingDtypeOption = EmbeddingDtypeName.FLOAT16,
    id_field: IdField = "id",
    text_field: TextField = "text",
    metadata_fields: MetadataFields = None,
    max_line_bytes: MaxLineBytes = 64 << 20,
    max_document_bytes: MaxDocumentBytes = 64 << 20,
    device: Device = "auto",
    workers: PlannedWorkers = None,
    score: Score = False,
    tables: BuiltTables = None,
    shard_bytes: ShardBytes = None,
    delete_missing: DeleteMissing = False,
    retry_quarantined: RetryQuarantined = False,
    as_json: JsonFlag = False,
) -> None:
    """Dry run: what a build would do, make and take, from a scan and a short calibration. Writes nothing."""
    from refrag.pipelines.engines.local import default_workers
    from refrag.pipelines.estimate import estimate_build

    cluster = _cluster(engine, workers, gpu, cores)
    processes = default_workers() if workers is None or cluster is not None else workers
    options = _build_options(
        corpus=corpus,
        output=output,
        id_field=id_field,
        text_field=text_field,
        metadata_fields=metadata_fields,
        max_line_bytes=max_line_bytes,
        max_document_bytes=max_document_bytes,
        checkpoint=checkpoint,
        encoder=encoder,
        decoder=decoder,
        retriever=retriever,
        chunk_size=chunk_size,
        chunk_size_field=chunk_size_field,
        max_passage_tokens=max_passage_tokens,
        embedding_dtype=embedding_dtype,
        device=device,
        score=score,
        tables=tables and tables.value,
        shard_bytes=shard_bytes,
        delete_missing=delete_missing,
        retry_quarantined=retry_quarantined,
    )
    with _engine(EngineName.LOCAL, processes) as running:
        report = estimate_build(options, running, workers=processes, cluster=cluster)
    if as_json:
        _print_json(report)
        return
    changes = (
        f"{report.new:,} new, {report.changed:,} changed, {report.unchanged:,} unchanged, {report.deleted:,} deleted"
    )
    _print_rows(
        [
            ("documents in", f"{report.documents_in:,} ({changes})"),
            ("rejected", sum(report.rejected.values())),
            ("shards", report.shards),
            ("text", _bytes(report.text_bytes)),
            ("tokens", f"~{report.tokens:,}"),
            ("passages", f"~{report.passages:,}"),
            ("chunks", f"~{report.chunks:,}"),
            ("disk", f"~{_bytes(report.disk_bytes)}"),
            ("time", f"~{report.total_seconds:,.0f} s on {report.device}"),
            *((f"  {stage}", f"~{seconds:,.1f} s") for stage, seconds in report.seconds.items()),
        ]
    )
    if report.missing:
        print(f"{report.missing:,} documents are no longer in the corpus and stay; --delete-missing removes them")
    print(f"Estimated from a sample of {report.sample_documents:,} documents.")
    for difference in report.differences:
        print(f"needs --rebuild: {difference}")
    if report.cluster is not None:
        _print_cluster(report.cluster)


def _cluster(engine: EngineName, workers: int | None, gpu: str | None, cores: int | None) -> "ClusterOptions | None":
    from refrag.pipelines.cluster_plan import ClusterOptions

    if engine is EngineName.LOCAL:
        for option, value in (("--gpu", gpu), ("--cores", cores)):
            if value is not None:
                raise UsageError(
                    f"{option} was given for the local engine, expected --engine ray or beam: leave one of them out"
                )
        return None
    if not workers:
        raise UsageError(
            f"--engine {engine} was planned without machines, expected how many: say --workers N, and --gpu h100 where "
            "they have cards"
        )
    return ClusterOptions(engine=engine.value, workers=workers, gpu=gpu, cores=cores or 16)


def _print_cluster(plan: "ClusterPlan") -> None:
    print()
    cards = f" with one {plan.gpu} each" if plan.gpu else ""
    _print_rows(
        [
            ("cluster", f"{plan.engine}, {plan.workers:,} machines{cards}"),
            ("time", f"~{_hours(plan.hours)}, most of it by {plan.bottleneck}"),
            *((f"  {phase}", f"~{_hours(hours)}") for phase, hours in plan.phases.items()),
            ("left out", "; ".join(plan.left_out)),
            ("CPU", f"~{plan.cpu_hours:,.2f} core hours of work"),
            ("GPU", f"~{plan.gpu_hours:,.2f} card hours"),
            ("storage", f"~{plan.storage_gb:,.3f} GB, and ~{plan.work_gb:,.3f} GB while it is built"),
            ("requests", ", ".join(f"~{count:,} {verb}" for verb, count in plan.requests.items())),
        ]
    )
    print("Estimated from these rates; prices are yours to multiply:")
    for name, rate in plan.rates.items():
        print(f"  {name}: {rate.value:,.0f} {rate.unit} ({rate.source})")


def _hours(hours: float) -> str:
    if hours >= 1:
        return f"{hours:,.1f} h"
    return f"{hours * 60:,.1f} min" if hours >= 1 / 60 else f"{hours * 3600:,.1f} s"


@index_app.command("verify")
def index_verify(index: IndexArgument, as_json: JsonFlag = False) -> None:
    """Check every file of an index against its digest, and the tables against each other."""
    from refrag_core.storage import open_store
    from refrag_core.verification import verify_index

    result = verify_index(open_store(index))
    if as_json:
        _print_json(result)
    else:
        for problem in result.problems:
            print(f"{problem.file}: {problem.found}")
        for name in result.unlisted:
            print(f"{name}: not part of any generation (left by an interrupted build or a rollback; harmless)")
        state = f"{len(result.problems)} problems" if result.problems else "all good"
        print(f"{result.files:,} files, {_bytes(result.bytes)}: {state}")
    if result.problems:
        _warn(f"mend it with `refrag index repair {index} CORPUS`")
        raise typer.Exit(FAILED)


@index_app.command("repair")
def index_repair(
    index: IndexArgument,
    corpus: Annotated[
        list[str] | None, typer.Argument(help="The corpus; needed when documents, passages or chunks are damaged.")
    ] = None,
    checkpoint: OpenedCheckpoint = None,
    id_field: IdField = "id",
    text_field: TextField = "text",
    metadata_fields: MetadataFields = None,
    device: Device = "auto",
    engine: EngineOption = EngineName.LOCAL,
    beam_option: BeamOptions = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Make the files again that `verify` condemns, by running their shards' stages again."""
    from refrag.pipelines.repair import RepairOptions, repair_index
    from refrag_core.corpus.sources import CorpusOptions
    from refrag_core.storage import absolute

    fields = None if metadata_fields is None else tuple(filter(None, metadata_fields.split(",")))
    source = None
    if corpus:
        source = CorpusOptions(tuple(corpus), id_field, text_field, fields, excluded_folder=absolute(index))
    options = RepairOptions(index=index, corpus=source, checkpoint=checkpoint, device=_driver_device(engine, device))
    progress, read = _progress(), [*(corpus or []), *([checkpoint] if checkpoint else [])]
    with _engine(
        engine,
        workers,
        progress=progress,
        output=index,
        locations=read,
        device=device,
        ray_address=ray_address,
        beam_options=beam_option,
    ) as running:
        report = repair_index(options, running, progress)
    if as_json:
        _print_json(report)
        return
    for name in report.repaired:
        print(f"repaired {name}")
    for name in report.lost:
        print(f"lost {name}: only older generations need it; they can no longer be rolled back to")
    if report.lost:
        print(f"`refrag index gc {index} --keep N` lets those generations go; until then `verify` misses these files")
    print(f"{len(report.repaired)} files repaired, version {report.version}, build id {report.build_id}")


@index_app.command("inspect")
def index_inspect(
    index: IndexArgument,
    passage: Annotated[
        str | None, typer.Option(help="Show one passage with its chunks: its id, or DOCUMENT#ORDINAL.")
    ] = None,
    quarantine: Annotated[
        bool, typer.Option("--quarantine", help="List the records that are not in the index.")
    ] = False,
    version: Annotated[int | None, typer.Option(help="Generation; default: the newest.")] = None,
    html: Annotated[
        Path | None, typer.Option(help="Write all of it, with drawings, as one page for a browser into this file.")
    ] = None,
    retriever: Retriever = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Show what an index holds, one passage with its chunks, the quarantine, or a page for a browser."""
    from refrag_core import inspection

    if html is not None:
        from refrag_core.devices import resolve_device
        from refrag_core.index_report import write_report

        write_report(index, html, version, retriever=retriever, device=resolve_device(device))
        _print_json({"html": str(html)}) if as_json else print(f"wrote {html}")
        return
    if passage is not None:
        shown = inspection.inspect_passage(index, passage, version)
        _print_json(shown) if as_json else _print_passage(shown)
        return
    if quarantine:
        records = inspection.inspect_quarantine(index, version)
        if as_json:
            _print_json(records)
        for record in () if as_json else records:
            name = record["document_id"] or f"{record['source']}:{record['position']}"
            print(f"{record['disposition']}: {record['reason']}: {name}: {record['detail']}")
        return
    summary = inspection.inspect_index(index, version)
    if as_json:
        _print_json(summary)
        return
    for title, rows in summary.items():
        print(title)
        for name, value in rows.items() if isinstance(rows, dict) else ():
            print(f"  {name:<20} {f'{value:,}' if isinstance(value, int) and not isinstance(value, bool) else value}")


def _print_passage(shown: dict[str, Any]) -> None:
    _print_rows((name, value) for name, value in shown.items() if name != "chunks")
    for chunk in shown["chunks"]:
        score = f" nll {chunk['nll']:.2f}" if chunk["nll"] is not None else ""
        print(f"  chunk {chunk['ordinal']:>3} {chunk['num_tokens']:>3} tokens{score}  {chunk['text']!r}")


@index_app.command("search")
def index_search(
    index: IndexArgument,
    query: Annotated[str, typer.Argument(help="What to look for.", show_default=False)],
    top_k: TopK = 5,
    where: Where = None,
    hybrid: Hybrid = False,
    dense_weight: DenseWeight = 1.0,
    lexical_weight: LexicalWeight = 1.0,
    retriever: Retriever = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Retrieve passages; no decoder is loaded."""
    from refrag_core.retrieval import open_searcher

    options = _retrieval(where, hybrid, dense_weight, lexical_weight)
    searcher = open_searcher(index, retriever=retriever, device=device)
    _build_lexical(searcher, options)
    hits = searcher.search(query, top_k, options)
    passing = None if where is None else searcher.reader.passing(where).rows
    if as_json:
        _print_json({"query": query, "passing": passing, "hits": [asdict(hit) for hit in hits]})
        return
    _print_passing(where, passing, searcher.reader.manifest.counts.passages)
    for hit in hits:
        print(f"{hit.rank}. {hit.score:.3f}  {hit.doc_id}\n   {_one_line(hit.text, 200)}")


def _retrieval(where: str | None, hybrid: bool, dense_weight: float, lexical_weight: float) -> "RetrievalOptions":
    from refrag_core.predicate import parse_predicate
    from refrag_core.retrieval import RetrievalOptions

    if where is not None:
        parse_predicate(where)  # what no index could answer is refused before models are loaded
    return RetrievalOptions(where=where, hybrid=hybrid, dense_weight=dense_weight, lexical_weight=lexical_weight)


def _build_lexical(searcher: "Searcher", options: "RetrievalOptions") -> None:
    """Build the ranking by words now, and say so, so that it is not charged to the question."""
    if options.hybrid and options.lexical_weight:
        started = time.perf_counter()
        _ = searcher.lexical
        passages, seconds = searcher.reader.manifest.counts.passages, time.perf_counter() - started
        _warn(f"ranking by words: {passages:,} passages indexed in memory in {seconds:,.1f} s")


def _print_passing(where: str | None, passing: int | None, passages: int) -> None:
    if where is not None:
        print(f"{passing:,} of {passages:,} passages are of documents with {where}")


# --- refrag index log, diff, rollback, gc, compact ------------------------------------------------------


@index_app.command("log")
def index_log(
    index: IndexArgument,
    limit: Annotated[int | None, typer.Option(help="Generations, from the newest. Default: all.", min=1)] = None,
    as_json: JsonFlag = False,
) -> None:
    """List the generations of an index: what each holds, what it changed, and what it added on disk."""
    from itertools import islice

    from refrag_core.generations import generation_log
    from refrag_core.storage import open_store

    entries = islice(generation_log(open_store(index)), limit)
    if as_json:
        _print_json(list(entries))
        return
    for entry in entries:
        _print_generation(entry)


def _print_generation(entry: "Generation") -> None:
    parent = "no parent" if entry.parent is None else f"parent {entry.parent}"
    print(f"version {entry.version} ({entry.state}, {entry.committed or 'committed at a time unknown'}, {parent})")
    counts = entry.counts
    hidden = f"; {entry.tombstoned_documents:,} documents tombstoned" if entry.tombstoned_documents else ""
    models = f"; other {', '.join(entry.models_changed)}" if entry.models_changed else ""
    rows = [
        ("change", f"{_change(entry)}{models}"),
        ("holds", f"{counts.documents:,} documents, {counts.passages:,} passages, {counts.chunks:,} chunks{hidden}"),
        ("files", f"{entry.shards:,} shards, {entry.segments:,} segments, {_bytes(entry.bytes)}"),
        ("added", f"{entry.new_files:,} files, {_bytes(entry.new_bytes)}"),
        ("content id", entry.content_id),
        ("build id", entry.build_id),
    ]
    _print_rows((f"  {name}", value) for name, value in rows)


def _change(entry: "Generation") -> str:
    change = entry.change
    if change is None:
        return "not recorded"
    if change.action == "rollback":
        return f"rollback to version {change.version}"
    if change.action != "build":
        return change.action
    return f"build: {change.new:,} new, {change.changed:,} changed, {change.deleted:,} deleted"


@index_app.command("diff")
def index_diff(
    index: IndexArgument,
    old: Annotated[int, typer.Argument(help="Version to compare from.", show_default=False)],
    new: Annotated[int, typer.Argument(help="Version to compare with.", show_default=False)],
    ids: Annotated[bool, typer.Option("--ids", help="List the documents that differ.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Compare the documents of two generations: how many were added, removed and changed, and which."""
    from refrag_core.generations import diff_generations
    from refrag_core.storage import open_store

    listing = _IdListing(as_json) if ids else None
    report = diff_generations(open_store(index), old, new, listing.add if listing else None)
    if listing:
        listing.close(report)
    elif as_json:
        _print_json(report)
    else:
        _print_diff(report)


class _IdListing:
    """Prints ids as they come: lines, or the members of one JSON object, so that no list of them is ever held."""

    _MARKS: ClassVar = {"added": "+", "removed": "-", "changed": "~"}

    def __init__(self, as_json: bool) -> None:
        self._as_json = as_json
        self._count = 0

    def add(self, change: str, document_id: str) -> None:
        """Print one document."""
        if not self._as_json:
            print(f"{self._MARKS[change]} {document_id}")
        else:
            entry = json.dumps({"change": change, "document_id": document_id}, ensure_ascii=False)
            print(("," if self._count else '{"documents": [') + f"\n  {entry}", end="")
        self._count += 1

    def close(self, report: "GenerationDiff") -> None:
        """Print the counts behind them."""
        if not self._as_json:
            _print_diff(report)
            return
        rest = json.dumps(asdict(report), ensure_ascii=False)
        print(("" if self._count else '{"documents": [') + f"\n], {rest[1:]}")


def _print_diff(report: "GenerationDiff") -> None:
    old, new = report.counts_old, report.counts_new
    changes = (
        f"{report.documents_added:,} added, {report.documents_removed:,} removed, "
        f"{report.documents_changed:,} changed, {report.documents_unchanged:,} unchanged"
    )
    _print_rows(
        [
            ("versions", f"{report.old} → {report.new}"),
            ("documents", changes),
            ("passages", f"{old.passages:,} → {new.passages:,}"),
            ("chunks", f"{old.chunks:,} → {new.chunks:,}"),
            ("models", ", ".join(report.models_changed) or "the same"),
            ("new files", f"{report.new_files:,}, {_bytes(report.new_bytes)}"),
        ]
    )


@index_app.command("rollback")
def index_rollback(
    index: IndexArgument,
    version: Annotated[
        int | None, typer.Argument(help="Generation to go back to; default: the one before the newest content.", min=1)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Go back to an older generation: a new version with its content. Encodes nothing, removes nothing."""
    from refrag_core.generations import roll_back
    from refrag_core.storage import open_store

    report = roll_back(open_store(index), version)
    if as_json:
        _print_json(report)
        return
    state = "committed" if report.committed else "already so"
    _print_rows(
        [
            ("index", f"{index} version {report.version}, with the content of version {report.content_of}: {state}"),
            ("documents", report.counts.documents),
            ("passages", report.counts.passages),
            ("content id", report.content_id),
            ("build id", report.build_id),
        ]
    )


@index_app.command("gc")
def index_gc(
    index: IndexArgument,
    keep: Annotated[int, typer.Option("--keep", help="Newest generations to keep.", min=1, show_default=False)],
    grace_hours: Annotated[
        float, typer.Option(help="Spare what was in use, or written, within so many hours.", min=0)
    ] = 24.0,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Say what would go, and remove nothing.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """Remove old generations and the files that none of the kept ones names; what a reader has open stays."""
    from refrag_core.generations import collect_garbage
    from refrag_core.storage import open_store

    progress = _progress()
    progress.start("gc", None, "files")
    report = collect_garbage(
        open_store(index),
        keep=keep,
        grace_seconds=3600 * grace_hours,
        dry_run=dry_run,
        on_file=lambda _: progress.advance(1),
    )
    progress.finish()
    if as_json:
        _print_json(report)
        return
    done = "would be removed" if dry_run else "removed"
    _print_rows(
        [
            ("generations", f"{len(report.removed):,} {done}{_versions(report.removed)}"),
            ("kept", f"{len(report.kept):,}{_versions(report.kept)}"),
            ("files", f"{report.files:,} {done}, {_bytes(report.bytes)}"),
        ]
    )
    for version, reason in report.spared.items():
        print(f"  version {version} stays: it {reason}")
    if report.young_files:
        print(f"  {report.young_files:,} files of no generation stay: they were written within the grace period")


@index_app.command("compact")
def index_compact(
    index: IndexArgument,
    shard_bytes: ShardBytes = None,
    min_dead_fraction: Annotated[
        float, typer.Option(help="Share of tombstoned documents from which a shard is written anew.", min=0, max=1)
    ] = 0.0,
    engine: EngineOption = EngineName.LOCAL,
    beam_option: BeamOptions = None,
    workers: Workers = None,
    ray_address: RayAddress = None,
    as_json: JsonFlag = False,
) -> None:
    """Merge small shards and segments and drop tombstoned rows. Encodes nothing; the content stays the same."""
    from refrag.pipelines.compact import CompactOptions, compact_index

    options = CompactOptions(index=index, shard_bytes=shard_bytes, min_dead_fraction=min_dead_fraction)
    progress = _progress()
    with _engine(
        engine, workers, progress=progress, output=index, ray_address=ray_address, beam_options=beam_option
    ) as running:
        report = compact_index(options, running, progress)
    if as_json:
        _print_json(report)
        return
    state = "committed" if report.committed else "nothing to compact"
    _print_rows(
        [
            ("index", f"{index} version {report.version}, {state}"),
            ("shards", f"{report.shards_before:,} → {report.shards_after:,}"),
            ("segments", f"{report.segments_before:,} → {report.segments_after:,}"),
            ("dropped", f"{report.dropped_documents:,} documents, {report.dropped_passages:,} passages"),
            ("copied", f"{report.copied_chunks:,} chunks (none encoded)"),
            ("size", f"{_bytes(report.bytes_before)} → {_bytes(report.bytes_after)}, {_bytes(report.new_bytes)} new"),
            ("content id", report.content_id),
            ("build id", report.build_id),
            ("seconds", f"{report.seconds:,.1f}"),
        ]
    )


def _versions(versions: Sequence[int]) -> str:
    shown = ", ".join(map(str, versions[:20])) + (" …" if len(versions) > 20 else "")
    return f": {shown}" if versions else ""


def _one_line(text: str, width: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= width else line[: width - 1] + "…"


# --- refrag bundle ------------------------------------------------------------------------------------


class _Bytes:
    """Progress of a step in mebibytes, told in bytes by several threads."""

    def __init__(self, step: str) -> None:
        self._progress, self._step, self._lock = _progress(), step, threading.Lock()
        self._left, self._begun = 0, False

    def __enter__(self) -> "_Bytes":
        return self

    def __exit__(self, *_: object) -> None:
        if self._begun:
            self._progress.finish()

    def expect(self, total: int) -> None:
        """Begin the step."""
        self._begun = True
        self._progress.start(self._step, total >> 20, "MiB")

    def advance(self, amount: int) -> None:
        """Count what is done, the rest of a mebibyte at the next call."""
        with self._lock:
            self._left += amount
            self._progress.advance(self._left >> 20)
            self._left %= 1 << 20


def _print_bundle(report: "BundleReport", place: object, done: str) -> None:
    signed = "signed" if report.signed else "not signed"
    _print_rows(
        [
            ("bundle", f"{place} version {report.version}, {signed}"),
            (done, f"{report.moved_files:,} files, {_bytes(report.moved_bytes)}"),
            ("spared", f"{report.spared_files:,} files, {_bytes(report.spared_bytes)}, there already"),
            ("whole", f"{report.files:,} files, {_bytes(report.bytes)}"),
            ("content id", report.content_id),
            ("build id", report.build_id),
            ("seconds", f"{report.seconds:,.1f} ({_bytes(int(report.bytes_a_second))}/s)"),
        ]
    )


@bundle_app.command("export")
def bundle_export(
    index: IndexArgument,
    bundle: BundleArgument,
    version: BundleVersion = None,
    include_decoder: Annotated[
        bool, typer.Option("--include-decoder", help="Put the decoder's weights and tokenizer into the bundle.")
    ] = False,
    include_retriever: Annotated[
        bool, typer.Option("--include-retriever", help="Put the retriever into the bundle.")
    ] = False,
    copy: Annotated[bool, typer.Option("--copy", help="Copy files even where hard links would do.")] = False,
    sign: Annotated[Path | None, typer.Option("--sign", help="Private key to sign the manifest with.")] = None,
    jobs: Jobs = 8,
    as_json: JsonFlag = False,
) -> None:
    """Put one generation, checked, into a folder that can be moved anywhere: what serving needs and no more."""
    from refrag_core.bundle import ExportOptions, export_bundle

    options = ExportOptions(
        version=version,
        include_decoder=include_decoder,
        include_retriever=include_retriever,
        copy=copy,
        sign_key=sign,
        jobs=jobs,
    )
    with _Bytes("export") as meter:
        report = export_bundle(index, bundle, options, meter)
    _print_json(report) if as_json else _print_bundle(report, bundle, "placed")


@bundle_app.command("push")
def bundle_push(
    bundle: BundleArgument,
    destination: Annotated[str, typer.Argument(help="Folder or URI (s3://…) to bring it to.", show_default=False)],
    version: BundleVersion = None,
    jobs: Jobs = 8,
    as_json: JsonFlag = False,
) -> None:
    """Bring a bundle to a folder or object store: only files that are not there, the manifest last."""
    from refrag_core.bundle_transfer import push_bundle

    with _Bytes("push") as meter:
        report = push_bundle(bundle, destination, version=version, jobs=jobs, meter=meter)
    _print_json(report) if as_json else _print_bundle(report, destination, "moved")


@bundle_app.command("pull")
def bundle_pull(
    source: Annotated[str, typer.Argument(help="Folder or URI (s3://…) that holds bundles.", show_default=False)],
    folder: BundleArgument,
    version: BundleVersion = None,
    verify_key: VerifyKey = None,
    jobs: Jobs = 8,
    as_json: JsonFlag = False,
) -> None:
    """Bring a generation to this host: only files that it lacks, checked before readers see them."""
    from refrag_core.bundle_transfer import pull_bundle

    with _Bytes("pull") as meter:
        report = pull_bundle(
            source, folder, version=version, verify_keys=tuple(verify_key or ()), jobs=jobs, meter=meter
        )
    _print_json(report) if as_json else _print_bundle(report, folder, "moved")


@bundle_app.command("open")
def bundle_open(
    bundle: BundleArgument,
    version: BundleVersion = None,
    verify_key: VerifyKey = None,
    jobs: Jobs = 8,
    as_json: JsonFlag = False,
) -> None:
    """Check every byte of a bundle and warm its pages for the first question. Writes nothing."""
    from refrag_core.bundle import open_bundle

    with _Bytes("verify") as meter:
        report = open_bundle(bundle, version=version, verify_keys=tuple(verify_key or ()), jobs=jobs, meter=meter)
    if as_json:
        _print_json(report)
        return
    checked = f", checked with {' or '.join(report.verified_with)}" if report.verified_with else ""
    _print_rows(
        [
            ("bundle", f"{bundle} version {report.version}, {'signed' if report.signed else 'not signed'}{checked}"),
            ("passages", report.passages),
            ("chunks", report.chunks),
            *((role, where) for role, where in report.models.items()),
            *((f"  {kind}", _bytes(size)) for kind, size in report.bytes_by_kind.items()),
            ("files", f"{report.files:,}, {_bytes(report.bytes)}: all good"),
            ("verified", f"{report.verify_seconds:,.2f} s ({_bytes(int(report.bytes_a_second))}/s)"),
            ("mapped", f"{report.map_seconds:,.2f} s"),
            ("content id", report.content_id),
            ("build id", report.build_id),
        ]
    )


@bundle_app.command("decoder")
def bundle_decoder(
    index: IndexArgument,
    folder: Annotated[Path, typer.Argument(help="Folder to write.", show_default=False)],
    dtype: Annotated[
        WeightsDtypeName | None, typer.Option(help="Of the weights; float32 to lose nothing. Default: the decoder's.")
    ] = None,
    decoder: Decoder = None,
    checkpoint: Checkpoint = None,
    verify_key: VerifyKey = None,
    as_json: JsonFlag = False,
) -> None:
    """Write the decoder, the checkpoint's adapter merged, as a model folder for vLLM and other engines."""
    import torch

    from refrag_core.merged_decoder import write_merged
    from refrag_core.runtime import RuntimeOptions, models_of

    options = RuntimeOptions(
        location=index, checkpoint=checkpoint, decoder=decoder, verify_keys=tuple(verify_key or ())
    )
    made_with, source = models_of(options)
    name = write_merged(made_with, source, folder, dtype=None if dtype is None else getattr(torch, dtype.value))
    command = f"vllm serve {shlex.quote(str(folder))} --served-model-name {name} --enable-prompt-embeds"
    if as_json:
        _print_json({"folder": str(folder), "name": name, "serve": command})
    else:
        _print_rows([("decoder", folder), ("name", name), ("serve it", command)])


@bundle_app.command("gc")
def bundle_gc(
    folder: BundleArgument,
    keep: Annotated[int, typer.Option(help="Newest generations that stay in any case.", min=1)] = 2,
    grace_seconds: Annotated[
        float, typer.Option(help="Files that no generation names stay until they are this old.", min=0)
    ] = 3600.0,
    as_json: JsonFlag = False,
) -> None:
    """Remove old generations and their files; what readers hold and transfers bring stays."""
    from refrag_core.bundle_folder import collect

    done = collect(folder, keep=keep, grace_seconds=grace_seconds)
    if as_json:
        _print_json(done)
        return
    _print_rows(
        [
            ("removed", f"generations {_numbers(done.removed)}; {done.files:,} files, {_bytes(done.bytes)}"),
            ("kept", f"generations {_numbers(done.kept)}"),
            ("held", f"generations {_numbers(done.held)} by readers"),
            ("arriving", f"generations {_numbers(done.arriving)}"),
            ("waiting", f"{done.young:,} files that no generation names, younger than {grace_seconds:,.0f} s"),
        ]
    )


def _numbers(versions: Iterable[int]) -> str:
    return ", ".join(map(str, versions)) or "none"


@bundle_app.command("keygen")
def bundle_keygen(
    key: Annotated[Path, typer.Argument(help="File for the private key; KEY.pub gets the public one.")],
    as_json: JsonFlag = False,
) -> None:
    """Make an Ed25519 key pair for signing bundles."""
    from refrag_core.signing import write_key_pair

    public = write_key_pair(key)
    if as_json:
        _print_json({"private_key": str(key), "public_key": str(public)})
        return
    _print_rows([("private key", f"{key} (keep it secret)"), ("public key", f"{public} (give it to the hosts)")])


# --- refrag ask ---------------------------------------------------------------------------------------


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(f"{path} is not UTF-8 text ({error}): expected a text file; convert it first") from error


def _open_runtime(
    index: str,
    decoder: str | None,
    retriever: str | None,
    checkpoint: str | None,
    device: str,
    chunk_cache: Path | None = None,
    tables: TablesName = TablesName.PARQUET,
    verify_key: list[Path] | None = None,
    captured: bool | None = None,
    device_map: str | None = None,
    composes_only: bool = False,
) -> "Runtime":
    from refrag_core.runtime import Runtime

    runtime = Runtime.open(
        index,
        decoder=decoder,
        retriever=retriever,
        checkpoint=checkpoint,
        device=device,
        chunk_cache=chunk_cache,
        tables=tables.value,
        verify_keys=tuple(verify_key or ()),
        captured=captured,
        device_map=device_map,
        composes_only=composes_only,
    )
    if not runtime.trained:
        _warn(
            "WARNING: this index was built with an UNTRAINED projection: a compressed chunk means nothing to the "
            "decoder. Answers are right only with every chunk expanded, which gives no speed-up."
        )
    return runtime


def _ask_options(
    runtime: "Runtime", policy: PolicyName | None, expansion_fraction: float | None, allow_untrained: bool, **rest: Any
) -> "AskOptions":
    from refrag_core.runtime import AskOptions, check_untrained

    check_untrained(runtime.trained, policy and policy.value, expansion_fraction, allow_untrained)
    if not runtime.trained and policy is None and expansion_fraction is None:
        policy = PolicyName.ALL
    return AskOptions(
        policy=(policy or PolicyName.LEARNED).value,
        expansion_fraction=0.1 if expansion_fraction is None else expansion_fraction,
        **rest,
    )


def _engine_options(
    name: DecoderEngineName, url: str | None, model: str | None, settings: list[str] | None, device_map: str | None
) -> "EngineOptions":
    from refrag_core.engine_choice import EngineOptions, parse_settings

    if device_map is not None and name is not DecoderEngineName.EMBEDDED:
        raise UsageError(f"--device-map was given with --engine {name}, which has the decoder elsewhere: leave it out")
    return EngineOptions(name=name.value, url=url, model=model, settings=parse_settings(settings or []))


@app.command("ask")
def ask(
    index: IndexArgument,
    question: Annotated[str, typer.Argument(help="The question.", show_default=False)],
    top_k: TopK = 5,
    where: Where = None,
    hybrid: Hybrid = False,
    dense_weight: DenseWeight = 1.0,
    lexical_weight: LexicalWeight = 1.0,
    expansion_fraction: ExpansionFraction = None,
    policy: Policy = None,
    max_new_tokens: MaxNewTokens = 64,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    strict: Strict = False,
    context: Annotated[
        list[Path] | None, typer.Option(help="Text files to read besides the index; encoded now. May be repeated.")
    ] = None,
    chunk_cache: Annotated[
        Path | None, typer.Option(help="File that keeps the embeddings of --context texts between runs.")
    ] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print the answer as it is generated.")] = False,
    allow_untrained: AllowUntrained = False,
    decoder: Decoder = None,
    retriever: Retriever = None,
    checkpoint: OpenedCheckpoint = None,
    tables: ReadTables = TablesName.PARQUET,
    verify_key: VerifyKey = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    engine: DecoderEngine = DecoderEngineName.EMBEDDED,
    vllm_url: VllmUrl = None,
    vllm_model: VllmModel = None,
    vllm_option: VllmOption = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write a page for a browser: each chunk shaded as it was read.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Answer a question from an index, with the passages used and a latency breakdown."""
    given = {str(path): _read_text(path) for path in context or []}
    retrieval = _retrieval(where, hybrid, dense_weight, lexical_weight)
    chosen = _engine_options(engine, vllm_url, vllm_model, vllm_option, device_map)
    runtime = _open_runtime(
        index,
        decoder,
        retriever,
        checkpoint,
        device,
        chunk_cache,
        tables,
        verify_key,
        captured=False,  # one question: capturing would take longer than it saves
        device_map=device_map,
        composes_only=chosen.decodes_elsewhere,
    )
    _build_lexical(runtime.searcher, retrieval)
    options = _ask_options(
        runtime,
        policy,
        expansion_fraction,
        allow_untrained,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        strict=strict,
        retrieval=retrieval,
        explain=html is not None,
    )
    on_text = (lambda text: print(text, end="", flush=True)) if stream and not as_json else None
    answer = _ask_by(chosen, runtime, question, options, given=given, on_text=on_text)
    if html is not None:
        from refrag_core.inspector import write_answer

        write_answer(answer, html)
    if as_json:
        _print_json(answer)
        return
    _print_passing(where, answer.passing, runtime.reader.manifest.counts.passages)
    if answer.passing == 0 and not answer.passages:
        print("nothing to answer from: no passage passes the filter")
        return
    print("" if stream else answer.answer)
    _print_answer(answer)


def _ask_by(engine: "EngineOptions", runtime: "Runtime", question: str, options: "AskOptions", **rest: Any) -> "Answer":
    """Ask the runtime with its own decoder, or with an engine that is opened for this one answer."""
    from refrag_core.decoder_engine import generate_by
    from refrag_core.engine_choice import open_engine

    if not engine.decodes_elsewhere:
        return runtime.ask(question, options, **rest)
    opened = open_engine(runtime, engine, slots=1, max_positions=ASK_POSITIONS)
    try:
        within = replace(options, max_positions=opened.max_positions)
        return runtime.ask(question, within, generate=generate_by(opened), **rest)
    finally:
        opened.close()


def _print_answer(answer: "Answer") -> None:
    _print_passages(answer, print)
    _print_stats(answer, print)


def _print_passages(answer: "Answer", tell: Callable[[str], object]) -> None:
    tell("\npassages (# chunk expanded to its tokens, · chunk as one embedding)")
    for passage in answer.passages:
        chunks = "".join("#" if i in set(passage.expanded) else "·" for i in range(passage.num_chunks))
        score = "given" if passage.score is None else f"{passage.score:.3f}"
        tell(f"  {passage.rank}. {score} {passage.doc_id}  [{chunks}]  {_one_line(passage.text, 80)}")
    for document_id in answer.dropped:
        tell(f"  dropped, does not fit the decoder: {document_id}")


def _print_stats(answer: "Answer", tell: Callable[[str], object]) -> None:
    s = answer.stats
    encode = f"encode {s.encode_ms:,.1f} + " if s.encode_ms >= 0.1 else ""
    tell(
        f"\nfirst token {s.ttft_ms:,.1f} ms = retrieval {s.retrieval_ms:,.1f} + fetch {s.fetch_ms:,.2f} + "
        f"{encode}policy {s.policy_ms:,.2f} + compose {s.upload_ms + s.compose_ms:,.1f} + "
        f"prefill {s.prefill_ms:,.1f};\n"
        f"then {s.ttit_ms:,.1f} ms a token. {s.context_tokens:,} context tokens in {s.num_chunks:,} chunks, "
        f"{s.num_expanded:,} expanded: "
        f"{s.decoder_positions:,} decoder positions, compression {s.compression:.2f}x"
    )


# --- refrag chat --------------------------------------------------------------------------------------


@app.command("chat")
def chat(
    index: IndexArgument,
    question: Annotated[
        str | None,
        typer.Argument(help="One question; without it each line of the standard input is one.", show_default=False),
    ] = None,
    session: Annotated[
        Path | None, typer.Option(help="File that keeps the conversation: gone on with if it exists, saved each turn.")
    ] = None,
    adopt: Annotated[
        bool, typer.Option("--adopt", help="Go on with a session of another index or checkpoint.")
    ] = False,
    history_positions: HistoryPositions = 1024,
    turn_weight: TurnWeight = 0.5,
    reuse: Reuse = True,
    top_k: TopK = 5,
    where: Where = None,
    hybrid: Hybrid = False,
    dense_weight: DenseWeight = 1.0,
    lexical_weight: LexicalWeight = 1.0,
    expansion_fraction: ExpansionFraction = None,
    policy: Policy = None,
    max_new_tokens: MaxNewTokens = 256,
    temperature: Temperature = 0.0,
    top_p: TopP = 1.0,
    seed: Seed = 0,
    strict: Strict = False,
    chunk_cache: Annotated[
        Path | None, typer.Option(help="File that keeps the embeddings of compressed turns between runs.")
    ] = None,
    allow_untrained: AllowUntrained = False,
    decoder: Decoder = None,
    retriever: Retriever = None,
    checkpoint: OpenedCheckpoint = None,
    tables: ReadTables = TablesName.PARQUET,
    verify_key: VerifyKey = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print each answer as one line of JSON.")] = False,
) -> None:
    """Ask questions that know those before them: in a terminal, from a pipe, or one at a time with --session."""
    from refrag_core.history import HistoryOptions
    from refrag_core.session import SessionFile

    history = HistoryOptions(positions=history_positions, turn_weight=turn_weight, reuse=reuse)
    file = None if session is None else SessionFile(session)
    saved = None if file is None else file.read()
    retrieval = _retrieval(where, hybrid, dense_weight, lexical_weight)
    runtime = _open_runtime(
        index, decoder, retriever, checkpoint, device, chunk_cache, tables, verify_key, device_map=device_map
    )
    _build_lexical(runtime.searcher, retrieval)
    options = _ask_options(
        runtime,
        policy,
        expansion_fraction,
        allow_untrained,
        top_k=top_k,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_p=top_p,
        seed=seed,
        strict=strict,
        retrieval=retrieval,
    )
    conversation = runtime.chat(options, history=history, session=saved, adopt=adopt)
    lines = _ChatLines(conversation, file, as_json=as_json)
    if question is not None:
        lines.ask(question)
    elif sys.stdin.isatty():
        _chat_in_terminal(lines)
    else:
        for line in sys.stdin:
            if not lines.take(line.rstrip("\n")):
                break


def _chat_in_terminal(lines: "_ChatLines") -> None:
    """Until /quit or the end of input; an error or Ctrl-C ends an answer, not the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 (gives input() its line editing)

    _warn("Ask away; /help lists the commands, Ctrl-D ends.")
    going_on = True
    while going_on:
        try:
            line = input("> ")
        except EOFError:
            print()
            return
        try:
            going_on = lines.take(line)
        except RefragError as error:
            _warn(f"error: {error}")
        except _Interrupted as interrupted:
            if interrupted.args != (signal.SIGINT,):
                raise
            _warn("\ninterrupted: this question and its answer are not kept")


class _ChatLines:
    """What a line of input does: a question, or a command that begins with a slash."""

    _COMMANDS: ClassVar[dict[str, str]] = {
        "/history": "the turns, and what became of each in the last prompt",
        "/passages": "what the last answer was given from",
        "/stats": "what the last answer took",
        "/save FILE": "write the conversation to a new file, to go on with by --session",
        "/reset": "forget all turns",
        "/help": "this list",
        "/quit": "end",
    }

    def __init__(self, conversation: "Conversation", file: "SessionFile | None", *, as_json: bool) -> None:
        self._conversation = conversation
        self._file = file
        self._as_json = as_json
        self._tell: Callable[[str], object] = _warn if as_json else print
        self._last: Answer | None = None

    def take(self, line: str) -> bool:
        """Do what the line says; False for the end. Raises UsageError for a command that there is none of."""
        words = line.split()
        if not words:
            return True
        if not words[0].startswith("/"):
            self.ask(line.strip())
            return True
        name, *rest = words
        known = {command.split()[0] for command in self._COMMANDS}
        if name not in known or bool(rest) != (name == "/save"):
            raise UsageError(f"{line.strip()!r} is no command; expected {', '.join(self._COMMANDS)}, or a question")
        if name == "/save":
            self._save(line.strip().removeprefix("/save").strip())
        elif name != "/quit":
            getattr(self, f"_{name[1:]}")()
        return name != "/quit"

    def ask(self, question: str) -> None:
        """Print the answer, streamed on a terminal, and save the session."""
        streams = sys.stdout.isatty() and not self._as_json
        on_text = (lambda text: print(text, end="", flush=True)) if streams else None
        before = self._dropped
        self._last = answer = self._conversation.ask(question, on_text=on_text)
        if self._as_json:
            print(json.dumps(_plain(answer), ensure_ascii=False), flush=True)
        elif answer.passing == 0 and not answer.passages and not answer.answer:
            print("nothing to answer from: no passage passes the filter")
        else:
            print("" if streams else answer.answer, flush=True)
        if self._file is not None:
            self._file.write(self._conversation.session)
        self._warn_of_losses(answer, before)

    @property
    def _dropped(self) -> int:
        return self._last.history.dropped if self._last and self._last.history else 0

    def _warn_of_losses(self, answer: "Answer", before: int) -> None:
        if self._dropped > before:
            turns = "turn 1 is" if self._dropped == 1 else f"turns 1 to {self._dropped} are"
            _warn(f"note: {turns} not in the prompt any more, for want of room: see --history-positions")
        for name in answer.dropped:
            _warn(f"note: dropped, does not fit the decoder: {name}")

    def _save(self, path: str) -> None:
        from refrag_core.session import SessionFile

        own = self._file is not None and self._file.path.absolute() == Path(path).absolute()
        (self._file if self._file and own else SessionFile(Path(path))).write(self._conversation.session)
        self._tell(f"saved {len(self._conversation.turns)} turns in {path}")

    def _history(self) -> None:
        use = self._last.history if self._last else None
        for number, turn in enumerate(self._conversation.turns):
            state = "new"
            if use is not None and number < use.dropped + use.passages + use.raw:
                state = (
                    "dropped" if number < use.dropped else "passage" if number < use.dropped + use.passages else "raw"
                )
            self._tell(f"{number + 1}. [{state}] {_one_line(turn.question, 80)}")
            self._tell(f"   {_one_line(turn.answer, 80)}")
        if use is not None:
            self._tell(f"{use.positions:,} of {use.budget:,} positions for the history in the last prompt")

    def _passages(self) -> None:
        _print_passages(self._answered(), self._tell)

    def _stats(self) -> None:
        answer = self._answered()
        _print_stats(answer, self._tell)
        use = answer.history
        if use is not None:
            self._tell(
                f"{answer.stats.reused_positions:,} positions reused; history: {use.raw} turns raw, {use.passages} as "
                f"passages, {use.dropped} dropped, in {use.positions:,} of {use.budget:,} positions"
            )

    def _answered(self) -> "Answer":
        if self._last is None:
            raise UsageError("there is no answer yet; expected a question first")
        return self._last

    def _reset(self) -> None:
        self._conversation.reset()
        self._last = None
        self._tell("all turns are forgotten")

    def _help(self) -> None:
        width = max(map(len, self._COMMANDS))
        for command, what in self._COMMANDS.items():
            self._tell(f"{command:<{width}}  {what}")


# --- refrag serve -------------------------------------------------------------------------------------


@app.command("serve")
def serve(
    index: IndexArgument,
    host: Annotated[
        str, typer.Option(help="Address to listen at; 0.0.0.0 for every one of this machine.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0 takes a free one.", min=0, max=65535)] = 8000,
    model_name: Annotated[
        str | None, typer.Option(help="Under which clients ask for it. Default: the index's name.")
    ] = None,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients must show. Default: $REFRAG_API_KEY, else none.")
    ] = None,
    allowed_host: Annotated[
        list[str] | None,
        typer.Option(help="Host name that requests may carry, besides this address; behind a proxy. Repeatable."),
    ] = None,
    slots: Annotated[int, typer.Option(help="Answers decoded at the same time.", min=1)] = 8,
    max_positions: Annotated[
        int, typer.Option(help="Positions of a prompt with its answer; each slot's cache has as many.", min=1)
    ] = 4096,
    max_new_tokens: Annotated[int, typer.Option(help="Where a request names no number.", min=1)] = 256,
    queue_limit: Annotated[int, typer.Option(help="Requests that wait at most; more get 429.", min=0)] = 64,
    request_seconds: Annotated[float, typer.Option(help="From a request to its answer's end.", min=0)] = 120.0,
    body_bytes: Annotated[int, typer.Option(help="Largest body of a request.", min=1)] = 1 << 20,
    drain_seconds: Annotated[float, typer.Option(help="For running answers once SIGTERM has come.", min=0)] = 30.0,
    reload_seconds: Annotated[
        float, typer.Option(help="Look for a newer generation so often; 0 waits for SIGHUP or /v1/reload.", min=0)
    ] = 0.0,
    history_positions: HistoryPositions = 1024,
    turn_weight: TurnWeight = 0.5,
    reuse: Reuse = True,
    chunk_cache: Annotated[
        Path | None, typer.Option(help="File that keeps the embeddings of conversations' turns between runs.")
    ] = None,
    allow_untrained: AllowUntrained = False,
    decoder: Decoder = None,
    retriever: Retriever = None,
    checkpoint: OpenedCheckpoint = None,
    tables: ReadTables = TablesName.PARQUET,
    verify_key: VerifyKey = None,
    device: Device = "auto",
    device_map: DeviceMap = None,
    engine: DecoderEngine = DecoderEngineName.EMBEDDED,
    vllm_url: VllmUrl = None,
    vllm_model: VllmModel = None,
    vllm_option: VllmOption = None,
) -> None:
    """Answer over HTTP, as OpenAI's clients expect it, with a page for people at /."""
    from refrag_core.history import HistoryOptions
    from refrag_core.serving.command import ServeCommand, run_server

    settings = ServeCommand(
        host=host,
        port=port,
        model_name=model_name,
        api_key_file=api_key_file,
        allowed_hosts=tuple(allowed_host or ()),
        slots=slots,
        max_positions=max_positions,
        max_new_tokens=max_new_tokens,
        queue_limit=queue_limit,
        request_seconds=request_seconds,
        body_bytes=body_bytes,
        drain_seconds=drain_seconds,
        reload_seconds=reload_seconds,
        history=HistoryOptions(positions=history_positions, turn_weight=turn_weight, reuse=reuse),
        allow_untrained=allow_untrained,
        engine=_engine_options(engine, vllm_url, vllm_model, vllm_option, device_map),
    )

    def opened() -> "Runtime":
        return _open_runtime(
            index,
            decoder,
            retriever,
            checkpoint,
            device,
            chunk_cache,
            tables,
            verify_key,
            device_map=device_map,
            composes_only=settings.engine.decodes_elsewhere,
        )

    run_server(index, opened, settings, say=_warn, on_ready=lambda url: print(url, flush=True))


# --- refrag eval --------------------------------------------------------------------------------------


@eval_app.command("retrieval")
def eval_retrieval(
    index: IndexArgument,
    questions: Questions,
    retriever: Retriever = None,
    device: Device = "auto",
    bm25: Annotated[bool, typer.Option(help="Also rank with BM25 over the same passages.")] = True,
    where: Where = None,
    hybrid: Hybrid = False,
    dense_weight: DenseWeight = 1.0,
    lexical_weight: LexicalWeight = 1.0,
    as_json: JsonFlag = False,
) -> None:
    """Recall@1/5/20 and MRR of the index's retriever, BM25 beside it, and with --hybrid both fused."""
    from refrag_core.evaluation.run_retrieval import evaluate_retrieval

    options = _retrieval(where, hybrid, dense_weight, lexical_weight)
    report = evaluate_retrieval(index, questions, retriever=retriever, device=device, bm25=bm25, options=options)
    if as_json:
        _print_json(report)
        return
    print(f"{report['questions']} questions, {report['passages']:,} passages, version {report['version']}")
    _print_passing(where, report["passing"], report["passages"])
    for name, scores in report["systems"].items():
        print(f"  {name:<8} " + "  ".join(f"{metric} {value:.3f}" for metric, value in scores.items()))


@eval_app.command("qa")
def eval_qa(
    index: IndexArgument,
    questions: Questions,
    top_k: TopK = 3,
    expansion_fraction: Annotated[
        str | None, typer.Option(help="Fractions to try, separated by commas. Default: 0,.1,.25; none where untrained.")
    ] = None,
    policy: Policy = None,
    max_new_tokens: Annotated[int, typer.Option(help="Tokens to generate at most.", min=1)] = 32,
    retriever_mode: Annotated[
        RetrieverMode,
        typer.Option(help="strong: the index's; weak: half of it replaced at random; gold: gold and random passages."),
    ] = RetrieverMode.STRONG,
    where: Where = None,
    hybrid: Hybrid = False,
    dense_weight: DenseWeight = 1.0,
    lexical_weight: LexicalWeight = 1.0,
    limit: Annotated[int | None, typer.Option(help="Questions, from the first. Default: all.", min=1)] = None,
    save: Annotated[
        Path | None, typer.Option(help="Keep answers in this file as they come; run again to go on.")
    ] = None,
    batch_rows: Annotated[int, typer.Option(help="Prompts that are decoded side by side.", min=1)] = 16,
    seed: Annotated[int, typer.Option(help="Of what is random in weak and gold passages.", min=0)] = 0,
    allow_untrained: AllowUntrained = False,
    decoder: Decoder = None,
    retriever: Retriever = None,
    checkpoint: OpenedCheckpoint = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
) -> None:
    """Answers scored against known ones: no context, full text, compressed, and fewer passages at equal latency."""
    from refrag_core.evaluation.qa_table import table_lines
    from refrag_core.evaluation.run_qa import QaOptions, evaluate_qa

    retrieval = _retrieval(where, hybrid, dense_weight, lexical_weight)
    runtime = _open_runtime(index, decoder, retriever, checkpoint, device)
    fractions = _fractions(expansion_fraction, trained=runtime.trained)
    for fraction in fractions:
        _ask_options(runtime, policy, fraction, allow_untrained)
    options = QaOptions(
        top_k=top_k,
        fractions=fractions,
        policy=(policy or PolicyName.LEARNED).value,
        max_new_tokens=max_new_tokens,
        retriever_mode=retriever_mode.value,
        retrieval=retrieval,
        seed=seed,
        limit=limit,
        batch_rows=batch_rows,
    )
    report = evaluate_qa(runtime, questions, options, saved=save, on_answer=_warn)
    if as_json:
        _print_json(report)
        return
    print("\n".join(table_lines(report)))


@eval_app.command("perplexity")
def eval_perplexity(
    text: Annotated[
        Path,
        typer.Option(help='JSON lines of {"id", "text"}, or a folder of token shards.', show_default=False),
    ],
    checkpoint: Checkpoint = None,
    split: Annotated[
        str | None, typer.Option(help="Of token shards: held_out (the default), reported or train.")
    ] = None,
    reference: Annotated[
        str | None, typer.Option(help="Checkpoint whose decoder's full context the gap closed is also taken from.")
    ] = None,
    context: Annotated[str, typer.Option(help="Context tokens (s); several give several tables.")] = "512",
    output: Annotated[str, typer.Option(help="Output tokens (o); several give several tables.")] = "256",
    chunk_size: Annotated[str, typer.Option(help="Tokens a chunk (k); default: the checkpoint's.")] = "",
    expansion_fraction: Annotated[str, typer.Option(help="Fractions (p), separated by commas.")] = "0,.1,.25",
    policies: Annotated[
        str,
        typer.Option(help="Of random, last, similarity, perplexity, learned. Default: all but similarity, if trained."),
    ] = "",
    windows: Annotated[
        int, typer.Option("--windows", "--documents", help="At most: one a document, then a second of each …", min=1)
    ] = 256,
    query_tokens: Annotated[
        int | None,
        typer.Option(
            help="First output tokens, read as text and not scored. Default: 32 if a policy reads them, else 1."
        ),
    ] = None,
    shuffled: Annotated[
        bool, typer.Option("--shuffled", help="Contexts of four passages of which one, anywhere, precedes the output.")
    ] = False,
    embedding_dtype: Annotated[
        str, typer.Option(help="Storage of chunk embeddings: float32, float16 or int8 with a scale a row.")
    ] = "float16",
    retriever: Retriever = None,
    allow_untrained: AllowUntrained = False,
    batch_rows: Annotated[int | None, typer.Option(help="Windows a batch; default: by the device.", min=1)] = None,
    device: Device = "auto",
    seed: Annotated[int, typer.Option(help="Of random selection, shuffling and the intervals.")] = 0,
    save: Annotated[Path | None, typer.Option(help="File to write the JSON to as well.")] = None,
    as_json: JsonFlag = False,
) -> None:
    """Log-perplexity with no, full, truncated, wrong and compressed context, and the gap that is closed."""
    from refrag_core.checkpoint import load_checkpoint
    from refrag_core.evaluation import perplexity as measured
    from refrag_core.evaluation.perplexity_table import table_lines

    options = measured.parse_options(
        context=context,
        output=output,
        chunk_size=chunk_size,
        expansion_fraction=expansion_fraction,
        policies=policies,
        windows=windows,
        query_tokens=query_tokens,
        shuffled=shuffled,
        embedding_dtype=embedding_dtype,
        retriever=retriever,
        allow_untrained=allow_untrained,
        batch_rows=batch_rows,
        device=device,
        seed=seed,
    )
    fixed = load_checkpoint(reference) if reference else None
    report = measured.evaluate_perplexity(
        load_checkpoint(checkpoint), text, options, split=split, reference=fixed, say=_warn
    )
    if save is not None:
        measured.save_report(report, save)
    if as_json:
        _print_json(report)
        return
    for line in table_lines(report):
        print(line)


def _fractions(text: str | None, *, trained: bool) -> list[float]:
    if text is None:
        return [0.0, 0.1, 0.25] if trained else []
    try:
        fractions = [float(part) for part in text.split(",") if part]
    except ValueError:
        fractions = [-1.0]
    if not all(0 <= fraction <= 1 for fraction in fractions):
        raise UsageError(
            f"--expansion-fraction {text!r}: expected numbers from 0 to 1 separated by commas, like 0,.1,.25"
        )
    return fractions


# --- refrag train -------------------------------------------------------------------------------------

TrainingConfigFile = Annotated[
    str,
    typer.Argument(
        metavar="CONFIG", help="TOML file, or the name of a shipped config (`refrag train config`).", show_default=False
    ),
]
Settings = Annotated[
    list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Override a setting; may be repeated.")
]
RunFolder = Annotated[
    Path | None, typer.Option("--output", "-o", help="Folder of the run. Default: the config's.", show_default=False)
]


@train_app.command("prepare")
def train_prepare(
    corpus: Corpus,
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the token shards.")] = Path("data/tokens"),
    decoder: Decoder = None,
    train_only: Annotated[
        list[str] | None, typer.Option(help="Corpus that nothing is held out of; may be repeated.")
    ] = None,
    reported: Annotated[
        list[str] | None, typer.Option(help="Corpus that is only evaluated on, never trained; may be repeated.")
    ] = None,
    held_out_fraction: Annotated[
        float, typer.Option(help="Share of the documents that is held out.", min=0, max=0.9)
    ] = 0.04,
    max_overlap: Annotated[
        float, typer.Option(help="Share of known 13-grams above which a document is a near-duplicate.", min=0, max=1)
    ] = 0.5,
    id_field: IdField = "id",
    text_field: TextField = "text",
    max_line_bytes: MaxLineBytes = 64 << 20,
    max_document_bytes: MaxDocumentBytes = 64 << 20,
    as_json: JsonFlag = False,
) -> None:
    """Tokenize corpora for training: split by document, near-duplicates left out; replaces what is there at the end."""
    from refrag_core.corpus.sources import CorpusOptions
    from refrag_core.models import DEFAULT_DECODER
    from refrag_core.training.prepare import TrainingCorpora, prepare_corpora
    from refrag_core.training.token_shards import PrepareOptions

    progress = _progress()
    report = prepare_corpora(
        TrainingCorpora(tuple(corpus), tuple(train_only or ()), tuple(reported or ())),
        decoder or DEFAULT_DECODER,
        output,
        reading=CorpusOptions(
            roots=tuple(corpus),
            id_field=id_field,
            text_field=text_field,
            metadata_fields=(),
            excluded_folder=str(output.absolute()),
            max_line_bytes=max_line_bytes,
            max_document_bytes=max_document_bytes,
        ),
        options=PrepareOptions(held_out_fraction=held_out_fraction, max_overlap=max_overlap),
        start=lambda total: progress.start("tokenize", total, "bytes"),
        advance=progress.advance,
        say=progress.note,
    )
    progress.finish()
    _print_json(report) if as_json else _print_prepared(report)
    if report["quarantined"]:
        _warn(f"{report['quarantined']} records were left out as faulty")
        raise typer.Exit(QUARANTINED)


def _print_prepared(report: dict[str, Any]) -> None:
    splits = [
        (name, f"{found['documents']:,} documents, {found['tokens']:,} tokens")
        for name, found in report["splits"].items()
    ]
    corpora = [
        (
            f"  {found['name']}",
            f"{found['documents']:,} documents, {found['near_duplicates']:,} near-duplicates left out",
        )
        for found in report["corpora"]
    ]
    rejected = [(f"  {reason}", f"{count:,} records left out") for reason, count in report["rejected"].items()]
    _print_rows([("token shards", report["output"]), *splits, *corpora, *rejected])


def _train(stage: "Stage", config: str, settings: list[str] | None, output: Path | None, as_json: bool) -> None:
    from refrag_core.training.runs import load_stage, result_rows, run_stage

    result = run_stage(load_stage(stage, config, settings or (), output))
    if result is None:
        return
    _print_json(result) if as_json else _print_rows(result_rows(result))
    if not result.finished:
        raise typer.Exit(STOPPED)


@train_app.command("reconstruct")
def train_reconstruct(
    config: TrainingConfigFile, settings: Settings = None, output: RunFolder = None, as_json: JsonFlag = False
) -> None:
    """Stage 1: encoder and projection learn to say what is in a chunk. Run again to resume."""
    _train("reconstruct", config, settings, output, as_json)


@train_app.command("next-paragraph")
def train_next_paragraph(
    config: TrainingConfigFile, settings: Settings = None, output: RunFolder = None, as_json: JsonFlag = False
) -> None:
    """Stage 2: the decoder learns to go on from compressed context. Run again to resume."""
    _train("next-paragraph", config, settings, output, as_json)


@train_app.command("policy")
def train_policy(
    config: TrainingConfigFile, settings: Settings = None, output: RunFolder = None, as_json: JsonFlag = False
) -> None:
    """Stage 3: which chunks are worth expanding, from a trained checkpoint. Run again to resume."""
    _train("policy", config, settings, output, as_json)


@train_app.command("instruct")
def train_instruct(
    config: TrainingConfigFile, settings: Settings = None, output: RunFolder = None, as_json: JsonFlag = False
) -> None:
    """Stage 4: question and passages to answer, from a trained checkpoint. Run again to resume."""
    _train("instruct", config, settings, output, as_json)


@train_app.command("config")
def train_config(
    name: Annotated[
        str | None, typer.Argument(help="Shipped config to print; default: list them.", show_default=False)
    ] = None,
    describe: Annotated[bool, typer.Option("--describe", help="Every setting, with its type and default.")] = False,
    as_json: JsonFlag = False,
) -> None:
    """List the shipped training configs, print one to start from, or describe every setting."""
    from refrag_core.training import config_reference
    from refrag_core.training.runs import config_title, shipped_config, shipped_configs

    if describe:
        if as_json:
            _print_json({title: config_reference.settings_of(kind) for title, kind in config_reference.TABLES.items()})
        else:
            print("\n".join(config_reference.reference_lines()))
    elif name is not None:
        text = shipped_config(name).read_text(encoding="utf-8")
        print(json.dumps({"name": name, "toml": text}) if as_json else text, end="\n" if as_json else "")
    elif as_json:
        _print_json({known: str(path) for known, path in shipped_configs().items()})
    else:
        _print_rows((known, config_title(path)) for known, path in shipped_configs().items())


@train_app.command("plot")
def train_plot(
    run: Annotated[Path, typer.Argument(help="Folder of a training run.", show_default=False)],
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="Image to write. Default: RUN/metrics.png.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Draw a run's log: losses by task, held-out results, learning rate, positions a second."""
    from refrag_core.training.plot import plot_run

    image = output or run / "metrics.png"
    drawn = plot_run(run, image)
    if as_json:
        _print_json({"image": str(image), "panels": {panel.title: list(panel.curves) for panel in drawn}})
    else:
        print(image)


# --- refrag checkpoint --------------------------------------------------------------------------------


@checkpoint_app.command("pack")
def checkpoint_pack(
    checkpoint: Annotated[str, typer.Argument(help="Folder of a trained checkpoint.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of the packed one.", show_default=False)],
    dtype: Annotated[
        str, typer.Option(help="float32, float16, int8 with a scale a row, or int5 with a scale each 32 entries.")
    ] = "int8",
    part: Annotated[
        list[str] | None,
        typer.Option(
            metavar="PART=DTYPE", help="Another one for encoder, adapter, projection or policy; may be repeated."
        ),
    ] = None,
    adapter_rank: Annotated[int | None, typer.Option(help="Cut the decoder's update to this rank.", min=1)] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tokens a chunk of an index that is built without saying.", min=1)
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Write a trained checkpoint in fewer bytes, each part in the form asked for, and say what that lost."""
    from refrag_core.checkpoint import load_checkpoint
    from refrag_core.packing import pack_checkpoint, pack_options

    options = pack_options(dtype, part or (), adapter_rank, chunk_size)
    report = pack_checkpoint(load_checkpoint(checkpoint), output, options)
    for note in report.notes:
        _warn(f"note: {note}")
    if as_json:
        _print_json(report)
        return
    rows = [
        (
            f"  {name}",
            f"{found.dtype}, {found.weights:,} weights, {_bytes(found.bytes)} ({_bytes(found.bytes_before)} before), "
            f"changed by {found.relative_error:.2%}",
        )
        for name, found in report.parts.items()
    ]
    size = f"{_bytes(report.bytes)} ({_bytes(report.bytes_before)} before)"
    _print_rows([("checkpoint", report.output), ("size", size), *rows, ("fingerprint", report.fingerprint)])


@checkpoint_app.command("average")
def checkpoint_average(
    checkpoints: Annotated[list[str], typer.Argument(help="Folders of trained checkpoints.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", "-o", help="Folder of their mean.", show_default=False)],
    weights: Annotated[
        str, typer.Option(help="A weight for each, separated by commas; default: all equal.", show_default=False)
    ] = "",
    adapter_rank: Annotated[
        int | None, typer.Option(help="Rank of the decoder's update; default: the highest of theirs.", min=1)
    ] = None,
    adapter_signs: Annotated[
        bool | None,
        typer.Option(
            "--adapter-signs/--no-adapter-signs",
            help="Store signs for what the rank leaves out; default: where one of them has signs.",
            show_default=False,
        ),
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Average the weights of trained checkpoints that began from one, as float16; pack it to ship it."""
    from refrag_core.averaging import AverageOptions, average_checkpoints
    from refrag_core.checkpoint import load_checkpoint

    options = AverageOptions(
        weights=_weights("--weights", weights), adapter_rank=adapter_rank, adapter_signs=adapter_signs
    )
    report = average_checkpoints([load_checkpoint(name) for name in checkpoints], output, options)
    if as_json:
        _print_json(report)
        return
    apart = [f", its update {distance:.1%} from the mean" for distance in report.distances] or [""] * len(checkpoints)
    rows = [
        (f"  {name}", f"weight {weight:.3g}{distance}")
        for name, weight, distance in zip(checkpoints, report.weights, apart, strict=True)
    ]
    if report.distances:
        rows.append(("not stored", f"{report.relative_error:.2%} of the mean update"))
    _print_rows([("checkpoint", report.output), *rows, ("fingerprint", report.fingerprint)])


def _weights(option: str, text: str) -> list[float]:
    try:
        return [float(part) for part in text.split(",")] if text else []
    except ValueError as error:
        raise UsageError(f"{option} is {text!r}; expected numbers separated by commas, like 1,2") from error


# --- refrag bench -------------------------------------------------------------------------------------

PlotFile = Annotated[Path | None, typer.Option(help="Draw the result into this PNG file.", show_default=False)]
ReportFile = Annotated[
    Path | None, typer.Option("--output", "-o", help="Write the JSON to this file as well.", show_default=False)
]
ChunkSizes = Annotated[str, typer.Option(help="Tokens a chunk, separated by commas.")]


@bench_app.command("ttft")
def bench_ttft(
    decoder: Annotated[
        str | None,
        typer.Option(
            help="Shape with random weights (tiny, smollm2-135m, llama-3.2-3b, llama-2-7b, llama-3.1-8b, llama-2-13b) "
            "or a model. Default: llama-2-7b on a GPU, smollm2-135m on a CPU.",
            show_default=False,
        ),
    ] = None,
    context: Annotated[
        str | None,
        typer.Option(help="Context tokens, separated by commas. Default: 2048,4096,8192,16384; 1024,2048 on a CPU."),
    ] = None,
    chunk_size: ChunkSizes = "8,16,32",
    expansion_fraction: Annotated[
        str | None,
        typer.Option(help="Fractions of expanded chunks, separated by commas. Default: 0,.1,.25; 0 on a CPU."),
    ] = None,
    passages: Annotated[
        int | None, typer.Option(help="Passages that are searched. Default: 100,000; 5,000 on a CPU.", min=64)
    ] = None,
    encoder: Annotated[
        str, typer.Option(help="Shape of the chunk encoder and the retriever: minilm, roberta-base.")
    ] = "minilm",
    batch: Annotated[
        str | None, typer.Option(help="Prompts at once in the throughput rows. Default: 1,2,4,8; 1,2 on a CPU.")
    ] = None,
    repeats: Annotated[int | None, typer.Option(help="Timed questions a row. Default: 15; 3 on a CPU.", min=1)] = None,
    full: Annotated[bool, typer.Option(help="Measure the decoder reading the full context too.")] = True,
    dtype: Annotated[str | None, typer.Option(help="Of a decoder with random weights: float32, bfloat16.")] = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
    plot: PlotFile = None,
    output: ReportFile = None,
) -> None:
    """Time to the first token of the whole path, by step, beside the same decoder reading the full context."""
    from refrag.benchmarks import ttft
    from refrag_core.devices import resolve_device

    chosen = resolve_device(device)
    on_cpu = chosen == "cpu"
    options = ttft.TtftOptions(
        decoder=decoder or ("smollm2-135m" if on_cpu else "llama-2-7b"),
        context=_whole_numbers("--context", context or ("1024,2048" if on_cpu else "2048,4096,8192,16384")),
        chunk_size=_whole_numbers("--chunk-size", chunk_size),
        expansion_fraction=tuple(_fractions(expansion_fraction or ("0" if on_cpu else "0,.1,.25"), trained=True)),
        passages=passages or (5_000 if on_cpu else 100_000),
        encoder=encoder,
        batch=_whole_numbers("--batch", batch or ("1,2" if on_cpu else "1,2,4,8")),
        repeats=repeats or (3 if on_cpu else 15),
        full=full,
        device=chosen,
        dtype=ttft.dtype_named(dtype),
    )
    _report_bench(ttft, ttft.measure(options), as_json, plot, output)


@bench_app.command("encode")
def bench_encode(
    body: Annotated[
        str | None,
        typer.Option(
            help="Shapes (tiny, minilm, roberta-base, roberta-large) or models, separated by commas. Default: "
            "minilm,roberta-base; minilm on a CPU.",
            show_default=False,
        ),
    ] = None,
    chunk_size: ChunkSizes = "16",
    chunks: Annotated[
        int | None, typer.Option(help="Chunks in a timed run. Default: 1,000,000; 2,000 on a CPU.", min=1)
    ] = None,
    texts: Annotated[
        int | None,
        typer.Option(help="Texts for tokenizers and sentence-transformers. Default: 20,000; 500 on a CPU.", min=10),
    ] = None,
    sweep: Annotated[bool, typer.Option(help="Try every form of attention and batch size instead.")] = False,
    device: Device = "auto",
    as_json: JsonFlag = False,
    plot: PlotFile = None,
    output: ReportFile = None,
) -> None:
    """Chunks and passages a second, beside the bare body and sentence-transformers, and what bounds them."""
    from refrag.benchmarks import encode
    from refrag_core.devices import resolve_device

    chosen = resolve_device(device)
    on_cpu = chosen == "cpu"
    options = encode.EncodeOptions(
        body=tuple((body or ("minilm" if on_cpu else "minilm,roberta-base")).split(",")),
        chunk_size=_whole_numbers("--chunk-size", chunk_size),
        chunks=chunks or (2_000 if on_cpu else 1_000_000),
        texts=texts or (500 if on_cpu else 20_000),
        sweep=sweep,
        device=chosen,
    )
    _report_bench(encode, encode.measure(options), as_json, plot, output)


@bench_app.command("build")
def bench_build(
    megabytes: Annotated[
        float | None, typer.Option(help="MB of text. Default: 1,000; 1 on a CPU.", min=0.1, show_default=False)
    ] = None,
    encoder: Annotated[
        str | None, typer.Option(help="Shape of encoder and retriever. Default: minilm; tiny on a CPU.")
    ] = None,
    chunk_size: Annotated[int, typer.Option(help="Tokens a chunk.", min=1)] = 16,
    workers: Annotated[int | None, typer.Option(help="Tokenizing processes.", show_default=False)] = None,
    shard_bytes: Annotated[int | None, typer.Option(help="Text bytes a shard.", show_default=False)] = None,
    device: Device = "auto",
    as_json: JsonFlag = False,
    plot: PlotFile = None,
    output: ReportFile = None,
) -> None:
    """A whole build from text, and what its slowest stage does by itself."""
    from refrag.benchmarks import build
    from refrag_core.devices import resolve_device

    chosen = resolve_device(device)
    on_cpu = chosen == "cpu"
    options = build.BuildBenchOptions(
        megabytes=megabytes or (1.0 if on_cpu else 1_000.0),
        encoder=encoder or ("tiny" if on_cpu else "minilm"),
        chunk_size=chunk_size,
        workers=workers,
        shard_bytes=shard_bytes,
        device=chosen,
    )
    _report_bench(build, build.measure(options), as_json, plot, output)


@bench_app.command("serve")
def bench_serve(
    index: IndexArgument,
    clients: Annotated[str, typer.Option(help="Clients at the same time, separated by commas.")] = "1,4,16,64",
    requests: Annotated[
        int | None, typer.Option(help="Requests of each row. Default: 4 a client, at least 16.", min=1)
    ] = None,
    new_tokens: Annotated[int, typer.Option(help="Tokens of an answer at most.", min=1)] = 32,
    top_k: TopK = 5,
    policy: Annotated[PolicyName, typer.Option(help="Of the compressed rows.")] = PolicyName.NONE,
    expansion_fraction: Annotated[
        float, typer.Option(help="Of the compressed rows, for policies that take one.", min=0, max=1)
    ] = 0.1,
    slots: Annotated[int, typer.Option(help="Answers decoded at the same time.", min=1)] = 16,
    max_positions: Annotated[int, typer.Option(help="Positions of a prompt with its answer.", min=1)] = 2048,
    turns: Annotated[
        int, typer.Option(help="Turns of each client's conversations; later ones carry those before them.", min=1)
    ] = 1,
    reuse: Reuse = True,
    soak: Annotated[
        float, typer.Option(help="Seconds of one load instead, with the server's memory; 1200 for a real one.", min=0)
    ] = 0.0,
    device: Device = "auto",
    as_json: JsonFlag = False,
    output: ReportFile = None,
) -> None:
    """Requests a second, first tokens and times between tokens under load, compressed against full context."""
    from refrag.benchmarks import serve as bench

    options = bench.ServeBenchOptions(
        index=index,
        clients=_whole_numbers("--clients", clients),
        requests=requests,
        new_tokens=new_tokens,
        top_k=top_k,
        policy=policy.value,
        expansion_fraction=expansion_fraction,
        slots=slots,
        max_positions=max_positions,
        turns=turns,
        device=device,
        soak_seconds=soak,
        server_options=() if reuse else ("--no-reuse",),
    )
    _report_bench(bench, bench.measure(options), as_json, None, output)


def _report_bench(module: Any, report: dict[str, Any], as_json: bool, plot: Path | None, output: Path | None) -> None:
    """What a benchmark found: as a table or JSON on stdout, in files where they are named."""
    if output is not None:
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    if plot is not None and report["rows"]:
        module.plot(report, plot)
    if as_json:
        _print_json(report)
    else:
        print(module.table(report))


def _whole_numbers(option: str, text: str) -> tuple[int, ...]:
    try:
        found = tuple(int(part) for part in text.split(","))
    except ValueError:
        found = ()
    if not found or min(found) < 1:
        raise UsageError(f"{option} is {text!r}; expected whole numbers from 1 on, separated by commas")
    return found


# --- entry --------------------------------------------------------------------------------------------


class _Interrupted(BaseException):
    """Ctrl-C or SIGTERM, by its number. Not KeyboardInterrupt: Typer would make exit code 1 of it without a word."""


def _interrupt(number: int, _: object) -> None:
    raise _Interrupted(number)


def main() -> None:
    """Run the command line; refrag's own errors become one line and an exit code."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _interrupt)
    try:
        app()
    except UsageError as error:
        _warn(f"error: {error}")
        sys.exit(WRONG_USAGE)
    except RefragError as error:
        _warn(f"error: {error}")
        sys.exit(FAILED)
    except OSError as error:
        _warn(f"error: {error}: nothing half-written is left; mend the cause and run the command again")
        sys.exit(FAILED)
    except _Interrupted:
        _warn("interrupted: what is finished is kept; run the same command again to go on")
        sys.exit(INTERRUPTED)


if __name__ == "__main__":
    main()
