"""An S3 store on loopback, made by moto, that can be told to answer 500, or not at all, for a while."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import boto3
from moto.server import DomainDispatcherApplication, create_backend_app
from werkzeug.serving import make_server

KEY, SECRET, BUCKET = "AKIDNOBODYSHOULDSEE", "secretthatnobodyshouldsee", "shop"


class Store:
    """Runs from `start` to `stop`; `environment` is what a process needs to reach it."""

    def __init__(self, host: str = "127.0.0.1") -> None:
        logging.getLogger("werkzeug").setLevel(logging.ERROR)
        self.moto = DomainDispatcherApplication(create_backend_app)
        self.broken_until = self.silent_until = 0.0
        self.refused = self.kept_waiting = self.served = 0
        self.server = make_server(host, 0, self, threaded=True)
        self.endpoint = f"http://{host}:{self.server.server_port}"

    @property
    def environment(self) -> dict[str, str]:
        credentials = {"AWS_ACCESS_KEY_ID": KEY, "AWS_SECRET_ACCESS_KEY": SECRET, "AWS_DEFAULT_REGION": "us-east-1"}
        return credentials | {"AWS_ENDPOINT_URL": self.endpoint, "AWS_EC2_METADATA_DISABLED": "true"}

    def __call__(self, environ: dict[str, Any], start_response: Callable[..., Any]) -> Iterable[bytes]:
        if time.monotonic() < self.broken_until:
            environ["wsgi.input"].read(int(environ.get("CONTENT_LENGTH") or 0))
            self.refused += 1
            start_response("500 Internal Server Error", [("Content-Length", "0")])
            return [b""]
        if time.monotonic() < self.silent_until:
            self.kept_waiting += 1
            time.sleep(self.silent_until - time.monotonic())
        self.served += 1
        return self.moto(environ, start_response)

    @property
    def answers(self) -> bool:
        return time.monotonic() > max(self.broken_until, self.silent_until)

    def fail(self, seconds: float) -> None:
        self.broken_until = time.monotonic() + seconds

    def hang(self, seconds: float) -> None:
        """Take requests and answer none of them until then."""
        self.silent_until = time.monotonic() + seconds

    def start(self) -> Store:
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.client.create_bucket(Bucket=BUCKET)
        return self

    def stop(self) -> None:
        self.server.shutdown()

    @property
    def client(self) -> Any:
        return boto3.client("s3", endpoint_url=self.endpoint, aws_access_key_id=KEY, aws_secret_access_key=SECRET, region_name="us-east-1")

    def upload(self, folder: Path, prefix: str) -> None:
        for file in folder.rglob("*"):
            if file.is_file():
                self.client.upload_file(str(file), BUCKET, f"{prefix}/{file.relative_to(folder)}")

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        pages = self.client.get_paginator("list_objects_v2").paginate(Bucket=BUCKET, Prefix=prefix)
        keys = [content["Key"] for page in pages for content in page.get("Contents", [])]
        return {key: self.client.get_object(Bucket=BUCKET, Key=key)["Body"].read() for key in keys}
