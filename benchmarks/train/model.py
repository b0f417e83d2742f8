"""The trained model in plain PyTorch: Llama's layers under Hugging Face's names.

Decides the forward pass and the loss. The serving runtime builds the same architecture from
megatron-core; this one exists because training needs nothing but one compiled graph. Initial
weights: `initial_weights`.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sps2_mega.config import ModelConfig
from sps2_mega.errors import ConfigError


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.head_dim = config.head_dim
        self.queries_per_kv = config.num_heads // config.num_kv_heads
        hidden, kv = config.hidden_size, config.num_kv_heads * config.head_dim
        self.q_proj = nn.Linear(hidden, config.num_heads * config.head_dim, bias=False)
        self.k_proj = nn.Linear(hidden, kv, bias=False)
        self.v_proj = nn.Linear(hidden, kv, bias=False)
        self.o_proj = nn.Linear(config.num_heads * config.head_dim, hidden, bias=False)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """Attention of x [B, T, hidden] under cos, sin [B, 1, T, head_dim]."""
        batch, length, _ = x.shape
        q, k, v = (
            proj(x).view(batch, length, -1, self.head_dim).transpose(1, 2)
            for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        q, k = rotate(q, cos, sin), rotate(k, cos, sin)
        # Repeated by hand: the fused CPU kernel takes equal numbers of heads only.
        k, v = (t.repeat_interleave(self.queries_per_kv, dim=1) for t in (k, v))
        out = F.scaled_dot_product_attention(q, k.to(q.dtype), v.to(q.dtype), is_causal=True)
        return self.o_proj(out.transpose(1, 2).reshape(batch, length, -1))


class MLP(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner = config.hidden_size, config.ffn_hidden_size
        self.gate_proj = nn.Linear(hidden, inner, bias=False)
        self.up_proj = nn.Linear(hidden, inner, bias=False)
        self.down_proj = nn.Linear(inner, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.input_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_layernorm(x), cos, sin)
        return x + self.mlp(self.post_attention_layernorm(x))


class TinyLlama(nn.Module):
    """Llama with plain RoPE and tied embeddings.

    Raises:
        ConfigError: the architecture is another one.
    """

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        if (
            config.family != "llama"
            or config.rope is None
            or config.rope.scaling != "none"
            or not config.tie_embeddings
            or config.qkv_bias
        ):
            raise ConfigError(
                "only Llama with unscaled RoPE, tied embeddings and no biases is trained"
            )
        self.config = config
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config) for _ in range(config.num_layers))
        self.norm = nn.RMSNorm(config.hidden_size, eps=config.norm_eps)
        self.register_buffer("inv_freq", inverse_frequencies(config), persistent=False)

    def forward(self, tokens: Tensor, positions: Tensor) -> Tensor:
        """Logits [B, T, vocab] of tokens and positions [B, T]."""
        angles = positions[:, None, :, None].float() * self.inv_freq
        angles = torch.cat([angles, angles], dim=-1)
        cos, sin = angles.cos(), angles.sin()
        x = self.embed_tokens(tokens)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(self.norm(x), self.embed_tokens.weight)


def inverse_frequencies(config: ModelConfig) -> Tensor:
    """Angle per position of each pair of dimensions (i, i + head_dim / 2), [head_dim / 2]."""
    assert config.rope is not None
    exponents = torch.arange(0, config.head_dim, 2, dtype=torch.float64) / config.head_dim
    return (config.rope.theta**-exponents).float()


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return (x * cos + torch.cat([-second, first], dim=-1) * sin).to(x.dtype)


def token_losses(logits: Tensor, targets: Tensor) -> Tensor:
    """Cross entropy in nats, float32, [B, T]."""
    flat = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return flat.view(targets.shape)
