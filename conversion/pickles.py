"""Pickled weights, read without running code of theirs."""

from __future__ import annotations

import zipfile
from pathlib import Path

import torch

from .errors import ConversionError

MAX_VIEWS = 4  # how many views may share a stored element; tied weights are two


def read_pickle(path: Path) -> dict[str, torch.Tensor]:
    """Reads a pickled state dict without running code of it.

    Args:
        path (`Path`): a file written by `torch.save`.

    Returns:
        `dict`: contiguous tensors of which no two share memory, as safetensors needs them.

    Raises:
        ConversionError: the file is damaged, needs more than `weights_only`, or holds something else than tensors.
    """
    is_zip = zipfile.is_zipfile(path)
    try:
        if is_zip:
            with zipfile.ZipFile(path) as archive:
                if any(member.compress_type != zipfile.ZIP_STORED for member in archive.infolist()):
                    raise ValueError("it is compressed, as `torch.save` never does")
        contents = torch.load(path, map_location="cpu", weights_only=True, mmap=is_zip)
    except Exception as error:  # the unpickler raises anything for a damaged file
        raise ConversionError(
            f"{path} cannot be read with weights_only, and is not read otherwise: {type(error).__name__}: {error}"
        ) from error
    if not isinstance(contents, dict) or not contents:
        raise ConversionError(f"{path} holds a {type(contents).__name__}; a dict of tensors was expected.")
    tensors: dict[str, torch.Tensor] = {}
    seen: set[int] = set()
    most = MAX_VIEWS * path.stat().st_size + 2**20
    num_bytes = 0
    for name, tensor in contents.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor) or tensor.layout != torch.strided:
            raise ConversionError(f"{path}: {name!r} is a {type(tensor).__name__}; a dense tensor was expected.")
        num_bytes += tensor.numel() * tensor.element_size()
        if num_bytes > most:
            raise ConversionError(
                f"{path}: with {name[:200]!r} its tensors have {num_bytes} bytes, {MAX_VIEWS} times what it stores. "
                "They are views that repeat themselves; save them as tensors of their own."
            )
        storage = tensor.untyped_storage().data_ptr()
        tensors[name] = (
            tensor.contiguous() if storage not in seen else tensor.clone(memory_format=torch.contiguous_format)
        )
        seen.add(storage)
    return tensors
