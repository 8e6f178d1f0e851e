#include "store/segment_reader.h"

#include <cerrno>
#include <cstring>
#include <limits>
#include <unordered_map>

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

// Whether a call can be read as part of a run; `lengths` has room for kCaptures.
bool is_plain(std::uint64_t key, const DecodedHeader& header, const SegmentIdentity& expected,
              std::int64_t* lengths, std::uint64_t* chunk_bytes) {
  const CallIdentity& call = header.identity;
  if (header.kind != HeaderKind::kCall || call.call != key || call.rank != expected.rank ||
      call.attempt != expected.attempt || call.epoch != expected.epoch || call.first_row < 0) {
    return false;
  }
  std::uint64_t total = 0;
  for (const ChunkRef& chunk : header.chunks) {
    const bool is_inline = chunk.segment == ChunkRef::kInline;
    if (!is_inline && chunk.segment != static_cast<std::int64_t>(expected.sequence)) return false;
    if (chunk.capture >= HeaderScan::kCaptures || chunk.bytes > HeaderScan::kMaxCallBytes)
      return false;
    lengths[chunk.capture] += static_cast<std::int64_t>(chunk.bytes);
    if (!is_inline) *chunk_bytes += chunk.bytes;
    total += chunk.bytes;
  }
  return total <= HeaderScan::kMaxCallBytes;
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
  return read_sound(directory_, [&]() -> std::string {
    const Transaction transaction(*environment_, true);
    MDB_val key{kMetaKey.size(), const_cast<char*>(kMetaKey.data())};
    MDB_val value{};
    const int code = mdb_get(transaction.get(), environment_->main(), &key, &value);
    if (code == MDB_NOTFOUND) return {};
    check_lmdb(code, "cannot read totals");
    return {static_cast<const char*>(value.mv_data), value.mv_size};
  });
}

// Calls visit(key, value) for up to `limit` sound headers behind `after`, in key order.
template <class Visit>
void SegmentReader::for_headers(std::optional<std::uint64_t> after, std::size_t limit,
                                Visit visit) const {
  read_sound(directory_, [&] {
    if (after == std::numeric_limits<std::uint64_t>::max()) return;  // nothing can be behind it
    const Transaction transaction(*environment_, true);
    MDB_cursor* cursor = nullptr;
    check_lmdb(mdb_cursor_open(transaction.get(), environment_->headers(), &cursor),
               "cannot read headers");
    const std::unique_ptr<MDB_cursor, decltype(&mdb_cursor_close)> guard(cursor, &mdb_cursor_close);
    Key first = encode_key(after ? *after + 1 : 0);
    MDB_val key{first.size(), first.data()};
    MDB_val value{};
    int code = mdb_cursor_get(cursor, &key, &value, MDB_SET_RANGE);
    for (; code == MDB_SUCCESS && limit > 0;
         --limit, code = mdb_cursor_get(cursor, &key, &value, MDB_NEXT)) {
      const std::string_view bytes(static_cast<const char*>(value.mv_data), value.mv_size);
      if (key.mv_size != first.size() || !header_is_sound(bytes)) {
        throw Error(ErrorKind::kCorruptData,
                    "a header of " + directory_ + " does not match its checksum", kDamageHint);
      }
      visit(decode_key(key.mv_data), bytes);
    }
    if (code != MDB_SUCCESS && code != MDB_NOTFOUND) check_lmdb(code, "cannot read headers");
  });
}

std::vector<std::pair<std::uint64_t, std::string>> SegmentReader::headers(
    std::optional<std::uint64_t> after, std::size_t limit) const {
  std::vector<std::pair<std::uint64_t, std::string>> found;
  for_headers(after, limit, [&](std::uint64_t key, std::string_view value) {
    found.emplace_back(key, std::string(value));
  });
  return found;
}

HeaderScan SegmentReader::scan(std::optional<std::uint64_t> after, std::size_t limit,
                               const SegmentIdentity& expected) const {
  HeaderScan found;
  std::unordered_map<std::string, std::int64_t> numbers;
  for_headers(after, limit, [&](std::uint64_t key, std::string_view value) {
    found.keys.push_back(static_cast<std::int64_t>(key));
    found.lengths.resize(found.lengths.size() + HeaderScan::kCaptures);
    std::int64_t* lengths = found.lengths.data() + found.lengths.size() - HeaderScan::kCaptures;
    DecodedHeader header;
    header.kind = HeaderKind::kGap;
    try {
      header = decode_header(value);
    } catch (const Error&) {
      // Who reads the whole value says what is wrong with it.
    }
    std::uint64_t chunk_bytes = 0;
    const CallIdentity& call = header.identity;
    found.rows.push_back(call.rows);
    found.ground_truth_rows.push_back(call.ground_truth_rows);
    found.first_rows.push_back(call.first_row);
    if (!is_plain(key, header, expected, lengths, &chunk_bytes)) {
      found.description.push_back(-1);
      found.others.emplace_back(value);
    } else {
      const auto next = static_cast<std::int64_t>(found.descriptions.size());
      const auto [place, is_new] = numbers.try_emplace(std::string(header.description), next);
      if (is_new) found.descriptions.push_back(place->first);
      found.description.push_back(place->second);
    }
    found.chunk_bytes.push_back(static_cast<std::int64_t>(chunk_bytes));
  });
  return found;
}

void SegmentReader::gather(const std::vector<std::uint64_t>& keys,
                           std::vector<GatherTarget> targets) const {
  read_sound(directory_, [&] {
    const auto differs = [&](std::uint64_t key) -> Error {
      return {ErrorKind::kCorruptData,
              "call " + std::to_string(key) + " of " + directory_ +
                  " is not what it was when it was listed",
              kDamageHint};
    };
    const Transaction transaction(*environment_, true);
    for (const std::uint64_t number : keys) {
      Key encoded = encode_key(number);
      MDB_val key{encoded.size(), encoded.data()};
      MDB_val value{};
      const int code = mdb_get(transaction.get(), environment_->headers(), &key, &value);
      if (code == MDB_NOTFOUND) throw differs(number);
      check_lmdb(code, "cannot read headers");
      const DecodedHeader header =
          decode_header({static_cast<const char*>(value.mv_data), value.mv_size});
      for (const ChunkRef& chunk : header.chunks) {
        for (GatherTarget& target : targets) {
          if (target.capture != chunk.capture || chunk.bytes == 0) continue;
          if (chunk.bytes > target.bytes) throw differs(number);
          if (chunk.segment == ChunkRef::kInline) {
            std::memcpy(target.out, header.inline_bytes.data() + chunk.key, chunk.bytes);
            check_copy(target.out, chunk.bytes, chunk.crc, chunk.key);
          } else {
            copy_chunk(transaction.get(), {chunk.key, 0, chunk.bytes, chunk.crc}, target.out);
          }
          target.out += chunk.bytes;
          target.bytes -= chunk.bytes;
        }
      }
    }
    for (const GatherTarget& target : targets) {
      if (target.bytes != 0) throw differs(keys.empty() ? 0 : keys.back());
    }
  });
}

void SegmentReader::read(const std::vector<ChunkRequest>& requests, std::byte* out) const {
  read_sound(directory_, [&] {
    const Transaction transaction(*environment_, true);
    for (const ChunkRequest& request : requests)
      copy_chunk(transaction.get(), request, out + request.offset);
  });
}

void SegmentReader::copy_chunk(MDB_txn* transaction, const ChunkRequest& request,
                               std::byte* out) const {
  Key encoded = encode_key(request.key);
  MDB_val key{encoded.size(), encoded.data()};
  MDB_val value{};
  const int code = mdb_get(transaction, environment_->chunks(), &key, &value);
  if (code != MDB_NOTFOUND) check_lmdb(code, "cannot read a chunk");
  if (code == MDB_NOTFOUND || value.mv_size != request.bytes) {
    throw Error(ErrorKind::kCorruptData,
                "chunk " + std::to_string(request.key) + " of " + directory_ + " is missing or cut",
                kDamageHint);
  }
  std::memcpy(out, value.mv_data, value.mv_size);
  check_copy(out, request.bytes, request.crc, request.key);
}

// Of the copy, which is in the cache, and which is what the caller gets.
void SegmentReader::check_copy(const std::byte* copy, std::uint64_t bytes, std::uint32_t crc,
                               std::uint64_t key) const {
  if (crc32c(copy, bytes) == crc) return;
  throw Error(ErrorKind::kCorruptData,
              "chunk " + std::to_string(key) + " of " + directory_ + " does not match its checksum",
              kDamageHint);
}

}  // namespace mld
