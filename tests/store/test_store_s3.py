"""Objects in a bucket: the same contract as a folder, with a server that may refuse."""

from __future__ import annotations

import hashlib
import http.server
import json
import logging
import os
import stat
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from typing import Any

import buckets
import pytest
import store_builders as build

from lori_manager import doctor
from lori_manager.errors import Conflict, DamagedObject, InvalidInput, StorageFailed
from lori_manager.records import Split
from lori_manager.refs import AdapterRef
from lori_manager.store import s3 as remote
from lori_manager.store.cache import Cache
from lori_manager.store.files import MissingObject, ObjectStore
from lori_manager.store.s3 import S3Objects, normal_url, parse_url
from lori_manager.store.store import Store

CONTENT = b"some weights" * 1000
DIGEST = hashlib.sha256(CONTENT).hexdigest()
KEY = f"pre/fix/objects/{DIGEST[:2]}/{DIGEST[2:]}"


@pytest.fixture
def objects(bucket: str, tmp_path: Path) -> S3Objects:
    return S3Objects(f"s3://{bucket}/pre/fix", "me", Cache(tmp_path / "cache"))


@pytest.fixture(params=["folder", "s3"])
def either(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    if request.param == "s3":
        return request.getfixturevalue("objects")
    (tmp_path / "objects").mkdir()
    return ObjectStore(tmp_path / "objects")


@pytest.fixture
def remote_store(bucket: str, tmp_path: Path) -> Store:
    store = Store.create(tmp_path / "ws" / ".lori")
    store.keep_objects_at(f"s3://{bucket}/team/a/")
    store.set_base(build.base())
    return store


# the contract of every place


def test_what_was_put_is_there(either: Any, tmp_path: Path) -> None:
    assert not either.exists(DIGEST)
    assert either.age(DIGEST) is None
    assert not either.keep(DIGEST)
    assert either.put(CONTENT) == either.put(CONTENT) == DIGEST
    assert either.get(DIGEST) == CONTENT
    either.check(DIGEST)
    assert either.exists(DIGEST)
    assert either.missing([DIGEST, "0" * 64]) == ["0" * 64]
    assert either.keep(DIGEST)
    assert either.size(DIGEST) == len(CONTENT)
    assert either.age(DIGEST) < timedelta(minutes=2)
    assert DIGEST[2:] in either.where(DIGEST)
    (tmp_path / "file").write_bytes(CONTENT * 2)
    second = either.put_file(tmp_path / "file")
    empty = either.put(b"")
    assert either.get(empty) == b""
    assert list(either.digests()) == sorted([DIGEST, second, empty])
    assert list(either.leftovers()) == []
    either.remove(DIGEST)
    either.remove(DIGEST)
    assert not either.exists(DIGEST)
    for look in (either.get, either.check, either.size):
        with pytest.raises(MissingObject, match="is missing"):
            look(DIGEST)


@pytest.mark.parametrize("digest", ["", "../" * 22, "A" * 64, "g" * 64, "a" * 63])
def test_what_is_no_digest_is_damage(either: Any, digest: str) -> None:
    for look in (either.get, either.check, either.size, either.exists, either.age, either.remove):
        with pytest.raises(DamagedObject, match="no SHA-256"):
            look(digest)


def test_many_names_are_listed_in_order(objects: S3Objects) -> None:
    with ThreadPoolExecutor(4) as pool:
        put = list(pool.map(objects.put, (b"%d" % i for i in range(1005))))
    assert list(objects.digests()) == sorted(put)


# what S3 adds


def test_names_are_created_once_and_lie_as_in_a_folder(
    objects: S3Objects, s3: Any, bucket: str
) -> None:
    with ThreadPoolExecutor(8) as pool:
        assert set(pool.map(objects.put, [CONTENT] * 16)) == {DIGEST}
    assert s3.names(bucket) == [KEY]
    assert objects.where(DIGEST) == f"s3://{bucket}/{KEY}"
    assert not objects._create(KEY.removeprefix("pre/fix/"), b"other content")
    assert s3.ask("GET", f"/{bucket}/{KEY}")[1] == CONTENT


def test_damage_is_found_and_healed_by_putting_the_content_again(
    objects: S3Objects, s3: Any, bucket: str, tmp_path: Path
) -> None:
    objects.put(CONTENT)
    for i, damaged in enumerate((b"", CONTENT[:-1], b"x" + CONTENT[1:])):
        s3.ask("PUT", f"/{bucket}/{KEY}", damaged)
        assert objects.get(DIGEST) == CONTENT  # the cache's
        with pytest.raises(DamagedObject, match="altered"):
            objects.check(DIGEST)
        other = S3Objects(f"s3://{bucket}/pre/fix", "me", Cache(tmp_path / f"other{i}"))
        with pytest.raises(DamagedObject, match="altered"):
            other.get(DIGEST)
        objects.put(CONTENT)
        assert other.get(DIGEST) == CONTENT


def test_what_is_old_is_written_again_so_that_gc_spares_it(
    objects: S3Objects, s3: Any, bucket: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects.put(CONTENT)
    monkeypatch.setattr(remote, "RENEWED", timedelta(0))
    seen = []
    fetch = objects._fetch
    monkeypatch.setattr(objects, "_fetch", lambda digest: seen.append(digest) or fetch(digest))
    objects.put(CONTENT)
    assert seen == []  # it was written again instead
    monkeypatch.setattr(remote, "RENEWED", timedelta(hours=1))
    objects.put(CONTENT)
    assert seen == [DIGEST]


def test_foreign_names_are_passed_over(objects: S3Objects, s3: Any, bucket: str) -> None:
    objects.put(CONTENT)
    for name in ("readme", f"objects/{DIGEST}", "objects/zz/x", f"objects/ab/c/{DIGEST[3:]}"):
        s3.ask("PUT", f"/{bucket}/pre/fix/{name}", b"x")
    s3.ask("PUT", f"/{bucket}/pre/fixed/objects/{DIGEST[:2]}/{'0' * 62}", b"x")
    assert list(objects.digests()) == [DIGEST]


def test_too_large_for_one_request_is_refused(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(remote, "LARGEST", 10)
    with pytest.raises(StorageFailed, match="folder store"):
        objects.put(CONTENT)


# the cache


def test_reading_again_asks_nobody(objects: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    objects.put(CONTENT)
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    objects._connected = None  # as in another process
    assert objects.get(DIGEST) == CONTENT


def test_an_altered_copy_is_fetched_again(
    objects: S3Objects, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    objects.put(CONTENT)
    copy = tmp_path / "cache" / DIGEST
    copy.write_bytes(b"y" + CONTENT[1:])
    with caplog.at_level(logging.INFO):
        assert objects.get(DIGEST) == CONTENT
    assert "altered" in caplog.text
    assert copy.read_bytes() == CONTENT


def test_the_cache_is_its_owners_alone_and_bounded(tmp_path: Path) -> None:
    cache = Cache(tmp_path / "cache", limit=100)
    digests = []
    for i in range(5):
        content = b"%d" % i * 30
        digests.append(hashlib.sha256(content).hexdigest())
        cache.put(digests[-1], content)
        os.utime(cache.folder / digests[-1], ns=(i, i))
        if i == 2:
            assert cache.get(digests[0]) is not None  # used last, so kept longest
    assert [cache.get(d) is not None for d in digests] == [True, False, False, True, True]
    cache.put("f" * 64, b"x" * 101)
    assert cache.get("f" * 64) is None
    assert stat.S_IMODE(cache.folder.stat().st_mode) == 0o700


def test_a_disk_that_refuses_the_copy_keeps_nobody_from_reading(
    objects: S3Objects, tmp_path: Path
) -> None:
    (tmp_path / "cache").write_text("a file where the folder should be")
    objects.put(CONTENT)
    assert objects.get(DIGEST) == CONTENT


# what the server or the network refuses


def refused(call: Callable[[], Any]) -> str:
    with pytest.raises(StorageFailed) as caught:
        call()
    told = str(caught.value)
    assert "\n" not in told
    assert "<" not in told
    assert buckets.KEYS["AWS_SECRET_ACCESS_KEY"] not in told
    assert caught.value.__cause__ is None  # a traceback would show what the server said
    return told


@contextmanager
def answering(answer: Callable[[Any], None]) -> Iterator[str]:
    """A server that does that with each request; its URL."""

    class Handler(http.server.BaseHTTPRequestHandler):
        do_PUT = do_GET = do_HEAD = do_POST = answer  # noqa: N815

        def log_message(self, *_: Any) -> None:
            pass

    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


def test_no_bucket(bucket: str, tmp_path: Path) -> None:
    objects = S3Objects("s3://no-such-bucket/x", "me", Cache(tmp_path / "cache"))
    for call in (lambda: objects.put(b"x"), lambda: objects.get(DIGEST), objects.claim,
                 lambda: list(objects.digests())):  # fmt: skip
        told = "s3://no-such-bucket/x: there is no such bucket: make it, or name another"
        assert refused(call) == told


def test_no_network(objects: S3Objects, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    for call in (lambda: objects.put(b"x"), lambda: objects.exists(DIGEST), objects.confirm):
        assert "cannot be reached: check the network" in refused(call)


@pytest.mark.parametrize(
    ("status", "body", "told"),
    [
        (403, "<Error><Code>AccessDenied</Code><Message>verySecretWords</Message></Error>",
         "access was refused"),
        (403, "", "access was refused"),
        (403, "<Error><Code>SignatureDoesNotMatch</Code></Error>", "secret key does not fit"),
        (400, "<Error><Code>ExpiredToken</Code></Error>", "credentials have run out"),
        (401, "", "the credentials were refused"),
        (400, "<Error><Code>OddThing</Code><Message>x</Message></Error>", "OddThing"),
        (501, "<Error><Code>NotImplemented</Code></Error>", "conditional writes"),
    ],
)  # fmt: skip
def test_no_permission_and_other_answers(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch, status: int, body: str, told: str
) -> None:
    def refuse(request: Any) -> None:
        request.rfile.read(int(request.headers.get("content-length") or 0))
        request.send_response(status)
        request.send_header("content-length", str(len(body)))
        request.end_headers()
        request.wfile.write(body.encode())

    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 0})
    with answering(refuse) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert told in refused(lambda: objects.put(b"x"))
        assert told in refused(lambda: objects.get(DIGEST))


SHORT = {"_ASKING": {"timeout": "1s"}, "_FETCHING": {"read_timeout": "1s", "timeout": "30m"},
         "_RETRIES": {"max_retries": 0}}  # fmt: skip


def test_a_server_that_does_not_answer_is_given_up_soon(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in SHORT.items():
        monkeypatch.setattr(remote, name, value)
    told = "the server does not answer in time: check the network"
    over = threading.Event()
    with answering(lambda _: bool(over.wait(60)) and None) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        begun = time.monotonic()
        for call in (objects.claim, objects.confirm, lambda: objects.exists(DIGEST),
                     lambda: objects.remove(DIGEST), lambda: list(objects.digests()),
                     lambda: objects.get(DIGEST), lambda: objects.check(DIGEST),
                     lambda: objects.put(CONTENT)):  # fmt: skip
            assert told in refused(call)
        assert time.monotonic() - begun < 30
        over.set()


def test_what_is_large_takes_the_time_it_needs(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    large = b"weights" * (remote._SMALL // 7 + 1)
    digest = hashlib.sha256(large).hexdigest()

    def slowly(request: Any) -> None:
        if request.command == "PUT":
            time.sleep(2)
            request.rfile.read(int(request.headers["content-length"]))
        request.send_response(200)
        request.send_header("ETag", '"x"')
        request.send_header("Last-Modified", "Thu, 01 Jan 2026 00:00:00 GMT")
        request.send_header("content-length", str(len(large) if request.command == "GET" else 0))
        request.end_headers()
        if request.command == "GET":
            for start in range(0, len(large), len(large) // 4):
                request.wfile.write(large[start : start + len(large) // 4])
                request.wfile.flush()
                time.sleep(0.5)

    for name, value in SHORT.items():
        monkeypatch.setattr(remote, name, value)
    with answering(slowly) as url:
        monkeypatch.setenv("AWS_ENDPOINT_URL", url)
        assert objects.put(large) == digest
        assert objects._fetch(digest) == large
        objects.check(digest)


@pytest.mark.parametrize("longest", [remote._ASKING["timeout"], remote._FETCHING["read_timeout"]])
def test_no_question_takes_two_minutes(longest: str) -> None:
    """The last try begins before no more are made, and may take all of its time."""
    last = timedelta(seconds=int(longest.removesuffix("s")))
    assert remote._RETRIES["retry_timeout"] + last < timedelta(minutes=2)


def test_no_credentials(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.delenv("AWS_ACCESS_KEY_ID")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert "no credentials were found" in refused(lambda: objects.put(b"x"))


def test_credentials_may_lie_in_a_file(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_REGION"):
        monkeypatch.delenv(name)
    secret = tmp_path / "credentials"
    secret.write_text("[team]\naws_access_key_id = AKIAX\naws_secret_access_key = y\n")
    (tmp_path / "config").write_text("[profile team]\nregion = eu-central-1\n")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(secret))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "config"))
    monkeypatch.setenv("AWS_PROFILE", "team")
    assert objects.put(CONTENT) == DIGEST


def test_plain_http_to_another_machine_is_refused(
    objects: S3Objects, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://192.0.2.1:9000")
    assert "plain http" in refused(lambda: objects.put(b"x"))
    for none in (
        "localhost:9000",
        "http://[::1",
        "http://a:x",
        "https://",
        "ftp://a",
        "http://a\n",
    ):
        monkeypatch.setenv("AWS_ENDPOINT_URL", none)
        objects._connected = None
        with pytest.raises(InvalidInput, match="must be a server's URL, such as"):
            objects.put(b"x")
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://user:verySecretWords@127.0.0.1:9000")
    objects._connected = None
    with pytest.raises(InvalidInput) as caught:
        objects.put(b"x")
    assert "verySecretWords" not in str(caught.value)


# URLs


def test_urls() -> None:
    assert parse_url("s3://team") == parse_url("s3://team/") == ("team", "")
    assert parse_url("s3://team/a/b.c_d-e/") == ("team", "a/b.c_d-e")
    assert normal_url("s3://team/a/") == "s3://team/a"
    assert normal_url("s3://team/") == "s3://team"


@pytest.mark.parametrize(
    "text",
    [
        "", "team", "s3:/team", "gs://team/x", "s3://", "s3://TEAM", "s3://ab", "s3://team//x",
        "s3://team/../x", "s3://team/./x", "s3://team/a b", "s3://team/a\nb", "s3://team/é",
        "s3://AKIA:hushhush@team/x", "s3://hushhush@team/x", "s3://team/x?secret=hushhush",
        "s3://team/x#hushhush", "https://team.s3.amazonaws.com/x?X-Amz-Signature=hushhush",
        "s3://team:443/hushhush",
    ],
)  # fmt: skip
def test_other_urls_are_refused_and_never_repeated(tmp_path: Path, text: str) -> None:
    store = Store.create(tmp_path / ".lori")
    with pytest.raises(InvalidInput, match="s3://BUCKET/PREFIX") as caught:
        store.keep_objects_at(text)
    assert "hushhush" not in str(caught.value)
    assert "\n" not in str(caught.value)


# a store over it


def test_a_store_works_over_a_bucket(remote_store: Store, s3: Any, bucket: str) -> None:
    task = build.add_task(remote_store)
    mask = remote_store.add_mask(
        task=task, blob=b"mask", projection="a" * 64, sparsity=0.9, scope="model", kept=1,
        total=9, config={},
    )  # fmt: skip
    adapter = remote_store.add_adapter(build.new_adapter(mask=mask.ref), CONTENT)
    build.score_base(remote_store, task, [1.0] * 10)
    with Store.open(remote_store.root) as again:
        assert again.adapter_bytes(adapter) == CONTENT
        assert again.mask_bytes(mask) == b"mask"
        assert again.eval_keys(task) == build.keys(10)
        assert list(again.verify()) == []
    names = s3.names(bucket)
    assert len(names) == 5
    assert all(name.startswith("team/a/") for name in names)
    assert list((remote_store.root / "objects").iterdir()) == []


def test_no_secret_lies_in_the_store(remote_store: Store) -> None:
    remote_store.add_adapter(build.new_adapter(), CONTENT)
    for path in remote_store.root.rglob("*"):
        if path.is_file():
            content = path.read_bytes()
            assert not any(secret.encode() in content for secret in buckets.KEYS.values()), path


def test_verify_finds_what_is_gone_or_altered_or_needed_by_nobody(
    remote_store: Store, s3: Any, bucket: str
) -> None:
    first, second = (remote_store.add_adapter(build.new_adapter(), b"%d" % i) for i in range(2))
    places = [f"/team/a/objects/{a.digest[:2]}/{a.digest[2:]}" for a in (first, second)]
    s3.ask("DELETE", f"/{bucket}{places[0]}")
    s3.ask("PUT", f"/{bucket}{places[1]}", b"altered")
    orphan = remote_store.objects.put(b"nobody's")
    found = {(f.kind, f.subject) for f in remote_store.verify()}
    assert found == {("missing", first.ref), ("damaged", second.ref), ("orphan", orphan)}


def test_many_files_are_looked_for_at_once(
    remote_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A look for one alone would wait for the others for ever."""
    objects = remote_store.objects
    with ThreadPoolExecutor(8) as pool:
        images = list(pool.map(objects.put, (b"image %d" % i for i in range(31))))
    named = "".join(f'{{"completion":"","image":"{digest}","prompt":"a"}}\n' for digest in images)
    split = Split(objects.put(named.encode()), len(images))
    together = threading.Barrier(16, timeout=10)
    head = objects._head  # type: ignore[attr-defined]
    monkeypatch.setattr(objects, "_head", lambda digest: (together.wait(), head(digest))[1])
    remote_store.add_task(
        "cats",
        scorer="noise_loss",
        scorer_version="1",
        description="",
        splits={"eval": split},
        options={"images": {"folder": "cats"}},
    )
    monkeypatch.undo()
    gone = sorted(images)[::7]
    for digest in gone:
        objects.remove(digest)
    assert objects.missing(sorted(images)) == gone
    assert objects.missing([]) == []


def test_gc_frees_what_nothing_needs(remote_store: Store) -> None:
    kept = remote_store.add_adapter(build.new_adapter(), b"kept")
    gone = remote_store.add_adapter(build.new_adapter("scratch"), b"gone")
    orphan = remote_store.objects.put(b"orphan")
    remote_store.remove([AdapterRef("scratch", "1")])
    assert list(remote_store.collect()) == []  # all is younger than a day
    told = {(f.kind, f.subject) for f in remote_store.collect(grace=timedelta(0), dry_run=True)}
    assert told == {("removed", gone.ref), ("orphan", orphan)}
    list(remote_store.collect(grace=timedelta(0)))
    assert list(remote_store.objects.digests()) == [kept.digest]
    assert list(remote_store.verify()) == []


def test_a_place_is_one_stores(remote_store: Store, bucket: str, tmp_path: Path) -> None:
    url = f"s3://{bucket}/team/a"
    remote_store.keep_objects_at(url)  # once more, as an `init` that goes on does
    with Store.create(tmp_path / "other" / ".lori") as other:
        with pytest.raises(Conflict, match="another store"):
            other.keep_objects_at(url)
        other.keep_objects_at(f"s3://{bucket}/team/b")
        other.set_base(build.base())
        with pytest.raises(Conflict, match="lori clone"):
            other.keep_objects_at(f"s3://{bucket}/team/c")
    with Store.create(tmp_path / "local" / ".lori") as local:
        local.set_base(build.base())
        with pytest.raises(Conflict, match="its own folder"):
            local.keep_objects_at(f"s3://{bucket}/team/d")


@pytest.mark.parametrize("marker", [None, b"{}", b"nonsense", b'{"owner": "somebody"}'])
def test_gc_frees_nothing_where_the_place_is_not_known_to_be_ours(
    remote_store: Store, s3: Any, bucket: str, marker: bytes | None
) -> None:
    digest = remote_store.objects.put(b"orphan")
    name = f"/{bucket}/team/a/lori-store.json"
    assert json.loads(s3.ask("GET", name)[1])["format"] == 1
    if marker is None:
        s3.ask("DELETE", name)
    else:
        s3.ask("PUT", name, marker)
    with pytest.raises(Conflict):
        list(remote_store.collect(grace=timedelta(0)))
    assert remote_store.objects.exists(digest)
    states = {c.name: c.state for c in doctor.examine(remote_store.root)}
    assert states["objects"] == doctor.TROUBLE


def test_doctor_tells_of_a_bucket_that_is_gone(
    remote_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    def look() -> doctor.Check:
        return next(c for c in doctor.examine(remote_store.root) if c.name == "objects")

    assert look().state == doctor.OK
    monkeypatch.setattr(remote, "_RETRIES", {"max_retries": 0})
    monkeypatch.setenv("AWS_ENDPOINT_URL", "http://127.0.0.1:9")
    assert look().state == doctor.TROUBLE
    assert "cannot be reached" in look().told


def test_a_first_place_that_fails_may_be_given_anew(bucket: str, tmp_path: Path) -> None:
    with Store.create(tmp_path / ".lori") as store:
        with pytest.raises(StorageFailed, match="no such bucket"):
            store.keep_objects_at("s3://no-such-bucket/x")
        store.keep_objects_at(f"s3://{bucket}/x")
        store.set_base(build.base())
    with Store.open(tmp_path / ".lori") as store:
        assert store.objects.url == f"s3://{bucket}/x"


def test_without_the_extra_one_line_says_how_to_get_it(
    bucket: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lori_manager.extras.find_spec", lambda _: None)
    store = Store.create(tmp_path / ".lori")
    with pytest.raises(InvalidInput, match=r"lori-manager\[remote\]"):
        store.keep_objects_at(f"s3://{bucket}/x")


def test_writers_go_on_where_gc_came_between(
    remote_store: Store, monkeypatch: pytest.MonkeyPatch
) -> None:
    objects, freed = remote_store.objects, []
    put = objects.put

    def put_and_lose(content: bytes) -> str:
        digest = put(content)
        if not freed:
            freed.append(digest)
            objects.remove(digest)
        return digest

    monkeypatch.setattr(objects, "put", put_and_lose)
    adapter = remote_store.add_adapter(build.new_adapter(), CONTENT)
    assert freed == [adapter.digest]
    assert objects.get(adapter.digest) == CONTENT


def test_a_fork_is_told_instead_of_hanging(remote_store: Store) -> None:
    adapter = remote_store.add_adapter(build.new_adapter(), b"before")
    remote_store.objects._cache.drop(adapter.digest)  # type: ignore[attr-defined]
    pid = os.fork()
    if pid == 0:
        try:
            remote_store.adapter_bytes(adapter)
        except StorageFailed as e:
            os._exit(0 if "spawn" in str(e) else 4)
        os._exit(3)
    assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
