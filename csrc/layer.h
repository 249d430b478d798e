// Forward and backward of a whole layer in one call, for layers so small that calls cost more than products.
//
//     h = x downᵀ,   y = x Wᵀ + b + h upᵀ          with down = [A P; A₀P], up = [s·B | −s·B₀]
//     dh = dy up,    dx = dy W + dh down,   dA = (dh₁ᵀ x) P,   dB = s·dyᵀ h₁
//
// Both write nothing and return false unless all are dense tensors on the CPU that fit each other.
#pragma once
#include <memory>

#include "cpu/dispatch.h"
#include "tensors.h"

namespace guardspace {

inline bool has_shape(const Matrix& m, int64_t rows, int64_t cols) {
    return m.rows == rows && m.cols == cols;
}

inline Matrix first_columns(Matrix m, int64_t count) {
    m.cols = count;
    return m;
}

inline Matrix flipped(const Matrix& m) {
    return {m.data, m.dtype, m.cols, m.rows, m.col_stride, m.row_stride};
}

// Whether the kernels read the basis in place beside a matrix (r, d) of this dtype: it has that precision, or float32.
inline bool fits(const Matrix& basis, Dtype dtype, int64_t d) {
    bool wide = dtype == kFloat64 || basis.dtype == kFloat64;
    return basis.dtype == (wide ? kFloat64 : kFloat32) && basis.rows == d && basis.cols <= d;
}

// What forward and backward read alike; the basis is absent where A is projected already.
struct LayerFactors {
    Matrix weight{}, down{}, up{}, basis{};

    bool read(const Reader& reader, py::handle w, py::handle d, py::handle u, py::handle q, Dtype dtype) {
        return reader.read_matrix(w, weight) && reader.read_matrix(d, down) && reader.read_matrix(u, up) &&
               (q.is_none() || reader.read_matrix(q, basis)) && weight.dtype == dtype && down.dtype == dtype &&
               up.dtype == dtype && has_shape(weight, up.rows, down.cols) && down.rows == up.cols;
    }
};

inline bool layer_forward(const Reader& reader, py::handle x, py::handle A, py::handle B, py::handle basis,
                          bool complement, py::handle weight, py::handle bias, py::handle down, py::handle up,
                          double scale, py::handle h, py::handle y, int threads) {
    LoraLinear layer{};
    LayerFactors factors;
    Matrix a, b;
    if (!reader.read_rows(x, layer.x) || !reader.read_matrix(A, a) || !reader.read_matrix(B, b) ||
        !factors.read(reader, weight, down, up, basis, layer.x.dtype) || !reader.read_matrix(h, layer.h) ||
        !reader.read_rows(y, layer.y)) {
        return false;
    }
    Dtype dtype = layer.x.dtype;
    int64_t tokens = layer.x.rows, d_in = factors.down.cols, d_out = factors.up.rows;
    if (!bias.is_none()) {
        if (!reader.read_rows(bias, layer.bias) || layer.bias.dtype != dtype || !has_shape(layer.bias, 1, d_out)) {
            return false;
        }
    }
    bool folds = !basis.is_none();
    auto scales = [&](const Matrix& m) { return m.dtype == kFloat64 || m.dtype == kFloat32 || m.dtype == dtype; };
    if (!has_shape(a, b.cols, d_in) || !has_shape(b, d_out, a.rows) || a.rows > factors.down.rows || !scales(a) ||
        !scales(b) || (folds && !fits(factors.basis, a.dtype, d_in)) || layer.x.cols != d_in ||
        layer.h.dtype != dtype || layer.y.dtype != dtype || !has_shape(layer.h, tokens, factors.down.rows) ||
        !has_shape(layer.y, tokens, d_out)) {
        return false;
    }
    layer.w = factors.weight;
    layer.down = factors.down;
    layer.up = factors.up;
    Matrix A_P = factors.down;
    A_P.rows = a.rows;
    py::gil_scoped_release release;
    const Kernels& run = kernels();
    if (folds) {
        Projection fold{A_P, a, factors.basis, complement};
        run.null_project(&fold, 1, threads);
    } else {
        run.scaled(a, 1.0, A_P);
    }
    run.scaled(b, scale, first_columns(factors.up, b.cols));
    run.lora_linear(layer, threads);
    return true;
}

// Of h the first `rank` columns are read; dx, dA and dB are None where they are not asked for.
inline bool layer_backward(const Reader& reader, py::handle dy, py::handle x, py::handle h, int64_t rank,
                           py::handle basis, bool complement, py::handle weight, py::handle down, py::handle up,
                           double scale, py::handle dx, py::handle dA, py::handle dB, int threads) {
    Matrix g, tokens, first, to_x{}, to_A{}, to_B{};
    LayerFactors factors;
    if (!reader.read_rows(dy, g) || !reader.read_rows(x, tokens) || !reader.read_matrix(h, first) ||
        !factors.read(reader, weight, down, up, basis, g.dtype) || (!dx.is_none() && !reader.read_rows(dx, to_x)) ||
        (!dA.is_none() && !reader.read_matrix(dA, to_A)) || (!dB.is_none() && !reader.read_matrix(dB, to_B))) {
        return false;
    }
    int64_t all = factors.down.rows, T = g.rows, d_in = factors.down.cols, d_out = factors.up.rows;
    bool folds = !basis.is_none() && to_A.data;
    if (g.cols != d_out || rank > all || rank > first.cols || !has_shape(tokens, T, d_in) || first.rows != T ||
        tokens.dtype != g.dtype || first.dtype != g.dtype ||
        (to_x.data && (to_x.dtype != g.dtype || !has_shape(to_x, T, d_in))) ||
        (to_A.data && !has_shape(to_A, rank, d_in)) || (to_B.data && !has_shape(to_B, d_out, rank)) ||
        (folds && !fits(factors.basis, to_A.dtype, d_in))) {
        return false;
    }
    py::gil_scoped_release release;
    const Kernels& run = kernels();
    std::unique_ptr<double[]> memory(new double[static_cast<size_t>(T * all)]);  // for entries of any dtype
    Matrix dh{memory.get(), g.dtype, T, all, all, 1};
    if (to_x.data) {
        run.lora_linear({g, flipped(factors.weight), {}, flipped(factors.up), flipped(factors.down), dh, to_x},
                        threads);
    } else if (to_A.data) {
        Matrix none{nullptr, g.dtype, T, 0, 0, 1}, no_up{nullptr, g.dtype, all, 0, 0, 1};
        run.lora_linear({g, flipped(factors.up), {}, {}, no_up, none, dh}, threads);
    }
    if (to_A.data) {
        run.outer_product(first_columns(dh, rank), tokens, to_A, 1.0, threads);
        if (folds) {
            Projection fold{to_A, to_A, factors.basis, complement};
            run.null_project(&fold, 1, threads);
        }
    }
    if (to_B.data) run.outer_product(first_columns(first, rank), g, flipped(to_B), scale, threads);
    return true;
}

}  // namespace guardspace
