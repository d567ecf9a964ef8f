"""The format, both directions: `Decoder` against the HTML standard, `encode` against `Decoder`.

Every reader case goes through `reads`, which feeds it whole, byte by byte, cut in two at every place, and with more
behind it. What is quoted is the standard's text, https://html.spec.whatwg.org/multipage/server-sent-events.html
"""

import enum
import json
from collections import UserDict, deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta, timezone
from itertools import cycle
from pathlib import Path
from typing import Any, Final
from uuid import UUID

import msgspec
import numpy
import orjson
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, Field

from ssecore.errors import EncodeError, TooLarge
from ssecore.wire import DEFAULT_MAX_EVENT_BYTES, HEARTBEAT, Decoder, Event, encode, encode_json

BOM = b"\xef\xbb\xbf"
NEXT = b"data: next\n\n"
UNFINISHED = b"id: unfinished\nevent: unfinished\ndata: unfinished\n"

#: What a decoder has given and holds: the events, the last event id, the reconnection time.
Outcome = tuple[list[Event], str, int | None]

PROPERTY = settings(max_examples=400, deadline=None)


def read(chunks: Iterable[bytes], decoder: Decoder | None = None) -> Outcome:
    decoder = decoder or Decoder()
    events = [event for chunk in chunks for event in decoder.feed(chunk)]
    return events, decoder.last_event_id, decoder.retry_ms


def bytewise(stream: bytes) -> Iterator[bytes]:
    return (bytes((byte,)) for byte in stream)


def cut(stream: bytes, sizes: list[int]) -> Iterator[bytes]:
    """The stream in pieces of these sizes, over and over."""
    at = 0
    for size in cycle(sizes):
        if at >= len(stream):
            return
        yield stream[at : at + size]
        at += size


def cuts(stream: bytes) -> Iterator[list[bytes]]:
    """Whole, byte by byte, byte by byte with empty chunks between them, and in two at every place."""
    yield [stream]
    yield list(bytewise(stream))
    yield [chunk for byte in bytewise(stream) for chunk in (b"", byte)]
    yield from ([stream[:at], stream[at:]] for at in range(1, len(stream)))


def reads(stream: bytes, *events: Event, last_event_id: str = "", retry_ms: int | None = None) -> None:
    """A stream that ends with a whole block gives these events, however it is cut and whatever is behind it."""
    for chunks in cuts(stream):
        decoder = Decoder()
        assert read(chunks, decoder) == ([*events], last_event_id, retry_ms), chunks
        assert decoder.unfinished == (stream == b"\xef\xbb\xbf"), chunks
    and_next = [*events, Event("next", id=last_event_id or None)]
    for more, wanted in ((UNFINISHED, [*events]), (NEXT, and_next), (NEXT + UNFINISHED, and_next)):
        for chunks in ([stream + more], [stream, more], list(bytewise(stream + more))):
            assert read(chunks) == (wanted, last_event_id, retry_ms), chunks


def reads_unfinished(stream: bytes, *events: Event, last_event_id: str = "", retry_ms: int | None = None) -> None:
    """The same for a stream that ends inside a block: its rest is not dispatched, and the next connection has none."""
    for chunks in cuts(stream):
        assert read(chunks) == ([*events], last_event_id, retry_ms), chunks
    for chunks in ([stream + b"more"], [*bytewise(stream), b"m", b"ore"]):
        decoder = Decoder()
        assert read(chunks, decoder) == ([*events], last_event_id, retry_ms), chunks
        decoder.reset()
        assert read([NEXT], decoder) == ([Event("next", id=last_event_id or None)], last_event_id, retry_ms), chunks


class TestExamplesOfTheStandard:
    def test_introduction_messages(self) -> None:
        """9.2.1: "the script sends messages in the following form"."""
        reads(
            b"data: This is the first message.\n\n"
            b"data: This is the second message, it\ndata: has two lines.\n\n"
            b"data: This is the third message.\n\n",
            Event("This is the first message."),
            Event("This is the second message, it\nhas two lines."),
            Event("This is the third message."),
        )

    def test_introduction_add_and_remove(self) -> None:
        """9.2.1: "Here is a stream that has two event types, "add" and "remove"."""
        reads(
            b"event: add\ndata: 73857293\n\nevent: remove\ndata: 2153\n\nevent: add\ndata: 113411\n\n",
            Event("73857293", "add"),
            Event("2153", "remove"),
            Event("113411", "add"),
        )

    def test_stock_ticker(self) -> None:
        """9.2.6: "once followed by a blank line [...] the event's data attribute would contain the string
        "YHOO\\n+2\\n10" (where "\\n" represents a newline)."
        """
        ticker = b"data: YHOO\ndata: +2\ndata: 10\n"
        reads_unfinished(ticker)
        reads(ticker + b"\n", Event("YHOO\n+2\n10"))

    def test_four_blocks(self) -> None:
        """9.2.6: "The first block has just a comment, and will fire nothing. The second block has two fields with names
        "data" and "id" respectively; an event will be fired for this block, with the data "first event", and will then
        set the last event ID to "1" [...]. The third block fires an event with data "second event", and also has an
        "id" field, this time with no value, which resets the last event ID to the empty string [...]. Finally, the last
        block just fires an event with the data " third event" (with a single leading space character). Note that the
        last still has to end with a blank line, the end of the stream is not enough to trigger the dispatch of the last
        event."
        """
        blocks = [b": test stream\n\n", b"data: first event\nid: 1\n\n", b"data:second event\nid\n\n"]
        first, second = Event("first event", id="1"), Event("second event")
        reads(blocks[0])
        reads(b"".join(blocks[:2]), first, last_event_id="1")
        reads(b"".join(blocks), first, second)
        reads_unfinished(b"".join(blocks) + b"data:  third event\n", first, second)
        reads(b"".join(blocks) + b"data:  third event\n\n", first, second, Event(" third event"))

    def test_two_events_of_nothing_and_a_newline(self) -> None:
        """9.2.6: "The first block fires events with the data set to the empty string, as would the last block if it was
        followed by a blank line. The middle block fires an event with the data set to a single newline character. The
        last block is discarded because it is not followed by a blank line."
        """
        stream = b"data\n\ndata\ndata\n\ndata:"
        reads_unfinished(stream, Event(""), Event("\n"))
        reads_unfinished(stream + b"\n", Event(""), Event("\n"))
        reads(stream + b"\n\n", Event(""), Event("\n"), Event(""))

    def test_two_identical_events(self) -> None:
        """9.2.6: "This is because the space after the colon is ignored if present."""
        reads(b"data:test\n\ndata: test\n\n", Event("test"), Event("test"))


class TestByteOrderMark:
    """ "The UTF-8 decode algorithm strips one leading UTF-8 Byte Order Mark (BOM), if any." """

    def test_leading_one_is_removed(self) -> None:
        reads(BOM + b"data: x\n\n", Event("x"))

    def test_alone_it_is_nothing(self) -> None:
        reads(BOM)
        reads(BOM + b"\n\n")
        reads(BOM + b"\r\n")

    def test_second_one_belongs_to_the_field_name(self) -> None:
        reads(BOM + BOM + b"data: x\n\ndata: y\n\n", Event("y"))

    def test_later_one_stays(self) -> None:
        reads(b"data: a\n\n" + BOM + b"data: b\n\n", Event("a"))
        reads(b"\n" + BOM + b"data: b\n\n")
        reads(b"data: " + BOM + b"x\n\n", Event("\ufeffx"))
        reads(
            BOM + b": c\nid: " + BOM + b"\ndata:" + BOM + b"\n\n", Event("\ufeff", id="\ufeff"), last_event_id="\ufeff"
        )

    @pytest.mark.parametrize("part", [b"\xef", b"\xef\xbb", b"\xef\xef", b"\xbb\xbf", b"\xef\xbb\xbb", b"\xef\xbb\xef"])
    def test_part_of_one_is_part_of_the_first_field_name(self, part: bytes) -> None:
        reads(part + b"data: x\n\ndata: y\n\n", Event("y"))
        reads(part + b"\ndata: x\n\n", Event("x"))
        reads(part + b"\rdata: x\r\r", Event("x"))
        reads(part + BOM + b"\ndata: x\n\n", Event("x"))

    def test_each_connection_may_have_one(self) -> None:
        decoder = Decoder()
        assert decoder.feed(BOM + b"data: a\n\n") == [Event("a")]
        decoder.reset()
        assert decoder.feed(BOM[:2]) == []
        decoder.reset()
        assert read(bytewise(BOM + b"data: b\n\n"), decoder)[0] == [Event("b")]


class TestLineEnds:
    """ "a CRLF character pair, a single LF character not preceded by a CR character, and a single CR character not
    followed by a LF character being the ways in which a line can end"
    """

    @pytest.mark.parametrize("end", [b"\n", b"\r", b"\r\n"])
    def test_each_kind_ends_a_line(self, end: bytes) -> None:
        lines = [b": c", b"event: e", b"data: a", b"data: b", b"id: 1", b"retry: 5", b"", b"", b"data: c", b"", b""]
        reads(end.join(lines), Event("a\nb", "e", "1", 5), Event("c", id="1"), last_event_id="1", retry_ms=5)

    @pytest.mark.parametrize(
        "blank", [b"\n\n", b"\r\r", b"\r\n\n", b"\n\r", b"\n\r\n", b"\r\n\r", b"\r\r\n", b"\r\n\r\n"]
    )
    def test_any_two_make_a_blank_line(self, blank: bytes) -> None:
        reads(b"data: a" + blank, Event("a"))
        reads(b"data: a" + blank + b"data: b" + blank, Event("a"), Event("b"))

    def test_mixed(self) -> None:
        reads(b"data: a\rdata: b\r\ndata: c\ndata: d\n\rdata: e\r\r\n", Event("a\nb\nc\nd"), Event("e"))

    def test_crlf_is_one_end(self) -> None:
        reads_unfinished(b"data: a\r\n")
        reads(b"data: a\r\ndata: b\r\n\r\n", Event("a\nb"))

    def test_lf_cr_is_two(self) -> None:
        reads(b"data: a\n\rdata: b\n\r", Event("a"), Event("b"))

    def test_only_the_first_lf_after_a_cr_belongs_to_it(self) -> None:
        reads(b"data: a\r\n\ndata: b\r\n\n", Event("a"), Event("b"))

    def test_blank_lines_alone_are_nothing(self) -> None:
        reads(b"\n\r\r\n\n\n\r\n\r\r")

    def test_event_comes_at_the_cr_of_its_blank_line(self) -> None:
        decoder = Decoder()
        assert decoder.feed(b"data: a\r\n\r") == [Event("a")]
        assert decoder.feed(b"\n") == []
        assert decoder.feed(b"data: b\r") == []
        assert decoder.feed(b"\r") == [Event("b")]

    @pytest.mark.parametrize("char", ["\u2028", "\u2029", "\x85", "\v", "\f", "\x1c", "\x1d", "\x1e"])
    def test_other_separators_stay_inside_a_line(self, char: str) -> None:
        text = f"a{char}b{char}"
        line = text.encode()
        reads(
            b"event: " + line + b"\nid: " + line + b"\ndata: " + line + b"\n\n",
            Event(text, text, text),
            last_event_id=text,
        )


class TestFields:
    @pytest.mark.parametrize(
        ("line", "data"),
        [
            (b"data", ""),
            (b"data:", ""),
            (b"data: ", ""),
            (b"data:x", "x"),
            (b"data: x", "x"),
            (b"data:  x", " x"),
            (b"data: x ", "x "),
            (b"data:\tx", "\tx"),
            (b"data: \tx", "\tx"),
            (b"data:\xc2\xa0x", "\xa0x"),
            (b"data::", ":"),
            (b"data: :x", ":x"),
            (b"data:a:b: c", "a:b: c"),
            (b"data:data: x", "data: x"),
            (b"data:\0", "\0"),
        ],
    )
    def test_value_is_what_follows_the_colon_and_one_space(self, line: bytes, data: str) -> None:
        reads(line + b"\n\n", Event(data))

    @pytest.mark.parametrize(
        "line",
        [
            *(b"foo: x", b"foo", b"foo:", b" ", b"\0", b"\t", b"Data: x", b"DATA", b"Event: x", b"ID: x", b"Retry: 5"),
            *(b" data: x", b"data : x", b"\tdata: x", b"data\0: x", b"da\0ta: x", b"datax: x", b"dat: x", b"data;x"),
            *(b" id: 7", b"id : 7", b"ids: 7", b" retry: 5", b"retry : 5", b" event: x", b"event : x", b"message: x"),
            *("d\u0430ta: x".encode(), "\uff44ata: x".encode(), b"data\xff: x", b"\xffid: x", b"lastEventId: 7"),
        ],
    )
    def test_unknown_names_are_ignored(self, line: bytes) -> None:
        """ "Field names must be compared literally, with no case folding performed." """
        reads(line + b"\n\n")
        reads(line + b"\ndata: y\n" + line + b"\n\n", Event("y"))

    @pytest.mark.parametrize(
        "comment", [b":", b": x", b":data: x", b": id: 7", b"::", b":\0", b":\xff", HEARTBEAT[:-1]]
    )
    def test_comments_are_ignored(self, comment: bytes) -> None:
        reads(comment + b"\n\n")
        reads(comment + b"\ndata: a\n" + comment + b"\ndata: b\n" + comment + b"\n\n", Event("a\nb"))

    def test_data_lines_are_joined_by_lf(self) -> None:
        reads(b"data:\ndata: a\ndata\ndata:\n\n", Event("\na\n\n"))

    @pytest.mark.parametrize(
        "block", [b"event: e\n\n", b"id: \n\n", b"event: e\nfoo: x\n:\n\n", b"event\n\n", b"id\n\n"]
    )
    def test_block_without_data_is_not_dispatched(self, block: bytes) -> None:
        """ "If the data buffer is an empty string, set the data buffer and the event type buffer to the empty string
        and return." """
        reads(block)
        reads(block + b"data: x\n\n", Event("x"))

    def test_empty_data_field_is_dispatched(self) -> None:
        reads(b"event: e\ndata:\n\n", Event("", "e"))

    def test_event_type_lasts_for_one_block(self) -> None:
        reads(b"event: a\ndata: 1\n\ndata: 2\n\nevent: b\n\ndata: 3\n\n", Event("1", "a"), Event("2"), Event("3"))

    def test_last_event_type_of_a_block_counts(self) -> None:
        reads(b"event: a\ndata: 1\nevent: b\n\n", Event("1", "b"))
        reads(b"event: a\ndata: 1\nevent\n\n", Event("1"))
        reads(b"data: 1\nevent:  a \n\n", Event("1", " a "))
        reads(b"data: 1\nevent: \0\n\n", Event("1", "\0"))


class TestLastEventId:
    def test_sticks_to_the_events_that_follow(self) -> None:
        """ "If an event doesn't have an "id" field, but an earlier event did set the event source's last event ID
        string, then the event's lastEventId field will be set to the value of whatever the last seen "id" field was."
        """
        reads(
            b"data: a\n\nid: 1\ndata: b\n\ndata: c\n\nid: 2\ndata: d\n\n",
            *(Event("a"), Event("b", id="1"), Event("c", id="1"), Event("d", id="2")),
            last_event_id="2",
        )

    @pytest.mark.parametrize("line", [b"id", b"id:", b"id: "])
    def test_empty_one_resets(self, line: bytes) -> None:
        reads(b"id: 1\ndata: a\n\n" + line + b"\ndata: b\n\ndata: c\n\n", Event("a", id="1"), Event("b"), Event("c"))
        reads(b"id: 1\n\n" + line + b"\n\n")

    @pytest.mark.parametrize("value", [b"\0", b"2\0", b"\x002", b"2\x003", b" \0"])
    def test_one_with_nul_is_ignored(self, value: bytes) -> None:
        """ "If the field value does not contain U+0000 NULL, then set [...]. Otherwise, ignore the field." """
        reads(b"id: 1\n\nid:" + value + b"\ndata: a\n\n", Event("a", id="1"), last_event_id="1")
        reads(b"id: " + value + b"\ndata: a\n\n", Event("a"))

    def test_last_one_of_a_block_counts(self) -> None:
        reads(b"id: 1\ndata: a\nid: 2\n\n", Event("a", id="2"), last_event_id="2")
        reads(b"id: 1\ndata: a\nid\n\n", Event("a"))

    def test_holds_without_data(self) -> None:
        reads(b"id: 1\n\n", last_event_id="1")
        reads(b"id: 1\n\ndata: a\n\n", Event("a", id="1"), last_event_id="1")

    def test_kept_as_it_is(self) -> None:
        reads("id:  \u00e9: 1 \ndata: a\n\n".encode(), Event("a", id=" \u00e9: 1 "), last_event_id=" \u00e9: 1 ")

    @pytest.mark.parametrize("rest", [b"id: 2", b"id: 2\n", b"id: 2\ndata: b\n", b"id\n", b"id: 2\r"])
    def test_one_in_an_unfinished_block_does_not_count(self, rest: bytes) -> None:
        reads_unfinished(b"id: 1\ndata: a\n\n" + rest, Event("a", id="1"), last_event_id="1")

    def test_stays_over_connections(self) -> None:
        """The standard's buffer starts empty with each connection while the event source keeps its string. Kept, as
        Chromium's parser does: else the first event without an id would make the next reconnection start over."""
        decoder = Decoder()
        assert read([b"id: 1\ndata: a\n\nid: 2\nevent: e\ndata: b\n"], decoder) == ([Event("a", id="1")], "1", None)
        decoder.reset()
        assert read([b"data: c\n\n"], decoder) == ([Event("c", id="1")], "1", None)


class TestRetry:
    @pytest.mark.parametrize(
        ("value", "retry_ms"),
        [
            *((b"0", 0), (b"5", 5), (b"3000", 3000), (b"007", 7), (b"000", 0), (b"0" * 5000 + b"12", 12)),
            *((b"9007199254740991", 2**53 - 1), (b"0" * 16 + b"1234567890", 1234567890)),
        ],
    )
    def test_digits_are_taken_in_base_ten(self, value: bytes, retry_ms: int) -> None:
        for line in (b"retry: " + value, b"retry:" + value):
            decoder = Decoder()
            assert read([line + b"\ndata: x\n\n"], decoder) == ([Event("x", retry=retry_ms)], "", retry_ms)
        if len(value) < 100:
            reads(b"retry: " + value + b"\ndata: x\n\n", Event("x", retry=retry_ms), retry_ms=retry_ms)

    @pytest.mark.parametrize(
        "value",
        [
            *(b"", b" ", b"-5", b"+5", b"5 ", b" 5", b"5\t", b"5\0"),
            *(b"5.0", b"1e3", b"1_000", b"1,000", b"0x10", b"5ms"),
            *(b"five", b"\xff5", "\u0665".encode(), "\uff15".encode(), "\u00b2".encode(), "5\ufeff".encode()),
        ],
    )
    def test_anything_but_ascii_digits_is_ignored(self, value: bytes) -> None:
        """ "If the field value consists of only ASCII digits [...]. Otherwise, ignore the field." """
        reads(b"retry: " + value + b"\ndata: x\n\n", Event("x"))
        reads(b"retry: 7\nretry: " + value + b"\n\n", retry_ms=7)

    def test_field_without_a_value_is_ignored(self) -> None:
        reads(b"retry\nretry:\ndata: x\n\n", Event("x"))

    @pytest.mark.parametrize("digits", [17, 20, 4301, 5001, 100_000])
    def test_very_long_number_is_a_very_long_time(self, digits: int) -> None:
        """Python refuses to read more than 4300 digits; the stream must not fail by it."""
        decoder = Decoder()
        [event] = decoder.feed(b"retry: 1" + b"0" * (digits - 1) + b"\ndata: x\n\n")
        assert event.data == "x"
        assert decoder.retry_ms is not None
        assert decoder.retry_ms == event.retry
        assert decoder.retry_ms >= 10**15

    def test_holds_from_the_end_of_its_line(self) -> None:
        decoder = Decoder()
        assert read([b"retry: 50"], decoder) == ([], "", None)
        assert read([b"0\r"], decoder) == ([], "", 500)
        assert read([b"\nretry: 7\n"], decoder) == ([], "", 7)
        reads_unfinished(b"retry: 500\ndata: x\n", retry_ms=500)
        reads_unfinished(b"retry: 500\nretry: 7", retry_ms=500)

    def test_last_one_counts(self) -> None:
        reads(b"retry: 1\ndata: a\nretry: 2\n\n", Event("a", retry=2), retry_ms=2)

    def test_event_has_that_of_its_own_block(self) -> None:
        reads(
            b"retry: 1\n\ndata: a\n\nretry: 2\ndata: b\n\ndata: c\n\n",
            Event("a"),
            Event("b", retry=2),
            Event("c"),
            retry_ms=2,
        )

    def test_stays_over_connections(self) -> None:
        decoder = Decoder()
        decoder.feed(b"retry: 500\n")
        decoder.reset()
        assert read([b"data: x\n\n"], decoder) == ([Event("x")], "", 500)


class TestText:
    @pytest.mark.parametrize(
        "text", ["\u00e9", "\u20ac", "\U0001f600", "a\u0301", "\U0010ffff", "\ufffd", "\ufffe", "\0"]
    )
    def test_characters_may_be_cut_anywhere(self, text: str) -> None:
        line = text.encode() * 2
        reads(b"data: " + line + b"\ndata:" + line + b"\n\n", Event(f"{text * 2}\n{text * 2}"))
        reads(b"event: " + line + b"\ndata: x\n\n", Event("x", text * 2))

    @pytest.mark.parametrize(
        ("raw", "text"),
        [
            (b"\xff", "\ufffd"),
            (b"a\x80b", "a\ufffdb"),
            (b"\xc3", "\ufffd"),
            (b"\xc3x", "\ufffdx"),
            (b"\xc0\xaf", "\ufffd\ufffd"),
            (b"\xe2\x82x", "\ufffdx"),
            (b"\xe2\x28\xa1", "\ufffd(\ufffd"),
            (b"\xed\xa0\x80", "\ufffd\ufffd\ufffd"),
            (b"\xf0\x9f\x98", "\ufffd"),
            (b"\xf0\x9f\x98\xf0\x9f\x98\x80", "\ufffd\U0001f600"),
            (b"\xf4\x90\x80\x80", "\ufffd\ufffd\ufffd\ufffd"),
            (b"\xf5\x80", "\ufffd\ufffd"),
        ],
    )
    def test_invalid_utf_8_becomes_replacement_characters(self, raw: bytes, text: str) -> None:
        """As many as the Encoding Standard's decoder gives: one for each maximal part of a character."""
        reads(b"data: " + raw + b"\n\n", Event(text))
        reads(b"data: " + raw + b"\rdata: x\r\r", Event(f"{text}\nx"))
        reads(b"event: " + raw + b"\nid: " + raw + b"\ndata: x\n\n", Event("x", text, text), last_event_id=text)

    def test_half_a_character_at_a_line_end_does_not_meet_the_next_line(self) -> None:
        reads(b"data: \xc3\ndata: \xa9\n\n", Event("\ufffd\n\ufffd"))
        reads(b"data: \xc3\n\xa9data: x\n\n", Event("\ufffd"))


class TestConnections:
    @pytest.mark.parametrize(
        "rest", [b"d", b"data: b", b"data: b\n", b"event: e\n", b"data: b\r", b"retry: 5\nid: 2\n", BOM]
    )
    def test_reset_forgets_what_is_unfinished(self, rest: bytes) -> None:
        decoder = Decoder()
        assert read([b"data: a\n\n", rest], decoder)[0] == [Event("a")]
        decoder.reset()
        assert read([b"data: c\n\n"], decoder)[0] == [Event("c")]

    def test_reset_at_the_start_changes_nothing(self) -> None:
        decoder = Decoder()
        decoder.reset()
        assert read([BOM + b"id: 1\ndata: a\n\n"], decoder) == ([Event("a", id="1")], "1", None)

    def test_decoders_share_nothing(self) -> None:
        one, other = Decoder(), Decoder()
        one.feed(b"id: 1\nretry: 5\ndata: a\n\nevent: e\ndata: b\n")
        assert read([b"data: c\n\n"], other) == ([Event("c")], "", None)

    def test_heartbeats_between_lines_change_nothing(self) -> None:
        lines = encode(Event("a\nb", "e", "1", 5)).splitlines(keepends=True)
        reads(
            HEARTBEAT + HEARTBEAT.join(lines) + HEARTBEAT * 2, Event("a\nb", "e", "1", 5), last_event_id="1", retry_ms=5
        )
        assert read([b"id: 1\n" + HEARTBEAT]) == ([], "", None)


def too_large(chunks: Iterable[bytes], limit: int) -> bool:
    try:
        read(chunks, Decoder(max_event_bytes=limit))
    except TooLarge:
        return True
    return False


class TestLimit:
    LIMIT = 200

    def test_line_as_long_as_the_limit_passes(self) -> None:
        stream = b"data: " + b"x" * (self.LIMIT - 6) + b"\n\n"
        wanted = [Event("x" * (self.LIMIT - 6))]
        for chunks in cuts(stream):
            assert read(chunks, Decoder(max_event_bytes=self.LIMIT))[0] == wanted

    def test_longer_data_in_one_line_is_refused(self) -> None:
        for chunks in cuts(b"data: " + b"x" * (self.LIMIT + 1) + b"\n\n"):
            assert too_large(chunks, self.LIMIT)

    def test_longer_data_in_many_lines_is_refused(self) -> None:
        for chunks in cuts(b"data: 123456789\n" * (self.LIMIT // 10 + 1) + b"\n"):
            assert too_large(chunks, self.LIMIT)

    def test_lines_that_hold_nothing_count_too(self) -> None:
        for chunks in cuts(b"data\n" * (self.LIMIT + 1) + b"\n"):
            assert too_large(chunks, self.LIMIT)

    def test_many_lines_within_the_limit_pass(self) -> None:
        lines = self.LIMIT // 14
        for chunks in cuts(b"data: 3456789\n" * lines + b"\n"):
            events, _, _ = read(chunks, Decoder(max_event_bytes=self.LIMIT))
            assert events == [Event("\n".join(["3456789"] * lines))]

    @pytest.mark.parametrize("line", [b"x", b"data: x", b": x", b"event: x", b"id: x", b"\0"])
    def test_line_without_an_end_is_refused_as_soon_as_it_is_over(self, line: bytes) -> None:
        decoder = Decoder(max_event_bytes=self.LIMIT)
        read(bytewise(line.ljust(self.LIMIT, b"x")), decoder)
        with pytest.raises(TooLarge, match="200"):
            decoder.feed(b"x")

    def test_each_event_has_the_limit_for_itself(self) -> None:
        stream = (b"data: " + b"x" * (self.LIMIT // 2) + b"\n\n") * 10
        for chunks in ([stream], bytewise(stream), cut(stream, [64])):
            assert len(read(chunks, Decoder(max_event_bytes=self.LIMIT))[0]) == 10

    def test_what_is_not_kept_does_not_count(self) -> None:
        stream = b": a comment\nevent: e\nid: 1\nretry: 5\nfoo: bar\n" * self.LIMIT
        for chunks in ([stream], bytewise(stream)):
            assert read(chunks, Decoder(max_event_bytes=self.LIMIT)) == ([], "", 5)

    def test_none_turns_it_off(self) -> None:
        stream = b"data: " + b"x" * (DEFAULT_MAX_EVENT_BYTES + 1) + b"\n\n"
        [event] = Decoder(max_event_bytes=None).feed(stream)
        assert len(event.data) == DEFAULT_MAX_EVENT_BYTES + 1
        assert too_large([stream], DEFAULT_MAX_EVENT_BYTES)
        with pytest.raises(TooLarge):
            Decoder().feed(stream)

    def test_decoder_works_on_after_a_reset(self) -> None:
        for stream in (b"id: 2\ndata: " + b"x" * 300, b"id: 2\n" + b"data: 123456789\n" * 30 + b"\ndata: y\n\n"):
            decoder = Decoder(max_event_bytes=self.LIMIT)
            decoder.feed(b"id: 1\ndata: a\n\n")
            with pytest.raises(TooLarge):
                decoder.feed(stream)
            decoder.reset()
            assert decoder.feed(b"data: " + b"x" * (self.LIMIT - 6)) == []  # all of the limit is there again
            decoder.reset()
            assert read([b"data: b\n\n"], decoder) == ([Event("b", id="1")], "1", None)

    @pytest.mark.parametrize(
        "stream",
        [
            b"data: 123456789\n\n",
            b"data: 123456789\ndata: 123456789\n\n",
            b"data: x\n: a comment that is rather long\n\n",
            b"event: an event type that is rather long\ndata: x\n\n",
            b"data: x\r\ndata: y\r\n\r\n",
        ],
    )
    def test_does_not_depend_on_the_cut(self, stream: bytes) -> None:
        for limit in range(len(stream) + 2):
            assert len({too_large(chunks, limit) for chunks in cuts(stream)}) == 1, limit

    def test_events_before_one_that_is_too_large_are_given(self) -> None:
        """Else they are lost for good: `last_event_id` is beyond them, and a reconnection doesn't bring them back."""
        decoder = Decoder(max_event_bytes=self.LIMIT)
        stream = b"id: 1\ndata: a\n\ndata: " + b"x" * 300
        assert decoder.feed(stream) == [Event("a", id="1")]
        assert decoder.last_event_id == "1"
        with pytest.raises(TooLarge):
            decoder.feed(b"x")

    def test_nothing_comes_after_one_that_is_too_large(self) -> None:
        decoder = Decoder(max_event_bytes=self.LIMIT)
        with pytest.raises(TooLarge):
            decoder.feed(b"data: 123456789\n" * 30)
        with pytest.raises(TooLarge):
            decoder.feed(b"\n")


class TestLargeStreams:
    """Quadratic work in the number of chunks would make these take minutes."""

    def test_line_of_a_mebibyte_in_pieces(self) -> None:
        text = "0123456789abcdef" * 65536
        for end in (b"\n", b"\r", b"\r\n"):
            [event], _, _ = read(cut(b"data: " + text.encode() + end + end, [64]))
            same = event.data == text  # outside the assert: pytest would compare a mebibyte line by line
            assert same

    def test_many_lines_in_pieces(self) -> None:
        [event], _, _ = read(cut(b"data: 0123456789\r\n" * 50_000 + b"\r\n", [64]))
        same = event.data == "\n".join(["0123456789"] * 50_000)
        assert same

    def test_many_events_in_one_chunk(self) -> None:
        wanted = [Event(str(number), id=str(number)) for number in range(20_000)]
        assert read([b"".join(map(encode, wanted))]) == (wanted, "19999", None)


class Colour(enum.StrEnum):
    RED = "red"


class Text(str):
    __slots__ = ()


@dataclass
class Point:
    x: int
    y: float


class Task(msgspec.Struct, rename="camel"):
    task_id: int
    due_at: datetime | None = None


NOON = datetime(2026, 3, 1, 12, tzinfo=UTC)
NIL = UUID("12345678-1234-5678-1234-567812345678")


class TestEncode:
    @pytest.mark.parametrize(
        ("data", "frame"),
        [
            # Text goes out as it is.
            ("x", b"data: x\n\n"),
            ("", b"data: \n\n"),
            (" x ", b"data:  x \n\n"),
            (": x", b"data: : x\n\n"),
            ('{"a": 1}', b'data: {"a": 1}\n\n'),
            ("\u00e9\U0001f600", b"data: \xc3\xa9\xf0\x9f\x98\x80\n\n"),
            ("\0", b"data: \0\n\n"),
            ("\ufeff", b"data: \xef\xbb\xbf\n\n"),
            (Colour.RED, b"data: red\n\n"),
            (Text("x\ny"), b"data: x\ndata: y\n\n"),
            # One line for each of its lines, by the standard's line ends only.
            ("a\nb", b"data: a\ndata: b\n\n"),
            ("a\rb", b"data: a\ndata: b\n\n"),
            ("a\r\nb", b"data: a\ndata: b\n\n"),
            ("a\n\rb", b"data: a\ndata: \ndata: b\n\n"),
            ("a\n\nb", b"data: a\ndata: \ndata: b\n\n"),
            ("a\n", b"data: a\ndata: \n\n"),
            ("\n", b"data: \ndata: \n\n"),
            ("\r", b"data: \ndata: \n\n"),
            ("a\u2028b\u2029c\x85d\ve\ff", b"data: a\xe2\x80\xa8b\xe2\x80\xa9c\xc2\x85d\x0be\x0cf\n\n"),
            # Bytes are serialised already.
            (b"x", b"data: x\n\n"),
            (b"", b"data: \n\n"),
            (b"a\r\nb\nc\rd", b"data: a\ndata: b\ndata: c\ndata: d\n\n"),
            (b"\xc3\xa9", b"data: \xc3\xa9\n\n"),
            (bytearray(b'{"a":1}'), b'data: {"a":1}\n\n'),
            (memoryview(b"a\nb"), b"data: a\ndata: b\n\n"),
            (memoryview(b"a-b-c-")[::2], b"data: abc\n\n"),
            # Anything else is JSON.
            (None, b"data: null\n\n"),
            (True, b"data: true\n\n"),
            (0, b"data: 0\n\n"),
            (1.5, b"data: 1.5\n\n"),
            (2**64 - 1, b"data: 18446744073709551615\n\n"),
            (-(2**63), b"data: -9223372036854775808\n\n"),
            ([], b"data: []\n\n"),
            ((1, "a"), b'data: [1,"a"]\n\n'),
            ({"a": 1, "b": None}, b'data: {"a":1,"b":null}\n\n'),
            ({"a\r\nb": "\u2028\0\n"}, b'data: {"a\\r\\nb":"\xe2\x80\xa8\\u0000\\n"}\n\n'),
            (Point(1, 2.0), b'data: {"x":1,"y":2.0}\n\n'),
            (NOON, b'data: "2026-03-01T12:00:00Z"\n\n'),
            (NOON.astimezone(timezone(timedelta(hours=2))), b'data: "2026-03-01T14:00:00+02:00"\n\n'),
            (NIL, b'data: "12345678-1234-5678-1234-567812345678"\n\n'),
            (Task(7), b'data: {"taskId":7,"dueAt":null}\n\n'),
            (Task(7, NOON), b'data: {"taskId":7,"dueAt":"2026-03-01T12:00:00Z"}\n\n'),
            ({7}, b"data: [7]\n\n"),
            (frozenset([NIL]), b'data: ["12345678-1234-5678-1234-567812345678"]\n\n'),
            (
                {"tasks": [Task(7)], "at": Point(0, 0.5), "seen": {NIL}, "when": NOON, "colour": Colour.RED},
                b'data: {"tasks":[{"taskId":7,"dueAt":null}],"at":{"x":0,"y":0.5},'
                b'"seen":["12345678-1234-5678-1234-567812345678"],"when":"2026-03-01T12:00:00Z","colour":"red"}\n\n',
            ),
        ],
    )
    def test_data(self, data: Any, frame: bytes) -> None:
        assert encode(Event(data)) == frame

    @pytest.mark.parametrize(
        ("event", "frame"),
        [
            (Event("x", "add"), b"event: add\ndata: x\n\n"),
            (Event("x", Colour.RED), b"event: red\ndata: x\n\n"),
            (Event("x", " a: b "), b"event:  a: b \ndata: x\n\n"),
            (Event("x", "\u00e9\u2028"), b"event: \xc3\xa9\xe2\x80\xa8\ndata: x\n\n"),
            (Event("x", id="7"), b"data: x\nid: 7\n\n"),
            (Event("x", id=" \u00e9"), b"data: x\nid:  \xc3\xa9\n\n"),
            (Event("x", id=Colour.RED), b"data: x\nid: red\n\n"),
            (Event("x", retry=0), b"retry: 0\ndata: x\n\n"),
            (Event("x", retry=2**53 - 1), b"retry: 9007199254740991\ndata: x\n\n"),
            (Event("a\nb", "e", "1", 5), b"retry: 5\nevent: e\ndata: a\ndata: b\nid: 1\n\n"),
            (Event({"a": 1}, "e", "1"), b'event: e\ndata: {"a":1}\nid: 1\n\n'),
            (Event("x", "data", "id"), b"event: data\ndata: x\nid: id\n\n"),
            (Event("%b %d", "%b", "%b", 1), b"retry: 1\nevent: %b\ndata: %b %d\nid: %b\n\n"),
        ],
    )
    def test_fields(self, event: Event, frame: bytes) -> None:
        assert encode(event) == frame

    def test_pretty_printed_json_becomes_many_lines_and_one_event(self) -> None:
        pretty = orjson.dumps({"a": [1, 2], "b": {}}, option=orjson.OPT_INDENT_2)
        frame = encode(Event(pretty, "e"))
        assert frame.count(b"data: ") == pretty.count(b"\n") + 1 == 7
        reads(frame, Event(pretty.decode(), "e"))

    def test_json_alone(self) -> None:
        assert encode_json(Task(7, NOON)) == b'{"taskId":7,"dueAt":"2026-03-01T12:00:00Z"}'
        assert encode_json("a\nb") == b'"a\\nb"'

    def test_same_event_gives_the_same_bytes_again(self) -> None:
        event = Event("x", "again")
        assert {encode(event) for _ in range(3)} == {b"event: again\ndata: x\n\n"}


class Inner(BaseModel):
    size: int


class Model(BaseModel):
    when: date
    inner: Inner = Field(alias="in")


class Cyclic:
    def model_dump(self, **options: Any) -> Any:
        return self


class Hue(enum.Enum):
    RED = "red"


class Key(str):
    pass


class Number(int):
    pass


def circle() -> list[Any]:
    ring: list[Any] = []
    ring.append(ring)
    return ring


def refused(event: Event, field: str) -> EncodeError:
    with pytest.raises(ValueError) as caught:
        encode(event)
    assert isinstance(caught.value, EncodeError)
    assert caught.value.field == field
    assert caught.value.detail.startswith(field)
    return caught.value


class TestRefused:
    """What can't go over the wire is a `ValueError` that names its field, in `field` and at the start of its text."""

    @pytest.mark.parametrize("field", ["event", "id"])
    @pytest.mark.parametrize(
        "value",
        [
            *("a\nb", "a\rb", "a\r\nb", "a\0b", "\n", "\r", "\0", "a\n", "\na"),
            *("x\ndata: forged", "x\n\ndata: forged\n\n"),
            *("", "\ud800", "a\udfff", "\ud83d\ude00", 5, 0, 1.5, True, False, b"a", NIL, ("a",)),
        ],
    )
    def test_names_and_ids(self, field: str, value: Any) -> None:
        for _ in range(2):  # an error isn't cached, nor is the value let through when it comes again
            refused(Event("x", **{field: value}), field)

    @pytest.mark.parametrize("value", [["a"], {"a": 1}, {"a"}, bytearray(b"a")])
    def test_ids_without_a_hash(self, value: Any) -> None:
        refused(Event("x", id=value), "id")

    @pytest.mark.parametrize("value", [["a"], {"a": 1}, {"a"}, bytearray(b"a")])
    def test_names_without_a_hash(self, value: Any) -> None:
        refused(Event("x", event=value), "event")

    @pytest.mark.parametrize(
        "value",
        [True, False, -1, -(2**70), 1.5, 5.0, "5", b"5", "", float("nan"), float("inf"), 2**53, 10**30, [5], NOON],
    )
    def test_retries(self, value: Any) -> None:
        refused(Event("x", retry=value), "retry")

    @pytest.mark.parametrize("value", [10**5000, -(10**5000)], ids=["positive", "negative"])
    def test_retries_too_long_to_print(self, value: Any) -> None:
        refused(Event("x", retry=value), "retry")

    @pytest.mark.parametrize(
        "data",
        [
            *("\ud800", "a\udc00b", "\ud83d\ude00", Text("\ud800")),
            *(b"\xff", b"\xc3", b"a\xe2\x82", b"\xed\xa0\x80", b"\xc0\xaf", b"\xf4\x90\x80\x80"),
            *(bytearray(b"\xff"), memoryview(b"\xff"), memoryview(b"\xc3-\xa9")[:2]),
        ],
    )
    def test_text_that_is_not_unicode(self, data: Any) -> None:
        refused(Event(data), "data")

    @pytest.mark.parametrize("data", ["ab\ud800", b"ab\xff"])
    def test_text_that_is_not_unicode_names_the_position(self, data: Any) -> None:
        assert "position 2" in refused(Event(data), "data").detail

    @pytest.mark.parametrize(
        "data",
        [
            *(["\ud800"], {"\ud800": 1}, {"a": {"b": "\udfff"}}, Task("\ud800")),  # type: ignore[arg-type]
            *(object(), object, len, 1j, [object()], {object()}, Task(object()), Point(object(), 0.0)),  # type: ignore[arg-type]
            *({(1, 2): 3}, {object(): 1}, iter("a"), ValueError("x"), circle(), Model, [Model], {1: object()}),
            *([Path("\udc80")], {"\ud800": 1, 2: 3}, Cyclic()),
        ],
    )
    def test_data_without_a_json_form(self, data: Any) -> None:
        refused(Event(data), "data")
        with pytest.raises(EncodeError, match=r"^data "):
            encode_json(data)

    @pytest.mark.parametrize(
        ("data", "json"),
        [
            (
                Model(when=date(2026, 1, 2), **{"in": Inner(size=2**70)}),
                b'{"when":"2026-01-02","in":{"size":%d}}' % 2**70,
            ),
            ({"models": [Inner(size=1)]}, b'{"models":[{"size":1}]}'),
            (Task(Inner(size=1)), b'{"taskId":{"size":1},"dueAt":null}'),  # type: ignore[arg-type]
            ([2**64, -(2**63) - 1, 10**30], b"[%d,%d,%d]" % (2**64, -(2**63) - 1, 10**30)),
            ({1: {None: {True: 2}}}, b'{"1":{"null":{"true":2}}}'),
            ({Hue.RED: 1, UUID(int=7): 2}, b'{"red":1,"00000000-0000-0000-0000-000000000007":2}'),
            ([deque([1]), Path("a/b"), range(2), UserDict(a=1)], b'[[1],"a/b",[0,1],{"a":1}]'),
            ([numpy.int64(1), numpy.float32(0.5), numpy.bool_(True), numpy.str_("x")], b'[1,0.5,true,"x"]'),
            (numpy.arange(6).reshape(2, 3)[:, ::2], b"[[0,2],[3,5]]"),
            (numpy.array([numpy.nan, 1.0]), b"[null,1.0]"),
            ({Key("k"): Number(3)}, b'{"k":3}'),
        ],
    )
    def test_what_orjson_does_not_know_is_encoded_all_the_same(self, data: Any, json: bytes) -> None:
        assert encode_json(data) == json
        assert encode(Event(data)) == b"data: %b\n\n" % json

    def test_what_has_no_form_is_told_to_the_log_and_not_to_the_client(self) -> None:
        error = refused(Event({"a": object()}), "data")
        assert error.detail == "data can't be encoded as JSON"
        assert "builtins.object" in str(error.__cause__)

    def test_error_can_be_shown_to_a_client(self) -> None:
        error = refused(Event("x", "a\nb"), "event")
        assert (error.status, error.code, error.detail) == (500, "encode_error", "event must not contain CR, LF or NUL")


#: Text of all of Unicode, and much of what means something to a parser.
texts = st.lists(
    st.text(max_size=4)
    | st.sampled_from(
        ["\r", "\n", "\r\n", "\0", ":", " ", "\ufeff", "\u2028", "\x85", "data: x", "id: 7", "\n\n", "retry: 1"]
    ),
    max_size=6,
).map("".join)
words = texts.map(lambda text: "".join(char for char in text if char not in "\r\n\0")).filter(bool)
retries = st.integers(0, 2**53 - 1)
sizes = st.lists(st.integers(1, 9), min_size=1, max_size=6)

#: One of these, in any order, is most of what can go wrong in a stream.
tokens = st.sampled_from(
    [
        *(b"data", b"event", b"id", b"retry", b"data", b"data:", b"event: e", b"id: 1", b"retry: 2", b"x"),
        *(b":", b": ", b" ", b"\r", b"\n", b"\r\n", b"\n", b"\n\n", b"\r\n\r\n", b"\0"),
        *(b"0", b"17", b"9999999999", BOM, BOM[:1], BOM[1:2], BOM[2:], b"\xc3", b"\xa9", b"\xc3\xa9"),
    ]
)
streams = st.lists(tokens, max_size=40).map(b"".join) | st.binary(max_size=60)


def with_lf(text: str) -> str:
    return text.replace("\r\n", "\n").replace("\r", "\n")


def lines_of(text: str) -> Iterator[str]:
    """The lines whose end has come."""
    line = ""
    at = 0
    while at < len(text):
        if text[at] in "\r\n":
            yield line
            line = ""
            at += 2 if text[at : at + 2] == "\r\n" else 1
        else:
            line += text[at]
            at += 1


def by_the_standard(stream: bytes) -> Outcome:
    """9.2.6, sentence by sentence, over the whole stream at once. The retry of an event's own block is our addition."""
    text = stream.decode("utf-8", "replace")
    text = text[1:] if text[:1] == "\ufeff" else text
    events: list[Event] = []
    data_buffer = event_type_buffer = last_event_id_buffer = last_event_id_string = ""
    reconnection_time: int | None = None
    retry_of_block: int | None = None
    for line in lines_of(text):
        if line == "":
            last_event_id_string = last_event_id_buffer
            if data_buffer != "":
                data = data_buffer[:-1] if data_buffer[-1] == "\n" else data_buffer
                events.append(Event(data, event_type_buffer or None, last_event_id_string or None, retry_of_block))
            data_buffer = event_type_buffer = ""
            retry_of_block = None
            continue
        if line[0] == ":":
            continue
        if ":" in line:
            field, value = line[: line.index(":")], line[line.index(":") + 1 :]
            if value[:1] == " ":
                value = value[1:]
        else:
            field, value = line, ""
        if field == "event":
            event_type_buffer = value
        elif field == "data":
            data_buffer += value
            data_buffer += "\n"
        elif field == "id":
            if "\0" not in value:
                last_event_id_buffer = value
        elif field == "retry" and value != "" and all(char in "0123456789" for char in value):
            reconnection_time = retry_of_block = int(value)
    return events, last_event_id_string, reconnection_time


def capped(outcome: Outcome) -> Outcome:
    """The standard's times have no bound. Beyond 10^15 ms, 30,000 years, ours need not be told apart."""

    def cap(retry: int | None) -> int | None:
        return retry if retry is None or retry < 10**15 else 10**15

    events, last_event_id, retry_ms = outcome
    return [msgspec.structs.replace(event, retry=cap(event.retry)) for event in events], last_event_id, cap(retry_ms)


#: As servers write them, and nearly so.
BLOCKS: Final = [
    b"data: 1\n\n",
    b"event: e\ndata: 2\n\n",
    b"id: i\ndata: \n\n",
    "id: é\nevent: ü\ndata: €\u2028\x85 \n\n".encode(),
    b"id: a\0b\ndata: nul\n\n",
    b"id: \ndata: no id\n\n",
    b"id: only\n\n",
    b"event: \ndata: no name\n\n",
    b"data: two\ndata: lines\n\n",
    b"data:tight\n\n",
    b"retry: 5\ndata: r\n\n",
    b"data: \xff\xc3\n\n",
    b":\n",
    b"\n",
    b"event: begun\n",
]


class TestProperties:
    @PROPERTY
    @given(
        st.lists(st.builds(Event, texts, st.none() | words, st.none() | words, st.none() | retries), max_size=5), sizes
    )
    def test_events_come_through_any_cutting(self, events: list[Event], pieces: list[int]) -> None:
        wanted: list[Event] = []
        last_id: str | None = None
        last_retry: int | None = None
        for event in events:
            last_id = last_id if event.id is None else event.id
            last_retry = last_retry if event.retry is None else event.retry
            wanted.append(Event(with_lf(event.data), event.event, last_id, event.retry))
        stream = b"".join(map(encode, events))
        assert read(cut(stream, pieces)) == read([stream]) == (wanted, last_id or "", last_retry)
        assert read([BOM + stream]) == (wanted, last_id or "", last_retry)
        assert read([stream.replace(b"\n", b"\r\n")]) == (wanted, last_id or "", last_retry)

    @PROPERTY
    @given(st.text(alphabet=st.characters()) | texts, st.sampled_from(["data", "event", "id"]), sizes)
    @example("x\n\ndata: forged\n\n", "event", [1])
    @example("x\rdata: forged\r\r", "id", [1])
    @example("x\n\nid: forged\n\n", "data", [1])
    @example("\ufeff", "event", [1])
    def test_no_string_forges_another_field(self, text: str, field: str, pieces: list[int]) -> None:
        plain = Event("d", "e", "i", 7)
        event: Event = msgspec.structs.replace(plain, **{field: text})
        try:
            frame = encode(event)
        except ValueError as error:
            assert isinstance(error, EncodeError)
            assert error.field == field
            return
        wanted = msgspec.structs.replace(event, data=with_lf(event.data))
        after = Event("d", "e", "i", 7)
        assert read(cut(frame + encode(plain), pieces)) == ([wanted, after], "i", 7)
        assert frame.endswith(b"\n\n")
        assert b"\n\n" not in frame[:-2]
        assert b"\r" not in frame

    @PROPERTY
    @given(streams, sizes)
    def test_bytes_as_data_are_one_event_or_refused(self, raw: bytes, pieces: list[int]) -> None:
        try:
            frame = encode(Event(raw))
        except ValueError as error:
            assert isinstance(error, EncodeError)
            assert error.field == "data"
            with pytest.raises(UnicodeDecodeError):
                raw.decode()
            return
        assert read(cut(frame, pieces)) == ([Event(with_lf(raw.decode()))], "", None)

    @PROPERTY
    @given(
        st.recursive(
            st.none()
            | st.booleans()
            | st.integers(-(2**63), 2**64 - 1)
            | st.floats(allow_nan=False, allow_infinity=False)
            | texts,
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(texts, inner, max_size=3),
            max_leaves=8,
        ).filter(lambda value: not isinstance(value, str))
    )
    def test_json_comes_through_on_one_line(self, value: Any) -> None:
        frame = encode(Event(value))
        assert frame.count(b"\n") == 2
        [event], _, _ = read([frame])
        assert json.loads(event.data) == value

    @settings(PROPERTY, max_examples=1500)
    @given(streams, sizes)
    @example(b"retry: 99999999999999999999\ndata\n\n", [1])
    @example(b"data\r\n\r\ndata\r\r\ndata\n\n", [2, 1])
    @example(BOM + BOM + b"data\n\n", [2])
    def test_any_bytes_are_read_as_the_standard_says(self, stream: bytes, pieces: list[int]) -> None:
        wanted = capped(by_the_standard(stream))
        assert capped(read([stream])) == wanted
        assert capped(read(cut(stream, pieces))) == wanted
        assert capped(read(bytewise(stream))) == wanted

    @PROPERTY
    @given(streams, streams, sizes)
    def test_what_came_before_a_reset_leaves_only_id_and_retry(
        self, before: bytes, stream: bytes, pieces: list[int]
    ) -> None:
        decoder = Decoder()
        _, last_event_id, retry_ms = read([before], decoder)
        decoder.reset()
        fresh = Decoder()
        read([encode(Event("x", id=last_event_id or None, retry=retry_ms))] if last_event_id else [], fresh)
        fresh.reset()
        fresh.retry_ms = retry_ms
        assert read(cut(stream, pieces), decoder) == read([stream], fresh)

    @PROPERTY
    @given(st.lists(st.sampled_from(BLOCKS) | streams, max_size=8), sizes)
    @example([b"data: 1\n\n", b"data: " + b"data: " * 200_000 + b"\n", b"data: 2\n\n"], [1 << 20])
    def test_blocks_of_every_kind_are_read_as_the_standard_says(self, blocks: list[bytes], pieces: list[int]) -> None:
        """Plain ones are cut out together; how many of them a chunk has must not matter, nor what stands between."""
        stream = b"".join(blocks)
        wanted = capped(by_the_standard(stream))
        assert capped(read([stream])) == capped(read(cut(stream, pieces))) == wanted
