"""Files that are not what was written are refused with what is wrong with them."""

import io

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from qbert_ray.storage.checksums import DamagedError, check_bytes, checksum, open_parquet, record_files, write_parquet

ROWS = pa.table({"item_id": ["a", "b"], "vector": [[1.0], [2.0]]})
NAME = "features/text/a.parquet"
WHOLE = write_parquet(NAME, ROWS)


def opened(content: bytes, name: str = NAME, known=None):
    return open_parquet(pa.BufferReader(content), name, known)


def test_a_part_comes_back_with_its_record():
    parquet, record = opened(WHOLE)
    assert parquet.read().replace_schema_metadata(None) == ROWS
    assert (record["rows"], record["bytes"], len(record["checksum"])) == (2, len(WHOLE), 16)
    assert opened(WHOLE, known=record)[1] == record


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "was cut off: it has no Parquet footer"),
        (b"PAR1PAR1", "was cut off: it has no Parquet footer"),
        (WHOLE[:-1], "was cut off: it has no Parquet footer"),
        (WHOLE[-12:], "was cut off: its Parquet footer is longer than the file"),
        (WHOLE[:4] + b"\xff" * (len(WHOLE) - 12) + WHOLE[-8:], "cannot be read as Parquet"),
    ],
    ids=["empty", "frame", "last byte", "end alone", "footer"],
)
def test_what_is_no_whole_parquet_file_is_refused(content, said):
    with pytest.raises(DamagedError, match=f"^{said}"):
        opened(content)


def test_a_part_of_another_name_or_another_record_is_refused():
    with pytest.raises(DamagedError, match="^was written as features/text/a.parquet$"):
        opened(WHOLE, "features/text/b.parquet")
    other = opened(write_parquet(NAME, ROWS.slice(1)))[1]
    with pytest.raises(DamagedError, match="^is not the file that the stage wrote$"):
        opened(WHOLE, known=other)
    with pytest.raises(DamagedError, match="^is not the file that the stage wrote$"):
        check_bytes(NAME, WHOLE, other)


def test_a_footer_longer_than_what_is_read_first_is_read_whole():
    wide = pa.table({f"column {n} {'x' * 200}": [n] for n in range(300)})
    content = write_parquet(NAME, wide)
    assert int.from_bytes(content[-8:-4], "little") > 2**16
    assert opened(content)[0].read().replace_schema_metadata(None) == wide


def test_parquet_files_of_other_programs_have_no_name_and_are_taken():
    stream = io.BytesIO()
    pq.write_table(ROWS, stream)
    assert opened(stream.getvalue())[1]["rows"] == 2


def test_other_files_are_compared_whole():
    known = {"bytes": 4, "checksum": checksum(b"text")}
    check_bytes("evaluate/metrics.json", b"text", known)
    with pytest.raises(DamagedError, match="is not the file that the stage wrote"):
        check_bytes("evaluate/metrics.json", b"tent", known)


def write(folder, files: dict[str, bytes]) -> None:
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)


def test_the_outputs_of_a_stage_are_recorded_and_what_it_only_works_with_is_not(tmp_path):
    scraps = ["manifest.json", "started.json", ".counts/x.json", "checkpoints/1/model", "tensorboard/events", "text/.tmp"]
    write(tmp_path, {NAME: WHOLE, "features/shape.json": b"{}", **{f"features/{name}": b"1" for name in scraps}})
    assert record_files(fs.LocalFileSystem(), str(tmp_path), "features") == {
        NAME: opened(WHOLE)[1],
        "features/shape.json": {"bytes": 2, "checksum": checksum(b"{}")},
    }
    assert record_files(fs.LocalFileSystem(), str(tmp_path), "fusion") == {}


def test_a_damaged_or_missing_part_is_named(tmp_path):
    write(tmp_path, {NAME: WHOLE[:-1]})
    with pytest.raises(DamagedError, match=f"^{NAME} was cut off"):
        record_files(fs.LocalFileSystem(), str(tmp_path), "features")
    write(tmp_path, {NAME: WHOLE, "features/text/.counts/b.parquet.json": b"{}"})
    with pytest.raises(DamagedError, match="^features/text/b.parquet is missing, which an earlier try had written$"):
        record_files(fs.LocalFileSystem(), str(tmp_path), "features")
