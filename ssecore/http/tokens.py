"""API tokens: their hashes in a file.

A token is `<id>.<secret>`. The SHA-256 of the secret (256 random bits) is compared in constant time. A browser's cookie
has a secret derived from it. The file contains neither: one JSON object a line, mode 0600, replaced as a whole.

An editor or a copy may truncate it first, so `sseapp token` marks a complete file by an empty last line: tokens missing
from it are revoked at once, from others after `GRACE_S`. Files with an invalid line are ignored.

The rights are in docs/operating.md.
"""

import hashlib
import hmac
import logging
import math
import os
import re
import secrets
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import mkstemp
from typing import Annotated, Final, Literal

import anyio
import msgspec
from msgspec import Meta

from ssecore.errors import SettingsError, Unauthorized
from ssecore.filelock import FOLDERS, lock

__all__ = [
    "Credential",
    "Entry",
    "Tokens",
    "add_token",
    "parse_expiry",
    "read_tokens",
    "revoke_tokens",
    "session_of",
    "set_rights",
]

logger = logging.getLogger("sseapp")

#: It appears in paths (`/users/<name>/stream`).
MAX_NAME: Final = 200
REFRESH_S: Final = 1.0
#: A slow copy over a network takes seconds.
GRACE_S: Final = 5.0
MAX_RIGHTS: Final = 50
#: `publish:topics/`, the longest name of a topic (200), and stars.
MAX_RIGHT_CHARS: Final = 250
#: Compared for an unknown id, to take as long.
_UNKNOWN: Final = "0" * 64
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RIGHT: Final = re.compile("metrics|(publish|subscribe)(:.+)?")

_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Entry(msgspec.Struct, frozen=True):
    """One line of the file; a caller may have several. Raises `ValueError`."""

    id: str
    name: str
    hash: _Sha256
    session: _Sha256
    created: datetime
    expires: datetime | None = None
    #: `None`: older than rights; may publish and subscribe.
    may: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_rights(self.may or ())
        if self.expires is not None and self.expires.tzinfo is None:
            msgspec.structs.force_setattr(self, "expires", self.expires.replace(tzinfo=UTC))

    @property
    def rights(self) -> tuple[str, ...]:
        if self.may is not None:
            return self.may
        return ("publish", "subscribe", "metrics") if self.name == "metrics" else ("publish", "subscribe")


class Credential:
    """A token that was sent. Its stream checks `refusal`."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.revoked = False

    @property
    def name(self) -> str:
        return self.entry.name

    def may(self, right: str) -> bool:
        action = right.partition(":")[0]
        patterns = (re.sub(r"([?[])", r"[\1]", given) for given in self.entry.rights)
        return any(pattern == action or fnmatchcase(right, pattern) for pattern in patterns)

    def refusal(self) -> Unauthorized | None:
        """The error if it is revoked or expired."""
        if self.revoked:
            return _unauthorized("this token was revoked or changed", "token_revoked")
        if self.entry.expires is not None and datetime.now(UTC) >= self.entry.expires:
            return _unauthorized("this token has expired", "token_expired")
        return None


class Tokens:
    """Raises `SettingsError`, not for a missing file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Credential] = {}
        self._seen: object = ...
        self._grace_until = math.inf  #: a time while tokens are missing
        self._read(_signature(path))
        if not self._known:
            logger.warning("%s has no tokens, so every request is refused: `sseapp token add NAME` creates one", path)
        old = sum(credential.entry.may is None for credential in self._known.values())
        if old:
            logger.warning(
                "%s: tokens created before tokens had rights (%d) may publish and subscribe to every topic; "
                "`sseapp token list` shows them, `sseapp token set NAME --may RIGHT` restricts one",
                path,
                old,
            )

    def find(self, token: str, kind: Literal["hash", "session"] = "hash") -> Credential:
        """By a token or a cookie's value. Raises `Unauthorized`."""
        self.refresh()
        id, _, secret = token.partition(".")
        credential = self._known.get(id)
        expected = _UNKNOWN if credential is None else getattr(credential.entry, kind)
        right = hmac.compare_digest(_sha256(secret), expected)
        if credential is None or not right:
            raise _unauthorized("unknown token", "unauthorized")
        if refusal := credential.refusal():
            raise refusal
        return credential

    def refresh(self) -> None:
        """Read the file if it has changed; costs one `stat`."""
        signature = _signature(self._path)
        if signature != self._seen or time.monotonic() >= self._grace_until:
            try:
                self._read(signature)
            except SettingsError as error:  # half an edit must not revoke tokens
                self._grace_until = math.inf
                logger.error("%s; the tokens stay as they were", error)

    async def watch(self) -> None:
        """Detect revocations without requests, to end streams."""
        while True:
            await anyio.sleep(REFRESH_S)
            self.refresh()

    def _read(self, signature: object) -> None:
        self._seen = signature
        known = {}
        entries, complete = _read_file(self._path)
        for entry in entries:
            old = self._known.get(entry.id)
            known[entry.id] = old if old is not None and old.entry == entry else Credential(entry)
        missing = {} if complete else {id: old for id, old in self._known.items() if id not in known}
        if missing and self._grace_until == math.inf:
            self._grace_until = time.monotonic() + GRACE_S
            text = "%s may be incomplete: tokens missing from it (%d) are revoked in %g s"
            logger.warning(text, self._path, len(missing), GRACE_S)
        if missing and time.monotonic() < self._grace_until:
            known |= missing
        else:
            self._grace_until = math.inf
        for id, credential in self._known.items():
            credential.revoked = known.get(id) is not credential
        self._known = known


def _signature(path: Path) -> object:
    try:
        stat = os.stat(path)
    except OSError as error:
        return error.errno
    return stat.st_mtime_ns, stat.st_ino, stat.st_size


def _unauthorized(detail: str, code: str) -> Unauthorized:
    return Unauthorized(detail, code=code, headers={"www-authenticate": 'Bearer error="invalid_token"'})


def _sha256(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def session_of(token: str) -> str:
    """The cookie's value for a token."""
    id, _, secret = token.partition(".")
    return f"{id}.{hmac.digest(secret.encode(), b'sseapp session', 'sha256').hex()}"


def read_tokens(path: Path) -> list[Entry]:
    """See `Tokens`."""
    return _read_file(path)[0]


def _read_file(path: Path) -> tuple[list[Entry], bool]:
    """The entries, and whether it is complete."""
    try:
        lines = path.read_bytes().split(b"\n")
    except FileNotFoundError:
        return [], False
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}", field="tokens_file") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(msgspec.json.decode(line, type=Entry))
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
                raise SettingsError(f"{path}, line {number} is not a token: {error}", field="tokens_file") from None
    return entries, lines[-1] == b"" and lines[-2:-1] == [b""]


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable() or "/" in name or name != name.strip():
        raise SettingsError(f"{name!r:.60} is not a name: 1 to {MAX_NAME} printable characters, no slash", field="name")


def _check_rights(rights: Sequence[str]) -> None:
    if len(rights) > MAX_RIGHTS:
        raise SettingsError(f"a token can't have more than {MAX_RIGHTS} rights; use patterns with *", field="may")
    for right in rights:
        if len(right) > MAX_RIGHT_CHARS or not right.isprintable() or not _RIGHT.fullmatch(right):
            raise SettingsError(
                f"{right!r:.60} is not a right: expected publish, subscribe, metrics, or publish:PATTERN or "
                f"subscribe:PATTERN with the names of topics, such as publish:topics/orders-* "
                f"({MAX_RIGHT_CHARS} printable characters at most)",
                field="may",
            )


def add_token(path: Path, name: str, expires: datetime | None = None, may: Sequence[str] = ()) -> str:
    """Returns the token. Raises `SettingsError`."""
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    token = f"{id}.{secret}"
    session = session_of(token).partition(".")[2]
    now = datetime.now(UTC).replace(microsecond=0)
    entry = Entry(id, name, _sha256(secret), _sha256(session), now, expires, tuple(may))
    with _edited(path) as entries:
        entries[id] = entry
    return token


def revoke_tokens(path: Path, which: str) -> list[Entry]:
    """By id or name; returns them."""
    with _edited(path) as entries:
        return [entries.pop(id) for id, entry in [*entries.items()] if which in (entry.name, id)]


def set_rights(path: Path, which: str, may: Sequence[str]) -> list[Entry]:
    """By id or name; returns them. Their open streams end. Raises `SettingsError`."""
    with _edited(path) as entries:
        found = [entry for entry in entries.values() if which in (entry.name, entry.id)]
        changed = {entry.id: msgspec.structs.replace(entry, may=tuple(may)) for entry in found}
        entries |= changed
    return list(changed.values())


def parse_expiry(text: str) -> datetime:
    """`90d`, `12h`, `30m`, or an ISO 8601 date (midnight, UTC). Raises `SettingsError`."""
    now = datetime.now(UTC).replace(microsecond=0)
    try:
        if match := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
            expires = now + timedelta(seconds=int(match[1]) * _UNITS[match[2]])
        else:
            expires = datetime.fromisoformat(text)
            expires = expires.replace(tzinfo=UTC) if expires.tzinfo is None else expires.astimezone(UTC)
    except (ValueError, OverflowError):
        raise SettingsError(
            f"{text!r:.40}: expected a time such as 90d, 12h, 30m, or a date such as 2030-12-31", field="expires"
        ) from None
    if expires <= now:
        raise SettingsError(f"{text}: this time is in the past, so the token would never be valid", field="expires")
    return expires


@contextmanager
def _edited(path: Path) -> Iterator[dict[str, Entry]]:
    """Entries by id, to be changed. Locks the folder, since the file is replaced; on Windows another file."""
    place, flags = os.path.realpath(path.parent), os.O_RDONLY
    if not FOLDERS:
        place, flags = os.path.join(place, f".{path.name}.lock"), os.O_RDWR | os.O_CREAT
    try:
        folder = os.open(place, flags, 0o600)
    except OSError as error:
        raise SettingsError(f"{path.parent} can't be opened: {error.strerror}", field="tokens_file") from None
    try:
        lock(folder)
        before = {entry.id: entry for entry in read_tokens(path)}
        entries = dict(before)
        yield entries
        if entries != before:
            _replace(path, entries.values())
    finally:
        os.close(folder)


def _replace(path: Path, entries: Iterable[Entry]) -> None:
    target = os.path.realpath(path)
    new = None
    try:
        file, new = mkstemp(dir=os.path.dirname(target), prefix=".tokens-")  # mode 0600
        with open(file, "wb") as output:
            with suppress(OSError, AttributeError):  # the service may run as another user
                owner = os.stat(target)
                os.fchown(output.fileno(), owner.st_uid, owner.st_gid)
            output.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries) + b"\n")
            output.flush()
            os.fsync(output.fileno())
        os.replace(new, target)
    except OSError as error:
        if new is not None:
            os.unlink(new)
        raise SettingsError(f"{path} can't be written: {error.strerror}", field="tokens_file") from None
