"""The figures, as Vega-Lite charts: one chart is a PNG, an SVG and, in the report, a picture that one can touch."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import altair as alt
import pandas as pd
import vl_convert

from .layout import OUTPUT, Layout

PANEL = 190  # width of one of two panels, in pixels; two and their axes are a column
FONT = "DejaVu Sans, Verdana, sans-serif"
GAP = 2
# Okabe and Ito's colours, which all can tell apart; on a dark page the lighter ones of them.
LIGHT = {"ink": "#222222", "faint": "#6b7280", "paper": "#ffffff", "grid": "#e5e7eb"}
DARK = {"ink": "#e5e7eb", "faint": "#9ca3af", "paper": "#15181d", "grid": "#2d333b"}
LIGHT_COLORS = ["#0072b2", "#d55e00", "#009e73", "#aa4f86"]
DARK_COLORS = ["#56b4e9", "#e69f00", "#2cc295", "#d993bd"]
WEIGHT_SCHEME = "viridis"
SINGLE = "#b6bcc6"
CHOSEN = "#ff4d4d"


def theme(dark: bool = False) -> dict[str, Any]:
    """The `config` of a chart: fonts, and the colours of a light or a dark page."""
    colors = DARK if dark else LIGHT
    text = {"labelColor": colors["ink"], "titleColor": colors["ink"], "labelFontSize": 12, "titleFontSize": 12}
    return {
        "background": colors["paper"],
        "font": FONT,
        "view": {"stroke": None},
        "axis": {
            **text,
            "titleFontWeight": "normal",
            "grid": False,
            "gridColor": colors["grid"],
            "domainColor": colors["faint"],
            "tickColor": colors["faint"],
            "labelOverlap": True,
        },
        "legend": {**text, "titleFontWeight": "normal", "gradientLength": 180, "gradientThickness": 10},
        "header": text,
        "title": {
            "color": colors["ink"],
            "subtitleColor": colors["faint"],
            "fontSize": 14,
            "subtitleFontSize": 12,
            "anchor": "start",
            "offset": 10,
        },
        "range": {"category": DARK_COLORS if dark else LIGHT_COLORS},
        "style": {"gap": {"color": colors["paper"]}},  # between blocks of a depth map
        "text": {"color": colors["faint"], "fontSize": 11},
        "mark": {"color": (DARK_COLORS if dark else LIGHT_COLORS)[0]},
    }


def _data(frame: pd.DataFrame) -> pd.DataFrame:
    """Rows of a chart, rounded: a page must not be larger than what it shows."""
    floats = frame.select_dtypes("float").map(lambda value: float(f"{value:.5g}"))
    return frame.assign(**{name: floats[name] for name in floats})


def _title(text: str, subtitle: str | Sequence[str] = "") -> alt.TitleParams:
    return alt.TitleParams(text, subtitle=subtitle) if subtitle else alt.TitleParams(text)


def _source_axis(layout: Layout) -> str:
    if layout.block_size == 1:
        return "source (0: embedding, then each sublayer)"
    return "source (0: embedding, then each block)"


def _map(frame: pd.DataFrame | None, layout: Layout, color: alt.Color, tooltip: list[alt.Tooltip]) -> alt.VConcatChart:
    """A heat map of reads over sources: one panel for each kind of read, the output read in a strip below. Without a
    frame, the page gives the rows, as the data set `cells`, and the chosen read, as the parameter `chosen`."""
    rows = layout.num_layers
    cell = min(20.0, max(3.0, 380 / rows))
    reads = layout.reads
    panels = []
    for number, kind in enumerate(layout.kinds):
        labels = [read.label for read in reads if read.kind == kind]
        y = alt.Y(
            "row:O", sort=labels, scale=alt.Scale(domain=labels), title="decoder layer" if number == 0 else None
        ).axis(ticks=False, domain=False, labels=number == 0)
        panels.append(_panel(frame, layout, kind, y, cell * rows, color, tooltip, f"before the {kind}"))
    y = alt.Y("row:O", title=None, scale=alt.Scale(domain=[OUTPUT])).axis(ticks=False, domain=False)
    strip = _panel(frame, layout, OUTPUT, y, max(cell, 10), color, tooltip, "before the final norm")
    together = alt.hconcat(*panels, spacing=14) if len(panels) > 1 else panels[0]
    return alt.vconcat(together, strip, spacing=12)


def _panel(
    frame: pd.DataFrame | None,
    layout: Layout,
    kind: str,
    y: alt.Y,
    height: float,
    color: alt.Color,
    tooltip: list[alt.Tooltip],
    title: str,
) -> alt.LayerChart:
    columns, is_first = [*range(layout.num_blocks + 1)], kind == layout.kinds[0]
    x = alt.X("source:O", scale=alt.Scale(domain=columns), title=_source_axis(layout) if is_first else None)
    x = x.axis(ticks=False, domain=False, labelAngle=0)
    if frame is None:
        data = alt.Chart(alt.NamedData(name="cells")).transform_filter(f"datum.kind === {json.dumps(kind)}")
    else:
        data = alt.Chart(_data(frame.loc[frame["kind"] == kind, [c for c in MAP_COLUMNS if c in frame]]))
    # The first read sees the embedding alone. It would only stretch the scale.
    shown = color if color.shorthand != "weight:Q" else alt.condition("datum.read > 0", color, alt.value(SINGLE))
    layers: list[Any] = [data.mark_rect().encode(x=x, y=y, color=shown, tooltip=tooltip)]
    ends = _block_starts(layout, kind)
    if ends:
        marks = alt.Chart(alt.Data(values=ends))
        edge = alt.Y("row:O", bandPosition=0)
        layers.append(marks.transform_filter("datum.block > 1").mark_rule(strokeWidth=GAP, style="gap").encode(y=edge))
        if kind == layout.kinds[-1]:
            text = marks.mark_text(align="left", baseline="top", dx=4, dy=2)
            layers.append(text.encode(x=alt.value(PANEL), y=edge, text="label:N"))
    if frame is None:
        outline = data.transform_filter("datum.read === chosen").mark_rect(filled=False, strokeWidth=2, stroke=CHOSEN)
        layers.append(outline.encode(x=x, y=y))
    return alt.layer(*layers).properties(
        width=PANEL, height=height, title=alt.TitleParams(title, fontSize=12, offset=4)
    )


def _block_starts(layout: Layout, kind: str) -> list[dict[str, Any]]:
    """The rows of a kind with which a block starts; none if each row is a block of its own."""
    rows, seen = [], -1
    for read in layout.reads:
        if read.kind == kind:
            if read.block != seen:
                rows.append({"row": read.label, "block": read.block + 1, "label": f"block {read.block + 1}"})
            seen = read.block
    return rows if kind != OUTPUT and 1 < len(rows) < layout.num_layers else []


MAP_COLUMNS = ("kind", "row", "read", "place", "source", "name", "weight", "uniform", "ratio", "deviation", "increase")


def _map_tooltip(*measures: alt.Tooltip) -> list[alt.Tooltip]:
    return [
        alt.Tooltip("read:Q", title="read"),
        alt.Tooltip("place:N", title="place"),
        alt.Tooltip("name:N", title="source"),
        *measures,
    ]


def _of_head(frame: pd.DataFrame, head: int) -> pd.DataFrame:
    return frame[frame["head"] == head]


def _legend(title: str, format: str) -> alt.Legend:
    return alt.Legend(orient="bottom", title=title, format=format, direction="horizontal", titleLimit=400)


def depth_map(frame: pd.DataFrame, layout: Layout, head: int = 0, name: str = "") -> alt.VConcatChart:
    """Where every layer reads from: the mean weight of each read on each source (Fig. 8)."""
    frame = _of_head(frame, head)
    top = max(0.01, float(frame["weight"][frame["read"] > 0].max()))
    color = alt.Color("weight:Q", scale=alt.Scale(scheme=WEIGHT_SCHEME, domain=[0, top], clamp=True))
    color = color.legend(_legend("mean weight", ".0%"))
    weight, uniform = (alt.Tooltip(f"{n}:Q", format=".1%") for n in ("weight", "uniform"))
    chart = _map(frame, layout, color, _map_tooltip(weight, uniform))
    return chart.properties(title=_title("Where every layer reads from", name or "mean depth weight"))


def explorer(layout: Layout) -> alt.VConcatChart:
    """The map that the page fills: of the mean or of a token, with the row of the chosen read marked."""
    color = alt.Color("weight:Q", scale=alt.Scale(scheme=WEIGHT_SCHEME, domainMin=0, domainMax=alt.ExprRef("top")))
    color = color.legend(_legend("weight", ".0%"))
    chart = _map(None, layout, color, _map_tooltip(alt.Tooltip("weight:Q", format=".1%")))
    return chart.add_params(alt.param("chosen", value=0), alt.param("top", value=1))


def relative_map(frame: pd.DataFrame, layout: Layout, head: int = 0, name: str = "") -> alt.VConcatChart:
    """The same against the uniform weight: how many times as much a read takes, on a logarithmic scale."""
    frame = _of_head(frame, head).assign(ratio=lambda rows: rows["relative"].clip(lower=2**-6))
    reach = max(1.25, float(max(frame["ratio"].max(), 1 / frame["ratio"].min())))
    scale = alt.Scale(scheme="purpleorange", type="log", base=2, domain=[1 / reach, reach], reverse=True)
    color = alt.Color("ratio:Q", scale=scale).legend(_legend("times the uniform weight", ".2~f"))
    measures = (alt.Tooltip("ratio:Q", title="times uniform", format=".2f"), alt.Tooltip("weight:Q", format=".1%"))
    chart = _map(frame, layout, color, _map_tooltip(*measures))
    return chart.properties(title=_title("More or less than an even share", name or "mean depth weight / uniform"))


def _kind_color(layout: Layout) -> alt.Color:
    return alt.Color("kind:N", scale=alt.Scale(domain=[*layout.kinds, OUTPUT]), title=None).legend(orient="top")


def _boundaries(layout: Layout) -> alt.Chart:
    starts = [*range(layout.block_size, layout.num_sublayers, layout.block_size)]
    values = [{"read": start} for start in starts] if layout.block_size > 1 else []
    return (
        alt.Chart(alt.Data(values=values))
        .mark_rule(color="#9ca3af", strokeDash=[2, 3], strokeWidth=1)
        .encode(x=alt.X("read:Q"))
    )


def _by_read(
    frame: pd.DataFrame, layout: Layout, field: str, title: str, format: str, zero: bool = True, height: int = 150
) -> alt.LayerChart:
    """A measure of each read, along depth, with the boundaries of blocks."""
    columns = ["read", "kind", "place", field]
    base = alt.Chart(_data(frame[columns].dropna()))
    x = alt.X("read:Q", title="read", scale=alt.Scale(domain=[0, layout.num_sublayers], nice=False))
    y = alt.Y(f"{field}:Q", title=title, scale=alt.Scale(zero=zero)).axis(format=format, grid=True, tickCount=5)
    tooltip = ["read:Q", "place:N", alt.Tooltip(f"{field}:Q", title=title, format=".3~g")]
    line = base.mark_line(strokeWidth=1, strokeOpacity=0.45).encode(x=x, y=y, color=_kind_color(layout))
    points = base.mark_point(filled=True, size=36, opacity=1)
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=[*layout.kinds, OUTPUT]), title=None)
    drawn = points.encode(x=x, y=y, color=_kind_color(layout), shape=shape, tooltip=tooltip)
    return alt.layer(_boundaries(layout), line, drawn).properties(width=2 * PANEL, height=height)


def entropy(frame: pd.DataFrame, layout: Layout, head: int = 0, name: str = "") -> alt.LayerChart:
    """How evenly each read spreads: its entropy over that of uniform weights."""
    frame = _of_head(frame, head)
    chart = _by_read(frame, layout, "relative", "entropy / entropy of uniform weights", ".0%", zero=False, height=190)
    one = alt.Chart(alt.Data(values=[{"y": 1}])).mark_rule(color="#6b7280", strokeDash=[5, 3], strokeWidth=1)
    return alt.layer(one.encode(y=alt.Y("y:Q")), chart).properties(
        title=_title("How evenly each read spreads", ["dashed: uniform weights", *([name] if name else [])])
    )


def parameters(frame: pd.DataFrame, layout: Layout, name: str = "") -> alt.VConcatChart:
    """How far training moved the queries from zero and, where there are any, key norms from one and gates from zero."""
    titles = {"query_norm": "norm of the query", "key_norm_deviation": "key norm: rms distance from 1", "gate": "gate"}
    charts = [_by_read(frame, layout, field, title, "~g") for field, title in titles.items() if field in frame]
    return alt.vconcat(*charts, spacing=16).properties(title=_title("How far training moved each read", name))


def mixing_matrix(frame: pd.DataFrame, layout: Layout, head: int = 0, name: str = "") -> alt.HConcatChart:
    """The depth mixing matrix of the model beside that of a standard residual (Fig. 9)."""
    frame = _of_head(frame, head)
    top = max(1.0, float(frame["factor"][frame["read"] > 0].max()))
    size = layout.num_sublayers + 1
    ticks = [*range(0, size, max(1, -(-size // 8)))]
    panels = []
    for number, (field, title) in enumerate((("factor", "this model"), ("residual", "standard residual"))):
        color = alt.Color(f"{field}:Q", scale=alt.Scale(scheme=WEIGHT_SCHEME, domain=[0, top]))
        color = color.legend(_legend("factor with which an output enters a read", "~g"))
        x = alt.X("output:O", title="output (0: embedding)" if number == 0 else None)
        y = alt.Y("read:O", title="read" if number == 0 else None)
        cells = alt.Chart(_data(frame[["read", "output", field]])).mark_rect()
        tooltip = ["read:O", "output:O", alt.Tooltip(f"{field}:Q", title="factor", format=".3f")]
        axis = {"ticks": False, "domain": False, "values": ticks}
        drawn = cells.encode(
            x=x.axis(labelAngle=0, **axis), y=y.axis(labels=number == 0, **axis), color=color, tooltip=tooltip
        )
        panels.append(drawn.properties(width=PANEL, height=PANEL, title=alt.TitleParams(title, fontSize=12, offset=4)))
    return alt.hconcat(*panels, spacing=14).properties(title=_title("What of every output is in every read", name))


MEASURES = {
    "written": "written by the layer",
    "accumulated": "accumulated",
    "gradient": "norm of the gradient",
}


def magnitudes(frame: pd.DataFrame) -> alt.VConcatChart:
    """Magnitudes along depth, of one or several checkpoints (Fig. 5)."""
    names = [*dict.fromkeys(frame["checkpoint"])]
    panels = []
    shown = [field for field in MEASURES if frame[field].notna().any()]
    for field in shown:
        base = alt.Chart(_data(frame[["checkpoint", "layer", field]].dropna()))
        x = alt.X("layer:Q", title="decoder layer" if field == shown[-1] else None)
        y = alt.Y(f"{field}:Q", title=MEASURES[field], scale=alt.Scale(type="log", nice=False))
        color = alt.Color("checkpoint:N", scale=alt.Scale(domain=names), title=None)
        tooltip = ["checkpoint:N", "layer:Q", alt.Tooltip(f"{field}:Q", title=MEASURES[field], format=".3~g")]
        encoding = {
            "x": x.axis(format="d", tickMinStep=1),
            "y": y.axis(grid=True, tickCount=4, format="~g"),
            "color": color.legend(orient="top", labelLimit=320, columns=1),
        }
        line = base.mark_line(strokeWidth=1.5).encode(**encoding)
        shape = alt.Shape("checkpoint:N", scale=alt.Scale(domain=names), title=None)
        points = base.mark_point(filled=True, size=40, opacity=1).encode(**encoding, shape=shape, tooltip=tooltip)
        panels.append(alt.layer(line, points).properties(width=2 * PANEL, height=130))
    subtitle = "root mean square" + (", and norm of the gradient of a token's loss" if "gradient" in shown else "")
    return alt.vconcat(*panels, spacing=14).properties(title=_title("How large outputs are, layer by layer", subtitle))


def drop_map(frame: pd.DataFrame, layout: Layout, name: str = "") -> alt.VConcatChart:
    """The loss that a read's doing without a source costs."""
    frame = frame[frame["read"].notna()]
    reach = max(1e-6, float(frame["increase"].abs().max()))
    scale = alt.Scale(scheme="purpleorange", type="symlog", constant=reach / 20, domain=[-reach, reach], reverse=True)
    color = alt.Color("increase:Q", scale=scale).legend(_legend("increase of the loss, nats per token", "~g"))
    measures = (
        alt.Tooltip("increase:Q", title="increase of the loss", format="+.4f"),
        alt.Tooltip("weight:Q", title="mean weight", format=".1%"),
    )
    chart = _map(frame, layout, color, _map_tooltip(*measures))
    return chart.properties(title=_title("What a read loses without a source", name or "one source out of one read"))


def drop_scatter(frame: pd.DataFrame, layout: Layout, name: str = "") -> alt.Chart:
    """Does the weight of a source say what it is worth?"""
    frame = frame[frame["read"].notna()]
    reach = max(1e-6, float(frame["increase"].abs().max()))
    x = alt.X("weight:Q", title="mean weight of the source").axis(format="%", grid=True)
    y = alt.Y(
        "increase:Q", title="increase of the loss", scale=alt.Scale(type="symlog", constant=reach / 20, nice=False)
    )
    shape = alt.Shape("kind:N", scale=alt.Scale(domain=[*layout.kinds, OUTPUT]), title=None)
    tooltip = _map_tooltip(
        alt.Tooltip("weight:Q", format=".1%"), alt.Tooltip("increase:Q", title="increase of the loss", format="+.4f")
    )
    points = alt.Chart(_data(frame[["kind", "read", "place", "name", "weight", "increase"]]))
    drawn = points.mark_point(filled=True, size=40, opacity=0.75)
    drawn = drawn.encode(x=x, y=y.axis(grid=True), color=_kind_color(layout), shape=shape, tooltip=tooltip)
    title = _title("Weight against effect", ["one point: one source out of one read", *([name] if name else [])])
    return drawn.properties(width=2 * PANEL, height=220, title=title)


def drop_blocks(frame: pd.DataFrame, layout: Layout, name: str = "") -> alt.Chart:
    """The loss when no read may use a source."""
    frame = frame[frame["read"].isna()]
    names = [source.name for source in layout.sources]
    bars = alt.Chart(_data(frame[["name", "sublayers", "weight", "increase"]])).mark_bar()
    y = alt.Y("name:N", sort=names, scale=alt.Scale(domain=names), title=None).axis(labelLimit=200, labelOverlap=False)
    x = alt.X("increase:Q", title="increase of the loss, nats per token").axis(grid=True)
    tooltip = ["name:N", "sublayers:N", alt.Tooltip("increase:Q", format="+.4f")]
    title = _title("What the model loses without a source", name or "one source out of all reads")
    height = alt.Step(max(8, min(20, 600 // len(names))))
    return bars.encode(x=x, y=y, tooltip=tooltip).properties(width=2 * PANEL - 60, height=height, title=title)


def tokens(frame: pd.DataFrame, layout: Layout, place: str, name: str = "") -> alt.Chart:
    """Which source each token used, at one read. The frame has `position`, `token`, `source`, `name`, `weight`."""
    columns = [*range(1 + int(frame["source"].max()))]
    rows = [*dict.fromkeys(frame.sort_values("position")["position"])]
    labels = {int(p): t for p, t in zip(frame["position"], frame["token"])}
    expression = f"({json.dumps(labels)})[datum.value]"
    color = alt.Color("weight:Q", scale=alt.Scale(scheme=WEIGHT_SCHEME)).legend(_legend("weight", ".0%"))
    y = alt.Y("position:O", scale=alt.Scale(domain=rows), title=None)
    x = alt.X("source:O", scale=alt.Scale(domain=columns), title=_source_axis(layout))
    cells = alt.Chart(_data(frame)).mark_rect()
    axis = {"ticks": False, "domain": False}
    tooltip = ["position:O", "token:N", alt.Tooltip("name:N", title="source"), alt.Tooltip("weight:Q", format=".1%")]
    drawn = cells.encode(
        x=x.axis(labelAngle=0, **axis),
        y=y.axis(labelExpr=expression, labelOverlap=False, labelFontSize=11, labelLimit=140, **axis),
        color=color,
        tooltip=tooltip,
    )
    title = _title("What each token read", [place, *([name] if name else [])])
    return drawn.properties(width=1.5 * PANEL, height=alt.Step(14), title=title)


def specification(chart: Any) -> dict[str, Any]:
    """The Vega-Lite specification of a chart, as the page embeds it."""
    with alt.data_transformers.enable("default", max_rows=None):
        return chart.to_dict(validate=False)


def save(chart: Any, path: Path) -> list[Path]:
    """Writes a chart as PNG, at twice its size, and as SVG.

    Args:
        chart (`altair.Chart`): the chart.
        path (`Path`): the files, without their suffix.

    Returns:
        `list[Path]`: the two files.
    """
    spec = specification(chart)
    version = ".".join(alt.SCHEMA_VERSION.removeprefix("v").split(".")[:2])
    svg = vl_convert.vegalite_to_svg(spec, vl_version=version, config=theme())
    # Or light seams show between the cells of a map.
    svg = svg.replace('class="mark-rect role-mark', 'shape-rendering="crispEdges" class="mark-rect role-mark')
    path.with_suffix(".svg").write_text(svg, encoding="utf-8")
    path.with_suffix(".png").write_bytes(vl_convert.svg_to_png(svg, scale=2))
    return [path.with_suffix(".png"), path.with_suffix(".svg")]
