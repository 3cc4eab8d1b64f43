"""Builds the native library into the package; everything else is in pyproject.toml.

An install never fails for want of a compiler: without the library everything runs on torch (extra ``torch``), more slowly, and `twinpilots doctor` says so.
"""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path

from setuptools import Distribution, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_py import build_py

ROOT = Path(__file__).resolve().parent
LIBRARY_PATTERN = "_native_*.so"


def build_native(target_dir: Path) -> None:
    """Compile the library into ``target_dir``; on failure warn once and go on."""
    source = ROOT / "twinpilots" / "kernels" / "build.py"
    module_spec = importlib.util.spec_from_file_location("twinpilots_kernels_build", source)
    assert module_spec is not None and module_spec.loader is not None
    module = importlib.util.module_from_spec(module_spec)
    sys.modules[module_spec.name] = module
    module_spec.loader.exec_module(module)
    try:
        module.build(target_dir)
    except Exception as error:  # noqa: BLE001  any failure of a foreign tool chain: the package works without the library
        print(f"warning: the native library was not built ({error}); TwinPilots will use torch, more slowly", file=sys.stderr)


class BuildWithNative(build_py):
    """build_py, then the library: beside the sources for an editable install, else into the build directory."""

    def run(self) -> None:
        super().run()
        build_native(ROOT / "twinpilots" / "kernels" if self.editable_mode else Path(self.build_lib).resolve() / "twinpilots" / "kernels")


class NativeDistribution(Distribution):
    """Tells setuptools that the package holds machine code, so that it is laid out as such."""

    def has_ext_modules(self) -> bool:
        return True


class PlatformWheel(bdist_wheel):
    """Tags the wheel for this platform but any Python 3: the library is loaded through ctypes."""

    def get_tag(self) -> tuple[str, str, str]:
        return ("py3", "none", super().get_tag()[2])


setup(distclass=NativeDistribution, cmdclass={"build_py": BuildWithNative, "bdist_wheel": PlatformWheel})
