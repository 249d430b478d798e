// Errors as texts, and whether there is a device at all.
#include <cstdio>

#include "launcher.cuh"
#include "primitives.cuh"

namespace guardspace {
namespace {

thread_local char text[512];

}  // namespace

int wrong(const char* format, ...) {
    va_list values;
    va_start(values, format);
    vsnprintf(text, sizeof text, format, values);
    va_end(values);
    return -1;
}

}  // namespace guardspace

const char* guardspace_cuda_error_text(int error) {
    if (error < 0) return guardspace::text;
    return cudaGetErrorString(static_cast<cudaError_t>(error));
}

int guardspace_cuda_device_count(int* count) {
    return cudaGetDeviceCount(count);
}
