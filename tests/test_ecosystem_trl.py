"""TRL: each trainer gives the losses of the plain model, and moves the depth parameters when it may."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from ecosystem import assert_same_training, freeze_depth, losses_of, row
from tiny import depth_attention
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer, set_seed

from attnres import AttnResForCausalLM
from attnres.modeling_attnres import AttnResForSequenceClassification

try:
    import trl
except ModuleNotFoundError:
    trl = None

pytestmark = pytest.mark.skipif(trl is None, reason="TRL is in the extra `train`")

SOURCE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
LINES = ["def add(a, b): return a + b", "import os", "for i in range(3): print(i)", "class A: pass"]
COMMON: dict[str, Any] = dict(
    per_device_train_batch_size=2,
    learning_rate=5e-3,
    max_steps=4,
    logging_steps=1,
    save_strategy="no",
    report_to="none",
    use_cpu=True,
    bf16=False,
    disable_tqdm=True,
)
KINDS = ("plain", "ours", "learning")


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two layers of the example, with a chat template, in float32."""
    directory = tmp_path_factory.mktemp("trl") / "plain"
    model = AutoModelForCausalLM.from_pretrained(SOURCE, num_hidden_layers=2, dtype=torch.float32)
    model.config.layer_types = model.config.layer_types[:2]
    model.save_pretrained(directory)
    tokenizer = AutoTokenizer.from_pretrained(SOURCE)
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'] }}: {% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] }}\n"
        "{% endgeneration %}{% else %}{{ m['content'] }}\n{% endif %}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    )
    tokenizer.save_pretrained(directory)
    return directory


def model_of(kind: str, source: Path, head: bool = False) -> Any:
    """The plain model; ours with frozen depth parameters; or ours, all of which learns."""
    plain_class = AutoModelForSequenceClassification if head else AutoModelForCausalLM
    our_class = AttnResForSequenceClassification if head else AttnResForCausalLM
    set_seed(0)
    kwargs = dict(num_labels=1) if head else {}
    if kind == "plain":
        return plain_class.from_pretrained(source, dtype=torch.float32, **kwargs)
    model = our_class.from_pretrained(source, dtype=torch.float32, **kwargs)
    return model if kind == "learning" else freeze_depth(model)


def compare(make: Any, source: Path, learns: bool = True) -> None:
    """Trains each kind with the trainer that `make` gives for a model."""
    trainers = {}
    for kind in KINDS if learns else KINDS[:2]:
        trainer = make(model_of(kind, source))
        set_seed(0)
        trainer.train()
        trainers[kind] = trainer
    assert_same_training(trainers["ours"], trainers["plain"])
    if learns:
        torch.testing.assert_close(losses_of(trainers["learning"])[0], losses_of(trainers["plain"])[0])
        assert depth_attention(trainers["learning"].model).query.any()


def texts() -> Any:
    return datasets.Dataset.from_dict({"text": LINES * 4})


def dialogues() -> Any:
    rows = [
        [{"role": "user", "content": f"write {i}"}, {"role": "assistant", "content": line}]
        for i, line in enumerate(LINES)
    ]
    return datasets.Dataset.from_dict({"messages": rows * 4})


def completions() -> Any:
    return datasets.Dataset.from_dict(
        {"prompt": [line[:6] for line in LINES] * 4, "completion": [line[6:] for line in LINES] * 4}
    )


def preferences() -> Any:
    return datasets.Dataset.from_dict(
        {"prompt": ["write: "] * 16, "chosen": LINES * 4, "rejected": [line[::-1] for line in LINES] * 4}
    )


# The settings of supervised fine-tuning and its data, by the line of the table that each stands for.
SFT: dict[str, tuple[Any, dict[str, Any]]] = {
    "SFT, full": (texts, {}),
    "SFT, packing": (texts, dict(packing=True, max_length=32, packing_strategy="wrapped")),
    "SFT, loss on the assistant alone": (dialogues, dict(assistant_only_loss=True)),
    "SFT, loss on the completion alone": (completions, dict(completion_only_loss=True)),
}


@row("TRL", *SFT)
@pytest.mark.parametrize("name", SFT)
def test_sft(name: str, source: Path, tmp_path: Path) -> None:
    data, settings = SFT[name]
    config = dict(COMMON, output_dir=str(tmp_path), max_length=64) | settings
    tokenizer = AutoTokenizer.from_pretrained(source)

    def make(model: Any) -> Any:
        return trl.SFTTrainer(model, trl.SFTConfig(**config), train_dataset=data(), processing_class=tokenizer)

    compare(make, source)


@row("TRL", "SFT, LoRA with default targets")
def test_sft_with_lora(source: Path, tmp_path: Path) -> None:
    from peft import LoraConfig

    config = trl.SFTConfig(**COMMON | dict(output_dir=str(tmp_path), max_length=64, max_steps=8, learning_rate=5e-2))
    tokenizer = AutoTokenizer.from_pretrained(source)

    def make(model: Any) -> Any:
        set_seed(0)
        return trl.SFTTrainer(
            model,
            config,
            train_dataset=texts(),
            processing_class=tokenizer,
            peft_config=LoraConfig(r=4, task_type="CAUSAL_LM"),
        )

    compare(make, source, learns=False)


@row("TRL", "SFT from the path of a converted checkpoint")
def test_sft_from_a_path(source: Path, tmp_path: Path) -> None:
    AttnResForCausalLM.from_pretrained(source, dtype=torch.float32).save_pretrained(tmp_path / "converted")
    AutoTokenizer.from_pretrained(source).save_pretrained(tmp_path / "converted")
    config = trl.SFTConfig(**COMMON | dict(output_dir=str(tmp_path / "run"), max_length=64))
    found = []
    for path in (source, tmp_path / "converted"):
        set_seed(0)
        trainer = trl.SFTTrainer(str(path), config, train_dataset=texts())
        trainer.train()
        found.append(trainer)
    assert isinstance(found[1].model, AttnResForCausalLM)
    torch.testing.assert_close(losses_of(found[1])[0], losses_of(found[0])[0], atol=1e-3, rtol=1e-3)


@row("TRL", "DPO, with a reference model")
def test_dpo(source: Path, tmp_path: Path) -> None:
    config = trl.DPOConfig(**COMMON | dict(output_dir=str(tmp_path), max_length=64, learning_rate=1e-3))
    tokenizer = AutoTokenizer.from_pretrained(source)

    def make(model: Any) -> Any:
        return trl.DPOTrainer(model, args=config, train_dataset=preferences(), processing_class=tokenizer)

    compare(make, source)


@row("TRL", "GRPO: same completions, same losses")
def test_grpo(source: Path, tmp_path: Path) -> None:
    config = trl.GRPOConfig(
        **COMMON
        | dict(output_dir=str(tmp_path), max_completion_length=8, num_generations=2, max_steps=2, learning_rate=1e-3)
    )
    tokenizer = AutoTokenizer.from_pretrained(source)
    seen: dict[str, list[list[int]]] = {}
    rewards: dict[str, list[float]] = {}
    for kind in KINDS:
        ids = seen.setdefault(kind, [])

        def reward(completion_ids: list[list[int]], ids: list[list[int]] = ids, **_: Any) -> list[float]:
            ids.extend(completion_ids)
            return [float(sum(tokens) % 7) for tokens in completion_ids]

        model = model_of(kind, source)
        data = datasets.Dataset.from_dict({"prompt": [line[:6] for line in LINES]})
        trainer = trl.GRPOTrainer(model, reward, args=config, train_dataset=data, processing_class=tokenizer)
        set_seed(0)
        trainer.train()
        rewards[kind] = [entry["reward"] for entry in trainer.state.log_history if "reward" in entry]
    assert len(seen["plain"]) == 4
    assert seen["ours"] == seen["plain"]
    assert rewards["ours"] == rewards["plain"]
    assert depth_attention(model).query.any()


@row("TRL", "RewardTrainer")
def test_reward(source: Path, tmp_path: Path) -> None:
    config = trl.RewardConfig(**COMMON | dict(output_dir=str(tmp_path), max_length=64, learning_rate=1e-3))
    tokenizer = AutoTokenizer.from_pretrained(source)
    trainers = {}
    for kind in KINDS:
        trainer = trl.RewardTrainer(
            model_of(kind, source, head=True), config, train_dataset=preferences(), processing_class=tokenizer
        )
        set_seed(0)
        trainer.train()
        trainers[kind] = trainer
    assert_same_training(trainers["ours"], trainers["plain"])
    assert depth_attention(trainers["learning"].model).query.any()
