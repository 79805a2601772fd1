"""The core of the package, in seconds: what has to hold on every version of Transformers that is declared.

`make test-versions` runs this file on the oldest version and on the one that vLLM pins, each in an environment of its
own, with a checkpoint that the newest version converted (`ATTNRES_CONVERTED`). `make test` runs it on the newest.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import depth_attention, random_tokens, randomize, retrofit, tiny_model
from transformers import AutoModel, AutoModelForCausalLM, AutoTokenizer, Trainer, TrainingArguments

from attnres import AttnResForCausalLM, AttnResModel, convert
from attnres.examples.demo import CHECKPOINT

FAMILIES = ("llama", "qwen3", "gemma2", "mixtral", "deepseek_v3", "gpt2", "gpt_neox")
GREEDY = dict(max_new_tokens=12, do_sample=False)


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Tiny-qwen3, converted by this version of Transformers or by the one that `ATTNRES_CONVERTED` comes from."""
    if given := os.environ.get("ATTNRES_CONVERTED"):
        return Path(given)
    directory = tmp_path_factory.mktemp("converted") / "tiny-qwen3"
    convert(CHECKPOINT, directory, num_blocks=4)
    return directory


@torch.no_grad()
def test_converted_checkpoint_loads_and_is_lossless(converted: Path) -> None:
    plain = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32)
    model, info = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32, output_loading_info=True)
    assert isinstance(model, (AttnResForCausalLM, type(plain)))
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    tokenizer = AutoTokenizer.from_pretrained(converted)
    inputs = tokenizer("def main(", return_tensors="pt")
    assert (
        inputs["input_ids"].tolist()
        == AutoTokenizer.from_pretrained(CHECKPOINT)("def main(", return_tensors="pt")["input_ids"].tolist()
    )
    torch.testing.assert_close(model(**inputs).logits, plain(**inputs).logits, atol=2e-4, rtol=1e-5)
    assert torch.equal(model.generate(**inputs, **GREEDY), plain.generate(**inputs, **GREEDY))
    headless = AutoModel.from_pretrained(converted, dtype=torch.float32)
    assert isinstance(headless, AttnResModel)


def test_converted_checkpoint_loads_without_the_package(converted: Path, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(converted, dtype=torch.float32)
    input_ids = torch.tensor([[5, 6, 7, 8]])
    expected = model.generate(input_ids, **GREEDY)[0].tolist()
    program = (
        "import sys; sys.modules['attnres'] = None\n"  # any import of it fails
        "import torch\n"
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n"
        f"path = {str(converted)!r}\n"
        "tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)\n"
        "model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32, trust_remote_code=True)\n"
        "print(model.generate(torch.tensor([[5, 6, 7, 8]]), max_new_tokens=12, do_sample=False)[0].tolist())\n"
        "model.save_pretrained('again')\n"
    )
    environment = os.environ | {"HF_HOME": str(tmp_path / "home")}
    result = subprocess.run(
        [sys.executable, "-P", "-c", program], cwd=tmp_path, env=environment, capture_output=True, text=True
    )
    assert result.returncode == 0, result.stderr
    assert json.loads(result.stdout.splitlines()[-1]) == expected
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "again", dtype=torch.float32)
    assert again.generate(input_ids, **GREEDY)[0].tolist() == expected


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_families(family: str, tmp_path: Path) -> None:
    backbone = tiny_model(family)
    model = retrofit(backbone, num_blocks=3)
    input_ids = random_tokens()
    torch.testing.assert_close(model(input_ids).logits, backbone(input_ids).logits, atol=2e-5, rtol=1e-5)
    assert torch.equal(model.generate(input_ids, **GREEDY), backbone.generate(input_ids, **GREEDY))
    randomize(model)
    model.save_pretrained(tmp_path / "saved")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "saved").eval()
    torch.testing.assert_close(loaded(input_ids).logits, model(input_ids).logits, atol=1e-5, rtol=1e-5)
    outputs = model(input_ids, output_depth_attentions=True, output_hidden_states=True)
    assert len(outputs.depth_attentions) == model.config.num_reads
    assert len(outputs.hidden_states) == 1 + model.config.num_hidden_layers


@pytest.mark.parametrize("family", ["qwen3", "mixtral"])
def test_conversion(family: str, tmp_path: Path) -> None:
    tiny_model(family).save_pretrained(tmp_path / "source")
    report = convert(tmp_path / "source", tmp_path / "converted", num_blocks=3)
    assert report.verification is not None
    assert report.verification.greedy_agreement == 1


def test_training_is_resumed_to_the_same_weights(tmp_path: Path) -> None:
    data = [{"input_ids": row, "labels": row} for row in random_tokens(batch=8, length=12)]

    def train(directory: Path, resume: bool = False) -> Any:
        torch.manual_seed(0)
        arguments = TrainingArguments(
            output_dir=str(directory),
            per_device_train_batch_size=4,
            learning_rate=1e-2,
            max_steps=6,
            save_steps=3,
            report_to="none",
            use_cpu=True,
            disable_tqdm=True,
        )
        model = retrofit(tiny_model("qwen3"), block_size=2).train()
        trainer = Trainer(model=model, args=arguments, train_dataset=data)
        trainer.train(resume_from_checkpoint=str(directory / "checkpoint-3") if resume else None)
        return model

    expected = train(tmp_path / "whole")
    shutil.rmtree(tmp_path / "whole" / "checkpoint-6")
    resumed = train(tmp_path / "whole", resume=True)
    assert depth_attention(expected).query.any()
    for (name, a), (_, b) in zip(resumed.named_parameters(), expected.named_parameters(), strict=True):
        torch.testing.assert_close(a, b, atol=0, rtol=0, msg=name)
