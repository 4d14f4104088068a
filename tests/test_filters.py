"""Laws of the rules: a drop has its reason, an edit is counted, and a failing rule is named with the documents it failed on."""

import json

import pytest

from jaxpt.data import dedup, filters, rules
from jaxpt.data.sources import Document
from jaxpt.spec import UserError


def documents(*texts: str) -> list[Document]:
    return [Document(f"web/{i}", text) for i, text in enumerate(texts, 1)]


SHOUT = filters.Rule("no_shouting", judge=lambda texts: ["shouts" if text.isupper() else "" for text in texts])
BEES = filters.Rule("bees", edit=lambda texts: [(text.replace("b", ""), text.count("b")) for text in texts])
EXACT = filters.understand("none", ["exact_dedup"])[0]
LONG = filters.Rule("long", judge=lambda texts: ["" if len(text) > 2 else f"{len(text)} left" for text in texts])


def test_rules_see_a_text_as_the_edits_before_them_left_it():
    judged = filters.judge(documents("LOUD", "abba", "bbb", "abcé!", "quiet"), [SHOUT, EXACT, BEES, EXACT, LONG])
    assert judged.failed == [0, 4, 2, 5, 5]
    assert judged.reasons == ["shouts", "2 left", "nothing is left of it", "", ""]
    assert [each.text for each in judged.documents] == ["LOUD", "aa", "bbb", "acé!", "quiet"]
    assert judged.edits == {2: [None, (2, 2, 2), (3, 3, 3), (1, 4, 5), (0, 5, 5)]}, "edits, characters, bytes"
    before, after = ([b"" if text is None else dedup.digest(text.encode()) for text in texts]
                     for texts in ((None, "abba", "bbb", "abcé!", "quiet"), (None, "aa", None, "acé!", "quiet")))  # fmt: skip
    assert judged.marks == {1: before, 3: after}


def test_prompt_and_completion_are_edited_apart():
    halves = filters.Rule("halves", edit=lambda texts: [(text[: len(text) // 2], 1) for text in texts])
    made = filters.judge([Document("a", "abcdefghij", 4), Document("b", "abcdefghij"), Document("c", "abcde", 4)], [halves])
    assert [(each.text, each.prompt_chars) for each in made.documents] == [("abefg", 2), ("abcde", 0), ("abcde", 4)]
    assert made.edits[0][0] == (2, 5, 5) and made.failed == [1, 1, 0], "of c's completion nothing is left"


def test_what_rules_find_out_joins_what_the_source_says():
    def noted(texts):
        for text in texts:
            text.notes["n"] = len(text)
        return [""] * len(texts)

    [made] = filters.judge([Document("a", "abba", 0, '{"url": "é"}')], [filters.Rule("count", judge=noted), BEES]).documents
    assert json.loads(made.meta) == {"url": "é", "n": 4} and made.text == "aa"


@pytest.mark.parametrize("form", ["judge", "edit", "mark"])
def test_a_rule_that_fails_is_named_with_the_documents(form):
    def bad(texts):
        return [("x", 0)] if "short" in texts[0] else {}["key"]

    rule = filters.Rule("mine:bad", **{form: bad})
    with pytest.raises(UserError, match=r"mine:bad raised KeyError \('key'\) on web/1, web/2, web/3 and 1 more"):
        filters.judge(documents(*"abcd"), [rule])
    with pytest.raises(UserError, match=r"mine:bad gave 1 answers for 2 texts \(web/1, web/2\)"):
        filters.judge(documents("short", "b"), [rule])


# ---- the rules


@pytest.mark.parametrize(
    ("text", "stays"),
    [
        ("abc\nabc\nabc", True),
        ("abc\nabc", False),
        ("abcdef\nabc\nab\n\n", False),
        ("a\n\n" * 3 + "\n\n".join("bcdefghi"), True),  # 2 of 11
        ("a\n\n" * 4 + "\n\n".join("bcdefgh"), True),  # 3 of 11
        ("a\n\n" * 4 + "\n\n".join("bcdefg"), True),  # 3 of 10: 0.3 is not above 0.3
        ("a\n\n" * 4 + "\n\n".join("bcdef"), False),  # 3 of 9
    ],
)
def test_borders_of_the_course_rules_belong_to_the_document(text, stays):
    rule = rules.line_length if "\n\n" not in text.strip() else rules.paragraph_repetition
    assert (rule(text) == "") == stays


@pytest.mark.parametrize("spare", [-1, 0, 1])
def test_a_fifth_of_repeated_characters_stays(spare):
    text = "\n\n".join(["r" * 100, "u" * 200, "v" * (92 + spare), "r" * 100, ""])
    assert len(text) == 500 + spare
    assert (rules.paragraph_repetition(text) == "") == (spare >= 0)
