// AVX2 kernels.
#include "kernels.h"
#if defined(LMFAST_BPE_X86)
#include <immintrin.h>

#include "encode_loop.h"
#include "lines.h"
#include "merge_loop.h"
#include "scan_windows.h"

namespace lmfast::bpe {
namespace {

// Both halves of a 128-bit product: no extension beyond BMI2 is needed.
inline uint32_t hash_key(PieceKey key) {
  unsigned long long high;
  const unsigned long long low =
      _mulx_u64(key.low ^ 0x9E3779B97F4A7C15ull, key.high ^ 0xD6E8FEB86659FD93ull, &high);
  return static_cast<uint32_t>(low ^ high);
}

// 32 units at a time. Packing works within halves of 128 bits, which the permutation puts in order.
size_t narrow16(const uint16_t* units, size_t n, uint8_t* out) {
  size_t done = 0;
  for (; done + 32 <= n; done += 32) {
    const __m256i* const from = reinterpret_cast<const __m256i*>(units + done);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    if (!_mm256_testz_si256(_mm256_or_si256(a, b), _mm256_set1_epi16(~0x7F))) break;
    const __m256i packed = _mm256_permute4x64_epi64(_mm256_packus_epi16(a, b), 0xD8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(out + done), packed);
  }
  return done;
}

size_t narrow32(const uint32_t* units, size_t n, uint8_t* out) {
  size_t done = 0;
  for (; done + 16 <= n; done += 16) {
    const __m256i* const from = reinterpret_cast<const __m256i*>(units + done);
    const __m256i a = _mm256_loadu_si256(from), b = _mm256_loadu_si256(from + 1);
    if (!_mm256_testz_si256(_mm256_or_si256(a, b), _mm256_set1_epi32(~0x7F))) break;
    const __m256i words = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xD8);
    const __m128i packed =
        _mm_packus_epi16(_mm256_castsi256_si128(words), _mm256_extracti128_si256(words, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(out + done), packed);
  }
  return done;
}

// The keys of a merge in memory, eight compared at a time.
struct VectorKeys {
  alignas(32) uint32_t keys[kMergeSymbols];
  size_t vectors;

  static constexpr bool kAhead = false;
  uint32_t smallest() const {
    const __m256i* const p = reinterpret_cast<const __m256i*>(keys);
    __m256i half = _mm256_load_si256(p);
    for (size_t i = 1; i < vectors; ++i) half = _mm256_min_epu32(half, _mm256_load_si256(p + i));
    __m128i least = _mm_min_epu32(_mm256_castsi256_si128(half), _mm256_extracti128_si256(half, 1));
    least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0x4E));
    least = _mm_min_epu32(least, _mm_shuffle_epi32(least, 0xB1));
    return static_cast<uint32_t>(_mm_cvtsi128_si32(least));
  }

  void set(size_t at, uint32_t key) { keys[at] = key; }
};

struct Avx2Ops {
  static uint32_t find(const RankTable& table, uint32_t left, uint32_t right) {
    const uint64_t key = pair_key(left, right);
    const __m256i wanted = _mm256_set1_epi64x(static_cast<int64_t>(key));
    for (size_t line = line_of(table, key);; line = (line + 1) & table.line_mask) {
      const uint64_t* const slots = table.slots + line * kLineSlots;
      const __m256i* const p = reinterpret_cast<const __m256i*>(slots);
      const auto equal = [wanted](__m256i four) {
        const __m256i same = _mm256_cmpeq_epi64(_mm256_srli_epi64(four, 22), wanted);
        return static_cast<uint32_t>(_mm256_movemask_pd(_mm256_castsi256_pd(same)));
      };
      const uint32_t found = equal(_mm256_load_si256(p)) | equal(_mm256_load_si256(p + 1)) << 4;
      const uint32_t rank =
          static_cast<uint32_t>(slots[__builtin_ctz(found | 1u << 7)]) & kMaxRanks;
      const bool full = slots[kLineSlots - 1] != kEmptySlot;
      if (__builtin_expect(!(full && found == 0), 1)) return found == 0 ? kNoRank : rank;
    }
  }

  static uint32_t key(const uint8_t* piece, size_t row, PieceKey* key) {
    *key = piece_key_at(piece, row);
    return hash_key(*key);
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

  static uint32_t match(const CountBucket& bucket, const PieceKey& key) {
    const __m128i* const lines = reinterpret_cast<const __m128i*>(&bucket);
    const __m128i wanted = _mm_load_si128(reinterpret_cast<const __m128i*>(&key));
    const __m256i two = _mm256_load_si256(reinterpret_cast<const __m256i*>(lines));
    const __m256i first = _mm256_cmpeq_epi64(two, _mm256_broadcastsi128_si256(wanted));
    const __m128i last = _mm_cmpeq_epi64(_mm_load_si128(lines + 2), wanted);
    const int halves = _mm256_movemask_pd(_mm256_castsi256_pd(first)) |
                       _mm_movemask_pd(_mm_castsi128_pd(last)) << 4;
    return static_cast<uint32_t>(halves & halves >> 1 & 0x15);
  }

  // Classes of 32 ASCII bytes by comparisons; bytes above 0x7F get 0.
  static __m256i ascii_classes(__m256i c) {
    const auto within = [](__m256i v, char first, char count) {
      const __m256i shifted = _mm256_sub_epi8(v, _mm256_set1_epi8(first));
      const __m256i last = _mm256_set1_epi8(static_cast<char>(count - 1));
      return _mm256_cmpeq_epi8(_mm256_min_epu8(shifted, last), shifted);
    };
    const auto pick = [](__m256i mask, uint8_t bits) {
      return _mm256_and_si256(mask, _mm256_set1_epi8(static_cast<char>(bits)));
    };
    const auto equal = [c](char v) { return _mm256_cmpeq_epi8(c, _mm256_set1_epi8(v)); };
    const __m256i newline = _mm256_or_si256(equal('\n'), equal('\r'));
    const __m256i space = _mm256_or_si256(equal(' '), within(c, 9, 5));
    const __m256i cased =
        _mm256_or_si256(pick(within(c, 'a', 26), kBitLower), pick(within(c, 'A', 26), kBitUpper));
    const __m256i spaces = _mm256_or_si256(pick(space, kBitSpace), pick(newline, kBitNewline));
    return _mm256_or_si256(_mm256_or_si256(cased, spaces), pick(within(c, '0', 10), kBitNumber));
  }

  static uint64_t mask(__m256i low, __m256i high) {
    const uint32_t a = static_cast<uint32_t>(_mm256_movemask_epi8(low));
    const uint32_t b = static_cast<uint32_t>(_mm256_movemask_epi8(high));
    return static_cast<uint64_t>(b) << 32 | a;
  }

  static void classify(const uint8_t* text, Carry* carry, Window* w) {
    const __m256i low = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text));
    const __m256i high = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(text + 32));
    __m256i low_classes = ascii_classes(low), high_classes = ascii_classes(high);
    const uint64_t odd = mask(low, high);
    w->odd_space = w->odd_number = false;
    if (__builtin_expect(odd != 0, 0)) {
      alignas(32) uint8_t own[64 + 8];
      _mm256_store_si256(reinterpret_cast<__m256i*>(own), low_classes);
      _mm256_store_si256(reinterpret_cast<__m256i*>(own + 32), high_classes);
      classify_characters(text, odd, own, carry, w);
      low_classes = _mm256_load_si256(reinterpret_cast<const __m256i*>(own));
      high_classes = _mm256_load_si256(reinterpret_cast<const __m256i*>(own + 32));
    }
    // Shifting a class bit to the top of its byte lets movemask read it.
    const auto bit = [&](int shift) {
      return mask(_mm256_slli_epi16(low_classes, shift), _mm256_slli_epi16(high_classes, shift));
    };
    const auto equal = [&](char c) {
      const __m256i v = _mm256_set1_epi8(c);
      return mask(_mm256_cmpeq_epi8(low, v), _mm256_cmpeq_epi8(high, v));
    };
    w->lower = bit(7);
    w->upper = bit(6);
    w->uncased = bit(5);
    w->number = bit(4);
    w->space = bit(3);
    w->newline = bit(2);
    w->mark = bit(1);
    w->tail = bit(0);
    w->blank = equal(' ');
    w->quote = equal('\'');
    w->slash = equal('/');
    w->separator = equal(0x1C) | equal(0x1D) | equal(0x1E) | equal(0x1F);
  }

  static void positions(uint64_t mask, size_t base, uint16_t* out) {
    for (; mask != 0; mask &= mask - 1) {
      *out++ = static_cast<uint16_t>(base + static_cast<size_t>(__builtin_ctzll(mask)));
    }
  }
};

size_t scan(Pattern pattern, const uint8_t* text, size_t n, uint16_t* starts, uint16_t* ends) {
  return scan_pattern<Avx2Ops>(pattern, text, n, starts, ends);
}

uint32_t* encode(const EncodeContext& context, const uint8_t* text, PieceSpans pieces,
                 uint32_t* out) {
  return encode_loop<Avx2Ops>(context, text, pieces, out);
}

uint64_t merge(const RankTable& table, const uint8_t* bytes, uint32_t* ids, size_t n) {
  VectorKeys keys;
  keys.vectors = (n + 7) / 8;
  first_keys<Avx2Ops>(table, bytes, ids, n, 8 * keys.vectors, keys.keys);
  return merge_loop<Avx2Ops>(table, ids, keys, n);
}

}  // namespace

const Kernels kAvx2Kernels = {
    "avx2",   narrow16, narrow32,           leading_spaces_of,        copy_line_to,
    hash_key, scan,     keys_loop<Avx2Ops>, find_words_loop<Avx2Ops>, merge,
    nullptr,  encode};

}  // namespace lmfast::bpe
#endif
