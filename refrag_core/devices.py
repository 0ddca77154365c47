"""Devices: where a model runs when nobody says."""


def resolve_device(device: str) -> str:
    """`auto` is the first CUDA device where there is one, else the CPU; any other name stands."""
    if device != "auto":
        return device
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"
