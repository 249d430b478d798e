// The kernels' common interface. Each file that implements them is compiled once per instruction set; dispatch.cpp
// picks one set of functions at run time. Plain C types only: no torch, no Python.
#pragma once

#include <cstddef>
#include <cstdint>

namespace guardspace {

enum Dtype : int32_t { kFloat64 = 0, kFloat32 = 1, kFloat16 = 2, kBFloat16 = 3 };

// A strided view; strides count elements. An optional argument that is absent has neither data nor rows.
struct Matrix {
    void* data;
    Dtype dtype;
    int64_t rows, cols, row_stride, col_stride;
};

// covariance (d, d) += scale · Xᵀ diag(mask) X, lower triangle; mask has x.rows bytes or is null.
struct CovarianceUpdate {
    Matrix covariance, x;
    const uint8_t* mask;
    double scale;
};

// out (r, d) = G − (G Q) Qᵀ where complement, else (G N) Nᵀ; out may be g.
struct Projection {
    Matrix out, g, basis;
    bool complement;
};

// y (T, N) = x wᵀ + bias + h upᵀ with h (T, R) = x downᵀ. Without down, h is an input. R is the columns of h;
// rows of down and columns of up beyond it do not count.
struct LoraLinear {
    Matrix x, w, bias, down, up, h, y;
};

struct Kernels {
    void (*covariance_update)(const CovarianceUpdate* items, int64_t count, int threads);
    void (*symmetrize)(const Matrix& covariance, int threads);
    // Σ_pq C_pq (uᵀ v)_pq for symmetric C (d, d), of which the lower triangle is read, and symmetric uᵀ v; u, v (r, d)
    double (*quadratic_form)(const Matrix& covariance, const Matrix& u, const Matrix& v, int threads);
    void (*null_project)(const Projection* items, int64_t count, int threads);
    void (*lora_linear)(const LoraLinear& layer, int threads);
    // out = factor · x, entry by entry: x in float64, float32 or out's dtype
    void (*scaled)(const Matrix& x, double factor, const Matrix& out);
    // out (r, d) = scale · hᵀ x for h (T, r), x (T, d)
    void (*outer_product)(const Matrix& h, const Matrix& x, const Matrix& out, double scale, int threads);
    // out = (accumulate ? out : 0) + x · keep / (1 − p); keep depends on the seed and the entry's place only
    void (*dropout)(const Matrix& x, const Matrix& out, double p, uint64_t seed, bool accumulate, int threads);
    // The four steps to eigenvectors of a symmetric float32 matrix by way of a tridiagonal one in float64, whose
    // entries on the diagonal and beside it are rows (1, n) and (1, n - 1), as are tau and values.
    void (*tridiagonal_panel)(const Matrix& a, const Matrix& v, const Matrix& w, const Matrix& diagonal,
                              const Matrix& beside, const Matrix& tau, int threads);
    bool (*tridiagonal_values)(const Matrix& diagonal, const Matrix& beside);
    void (*tridiagonal_vectors)(const Matrix& diagonal, const Matrix& beside, const Matrix& values,
                                const Matrix& vectors, int threads);
    void (*tridiagonal_reflect)(const Matrix& rows, const Matrix& tau, const Matrix& vectors, int threads);
    // FLOP/s of independent multiply-adds in registers, the ceiling of every kernel: float64, float32 or bfloat16
    double (*peak_flops)(Dtype dtype, double seconds, int threads);
};

// Scratch memory of the calling thread, 64-byte aligned, valid until its next call. Kept between calls: fresh pages
// cost more than a small product. Throws std::bad_alloc.
void* workspace(size_t bytes);

}  // namespace guardspace
