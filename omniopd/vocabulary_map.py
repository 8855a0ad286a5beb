"""Two vocabularies laid over each other by the bytes that their tokens spell.

Control tokens spell nothing and have no counterpart, but for the ends of a turn: these answer to each other by role.

Source: arXiv 2607.22334 for the longest byte prefix (BPM) [second-hand]; pairs of equal tokens as in GOLD [official code
https://github.com/huggingface/trl], by bytes in place of vocabulary strings, which differ between tokenizer families [ours].
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from functools import lru_cache

import torch
from torch import Tensor

from omniopd.vocabulary import Vocabulary

NONE = -1  # no student token
_FALLBACK = re.compile(r"<0x[0-9A-Fa-f]{2}>")


class VocabularyMap:
    """Teacher ids to student ids.

    Attributes:
        identity: both vocabularies are one, so every id is its own counterpart, control tokens included.
        size: V_T, the teacher's ids without the padding of its output layer.
        prefix: [V_T] phi(w), the longest student token that is a byte prefix of teacher token w, or `NONE`.
        matched: [2, m] pairs (teacher id, student id) that spell equal bytes; no id is in two pairs.
    """

    def __init__(self, teacher: Vocabulary, student: Vocabulary, student_end: int) -> None:
        """Lay one vocabulary over the other; a second or so for 150,000 tokens.

        Args:
            student_end: the id that ends the student's turn.

        Raises:
            ConfigError: one of two different vocabularies is lossy.
        """
        self.identity = teacher.digest == student.digest
        self.size = teacher.size
        self.after = lru_cache(maxsize=4096)(self._after)
        if self.identity:
            self.prefix = torch.arange(self.size)
            self.matched = self.prefix.repeat(2, 1)
            return
        self._student, self._teacher = spellers(student), teacher.bytes_of
        self._longest = max(map(len, self._student), default=0)
        self._words = sorted((spelled, id) for id, spelled in enumerate(teacher.bytes_of) if spelled)
        phi = {id: self.longest_prefix(spelled) for spelled, id in self._words}
        phi |= dict.fromkeys(teacher.turn_ends, student_end)
        self.prefix = torch.tensor([phi.get(id, NONE) for id in range(self.size)], dtype=torch.long)
        pairs = {id: self._student[spelled] for spelled, id in spellers(teacher).items() if spelled in self._student}
        pairs |= dict.fromkeys(teacher.turn_ends[:1], student_end)
        self.matched = torch.tensor(sorted(pairs.items()), dtype=torch.long).reshape(-1, 2).T

    def student_of(self, id: int, spelled: bytes = b"") -> int:
        """What a teacher token counts for once the first bytes of it are spelled: a student token, or `NONE`."""
        return self.longest_prefix(self._teacher[id][len(spelled) :]) if spelled else int(self.prefix[id])

    def longest_prefix(self, spelled: bytes) -> int:
        """The longest student token that these bytes start with, or `NONE`."""
        lengths = range(min(len(spelled), self._longest), 0, -1)
        return next((self._student[spelled[:n]] for n in lengths if spelled[:n] in self._student), NONE)

    def _after(self, spelled: bytes) -> tuple[Tensor, Tensor, Tensor]:
        """Teacher ids that start with `spelled` [n], the student token that what remains of each starts with [n], and
        whether nothing remains [n].

        A teacher token of which nothing remains has no student token: what follows it, another row says.
        """
        if not spelled:
            return torch.arange(self.size), self.prefix, torch.zeros(self.size, dtype=torch.bool)

        def opening(word: tuple[bytes, int]) -> bytes:
            return word[0][: len(spelled)]

        first = bisect_left(self._words, spelled, key=opening)
        words = self._words[first : bisect_right(self._words, spelled, key=opening)]
        ids = torch.tensor([id for _, id in words], dtype=torch.long)
        students = torch.tensor([self.longest_prefix(word[len(spelled) :]) for word, _ in words], dtype=torch.long)
        return ids, students, torch.tensor([word == spelled for word, _ in words])


def spellers(vocabulary: Vocabulary) -> dict[bytes, int]:
    """Bytes to the id that spells them: of several the first that is no byte-fallback token, which a tokenizer takes last."""
    found: dict[bytes, int] = {}
    for id, spelled in enumerate(vocabulary.bytes_of):
        if spelled and (spelled not in found or _is_fallback(vocabulary, found[spelled])):
            found[spelled] = id
    return found


def _is_fallback(vocabulary: Vocabulary, id: int) -> bool:
    return bool(_FALLBACK.fullmatch(str(vocabulary.tokenizer.convert_ids_to_tokens(id))))


_BUILT: dict[tuple[str, tuple[int, ...], str, int], VocabularyMap] = {}


def vocabulary_map(teacher: Vocabulary, student: Vocabulary, student_end: int) -> VocabularyMap:
    """`VocabularyMap`, built once in a process for each pair of digests (and the ends of a turn, which these leave out)."""
    key = (teacher.digest, teacher.turn_ends, student.digest, student_end)
    if key not in _BUILT:
        _BUILT[key] = VocabularyMap(teacher, student, student_end)
    return _BUILT[key]
