"""Numbers as text: a few significant digits, units, proper minus signs. No HTML."""

import math

_SUPERSCRIPTS = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")
_BYTE_UNITS = ("bytes", "KiB", "MiB", "GiB", "TiB", "PiB")


def power_of_ten(exponent: int) -> str:
    """Return a power of ten as text.

    Example:
        >>> power_of_ten(-3)
        '10⁻³'
    """
    return f"10{str(exponent).translate(_SUPERSCRIPTS)}"


def number(value: float, digits: int = 3) -> str:
    """Return a number with `digits` significant digits, as a power of ten if it is very large or very small.

    Example:
        >>> number(0.00001234)
        '1.23 × 10⁻⁵'
    """
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
    """Return a whole number with thousands separators."""
    return f"{value:,}"


def percent(share: float, digits: int = 3) -> str:
    """Return a fraction as a percentage: 0.5 becomes `50 %`."""
    return f"{number(100 * share, digits)} %"


def duration(seconds: float) -> str:
    """Return a time in seconds as text, in minutes and hours from two minutes on."""
    if seconds < 120:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {rest} s"


def size(num_bytes: float) -> str:
    """Return a number of bytes as text, in the largest binary unit below it."""
    index = min(len(_BYTE_UNITS) - 1, int(math.log(num_bytes, 1024))) if num_bytes >= 1 else 0
    scaled = num_bytes / 1024**index
    return f"{scaled:.0f} bytes" if index == 0 else f"{scaled:.{0 if scaled >= 100 else 1}f} {_BYTE_UNITS[index]}"
