"""Train a small language model whose embedding and output head share one table, split over all devices.

Run: python examples/lm_jax.py --devices 4
"""

from collections.abc import Iterator

import jax
from lm_text import BETAS, EMB, EPS, HEADS, LAYERS, RATE, VOCAB, batches, initial_weights, parser_of, record

parser = parser_of(__doc__)
parser.add_argument("--devices", type=int, default=1, help="CPU devices over which the table is split")
options = parser.parse_args()
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_num_cpu_devices", options.devices)
import jax.numpy as jnp
import optax
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from jax_impl import ParallelLMHead, ParallelVocabEmbedding


def norm(x, gain):
    return x * jax.lax.rsqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * gain


def layer(x, weights, number):
    """Attention to earlier tokens, then a perceptron; every device computes the same."""

    def linear(x, name):
        return x @ weights[f"layers.{number}.{name}.weight"].T

    b, s, e = x.shape
    qkv = linear(norm(x, weights[f"layers.{number}.norm_1.weight"]), "qkv").reshape(b, s, 3, HEADS, e // HEADS)
    attended = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], is_causal=True)
    x = x + linear(attended.reshape(b, s, e), "out")
    up = linear(norm(x, weights[f"layers.{number}.norm_2.weight"]), "up")
    return x + linear(jax.nn.gelu(up, approximate=True), "down")


def loss_of(model, ids, targets):
    emb, weights = model
    x = emb(ids) + weights["positions"]
    for number in range(LAYERS):
        x = layer(x, weights, number)
    head = ParallelLMHead(emb)  # multiplies by the table of emb: both gradients add up in it
    return head(norm(x, weights["norm.weight"]), targets)  # the cross entropy: no device ever holds all logits


optimizer = optax.adam(RATE, *BETAS)


@jax.jit
def train_step(model, state, ids, targets):
    loss, gradient = jax.value_and_grad(loss_of)(model, ids, targets)
    updates, state = optimizer.update(gradient, state)
    return loss, optax.apply_updates(model, updates), state


def train(mesh) -> Iterator[float]:
    weights = initial_weights()
    # The head needs the hidden states of all tokens on every device, hence all_reduce.
    emb = ParallelVocabEmbedding(VOCAB, EMB, mesh, reduction="all_reduce", init=None)
    emb = emb.with_weight(weights.pop("emb.weight"))
    model = emb, jax.device_put(weights, NamedSharding(mesh, PartitionSpec()))  # replicated, unlike the table
    state = optimizer.init(model)
    for ids in batches():
        loss, model, state = train_step(model, state, ids[:, :-1], ids[:, 1:])
        yield float(loss)


mesh = jax.make_mesh((options.devices,), ("tp",), (AxisType.Auto,))
record("jax", options.devices, train(mesh), options.json)
