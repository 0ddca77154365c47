"""Projection φ from the encoder's space to the decoder's input embeddings."""

import math

import torch
from torch import Tensor, nn

_PROBES = 256
_EPSILON = 1e-6


class Projection(nn.Module):
    """Two-layer MLP, hidden = output = d_dec (REFRAG, arXiv:2509.01092, section 2; see also its appendix).

    The input is brought to unit RMS first, without parameters, so that one initialisation suits bodies
    whose pooled vectors differ in scale by orders of magnitude.

    Args:
        d_enc: width of a chunk embedding.
        d_dec: width of the decoder's input embeddings.
    """

    def __init__(self, d_enc: int, d_dec: int) -> None:
        super().__init__()
        self.hidden = nn.Linear(d_enc, d_dec)
        self.output = nn.Linear(d_dec, d_dec)

    def forward(self, chunk_embeddings: Tensor) -> Tensor:
        """`[…, d_enc]` of any float dtype → `[…, d_dec]` in the weights' dtype."""
        given = chunk_embeddings.to(torch.float32)
        scale = torch.rsqrt(given.square().mean(dim=-1, keepdim=True) + _EPSILON)
        inner = nn.functional.gelu(self.hidden((given * scale).to(self.hidden.weight.dtype)))
        projected: Tensor = self.output(inner)
        return projected


def initialise_projection(d_enc: int, d_dec: int, *, output_rms: float, seed: int) -> Projection:
    """A projection whose outputs have RMS `output_rms` (the decoder's `embedding_rms`), equal for equal seeds."""
    generator = torch.Generator().manual_seed(seed)
    projection = Projection(d_enc, d_dec)
    with torch.no_grad():
        for layer in (projection.hidden, projection.output):
            layer.weight.normal_(0.0, 1.0 / math.sqrt(layer.in_features), generator=generator)
            layer.bias.zero_()
        probes = torch.randn((_PROBES, d_enc), generator=generator)
        projection.output.weight.mul_(output_rms / projection(probes).square().mean().sqrt())
    return projection.eval()
