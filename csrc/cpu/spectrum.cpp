// Eigenvalues of a symmetric matrix A and those of its eigenvectors that are asked for, by way of a tridiagonal T with
// A = Q T Qᵀ: a panel of Householder reflections at a time, QR iteration for the values, inverse iteration for the
// vectors. What is large, the update of A after a panel and Q times the vectors, is left to a BLAS.
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

template <class T>
GS_INLINE T total(Vec<T> v) {
    T sum = 0;
    for (int i = 0; i < kLanes<T>; i++) sum += v[i];
    return sum;
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

// y += what the rows [first, last) of the upper triangle contribute to A x: each entry is read once and used twice.
void add_rows(const float* a, int64_t stride, int64_t n, int64_t first, int64_t last, const float* x, float* y) {
    constexpr int L = kLanes<float>, kRowsAtOnce = 4;
    for (int64_t r = first; r < last; r += kRowsAtOnce) {
        int count = static_cast<int>(min<int64_t>(kRowsAtOnce, last - r));
        int64_t c = min(r + kRowsAtOnce, n);
        float sums[kRowsAtOnce] = {};
        for (int i = 0; i < count; i++) {
            const float* row = a + (r + i) * stride;
            sums[i] += row[r + i] * x[r + i];
            for (int64_t j = r + i + 1; j < c; j++) {
                sums[i] += row[j] * x[j];
                if (j < r + count) {
                    sums[j - r] += row[j] * x[r + i];
                } else {
                    y[j] += row[j] * x[r + i];
                }
            }
        }
        if (count == kRowsAtOnce) {
            const float *a0 = a + r * stride, *a1 = a0 + stride, *a2 = a1 + stride, *a3 = a2 + stride;
            F x0 = broadcast(x[r]), x1 = broadcast(x[r + 1]), x2 = broadcast(x[r + 2]), x3 = broadcast(x[r + 3]);
            F s0{}, s1{}, s2{}, s3{};
            for (; c + L <= n; c += L) {
                F v0 = load(a0 + c), v1 = load(a1 + c), v2 = load(a2 + c), v3 = load(a3 + c), here = load(x + c);
                s0 += v0 * here;
                s1 += v1 * here;
                s2 += v2 * here;
                s3 += v3 * here;
                store(y + c, load(y + c) + (v0 * x0 + v1 * x1) + (v2 * x2 + v3 * x3));
            }
            sums[0] += total<float>(s0);
            sums[1] += total<float>(s1);
            sums[2] += total<float>(s2);
            sums[3] += total<float>(s3);
        }
        for (; c < n; c++) {
            for (int i = 0; i < count; i++) {
                float entry = a[(r + i) * stride + c];
                sums[i] += entry * x[c];
                y[c] += entry * x[r + i];
            }
        }
        for (int i = 0; i < count; i++) y[r + i] += sums[i];
    }
}

// y = A x for symmetric A (n, n), of which the upper triangle is read. `partial` holds n floats for each other thread.
void multiply(const float* a, int64_t stride, int64_t n, const float* x, float* y, float* partial, int threads) {
    if (n < kFewColumns) threads = 1;
    memset(y, 0, sizeof(float) * n);
    memset(partial, 0, sizeof(float) * n * (threads - 1));
#pragma omp parallel for num_threads(threads) if (threads > 1)
    for (int i = 0; i < threads; i++) {
        // As many entries for each, whichever thread runs it.
        auto bound = [&](int part) {
            double left = __builtin_sqrt(1.0 - static_cast<double>(part) / threads);
            return part == threads ? n : n - static_cast<int64_t>(left * static_cast<double>(n));
        };
        add_rows(a, stride, n, bound(i), bound(i + 1), x, i == 0 ? y : partial + (i - 1) * n);
    }
    for (int i = 1; i < threads; i++) {
        for (int64_t j = 0; j < n; j++) y[j] += partial[(i - 1) * n + j];
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
// that many rows of A tridiagonal, and A − Vᵀ W − Wᵀ V is what they leave of the others. v_i lies in row i of A as
// well, beyond its 1.
void tridiagonal_panel(const Matrix& a, const Matrix& v, const Matrix& w, const Matrix& diagonal, const Matrix& beside,
                       const Matrix& tau, int threads) {
    int64_t n = a.rows, stride = a.row_stride;
    float* partial = static_cast<float*>(workspace(sizeof(float) * static_cast<size_t>(n) * threads));
    for (int64_t j = 0; j < min(v.rows, n); j++) {
        float* row = at<float>(a, j, j);
        int64_t left = n - j - 1;
        for (int64_t t = 0; t < j; t++) {
            add_two(row, -*at<float>(v, t, j), at<float>(w, t, j), -*at<float>(w, t, j), at<float>(v, t, j), left + 1);
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
        multiply(at<float>(a, j + 1, j + 1), stride, left, mine, image_of, partial, threads);
        for (int64_t t = 0; t < j; t++) {
            const float *vt = at<float>(v, t, j + 1), *wt = at<float>(w, t, j + 1);
            add_two(image_of, -dot(wt, mine, left), vt, -dot(vt, mine, left), wt, left);
        }
        float along = -0.5f * factor * factor * dot(image_of, mine, left);
        for (int64_t i = 0; i < left; i++) image_of[i] = factor * image_of[i] + along * mine[i];
    }
}

// All eigenvalues of T into its diagonal, in no order; `beside` (n − 1) is overwritten. False if they were not found.
bool tridiagonal_values(const Matrix& diagonal, const Matrix& beside) {
    double *d = at<double>(diagonal, 0, 0), *e = at<double>(beside, 0, 0);
    int64_t last = diagonal.cols - 1;
    double least = 1e-3 * kEpsilon * bound_of(d, e, diagonal.cols);
    auto negligible = [&](int64_t i) {
        return __builtin_fabs(e[i]) <= kEpsilon * (__builtin_fabs(d[i]) + __builtin_fabs(d[i + 1])) + least;
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
        double half = (d[last - 1] - d[last]) / 2, off = e[last - 1], root = __builtin_sqrt(half * half + off * off);
        double x = d[first] - d[last] + off * off / (half + (half < 0 ? -root : root)), z = e[first];
        for (int64_t k = first; k < last; k++) {
            double length = __builtin_sqrt(x * x + z * z), inverse = 1 / length;
            double c = length > 0 ? x * inverse : 1, s = length > 0 ? z * inverse : 0;
            if (k > first) e[k - 1] = length;
            double mixed = 2 * c * e[k] + s * (d[k + 1] - d[k]), moved = s * mixed;
            d[k] += moved;
            d[k + 1] -= moved;
            x = e[k] = c * mixed - e[k];
            if (k + 1 < last) {
                z = s * e[k + 1];
                e[k + 1] *= c;
            }
        }
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

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
