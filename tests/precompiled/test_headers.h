// As library_headers.h, for the tests.
#pragma once

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/precompiled/library_headers.h"
