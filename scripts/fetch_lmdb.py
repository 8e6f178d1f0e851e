"""Fetches a source distribution with pip, by name, and checks its SHA-256. Called by cmake/Lmdb.cmake.

`pip download` of a source distribution insists on its metadata and would install a build backend, then run
the package's setup.py, for files that are never used. So pip gets a stand-in backend that answers from the
package's name and version: nothing from the archive is executed and nothing else is downloaded. The index,
proxies and certificates are those of pip's own configuration.

Prints the path of the archive; diagnostics go to the standard error stream.
"""

import argparse
import hashlib
import importlib.util
import os
import subprocess
import sys
import tempfile
from pathlib import Path

STAND_IN_BACKEND = """
import os

def prepare_metadata_for_build_wheel(metadata_directory, config_settings=None):
    info = "{name}-{version}.dist-info"
    os.mkdir(os.path.join(metadata_directory, info))
    with open(os.path.join(metadata_directory, info, "METADATA"), "w") as file:
        file.write("Metadata-Version: 2.1\\nName: {name}\\nVersion: {version}\\n")
    return info
"""


def has_hash(path: Path, sha256: str) -> bool:
    """Whether the file is there and holds what we expect."""
    return path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == sha256


def download(name: str, version: str, sha256: str, work: Path) -> None:
    """Let pip put the archive into ``work / "out"``; CalledProcessError if it cannot."""
    backend = work / "backend" / "setuptools"
    backend.mkdir(parents=True)
    (backend / "__init__.py").touch()
    (backend / "build_meta.py").write_text(STAND_IN_BACKEND.format(name=name, version=version))
    requirements = work / "requirements.txt"
    requirements.write_text(f"{name}=={version} --hash=sha256:{sha256}\n")
    # In front of what is there: a build environment of pip puts itself into PYTHONPATH.
    paths = [str(backend.parent), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", "download", "--quiet", "--no-deps"]
    command += [
        "--no-binary",
        name,
        "--no-build-isolation",
        "--dest",
        str(work / "out"),
        "-r",
        str(requirements),
    ]
    subprocess.run(command, env=environment, stdin=subprocess.DEVNULL, stdout=sys.stderr, check=True)


def fetch(name: str, version: str, sha256: str, cache: Path) -> Path:
    """Return the archive in ``cache``, downloaded if need be; SystemExit with one sentence if that fails."""
    target = cache / f"{name}-{version}.tar.gz"
    if has_hash(target, sha256):
        return target
    if importlib.util.find_spec("pip") is None:
        raise SystemExit(f"{sys.executable} has no pip, which is needed to fetch {name} {version}.")
    cache.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=cache) as work:
        try:
            download(name, version, sha256, Path(work))
        except subprocess.CalledProcessError as error:
            raise SystemExit(
                f"pip could not download {name} {version} (exit status {error.returncode})."
            ) from None
        found = [path for path in (Path(work) / "out").iterdir() if has_hash(path, sha256)]
        if not found:
            raise SystemExit(f"The archive of {name} {version} does not have SHA-256 {sha256}.")
        os.replace(found[0], target)
    return target


def main() -> None:
    """Parse the command line and print the archive's path."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("package", metavar="NAME==VERSION")
    parser.add_argument("--sha256", required=True)
    parser.add_argument("--cache", type=Path, required=True)
    arguments = parser.parse_args()
    name, _, version = arguments.package.partition("==")
    print(fetch(name, version, arguments.sha256, arguments.cache))


if __name__ == "__main__":
    main()
