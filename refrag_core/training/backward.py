"""Losses and gradients of micro-batches: computed one kernel after the other, or replayed as captured CUDA graphs.

A small decoder's step is some thousand kernels, which take longer to launch than to run. Training batches have
few shapes, so every shape's forward and backward pass is captured once and replayed as a whole.
"""

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor

from refrag_core.captured import recorded_into

Inputs = tuple[Tensor, ...]
Losses = tuple[Tensor, Tensor, Tensor]
"""Cross-entropy, divergence and the readout's cross-entropy (0 where there is none), without gradients."""
Compute = Callable[[Inputs], tuple[Tensor, Losses]]
"""Inputs → the loss that has gradients, and what is reported of it."""

_WARM_UP = 2


class Gradients:
    """The gradients of all weights in one buffer, of which every weight's `grad` is a view.

    One sum over processes, one norm and one clearing then serve all of them, and a captured graph always finds
    them in the same place.

    Args:
        weights: float32, on one device.
    """

    def __init__(self, weights: Iterable[Tensor]) -> None:
        self.weights = list(weights)
        sizes = [weight.numel() for weight in self.weights]
        device = self.weights[0].device if self.weights else None
        self.flat = torch.zeros(sum(sizes), dtype=torch.float32, device=device)
        parts = torch.split(self.flat, sizes)
        self._views = [part.view_as(weight) for weight, part in zip(self.weights, parts, strict=True)]
        for weight, view in zip(self.weights, self._views, strict=True):
            weight.grad = view

    def add(self, loss: Tensor) -> None:
        """Add the gradients of `loss`; weights that it does not depend on are left out."""
        found = torch.autograd.grad(loss, self.weights, allow_unused=True)
        given = [(view, new) for view, new in zip(self._views, found, strict=True) if new is not None]
        torch._foreach_add_([view for view, _ in given], [new for _, new in given])

    def clip(self, limit: float) -> None:
        """Scale all of them down where their norm is above `limit`."""
        self.flat.mul_((limit / (torch.linalg.vector_norm(self.flat) + 1e-6)).clamp_max(1.0))

    def clear(self) -> None:
        """Zeros."""
        self.flat.zero_()


class Backward:
    """Adds a micro-batch's gradients to `gradients`.

    Args:
        scale: of the loss.
    """

    def __init__(self, gradients: Gradients, scale: float) -> None:
        self._gradients = gradients
        self._scale = scale

    @property
    def shapes(self) -> int:
        """Kinds of micro-batches that were made ready so far."""
        return 0

    def __call__(self, compute: Compute, inputs: Inputs, key: object) -> Losses:  # noqa: ARG002
        """The losses of one micro-batch. Equal keys and shapes of inputs mean equal computations."""
        return self._add(compute, inputs)

    def _add(self, compute: Compute, inputs: Inputs) -> Losses:
        total, reported = compute(inputs)
        self._gradients.add(total * self._scale)
        return reported


class CapturedBackward(Backward):
    """The same by captured CUDA graphs. `compute` must not wait for the device, nor depend on values of its inputs."""

    def __init__(self, gradients: Gradients, scale: float) -> None:
        super().__init__(gradients, scale)
        self._pool = torch.cuda.graph_pool_handle()
        self._captured: dict[object, tuple[torch.cuda.CUDAGraph, Inputs, Losses]] = {}

    @property
    def shapes(self) -> int:
        """Kinds of micro-batches that were captured so far."""
        return len(self._captured)

    def __call__(self, compute: Compute, inputs: Inputs, key: object) -> Losses:
        """The losses of one micro-batch."""
        name = (key, tuple(tensor.shape for tensor in inputs))
        if name not in self._captured:
            self._captured[name] = self._capture(compute, inputs)
        graph, static, reported = self._captured[name]
        for own, new in zip(static, inputs, strict=True):
            own.copy_(new, non_blocking=True)
        graph.replay()
        # The next replay overwrites what this one reports.
        cross_entropy, divergence, readout = (loss.clone() for loss in reported)
        return cross_entropy, divergence, readout

    def _capture(self, compute: Compute, inputs: Inputs) -> tuple[torch.cuda.CUDAGraph, Inputs, Losses]:
        static = tuple(torch.empty_like(tensor).copy_(tensor) for tensor in inputs)
        self._warm_up(compute, static)
        graph = torch.cuda.CUDAGraph()
        with recorded_into(graph, self._pool):
            reported = self._add(compute, static)
        return graph, static, reported

    def _warm_up(self, compute: Compute, inputs: Inputs) -> None:
        """Compiles, tunes and allocates what must not happen while capturing; its gradients are dropped."""
        stream = torch.cuda.Stream()  # type: ignore[no-untyped-call]
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(_WARM_UP):
                total, _ = compute(inputs)
                torch.autograd.grad(total, self._gradients.weights, allow_unused=True)
        torch.cuda.current_stream().wait_stream(stream)


def upload(arrays: Sequence[Tensor], device: torch.device) -> Inputs:
    """CPU tensors on `device`, without waiting for it where they are in pinned memory."""
    return tuple(array.to(device, non_blocking=True) for array in arrays)
