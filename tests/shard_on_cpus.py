"""Makes Accelerate shard models (FSDP2) in processes that have no accelerator, where it would make DDP of it."""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType


def prepare_backend(*args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


def shard_on_cpus() -> None:
    """From now on a group of processes says that it is one of GPUs, and its device stays the CPU."""
    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]
    PartialState.set_device = set_device  # type: ignore[method-assign]
