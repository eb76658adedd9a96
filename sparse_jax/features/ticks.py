"""Round numbers for the axes of charts, and numbers written short, as people do."""

import math
import re


def short_number(value: float, digits: int = 3) -> str:
    """A number with `digits` significant digits, written as people do: `0.0312`, `8.3`, `12,480`, `3.1e-5`, `∞`."""
    value = float(value)
    if not math.isfinite(value):
        return "nan" if math.isnan(value) else "−∞" if value < 0 else "∞"
    if 1000 <= abs(value) < 1e9:
        return f"{value:,.0f}".replace("-", "−")
    text = f"{value:.{digits}g}"
    return _signed(re.sub(r"e([+-])0*(\d)", lambda m: "e" + m[1].strip("+") + m[2], text))


def _signed(text: str) -> str:
    return "−" + text[1:] if text.startswith("-") else text


def tick_labels(ticks: list[float], *, log: bool = False) -> list[str]:
    """Labels for an axis: `0`, `500k`, `1M`; `0.3`; `1e-4`. Powers of ten where all of a linear axis is small."""
    powers = log or max((abs(tick) for tick in ticks), default=0.0) < 1e-3
    return [_tick_label(tick, powers) for tick in ticks]


def _tick_label(value: float, powers: bool) -> str:
    size = abs(value)
    if size >= 1e15 or 0 < size < (1e-3 if powers else 1e-5):
        mantissa, exponent = f"{value:.8e}".split("e")
        return _signed(f"{float(mantissa):.10g}e{int(exponent)}")
    for scale, suffix in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if size >= scale:
            return _signed(f"{value / scale:.10g}{suffix}")
    return _signed(f"{value:.10g}")


def nice_step(raw: float) -> float:
    """The smallest of 1, 2, 5 times a power of ten that is at least `raw`."""
    power = 10.0 ** math.floor(math.log10(raw))
    return power * next(m for m in (1, 2, 5, 10) if m * power >= raw * (1 - 1e-9))


def linear_ticks(low: float, high: float, count: int = 5) -> list[float]:
    """About `count` round values, 1, 2 or 5 times a power of ten apart, from `low` to `high` (low < high)."""
    return multiples_of(nice_step((high - low) / count), low, high)


def multiples_of(step: float, low: float, high: float) -> list[float]:
    """Those of `step` from `low` to `high`, without the dust of adding it up."""
    first, last = math.ceil(low / step - 1e-6), math.floor(high / step + 1e-6)
    return [float(f"{i * step:.12g}") for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int = 6) -> list[float]:
    """Powers of ten from `low` to `high` (0 < low < high), every second, third, ... of them where there are many.

    Within less than two powers of ten: 1, 2 and 5 times a power, or more of its multiples where those are few; within
    very little, the ticks of a linear axis.
    """
    first, last = math.ceil(math.log10(low) - 1e-9), math.floor(math.log10(high) + 1e-9)
    powers = list(range(first, last + 1))
    if len(powers) > 2 or (len(powers) == 2 and high / low > 50):
        stride = math.ceil(len(powers) / count)
        return [float(f"1e{p}") for p in powers if p % stride == 0]
    for multiples in ((1, 2, 5), (1, 2, 3, 5, 7), (1, 1.5, 2, 3, 4, 5, 6, 8)):
        fine = [float(f"{m}e{p}") for p in range(first - 1, last + 1) for m in multiples]
        fine = [tick for tick in fine if low * (1 - 1e-9) <= tick <= high * (1 + 1e-9)]
        if len(fine) > 2:
            return fine
    return linear_ticks(low, high, count - 2)
