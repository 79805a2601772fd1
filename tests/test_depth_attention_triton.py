"""The kernels: on a CUDA device where there is one (`gpu`), else in Triton's interpreter on the CPU.

The interpreter computes as the device does, but truncates to bfloat16 where a device rounds to nearest.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from reference import ReferenceModel
from tiny import random_tokens, retrofit, tiny_model
from transformers.dynamic_module_utils import get_imports, get_relative_import_files

from attnres import depth_attention, modeling_attnres
from attnres.configuration_attnres import AttnResError
from attnres.depth_attention import AutoDepthAttention, EagerDepthAttention, TritonDepthAttention, read
from attnres.depth_attention_two_phase import TwoPhaseDepthAttention
from attnres.depth_state import DepthSettings, DepthState, Norm

pytest.importorskip("triton", reason="triton is not installed")
from attnres import depth_attention_triton as kernels

EPS = 1e-6
TOLERANCES = {torch.float64: 1e-11, torch.float32: 2e-5, torch.bfloat16: 2**-7, torch.float16: 2**-10}


@pytest.fixture(params=["interpreter", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    if request.param == "cuda":
        if not torch.cuda.is_available():
            pytest.skip("no CUDA device")
        if kernels.IS_INTERPRETED:
            pytest.skip("TRITON_INTERPRET=1 was asked for")
        return "cuda"
    if not kernels.IS_INTERPRETED:
        pytest.skip("kernels are compiled for the CUDA device; set TRITON_INTERPRET=1 to interpret them")
    return "cpu"


def random(*shape: int, dtype: torch.dtype, device: str, scale: float = 1.0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape) + sum(shape))
    return (torch.randn(shape, generator=generator, dtype=torch.float64) * scale).to(device, dtype).requires_grad_()


def exact(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().double().requires_grad_()


def assert_close(
    actual: tuple[torch.Tensor, ...], expected: tuple[torch.Tensor, ...], rounded: torch.dtype = torch.float64
) -> None:
    """Each to the tolerance of its own dtype, or of the one that values of size 1 were rounded to on the way."""
    for index, (a, e) in enumerate(zip(actual, expected, strict=True)):
        largest = e.abs().max().item()
        tolerance = max(TOLERANCES[a.dtype] * max(largest, 1e-3), TOLERANCES[rounded] * max(largest, 1))
        assert a.shape == e.shape
        assert (a.double() - e).abs().max().item() <= tolerance, f"tensor {index}, {a.dtype}"


def check(function: Any, reference: Any, inputs: list[torch.Tensor], rounded: torch.dtype = torch.float64) -> None:
    """Outputs and gradients of a function against those of another in float64."""
    outputs, exact_inputs = function(*inputs), [exact(tensor) for tensor in inputs]
    expected = reference(*exact_inputs)
    assert_close(outputs, expected, rounded)
    grads = [random(*output.shape, dtype=output.dtype, device=output.device.type) for output in outputs]
    actual_grads = torch.autograd.grad(outputs, inputs, grads)
    assert [grad.dtype for grad in actual_grads] == [tensor.dtype for tensor in inputs]
    expected_grads = torch.autograd.grad(expected, exact_inputs, [exact(grad) for grad in grads])
    assert_close(actual_grads, expected_grads, rounded)


def phase_one_reference(queries: torch.Tensor, *sources: torch.Tensor) -> tuple[torch.Tensor, ...]:
    values = torch.stack(sources)
    keys = values / (values.square().mean(-1, keepdim=True) + EPS).sqrt()
    logits = torch.einsum("rd,n...d->rn...", queries, keys)
    outputs = torch.einsum("rn...,n...d->r...d", logits.softmax(1), values)
    return (*outputs.unbind(0), *logits.logsumexp(1).unbind(0))


# sources, reads, tokens, hidden, dtype of sources
PHASE_ONE = {
    "one of each": (1, 1, (1,), 8, torch.float64),
    "one source": (1, 3, (1, 2), 24, torch.float32),
    "Full": (5, 1, (2, 1), 24, torch.float64),
    "odd sizes": (3, 5, (3, 1), 37, torch.float64),
    "float32": (6, 3, (1, 3), 40, torch.float32),
    "bfloat16": (3, 2, (1, 3), 37, torch.bfloat16),
    "float16": (2, 2, (2,), 24, torch.float16),
    "no token": (2, 2, (0,), 8, torch.float32),
}


@pytest.mark.parametrize("case", PHASE_ONE)
def test_phase_one_equals_reference(case: str, device: str) -> None:
    check_phase_one(*PHASE_ONE[case], device)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_phase_one_in_blocks_of_columns(dtype: torch.dtype, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where all sources of a token do not fit into registers; the last block is not full."""
    monkeypatch.setattr(kernels, "tiles", lambda *_, **__: {"N": 4, "BLOCK": 16, "num_warps": 1})
    check_phase_one(3, 2, (2,), 37, dtype, device)


def test_phase_one_with_all_reads_in_a_program(device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As where there are many tokens."""
    monkeypatch.setattr(kernels, "SPLIT_TOKENS", 0)
    check_phase_one(3, 5, (2,), 24, torch.float64, device)


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("sources", "reads", "tokens", "hidden"), [(5, 8, 300, 2048), (9, 6, 140, 7168), (57, 1, 9, 1024)]
)
def test_phase_one_at_real_sizes(sources: int, reads: int, tokens: int, hidden: int, device: str) -> None:
    if device != "cuda":
        pytest.skip("too large to be interpreted")
    check_phase_one(sources, reads, (1, tokens), hidden, torch.bfloat16, device)


def check_phase_one(
    num_sources: int,
    num_reads: int,
    tokens: tuple[int, ...],
    hidden: int,
    dtype: torch.dtype,
    device: str,
) -> None:
    query_dtype = torch.promote_types(dtype, torch.float32)
    queries = random(num_reads, hidden, dtype=query_dtype, device=device, scale=hidden**-0.5)
    # Sources of very different size, as they are in trained models.
    sources = [random(*tokens, hidden, dtype=dtype, device=device, scale=4.0**-i) for i in range(num_sources)]
    sources = [source.roll(i, -1).detach().requires_grad_() for i, source in enumerate(sources)]
    if 0 in tokens:
        outputs = kernels.phase_one(queries, tuple(sources), EPS)
        grads = torch.autograd.grad(sum(output.sum() for output in outputs), [queries, *sources])
        assert not any(grad.any() for grad in grads)
        return
    check(
        lambda queries, *sources: kernels.phase_one(queries, sources, EPS),
        phase_one_reference,
        [queries, *sources],
    )


def phase_two_reference(
    output: torch.Tensor,
    log_sum_exp: torch.Tensor,
    partial_sum: torch.Tensor,
    query: torch.Tensor,
    scale: int,
    norm_weight: torch.Tensor | None = None,
) -> torch.Tensor:
    """Written as Algorithm 1 has it, with the exponentials that the kernels avoid."""
    logit = (partial_sum / (partial_sum.square().mean(-1, keepdim=True) + EPS).sqrt() * query).sum(-1)
    of_blocks, of_sum = log_sum_exp.exp().unsqueeze(-1), logit.exp().unsqueeze(-1)
    merged = scale * (of_blocks * output + of_sum * partial_sum) / (of_blocks + of_sum)
    if norm_weight is not None:
        merged = merged / (merged.square().mean(-1, keepdim=True) + 1e-5).sqrt() * norm_weight
    return merged


@pytest.mark.parametrize("scale", [1, 4])
@pytest.mark.parametrize(
    ("tokens", "hidden", "dtype"),
    [((2, 3), 37, torch.float64), ((1, 2), 24, torch.float32), ((3,), 40, torch.bfloat16), ((2,), 8, torch.float16)],
)
@pytest.mark.parametrize("fused", ["nothing", "addition", "norm", "addition and norm"])
def test_phase_two_equals_reference(fused: str, tokens: Any, hidden: int, dtype: Any, scale: int, device: str) -> None:
    query_dtype = torch.promote_types(dtype, torch.float32)
    inputs = {
        "output": random(*tokens, hidden, dtype=query_dtype, device=device),
        "log_sum_exp": random(*tokens, dtype=query_dtype, device=device),
        "partial_sum": random(hidden, *tokens, dtype=dtype, device=device, scale=0.5).detach().movedim(0, -1).clone(),
        "query": random(hidden, dtype=query_dtype, device=device, scale=hidden**-0.5),
    }
    inputs["partial_sum"].requires_grad_()
    if "addition" in fused:
        inputs["addend"] = inputs["partial_sum"].detach().roll(1, -1).requires_grad_()
    if "norm" in fused:
        inputs["norm_weight"] = random(hidden, dtype=dtype, device=device)

    def function(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kwargs = dict(zip(inputs, tensors))
        if "norm_weight" in kwargs:
            kwargs["norm"] = Norm(kwargs.pop("norm_weight"), 1e-5)
        hidden_states, total = kernels.phase_two(**kwargs, scale=scale, eps=EPS)
        if "addend" not in kwargs:
            assert total is kwargs["partial_sum"]
            return (hidden_states,)
        return hidden_states, total

    def reference(*tensors: torch.Tensor) -> tuple[torch.Tensor, ...]:
        kwargs = dict(zip(inputs, tensors))
        if "addend" not in kwargs:
            return (phase_two_reference(**kwargs, scale=scale),)
        kwargs["partial_sum"] = total = kwargs["partial_sum"] + kwargs.pop("addend")
        return phase_two_reference(**kwargs, scale=scale), total

    check(function, reference, list(inputs.values()), rounded=dtype if "addition" in fused else torch.float64)


def test_views_and_expanded_gradients(device: str) -> None:
    """What is not contiguous, or not aligned, is copied; the gradient of a sum has no memory of its own."""
    storage = random(2, 3, 25, dtype=torch.float32, device=device)
    sources = (storage[0, :, 1:], storage[1].T[:24].T, storage[1, :, :24])
    queries = random(2, 24, dtype=torch.float32, device=device)
    actual = kernels.phase_one(queries, sources, EPS)
    copies = [exact(source) for source in sources]
    expected = phase_one_reference(exact(queries), *copies)
    assert_close(actual, expected)
    actual_grad = torch.autograd.grad(sum(output.sum() for output in actual), sources)
    expected_grad = torch.autograd.grad(sum(output.sum() for output in expected), copies)
    assert_close(actual_grad, expected_grad)


def test_gradients_are_the_same_in_every_run(device: str) -> None:
    queries = random(3, 40, dtype=torch.float32, device=device)
    sources = [random(50 if device == "cuda" else 3, 40, dtype=torch.float32, device=device) for _ in range(3)]
    runs = []
    for _ in range(2):
        outputs = kernels.phase_one(queries, tuple(sources), EPS)
        merged, _ = kernels.phase_two(outputs[1], outputs[4], sources[0], queries[1], 1, EPS)
        runs.append(torch.autograd.grad((merged * outputs[0]).sum(), [queries, *sources]))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


@pytest.mark.parametrize("mix", ["mean", "sum"])
@pytest.mark.parametrize("block_size", [1, 2, 3])
def test_reads_equal_the_reference(block_size: int, mix: str, device: str) -> None:
    """All reads of a stack, with and without a norm behind them, and their gradients; groups of two reads or more."""
    reads_and_grads_equal(block_size, device, mix=mix)


def reads_and_grads_equal(block_size: int, device: str, **fields: Any) -> None:
    """Of the kernels and the reference, in float64."""
    embedding = random(1, 2, 24, dtype=torch.float64, device=device)
    queries, weight = random(6, 24, dtype=torch.float64, device=device), random(24, dtype=torch.float64, device=device)
    outputs = [random(2, 1, 24, dtype=torch.float64, device=device) for _ in range(5)]
    outputs = [output.detach().view(1, 2, 24).roll(i, -1).requires_grad_() for i, output in enumerate(outputs)]
    results = []
    for implementation in (TritonDepthAttention, EagerDepthAttention):
        settings = DepthSettings(block_size, "mean", EPS, implementation, group_size=max(2, block_size))
        settings = settings._replace(**fields)
        state, reads = DepthState((embedding,)), []
        for index in range(6):
            hidden_states, state = read(queries, state, settings, Norm(weight, 1e-5) if index % 2 else None)
            reads.append(hidden_states)
            if index < 5:
                state = state.write(outputs[index], block_size)
        grads = torch.autograd.grad(sum(r.square().sum() for r in reads), [queries, weight, embedding, *outputs])
        results.append((*reads, *grads))
    assert_close(*results)


HEADS = {
    "two heads": dict(num_heads=2),
    "a head for each column": dict(num_heads=24, mix="sum"),
    "no key norm": dict(key_norm_eps=None),
    "window of one": dict(window=1),
    "window of two, three heads": dict(window=2, num_heads=3),
    "window, heads, no key norm": dict(window=3, num_heads=2, key_norm_eps=None),
}


@pytest.mark.parametrize("block_size", [1, 2, 3])
@pytest.mark.parametrize("variant", HEADS)
def test_variants_equal_the_reference(variant: str, block_size: int, device: str, monkeypatch: Any) -> None:
    """All reads of a stack and their gradients, in several programs per token and in one, in blocks of columns."""
    if block_size == 2:
        monkeypatch.setattr(kernels, "SPLIT_TOKENS", 0)
    if block_size == 3:
        tiles = kernels.tiles
        monkeypatch.setattr(kernels, "tiles", lambda *sizes, **kwargs: tiles(*sizes, **kwargs) | {"BLOCK": 16})
    reads_and_grads_equal(block_size, device, **HEADS[variant])


def test_second_derivatives_are_refused(device: str) -> None:
    queries = random(3, 24, dtype=torch.float32, device=device)
    first = random(1, 2, 24, dtype=torch.float32, device=device)
    sources = (first, first.detach().flip(-1).requires_grad_())  # of equal ones, no weight would depend on a query
    for result in (kernels.phase_one(queries, sources, EPS)[0], merge_of(queries, sources)):
        (grad,) = torch.autograd.grad(result.square().sum(), queries, retain_graph=True)
        assert grad.any()
        with pytest.raises(AttnResError, match="'eager'"):
            torch.autograd.grad(result.square().sum(), queries, create_graph=True)


def merge_of(queries: torch.Tensor, sources: tuple[torch.Tensor, ...]) -> torch.Tensor:
    output, log_sum_exp = sources[0].detach(), sources[0].detach().sum(-1)
    return kernels.phase_two(output, log_sum_exp, sources[1], queries[0], 1, EPS)[0]


# -- the whole model ---------------------------------------------------------------------------------------------------


def make_model(device: str, implementation: str = "triton", block_size: int = 3, mix: str = "mean") -> Any:
    backbone = tiny_model("qwen3", num_hidden_layers=2)
    kwargs = dict(block_size=block_size, mix=mix, depth_attention_implementation=implementation)
    return retrofit(backbone, random_queries=True, **kwargs).to(device)


def loss_and_grads(model: Any, input_ids: torch.Tensor) -> tuple[torch.Tensor, ...]:
    model.zero_grad()
    loss = model(input_ids, labels=input_ids).loss
    loss.backward()
    return (loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None))


@pytest.mark.parametrize(("block_size", "mix"), [(1, "mean"), (3, "sum"), (4, "mean")])
def test_model_equals_reference(block_size: int, mix: str, device: str) -> None:
    """Logits to 1e-5 and gradients to 1e-4; a block size of 3 leaves a partial block of one sublayer."""
    model = make_model(device, block_size=block_size, mix=mix)
    depth = model.depth_attention
    backbone = tiny_model("qwen3", num_hidden_layers=2)
    reference = ReferenceModel(backbone, depth.query, depth.key_norm, block_size, mix).to(device)
    input_ids = random_tokens(batch=2, length=2).to(device)
    outputs, expected = (m(input_ids, labels=input_ids) for m in (model, reference))
    assert (outputs.logits.double() - expected.logits).abs().max() <= 1e-5
    outputs.loss.backward()
    expected.loss.backward()
    assert (depth.query.grad.double() - reference.query.grad).abs().max() <= 1e-4
    assert (depth.key_norm.grad.double() - reference.key_norm.grad).abs().max() <= 1e-4
    assert depth.query.grad[1:].abs().amax(-1).min() > 0, "a query without gradient"
    for name, parameter in reference.backbone.named_parameters():
        assert (model.get_parameter(name).grad.double() - parameter.grad).abs().max() <= 1e-4, name


@pytest.fixture
def merges(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """What the launches of phase two did beside merging."""
    launched, launch = [], kernels.launch_phase_two

    def record(*args: Any) -> Any:
        found = {"addition": args[3], "norm": args[5]}
        launched.append(" and ".join(name for name, tensor in found.items() if tensor is not None) or "nothing")
        return launch(*args)

    monkeypatch.setattr(kernels, "launch_phase_two", record)
    return launched


def test_model_fuses_additions_and_norms(merges: list[str], device: str) -> None:
    """Also across layers; the first read of a block has no partial sum, the second nothing to add to it."""
    model, input_ids = make_model(device, block_size=4), random_tokens(batch=1, length=2).to(device)
    with torch.no_grad():
        plain = model(input_ids).logits
        assert merges == ["norm", "addition and norm", "addition and norm"]
        merges.clear()
        # What a layer reads first is asked for, not only its norm.
        outputs = model(input_ids, output_hidden_states=True)
        assert merges == ["norm", "addition", "addition and norm"]
        torch.testing.assert_close(outputs.logits, plain, atol=1e-5, rtol=1e-5)
        outputs = model(input_ids, output_depth_attentions=True)
        assert len(outputs.depth_attentions) == 5
        torch.testing.assert_close(outputs.logits, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("family", ["gemma2", "gpt_oss"])
def test_only_rms_norms_are_fused(family: str, merges: list[str], device: str) -> None:
    """Gemma's norm has another factor. A weight of another dtype, which GPT-OSS may have, is left to the module."""
    backbone, input_ids = tiny_model(family, num_hidden_layers=2), random_tokens(batch=1, length=2).to(device)
    models = [
        retrofit(backbone, random_queries=True, block_size=4, depth_attention_implementation=name).to(device)
        for name in ("triton", "two_phase")
    ]
    logits = [model(input_ids).logits for model in models]
    torch.testing.assert_close(*logits, atol=1e-5, rtol=1e-5)
    assert set(merges) == ({"nothing", "addition"} if family == "gemma2" else {"norm", "addition and norm"})
    merges.clear()
    models[0].bfloat16()
    for module in models[0].modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.float()
    models[0](input_ids)
    assert set(merges) == {"nothing", "addition"}


def test_norm_that_is_replaced_is_left_alone(merges: list[str], device: str) -> None:
    """By a kernel of the library, or by a hook that brings offloaded weights."""
    model, input_ids = make_model(device, block_size=4), random_tokens(batch=1, length=2).to(device)
    for layer in model.model.layers:
        norm = layer.post_attention_layernorm
        norm.forward = lambda hidden_states, weight=norm.weight: hidden_states * 0 + weight
    model(input_ids)
    assert merges == ["nothing", "addition and norm", "addition"]


def test_hooks_of_a_norm_see_tensors(merges: list[str], device: str) -> None:
    model, input_ids = make_model(device, block_size=4), random_tokens(batch=1, length=2).to(device)
    seen: list[Any] = []
    layers = model.model.layers
    layers[0].post_attention_layernorm.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    layers[1].input_layernorm.register_forward_hook(lambda _, args, output: seen.append(args[0]))
    layers[1].post_attention_layernorm.register_full_backward_hook(lambda *_: seen.append(_[1][0]))
    model(input_ids, labels=input_ids).loss.backward()
    assert merges == ["nothing", "addition", "addition"]
    assert [type(value) for value in seen] == [torch.Tensor] * 3


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradient_checkpointing(use_reentrant: bool, device: str) -> None:
    model = make_model(device)
    input_ids = random_tokens(batch=1, length=3).to(device)
    expected = loss_and_grads(model, input_ids)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.train()  # there is no dropout
    for actual_tensor, expected_tensor in zip(loss_and_grads(model, input_ids), expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor)


def test_generation(device: str) -> None:
    input_ids = random_tokens(batch=1, length=3).to(device)
    tokens = [
        make_model(device, implementation).generate(input_ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
        for implementation in ("triton", "two_phase")
    ]
    assert torch.equal(*tokens)


def test_bfloat16_model(device: str) -> None:
    """No further from float32 than the other implementation is, but for how the interpreter rounds."""
    input_ids = random_tokens(batch=1, length=4).to(device)
    with torch.no_grad():
        expected = make_model(device)(input_ids).logits
        errors = [
            (make_model(device, name).bfloat16()(input_ids).logits.float() - expected).norm()
            for name in ("triton", "two_phase")
        ]
    assert errors[0] <= errors[1] * (2 if kernels.IS_INTERPRETED else 1.1)


@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.gpu)])
def test_compiled_model_is_one_graph(backend: str, device: str) -> None:
    if backend == "inductor" and device != "cuda":
        pytest.skip("no CUDA device")
    model = make_model(device)
    input_ids = random_tokens(batch=1, length=3).to(device)
    expected = loss_and_grads(model, input_ids)
    torch._dynamo.reset()
    compiled = torch.compile(model, fullgraph=True, backend=backend)
    for actual_tensor, expected_tensor in zip(loss_and_grads(compiled, input_ids), expected, strict=True):
        torch.testing.assert_close(actual_tensor, expected_tensor, atol=1e-5, rtol=1e-4)


# -- where it runs -----------------------------------------------------------------------------------------------------


def test_auto_takes_the_kernels_on_a_cuda_device_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    on_cpu = DepthState((torch.zeros(1, 1, 8),))
    on_cuda = DepthState((type("OnCuda", (), {"is_cuda": True})(),))
    assert AutoDepthAttention.choose(on_cpu) is TwoPhaseDepthAttention
    assert AutoDepthAttention.choose(on_cuda) is TritonDepthAttention
    monkeypatch.setattr("attnres.depth_attention.HAS_TRITON", False)
    assert AutoDepthAttention.choose(on_cuda) is TwoPhaseDepthAttention


def test_auto_equals_two_phase() -> None:
    input_ids = random_tokens()
    auto, two_phase = (make_model("cpu", name)(input_ids).logits for name in ("auto", "two_phase"))
    assert torch.equal(auto, two_phase)


def run_elsewhere(program: str, directory: Path, **environment: str) -> str:
    """In a fresh process whose Triton does not interpret."""
    environment = {**os.environ, **environment, "HF_MODULES_CACHE": str(directory / "modules")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "-P", "-c", program]
    return subprocess.run(command, check=True, cwd=directory, env=environment, stdout=subprocess.PIPE, text=True).stdout


def test_checkpoint_loads_without_triton_and_says_what_is_missing(tmp_path: Path) -> None:
    """The file with the kernels comes along, is found by the loader, and is not asked for before it is needed."""
    make_model("cpu", "two_phase").save_pretrained(tmp_path / "saved")
    program = """
import sys
import torch
from transformers import AutoModelForCausalLM

sys.modules["attnres"] = None  # any import of it fails
kwargs = dict(trust_remote_code=True, device_map="cpu")
input_ids = torch.arange(3, 8)[None]
for sys.modules["triton"] in (None, __import__("triton")):
    for name in ("two_phase", "auto", "triton"):
        model = AutoModelForCausalLM.from_pretrained("saved", depth_attention_implementation=name, **kwargs)
        try:
            model(input_ids)
            print(name, "runs")
        except ValueError as error:
            print(type(error).__name__, error)
model.save_pretrained("again")
"""
    printed = run_elsewhere(program, tmp_path).splitlines()
    assert printed[:2] == printed[3:5] == ["two_phase runs", "auto runs"]
    assert printed[2].startswith("AttnResError The depth attention implementation 'triton' needs the package triton")
    assert "pip install triton" in printed[2]
    assert printed[5].startswith("AttnResError The depth attention implementation 'triton' runs on CUDA devices")
    assert "the sources are on cpu" in printed[5]
    assert "'two_phase' or 'auto'" in printed[5]
    assert (tmp_path / "again" / "depth_attention_triton.py").is_file()


def test_loader_finds_the_file_and_does_not_ask_for_triton() -> None:
    """The loader of code on the Hub follows relative imports, and refuses files whose other imports are missing."""
    assert kernels.__file__ in get_relative_import_files(modeling_attnres.__file__)
    assert "triton" not in get_imports(depth_attention.__file__) + get_imports(kernels.__file__)


def test_kernels_compile_for_a_gpu(tmp_path: Path) -> None:
    """Triton's compiler is stricter than its interpreter, and needs no device. Registers must suffice at the shapes of
    real models, and sources must be read 16 bytes at a time."""
    program = Path(__file__).with_name("compile_kernels.py").read_text(encoding="utf-8")
    found = json.loads(run_elsewhere(program, tmp_path, TRITON_CACHE_DIR=str(tmp_path / "cache")))
    assert len(found) == 27
    for name, kernel in found.items():  # the largest merge needs a few registers more than there are
        assert kernel["spilled_bytes"] <= (256 if name.startswith("phase_two_backward_kernel") else 0), name
        assert not kernel["narrow_loads_of_values"], name
