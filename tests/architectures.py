"""The table in docs/architectures.md: every causal language model of Transformers, supported, or refused and why.

`python tests/architectures.py` writes and prints it; `test_architectures.py` fails if it is stale.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import transformers
from tiny import tiny_config
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from attnres.backbones import REFUSED, SUPPORTED

PAGE = Path(__file__).resolve().parents[1] / "docs" / "architectures.md"

# Other names of an architecture: its configurations say the other name.
ALIASES = {
    name: model_type
    for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    if (model_type := CONFIG_MAPPING[name].model_type) != name and name != "attnres"
}
ARCHITECTURES = [name for name in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES if name not in ALIASES and name != "attnres"]


def rows() -> Iterator[tuple[str, str, str]]:
    """Architecture, verdict and remark of each, supported ones first."""
    for name in sorted(SUPPORTED):
        config = tiny_config(name)
        sublayers = SUPPORTED[name].sublayers_per_layer(config)
        remark = f"{sublayers} sublayer{'s' if sublayers > 1 else ''} per decoder layer"
        if callable(SUPPORTED[name].sublayers):
            remark += ", or as its configuration says"
        yield name, "supported", remark
    for name, reason in sorted(REFUSED.items()):
        yield name, "refused", reason


def page() -> str:
    release = ".".join(transformers.__version__.split(".")[:2])
    lines = [
        "# Architectures",
        "",
        f"Transformers {release} has {len(ARCHITECTURES)} architectures that it calls causal language models. "
        f"**{len(SUPPORTED)} can be",
        f"backbones; {len(REFUSED)} are refused**, by name and with the reason. For each supported one a test converts "
        "a tiny random",
        "checkpoint and compares logits, cached decoding, gradients, tensor names and offloading; see",
        "[tests/test_architectures.py](../tests/test_architectures.py). This page is made by `python "
        "tests/architectures.py`.",
        "",
        "The forward of each decoder layer is the library's own, run on a residual stream that reads from depth where",
        "a sum was read, and writes to depth where something was added to it. A *sublayer* is what lies between two",
        "reads: a token mixer or an MLP, or both, where they stand in parallel.",
        "",
        "| architecture | | |",
        "|---|---|---|",
        *(f"| `{name}` | {verdict} | {remark} |" for name, verdict, remark in rows()),
        "",
        f"Other names: {', '.join(f'`{name}` is `{model_type}`' for name, model_type in sorted(ALIASES.items()))}.",
    ]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(page())
