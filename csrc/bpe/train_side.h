// What one merge adds up on one side of the new token: counts and positions by neighbour.
// Word boundaries are added like any neighbour and left out at the end: whether a token begins a
// word is not predictable.
#pragma once
#include <cstddef>
#include <cstdint>
#include <vector>

#include "buffer.h"

namespace lmfast::bpe {

class Side {
 public:
  struct Neighbour {
    uint64_t count;
    uint64_t fill;  // where its next position goes in the arena
    uint32_t id;
    uint32_t size;  // positions; at last, how far before the token the left of the pair begins
  };
  struct Hit {
    uint32_t neighbour, position;
  };

  void add_token() { where_.push_back(0); }
  void begin(size_t most) {
    found = neighbours_.room(most);
    hits = hits_.room(most);
    found_end = found;
    hits_end = hits;
  }
  // `slot` selects where the neighbour is remembered: 0 for the boundary, else its id + 1.
  void add(uint32_t slot, uint32_t position, uint64_t weight) {
    uint32_t index = where_[slot];
    if (index >= found_end - found || found[index].id != slot) {
      index = static_cast<uint32_t>(found_end - found);
      where_[slot] = index;
      *found_end++ = {0, 0, slot, 0};
    }
    found[index].count += weight;
    ++found[index].size;
    *hits_end++ = {index, position};
  }

  Neighbour *found, *found_end;
  Hit *hits, *hits_end;

 private:
  // Slot -> index in found, if found has the slot there: stale entries do no harm.
  std::vector<uint32_t> where_;
  Buffer<Neighbour> neighbours_;
  Buffer<Hit> hits_;
};

}  // namespace lmfast::bpe
