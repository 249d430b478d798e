// The linear layer with its rank-r update as one product: y = [x | h] [w | up]ᵀ + bias, h = x downᵀ; the small
// products of the backward pass; and dropout whose mask is a function of a seed.
#include "cpu/panels.h"

namespace guardspace {
namespace GUARDSPACE_ISA {
namespace {

constexpr int64_t kTokenBytes = 16 << 20, kWeightBytes = 4 << 20;  // packed at a time: the L3 cache holds the weights

template <class Kind, class T>
void store_rows(const Matrix& y, const Matrix& bias, int64_t row0, int64_t col0, int64_t rows, int64_t cols,
                const typename Kind::Sum* tile) {
    using Sum = typename Kind::Sum;
    constexpr int W = kWidth<Kind>, L = kLanes<Sum>;
    alignas(64) Sum added[W] = {};
    if (bias.data) {
        for (int64_t j = 0; j < cols; j++) added[j] = convert_one<Sum>(*at<T>(bias, 0, col0 + j));
    }
    for (int64_t i = 0; i < rows; i++) {
        for (int64_t j = 0; j < cols; j += L) {
            store_lanes<T, Sum>(at<T>(y, row0 + i, col0 + j), y.col_stride, load(tile + i * W + j) + load(added + j),
                                min<int64_t>(L, cols - j));
        }
    }
}

template <class Kind>
void linear(const LoraLinear& layer, int threads) {
    using Element = typename Kind::Element;
    using Sum = typename Kind::Sum;
    constexpr int W = kWidth<Kind>;
    int64_t tokens = layer.x.rows, K = layer.x.cols, N = layer.w.rows, R = layer.h.cols;
    int64_t base = steps<Kind>(K), size = (base + steps<Kind>(R)) * W;  // of a panel of [x | h] or [w | up]
    int64_t bytes = max<int64_t>(size * static_cast<int64_t>(sizeof(Element)), 1);
    int64_t token_panels = min(ceil_div(tokens, W), max<int64_t>(1, kTokenBytes / bytes));
    int64_t weight_panels = min(ceil_div(N, W), max<int64_t>(1, kWeightBytes / bytes));
    int64_t down_panels = layer.down.rows > 0 ? ceil_div(R, W) : 0;
    Element* xs = static_cast<Element*>(
        workspace(sizeof(Element) * (size * (token_panels + weight_panels) + base * W * down_panels)));
    Element *ws = xs + size * token_panels, *downs = ws + size * weight_panels;

#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < down_panels; p++) {
            pack_columns<Kind>(downs + p * base * W, window(layer.down, p * W, 0), min<int64_t>(W, R - p * W), K);
        }
        for (int64_t first = 0; first < tokens; first += token_panels * W) {
            int64_t panels = min(token_panels, ceil_div(tokens - first, W));
#pragma omp for schedule(dynamic) nowait  // the panels of W, which are packed next, do not depend on it
            for (int64_t p = 0; p < panels; p++) {
                alignas(64) Sum tile[W * W];
                Element* x = xs + p * size;
                int64_t t0 = first + p * W, count = min<int64_t>(W, tokens - t0);
                pack_columns<Kind>(x, window(layer.x, t0, 0), count, K);
                for (int64_t q = 0; q < down_panels; q++) {
                    int64_t ranks = min<int64_t>(W, R - q * W);
                    panel_product<Kind>(base, downs + q * base * W, x, ranks, count, false, false, tile);
                    with_type(layer.h.dtype, [&](auto* type) {
                        using T = std::remove_pointer_t<decltype(type)>;
                        for_each_column(tile, W, ranks, count, [&](int64_t t, int64_t r, Vec<Sum> v, int64_t lanes) {
                            store_lanes<T, Sum>(at<T>(layer.h, t0 + t, q * W + r), layer.h.col_stride, v, lanes);
                        });
                    });
                }
                pack_columns<Kind>(x + base * W, window(layer.h, t0, 0), count, R);
            }
            for (int64_t column = 0; column < N; column += weight_panels * W) {
                int64_t columns = min(weight_panels, ceil_div(N - column, W));
#pragma omp for schedule(dynamic)
                for (int64_t p = 0; p < columns; p++) {
                    int64_t n0 = column + p * W, count = min<int64_t>(W, N - n0);
                    pack_columns<Kind>(ws + p * size, window(layer.w, n0, 0), count, K);
                    pack_columns<Kind>(ws + p * size + base * W, window(layer.up, n0, 0), count, R);
                }
                // Columns in groups, so that there are enough tasks for every thread where tokens are few, and no
                // thread waits long for the last one: of 8 panels, the last half full, one of two threads took 4, the
                // other 3½.
                int64_t groups = min(columns, max<int64_t>(1, ceil_div(16 * threads, panels)));
#pragma omp for schedule(dynamic)
                for (int64_t task = 0; task < panels * groups; task++) {
                    alignas(64) Sum tile[W * W];
                    int64_t p = task / groups, group = task % groups;
                    int64_t t0 = first + p * W, rows = min<int64_t>(W, tokens - t0);
                    for (int64_t q = columns * group / groups; q < columns * (group + 1) / groups; q++) {
                        int64_t n0 = column + q * W, cols = min<int64_t>(W, N - n0);
                        panel_product<Kind>(size / W, xs + p * size, ws + q * size, rows, cols, false, false, tile);
                        with_type(layer.y.dtype, [&](auto* type) {
                            store_rows<Kind, std::remove_pointer_t<decltype(type)>>(layer.y, layer.bias, t0, n0, rows,
                                                                                    cols, tile);
                        });
                    }
                }
            }
        }
    }
}

template <class Kind>
void outer(const Matrix& h, const Matrix& x, const Matrix& out, double scale, int threads) {
    using Element = typename Kind::Element;
    using Sum = typename Kind::Sum;
    constexpr int W = kWidth<Kind>, L = kLanes<Sum>;
    constexpr int64_t kTokens = 512;  // packed at a time
    int64_t tokens = h.rows, r = h.cols, d = x.cols, length = steps<Kind>(tokens);
    int64_t rank_panels = ceil_div(r, W), panels = ceil_div(d, W), most = panels_per_task(panels, 4, 4 * threads);
    int64_t packed = kTokens / Kind::kPack * W,
            per_thread = most * (packed * static_cast<int64_t>(sizeof(Element)) +
                                 rank_panels * W * W * static_cast<int64_t>(sizeof(Sum)));
    size_t h_bytes = sizeof(Element) * rank_panels * length * W;
    char* memory = static_cast<char*>(workspace(h_bytes + per_thread * threads));
    Element* hs = reinterpret_cast<Element*>(memory);
    int next = 0;
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
        int me;
#pragma omp atomic capture
        me = next++;
        Sum* tiles = reinterpret_cast<Sum*>(memory + h_bytes + per_thread * me);
        Element* xs = reinterpret_cast<Element*>(tiles + most * rank_panels * W * W);
#pragma omp for schedule(dynamic) collapse(2)
        for (int64_t p = 0; p < rank_panels; p++) {
            for (int64_t start = 0; start < tokens; start += kTokens) {
                pack_rows<Kind>(hs + (p * length + start / Kind::kPack) * W, window(h, start, p * W),
                                min(kTokens, tokens - start), min<int64_t>(W, r - p * W));
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t first = 0; first < panels; first += most) {
            int64_t count = min(most, panels - first);
            if (tokens == 0) memset(tiles, 0, sizeof(Sum) * count * rank_panels * W * W);
            for (int64_t start = 0; start < tokens; start += kTokens) {
                int64_t k = min(kTokens, tokens - start);
                for (int64_t p = 0; p < count; p++) {
                    int64_t col = (first + p) * W, cols = min<int64_t>(W, d - col);
                    pack_rows<Kind>(xs + p * packed, window(x, start, col), k, cols);
                    for (int64_t q = 0; q < rank_panels; q++) {
                        panel_product<Kind>(steps<Kind>(k), hs + (q * length + start / Kind::kPack) * W,
                                            xs + p * packed, min<int64_t>(W, r - q * W), cols, false, start > 0,
                                            tiles + (p * rank_panels + q) * W * W);
                    }
                }
            }
            with_type(out.dtype, [&](auto* type) {
                using T = std::remove_pointer_t<decltype(type)>;
                for (int64_t p = 0; p < count; p++) {
                    int64_t col = (first + p) * W, cols = min<int64_t>(W, d - col);
                    for (int64_t q = 0; q < rank_panels; q++) {
                        const Sum* tile = tiles + (p * rank_panels + q) * W * W;
                        int64_t ranks = min<int64_t>(W, r - q * W);
                        Sum factor = static_cast<Sum>(scale);
                        if (out.row_stride == 1) {
                            for_each_column(tile, W, ranks, cols, [&](int64_t j, int64_t i, Vec<Sum> v, int64_t lanes) {
                                store_lanes<T, Sum>(at<T>(out, q * W + i, col + j), 1, factor * v, lanes);
                            });
                            continue;
                        }
                        for (int64_t i = 0; i < ranks; i++) {
                            for (int64_t j = 0; j < cols; j += L) {
                                store_lanes<T, Sum>(at<T>(out, q * W + i, col + j), out.col_stride,
                                                    factor * load(tile + i * W + j), min<int64_t>(L, cols - j));
                            }
                        }
                    }
                }
            });
        }
    }
}

template <class Sum, class From, class To>
void scale_into(const Matrix& x, Sum factor, const Matrix& out) {
    constexpr int L = kLanes<Sum>;
    for (int64_t row = 0; row < x.rows; row++) {
        int64_t col = 0;
        if (x.col_stride == 1 && out.col_stride == 1) {
            for (; col + L <= x.cols; col += L) {
                Convert<Sum>::to(at<To>(out, row, col), factor * Convert<Sum>::from(at<From>(x, row, col)));
            }
        }
        for (; col < x.cols; col++) {
            *at<To>(out, row, col) = convert_one<To>(factor * convert_one<Sum>(*at<From>(x, row, col)));
        }
    }
}

GS_INLINE uint64_t mix(uint64_t z) {  // splitmix64
    z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9u;
    z = (z ^ (z >> 27)) * 0x94d049bb133111ebu;
    return z ^ (z >> 31);
}
GS_INLINE U32 mix(U32 z) {
    z = (z ^ (z >> 16)) * 0x7feb352du;
    z = (z ^ (z >> 15)) * 0x846ca68bu;
    return z ^ (z >> 16);
}

template <class T>
void drop(const Matrix& x, const Matrix& out, double p, uint64_t seed, bool accumulate, int threads) {
    using Sum = std::conditional_t<std::is_same_v<T, double>, double, float>;
    constexpr int L = kLanes<float>;
    uint32_t threshold = static_cast<uint32_t>(p * 0x1p32);
    Sum factor = static_cast<Sum>(1.0 / (1.0 - p));
#pragma omp parallel for schedule(static) num_threads(threads) if (threads > 1)
    for (int64_t row = 0; row < x.rows; row++) {
        uint64_t key = mix(seed + 0x9e3779b97f4a7c15u * static_cast<uint64_t>(row + 1));
        uint32_t low = static_cast<uint32_t>(key), high = static_cast<uint32_t>(key >> 32);
        for (int64_t col = 0; col < x.cols; col += L) {
            U32 place;
            for (int i = 0; i < L; i++) place[i] = static_cast<uint32_t>(col + i);
            U32 bits = mix(mix(place + low) ^ high);
            for (int i = 0; i < min<int64_t>(L, x.cols - col); i++) {
                Sum kept = bits[i] >= threshold ? convert_one<Sum>(*at<T>(x, row, col + i)) * factor : Sum(0);
                T* target = at<T>(out, row, col + i);
                *target = convert_one<T>(accumulate ? convert_one<Sum>(*target) + kept : kept);
            }
        }
    }
}

}  // namespace

void lora_linear(const LoraLinear& layer, int threads) {
    with_kind(layer.x.dtype, [&](auto kind) { linear<decltype(kind)>(layer, threads); });
}

void scaled(const Matrix& x, double factor, const Matrix& out) {
    with_type(out.dtype, [&](auto* type) {
        using To = std::remove_pointer_t<decltype(type)>;
        if (x.dtype == kFloat64) return scale_into<double, double, To>(x, factor, out);
        if (x.dtype == kFloat32) return scale_into<float, float, To>(x, static_cast<float>(factor), out);
        scale_into<float, To, To>(x, static_cast<float>(factor), out);
    });
}

void outer_product(const Matrix& h, const Matrix& x, const Matrix& out, double scale, int threads) {
    with_kind(x.dtype, [&](auto kind) { outer<decltype(kind)>(h, x, out, scale, threads); });
}

void dropout(const Matrix& x, const Matrix& out, double p, uint64_t seed, bool accumulate, int threads) {
    with_type(x.dtype,
              [&](auto* type) { drop<std::remove_pointer_t<decltype(type)>>(x, out, p, seed, accumulate, threads); });
}

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
