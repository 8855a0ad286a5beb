"""The pages of docs/methods/, one for each method and part and an index, from nothing but the code.

python -m omniopd.catalogue            # write them
python -m omniopd.catalogue --check    # exit 1 where one differs from what is there
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import omniopd.draft
from omniopd.catalogue.entries import Entry, entries
from omniopd.catalogue.settings import Option, as_yaml
from omniopd.catalogue.source import Code, lines_of
from omniopd.part import Place

FOLDER = Path("docs/methods")
HEAD = "<!-- Made by `make docs` from the code; edit that. -->"
UP = "../../"  # from the folder to the repository's root

INTRODUCTION = """\
A *method* says where the teacher is asked and what becomes of its evidence; a *part* changes one thing about that. Most
methods are plain distillation (`opd`) with parts. `omniopd methods NAME` prints any of these pages, those of methods
that another package brings too; [adding a method](../adding-a-method.md) shows how one is written."""

SIZES = """\
What a method adds to the project, docstrings and settings included; the step (`omniopd/run.py`) knows of none of them.
Recipes are short because their parts are files of their own. Longer ones say how a teacher is asked as well: `omniopd`
chooses chunks, compares and places; `gad`, `ovd` and `ropd` go through several rounds with a discriminator or a judge; `opd`
is two forms with their refusals. Of the parts, `fork_guidance` and `lookahead` ask by themselves, `adaptive_window` looks at
gradients, and `kl_stop`, `rock_tokens` and `teachability` keep statistics over steps."""

COMPOSING = """\
A method brings its own parts; `method.parts` states others, of any method, in any order:

```yaml
method: {name: fire}                                                                  # a recipe: opd with two parts
method: {name: opd, parts: [trajectory_filter, {name: entropy_weights, alpha: 0.5}]}  # its parts, written out
method: {name: omniopd, parts: [trajectory_filter]}                                   # what no paper has
```

Parts act in a fixed order, whatever the order in the config; those of one place in the order of their names. What a later
one counts (a quantile, a mean, a number of tokens), it counts over what earlier ones have left. A part whose settings
change nothing is left out, so that a method in its neutral settings is the plain one to the last bit. With
`control: shuffled` what the parts decide is dealt out at random, which shows whether it matters what they decide."""


def pages() -> dict[Path, str]:
    """Every page by its path from the repository's root, of methods and parts that come with this package."""
    methods, parts = ([one for one in entries(kind) if one.ours] for kind in ("method", "part"))
    found = {FOLDER / "README.md": index(methods, parts)}
    return found | {FOLDER / file_of(one): page(one) for one in [*methods, *parts]}


def write(root: Path) -> None:
    """Write all pages, and delete those of methods that are gone."""
    made = pages()
    (root / FOLDER).mkdir(parents=True, exist_ok=True)
    for path in (root / FOLDER).glob("*.md"):
        if path.relative_to(root) not in made:
            path.unlink()
    for relative, text in made.items():
        (root / relative).write_text(text, encoding="utf-8")


def stale(root: Path) -> list[Path]:
    """Pages that are not what the code says: changed, missing, or of a method that is gone."""
    made = pages()
    there = {path.relative_to(root): path.read_text(encoding="utf-8") for path in (root / FOLDER).glob("*.md")}
    return sorted(path for path in made.keys() | there.keys() if made.get(path) != there.get(path))


def file_of(one: Entry) -> str:
    """The page's file name: methods and parts have names of their own kind."""
    name = one.name.replace("/", "-")
    return f"{name}.md" if one.kind == "method" else f"part-{name}.md"


# ------------------------------------------------------------------ one page


def page(one: Entry) -> str:
    """The page of one method or part."""
    sections = [HEAD, f"# {one.name}", f"{one.title}.", _facts(one), "## What it does", f"```text\n{one.text}\n```"]
    if one.parts:
        sections += [
            "## Parts",
            "\n".join(f"- [{part['name']}](part-{part['name']}.md): `{as_yaml(part)}`" for part in one.parts),
        ]
    if one.refuses or one.warns or not one.dense:
        sections += ["## Conflicts", "\n".join(f"- {line}" for line in _conflicts(one))]
    sections += ["## Options", _options(one.options), "## Code"]
    sections += [_quoted(code) for code in [*one.hooks, *one.functions]]
    if one.called:
        sections += [
            "Called:",
            "\n".join(f"- `{code.name}` in {_link(code.place)}: {code.words}" for code in one.called),
        ]
    return "\n\n".join(sections) + "\n"


def _facts(one: Entry) -> str:
    rows = {
        "Kind": f"{one.kind}{f' over [{one.base}]({one.base}.md)' if one.base else ''}",
        "Acts at": f"`{one.order}` ([order](README.md#order))" if one.order else "",
        "Slots": ", ".join(one.slots),
        "Needs": ", ".join(one.needs) or "nothing beside what the method needs that it is part of",
        "With a teacher of text only": one.text_only,
        "Paper": f"[arXiv {one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else "",
        "Neutral": _neutral(one),
        "Code": _link(one.place),
    }
    return _table(["", ""], [[f"**{name}**", value] for name, value in rows.items() if value])


def _neutral(one: Entry) -> str:
    if isinstance(one.neutral, str):
        return one.neutral
    stated = f"`{as_yaml(dict(one.neutral))}`" if one.neutral else "its defaults"
    return (
        f"{stated} is `{as_yaml(dict(one.plain))}` to the last bit"
        if one.kind == "method"
        else f"{stated} changes nothing"
    )


def _options(found: Sequence[Option]) -> str:
    rows = [[f"`{one.name}`", f"`{one.default}`", one.allowed, one.description] for one in found]
    return _table(["setting", "default", "may be", ""], rows) if rows else "None."


def _conflicts(one: Entry) -> Iterator[str]:
    yield from (f"not with `{other}`: {mend}" for other, mend in one.refuses.items())
    yield from (f"with `{other}` only knowingly: {why}" for other, why in one.warns.items())
    if not one.dense:
        yield "not with `form: dense`, which has no advantage of the token that was sampled"


def _quoted(code: Code) -> str:
    return f"`{code.name}` in {_link(code.place)}\n\n```python\n{code.source}\n```"


def _link(place: str) -> str:
    return f"[{place}]({UP}{place})" if place.endswith(".py") else f"`{place}`"


# ------------------------------------------------------------------ the index


def index(methods: Sequence[Entry], parts: Sequence[Entry]) -> str:
    """The page that leads to the others."""
    law = inspect.cleandoc(omniopd.draft.__doc__ or "").partition("\n\n")[2]
    return "\n\n".join(
        [
            HEAD,
            "# Methods and parts",
            INTRODUCTION,
            "## Methods",
            _table(["method", "what it is", "over", "slots", "needs", "text only", "paper"], map(_method_row, methods)),
            "Slots of a method that extends another are those in which it differs. *Text only*: whether a teacher that "
            "returns only text will do; *partly* where some of its parts do without more, as parts of `omniopd`.",
            "## Parts",
            _table(["part", "what it does", "acts at", "slots", "needs", "in"], [_part_row(one, methods) for one in parts]),
            "## Composing",
            COMPOSING,
            "## Order",
            _table(["place", "what is decided there", "parts"], list(_order(parts))),
            "What they have decided becomes the loss by one law (`omniopd/draft.py`):",
            f"```text\n{law}\n```",
            "## Conflicts",
            _table(["part", "with", "", "why, and the mend"], list(_all_conflicts(parts))),
            "## Sizes",
            SIZES,
            _table(["method", "lines", "its parts, with their lines"], [_size_row(one, parts) for one in methods]),
        ]
    ) + "\n"  # fmt: skip


def _method_row(one: Entry) -> list[str]:
    paper = f"[{one.paper}](https://arxiv.org/abs/{one.paper})" if one.paper else ""
    names = [f"[{one.name}]({file_of(one)})", one.title, one.base, ", ".join(one.slots)]
    return [*names, ", ".join(one.needs), one.text_only, paper]


def _part_row(one: Entry, methods: Sequence[Entry]) -> list[str]:
    users = [method.name for method in methods if one.name in [part["name"] for part in method.parts]]
    link = f"[{one.name}]({file_of(one)})"
    return [link, one.title, one.order, ", ".join(one.slots), ", ".join(one.needs), ", ".join(users)]


def _size_row(one: Entry, parts: Sequence[Entry]) -> list[str]:
    own = {part["name"] for part in one.parts}
    theirs = [f"{part.name} {lines_of(part.place)}" for part in parts if part.name in own]
    return [_link(one.place), str(lines_of(one.place)), ", ".join(theirs)]


def _order(parts: Sequence[Entry]) -> Iterator[list[str]]:
    """The places, with the words that stand beside them in the code."""
    words = dict(re.findall(r"^\s+(\w+) = \d+\s+# (.+)$", inspect.getsource(Place), re.MULTILINE))
    for place in Place:
        there = [f"[{one.name}]({file_of(one)})" for one in parts if one.order == place.name.lower()]
        yield [f"{place.value} {place.name.lower()}", words[place.name], ", ".join(there)]


def _all_conflicts(parts: Sequence[Entry]) -> Iterator[list[str]]:
    for one in parts:
        yield from ([one.name, other, "refused", mend] for other, mend in one.refuses.items())
        yield from ([one.name, other, "warned of", why] for other, why in one.warns.items())
        if not one.dense:
            yield [one.name, "form: dense", "refused", "there is no advantage of a sampled token; set form: sampled"]


def _table(head: Sequence[str], rows: Any) -> str:
    """A Markdown table; bars inside a cell would end it."""
    lines = [head, ["---"] * len(head), *rows]
    safe = [[cell.replace("|", "\\|") for cell in line] for line in lines]
    return "\n".join(f"| {' | '.join(line)} |" for line in safe)
