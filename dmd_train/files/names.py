"""What a file or a folder may be called wherever it may be copied to: Linux, macOS, Windows."""

import re

UNPORTABLE = re.compile(r'[\\/:*?"<>|]')
"""Characters that a name may not have on some system."""

LONGEST = 200
"""Bytes of a name: systems take 255, and a file is written under a longer one first."""

DEVICE = re.compile(r"(con|prn|aux|nul|com[0-9¹²³]|lpt[0-9¹²³]|conin\$|conout\$) *(\..*)?", re.I)
"""Names that are devices on Windows, whatever they end in."""


def is_name(name: str) -> bool:
    """Whether a file or a folder may be called so on every system; no path, and not hidden."""
    return (
        0 < len(name.encode("utf-8", "replace")) <= LONGEST
        and name.isprintable()  # no control characters, no half of one
        and not UNPORTABLE.search(name)
        and name[0] not in ". "
        and name[-1] not in ". "
        and not DEVICE.fullmatch(name)
    )
