#include "word_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "encode_loop.h"

namespace lmfast::bpe {
namespace {

constexpr size_t kHugePage = 2u << 20;

CacheBucket* allocate_buckets(size_t count) {
  const size_t bytes = count * sizeof(CacheBucket);
  void* memory = std::aligned_alloc(kHugePage, bytes);
  if (memory == nullptr) throw std::bad_alloc();
#if defined(__linux__) && defined(MADV_HUGEPAGE)
  // Before the first touch: +5 to 8 % warm.
  madvise(memory, bytes, MADV_HUGEPAGE);
#endif
  return static_cast<CacheBucket*>(memory);
}

bool same(PieceKey a, PieceKey b) { return a.low == b.low && a.high == b.high; }

uint64_t mix(uint64_t a, uint64_t b) {
  a = (a ^ (b + 0x9E3779B97F4A7C15ull + (a << 6) + (a >> 2))) * 0xBF58476D1CE4E5B9ull;
  return a ^ a >> 29;
}

uint64_t hash_bytes(const uint8_t* p, size_t size) {
  uint64_t h = mix(size, 0xD6E8FEB86659FD93ull), word;
  for (; size >= 8; size -= 8, p += 8) {
    std::memcpy(&word, p, 8);
    h = mix(h, word);
  }
  word = 0;
  std::memcpy(&word, p, size);
  return mix(h, word);
}

}  // namespace

WordCache::WordCache(const Vocabulary& vocabulary, const Kernels& kernels)
    : vocabulary_(vocabulary),
      kernels_(kernels),
      merger_(vocabulary, kernels),
      buckets_(allocate_buckets(kBuckets)) {
  std::memset(static_cast<void*>(buckets_), 0, kBuckets * sizeof(CacheBucket));
}

WordCache::WordCache(const Vocabulary& vocabulary, const Kernels& kernels, const WordCache& seeded)
    : vocabulary_(vocabulary),
      kernels_(kernels),
      merger_(vocabulary, kernels),
      buckets_(allocate_buckets(kBuckets)),
      arena_(seeded.arena_),
      generation_(seeded.generation_) {
  std::memcpy(static_cast<void*>(buckets_), seeded.buckets_, kBuckets * sizeof(CacheBucket));
}

WordCache::~WordCache() { std::free(buckets_); }

uint32_t* WordCache::merge_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  const uint32_t whole = vocabulary_.whole_piece_id(piece, size);
  if (whole != kNoId) {
    *out = whole;
    return out + 1;
  }
  return merger_.encode(piece, size, out);
}

uint32_t* WordCache::encode_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  if (size > kShortPiece) return long_piece(piece, size, out);
  uint8_t padded[16] = {};
  std::memcpy(padded, piece, size);
  const uint16_t start = 0, end = static_cast<uint16_t>(size);
  return kernels_.encode(context(), padded, {&start, &end, 1}, out);
}

bool WordCache::stale(const uint32_t* entry) const {
  return entry[0] >> 24 == 0 && entry[3] != generation_;
}

uint32_t* WordCache::emit(const uint32_t* entry, uint32_t* out) const {
  const uint32_t count = entry[0] >> 24;
  if (count == 0) {
    std::memcpy(out, arena_.data() + entry[1], entry[2] * sizeof(uint32_t));
    return out + entry[2];
  }
  std::memcpy(out, entry, 16);
  out[0] &= 0xFFFFFF;
  return out + count;
}

// A piece of up to 15 bytes that is in neither place of its bucket: look into the neighbouring
// bucket and swap a hit home (without the swap the same pieces miss again and again: 44,000 instead
// of 1,950 per pass over 3.5 MB), else merge and store.
uint32_t* WordCache::short_miss(const uint8_t* piece, size_t size, PieceKey key, size_t bucket,
                                uint32_t* out) {
  CacheBucket& home = buckets_[bucket];
  CacheBucket& near = buckets_[bucket ^ 1];
  for (int way = 0; way < 2; ++way) {
    if (same(home.key[way], key) && !stale(home.ids[way])) return emit(home.ids[way], out);
  }
  for (int way = 0; way < 2; ++way) {
    if (!same(near.key[way], key) || stale(near.ids[way])) continue;
    const int other = turn_++ & 1;
    std::swap(home.key[other], near.key[way]);
    std::swap(home.ids[other], near.ids[way]);
    return emit(home.ids[other], out);
  }
  uint32_t* const end = merge_piece(piece, size, out);
  store(key, bucket, out, static_cast<size_t>(end - out));
  return end;
}

// Fills an entry's ids: in place where they fit, else in the arena.
void WordCache::pack(const uint32_t* ids, size_t count, size_t most, uint32_t* entry) {
  if (count <= most) {
    std::copy(ids, ids + count, entry);
    entry[0] |= static_cast<uint32_t>(count) << 24;
    return;
  }
  if (arena_.size() + count > kArenaIds) {
    arena_.clear();
    ++generation_;
  }
  entry[0] = 0;
  entry[1] = static_cast<uint32_t>(arena_.size());
  entry[2] = static_cast<uint32_t>(count);
  entry[3] = generation_;
  arena_.insert(arena_.end(), ids, ids + count);
}

void WordCache::store(PieceKey key, size_t bucket, const uint32_t* ids, size_t count) {
  uint32_t entry[4] = {};
  pack(ids, count, 4, entry);
  CacheBucket& home = buckets_[bucket];
  CacheBucket& near = buckets_[bucket ^ 1];
  int way = static_cast<int>(turn_ & 1);
  for (int w = 0; w < 2; ++w) {
    if (home.key[w].high == 0 || same(home.key[w], key)) {
      way = w;
      break;
    }
  }
  if (home.key[way].high != 0 && !same(home.key[way], key)) {
    const int victim = near.key[0].high == 0 ? 0 : static_cast<int>(++turn_ >> 1 & 1);
    near.key[victim] = home.key[way];
    std::memcpy(near.ids[victim], home.ids[way], sizeof(entry));
  }
  home.key[way] = key;
  std::memcpy(home.ids[way], entry, sizeof(entry));
}

void WordCache::seed() {
  std::vector<uint32_t> ids(64);
  uint8_t padded[16];
  const std::string& marker = vocabulary_.marker();
  for (const std::string& token : vocabulary_.tokens()) {
    if (token.size() <= marker.size() || token.size() - marker.size() > kShortPiece) continue;
    if (token.compare(0, marker.size(), marker) != 0) continue;
    const uint8_t* bytes = reinterpret_cast<const uint8_t*>(token.data()) + marker.size();
    const size_t size = token.size() - marker.size();
    const Piece piece = next_piece(vocabulary_.pattern(), bytes, 0, size);
    if (piece.start != 0 || piece.end != size) continue;
    std::memset(padded, 0, sizeof(padded));
    std::memcpy(padded, bytes, size);
    const PieceKey key = piece_key(padded, size);
    slow_entry(this, padded, size, key, kernels_.hash(key) & kMask, ids.data());
  }
}

uint32_t* WordCache::long_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  return size <= kMediumPiece ? medium_piece(piece, size, out) : arena_piece(piece, size, out);
}

void WordCache::grow_medium() {
  std::vector<MediumEntry> old(medium_.empty() ? kMediumStart : 2 * medium_.size());
  old.swap(medium_);
  medium_used_ = 0;
  for (const MediumEntry& entry : old) {
    if (entry.key[31] == 0) continue;
    const uint64_t h = hash_bytes(entry.key, 32);
    for (const size_t at : {h & (medium_.size() - 1), (h & (medium_.size() - 1)) ^ 1}) {
      if (medium_[at].key[31] != 0) continue;
      medium_[at] = entry;
      ++medium_used_;
      break;
    }
  }
}

uint32_t* WordCache::medium_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  if (2 * medium_used_ >= medium_.size() && medium_.size() < kMediumMost) grow_medium();
  MediumEntry wanted = {};
  std::memcpy(wanted.key, piece, size);
  wanted.key[31] = static_cast<uint8_t>(size);
  const size_t home = hash_bytes(wanted.key, 32) & (medium_.size() - 1);
  for (const size_t at : {home, home ^ 1}) {
    const MediumEntry& entry = medium_[at];
    if (std::memcmp(entry.key, wanted.key, 32) != 0 || stale(entry.ids)) continue;
    if (entry.ids[0] >> 24 == 0) return emit(entry.ids, out);
    std::memcpy(out, entry.ids, sizeof(entry.ids));
    out[0] &= 0xFFFFFF;
    return out + (entry.ids[0] >> 24);
  }
  uint32_t* const end = merge_piece(piece, size, out);
  pack(out, static_cast<size_t>(end - out), kMediumIds, wanted.ids);
  size_t at = home;
  if (medium_[home].key[31] != 0 && (medium_[home ^ 1].key[31] == 0 || (turn_++ & 1)))
    at = home ^ 1;
  if (medium_[at].key[31] == 0) ++medium_used_;
  medium_[at] = wanted;
  return end;
}

uint32_t* WordCache::arena_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  const uint64_t h = hash_bytes(piece, size);
  const auto found = long_.find(h);
  if (found != long_.end() && found->second.size == size &&
      std::memcmp(long_bytes_.data() + found->second.bytes, piece, size) == 0) {
    const LongEntry& entry = found->second;
    std::memcpy(out, long_ids_.data() + entry.ids, entry.count * sizeof(uint32_t));
    return out + entry.count;
  }
  uint32_t* const end = merge_piece(piece, size, out);
  const size_t count = static_cast<size_t>(end - out);
  const size_t bytes = size + count * sizeof(uint32_t);
  if (bytes > kLongBytes / 2 || found != long_.end()) return end;
  if (long_bytes_.size() + long_ids_.size() * sizeof(uint32_t) + 64 * long_.size() + bytes >
      kLongBytes) {
    long_.clear();
    long_bytes_.clear();
    long_ids_.clear();
  }
  long_[h] = {long_bytes_.size(), size, long_ids_.size(), count};
  long_bytes_.insert(long_bytes_.end(), piece, piece + size);
  long_ids_.insert(long_ids_.end(), out, end);
  return end;
}

}  // namespace lmfast::bpe
