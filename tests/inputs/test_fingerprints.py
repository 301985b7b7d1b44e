"""Input files are known by their content: copies are the same, changes are not, whatever glob names them."""

import os
import shutil

import pytest

from qbert_ray.inputs import fingerprints
from qbert_ray.inputs.fingerprints import _block_offsets, fingerprint

GLOBS = ["shop", "shop/*.csv", "shop/part-?.csv", "shop/part-[0-9].csv", "sh*/part-0.csv", "s[h]op"]


@pytest.fixture
def data(tmp_path):
    (tmp_path / "data" / "shop").mkdir(parents=True)
    for number in range(3):
        (tmp_path / "data" / "shop" / f"part-{number}.csv").write_bytes(os.urandom(1000))
    return tmp_path / "data"


@pytest.mark.parametrize("location", GLOBS)
def test_copies_are_the_same_and_any_change_is_not(data, tmp_path, location):
    before = fingerprint(str(data), location)
    shutil.copytree(data, tmp_path / "copy")  # with the time of now
    assert fingerprint(str(tmp_path / "copy"), location) == before
    file = data / "shop" / "part-0.csv"
    content = file.read_bytes()
    state = file.stat()
    file.write_bytes(content[:500] + bytes([content[500] ^ 1]) + content[501:])
    os.utime(file, ns=(state.st_atime_ns, state.st_mtime_ns + 1))  # as large as before
    changed = fingerprint(str(data), location)
    assert changed != before
    file.write_bytes(content)
    assert fingerprint(str(data), location) == before
    if location != "sh*/part-0.csv":
        (data / "shop" / "part-1.csv").rename(data / "shop" / "part-7.csv")
        assert fingerprint(str(data), location) != before


def test_what_is_not_there_has_none(data):
    assert fingerprint(str(data), "shop/*.jsonl") is None and fingerprint(str(data), "no/such.csv") is None


def test_of_large_files_blocks_are_read_from_the_first_byte_to_the_last(data, monkeypatch):
    monkeypatch.setattr(fingerprints, "WHOLE", 4096)
    monkeypatch.setattr(fingerprints, "BLOCK", 64)
    file = data / "large.csv"
    content = bytearray(os.urandom(100_000))
    file.write_bytes(content)
    before, seen = fingerprint(str(data), "large.csv"), 0
    for number, place in enumerate([0, 63, 99_999, 99_936, *range(1000, 99_000, 5000)]):
        content[place] ^= 1
        file.write_bytes(content)
        os.utime(file, ns=(number, number))
        seen += fingerprint(str(data), "large.csv") != before
        content[place] ^= 1
    assert seen >= 4 and len(_block_offsets(100_000)) == 64, "the first and last blocks, whatever is between"


def test_places_cover_small_files_and_end_at_the_end_of_large_ones():
    assert (
        _block_offsets(0) == []
        and _block_offsets(1) == [0]
        and len(_block_offsets(fingerprints.WHOLE)) * fingerprints.BLOCK == fingerprints.WHOLE
    )
    size = 10 * fingerprints.WHOLE + 3
    places = _block_offsets(size)
    assert places[0] == 0 and places[-1] + fingerprints.BLOCK == size and len(places) * fingerprints.BLOCK == fingerprints.WHOLE
