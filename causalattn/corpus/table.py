"""The table that a corpus leaves: one row a document, layer and head, its columns fixed."""

# what changes when the columns do
SCHEMA = 1
SCORES = (
    "dag_score", "null", "null_std", "lift", "z",
    "sink_removed", "sink_removed_null", "sink_removed_null_std", "sink_removed_lift", "sink_removed_z",
    "unmasked", "unmasked_null", "unmasked_null_std", "unmasked_lift", "unmasked_z",
    "sink_mass", "asymmetry", "unmasked_asymmetry", "score_asymmetry", "entropy",
)  # fmt: skip


def load_pyarrow():
    try:
        import pyarrow.parquet
    except ImportError as error:
        raise ImportError("pyarrow is not installed: pip install 'causalattn[corpus]'") from error
    return pyarrow


def schema():
    """A document's number, name and length, then Report.rows() of it; a score that there is not is null."""
    pa = load_pyarrow()
    received = pa.struct([("index", pa.int32()), ("token", pa.string()), ("mean", pa.float64())])
    return pa.schema(
        [
            ("document", pa.int64()),
            ("id", pa.string()),
            ("tokens", pa.int32()),
            ("tokens_left_out", pa.int32()),
            ("layer", pa.int32()),
            ("head", pa.int32()),
            ("causal", pa.bool_()),
            *((name, pa.float64()) for name in SCORES),
            ("received", pa.list_(received)),
        ]
    )


def to_parquet(rows: list[dict]) -> bytes:
    """The rows as a Parquet file; the same rows give the same bytes."""
    pa = load_pyarrow()
    sink = pa.BufferOutputStream()
    pa.parquet.write_table(pa.Table.from_pylist(rows, schema=schema()), sink, compression="zstd")
    return sink.getvalue().to_pybytes()
