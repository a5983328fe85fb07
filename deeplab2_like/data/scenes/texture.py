"""Texture, uneven light and sensor noise of an image: the part of a scene that polygons do not show."""

import dataclasses

import cv2
import numpy as np

from deeplab2_like.data.scenes.classes import INFO

# Strength of the coarse and of the fine texture by class, in gray levels. Instances, crowds and void have the default.
_COARSE_TEXTURE = (3.0, 4.0, 20.0, 6.0, 5.0, 4.0, 5.0, 7.0, 4.0)
_FINE_TEXTURE = (0.5, 3.0, 11.0, 5.0, 3.0, 1.5, 3.0, 3.0, 1.5)
_DEFAULT_TEXTURE = (4.0, 3.0)


@dataclasses.dataclass(frozen=True)
class Lighting:
    """Light and noise of an image.

    Attributes:
        tint: float32 [3], factor of red, green, blue.
        coarse_texture: float32 [40, 80], standard normal.
        uneven_light: float32 [4, 6], factors about 1.
        sensor_noise: Standard deviation in gray levels.
    """

    tint: np.ndarray
    coarse_texture: np.ndarray
    uneven_light: np.ndarray
    sensor_noise: float

    @classmethod
    def random(cls, rng: np.random.Generator) -> "Lighting":
        """Draws light and noise."""
        gain = rng.uniform(0.75, 1.1)
        return cls(
            tint=(gain * rng.uniform(0.95, 1.05, 3)).astype(np.float32),
            coarse_texture=rng.standard_normal((40, 80), np.float32),
            uneven_light=rng.uniform(0.82, 1.12, (4, 6)).astype(np.float32),
            sensor_noise=rng.uniform(1.0, 5.0),
        )


def add_texture(
    lighting: Lighting, colors: np.ndarray, segments: np.ndarray, noise_rng: np.random.Generator
) -> np.ndarray:
    """Adds texture, uneven light and sensor noise.

    Args:
        lighting: Light and noise of the image.
        colors: float32 [H, W, 3], 0..255; changed in place.
        segments: uint8 [H, W], the segment numbers of `render`, which choose the texture.
        noise_rng: Source of the fine texture and of the sensor noise. It is not the one of the scene, because the
            number of draws depends on the size.

    Returns:
        uint8 [H, W, 3].
    """
    height, width = segments.shape
    strength = np.zeros((256, 2), np.float32)
    strength[:] = _DEFAULT_TEXTURE
    strength[: INFO.num_classes] = np.stack([_COARSE_TEXTURE, _FINE_TEXTURE], axis=1)
    texture = cv2.resize(lighting.coarse_texture, (width, height), interpolation=cv2.INTER_CUBIC)
    texture *= strength[:, 0][segments]
    texture += strength[:, 1][segments] * noise_rng.standard_normal((height, width), np.float32)
    light = cv2.resize(lighting.uneven_light, (width, height), interpolation=cv2.INTER_CUBIC)
    colors += texture[..., None]
    colors *= light[..., None] * lighting.tint
    if lighting.sensor_noise > 0:
        colors += np.float32(lighting.sensor_noise) * noise_rng.standard_normal((height, width, 3), np.float32)
    return np.rint(colors.clip(0, 255)).astype(np.uint8)
