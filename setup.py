"""The native kernels: one extension module, instruction sets chosen at run time."""

import sys
from pathlib import Path

from setuptools import Extension, setup

HERE = Path("quant/kernels/cpp")

setup(
    ext_modules=[
        Extension(
            "quant.kernels._native",
            sources=sorted(str(path) for path in HERE.glob("*.cpp")),
            depends=sorted(str(path) for path in [*HERE.glob("*.h"), *HERE.glob("*.inl")]),
            extra_compile_args=[
                "-std=c++17",
                "-O3",
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
            define_macros=[("Py_LIMITED_API", "0x030B0000")],
            py_limited_api=True,
        )
    ],
    options={"bdist_wheel": {"py_limited_api": "cp311"}},
)
