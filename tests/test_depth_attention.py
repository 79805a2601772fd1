from __future__ import annotations

import weakref
from itertools import accumulate, product

import pytest
import torch
from reference import ReferenceModel, visible
from reference import read as reference_read
from tiny import FAMILIES, random_tokens, retrofit, tiny_model
from torch.profiler import ProfilerActivity, profile

from attnres import AttnResConfig, DepthAttention, depth_attention
from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS, DepthSettings, DepthState, Norm, depth_weights, read

IMPLEMENTATIONS = sorted({*DEPTH_ATTENTION_FUNCTIONS} - {"auto", "triton"})  # test_depth_attention_triton.py has these
HIDDEN = 24


def make_sources(count: int, dtype: torch.dtype = torch.float32, scale: float = 1.0) -> tuple[torch.Tensor, ...]:
    generator = torch.Generator().manual_seed(count)
    # Sources of very different size, as they are in trained models.
    return tuple((torch.randn(2, 5, HIDDEN, generator=generator) * scale * 4.0**-i).to(dtype) for i in range(count))


def make_config(block_size: int, **kwargs: object) -> AttnResConfig:
    backbone = dict(model_type="qwen3", hidden_size=HIDDEN, num_hidden_layers=4, num_attention_heads=4)
    return AttnResConfig(backbone_config=backbone, block_size=block_size, **kwargs)


def read_at(
    query: torch.Tensor, values: tuple[torch.Tensor, ...], num_written: int, config: AttnResConfig
) -> tuple[torch.Tensor, DepthState]:
    """One read; an implementation with phases has opened the group at the first read of the group."""
    settings = DepthSettings.of(config)
    state = DepthState(values[:1])
    for written in range(num_written + 1):
        num_sources = 1 + written // config.block_size
        # Values are finished blocks, so a partial sum is the value of its block from the start.
        partial_sum = values[num_sources] if written % config.block_size else None
        state = state._replace(sources=values[:num_sources], partial_sum=partial_sum)
        hidden_states, state = read(query, state, written, settings)
    return hidden_states, state


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("num_written", "block_size"), [(0, 3), (1, 3), (3, 3), (5, 3), (4, 1), (8, 8), (7, 8)])
def test_read_equals_reference(num_written, block_size, dtype, mix, implementation) -> None:
    config = make_config(block_size, mix=mix, depth_attention_implementation=implementation)
    has_partial_sum = num_written % block_size > 0
    values = make_sources(1 + num_written // block_size + has_partial_sum, dtype)
    query = torch.randn(config.num_reads, HIDDEN, generator=torch.Generator().manual_seed(0))
    actual, state = read_at(query, values, num_written, config)

    ones = torch.ones(HIDDEN, dtype=torch.float64)
    expected, weights = reference_read([v.double() for v in values], query[num_written].double(), ones, mix, 1e-6)
    tolerance = {torch.float32: 1e-6, torch.bfloat16: 2**-8, torch.float16: 2**-11}[dtype]
    assert actual.dtype == dtype
    assert (actual.double() - expected).abs().max() <= tolerance * expected.abs().max()
    actual_weights = depth_weights(query[num_written], state.sources, state.partial_sum, 1e-6)
    torch.testing.assert_close(actual_weights.double(), weights, atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_zero_queries_give_the_residual_stream(implementation: str) -> None:
    values = make_sources(3)
    config = make_config(2, mix="sum", depth_attention_implementation=implementation)
    hidden_states, _ = read_at(torch.zeros(config.num_reads, HIDDEN), values, 3, config)
    torch.testing.assert_close(hidden_states, sum(values), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_large_values_do_not_overflow(implementation: str) -> None:
    """Statistics are in float32: the square of 300 is beyond float16."""
    values = tuple(torch.full((1, 1, HIDDEN), x, dtype=torch.float16) for x in (300.0, 30000.0))
    config = make_config(1, depth_attention_implementation=implementation)
    hidden_states, _ = read_at(torch.zeros(config.num_reads, HIDDEN), values, 1, config)
    torch.testing.assert_close(hidden_states, torch.full_like(hidden_states, 15150.0))


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_autocast_does_not_reach_depth_attention(implementation: str) -> None:
    values = make_sources(4)
    config = make_config(3, depth_attention_implementation=implementation)
    query = torch.randn(config.num_reads, HIDDEN, generator=torch.Generator().manual_seed(0))
    expected, _ = read_at(query, values, 7, config)
    with torch.autocast("cpu", torch.bfloat16):
        actual, _ = read_at(query, values, 7, config)
    assert torch.equal(actual, expected)


@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("num_tokens", [1, 7, 300])
def test_chunks_cover_every_token(num_tokens: int, block_size: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Forward and backward are the same whatever the chunk size."""
    generator = torch.Generator().manual_seed(0)
    kwargs = dict(generator=generator, dtype=torch.float64, requires_grad=True)
    sources = [torch.randn(1, num_tokens, HIDDEN, **kwargs) for _ in range(1 + -(-8 // block_size))]
    query = torch.randn(9, HIDDEN, **kwargs)
    config = make_config(block_size, mix="sum", depth_attention_implementation="two_phase")
    results = []
    for size in (2**19, 5 * HIDDEN):
        monkeypatch.setattr(depth_attention, "CHUNK_ELEMENTS", size)
        hidden_states, _ = read_at(query, tuple(sources), 8, config)
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
        hidden_states, state = read(queries, state, index, settings)
        actual.append(hidden_states)
        assert bool(state.phase_one) == ((index + 1) % group_size != 0), "phase one outlives its group"
        if index < 11:
            state = state.write(leaves[index + 1], closes_block=(index + 1) % block_size == 0)
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
    backbone = dict(model_type="qwen3", num_hidden_layers=num_sublayers // 2)
    settings = DepthSettings.of(AttnResConfig(backbone_config=backbone, block_size=block_size))
    assert settings.group_size == group_size


def test_state_survives_flattening() -> None:
    """With and without a partial sum, something to add to it, 1 / rms and phase one."""
    sources, tensor = make_sources(3), torch.zeros(2, 5)
    for optional in product((None, tensor), repeat=3):
        for phase_one in ((), [tensor, tensor + 1]):
            state = DepthState(sources, *optional, phase_one)
            values = state.flatten()
            assert all(a is b for a, b in zip(values, (*sources, *optional, phase_one), strict=True))
            back = DepthState.unflatten(values)
            assert all(a is b for a, b in zip(back.sources, sources, strict=True))
            assert all(a is b for a, b in zip(back[1:], state[1:], strict=True))


def test_nobody_holds_phase_one_after_the_last_read_of_its_group() -> None:
    """It is the largest part of a state; callers of decoder layers hold the states that they gave to them."""
    queries, state = torch.randn(4, HIDDEN), DepthState(make_sources(2))
    settings = DepthSettings(2, "mean", 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=2)
    held = read(queries, state, 2, settings)[1]
    assert len(held.phase_one) == 4
    outputs = [weakref.ref(tensor) for tensor in held.phase_one]
    read(queries, held.write(torch.ones(2, 5, HIDDEN), closes_block=False), 3, settings)
    assert not any(output() is not None for output in outputs)


def test_writing_leaves_the_old_state_alone() -> None:
    first, second, third = make_sources(3)
    state = DepthState((first,)).write(second, closes_block=False)
    closed = state.write(third, closes_block=True)
    assert state.partial_sum is second
    assert closed.partial_sum is None
    torch.testing.assert_close(closed.sources[1], second + third)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_what_is_left_to_add_is_added_before_anything_else(implementation: str) -> None:
    """By the next read, write or scaling; a block is finished at once."""
    queries, (first, second, third, fourth) = torch.randn(9, HIDDEN), make_sources(4)
    settings = DepthSettings.of(make_config(4, depth_attention_implementation=implementation))
    state = DepthState((first,)).write(second, closes_block=False, at_once=False)
    assert state.partial_sum is second
    assert state.addend is None
    left = state.write(third, closes_block=False, at_once=False)
    assert left.partial_sum is second
    assert left.addend is third
    at_once = state.write(third, closes_block=False)
    assert torch.equal(read(queries, left, 2, settings)[0], read(queries, at_once, 2, settings)[0])
    for a, b in ((left.added(), at_once), (left.scaled(2), at_once.scaled(2))):
        assert torch.equal(a.partial_sum, b.partial_sum)
        assert a.addend is None
    for closes_block in (False, True):
        ends = [s.write(fourth, closes_block, at_once=False).added() for s in (left, at_once)]
        for a, b in zip(*([*end.sources, end.partial_sum] for end in ends)):
            assert (a is b) if a is None else torch.equal(a, b)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("num_written", [0, 1, 4])
def test_norm_behind_a_read(num_written: int, implementation: str) -> None:
    queries, weight = torch.randn(9, HIDDEN), torch.randn(HIDDEN)
    settings = DepthSettings.of(make_config(4, depth_attention_implementation=implementation))
    state = DepthState(make_sources(1 + num_written // 4), *make_sources(num_written % 4))
    plain, normed = (read(queries, state, num_written, settings, norm)[0] for norm in (None, Norm(weight, 0.5)))
    expected = plain / (plain.square().mean(-1, keepdim=True) + 0.5).sqrt() * weight
    torch.testing.assert_close(normed, expected)


@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("chunk_elements", [2**20, 8 * HIDDEN])
@pytest.mark.parametrize("block_size", [2, 4])
def test_merge_takes_the_addition_and_the_norm(block_size, chunk_elements, dtype, mix, monkeypatch) -> None:
    """In inference. The sum is what adding would have given, the result is as near to float64 as rounding allows."""
    monkeypatch.setattr(depth_attention, "CHUNK_ELEMENTS", chunk_elements)
    settings = DepthSettings(block_size, mix, 1e-6, DEPTH_ATTENTION_FUNCTIONS["two_phase"], group_size=4)
    values, weight, queries = make_sources(6, dtype), torch.randn(HIDDEN).to(dtype), torch.randn(9, HIDDEN)
    state, actual = DepthState(values[:1]), []
    with torch.no_grad():
        for index, output in enumerate(values[1:]):
            assert settings.implementation.fuses(state)
            hidden_states, state = read(queries, state, index, settings, Norm(weight, 0.5))
            actual.append(hidden_states)
            state = state.write(output, (index + 1) % block_size == 0, at_once=False)
        hidden_states, state = read(queries, state, 5, settings, Norm(weight, 0.5))
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
        for index, output in enumerate(values[1:]):
            reads, states = zip(*(read(queries, state, index, settings, norm) for state in states))
            torch.testing.assert_close(reads[1], reads[0][:1, 2:3], atol=tolerance, rtol=tolerance)
            closes_block = (index + 1) % block_size == 0
            outputs = (output, output[:1, 2:3])
            states = [state.write(part, closes_block, at_once=False) for state, part in zip(states, outputs)]


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
        expected, reference = read(queries, reference, index, eager)
        with torch.set_grad_enabled((index % 2 == 0) != token_first):
            actual, state = read(queries, state, index, two_phase)
        torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)
        closes_block = (index + 1) % block_size == 0
        state, reference = (s.write(output, closes_block, at_once=False) for s in (state, reference))


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
        states = DepthState((torch.ones(1, count, HIDDEN),), torch.full((1, count, HIDDEN), size))
        with torch.no_grad():
            results.append([read(queries, states, 1, settings, n)[0][:, :1] for n in (None, norm)])
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
        for num_written, matrix in enumerate(matrices):
            hidden_states, state = read(queries, state, num_written, settings)
            state = state.write(hidden_states @ matrix, (num_written + 1) % block_size == 0)
        return read(queries, state, len(matrices), settings)[0]

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
    settings = DepthSettings.of(make_config(2, mix="sum", depth_attention_implementation=implementation))
    reads = []
    for factor in (1.0, 0.25):
        state = DepthState((leaves[0],))
        for index, leaf in enumerate(leaves[1:]):
            _, state = read(queries, state, index, settings)
            state = state.write(leaf * (factor if index == 4 else 1), closes_block=(index + 1) % 2 == 0)
            if index == 3:
                state = state.scaled(factor)
        reads.append(read(queries, state, 5, settings)[0])
    torch.testing.assert_close(reads[1], 0.25 * reads[0], atol=1e-4, rtol=1e-4)


def test_folded_query_is_float32() -> None:
    depth_attention = DepthAttention(make_config(2)).bfloat16()
    assert depth_attention().dtype == torch.float32
    assert depth_attention().shape == (9, HIDDEN)
    assert not depth_attention().any()


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
    expected_grads = dict(reference.backbone.named_parameters())
    for name, parameter in model.backbone.named_parameters():
        assert (parameter.grad.double() - expected_grads[name].grad).abs().max() <= 1e-4, name


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_equals_reference(family: str) -> None:
    backbone = tiny_model(family)
    model = retrofit(backbone, random_queries=True, block_size=3, mix="mean")
    reference = ReferenceModel(backbone, model.depth_attention.query, model.depth_attention.key_norm, 3)
    input_ids = random_tokens()
    with torch.no_grad():
        difference = (model(input_ids).logits.double() - reference(input_ids).logits).abs().max()
    assert difference <= 1e-5
