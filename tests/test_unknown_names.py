"""What messages say of a name that is none of the known ones."""

import subprocess
import sys

import pytest

from multisubject.unknown_names import did_you_mean

KNOWN = {"petrucci": 1, "majesty": 2}


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("petruci", {}, "did you mean 'petrucci'?"),
        ("petruci", {"form": "<{}>", "otherwise": "add it."}, "did you mean '<petrucci>'?"),
        ("guitar", {}, "expected one of petrucci, majesty."),
        ("guitar", {"otherwise": "add it."}, "add it."),
        (5, {}, "expected one of petrucci, majesty."),
    ],
)
def test_a_near_name_is_offered_else_what_was_expected(name, options, expected):
    assert did_you_mean(name, KNOWN, **options) == expected


def test_it_needs_no_torch():
    code = "import sys, multisubject.unknown_names; print('torch' in sys.modules)"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    assert said.stdout.strip() == "False"
