"""The demo's model in NumPy: a small Qwen2 with a tied head, float32 whatever type its weights have.

Qwen2 technical report (arXiv 2407.10671): RMSNorm before each half of a layer, grouped-query attention with rotary
positions and biases on q, k and v, and a SwiGLU. The names of tensors are those of Hugging Face.
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from relexio.checkpoints.header import parse_json
from relexio.checkpoints.safetensors import open_directory
from relexio.dtypes import kind_of, tensor_bytes, to_native
from relexio.errors import CheckpointError

#: What the configuration must say: with anything else, the model below is another one.
_KIND = {"model_type": "qwen2", "tie_word_embeddings": True, "hidden_act": "silu", "use_sliding_window": False}


@dataclass(frozen=True)
class Model:
    """Weights by name, float32; ``vocabulary``: the token of each character, ``end``: the one that ends an answer."""

    weights: dict[str, np.ndarray]
    vocabulary: dict[str, int]
    end: int
    layers: int
    heads: int
    kv_heads: int
    epsilon: float
    theta: float


def load(directory: Path) -> Model:
    """Read a checkpoint directory. Raises CheckpointError for a model of another kind than the demo's."""
    config, tokenizer = (
        parse_json((directory / name).read_bytes(), directory / name) for name in ("config.json", "tokenizer.json")
    )
    rotary = config.get("rope_parameters", {})
    if {key: config.get(key) for key in _KIND} != _KIND or rotary.get("rope_type") != "default":
        raise CheckpointError(f"{directory}: not a model of the kind that comes with relexio demo")
    return Model(
        _weights(directory),
        tokenizer["model"]["vocab"],
        config["eos_token_id"],
        config["num_hidden_layers"],
        config["num_attention_heads"],
        config["num_key_value_heads"],
        config["rms_norm_eps"],
        rotary["rope_theta"],
    )


def _weights(directory: Path) -> dict[str, np.ndarray]:
    checkpoint, weights = open_directory(directory), {}
    for name, (dtype, shape) in checkpoint.tensors.items():
        raw, kind = np.empty(tensor_bytes(dtype, shape), np.uint8), kind_of(dtype)
        checkpoint.read(name, 0, raw.data)
        weights[name] = to_native(raw.view(kind.bits), kind).astype(np.float32).reshape(shape)
    return weights


def logits(model: Model, tokens: np.ndarray) -> np.ndarray:
    """What the model expects after each token: integers [B, L] to float32 [B, L, V]."""
    embedding = model.weights["model.embed_tokens.weight"]
    x = embedding[tokens]
    for layer in range(model.layers):
        prefix = f"model.layers.{layer}."
        x = x + _attention(model, prefix + "self_attn.", _norm(model, prefix + "input_layernorm", x))
        x = x + _mlp(model, prefix + "mlp.", _norm(model, prefix + "post_attention_layernorm", x))
    return _norm(model, "model.norm", x) @ embedding.T


def _norm(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """RMSNorm: x / sqrt(mean x² + epsilon), times a weight for each channel."""
    mean = np.mean(np.square(x), axis=-1, keepdims=True)
    return x / np.sqrt(mean + np.float32(model.epsilon)) * model.weights[f"{name}.weight"]


def _linear(model: Model, name: str, x: np.ndarray) -> np.ndarray:
    """W x, plus a bias where there is one; x [B, L, in]."""
    weight, bias = model.weights[f"{name}.weight"], model.weights.get(f"{name}.bias")
    y = x.reshape(-1, x.shape[-1]) @ weight.T  # one large product: NumPy would make B small ones
    return (y if bias is None else y + bias).reshape(*x.shape[:-1], -1)


def _attention(model: Model, prefix: str, x: np.ndarray) -> np.ndarray:
    """Each token looks at itself and those before it; a head of keys and values serves several heads of queries."""
    groups = model.heads // model.kv_heads
    q = _rotate(_heads(_linear(model, f"{prefix}q_proj", x), model.kv_heads, groups), model.theta)
    k = _rotate(_heads(_linear(model, f"{prefix}k_proj", x), model.kv_heads, 1), model.theta)
    v = _heads(_linear(model, f"{prefix}v_proj", x), model.kv_heads, 1)
    scores = q @ np.swapaxes(k, -1, -2) / np.float32(np.sqrt(q.shape[-1]))
    scores = np.where(np.tri(x.shape[1], dtype=bool), scores, -np.inf)
    shares = np.exp(scores - scores.max(axis=-1, keepdims=True))
    mixed = shares / shares.sum(axis=-1, keepdims=True) @ v
    return _linear(model, f"{prefix}o_proj", np.moveaxis(mixed, 3, 1).reshape(x.shape[0], x.shape[1], -1))


def _heads(y: np.ndarray, kv_heads: int, groups: int) -> np.ndarray:
    """[B, L, heads * d] as [B, kv heads, groups, L, d]."""
    return np.moveaxis(y.reshape(*y.shape[:2], kv_heads, groups, -1), 1, 3)


def _rotate(x: np.ndarray, theta: float) -> np.ndarray:
    """Rotary positions: at position p, channels i and i + d/2 turn by p theta^(-2i/d); x [..., L, d]."""
    half = x.shape[-1] // 2
    angles = np.outer(np.arange(x.shape[-2]), theta ** (-np.arange(half) / half))
    cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
    first, second = x[..., :half], x[..., half:]
    return np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)


def _mlp(model: Model, prefix: str, x: np.ndarray) -> np.ndarray:
    """SwiGLU: down(silu(gate x) * up x)."""
    gate = _linear(model, f"{prefix}gate_proj", x)
    silu = gate / (1 + np.exp(-gate))
    return _linear(model, f"{prefix}down_proj", silu * _linear(model, f"{prefix}up_proj", x))
