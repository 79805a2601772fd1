"""Variants of a read: each equals the float64 reference, alone and in a model, and loads like any other checkpoint."""

from __future__ import annotations

from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ReferenceModel, visible
from reference import read as reference_read
from tiny import FAMILIES, random_tokens, retrofit, tiny_config, tiny_model
from transformers import AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, DepthAttention
from attnres.configuration_attnres import DEPTH_DEFAULTS, AttnResConfigError
from attnres.depth_attention import DEPTH_ATTENTION_FUNCTIONS, EagerDepthAttention, depth_settings, read
from attnres.depth_attention_two_phase import TwoPhaseDepthAttention
from attnres.depth_state import DepthState

HIDDEN, LEAVES = 24, 8

# Each is one that a field brings, or several together; the second value says whether "two_phase" covers it.
VARIANTS: dict[str, tuple[dict[str, Any], bool]] = {
    "two heads": (dict(num_heads=2), True),
    "a head for each column": (dict(num_heads=HIDDEN), True),
    "heads, sum": (dict(num_heads=4, mix="sum"), True),
    "no key norm": (dict(key_norm=False), True),
    "no key norm, heads, sum": (dict(key_norm=False, num_heads=3, mix="sum"), True),
    "window of one": (dict(window=1), True),
    "window of three": (dict(window=3), True),
    "window, heads, no key norm": (dict(window=2, num_heads=2, key_norm=False), True),
    "logit scale": (dict(logit_scale=HIDDEN**-0.5), True),
    "gated": (dict(mix="gated"), True),
    "gated, heads, window": (dict(mix="gated", num_heads=3, window=2), True),
    "input": (dict(query="input"), False),
    "input, heads": (dict(query="input", num_heads=2, mix="sum"), False),
    "input, no key norm, window": (dict(query="input", key_norm=False, window=2), False),
    "static": (dict(query="static"), False),
    "static, gated, window": (dict(query="static", mix="gated", window=2), False),
    "sigmoid": (dict(weighting="sigmoid"), False),
    "sigmoid, sum, heads": (dict(weighting="sigmoid", mix="sum", num_heads=2), False),
    "sigmoid, static": (dict(weighting="sigmoid", query="static"), False),
    "normalized": (dict(values="normalized"), False),
    "Inkling 2": (dict(values="normalized", logit_scale=HIDDEN**-0.5, window=4), False),
}
IMPLEMENTATIONS = ["eager", "two_phase"]


def parameters(num_reads: int, hidden: int, num_sources: int, variant: dict[str, Any]) -> DepthAttention:
    module = DepthAttention(num_reads, hidden, num_sources, {**DEPTH_DEFAULTS, **variant})
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter += torch.randn(parameter.shape, generator=generator) / (
                hidden**0.5 if parameter.dim() == 3 else 1
            )
    return module


def arguments_of_reference(module: DepthAttention, index: int) -> tuple[Any, ...]:
    rows = (module.query, module.key_norm, module.gate)
    return tuple(None if rows_of is None else rows_of[index].double() for rows_of in rows)


def expected_reads(module: DepthAttention, leaves: list[torch.Tensor], block_size: int, variant: dict[str, Any]) -> Any:
    variant = {"mix": "mean", "eps": 1e-6, **variant}
    results = []
    for index in range(len(leaves)):
        w, g, gate = arguments_of_reference(module, index)
        sources = visible(leaves[0].double(), [leaf.double() for leaf in leaves[1 : 1 + index]], block_size)
        results.append(reference_read(sources, w, g, gate=gate, **variant)[0])
    return results


def actual_reads(
    module: DepthAttention, leaves: list[torch.Tensor], block_size: int, variant: dict[str, Any], implementation: str
) -> list[torch.Tensor]:
    entry = dict(block_size=block_size, implementation=implementation, **variant)
    settings = depth_settings(entry, LEAVES)._replace(group_size=block_size * max(1, 4 // block_size))
    queries, state, results = module(), DepthState((leaves[0],)), []
    for leaf in [*leaves[1:], None]:
        hidden_states, state = read(queries, state, settings)
        results.append(hidden_states)
        state = state if leaf is None else state.write(leaf, block_size)
    return results


def make_leaves(dtype: torch.dtype = torch.float32, scale: float = 1.0) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [(scale * 2.0 ** -(i % 3) * torch.randn(2, 5, HIDDEN, generator=generator)).to(dtype) for i in range(LEAVES)]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize("block_size", [1, 2, 3, 8])
@pytest.mark.parametrize("variant", VARIANTS)
def test_reads_and_gradients_equal_reference(variant: str, block_size: int, implementation: str) -> None:
    """All reads of a stack; gradients of sources and parameters, in float32 against float64."""
    fields, is_covered = VARIANTS[variant]
    settings = depth_settings(dict(block_size=block_size, implementation=implementation, **fields), LEAVES)
    fast = TwoPhaseDepthAttention if is_covered else EagerDepthAttention
    assert settings.implementation is (EagerDepthAttention if implementation == "eager" else fast)
    module = parameters(LEAVES + 1, HIDDEN, 1 - (-LEAVES // block_size), fields)
    leaves = [leaf.requires_grad_() for leaf in make_leaves()]
    weights = make_leaves(scale=3.0)
    inputs = [*leaves, *module.parameters()]
    expected = expected_reads(module, leaves, block_size, fields)
    expected_grads = torch.autograd.grad(
        sum((weight * value).sum() for weight, value in zip(weights, expected)), inputs, materialize_grads=True
    )
    actual = actual_reads(module, leaves, block_size, fields, implementation)
    for value, reference in zip(actual, expected, strict=True):
        torch.testing.assert_close(value.double(), reference, atol=2e-5, rtol=2e-5)
    loss = sum((weight * value).sum() for weight, value in zip(weights, actual))
    grads = torch.autograd.grad(loss, inputs, materialize_grads=True)
    for value, reference in zip(grads, expected_grads, strict=True):
        assert (value - reference).abs().max() <= 2e-5 * max(1.0, float(reference.abs().max()))
    with torch.no_grad():  # inference takes other paths, also for one token
        for value, reference in zip(actual_reads(module, leaves, block_size, fields, implementation), expected):
            torch.testing.assert_close(value.double(), reference, atol=2e-5, rtol=2e-5)
        token = [leaf[:1, 2:3] for leaf in leaves]
        for value, reference in zip(actual_reads(module, token, block_size, fields, implementation), expected):
            torch.testing.assert_close(value.double(), reference[:1, 2:3], atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("variant", "implementation"), product(VARIANTS, IMPLEMENTATIONS))
def test_half_precision_does_not_overflow(variant: str, implementation: str, dtype: torch.dtype) -> None:
    """Activations of 1e4 and their gradients; what a read itself exceeds in float16 is the backbone's to bear."""
    fields, _ = VARIANTS[variant]
    module = parameters(LEAVES + 1, HIDDEN, LEAVES + 1, fields)
    leaves = [leaf.clamp(-3, 3).requires_grad_() for leaf in make_leaves(dtype)]
    scaled = [(leaf * (1e4 / 3 / LEAVES)) for leaf in leaves]
    reads = actual_reads(module, scaled, 2, fields, implementation)
    assert all(value.isfinite().all() for value in reads)
    torch.stack([value.float().mean() for value in reads]).sum().backward()
    for tensor in [*leaves, *module.parameters()]:
        assert tensor.grad is None or tensor.grad.isfinite().all()


@pytest.mark.parametrize("variant", VARIANTS)
def test_zero_queries_are_the_mean_or_the_residual_stream(variant: str) -> None:
    fields, _ = VARIANTS[variant]
    module = DepthAttention(LEAVES + 1, HIDDEN, LEAVES + 1, {**DEPTH_DEFAULTS, **fields})
    leaves, block_size, mix = make_leaves(), 2, fields.get("mix", "mean")
    for index, value in enumerate(actual_reads(module, leaves, block_size, fields, "two_phase")):
        sources = visible(leaves[0], leaves[1 : 1 + index], block_size)
        if fields.get("values") == "normalized" and len(sources) > 1:
            sources = [torch.nn.functional.rms_norm(source, (HIDDEN,), eps=1e-6) for source in sources]
        if mix == "mean" and (window := fields.get("window")) is not None:
            sources = [sources[0], *sources[max(1, len(sources) - window) :]]
        expected = sum(sources) / (len(sources) if mix == "mean" else 1)
        torch.testing.assert_close(value, expected, atol=2e-6, rtol=2e-6)


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
@pytest.mark.parametrize(
    "variant", ["heads, sum", "window, heads, no key norm", "gated, heads, window", "input", "static"]
)
def test_models_equal_reference(variant: str, implementation: str) -> None:
    fields = dict(VARIANTS[variant][0])
    backbone = tiny_model("qwen3", num_hidden_layers=4)
    hidden = backbone.config.hidden_size
    if "num_heads" in fields:
        fields["num_heads"] = 4
    mix = fields.pop("mix", "mean")
    model = retrofit(
        backbone, block_size=2, mix=mix, depth_attention=fields, depth_attention_implementation=implementation
    )
    depth = model.depth_attention
    with torch.no_grad():
        generator = torch.Generator().manual_seed(0)
        for parameter in depth.parameters():
            parameter += 0.5 * torch.randn(parameter.shape, generator=generator) / hidden ** (parameter.dim() == 3)
    reference = ReferenceModel(backbone, depth.query, depth.key_norm, 2, mix, gate=depth.gate, variant=fields)
    input_ids = random_tokens()
    outputs = model(input_ids, labels=input_ids, output_depth_attentions=True)
    expected = reference(input_ids, labels=input_ids)
    assert (outputs.logits.double() - expected.logits).abs().max() <= 2e-5
    for weights, expected_weights in zip(outputs.depth_attentions, reference.weights, strict=True):
        if expected_weights.shape != weights.shape:  # what is outside of the window is not there
            expected_weights = expected_weights[..., [0, *range(-fields["window"], 0)]]
        torch.testing.assert_close(weights.double(), expected_weights, atol=1e-5, rtol=0)
    outputs.loss.backward()
    expected.loss.backward()
    for name, parameter in depth.named_parameters():
        assert (parameter.grad.double() - getattr(reference, name).grad).abs().max() <= 1e-4, name
    with torch.no_grad():  # a prompt, then token by token
        cached = model(input_ids[:, :5], use_cache=True)
        logits = [cached.logits]
        for position in range(5, input_ids.shape[1]):
            cached = model(input_ids[:, position : position + 1], past_key_values=cached.past_key_values)
            logits.append(cached.logits)
    torch.testing.assert_close(torch.cat(logits, dim=1), outputs.logits, atol=2e-5, rtol=2e-5)


@pytest.mark.parametrize("family", [*FAMILIES, "minimax", "zaya"])
@pytest.mark.parametrize(
    "fields", [dict(num_heads=4), dict(key_norm=False), dict(mix="gated"), dict(weighting="sigmoid")]
)
def test_retrofits_stay_lossless(fields: dict[str, Any], family: str) -> None:
    backbone = tiny_model(family)
    fields = dict(fields)
    model = retrofit(backbone, num_blocks=2, mix=fields.pop("mix", "sum"), depth_attention=fields)
    input_ids = random_tokens()
    with torch.no_grad():
        expected = backbone(input_ids).logits
        difference = (model(input_ids).logits - expected).abs().max()
    assert difference <= 1e-5 * max(1.0, float(expected.abs().max()))


@pytest.mark.parametrize("variant", VARIANTS)
def test_saved_and_loaded_by_the_code_beside_it(variant: str, tmp_path: Path) -> None:
    fields = dict(VARIANTS[variant][0])
    if "num_heads" in fields:
        fields["num_heads"] = 4
    config = AttnResConfig(backbone_config=tiny_config("qwen3"), block_size=2, depth_attention=fields)
    torch.manual_seed(0)
    model = AttnResForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.depth_attention.parameters():
            parameter += 0.1 * torch.randn(parameter.shape)
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert loaded.config.depth_attention == config.depth_attention
    assert loaded.state_dict().keys() == model.state_dict().keys()
    with torch.no_grad():
        torch.testing.assert_close(loaded(random_tokens()).logits, model(random_tokens()).logits, atol=1e-6, rtol=1e-6)


def test_a_plain_checkpoint_is_loaded_as_a_variant(tmp_path: Path) -> None:
    backbone = tiny_model("qwen3")
    backbone.save_pretrained(tmp_path)
    model = AttnResForCausalLM.from_pretrained(tmp_path, num_blocks=2, depth_attention=dict(num_heads=4))
    assert model.config.depth_attention["num_heads"] == 4
    assert model.config.depth_attention["mix"] == "sum"
    with torch.no_grad():
        torch.testing.assert_close(
            model(random_tokens()).logits, backbone(random_tokens()).logits, atol=1e-5, rtol=1e-5
        )


@pytest.mark.parametrize("implementation", DEPTH_ATTENTION_FUNCTIONS)
def test_compiled(implementation: str) -> None:
    if implementation == "triton":
        pytest.importorskip("triton", reason="triton is not installed")
        from attnres.depth_attention_triton import IS_INTERPRETED

        if not IS_INTERPRETED:
            pytest.skip("kernels are compiled for the CUDA device; set TRITON_INTERPRET=1 to interpret them")
    fields = dict(num_heads=2, window=2, key_norm=False)
    module, leaves = parameters(LEAVES + 1, HIDDEN, LEAVES + 1, fields), make_leaves()

    def run(*leaves: torch.Tensor) -> list[torch.Tensor]:
        return actual_reads(module, list(leaves), 2, fields, implementation)

    with torch.no_grad():
        expected, actual = run(*leaves), torch.compile(run, backend="eager", fullgraph=True)(*leaves)
    torch.testing.assert_close(actual, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(num_heads=0), "num_heads=0 .* from 1 to 32"),
        (dict(num_heads=5), "must divide hidden_size=32"),
        (dict(num_heads=True), "num_heads=True"),
        (dict(query="dynamic"), "query='dynamic' .*'input'"),
        (dict(weighting="relu"), "weighting='relu' .*'sigmoid'"),
        (dict(values="keys"), "values='keys' .*'normalized'"),
        (dict(key_norm=1), "key_norm=1 .* true or false"),
        (dict(logit_scale=0), "logit_scale=0 .* positive"),
        (dict(logit_scale=float("inf")), "logit_scale=inf"),
        (dict(window=0), "window=0 .* from 1 to 8"),
        (dict(window=2.0), "window=2.0"),
        (dict(query="static", num_heads=2), "query='static' .* set num_heads to 1"),
        (dict(query="static", key_norm=False), "query='static' .* set key_norm to true"),
        (dict(query="static", logit_scale=2.0), "query='static' .* set logit_scale to 1"),
        (dict(query="input", mix="gated"), "mix='gated' goes with"),
        (dict(values="normalized", key_norm=False), "set key_norm to true"),
        (dict(values="normalized", mix="sum"), "mix='sum' of normalized values"),
        (dict(window=2, mix="sum"), "mix='sum' of a window"),
        (dict(heads=2), "an entry 'heads'; allowed: .*num_heads"),
    ],
)
def test_senseless_variants_are_refused(fields: dict[str, Any], message: str) -> None:
    with pytest.raises(AttnResConfigError, match=message):
        AttnResConfig(backbone_config=tiny_config("qwen3"), block_size=2, depth_attention=fields)
