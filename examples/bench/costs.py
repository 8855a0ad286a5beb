"""What a dense decoder-only transformer costs, from its shape alone: parameters, FLOPs and bytes.

Grouped-query attention, a gated MLP and no biases, as in Qwen3 and Llama 3. Norms and rotations are left out: under a
hundredth of a per cent of either count. A multiplication and an addition are two FLOPs.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Transformer:
    """A shape; `tied`: the head is the embedding."""

    name: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    mlp: int
    vocab: int
    tied: bool
    head_dim: int = 128

    @property
    def body(self) -> int:
        """Entries of all layers' matrices: queries, keys, values, output, and the MLP's three."""
        attention = self.hidden * self.head_dim * 2 * (self.heads + self.kv_heads)
        return self.layers * (attention + 3 * self.hidden * self.mlp)

    @property
    def head(self) -> int:
        """Entries of the head's matrix."""
        return self.vocab * self.hidden

    @property
    def parameters(self) -> int:
        """Body, head, and the embedding where it is another matrix."""
        return self.body + self.head * (1 if self.tied else 2)

    def forward_flops(self, tokens: float, context: float, predicted: float) -> float:
        """FLOPs of a forward pass.

        Args:
            tokens: how many go through the layers.
            context: how many each of them looks at, itself included, on average.
            predicted: at how many the head is used.
        """
        attention = 4 * self.layers * self.heads * self.head_dim * context
        return tokens * (2 * self.body + attention) + 2 * self.head * predicted

    def kv_bytes(self, tokens: float, width: int = 2) -> float:
        """Bytes of the keys and values of so many tokens, `width` bytes a number."""
        return 2 * self.layers * self.kv_heads * self.head_dim * width * tokens

    def decode_bytes(self, rows: float, context: float, width: int = 2) -> float:
        """Bytes that one token step of `rows` rows reads at least: every matrix once, and the past of each row."""
        return (self.body + self.head) * width + self.kv_bytes(rows * context, width)


def response_context(prompt: float, response: float) -> float:
    """Tokens that a token of the response looks at on average."""
    return prompt + (response + 1) / 2


# Qwen3: arXiv 2505.09388, table 1, and the config.json of each; Llama 3.1: arXiv 2407.21783, table 3
QWEN3_06B = Transformer("Qwen3-0.6B", 28, 1024, 16, 8, 3072, 151_936, tied=True)
QWEN3_17B = Transformer("Qwen3-1.7B", 28, 2048, 16, 8, 6144, 151_936, tied=True)
QWEN3_8B = Transformer("Qwen3-8B", 36, 4096, 32, 8, 12_288, 151_936, tied=False)
QWEN3_32B = Transformer("Qwen3-32B", 64, 5120, 64, 8, 25_600, 151_936, tied=False)
LLAMA_70B = Transformer("Llama-3.1-70B", 80, 8192, 64, 8, 28_672, 128_256, tied=False)
LLAMA_405B = Transformer("Llama-3.1-405B", 126, 16_384, 128, 8, 53_248, 128_256, tied=False)
