import pytest

from refrag_core.corpus.document import RecordError, RejectReason
from refrag_core.corpus.html import decode_html, html_text


@pytest.mark.parametrize(
    ("page", "text"),
    [
        ("<p>one</p><p>two</p>", "one\n\ntwo"),
        ("<div>one</div><div>two</div>", "one\ntwo"),
        ("one<br>two<br/>three", "one\ntwo\nthree"),
        ("<p>a <b>bold</b>  word,\n broken</p>", "a bold word, broken"),
        ("<p>no<i>space</i></p>", "nospace"),
        ("<ul><li>one</li><li>two</li></ul>after", "one\ntwo\n\nafter"),
        ("<table><tr><th>a</th><th>b</th></tr><tr><td>1</td><td>2</td></tr></table>", "a\tb\n1\t2"),
        ("<pre>a\n  b</pre>x", "a\n  b\n\nx"),
        ("a<script>var x = '<p>';</script><style>p {}</style><nav>menu</nav>b", "ab"),
        ("a<!-- comment --><?php x ?>b", "ab"),
        ("&lt;tag&gt; &amp; &eacute;&nbsp;x", "<tag> & é\u00a0x"),
        ("<?xml version='1.0' encoding='latin-1'?><html><body>é</body></html>", "é"),
        ("a\0b", "a\ufffdb"),
        ("<nav>x <nav>y</nav> z</nav> after", "after"),
        ("plain text", "plain text"),
        ("", ""),
        ("<!-- only -->", ""),
        ("<p>unclosed <b>and <i>crossed</b></i> <p>next", "unclosed and crossed\n\nnext"),
    ],
)
def test_text_of_a_page(page: str, text: str) -> None:
    assert html_text(page)[0] == text


def test_the_title_is_apart_from_the_text() -> None:
    assert html_text("<head><title> The\n title </title></head><body>x</body>") == ("x", "The title")


def test_elements_nested_too_deep_are_a_reject_not_a_crash() -> None:
    with pytest.raises(RecordError) as caught:
        html_text("<div>" * 100_000 + "x")
    assert caught.value.reason == RejectReason.UNREADABLE_FILE


@pytest.mark.parametrize(
    ("data", "text"),
    [
        ("é".encode(), "é"),
        (b"\xef\xbb\xbfx", "x"),
        (b'<meta charset="iso-8859-1">\xe9', '<meta charset="iso-8859-1">é'),
        (
            b"<META http-equiv='x' content='text/html; charset=cp1252'>\x80",
            "<META http-equiv='x' content='text/html; charset=cp1252'>€",
        ),
    ],
)
def test_decoding(data: bytes, text: str) -> None:
    assert decode_html(data) == text


@pytest.mark.parametrize(
    "declared", [b"", b'<meta charset="no-such">', b'<meta charset="hex">', b"<meta charset=zlib>"]
)
def test_other_bytes_are_invalid(declared: bytes) -> None:
    with pytest.raises(RecordError) as caught:
        decode_html(declared + b"\xff\xfe\xfd")
    assert caught.value.reason == RejectReason.INVALID_UTF8
