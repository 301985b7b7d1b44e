"""Sounds and clips: decoded as they are, within the limits, and rejected with a reason where they cannot be used."""

import json

import av
import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from qbert_ray.config.loading import load_config
from qbert_ray.features import media
from qbert_ray.features.media import Limits, MediaRejected, decode_frames, decode_sound
from qbert_ray.features.stage import EncodePart
from qbert_ray.inputs.demo_media import encode_clip, encode_sound
from qbert_ray.storage.columns import BYTES_PREFIX, PATH_PREFIX, to_numpy
from qbert_ray.storage.directory import RunDir
from tests.hostile_media import FRAMES, PLAYLISTS, RATE, TONE, clip_files, hostile_files, sound_files, wav

LIMITS = Limits(max_bytes=10**7, max_seconds=20)


@pytest.mark.parametrize("name", ["wav", "flac", "ogg", "mp3"])
def test_a_tone_stays_a_tone_in_every_format(name):
    samples = decode_sound(sound_files()[name], RATE, LIMITS)
    assert abs(len(samples) - RATE) < 0.15 * RATE and samples.dtype == np.float32
    spectrum = np.abs(np.fft.rfft(samples))
    assert np.argmax(spectrum) * RATE / len(samples) == pytest.approx(440, abs=3)
    assert np.abs(samples[RATE // 4 : RATE // 2]).max() == pytest.approx(0.5, abs=0.06)


def test_sounds_become_mono_at_the_wanted_rate():
    stereo = encode_sound(np.stack([TONE, -0.5 * TONE]), RATE, "wav", "pcm_s16le")
    samples = decode_sound(stereo, 4000, LIMITS)
    assert len(samples) == pytest.approx(4000, abs=2)
    assert np.abs(samples[1000:3000]).max() == pytest.approx(0.125, abs=0.02), "the mean of .5 and -.25"


def test_a_sound_may_change_its_channels_on_the_way():
    """Two files that were put together, one after the other."""
    mono, stereo = (encode_sound(samples, RATE, "flac", "flac") for samples in (TONE, np.stack([TONE, TONE])))
    for content in (mono + stereo, stereo + mono):
        samples = decode_sound(content, RATE, LIMITS)
        assert len(samples) == 2 * RATE
        assert np.abs(samples[: RATE // 4]).max() > 0.3 and np.abs(samples[-RATE // 4 :]).max() > 0.3
    mp3 = [encode_sound(samples, rate, "mp3", "libmp3lame") for samples, rate in ((TONE, 44_100), (np.stack([TONE, TONE]), 22_050))]
    assert len(decode_sound(b"".join(mp3), RATE, LIMITS)) > 0.15 * RATE


def test_only_the_first_seconds_are_decoded(monkeypatch):
    frames, decoded = [], media._decoded
    monkeypatch.setattr(media, "_decoded", lambda *given: (frames.append(frame.samples) or frame for frame in decoded(*given)))
    assert len(decode_sound(sound_files()["wav"], RATE, Limits(10**7, 0.25))) == RATE // 4
    endless = wav(length=2**32 - 1, samples=b"\1\2" * (60 * RATE))
    frames.clear()
    assert len(decode_sound(endless, RATE, Limits(10**7, 2))) == 2 * RATE
    assert sum(frames) < 2 * RATE + 2 * media.BLOCK < 30 * RATE, "the rest of the file is not read"


def test_numbers_that_are_none_do_not_pass():
    samples = decode_sound(
        next(content for content in hostile_files() if b"data" in content and b"\x00\x00\xc0\x7f" in content[:64]), RATE, LIMITS
    )
    assert np.isfinite(samples).all() and np.abs(samples).max() <= 1


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "empty file"),
        (b"text", "not a sound or clip"),
        (bytes(20_000_000), "too many bytes"),
        (wav(rate=500), "odd sample rate"),
        (wav(rate=500_000), "odd sample rate"),
        (wav(channels=17), "too many channels"),
        (wav(samples=b""), "no samples"),
        (b"fLaC" + bytes(50), "cannot be opened"),
        *((text.encode(), "not a sound or clip") for text in PLAYLISTS),
    ],
)
def test_what_is_no_usable_sound_is_rejected_with_the_reason(content, reason):
    with pytest.raises(MediaRejected, match=f"^{reason}$"):
        decode_sound(content, RATE, LIMITS)


def test_a_clip_without_a_sound_track_and_a_sound_without_a_film_are_said_to_be_that():
    with pytest.raises(MediaRejected, match="no sound track"):
        decode_sound(clip_files()["silent mp4"], RATE, LIMITS)
    with pytest.raises(MediaRejected, match="no film"):
        decode_frames(sound_files()["mp3"], 4, False, LIMITS)


# clips


@pytest.mark.parametrize("name", ["mp4", "silent mp4", "webm", "gif"])
def test_frames_at_equal_distances_are_those_in_the_middles_of_equal_parts(name):
    """Of eight frames whose red is 0, 20, 40, ...: of four parts the frames 1, 3, 5 and 7, of two the frames 2 and 6."""
    content = clip_files()[name]
    for count, wanted in ((4, [20, 60, 100, 140]), (2, [40, 120]), (20, range(0, 160, 20))):
        frames = decode_frames(content, count, False, LIMITS)
        assert [frame.getpixel((30, 20))[0] for frame in frames] == pytest.approx(list(wanted), abs=25)
        assert {frame.size for frame in frames} == {(64, 48)}


def test_a_long_clip_is_thinned_out_in_one_pass():
    """100 frames, every second, then every fourth, then every eighth of which is kept while four times two would be in memory."""
    frames = [FRAMES[0].point(lambda _, n=n: 2 * n) for n in range(100)]
    found = decode_frames(encode_clip(frames, 25, "mp4", "libx264"), 2, False, LIMITS)
    assert [frame.getpixel((5, 5))[0] for frame in found] == pytest.approx([50, 150], abs=20)


def test_scenes_are_the_first_frame_and_the_largest_changes():
    greys = [10] * 4 + [200] * 4 + [210] * 4 + [60] * 4
    frames = [FRAMES[0].point(lambda _, grey=grey: grey) for grey in greys]
    found = decode_frames(encode_clip(frames, 8, "mp4", "libx264"), 3, True, LIMITS)
    assert [frame.getpixel((5, 5))[0] for frame in found] == pytest.approx([10, 200, 60], abs=12)


def test_frames_are_no_larger_than_needed():
    wide = [frame.resize((1024, 256)) for frame in FRAMES]
    assert {frame.size for frame in decode_frames(encode_clip(wide, 4, "mp4", "mpeg4"), 2, False, LIMITS)} == {(512, 128)}


def test_limits_on_pixels_seconds_and_frames_hold_while_decoding():
    content = clip_files()["mp4"]
    with pytest.raises(MediaRejected, match="too many pixels"):
        decode_frames(content, 4, False, Limits(10**7, 20, max_pixels=64 * 48 - 1))
    one = decode_frames(content, 8, False, Limits(10**7, 20, max_decoded=3))
    assert [frame.getpixel((30, 20))[0] for frame in one] == pytest.approx([0, 20, 40], abs=25)
    assert len(decode_frames(content, 8, False, Limits(10**7, 0.5))) == 3  # at 0, .25 and .5 s


def test_a_file_that_takes_too_long_is_left(monkeypatch):
    monkeypatch.setattr(media, "WAIT_SECONDS", -1.0)
    for decode in (lambda: decode_sound(sound_files()["wav"], RATE, LIMITS), lambda: decode_frames(clip_files()["gif"], 2, False, LIMITS)):
        with pytest.raises(MediaRejected, match="takes too long"):
            decode()


# hostile files


@pytest.mark.parametrize("codec", ["ffv1", "mpeg2video"])
def test_no_other_decoder_is_even_opened(codec, monkeypatch):
    """FFmpeg decodes the first frames of a file to say what is in it."""
    content = encode_clip([Image.new("RGB", (64, 48))] * 4, 4, "matroska", codec)
    av.logging.set_level(av.logging.DEBUG)
    with monkeypatch.context() as patch, av.logging.Capture() as logs:
        patch.setattr(av.logging, "set_level", lambda _: None)  # decode_frames turns the log off
        with pytest.raises(MediaRejected, match="codec that is not read"):
            decode_frames(content, 2, False, LIMITS)
    av.logging.set_level(None)
    said = "".join(message for *_, message in logs)
    assert "not on whitelist" in said and "chosen by get_format" not in said


@pytest.mark.parametrize(("modality", "settings"), [("audio", {}), ("video", {"image": {"image_size": 64}})])
def test_300_hostile_files_lose_no_row_and_stop_nothing(tmp_path, modality, settings):
    files, run = hostile_files(), RunDir(str(tmp_path))
    assert len(files) == 300
    count = len(files)
    keys = {"domain": ["shop"] * count, "item_id": [f"i{n}" for n in range(count)], "item_index": pa.array(range(count), pa.int32())}
    paths = pa.array([[None]] * count, pa.list_(pa.string()))
    contents = pa.array([[content] for content in files], pa.list_(pa.binary()))
    run.write_part(
        "ingest/items", "shop-00000.parquet", pa.table(keys | {f"{PATH_PREFIX}{modality}": paths, f"{BYTES_PREFIX}{modality}": contents})
    )
    inputs = {"data": {"domains": {"shop": {"inputs": {modality: {"files": ["file"]}}}}}, "features": settings}
    config = load_config([], [f"{section}={json.dumps(value)}" for section, value in inputs.items()])
    counts = EncodePart(run, config, modality, num_vectors=4)("shop-00000.parquet")
    there = to_numpy(run.read(f"features/{modality}")["present"]).any(1)
    rejected = {json.loads(row["row"])["item_id"]: row["reason"] for row in run.read("features/rejected").to_pylist()}
    assert [bool(has) for has in there] == [f"i{n}" not in rejected for n in range(count)]
    unit = {"audio": "sounds", "video": "clips"}[modality]
    assert counts[unit] + counts[f"{unit}_rejected"] == 300 and counts[f"{unit}_missing"] == 0
    assert set(rejected.values()) <= REASONS, set(rejected.values()) - REASONS
    assert 20 < there.sum() < 250, "some survive, and not all"
    assert np.isfinite(to_numpy(run.read(f"features/{modality}")["vectors"])).all()


REASONS = {
    "empty file", "not a sound or clip", "cannot be opened", "cannot be decoded", "codec that is not read", "odd sample rate", "too many channels",
    "no sound track", "no samples", "silent", "no film", "no frames", "too many pixels",
}  # fmt: skip
