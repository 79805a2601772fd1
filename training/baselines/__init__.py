"""What others do to residuals, to compare AttnRes with, over the same decoders and with the same initial weights.

>>> from attnres.training import baselines
>>> model = baselines.from_config(Qwen3Config(), kind="mhc")  # computes what the plain model does until it is trained
>>> baselines.save_pretrained(model, "mhc-model")
>>> model = baselines.from_pretrained("mhc-model")

| kind | residuals | loss in the paper's Table 4 (plain 1.766) |
|---|---|---|
| `"dense_former"` | static weights over all outputs (Pagliardini et al., arXiv 2402.02622) | 1.767 |
| `"hyper_connections"` | n streams, mixed by learned matrices (Zhu et al., arXiv 2409.19606) | |
| `"mhc"` | n streams, mixed by doubly stochastic matrices (Xie et al., arXiv 2512.24880) | 1.747 |
"""

from .model import BASELINES, from_config, from_pretrained, save_pretrained

__all__ = ["BASELINES", "from_config", "from_pretrained", "save_pretrained"]
