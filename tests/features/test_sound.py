"""Vectors of sounds against values worked out by hand, and audio models of `transformers` that are made here."""

import numpy as np
import pytest
import torch

from qbert_ray.config.features_section import AudioEncoder, Features
from qbert_ray.features.kinds import audio, video
from qbert_ray.features.media import MediaRejected
from qbert_ray.features.pretrained import EncoderUnavailable
from qbert_ray.features.sound import FLOOR, LogMel, PretrainedAudio, load_sound_encoder, windows_of
from qbert_ray.inputs.demo_media import encode_clip, encode_sound
from tests.hostile_media import FRAMES, RATE, TONE

HZ = 16_000


def tone(frequency, amplitude=1.0, seconds=1.0):
    return (amplitude * np.sin(2 * np.pi * frequency * np.arange(int(HZ * seconds)) / HZ)).astype(np.float32)


def test_a_tone_is_in_the_band_around_it():
    """64 bands between 20 and 8,000 Hz are equally wide in mel = 2595 log10(1 + f / 700): 31.7 mel at 20 Hz, 2840.0 at 8,000 Hz and 1000.0
    at 1,000 Hz, so that their 65 steps are 43.2 wide and 1,000 Hz is 22.4 steps up: nearest to the middle of the 22nd band."""
    encoder = LogMel(HZ, 64)
    bands = encoder.spectrogram(torch.from_numpy(tone(1000.0)[None]))[0]
    assert bands.shape == (1 + (HZ - 512) // 160, 64), "frames of 32 ms every 10 ms"
    assert set(bands.argmax(1).tolist()) == {21}


def test_ten_times_the_amplitude_is_two_more_in_the_logarithm_of_the_power():
    encoder = LogMel(HZ, 64)
    loud, soft = (encoder(tone(1000.0, amplitude)[None])[0] for amplitude in (0.5, 0.05))
    assert loud[21] - soft[21] == pytest.approx(2.0, abs=1e-3)


def test_a_full_scale_tone_in_the_middle_of_a_bin_has_the_power_of_its_bin():
    """1,000 Hz is bin 32 of 31.25 Hz: its power is 1, and those of its two neighbours, by the Hann window, a quarter each. The filter of band
    22 (middle 991.7 Hz, 38 Hz to the edges in mel) weighs them by its triangle."""
    encoder = LogMel(HZ, 64)
    mel = lambda hz: 2595 * np.log10(1 + hz / 700)  # noqa: E731
    edges = 700 * (10 ** ((mel(20.0) + np.arange(21, 24) * (mel(8000.0) - mel(20.0)) / 65) / 2595) - 1)
    weight = [min((hz - edges[0]) / (edges[1] - edges[0]), (edges[2] - hz) / (edges[2] - edges[1])) for hz in (968.75, 1000.0, 1031.25)]
    power = float(np.dot(np.clip(weight, 0, None), [0.25, 1, 0.25]))
    found = encoder.spectrogram(torch.from_numpy(tone(1000.0)[None]))[0, :, 21]
    assert found.numpy() == pytest.approx(np.full(len(found), np.log10(power / FLOOR)), abs=2e-3)


def test_vectors_are_mean_deviation_and_change_per_band(monkeypatch):
    """Bands (0, 2), (2, 2), (4, 8): means 2 and 4, deviations sqrt(8 / 3) and sqrt(8), changes (2 + 2) / 2 and (0 + 6) / 2."""
    encoder = LogMel(HZ, 2)
    monkeypatch.setattr(encoder, "spectrogram", lambda windows: torch.tensor([[[0.0, 2], [2, 2], [4, 8]]]))
    assert encoder(np.zeros((1, HZ)))[0].tolist() == pytest.approx([2, 4, (8 / 3) ** 0.5, 8**0.5, 2, 3])


def test_silence_is_zero_and_rhythm_is_change():
    encoder = LogMel(HZ, 16)
    assert not encoder(np.zeros((1, HZ), np.float32)).any()
    steady, beats = tone(500.0), tone(500.0) * (np.arange(HZ) // 1000 % 2)
    changes = encoder(np.stack([steady, beats]))[:, 32:].mean(1)
    assert changes[0] < 0.02 < 0.1 < changes[1]
    assert encoder(np.zeros((2, 100), np.float32)).shape == (2, 48), "a window shorter than a frame is filled up"


def test_windows_are_in_order_capped_and_filled_up():
    sound = np.arange(1, 11, dtype=np.float32)
    assert windows_of(sound[:9], 4, 9).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8]], "a rest of a quarter is left out"
    assert windows_of(sound, 4, 9).tolist() == [[1, 2, 3, 4], [5, 6, 7, 8], [9, 10, 0, 0]]
    assert windows_of(sound[:1], 4, 9).tolist() == [[1, 0, 0, 0]]
    assert windows_of(sound, 1, 4)[:, 0].tolist() == [1, 4, 7, 10] and windows_of(sound, 1, 1)[:, 0].tolist() == [6]


def test_an_item_has_as_many_windows_as_its_sound_up_to_j():
    encoder = audio.Encoder(Features(audio={"max_windows": 3, "window_seconds": 0.25}), "audio", 3)
    decode = encoder.decoder()
    pieces = decode(encode_sound(TONE, RATE, "wav", "pcm_s16le"))
    assert len(pieces) == 3 and {len(piece) for piece in pieces} == {4000}
    assert encoder.encode_pieces(encoder.stack(pieces)).shape == (3, 1, 192)
    with pytest.raises(MediaRejected, match="silent"):
        decode(encode_sound(0 * TONE, RATE, "wav", "pcm_s16le"))


def test_a_clip_has_frames_in_the_first_columns_and_its_sound_in_the_last():
    features = Features(image={"image_size": 64}, video={"max_frames": 2}, audio={"max_windows": 1, "bands": 8})
    encoder = video.Encoder(features, "video", 3)
    decode = encoder.decoder()
    vectors = encoder.encode_pieces(encoder.stack(decode(encode_clip(FRAMES, 4, "mp4", "mpeg4", TONE, RATE, "aac"))))[:, 0]
    assert vectors.shape == (3, 1280 + 24) and np.linalg.norm(vectors, axis=1) == pytest.approx([1, 1, 1])
    assert not vectors[:2, 1280:].any() and not vectors[2, :1280].any()
    assert len(decode(encode_clip(FRAMES, 4, "mp4", "mpeg4"))) == 2, "without a sound track there are the frames"
    silent = video.Encoder(features.model_copy(update={"video": features.video.model_copy(update={"sound": False})}), "video", 2)
    frames = silent.stack(silent.decoder()(encode_clip(FRAMES, 4, "gif", "gif")))
    assert silent.width == 1280 and silent.encode_pieces(frames).shape == (2, 1, 1280)


# models of transformers, small and random


def save_wav2vec2(folder):
    from transformers import Wav2Vec2Config, Wav2Vec2FeatureExtractor, Wav2Vec2Model

    torch.manual_seed(0)
    sizes = {
        "hidden_size": 16,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "intermediate_size": 16,
        "num_conv_pos_embedding_groups": 2,
    }
    Wav2Vec2Model(Wav2Vec2Config(conv_dim=(8, 8), conv_kernel=(10, 8), conv_stride=(20, 16), **sizes)).save_pretrained(folder)
    Wav2Vec2FeatureExtractor(sampling_rate=HZ).save_pretrained(folder)


def save_clap(folder):
    from transformers import ClapConfig, ClapFeatureExtractor, ClapModel

    torch.manual_seed(0)
    sound = {
        "num_hidden_layers": 4,
        "depths": [1, 1, 1, 1],
        "num_attention_heads": [1, 1, 1, 1],
        "patch_embeds_hidden_size": 8,
        "hidden_size": 64,
    }
    text = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16, "vocab_size": 32}
    ClapModel(ClapConfig(audio_config=sound, text_config=text, projection_dim=12)).save_pretrained(folder)
    ClapFeatureExtractor(feature_size=64, sampling_rate=48_000, truncation="rand_trunc").save_pretrained(folder)


@pytest.mark.parametrize(("save", "rate", "width"), [(save_wav2vec2, HZ, 16), (save_clap, 48_000, 12)])
def test_audio_models_give_a_vector_per_window_whatever_the_batch(tmp_path, save, rate, width):
    save(tmp_path)
    encoder = load_sound_encoder(AudioEncoder(model=str(tmp_path)), lambda: "cpu")
    assert isinstance(encoder, PretrainedAudio) and (encoder.rate, encoder.width) == (rate, width)
    windows = np.random.default_rng(0).normal(0, 0.1, (3, rate)).astype(np.float32)
    together = encoder(windows)
    assert together.shape == (3, width) and not np.allclose(together[0], together[1])
    assert np.concatenate([encoder(window[None]) for window in windows]) == pytest.approx(together, abs=1e-4)


def test_a_model_that_is_not_there_names_what_needs_none(tmp_path):
    with pytest.raises(EncoderUnavailable, match="features.audio.model=log-mel"):
        load_sound_encoder(AudioEncoder(model="nobody/none"), lambda: "cpu")
