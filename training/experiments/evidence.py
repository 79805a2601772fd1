"""What came out of the experiments: comparisons with intervals, tables for docs/evidence.md, and figures."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import altair as alt
import numpy as np
import pandas as pd
from scipy import stats

from ...analysis.figures import LIGHT_COLORS, save
from ..errors import TrainingError
from . import scaling
from .runner import RESULTS, preset_named, results_of
from .studies import ABLATION, BLOCK_SIZES, KINDS, RETROFIT, SIZES, SMOLLM2_ARMS, STUDIES, plan

PAGE = Path(__file__).parents[2] / "docs" / "evidence.md"
FIGURES = PAGE.parent / "figures"
BASELINE = "plain"
WIDTH = 340  # of a figure, in pixels
PAPER_LOSSES = {  # Table 4
    "plain": 1.766,
    "DenseFormer": 1.767,
    "mHC": 1.747,
    "Full": 1.737,
    "Full, input-dependent query": 1.731,
    "Full, static weights": 1.749,
    "Full, sigmoid": 1.741,
    "Full, no key norm": 1.743,
    "Full, window of 8": 1.764,
    "Block": 1.746,
    "Block, 16 heads": 1.752,
    "Block, no key norm": 1.750,
}

Results = Mapping[str, Mapping[str, Any]]


@dataclass(frozen=True)
class Mean:
    """A mean over seeds with its 95 % interval by Student's t.

    Attributes:
        value: the mean; NaN without values.
        half: half the width of the interval; NaN for fewer than two values.
        count: how many values there are.
    """

    value: float
    half: float
    count: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Mean:
        array = np.asarray(values, float)
        if not len(array):
            return cls(np.nan, np.nan, 0)
        if len(array) == 1:
            return cls(float(array[0]), np.nan, 1)
        half = array.std(ddof=1) / np.sqrt(len(array)) * stats.t.ppf(0.975, len(array) - 1)
        return cls(float(array.mean()), float(half), len(array))

    def text(self, signed: bool = False) -> str:
        """`+0.0123 ± 0.0045`, or without an interval where one value has none."""
        if not self.count:
            return "–"
        number = f"{self.value:+.4f}" if signed else f"{self.value:.4f}"
        return number if np.isnan(self.half) else f"{number} ± {self.half:.4f}"


def training_loss(result: Mapping[str, Any]) -> float:
    """The mean loss of the batches of the last fifth of a run's steps, in nats per token.

    Arms of one seed meet the same batches. In the preset `cpu` no run sees more tokens than its text has, so these are
    losses on new text of the packages that are trained on. A preset of more tokens than text repeats what it has seen.
    """
    return float(np.mean([loss for step, loss in result["train_losses"] if step > 0.8 * result["steps"]]))


def validation_loss(result: Mapping[str, Any]) -> float:
    """The loss after the last step on the packages that were held out, in nats per token."""
    return float(result["validation_loss"])


MEASURES: dict[str, Callable[[Mapping[str, Any]], float]] = {
    "held-out packages": validation_loss,
    "training packages": training_loss,
}


def main_losses(
    results: Results, measure: Callable[[Mapping[str, Any]], float] = validation_loss
) -> dict[str, dict[int, float]]:
    """Losses of the main runs, by arm and seed."""
    found: dict[str, dict[int, float]] = {}
    for result in results.values():
        if result["stage"] == "main":
            found.setdefault(result["arm"], {})[result["seed"]] = measure(result)
    return found


def difference(losses: Mapping[str, Mapping[int, float]], arm: str, baseline: str = BASELINE) -> Mean:
    """The mean over seeds of an arm's loss minus the baseline's of the same seed: same batches, same first weights."""
    of_arm, of_baseline = losses.get(arm, {}), losses.get(baseline, {})
    return Mean.of([of_arm[seed] - of_baseline[seed] for seed in sorted(of_arm.keys() & of_baseline.keys())])


# -- tables ------------------------------------------------------------------------------------------------------------


def table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table in Markdown; all columns but the first are aligned right."""
    if not rows:
        return "Not run yet."
    lines = [header, ["---", *["--:"] * (len(header) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _comparisons(results: Results, arm: str, baseline: str = BASELINE) -> list[str]:
    """Cells of an arm: by each measure, its loss and the difference from the baseline."""
    cells = []
    for measure in MEASURES.values():
        losses = main_losses(results, measure)
        cells.append(Mean.of(list(losses[arm].values())).text())
        cells.append("" if arm == baseline else difference(losses, arm, baseline).text(signed=True))
    return cells


def _comparison_header(baseline: str = BASELINE) -> list[str]:
    return [cell for measure in MEASURES for cell in (measure, f"minus {baseline}")]


def retrofit_table(results: Results) -> str:
    losses = main_losses(results)
    rates = {r["arm"]: r["training"] for r in results.values() if r["stage"] == "main"}
    rows = []
    for arm in RETROFIT:
        if arm in losses:
            rate = "" if arm == BASELINE else f"{rates[arm]['depth_learning_rate']:g}"
            rows.append([arm, rate, str(len(losses[arm])), *_comparisons(results, arm)])
    return table(["arm", "depth learning rate", "seeds", *_comparison_header()], rows)


def grid_table(results: Results, arms: Iterable[str]) -> str:
    """The losses of the grids, in a retrofit by the learning rate of the depth parameters."""
    rows = []
    for arm in arms:
        of_arm = [r for r in results.values() if r["stage"] == "grid" and r["arm"] == arm]
        name = "learning_rate" if arm == BASELINE else "depth_learning_rate"
        of_arm.sort(key=lambda result: result["training"][name])
        if of_arm:
            rows.append(
                [arm]
                + [
                    ", ".join(f"{result['training'][name]:g}: {measure(result):.4f}" for result in of_arm)
                    for measure in MEASURES.values()
                ]
            )
    return table(["arm", *(f"{measure}, by learning rate" for measure in MEASURES)], rows)


def ablation_table(results: Results) -> str:
    losses = main_losses(results)
    of_arm = {r["arm"]: r for r in results.values() if r["stage"] == "main"}
    rows = []
    for arm in ABLATION:
        if arm in losses:
            paper = PAPER_LOSSES.get(arm)
            shown = "–" if paper is None else f"{paper:.3f} ({paper - PAPER_LOSSES[BASELINE]:+.3f})"
            setup = [f"{of_arm[arm]['parameters']:,}", f"{of_arm[arm]['training']['learning_rate']:g}"]
            rows.append([arm, *setup, str(len(losses[arm])), *_comparisons(results, arm), shown])
    setup = ["residuals", "parameters", "learning rate", "seeds"]
    return table([*setup, *_comparison_header(), "paper (minus baseline)"], rows)


def blocks_table(results: Results) -> str:
    losses = main_losses(results)
    rows = [
        [f"S = {size}", str(16 // size), str(len(losses[arm])), *_comparisons(results, arm, BLOCK_SIZES[1])]
        for size, arm in BLOCK_SIZES.items()
        if arm in losses
    ]
    return table(["block size", "blocks", "seeds", *_comparison_header("S = 1")], rows)


def scaling_points(
    results: Results, measure: Callable[[Mapping[str, Any]], float] = validation_loss
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Compute (PFLOP/s-days) and loss of each size and seed, at the learning rate of the lowest validation loss.

    Parameters are without the embedding, as in C = 6 N D.
    """
    best: dict[tuple[str, int], Mapping[str, Any]] = {}
    for result in results.values():
        key = (result["arm"], result["seed"])
        if key not in best or validation_loss(result) < validation_loss(best[key]):
            best[key] = result
    found: dict[str, tuple[list[float], list[float]]] = {}
    for result in best.values():
        xs, ys = found.setdefault(result["arm"].partition(" ")[0], ([], []))
        parameters = result["parameters"] - result["backbone"]["hidden_size"] * 4096
        xs.append(float(scaling.compute([parameters], [result["tokens"]])[0]))
        ys.append(measure(result))
    return {kind: (np.array(xs), np.array(ys)) for kind, (xs, ys) in found.items()}


def laws_table(points: Mapping[str, tuple[Any, Any]], baseline: str, compute: float | None) -> str:
    """The laws of several kinds, and the advantage of each over a baseline at a compute (by default the largest)."""
    laws = {kind: scaling.PowerLaw.fit(*values) for kind, values in points.items() if len(values[0]) >= 3}
    if compute is None:
        compute = max(float(max(values[0])) for values in points.values())
    rows = []
    for kind, law in laws.items():
        low, high = law.slope_interval()
        gain = "" if kind == baseline or baseline not in laws else _advantage(laws[baseline], law, compute)
        rows.append([kind, str(law.num_points), f"{law.scale:.3f}", f"{law.slope:.4f} ({low:.4f} to {high:.4f})", gain])
    return table(["", "points", "A", "slope b (95 %)", f"compute advantage at {compute:.3g} PFLOP/s-days (95 %)"], rows)


def _advantage(baseline: scaling.PowerLaw, law: scaling.PowerLaw, compute: float) -> str:
    found = scaling.advantage(baseline, law, compute)
    return f"{found.factor:.2f} ({found.low:.2f} to {found.high:.2f})"


def scaling_table(results: Results) -> str:
    """The laws by each measure."""
    parts = []
    for name, measure in MEASURES.items():
        parts.append(f"Loss on {name}:\n\n{laws_table(scaling_points(results, measure), BASELINE, None)}")
    return "\n\n".join(parts)


def paper_laws_table() -> str:
    compute = scaling.compute(scaling.PAPER_PARAMETERS, scaling.PAPER_TOKENS)
    points = {kind: (compute, np.array(losses)) for kind, losses in scaling.PAPER_LOSSES.items()}
    return laws_table(points, "baseline", scaling.PAPER_COMPUTE)


def progress_table(results: Mapping[str, Results], preset: str) -> str:
    """How much of each study is done."""
    rows = []
    for study in STUDIES:
        found = results.get(study, {})
        losses = {key: result["validation_loss"] for key, result in found.items()}
        planned = plan(study, preset_named(preset), losses)
        seconds = sum(result["seconds"] for result in found.values())
        rows.append(
            [study, str(len(found)), str(sum(run.key not in losses for run in planned)), f"{seconds / 3600:.1f}"]
        )
    return table(["study", "runs done", "runs missing, as far as they are known", "hours of training"], rows)


# -- figures -----------------------------------------------------------------------------------------------------------


def differences_figure(results: Results, arms: Sequence[str], title: str) -> Any:
    """Paired differences from the plain arm by each measure, with their intervals, and every seed as a point."""
    panels: list[Any] = []
    for name, measure in MEASURES.items():
        losses = main_losses(results, measure)
        rows, points = [], []
        for arm in arms:
            if arm == BASELINE or not (mean := difference(losses, arm)).count:
                continue
            half = 0.0 if np.isnan(mean.half) else mean.half
            rows.append({"arm": arm, "mean": mean.value, "low": mean.value - half, "high": mean.value + half})
            points += [
                {"arm": arm, "difference": losses[arm][seed] - losses[BASELINE][seed]}
                for seed in losses[arm].keys() & losses[BASELINE].keys()
            ]
        order = [row["arm"] for row in rows]
        y = alt.Y("arm:N", sort=order, title=None)
        if panels:
            y = y.axis(None)  # both panels have the same arms
        base = alt.Chart(pd.DataFrame(rows), width=WIDTH * 2 // 3, height=22 * len(rows), title=name)
        zero = alt.Chart(pd.DataFrame({"x": [0.0]})).mark_rule(color="#6b7280", strokeDash=[5, 3]).encode(x="x:Q")
        x = alt.X("mean:Q", title="loss minus plain's").scale(zero=False).axis(tickCount=5, labelFlush=False)
        panels.append(
            zero
            + base.mark_rule(strokeWidth=2, color=LIGHT_COLORS[0]).encode(x="low:Q", x2="high:Q", y=y)
            + base.mark_point(filled=True, size=70, opacity=1, color=LIGHT_COLORS[0]).encode(x=x, y=y)
            + alt.Chart(pd.DataFrame(points))
            .mark_tick(color=LIGHT_COLORS[1], thickness=2, size=9)
            .encode(x="difference:Q", y=y)
        )
    subtitle = "same batches; negative is better; dot: mean, line: 95 % interval, ticks: seeds"
    return alt.hconcat(*panels).properties(title=alt.TitleParams(title, subtitle=subtitle))


def blocks_figure(results: Results) -> Any:
    """Loss against the block size by each measure, with intervals."""
    panels: list[Any] = []
    for name, measure in MEASURES.items():
        losses, rows, points = main_losses(results, measure), [], []
        for size, arm in BLOCK_SIZES.items():
            if (mean := Mean.of(list(losses.get(arm, {}).values()))).count:
                half = 0.0 if np.isnan(mean.half) else mean.half
                rows.append({"S": size, "loss": mean.value, "low": mean.value - half, "high": mean.value + half})
                points += [{"S": size, "loss": loss} for loss in losses[arm].values()]
        base = alt.Chart(pd.DataFrame(rows), width=WIDTH * 2 // 3, height=190, title=name)
        x = alt.X("S:Q", title="S, sublayers per block (of 16)").scale(type="log", base=2, nice=False, padding=14)
        x = x.axis(values=list(BLOCK_SIZES))
        y = alt.Y("loss:Q", title="loss").scale(zero=False)
        panels.append(
            base.mark_rule(strokeWidth=2, color=LIGHT_COLORS[0]).encode(x=x, y="low:Q", y2="high:Q")
            + base.mark_line(point=True).encode(x=x, y=y)
            + alt.Chart(pd.DataFrame(points))
            .mark_tick(color=LIGHT_COLORS[1], thickness=2, size=9, orient="horizontal")
            .encode(x=x, y=y)
        )
    subtitle = "dot: mean, line: 95 % interval over seeds, ticks: seeds"
    return alt.hconcat(*panels).properties(title=alt.TitleParams("Block size", subtitle=subtitle))


def magnitudes_figure(results: Results) -> Any:
    """Fig. 5 in small: magnitudes of what accumulates and of its gradient per decoder layer, mean over seeds."""
    rows = [
        {"arm": result["arm"], "layer": layer, "what": what, "value": value}
        for result in results.values()
        if result.get("magnitudes")
        for what, field in (("output", "accumulated"), ("gradient", "gradients"))
        for layer, value in enumerate(result["magnitudes"][field])
    ]
    frame = pd.DataFrame(rows)
    panels: list[Any] = []
    for what, title in (("output", "root mean square of outputs"), ("gradient", "norm of the gradient")):
        panels.append(
            alt.Chart(frame[frame["what"] == what], width=WIDTH // 2, height=190)
            .mark_line(point=True)
            .encode(
                x=alt.X("layer:O", title="decoder layer").axis(labelAngle=0),
                y=alt.Y("mean(value):Q", title=title).scale(type="log"),
                color=alt.Color("arm:N", title=None, sort=[BASELINE]),
            )
        )
    return alt.hconcat(*panels).properties(title="Magnitudes over depth, as in Fig. 5")


def scaling_figure(results: Results, title: str) -> Any:
    """Loss against compute by each measure, with the fitted laws."""
    panels: list[Any] = []
    for name, measure in MEASURES.items():
        dots, lines = [], []
        for kind, (compute, losses) in scaling_points(results, measure).items():
            dots += [{"kind": kind, "compute": float(c), "loss": float(loss)} for c, loss in zip(compute, losses)]
            if len(compute) >= 3:
                law = scaling.PowerLaw.fit(compute, losses)
                for c in np.geomspace(min(compute), max(compute), 30):
                    lines.append({"kind": kind, "compute": float(c), "loss": law.loss(float(c))})
        x = alt.X("compute:Q", title="compute, PFLOP/s-days (C = 6 N D)").scale(type="log", nice=False, padding=14)
        x = x.axis(format=".0e", tickCount=3)
        y = alt.Y("loss:Q", title="loss").scale(type="log", nice=False, padding=14).axis(format=".1f", tickCount=5)
        color = alt.Color("kind:N", title=None)
        panels.append(
            alt.Chart(pd.DataFrame(lines), width=WIDTH * 2 // 3, height=220, title=name)
            .mark_line()
            .encode(x=x, y=y, color=color)
            + alt.Chart(pd.DataFrame(dots)).mark_point(filled=True, size=50, opacity=1).encode(x=x, y=y, color=color)
        )
    return alt.hconcat(*panels).properties(title=title)


# -- the page ----------------------------------------------------------------------------------------------------------


def sections(preset: str, results: Mapping[str, Results]) -> dict[str, str]:
    """What stands between the markers of the page, by their names."""
    makers: dict[str, tuple[str, Callable[[Results], str]]] = {
        "retrofit": ("retrofit", retrofit_table),
        "grid": ("retrofit", lambda found: grid_table(found, RETROFIT)),
        "scratch-grid": ("ablation", lambda found: grid_table(found, ABLATION)),
        "smollm2-grid": ("smollm2", lambda found: grid_table(found, SMOLLM2_ARMS)),
        "smollm2": ("smollm2", retrofit_table),
        "ablation": ("ablation", ablation_table),
        "blocks": ("ablation", blocks_table),
        "scaling": ("scaling", scaling_table),
    }
    found = {
        name: make(results[study]) if results.get(study) else "Not run yet." for name, (study, make) in makers.items()
    }
    return found | {"paper": paper_laws_table(), "progress": progress_table(results, preset)}


def figures(results: Mapping[str, Results]) -> dict[str, Any]:
    """The figures that there are results for, by the name of their file."""
    found: dict[str, Any] = {}
    losses = {study: main_losses(results.get(study, {})) for study in STUDIES}
    if any(difference(losses["retrofit"], arm).count for arm in RETROFIT if arm != BASELINE):
        found["evidence-retrofit"] = differences_figure(results["retrofit"], list(RETROFIT), "Retrofits of tiny-qwen3")
    if any(difference(losses["smollm2"], arm).count for arm in SMOLLM2_ARMS if arm != BASELINE):
        found["evidence-smollm2"] = differences_figure(results["smollm2"], list(SMOLLM2_ARMS), "Retrofits of SmolLM2")
    if any(difference(losses["ablation"], arm).count for arm in ABLATION if arm != BASELINE):
        found["evidence-ablation"] = differences_figure(results["ablation"], list(ABLATION), "From scratch")
    if len(losses["ablation"].keys() & BLOCK_SIZES.values()) > 1:
        found["evidence-blocks"] = blocks_figure(results["ablation"])
    if any(result.get("magnitudes") for result in results.get("ablation", {}).values()):
        found["evidence-magnitudes"] = magnitudes_figure(results["ablation"])
    if len({result["arm"] for result in results.get("scaling", {}).values()}) == len(SIZES) * len(KINDS):
        found["evidence-scaling"] = scaling_figure(results["scaling"], "Loss against compute")
    return found


def all_results(preset: str, directory: Path = RESULTS) -> dict[str, Results]:
    """The results of all studies of a preset."""
    return {study: results_of(directory / f"{study}-{preset}") for study in STUDIES}


def filled(page: str, parts: Mapping[str, str]) -> str:
    """The page with what stands between its markers made anew.

    Raises:
        TrainingError: a marker is missing.
    """
    for name, text in parts.items():
        pattern = rf"(<!-- {name}: start -->\n).*?(<!-- {name}: end -->)"
        between = text.replace("\\", r"\\")
        page, count = re.subn(pattern, rf"\g<1>{between}\n\g<2>", page, flags=re.DOTALL)
        if count != 1:
            raise TrainingError(f"{PAGE} has {count} places for {name!r}; one pair of markers was expected.")
    return page


def write(preset: str = "cpu", directory: Path = RESULTS) -> list[Path]:
    """Makes the tables of docs/evidence.md and its figures anew.

    Returns:
        `list[Path]`: what was written.
    """
    results = all_results(preset, directory)
    PAGE.write_text(filled(PAGE.read_text(encoding="utf-8"), sections(preset, results)), encoding="utf-8")
    written = [PAGE]
    for name, chart in figures(results).items():
        png, svg = save(chart, FIGURES / name)
        png.unlink()  # the page shows the SVG
        written.append(svg)
    return written
