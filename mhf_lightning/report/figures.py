"""The charts of the report, drawn by plotly. No torch, no Lightning."""

from __future__ import annotations

import html
import math
from typing import Any

import plotly.graph_objects as go
from plotly.colors import qualitative
from plotly.subplots import make_subplots

from mhf_lightning.report.results import AXES, CURVES, NOT_AVAILABLE, Result, largest, show

# Of Okabe and Ito (and of Safe below): colour-blind readers tell them apart too.
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#000000")
DASHES = ("solid", "dash", "dot")  # after the colours are used up
ROW = 34  # height of a bar, pixels


def curves(results: list[Result]) -> go.Figure:
    """Draw the curves against steps, a panel each and one legend; the page's switch moves them to another axis."""
    figure = make_subplots(
        rows=2, cols=2, subplot_titles=list(CURVES.values()), horizontal_spacing=0.08, vertical_spacing=0.22
    )
    for panel, tag in enumerate(CURVES):
        for number, (name, result) in enumerate(zip(_names(results), results, strict=True)):
            drawn = result.curves[tag]
            figure.add_scatter(
                row=panel // 2 + 1,
                col=panel % 2 + 1,
                x=drawn.x["steps"],
                y=drawn.y,
                name=name,
                mode="lines+markers" if len(drawn.y) < 50 else "lines",
                line={"color": _color(number), "dash": DASHES[number // len(COLORS) % len(DASHES)]},
                legendgroup=number,
                showlegend=panel == 0,
                hovertemplate="%{y:,.5g} at %{x:,.6g}",
            )
        if tag.endswith("perplexity"):
            ticks = _log_ticks([y for result in results for y in result.curves[tag].y if y > 0])
            figure.update_yaxes(type="log", tickvals=ticks, tickformat=",", row=panel // 2 + 1, col=panel % 2 + 1)
    figure.update_xaxes(title_text=AXES["steps"])
    return _styled(figure, 580)


def _log_ticks(values: list[float]) -> list[float] | None:
    """Return round numbers around the values: plotly's own labels of a logarithmic axis are single digits."""
    if not values:
        return None
    low, high = math.floor(math.log10(min(values))), math.ceil(math.log10(max(values)))
    digits = (1, 2, 5) if max(values) > 20 * min(values) else (1, 1.5, 2, 3, 4, 5, 7)
    return [digit * 10.0**power for power in range(low, high + 1) for digit in digits]


def axes(results: list[Result]) -> dict[str, dict[str, Any]]:
    """What the switch needs, by axis: its title, x of each trace of :func:`curves`, and the runs that have none."""
    return {
        axis: {
            "title": title,
            "x": [_numbers(result.curves[tag].x[axis]) for tag in CURVES for result in results],
            "without": [result.name for result in results if all(c.x[axis] is None for c in result.curves.values())],
        }
        for axis, title in AXES.items()
    }


def bars(results: list[Result]) -> go.Figure:
    """Draw speed and memory of the runs side by side; a panel for what any of them has logged."""
    panels = {
        "tokens/s": ([result.tokens_per_s for result in results], ",.0f"),
        "MFU": ([result.mfu for result in results], ".1%"),
        "peak memory (GiB)": ([result.peak_memory for result in results], ",.2f"),
    }
    logged = {title: panel for title, panel in panels.items() if any(value is not None for value in panel[0])}
    panels = logged or panels
    figure = make_subplots(rows=1, cols=len(panels), subplot_titles=list(panels), shared_yaxes=True)
    for column, (values, form) in enumerate(panels.values(), start=1):
        figure.add_bar(
            row=1,
            col=column,
            orientation="h",
            y=_names(results),
            x=values,
            text=[show(value, form) for value in values],
            marker_color=[_color(number) for number in range(len(results))],
            hoverinfo="skip",
        )
        for name, value in zip(_names(results), values, strict=True):
            if value is None:
                figure.add_annotation(
                    row=1, col=column, y=name, x=0, text=NOT_AVAILABLE, xanchor="left", showarrow=False
                )
        figure.update_xaxes(tickformat=form, rangemode="tozero", row=1, col=column)
    figure.update_layout(showlegend=False)
    return _by_run(figure, len(results))


def phases(results: list[Result]) -> go.Figure | None:
    """Draw where the memory peaks; None where no run has logged that."""
    figure = go.Figure()
    for tag in _tags(results, "memory/peak_in_"):
        peaks = [largest(result.events.values(tag)) for result in results]
        name = html.escape(tag.removeprefix("memory/peak_in_").removesuffix("_gib"))
        text = [show(peak, ",.2f") for peak in peaks]
        figure.add_bar(name=name, orientation="h", y=_names(results), x=peaks, text=text, hoverinfo="skip")
    figure.update_layout(barmode="group")
    figure.update_xaxes(title_text="GiB", rangemode="tozero")
    return _by_run(figure, len(results) * len(figure.data)) if figure.data else None


def shares(results: list[Result]) -> go.Figure | None:
    """Draw where the time goes, averaged over the logged windows; None where no run has logged that."""
    figure = go.Figure()
    for tag in _tags(results, "time/"):
        values = [result.events.values(tag) for result in results]
        means = [float(value.mean()) if value.size else None for value in values]
        name = html.escape(tag.removeprefix("time/"))
        figure.add_bar(name=name, orientation="h", y=_names(results), x=means, hovertemplate="%{x:.1%}")
    figure.update_layout(barmode="stack")
    figure.update_xaxes(tickformat=".0%", title_text="share of the wall time")
    return _by_run(figure, len(results)) if figure.data else None


def _tags(results: list[Result], prefix: str) -> list[str]:
    """Return the scalars of all runs with a prefix, in the order in which they were logged."""
    return list(dict.fromkeys(tag for result in results for tag in result.events.scalars if tag.startswith(prefix)))


def _by_run(figure: go.Figure, rows: int) -> go.Figure:
    figure.update_yaxes(autorange="reversed", automargin=True, ticklabelstandoff=6)
    figure.update_layout(legend_traceorder="normal", colorway=qualitative.Safe)
    return _styled(figure, 130 + ROW * rows)


def _styled(figure: go.Figure, height: int) -> go.Figure:
    return figure.update_layout(
        template="plotly_white",
        height=height,
        margin={"l": 60, "r": 20, "t": 60, "b": 50},
        legend={"orientation": "h", "yref": "container", "yanchor": "top", "y": 1, "x": 0},
        font={"family": "system-ui, sans-serif", "size": 13, "color": "#1c2430"},
        hoverlabel_namelength=-1,
    )


def _color(number: int) -> str:
    return COLORS[number % len(COLORS)]


def _names(results: list[Result]) -> list[str]:
    return [html.escape(result.name) for result in results]  # plotly reads HTML in its texts


def _numbers(values: Any) -> list[float]:
    return [] if values is None else [float(f"{value:.8g}") for value in values]
