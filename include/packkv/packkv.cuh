// SPDX-License-Identifier: Apache-2.0
// Everything: the host umbrella, the device-wide calls and the pieces to build kernels from. Needs nvcc.
#pragma once

#include <packkv/packkv.hpp>

#include <packkv/block/row_merge.cuh>
#include <packkv/block/split_merge.cuh>
#include <packkv/device/adaptive.cuh>
#include <packkv/device/compress.cuh>
#include <packkv/device/decode_attention.cuh>
#include <packkv/device/exec.cuh>
#include <packkv/device/gemv.cuh>
#include <packkv/device/grouped.cuh>
#include <packkv/device/pack_attention.cuh>
#include <packkv/device/packs.cuh>
#include <packkv/thread/unpack.cuh>
#include <packkv/warp/element.cuh>
#include <packkv/warp/key_scores.cuh>
#include <packkv/warp/online_softmax.cuh>
#include <packkv/warp/pack_tokens.cuh>
#include <packkv/warp/tile_ring.cuh>
#include <packkv/warp/token_codec.cuh>
#include <packkv/warp/transform.cuh>
#include <packkv/warp/value_sum.cuh>
