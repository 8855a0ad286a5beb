"""Memory, time and money of a step on paper, from shapes, data sheets and what runs here have measured.

A stage takes what its slowest resource takes: bytes over bandwidth, FLOPs over matrix rate, tokens over a rate limit. Each
input says whether it is [measured] here, from a [datasheet], or [assumed].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

from costs import Transformer, response_context

SLICE = 2**27  # bytes of the logits that exist at one time: `omniopd.losses.chunked`
ROLLOUT_ROOM, SCORE_ROOM = 2.0, 1.25  # memory of a server over its weights [assumed]: rollouts keep their past


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


# [datasheet] NVIDIA H100 and H200, SXM: bf16 is stated with sparsity, 1,979 TFLOP/s, and dense is half of it; NVLink, 900 GB/s,
# is both ways together; a port of 400 Gbit/s for each GPU, as in a DGX.
H100 = Device("H100", 80e9, 3.35e12, 989e12, 450e9, 50e9)
H200 = Device("H200", 141e9, 4.8e12, 989e12, 450e9, 50e9)


@dataclass(frozen=True)
class Share:
    """What software gets of a data sheet's figure [assumed]."""

    memory: float = 0.9  # of capacity: the rest is the context's and the allocator's
    decode: float = 0.6  # of bandwidth
    forward: float = 0.5  # of the matrix rate
    update: float = 0.35  # of the matrix rate; Llama 3 got 0.38 to 0.43 with a finer partition (arXiv 2407.21783, table 4)
    link: float = 0.7  # of links and network


@dataclass(frozen=True)
class Measured:
    """Ratios of a real run with a text-only teacher [measured]; see `scaling.py --measure`."""

    reply_share: float  # tokens of a continuation as a share of their limit
    branch_share: float  # tokens learned from branches per token that the teacher wrote
    reply_bytes: float  # of the answer store, per continuation


@dataclass(frozen=True)
class Load:
    """A step; the method's settings are the defaults of `omniopd`."""

    measured: Measured
    prompts: int = 256
    prompt_tokens: int = 256  # [assumed]
    response_tokens: int = 1024  # [assumed]
    chunks: int = 10
    chunk_tokens: int = 50
    continuations: int = 10
    micro_batch_tokens: int = 16_384
    concurrency: int = 256  # [assumed] calls at once
    seconds_per_call: float = 2.0  # [assumed] half a second, and 75 tokens at 50 a second
    tokens_per_minute: float = 10e6  # [assumed] the provider's limit, input included
    storage: float = 2e9  # [assumed] bytes a second of the shared folder that weights are pushed through, each way
    price: tuple[float, float] = (0.15, 0.60)  # [assumed] USD per million tokens in and out, those of the quickstart

    @property
    def calls(self) -> int:
        """A call brings all continuations of a chunk, as servers with `n` allow."""
        return self.prompts * self.chunks

    @property
    def teacher_tokens(self) -> tuple[float, float]:
        """What a step's calls send, prefixes of half a response on average, and what they bring."""
        limit = int(1.5 * self.chunk_tokens) + 4  # `OmniOPDConfig.reply_tokens`
        sent = self.calls * (self.prompt_tokens + self.response_tokens / 2)
        return sent, self.calls * self.continuations * limit * self.measured.reply_share

    @property
    def branch_tokens(self) -> float:
        """Of the teacher's tokens those that are learned: branches share what they have in common."""
        return self.teacher_tokens[1] * self.measured.branch_share

    @property
    def dollars(self) -> float:
        """What a step's evidence costs."""
        return sum(tokens * price for tokens, price in zip(self.teacher_tokens, self.price, strict=True)) / 1e6

    @property
    def store_bytes(self) -> float:
        """By which the answer store grows."""
        return self.calls * self.continuations * self.measured.reply_bytes

    def forward_flops(self, shape: Transformer, learned: float) -> float:
        """Of all prompts and responses, and `learned` tokens of branches beside them, with the head where tokens are learned."""
        context = response_context(self.prompt_tokens, self.response_tokens)
        written = self.prompts * self.response_tokens + learned
        prompts = self.prompts * self.prompt_tokens
        return shape.forward_flops(written, context, written) + shape.forward_flops(prompts, self.prompt_tokens / 2, 0)


@dataclass(frozen=True)
class Plan:
    """A student on GPUs of one kind; all its weights are trained, or adapters of `lora_rank`. `teacher` could score it."""

    student: Transformer
    teacher: Transformer
    device: Device
    load: Load
    lora_rank: int | None = None
    share: Share = Share()

    @property
    def trained(self) -> int:
        """Numbers that have a gradient and states of the optimizer."""
        shape = self.student
        if self.lora_rank is None:
            return shape.parameters
        attention = 2 * (2 * shape.hidden + (shape.heads + shape.kv_heads) * shape.head_dim)
        return shape.layers * self.lora_rank * (attention + 3 * (shape.hidden + shape.mlp))

    # ------------------------------------------------------------------ memory

    def memory(self, gpus: int) -> dict[str, float]:
        """Bytes on each of `gpus` GPUs that train under FSDP2 with gradient checkpointing, by what holds them.

        All weights: fp32, with a frozen reference of the same type. Adapters: fp32 over frozen bf16 weights, which are the
        reference.
        """
        frozen = self.lora_rank is not None
        stored = self.student.parameters * (2 if frozen else 4)
        return {
            "weights": (stored + (4 * self.trained if frozen else 0)) / gpus,
            "gradients": 4 * self.trained / gpus,
            "AdamW": 8 * self.trained / gpus,
            "reference": 0.0 if frozen else stored / gpus,
            "activations": self.activations + (self.gathered if gpus > 1 else 0.0),
        }

    @property
    def activations(self) -> float:
        """Bytes under checkpointing: the stream between layers, one layer's insides, three fp32 slices of logits.

        Source: the accounting of arXiv 2205.05198, section 4, for a gated MLP and an attention that keeps no scores.
        """
        shape = self.student
        stream = 4 * shape.hidden * (shape.layers + 1)  # fp32 under autocast
        inside = 2 * (4 * shape.hidden + 2 * (shape.heads + shape.kv_heads) * shape.head_dim + 4 * shape.mlp)
        return self.load.micro_batch_tokens * (stream + inside) + 3 * SLICE

    @property
    def gathered(self) -> float:
        """Bytes of what FSDP holds whole on every GPU while it is in use: two layers and the head, bf16."""
        return 2 * (2 * self.student.body / self.student.layers + self.student.head)

    @property
    def gpus(self) -> int:
        """GPUs to train on: the smallest power of two whose memory holds it."""
        return _smallest(lambda gpus: sum(self.memory(gpus).values()) <= self.usable)

    @property
    def usable(self) -> float:
        """Bytes of a GPU that can be planned with."""
        return self.share.memory * self.device.memory

    def serving(self, shape: Transformer, room: float) -> int:
        """GPUs of one server: the smallest power of two whose memory is `room` times the bf16 weights."""
        return _smallest(lambda gpus: gpus * self.usable >= room * 2 * shape.parameters)

    # ------------------------------------------------------------------ seconds

    @property
    def writers(self) -> int:
        """GPUs that serve rollouts: as many as train, at least one server."""
        return max(self.gpus, self.serving(self.student, ROLLOUT_ROOM))

    @property
    def rollout(self) -> float:
        """Seconds to write a step's responses: prefill, then a token of every row at a time, in as many waves as fit."""
        load, shape, share, device = self.load, self.student, self.share, self.device
        server = self.serving(shape, ROLLOUT_ROOM)
        servers = self.writers // server
        room = (server * self.usable - 2 * shape.parameters) // shape.kv_bytes(load.prompt_tokens + load.response_tokens)
        rows = math.ceil(load.prompts / servers)
        waves = math.ceil(rows / room)
        rows = math.ceil(rows / waves)
        context = response_context(load.prompt_tokens, load.response_tokens)
        reads = shape.decode_bytes(rows, context) / (server * device.bandwidth * share.decode)
        multiplies = shape.forward_flops(rows, context, rows) / (server * device.rate * share.forward)
        prompt = shape.forward_flops(rows * load.prompt_tokens, load.prompt_tokens / 2, rows)
        return waves * (
            load.response_tokens * max(reads, multiplies) + prompt / (server * device.rate * share.forward)
        )

    @property
    def push(self) -> float:
        """Seconds until the rollout servers have new weights: bf16, written to the shared folder and read from it."""
        numbers = self.student.parameters if self.lora_rank is None else self.trained
        return 2 * 2 * numbers / self.load.storage

    @property
    def asking(self) -> float:
        """Seconds that a teacher of text needs: its latency at so many calls at once, or its limit of tokens a minute."""
        load = self.load
        return max(
            math.ceil(load.calls / load.concurrency) * load.seconds_per_call,
            60 * sum(load.teacher_tokens) / load.tokens_per_minute,
        )

    @property
    def scorers(self) -> int:
        """GPUs of a server of the teacher's own weights."""
        return self.serving(self.teacher, SCORE_ROOM)

    @property
    def scoring(self) -> float:
        """Seconds in which a server of the teacher's own weights scores the responses instead."""
        flops = self.load.forward_flops(self.teacher, 0)
        return flops / (self.scorers * self.device.rate * self.share.forward)

    @property
    def update(self) -> float:
        """Seconds of the update: multiplications or, where they take longer, FSDP's gathers."""
        return max(self.multiplying, self.gathering)

    @property
    def multiplying(self) -> float:
        """The update's matrix time.

        Forward, again under checkpointing, backward to the activations and, where weights are trained, to them; the frozen
        reference forward once more.
        """
        passes = 4 if self.lora_rank is not None else 5
        flops = passes * self.load.forward_flops(self.student, self.load.branch_tokens)
        return flops / (self.gpus * self.device.rate * self.share.update)

    @property
    def gathering(self) -> float:
        """FSDP's time on the wire: per micro-batch the bf16 weights three times, for forward, recomputation with backward,
        and the reference, and gradients once; none on one GPU."""
        gpus, load = self.gpus, self.load
        if gpus == 1:
            return 0.0
        wire = (self.device.link if gpus <= self.device.per_node else self.device.network) * self.share.link
        tokens = load.prompts * (load.prompt_tokens + load.response_tokens) + load.branch_tokens
        batches = math.ceil(tokens / gpus / load.micro_batch_tokens)
        whole = 2 * (3 * self.student.parameters + self.trained) * (gpus - 1) / gpus
        return batches * whole / wire

    def step(self, evidence: float, *, lagging: bool) -> float:
        """Seconds of a step. Plain: questions go out as responses end; with `max_lag` the student goes on meanwhile."""
        learning = self.update + self.push
        if lagging:
            return max(self.rollout + learning, evidence)
        return max(self.rollout + min(evidence, self.load.seconds_per_call), evidence) + learning


def _smallest(fits: Callable[[int], bool]) -> int:
    """The smallest power of two that fits."""
    gpus = 1
    while not fits(gpus):
        gpus *= 2
    return gpus
