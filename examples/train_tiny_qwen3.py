"""Train `examples/tiny-qwen3`: a small Qwen3 that writes Python, from nothing but the standard library.

    python examples/train_tiny_qwen3.py                      # train, measure, write examples/tiny-qwen3
    python examples/train_tiny_qwen3.py --evaluate-only      # measure the checkpoint that is there

Data: every `.py` file of the running interpreter's standard library except generated tables and
installed packages, ordered by path. A file is held out when the SHA-256 of its relative path starts with
a byte below 8 (about 3 % of the files), so the split is the same for every Python version and no held-out
file is ever trained on. What a run measured is written to `training.json` beside the weights.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import platform
import sysconfig
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import Dataset
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
    Trainer,
    TrainingArguments,
    set_seed,
)

SEED = 2603
DESTINATION = Path(__file__).resolve().parent / "tiny-qwen3"
EXCLUDED_DIRECTORIES = {"site-packages", "dist-packages", "__pycache__", "encodings", "pydoc_data"}
END_OF_TEXT = "<|endoftext|>"
VOCAB_SIZE = 4096
SEQUENCE_LENGTH = 512
BATCH_SIZE = 8


def is_held_out(relative_path: str) -> bool:
    """Whether a file belongs to the held-out split; depends on its path alone."""
    return hashlib.sha256(relative_path.encode()).digest()[0] < 8


def standard_library(held_out: bool) -> Iterator[tuple[str, str]]:
    """Yields `(relative path, text)` of one split of the standard library, ordered by path."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        relative = path.relative_to(root)
        if EXCLUDED_DIRECTORIES.intersection(relative.parts) or is_held_out(relative.as_posix()) != held_out:
            continue
        try:
            yield relative.as_posix(), path.read_text(encoding="utf-8")
        except UnicodeDecodeError:  # the library's own tests of other source encodings
            continue


def train_tokenizer(texts: list[str]) -> PreTrainedTokenizerFast:
    """Byte-level BPE: every byte string has an encoding, so bits per byte is well defined."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token=END_OF_TEXT, eos_token=END_OF_TEXT, pad_token=END_OF_TEXT
    )


class PackedDataset(Dataset):
    """One long stream of tokens, cut into windows of `SEQUENCE_LENGTH`; every file starts with the BOS."""

    def __init__(self, tokenizer: PreTrainedTokenizerFast, texts: list[str]):
        encodings = tokenizer([END_OF_TEXT + text for text in texts], add_special_tokens=False)["input_ids"]
        stream = torch.tensor([token for encoding in encodings for token in encoding], dtype=torch.int32)
        self.windows = stream[: len(stream) // SEQUENCE_LENGTH * SEQUENCE_LENGTH].view(-1, SEQUENCE_LENGTH)

    def __len__(self) -> int:
        return len(self.windows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        window = self.windows[index].long()
        return {"input_ids": window, "labels": window}


@torch.no_grad()
def bits_per_byte(model: Any, tokenizer: Any, texts: list[str]) -> float:
    """Negative log-likelihood of `texts` in bits, per UTF-8 byte.

    Each text starts from the BOS and is read in windows that do not overlap by more than one token, so
    every token but the BOS is predicted exactly once and none with more than `SEQUENCE_LENGTH` of context.
    """
    bits, num_bytes = 0.0, 0
    for text in texts:
        ids = tokenizer(END_OF_TEXT + text, add_special_tokens=False, return_tensors="pt")["input_ids"][0]
        num_bytes += len(text.encode())
        for start in range(0, len(ids) - 1, SEQUENCE_LENGTH):
            window = ids[start : start + SEQUENCE_LENGTH + 1]
            logits = model(input_ids=window[None, :-1]).logits[0].float()
            bits += torch.nn.functional.cross_entropy(logits, window[1:], reduction="sum").item() / math.log(2)
    return bits / num_bytes


def evaluate(checkpoint: Path) -> dict[str, Any]:
    """Measures the checkpoint as it lies on disk, on every held-out file."""
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32).eval()
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    held_out = list(standard_library(held_out=True))
    return {
        "held_out_files": len(held_out),
        "held_out_bytes": sum(len(text.encode()) for _, text in held_out),
        "held_out_bits_per_byte": round(bits_per_byte(model, tokenizer, [text for _, text in held_out]), 4),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--destination", type=Path, default=DESTINATION)
    parser.add_argument("--max-steps", type=int, default=1500, help="optimizer steps of 8 x 512 tokens")
    parser.add_argument("--evaluate-only", action="store_true")
    arguments = parser.parse_args()
    if arguments.evaluate_only:
        print(json.dumps(evaluate(arguments.destination), indent=2))
        return

    set_seed(SEED)
    files = list(standard_library(held_out=False))
    texts = [text for _, text in files]
    tokenizer = train_tokenizer(texts)
    dataset = PackedDataset(tokenizer, texts)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=192,
        intermediate_size=448,
        num_hidden_layers=8,
        num_attention_heads=6,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=SEQUENCE_LENGTH,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = Qwen3ForCausalLM(config)
    trainer = Trainer(
        model=model,
        train_dataset=dataset,
        args=TrainingArguments(
            output_dir=str(arguments.destination.with_name("tiny-qwen3-training")),
            max_steps=arguments.max_steps,
            per_device_train_batch_size=BATCH_SIZE,
            learning_rate=4e-3,
            adam_beta2=0.95,
            weight_decay=0.1,
            warmup_steps=100,
            lr_scheduler_type="cosine_with_min_lr",
            lr_scheduler_kwargs={"min_lr_rate": 0.02},
            bf16=True,
            use_cpu=True,
            seed=SEED,
            logging_steps=50,
            save_strategy="no",
            disable_tqdm=True,
            report_to="none",
        ),
    )
    started = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - started

    model.bfloat16().save_pretrained(arguments.destination)
    tokenizer.save_pretrained(arguments.destination)
    report = {
        "seed": SEED,
        "data": f"standard library of Python {platform.python_version()}",
        "data_sha256": hashlib.sha256("\0".join(texts).encode()).hexdigest(),
        "training_files": len(files),
        "training_bytes": sum(len(text.encode()) for text in texts),
        "training_tokens": dataset.windows.numel(),
        "batch_size": BATCH_SIZE,
        "tokens_seen": arguments.max_steps * BATCH_SIZE * SEQUENCE_LENGTH,
        "parameters": model.num_parameters(),
        "training_seconds": round(seconds),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        **evaluate(arguments.destination),
    }
    (arguments.destination / "training.json").write_text(json.dumps(report, indent=2) + "\n")
    print(json.dumps(report, indent=2))


if __name__ == "__main__":
    main()
