"""Write a trace as many Parquet files and let DuckDB read them in parallel: which samples are still wrong?

    python examples/query_with_duckdb.py MODEL VERSION [DATA_DIR]

Without arguments it records a small trace first. Needs ``pip install duckdb "ml-debugger[arrow]"``. Spark,
Ray Data and Dask read the same folders: ``spark.read.parquet(folder)``,
``ray.data.read_parquet(folder, partitioning=Partitioning("hive"))``, ``dask.dataframe.read_parquet(folder)``.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path

import duckdb

from ml_debugger import open_trace

QUERY = """
select feature.n_epoch as epoch, count(*) as rows,
       avg((list_position(feature.logits, list_max(feature.logits)) - 1 = truth.label)::int) as accuracy
from read_parquet($features, hive_partitioning = true) as feature
join read_parquet($labels, hive_partitioning = true) as truth using (row_id)
where feature.dataset_type = 'train'
group by epoch order by epoch
"""


def record_some(data_dir: Path) -> None:
    """A short training that leaves a trace."""
    import torch
    from torch import nn

    from ml_debugger import TracerConfig
    from ml_debugger.training import ClassificationTracer

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 3))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5)
    inputs = torch.randn(512, 8)
    labels = inputs[:, :3].argmax(dim=1)
    with ClassificationTracer(model, "mlp", "v1", config=TracerConfig(data_dir=data_dir)) as tracer:
        for epoch in range(4):
            for ids in torch.randperm(512).split(64):
                logits = tracer(inputs[ids], labels[ids], ids, "train", epoch)
                optimizer.zero_grad()
                nn.functional.cross_entropy(logits, labels[ids]).backward()
                optimizer.step()


def main() -> None:
    with tempfile.TemporaryDirectory() as scratch:
        model, version, data_dir = ("mlp", "v1", str(Path(scratch) / "mld_data"))
        if len(sys.argv) > 2:
            model, version, data_dir = sys.argv[1], sys.argv[2], (sys.argv[3:] or ["mld_data"])[0]
        else:
            record_some(Path(data_dir))
        trace = open_trace(model, version, data_dir=data_dir)
        folders = {"features": Path(scratch) / "features", "labels": Path(scratch) / "labels"}
        # Small files, so that this small trace has many.
        files = trace.to_parquet("extracted_feature", folders["features"], dedupe=True, rows_a_file=128)
        trace.to_parquet("ground_truth", folders["labels"], ["row_id", "label"], dedupe=True, rows_a_file=128)
        print(f"{len(files)} files of features, read in parallel:")
        with duckdb.connect() as connection:
            patterns = {name: f"{folder}/*/*.parquet" for name, folder in folders.items()}
            for epoch, rows, accuracy in connection.execute(QUERY, patterns).fetchall():
                print(f"epoch {epoch}: {rows} samples, accuracy {accuracy:.3f}")


if __name__ == "__main__":
    main()
