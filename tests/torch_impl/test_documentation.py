"""The examples run and `__all__` is true."""


def test_documentation(check_documentation):
    check_documentation(
        "torch_impl", {"torch_impl.vocab_emb.ParallelVocabEmbedding", "torch_impl.functional.partial_lookup"}
    )
