"""API tokens: a file that holds their hashes, and is read again when it has changed.

A token is `<id>.<secret>`. The id finds the entry, the secret (256 random bits) is compared by its SHA-256, in constant
time. What a browser keeps in its cookie is another secret, made of the token's: it opens the same doors and dies with
its token, but the token can't be had from it. The file holds hashes only, so whoever reads it gets neither.

The file has one JSON object a line, mode 0600, and is replaced as a whole. A token that is no longer in it is revoked.

An editor, a copy or a volume's update may truncate the file, or move it out of the way, before it writes the new one.
So a file that `sseapp token` writes ends with an empty line, which says that it is complete: what it lacks is revoked
at once. What any other file lacks (one that is missing, empty, cut or edited by hand) is revoked after `GRACE_S`. A
file with a line that is not a token changes nothing, until it is mended.

A token has rights: `publish` and `subscribe` for every topic, `publish:PATTERN` and `subscribe:PATTERN` for the topics
whose names match (`*` stands for any characters), `metrics`. They add up. Every token, also one without rights, starts
work and reads what is its caller's own. What a route needs is declared in the table (`Route.may`).
"""

import hashlib
import hmac
import logging
import os
import re
import secrets
import time
from collections.abc import Iterator, Sequence
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

#: A name goes into paths (`/users/<name>/stream`), into the log and into lists.
MAX_NAME: Final = 200
REFRESH_S: Final = 1.0
#: How long a token stays valid that is missing from a file which may not be complete. An editor writes within
#: milliseconds; a slow copy over a network takes seconds.
GRACE_S: Final = 5.0
#: Rights of one token: each request of it is compared with all of them.
MAX_RIGHTS: Final = 50
#: The longest name of a topic (200) with `publish:topics/` before it, and room for stars.
MAX_RIGHT_CHARS: Final = 250
#: Compared with where there is no such id, so that this takes as long.
_NOBODY: Final = "0" * 64
_UNITS: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400}
_RIGHT: Final = re.compile("metrics|(publish|subscribe)(:.+)?")

_Sha256 = Annotated[str, Meta(pattern=r"^[0-9a-f]{64}\Z")]


class Entry(msgspec.Struct, frozen=True):
    """One line of the file. Several may have one name: they are the same caller's.

    Raises `ValueError`, which is a `ValidationError` where the line is decoded.
    """

    id: str
    name: str
    hash: _Sha256
    session: _Sha256
    created: datetime
    expires: datetime | None = None
    #: `None`: made before tokens had rights.
    may: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        _check_name(self.name)
        _check_rights(self.may or ())
        if self.expires is not None and self.expires.tzinfo is None:  # written by hand
            msgspec.structs.force_setattr(self, "expires", self.expires.replace(tzinfo=UTC))

    @property
    def rights(self) -> tuple[str, ...]:
        """What it may besides starting work. Before tokens had rights, every token could publish and subscribe."""
        if self.may is not None:
            return self.may
        return ("publish", "subscribe", "metrics") if self.name == "metrics" else ("publish", "subscribe")


class Credential:
    """A token that was shown, as long as it holds. Streams keep it, and ask it now and then."""

    def __init__(self, entry: Entry) -> None:
        self.entry = entry
        self.revoked = False

    @property
    def name(self) -> str:
        return self.entry.name

    def may(self, right: str) -> bool:
        """Whether it has this right: `metrics`, or `publish:` and `subscribe:` with the name of a topic."""
        action = right.partition(":")[0]
        # Of the shell's patterns only the star: the others are characters of a name.
        patterns = (re.sub(r"([?[])", r"[\1]", given) for given in self.entry.rights)
        return any(pattern == action or fnmatchcase(right, pattern) for pattern in patterns)

    def refusal(self) -> Unauthorized | None:
        """Why it holds no longer."""
        if self.revoked:
            return _unauthorized("this token was revoked or changed", "token_revoked")
        if self.entry.expires is not None and datetime.now(UTC) >= self.entry.expires:
            return _unauthorized("this token has expired", "token_expired")
        return None


class Tokens:
    """The file's tokens. Raises `SettingsError` where it can't be read; one that isn't there yet holds none."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._known: dict[str, Credential] = {}
        self._seen: object = ...
        self._grace_until: float | None = None  # tokens are known that the file lacks; by `time.monotonic`
        self._read(_signature(path))
        if not self._known:
            logger.warning("%s holds no token: everybody is refused; `sseapp token add NAME` makes one", path)
        old = sum(credential.entry.may is None for credential in self._known.values())
        if old:
            logger.warning(
                "%s: tokens made before tokens had rights (%d) may publish and subscribe to every topic; "
                "`sseapp token list` shows them, `sseapp token set NAME --may RIGHT` says what one may from now on",
                path,
                old,
            )

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
        grace_over = self._grace_until is not None and time.monotonic() >= self._grace_until
        if signature != self._seen or grace_over:
            try:
                self._read(signature)
            except SettingsError as error:  # half an edit must not shut everybody out, nor let anybody in
                self._grace_until = None
                logger.error("%s; the tokens stay as they were", error)

    async def watch(self) -> None:
        """Notice what has been revoked while no request comes: streams are ended by it."""
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
        until = self._grace_until
        if missing and until is None:
            until = time.monotonic() + GRACE_S
            text = "%s may not be complete: tokens that it lacks now (%d) are revoked in %g s"
            logger.warning(text, self._path, len(missing), GRACE_S)
        if missing and until is not None and time.monotonic() < until:
            known |= missing
        else:
            until = None
        self._grace_until = until
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
    return _read_file(path)[0]


def _read_file(path: Path) -> tuple[list[Entry], bool]:
    """All entries, and whether the file is complete for sure."""
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
    # After the last line end stands nothing; before it, in a complete file, an empty line.
    return entries, lines[-1] == b"" and lines[-2:-1] == [b""]


def _check_name(name: str) -> None:
    if not name or len(name) > MAX_NAME or not name.isprintable() or "/" in name or name != name.strip():
        raise SettingsError(f"{name!r:.60} is not a name: 1 to {MAX_NAME} printable characters, no slash", field="name")


def _check_rights(rights: Sequence[str]) -> None:
    if len(rights) > MAX_RIGHTS:
        raise SettingsError(f"a token has {MAX_RIGHTS} rights at most; use patterns with *", field="may")
    for right in rights:
        if len(right) > MAX_RIGHT_CHARS or not right.isprintable() or not _RIGHT.fullmatch(right):
            raise SettingsError(
                f"{right!r:.60} is not a right: expected publish, subscribe, metrics, or publish:PATTERN or "
                f"subscribe:PATTERN with the names of topics, such as publish:topics/orders-* "
                f"({MAX_RIGHT_CHARS} printable characters at most)",
                field="may",
            )


def add_token(path: Path, name: str, expires: datetime | None = None, may: Sequence[str] = ()) -> str:
    """Make a token with these rights, keep its hash, and give it: this once. Raises `SettingsError`."""
    id, secret = secrets.token_hex(8), secrets.token_urlsafe(32)
    token = f"{id}.{secret}"
    session = session_of(token).partition(".")[2]
    now = datetime.now(UTC).replace(microsecond=0)
    entry = Entry(id, name, _sha256(secret), _sha256(session), now, expires, tuple(may))
    with _locked(path):
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


def set_rights(path: Path, which: str, may: Sequence[str]) -> list[Entry]:
    """Give all tokens of this name, or the one with this id, these rights in place of theirs; gives the changed ones.

    Their open streams end, as they were allowed by the rights of before. Raises `SettingsError`.
    """
    with _locked(path):
        entries = read_tokens(path)
        changed = {
            entry.id: msgspec.structs.replace(entry, may=tuple(may))
            for entry in entries
            if which in (entry.name, entry.id)
        }
        if changed:
            _replace(path, [changed.get(entry.id, entry) for entry in entries])
    return list(changed.values())


def parse_expiry(text: str) -> datetime:
    """`90d`, `12h`, `30m` from now on, or an ISO 8601 date (midnight, UTC). Raises `SettingsError`."""
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
        raise SettingsError(f"{text}: the token would never be valid, this time is in the past", field="expires")
    return expires


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """One writer at a time. The folder is locked, since the file itself gets replaced; on Windows a file beside it."""
    place, flags = os.path.realpath(path.parent), os.O_RDONLY
    if not FOLDERS:
        place, flags = os.path.join(place, f".{path.name}.lock"), os.O_RDWR | os.O_CREAT
    try:
        folder = os.open(place, flags, 0o600)
    except OSError as error:
        raise SettingsError(f"{path.parent} can't be opened: {error.strerror}", field="tokens_file") from None
    try:
        lock(folder)
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
            with suppress(OSError, AttributeError):  # the service may run as another user than who adds tokens
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
