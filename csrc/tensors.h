// PyTorch's tensors as the kernels take them, read by the C functions that PyTorch offers to programs that exchange
// tensors (DLPack's exchange table): neither PyTorch's headers nor a Python call for every size and stride.
#pragma once
#include <pybind11/pybind11.h>

#include <algorithm>
#include <vector>

#include "cpu/kernels.h"

namespace guardspace {

namespace py = pybind11;

// DLPack 1: a tensor, and the table of a library that makes them.
struct DLTensor {
    void* data;
    int32_t device_type, device_id, dims;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *sizes, *strides;
    uint64_t offset;
};
constexpr int32_t kDLCpu = 1;
constexpr int kDLInt = 0, kDLUInt = 1, kDLFloat = 2, kDLBfloat = 4, kDLBool = 6;

struct DLExchange {
    uint32_t major, minor;
    void* before;
    void* own[3];  // functions that make and take over tensors
    int (*read)(void* object, DLTensor* tensor);
};

class Reader {
  public:
    Reader() = default;  // reads nothing

    // `exchange`: the capsule of torch.Tensor. Only objects of the very `types` are read: a subclass may be anything.
    // `is_negated` tells tensors whose memory holds other signs.
    Reader(const py::capsule& exchange, py::tuple types, py::object is_negated)
        : types_(std::move(types)), is_negated_(std::move(is_negated)) {
        auto* table = static_cast<DLExchange*>(PyCapsule_GetPointer(exchange.ptr(), "dlpack_exchange_api"));
        if (table == nullptr) throw py::error_already_set();
        if (table->major == 1) read_ = table->read;
    }

    bool is_plain(py::handle object) const {
        if (read_ == nullptr) return false;
        for (py::handle type : types_) {
            if (reinterpret_cast<PyObject*>(Py_TYPE(object.ptr())) == type.ptr()) return true;
        }
        return false;
    }

    // A dense tensor on any device; false for anything else. Valid while the object lives and is not changed.
    bool read(py::handle object, DLTensor& tensor) const {
        if (!is_plain(object)) return false;
        if (read_(object.ptr(), &tensor) != 0) {
            PyErr_Clear();
            return false;
        }
        if (tensor.lanes != 1) return false;
        tensor.data = static_cast<char*>(tensor.data) + tensor.offset;
        return py::reinterpret_steal<py::object>(PyObject_CallOneArg(is_negated_.ptr(), object.ptr())).ptr() ==
               Py_False;
    }

    // (..., d) of floating-point numbers on the CPU as (rows, d); false if it is not, or no such view of it exists.
    bool read_rows(py::handle object, Matrix& matrix) const {
        DLTensor t;
        return read_rows(object, matrix, t);
    }

    bool read_rows(py::handle object, Matrix& matrix, DLTensor& t) const {
        return read(object, t) && t.device_type == kDLCpu && t.dims >= 1 && as_rows(t, matrix);
    }

    bool read_matrix(py::handle object, Matrix& matrix) const {
        DLTensor t;
        return read(object, t) && t.device_type == kDLCpu && t.dims == 2 && as_rows(t, matrix);
    }

    // A contiguous tensor on the CPU.
    bool read_dense(py::handle object, DLTensor& t) const {
        if (!read(object, t) || t.device_type != kDLCpu) return false;
        int64_t count = 1;
        for (int i = t.dims - 1; i >= 0; count *= t.sizes[i--]) {
            if (t.sizes[i] != 1 && t.strides[i] != count) return false;
        }
        return true;
    }

    // One byte, zero or not, for each entry of integers or booleans on the CPU of the sizes of x but the last; `memory`
    // keeps them where they are not the tensor's own.
    bool read_mask(py::handle object, const DLTensor& x, const uint8_t*& bytes, std::vector<uint8_t>& memory) const {
        DLTensor t;
        if (!read(object, t) || t.device_type != kDLCpu || t.dims != x.dims - 1) return false;
        if ((t.code != kDLInt && t.code != kDLUInt && t.code != kDLBool) ||
            !std::equal(t.sizes, t.sizes + t.dims, x.sizes))
            return false;
        int64_t count = 1, size = t.bits / 8;
        bool dense = true;
        for (int i = t.dims - 1; i >= 0; i--) {
            dense = dense && (t.sizes[i] == 1 || t.strides[i] == count);
            count *= t.sizes[i];
        }
        bytes = static_cast<const uint8_t*>(t.data);
        if (dense && size == 1) return true;
        memory.resize(std::max<int64_t>(count, 1));
        for (int64_t entry = 0; entry < count; entry++) {
            int64_t rest = entry, place = 0;
            for (int i = t.dims - 1; i >= 0; rest /= t.sizes[i--]) place += rest % t.sizes[i] * t.strides[i];
            const uint8_t* first = bytes + place * size;
            memory[entry] = std::any_of(first, first + size, [](uint8_t byte) { return byte != 0; });
        }
        bytes = memory.data();
        return true;
    }

  private:
    static bool as_rows(const DLTensor& t, Matrix& matrix) {
        if (t.code == kDLBfloat && t.bits == 16) {
            matrix.dtype = kBFloat16;
        } else if (t.code == kDLFloat && t.bits >= 16 && t.bits <= 64) {
            matrix.dtype = t.bits == 64 ? kFloat64 : t.bits == 32 ? kFloat32 : kFloat16;
        } else {
            return false;
        }
        matrix.data = t.data;
        matrix.cols = t.sizes[t.dims - 1];
        matrix.col_stride = t.strides[t.dims - 1];
        matrix.rows = 1;
        matrix.row_stride = matrix.cols;
        for (int i = t.dims - 2; i >= 0; i--) {
            if (t.sizes[i] == 1) continue;
            if (matrix.rows == 1) {
                matrix.row_stride = t.strides[i];
            } else if (t.strides[i] != matrix.rows * matrix.row_stride) {
                return false;
            }
            matrix.rows *= t.sizes[i];
        }
        return true;
    }

    int (*read_)(void*, DLTensor*) = nullptr;
    py::tuple types_;
    py::object is_negated_;
};

// Whether the entries of a matrix that is written lie in different places, as far as its strides tell.
inline bool spread(const Matrix& m) {
    return (m.rows <= 1 || m.row_stride != 0) && (m.cols <= 1 || m.col_stride != 0);
}

// Whether no two of the matrices begin at one place.
template <class Item, class Data>
bool all_apart(const std::vector<Item>& items, Data data_of) {
    std::vector<const void*> places;
    for (const Item& item : items) places.push_back(data_of(item));
    std::sort(places.begin(), places.end());
    return std::adjacent_find(places.begin(), places.end()) == places.end();
}

// The tensors of a list or a tuple, or the one tensor, kept alive; false for anything else.
inline bool tensors_of(py::handle given, const Reader& reader, py::tuple& tensors) {
    if (reader.is_plain(given)) {
        tensors = py::make_tuple(given);
    } else if (PyList_CheckExact(given.ptr())) {
        tensors = py::reinterpret_steal<py::tuple>(PyList_AsTuple(given.ptr()));
    } else if (PyTuple_CheckExact(given.ptr())) {
        tensors = py::reinterpret_borrow<py::tuple>(given);
    } else {
        return false;
    }
    return true;
}

}  // namespace guardspace
