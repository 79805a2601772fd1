from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from reference import ReferenceModel, visible
from reference import read as reference_read
from tiny import depth_attention, random_tokens, retrofit, tiny_model

from attnres import AttnResForCausalLM
from attnres.analysis import (
    AnalysisError,
    DepthStatistics,
    Layout,
    collect,
    depth_maps,
    drop_source,
    magnitudes,
    mean_loss,
    tables,
)
from attnres.rewiring import decoder_layers

BLOCK_SIZES = (1, 2, 3, 8)  # Full, one block a layer, blocks that end inside a layer, one block


def random_model(**kwargs: Any) -> Any:
    return retrofit(tiny_model("qwen3"), random_queries=True, **kwargs)


class MaskedReference(ReferenceModel):
    """The independent reference, whose reads do without some of their sources."""

    masked: frozenset[tuple[int, int]] = frozenset()

    def read(self) -> torch.Tensor:
        number = len(self.outputs)
        sources = visible(self.embedding, self.outputs, self.block_size)
        kept = [source for i, source in enumerate(sources) if (number, i) not in self.masked] or sources
        return reference_read(kept, self.query[number], self.key_norm[number], self.mix, self.eps)[0]


def reference_of(backbone: Any, model: Any) -> MaskedReference:
    depth, settings = depth_attention(model), model.config.depth_attention
    return MaskedReference(backbone, depth.query, depth.key_norm, settings["block_size"], settings["mix"])


# -- layout ------------------------------------------------------------------------------------------------------------


def test_layout_names_what_a_reader_knows() -> None:
    layout = Layout(num_sublayers=8, block_size=4, mix="sum", sublayers_per_layer=2)
    assert [str(read) for read in layout.reads][3:5] == [
        "read 3, before the MLP of layer 1",
        "read 4, before the mixer of layer 2",
    ]
    assert str(layout.reads[-1]) == "read 8, before the final norm"
    assert [str(source) for source in layout.sources] == [
        "embedding",
        "block 1 (layers 0 to 1)",
        "block 2 (layers 2 to 3)",
    ]
    assert [layout.num_visible(read) for read in range(9)] == [1, 2, 2, 2, 2, 3, 3, 3, 3]
    assert [str(source) for source in Layout(4, 1, "mean", 2).sources][1:3] == [
        "mixer 0 (mixer of layer 0)",
        "MLP 0 (MLP of layer 0)",
    ]
    assert Layout(7, 3, "mean", 1).sources[-1].detail == "layer 6"
    assert Layout(8, 3, "mean", 2).sources[1].detail == "sublayers 0 to 2"


def test_a_read_with_few_weights_sees_a_window() -> None:
    layout = Layout(8, 1, "mean", 2)
    assert layout.columns(5, 6) == [0, 1, 2, 3, 4, 5]
    assert layout.columns(5, 3) == [0, 4, 5]
    assert layout.columns(0, 1) == [0]
    with pytest.raises(AnalysisError, match="read 1 has 3 weights"):
        layout.columns(1, 3)


# -- maps --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("mix", ["sum", "mean"])
def test_maps_show_the_weights_of_the_formula(block_size: int, mix: str) -> None:
    backbone = tiny_model("qwen3")
    model = retrofit(backbone, random_queries=True, block_size=block_size, mix=mix)
    input_ids = random_tokens()
    depth = depth_attention(model)
    reference = ReferenceModel(backbone, depth.query, depth.key_norm, block_size, mix)
    with torch.no_grad():
        reference(input_ids)

    maps = depth_maps(model, input_ids)

    assert maps.weights.shape == (1, 9, -(-8 // block_size) + 1)
    for read, expected in enumerate(reference.weights):
        n = expected.shape[-1]
        flat = expected.flatten(0, 1).detach().numpy()
        np.testing.assert_allclose(maps.weights[0, read, :n], flat.mean(0), atol=1e-5)
        assert np.isnan(maps.weights[0, read, n:]).all()
        np.testing.assert_allclose(maps.token_weights[:, 0, read, :n], flat, atol=1e-5)
        np.testing.assert_allclose(maps.deviation[0, read, :n], flat.std(0), atol=1e-4)
        np.testing.assert_allclose(maps.entropy[0, read], -(flat * np.log(flat)).sum(-1).mean(), atol=1e-4)
        np.testing.assert_allclose(maps.winners[0, read, :n], np.bincount(flat.argmax(-1), minlength=n) / len(flat))
        distance = np.abs(flat - flat.mean(0)).sum(-1) / 2
        np.testing.assert_allclose(maps.token_deviation()[:, 0, read], distance, atol=1e-5)


def test_a_hand_set_query_reads_where_it_points() -> None:
    """The query of one read is the direction of one token's embedding, 40 times, so that token reads the embedding."""
    model = retrofit(tiny_model("qwen3"), block_size=4)
    embedding = model.get_input_embeddings().weight[7].detach()
    with torch.no_grad():
        depth_attention(model).query[5] = 40 * embedding / embedding.norm()
    maps = depth_maps(model, torch.tensor([[7]]))
    assert maps.weights[0, 5, 0] > 0.99
    np.testing.assert_allclose(maps.weights[0, 6, :3], 1 / 3, atol=1e-6)


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
def test_a_converted_model_reads_uniformly_and_mixes_like_a_residual(block_size: int) -> None:
    maps = depth_maps(retrofit(tiny_model("qwen3"), block_size=block_size), random_tokens())
    seen = np.isfinite(maps.weights)
    np.testing.assert_allclose(maps.weights[seen], np.broadcast_to(maps.uniform[None, :, None], seen.shape)[seen], 1e-6)
    np.testing.assert_allclose(maps.mixing_matrix()[0], np.tril(np.ones((9, 9))), atol=1e-6)
    np.testing.assert_allclose(maps.relative_entropy[0, 1:], 1, atol=1e-6)
    assert maps.token_deviation().max() < 1e-6


def test_mixing_matrix_of_the_mean_has_rows_that_weigh_one_output_of_each_source() -> None:
    maps = depth_maps(random_model(block_size=3, mix="mean"), random_tokens())
    matrix = maps.mixing_matrix()[0]
    np.testing.assert_allclose(matrix[:, [0, 1, 4, 7]].sum(-1), 1, atol=1e-5)  # the first outputs of the sources
    np.testing.assert_array_equal(matrix[8, 1:4], np.repeat(maps.weights[0, 8, 1], 3))
    assert not np.triu(matrix, 1).any()


@pytest.mark.parametrize("family", ["gemma2", "qwen3_moe", "kimi_linear", "cohere", "minimax", "qwen3_5_text"])
def test_other_architectures(family: str) -> None:
    model = retrofit(tiny_model(family), random_queries=True, num_blocks=2)
    input_ids = random_tokens(length=8)
    maps = depth_maps(model, input_ids)
    np.testing.assert_allclose(np.nansum(maps.weights, -1), 1, atol=1e-5)
    found = magnitudes(model, [input_ids], gradients=True)
    assert found.gradients is not None
    assert (found.written > 0).all()
    assert (found.gradients > 0).all()
    layout = maps.layout
    assert layout.num_layers == len(decoder_layers(model))
    study = drop_source(model, [input_ids], reads=[layout.num_sublayers])
    assert len(study.reads) == layout.num_blocks + 1


VARIANTS: dict[str, dict[str, Any]] = {
    "heads": dict(num_heads=4),
    "window": dict(window=2, mix="mean"),
    "gated, heads": dict(mix="gated", num_heads=2),
    "input": dict(query="input"),
    "static": dict(query="static"),
    "sigmoid": dict(weighting="sigmoid"),
    "no key norm": dict(key_norm=False),
    "normalized": dict(values="normalized", mix="mean"),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_variant_is_looked_into(variant: str) -> None:
    """Maps equal the reference, and the loss without a source that of a reference without it."""
    fields = dict(VARIANTS[variant])
    mix, backbone = fields.pop("mix", "sum"), tiny_model("qwen3")
    model = retrofit(backbone, block_size=2, mix=mix, depth_attention=fields)
    depth = depth_attention(model)
    with torch.no_grad():
        for parameter in depth.parameters():
            parameter += torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0)) / 4
    reference = ReferenceModel(backbone, depth.query, depth.key_norm, 2, mix, gate=depth.gate, variant=fields)
    input_ids = random_tokens()
    with torch.no_grad():
        reference(input_ids)
    maps = depth_maps(model, input_ids)
    assert maps.num_heads == fields.get("num_heads", 1)
    for read, expected in enumerate(reference.weights):
        mean = expected.unsqueeze(-2) if expected.ndim == 3 else expected
        mean = mean.mean((0, 1)).detach().numpy()
        found = np.nan_to_num(maps.weights[:, read, : mean.shape[-1]])
        np.testing.assert_allclose(found, mean, atol=1e-5)
    table = tables.parameters(maps.layout, depth)
    assert len(table) == 9
    assert ("gate" in table, "key_norm_deviation" in table) == (mix == "gated", depth.key_norm is not None)
    study = drop_source(model, [input_ids], reads=[7])
    seen = int(np.isfinite(maps.weights[0, 7]).sum())
    assert len(study.reads) == seen
    assert all(abs(drop.increase) > 1e-7 for drop in study.reads), "nothing was taken away"
    if mix == "gated":
        factors = 1 + np.array(depth.gate.detach()).T[..., None] * maps.weights[:, :, :1]
        np.testing.assert_allclose(maps.mixing_matrix()[:, 1:, 0], factors[:, 1:, 0], rtol=1e-6)


def test_heads_are_kept_apart() -> None:
    """Models with several depth heads give `[batch, sequence, heads, sources]`."""
    layout = Layout(2, 1, "sum", 2)
    generator = torch.Generator().manual_seed(0)
    weights = [torch.rand(2, 5, 3, n, generator=generator).softmax(-1) for n in (1, 2, 3)]
    statistics = DepthStatistics(layout)
    statistics.add(weights, torch.zeros(2, 5, dtype=torch.long))
    assert statistics.mean.shape == (3, 3, 3)
    np.testing.assert_allclose(statistics.mean[:, 2], weights[2].mean((0, 1)), rtol=1e-6)
    assert statistics.weights_of_tokens().shape == (10, 3, 3, 3)


def test_a_model_that_lies_on_disk_is_looked_into(tmp_path: Path) -> None:
    """As `device_map="auto"` spreads it; the maps and magnitudes are those of the model in memory."""
    retrofit(tiny_model("qwen3"), random_queries=True, block_size=2).save_pretrained(tmp_path / "model")
    kwargs = dict(device_map="auto", max_memory={"cpu": 80_000}, offload_folder=tmp_path / "offload")
    whole, spread = (AttnResForCausalLM.from_pretrained(tmp_path / "model", **kw).eval() for kw in ({}, kwargs))
    assert "disk" in spread.hf_device_map.values()
    input_ids = random_tokens()
    np.testing.assert_allclose(depth_maps(spread, input_ids).weights, depth_maps(whole, input_ids).weights, atol=1e-6)
    found, expected = (magnitudes(model, [input_ids]) for model in (spread, whole))
    np.testing.assert_allclose(found.accumulated, expected.accumulated, rtol=1e-6)
    np.testing.assert_allclose(found.written, expected.written, rtol=1e-6)


def test_statistics_do_not_depend_on_how_the_text_is_cut() -> None:
    model = random_model(block_size=2)
    batches = [random_tokens(batch=1, length=7, seed=seed) for seed in range(6)]
    apart, together = collect(model, batches), collect(model, [torch.cat(batches)])
    for name in ("mean", "deviation", "winners", "entropy"):
        np.testing.assert_allclose(getattr(apart, name), getattr(together, name), atol=1e-6, err_msg=name)
    assert apart.num_tokens == 42


def test_what_is_kept_does_not_grow_with_the_text() -> None:
    model = random_model(block_size=2)
    statistics = DepthStatistics(Layout.of(model), max_tokens_kept=20)
    collect(model, [random_tokens(seed=seed) for seed in range(5)], statistics)
    assert statistics.num_tokens == 130
    assert len(statistics.token_ids) == 20
    assert statistics.weights_of_tokens().shape[0] == 20


def test_data_frame_and_html() -> None:
    maps = depth_maps(random_model(block_size=4), random_tokens()[0])
    frame = maps.to_dataframe()
    assert len(frame) == np.isfinite(maps.weights).sum()
    row = frame[(frame["read"] == 5) & (frame["source"] == 2)].iloc[0]
    assert (row["kind"], row["layer"], row["name"], row["weight"]) == ("MLP", 2, "block 2", maps.weights[0, 5, 2])
    html = maps._repr_html_()
    assert "before the MLP of layer 2" in html
    assert html.count("<tr>") == 1 + 9


def test_plain_models_are_refused() -> None:
    with pytest.raises(AnalysisError, match="attnres convert"):
        depth_maps(tiny_model("qwen3"), random_tokens())
    with pytest.raises(AnalysisError, match="no token"):
        assert DepthStatistics(Layout(2, 1, "sum", 2)).mean
    with pytest.raises(AnalysisError, match="with tokens"):
        depth_maps(random_model(), torch.zeros(1, 0, dtype=torch.long))


# -- magnitudes --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", [1, 3, 8])
def test_magnitudes_of_a_converted_model_are_the_originals(block_size: int) -> None:
    backbone = tiny_model("qwen3")
    batches = [random_tokens(seed=seed) for seed in range(2)]
    original = magnitudes(backbone, batches, gradients=True)
    converted = magnitudes(retrofit(backbone, block_size=block_size), batches, gradients=True)
    np.testing.assert_allclose(converted.written, original.written, rtol=1e-4)
    np.testing.assert_allclose(converted.gradients, original.gradients, rtol=1e-3)
    assert all(parameter.grad is None for parameter in backbone.parameters())


@torch.no_grad()
def test_magnitudes_of_a_plain_model_are_those_of_its_hidden_states() -> None:
    backbone, input_ids = tiny_model("qwen3"), random_tokens()
    states = backbone(input_ids, output_hidden_states=True).hidden_states
    found = magnitudes(backbone, [input_ids])
    assert found.gradients is None
    for layer in range(3):  # the last of them is normed
        before, after = states[layer], states[layer + 1]
        assert found.accumulated[layer] == pytest.approx(after.square().mean(-1).sqrt().mean().item(), rel=1e-5)
        assert found.written[layer] == pytest.approx((after - before).square().mean(-1).sqrt().mean().item(), rel=1e-4)


# -- drop source -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block_size", BLOCK_SIZES)
@pytest.mark.parametrize("mix", ["sum", "mean"])
def test_drop_source_equals_a_direct_recomputation(block_size: int, mix: str) -> None:
    backbone = tiny_model("qwen3")
    model = retrofit(backbone, random_queries=True, block_size=block_size, mix=mix)
    reference, input_ids = reference_of(backbone, model), random_tokens()

    @torch.no_grad()
    def direct(*masked: tuple[int, int]) -> float:
        reference.masked = frozenset(masked)
        logits = reference(input_ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, input_ids[:, 1:].flatten()).item()

    study = drop_source(model, [input_ids], reads=[3, 8])

    assert study.num_tokens == 24
    assert study.loss == pytest.approx(direct(), rel=1e-5)
    layout = Layout.of(model)
    assert [(d.read, d.source) for d in study.reads] == [
        (read, source) for read in (3, 8) for source in range(layout.num_visible(read))
    ]
    for dropped in study.reads:
        assert dropped.loss == pytest.approx(direct((dropped.read, dropped.source)), rel=1e-5)
        assert dropped.increase == pytest.approx(dropped.loss - study.loss)
    assert [dropped.source for dropped in study.blocks] == list(range(layout.num_blocks + 1))
    for dropped in study.blocks:
        everywhere = [(read, dropped.source) for read in range(1, 9) if layout.num_visible(read) > dropped.source]
        assert dropped.loss == pytest.approx(direct(*everywhere), rel=1e-5)
    settings = {id(layer.depth_settings.implementation) for layer in decoder_layers(model)}
    assert len(settings) == 1
    assert mean_loss(model, [input_ids])[0] == study.loss


def test_without_a_source_a_converted_model_has_the_residual_stream_without_it() -> None:
    """The embedding, taken out of the output read alone, is missing from the sum that the final norm gets."""
    backbone, input_ids = tiny_model("qwen3"), random_tokens()
    model = retrofit(backbone, block_size=4)
    with torch.no_grad():
        last: list[torch.Tensor] = []
        backbone.model.norm.register_forward_pre_hook(lambda _, args: last.append(args[0]))
        backbone(input_ids)
        stream = last[0] - backbone.get_input_embeddings()(input_ids)
        logits = backbone.lm_head(backbone.model.norm(stream))[:, :-1]
        expected = torch.nn.functional.cross_entropy(logits.flatten(0, 1), input_ids[:, 1:].flatten()).item()
    assert mean_loss(model, [input_ids], [(8, 0)])[0] == pytest.approx(expected, rel=1e-5)
    assert math.isfinite(expected)
