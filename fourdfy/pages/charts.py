"""Curves as inline SVG.

A curve is a list of (step, value).
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping, Sequence
from itertools import groupby
from statistics import fmean

from fourdfy.pages.page import escaped

Curve = Sequence[tuple[int, float]]

WIDTH, HEIGHT, LEFT, BOTTOM = 320, 150, 44, 18
COLORS = 8
"""Number of colours in ``style.css``."""
POINTS = 300
"""Most points of a drawn curve; more are averaged."""
SMOOTH_FROM = 40
"""A curve of fewer points is drawn as it is; of others also the moving mean over a twentieth."""


def charts(curves: Mapping[str, Mapping[str, Curve]]) -> str:
    """A grid of charts by title, each of curves by label; the n-th label of a chart has the n-th colour."""
    return f'<div class="grid">{"".join(_figure(title, of) for title, of in curves.items())}</div>'


def legend(labels: Sequence[str]) -> str:
    """Which label has which colour in ``charts``."""
    keys = (f"<span>{_key(index)}{escaped(label)}</span> " for index, label in enumerate(labels))
    return f"<p>{''.join(keys)}</p>"


def _key(index: int) -> str:
    line = f'<path class="c{index % COLORS}" d="M0 5h24"/>'
    return f'<svg class="key" viewBox="0 0 24 10" aria-hidden="true">{line}</svg>'


def _figure(title: str, curves: Mapping[str, Curve]) -> str:
    return f"<figure><figcaption>{escaped(title)}</figcaption>{chart(title, curves)}</figure>"


def chart(title: str, curves: Mapping[str, Curve]) -> str:
    """All curves in one pair of axes. The vertical one is logarithmic if all values are positive and span
    three decades."""
    finite = [[(step, value) for step, value in curve if math.isfinite(value)] for curve in curves.values()]
    values = [value for curve in finite for _, value in curve]
    if not values:
        return '<p class="soft">no finite value</p>'
    low, high = min(values), max(values)
    is_log = low > 0 and high / low > 1000
    first, last = min(s for c in finite for s, _ in c), max(s for c in finite for s, _ in c)

    def place(step: int, value: float) -> str:
        ends = [math.log(v) if is_log else v for v in (low, high, value)]
        across = (step - first) / (last - first) if last > first else 0.5
        upwards = (ends[2] - ends[0]) / (ends[1] - ends[0]) if ends[1] > ends[0] else 0.5
        return f"{LEFT + across * (WIDTH - LEFT - 6):.1f} {8 + (1 - upwards) * (HEIGHT - BOTTOM - 14):.1f}"

    def path(points: Curve, css: str) -> str:
        dot = "h.01" if len(points) == 1 else ""
        return f'<path class="{css}" d="M{"L".join(place(*point) for point in points)}{dot}"/>'

    lines = []
    for index, curve in enumerate(finite):
        if curve:
            color = f"c{index % COLORS}"
            smooth = _smooth(curve)
            lines += [path(_averaged(curve), f"raw {color}")] if smooth is not curve else []
            lines.append(path(_averaged(smooth), color))
    axis = f'<path class="axis" d="M{LEFT} 4V{HEIGHT - BOTTOM}H{WIDTH - 4}"/>'
    return (
        f'<svg class="chart" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{escaped(title)}">{axis}'
        f"{_text(LEFT - 5, 13, 'end', brief(high))}"
        f"{_text(LEFT - 5, HEIGHT - BOTTOM - 3, 'end', brief(low))}"
        f"{_text(LEFT, HEIGHT - 4, 'start', first)}{_text(WIDTH - 4, HEIGHT - 4, 'end', last)}"
        f"{''.join(lines)}</svg>"
    )


def intervals(rows: Sequence[tuple[str, float, float, float]], middle: float) -> str:
    """A dot and a line for each (label, value, its low and high end), on one axis around the middle."""
    reach = max((abs(end - middle) for _, *of in rows for end in of), default=0.0) or 1.0
    scale = 10.0 ** math.floor(math.log10(reach))
    reach = next(n * scale for n in (1, 2, 4, 5, 10) if n * scale > 0.999 * reach)

    def across(value: float) -> str:
        return f"{50 + 48 * (value - middle) / reach:.1f}%"

    # Lengths in % and no viewBox: texts have their size on a narrow screen too.
    lines = "".join(
        f'<p>{escaped(label)}</p><svg role="img" aria-label="{escaped(brief(value))}">'
        f'<line class="axis" x1="50%" y1="0" x2="50%" y2="100%"/>'
        f'<line class="c0" x1="{across(low)}" y1="50%" x2="{across(high)}" y2="50%"/>'
        f'<circle cx="{across(value)}" cy="50%" r="4"/></svg>'
        for label, value, low, high in rows
    )
    ticks = (middle + share * reach for share in (-1, -0.5, 0, 0.5, 1))
    numbers = "".join(_text(across(tick), 12, "middle", brief(tick)) for tick in ticks)
    return f'<div class="intervals">{lines}<svg aria-hidden="true">{numbers}</svg></div>'


def _text(x: object, y: int, anchor: str, content: object) -> str:
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}">{content}</text>'


def brief(value: object) -> str:
    """A number with three digits, or all before its point; a text or a list as it is."""
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    if not isinstance(value, int | float):
        return str(value)
    if 1000 <= abs(value) < 100_000:
        return f"{value:.0f}"
    return re.sub(r"e([+-])0*(\d)", lambda found: f"e{found[1].strip('+')}{found[2]}", f"{value:.3g}")


def _smooth(curve: Curve) -> Curve:
    """The moving mean, of fewer points at the ends; the same object if there are few points."""
    if len(curve) < SMOOTH_FROM:
        return curve
    reach = len(curve) // 40
    means = [fmean(v for _, v in curve[max(0, i - reach) : i + reach + 1]) for i in range(len(curve))]
    return [(step, mean) for (step, _), mean in zip(curve, means, strict=True)]


def _averaged(curve: Curve) -> Curve:
    """At most ``POINTS`` points: means of neighbours."""
    if len(curve) <= POINTS:
        return curve
    groups = groupby(enumerate(curve), key=lambda entry: entry[0] * POINTS // len(curve))
    members = [[point for _, point in group] for _, group in groups]
    return [(round(fmean(s for s, _ in some)), fmean(v for _, v in some)) for some in members]
