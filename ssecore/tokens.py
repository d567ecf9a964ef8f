"""API tokens: a file that holds their hashes, and is read again when it has changed.

A token is `<id>.<secret>`. The id finds the entry, the secret (256 random bits) is compared by its SHA-256, in constant
time. What a browser keeps in its cookie is another secret, made of the token's: it opens the same doors and dies with
its token, but the token can't be had from it. The file holds hashes only, so whoever reads it gets neither.

The file has one JSON object a line, mode 0600, and is replaced as a whole. A token that is no longer in it is revoked.
"""

import fcntl
import hashlib
import hmac
import logging
import os
import re
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from datetime import UTC, datetime, timedelta
from pathlib import Path
from tempfile import mkstemp
from typing import Final, Literal

import anyio
import msgspec

from ssecore.errors import SettingsError, Unauthorized

__all__ = ["Credential", "Entry", "Tokens", "add_token", "parse_expiry", "read_tokens", "revoke_tokens", "session_of"]

logger = logging.getLogger("sseapp")

#: A name goes into paths (`/users/<name>/stream`), into the log and into lists.
MAX_NAME: Final = 200
REFRESH_S: Final = 1.0
#: Compared with where there is no such id, so that this takes as long.
_NOBODY: Final = "0" * 64
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}


class Entry(msgspec.Struct, frozen=True):
    """One line of the file. Several may have one name: they are the same caller's."""

    id: str
    name: str
    hash: str
    session: str
    created: datetime
    expires: datetime | None = None


class Credential:
    """A token that was shown, as long as it holds. Streams keep it, and ask it now and then."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.revoked = False

    @property
    def name(self) -> str:
        return self.entry.name

    def refusal(self) -> Unauthorized | None:
        """Why it holds no longer."""
        if self.revoked:
            return _unauthorized("this token was revoked", "token_revoked")
        if self.entry.expires is not None and datetime.now(UTC) >= self.entry.expires:
            return _unauthorized("this token has expired", "token_expired")
        return None


class Tokens:
    """The file's tokens. Raises `SettingsError` where it can't be read; one that isn't there yet holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Credential] = {}
        self._seen: object = ...
        self._read(_signature(path))
        if not self._known:
            logger.warning("%s holds no token: everybody is refused; `sseapp token add NAME` makes one", path)

    def find(self, token: str, kind: Literal["hash", "session"] = "hash") -> Credential:
        """Who shows this token, or this cookie's value. Raises `Unauthorized`."""
        self.refresh()
        id, _, secret = token.partition(".")
        credential = self._known.get(id)
        expected = _NOBODY if credential is None else getattr(credential.entry, kind)
        right = hmac.compare_digest(_sha256(secret), expected)
        if credential is None or not right:
            raise _unauthorized("this token is not one of this service's", "unauthorized")
        if refusal := credential.refusal():
            raise refusal
        return credential

    def refresh(self) -> None:
        """Read the file again if it has changed. Costs one `stat`: a token is known, or revoked, at once."""
        signature = _signature(self._path)
        if signature != self._seen:
            try:
                self._read(signature)
            except SettingsError as error:  # half an edit must not shut everybody out, nor let anybody in
                logger.error("%s; the tokens stay as they were", error)

    async def watch(self) -> None:
        """Notice what has been revoked while no request comes: streams are ended by it."""
        while True:
            await anyio.sleep(REFRESH_S)
            self.refresh()

    def _read(self, signature: object) -> None:
        self._seen = signature
        known = {}
        for entry in read_tokens(self._path):
            old = self._known.get(entry.id)
            known[entry.id] = old if old is not None and old.entry == entry else Credential(entry)
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
    """What the browser's cookie holds in the token's place."""
    id, _, secret = token.partition(".")
    return f"{id}.{hmac.digest(secret.encode(), b'sseapp session', 'sha256').hex()}"


def read_tokens(path: Path) -> list[Entry]:
    """All entries. Raises `SettingsError`; a file that isn't there has none."""
    try:
        lines = path.read_bytes().splitlines()
    except FileNotFoundError:
        return []
    except OSError as error:
        raise SettingsError(f"{path} can't be read: {error.strerror}", field="tokens_file") from None
    entries = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            try:
                entries.append(msgspec.json.decode(line, type=Entry))
            except (msgspec.DecodeError, UnicodeDecodeError) as error:
                raise SettingsError(f"{path}, line {number} is no token: {error}", field="tokens_file") from None
    return entries


def add_token(path: Path, name: str, expires: datetime | None = None) -> str:
    """Make a token, keep its hash, and give it: this once. Raises `SettingsError`."""
    if not name or len(name) > MAX_NAME or not name.isprintable() or "/" in name or name != name.strip():
        raise SettingsError(f"{name!r:.60} is no name: 1 to {MAX_NAME} printable characters, no slash", field="name")
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    token = f"{id}.{secret}"
    session = session_of(token).partition(".")[2]
    now = datetime.now(UTC).replace(microsecond=0)
    with _locked(path):
        entry = Entry(id, name, _sha256(secret), _sha256(session), now, expires)
        _replace(path, [*read_tokens(path), entry])
    return token


def revoke_tokens(path: Path, which: str) -> list[Entry]:
    """Take out all tokens of this name, or the one with this id; gives what was taken out."""
    with _locked(path):
        entries = read_tokens(path)
        revoked = [entry for entry in entries if which in (entry.name, entry.id)]
        if revoked:
            _replace(path, [entry for entry in entries if entry not in revoked])
    return revoked


def parse_expiry(text: str) -> datetime:
    """`90d`, `12h`, `30m` from now on, or an ISO 8601 date (midnight, UTC). Raises `SettingsError`."""
    now = datetime.now(UTC).replace(microsecond=0)
    with suppress(ValueError, OverflowError):
        if match := re.fullmatch(r"([0-9]{1,9})([smhd])", text):
            return now + timedelta(seconds=int(match[1]) * _UNITS[match[2]])
        date = datetime.fromisoformat(text)
        date = date.replace(tzinfo=UTC) if date.tzinfo is None else date.astimezone(UTC)
        if date > now:
            return date
        raise SettingsError(f"{text} is over already", field="expires")
    raise SettingsError(f"{text!r:.40}: expected a time as 90d, 12h, 30m, or a date as 2030-12-31", field="expires")


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The folder is locked, since the file itself gets replaced."""
    try:
        folder = os.open(os.path.realpath(path.parent), os.O_RDONLY)
    except OSError as error:
        raise SettingsError(f"{path.parent} can't be opened: {error.strerror}", field="tokens_file") from None
    try:
        fcntl.flock(folder, fcntl.LOCK_EX)
        yield
    finally:
        os.close(folder)


def _replace(path: Path, entries: list[Entry]) -> None:
    """All or nothing, whoever reads meanwhile."""
    target = os.path.realpath(path)
    new = None
    try:
        file, new = mkstemp(dir=os.path.dirname(target), prefix=".tokens-")  # mode 0600
        with open(file, "wb") as output:
            with suppress(OSError):  # the service may run as another user than who adds tokens
                owner = os.stat(target)
                os.fchown(output.fileno(), owner.st_uid, owner.st_gid)
            output.write(b"".join(msgspec.json.encode(entry) + b"\n" for entry in entries))
            output.flush()
            os.fsync(output.fileno())
        os.replace(new, target)
    except OSError as error:
        if new is not None:
            os.unlink(new)
        raise SettingsError(f"{path} can't be written: {error.strerror}", field="tokens_file") from None
