"""The page's charts, as inline SVG: text stays text, the size follows the page, the same data give the same bytes."""

from __future__ import annotations

import io
import re
from collections.abc import Callable, Mapping, Sequence
from itertools import groupby
from typing import Any

import matplotlib as mpl
from markupsafe import Markup, escape
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from portllm.report.table import title
from portllm.report.verdicts import ARMS, Verdict, shown

COLORS = {"none": "#8b93a1", "port": "#1f6feb", "warm": "#1a7f5a", "refit": "#d9730d"}
"""Told apart by lightness and marker too, for readers who do not see the hues."""
MARKERS = {"none": "o", "port": "s", "warm": "D", "refit": "^"}
STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",
    "svg.hashsalt": "portllm",
    "text.parse_math": False,  # a task named `$x$` is a name, not mathematics
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#c4cad4",
    "axes.labelcolor": "#57606a",
    "axes.titlesize": 9.5,
    "axes.titlecolor": "#1f2328",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#eceff3",
    "xtick.color": "#57606a",
    "ytick.color": "#57606a",
    "lines.linewidth": 1.6,
    "lines.markersize": 4.5,
}
PANEL = (3.1, 2.15)
"""Width and height of one panel, inches."""
ACROSS = 3
"""Panels side by side on a laptop."""
POINTS = 300
"""A training curve is thinned to about so many points: more cannot be seen in a panel."""

Panel = Callable[[Axes], None]


def over_versions(verdicts: Sequence[Verdict]) -> Markup:
    """One task's scores over t: a panel per lineage (and rank), all arms, bars of one standard error."""
    blocks = [list(members) for _, members in groupby(verdicts, key=lambda verdict: verdict.block)]
    panels = [lambda axes, block=block: _versions(axes, block, verdicts) for block in blocks]
    name = verdicts[0].name
    return _grid(panels, f"{name}: score over versions, one panel per lineage", legend=shown(verdicts), shared=True)


def training_curves(steps: Sequence[Mapping[str, Any]]) -> list[Markup]:
    """Loss over optimizer steps, small multiples: a panel per lineage's updates and per task's patches."""
    drawn = sorted((step for step in steps if step.get("curve")), key=_panel_of)
    panels = [
        lambda axes, name=name, members=members: _losses(axes, name[1], members)
        for name, members in ((name, list(members)) for name, members in groupby(drawn, key=_panel_of))
    ]
    # A figure per twelve panels: one SVG of hundreds is slow to lay out.
    return [_grid(panels[i : i + 12], "loss over optimizer steps") for i in range(0, len(panels), 12)]


def _panel_of(step: Mapping[str, Any]) -> tuple[int, str]:
    where, stage = step.get("coordinates") or {}, step["stage"]
    parts = {"update": ("model", "lineage"), "finetune": ("model", "lineage", "task")}.get(stage, ("model",))
    order = {"base": 0, "update": 1}.get(stage, 2)
    return order, " · ".join([stage, *(str(where[name]) for name in parts if where.get(name) is not None)])


def _versions(axes: Axes, block: Sequence[Verdict], among: Sequence[Verdict]) -> None:
    scale = block[0].scale
    spread = 0.012 * (max(v.t for v in block) or 1)
    for place, arm in enumerate(ARMS):
        found = [(v.t, v.arms[arm]) for v in block if arm in v.arms]
        if found:
            axes.errorbar(
                [t + (place - 1) * spread for t, _ in found],
                [scale * e.value for _, e in found],
                yerr=[scale * (e.stderr or 0) for _, e in found],
                color=COLORS[arm],
                marker=MARKERS[arm],
                elinewidth=1,
                capsize=2,
                label=arm,
            )
    axes.set_title(title(block[0], among))
    axes.set_xlabel("version t")
    axes.set_ylabel(f"{block[0].unit}, points" if scale == 100 else block[0].unit)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))


def _losses(axes: Axes, name: str, steps: Sequence[Mapping[str, Any]]) -> None:
    times = sorted({(step.get("coordinates") or {}).get("t") or 0 for step in steps})
    for step in sorted(steps, key=lambda step: (step.get("coordinates") or {}).get("t") or 0):
        t = (step.get("coordinates") or {}).get("t") or 0
        curve = step["curve"][:: max(1, len(step["curve"]) // POINTS)]
        shade = 0.25 + 0.65 * (times.index(t) / max(1, len(times) - 1))
        color = mpl.colormaps["viridis"](1 - shade)
        label = f"t = {t}" if f"t = {t}" not in axes.get_legend_handles_labels()[1] else None
        axes.plot([p["step"] for p in curve], [p["loss"] for p in curve], color=color, linewidth=1.1, label=label)
    axes.set_title(name)
    axes.set_xlabel("optimizer step")
    axes.set_ylabel("loss")
    if 1 < len(times) <= 6:
        axes.legend(frameon=False, fontsize=8, handlelength=1.2)


def _grid(panels: Sequence[Panel], label: str, legend: Sequence[str] = (), shared: bool = False) -> Markup:
    across, down = min(len(panels), ACROSS), -(-len(panels) // ACROSS)
    with mpl.rc_context(STYLE):
        size = (across * PANEL[0], down * PANEL[1] + (0.3 if legend else 0))
        figure = Figure(figsize=size, layout="constrained")
        grid = figure.subplots(down, across, squeeze=False, sharey=shared)
        for number, (axes, panel) in enumerate(zip(grid.flat, panels, strict=False), 1):
            panel(axes)
            below = axes.get_xlabel()
            if shared:
                axes.label_outer(remove_inner_ticks=False)
            if number + across > len(panels):  # nothing stands below it
                axes.xaxis.set_tick_params(labelbottom=True)
                axes.set_xlabel(below)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)
        if legend:
            _shared_legend(figure, legend)
        return _svg(figure, label)


def _shared_legend(figure: Figure, order: Sequence[str]) -> None:
    found = {
        label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    names = [name for name in order if name in found]
    figure.legend(
        [found[name] for name in names], names, loc="outside upper left", ncols=len(names), frameon=False, fontsize=9
    )


def _svg(figure: Figure, label: str) -> Markup:
    """The drawing without XML prologue, as wide as drawn and never wider than the page."""
    stream = io.StringIO()
    figure.savefig(stream, format="svg", metadata={"Date": None, "Creator": None}, transparent=True)
    drawing = stream.getvalue()
    drawing = drawing[drawing.index("<svg") :]
    width = round(figure.get_figwidth() * 96)
    head = f'<svg role="img" aria-label="{escape(label)}" style="width:{width}px;max-width:100%;height:auto"'
    return Markup(re.sub(r'<svg( width="[^"]*"| height="[^"]*")*', lambda _: head, drawing, count=1))
