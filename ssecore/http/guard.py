"""Authentication, and pages of other origins: decided before the body is read. For the modes see docs/operating.md.

1.  *Private*: peer, `Host` and `Origin` are loopback (DNS rebinding doesn't change `Host`), no proxy's header, not
    HTTP/1.0 (nginx's default), no page of another origin. A proxy that adds nothing can't be detected.
2.  Only browsers send a page's origin, which pages can't forge: `Sec-Fetch-Site`, otherwise `Origin`, compared with
    `Host`, which a proxy may change (as Go's `CrossOriginProtection`).
3.  Pages of other origins may not use unsafe methods, nor a cookie. Those in `SSEAPP_CORS_ORIGINS` may; `*` allows
    requests with a token. In mode `caller` without such origins the embedding program checks.
4.  A request with neither header is a program's, or a browser's GET from any origin (image, frame, link, `fetch` with
    `no-cors`): over plain HTTP browsers send `Sec-Fetch-Site` only to "potentially trustworthy" addresses (Secure
    Contexts, 3.1), old ones never. Chromium omits it for `[::ffff:127.0.0.1]`, `0.0.0.0` and `[::]`, so these are not
    loopback here. In mode `private` and with a cookie such a request is refused if its `User-Agent` begins with
    `Mozilla/`, which pages can't change: `fetch` sets it only after a preflight, with `Origin`.
5.  The cookie requires HTTPS or loopback: it is sent to all ports, and without HTTPS other ports are the same site. On
    loopback `Sec-Fetch-Site` detects that.
6.  A token in a URL is refused: it is in logs and histories.
7.  A token is limited to its rights (`Route.may`).
"""

import ipaddress
import re
import shlex
from collections.abc import Awaitable, Callable
from functools import lru_cache
from inspect import isawaitable
from typing import Final

from ssecore.errors import (
    BadRequest,
    Forbidden,
    HeadersTooLarge,
    SettingsError,
    TargetTooLong,
    Unauthorized,
)
from ssecore.http.request import Request
from ssecore.http.responses import JSON, Response
from ssecore.http.routes import DELETE, POST, Route
from ssecore.http.tokens import MAX_RIGHT_CHARS, Credential, Tokens, session_of
from ssecore.settings import Settings

__all__ = ["Caller", "Guard"]

#: Returns the caller's name, or `None` to refuse.
Caller = Callable[[Request], str | Awaitable[str | None] | None]

COOKIE: Final = "sseapp_session"
EXPOSED: Final = (
    "accept-ranges, content-disposition, content-location, content-range, etag, location, preference-applied, "
    "retry-after, run-id, x-vercel-ai-ui-message-stream, x-workflow-run-id, x-workflow-stream-tail-index"
)
#: Chromium's maximum.
PREFLIGHT_S: Final = 7200
#: Apache's and Tomcat's.
MAX_HEADER_LINES: Final = 100

#: Starlette's TestClient.
TEST_CLIENT: Final = "testclient"
TEST_SERVER: Final = "testserver"

#: Only proxies and CDNs add these.
_FORWARDED: Final = re.compile(
    "via|cdn-loop|front-end-https|surrogate-capability|x-(url-)?scheme"
    "|(x-)?(forwarded|original|proxy|proxied|real|remote|rewrite|envoy|azure|arr|amzn?|appengine|vercel|nf|varnish)"
    "(-.+)?|(cf|cloudfront|fly|fastly|akamai|tailscale)-.+|(.+-)?(client|connecting)-ip"
)
_forwarded: Final = lru_cache(128)(_FORWARDED.fullmatch)
# The dot first: searching from each digit takes 21 ms for 60 KiB.
_TOKEN_IN_URL: Final = re.compile(rb"(?:^|&)(?:access_token|api_key|token)=|\.(?<=[0-9a-f]{16}\.)[A-Za-z0-9_-]{43}")
#: HTTP/2 may split the header; then commas join the parts.
_OUR_COOKIE: Final = re.compile(rf"(?:^|[;,] *){COOKIE}=([^;,]*)")


class Guard:
    """One app's. Raises `SettingsError`."""

    def __init__(self, settings: Settings, caller: Caller | None = None) -> None:
        modes = {"caller": caller, "tokens": settings.tokens_file, "off": settings.auth}
        given = [mode for mode, value in modes.items() if value is not None]
        if len(given) > 1:
            names = f"{settings.written('auth', 'off')}, {settings.written('tokens_file')}"
            raise SettingsError(f"{names} and caller= exclude each other", field="auth")
        self.mode = given[0] if given else "private"
        self.tokens = Tokens(settings.tokens_file) if settings.tokens_file is not None else None
        self._settings = settings
        self._caller = caller
        origins = frozenset(settings.cors_origins or ())
        self._any_origin, self._origins = "*" in origins, origins - {"*"}
        # Also without an Origin: caches store it.
        self._vary = [(b"vary", b"Origin")] if self._origins else []

    @property
    def _how_to_open(self) -> str:
        settings = self._settings
        tokens = settings.written("tokens_file")
        how = f"set {tokens}" if settings.of_environment else f"give SSEApp a caller=, or {tokens}"
        return (
            f"no authentication is configured, so only requests from this machine are accepted: {how}, "
            f"or {settings.written('auth', 'off')} if anyone may use it"
        )

    @property
    def routes(self) -> list[Route]:
        if self.tokens is None:
            return []
        # Open, for expired tokens.
        return [POST("/session", self._log_in), DELETE("/session", self._log_out, open=True)]

    def admit(self, request: Request) -> None:
        scope, settings = request.scope, self._settings
        target_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if settings.max_target_bytes is not None and target_bytes > settings.max_target_bytes:
            raise TargetTooLong(f"path and query are longer than {settings.max_target_bytes} bytes")
        if len(scope["headers"]) > MAX_HEADER_LINES:
            raise HeadersTooLarge(f"the request has more than {MAX_HEADER_LINES} header lines")
        header_bytes = sum([len(name) + len(value) for name, value in scope["headers"]])
        if settings.max_header_bytes is not None and header_bytes > settings.max_header_bytes:
            raise HeadersTooLarge(f"the headers are larger than {settings.max_header_bytes} bytes")
        if self.mode == "private":
            self._check_private(request)

    def _check_private(self, request: Request) -> None:
        """Rule 1."""
        headers, peer, origin = request.headers, request.scope.get("client"), request.headers.get("origin")
        forwarded = [name for name in headers if _forwarded(name)]
        if forwarded or request.scope.get("http_version") == "1.0":
            raise Forbidden(
                f"this request was forwarded ({[*forwarded, 'HTTP/1.0'][0]:.80}); {self._how_to_open}", code="private"
            )
        address = peer[0] if peer is not None else ""
        in_process = address == TEST_CLIENT
        if "host" in headers and not (_is_loopback(headers["host"]) or (in_process and headers["host"] == TEST_SERVER)):
            raise Forbidden(f"Host {headers['host']!r:.80} is not this machine; {self._how_to_open}", code="private")
        if address and not in_process and not _is_loopback_address(address.removeprefix("::ffff:")):
            raise Forbidden(f"this request comes from another machine; {self._how_to_open}", code="private")
        if origin is not None and origin not in self._origins and not _is_loopback(origin.partition("://")[2]):
            origins = self._settings.written("cors_origins")
            raise Forbidden(f"this page is not from this machine: add its origin to {origins}")

    async def enter(self, request: Request) -> None:
        """Authenticate, and check the origin, if the route isn't `open`."""
        if self.mode == "off":
            return
        foreign = self._is_foreign(request) and (self.mode != "caller" or bool(self._settings.cors_origins))
        safe = request.method in ("GET", "HEAD")
        with_token = self._any_origin and "authorization" in request.headers
        if foreign and (self.mode == "private" or not (safe or with_token)):
            raise self._refuse_foreign()
        if self.mode == "private":
            _check_browser(request)
        if self._caller is not None:
            name = self._caller(request)
            name = await name if isawaitable(name) else name
            if name is not None and not isinstance(name, str):
                text = f"caller= must return a string, the caller's name, or None, not {type(name).__name__}"
                raise TypeError(text)
            if not name:
                raise Unauthorized("missing or unknown credentials", headers={"www-authenticate": "Bearer"})
            request.caller = name
        elif self.tokens is not None:
            credential, is_cookie = self._credential_of(request, self.tokens)
            if is_cookie:
                if foreign:
                    raise self._refuse_foreign()
                _check_browser(request)
            request.caller, request.credential = credential.name, credential

    def permit(self, request: Request, right: str) -> None:
        """Rule 7."""
        credential = request.credential
        if credential is None or credential.may(right):
            return
        action = right.partition(":")[0]
        granting = right if len(right) <= MAX_RIGHT_CHARS else action
        command = f"sseapp token add {shlex.quote(credential.name)} --may {shlex.quote(granting)}"
        raise Forbidden(
            f"this token lacks the right {granting!r}; `{command}` creates one that has it",
            code="insufficient_scope",
            # RFC 6750, 3.1; not all names of topics are allowed there.
            headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{action}"'},
        )

    def _is_foreign(self, request: Request) -> bool:
        """Rule 2."""
        headers = request.headers
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins:
            return False
        if site is not None:
            return site not in ("same-origin", "none")  # none: an address that the user entered
        return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()

    def _refuse_foreign(self) -> Forbidden:
        origins = self._settings.written("cors_origins")
        return Forbidden(f"this page is of another origin: add its origin to {origins} if it may use the service")

    def _credential_of(self, request: Request, tokens: Tokens) -> tuple[Credential, bool]:
        if _TOKEN_IN_URL.search(request.scope.get("query_string", b"")):
            raise _unauthorized("a token in a URL gets into logs and histories, so it is refused: revoke it")
        authorization = request.headers.get("authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise _unauthorized("the only scheme of this service is Bearer")
            return tokens.find(token.strip()), False
        values = set(_OUR_COOKIE.findall(request.headers.get("cookie", "")))
        if len(values) > 1:  # perhaps from another host of the domain
            raise _unauthorized(f"there are several cookies {COOKIE}: delete them")
        if not values:
            raise _unauthorized("no credentials were sent")
        return tokens.find(values.pop(), "session"), True

    async def _log_in(self, request: Request) -> Response:
        """Get a cookie for a token"""
        credential, headers = request.credential, request.headers
        authorization = headers.get("authorization")
        if authorization is None or credential is None:
            raise BadRequest("send the token as `Authorization: Bearer …`", field="authorization")
        value = session_of(authorization.partition(" ")[2].strip())
        # A proxy's; a forged one gives a useless cookie.
        schemes = (request.scope.get("scheme"), headers.get("x-forwarded-proto"))
        secure = "https" in schemes or headers.get("origin", "").startswith("https:")
        if not secure and not _is_loopback(headers.get("host", "")):
            raise Forbidden(
                "the cookie requires HTTPS or a loopback address: on plain HTTP a page on any port of this host could "
                "use it. Serve the page over HTTPS (a proxy must send X-Forwarded-Proto: https), or send the token "
                "itself as `Authorization: Bearer …`",
                code="https_required",
            )
        data = {"caller": credential.name, "expires": credential.entry.expires}
        return JSON(data, headers=_cookie(request, value, "; Secure" if secure else ""))

    async def _log_out(self, request: Request) -> Response:
        return Response(status=204, headers=_cookie(request, "", "; Max-Age=0"))

    def cors_headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        origin = request.headers.get("origin")
        if origin is not None and origin in self._origins:
            allowed = [
                (b"access-control-allow-origin", origin.encode("latin-1")),
                (b"access-control-allow-credentials", b"true"),
            ]
        elif origin is not None and self._any_origin:
            allowed = [(b"access-control-allow-origin", b"*")]
        else:
            return self._vary
        return [*self._vary, *allowed, (b"access-control-expose-headers", EXPOSED.encode())]

    def preflight(self, request: Request) -> Response | None:
        """The response to a preflight."""
        headers = request.headers
        method = headers.get("access-control-request-method")
        if request.method != "OPTIONS" or method is None or "origin" not in headers:
            return None
        if not (self._any_origin or headers["origin"] in self._origins):
            raise Forbidden(f"this origin is not in {self._settings.written('cors_origins')}")
        # The request itself is checked too.
        allowed = {
            "access-control-allow-methods": method,
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": str(PREFLIGHT_S),
        }
        return Response(status=204, headers={name: value for name, value in allowed.items() if value})


def _check_browser(request: Request) -> None:
    """Rule 4."""
    headers = request.headers
    if "sec-fetch-site" in headers or "origin" in headers:
        return
    if headers.get("user-agent", "").startswith("Mozilla/"):
        raise Forbidden(
            "this browser sends neither Sec-Fetch-Site nor Origin, so this may be a page of another origin: use HTTPS "
            "or a loopback address, and a newer browser. A program must send another User-Agent or Sec-Fetch-Site: none"
        )


def _unauthorized(detail: str) -> Unauthorized:
    text = f"{detail}; send a token as `Authorization: Bearer …`, or get a cookie for it by POST /session"
    return Unauthorized(text, headers={"www-authenticate": "Bearer"})


def _cookie(request: Request, value: str, more: str) -> dict[str, str]:
    # No Max-Age: it ends with the browser.
    cookie = f"{COOKIE}={value}; Path={request.root_path or '/'}; HttpOnly; SameSite=Strict{more}"
    return {"set-cookie": cookie, "cache-control": "no-store"}


@lru_cache(64)
def _is_loopback(authority: str) -> bool:
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?", authority)
    if match is None:
        return False
    name = (match[2] or "").lower()
    return name == "localhost" or name.endswith(".localhost") or _is_loopback_address(match[1] or name)


@lru_cache(64)
def _is_loopback_address(text: str) -> bool:
    """Rule 4: not IPv4 in IPv6."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback and getattr(address, "ipv4_mapped", None) is None
