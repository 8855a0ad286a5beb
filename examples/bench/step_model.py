"""Memory, time and money of a step on paper: a stage takes what its slowest resource takes.

Bytes over bandwidth, FLOPs over matrix rate, tokens over a rate limit; see `step_inputs` for where the numbers come from.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field

from costs import Transformer, response_context
from step_inputs import Device, Load, Share

from omniopd.losses.chunked import SLICE_BYTES

ROLLOUT_ROOM, SCORE_ROOM = 2.0, 1.25  # memory of a server over its weights [assumed]: rollouts keep their past


@dataclass(frozen=True)
class Plan:
    """A student on GPUs of one kind; all its weights are trained, or adapters of `lora_rank`. `teacher` could score it."""

    student: Transformer
    teacher: Transformer
    device: Device
    load: Load
    lora_rank: int | None = None
    share: Share = field(default_factory=Share)

    @property
    def width(self) -> int:
        """Bytes of a stored weight: fp32 where all are trained, bf16 under adapters."""
        return 4 if self.lora_rank is None else 2

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
        stored = self.student.parameters * self.width
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
        return self.load.micro_batch_tokens * (stream + inside) + 3 * SLICE_BYTES

    @property
    def gathered(self) -> float:
        """Bytes of what FSDP holds whole on every GPU while it is in use: two layers and the head."""
        return self.width * (2 * self.student.body / self.student.layers + self.student.head)

    @property
    def gpus(self) -> int:
        """GPUs to train on: the smallest power of two whose memory holds it."""
        return _smallest(lambda gpus: sum(self.memory(gpus).values()) <= self.usable)

    @property
    def gpus_today(self) -> int | None:
        """GPUs to train on as the code is, None where no number helps.

        Adapters are trained beside a whole student on each GPU; under FSDP2 each GPU holds the student whole while rollouts
        are written or scored.
        """
        whole, alone = self.width * self.student.parameters, self.memory(1)
        kept = sum(alone.values()) - alone["activations"]
        if kept + alone["activations"] <= self.usable:
            return 1
        if self.lora_rank is not None or whole >= self.usable:
            return None
        return _smallest(lambda gpus: kept / gpus + max(whole, self.memory(gpus)["activations"]) <= self.usable)

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
    def room(self) -> int:
        """Whole rows whose keys and values fit beside the weights of a rollout server."""
        shape, load = self.student, self.load
        free = self.serving(shape, ROLLOUT_ROOM) * self.usable - 2 * shape.parameters
        return int(free // shape.kv_bytes(load.prompt_tokens + load.response_tokens))

    @property
    def rollout(self) -> float:
        """Seconds to write a step's responses: prefill, then a token of every row at a time, in as many waves as fit."""
        load, shape, share, device = self.load, self.student, self.share, self.device
        server = self.serving(shape, ROLLOUT_ROOM)
        servers = self.writers // server
        rows = math.ceil(load.prompts / servers)
        waves = math.ceil(rows / self.room)
        rows = math.ceil(rows / waves)
        context = response_context(load.prompt_tokens, load.response_tokens)
        reads = shape.decode_bytes(rows, context) / (server * device.bandwidth * share.decode)
        multiplies = shape.forward_flops(rows, context, rows) / (server * device.rate * share.forward)
        prompt = shape.forward_flops(rows * load.prompt_tokens, load.prompt_tokens / 2, rows)
        return waves * (load.response_tokens * max(reads, multiplies) + prompt / (server * device.rate * share.forward))

    @property
    def push(self) -> float:
        """Seconds until the rollout servers have new weights, adapters merged: written to the shared folder, read from it."""
        return 2 * self.width * self.student.parameters / self.load.storage

    @property
    def checking(self) -> float:
        """Seconds in which the trainer scores the rollouts itself, for their entropies and the gap to the servers'."""
        flops = self.load.forward_flops(self.student, 0)
        return flops / (self.gpus * self.device.rate * self.share.forward)

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

        Forward, again under checkpointing (without the head), backward to the activations and, where weights are trained, to
        them; the frozen reference forward once more.
        """
        learned, passes = self.load.branch_tokens, 4 if self.lora_rank is not None else 5
        head = 2 * self.student.head * (self.load.prompts * self.load.response_tokens + learned)
        flops = passes * self.load.forward_flops(self.student, learned) - head
        return flops / (self.gpus * self.device.rate * self.share.update)

    @property
    def gathering(self) -> float:
        """FSDP's time on the wire; none on one GPU.

        Per micro-batch the weights three times, for forward, recomputation with backward, and the reference, and the fp32
        gradients once.
        """
        gpus, load = self.gpus, self.load
        if gpus == 1:
            return 0.0
        wire = (self.device.link if gpus <= self.device.per_node else self.device.network) * self.share.link
        tokens = load.prompts * (load.prompt_tokens + load.response_tokens) + load.branch_tokens
        batches = math.ceil(tokens / gpus / load.micro_batch_tokens)
        whole = (3 * self.width * self.student.parameters + 4 * self.trained) * (gpus - 1) / gpus
        return batches * whole / wire

    def step(self, evidence: float, *, lagging: bool) -> float:
        """Seconds of a step. Plain: questions go out as responses end; with `max_lag` the student goes on meanwhile."""
        writing, learning = self.rollout + self.checking, self.update + self.push
        if lagging:
            return max(writing + learning, evidence)
        return max(writing + min(evidence, self.load.seconds_per_call), evidence) + learning


def _smallest(fits: Callable[[int], bool]) -> int:
    """The smallest power of two that fits."""
    gpus = 1
    while not fits(gpus):
        gpus *= 2
    return gpus
