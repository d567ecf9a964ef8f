"""All settings, from the environment.

The field `heartbeat_s` is the variable `SSEAPP_HEARTBEAT_S`. `none` turns an optional limit off.
"""

import dataclasses
import difflib
import logging
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args, get_origin, get_type_hints
from urllib.parse import urlsplit

import msgspec
from msgspec import Meta

from ssecore.errors import SettingsError

__all__ = ["Settings", "describe"]

logger = logging.getLogger("sseapp")

_PREFIX = "SSEAPP_"
#: Kubernetes sets these for a Service named sseapp or sseapp-<anything>.
_OF_A_SERVICE = re.compile(
    rf"{_PREFIX}(.+_)?(SERVICE_HOST|SERVICE_PORT(_.+)?|PORT(_[0-9]+_(TCP|UDP|SCTP)(_(PROTO|PORT|ADDR))?)?)"
)
_SERVICE_ADDRESS = re.compile("(tcp|udp|sctp)://")
_Seconds = Annotated[float, Meta(gt=0, le=10_000_000)]
_Bytes = Annotated[int, Meta(ge=1)]
#: As browsers send it: lower case, without path and default port.
_Origin = Annotated[str, Meta(pattern=r"^(\*|[a-z][a-z0-9+.-]*://[^\s/?#@,A-Z]+)\Z")]


def _setting(default: Any, help: str, *, secret: bool = False) -> Any:
    return dataclasses.field(default=default, metadata={"help": help}, repr=not secret)


@dataclass(frozen=True)
class Settings:
    """See `describe()`, or `sseapp serve --help`."""

    host: str = _setting("127.0.0.1", "address to listen on")
    port: Annotated[int, Meta(ge=0, le=65535)] = _setting(8000, "port to listen on; 0 picks a free one")
    data_dir: Path = _setting(Path("var"), "folder of the event log, the tasks database and the files")
    log: Annotated[str, Meta(pattern="^(memory|sqlite|(redis|rediss|unix)://.+)$")] = _setting(
        "sqlite", "the event log: sqlite, memory, or a Redis URL (redis://, rediss://, unix://)", secret=True
    )
    lease_s: Annotated[float, Meta(ge=1, le=3600)] = _setting(
        10.0, "Redis: the runs of a replica that is unreachable for this long are closed"
    )
    auth: Literal["off"] | None = _setting(
        None, "'off' disables authentication; without it and without tokens only this machine may use the service"
    )
    tokens_file: Path | None = _setting(None, "file of the API tokens (sseapp token add); if set, a token is required")
    cors_origins: tuple[_Origin, ...] | None = _setting(
        None, "comma-separated origins of other pages that may use it, such as https://example.com; *: any, by token"
    )
    heartbeat_s: _Seconds | None = _setting(15.0, "idle time before a heartbeat")
    send_timeout_s: _Seconds = _setting(30.0, "a client that reads nothing for this long is disconnected")
    drain_s: Annotated[float, Meta(ge=0)] = _setting(8.0, "from SIGTERM to the exit; 'docker stop' allows 10")
    retry_ms: Annotated[int, Meta(ge=0)] = _setting(2000, "reconnection time sent to clients")
    max_stream_s: _Seconds | None = _setting(None, "longest duration of a stream")
    linger_s: _Seconds = _setting(60.0, "a run of a lingering route is cancelled after this time without a reader")
    retention_s: _Seconds | None = _setting(86400.0, "how long the log keeps events, and runs after their end")
    retention_events: _Bytes | None = _setting(100_000, "events kept of one stream; a run with more is ended")
    retention_bytes: _Bytes | None = _setting(64 * 1024 * 1024, "bytes kept of one stream; a run with more is ended")
    log_max_bytes: _Bytes | None = _setting(
        10 * 1024**3, "size of the whole log; beyond it the oldest is deleted, first of callers with over a tenth of it"
    )
    log_full_sync: bool = _setting(False, "sqlite: survive a power failure too; appends are slower")
    max_runs: Annotated[int, Meta(ge=1)] | None = _setting(1000, "running runs")
    max_runs_per_caller: Annotated[int, Meta(ge=1)] | None = _setting(100, "running runs of one authenticated caller")
    max_subscribers: Annotated[int, Meta(ge=1)] | None = _setting(10_000, "open subscriptions to one topic")
    max_streams: Annotated[int, Meta(ge=1)] | None = _setting(10_000, "open streams")
    max_streams_per_caller: Annotated[int, Meta(ge=1)] | None = _setting(
        1000, "open streams of one authenticated caller"
    )
    max_publish_per_s: Annotated[float, Meta(gt=0)] | None = _setting(
        100.0, "publications a second of one authenticated caller, on average"
    )
    max_target_bytes: Annotated[int, Meta(ge=1, le=65535)] | None = _setting(
        60 * 1024, "longest path and query; the parser reads 65535 at most; nginx's default is 8 KiB"
    )
    max_header_bytes: _Bytes | None = _setting(32 * 1024, "largest headers of a request; nginx's default is the same")
    buffer_bytes: _Bytes = _setting(64 * 1024, "how far a source may run ahead of its client")
    max_body_bytes: _Bytes = _setting(1024 * 1024, "largest body of a request")
    max_import_bytes: _Bytes = _setting(1024**3, "largest body of an import, which is spooled to disk")
    log_format: Literal["text", "json"] = _setting("text", "format of the log's lines: text or json")
    mock_delay_s: Annotated[float, Meta(ge=0)] = _setting(0.1, "pause between the mock model's words")
    openai_base_url: str | None = _setting(
        None,
        "the language model's server, or 'local': a small model on this machine; default with a key: OpenAI's",
        secret=True,
    )
    openai_api_key: str | None = _setting(None, "its key", secret=True)
    openai_model: str = _setting("gpt-4o-mini", "its model")

    #: Made by `from_env`: texts name variables, otherwise code.
    of_environment: ClassVar[bool] = False

    def __post_init__(self) -> None:
        hints = get_type_hints(type(self), include_extras=True)
        for field in dataclasses.fields(Settings):
            value = _checked(f"Settings({field.name}=…)", getattr(self, field.name), hints[field.name], field)
            object.__setattr__(self, field.name, value)

    def written(self, name: str, value: str = "") -> str:
        """How to write a setting: `SSEAPP_AUTH=off`, or `Settings(auth='off')`."""
        if self.of_environment:
            return f"{_variable(name)}={value}" if value else _variable(name)
        return f"Settings({name}={repr(value) if value else '…'})"

    @classmethod
    def from_env(cls, environ: Mapping[str, str] | None = None, **overrides: str | None) -> "Settings":
        """Read the environment; `overrides` take precedence. Raises `SettingsError`.

        Logs a warning for unknown variables, except those of Kubernetes.
        """
        environ = os.environ if environ is None else environ
        hints = get_type_hints(cls, include_extras=True)
        values: dict[str, Any] = {}
        known = [_variable(field.name) for field in dataclasses.fields(Settings)]
        for field, variable in zip(dataclasses.fields(Settings), known, strict=True):
            text, name = overrides.get(field.name), f"--{field.name.replace('_', '-')}"
            if text is None:
                text, name = environ.get(variable), variable
            if text is not None and name == f"{_PREFIX}PORT" and _SERVICE_ADDRESS.match(text):
                logger.warning(
                    "SSEAPP_PORT=%s is ignored, and the port is %d: Kubernetes sets this variable for a Service named "
                    "sseapp. To set the port use --port; to remove such variables set enableServiceLinks: false",
                    text,
                    field.default,
                )
                continue
            if text is not None and (text != "" or not variable.startswith("OPENAI_")):
                values[field.name] = _checked(name, text, hints[field.name], field, written=True)
        for variable in sorted(set(environ) - set(known)):
            if variable.startswith(_PREFIX) and not _OF_A_SERVICE.fullmatch(variable):
                near = difflib.get_close_matches(variable, known, 1)
                logger.warning("unknown setting %s is ignored%s", variable, f"; is it {near[0]}?" if near else "")
        settings = cls(**values)
        object.__setattr__(settings, "of_environment", True)
        return settings


def describe() -> str:
    """All variables, for `--help`."""
    lines = []
    fields = dataclasses.fields(Settings)
    width = max(len(_variable(field.name)) for field in fields)
    for field in fields:
        default = "none" if field.default is None else field.default
        lines.append(f"  {_variable(field.name):<{width}}  {field.metadata['help']} (default: {default})")
    return "\n".join(lines)


def _check_url(name: str, url: str) -> None:
    """Refuse an unescaped password: its rest would be logged as a port or a path."""
    try:
        parts = urlsplit(url)
        _ = parts.port
        wrong = "#" in url or "@" in parts.path + parts.query
    except ValueError:
        wrong = True
    if wrong:
        raise SettingsError(
            f"{name}: the URL can't be read. In a user name, a password or a path write / ? # [ ] @ and % as "
            "%2F %3F %23 %5B %5D %40 and %25",
            field=name,
        )


def _variable(name: str) -> str:
    return name.upper() if name.startswith("openai_") else f"{_PREFIX}{name.upper()}"


def _as_path(kind: type, value: Any) -> Path:
    if not isinstance(value, str | Path):
        raise ValueError("expected a path")
    return Path(value)


def _checked(name: str, given: Any, hint: Any, field: "dataclasses.Field[Any]", *, written: bool = False) -> Any:
    """`written`: `given` is the text of a variable or an option."""
    kinds = (hint, *get_args(hint))
    optional = type(None) in kinds
    is_list = any(get_origin(kind) is tuple for kind in kinds)
    if written and optional and given.lower() in ("none", ""):
        return None
    try:
        value = [part.strip() for part in given.split(",")] if written and is_list else given
        value = msgspec.convert(value, hint, strict=not written or Path in kinds, dec_hook=_as_path)
    except msgspec.ValidationError as error:
        expected = str(error).replace("`", "").replace(" | null", "")
    else:
        if field.name in ("log", "openai_base_url"):
            _check_url(name, value or "")
        return value
    # Outside of `except`: the context would show a password.
    if field.name == "log":
        raise SettingsError(f"{name}: expected sqlite, memory, or a Redis URL", field=name)
    if is_list:
        expected = "comma-separated origins such as https://example.com" if written else "a tuple of origins"
        expected = f"expected {expected}"
    if choices := [choice for kind in kinds if get_origin(kind) is Literal for choice in get_args(kind)]:
        expected = f"expected {' or '.join(choices)}"
    if optional:
        expected += ", or none" if written else ", or None"
    shown = f"{name}={given!r}" if written else name.replace("…", f"{given!r:.60}" if field.repr else "…")
    raise SettingsError(f"{shown}: {expected}", field=name)
