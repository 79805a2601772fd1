"""The files of an inspection: figures as PNG and SVG, their numbers as CSV, and a page that needs no other file."""

from __future__ import annotations

import base64
import gzip
import json
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import jinja2
import numpy as np
import pandas as pd
import vl_convert
from markupsafe import Markup

from . import figures, overview, tables
from .errors import AnalysisError
from .maps import DepthMaps

if TYPE_CHECKING:
    from .inspection import Inspection

LINES = 12  # of the tables in the page
TOKENS_DRAWN = 40


@dataclass(frozen=True)
class Figure:
    """A chart, the name of its files, and what it shows, in words."""

    name: str
    chart: Any
    numbers: pd.DataFrame
    words: str
    checkpoint: str = ""

    def title(self, several: bool) -> str:
        """Of the chart, and what it is of where that is not clear."""
        text = str(self.chart.title.text)
        return f"{text}: {self.checkpoint}" if several and self.checkpoint else text


def write(found: Sequence[Inspection], directory: Path, read: int | None, facts: Mapping[str, str]) -> list[str]:
    """Writes all files.

    Args:
        found: the checkpoint, and the one it is compared with.
        directory (`Path`): where to.
        read (`int`, *optional*): the read whose tokens are drawn.
        facts: what the page says on the text and the versions.

    Returns:
        `list[str]`: the names of the files.
    """
    drawn = list(make_figures(found, read))
    names = []
    for figure in drawn:
        names += [path.name for path in figures.save(figure.chart, directory / figure.name)]
        figure.numbers.to_csv(directory / f"{figure.name}.csv", index=False)
        names.append(f"{figure.name}.csv")
    for name, frame in _more_tables(found):
        frame.to_csv(directory / f"{name}.csv", index=False)
        names.append(f"{name}.csv")
    (directory / "report.html").write_text(page(found, drawn, facts), encoding="utf-8")
    return [*names, "report.html"]


def _suffixes(found: Sequence[Inspection]) -> Iterator[tuple[Inspection, str, str]]:
    """Each AttnRes checkpoint, what its files end with, and what its figures are marked with."""
    for number, inspection in enumerate(found):
        if inspection.maps is not None:
            suffix = "" if number == 0 else f"-{re.sub(r'[^A-Za-z0-9._-]+', '-', inspection.name)}"
            yield inspection, suffix, inspection.name


def make_figures(found: Sequence[Inspection], read: int | None) -> Iterator[Figure]:
    """All figures of one or two checkpoints, in the order of the page."""
    for inspection, suffix, name in _suffixes(found):
        maps = inspection.maps
        assert maps is not None
        layout, frame = maps.layout, maps.to_dataframe()
        entropies, mixing = tables.entropy(maps), tables.mixing_matrix(maps)
        for head in range(maps.num_heads):
            of_head = suffix + (f"-head-{head}" if maps.num_heads > 1 else "")
            label = name + (f", head {head}" if maps.num_heads > 1 else "")
            yield Figure(
                f"depth-map{of_head}",
                figures.depth_map(frame, layout, head, label),
                frame[frame["head"] == head],
                "Each row is a read, each column a source. The colour is the mean weight over all tokens. The last "
                "column of a row is what its own block has summed up so far. The first read sees the embedding alone.",
                label,
            )
            yield Figure(
                f"depth-map-relative{of_head}",
                figures.relative_map(frame, layout, head, label),
                frame[frame["head"] == head],
                "The same weights, over the weight that a zero query gives. 1 is an even share.",
                label,
            )
            yield Figure(
                f"entropy{of_head}",
                figures.entropy(entropies, layout, head, label),
                entropies[entropies["head"] == head],
                "Entropy of the weights of a token, in the mean over tokens. 100 % is an even share for all sources.",
                label,
            )
            yield Figure(
                f"mixing-matrix{of_head}",
                figures.mixing_matrix(mixing, layout, head, label),
                mixing[mixing["head"] == head],
                "Row r, column i: the factor with which output i enters read r. In a standard residual all are 1.",
                label,
            )
        chosen = _token_read(maps) if read is None else min(read, layout.num_sublayers)
        of_tokens = token_frame(maps, inspection.tokens, chosen)
        yield Figure(
            f"tokens{suffix}",
            figures.tokens(of_tokens, layout, str(layout.reads[chosen]), name),
            of_tokens,
            f"Each row is a token of the text. The colour is the weight that it gave to each source, at "
            f"{layout.reads[chosen]}.",
            name,
        )
        if inspection.parameters is not None:
            yield Figure(
                f"parameters{suffix}",
                figures.parameters(inspection.parameters, layout, name),
                inspection.parameters,
                "Before training, queries are 0 and key norms are 1.",
                name,
            )
        if inspection.dropped is not None:
            dropped = tables.dropped(inspection.dropped, layout)
            yield Figure(
                f"drop-source{suffix}",
                figures.drop_map(dropped, layout, name),
                dropped,
                "The source is masked out of this read alone; the weights of the others are taken without it.",
                name,
            )
            yield Figure(
                f"weight-and-effect{suffix}",
                figures.drop_scatter(dropped, layout, name),
                dropped[dropped["read"].notna()],
                "If weights said what sources are worth, points would lie on a rising line.",
                name,
            )
            yield Figure(
                f"drop-block{suffix}",
                figures.drop_blocks(dropped, layout, name),
                dropped[dropped["read"].isna()],
                "The source is masked out of all reads that see another one.",
                name,
            )
    frame = tables.magnitudes({inspection.name: inspection.magnitudes for inspection in found})
    yield Figure(
        "magnitudes",
        figures.magnitudes(frame),
        frame,
        "Written: what a decoder layer adds. Accumulated: what it adds to, with its own: the residual stream of a "
        "plain decoder, the sum of the open block with attention over depth, which starts anew with each block.",
    )


def _token_read(maps: DepthMaps) -> int:
    """The read that depends most on the token."""
    return int(np.sqrt(np.nansum(maps.deviation.mean(0) ** 2, -1)).argmax())


def token_frame(maps: DepthMaps, tokens: Sequence[str], read: int) -> pd.DataFrame:
    """The weights of the first tokens at one read, in the mean over heads."""
    layout = maps.layout
    return pd.DataFrame(
        {
            "position": position,
            "token": visible(tokens[position]),
            "source": source,
            "name": layout.sources[source].name,
        }
        | {"weight": float(weight)}
        for position, weights in enumerate(maps.token_weights[:TOKENS_DRAWN, :, read].mean(1))
        for source, weight in enumerate(weights)
        if np.isfinite(weight)
    )


def visible(token: str) -> str:
    """A token with its blanks and line breaks to be seen."""
    return token.replace("\n", "⏎").replace("\t", "⇥").replace(" ", "·") or "∅"


def _more_tables(found: Sequence[Inspection]) -> Iterator[tuple[str, pd.DataFrame]]:
    for inspection, suffix, _ in _suffixes(found):
        assert inspection.maps is not None
        yield f"deviating-tokens{suffix}", tables.deviating_tokens(inspection.maps, inspection.tokens)
        yield f"deviating-reads{suffix}", tables.deviating_reads(inspection.maps)


def explorer_data(inspection: Inspection) -> dict[str, Any]:
    """What the interactive map knows of one checkpoint. Weights of tokens are bytes, 255 for 1."""
    maps = inspection.maps
    assert maps is not None
    layout = maps.layout
    seen = np.isfinite(maps.weights[0])
    tokens = np.round(255 * np.clip(maps.token_weights[:, :, seen], 0, 1)).astype(np.uint8)
    return {
        "name": inspection.name,
        "heads": maps.num_heads,
        "perLayer": layout.sublayers_per_layer,
        "reads": [
            {"row": r.label, "kind": r.kind, "text": str(r), "place": r.place, "sources": np.flatnonzero(s).tolist()}
            for r, s in zip(layout.reads, seen)
        ],
        "sources": [{"name": source.name, "detail": source.detail} for source in layout.sources],
        "mean": [[round(float(weight), 4) for weight in weights[seen]] for weights in maps.weights],
        "tokens": [visible(token) for token in inspection.tokens],
        "tokenWeights": base64.b64encode(tokens.tobytes()).decode(),
        "spec": figures.specification(figures.explorer(layout)),
    }


def page(found: Sequence[Inspection], drawn: Sequence[Figure], facts: Mapping[str, str]) -> str:
    """The page, as HTML."""
    first = found[0].maps
    assert first is not None
    sentences: list[tuple[str, list[str]]] = []
    for inspection in found:
        said = [] if inspection.maps is None else [*overview.of_maps(inspection.maps)]
        if inspection.parameters is not None:
            said += overview.of_parameters(inspection.parameters)
        if inspection.dropped is not None and inspection.maps is not None:
            said += overview.of_dropped(inspection.dropped, inspection.maps)
        said += overview.of_magnitudes({inspection.name: inspection.magnitudes})
        sentences.append((inspection.name, said))
    data = {
        "checkpoints": [explorer_data(inspection) for inspection, _, _ in _suffixes(found)],
        "figures": [{"name": figure.name, "spec": figures.specification(figure.chart)} for figure in drawn],
        "themes": {"light": figures.theme(), "dark": figures.theme(dark=True)},
        "panel": figures.PANEL,
    }
    packed = gzip.compress(json.dumps(data, separators=(",", ":"), ensure_ascii=False).encode(), mtime=0)
    here = Path(__file__).parent
    bundle = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(here), autoescape=True, trim_blocks=True, lstrip_blocks=True
    )
    return environment.get_template("report.html.j2").render(
        name=found[0].name,
        compared=[inspection.name for inspection in found[1:]],
        facts=facts,
        overview=sentences,
        figures=[
            {"name": figure.name, "title": figure.title(several=len(found) > 1), "words": figure.words}
            for figure in drawn
        ],
        tokens=_table(tables.deviating_tokens(first, found[0].tokens, LINES), TOKEN_COLUMNS),
        reads=_table(
            tables.deviating_reads(first).sort_values("spread", ascending=False, kind="stable").head(LINES),
            READ_COLUMNS,
        ),
        data=base64.b64encode(packed).decode(),
        library=_script(bundle),
        script=_script((here / "report.js").read_text(encoding="utf-8")),
        style=Markup((here / "report.css").read_text(encoding="utf-8")),
    )


def _script(text: str) -> Markup:
    """A script, which must not hold what ends it."""
    if re.search(r"</script|<!--", text, re.IGNORECASE):
        text = re.sub(r"<(?=/script|!--)", r"\\x3c", text, flags=re.IGNORECASE)
    return Markup(text)


Columns = Sequence[tuple[str, Callable[[Any], str]]]
TOKEN_COLUMNS: Columns = (
    ("Token", lambda row: visible(row.token)),
    ("Position", lambda row: str(row.position)),
    ("Read", lambda row: f"{row.read}, {row.place}"),
    ("Distance from the mean", lambda row: f"{row.distance:.2f}"),
    ("Reads most from", lambda row: f"{row.most_read}, {overview.percent(row.weight)}"),
    ("In the mean", lambda row: overview.percent(row.mean_weight)),
)
READ_COLUMNS: Columns = (
    ("Read", lambda row: f"{row.read}, {row.place}"),
    ("Spread over tokens", lambda row: f"{row.spread:.3f}"),
)


def _table(frame: pd.DataFrame, columns: Columns) -> dict[str, Any]:
    if frame.empty:
        raise AnalysisError("no token was kept; the text is empty.")
    rows = [[cell(row) for _, cell in columns] for row in frame.itertuples()]
    header = [name for name, _ in columns]
    return {"header": header, "rows": rows, "is_token": header[0] == "Token"}
