// SPDX-License-Identifier: Apache-2.0
// What AddressSanitizer asks every target at its start: without a large quarantine and deep stack traces of
// allocations, small targets run several times as fast.
extern "C" const char* __asan_default_options() { return "quarantine_size_mb=4:malloc_context_size=4"; }
