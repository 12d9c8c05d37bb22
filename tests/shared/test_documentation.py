"""The examples run and `__all__` is true."""


def test_documentation(check_documentation):
    check_documentation(
        "shared",
        {
            "shared.partition.VocabPartition",
            "shared.oracle.partial_lookup",
            "shared.oracle.weight_grad",
            "shared.ids.widen",
            "shared.rows.Rows.of",
        },
    )
