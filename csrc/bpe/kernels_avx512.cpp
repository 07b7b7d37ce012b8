// AVX-512 kernels: F, BW, DQ, VL, VBMI, VBMI2, AES and VAES.
#include "kernels.h"
#if defined(LMFAST_BPE_X86)
#include <immintrin.h>

#include "encode_loop.h"
#include "merge_loop.h"
#include "scan_windows.h"

namespace lmfast::bpe {
namespace {

// The two AES rounds spread best of what was tried; CRC32C -10 to -14 %, two products -34 %.
inline __m128i hash_vector(__m128i key) {
  const __m128i seed = _mm_set_epi64x(0x243F6A8885A308D3ll, 0x13198A2E03707344ll);
  return _mm_aesenc_si128(_mm_aesenc_si128(key, seed), seed);
}

uint32_t hash_key(PieceKey key) {
  __m128i vector;
  std::memcpy(&vector, &key, sizeof(vector));
  return static_cast<uint32_t>(_mm_cvtsi128_si32(hash_vector(vector)));
}

size_t narrow16(const uint16_t* units, size_t n, uint8_t* out) {
  size_t done = 0;
  for (; done + 64 <= n; done += 64) {
    const __m512i a = _mm512_loadu_si512(units + done), b = _mm512_loadu_si512(units + done + 32);
    if (_mm512_test_epi16_mask(_mm512_or_si512(a, b), _mm512_set1_epi16(~0x7F)) != 0) break;
    __m256i* const to = reinterpret_cast<__m256i*>(out + done);
    _mm256_storeu_si256(to, _mm512_cvtepi16_epi8(a));
    _mm256_storeu_si256(to + 1, _mm512_cvtepi16_epi8(b));
  }
  return done;
}

size_t narrow32(const uint32_t* units, size_t n, uint8_t* out) {
  size_t done = 0;
  for (; done + 32 <= n; done += 32) {
    const __m512i a = _mm512_loadu_si512(units + done), b = _mm512_loadu_si512(units + done + 16);
    if (_mm512_test_epi32_mask(_mm512_or_si512(a, b), _mm512_set1_epi32(~0x7F)) != 0) break;
    __m128i* const to = reinterpret_cast<__m128i*>(out + done);
    _mm_storeu_si128(to, _mm512_cvtepi32_epi8(a));
    _mm_storeu_si128(to + 1, _mm512_cvtepi32_epi8(b));
  }
  return done;
}

// The keys of a merge in registers: one key each in the lanes of N of them.
template <int N>
struct RegisterKeys {
  __m512i lanes[N];

  static constexpr bool kAhead = true;
  uint32_t smallest() const {
    __m512i least = lanes[0];
    for (int i = 1; i < N; ++i) least = _mm512_min_epu32(least, lanes[i]);
    return smallest_of(least);
  }
  uint32_t smallest_above(uint32_t key) const {
    const __m512i than = _mm512_set1_epi32(static_cast<int>(key));
    __m512i least = _mm512_set1_epi32(-1);
    for (const __m512i& keys : lanes) {
      least = _mm512_mask_min_epu32(least, _mm512_cmpgt_epu32_mask(keys, than), least, keys);
    }
    return smallest_of(least);
  }
  static uint32_t smallest_of(__m512i least) {
    const __m256i half =
        _mm256_min_epu32(_mm512_castsi512_si256(least), _mm512_extracti64x4_epi64(least, 1));
    __m128i quarter =
        _mm_min_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    quarter = _mm_min_epu32(quarter, _mm_shuffle_epi32(quarter, 0x4E));
    quarter = _mm_min_epu32(quarter, _mm_shuffle_epi32(quarter, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(quarter));
  }

  void set(size_t at, uint32_t key) {
    const uint64_t lane = 1ull << at;
    for (int i = 0; i < N; ++i) {
      lanes[i] = _mm512_mask_set1_epi32(lanes[i], static_cast<__mmask16>(lane >> (16 * i)),
                                        static_cast<int>(key));
    }
  }
};

struct Avx512Ops {
  static uint32_t find(const RankTable& table, uint32_t left, uint32_t right) {
    const uint64_t key = pair_key(left, right);
    for (size_t line = line_of(table, key);; line = (line + 1) & table.line_mask) {
      const uint64_t* const slots = table.slots + line * kLineSlots;
      const __m512i all = _mm512_load_si512(slots);
      const __mmask8 equal = _mm512_cmpeq_epi64_mask(_mm512_srli_epi64(all, 22),
                                                     _mm512_set1_epi64(static_cast<int64_t>(key)));
      const __m128i found = _mm512_castsi512_si128(_mm512_maskz_compress_epi64(equal, all));
      const uint32_t rank = static_cast<uint32_t>(_mm_cvtsi128_si32(found)) & kMaxRanks;
      const bool full = slots[kLineSlots - 1] != kEmptySlot;
      if (__builtin_expect(!(full && equal == 0), 1)) return equal == 0 ? kNoRank : rank;
    }
  }

  static uint32_t key(const uint8_t* piece, size_t row, PieceKey* key) {
    const auto load = [](const uint8_t* p) {
      return _mm_load_si128(reinterpret_cast<const __m128i*>(p));
    };
    const __m128i bytes = _mm_loadu_si128(reinterpret_cast<const __m128i*>(piece));
    const __m128i mask = load(&kKeyMasks.bytes[0][0] + row);
    const __m128i length = load(&kKeyMasks.length[0][0] + row);
    const __m128i k = _mm_ternarylogic_epi32(bytes, mask, length, 0xEA);  // (a & b) | c
    _mm_store_si128(reinterpret_cast<__m128i*>(key), k);
    return static_cast<uint32_t>(_mm_cvtsi128_si32(hash_vector(k)));
  }

  static uint32_t probe(const CacheBucket& bucket, const PieceKey& key, uint32_t* out) {
    // The ids of the way whose 16 key bytes are all equal, or zeros; no branch on which way it is,
    // which is random and costs half a misprediction a piece (5.3 instead of 3.2 ns).
    const __m256i keys = _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.key));
    const __m256i ids = _mm256_load_si256(reinterpret_cast<const __m256i*>(bucket.ids));
    const __m256i wanted =
        _mm256_broadcastsi128_si256(_mm_load_si128(reinterpret_cast<const __m128i*>(&key)));
    const __m256i half = _mm256_cmpeq_epi64(keys, wanted);
    const __m256i equal = _mm256_and_si256(half, _mm256_shuffle_epi32(half, 0x4E));
    const __m256i found = _mm256_and_si256(ids, equal);
    const __m128i value =
        _mm_or_si128(_mm256_castsi256_si128(found), _mm256_extracti128_si256(found, 1));
    const __m128i no_count = _mm_setr_epi32(0xFFFFFF, -1, -1, -1);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out), _mm_and_si128(value, no_count));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(value)) >> 24;
  }

  static void classify(const uint8_t* text, Carry* carry, Window* w) {
    const __m512i bytes = _mm512_loadu_si512(text);
    const __m512i low = _mm512_loadu_si512(kAscii.of);
    const __m512i high = _mm512_loadu_si512(kAscii.of + 64);
    __m512i classes = _mm512_permutex2var_epi8(low, bytes, high);
    const uint64_t odd = _mm512_movepi8_mask(bytes);
    w->odd_space = w->odd_number = false;
    if (__builtin_expect(odd != 0, 0)) {
      alignas(64) uint8_t own[64 + 8];
      _mm512_store_si512(own, classes);
      classify_characters(text, odd, own, carry, w);
      classes = _mm512_load_si512(own);
    }
    const auto bit = [&](uint8_t b) {
      return _mm512_test_epi8_mask(classes, _mm512_set1_epi8(static_cast<char>(b)));
    };
    const auto equal = [&](char c) { return _mm512_cmpeq_epi8_mask(bytes, _mm512_set1_epi8(c)); };
    w->lower = bit(kBitLower);
    w->upper = bit(kBitUpper);
    w->uncased = bit(kBitUncased);
    w->number = bit(kBitNumber);
    w->space = bit(kBitSpace);
    w->newline = bit(kBitNewline);
    w->mark = bit(kBitMark);
    w->tail = bit(kBitTail);
    w->blank = equal(' ');
    w->quote = equal('\'');
    w->slash = equal('/');
    w->separator =
        _mm512_cmplt_epu8_mask(_mm512_sub_epi8(bytes, _mm512_set1_epi8(0x1C)), _mm512_set1_epi8(4));
  }

  static uint32_t match(const CountBucket& bucket, const PieceKey& key) {
    const __m512i wanted =
        _mm512_broadcast_i32x4(_mm_load_si128(reinterpret_cast<const __m128i*>(&key)));
    const uint32_t halves = _mm512_cmpeq_epi64_mask(_mm512_load_si512(&bucket), wanted);
    return halves & halves >> 1 & 0x15;
  }

  // Writes base + the index of every bit; up to 64 entries are stored whatever the mask.
  static void positions(uint64_t mask, size_t base, uint16_t* out) {
    const __m512i index = _mm512_set_epi8(
        63, 62, 61, 60, 59, 58, 57, 56, 55, 54, 53, 52, 51, 50, 49, 48, 47, 46, 45, 44, 43, 42, 41,
        40, 39, 38, 37, 36, 35, 34, 33, 32, 31, 30, 29, 28, 27, 26, 25, 24, 23, 22, 21, 20, 19, 18,
        17, 16, 15, 14, 13, 12, 11, 10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0);
    const __m512i packed = _mm512_maskz_compress_epi8(mask, index);
    const __m512i offset = _mm512_set1_epi16(static_cast<int16_t>(base));
    _mm512_storeu_si512(
        out, _mm512_add_epi16(_mm512_cvtepu8_epi16(_mm512_castsi512_si256(packed)), offset));
    if (__builtin_popcountll(mask) > 32) {
      const __m256i upper = _mm512_extracti64x4_epi64(packed, 1);
      _mm512_storeu_si512(out + 32, _mm512_add_epi16(_mm512_cvtepu8_epi16(upper), offset));
    }
  }
};

size_t scan(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts, uint16_t* ends) {
  return scan_pattern<Avx512Ops>(pattern, text, n, starts, ends);
}

uint32_t* encode(const EncodeContext& context, const uint8_t* text, PieceSpans pieces,
                 uint32_t* out) {
  return encode_loop<Avx512Ops>(context, text, pieces, out);
}

// Symbols and keys of up to 16 of n bytes, from byte `at` on; gathered, so that no load has to wait
// for narrower stores.
__m512i gather_keys(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n,
                    size_t at) {
  if (at >= n) return _mm512_set1_epi32(-1);
  const uint32_t some = n - at < 16 ? (1u << (n - at)) - 1 : 0xFFFF;
  const uint32_t pairs = n - at <= 16 ? some >> 1 : some;
  const auto load = [bytes, at](uint32_t mask, size_t skip) {
    return _mm512_cvtepu8_epi32(
        _mm_maskz_loadu_epi8(static_cast<__mmask16>(mask), bytes + at + skip));
  };
  const __m512i all = _mm512_set1_epi32(-1);
  const __m512i left = load(some, 0), right = load(pairs, 1);
  const __m512i symbols =
      _mm512_mask_i32gather_epi32(all, static_cast<__mmask16>(some), left, table.byte_symbols, 4);
  _mm512_mask_storeu_epi32(ids + at, static_cast<__mmask16>(some), symbols);
  const __m512i pair = _mm512_or_si512(_mm512_slli_epi32(left, 8), right);
  const __m512i keys =
      _mm512_mask_i32gather_epi32(all, static_cast<__mmask16>(pairs), pair, table.byte_pairs, 4);
  const __m512i index = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  return _mm512_or_si512(keys,
                         _mm512_add_epi32(index, _mm512_set1_epi32(static_cast<int32_t>(at))));
}

template <int N>
uint64_t merge_registers(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n) {
  RegisterKeys<N> keys;
  if (bytes != nullptr) {
    for (size_t i = 0; i < N; ++i) keys.lanes[i] = gather_keys(table, bytes, ids, n, 16 * i);
  } else {
    uint32_t own[16 * N];
    first_keys<Avx512Ops>(table, nullptr, ids, n, 16 * N, own);
    for (size_t i = 0; i < N; ++i) keys.lanes[i] = _mm512_loadu_si512(own + 16 * i);
  }
  return merge_loop<Avx512Ops>(table, ids, keys, n);
}

// Words of English that are no token, 8 bytes: 161 ns instead of the 229 of ranks in an array,
// which the next search loads before the stores to it have arrived; random letters, 29 bytes: 288
// instead of 1044.
uint64_t merge(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n) {
  if (n <= 16) return merge_registers<1>(table, bytes, ids, n);
  return n <= 32 ? merge_registers<2>(table, bytes, ids, n)
                 : merge_registers<4>(table, bytes, ids, n);
}

// Bytes of text[0, n) as far as they fit a vector; nothing beyond them is read.
__m512i load_some(const uint8_t* text, size_t n) {
  return _mm512_maskz_loadu_epi8(n < 64 ? (1ull << n) - 1 : ~0ull, text);
}

// For lines of up to 64 bytes without a branch on their length.
size_t leading_spaces(const uint8_t* text, size_t n) {
  for (size_t at = 0;; at += 64) {
    const __m512i bytes = load_some(text + at, n - at);  // zeros behind the end
    const uint64_t others = _mm512_cmpneq_epi8_mask(bytes, _mm512_set1_epi8(' '));
    if (others != 0) return at + static_cast<size_t>(__builtin_ctzll(others));
    if (n - at == 64) return n;
  }
}

void copy_line(const uint8_t* from, size_t n, uint8_t* to) {
  size_t at = 0;
  for (; at + 64 < n; at += 64) _mm512_storeu_si512(to + at, _mm512_loadu_si512(from + at));
  _mm512_storeu_si512(to + at, load_some(from + at, n - at));
}

// keys_loop for four pieces at a time: half the instructions a piece.
void keys(const CountTable& table, const uint8_t* text, PieceSpans pieces, PieceKey* keys,
          uint32_t* hashes) {
  // Of the bytes of a lane: which one it is, but that the last is beyond every length; and the lane
  // of four 16-bit sizes.
  const __m512i place =
      _mm512_broadcast_i32x4(_mm_setr_epi8(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, -1));
  const __m512i last = _mm512_broadcast_i32x4(_mm_set_epi32(-0x1000000, 0, 0, 0));
  const __m512i lane =
      _mm512_set_epi64(0x0606060606060606, 0x0606060606060606, 0x0404040404040404,
                       0x0404040404040404, 0x0202020202020202, 0x0202020202020202, 0, 0);
  const __m512i seed =
      _mm512_broadcast_i32x4(_mm_set_epi64x(0x243F6A8885A308D3ll, 0x13198A2E03707344ll));
  const __m512i first = _mm512_castsi128_si512(_mm_setr_epi32(0, 4, 8, 12));
  const auto load = [text](uint16_t start) {
    return _mm_loadu_si128(reinterpret_cast<const __m128i*>(text + start));
  };
  size_t i = 0;
  for (; i + 4 <= pieces.count; i += 4) {
    const uint16_t* const start = pieces.start + i;
    const __m128i starts = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(start));
    const __m128i ends = _mm_loadl_epi64(reinterpret_cast<const __m128i*>(pieces.end + i));
    const __m128i sizes = _mm_min_epu16(_mm_sub_epi16(ends, starts), _mm_set1_epi16(16));
    const __m512i size = _mm512_permutexvar_epi8(lane, _mm512_castsi128_si512(sizes));
    __m512i bytes = _mm512_castsi128_si512(load(start[0]));
    bytes = _mm512_inserti32x4(bytes, load(start[1]), 1);
    bytes = _mm512_inserti32x4(bytes, load(start[2]), 2);
    bytes = _mm512_inserti32x4(bytes, load(start[3]), 3);
    const __mmask64 own = _mm512_cmplt_epu8_mask(place, size);
    const __m512i key = _mm512_mask_mov_epi8(_mm512_and_si512(size, last), own, bytes);
    _mm512_storeu_si512(keys + i, key);
    const __m512i hash = _mm512_aesenc_epi128(_mm512_aesenc_epi128(key, seed), seed);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(hashes + i),
                     _mm512_castsi512_si128(_mm512_permutexvar_epi32(first, hash)));
    for (size_t k = i; k < i + 4; ++k) {
      __builtin_prefetch(table.buckets + (hashes[k] & table.mask));
    }
  }
  const PieceSpans rest = {pieces.start + i, pieces.end + i, pieces.count - i};
  keys_loop<Avx512Ops>(table, text, rest, keys + i, hashes + i);
}

// Two gathers of 16 positions.
size_t recount(const LearnerSlot* slots, LearnedPair pair, uint32_t* positions, size_t* n,
               uint64_t* dropped) {
  const __m512i ids = _mm512_set1_epi32(0xFFFF);
  const __m512i left = _mm512_set1_epi32(pair.left), right = _mm512_set1_epi32(pair.right);
  const __m512i length = _mm512_set1_epi32(static_cast<int32_t>(pair.left_length));
  const __m512i heavy = _mm512_set1_epi32(kHeavyWeight);
  __m512i weights = _mm512_setzero_si512();
  size_t done = 0, kept = 0;
  for (; done + 16 <= *n; done += 16) {
    const __m512i at = _mm512_loadu_si512(positions + done);
    const __m512i first = _mm512_i32gather_epi32(at, slots, 4);
    const __m512i second = _mm512_i32gather_epi32(_mm512_add_epi32(at, length), slots, 4);
    const __m512i differ =
        _mm512_or_si512(_mm512_xor_si512(first, left), _mm512_xor_si512(second, right));
    const __mmask16 gone = _mm512_test_epi32_mask(differ, ids);
    const __m512i weight = _mm512_maskz_srli_epi32(gone, first, 16);
    if (__builtin_expect(_mm512_cmpeq_epi32_mask(weight, heavy) != 0, 0)) break;
    weights = _mm512_add_epi64(weights, _mm512_srli_epi64(weight, 32));
    weights = _mm512_add_epi64(weights, _mm512_and_si512(weight, _mm512_set1_epi64(0xFFFF)));
    const __mmask16 held = static_cast<__mmask16>(~gone);
    _mm512_storeu_si512(positions + kept, _mm512_maskz_compress_epi32(held, at));
    kept += static_cast<size_t>(__builtin_popcount(held));
  }
  *n = kept;
  *dropped = static_cast<uint64_t>(_mm512_reduce_add_epi64(weights));
  return done;
}

}  // namespace

const Kernels kAvx512Kernels = {"avx512",       narrow16,  narrow32,
                                leading_spaces, copy_line, hash_key,
                                scan,           keys,      find_words_loop<Avx512Ops>,
                                merge,          recount,   encode};

}  // namespace lmfast::bpe
#endif
