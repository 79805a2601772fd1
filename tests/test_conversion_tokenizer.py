"""A converted checkpoint keeps what its old model type stood for: its tokenizer, and how it generates."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import tiny_model
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaTokenizer, Qwen2Tokenizer

from attnres import convert
from attnres.conversion.tokenizer import MORE_TEXTS, TEXTS

VOCAB_SIZE = 512
SPECIAL = ["<unk>", "<s>", "</s>", "<|endoftext|>", "<|im_start|>", "<|im_end|>"]
OTHER_TEXTS = ("def f(x):\n\treturn x  +  1", "don't STOP 12345", "über 日本 😀", " <s>a</s> <|im_start|>b")


# -- sources, made by classes of the library ---------------------------------------------------------------------------


def trained(model: Any, trainer: Any, pre_tokenizer: Any = None, normalizer: Any = None) -> Tokenizer:
    tokenizer = Tokenizer(model)
    if pre_tokenizer is not None:
        tokenizer.pre_tokenizer = pre_tokenizer
    if normalizer is not None:
        tokenizer.normalizer = normalizer
    tokenizer.train_from_iterator([*TEXTS, *MORE_TEXTS] * 3, trainer)
    return tokenizer


def byte_level() -> Tokenizer:
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=SPECIAL, initial_alphabet=alphabet)
    return trained(models.BPE(), trainer, pre_tokenizers.ByteLevel(add_prefix_space=False))


def vocab_and_merges(tokenizer: Tokenizer) -> dict[str, Any]:
    model = json.loads(tokenizer.to_str())["model"]
    return {"vocab": model["vocab"], "merges": [tuple(merge) for merge in model["merges"]]}


def sentence_pieces() -> dict[str, Any]:
    special = [*SPECIAL[:3], *(f"<0x{byte:02X}>" for byte in range(256))]
    trainer = trainers.BpeTrainer(vocab_size=VOCAB_SIZE, special_tokens=special)
    normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    return vocab_and_merges(trained(models.BPE(unk_token="<unk>", byte_fallback=True), trainer, None, normalizer))


def qwen2(directory: Path) -> None:
    Qwen2Tokenizer(**vocab_and_merges(byte_level())).save_pretrained(directory)


def gpt2_of_two_files(directory: Path) -> None:
    """vocab.json and merges.txt, and no other file, as the oldest checkpoints have it."""
    made = vocab_and_merges(byte_level())
    directory.mkdir(exist_ok=True)
    (directory / "vocab.json").write_text(json.dumps(made["vocab"]))
    lines = ["#version: 0.2", *(" ".join(merge) for merge in made["merges"])]
    (directory / "merges.txt").write_text("\n".join(lines) + "\n")


def llama(directory: Path) -> None:
    LlamaTokenizer(**sentence_pieces()).save_pretrained(directory)


def plain(directory: Path) -> None:
    """A tokenizer.json, of which no class of the library is known."""
    tokenizer = byte_level()
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.save(str(directory / "tokenizer.json"))


def without_config(make: Callable[[Path], None]) -> Callable[[Path], None]:
    def made(directory: Path) -> None:
        make(directory)
        (directory / "tokenizer_config.json").unlink()

    return made


def configured(make: Callable[[Path], None], **fields: Any) -> Callable[[Path], None]:
    """Fields of tokenizer_config.json are set; `...` removes one."""

    def made(directory: Path) -> None:
        make(directory)
        path = directory / "tokenizer_config.json"
        found = json.loads(path.read_text()) if path.exists() else {}
        found = {name: value for name, value in {**found, **fields}.items() if value is not ...}
        path.write_text(json.dumps(found))

    return made


# family, what makes the tokenizer
SOURCES: dict[str, tuple[str, Callable[[Path], None]]] = {
    "qwen2": ("qwen2", qwen2),
    "qwen2 without a class": ("qwen2", configured(qwen2, tokenizer_class=...)),
    "qwen2 without tokenizer_config": ("qwen2", without_config(qwen2)),
    "qwen3 with qwen2's": ("qwen3", qwen2),
    "qwen2 of a wrong class": ("qwen2", configured(qwen2, tokenizer_class="LlamaTokenizer")),
    "qwen2 of an unknown class": ("qwen2", configured(qwen2, tokenizer_class="SomebodysTokenizer")),
    "gpt2 of two files": ("gpt2", gpt2_of_two_files),
    "gpt2 of two files and a config": ("gpt2", configured(gpt2_of_two_files, add_prefix_space=True)),
    "llama": ("llama", llama),
    "llama without tokenizer_config": ("llama", without_config(llama)),
    "llama of a wrong class": ("llama", configured(llama, tokenizer_class="Qwen2Tokenizer")),
    "llama's fast class": ("llama", configured(llama, tokenizer_class="LlamaTokenizerFast")),
    "mistral with llama's": ("mistral", without_config(llama)),
    "only tokenizer.json": ("llama", plain),
    "only tokenizer.json, gemma": ("gemma2", plain),
    "a chat template": ("qwen2", configured(qwen2, chat_template="{% for m in messages %}{{ m.content }}{% endfor %}")),
    "bos and eos": ("llama", configured(llama, add_bos_token=True, add_eos_token=True)),
}

FRESH = """
import json, sys
if sys.argv[2] == "without":
    sys.modules["attnres"] = None
else:
    import attnres
from transformers import AutoTokenizer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1], trust_remote_code=True)
print(json.dumps([tokenizer(text)["input_ids"] for text in json.load(sys.stdin)]))
"""


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, Path], None]:
    """Puts the weights of a tiny model of a family into a directory."""
    made: dict[str, Any] = {}

    def put(family: str, directory: Path) -> None:
        if family not in made:
            made[family] = tiny_model(family, vocab_size=VOCAB_SIZE + 512)
        made[family].save_pretrained(directory)

    return put


@pytest.mark.parametrize(("family", "make"), SOURCES.values(), ids=SOURCES)
def test_token_ids_stay_the_same(
    family: str, make: Callable[[Path], None], weights: Callable[[str, Path], None], tmp_path: Path
) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    weights(family, source)
    make(source)
    original = AutoTokenizer.from_pretrained(source)
    report = convert(source, converted, verify="none")
    result = AutoTokenizer.from_pretrained(converted)
    assert report.tokenizer == type(original).__name__
    assert type(result) is type(original)
    for text in (*TEXTS, *MORE_TEXTS, *OTHER_TEXTS):
        assert result(text)["input_ids"] == original(text)["input_ids"], text
        assert result.decode(result(text)["input_ids"]) == original.decode(original(text)["input_ids"])
    assert any(original(text)["input_ids"] for text in TEXTS)
    assert result.special_tokens_map == original.special_tokens_map
    assert result.chat_template == original.chat_template


@pytest.mark.parametrize("package", ["with", "without"])
@pytest.mark.parametrize("name", ["qwen2 without tokenizer_config", "gpt2 of two files", "llama of a wrong class"])
def test_token_ids_in_a_fresh_process(
    name: str, package: str, weights: Callable[[str, Path], None], tmp_path: Path
) -> None:
    family, make = SOURCES[name]
    weights(family, tmp_path / "source")
    make(tmp_path / "source")
    convert(tmp_path / "source", tmp_path / "converted", verify="none")
    texts = [*TEXTS, *MORE_TEXTS, *OTHER_TEXTS]
    expected = [AutoTokenizer.from_pretrained(tmp_path / "source")(text)["input_ids"] for text in texts]
    result = subprocess.run(
        [sys.executable, "-c", FRESH, str(tmp_path / "converted"), package],
        input=json.dumps(texts),
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        stdout=subprocess.PIPE,
        text=True,
        check=True,
    )
    assert json.loads(result.stdout) == expected


def test_no_tokenizer_stays_none(weights: Callable[[str, Path], None], tmp_path: Path) -> None:
    weights("qwen3", tmp_path / "source")
    assert convert(tmp_path / "source", tmp_path / "converted", verify="none").tokenizer is None
    assert not list((tmp_path / "converted").glob("tokenizer*"))


# -- generation --------------------------------------------------------------------------------------------------------

# What config.json says of generation, where there is no generation_config.json.
GENERATION: list[dict[str, Any]] = [
    {},
    {"eos_token_id": 5},
    {"eos_token_id": [5, 7, 11]},
    {"eos_token_id": 3, "pad_token_id": 4},
    {"pad_token_id": 9},
    {"bos_token_id": 8},
    {"do_sample": True, "temperature": 0.3},
    {"do_sample": True, "top_k": 3},
    {"do_sample": True, "top_p": 0.5, "temperature": 2.0},
    {"max_length": 9},
    {"max_length": 30, "min_length": 25},
    {"num_beams": 3},
    {"repetition_penalty": 5.0},
    {"no_repeat_ngram_size": 1},
    {"bad_words_ids": [[3], [4], [5]]},
]


@pytest.mark.parametrize("fields", GENERATION, ids=str)
@pytest.mark.parametrize("is_recorded", [False, True], ids=["config.json", "generation_config.json"])
def test_generates_the_same(is_recorded: bool, fields: dict[str, Any], tmp_path: Path) -> None:
    source, converted = tmp_path / "source", tmp_path / "converted"
    tiny_model("llama", num_hidden_layers=1).save_pretrained(source)
    (source / "generation_config.json").unlink()
    path = source / ("generation_config.json" if is_recorded else "config.json")
    path.write_text(json.dumps({**(json.loads(path.read_text()) if path.exists() else {}), **fields}))
    convert(source, converted, verify="none")
    original, result = (AutoModelForCausalLM.from_pretrained(path).eval() for path in (source, converted))
    expected, actual = (model.generation_config.to_diff_dict() for model in (original, result))
    assert actual == expected
    input_ids = torch.arange(12, 18)[None]
    tokens = []
    for model in (original, result):
        torch.manual_seed(0)
        tokens.append(model.generate(input_ids, **({} if "max_length" in fields else {"max_new_tokens": 12})))
    assert torch.equal(*tokens)
    if is_recorded:
        assert (converted / "generation_config.json").read_bytes() == path.read_bytes()
