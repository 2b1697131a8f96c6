"""Makes `benchmarks` importable; the root goes last, so that `sagan_fast` stays the installed one."""

import sys
from pathlib import Path

ROOT = str(Path(__file__).parents[2])
if ROOT not in sys.path:
    sys.path.append(ROOT)
