#include "python/multiply.h"

#include <vector>

namespace py = pybind11;

namespace klfast {
namespace {

struct Names {
    PyObject* address = PyUnicode_InternFromString("data_ptr");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* new_empty = PyUnicode_InternFromString("new_empty");
    PyObject* shape = PyUnicode_InternFromString("shape");
};

const Names& names() {
    static const Names found;
    return found;
}

// An object that Python has just returned.
py::object taken(PyObject* object) {
    if (object == nullptr) throw py::error_already_set();
    return py::reinterpret_steal<py::object>(object);
}

py::object call(py::handle tensor, PyObject* method) { return taken(PyObject_CallMethodNoArgs(tensor.ptr(), method)); }

// nullptr if there is no memory.
void* address_of(py::handle tensor) { return PyLong_AsVoidPtr(call(tensor, names().address).ptr()); }

// The number of rows of x [..., k]; 0 if x has another shape.
std::int64_t rows_of(py::handle shape, std::int64_t k) {
    const Py_ssize_t last = PyTuple_GET_SIZE(shape.ptr()) - 1;
    if (last < 0 || PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), last)) != k) return 0;
    std::int64_t rows = 1;
    for (Py_ssize_t i = 0; i < last; ++i) rows *= PyLong_AsLongLong(PyTuple_GET_ITEM(shape.ptr(), i));
    return rows;
}

// x.new_empty(*shape[:-1], n): torch reads single sizes in half the time of a tuple.
py::object result_for(py::handle x, py::handle shape, py::handle n) {
    const Py_ssize_t dims = PyTuple_GET_SIZE(shape.ptr());
    std::vector<PyObject*> arguments{x.ptr()};
    arguments.reserve(1 + dims);
    for (Py_ssize_t i = 0; i < dims - 1; ++i) arguments.push_back(PyTuple_GET_ITEM(shape.ptr(), i));
    arguments.push_back(n.ptr());
    return taken(PyObject_VectorcallMethod(names().new_empty, arguments.data(), arguments.size(), nullptr));
}

}  // namespace

py::object multiply(const Projection& layer, py::handle x, DType type, int n_threads, Tier limit) {
    const py::object shape = taken(PyObject_GetAttr(x.ptr(), names().shape));
    const std::int64_t rows = rows_of(shape, layer.k());
    const void* const from = address_of(x);
    if (rows == 0 || from == nullptr || call(x, names().is_contiguous).ptr() != Py_True) return py::none();
    py::object y = result_for(x, shape, py::int_(layer.n()));
    void* const to = address_of(y);
    {
        const py::gil_scoped_release release;
        layer(from, type, layer.k(), to, rows, n_threads, limit);
    }
    return y;
}

}  // namespace klfast
