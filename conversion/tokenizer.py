"""What an architecture stands for beside its weights: its tokenizer, and how it generates.

`AutoTokenizer` chooses a class by the `model_type` of config.json. Models without a generation_config.json take what
config.json says of generation. A converted checkpoint has another `model_type` there, so both are written down.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from transformers import AutoTokenizer, GenerationConfig
from transformers.models.auto.tokenization_auto import tokenizer_class_from_name

from .errors import ConversionError, VerificationError

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
TOKENIZER_FILES = ("tokenizer*", "vocab.*", "spiece.model", "tekken.json", "tiktoken.model")

# Texts on which two tokenizers are compared: prose, code, numbers, spaces, scripts, symbols, and nothing.
TEXTS = (
    "The residual connection adds the output of every layer to one running sum, so that each layer sees all that came "
    "before it with the same weight. Attention over depth lets a layer choose instead.",
    "def quicksort(items):\n    if len(items) < 2:\n        return items\n    pivot, *rest = items\n"
    "    left = [x for x in rest if x < pivot]\n    right = [x for x in rest if x >= pivot]\n"
    "    return quicksort(left) + [pivot] + quicksort(right)\n",
    "In 1869 Mendeleev ordered sixty-three elements by weight and left gaps: gallium (1875), scandium (1879) and "
    "germanium (1886) filled three of them. 3 + 4 * 12 = 51, and 2^10 = 1024.",
    "Le train part à huit heures. Der Zug kommt um neun an. 火车十点到站，请准时上车。Поезд опаздывает. ¿A qué hora?",
)
MORE_TEXTS = (
    "",
    " ",
    "  leading and trailing  ",
    "\n\n\t\tindented\r\n",
    "I've, don't, we'll; 'quoted' \"twice\"",
    "1234567890 3.14159 1,000,000 0x1F 1e-6",
    "naïve café e\u0301 \u00a0\u200b\ufeff end",
    "😀👩‍👩‍👧‍👦🇫🇷 ∑∫√ → ≤ ½",
    "<s> </s> <pad> <unk> <|endoftext|> <|im_start|>user<|im_end|> [INST] [CLS] [SEP]",
    "العربية עברית हिन्दी ไทย 日本語 한국어",
    "a" * 50 + " " * 20 + "-" * 30,
)


def load_tokenizer(directory: Path) -> Any:
    """The tokenizer that `AutoTokenizer` gives for a checkpoint without running code of it, or `None` if it has none
    that can be loaded."""
    if not any(
        any(directory.glob(pattern)) for pattern in TOKENIZER_FILES
    ):  # the library would make an empty tokenizer
        return None
    try:
        return AutoTokenizer.from_pretrained(directory, trust_remote_code=False)
    except Exception:  # loading raises anything; a checkpoint can be converted without a tokenizer
        return None


def pin_tokenizer(source: Path, converted: Path) -> str | None:
    """Makes `AutoTokenizer` give the same tokenizer for the result as for the source, and compares their token ids.

    Args:
        source (`Path`): the directory of the source.
        converted (`Path`): the directory of the result, with its config.json and the tokenizer files of the source.

    Returns:
        `str` or `None`: the class of the tokenizer; `None` if the source has none that can be loaded.

    Raises:
        VerificationError: the result's tokenizer gives other token ids.
    """
    original = load_tokenizer(source)
    if original is None:
        return None
    name = type(original).__name__
    _write_class(name, converted / TOKENIZER_CONFIG)
    if _difference(original, converted) is not None:
        original.save_pretrained(converted)  # writes the tokenizer as its class made it from the files
        _write_class(name, converted / TOKENIZER_CONFIG)
        if (difference := _difference(original, converted)) is not None:
            raise VerificationError(
                f"{source}: its tokenizer, a {name}, cannot be carried over: {difference}. Save it with "
                "`save_pretrained`, look at its files, and convert again. Nothing was delivered."
            )
    return name


def write_generation_config(source: Path, converted: Path) -> None:
    """Writes generation_config.json for a source without one, from what its config.json says of generation.

    Raises:
        ConversionError: config.json says something of generation that makes no sense.
    """
    if (converted / GENERATION_CONFIG).exists():
        return
    try:
        config = GenerationConfig.from_pretrained(source, config_file_name="config.json", _from_model_config=True)
        config.to_json_file(converted / GENERATION_CONFIG)
    except Exception as error:  # constructors raise anything for unexpected values
        raise ConversionError(f"{source / 'config.json'} makes no generation configuration: {error}") from error


def _write_class(name: str, path: Path) -> None:
    fields = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
    if str(fields.get("tokenizer_class")).removesuffix("Fast") != name.removesuffix("Fast"):
        fields["tokenizer_class"] = name
        path.write_text(json.dumps(fields, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _difference(original: Any, converted: Path) -> str | None:
    """How the tokenizers of the result differ from the original: the one that `AutoTokenizer` gives, and the one that
    its class alone gives, as where `attnres` is unknown."""
    by_class = tokenizer_class_from_name(type(original).__name__)
    if by_class is None:
        return f"there is no class {type(original).__name__}"
    for load in (AutoTokenizer.from_pretrained, by_class.from_pretrained):
        try:
            tokenizer = load(
                converted, **({"trust_remote_code": False} if load is AutoTokenizer.from_pretrained else {})
            )
        except Exception as error:  # loading a tokenizer raises anything
            return f"it cannot be loaded from the result ({type(error).__name__}: {error})"
        for text in (*TEXTS, *MORE_TEXTS):
            expected, actual = original(text)["input_ids"], tokenizer(text)["input_ids"]
            if expected != actual:
                return f"{text[:40]!r} is {expected[:8]} there, and {actual[:8]} in the result"
        if original.chat_template != tokenizer.chat_template:
            return "the chat template is another"
    return None
