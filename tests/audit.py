"""Known vulnerabilities of the versions in constraints.txt, by pip-audit; says so where its service cannot be reached.

python -m tests.audit      (make audit)

pip-audit itself ends with success where it could look up nothing at all. Exit status: 0 none known, 1 some known, 2 not audited.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

CONSTRAINTS = Path(__file__).resolve().parents[1] / "constraints.txt"
COMMAND = [sys.executable, "-m", "pip_audit", "-r", str(CONSTRAINTS), "--no-deps", "--disable-pip", "--progress-spinner=off", "-f", "json"]


def main() -> int:
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    try:
        status, text = judge(json.loads(done.stdout)["dependencies"])
    except (json.JSONDecodeError, KeyError):
        last = (done.stderr.strip().splitlines() or ["no output"])[-1]
        status, text = 2, f"NOT AUDITED: pip-audit could not reach its vulnerability service, or did not run: {last}"
    print(text)
    return status


def judge(dependencies: list[dict[str, Any]]) -> tuple[int, str]:
    """Exit status and what to say of pip-audit's list of dependencies."""
    skipped = [found["name"] for found in dependencies if "skip_reason" in found]
    known = [f"{found['name']} {found['version']}: {leak['id']}, fixed in {', '.join(leak['fix_versions']) or 'no version yet'}"
             for found in dependencies for leak in found.get("vulns", [])]  # fmt: skip
    audited = len(dependencies) - len(skipped)
    if not audited:
        return 2, f"NOT AUDITED: the vulnerability service knows none of {len(skipped)} packages, so it cannot be reached from here"
    rest = f"; not audited, since the service does not know them: {', '.join(skipped)}" if skipped else ""
    return int(bool(known)), "\n".join([*known, f"{audited} packages audited, {len(known)} known vulnerabilities{rest}"])


if __name__ == "__main__":
    sys.exit(main())
