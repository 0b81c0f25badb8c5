"""The page of the report: charts, tables and images in one file. No torch, no Lightning."""

from __future__ import annotations

import base64
from datetime import datetime
from itertools import groupby
from pathlib import Path

import plotly.graph_objects as go
import plotly.io
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from plotly.offline import get_plotlyjs

from mhf_lightning import __version__
from mhf_lightning.report import figures
from mhf_lightning.report.results import MAX_POINTS, Result, differences, evaluation_table, show

ROUTER = {
    "entropy_token": "entropy of a token's gate",
    "entropy_mean_gate": "entropy of the mean gate",
    "effective_subnetworks": "effective sub-networks",
    "dead_fraction": "dead fraction",
    "sigmoid_sum": "sigmoid sum",
    "saturation": "saturation",
}
IMAGES = "router/"


def render(results: list[Result]) -> str:
    """Return the page as HTML that needs nothing else, and loads nothing."""
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    return environment.get_template("page.html").render(
        version=__version__,
        generated=f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}",
        plotly=Markup(get_plotlyjs()),
        results=results,
        table=[result.figures() for result in results],
        curves=_chart(figures.curves(results), "curves"),
        axes=figures.axes(results),
        max_points=MAX_POINTS,
        bars=_chart(figures.bars(results), "bars"),
        phases=_chart(figures.phases(results), "phases"),
        shares=_chart(figures.shares(results), "shares"),
        router_names=ROUTER,
        router=[{tag: show(result.events.last(f"router/{tag}/mean"), ",.3f") for tag in ROUTER} for result in results],
        images=[_images(result) for result in results],
        evaluations=evaluation_table(results),
        differences=differences(results),
    )


def _chart(figure: go.Figure | None, name: str) -> Markup | None:
    if figure is None:
        return None
    config = {"displaylogo": False, "responsive": True}
    return Markup(plotly.io.to_html(figure, config=config, full_html=False, include_plotlyjs=False, div_id=name))


def _images(result: Result) -> list[list[dict[str, str | int]]]:
    """Return the newest image of each of the router's tags, as base64: a list for each kind, layers in their order."""
    tags = [tag for tag, series in result.events.images.items() if tag.startswith(IMAGES) and series.values]

    def newest(tag: str) -> dict[str, str | int]:
        series = result.events.images[tag]
        data = base64.b64encode(series.values[-1]).decode()
        return {"tag": tag.removeprefix(IMAGES), "step": series.steps[-1], "data": data}

    kinds = groupby(sorted(tags, key=_natural), key=lambda tag: tag.rpartition("/")[0])
    return [[newest(tag) for tag in group] for _, group in kinds]


def _natural(tag: str) -> tuple[str, int]:
    """Sort layer_10 after layer_9."""
    name, _, number = tag.rpartition("_")
    return (name, int(number)) if number.isdecimal() else (tag, 0)
