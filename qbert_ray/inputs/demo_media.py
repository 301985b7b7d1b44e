"""Makes the sounds and clips of the demo shop with them, and encodes any samples and frames as files.

A sound has the timbre of its category, the rhythm of its style, and a tune that nothing else of the item tells; a clip shows the item on a
turntable, whose turn nothing else tells either.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from PIL import Image, ImageDraw, ImageOps

from qbert_ray.inputs.demo_users import Catalog

RATE, SECONDS = 16_000, 2.0  # of a sound
FRAMES, PER_SECOND = 16, 8  # of a clip
# Steps of a tune above its root, in semitones; eight beats.
TUNES = (
    (0, 2, 4, 5, 7, 9, 11, 12), (12, 11, 9, 7, 5, 4, 2, 0), (0, 7, 0, 7, 0, 7, 0, 7), (0, 0, 3, 0, 0, 3, 7, 3),
    (-12, 0, 12, 0, -12, 0, 12, 0), (0, 1, 0, 1, 0, 1, 0, 1),
)  # fmt: skip
ROOTS = (110.0, 165.0, 247.0, 370.0, 554.0, 831.0)  # Hz, one per tune: register is heard as well as melody
# Beats on which a style has a note, as eight bits, in the order of STYLES.
RHYTHMS = (0b11111111, 0b10101010, 0b10010010, 0b11001100, 0b10000000, 0b10001000, 0b11101110, 0b10110101)
TURNS = ("left", "right", "sway", "bounce", "still", "zoom")
SIDE = 96  # pixels of a clip
LAYOUTS = {1: "mono", 2: "stereo"}


SILENT, STILL = 0.2, 0.3  # shares of items without a sound, and without a clip
SOUNDS = (("wav", "pcm_s16le"), ("flac", "flac"), ("ogg", "libopus"), ("mp3", "libmp3lame"))  # container and codec, in turn
CLIPS = (("mp4", "libx264"), ("webm", "libvpx-vp9"), ("gif", "gif"))


def with_tunes_and_turns(catalog: Catalog, rng: np.random.Generator) -> Catalog:
    """A catalog with two more attributes, which nothing but sounds and clips tell."""
    count = len(catalog.price)
    further = [rng.integers(len(TUNES), size=count), rng.integers(len(TURNS), size=count)]
    attributes = np.concatenate([catalog.attributes, np.stack(further, axis=1)], axis=1)
    return replace(catalog, attributes=attributes, sizes=(*catalog.sizes, len(TUNES), len(TURNS)))


def write_media(folder: Path, items: pa.Table, catalog: Catalog, rng: np.random.Generator) -> pa.Table:
    """The items table with the columns `sound` and `clip`, whose files are written to folders of these names; some items have none."""
    names: dict[str, list[str | None]] = {"sound": [], "clip": []}
    for kind in names:
        (folder / f"{kind}s").mkdir(exist_ok=True)
    ids, images = items["item_id"].to_pylist(), items["image"].to_pylist()
    for number, (item_id, image, item) in enumerate(zip(ids, images, catalog.attributes.tolist(), strict=True)):
        category, _, style, _, tune, turn = item
        container, codec = SOUNDS[number % len(SOUNDS)]
        sound = None if rng.random() < SILENT else encode_sound(draw_sound(category, style, tune, rng), RATE, container, codec)
        names["sound"].append(_write(folder, f"sounds/{item_id}.{container}", sound))
        container, codec = CLIPS[number % len(CLIPS)]
        moves = rng.random() >= STILL and image is not None
        frames = draw_clip(_readable(folder / image), turn) if moves else []
        names["clip"].append(
            _write(folder, f"clips/{item_id}.{container}", encode_clip(frames, PER_SECOND, container, codec) if moves else None)
        )
    for name, column in names.items():
        items = items.append_column(name, pa.array(column, pa.string()))
    return items


def _write(folder: Path, name: str, content: bytes | None) -> str | None:
    if content is not None:
        (folder / name).write_bytes(content)
    return name if content is not None else None


def _readable(file: Path) -> Image.Image:
    """An item's image; a grey one where its file is broken."""
    try:
        with Image.open(file) as image:
            return image.convert("RGB")
    except OSError:
        return Image.new("RGB", (SIDE, SIDE), (128, 128, 128))


def draw_sound(category: int, style: int, tune: int, rng: np.random.Generator) -> np.ndarray:
    """[samples] of an item's sound; `rng` detunes it a little and adds some noise."""
    beats = len(TUNES[tune])
    size = int(RATE * SECONDS) // beats
    time = np.arange(size) / RATE
    harmonics = 1 / np.arange(1, 9) ** (0.6 + 0.2 * (category % 4)) * (np.arange(1, 9) % (2 + category // 4) > 0)
    harmonics[0] = 1.0
    decay = np.exp(-time * (2 + 3 * (category % 3)))
    detune = 2 ** (rng.normal(0, 0.3) / 12)
    notes = []
    for beat, step in enumerate(TUNES[tune]):
        pitch = ROOTS[tune] * detune * 2 ** (step / 12)
        wave = sum(weight * np.sin(2 * np.pi * pitch * (n + 1) * time) for n, weight in enumerate(harmonics) if pitch * (n + 1) < RATE / 2)
        notes.append(wave * decay * (RHYTHMS[style] >> (beats - 1 - beat) & 1))
    samples = np.concatenate(notes)
    samples = samples / np.abs(samples).max() * 0.7 + rng.normal(0, 0.004, len(samples))
    return samples.clip(-1, 1).astype(np.float32)


def draw_clip(image: Image.Image, turn: int) -> list[Image.Image]:
    """Frames of an item on a turntable, from its image."""
    image = image.resize((SIDE, SIDE))
    return [_view(image, TURNS[turn], frame / FRAMES) for frame in range(FRAMES)]


def _view(image: Image.Image, turn: str, phase: float) -> Image.Image:
    """The view at a phase, from 0 to 1, of a whole turn."""
    angle = 2 * np.pi * phase
    width, height, left, top = 1.0, 1.0, 0.0, 0.0
    if turn in ("left", "right"):
        width, left = max(abs(np.cos(angle)), 0.08), 0.12 * np.sin(angle) * (1 if turn == "right" else -1)
        image = ImageOps.mirror(image) if np.cos(angle) < 0 else image
    elif turn == "sway":
        image = image.rotate(25 * np.sin(angle), fillcolor=image.getpixel((0, 0)))
    elif turn == "bounce":
        top = -0.35 * abs(np.sin(angle))
    elif turn == "zoom":
        width = height = 0.6 + 0.4 * np.cos(angle)
    size = max(1, round(SIDE * width)), max(1, round(SIDE * height))
    view = Image.new("RGB", (SIDE, SIDE), (236, 236, 230))
    ImageDraw.Draw(view).ellipse((SIDE * 0.1, SIDE * 0.82, SIDE * 0.9, SIDE * 0.98), fill=(150, 150, 158))
    view.paste(image.resize(size), (round((SIDE - size[0]) / 2 + left * SIDE), round((SIDE - size[1]) / 2 + top * SIDE)))
    return view


def encode_sound(samples: np.ndarray, rate: int, container: str, codec: str) -> bytes:
    """A file with a sound.

    Args:
        samples: [S], or [2, S] of a stereo sound, between -1 and 1.
        rate: Hz.
        container: such as "wav", "flac", "ogg" or "mp3".
        codec: such as "pcm_s16le", "flac", "libopus" or "libmp3lame".
    """
    return encode_clip([], PER_SECOND, container, "", samples, rate, codec)


def encode_clip(
    frames: Sequence[Image.Image],
    per_second: int,
    container: str,
    codec: str,
    samples: np.ndarray | None = None,
    rate: int = RATE,
    sound_codec: str = "aac",
) -> bytes:
    """A file with frames, a sound, or both.

    Args:
        frames: of one even size.
        per_second: frames of a second.
        container: such as "mp4", "webm" or "gif".
        codec: of the frames, such as "mpeg4", "libvpx-vp9" or "gif".
        samples: [S], or [2, S] of a stereo sound, between -1 and 1.
        rate: Hz of the samples.
        sound_codec: of the samples.
    """
    import av

    file = io.BytesIO()
    with av.open(file, "w", format=container) as made:
        film: Any = made.add_stream(codec, rate=per_second) if frames else None
        sound: Any = made.add_stream(sound_codec, rate=rate, layout=LAYOUTS[np.ndim(samples)]) if samples is not None else None
        if film is not None:
            film.width, film.height = frames[0].size
            film.pix_fmt = "rgb8" if codec == "gif" else "yuv420p"
            film.codec_context.thread_count = 1
            for frame in frames:
                made.mux(film.encode(av.VideoFrame.from_image(frame)))
            made.mux(film.encode(None))
        if sound is not None and samples is not None:
            for packet in _sound_packets(sound, np.atleast_2d(samples), rate):
                made.mux(packet)
    return file.getvalue()


def _sound_packets(stream: Any, samples: np.ndarray, rate: int) -> list[Any]:
    import av

    layout = stream.layout.name
    frame = av.AudioFrame.from_ndarray(np.ascontiguousarray(samples, np.float32), format="fltp", layout=layout)
    frame.sample_rate, frame.time_base, frame.pts = rate, Fraction(1, rate), 0
    codec = stream.codec_context
    resampler = av.AudioResampler(
        format=codec.format.name if codec.format else "s16", layout=layout, rate=rate, frame_size=codec.frame_size or 1024
    )
    packets = []
    for resampled in [*resampler.resample(frame), *resampler.resample(None)]:
        packets += stream.encode(resampled)
    return packets + stream.encode(None)
