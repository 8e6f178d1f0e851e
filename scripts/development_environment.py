"""The development environment: checks, .venv, torch, and an editable install of this checkout.

Started by bootstrap.py. It needs only the standard library and changes nothing outside of the checkout; what
it has done is noted in .venv, and when nothing changed it returns at once.

Without a network: WHEELS=<folder> makes pip take every package from that folder and nothing from an index.
"""

import argparse
import ast
import hashlib
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import sysconfig
import tempfile
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
VENV_PYTHON = VENV / "bin" / "python"
STATE = VENV / "ml_debugger_setup.json"
BUILD = ROOT / "build"
TORCH_REQUIREMENTS = ROOT / "scripts" / "requirements-torch.txt"
MINIMUM_TORCH = (2, 4)

# What .venv is for: "dev" has everything, "gpu" only what test-gpu and bench-gpu need.
PURPOSES = ("dev", "gpu")

# A change of one of these needs pip again; a change of the native sources only a rebuild.
ENVIRONMENT_INPUTS = [
    "pyproject.toml",
    "scripts/development_environment.py",
    "scripts/requirements-torch.txt",
]
NATIVE_INPUTS = ["CMakeLists.txt", "cmake", "csrc", "scripts/fetch_lmdb.py"]

CXX_PROBE = (
    "#include <span>\nint main(int, char** words) { return std::span(words, 1).size() == 1 ? 0 : 1; }\n"
)
C_PROBE = "#include <pthread.h>\nint main(void) { return 0; }\n"


class SetupError(Exception):
    """One sentence: what is missing, and how to get it."""


def say(text: str) -> None:
    """Tell the user what is going on."""
    print(f"[setup] {text}", flush=True)


# ---- checks: nothing is changed before all of them passed ----


def wheel_folder() -> Path | None:
    """The folder that WHEELS names, from which alone pip may install; None for pip's index."""
    named = os.environ.get("WHEELS")
    if not named:
        return None
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise SetupError(f"WHEELS names {folder}, which is no folder: gather it as CONTRIBUTING.md says.")
    return folder


def lmdb_source() -> str:
    """MLD_LMDB_SOURCE with its whole path; empty when CMake is to fetch the source."""
    named = os.environ.get("MLD_LMDB_SOURCE")
    if not named:
        return ""
    path = Path(named).expanduser().resolve()
    if not path.exists():
        raise SetupError(f"MLD_LMDB_SOURCE names {path}, which does not exist.")
    return str(path)


def check_venv_module() -> None:
    """Python can make virtual environments; Debian packages that apart."""
    try:
        import venv  # noqa: F401
    except ImportError:
        raise SetupError(
            "The standard module venv is missing: install it (Debian/Ubuntu: apt install python3-venv)."
        ) from None


def compiles(command: list[str], source: str, suffix: str, *flags: str) -> bool:
    """Whether the compiler turns ``source`` into a program."""
    with tempfile.TemporaryDirectory() as work:
        path = Path(work, "probe" + suffix)
        path.write_text(source)
        try:
            result = subprocess.run(
                [*command, *flags, str(path), "-o", str(path.with_suffix(".out")), "-pthread"],
                capture_output=True,
                check=False,
            )
        except OSError:
            return False
        return result.returncode == 0


def find_compiler(variable: str, names: list[str]) -> list[str] | None:
    """The command in the environment variable, else the first of ``names`` that is installed."""
    named = shlex.split(os.environ.get(variable, ""))
    if named:
        return named if shutil.which(named[0]) else None
    return next(([name] for name in names if shutil.which(name)), None)


COMPILERS = {"CXX": ["c++", "g++", "clang++"], "CC": ["cc", "gcc", "clang"]}


def check_compilers() -> None:
    """A C++20 compiler and a C compiler (LMDB is C) are installed and make programs."""
    advice = (
        "install one (Debian/Ubuntu: apt install g++, Fedora: dnf install gcc-c++, "
        "macOS: xcode-select --install) or name it in {0}."
    )
    cxx = find_compiler("CXX", COMPILERS["CXX"])
    if cxx is None:
        looked = os.environ.get("CXX") or "c++, g++, clang++"
        raise SetupError(f"No C++ compiler was found (looked for {looked}): {advice.format('CXX')}")
    if not compiles(cxx, CXX_PROBE, ".cpp", "-std=c++20"):
        raise SetupError(
            f"The C++ compiler {shlex.join(cxx)} cannot build a C++20 program, which GCC 12 or Clang 14 can: "
            + advice.format("CXX")
        )
    cc = find_compiler("CC", COMPILERS["CC"])
    if cc is None or not compiles(cc, C_PROBE, ".c"):
        looked = os.environ.get("CC") or "cc, gcc, clang"
        raise SetupError(f"No working C compiler was found (looked for {looked}): {advice.format('CC')}")


def check_python_header() -> None:
    """Python.h is there."""
    folder = sysconfig.get_path("include")
    if not Path(folder, "Python.h").is_file():
        version = f"{sys.version_info[0]}.{sys.version_info[1]}"
        raise SetupError(
            f"Python.h is missing in {folder}: install Python's headers (Debian/Ubuntu: apt install "
            f"python{version}-dev, Fedora: dnf install python3-devel, macOS: brew install python@{version})."
        )


# ---- the environment ----


def run(*command: str | Path, remedy: str) -> None:
    """Run a step; SetupError with ``remedy`` if it fails (its own output says why)."""
    # These would send packages elsewhere than into .venv, or let another Python's library in.
    dropped = {"PIP_USER", "PIP_TARGET", "PIP_PREFIX", "PYTHONHOME", "__PYVENV_LAUNCHER__"}
    environment = {name: value for name, value in os.environ.items() if name not in dropped}
    environment["PATH"] = os.pathsep.join([str(VENV / "bin"), environment.get("PATH", os.defpath)])
    if source := lmdb_source():
        environment["MLD_LMDB_SOURCE"] = source
    for variable, names in COMPILERS.items():  # else a build asks for the one that Python was made with
        if compiler := find_compiler(variable, names):
            environment[variable] = shlex.join(compiler)
    words = [str(word) for word in command]
    result = subprocess.run(words, cwd=ROOT, env=environment, stdin=subprocess.DEVNULL, check=False)
    if result.returncode != 0:
        raise SetupError(f"This step failed, see above: {shlex.join(words)}. {remedy}")


def pip_install(
    *arguments: str | Path,
    python: str | Path = VENV_PYTHON,
    remedy: str = "Is the package index reachable?",
) -> None:
    """Run ``pip install``, with its progress bars only on a terminal, from WHEELS alone if that is set."""
    quiet = [] if sys.stdout.isatty() else ["--quiet"]
    source: list[str | Path] = []
    if folder := wheel_folder():
        source = ["--no-index", "--find-links", folder]
        remedy = f"Does {folder} have the wheels that CONTRIBUTING.md lists, for this Python? {remedy}"
    command = [python, "-m", "pip", "--disable-pip-version-check", "install", *quiet, *source, *arguments]
    run(*command, remedy=remedy)


def usable_torch() -> list[str] | None:
    """Where the starting interpreter finds packages, if it can import a torch that is new enough."""
    program = (
        "import json, sys, torch\n"
        "paths = [path for path in sys.path if path.endswith(('site-packages', 'dist-packages'))]\n"
        "print(json.dumps([torch.__version__, paths]))"
    )
    result = subprocess.run(
        [sys.executable, "-c", program], cwd=ROOT / "scripts", capture_output=True, text=True, check=False
    )
    if result.returncode != 0:
        return None
    version, paths = json.loads(result.stdout.splitlines()[-1])
    numbers = tuple(int(number) for number in re.findall(r"\d+", version)[:2])
    if numbers < MINIMUM_TORCH:
        return None
    say(f"using torch {version} of {sys.executable}")
    return [str(path) for path in paths]


def interpreter() -> str:
    """What .venv was made from; another one makes it anew."""
    return f"{os.path.realpath(sys.executable)} {sys.version.split()[0]}"


def make_venv(*flags: str) -> None:
    """Make .venv with pip in it, also where Python comes without ensurepip (Debian without python3-venv)."""
    say(f"making .venv with {sys.executable} ({sys.version.split()[0]})")
    remedy = "Remove .venv and try again."
    try:
        import ensurepip  # noqa: F401
    except ImportError:
        if subprocess.run(
            [sys.executable, "-m", "pip", "--version"], capture_output=True, check=False
        ).returncode:
            raise SetupError(
                f"{sys.executable} has neither ensurepip nor pip: install one "
                "(Debian/Ubuntu: apt install python3-venv)."
            ) from None
        run(sys.executable, "-m", "venv", "--clear", "--without-pip", *flags, VENV, remedy=remedy)
        library = f"lib/python{sys.version_info[0]}.{sys.version_info[1]}/site-packages"
        target = VENV / library
        pip_install("--target", target, "pip", python=sys.executable, remedy=remedy)
    else:
        run(sys.executable, "-m", "venv", "--clear", *flags, VENV, remedy=remedy)


def make_environment() -> None:
    """Make .venv with torch: that of the starting interpreter, perhaps a CUDA build, or a new one."""
    paths = usable_torch()
    try:
        make_venv(*([] if paths is None else ["--system-site-packages"]))
        if paths is None:
            pinned = TORCH_REQUIREMENTS.read_text().splitlines()[-1]
            say(f"installing {pinned} (a large download, once)")
            pip_install(
                "-r",
                TORCH_REQUIREMENTS,
                remedy=f"Is the package index reachable, and has it {pinned} for this Python? Or name an "
                "interpreter that has torch, as in `make PYTHON=...`.",
            )
        else:
            # --system-site-packages shows what belongs to the base interpreter, but not an active virtual
            # environment, the user's packages or PYTHONPATH; .venv's own packages come first.
            site = next(VENV.glob("lib/python*/site-packages"))
            (site / "starting_interpreter.pth").write_text("".join(f"{path}\n" for path in paths))
    except BaseException:
        shutil.rmtree(VENV, ignore_errors=True)  # never half an environment
        raise


def requirements(key: str) -> list[str]:
    """The list of requirements that pyproject.toml has under ``key``."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    match = re.search(rf"^{key} = (\[.*?\])$", text, re.MULTILINE | re.DOTALL)
    if match is None:
        raise SetupError(f"pyproject.toml has no list {key}.")
    return [str(requirement) for requirement in ast.literal_eval(match[1])]


def has_program(requirement: str) -> bool:
    """Whether PATH has the program of ``name>=version``, new enough."""
    name, minimum = requirement.split(">=")
    try:
        result = subprocess.run([name, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return False
    version = re.search(r"\d+(?:\.\d+)+", result.stdout)
    numbers = [tuple(map(int, text.split("."))) for text in (version[0] if version else "0", minimum)]
    return result.returncode == 0 and numbers[0] >= numbers[1]


def install_programs(purpose: str) -> None:
    """Put the programs that make calls into .venv, also if the starting interpreter has them elsewhere.

    The words of a GPU call none but those that build, which may be those of the machine.
    """
    programs = ["cmake>=3.21", "ninja>=1.10"]
    if purpose == "gpu":
        programs = [program for program in programs if not has_program(program)]
    else:
        text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
        programs += re.findall(r'"((?:clang-format|ruff)[<>=][^"]*)"', text)
    names = {program: re.split("[<>=]", program)[0] for program in programs}
    missing = [program for program in programs if not (VENV / "bin" / names[program]).exists()]
    if missing:
        pip_install("--ignore-installed", "--no-deps", *missing)


def gpu_requirements() -> list[str]:
    """What the words of a GPU import, without torch: it is there, and its own needs are none of ours."""
    packages = [name for name in requirements("dependencies") if not name.startswith("torch")]
    packages += requirements("tests")
    folder = wheel_folder()
    if folder is None or any(folder.glob("matplotlib-*.whl")):  # offline, plots are a wish
        packages += requirements("benchmark")
    return packages


def install_editable(purpose: str, *, dependencies: bool) -> None:
    """Build the extension in build/ and install the checkout so that edits of Python files count at once."""
    what = [".", "--no-deps"]
    if dependencies:
        say("installing the build tools")
        install_programs(purpose)
        pip_install(*requirements("requires"))
        if purpose == "gpu":
            pip_install(*gpu_requirements())
        else:
            what = [".[dev]"]
    say("building ml_debugger and installing it into .venv")
    # A folder of wheels may hold the archive too; its hash is checked either way.
    cache = wheel_folder() or BUILD / "lmdb"
    # The compiler of a machine with a GPU may be newer than ours and warn of more.
    defines = {"MLD_WERROR": "OFF" if purpose == "gpu" else "ON", "MLD_LMDB_CACHE": str(cache)}
    settings = [f"--config-settings=cmake.define.{name}={value}" for name, value in defines.items()]
    remedy = "The compiler or CMake says above what is wrong; `make clean` starts a build from nothing."
    pip_install("--no-build-isolation", *settings, "--editable", *what, remedy=remedy)


# ---- what has been done ----


def digest(inputs: list[str]) -> str:
    """Hash of names and contents of files, and of the files in folders."""
    total = hashlib.sha256()
    for name in inputs:
        path = ROOT / name
        for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
            if file.is_file():
                total.update(f"{file.relative_to(ROOT)}\0".encode())
                total.update(hashlib.sha256(file.read_bytes()).digest())
    return total.hexdigest()


def wanted_state(purpose: str) -> dict[str, str]:
    """What the note in .venv says when everything is done."""
    return {
        "purpose": purpose,
        "interpreter": interpreter(),
        "checkout": str(ROOT),  # an editable install holds absolute paths
        "environment": digest(ENVIRONMENT_INPUTS),
        "native": digest(NATIVE_INPUTS) + lmdb_source(),
        "compilers": " ".join(
            os.environ.get(name, "") for name in ("CXX", "CC", "CXXFLAGS", "CFLAGS", "LDFLAGS")
        ),
    }


def recorded_state() -> dict[str, str]:
    """What earlier runs did; empty if .venv is gone or does not run."""
    if not VENV_PYTHON.exists():
        return {}
    try:
        state = json.loads(STATE.read_text())
    except (OSError, ValueError):
        return {}
    if not any(BUILD.glob("editable-*")):  # after `make clean`
        state.pop("native", None)
    return dict(state)


def record_state(state: dict[str, str]) -> None:
    """Note the state, all or nothing."""
    temporary = STATE.with_suffix(".tmp")
    temporary.write_text(json.dumps(state, indent=1))
    temporary.replace(STATE)


def set_up(purpose: str) -> None:
    """Do what is missing, and no more."""
    recorded = recorded_state()
    wanted = wanted_state("dev" if recorded.get("purpose") == "dev" else purpose)  # "dev" holds "gpu"
    if wanted == recorded:
        return
    check_venv_module()
    check_compilers()
    check_python_header()
    changed = {key for key in wanted if wanted[key] != recorded.get(key)}
    if changed & {"interpreter", "checkout"}:
        make_environment()
        recorded = {}
    if changed & {"checkout", "compilers"}:
        shutil.rmtree(
            BUILD, ignore_errors=True
        )  # CMake keeps the paths, compilers and flags that it saw first
    # Noted at once: a source that does not compile must not cost another download of torch.
    record_state(recorded | {key: wanted[key] for key in ("interpreter", "checkout", "compilers")})
    dependencies = any(wanted[key] != recorded.get(key) for key in ("environment", "purpose"))
    install_editable(wanted["purpose"], dependencies=dependencies)
    record_state(wanted)
    say("done")


def main() -> int:
    """Run, and turn a problem into one sentence."""
    parser = argparse.ArgumentParser(description="Set up .venv and build/ for the words of the Makefile.")
    parser.add_argument("--for", dest="purpose", choices=PURPOSES, default="dev")
    purpose = parser.parse_args().purpose
    try:
        set_up(purpose)
    except SetupError as error:
        print(f"[setup] {error}", file=sys.stderr)
        return 1
    return 0
