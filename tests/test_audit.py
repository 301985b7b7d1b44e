"""What `make audit` says; pip-audit by itself reports success where it could look up nothing."""

from tests.audit import judge

CLEAN = {"name": "a", "version": "1", "vulns": []}
LEAKY = {"name": "b", "version": "2", "vulns": [{"id": "CVE-1", "fix_versions": ["3"]}]}
UNKNOWN = {"name": "c", "skip_reason": "Dependency not found on PyPI and could not be audited: c (1)"}


def test_nothing_known_is_not_nothing_looked_up():
    assert judge([CLEAN]) == (0, "1 packages audited, 0 known vulnerabilities")
    status, text = judge([UNKNOWN, UNKNOWN])
    assert status == 2 and text.startswith("NOT AUDITED")


def test_what_is_known_and_what_was_left_out_is_said():
    status, text = judge([CLEAN, LEAKY, UNKNOWN])
    assert status == 1
    assert "b 2: CVE-1, fixed in 3" in text and text.endswith("does not know them: c")
