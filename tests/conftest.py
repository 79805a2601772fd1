from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports triton, which then runs its kernels on the CPU
    os.environ.setdefault("TRITON_INTERPRET", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")  # before anything imports huggingface_hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.insert(0, str(Path(__file__).parent))  # tests share `tiny.py` and `reference.py`


def pytest_configure(config: pytest.Config) -> None:
    # Marks that the test files of transformers put on their own tests.
    for name in ("accelerate_tests", "flash_attn_3_test", "flash_attn_4_test", "flash_attn_test", "generate"):
        config.addinivalue_line("markers", f"{name}: of transformers' own suite")
    for name in ("torch_compile_test", "torch_export_test"):
        config.addinivalue_line("markers", f"{name}: of transformers' own suite")
