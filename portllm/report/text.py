"""How numbers are written, on the terminal and on the page. Scores that are shares are shown in points (percent)."""

from collections.abc import Mapping
from typing import Any

from portllm.report.statistics import Comparison, Estimate

NOTHING = "–"
MINUS = "\N{MINUS SIGN}"


def points(value: float, scale: float = 100) -> str:
    """0.842 → `84.2`; with scale 1 (a metric that is no share, such as perplexity) `0.842`."""
    return f"{scale * value:.1f}" if scale == 100 else f"{scale * value:.4g}"


def share(margin: float) -> str:
    """0.02 → `2`, 0.0025 → `0.25`: points, or percent."""
    return f"{100 * margin:g}"


def signed(value: float, scale: float = 100) -> str:
    """A difference with its sign: `+1.2`, `−0.4`, `0.0`."""
    text = points(abs(value), scale)
    if not float(text):
        return text
    return ("+" if value > 0 else MINUS) + text


def score(estimate: Estimate | None, scale: float = 100) -> str:
    """`84.2 ±1.1`."""
    return NOTHING if estimate is None else points(estimate.value, scale) + error(estimate.stderr, scale)


def difference(comparison: Comparison | None, scale: float = 100) -> str:
    """`+1.2 ±0.8`; a negative scale turns the comparison round."""
    if comparison is None:
        return NOTHING
    sign = 1 if scale > 0 else -1
    return signed(sign * comparison.difference, abs(scale)) + error(comparison.stderr, abs(scale))


def error(stderr: float | None, scale: float = 100) -> str:
    """` ±1.1`, with its space; nothing where no error is known."""
    return "" if stderr is None else f" ±{points(stderr, scale)}"


def interval(comparison: Comparison | None, scale: float = 100) -> str:
    """`−0.3 to +1.2`."""
    if comparison is None or comparison.low is None or comparison.high is None:
        return NOTHING
    return f"{signed(comparison.low, scale)} to {signed(comparison.high, scale)}"


def percent(share: float | None) -> str:
    """A share in whole percent: `71%`, `−11%`."""
    if share is None:
        return NOTHING
    text = f"{100 * abs(share):.0f}%"
    return MINUS + text if share < 0 and text != "0%" else text


def chance(probability: float | None) -> str:
    """A probability in whole percent, never a flat 0 or 100: `98%`, `>99%`, `<1%`."""
    if probability is None:
        return NOTHING
    if not 0.01 <= probability <= 0.99:
        return "<1%" if probability < 0.5 else ">99%"
    return f"{100 * probability:.0f}%"


def seconds(value: float | None) -> str:
    """`0.8 s`, `42 s`, `3.5 min`, `2.4 h`."""
    if value is None:
        return NOTHING
    for limit, size, unit in ((10, 1, "s"), (120, 1, "s"), (7200, 60, "min")):
        if value < limit:
            return f"{value / size:.{0 if unit == 's' and value >= 10 else 1}f} {unit}"
    return f"{value / 3600:,.1f} h"


def hours(value: float | None) -> str:
    """Device hours with three digits that matter: `0.00231`, `1.42`, `350`."""
    if value is None:
        return NOTHING
    if value == 0:
        return "0"
    hour = value / 3600
    return f"{hour:,.0f}" if hour >= 100 else f"{hour:#.3g}"


def count(value: float | None) -> str:
    """`812`, `20.0M`."""
    if value is None:
        return NOTHING
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):.1f}{unit}"
    return f"{value:,.0f}"


def size(value: float | None) -> str:
    """Bytes: `350 MB`, `28.7 GB` (powers of ten)."""
    if value is None:
        return NOTHING
    return f"{value / 1e9:.1f} GB" if value >= 1e9 else f"{value / 1e6:.0f} MB"


def energy(joules: float | None) -> str:
    """`840 J`, `1.20 kWh`."""
    if joules is None:
        return NOTHING
    return f"{joules:,.0f} J" if joules < 3.6e5 else f"{joules / 3.6e6:,.2f} kWh"


def described(value: Any) -> str:
    """A setting of a study file in one line: `path: …, rank: 8`."""
    if isinstance(value, Mapping):
        return ", ".join(f"{name}: {described(part)}" for name, part in value.items() if part not in (None, {}, [], ()))
    if isinstance(value, (list, tuple)):
        return "; ".join(described(part) for part in value)
    return str(value)
