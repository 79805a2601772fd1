"""The report of an evaluation: one table and one figure, as JSON, Markdown and a page that needs no other file."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import jinja2
import matplotlib
from markupsafe import Markup
from matplotlib.figure import Figure
from rich import box
from rich.markup import escape
from rich.table import Table

from ..model_cards.scores import SHARES, score_text
from .comparison import Row

WIDE = ("Metric", "Shots", "Paper: baseline", "Paper: AttnRes")  # columns that do not fit into a terminal
CONFIDENCE = 1.96  # a 95 % interval is this many standard errors to each side
BLUE, GREY = "#2057a8", "#8a8f98"
NOTES = (
    "Scores and differences in percent, ± one standard error. p: two-sided paired test over the same questions, "
    "McNemar's exact one where answers are right or wrong. Paper: Kimi Linear 48B, arXiv 2603.15031, under the "
    "paper's own protocol."
)
LIMITED = (
    "Rows marked LIMITED ask fewer questions than the benchmark has, or, as sample_*, questions of our own with short "
    "answers: they show that all works, and are no scores of the benchmark."
)


@dataclass(frozen=True)
class Missing:
    """A task that was not run, why, and the command that mends it."""

    task: str
    problem: str
    remedy: str

    @property
    def line(self) -> str:
        """All of it in one line."""
        return f"{self.task}: {self.problem}" + (f". To mend it: {self.remedy}" if self.remedy else "")


@dataclass(frozen=True)
class Report:
    """What an evaluation found.

    Attributes:
        model, baseline: what was evaluated, and what it is compared with.
        rows: the scores.
        missing: tasks that could not be run.
        settings, versions, hardware: under which conditions.
        seconds: how long it took.
        date: when it ended, UTC, ISO 8601.
    """

    model: str
    baseline: str | None
    rows: list[Row]
    missing: list[Missing]
    settings: dict[str, Any]
    versions: dict[str, str]
    hardware: dict[str, Any]
    seconds: float
    date: str

    def save(self, directory: Path) -> None:
        """Writes `report.json`, `report.md`, `report.html` and, if there is a baseline, `differences.svg`."""
        figure = self.figure() if self.baseline else None
        files = {
            "report.json": json.dumps(asdict(self), indent=2, ensure_ascii=False) + "\n",
            "report.md": _render("report.md.j2", self, figure, str),
            "report.html": _render("report.html.j2", self, figure, Markup),
        } | ({"differences.svg": figure} if figure else {})
        for name, text in files.items():
            (directory / name).write_text(text, encoding="utf-8")

    def table(self) -> list[tuple[str, ...]]:
        """The table as text: the header, then one line for each row."""
        shown = [(header, cell) for header, cell, needs in COLUMNS if needs(self)]
        header = tuple(header for header, _ in shown)
        return [header, *(tuple(cell(row) for _, cell in shown) for row in self.rows)]

    def terminal_table(self) -> Table:
        """The table for a terminal, where there is no room for all of it."""
        header, *lines = self.table()
        shown = [number for number, name in enumerate(header) if name not in WIDE]
        limited = "⚠ LIMITED: these are no scores of the benchmarks." if any(row.limited for row in self.rows) else None
        table = Table(
            title=" against ".join(escape(Path(name).name) for name in (self.model, self.baseline) if name),
            caption=limited,
            box=box.SIMPLE_HEAD,
        )
        for number in shown:
            name = header[number].replace(": ", ":\n")
            table.add_column(name, justify="right" if number else "left", no_wrap=number > 0)
        for row, line in zip(self.rows, lines, strict=True):
            cells = [escape(("⚠ " if row.limited else "") + row.name), *(escape(line[number]) for number in shown[1:])]
            table.add_row(*cells, style="yellow" if row.limited else None)
        return table

    def figure(self) -> str:
        """The differences with their 95 % intervals, and the paper's, as SVG."""
        rows = [row for row in self.rows if row.difference is not None and row.metric in SHARES]
        with matplotlib.rc_context({"svg.hashsalt": "attnres", "font.size": 10}):
            figure = Figure(figsize=(8.5, 1.1 + 0.36 * len(rows)), layout="constrained")
            axes = figure.subplots()
            for y, row in enumerate(rows):
                assert row.difference is not None
                bar = 100 * CONFIDENCE * (row.difference_stderr or 0)
                color = GREY if row.limited else BLUE
                axes.errorbar(100 * row.difference, y, xerr=bar, fmt="o", ms=6, color=color, capsize=3, lw=1.5)
                if row.paper_baseline is not None and row.paper_attnres is not None:
                    axes.plot(100 * (row.paper_attnres - row.paper_baseline), y, "D", mfc="white", mec="#b3541e", ms=6)
            axes.axvline(0, color="#444444", lw=0.8, zorder=0)
            axes.set_yticks(range(len(rows)), [_label(row) for row in rows])
            axes.set_ylim(len(rows) - 0.5, -0.5)
            reach = 1.08 * max([1.0, *(abs(limit) for limit in axes.get_xlim())])
            axes.set_xlim(-reach, reach)
            axes.set_xlabel("AttnRes minus baseline, percentage points, with 95 % interval")
            axes.grid(axis="x", color="#e4e6ea", lw=0.8)
            axes.set_axisbelow(True)
            axes.spines[["top", "right", "left"]].set_visible(False)
            axes.tick_params(axis="y", length=0)
            text = io.StringIO()
            figure.savefig(text, format="svg", metadata={"Date": None})
        return text.getvalue()


def _label(row: Row) -> str:
    return f"{row.name} (LIMITED)" if row.limited else row.name  # without the warning sign, which some fonts lack


def _number(value: float | None, stderr: float | None, row: Row, sign: str = "") -> str:
    return score_text(row.metric, value, stderr, sign)


def _paper_difference(row: Row) -> float | None:
    if row.paper_baseline is None or row.paper_attnres is None:
        return None
    return row.paper_attnres - row.paper_baseline


def _task(row: Row) -> str:
    name = row.name if row.name == row.task else f"{row.name} [{row.task}]"
    return f"⚠ LIMITED {name}" if row.limited else name


def _always(report: Report) -> bool:
    return True


def _has_baseline(report: Report) -> bool:
    return report.baseline is not None


def _has_paper(report: Report) -> bool:
    return any(row.paper_attnres is not None for row in report.rows)


# Header, cell, and whether the report has anything to put there.
COLUMNS: tuple[tuple[str, Callable[[Row], str], Callable[[Report], bool]], ...] = (
    ("Task", _task, _always),
    ("Metric", lambda row: row.metric if row.filter == "none" else f"{row.metric} ({row.filter})", _always),
    ("Shots", lambda row: "–" if row.num_fewshot is None else str(row.num_fewshot), _always),
    ("n", lambda row: f"{row.n:,}", _always),
    ("Baseline", lambda row: _number(row.baseline, row.baseline_stderr, row), _has_baseline),
    ("AttnRes", lambda row: _number(row.attnres, row.attnres_stderr, row), _always),
    ("Difference", lambda row: _number(row.difference, row.difference_stderr, row, "+"), _has_baseline),
    ("p", lambda row: "–" if row.p_value is None else f"{row.p_value:.2g}", _has_baseline),
    ("Paper: baseline", lambda row: _number(row.paper_baseline, None, row), _has_paper),
    ("Paper: AttnRes", lambda row: _number(row.paper_attnres, None, row), _has_paper),
    ("Paper: difference", lambda row: _number(_paper_difference(row), None, row, "+"), _has_paper),
)


def _render(template: str, report: Report, figure: str | None, markup: Callable[[str], str]) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(Path(__file__).parent),
        autoescape=jinja2.select_autoescape(["html.j2"]),
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
        undefined=jinja2.StrictUndefined,
    )
    header, *lines = report.table()
    return environment.get_template(template).render(
        report=report,
        header=header,
        lines=list(zip(report.rows, lines, strict=True)),
        figure=figure and markup(figure[figure.index("<svg") :]),
        notes=[NOTES, *([LIMITED] if any(row.limited for row in report.rows) else [])],
        facts=[
            (title, _facts(facts))
            for title, facts in (
                ("Settings", report.settings),
                ("Versions", report.versions),
                ("Hardware", report.hardware),
            )
        ],
    )


def _facts(facts: dict[str, Any]) -> Iterable[tuple[str, str]]:
    for name, value in facts.items():
        if value is not None and value != {} and value != []:
            yield name, ", ".join(map(str, value)) if isinstance(value, list) else str(value)
