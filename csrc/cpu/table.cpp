// What the CPU can do at best: multiply-adds on operands in the L1 cache, and the table of this instruction set.
#include <time.h>

#include "cpu/panels.h"

namespace guardspace {
namespace GUARDSPACE_ISA {

void covariance_update(const CovarianceUpdate*, int64_t, int);
void symmetrize(const Matrix&, int);
double quadratic_form(const Matrix&, const Matrix&, const Matrix&, int);
void null_project(const Projection*, int64_t, int);
void lora_linear(const LoraLinear&, int);
void scaled(const Matrix&, double, const Matrix&);
void outer_product(const Matrix&, const Matrix&, const Matrix&, double, int);
void dropout(const Matrix&, const Matrix&, double, uint64_t, bool, int);
void tridiagonal_panel(const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, const Matrix&, int);
bool tridiagonal_values(const Matrix&, const Matrix&);
void tridiagonal_vectors(const Matrix&, const Matrix&, const Matrix&, const Matrix&, int);
void tridiagonal_reflect(const Matrix&, const Matrix&, const Matrix&, int);

namespace {

double now() {
    timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return static_cast<double>(t.tv_sec) + 1e-9 * static_cast<double>(t.tv_nsec);
}

template <class Kind>
double rate(double seconds, int threads) {
    using Element = typename Kind::Element;
    constexpr int W = kWidth<Kind>, MR = kRows<Kind>, kSteps = 64;
    double total = 0;
#pragma omp parallel num_threads(threads) if (threads > 1) reduction(+ : total)
    {
        alignas(64) Element a[kSteps * MR] = {}, b[kSteps * W] = {};
        alignas(64) typename Kind::Sum out[MR * W] = {};
        double start = now(), best = 0, last = start;
        while (last - start < seconds) {
            constexpr int kCalls = 1000;
            for (int i = 0; i < kCalls; i++) {
                register_tiles<Kind>(kVectors, kSteps, a, 1, MR, b, W, out, W, true);
            }
            double time = now();
            best = max(best, kCalls * 2.0 * kSteps * Kind::kPack * MR * W / (time - last));
            last = time;
        }
        total += best;
    }
    return total;
}

double peak_flops(Dtype dtype, double seconds, int threads) {
    double result = 0;
    with_kind(dtype, [&](auto kind) { result = rate<decltype(kind)>(seconds, threads); });
    return result;
}

}  // namespace

extern const Kernels kTable;
const Kernels kTable = {
    covariance_update, symmetrize, quadratic_form,    null_project,       lora_linear,         scaled,
    outer_product,     dropout,    tridiagonal_panel, tridiagonal_values, tridiagonal_vectors, tridiagonal_reflect,
    peak_flops};

}  // namespace GUARDSPACE_ISA
}  // namespace guardspace
