// As library_headers.h, for the tests.
#ifndef VBLK_TEST_HEADERS_H
#define VBLK_TEST_HEADERS_H

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include "tests/precompiled/library_headers.h"

#endif
