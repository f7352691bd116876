"""The header compression of HTTP/2 (RFC 7541), as far as a client needs it that asked for no dynamic table.

Requests are written as plain literals. Answers are read with the static table and Huffman's code; since the table size
that this client announces is 0, a reference to anything dynamic is an error of the peer.
"""

from __future__ import annotations

from functools import lru_cache

from tickserve.client._socket import MalformedError

STATIC = (
    (":authority", ""),
    (":method", "GET"),
    (":method", "POST"),
    (":path", "/"),
    (":path", "/index.html"),
    (":scheme", "http"),
    (":scheme", "https"),
    *((":status", code) for code in ("200", "204", "206", "304", "400", "404", "500")),
    ("accept-charset", ""),
    ("accept-encoding", "gzip, deflate"),
    *(
        (name, "")
        for name in [
            "accept-language",
            "accept-ranges",
            "accept",
            "access-control-allow-origin",
            "age",
            "allow",
            "authorization",
            "cache-control",
            "content-disposition",
            "content-encoding",
            "content-language",
            "content-length",
            "content-location",
            "content-range",
            "content-type",
            "cookie",
            "date",
            "etag",
            "expect",
            "expires",
            "from",
            "host",
            "if-match",
            "if-modified-since",
            "if-none-match",
            "if-range",
            "if-unmodified-since",
            "last-modified",
            "link",
            "location",
            "max-forwards",
            "proxy-authenticate",
            "proxy-authorization",
            "range",
            "referer",
            "refresh",
            "retry-after",
            "server",
            "set-cookie",
            "strict-transport-security",
            "transfer-encoding",
            "user-agent",
            "vary",
            "via",
            "www-authenticate",
        ]
    ),
)
# How many bits each byte's code has, and last the end mark's: A for 5, B for 6, ... The codes follow, by length
# and then by byte, since Huffman's code is canonical here.
_BITS = (
    "ISXXXXXXXTZXXZXXXXXXXXZXXXXXXXXXBFFHIBDGFFDGDBBBAAABBBBBBBCDKBHF"
    "IBCCCCCCCCCCCCCCCCCCCCCCDCDIOIJBKABABABBBACCBBBABCBAABCCCCCKGJIX"
    "PRPPRRRSRSSSSSTSTTRSTSSSSQRSRSSTRQPRRSSQSRRTQRSSQQRQSRSSPRRRSRRS"
    "VVPORSRUVVVWWVTUOQVWWVWTQQVVXWWWPTPQRQQSRRUUTTVSVWVVWWWWWXWWWWWV"
    "Z"
)
END_MARK = 256


@lru_cache(maxsize=1)
def _codes() -> dict[tuple[int, int], int]:
    """The byte (or END_MARK) of each (length, code)."""
    codes, code, length = {}, 0, 0
    for bits, symbol in sorted((ord(letter) - ord("A") + 5, symbol) for symbol, letter in enumerate(_BITS)):
        code <<= bits - length
        length = bits
        codes[(bits, code)] = symbol
        code += 1
    return codes


def huffman(data: bytes) -> bytes:
    """The text that `data` stands for. Raises MalformedError."""
    codes, out, code, length = _codes(), bytearray(), 0, 0
    for byte in data:
        for shift in range(7, -1, -1):
            code, length = code << 1 | byte >> shift & 1, length + 1
            symbol = codes.get((length, code))
            if symbol is not None:
                if symbol == END_MARK:
                    raise MalformedError("a header holds Huffman's end mark")
                out.append(symbol)
                code = length = 0
            elif length > 30:
                raise MalformedError("a header is not Huffman's code")
    if length > 7 or code != (1 << length) - 1:
        raise MalformedError("a header's padding is not of ones")
    return bytes(out)


def _integer(data: bytes, at: int, bits: int) -> tuple[int, int]:
    """The integer whose prefix of `bits` bits is in `data[at]`, and where it ends."""
    most = (1 << bits) - 1
    value, at = data[at] & most, at + 1
    if value < most:
        return value, at
    for shift in range(0, 28, 7):
        byte, at = data[at], at + 1
        value += (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
    raise MalformedError("a header's length is no number")


def _text(data: bytes, at: int) -> tuple[str, int]:
    coded = data[at] & 0x80
    size, at = _integer(data, at, 7)
    if at + size > len(data):
        raise MalformedError("a header ends inside its text")
    text = data[at : at + size]
    return (huffman(text) if coded else text).decode("latin-1"), at + size


def _entry(index: int) -> tuple[str, str]:
    if not 1 <= index <= len(STATIC):
        raise MalformedError(f"header {index} of the table: expected 1 to {len(STATIC)}")
    return STATIC[index - 1]


@lru_cache(maxsize=64)  # a server answers every good call with the same blocks, byte for byte
def decode_block(block: bytes) -> dict[str, str]:
    """The headers of a block by name; of a name given twice the last. Raises MalformedError."""
    headers: dict[str, str] = {}
    at = 0
    try:
        while at < len(block):
            first = block[at]
            if first & 0x80:
                index, at = _integer(block, at, 7)
                name, value = _entry(index)
            elif first & 0xE0 == 0x20:
                size, at = _integer(block, at, 5)
                if size:
                    raise MalformedError(f"a header table of {size} bytes: expected none")
                continue
            else:
                index, at = _integer(block, at, 6 if first & 0x40 else 4)
                name, at = (_entry(index)[0], at) if index else _text(block, at)
                value, at = _text(block, at)
            headers[name] = value
    except IndexError as error:
        raise MalformedError("a header block ends too early") from error
    return headers


def literal(name: str, value: str) -> bytes:
    """A header as a literal that no table keeps. Raises UnicodeError for what is not ASCII."""
    parts = [b"\x00"]
    for text in (name.encode("ascii"), value.encode("ascii")):
        parts += (_length(len(text)), text)
    return b"".join(parts)


def _length(size: int) -> bytes:
    if size < 0x7F:
        return bytes((size,))
    out, size = bytearray((0x7F,)), size - 0x7F
    while size >= 0x80:
        out.append(size & 0x7F | 0x80)
        size >>= 7
    out.append(size)
    return bytes(out)
