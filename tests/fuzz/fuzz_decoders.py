"""Feeds mutants of sound bytes to every decoder of bytes from elsewhere; exit status 1 for a finding.

A finding is an exception that is none of the package's, a crash, an input that takes longer than 20 s or more
memory than 4 GiB beyond what the process has. The input is kept in ``--keep``. With ``--guided`` (needs the
package atheris) one decoder is fuzzed by coverage instead.
"""

from __future__ import annotations

import argparse
import random
import resource
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path
from typing import Any

SECONDS_AN_INPUT = 20
MORE_BYTES = 4 << 30


def _limit_memory() -> None:
    used = int(Path("/proc/self/statm").read_text().split()[0]) * resource.getpagesize()
    resource.setrlimit(resource.RLIMIT_AS, (used + MORE_BYTES, used + MORE_BYTES))


def _too_long(*_: object) -> None:
    raise TimeoutError(f"one input took longer than {SECONDS_AN_INPUT} s")


def fuzz(name: str, decoder: Any, seed: int, runs: int, seconds: float, keep: Path) -> tuple[int, int]:
    """(inputs, refused ones) of one decoder; a finding is raised, its input kept."""
    from mutation import mutant

    from ml_debugger.errors import MlDebuggerError

    choice = random.Random(f"{name} {seed}")
    end = time.monotonic() + seconds
    done = refused = 0
    kept = keep / f"{name.replace(' ', '-')}.bin"
    while done < runs or time.monotonic() < end:
        data = mutant(choice.choice(decoder.seeds), choice.choice(decoder.seeds), choice)
        kept.write_bytes(data)  # before: a crash tells nothing
        done += 1
        signal.alarm(SECONDS_AN_INPUT)
        try:
            decoder.run(data)
        except MlDebuggerError:
            refused += 1
        except BaseException:
            print(f"{name}: seed {seed}, input {done}, kept in {kept}", flush=True)
            raise
        finally:
            signal.alarm(0)
    kept.unlink(missing_ok=True)
    return done, refused


def guided(name: str, seconds: int, folder: Path) -> None:
    """By coverage, until the time is over; ends the process."""
    try:
        import atheris
    except ImportError:
        sys.exit("--guided needs the package atheris: pip install atheris")

    with atheris.instrument_imports(include=["ml_debugger"]):
        from decoders import decoders
    from ml_debugger.errors import MlDebuggerError

    decoder = decoders(folder / "files")[name]
    corpus = folder / "corpus"
    corpus.mkdir()
    for number, seed in enumerate(decoder.seeds):
        (corpus / str(number)).write_bytes(seed)

    def one_input(data: bytes) -> None:
        try:
            decoder.run(data)
        except MlDebuggerError:
            return

    options = [f"-max_total_time={seconds}", f"-timeout={SECONDS_AN_INPUT}", "-rss_limit_mb=6000"]
    atheris.Setup([sys.argv[0], str(corpus), *options, f"-max_len={1 << 17}"], one_input)
    atheris.Fuzz()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seed", type=int, default=random.SystemRandom().randrange(1 << 30))
    parser.add_argument("--runs", type=int, default=1, help="inputs a decoder, at least")
    parser.add_argument("--seconds", type=float, default=0.0, help="time a decoder, at least")
    parser.add_argument("--decoder", help="only this one")
    parser.add_argument("--guided", action="store_true", help="by coverage, with atheris; needs --decoder")
    parser.add_argument("--keep", type=Path, default=Path(), help="where the input of a finding stays")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="mld-fuzz-") as folder:
        (Path(folder) / "files").mkdir()
        if options.guided:
            guided(options.decoder, int(options.seconds), Path(folder))
            return 0
        from decoders import decoders

        targets = decoders(Path(folder) / "files")
        signal.signal(signal.SIGALRM, _too_long)
        _limit_memory()
        for name, decoder in targets.items():
            if options.decoder not in (None, name):
                continue
            try:
                done, refused = fuzz(name, decoder, options.seed, options.runs, options.seconds, options.keep)
            except BaseException:
                traceback.print_exc()
                return 1
            print(f"{name}: {done} inputs, {refused} refused", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
