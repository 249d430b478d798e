// Null-space projection, and AdamW between two of them, of all matrices of a model in a few launches.
//
// A projection takes two: the first forms H = G basis, the second G − H basisᵀ or H basisᵀ; each reads every basis
// once, blocks of rows that share it side by side. Where the matrices are too few to fill the chip the first one splits
// the width into slices, whose sums a third adds in one order.
#include <cmath>

#include "launcher.cuh"
#include "product.cuh"
#include "slices.cuh"

namespace guardspace {
namespace {

constexpr int64_t kMostSlices = 8;
constexpr int kFewRows = 16, kManyRows = 64;

template <int ROWS>
struct Layout {
    using Tile = guardspace::Tile<ROWS, 64, 32, 2, 2, 3>;
};
template <>
struct Layout<kFewRows> {
    using Tile = guardspace::Tile<kFewRows, 64, 32, 1, 4, 3>;
};

// (r, d) G of any dtype; basis (d, k); h is where (r, k) H begins in the workspace.
struct Item {
    const void* g;
    const float* basis;
    int64_t h;
    int rows, width, rank, stride_g, stride_basis, dtype, begin;
};

struct Slicing {
    float* h;
    int64_t count;  // of a slice's sums
    int slices;
};

template <int ROWS>
struct OntoParts {
    using T = typename Layout<ROWS>::Tile;
    using G = Part<float, T::m, T::k, Adjacent::kSum>;
    using Basis = Part<float, T::n, T::k, Adjacent::kOther>;
    static constexpr int stage = G::size + Basis::size;
    static constexpr size_t bytes = sizeof(float) * T::stages * stage;
};

// A tile of H[slice] = G[:, slice] basis[slice].
template <int ROWS>
__global__ void __launch_bounds__(Layout<ROWS>::Tile::threads, 2)
    onto_basis(const __grid_constant__ Group<Item, Slicing> items) {
    using Parts = OntoParts<ROWS>;
    using T = typename Parts::T;
    using G = typename Parts::G;
    const Slicing& shared = items.shared;
    int block;
    const Item& item = locate(items, block);
    const int blocks_r = blocks(item.rows, T::m), all = blocks(item.width, T::k);
    const int row = block % blocks_r * T::m, slice = block / blocks_r % shared.slices;
    const int col = block / blocks_r / shared.slices * T::n;
    const View<float> basis(item.basis, item.width, item.rank, item.stride_basis);
    float* memory = reinterpret_cast<float*>(shared_memory());
    Sums<T> total;
    pipeline<T>(
        all > slice ? blocks(all - slice, shared.slices) : 0,
        [&](int step, int stage) {
            const int term = (step * shared.slices + slice) * T::k;
            float* to = memory + stage * Parts::stage;
            with_type(item.dtype, [&](auto entry) {
                const View<decltype(entry)> g(item.g, item.rows, item.width, item.stride_g);
                copy_part<G, T::threads>(to, g, row, term);
            });
            copy_part<typename Parts::Basis, T::threads>(to + G::size, basis, term, col);
        },
        [](int, int) {},
        [&](int, int stage) {
            const float* part = memory + stage * Parts::stage;
            multiply_exactly<T, G, typename Parts::Basis>(total, part, part + G::size);
        });
    float* h = shared.h + slice * shared.count + item.h;
    total.each_pair([&](int r, int c, float first, float second) {
        r += row;
        c += col;
        if (r >= item.rows) return;
        float* at = h + static_cast<int64_t>(r) * item.rank + c;
        if (c < item.rank) store(at, first);
        if (c + 1 < item.rank) store(at + 1, second);
    });
}

template <int ROWS>
struct FromParts {
    using T = typename Layout<ROWS>::Tile;
    using H = Part<float, T::m, T::k, Adjacent::kSum>;
    using Basis = Part<float, T::n, T::k, Adjacent::kSum>;
    static constexpr int stage = H::size + Basis::size;
    static constexpr size_t bytes = sizeof(float) * T::stages * stage;
};

// Calls use(row, col, sum) for each entry of a block's tile of H basisᵀ.
template <int ROWS, class Use>
__device__ __forceinline__ void times_basis(const Item& item, const float* h, int block, Use use) {
    using Parts = FromParts<ROWS>;
    using T = typename Parts::T;
    using H = typename Parts::H;
    const int blocks_r = blocks(item.rows, T::m), row = block % blocks_r * T::m, col = block / blocks_r * T::n;
    const View<float> onto(h + item.h, item.rows, item.rank, item.rank);
    const View<float> basis(item.basis, item.width, item.rank, item.stride_basis);
    float* memory = reinterpret_cast<float*>(shared_memory());
    Sums<T> total;
    pipeline<T>(
        blocks(item.rank, T::k),
        [&](int step, int stage) {
            float* to = memory + stage * Parts::stage;
            copy_part<H, T::threads>(to, onto, row, step * T::k);
            copy_part<typename Parts::Basis, T::threads>(to + H::size, basis, col, step * T::k);
        },
        [](int, int) {},
        [&](int, int stage) {
            const float* part = memory + stage * Parts::stage;
            multiply_exactly<T, H, typename Parts::Basis>(total, part, part + H::size);
        });
    total.each_pair([&](int r, int c, float first, float second) {
        r += row;
        c += col;
        if (r < item.rows && c < item.width) use(r, c, first);
        if (r < item.rows && c + 1 < item.width) use(r, c + 1, second);
    });
}

// Entry (row, col) of the projected G, of which H basisᵀ has ``sum``.
template <class E>
__device__ __forceinline__ float projected(const Item& item, bool complement, int row, int col, float sum) {
    if (!complement) return sum;
    return widened(load(static_cast<const E*>(item.g) + static_cast<int64_t>(row) * item.stride_g + col)) - sum;
}

struct Projection : Item {
    void* out;
    int stride_out, out_dtype;
    bool complement;
};

// A tile of OUT = G − H basisᵀ, or H basisᵀ.
template <int ROWS>
__global__ void __launch_bounds__(Layout<ROWS>::Tile::threads, 2)
    from_basis(const __grid_constant__ Group<Projection, Slicing> items) {
    int block;
    const Projection& item = locate(items, block);
    times_basis<ROWS>(item, items.shared.h, block, [&](int r, int c, float sum) {
        with_type(item.dtype, [&](auto entry) { sum = projected<decltype(entry)>(item, item.complement, r, c, sum); });
        with_type(item.out_dtype, [&](auto entry) {
            using E = decltype(entry);
            store(static_cast<E*>(item.out) + static_cast<int64_t>(r) * item.stride_out + c, rounded<E>(sum));
        });
    });
}

struct Update : Item {
    void *param, *exp_avg, *exp_avg_sq;
    const float* step;
    int stride_param, stride_exp_avg, stride_exp_avg_sq;
    bool complement;
};

struct Settings : Slicing {
    float lr, decay, eps, rest1, rest2, log_beta1, log_beta2;  // rest: 1 − beta, which float32 would round
};

// As from_basis, but what AdamW makes of the projected gradient is written, to param and both moments.
template <int ROWS>
__global__ void __launch_bounds__(Layout<ROWS>::Tile::threads, 2)
    adamw_from_basis(const __grid_constant__ Group<Update, Settings> items) {
    const Settings& s = items.shared;
    int block;
    const Update& item = locate(items, block);
    const float step = load(item.step);
    const float step_size = s.lr / -expm1f(step * s.log_beta1), correction = -expm1f(step * s.log_beta2);
    times_basis<ROWS>(item, s.h, block, [&](int r, int c, float sum) {
        with_type(item.dtype, [&](auto entry) {
            using E = decltype(entry);
            const auto at = [&](void* data, int stride) {
                return static_cast<E*>(data) + static_cast<int64_t>(r) * stride + c;
            };
            const float g = projected<E>(item, item.complement, r, c, sum);
            E* exp_avg = at(item.exp_avg, item.stride_exp_avg);
            E* exp_avg_sq = at(item.exp_avg_sq, item.stride_exp_avg_sq);
            E* param = at(item.param, item.stride_param);
            float first = widened(load(exp_avg)), second = widened(load(exp_avg_sq));
            first += s.rest1 * (g - first);
            second += s.rest2 * (g * g - second);
            store(exp_avg, rounded<E>(first));
            store(exp_avg_sq, rounded<E>(second));
            const float change = step_size * first / (sqrtf(second / correction) + s.eps);
            store(param, rounded<E>(s.decay * widened(load(param)) - change));
        });
    });
}

// Runs a kernel's two forms on the items with few rows and with many.
template <class Item, class Shared, class Blocks>
int launch_by_rows(void (*few)(Group<Item, Shared>), void (*many)(Group<Item, Shared>), const std::vector<Item>& items,
                   const Shared& shared, Blocks blocks_of_item, size_t bytes_few, size_t bytes_many, void* stream) {
    using Few = Layout<kFewRows>::Tile;
    using Many = Layout<kManyRows>::Tile;
    const auto of = [&](const Item& item, bool is_few, int rows) -> int64_t {
        return (item.rows <= kFewRows) == is_few ? blocks<int64_t>(item.rows, rows) * blocks_of_item(item) : 0;
    };
    const int error = launch_items(
        few, items, shared, [&](const Item& item) { return of(item, true, Few::m); }, Few::threads, bytes_few, stream);
    if (error) return error;
    return launch_items(
        many, items, shared, [&](const Item& item) { return of(item, false, Many::m); }, Many::threads, bytes_many,
        stream);
}

template <class Any>
int64_t tiles_of(const Any& item, int64_t columns) {
    const int64_t rows = item.rows <= kFewRows ? kFewRows : kManyRows;
    return blocks<int64_t>(item.rows, rows) * blocks<int64_t>(columns, 64);
}

// How H of all items is divided, and where each begins.
template <class Any>
Slicing sliced(const Any* items, int64_t count, float* workspace) {
    Slicing slicing{workspace, 0, 1};
    int64_t tiles = 0, steps = 1;
    for (int64_t i = 0; i < count; ++i) {
        slicing.count += blocks<int64_t>(items[i].rows * items[i].rank, 16) * 16;
        tiles += tiles_of(items[i], items[i].rank);
        steps = std::max(steps, blocks<int64_t>(items[i].width, 32));
    }
    const int64_t most = std::min({kMostSlices, steps, kBlocks / std::max<int64_t>(tiles, 1)});
    slicing.slices = static_cast<int>(std::max<int64_t>(most, 1));
    return slicing;
}

// H of all items.
int onto_bases(const std::vector<Item>& items, const Slicing& slicing, void* stream) {
    const auto count = [&](const Item& item) { return blocks<int64_t>(item.rank, 64) * slicing.slices; };
    const int error = launch_by_rows(onto_basis<kFewRows>, onto_basis<kManyRows>, items, slicing, count,
                                     OntoParts<kFewRows>::bytes, OntoParts<kManyRows>::bytes, stream);
    if (error || slicing.slices == 1) return error;
    return add_all({{slicing.h, slicing.h, slicing.count, slicing.slices, GUARDSPACE_FLOAT32, 0}}, stream);
}

int project(const std::vector<Projection>& items, const Slicing& slicing, void* stream) {
    const int error = onto_bases({items.begin(), items.end()}, slicing, stream);
    if (error) return error;
    const auto count = [](const Projection& item) { return blocks<int64_t>(item.width, 64); };
    return launch_by_rows(from_basis<kFewRows>, from_basis<kManyRows>, items, slicing, count,
                          FromParts<kFewRows>::bytes, FromParts<kManyRows>::bytes, stream);
}

// What both calls have in common.
template <class Any>
Item item_of(const Any& from, const void* g, int64_t stride_g, int64_t dtype, int64_t& h) {
    const Item item{g,
                    from.basis,
                    h,
                    static_cast<int>(from.rows),
                    static_cast<int>(from.width),
                    static_cast<int>(from.rank),
                    static_cast<int>(stride_g),
                    static_cast<int>(from.stride_basis),
                    static_cast<int>(dtype),
                    0};
    h += blocks<int64_t>(from.rows * from.rank, 16) * 16;
    return item;
}

int check(const guardspace_null_projection* items, int64_t count) {
    const char* call = "null_project";
    for (int64_t i = 0; i < count; ++i) {
        const auto& p = items[i];
        int error = check_dtype(call, i, p.dtype);
        if (!error) error = check_dtype(call, i, p.out_dtype);
        if (!error) error = check_matrix(call, i, "g", p.g, p.rows, p.width, p.stride_g, entry_bytes(p.dtype));
        if (!error) error = check_matrix(call, i, "basis", p.basis, p.width, p.rank, p.stride_basis, 4);
        if (!error) {
            error =
                check_matrix(call, i, "out", p.out, p.rows, p.width, p.stride_out, entry_bytes(p.out_dtype), p.width);
        }
        if (error) return error;
    }
    return 0;
}

int check(const guardspace_projected_adamw* items, int64_t count) {
    const char* call = "projected_adamw";
    for (int64_t i = 0; i < count; ++i) {
        const auto& u = items[i];
        int error = check_dtype(call, i, u.dtype);
        const auto matrix = [&](const char* name, const void* data, int64_t stride, int64_t least) {
            if (!error) error = check_matrix(call, i, name, data, u.rows, u.width, stride, entry_bytes(u.dtype), least);
        };
        matrix("param", u.param, u.stride_param, u.width);
        matrix("grad", u.grad, u.stride_grad, 0);
        matrix("exp_avg", u.exp_avg, u.stride_exp_avg, u.width);
        matrix("exp_avg_sq", u.exp_avg_sq, u.stride_exp_avg_sq, u.width);
        if (!error) error = check_matrix(call, i, "basis", u.basis, u.width, u.rank, u.stride_basis, 4);
        if (!error) error = check_matrix(call, i, "step", u.step, 1, 1, 1, 4);
        if (error) return error;
    }
    return 0;
}

template <class Any>
int64_t workspace_bytes_of(const Any* items, int64_t count) {
    if (check(items, count) != 0) return -1;
    const Slicing slicing = sliced(items, count, nullptr);
    return 4 * slicing.count * slicing.slices;
}

template <class Any>
int check_all(const char* call, const Any* items, int64_t count, const void* workspace, int64_t bytes) {
    const int64_t needed = workspace_bytes_of(items, count);
    if (needed < 0) return static_cast<int>(needed);
    if (bytes >= needed && (needed == 0 || workspace != nullptr)) return 0;
    return wrong("%s: workspace has %lld bytes at %p, %lld were expected", call, static_cast<long long>(bytes),
                 workspace, static_cast<long long>(needed));
}

}  // namespace
}  // namespace guardspace

using namespace guardspace;

int64_t guardspace_cuda_null_project_workspace(const guardspace_null_projection* items, int64_t count) {
    return workspace_bytes_of(items, count);
}

int guardspace_cuda_null_project(const guardspace_null_projection* items, int64_t count, void* workspace,
                                 int64_t workspace_bytes, void* stream) {
    const int error = check_all("null_project", items, count, workspace, workspace_bytes);
    if (error) return error;
    std::vector<Projection> projections;
    int64_t h = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto& p = items[i];
        projections.push_back({item_of(p, p.g, p.stride_g, p.dtype, h), p.out, static_cast<int>(p.stride_out),
                               static_cast<int>(p.out_dtype), p.complement != 0});
    }
    return project(projections, sliced(items, count, static_cast<float*>(workspace)), stream);
}

int64_t guardspace_cuda_projected_adamw_workspace(const guardspace_projected_adamw* items, int64_t count) {
    return workspace_bytes_of(items, count);
}

int guardspace_cuda_projected_adamw(const guardspace_projected_adamw* items, int64_t count, double lr, double beta1,
                                    double beta2, double eps, double weight_decay, void* workspace,
                                    int64_t workspace_bytes, void* stream) {
    int error = check_all("projected_adamw", items, count, workspace, workspace_bytes);
    if (error) return error;
    std::vector<Item> gradients;
    std::vector<Update> updates;
    std::vector<Projection> params;
    int64_t h = 0;
    for (int64_t i = 0; i < count; ++i) {
        const auto& u = items[i];
        const bool complement = u.complement != 0;
        Item item = item_of(u, u.grad, u.stride_grad, u.dtype, h);
        gradients.push_back(item);
        const int stride = static_cast<int>(u.stride_param);
        updates.push_back({item, u.param, u.exp_avg, u.exp_avg_sq, u.step, stride, static_cast<int>(u.stride_exp_avg),
                           static_cast<int>(u.stride_exp_avg_sq), complement});
        item.g = u.param;
        item.stride_g = stride;
        params.push_back({item, u.param, stride, item.dtype, complement});
    }
    const Slicing slicing = sliced(items, count, static_cast<float*>(workspace));
    error = onto_bases(gradients, slicing, stream);
    if (error) return error;
    const Settings settings{slicing,
                            static_cast<float>(lr),
                            static_cast<float>(1 - lr * weight_decay),
                            static_cast<float>(eps),
                            static_cast<float>(1 - beta1),
                            static_cast<float>(1 - beta2),
                            static_cast<float>(std::log(beta1)),
                            static_cast<float>(std::log(beta2))};
    const auto columns = [](const Update& item) { return blocks<int64_t>(item.width, 64); };
    error = launch_by_rows(adamw_from_basis<kFewRows>, adamw_from_basis<kManyRows>, updates, settings, columns,
                           FromParts<kFewRows>::bytes, FromParts<kManyRows>::bytes, stream);
    return error ? error : project(params, slicing, stream);
}
