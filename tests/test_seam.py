"""The seam between decoder layers: what crosses it, what hooks see, and what comes of layers that are missing."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from test_modeling import gradients
from tiny import random_tokens, retrofit, tiny_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import apply_activation_checkpointing
from transformers.models.qwen3.modeling_qwen3 import Qwen3DecoderLayer

from attnres import AttnResError
from attnres.depth_state import DepthState

IMPLEMENTATIONS = ["eager", "two_phase"]


def make(implementation: str = "two_phase", block_size: int = 3, random_queries: bool = True, **kwargs: Any) -> Any:
    kwargs |= dict(depth_attention_implementation=implementation, block_size=block_size)
    return retrofit(tiny_model("qwen3"), random_queries=random_queries, **kwargs)


# -- the wire form -----------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
def test_a_model_can_be_cut_in_two_anywhere(block_size: int, implementation: str) -> None:
    """Finished sources and a partial sum are all that the layers behind a cut need of those before it."""
    model = make(implementation, block_size)
    input_ids = random_tokens()
    expected = model(input_ids).logits
    for index, layer in enumerate(model.model.layers[:-1]):

        def through_the_wire(layer: Any, inputs: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
            tensors = DepthState.unflatten(values).to_wire()
            depth = layer.next_sublayer
            assert len(tensors) == 1 + -(-depth // block_size)
            assert all(type(tensor) is torch.Tensor for tensor in tensors)
            return DepthState.from_wire([tensor.clone() for tensor in tensors], depth, block_size).flatten()

        handle = layer.register_forward_hook(through_the_wire)
        torch.testing.assert_close(model(input_ids).logits, expected, msg=f"cut behind layer {index}")
        handle.remove()


# -- hooks -------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
def test_a_hook_that_changes_what_a_layer_returns_takes_effect_at_once(block_size: int, implementation: str) -> None:
    """Also inside an open group of reads, whose phase one has looked at the sources before the hook changed them."""

    def change(layer: Any, inputs: Any, values: tuple[Any, ...]) -> tuple[Any, ...]:
        state = DepthState.unflatten(values).added()
        sources = tuple(-1.5 * source for source in state.sources)
        partial_sum = None if state.partial_sum is None else state.partial_sum + 0.5
        # As a user does it, who changes tensors and leaves alone what else is there.
        return (*sources, partial_sum, *state.flatten()[len(sources) + 1 :])

    reference, model = make("eager", block_size), make(implementation, block_size)
    input_ids = random_tokens()
    unchanged = model(input_ids).logits
    for index in range(3):
        handles = [m.model.layers[index].register_forward_hook(change) for m in (reference, model)]
        changed = model(input_ids).logits
        torch.testing.assert_close(changed, reference(input_ids).logits, atol=1e-5, rtol=1e-4)
        assert (changed - unchanged).abs().max() > 1e-3
        for handle in handles:
            handle.remove()


def test_hooks_see_sources_and_the_partial_sum() -> None:
    """As documented in docs/architecture: the last layer returns the output read."""
    model = make(block_size=3)
    seen: list[Any] = []
    for layer in model.model.layers:
        layer.register_forward_hook(lambda layer, inputs, output: seen.append(output))
    model(random_tokens())
    for index, output in enumerate(seen[:-1]):
        depth = 2 * (index + 1)
        tensors = [value for value in output if isinstance(value, torch.Tensor)]
        assert len(tensors) >= 1 + -(-depth // 3)
        assert all(tensor.shape == (2, 13, 32) for tensor in tensors)
    assert seen[-1].shape == (2, 13, 32)


# -- recomputation -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 3, 4, 8])
def test_checkpoint_wrapper_of_torch(block_size: int, implementation: str) -> None:
    """FSDP's activation checkpointing wraps layers, which do not know that they are recomputed."""
    model = make(implementation, block_size).double().train()
    inputs = dict(input_ids=random_tokens(), labels=random_tokens(), use_cache=False)
    expected = gradients(model, **inputs)
    apply_activation_checkpointing(model, check_fn=lambda module: isinstance(module, Qwen3DecoderLayer))
    actual = {name.replace("._checkpoint_wrapped_module", ""): g for name, g in gradients(model, **inputs).items()}
    assert actual.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(actual[name], expected[name], atol=1e-10, rtol=1e-8, msg=name)


# -- layers that are missing -------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "two_phase"])
@pytest.mark.parametrize("how", ["list", "config"])
def test_a_model_cut_off_at_the_end_reads_its_output_there(how: str, implementation: str) -> None:
    backbone, model = tiny_model("qwen3"), make(implementation, random_queries=False)
    input_ids = random_tokens()
    for count in (3, 2, 1):
        for each in (backbone, model):
            if how == "list":
                each.model.layers = each.model.layers[:count]
            else:
                each.config.num_hidden_layers = count
        torch.testing.assert_close(model(input_ids).logits, backbone(input_ids).logits, atol=2e-6, rtol=1e-5)


class Identity(nn.Module):
    def forward(self, hidden_states: Any, **kwargs: Any) -> Any:
        return hidden_states


@torch.no_grad()
@pytest.mark.parametrize("index", range(4))
@pytest.mark.parametrize("random_queries", [False, True])
def test_a_layer_that_was_replaced_is_refused(random_queries: bool, index: int) -> None:
    model = make(random_queries=random_queries)
    model.model.layers[index] = Identity()
    with pytest.raises(AttnResError, match="removed, replaced or skipped|does not read from depth"):
        model(random_tokens())


@torch.no_grad()
@pytest.mark.parametrize("index", range(3))
def test_a_layer_that_was_removed_from_the_middle_is_refused(index: int) -> None:
    model = make()
    del model.model.layers[index]
    with pytest.raises(AttnResError, match="removed, replaced or skipped"):
        model(random_tokens())


@torch.no_grad()
def test_early_exit_as_the_assistant() -> None:
    """Generation drafts tokens with the first layers of the model itself."""
    backbone = tiny_model("qwen3")
    model = retrofit(backbone, block_size=3)
    input_ids = random_tokens(batch=1)
    kwargs = dict(max_new_tokens=10, do_sample=False, eos_token_id=-1)
    expected = backbone.generate(input_ids, **kwargs)
    for other in (copy.deepcopy(backbone), model):
        assert torch.equal(other.generate(input_ids, assistant_early_exit=2, **kwargs), expected)


# -- export ------------------------------------------------------------------------------------------------------------


@torch.no_grad()
@pytest.mark.parametrize("implementation", ["eager", "two_phase"])
def test_export_with_a_dynamic_length(implementation: str) -> None:
    model = make(implementation)
    exported = torch.export.export(
        model,
        (),
        {"input_ids": random_tokens(length=7), "use_cache": False},
        dynamic_shapes={"input_ids": {1: torch.export.Dim("length", min=2, max=64)}, "use_cache": None},
    ).module()
    for length in (2, 7, 13, 40):
        input_ids = random_tokens(length=length)
        actual = exported(input_ids=input_ids, use_cache=False)
        torch.testing.assert_close(actual["logits"], model(input_ids).logits, atol=1e-5, rtol=1e-4)
