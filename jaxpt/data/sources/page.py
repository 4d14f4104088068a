"""Web pages: their bytes as text, as browsers decode them, and the main text of their HTML."""

from __future__ import annotations

import codecs
import importlib.metadata
import logging
import re
from typing import TYPE_CHECKING, Any

from jaxpt.data.sources.files import first_error_line
from jaxpt.spec import UserError

if TYPE_CHECKING:
    import webencodings

BYTE_ORDER_MARKS = {
    codecs.BOM_UTF8: "utf-8",
    codecs.BOM_UTF16_LE: "utf-16-le",
    codecs.BOM_UTF16_BE: "utf-16-be",
}
META_BYTES = 1 << 14  # of a page in which its charset stands
CODE_PAGES = {"cp932": "shift_jis", "cp949": "euc-kr", "cp950": "big5"}  # not in the standard
COMMENT = re.compile(rb"<!--.*?-->", re.DOTALL)
META_CHARSET = re.compile(
    rb"""<meta\b[^>]*?\bcharset\s*=\s*["']?\s*([^\s"'/>;]+)"""
    rb"""|^\s*<\?xml\b[^>]*?\bencoding\s*=\s*["']([^"']+)""",
    re.IGNORECASE,
)
WIDE = ("utf-16le", "utf-16be")
# a charset that a page can name only if it is written in another one
META_MEANS = {"utf-16le": "utf-8", "utf-16be": "utf-8", "x-user-defined": "windows-1252"}
SPACE = re.compile(r"[ \t\n\f\r]{2,}|[\t\n\f\r]")
PREFORMATTED = ("pre", "textarea", "listing", "xmp", "plaintext")


def decode_page(body: bytes, declared: str = "") -> str:
    """Return a page's text, as browsers decode it.

    The byte order mark decides, then the HTTP header, then the page itself, by the labels of
    encoding.spec.whatwg.org. Bytes that the charset lacks become U+FFFD.

    Args:
        body: the page.
        declared: the charset of the HTTP header.
    """
    for mark, codec_name in BYTE_ORDER_MARKS.items():
        if body.startswith(mark):
            return body.removeprefix(mark).decode(codec_name, "replace")
    encoding = find_encoding(declared)
    if encoding and encoding.name in WIDE and b"\0" not in body[:META_BYTES]:
        encoding = None  # the tags of a page would have such bytes
    encoding = encoding or find_meta_encoding(body) or guess_encoding(body)
    # gbk is read as gb18030, says the standard; Python's lacks the euro sign
    codec = encoding.codec_info if encoding.name != "gbk" else codecs.lookup("gb18030")
    return codec.decode(body, "replace")[0]


def find_encoding(label: str) -> webencodings.Encoding | None:
    """Return the encoding of a label; None of one that means no text."""
    import webencodings

    found = webencodings.lookup(label)
    if not found:
        try:
            name = codecs.lookup(label).name  # of latin-1, say, iso8859-1
        except (LookupError, ValueError):
            return None
        found = webencodings.lookup(CODE_PAGES.get(name, name))
    if not found or found.name == "replacement":
        return None
    return found


def find_meta_encoding(body: bytes) -> webencodings.Encoding | None:
    """Return the encoding that a page names itself."""
    head = COMMENT.sub(b"", body[:META_BYTES])
    found = META_CHARSET.search(head)
    if not found:
        return None
    label = (found[1] or found[2]).decode("latin-1")
    encoding = find_encoding(label)
    if encoding and encoding.name in META_MEANS:
        return find_encoding(META_MEANS[encoding.name])
    return encoding


def guess_encoding(body: bytes) -> webencodings.Encoding:
    """Return the encoding of a page that names none.

    It is UTF-8 if no more of its characters are broken than whole: other charsets have hardly any.
    """
    import webencodings
    from resiliparse.parse.encoding import detect_encoding

    text = body.decode("utf-8", "replace")
    n_broken = text.count("\ufffd")
    if not n_broken or n_broken <= len(re.findall("[^\x00-\x7f\ufffd]", text)):
        return webencodings.UTF8
    guess = find_encoding(detect_encoding(body, html5_compatible=False) or "")
    return guess or webencodings.Encoding("windows-1252", codecs.lookup("cp1252"))


def extract_main_text(html: str) -> str:
    """Return the main text of a page, "" if it has none.

    Raises:
        UserError: it cannot be parsed, and why.

    Source: trafilatura with precision before recall, like FineWeb (2406.17557).
    """
    import trafilatura

    logging.getLogger("trafilatura").setLevel(logging.CRITICAL)  # it logs every odd page
    try:
        tree = parse_html(html)
        if tree is None:
            return ""
        collapse_space(tree)
        return trafilatura.extract(tree, include_comments=False, favor_precision=True) or ""
    except UserError:
        raise
    except Exception as error:  # lxml and the extractor meet every page that was ever written
        raise UserError(f"its HTML cannot be parsed ({first_error_line(error)})") from None


def parse_html(html: str) -> Any:
    """Return the tree of a page as trafilatura makes it, or None; but elements may lie deeper.

    Raises:
        UserError: elements lie deeper than libxml2 reads at all, so that their text is lost.
    """
    from lxml.html import HTMLParser, fromstring
    from trafilatura.utils import is_dubious_html, repair_faulty_html

    parser = HTMLParser(
        collect_ids=False,
        default_doctype=False,
        encoding="utf-8",
        remove_comments=True,
        remove_pis=True,
        huge_tree=True,  # 2,048 levels in place of 256
    )
    html = html.replace("\0", "")
    beginning = html[:50].lower()
    html = repair_faulty_html(html, beginning)
    tree = fromstring(html.encode("utf-8", "replace"), parser=parser)
    if any("Excessive depth" in entry.message for entry in parser.error_log):
        raise UserError("its elements lie more than 2,048 deep")
    if is_dubious_html(beginning) and len(tree) < 2:
        return None
    return tree


def collapse_space(tree: Any) -> None:
    """Collapse white space as HTML does: its line breaks are no lines."""
    preformatted = set()
    for block in tree.iter(*PREFORMATTED):
        preformatted.update(block.iter())
    for node in tree.iter():
        if node.text and node not in preformatted:
            node.text = SPACE.sub(" ", node.text)
        parent = node.getparent()
        if node.tail and parent not in preformatted:
            tail = SPACE.sub(" ", node.tail)
            node.tail = tail.lstrip(" ") if node.tag == "br" else tail


def describe_extractor() -> dict[str, str]:
    """Return the version of what finds the main text."""
    return {"trafilatura": importlib.metadata.version("trafilatura")}
