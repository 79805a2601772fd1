"""Compiles what would be launched on an H100 or H200, which needs no device, and prints what came out as JSON.

Run by `test_depth_attention_triton.py` in a process of its own, because kernels are either compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import triton
from triton.backends.compiler import GPUTarget

from attnres import depth_attention_triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
# Sources, reads, hidden, eps, heads, window.
BLOCKS = ((4, 8, 2048, 1e-6, 1, []), (9, 6, 7168, 1e-6, 1, []), (57, 1, 1024, 1e-6, 1, []))
VARIANTS = ((4, 8, 2048, 1e-6, 8, []), (9, 1, 2048, None, 1, [8, 1, 4]))
found: dict[str, dict[str, Any]] = {}


class Driver:
    """Of a device of compute capability 9.0 that is not there."""

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


def compile_instead(kernel: Any, grid: tuple[int, ...], on: torch.Tensor, *args: Any, **kwargs: Any) -> None:
    compiled = kernel.warmup(*args, grid=grid, **kwargs, enable_fp_fusion=True)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    found[f"{kernel.fn.__name__} {len(found)}"] = {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "narrow_loads_of_values": re.findall(r"ld\.global[.\w:]*b16", compiled.asm["ptx"]),
    }


def values(*shape: int, dtype: torch.dtype = torch.bfloat16) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, requires_grad=True)


def main() -> None:
    triton.runtime.driver.set_active(Driver())
    kernels.launch = compile_instead
    for num_sources, num_reads, hidden, eps, num_heads, window in (*BLOCKS, *VARIANTS):
        queries = values(num_reads, hidden, dtype=torch.float32)
        sources = [values(130, hidden) for _ in range(num_sources)]
        outputs = kernels.PhaseOne.apply(queries, eps, num_heads, window, *sources)
        torch.autograd.backward(outputs, [torch.zeros_like(output) for output in outputs])
    for hidden, num_heads in ((2048, 1), (7168, 1), (2048, 8)):
        for fused in (False, True):
            added, norm_weight = (values(3, hidden), values(hidden)) if fused else (None, None)
            shape = (3,) if num_heads == 1 else (3, num_heads)
            output, log_sum_exp = values(3, hidden, dtype=torch.float32), values(*shape, dtype=torch.float32)
            query = values(hidden, dtype=torch.float32)
            results = kernels.PhaseTwo.apply(
                output, log_sum_exp, values(3, hidden), added, query, norm_weight, 1, 1e-6, 1e-6
            )
            torch.autograd.backward(results, [torch.zeros_like(result) for result in results])
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
