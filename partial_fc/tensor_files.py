"""Safetensors files that someone else may have made: read whole, with errors that name the file."""

from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor


def load_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors by name: never more bytes than the file has, which safetensors checks its header for.

    Raises ValueError for a file that is damaged, OSError without one.
    """
    with open(path, "rb"):  # safetensors' own error names no file
        pass
    try:
        return load_file(path)
    except (SafetensorError, ValueError, TypeError, LookupError, RuntimeError, OverflowError) as error:
        words = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(f"{path} is no safetensors file that can be read: {words:.300}") from None
