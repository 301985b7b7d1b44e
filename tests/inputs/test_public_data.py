"""Downloads from a server on this machine: an interrupted one resumes, a wrong one is refused, a finished one stays."""

import gzip
import hashlib
import io
import json
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import polars as pl
import pytest

from qbert_ray.cli.main import main
from qbert_ray.config.schema import Domain
from qbert_ray.inputs import download as downloading
from qbert_ray.inputs import public_data
from qbert_ray.inputs.download import DownloadError, download
from qbert_ray.inputs.sources import open_source

CONTENT = bytes(range(256)) * 4000


class Server(ThreadingHTTPServer):
    """Serves `files`; `breaks` answers are cut in half, `ranges` tells whether it knows Range, `asked` is what it was asked."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files, self.breaks, self.ranges, self.asked, self.status, self.tag = {}, 0, True, [], 200, '"1"'
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def address(self):
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    def do_GET(self):  # noqa: N802 - the name http.server asks for
        server, wanted = self.server, self.headers.get("Range")
        server.asked.append((self.path, wanted))
        content = server.files.get(self.path)
        if content is None or server.status != 200:
            self.send_error(404 if content is None else server.status)
            return
        begin = 0
        if wanted and server.ranges and self.headers.get("If-Range", server.tag) == server.tag:
            begin = int(wanted.removeprefix("bytes=").removesuffix("-"))
        if begin and begin >= len(content):
            self.send_response(416)
            self.send_header("Content-Range", f"bytes */{len(content)}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        self.send_response(206 if begin else 200)
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.send_header("ETag", server.tag)
        self.send_header("Content-Length", str(len(content) - begin))
        self.end_headers()
        rest = content[begin:]
        if server.breaks:
            server.breaks -= 1
            rest = rest[: len(rest) // 2]
        self.wfile.write(rest)

    def log_message(self, *_):
        pass


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr(downloading, "PAUSE", 0.01)
    monkeypatch.setattr(downloading, "CHUNK", 4096)
    server = Server()
    server.files["/file"] = CONTENT
    yield server
    server.shutdown()
    server.server_close()


def md5(content):
    return hashlib.md5(content).hexdigest()


def test_a_break_is_gone_on_from_within_one_call(server, tmp_path):
    server.breaks = 2
    seen = []
    download(f"{server.address}/file", tmp_path / "file", md5(CONTENT), lambda done, total: seen.append((done, total)))
    assert (tmp_path / "file").read_bytes() == CONTENT
    begins = [0 if wanted is None else int(wanted[6:-1]) for _, wanted in server.asked]
    assert len(begins) == 3 and 0 == begins[0] < begins[1] < begins[2]
    assert seen[-1] == (len(CONTENT), len(CONTENT))
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_later_call_resumes_what_an_earlier_one_left(server, tmp_path, monkeypatch):
    monkeypatch.setattr(downloading, "TRIES", 1)
    server.breaks = 1

    def stop(done, total):
        if done > 100_000:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        download(f"{server.address}/file", tmp_path / "file", report=stop)
    assert not (tmp_path / "file").exists()
    server.breaks = 0
    download(f"{server.address}/file", tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT
    assert int(server.asked[1][1][6:-1]) > 90_000


@pytest.mark.parametrize("changed", ["replaced", "no ranges"])
def test_it_starts_over_where_it_cannot_resume(server, tmp_path, changed):
    (tmp_path / ".file.part").write_bytes(CONTENT[:5000])
    (tmp_path / ".file.tag").write_text('"0"' if changed == "replaced" else '"1"')
    server.ranges = changed == "replaced"
    download(f"{server.address}/file", tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_part_that_is_whole_needs_no_more_bytes(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(CONTENT)
    download(f"{server.address}/file", tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT and len(server.asked) == 1


def test_a_part_that_is_too_long_is_dropped(server, tmp_path):
    (tmp_path / ".file.part").write_bytes(CONTENT + b"more")
    download(f"{server.address}/file", tmp_path / "file", md5(CONTENT))
    assert (tmp_path / "file").read_bytes() == CONTENT


def test_a_wrong_hash_is_refused_and_nothing_is_left(server, tmp_path):
    with pytest.raises(DownloadError, match=f"has MD5 {md5(CONTENT)}, published is {'0' * 32}.* not kept"):
        download(f"{server.address}/file", tmp_path / "file", "0" * 32)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_gzip_file_is_refused(server, tmp_path):
    whole = gzip.compress(CONTENT)
    server.files |= {"/good.gz": whole, "/bad.gz": whole[:-8] + bytes([whole[-8] ^ 1]) + whole[-7:], "/short.gz": whole[:-20]}
    download(f"{server.address}/good.gz", tmp_path / "good.gz")
    for name in ("bad.gz", "short.gz"):
        with pytest.raises(DownloadError, match=f"{name} .* is damaged"):
            download(f"{server.address}/{name}", tmp_path / name)
    assert [path.name for path in tmp_path.iterdir()] == ["good.gz"]


def test_what_the_server_refuses_is_said_at_once_and_what_it_cannot_now_is_tried_again(server, tmp_path):
    with pytest.raises(DownloadError, match="404"):
        download(f"{server.address}/none", tmp_path / "none")
    assert len(server.asked) == 1
    server.status = 503
    with pytest.raises(DownloadError, match="cannot reach .* 503"):
        download(f"{server.address}/file", tmp_path / "file")
    assert len(server.asked) == 1 + downloading.TRIES


# data sets

MOVIES = "1::Toy Story (1995)::Animation|Children's|Comedy\n2::Misérables, Les (1998)::Drama\n3::Untitled::Drama\n"
RATINGS = "1::1::5::978300760\n1::2::3::978302109\n2::1::4::978301968\n"


@pytest.fixture
def movielens(server, monkeypatch):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as archive:
        archive.writestr("ml-1m/movies.dat", MOVIES.encode("latin-1"))
        archive.writestr("ml-1m/ratings.dat", RATINGS.encode("latin-1"))
        archive.writestr("ml-1m/README", "terms")
    server.files["/ml-1m.zip"] = stream.getvalue()
    monkeypatch.setattr(public_data, "GROUPLENS", server.address)
    real = public_data.Remote
    monkeypatch.setattr(public_data, "Remote", lambda url, name, _=None: real(url, name, md5(stream.getvalue())))
    return server


def said(capsys, *arguments):
    with pytest.raises(SystemExit) as end:
        main(["fetch", *map(str, arguments)])
    output = capsys.readouterr()
    return end.value.code, output.out, output.err


def test_movielens_becomes_the_input_contract(movielens, tmp_path, capsys):
    status, text, _ = said(capsys, "movielens-1m", "-o", tmp_path / "data")
    assert status == 0 and "no commercial use" in text and "grouplens.org" in text and "qbert-ray init" in text
    items, interactions = (pl.read_parquet(tmp_path / "data" / f"{name}.parquet") for name in ("items", "interactions"))
    assert items.rows() == [
        ("1", "Toy Story (1995)", ["Animation", "Children's", "Comedy"], 1995),
        ("2", "Misérables, Les (1998)", ["Drama"], 1998),
        ("3", "Untitled", ["Drama"], None),
    ]
    assert interactions.rows() == [("1", "1", 5.0, 978300760), ("1", "2", 3.0, 978302109), ("2", "1", 4.0, 978301968)]
    domain = Domain(attributes=["genres"])
    assert open_source(str(tmp_path / "data"), "m", "items", domain).format == "contract"
    assert open_source(str(tmp_path / "data"), "m", "interactions", domain, needs_rating=True).format == "contract"


def test_a_second_call_does_nothing_and_a_changed_file_is_fetched_again(movielens, tmp_path, capsys):
    said(capsys, "movielens-1m", "-o", tmp_path)
    times = {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")}
    _, text, _ = said(capsys, "movielens-1m", "-o", tmp_path)
    assert "was there" in text and len(movielens.asked) == 1
    assert {path.name: path.stat().st_mtime_ns for path in tmp_path.glob("*.parquet")} == times
    (tmp_path / "ml-1m.zip").write_bytes(b"cut")
    said(capsys, "movielens-1m", "-o", tmp_path)
    assert len(movielens.asked) == 2 and zipfile.is_zipfile(tmp_path / "ml-1m.zip")


def test_the_published_hash_is_asked_of_movielens(server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(public_data, "GROUPLENS", server.address)
    server.files["/ml-1m.zip"] = b"something else"
    status, _, text = said(capsys, "movielens-1m", "-o", tmp_path)
    assert status == 2 and "published is c4d9eecfca2ab87c1945afe126590906" in text and "not kept" in text
    assert list(tmp_path.glob("*")) == []


@pytest.mark.parametrize(
    ("name", "paths", "review", "meta"),
    [
        (
            "amazon-2023:Gift_Cards",
            ("/amazon_2023/raw/meta_categories/meta_Gift_Cards.jsonl.gz", "/amazon_2023/raw/review_categories/Gift_Cards.jsonl.gz"),
            {"user_id": "u", "parent_asin": "B1", "timestamp": 1_600_000_000_000, "rating": 5.0},
            {"parent_asin": "B1", "title": "Card", "store": "Shop", "images": []},
        ),
        (
            "amazon-2018:Gift_Cards",
            ("/amazon_v2/metaFiles2/meta_Gift_Cards.json.gz", "/amazon_v2/categoryFilesSmall/Gift_Cards_5.json.gz"),
            {"reviewerID": "u", "asin": "B1", "unixReviewTime": 1_500_000_000, "overall": 5.0},
            {"asin": "B1", "title": "Card", "brand": "Shop", "imageURL": []},
        ),
    ],
)
def test_amazon_files_keep_their_names_and_are_read_as_published(server, tmp_path, monkeypatch, capsys, name, paths, review, meta):
    monkeypatch.setattr(public_data, "MCAULEY", server.address)
    for path, record in zip(paths, (meta, review), strict=True):
        server.files[path] = gzip.compress((json.dumps(record) + "\n").encode())
    status, text, _ = said(capsys, name, "-o", tmp_path)
    assert status == 0 and "no licence is given" in text
    files = [path.rpartition("/")[2] for path in paths]
    domain = Domain(items=files[0], interactions=files[1])
    assert open_source(str(tmp_path), "a", "items", domain).format == name.partition(":")[0].replace("-", "_")
    assert open_source(str(tmp_path), "a", "interactions", domain).format == name.partition(":")[0].replace("-", "_")
    receipt = json.loads((tmp_path / public_data.RECEIPT).read_text())
    assert receipt["files"][files[1]]["sha256"] == hashlib.sha256(server.files[paths[1]]).hexdigest()
    said(capsys, name, "-o", tmp_path)
    assert len(server.asked) == 2
    assert "holds" in said(capsys, "movielens-1m", "-o", tmp_path)[2]


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("movielens", "there are movielens-1m, amazon-2023:<category>, amazon-2018:<category>"),
        ("amazon-2023:Music_Instruments", "did you mean amazon-2023:Musical_Instruments?"),
        ("amazon-2018", "there are AMAZON_FASHION"),
    ],
)
def test_an_unknown_name_lists_what_there_is(capsys, name, hint):
    status, _, text = said(capsys, name)
    assert status == 2 and hint in text


def test_without_a_name_it_lists_what_there_is(capsys):
    status, text, _ = said(capsys)
    assert status == 0
    assert all(name in text for name in ("movielens-1m", "amazon-2023:CATEGORY", "amazon-2018:CATEGORY", "Musical_Instruments"))
