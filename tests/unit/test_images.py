"""The images that tests are made of."""

import io

import numpy as np
import pytest
from PIL import Image

from tgvkv_sglang.testing.images import data_url, make_image, make_pair, png_bytes


@pytest.mark.parametrize(("width", "height"), [(64, 64), (192, 128), (100, 33), (1, 1)])
def test_size_and_determinism(width, height):
    image = make_image(7, width, height)
    assert image.size == (width, height)
    assert image.mode == "RGB"
    assert png_bytes(image) == png_bytes(make_image(7, width, height))
    assert png_bytes(image) != png_bytes(make_image(8, width, height))


def test_every_token_of_an_image_is_different():
    pixels = np.array(make_image(0, 192, 192)).reshape(6, 32, 6, 32, 3).transpose(0, 2, 1, 3, 4)
    assert len({cell.tobytes() for row in pixels for cell in row}) == 36


@pytest.mark.parametrize("seed", range(5))
def test_a_pair_differs_in_one_channel_of_one_pixel(seed):
    first, second = (np.array(image).astype(int) for image in make_pair(seed, 96, 64))
    difference = np.abs(first - second)
    assert np.count_nonzero(difference) == 1
    assert difference.max() == 128
    assert (first == np.array(make_image(seed, 96, 64))).all()


def test_encoding_is_lossless():
    image = make_image(1)
    assert (np.array(Image.open(io.BytesIO(png_bytes(image)))) == np.array(image)).all()
    assert data_url(image).startswith("data:image/png;base64,iVBOR")


def test_bad_size():
    with pytest.raises(ValueError, match="at least 1 pixel, got 0 x 5"):
        make_image(0, 0, 5)
