"""`python -m omniopd.catalogue [--check]`: see `omniopd.catalogue.pages`."""

import sys
from pathlib import Path

from omniopd.catalogue.pages import stale, write

ROOT = Path(__file__).resolve().parents[2]

if sys.argv[1:] == ["--check"]:
    if old := stale(ROOT):
        sys.exit(f"not what the code says: {', '.join(map(str, old))}; run `make docs`")
else:
    write(ROOT)
