// Products of tiles by a block of threads: operands are copied to shared memory some steps ahead, warps multiply them
// on tensor cores and keep the results in registers, in float32.
#pragma once

#include "primitives.cuh"

namespace guardspace {

// Quotient, rounded up.
template <class N>
__host__ __device__ constexpr N blocks(N n, N size) {
    return (n + size - 1) / size;
}

// How many rows of tiles are walked together, column by column, so that blocks that run at once share columns.
constexpr int kBand = 8;

// How a block divides a product: M × N results, K terms of their sums in a step, STAGES steps in shared memory at once.
template <int M, int N, int K, int WARPS_M, int WARPS_N, int STAGES>
struct Tile {
    static constexpr int m = M, n = N, k = K, stages = STAGES, warps_n = WARPS_N, threads = 32 * WARPS_M * WARPS_N;
    static constexpr int warp_m = M / WARPS_M, warp_n = N / WARPS_N;
    static_assert(warp_m % 16 == 0 && warp_n % 8 == 0 && K % 16 == 0, "made of 16 × 8 × 16 products");
};

// Which index of an operand has adjacent entries in memory: that of the sum, as in both operands of x Wᵀ, or the other,
// as in both of Xᵀ X.
enum class Adjacent { kSum, kOther };

// A step's part of an operand in shared memory, laid out as in global memory. Rows are padded so that what a warp reads
// at once lies in different banks.
template <class E, int OTHER, int SUM, Adjacent ADJACENT>
struct Part {
    static constexpr bool along_sum = ADJACENT == Adjacent::kSum;
    static constexpr int rows = along_sum ? OTHER : SUM, cols = along_sum ? SUM : OTHER;
    static constexpr int stride = cols + (sizeof(E) == 4 && along_sum ? 4 : 8);
    static constexpr int size = rows * stride;

    static __device__ __forceinline__ int at(int other, int sum) {
        return along_sum ? other * stride + sum : sum * stride + other;
    }
};

// A matrix in global memory with adjacent entries in its rows, strides counted in entries.
template <class S>
struct View {
    const S* data;
    int rows, cols, stride;
    bool wide;  // its rows may be copied 16 bytes at a time

    __device__ __forceinline__ View(const void* data, int64_t rows, int64_t cols, int64_t stride)
        : data(static_cast<const S*>(data)),
          rows(static_cast<int>(rows)),
          cols(static_cast<int>(cols)),
          stride(static_cast<int>(stride)),
          wide(reinterpret_cast<uintptr_t>(data) % 16 == 0 && stride * static_cast<int64_t>(sizeof(S)) % 16 == 0) {}

    __device__ __forceinline__ const S* at(int row, int col) const {
        return data + static_cast<int64_t>(row) * stride + col;
    }
};

// 16 bytes of shared memory from ``valid`` entries and zeros, entry by entry; those of another type are converted.
template <class E, class S>
__device__ __forceinline__ void copy_entries(E* to, const S* from, int valid) {
#pragma unroll
    for (int i = 0; i < 16 / static_cast<int>(sizeof(E)); ++i) {
        if constexpr (sizeof(E) == 4 && sizeof(S) == 4) {
            cp_async<4>(to + i, i < valid ? from + i : from, i < valid ? 4 : 0);
        } else if constexpr (sizeof(E) == 4) {
            to[i] = i < valid ? widened(load(from + i)) : 0.0f;
        } else {
            to[i] = i < valid ? load(from + i) : rounded<E>(0.0f);
        }
    }
}

// Calls use(i, row, col) for each 16 bytes of a part that this thread copies, the i-th of them at (row, col); UNROLL of
// them at once.
template <class P, class E, int THREADS, int UNROLL = 64, class Use>
__device__ __forceinline__ void each_chunk(Use use) {
    constexpr int n = 16 / sizeof(E), in_row = P::cols / n, chunks = P::rows * in_row;
#pragma unroll UNROLL
    for (int i = 0; i < blocks(chunks, THREADS); ++i) {
        const int chunk = threadIdx.x + i * THREADS;
        if (chunks % THREADS == 0 || chunk < chunks) use(i, chunk / in_row, chunk % in_row * n);
    }
}

// Fills a part with what lies in ``from`` at (row, col), zeros outside of it and in rows that do not count.
template <class P, int THREADS, class E, class S, class Counts>
__device__ __forceinline__ void copy_part(E* to, const View<S>& from, int row, int col, Counts counts) {
    const auto each = [&](auto copy) {
        return [&, copy](int i, int r, int c) {
            const int left = from.cols - col - c, n = 16 / static_cast<int>(sizeof(E));
            const bool any = row + r < from.rows && left > 0 && counts(i, r);
            copy(to + r * P::stride + c, any ? from.at(row + r, col + c) : from.data, any ? min(left, n) : 0);
        };
    };
    if constexpr (sizeof(E) == sizeof(S)) {
        if (from.wide) {
            return each_chunk<P, E, THREADS>(each([](E* at, const S* source, int valid) {
                cp_async<16>(at, source, valid * static_cast<int>(sizeof(E)));
            }));
        }
    }
    each_chunk<P, E, THREADS, 1>(each([](E* at, const S* source, int valid) { copy_entries(at, source, valid); }));
}

template <class P, int THREADS, class E, class S>
__device__ __forceinline__ void copy_part(E* to, const View<S>& from, int row, int col) {
    copy_part<P, THREADS>(to, from, row, col, [](int, int) { return true; });
}

// Runs use(step, stage) for each step after copy(step, stage) has brought what it needs; arrived(step, stage) may
// change what this thread copied before others see it. One call in a kernel: a second one would overwrite what is still
// read.
template <class T, class Copy, class Arrived, class Use>
__device__ __forceinline__ void pipeline(int steps, Copy copy, Arrived arrived, Use use) {
#pragma unroll
    for (int step = 0; step < T::stages - 1; ++step) {
        if (step < steps) copy(step, step);
        cp_async_commit();
    }
    for (int step = 0; step < steps; ++step) {
        cp_async_wait<T::stages - 2>();
        arrived(step, step % T::stages);
        __syncthreads();  // all see this step's part, and none still reads the one that is overwritten now
        const int next = step + T::stages - 1;
        if (next < steps) copy(next, next % T::stages);
        cp_async_commit();
        use(step, step % T::stages);
    }
}

// A warp's place in its block's tile.
template <class T>
struct Place {
    int m, n;
    __device__ __forceinline__ Place() {
        const int warp = threadIdx.x / 32;
        m = warp / T::warps_n * T::warp_m;
        n = warp % T::warps_n * T::warp_n;
    }
};

// The results that a thread holds.
template <class T>
struct Sums {
    static constexpr int pairs = T::warp_m / 16 * (T::warp_n / 8) * 2;
    float of[T::warp_m / 16][T::warp_n / 8][4] = {};

    // Where pair ``i`` of adjacent results lies in the tile: (row, col), (row, col + 1).
    static __device__ __forceinline__ void locate_pair(int i, int& row, int& col) {
        const Place<T> warp;
        const int lane = threadIdx.x % 32;
        row = warp.m + i / 2 / (T::warp_n / 8) * 16 + i % 2 * 8 + lane / 4;
        col = warp.n + i / 2 % (T::warp_n / 8) * 8 + lane % 4 * 2;
    }

    // Calls use(row, col, first, second) for each pair.
    template <class Use>
    __device__ __forceinline__ void each_pair(Use use) {
#pragma unroll
        for (int i = 0; i < pairs; ++i) {
            int row, col;
            locate_pair(i, row, col);
            float* pair = of[i / 2 / (T::warp_n / 8)][i / 2 % (T::warp_n / 8)] + i % 2 * 2;
            use(row, col, pair[0], pair[1]);
        }
    }

    __device__ __forceinline__ void add(const Sums& other) {
#pragma unroll
        for (int i = 0; i < T::warp_m / 16; ++i) {
#pragma unroll
            for (int j = 0; j < T::warp_n / 8; ++j) {
#pragma unroll
                for (int e = 0; e < 4; ++e) of[i][j][e] += other.of[i][j][e];
            }
        }
    }
};

// Fragments of 16-bit operands: 16 × 16 of A at (m, k) of its part, and 16 × 16 of B, for two products, at (k, n).
template <class P, class E>
__device__ __forceinline__ void read_left(uint32_t (&left)[4], const E* a, int m, int k) {
    const int lane = threadIdx.x % 32, low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
    ldmatrix<!P::along_sum>(left,
                            a + (P::along_sum ? P::at(m + low + bit3, k + bit4) : P::at(m + bit3, k + low + bit4)));
}
template <class P, class E>
__device__ __forceinline__ void read_right(uint32_t (&first)[2], uint32_t (&second)[2], const E* b, int n, int k) {
    const int lane = threadIdx.x % 32, low = lane % 8, bit3 = lane / 8 % 2 * 8, bit4 = lane / 16 * 8;
    uint32_t two[4];
    ldmatrix<!P::along_sum>(two,
                            b + (P::along_sum ? P::at(n + low + bit4, k + bit3) : P::at(n + bit4, k + low + bit3)));
    first[0] = two[0], first[1] = two[1], second[0] = two[2], second[1] = two[3];
}

// sums += A B of one step, A and B parts of 16-bit numbers.
template <class T, class PA, class PB, class E>
__device__ __forceinline__ void multiply(Sums<T>& sums, const E* a, const E* b) {
    static_assert(T::warp_n % 16 == 0, "a fragment of B is read for two products");
    const Place<T> warp;
#pragma unroll
    for (int k = 0; k < T::k; k += 16) {
        uint32_t right[T::warp_n / 8][2];
#pragma unroll
        for (int j = 0; j < T::warp_n / 8; j += 2) read_right<PB>(right[j], right[j + 1], b, warp.n + 8 * j, k);
#pragma unroll
        for (int i = 0; i < T::warp_m / 16; ++i) {
            uint32_t left[4];
            read_left<PA>(left, a, warp.m + 16 * i, k);
#pragma unroll
            for (int j = 0; j < T::warp_n / 8; ++j) mma<E>(sums.of[i][j], left, right[j]);
        }
    }
}

// The same with each step's product begun at zero: tensor cores truncate when they accumulate, 3e-6 of a sum of 2048
// terms. Row by row, so that few registers hold such products.
template <class T, class PA, class PB, class E>
__device__ __forceinline__ void multiply_exactly(Sums<T>& sums, const E* a, const E* b) {
    static_assert(T::warp_n % 16 == 0, "a fragment of B is read for two products");
    const Place<T> warp;
    uint32_t right[T::k / 16][T::warp_n / 8][2];
#pragma unroll
    for (int k = 0; k < T::k; k += 16) {
#pragma unroll
        for (int j = 0; j < T::warp_n / 8; j += 2) {
            read_right<PB>(right[k / 16][j], right[k / 16][j + 1], b, warp.n + 8 * j, k);
        }
    }
#pragma unroll
    for (int i = 0; i < T::warp_m / 16; ++i) {
        uint32_t left[T::k / 16][4];
#pragma unroll
        for (int k = 0; k < T::k; k += 16) read_left<PA>(left[k / 16], a, warp.m + 16 * i, k);
#pragma unroll
        for (int j = 0; j < T::warp_n / 8; ++j) {
            float product[4] = {};
#pragma unroll
            for (int k = 0; k < T::k; k += 16) mma<E>(product, left[k / 16], right[k / 16][j]);
#pragma unroll
            for (int e = 0; e < 4; ++e) sums.of[i][j][e] += product[e];
        }
    }
}

// A float32 number as the sum of two of TF32, but for 2⁻²² of it.
__device__ __forceinline__ void split(float x, uint32_t& high, uint32_t& low) {
    const float rough = to_tf32(x);
    high = bits_of(rough);
    low = bits_of(to_tf32(x - rough));
}

// The same in float32, as three products of TF32: what is left out is 2⁻²² of the largest term. Those with a low part
// are added apart, so that no more is truncated than in one product.
template <class T, class PA, class PB>
__device__ __forceinline__ void multiply_exactly(Sums<T>& sums, const float* a, const float* b) {
    const Place<T> warp;
    const int lane = threadIdx.x % 32, g = lane / 4, t = lane % 4;
    Sums<T> high, low;
#pragma unroll
    for (int k = 0; k < T::k; k += 8) {
        uint32_t high_a[T::warp_m / 16][4], low_a[T::warp_m / 16][4], high_b[T::warp_n / 8][2], low_b[T::warp_n / 8][2];
#pragma unroll
        for (int i = 0; i < T::warp_m / 16; ++i) {
#pragma unroll
            for (int e = 0; e < 4; ++e) {
                split(load_shared(a + PA::at(warp.m + 16 * i + g + e % 2 * 8, k + t + e / 2 * 4)), high_a[i][e],
                      low_a[i][e]);
            }
        }
#pragma unroll
        for (int j = 0; j < T::warp_n / 8; ++j) {
#pragma unroll
            for (int e = 0; e < 2; ++e) {
                split(load_shared(b + PB::at(warp.n + 8 * j + g, k + t + e * 4)), high_b[j][e], low_b[j][e]);
            }
        }
#pragma unroll
        for (int i = 0; i < T::warp_m / 16; ++i) {
#pragma unroll
            for (int j = 0; j < T::warp_n / 8; ++j) {
                mma<float>(low.of[i][j], low_a[i], high_b[j]);
                mma<float>(low.of[i][j], high_a[i], low_b[j]);
                mma<float>(high.of[i][j], high_a[i], high_b[j]);
            }
        }
    }
    high.add(low);
    sums.add(high);
}

}  // namespace guardspace
