#include "blockdev/qcow2/table_io.h"

#include <cerrno>

#include "blockdev/block_io.h"
#include "blockdev/qcow2/format.h"

namespace vblk::qcow2 {

blockdev::Task<int> read_table(blockdev::BlockNode& file, blockdev::IoContext& context,
                               std::uint64_t file_end, std::uint64_t offset, std::uint64_t entries,
                               std::vector<std::uint64_t>& table) {
  table.clear();
  if (entries == 0) co_return 0;
  if (offset > file_end || entries > (file_end - offset) / 8) co_return EINVAL;
  blockdev::AlignedBuffer bytes((entries * 8 + 511) / 512 * 512);
  const int error = co_await blockdev::BlockIo(file, context, blockdev::BlockOperation::kRead,
                                               offset, bytes.bytes());
  if (error != 0) co_return error;
  table.resize(entries);
  for (std::size_t i = 0; i < table.size(); ++i)
    table[i] = load_be<std::uint64_t>(bytes.data() + i * 8);
  co_return 0;
}

}  // namespace vblk::qcow2
