"""The borders between packages, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("omniopd", "teachers", "students", "evals")
SHARED = {"omniopd.types", "omniopd.errors", "omniopd.registry", "omniopd.settings", "omniopd.version"}
MAY_IMPORT = {
    "omniopd/types.py": set(),
    "omniopd/errors.py": set(),
    "omniopd/registry.py": {"omniopd.errors"},
    "omniopd/settings.py": {"omniopd.registry"},
    "omniopd/chat.py": SHARED,
    "omniopd/sampling.py": SHARED,
    "omniopd/store.py": SHARED,
    "omniopd/ledger.py": SHARED | {"omniopd.store"},
    "omniopd/verification/": SHARED | {"omniopd.verification"},
    "omniopd/losses.py": SHARED | {"omniopd.objective"},
    "omniopd/scores/": SHARED | {"omniopd.verification"},
    "omniopd/signals/": SHARED | {"omniopd.verification", "omniopd.signals"},
    "omniopd/methods/": SHARED
    | {"omniopd.verification", "omniopd.sampling", "omniopd.method", "omniopd.objective", "omniopd.branches"},
    "teachers/": SHARED | {"omniopd.store", "omniopd.ledger", "omniopd.chat", "omniopd.sampling", "teachers"},
    "students/": SHARED
    | {
        "omniopd.chat",
        "omniopd.sampling",
        "omniopd.losses",
        "omniopd.objective",
        "omniopd.verification.text",
        "students",
    },
    "evals/": SHARED | {"evals"},
}


def imports(path: Path) -> set[str]:
    """Our own modules that a file imports anywhere in it."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found.add(node.module)
    return {name for name in found if name.split(".")[0] in OURS}


@pytest.mark.parametrize("place", MAY_IMPORT)
def test_a_package_imports_only_what_it_may_know(place: str) -> None:
    files = [ROOT / place] if place.endswith(".py") else sorted((ROOT / place).rglob("*.py"))
    assert files
    for path in files:
        strangers = {
            name
            for name in imports(path)
            if not any(name == allowed or name.startswith(allowed + ".") for allowed in MAY_IMPORT[place])
        }
        assert not strangers, f"{path.relative_to(ROOT)} imports {sorted(strangers)}"


def test_the_step_in_run_py_reads_like_the_picture() -> None:
    text = (ROOT / "omniopd" / "run.py").read_text(encoding="utf-8")
    step = text[text.index("async def step(") : text.index("def prompts(")]
    order = ["sampler.sample(", "method.audit(", "self._gather(", "method.read(", "trainer.update("]
    places = [step.index(part) for part in order]
    assert places == sorted(places)
