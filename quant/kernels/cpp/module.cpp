// An empty Python module: setuptools builds it, ctypes loads it, so no Python or torch ABI is involved.
#include <Python.h>

#include "kernels.h"

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr,
                                 nullptr,               nullptr,   nullptr, nullptr};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }

// A hash of the sources, by setup.py: quant/kernels/library.py refuses a module that was built from others.
COLDSTREAM_API const char* cs_sources(void) { return COLDSTREAM_SOURCES; }
