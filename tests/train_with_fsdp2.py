"""A program that runs `attnres` with FSDP2 on CPUs; it takes the arguments of the command."""

from __future__ import annotations

import torch
from shard_on_cpus import shard_on_cpus
from torch.distributed.fsdp import FSDPModule

from attnres.cli import main
from attnres.training.trainer import DepthTrainer


def check_sharded(trainer: DepthTrainer) -> None:
    assert trainer.is_fsdp_enabled
    assert isinstance(trainer.model, FSDPModule), type(trainer.model)
    sharded = {type(p).__name__ for p in trainer.model.parameters()}
    assert sharded == {"DTensor"}, sharded


if __name__ == "__main__":
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo")
    shard_on_cpus()
    evaluate = DepthTrainer.evaluate

    def evaluate_sharded(self: DepthTrainer, *args: object, **kwargs: object) -> object:
        check_sharded(self)
        return evaluate(self, *args, **kwargs)

    DepthTrainer.evaluate = evaluate_sharded  # type: ignore[method-assign, assignment]
    main()
