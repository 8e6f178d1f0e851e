#include "store/segment_reader.h"

#include <cerrno>
#include <cstring>
#include <limits>

#include "errors.h"
#include "store/crc32c.h"
#include "store/files.h"
#include "store/record_format.h"
#include "store/store.h"

namespace mld {
namespace {

constexpr const char* kDamageHint = "restore the segment from a copy, or drop its epoch";

Access access_for(const std::string& directory, bool sealed) {
  if (sealed) return Access::kReadSealed;
  // One handle an environment and process: if the writer of this process may open it too, it must
  // be able to write.
  return StoreState::owns(directory) ? Access::kWrite : Access::kReadLive;
}

// What LMDB returns when pages are not what they should be.
bool is_damage(int code) {
  switch (code) {
    case MDB_INVALID:
    case MDB_VERSION_MISMATCH:
    case MDB_NOTFOUND:
    case MDB_CORRUPTED:
    case MDB_PAGE_NOTFOUND:
    case MDB_MAP_RESIZED:
    case MDB_INCOMPATIBLE:
    case MDB_CURSOR_FULL:
    case MDB_BAD_TXN:
      return true;
    default:
      return false;
  }
}

template <class Read>
auto read_sound(const std::string& directory, Read read) {
  try {
    return read();
  } catch (const StoreError& error) {
    if (!is_damage(error.code())) throw;
    throw Error(ErrorKind::kCorruptData, directory + ": " + error.what(), kDamageHint);
  }
}

}  // namespace

SegmentReader::SegmentReader(const std::string& directory, bool sealed) : directory_(directory) {
  try {
    environment_ =
        Environment::open(directory, access_for(directory, sealed), Sync::kEveryCommit, 0);
  } catch (const StoreError& error) {
    if (error.code() == ENOENT) {
      throw Error(ErrorKind::kNotFound,
                  "the segment " + directory + " is gone: its epoch was dropped");
    }
    if (is_damage(error.code()))
      throw Error(ErrorKind::kCorruptData, directory + ": " + error.what(), kDamageHint);
    throw;
  }
}

std::string SegmentReader::meta() const {
  return read_sound(directory_, [this] { return read_meta(); });
}

std::vector<std::pair<std::uint64_t, std::string>> SegmentReader::headers(
    std::optional<std::uint64_t> after, std::size_t limit) const {
  return read_sound(directory_, [&] { return read_headers(after, limit); });
}

void SegmentReader::read(const std::vector<ChunkRequest>& requests, std::byte* out) const {
  read_sound(directory_, [&] { read_chunks(requests, out); });
}

std::string SegmentReader::read_meta() const {
  const Transaction transaction(*environment_, true);
  MDB_val key{kMetaKey.size(), const_cast<char*>(kMetaKey.data())};
  MDB_val value{};
  const int code = mdb_get(transaction.get(), environment_->main(), &key, &value);
  if (code == MDB_NOTFOUND) return {};
  check_lmdb(code, "cannot read totals");
  return {static_cast<const char*>(value.mv_data), value.mv_size};
}

std::vector<std::pair<std::uint64_t, std::string>> SegmentReader::read_headers(
    std::optional<std::uint64_t> after, std::size_t limit) const {
  std::vector<std::pair<std::uint64_t, std::string>> found;
  if (after == std::numeric_limits<std::uint64_t>::max()) return found;  // nothing can be behind it
  const Transaction transaction(*environment_, true);
  MDB_cursor* cursor = nullptr;
  check_lmdb(mdb_cursor_open(transaction.get(), environment_->headers(), &cursor),
             "cannot read headers");
  const std::unique_ptr<MDB_cursor, decltype(&mdb_cursor_close)> guard(cursor, &mdb_cursor_close);
  Key first = encode_key(after ? *after + 1 : 0);
  MDB_val key{first.size(), first.data()};
  MDB_val value{};
  int code = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
  for (; code == MDB_SUCCESS && found.size() < limit;
       code = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
    const std::string_view bytes(static_cast<const char*>(value.mv_data), value.mv_size);
    if (key.mv_size != first.size() || !header_is_sound(bytes)) {
      throw Error(ErrorKind::kCorruptData,
                  "a header of " + directory_ + " does not match its checksum", kDamageHint);
    }
    found.emplace_back(decode_key(key.mv_data), std::string(bytes));
  }
  if (code != MDB_SUCCESS && code != MDB_NOTFOUND) check_lmdb(code, "cannot read headers");
  return found;
}

void SegmentReader::read_chunks(const std::vector<ChunkRequest>& requests, std::byte* out) const {
  const Transaction transaction(*environment_, true);
  for (const ChunkRequest& request : requests) {
    Key encoded = encode_key(request.key);
    MDB_val key{encoded.size(), encoded.data()};
    MDB_val value{};
    const int code = mdb_get(transaction.get(), environment_->chunks(), &key, &value);
    if (code != MDB_NOTFOUND) check_lmdb(code, "cannot read a chunk");
    if (code == MDB_NOTFOUND || value.mv_size != request.bytes) {
      throw Error(
          ErrorKind::kCorruptData,
          "chunk " + std::to_string(request.key) + " of " + directory_ + " is missing or cut",
          kDamageHint);
    }
    std::memcpy(out + request.offset, value.mv_data, value.mv_size);
    // Of the copy, which is in the cache, and which is what the caller gets.
    if (crc32c(out + request.offset, request.bytes) != request.crc) {
      throw Error(ErrorKind::kCorruptData,
                  "chunk " + std::to_string(request.key) + " of " + directory_ +
                      " does not match its checksum",
                  kDamageHint);
    }
  }
}

}  // namespace mld
