"""The kind `audio`: windows of a sound give one vector each; also of the sound track of a clip."""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property, partial

import numpy as np

from qbert_ray.config.features_section import AudioEncoder as Settings
from qbert_ray.config.schema import Features
from qbert_ray.execution.device import own_device
from qbert_ray.features.files import FileEncoder
from qbert_ray.features.media import Limits, MediaRejected, decode_sound
from qbert_ray.features.modality import Source
from qbert_ray.features.sound import SoundEncoder, load_sound_encoder, windows_of


class Encoder(FileEncoder):
    """J is `max_windows`, whatever the number of sounds of an item."""

    unit = "sounds"

    @cached_property
    def encoder(self) -> SoundEncoder:
        return load_sound_encoder(self.settings, own_device)

    @property
    def width(self) -> int:
        return self.encoder.width

    @property
    def most_pieces(self) -> int:
        return int(self.settings.max_windows)

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return int(features.settings(source.modality).max_windows)

    def decoder(self) -> Callable[[bytes], list[np.ndarray]]:
        return partial(sound_windows, settings=self.settings, rate=self.encoder.rate)

    def encode_pieces(self, pieces: np.ndarray) -> np.ndarray:
        return self.encoder(pieces)[:, None]


def sound_windows(content: bytes, settings: Settings, rate: int) -> list[np.ndarray]:
    """[S] samples of each window of a sound.

    Args:
        rate: Hz of the samples.

    Raises:
        MediaRejected: with the reason.
    """
    samples = decode_sound(content, rate, Limits(settings.max_bytes, settings.max_seconds))
    if np.abs(samples).max() < 1e-4:  # -80 dB
        raise MediaRejected("silent")
    return list(windows_of(samples, max(1, round(settings.window_seconds * rate)), settings.max_windows))
