"""A model's chat template with its tokenizer, so that only the template writes control tokens.

Used by the student, by teachers in process, and by every teacher whose prompts are rendered here (the rung `raw`).
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Sequence

from jinja2 import TemplateError
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from omniopd.errors import ConfigError, OmniError
from omniopd.types import Message
from omniopd.vocabulary import Vocabulary

_MARK = "\ue000{}\ue001"  # stands for the text of a control token while the template runs


class ChatTemplate:
    """Renders chats for one model. `digest` names template and vocabulary: what is rendered depends on nothing else."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        self.tokenizer = tokenizer
        controls = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
        longest_first = sorted(controls, key=len, reverse=True)
        self._control = re.compile("|".join([*map(re.escape, longest_first), "\ue000\\d+\ue001"]))
        source = f"{tokenizer.chat_template}{sorted(tokenizer.get_vocab().items())}"
        self.digest = hashlib.sha256(source.encode()).hexdigest()[:16]
        self.vocabulary = Vocabulary(tokenizer)

    @classmethod
    def load(cls, path: str, field: str, error: type[OmniError] = ConfigError) -> ChatTemplate:
        """The template of a model folder or hub id; `field` is the setting that names it.

        Raises:
            OmniError: of the given type: there is no fast tokenizer with a chat template.
        """
        try:
            tokenizer = AutoTokenizer.from_pretrained(path)
        except Exception as problem:  # the library raises a different type for every way in which this fails
            raise error(f"{field}: '{path}' has no tokenizer that loads: {first_line(problem)}") from None
        if not tokenizer.is_fast:
            raise error(f"{field}: '{path}' has a slow tokenizer without character offsets; use its fast version")
        if not tokenizer.chat_template:
            raise error(f"{field}: the tokenizer of '{path}' has no chat template; use an instruct model or add one")
        return cls(tokenizer)

    def ids(self, messages: Sequence[Message], *, open_turn: bool = False) -> tuple[int, ...]:
        """The chat as token ids, ready for what follows: a new assistant turn, or (`open_turn`) more of the last one.

        Where a message holds the text of a control token, it stays text.

        Raises:
            ValueError: the template refuses the messages.
        """
        text, hidden = self._render(messages, open_turn)
        parts = re.split("\ue000(\\d+)\ue001", text)
        ids = tuple(self.tokenizer(parts[0], add_special_tokens=False).input_ids)
        for place, after in zip(parts[1::2], parts[2::2], strict=True):
            ids += (*self.encode(hidden[int(place)])[0], *self.tokenizer(after, add_special_tokens=False).input_ids)
        return ids

    def text(self, messages: Sequence[Message], *, open_turn: bool = False) -> str:
        """The chat as text, for servers that tokenize it themselves; there the text of a control token becomes one.

        Raises:
            ValueError: the template refuses the messages.
        """
        text, hidden = self._render(messages, open_turn)
        return re.sub("\ue000(\\d+)\ue001", lambda mark: hidden[int(mark[1])], text)

    def unopened(self, text: str) -> str:
        """A rendered chat without the beginning-of-text token that a server's tokenizer writes by itself (trap R2)."""
        bos = self.tokenizer.bos_token
        writes = bos and self.tokenizer("").input_ids[:1] == [self.tokenizer.bos_token_id]
        return text.removeprefix(bos) if writes else text

    @property
    def end_of_turn(self) -> int:
        """The id that closes an assistant's turn.

        Raises:
            ConfigError: neither the template nor the tokenizer has one.
        """
        if not self.vocabulary.turn_ends:
            name = self.tokenizer.name_or_path or "this model"
            raise ConfigError(f"the tokenizer of {name} has no token that ends an answer; set its eos_token")
        return self.vocabulary.turn_ends[0]

    def encode(self, text: str) -> tuple[list[int], list[tuple[int, int]]]:
        """Token ids of plain text, and each token's span of characters. No text becomes a control token."""
        encoded = self.tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, split_special_tokens=True)
        return encoded["input_ids"], encoded["offset_mapping"]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of these ids, without control tokens."""
        return str(self.tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False))

    def _render(self, messages: Sequence[Message], open_turn: bool) -> tuple[str, list[str]]:
        hidden: list[str] = []

        def hide(control: re.Match[str]) -> str:
            hidden.append(control[0])
            return _MARK.format(len(hidden) - 1)

        chat = [{"role": m.role, "content": self._control.sub(hide, m.content)} for m in messages]
        try:
            text = self.tokenizer.apply_chat_template(
                chat, tokenize=False, add_generation_prompt=not open_turn, continue_final_message=open_turn
            )
        except TemplateError as error:
            raise ValueError(first_line(error)) from None
        return str(text), hidden


def first_line(error: Exception) -> str:
    """What a library's exception says, in one line."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]
