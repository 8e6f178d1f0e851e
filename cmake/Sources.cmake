# Every source file of ours, by name. A new file is added here and nowhere else; headers are found by #include.

# Built a second time for stager_mutations.
set(MLD_DEVICE_SOURCES
    csrc/device/cuda_driver.cpp
    csrc/device/completion_word.cpp
    csrc/device/device_notes.cpp
    csrc/device/device_path.cpp
    csrc/device/device_ring.cpp
    csrc/device/device_session.cpp
    csrc/device/device_stager.cpp)

set(MLD_CORE_SOURCES
    csrc/process.cpp
    csrc/ring/arena.cpp
    csrc/store/crc32c.cpp
    csrc/store/record_format.cpp
    csrc/store/files.cpp
    csrc/store/environment.cpp
    csrc/store/segment.cpp
    csrc/store/partition.cpp
    csrc/store/store.cpp
    csrc/store/segment_reader.cpp
    ${MLD_DEVICE_SOURCES}
    csrc/capture/attempt.cpp
    csrc/capture/thread_call.cpp
    csrc/capture/ring_room.cpp
    csrc/capture/read_back.cpp
    csrc/capture/recorder.cpp
    csrc/writer/writer.cpp
    csrc/writer/runtime.cpp)

# What LMDB itself calls.
set(MLD_LMDB_NEEDS_SOURCES
    csrc/store/early_write_back.cpp
    csrc/store/meta_write.cpp
    csrc/store/page_loan.cpp)

set(MLD_BINDING_SOURCES
    csrc/bindings/bind_errors.cpp
    csrc/bindings/bind_recorder.cpp
    csrc/bindings/bind_segment.cpp
    csrc/bindings/bind_store.cpp
    csrc/bindings/capture_hook.cpp
    csrc/bindings/module.cpp
    csrc/bindings/tensor_source.cpp)

# Relative to tests/core.
set(MLD_CORE_TESTS
    support.cpp
    broken_ring.cpp
    check_test.cpp
    byte_ring_test.cpp
    byte_ring_stress_test.cpp
    crc32c_test.cpp
    ledger_test.cpp
    record_format_test.cpp
    partition_test.cpp
    partition_failure_test.cpp
    environment_test.cpp
    early_write_back_test.cpp
    meta_write_test.cpp
    page_loan_test.cpp
    slot_copy_test.cpp
    scarce_memory_test.cpp
    segment_reader_test.cpp
    fuzz_test.cpp
    store_test.cpp
    writer_test.cpp
    recorder_test.cpp
    overflow_test.cpp
    fork_test.cpp
    fake_cuda_test.cpp
    fake_cuda_rules_test.cpp
    cuda_driver_test.cpp
    device_scenarios.cpp
    device_stager_test.cpp
    device_recorder_test.cpp
    stress_test.cpp)

# Relative to tests/fake_cuda.
set(MLD_FAKE_CUDA_SOURCES
    accesses.cpp
    api_context.cpp
    api_memory.cpp
    api_symbols.cpp
    call.cpp
    capture.cpp
    control.cpp
    driver.cpp
    memory.cpp
    rules.cpp
    scheduler.cpp)
