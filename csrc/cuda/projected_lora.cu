// Projected LoRA: the rank-r update inside the base product, dropout without a stored mask, and the skinny products of
// the gradients, of which one reads dy once for two.
//
// Dropout keeps an entry by a word of Philox whose counter is the entry's place and whose key is the seed, read on the
// device: all kernels find the same mask, that of the Triton kernels too.
#include "launcher.cuh"
#include "product.cuh"
#include "slices.cuh"

namespace guardspace {
namespace {

// A slice of fewer tokens costs more in traffic of its sums than it saves.
constexpr int64_t kLeastTokens = 512;
constexpr int64_t kMostSlices = 8;  // of columns
constexpr int kFewRanks = 16, kManyRanks = 64;

struct Dropout {
    uint64_t seed;
    uint32_t threshold;  // of the upper 31 bits of a word; 0 keeps everything
    float factor;

    template <class Call>
    __device__ __forceinline__ Dropout(const Call& call, float factor)
        : seed(call.threshold == 0 ? 0 : static_cast<uint64_t>(load(call.seed))),
          threshold(static_cast<uint32_t>(call.threshold)),
          factor(factor) {}
};

// Which entries of columns 4 · four to 4 · four + 3 of a row are kept: one bit each.
__device__ __forceinline__ uint32_t kept(const Dropout& dropout, uint32_t row, uint32_t four) {
    uint32_t c[4] = {four, row, 0, 0}, key[2];
    key[0] = static_cast<uint32_t>(dropout.seed);
    key[1] = static_cast<uint32_t>(dropout.seed >> 32);
#pragma unroll
    for (int round = 0; round < 10; ++round) {
        const uint64_t a = 0xd2511f53ull * c[0], b = 0xcd9e8d57ull * c[2];
        c[0] = static_cast<uint32_t>(b >> 32) ^ c[1] ^ key[0];
        c[2] = static_cast<uint32_t>(a >> 32) ^ c[3] ^ key[1];
        c[1] = static_cast<uint32_t>(b);
        c[3] = static_cast<uint32_t>(a);
        key[0] += 0x9e3779b9u;
        key[1] += 0xbb67ae85u;
    }
    uint32_t bits = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) bits |= static_cast<uint32_t>(c[i] >> 1 >= dropout.threshold) << i;
    return bits;
}

// Zeros in what this thread copied of a part whose corner is entry (row, col) of the input.
template <class P, int THREADS, class E>
__device__ __forceinline__ void drop(E* part, const Dropout& dropout, int row, int col) {
    each_chunk<P, E, THREADS, 1>([&](int, int r, int c) {
#pragma unroll
        for (int i = 0; i < 16 / static_cast<int>(sizeof(E)); i += 4) {
            const uint32_t bits = kept(dropout, row + r, (col + c + i) / 4);
#pragma unroll
            for (int k = 0; k < 4; ++k) {
                if (!(bits >> k & 1)) part[r * P::stride + c + i + k] = rounded<E>(0.0f);
            }
        }
    });
}

// Zeros in a tile whose corner is entry (row, col) of the input, dropout's factor on the rest.
template <class T>
__device__ __forceinline__ void drop(Sums<T>& sums, const Dropout& dropout, int row, int col) {
    static_assert(Sums<T>::pairs <= 32, "two bits for each");
    uint64_t bits = 0;
#pragma unroll 1
    for (int i = 0; i < Sums<T>::pairs; ++i) {
        int r, c;
        Sums<T>::locate_pair(i, r, c);
        bits |= static_cast<uint64_t>(kept(dropout, row + r, (col + c) / 4) >> c % 4 & 3) << (2 * i);
    }
    sums.each_pair([&](int, int, float& first, float& second) {
        first = bits & 1 ? first * dropout.factor : 0.0f;
        second = bits & 2 ? second * dropout.factor : 0.0f;
        bits >>= 2;
    });
}

// sums += A B of one step. In 16 bits what tensor cores truncate is less than the result's rounding.
template <class T, class PA, class PB, class E>
__device__ __forceinline__ void add_product(Sums<T>& sums, const E* a, const E* b) {
    if constexpr (sizeof(E) == 4) {
        multiply_exactly<T, PA, PB>(sums, a, b);
    } else {
        multiply<T, PA, PB>(sums, a, b);
    }
}

template <class E>
struct LinearLayout {
    using Tile = guardspace::Tile<128, 128, 32, 2, 4, 4>;
};
template <>
struct LinearLayout<float> {
    using Tile = guardspace::Tile<64, 64, 32, 2, 2, 3>;
};

// One of the products that add up: left (tokens, terms) times what ``right`` holds. Its first step is ``begin``.
struct Product {
    const void *left, *right;
    int64_t terms, stride_left, stride_right;
    int begin;
};

struct Linear {
    guardspace_lora_linear call;
    Product products[3];  // H UP, to which dropout applies; the rest of H UP; X Wᵀ
    int steps;
    float factor;
};

template <class E, Adjacent WEIGHT>
struct LinearParts {
    using T = typename LinearLayout<E>::Tile;
    using Left = Part<E, T::m, T::k, Adjacent::kSum>;
    using Up = Part<E, T::n, T::k, Adjacent::kOther>;
    using Weight = Part<E, T::n, T::k, WEIGHT>;
    static constexpr int right = Up::size > Weight::size ? Up::size : Weight::size, stage = Left::size + right;
    static constexpr size_t bytes = sizeof(E) * T::stages * stage;
};

// A tile of Y = [Y +] X Wᵀ + bias + H UP. The update comes first, so that dropout needs no second tile.
template <class E, Adjacent WEIGHT>
__global__ void __launch_bounds__(LinearLayout<E>::Tile::threads, 2) linear(const __grid_constant__ Linear p) {
    using Parts = LinearParts<E, WEIGHT>;
    using T = typename Parts::T;
    using Left = typename Parts::Left;
    const int tokens = static_cast<int>(p.call.tokens), outputs = static_cast<int>(p.call.outputs);
    const int high = blocks(tokens, T::m), wide = blocks(outputs, T::n), block = static_cast<int>(blockIdx.x);
    const int band = block / (kBand * wide) * kBand, tall = min(high - band, kBand), place = block % (kBand * wide);
    const int row = (band + place % tall) * T::m, col = place / tall * T::n;
    E* memory = reinterpret_cast<E*>(shared_memory());
    const auto copy = [&](int step, int stage) {
        const Product& from = p.products[(step >= p.products[1].begin) + (step >= p.products[2].begin)];
        const int term = (step - from.begin) * T::k;
        E* to = memory + stage * Parts::stage;
        const View<E> left(from.left, tokens, from.terms, from.stride_left);
        copy_part<Left, T::threads>(to, left, row, term);
        to += Left::size;
        if (WEIGHT == Adjacent::kOther || step < p.products[2].begin) {
            const View<E> up(from.right, from.terms, outputs, from.stride_right);
            copy_part<typename Parts::Up, T::threads>(to, up, term, col);
        } else {
            const View<E> weight(from.right, outputs, from.terms, from.stride_right);
            copy_part<typename Parts::Weight, T::threads>(to, weight, col, term);
        }
    };
    Sums<T> total;
    pipeline<T>(
        p.steps, copy, [](int, int) {},
        [&](int step, int stage) {
            const E* left = memory + stage * Parts::stage;
            const E* right = left + Left::size;
            if (WEIGHT == Adjacent::kOther || step < p.products[2].begin) {
                add_product<T, Left, typename Parts::Up>(total, left, right);
            } else {
                add_product<T, Left, typename Parts::Weight>(total, left, right);
            }
            if (step + 1 == p.products[1].begin) {
                drop(total, Dropout(p.call, p.factor), row, col);
            }
        });
    const E* bias = static_cast<const E*>(p.call.bias);
    total.each_pair([&](int r, int c, float first, float second) {
        r += row;
        c += col;
        if (r >= tokens) return;
        E* at = static_cast<E*>(p.call.y) + r * p.call.stride_y + c;
        const auto finish = [&](int i, float sum) {
            if (c + i >= outputs) return;
            if (bias != nullptr) sum += widened(load(bias + c + i));
            if (p.call.add != 0) sum += widened(load(at + i));
            store(at + i, rounded<E>(sum));
        };
        finish(0, first);
        finish(1, second);
    });
}

// Four warps for few ranks, eight for many.
template <class E, int R>
struct DownLayout {
    using Tile = guardspace::Tile<128, 64, 32, 4, 2, 3>;
    using Outer = guardspace::Tile<64, Tile::k, Tile::m, 4, 2, 1>;
};
template <class E>
struct DownLayout<E, kFewRanks> {
    using Tile = guardspace::Tile<128, kFewRanks, 64, 4, 1, 3>;
    using Outer = guardspace::Tile<kFewRanks, Tile::k, Tile::m, 1, 4, 1>;
};
template <>
struct DownLayout<float, kManyRanks> {
    using Tile = guardspace::Tile<64, 64, 32, 2, 2, 3>;
};
template <>
struct DownLayout<float, kFewRanks> {
    using Tile = guardspace::Tile<64, kFewRanks, 32, 4, 1, 3>;
};

struct Down {
    guardspace_lora_down call;
    float *sums, *outer;  // by slices of the width, by blocks of tokens
    int slices;
    float factor;
};

template <class E, int R, bool OUTER>
struct DownParts {
    using T = typename DownLayout<E, R>::Tile;
    using X = Part<E, T::m, T::k, Adjacent::kSum>;
    using W = Part<E, T::n, T::k, Adjacent::kSum>;
    using Left = Part<E, R, T::m, Adjacent::kOther>;
    using Right = Part<E, T::k, T::m, Adjacent::kOther>;  // X's part, read along tokens
    static_assert(!OUTER || X::stride == Right::stride, "one part is read both ways");
    static constexpr int stage = X::size + W::size, begin = OUTER ? Left::size : 0;
    static constexpr size_t bytes = sizeof(E) * (begin + T::stages * stage);
};

// A tile of H = factor · drop(X) DOWNᵀ, or of a slice's sum. With OUTER nothing is dropped, and a tile of Eᵀ X is
// formed in each step, a sum over this block's tokens.
template <class E, int R, bool OUTER>
__global__ void __launch_bounds__(DownLayout<E, R>::Tile::threads, 2) down(const __grid_constant__ Down p) {
    using Parts = DownParts<E, R, OUTER>;
    using T = typename Parts::T;
    using X = typename Parts::X;
    const View<E> x(p.call.x, p.call.tokens, p.call.width, p.call.stride_x);
    const View<E> w(p.call.down, p.call.rank, p.call.width, p.call.stride_down);
    const View<E> e(p.call.e, p.call.tokens, p.call.outer_rank, p.call.stride_e);
    const Dropout dropout(p.call, p.factor);
    const int blocks_r = blocks(w.rows, R), block = static_cast<int>(blockIdx.x), all = blocks(x.cols, T::k);
    const int rank = block % blocks_r * R, slice = block / blocks_r % p.slices, high = block / blocks_r / p.slices;
    const int row = high * T::m;
    E* left = reinterpret_cast<E*>(shared_memory());
    E* memory = left + Parts::begin;
    const auto first_column = [&](int step) { return (step * p.slices + slice) * T::k; };
    if constexpr (OUTER)
        copy_part<typename Parts::Left, T::threads>(left, e, row, rank);  // arrives with the first step
    Sums<T> total;
    pipeline<T>(
        all > slice ? blocks(all - slice, p.slices) : 0,
        [&](int step, int stage) {
            E* to = memory + stage * Parts::stage;
            copy_part<X, T::threads>(to, x, row, first_column(step));
            copy_part<typename Parts::W, T::threads>(to + X::size, w, rank, first_column(step));
        },
        [&](int step, int stage) {
            if (OUTER || dropout.threshold == 0) return;
            drop<X, T::threads>(memory + stage * Parts::stage, dropout, row, first_column(step));
        },
        [&](int step, int stage) {
            const E* part = memory + stage * Parts::stage;
            add_product<T, X, typename Parts::W>(total, part, part + X::size);
            if constexpr (OUTER) {
                Sums<typename DownLayout<E, R>::Outer> tile;
                multiply<typename DownLayout<E, R>::Outer, typename Parts::Left, typename Parts::Right>(tile, left,
                                                                                                        part);
                tile.each_pair([&](int r, int c, float first, float second) {
                    r += rank;
                    c += first_column(step);
                    if (r >= e.cols) return;
                    float* at = p.outer + (static_cast<int64_t>(high) * e.cols + r) * x.cols + c;
                    if (c < x.cols) store(at, first);
                    if (c + 1 < x.cols) store(at + 1, second);
                });
            }
        });
    total.each_pair([&](int r, int c, float first, float second) {
        r += row;
        c += rank;
        const auto finish = [&](int i, float sum) {
            if (r >= x.rows || c + i >= w.rows) return;
            const int64_t at = static_cast<int64_t>(r) * w.rows + c + i;
            sum *= dropout.factor;
            if (p.slices > 1) {
                store(p.sums + static_cast<int64_t>(slice) * x.rows * w.rows + at, sum);
            } else {
                store(static_cast<E*>(p.call.h) + at, rounded<E>(sum));
            }
        };
        finish(0, first);
        finish(1, second);
    });
}

template <class E, int R>
struct OuterLayout {
    using Tile = guardspace::Tile<64, 128, 32, 2, 4, 4>;
};
template <class E>
struct OuterLayout<E, kFewRanks> {
    using Tile = guardspace::Tile<kFewRanks, 128, 32, 1, 4, 4>;
};
template <>
struct OuterLayout<float, kManyRanks> {
    using Tile = guardspace::Tile<64, 64, 32, 2, 2, 3>;
};
template <>
struct OuterLayout<float, kFewRanks> {
    using Tile = guardspace::Tile<kFewRanks, 64, 32, 1, 4, 3>;
};

struct Outer {
    guardspace_lora_outer call;
    float* sums;  // by slices of the tokens
    int slices;
    float factor;
};

template <class E, int R>
struct OuterParts {
    using T = typename OuterLayout<E, R>::Tile;
    using Left = Part<E, R, T::k, Adjacent::kOther>;
    using X = Part<E, T::n, T::k, Adjacent::kOther>;
    static constexpr int stage = Left::size + X::size;
    static constexpr size_t bytes = sizeof(E) * T::stages * stage;
};

// A tile of factor · Eᵀ drop(X), summed over a slice of the tokens.
template <class E, int R>
__global__ void __launch_bounds__(OuterLayout<E, R>::Tile::threads, 2) outer(const __grid_constant__ Outer p) {
    using Parts = OuterParts<E, R>;
    using T = typename Parts::T;
    using X = typename Parts::X;
    const View<E> e(p.call.e, p.call.tokens, p.call.rank, p.call.stride_e);
    const View<E> x(p.call.x, p.call.tokens, p.call.width, p.call.stride_x);
    const Dropout dropout(p.call, p.factor);
    const int blocks_r = blocks(e.cols, R), block = static_cast<int>(blockIdx.x), all = blocks(x.rows, T::k);
    const int rank = block % blocks_r * R, slice = block / blocks_r % p.slices;
    const int col = block / blocks_r / p.slices * T::n;
    E* memory = reinterpret_cast<E*>(shared_memory());
    const auto first_token = [&](int step) { return (step * p.slices + slice) * T::k; };
    Sums<T> total;
    pipeline<T>(
        all > slice ? blocks(all - slice, p.slices) : 0,
        [&](int step, int stage) {
            E* to = memory + stage * Parts::stage;
            copy_part<typename Parts::Left, T::threads>(to, e, first_token(step), rank);
            copy_part<X, T::threads>(to + Parts::Left::size, x, first_token(step), col);
        },
        [&](int step, int stage) {
            if (dropout.threshold == 0) return;
            E* part = memory + stage * Parts::stage + Parts::Left::size;
            drop<X, T::threads>(part, dropout, first_token(step), col);
        },
        [&](int, int stage) {
            const E* part = memory + stage * Parts::stage;
            multiply_exactly<T, typename Parts::Left, X>(total, part, part + Parts::Left::size);
        });
    total.each_pair([&](int r, int c, float first, float second) {
        r += rank;
        c += col;
        if (r >= e.cols) return;
        float* at = p.sums + (static_cast<int64_t>(slice) * e.cols + r) * x.cols + c;
        if (c < x.cols) store(at, dropout.factor * first);
        if (c + 1 < x.cols) store(at + 1, dropout.factor * second);
    });
}

// Calls run(E(), R) with the type and the smallest tile of ranks that serves.
template <class Run>
int with_layout(int64_t dtype, int64_t rank, Run run) {
    return with_type(dtype, [&](auto entry) {
        return rank <= kFewRanks ? run(entry, std::integral_constant<int, kFewRanks>())
                                 : run(entry, std::integral_constant<int, kManyRanks>());
    });
}

int check_dropout(const char* call, const int64_t* seed, int64_t threshold, bool possible) {
    if (threshold < 0 || threshold >= int64_t{1} << 31) {
        return wrong("%s: threshold is %lld; from 0 to 2147483647 was expected", call,
                     static_cast<long long>(threshold));
    }
    if (threshold > 0 && !possible) return wrong("%s: threshold must be 0 where e is given", call);
    if (threshold > 0 && (seed == nullptr || reinterpret_cast<uintptr_t>(seed) % 8 != 0)) {
        return wrong("%s: seed is at %p; it must be a multiple of 8 bytes, and not NULL", call, (const void*)seed);
    }
    return 0;
}

int check(const guardspace_lora_linear& p) {
    const char* call = "lora_linear";
    const size_t entry = entry_bytes(p.dtype);
    int error = check_dtype(call, 0, p.dtype);
    if (!error) error = check_matrix(call, 0, "x", p.x, p.tokens, p.inputs, p.stride_x, entry);
    if (!error && p.weight_columns) {
        error = check_matrix(call, 0, "weight", p.weight, p.inputs, p.outputs, p.stride_weight, entry);
    } else if (!error) {
        error = check_matrix(call, 0, "weight", p.weight, p.outputs, p.inputs, p.stride_weight, entry);
    }
    if (!error && p.bias != nullptr) error = check_matrix(call, 0, "bias", p.bias, 1, p.outputs, 0, entry);
    if (!error) error = check_matrix(call, 0, "h", p.h, p.tokens, p.rank, p.stride_h, entry);
    if (!error) error = check_matrix(call, 0, "up", p.up, p.rank, p.outputs, p.stride_up, entry);
    if (!error) error = check_matrix(call, 0, "y", p.y, p.tokens, p.outputs, p.stride_y, entry, p.outputs);
    if (!error && (p.dropped < 0 || p.dropped > p.rank)) {
        return wrong("%s: dropped is %lld; from 0 to rank = %lld was expected", call, static_cast<long long>(p.dropped),
                     static_cast<long long>(p.rank));
    }
    return error ? error : check_dropout(call, p.seed, p.threshold, true);
}

template <class E, Adjacent WEIGHT>
int run_linear(const Linear& p, void* stream) {
    using Parts = LinearParts<E, WEIGHT>;
    using T = typename Parts::T;
    const int64_t tiles = blocks<int64_t>(p.call.tokens, T::m) * blocks<int64_t>(p.call.outputs, T::n);
    if (tiles > kMost) return wrong("%lld blocks are too many for a launch", static_cast<long long>(tiles));
    return launch(linear<E, WEIGHT>, tiles, T::threads, Parts::bytes, stream, p);
}

template <class E>
int run_linear(const guardspace_lora_linear& c, float factor, void* stream) {
    const E *h = static_cast<const E*>(c.h), *up = static_cast<const E*>(c.up);
    Linear p{c,
             {{h, up, c.dropped, c.stride_h, c.stride_up, 0},
              {h + c.dropped, up + c.dropped * c.stride_up, c.rank - c.dropped, c.stride_h, c.stride_up, 0},
              {c.x, c.weight, c.inputs, c.stride_x, c.stride_weight, 0}},
             0,
             factor};
    for (Product& product : p.products) {
        product.begin = p.steps;
        p.steps += static_cast<int>(blocks<int64_t>(product.terms, LinearLayout<E>::Tile::k));
    }
    return c.weight_columns ? run_linear<E, Adjacent::kOther>(p, stream) : run_linear<E, Adjacent::kSum>(p, stream);
}

int check(const guardspace_lora_down& p) {
    const char* call = "lora_down";
    const size_t entry = entry_bytes(p.dtype);
    int error = check_dtype(call, 0, p.dtype);
    if (!error) error = check_matrix(call, 0, "x", p.x, p.tokens, p.width, p.stride_x, entry);
    if (!error) error = check_matrix(call, 0, "down", p.down, p.rank, p.width, p.stride_down, entry);
    if (!error) error = check_matrix(call, 0, "h", p.h, p.tokens, p.rank, p.rank, entry, p.rank);
    if (!error && p.outer_rank != 0) {
        if (p.dtype == GUARDSPACE_FLOAT32 || p.outer_rank > p.rank) {
            return wrong("%s: e has %lld columns; at most rank = %lld, and none in float32, were expected", call,
                         static_cast<long long>(p.outer_rank), static_cast<long long>(p.rank));
        }
        error = check_matrix(call, 0, "e", p.e, p.tokens, p.outer_rank, p.stride_e, entry);
        if (!error) error = check_matrix(call, 0, "outer", p.outer, p.outer_rank, p.width, p.width, 4, p.width);
    }
    return error ? error : check_dropout(call, p.seed, p.threshold, p.outer_rank == 0);
}

int check(const guardspace_lora_outer& p) {
    const char* call = "lora_outer";
    const size_t entry = entry_bytes(p.dtype);
    int error = check_dtype(call, 0, p.dtype);
    if (!error) error = check_matrix(call, 0, "e", p.e, p.tokens, p.rank, p.stride_e, entry);
    if (!error) error = check_matrix(call, 0, "x", p.x, p.tokens, p.width, p.stride_x, entry);
    if (!error) error = check_matrix(call, 0, "outer", p.outer, p.rank, p.width, p.width, 4, p.width);
    return error ? error : check_dropout(call, p.seed, p.threshold, true);
}

int64_t slices_for(int64_t tiles, int64_t most) {
    return std::max<int64_t>(1, std::min(most, kBlocks / std::max<int64_t>(tiles, 1)));
}

// Into how many sums a call is divided, and how many blocks each takes.
struct Division {
    int64_t tiles, slices, high;

    int64_t sums(const guardspace_lora_down& p) const { return slices > 1 ? slices * p.tokens * p.rank : 0; }
    int64_t numbers(const guardspace_lora_down& p) const {
        return sums(p) + (high > 1 ? high * p.outer_rank * p.width : 0);
    }
    int64_t numbers(const guardspace_lora_outer& p) const { return slices > 1 ? slices * p.rank * p.width : 0; }
};

Division divided(const guardspace_lora_down& p) {
    Division division;
    with_layout(p.dtype, p.rank, [&](auto entry, auto rank) {
        using T = typename DownLayout<decltype(entry), rank()>::Tile;
        division.high = blocks<int64_t>(p.tokens, T::m);
        division.tiles = division.high * blocks<int64_t>(p.rank, T::n);
        const int64_t steps = blocks<int64_t>(p.width, T::k);
        division.slices = slices_for(division.tiles, std::min(kMostSlices, steps));
        return 0;
    });
    return division;
}

Division divided(const guardspace_lora_outer& p) {
    Division division;
    with_layout(p.dtype, p.rank, [&](auto entry, auto rank) {
        using T = typename OuterLayout<decltype(entry), rank()>::Tile;
        division.high = 1;
        division.tiles = blocks<int64_t>(p.rank, T::m) * blocks<int64_t>(p.width, T::n);
        division.slices = slices_for(division.tiles, p.tokens / kLeastTokens);
        return 0;
    });
    return division;
}

template <class Call>
int64_t workspace_bytes_of(const Call& call) {
    return check(call) != 0 ? -1 : 4 * divided(call).numbers(call);
}

template <class Call>
int check_workspace(const char* name, const Call& call, const Division& division, const void* workspace,
                    int64_t bytes) {
    const int64_t needed = 4 * division.numbers(call);
    if (division.tiles * division.slices > kMost) {
        return wrong("%s: %lld blocks are too many for a launch", name,
                     static_cast<long long>(division.tiles * division.slices));
    }
    if (bytes >= needed && (needed == 0 || workspace != nullptr)) return 0;
    return wrong("%s: workspace has %lld bytes at %p, %lld were expected", name, static_cast<long long>(bytes),
                 workspace, static_cast<long long>(needed));
}

template <class E, int R, bool OUTER>
int run_down(const Down& p, int64_t blocks, void* stream) {
    return launch(down<E, R, OUTER>, blocks, DownLayout<E, R>::Tile::threads, DownParts<E, R, OUTER>::bytes, stream, p);
}

}  // namespace
}  // namespace guardspace

using namespace guardspace;

int guardspace_cuda_lora_linear(const guardspace_lora_linear* call, float factor, void* stream) {
    const int error = check(*call);
    if (error || call->tokens == 0 || call->outputs == 0) return error;
    return with_type(call->dtype, [&](auto entry) { return run_linear<decltype(entry)>(*call, factor, stream); });
}

int64_t guardspace_cuda_lora_down_workspace(const guardspace_lora_down* call) {
    return workspace_bytes_of(*call);
}

int guardspace_cuda_lora_down(const guardspace_lora_down* call, float factor, void* workspace, int64_t workspace_bytes,
                              void* stream) {
    const guardspace_lora_down& c = *call;
    int error = check(c);
    if (error) return error;
    const Division division = divided(c);
    error = check_workspace("lora_down", c, division, workspace, workspace_bytes);
    if (error) return error;
    float* sums = static_cast<float*>(workspace);
    float* parts = division.high > 1 ? sums + division.sums(c) : c.outer;
    const Down p{c, sums, parts, static_cast<int>(division.slices), factor};
    if (division.tiles > 0) {
        error = with_layout(c.dtype, c.rank, [&](auto entry, auto rank) {
            using E = decltype(entry);
            const int64_t count = division.tiles * division.slices;
            if constexpr (sizeof(E) == 2) {
                if (c.outer_rank > 0) return run_down<E, rank(), true>(p, count, stream);
            }
            return run_down<E, rank(), false>(p, count, stream);
        });
    }
    std::vector<Slices> last;
    if (division.slices > 1) {
        last.push_back({sums, c.h, c.tokens * c.rank, p.slices, static_cast<int>(c.dtype), 0});
    }
    if (c.outer_rank > 0 && division.high != 1) {
        last.push_back(
            {parts, c.outer, c.outer_rank * c.width, static_cast<int>(division.high), GUARDSPACE_FLOAT32, 0});
    }
    return error ? error : add_all(last, stream);
}

int64_t guardspace_cuda_lora_outer_workspace(const guardspace_lora_outer* call) {
    return workspace_bytes_of(*call);
}

int guardspace_cuda_lora_outer(const guardspace_lora_outer* call, float factor, void* workspace,
                               int64_t workspace_bytes, void* stream) {
    const guardspace_lora_outer& c = *call;
    int error = check(c);
    if (error) return error;
    const Division division = divided(c);
    error = check_workspace("lora_outer", c, division, workspace, workspace_bytes);
    if (error || division.tiles == 0) return error;
    float* sums = division.slices > 1 ? static_cast<float*>(workspace) : c.outer;
    const Outer p{c, sums, static_cast<int>(division.slices), factor};
    error = with_layout(c.dtype, c.rank, [&](auto entry, auto rank) {
        using Parts = OuterParts<decltype(entry), rank()>;
        const int64_t count = division.tiles * division.slices;
        return launch(outer<decltype(entry), rank()>, count, Parts::T::threads, Parts::bytes, stream, p);
    });
    if (error || division.slices == 1) return error;
    return add_all({{sums, c.outer, c.rank * c.width, p.slices, GUARDSPACE_FLOAT32, 0}}, stream);
}
