"""The Trainer of Transformers trains an AttnRes model as it trains the plain one."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from ecosystem import assert_same_training, freeze_depth, losses_of, row, train, training_arguments
from safetensors.torch import load_file
from tiny import depth_attention, random_tokens, randomize, retrofit, tiny_model
from transformers import AutoModelForCausalLM, DataCollatorWithFlattening, Trainer

from attnres import AttnResForCausalLM, AttnResModel

# The settings under which losses are compared, by the line of the table that each stands for.
SETTINGS: dict[str, dict[str, Any]] = {
    "train": {},
    "`label_smoothing_factor`": dict(label_smoothing_factor=0.2),
    "`neftune_noise_alpha`": dict(neftune_noise_alpha=5.0),
    "`gradient_accumulation_steps`": dict(per_device_train_batch_size=2, gradient_accumulation_steps=2),
    "`gradient_checkpointing`": dict(gradient_checkpointing=True),
    "`torch_compile`, Inductor": dict(torch_compile=True),
    "`weight_decay`, `max_grad_norm`": dict(weight_decay=2.0, max_grad_norm=0.1),
    "`optim`: Adafactor": dict(optim="adafactor"),
}

CHANGES_LOSSES = {name for name in SETTINGS if any(word in name for word in ("smoothing", "neftune", "decay", "optim"))}


def dataset(rows: int = 16) -> list[dict[str, torch.Tensor]]:
    """Four sequences again and again, so that a few steps lower the loss."""
    return [{"input_ids": tokens, "labels": tokens} for tokens in random_tokens(batch=4, length=12)] * (rows // 4)


def pair(family: str = "qwen3", **kwargs: Any) -> tuple[Any, Any]:
    """A plain model, and the same with depth attention, whose queries are zero and stay so."""
    plain = tiny_model(family, **kwargs)
    return plain, freeze_depth(retrofit(plain))


@row("Trainer", *SETTINGS)
@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", SETTINGS)
def test_losses_are_those_of_the_plain_model(name: str, tmp_path: Path) -> None:
    plain, ours = pair(num_hidden_layers=2 if "compile" in name else 4)
    expected = train(plain.train(), tmp_path / "plain", dataset(), **SETTINGS[name])
    actual = train(ours.train(), tmp_path / "ours", dataset(), **SETTINGS[name])
    assert_same_training(actual, expected)
    if name in CHANGES_LOSSES:  # or else the comparison says nothing
        base = train(tiny_model("qwen3").train(), tmp_path / "base", dataset())
        assert (losses_of(base) - losses_of(expected)).abs().max() > 1e-3


@row("Trainer", "`bf16`")
def test_losses_in_mixed_precision(tmp_path: Path) -> None:
    plain, ours = pair()
    expected = losses_of(train(plain.train(), tmp_path / "plain", dataset(), bf16=True))
    actual = losses_of(train(ours.train(), tmp_path / "ours", dataset(), bf16=True))
    torch.testing.assert_close(actual, expected, atol=0.05, rtol=0)


@row("Trainer", "packing without padding (`DataCollatorWithFlattening`)")
def test_losses_of_flattened_sequences(tmp_path: Path) -> None:
    data = [{"input_ids": tokens[: 5 + index % 4].tolist()} for index, tokens in enumerate([*random_tokens(4, 12)] * 4)]
    plain, ours = pair()
    kwargs = dict(data_collator=DataCollatorWithFlattening())
    expected = train(plain.train(), tmp_path / "plain", data, **kwargs)
    assert_same_training(train(ours.train(), tmp_path / "ours", data, **kwargs), expected)


@row("Trainer", "experts: router loss beside the loss")
def test_losses_with_experts(tmp_path: Path) -> None:
    plain, ours = pair("qwen3_moe", output_router_logits=True, router_aux_loss_coef=0.5)
    expected = train(plain.train(), tmp_path / "plain", dataset())
    assert_same_training(train(ours.train(), tmp_path / "ours", dataset()), expected)


@row("Trainer", "`evaluate`, `predict`")
def test_evaluation_and_prediction(tmp_path: Path) -> None:
    plain, ours = pair()
    data, results = dataset(4), []
    for model in (plain, ours):
        trainer = Trainer(model=model, args=training_arguments(tmp_path, per_device_eval_batch_size=2))
        prediction = trainer.predict(data)
        logits = prediction.predictions[0] if isinstance(prediction.predictions, tuple) else prediction.predictions
        results.append((trainer.evaluate(data)["eval_loss"], torch.from_numpy(logits)))
    torch.testing.assert_close(results[1][0], results[0][0], atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(results[1][1], results[0][1], atol=1e-4, rtol=1e-4)


@row("Trainer", "`resume_from_checkpoint`")
@pytest.mark.parametrize("in_a_new_process", [False, True])
def test_resumed_training_is_the_training_without_a_break(in_a_new_process: bool, tmp_path: Path) -> None:
    """Depth parameters learn here, so they, and the optimiser's state for them, must come back too."""
    kwargs = dict(max_steps=6, save_strategy="steps", save_steps=3)
    whole = train(retrofit(tiny_model("qwen3")).train(), tmp_path / "whole", dataset(24), **kwargs)
    (tmp_path / "part").mkdir()
    (tmp_path / "whole" / "checkpoint-3").rename(tmp_path / "part" / "checkpoint-3")
    if in_a_new_process:
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "part" / "checkpoint-3")
        assert depth_attention(model).query.any()
    else:
        model = retrofit(tiny_model("qwen3", seed=7))
    resumed = train(model.train(), tmp_path / "part", dataset(24), resume=True, **kwargs)
    assert resumed.state.global_step == 6
    torch.testing.assert_close(losses_of(resumed), losses_of(whole))
    for name, expected in whole.model.state_dict().items():
        torch.testing.assert_close(resumed.model.state_dict()[name], expected, msg=name)


@row("Trainer", "`load_best_model_at_end`")
def test_the_best_model_is_loaded_at_the_end(tmp_path: Path) -> None:
    """With this learning rate the loss gets worse again, so the best checkpoint is not the last one."""
    trainer = train(
        retrofit(tiny_model("qwen3")).train(),
        tmp_path,
        dataset(4),
        eval_dataset=[{"input_ids": tokens, "labels": tokens} for tokens in random_tokens(4, 12, seed=9)],
        learning_rate=5e-2,
        max_steps=6,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
    )
    assert trainer.state.best_model_checkpoint is not None
    assert Path(trainer.state.best_model_checkpoint).name != "checkpoint-6"
    best = load_file(Path(trainer.state.best_model_checkpoint) / "model.safetensors")
    state = trainer.model.state_dict()
    for name, expected in best.items():
        key = name if name in state else f"model.{name}"
        torch.testing.assert_close(state[key], expected, msg=name)
    assert depth_attention(trainer.model).query.any()


@row("Trainer", "no weight decay for depth parameters (`get_decay_parameter_names`)")
def test_depth_parameters_do_not_decay(tmp_path: Path) -> None:
    """A decay pulls key norms to zero and queries back to the residual sum; the plain model's norms do not decay."""
    plain = tiny_model("qwen3")
    expected = Trainer(model=plain, args=training_arguments(tmp_path)).get_decay_parameter_names(plain)
    ours = retrofit(plain)
    actual = Trainer(model=ours, args=training_arguments(tmp_path)).get_decay_parameter_names(ours)
    assert sorted(actual) == sorted(expected)


# -- what scripts do with a model that they train ----------------------------------------------------------------------


@row("Transformers", "`model.load_state_dict(load_file(...))`")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_a_state_dict_is_loaded_from_the_file(family: str, tmp_path: Path) -> None:
    """The library's own file has the names of the parameters, so plain PyTorch loads it."""
    plain = tiny_model(family)
    plain.save_pretrained(tmp_path / "plain")
    result = tiny_model(family, seed=5).load_state_dict(
        load_file(tmp_path / "plain" / "model.safetensors"), strict=False
    )
    tied = set(result.missing_keys)  # the head of a tied model is not in the file

    model = retrofit(plain, random_queries=True)
    model.save_pretrained(tmp_path / "ours")
    loaded = retrofit(tiny_model(family, seed=5))
    result = loaded.load_state_dict(load_file(tmp_path / "ours" / "model.safetensors"), strict=False)
    assert not result.unexpected_keys
    assert set(result.missing_keys) == tied
    loaded.tie_weights()
    input_ids = random_tokens()
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits)


@row("Transformers", "`model.base_model(ids)`, `model.get_decoder()(ids)`, `model.model(ids)`")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "deepseek_v3"])
def test_the_decoder_is_called_alone(family: str) -> None:
    plain = tiny_model(family)
    ours = retrofit(plain)
    input_ids = random_tokens()
    for get in (lambda m: m.base_model, lambda m: m.get_decoder(), lambda m: m.model):
        expected, actual = get(plain)(input_ids), get(ours)(input_ids)
        assert isinstance(get(ours), AttnResModel)
        torch.testing.assert_close(actual.last_hidden_state, expected.last_hidden_state, atol=1e-4, rtol=1e-4)
    randomize(ours)
    hidden_states = ours.get_decoder()(input_ids).last_hidden_state
    assert not torch.allclose(hidden_states, plain.get_decoder()(input_ids).last_hidden_state, atol=1e-2)
    logits = ours.get_output_embeddings()(hidden_states)
    if family == "gemma2":
        cap = ours.config.final_logit_softcapping
        logits = torch.tanh(logits / cap) * cap
    torch.testing.assert_close(logits, ours(input_ids).logits, atol=1e-5, rtol=1e-5)


@row("Transformers", "`resize_token_embeddings`, tied and untied")
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_more_tokens(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    ours = retrofit(plain)
    input_ids = random_tokens()
    for model in (plain, ours):
        torch.manual_seed(0)
        model.resize_token_embeddings(104)
    torch.testing.assert_close(ours(input_ids).logits, plain(input_ids).logits, atol=1e-4, rtol=1e-4)
    ours.save_pretrained(tmp_path)
    loaded = AttnResForCausalLM.from_pretrained(tmp_path)
    assert loaded.config.vocab_size == 104
    torch.testing.assert_close(loaded(input_ids).logits, ours(input_ids).logits)
