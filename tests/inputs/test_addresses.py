"""What a row may name: no other store, no service of this machine or its network, nothing outside the folder of the data."""

import http.server
import os
import socket
import ssl
import threading
import time

import polars as pl
import pytest

from qbert_ray.config.schema import Domain
from qbert_ray.inputs import addresses as module
from qbert_ray.inputs.addresses import AddressError, Addresses, is_public, read_image
from qbert_ray.inputs.image_columns import safe_paths
from qbert_ray.inputs.sources import SourceError, open_source

WEB = Addresses(schemes=("http", "https"))
PRIVATE = ["127.0.0.1", "10.0.0.1", "192.168.1.1", "169.254.169.254", "100.100.100.200", "0.0.0.0", "224.0.0.1", "::1", "fe80::1%eth0"]
PRIVATE += ["fd00:ec2::254", "::ffff:127.0.0.1", "::ffff:169.254.169.254", "64:ff9b::7f00:1", "2002:7f00:1::", "::7f00:1", "::"]
PRIVATE += ["64:ff9b:1::a9fe:a9fe", "::ffff:0:7f00:1", "fec0::1", "5f00::1", "3fff::1"]


@pytest.mark.parametrize("address", PRIVATE)
def test_addresses_of_this_machine_and_its_network_are_not_public(address):
    assert not is_public(address)


@pytest.mark.parametrize("address", ["8.8.8.8", "2606:4700::1111", "::ffff:8.8.8.8"])
def test_others_are(address):
    assert is_public(address)


@pytest.mark.parametrize("address", PRIVATE)
def test_a_name_that_leads_to_one_of_them_is_not_followed(monkeypatch, address):
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("8.8.8.8", 80)), (2, 1, 6, "", (address, 80))])
    with pytest.raises(AddressError, match="unsafe path"):
        read_image("https://images.example.com/a.jpg", 10, WEB)


@pytest.mark.parametrize(
    "uri",
    [
        *("http://%31%32%37.0.0.1/", "http://127.0.0.1%2f@example.com/", "http://[fe80::1%25eth0]/", "http://[fd00:ec2::254]/latest/"),
        *(
            "http://[::ffff:169.254.169.254]/",
            "http://[::ffff:a9fe:a9fe]/",
            "http://017700000001/",
            "http://10.0.0.1/",
            "http://localhost/",
        ),
        *(
            "http://printer.local/",
            "http://user:password@example.com/a",
            "http://example.com\\@127.0.0.1/",
            "http://exa\tmple.com/",
            "http:///a",
        ),
        *(
            "s3://bucket/key?endpoint_override=evil.example.com&scheme=http",
            "s3://key:secret@bucket/a",
            "s3://bucket/a#b",
            "s3://bucket:80/a",
        ),
        *("gs://bucket/key?endpoint_override=evil.example.com", "abfss://container@evil.example.com/a", "hdfs://evil.example.com:8020/a"),
        *("S3://bucket/key?endpoint_override=evil", "mock://bucket/a", "file:///etc/passwd", "ftp://example.com/a"),
    ],
)
@pytest.mark.parametrize("folder", ["/data", "s3://mine/shop"])
def test_rows_choose_no_host_of_ours_and_no_options_of_a_store(uri, folder):
    everything = Addresses(schemes=("http", "https", "s3", "gs", "gcs", "abfss", "hdfs"))
    assert safe_paths(pl.Series([uri]), folder, "", "/data", everything)[0] is None
    with pytest.raises(AddressError):
        read_image(uri, 10, everything)


@pytest.mark.parametrize("path", ["a.jpg?endpoint_override=evil", "x/../a.jpg?endpoint_override=evil", "./a.jpg?scheme=http", "a.jpg#b"])
def test_relative_paths_of_a_remote_catalog_add_no_options(path):
    assert safe_paths(pl.Series([path]), "s3://mine/shop", "?region=x", "")[0] is None
    local = safe_paths(pl.Series([path]), "/data", "", "/data")[0]
    assert local is None or local.startswith("/data/"), "where a question mark is a letter like any other"


def test_options_of_the_config_go_with_paths_below_it():
    domain = Domain(items="items.parquet")
    addresses = Addresses.of("s3://mine/shop?endpoint_override=minio:9000", domain)
    assert addresses.allow("s3://mine/shop/a.jpg?endpoint_override=minio:9000")
    assert not addresses.allow("s3://mine/shop/a.jpg?endpoint_override=evil:9000")


def test_http_is_off_and_hosts_can_be_listed():
    assert not Addresses().allow("http://example.com/a.jpg") and Addresses().allow("https://example.com/a.jpg")
    listed = Addresses(hosts=("*.example.com", "10.0.0.1", "bucket"))
    assert listed.allow("https://images.example.com/a") and listed.allow("https://10.0.0.1/a") and listed.allow("s3://bucket/a")
    assert (
        not listed.allow("https://example.org/a")
        and not listed.allow("s3://other/a")
        and not listed.allow("https://images.example.com.evil/")
    )
    assert not Addresses(hosts=("*",)).allow("https://127.0.0.1/"), "only a host that is named may be private"


@pytest.fixture
def server():
    seen = []

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self):  # noqa: N802
            seen.append((self.path, self.headers["Host"]))
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b"image")

        def log_message(self, *_):
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server, seen
    server.shutdown()


def test_the_connection_goes_to_the_address_that_was_judged(monkeypatch, server):
    """A name that is public when it is judged and private afterwards is looked up once."""
    there, seen = server
    answers = iter([[(2, 1, 6, "", ("127.0.0.1", there.server_port))]])
    asked = []

    def once(host, *arguments, **more):
        if host != "127.0.0.1":
            asked.append(host)
            return next(answers)
        return real(host, *arguments, **more)

    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", once)
    monkeypatch.setattr(module, "is_public", lambda address: True)
    uri = f"http://rebinding.example.com:{there.server_port}/a%20b.jpg?x=1"
    assert read_image(uri, 10, WEB) == b"image"
    assert asked == ["rebinding.example.com"] and seen == [("/a%20b.jpg?x=1", f"rebinding.example.com:{there.server_port}")]


@pytest.mark.parametrize(
    "sent", [b"HTTP/1.1 100 Continue\r\n\r\n", b"X-Header: 1\r\n", b"1\r\nx\r\n"], ids=["continue", "headers", "chunks"]
)
def test_a_host_that_sends_a_little_for_ever_is_left(monkeypatch, sent):
    listener, over = socket.create_server(("127.0.0.1", 0)), threading.Event()

    def drip():
        connection, _ = listener.accept()
        with connection:
            connection.recv(65536)
            begin = b"" if sent.startswith(b"HTTP") else b"HTTP/1.1 200 OK\r\n"
            connection.sendall(begin + (b"Transfer-Encoding: chunked\r\n\r\n" if sent.startswith(b"1") else b""))
            while not over.wait(0.05):
                try:
                    connection.sendall(sent)
                except OSError:
                    return

    thread = threading.Thread(target=drip, daemon=True)
    thread.start()
    monkeypatch.setattr(module, "WHOLE_SECONDS", 0.5)
    port = listener.getsockname()[1]
    monkeypatch.setattr(socket, "getaddrinfo", lambda *_, **__: [(2, 1, 6, "", ("127.0.0.1", port))])
    monkeypatch.setattr(module, "is_public", lambda _: True)
    begin = time.monotonic()
    with pytest.raises(AddressError, match="cannot be read"):
        read_image(f"http://images.example.com:{port}/a.jpg", 1000, WEB)
    took = time.monotonic() - begin
    over.set()
    thread.join()
    listener.close()
    assert 0.4 < took < 10


def test_a_certificate_must_be_of_the_name_not_of_the_address(monkeypatch, tmp_path):
    import trustme

    authority = trustme.CA()
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    authority.issue_cert("other.example.com").configure_cert(context)
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "ca.pem"))
    authority.cert_pem.write_to_path(tmp_path / "ca.pem")
    listener = socket.create_server(("127.0.0.1", 0))

    def accept():
        while True:
            try:
                connection, _ = listener.accept()
                with context.wrap_socket(connection, server_side=True) as secure:
                    secure.recv(1000)
                    secure.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nimage")
            except OSError:
                if listener.fileno() < 0:
                    return

    threading.Thread(target=accept, daemon=True).start()
    port = listener.getsockname()[1]
    real = socket.getaddrinfo
    monkeypatch.setattr(socket, "getaddrinfo", lambda host, *a, **k: real("127.0.0.1", *a, **k))
    monkeypatch.setattr(module, "is_public", lambda address: True)
    assert read_image(f"https://other.example.com:{port}/a", 10, WEB) == b"image"
    with pytest.raises(AddressError, match="cannot be read"):
        read_image(f"https://images.example.com:{port}/a", 10, WEB)
    listener.close()


def test_names_that_do_not_resolve_are_not_passed_on(monkeypatch):
    def fails(*_, **__):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    monkeypatch.setenv("HTTPS_PROXY", "http://127.0.0.1:9")
    with pytest.raises(AddressError, match="cannot be read"):
        read_image("https://nowhere.example.com/a", 10, WEB)


# local files


@pytest.fixture
def data(tmp_path):
    (tmp_path / "secret").write_bytes(b"item_id,title\nsecret,x\n")
    (tmp_path / "data" / "shop").mkdir(parents=True)
    (tmp_path / "data" / "shop" / "a.jpg").write_bytes(b"image")
    (tmp_path / "data" / "shop" / "inside.jpg").symlink_to(tmp_path / "data" / "shop" / "a.jpg")
    (tmp_path / "data" / "shop" / "outside.jpg").symlink_to(tmp_path / "secret")
    (tmp_path / "data" / "shop" / "folder").symlink_to(tmp_path)
    (tmp_path / "data" / "shop" / "items.csv").symlink_to(tmp_path / "secret")
    os.mkfifo(tmp_path / "data" / "shop" / "pipe.jpg")
    return tmp_path / "data"


def test_links_that_lead_outside_the_data_are_refused_unless_allowed(data):
    here = Addresses.of(str(data), Domain(items="shop/*.csv"))
    shop = data / "shop"
    assert read_image(f"{shop}/a.jpg", 10, here) == read_image(f"{shop}/inside.jpg", 10, here) == b"image"
    for name in ("outside.jpg", "folder/secret", "../../secret"):
        with pytest.raises(AddressError, match="unsafe path"):
            read_image(f"{shop}/{name}", 10, here)
    assert read_image(f"{shop}/outside.jpg", 6, Addresses.of(str(data), Domain(follow_links=True))) == b"item_id"
    with pytest.raises(AddressError, match="cannot be read"):
        read_image(f"{shop}/pipe.jpg", 10, here)
    (data.parent / "link").symlink_to(data)
    through = Addresses.of(str(data.parent / "link"), Domain())
    assert read_image(f"{data.parent}/link/shop/a.jpg", 10, through) == b"image", "a root that is a link itself is the config's choice"


@pytest.mark.parametrize("items", ["shop/items.csv", "shop", "shop/*.csv"])
def test_files_of_data_that_lead_outside_are_refused_unless_allowed(data, items):
    with pytest.raises(SourceError, match=r"items.csv.*leads outside .*follow_links"):
        open_source(str(data), "shop", "items", Domain(items=items))
    assert open_source(str(data), "shop", "items", Domain(items=items, follow_links=True)).files
