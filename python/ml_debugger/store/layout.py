"""How a trace lies on disk (`docs/record_format.md`), in one namespace: paths, segments and small files.

Rows are written and read by `_core`.
"""

from ml_debugger.store.attempts_file import (
    MAX_ATTEMPTS,
    attempt_entries,
    attempts,
    register_attempt,
    write_attempts,
)
from ml_debugger.store.files import (
    FORMAT_VERSION,
    make_directory,
    read_json,
    storage_errors,
    sync_directory,
    write_json,
)
from ml_debugger.store.partition import (
    DATA_FILE,
    FIRST_SLICE_SEQUENCE,
    SEALED_FILE,
    SEGMENT_FILE,
    SegmentEntry,
    SliceName,
    boot_id,
    data_bytes,
    is_torn,
    parse_slice_name,
    segment_directories,
    segments,
    slice_files,
    staging_directories,
    staging_entries,
    write_staging,
)
from ml_debugger.store.paths import (
    LOCK_FILE,
    MAX_RANKS,
    NO_EPOCH,
    Partition,
    check_name,
    partition_directory,
    partitions,
    rank_directories,
    rank_directory,
    resolve_data_dir,
    slug,
    trace_directories,
    trace_directory,
)
from ml_debugger.store.version_file import (
    VersionInfo,
    parse_version,
    read_version,
    read_version_document,
    version_document,
    version_tag,
    write_version,
)

__all__ = [
    "DATA_FILE", "FIRST_SLICE_SEQUENCE", "FORMAT_VERSION", "LOCK_FILE", "MAX_ATTEMPTS", "MAX_RANKS",
    "NO_EPOCH", "SEALED_FILE", "SEGMENT_FILE", "Partition", "SegmentEntry", "SliceName", "VersionInfo",
    "attempt_entries", "attempts", "boot_id", "check_name", "data_bytes", "is_torn",
    "make_directory", "parse_slice_name", "parse_version", "partition_directory", "partitions",
    "rank_directories", "rank_directory", "read_json", "read_version", "read_version_document",
    "register_attempt", "resolve_data_dir", "segment_directories", "segments", "slice_files", "slug",
    "staging_directories", "staging_entries", "storage_errors", "sync_directory", "trace_directories",
    "trace_directory",
    "version_document", "version_tag", "write_attempts", "write_json", "write_staging", "write_version",
]  # fmt: skip
