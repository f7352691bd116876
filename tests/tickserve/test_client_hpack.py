"""HPACK as far as it is spoken: literals out; the static table, Huffman's code and typed errors in."""

from __future__ import annotations

from contextlib import suppress

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tickserve.client._hpack import decode_block, huffman, literal
from tickserve.client._socket import MalformedError


# Examples of RFC 7541, appendix C.
@pytest.mark.parametrize(
    ("coded", "text"),
    [
        ("f1e3c2e5f23a6ba0ab90f4ff", "www.example.com"),
        ("a8eb10649cbf", "no-cache"),
        ("25a849e95ba97d7f", "custom-key"),
        ("25a849e95bb8e8b4bf", "custom-value"),
        ("9d29ad171863c78f0b97c8e9ae82ae43d3", "https://www.example.com"),
        ("d07abe941054d444a8200595040b8166e082a62d1bff", "Mon, 21 Oct 2013 20:13:21 GMT"),
        (
            "94e7821dd7f2e6c7b335dfdfcd5b3960d5af27087f3672c1ab270fb5291f9587316065c003ed4ee5b1063d5007",
            "foo=ASDJKHQKBZXOQWEOPIUAXQWEOIU; max-age=3600; version=1",
        ),
    ],
)
def test_huffmans_code_is_the_standards(coded: str, text: str) -> None:
    assert huffman(bytes.fromhex(coded)).decode() == text


def test_every_byte_has_a_code_and_the_codes_are_complete() -> None:
    from tickserve.client._hpack import END_MARK, _codes

    codes = _codes()
    assert sorted(codes.values()) == [*range(256), END_MARK]
    assert sum(2.0**-length for length, _ in codes) == 1
    for byte in range(256):
        length, code = next(key for key, value in codes.items() if value == byte)
        padding = -length % 8
        data = (code << padding | (1 << padding) - 1).to_bytes((length + padding) // 8, "big")
        assert huffman(data) == bytes((byte,))


@pytest.mark.parametrize("coded", ["00", "f1e3c2e5f23a6ba0ab90f400", "ffffffff", "ff"])
def test_what_is_no_huffman_code(coded: str) -> None:
    with pytest.raises(MalformedError):
        huffman(bytes.fromhex(coded))


def test_a_block_of_the_standard() -> None:
    block = (
        "488264025885aec3771a4b6196d07abe941054d444a8200595040b8166e082a62d1bff6e919d29ad171863c78f0b97c8e9ae82ae43d3"
    )
    assert decode_block(bytes.fromhex(block)) == {
        ":status": "302",
        "cache-control": "private",
        "date": "Mon, 21 Oct 2013 20:13:21 GMT",
        "location": "https://www.example.com",
    }


@given(st.dictionaries(st.text("abcdefghij-", min_size=1, max_size=200), st.text("abc %09~", max_size=500), max_size=5))
@settings(max_examples=100, deadline=None)
def test_what_is_written_is_read(headers: dict[str, str]) -> None:
    assert decode_block(b"".join(literal(name, value) for name, value in headers.items())) == headers


@given(st.binary(max_size=100))
@settings(max_examples=500, deadline=None)
def test_any_block_is_headers_or_a_typed_error(block: bytes) -> None:
    with suppress(MalformedError):
        decode_block(block)
