"""Hyper-connections (arXiv 2409.19606) and their manifold-constrained form, mHC (arXiv 2512.24880).

The residual stream becomes n streams X, `[streams, hidden]` per token. Each sublayer F has weights of its read, a
mixing matrix, and weights of its write, all of which depend on X:

    F reads        h = sum_i pre_i X_i
    then           X_i <- sum_j mix_ij X_j + post_i F(h)

Behind the last sublayer the streams are averaged. (The papers add them; the norm behind that makes it the same.) Both
start as the plain model: all streams are equal and each is the plain stream.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import nn

from ...configuration_attnres import AttnResError, UnsupportedBackboneError
from ...depth_state import DepthSettings, Norm, normed, upcast
from ...residual_stream import ResidualStream
from .layer import BaselineDecoderLayer, join, split

SINKHORN_ITERATIONS = 20
INITIAL_SCALE = 0.01  # of all that depends on the streams, in both papers
OTHERS_SHARE = 0.02  # of each stream but one in the first reads of mHC; if all were equal, streams would stay equal


class Coefficients(NamedTuple):
    """Of one sublayer, in float32 (float64 for float64 streams).

    Attributes:
        pre (`torch.Tensor`): `[batch, sequence, streams]`.
        mix (`torch.Tensor`): `[batch, sequence, streams, streams]`; row i makes stream i.
        post (`torch.Tensor`): `[batch, sequence, streams]`.
    """

    pre: torch.Tensor
    mix: torch.Tensor
    post: torch.Tensor


class HyperConnection(nn.Module):
    """Dynamic hyper-connections of one sublayer, Eq. 10 to 13 of arXiv 2409.19606.

    Args:
        num_streams (`int`): n.
        hidden_size (`int`): d.
        sublayer (`int`): index of the sublayer, which reads stream `sublayer % n` at first.
        eps (`float`, defaults to 1e-6): of the norm of the streams.

    Attributes:
        static (`torch.nn.Parameter`): `[n, n + 2]`: for each stream what it gives to the read, to each stream, and what
            it takes of the output.
        dynamic (`torch.nn.Parameter`): `[d, n + 2]`: the same from the normed stream, zero at first.
        norm (`torch.nn.Parameter`): `[d]`.
        scale (`torch.nn.Parameter`): `[2]`: of the dynamic parts of reads and mixing, and of writes.
    """

    def __init__(self, num_streams: int, hidden_size: int, sublayer: int, eps: float = 1e-6):
        super().__init__()
        self.num_streams, self.eps = num_streams, eps
        eye = torch.eye(num_streams)
        self.static = nn.Parameter(
            torch.cat([eye[:, sublayer % num_streams, None], eye, torch.ones(num_streams, 1)], 1)
        )
        self.dynamic = nn.Parameter(torch.zeros(hidden_size, num_streams + 2))
        self.norm = nn.Parameter(torch.ones(hidden_size))
        self.scale = nn.Parameter(torch.full((2,), INITIAL_SCALE))

    def forward(self, streams: torch.Tensor) -> Coefficients:
        """The coefficients for streams `[batch, sequence, n, d]`."""
        streams, n = upcast(streams), self.num_streams
        seen = nn.functional.rms_norm(streams, self.norm.shape, self.norm.to(streams.dtype), self.eps)
        scale = torch.cat([self.scale[:1].expand(n + 1), self.scale[1:]])
        pre, mix, post = (scale * torch.tanh(seen @ self.dynamic.to(seen.dtype)) + self.static).split([1, n, 1], -1)
        return Coefficients(pre[..., 0], mix.transpose(-1, -2), post[..., 0])


class ManifoldConstrainedHyperConnection(nn.Module):
    """mHC of one sublayer, Eq. 7 to 9 of arXiv 2512.24880: reads are sigmoids, writes twice that, and the mixing matrix
    is doubly stochastic, by 20 Sinkhorn-Knopp iterations.

    Args:
        num_streams (`int`): n.
        hidden_size (`int`): d.
        sublayer (`int`): index of the sublayer, which reads mostly stream `sublayer % n` at first.
        eps (`float`, defaults to 1e-6): of the norm of the streams.

    Attributes:
        weight (`torch.nn.Parameter`): `[n * d, n * n + 2 * n]`, the projections of the normed streams, zero at first.
        bias (`torch.nn.Parameter`): `[n * n + 2 * n]`.
        scale (`torch.nn.Parameter`): `[3]`, of reads, writes and mixing.
    """

    def __init__(self, num_streams: int, hidden_size: int, sublayer: int, eps: float = 1e-6):
        super().__init__()
        n = self.num_streams = num_streams
        self.eps = eps
        shares = torch.full((n,), OTHERS_SHARE)
        shares[sublayer % n] = 1 - (n - 1) * OTHERS_SHARE
        mix = torch.full((n, n), -8.0).fill_diagonal_(0.0)
        self.weight = nn.Parameter(torch.zeros(n * hidden_size, n * n + 2 * n))
        self.bias = nn.Parameter(torch.cat([torch.logit(shares, 1e-6), torch.zeros(n), mix.flatten()]))
        self.scale = nn.Parameter(torch.full((3,), INITIAL_SCALE))

    def forward(self, streams: torch.Tensor) -> Coefficients:
        """The coefficients for streams `[batch, sequence, n, d]`."""
        flat, n = upcast(streams).flatten(-2), self.num_streams
        seen = nn.functional.rms_norm(flat, flat.shape[-1:], eps=self.eps)
        sizes = [n, n, n * n]
        scale = torch.repeat_interleave(self.scale, torch.tensor(sizes, device=self.scale.device))
        pre, post, mix = (scale * (seen @ self.weight.to(seen.dtype)) + self.bias).split(sizes, -1)
        return Coefficients(pre.sigmoid(), sinkhorn(mix.unflatten(-1, (n, n))), 2 * post.sigmoid())


def sinkhorn(logits: torch.Tensor) -> torch.Tensor:
    """The doubly stochastic matrix that rows and columns of `exp(logits)`, `[..., n, n]`, are scaled to."""
    for _ in range(SINKHORN_ITERATIONS):  # in logarithms, so that nothing overflows
        logits = logits - logits.logsumexp(-2, keepdim=True)
        logits = logits - logits.logsumexp(-1, keepdim=True)
    return logits.exp()


class StreamsState(NamedTuple):
    """What a [`ResidualStream`] holds here in the place of a `DepthState`.

    Attributes:
        streams (`torch.Tensor`): X, `[batch, sequence, n, hidden]`.
        depth (`int`): sublayers that have written.
        coefficients (`Coefficients`, *optional*): of the sublayer that has read and not yet written.
        cache (`None`): there is nothing to find again at later reads.
    """

    streams: torch.Tensor
    depth: int
    coefficients: Coefficients | None = None
    cache: None = None

    @property
    def sources(self) -> tuple[torch.Tensor, ...]:
        """One stream, `[batch, sequence, hidden]`: the stream is asked for its shape, dtype and device."""
        return (self.streams[..., 0, :],)

    def write(self, output: torch.Tensor, block_size: int) -> StreamsState:
        """The streams after the output of a sublayer, `[batch, sequence, hidden]`, is written to them."""
        if self.coefficients is None:
            raise UnsupportedBackboneError("a decoder layer writes to its residual stream before it has read from it.")
        _, mix, post = self.coefficients
        streams = mix @ self.streams.to(mix.dtype) + post.unsqueeze(-1) * output.to(mix.dtype).unsqueeze(-2)
        return StreamsState(streams.to(self.streams.dtype), self.depth + 1)

    def scaled(self, factor: Any) -> StreamsState:
        """The streams times a factor."""
        return StreamsState((self.streams * factor).to(self.streams.dtype), self.depth)


class StreamsRead:
    """Reads of the streams, in the place of depth attention."""

    @staticmethod
    def covers(settings: DepthSettings) -> bool:
        """There are no variants."""
        return True

    @staticmethod
    def fuses(state: Any) -> bool:
        """Never."""
        return False

    @staticmethod
    def read(queries: Any, state: Any, settings: DepthSettings, norm: Norm | None = None) -> tuple[torch.Tensor, Any]:
        """The read of the next sublayer, with the connections of the layer for `queries`."""
        coefficients = queries[state.depth - queries.first_sublayer](state.streams)
        hidden_states = (coefficients.pre.unsqueeze(-1) * upcast(state.streams)).sum(-2).to(state.streams.dtype)
        return normed(hidden_states, norm), state._replace(coefficients=coefficients)


SETTINGS = DepthSettings(1, "mean", 1e-6, StreamsRead, 1)


class Connections(nn.ModuleList):
    """The connections of the sublayers of one decoder layer."""

    first_sublayer: int

    @property
    def device(self) -> torch.device:
        """Where they are."""
        return next(self.parameters()).device


class HyperConnectedDecoderLayer(BaselineDecoderLayer):
    """A decoder layer that runs on n streams. It is handed, and hands on, the streams, `[batch, sequence, n, hidden]`;
    the first is handed the embedding, `[batch, sequence, hidden]`."""

    connection_class: type[nn.Module] = HyperConnection
    hyper_connections: Connections
    num_streams: int

    def add_parameters(self, hidden_size: int, num_streams: int = 4) -> None:
        first = self.index * self.sublayers
        make = self.connection_class
        self.num_streams = num_streams
        connections = Connections(make(num_streams, hidden_size, first + i) for i in range(self.sublayers))
        connections.first_sublayer = first
        self.hyper_connections = connections

    def forward(self, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        if hidden_states.ndim == 3:  # the embedding
            hidden_states = hidden_states.unsqueeze(-2).expand(-1, -1, self.num_streams, -1)
        connections: Any = self.hyper_connections
        state: Any = StreamsState(hidden_states, connections.first_sublayer)
        entering = ResidualStream(SETTINGS, False, connections, None, state)
        outputs = super().forward(entering, *args, **kwargs)
        leaving = split(outputs)[0]
        if self.structure.replaces_stream and isinstance(leaving, torch.Tensor):
            leaving = entering + (leaving - entering.read())
        if not isinstance(leaving, ResidualStream):
            raise AttnResError(f"{type(self).__name__} returns something else than its residual stream.")
        state = leaving.settle()
        if state.depth != connections.first_sublayer + self.sublayers:
            raise UnsupportedBackboneError(f"{type(self).__name__} did not write {self.sublayers} times.")
        return join(state.streams.mean(-2) if self.is_last else state.streams, outputs)


class ManifoldConstrainedDecoderLayer(HyperConnectedDecoderLayer):
    """The same with mHC."""

    connection_class = ManifoldConstrainedHyperConnection
