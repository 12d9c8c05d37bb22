"""The examples run and `__all__` is true."""


def test_documentation(check_documentation):
    check_documentation(
        "jax_impl",
        {
            "jax_impl.vocab_emb.ParallelVocabEmbedding",
            "jax_impl.cross_entropy.linear_cross_entropy",
            "jax_impl.decode.parallel_sample",
            "jax_impl.functional.partial_lookup",
            "jax_impl.lm_head.ParallelLMHead",
            "jax_impl.ids.as_ids",
        },
    )
