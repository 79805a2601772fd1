"""sentence-transformers embeds with an AttnRes model as with the plain one."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from ecosystem import row
from transformers import AutoModelForCausalLM, AutoTokenizer

from attnres import AttnResForCausalLM

SOURCE = Path(__file__).parents[1] / "examples" / "tiny-qwen3"
TEXTS = ["def add(a, b): return a + b", "import os"]


@row("sentence-transformers", "`encode` from a converted checkpoint, mean and last-token pooling; save and load")
@pytest.mark.parametrize("pooling", ["mean", "lasttoken"])
def test_embeddings_are_those_of_the_plain_model(pooling: str, tmp_path: Path) -> None:
    pytest.importorskip("sentence_transformers", reason="it is in the extra `ecosystem`")
    from sentence_transformers import SentenceTransformer
    from sentence_transformers.models import Pooling, Transformer

    AutoModelForCausalLM.from_pretrained(SOURCE, dtype=torch.float32).save_pretrained(tmp_path / "plain")
    AttnResForCausalLM.from_pretrained(tmp_path / "plain").save_pretrained(tmp_path / "ours")
    embeddings = []
    for name in ("plain", "ours"):
        AutoTokenizer.from_pretrained(SOURCE).save_pretrained(tmp_path / name)
        transformer = Transformer(str(tmp_path / name))
        model = SentenceTransformer(modules=[transformer, Pooling(192, pooling_mode=pooling)], device="cpu")
        embeddings.append(model.encode(TEXTS, convert_to_tensor=True))
    assert "attnres" in type(transformer.auto_model).__module__
    torch.testing.assert_close(embeddings[1], embeddings[0], atol=1e-3, rtol=1e-3)
    model.save(str(tmp_path / "saved"))
    loaded = SentenceTransformer(str(tmp_path / "saved"), device="cpu", trust_remote_code=True)
    torch.testing.assert_close(loaded.encode(TEXTS, convert_to_tensor=True), embeddings[1])
