"""Every error that refrag raises on purpose.

Each takes one positional message that says what was found, what was expected and what to do, so that an
instance survives pickling when an engine carries it from a worker to the driver.
"""

__all__ = [
    "AccountingError",
    "ClusterError",
    "CommitConflictError",
    "ConfigError",
    "CorpusChangedError",
    "CorpusError",
    "CorruptIndexError",
    "DrainingError",
    "EngineError",
    "FilterError",
    "FingerprintMismatchError",
    "IndexLockedError",
    "IndexNotFoundError",
    "MissingExtraError",
    "MissingScoresError",
    "ModelNotFoundError",
    "ObjectStoreError",
    "QueueFullError",
    "RecallGateError",
    "RefragError",
    "RequestTimeoutError",
    "RunLockedError",
    "SessionError",
    "SignatureError",
    "StageError",
    "TrainingDivergedError",
    "TrainingStateError",
    "UnknownModelError",
    "UnsupportedDecoderError",
    "UntrainedProjectionError",
    "UsageError",
]


class RefragError(Exception):
    """Base of all: the command line prints the message alone and exits 1."""


class UsageError(RefragError):
    """The request itself cannot be served as it was put: the command line exits 2."""


class ConfigError(UsageError):
    """A setting is out of range, unknown, or contradicts another."""


class FilterError(UsageError):
    """A metadata filter is no condition over the fields of the index."""


class MissingExtraError(UsageError):
    """An optional dependency is not installed."""


class MissingScoresError(UsageError):
    """The perplexity policy was asked for on an index without the score column."""


class SessionError(UsageError):
    """A file is no saved conversation, or one of another index or checkpoint."""


class UntrainedProjectionError(UsageError):
    """Compressed chunks were asked for with a projection that was never trained."""


class UnknownModelError(UsageError):
    """A request names a model that the server does not have."""


class CorpusError(RefragError):
    """The corpus as a whole cannot be read (a bad record is quarantined instead)."""


class CorpusChangedError(CorpusError):
    """A document changed between the scan and the read of the same build."""


class ModelNotFoundError(RefragError):
    """A model reference resolves to nothing on this machine."""


class UnsupportedDecoderError(RefragError):
    """The decoder cannot take embeddings in place of token ids."""


class FingerprintMismatchError(RefragError):
    """A component differs from the one that the index was built with."""


class IndexNotFoundError(RefragError):
    """No index, or no committed generation, at this path."""


class CorruptIndexError(RefragError):
    """A file of the index is missing, truncated, altered or not of this format."""


class SignatureError(CorruptIndexError):
    """A bundle that must be signed is not, or its signature does not fit its bytes or the key."""


class IndexLockedError(RefragError):
    """Another live process is building this index."""


class CommitConflictError(RefragError):
    """Another builder committed the version that this run was going to commit."""


class ObjectStoreError(RefragError):
    """An object store cannot be reached, refuses the request, or keeps failing."""


class EngineError(RefragError):
    """A decoder engine failed, was closed, or cannot be reached."""


class QueueFullError(RefragError):
    """A server has as many requests waiting as it takes."""


class DrainingError(RefragError):
    """A server has been told to stop and takes no more requests."""


class RequestTimeoutError(RefragError):
    """A request took longer than the server gives it."""


class StageError(RefragError):
    """A stage failed on a shard for a reason that no single record explains."""


class ClusterError(RefragError):
    """A cluster cannot be reached, or lacks room, a folder or software that the run needs on its nodes."""


class TrainingDivergedError(RefragError):
    """A training loss is not a number any more."""


class RunLockedError(RefragError):
    """Another live process trains in this folder."""


class TrainingStateError(RefragError):
    """The saved state of a training run is damaged, or not of its model."""


class AccountingError(RefragError):
    """Documents in and documents accounted for differ."""


class RecallGateError(RefragError):
    """The vector index finds fewer of the true neighbours than the gate asks for."""
