/*
 * Runs one expert of a packed model, which stays packed:
 *
 *     run_expert MODEL LAYER EXPERT
 *
 * MODEL is the directory of a packed model, LAYER a layer's prefix, such as model.layers.0.mlp.experts. Prints
 * y = down(silu(gate(x)) * up(x)), or down(silu(up(x))) without a gate, for x[i] = ((37 * i + 11) mod 101 - 50) / 64.
 */
#include <math.h>
#include <qmoe.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

enum { THREADS = 2 };

static int fail(const qmoe_error *error) {
    char message[QMOE_MESSAGE_SIZE];
    fprintf(stderr, "run_expert: %s\n", qmoe_error_message(error, message, sizeof message));
    return 1;
}

static float silu(float value) { return value / (1.0f + expf(-value)); }

/* The expert's matrix for a role, or NULL. */
static const qmoe_matrix *matrix_for(const qmoe_model *model, size_t layer, const qmoe_expert *expert,
                                     const char *role) {
    qmoe_projection_info info;
    for (uint32_t i = 0; qmoe_expert_matrix(expert, i); i++) {
        if (qmoe_model_projection(model, layer, i, &info, NULL) == QMOE_OK && strcmp(info.role, role) == 0) {
            return qmoe_expert_matrix(expert, i);
        }
    }
    return NULL;
}

static int run(const qmoe_model *model, size_t layer, const qmoe_expert *expert) {
    const qmoe_matrix *gate = matrix_for(model, layer, expert, "gate"), *up = matrix_for(model, layer, expert, "up"),
                      *down = matrix_for(model, layer, expert, "down");
    if (!up || !down || qmoe_matrix_columns(down) != qmoe_matrix_rows(up) ||
        (gate && (qmoe_matrix_rows(gate) != qmoe_matrix_rows(up) ||
                  qmoe_matrix_columns(gate) != qmoe_matrix_columns(up)))) {
        fprintf(stderr, "run_expert: not an expert of the form down(act(gate(x)) * up(x))\n");
        return 1;
    }
    size_t inputs = qmoe_matrix_columns(up), inner = qmoe_matrix_rows(up), outputs = qmoe_matrix_rows(down);
    float *x = malloc((inputs + 2 * inner + outputs + 1) * sizeof *x);
    if (!x) {
        fprintf(stderr, "run_expert: not enough memory\n");
        return 1;
    }
    float *h = x + inputs, *g = h + inner, *y = g + inner;
    qmoe_error error;
    for (size_t i = 0; i < inputs; i++) {
        x[i] = (float)((int)((37 * i + 11) % 101) - 50) / 64.0f;
    }
    if (qmoe_matrix_matmul(up, x, QMOE_FLOAT32, 1, h, THREADS, &error) != QMOE_OK ||
        (gate && qmoe_matrix_matmul(gate, x, QMOE_FLOAT32, 1, g, THREADS, &error) != QMOE_OK)) {
        free(x);
        return fail(&error);
    }
    for (size_t i = 0; i < inner; i++) {
        h[i] = gate ? silu(g[i]) * h[i] : silu(h[i]);
    }
    if (qmoe_matrix_matmul(down, h, QMOE_FLOAT32, 1, y, THREADS, &error) != QMOE_OK) {
        free(x);
        return fail(&error);
    }
    for (size_t i = 0; i < outputs; i++) {
        printf("%.9g\n", (double)y[i]);
    }
    free(x);
    return 0;
}

int main(int argument_count, char **arguments) {
    char *end = "";
    unsigned long number = argument_count == 4 ? strtoul(arguments[3], &end, 10) : 0;
    if (argument_count != 4 || *end || end == arguments[3] || number > UINT32_MAX) {
        fprintf(stderr, "usage: run_expert MODEL LAYER EXPERT\n");
        return 2;
    }
    qmoe_error error;
    qmoe_model *model;
    if (qmoe_model_open(arguments[1], 0, 0, &model, &error) != QMOE_OK) {
        return fail(&error);
    }
    size_t layer;
    qmoe_expert *expert;
    int result;
    if (qmoe_model_find_layer(model, arguments[2], &layer, &error) != QMOE_OK ||
        qmoe_expert_open(model, layer, (uint32_t)number, 0, &expert, &error) != QMOE_OK) {
        result = fail(&error);
    } else {
        result = run(model, layer, expert);
        qmoe_expert_close(expert);
    }
    qmoe_model_close(model);
    return result;
}
