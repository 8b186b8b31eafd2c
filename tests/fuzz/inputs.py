"""What strangers may send, by hypothesis: bytes and texts that are almost right."""

from __future__ import annotations

import json
import struct
import tarfile

from hypothesis import strategies as st

from datapipe.schema import to_json
from tests.conftest import jpeg, kept_sample

GOOD_JSON = json.loads(to_json(kept_sample(1)))
KEYS = [*GOOD_JSON, "image", "url", "caption", "file_name", "a.b", ""]

scalars = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([-1, 0, 2**31, 2**63, 2**64, 10**400])
    | st.floats()
    | st.text(max_size=8)
)
values = st.recursive(
    scalars, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=5), inner, max_size=4)
)


@st.composite
def sample_json(draw: st.DrawFn) -> bytes:
    """A sample of which some fields are something else, or bytes of it are."""
    tree = json.loads(json.dumps(GOOD_JSON))
    for _ in range(draw(st.integers(0, 3))):
        place = draw(st.sampled_from([tree, tree["entities"][0], tree["entities"][0].get("mask") or tree, tree]))
        if isinstance(place, dict) and place:
            place[draw(st.sampled_from(sorted(place)))] = draw(values)
        if not (isinstance(tree["entities"], list) and tree["entities"] and isinstance(tree["entities"][0], dict)):
            break
    return draw(mutated(json.dumps(tree).encode()))


@st.composite
def mutated(draw: st.DrawFn, data: bytes) -> bytes:
    """The bytes, cut, doubled, or with some of them changed."""
    changed = bytearray(data)
    for _ in range(draw(st.integers(0, 4))):
        if not changed:
            break
        at = draw(st.integers(0, len(changed) - 1))
        match draw(st.sampled_from(["byte", "cut", "insert", "double"])):
            case "byte":
                changed[at] = draw(st.integers(0, 255))
            case "cut":
                del changed[at : at + draw(st.integers(1, 64))]
            case "insert":
                changed[at:at] = draw(st.binary(max_size=16))
            case "double":
                changed[at:at] = changed[at : at + 32]
    return bytes(changed)


@st.composite
def rle(draw: st.DrawFn) -> tuple[tuple[int, int], str]:
    """Size and counts, in the alphabet of run lengths or not."""
    side = st.integers(-2, 60) | st.sampled_from([2**15, 2**31 - 1, 2**63])
    alphabet = st.text(st.characters(min_codepoint=40, max_codepoint=120), max_size=40)
    return (draw(side), draw(side)), draw(alphabet | st.text(max_size=10))


@st.composite
def tar(draw: st.DrawFn) -> bytes:
    """Headers of every kind, with sizes that are right, wrong or no numbers, in any order."""
    parts = []
    for _ in range(draw(st.integers(0, 6))):
        info = tarfile.TarInfo(draw(st.sampled_from(["a.jpg", "a.json", "b/c.d.png", "._x", "x" * 99, "é.txt"])))
        info.type = draw(st.sampled_from([b"0", b"\0", b"1", b"2", b"5", b"L", b"K", b"x", b"g", b"S", b"7", b"Z"]))
        content = draw(
            st.sampled_from([b"", b"{}", jpeg()[:700], b"17 path=a.b.jpg\n", b"19 size=-512345678\n", b"9 size=9\n"])
            | st.binary(max_size=40)
        )
        info.size = draw(st.just(len(content)) | st.integers(0, 2**33 - 1))
        info.linkname = draw(st.sampled_from(["", "a.jpg", "../../etc/passwd"]))
        header = bytearray(info.tobuf(tarfile.GNU_FORMAT))
        if draw(st.booleans()):
            header[124:136] = draw(st.binary(min_size=12, max_size=12))
            header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
        parts.append(bytes(header) + content + bytes(-len(content) % tarfile.BLOCKSIZE))
    return draw(mutated(b"".join(parts) + bytes(draw(st.sampled_from([0, 512, 1024])))))


@st.composite
def delimited(draw: st.DrawFn) -> bytes:
    cell = st.text(max_size=6) | st.sampled_from(['"', '""', "http://a.b/c.jpg", "a,b", "\\", "'", "\r", "\ufeff"])
    rows = draw(st.lists(st.lists(cell, min_size=1, max_size=4), max_size=8))
    mark = draw(st.sampled_from([",", "\t", ";", "|"]))
    text = draw(st.sampled_from(["", "url,caption\n", "url\tcaption\n"])) + "\n".join(mark.join(row) for row in rows)
    encoding = draw(st.sampled_from(["utf-8", "utf-16", "latin-1"]))
    return draw(mutated(text.encode(encoding, "replace")))


@st.composite
def json_table(draw: st.DrawFn) -> bytes:
    record = st.dictionaries(st.sampled_from(KEYS), values, max_size=4)
    records = draw(st.lists(record, max_size=4))
    shape = draw(st.sampled_from(["lines", "list", "wrapped"]))
    if shape == "lines":
        return draw(mutated("\n".join(json.dumps(r) for r in records).encode()))
    return draw(mutated(json.dumps(records if shape == "list" else {"images": records}).encode()))


@st.composite
def tfrecord(draw: st.DrawFn) -> bytes:
    """Records whose data is protobuf, more or less."""
    parts = []
    for data in draw(st.lists(st.binary(max_size=60), max_size=3)):
        size = draw(st.just(len(data)) | st.integers(0, 2**64 - 1))
        parts.append(struct.pack("<Q", size) + bytes(4) + data + bytes(4))
    return draw(mutated(b"".join(parts)))


hosts = st.sampled_from(
    ["a.b", "A.b.", "faß.de", "xn--fa-hia.de", "0x7f.1", "[::1]", "[::1", "a..b", "-", "1.2.3.4.", ""]
)
url_parts = st.text(max_size=8) | st.sampled_from(
    ["/", "//", "?", "#", "@", ":", "%", "%2e", "%zz", "..", "\\", ":80", ":x"]
)


@st.composite
def url(draw: st.DrawFn) -> str:
    scheme = draw(st.sampled_from(["http://", "https://", "HTTP://", "http:", "//", "ftp://", "javascript:", ""]))
    host = draw(hosts | st.text(max_size=12))
    return scheme + host + "".join(draw(st.lists(url_parts, max_size=5)))


header_values = (
    st.text(max_size=30)
    | st.integers().map(str)
    | st.sampled_from(
        ["chunked", "gzip", "identity", "noai", "bot: noindex", "unavailable_after: 1 Jan 9999", "0", "5"]
    )
    | st.builds(
        "{}, {} {} {} {}:{}:{} {}".format,
        st.sampled_from(["Mon", "Fri", "x"]),
        st.integers(-1, 40),
        st.sampled_from(["Jan", "Dec", "Foo", "1"]),
        st.integers(-1, 100_000),
        *3 * [st.integers(-1, 99)],
        st.sampled_from(["GMT", "+0000", "-0000", "-1200", "+9999", "-9999", "EST", "", "XYZ"]),
    )
)
header_names = st.sampled_from(
    ["Content-Length", "Transfer-Encoding", "Content-Encoding", "Location", "Retry-After", "X-Robots-Tag", "Connection"]
)


@st.composite
def answer(draw: st.DrawFn) -> bytes:
    """What a web server says: any status, headers that decide something, a body in chunks or not."""
    status = draw(st.sampled_from([100, 103, 200, 204, 206, 302, 304, 404, 429, 503]) | st.integers(-1, 1000))
    headers = draw(st.lists(st.tuples(header_names, header_values), max_size=4))
    lines = "".join(f"{name}: {value}\r\n" for name, value in headers)
    body = draw(st.binary(max_size=40) | st.sampled_from([b"5\r\nabcde\r\n0\r\n\r\n", b"-1\r\n", b"f" * 20 + b"\r\n"]))
    head = f"HTTP/1.1 {status} x\r\n{lines}\r\n".encode("utf-8", "surrogatepass")
    return draw(mutated(head + body) | st.just(head + body))


@st.composite
def robots_txt(draw: st.DrawFn) -> str:
    field = st.sampled_from(
        ["User-agent", "Disallow", "Allow", "Crawl-delay", "Sitemap", "Request-rate", "\ufeffUser-agent"]
    )
    value = st.text(max_size=12) | st.sampled_from(
        ["*", "/", "/*.jpg$", "/%2a", "9" * 400, "1/0", "1/1s 0-9999", "bot"]
    )
    return "\n".join(f"{draw(field)}: {draw(value)}" for _ in range(draw(st.integers(0, 6)))) + draw(
        st.text(max_size=20)
    )
