"""DER (X.690), read strictly: what X.509 certificates are made of.

    tag u8 | length: u8 below 128, or 80 + k and k bytes, shortest form | content

A `Reader` walks the elements of a content one after the other. Each wants a tag, and refuses what is not the one way to
encode its value. Tags of several bytes and indefinite lengths are not read.
"""

import datetime

from attest import EvidenceError

BOOLEAN, INTEGER, BITS, OCTETS, OID, UTF8, PRINTABLE, IA5 = 1, 2, 3, 4, 6, 12, 19, 22
UTC_TIME, GENERALIZED_TIME, SEQUENCE, SET = 23, 24, 0x30, 0x31
_STRINGS = {UTF8: "utf-8", PRINTABLE: "ascii", IA5: "ascii"}
_PRINTABLE = set(b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789 '()+,-./:=?")


class Reader:
    """The elements of `data`, in order. Every method raises EvidenceError for what is not DER, or not what it wants."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, count: int) -> bytes:
        if count > len(self.data) - self.at:
            raise EvidenceError(f"DER: wanted {count} bytes, got {len(self.data) - self.at}")
        self.at += count
        return self.data[self.at - count : self.at]

    def next_is(self, tag: int) -> bool:
        """Whether another element follows, and has this tag."""
        return self.data[self.at : self.at + 1] == bytes([tag])

    @property
    def more(self) -> bool:
        """Whether another element follows."""
        return self.at < len(self.data)

    def end(self) -> None:
        if self.more:
            raise EvidenceError(f"DER: got {len(self.data) - self.at} bytes more than wanted")

    def content(self, tag: int) -> bytes:
        """The content of the next element."""
        got = self.take(1)[0]
        if got != tag:
            raise EvidenceError(f"DER: got the tag {got:02x}, wanted {tag:02x}")
        length = self.take(1)[0]
        if length >= 0x80:
            size = length - 0x80
            length = int.from_bytes(self.take(size), "big") if size <= 4 else 0
            if length < 0x80 or length < 1 << 8 * (size - 1):
                raise EvidenceError("DER: got a length that is not in its shortest form")
        return self.take(length)

    def whole(self, tag: int) -> bytes:
        """The next element with its tag and length."""
        begin = self.at
        self.content(tag)
        return self.data[begin : self.at]

    def inside(self, tag: int) -> "Reader":
        """The elements within the next one."""
        return Reader(self.content(tag))

    def boolean(self) -> bool:
        content = self.content(BOOLEAN)
        if content not in (b"\x00", b"\xff"):
            raise EvidenceError(f"DER: got the boolean {content.hex()}, wanted 00 or ff")
        return content == b"\xff"

    def optional_true(self) -> bool:
        """A boolean whose default is false: there, it must be true."""
        if not self.next_is(BOOLEAN):
            return False
        if not self.boolean():
            raise EvidenceError("DER: got a default value that is spelled out")
        return True

    def integer(self) -> int:
        """An integer that is not negative."""
        content = self.content(INTEGER)
        if not content or content[0] >= 0x80 or (len(content) > 1 and content[0] == 0 and content[1] < 0x80):
            raise EvidenceError("DER: got an integer that is negative, or not in its shortest form")
        return int.from_bytes(content, "big")

    def oid(self) -> str:
        """An object identifier, as numbers with dots."""
        content = self.content(OID)
        if not 0 < len(content) < 64 or content[-1] >= 0x80:
            raise EvidenceError("DER: got an object identifier that is empty, cut, or longer than 63 bytes")
        numbers, number, begins = [], 0, True
        for byte in content:
            if begins and byte == 0x80:
                raise EvidenceError("DER: got a number of an object identifier that begins with zeros")
            number, begins = number << 7 | byte & 0x7F, byte < 0x80
            if begins:
                numbers.append(number)
                number = 0
        first = min(numbers[0] // 40, 2)
        return ".".join(map(str, [first, numbers[0] - 40 * first, *numbers[1:]]))

    def bits(self) -> bytes:
        """A bit string of whole bytes."""
        content = self.content(BITS)
        if content[:1] != b"\x00":
            raise EvidenceError("DER: got a bit string that is not of whole bytes")
        return content[1:]

    def named_bits(self) -> frozenset[int]:
        """The numbers of the bits that are set. DER cuts zeros at the end; AMD does not, so they may be there."""
        content = self.content(BITS)
        if len(content) < 2 or content[0] > 7 or content[-1] & (1 << content[0]) - 1:
            raise EvidenceError("DER: got a list of bits that is empty, or has some behind its end")
        return frozenset(i for i in range(8 * len(content) - 8) if content[1 + i // 8] & 0x80 >> i % 8)

    def text(self) -> str:
        """A string of any of the three kinds that names have."""
        tag = self.data[self.at] if self.more else 0
        if tag not in _STRINGS:
            raise EvidenceError(f"DER: got the tag {tag:02x}, wanted a string")
        content = self.content(tag)
        try:
            text = content.decode(_STRINGS[tag])
        except UnicodeDecodeError:
            raise EvidenceError(f"DER: got a string that is not {_STRINGS[tag]}") from None
        if tag == PRINTABLE and set(content) - _PRINTABLE:
            raise EvidenceError("DER: got a PrintableString with other characters than it may have")
        return text

    def time(self) -> datetime.datetime:
        """A time in UTC: with two digits of the year to 2049, with four from 2050 on (RFC 5280, section 4.1.2.5)."""
        late = self.next_is(GENERALIZED_TIME)
        digits = self.content(GENERALIZED_TIME if late else UTC_TIME)
        wanted = 15 if late else 13
        if len(digits) != wanted or not digits[:-1].isdigit() or digits[-1:] != b"Z":
            raise EvidenceError("DER: got a time in another form than YYMMDDHHMMSSZ")
        text = digits.decode("ascii")
        if not late:
            text = ("19" if text[0] >= "5" else "20") + text
        try:
            moment = datetime.datetime.strptime(text, "%Y%m%d%H%M%SZ").replace(tzinfo=datetime.UTC)
        except ValueError:
            raise EvidenceError("DER: got a time that is not on the calendar") from None
        if late and moment.year < 2050:
            raise EvidenceError("DER: got a year before 2050 in four digits")
        return moment


def only(data: bytes, tag: int = SEQUENCE) -> bytes:
    """The content of the one element that `data` is. Raises EvidenceError."""
    outer = Reader(data)
    content = outer.content(tag)
    outer.end()
    return content


def only_integer(data: bytes) -> int:
    """The integer, not negative, that `data` is. Raises EvidenceError."""
    outer = Reader(data)
    number = outer.integer()
    outer.end()
    return number
