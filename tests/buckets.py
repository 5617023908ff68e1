"""A real S3 server (moto's) on loopback, in a process of its own, and buckets in it."""

from __future__ import annotations

import http.client
import importlib.util
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

KEYS = {"AWS_ACCESS_KEY_ID": "AKIAEXAMPLEKEY", "AWS_SECRET_ACCESS_KEY": "verySecretWords"}
AUTHORIZATION = (
    f"AWS4-HMAC-SHA256 Credential={KEYS['AWS_ACCESS_KEY_ID']}/20260101/us-east-1/s3/aws4_request, "
    "SignedHeaders=host, Signature=0"
)
SERVE = """
import threading
from moto.server import ThreadedMotoServer
server = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
server.start()
print("port", server.get_host_and_port()[1], flush=True)
threading.Event().wait()
"""
NEEDS = ("moto", "flask", "flask_cors", "obstore", "botocore")


@dataclass
class Server:
    """Where it listens, and the environment in which lori finds it."""

    port: int
    made: int = 0

    @property
    def environment(self) -> dict[str, str]:
        return KEYS | {
            "AWS_ENDPOINT_URL": f"http://127.0.0.1:{self.port}",
            "AWS_REGION": "us-east-1",
            "AWS_EC2_METADATA_DISABLED": "true",
            "NO_PROXY": "127.0.0.1",
        }

    def ask(self, method: str, path: str, body: bytes = b"") -> tuple[int, bytes]:
        """One request past lori: the server looks at no signature."""
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(method, path, body, {"Authorization": AUTHORIZATION})
            answer = connection.getresponse()
            return answer.status, answer.read()
        finally:
            connection.close()

    def bucket(self) -> str:
        """A new one; its name."""
        self.made += 1
        name = f"bucket-{self.made}"
        assert self.ask("PUT", f"/{name}")[0] == 200
        return name

    def names(self, bucket: str) -> list[str]:
        """All that lies in a bucket."""
        return re.findall(r"<Key>([^<]*)</Key>", self.ask("GET", f"/{bucket}")[1].decode())


def missing() -> list[str]:
    """What the server needs and is not installed."""
    return [name for name in NEEDS if importlib.util.find_spec(name) is None]


@contextmanager
def serving() -> Iterator[Server]:
    process = subprocess.Popen(
        [sys.executable, "-c", SERVE],
        stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=os.environ | KEYS,
    )  # fmt: skip
    try:
        assert process.stdout is not None
        told = (line for line in process.stdout if line.startswith("port "))
        yield Server(int(next(told).split()[1]))
    finally:
        process.kill()
        process.wait()
        if process.stdout is not None:
            process.stdout.close()
