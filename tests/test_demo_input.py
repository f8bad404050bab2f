"""What a user's own files can get wrong in a demo: one line that names the file and the place, without a traceback."""

from __future__ import annotations

import re
import runpy
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parent.parent
NAMES = "x_km,y_km,head_m,std_m\n"
GOOD = "0.5,0.5,1.0,0.05\n"


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (NAMES + GOOD + "\n" + "0.5,0.6,abc,0.05\n", "line 4: expected numbers x_km,y_km,head_m,std_m; found 0.5,0.6,abc,0.05"),
        (NAMES + GOOD + "0.5,0.6,1.0\n", "line 3: expected numbers"),
        (NAMES + "0.5,0.6,nan,0.05\n", "line 2: expected numbers"),
        (GOOD + GOOD, "line 1: expected a line of names"),
        (NAMES, "has no numbers"),
        ("", "has no numbers"),
        ("\xff", "cannot be read"),
        (None, "cannot be read"),
    ],
    ids=["no number", "a column less", "nan", "no names", "names alone", "empty", "no text", "no file"],
)
def test_wells_of_the_aquifer(tmp_path: Path, content: str | None, words: str) -> None:
    heads = tmp_path / "my.csv"
    if content is not None:
        heads.write_text(content, encoding="latin-1")
    read_columns = runpy.run_path(str(REPOSITORY / "demos" / "demo_aquifer.py"))["read_columns"]
    with pytest.raises(SystemExit, match=re.escape(str(heads)) + ".*" + re.escape(words)):
        read_columns(heads, NAMES.strip())
