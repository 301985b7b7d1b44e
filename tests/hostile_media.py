"""300 sounds and clips that are damaged, lie about themselves, or are something else."""

import io
import struct
import wave
from collections.abc import Iterator

import numpy as np
from PIL import Image

from qbert_ray.inputs.demo_media import encode_clip, encode_sound

RATE = 8000
TONE = (0.5 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)
FRAMES = [Image.new("RGB", (64, 48), (20 * n, 90, 255 - 20 * n)) for n in range(8)]


def sound_files() -> dict[str, bytes]:
    """Good files, by a name of each."""
    return {
        "wav": encode_sound(TONE, RATE, "wav", "pcm_s16le"),
        "flac": encode_sound(TONE, RATE, "flac", "flac"),
        "ogg": encode_sound(TONE, RATE, "ogg", "libopus"),
        "mp3": encode_sound(TONE, RATE, "mp3", "libmp3lame"),
    }


def clip_files() -> dict[str, bytes]:
    return {
        "mp4": encode_clip(FRAMES, 4, "mp4", "mpeg4", TONE, RATE, "aac"),
        "silent mp4": encode_clip(FRAMES, 4, "mp4", "libx264"),
        "webm": encode_clip(FRAMES, 4, "webm", "libvpx-vp9", TONE, RATE, "libopus"),
        "gif": encode_clip(FRAMES, 4, "gif", "gif"),
    }


def wav(
    rate: int = RATE, channels: int = 1, bits: int = 16, code: int = 1, length: int | None = None, samples: bytes = b"\1\2" * 4000
) -> bytes:
    """A WAV file with any numbers in its header."""
    size = len(samples) if length is None else length
    bytes_per_second = rate * channels * bits // 8 % 2**32
    form = struct.pack("<HHIIHH", code, channels, rate, bytes_per_second, channels * bits // 8 % 2**16, bits)
    return (
        b"RIFF"
        + struct.pack("<I", (36 + size) % 2**32)
        + b"WAVEfmt "
        + struct.pack("<I", 16)
        + form
        + b"data"
        + struct.pack("<I", size)
        + samples
    )


def crafted() -> Iterator[bytes]:
    """Headers that lie, and files of other kinds."""
    yield from (
        b"",
        b"R",
        b"RIFF",
        b"RIFF\0\0\0\0WAVE",
        b"fLaC",
        b"OggS",
        b"ID3",
        b"\xff\xfb",
        b"\0\0\0\x18ftyp",
        b"\x1a\x45\xdf\xa3",
        b"GIF8",
        b"GIF89a",
    )
    yield from (wav(rate=rate) for rate in (0, 1, 999, 500_000, 2**32 - 1))
    yield from (wav(channels=channels) for channels in (0, 17, 255, 65535))
    yield from (wav(bits=bits) for bits in (0, 1, 7, 64, 65535))
    yield from (wav(code=code) for code in (0, 2, 3, 6, 85, 255, 65534))
    yield from (wav(length=length) for length in (0, 1, 2**31, 2**32 - 1))  # the last two claim ten hours and more
    yield wav(samples=b"")
    yield wav(samples=b"\0\0" * 4000)
    yield wav(bits=32, code=3, samples=struct.pack("<4f", float("nan"), float("inf"), -float("inf"), 1e38) * 1000)
    plain = io.BytesIO()
    with wave.open(plain, "wb") as file:
        file.setparams((2, 2, 44100, 0, "NONE", ""))
        file.writeframes(b"\1\0\2\0" * 22050)
    yield plain.getvalue()
    gif, mp4 = clip_files()["gif"], clip_files()["silent mp4"]
    yield from (gif[:6] + struct.pack("<HH", *size) + gif[10:] for size in ((65535, 65535), (0, 0), (1, 65535), (20_000, 20_000)))
    size = struct.pack(">HH", 64, 48)
    yield from (mp4.replace(size, struct.pack(">HH", *other)) for other in ((65535, 65535), (0, 0), (1, 1), (16_384, 16_384)))
    duration = mp4.index(b"mvhd") + 20
    yield mp4[:duration] + b"\xff" * 4 + mp4[duration + 4 :]
    yield from (text.encode() for text in PLAYLISTS)
    yield from (
        b"%PDF-1.7\n" * 50,
        b"PK\3\4" + bytes(200),
        b"\x7fELF" + bytes(200),
        b"\x89PNG\r\n\x1a\n" + bytes(100),
        b"<html>" * 50,
        bytes(5000),
    )


PLAYLISTS = (
    "#EXTM3U\n#EXTINF:10,\nfile:///etc/passwd\n",
    "#EXTM3U\n#EXTINF:10,\nhttp://127.0.0.1/secret\n",
    "ffconcat version 1.0\nfile /etc/passwd\n",
    '<?xml version="1.0"?><MPD><BaseURL>file:///etc/passwd</BaseURL></MPD>',
    "<svg xmlns='http://www.w3.org/2000/svg'><image href='file:///etc/passwd'/></svg>",
    "v=0\no=- 0 0 IN IP4 127.0.0.1\nm=audio 49170 RTP/AVP 0\n",
)


def damaged(rng: np.random.Generator) -> Iterator[bytes]:
    """Good files cut, doubled, with other beginnings and with random bytes in any place; without an end."""
    good = [*sound_files().values(), *clip_files().values()]
    while True:
        for content in good:
            yield content[: int(len(content) * rng.uniform(0.02, 0.98))]
            bytes_ = np.frombuffer(content, np.uint8).copy()
            place = rng.integers(len(bytes_), size=int(rng.choice([1, 8, 100, 1000])))
            bytes_[place] = rng.integers(256, size=len(place))
            yield bytes_.tobytes()
            head = int(rng.integers(16, 400))
            yield content[:head] + rng.bytes(len(content) - head)
            yield content[:head] + content[int(len(content) * rng.uniform(0.2, 0.9)) :]


def hostile_files(count: int = 300, seed: int = 0) -> list[bytes]:
    files = list(crafted())
    more = damaged(np.random.default_rng(seed))
    return files + [next(more) for _ in range(count - len(files))]
