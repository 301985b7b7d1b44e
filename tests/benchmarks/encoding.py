"""Feature extraction on Ray against the bare encoder loop, texts, images, sounds and clips, on one core and on two.

    python -m tests.benchmarks.encoding                # 320 images, 640 items with two texts, 7,680 sounds, 320 clips
    python -m tests.benchmarks.encoding --full         # four times as many
    python -m tests.benchmarks.encoding audio video    # some kinds

Images are the posters of `movielens` under QBERT_REAL_DATA, else made-up JPEGs of their size; sounds and clips are those of the demo shop
(`qbert-ray demo-data --media`), two seconds each. The bare loop reads a part, decodes, encodes batch by batch and writes nothing; it runs
in one process pinned to one core. One actor of Ray is pinned to
that core too, reading threads included; two actors have both cores. Ray is timed from the moment each actor has done a part, so
without its start and the loading of encoders. Two bare loops at once say what a second core is worth on the machine; with --full
twice as many actors as cores, half a core each, say what more actors do where there are no more cores.
"""

from __future__ import annotations

import io
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from PIL import Image

from qbert_ray.config.schema import Actors, Config
from qbert_ray.execution import ray_data as sharding
from qbert_ray.execution.progress import Quiet
from qbert_ray.execution.ray_data import map_parts
from qbert_ray.execution.ray_session import session
from qbert_ray.features.stage import EncodePart
from qbert_ray.inputs.demo_media import CLIPS, PER_SECOND, RATE, SOUNDS, TUNES, TURNS, draw_clip, draw_sound, encode_clip, encode_sound
from qbert_ray.storage.columns import ITEMS, input_type
from qbert_ray.storage.directory import RunDir
from tests.benchmarks.table import Figure, main

FIELDS = {"text.title": "", "text.description": ""}
SIZES = {"image": (20, 16), "text": (40, 16), "audio": (480, 16), "video": (20, 16)}  # items of a part, parts
BYTES = {"image": "image_bytes", "audio": "bytes.audio", "video": "bytes.video"}  # kind -> column of its files
DRAWN = 64  # different sounds, and clips; more items repeat them, since drawing takes longer than encoding


class Pinned:
    """A worker of `map_parts` on some cores, its threads included, that notes when it has done each part."""

    def __init__(self, worker: Callable[..., Any], cores: list[int], notes: Path, arguments: dict[str, Any]) -> None:
        os.sched_setaffinity(0, cores)
        self.worker, self.notes = worker(**arguments), notes / str(os.getpid())

    def __call__(self, name: str) -> dict[str, int]:
        counts = self.worker(name)
        with self.notes.open("a") as file:
            print(time.monotonic(), file=file)
        return counts


def images(count: int) -> tuple[str, list[bytes]]:
    folder = Path(os.environ.get("QBERT_REAL_DATA") or "") / "movielens" / "images"
    posters = sorted(folder.glob("*.jpg"))[:count] if os.environ.get("QBERT_REAL_DATA") else []
    if posters:
        found = [poster.read_bytes() for poster in posters]
        return "posters of movielens", [found[number % len(found)] for number in range(count)]
    rng = np.random.default_rng(0)
    contents = []
    for _ in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (20, 14, 3), dtype=np.uint8))
        file = io.BytesIO()
        coarse.resize((224, 330), Image.Resampling.BICUBIC).save(file, "JPEG", quality=90)
        contents.append(file.getvalue())
    return "made-up images", contents


def texts(count: int) -> list[list[str]]:
    """Titles of about 5 words and descriptions of about 60."""
    rng = np.random.default_rng(0)
    words = [line.strip() for line in __doc__.replace("\n", " ").split() if line.isalpha()]
    lengths = rng.poisson([[5], [60]], (2, count)) + 1
    return [[" ".join(rng.choice(words, length)) for length in row] for row in lengths]


def sounds(count: int) -> tuple[str, list[bytes]]:
    rng = np.random.default_rng(0)
    drawn = [
        encode_sound(draw_sound(number % 12, number % 8, number % len(TUNES), rng), RATE, *SOUNDS[number % len(SOUNDS)])
        for number in range(DRAWN)
    ]
    return "sounds", [drawn[number % DRAWN] for number in range(count)]


def clips(count: int) -> tuple[str, list[bytes]]:
    posters = [Image.open(io.BytesIO(content)).convert("RGB") for content in images(DRAWN)[1]]
    drawn = []
    for number, poster in enumerate(posters):
        container, codec = CLIPS[number % len(CLIPS)]
        drawn.append(encode_clip(draw_clip(poster, number % len(TURNS)), PER_SECOND, container, codec))
    return "clips", [drawn[number % DRAWN] for number in range(count)]


FILES = {"image": images, "audio": sounds, "video": clips}


def write_items(run: RunDir, scale: int, kinds: list[str]) -> dict[str, tuple[str, list[str]]]:
    """Kind -> what its items are, and the parts of ingest/items that hold them."""
    written: dict[str, tuple[str, list[str]]] = {}
    several = [pa.field(name, input_type(name)) for kind, name in BYTES.items() if kind != "image"]
    several += [pa.field(f"path.{kind}", input_type(f"path.{kind}")) for kind in BYTES if kind != "image"]
    schema = pa.schema([*ITEMS, *((name, pa.string()) for name in FIELDS), *several])
    for kind in kinds:
        size, count = SIZES[kind]
        rows = scale * size * count
        what, contents = FILES[kind](rows) if kind in FILES else ("items with two texts", [])
        made = {
            "domain": [kind] * rows,
            "item_id": [str(row) for row in range(rows)],
            "item_index": list(range(rows)),
            "cold": [False] * rows,
        }
        if kind == "text":
            made |= dict(zip(FIELDS, texts(rows), strict=True))
        elif kind == "image":
            made[BYTES[kind]] = contents
        else:
            made |= {BYTES[kind]: [[content] for content in contents], f"path.{kind}": [[None]] * rows}
        table = pa.table([pa.array(made.get(field.name, [None] * rows), field.type) for field in schema], schema=schema)
        names = [f"{kind}-{number:05d}.parquet" for number in range(scale * count)]
        for number, name in enumerate(names):
            run.write_part("ingest/items", name, table.slice(number * size, size))
        written[kind] = (f"{rows:,} {what}", names)
    return written


def bare(run: RunDir, kind: str, worker: Any, parts: list[str]) -> float:
    """Seconds of a loop over the parts: read, decode, encode."""
    encoder = worker.encoder
    decode = encoder.decoder() if kind in BYTES else None
    started = time.monotonic()
    for part in parts:
        items = run.read_part("ingest/items", part)
        if decode is None:
            encoder.encoder([text for name in FIELDS for text in items[name].to_pylist()])
            continue
        files = pc.list_flatten(items[BYTES[kind]]) if kind != "image" else items[BYTES[kind]]
        pieces = [piece for content in files.to_pylist() for piece in decode(content)]
        size = encoder.settings.batch_size
        for begin in range(0, len(pieces), size):
            encoder.encode_pieces(encoder.stack(pieces[begin : begin + size]))
    return time.monotonic() - started


def on_ray(run: RunDir, kind: str, worker: type, arguments: dict[str, Any], parts: list[str], actors: int, num_cpus: float = 1) -> float:
    """Items per second from the moment that every actor has done a part, to the last part."""
    run.delete(f"features/{kind}")
    cores = [0] if actors == 1 else list(range(os.cpu_count() or 1))
    with tempfile.TemporaryDirectory() as notes:
        pinned = {"worker": worker, "cores": cores, "notes": Path(notes), "arguments": arguments}
        map_parts(run, Pinned, pinned, parts, f"features/{kind}", Actors(max_size=actors, num_cpus=num_cpus), Quiet())
        done = [[float(line) for line in file.read_text().split()] for file in Path(notes).iterdir()]
    assert len(done) == actors, f"{len(done)} of {actors} actors did a part"
    warm, times = max(min(of_one) for of_one in done), [moment for of_one in done for moment in of_one]
    return sum(moment > warm for moment in times) * SIZES[kind][0] / (max(times) - warm)


def arguments_of(run: RunDir, kind: str) -> dict[str, Any]:
    inputs = {each: {"files": [each]} for each in BYTES if each != "image"}
    domain = {"text_fields": [name.removeprefix("text.") for name in FIELDS], "image_column": "image", "inputs": inputs}
    features = {"audio": {"max_windows": 2}, "video": {"max_frames": 4, "sound": False}}  # as configs/demo-av.yaml
    config = Config.model_validate({"data": {"domains": {kind: domain}}, "features": features})
    return {"run": run, "config": config, "modality": kind, "num_vectors": {"image": 4, "video": 4}.get(kind, 2)}


def side_by_side(run: RunDir, kind: str, parts: list[str]) -> float:
    """Items per second of two bare loops at once, each in a process pinned to a core of its own."""
    command = [sys.executable, "-m", "tests.benchmarks.encoding", "--bare", run.uri, kind]
    processes = [
        subprocess.Popen(
            [*command, str(core), *parts[core::2]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
        )
        for core in (0, 1)
    ]
    for process in processes:
        process.stdout.readline()  # ready
    started = time.monotonic()
    for process in processes:
        process.stdin.write("go\n")
        process.stdin.flush()
    for process in processes:
        process.stdout.readline()
    seconds = time.monotonic() - started
    for process in processes:
        process.communicate()
    return len(parts) * SIZES[kind][0] / seconds


def bare_process(folder: str, kind: str, core: str, *parts: str) -> None:
    torch.set_num_threads(1)
    os.sched_setaffinity(0, [int(core)])
    run = RunDir(folder)
    worker = EncodePart(**arguments_of(run, kind))
    bare(run, kind, worker, list(parts[:1]))
    print("ready", flush=True)
    sys.stdin.readline()
    bare(run, kind, worker, list(parts))
    print("done", flush=True)


def measure(run: RunDir, kind: str, what: str, parts: list[str], full: bool) -> Iterator[Figure]:
    worker, arguments = EncodePart, arguments_of(run, kind)
    everywhere = os.sched_getaffinity(0)
    with session():
        os.sched_setaffinity(0, [0])
        local = worker(**arguments)
        bare(run, kind, local, parts[:1])
        seconds = [bare(run, kind, local, parts)]
        os.sched_setaffinity(0, everywhere)
        one = on_ray(run, kind, worker, arguments, parts, 1)
        os.sched_setaffinity(0, [0])
        seconds.append(bare(run, kind, local, parts))
        os.sched_setaffinity(0, everywhere)
        two = on_ray(run, kind, worker, arguments, parts, 2)
        four = on_ray(run, kind, worker, arguments, parts, 4, 0.5) if full else None
    both = side_by_side(run, kind, parts)
    alone = len(parts) * SIZES[kind][0] / float(np.mean(seconds))
    yield Figure(
        f"features of {what}, one core", f"{one:.1f} items/s", f"bare encoder loop: {alone:.1f}", one / alone, ">= .9 x", one >= 0.9 * alone
    )
    yield Figure(f"features of {what}, two cores", f"{two:.1f} items/s", f"one core: {one:.1f}", two / one, ">= 1.8 x", two >= 1.8 * one)
    yield Figure(
        f"features of {what}, two cores",
        f"{two:.1f} items/s",
        f"two bare loops at once: {both:.1f}",
        two / both,
        ">= .9 x",
        two >= 0.9 * both,
    )
    if four:
        yield Figure(f"features of {what}, two cores, four actors", f"{four:.1f} items/s", f"two: {two:.1f}", four / two, "", None)


def figures(full: bool, kinds: list[str] | None = None) -> Iterator[Figure]:
    torch.set_num_threads(1)
    sharding.FEW = 0  # actors, as larger catalogs have
    encoders = {"image": "efficientnet-lite0", "text": "minilm", "audio": "log-mel", "video": "4 frames by efficientnet-lite0"}
    with tempfile.TemporaryDirectory() as folder:
        run = RunDir(folder)
        for kind, (what, parts) in write_items(run, 4 if full else 1, kinds or list(SIZES)).items():
            yield from measure(run, kind, f"{what}, {encoders[kind]}", parts, full)


if __name__ == "__main__":
    if "--bare" in sys.argv:
        bare_process(*sys.argv[sys.argv.index("--bare") + 1 :])
    else:
        named = [kind for kind in SIZES if kind in sys.argv[1:]]
        sys.argv = [argument for argument in sys.argv if argument not in named]
        main(lambda full: figures(full, named))
