"""The kind `image`: each image of an item gives a grid of vectors, by a frozen image encoder."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from qbert_ray.config.schema import Features
from qbert_ray.config.schema import ImageEncoder as Settings
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import ImageEncoder, Preprocess, decode_image
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.modality import Source


def load_image_encoder(settings: Settings) -> ImageEncoder:
    return ImageEncoder(**settings.model_dump(exclude={"max_bytes", "max_pixels", "max_images"}), device=own_device())


class Encoder(FileEncoder):
    """J is `max_images` grids where an item may have several images, and one grid where it has one."""

    unit = "images"

    @cached_property
    def encoder(self) -> ImageEncoder:
        return load_image_encoder(self.settings)

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def per_piece(self) -> int:
        return int(self.settings.grid**2)

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        settings, several = features.settings(source.modality), source.modality in source.domain.inputs
        return settings.grid**2 * (settings.max_images if several else 1)

    def decoder(self) -> Callable[[bytes], list[np.ndarray]]:
        return partial(_pixels, preprocess=self.encoder.preprocess, settings=self.settings)

    def encode_pieces(self, pieces: np.ndarray) -> np.ndarray:
        return self.encoder(pieces)


def _pixels(content: bytes, preprocess: Preprocess, settings: Settings) -> list[np.ndarray]:
    """[S, S, 3] bytes of the one piece of an image."""
    return [preprocess(decode_image(content, settings.max_bytes, settings.max_pixels))]
