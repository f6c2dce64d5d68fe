"""Photographs as tables of pixels, and back."""

import io
import os
from pathlib import Path
from typing import Any, Literal

import numpy as np

from torchem.errors import InvalidFile, describe, one_of, require

Colour = Literal["rgb", "lab"]

#: Names of the columns that a pixel's colour is read into.
CHANNELS: dict[str, list[str]] = {"rgb": ["red", "green", "blue"], "lab": ["lightness", "green_red", "blue_yellow"]}

# sRGB primaries under the D65 white. Source: IEC 61966-2-1 (1999).
_XYZ = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]])
_WHITE = _XYZ.sum(1)
_KINK = 6 / 29


def read_image(path: str | os.PathLike[str]) -> np.ndarray:
    """Read a photograph as RGB ``[H, W, 3]`` of bytes, upright as its EXIF orientation says.

    Args:
        path: Any format that Pillow reads.

    Raises:
        InvalidFile: If the file is missing or no image.
        MissingExtra: If Pillow is not installed.
    """
    pillow: Any = require("PIL.Image", "plot")
    operations: Any = require("PIL.ImageOps", "plot")
    if not Path(path).is_file():
        raise InvalidFile(describe(str(path), "an image", "no such file", "check the path"))
    try:
        with pillow.open(path) as image:
            return np.asarray(operations.exif_transpose(image).convert("RGB"))
    except (OSError, ValueError, SyntaxError, pillow.DecompressionBombError) as error:
        reason = "nothing that Pillow can read" if "cannot identify" in str(error) else str(error)
        raise InvalidFile(describe(str(path), "an image", reason, "convert it to PNG or JPEG")) from error


def to_png(image: np.ndarray) -> bytes:
    """PNG of RGB ``[H, W, 3]`` in [0, 1].

    Example:
        >>> to_png(np.zeros((2, 2, 3)))[1:4]
        b'PNG'
    """
    pillow: Any = require("PIL.Image", "plot")
    stream = io.BytesIO()
    pillow.fromarray((image.clip(0, 1) * 255).round().astype(np.uint8)).save(stream, format="PNG")
    return stream.getvalue()


def to_pixels(image: np.ndarray, colour: Colour = "rgb") -> np.ndarray:
    """Colours ``[H·W, 3]`` of an image of bytes: RGB in [0, 1], or CIE L*a*b*, whose distances the eye sees alike.

    Raises:
        InvalidArgument: For an unknown colour space.

    Example:
        >>> to_pixels(np.full((1, 1, 3), 255, np.uint8), "lab").round(3).tolist()
        [[100.0, 0.0, 0.0]]
    """
    one_of("colour", colour, CHANNELS)
    pixels = image.reshape(-1, 3) / 255.0
    return pixels if colour == "rgb" else _to_lab(pixels)


def to_rgb(colours: np.ndarray, colour: Colour = "rgb") -> np.ndarray:
    """RGB in [0, 1] of colours that `to_pixels` made.

    Example:
        >>> to_rgb(np.array([[0.2, 0.3, 0.4]])).tolist()
        [[0.2, 0.3, 0.4]]
    """
    one_of("colour", colour, CHANNELS)
    return (colours if colour == "rgb" else _from_lab(colours)).clip(0, 1)


def painted(image: np.ndarray, labels: np.ndarray, colours: np.ndarray | None = None) -> np.ndarray:
    """The image with each pixel in the colour of its component, in [0, 1].

    Args:
        image: ``[H, W, 3]`` bytes.
        labels: ``[H, W]``.
        colours: ``[K, 3]`` in [0, 1]; the mean colour of each component's pixels when None.

    Example:
        >>> painted(np.zeros((1, 2, 3), np.uint8), np.array([[0, 1]])).shape
        (1, 2, 3)
    """
    return (mean_colours(image / 255.0, labels) if colours is None else colours)[labels]


def mean_colours(picture: np.ndarray, labels: np.ndarray) -> np.ndarray:
    """Mean colour ``[K, 3]`` of the pixels of each label."""
    flat, k = labels.ravel(), int(labels.max()) + 1
    count = np.maximum(np.bincount(flat, minlength=k), 1)
    return np.stack([np.bincount(flat, picture[..., c].ravel(), minlength=k) / count for c in range(3)], 1)


def _to_lab(rgb: np.ndarray) -> np.ndarray:
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    t = linear @ _XYZ.T / _WHITE
    f = np.where(t > _KINK**3, np.cbrt(t), t / (3 * _KINK**2) + 4 / 29)
    return np.stack([116 * f[:, 1] - 16, 500 * (f[:, 0] - f[:, 1]), 200 * (f[:, 1] - f[:, 2])], 1)


def _from_lab(lab: np.ndarray) -> np.ndarray:
    y = (lab[:, 0] + 16) / 116
    f = np.stack([y + lab[:, 1] / 500, y, y - lab[:, 2] / 200], 1)
    t = np.where(f > _KINK, f**3, 3 * _KINK**2 * (f - 4 / 29))
    linear = np.clip((t * _WHITE) @ np.linalg.inv(_XYZ).T, 0, None)
    return np.where(linear <= 0.0031308, linear * 12.92, 1.055 * linear ** (1 / 2.4) - 0.055)
