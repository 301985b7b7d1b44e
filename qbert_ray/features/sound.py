"""Vectors of windows of sound: log-mel statistics, which need no weights, or a frozen audio model of `transformers`.

W windows, S samples of a window, T frames of a spectrogram, M mel bands, D width.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from qbert_ray.features.pretrained import explained

LOG_MEL = "log-mel"
FRAME_SECONDS, HOP_SECONDS = 0.032, 0.010
LOWEST_HZ = 20.0
FLOOR = 1e-6  # of a band's power, at which its logarithm is 0: 60 dB below a full-scale tone


class LogMel:
    """Statistics of a log-mel spectrogram: per band the mean, the standard deviation and the mean absolute change from frame to frame.

    Loudness, timbre and rhythm, with nothing learnt: not the meaning that a trained audio model gives.
    """

    def __init__(self, rate: int, bands: int) -> None:
        from transformers.audio_utils import mel_filter_bank

        self.rate, self.width = rate, 3 * bands
        self.frame, self.hop = (round(seconds * rate) for seconds in (FRAME_SECONDS, HOP_SECONDS))
        filters = mel_filter_bank(self.frame // 2 + 1, bands, LOWEST_HZ, rate / 2, rate, norm=None, mel_scale="htk")
        self.filters = torch.from_numpy(filters.astype(np.float32))  # [frame / 2 + 1, M]
        self.window = torch.hann_window(self.frame)

    def spectrogram(self, windows: Tensor) -> Tensor:
        """[W, T, M] logarithm (base 10) of the power in each band, above that of `FLOOR`; silence is 0."""
        short = max(0, self.frame - windows.shape[1])
        padded = torch.nn.functional.pad(windows, (0, short))
        waves = torch.stft(padded, self.frame, self.hop, window=self.window, center=False, return_complex=True)  # [W, frame / 2 + 1, T]
        power = (waves.abs() / self.window.sum() * 2).square().transpose(1, 2)  # a full-scale tone has 1 in its bin
        return (power @ self.filters).clamp_min(FLOOR).log10() - np.log10(FLOOR)

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """[W, D] vectors of windows [W, S]."""
        bands = self.spectrogram(torch.from_numpy(np.ascontiguousarray(windows, np.float32)))
        change = bands.diff(dim=1).abs().mean(1) if bands.shape[1] > 1 else torch.zeros_like(bands[:, 0])
        return torch.cat([bands.mean(1), bands.std(1, correction=0), change], dim=1).numpy()


class PretrainedAudio:
    """A frozen audio model of `transformers`, such as CLAP, AST or wav2vec 2.0: the mean of its last hidden states per window."""

    def __init__(self, model: str, dtype: str, device: str | None) -> None:
        """Load the model; takes seconds.

        Args:
            model: a hub name or folder for `AutoModel.from_pretrained`, with its feature extractor.
            dtype: of the weights.
            device: None uses a GPU if there is one.

        Raises:
            EncoderUnavailable: the weights are not on this machine and cannot be fetched.
        """
        from transformers import AutoFeatureExtractor, AutoModel

        self.device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        with explained(model, model, f"features.audio.model={LOG_MEL} (needs no weights), or the path of a model folder"):
            self.extractor = AutoFeatureExtractor.from_pretrained(model)
            self.model = AutoModel.from_pretrained(model, dtype=getattr(torch, dtype)).eval().to(self.device)
        self.rate = int(self.extractor.sampling_rate)

    @cached_property
    def width(self) -> int:
        return self(np.zeros((1, self.rate), np.float32)).shape[1]

    @torch.inference_mode()
    def __call__(self, windows: np.ndarray) -> np.ndarray:
        """[W, D] vectors of windows [W, S]."""
        inputs = self.extractor(list(windows), sampling_rate=self.rate, return_tensors="pt").to(self.device)
        inputs = {name: value.to(self.model.dtype) if value.is_floating_point() else value for name, value in inputs.items()}
        if hasattr(self.model, "get_audio_features"):  # models of sounds and texts
            found: Any = self.model.get_audio_features(**inputs)
            return (found if isinstance(found, Tensor) else found.pooler_output).float().cpu().numpy()
        hidden = self.model(**inputs).last_hidden_state
        return hidden.flatten(2).transpose(1, 2).float().mean(1).cpu().numpy() if hidden.ndim == 4 else hidden.float().mean(1).cpu().numpy()


SoundEncoder = LogMel | PretrainedAudio


def load_sound_encoder(settings: Any, device: Callable[[], str | None]) -> SoundEncoder:
    """The encoder that the settings of the kind `audio` name."""
    if settings.model == LOG_MEL:
        return LogMel(settings.sample_rate, settings.bands)
    return PretrainedAudio(settings.model, settings.dtype, device())


def windows_of(samples: np.ndarray, size: int, most: int) -> np.ndarray:
    """[W, size] windows of a sound one after the other, at most `most` of them at equal distances; what the last one lacks is silence.

    A rest of less than half a window is left out, unless there is nothing else.
    """
    count = max(1, (len(samples) + size // 2) // size)
    padded = np.pad(samples[: count * size], (0, max(0, count * size - len(samples)))).reshape(count, size)
    if count <= most:
        return padded
    return padded[np.linspace(0, count - 1, most).round().astype(int)] if most > 1 else padded[[count // 2]]
