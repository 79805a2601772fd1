"""The experiments: their text, plans, statistics and power laws; a run of each kind; the page."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytest.importorskip("trl", reason='experiments need pip install ".[train]"')
pytest.importorskip("altair", reason='experiments need pip install ".[analysis]"')
from attnres.training import TrainingError
from attnres.training.experiments import corpus, evidence, runner, scaling
from attnres.training.experiments.corpus import make_corpus
from attnres.training.experiments.evidence import Mean
from attnres.training.experiments.runner import run_study
from attnres.training.experiments.studies import ABLATION, GRID_SEED, PRESETS, SMOLLM2_ARMS, STUDIES, plan

# -- text --------------------------------------------------------------------------------------------------------------


def test_the_text_is_split_by_package_and_has_no_duplicates(tmp_path: Path) -> None:
    made = make_corpus(tmp_path, 60_000, 10_000)
    rows = {
        part: [json.loads(line) for line in getattr(made, part).read_text().splitlines()]
        for part in ("training", "validation")
    }
    packages = {part: {row["name"].split("/")[0] for row in found} for part, found in rows.items()}
    assert packages["training"] <= {*corpus.TRAINING}
    assert packages["validation"] <= {*corpus.HELD_OUT}
    assert not {*corpus.TRAINING} & {*corpus.HELD_OUT}
    texts = [corpus.normalized(row["text"]) for found in rows.values() for row in found]
    assert len(texts) == len(set(texts))
    assert sum(len(row["text"].encode()) for row in rows["training"]) >= 60_000
    again = make_corpus(tmp_path / "again", 60_000, 10_000)
    assert again.sha256 == made.sha256
    assert again.training.read_bytes() == made.training.read_bytes()


def test_copies_are_left_out(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    files = {"a": ["x = 1\n", "y = 2\n"], "b": ["x  =  1  # one\n\n", "z = 3\n"]}
    monkeypatch.setattr(corpus, "TRAINING", ("a",))
    monkeypatch.setattr(corpus, "HELD_OUT", ("b",))
    monkeypatch.setattr(
        corpus, "sources", lambda package: iter([(f"{package}/{i}", t) for i, t in enumerate(files[package])])
    )
    monkeypatch.setattr(corpus, "packages_distributions", lambda: {"a": ["torch"], "b": ["numpy"]})
    made = make_corpus(tmp_path, 6, 20)
    assert [json.loads(line)["text"] for line in made.validation.read_text().splitlines()] == files["b"]
    assert [json.loads(line)["text"] for line in made.training.read_text().splitlines()] == ["y = 2\n"]
    with pytest.raises(TrainingError, match="There are 6 bytes of training text; 7 are needed"):
        make_corpus(tmp_path, 7, 20)


# -- plans -------------------------------------------------------------------------------------------------------------


def wanted(run: Any, rate: float) -> float:
    """A loss that is least at 0.3 times a learning rate."""
    return abs(np.log(run.training["depth_learning_rate"] / (0.3 * rate)))


def test_learning_rates_are_chosen_before_the_main_runs() -> None:
    preset, losses = PRESETS["cpu"], {}
    first = plan("retrofit", preset, losses)
    assert [run.arm for run in first] == ["plain"] * len(preset.rates)
    assert all(run.seed == GRID_SEED for run in first)
    losses = {run.key: float(index != 1) for index, run in enumerate(first)}  # the second is best
    second = plan("retrofit", preset, losses)
    assert {run.training["learning_rate"] for run in second if run.arm != "plain"} == {preset.rates[1]}
    assert [run.arm for run in second if run.stage == "main"] == ["plain"] * preset.seeds["retrofit"]
    grid = [run for run in second if run.arm == "8 heads"]
    assert [run.training["depth_learning_rate"] / preset.rates[1] for run in grid] == pytest.approx(preset.grid)
    last, added = second, []
    for _ in range(3):  # an arm's best is at an end of its grid twice
        losses |= {run.key: wanted(run, preset.rates[1]) for run in last if run.stage == "grid"} | losses
        last = plan("retrofit", preset, losses)
        added.append({run.training["depth_learning_rate"] for run in last if run.key not in losses and run.seed == 999})
    assert added == [{preset.rates[1] * 0.3}, {preset.rates[1] * 0.1}, set()]
    main = [run for run in last if run.stage == "main"]
    assert [run.seed for run in main] == sorted(run.seed for run in main), "all arms advance together"
    assert {run.training["depth_learning_rate"] for run in main if run.arm != "plain"} == {preset.rates[1] * 0.3}


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("study", STUDIES)
def test_plans_are_whole_and_paired(study: str, preset: str) -> None:
    losses: dict[str, float] = {}
    for _ in range(5):  # a grid grows twice, where all losses are equal
        runs = plan(study, PRESETS[preset], losses)
        losses |= {run.key: 1.0 for run in runs}
    keys = [run.key for run in runs]
    assert len(keys) == len(set(keys))
    assert all(key.replace("-", "").replace("=", "").replace(".", "").isalnum() for key in keys)
    main = [run for run in runs if run.stage == "main"]
    arms = {run.arm for run in main}
    assert len(main) == len(arms) * PRESETS[preset].seeds[study]
    assert not {run.seed for run in main} & {run.seed for run in runs if run.stage == "grid"}
    for name in ("steps", "batch_size", "sequence_length"):
        of_size: dict[Any, set[Any]] = {}
        for run in runs:
            of_size.setdefault(run.backbone.get("hidden_size"), set()).add(run.training[name])
        assert {len(values) for values in of_size.values()} == {1}
    if study in ("retrofit", "smollm2"):
        assert len({run.training["learning_rate"] for run in main}) == 1, "the decoder's"


def test_each_arm_from_scratch_has_its_own_learning_rate() -> None:
    preset, best = PRESETS["cpu"], {"plain": 8e-3, "Block": 2e-3}  # both at an end of the first grid
    losses: dict[str, float] = {}
    for _ in range(5):
        runs = plan("ablation", preset, losses)
        losses |= {run.key: abs(np.log(run.training["learning_rate"] / best.get(run.arm, 4e-3))) for run in runs}
    grids = [run for run in runs if run.stage == "grid"]
    assert {run.seed for run in grids} == {GRID_SEED}
    assert {run.arm for run in grids} == {*ABLATION}
    tried = {arm: [run.training["learning_rate"] for run in grids if run.arm == arm] for arm in [*best, "Full"]}
    first = [2e-3, 4e-3, 8e-3]
    assert tried == {"plain": [*first, 1.6e-2], "Block": [1e-3, *first], "Full": first}
    for run in runs:
        if run.stage == "main":
            assert run.training["learning_rate"] == best.get(run.arm, 4e-3)
            assert run.training["depth_learning_rate"] == run.training["learning_rate"]


def test_larger_models_see_more_tokens() -> None:
    runs = plan("scaling", PRESETS["cpu"], {})
    steps = [run.training["steps"] for run in sorted(runs, key=lambda run: run.backbone["hidden_size"])]
    assert steps == sorted(steps)
    assert len(set(steps)) == 4


def test_the_real_model_has_the_arms_that_were_best_on_the_small_one() -> None:
    results = evidence.all_results("cpu")["retrofit"]
    losses = evidence.main_losses(results)
    gaps = {arm: evidence.difference(losses, arm).value for arm in losses if arm != "plain"}
    assert {*SMOLLM2_ARMS} == {"plain", *sorted(gaps, key=lambda arm: gaps[arm])[:3]}


def test_unknown_names_are_refused(tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="no study 'nonsense'; there are: retrofit"):
        plan("nonsense", PRESETS["cpu"], {})
    with pytest.raises(TrainingError, match="no preset 'huge'; there are: smoke"):
        run_study("ablation", "huge", output=tmp_path)
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(TrainingError, match="run.json is not what a run writes"):
        runner.results_of(tmp_path)


# -- statistics --------------------------------------------------------------------------------------------------------


def test_means_and_paired_differences() -> None:
    mean = Mean.of([1.0, 2.0, 3.0])
    assert (mean.value, mean.count) == (2.0, 3)
    assert mean.half == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t of two degrees of freedom, deviation 1
    assert Mean.of([1.5]).text(signed=True) == "+1.5000"
    assert Mean.of([]).text() == "–"
    losses = {"plain": {0: 3.0, 1: 3.5, 2: 4.0}, "sum": {0: 2.9, 1: 3.4, 5: 1.0}}
    found = evidence.difference(losses, "sum")
    assert (found.count, round(found.value, 9), round(found.half, 9)) == (2, -0.1, 0.0)


def test_a_power_law_is_found_again() -> None:
    compute = np.geomspace(0.1, 100, 8)
    law = scaling.PowerLaw.fit(compute, 1.9 * compute**-0.06)
    assert (law.scale, law.slope) == pytest.approx((1.9, 0.06))
    assert law.slope_error < 1e-9
    better = scaling.PowerLaw.fit(compute, 1.9 * (1.3 * compute) ** -0.06)
    found = scaling.advantage(law, better, 5.0)
    assert (found.factor, found.low, found.high) == pytest.approx((1.3, 1.3, 1.3), rel=1e-6)
    with pytest.raises(ValueError, match="three points"):
        scaling.PowerLaw.fit([1.0, 2.0], [1.0, 2.0])


def test_intervals_of_slopes_hold_the_truth_as_often_as_they_say() -> None:
    generator, compute = np.random.default_rng(0), np.geomspace(0.5, 5, 5)
    held = 0
    for _ in range(400):
        law = scaling.PowerLaw.fit(compute, 1.8 * compute**-0.057 * np.exp(0.003 * generator.standard_normal(5)))
        low, high = law.slope_interval()
        held += low <= 0.057 <= high
    assert 0.92 <= held / 400 <= 0.98


def test_the_method_gives_the_papers_laws() -> None:
    compute = scaling.compute(scaling.PAPER_PARAMETERS, scaling.PAPER_TOKENS)
    laws = {kind: scaling.PowerLaw.fit(compute, losses) for kind, losses in scaling.PAPER_LOSSES.items()}
    for kind, slope in scaling.PAPER_SLOPES.items():
        assert abs(laws[kind].slope - slope) <= 0.005
    found = scaling.advantage(laws["baseline"], laws["Block"], scaling.PAPER_COMPUTE)
    assert found.low < scaling.PAPER_ADVANTAGE < found.high


# -- running -----------------------------------------------------------------------------------------------------------


CORPUS: dict[str, str] = {}  # of the study that is run


def fake_result(run: Any, *_: Any) -> dict[str, Any]:
    fields = ("study", "arm", "seed", "stage", *runner.CONDITIONS)
    width = run.backbone.get("hidden_size", 0)
    loss = 3 - 0.01 * (sum(map(ord, run.arm)) % 7) + 0.1 * run.seed + run.training["depth_learning_rate"]
    magnitudes = dict(accumulated=[1.0, 2.0], gradients=[0.1, 0.2], written=[1.0, 1.0])
    return {
        **{name: getattr(run, name) for name in fields},
        "seconds": 1.0,
        "tokens": 1000,
        "parameters": 10**6 + 10_000 * width,
        "validation_loss": loss,
        "train_losses": [[share * run.training["steps"] // 10, 2 * loss - share / 10] for share in range(1, 11)],
        "steps": run.training["steps"],
        "magnitudes": magnitudes if run.magnitudes else None,
        "corpus": {"sha256": CORPUS.get("sha256"), "packages": {}},
    }


def test_a_study_goes_on_where_it_was(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    done: list[str] = []

    def run(run: Any, *arguments: Any) -> dict[str, Any]:
        if len(done) == 4:
            raise TrainingError("stopped")
        done.append(run.key)
        return fake_result(run)

    monkeypatch.setattr(runner, "_in_process", run)
    preset = PRESETS["smoke"]
    text = make_corpus(tmp_path / "text", preset.training_bytes, preset.validation_bytes)
    CORPUS["sha256"] = text.sha256
    kwargs: dict[str, Any] = dict(output=tmp_path, work=tmp_path / "text", report=lambda line: None)
    with pytest.raises(TrainingError, match="stopped"):
        run_study("retrofit", "smoke", **kwargs)
    assert len(runner.results_of(tmp_path / "retrofit-smoke")) == 4
    monkeypatch.setattr(runner, "_in_process", lambda run, *_: done.append(run.key) or fake_result(run))
    assert run_study("retrofit", "smoke", workers=2, **kwargs) == 0
    assert len(done) == len(set(done)) == 6
    assert run_study("retrofit", "smoke", **kwargs) == 0
    assert len(done) == 6
    assert run_study("scaling", "smoke", minutes=0, **kwargs) == 8
    CORPUS["sha256"] = "other"
    monkeypatch.setattr(runner, "_in_process", lambda run, *_: fake_result(run))
    run_study("ablation", "smoke", **kwargs)
    with pytest.raises(TrainingError, match="seed999.json is of another text"):
        run_study("ablation", "smoke", **kwargs)
    CORPUS["sha256"] = text.sha256
    planned = plan("scaling", preset, {})[0]
    result = fake_result(planned)
    for changed, message in (
        ({"training": {**planned.training, "steps": 3}}, "training .*'steps': 3.* and the plan has .*'steps': 1"),
        ({"residual": "mhc"}, "residual mhc, and the plan has plain"),
        ({"depth": {"num_blocks": 2}}, "depth {'num_blocks': 2}, and the plan has {}"),
        ({"backbone": {**planned.backbone, "hidden_size": 8}}, "backbone .*'hidden_size': 8.* and the plan has .*64"),
    ):  # as if the plan had changed since
        (tmp_path / "scaling-smoke" / f"{planned.key}.json").write_text(json.dumps({**result, **changed}))
        with pytest.raises(TrainingError, match=f"json has {message}"):
            run_study("scaling", "smoke", **kwargs)


@pytest.mark.parametrize(("study", "arm"), [("retrofit", "sum"), ("ablation", "Full")])
def test_a_run_in_a_process_of_its_own(study: str, arm: str, tmp_path: Path) -> None:
    preset = PRESETS["smoke"]
    losses = {run.key: 1.0 for run in plan(study, preset, {})}
    losses |= {run.key: 1.0 for run in plan(study, preset, losses)}
    chosen = next(run for run in plan(study, preset, losses) if run.arm == arm and run.stage == "main")
    text = make_corpus(tmp_path, preset.training_bytes, preset.validation_bytes)
    result = runner._in_process(chosen, text, 1)
    assert result["steps"] == 2
    assert result["corpus"]["sha256"] == text.sha256
    assert 0 < result["validation_loss"] < result["validation_loss_before"] + 1
    assert (result["magnitudes"] is not None) == (study == "ablation")
    assert result["parameters"] > 10**6


# -- the page ----------------------------------------------------------------------------------------------------------


def test_figures_and_tables_of_all_studies(tmp_path: Path) -> None:
    preset, found = PRESETS["cpu"], {}
    for study in STUDIES:
        results: dict[str, Any] = {}
        for _ in range(5):
            results = {
                run.key: fake_result(run)
                for run in plan(study, preset, {k: r["validation_loss"] for k, r in results.items()})
            }
        found[study] = results
    parts = evidence.sections("cpu", found)
    assert all("Not run yet" not in text for text in parts.values())
    assert parts["progress"].count("| 0 |") == len(STUDIES)
    row = "| sum | 3e-06 | 5 | 3.1500 ± 0.1963 | -0.0500 ± 0.0000 | 5.3500 ± 0.3926 | -0.1001 ± 0.0000 |"
    assert row in parts["retrofit"]
    drawn = evidence.figures(found)
    assert len(drawn) == 6
    for name, chart in drawn.items():
        png, _ = evidence.save(chart, tmp_path / name)
        assert png.stat().st_size > 5000


def test_the_page_is_of_the_results() -> None:
    """`python -m attnres.training.experiments report` makes it."""
    page = evidence.PAGE.read_text(encoding="utf-8")
    results = evidence.all_results("cpu")
    assert page == evidence.filled(page, evidence.sections("cpu", results))
    for name in evidence.figures(results):
        assert (evidence.FIGURES / f"{name}.svg").is_file()
        assert f"figures/{name}.svg" in page
    assert {path.stem for path in evidence.FIGURES.glob("evidence-*.svg")} == {*evidence.figures(results)}
    with pytest.raises(TrainingError, match="places for 'nothing'"):
        evidence.filled(page, {"nothing": ""})
