// What most sources include of others' headers. Only a build with -Dprecompiled_headers=true sees
// this file: time saved in the builds for the sanitizers. The others show that each source includes
// what it needs. Guarded by a name, for GCC warns of #pragma once in a header that it precompiles.
#ifndef VBLK_LIBRARY_HEADERS_H
#define VBLK_LIBRARY_HEADERS_H

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstring>
#include <expected>
#include <functional>
#include <map>
#include <memory>
#include <mutex>
#include <optional>
#include <span>
#include <string>
#include <thread>
#include <utility>
#include <vector>

#include <fmt/core.h>

#endif
