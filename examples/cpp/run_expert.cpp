// Runs one expert of a packed model, as ../c/run_expert.c does, with what C++ has for owners and errors:
//
//     run_expert MODEL LAYER EXPERT
#include <cmath>
#include <cstdlib>
#include <iostream>
#include <limits>
#include <memory>
#include <qmoe.h>
#include <stdexcept>
#include <string>
#include <vector>

namespace {

template <auto close>
struct Closer {
    template <typename T>
    void operator()(T *object) const { close(object); }
};
using Model = std::unique_ptr<qmoe_model, Closer<qmoe_model_close>>;
using Expert = std::unique_ptr<qmoe_expert, Closer<qmoe_expert_close>>;

// Calls a function of the library with an error behind its arguments; a status that is not QMOE_OK is thrown.
template <typename Function, typename... Arguments>
void call(Function function, Arguments... arguments) {
    qmoe_error error;
    if (function(arguments..., &error) != QMOE_OK) {
        char message[QMOE_MESSAGE_SIZE];
        throw std::runtime_error(qmoe_error_message(&error, message, sizeof message));
    }
}

std::vector<float> product(const qmoe_matrix *matrix, const std::vector<float> &x) {
    if (x.size() != qmoe_matrix_columns(matrix)) {
        throw std::runtime_error("the matrices do not fit each other");
    }
    std::vector<float> y(qmoe_matrix_rows(matrix));
    call(qmoe_matrix_matmul, matrix, x.data(), QMOE_FLOAT32, std::uint64_t{1}, y.data(), 2u);
    return y;
}

float silu(float value) { return value / (1.0f + std::exp(-value)); }

void run(const std::string &path, const std::string &prefix, std::uint32_t number) {
    qmoe_model *opened_model = nullptr;
    call(qmoe_model_open, path.c_str(), 0u, std::uint64_t{0}, &opened_model);
    const Model model(opened_model);
    std::size_t layer = 0;
    call(qmoe_model_find_layer, model.get(), prefix.c_str(), &layer);
    qmoe_expert *opened_expert = nullptr;
    call(qmoe_expert_open, model.get(), layer, number, 0u, &opened_expert);
    const Expert expert(opened_expert);

    const qmoe_matrix *gate = nullptr, *up = nullptr, *down = nullptr;
    for (std::uint32_t i = 0; const qmoe_matrix *matrix = qmoe_expert_matrix(expert.get(), i); i++) {
        qmoe_projection_info info;
        call(qmoe_model_projection, model.get(), layer, i, &info);
        const std::string role = info.role;
        (role == "gate" ? gate : role == "up" ? up : down) = matrix;
    }
    if (!up || !down) {
        throw std::runtime_error("not an expert of the form down(act(gate(x)) * up(x))");
    }
    std::vector<float> x(qmoe_matrix_columns(up));
    for (std::size_t i = 0; i < x.size(); i++) {
        x[i] = static_cast<float>(static_cast<int>((37 * i + 11) % 101) - 50) / 64.0f;
    }
    std::vector<float> h = product(up, x), g = gate ? product(gate, x) : h;
    if (g.size() != h.size()) {
        throw std::runtime_error("the matrices do not fit each other");
    }
    for (std::size_t i = 0; i < h.size(); i++) {
        h[i] = gate ? silu(g[i]) * h[i] : silu(h[i]);
    }
    std::cout.precision(std::numeric_limits<float>::max_digits10);
    for (float value : product(down, h)) {
        std::cout << value << '\n';
    }
}

}  // namespace

int main(int argument_count, char **arguments) {
    char *end = nullptr;
    const unsigned long number = argument_count == 4 ? std::strtoul(arguments[3], &end, 10) : 0;
    if (argument_count != 4 || end == arguments[3] || *end || number > std::numeric_limits<std::uint32_t>::max()) {
        std::cerr << "usage: run_expert MODEL LAYER EXPERT\n";
        return 2;
    }
    try {
        run(arguments[1], arguments[2], static_cast<std::uint32_t>(number));
    } catch (const std::exception &error) {
        std::cerr << "run_expert: " << error.what() << '\n';
        return 1;
    }
    return 0;
}
