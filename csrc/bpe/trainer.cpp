// Incremental merging. After counting, the work is proportional to the symbols that merges touch.
//
// Symbols lie in one array, each token's id at both ends of its span, so that both neighbours of a
// token are one load away and no list is linked. A pair's occurrences all appear in the round that
// creates the newer of its two tokens and only vanish afterwards. So its count is an upper bound
// from then on: it is taken from the queue, recounted over its list of positions, and put back if
// it fell. There is no table of pairs and no decrement. 31,744 merges of 3.5 MB of English make
// 62,000 pairs, need 67,000 such looks and 780,000 checks of a position.
//
// Measured on a Zen 4, in ms for vocabularies of 5,000 and 32,000: English 14.5 and 19.9, 16 MB of
// code 49.3 and 57.6, counting and Python objects included. With the first pairs counted and a
// merge's positions distributed without a branch on word ends, lists of positions gathered by 16,
// keys of pieces made by four and lines copied by masked loads 12.6 and 18.1, 42.9 and 52.6. With
// pairs fetched before a list is opened and lines that are not held, the last is 47-49 where it was
// 49-51 in the same minute.
//
// What is left of the 18.1: counting 6.8, laying out and first pairs 1.7, merging to 5,000 4.1, and
// 27,000 merges more 5.5, 200 ns each with the bytes objects and the array that come of it: two
// looks, at positions that lie in no near cache, and some four branches that chance decides. Of the
// 52.6: counting 31.4 (25.2 where the text is one piece and not 442,000 lines), laying out and
// first pairs 6.3, merging to 5,000 5.2, the rest 9.7.
#include "trainer.h"

#include <algorithm>
#include <iterator>
#include <limits>
#include <type_traits>
#include <utility>

#include "buffer.h"
#include "train_queue.h"
#include "train_side.h"
#include "train_start.h"

namespace lmfast::bpe {
namespace {

struct Pair {
  uint64_t positions;  // offset into the arena, ascending positions of the left token
  uint32_t size;
  uint32_t left, right;
};

// Id is as narrow as the vocabulary allows, and so is the weight beside it: what merges touch of
// some hundred thousand symbols is then 1 MB, and one cache line tells all about a position.
template <class Id>
class Learner {
 public:
  Learner(const TrainCorpus& corpus, const TrainOptions& options, const Kernels& kernels)
      : options_(options),
        min_count_(std::max<uint64_t>(options.min_count, 1)),
        keep_strings_(options.tie_break == TieBreak::kLexicographic || !options.taken.empty()),
        ids_(corpus.ids),
        queue_(*this) {
    const size_t size = corpus.symbols.size(), symbols = corpus.strings.size();
    lay_out(corpus);
    recount_ = size < kMostInVector ? kernels.recount : nullptr;
    if (keep_strings_) strings_ = corpus.strings;
    const size_t tokens = symbols + std::min(options.new_tokens, size);
    lengths_.reserve(tokens);
    lengths_.assign(symbols, 1);
    ids_.reserve(tokens);
    merges_.reserve(tokens - symbols);
    for (size_t i = 0; i <= symbols; ++i) add_slot();
  }

  std::vector<LearnedMerge> run() {
    count_initial_pairs();
    size_t grown = 0;
    Candidate best;
    while (grown < options_.new_tokens && next(&best)) {
      apply(best, &grown);
      if (done_ < kReport && merges_.size() % 256 != 0) continue;
      done_ = 0;
      if (options_.go_on && !options_.go_on(merges_.size())) break;
    }
    return std::move(merges_);
  }

  void fetch(uint32_t pair) const { __builtin_prefetch(&pairs_.data()[pair]); }
  void fetch_positions(uint32_t pair) const {
    __builtin_prefetch(arena_.data() + pairs_.data()[pair].positions);
  }
  // The order among pairs of one count, for the queue.
  uint64_t key(uint32_t number) const {
    const Pair& pair = pairs_.data()[number];
    switch (options_.tie_break) {
      case TieBreak::kFirst:
        return arena_.data()[pair.positions];
      case TieBreak::kIds:
        return static_cast<uint64_t>(ids_[pair.left]) << 32 | ids_[pair.right];
      default:
        break;
    }
    uint64_t start = 0;
    for (size_t i = 0; i < 8; ++i) {
      const std::string& left = strings_[pair.left];
      start = start << 8 | (i < left.size() ? static_cast<uint8_t>(left[i]) : 0);
    }
    return start;
  }
  bool before(uint32_t a, uint32_t b) const {
    if (options_.tie_break != TieBreak::kLexicographic) return false;
    const Pair &p = pairs_.data()[a], &q = pairs_.data()[b];
    const int left = strings_[p.left].compare(strings_[q.left]);
    return left != 0 ? left < 0 : strings_[p.right] < strings_[q.right];
  }

 private:
  static constexpr Id kBoundary = std::numeric_limits<Id>::max(), kDead = kBoundary - 1;
  static constexpr Id kHeavy = std::numeric_limits<Id>::max();  // a weight that does not fit
  static_assert(sizeof(Id) > 2 || kHeavy == kHeavyWeight);
  static constexpr uint32_t kNone = 0xFFFFFFFFu;
  static constexpr uint64_t kReport = 1u << 20;  // positions looked at between two reports

  struct WideSlot {
    uint32_t id, weight;
  };
  using Slot = std::conditional_t<std::is_same_v<Id, uint16_t>, LearnerSlot, WideSlot>;

  Id& id_at(size_t at) { return slots_.data()[at].id; }
  uint64_t weight_at(uint32_t at) const {
    const Id weight = slots_.data()[at].weight;
    return __builtin_expect(weight != kHeavy, 1) ? weight : heavy_weight(at);
  }
  uint64_t heavy_weight(uint32_t at) const {
    const auto later = [](uint32_t position, const auto& word) { return position < word.first; };
    return std::prev(std::upper_bound(heavy_.begin(), heavy_.end(), at, later))->second;
  }

  // The best pair with its true count.
  bool next(Candidate* best) {
    while (queue_.pop(best)) {
      fetch_coming();
      const uint64_t count = recount(best->pair, best->count);
      if (count == best->count) return true;
      if (count >= min_count_) queue_.push(best->pair, count);
    }
    return false;
  }

  // Pair, list, first and last symbols of the next candidates, one step after the other.
  void fetch_coming() const {
    const uint32_t far = queue_.coming(12), middle = queue_.coming(8), near = queue_.coming(4);
    if (far != kNone) fetch(far);
    if (middle != kNone) fetch_positions(middle);
    if (near == kNone) return;
    const Pair& pair = pairs_.data()[near];
    const uint32_t* const positions = arena_.data() + pair.positions;
    __builtin_prefetch(slots_.data() + positions[0]);
    __builtin_prefetch(slots_.data() + positions[pair.size - 1]);
  }

  bool holds(uint32_t at, Id left, Id right, uint32_t left_length) {
    return (id_at(at) == left) & (id_at(at + left_length) == right);
  }

  void add_slot() {
    for (Side& side : sides_) side.add_token();
  }

  // From how many positions on, and up to how many symbols, positions are looked at by vectors.
  static constexpr uint32_t kVector = 16, kMostInVector = 1u << 31;

  // Drops the positions that vanished, and their weights from the count. Without a branch: which
  // of them did is not predictable.
  uint64_t recount(uint32_t number, uint64_t count) {
    Pair& pair = pairs_.data()[number];
    uint32_t* const positions = arena_.data() + pair.positions;
    const Id left = static_cast<Id>(pair.left), right = static_cast<Id>(pair.right);
    const uint32_t left_length = lengths_[pair.left], size = pair.size;
    uint32_t kept = 0, first = 0;
    if constexpr (std::is_same_v<Id, uint16_t>) {
      if (size >= kVector && recount_ != nullptr) {
        size_t some = size;
        uint64_t dropped = 0;
        first = static_cast<uint32_t>(
            recount_(slots_.data(), {left, right, left_length}, positions, &some, &dropped));
        kept = static_cast<uint32_t>(some);
        count -= dropped;
      }
    }
    for (uint32_t i = first; i < size; ++i) {
      const uint32_t at = positions[i];
      positions[kept] = at;
      const bool held = holds(at, left, right, left_length);
      kept += held;
      count -= weight_at(at) & (static_cast<uint64_t>(held) - 1);
    }
    done_ += size;
    pair.size = kept;
    return count;
  }

  bool allowed(uint32_t left, uint32_t right) const {
    return options_.max_length == 0 || lengths_[left] + lengths_[right] < options_.max_length;
  }

  uint32_t new_token(const Pair& pair, size_t* grown) {
    const uint32_t token = static_cast<uint32_t>(lengths_.size());
    lengths_.push_back(lengths_[pair.left] + lengths_[pair.right]);
    add_slot();
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
    const Pair pair = pairs_.data()[best.pair];
    const uint32_t token = new_token(pair, grown);
    merges_.push_back({pair.left, pair.right, best.count});
    if (pair.size == 1) {
      apply_once(pair, token, best.count);
      return;
    }
    const Id left = static_cast<Id>(pair.left), right = static_cast<Id>(pair.right);
    const uint32_t left_length = lengths_[pair.left], length = lengths_[token];
    uint32_t* const positions = arena_.data() + pair.positions;
    uint32_t merged = 0;
    for (uint32_t i = 0; i < pair.size; ++i) {
      const uint32_t at = positions[i];
      if (left == right && !holds(at, left, right, left_length)) continue;  // "aaa"
      id_at(at + left_length) = kDead;
      id_at(at) = static_cast<Id>(token);
      id_at(at + length - 1) = static_cast<Id>(token);
      positions[merged++] = at;
    }
    done_ += merged;
    sides_[0].begin(merged);
    sides_[1].begin(merged);
    for (uint32_t i = 0; i < merged; ++i) {
      const uint32_t at = positions[i];
      const Id before = id_at(at - 1), after = id_at(at + length);
      const uint64_t weight = weight_at(at);
      sides_[1].add(static_cast<Id>(after + 1), at, weight);
      // Of two new tokens side by side, the left one's right neighbour stands for the pair.
      if (before != static_cast<Id>(token)) {
        sides_[0].add(static_cast<Id>(before + 1), at, weight);
      }
    }
    add_pairs(token, &sides_[0], true);
    add_pairs(token, &sides_[1], false);
  }

  // Two thirds of the merges happen in one place only.
  void apply_once(const Pair& pair, uint32_t token, uint64_t count) {
    const uint32_t at = arena_.data()[pair.positions], length = lengths_[token];
    id_at(at + lengths_[pair.left]) = kDead;
    id_at(at) = static_cast<Id>(token);
    id_at(at + length - 1) = static_cast<Id>(token);
    const Id before = id_at(at - 1), after = id_at(at + length);
    if (before != kBoundary) add_pair(before, token, at - lengths_[before], count);
    if (after != kBoundary) add_pair(token, after, at, count);
  }

  void add_pair(uint32_t left, uint32_t right, uint32_t position, uint64_t count) {
    if (count < min_count_ || !allowed(left, right)) return;
    uint32_t* const list = arena_.room(1);
    Pair* const pair = pairs_.room(1);
    *list = position;
    *pair = {arena_.size(), 1, left, right};
    arena_.set_end(list + 1);
    pairs_.set_end(pair + 1);
    queue_.push(static_cast<uint32_t>(pairs_.size() - 1), count);
  }

  // No branch asks of a position whether its neighbour counts: those that do not, as boundaries, go
  // behind the others and are given up.
  void add_pairs(uint32_t token, Side* side, bool on_the_left) {
    const size_t hits = static_cast<size_t>(side->hits_end - side->hits);
    uint32_t number = static_cast<uint32_t>(pairs_.size());
    uint64_t offset = arena_.size(), given_up = offset + hits;
    uint32_t* const arena = arena_.room(hits) - offset;
    Pair* pair = pairs_.room(static_cast<size_t>(side->found_end - side->found));
    for (Side::Neighbour* n = side->found; n != side->found_end; ++n) {
      const uint32_t id = n->id - 1;
      if (n->id == 0 || n->count < min_count_ || !allowed(id, token)) {
        given_up -= n->size;
        n->fill = given_up;
        n->count = 0;
        continue;
      }
      *pair++ = {offset, n->size, on_the_left ? id : token, on_the_left ? token : id};
      n->fill = offset;
      offset += n->size;
      n->size = on_the_left ? lengths_[id] : 0;
    }
    pairs_.set_end(pair);
    for (const Side::Hit* hit = side->hits; hit != side->hits_end; ++hit) {
      Side::Neighbour& n = side->found[hit->neighbour];
      arena[n.fill++] = hit->position - n.size;
    }
    arena_.set_end(arena + offset);
    for (const Side::Neighbour* n = side->found; n != side->found_end; ++n) {
      if (n->count != 0) queue_.push(number++, n->count);
    }
  }

  // The symbols with their weights. No branch asks where a word ends: that is not predictable.
  void lay_out(const TrainCorpus& corpus) {
    const size_t size = corpus.symbols.size();
    std::vector<Id> weights(corpus.weights.size() + 1, 0);
    for (size_t i = 0; i < corpus.weights.size(); ++i) {
      weights[i] = static_cast<Id>(std::min<uint64_t>(corpus.weights[i], kHeavy));
    }
    slots_.set_end(slots_.room(size + 1) + size + 1);
    Slot* const slots = slots_.data();
    const uint32_t* const symbols = corpus.symbols.data();
    size_t word = ~size_t{0};  // the boundary at 0 begins the first one
    for (size_t i = 0; i < size; ++i) {
      const bool boundary = symbols[i] == TrainCorpus::kBoundary;
      word += boundary;
      const Id weight = weights[word];
      slots[i] = {static_cast<Id>(symbols[i]), boundary ? Id{0} : weight};
      if (__builtin_expect(boundary & (weight == kHeavy), 0)) {
        heavy_.push_back({static_cast<uint32_t>(i + 1), corpus.weights[word]});
      }
    }
    slots[size] = {kBoundary, 0};
  }

  void count_initial_pairs() {
    const uint32_t symbols = static_cast<uint32_t>(lengths_.size());
    const Slot* const slots = slots_.data();
    const size_t last = slots_.size() - 1;
    PairStarts starts(symbols);
    for (size_t at = 0; at < last; ++at) {
      PairStart& start = starts.at(slots[at].id, slots[at + 1].id);
      ++start.next;
      start.count += weight_at(static_cast<uint32_t>(at));
    }
    // Positions of the boundaries' pairs go behind those of the others, and are given up.
    std::vector<uint64_t> counts;
    uint64_t offset = 0, given_up = last;
    starts.for_each([&](PairStart& start, uint32_t left, uint32_t right) {
      const bool inside = left != symbols && right != symbols;
      uint64_t& next = inside ? offset : given_up;
      const uint32_t size = static_cast<uint32_t>(start.next);
      start.next = next;
      next += size;
      if (!inside) return;
      Pair* const pair = pairs_.room(1);
      *pair = {start.next, size, left, right};
      pairs_.set_end(pair + 1);
      counts.push_back(start.count);
    });
    uint32_t* const arena = arena_.room(2 * last);
    for (size_t at = 0; at < last; ++at) {
      arena[starts.at(slots[at].id, slots[at + 1].id).next++] = static_cast<uint32_t>(at);
    }
    arena_.set_end(arena + offset);
    for (uint32_t number = 0; number < pairs_.size(); ++number) {
      if (counts[number] >= min_count_) queue_.push(number, counts[number]);
    }
  }

  const TrainOptions& options_;
  const uint64_t min_count_;
  const bool keep_strings_;
  std::vector<std::string> strings_;  // per token, where they are needed
  std::vector<uint32_t> ids_;         // per token, for ties
  std::vector<uint32_t> lengths_;     // per token, in symbols
  Buffer<Slot> slots_;
  decltype(Kernels::recount) recount_;                // null: there are no vectors for it
  std::vector<std::pair<uint32_t, uint64_t>> heavy_;  // first position of a word, its weight
  Side sides_[2];
  Buffer<Pair> pairs_;
  Buffer<uint32_t> arena_;
  MergeQueue<Learner> queue_;
  std::vector<LearnedMerge> merges_;
  uint64_t done_ = 0;
};

}  // namespace

std::vector<LearnedMerge> learn_merges(const TrainCorpus& corpus, const TrainOptions& options,
                                       const Kernels& kernels) {
  const size_t tokens = corpus.strings.size() + std::min(options.new_tokens, corpus.symbols.size());
  if (tokens < 0xFFFE) return Learner<uint16_t>(corpus, options, kernels).run();
  return Learner<uint32_t>(corpus, options, kernels).run();
}

}  // namespace lmfast::bpe
