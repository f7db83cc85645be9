"""Messages: one printable line, of a length that is read."""

import pytest

from dmd_train.errors import LONGEST, UserError, one_line


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31mred", r"\x1b[31mred"),
        ("a\rb\x07", r"a\rb\x07"),
        ("\ud800", r"\ud800"),
        ("gpj.\u202ename", r"gpj.\u202ename"),
        ("\u2028", r"\u2028"),
        ("Grüße 雪 🦊 全角\u3000空白", "Grüße 雪 🦊 全角\u3000空白"),
        ("C:\\runs", "C:\\runs"),
    ],
)
def test_what_would_move_the_cursor_is_written_out(text: str, shown: str) -> None:
    assert str(UserError(text)) == shown
    assert one_line(shown) == shown


def test_a_long_message_keeps_its_subject_and_its_way_out() -> None:
    said = str(UserError(f"run.yaml: {'x' * 5_000_000}. Choose another."))
    assert said.startswith("run.yaml: xxx") and said.endswith("xxx. Choose another.")
    assert len(said) <= LONGEST
