// Eigenvalues of a symmetric matrix A and those of its eigenvectors that are asked for, by way of a tridiagonal T with
// A = Q T Qᵀ: a panel of Householder reflections at a time, QR iteration for the values, inverse iteration for the
// vectors of T, and Q times these.
#include "cpu/panels.h"

namespace guardspace {
namespace GUARDSPACE_ISA {
namespace {

using D = Vec<double>;
using I64 = Vec<int64_t>;

constexpr double kEpsilon = 0x1p-52;
// Vectors of values so close, relative to |T|, are made orthogonal: inverse iteration alone leaves 1e-16 over that.
constexpr double kClose = 1e-12;
// Of a row whose entries are at most 1, squares that are rounding by far, and would underflow.
constexpr double kNothing = 1e-28;
constexpr int kMostIterations = 60;
constexpr int64_t kFewColumns = 256;  // of A: one thread is quicker

template <class T, int N = kLanes<T>>
GS_INLINE T total(typename VectorOf<T, N>::type v) {
    if constexpr (N == 2) {
        return v[0] + v[1];
    } else {
        typename VectorOf<T, N / 2>::type halves[2];
        memcpy(halves, &v, sizeof v);
        return total<T, N / 2>(halves[0] + halves[1]);
    }
}

template <class T>
T dot(const T* a, const T* b, int64_t n) {
    constexpr int L = kLanes<T>;
    Vec<T> first{}, second{};
    int64_t i = 0;
    for (; i + 2 * L <= n; i += 2 * L) {
        first += load(a + i) * load(b + i);
        second += load(a + i + L) * load(b + i + L);
    }
    T sum = total<T>(first + second);
    for (; i < n; i++) sum += a[i] * b[i];
    return sum;
}

// y += a x + b z
void add_two(float* y, float a, const float* x, float b, const float* z, int64_t n) {
    constexpr int L = kLanes<float>;
    F va = broadcast(a), vb = broadcast(b);
    int64_t i = 0;
    for (; i + L <= n; i += L) store(y + i, load(y + i) + va * load(x + i) + vb * load(z + i));
    for (; i < n; i++) y[i] += a * x[i] + b * z[i];
}

// y += what R rows of A from row r on contribute to A x beyond column c: each entry is read once and used twice.
template <int R>
void add_beyond(const float* a, int64_t stride, int64_t n, int64_t r, int64_t c, const float* x, float* y) {
    constexpr int L = kLanes<float>;
    const float* row = a + r * stride;
    F sums[R] = {};
    for (; c + L <= n; c += L) {
        F here = load(x + c), sum = load(y + c);
#pragma GCC unroll 8
        for (int i = 0; i < R; i++) {
            F entries = load(row + i * stride + c);
            sums[i] += entries * here;
            sum += entries * broadcast(x[r + i]);
        }
        store(y + c, sum);
    }
    for (int i = 0; i < R; i++) {
        float sum = total<float>(sums[i]);
        for (int64_t j = c; j < n; j++) {
            float entry = row[i * stride + j];
            sum += entry * x[j];
            y[j] += entry * x[r + i];
        }
        y[r + i] += sum;
    }
}

// y += what the rows [first, last) of the upper triangle contribute to A x. Their diagonal is met in blocks of a
// vector's lanes, so that where A and its stride are aligned all loads are: from the L3 cache 8 rows at once are
// read 1.3 times as fast as 4 that are not.
void add_rows(const float* a, int64_t stride, int64_t n, int64_t first, int64_t last, const float* x, float* y) {
    constexpr int L = kLanes<float>, kRowsAtOnce = L < 8 ? L : 8;
    Vec<int32_t> lane;
    for (int i = 0; i < L; i++) lane[i] = i;
    for (int64_t r = first; r < last;) {
        int64_t c = r - r % L, after = c + L, end = min(after, last);
        for (int64_t i = r; i < end; i++) {
            const float* row = a + i * stride;
            float sum = row[i] * x[i];
            if (after <= n) {
                F entries = lane > static_cast<int32_t>(i - c) ? load(row + c) : F{};
                sum += total<float>(entries * load(x + c));
                store(y + c, load(y + c) + entries * broadcast(x[i]));
            }
            for (int64_t j = i + 1; after > n && j < n; j++) {
                sum += row[j] * x[j];
                y[j] += row[j] * x[i];
            }
            y[i] += sum;
        }
        for (; r + kRowsAtOnce <= end; r += kRowsAtOnce) add_beyond<kRowsAtOnce>(a, stride, n, r, after, x, y);
        for (; r < end; r++) add_beyond<1>(a, stride, n, r, after, x, y);
    }
}

// y += A x for the rows and columns of the symmetric A (n, n) from `first` on, of which the upper triangle is read; x
// and y begin at 0. `partial` holds n floats for each other thread.
void multiply(const float* a, int64_t stride, int64_t n, int64_t first, const float* x, float* y, float* partial,
              int threads) {
    if (n - first < kFewColumns) threads = 1;
    memset(partial, 0, sizeof(float) * n * (threads - 1));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int i = 0; i < threads; i++) {
        // As many entries for each, whichever thread runs it.
        auto bound = [&](int part) {
            double left = __builtin_sqrt(1.0 - static_cast<double>(part) / threads);
            int64_t row = n - static_cast<int64_t>(left * static_cast<double>(n - first));
            return part == 0 ? first : part == threads ? n : max(first, row - row % kLanes<float>);
        };
        add_rows(a, stride, n, bound(i), bound(i + 1), x, i == 0 ? y : partial + (i - 1) * n);
    }
    for (int i = 1; i < threads; i++) {
        for (int64_t j = first; j < n; j++) y[j] += partial[(i - 1) * n + j];
    }
}

// The rows of A from v.rows on += VᵀW + WᵀV = [V; W]ᵀ [W; V]: their upper triangle, and what lies beside it in its
// tiles.
void update_rest(const Matrix& a, const Matrix& v, const Matrix& w, int threads) {
    using Kind = Real<float>;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>, L = kLanes<float>;
    int64_t size = v.rows, n = a.rows - size, panels = ceil_div(max<int64_t>(n, 0), W), length = 3 * size * W;
    if (panels == 0) return;
    if (n < kFewColumns) threads = 1;
    float* packed = static_cast<float*>(workspace(sizeof(float) * static_cast<size_t>(panels * length)));
#pragma omp parallel num_threads(threads) if (threads > 1)
    {
#pragma omp for
        for (int64_t p = 0; p < panels; p++) {
            for (int i = 0; i < 3; i++) {  // V, W and V again
                pack_rows<Kind>(packed + p * length + i * size * W, window(i == 1 ? w : v, 0, size + p * W), size,
                                min<int64_t>(W, n - p * W));
            }
        }
#pragma omp for schedule(dynamic)
        for (int64_t p = 0; p < panels; p++) {
            for (int64_t q = p; q < panels; q++) {
                int64_t cols = min<int64_t>(W, n - q * W), end = min<int64_t>(W, n - p * W);
                int vectors = static_cast<int>(ceil_div(cols, L));
                const float *left = packed + p * length, *right = packed + q * length + size * W;
                for (int64_t row = 0; row < end; row += MR) {
                    int64_t rows = min<int64_t>(MR, end - row);
                    float* out = at<float>(a, size + p * W + row, size + q * W);
                    for (int64_t i = 0; i < rows; i++) prefetch(out + i * a.row_stride, cols);
                    if (rows == MR && cols % L == 0) {
                        register_tiles<Kind>(vectors, 2 * size, left + row, 1, W, right, W, out, a.row_stride, true);
                        continue;
                    }
                    float tile[MR * W];
                    register_tiles<Kind>(vectors, 2 * size, left + row, 1, W, right, W, tile, W, false);
                    for (int64_t i = 0; i < rows; i++) {
                        for (int64_t j = 0; j < cols; j++) out[i * a.row_stride + j] += tile[i * W + j];
                    }
                }
            }
        }
    }
}

// The largest eigenvalue of T is at most that.
double bound_of(const double* diagonal, const double* beside, int64_t n) {
    double norm = 0;
    for (int64_t i = 0; i < n; i++) {
        double left = i > 0 ? __builtin_fabs(beside[i - 1]) : 0, right = i + 1 < n ? __builtin_fabs(beside[i]) : 0;
        norm = max(norm, __builtin_fabs(diagonal[i]) + left + right);
    }
    return norm;
}

GS_INLINE D magnitude(D v) {
    return v < 0 ? -v : v;
}
GS_INLINE D at_least(D v, double least) {
    return magnitude(v) < least ? D{} + least : v;
}

// The vectors of T for as many values as a vector has lanes, by T − λ = P L U: v (n,), one of them per lane.
void inverse_iteration(const double* diagonal, const double* beside, int64_t n, D value, double tiny, int64_t seed,
                       D* scratch, D* v) {
    D *inverse = scratch, *second = inverse + n, *third = second + n, *lower = third + n;
    I64* swapped = reinterpret_cast<I64*>(lower + n);
    D pivot = diagonal[0] - value, next = D{} + (n > 1 ? beside[0] : 0.0);
    for (int64_t i = 0; i + 1 < n; i++) {
        D below = D{} + beside[i], on = diagonal[i + 1] - value, after = D{} + (i + 2 < n ? beside[i + 1] : 0.0);
        I64 swap = magnitude(pivot) < magnitude(below);
        D divisor = at_least(swap ? below : pivot, tiny);
        inverse[i] = 1.0 / divisor;
        D factor = (swap ? pivot : below) * inverse[i];
        second[i] = swap ? on : next;
        third[i] = swap ? after : D{};
        lower[i] = factor;
        swapped[i] = swap;
        D kept = swap ? next : on;
        pivot = kept - factor * second[i];
        next = swap ? -factor * after : after;
    }
    inverse[n - 1] = 1.0 / at_least(pivot, tiny);
    second[n - 1] = third[n - 1] = D{};
    using U64 = Vec<uint64_t>;
    U64 state{};
    for (int lane = 0; lane < kLanes<double>; lane++) {
        state[lane] = 0x9e3779b97f4a7c15u * (static_cast<uint64_t>(seed) + static_cast<uint64_t>(lane) + 1);
    }
    for (int64_t i = 0; i < n; i++) {
        state = state * 6364136223846793005u + 1442695040888963407u;
        v[i] = __builtin_convertvector((I64)(state ^ (state << 32)), D) * 0x1p-63;
    }
    for (int solve = 0; solve < 2; solve++) {
        // The first right-hand side is random, before L as well as behind it.
        for (int64_t i = 0; solve > 0 && i + 1 < n; i++) {
            D above = v[i], below = v[i + 1];
            v[i] = swapped[i] ? below : above;
            v[i + 1] = (swapped[i] ? above : below) - lower[i] * v[i];
        }
        D one{}, two{}, largest{};
        for (int64_t i = n - 1; i >= 0; i--) {
            D entry = (v[i] - second[i] * one - third[i] * two) * inverse[i];
            v[i] = entry;
            two = one;
            one = entry;
            D size = magnitude(entry);
            largest = size > largest ? size : largest;
        }
        D scale = 1.0 / largest, square{};
        for (int64_t i = 0; i < n; i++) {
            v[i] *= scale;
            square += v[i] * v[i];
        }
        for (int lane = 0; lane < kLanes<double>; lane++) scale[lane] = 1.0 / __builtin_sqrt(square[lane]);
        for (int64_t i = 0; i < n; i++) v[i] *= scale;
    }
}

}  // namespace

// v.rows rows of A (n, n), float32 and at most 1, of which the upper triangle is read: the reflections I − τ v vᵀ make
// that many rows of A tridiagonal, and of the others they leave A + Vᵀ W + Wᵀ V, which is put in their place. v_i lies
// in row i of A as well, beyond its 1.
void tridiagonal_panel(const Matrix& a, const Matrix& v, const Matrix& w, const Matrix& diagonal, const Matrix& beside,
                       const Matrix& tau, int threads) {
    int64_t n = a.rows, stride = a.row_stride;
    float* partial = static_cast<float*>(workspace(sizeof(float) * static_cast<size_t>(n) * threads));
    for (int64_t j = 0; j < min(v.rows, n); j++) {
        float* row = at<float>(a, j, j);
        int64_t left = n - j - 1;
        for (int64_t t = 0; t < j; t++) {
            add_two(row, *at<float>(v, t, j), at<float>(w, t, j), *at<float>(w, t, j), at<float>(v, t, j), left + 1);
        }
        *at<double>(diagonal, 0, j) = row[0];
        memset(at<float>(v, j, 0), 0, sizeof(float) * n);
        memset(at<float>(w, j, 0), 0, sizeof(float) * n);
        if (left == 0) break;
        float* x = row + 1;
        double first = x[0], rest = dot(x + 1, x + 1, left - 1);
        *at<double>(beside, 0, j) = first;
        *at<float>(tau, 0, j) = 0;
        if (rest < kNothing) continue;  // tridiagonal already
        double length = __builtin_sqrt(first * first + rest), image = first > 0 ? -length : length;
        float factor = static_cast<float>((image - first) / image), scale = static_cast<float>(1 / (first - image));
        *at<double>(beside, 0, j) = image;
        *at<float>(tau, 0, j) = factor;
        float *mine = at<float>(v, j, j + 1), *image_of = at<float>(w, j, j + 1);
        for (int64_t i = 1; i < left; i++) x[i] *= scale;
        mine[0] = 1;
        memcpy(mine + 1, x + 1, sizeof(float) * (left - 1));
        multiply(at<float>(a, 0, 0), stride, n, j + 1, at<float>(v, j, 0), at<float>(w, j, 0), partial, threads);
        for (int64_t t = 0; t < j; t++) {
            const float *vt = at<float>(v, t, j + 1), *wt = at<float>(w, t, j + 1);
            add_two(image_of, dot(wt, mine, left), vt, dot(vt, mine, left), wt, left);
        }
        float along = -0.5f * factor * factor * dot(image_of, mine, left);
        for (int64_t i = 0; i < left; i++) image_of[i] = -factor * image_of[i] - along * mine[i];
    }
    update_rest(a, v, w, threads);
}

// All eigenvalues of T into its diagonal, in no order; `beside` (n − 1) is overwritten. False if they were not found.
//
// QR iteration without square roots (Pal, Walker and Kahan): of T's other entries and of each rotation it keeps the
// squares. An entry waits for one division of the one before it: γ = N / r and p = (N² / p₀) / r, where N and N² / p₀
// are found beside 1 / r.
bool tridiagonal_values(const Matrix& diagonal, const Matrix& beside) {
    double *d = at<double>(diagonal, 0, 0), *e = at<double>(beside, 0, 0);
    int64_t last = diagonal.cols - 1;
    double norm = bound_of(d, e, diagonal.cols), least = 1e-3 * kEpsilon * norm, vanishing = 1e-200 * norm * norm;
    for (int64_t i = 0; i < last; i++) e[i] *= e[i];
    auto negligible = [&](int64_t i) {
        double bound = kEpsilon * (__builtin_fabs(d[i]) + __builtin_fabs(d[i + 1])) + least;
        return e[i] <= bound * bound;
    };
    for (int iterations = 0; last > 0;) {
        if (negligible(last - 1)) {
            last--;
            iterations = 0;
            continue;
        }
        if (++iterations > kMostIterations) return false;
        int64_t first = last - 1;
        while (first > 0 && !negligible(first - 1)) first--;
        // Shifted by the eigenvalue of the last two rows that lies closer to the last entry.
        double half = (d[last - 1] - d[last]) / 2, off = e[last - 1], root = __builtin_sqrt(half * half + off);
        double shift = d[last] - off / (half + (half < 0 ? -root : root));
        double gamma = d[first] - shift, p = gamma * gamma, cosine = 1, sine = 0;
        for (int64_t k = first; k < last; k++) {
            double square = e[k], next = d[k + 1], r = p + square, inverse = 1 / r;
            double mixed = p * (next - shift) - square * gamma;
            double after = p > vanishing ? mixed * mixed * (1 / p) * inverse : cosine * square;
            if (k > first) e[k - 1] = sine * r;
            cosine = p * inverse;
            sine = square * inverse;
            double moved = mixed * inverse;
            d[k] = gamma + (next - moved);
            gamma = moved;
            p = after;
        }
        e[last - 1] = sine * p;
        d[last] = shift + gamma;
    }
    return true;
}

// Row i of `vectors` (k, n): the unit vector of T for the ith of the ascending values (k,).
void tridiagonal_vectors(const Matrix& diagonal, const Matrix& beside, const Matrix& values, const Matrix& vectors,
                         int threads) {
    constexpr int L = kLanes<double>;
    const double *d = at<double>(diagonal, 0, 0), *e = at<double>(beside, 0, 0), *w = at<double>(values, 0, 0);
    int64_t n = diagonal.cols, count = values.cols;
    double norm = bound_of(d, e, n);
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int64_t i = 0; i < count; i += L) {
        D* scratch = static_cast<D*>(workspace(sizeof(D) * 6 * static_cast<size_t>(n)));
        D value, *v = scratch + 5 * n;
        for (int lane = 0; lane < L; lane++) value[lane] = w[min(i + lane, count - 1)];
        inverse_iteration(d, e, n, value, kEpsilon * norm, i, scratch, v);
        for (int64_t lane = 0; lane < min<int64_t>(L, count - i); lane++) {
            double* row = at<double>(vectors, i + lane, 0);
            for (int64_t j = 0; j < n; j++) row[j] = v[j][lane];
        }
    }
    for (int64_t i = 1, start = 0; i < count; i++) {
        if (w[i] - w[i - 1] > kClose * norm) start = i;
        double* row = at<double>(vectors, i, 0);
        for (int again = 0; again < 2 && start < i; again++) {
            for (int64_t t = start; t < i; t++) {
                const double* other = at<double>(vectors, t, 0);
                double along = dot(row, other, n);
                for (int64_t j = 0; j < n; j++) row[j] -= along * other[j];
            }
            double scale = 1 / __builtin_sqrt(dot(row, row, n));
            for (int64_t j = 0; j < n; j++) row[j] *= scale;
        }
    }
}

// Every row of `vectors` (k, n), float32, becomes Q times it: Q is the product of the reflections of tridiagonal_panel,
// v_i in row i of `rows` and τ_i in `tau`. As many reflections as a panel is wide are I − Vᵀ S V, S upper triangular.
void tridiagonal_reflect(const Matrix& rows, const Matrix& tau, const Matrix& vectors, int threads) {
    using Kind = Real<float>;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>, L = kLanes<float>;
    int64_t n = vectors.cols, tiles = ceil_div(vectors.rows, MR), padded = ceil_div(n, W) * W;
    int64_t scratch = MR * (padded + 2 * W);  // of a thread
    size_t floats = static_cast<size_t>(2 * padded * W + 2 * W * W + threads * scratch);
    float *by_row = static_cast<float*>(workspace(sizeof(float) * floats)), *by_column = by_row + padded * W;
    float *gram = by_column + padded * W, *factor = gram + W * W, *own = factor + W * W;
    for (int64_t start = (n - 2) / W * W; start >= 0; start -= W) {
        int64_t size = min<int64_t>(W, n - 1 - start), left = n - start, panels = ceil_div(left, W);
        // V by its columns, and in panels of W of them by its rows.
        memset(by_row, 0, sizeof(float) * padded * W);
        memset(by_column, 0, sizeof(float) * padded * W);
        for (int64_t i = 0; i < size; i++) {
            const float* v = at<float>(rows, start + i, start);
            for (int64_t c = 0; c < left; c += W) {
                memcpy(by_row + (c + i) * W, v + c, sizeof(float) * min<int64_t>(W, left - c));
            }
            memset(by_row + i * W, 0, sizeof(float) * (i + 1));
            by_row[((i + 1) / W * W + i) * W + (i + 1) % W] = by_column[(i + 1) * W + i] = 1;
            for (int64_t c = i + 2; c < left; c++) by_column[c * W + i] = v[c];
        }
        panel_product<Kind>(left, by_column, by_column, size, size, false, false, gram);
        // −Sᵀ, row after row: column j of S is τ_j (e_j − S V v_j), of the reflections before it.
        memset(factor, 0, sizeof(float) * W * W);
        for (int64_t j = 0; j < size; j++) {
            float t = *at<float>(tau, 0, start + j);
            for (int64_t i = 0; i < j; i++) {
                float along = gram[i * W + j];
                for (int64_t l = 0; l <= i; l++) factor[j * W + l] -= t * along * factor[i * W + l];
            }
            factor[j * W + j] = -t;
        }
#pragma omp parallel for num_threads(threads) if (threads > 1)
        for (int part = 0; part < threads; part++) {
            float *some = own + part * scratch, *along = some + MR * padded, *moved = along + MR * W;
            for (int64_t tile = tiles * part / threads; tile < tiles * (part + 1) / threads; tile++) {
                int64_t count = min<int64_t>(MR, vectors.rows - tile * MR);
                memset(some, 0, sizeof(float) * MR * padded);
                for (int64_t i = 0; i < count; i++) {
                    memcpy(some + i * padded, at<float>(vectors, tile * MR + i, start), sizeof(float) * left);
                }
                register_tiles<Kind>(W / L, left, some, padded, 1, by_column, W, along, W, false);
                register_tiles<Kind>(W / L, W, along, W, 1, factor, W, moved, W, false);
                for (int64_t p = 0; p < panels; p++) {
                    register_tiles<Kind>(W / L, W, moved, W, 1, by_row + p * W * W, W, some + p * W, padded, true);
                }
                for (int64_t i = 0; i < count; i++) {
                    memcpy(at<float>(vectors, tile * MR + i, start), some + i * padded, sizeof(float) * left);
                }
            }
        }
    }
}

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
