// Detects whether the tensors of a layer were replaced, and keeps their memory alive during a call
// (klfast/nn/direct_call.py, Watch).
#pragma once

#include <Python.h>

namespace klfast {

// What is remembered of a tensor, a tuple: the dictionary and the name to find it by, its id (None if there was none),
// a weak reference to its storage, then what torch said of it.
enum Seen : Py_ssize_t { kHome, kName, kIdentity, kStorage, kCdata, kAddress, kShape, kDtype };

// A new list of the storages behind the tensors in `seen`, a tuple of such tuples; None if one has changed or, with
// `gradients`, takes gradients. Null if Python raised. The caller has the GIL.
PyObject* hold(PyObject* seen, bool gradients);

}  // namespace klfast
