"""What a probe has found of a teacher, and which settings of a config that speaks against. Nothing is asked here."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from omniopd.errors import ConfigError
from omniopd.types import Usage
from teachers.ladder import Rung

Verdict = Literal["confirmed", "refuted", "unknown"]

VERSION = 1


@dataclass(frozen=True, slots=True)
class Finding:
    """One answer. `value` is a number where there is one: a ceiling, a rate, seconds."""

    name: str
    verdict: Verdict
    found: str
    value: float | None = None


@dataclass(frozen=True)
class Record:
    """What a probe found, as the store and the run's manifest keep it.

    `model` is the name in the reply, `rung` the best one that was proved (else the last, which needs no proof), `usage` what
    the probe cost without its pilot, `pilot` what the pilot used (see `omniopd.pilot`).
    """

    fingerprint: str
    at: str
    model: str
    rung: Rung
    findings: tuple[Finding, ...]
    usage: Usage
    pilot: Mapping[str, Any] | None = None
    version: int = VERSION

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self)


def disproved(config: Any, record: Mapping[str, Any]) -> list[str]:
    """The settings that a probe speaks against, a sentence each that names the field and the mend.

    Args:
        config: the teacher's settings.
        record: a `Record` as plain data.
    """
    by_name = {found["name"]: found for found in record["findings"]}
    refuted = {name: found["found"] for name, found in by_name.items() if found["verdict"] == "refuted"}
    ceiling = by_name.get("gen_logprobs", {})
    most = ceiling.get("value") if ceiling.get("verdict") == "confirmed" else None
    heated = config.temperature not in (None, 1.0)
    rung = config.continuation
    others = "auto" if f"continuation.{record['rung']}" in refuted else f"{record['rung']} or auto"
    named = (  # the field, whether the config relies on it, the finding, the mend
        ("continuation", rung != "auto", f"continuation.{rung}", f"set {others}"),
        ("n", getattr(config, "n", "auto") is True, "n", "set auto or false"),
        ("seed", getattr(config, "seed", "auto") is True, "seed", "set auto or false"),
        ("temperature", heated, "temperature", "set 1.0, or null to send none"),
        ("logprobs", config.logprobs > 0, "gen_logprobs", "set 0"),
        ("logprobs", config.logprobs > 0 and heated, "logprobs_before_temperature", "set teacher.temperature to 1.0"),
        ("thinking", config.thinking == "off", "no_thinking", "set default, with room in teacher.thinking_tokens"),
        (
            "thinking_tokens",
            "no_thinking" in refuted,
            "answer",
            "raise it until text is left, or set teacher.thinking: off",
        ),
    )
    wrong = [
        f"teacher.{field}: the probe found otherwise ({refuted[name]}); {mend}"
        for field, relied_on, name, mend in named
        if relied_on and name in refuted
    ]
    if most is not None and config.logprobs > most:
        wrong.append(f"teacher.logprobs: {config.logprobs} is more than the {most:.0f} that the probe found; lower it")
    return wrong


def refuse_disproved(config: Any, record: Mapping[str, Any] | None) -> None:
    """Refuse a config that relies on what its teacher was seen not to do.

    Raises:
        ConfigError: the first such setting.
    """
    if record is not None and (wrong := disproved(config, record)):
        raise ConfigError(f"{wrong[0]}, or probe again if the server has changed")
