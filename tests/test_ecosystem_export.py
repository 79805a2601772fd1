"""Exported programs: what runs outside gives the logits of the model, at lengths that it was not exported with."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ecosystem import row
from tiny import random_tokens, retrofit, tiny_model
from torch import nn
from torch.export import Dim
from transformers import PreTrainedModel

SHAPES = [(2, 7), (1, 2), (3, 40)]
DYNAMIC = {"input_ids": {0: Dim("batch", min=1, max=64), 1: Dim("length", min=2, max=64)}}


class Logits(nn.Module):
    """A model from token ids to logits."""

    def __init__(self, model: PreTrainedModel):
        super().__init__()
        self.model = model

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        return self.model(input_ids, use_cache=False).logits


@torch.no_grad()
@row("torch.export", "dynamic batch and length, random queries; save and load")
@pytest.mark.parametrize("family", ["qwen3", "gemma2", "deepseek_v3"])
def test_torch_export(family: str, tmp_path: Path) -> None:
    plain = tiny_model(family)
    for model in (plain, retrofit(plain, random_queries=True)):
        program = torch.export.export(Logits(model), (random_tokens(2, 7),), dynamic_shapes=DYNAMIC)
        torch.export.save(program, tmp_path / "model.pt2")
        exported = torch.export.load(tmp_path / "model.pt2").module()
        for shape in SHAPES:
            input_ids = random_tokens(*shape)
            torch.testing.assert_close(exported(input_ids), model(input_ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@row("ONNX", "`torch.onnx.export` with dynamic batch and length, random queries; in onnxruntime")
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", ["qwen3", "gemma2"])
def test_onnx(family: str, tmp_path: Path) -> None:
    runtime = pytest.importorskip("onnxruntime", reason="it is in the extra `ecosystem`")
    pytest.importorskip("onnxscript", reason="it is in the extra `ecosystem`")
    plain = tiny_model(family)
    for model in (plain, retrofit(plain, random_queries=True)):
        file = tmp_path / f"{type(model).__name__}.onnx"
        torch.onnx.export(
            Logits(model), (random_tokens(2, 7),), file, dynamo=True, dynamic_shapes=DYNAMIC, verbose=False
        )
        session = runtime.InferenceSession(file)
        for shape in SHAPES:
            input_ids = random_tokens(*shape)
            (logits,) = session.run(None, {"input_ids": input_ids.numpy()})
            torch.testing.assert_close(torch.from_numpy(logits), model(input_ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@row(
    "ONNX",
    "experts (Qwen3-MoE)",
    result="refused: torch's exporter has no ONNX function for the grouped products of Transformers, for the plain "
    "model neither",
)
@pytest.mark.filterwarnings("ignore")
def test_onnx_of_experts(tmp_path: Path) -> None:
    pytest.importorskip("onnxscript", reason="it is in the extra `ecosystem`")
    plain = tiny_model("qwen3_moe")
    for model in (plain, retrofit(plain)):
        with pytest.raises(torch.onnx.OnnxExporterError, match="grouped_mm"):
            torch.onnx.export(Logits(model), (random_tokens(2, 7),), tmp_path / "model.onnx", dynamo=True)
