// The parts compiled once per instruction set, and the choice between them.
//
// Their sources see raw pointers only: no STL, so that no inline library function is emitted with
// instructions that the machine may lack.
#pragma once
#include <cstddef>
#include <cstdint>

#include "rank_table.h"
#include "scanner.h"

namespace lmfast::bpe {

// Bytes that may be read beyond the part of a text that a kernel works on.
constexpr size_t kPadding = 192;
// Bytes scanned at a time: the boundaries of a chunk stay in L1. 1 to 8 KB measure alike.
constexpr size_t kChunk = 4096;

// Pieces up to 15 bytes are looked up by value: bytes, zeros, and the length in the last byte.
constexpr size_t kShortPiece = 15;
// As many symbols as one word has bits.
constexpr size_t kMergeSymbols = 64;
struct PieceKey {
  uint64_t low, high;
};

// Two entries of the word cache in one cache line. ids[way][0] >> 24 is the number of ids, 1 to 4.
// 0 marks an entry whose ids are in the arena: ids[way][2] of them from ids[way][1] on, while
// ids[way][3] is the arena's generation.
struct alignas(64) CacheBucket {
  PieceKey key[2];
  uint32_t ids[2][4];
};

// Three counted words in one cache line; `used` of them are there, the keys of the others are 0.
struct alignas(64) CountBucket {
  PieceKey key[3];
  uint32_t word[3];
  uint32_t used;
};

struct CountTable {
  const CountBucket* buckets;
  size_t mask;  // of a hash
};

struct PieceSpans {
  const uint16_t* start;
  const uint16_t* end;
  size_t count;
};

// Longer pieces: a slot is the upper half of a piece's hash and a reference to its record; 0 is an
// empty slot. The first slot to look at is hash >> shift.
struct LongIndex {
  const uint64_t* slots;
  const uint8_t* records;
  int shift;

  static size_t offset(uint64_t slot) { return ((slot & 0xFFFFFFFF) - 1) * 8; }
  static uint64_t reference(size_t offset) { return offset / 8 + 1; }
};

// Ids that do not fit their entry; kArenaCopied of them can always be read.
struct Arena {
  const uint32_t* ids;
  uint32_t generation;  // never 0
};
constexpr size_t kArenaCopied = 16;

// What the encoding loop needs; `slow` handles every piece that is not a plain hit;
// for a longer piece than kShortPiece, key.low is its hash_bytes.
struct EncodeContext {
  const CacheBucket* buckets;
  uint32_t bucket_mask;  // of a hash, giving the bucket's offset in bytes
  const Arena* arena;
  const LongIndex* longs;
  void* owner;
  uint32_t* (*slow)(void* owner, const uint8_t* piece, size_t size, PieceKey key, uint32_t offset,
                    uint32_t* out);
};

struct Kernels {
  const char* name;
  // Copies units below 0x80 as bytes, up to the first other one; returns how many. May stop up to
  // 64 units before it.
  size_t (*narrow16)(const uint16_t* units, size_t n, uint8_t* out);
  size_t (*narrow32)(const uint32_t* units, size_t n, uint8_t* out);
  uint32_t (*hash)(PieceKey key);
  // Piece starts in text[0, n), the first at 0; n <= kChunk + kPadding. The pieces between them are
  // final when what follows text[n] is the rest of the text; the last one may go on. Returns 0
  // when it cannot tell (next_piece can). `ends` is filled for kWords only.
  size_t (*scan)(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts, uint16_t* ends);
  // Keys and hashes of the pieces; the key of a longer piece than kShortPiece means nothing. Their
  // buckets are on the way to the cache afterwards.
  void (*keys)(const CountTable& table, const uint8_t* text, PieceSpans pieces, PieceKey* keys,
               uint32_t* hashes);
  // The words of n keys; returns how many come before the first that is not in its bucket.
  size_t (*find_words)(const CountTable& table, const PieceKey* keys, const uint32_t* hashes,
                       size_t n, uint32_t* words);
  // Merges 1 <= n <= kMergeSymbols symbols, lowest rank first and leftmost first: the bytes, or the
  // ids where `bytes` is null. Symbols stay where they are; the bits of the result say where tokens
  // begin, and there `ids` holds them.
  uint64_t (*merge)(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n);
  // Appends the ids of the pieces to `out`; returns the new end.
  uint32_t* (*encode)(const EncodeContext& context, const uint8_t* text, PieceSpans pieces,
                      uint32_t* out);
};

// The best level this machine has and LMFAST_CPU_ISA=default|avx2|avx512|amx allows; chosen once.
const Kernels& kernels();
// A level by name, or nullptr where the machine or the build lacks it: for the tests.
const Kernels* kernels_by_name(const char* name);

extern const Kernels kDefaultKernels;
#if defined(__x86_64__)
#define LMFAST_BPE_X86 1
extern const Kernels kAvx2Kernels;
extern const Kernels kAvx512Kernels;
#endif

}  // namespace lmfast::bpe
