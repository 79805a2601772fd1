# Copyright 2026 The attnres authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""What decoder layers run on in the place of their hidden states: the residual stream, spread out over depth."""

from __future__ import annotations

from typing import Any

import torch

from .depth_attention import depth_weights, read
from .depth_state import (
    DepthSettings,
    DepthState,
    Norm,
)


class DepthRecorder:
    """What one forward was asked to return; made for that forward, dropped after it.

    It is no list, tuple or dataclass. Those are rebuilt where the arguments of a layer are moved between devices or
    cast, and what a copy records is lost.

    Attributes:
        hidden_states (`dict[int, torch.Tensor]`): what each decoder layer reads, by the index of its first read.
        depth_attentions (`dict[int, torch.Tensor]`, *optional*): the weights of each read, by its index.
    """

    def __init__(self, records_depth_attentions: bool):
        self.hidden_states: dict[int, torch.Tensor] = {}
        self.depth_attentions: dict[int, torch.Tensor] | None = {} if records_depth_attentions else None


class ResidualStream:
    """What the forward of a decoder layer gets for its `hidden_states`, and takes for the sum that it is used to.

    A child of the layer, as a rule a norm, *reads* the stream from depth. An addition to it, as in `residual +
    hidden_states`, *writes* to depth. Additions without a read between them are one write, so a layer whose attention
    and MLP stand in parallel reads once and writes once. Any other use of the stream is a use of what was read.

    A stream remembers what it read, and is immutable otherwise: an addition returns a new one. Streams live inside one
    call of one decoder layer.
    """

    __slots__ = ("fuses", "output", "queries", "recorder", "settings", "state", "value")

    def __init__(
        self,
        settings: DepthSettings,
        fuses: bool,
        queries: torch.Tensor,
        recorder: DepthRecorder | None,
        state: DepthState,
        output: torch.Tensor | None = None,
    ):
        self.settings, self.fuses, self.queries, self.recorder = settings, fuses, queries, recorder
        self.state = state
        self.output = output  # what was added, not yet written
        self.value: torch.Tensor | None = None

    def settle(self) -> DepthState:
        """Writes what was added, if anything was."""
        if self.output is not None:
            self.state = self.state.write(self.output, self.settings.block_size)
            self.output = None
        return self.state

    def read(self) -> torch.Tensor:
        """The read at this point of depth, `[batch, sequence, hidden]`; the same tensor each time."""
        if self.value is None:
            self.value = self.read_normed(None)
        return self.value

    def read_normed(self, norm: Norm | None) -> torch.Tensor:
        """The read, and the norm behind it if there is one, at once."""
        state, settings, recorder = self.settle(), self.settings, self.recorder
        if recorder is not None and recorder.depth_attentions is not None:
            query = self.queries[state.depth]
            if settings.mix == "gated":
                query = query[:-1]
            visible, indices = state.visible(), settings.seen(state.depth)
            weights = depth_weights(query, [visible[index] for index in indices], indices, settings)
            if settings.num_heads == 1:
                weights = weights.squeeze(-2)
            recorder.depth_attentions[state.depth] = weights  # a recomputed layer records the same again
        hidden_states, self.state = read(self.queries, state, settings, norm)
        return hidden_states

    def follow(self, state: DepthState, output: torch.Tensor | None = None) -> ResidualStream:
        """A stream for the same forward, with another state."""
        return ResidualStream(self.settings, self.fuses, self.queries, self.recorder, state, output)

    def add(self, output: torch.Tensor) -> ResidualStream:
        return self.follow(self.state, output if self.output is None else self.output + output)

    def mul(self, factor: Any) -> ResidualStream:
        """A scaled stream has scaled sources: all that was written so far."""
        return self.follow(self.settle().scaled(factor))

    __add__ = __radd__ = add
    __mul__ = __rmul__ = mul

    @classmethod
    def __torch_function__(cls, function: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Handles `tensor + stream` and `tensor * stream`, and functions of torch that are given a stream."""
        if function in STREAM_OPERATORS:
            stream, other = args if isinstance(args[0], cls) else reversed(args)
            return stream.add(other) if function is torch.Tensor.add else stream.mul(other)
        args, kwargs = read_streams(args, kwargs or {})
        return function(*args, **kwargs)

    def to(self, dtype: torch.dtype) -> Any:
        return self if dtype == self.dtype else self.read().to(dtype)

    @property
    def shape(self) -> torch.Size:
        return self.state.sources[0].shape

    @property
    def dtype(self) -> torch.dtype:
        return self.state.sources[0].dtype

    @property
    def device(self) -> torch.device:
        return self.state.sources[0].device

    def __getattr__(self, name: str) -> Any:
        if name.startswith("_"):
            raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")
        return getattr(self.read(), name)


STREAM_OPERATORS = (torch.Tensor.add, torch.Tensor.mul)


def read_streams(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The same arguments, with each stream among them replaced by its read."""
    args = tuple(arg.read() if isinstance(arg, ResidualStream) else arg for arg in args)
    return args, {name: arg.read() if isinstance(arg, ResidualStream) else arg for name, arg in kwargs.items()}
