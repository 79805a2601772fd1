from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import FAMILIES, random_tokens, retrofit, tiny_model
from transformers import DynamicCache, PreTrainedModel, StaticCache, pipeline, set_seed

from attnres import AttnResForCausalLM

GREEDY = dict(do_sample=False, max_new_tokens=10, eos_token_id=-1)


@pytest.fixture(scope="module")
def model() -> AttnResForCausalLM:
    return retrofit(tiny_model("qwen3"), random_queries=True, block_size=3)


def generate_without_cache(model: PreTrainedModel, input_ids: torch.Tensor, count: int) -> torch.Tensor:
    for _ in range(count):
        logits = model(input_ids, use_cache=False).logits[:, -1]
        input_ids = torch.cat([input_ids, logits.argmax(-1, keepdim=True)], dim=-1)
    return input_ids


@torch.no_grad()
@pytest.mark.parametrize("block_size", [1, 3])
@pytest.mark.parametrize("family", FAMILIES)
def test_cached_decoding_equals_the_full_forward(family: str, block_size: int) -> None:
    model = retrofit(tiny_model(family), random_queries=True, block_size=block_size)
    input_ids = random_tokens(length=12)
    expected = model(input_ids, use_cache=False).logits
    cache = DynamicCache(config=model.config.get_text_config())
    pieces = [input_ids[:, :5], input_ids[:, 5:6], input_ids[:, 6:7], input_ids[:, 7:12]]
    logits = [model(piece, past_key_values=cache, use_cache=True).logits for piece in pieces]
    torch.testing.assert_close(torch.cat(logits, dim=1), expected, atol=2e-5, rtol=1e-4)


LONGROPE = dict(
    rope_parameters=dict(
        rope_type="longrope",
        rope_theta=10000.0,
        short_factor=[1.0] * 4,
        long_factor=[4.0] * 4,
        short_mscale=1.0,
        long_mscale=1.2,
        original_max_position_embeddings=16,
    ),
    original_max_position_embeddings=16,
    max_position_embeddings=64,
)


@torch.no_grad()
@pytest.mark.parametrize(
    ("family", "overrides"), [("minimax", {}), ("bamba", {}), ("phi3", LONGROPE), ("phimoe", LONGROPE)]
)
def test_what_a_backbone_does_with_its_cache_it_still_does(family: str, overrides: dict[str, Any]) -> None:
    """MiniMax makes one of its own; Phi-3 starts anew where a sequence outgrows the short rotary scaling."""
    backbone = tiny_model(family, **overrides)
    input_ids = random_tokens()
    assert torch.equal(retrofit(backbone).generate(input_ids, **GREEDY), backbone.generate(input_ids, **GREEDY))


@torch.no_grad()
@pytest.mark.parametrize("cache", ["dynamic", "static", "offloaded", "offloaded_static"])
def test_caches(model: AttnResForCausalLM, cache: str) -> None:
    if "offloaded" in cache and not torch.cuda.is_available():
        pytest.skip("offloaded caches of transformers need an accelerator, to offload from")
    input_ids = random_tokens(length=6)
    expected = generate_without_cache(model, input_ids, 10)
    assert torch.equal(model.generate(input_ids, cache_implementation=cache, **GREEDY), expected)


@torch.no_grad()
def test_static_cache_passed_in(model: AttnResForCausalLM) -> None:
    input_ids = random_tokens(length=6)
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=32)
    expected = generate_without_cache(model, input_ids, 10)
    assert torch.equal(model.generate(input_ids, past_key_values=cache, **GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_changes_nothing(family: str, side: str) -> None:
    model = retrofit(tiny_model(family), random_queries=True, block_size=3)
    long, short = random_tokens(1, 9, seed=1), random_tokens(1, 6, seed=2)
    padding = torch.zeros(1, 3, dtype=torch.long)
    padded = torch.cat([padding, short] if side == "left" else [short, padding], dim=1)
    mask = torch.ones(2, 9, dtype=torch.long)
    mask[1, : 3 if side == "left" else None] = 0
    if side == "right":
        mask[1] = torch.tensor([1] * 6 + [0] * 3)
    batch = model(torch.cat([long, padded]), attention_mask=mask, position_ids=positions(mask)).logits
    alone = model(short).logits
    torch.testing.assert_close(batch[1:, 3:] if side == "left" else batch[1:, :6], alone, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(batch[:1], model(long).logits, atol=1e-5, rtol=1e-4)


def positions(mask: torch.Tensor) -> torch.Tensor:
    return (mask.cumsum(-1) - 1).clamp(min=0)


@torch.no_grad()
def test_generation_from_a_left_padded_batch(model: AttnResForCausalLM) -> None:
    long, short = random_tokens(1, 9, seed=1), random_tokens(1, 6, seed=2)
    batch = torch.cat([long, torch.cat([torch.zeros(1, 3, dtype=torch.long), short], dim=1)])
    generated = model.generate(batch, attention_mask=(batch != 0).long(), **GREEDY)
    assert torch.equal(generated[1:, 9:], model.generate(short, **GREEDY)[:, 6:])


@torch.no_grad()
@pytest.mark.parametrize(
    "kwargs",
    [
        dict(do_sample=True, temperature=0.8, top_k=20),
        dict(num_beams=3, do_sample=False),
        dict(num_beams=2, num_return_sequences=2, do_sample=False),
        dict(do_sample=False, repetition_penalty=1.3),
        dict(do_sample=False, prompt_lookup_num_tokens=3),
    ],
    ids=["sampling", "beams", "several sequences", "repetition penalty", "prompt lookup"],
)
def test_strategies_agree_with_the_backbone(kwargs: dict[str, Any]) -> None:
    backbone = tiny_model("qwen3")
    input_ids = random_tokens(1, 8)
    outputs = []
    for model in (backbone, retrofit(backbone, block_size=3)):
        set_seed(0)
        outputs.append(model.generate(input_ids, max_new_tokens=10, eos_token_id=-1, **kwargs))
    assert torch.equal(*outputs)


@torch.no_grad()
def test_assisted_generation(model: AttnResForCausalLM) -> None:
    input_ids = random_tokens(1, 8)
    expected = model.generate(input_ids, **GREEDY)
    for assistant in (tiny_model("qwen3"), retrofit(tiny_model("qwen3"), block_size=2)):
        assert torch.equal(model.generate(input_ids, assistant_model=assistant, **GREEDY), expected)


@torch.no_grad()
@pytest.mark.parametrize("logits_to_keep", [1, 3, torch.tensor([0, 4])])
def test_logits_to_keep(model: AttnResForCausalLM, logits_to_keep: int | torch.Tensor) -> None:
    input_ids = random_tokens()
    everything = model(input_ids).logits
    index = slice(-logits_to_keep, None) if isinstance(logits_to_keep, int) else logits_to_keep
    kept = model(input_ids, logits_to_keep=logits_to_keep).logits
    torch.testing.assert_close(kept, everything[:, index], atol=1e-6, rtol=1e-5)


@torch.no_grad()
def test_inputs_embeds(model: AttnResForCausalLM) -> None:
    input_ids = random_tokens()
    embeds = model.get_input_embeddings()(input_ids)
    generated = model.generate(inputs_embeds=embeds, **GREEDY)
    assert torch.equal(generated, model.generate(input_ids, **GREEDY)[:, input_ids.shape[1] :])
    torch.testing.assert_close(model(inputs_embeds=embeds).logits, model(input_ids).logits)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3", "mistral", "kimi_linear"])
def test_chunked_prefill(family: str) -> None:
    model = retrofit(tiny_model(family), random_queries=True, block_size=3)
    input_ids = random_tokens(length=13)
    expected = model.generate(input_ids, **GREEDY)
    assert torch.equal(model.generate(input_ids, prefill_chunk_size=4, **GREEDY), expected)


@torch.no_grad()
def test_depth_attentions_while_decoding(model: AttnResForCausalLM) -> None:
    input_ids = random_tokens(length=7)
    everything = model(input_ids, output_depth_attentions=True).depth_attentions
    cache = model(input_ids[:, :6], use_cache=True).past_key_values
    last = model(input_ids[:, 6:], past_key_values=cache, output_depth_attentions=True).depth_attentions
    for full, step in zip(everything, last, strict=True):
        torch.testing.assert_close(step, full[:, -1:], atol=1e-5, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("backend", ["eager", "inductor"])
def test_compiled_decoding_with_a_static_cache(backend: str) -> None:
    """One graph, and no recompilation while the sequence grows."""
    model = retrofit(tiny_model("qwen3", num_hidden_layers=2), random_queries=True, block_size=3)
    input_ids = random_tokens(length=12)
    expected = model(input_ids).logits
    cache = StaticCache(config=model.config.get_text_config(), max_cache_len=16)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    model(input_ids[:, :4], past_key_values=cache)
    logits = []
    for position in range(4, 12):
        if position == 6:
            torch._dynamo.utils.counters.clear()
        token = input_ids[:, position : position + 1]
        logits.append(compiled(token, past_key_values=cache, position_ids=torch.tensor([[position]])).logits)
    assert torch._dynamo.utils.counters["stats"].get("unique_graphs", 0) == 0, "recompiled while decoding"
    torch.testing.assert_close(torch.cat(logits, dim=1), expected[:, 4:], atol=1e-5, rtol=1e-4)


def test_pipeline(tmp_path: Path) -> None:
    from attnres import convert
    from attnres.examples.demo import CHECKPOINT

    convert(CHECKPOINT, tmp_path / "converted", verify="none")
    prompt = "class TestParser(unittest.TestCase):\n    def"
    texts = [
        pipeline("text-generation", str(path))(prompt, do_sample=False, max_new_tokens=16)[0]["generated_text"]
        for path in (CHECKPOINT, tmp_path / "converted")
    ]
    assert texts[0] == texts[1]
    assert texts[0].startswith(prompt)
