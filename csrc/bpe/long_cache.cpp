#include "long_cache.h"

#include <algorithm>
#include <cstring>

#include "hash.h"

namespace lmfast::bpe {

void LongCache::clear() {
  slots_.assign(kLeastSlots, 0);
  index_.slots = slots_.data();
  index_.shift = 64 - 10;
  pieces_ = used_ = 0;
}

uint32_t* LongCache::find(uint64_t hash, const uint8_t* piece, size_t size, uint32_t* out) const {
  const size_t mask = slots_.size() - 1;
  size_t at = hash >> index_.shift;
  for (size_t probe = 0; probe < kProbes; ++probe, at = (at + 1) & mask) {
    const uint64_t slot = slots_[at];
    if (slot == 0) return nullptr;
    if (slot >> 32 != hash >> 32) continue;
    const uint8_t* const record = index_.records + LongIndex::offset(slot);
    Record head;
    std::memcpy(&head, record, sizeof(head));
    if (head.size != size || !same_bytes(record + sizeof(head), piece, size)) continue;
    const uint8_t* const ids = record + ids_at(size);
    if (head.count <= kCopied / sizeof(uint32_t)) {
      std::memcpy(out, ids, kCopied);
    } else {
      std::memcpy(out, ids, head.count * sizeof(uint32_t));
    }
    return out + head.count;
  }
  return nullptr;
}

void LongCache::insert(uint64_t hash, const uint8_t* piece, size_t size, const uint32_t* ids,
                       size_t count) {
  const size_t bytes = (ids_at(size) + count * sizeof(uint32_t) + 7) / 8 * 8;
  if (bytes > kMostBytes) return;
  if (used_ + bytes > kMostBytes || 2 * pieces_ >= kMostSlots) clear();
  if (2 * pieces_ >= slots_.size()) grow();
  if (records_.size() < used_ + bytes + kCopied) {
    records_.resize(std::max(used_ + bytes + kCopied, records_.size() * 2));
    index_.records = records_.data();
  }
  uint8_t* const to = records_.data() + used_;
  const Record head = {static_cast<uint32_t>(size), static_cast<uint32_t>(count)};
  std::memcpy(to, &head, sizeof(head));
  std::memcpy(to + sizeof(head), piece, size);
  std::memcpy(to + ids_at(size), ids, count * sizeof(uint32_t));
  place(hash >> 32 << 32 | LongIndex::reference(used_));
  used_ += bytes;
}

void LongCache::place(uint64_t slot) {
  const size_t mask = slots_.size() - 1, home = slot >> index_.shift;
  for (size_t probe = 0; probe < kProbes; ++probe) {
    uint64_t& place = slots_[(home + probe) & mask];
    if (place != 0) continue;
    place = slot;
    ++pieces_;
    return;
  }
  slots_[home] = slot;  // as many pieces with nearly the same hash: the first is forgotten
}

void LongCache::grow() {
  std::vector<uint64_t> old(2 * slots_.size(), 0);
  old.swap(slots_);
  index_.slots = slots_.data();
  --index_.shift;
  pieces_ = 0;
  for (const uint64_t slot : old) {
    if (slot != 0) place(slot);
  }
}

}  // namespace lmfast::bpe
