// SPDX-License-Identifier: Apache-2.0
// Host umbrella: the formats, their checks and the CPU reference. Needs a C++17 compiler, no CUDA toolkit.
#pragma once

#include <packkv/cache/blob.hpp>
#include <packkv/calibrate/columns.hpp>
#include <packkv/codec/adaptive_quantize.hpp>
#include <packkv/codec/checks.hpp>
#include <packkv/codec/codec.hpp>
#include <packkv/codec/grouped.hpp>
#include <packkv/codec/grouped_quantize.hpp>
#include <packkv/codec/layout.hpp>
#include <packkv/codec/pack_checks.hpp>
#include <packkv/codec/pack_format.hpp>
#include <packkv/codec/pack_quantize.hpp>
#include <packkv/codec/pages.hpp>
#include <packkv/codec/parameters.hpp>
#include <packkv/codec/quantize.hpp>
#include <packkv/codec/strip_adaptive.hpp>
#include <packkv/codec/transform.hpp>
#include <packkv/core/views.hpp>
#include <packkv/reference/attention.hpp>
#include <packkv/reference/compress.hpp>
#include <packkv/reference/grouped.hpp>
#include <packkv/reference/grouped_attention.hpp>
#include <packkv/reference/grouped_side.hpp>
#include <packkv/reference/pack_attention.hpp>
#include <packkv/reference/packs.hpp>
#include <packkv/reference/strip_adaptive.hpp>
#include <packkv/reference/strip_adaptive_attention.hpp>
#include <packkv/reference/tile.hpp>
