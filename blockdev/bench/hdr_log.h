// HdrHistogram's log format, so that its plotters and analysers read our latencies.
#pragma once

#include <string>

#include "blockdev/bench/report.h"

namespace vblk::bench {

// A log with one line per job and kind of operation, tagged "job.operation"; values in nanoseconds,
// maxima in milliseconds. Format: HdrHistogram's HistogramLogWriter, version 1.3, with histograms
// in its V2 encoding (ZigZag LEB128 counts), compressed by zlib, in base64.
[[nodiscard]] std::string hdr_log(std::span<const NamedRun> runs);

// One histogram in V2 encoding, compressed, in base64.
[[nodiscard]] std::string encode_hdr(const LatencyHistogram& latencies);

}  // namespace vblk::bench
