"""PEFT: each method finds in an AttnRes model what it finds in the plain one, and computes the same there."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import assert_same_training, freeze_depth, row, train
from tiny import depth_attention, random_tokens, randomize, retrofit, tiny_model

from attnres import AttnResForCausalLM

peft = pytest.importorskip("peft")

# The configuration of each method, without targets, which PEFT looks up by the backbone's model type.
METHODS: dict[str, tuple[str, dict[str, Any]]] = {
    "LoRA, default targets": ("LoraConfig", dict(r=4)),
    "DoRA": ("LoraConfig", dict(r=4, use_dora=True)),
    "rsLoRA, `all-linear`": ("LoraConfig", dict(r=4, use_rslora=True, target_modules="all-linear")),
    "IA3": ("IA3Config", {}),
    "AdaLoRA": ("AdaLoraConfig", dict(init_r=4, target_r=2, total_step=8, tinit=1, tfinal=1)),
    "prompt tuning": ("PromptTuningConfig", dict(num_virtual_tokens=4)),
    "prefix tuning": ("PrefixTuningConfig", dict(num_virtual_tokens=4)),
    "p-tuning": ("PromptEncoderConfig", dict(num_virtual_tokens=4, encoder_hidden_size=16)),
    "trainable tokens, tied head": ("TrainableTokensConfig", dict(token_indices=[5, 7, 11])),
    "LN tuning": ("LNTuningConfig", {}),
}
MERGING = [name for name in METHODS if "tuning" not in name or "LN" in name]


def adapted(model: Any, name: str, randomly: bool = True) -> Any:
    """The model with an adapter of a method. Its parameters are random, so that it changes the outputs."""
    class_name, kwargs = METHODS[name]
    torch.manual_seed(0)
    adapter = peft.get_peft_model(model, getattr(peft, class_name)(task_type="CAUSAL_LM", **kwargs)).eval()
    if randomly:
        generator = torch.Generator().manual_seed(3)
        with torch.no_grad():
            for _, parameter in sorted(own_parameters(adapter).items()):
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return adapter


def own_parameters(model: Any) -> dict[str, torch.nn.Parameter]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def data() -> list[dict[str, torch.Tensor]]:
    return [{"input_ids": tokens, "labels": tokens} for tokens in random_tokens(batch=4, length=12)] * 4


def close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, atol=2e-4, rtol=2e-4)


@row("PEFT", *METHODS)
@pytest.mark.parametrize("name", METHODS)
def test_adapted_logits_are_those_of_the_adapted_plain_model(name: str, tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    plain, ours = adapted(tiny_model("qwen3"), name), adapted(retrofit(base), name)
    assert sorted(own_parameters(ours)) == sorted(own_parameters(plain)), "the same parameters under the same names"
    input_ids = random_tokens()
    expected = plain(input_ids=input_ids).logits
    assert (expected[:, -13:] - base(input_ids).logits).abs().max() > 1e-2, "the adapter changes nothing"
    close(ours(input_ids=input_ids).logits, expected)
    generation = dict(input_ids=input_ids, max_new_tokens=6, do_sample=False)
    assert torch.equal(ours.generate(**generation), plain.generate(**generation))

    # An adapter that was trained on the plain model is loaded on the converted one.
    plain.save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(retrofit(base), tmp_path / "adapter").eval()
    close(loaded(input_ids=input_ids).logits, expected)
    if name in MERGING:
        merged = loaded.merge_and_unload()
        assert isinstance(merged, AttnResForCausalLM)
        close(merged(input_ids).logits, expected)
        merged.save_pretrained(tmp_path / "merged")
        close(AttnResForCausalLM.from_pretrained(tmp_path / "merged").eval()(input_ids).logits, expected)


@row(
    "PEFT", "LoRA in Trainer: losses, checkpoint, an adapter of the plain model on the converted checkpoint's directory"
)
def test_lora_in_trainer(tmp_path: Path) -> None:
    base = tiny_model("qwen3")
    base.save_pretrained(tmp_path / "plain")
    AttnResForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "converted")
    plain = adapted(base, "LoRA, default targets", randomly=False)
    ours = adapted(AttnResForCausalLM.from_pretrained(tmp_path / "converted"), "LoRA, default targets", randomly=False)
    expected = train(plain.train(), tmp_path / "a", data(), max_steps=8)
    actual = train(ours.train(), tmp_path / "b", data(), max_steps=8)
    assert_same_training(actual, expected)

    plain.save_pretrained(tmp_path / "adapter")
    input_ids = random_tokens()
    converted = AttnResForCausalLM.from_pretrained(tmp_path / "converted")
    loaded = peft.PeftModel.from_pretrained(converted, tmp_path / "adapter").eval()
    close(loaded(input_ids=input_ids).logits, plain.eval()(input_ids=input_ids).logits)


@row("PEFT", 'LoRA beside trained depth parameters (`modules_to_save=["depth_attention"]`)')
def test_depth_parameters_beside_lora(tmp_path: Path) -> None:
    config = peft.LoraConfig(r=4, modules_to_save=["depth_attention"], task_type="CAUSAL_LM")
    model = peft.get_peft_model(retrofit(tiny_model("qwen3")), config)
    train(model.train(), tmp_path / "run", data())
    model.eval().save_pretrained(tmp_path / "adapter")
    loaded = peft.PeftModel.from_pretrained(retrofit(tiny_model("qwen3")), tmp_path / "adapter").eval()
    input_ids = random_tokens()
    expected = model(input_ids=input_ids).logits
    torch.testing.assert_close(loaded(input_ids=input_ids).logits, expected)
    merged = loaded.merge_and_unload()
    close(merged(input_ids).logits, expected)
    assert depth_attention(merged).query.any()


@row("PEFT", "IA3, LoRA and prompt tuning with queries that are not zero")
@pytest.mark.parametrize("name", ["LoRA, default targets", "IA3", "prompt tuning"])
@pytest.mark.parametrize("family", ["llama", "gemma2", "qwen3_moe"])
def test_adapter_with_random_queries(name: str, family: str, tmp_path: Path) -> None:
    """The adapter is applied to the same layers, whatever the queries are: merged and unmerged agree."""
    model = retrofit(tiny_model(family), random_queries=True)
    before = model(random_tokens()).logits
    try:
        adapted(tiny_model(family), name)
    except ValueError as error:
        with pytest.raises(ValueError, match=str(error)[:40]):
            adapted(model, name)
        pytest.skip(f"PEFT has no default targets for {family}")
    adapter = adapted(model, name)
    logits = adapter(input_ids=random_tokens()).logits
    assert (logits[:, -13:] - before).abs().max() > 1e-2
    if name in MERGING:
        close(adapter.merge_and_unload()(random_tokens()).logits, logits)
    else:
        with adapter.disable_adapter():
            close(adapter(input_ids=random_tokens()).logits, before)


@row("PEFT", "several adapters: `add_adapter`, `set_adapter`, `disable_adapter`")
def test_several_adapters() -> None:
    plain, ours = tiny_model("qwen3"), retrofit(tiny_model("qwen3"))
    input_ids, results = random_tokens(), []
    for model in (plain, ours):
        torch.manual_seed(0)
        kwargs = dict(r=2, init_lora_weights=False, task_type="CAUSAL_LM")
        adapted = peft.get_peft_model(model, peft.LoraConfig(**kwargs), adapter_name="a").eval()
        adapted.add_adapter("b", peft.LoraConfig(**kwargs))
        outputs = []
        for adapter in ("a", "b"):
            adapted.set_adapter(adapter)
            outputs.append(adapted(input_ids=input_ids).logits)
        with adapted.disable_adapter():
            outputs.append(adapted(input_ids=input_ids).logits)
        results.append(torch.stack(outputs))
    assert (results[0][0] - results[0][1]).abs().max() > 1e-2
    close(results[1], results[0])


def test_frozen_depth_parameters_are_all_that_differs() -> None:
    """What the comparisons above rest on: a zero query gives the plain model's logits, another does not."""
    plain = tiny_model("qwen3")
    ours = freeze_depth(retrofit(plain))
    close(ours(random_tokens()).logits, plain(random_tokens()).logits)
    randomize(ours)
    assert (ours(random_tokens()).logits - plain(random_tokens()).logits).abs().max() > 1e-2
