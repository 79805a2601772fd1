"""The included checkpoint is what its README says: small, trained, and converted without loss."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from attnres import convert
from attnres.examples.demo import CHECKPOINT
from attnres.examples.train_tiny_qwen3 import bits_per_byte, standard_library

PROMPTS = 20


@pytest.fixture(scope="module")
def held_out() -> list[str]:
    """Held-out files are chosen by their path alone, so this holds for the standard library of any Python."""
    return [text for _, text in standard_library(held_out=True)]


@pytest.fixture(scope="module")
def converted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    destination = tmp_path_factory.mktemp("converted") / "tiny-qwen3-attnres"
    convert(CHECKPOINT, destination, num_blocks=8)
    return destination


def load(path: Path, dtype: torch.dtype = torch.float32) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(path, dtype=dtype).eval()


def prompts(held_out: list[str]) -> list[torch.Tensor]:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    return [tokenizer(text, return_tensors="pt")["input_ids"][:, :24] for text in held_out if len(text) > 200][:PROMPTS]


def test_size_and_layers() -> None:
    assert sum(path.stat().st_size for path in CHECKPOINT.iterdir()) <= 8_000_000
    config = json.loads((CHECKPOINT / "config.json").read_text())
    assert config["num_hidden_layers"] >= 8
    assert config["tie_word_embeddings"]


def test_it_knows_python(held_out: list[str]) -> None:
    """2.2 bits per byte is asked for; a uniform guess is 8, a byte-level unigram model above 4."""
    sample = [text[:4000] for text in held_out if text]
    assert bits_per_byte(load(CHECKPOINT), AutoTokenizer.from_pretrained(CHECKPOINT), sample) <= 2.2
    report = json.loads((CHECKPOINT / "training.json").read_text())
    assert report["held_out_bits_per_byte"] <= 2.2


@torch.no_grad()
def test_float32_logits_and_greedy_tokens(held_out: list[str], converted: Path) -> None:
    original, result = load(CHECKPOINT), load(converted)
    assert len(prompts(held_out)) == PROMPTS
    for input_ids in prompts(held_out):
        assert (original(input_ids).logits - result(input_ids).logits).abs().max() <= 1e-4
        kwargs = dict(max_new_tokens=24, do_sample=False)
        assert torch.equal(original.generate(input_ids, **kwargs), result.generate(input_ids, **kwargs))


@torch.no_grad()
def test_bfloat16_divergence(held_out: list[str], converted: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    windows = [tokenizer(text, return_tensors="pt")["input_ids"][:, :256] for text in held_out if text][:PROMPTS]
    expected = [load(CHECKPOINT)(ids).logits.double().log_softmax(-1) for ids in windows]

    def divergence(path: Path) -> float:
        model = load(path, torch.bfloat16)
        total = sum(
            (e.exp() * (e - model(ids).logits.double().log_softmax(-1))).sum().item()
            for ids, e in zip(windows, expected)
        )
        return total / sum(ids.numel() for ids in windows)

    ours, originals = divergence(converted), divergence(CHECKPOINT)
    print(f"KL to float32: {ours:.3e} converted, {originals:.3e} original")
    assert ours <= 1.1 * originals
