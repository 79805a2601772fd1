"""DenseFormer (arXiv 2402.02622): behind each decoder layer, a weighted average of all outputs so far."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from .layer import BaselineDecoderLayer, join, split


class DepthWeights(nn.Module):
    """The depth-weighted average (DWA) behind one decoder layer: `y = sum_j w_j x_j`.

    Args:
        num_outputs (`int`): how many outputs it averages: the embedding and those of the layers up to this one.

    Attributes:
        weight (`torch.nn.Parameter`): `[outputs]`, float32. It starts as 1 for the last and 0 for the others, which is
            the plain model.
    """

    def __init__(self, num_outputs: int):
        super().__init__()
        self.weight = nn.Parameter(torch.eye(num_outputs)[-1].clone())

    def forward(self, outputs: list[torch.Tensor]) -> torch.Tensor:
        """The average of the outputs, each `[batch, sequence, hidden]`, in their dtype."""
        total = sum(w * x.to(torch.promote_types(x.dtype, w.dtype)) for w, x in zip(self.weight, outputs))
        assert isinstance(total, torch.Tensor)
        return total.to(outputs[0].dtype)


class DenseFormerDecoderLayer(BaselineDecoderLayer):
    """A decoder layer with a [`DepthWeights`] behind it.

    It is handed, and hands on, a tuple: what the next layer reads, then the outputs x_0 (the embedding) to x_i, each
    `[batch, sequence, hidden]`.
    """

    depth_weights: DepthWeights

    def add_parameters(self, hidden_size: int, **options: Any) -> None:
        self.depth_weights = DepthWeights(self.index + 2)

    def forward(self, hidden_states: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(hidden_states, torch.Tensor):  # the embedding
            hidden_states = (hidden_states, hidden_states)
        current, *earlier = hidden_states
        outputs = super().forward(current, *args, **kwargs)
        earlier.append(split(outputs)[0])
        average = self.depth_weights(earlier)
        return join(average if self.is_last else (average, *earlier), outputs)
