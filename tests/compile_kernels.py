"""Compiles every kernel for compute capability 9.0 (H100, H200), which needs no device, and prints what came out as JSON.

Run by `test_depth_attention_triton.py` in a process of its own, because kernels are either compiled or interpreted.
"""

from __future__ import annotations

import json
import re
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from attnres import depth_attention_triton as kernels

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
BLOCKS = {  # sources, reads, hidden
    "phase one, d 2048": (5, 8, 2048),
    "phase one, d 7168": (9, 6, 7168),
    "Full, d 1024": (57, 1, 1024),
}
MERGES = {"d 2048": 2048, "d 7168": 7168}
SCALARS = ("num_sources", "num_reads", "num_tokens", "first_scale", "scale")


def compile_kernel(kernel: Any, values: tuple[str, ...], num_warps: int = 4, **known: Any) -> dict[str, Any]:
    """`values` are the arguments in bfloat16; `known` are constants, and tuples by their type and length."""
    signature, attributes, constants = {}, {}, {}
    for index, name in enumerate(kernel.arg_names):
        if isinstance(known.get(name), tuple):
            dtype, length = known[name]
            signature[name] = (dtype,) * length
            attributes |= {(index, i): [["tt.divisibility", 16]] for i in range(length)}
        elif name in known:
            signature[name], constants[(index,)] = "constexpr", known[name]
        elif name in SCALARS:
            signature[name] = "i32"
        else:
            signature[name] = "*bf16" if name in values else "*fp32"
            attributes[(index,)] = [["tt.divisibility", 16]]
    source = ASTSource(kernel, signature, constants, attributes)
    compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options={"num_warps": num_warps})
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(compiled.asm["cubin"])
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        usage = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout
    registers, stack = re.search(r"REG:(\d+) STACK:(\d+)", usage).groups()  # type: ignore[union-attr]
    return {
        "registers": int(registers),
        "spilled_bytes": int(stack),
        "narrow_loads_of_values": re.findall(r"ld\.global[.\w:]*b16", compiled.asm["ptx"]),
    }


def main() -> None:
    found = {}
    for name, (num_sources, num_reads, hidden) in BLOCKS.items():
        reads = triton.next_power_of_2(num_reads)
        for kernel, elements in ((kernels.phase_one_kernel, 8192), (kernels.phase_one_backward_kernel, 4096)):
            sizes = kernels.tiles(num_sources, hidden, elements)
            tuples = {name: ("*bf16", sizes["N"]) for name in ("sources", "grad_sources")}
            tuples["grad_outputs"] = ("*fp32", reads)
            constants = {"HIDDEN": hidden, "READS": reads, "EPS": 1e-6}
            found[f"{name}, {kernel.fn.__name__}"] = compile_kernel(kernel, (), **sizes, **tuples, **constants)
    tuples = {"sources": ("*bf16", 8)}
    sizes = {"HIDDEN": 7168, "N": 8, "READS": 16, **kernels.GRAD_QUERIES_TILES}
    found["grad_queries_kernel"] = compile_kernel(kernels.grad_queries_kernel, (), **sizes, **tuples)
    for name, hidden in MERGES.items():
        for fused in (False, True):
            constants = {"HIDDEN": hidden, "EPS": 1e-6, "NORM_EPS": 1e-6, **kernels.phase_two_tiles(hidden)}
            constants |= {} if fused else {"added": None, "norm_weight": None, "grad_total": None}
            values = ("partial_sum", "added", "hidden_states", "total", "grad_hidden_states", "grad_total")
            for kernel in (kernels.phase_two_kernel, kernels.phase_two_backward_kernel):
                arguments = {key: value for key, value in constants.items() if key in (*kernel.arg_names, "num_warps")}
                title = f"{name}, {'fused, ' if fused else ''}{kernel.fn.__name__}"
                found[title] = compile_kernel(kernel, (*values, "norm_weight", "grad_partial_sum"), **arguments)
    print(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
