"""Run the JAX head on a case, one device per rank."""

from collections.abc import Callable

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from jax_impl.lm_head import ParallelLMHead
from jax_impl.runner import make_mesh, shards
from jax_impl.vocab_emb import ParallelVocabEmbedding
from shared.bits import DTYPES
from shared.proof.head_case import HeadCase, HeadWriter
from shared.proof.launch import serve

__all__ = ["run"]


def run(case: HeadCase, record: HeadWriter, progress: Callable[[str, int, int], None]) -> None:
    """Record every rank's loss, log-probabilities, gradients and argmax.

    Raises:
        RuntimeError: the platform has fewer devices than the case has ranks. CPU devices are created as needed.
    """
    mesh = make_mesh(case)
    progress("table", 0, 3)
    emb = ParallelVocabEmbedding.from_table(
        case.weights, case.tensor, mesh, vocab_size=case.vocab_size, **case.config.changes()
    )
    targets = case.batch_array("targets")
    # If tied, zeros that are added to the looked-up rows: their gradient is the hidden states'.
    given = np.zeros((*targets.shape, case.emb_size), DTYPES[case.dtype]) if case.tied else case.batch_array("hidden")
    replicated = NamedSharding(mesh, PartitionSpec())
    given = jax.device_put(given, replicated)

    def hidden_states(emb: ParallelVocabEmbedding, given: jax.Array) -> jax.Array:
        return emb(case.batch_array("ids")) + given if case.tied else given

    def loss(emb: ParallelVocabEmbedding, given: jax.Array) -> tuple[jax.Array, jax.Array]:
        head = ParallelLMHead(emb, invalid_targets="ignore")
        found: tuple[jax.Array, jax.Array] = head(hidden_states(emb, given), targets, returns=("logprobs",))
        return found

    progress("loss and gradients", 1, 3)
    (value, logprobs), (of_emb, of_hidden) = jax.value_and_grad(loss, (0, 1), has_aux=True)(emb, given)
    progress("argmax", 2, 3)
    head = ParallelLMHead(emb)
    arrays = {
        "loss": value,
        "logprobs": logprobs,
        "hidden gradient": of_hidden,
        "table gradient": of_emb.weight,
        "argmax": head.argmax(head(hidden_states(emb, given))),
    }
    for what, array in arrays.items():
        # Results of an empty batch are constants, which lie on one device.
        placed = jax.device_put(array, emb.weight.sharding if what == "table gradient" else replicated)
        for rank, part in enumerate(shards(placed, mesh)):
            record.add(f"{what}.{rank}", part)


if __name__ == "__main__":
    serve("jax", {"jax": jax.__version__}, run, HeadCase, HeadWriter)
