"""The examples run and `__all__` is true."""


def test_documentation(check_documentation):
    check_documentation("jax_impl", {"jax_impl.vocab_emb.ParallelVocabEmbedding", "jax_impl.lm_head.ParallelLMHead"})
