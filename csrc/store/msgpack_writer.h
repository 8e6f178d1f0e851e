// Appends msgpack values to a byte string: the few types that our headers use
// (https://github.com/msgpack/msgpack, spec.md). The core only writes msgpack; Python reads it.
#pragma once

#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <string>
#include <string_view>

namespace mld {

class MsgpackWriter {
 public:
  explicit MsgpackWriter(std::string* out) : out_(out) {}

  void nil() { byte(0xC0); }
  void integer(std::int64_t value) {
    if (value >= 0) return unsigned_integer(static_cast<std::uint64_t>(value));
    if (value >= -32) return byte(static_cast<std::uint8_t>(value));
    tagged(0xD3, static_cast<std::uint64_t>(value), 8);
  }
  void unsigned_integer(std::uint64_t value) {
    if (value < 128) return byte(static_cast<std::uint8_t>(value));
    if (value <= 0xFF) return tagged(0xCC, value, 1);
    if (value <= 0xFFFF) return tagged(0xCD, value, 2);
    if (value <= 0xFFFFFFFF) return uint32(static_cast<std::uint32_t>(value));
    tagged(0xCF, value, 8);
  }
  // Always five bytes, so that a checksum behind a value has a fixed place.
  void uint32(std::uint32_t value) { tagged(0xCE, value, 4); }
  void string(std::string_view text) {
    if (text.size() < kShortString) {
      std::array<char, kShortString> encoded{};
      encoded[0] = static_cast<char>(0xA0 | text.size());
      std::memcpy(encoded.data() + 1, text.data(), text.size());
      out_->append(encoded.data(), 1 + text.size());
    } else {
      tagged(0xDB, text.size(), 4);
      out_->append(text);
    }
  }
  void binary(std::string_view bytes) {
    binary_head(bytes.size());
    out_->append(bytes);
  }
  void binary_head(std::size_t bytes) {
    if (bytes <= 0xFF) return tagged(0xC4, bytes, 1);
    tagged(0xC6, bytes, 4);
  }
  void array(std::size_t items) {
    if (items < 16) return byte(static_cast<std::uint8_t>(0x90 | items));
    tagged(0xDD, items, 4);
  }
  void map(std::size_t pairs) {
    if (pairs < 16) return byte(static_cast<std::uint8_t>(0x80 | pairs));
    tagged(0xDF, pairs, 4);
  }
  // A value that is msgpack already.
  void raw(std::string_view encoded) { out_->append(encoded); }

 private:
  void byte(std::uint8_t value) { out_->push_back(static_cast<char>(value)); }
  // Byte by byte would grow the string byte by byte: this is most of what a small call costs the
  // writer.
  void tagged(std::uint8_t tag, std::uint64_t value, int bytes) {
    std::array<char, 1 + sizeof value> encoded{};
    encoded[0] = static_cast<char>(tag);
    for (int place = 0; place < bytes; ++place)
      encoded[static_cast<std::size_t>(bytes - place)] = static_cast<char>(value >> (8 * place));
    out_->append(encoded.data(), static_cast<std::size_t>(1 + bytes));
  }

  // msgpack's fixstr: below this the tag holds the size.
  static constexpr std::size_t kShortString = 32;

  std::string* out_;
};

}  // namespace mld
