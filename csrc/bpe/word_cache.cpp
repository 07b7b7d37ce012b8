#include "word_cache.h"

#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <new>
#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "encode_loop.h"
#include "hash.h"

namespace lmfast::bpe {
namespace {

constexpr size_t kHugePage = 2u << 20;

size_t bytes_of(uint32_t count) { return count * sizeof(CacheBucket); }

#if defined(__linux__) && defined(MADV_HUGEPAGE)
// Zeroed by the kernel, and in huge pages if asked for before the first touch: +5 to 8 % warm.
CacheBucket* allocate_buckets(uint32_t count) {
  const size_t bytes = bytes_of(count);
  char* const memory = static_cast<char*>(mmap(nullptr, bytes + kHugePage, PROT_READ | PROT_WRITE,
                                               MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0));
  if (memory == MAP_FAILED) throw std::bad_alloc();
  const size_t before = (0 - reinterpret_cast<uintptr_t>(memory)) % kHugePage;
  if (before > 0) munmap(memory, before);
  if (before < kHugePage) munmap(memory + before + bytes, kHugePage - before);
  madvise(memory + before, bytes, MADV_HUGEPAGE);
  return reinterpret_cast<CacheBucket*>(memory + before);
}

void free_buckets(CacheBucket* buckets, uint32_t count) { munmap(buckets, bytes_of(count)); }
#else
CacheBucket* allocate_buckets(uint32_t count) {
  void* memory = std::aligned_alloc(kHugePage, bytes_of(count));
  if (memory == nullptr) throw std::bad_alloc();
  std::memset(memory, 0, bytes_of(count));
  return static_cast<CacheBucket*>(memory);
}

void free_buckets(CacheBucket* buckets, uint32_t) { std::free(buckets); }
#endif

// The ids of a piece from the vocabulary alone.
uint32_t* encode_unknown(const Vocabulary& vocabulary, Merger* merger, const uint8_t* piece,
                         size_t size, uint32_t* out) {
  const uint32_t whole = vocabulary.whole_piece_id(piece, size);
  if (whole == kNoId) return merger->encode(piece, size, out);
  *out = whole;
  return out + 1;
}

bool same(PieceKey a, PieceKey b) { return a.low == b.low && a.high == b.high; }

}  // namespace

std::vector<WordCache::Seed> WordCache::seeds_of(const Vocabulary& vocabulary,
                                                 const Kernels& kernels) {
  std::vector<Seed> seeds;
  Merger merger(vocabulary, kernels);
  uint32_t ids[Vocabulary::max_symbols(kShortPiece)];
  const std::string& marker = vocabulary.marker();
  for (const std::string& token : vocabulary.tokens()) {
    if (token.size() <= marker.size() || token.size() - marker.size() > kShortPiece) continue;
    if (token.compare(0, marker.size(), marker) != 0) continue;
    uint8_t padded[16] = {};
    const size_t size = token.size() - marker.size();
    std::memcpy(padded, token.data() + marker.size(), size);
    const Piece piece = next_piece(vocabulary.pattern(), padded, 0, size);
    if (piece.start != 0 || piece.end != size) continue;
    const uint32_t* const end = encode_unknown(vocabulary, &merger, padded, size, ids);
    const size_t count = static_cast<size_t>(end - ids);
    if (count > 4) continue;
    Seed seed = {piece_key(padded, size), {}};
    std::copy(ids, ids + count, seed.ids);
    seed.ids[0] |= static_cast<uint32_t>(count) << 24;
    seeds.push_back(seed);
  }
  return seeds;
}

WordCache::WordCache(const Vocabulary& vocabulary, const Kernels& kernels,
                     const std::vector<Seed>& seeds)
    : vocabulary_(vocabulary),
      kernels_(kernels),
      merger_(vocabulary, kernels),
      buckets_(allocate_buckets(kLeastBuckets)) {
  for (const Seed& seed : seeds) store(seed.key, bucket_of(seed.key), seed.ids);
  evicted_ = 0;
}

WordCache::~WordCache() { free_buckets(buckets_, count_); }

EncodeContext WordCache::context() {
  // Early: when an eighth of the entries instead of a thirty-second had been driven out, 200,000
  // distinct words took 5.1 instead of 2.5 ms.
  if (evicted_ > count_ / 16 && count_ < kMostBuckets) grow();
  return {buckets_, mask(), &arena_, longs_.index(), this, &slow_entry};
}

void WordCache::grow() {
  const uint32_t old_count = count_;
  CacheBucket* const old = buckets_;
  buckets_ = allocate_buckets(2 * old_count);
  count_ = 2 * old_count;
  for (uint32_t i = 0; i < old_count; ++i) {
    for (int way = 0; way < 2; ++way) {
      const PieceKey key = old[i].key[way];
      if (key.high == 0 || stale(old[i].ids[way])) continue;
      store(key, bucket_of(key), old[i].ids[way]);
    }
  }
  free_buckets(old, old_count);
  evicted_ = 0;
}

uint32_t* WordCache::encode_piece(const uint8_t* piece, size_t size, uint32_t* out) {
  if (size > kShortPiece) return long_piece(piece, size, hash_bytes(piece, size), out);
  uint8_t padded[16] = {};
  std::memcpy(padded, piece, size);
  const uint16_t start = 0, end = static_cast<uint16_t>(size);
  return kernels_.encode(context(), padded, {&start, &end, 1}, out);
}

bool WordCache::stale(const uint32_t* entry) const {
  return entry[0] >> 24 == 0 && entry[3] != arena_.generation;
}

uint32_t* WordCache::emit(const uint32_t* entry, uint32_t* out) const {
  const uint32_t count = entry[0] >> 24;
  if (count == 0) {
    std::memcpy(out, arena_.ids + entry[1], entry[2] * sizeof(uint32_t));
    return out + entry[2];
  }
  std::memcpy(out, entry, 16);
  out[0] &= 0xFFFFFF;
  return out + count;
}

// A piece of up to 15 bytes that is in neither place of its bucket: look into the neighbouring
// bucket and swap a hit home (without the swap the same pieces miss again and again: 44,000 instead
// of 1,950 per pass over 3.5 MB), else merge and store. What is in the neighbouring bucket was
// driven out of a full one: beside an empty place there is no need for a second line, which in a
// first pass is not in the cache either.
uint32_t* WordCache::short_miss(const uint8_t* piece, size_t size, PieceKey key, size_t bucket,
                                uint32_t* out) {
  CacheBucket& home = buckets_[bucket];
  for (int way = 0; way < 2; ++way) {
    if (same(home.key[way], key) && !stale(home.ids[way])) return emit(home.ids[way], out);
  }
  if (home.key[1].high != 0) {
    CacheBucket& near = buckets_[bucket ^ 1];
    for (int way = 0; way < 2; ++way) {
      if (!same(near.key[way], key) || stale(near.ids[way])) continue;
      const int other = turn_++ & 1;
      std::swap(home.key[other], near.key[way]);
      std::swap(home.ids[other], near.ids[way]);
      return emit(home.ids[other], out);
    }
  }
  uint32_t* const end = encode_unknown(vocabulary_, &merger_, piece, size, out);
  uint32_t entry[4] = {};
  pack(out, static_cast<size_t>(end - out), entry);
  store(key, bucket, entry);
  return end;
}

// Fills an entry's ids: in place where they fit, else in the arena.
void WordCache::pack(const uint32_t* ids, size_t count, uint32_t* entry) {
  if (count <= 4) {
    std::copy(ids, ids + count, entry);
    entry[0] |= static_cast<uint32_t>(count) << 24;
    return;
  }
  if (arena_used_ + count > kArenaIds) {
    arena_used_ = 0;
    ++arena_.generation;
  }
  if (arena_ids_.size() < arena_used_ + count + kArenaCopied) {
    arena_ids_.resize(std::max<size_t>(1024, 2 * arena_ids_.size()));
    arena_.ids = arena_ids_.data();
  }
  entry[0] = 0;
  entry[1] = static_cast<uint32_t>(arena_used_);
  entry[2] = static_cast<uint32_t>(count);
  entry[3] = arena_.generation;
  std::copy(ids, ids + count, arena_ids_.begin() + static_cast<std::ptrdiff_t>(arena_used_));
  arena_used_ += count;
}

void WordCache::store(PieceKey key, size_t bucket, const uint32_t* entry) {
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
    evicted_ += near.key[victim].high != 0;
    near.key[victim] = home.key[way];
    std::memcpy(near.ids[victim], home.ids[way], sizeof(home.ids[way]));
  }
  home.key[way] = key;
  std::memcpy(home.ids[way], entry, sizeof(home.ids[way]));
}

uint32_t* WordCache::long_piece(const uint8_t* piece, size_t size, uint64_t hash, uint32_t* out) {
  uint32_t* end = longs_.find(hash, piece, size, out);
  if (end != nullptr) return end;
  end = encode_unknown(vocabulary_, &merger_, piece, size, out);
  longs_.insert(hash, piece, size, out, static_cast<size_t>(end - out));
  return end;
}

}  // namespace lmfast::bpe
