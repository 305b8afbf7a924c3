"""A store in a Redis server (7 or 6.2; also a cluster, or one that Sentinel watches over).

A value lies in pieces below Redis's limit of 512 MB a string, under names that nobody knows before one script makes
them the value of the key, adds that to the index (a sorted set) and tells of it on a stream. So a value is seen whole
or not at all, whatever dies in between; pieces of an upload that came to no end expire.

Durable as far as the server is: with `appendonly yes` it forgets at most a second (`appendfsync always`: nothing).
`maxmemory-policy` must be `noeviction`, or Redis throws away what was to be kept: another one is refused. A server
that is away is waited for, as long as `timeout_s` allows; one that does not let us in, or whose certificate nobody
vouches for, is not.

Deleting goes in small pages, and memory is given back in the background, so that thousands of values can be freed
while others write: the server is held up for a few milliseconds at a time.

All keys have one hash tag, so that a script may touch them; a cluster therefore keeps a store on one of its shards.
"""

import contextlib
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlencode, urlsplit

import pyarrow as pa

from ..deadline import Deadline
from ..errors import BadInput, NotStored, StoreFull, StoreRefused, StoreUnreachable
from ..redaction import without_password
from .base import Data, Store, check_key, pieces
from .calls import progress

try:
    import redis
    from redis import exceptions
    from redis.backoff import NoBackoff
    from redis.retry import Retry
except ImportError:
    raise BadInput("a store in Redis needs the package redis: pip install redis") from None

_TAG = "{slime_cross_job}"
_INDEX, _EVENTS = f"{_TAG}:index", f"{_TAG}:events"
_INLINE_BYTES = 64 << 10  # a value of this size needs no pieces
_PIECE_BYTES = 32 << 20
_EVENTS_KEPT = 10_000
_READ_BYTES = 4 << 20  # from the socket at once
_UPLOAD_S = 3600  # after which pieces of an upload that came to no end expire
_PAGE = 1000  # keys of a listing
_DELETED_AT_ONCE = 16
_RESERVE_BYTES = 64 << 20

_COMMIT = """
-- KEYS: the value's key, index, events, pieces...; ARGV: key, upload, only if new, bytes inline or '', events kept
local old = redis.call('HMGET', KEYS[1], 'upload', 'pieces')
if ARGV[3] == '1' and old[1] then return old[1] == ARGV[2] and 1 or 0 end
for i = 4, #KEYS do
  if redis.call('PERSIST', KEYS[i]) == 0 and old[1] ~= ARGV[2] then
    if redis.call('EXISTS', KEYS[i]) == 0 then return redis.error_reply('EXPIRED a piece of the upload') end
  end
end
redis.call('HSET', KEYS[1], 'upload', ARGV[2], 'pieces', #KEYS - 3, 'inline', ARGV[4])
redis.call('ZADD', KEYS[2], 0, ARGV[1])
redis.call('XADD', KEYS[3], 'MAXLEN', '~', ARGV[5], '*', 'key', ARGV[1])
if old[1] and old[1] ~= ARGV[2] then
  for i = 0, tonumber(old[2]) - 1 do redis.call('UNLINK', '{slime_cross_job}:piece:' .. old[1] .. ':' .. i) end
end
return 1
"""
_DELETE = """
-- KEYS: index, the keys of values...; ARGV: keys
for i = 2, #KEYS do
  local old = redis.call('HMGET', KEYS[i], 'upload', 'pieces')
  redis.call('UNLINK', KEYS[i])
  redis.call('ZREM', KEYS[1], ARGV[i - 1])
  if old[1] then
    for n = 0, tonumber(old[2]) - 1 do redis.call('UNLINK', '{slime_cross_job}:piece:' .. old[1] .. ':' .. n) end
  end
end
"""


_UNTRUSTED = "{} and this process do not trust each other: {}; check the certificates, and ssl_ca_certs of the URI"


class RedisStore(Store):
    """See the module. `redis://[USER:PASSWORD@]HOST:PORT/DB`, `rediss://` with TLS, `unix:///socket?db=0`; and behind
    a question mark `cluster=true`, or `sentinel=SERVICE` (then HOST:PORT is a sentinel's, and with `rediss://` it is
    spoken to with TLS like the servers), and what the package redis knows: `ssl_ca_certs=FILE` (else the system's),
    `ssl_certfile=FILE&ssl_keyfile=FILE`, `ssl_check_hostname=false`, `ssl_cert_reqs=none` ...
    """

    def __init__(self, uri: str, timeout_s: float = 60.0):
        super().__init__(uri)
        self._timeout_s = timeout_s
        self._redis = _client(uri, timeout_s)
        self._ask("the server", "PING")
        self._check_policy()

    def put(self, key: str, data: Data) -> None:
        self._write(key, data, only_new=False)

    def create(self, key: str, data: Data) -> bool:
        return self._write(key, data, only_new=True)

    def get(self, key: str) -> pa.Buffer:
        name = _name(key)
        seen = None
        while True:
            upload, count, inline = self._ask(key, "HMGET", name, "upload", "pieces", "inline")
            if upload is None:
                raise NotStored(f"{self.shown} has no {key}")
            if not int(count):
                return pa.py_buffer(inline)
            found = [self._ask(key, "GET", _piece(upload.decode(), number)) for number in range(int(count))]
            if None not in found:
                return pa.py_buffer(found[0] if len(found) == 1 else b"".join(found))
            if upload == seen:  # else it was replaced while it was read
                raise NotStored(
                    f"{self.shown} has lost a part of {key}: was it evicted? maxmemory-policy must be noeviction"
                )
            seen = upload

    def delete(self, keys: Iterable[str]) -> None:
        given = [*keys]
        for at in range(0, len(given), _DELETED_AT_ONCE):
            progress()
            page = given[at : at + _DELETED_AT_ONCE]
            names = [_INDEX, *map(_name, page)]
            self._ask("what is to be deleted", "EVAL", _DELETE, len(names), *names, *page)

    def keys(self, prefix: str) -> list[str]:
        low, high = f"[{check_key(prefix)}/", f"({prefix}0"  # '0' follows '/'
        found: list[str] = []
        while True:
            page = self._ask(prefix, "ZRANGEBYLEX", _INDEX, low, high, "LIMIT", 0, _PAGE)
            progress()
            found += [key.decode() for key in page]
            if len(page) < _PAGE:
                return found
            low = f"({found[-1]}"

    def exists(self, key: str) -> bool:
        return bool(self._ask(key, "EXISTS", _name(key)))

    def check_room(self, nbytes: int) -> None:
        memory = self._memory()
        used, most = int(memory["used_memory"]), int(memory.get("maxmemory", 0))
        needed = nbytes + min(nbytes, _PIECE_BYTES)  # a piece is twice there while it arrives
        if most and used + needed + min(_RESERVE_BYTES, most // 20) > most:
            raise StoreFull(
                f"no room for {nbytes} bytes in {self.shown}: {used} of {most} are used; raise maxmemory, or keep less"
            )

    def close(self) -> None:
        self._redis.close()

    # ------------------------------------------------------------------ inside

    def _memory(self) -> dict[str, Any]:
        memory = self._ask("the server", "INFO", "memory")
        if isinstance(memory, bytes):
            memory = dict(line.split(":", 1) for line in memory.decode().splitlines() if ":" in line)
        return dict(memory)

    def _check_policy(self) -> None:
        """A server that throws away what was to be kept is no durable store."""
        policy = self._memory().get("maxmemory_policy", "noeviction")
        if policy != "noeviction":
            raise StoreRefused(
                f"{self.shown} has maxmemory-policy {policy}, with which it throws away what was to be kept: set it "
                "to noeviction, in its configuration file too (CONFIG SET maxmemory-policy noeviction)"
            )

    def _write(self, key: str, data: Data, only_new: bool) -> bool:
        name, upload = _name(key), uuid.uuid4().hex
        given = pieces(data)
        inline, names = b"", list[str]()
        if sum(len(piece) for piece in given) <= _INLINE_BYTES:
            inline = b"".join(given)
        else:
            names = self._upload(key, upload, given)
        keys = [name, _INDEX, _EVENTS, *names]
        args = [key, upload, "1" if only_new else "0", inline, _EVENTS_KEPT]
        try:
            return bool(self._ask(key, "EVAL", _COMMIT, len(keys), *keys, *args))
        except (StoreFull, StoreRefused):  # else it may yet be carried out: what is not committed expires
            self._forget_upload(names)
            raise

    def _upload(self, key: str, upload: str, given: list[memoryview]) -> list[str]:
        """Names of the pieces, which expire unless they are committed."""
        names: list[str] = []
        try:
            for piece in given:
                for at in range(0, len(piece), _PIECE_BYTES):
                    part = piece[at : at + _PIECE_BYTES]
                    names.append(_piece(upload, len(names)))
                    self._ask(key, "SET", names[-1], part, "EX", _UPLOAD_S)
        except (StoreFull, StoreRefused):
            self._forget_upload(names)
            raise
        return names

    def _forget_upload(self, names: list[str]) -> None:
        with contextlib.suppress(Exception):  # they expire
            if names:
                self._command("DEL", *names)

    def _command(self, *words: Any) -> Any:
        """One command, once: every command goes through here, so that tests can stop between any two of them."""
        return self._redis.execute_command(*words)

    def _ask(self, what: str, *words: Any) -> Any:
        """One command, again while the server is away, until the deadline."""
        deadline = Deadline(self._timeout_s)
        while True:
            try:
                return self._command(*words)
            except (
                exceptions.AuthenticationError,
                exceptions.AuthorizationError,
                exceptions.NoPermissionError,
            ) as error:
                raise StoreRefused(f"{self.shown} does not let us in: {error}; check user and password") from None
            except exceptions.OutOfMemoryError as error:
                raise StoreFull(
                    f"no room for {what} in {self.shown}: {error}; raise maxmemory, or keep less"
                ) from None
            except (
                exceptions.ConnectionError,
                exceptions.TimeoutError,
                exceptions.BusyLoadingError,
                exceptions.ReadOnlyError,  # a replica that is to become the master
                exceptions.TryAgainError,
                exceptions.RedisClusterException,
            ) as error:
                if untrusted := _untrusted(error):
                    raise StoreRefused(_UNTRUSTED.format(self.shown, untrusted)) from None
                if not deadline:
                    raise StoreUnreachable(
                        f"{self.shown} does not answer for {self._timeout_s:g} s, at {what}: {error}"
                    ) from None
            except exceptions.ResponseError as error:
                if "NOAUTH" in str(error) or "WRONGPASS" in str(error):
                    raise StoreRefused(f"{self.shown} does not let us in: {error}; check user and password") from None
                raise StoreUnreachable(f"{self.shown} fails at {what}: {error}") from None
            deadline.pause(0.05)


def _client(uri: str, timeout_s: float) -> Any:
    parts = urlsplit(uri)
    query = parse_qs(parts.query)
    for option in ("ssl_ca_certs", "ssl_certfile", "ssl_keyfile"):
        for file in query.get(option, []):  # else it would be a server that is away
            if not Path(file).is_file():
                raise BadInput(
                    f"{option}={file} of {without_password(uri)!r} is no file here: it must be on every node"
                )
    cluster, sentinel = query.pop("cluster", ["false"])[0] == "true", query.pop("sentinel", [""])[0]
    plain = f"{uri.partition('?')[0]}?{urlencode(query, doseq=True)}"
    options: dict[str, Any] = {"socket_connect_timeout": 5.0, "health_check_interval": 15}
    options["socket_read_size"] = _READ_BYTES
    options["socket_timeout"] = max(0.5, min(30.0, timeout_s / 2))
    if not cluster:  # the package's own tries, seconds long, are for nothing where it is refused; the others are ours
        options["retry"] = Retry(NoBackoff(), 0)
    try:
        if cluster:
            return redis.RedisCluster.from_url(plain, **options)
        if sentinel:
            from redis.sentinel import Sentinel

            db = int(parts.path.strip("/") or 0)
            if parts.scheme == "rediss":
                options |= {"ssl": True, **_tls_options(plain)}
            watch = Sentinel([(parts.hostname, parts.port or 26379)], sentinel_kwargs=options, **options)
            with contextlib.suppress(exceptions.TimeoutError):
                _ask_for_trust(watch.sentinels[0])
            access = {"username": parts.username, "password": parts.password}
            return watch.master_for(sentinel, db=db, **access, **options)
        return redis.Redis.from_url(plain, **options)
    except ValueError:  # whose words may quote a part of the password
        raise BadInput(
            f"{without_password(uri)!r} is no URI of a Redis: write redis://[USER:PASSWORD@]HOST:PORT/DB"
        ) from None
    except (exceptions.RedisError, exceptions.RedisClusterException) as error:
        if untrusted := _untrusted(error):
            raise StoreRefused(_UNTRUSTED.format(without_password(uri), untrusted)) from None
        raise StoreUnreachable(f"no Redis cluster answers: {error}") from None


def _tls_options(uri: str) -> dict[str, Any]:
    """Those of a rediss:// URI, as the package redis reads them."""
    return {name: value for name, value in redis.connection.parse_url(uri).items() if name.startswith("ssl_")}


def _ask_for_trust(sentinel: Any) -> None:
    """Raises what a client of the sentinel swallows: that the two do not trust each other."""
    try:
        sentinel.ping()
    except exceptions.ConnectionError as error:
        if _untrusted(error):
            raise


def _untrusted(error: BaseException | None) -> str:
    """How two sides of a connection do not trust each other, which no waiting helps; empty: it is something else."""
    while error is not None:
        if any(words in str(error) for words in ("CERTIFICATE_VERIFY_FAILED", "_ALERT_", "WRONG_VERSION_NUMBER")):
            return str(error)
        error = error.__cause__ or error.__context__
    return ""


def _name(key: str) -> str:
    return f"{_TAG}:value:{check_key(key)}"


def _piece(upload: str, number: int) -> str:
    return f"{_TAG}:piece:{upload}:{number}"
