"""The borders between packages, as docs/architecture.md draws them."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = ("omniopd", "teachers", "students", "evals")
SHARED = {
    "omniopd.types",
    "omniopd.spelling",
    "omniopd.vocabulary",
    "omniopd.errors",
    "omniopd.registry",
    "omniopd.settings",
    "omniopd.version",
}
MAY_IMPORT = {
    "omniopd/types.py": {"omniopd.vocabulary"},  # for annotations only
    "omniopd/spelling.py": set(),
    "omniopd/vocabulary.py": {"omniopd.errors", "omniopd.spelling"},
    "omniopd/vocabulary_map.py": SHARED,
    "omniopd/alignment.py": SHARED,
    "omniopd/boundary.py": SHARED,
    "omniopd/credit.py": SHARED | {"omniopd.alignment"},
    "omniopd/targets/": SHARED | {"omniopd.losses", "omniopd.targets", "omniopd.alignment", "omniopd.vocabulary_map"},
    "omniopd/errors.py": set(),
    "omniopd/registry.py": {"omniopd.errors"},
    "omniopd/settings.py": {"omniopd.registry"},
    "omniopd/chat.py": SHARED,
    "omniopd/threads.py": set(),
    "omniopd/optimal_transport.py": SHARED,
    "omniopd/kv_cache.py": SHARED,
    "omniopd/drawing.py": SHARED,
    "omniopd/decoding.py": SHARED | {"omniopd.kv_cache"},
    "omniopd/blending.py": SHARED | {"omniopd.decoding"},
    "omniopd/sampling.py": SHARED | {"omniopd.blending", "omniopd.decoding", "omniopd.drawing", "omniopd.threads"},
    "omniopd/model.py": SHARED,
    "omniopd/vllm.py": SHARED | {"omniopd.chat"},
    "omniopd/store.py": SHARED,
    "omniopd/ledger.py": SHARED | {"omniopd.store"},
    "omniopd/verification/": SHARED | {"omniopd.verification"},
    "omniopd/losses/": SHARED | {"omniopd.objective", "omniopd.losses"},
    "omniopd/scores/": SHARED | {"omniopd.verification"},
    "omniopd/signals/": SHARED | {"omniopd.verification", "omniopd.signals"},
    "omniopd/scored.py": SHARED
    | {
        "omniopd.alignment",
        "omniopd.boundary",
        "omniopd.credit",
        "omniopd.method",
        "omniopd.objective",
        "omniopd.scored_records",
    },
    "omniopd/scored_records.py": SHARED | {"omniopd.scored"},
    "omniopd/pairs.py": SHARED
    | {"omniopd.branches", "omniopd.losses", "omniopd.method", "omniopd.objective", "omniopd.sampling"},
    "omniopd/rocks.py": SHARED,
    "omniopd/groups.py": SHARED,
    "omniopd/judging.py": SHARED,
    "omniopd/part.py": SHARED | {"omniopd.draft", "omniopd.method", "omniopd.objective"},
    "omniopd/draft.py": SHARED,
    "omniopd/segments.py": SHARED | {"omniopd.method"},
    "omniopd/parts/": SHARED
    | {
        "omniopd.part",
        "omniopd.parts",
        "omniopd.draft",
        "omniopd.method",
        "omniopd.objective",
        "omniopd.blending",
        "omniopd.branches",
        "omniopd.groups",
        "omniopd.measures",
        "omniopd.rocks",
        "omniopd.sampling",
        "omniopd.scored",
        "omniopd.segments",
        "omniopd.losses",
        "omniopd.targets",
        "omniopd.optimal_transport",
        "omniopd.verification",
    },
    "omniopd/methods/": SHARED
    | {
        "omniopd.verification",
        "omniopd.sampling",
        "omniopd.method",
        "omniopd.methods",
        "omniopd.objective",
        "omniopd.branches",
        "omniopd.scored",
        "omniopd.mapped",
        "omniopd.groups",
        "omniopd.judging",
        "omniopd.pairs",
        "omniopd.parts",
        "omniopd.alignment",
        "omniopd.boundary",
        "omniopd.credit",
        "omniopd.losses",
        "omniopd.targets",
        "omniopd.vocabulary_map",
    },
    "teachers/": SHARED
    | {
        "omniopd.store",
        "omniopd.ledger",
        "omniopd.chat",
        "omniopd.sampling",
        "omniopd.threads",
        "omniopd.model",
        "omniopd.vllm",
        "omniopd.boundary",
        "omniopd.judging",  # the wordings that a rule reads
        "teachers",
    },
    "students/": SHARED
    | {
        "omniopd.chat",
        "omniopd.sampling",
        "omniopd.model",
        "omniopd.vllm",
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
    order = [
        "self._before(", "method.writings(", "self._ask(", "method.ask(", "self._write",
        "begun.asked", "self._measured(", "self._together(", "method.read(", "trainer.update", "method.after(",
    ]  # fmt: skip
    places = [step.index(part) for part in order]
    assert places == sorted(places)


def test_test_modules_have_names_of_their_own() -> None:
    """pytest imports a folder's modules by their last name: of two alike, a run of the whole suite takes neither."""
    collected = [path.name for path in (ROOT / "tests").rglob("test_*.py") if "contract" not in path.parts]
    assert sorted(collected) == sorted(set(collected))
