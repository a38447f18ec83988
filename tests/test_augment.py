import numpy as np
import pytest

from partial_fc.config import Affine
from partial_fc.data.augment import augment


def image(height: int = 20, width: int = 30) -> np.ndarray:
    return np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8)


def rng(seed: int) -> np.random.Generator:
    return np.random.Generator(np.random.Philox(seed))


def test_nothing_asked_is_nothing_done():
    np.testing.assert_array_equal(augment(image(), rng(0), False, None), image())


def test_the_flip_mirrors_half_of_the_images():
    flipped = 0
    for seed in range(1000):
        out = augment(image(), rng(seed), True, None)
        if not np.array_equal(out, image()):
            np.testing.assert_array_equal(out, image()[:, ::-1])
            flipped += 1
    assert 430 < flipped < 570  # 4.4 standard deviations about 500


def test_an_affine_map_of_no_range_is_the_identity():
    np.testing.assert_array_equal(augment(image(), rng(0), False, Affine()), image())


@pytest.mark.parametrize("affine", [Affine(degrees=10), Affine(translate=0.1), Affine(scale=0.2)])
def test_the_result_depends_on_the_generator_alone(affine):
    first, again, other = (augment(image(), rng(seed), True, affine) for seed in (1, 1, 2))
    np.testing.assert_array_equal(first, again)
    assert not np.array_equal(first, other)
    assert first.shape == image().shape and first.dtype == np.uint8


def test_the_input_is_left_as_it_is():
    before = image()
    for seed in range(8):
        augment(before, rng(seed), True, Affine(degrees=10, translate=0.1, scale=0.1))
    np.testing.assert_array_equal(before, image())


def center_of_mass(gray: np.ndarray) -> np.ndarray:
    """(x, y) of the light, counted from the image's middle."""
    height, width = gray.shape
    y, x = np.mgrid[:height, :width]
    total = gray.sum()
    return np.array([(gray * x).sum() / total - (width - 1) / 2, (gray * y).sum() / total - (height - 1) / 2])


def spot(x: int, y: int) -> np.ndarray:
    """A black image with one white block; x and y from the middle of an image of odd size."""
    out = np.zeros((81, 101, 3), np.uint8)
    out[40 + y - 2 : 40 + y + 3, 50 + x - 2 : 50 + x + 3] = 255
    return out


def moved(x: int, y: int, affine: Affine) -> np.ndarray:
    """(500, 2): where 500 draws put a spot."""
    outs = (augment(spot(x, y), rng(seed), False, affine) for seed in range(500))
    return np.stack([center_of_mass(out[..., 0].astype(float)) for out in outs])


def test_translation_fills_its_range():
    places = moved(0, 0, Affine(translate=0.2))
    np.testing.assert_allclose(places.min(axis=0), [-20.2, -16.2], atol=0.7)
    np.testing.assert_allclose(places.max(axis=0), [20.2, 16.2], atol=0.7)
    assert abs(np.corrcoef(places.T)[0, 1]) < 0.15


def test_rotation_is_about_the_middle():
    places = moved(20, 0, Affine(degrees=30))
    np.testing.assert_allclose(np.hypot(*places.T), 20, atol=0.3)
    angles = np.degrees(np.arctan2(places[:, 1], places[:, 0]))
    np.testing.assert_allclose([angles.min(), angles.max()], [-30, 30], atol=1)


def test_scale_is_about_the_middle():
    places = moved(20, 10, Affine(scale=0.3))
    factors = places[:, 0] / 20
    np.testing.assert_allclose([factors.min(), factors.max()], [np.exp(-0.3), np.exp(0.3)], atol=0.02)
    np.testing.assert_allclose(places[:, 1], factors * 10, atol=0.3)


def test_the_border_is_replicated():
    white = np.full((20, 30, 3), 255, np.uint8)
    for seed in range(20):
        moved_far = augment(white, rng(seed), True, Affine(degrees=45, translate=0.5, scale=0.5))
        np.testing.assert_array_equal(moved_far, white)


def test_a_negative_range_is_an_error():
    with pytest.raises(ValueError, match="greater than or equal to 0"):
        Affine(degrees=-1)
