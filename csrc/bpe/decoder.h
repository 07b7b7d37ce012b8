// Ids to bytes.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace lmfast::bpe {

class Decoder {
 public:
  // What each id stands for; an id without meaning is in `unknown`.
  Decoder(const std::vector<std::string>& bytes, const std::vector<bool>& unknown);

  size_t size() const { return slots_.size(); }
  // Index of the first id that has no meaning, or n.
  size_t first_unknown(const uint32_t* ids, size_t n) const;
  // Upper bound of the bytes that decode() writes, room for its wide stores included.
  size_t room(size_t n) const { return n * longest_ + kShort + 1; }
  // Writes the bytes of known ids, returns the new end.
  char* decode(const uint32_t* ids, size_t n, char* out) const;

 private:
  static constexpr size_t kShort = 15;
  // Bytes and, last, their number; longer ones hold their place in long_ and the number 255.
  struct Slot {
    char bytes[16];
  };
  struct Long {
    uint32_t offset, size;
  };

  std::vector<Slot> slots_;
  std::vector<Long> long_;
  std::string long_bytes_;
  std::vector<bool> unknown_;
  bool any_unknown_ = false;
  size_t longest_ = 0;
};

}  // namespace lmfast::bpe
