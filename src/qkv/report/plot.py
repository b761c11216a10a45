"""Curves over optimiser steps as inline SVG."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from html import escape
from typing import Literal

Look = Literal["train", "valid", "other"]

Point = tuple[float, float]
"""Step and value."""

MOST_POINTS = 400
"""A curve of more is drawn through as many of them, evenly chosen: a page should stay light."""

_W, _H, _LEFT, _RIGHT, _TOP, _BOTTOM = 460.0, 270.0, 70.0, 14.0, 30.0, 42.0


@dataclass(frozen=True)
class Line:
    """Values over steps, at least one."""

    name: str
    points: Sequence[Point]
    look: Look = "train"
    """Its colour."""
    dots: bool = False
    """Mark each point: for few."""
    smooth: bool = False
    """Draw a moving average over about four points, and the points themselves faintly."""

    @property
    def values(self) -> list[float]:
        """What is drawn clearly."""
        values = [y for _, y in self.points]
        return _smooth(values) if self.smooth else values


def curve(train: Sequence[Point], valid: Sequence[Point], unit: str) -> str:
    """Loss over optimiser steps, in training and on held-out data."""
    lines = [Line("training", train, smooth=True)]
    if valid:
        lines.append(Line("held out", valid, "valid", dots=True))
    return plot(lines, "learning curve", f"loss ({unit})")


def plot(lines: Sequence[Line], title: str, unit: str) -> str:
    """Lines over optimiser steps, with a key that gives their last values; unit: name of the upward axis."""
    drawn = [line.values for line in lines]
    right = max(x for line in lines for x, _ in line.points)
    ys = [y for values in drawn for y in values]
    low, high = min(ys), max(ys)
    around = 0.0 if high > low else 0.1 * abs(low) or 1.0  # of a constant
    y_ticks = _ticks(low - around, high + around)
    low, high = min(low, y_ticks[0]), max(high + around, y_ticks[-1])

    def place(x: float, y: float) -> Point:
        across = _LEFT + (_W - _LEFT - _RIGHT) * x / max(right, 1.0)
        share = (max(low, min(y, high)) - low) / max(high - low, 1e-300)
        return across, _H - _BOTTOM - (_H - _TOP - _BOTTOM) * share

    def path(points: Sequence[Point], name: str) -> str:
        every = math.ceil(len(points) / MOST_POINTS)
        kept = [*points[:-1:every], points[-1]]
        corners = " ".join(f"{x:.1f},{y:.1f}" for x, y in (place(*point) for point in kept))
        return f'<polyline class="{name}" points="{corners}"/>'

    shapes = []
    for line, values in zip(lines, drawn, strict=True):
        points = [(x, y) for (x, _), y in zip(line.points, values, strict=True)]
        shapes += [path(line.points, f"noise {line.look}")] if line.smooth else []
        shapes.append(path(points, line.look))
        shapes += [
            f'<circle class="{line.look}" cx="{u:.1f}" cy="{v:.1f}" r="3.5">'
            f"<title>step {x:,.0f}: {escape(line.name)} {y:.4g}</title></circle>"
            for x, y in (points if line.dots else ())
            for u, v in [place(x, y)]
        ]
    ends = [f"{line.name} {values[-1]:.4g}" for line, values in zip(lines, drawn, strict=True)]
    about = escape(f"{title}: {' and '.join(ends)} at the end; {unit}")
    return (
        f'<svg class="curve" viewBox="0 0 {_W:.0f} {_H:.0f}" role="img" aria-label="{about}">'
        f"<title>{about}</title>{_grid(_ticks(0.0, right), y_ticks, place)}"
        f"{axis((_W + _LEFT) / 2, _H - 6, 'optimiser step')}"
        f"{axis(11, (_H + _TOP - _BOTTOM) / 2, unit, upward=True)}"
        f"{''.join(shapes)}{_key(lines, ends)}</svg>"
    )


def _grid(x_ticks: Sequence[float], y_ticks: Sequence[float], place: Callable[[float, float], Point]) -> str:
    """Level lines, and the numbers of both axes."""
    parts = []
    for y in y_ticks:
        _, v = place(0, y)
        parts.append(f'<line class="grid" x1="{_LEFT}" x2="{_W - _RIGHT}" y1="{v:.1f}" y2="{v:.1f}"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{v + 4:.1f}" text-anchor="end">{y:g}</text>')
    for x in x_ticks:
        u, _ = place(x, y_ticks[0])
        parts.append(f'<text x="{u:.1f}" y="{_H - _BOTTOM + 18:.0f}" text-anchor="middle">{x:,g}</text>')
    return "".join(parts)


def _key(lines: Sequence[Line], ends: Sequence[str]) -> str:
    """What each colour means."""
    parts, left = [], 0.0
    for line, end in zip(lines, ends, strict=True):
        dot = f'<circle class="{line.look}" cx="{left + 9:.0f}" cy="0" r="3.5"/>' if line.dots else ""
        parts.append(f'<line class="{line.look}" x1="{left:.0f}" x2="{left + 18:.0f}"/>{dot}')
        parts.append(f'<text x="{left + 24:.0f}" y="4">{escape(end)}</text>')
        left += 44 + 6.6 * len(end)
    return f'<g transform="translate({_LEFT} 14)">{"".join(parts)}</g>'


def axis(x: float, y: float, name: str, upward: bool = False) -> str:
    """The name of an axis around a point."""
    place = f"translate({x:.0f} {y:.0f}){' rotate(-90)' if upward else ''}"
    return f'<text class="axis" transform="{place}" text-anchor="middle">{escape(name)}</text>'


def _smooth(values: Iterable[float]) -> list[float]:
    """A moving average over about four values, without the bias of its first one."""
    total = weight = 0.0
    smooth = []
    for value in values:
        total, weight = 0.75 * total + 0.25 * value, 0.75 * weight + 0.25
        smooth.append(total / weight)
    return smooth


def _ticks(low: float, high: float) -> list[float]:
    """Four to nine round numbers from at most `low` up to at most `high`."""
    span = max(high - low, 1e-300)
    power = 10.0 ** math.floor(math.log10(span))
    step = next(s * power for s in (0.1, 0.2, 0.5, 1.0, 2.0) if span / (s * power) <= 8)
    first = math.floor(low / step)
    return [float(f"{i * step:.12g}") for i in range(first, math.floor(high / step) + 1)]
