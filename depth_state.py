"""TEMPORARY SHIM over the old depth_attention."""
from __future__ import annotations

from typing import Any, NamedTuple

from . import depth_attention as old
from .depth_attention import DepthSettings, Norm, upcast  # noqa: F401


class DepthCache:
    __slots__ = ("inverse_rms", "phase_one", "sources")
    def __init__(self, sources, inverse_rms, phase_one):
        self.sources, self.inverse_rms, self.phase_one = sources, inverse_rms, phase_one

class DepthState(NamedTuple):
    sources: tuple
    partial_sum: Any = None
    addend: Any = None
    depth: int = 0
    cache: Any = None
    def write(self, output, block_size):
        sources, total, addend, depth, cache = self
        output = output.to(sources[0].dtype).contiguous()
        depth += 1
        if total is not None and addend is not None:
            total = total + addend
        closes = depth % block_size == 0
        if total is None:
            total = output
        elif closes:
            total = total + output
        else:
            return DepthState(sources, total, output, depth, cache)
        if closes:
            return DepthState((*sources, old.in_memory(total)), None, None, depth, cache)
        return DepthState(sources, total, None, depth, cache)
    def added(self):
        if self.addend is None or self.partial_sum is None:
            return self
        return self._replace(partial_sum=self.partial_sum + self.addend, addend=None)
    def scaled(self, factor):
        s = self.added()
        sources = tuple((x * factor).to(x.dtype) for x in s.sources)
        return DepthState(sources, None if s.partial_sum is None else (s.partial_sum * factor).to(s.partial_sum.dtype), None, s.depth)
    def flatten(self):
        return (*self.sources, *self[1:])
    @classmethod
    def unflatten(cls, values):
        n = len(values) - 4
        s = cls(values[:n], *values[n:])
        if s.cache is not None and not all(a is b for a, b in zip(s.cache.sources, s.sources)):
            s = s._replace(cache=None)
        return s
    def to_wire(self):
        s = self.added()
        return s.sources if s.partial_sum is None else (*s.sources, s.partial_sum)
    @classmethod
    def from_wire(cls, tensors, depth, block_size):
        n = 1 + depth // block_size
        return cls(tuple(tensors[:n]), *tensors[n:], depth=depth)

def read(queries, state, settings, norm=None):
    c = state.cache
    o = old.DepthState(state.sources, state.partial_sum, state.addend, c and c.inverse_rms, list(c.phase_one) if c else ())
    h, o = old.read(queries, o, state.depth, settings, norm)
    cache = DepthCache(state.sources, o.inverse_rms, tuple(o.phase_one))
    return h, DepthState(o.sources, o.partial_sum, o.addend, state.depth, cache)
