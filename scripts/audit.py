"""Whether known vulnerabilities are in the installed dependencies; skipped, with the reason, where that can't be asked.

`python -m scripts.audit` exits with 1 when pip-audit (2.7 and later) finds some, with 0 otherwise.
"""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Sequence
from typing import Any

SECONDS = 120
"""How long the data may take to come."""
COMMAND = ("-m", "pip_audit", "--local", "--format=json", "--progress-spinner=off", "--timeout=15")


def audit(command: Sequence[str], seconds: float = SECONDS) -> tuple[int, str]:
    """Runs pip-audit; its exit code for us, and what to say.

    Args:
        command: The command line.
        seconds: How long it may take.
    """
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except (OSError, subprocess.TimeoutExpired) as failure:
        return 0, f"audit skipped: {failure}"
    try:
        found: Any = json.loads(done.stdout)
        packages = found["dependencies"]
    except (ValueError, LookupError, TypeError):  # it has no answer without its data
        lines = done.stderr.strip().splitlines()
        return 0, f"audit skipped: {lines[-1] if lines else f'pip-audit ended with {done.returncode}'}"
    holes = [
        f"{package['name']} {package['version']}: {hole['id']}, mended in {', '.join(hole['fix_versions']) or 'none yet'}"
        for package in packages
        for hole in package.get("vulns", ())
    ]
    return int(bool(holes)), "\n".join(
        ["audit found:", *holes]
    ) if holes else f"audit: {len(packages)} packages, no holes"


def main() -> int:
    """Audits this interpreter's packages."""
    if importlib.util.find_spec("pip_audit") is None:
        code, text = 0, "audit skipped: pip-audit is not installed (it is in the extra `dev`)"
    else:
        code, text = audit([sys.executable, *COMMAND])
    print(text)
    return code


if __name__ == "__main__":
    sys.exit(main())
