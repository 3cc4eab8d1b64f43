"""Builds the native library: `build(target_dir)`, and `python -m twinpilots.kernels.build [--sanitize]` for a checkout.

Owns the compiler's command line and the rule when to build again (a hash of sources and flags, kept beside the library). Runs on its own, without the
package around it: setup.py loads this file by path. Knows nothing of what the library does.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import re
import shlex
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

PACKAGE_DIR = Path(__file__).resolve().parent
SOURCE_DIR = PACKAGE_DIR / "native"
# No contraction of a * b + c behind our back: fused multiply-adds are written out, so that every row takes the same roundings.
# No -march: the instruction set is chosen at run time. GCC 12's own AVX-512 headers trip -Wmaybe-uninitialized.
WARNINGS = ("-Wall", "-Wextra", "-Wno-psabi", "-Wno-maybe-uninitialized")
COMPILE_FLAGS = ("-O3", "-std=c++17", "-fPIC", "-pthread", "-ffp-contract=off", "-fvisibility=hidden", *WARNINGS)
LINK_FLAGS = ("-shared", "-pthread")
# -O1: the kernels' unrolled templates take minutes to compile with checks at -O3.
SANITIZE_FLAGS = ("-O1", "-fsanitize=address,undefined", "-fno-sanitize-recover=undefined", "-fno-omit-frame-pointer", "-g")


def library_path(target_dir: Path = PACKAGE_DIR, *, sanitize: bool = False) -> Path:
    """Where the library of these sources' ABI lies in ``target_dir``."""
    found = re.search(r"ABI_VERSION = (\d+)", (SOURCE_DIR / "abi.h").read_text())
    assert found is not None
    return target_dir / f"_native_{found[1]}{'_sanitized' if sanitize else ''}.so"


def is_current(target_dir: Path = PACKAGE_DIR, *, sanitize: bool = False) -> bool:
    """Whether ``target_dir`` holds a library of exactly these sources and flags."""
    library = library_path(target_dir, sanitize=sanitize)
    stamp = library.with_suffix(".hash")
    return library.exists() and stamp.exists() and stamp.read_text() == _fingerprint(sanitize)


def build(target_dir: Path, *, sanitize: bool = False) -> Path:
    """Compile the library into ``target_dir`` unless it is current; returns its path. RuntimeError with the compiler's words when it cannot be built."""
    library = library_path(target_dir, sanitize=sanitize)
    if is_current(target_dir, sanitize=sanitize):
        return library
    target_dir.mkdir(parents=True, exist_ok=True)
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    extra = SANITIZE_FLAGS if sanitize else ()
    with tempfile.TemporaryDirectory(prefix="_native_build_", dir=target_dir) as temporary:
        work = Path(temporary)
        sources = sorted(SOURCE_DIR.glob("*.cpp"))
        commands = [[*compiler, *COMPILE_FLAGS, *extra, "-c", str(source), "-o", str(work / f"{source.stem}.o")] for source in sources]
        with ThreadPoolExecutor(max_workers=os.cpu_count()) as workers:
            list(workers.map(_call, commands))
        _call([*compiler, *LINK_FLAGS, *extra, *(str(work / f"{source.stem}.o") for source in sources), "-o", str(work / library.name)])
        os.replace(work / library.name, library)  # a process that runs the old library keeps its own copy
    library.with_suffix(".hash").write_text(_fingerprint(sanitize))
    return library


def _fingerprint(sanitize: bool) -> str:
    digest = hashlib.sha256(repr((os.environ.get("CXX", "g++"), COMPILE_FLAGS, LINK_FLAGS, sanitize, SANITIZE_FLAGS)).encode())
    for source in sorted([*SOURCE_DIR.glob("*.cpp"), *SOURCE_DIR.glob("*.h")]):
        digest.update(source.name.encode() + b"\0" + source.read_bytes())
    return digest.hexdigest()


def _call(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise RuntimeError(f"cannot run the compiler {command[0]!r}: {error.strerror}; install g++ or set CXX") from error
    if done.returncode:
        raise RuntimeError(f"{command[0]} failed on {command[-3] if '-c' in command else 'the link'}:\n{done.stderr.strip()}")
    if done.stderr.strip():
        print(done.stderr.strip(), file=sys.stderr)


def _sanitized_tests(library: Path) -> int:
    """The native tests against the sanitized library. The interpreter is not built with the sanitizer, so its run time has to be loaded first."""
    compiler = shlex.split(os.environ.get("CXX", "g++"))
    queries = [[*compiler, f"-print-file-name={name}"] for name in ("libasan.so", "libubsan.so", "libstdc++.so")]
    runtimes = [subprocess.run(query, capture_output=True, text=True, check=True).stdout.strip() for query in queries]
    environment = {
        **os.environ,
        "LD_PRELOAD": ":".join(runtimes),
        "ASAN_OPTIONS": "detect_leaks=0",  # Python itself never frees everything
        "TWINPILOTS_TEST_NATIVE": str(library),
    }
    tests = sorted(str(path) for path in (PACKAGE_DIR.parents[1] / "tests" / "cpu").glob("test_native_*.py"))
    return subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *tests], env=environment, check=False).returncode


def main() -> int:
    """Exit code 0 when the library is there (and, with --sanitize, its tests passed)."""
    parser = argparse.ArgumentParser(description="Build the native library in place.")
    parser.add_argument(
        "--sanitize", action="store_true", help="build with the sanitizers (address, undefined behaviour) and run the native tests against that"
    )
    arguments = parser.parse_args()
    try:
        library = build(PACKAGE_DIR, sanitize=arguments.sanitize)
    except RuntimeError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return _sanitized_tests(library) if arguments.sanitize else 0


if __name__ == "__main__":
    sys.exit(main())
