"""Decodes sounds and clips with PyAV, within limits that hold while it decodes.

The content says what a file is, never its name or a header's word alone: a demuxer is chosen by the first bytes, so that FFmpeg does not
guess and playlists, which name other files, are never opened; only common codecs are decoded. A header may lie about length, size
and rate: pixels are checked before a frame is allocated, and seconds, frames and time are counted while decoding.

S samples, F frames.
"""

from __future__ import annotations

import heapq
import io
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain, groupby
from typing import Any

import numpy as np
from PIL import Image

from qbert_ray.features.encoders import FileRejected

SOUND_CODECS = ("flac", "vorbis", "opus", "mp3", "mp3float", "mp2", "mp2float", "aac", "alac", "libopus", "libvorbis")
PCM = (
    *(f"pcm_{sign}{bits}{end}" for sign in "su" for bits in (16, 24, 32) for end in ("le", "be")),
    *("pcm_u8", "pcm_s8", "pcm_s64le", "pcm_s64be", "pcm_f32le", "pcm_f32be", "pcm_f64le", "pcm_f64be", "pcm_alaw", "pcm_mulaw"),
)
FILM_CODECS = ("h264", "hevc", "mpeg4", "vp8", "vp9", "av1", "libdav1d", "libvpx", "libvpx-vp9", "gif")
LEAST_RATE, MOST_RATE = 1_000, 384_000  # Hz; resampling from less would multiply the samples
MOST_CHANNELS = 16
MOST_PACKETS = 200_000
BLOCK = 65_536  # samples that are resampled at once
WAIT_SECONDS = 30.0  # most time for one file
SIDE = 512  # pixels of the longer side of a frame that is kept
THUMBNAIL = 16  # pixels per side of the grey pictures in which changes of scene are looked for


class MediaRejected(FileRejected):
    """Bytes that are not a usable sound or clip."""


class MediaUnavailable(ValueError):  # noqa: N818 - a setting asks for what is not installed
    """PyAV is not installed."""


@dataclass(frozen=True)
class Limits:
    """Bounds of one file."""

    max_bytes: int  # of the file; larger ones are rejected
    max_seconds: float  # that are decoded; the rest is not read
    max_pixels: int = 8_300_000  # of a frame; larger ones are rejected
    max_decoded: int = 3_000  # frames that are decoded; the rest is not read


def decode_sound(content: bytes, rate: int, limits: Limits) -> np.ndarray:
    """[S] float32 mono samples between -1 and 1 of a sound, or of a clip's sound track.

    Args:
        content: WAV, FLAC, OGG, MP3, MP4 or WebM.
        rate: Hz of the samples.
        limits: of the file.

    Raises:
        MediaRejected: with the reason.
    """
    with _opened(content, limits) as container:
        if not container.streams.audio:
            raise MediaRejected("no sound track")
        stream = container.streams.audio[0]
        _check_sound(stream)
        pieces: list[np.ndarray] = []
        left = int(limits.max_seconds * rate)
        for piece in _mono(_decoded(container, stream), rate):
            pieces.append(piece)
            left -= len(piece)
            if left <= 0:
                break
    samples = np.concatenate([np.zeros(0, np.float32), *pieces])[: int(limits.max_seconds * rate)]
    if not len(samples):
        raise MediaRejected("no samples")
    return np.nan_to_num(samples, posinf=1.0, neginf=-1.0).clip(-1, 1)


def _mono(frames: Iterator[Any], rate: int) -> Iterator[np.ndarray]:
    """Samples at a rate of some frames.

    A resampler takes frames of one form alone, and a file that was put together from several, such as a podcast, changes it on the way.
    """
    import av

    for _, alike in groupby(frames, lambda frame: (frame.format.name, frame.layout.name, frame.sample_rate)):
        resampler = av.AudioResampler(format="fltp", rate=rate)  # channels are averaged here: FFmpeg's mono is louder than either
        for block in chain(_blocks(alike), [None]):
            yield from (each.to_ndarray().mean(0) for each in resampler.resample(block))


def _blocks(frames: Iterator[Any]) -> Iterator[Any]:
    """Some frames of one form as fewer and longer ones: resampling 20 ms at a time costs more than decoding them."""
    import av

    block = av.AudioFifo()
    for frame in frames:
        if not LEAST_RATE <= frame.sample_rate <= MOST_RATE:
            raise MediaRejected("odd sample rate")
        frame.pts = None  # times of a damaged file may go back, which the resampler refuses
        block.write(frame)
        if block.samples >= BLOCK:
            yield block.read()
    if block.samples:
        yield block.read()


def decode_frames(content: bytes, count: int, scenes: bool, limits: Limits) -> list[Image.Image]:
    """At most `count` frames of a clip in order, in RGB and at most 512 pixels wide and high.

    Args:
        content: MP4, WebM or GIF.
        count: frames that are wanted.
        scenes: the first frame and those that differ most from the one before, rather than frames at equal distances.
        limits: of the file.

    Raises:
        MediaRejected: with the reason.
    """
    with _opened(content, limits) as container:
        streams = [stream for stream in container.streams.video if "attached_pic" not in str(stream.disposition)]  # a cover is no film
        if not streams:
            raise MediaRejected("no film")
        stream = streams[0]
        if stream.codec_context is None or stream.codec_context.name not in FILM_CODECS:
            raise MediaRejected("codec that is not read")
        if stream.codec_context.width * stream.codec_context.height > limits.max_pixels:
            raise MediaRejected("too many pixels")
        kept = (_of_scenes if scenes else _at_equal_distances)(_frames(container, stream, limits), count)
    if not kept:
        raise MediaRejected("no frames")
    return kept


def _frames(container: Any, stream: Any, limits: Limits) -> Iterator[Any]:
    """Decoded frames within the limits."""
    for number, frame in enumerate(_decoded(container, stream)):
        if frame.width * frame.height > limits.max_pixels:
            raise MediaRejected("too many pixels")
        if number >= limits.max_decoded or (frame.time is not None and frame.time > limits.max_seconds):
            return
        yield frame


def _at_equal_distances(frames: Iterator[Any], count: int) -> list[Image.Image]:
    """Frames in the middles of `count` equal parts, in one pass and with at most four times as many in memory."""
    from av.video.reformatter import VideoReformatter

    kept: list[Image.Image] = []
    resize, step = VideoReformatter(), 1
    for number, frame in enumerate(frames):
        if number % step == 0:
            kept.append(_picture(frame, resize))
        if len(kept) == 4 * count:
            kept, step = kept[::2], 2 * step
    middles = (np.arange(count) + 0.5) * len(kept) / count
    return kept if len(kept) <= count else [kept[int(place)] for place in middles]


def _of_scenes(frames: Iterator[Any], count: int) -> list[Image.Image]:
    """The first frame and the `count` - 1 that differ most from the one before."""
    from av.video.reformatter import VideoReformatter

    heap: list[tuple[float, int, Image.Image]] = []
    shrink, resize = VideoReformatter(), VideoReformatter()  # each keeps the tables of one conversion
    before: np.ndarray | None = None
    for number, frame in enumerate(frames):
        grey = shrink.reformat(frame, THUMBNAIL, THUMBNAIL, "gray").to_ndarray().astype(float)
        change = np.inf if before is None else float(np.abs(grey - before).mean())
        before = grey
        if len(heap) < count or change > heap[0][0]:
            entry = (change, -number, _picture(frame, resize))
            heapq.heappush(heap, entry) if len(heap) < count else heapq.heapreplace(heap, entry)
    return [picture for _, _, picture in sorted(heap, key=lambda entry: -entry[1])]


def _picture(frame: Any, resize: Any) -> Image.Image:
    scale = min(1.0, SIDE / max(frame.width, frame.height))
    width, height = (max(1, round(side * scale)) for side in (frame.width, frame.height))
    return Image.fromarray(resize.reformat(frame, width, height, "rgb24").to_ndarray())


def _check_sound(stream: Any) -> None:
    context = stream.codec_context
    if context is None or context.name not in (*SOUND_CODECS, *PCM):
        raise MediaRejected("codec that is not read")
    if not LEAST_RATE <= context.sample_rate <= MOST_RATE:
        raise MediaRejected("odd sample rate")
    if not 1 <= context.layout.nb_channels <= MOST_CHANNELS:
        raise MediaRejected("too many channels")


def _decoded(container: Any, stream: Any) -> Iterator[Any]:
    """Frames of a stream up to its end, or to the place where it is damaged if some came before."""
    import av

    deadline, found = time.monotonic() + WAIT_SECONDS, 0
    stream.thread_type, stream.codec_context.thread_count = "NONE", 1  # files are decoded in threads already
    try:
        for number, packet in enumerate(container.demux(stream)):
            if number > MOST_PACKETS or time.monotonic() > deadline:
                raise MediaRejected("takes too long")
            for frame in packet.decode():
                found += 1
                yield frame
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        if isinstance(error, MediaRejected):
            raise
        if not found:
            raise MediaRejected("cannot be decoded") from None


@contextmanager
def _opened(content: bytes, limits: Limits) -> Iterator[Any]:
    """The container of a file.

    Raises:
        MediaRejected: it is none that is read.
        MediaUnavailable: PyAV is not installed.
    """
    try:
        import av
    except ImportError:
        raise MediaUnavailable("sounds and clips need PyAV: pip install 'qbert-ray[media]'") from None
    av.logging.set_level(None)  # what a damaged file makes FFmpeg say is not worth a line each
    if not content:
        raise MediaRejected("empty file")
    if len(content) > limits.max_bytes:
        raise MediaRejected("too many bytes")
    options = {"max_pixels": str(limits.max_pixels), "threads": "1", "enable_drefs": "0"}
    options["codec_whitelist"] = ",".join((*SOUND_CODECS, *FILM_CODECS, *PCM))  # to open a file is to decode the first of it
    try:
        form = container_of(content)
        # A WAV's header says all; FFmpeg would look through as much of its samples for another codec as it may, which takes longer than the rest.
        options["probesize"] = "4096" if form == "wav" else "1000000"
        container = av.open(io.BytesIO(content), format=form, options=options, metadata_errors="replace")
    except (av.FFmpegError, ValueError, OverflowError, MemoryError) as error:
        raise error if isinstance(error, MediaRejected) else MediaRejected("cannot be opened") from None
    with container:
        yield container


def container_of(content: bytes) -> str:
    """FFmpeg's name of the container that a file begins as.

    Raises:
        MediaRejected: it is none of those that are read.
    """
    if content[:4] == b"RIFF" and content[8:12] == b"WAVE":
        return "wav"
    if content[4:8] == b"ftyp":
        return "mov"
    if content[:3] == b"ID3" or (content[:1] == b"\xff" and content[1:2] and content[1] & 0xE0 == 0xE0):
        return "mp3"
    begins = {b"fLaC": "flac", b"OggS": "ogg", b"\x1a\x45\xdf\xa3": "matroska", b"GIF8": "gif"}
    if content[:4] not in begins:
        raise MediaRejected("not a sound or clip")
    return begins[content[:4]]
