"""Downloads from a real server: parts, conditions, names; and nothing but the folder's files, whatever is asked."""

import errno
import os
import re
import signal
import socket
import subprocess
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from email.message import Message
from email.utils import formatdate
from http.client import HTTPResponse, IncompleteRead
from pathlib import Path
from types import SimpleNamespace
from typing import Final
from urllib.parse import quote, unquote_to_bytes

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from benchmarks.process import memory_bytes
from handlers import files
from handlers.files import content_disposition, open_folder
from sseapp import SSEApp
from ssecore.errors import SSEAppError
from ssecore.settings import Settings
from ssecore.testing import connect
from tests.clients import ask as ask_in_process
from tests.needs import find, needs
from tests.serving import Server, serve, serve_uvicorn, wait_until

LIMIT_S: Final = 20
MIB: Final = 1024 * 1024
#: No run of bytes in it is repeated, so that a part is only right from its own place.
CONTENT: Final = b"".join(b"%04d" % n for n in range(250))
#: More than the sockets between server and client hold, so that a client that stops reading stops the server.
BIG: Final = 16 * MIB
#: A Sunday in 1994, as the standard has it in all three forms.
MODIFIED_S: Final = 784111777
DATE: Final = "Sun, 06 Nov 1994 08:49:37 GMT"


@dataclass
class Answer:
    status: int
    headers: Mapping[str, str]
    body: bytes

    @property
    def whole(self) -> bool:
        return self.status == 200 and self.body == CONTENT

    def is_problem(self, status: int, code: str) -> bool:
        return (
            self.status == status
            and self.headers["content-type"] == "application/problem+json"
            and b'"code":"%b"' % code.encode() in self.body
        )


class Site:
    """A server with its files folder, and a client that sends what it is told to, byte for byte."""

    def __init__(self, server: Server, data_dir: Path) -> None:
        self.server = server
        self.folder = data_dir / "files"

    @contextmanager
    def opened(
        self, target: bytes | str, headers: Mapping[str, str] | None = None, method: str = "GET", window: int = 0
    ) -> Iterator[HTTPResponse]:
        """The answer's beginning. `window`: what the kernel reads ahead for the client."""
        target = target.encode() if isinstance(target, str) else target
        lines = [
            f"{name}: {value}"
            for name, value in {"host": "localhost", "connection": "close", **(headers or {})}.items()
        ]
        with socket.socket() as sock:
            sock.settimeout(LIMIT_S)
            if window:
                sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, window)
            sock.connect(("127.0.0.1", self.server.port))
            sock.sendall(
                b"%b %b HTTP/1.1\r\n" % (method.encode(), target) + "\r\n".join([*lines, "", ""]).encode("latin-1")
            )
            with HTTPResponse(sock, method=method) as response:
                response.begin()
                yield response

    def ask(self, target: bytes | str, headers: Mapping[str, str] | None = None, method: str = "GET") -> Answer:
        with self.opened(target, headers, method) as response:
            body = response.read()
            return Answer(response.status, {name.lower(): value for name, value in response.getheaders()}, body)

    def file(self, name: str, content: bytes = CONTENT) -> str:
        """Make one, as it was in 1994, and give its address."""
        (self.folder / name).write_bytes(content)
        os.utime(self.folder / name, (MODIFIED_S, MODIFIED_S))
        return f"/download/{quote(name, safe='')}"

    def big_file(self, name: str, size: int = BIG) -> str:
        address = self.file(name, b"")
        os.truncate(self.folder / name, size)
        return address

    def has_open(self, name: str = "") -> list[str]:
        """Descriptors of the server's that are of the folder."""
        links = []
        for descriptor in Path(f"/proc/{self.server.process.pid}/fd").iterdir():
            with suppress(FileNotFoundError):
                links.append(os.readlink(descriptor))
        return [link for link in links if link.startswith(str(self.folder / name))]


@contextmanager
def serving(data_dir: Path, **env: str) -> Iterator[Site]:
    with serve(data_dir, env=env) as server:
        yield Site(server, data_dir)


@pytest.fixture(scope="module", params=[serve, serve_uvicorn], ids=["sseapp", "uvicorn"])
def site(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    data_dir = tmp_path_factory.mktemp("data")
    with request.param(data_dir) as server:
        yield Site(server, data_dir)
        assert "Traceback" not in server.log()


@pytest.fixture(scope="module")
def our_site(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Site]:
    """Under our own runner only: for what doesn't depend on the server."""
    with serving(tmp_path_factory.mktemp("data")) as site:
        yield site
        assert "Traceback" not in site.server.log()


# Whole, in part, or not at all


def test_a_file_comes_as_it_is_with_all_that_is_known_of_it(site: Site) -> None:
    answer = site.ask(site.file("numbers.csv"))
    assert answer.whole
    etag = answer.headers["etag"]
    assert re.fullmatch(r'"[0-9a-f]+-[0-9a-f]+-3e8"', etag)
    assert {name: value for name, value in answer.headers.items() if name not in ("date", "server", "connection")} == {
        "etag": etag,
        "last-modified": DATE,
        "cache-control": "private, no-cache",
        "accept-ranges": "bytes",
        "content-length": "1000",
        "content-type": "text/csv",
        "content-disposition": 'attachment; filename="numbers.csv"',
        "x-content-type-options": "nosniff",
        "content-security-policy": "default-src 'none'; sandbox",
    }


def test_head_has_the_headers_of_get_and_ignores_a_range(site: Site) -> None:
    address = site.file("head.bin")
    whole, head = site.ask(address), site.ask(address, method="HEAD")
    part = site.ask(address, {"range": "bytes=0-9"}, method="HEAD")
    for answer in (head, part):
        assert (answer.status, answer.body) == (200, b"")
        assert {**answer.headers, "date": ""} == {**whole.headers, "date": ""}


def test_an_empty_file_is_sent_and_its_ranges_are_ignored(site: Site) -> None:
    address = site.file("empty", b"")
    for headers in ({}, {"range": "bytes=0-"}, {"range": "bytes=-1"}):
        answer = site.ask(address, headers)
        assert (answer.status, answer.headers["content-length"], answer.body) == (200, "0", b"")


def test_several_requests_follow_each_other_on_one_connection(site: Site) -> None:
    """What is too long or too short would be read as the next answer."""
    address = site.file("keep alive")
    for headers in ({}, {"range": "bytes=5-9"}, {"range": "bytes=2000-"}, {"if-none-match": "*"}, {}):
        answer = site.server.client.get(address, headers=headers)
        assert answer.status_code in (200, 206, 304, 416)
    assert answer.content == CONTENT


spaces = st.text(" \t,", max_size=3)
positions = st.integers(0, 1100) | st.integers(0, 10**25)


@st.composite
def ranges(draw: st.DrawFn) -> tuple[str, bytes | None]:
    """A header with one range, and what of the content it means; None for none of it."""
    if draw(st.booleans()):
        length = draw(positions)
        text, part = f"-{length}", CONTENT[-length:] if length else b""
    else:
        first = draw(positions)
        last = draw(st.none() | positions.map(lambda more: first + more))
        text, part = f"{first}-{'' if last is None else last}", CONTENT[first : None if last is None else last + 1]
    unit = draw(st.sampled_from(["bytes", "Bytes", "BYTES"]))
    return f"{unit}={draw(spaces)}{text}{draw(spaces)}", part or None


@settings(max_examples=150, deadline=None)
@given(asked=ranges())
def test_any_range_is_the_slice_it_names(our_site: Site, asked: tuple[str, bytes | None]) -> None:
    header, expected = asked
    answer = our_site.ask(our_site.file("range"), {"range": header})
    if expected is None:
        assert answer.is_problem(416, "range_not_satisfiable")
        assert answer.headers["content-range"] == "bytes */1000"
    else:
        assert (answer.status, answer.body) == (206, expected)
        start = CONTENT.index(expected) if len(expected) > 7 else int(answer.headers["content-range"][6:].split("-")[0])
        assert CONTENT[start : start + len(expected)] == expected
        assert answer.headers["content-range"] == f"bytes {start}-{start + len(expected) - 1}/1000"
        assert answer.headers["content-length"] == str(len(expected))


NO_RANGES: Final = [
    "", "bytes", "bytes=", "bytes=-", "bytes=5", "bytes=5-4", "bytes=a-b", "bytes=0-1-2", "bytes=--1", "bytes=+1-2",
    "bytes 0-1", "bytes =0-1", "items=0-1", "0-1", "bytes=0-1;x", "bytes=0 -1", "bytes=\xb2-", "bytes=0x1-2",
    "bytes=0-1,5-6", "bytes=0-1, bytes=5-6", "bytes=9000-9001,0-1", f"bytes={'9' * 5000}-", f"bytes={',' * 9000}",
]  # fmt: skip


def test_a_range_that_can_t_be_read_or_is_one_of_several_is_ignored(our_site: Site) -> None:
    address = our_site.file("range")
    for header in NO_RANGES:
        assert our_site.ask(address, {"range": header}).whole, header


@settings(max_examples=100, deadline=None)
@given(value=st.text(st.characters(min_codepoint=0x20, max_codepoint=0xFF, exclude_categories=["Cc"]), max_size=60))
def test_whatever_conditions_say_the_answer_is_a_right_one(our_site: Site, value: str) -> None:
    address, value = our_site.file("range"), value.strip()
    names = ["range", "if-range", "if-match", "if-none-match", "if-modified-since", "if-unmodified-since"]
    for headers in ({name: value} for name in names):
        answer = our_site.ask(address, headers)
        assert answer.status in (200, 206, 304, 412, 416)
        assert answer.status != 200 or answer.whole


# Conditions


def conditions(site: Site) -> dict[str, str]:
    etag = site.ask(site.file("condition")).headers["etag"]
    return {"this": etag, "weak": f"W/{etag}", "other": '"other"', "then": DATE}


SAME_DATES: Final = [DATE, "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"]
EARLIER: Final = "Sun, 06 Nov 1994 08:49:36 GMT"
LATER: Final = "Sun, 06 Nov 1994 08:49:38 GMT"
NO_DATES: Final = ["", "yesterday", "784111777", "Sun, 06 Nov 99999999999 08:49:37 GMT", f"{DATE}, {DATE}", "1" * 9000]


#: What a client sends, and the status of the answer to a GET.
CONDITIONS: Final[list[tuple[dict[str, str], int]]] = [
    ({"if-none-match": "{this}"}, 304),
    ({"if-none-match": "{weak}"}, 304),
    ({"if-none-match": '{other}, "a,b" ,{this}'}, 304),
    ({"if-none-match": "*"}, 304),
    ({"if-none-match": "{other}"}, 200),
    ({"if-none-match": '"*"'}, 200),
    ({"if-none-match": ""}, 200),
    ({"if-match": "{this}"}, 200),
    ({"if-match": "*"}, 200),
    ({"if-match": "{other}, {this}"}, 200),
    ({"if-match": "{weak}"}, 412),
    ({"if-match": "{other}"}, 412),
    ({"if-match": ""}, 412),
    *[({"if-modified-since": date}, 304) for date in [*SAME_DATES, LATER]],
    ({"if-modified-since": EARLIER}, 200),
    *[({"if-modified-since": text}, 200) for text in NO_DATES],
    *[({"if-unmodified-since": date}, 200) for date in [*SAME_DATES, LATER]],
    ({"if-unmodified-since": EARLIER}, 412),
    *[({"if-unmodified-since": text}, 200) for text in NO_DATES],
    # A tag wins over a date, and what forbids over what spares.
    ({"if-none-match": "{other}", "if-modified-since": DATE}, 200),
    ({"if-match": "{this}", "if-unmodified-since": EARLIER}, 200),
    ({"if-match": "{other}", "if-none-match": "{this}"}, 412),
    ({"if-match": "{this}", "if-none-match": "{this}"}, 304),
    ({"if-none-match": "{this}", "range": "bytes=0-9"}, 304),
    ({"if-none-match": "{this}", "range": "bytes=9000-"}, 304),
    ({"if-match": "{other}", "range": "bytes=9000-"}, 412),
    # The rest of what one has a part of, or the whole anew.
    ({"if-range": "{this}", "range": "bytes=0-9"}, 206),
    ({"if-range": "{this}", "range": "bytes=9000-"}, 416),
    ({"if-range": "{this}"}, 200),
    ({"if-range": "{weak}", "range": "bytes=0-9"}, 200),
    ({"if-range": "{other}", "range": "bytes=0-9"}, 200),
    ({"if-range": "{other}", "range": "bytes=9000-"}, 200),
    ({"if-range": "{this}, {this}", "range": "bytes=0-9"}, 200),
    ({"if-range": "*", "range": "bytes=0-9"}, 200),
    *[({"if-range": date, "range": "bytes=0-9"}, 206) for date in SAME_DATES],
    *[({"if-range": text, "range": "bytes=0-9"}, 200) for text in [EARLIER, LATER, *NO_DATES]],
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_a_condition_decides(our_site: Site, method: str) -> None:
    values = conditions(our_site)
    for headers, status in CONDITIONS:
        asked = {name: text.format(**values) for name, text in headers.items()}
        answer = our_site.ask("/download/condition", asked, method)
        if method == "HEAD" and status in (206, 416):
            status = 200
        assert answer.status == status, headers
        if status == 304:
            assert answer.body == b"", headers
            assert (answer.headers["etag"], answer.headers["last-modified"]) == (values["this"], DATE), headers
            assert "content-length" not in answer.headers and "content-type" not in answer.headers, headers
        elif method == "HEAD":
            assert answer.body == b"", headers
        elif status == 412:
            assert answer.is_problem(412, "precondition_failed"), headers
        elif status == 416:
            assert answer.is_problem(416, "range_not_satisfiable"), headers
        else:
            assert answer.body == {200: CONTENT, 206: CONTENT[:10]}[status], headers


def test_a_file_that_was_put_in_its_place_has_another_tag_and_is_not_mixed_with_it(our_site: Site) -> None:
    """Of the same size and date as the old one."""
    before = our_site.ask(our_site.file("replaced"))
    our_site.file(".new", CONTENT[::-1])
    os.replace(our_site.folder / ".new", our_site.folder / "replaced")
    after = our_site.ask("/download/replaced", {"range": "bytes=500-", "if-range": before.headers["etag"]})
    assert (after.status, after.body) == (200, CONTENT[::-1])
    assert after.headers["last-modified"] == before.headers["last-modified"]
    assert after.headers["etag"] != before.headers["etag"]


@pytest.mark.parametrize("modified_s", [-1, 4102444800], ids=["before 1970", "in the future"])
def test_a_date_that_says_nothing_is_not_told_and_decides_nothing(our_site: Site, modified_s: int) -> None:
    address = our_site.file("undated")
    os.utime(our_site.folder / "undated", (modified_s, modified_s))
    date = formatdate(modified_s, usegmt=True)
    for headers in (
        {},
        {"if-modified-since": date},
        {"if-unmodified-since": DATE},
        {"range": "bytes=0-9", "if-range": date},
    ):
        answer = our_site.ask(address, headers)
        assert answer.whole and "last-modified" not in answer.headers


# Names


def parsed(header: str) -> tuple[str, dict[str, str]]:
    """RFC 6266, 4.1, to the letter: the type, and the parameters, `filename*` decoded as RFC 8187 says."""
    token = r"[!#$%&'*+.^_`|~0-9A-Za-z-]+"
    kind, rest = re.match(rf"({token})(.*)", header, re.DOTALL).groups()  # type: ignore[union-attr]
    found: dict[str, str] = {}
    while rest:
        match = re.match(rf'[ \t]*;[ \t]*({token})=(?:"((?:[\t \x21\x23-\x5b\x5d-\x7e]|\\[\t -~])*)"|({token}))', rest)
        assert match, f"not by the grammar: {rest!r}"
        name, quoted, value = match.groups()
        assert name not in found
        if name.endswith("*"):
            charset, _, encoded = value.split("'")
            assert charset == "UTF-8" and re.fullmatch(r"(%[0-9A-F]{2}|[!#$&+.^_`|~0-9A-Za-z-])*", encoded)
            value = unquote_to_bytes(encoded).decode()
        found[name] = value if quoted is None else re.sub(r"\\(.)", r"\1", quoted)
        rest = rest[match.end() :]
    return kind, found


AWKWARD: Final = [
    'quote".txt', "back\\slash", "line\nend", "cr\r\nSet-Cookie: a=b", "tab\t", "per%20cent", "ü.txt", "日本語.pdf",
    "😀", "semi;colon", "a=b", "' single '", "e\u0301", "\u202egpj.exe", "<b>", "*", "?query", "#fragment", "a b", "~",
    "\x7f", " ", "x" * 255, "é" * 127, "-rf", "C:", "data:,x", "$(true)", "`x`", "a..", "plus+", "a&b",
]  # fmt: skip


def test_a_file_keeps_its_name_whatever_that_is(site: Site) -> None:
    for name in AWKWARD:
        answer = site.ask(site.file(name))
        assert answer.whole, name
        assert "set-cookie" not in answer.headers, name
        kind, names = parsed(answer.headers["content-disposition"])
        assert kind == "attachment", name
        assert names.get("filename*", names["filename"]) == name
        assert answer.headers["content-type"] in ("text/plain", "application/pdf", "application/octet-stream") or (
            name == "\u202egpj.exe"
        ), name


@settings(max_examples=500, deadline=None)
@given(name=st.text(min_size=1) | st.text(st.sampled_from("\"\\%';=*\r\n\t\x00é a/"), min_size=1))
def test_any_name_can_be_read_back_from_its_header(name: str) -> None:
    header = content_disposition(name)
    assert header.isascii() and header.isprintable()
    kind, names = parsed(header)
    assert kind == "attachment"
    assert names.get("filename*", names["filename"]) == name
    # For programs that know the plain one only: nothing in it needs to be escaped, or is taken for an escape.
    assert not set(names["filename"]) & set('"\\%') and len(names["filename"]) == len(name)
    message = Message()  # and by somebody else's reader, for mail, which knows one of the two at a time
    message["content-disposition"] = re.sub('filename=".*"; ', "", header)
    assert message.get_filename() == name.strip()


@pytest.mark.parametrize(
    ("name", "media_type"),
    [
        ("a.txt", "text/plain"),
        ("a.PDF", "application/pdf"),
        ("a.json", "application/json"),
        ("a.csv", "text/csv"),
        ("a.js", "application/octet-stream"),
        ("a.mjs", "application/octet-stream"),
        ("a.css", "application/octet-stream"),
        ("a.tar.gz", "application/gzip"),
        ("a", "application/octet-stream"),
        ("a.html", "text/html"),
        ("a.svg", "image/svg+xml"),
    ],
)
def test_no_type_lets_a_file_act_as_a_part_of_our_pages(our_site: Site, name: str, media_type: str) -> None:
    answer = our_site.ask(our_site.file(name))
    assert answer.headers["content-type"] == media_type
    assert answer.headers["x-content-type-options"] == "nosniff"
    assert "sandbox" in answer.headers["content-security-policy"]
    assert answer.headers["content-disposition"].startswith("attachment;")


# What is not there


SECRET: Final = b"this is not for you"


@pytest.fixture(scope="module")
def with_traps(site: Site) -> Site:
    folder = site.folder
    (folder.parent / "secret").write_bytes(SECRET)
    (folder.parent / "files2").mkdir()
    (folder.parent / "files2/secret").write_bytes(SECRET)
    (folder / "sub").mkdir()
    (folder / "sub/secret").write_bytes(SECRET)
    (folder / ".secret").write_bytes(SECRET)
    (folder / "..secret").write_bytes(SECRET)
    (folder / "link").symlink_to("../secret")
    (folder / "linked folder").symlink_to("../files2")
    (folder / "within").symlink_to("sub/secret")
    (folder / "loop").symlink_to("loop")
    (folder / "zeros").symlink_to("/dev/zero")
    os.mkfifo(folder / "fifo")
    with suppress(PermissionError):
        os.mknod(folder / "device", 0o666 | 0o020000, os.makedev(1, 5))
    with socket.socket(socket.AF_UNIX) as sock:
        previous = os.getcwd()
        os.chdir(folder)  # the path of a socket has 107 bytes at most
        try:
            sock.bind("socket")
        finally:
            os.chdir(previous)
    return site


NO_FILES: Final = [
    b"", b"missing", b".", b"..", b"../secret", b"../../etc/passwd", b"../" * 20 + b"etc/passwd", b"..%2fsecret",
    b"%2e%2e%2fsecret", b"%2e%2e/secret", b".%2e/secret", b"%252e%252e%252fsecret", b"%25252e%25252e%25252fsecret",
    b"..%5csecret", b"..\\secret", b"..%c0%afsecret", b"%c0%ae%c0%ae/secret", b"..%u2215secret",
    b"..%ef%bc%8fsecret",
    b"./../secret", b"sub/../../secret", b"....//secret", b"..;/secret", b"../files2/secret", b"/etc/passwd",
    b"%2fetc%2fpasswd", b"//etc/passwd", b"file:///etc/passwd", b"~/secret", b"sub", b"sub/", b"sub/secret",
    b"sub%2fsecret", b"sub%2f..%2f..%2fsecret", b".secret", b"%2esecret", b"..secret", b"./sub/secret", b"link",
    b"link/", b"linked%20folder", b"linked%20folder/secret", b"linked%20folder%2fsecret", b"within", b"loop",
    b"zeros", b"fifo", b"device", b"socket", b"missing%00", b"%00", b"sub%00/secret", b"missing%00../secret",
    b"%0a", b"%ff%fe", b"x" * 256, b"%c3%a9" * 128, b"x" * 5000, b"a/" * 2000,
    b"missing?file=../secret", b"missing;x", b"%",
]  # fmt: skip


@pytest.mark.parametrize("method", ["GET", "HEAD"])
def test_what_is_no_file_of_the_folder_is_not_found(with_traps: Site, method: str) -> None:
    for name in NO_FILES:
        answer = with_traps.ask(b"/download/" + name, method=method)
        assert answer.status == 404, name
        assert answer.headers["content-type"] == "application/problem+json", name
        assert "etag" not in answer.headers and "content-disposition" not in answer.headers, name
        assert SECRET not in answer.body and b"root:" not in answer.body, name
        assert not with_traps.has_open(), name


@pytest.mark.parametrize(
    "target", [b"/download/../secret", b"/download/\xff", b"/download/a b", b"/download/\0", b"/download/\n"]
)
def test_a_target_that_is_no_target_gets_no_byte_of_a_file(with_traps: Site, target: bytes) -> None:
    with suppress(OSError, ValueError):  # the server may refuse it in any way
        assert SECRET not in with_traps.ask(target).body
    assert with_traps.ask("/healthz").status == 200


def test_a_method_that_writes_is_refused_with_those_that_there_are(our_site: Site) -> None:
    answer = our_site.ask(our_site.file("read only"), method="PUT")
    assert answer.is_problem(405, "method_not_allowed")
    assert answer.headers["allow"] == "GET, HEAD"
    assert our_site.ask("/download/read%20only").whole


def test_answers_without_a_body_leave_no_file_open(our_site: Site) -> None:
    address = our_site.file("closed")
    for _ in range(3):
        our_site.ask(address, method="HEAD")
        our_site.ask(address, {"if-none-match": "*"})
        our_site.ask(address, {"if-match": '"other"'})
        our_site.ask(address, {"range": "bytes=1000-"})
        our_site.ask(address, {"range": "bytes=-1"})
        our_site.ask(address)
    assert our_site.has_open() == []


async def test_too_many_open_files_are_the_server_s_trouble_and_not_a_missing_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(path: str, flags: int) -> int:
        raise OSError(errno.EMFILE, "too many open files")

    monkeypatch.setattr(files, "_open_safely", full)
    app = SSEApp(files.ROUTES, Settings(log="memory"))
    app.state = SimpleNamespace(files=tmp_path)
    answer = await ask_in_process(app, "/download/a")
    assert answer.problem == (503, "unavailable")
    assert answer.headers["retry-after"] == "5"


async def test_a_folder_that_can_t_be_made_is_refused(tmp_path: Path) -> None:
    (tmp_path / "files").touch()
    with pytest.raises(SSEAppError, match="as the files folder"):
        await open_folder(tmp_path)


# In the middle


def begin(response: HTTPResponse) -> None:
    assert response.status == 200
    assert response.read(1000) == bytes(1000)


def rest_is_cut_off(response: HTTPResponse) -> bool:
    """Whether the client can see that it isn't all."""
    try:
        response.read()
    except (IncompleteRead, ConnectionResetError):
        return True
    return False


def test_a_client_that_leaves_has_its_file_closed(our_site: Site) -> None:
    with our_site.opened(our_site.big_file("left"), window=MIB // 16) as response:
        begin(response)
        assert our_site.has_open("left")
    wait_until(lambda: not our_site.has_open("left"))


def test_a_file_that_shrinks_while_it_is_sent_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path) as site:
        with site.opened(site.big_file("shrunk"), window=MIB // 16) as response:
            begin(response)
            os.truncate(site.folder / "shrunk", 1000)
            assert rest_is_cut_off(response)
        wait_until(lambda: "the file was truncated during the download" in site.server.log())
        wait_until(lambda: not site.has_open("shrunk"))
        assert site.ask("/download/shrunk").body == bytes(1000)


def test_a_file_that_grows_while_it_is_sent_ends_where_it_began_to(our_site: Site) -> None:
    with our_site.opened(our_site.big_file("grown"), window=MIB // 16) as response:
        begin(response)
        os.truncate(our_site.folder / "grown", 2 * BIG)
        assert len(response.read()) == BIG - 1000


def test_a_download_past_its_longest_life_is_cut_off(tmp_path: Path) -> None:
    with serving(tmp_path, SSEAPP_MAX_STREAM_S="0.2", SSEAPP_MAX_STREAMS="1") as site:
        with site.opened(site.big_file("long"), window=MIB // 16) as response:
            begin(response)
            assert site.ask("/download/long").is_problem(503, "unavailable")  # the house is full
            wait_until(lambda: not site.has_open("long"))
            assert rest_is_cut_off(response)


def test_a_download_at_a_drain_is_cut_off_when_its_time_is_over(tmp_path: Path) -> None:
    with serving(tmp_path, SSEAPP_DRAIN_S="0.2") as site:
        with site.opened(site.big_file("drained"), window=MIB // 16) as response:
            begin(response)
            site.server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: not site.has_open("drained"))
            assert rest_is_cut_off(response)
        assert site.server.wait() == 0


def test_a_download_that_ends_within_the_drain_is_whole(tmp_path: Path) -> None:
    with serving(tmp_path) as site:
        with site.opened(site.big_file("drained"), window=MIB // 16) as response:
            begin(response)
            site.server.process.send_signal(signal.SIGTERM)
            wait_until(lambda: site.ask("/readyz").status == 503)
            assert len(response.read()) == BIG - 1000
        assert site.server.wait() == 0


def test_many_read_one_file_at_once(our_site: Site) -> None:
    address = our_site.file("many", CONTENT * 2000)
    answers: list[Answer] = []
    readers = [threading.Thread(target=lambda: answers.append(our_site.ask(address))) for _ in range(20)]
    for reader in readers:
        reader.start()
    for reader in readers:
        reader.join(LIMIT_S)
    assert [answer.body == CONTENT * 2000 for answer in answers] == [True] * 20
    assert our_site.has_open("many") == []


@needs("curl")
def test_curl_takes_up_a_download_that_was_cut(our_site: Site, tmp_path: Path) -> None:
    content = CONTENT * 500
    address = our_site.file("resumed", content)
    (tmp_path / "out").write_bytes(content[:123_456])
    command = [find("curl"), "-sS", "-C", "-", "-o", str(tmp_path / "out"), our_site.server.url + address]
    subprocess.run(command, check=True, timeout=LIMIT_S)
    assert (tmp_path / "out").read_bytes() == content


@needs("time")
def test_a_large_file_costs_no_memory(tmp_path: Path) -> None:
    size, most = 256 * MIB, 20 * MIB
    with serving(tmp_path) as site:
        site.ask(site.file("small"))
        before = memory_bytes(site.server.process.pid, "VmHWM")
        buffer, received = memoryview(bytearray(MIB)), 0
        with site.opened(site.big_file("large", size)) as response:
            while count := response.readinto(buffer):
                received += count
        assert received == size
        assert memory_bytes(site.server.process.pid, "VmHWM") - before < most


@pytest.mark.parametrize("anyio_backend", ["asyncio", "trio"])
async def test_a_download_needs_nothing_of_asyncio(tmp_path: Path, anyio_backend: str) -> None:
    app = SSEApp(files.ROUTES, Settings(log="memory"))
    app.state = SimpleNamespace(files=await open_folder(tmp_path))
    (tmp_path / "files/a").write_bytes(CONTENT * 2000)
    assert (await ask_in_process(app, "/download/a")).body == CONTENT * 2000
    part = await ask_in_process(app, "/download/a", headers={"range": "bytes=-4"})
    assert (part.status, part.body, part.complete) == (206, b"0249", True)
    async with connect(app, "GET", "/download/a", window=1) as exchange:
        assert await exchange.chunk()
    assert not exchange.complete
