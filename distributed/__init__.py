"""Beyond one device: pipeline stages with cross-stage caching, on the schedules of `torch.distributed.pipelining`.

>>> from attnres.distributed import next_token_loss, reduce_shared_gradients, split
>>> stages = split(model, num_stages=8, input_shape=(1, 4096))
>>> schedule = ScheduleInterleaved1F1B(stages, n_microbatches=16, loss_fn=next_token_loss)
"""

from __future__ import annotations

from .pipeline import AttnResPipelineStage, next_token_loss, reduce_shared_gradients, shard, split
from .stages import StageModule, cut

__all__ = [
    "AttnResPipelineStage",
    "StageModule",
    "cut",
    "next_token_loss",
    "reduce_shared_gradients",
    "shard",
    "split",
]
