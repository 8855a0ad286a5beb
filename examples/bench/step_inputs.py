"""What the model of a step is fed with: devices, what software gets of them, and how large a step is.

Each number says whether it is [measured] here, from a [datasheet], or [assumed].
"""

from __future__ import annotations

from dataclasses import dataclass, field

from costs import Transformer, response_context

from omniopd.methods.omniopd import OmniOPDConfig


@dataclass(frozen=True)
class Device:
    """A GPU: bytes of memory, bytes a second of memory, dense bf16 FLOP/s, and bytes a second to others, each way."""

    name: str
    memory: float
    bandwidth: float
    rate: float
    link: float  # within a node
    network: float  # between nodes
    per_node: int = 8


# [datasheet] NVIDIA H100 and H200, SXM: bf16 is stated with sparsity, 1,979 TFLOP/s, and dense is half of it; NVLink's
# 900 GB/s are both ways together; a port of 400 Gbit/s for each GPU, as in a DGX.
H100 = Device("H100", 80e9, 3.35e12, 989e12, 450e9, 50e9)
H200 = Device("H200", 141e9, 4.8e12, 989e12, 450e9, 50e9)


@dataclass(frozen=True)
class Share:
    """What software gets of a data sheet's figure [assumed]."""

    memory: float = 0.9  # of capacity: the rest is the context's and the allocator's
    decode: float = 0.6  # of bandwidth
    forward: float = 0.5  # of the matrix rate
    update: float = (
        0.35  # of the matrix rate; Llama 3 got 0.38 to 0.43 with a finer partition (arXiv 2407.21783, table 4)
    )
    link: float = 0.7  # of links and network


@dataclass(frozen=True)
class Measured:
    """Ratios of a real run with a text-only teacher [measured]; see `scaling.py --measure`."""

    reply_share: float  # tokens of a continuation as a share of their limit
    branch_share: float  # tokens learned from branches per token that the teacher wrote
    reply_bytes: float  # of the answer store, per continuation


@dataclass(frozen=True)
class Load:
    """A step of a method that asks for continuations, its settings the defaults."""

    measured: Measured
    prompts: int = 256
    prompt_tokens: int = 256  # [assumed]
    response_tokens: int = 1024  # [assumed]
    method: OmniOPDConfig = field(default_factory=OmniOPDConfig)
    micro_batch_tokens: int = 4096  # less than the default, so that the activations of 70B leave room
    concurrency: int = 256  # [assumed] calls at once
    seconds_per_call: float = 2.0  # [assumed] half a second, and 75 tokens at 50 a second
    tokens_per_minute: float = 10e6  # [assumed] the provider's limit, input included
    storage: float = 2e9  # [assumed] bytes a second of the shared folder that weights are pushed through, each way

    @property
    def calls(self) -> int:
        """A call brings all continuations of a chunk, as servers with `n` allow."""
        return self.prompts * self.method.chunks

    @property
    def replies(self) -> int:
        """Continuations."""
        return self.calls * self.method.continuations

    @property
    def teacher_tokens(self) -> tuple[float, float]:
        """What a step's calls send, prefixes of half a response on average, and what they bring."""
        sent = self.calls * (self.prompt_tokens + self.response_tokens / 2)
        return sent, self.replies * self.method.reply_tokens * self.measured.reply_share

    @property
    def branch_tokens(self) -> float:
        """Of the teacher's tokens those that are learned: branches share what they have in common."""
        return self.teacher_tokens[1] * self.measured.branch_share

    def dollars(self, price: tuple[float, float] = (0.15, 0.60)) -> float:
        """What a step's evidence costs at USD per million tokens in and out [assumed], by default the quickstart's."""
        return sum(tokens * each for tokens, each in zip(self.teacher_tokens, price, strict=True)) / 1e6

    @property
    def store_bytes(self) -> float:
        """By which the answer store grows."""
        return self.replies * self.measured.reply_bytes

    def forward_flops(self, shape: Transformer, learned: float) -> float:
        """Of prompts, responses and `learned` tokens of branches beside them; the head is used at all but the prompts."""
        context = response_context(self.prompt_tokens, self.response_tokens)
        written = self.prompts * self.response_tokens + learned
        prompts = self.prompts * self.prompt_tokens
        return shape.forward_flops(written, context, written) + shape.forward_flops(prompts, self.prompt_tokens / 2, 0)
