"""Makes what the tests of vLLM serve: plain checkpoints, the same converted, and what Transformers generates from them.

It runs in the environment of this package. vLLM has one of its own, with the version of Transformers that it wants.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from attnres.conversion import convert

TINY_QWEN3 = Path(__file__).parents[2] / "examples" / "tiny-qwen3"
NEW_TOKENS = 24
COMMON = dict(
    vocab_size=512,
    hidden_size=128,
    intermediate_size=128,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,  # vLLM's attention on a CPU has kernels for 32, 64 and more
    max_position_embeddings=512,
    initializer_range=0.2,
    pad_token_id=0,
    bos_token_id=1,
    eos_token_id=2,
    tie_word_embeddings=False,
)
EXPERTS = dict(num_experts_per_tok=2, moe_intermediate_size=32, norm_topk_prob=True)
FAMILIES: dict[str, dict[str, Any]] = {
    "qwen3_moe": dict(**EXPERTS, num_experts=4),
    "gemma2": dict(sliding_window=32, query_pre_attn_scalar=32),
    "deepseek_v3": dict(
        **EXPERTS,
        n_routed_experts=4,
        n_shared_experts=1,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        num_key_value_heads=4,
        kv_lora_rank=512,  # vLLM's MLA takes 512 + 64
        q_lora_rank=32,
        qk_rope_head_dim=64,
        qk_nope_head_dim=64,
        v_head_dim=64,
    ),
}


def prompts(vocab_size: int) -> list[list[int]]:
    """Four prompts of different lengths; the last two begin as the second does, for prefix caching."""
    generator = torch.Generator().manual_seed(0)
    long = torch.randint(3, vocab_size, (96,), generator=generator).tolist()
    short = torch.randint(3, vocab_size, (7,), generator=generator).tolist()
    return [short, long, long[:64] + short, long + short]


def plain_model(family: str) -> PreTrainedModel:
    config_class = CONFIG_MAPPING[family]
    known = {*config_class.__dataclass_fields__, *config_class.attribute_map}
    fields = {name: value for name, value in {**COMMON, **FAMILIES[family]}.items() if name in known}
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(config_class(**fields)).float()


@torch.no_grad()
def randomize(directory: Path) -> None:
    """Gives the depth parameters of a checkpoint random values, large enough to change what is generated."""
    from safetensors.torch import load_file, save_file

    file = directory / "model-attnres.safetensors"
    generator = torch.Generator().manual_seed(1)
    tensors = load_file(file)
    for name in sorted(tensors):
        noise = 0.3 * torch.randn(tensors[name].shape, generator=generator)
        tensors[name] = tensors[name] + noise
    file.unlink()
    save_file(tensors, file, metadata={"format": "pt"})


@torch.no_grad()
def generated(directory: Path) -> list[list[int]]:
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32, trust_remote_code=True).eval()
    tokens = []
    for prompt in prompts(model.config.vocab_size):
        input_ids = torch.tensor([prompt])
        output = model.generate(
            input_ids,
            attention_mask=torch.ones_like(input_ids),
            max_new_tokens=NEW_TOKENS,
            min_new_tokens=NEW_TOKENS,
            do_sample=False,
            repetition_penalty=1.0,
        )
        tokens.append(output[0, len(prompt) :].tolist())
    return tokens


def main(output: Path) -> None:
    """For each model: `plain/NAME`, `converted/NAME` (zero queries), `random/NAME`; and tokens.json."""
    shutil.rmtree(output, ignore_errors=True)
    tokens: dict[str, list[list[int]]] = {}
    asked: dict[str, list[list[int]]] = {}
    for name in ("tiny-qwen3", *FAMILIES):
        plain = output / "plain" / name
        if name == "tiny-qwen3":
            shutil.copytree(TINY_QWEN3, plain)
        else:
            plain_model(name).save_pretrained(plain)
            AutoTokenizer.from_pretrained(TINY_QWEN3).save_pretrained(plain)
        for kind in ("converted", "random"):
            (output / kind).mkdir(exist_ok=True)
            convert(plain, output / kind / name, num_blocks=4, verify="none")
        randomize(output / "random" / name)
        for kind in ("plain", "converted", "random"):
            tokens[f"{kind}/{name}"] = generated(output / kind / name)
        assert tokens[f"converted/{name}"] == tokens[f"plain/{name}"], name
        assert tokens[f"random/{name}"] != tokens[f"plain/{name}"], name
        asked[name] = prompts(json.loads((plain / "config.json").read_text(encoding="utf-8"))["vocab_size"])
    content = json.dumps({"prompts": asked, "tokens": tokens})
    (output / "tokens.json").write_text(content + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
