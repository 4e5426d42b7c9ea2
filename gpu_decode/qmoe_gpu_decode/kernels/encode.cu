// Encode matrices (spec 4.3, encoding a row): a thread a row, twice: first it counts its codewords, then, when it is
// known where each row begins, it writes them. The bytes are those that the CPU writes.
//
//     count_rows   codewords of each row, and what is wrong with trits or levels
//     index_rows   where each row begins; the least and the most codewords, and their sum
//     clear        the frame: header, zeros
//     write_rows   levels, row index and codewords;  write_raw: the trits of the raw codec, a thread a byte
//     checksum     CRC-32C of the body, a thread a piece;  seal: the header
#include "common.cuh"

constexpr u32 BLOCK_ROWS = 32, LEVELS_START = 64, HEADER_CRC = 60, BODY_CRC = 56;
constexpr u32 KIND_TREES = 1;
constexpr u32 LEVELS_FLOAT32 = 0, LEVELS_BFLOAT16 = 1, LEVELS_FLOAT16 = 2;

// Faults, as a set of bits.
constexpr u32 BAD_TRITS = 1, BAD_LEVELS = 2, NO_PHRASE = 4, BAD_SELECTOR = 8;

// A node of the parse trees in preorder, the child for 0 first: the node that z zeros lead to from node n is n + z,
// for z <= zeros of n. x: its codeword or 0xffffffff; y, z: the children for +1 and -1 or 0; w: zeros.
typedef uint4 Node;
constexpr u32 NO_CODEWORD = 0xffffffffu;

struct alignas(16) Tree {
    u32 first, root, threshold, kind; // first: of its nodes in the array of all; root: of T1, counted from first
};

struct Summary {
    u32 least, most, total_low, total_high, faults, top_exponent, unused[2];
};

// The non-zeros of a row, one after the other.
struct Trits {
    const u8 *row;
    u32 columns, faults;

    // Trits `first` … as bytes of four words; those behind the row's end are zero.
    __device__ uint4 sixteen(u32 first) const {
        if (first + 16 <= columns && (u64)(size_t)(row + first) % 16 == 0) {
            return load<uint4>(row + first);
        }
        u32 words[4] = {0, 0, 0, 0};
#pragma unroll
        for (u32 i = 0; i < 16; i++) {
            words[i / 4] |= first + i < columns ? (u32)row[first + i] << (8 * (i % 4)) : 0u;
        }
        return make_uint4(words[0], words[1], words[2], words[3]);
    }

    __device__ u32 at(u32 column) { // 0, 1 or 2 for 0, +1, -1
        u32 trit = column < columns ? row[column] : 0;
        faults |= trit < 2 || trit == 0xff ? 0 : BAD_TRITS;
        return trit == 0 ? 0 : trit == 1 ? 1 : 2;
    }
};

// Codewords along a pair of trees: a node has a codeword or is complete, so the walk never turns back.
template <class Emit> __device__ inline void encode_trees(Trits &trits, const Node *nodes, const Tree &tree, Emit &emit) {
    u32 node = 0, column = 0;
    for (u32 first = 0; first < trits.columns; first += 16) {
        const uint4 sixteen = trits.sixteen(first);
#pragma unroll
        for (u32 part = 0; part < 4; part++) {
            u32 four = part == 0 ? sixteen.x : part == 1 ? sixteen.y : part == 2 ? sixteen.z : sixteen.w;
            while (four) {
                const u32 byte = (31 - __clz(four & (0u - four))) / 8, trit = four >> (8 * byte) & 0xff;
                four &= ~(0xffu << (8 * byte));
                trits.faults |= trit == 1 || trit == 0xff ? 0 : BAD_TRITS;
                const u32 place = first + 4 * part + byte;
                u32 run = place - column;
                column = place + 1;
                Node at = nodes[node];
                while (run > at.w) { // to the leaf at the end of the zeros, and on from T0's root
                    if (at.w == 0) {
                        trits.faults |= NO_PHRASE;
                        return;
                    }
                    emit(nodes[node + at.w].x);
                    run -= at.w;
                    node = 0;
                    at = nodes[0];
                }
                node += run;
                at = nodes[node];
                if (at.x != NO_CODEWORD) { // a non-zero ends this phrase and begins the next
                    emit(at.x);
                    at = nodes[at.x >= tree.threshold ? tree.root : 0];
                }
                node = trit == 1 ? at.y : at.z;
                at = nodes[node];
                if (node == 0) {
                    trits.faults |= NO_PHRASE;
                    return;
                }
                if (at.w == 0 && at.x != NO_CODEWORD) {
                    emit(at.x);
                    node = 0;
                }
            }
        }
    }
    if (node) { // finish the phrase, with zeros if need be
        for (u32 left = nodes[node].w; nodes[node].x == NO_CODEWORD && left; left--) {
            node++;
        }
        if (nodes[node].x == NO_CODEWORD) {
            trits.faults |= NO_PHRASE;
            return;
        }
        emit(nodes[node].x);
    }
}

// Codewords by a table: the longest phrase that matches, zeros behind the row's end included.
template <class Emit> __device__ inline void encode_table(Trits &trits, const Node *nodes, Emit &emit) {
    u32 end = trits.columns, column = 0;
    while (end && trits.at(end - 1) == 0) {
        end--;
    }
    while (column < end) {
        u32 node = 0, length = 0, best = NO_CODEWORD, best_length = 0;
        for (;;) {
            const u32 trit = trits.at(column + length);
            const Node at = nodes[node];
            const u32 child = trit == 0 ? (at.w ? node + 1 : 0) : trit == 1 ? at.y : at.z;
            if (!child) {
                break;
            }
            node = child;
            length++;
            if (nodes[node].x != NO_CODEWORD) {
                best = nodes[node].x;
                best_length = length;
            }
        }
        if (best == NO_CODEWORD) {
            trits.faults |= NO_PHRASE;
            return;
        }
        emit(best);
        column += best_length;
    }
}

template <class Emit>
__device__ inline u32 encode_row(const u8 *trits, u32 columns, const Tree &tree, const Node *all_nodes, Emit &emit) {
    Trits row = {trits, columns, 0};
    if (tree.kind == KIND_TREES) {
        encode_trees(row, all_nodes + tree.first, tree, emit);
    } else {
        encode_table(row, all_nodes + tree.first, emit);
    }
    return row.faults;
}

// ---- levels (spec 4.1) ----

// Nearest e4m4 without its exponent's base: magnitude = steps / 16 * 2^exponent, steps 16 … 31, or 0.
__device__ inline u32 split_e4m4(u32 bits, i32 &exponent) {
    u32 magnitude = bits & 0x7fffffff;
    exponent = (i32)(magnitude >> 23) - 127;
    u32 fraction = magnitude & 0x7fffff;
    if (magnitude < 0x800000) { // zero, or too small for a normal float
        if (!magnitude) {
            return 0;
        }
        u32 shift = (u32)__clz(magnitude) - 8;
        exponent = -126 - (i32)shift;
        fraction = magnitude << shift & 0x7fffff;
    }
    u32 steps = 16 + (fraction >> 19), rest = fraction & 0x7ffff;
    steps += rest > 0x40000 || (rest == 0x40000 && (steps & 1)) ? 1 : 0; // ties to even
    if (steps == 32) {
        exponent++;
        return 16;
    }
    return steps;
}

__device__ inline u32 to_e4m4(u32 bits, i32 level_exponent) {
    i32 exponent;
    u32 steps = split_e4m4(bits, exponent);
    exponent -= level_exponent;
    exponent = exponent > 15 ? 15 : exponent;
    i32 byte = exponent * 16 + (i32)steps - 16;
    return steps && exponent >= 0 && byte > 0 ? (u32)byte : 0;
}

// Whether `format` can hold a level; sides: 0 low, 1 high.
__device__ inline bool legal_level(u32 bits, u32 side, u32 format) {
    u32 magnitude = bits & 0x7fffffff;
    bool finite = magnitude < 0x7f800000;
    if (format == LEVELS_FLOAT32) {
        return finite;
    }
    if (format == LEVELS_BFLOAT16) { // what is rounded up to infinity is not
        return finite && (float_to_bfloat16(__uint_as_float(bits)) & 0x7fff) < 0x7f80;
    }
    if (format == LEVELS_FLOAT16) {
        return magnitude < 0x477ff000; // 65520, which would become infinity
    }
    return finite && (magnitude == 0 || (bits >> 31) == (side == 0 ? 1u : 0u));
}

// ---- kernels ----

extern "C" __global__ void __launch_bounds__(64)
    count_rows(const u8 *trits, const float *levels, u32 rows, u32 columns, const Tree *trees, u32 dictionary_count,
               const Node *nodes, const u8 *selectors, u32 level_format, u32 *counts, Summary *summary) {
    const u64 row = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) {
        return;
    }
    u32 faults = 0;
    for (u32 side = 0; side < 2; side++) {
        u32 bits = __float_as_uint(levels[2 * row + side]);
        faults |= legal_level(bits, side, level_format) ? 0 : BAD_LEVELS;
        i32 exponent;
        if (split_e4m4(bits, exponent)) {
            atomicMax(&summary->top_exponent, (u32)(exponent + 256));
        }
    }
    if (dictionary_count) {
        u32 selector = dictionary_count > 1 ? selectors[row] : 0, count = 0;
        if (selector < dictionary_count) {
            auto emit = [&](u32) { count++; };
            faults |= encode_row(trits + row * columns, columns, trees[selector], nodes, emit);
        } else {
            faults |= BAD_SELECTOR;
        }
        counts[row] = count;
        atomicMin(&summary->least, count);
        atomicMax(&summary->most, count);
    }
    if (faults) {
        atomicOr(&summary->faults, faults);
    }
}

// One block.
extern "C" __global__ void __launch_bounds__(1024)
    index_rows(const u32 *counts, u32 rows, u32 *starts, Summary *summary) {
    __shared__ u32 ends[WARP];
    const u32 lane = threadIdx.x % WARP, warp = threadIdx.x / WARP, warps = blockDim.x / WARP;
    u64 before = 0;
    for (u64 first = 0; first < rows; first += blockDim.x) {
        u64 row = first + threadIdx.x;
        u32 count = row < rows ? counts[row] : 0, end = warp_scan(count, lane);
        if (lane == WARP - 1) {
            ends[warp] = end;
        }
        __syncthreads();
        u64 start = before + end - count;
        for (u32 w = 0; w < warps; w++) {
            start += w < warp ? ends[w] : 0;
            before += ends[w];
        }
        if (row < rows) {
            starts[row] = (u32)start;
        }
        __syncthreads();
    }
    if (threadIdx.x == 0) {
        summary->total_low = (u32)before;
        summary->total_high = (u32)(before >> 32);
    }
}

// Bits at the end of what others write too go in by atomicOr; the frame is zero before.
__device__ inline void put_bits(u8 *array, u64 bit, u32 value, u32 width) {
    u32 *word = (u32 *)(void *)array + (bit >> 5);
    u32 shift = (u32)bit & 31;
    if (value) {
        atomicOr(word, value << shift);
        if (shift + width > 32) {
            atomicOr(word + 1, value >> (32 - shift));
        }
    }
}

struct Writer {
    u32 *word;
    u64 waiting;
    u32 filled, shared; // shared: the first word has bits of the row before

    __device__ void put(u32 value, u32 width) {
        waiting |= (u64)value << filled;
        filled += width;
        if (filled >= 32) {
            if (shared) {
                atomicOr(word, (u32)waiting);
                shared = 0;
            } else {
                *word = (u32)waiting;
            }
            word++;
            waiting >>= 32;
            filled -= 32;
        }
    }
};

// The frame before anything is written to it: `header` (64 bytes), then zeros.
extern "C" __global__ void __launch_bounds__(256)
    clear(u8 *frame, u64 size, const u8 *header) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < size / 16; i += step) {
        store<uint4>(frame + 16 * i, i < 4 ? load<uint4>(header + 16 * i) : make_uint4(0, 0, 0, 0));
    }
}

extern "C" __global__ void __launch_bounds__(64)
    write_rows(const u8 *trits, const float *levels, u32 rows, u32 columns, const Tree *trees, u32 dictionary_count,
               const Node *nodes, const u8 *selectors, u32 level_format, i32 level_exponent, const u32 *starts,
               const u32 *counts, u8 *frame, u64 row_index_start, u64 counts_start, u64 selectors_start,
               u64 codewords_start, u32 bits, u32 count_bits, u32 count_minimum, u32 selector_bits) {
    const u64 row = (u64)blockIdx.x * blockDim.x + threadIdx.x;
    if (row >= rows) {
        return;
    }
    const u32 low = __float_as_uint(levels[2 * row]), high = __float_as_uint(levels[2 * row + 1]);
    u8 *at = frame + LEVELS_START;
    if (level_format == LEVELS_FLOAT32) {
        store<uint2>(at + 8 * row, make_uint2(low, high));
    } else if (level_format == LEVELS_BFLOAT16) {
        store<u32>(at + 4 * row,
                   float_to_bfloat16(__uint_as_float(low)) | float_to_bfloat16(__uint_as_float(high)) << 16);
    } else if (level_format == LEVELS_FLOAT16) {
        store<u32>(at + 4 * row,
                   float_to_float16(__uint_as_float(low)) | float_to_float16(__uint_as_float(high)) << 16);
    } else {
        store<u16>(at + 2 * row, (u16)(to_e4m4(low, level_exponent) | to_e4m4(high, level_exponent) << 8));
    }
    if (!dictionary_count) {
        return;
    }
    if (row % BLOCK_ROWS == 0) {
        store<u32>(frame + row_index_start + row / BLOCK_ROWS * 4, starts[row]);
    }
    put_bits(frame + counts_start, row * count_bits, counts[row] - count_minimum, count_bits);
    const u32 selector = dictionary_count > 1 ? selectors[row] : 0;
    put_bits(frame + selectors_start, row * selector_bits, selector, selector_bits);
    const u64 bit = (u64)starts[row] * bits;
    Writer writer = {(u32 *)(void *)(frame + codewords_start) + (bit >> 5), 0, (u32)bit & 31, ((u32)bit & 31) != 0};
    auto emit = [&](u32 codeword) { writer.put(codeword, bits); };
    encode_row(trits + row * columns, columns, trees[selector], nodes, emit);
    if (writer.waiting) {
        atomicOr(writer.word, (u32)writer.waiting);
    }
}

extern "C" __global__ void __launch_bounds__(256)
    write_raw(const u8 *trits, u64 weights, u8 *out, Summary *summary) {
    const u64 step = (u64)gridDim.x * blockDim.x;
    for (u64 i = (u64)blockIdx.x * blockDim.x + threadIdx.x; i < (weights + 4) / 5; i += step) {
        u32 byte = 0, power = 1;
        for (u64 trit = 5 * i; trit < 5 * i + 5 && trit < weights; trit++, power *= 3) {
            u32 digit = (trits[trit] + 1u) & 0xff;
            if (digit > 2) {
                atomicOr(&summary->faults, BAD_TRITS);
            }
            byte += digit * power;
        }
        out[i] = (u8)byte;
    }
}

// ---- CRC-32C ----

constexpr u32 POLYNOMIAL = 0x82f63b78u, PIECE = 512;

// a * b modulo the polynomial, bits reflected: bit 31 is x^0.
__device__ inline u32 multiply_polynomials(u32 a, u32 b) {
    u32 product = 0;
    for (u32 bit = 1u << 31; bit; bit >>= 1) {
        product ^= a & bit ? b : 0;
        b = b & 1 ? b >> 1 ^ POLYNOMIAL : b >> 1;
    }
    return product;
}

// powers[k] = x^(8 * 2^k). The sum of all pieces' remainders comes to frame[56 …].
extern "C" __global__ void __launch_bounds__(256)
    checksum(u8 *frame, u64 size, const u32 *powers) {
    __shared__ u32 table[256];
    for (u32 i = threadIdx.x; i < 256; i += blockDim.x) {
        u32 value = i;
        for (u32 k = 0; k < 8; k++) {
            value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
        }
        table[i] = value;
    }
    __syncthreads();
    const u64 first = LEVELS_START + ((u64)blockIdx.x * blockDim.x + threadIdx.x) * PIECE;
    if (first >= size) {
        return;
    }
    const u64 end = first + PIECE < size ? first + PIECE : size;
    u32 value = 0;
    for (u64 at = first; at < end; at += 4) { // frames are multiples of 16 bytes
        u32 word = load<u32>(frame + at);
        for (u32 k = 0; k < 4; k++, word >>= 8) {
            value = value >> 8 ^ table[(value ^ word) & 0xff];
        }
    }
    u64 after = size - end;
    for (u32 k = 0; after; k++, after >>= 1) {
        value = after & 1 ? multiply_polynomials(value, powers[k]) : value;
    }
    atomicXor((u32 *)(void *)(frame + BODY_CRC), value);
}

// One warp. `constant`: what the checksum's beginning and end add for a body of this size.
extern "C" __global__ void __launch_bounds__(32) seal(u8 *frame, u32 constant) {
    if (threadIdx.x) {
        return;
    }
    store<u32>(frame + BODY_CRC, load<u32>(frame + BODY_CRC) ^ constant);
    u32 value = 0xffffffffu;
    for (u32 at = 0; at < HEADER_CRC; at++) {
        value ^= frame[at];
        for (u32 k = 0; k < 8; k++) {
            value = value & 1 ? value >> 1 ^ POLYNOMIAL : value >> 1;
        }
    }
    store<u32>(frame + HEADER_CRC, ~value);
}
