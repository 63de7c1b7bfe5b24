"""A small LLaMA in Flax nnx: RMSNorm, rotary positions, grouped-query attention, SwiGLU.

Every parameter carries the logical names of its axes as metadata (``param.axes``); ``models.sharding`` maps them to a
mesh. Shapes in comments: b batch, t time, d embed, h heads, k kv_heads, g = h // k, e head_dim.
"""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
from flax import nnx


@dataclass(frozen=True, slots=True, kw_only=True)
class LlamaConfig:
    """Sizes of a model. ``head_dim`` is ``embed // heads``."""

    vocab: int = 256
    embed: int
    mlp: int
    layers: int
    heads: int
    kv_heads: int
    tied: bool = True  # the output head is the embedding
    dropout: float = 0.0
    rope_theta: float = 10_000.0
    norm_epsilon: float = 1e-5
    param_dtype: jnp.dtype = jnp.dtype("float32")
    compute_dtype: jnp.dtype = jnp.dtype("float32")

    def __post_init__(self) -> None:
        if self.embed % self.heads or (self.embed // self.heads) % 2:
            raise ValueError(f"embed={self.embed} must be an even multiple of heads={self.heads}.")
        if self.heads % self.kv_heads:
            raise ValueError(f"heads={self.heads} must be a multiple of kv_heads={self.kv_heads}.")

    @property
    def head_dim(self) -> int:
        return self.embed // self.heads


PRESETS: dict[str, LlamaConfig] = {
    "tiny": LlamaConfig(embed=128, mlp=384, layers=4, heads=4, kv_heads=2),  # 0.8 M parameters
    "demo": LlamaConfig(embed=320, mlp=960, layers=4, heads=8, kv_heads=4, tied=False, dropout=0.05),  # 5.1 M
    "124m": LlamaConfig(vocab=50_304, embed=768, mlp=2048, layers=12, heads=12, kv_heads=12),
}


class Llama(nnx.Module):
    """Tokens (b, t) to logits (b, t, vocab), float32."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.embedding = _param(rngs, config, (config.vocab, config.embed), ("vocab", "embed"))
        self.layers = nnx.List([Layer(config, rngs=rngs) for _ in range(config.layers)])
        self.norm = RMSNorm(config)
        if not config.tied:
            self.head = _param(rngs, config, (config.embed, config.vocab), ("embed", "vocab"))

    def __call__(self, tokens: jax.Array, *, dropout_key: jax.Array | None = None) -> jax.Array:
        """Without ``dropout_key`` nothing is dropped."""
        config = self.config
        x = self.embedding[...].astype(config.compute_dtype)[tokens]
        rotation = rotation_tables(tokens.shape[1], config)
        for i, layer in enumerate(self.layers):
            key = None if dropout_key is None else jax.random.fold_in(dropout_key, i)
            x = layer(x, rotation, dropout_key=key)
        head = self.embedding[...].T if config.tied else self.head[...]
        return (self.norm(x) @ head.astype(config.compute_dtype)).astype(jnp.float32)


class Layer(nnx.Module):
    """Attention and feed-forward, each on a normalized copy that is added back."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.config = config
        self.attention_norm = RMSNorm(config)
        self.attention = Attention(config, rngs=rngs)
        self.mlp_norm = RMSNorm(config)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(
        self, x: jax.Array, rotation: tuple[jax.Array, jax.Array], *, dropout_key: jax.Array | None
    ) -> jax.Array:
        first, second = (None, None) if dropout_key is None else jax.random.split(dropout_key)
        rate = self.config.dropout
        x = x + _dropout(self.attention(self.attention_norm(x), rotation), rate, first)
        return x + _dropout(self.mlp(self.mlp_norm(x)), rate, second)


class RMSNorm(nnx.Module):
    def __init__(self, config: LlamaConfig) -> None:
        self.epsilon = config.norm_epsilon
        self.scale = nnx.Param(jnp.ones((config.embed,), config.param_dtype), axes=("norm",))

    def __call__(self, x: jax.Array) -> jax.Array:
        # In float32 whatever the compute dtype is: a sum of squares overflows or rounds away in 16 bits.
        wide = x.astype(jnp.float32)
        wide = wide * jax.lax.rsqrt(jnp.mean(wide * wide, axis=-1, keepdims=True) + self.epsilon)
        return wide.astype(x.dtype) * self.scale[...].astype(x.dtype)[None, None, :]


class Attention(nnx.Module):
    """Causal, with fewer key/value heads than query heads."""

    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        d, h, k, e = config.embed, config.heads, config.kv_heads, config.head_dim
        self.query = _param(rngs, config, (d, h, e), ("embed", "heads", "head_dim"))
        self.key = _param(rngs, config, (d, k, e), ("embed", "kv_heads", "head_dim"))
        self.value = _param(rngs, config, (d, k, e), ("embed", "kv_heads", "head_dim"))
        self.out = _param(rngs, config, (h, e, d), ("heads", "head_dim", "embed"))

    def __call__(self, x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
        b, t, _ = x.shape
        kv_heads, head_dim = self.key.shape[1:]
        query = _rotate(jnp.einsum("btd,dhe->bthe", x, self.query[...].astype(x.dtype)), rotation)
        key = _rotate(jnp.einsum("btd,dke->btke", x, self.key[...].astype(x.dtype)), rotation)
        value = jnp.einsum("btd,dke->btke", x, self.value[...].astype(x.dtype))
        query = query.reshape(b, t, kv_heads, -1, head_dim) * head_dim**-0.5
        scores = jnp.einsum("btkge,bske->bkgts", query, key).astype(jnp.float32)
        causal = jnp.tril(jnp.ones((t, t), bool))[None, None, None]
        weights = jax.nn.softmax(jnp.where(causal, scores, -1e30), axis=-1).astype(x.dtype)
        mixed = jnp.einsum("bkgts,bske->btkge", weights, value).reshape(b, t, -1, head_dim)
        return jnp.einsum("bthe,hed->btd", mixed, self.out[...].astype(x.dtype))


class SwiGLU(nnx.Module):
    def __init__(self, config: LlamaConfig, *, rngs: nnx.Rngs) -> None:
        self.gate = _param(rngs, config, (config.embed, config.mlp), ("embed", "mlp"))
        self.up = _param(rngs, config, (config.embed, config.mlp), ("embed", "mlp"))
        self.down = _param(rngs, config, (config.mlp, config.embed), ("mlp", "embed"))

    def __call__(self, x: jax.Array) -> jax.Array:
        gate, up, down = (kernel[...].astype(x.dtype) for kernel in (self.gate, self.up, self.down))
        return (jax.nn.silu(x @ gate) * (x @ up)) @ down


def _param(rngs: nnx.Rngs, config: LlamaConfig, shape: tuple[int, ...], axes: tuple[str, ...]) -> nnx.Param:
    value = 0.02 * jax.random.truncated_normal(rngs.params(), -3, 3, shape, jnp.float32)
    return nnx.Param(value.astype(config.param_dtype), axes=axes)


def rotation_tables(length: int, config: LlamaConfig) -> tuple[jax.Array, jax.Array]:
    """Cosines and sines (t, e / 2), computed here so that positions are no state."""
    frequency = config.rope_theta ** -(jnp.arange(0, config.head_dim, 2, dtype=jnp.float32) / config.head_dim)
    angle = jnp.outer(jnp.arange(length, dtype=jnp.float32), frequency)
    return jnp.cos(angle), jnp.sin(angle)


def _rotate(x: jax.Array, rotation: tuple[jax.Array, jax.Array]) -> jax.Array:
    cos, sin = (part.astype(x.dtype)[None, :, None, :] for part in rotation)
    first, second = jnp.split(x, 2, axis=-1)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _dropout(x: jax.Array, rate: float, key: jax.Array | None) -> jax.Array:
    if key is None or rate == 0.0:
        return x
    keep = jax.random.bernoulli(key, 1.0 - rate, x.shape)
    return jnp.where(keep, x / (1.0 - rate), jnp.zeros_like(x))
