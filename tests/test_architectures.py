"""Every causal language model of Transformers: right, or refused by name. One row a test."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import architectures
import pytest
import torch
from safetensors import safe_open
from tiny import VARIATIONS, depth_attention, random_tokens, randomize, retrofit, tiny_model
from transformers import AutoModel, AutoModelForCausalLM

from attnres import AttnResConfig, AttnResForCausalLM, AttnResModel, convert
from attnres.backbones import REFUSED, RMS_NORMS, SUPPORTED
from attnres.configuration_attnres import UnsupportedBackboneError, supported_backbone
from attnres.rewiring import AttnResDecoderLayer, decoder_layers

# Whose own cached decoding differs from their own full forward at this size, without attnres; only that the two agree
# can be tested.
CACHE_DIFFERS = {"bamba", "minimax"}
VARIATION_CACHE_DIFFERS = {
    ("deepseek_v32", "reordered"),
    ("doge", "experts"),
    ("doge", "kept_window"),
    ("glm_moe_dsa", "reordered"),
}
DEPTH_TENSORS = {("depth_attention", "query"), ("depth_attention", "key_norm")}
# Whose own layers cannot be offloaded, without attnres.
OFFLOADING_FAILS = {"jetmoe", "longcat_flash"}


def tensor_names(directory: Path) -> set[str]:
    names: set[str] = set()
    for path in directory.glob("*.safetensors"):
        with safe_open(path, framework="pt") as file:
            names.update(file.keys())
    return names


@torch.no_grad()
def decode(model: Any, input_ids: torch.Tensor, prefilled: int = 9) -> torch.Tensor:
    """Logits of a prefill and of one token at a time after it."""
    outputs = model(input_ids[:, :prefilled], use_cache=True)
    logits = [outputs.logits]
    for position in range(prefilled, input_ids.shape[1]):
        cache = {"past_key_values": outputs.past_key_values}
        outputs = model(input_ids[:, position : position + 1], use_cache=True, **cache)
        logits.append(outputs.logits)
    return torch.cat(logits, dim=1)


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    # Rounding grows with the logits: MiniCPM3's have a standard deviation of 5, most others' of less than 1.
    torch.testing.assert_close(actual, expected, atol=2e-5 * max(1.0, expected.std().item()), rtol=1e-5)


@pytest.mark.parametrize("name", architectures.ARCHITECTURES)
def test_every_architecture_has_been_looked_at(name: str) -> None:
    if name in SUPPORTED:
        assert supported_backbone(name) == SUPPORTED[name]
        assert name not in REFUSED
    else:
        assert name in REFUSED
        with pytest.raises(UnsupportedBackboneError, match=f"{name!r} is not supported: {REFUSED[name]}"):
            supported_backbone(name)


def test_the_table_names_nothing_else() -> None:
    assert {*SUPPORTED, *REFUSED} == set(architectures.ARCHITECTURES)


def test_the_page_is_fresh() -> None:
    assert architectures.PAGE.read_text(encoding="utf-8") == architectures.page(), "run python tests/architectures.py"


@pytest.mark.parametrize("name", SUPPORTED)
def test_architecture(name: str, tmp_path: Path) -> None:
    backbone = tiny_model(name)
    input_ids = random_tokens()
    with torch.no_grad():
        expected = backbone(input_ids).logits
    assert expected.std() > 1e-3  # an initialisation that lets differences show

    # The converter compares source and result, logit by logit.
    backbone.save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert report.num_blocks in (2, 3)

    # Names on disk are the backbone's; nothing is missing or left over; saved again, the names stay.
    model, info = AutoModelForCausalLM.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert isinstance(model, AttnResForCausalLM)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    names = tensor_names(tmp_path / "converted")
    added = names - tensor_names(tmp_path / "source")
    assert names >= tensor_names(tmp_path / "source")
    assert {tuple(tensor.split(".")[-2:]) for tensor in added} == DEPTH_TENSORS
    assert len(added) == 2
    model.save_pretrained(tmp_path / "saved")
    assert tensor_names(tmp_path / "saved") == names

    headless, info = AutoModel.from_pretrained(tmp_path / "converted", output_loading_info=True)
    assert isinstance(headless, AttnResModel)
    _, plain_info = AutoModel.from_pretrained(tmp_path / "source", output_loading_info=True)
    assert info["missing_keys"] == plain_info["missing_keys"]

    # Lossless, also token by token.
    model.eval()
    with torch.no_grad():
        close(model(input_ids).logits, expected)
    close(decode(model, input_ids), decode(backbone, input_ids))

    # With depth weights of their own, decoding with a cache equals the full forward.
    randomize(model)
    with torch.no_grad():
        mixed = model(input_ids).logits
    assert (mixed - expected).abs().max() > 1e-3
    if name not in CACHE_DIFFERS:
        close(decode(model, input_ids), mixed)

    if name not in OFFLOADING_FAILS:
        close(dispatched(model, tmp_path)(input_ids).logits, mixed)

    # Gradients reach every query but the first, which has one source to choose from.
    model.train()
    model.gradient_checkpointing_enable()
    model(input_ids, labels=input_ids).loss.backward()
    gradient = depth_attention(model).query.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[1:].any(dim=-1).all()


@pytest.mark.parametrize(("name", "variation"), [(name, each) for name in VARIATIONS for each in VARIATIONS[name]])
def test_variation(name: str, variation: str) -> None:
    backbone = tiny_model(name, **VARIATIONS[name][variation])
    input_ids = random_tokens()
    with torch.no_grad():
        expected = backbone(input_ids).logits
    assert expected.std() > 1e-3

    # Lossless, also token by token, also where only the last positions are asked for.
    num_sublayers = AttnResConfig(backbone_config=backbone.config).num_sublayers
    model = retrofit(backbone, num_blocks=min(3, num_sublayers))
    with torch.no_grad():
        close(model(input_ids).logits, expected)
        close(model(input_ids, logits_to_keep=2).logits, expected[:, -2:])
    close(decode(model, input_ids), decode(backbone, input_ids))

    # With depth weights of their own, decoding with a cache equals the full forward.
    randomize(model)
    with torch.no_grad():
        mixed = model(input_ids).logits
    assert (mixed - expected).abs().max() > 1e-3
    if name not in CACHE_DIFFERS and (name, variation) not in VARIATION_CACHE_DIFFERS:
        close(decode(model, input_ids), mixed)

    model.train()
    model.gradient_checkpointing_enable()
    model(input_ids, labels=input_ids).loss.backward()
    gradient = depth_attention(model).query.grad
    assert gradient is not None
    assert gradient.isfinite().all()
    assert gradient[1:].any(dim=-1).all()


@torch.no_grad()
def dispatched(model: Any, directory: Path) -> Any:
    """The model from disk, its layers dispatched to memory and, as not all of them fit, back to disk."""
    model.save_pretrained(directory / "random")
    layers = [module for module in model.modules() if isinstance(module, AttnResDecoderLayer)]
    smallest = min(sum(p.numel() * p.element_size() for p in layer.parameters()) for layer in layers)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    result = AutoModelForCausalLM.from_pretrained(
        directory / "random",
        device_map="auto",
        max_memory={"cpu": total - smallest // 2},
        offload_folder=directory / "offloaded",
    )
    assert "disk" in result.hf_device_map.values()
    return result.eval()


@pytest.mark.parametrize("name", SUPPORTED)
def test_norms_that_a_read_may_do_are_rms_norms(name: str) -> None:
    """Their forward is tried on numbers of which it must be RMSNorm; every norm that is one is in the table."""
    with torch.device("meta"):
        layers = decoder_layers(tiny_model(name))
    classes = {type(module) for layer in layers for module in layer.modules() if hasattr(module, "variance_epsilon")}
    hidden_states, weight = torch.arange(1, 5).float(), torch.arange(4).float()
    expected = torch.nn.functional.rms_norm(hidden_states, weight.shape, weight, 0.5)
    for norm_class in classes:
        stand_in: Any = SimpleNamespace(weight=weight, variance_epsilon=0.5)
        try:
            is_rms_norm = torch.allclose(norm_class.forward(stand_in, hidden_states), expected)
        except (AttributeError, TypeError):  # it needs more than a weight and an epsilon
            is_rms_norm = False
        assert is_rms_norm or norm_class.__name__ not in RMS_NORMS
        if is_rms_norm and any(isinstance(child, norm_class) for layer in layers for child in layer.children()):
            assert norm_class.__name__ in RMS_NORMS, norm_class
