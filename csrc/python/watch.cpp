// Whether tensors are still what they were: torch's own attributes, asked from C++ in half the time that Python takes.
#include "python/watch.h"

namespace klfast {
namespace {

// A new reference, let go at the end of a scope. Null where Python raised.
class Reference {
  public:
    explicit Reference(PyObject* object) : object_(object) {}
    Reference(const Reference&) = delete;
    Reference& operator=(const Reference&) = delete;
    ~Reference() { Py_XDECREF(object_); }
    PyObject* get() const { return object_; }
    explicit operator bool() const { return object_ != nullptr; }

  private:
    PyObject* object_;
};

struct Names {
    PyObject* storage = PyUnicode_InternFromString("untyped_storage");
    PyObject* cdata = PyUnicode_InternFromString("_cdata");
    PyObject* address = PyUnicode_InternFromString("data_ptr");
    PyObject* shape = PyUnicode_InternFromString("shape");
    PyObject* dtype = PyUnicode_InternFromString("dtype");
    PyObject* is_contiguous = PyUnicode_InternFromString("is_contiguous");
    PyObject* requires_grad = PyUnicode_InternFromString("requires_grad");
};

// 1 if equal, 0 if not, -1 if Python raised.
int equal(const Reference& found, PyObject* wanted) {
    return !found ? -1 : found.get() == wanted ? 1 : PyObject_RichCompareBool(found.get(), wanted, Py_EQ);
}

int is_true(const Reference& found) { return !found ? -1 : PyObject_IsTrue(found.get()); }

// The same for one tensor, whose storage is taken first: what is asked after that holds for memory that stays.
int is_unchanged(PyObject* tensor, PyObject* seen, bool gradients, PyObject* held) {
    static const Names names;
    const auto wanted = [&](Py_ssize_t field) { return PyTuple_GET_ITEM(seen, field); };
    const Reference storage(PyObject_CallMethodNoArgs(tensor, names.storage));
    if (!storage || PyList_Append(held, storage.get()) < 0) return -1;
    int same = equal(Reference(PyObject_GetAttr(storage.get(), names.cdata)), wanted(kCdata));
    if (same == 1) same = equal(Reference(PyObject_CallMethodNoArgs(tensor, names.address)), wanted(kAddress));
    if (same == 1) same = equal(Reference(PyObject_GetAttr(tensor, names.dtype)), wanted(kDtype));
    if (same == 1) same = equal(Reference(PyObject_GetAttr(tensor, names.shape)), wanted(kShape));
    if (same == 1) same = is_true(Reference(PyObject_CallMethodNoArgs(tensor, names.is_contiguous)));
    if (same == 1 && gradients) {
        const int takes = is_true(Reference(PyObject_GetAttr(tensor, names.requires_grad)));
        same = takes < 0 ? -1 : !takes;
    }
    return same;
}

}  // namespace

PyObject* hold(PyObject* seen, bool gradients) {
    Reference held(PyList_New(0));
    if (!held) return nullptr;
    for (Py_ssize_t i = 0; i < PyTuple_GET_SIZE(seen); ++i) {
        PyObject* const one = PyTuple_GET_ITEM(seen, i);
        PyObject* const found = PyDict_GetItemWithError(PyTuple_GET_ITEM(one, kHome), PyTuple_GET_ITEM(one, kName));
        if (found == nullptr && PyErr_Occurred()) return nullptr;
        PyObject* const identity = PyTuple_GET_ITEM(one, kIdentity);
        if (identity == Py_None && found == Py_None) continue;
        if (identity == Py_None || found == nullptr || PyLong_AsVoidPtr(identity) != found) Py_RETURN_NONE;
        Py_INCREF(found);  // another thread may take it from its place
        const Reference tensor(found);
        const int same = is_unchanged(found, one, gradients, held.get());
        if (same < 0) return nullptr;
        if (!same) Py_RETURN_NONE;
    }
    Py_INCREF(held.get());
    return held.get();
}

}  // namespace klfast
