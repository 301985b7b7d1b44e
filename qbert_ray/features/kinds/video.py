"""The kind `video`: frames of a clip go through the image encoder, windows of its sound track through the sound encoder.

Both kinds of vectors are part of one modality: a frame's are the first columns, a window's the last ones, zeros elsewhere. A projection of
such vectors is a projection of each by itself, since their columns do not overlap.

B pieces, D width of both together.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import suppress
from functools import cached_property, partial
from typing import NamedTuple

import numpy as np

from qbert_ray.config.features_section import AudioEncoder as Audio
from qbert_ray.config.features_section import VideoEncoder as Settings
from qbert_ray.config.schema import Features
from qbert_ray.execution.device import own_device
from qbert_ray.features.encoders import ImageEncoder, Preprocess
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.kinds.audio import sound_windows
from qbert_ray.features.kinds.image import load_image_encoder
from qbert_ray.features.media import Limits, MediaRejected, decode_frames
from qbert_ray.features.modality import Source
from qbert_ray.features.sound import SoundEncoder, load_sound_encoder


class Piece(NamedTuple):
    """A frame, or a window of the sound track."""

    frame: np.ndarray | None  # [S, S, 3] bytes
    window: np.ndarray | None  # [samples]


class Pieces(NamedTuple):
    """Some pieces; each is in one of the two arrays."""

    number: int
    frames: dict[int, np.ndarray]  # place -> frame
    windows: dict[int, np.ndarray]  # place -> window


class Encoder(FileEncoder):
    """J is `max_frames`, and `max_windows` of the kind `audio` more where the sound track is read."""

    unit = "clips"

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.image, self.audio = features.image.model_copy(update={"grid": 1}), features.audio

    @cached_property
    def images(self) -> ImageEncoder:
        return load_image_encoder(self.image)

    @cached_property
    def sounds(self) -> SoundEncoder | None:
        return load_sound_encoder(self.audio, own_device) if self.settings.sound else None

    @property
    def width(self) -> int:
        return self.images.width + (self.sounds.width if self.sounds else 0)

    @property
    def most_pieces(self) -> int:
        return int(self.settings.max_frames + (self.audio.max_windows if self.settings.sound else 0))

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        settings = features.settings(source.modality)
        return int(settings.max_frames + (features.audio.max_windows if settings.sound else 0))

    def decoder(self) -> Callable[[bytes], list[Piece]]:
        rate = self.sounds.rate if self.sounds else None
        return partial(_pieces, settings=self.settings, preprocess=self.images.preprocess, audio=self.audio, rate=rate)

    @staticmethod
    def stack(pieces: list[Piece]) -> Pieces:
        frames = {place: piece.frame for place, piece in enumerate(pieces) if piece.frame is not None}
        windows = {place: piece.window for place, piece in enumerate(pieces) if piece.window is not None}
        return Pieces(len(pieces), frames, windows)

    def encode_pieces(self, pieces: Pieces) -> np.ndarray:
        vectors = np.zeros((pieces.number, self.width), np.float32)
        frames, windows = pieces.frames, pieces.windows
        if frames:
            vectors[list(frames), : self.images.width] = _unit(self.images(np.stack(list(frames.values())))[:, 0])
        if windows and self.sounds is not None:
            vectors[list(windows), self.images.width :] = _unit(self.sounds(np.stack(list(windows.values()))))
        return vectors[:, None]


def _pieces(content: bytes, settings: Settings, preprocess: Preprocess, audio: Audio, rate: int | None) -> list[Piece]:
    """Frames of a clip, then windows of its sound track unless `rate` is None."""
    limits = Limits(settings.max_bytes, settings.max_seconds, settings.max_pixels, settings.max_decoded)
    frames = decode_frames(content, settings.max_frames, settings.frames == "scenes", limits)
    pieces = [Piece(preprocess(frame), None) for frame in frames]
    if rate is not None:
        with suppress(MediaRejected):  # a clip without a usable sound track still has its frames
            pieces += [Piece(None, window) for window in sound_windows(content, audio, rate)]
    return pieces


def _unit(vectors: np.ndarray) -> np.ndarray:
    """Of length 1, so that neither kind outweighs the other in a mean of both."""
    return vectors / np.maximum(np.linalg.norm(vectors, axis=1, keepdims=True), 1e-9)
