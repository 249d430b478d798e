// Matrix products of packed panels: the one inner loop that all kernels share.
//
// A panel holds up to kWidth columns of a (K, n) operand as [k][kWidth], zero beyond the end up to a whole vector. A
// product AᵀB of two panels is a kWidth × kWidth tile: rows of A's are broadcast, rows of B's are vectors. For bfloat16
// an element is a pair of consecutive k, as the instruction vdpbf16ps wants them.
#pragma once

#include <utility>

#include "cpu/simd.h"

namespace {

// A panel's width in vectors. With the rows below, a tile's accumulators and operands fill the registers.
constexpr int kVectors = 3;

// Values of k that a tile sums up in registers before it adds to memory. It bounds the operands' footprint in the L2
// cache (2 · 48 KB for float32) and the rounding error, which grows with the length of a plain sum.
constexpr int64_t kBlock = 256;

template <class T>
struct Real {  // float or double
    using Element = T;
    using Sum = T;
    static constexpr int kPack = 1;
    static GS_INLINE void multiply_add(Vec<T>& sum, Element a, Vec<T> b) { sum += a * b; }
    static GS_INLINE Vec<T> vector(const Element* p) { return load(p); }
};

#if defined(__AVX512BF16__)
struct Bf16Pairs {
    using Element = uint32_t;
    using Sum = float;
    static constexpr int kPack = 2;
    static GS_INLINE void multiply_add(Vec<float>& sum, Element a, U32 b) {
        sum = (Vec<float>)_mm512_dpbf16_ps((__m512)sum, (__m512bh)_mm512_set1_epi32(static_cast<int>(a)), (__m512bh)b);
    }
    static GS_INLINE U32 vector(const Element* p) { return load(p); }
};
using Bf16Compute = Bf16Pairs;
#else
using Bf16Compute = Real<float>;
#endif

template <class Kind>
constexpr int kWidth = kVectors * kLanes<typename Kind::Sum>;

// Rows of a register tile; a divisor of the width. rows · kVectors accumulators, kVectors operands and a broadcast.
template <class Kind>
constexpr int kRows = kRegisters == 16 ? (kWidth<Kind> % 4 == 0 ? 4 : 3) : (kWidth<Kind> % 8 == 0 ? 8 : 6);

template <class Kind>
GS_INLINE int64_t steps(int64_t k) {
    return ceil_div(k, Kind::kPack);
}

// out[row][v] (+)= Σ_k a[k][row] · b[k][v], MR rows and NV vectors in registers.
template <class Kind, int MR, int NV>
GS_INLINE void register_tile(int64_t k, const typename Kind::Element* a, int64_t a_row, int64_t a_k,
                             const typename Kind::Element* b, int64_t b_k, typename Kind::Sum* out, int64_t out_row,
                             bool add) {
    using Sum = typename Kind::Sum;
    Vec<Sum> sum[MR][NV] = {};
    for (; k > 0; k--, a += a_k, b += b_k) {
        decltype(Kind::vector(b)) operand[NV];
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) operand[v] = Kind::vector(b + v * kLanes<Sum>);
#pragma GCC unroll 24
        for (int row = 0; row < MR; row++) {
            typename Kind::Element broadcast = a[row * a_row];
#pragma GCC unroll 4
            for (int v = 0; v < NV; v++) Kind::multiply_add(sum[row][v], broadcast, operand[v]);
        }
    }
#pragma GCC unroll 24
    for (int row = 0; row < MR; row++) {
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) {
            Sum* p = out + row * out_row + v * kLanes<Sum>;
            store(p, add ? load(p) + sum[row][v] : sum[row][v]);
        }
    }
}

template <class Kind>
__attribute__((noinline)) void register_tiles(int vectors, int64_t k, const typename Kind::Element* a, int64_t a_row,
                                              int64_t a_k, const typename Kind::Element* b, int64_t b_k,
                                              typename Kind::Sum* out, int64_t out_row, bool add) {
    constexpr int MR = kRows<Kind>;
    // A stride that the compiler knows to be one spares the inner loop its address arithmetic.
    if (a_row == 1) {
        if (vectors == 1) return register_tile<Kind, MR, 1>(k, a, 1, a_k, b, b_k, out, out_row, add);
        if (vectors == 2) return register_tile<Kind, MR, 2>(k, a, 1, a_k, b, b_k, out, out_row, add);
        return register_tile<Kind, MR, 3>(k, a, 1, a_k, b, b_k, out, out_row, add);
    }
    if (vectors == 1) return register_tile<Kind, MR, 1>(k, a, a_row, a_k, b, b_k, out, out_row, add);
    if (vectors == 2) return register_tile<Kind, MR, 2>(k, a, a_row, a_k, b, b_k, out, out_row, add);
    return register_tile<Kind, MR, 3>(k, a, a_row, a_k, b, b_k, out, out_row, add);
}

// tile[i][j] (+)= Σ_k a[k][i] · b[k][j] for i < rows, j < cols, both at most kWidth; with lower, only where i >= j.
// Entries beyond, up to whole register tiles, are overwritten too.
template <class Kind>
GS_INLINE void panel_product(int64_t k, const typename Kind::Element* a, const typename Kind::Element* b, int64_t rows,
                             int64_t cols, bool lower, bool add, typename Kind::Sum* tile) {
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>, L = kLanes<typename Kind::Sum>;
    if (k == 0 && !add) memset(tile, 0, sizeof(*tile) * W * W);
    constexpr int64_t kSteps = kBlock / Kind::kPack;
    for (int64_t start = 0; start < k; start += kSteps) {
        int64_t length = min(kSteps, k - start);
        for (int64_t row = 0; row < rows; row += MR) {
            int64_t needed = lower ? min(cols, row + MR) : cols;
            register_tiles<Kind>(static_cast<int>(ceil_div(needed, L)), length, a + start * W + row, 1, W,
                                 b + start * W, W, tile + row * W, W, add || start > 0);
        }
    }
}

template <class V, int... I>
GS_INLINE V shuffle(V a, V b, std::integer_sequence<int, I...>) {
#if defined(__clang__) || __GNUC__ >= 12
    return __builtin_shufflevector(a, b, I...);
#else
    using Index = std::conditional_t<sizeof(a[0]) == 8, int64_t, int32_t>;
    return __builtin_shuffle(a, b, typename VectorOf<Index, sizeof...(I)>::type{I...});
#endif
}

template <int L, int Start, int... I>
constexpr auto interleaving(std::integer_sequence<int, I...>) {
    return std::integer_sequence<int, (Start + I / 2 + (I % 2) * L)...>{};
}

// A square block of as many vectors as each has lanes, transposed by log2 of it perfect shuffles.
template <class V>
GS_INLINE void transpose(V* block) {
    constexpr int L = sizeof(V) / sizeof(block[0][0]);
    constexpr auto low = interleaving<L, 0>(std::make_integer_sequence<int, L>{});
    constexpr auto high = interleaving<L, L / 2>(std::make_integer_sequence<int, L>{});
#pragma GCC unroll 4
    for (int stride = 1; stride < L; stride *= 2) {
        V next[L];
#pragma GCC unroll 8
        for (int i = 0; i < L / 2; i++) {
            next[2 * i] = shuffle(block[i], block[i + L / 2], low);
            next[2 * i + 1] = shuffle(block[i], block[i + L / 2], high);
        }
#pragma GCC unroll 16
        for (int i = 0; i < L; i++) block[i] = next[i];
    }
}

// Calls f(j, i, vector, count) for every column j < cols of a tile: vector holds its entries i .. i + count.
template <class T, class Function>
GS_INLINE void for_each_column(const T* tile, int64_t stride, int64_t rows, int64_t cols, Function f) {
    constexpr int L = kLanes<T>;
    for (int64_t i = 0; i < rows; i += L) {
        for (int64_t j = 0; j < cols; j += L) {
            Vec<T> block[L];
#pragma GCC unroll 16
            for (int lane = 0; lane < L; lane++) block[lane] = load(tile + (i + lane) * stride + j);
            transpose(block);
            for (int64_t lane = 0; lane < min<int64_t>(L, cols - j); lane++) {
                f(j + lane, i, block[lane], min<int64_t>(L, rows - i));
            }
        }
    }
}

// Stores the first count lanes.
template <class To, class T>
GS_INLINE void store_lanes(To* p, int64_t stride, Vec<T> v, int64_t count) {
    if (stride == 1 && count == kLanes<T>) return Convert<T>::to(p, v);
    for (int64_t lane = 0; lane < count; lane++) p[lane * stride] = convert_one<To>(v[lane]);
}

// The number of panels in a task: fewer where there would be too few tasks to keep the threads evenly busy.
GS_INLINE int64_t panels_per_task(int64_t panels, int64_t most, int64_t wanted_tasks) {
    int64_t count = most;
    while (count > 1 && ceil_div(panels, count) < wanted_tasks) count /= 2;
    return count;
}

template <class Kind>
struct Packing;  // how one vector of panel elements is made from a source

template <class T>
struct Packing<Real<T>> {
    template <class Source>
    static GS_INLINE Vec<T> rows(const Source* row, const Source*) {
        return Convert<T>::from(row);
    }
    template <class Source>
    static GS_INLINE T row(const Source* row, const Source*) {
        return convert_one<T>(*row);
    }
    template <class Source>
    static GS_INLINE Vec<T> columns(const Source* p) {
        return Convert<T>::from(p);
    }
};

#if defined(__AVX512BF16__)
template <>
struct Packing<Bf16Pairs> {
    static GS_INLINE U32 rows(const bf16* even, const bf16* odd) {
        U32 pair = __builtin_convertvector(load_as<U16>(even), U32);
        return odd ? pair | __builtin_convertvector(load_as<U16>(odd), U32) << 16 : pair;
    }
    static GS_INLINE uint32_t row(const bf16* even, const bf16* odd) {
        return even->bits | (odd ? static_cast<uint32_t>(odd->bits) << 16 : 0);
    }
    static GS_INLINE U32 columns(const bf16* p) { return load_as<U32>(p); }
};
#endif

// Memory far ahead in many rows at once is more than the hardware's own prefetching follows.
constexpr int64_t kPrefetchRows = 8, kPrefetchBytes = 256;

template <class T>
GS_INLINE void prefetch(const T* p, int64_t count) {
    const char* bytes = reinterpret_cast<const char*>(p);
    for (int64_t i = 0; i < count * static_cast<int64_t>(sizeof(T)); i += 64) __builtin_prefetch(bytes + i);
}

// Panel [steps(k)][kWidth] from rows 0 .. k of m, of which cols (at most kWidth) columns count. With index, row i is
// row index[i] of m.
template <class Kind, class Source>
void pack_rows(typename Kind::Element* panel, const Matrix& m, int64_t k, int64_t cols,
               const int64_t* index = nullptr) {
    constexpr int W = kWidth<Kind>, L = kLanes<typename Kind::Sum>;
    bool contiguous = m.col_stride == 1;
    for (int64_t i = 0; i < k; i += Kind::kPack, panel += W) {
        const Source* first = at<Source>(m, index ? index[i] : i, 0);
        bool paired = Kind::kPack == 2 && i + 1 < k;
        const Source* second = paired ? at<Source>(m, index ? index[i + 1] : i + 1, 0) : nullptr;
        int64_t col = 0;
        if (contiguous) {
            if (i + kPrefetchRows + 1 < k && !index) {
                prefetch(first + kPrefetchRows * m.row_stride, cols);
                if (second) prefetch(second + kPrefetchRows * m.row_stride, cols);
            }
            for (; col + L <= cols; col += L) {
                store(panel + col, Packing<Kind>::rows(first + col, second ? second + col : nullptr));
            }
        }
        for (; col < cols; col++) {
            int64_t offset = col * m.col_stride;
            panel[col] = Packing<Kind>::row(first + offset, second ? second + offset : nullptr);
        }
        for (; col % L != 0; col++) panel[col] = 0;
    }
}

// Panel [steps(k)][kWidth] whose column j is row j of m, for rows (at most kWidth) of them and columns 0 .. k.
template <class Kind, class Source>
void pack_columns(typename Kind::Element* panel, const Matrix& m, int64_t rows, int64_t k) {
    using Vector = decltype(Kind::vector(panel));
    constexpr int W = kWidth<Kind>, L = kLanes<typename Kind::Sum>, P = Kind::kPack;
    if (m.row_stride == 1 || m.col_stride != 1) return pack_rows<Kind, Source>(panel, transposed(m), k, rows);
    int64_t whole = k / (L * P) * L;  // steps in whole blocks
    for (int64_t group = 0; group < rows; group += L) {
        int64_t count = min<int64_t>(L, rows - group);
        for (int64_t step = 0; step < whole; step += L) {
            Vector block[L] = {};
            if (count == L) {
#pragma GCC unroll 16
                for (int i = 0; i < L; i++) {
                    const Source* p = at<Source>(m, group + i, step * P);
                    block[i] = Packing<Kind>::columns(p);
                    __builtin_prefetch(reinterpret_cast<const char*>(p) + kPrefetchBytes);
                }
            } else {
                for (int64_t i = 0; i < count; i++) {
                    block[i] = Packing<Kind>::columns(at<Source>(m, group + i, step * P));
                }
            }
            transpose(block);
#pragma GCC unroll 16
            for (int i = 0; i < L; i++) store(panel + (step + i) * W + group, block[i]);
        }
    }
    Matrix rest = transposed(m);
    rest.data = at<Source>(m, 0, whole * P);
    pack_rows<Kind, Source>(panel + whole * W, rest, k - whole * P, rows);
}

template <class Kind>
void pack_rows(typename Kind::Element* panel, const Matrix& m, int64_t k, int64_t cols,
               const int64_t* index = nullptr) {
    if constexpr (Kind::kPack == 2) {
        pack_rows<Kind, bf16>(panel, m, k, cols, index);
    } else {
        with_type(m.dtype,
                  [&](auto* p) { pack_rows<Kind, std::remove_pointer_t<decltype(p)>>(panel, m, k, cols, index); });
    }
}

template <class Kind>
void pack_columns(typename Kind::Element* panel, const Matrix& m, int64_t rows, int64_t k) {
    if constexpr (Kind::kPack == 2) {
        pack_columns<Kind, bf16>(panel, m, rows, k);
    } else {
        with_type(m.dtype, [&](auto* p) { pack_columns<Kind, std::remove_pointer_t<decltype(p)>>(panel, m, rows, k); });
    }
}

GS_INLINE Matrix window(const Matrix& m, int64_t row, int64_t col) {
    Matrix result = m;
    with_type(m.dtype, [&](auto* p) { result.data = at<std::remove_pointer_t<decltype(p)>>(m, row, col); });
    result.rows -= row;
    result.cols -= col;
    return result;
}

// f(Kind) for the arithmetic that a product of this dtype is formed in: float64 for itself, pairs for bfloat16 where
// the CPU multiplies them, else float32.
template <class Function>
GS_INLINE void with_kind(Dtype dtype, Function f) {
    if (dtype == guardspace::kFloat64) return f(Real<double>{});
    if (dtype == guardspace::kBFloat16) return f(Bf16Compute{});
    return f(Real<float>{});
}

}  // namespace
