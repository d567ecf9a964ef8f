"""Makes httpx clients that ignore unusable environment variables for proxies and certificates.

httpx itself raises for `NO_PROXY=[::1]`, `ALL_PROXY=socks5://…` and a missing certificate file, so the service would
not start.
"""

import logging
import os
import ssl
from collections.abc import Callable, Iterator
from typing import Any, Final
from urllib.request import getproxies

import httpx

__all__ = ["http_client"]

logger = logging.getLogger("sseapp")

LOOPBACK: Final = ("all://127.0.0.1", "all://localhost", "all://[::1]")
DEFAULT_LIMITS: Final = httpx.Limits(max_connections=100, max_keepalive_connections=20)  # httpx's own

#: Makes the transport for requests without a proxy.
Transport = Callable[[ssl.SSLContext, httpx.Limits], httpx.AsyncBaseTransport]


def http_client(
    *, limits: httpx.Limits = DEFAULT_LIMITS, transport: Transport | None = None, **options: Any
) -> httpx.AsyncClient:
    """`options` are httpx's. Logs one line for each ignored variable."""
    certificates = _certificates()
    mounts: dict[str, httpx.AsyncBaseTransport | None] = {}
    proxies = getproxies()
    hosts = [host.strip() for host in proxies.get("no", "").split(",")]
    for scheme in () if "*" in hosts else ("http", "https", "all"):
        if address := proxies.get(scheme):
            try:
                proxy = httpx.Proxy(address if "://" in address else f"http://{address}")
                mounts[f"{scheme}://"] = httpx.AsyncHTTPTransport(verify=certificates, limits=limits, proxy=proxy)
            except (ValueError, ImportError, httpx.InvalidURL) as error:  # the URL may contain a password
                _ignored(f"{scheme}_proxy", f"httpx can't use this proxy ({type(error).__name__})")
    if mounts:
        mounts.update(dict.fromkeys(_exempt(hosts)))
    mounts.update(dict.fromkeys(LOOPBACK))
    if transport is not None:
        options["transport"] = transport(certificates, limits)
    return httpx.AsyncClient(trust_env=False, verify=certificates, limits=limits, mounts=mounts, **options)


def _exempt(hosts: list[str]) -> Iterator[str]:
    """httpx's URL patterns for NO_PROXY. As in httpx, `example.com` includes its subdomains."""
    for host in filter(None, hosts):
        address = host.strip("[]")
        if "://" in host:
            pattern = host
        elif address.count(":") > 1:
            pattern = f"all://[{address}]"
        elif address == "localhost" or address.partition("/")[0].replace(".", "").isdigit():
            pattern = f"all://{address}"
        else:
            pattern = f"all://*{address}"
        try:
            httpx.URL(pattern)
        except httpx.InvalidURL:
            _ignored("no_proxy", f"can't parse the entry {host!r:.60}; the other entries are used")
        else:
            yield pattern


def _certificates() -> ssl.SSLContext:
    try:
        return httpx.create_ssl_context()
    except OSError as error:
        reason = f"{error.strerror or error}; the system's own certificates are used"
        if error.filename is None:  # set only for the other file
            _ignored("SSL_CERT_FILE", reason)
        if os.environ.get("SSLKEYLOGFILE"):
            _ignored("SSLKEYLOGFILE", reason)
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)  # checks certificates and host names
        context.load_default_certs()
        return context


def _ignored(variable: str, why: str) -> None:
    name = variable if variable in os.environ else variable.upper()
    logger.warning("%s is ignored: %s", name, why)
