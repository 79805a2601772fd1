"""The experiments, declared: which runs there are, under which conditions, in which order."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from ..errors import TrainingError

ROOT = Path(__file__).parents[2]
TINY = str(ROOT / "examples" / "tiny-qwen3")
REAL = ROOT / ".cache" / "real"  # where `make real` keeps its model, too
SMOLLM2 = str(REAL / "SmolLM2-135M-Instruct")


@dataclass(frozen=True)
class Run:
    """One training.

    Attributes:
        study: name of the study.
        arm: what is compared.
        seed: of the order of the data, of new weights and of dropout. Arms of one seed see the same batches.
        stage: `"grid"` (finds the learning rate of an arm, with a seed of its own) or `"main"`.
        source: the checkpoint that goes on learning; `None` for a model from scratch.
        residual: `"attnres"`, `"plain"` or a baseline.
        depth: settings of depth attention.
        backbone: fields of the decoder of a model from scratch.
        training: fields of [`TrainingSettings`].
        magnitudes: whether output and gradient magnitudes per decoder layer are measured in the end (Fig. 5).
    """

    study: str
    arm: str
    seed: int
    stage: str = "main"
    source: str | None = None
    residual: str = "attnres"
    depth: Mapping[str, Any] = field(default_factory=dict)
    backbone: Mapping[str, Any] = field(default_factory=dict)
    training: Mapping[str, Any] = field(default_factory=dict)
    magnitudes: bool = False

    @property
    def key(self) -> str:
        """The name of its result."""
        rates = ""
        if self.stage == "grid":
            rates = f"-lr{self.training['learning_rate']:g}-{self.training['depth_learning_rate']:g}"
        return f"{self.arm}{rates}-seed{self.seed}".replace(",", "").replace(" ", "-")


@dataclass(frozen=True)
class Preset:
    """How much is run.

    Attributes:
        steps: optimizer steps of a run, by study.
        seeds: of the main runs, by study.
        batch_size: sequences in a step, by study.
        sequence_length: of all runs.
        grid: learning rates of the depth parameters of a retrofit that are tried first, as multiples of the decoder's.
        rates: learning rates of the plain decoder that are tried before a retrofit.
        scratch_rates: learning rates of each arm that are tried first from scratch.
        training_bytes, validation_bytes: of text.
        arms: the arms of the retrofits and of the ablation that are run; all of a study that is not named.
    """

    steps: Mapping[str, int]
    seeds: Mapping[str, int]
    batch_size: Mapping[str, int]
    sequence_length: int = 256
    grid: tuple[float, ...] = (1.0, 3.0, 10.0)
    rates: tuple[float, ...] = (3e-5, 1e-4, 3e-4, 1e-3)
    scratch_rates: tuple[float, ...] = (2e-3, 4e-3, 8e-3)
    training_bytes: int = 8_000_000
    validation_bytes: int = 250_000
    arms: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


STUDIES = ("retrofit", "smollm2", "ablation", "scaling")

PRESETS = {
    "smoke": Preset(
        steps=dict(retrofit=2, smollm2=2, ablation=2, scaling=2),
        seeds=dict(retrofit=2, smollm2=1, ablation=2, scaling=1),
        batch_size=dict.fromkeys(STUDIES, 2),
        sequence_length=32,
        grid=(1.0,),
        rates=(3e-4,),
        scratch_rates=(4e-3,),
        training_bytes=40_000,
        validation_bytes=3_000,
        arms=dict(retrofit=("plain", "sum"), ablation=("plain", "Full")),
    ),
    "cpu": Preset(
        # From scratch, many small steps learn far more from as many tokens than few large ones.
        steps=dict(retrofit=300, smollm2=100, ablation=1200, scaling=1200),
        seeds=dict(retrofit=5, smollm2=3, ablation=3, scaling=1),
        batch_size=dict(retrofit=8, smollm2=8, ablation=2, scaling=2),
    ),
    "gpu": Preset(
        steps=dict(retrofit=1000, smollm2=1000, ablation=2000, scaling=2000),
        seeds=dict(retrofit=5, smollm2=5, ablation=3, scaling=2),
        batch_size=dict.fromkeys(STUDIES, 32),
        sequence_length=512,
        training_bytes=40_000_000,
    ),
}

# (a) Arms of the retrofit: what a checkpoint is given before it goes on learning.
RETROFIT: dict[str, dict[str, Any]] = {
    "plain": dict(residual="plain"),
    "sum": dict(depth=dict(num_blocks=8, mix="sum")),
    "mean": dict(depth=dict(num_blocks=8, mix="mean")),
    "4 heads": dict(depth=dict(num_blocks=8, mix="sum", num_heads=4)),
    "8 heads": dict(depth=dict(num_blocks=8, mix="sum", num_heads=8)),
    "16 heads": dict(depth=dict(num_blocks=8, mix="sum", num_heads=16)),
    "gated": dict(depth=dict(num_blocks=8, mix="gated")),
    "Full": dict(depth=dict(block_size=1, mix="sum")),
}

# (a) on a real model: plain, and the arms that were best on the small one on held-out packages.
SMOLLM2_ARMS = ("plain", "Full", "8 heads", "4 heads")
SMOLLM2_RATE = 1e-4  # of the decoder, in all arms

# (b) Table 4 in small: all at equal data, from the same initial weights.
ABLATION: dict[str, dict[str, Any]] = {
    "plain": dict(residual="plain"),
    "DenseFormer": dict(residual="dense_former"),
    "hyper-connections": dict(residual="hyper_connections"),
    "mHC": dict(residual="mhc"),
    "Full": dict(depth=dict(block_size=1)),
    "Full, input-dependent query": dict(depth=dict(block_size=1, query="input")),
    "Full, static weights": dict(depth=dict(block_size=1, query="static")),
    "Full, sigmoid": dict(depth=dict(block_size=1, weighting="sigmoid")),
    "Full, no key norm": dict(depth=dict(block_size=1, key_norm=False)),
    "Full, window of 8": dict(depth=dict(block_size=1, window=8)),
    "Block": dict(depth=dict(block_size=4)),
    "Block, 16 heads": dict(depth=dict(block_size=4, num_heads=16)),
    "Block, no key norm": dict(depth=dict(block_size=4, key_norm=False)),
    "Block, normalized values": dict(depth=dict(block_size=4, values="normalized")),
    "Block, S = 2": dict(depth=dict(block_size=2)),
    "Block, S = 8": dict(depth=dict(block_size=8)),
    "Block, S = 16": dict(depth=dict(block_size=16)),
}
# (c) The sweep over block sizes is of arms of (b): sublayers per block, of the 16 that SMALL has.
BLOCK_SIZES = {1: "Full", 2: "Block, S = 2", 4: "Block", 8: "Block, S = 8", 16: "Block, S = 16"}
SMALL: dict[str, Any] = dict(
    model_type="qwen3",
    hidden_size=128,
    intermediate_size=320,
    num_hidden_layers=8,
    num_attention_heads=4,
    num_key_value_heads=2,
    head_dim=32,
    max_position_embeddings=512,
    tie_word_embeddings=True,
)
# (e) Width and decoder layers of each size, and the share of the preset's steps: larger models see more tokens, as in
# the paper's Table 2.
SIZES = ((64, 4, 0.4), (96, 6, 0.6), (128, 8, 0.8), (192, 10, 1.0))
GRID_SEED = 999  # no main run has it
SMOLLM2_GRID_SEED = 0  # the same, of SmolLM2
# An arm whose best depth learning rate is at an end of its grid gets the next of these multiples, too.
MULTIPLES = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)
SCRATCH_RATES = (5e-4, 1e-3, 2e-3, 4e-3, 8e-3, 1.6e-2, 3.2e-2)  # the same, of all parameters from scratch


def plan(study: str, preset: Preset, losses: Mapping[str, float]) -> list[Run]:
    """The runs of a study, in the order in which they are done: seed by seed, so that all arms advance together.

    Learning rates come from runs of their own, in grids that grow until the best is at none of their ends. In a
    retrofit the decoder's is the best of the plain arm, and that of the depth parameters the best of each arm. From
    scratch all parameters have one, the best of each arm. Points of the scaling study are the best of their grid. Runs
    whose learning rates are not known yet are left out, so plans grow with the results.

    Args:
        study (`str`): one of `STUDIES`.
        preset ([`Preset`]): how much is run.
        losses: validation losses of the runs that are finished, by their key.

    Raises:
        TrainingError: there is no such study.
    """
    plans: dict[str, Callable[[Preset, Mapping[str, float]], list[Run]]] = {
        "retrofit": _retrofit,
        "smollm2": _smollm2,
        "ablation": _ablation,
        "scaling": _scaling,
    }
    if study not in plans:
        raise TrainingError(f"There is no study {study!r}; there are: {', '.join(STUDIES)}.")
    return plans[study](preset, losses)


def _training(study: str, preset: Preset, rate: float, depth_rate: float) -> dict[str, Any]:
    return dict(
        steps=preset.steps[study],
        batch_size=preset.batch_size[study],
        sequence_length=preset.sequence_length,
        learning_rate=rate,
        depth_learning_rate=depth_rate,
    )


def _from_scratch(study: str, preset: Preset, rate: float) -> dict[str, Any]:
    return _training(study, preset, rate, rate) | {"weight_decay": 0.1}


def _best(runs: Sequence[Run], losses: Mapping[str, float]) -> Run | None:
    """The run of the lowest loss, once all are finished."""
    return min(runs, key=lambda r: losses[r.key]) if all(r.key in losses for r in runs) else None


def _widened(
    run: Callable[[float], Run], first: Sequence[float], all_values: Sequence[float], losses: Mapping[str, float]
) -> list[Run]:
    """The grid of an arm, by what is known: its best is at no end, or at one that is still to be run.

    Args:
        run: makes the run of a value.
        first: the values that are tried first; if there is one alone, the grid does not grow.
        all_values: those that the grid may grow to, in ascending order.
        losses: of the finished runs, by their key.
    """
    low, high = all_values.index(first[0]), all_values.index(first[-1])
    while True:
        runs = [run(value) for value in all_values[low : high + 1]]
        chosen = _best(runs, losses)
        if chosen is runs[0] and low > 0 and len(first) > 1:
            low -= 1
        elif chosen is runs[-1] and high < len(all_values) - 1 and len(first) > 1:
            high += 1
        else:
            return runs


def _ablation(preset: Preset, losses: Mapping[str, float]) -> list[Run]:
    def run(arm: str, seed: int, rate: float) -> Run:
        stage = "grid" if seed == GRID_SEED else "main"
        magnitudes = stage == "main" and arm in ("plain", "Full", "Block")
        training = _from_scratch("ablation", preset, rate)
        return Run(
            "ablation", arm, seed, stage, backbone=SMALL, training=training, magnitudes=magnitudes, **ABLATION[arm]
        )

    arms = preset.arms.get("ablation", tuple(ABLATION))
    grids = {arm: _widened(partial(run, arm, GRID_SEED), preset.scratch_rates, SCRATCH_RATES, losses) for arm in arms}
    found = {arm: chosen for arm, runs in grids.items() if (chosen := _best(runs, losses)) is not None}
    return [r for runs in grids.values() for r in runs] + [
        run(arm, seed, found[arm].training["learning_rate"])
        for seed in range(preset.seeds["ablation"])
        for arm in arms
        if arm in found
    ]


KINDS: dict[str, dict[str, Any]] = {"plain": dict(residual="plain"), "Block": dict(depth=dict(num_blocks=8))}


def _scaling(preset: Preset, losses: Mapping[str, float]) -> list[Run]:
    def run(kind: str, seed: int, width: int, layers: int, share: float, rate: float) -> Run:
        heads = width // SMALL["head_dim"]
        sizes = dict(hidden_size=width, intermediate_size=5 * width // 2, num_hidden_layers=layers)
        backbone = SMALL | sizes | dict(num_attention_heads=heads, num_key_value_heads=heads)
        training = _from_scratch("scaling", preset, rate)
        training["steps"] = round(share * training["steps"])
        arm = f"{kind} {width}x{layers}"
        return Run("scaling", arm, seed, "grid", backbone=backbone, training=training, **KINDS[kind])

    return [
        of_rate
        for seed in range(preset.seeds["scaling"])
        for size in SIZES
        for kind in KINDS
        for of_rate in _widened(partial(run, kind, seed, *size), preset.scratch_rates, SCRATCH_RATES, losses)
    ]


def _retrofits(
    study: str,
    source: str,
    arms: Sequence[str],
    *,
    rates: Sequence[float],
    multiples: Sequence[float],
    grid_seed: int,
    seeds: Sequence[int],
    preset: Preset,
    losses: Mapping[str, float],
    more: Mapping[str, Any] | None = None,
) -> list[Run]:
    """Grids of the plain arm and of the others, then the main runs of the arms whose learning rates are found.

    Args:
        study, source: of all runs.
        arms: the names of those that are run, of `RETROFIT`.
        rates: learning rates of the decoder that the plain arm tries; all arms then have its best.
        multiples: learning rates of the depth parameters that are tried first, as multiples of the decoder's.
        grid_seed, seeds: of the grids, and of the main runs.
        preset, losses: see [`plan`].
        more: further fields of [`TrainingSettings`], of all runs.
    """

    def run(stage: str, arm: str, seed: int, rate: float, depth_rate: float) -> Run:
        training = _training(study, preset, rate, depth_rate) | dict(more or {})
        return Run(study, arm, seed, stage, source, training=training, **RETROFIT[arm])

    grid = {"plain": [run("grid", "plain", grid_seed, rate, rate) for rate in rates]}
    if (plain := _best(grid["plain"], losses)) is None:
        return grid["plain"]
    rate = plain.training["learning_rate"]

    def of_multiple(arm: str, multiple: float) -> Run:
        return run("grid", arm, grid_seed, rate, rate * multiple)

    grid |= {arm: _widened(partial(of_multiple, arm), multiples, MULTIPLES, losses) for arm in arms if arm != "plain"}
    found = {arm: chosen for arm, runs in grid.items() if (chosen := _best(runs, losses)) is not None}
    return [r for runs in grid.values() for r in runs] + [
        run("main", arm, seed, rate, found[arm].training["depth_learning_rate"])
        for seed in seeds
        for arm in arms
        if arm in found
    ]


def _retrofit(preset: Preset, losses: Mapping[str, float]) -> list[Run]:
    return _retrofits(
        "retrofit",
        TINY,
        preset.arms.get("retrofit", tuple(RETROFIT)),
        rates=preset.rates,
        multiples=preset.grid,
        grid_seed=GRID_SEED,
        seeds=range(preset.seeds["retrofit"]),
        preset=preset,
        losses=losses,
    )


def _smollm2(preset: Preset, losses: Mapping[str, float]) -> list[Run]:
    """A run takes long, so grids begin with two values. It is in bfloat16 on CPUs too, which halves its time."""
    return _retrofits(
        "smollm2",
        SMOLLM2,
        SMOLLM2_ARMS,
        rates=(SMOLLM2_RATE,),
        multiples=preset.grid[:2],
        grid_seed=SMOLLM2_GRID_SEED,
        seeds=range(1, 1 + preset.seeds["smollm2"]),
        preset=preset,
        losses=losses,
        more={"precision": "bf16"},
    )
