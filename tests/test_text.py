"""Test what is laid out for a terminal."""

from jaxpt.text import display_width, format_table, wrap_notes


def test_columns_are_as_wide_as_their_widest_cell_and_lines_end_without_blanks():
    rows = [["", "loss", "note"], ["first", "3.5", ""], ["a", "12.25", "late"]]
    table = "        loss  note\nfirst    3.5\na      12.25  late"
    assert format_table(rows, "<><") == table
    assert (
        format_table(rows, "<", gap=" | ", indent="  ").splitlines()[2] == "  a     | 12.25 | late"
    )


def test_the_last_alignment_holds_for_all_further_columns():
    rows = [["a", "bb", "ccc"], ["aaa", "b", "c"]]
    assert format_table(rows) == "a    bb  ccc\naaa   b    c"


def test_a_wide_character_takes_two_terminal_columns():
    first, second = format_table([["語", "1"], ["abc", "22"]]).splitlines()
    assert display_width(first) == display_width(second) == 7


def test_a_note_is_wrapped_at_80_columns_under_its_bullet():
    first, second = wrap_notes(["word " * 18]).splitlines()
    assert len(first) <= 80 and first.startswith("- ") and second.startswith("  word")
