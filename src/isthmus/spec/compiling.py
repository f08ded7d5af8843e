"""Compiles a C file of this package, once on each machine, and loads it: for what is too small for an operator each.

Nothing needs it: where there is no compiler, PyTorch or Python does the same, slower. Stdlib only.

The library is kept in the cache under a name made of the source, the compiler's options and the processor: several
machines may share a home directory.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from isthmus.spec.errors import IsthmusError
from isthmus.spec.files import atomic_write, cache_directory

# Sums may be taken in any order (with as many side by side as the processor has room for). Not -ffast-math: GCC then
# makes the whole process flush denormal numbers, and infinities, which masks are made of, are undefined.
_OPTIONS = (
    *("-std=gnu11", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math"),
    *("-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"),
)
_THIS_PROCESSOR = (("-march=native",), ("-mcpu=native",), ())
_COMPILE_TIMEOUT_S = 120.0
_CPU_LINES = ("model name", "flags", "CPU implementer", "CPU part", "Features")


@functools.cache
def load(source: Path) -> ctypes.CDLL | None:
    """The functions of ``source``. None where it cannot be compiled, which is said once on stderr, or with
    ``ISTHMUS_NATIVE=0``. Blocks for some seconds the first time on a machine."""
    if os.environ.get("ISTHMUS_NATIVE") == "0":
        return None
    try:
        return ctypes.CDLL(str(build(source)))
    except (IsthmusError, OSError) as error:
        print(f"isthmus: {error}; goes on without, slower (ISTHMUS_NATIVE=0: this is wanted)", file=sys.stderr)
        return None


def build(source: Path) -> Path:
    """The compiled library, from the cache or made. Raises ``IsthmusError`` that says what is missing."""
    text = source.read_bytes()
    digest = hashlib.sha256(b"\0".join([text, *map(str.encode, _OPTIONS), _processor().encode()])).hexdigest()[:24]
    library = cache_directory() / "native" / f"{source.stem}-{digest}.so"
    if library.is_file():
        return library
    compiler = _compiler(source)
    with tempfile.TemporaryDirectory(prefix="isthmus-") as scratch:
        made = Path(scratch) / library.name
        _compile(compiler, source, made)
        atomic_write(library, made.read_bytes())
    return library


def _compiler(source: Path) -> str:
    wanted = os.environ.get("CC")
    for name in [wanted] if wanted else ["cc", "gcc", "clang"]:
        if found := shutil.which(name):
            return found
    what = f"no {wanted} (named by CC)" if wanted else "no C compiler"
    raise IsthmusError(f"{what} was found for {source.name}: install one (Debian: apt install gcc)")


def _compile(compiler: str, source: Path, library: Path) -> None:
    """For this processor, whichever way the compiler can be told so."""
    for number, own in enumerate(_THIS_PROCESSOR):
        try:
            command = [compiler, *_OPTIONS, *own, str(source), "-o", str(library), "-lm"]
            subprocess.run(command, check=True, capture_output=True, text=True, timeout=_COMPILE_TIMEOUT_S)
            return
        except subprocess.CalledProcessError as error:
            if number == len(_THIS_PROCESSOR) - 1:
                said = error.stderr.strip().splitlines() or ["it said nothing"]
                raise IsthmusError(
                    f"{compiler} could not compile {source} ({said[0]}): install its headers (Debian: apt install "
                    "libc6-dev) or another compiler"
                ) from error
        except subprocess.TimeoutExpired as error:
            raise IsthmusError(f"{compiler} took over {_COMPILE_TIMEOUT_S:g} s for {source}") from error


def _processor() -> str:
    """What ``_THIS_PROCESSOR`` depends on."""
    found = [platform.machine()]
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(_CPU_LINES):
                found.append(line)
            elif not line and len(found) > 1:  # the first processor's; all are alike
                break
    except OSError:
        found.append(platform.processor())
    return "\n".join(found)
