"""Text that anybody may have written: from a regular file, of bounded size, in UTF-8."""

from pathlib import Path

from ..errors import UserError


def read_text(path: Path, most: int, way_out: str) -> str:
    """A file's text, without a byte order mark. Raises UserError, which ends in `way_out`.

    most: bytes that the file may have.
    """
    try:
        if not path.exists():
            raise UserError(f"{path}: no such file. {way_out}")
        if not path.is_file():  # a pipe never ends, nor does /dev/zero
            raise UserError(f"{path}: not a regular file. {way_out}")
        with path.open("rb") as file:
            content = file.read(most + 1)
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}). {way_out}") from None
    if len(content) > most:
        raise UserError(f"{path}: larger than {most >> 20} MB. {way_out}")
    try:
        text = content.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise UserError(f"{path}: not a text file in UTF-8. {way_out}") from None
    if "\0" in text:
        raise UserError(f"{path}: not a text file. {way_out}")
    return text
