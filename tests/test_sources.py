"""Laws of sources: a page's main text in its own letters, the same documents from any packing and
place, and nothing lost or passed over in silence.
"""

import bz2
import collections
import gzip
import itertools
import json
import logging
import lzma
import random
import re
import subprocess
import sys
import zlib

import brotli
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import webencodings
import zstandard
from conftest import ROOT
from hypothesis import given, strategies

from jaxpt.config import PrepareConfig
from jaxpt.data import prepare, sources
from jaxpt.data.prepare import read as read_module
from jaxpt.data.prepare import rows
from jaxpt.data.sources import jsonl, parquet, parse_source, text, warc
from jaxpt.data.sources import page as page_module
from jaxpt.data.sources import source as source_module
from jaxpt.spec import UserError
from jaxpt.stage import read_manifest

STORY = {
    "en": (
        "The harbour lay still when Ms Ørsted walked down to the quay, as she "
        "had on every morning of that long and windy summer."
    ),
    "ru": (
        "Старый дом стоял в конце узкого переулка, "
        "и никто в деревне не помнил, "
        "кто и когда его построил."
    ),
    "ja": (
        "吾輩は猫である。名前はまだ無い。"
        "どこで生れたかとんと見当がつかぬ。"
        "何でも薄暗いじめじめした所で泣いていた。"
    ),
}


def page(text: str, head: str = "") -> str:
    """HTML with a menu and a footer around three paragraphs of text."""
    body = "".join(f"<p>{text} {n}.</p>" for n in ("One", "Two", "Three"))
    menu = "".join(f"<li><a href='/{i}'>Menu {i}</a></li>" for i in range(9))
    navigation = f"<nav><ul>{menu}</ul></nav>"
    content = f"{navigation}<article>{body}</article><footer>Imprint</footer>"
    return f"<html><head>{head}<title>x</title></head><body>{content}</body></html>"


def http(
    body: bytes, kind: str = "text/html; charset=utf-8", status: str = "200 OK", more: str = ""
) -> bytes:
    return (
        f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\n{more}Content-Length: {len(body)}\r\n\r\n"
    ).encode() + body


def record(block: bytes, n: int, kind: str = "response") -> bytes:
    head = (
        f"WARC/1.0\r\nWARC-Type: {kind}\r\nWARC-Target-URI: "
        f"http://example.org/{n}\r\nWARC-Date: 2026-11-0{n}T04:02:06Z\r\n"
    )
    head += (
        "WARC-Record-ID: "
        f"<urn:uuid:00000000-0000-0000-0000-00000000000{n}>\r\nContent-Type: "
        f"application/http; msgtype={kind}\r\n"
    )
    return f"{head}Content-Length: {len(block)}\r\n\r\n".encode() + block + b"\r\n\r\n"


def chunked(data: bytes) -> bytes:
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in (data[:100], data[100:], b""))


def crawl() -> list[bytes]:
    """Nine records; those with a page to read are 2, 3, 4 and 5."""
    english = page(STORY["en"]).encode()
    return [
        record(b"software: x\r\n", 1, "warcinfo"),
        record(http(page(STORY["ru"]).encode("cp1251"), "text/html; charset=windows-1251"), 2),
        record(
            http(page(STORY["ja"], '<meta charset="shift_jis">').encode("shift_jis"), "text/html"),
            3,
        ),
        record(http(gzip.compress(english), more="Content-Encoding: gzip\r\n"), 4),
        record(
            http(
                chunked(english.replace(b"harbour", b"haven")),
                more="Transfer-Encoding: chunked\r\n",
            ),
            5,
        ),
        record(b"GET / HTTP/1.1\r\n\r\n", 6, "request"),
        record(http(b"\x89PNG", "image/png"), 7),
        record(http(page("Not here").encode(), status="404 Not Found"), 8),
        record(http(b""), 9),
    ]


def read(text: str, **how) -> tuple[list[sources.Document], collections.Counter, list[str]]:
    """(documents, what was passed over by reason, the sentences)"""
    counts, sentences = collections.Counter(), []

    def passed(why, sentence):
        counts[why] += 1
        sentences.append(sentence)

    return list(sources.parse_source(text).iterate_documents(passed, **how)), counts, sentences


def test_a_page_is_its_main_text_in_its_own_letters_with_url_and_date(tmp_path):
    (tmp_path / "a.warc").write_bytes(b"".join(crawl()))
    found, counts, _ = read(f"web=warc:{tmp_path}/*.warc")
    said = [STORY["ru"], STORY["ja"], STORY["en"], STORY["en"].replace("harbour", "haven")]
    assert [each.text for each in found] == [
        "\n".join(f"{text} {n}." for n in ("One", "Two", "Three")) for text in said
    ]
    assert [each.id for each in found] == [f"web/a.warc:{n}" for n in (2, 3, 4, 5)]
    assert json.loads(found[1].meta) == {
        "url": "http://example.org/3",
        "date": "2026-11-03T04:02:06Z",
    }
    assert counts == {"is image/png, not HTML": 1, "HTTP status 404": 1, "empty body": 1}, (
        "the others are no responses"
    )


@pytest.mark.parametrize(
    ("encoding", "body"),
    [
        ("UTF-8", bytes),
        ("none", bytes),
        ("gzip", bytes),
        ("deflate", bytes),
        ("br", bytes),
        ("zstd", bytes),
        ("deflate", lambda data: zlib.compress(data)[2:-4]),
        ("x-gzip", gzip.compress),
        ("gzip", lambda data: gzip.compress(gzip.compress(data))),
        ("gzip", lambda data: gzip.compress(data) + b"\0\0"),
        ("gzip\r\nTransfer-Encoding: chunked", gzip.compress),
        ("identity\r\nTransfer-Encoding: chunked", bytes),
        ("identity", gzip.compress),
        ("gzip,", bytes),
        ("", bytes),
    ],
)
def test_a_page_is_read_whatever_its_headers_say_about_its_packing(tmp_path, encoding, body):
    story = page(STORY["en"]).encode()
    odd = http(body(story), more=f"Content-Encoding: {encoding}\r\n")
    file = tmp_path / "a.warc"
    file.write_bytes(record(http(story), 1) + record(odd, 2) + record(http(story), 3))
    found, counts, _ = read(f"x=warc:{file}")
    assert [each.id[-1] for each in found] == ["1", "2", "3"] and not counts
    assert len({each.text for each in found}) == 1


def test_of_a_damaged_body_what_comes_before_is_read_and_a_hopeless_one_costs_itself(tmp_path):
    texts = [f"{STORY['en']} The {n}th time it was {n * n} steps." for n in range(400)]
    story = f"<html><article><p>{'</p><p>'.join(texts)}</p></article></html>".encode()
    more = "Content-Encoding: gzip\r\n"
    cut = http(gzip.compress(story)[:-900], more=more)
    wrong_sum = http(gzip.compress(story)[:-8] + bytes(8), more=more)
    hopeless = http(b"\x1f\x8b\x08\0" + b"\xff" * 40, more=more)
    file = tmp_path / "a.warc"
    file.write_bytes(
        b"".join(record(block, n) for n, block in enumerate((cut, hopeless, wrong_sum), 1))
    )
    found, counts, _ = read(f"x=warc:{file}")
    assert [each.id[-1] for each in found] == ["1", "3"]
    assert texts[100] in found[0].text and texts[-1] not in found[0].text
    assert texts[-1] in found[1].text
    assert counts == {"its HTTP message cannot be decoded": 1}


NOISE = strategies.binary(max_size=60)
HEADERS = strategies.sampled_from(
    [
        b"Content-Type: text/html\r\n",
        b"Content-Type: text/html; charset=\xff\0\n",
        b"Content-Encoding: gzip\r\n",
        b"Content-Encoding: br, deflate\r\n",
        b"Transfer-Encoding: chunked\n",
        b" folded\r\n",
        b"no colon\r\n",
    ]
)


@given(NOISE, strategies.lists(HEADERS), NOISE, strategies.sampled_from([b"", b"\x1f\x8b\x08\0"]))
def test_whatever_a_record_holds_the_others_are_read(tmp_path_factory, first, headers, body, magic):
    odd = b"HTTP/1.1 200 OK\r\n" + b"".join(headers) + b"\r\n" + magic + body
    file = tmp_path_factory.mktemp("odd") / "a.warc"
    good = record(http(page(STORY["en"]).encode()), 1)
    file.write_bytes(good + record(odd, 2) + record(first, 3) + good)
    found, counts, _ = read(f"x=warc:{file}")
    assert {"x/a.warc:1", "x/a.warc:4"} <= {each.id for each in found}
    assert len(found) + counts.total() == 4


def test_headers_that_end_in_bare_line_feeds_are_headers(tmp_path):
    block = http(page(STORY["ru"]).encode("cp1251"), "text/html;\r\n charset=windows-1251")
    head, _, body = block.partition(b"\r\n\r\n")
    bare = record(head.replace(b"\r\n", b"\n") + b"\n\n" + body, 1)
    (tmp_path / "http.warc").write_bytes(record(block, 1) + bare + bare)
    warc_head, _, rest = bare.partition(b"\r\n\r\n")
    all_bare = warc_head.replace(b"\r\n", b"\n") + b"\n\n" + rest.removesuffix(b"\r\n\r\n")
    (tmp_path / "all.warc").write_bytes((all_bare + b"\n\n") * 3)
    for name in ("http", "all"):
        found, *_ = read(f"warc:{tmp_path}/{name}.warc")
        assert len(found) == 3 and all(STORY["ru"] in each.text for each in found)


def test_the_text_of_wet_files_and_of_resources_is_read_and_other_records_are_counted(tmp_path):
    def typed(kind: str, content_type: str, block: bytes, n: int) -> bytes:
        old = f"application/http; msgtype={kind}".encode()
        return record(block, n, kind).replace(old, content_type.encode())

    file = tmp_path / "a.warc.wet"
    file.write_bytes(
        typed("warcinfo", "application/warc-fields", b"software: x\r\n", 1)
        + typed("conversion", "text/plain", f"{STORY['ru']}\n".encode(), 2)
        + typed("resource", "text/html; charset=cp1251", page(STORY["ru"]).encode("cp1251"), 3)
        + typed("resource", "text/plain", STORY["ja"].encode(), 4)
        + typed("resource", "image/png", b"\x89PNG", 5)
        + typed("continuation", "text/plain", b"the rest", 6)
    )
    found, counts, _ = read(f"x=warc:{file}")
    assert [each.id[-1] for each in found] == ["2", "3", "4"]
    assert found[0].text == STORY["ru"] and found[2].text == STORY["ja"]
    assert STORY["ru"] in found[1].text and json.loads(found[0].meta)["url"][-1] == "2"
    assert counts == {
        "is image/png, not HTML": 1,
        "is a WARC record of type continuation": 1,
    }


# ---- letters


def decoded(body: bytes, declared: str = "") -> str:
    return page_module.decode_page(body, declared)


LABELS = {  # some of encoding.spec.whatwg.org, with a text that tells them from their neighbors
    "latin1 iso-8859-1 latin-1 ascii cp1252 ISO_8859-1": ("cp1252", "“quoted” – 5 €"),
    "iso-8859-9 latin5": ("cp1254", "“ışık” – 5 €"),
    "gb2312 GBK x-gbk chinese gb_2312-80": ("gb18030", "漢字 㐀 鎔"),
    "shift_jis sjis x-sjis ms_kanji": ("cp932", "①髙 №"),
    "ks_c_5601-1987 euc-kr korean": ("cp949", "똠방각하"),
    "big5 big5-hkscs cn-big5": ("big5hkscs", "漢字 嗰"),
    "tis-620 windows-874": ("cp874", "ภาษาไทย…"),
    "utf8 UTF-8 unicode-1-1-utf-8 x-unicode20utf8": ("utf-8", "漢字 ышы é"),
    "unicode utf-16 ucs-2": ("utf-16-le", "漢字 é"),
    "koi8-r koi": ("koi8-r", "старый дом"),
    "x-mac-cyrillic": ("mac-cyrillic", "старый дом"),
}


@pytest.mark.parametrize("labels", LABELS)
def test_labels_of_charsets_mean_what_they_mean_to_browsers(labels):
    codec, text = LABELS[labels]
    for label in labels.split():
        assert decoded(text.encode(codec), label) == text, label
        head = f"<meta http-equiv=Content-Type content='text/html; charset={label}'>"
        if codec != "utf-16-le":  # who can read this knows better
            body = head.encode() + text.encode(codec)
            assert decoded(body) == head + text, label


@given(strategies.text(max_size=30), strategies.sampled_from(["", "latin-1", "utf-16", "hex"]))
def test_the_byte_order_mark_outweighs_every_header(text, declared):
    head = '<meta charset="koi8-r">'
    for codec in ("utf-8", "utf-16-le", "utf-16-be"):
        body = ("\ufeff" + head + text).encode(codec)
        assert decoded(body, declared) == head + text


ODD_LABELS = ["rot13", "hex", "idna", "zlib", "undefined", "utf-7", "cp037", "unicode_escape"]
ODD_LABELS += [*webencodings.labels.LABELS]


@given(strategies.text(max_size=12) | strategies.sampled_from(ODD_LABELS))
def test_a_page_is_read_whatever_its_charset_is_called(label):
    body = b"<p>A page in plain letters.</p>"
    assert decoded(body, label) == body.decode()
    assert decoded(b"<meta charset='%s'>" % label.encode() + body).endswith(body.decode())


@given(strategies.data())
def test_a_bad_byte_costs_a_page_that_byte(data):
    text = page(STORY["en"] + " It’s a café in Zürich – “closed” at five. " + STORY["ru"])
    body = text.encode()
    at = data.draw(strategies.sampled_from([i for i, byte in enumerate(body) if byte < 128]))
    bad = body[:at] + b"\xff" + body[at + 1 :]
    expected = text.encode()[:at].decode() + "\ufffd" + text.encode()[at + 1 :].decode()
    for declared in ("utf-8", ""):
        assert decoded(bad, declared) == expected
    assert decoded(body + "…".encode()[:2], "").startswith(text)


@pytest.mark.parametrize("codec", ["cp1252", "cp1251", "shift_jis", "gbk", "koi8-r", "euc-kr"])
def test_what_is_not_utf_8_is_not_taken_for_it(codec):
    text = {
        "cp1252": "É déjà “vu” à l’été ",
        "gbk": "联通移动电话 ",
        "euc-kr": "오래된 집은 좁은 골목 끝에 서 있었다. ",
    }
    body = text.get(codec, STORY["ja" if codec == "shift_jis" else "ru"]) * 30
    assert (
        "\ufffd" not in decoded(body.encode(codec)) != body.encode(codec).decode("utf-8", "replace")
    )


# ---- HTML


@given(strategies.lists(strategies.sampled_from([" ", "\n", "\t", "\r\n", "  \n "]), min_size=60))
def test_line_breaks_in_html_are_spaces_wherever_they_fall(gaps):
    text = "The <b>harbour</b> lay <i>still when <a>Ms Ørsted</a></i> walked down to the"
    words = text.split()
    words *= 6
    gaps = (gaps * len(words))[: len(words)]
    wrapped = "".join(word + gap for word, gap in zip(words, gaps, strict=True))
    texts = [
        page_module.extract_main_text(page(f"{text} quay.<br>\n Then a line"))
        for text in (" ".join(words), wrapped.strip())
    ]
    assert texts[0] == texts[1] and texts[0].count("\n") == 5


def test_white_space_of_preformatted_text_stays():
    code = "def f(x):\n    return  x\n\tend"
    html = page(STORY["en"]).replace("</article>", f"<pre>{code}\n  <b>more</b></pre></article>")
    text = page_module.extract_main_text(html)
    assert f"{code}\n  more" in text


@pytest.mark.parametrize(
    ("depth", "is_read"), [(200, True), (300, True), (1900, True), (3000, False)]
)
def test_text_of_deep_elements_is_kept_or_the_page_is_counted(depth, is_read):
    html = page(STORY["en"]).replace("<p>", "<p>" + "<font>" * depth, 1)
    if is_read:
        text = page_module.extract_main_text(html)
        assert all(f"{STORY['en']} {n}." in text for n in ("One", "Two", "Three"))
        return
    with pytest.raises(UserError, match="elements lie more than 2,048 deep"):
        page_module.extract_main_text(html)


def test_a_charset_that_nobody_knows_gives_way_to_what_the_page_says_of_itself(tmp_path):
    body = page(STORY["ja"], '<meta charset="shift_jis">').encode("shift_jis")
    (tmp_path / "a.warc").write_bytes(record(http(body, "text/html; charset=UTF-eight"), 1))
    [found] = read(f"warc:{tmp_path}/a.warc")[0]
    assert STORY["ja"] in found.text


def test_a_crawl_with_damaged_bytes_is_read_or_named_and_never_a_traceback(tmp_path):
    rng, whole, ends = random.Random(3), b"".join(crawl()), collections.Counter()
    for _ in range(60):
        data = bytearray(whole)
        for _ in range(rng.choice([1, 3, 20])):
            at = rng.randrange(len(data))
            data[at : at + rng.choice([0, 1, 1, 90])] = rng.choice(
                [b"", rng.randbytes(1), rng.randbytes(30)]
            )
        at = data.find(b"Content-Length: ", rng.randrange(len(data)))
        if at > 0 and rng.random() < 0.3:
            data[at + 16 : at + 17] = rng.choice([b"-", b"9", b"x", b"99999999999999999999"])
        (tmp_path / "a.warc").write_bytes(data)
        try:
            read(f"warc:{tmp_path}/a.warc")
            ends["read"] += 1
        except UserError as error:
            assert "a.warc" in str(error) and "\n" not in str(error)
            ends["named"] += 1
    assert ends["read"] and ends["named"]


def test_a_crawl_reads_the_same_however_it_is_packed(tmp_path):
    records = crawl()
    (tmp_path / "a.warc").write_bytes(b"".join(records))
    (tmp_path / "a.warc.gz").write_bytes(
        b"".join(map(gzip.compress, records))
    )  # a member a record, as crawlers write
    (tmp_path / "one.warc.gz").write_bytes(gzip.compress(b"".join(records)))
    (tmp_path / "a.warc.zst").write_bytes(
        b"".join(pa.compress(each, codec="zstd", asbytes=True) for each in records)
    )
    plain, *packed = (
        [each._replace(id="") for each in read(f"warc:{tmp_path}/{name}")[0]]
        for name in ("a.warc", "a.warc.gz", "one.warc.gz", "a.warc.zst")
    )
    assert len(plain) == 4 and packed == [plain] * 3


@pytest.mark.parametrize("packing", ["", ".gz", ".zst"])
def test_of_a_crawl_cut_in_mid_record_the_whole_records_are_kept_and_the_cut_is_named(
    tmp_path, packing
):
    whole = b"".join(crawl()[:5])
    cut = len(whole) - len(crawl()[4]) + 700
    pack = {
        "": bytes,
        ".gz": gzip.compress,
        ".zst": lambda data: pa.compress(data, codec="zstd", asbytes=True),
    }[packing]
    data = b"".join(map(pack, crawl()[:5])) if packing else whole[:cut]
    (tmp_path / f"cut.warc{packing}").write_bytes(data[:-40] if packing else data)
    (tmp_path / "next.warc").write_bytes(crawl()[3])
    with pytest.raises(
        UserError,
        match=rf"cut\.warc{packing}(:5)?: (the record ends after \d+ of \d+ bytes|cannot be read)",
    ):
        read(f"warc:{tmp_path}/*.warc*")
    found, counts, sentences = read(f"x=warc:{tmp_path}/*.warc*", on_error="skip")
    whole = [f"x/cut.warc{packing}:{n}" for n in (2, 3, 4)]
    assert [each.id for each in found] == [*whole, "x/next.warc:1"] and counts[
        "cannot be read"
    ] == 1
    assert f"cut.warc{packing}" in sentences[-1] and "\n" not in sentences[-1]


def test_real_crawls_are_read(data_dir):
    found, counts, _ = read(f"warc:{data_dir}/web_warcio/*.warc*")
    assert [json.loads(each.meta)["url"] for each in found] == [
        "http://www.iana.org/",
        "http://example.com/",
        "http://example.com/",
    ]
    assert (
        "illustrative examples in documents" in found[1].text
        and found[1].text == found[2].text
        and not counts
    )


# ---- what cannot be read


def lines(*texts: str) -> bytes:
    return b"".join(json.dumps({"text": text}).encode() + b"\n" for text in texts)


READ_A_BOMB = """
import re, sys
from jaxpt.data import sources
skipped = []
source = sources.parse_source(sys.argv[1])
n = sum(1 for _ in source.iterate_documents(lambda *why: skipped.append(why), "skip"))
# getrusage would count the parent's memory too, which the process had before it became itself
peak = re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status", encoding="utf-8").read())
print(n, len(skipped), int(peak[1]) // 1024)
"""


def read_in_a_process(source: str) -> tuple[int, int, int]:
    """Documents, skipped records, and the most MB that the process held."""
    command = [sys.executable, "-c", READ_A_BOMB, source]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return tuple(map(int, done.stdout.split()))


def test_a_record_that_unpacks_to_gigabytes_is_skipped_at_little_memory(tmp_path):
    story = page(STORY["en"]).encode()
    packer = zlib.compressobj(9, zlib.DEFLATED, 31)
    body = b"".join(packer.compress(bytes(2**20)) for _ in range(1500)) + packer.flush()
    for i, header in enumerate(("Content-Encoding: gzip", "Transfer-Encoding: gzip")):
        file = tmp_path / f"{i}.warc"
        bomb = record(http(body, more=f"{header}\r\n"), 1)
        file.write_bytes(bomb + record(http(story), 2))
        *found, megabytes = read_in_a_process(f"warc:{file}")
        assert found == [1, 1] and megabytes < 700
        with pytest.raises(UserError, match="one document of more than 32 MB"):
            list(sources.parse_source(f"warc:{file}").iterate_documents())


@pytest.mark.parametrize(
    ("encoding", "packed"),
    [
        ("gzip", gzip.compress),
        ("deflate", zlib.compress),
        ("br", brotli.compress),
        ("zstd", lambda data: pa.compress(data, codec="zstd", asbytes=True)),
        ("br, gzip", lambda data: gzip.compress(brotli.compress(data))),
        ("gzip\r\nTransfer-Encoding: chunked", lambda data: chunk(gzip.compress(data))),
    ],
)
def test_a_page_is_read_in_every_encoding_of_the_web(tmp_path, encoding, packed):
    story = page(STORY["en"]).encode()
    (tmp_path / "plain.warc").write_bytes(record(http(story), 1))
    more = f"Content-Encoding: {encoding}\r\n"
    (tmp_path / "packed.warc").write_bytes(record(http(packed(story), more=more), 1))
    [plain], *_ = read(f"warc:{tmp_path}/plain.warc")
    [unpacked], *_ = read(f"warc:{tmp_path}/packed.warc")
    assert plain.text == unpacked.text != ""


def chunk(data: bytes) -> bytes:
    parts = [data[i : i + 101] for i in range(0, len(data), 101)]
    return b"".join(b"%x\r\n%s\r\n" % (len(part), part) for part in parts) + b"0\r\n\r\n"


def test_rows_that_repeat_a_long_text_are_unpacked_a_few_at_a_time(tmp_path):
    texts = pa.array(["x" * 2**24, "y" * (2**25 + 1), "last"])
    indices = pa.array([0] * 130 + [1, 2])
    table = pa.table({"text": pa.DictionaryArray.from_arrays(indices, texts)})
    file = tmp_path / "rows.parquet"
    options = {"compression": "zstd", "store_schema": False}
    pq.write_table(table, file, dictionary_pagesize_limit=2**27, **options)
    assert file.stat().st_size < 20_000
    n, n_skipped, megabytes = read_in_a_process(f"parquet:{file}#text")
    assert (n, n_skipped) == (131, 1) and megabytes < 1000

    table = pa.table({"text": ["x" * 2**24] * 17})
    pq.write_table(table, file, use_dictionary=False, **options)
    with pytest.raises(UserError, match="row group 0 unpacks to 285 MB"):
        read(f"parquet:{file}#text")


def test_rows_of_half_a_megabyte_are_read_a_few_at_a_time(tmp_path):
    rng = random.Random(1)
    words = [rng.randbytes(6).hex() for _ in range(4000)]
    rows = [" ".join(rng.choices(words, k=40_000)) for _ in range(9)]
    file = tmp_path / "rows.parquet"
    with pq.ParquetWriter(file, pa.schema({"text": pa.string()}), use_dictionary=False) as out:
        for k in range(10):
            table = pa.table({"text": [f"{k} {row}" for row in rows * 10]})
            out.write_table(table, row_group_size=90)
    n, n_skipped, megabytes = read_in_a_process(f"parquet:{file}#text")
    assert (n, n_skipped) == (900, 0) and megabytes < 400


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "hf", "text"])
def test_no_kind_of_source_gives_a_document_above_the_limit(tmp_path, monkeypatch, kind):
    for module in (source_module, text, jsonl):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 6000)
    texts = ["x" * 5900, "é" * 3001]
    (tmp_path / "d").mkdir()
    if kind == "parquet":
        pq.write_table(pa.table({"text": texts}), tmp_path / "d/a")
    elif kind == "text":
        for i, each in enumerate(texts):
            (tmp_path / f"d/{i}").write_text(each)
    else:
        records = [json.dumps({"text": each}, ensure_ascii=False) for each in texts]
        (tmp_path / "d/a.jsonl").write_text("\n".join(records), encoding="utf-8")
    where = f"hf:{tmp_path}/d:train#text" if kind == "hf" else f"{kind}:{tmp_path}/d/*"
    found, counts, _ = read(f"x={where}", on_error="skip")
    assert [len(each.text) for each in found] == [5900] and counts == {"cannot be read": 1}


LONG = [f"A line that says {i} and then {i * i}, so that it packs badly." for i in range(3000)]


@pytest.mark.parametrize(
    ("name", "data", "kept", "n_unread", "sentence"),
    [
        (
            "latin.jsonl",
            b'{"text": "a"}\n{"text": "\xe9"}\n{"text": "c"}\n',
            ["a", "c"],
            1,
            "latin.jsonl:2: byte 10 of the line is not UTF-8",
        ),
        ("cut.jsonl", b'{"text": "a"}\n{"text": "b', ["a"], 1, "cut.jsonl:2: not JSON"),
        (
            "other.jsonl",
            b'{"text": "a"}\n{"body": "b"}\n[1]\n{"text": "\\ud800"}\n{"text": 3}\n',
            ["a"],
            4,
            "other.jsonl:2: has no field 'text'",
        ),
        (
            "large.jsonl",
            lines("a", "x" * 3000, "c", "y" * 5000),
            ["a", "c"],
            2,
            "large.jsonl:2: one document of more than 0 MB",
        ),
        ("latin.txt", b"caf\xe9", [], 1, "latin.txt: byte 3 is not UTF-8"),
        ("large.txt", b"x" * 3000, [], 1, "large.txt: one document of more than 0 MB"),
        (
            "cut.jsonl.gz",
            gzip.compress(lines(*LONG), mtime=0)[:-3000],
            None,
            1,
            "cut.jsonl.gz: cannot be read",
        ),
        (
            "flipped.jsonl.gz",
            gzip.compress(lines("a"), mtime=0)
            + gzip.compress(lines("b"), mtime=0)[:12]
            + b"\0" * 40,
            ["a"],
            1,
            "flipped.jsonl.gz: cannot be read",
        ),
        (
            "cut.jsonl.zst",
            pa.compress(lines(*LONG), codec="zstd", asbytes=True)[:-3000],
            None,
            1,
            "cut.jsonl.zst: cannot be read",
        ),
        ("bad.parquet", b"PAR1 and no more", [], 1, "bad.parquet: cannot be read as parquet"),
    ],
)
def test_what_cannot_be_read_stops_or_is_counted_by_name_and_the_rest_is_kept(
    tmp_path, monkeypatch, name, data, kept, n_unread, sentence
):
    for module in (source_module, text, jsonl, warc):
        monkeypatch.setattr(module, "MAX_DOCUMENT_BYTES", 2500)
    (tmp_path / name).write_bytes(data)
    kind = {"txt": "text", "parquet": "parquet"}.get(name.split(".")[1], "jsonl")
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["last"]}), tmp_path / "z.parquet")
    else:
        (tmp_path / f"z.{name.split('.')[1]}").write_bytes(
            b"last" if kind == "text" else lines("last")
        )
    with pytest.raises(UserError) as caught:
        read(f"{kind}:{tmp_path}/*")
    assert sentence in str(caught.value) and "\n" not in str(caught.value)
    found, counts, sentences = read(f"{kind}:{tmp_path}/*", on_error="skip")
    texts = [each.text for each in found]
    assert (
        texts[-1] == "last" and counts == {"cannot be read": n_unread} and sentence in sentences[0]
    )
    if kept is None:  # of a file cut short what came before the cut
        assert 0 < len(texts) < len(LONG) and texts[:-1] == LONG[: len(texts) - 1]
    else:
        assert texts[:-1] == kept


# ---- line ends


ENDS = ["\n", "\r\n", "\r"]


@given(
    strategies.lists(
        strategies.tuples(
            strategies.text("ab \t\x85\u2028é漢", max_size=5), strategies.sampled_from(ENDS)
        )
    )
)
def test_every_line_end_is_a_line_feed_whatever_ends_the_lines_around_it(lines):
    found = sources.Document("x", "".join(line + end for line, end in lines))
    if any(ends == ("\r", "\n") for ends in pairs_of_ends(lines)):
        return  # CR, an empty line, LF: this is CRLF
    expected = "".join(f"{line}\n" for line, _ in lines)
    assert source_module.normalize_line_ends(found).text == expected


def pairs_of_ends(lines):
    """(end of a line, end of the next) where the next is empty."""
    for (_, end), (line, next_end) in itertools.pairwise(lines):
        if not line:
            yield end, next_end


def test_a_prompt_keeps_its_length_when_its_line_ends_are_changed():
    made = sources.Document("x", "a\r\nb\r" + "\nc\r\n", prompt_chars=5)
    assert source_module.normalize_line_ends(made)[1:3] == ("a\nb\n\nc\n", 4)


@pytest.mark.parametrize("end", ENDS)
def test_every_reader_gives_line_feeds(tmp_path, end):
    text = end.join(("one", "two", "", "three"))
    (tmp_path / "a.txt").write_bytes(text.encode())
    (tmp_path / "a.jsonl").write_bytes(lines(text))
    pq.write_table(pa.table({"text": [text]}), tmp_path / "a.parquet")
    wet = record(text.encode(), 1, "conversion")
    wet = wet.replace(b"application/http; msgtype=conversion", b"text/plain")
    (tmp_path / "a.warc").write_bytes(wet)
    (tmp_path / "hub").mkdir()
    (tmp_path / "hub/a.jsonl").write_bytes(lines(text))
    for kind in ("text:a.txt", "jsonl:a.jsonl", "parquet:a.parquet", "warc:a.warc", "hf:hub"):
        name, _, where = kind.partition(":")
        split = ":train#text" if name == "hf" else ""
        [found], *_ = read(f"x={name}:{tmp_path}/{where}{split}")
        assert found.text == "one\ntwo\n\nthree", kind


# ---- files as people have them


PACKINGS = {
    "gzip": gzip.compress,
    "bzip2": bz2.compress,
    "xz": lzma.compress,
    "lzma": lambda data: lzma.compress(data, lzma.FORMAT_ALONE),
    "zstd": zstandard.compress,
    "zstd, a skipped frame": lambda data: b"\x51\x2a\x4d\x18\3\0\0\0abc" + zstandard.compress(data),
    "zstd --long=30": lambda data: pack_long(data),
    "nothing": bytes,
}


def pack_long(data: bytes) -> bytes:
    """What `zstd --long=30` writes of a stream."""
    parameters = zstandard.ZstdCompressionParameters(window_log=30)
    packer = zstandard.ZstdCompressor(compression_params=parameters).compressobj()
    return packer.compress(data) + packer.flush()


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("name", ["a.jsonl", "a.JSONL.GZ", "a.gz", "a.zst", "a.bz2"])
def test_what_a_file_holds_decides_how_it_is_unpacked_and_not_its_name(tmp_path, packing, name):
    pack = PACKINGS[packing]
    (tmp_path / name).write_bytes(pack(lines("first", *LONG)) + pack(lines("last")))
    found, counts, _ = read(f"jsonl:{tmp_path}/{name}")
    assert [each.text for each in found] == ["first", *LONG, "last"] and not counts


@pytest.mark.parametrize("is_packed", [False, True])
def test_a_crawl_packed_with_a_dictionary_is_read(tmp_path, is_packed):
    records = crawl()[1:5]
    dictionary = zstandard.ZstdCompressionDict(
        b"".join(records), dict_type=zstandard.DICT_TYPE_RAWCONTENT
    )
    data = dictionary.as_bytes()
    data = zstandard.compress(data) if is_packed else data
    file = tmp_path / "a.warc.zst"
    packer = zstandard.ZstdCompressor(dict_data=dictionary)
    frames = b"".join(packer.compress(each) for each in records)
    file.write_bytes(b"\x5d\x2a\x4d\x18" + len(data).to_bytes(4, "little") + data + frames)
    found, counts, _ = read(f"warc:{file}")
    assert len(found) == 4 and not counts and STORY["ru"] in found[0].text


@pytest.mark.parametrize(
    ("data", "sentence"),
    [
        (b"PK\x03\x04" + bytes(40), "is a ZIP archive. Unpack it: unzip"),
        (b"7z\xbc\xaf\x27\x1c" + bytes(40), "is a 7z archive"),
        (
            gzip.compress(b"name" + bytes(253) + b"ustar\x0000" + bytes(300), mtime=0),
            "is a tar archive",
        ),
        (b"PAR1" + bytes(40), "is a parquet file. Read it as parquet:"),
        ("{}".encode("utf-16"), "is UTF-16. Convert it: iconv -f UTF-16 -t UTF-8"),
        (
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n",
            "is a pointer of Git LFS, not the file. Get the file: git lfs pull",
        ),
    ],
)
@pytest.mark.parametrize("kind", ["text", "jsonl", "warc"])
def test_what_is_no_text_is_refused_as_what_it_is(tmp_path, kind, data, sentence):
    file = tmp_path / "a.gz"
    file.write_bytes(data)
    with pytest.raises(UserError, match=re.escape(f"{file}: {sentence}")):
        read(f"{kind}:{file}")


def test_a_pointer_in_place_of_a_parquet_file_is_named(tmp_path):
    file = tmp_path / "a.parquet"
    file.write_bytes(b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n")
    with pytest.raises(UserError, match="is a pointer of Git LFS"):
        read(f"parquet:{file}")


@given(
    strategies.lists(strategies.text(max_size=8), min_size=2, max_size=5),
    strategies.sampled_from(["utf-16-le", "utf-16-be", "utf-32-le"]),
)
def test_json_lines_that_are_not_utf_8_are_no_documents(tmp_path_factory, texts, codec):
    file = tmp_path_factory.mktemp("wide") / "a.jsonl"
    file.write_bytes("".join(json.dumps({"text": text}) + "\n" for text in texts).encode(codec))
    found, counts, _ = read(f"jsonl:{file}", on_error="skip")
    assert not found and counts["cannot be read"] >= len(texts)


def test_a_byte_order_mark_before_the_first_line_is_no_part_of_it(tmp_path):
    (tmp_path / "a.jsonl").write_bytes(b"\xef\xbb\xbf" + lines("one", "two"))
    assert [each.text for each in read(f"jsonl:{tmp_path}/a.jsonl")[0]] == ["one", "two"]


def test_links_that_lead_back_are_followed_once_and_links_to_nothing_are_named(tmp_path):
    (tmp_path / "a/b").mkdir(parents=True)
    (tmp_path / "other").mkdir()
    for name in ("a/one.txt", "a/b/two.txt", "other/three.txt"):
        (tmp_path / name).write_text(name)
    (tmp_path / "a/b/back").symlink_to(tmp_path / "a")
    (tmp_path / "a/b/there").symlink_to(tmp_path / "other")
    (tmp_path / "other/back").symlink_to(tmp_path / "a")
    found, *_ = read(f"x=text:{tmp_path}/a/**/*.txt")
    assert [each.id for each in found] == ["x/b/there/three.txt", "x/b/two.txt", "x/one.txt"]
    assert [each.id for each in read(f"x=text:{tmp_path}/a/**")[0]] == [each.id for each in found]
    found, *_ = read(f"x=text:{tmp_path}/**/*.txt")
    assert [each.text for each in found] == ["a/b/two.txt", "a/one.txt", "other/three.txt"]
    (tmp_path / "a/gone.txt").symlink_to(tmp_path / "nowhere.txt")
    with pytest.raises(
        UserError, match=r"gone\.txt: is a link to .*nowhere\.txt, which is not there"
    ):
        read(f"x=text:{tmp_path}/a/*.txt")
    found, counts, _ = read(f"x=text:{tmp_path}/a/*.txt", on_error="skip")
    assert [each.id for each in found] == ["x/one.txt"] and counts == {"cannot be read": 1}


@pytest.mark.parametrize("name", ["lr=[1e-3]", "[draft] a", "a[0-9]", "wh?t", "st*r", "[[]x"])
def test_names_that_look_like_patterns_are_found_as_they_are(tmp_path, name):
    (tmp_path / name).mkdir()
    for other in ("lr=1", "d", "a1", "what", "star", "x"):
        (tmp_path / other).mkdir()
    file = tmp_path / name / f"{name}.txt"
    file.write_text(name)
    assert [each.text for each in read(f"x=text:{file}")[0]] == [name]
    assert [each.text for each in read(f"x=text:{tmp_path}/{name}/*.txt")[0]] == [name]


def test_brackets_are_still_patterns_where_no_name_has_them(tmp_path):
    for name in ("part-1.txt", "part-2.txt", "part-x.txt", ".part-3.txt"):
        (tmp_path / name).write_text(name)
    found, *_ = read(f"x=text:{tmp_path}/part-[0-9].t?t")
    assert [each.text for each in found] == ["part-1.txt", "part-2.txt"]


def test_a_name_that_is_not_utf_8_is_read_and_written_as_escapes(tmp_path, output):
    (tmp_path / "in").mkdir()
    for name, data in ((b"caf\xe9.txt", b"whole"), (b"caf\xe8.txt", b"caf\xe9")):
        with open(bytes(tmp_path / "in") + b"/" + name, "wb") as file:
            file.write(data)
    made = prepare.prepare_corpus(
        PrepareConfig(sources=(f"x=text:{tmp_path}/in/*",), on_error="skip", heldout_frac=0.0),
        tmp_path / "run",
    )
    [row] = pq.read_table(tmp_path / "run/corpus/train/x-00000.parquet").to_pylist()
    assert row["id"] == "x/caf\\xe9.txt" and row["text"] == "whole"
    assert "caf\\xe8.txt: byte 3 is not UTF-8" in made.counts["unread"]["x"]["first"][0]
    assert "x/caf\\xe9.txt" in made.inputs and "caf\\xe8.txt" in output()


def test_a_file_that_changes_while_it_is_read_makes_no_corpus(tmp_path, monkeypatch):
    file = tmp_path / "a.jsonl"
    file.write_bytes(lines("one", "two"))
    asked = PrepareConfig(sources=(f"jsonl:{file}",), heldout_frac=0.0)
    write = read_module.write_read_file

    def write_and_change(*args):
        with open(file, "ab") as log:
            log.write(lines("three"))
        return write(*args)

    monkeypatch.setattr(read_module, "write_read_file", write_and_change)
    with pytest.raises(UserError, match=r"a\.jsonl: changed while it was read. Start again"):
        prepare.prepare_corpus(asked, tmp_path / "run")
    assert not (tmp_path / "run/corpus").exists()
    monkeypatch.undo()
    made = prepare.prepare_corpus(asked, tmp_path / "run")
    assert sum(each["rows"] for each in made.counts["train"].values()) == file.read_bytes().count(
        b"\n"
    )


def test_a_column_that_one_file_lacks_is_named_for_that_file(tmp_path):
    pq.write_table(pa.table({"text": ["a"]}), tmp_path / "a.parquet")
    pq.write_table(pa.table({"body": ["b"]}), tmp_path / "b.parquet")
    found, counts, sentences = read(f"parquet:{tmp_path}/*", on_error="skip")
    assert [each.text for each in found] == ["a"] and counts == {"cannot be read": 1}
    assert "b.parquet: has no column 'text'; it has: body" in sentences[0]


def test_what_was_passed_over_stands_in_the_funnel_the_manifest_and_on_the_terminal(
    tmp_path, output
):
    (tmp_path / "web.warc").write_bytes(b"".join(crawl())[:-30])
    (tmp_path / "notes.jsonl").write_bytes(lines("first") + b"no JSON\n" + lines("third"))
    asked = PrepareConfig(
        sources=(f"warc:{tmp_path}/web.warc", f"jsonl:{tmp_path}/notes.jsonl"),
        on_error="skip",
        heldout_frac=0.0,
    )
    prepare.prepare_corpus(asked, tmp_path / "run")
    unread = read_manifest(tmp_path / "run/corpus").counts["unread"]
    assert unread == json.loads((tmp_path / "run/corpus/funnel.json").read_text())["unread"]
    assert (
        unread["notes"]["counts"] == {"cannot be read": 1}
        and "notes.jsonl:2: not JSON" in unread["notes"]["first"][0]
    )
    assert unread["web"]["counts"] == {
        "cannot be read": 1,
        "HTTP status 404": 1,
        "is image/png, not HTML": 1,
    }
    printed = output()
    assert (
        "notes: skipped 1 records or files: cannot be read" in printed
        and "notes.jsonl:2: not JSON" in printed
    )
    rows = pq.read_table(tmp_path / "run/corpus/train/web-00000.parquet").to_pylist()
    assert [json.loads(row["meta"])["url"][-1] for row in rows] == ["2", "3", "4", "5"]
    (tmp_path / "notes.jsonl").write_bytes(b"no JSON\n")
    with pytest.raises(
        UserError,
        match=(
            r"no document in it, 1 times cannot be read \(.*notes\.jsonl:1: not "
            r"JSON.*\). Leave it out"
        ),
    ):
        prepare.prepare_corpus(asked, tmp_path / "none")


# ---- object stores


@pytest.fixture
def store(monkeypatch):
    """An S3 server on loopback; yields put(key, bytes) for the bucket `crawl`."""
    server = pytest.importorskip(
        "moto.server", reason="needs moto[server], an S3 server"
    ).ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    import boto3

    logging.getLogger("werkzeug").setLevel(logging.ERROR)
    server.start()
    endpoint = "http://{}:{}".format(*server.get_host_and_port())
    for name, value in {
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_ACCESS_KEY_ID": "nobody",
        "AWS_SECRET_ACCESS_KEY": "none",
        "AWS_DEFAULT_REGION": "us-east-1",
        "no_proxy": "127.0.0.1",
    }.items():
        monkeypatch.setenv(name, value)
    s3fs = pytest.importorskip("s3fs", reason="pip install -r requirements-s3.txt")
    s3fs.S3FileSystem.clear_instance_cache()
    client = boto3.client("s3", endpoint_url=endpoint)
    client.create_bucket(Bucket="crawl")
    yield lambda key, data: client.put_object(Bucket="crawl", Key=key, Body=data)
    server.stop()


def test_files_in_an_object_store_are_read_as_those_on_a_disk(tmp_path, store, monkeypatch):
    pq.write_table(pa.table({"text": ["parquet one", "parquet two"]}), tmp_path / "p.parquet")
    files = {
        "d/a.txt": b"text",
        "d/lr=[1e-3]/a.txt": b"brackets",
        "d/lr=1/a.txt": b"no brackets",
        "d/deep/b.txt.gz": gzip.compress(b"packed text"),
        "d/j.jsonl": lines("one", "two"),
        "d/w.warc.gz": b"".join(map(gzip.compress, crawl())),
        "d/z.jsonl.zst": pa.compress(lines("zst"), codec="zstd", asbytes=True),
        "d/p.parquet": (tmp_path / "p.parquet").read_bytes(),
    }
    for key, data in files.items():
        store(key, data)
        (tmp_path / key).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / key).write_bytes(data)
    for source in (
        "text:{}/d/**/*.txt*",
        "text:{}/d/lr=[1e-3]/*.txt",
        "text:{}/d/lr=[1e-3]/a.txt",
        "text:{}/d/lr=[0-9]/a.txt",
        "jsonl:{}/d/*.jsonl*",
        "parquet:{}/d/p.parquet",
        "x=warc:{}/d/*.warc.gz",
    ):
        there, here = (
            list(sources.parse_source(source.format(root)).iterate_documents())
            for root in ("s3://crawl", tmp_path)
        )
        assert there == here != []
    with pytest.raises(
        UserError,
        match=r"no file matches s3://crawl/none/\*\. Check the address and the credentials",
    ):
        sources.parse_source("text:s3://crawl/none/*")
    with pytest.raises(UserError, match=r"s3://nowhere/\*|no file matches s3://nowhere"):
        sources.parse_source("text:s3://nowhere/*")


def test_another_object_under_the_same_name_is_another_input(tmp_path, store):
    store("a.jsonl", lines("one"))
    asked = PrepareConfig(sources=("jsonl:s3://crawl/*.jsonl",), heldout_frac=0.0)
    made = prepare.prepare_corpus(asked, tmp_path / "run")
    assert prepare.prepare_corpus(asked, tmp_path / "run") == made
    store("a.jsonl", lines("two"))  # as many bytes
    with pytest.raises(UserError, match=r"another config .*installed"):
        prepare.prepare_corpus(asked, tmp_path / "run")


def test_a_document_of_a_corpus_is_read_by_the_id_that_the_corpus_gave_it(tmp_path):
    texts = {"sea/a.txt": "The sea.", "sea/b/c.txt": "The ship."}
    columns = {"id": list(texts), "source": ["sea"] * 2, "text": list(texts.values())}
    columns |= {"prompt_chars": [0, 0], "meta": [None, None]}
    table = pa.table(columns, schema=rows.CORPUS_SCHEMA)
    pq.write_table(table, tmp_path / "x-00000.parquet")
    for name, expected in (("sea", list(texts)), ("held", [f"held/{id}" for id in texts])):
        found = list(parse_source(f"{name}=parquet:{tmp_path}/*.parquet#text").iterate_documents())
        assert {document.id: document.text for document in found} == dict(
            zip(expected, texts.values(), strict=True)
        )
    assert rows.CORPUS_SCHEMA.names == parquet.CORPUS_COLUMNS
