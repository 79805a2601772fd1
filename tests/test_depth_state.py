"""What travels between reads: writing, flattening, the wire, and everything that runs layers in a way of its own."""

from __future__ import annotations

import copy
from itertools import product
from typing import Any

import pytest
import torch
from reference import visible
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import CheckpointImpl, checkpoint_wrapper
from torch.utils.checkpoint import checkpoint

from attnres import DepthAttention
from attnres.configuration_attnres import AttnResError
from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS, depth_settings, read
from attnres.depth_state import DepthCache, DepthSettings, DepthState

HIDDEN = 24
IMPLEMENTATIONS = ["eager", "two_phase"]


def random(count: int, *shape: int, **kwargs: Any) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(count)
    return [torch.randn(shape or (2, 5, HIDDEN), generator=generator, **kwargs) for _ in range(count)]


class Layer(nn.Module):
    """Two sublayers of a stack, between flattened states."""

    def __init__(self, settings: DepthSettings):
        super().__init__()
        self.settings = settings
        self.sublayers = nn.ModuleList(nn.Linear(HIDDEN, HIDDEN) for _ in range(2))

    def forward(self, queries: torch.Tensor, values: tuple[Any, ...]) -> tuple[Any, ...]:
        state = DepthState.unflatten(values)
        for sublayer in self.sublayers:
            hidden_states, state = read(queries, state, self.settings)
            state = state.write(sublayer(hidden_states).tanh(), self.settings.block_size)
        return state.flatten()


class Stack(nn.Module):
    """Embedding, four layers, output read."""

    def __init__(self, block_size: int, implementation: str = "two_phase", mix: str = "sum"):
        super().__init__()
        torch.manual_seed(0)
        entry = dict(block_size=block_size, mix=mix, key_norm_eps=1e-6, implementation=implementation)
        self.settings = depth_settings(entry, num_sublayers=8)
        self.embedding = nn.Embedding(32, HIDDEN)
        self.layers = nn.ModuleList(Layer(self.settings) for _ in range(4))
        self.depth_attention = DepthAttention(9, HIDDEN)
        nn.init.normal_(self.depth_attention.query)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        queries, values = self.depth_attention(), DepthState((self.embedding(input_ids),)).flatten()
        for layer in self.layers:
            values = layer(queries, values)
        return read(queries, DepthState.unflatten(values), self.settings)[0]


def random_ids(length: int = 5, batch: int = 2) -> torch.Tensor:
    return torch.randint(32, (batch, length), generator=torch.Generator().manual_seed(length))


def output_and_grads(module: nn.Module) -> list[torch.Tensor]:
    output = module(random_ids())
    return [output, *torch.autograd.grad(output.square().sum(), list(module.parameters()))]


def assert_close(actual: list[torch.Tensor], expected: list[torch.Tensor], tolerance: float = 1e-4) -> None:
    for a, e in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, e, atol=tolerance * max(1.0, e.abs().max().item()), rtol=0)


# -- the state itself --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 2, 3, 7])
def test_writing_sums_blocks(block_size: int) -> None:
    leaves = random(8)
    state = DepthState((leaves[0],))
    for depth, output in enumerate(leaves[1:], start=1):
        before = tuple(state)
        state_before, state = state, state.write(output, block_size)
        assert all(a is b for a, b in zip(state_before, before)), "writing has changed the old state"
        assert state.depth == depth
        assert (state.partial_sum is None) == (depth % block_size == 0)
        expected = visible(leaves[0], leaves[1 : 1 + depth], block_size)
        for a, b in zip(state.visible(), expected, strict=True):
            torch.testing.assert_close(a, b)


def test_writing_leaves_the_old_state_alone() -> None:
    first, second, third = random(3)
    state = DepthState((first,)).write(second, 2)
    closed = state.write(third, 2)
    assert state.partial_sum is second
    assert state.depth == 1
    assert closed.partial_sum is None
    assert closed.depth == 2
    torch.testing.assert_close(closed.sources[1], second + third)


def test_sources_have_the_dtype_of_the_embedding_and_are_contiguous() -> None:
    embedding, output = random(1, dtype=torch.bfloat16)[0], random(1, 2, HIDDEN, 5)[0].transpose(1, 2)
    state = DepthState((embedding,)).write(output, 3).write(output, 3).write(output, 3)
    assert state.sources[1].dtype == torch.bfloat16
    assert state.sources[1].is_contiguous()


def test_state_survives_flattening() -> None:
    """With and without a partial sum, an addend and a cache."""
    sources, tensor = tuple(random(3)), torch.zeros(2, 5)
    cache = DepthCache(sources[:2], tensor, 3, (tensor,), (tensor,))
    for partial_sum, addend, depth, kept in product((None, tensor), (None, tensor), (0, 5), (None, cache)):
        state = DepthState(sources, partial_sum, addend, depth, kept)
        values = state.flatten()
        assert all(a is b for a, b in zip(values, (*sources, partial_sum, addend, depth, kept), strict=True))
        back = DepthState.unflatten(values)
        assert all(a is b for a, b in zip(back.sources, sources, strict=True))
        assert all(a is b for a, b in zip(back[1:], state[1:], strict=True))


def test_a_stale_cache_is_dropped() -> None:
    sources = tuple(random(3))
    values = DepthState(sources, depth=4, cache=DepthCache(sources[:2])).flatten()
    assert DepthState.unflatten(values).cache is values[-1]
    assert DepthState.unflatten((sources[0], sources[1], sources[2].clone(), *values[3:])).cache is values[-1]
    assert DepthState.unflatten((sources[0], sources[1].clone(), sources[2], *values[3:])).cache is None
    assert DepthState.unflatten((sources[0], *values[3:])).cache is None


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_a_source_that_a_hook_replaced_takes_effect_at_once(implementation: str, grad: bool) -> None:
    """Also where phase one of the open group was computed before."""
    stack = Stack(4, implementation)
    hooked, eager = stack.layers[0], Stack(4, "eager")
    for layer in (hooked, eager.layers[0]):
        layer.register_forward_hook(lambda _, args, values: (values[0] * 2 + 1, *values[1:]))
    with torch.set_grad_enabled(grad):
        actual, expected, plain = (module(random_ids()) for module in (stack, eager, Stack(4, "eager")))
    assert_close([actual], [expected])
    assert not torch.allclose(expected, plain, atol=0.1)


def test_scaling_drops_the_cache() -> None:
    sources = tuple(random(2))
    scaled = DepthState(sources, sources[0], sources[1], 3, DepthCache(sources)).scaled(0.5)
    assert scaled.cache is None
    assert scaled.depth == 3
    torch.testing.assert_close(scaled.partial_sum, 0.5 * (sources[0] + sources[1]))


def test_a_read_changes_no_state() -> None:
    """Each state can be read again and again, whatever was computed from it in between."""
    settings, leaves = Stack(2).settings, random(8)
    queries, state, states = random(1, 9, HIDDEN)[0], DepthState((leaves[0],)), []
    for output in leaves[1:]:
        hidden_states, after = read(queries, state, settings)
        states.append((state, state.flatten(), hidden_states))
        state = after.write(output, 2)
    for state, values, hidden_states in states:
        assert all(a is b for a, b in zip(state.flatten(), values, strict=True))
        torch.testing.assert_close(read(queries, state, settings)[0], hidden_states)


# -- the wire ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_a_state_goes_on_after_the_wire(block_size: int, implementation: str) -> None:
    """It has as many tensors as its depth says, and gives the same reads."""
    settings, leaves = Stack(block_size, implementation).settings, random(8)
    queries, state = random(1, 9, HIDDEN)[0], DepthState((leaves[0],))
    for depth, output in enumerate(leaves[1:]):
        tensors = state.to_wire()
        assert len(tensors) == 1 + -(-depth // block_size)
        received = DepthState.from_wire([tensor.clone() for tensor in tensors], depth, block_size)
        assert received.depth == depth
        assert received.addend is received.cache is None
        assert len(received.sources) == len(state.sources)
        hidden_states, state = read(queries, state, settings)
        torch.testing.assert_close(read(queries, received, settings)[0], hidden_states, atol=1e-5, rtol=1e-5)
        state = state.write(output, block_size)


@pytest.mark.parametrize(
    ("count", "depth", "expected"),
    [
        (1, 1, "has 2 tensors on the wire (1 finished sources and a partial sum), but 1 were given"),
        (3, 3, "has 2 tensors on the wire (2 finished sources and no partial sum), but 3 were given"),
        (0, 0, "has 1 tensors on the wire (1 finished sources and no partial sum), but 0 were given"),
    ],
)
def test_a_wrong_number_of_tensors_is_refused(count: int, depth: int, expected: str) -> None:
    with pytest.raises(AttnResError) as error:
        DepthState.from_wire(random(count), depth, block_size=3)
    assert expected in str(error.value)


# -- other ways to run layers ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("wrap", ["checkpoint", "checkpoint_wrapper", "checkpoint_wrapper, re-entrant"])
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 3])
def test_gradients_under_checkpointing(block_size: int, implementation: str, wrap: str) -> None:
    """A layer that is run again finds the state as it was in the first run."""
    stack = Stack(block_size, implementation).double()
    expected = output_and_grads(stack)
    names = [name for name, _ in stack.named_parameters()]
    for index, layer in enumerate(stack.layers):
        if wrap == "checkpoint":
            layer.forward = lambda *args, forward=layer.forward: checkpoint(forward, *args, use_reentrant=False)
        elif wrap == "checkpoint_wrapper":
            stack.layers[index] = checkpoint_wrapper(layer)
        else:  # gives gradients only to tensors that are arguments themselves
            stack.layers[index] = checkpoint_wrapper(Apart(layer), CheckpointImpl.REENTRANT)
            stack.layers[index] = Together(stack.layers[index])
    if "re-entrant" in wrap:
        output = stack(random_ids())
        output.square().sum().backward()
        grads = [parameter.grad for parameter in stack.parameters()]
        assert_close([output, *grads], expected, 1e-10)
        return
    assert_close(output_and_grads(stack), expected, 1e-10)
    assert len(names) == len(expected) - 1


class Apart(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, queries: torch.Tensor, *values: Any) -> tuple[Any, ...]:
        return self.layer(queries, values)


class Together(nn.Module):
    def __init__(self, layer: nn.Module):
        super().__init__()
        self.layer = layer

    def forward(self, queries: torch.Tensor, values: tuple[Any, ...]) -> tuple[Any, ...]:
        return self.layer(queries, *values)


def test_backward_hooks_of_layers_see_gradients() -> None:
    """Such a hook replaces the tensors that a layer gets and gives, so a cache from before is stale."""
    stack = Stack(4).double()
    expected, seen = output_and_grads(stack), []
    for layer in stack.layers:
        layer.register_full_backward_hook(lambda _, grads_in, grads_out: seen.append(grads_out))
    assert_close(output_and_grads(stack), expected, 1e-10)
    assert len(seen) == 4


@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("what", ["layers", "stack"])
@pytest.mark.parametrize("block_size", [1, 3])
def test_compiled_in_one_graph(block_size: int, what: str, grad: bool) -> None:
    """A cache is valid inside of a graph, and from one compiled layer to the next."""
    stack = Stack(block_size)
    with torch.set_grad_enabled(grad):
        expected = output_and_grads(stack) if grad else [stack(random_ids())]
        torch._dynamo.reset()
        crossing: list[DepthState] = []
        if what == "stack":
            stack.compile(fullgraph=True, backend="aot_eager")
        else:
            for layer in stack.layers:
                layer.compile(fullgraph=True, backend="aot_eager")
                layer.register_forward_hook(lambda _, args, values: crossing.append(DepthState.unflatten(values)))
        actual = output_and_grads(stack) if grad else [stack(random_ids())]
    assert_close(actual, expected)
    assert all(state.cache is not None for state in crossing)


@pytest.mark.parametrize("length", [torch.export.Dim("length", min=1, max=4096), torch.export.Dim.DYNAMIC])
@pytest.mark.parametrize("grad", [False, True])
@pytest.mark.parametrize("block_size", [1, 3])
def test_exported_with_any_length(block_size: int, grad: bool, length: Any) -> None:
    """Neither chunks, nor the choice between forms of phase one, nor the read of one token fixes the length."""
    stack, eager = Stack(block_size).double(), Stack(block_size, "eager").double()
    with torch.set_grad_enabled(grad):
        program = torch.export.export(stack, (random_ids(),), dynamic_shapes={"input_ids": {1: length}})
    exported = program.module()
    for tokens in (5, 1, 2, 300):
        assert_close([exported(random_ids(tokens))], [eager(random_ids(tokens))], 1e-10)


def test_a_cache_is_not_taken_apart() -> None:
    """Tools that move or cast the arguments of a layer look into lists, tuples, dicts and dataclasses."""
    cache = DepthCache(tuple(random(2)))
    leaves, _ = torch.utils._pytree.tree_flatten((cache,))
    assert leaves == [cache]
    assert not isinstance(cache, (list, tuple, dict))
    assert not hasattr(cache, "__dataclass_fields__")
    assert not hasattr(cache, "__dict__")


def test_a_stack_can_be_copied() -> None:
    stack = Stack(3)
    assert_close(output_and_grads(copy.deepcopy(stack)), output_and_grads(stack), 0)


def test_settings_name_their_implementation() -> None:
    for name, implementation in DEPTH_ATTENTION_FUNCTIONS.items():
        entry = dict(block_size=2, mix="mean", key_norm_eps=1e-5, implementation=name)
        assert depth_settings(entry, 8) == DepthSettings(2, "mean", 1e-5, implementation, 2)
