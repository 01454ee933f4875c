"""The pre-norm transformer block of both towers. Parameter names are those of Hugging Face's CLIP."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint


def quick_gelu(x: Tensor) -> Tensor:
    """x sigmoid(1.702 x), the activation of OpenAI's CLIP; written as a SiLU it keeps one tensor for the backward."""
    return F.silu(1.702 * x) / 1.702


ACTIVATIONS = {"quick_gelu": quick_gelu, "gelu": F.gelu}


class Attention(nn.Module):
    """Multi-head self-attention."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        if width % heads:
            raise ValueError(f"width {width} is not a multiple of heads {heads}")
        self.heads = heads
        self.q_proj = nn.Linear(width, width)
        self.k_proj = nn.Linear(width, width)
        self.v_proj = nn.Linear(width, width)
        self.out_proj = nn.Linear(width, width)

    def forward(self, x: Tensor, query: Tensor, mask: Tensor | None, causal: bool) -> Tensor:
        """query (B, Q, C) attends to x (B, L, C). mask broadcasts to (B, heads, Q, L), True = may be seen."""
        projected = (self.q_proj(query), self.k_proj(x), self.v_proj(x))
        q, k, v = (each.unflatten(-1, (self.heads, -1)).transpose(1, 2) for each in projected)  # (B, heads, L, head)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=causal)
        return self.out_proj(mixed.transpose(1, 2).flatten(-2))  # (B, Q, C)


class MLP(nn.Module):
    def __init__(self, width: int, hidden: int, activation: str):
        super().__init__()
        if activation not in tuple(ACTIVATIONS):
            raise ValueError(f"activation {activation!r} is not one of {sorted(ACTIVATIONS)}")
        self.activation = ACTIVATIONS[activation]
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    """x + attention(LN1 x), then + MLP(LN2 x)."""

    def __init__(self, width: int, heads: int, mlp_width: int, activation: str, eps: float):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.layer_norm1 = nn.LayerNorm(width, eps=eps)
        self.mlp = MLP(width, mlp_width, activation)
        self.layer_norm2 = nn.LayerNorm(width, eps=eps)

    def forward(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        normed = self.layer_norm1(x)
        x = x + self.self_attn(normed, normed, mask, causal)
        return x + self.mlp(self.layer_norm2(x))  # (B, L, C)

    def pool(self, x: Tensor, rows: Tensor | int, mask: Tensor | None = None) -> Tensor:
        """Only the output row `rows` of forward, an index or one per sample (B,). mask: (B, L), True = may be seen."""
        batch = torch.arange(x.shape[0], device=x.device)  # unlike len(), it exports
        normed = self.layer_norm1(x)
        query = normed[batch, rows].unsqueeze(1)  # (B, 1, C)
        mask = None if mask is None else mask[:, None, None]  # (B, 1, 1, L)
        pooled = x[batch, rows].unsqueeze(1) + self.self_attn(normed, query, mask, False)
        return (pooled + self.mlp(self.layer_norm2(pooled))).squeeze(1)  # (B, C)

    def value_path(self, x: Tensor) -> Tensor:
        """forward with every token attending to itself alone (MaskCLIP, Zhou et al. 2022, section 3.2)."""
        x = x + self.self_attn.out_proj(self.self_attn.v_proj(self.layer_norm1(x)))
        return x + self.mlp(self.layer_norm2(x))  # (B, L, C)


class Encoder(nn.Module):
    """A stack of blocks. The towers run the last one themselves, because only one of its rows is pooled.

    Residual branches start scaled down by depth (OpenAI CLIP; Radford et al. 2019, section 2.3).
    `checkpointing` computes activations again in the backward pass instead of keeping them.
    """

    def __init__(self, layers: int, width: int, heads: int, mlp_width: int, activation: str, eps: float):
        super().__init__()
        self.layers = nn.ModuleList(Block(width, heads, mlp_width, activation, eps) for _ in range(layers))
        self.checkpointing = False
        output_std = width**-0.5 * (2 * layers) ** -0.5
        for block in self.layers:
            for linear in (block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj):
                nn.init.normal_(linear.weight, std=width**-0.5)
            nn.init.normal_(block.self_attn.out_proj.weight, std=output_std)
            nn.init.normal_(block.mlp.fc1.weight, std=(2 * width) ** -0.5)
            nn.init.normal_(block.mlp.fc2.weight, std=output_std)
            for linear in (m for m in block.modules() if isinstance(m, nn.Linear)):
                nn.init.zeros_(linear.bias)

    def run(self, block, *inputs):
        """Calls a block, or a method of one: checkpointed where that is on, without graph where nothing learns yet."""
        parameters = getattr(block, "__self__", block).parameters()
        learns = inputs[0].requires_grad or any(parameter.requires_grad for parameter in parameters)
        with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
            if self.checkpointing and torch.is_grad_enabled():
                return checkpoint(block, *inputs, use_reentrant=False)
            return block(*inputs)

    def penultimate(self, x: Tensor, mask: Tensor | None = None, causal: bool = False) -> Tensor:
        """The input of the last block: (B, L, C) to (B, L, C)."""
        for block in self.layers[:-1]:
            x = self.run(block, x, mask, causal)
        return x
