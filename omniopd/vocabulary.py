"""The bytes that each token of a tokenizer spells: the common ground of tokenizer families.

Positions count bytes of a text in UTF-8. A token of no width spells nothing: a control token, or the space that some
SentencePiece models put before every text.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerBase

from omniopd.errors import ConfigError
from omniopd.spelling import Spelling, laid_over, spelled_by

MARK = "\u2581"  # SentencePiece writes it for a space
_BYTE = re.compile("<0x([0-9A-F]{2})>")  # SentencePiece writes it for a single byte
_ANSWER = "\ue002"  # a message that no template has in it
_PROBE = " A  \u00e9\t\n"  # what lower-casing, stripping or tidying would change


def _letters() -> dict[str, int]:
    """What byte-level BPE writes for each byte (GPT-2): its Latin-1 character if that is visible, else one from 256 on."""
    visible = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in visible]
    return {chr(byte): byte for byte in visible} | {chr(256 + i): byte for i, byte in enumerate(others)}


_LETTERS = _letters()


class Vocabulary:
    """What a tokenizer's ids mean.

    Attributes:
        digest: equal for two tokenizers if, and only if, every id means the same in both (padded sizes do not count).
        size: ids from here on are padding of the model's output layer and mean nothing.
        controls: ids that spell nothing.
        lossy: why its tokens can't be laid over a text byte for byte; "" if they can.
    """

    digest: str
    size: int
    controls: frozenset[int]
    lossy: str

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Read the vocabulary of a fast tokenizer: byte-level BPE, SentencePiece with byte fallback, tiktoken-style."""
        self.tokenizer = tokenizer
        self._tokens: dict[str, int] = tokenizer.get_vocab()
        self.size = max(self._tokens.values(), default=-1) + 1
        self._names = {id: token.content for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.controls = frozenset(self._names)
        self._steps = _decoding(self._backend.decoder)
        self._byte_level = any(step["type"] == "ByteLevel" for step in self._steps)
        self._drops_space = any(map(_drops_space, self._steps))
        self.lossy = self._loss()
        meaning = [self._byte_level, sorted(self._tokens.items()), sorted(self.controls)]
        self.digest = hashlib.sha256(json.dumps(meaning).encode()).hexdigest()[:16]

    @cached_property
    def bytes_of(self) -> tuple[bytes, ...]:
        """[size] what each id spells amid others; b"" for control tokens.

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        self._refuse_loss()
        marks = any(map(_reads_mark, self._steps))
        named_bytes = any(step["type"] == "ByteFallback" for step in self._steps)
        spelled = [b""] * self.size
        for token, id in self._tokens.items():
            if id in self.controls:
                continue
            if self._byte_level and all(letter in _LETTERS for letter in token):
                spelled[id] = bytes(_LETTERS[letter] for letter in token)
            elif named_bytes and (byte := _BYTE.fullmatch(token)):
                spelled[id] = bytes.fromhex(byte[1])
            else:
                spelled[id] = (token.replace(MARK, " ") if marks else token).encode()
        return tuple(spelled)

    @cached_property
    def turn_ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the first control token that the chat template writes behind one, then the end of text."""
        chat = [{"role": "user", "content": "?"}, {"role": "assistant", "content": _ANSWER}]
        try:
            text = str(self.tokenizer.apply_chat_template(chat, tokenize=False))
        except (TemplateError, ValueError):  # a template that refuses such a chat, or none
            text = ""
        behind = text.rpartition(_ANSWER)[2]
        control = {name: id for id, name in self._names.items() if name in behind}
        first = min(control, key=lambda name: (behind.index(name), -len(name)), default="")
        ends = [control.get(first), self.tokenizer.eos_token_id]
        return tuple(dict.fromkeys(id for id in ends if id is not None))

    def spell(self, ids: Sequence[int]) -> Spelling:
        """The text that ids spell, without the half character that a token limit may leave at its end.

        Tokens of that half character have the end None and are broken.

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        bytes_of = self.bytes_of
        pieces = [bytes_of[id] if id < self.size else b"" for id in ids]
        if self._drops_space:
            _drop_space(pieces)
        return spelled_by(ids, pieces)

    def cut(self, text: str) -> Spelling:
        """A plain text as the tokenizer cuts it; no text becomes a control token.

        Where it cuts a text that it has changed, the tokens there are broken (see `laid_over`).

        Raises:
            ConfigError: the vocabulary is lossy.
        """
        self._refuse_loss()
        encoded = self._cutter.encode(text)
        pieces = [self.bytes_of[id] for id in encoded.ids]
        if _leading_spaces(b"".join(pieces)) > _leading_spaces(text.encode()):
            _drop_space(pieces)
        return laid_over(text, encoded.ids, pieces, encoded.offsets)

    @property
    def _backend(self) -> Any:
        return self.tokenizer.backend_tokenizer

    @cached_property
    def _cutter(self) -> Any:
        """The tokenizer for plain text only, with offsets that include white space.

        A copy, because these are settings of the object, which others use with settings of their own.
        """
        cutter: Any = Tokenizer.from_str(self._backend.to_str())
        cutter.encode_special_tokens = True
        cutter.post_processor = None
        cutter.no_truncation()
        cutter.no_padding()
        return cutter

    def _loss(self) -> str:
        strange = [step["type"] for step in self._steps if not _keeps_bytes(step)]
        if strange or not self._steps:
            return f"its decoder ({', '.join(strange) or 'none'}) does not write every token's own bytes"
        normalizer, pre_tokenizer, model = self._backend.normalizer, self._backend.pre_tokenizer, self._backend.model
        normalised = normalizer.normalize_str(_PROBE).replace(MARK, " ") if normalizer else _PROBE
        if _PROBE not in normalised:
            return f"its normaliser makes {normalised!r} of {_PROBE!r}"
        words = pre_tokenizer.pre_tokenize_str(_PROBE) if pre_tokenizer else [(_PROBE, (0, len(_PROBE)))]
        if sum(end - start for _, (start, end) in words) < len(_PROBE):
            return "its pre-tokenizer leaves white space out"
        # A BPE model without an unknown token leaves unknown text out, which shows as a broken stretch.
        has_unknown = type(model).__name__ != "BPE" or model.unk_token is not None
        if has_unknown and not self._byte_level and any(f"<0x{byte:02X}>" not in self._tokens for byte in range(256)):
            return "it has no tokens for single bytes, so that text outside its vocabulary is lost"
        return ""

    def _refuse_loss(self) -> None:
        if self.lossy:
            name = self.tokenizer.name_or_path or "this model"
            raise ConfigError(f"the tokenizer of {name} can't be laid over the bytes of a text: {self.lossy}")


def _decoding(decoder: Any) -> list[dict[str, Any]]:
    """The steps of a decoder of the library `tokenizers`, as its JSON names them."""
    if decoder is None:
        return []
    state = json.loads(decoder.__getstate__())
    return list(state["decoders"]) if state["type"] == "Sequence" else [state]


def _keeps_bytes(step: dict[str, Any]) -> bool:
    return step["type"] in ("ByteLevel", "ByteFallback", "Fuse") or _reads_mark(step) or _drops_space(step)


def _reads_mark(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["replacement"] == MARK)
    return step["type"] == "Replace" and step["pattern"] == {"String": MARK} and step["content"] == " "


def _drops_space(step: dict[str, Any]) -> bool:
    if step["type"] == "Metaspace":
        return bool(step["prepend_scheme"] != "never")
    return step["type"] == "Strip" and (step["content"], step["start"], step["stop"]) == (" ", 1, 0)


def _leading_spaces(spelled: bytes) -> int:
    return len(spelled) - len(spelled.lstrip(b" "))


def _drop_space(pieces: list[bytes]) -> None:
    """Take the space from the front of a text in pieces, if it has one."""
    first = next((i for i, piece in enumerate(pieces) if piece), None)
    if first is not None:
        pieces[first] = pieces[first].removeprefix(b" ")
