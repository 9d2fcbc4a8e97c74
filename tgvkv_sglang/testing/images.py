"""Small seeded images with structure, for tests: no files, no fonts, identical on every machine."""

from __future__ import annotations

import base64
import io

import numpy as np
from PIL import Image, ImageDraw

GRID = 32
"""Side of the square of pixels that becomes one vision token of the stand-in model."""


def make_image(seed: int, width: int = 6 * GRID, height: int = 6 * GRID) -> Image.Image:
    """An RGB image of coloured cells, shapes and mild noise; with sides divisible by 32 no processor resizes it.

    Args:
        seed: seed of everything in it.
        width: width in pixels, at least 1.
        height: height in pixels, at least 1.
    """
    if width < 1 or height < 1:
        raise ValueError(f"width and height must be at least 1 pixel, got {width} x {height}")
    rng = np.random.default_rng(seed)
    cells = rng.integers(0, 256, (-(-height // GRID), -(-width // GRID), 3))
    pixels = np.kron(cells, np.ones((GRID, GRID, 1)))[:height, :width]
    pixels = np.clip(pixels + rng.normal(0, 12, pixels.shape), 0, 255).astype(np.uint8)
    image = Image.fromarray(pixels)
    draw = ImageDraw.Draw(image)
    for _ in range(max(1, width * height // (4 * GRID**2))):
        x, y = int(rng.integers(0, width)), int(rng.integers(0, height))
        radius = int(rng.integers(GRID // 4, GRID))
        colour = tuple(int(c) for c in rng.integers(0, 256, 3))
        shape = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        shape((x - radius, y - radius, x + radius, y + radius), fill=colour)
    return image


def make_pair(seed: int, width: int = 6 * GRID, height: int = 6 * GRID) -> tuple[Image.Image, Image.Image]:
    """Two images that differ in one colour channel of one pixel, by 128 of 255."""
    first = make_image(seed, width, height)
    rng = np.random.default_rng([seed, 1])
    x, y, channel = int(rng.integers(0, width)), int(rng.integers(0, height)), int(rng.integers(0, 3))
    pixels = np.array(first)
    pixels[y, x, channel] ^= 0x80
    return first, Image.fromarray(pixels)


def png_bytes(image: Image.Image) -> bytes:
    """Lossless encoding, so that a server sees the very same pixels."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()


def data_url(image: Image.Image) -> str:
    """``data:image/png;base64,...`` as OpenAI-compatible chat requests take it."""
    return "data:image/png;base64," + base64.b64encode(png_bytes(image)).decode("ascii")
