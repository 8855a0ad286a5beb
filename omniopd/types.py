"""The shared language of the packages: data only, and nothing imported from them.

Shape suffixes used everywhere: `_B` rollouts of a step, `_T` response tokens, `_M` audited chunks, `_N` teacher
continuations of a chunk, `_C` tokens of a chunk, `_V` vocabulary. Ragged axes are allowed.

A hole in the evidence is a mask and a counted reason, never a zero.
"""

from __future__ import annotations

import operator
from collections import Counter
from collections.abc import AsyncIterable, Callable, Mapping, Sequence
from dataclasses import astuple, dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import torch

if TYPE_CHECKING:
    from omniopd.vocabulary import Vocabulary

Role = Literal["system", "user", "assistant"]
Finish = Literal["stop", "length"]
Author = Literal["student", "initial", "teacher", "mixed"]
Metric = Literal["identity", "adam"]
"""M of inner products `a' M^-1 b` of gradients; adam: `diag(v + mean v)`, v the optimizer's second moments."""


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of a chat."""

    role: Role
    content: str


@dataclass(frozen=True, slots=True)
class Prompt:
    """What the student is asked. `reference` is the right answer, if known; `extras` only a teacher may see."""

    id: str
    messages: tuple[Message, ...]
    reference: str | None = None
    extras: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Rollout:
    """What was written after a prompt, token by token.

    `ids`, `logprobs`, `entropy` and `ends` are all [T]. The end-of-text token belongs to the response: it is the last
    id when `finish` is "stop". `logprobs` and `entropy` (nats) belong to the distribution that *produced* each token,
    exact over the whole vocabulary in fp32, at temperature 1. `ends[t]` is the length of the text, in characters,
    that the tokens up to and including t have completed: a token that ends inside a character completes nothing.
    `version` counts the updates that the weights had seen when they wrote it. The first `given` tokens are the teacher's
    (see `Writing`). `facts` are numbers [T] by name that a method measured where both sides' distributions are at hand
    (see `Method.measure`). `top` [T][K] are the likeliest tokens at each place with their log-probs, best first, where a
    method asks for such `candidates`.
    """

    prompt: Prompt
    prompt_ids: tuple[int, ...]
    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    entropy: tuple[float, ...]
    ends: tuple[int, ...]
    text: str
    finish: Finish
    author: Author = "student"
    version: int = 0
    given: int = 0
    facts: Mapping[str, tuple[float, ...]] = field(default_factory=dict)
    top: tuple[tuple[tuple[int, float], ...], ...] = ()

    def __len__(self) -> int:
        return len(self.ids)


@dataclass(frozen=True, slots=True)
class Writing:
    """How a rollout comes to be. By default the student writes all of it, up to `student.max_new_tokens`.

    Attributes:
        max_tokens: a lower limit, of all its tokens. What is cut there has no end token.
        begins: ids in the student's vocabulary that it begins with.
        whole: these are all of it.
        blank: it has no tokens.
        initial: the initial student writes it, not the present one.
        seed: of its random stream; None: that of its step and row.
    """

    max_tokens: int | None = None
    begins: tuple[int, ...] = ()
    whole: bool = False
    blank: bool = False
    initial: bool = False
    seed: int | None = None


@dataclass(frozen=True, slots=True)
class Chunk:
    """A span [start, end) of one rollout's tokens, C long, that the teacher is asked about.

    The teacher sees `prefix`, the text before the chunk without its trailing white space; that white space opens
    `text`, so that `prefix + text` is the rollout's text up to the chunk's end, byte for byte. Token j of the chunk is
    complete at character `ends[j]` of `text`. `closes` says that the chunk's last token ends the response.
    """

    row: int  # index into the step's rollouts
    start: int
    end: int
    prefix: str
    text: str
    ends: tuple[int, ...]
    closes: bool = False


@dataclass(frozen=True, slots=True)
class ContinueQuery:
    """Go on from `chunk.prefix`, N times, independently, at temperature 1.

    `by`, here and in the other queries, is the part of the method that asks; "": the method itself.
    """

    prompt: Prompt
    chunk: Chunk
    n: int
    max_tokens: int
    seed: int
    by: str = ""

    @property
    def row(self) -> int:
        """The rollout that is gone on from, by its place in the step; every query has one."""
        return self.chunk.row


@dataclass(frozen=True, slots=True)
class AnswerQuery:
    """Answer the prompt, N times, independently. `row` is the rollout that the answers belong beside.

    `judge` sends it to the run's judge: a prompt that asks for a verdict.
    """

    prompt: Prompt
    row: int
    n: int
    max_tokens: int
    seed: int
    judge: bool = False
    by: str = ""


@dataclass(frozen=True, slots=True)
class ScoreQuery:
    """What would you have given each token of this response, which somebody else wrote?

    `ids` [T] are its tokens in the vocabulary whose digest is `vocabulary`. A teacher of the same vocabulary scores them as
    they are; any other cuts `text`, the whole characters that they spell, with its own tokenizer, and scores the end of its
    own turn after it where the response `closes`. `top` asks for so many of the likeliest tokens at each place, `whole` for
    the whole distributions. The ids `after` stand between prompt and `ids` and are only read; of the same vocabulary alone.
    """

    prompt: Prompt
    row: int
    ids: tuple[int, ...]
    vocabulary: str
    text: str
    closes: bool
    top: int = 0
    whole: bool = False
    after: tuple[int, ...] = ()
    by: str = ""

    @property
    def n(self) -> int:
        """One query, one row of scores."""
        return 1


Query = ContinueQuery | AnswerQuery | ScoreQuery


@dataclass(frozen=True, slots=True)
class Token:
    """A token that the teacher wrote: its text, its log-prob (nats), and the likeliest tokens at its place."""

    text: str
    logprob: float
    top: tuple[tuple[str, float], ...] = ()


@dataclass(frozen=True, slots=True)
class Reply:
    """One text of the teacher. `finish` is "length" where the token limit cut it: what would follow is unknown.

    `tokens` are its tokens in the teacher's own vocabulary, where the back end returns log-probs and `teacher.logprobs`
    asks for them; else empty. The first one stands right at the anchor, the end of the student's prefix.
    """

    text: str
    finish: Finish
    tokens: tuple[Token, ...] = ()


@dataclass(frozen=True, slots=True)
class Usage:
    """What calls to a teacher used. `calls` counts HTTP calls, `cached_calls` requests answered from the store.

    `prompt_tokens` is all input; of it the provider's prompt cache served `cache_read_tokens` and took up
    `cache_write_tokens`. `completion_tokens` is all output, of it `reasoning_tokens` hidden.
    """

    calls: int = 0
    cached_calls: int = 0
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost_usd: float = 0.0
    cache_read_tokens: int = 0
    cache_write_tokens: int = 0
    reasoning_tokens: int = 0

    def __add__(self, other: Usage) -> Usage:
        return Usage(*map(operator.add, astuple(self), astuple(other)))

    def __sub__(self, other: Usage) -> Usage:
        return Usage(*map(operator.sub, astuple(self), astuple(other)))


@dataclass(frozen=True, slots=True)
class Continuations:
    """The valid continuations of a chunk's prefix, at most N, and the rest counted by reason.

    `len(replies) + sum(rejected.values()) == query.n`, always. `teacher` is the name of the one that answered, where a
    run has several.
    """

    query: ContinueQuery
    replies: tuple[Reply, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()
    teacher: str = ""


@dataclass(frozen=True, slots=True)
class Answers:
    """The teacher's own answers to a prompt; `rejected` and `teacher` as in `Continuations`."""

    query: AnswerQuery
    replies: tuple[Reply, ...]
    rejected: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()
    teacher: str = ""


@dataclass(frozen=True, slots=True, eq=False)
class Distributions:
    """Next-token distributions at n places, kept as last hidden states [n, D]: no [n, V] tensor is ever stored.

    `head(hidden)` makes the logits [n, V] of (some of) them, at temperature 1.
    """

    hidden: torch.Tensor
    head: Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True, slots=True, eq=False)
class TokenScores:
    """What the teacher gives each of its n tokens of a response, in nats at temperature 1; or the reason why nothing.

    Either `ids` has tokens or `rejected` one reason. `ids` [n] are in the teacher's vocabulary. `ends` [n] counts the bytes
    of `query.text` that the tokens up to each have spelled; None where a token ends inside what the tokenizer changed.
    Tokens of no width spell nothing: the end of the turn, which is the last one where the query `closes`. `logprobs` [n] is
    nan where there is no value. `top` [n] are the likeliest ids with their log-probs, where they were asked for. With them,
    where the teacher cut the text itself, come `openings` [n]: for b = 1 to all bytes of a token, the log-prob of all known
    tokens that start with its first b bytes (see `omniopd.boundary`).
    """

    query: ScoreQuery
    ids: tuple[int, ...] = ()
    ends: tuple[int | None, ...] = ()
    logprobs: tuple[float, ...] = ()
    top: tuple[Mapping[int, float], ...] = ()
    distributions: Distributions | None = None
    openings: tuple[tuple[float, ...], ...] = ()
    vocabulary: Vocabulary | None = None  # the teacher's; None in a replay
    rejected: Mapping[str, int] = field(default_factory=dict)
    usage: Usage = Usage()
    teacher: str = ""


Evidence = Continuations | Answers | TokenScores


def asked_by(evidence: Sequence[Evidence], name: str = "") -> list[Evidence]:
    """What came of the queries of one part; of the method itself, unless a part is named."""
    return [one for one in evidence if one.query.by == name]


@dataclass(frozen=True, slots=True)
class Branch:
    """Tokens that the teacher wrote after the first `at` tokens of rollout `row`, with their weight in the loss.

    `weights` [tokens learned], if there are any, multiply it token by token.

    `at == 0` branches off right after the prompt: a whole answer of the teacher's. The first `context` ids are only read,
    not learned: they spell the student's own prefix where the student's tokenizer would now cut it differently.
    """

    row: int
    at: int
    ids: tuple[int, ...]
    weight: float
    context: int = 0
    weights: tuple[float, ...] = ()


class Target(Protocol):
    """What the teacher says of the next token at the positions of one response: a divergence of the student's logits.

    `blocks` are runs [start, end) of positions whose divergence needs the logits of all of them at once; () if each
    position stands alone.
    """

    blocks: Sequence[tuple[int, int]]

    def divergence(self, logits: torch.Tensor, ids: torch.Tensor, start: int) -> torch.Tensor:
        """Divergence [r] in nats at positions start to start + r, with gradient to the student's logits there.

        Positions about which the teacher says nothing get a finite number that nobody uses (see `Signal.mask_BT`).

        Args:
            logits: [r, V], the student's, in the dtype of its head.
            ids: [r], the tokens that it wrote there.
        """
        ...


@runtime_checkable
class Observing(Protocol):
    """A target that adds up what it saw: `observed["positions"]`, and sums over those positions of whatever else."""

    observed: dict[str, float]


@dataclass(frozen=True, slots=True)
class Signal:
    """Evidence placed on tokens: what the update multiplies -log p with. No gradient flows through any of it.

    `values_BT[b][t]` is a likelihood weight or an advantage, `mask_BT` True where the teacher spoke. Values outside the
    mask are 0 and mean nothing. `targets` [B] are distributions to come near to: each position under the mask adds its
    divergence (`Target`), None where a rollout has none; `weights_BT`, if there are any, multiply it. `branches` are tokens
    of the teacher's to learn from beside the student's own, and `branch_scale` multiplies their part of the loss.
    `drops` counts *chunks* (or answers, or scored responses) by the reason they gave no signal, `rejects` single replies, or
    single tokens of scored responses.
    """

    values_BT: tuple[torch.Tensor, ...]
    mask_BT: tuple[torch.Tensor, ...]
    targets: tuple[Target | None, ...] = ()
    branches: tuple[Branch, ...] = ()
    branch_scale: float = 1.0
    drops: Counter[str] = field(default_factory=Counter)
    rejects: Counter[str] = field(default_factory=Counter)
    stats: Mapping[str, float | None] = field(default_factory=dict)
    audits: Sequence[Mapping[str, Any]] = ()  # JSON records for the report: what was asked, said and scored
    weights_BT: tuple[torch.Tensor, ...] = ()
    spoken: int | None = None  # tokens on which the teacher spoke, where fewer are learned

    @property
    def coverage(self) -> float:
        """Share of the response tokens on which the teacher spoke."""
        tokens = sum(mask.numel() for mask in self.mask_BT)
        spoken = sum(int(mask.sum()) for mask in self.mask_BT) if self.spoken is None else self.spoken
        return spoken / tokens if tokens else 0.0


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What a teacher offers. `continuation` is the rung of the ladder in use: raw, prefill or instruct.

    `gen_logprobs` is how many alternatives it can return for each token that it writes (0: no log-probs). Of given text it
    may tell each token's log-prob (`score`), the `topk` likeliest at each place, and whole distributions (`logits`).
    `vocabulary` is the digest of its `Vocabulary`, "" where its tokenizer is not at hand.
    """

    answer: bool = True
    continuation: Literal["raw", "prefill", "instruct"] | None = None
    score: bool = False
    topk: int = 0
    logits: bool = False
    hidden: bool = False
    gen_logprobs: int = 0
    decode: bool = False
    vocabulary: str = ""


Queries = Sequence[Query] | AsyncIterable[Sequence[Query]]
"""Queries that are all there, or that come one list after another, each list all that is asked about one rollout."""

Heard = Callable[[int, int], None]
"""Hears how many queries are done, of how many that have come so far."""


class Teacher(Protocol):
    """Anything that can be asked. `fingerprint` names everything that can change an answer, and holds no secret.

    `streams` says that queries which come one list after another are sent as they come; a teacher that does not stream is
    asked when all are there. Several gathers may be under way at once.
    """

    fingerprint: str
    streams: bool

    @property
    def capabilities(self) -> Capabilities: ...

    async def gather(self, queries: Queries, progress: Heard | None = None) -> list[Evidence]:
        """Evidence for each query, in the order in which they came. One that fails comes back empty, its reason counted.

        Raises:
            TeacherError: the teacher can't be used at all (unreachable, bad key, out of money).
        """
        ...

    async def close(self) -> None: ...
