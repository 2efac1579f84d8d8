// Patches of a valid qcow2 image, as an input tells them.
#pragma once

#include "tests/fuzz/input.h"
#include "tests/qcow2/image_format.h"

namespace vblk::fuzz {

// A geometry: small enough that an image of it is made in a moment.
qcow2::testing::ImageSpec take_spec(Input& input);

// Changes `image`, which is valid, by up to kPatchesMax patches.
inline constexpr unsigned kPatchesMax = 31;
void apply_patches(Input& input, qcow2::testing::Bytes& image);

}  // namespace vblk::fuzz
