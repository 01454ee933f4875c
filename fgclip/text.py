"""The text tower: a causal transformer with a short position table and a stretched one for long captions."""

import torch
from torch import Tensor, nn

from fgclip.transformer import Encoder

KEPT_POSITIONS = 20  # rows that the long table shares with the short one
STRETCH = 4


def stretched_length(length: int) -> int | None:
    """Rows of the long table made from a short one of `length` rows, None where there is nothing to stretch."""
    return KEPT_POSITIONS + STRETCH * (length - KEPT_POSITIONS) if length > KEPT_POSITIONS else None


def stretch_positions(table: Tensor) -> Tensor:
    """Position table (L, C), L > 20, to (4 L - 60, C): 77 rows to 248 (Long-CLIP, Zhang et al. 2024, section 3.1).

    Rows 0..19 stay, every later row i becomes four on the way to row i + 1; the last four continue the last step.
    """
    here = table[KEPT_POSITIONS:]
    step = torch.diff(table, dim=0)
    step = torch.cat([step[KEPT_POSITIONS:], step[-1:]])  # to the row after each of `here`
    parts = [here + (j / STRETCH) * step for j in range(STRETCH)]
    return torch.cat([table[:KEPT_POSITIONS], torch.stack(parts, dim=1).flatten(0, 1)])


class TextEmbeddings(nn.Module):
    """Tokens and position tables. The long table is rows 0..19 of `_ori` and the rows from 20 on of `_res`."""

    def __init__(self, vocab_size: int, context_length: int, width: int):
        super().__init__()
        self.token_embedding = nn.Embedding(vocab_size, width)
        self.position_embedding = nn.Embedding(context_length, width)
        long_length = stretched_length(context_length)
        if long_length is not None:
            self.position_embedding_res = nn.Embedding(long_length, width)
            self.position_embedding_ori = nn.Embedding(long_length, width)

    def forward(self, tokens: Tensor, long: bool) -> Tensor:
        """Tokens (N, L) to (N, L, C)."""
        positions = self.position_embedding.weight  # (L, C)
        if long:
            if not hasattr(self, "position_embedding_res"):
                raise ValueError("there is no long text path: the short position table has no row beyond the kept ones")
            kept, rest = self.position_embedding_ori.weight, self.position_embedding_res.weight
            positions = torch.cat([kept[:KEPT_POSITIONS], rest[KEPT_POSITIONS:]])
        if tokens.ndim != 2 or tokens.shape[1] > len(positions):
            raise ValueError(f"tokens {tuple(tokens.shape)} are not (N, L) with L of at most {len(positions)}")
        return self.token_embedding(tokens) + positions[: tokens.shape[1]]


class TextTower(nn.Module):
    """A causal transformer, pooled at the row of the end token. eos_id: its id, None for the largest id in a text."""

    def __init__(
        self, *, vocab_size: int = 49408, context_length: int = 77, width: int = 512, layers: int = 12, heads: int = 8,
        mlp_width: int = 2048, activation: str = "quick_gelu", eps: float = 1e-5, eos_id: int | None = None,
    ):  # fmt: skip
        super().__init__()
        if context_length < 2:
            raise ValueError(f"context_length {context_length} has no room for the start and end tokens")
        self.context_length, self.long_context_length = context_length, stretched_length(context_length)
        self.vocab_size, self.width, self.eos_id = vocab_size, width, eos_id
        self.embeddings = TextEmbeddings(vocab_size, context_length, width)
        self.encoder = Encoder(layers, width, heads, mlp_width, activation, eps)
        self.final_layer_norm = nn.LayerNorm(width, eps=eps)
        nn.init.normal_(self.embeddings.token_embedding.weight, std=0.02)
        nn.init.normal_(self.embeddings.position_embedding.weight, std=0.01)
        if self.long_context_length is not None:
            table = stretch_positions(self.embeddings.position_embedding.weight.detach())
            self.embeddings.position_embedding_res.weight.data.copy_(table)
            self.embeddings.position_embedding_ori.weight.data.copy_(table)

    def forward(self, tokens: Tensor, long: bool = False, attention_mask: Tensor | None = None) -> Tensor:
        """Tokens (N, L) int64 to pooled features (N, C). attention_mask: (N, L), 1 = read."""
        x = self.embeddings(tokens, long)
        rows = (tokens if self.eos_id is None else (tokens == self.eos_id).int()).argmax(dim=-1)  # (N,)
        index = torch.arange(tokens.shape[1], device=tokens.device)
        seen = index <= rows[:, None]  # (N, L): what the pooled row may see
        mask = None
        if attention_mask is not None:
            keep = attention_mask.bool()
            seen = seen & (keep | (index == rows[:, None]))
            # Every token sees itself, so that no row of the attention is empty.
            mask = (keep[:, None] & (index <= index[:, None])) | (index == index[:, None])
            mask = mask[:, None]  # (N, 1, L, L)
        x = self.encoder.penultimate(x, mask, mask is None)
        pooled = self.encoder.run(self.encoder.layers[-1].pool, x, rows, seen)
        return self.final_layer_norm(pooled)  # (N, C)
