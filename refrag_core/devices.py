"""Devices: where a model runs when nobody says."""

from refrag_core.errors import ConfigError


def resolve_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU; any other name stands.

    Raises ConfigError for a name that PyTorch does not know and for a CUDA device that is not there.
    """
    if device == "cpu":
        return device
    import torch

    found = torch.cuda.is_available()
    if device == "auto":
        return "cuda" if found else "cpu"
    try:
        kind = torch.device(device).type
    except RuntimeError as error:
        raise ConfigError(f"device is {device!r}; expected auto, cpu, cuda or cuda:NUMBER") from error
    if kind == "cuda" and not found:
        raise ConfigError(
            f"device is {device!r}, and PyTorch finds no CUDA device; expected cpu or auto on this machine"
        )
    return device
