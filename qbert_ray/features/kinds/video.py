"""The kind `video`: frames of a clip go through the image encoder, windows of its sound track through the sound encoder.

Both kinds of vectors are part of one modality: a frame's are the first columns, a window's the last ones, zeros elsewhere. A projection of
such vectors is a projection of each by itself, since their columns do not overlap.

B pieces, D width of both together.
"""

from __future__ import annotations

from contextlib import suppress
from typing import NamedTuple

import numpy as np
import torch

from qbert_ray.config.schema import Features
from qbert_ray.execution.device import own_device
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.kinds.audio import sound_windows
from qbert_ray.features.kinds.image import load_image_encoder
from qbert_ray.features.media import Limits, MediaRejected, decode_frames
from qbert_ray.features.modality import Source
from qbert_ray.features.sound import load_sound_encoder


class Piece(NamedTuple):
    """A frame, or a window of the sound track."""

    frame: torch.Tensor | None  # [3, S, S]
    window: np.ndarray | None  # [samples]


class Encoder(FileEncoder):
    """J is `max_frames`, and `max_windows` of the kind `audio` more where the sound track is read."""

    unit = "clips"

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.images = load_image_encoder(features.image.model_copy(update={"grid": 1}))
        self.audio = features.audio
        self.sounds = load_sound_encoder(features.audio, own_device) if self.settings.sound else None
        self.width = self.images.width + (self.sounds.width if self.sounds else 0)

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        settings = features.settings(source.modality)
        return int(settings.max_frames + (features.audio.max_windows if settings.sound else 0))

    def prepare(self, content: bytes) -> list[Piece]:
        s = self.settings
        limits = Limits(s.max_bytes, s.max_seconds, s.max_pixels, s.max_decoded)
        frames = decode_frames(content, s.max_frames, s.frames == "scenes", limits)
        pieces = [Piece(self.images.preprocess(frame), None) for frame in frames]
        if self.sounds is not None:
            with suppress(MediaRejected):  # a clip without a usable sound track still has its frames
                pieces += [Piece(None, window) for window in sound_windows(content, self.audio, self.sounds)]
        return pieces

    def encode(self, pieces: list[Piece]) -> np.ndarray:
        vectors = np.zeros((len(pieces), self.width), np.float32)
        frames = {row: piece.frame for row, piece in enumerate(pieces) if piece.frame is not None}
        windows = {row: piece.window for row, piece in enumerate(pieces) if piece.window is not None}
        if frames:
            vectors[list(frames), : self.images.width] = _unit(self.images(torch.stack(list(frames.values())))[:, 0])
        if windows and self.sounds is not None:
            vectors[list(windows), self.images.width :] = _unit(self.sounds(np.stack(list(windows.values()))))
        return vectors[:, None]


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, so that neither kind outweighs the other in a mean of both."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
