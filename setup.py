"""The native kernels: one extension module, instruction sets chosen at run time."""

import os
import runpy
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

HERE = Path("quant/kernels/cpp")
SOURCES = runpy.run_path(str(HERE.parent / "sources.py"))["sources_digest"](HERE)
# Times of files say nothing of a module that was copied here.
BUILT = any(SOURCES.encode() in built.read_bytes() for built in HERE.parent.glob("_native*.so"))


class BuildExt(build_ext):
    """Several sources at a time; and beside what lies there already, never over it: processes may have it mapped, and
    would end by a signal."""

    def build_extensions(self):
        one = self.compiler.compile

        def compile_all(sources, **options):
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                return [name for names in pool.map(lambda source: one([source], **options), sources) for name in names]

        self.compiler.compile = compile_all
        super().build_extensions()

    def copy_extensions_to_source(self):
        for built in HERE.parent.glob("_native*.so"):
            built.unlink()
        super().copy_extensions_to_source()


setup(
    cmdclass={"build_ext": BuildExt},
    ext_modules=[
        Extension(
            "quant.kernels._native",
            sources=sorted(str(path) for path in HERE.glob("*.cpp")),
            depends=sorted(str(path) for path in [*HERE.glob("*.h"), *HERE.glob("*.inl")]),
            extra_compile_args=[
                "-std=c++17",
                "-O3",
                "-g0",  # Python's own flags may ask for debugging information, which takes half of the time
                "-fno-wrapv",  # Python's own flags bring -fwrapv, which makes a token's product 1.4 times as long
                "-fvisibility=hidden",
                "-ffp-contract=fast",
                "-fno-math-errno",
                "-fno-trapping-math",
                "-Wall",
                "-Wextra",
                "-Wno-psabi",
                "-Wno-maybe-uninitialized",  # gcc 12 warns inside its own AVX-512 header
                "-pthread",
            ],
            extra_link_args=["-pthread"] if sys.platform != "darwin" else [],
            define_macros=[("Py_LIMITED_API", "0x030B0000"), ("COLDSTREAM_SOURCES", f'"{SOURCES}"')],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}, "build_ext": {"force": not BUILT}},
)
