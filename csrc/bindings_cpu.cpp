// Python bindings of the CPU kernels: pointers, dtypes, sizes and strides; neither torch nor NumPy.
//
// The functions named *_tensors take tensors and lists of them as a caller gave them, and answer whether they did the
// work: anything but plain dense tensors on the CPU that fit is left untouched, to the ops, which know its errors.
//
// A matrix is a tensor, where PyTorch lets them be read from here, or a tuple (address, dtype, rows, columns, row
// stride, column stride), strides in elements, or None where an argument is optional. The ops in guardspace_kernels/ops
// check before they call; of the products of a layer, which training does not check in every step, sizes are checked
// here.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cmath>
#include <utility>
#include <vector>

#include "cpu/dispatch.h"
#include "layer.h"
#include "tensors.h"

namespace py = pybind11;
using namespace guardspace;

namespace {

Reader& reader() {
    static Reader* one = new Reader;  // not destroyed: Python may be gone by then
    return *one;
}

Matrix matrix(const py::object& given) {
    if (given.is_none()) return {};
    if (!PyTuple_CheckExact(given.ptr())) {
        Matrix m;
        if (!reader().read_matrix(given, m)) {
            throw py::type_error(
                "a dense matrix of floating-point numbers on the CPU was expected, not a negated view");
        }
        return m;
    }
    py::tuple t = py::reinterpret_borrow<py::tuple>(given);
    return {reinterpret_cast<void*>(t[0].cast<uintptr_t>()),
            static_cast<Dtype>(t[1].cast<int32_t>()),
            t[2].cast<int64_t>(),
            t[3].cast<int64_t>(),
            t[4].cast<int64_t>(),
            t[5].cast<int64_t>()};
}

void require(bool fits, const char* what) {
    if (!fits) throw py::value_error(what);
}

void covariance_update(const py::list& items, int threads) {
    std::vector<CovarianceUpdate> updates;
    for (py::handle item : items) {
        py::tuple t = py::reinterpret_borrow<py::tuple>(item);
        updates.push_back({matrix(t[0]), matrix(t[1]), reinterpret_cast<const uint8_t*>(t[2].cast<uintptr_t>()),
                           t[3].cast<double>()});
    }
    py::gil_scoped_release release;
    kernels().covariance_update(updates.data(), static_cast<int64_t>(updates.size()), threads);
}

void null_project(const py::list& items, int threads) {
    std::vector<Projection> projections;
    for (py::handle item : items) {
        py::tuple t = py::reinterpret_borrow<py::tuple>(item);
        projections.push_back({matrix(t[0]), matrix(t[1]), matrix(t[2]), t[3].cast<bool>()});
    }
    py::gil_scoped_release release;
    kernels().null_project(projections.data(), static_cast<int64_t>(projections.size()), threads);
}

// One bool for all or, unless there is `one` tensor, a list of them; false if it is anything else.
bool read_flags(py::handle given, size_t count, bool one, std::vector<bool>& flags) {
    if (PyBool_Check(given.ptr())) {
        flags.assign(count, given.ptr() == Py_True);
        return true;
    }
    if (one || !PyList_CheckExact(given.ptr()) || static_cast<size_t>(PyList_GET_SIZE(given.ptr())) != count) {
        return false;
    }
    for (py::handle flag : py::reinterpret_borrow<py::list>(given)) {
        if (!PyBool_Check(flag.ptr())) return false;
        flags.push_back(flag.ptr() == Py_True);
    }
    return true;
}

bool wanted_grad(py::handle tensor) {
    return py::object(tensor.attr("requires_grad")).ptr() != Py_False;
}

bool null_project_tensors(const py::object& g, const py::object& basis, const py::object& complement, bool grad,
                          int threads) {
    py::tuple gs, bases;
    if (!tensors_of(g, reader(), gs) || !tensors_of(basis, reader(), bases)) return false;
    bool one = reader().is_plain(g);
    std::vector<bool> complements;
    if (one != reader().is_plain(basis) || gs.size() != bases.size() ||
        !read_flags(complement, gs.size(), one, complements)) {
        return false;
    }
    std::vector<Projection> items(gs.size());
    for (size_t i = 0; i < items.size(); i++) {
        Projection& item = items[i];
        py::handle target = PyTuple_GET_ITEM(gs.ptr(), i);
        if (!reader().read_rows(target, item.g) || !spread(item.g) || (grad && wanted_grad(target))) return false;
        if (!reader().read_matrix(PyTuple_GET_ITEM(bases.ptr(), i), item.basis)) return false;
        bool wide = item.g.dtype == kFloat64 || item.basis.dtype == kFloat64;
        if (item.basis.dtype != (wide ? kFloat64 : kFloat32)) return false;
        if (item.basis.rows != item.g.cols || item.basis.cols > item.basis.rows) return false;
        item.out = item.g;
        item.complement = complements[i];
    }
    if (!all_apart(items, [](const Projection& item) { return item.g.data; })) return false;
    py::gil_scoped_release release;
    kernels().null_project(items.data(), static_cast<int64_t>(items.size()), threads);
    return true;
}

bool covariance_update_tensors(const py::object& covariance, const py::object& x, const py::object& mask,
                               const py::object& scale, bool grad, int threads) {
    py::tuple covariances, xs, masks;
    if (!tensors_of(covariance, reader(), covariances) || !tensors_of(x, reader(), xs)) return false;
    bool one = reader().is_plain(covariance);
    if (one != reader().is_plain(x) || covariances.size() != xs.size() || !PyFloat_CheckExact(scale.ptr()))
        return false;
    double factor = PyFloat_AS_DOUBLE(scale.ptr());
    if (!std::isfinite(factor)) return false;
    bool masked = !mask.is_none();
    if (masked && (!tensors_of(mask, reader(), masks) || one != reader().is_plain(mask) || masks.size() != xs.size())) {
        return false;
    }
    std::vector<CovarianceUpdate> items(xs.size());
    std::vector<std::vector<uint8_t>> memory(xs.size());
    for (size_t i = 0; i < items.size(); i++) {
        CovarianceUpdate& item = items[i];
        Matrix& C = item.covariance;
        DLTensor read;
        py::handle target = PyTuple_GET_ITEM(covariances.ptr(), i);
        if (!reader().read_matrix(target, C) || !spread(C) || (grad && wanted_grad(target))) return false;
        if (C.rows != C.cols || (C.dtype != kFloat32 && C.dtype != kFloat64)) return false;
        if (!reader().read_rows(PyTuple_GET_ITEM(xs.ptr(), i), item.x, read) || item.x.cols != C.rows) return false;
        py::handle its_mask = masked ? PyTuple_GET_ITEM(masks.ptr(), i) : Py_None;
        if (!its_mask.is_none() && !reader().read_mask(its_mask, read, item.mask, memory[i])) return false;
        item.scale = factor;
    }
    if (!all_apart(items, [](const CovarianceUpdate& item) { return item.covariance.data; })) return false;
    py::gil_scoped_release release;
    kernels().covariance_update(items.data(), static_cast<int64_t>(items.size()), threads);
    return true;
}

// Whether lists of parameters, gradients, moments and steps are as PyTorch's fused AdamW takes them, which checks
// little: each of one dtype, shape and contiguous, each parameter once, steps of one float32.
bool adamw_tensors_fit(const py::list& lists, bool grad) {
    std::vector<py::tuple> read(lists.size());
    for (size_t i = 0; i < read.size(); i++) {
        if (!tensors_of(lists[i], reader(), read[i]) || read[i].size() != read[0].size()) return false;
    }
    std::vector<DLTensor> params(read[0].size());
    for (size_t i = 0; i < params.size(); i++) {
        DLTensor& p = params[i];
        py::handle param = PyTuple_GET_ITEM(read[0].ptr(), i);
        if (!reader().read_dense(param, p) || p.dims < 1 || p.code != kDLFloat || p.bits < 32) return false;
        if (grad && wanted_grad(param)) return false;
        DLTensor t;
        for (size_t j = 1; j + 1 < read.size(); j++) {
            if (!reader().read_dense(PyTuple_GET_ITEM(read[j].ptr(), i), t) || t.code != p.code || t.bits != p.bits ||
                t.dims != p.dims || !std::equal(t.sizes, t.sizes + t.dims, p.sizes)) {
                return false;
            }
        }
        if (!reader().read_dense(PyTuple_GET_ITEM(read.back().ptr(), i), t)) return false;
        if (t.dims != 0 || t.code != kDLFloat || t.bits != 32) return false;
    }
    return all_apart(params, [](const DLTensor& param) { return param.data; });
}

// Addresses, devices, dtypes, sizes and strides of the tensors of lists, for comparison; None if one cannot be read.
py::object describe(const py::tuple& lists) {
    std::vector<int64_t> words;
    for (py::handle list : lists) {
        py::tuple tensors;
        if (!tensors_of(list, reader(), tensors)) return py::none();
        words.push_back(static_cast<int64_t>(tensors.size()));
        for (py::handle tensor : tensors) {
            DLTensor t;
            if (!reader().read(tensor, t)) return py::none();
            words.insert(words.end(),
                         {reinterpret_cast<int64_t>(t.data), t.device_type, t.device_id, t.code, t.bits, t.dims});
            words.insert(words.end(), t.sizes, t.sizes + t.dims);
            words.insert(words.end(), t.strides, t.strides + t.dims);
        }
    }
    return py::bytes(reinterpret_cast<const char*>(words.data()), sizeof(int64_t) * words.size());
}

}  // namespace

PYBIND11_MODULE(_cpu, m) {
    m.doc() = "CPU kernels of guardspace_kernels";
    m.def("covariance_update", covariance_update);
    m.def("null_project", null_project);
    m.def("project",
          [](const py::object& out, const py::object& g, const py::object& basis, bool complement, int threads) {
              Projection item{matrix(out), matrix(g), matrix(basis), complement};
              require(item.g.cols == item.basis.rows && item.out.rows == item.g.rows && item.out.cols == item.g.cols,
                      "project: out and g must be (r, d), and the basis (d, k)");
              py::gil_scoped_release release;
              kernels().null_project(&item, 1, threads);
          });
    m.def("covariance_update_tensors", covariance_update_tensors);
    m.def("null_project_tensors", null_project_tensors);
    m.def("adamw_tensors_fit", adamw_tensors_fit);
    m.def("describe", describe);
    m.def("read_tensors", [](const py::capsule& exchange, py::tuple types, py::object is_negated) {
        reader() = Reader(exchange, std::move(types), std::move(is_negated));
    });
    m.def("symmetrize", [](const py::object& covariance, int threads) {
        Matrix C = matrix(covariance);
        py::gil_scoped_release release;
        kernels().symmetrize(C, threads);
    });
    m.def("quadratic_form", [](const py::object& covariance, const py::object& u, const py::object& v, int threads) {
        Matrix C = matrix(covariance), left = matrix(u), right = matrix(v);
        py::gil_scoped_release release;
        return kernels().quadratic_form(C, left, right, threads);
    });
    m.def("lora_linear", [](const py::object& x, const py::object& w, const py::object& bias, const py::object& down,
                            const py::object& up, const py::object& h, const py::object& y, int threads) {
        LoraLinear layer{matrix(x), matrix(w), matrix(bias), matrix(down), matrix(up), matrix(h), matrix(y)};
        Dtype dtype = layer.x.dtype;
        require(layer.w.dtype == dtype && layer.up.dtype == dtype && layer.h.dtype == dtype && layer.y.dtype == dtype &&
                    (bias.is_none() || (layer.bias.dtype == dtype && layer.bias.cols == layer.w.rows)) &&
                    (down.is_none() ||
                     (layer.down.dtype == dtype && layer.down.cols == layer.x.cols && layer.down.rows == layer.h.cols)),
                "lora_linear: bias must be (1, d_out), down (r, d_in), and all of one dtype");
        require(layer.x.cols == layer.w.cols && layer.h.rows == layer.x.rows && layer.h.cols == layer.up.cols &&
                    layer.up.rows == layer.w.rows && layer.y.rows == layer.x.rows && layer.y.cols == layer.w.rows,
                "lora_linear: x must be (T, d_in), w (d_out, d_in), up (d_out, r), h (T, r) and y (T, d_out)");
        py::gil_scoped_release release;
        kernels().lora_linear(layer, threads);
    });
    m.def("layer_forward",
          [](const py::object& x, const py::object& A, const py::object& B, const py::object& basis, bool complement,
             const py::object& weight, const py::object& bias, const py::object& down, const py::object& up,
             double scale, const py::object& h, const py::object& y, int threads) {
              return layer_forward(reader(), x, A, B, basis, complement, weight, bias, down, up, scale, h, y, threads);
          });
    m.def("layer_backward",
          [](const py::object& dy, const py::object& x, const py::object& h, int64_t rank, const py::object& basis,
             bool complement, const py::object& weight, const py::object& down, const py::object& up, double scale,
             const py::object& dx, const py::object& dA, const py::object& dB, int threads) {
              return layer_backward(reader(), dy, x, h, rank, basis, complement, weight, down, up, scale, dx, dA, dB,
                                    threads);
          });
    m.def("tridiagonal_panel",
          [](const py::object& a, const py::object& v, const py::object& w, const py::object& diagonal,
             const py::object& beside, const py::object& tau, int threads) {
              Matrix rest = matrix(a), vs = matrix(v), ws = matrix(w);
              Matrix d = matrix(diagonal), e = matrix(beside), factors = matrix(tau);
              py::gil_scoped_release release;
              kernels().tridiagonal_panel(rest, vs, ws, d, e, factors, threads);
          });
    m.def("tridiagonal_values", [](const py::object& diagonal, const py::object& beside) {
        Matrix d = matrix(diagonal), e = matrix(beside);
        py::gil_scoped_release release;
        return kernels().tridiagonal_values(d, e);
    });
    m.def("tridiagonal_vectors", [](const py::object& diagonal, const py::object& beside, const py::object& values,
                                    const py::object& vectors, int threads) {
        Matrix d = matrix(diagonal), e = matrix(beside), w = matrix(values), rows = matrix(vectors);
        py::gil_scoped_release release;
        kernels().tridiagonal_vectors(d, e, w, rows, threads);
    });
    m.def("tridiagonal_reflect",
          [](const py::object& rows, const py::object& tau, const py::object& vectors, int threads) {
              Matrix reflections = matrix(rows), factors = matrix(tau), moved = matrix(vectors);
              py::gil_scoped_release release;
              kernels().tridiagonal_reflect(reflections, factors, moved, threads);
          });
    m.def(
        "outer_product",
        [](const py::object& h, const py::object& x, const py::object& out, double scale, int threads,
           bool transposed) {
            Matrix left = matrix(h), right = matrix(x), result = matrix(out);
            if (transposed) {
                std::swap(result.rows, result.cols);
                std::swap(result.row_stride, result.col_stride);
            }
            left.cols = std::min(left.cols, result.rows);  // of h the first columns
            require(left.rows == right.rows && left.dtype == right.dtype && left.cols == result.rows &&
                        right.cols == result.cols,
                    "outer_product: h must be (T, r), x (T, d) of its dtype, and out (r, d)");
            py::gil_scoped_release release;
            kernels().outer_product(left, right, result, scale, threads);
        },
        py::arg("h"), py::arg("x"), py::arg("out"), py::arg("scale"), py::arg("threads"),
        py::arg("transposed") = false);
    m.def("dropout",
          [](const py::object& x, const py::object& out, double p, int64_t seed, bool accumulate, int threads) {
              Matrix source = matrix(x), target = matrix(out);
              py::gil_scoped_release release;
              kernels().dropout(source, target, p, static_cast<uint64_t>(seed), accumulate, threads);
          });
    m.def("peak_flops", [](int dtype, double seconds, int threads) {
        py::gil_scoped_release release;
        return kernels().peak_flops(static_cast<Dtype>(dtype), seconds, threads);
    });
    m.def("isa", isa);
    m.def("use_isa", use_isa);
    m.def("supported_isas", supported_isas);
    m.def("amd", amd);
    m.def("openmp", [] {
#ifdef _OPENMP
        return true;
#else
        return false;
#endif
    });
}
