// Appends msgpack values to a byte string: the few types that our headers use
// (https://github.com/msgpack/msgpack, spec.md). The core only writes msgpack; Python reads it.
#pragma once

#include <cstddef>
#include <cstdint>
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
    byte(0xD3);
    big_endian(static_cast<std::uint64_t>(value), 8);
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
    if (text.size() < 32) {
      byte(static_cast<std::uint8_t>(0xA0 | text.size()));
    } else {
      tagged(0xDB, text.size(), 4);
    }
    out_->append(text);
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
  void tagged(std::uint8_t tag, std::uint64_t value, int bytes) {
    byte(tag);
    big_endian(value, bytes);
  }
  void big_endian(std::uint64_t value, int bytes) {
    for (int shift = (bytes - 1) * 8; shift >= 0; shift -= 8)
      byte(static_cast<std::uint8_t>(value >> shift));
  }

  std::string* out_;
};

}  // namespace mld
