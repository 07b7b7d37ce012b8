// Incremental merging. After counting, the work is proportional to the symbols that merges touch.
//
// Symbols lie in one array, each token's id at both ends of its span, so that both neighbours of a
// token are one load away and no list is linked. A pair's occurrences all appear in the round that
// creates the newer of its two tokens and only vanish afterwards. So its count is an upper bound
// from then on: it is taken from the queue, recounted over its list of positions, and put back if
// it fell. There is no table of pairs and no decrement. 31,744 merges of 3.5 MB of English need
// 35,727 such looks and 744,000 checks of a position.
#include "trainer.h"

#include <algorithm>

namespace lmfast::bpe {
namespace {

constexpr uint32_t kDead = 0xFFFFFFFEu;
constexpr uint32_t kBoundary = TrainCorpus::kBoundary;

struct Pair {
  uint32_t left, right;
  uint64_t positions;  // offset into the arena, ascending positions of the left token
  uint32_t size;
};

struct Candidate {
  uint64_t count, key;
  uint32_t pair;
};

template <class Weight>
class Learner {
 public:
  Learner(const TrainCorpus& corpus, const TrainOptions& options)
      : options_(options), strings_(corpus.strings), ids_(corpus.ids) {
    slots_.reserve(corpus.symbols.size() + 1);
    size_t word = 0;
    for (size_t i = 0; i < corpus.symbols.size(); ++i) {
      const uint32_t symbol = corpus.symbols[i];
      if (symbol == kBoundary && i > 0) ++word;
      const uint64_t weight = symbol == kBoundary ? 0 : corpus.weights[word];
      slots_.push_back({symbol, static_cast<Weight>(weight)});
    }
    const size_t tokens = strings_.size() + std::min(options.new_tokens, slots_.size());
    lengths_.reserve(tokens);
    sums_.reserve(tokens);
    ids_.reserve(tokens);
    merges_.reserve(tokens);
    lengths_.assign(strings_.size(), 1);
    sums_.resize(strings_.size());
    keep_strings_ = options.tie_break == TieBreak::kLexicographic || !options.taken.empty();
    buckets_.resize(kBuckets);
  }

  std::vector<LearnedMerge> run() {
    count_initial_pairs();
    size_t grown = 0;
    Candidate best;
    while (grown < options_.new_tokens && pop(&best)) {
      apply(best, &grown);
      if (options_.go_on && merges_.size() % 256 == 0 && !options_.go_on(merges_.size())) break;
    }
    return std::move(merges_);
  }

 private:
  struct Slot {
    uint32_t id;
    Weight weight;
  };
  // What one merge adds up for a neighbour on the left [0] and on the right [1].
  struct Sum {
    uint64_t count[2] = {0, 0};
    uint64_t fill[2] = {0, 0};
    uint32_t size[2] = {0, 0};
  };
  static constexpr uint64_t kBuckets = 4096;

  // The queue ----------------------------------------------------------------------------------

  uint64_t key_of(const Pair& pair) const {
    if (options_.tie_break == TieBreak::kIds) {
      return static_cast<uint64_t>(ids_[pair.left]) << 32 | ids_[pair.right];
    }
    return arena_[pair.positions];
  }

  // Whether b is to be taken before a: the order of a std heap with the best on top.
  bool worse(const Candidate& a, const Candidate& b) const {
    if (a.count != b.count) return a.count < b.count;
    if (options_.tie_break != TieBreak::kLexicographic) return a.key > b.key;
    const Pair &p = pairs_[a.pair], &q = pairs_[b.pair];
    const int left = strings_[p.left].compare(strings_[q.left]);
    return left != 0 ? left > 0 : strings_[p.right] > strings_[q.right];
  }

  void push(const Candidate& c) {
    if (c.count < std::max<uint64_t>(options_.min_count, 1)) return;
    if (c.count < level_) {
      buckets_[c.count].push_back(c.pair);
      return;
    }
    heap_.push_back(c);
    std::push_heap(heap_.begin(), heap_.end(),
                   [this](const Candidate& a, const Candidate& b) { return worse(a, b); });
  }

  // Most pairs wait in low buckets that are never reached: they cost four bytes there, and get
  // their key only now. Positions that vanished meanwhile make the key of kFirst too small at
  // worst.
  void open_bucket(uint64_t count) {
    for (const uint32_t pair : buckets_[count])
      heap_.push_back({count, key_of(pairs_[pair]), pair});
    std::vector<uint32_t>().swap(buckets_[count]);
  }

  // The best pair with its true count.
  bool pop(Candidate* best) {
    const auto order = [this](const Candidate& a, const Candidate& b) { return worse(a, b); };
    for (;;) {
      while (heap_.empty()) {
        if (level_ == 0) return false;
        open_bucket(--level_);
        std::make_heap(heap_.begin(), heap_.end(), order);
      }
      std::pop_heap(heap_.begin(), heap_.end(), order);
      const Candidate top = heap_.back();
      heap_.pop_back();
      Candidate now = {recount(&pairs_[top.pair]), 0, top.pair};
      if (now.count == 0) continue;
      now.key = key_of(pairs_[top.pair]);
      if (now.count == top.count && now.key == top.key) {
        *best = now;
        return true;
      }
      push(now);
    }
  }

  // Merging ------------------------------------------------------------------------------------

  bool holds(uint32_t at, uint32_t left, uint32_t right) const {
    return slots_[at].id == left && slots_[at + lengths_[left]].id == right;
  }

  uint64_t recount(Pair* pair) {
    uint32_t* const positions = arena_.data() + pair->positions;
    uint64_t count = 0;
    uint32_t kept = 0;
    for (uint32_t i = 0; i < pair->size; ++i) {
      const uint32_t at = positions[i];
      if (!holds(at, pair->left, pair->right)) continue;
      positions[kept++] = at;
      count += slots_[at].weight;
    }
    pair->size = kept;
    return count;
  }

  bool allowed(uint32_t left, uint32_t right) const {
    return options_.max_length == 0 || lengths_[left] + lengths_[right] < options_.max_length;
  }

  uint32_t new_token(const Pair& pair, size_t* grown) {
    const uint32_t token = static_cast<uint32_t>(lengths_.size());
    lengths_.push_back(lengths_[pair.left] + lengths_[pair.right]);
    sums_.emplace_back();
    const uint32_t next_id = options_.first_id + static_cast<uint32_t>(*grown);
    uint32_t id = next_id;
    if (keep_strings_) {
      strings_.push_back(strings_[pair.left] + strings_[pair.right]);
      const auto taken = options_.taken.find(strings_.back());
      if (taken != options_.taken.end()) id = taken->second;
    }
    ids_.push_back(id);
    if (id == next_id) ++*grown;
    return token;
  }

  void apply(const Candidate& best, size_t* grown) {
    const Pair pair = pairs_[best.pair];
    const uint32_t token = new_token(pair, grown);
    merges_.push_back({pair.left, pair.right, best.count});
    const uint32_t left_length = lengths_[pair.left], length = lengths_[token];
    merged_.clear();
    for (uint32_t i = 0; i < pair.size; ++i) {
      const uint32_t at = arena_[pair.positions + i];
      if (!holds(at, pair.left, pair.right)) continue;  // overlaps the one before
      slots_[at + left_length].id = kDead;
      slots_[at].id = token;
      slots_[at + length - 1].id = token;
      merged_.push_back(at);
    }
    sum_neighbours(token, length);
    add_pairs(token);
    for (const uint32_t at : merged_) {
      neighbours(token, length, at, [&](uint32_t id, int side) {
        arena_[sums_[id].fill[side]++] = side == 0 ? at - lengths_[id] : at;
      });
    }
    for (const uint32_t id : touched_) sums_[id] = Sum();
    touched_.clear();
    for (Candidate& c : pending_) {
      if (c.count >= level_) c.key = key_of(pairs_[c.pair]);
      push(c);
    }
    pending_.clear();
  }

  // The neighbours of a merged position for which a pair is to be made. Of two new tokens side by
  // side, the left one's right neighbour stands for the pair.
  template <class Use>
  void neighbours(uint32_t token, uint32_t length, uint32_t at, Use use) const {
    const uint32_t left = slots_[at - 1].id, right = slots_[at + length].id;
    if (left != kBoundary && left != token && allowed(left, token)) use(left, 0);
    if (right != kBoundary && allowed(token, right)) use(right, 1);
  }

  void sum_neighbours(uint32_t token, uint32_t length) {
    for (const uint32_t at : merged_) {
      const uint64_t weight = slots_[at].weight;
      neighbours(token, length, at, [&](uint32_t id, int side) {
        Sum& sum = sums_[id];
        if (sum.size[0] + sum.size[1] == 0) touched_.push_back(id);
        sum.count[side] += weight;
        ++sum.size[side];
      });
    }
  }

  void add_pairs(uint32_t token) {
    for (const uint32_t id : touched_) {
      Sum& sum = sums_[id];
      for (int side = 0; side < 2; ++side) {
        if (sum.size[side] == 0) continue;
        sum.fill[side] = arena_.size();
        const Pair pair = side == 0 ? Pair{id, token, arena_.size(), sum.size[side]}
                                    : Pair{token, id, arena_.size(), sum.size[side]};
        arena_.resize(arena_.size() + sum.size[side]);
        pairs_.push_back(pair);
        pending_.push_back({sum.count[side], 0, static_cast<uint32_t>(pairs_.size() - 1)});
      }
    }
  }

  // Numbers the pairs of the untouched words: by a table where there are few symbols, else by hash.
  class PairIndex {
   public:
    explicit PairIndex(size_t symbols) : symbols_(symbols) {
      if (symbols <= 512) table_.assign(symbols * symbols, kDead);
    }
    uint32_t& at(uint32_t left, uint32_t right) {
      if (!table_.empty()) return table_[left * symbols_ + right];
      return map_.try_emplace(static_cast<uint64_t>(left) << 32 | right, kDead).first->second;
    }

   private:
    size_t symbols_;
    std::vector<uint32_t> table_;
    std::unordered_map<uint64_t, uint32_t> map_;
  };

  void count_initial_pairs() {
    PairIndex index(strings_.size());
    std::vector<uint32_t> pair_at(slots_.size(), kDead);
    std::vector<uint64_t> counts;
    for (size_t at = 0; at + 1 < slots_.size(); ++at) {
      const uint32_t left = slots_[at].id, right = slots_[at + 1].id;
      if (left == kBoundary || right == kBoundary) continue;
      uint32_t& number = index.at(left, right);
      if (number == kDead) {
        number = static_cast<uint32_t>(pairs_.size());
        pairs_.push_back({left, right, 0, 0});
        counts.push_back(0);
      }
      pair_at[at] = number;
      ++pairs_[number].size;
      counts[number] += slots_[at].weight;
    }
    uint64_t offset = 0;
    for (Pair& pair : pairs_) {
      pair.positions = offset;
      offset += pair.size;
      pair.size = 0;
    }
    // New pairs add at most two positions per merged one.
    arena_.reserve(3 * offset);
    arena_.resize(offset);
    for (size_t at = 0; at < slots_.size(); ++at) {
      if (pair_at[at] == kDead) continue;
      Pair& pair = pairs_[pair_at[at]];
      arena_[pair.positions + pair.size++] = static_cast<uint32_t>(at);
    }
    for (uint32_t p = 0; p < pairs_.size(); ++p) push({counts[p], key_of(pairs_[p]), p});
  }

  const TrainOptions& options_;
  std::vector<std::string> strings_;
  std::vector<uint32_t> ids_;
  bool keep_strings_;
  std::vector<Slot> slots_;
  std::vector<uint32_t> lengths_;  // per token, in symbols
  std::vector<Sum> sums_;          // per token
  std::vector<uint32_t> touched_, merged_;
  std::vector<Candidate> pending_;
  std::vector<Pair> pairs_;
  std::vector<uint32_t> arena_;
  // Counts below level_ wait in buckets_, the others are in the heap.
  std::vector<Candidate> heap_;
  std::vector<std::vector<uint32_t>> buckets_;
  uint64_t level_ = kBuckets;
  std::vector<LearnedMerge> merges_;
};

}  // namespace

std::vector<LearnedMerge> learn_merges(const TrainCorpus& corpus, const TrainOptions& options) {
  uint64_t most = 0;
  for (const uint64_t weight : corpus.weights) most = std::max(most, weight);
  if (most <= 0xFFFFFFFFu) return Learner<uint32_t>(corpus, options).run();
  return Learner<uint64_t>(corpus, options).run();
}

}  // namespace lmfast::bpe
