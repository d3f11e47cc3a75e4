"""How an error becomes a part of one line."""

from comol_ds.errors import one_line


def test_one_line_says_that_it_was_cut():
    assert one_line(ValueError("a\n  b\tc")) == "a b c"
    assert one_line(ValueError("a b c"), limit=5) == "a b c"
    assert one_line(ValueError("a b c d"), limit=5) == "a b c ..."
