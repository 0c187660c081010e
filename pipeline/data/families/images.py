"""Decoding images (PNG, JPEG, …). Pixels of more than eight bits are refused, since they would have to be rescaled.

Axes: channels, height, width.
"""

import io

import numpy as np
from jaxtyping import Float32
from PIL import Image, UnidentifiedImageError

from nntk_dist.errors import DataError

GREY_MODES = ("1", "L")


def decode_image(data: bytes | None, *, what: str) -> Float32[np.ndarray, "channels height width"]:
    """Decode an image to values in [0, 1]: one channel if it is grey, otherwise red, green and blue.

    Args:
        data: the encoded image.
        what: names the image in messages.

    Raises:
        DataError: there are no bytes, they are no readable image, or a pixel has more than eight bits.
    """
    if not data:
        raise DataError(f"{what} has no image bytes; store the encoded images in the column itself")
    try:
        with Image.open(io.BytesIO(data)) as image:
            if image.mode[0] in "IF":
                raise DataError(f"{what} has pixels of more than 8 bits (mode {image.mode}); convert it to 8 bits")
            pixels = np.asarray(image.convert("L" if image.mode in GREY_MODES else "RGB"))
    except (UnidentifiedImageError, OSError, SyntaxError, Image.DecompressionBombError) as error:
        reason = "unknown format" if isinstance(error, UnidentifiedImageError) else str(error)
        raise DataError(f"{what} cannot be decoded as an image ({reason}); remove or repair it") from error
    pixels = pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)
    return pixels / np.float32(255)
