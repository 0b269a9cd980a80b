// The module caps_kernels._cuda: loading it registers the ops of namespace caps_kernels_cuda with torch.
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#ifndef CAPS_ARCHITECTURES
#error "the build gives the names of the architectures that kernels are compiled for"
#endif

namespace {

PyObject* architectures(PyObject*, PyObject*) { return PyUnicode_FromString(CAPS_ARCHITECTURES); }

PyMethodDef methods[] = {
    {"architectures", architectures, METH_NOARGS, "What the kernels are compiled for, such as \"sm_80 compute_80\"."},
    {nullptr, nullptr, 0, nullptr},
};
PyModuleDef module = {
    PyModuleDef_HEAD_INIT, "_cuda", "CUDA C++ kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__cuda() { return PyModule_Create(&module); }
