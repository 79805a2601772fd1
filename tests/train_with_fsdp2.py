"""A program that runs `attnres` with FSDP2 on CPUs. Accelerate would make DDP of it: it shards on accelerators alone.

It takes the arguments of the command. The group of processes says that it is one of GPUs, and its device stays the CPU.
"""

from __future__ import annotations

import torch
from accelerate import PartialState
from accelerate.utils import DistributedType
from torch.distributed.fsdp import FSDPModule

from attnres.cli import main
from attnres.training.trainer import DepthTrainer


def check_sharded(trainer: DepthTrainer) -> None:
    assert trainer.is_fsdp_enabled
    assert isinstance(trainer.model, FSDPModule), type(trainer.model)
    sharded = {type(p).__name__ for p in trainer.model.parameters()}
    assert sharded == {"DTensor"}, sharded


def prepare_backend(*args: object, **kwargs: object) -> tuple[str, DistributedType]:
    return "gloo", DistributedType.MULTI_GPU


def set_device(self: PartialState) -> None:
    self.device = torch.device("cpu")


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    PartialState._prepare_backend = prepare_backend  # type: ignore[method-assign]
    PartialState.set_device = set_device  # type: ignore[method-assign]
    evaluate = DepthTrainer.evaluate

    def evaluate_sharded(self: DepthTrainer, *args: object, **kwargs: object) -> object:
        check_sharded(self)
        return evaluate(self, *args, **kwargs)

    DepthTrainer.evaluate = evaluate_sharded  # type: ignore[method-assign, assignment]
    main()
