// G ← G − (G Q) Qᵀ or (G N) Nᵀ, with the r rows of G as vector lanes, so that the basis is read in place.
//
// Hᵀ = basisᵀ Gᵀ first, (k, r), then basis · Hᵀ, (d, r): both products broadcast entries of the basis, whatever its
// strides, and multiply a panel of kWidth rows of G at a time.
#include "cpu/panels.h"

namespace guardspace {
namespace GUARDSPACE_ISA {
namespace {

constexpr int64_t kRowsOfBasis = 128;  // at a time, so that the L2 cache holds them

template <class T>
struct Scratch {
    T* product;  // Hᵀ: (k, kWidth)
    T* panel;    // (kRowsOfBasis, kWidth)
};

template <class T>
int64_t scratch_size(int64_t k) {
    constexpr int W = kWidth<Real<T>>;
    return (ceil_div(k, kRows<Real<T>>) * kRows<Real<T>> + kRowsOfBasis) * W;
}

// The rows [row, row + kRows) of the (n, k) operand a times b (k, kWidth). Rows beyond n are read from a copy.
template <class T>
void rows_times_panel(const Matrix& a, int64_t row, int vectors, int64_t k, const T* b, T* out, bool add) {
    using Kind = Real<T>;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>;
    if (row + MR <= a.rows) {
        return register_tiles<Kind>(vectors, k, at<T>(a, row, 0), a.row_stride, a.col_stride, b, W, out, W, add);
    }
    T copy[kRowsOfBasis * MR];
    for (int64_t start = 0; start < k; start += kRowsOfBasis) {
        int64_t length = min(kRowsOfBasis, k - start);
        for (int64_t i = 0; i < length; i++) {
            for (int64_t j = 0; j < MR; j++) copy[i * MR + j] = row + j < a.rows ? *at<T>(a, row + j, start + i) : T(0);
        }
        register_tiles<Kind>(vectors, length, copy, 1, MR, b + start * W, W, out, W, add || start > 0);
    }
}

// Reads one entry of every cache line, in the order in which they lie in memory. The products below go down the
// columns, where the lines would come from memory one by one: a basis of 3 MB that is not in cache took 1.0 ms, so 0.6.
template <class T>
void read_ahead(const T* p, int64_t rows, int64_t cols, int64_t row_stride) {
    T sum = 0;
    for (int64_t row = 0; row < rows; row++, p += row_stride) {
        for (int64_t col = 0; col < cols; col += 64 / static_cast<int64_t>(sizeof(T))) sum += p[col];
    }
    __asm__ volatile("" ::"m"(sum));
}

// Rows [first, first + count) of Hᵀ = basisᵀ Gᵀ for the panel of G that begins at row r0.
template <class T>
void project_onto(const Projection& item, int64_t r0, int64_t first, int64_t count, const Scratch<T>& scratch) {
    using Kind = Real<T>;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>;
    int64_t d = item.basis.rows, rows = min<int64_t>(W, item.g.rows - r0);
    int vectors = static_cast<int>(ceil_div(rows, kLanes<T>));
    if (d == 0) memset(scratch.product + first * W, 0, sizeof(T) * W * count);
    for (int64_t start = 0; start < d; start += kRowsOfBasis) {
        int64_t length = min(kRowsOfBasis, d - start);
        pack_columns<Kind>(scratch.panel, window(item.g, r0, start), rows, length);
        Matrix block = transposed(window(item.basis, start, 0));
        if (item.basis.col_stride == 1)
            read_ahead(at<T>(item.basis, start, first), length, count, item.basis.row_stride);
        int64_t c = first;
        // With one vector of rows of G there are registers for more columns of the basis: whole cache lines of it.
        if (vectors == 1 && item.basis.col_stride == 1) {
            constexpr int kWide = MR * kVectors;
            for (; c + kWide <= min(first + count, block.rows); c += kWide) {
                register_tile<Kind, kWide, 1>(length, at<T>(block, c, 0), 1, block.col_stride, scratch.panel, W,
                                              scratch.product + c * W, W, start > 0);
            }
        }
        for (; c < first + count; c += MR) {
            rows_times_panel<T>(block, c, vectors, length, scratch.panel, scratch.product + c * W, start > 0);
        }
    }
}

// Columns [first, first + kWidth) of the result, from Hᵀ.
template <class T>
void apply(const Projection& item, int64_t r0, int64_t first, const T* product) {
    using Kind = Real<T>;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>;
    int64_t k = item.basis.cols, rows = min<int64_t>(W, item.g.rows - r0), cols = min<int64_t>(W, item.g.cols - first);
    int vectors = static_cast<int>(ceil_div(rows, kLanes<T>));
    alignas(64) T tile[W * W];  // (columns of G, rows of G)
    if (k == 0) memset(tile, 0, sizeof tile);
    Matrix block = window(item.basis, first, 0);
    for (int64_t start = 0; start < k; start += kBlock) {
        Matrix part = window(block, 0, start);
        for (int64_t row = 0; row < cols; row += MR) {
            rows_times_panel<T>(part, row, vectors, min(kBlock, k - start), product + start * W, tile + row * W,
                                start > 0);
        }
    }
    with_type(item.g.dtype, [&](auto* p) {
        using From = std::remove_pointer_t<decltype(p)>;
        with_type(item.out.dtype, [&](auto* q) {
            using To = std::remove_pointer_t<decltype(q)>;
            for_each_column(tile, W, cols, rows, [&](int64_t row, int64_t col, Vec<T> v, int64_t count) {
                if (item.complement) {
                    const From* g = at<From>(item.g, r0 + row, first + col);
                    if (item.g.col_stride == 1 && count == kLanes<T>) {
                        v = Convert<T>::from(g) - v;
                    } else {
                        for (int64_t i = 0; i < count; i++) v[i] = convert_one<T>(g[i * item.g.col_stride]) - v[i];
                    }
                }
                store_lanes<To, T>(at<To>(item.out, r0 + row, first + col), item.out.col_stride, v, count);
            });
        });
    });
}

template <class T>
bool has_type(const Projection& item) {
    return (item.basis.dtype == kFloat64) == std::is_same_v<T, double>;
}

template <class T>
void project(const Projection* items, int64_t count, int threads) {
    constexpr int W = kWidth<Real<T>>, MR = kRows<Real<T>>;
    int64_t tasks = 0, widest = 0;
    for (int64_t i = 0; i < count; i++) {
        if (!has_type<T>(items[i])) continue;
        tasks += ceil_div(items[i].g.rows, W);
        widest = max(widest, items[i].basis.cols);
    }
    if (tasks == 0) return;
    // Many panels: one thread each, which keeps its basis in cache between the two products. Few: all share each.
    bool shared = threads > 1 && tasks < 2 * threads;
    int64_t size = scratch_size<T>(widest);
    T* memory = static_cast<T*>(workspace(sizeof(T) * size * (threads + 1)));
    int next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me;
#pragma omp atomic capture
        me = next++;
        T* mine = memory + size * me;
        T* common = memory + size * threads;
        Scratch<T> scratch{(shared ? common : mine) + kRowsOfBasis * W, mine};
        if (shared) {
            for (int64_t i = 0; i < count; i++) {
                const Projection& item = items[i];
                if (!has_type<T>(item)) continue;
                int64_t k = item.basis.cols, part = max<int64_t>(ceil_div(ceil_div(k, MR), threads), 1) * MR;
                for (int64_t r0 = 0; r0 < item.g.rows; r0 += W) {
#pragma omp for schedule(static, 1)
                    for (int64_t c = 0; c < k; c += part) project_onto<T>(item, r0, c, min(part, k - c), scratch);
#pragma omp for schedule(static)
                    for (int64_t j = 0; j < item.g.cols; j += W) apply<T>(item, r0, j, scratch.product);
                }
            }
        } else {
#pragma omp for schedule(dynamic)
            for (int64_t task = 0; task < tasks; task++) {
                const Projection* item = items;
                int64_t rest = task;
                for (;; item++) {
                    if (!has_type<T>(*item)) continue;
                    if (rest < ceil_div(item->g.rows, W)) break;
                    rest -= ceil_div(item->g.rows, W);
                }
                project_onto<T>(*item, rest * W, 0, item->basis.cols, scratch);
                for (int64_t j = 0; j < item->g.cols; j += W) apply<T>(*item, rest * W, j, scratch.product);
            }
        }
    }
}

}  // namespace

void null_project(const Projection* items, int64_t count, int threads) {
    project<float>(items, count, threads);
    project<double>(items, count, threads);
}

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
