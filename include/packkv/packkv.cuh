// SPDX-License-Identifier: Apache-2.0
// Everything: the host umbrella, the device-wide calls and the pieces to build kernels from. Needs nvcc.
#pragma once

#include <packkv/packkv.hpp>

#include <packkv/block/decode_unit.cuh>
#include <packkv/block/part_merge.cuh>
#include <packkv/block/row_merge.cuh>
#include <packkv/block/row_ranges.cuh>
#include <packkv/block/split_merge.cuh>
#include <packkv/block/unit_parts.cuh>
#include <packkv/block/unit_work.cuh>
#include <packkv/block/work_split.cuh>
#include <packkv/device/adaptive.cuh>
#include <packkv/device/compress.cuh>
#include <packkv/device/decode_attention.cuh>
#include <packkv/device/decode_plan.cuh>
#include <packkv/device/exec.cuh>
#include <packkv/device/format_family.cuh>
#include <packkv/device/gemv.cuh>
#include <packkv/device/grouped.cuh>
#include <packkv/device/pack_attention.cuh>
#include <packkv/device/packs.cuh>
#include <packkv/thread/unpack.cuh>
#include <packkv/warp/attention_row.cuh>
#include <packkv/warp/element.cuh>
#include <packkv/warp/grouped_key_scores.cuh>
#include <packkv/warp/grouped_output.cuh>
#include <packkv/warp/grouped_weights.cuh>
#include <packkv/warp/key_scores.cuh>
#include <packkv/warp/lane_parameters.cuh>
#include <packkv/warp/lazy_softmax.cuh>
#include <packkv/warp/mma_key_scores.cuh>
#include <packkv/warp/mma_value_sum.cuh>
#include <packkv/warp/online_softmax.cuh>
#include <packkv/warp/pack_tokens.cuh>
#include <packkv/warp/raw_attention.cuh>
#include <packkv/warp/score_columns.cuh>
#include <packkv/warp/tile_ring.cuh>
#include <packkv/warp/tile_stream.cuh>
#include <packkv/warp/token_codec.cuh>
#include <packkv/warp/transform.cuh>
#include <packkv/warp/value_output.cuh>
#include <packkv/warp/value_sum.cuh>
