"""A job on two hosts with a disk each: its ranks meet in a collector, or in what ``merge`` makes."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

import pytest

from hosts import COLLECTOR_PORT, RENDEZVOUS_PORT, TUNNEL_PORT, can_make_hosts, two_hosts, wait_for_text
from ml_debugger import open_trace
from ml_debugger.store import layout
from ml_debugger.store.merging import merge_data_dirs
from ml_debugger.trace.verify import verify_trace
from test_torchrun import PROGRAM, check_is_the_dataset
from torchrun_program import EPOCHS

pytestmark = [pytest.mark.soak, pytest.mark.timeout(300)]
RANKS_A_HOST = 2
DEADLINE_S = 120


@pytest.mark.skipif(not can_make_hosts(), reason="needs root and `ip netns`")
@pytest.mark.skipif(importlib.util.find_spec("starlette") is None, reason="needs the extra server")
def test_two_hosts_with_their_own_disks_read_as_one_trace(tmp_path: Path) -> None:
    key = {"MLD_API_KEYS": "a-key-of-this-test", "MLD_API_KEY": "a-key-of-this-test"}
    with two_hosts() as hosts:
        command = [sys.executable, "-m", "ml_debugger.cli", "serve", "--port", str(COLLECTOR_PORT)]
        hosts.start(1, [*command, "--storage", str(tmp_path / "collected")], key, tmp_path / "serve.log")
        local, cable = ("127.0.0.1", COLLECTOR_PORT), ("10.77.0.1", TUNNEL_PORT)
        hosts.tunnel(1, cable, local, tmp_path / "tunnel-1.log")
        hosts.tunnel(2, local, cable, tmp_path / "tunnel-2.log")
        for number in (1, 2):
            wait_for_text(tmp_path / f"tunnel-{number}.log", "listening")
        jobs = []
        for number in (1, 2):
            (tmp_path / f"host-{number}").mkdir()
            command = [sys.executable, "-m", "torch.distributed.run", "--nnodes=2", "--rdzv-id=two-hosts"]
            command += [f"--nproc-per-node={RANKS_A_HOST}", "--rdzv-backend=c10d"]
            command += [f"--rdzv-endpoint=10.77.0.1:{RENDEZVOUS_PORT}", f"--local-addr=10.77.0.{number}"]
            command += [f"--rdzv-conf=is_host={number == 1},join_timeout=120"]
            command += [str(PROGRAM), "hosts", str(tmp_path / f"host-{number}")]
            settings = {
                "MLD_API_ENDPOINT": f"http://127.0.0.1:{COLLECTOR_PORT}",
                "OMP_NUM_THREADS": "1",
                **key,
            }
            jobs.append(hosts.start(number, command, settings, tmp_path / f"job-{number}.log"))
        for number, job in enumerate(jobs, 1):
            assert job.wait(DEADLINE_S) == 0, (tmp_path / f"job-{number}.log").read_text()[-4000:]
    assert "the export has no rows of ranks 2, 3, of the 4 ranks" in (tmp_path / "job-1.log").read_text()
    assert "the export has no rows" not in (tmp_path / "job-2.log").read_text()
    merge_data_dirs([tmp_path / f"host-{number}" / "data" for number in (1, 2)], tmp_path / "merged")
    for place in ("collected", "merged"):
        trace = open_trace("net", "v1", data_dir=tmp_path / place)
        for epoch in range(EPOCHS):
            check_is_the_dataset(trace, "train", epoch)
            check_is_the_dataset(trace, "val", epoch)
        (trace_dir,) = layout.trace_directories(tmp_path / place)
        assert verify_trace(trace_dir).problems == []
