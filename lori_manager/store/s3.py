"""Objects in a bucket that speaks S3, reached through obstore.

A name is only ever created (`If-None-Match: *`), so two writers of the same content meet
harmlessly. A name that is there is written again only with the very content whose digest it is:
where what lies there was altered, or is so old that `gc` might take it before a row needs it.
On return of a `PUT` the object is durable, so that a row may be committed next.

Credentials come from the provider's own chain (environment, files, roles) each time that a
process starts, and stand in no row, file, log or message. What the server answers is told by its
error code alone, for its text may hold more.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
from collections.abc import Collection, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any
from urllib.parse import SplitResult, urlsplit

from lori_manager.errors import Conflict, DamagedObject, InvalidInput, StorageFailed
from lori_manager.extras import check_extra, load_extra
from lori_manager.store.cache import Cache
from lori_manager.store.files import MissingObject, object_name, storing

EXTRA = "remote"
MARKER = "lori-store.json"  # says whose the place is, so that no gc frees another store's objects
LARGEST = 5 * 2**30  # bytes that S3 takes in one request
RENEWED = timedelta(hours=12)  # half of gc's grace: what is older is written again when it is put
_BUCKET = re.compile(r"[a-z0-9][a-z0-9.-]{1,61}[a-z0-9]")
_PREFIX = re.compile(r"(?:[A-Za-z0-9_-][A-Za-z0-9._-]*(?:/|$))*")
_CODE = re.compile(r"<Code>\s*([A-Za-z0-9.]{1,60})\s*</Code>")
_PRINTABLE = re.compile(r"[!-~]+")
_CHUNK = 4 << 20
_AT_ONCE = 32  # questions whether something is there
_SMALL = 1 << 20  # bytes that are sent as quickly as a question
_CONNECT = "10s"
# Of one request. What only asks is asked again for a minute, so it fails within one and a half.
_ASKING = {"timeout": "30s"}
_FETCHING = {"read_timeout": "30s", "timeout": "30m"}  # without a byte; of the whole
_SENDING = {"timeout": "30m"}
_RETRIES = {"max_retries": 4, "retry_timeout": timedelta(seconds=60)}
_LOOPBACK = ("127.0.0.1", "::1", "localhost")
# What S3 answers -> what to do about it.
_MEANING = {
    "NoSuchBucket": "there is no such bucket: make it, or name another",
    "AccessDenied": "access was refused: check the rights of these credentials on it",
    "InvalidAccessKeyId": "the access key is not known there: check the credentials",
    "SignatureDoesNotMatch": "the secret key does not fit: check the credentials",
    "ExpiredToken": "the credentials have run out: renew them",
    "PermanentRedirect": "the bucket lies in another region: set AWS_REGION",
    "AuthorizationHeaderMalformed": "the bucket lies in another region: set AWS_REGION",
    "NotImplemented": "this server lacks conditional writes (If-None-Match), which lori needs",
    "RequestTimeTooSkewed": "this machine's clock is wrong: set it",
}


def parse_url(text: str) -> tuple[str, str]:
    """Bucket and prefix (without slashes around it) of `s3://bucket/prefix`.

    Raises:
        InvalidInput: anything else. The text is not repeated: it may hold a secret.
    """
    scheme, found, rest = text.partition("://")
    bucket, _, prefix = rest.partition("/")
    if (
        not found
        or scheme != "s3"
        or not _BUCKET.fullmatch(bucket)
        or not _PREFIX.fullmatch(prefix)
    ):
        raise InvalidInput(
            "the place for objects must be s3://BUCKET or s3://BUCKET/PREFIX in letters, digits, "
            "'.', '_' and '-', without user, password or query (the credentials come from the "
            "provider's own chain, such as AWS_ACCESS_KEY_ID or ~/.aws); what was given is not"
        )
    return bucket, prefix.rstrip("/")


def normal_url(text: str) -> str:
    """The URL without a slash at its end; raises as `parse_url`."""
    return "/".join(part for part in ("s3:/", *parse_url(text)) if part)


class S3Objects:
    """Immutable content named by its SHA-256, at `s3://bucket/prefix/objects/ab/cdef...`.

    The layout is that of a folder of objects, so that other tools may copy one to the other.
    Every content is held in memory once while it is sent or fetched.

    Args:
        url: `s3://bucket/prefix`.
        owner: the store whose objects these are.
        cache: for what is read again.
    """

    def __init__(self, url: str, owner: str, cache: Cache) -> None:
        self._bucket, self._prefix = parse_url(url)
        self.url = normal_url(url)
        self._owner = owner
        self._cache = cache
        self._connected: _Clients | None = None

    # the place

    def claim(self) -> None:
        """Take the place for this store; once more changes nothing.

        Raises:
            Conflict: it is another store's.
            StorageFailed: no bucket, no network, no permission.
        """
        content = json.dumps({"format": 1, "owner": self._owner}).encode()
        if not self._create(MARKER, content):
            self.confirm()

    def confirm(self) -> None:
        """Refuse a place that is not this store's, before anything there is freed.

        Raises:
            Conflict: it is another store's, or nobody's.
        """
        try:
            with self._asking():
                found = self._obstore.get(self._clients.asking, MARKER).bytes()
            owner = json.loads(bytes(found))["owner"]
        except FileNotFoundError:
            owner = None
        except (ValueError, KeyError, TypeError) as e:
            raise Conflict(
                f"{self.url}/{MARKER} does not say whose the objects are: restore it"
            ) from e
        if owner is None:
            raise Conflict(f"{self.url}/{MARKER} is gone, which says whose it is: restore it")
        if owner != self._owner:
            raise Conflict(
                f"{self.url} holds the objects of another store: choose another prefix "
                "(`lori clone` and `lori pull` copy between stores)"
            )

    # content

    def put(self, content: bytes) -> str:
        """Store `content` and return its digest; durable on return."""
        digest = hashlib.sha256(content).hexdigest()
        if len(content) > LARGEST:
            raise StorageFailed(
                f"an object of {len(content):,} bytes is more than S3 takes at once "
                f"({LARGEST:,}): keep it in a folder store"
            )
        key = self._key(digest)
        if not self._create(key, content) and not self.keep(digest):
            self._send(key, content, "overwrite")
        self._cache.put(digest, content)
        return digest

    def put_file(self, source: Path) -> str:
        """Store a copy of a file; else like `put`."""
        with storing(source):
            content = source.read_bytes()
        return self.put(content)

    def _create(self, key: str, content: bytes) -> bool:
        """Whether the name was new."""
        try:
            self._send(key, content, "create")
        except FileExistsError:
            return False
        return True

    def _send(self, key: str, content: bytes, mode: str) -> None:
        """Raises FileExistsError where the mode is "create" and the name is there."""
        clients = self._clients
        client = clients.asking if len(content) <= _SMALL else clients.sending
        with self._asking():
            self._obstore.put(client, key, content, mode=mode, use_multipart=False)

    def keep(self, digest: str) -> bool:
        """Whether it is there, whole, and young enough to be spared by `gc` for hours."""
        age = self.age(digest)
        if age is None or age >= RENEWED:
            return False
        try:
            self._cache.put(digest, self._fetch(digest))
        except DamagedObject:
            return False
        return True

    def get(self, digest: str) -> bytes:
        """The content, checked against the digest; out of the cache where it is there."""
        object_name(digest)
        content = self._cache.get(digest)
        if content is None:
            content = self._fetch(digest)
            self._cache.put(digest, content)
        return content

    def _fetch(self, digest: str) -> bytes:
        """What lies in the bucket, checked."""
        key = self._key(digest)
        with self._reading(digest):
            content = bytes(self._obstore.get(self._clients.fetching, key).bytes())
        if hashlib.sha256(content).hexdigest() != digest:
            raise DamagedObject(self._altered(digest))
        return content

    def check(self, digest: str) -> None:
        """Read what lies in the bucket, in bounded memory; raises like `get`."""
        key, found = self._key(digest), hashlib.sha256()
        with self._reading(digest):
            fetched = self._obstore.get(self._clients.fetching, key)
            for chunk in fetched.stream(min_chunk_size=_CHUNK):
                found.update(chunk)
        if found.hexdigest() != digest:
            raise DamagedObject(self._altered(digest))

    def exists(self, digest: str) -> bool:
        """Whether it is there; `get` alone knows whether it is whole."""
        return self._head(digest) is not None

    def missing(self, digests: Collection[str]) -> list[str]:
        """Those of them that are not there; many are asked for at a time."""
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            there = pool.map(self.exists, digests)
            return [digest for digest, found in zip(digests, there, strict=True) if not found]

    def size(self, digest: str) -> int:
        """Bytes stored. Raises MissingObject."""
        head = self._head(digest)
        if head is None:
            raise MissingObject(self._missing(digest))
        return int(head["size"])

    def where(self, digest: str) -> str:
        """Its URL."""
        return f"{self.url}/{self._key(digest)}"

    def digests(self) -> Iterator[str]:
        """The digests of all objects, in order; foreign names are passed over."""
        with self._asking():
            listing = self._obstore.list(self._clients.asking, "objects/", chunk_size=1000)
        while True:
            with self._asking():
                chunk = next(listing, None)
            if chunk is None:
                return
            for entry in chunk:
                parts = entry["path"].removeprefix("objects/").split("/")
                digest = "".join(parts)
                if len(parts) == 2 and _is_name(parts, digest):
                    yield digest

    def leftovers(self) -> Iterator[str]:
        """None: an object is written in one request, whole or not at all."""
        return iter(())

    def age(self, digest: str) -> timedelta | None:
        """Time since it was written, by the server's clock and this one; None where it is not."""
        head = self._head(digest)
        return None if head is None else datetime.now(UTC) - head["last_modified"]

    def remove(self, digest: str) -> None:
        """Free it; nothing happens where it is not there."""
        self._cache.drop(digest)
        with self._asking(), contextlib.suppress(FileNotFoundError):
            self._obstore.delete(self._clients.asking, self._key(digest))

    # asking the server

    @staticmethod
    def _key(digest: str) -> str:
        return f"objects/{object_name(digest)}"

    def _head(self, digest: str) -> Any:
        key = self._key(digest)
        try:
            with self._asking():
                return self._obstore.head(self._clients.asking, key)
        except FileNotFoundError:
            return None

    @contextlib.contextmanager
    def _reading(self, digest: str) -> Iterator[None]:
        try:
            with self._asking():
                yield
        except FileNotFoundError:
            raise MissingObject(self._missing(digest)) from None

    @contextlib.contextmanager
    def _asking(self) -> Iterator[None]:
        """Turn what the server or the network refuses into one line.

        FileNotFoundError and FileExistsError stay.
        """
        library = self._obstore
        try:
            yield
        except (library.exceptions.BaseError, OSError) as e:
            code = next(iter(_CODE.findall(str(e))), "")
            if isinstance(e, FileNotFoundError) and code in ("", "NoSuchKey"):
                raise FileNotFoundError(self.url) from None
            if isinstance(e, library.exceptions.AlreadyExistsError):
                raise FileExistsError(self.url) from None
            # `from None`: the library's own text may hold what nobody is to read
            raise StorageFailed(f"{self.url}: {_told(e, code)}") from None

    @property
    def _obstore(self) -> Any:
        return load_extra("obstore", EXTRA, "keeping objects in S3")

    @property
    def _clients(self) -> _Clients:
        """Made when first needed."""
        _stay_in_one_process()
        if self._connected is None:
            self._connected = _connect(self._bucket, self._prefix, self.url)
        return self._connected

    def _missing(self, digest: str) -> str:
        return (
            f"object {digest} is missing ({self.where(digest)}): restore it from a copy, or make "
            "it again"
        )

    def _altered(self, digest: str) -> str:
        return (
            f"object {digest} is cut short or altered ({self.where(digest)}): restore it from a "
            "copy, or remove it and make it again"
        )


_users: set[int] = set()  # the process that obstore's threads run in


def _stay_in_one_process() -> None:
    """obstore's threads do not come along into a fork, which would wait for them forever."""
    _users.add(os.getpid())
    if len(_users) > 1:
        raise StorageFailed(
            "objects in S3 were used before this process was forked, and cannot be used in it: "
            "start it anew (multiprocessing's `spawn`)"
        )


def check_installed() -> None:
    """Raise InvalidInput where the extra is not installed."""
    check_extra("obstore", EXTRA, "keeping objects in S3")


def _is_name(parts: list[str], digest: str) -> bool:
    try:
        return object_name(digest) == "/".join(parts)
    except DamagedObject:
        return False


def _endpoint(given: str) -> SplitResult:
    """The parts of a server's URL, which is checked: the library ends the process on others.

    Raises:
        InvalidInput: says what it must be, and nothing of what it is.
    """
    try:
        split = urlsplit(given)
        whole = split.scheme in ("http", "https") and bool(split.hostname) and split.port != 0
    except ValueError:
        whole = False
    if not whole or not _PRINTABLE.fullmatch(given):
        raise InvalidInput(
            "AWS_ENDPOINT_URL must be a server's URL, such as https://s3.example.org or "
            "http://localhost:9000: correct or unset it"
        )
    if split.username or split.password or split.query:
        raise InvalidInput("AWS_ENDPOINT_URL must hold no user, password or query: remove them")
    return split


@dataclass(frozen=True)
class _Clients:
    """Of one bucket, by how long a request may take.

    Attributes:
        asking: for what is small both ways.
        fetching: for content of any size; given up where nothing comes any more.
        sending: for large content: until the answer, nothing tells whether it goes on.
    """

    asking: Any
    fetching: Any
    sending: Any


def _connect(bucket: str, prefix: str, url: str) -> _Clients:
    """Clients with the provider's credentials, region and endpoint."""
    library: Any = load_extra("obstore.store", EXTRA, "keeping objects in S3")
    options: dict[str, Any] = {"connect_timeout": _CONNECT}
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or None
    if endpoint is not None:
        split = _endpoint(endpoint)
        # plain HTTP shows everything to whoever listens: on this machine, or where it is asked for
        asked = os.environ.get("AWS_ALLOW_HTTP", "").lower() in ("1", "true")
        options["allow_http"] = split.hostname in _LOOPBACK or asked
    settings: dict[str, Any] = {"checksum_algorithm": "SHA256"}
    if endpoint is not None:
        settings["endpoint"] = endpoint
    provider = None
    if "AWS_ACCESS_KEY_ID" not in os.environ:
        provider = _Chain(url)
        if provider.region is not None:
            settings["region"] = provider.region

    def client(times: dict[str, str]) -> Any:
        return library.S3Store(
            bucket,
            prefix=prefix or None,
            client_options=options | times,
            retry_config=_RETRIES,
            credential_provider=provider,
            **settings,
        )

    return _Clients(client(_ASKING), client(_FETCHING), client(_SENDING))


class _Chain:
    """Credentials as the AWS command line finds them, asked for again when they run out."""

    def __init__(self, url: str) -> None:
        session = load_extra("botocore.session", EXTRA, "finding credentials for S3").get_session()
        errors = load_extra("botocore.exceptions", EXTRA, "finding credentials for S3")
        try:
            self._found = session.get_credentials()
            self.region = session.get_config_variable("region")
        except errors.BotoCoreError as e:
            raise StorageFailed(
                f"{url}: the credentials cannot be read ({type(e).__name__}): check ~/.aws"
            ) from None
        if self._found is None:
            raise StorageFailed(
                f"{url}: no credentials were found: set AWS_ACCESS_KEY_ID and "
                "AWS_SECRET_ACCESS_KEY, or run `aws configure`"
            )

    def __call__(self) -> dict[str, Any]:
        now = self._found.get_frozen_credentials()
        return {
            "access_key_id": now.access_key,
            "secret_access_key": now.secret_key,
            "token": now.token,
            "expires_at": datetime.now(UTC) + timedelta(minutes=15),
        }


def _told(error: Exception, code: str) -> str:
    """What went wrong and what to do, in words of our own."""
    kind = type(error).__name__
    if code in _MEANING:
        return _MEANING[code]
    if kind == "PermissionDeniedError" or isinstance(error, PermissionError):
        return _MEANING["AccessDenied"]
    if kind == "UnauthenticatedError":
        return "the credentials were refused: check them"
    if code:
        return f"the server answered {code}: look it up, retry"
    if "TimedOut" in str(error) or "timed out" in str(error):
        return "the server does not answer in time: check the network and AWS_ENDPOINT_URL, retry"
    if "error sending request" in str(error):
        return "the server cannot be reached: check the network and AWS_ENDPOINT_URL, retry"
    if "builder error" in str(error):
        return "plain http to another machine: use https, or set AWS_ALLOW_HTTP=true"
    return f"the server failed ({kind}): retry"
