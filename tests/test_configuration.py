from __future__ import annotations

import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub.errors import StrictDataclassError
from tiny import COMMON, VOCAB_SIZE, random_tokens, tiny_config, tiny_model
from transformers import AutoConfig, Qwen3Config

from attnres import AttnResConfig, AttnResConfigError, AttnResError, AttnResForCausalLM

QWEN3 = {"model_type": "qwen3", **COMMON}


@pytest.mark.parametrize(
    ("num_hidden_layers", "request_", "block_size", "num_blocks"),
    [
        (4, {}, 1, 8),
        (2, {}, 1, 4),  # fewer sublayers than the default number of blocks
        (28, {}, 7, 8),
        (27, {"num_blocks": 9}, 6, 9),  # the paper's main model
        (4, {"num_blocks": 3}, 3, 3),
        (9, {"num_blocks": 8}, 3, 6),  # 18 sublayers cannot make 8 equal blocks
        (4, {"num_blocks": 1}, 8, 1),
        (4, {"block_size": 5}, 5, 2),
        (4, {"block_size": 1}, 1, 8),
        (4, {"block_size": 8}, 8, 1),
    ],
)
def test_blocks(num_hidden_layers: int, request_: dict[str, int], block_size: int, num_blocks: int) -> None:
    config = AttnResConfig(backbone_config=QWEN3 | {"num_hidden_layers": num_hidden_layers}, **request_)
    assert (config.block_size, config.num_blocks) == (block_size, num_blocks)
    assert config.num_sublayers == 2 * num_hidden_layers
    assert config.num_reads == 2 * num_hidden_layers + 1


def test_backbone_config_may_be_object_dict_or_path(tmp_path: Path) -> None:
    backbone = tiny_config("qwen3")
    backbone.save_pretrained(tmp_path)
    for given in (backbone, backbone.to_dict(), str(tmp_path)):
        config = AttnResConfig(backbone_config=given)
        assert isinstance(config, Qwen3Config)
        assert isinstance(config, AttnResConfig)
        assert config.hidden_size == 32
    config = AttnResConfig(backbone_config=backbone)
    fields = {name: value for name, value in config.to_dict().items() if name not in ("auto_map", "depth_attention")}
    assert fields == backbone.to_dict()


def test_it_answers_as_the_backbone() -> None:
    backbone = tiny_config("gemma2")
    config = AttnResConfig(backbone_config=backbone)
    for name in ("hidden_size", "num_hidden_layers", "vocab_size", "tie_word_embeddings", "num_attention_heads"):
        assert getattr(config, name) == getattr(backbone, name)
    for name in ("pad_token_id", "bos_token_id", "eos_token_id", "layer_types", "max_position_embeddings"):
        assert getattr(config, name) == getattr(backbone, name)
    assert config.model_type == type(config).model_type == config.to_dict()["model_type"] == "gemma2"
    assert config.get_text_config() is config
    assert config.get_text_config(decoder=True) is config
    config.vocab_size = 200
    assert config.vocab_size == 200
    with pytest.raises(AttributeError, match="no_such_thing"):
        _ = config.no_such_thing
    with pytest.raises(StrictDataclassError, match="vocab_size"):
        config.vocab_size = "many"


def test_implementations_of_a_configuration_in_use_are_kept() -> None:
    backbone = tiny_config("qwen3_moe")
    backbone._attn_implementation, backbone._experts_implementation = "eager", "batched_mm"
    config = AttnResConfig(backbone_config=backbone)
    assert (config._attn_implementation, config._experts_implementation) == ("eager", "batched_mm")


def test_a_field_of_the_backbone_goes_before_an_entry_of_the_same_name() -> None:
    """MiniMax has a `block_size` of its linear attention."""
    backbone = tiny_config("minimax")
    config = AttnResConfig(backbone_config=backbone, block_size=2)
    assert (config.block_size, config.depth_attention["block_size"]) == (backbone.block_size, 2)
    loaded = AttnResConfig.from_dict(config.to_diff_dict())
    assert (loaded.block_size, loaded.depth_attention["block_size"]) == (backbone.block_size, 2)
    assert AttnResConfig.from_dict(config.to_diff_dict(), num_blocks=1).depth_attention["block_size"] == 4


@pytest.mark.parametrize("family", ["qwen3", "gemma2", "deepseek_v3", "kimi_linear"])
def test_round_trip(family: str, tmp_path: Path) -> None:
    config = AttnResConfig(backbone_config=tiny_config(family), block_size=3, mix="sum", key_norm_eps=1e-5)
    config.save_pretrained(tmp_path)
    for loaded in (
        AttnResConfig.from_pretrained(tmp_path),
        AutoConfig.from_pretrained(tmp_path),
        AttnResConfig.from_dict(config.to_dict()),
        copy.deepcopy(config),
        pickle.loads(pickle.dumps(config)),
    ):
        assert type(loaded) is type(config)
        assert loaded.to_diff_dict() == config.to_diff_dict()
    saved = json.loads((tmp_path / "config.json").read_text())
    assert (saved["model_type"], saved["backbone_model_type"]) == ("attnres", family)
    assert saved["hidden_size"] == 32
    assert saved["depth_attention"] == {
        "block_size": 3,
        "mix": "sum",
        "key_norm_eps": 1e-5,
        "implementation": "two_phase",
        "num_heads": 1,
        "query": "learned",
        "weighting": "softmax",
        "key_norm": True,
        "logit_scale": 1.0,
        "window": None,
        "values": "raw",
    }
    assert not {"backbone_config", "num_blocks", "mix"} & set(saved)
    for use_diff in (True, False):
        assert json.loads(config.to_json_string(use_diff))["model_type"] == "attnres"


def test_all_that_it_is_made_of_makes_it_again() -> None:
    config = AttnResConfig(backbone_config=tiny_config("llama"), num_blocks=3)
    for made in (
        AttnResConfig(**config.to_dict()),
        type(config)(**config.to_dict()),
        AttnResConfig(**config.to_diff_dict()),
    ):
        assert made.to_diff_dict() == config.to_diff_dict()
    assert type(config)().hidden_size == type(tiny_config("llama"))().hidden_size


def test_the_layout_of_older_versions_is_refused(tmp_path: Path) -> None:
    old = {"model_type": "attnres", "backbone_config": QWEN3, "block_size": 3, "mix": "sum"}
    (tmp_path / "config.json").write_text(json.dumps(old))
    for load in (AttnResConfig.from_pretrained, AutoConfig.from_pretrained):
        with pytest.raises(AttnResConfigError, match="nests the decoder's fields.*convert the source again"):
            load(tmp_path)


def test_arguments_of_from_pretrained(tmp_path: Path) -> None:
    AttnResConfig(backbone_config=QWEN3, block_size=3).save_pretrained(tmp_path)
    assert AttnResConfig.from_pretrained(tmp_path, block_size=2).block_size == 2
    assert AttnResConfig.from_pretrained(tmp_path, num_blocks=1).block_size == 8
    assert AttnResConfig.from_pretrained(tmp_path, mix="sum").mix == "sum"
    assert AttnResConfig.from_pretrained(tmp_path, use_cache=False).use_cache is False
    with pytest.raises(AttnResConfigError, match="block_size=99"):
        AttnResConfig.from_pretrained(tmp_path, block_size=99)


def test_none_overrides_nothing(tmp_path: Path) -> None:
    AttnResConfig(backbone_config=QWEN3, block_size=3).save_pretrained(tmp_path)
    config = AttnResConfig.from_pretrained(tmp_path, block_size=None, mix=None)
    assert (config.block_size, config.mix) == (3, "mean")


def test_arguments_of_the_backbone_are_taken() -> None:
    backbone = tiny_config("qwen3")
    config = AttnResConfig(
        backbone_config=backbone,
        use_cache=False,
        max_position_embeddings=77,
        dtype="bfloat16",
        attn_implementation="eager",
    )
    assert (config.use_cache, config.max_position_embeddings) == (False, 77)
    assert (config.dtype, config._attn_implementation) == (torch.bfloat16, "eager")
    assert (backbone.use_cache, backbone.dtype) == (True, None)


def test_another_decoders_configuration_becomes_the_backbone(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path)
    config = AttnResConfig.from_pretrained(tmp_path, num_blocks=2)
    assert (config.model_type, config.block_size, config.mix) == ("qwen3", 4, "sum")


def test_no_machine_path_is_saved(tmp_path: Path) -> None:
    tiny_config("qwen3").save_pretrained(tmp_path / "source")
    AttnResConfig(backbone_config=str(tmp_path / "source")).save_pretrained(tmp_path / "saved")
    assert str(tmp_path) not in (tmp_path / "saved" / "config.json").read_text()


def test_round_trip_without_the_package(tmp_path: Path) -> None:
    AttnResConfig(backbone_config=QWEN3, block_size=3).save_pretrained(tmp_path / "first")
    program = (
        "import sys; sys.modules['attnres'] = None\n"  # any import of it fails
        "from transformers import AutoConfig\n"
        f"config = AutoConfig.from_pretrained({str(tmp_path / 'first')!r}, trust_remote_code=True)\n"
        "assert config.block_size == 3 and config.hidden_size == 32 and config.num_blocks == 3\n"
        f"config.save_pretrained({str(tmp_path / 'second')!r})\n"
    )
    subprocess.run([sys.executable, "-P", "-c", program], check=True, cwd=tmp_path)
    first, second = (
        {path.name: path.read_text() for path in (tmp_path / name).iterdir()} for name in ("first", "second")
    )
    assert first == second
    assert set(first) == {"backbones.py", "config.json", "configuration_attnres.py"}


NONSENSE: list[tuple[str, dict[str, Any], str]] = [
    ("no backbone", {}, "backbone_config=None"),
    ("backbone of a wrong type", {"backbone_config": 3}, "backbone_config=3 is a int"),
    ("backbone list", {"backbone_config": [QWEN3]}, "is a list"),
    ("dict without model_type", {"backbone_config": {"hidden_size": 8}}, "model_type=None"),
    ("unknown model_type", {"backbone_config": {"model_type": "qwen99"}}, "'qwen99'"),
    ("model_type of a wrong type", {"backbone_config": {"model_type": 7}}, "model_type=7"),
    ("missing directory", {"backbone_config": "/no/such/directory"}, "'/no/such/directory'"),
    ("AttnRes in AttnRes", {"backbone_config": AttnResConfig(backbone_config=QWEN3)}, "itself"),
    ("no layers", {"backbone_config": QWEN3 | {"num_hidden_layers": 0}}, "num_hidden_layers=0"),
    ("negative layers", {"backbone_config": QWEN3 | {"num_hidden_layers": -2}}, "num_hidden_layers"),
    ("bad backbone field", {"backbone_config": QWEN3 | {"hidden_size": "wide"}}, "hidden_size"),
    ("unknown dtype", {"backbone_config": QWEN3, "dtype": "float99"}, "float99"),
    ("both sizes", {"backbone_config": QWEN3, "block_size": 2, "num_blocks": 4}, "exactly one"),
    ("block_size zero", {"backbone_config": QWEN3, "block_size": 0}, "block_size=0 .* from 1 to 8"),
    ("block_size negative", {"backbone_config": QWEN3, "block_size": -1}, "block_size=-1"),
    ("block_size above L", {"backbone_config": QWEN3, "block_size": 9}, "block_size=9 .* from 1 to 8"),
    ("block_size float", {"backbone_config": QWEN3, "block_size": 2.0}, "block_size=2.0"),
    ("block_size string", {"backbone_config": QWEN3, "block_size": "2"}, "block_size='2'"),
    ("block_size bool", {"backbone_config": QWEN3, "block_size": True}, "block_size=True"),
    ("num_blocks zero", {"backbone_config": QWEN3, "num_blocks": 0}, "num_blocks=0"),
    ("num_blocks above L", {"backbone_config": QWEN3, "num_blocks": 9}, "num_blocks=9 .* from 1 to 8"),
    ("num_blocks float", {"backbone_config": QWEN3, "num_blocks": 2.5}, "num_blocks=2.5"),
    ("mix unknown", {"backbone_config": QWEN3, "mix": "median"}, "mix='median' .*'mean', 'sum'"),
    ("mix None", {"backbone_config": QWEN3, "mix": None}, "mix=None"),
    ("mix unhashable", {"backbone_config": QWEN3, "mix": ["sum"]}, "mix="),
    ("eps zero", {"backbone_config": QWEN3, "key_norm_eps": 0}, "key_norm_eps=0"),
    ("eps negative", {"backbone_config": QWEN3, "key_norm_eps": -1e-6}, "key_norm_eps=-1e-06"),
    ("eps NaN", {"backbone_config": QWEN3, "key_norm_eps": float("nan")}, "key_norm_eps=nan"),
    ("eps string", {"backbone_config": QWEN3, "key_norm_eps": "1e-6"}, "key_norm_eps='1e-6'"),
    (
        "implementation unknown",
        {"backbone_config": QWEN3, "depth_attention_implementation": "magic"},
        "depth_attention_implementation='magic' .*'eager'",
    ),
]


@pytest.mark.parametrize(("kwargs", "message"), [case[1:] for case in NONSENSE], ids=[case[0] for case in NONSENSE])
def test_nonsense_is_refused(kwargs: dict[str, Any], message: str) -> None:
    with pytest.raises(AttnResError, match=message):
        AttnResConfig(**kwargs)


def test_nonsense_set_later_is_not_saved(tmp_path: Path) -> None:
    config = AttnResConfig(backbone_config=QWEN3)
    config.block_size = 0
    with pytest.raises(AttnResConfigError, match="block_size=0"):
        config.save_pretrained(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()


IMPORT_ORDERS = [
    "import attnres",
    "import transformers.models.auto.configuration_auto; import attnres",
    "from attnres.configuration_attnres import AttnResConfig",
    "from attnres.modeling_attnres import AttnResModel",
    "import attnres; from transformers import Qwen3ForCausalLM",
    "import attnres; from transformers import GenerationMixin",
]


@pytest.mark.parametrize("imports", IMPORT_ORDERS)
def test_registered_whatever_is_imported_first(imports: str) -> None:
    program = (
        f"{imports}\n"
        "from transformers import AutoConfig, AutoModel, AutoModelForCausalLM\n"
        f"config = AutoConfig.for_model('attnres', backbone_config={QWEN3!r})\n"
        "assert type(AutoModel.from_config(config)).__module__ == 'attnres.modeling_attnres'\n"
        "assert type(AutoModelForCausalLM.from_config(config)).__name__ == 'AttnResForCausalLM'\n"
    )
    subprocess.run([sys.executable, "-c", program], check=True)


def test_import_does_not_pull_in_torch() -> None:
    program = "import transformers, attnres, sys; assert 'torch' not in sys.modules, 'torch'"
    subprocess.run([sys.executable, "-c", program], check=True)


def test_the_given_configuration_is_left_alone() -> None:
    """It may be that of a model in use, which reads its attention implementation from there."""
    backbone = tiny_model("qwen3")
    input_ids = random_tokens()
    expected = backbone(input_ids).logits
    config = AttnResConfig(backbone_config=backbone.config, vocab_size=7)
    AttnResForCausalLM(config)
    config.use_cache = False
    assert backbone.config.vocab_size == VOCAB_SIZE
    assert backbone.config.use_cache
    assert torch.equal(backbone(input_ids).logits, expected)
