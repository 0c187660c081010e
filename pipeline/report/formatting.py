"""Numbers as people read them: a few significant digits, a unit, true minus signs. Text only; no HTML."""

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def power_of_ten(exponent: int) -> str:
    """`10⁻³`."""
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def number(value: float, digits: int = 3) -> str:
    """A number to `digits` significant digits, as a power of ten where it is very large or very small."""
    if not math.isfinite(value):
        return "not a number" if math.isnan(value) else "∞" if value > 0 else "−∞"
    magnitude = abs(value)
    if magnitude == 0 or 1e-3 <= magnitude < 1e5:
        shown = f"{value:,.{digits}g}" if magnitude < 10**digits else f"{value:,.0f}"
        return shown.replace("-", "−")
    mantissa, _, exponent = f"{value:.{digits - 1}e}".partition("e")
    mantissa = mantissa.rstrip("0").rstrip(".") if "." in mantissa else mantissa
    power = power_of_ten(int(exponent))
    return power if mantissa == "1" else f"{mantissa} × {power}".replace("-", "−")


def count(value: int) -> str:
    """A whole number with its thousands apart."""
    return f"{value:,}"


def percent(share: float, digits: int = 3) -> str:
    """A share of one, as per cent."""
    return f"{number(100 * share, digits)} %"


def duration(seconds: float) -> str:
    """Seconds, or minutes and hours where there are many."""
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(num_bytes: float) -> str:
    """Bytes in the binary unit that fits."""
    index = min(len(_BYTE_UNITS) - 1, int(math.log(num_bytes, 1024))) if num_bytes >= 1 else 0
    scaled = num_bytes / 1024**index
    return f"{scaled:.0f} bytes" if index == 0 else f"{scaled:.{0 if scaled >= 100 else 1}f} {_BYTE_UNITS[index]}"
