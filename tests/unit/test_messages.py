"""Messages: one printable line, of a length that is read."""

import pytest
import torch

from dmd_train.distil import StepReport
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


def test_a_bar_says_the_losses_that_it_has_names_for_and_no_others_of_their_name() -> None:
    said = {
        "student/adversarial": 1.0,
        "critic/adversarial": 2.0,
        "critic/regression": 3.0,
        "critic/denoising": 4.0,
        "student/regression": 5.0,
        "student/gradient_norm": 6.0,
    }
    values = {name: torch.tensor(value) for name, value in said.items()}
    assert StepReport(1, 2, values, None).losses() == "reg 5.000  critic 4.000"


def test_a_long_message_keeps_its_subject_and_its_way_out() -> None:
    said = str(UserError(f"run.yaml: {'x' * 5_000_000}. Choose another."))
    assert said.startswith("run.yaml: xxx") and said.endswith("xxx. Choose another.")
    assert len(said) <= LONGEST
