// An empty Python module: setuptools builds it, ctypes loads it, so no Python or torch ABI is involved.
#include <Python.h>

static PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", nullptr, -1, nullptr,
                                 nullptr,               nullptr,   nullptr, nullptr};

PyMODINIT_FUNC PyInit__native(void) { return PyModule_Create(&definition); }
