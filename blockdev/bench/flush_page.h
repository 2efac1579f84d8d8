// The flush tests as a page that needs nothing else: tables, and plots drawn by gnuplot as SVG.
#pragma once

#include <string>

#include "aio/error.h"
#include "blockdev/bench/flush_suite.h"

namespace vblk::bench {

// Whether pages can be made here. Error: kNotFound: there is no gnuplot.
Expected<void> find_gnuplot();

// Errors: kIo: gnuplot has failed.
Expected<std::string> flush_page(const FlushReport& report, const FlushSuiteOptions& options);

}  // namespace vblk::bench
