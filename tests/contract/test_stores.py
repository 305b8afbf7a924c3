"""What every store promises (storage/base.py), each on every store; then what goes wrong with files only.

What goes wrong with Redis only: test_redis.py.
"""

import random
import shutil
import subprocess
import threading
import time
from concurrent.futures import ThreadPoolExecutor

import hypothesis
import pytest
from hypothesis import strategies

from slime.cross_job.errors import BadInput, CrossJobError, NotStored, StoreFull, StoreRefused, StoreUnreachable
from slime.cross_job.redaction import without_password, without_secrets
from slime.cross_job.storage import open_store
from slime.cross_job.storage.base import parts_of
from slime.cross_job.storage.file import FileStore
from tests.support.patience import patient

from .conftest import OBJECT_STORES, Crash, CrashingDisk, deaths, value

pytestmark = pytest.mark.usefixtures("small_pieces")
SIZES = (0, 1, 499, 500, 501, 1000, 1001, 5000, 100_000)


@pytest.mark.parametrize("nbytes", SIZES)
def test_what_is_put_is_there_byte_for_byte(place, store, nbytes):
    store.put("a/b", value(1, nbytes))
    assert place.open().get("a/b").to_pybytes() == value(1, nbytes)
    store.put("a/b", value(2, nbytes // 2))
    assert place.open().get("a/b").to_pybytes() == value(2, nbytes // 2)
    assert store.keys("a") == ["a/b"]


def test_a_value_may_be_given_in_pieces(store):
    store.put("k/v", [b"one ", memoryview(b"two "), bytearray(b""), b"x" * 3000])
    assert store.get("k/v").to_pybytes() == b"one two " + b"x" * 3000


def test_what_is_read_stays_although_it_is_replaced_or_deleted(store):
    store.put("k/v", value(1, 5000))
    read = store.get("k/v")
    store.put("k/v", value(2, 5000))
    again = store.get("k/v")
    store.delete(["k/v"])
    assert (read.to_pybytes(), again.to_pybytes()) == (value(1, 5000), value(2, 5000))


def test_what_is_absent_is_an_error_that_names_it(store):
    with pytest.raises(NotStored, match="has no a/b"):
        store.get("a/b")
    assert not store.exists("a/b")
    assert store.keys("a") == []
    store.delete(["a/b", "c/d"])


def test_deleting_is_for_good_and_only_for_what_is_named(place, store):
    for name in ("x", "y", "z"):
        store.put(f"a/{name}", value(1, 3000))
    store.delete(["a/x", "a/never", "a/z"])
    assert place.open().keys("a") == ["a/y"]
    assert store.exists("a/y")
    assert not store.exists("a/x")


def test_keys_are_listed_below_their_prefix_in_order(store):
    keys = ["a/1", "a/10", "a/2", "a/b/c", "ab/1", "a-b/1", "b/1"]
    for key in keys:
        store.put(key, b"v")
    assert store.keys("a") == sorted(["a/1", "a/10", "a/2", "a/b/c"])
    assert store.keys("a/b") == ["a/b/c"]
    assert store.keys("c") == []


def test_many_keys_are_listed(place, store):
    """More than a page of the store's: 1,000 of Redis, 100 of the object stores that tests use."""
    count = 120 if place.kind in OBJECT_STORES else 2500
    for number in range(count):
        store.create(f"many/{number:05d}", b"")
    assert store.keys("many") == [f"many/{number:05d}" for number in range(count)]
    store.delete(store.keys("many"))
    assert store.keys("many") == []


@pytest.mark.parametrize("key", ["", "/a", "a/", "a//b", "../a", "a/../b", ".hidden", "a/.hidden", "a b", "é", "a\n"])
def test_what_is_no_key_is_refused(store, key):
    for act in (lambda: store.put(key, b""), lambda: store.get(key), lambda: store.delete([key])):
        with pytest.raises(BadInput, match="invalid key"):
            act()


@pytest.mark.parametrize("key", ["a/" + "b" * 256, "b/" * 500 + "c", 7, None])
def test_a_key_that_not_every_store_could_hold_is_refused(store, key):
    for act in (lambda: store.put(key, b""), lambda: store.create(key, b""), lambda: store.exists(key)):
        with pytest.raises(BadInput, match="invalid key"):
            act()


def test_the_longest_key_is_held(place, store):
    """Of an object store, the path of its URI counts: a UUID and a slash."""
    most = 1024 - 33 if place.kind in OBJECT_STORES else 1000
    longest = "/".join(["k" * 255] * 3 + ["k" * (most - 768)])
    store.put(longest, b"v")
    assert (len(longest), store.get(longest).to_pybytes()) == (most, b"v")
    assert store.create(longest, b"w") is False
    with pytest.raises(BadInput, match=r"invalid key|is too long for"):
        store.put(longest + "k", b"w")


def test_where_a_folder_is_or_a_file_no_other_key_is(store):
    """What is above or below a key is no key; reading and deleting it are as for any that is not there."""
    store.put("x/a/b", b"v")
    for absent in ("x/a", "x/a/b/c", "x/a/b/c/d"):
        with pytest.raises(NotStored):
            store.get(absent)
        store.delete([absent])
        assert (store.exists(absent), store.keys("x/a/b")) == (False, [])
    store.delete(["x/a/b"])
    store.put("x/a", b"w")
    assert (store.keys("x"), store.get("x/a").to_pybytes()) == (["x/a"], b"w")


@pytest.mark.parametrize("act", ["put", "create"])
def test_a_key_for_which_a_folder_has_no_place_is_bad_input(tmp_path, act):
    store = FileStore(f"file://{tmp_path}/s")
    store.put("x/a/b", b"v")
    for clashing in ("x/a", "x", "x/a/b/c", "x/a/b/c/d"):
        with pytest.raises(BadInput, match=f"{clashing} clashes with another key of file://"):
            getattr(store, act)(clashing, b"w")
    assert (store.keys("x"), store.get("x/a/b").to_pybytes()) == (["x/a/b"], b"v")


def test_create_is_for_new_keys_only(place, store):
    assert store.create("a/b", value(1, 3000)) is True
    assert place.open().create("a/b", value(2, 3000)) is False
    assert store.get("a/b").to_pybytes() == value(1, 3000)
    store.delete(["a/b"])
    assert store.create("a/b", b"") is True


def test_of_many_that_create_one_wins(place):
    stores = [place.open() for _ in range(8)]
    start = threading.Barrier(8, timeout=patient(60))
    won: list[int] = []

    def create(me: int) -> None:
        for key in range(20):
            start.wait()
            if stores[me].create(f"race/{key:02d}", f"{me}".encode() * 2000):
                won.append(key)

    with ThreadPoolExecutor(8) as pool:
        assert len([*pool.map(create, range(8))]) == 8
    assert sorted(won) == [*range(20)]
    for key in stores[0].keys("race"):
        assert len(set(stores[0].get(key).to_pybytes())) == 1


def test_readers_see_a_whole_value_whoever_writes(place):
    writers = [place.open() for _ in range(3)]
    writers[0].put("hot/key", b"0" * 4000)
    over = threading.Event()
    troubles: list[str] = []

    def write(me: int) -> None:
        while not over.is_set():
            writers[me].put("hot/key", f"{me}".encode() * random.randrange(1, 4000))

    def read() -> None:
        reader = place.open()
        while not over.is_set():
            try:
                if len(set(reader.get("hot/key").to_pybytes())) != 1:
                    troubles.append("torn")
            except CrossJobError as error:
                troubles.append(str(error))

    with ThreadPoolExecutor(5) as pool:
        at_work = [*(pool.submit(write, me) for me in range(3)), *(pool.submit(read) for _ in range(2))]
        try:
            time.sleep(1.0)
        finally:
            over.set()
    assert [one.exception() for one in at_work] == [None] * 5
    assert troubles == []


# ---------------------------------------------------------------------- a process that dies


@pytest.mark.parametrize("place", ["file", "redis"], indirect=True)
@pytest.mark.parametrize("operation", ["put", "replace", "create", "delete"])
def test_whoever_dies_between_any_two_calls_leaves_the_old_or_the_new(place, operation):
    """After every possible death the store is whole, and the same operation can be done by the next process."""
    old, new = value(1, 3500), value(2, 3500)
    outcomes = []
    for after, death in deaths():
        key = f"d{after}/k"
        before = place.open()
        if operation in ("replace", "delete"):
            before.put(key, old)
        dying = place.open_crashing(after)
        act = {
            "put": lambda: dying.put(key, new),  # noqa: B023
            "replace": lambda: dying.put(key, new),  # noqa: B023
            "create": lambda: dying.create(key, new),  # noqa: B023
            "delete": lambda: dying.delete([key]),  # noqa: B023
        }[operation]
        with death:
            act()
        survivor = place.open()
        there = survivor.exists(key)
        assert survivor.keys(f"d{after}") == ([key] if there else [])
        found = survivor.get(key).to_pybytes() if there else None
        allowed = {"put": (None, new), "replace": (old, new), "create": (None, new), "delete": (old, None)}[operation]
        assert found in allowed
        outcomes.append(found)
        if operation == "delete":
            survivor.delete([key])
            assert not survivor.exists(key)
        elif operation == "create":
            assert survivor.create(key, new) is (found is None)
        else:
            survivor.put(key, new)
            assert survivor.get(key).to_pybytes() == new
    assert outcomes[-1] == {"delete": None}.get(operation, new)


def test_what_a_crash_left_is_removed_later_and_nothing_else(tmp_path):
    store = FileStore(f"file://{tmp_path}/s")
    store.put("a/k", b"old")
    store._disk = CrashingDisk(0)
    with pytest.raises(Crash):
        store.put("a/k", b"new value")
    store = FileStore(f"file://{tmp_path}/s")
    assert len([*(tmp_path / "s" / "a").iterdir()]) == 2
    ((name, state),) = store.drafts("a").items()
    assert store.drafts("a") == {name: state}
    (tmp_path / "s" / name).write_bytes(b"more")
    assert store.drafts("a") != {name: state}, "another process is at work"
    store.delete_drafts([name, "a/never"])
    assert [path.name for path in (tmp_path / "s" / "a").iterdir()] == ["k"]


# ---------------------------------------------------------------------- places that say no


@pytest.mark.parametrize("link", ["a", "a/b", "a/b/k"])
def test_a_symbolic_link_inside_a_store_is_refused(tmp_path, link):
    """It would lead out of the store: what is written and freed there is somebody else's."""
    store = FileStore(f"file://{tmp_path}/s")
    outside = tmp_path / "outside"
    (outside / "b").mkdir(parents=True)
    for file in (outside / "k", outside / "b" / "k"):
        file.write_bytes(b"not ours")
    at = tmp_path / "s" / link
    at.parent.mkdir(parents=True, exist_ok=True)
    at.symlink_to(outside / "k" if link.endswith("k") else outside)
    for act in (
        lambda: store.put("a/b/k", b"x"),
        lambda: store.create("a/b/k", b"x"),
        lambda: store.get("a/b/k"),
        lambda: store.delete(["a/b/k"]),
        lambda: store.keys("a/b/k"),
        lambda: store.exists("a/b/k"),
    ):
        with pytest.raises(StoreRefused, match=f"{at} is a symbolic link: a store has none"):
            act()
    assert (outside / "k").read_bytes() == (outside / "b" / "k").read_bytes() == b"not ours"


def test_a_store_may_itself_be_a_symbolic_link(tmp_path):
    (tmp_path / "there").mkdir()
    (tmp_path / "s").symlink_to(tmp_path / "there")
    store = FileStore(f"file://{tmp_path}/s")
    store.put("a/k", b"v")
    assert store.get("a/k").to_pybytes() == b"v"


def test_a_folder_that_was_deleted_is_an_empty_store_and_is_made_again(tmp_path):
    store = FileStore(f"file://{tmp_path}/s")
    store.put("a/k", b"v")
    shutil.rmtree(tmp_path / "s")
    assert store.keys("a") == []
    store.check_room(100)
    store.put("a/k", b"w")
    assert store.get("a/k").to_pybytes() == b"w"


def test_a_file_system_that_is_not_mounted_any_more_is_away_and_not_an_empty_store(small_disk):
    disk = small_disk("size=4m")
    stores = [FileStore(f"file://{disk}"), FileStore(f"file://{disk}/s")]
    for store in stores:
        store.put("a/k", b"v")
    subprocess.run(["umount", disk], check=True)
    try:
        for store in stores:
            for act in (
                lambda store=store: store.put("a/k", b"x"),
                lambda store=store: store.get("a/k"),
                lambda store=store: store.keys("a"),
                lambda store=store: store.exists("a/k"),
                lambda store=store: store.check_room(1),
            ):
                with pytest.raises(StoreUnreachable, match="mount"):
                    act()
        assert [*disk.iterdir()] == []
    finally:
        subprocess.run(["mount", "-t", "tmpfs", "-o", "size=4m", "tmpfs", disk], check=True)
    (disk / "s").mkdir()
    (disk / "s" / "a").mkdir()
    assert [store.keys("a") for store in stores] == [[], []], "it is mounted again, on another device perhaps"


def test_a_full_disk_is_named_and_nothing_half_is_there(small_disk):
    store = open_store(f"file://{small_disk('size=1m')}/s")
    store.put("a/small", b"x" * 1000)
    with pytest.raises(StoreFull, match=r"no room for a/large in file://.*make room, or keep less"):
        store.put("a/large", b"x" * 2_000_000)
    assert store.keys("a") == ["a/small"]
    store.put("a/fits", b"x" * 500_000)


def test_large_values_leave_room_for_small_ones(small_disk, own_redis):
    """Or the broker could not keep that something was acked, which makes room."""
    for uri in (f"file://{small_disk('size=10m')}/s", own_redis(maxmemory="10mb").uri):
        store = open_store(uri)
        store.check_room(4_000_000)
        with pytest.raises(StoreFull, match="no room for 10000000 bytes in"):
            store.check_room(10_000_000)
    open_store(own_redis().uri).check_room(10**15)


def test_a_folder_that_may_not_be_written_is_named(small_disk):
    disk = small_disk("size=1m")
    store = open_store(f"file://{disk}/s")
    store.put("a/k", b"v")
    subprocess.run(["mount", "-o", "remount,ro", disk], check=True)
    with pytest.raises(StoreRefused, match="does not let us write or read a/k"):
        store.put("a/k", b"w")
    assert store.get("a/k").to_pybytes() == b"v"
    with pytest.raises(StoreRefused):
        open_store(f"file://{disk}/other")


@pytest.mark.parametrize(
    ("uri", "said"),
    [
        ("file://host/path", "names no folder"),
        ("file:///no/such/parent/s", "is no folder here"),
        ("/just/a/path", "is no store"),
        ("", "is no store"),
        ("nonsense://x", "is no store"),
        ("hdfs://host/x", "is no store: give .* one of s3, gs, az"),
        ("s3:///x", "names no bucket"),
        ("gs://user@bucket/x", "names no bucket"),
        ("s3://bucket/x//y", "no path in it"),
        ("gs://bucket/x/%2e%2e/y", "no path in it"),
        ("abfss://account.dfs.core.windows.net/x", "names no bucket"),
        ("s3://bucket/x?nonsense=1", "does not open.*nonsense.*endpoint=https"),
        ("s3://bucket/x?endpoint_override=h:1", "does not open.*endpoint_override.*endpoint=https"),
        ("gs://bucket/x?read_timeout=soon", "does not open.*soon"),
        ("az://container/x", "does not open.*Account must be specified"),
        ("s3://bucket/x?tls_ca_file_path=/no/such", "does not open.*/no/such"),
        ("redis://127.0.0.1:99999/0", "is no URI"),
        ("redis://127.0.0.1:1/0?socket_timeout=soon", "is no URI of a Redis"),
    ],
)
def test_what_is_no_store_is_named(uri, said):
    with pytest.raises(BadInput, match=said):
        open_store(uri, timeout_s=0.1)


@pytest.mark.parametrize(
    ("uri", "shown"),
    [
        ("redis://me:secret@h:1/0", "redis://me:***@h:1/0"),
        ("redis://:pa/ss@h:1/0", "redis://:***@h:1/0"),
        ("redis://:pa@ss@h:1/0", "redis://:***@h:1/0"),
        ("redis://secret@h:1/0", "redis://***@h:1/0"),
        ("redis://:x@[bad/0", "redis://:***@[bad/0"),
        ("unix:///a@b/socket?password=secret", "unix:///a@b/socket?password=***"),
        ("redis://h:1/0?password=a&b#c&x=1", "redis://h:1/0?password=***&x=1"),
        ("s3://KEY:sec/ret@bucket/run", "s3://KEY:***@bucket/run"),
        ("redis://:pa?password=x@h", "redis://:***"),
        ("file:///a/b@c:d", "file:///a/b@c:d"),
        ("rediss://h:1/0?x=1&ssl_password=secret", "rediss://h:1/0?x=1&ssl_password=***"),
        ("az://a/r?account_key=a&sig=b&sas_sig=c&sigma=d", "az://a/r?account_key=***&sig=***&sas_sig=***&sigma=d"),
        ("az://a/r?master_key=a&sas_key=b&account_name=c", "az://a/r?master_key=***&sas_key=***&account_name=c"),
        ("gs://b/r?service_account_key=a&bearer_token=b", "gs://b/r?service_account_key=***&bearer_token=***"),
        (
            "s3://b/r?access_key_id=a&secret_access_key=b&region=eu",
            "s3://b/r?access_key_id=***&secret_access_key=***&region=eu",
        ),
        ("rediss://h:1/0?ssl_keyfile=/a/b", "rediss://h:1/0?ssl_keyfile=/a/b"),
    ],
)
def test_passwords_are_not_shown(uri, shown):
    assert without_password(uri) == shown


@pytest.mark.parametrize(
    "uri",
    [
        *("redis://:pa/ss@h", "redis://:pa#ss@h:1/0", "redis://:pa?ss@h", "redis://:x@[bad/0", "redis://u:p@ss/x@h"),
        *("s3://KEY:sec/ret@bucket", "s3://KEY:sec?ret@bucket/run", "rediss://:[x@h:6379/0", "gs://k:s#x@bucket"),
    ],
)
def test_a_password_that_had_to_be_quoted_is_an_error_that_says_how_and_does_not_show_it(uri):
    with pytest.raises(BadInput, match=r"%2F %3F %23 %40") as refused:
        open_store(uri, timeout_s=0.1)
    assert without_password(uri) in str(refused.value)


@hypothesis.given(
    secret=strategies.text(strategies.characters(codec="utf-8", exclude_categories=["Cc", "Cs"]), min_size=6),
    where=strategies.sampled_from(
        [
            *(
                "redis://:{}@h:1/0",
                "redis://me:{}@h:1/0?db=1",
                "rediss://{}@h",
                "redis://:{}@[bad/0",
                "unix://u:{}@/s",
            ),
            *("s3://KEY:{}@bucket/run", "gs://{}@bucket", "abfss://{}@h:99999/", "file://me:{}@host/a"),
            *("redis://h:1/0?password={}", "s3://b?secret_access_key={}&region=eu", "nonsense://:{}@h?x"),
        ]
    ),
)
@hypothesis.example("pa/ss@x://", "redis://:{}@h:1/0")
@hypothesis.example("/00000", "rediss://{}@h")
@hypothesis.example("00000:", "rediss://{}@h")
@hypothesis.settings(deadline=None, max_examples=300)
def test_no_text_about_a_store_shows_its_secret(secret, where):
    """Neither as it was given nor as it is meant, whatever is wrong with the URI."""
    hypothesis.assume(secret.strip("*") and secret not in where.format("") and "&" not in secret)
    uri = where.format(secret)
    assert secret not in without_password(uri)
    assert secret not in without_secrets(f"cannot open {uri}: bad '{secret}'", uri)
    said = ""
    try:
        parts_of(uri)
    except BadInput as error:
        said = str(error)
    assert secret not in said
