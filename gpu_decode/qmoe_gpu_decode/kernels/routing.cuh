// What `route` hands to the multiplications: tiles of pairs (token, choice) that have one expert.
#pragma once
#include "common.cuh"

struct alignas(16) RoutedTile {
    u32 expert, first, count, unused; // pairs first … first + count - 1 in sorted order
};
