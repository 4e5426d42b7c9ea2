// A packed expert as an operation of XLA on the CPU: y [tokens, rows] = x [tokens, columns] times a packed matrix.
//
// An expert is opened once and gets a number; compiled programs hold that number and the projection's as attributes.
// A number that is not, or no longer, open is an error of the program, not a wild pointer. While a product runs the
// expert stays open, whoever closes it meanwhile.
#include <cstdint>
#include <memory>
#include <mutex>
#include <qmoe.h>
#include <string>
#include <unordered_map>

#include "xla/ffi/api/ffi.h"

namespace ffi = xla::ffi;

namespace {

struct Expert {
    qmoe_model *model = nullptr;
    qmoe_expert *expert = nullptr;
    ~Expert() {
        qmoe_expert_close(expert);
        qmoe_model_close(model);
    }
};

std::mutex guard;
std::unordered_map<std::int64_t, std::shared_ptr<const Expert>> experts;
std::int64_t last_number = 0;

std::shared_ptr<const Expert> find(std::int64_t number) {
    const std::lock_guard<std::mutex> lock(guard);
    const auto found = experts.find(number);
    return found == experts.end() ? nullptr : found->second;
}

ffi::Error product(std::int64_t number, std::int64_t projection, std::int64_t threads, ffi::AnyBuffer x,
                   ffi::ResultBuffer<ffi::F32> y) {
    const std::shared_ptr<const Expert> opened = find(number);
    const qmoe_matrix *matrix =
        opened && projection >= 0 && projection < 3
            ? qmoe_expert_matrix(opened->expert, static_cast<std::uint32_t>(projection))
            : nullptr;
    if (!matrix) {
        return ffi::Error::InvalidArgument("qmoe: no such open expert, or no such projection");
    }
    qmoe_dtype dtype;
    switch (x.element_type()) {
    case ffi::F32:
        dtype = QMOE_FLOAT32;
        break;
    case ffi::BF16:
        dtype = QMOE_BFLOAT16;
        break;
    case ffi::F16:
        dtype = QMOE_FLOAT16;
        break;
    default:
        return ffi::Error::InvalidArgument("qmoe: x must be float32, bfloat16 or float16");
    }
    const auto from = x.dimensions(), to = y->dimensions();
    if (from.size() != 2 || to.size() != 2 || from[0] != to[0] || from[1] != qmoe_matrix_columns(matrix) ||
        to[1] != qmoe_matrix_rows(matrix) || threads < 1 || threads > 256) {
        return ffi::Error::InvalidArgument("qmoe: shapes are not those of x [tokens, columns] and y [tokens, rows]");
    }
    qmoe_error error;
    if (qmoe_matrix_matmul(matrix, x.untyped_data(), dtype, static_cast<std::uint64_t>(from[0]), y->typed_data(),
                           static_cast<unsigned>(threads), &error) != QMOE_OK) {
        char message[QMOE_MESSAGE_SIZE];
        return ffi::Error::Internal(qmoe_error_message(&error, message, sizeof message));
    }
    return ffi::Error::Success();
}

}  // namespace

extern "C" {

#define EXPORTED __attribute__((visibility("default")))

// The number of a newly opened expert, or 0 with `message` [QMOE_MESSAGE_SIZE] filled in.
EXPORTED std::int64_t qmoe_jax_open(const char *path, const char *prefix, std::uint32_t number, char *message) {
    auto opened = std::make_shared<Expert>();
    qmoe_error error;
    std::size_t layer = 0;
    if (qmoe_model_open(path, 0, 0, &opened->model, &error) != QMOE_OK ||
        qmoe_model_find_layer(opened->model, prefix, &layer, &error) != QMOE_OK ||
        qmoe_expert_open(opened->model, layer, number, 0, &opened->expert, &error) != QMOE_OK) {
        qmoe_error_message(&error, message, QMOE_MESSAGE_SIZE);
        return 0;
    }
    const std::lock_guard<std::mutex> lock(guard);
    experts.emplace(++last_number, std::move(opened));
    return last_number;
}

// Role, rows and columns of a projection of an open expert; false if there is none. `role` has room for 8 bytes.
EXPORTED bool qmoe_jax_projection(const char *prefix, std::int64_t number, std::uint32_t projection, char *role,
                                  std::uint32_t *rows, std::uint32_t *columns) {
    const std::shared_ptr<const Expert> opened = find(number);
    std::size_t layer = 0;
    qmoe_projection_info info;
    if (!opened || qmoe_model_find_layer(opened->model, prefix, &layer, nullptr) != QMOE_OK ||
        qmoe_model_projection(opened->model, layer, projection, &info, nullptr) != QMOE_OK) {
        return false;
    }
    role[std::string(info.role).copy(role, 7)] = 0;
    *rows = info.rows;
    *columns = info.columns;
    return true;
}

EXPORTED void qmoe_jax_close(std::int64_t number) {
    const std::lock_guard<std::mutex> lock(guard);
    experts.erase(number);
}

#pragma GCC visibility push(default)
XLA_FFI_DEFINE_HANDLER_SYMBOL(qmoe_jax_product, product,
                              ffi::Ffi::Bind()
                                  .Attr<std::int64_t>("expert")
                                  .Attr<std::int64_t>("projection")
                                  .Attr<std::int64_t>("threads")
                                  .Arg<ffi::AnyBuffer>()
                                  .Ret<ffi::Buffer<ffi::F32>>());
#pragma GCC visibility pop

}  // extern "C"
