"""Other ways to do a tracer's job, each in a module with one or two classes; `ALL` lists them."""

from __future__ import annotations

from benchmarks.baselines.base import Baseline
from benchmarks.baselines.h5py_append import H5pyAppend
from benchmarks.baselines.hook_list import HookIntoList
from benchmarks.baselines.lance_append import LanceAppend
from benchmarks.baselines.lmdb_msgpack import LmdbInHook, LmdbInThread
from benchmarks.baselines.mosaic_streaming import MosaicStreaming
from benchmarks.baselines.nnsight_trace import NnsightTrace
from benchmarks.baselines.numpy_save import NumpySave
from benchmarks.baselines.parquet_thread import ParquetInThread
from benchmarks.baselines.safetensors_save import SafetensorsSave
from benchmarks.baselines.smdebug_hook import SmdebugHook
from benchmarks.baselines.sqlite_rows import SqliteRows
from benchmarks.baselines.torch_save import TorchSave
from benchmarks.baselines.torchlens_log import TorchLensLog
from benchmarks.baselines.zarr_append import ZarrAppend

ALL: tuple[type[Baseline], ...] = (
    HookIntoList,
    NumpySave,
    TorchSave,
    SafetensorsSave,
    H5pyAppend,
    SqliteRows,
    LmdbInHook,
    LmdbInThread,
    ParquetInThread,
    ZarrAppend,
    LanceAppend,
    MosaicStreaming,
    TorchLensLog,
    NnsightTrace,
    SmdebugHook,
)

__all__ = ["ALL", "Baseline"]
