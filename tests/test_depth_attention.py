from __future__ import annotations

import copy
import weakref
from itertools import accumulate

import pytest
import torch
from reference import ReferenceModel, visible
from reference import read as reference_read
from tiny import FAMILIES, random_tokens, retrofit, tiny_model
from torch import nn
from torch.profiler import ProfilerActivity, profile
from transformers import Trainer
from transformers.trainer_pt_utils import get_parameter_names

from attnres import DepthAttention, depth_attention_two_phase
from attnres.configuration_attnres import DEPTH_ATTENTION_IMPLEMENTATIONS, AttnResError
from attnres.depth_attention import (
    DEPTH_ATTENTION_FUNCTIONS,
    AutoDepthAttention,
    EagerDepthAttention,
    TritonDepthAttention,
    depth_settings,
    depth_weights,
    read,
)
from attnres.depth_attention_two_phase import TwoPhaseDepthAttention
from attnres.depth_state import DepthSettings, DepthState, Norm

IMPLEMENTATIONS = sorted({*DEPTH_ATTENTION_FUNCTIONS} - {"auto", "triton"})  # test_depth_attention_triton.py has these
HIDDEN = 24


def make_sources(count: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    # Sources of very different size, as they are in trained models.
    return tuple((torch.randn(2, 5, HIDDEN, generator=generator) * scale * 4.0**-i).to(dtype) for i in range(count))


def make_settings(block_size: int, mix: str = "mean", implementation: str = "two_phase") -> DepthSettings:
    """Of a model with eight sublayers, thus nine reads."""
    entry = dict(block_size=block_size, mix=mix, key_norm_eps=1e-6, implementation=implementation)
    return depth_settings(entry, num_sublayers=8)


def read_at(
    query: torch.Tensor, values: tuple[torch.Tensor, ...], depth: int, settings: DepthSettings
) -> tuple[torch.Tensor, DepthState]:
    """One read; an implementation with phases has opened the group at the first read of the group."""
    state = DepthState(values[:1])
    for written in range(depth + 1):
        num_sources = 1 + written // settings.block_size
        # Values are finished blocks, so a partial sum is the value of its block from the start.
        partial_sum = values[num_sources] if written % settings.block_size else None
        state = state._replace(sources=values[:num_sources], partial_sum=partial_sum, depth=written)
        hidden_states, state = read(query, state, settings)
    return hidden_states, state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("depth", "block_size"), [(0, 3), (1, 3), (3, 3), (5, 3), (4, 1), (8, 8), (7, 8)])
def test_read_equals_reference(depth, block_size, dtype, mix, implementation) -> None:
    settings = make_settings(block_size, mix, implementation)
    has_partial_sum = depth % block_size > 0
    values = make_sources(1 + depth // block_size + has_partial_sum, dtype)
    query = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    actual, _ = read_at(query, values, depth, settings)

    ones = torch.ones(HIDDEN, dtype=torch.float64)
    expected, weights = reference_read([v.double() for v in values], query[depth].double(), ones, mix, 1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()
    actual_weights = depth_weights(query[depth], values, settings.seen(depth), settings).squeeze(-2)
    torch.testing.assert_close(actual_weights.double(), weights.squeeze(-2), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_queries_give_the_residual_stream(implementation: str) -> None:
    values = make_sources(3)
    hidden_states, _ = read_at(torch.zeros(9, HIDDEN), values, 3, make_settings(2, "sum", implementation))
    torch.testing.assert_close(hidden_states, sum(values), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_values_do_not_overflow(implementation: str) -> None:
    """Statistics are in float32: the square of 300 is beyond float16."""
    values = tuple(torch.full((1, 1, HIDDEN), x, dtype=torch.float16) for x in (300.0, 30000.0))
    settings = make_settings(1, implementation=implementation)
    hidden_states, _ = read_at(torch.zeros(9, HIDDEN), values, 1, settings)
    torch.testing.assert_close(hidden_states, torch.full_like(hidden_states, 15150.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_reach_depth_attention(implementation: str) -> None:
    values = make_sources(4)
    settings = make_settings(3, implementation=implementation)
    query = torch.randn(9, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected, _ = read_at(query, values, 7, settings)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = read_at(query, values, 7, settings)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_chunks_cover_every_token(num_tokens: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are the same whatever the chunk size."""
    generator = torch.Generator().manual_seed(0)
    kwargs = dict(generator=generator, dtype=torch.float64, requires_grad=True)
    sources = [torch.randn(1, num_tokens, HIDDEN, **kwargs) for _ in range(1 + -(-8 // block_size))]
    query = torch.randn(9, HIDDEN, **kwargs)
    settings = make_settings(block_size, "sum")
    results = []
    for size in (2**19, 5 * HIDDEN):
        monkeypatch.setattr(depth_attention_two_phase, "CHUNK_ELEMENTS", size)
        hidden_states, _ = read_at(query, tuple(sources), 8, settings)
        results.append((hidden_states, *torch.autograd.grad(hidden_states.square().sum(), [query, *sources])))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-12, rtol=1e-10)


@pytest.mark.parametrize("group_size", [1, 2, 3, 5, 12])
@pytest.mark.parametrize("block_size", [1, 2, 3, 11])
def test_groups_change_nothing(block_size: int, group_size: int) -> None:
    """Reads over an odd number of sublayers, and their gradients, whatever the number of reads that phase one serves:
    groups of several blocks, blocks of several groups, groups and blocks that end at different sublayers."""
    generator = torch.Generator().manual_seed(0)
    kwargs = dict(generator=generator, dtype=torch.float64, requires_grad=True)
    leaves = [torch.randn(2, 5, HIDDEN, **kwargs) for _ in range(12)]
    queries = torch.randn(12, HIDDEN, **kwargs)
    expected = [
        reference_read(visible(leaves[0], leaves[1 : 1 + i], block_size), queries[i], torch.ones(()), "sum", 1e-6)[0]
        for i in range(12)
    ]
    settings = DepthSettings(block_size, "sum", 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size)
    state, actual = DepthState((leaves[0],)), []
    for index in range(12):
        hidden_states, state = read(queries, state, settings)
        actual.append(hidden_states)
        is_last_of_group = (index + 1) % group_size == 0 or index == 11
        assert bool(state.cache.outputs) != is_last_of_group, "phase one outlives its group"
        if index < 11:
            state = state.write(leaves[index + 1], block_size)
    weights = [torch.randn(2, 5, HIDDEN, generator=generator, dtype=torch.float64) for _ in range(12)]
    results = [
        (*reads, *torch.autograd.grad(reads, [queries, *leaves], weights, retain_graph=True))
        for reads in (actual, expected)
    ]
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, atol=1e-11, rtol=1e-11)


@pytest.mark.parametrize(
    ("num_sublayers", "block_size", "group_size"),
    [(56, 1, 7), (56, 2, 8), (56, 3, 6), (56, 7, 7), (56, 56, 56), (12, 1, 3), (2, 1, 1), (54, 6, 6)],
)
def test_groups_are_about_the_square_root_of_the_depth(num_sublayers: int, block_size: int, group_size: int) -> None:
    entry = dict(block_size=block_size, mix="mean", key_norm_eps=1e-6, implementation="two_phase")
    assert depth_settings(entry, num_sublayers).group_size == group_size


def test_no_state_holds_phase_one_after_the_last_read_of_its_group() -> None:
    """Phase one is the largest part of a state. Who still holds the state in front of the read, holds it."""
    queries, state = torch.randn(4, HIDDEN), DepthState(make_sources(2), depth=2)
    settings = DepthSettings(2, "mean", 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=2)
    state = read(queries, state, settings)[1]
    assert len(state.cache.outputs) == len(state.cache.log_sum_exps) == 2
    found = [weakref.ref(tensor) for tensor in (*state.cache.outputs, *state.cache.log_sum_exps)]
    before = state.write(torch.ones(2, 5, HIDDEN), 2)
    after = read(queries, before, settings)[1]
    assert len(before.cache.outputs) == 2, "a read has changed the state that it was given"
    assert after.cache.inverse_rms is before.cache.inverse_rms
    del state, before
    assert not any(tensor() is not None for tensor in found)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_left_to_add_is_added_before_anything_else(implementation: str) -> None:
    """By the next read, write or scaling; a block is finished at once."""
    queries, (first, second, third, fourth) = torch.randn(9, HIDDEN), make_sources(4)
    settings = make_settings(4, implementation=implementation)
    state = DepthState((first,)).write(second, 4)
    assert state.partial_sum is second
    assert state.addend is None
    left = state.write(third, 4)
    assert left.partial_sum is second
    assert left.addend is third
    at_once = DepthState((first,), second + third, None, 2)
    assert torch.equal(read(queries, left, settings)[0], read(queries, at_once, settings)[0])
    for a, b in ((left.added(), at_once), (left.scaled(2), at_once.scaled(2))):
        assert torch.equal(a.partial_sum, b.partial_sum)
        assert a.addend is None
    for block_size in (4, 3):  # the block stays open, or is closed
        ends = [s.write(fourth, block_size).added() for s in (left, at_once)]
        for a, b in zip(*([*end.sources, end.partial_sum] for end in ends)):
            assert (a is b) if a is None else torch.equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("depth", [0, 1, 4])
@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("is_training", [True, False])
def test_norm_behind_a_read(is_training: bool, mix: str, depth: int, implementation: str) -> None:
    queries, weight = torch.randn(9, HIDDEN), torch.randn(HIDDEN)
    settings = make_settings(4, mix, implementation)
    state = DepthState(make_sources(1 + depth // 4), *make_sources(depth % 4), depth=depth)
    with torch.set_grad_enabled(is_training):
        plain, normed = (read(queries, state, settings, norm)[0] for norm in (None, Norm(weight, 0.5)))
    expected = plain / (plain.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [2**20, 8 * HIDDEN])
@pytest.mark.parametrize("block_size", [2, 4])
def test_merge_takes_the_addition_and_the_norm(block_size, chunk_elements, dtype, mix, monkeypatch) -> None:
    """In inference. The sum is what adding would have given, the result is as near to float64 as rounding allows."""
    monkeypatch.setattr(depth_attention_two_phase, "CHUNK_ELEMENTS", chunk_elements)
    settings = DepthSettings(block_size, mix, 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=4)
    values, weight, queries = make_sources(6, dtype), torch.randn(HIDDEN).to(dtype), torch.randn(9, HIDDEN)
    state, actual = DepthState(values[:1]), []
    with torch.no_grad():
        for output in values[1:]:
            assert settings.implementation.fuses(state)
            hidden_states, state = read(queries, state, settings, Norm(weight, 0.5))
            actual.append(hidden_states)
            state = state.write(output, block_size)
        hidden_states, state = read(queries, state, settings, Norm(weight, 0.5))
    assert state.addend is None
    summed = visible(values[0], values[1:], block_size)
    for a, b in zip((*state.sources, state.partial_sum), summed, strict=True):
        assert torch.equal(a, b)
    actual.append(hidden_states)
    for index, hidden_states in enumerate(actual):
        seen = [value.double() for value in visible(values[0], values[1 : 1 + index], block_size)]
        expected = reference_read(seen, queries[index].double(), torch.ones(()), mix, 1e-6)[0]
        expected = torch.nn.functional.rms_norm(expected, (HIDDEN,), weight.double(), 0.5)
        tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8}[dtype]
        assert hidden_states.dtype == dtype
        assert (hidden_states.double() - expected).abs().max() <= tolerance * expected.abs().max()


@pytest.mark.parametrize("has_norm", [False, True])
@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_one_token_alone_reads_as_among_others(block_size, dtype, mix, has_norm) -> None:
    """Its statistics are numbers of Python."""
    settings = DepthSettings(block_size, mix, 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=4)
    values = make_sources(8, dtype)
    queries = 3 * torch.randn(9, HIDDEN, dtype=torch.promote_types(dtype, torch.float32))
    norm = Norm(torch.randn(HIDDEN).to(dtype), 0.5) if has_norm else None
    tolerance = {torch.float64: 1e-12, torch.float32: 1e-5, torch.bfloat16: 2**-7}[dtype]
    states = [DepthState((values[0],)), DepthState((values[0][:1, 2:3],))]
    with torch.no_grad():
        for output in values[1:]:
            reads, states = zip(*(read(queries, state, settings, norm) for state in states))
            torch.testing.assert_close(reads[1], reads[0][:1, 2:3], atol=tolerance, rtol=tolerance)
            states = [state.write(part, block_size) for state, part in zip(states, (output, output[:1, 2:3]))]


@pytest.mark.parametrize("token_first", [False, True])
@pytest.mark.parametrize("block_size", [1, 2, 4])
def test_a_group_that_one_token_opened_goes_on_otherwise(block_size: int, token_first: bool) -> None:
    """As where some layers of a model are compiled, and some not."""
    two_phase, eager = (
        DepthSettings(block_size, "sum", 1e-6, DEPTH_ATTENTION_FUNCTIONS[name], group_size=4)
        for name in ("two_phase", "eager")
    )
    values, queries = [value[:1, :1] for value in make_sources(8)], torch.randn(9, HIDDEN)
    state = reference = DepthState((values[0],))
    for index, output in enumerate(values[1:]):
        expected, reference = read(queries, reference, eager)
        with torch.set_grad_enabled((index % 2 == 0) != token_first):
            actual, state = read(queries, state, two_phase)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        state, reference = (s.write(output, block_size) for s in (state, reference))


@pytest.mark.parametrize(
    ("size", "query"),
    [(0.0, 1e3), (1e-30, 1e3), (-1e18, 1e3), (1e18, 1.0), (float("inf"), 1e3), (float("nan"), 1e3)],
)  # not (1e18, 1e3): logits of 24000 would tie but for an epsilon, and float32 tells them apart to 1e-3
def test_extreme_values_of_one_token(size: float, query: float) -> None:
    """Come to what they come to among others, without an error."""
    settings = DepthSettings(2, "sum", 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=4)
    queries, norm = torch.full((9, HIDDEN), query), Norm(torch.ones(HIDDEN), 0.0)
    results = []
    for count in (1, 2):
        state = DepthState((torch.ones(1, count, HIDDEN),), torch.full((1, count, HIDDEN), size), depth=1)
        with torch.no_grad():
            results.append([read(queries, state, settings, n)[0][:, :1] for n in (None, norm)])
    torch.testing.assert_close(*results, rtol=1e-5, atol=1e-6, equal_nan=True)


def test_merges_of_training_add_and_norm_apart() -> None:
    """What is recomputed with gradients has to be what was computed without, in re-entrant checkpointing."""
    two_phase, sources = DEPTH_ATTENTION_FUNCTIONS["two_phase"], make_sources(1)
    state, state_with_gradient = DepthState(sources), DepthState((sources[0].clone().requires_grad_(),))
    assert not two_phase.fuses(state)
    with torch.no_grad():
        assert two_phase.fuses(state)
        assert not two_phase.fuses(state_with_gradient)


@torch.no_grad()
def test_compiled_inference_keeps_sources_and_nothing_else() -> None:
    """Neither the terms of finished blocks, nor up-cast copies of sources."""
    hidden, num_blocks, block_size = 256, 4, 3
    embedding = torch.randn(1, 512, hidden, dtype=torch.bfloat16)
    matrices = torch.randn(num_blocks * block_size, hidden, hidden, dtype=torch.bfloat16) / hidden**0.5
    queries = torch.randn(len(matrices) + 1, hidden) / hidden**0.5
    settings = DepthSettings(block_size, "mean", 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], block_size)

    def run(embedding: torch.Tensor, queries: torch.Tensor, *matrices: torch.Tensor) -> torch.Tensor:
        state = DepthState((embedding,))
        for matrix in matrices:
            hidden_states, state = read(queries, state, settings)
            state = state.write(hidden_states @ matrix, block_size)
        return read(queries, state, settings)[0]

    arguments = (embedding, queries, *matrices.unbind(0))
    torch._dynamo.reset()
    compiled = torch.compile(run, fullgraph=True, dynamic=False)
    torch.testing.assert_close(compiled(*arguments), run(*arguments), atol=0.1, rtol=0.05)
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        compiled(*arguments)
    events = (event for event in profiler.profiler.kineto_results.events() if event.name() == "[memory]")
    peak = max(accumulate(event.nbytes() for event in events))
    # The sources; phase one of a block in float32; the terms of the open block, a read and its product.
    assert peak < (num_blocks + 2 * block_size + block_size + 2) * embedding.nbytes


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_scaled_sources_give_scaled_reads(implementation: str) -> None:
    """As a decoder asks for that scales its residual; weights stay, since keys are normalised."""
    queries, leaves = torch.randn(9, HIDDEN), [torch.randn(2, 5, HIDDEN) for _ in range(6)]
    settings = make_settings(2, "sum", implementation)
    reads = []
    for factor in (1.0, 0.25):
        state = DepthState((leaves[0],))
        for index, leaf in enumerate(leaves[1:]):
            _, state = read(queries, state, settings)
            state = state.write(leaf * (factor if index == 4 else 1), 2)
            if index == 3:
                state = state.scaled(factor)
        reads.append(read(queries, state, settings)[0])
    torch.testing.assert_close(reads[1], 0.25 * reads[0], atol=1e-4, rtol=1e-4)


def test_folded_query_is_float32() -> None:
    module = DepthAttention(9, HIDDEN).bfloat16()
    assert module().dtype == torch.float32
    assert module().shape == (9, HIDDEN)
    assert not module().any()
    assert module.double()().dtype == torch.float64


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("block_size", [1, 2, 3, 4, 6, 12])
def test_model_equals_reference(block_size: int, mix: str, implementation: str) -> None:
    """Logits to 1e-5 and gradients to 1e-4 of an independent float64 reference, with non-zero queries."""
    backbone = tiny_model("qwen3", num_hidden_layers=6)
    kwargs = dict(block_size=block_size, mix=mix, depth_attention_implementation=implementation)
    model = retrofit(backbone, random_queries=True, **kwargs)
    reference = ReferenceModel(backbone, model.depth_attention.query, model.depth_attention.key_norm, block_size, mix)
    input_ids = random_tokens()
    outputs = model(input_ids, labels=input_ids, output_depth_attentions=True)
    expected = reference(input_ids, labels=input_ids)
    assert (outputs.logits.double() - expected.logits).abs().max() <= 1e-5
    for actual_weights, expected_weights in zip(outputs.depth_attentions, reference.weights, strict=True):
        torch.testing.assert_close(actual_weights.double(), expected_weights, atol=1e-5, rtol=0)

    outputs.loss.backward()
    expected.loss.backward()
    depth = model.depth_attention
    assert (depth.query.grad.double() - reference.query.grad).abs().max() <= 1e-4
    assert (depth.key_norm.grad.double() - reference.key_norm.grad).abs().max() <= 1e-4
    assert depth.query.grad[1:].abs().amax(-1).min() > 0, "a query without gradient"
    for name, parameter in reference.backbone.named_parameters():
        assert (model.get_parameter(name).grad.double() - parameter.grad).abs().max() <= 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_reference(family: str) -> None:
    backbone = tiny_model(family)
    model = retrofit(backbone, random_queries=True, block_size=3, mix="mean")
    reference = ReferenceModel(backbone, model.depth_attention.query, model.depth_attention.key_norm, 3)
    input_ids = random_tokens()
    with torch.no_grad():
        difference = (model(input_ids).logits.double() - reference(input_ids).logits).abs().max()
    assert difference <= 1e-5


# -- parameters --------------------------------------------------------------------------------------------------------


def random_parameters() -> DepthAttention:
    module = DepthAttention(9, HIDDEN)
    for parameter in module.parameters():
        nn.init.normal_(parameter)
    return module


@pytest.mark.parametrize("swap", [False, True])
@pytest.mark.parametrize(
    "convert",
    [
        lambda module: module.half(),
        lambda module: module.bfloat16(),
        lambda module: module.to(torch.bfloat16),
        lambda module: module.to("cpu", torch.float16),
        lambda module: module.type(torch.float8_e4m3fn),
        lambda module: module.cpu(),
    ],
)
def test_conversions_round_no_parameter(convert, swap: bool) -> None:
    """Of the module itself or of one that holds it; gradients stay with their parameters."""
    expected = random_parameters()
    holder = nn.ModuleList([copy.deepcopy(expected), nn.Linear(2, 2)])
    holder[0]().sum().backward()
    grads = [parameter.grad.clone() for parameter in holder[0].parameters()]
    torch.__future__.set_swap_module_params_on_conversion(swap)
    try:
        convert(holder)
    finally:
        torch.__future__.set_swap_module_params_on_conversion(False)
    for actual, parameter, grad in zip(holder[0].parameters(), expected.parameters(), grads, strict=True):
        assert type(actual) is nn.Parameter
        assert actual.requires_grad
        assert actual.dtype == actual.grad.dtype == torch.float32
        assert torch.equal(actual, parameter)
        assert torch.equal(actual.grad, grad)


def test_parameters_may_be_float64_and_go_anywhere() -> None:
    module = random_parameters()
    assert module.double().query.dtype == torch.float64
    assert module.bfloat16().query.dtype == torch.float64, "rounded to float32"
    assert module.float().query.dtype == torch.float32
    moved = copy.deepcopy(module).to("meta", torch.bfloat16)
    assert moved.query.is_meta
    assert moved.query.dtype == torch.float32
    moved.to_empty(device="cpu").reset_parameters()
    assert moved.query.dtype == torch.float32
    assert not moved.query.any()
    assert (moved.key_norm == 1).all()
    moved.load_state_dict({name: tensor.bfloat16() for name, tensor in module.state_dict().items()})
    assert moved.query.dtype == torch.float32
    with torch.device("meta"):
        assert DepthAttention(9, HIDDEN).query.is_meta


def test_parameters_that_were_assigned_in_half_precision_become_float32() -> None:
    module = DepthAttention(9, HIDDEN)
    module.load_state_dict({name: tensor.bfloat16() for name, tensor in module.state_dict().items()}, assign=True)
    assert module.query.dtype == torch.bfloat16
    assert module().dtype == torch.float32
    assert module.to(torch.bfloat16).query.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_parameters_are_created_in_full_precision(dtype: torch.dtype) -> None:
    default = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        module = DepthAttention(9, HIDDEN)
    finally:
        torch.set_default_dtype(default)
    assert module.query.dtype == torch.promote_types(dtype, torch.float32)
    assert str(module) == f"DepthAttention(reads=9, hidden_size={HIDDEN})"


def test_tools_take_the_parameters_for_those_of_a_norm() -> None:
    """The Trainer leaves them without weight decay; what initialises norms does not look for a weight here."""
    holder = nn.ModuleDict({"depth_attention": DepthAttention(9, HIDDEN), "linear": nn.Linear(2, 2)})
    assert get_parameter_names(holder, [nn.LayerNorm]) == ["linear.weight", "linear.bias"]
    assert Trainer.get_decay_parameter_names(None, holder) == ["linear.weight"]
    assert set(holder["depth_attention"].state_dict()) == {"query", "key_norm"}
    for module in holder.modules():
        if isinstance(module, nn.LayerNorm):
            for parameter in (module.weight, module.bias):
                assert parameter is None


# -- derivatives -------------------------------------------------------------------------------------------------------


def reads_of_stack(implementation: str, queries: torch.Tensor, leaves: list[torch.Tensor]) -> list[torch.Tensor]:
    settings, state, reads = make_settings(3, "sum", implementation), DepthState((leaves[0],)), []
    for leaf in [*leaves[1:], None]:
        hidden_states, state = read(queries, state, settings)
        reads.append(hidden_states)
        state = state if leaf is None else state.write(leaf, 3)
    return reads


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_transforms_of_functions(implementation: str) -> None:
    """`torch.func.grad` over queries and sources."""
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(9, HIDDEN, generator=generator, dtype=torch.float64)
    leaves = torch.randn(6, 2, 5, HIDDEN, generator=generator, dtype=torch.float64)

    def loss(queries: torch.Tensor, leaves: torch.Tensor) -> torch.Tensor:
        return sum(hidden_states.square().sum() for hidden_states in reads_of_stack(implementation, queries, leaves))

    actual = torch.func.grad(loss, argnums=(0, 1))(queries, leaves)
    arguments = [tensor.clone().requires_grad_() for tensor in (queries, leaves)]
    expected = torch.autograd.grad(loss(*arguments), arguments)
    torch.testing.assert_close(actual, expected, atol=1e-10, rtol=1e-10)


def test_the_reference_has_second_derivatives() -> None:
    generator = torch.Generator().manual_seed(0)
    kwargs = dict(generator=generator, dtype=torch.float64, requires_grad=True)
    leaves, queries = [torch.randn(1, 2, 3, **kwargs) for _ in range(4)], torch.randn(9, 3, **kwargs)

    def reads(queries: torch.Tensor, *leaves: torch.Tensor) -> tuple[torch.Tensor, ...]:
        return tuple(reads_of_stack("eager", queries, leaves)[1:])

    assert torch.autograd.gradgradcheck(reads, (queries, *leaves))


@pytest.mark.parametrize("index", [2, 3])
def test_second_derivatives_of_two_phases_are_refused(index: int) -> None:
    """By phase two, and by phase one, which alone makes the first read of a block."""
    leaves = [leaf.requires_grad_() for leaf in make_sources(4)]
    queries = torch.randn(9, HIDDEN, requires_grad=True)
    hidden_states = reads_of_stack("two_phase", queries, leaves)[index]
    (grad,) = torch.autograd.grad(hidden_states.sum(), queries, retain_graph=True)
    assert grad[index].any()
    with pytest.raises(AttnResError, match="'eager'"):
        torch.autograd.grad(hidden_states.sum(), queries, create_graph=True)


# -- names -------------------------------------------------------------------------------------------------------------


def test_every_name_has_its_implementation() -> None:
    assert tuple(DEPTH_ATTENTION_FUNCTIONS) == DEPTH_ATTENTION_IMPLEMENTATIONS
    assert {
        "eager": EagerDepthAttention,
        "two_phase": TwoPhaseDepthAttention,
        "triton": TritonDepthAttention,
        "auto": AutoDepthAttention,
    } == DEPTH_ATTENTION_FUNCTIONS
