"""The kind `image`: each image of an item gives a grid of vectors, by a frozen image encoder."""

from __future__ import annotations

import numpy as np
import torch

from qbert_ray.config.schema import Features
from qbert_ray.config.schema import ImageEncoder as Settings
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import ImageEncoder, decode_image
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.modality import Source


def load_image_encoder(settings: Settings) -> ImageEncoder:
    return ImageEncoder(**settings.model_dump(exclude={"max_bytes", "max_pixels", "max_images"}), device=own_device())


class Encoder(FileEncoder):
    """J is `max_images` grids where an item may have several images, and one grid where it has one."""

    unit = "images"

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.encoder = load_image_encoder(self.settings)
        self.width, self.per_piece = self.encoder.width, self.encoder.num_vectors

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        settings, several = features.settings(source.modality), source.modality in source.domain.inputs
        return settings.grid**2 * (settings.max_images if several else 1)

    def prepare(self, content: bytes) -> list[torch.Tensor]:
        return [self.encoder.preprocess(decode_image(content, self.settings.max_bytes, self.settings.max_pixels))]

    def encode(self, pieces: list[torch.Tensor]) -> np.ndarray:
        return self.encoder(torch.stack(pieces))
