"""Kimi K3's layout: its depth tensors into [`DepthAttention`] and back, and whole models over Kimi Linear.

K3 is Block AttnRes over a Kimi Linear decoder. `text_config.attn_res_block_size` counts decoder layers, so S is twice
that; a block begins at each decoder layer whose index it divides, and the last block may be partial. A read is
`softmax(proj . RMSNorm(v))` over the raw sources, the norm with a weight of its own and the decoder's `rms_norm_eps`:
`mix="mean"` here. Each read has two tensors, `*_res_proj.weight` (pseudo-query, `[1, hidden]`) and `*_res_norm.weight`
(key norm, `[hidden]`). The first read sees the embedding alone; K3 skips it, and its tensors have no effect.

>>> from attnres.conversion import kimi_k3
>>> settings, depth_attention = kimi_k3.read_depth_attention("Kimi-K3")
>>> settings.block_size, depth_attention.query.shape
(24, torch.Size([187, 7168]))
"""

from __future__ import annotations

import copy
import json
import os
import re
import shutil
from collections.abc import Iterator
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from huggingface_hub.errors import StrictDataclassError
from safetensors import safe_open
from safetensors.torch import save
from transformers import AutoConfig, PreTrainedConfig
from transformers.activations import ACT2FN
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from ..configuration_attnres import DEPTH_VARIANTS, AttnResConfig, AttnResError
from ..depth_attention import DepthAttention, depth_settings
from ..depth_state import DepthSettings, upcast
from ..modeling_attnres import AttnResForCausalLM
from .converter import write_config_and_code
from .delivery import deliver, staging
from .errors import ConversionError
from .loading import load, meta_tensors
from .source import DEPTH_SHARD, TensorInfo, find_companions, read_headers, read_index, read_json

MODEL_TYPE = "kimi_k3"
BACKBONE_TYPE = "kimi_linear"
PREFIX = "language_model."
DEPTH_NAMES = {name: f"model.depth_attention.{name}" for name in ("query", "key_norm")}
DEPTH_SUFFIXES = ("_res_proj.weight", "_res_norm.weight")
FLOATS = ("BF16", "F16", "F32", "F64")
CHUNK_BYTES = 16 * 2**20

# What a K3 configuration may say if the decoder is to be Transformers' Kimi Linear: field, values, and what any other
# value stands for.
EXPRESSIBLE: tuple[tuple[str, tuple[Any, ...], str], ...] = (
    ("vision_config", (None,), "a vision tower"),
    ("quantization_config", (None,), "quantised weights"),
    ("text_config.quantization_config", (None,), "quantised weights (MXFP4 experts)"),
    ("text_config.model_type", (BACKBONE_TYPE,), "another decoder"),
    ("text_config.hidden_act", tuple(ACT2FN), "an activation of its own (SiTU)"),
    ("text_config.routed_expert_hidden_size", (None,), "a latent MoE"),
    ("text_config.mla_use_nope", (True,), "MLA with rotary embeddings"),
    ("text_config.mla_use_output_gate", (None, False), "an output gate on MLA"),
    ("text_config.linear_attn_config.use_full_rank_gate", (None, False), "a full-rank gate on KDA"),
    ("text_config.linear_attn_config.gate_lower_bound", (None,), "a lower bound on the decay of KDA"),
    ("text_config.moe_router_activation_func", (None, "sigmoid"), "another router"),
    ("text_config.moe_layer_freq", (None, 1), "dense layers among the sparse ones"),
)

# The names of Kimi Linear's own checkpoints, to which K3 adds its prefix.
KDA = r"([qkv]_proj|[qkv]_conv1d|[fg]_[ab]_proj|b_proj|o_norm|o_proj)\.weight|A_log|dt_bias"
MLA = r"(q_proj|q_[ab]_proj|q_a_layernorm|kv_a_proj_with_mqa|kv_a_layernorm|kv_b_proj|o_proj)\.weight"
DENSE = r"(gate|up|down)_proj\.weight"
SPARSE = rf"gate\.(weight|e_score_correction_bias)|experts\.\d+\.w[123]\.weight|shared_experts\.{DENSE}"
LAYER = rf"(input|post_attention)_layernorm\.weight|self_attn\.({KDA}|{MLA})|mlp\.{DENSE}|block_sparse_moe\.({SPARSE})"
BACKBONE_TENSOR = re.compile(rf"lm_head\.weight|model\.(embed_tokens|norm)\.weight|model\.layers\.\d+\.({LAYER})")
# Transformers saves the dense layers under the name that belongs to the sparse ones.
DENSE_AS_SPARSE = re.compile(rf"(model\.layers\.\d+)\.block_sparse_moe\.({DENSE})")

# The fields of `text_config` that an export added to those of the backbone are listed under this name beside it, so
# that an import gives the configuration back as it was.
ADDED_FIELDS = "attnres_added_fields"
# What a configuration says of the whole model stands beside `text_config`, the rest in it.
BESIDE_TEXT = ("architectures", "dtype", "transformers_version")
IMPLEMENTATION = "depth_attention_implementation"


class Checkpoint(NamedTuple):
    """A directory of safetensors: its config.json, and for each tensor the shard that holds it and what its header
    says."""

    directory: Path
    settings: dict[str, Any]
    tensors: dict[str, str]
    infos: dict[str, TensorInfo]


def read_depth_attention(source: str | os.PathLike) -> tuple[DepthSettings, DepthAttention]:
    """Reads the depth tensors of a K3-layout checkpoint, whatever else its decoder consists of.

    Args:
        source (`str` or `PathLike`): directory of the checkpoint. No other tensor is read.

    Returns:
        `tuple[DepthSettings, DepthAttention]`: what [`~depth_attention.read`] takes besides a state: the settings
        (`mix="mean"`, `block_size` in sublayers), and the module, whose call gives the folded queries. Parameters
        have the dtype of the tensors.

    Raises:
        ConversionError: it is no K3-layout checkpoint, or depth tensors are missing, of other shapes or too many.
    """
    checkpoint = _open(source, MODEL_TYPE)
    config = _depth_config(checkpoint)
    depth_attention = DepthAttention(config.num_reads, config.hidden_size)
    depth_attention.load_state_dict(_read_depth_tensors(checkpoint, config), assign=True)
    return depth_settings(config.depth_attention, config.num_sublayers), depth_attention


def depth_tensors(depth_attention: DepthAttention) -> dict[str, torch.Tensor]:
    """The parameters under K3's names and in its shapes: the inverse of [`read_depth_attention`].

    Args:
        depth_attention (`DepthAttention`): of a model with two sublayers per decoder layer.

    Returns:
        `dict[str, torch.Tensor]`: per read `*_res_proj.weight`, `[1, hidden]`, and `*_res_norm.weight`, `[hidden]`.
    """
    if depth_attention.key_norm is None:
        raise ConversionError("Kimi K3's reads have a key norm; these depth parameters have none.")
    rows = zip(depth_attention.query.detach(), depth_attention.key_norm.detach())
    names = _depth_names(len(depth_attention.query) // 2)
    return {
        name: tensor.clone()
        for (query_name, norm_name), (query, key_norm) in zip(names, rows)
        for name, tensor in ((query_name, query.unsqueeze(0)), (norm_name, key_norm))
    }


def export_checkpoint(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Writes an AttnRes checkpoint over Kimi Linear in K3's layout. No weight is changed, or loaded.

    Args:
        source (`str` or `PathLike`): directory of the AttnRes checkpoint.
        destination (`str` or `PathLike`): directory to make. It appears at once and complete, or not at all.

    Raises:
        ConversionError: K3's layout cannot say what the model computes, `source` is no whole AttnRes checkpoint, or
            `destination` exists or cannot be written. Nothing was left there.
    """
    checkpoint = _open(source, AttnResConfig.model_type)
    target = _check_target(checkpoint, destination)
    config = _make_config(checkpoint, checkpoint.settings)
    settings = _k3_settings(checkpoint, config)
    _check_tensors(checkpoint.directory, config, checkpoint.directory)
    old_names: dict[str, str] = {}
    for name in checkpoint.tensors:
        if name in DEPTH_NAMES.values():
            continue
        new_name = PREFIX + DENSE_AS_SPARSE.sub(r"\1.mlp.\2", name)
        if not BACKBONE_TENSOR.fullmatch(new_name, len(PREFIX)) or new_name in old_names:
            raise ConversionError(
                f"{checkpoint.directory / checkpoint.tensors[name]}: tensor {name!r} has no name in Kimi K3's layout; "
                "save the model with save_pretrained, which splits experts and convolutions as K3 does."
            )
        old_names[new_name] = name
    depth_attention = DepthAttention(config.num_reads, config.hidden_size)
    parameters = {entry: upcast(_read_tensor(checkpoint, name)) for entry, name in DEPTH_NAMES.items()}
    depth_attention.load_state_dict(parameters, assign=True)

    with staging(target) as stage:
        _write_tensors(checkpoint, old_names, depth_tensors(depth_attention), stage)
        (stage / "config.json").write_text(json.dumps(settings, indent=2, sort_keys=True) + "\n", encoding="utf-8")
        _copy_companions(checkpoint, stage)
        deliver(stage, target, overwrite=False)


def import_checkpoint(source: str | os.PathLike, destination: str | os.PathLike) -> None:
    """Makes an AttnRes checkpoint of a K3-layout one whose decoder is Transformers' Kimi Linear, such as
    [`export_checkpoint`] writes. No weight is changed, and none but the depth tensors is loaded.

    Args:
        source (`str` or `PathLike`): directory of the K3-layout checkpoint.
        destination (`str` or `PathLike`): directory to make. It appears at once and complete, or not at all.

    Raises:
        ConversionError: the decoder has parts that Transformers' Kimi Linear has not (the message names them; the
            released K3 does, and [`read_depth_attention`] reads its depth tensors), the checkpoint is no whole K3
            one, or `destination` exists or cannot be written. Nothing was left there.
    """
    checkpoint = _open(source, MODEL_TYPE)
    target = _check_target(checkpoint, destination)
    depth_config = _depth_config(checkpoint)
    depth = _read_depth_tensors(checkpoint, depth_config)
    _check_expressible(checkpoint)
    config = _attnres_config(checkpoint, depth_config)
    old_names = {}
    for name in checkpoint.tensors:
        if not name.startswith(PREFIX) or name.removeprefix(PREFIX) in DEPTH_NAMES.values():
            raise ConversionError(
                f"{checkpoint.directory / checkpoint.tensors[name]}: tensor {name!r} is no part of a Kimi Linear "
                "decoder; only those can be imported."
            )
        if not name.endswith(DEPTH_SUFFIXES):
            old_names[name.removeprefix(PREFIX)] = name

    with staging(target) as stage:
        _write_tensors(
            checkpoint,
            old_names,
            {DEPTH_NAMES[entry]: upcast(tensor) for entry, tensor in depth.items()},
            stage,
        )
        write_config_and_code(config, stage)
        _copy_companions(checkpoint, stage)
        _check_tensors(stage, config, checkpoint.directory)
        deliver(stage, target, overwrite=False)


# -- reading -----------------------------------------------------------------------------------------------------------


def _open(source: str | os.PathLike, model_type: str) -> Checkpoint:
    try:
        directory = Path(source)
        if not directory.is_dir():
            raise ConversionError(f"source {str(source)!r} is no directory; give that of a checkpoint.")
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"source {source!r} is no path that can be used: {error}") from error
    settings = read_json(directory / "config.json")
    if settings.get("model_type") != model_type:
        raise ConversionError(
            f"{directory / 'config.json'}: model_type={settings.get('model_type')!r}; {model_type!r} was expected."
        )
    shards, tensors = read_index(directory)
    return Checkpoint(directory, settings, tensors, read_headers(directory, shards, tensors))


def _make_config(checkpoint: Checkpoint, settings: dict[str, Any]) -> AttnResConfig:
    try:
        return AttnResConfig.from_dict(copy.deepcopy(settings))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, StrictDataclassError) as error:
        if isinstance(error, AttnResError):
            raise
        raise ConversionError(
            f"{checkpoint.directory / 'config.json'} makes no configuration: {type(error).__name__}: {error}"
        ) from error


def _depth_config(checkpoint: Checkpoint) -> AttnResConfig:
    """What K3's configuration says of depth attention, over a decoder of its depth and width."""
    file, text = checkpoint.directory / "config.json", checkpoint.settings.get("text_config")
    if not isinstance(text, dict):
        raise ConversionError(f"{file}: text_config={text!r}; an object was expected.")
    for name in ("num_hidden_layers", "hidden_size", "attn_res_block_size"):
        value = text.get(name)
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ConversionError(f"{file}: text_config.{name}={value!r}; a positive integer was expected.")
    eps = text.get("rms_norm_eps")
    if isinstance(eps, bool) or not isinstance(eps, (int, float)) or not 0 < eps < 1:
        raise ConversionError(f"{file}: text_config.rms_norm_eps={eps!r}; a number between 0 and 1 was expected.")
    num_layers = text["num_hidden_layers"]
    for name in chain.from_iterable(_depth_names(num_layers)):  # ends at the first that is missing
        shape = (1, text["hidden_size"]) if name.endswith(DEPTH_SUFFIXES[0]) else (text["hidden_size"],)
        info = checkpoint.infos.get(name)
        if info is None:
            raise ConversionError(f"{checkpoint.directory} lacks depth tensor {name!r}; {num_layers} layers have it.")
        if info.shape != shape or info.dtype not in FLOATS:
            raise ConversionError(
                f"{checkpoint.directory / checkpoint.tensors[name]}: tensor {name!r} is {info.dtype} of shape "
                f"{list(info.shape)}; floating-point numbers of shape {list(shape)} were expected."
            )
    expected = set(chain.from_iterable(_depth_names(num_layers)))
    if beyond := sorted(name for name in checkpoint.tensors if name.endswith(DEPTH_SUFFIXES) and name not in expected):
        raise ConversionError(
            f"{checkpoint.directory / checkpoint.tensors[beyond[0]]}: depth tensor {beyond[0]!r} belongs to no read of "
            f"{num_layers} layers (text_config.num_hidden_layers)."
        )
    backbone = AutoConfig.for_model(BACKBONE_TYPE, num_hidden_layers=num_layers, hidden_size=text["hidden_size"])
    block_size = 2 * min(text["attn_res_block_size"], num_layers)  # a longer block is one that never ends
    return AttnResConfig(backbone_config=backbone, block_size=block_size, mix="mean", key_norm_eps=eps)


def _depth_names(num_layers: int) -> Iterator[tuple[str, str]]:
    """The names of pseudo-query and key norm of each read, in order."""
    for layer in range(num_layers):
        for read in ("self_attention", "mlp"):
            query, key_norm = (f"{PREFIX}model.layers.{layer}.{read}{suffix}" for suffix in DEPTH_SUFFIXES)
            yield query, key_norm
    query, key_norm = (f"{PREFIX}model.output_attn{suffix}" for suffix in DEPTH_SUFFIXES)
    yield query, key_norm


def _read_depth_tensors(checkpoint: Checkpoint, config: AttnResConfig) -> dict[str, torch.Tensor]:
    """The tensors of [`DepthAttention`], each `[reads, hidden]`."""
    found = {}
    for kind, names in zip(("query", "key_norm"), zip(*_depth_names(config.num_hidden_layers))):
        if len(dtypes := {checkpoint.infos[name].dtype for name in names}) > 1:
            raise ConversionError(
                f"{checkpoint.directory}: tensors like {names[0]!r} are of dtypes {', '.join(sorted(dtypes))}; one was "
                "expected."
            )
        found[kind] = torch.stack([_read_tensor(checkpoint, name).reshape(-1) for name in names])
    return found


def _read_tensor(checkpoint: Checkpoint, name: str) -> torch.Tensor:
    with safe_open(checkpoint.directory / checkpoint.tensors[name], framework="pt") as file:
        return file.get_tensor(name)


# -- configurations ----------------------------------------------------------------------------------------------------


def _k3_settings(checkpoint: Checkpoint, config: AttnResConfig) -> dict[str, Any]:
    """config.json in K3's layout; whatever K3 has no field for stays beside `text_config`."""
    file, depth = checkpoint.directory / "config.json", config.depth_attention
    if config.model_type != BACKBONE_TYPE:
        raise ConversionError(f"{file}: the backbone is {config.model_type!r}; Kimi K3's is {BACKBONE_TYPE!r}.")
    if depth["mix"] != "mean":
        raise ConversionError(f"{file}: mix={depth['mix']!r}; Kimi K3 reads the mean, so it has to be 'mean'.")
    for name, value in DEPTH_VARIANTS.items():
        if depth[name] != value:
            raise ConversionError(f"{file}: {name}={depth[name]!r}; Kimi K3's reads have {name}={value!r}.")
    if depth["block_size"] % 2:
        raise ConversionError(
            f"{file}: block_size={depth['block_size']}; Kimi K3's blocks are whole decoder layers, so it has to be "
            "even."
        )
    if depth["key_norm_eps"] != config.rms_norm_eps:
        raise ConversionError(
            f"{file}: key_norm_eps={depth['key_norm_eps']}, and the decoder's rms_norm_eps={config.rms_norm_eps}; Kimi "
            "K3 has one epsilon for both. Train with equal ones."
        )
    text = config.to_diff_dict()
    settings = {name: text.pop(name) for name in BESIDE_TEXT if name in text}
    settings[IMPLEMENTATION] = depth["implementation"]
    for name in ("auto_map", "backbone_model_type", "depth_attention"):
        del text[name]
    text["model_type"] = BACKBONE_TYPE
    fields = {"attn_res_block_size": depth["block_size"] // 2, **_k3_fields(checkpoint, text, config)}
    settings |= {
        "architectures": ["KimiK3ForConditionalGeneration"],
        "model_type": MODEL_TYPE,
        "text_config": text | fields,
        ADDED_FIELDS: sorted(set(fields) - set(text)),
    }
    _check_expressible(checkpoint._replace(settings=settings))
    return settings


def _k3_fields(checkpoint: Checkpoint, text: dict[str, Any], backbone: PreTrainedConfig) -> dict[str, Any]:
    """What K3 says of the decoder in other fields than Transformers, or Transformers not at all. `text`, the
    configuration file's own words on `backbone`, may say it too, but not otherwise."""
    num_dense = backbone.mlp_layer_types.count("dense")
    layer_types = list(enumerate(backbone.layer_types, 1))
    fields: dict[str, Any] = {
        "first_k_dense_replace": num_dense,
        "linear_attn_config": {
            "full_attn_layers": [number for number, kind in layer_types if kind == "full_attention"],
            "kda_layers": [number for number, kind in layer_types if kind == "linear_attention"],
            "head_dim": backbone.linear_head_dim,
            "num_heads": backbone.linear_num_heads,
            "short_conv_kernel_size": backbone.linear_conv_kernel_dim,
        },
        "mla_use_nope": True,
        "mla_use_output_gate": False,
        "moe_layer_freq": 1,
        "moe_router_activation_func": "sigmoid",
    }
    file = checkpoint.directory / "config.json"
    if "dense" in backbone.mlp_layer_types[num_dense:]:
        raise ConversionError(f"{file}: mlp_layer_types has dense layers after sparse ones; Kimi K3 has none there.")
    for name, value in fields.items():
        said = text.get(name)
        if isinstance(value, dict) and isinstance(said, dict):
            said = {key: said.get(key) for key in value}
        if said not in (None, value):
            raise ConversionError(f"{file}: {name}={said!r} contradicts the rest, from which {value!r} follows.")
    return fields


def _attnres_config(checkpoint: Checkpoint, depth_config: AttnResConfig) -> AttnResConfig:
    """The configuration of the imported model: the inverse of [`_k3_settings`]."""
    settings = copy.deepcopy(checkpoint.settings)
    text, added = settings.pop("text_config"), settings.pop(ADDED_FIELDS, None)
    depth = dict(depth_config.depth_attention)
    depth["implementation"] = settings.pop(IMPLEMENTATION, depth["implementation"])
    del text["attn_res_block_size"]
    settings = {
        **{name: value for name, value in text.items() if not isinstance(added, list) or name not in added},
        **settings,
        "architectures": ["AttnResForCausalLM"],
        "model_type": AttnResConfig.model_type,
        "backbone_model_type": text.get("model_type"),
        "depth_attention": depth,
        "dtype": settings.get("dtype", text.get("dtype")),
    }
    config = _make_config(checkpoint, settings)
    _k3_fields(checkpoint, text, config)
    return config


def _check_expressible(checkpoint: Checkpoint) -> None:
    found = []
    for path, allowed, what in EXPRESSIBLE:
        value: Any = checkpoint.settings
        for name in path.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if value not in allowed:
            found.append(f"{what} ({path})")
    if found:
        raise ConversionError(
            f"{checkpoint.directory / 'config.json'} tells of what Transformers' Kimi Linear has not: "
            f"{', '.join(found)}. Of such a checkpoint, read_depth_attention reads the depth tensors."
        )


# -- writing -----------------------------------------------------------------------------------------------------------


def _check_target(checkpoint: Checkpoint, destination: str | os.PathLike) -> Path:
    try:
        target = Path(destination).absolute()
        if os.path.lexists(target):
            raise ConversionError(f"destination {target} exists; choose another.")
        if not target.parent.is_dir():
            raise ConversionError(f"destination {target}: its parent directory does not exist; create it first.")
        if checkpoint.directory.resolve() in target.resolve().parents:
            raise ConversionError(f"destination {target} is inside of the source; choose one elsewhere.")
    except (TypeError, ValueError, OSError) as error:
        if isinstance(error, ConversionError):
            raise
        raise ConversionError(f"destination {destination!r} is no path that can be used: {error}") from error
    return target


def _write_tensors(
    checkpoint: Checkpoint, old_names: dict[str, str], depth: dict[str, torch.Tensor], stage: Path
) -> None:
    """Writes tensors of the checkpoint under new names, shard by shard, then `depth` in a shard of its own, and the
    index."""
    shards: dict[str, dict[str, str]] = {}
    for name, old_name in old_names.items():
        shards.setdefault(checkpoint.tensors[old_name], {})[name] = old_name
    weight_map = dict.fromkeys(depth, DEPTH_SHARD)
    for number, (shard, names) in enumerate(sorted(shards.items()), 1):
        file = f"model-{number:05}-of-{len(shards):05}.safetensors"
        _copy_tensors(checkpoint.directory / shard, stage / file, names)
        weight_map |= dict.fromkeys(names, file)
    (stage / DEPTH_SHARD).write_bytes(save(depth, metadata={"format": "pt"}))
    total_size = sum(path.stat().st_size for path in stage.glob("*.safetensors"))
    index = {"metadata": {"total_size": total_size}, "weight_map": dict(sorted(weight_map.items()))}
    (stage / SAFE_WEIGHTS_INDEX_NAME).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _copy_tensors(source: Path, destination: Path, old_names: dict[str, str]) -> None:
    """Copies tensors of one shard under new names: another header, and the same bytes."""
    with source.open("rb") as reader, destination.open("wb") as writer:
        header_size = int.from_bytes(reader.read(8), "little")
        old_header = json.loads(reader.read(header_size))
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        ranges, end = [], 0
        for name in sorted(old_names, key=lambda name: old_header[old_names[name]]["data_offsets"]):
            entry = old_header[old_names[name]]
            first, last = entry["data_offsets"]
            ranges.append((8 + header_size + first, last - first))
            header[name] = {**entry, "data_offsets": [end, end := end + last - first]}
        encoded = json.dumps(header, separators=(",", ":")).encode()
        encoded += b" " * (-len(encoded) % 8)  # data starts aligned
        writer.write(len(encoded).to_bytes(8, "little") + encoded)
        for first, remaining in ranges:
            reader.seek(first)
            while remaining > 0:
                chunk = reader.read(min(CHUNK_BYTES, remaining))
                if not chunk:
                    raise ConversionError(f"{source} has become shorter while it was read; fetch it again.")
                writer.write(chunk)
                remaining -= len(chunk)


def _copy_companions(checkpoint: Checkpoint, stage: Path) -> None:
    for name in find_companions(checkpoint.directory):
        (stage / name).parent.mkdir(exist_ok=True)
        shutil.copyfile(checkpoint.directory / name, stage / name)


def _check_tensors(directory: Path, config: AttnResConfig, name: Path) -> None:
    """Checks that the tensors in `directory` are exactly those that the configuration asks for; reads headers only."""
    config = copy.deepcopy(config)
    load(AttnResForCausalLM, config, str(name), meta_tensors(directory), device="meta", is_exact=True)
