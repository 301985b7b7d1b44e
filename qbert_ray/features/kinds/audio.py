"""The kind `audio`: windows of a sound give one vector each; also of the sound track of a clip."""

from __future__ import annotations

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

    def __init__(self, features: Features, modality: str, num_vectors: int) -> None:
        super().__init__(features, modality, num_vectors)
        self.encoder = load_sound_encoder(self.settings, own_device)
        self.width = self.encoder.width

    @staticmethod
    def vectors_of(features: Features, source: Source) -> int:
        return int(features.settings(source.modality).max_windows)

    def prepare(self, content: bytes) -> list[np.ndarray]:
        return sound_windows(content, self.settings, self.encoder)

    def encode(self, pieces: list[np.ndarray]) -> np.ndarray:
        return self.encoder(np.stack(pieces))[:, None]


def sound_windows(content: bytes, settings: Settings, encoder: SoundEncoder) -> list[np.ndarray]:
    """[S] samples of each window of a sound.

    Raises:
        MediaRejected: with the reason.
    """
    samples = decode_sound(content, encoder.rate, Limits(settings.max_bytes, settings.max_seconds))
    if np.abs(samples).max() < 1e-4:  # -80 dB
        raise MediaRejected("silent")
    return list(windows_of(samples, max(1, round(settings.window_seconds * encoder.rate)), settings.max_windows))
