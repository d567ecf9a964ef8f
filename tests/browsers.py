"""The three engines behind one face: Chromium (Playwright), Firefox (Marionette) and WebKitGTK (WebDriver, on Xvfb).

    with launched("firefox") as browser:
        browser.goto(f"{origin}/healthz")
        browser.listen("news", "/topics/news")
        browser.seen("news").closed

Neither Firefox nor WebKit needs anything from a package registry: both protocols are a few lines of JSON over a socket.
"""

import json
import os
import socket
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from io import BufferedRWPair
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final, Protocol

from playwright.sync_api import Page

from tests import chromium
from tests.chromium import LISTEN, Seen
from tests.needs import find
from tests.serving import free_port, wait_until

__all__ = ["Browser", "launched"]

#: WebKitWebDriver often makes no session of its first calls, and never answers them.
SESSION_S: Final = 8.0
STARTS: Final = 15
#: For anything that a browser is told to do.
COMMAND_S: Final = 60.0


class Engine(Protocol):
    version: str

    def goto(self, url: str) -> None: ...

    def run(self, script: str, *arguments: Any) -> Any: ...


class Browser:
    """One window of an engine."""

    def __init__(self, name: str, engine: Engine) -> None:
        self.name = name
        self.version = engine.version
        self._engine = engine

    def goto(self, url: str) -> None:
        self._engine.goto(url)

    def run(self, script: str, *arguments: Any) -> Any:
        """The value of a function's body, which finds what it is given in `arguments`."""
        return self._engine.run(script, *arguments)

    def listen(self, name: str, url: str) -> None:
        """Open an `EventSource` of the page's; `seen` tells what it gets."""
        self.run(f"({LISTEN})(Array.from(arguments))", name, url)

    def seen(self, name: str) -> Seen:
        return Seen(**self.run("return window.seen[arguments[0]]", name))

    def wait_closed(self, name: str, limit_s: float = 30) -> Seen:
        """What it has seen when it has given up for good."""
        wait_until(lambda: self.run("return window.seen[arguments[0]].closed", name), limit_s)
        return self.seen(name)

    def wait_events(self, name: str, count: int) -> Seen:
        """What it has seen when it has so many events."""
        wait_until(lambda: self.run("return window.seen[arguments[0]].events.length", name) >= count)
        return self.seen(name)

    def wait_opened(self, name: str, count: int) -> None:
        """Until so many of its connections were answered."""
        wait_until(lambda: self.run("return window.seen[arguments[0]].opened", name) >= count)

    def close_source(self, name: str) -> None:
        self.run("window.sources[arguments[0]].close()", name)


@contextmanager
def launched(name: str) -> Iterator[Browser]:
    with ExitStack() as stack:
        if name == "chromium":
            page = stack.enter_context(chromium.launched()).new_page()
            yield Browser(name, _Chromium(page))
        elif name == "firefox":
            yield Browser(name, stack.enter_context(_firefox()))
        else:
            yield Browser(name, _webkit(stack))


class _Chromium:
    def __init__(self, page: Page) -> None:
        self._page = page
        browser = page.context.browser
        self.version = browser.version if browser is not None else ""

    def goto(self, url: str) -> None:
        self._page.goto(url)

    def run(self, script: str, *arguments: Any) -> Any:
        return self._page.evaluate(f"(given) => (function () {{ {script} }}).apply(null, given)", list(arguments))


#: What a page's test is not about, and what goes out of the machine by itself.
_FIREFOX: Final = {
    "app.update.enabled": False,
    "browser.aboutwelcome.enabled": False,
    "browser.newtabpage.enabled": False,
    "browser.safebrowsing.malware.enabled": False,
    "browser.shell.checkDefaultBrowser": False,
    "browser.startup.page": 0,
    "datareporting.policy.dataSubmissionEnabled": False,
    "devtools.jsonview.enabled": False,  # its pages may open no connection
    "extensions.update.enabled": False,
    "network.captive-portal-service.enabled": False,
    "network.connectivity-service.enabled": False,
    "network.proxy.type": 0,
    "security.sandbox.content.level": 0,  # it can't be had as root in a container
    "services.settings.server": "data:,",
    "toolkit.telemetry.enabled": False,
}


@contextmanager
def _firefox() -> Iterator["_Marionette"]:
    port = free_port()
    with TemporaryDirectory(prefix="firefox") as folder:
        preferences = _FIREFOX | {"marionette.port": port}
        lines = [f"user_pref({json.dumps(name)}, {json.dumps(value)});\n" for name, value in preferences.items()]
        Path(folder, "user.js").write_text("".join(lines))
        command = [find("firefox"), "--headless", "--marionette", "--no-remote", "--profile", folder]
        environ = os.environ | {"HOME": folder}
        process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            with _connected(port) as sock, sock.makefile("rwb") as file:
                marionette = _Marionette(file)
                yield marionette
                marionette.command("Marionette:Quit", {"flags": ["eForceQuit"]})
        finally:
            _end(process)


class _Marionette:
    """Firefox's own protocol: each message is JSON behind its length and a colon."""

    def __init__(self, file: BufferedRWPair) -> None:
        self._file = file
        self._number = 0
        self._message()  # its greeting
        self.version: str = self.command("WebDriver:NewSession")["capabilities"]["browserVersion"]

    def command(self, name: str, parameters: dict[str, Any] | None = None) -> Any:
        self._number += 1
        message = json.dumps([0, self._number, name, parameters or {}]).encode()
        self._file.write(b"%d:%b" % (len(message), message))
        self._file.flush()
        _, _, error, result = self._message()
        if error is not None:
            raise RuntimeError(f"{name}: {error['message']}")
        return result

    def _message(self) -> Any:
        digits = b""
        while (byte := self._file.read(1)) != b":":
            if not byte:
                raise EOFError("Firefox has closed its connection")
            digits += byte
        return json.loads(self._file.read(int(digits)))

    def goto(self, url: str) -> None:
        self.command("WebDriver:Navigate", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        parameters = {"script": script, "args": list(arguments), "sandbox": None, "newSandbox": False}
        return self.command("WebDriver:ExecuteScript", parameters)["value"]


def _webkit(stack: ExitStack) -> "_WebDriver":
    display = stack.enter_context(_screen())
    environ = os.environ | {
        "DBUS_SESSION_BUS_ADDRESS": "unix:path=/nonexistent",
        "DISPLAY": display,
        "GDK_BACKEND": "x11",
        "LIBGL_ALWAYS_SOFTWARE": "1",
        "NO_AT_BRIDGE": "1",
        "WEBKIT_DISABLE_DMABUF_RENDERER": "1",
        "WEBKIT_DISABLE_SANDBOX_THIS_IS_DANGEROUS": "1",
    }
    for name in ("http_proxy", "https_proxy", "all_proxy"):
        environ.pop(name, None)
        environ.pop(name.upper(), None)
    for _ in range(STARTS):
        attempt = ExitStack()
        try:
            driver = attempt.enter_context(_webdriver(environ))
        except OSError:
            attempt.close()
        else:
            stack.enter_context(attempt)
            return driver
    raise RuntimeError(f"WebKitWebDriver gave no session in {STARTS} starts")


@contextmanager
def _screen() -> Iterator[str]:
    """An X server without a screen, and its name."""
    read, write = os.pipe()
    command = [find("xvfb"), "-displayfd", str(write), "-screen", "0", "1280x1024x24", "-nolisten", "tcp"]
    process = subprocess.Popen(command, pass_fds=[write], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    os.close(write)
    try:
        with open(read) as number:
            yield f":{number.readline().strip()}"
    finally:
        _end(process)


@contextmanager
def _webdriver(environ: dict[str, str]) -> Iterator["_WebDriver"]:
    port = free_port()
    command = [find("webkit"), f"--port={port}"]
    process = subprocess.Popen(command, env=environ, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        _connected(port).close()
        driver = _WebDriver(port)
        yield driver
        driver.ask("DELETE", "")
    finally:
        _end(process)


class _WebDriver:
    """The W3C's protocol: JSON over HTTP."""

    def __init__(self, port: int) -> None:
        self._url = f"http://127.0.0.1:{port}/session"
        browser = next(Path("/usr/lib").glob("*/webkit2gtk-4.*/MiniBrowser"))
        options = {"binary": str(browser), "args": ["--automation"]}
        wanted = {"alwaysMatch": {"webkitgtk:browserOptions": options}}
        session = self.ask("POST", "", {"capabilities": wanted}, SESSION_S)
        self._url += f"/{session['sessionId']}"
        self.version: str = session["capabilities"]["browserVersion"]

    def ask(self, method: str, path: str, body: Any = None, limit_s: float = COMMAND_S) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self._url + path, data, {"content-type": "application/json"}, method=method)
        direct = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with direct.open(request, timeout=limit_s) as response:
                return json.load(response)["value"]
        except urllib.error.HTTPError as error:
            raise RuntimeError(f"{method} {path}: {error.read().decode()[:500]}") from None

    def goto(self, url: str) -> None:
        self.ask("POST", "/url", {"url": url})

    def run(self, script: str, *arguments: Any) -> Any:
        return self.ask("POST", "/execute/sync", {"script": script, "args": list(arguments)})


def _connected(port: int) -> socket.socket:
    """A connection to a program that has been started a moment ago."""

    def connect() -> socket.socket | None:
        with suppress(OSError):
            return socket.create_connection(("127.0.0.1", port), COMMAND_S)
        return None

    sock = wait_until(connect, COMMAND_S)
    assert sock is not None
    return sock


def _end(process: "subprocess.Popen[bytes]") -> None:
    process.terminate()
    try:
        process.wait(10)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
