"""Who may enter, and which pages may ask: decisions over a request, made before its body is read.

What is configured makes the mode:

- `tokens`: API tokens from a file (`SSEAPP_TOKENS_FILE`), shown as `Authorization: Bearer …`, or as the cookie that
  `POST /session` changes one for, since an `EventSource` can send no header;
- `caller`: an embedding program's own function;
- `off`: `SSEAPP_AUTH=off` said aloud that everybody may: nothing is asked and nothing checked;
- `private`: none of these. For programs and pages of this machine only.

1.  *Private* means: the peer, the `Host` and the `Origin` are loopback (a name that was rebound to 127.0.0.1 is still
    another `Host`), no header says that a proxy forwarded the request, it is not HTTP/1.0 (nginx's default), and no
    page of another origin starts work, by GET either. A proxy that adds nothing (a TCP proxy, an nginx with no more
    than `proxy_http_version 1.1`) can't be detected: only credentials protect a service behind one.
2.  Which page a request comes from only browsers say, and no page can make them lie: first by `Sec-Fetch-Site`, else
    by `Origin`, which is then compared with `Host`. (Go's `CrossOriginProtection` has the same order, for the same
    reason: behind a proxy `Host` may be another.)
3.  A page of another origin may not use an unsafe method (403), and with a cookie none at all. An origin that is named
    in `SSEAPP_CORS_ORIGINS` is not another; `*` is none, and lets in only who brings a token along by itself. With
    `caller` and no origins named this rule is the embedding program's: its CORS middleware has answered the preflight,
    and only its function knows what its credentials are.
4.  A request with neither of these headers comes from a program, or from a browser by a GET of a page (an image, a
    frame, a link, `fetch` with `no-cors`), of whichever origin. Browsers leave `Sec-Fetch-Site` out where the address
    is not "potentially trustworthy" (Secure Contexts, 3.1): on plain HTTP, unless the host is `localhost`, a name
    below it, in 127.0.0.0/8, or `[::1]`. Chromium leaves it out for `[::ffff:127.0.0.1]`, `0.0.0.0` and `[::]`, which
    all reach a service on loopback; so these are not loopback to `Host` and `Origin` here. Safari before 16.4 and
    Firefox before 90 never send it. So such a request is refused, on a private service or with a cookie, if its
    `User-Agent` begins with `Mozilla/`, as that of every browser does. A page can't change it in such a request:
    `fetch` sets it only after a preflight, and then sends `Origin`. The rule needs this one direction only: a program
    that sends `Mozilla/` is refused (the answer says what to send instead), and one that sends something else gains
    nothing that it hasn't: it runs on this machine, or has the cookie.
5.  The cookie needs HTTPS, or loopback. Cookies don't separate ports, and without HTTPS a page of another port of the
    host is the same site. On loopback `Sec-Fetch-Site` tells such a page; elsewhere on plain HTTP nothing does.
6.  A token in a URL is refused even where it is right: it is in somebody's log or history already.
7.  A token does what its rights say (`Route.may`), and anything that needs none. Callers of a `caller=` function are
    unrestricted here: that program's own routes decide.
"""

import ipaddress
import re
import shlex
from collections.abc import Awaitable, Callable
from functools import lru_cache
from inspect import isawaitable
from typing import Final, Literal

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

#: An embedding program's function: gives the caller's name, or `None`, which refuses; or raises the refusal itself.
Caller = Callable[[Request], str | Awaitable[str | None] | None]

COOKIE: Final = "sseapp_session"
#: What a page of another origin may read of an answer, besides what the Fetch standard lets it.
EXPOSED: Final = (
    "accept-ranges, content-disposition, content-location, content-range, etag, location, preference-applied, "
    "retry-after, run-id, x-vercel-ai-ui-message-stream, x-workflow-run-id, x-workflow-stream-tail-index"
)
#: How long a browser may keep a preflight's answer: Chromium's own limit.
PREFLIGHT_S: Final = 7200
#: Apache's and Tomcat's limit. Browsers send some twenty.
MAX_HEADER_LINES: Final = 100

#: What Starlette's TestClient calls itself and its host. No server gives such a peer: it has an address.
TEST_CLIENT: Final = "testclient"
TEST_SERVER: Final = "testserver"

#: Names of headers that proxies and CDNs add. Nothing else has a reason to send them to this machine.
_FORWARDED: Final = re.compile(
    "via|cdn-loop|front-end-https|surrogate-capability|x-(url-)?scheme"
    "|(x-)?(forwarded|original|proxy|proxied|real|remote|rewrite|envoy|azure|arr|amzn?|appengine|vercel|nf|varnish)"
    "(-.+)?|(cf|cloudfront|fly|fastly|akamai|tailscale)-.+|(.+-)?(client|connecting)-ip"
)
# Of a token first the dot: from every digit on it would be looked for sixteen times (21 ms for 60 KiB of them).
_TOKEN_IN_URL: Final = re.compile(rb"(?:^|&)(?:access_token|api_key|token)=|\.(?<=[0-9a-f]{16}\.)[A-Za-z0-9_-]{43}")
_OUR_COOKIE: Final = re.compile(rf"(?:^|[;,] *){COOKIE}=([^;,]*)")


class Guard:
    """One app's. Raises `SettingsError` where the settings contradict each other, or the tokens can't be read."""

    def __init__(self, settings: Settings, caller: Caller | None = None) -> None:
        given = [caller is not None, settings.tokens_file is not None, settings.auth == "off"]
        if sum(given) > 1:
            names = f"{settings.written('auth', 'off')}, {settings.written('tokens_file')}"
            raise SettingsError(f"{names} and caller= exclude each other", field="auth")
        self.mode: Literal["caller", "tokens", "off", "private"] = "private"
        if any(given):
            self.mode = ("caller", "tokens", "off")[given.index(True)]
        self.tokens = Tokens(settings.tokens_file) if settings.tokens_file is not None else None
        self._settings = settings
        self._caller = caller
        origins = frozenset(settings.cors_origins or ())
        self._any_origin, self._origins = "*" in origins, origins - {"*"}
        self._names_origins = bool(origins)
        # With or without an Origin: a cache keeps either.
        self._vary = [(b"vary", b"Origin")] if self._origins else []

    @property
    def _to_open_it(self) -> str:
        settings = self._settings
        tokens = settings.written("tokens_file")
        how = f"set {tokens}" if settings.of_environment else f"give SSEApp a caller=, or {tokens}"
        return (
            f"no authentication is configured, so only requests from this machine are accepted: {how}, "
            f"or {settings.written('auth', 'off')} if everybody may use it"
        )

    @property
    def routes(self) -> list[Route]:
        """`/session`, where there are tokens; without them nobody has to log in."""
        if self.tokens is None:
            return []
        # Open: who wants to leave may, with a token that has expired too. No other page can: it would need a preflight.
        return [POST("/session", self._log_in), DELETE("/session", self._log_out, open=True)]

    def admit(self, request: Request) -> None:
        """What holds for every request, whatever its path."""
        scope, settings = request.scope, self._settings
        target_bytes = len(scope.get("raw_path") or scope["path"]) + len(scope.get("query_string", b""))
        if settings.max_target_bytes is not None and target_bytes > settings.max_target_bytes:
            raise TargetTooLong(f"path and query may have {settings.max_target_bytes} bytes at most")
        if len(scope["headers"]) > MAX_HEADER_LINES:
            raise HeadersTooLarge(f"a request may have {MAX_HEADER_LINES} header lines at most")
        header_bytes = sum([len(name) + len(value) for name, value in scope["headers"]])
        if settings.max_header_bytes is not None and header_bytes > settings.max_header_bytes:
            raise HeadersTooLarge(f"the headers may have {settings.max_header_bytes} bytes at most")
        if self.mode == "private":
            self._check_private(request)

    def _check_private(self, request: Request) -> None:
        """Rule 1."""
        headers, peer, origin = request.headers, request.scope.get("client"), request.headers.get("origin")
        forwarded = [name for name in headers if _FORWARDED.fullmatch(name)]
        if forwarded or request.scope.get("http_version") == "1.0":  # which nobody speaks but a proxy told nothing
            raise Forbidden(
                f"this request was forwarded ({[*forwarded, 'HTTP/1.0'][0]:.80}); {self._to_open_it}", code="private"
            )
        address = peer[0] if peer is not None else ""
        in_process = address == TEST_CLIENT
        if "host" in headers and not (_is_loopback(headers["host"]) or (in_process and headers["host"] == TEST_SERVER)):
            raise Forbidden(f"Host {headers['host']!r:.80} is not this machine; {self._to_open_it}", code="private")
        if (
            peer is not None
            and peer[0]
            and not in_process
            and not _is_loopback_address(peer[0].removeprefix("::ffff:"))
        ):
            raise Forbidden(f"this request comes from another machine; {self._to_open_it}", code="private")
        if origin is not None and origin not in self._origins and not _is_loopback(origin.partition("://")[2]):
            origins = self._settings.written("cors_origins")
            raise Forbidden(f"this page is not one of this machine; name its origin in {origins}")

    async def enter(self, request: Request) -> None:
        """Find out who it is, and whether the page behind it may ask. For routes that are not `open`."""
        if self.mode == "off":
            return
        foreign = self._is_foreign(request) and not (self.mode == "caller" and not self._names_origins)
        safe = request.method in ("GET", "HEAD")
        brings_token = self._any_origin and "authorization" in request.headers
        if foreign and (self.mode == "private" or not (safe or brings_token)):
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
                raise Unauthorized("nobody is known by these credentials", headers={"www-authenticate": "Bearer"})
            request.caller = name
        elif self.tokens is not None:
            credential, by_cookie = self._shown(request, self.tokens)
            if by_cookie:
                if foreign:
                    raise self._refuse_foreign()
                _check_browser(request)
            request.caller, request.credential = credential.name, credential

    def permit(self, request: Request, right: str) -> None:
        """Rule 7: refuse a token that hasn't this right. Raises `Forbidden`."""
        credential = request.credential
        if credential is None or credential.may(right):
            return
        action = right.partition(":")[0]
        granting = right if len(right) <= MAX_RIGHT_CHARS else action  # a longer name is refused by its route
        command = f"sseapp token add {shlex.quote(credential.name)} --may {shlex.quote(granting)}"
        raise Forbidden(
            f"this token lacks the right {granting!r}; `{command}` makes one that has it",
            code="insufficient_scope",
            # RFC 6750, 3.1. Without the topic's name, which may have characters that this field can't.
            headers={"www-authenticate": f'Bearer error="insufficient_scope", scope="{action}"'},
        )

    def _is_foreign(self, request: Request) -> bool:
        """Rule 2."""
        headers = request.headers
        origin, site = headers.get("origin"), headers.get("sec-fetch-site")
        if origin in self._origins:
            return False
        if site is not None:
            return site not in ("same-origin", "none")  # none: the user's own doing, an address typed in
        return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()

    def _refuse_foreign(self) -> Forbidden:
        origins = self._settings.written("cors_origins")
        return Forbidden(f"this page is of another origin; name its origin in {origins} if it may ask")

    def _shown(self, request: Request, tokens: Tokens) -> tuple[Credential, bool]:
        """The credential, and whether it came as a cookie."""
        if _TOKEN_IN_URL.search(request.scope.get("query_string", b"")):
            raise _no_token("a token in a URL ends up in logs and histories, and is refused: revoke it")
        authorization = request.headers.get("authorization")
        if authorization is not None:
            scheme, _, token = authorization.partition(" ")
            if scheme.lower() != "bearer":
                raise _no_token("this service takes no other scheme than Bearer")
            return tokens.find(token.strip()), False
        values = _cookies(request.headers.get("cookie", ""))
        if len(values) > 1:  # one may be tossed in by a neighbour under the same domain
            raise _no_token(f"there are several cookies {COOKIE}; delete them")
        if not values:
            raise _no_token("this needs credentials")
        return tokens.find(values.pop(), "session"), True

    async def _log_in(self, request: Request) -> Response:
        """Change a token for the cookie. `enter` has looked at it."""
        credential, headers = request.credential, request.headers
        authorization = headers.get("authorization")
        if authorization is None or credential is None:
            raise BadRequest("send the token as `Authorization: Bearer …`", field="authorization")
        value = session_of(authorization.partition(" ")[2].strip())
        # Behind a proxy that ends TLS only the client's side knows of it. Who lies gets a cookie that it can't use.
        schemes = (request.scope.get("scheme"), headers.get("x-forwarded-proto"))
        secure = "https" in schemes or headers.get("origin", "").startswith("https:")
        if not secure and not _is_loopback(headers.get("host", "")):
            raise Forbidden(
                "the cookie needs HTTPS, or a loopback address: on plain HTTP any page of this host, on whichever "
                "port, could use it. Serve the page over HTTPS (a proxy in front sends X-Forwarded-Proto: https), "
                "or send the token itself as `Authorization: Bearer …`",
                code="https_required",
            )
        data = {"caller": credential.name, "expires": credential.entry.expires}
        return JSON(data, headers=_cookie(request, value, "; Secure" if secure else ""))

    async def _log_out(self, request: Request) -> Response:
        return Response(status=204, headers=_cookie(request, "", "; Max-Age=0"))

    # CORS, as the Fetch standard has it

    def cors_headers(self, request: Request) -> list[tuple[bytes, bytes]]:
        """What every answer says to a page of another origin."""
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
        """The answer to a browser that asks whether a page may ask; `None`: this is not one."""
        headers = request.headers
        method = headers.get("access-control-request-method")
        if request.method != "OPTIONS" or method is None or "origin" not in headers:
            return None
        if not (self._any_origin or headers["origin"] in self._origins):
            raise Forbidden(f"this origin is not in {self._settings.written('cors_origins')}")
        # What it wants to send may be anything: the request itself is looked at like every other.
        allowed = {
            "access-control-allow-methods": method,
            "access-control-allow-headers": headers.get("access-control-request-headers", ""),
            "access-control-max-age": str(PREFLIGHT_S),
        }
        return Response(status=204, headers={name: value for name, value in allowed.items() if value})


def _check_browser(request: Request) -> None:
    """Rule 4: refuse a browser that doesn't tell which page a request comes from. Raises `Forbidden`."""
    headers = request.headers
    if "sec-fetch-site" in headers or "origin" in headers:
        return
    if headers.get("user-agent", "").startswith("Mozilla/"):
        raise Forbidden(
            "this browser sends neither Sec-Fetch-Site nor Origin, so this may be a page of another origin: use HTTPS "
            "or a loopback address, and a newer browser; a program sends another User-Agent, or Sec-Fetch-Site: none"
        )


def _no_token(detail: str) -> Unauthorized:
    text = f"{detail}; send a token as `Authorization: Bearer …`, or change it for a cookie by POST /session"
    return Unauthorized(text, headers={"www-authenticate": "Bearer"})


def _cookies(header: str) -> set[str]:
    """All values of our cookie. (HTTP/2 may split the header, which is then joined by commas.)"""
    return set(_OUR_COOKIE.findall(header))


def _cookie(request: Request, value: str, more: str) -> dict[str, str]:
    # Strict: a page of another site can't use it. No Max-Age: it goes with the browser, and at the latest its token.
    cookie = f"{COOKIE}={value}; Path={request.root_path or '/'}; HttpOnly; SameSite=Strict{more}"
    return {"set-cookie": cookie, "cache-control": "no-store"}


@lru_cache(64)
def _is_loopback(authority: str) -> bool:
    """`localhost`, a name below it, or an address; with or without a port."""
    match = re.fullmatch(r"(?:\[([0-9a-fA-F:.]+)\]|([^:\[\]]+))(?::[0-9]{1,5})?", authority)
    if match is None:
        return False
    name = (match[2] or "").lower()
    return name == "localhost" or name.endswith(".localhost") or _is_loopback_address(match[1] or name)


def _is_loopback_address(text: str) -> bool:
    """Not an IPv4 address in IPv6 (`::ffff:127.0.0.1`): see rule 4."""
    try:
        address = ipaddress.ip_address(text)
    except ValueError:
        return False
    return address.is_loopback and getattr(address, "ipv4_mapped", None) is None
