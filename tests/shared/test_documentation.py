"""The examples run and `__all__` is true."""


def test_documentation(check_documentation):
    check_documentation(
        "shared",
        {
            "shared.partition.VocabPartition",
            "shared.proof.oracle.partial_lookup",
            "shared.proof.oracle.weight_grad",
            "shared.ids.widen",
            "shared.proof.rows.Rows.of",
        },
    )
